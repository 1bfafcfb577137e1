"""examples/recurrent_policy.py: with resets in one call, the same episodes as a loop over steps, and longer ones."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("gymnasium")
PATH = Path(__file__).parent.parent / "examples" / "recurrent_policy.py"
spec = importlib.util.spec_from_file_location("recurrent_policy", PATH)
policy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(policy)


def test_same_episodes_with_and_without_the_loop():
    ours, theirs = (policy.train(core, 3, 40, 4, 8, seed=1) for core in (policy.InOneCall, policy.StepByStep))
    assert ours.lengths == theirs.lengths and max(ours.lengths) > 5


def test_advantages_of_a_short_stretch():
    """Against the definition: discounted sums of errors up to each episode's end."""
    torch.manual_seed(0)
    net = policy.Policy(policy.InOneCall, 4).double()
    carts = policy.Carts(2, 3)
    h = torch.zeros(1, 2, 4, dtype=torch.float64)
    s, _ = policy.play(net, carts, h, 60, torch.Generator().manual_seed(0))
    values = s.returns - s.advantages
    assert s.resets[1:].any()
    for b in range(2):
        ends = [t for t in range(59) if s.resets[t + 1, b]]
        t, end = 0, ends[0]  # of the first episode, which the pole's fall ended
        total = 0.0
        for k in range(end, t - 1, -1):
            following = 0.0 if k == end else values[k + 1, b]
            total = 1 + policy.GAMMA * following - values[k, b] + policy.GAMMA * policy.LAMBDA * total
        torch.testing.assert_close(s.advantages[t, b], torch.as_tensor(total))


def test_it_learns():
    lengths = policy.train(policy.InOneCall, 7, 128, 16, 32, seed=0).lengths
    assert lengths[-1] > 1.7 * lengths[0], lengths
