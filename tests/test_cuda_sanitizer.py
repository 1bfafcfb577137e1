"""A few small calls of each engine, for compute-sanitizer to watch (`make gpu`): every kernel once, tails and packed."""

import pytest
import torch
from cases import CASES, CELLS, Case
from cuda_checks import forced, run, tf32

SMALL = [CASES[f"{shape}-{cell}"] for shape in ("h_tail", "packed_bidirectional") for cell in CELLS]
SMALL += [CASES["proj_bidirectional-lstm"], Case("watched-lstm", "lstm", T=4, B=20, H=64)]


@pytest.mark.parametrize("engine", ["step", None], ids=["step", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_runs(case, dtype, engine):
    with forced(engine), tf32(True):
        found = run(case, dtype)
    assert all(t.isfinite().all() for t in found.values())
