"""A few small calls of each engine, for compute-sanitizer to watch (`make gpu`): each kind of kernel, tails, packed."""

import pytest
import torch
from cases import CASES, Case
from cuda_checks import forced, run, tf32
from loops import call, gradients, make

NAMES = ("h_tail-lstm", "h_tail-rnn_tanh", "packed_bidirectional-gru", "proj_bidirectional-lstm")
SMALL = [*(CASES[name] for name in NAMES), Case("watched-lstm", "lstm", T=4, B=20, H=64)]


@pytest.mark.parametrize("engine", ["step", None], ids=["step", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_runs(case, dtype, engine):
    with forced(engine), tf32(True):
        found = run(case, dtype)
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("engine", ["step", "grid"])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_options(kind, engine):
    settings = {"zoneout": 0.3, "recurrent_dropout": 0.3, "grad_clip": 0.5}
    m = make(kind, 3, 70, dtype=torch.bfloat16, bidirectional=True, device="cuda", **settings)
    with forced(engine):
        x, resets = torch.randn(4, 20, 3, device="cuda", dtype=torch.bfloat16), torch.rand(4, 20) < 0.3
        found = call(m, x, lengths=torch.arange(20) % 5, resets=resets.cuda())
        assert all(t.isfinite().all() for t in gradients(found, list(m.parameters())))


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("LSTM", {"layer_norm": True, "peephole": True, "grad_clip": ("norm", 1.0)}),
        ("GRU", {"reset_after": False}),
        ("GRU", {"layer_norm": True}),
    ],
)
def test_other_cells(kind, settings):
    m = make(kind, 3, 70, dtype=torch.float32, bidirectional=True, device="cuda", **settings)
    found = call(m, torch.randn(4, 3, 3, device="cuda"), lengths=torch.tensor([4, 0, 2]))
    assert all(t.isfinite().all() for t in gradients(found, list(m.parameters())))
