"""A few small calls of each engine, for compute-sanitizer to watch (`make gpu`): each kind of kernel, tails, packed."""

import pytest
import torch
from cases import CASES, Case
from cuda_checks import forced, run, tf32

NAMES = ("h_tail-lstm", "h_tail-rnn_tanh", "packed_bidirectional-gru", "proj_bidirectional-lstm")
SMALL = [*(CASES[name] for name in NAMES), Case("watched-lstm", "lstm", T=4, B=20, H=64)]


@pytest.mark.parametrize("engine", ["step", None], ids=["step", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_runs(case, dtype, engine):
    with forced(engine), tf32(True):
        found = run(case, dtype)
    assert all(t.isfinite().all() for t in found.values())
