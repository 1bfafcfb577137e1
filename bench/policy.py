"""Measures recurrent PPO of sb3-contrib with its own loop over steps and with one call of seqkern's layer in its place
(`examples/sb3_policy.py`); appends one JSON line per case.

    python bench/policy.py --threads 1 --json bench/results/policy.jsonl

`sequence*` is a batch of an update, forward and backward: 4 sequences of 128 steps, H = 128, of which one step in
EPISODE starts an episode; `learn` is `RecurrentPPO.learn` from its first step to its last, with all that is neither
LSTM, as it comes: CartPole, MlpLstmPolicy, H = 256, `--steps` steps. Both sides run in turn (A B B A). Before anything
is timed, outputs, states and all gradients of both sides are compared, and the losses of every update. A line is as in
bench/options.py: ratio = peer / seqkern time.

Needs: pip install sb3-contrib. Where it is missing, this says so and exits with 3.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import seqkern  # noqa: E402
from bench import machine, timing  # noqa: E402

T, B, H = 128, 4, 128
EPISODE = 25  # steps: CartPole's first episodes take about that many
MISSING = 3
Process = Callable[[Tensor, tuple[Tensor, Tensor], Tensor, nn.LSTM], tuple[Tensor, tuple[Tensor, Tensor]]]


def policies():
    """examples/sb3_policy.py, or None where sb3-contrib is not installed."""
    try:
        from examples import sb3_policy
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("sb3_contrib", "stable_baselines3", "gymnasium"):
            raise
        return None
    return sb3_policy


class Sequence:
    """One side of `sequence*`: a function like sb3-contrib's `_process_sequence`, its layer, and the shared batch."""

    def __init__(self, process: Process, lstm: nn.LSTM, batch: tuple[Tensor, ...]):
        self.process, self.lstm = process, lstm
        self.x, self.h, self.c, self.starts, self.dy = batch

    def train(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, states = self.process(self.x, (self.h, self.c), self.starts, self.lstm)
        y.backward(self.dy)
        return y, states

    def results(self) -> list[Tensor]:
        """Output, states, and the gradients of features and weights."""
        for t in (self.x, *self.lstm.parameters()):
            t.grad = None
        y, states = self.train()
        return [y, *states, self.x.grad, *(p.grad for p in self.lstm.parameters())]


def sequences(sb3, inputs: int, starts: bool) -> tuple[Sequence, Sequence]:
    """Ours and sb3-contrib's on the same weights and batch: x [B*T, I], one sequence after the other."""
    theirs = nn.LSTM(inputs, H)
    ours = seqkern.LSTM(inputs, H)
    ours.load_state_dict(theirs.state_dict())
    x, dy = torch.randn(B * T, inputs), torch.randn(B * T, H)
    marks = (torch.rand(B * T) < 1 / EPISODE).float() * starts
    batch = (x, torch.randn(1, B, H), torch.randn(1, B, H), marks, dy)
    loop = sb3.RecurrentActorCriticPolicy._process_sequence
    fresh = lambda: (batch[0].clone().requires_grad_(), *batch[1:])  # noqa: E731
    return Sequence(sb3.OneCallPolicy._process_sequence, ours, fresh()), Sequence(loop, theirs, fresh())


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


def measure_sequence(sb3, inputs: int, starts: bool, seconds: float, clock: timing.Sample) -> dict[str, object]:
    torch.manual_seed(0)
    ours, theirs = sequences(sb3, inputs, starts)
    same(ours.results(), theirs.results())
    result = timing.paired(ours.train, theirs.train, timing.Budget(samples=24, low=0.5, high=seconds), clock)
    return {"T": T, "B": B, "I": inputs, "H": H, "episode": EPISODE if starts else None} | result.summary()


def measure_learn(sb3, steps: int, rounds: int, clock: timing.Sample) -> dict[str, object]:
    """The losses are those of the runs that are timed."""
    found = {}

    def run(name: str, policy: str | type) -> Callable[[], None]:
        return lambda: found.setdefault(name, []).append(sb3.learn(policy, steps))

    sides = run("ours", sb3.OneCallPolicy), run("theirs", "MlpLstmPolicy")
    result = timing.paired(*sides, timing.Budget(samples=2 * rounds, low=0, high=1e9), clock)
    ours, theirs = found["ours"][0], found["theirs"][0]
    if not ours or len(ours) != len(theirs):
        raise AssertionError(f"learn: both sides must make as many updates, got {len(ours)} and {len(theirs)}")
    apart = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
    if apart > 1e-3:
        raise AssertionError(f"learn: the losses differ by {apart:.1e}: {ours} and {theirs}")
    return {"steps": steps, "H": 256, "updates": len(ours), "losses_apart": apart} | result.summary()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench/out/policy.jsonl"), help="append lines here")
    parser.add_argument("--threads", type=int, help="for both sides (default: torch's own choice)")
    parser.add_argument("--steps", type=int, default=2048, help="of `learn`")
    parser.add_argument("--rounds", type=int, default=2, help="of A B B A, for `learn`")
    parser.add_argument("--seconds", type=float, default=8.0, help="the most that a sequence takes")
    parser.add_argument("--cpu-time", action="store_true", help="instead of the wall clock's")
    args = parser.parse_args(argv)
    sb3 = policies()
    if sb3 is None:
        print("bench/policy.py is skipped: it needs sb3-contrib (pip install sb3-contrib)", file=sys.stderr)
        return MISSING
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = timing.cpu_time if args.cpu_time else timing.clock
    about = {"peer": "sb3-contrib", "clock": clock.__name__} | machine.describe("cpu")
    about["sb3_contrib"] = version("sb3_contrib")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    cases = {
        "sequence": lambda: measure_sequence(sb3, H, True, args.seconds, clock),
        "sequence-few-inputs": lambda: measure_sequence(sb3, 4, True, args.seconds, clock),
        "sequence-no-start": lambda: measure_sequence(sb3, H, False, args.seconds, clock),
        "learn": lambda: measure_learn(sb3, args.steps, args.rounds, clock),
    }
    for name, case in cases.items():
        line = {"case": name} | case() | {"load": machine.load()} | about
        times = f"{line['ms']:.1f} ms, sb3-contrib {line['peer_ms']:.1f}, ratio {line['ratio']:.2f}"
        print(f"{name}: {times} ({line['ratio_low']:.2f} to {line['ratio_high']:.2f})", flush=True)
        with args.json.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
