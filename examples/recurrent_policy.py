"""A recurrent policy on a pole that must be balanced without seeing speeds: what `resets` are for.

    python examples/recurrent_policy.py --plot policy.png  training with resets: episodes become 20 times as long
    python examples/recurrent_policy.py --compare          the same training with a loop over steps as well

Sixteen carts run side by side. A stretch of T steps of all of them, x [T, B, I], is one training batch, in which some
episodes end and others begin: at those steps the state must be cleared, and no gradient may pass. torch.nn's layers
cannot do that inside a call, so that such code steps through time in Python (`StepByStep`). seqkern takes `resets`
[T, B] and the whole stretch in one call (`InOneCall`). Both have the same weights; from the same seed both see the
same episodes (in float64, with weights rounded to float32 after each update: `round_off`).

The training is PPO (Schulman et al. 2017) with a GRU before the policy and the value; the observation is CartPole's
position and angle, without the two speeds, which only memory can supply.

Needs: pip install gymnasium, and matplotlib for --plot
"""

import argparse
import time
from typing import NamedTuple

import gymnasium
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import seqkern

SEEN = (0, 2)  # of position, speed, angle, angular speed
UNITS = torch.tensor(
    [1.0, 0.1], dtype=torch.float64
)  # an episode ends beyond 2.4 and 0.21: without, the GRU sees zeros
GAMMA, LAMBDA, CLIP, EPOCHS, GROUPS = 0.99, 0.95, 0.2, 4, 4
VALUE_UNIT = 20  # returns go up to 1 / (1 - GAMMA) = 100


class StepByStep(nn.Module):
    """torch.nn.GRU, called once a step."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.rnn = nn.GRU(inputs, hidden)

    def forward(self, x: Tensor, h: Tensor, resets: Tensor) -> tuple[Tensor, Tensor]:
        ys = []
        for x_t, reset in zip(x, resets, strict=True):
            y, h = self.rnn(x_t.unsqueeze(0), h * reset.logical_not().unsqueeze(-1))
            ys.append(y)
        return torch.cat(ys), h


class InOneCall(nn.Module):
    """seqkern.GRU, with resets."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.rnn = seqkern.GRU(inputs, hidden)

    def forward(self, x: Tensor, h: Tensor, resets: Tensor) -> tuple[Tensor, Tensor]:
        return self.rnn(x, h, resets=resets)


class Policy(nn.Module):
    def __init__(self, core: type[nn.Module], hidden: int):
        super().__init__()
        self.hidden = hidden
        self.core = core(len(SEEN), hidden)
        self.action, self.value = nn.Linear(hidden, 2), nn.Linear(hidden, 1)

    def forward(self, x: Tensor, h: Tensor, resets: Tensor) -> tuple[Categorical, Tensor, Tensor]:
        """Actions and values of x [T, B, 2], and the state after it [1, B, H]."""
        y, h = self.core(x, h, resets)
        return Categorical(logits=self.action(y)), VALUE_UNIT * self.value(y).squeeze(-1), h


class Carts:
    """B environments; one whose episode ended starts the next, from seeds in order."""

    def __init__(self, batch: int, seed: int):
        self.envs = [gymnasium.make("CartPole-v1") for _ in range(batch)]
        self.next_seed = seed * 100_000
        self.x = torch.stack([self._reset(env) for env in self.envs])
        self.starts = torch.ones(batch, dtype=torch.bool)  # whether x is the first of an episode
        self.length, self.finished = [0] * batch, []

    def _reset(self, env: gymnasium.Env) -> Tensor:
        self.next_seed += 1
        return self._see(env.reset(seed=self.next_seed)[0])

    @staticmethod
    def _see(observation) -> Tensor:
        return torch.as_tensor(observation, dtype=torch.float64)[list(SEEN)] / UNITS

    def step(self, actions: Tensor) -> Tensor:
        """Acts; returns which episodes ended for good (and not for lack of time)."""
        ended = torch.zeros(len(self.envs), dtype=torch.bool)
        for b, env in enumerate(self.envs):
            observation, _, ended[b], cut, _ = env.step(int(actions[b]))
            self.length[b] += 1
            self.starts[b] = bool(ended[b]) or cut
            if self.starts[b]:
                self.finished.append(self.length[b])
                self.length[b] = 0
            self.x[b] = self._reset(env) if self.starts[b] else self._see(observation)
        return ended


class Stretch(NamedTuple):
    """T steps of B carts; all [T, B] but x [T, B, 2] and h [1, B, H], the state before."""

    x: Tensor
    h: Tensor
    resets: Tensor
    actions: Tensor
    log_probabilities: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def play(policy: Policy, carts: Carts, h: Tensor, steps: int, generator: torch.Generator) -> tuple[Stretch, Tensor]:
    first, rows = h, []
    for _ in range(steps):
        x, resets = carts.x.clone(), carts.starts.clone()
        actions, values, h = policy(x.unsqueeze(0), h, resets.unsqueeze(0))
        chosen = torch.multinomial(actions.probs[0], 1, generator=generator).squeeze(-1)
        ended = carts.step(chosen)
        rows.append((x, resets, chosen, actions.log_prob(chosen)[0], values[0], ended, carts.starts.clone()))
    x, resets, chosen, log_probabilities, values, ended, over = map(torch.stack, zip(*rows, strict=True))
    _, last, _ = policy(carts.x.unsqueeze(0), h, carts.starts.unsqueeze(0))
    advantages, ahead, following = torch.zeros_like(values), torch.zeros_like(values[0]), last[0]
    for t in reversed(range(steps)):  # a reward of 1 a step; nothing is expected after an end
        following = torch.where(ended[t], 0, following)
        delta = 1 + GAMMA * following - values[t]
        ahead = delta + GAMMA * LAMBDA * torch.where(over[t], 0, ahead)
        advantages[t], following = ahead, values[t]
    return Stretch(x, first, resets, chosen, log_probabilities, advantages, advantages + values), h


def improve(policy: Policy, optimizer: torch.optim.Optimizer, s: Stretch, generator: torch.Generator) -> None:
    """A few passes over the stretch, a group of carts at a time: whole sequences, so that every state is right."""
    s = s._replace(advantages=(s.advantages - s.advantages.mean()) / (s.advantages.std() + 1e-8))
    for _ in range(EPOCHS):
        for carts in torch.randperm(s.x.size(1), generator=generator).chunk(GROUPS):
            g = Stretch(*(each[:, carts] for each in s))
            actions, values, _ = policy(g.x, g.h, g.resets)
            ratio = (actions.log_prob(g.actions) - g.log_probabilities).exp()
            gain = torch.minimum(ratio * g.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * g.advantages)
            # The value's error, of some hundreds, is made about as large as the policy's.
            loss = -gain.mean() + 1e-3 * (values - g.returns).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()


@torch.no_grad()
def round_off(policy: Policy) -> None:
    """To float32 numbers. Such training multiplies a difference by about five in an update, so that two ways to sum,
    1e-16 apart, would choose different actions after thirty updates; what is rounded off here, they never see.
    """
    for p in policy.parameters():
        p.copy_(p.float())


class Trained(NamedTuple):
    lengths: list[float]  # mean length of the episodes that ended in each update
    seconds: float  # in `improve`


def train(core: type[nn.Module], updates: int, steps: int, batch: int, hidden: int, seed: int) -> Trained:
    torch.manual_seed(seed)
    policy = Policy(core, hidden).double()  # so that rounding does not choose another action
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    carts, generator = Carts(batch, seed), torch.Generator().manual_seed(seed)
    h = torch.zeros(1, batch, hidden, dtype=torch.float64)
    lengths, seconds = [], 0.0
    for _ in range(updates):
        stretch, h = play(policy, carts, h, steps, generator)
        start = time.perf_counter()
        improve(policy, optimizer, stretch, generator)
        round_off(policy)
        seconds += time.perf_counter() - start
        # Where all play on, the longest that anyone has played by now.
        lengths.append(sum(carts.finished) / len(carts.finished) if carts.finished else float(max(carts.length)))
        carts.finished.clear()
    return Trained(lengths, seconds)


def plot(results: dict[str, Trained], steps: int, batch: int, path: str) -> None:
    """The mean length of episodes over steps of all carts, and over seconds in updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    styles = ({"color": "#00798c", "linewidth": 3, "alpha": 0.5}, {"color": "#d1495b", "linewidth": 1.2})
    for (name, r), style in zip(results.items(), styles, strict=False):
        updates = torch.arange(1, len(r.lengths) + 1)
        axes[0].plot(updates * steps * batch / 1000, r.lengths, label=name, **style)
        axes[1].plot(updates * r.seconds / len(updates), r.lengths, label=name, **style)
    axes[0].set(xlabel="thousand steps of all carts", ylabel="mean length of an episode", ylim=(0, 510))
    axes[1].set(xlabel="seconds in updates")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="train step by step as well")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--steps", type=int, default=128, help="T")
    parser.add_argument("--batch", type=int, default=16, help="carts side by side")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PNG")
    a = parser.parse_args()
    sizes = (a.updates, a.steps, a.batch, a.hidden, a.seed)
    results = {"in one call": train(InOneCall, *sizes)}
    ours = results["in one call"]
    every = max(1, a.updates // 10)
    print("mean length of an episode:", " ".join(f"{n:.0f}" for n in ours.lengths[::every]), f"{ours.lengths[-1]:.0f}")
    print(f"in one call: {ours.seconds:.1f} s in updates")
    if a.compare:
        theirs = results["step by step"] = train(StepByStep, *sizes)
        same = [mine == other for mine, other in zip(ours.lengths, theirs.lengths, strict=True)]
        print(f"step by step: {theirs.seconds:.1f} s in updates, {theirs.seconds / ours.seconds:.1f} times as long")
        print(f"the same episodes: {'yes' if all(same) else f'up to update {same.index(False)}'}")
    if a.plot:
        plot(results, a.steps, a.batch, a.plot)


if __name__ == "__main__":
    main()
