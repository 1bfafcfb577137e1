"""sb3-contrib's RecurrentPPO without its loop over steps: a policy of a few lines, the same training.

    python examples/sb3_policy.py              trains with both policies, one after the other, and prints both times
    python examples/sb3_policy.py --steps 20000 --env Acrobot-v1

In an update, sb3-contrib takes its LSTMs through a batch of sequences one step at a time, as the state must be cleared
wherever an episode starts. `OneCallPolicy` makes the LSTMs seqkern's and hands over the whole batch in one call with
`resets`. Weights, seeds, checkpoints and settings stay what they were:

    model = RecurrentPPO(OneCallPolicy, "CartPole-v1", policy_kwargs={"lstm_hidden_size": 128})

From the same seed both policies act alike, and their losses differ by rounding, until a rounding error decides an
action.

Needs: pip install sb3-contrib
"""

import argparse
import time

from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from torch import Tensor, nn

import seqkern


class OneCallPolicy(RecurrentActorCriticPolicy):
    """sb3-contrib's MlpLstmPolicy on seqkern's layers. The same override serves the CNN and multi-input policies."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        seqkern.accelerate(self)  # the same Parameter objects: the optimizer keeps them

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: nn.LSTM
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """y [B*T, H] and the states after the last step.

        Args:
            features: [B*T, I], one sequence after the other.
            lstm_states: h and c [L, B, H].
            episode_starts: [B*T], 1 where an episode starts and 0 elsewhere.
        """
        batch = lstm_states[0].size(1)
        x = features.reshape(batch, -1, lstm.input_size).transpose(0, 1)
        starts = episode_starts.reshape(batch, -1).T
        if len(x) == 1:  # acting: a plain call keeps its packed weights from step to step
            keep = (1 - starts).unsqueeze(-1)
            y, states = lstm(x, (keep * lstm_states[0], keep * lstm_states[1]))
        else:
            y, states = lstm(x, lstm_states, resets=starts.bool())
        return y.transpose(0, 1).flatten(0, 1), states


def learn(policy: str | type, steps: int, env: str = "CartPole-v1", seed: int = 0, **settings) -> list[float]:
    """The loss of every update in `steps` steps of the environment; settings are RecurrentPPO's."""
    model, losses = RecurrentPPO(policy, env, seed=seed, device="cpu", **settings), []
    update = model.train

    def train() -> None:
        update()
        losses.append(float(model.logger.name_to_value["train/loss"]))

    model.train = train
    model.learn(steps)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    for name, policy in (("MlpLstmPolicy", "MlpLstmPolicy"), ("OneCallPolicy", OneCallPolicy)):
        start = time.perf_counter()
        losses = learn(policy, a.steps, a.env, a.seed)
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.1f} s; loss at the end of each update:", " ".join(f"{v:.4f}" for v in losses))


if __name__ == "__main__":
    main()
