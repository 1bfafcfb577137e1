"""Faults that other recurrent kernels shipped with, each a test: backward asked twice, aliases, drift, autocast."""

import pytest
import torch
from cases import CASES, CELLS, DTYPES, Case, make_cotangents, make_inputs
from oracle import check, engine, evaluate

from seqkern import ops

cells = pytest.mark.parametrize("cell", CELLS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def run(case: Case, inputs, cotangents) -> dict[str, torch.Tensor]:
    return evaluate(engine, case, inputs, cotangents)


@cells
@dtypes
def test_second_backward_under_retain_graph(cell, dtype):
    """The same graph gives the same gradients again, and for another cotangent those of a fresh graph."""
    case = CASES[f"h_tail-{cell}"]
    x, h0, c0, weights, _ = make_inputs(case, dtype)
    leaves = [t.requires_grad_() for t in (x, h0, *weights)]
    y, h_n, _ = engine(x, h0, c0, weights, None, cell, False)
    first, other = make_cotangents(case, dtype)[:2], [torch.ones_like(y), torch.ones_like(h_n)]
    once = torch.autograd.grad((y, h_n), leaves, first, retain_graph=True)
    elsewhere = torch.autograd.grad((y, h_n), leaves, other, retain_graph=True)
    again = torch.autograd.grad((y, h_n), leaves, first)
    fresh = torch.autograd.grad(engine(x, h0, c0, weights, None, cell, False)[:2], leaves, other)
    assert all(map(torch.equal, again, once))
    assert all(map(torch.equal, elsewhere, fresh))


@cells
def test_backward_after_the_inputs_were_freed(cell):
    """What backward needs is saved, not borrowed: other allocations in between do no harm."""
    case = CASES[f"h_tail-{cell}"]
    want = run(case, make_inputs(case, torch.float32), make_cotangents(case, torch.float32))["dx"]
    x, h0, c0, weights, _ = make_inputs(case, torch.float32)
    x.requires_grad_()
    y, h_n, c_n = engine(x, h0, c0, weights, None, cell, False)
    del h0, c0, weights
    noise = [torch.full((size,), 1e30) for size in (4, 64, 660, 4356, 20000)]
    outputs = (y, h_n, c_n) if cell == "lstm" else (y, h_n)
    (got,) = torch.autograd.grad(outputs, x, make_cotangents(case, torch.float32))
    assert torch.equal(got, want) and len(noise) == 5


def storages(tensors) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tensors if t is not None and t.numel()]


@cells
@pytest.mark.parametrize("shape", ["t1_b1_h1", "h_tail", "no_state"])
@pytest.mark.parametrize("save", [True, False])
def test_outputs_alias_nothing(cell, shape, save):
    case = CASES[f"{shape}-{cell}"]
    x, h0, c0, weights, _ = make_inputs(case, torch.float32)
    outputs = ops.rnn_layer(x, h0, c0, weights, None, cell, False, save)
    cotangents = make_cotangents(case, torch.float32) + [None] * (cell != "lstm")
    y, _, _, reserve = outputs
    inputs = [x, h0, c0, *weights]
    dx, dh0, dc0, dweights = torch.ops.seqkern.rnn_layer_backward(
        *cotangents, x, h0, c0, weights, None, y, reserve, cell, False, True, True
    )
    for own, others in ((outputs, inputs), ((dx, dh0, dc0, *dweights), [*inputs, *outputs, *cotangents])):
        pointers = storages(own)
        assert len(set(pointers)) == len(pointers)
        assert not set(pointers) & set(storages(others))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_long_sequence_in_bfloat16(cell):
    """T = 1024: no further from float64 than the oracle allows, forward and backward."""
    case = Case(f"t_1024-{cell}", cell, T=1024, B=2, I=4, H=17)
    check(case, torch.bfloat16, run(case, make_inputs(case, torch.bfloat16), make_cotangents(case, torch.bfloat16)))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["h_tail-lstm", "h_tail-gru", "packed-rnn_relu", "proj-lstm"])
def test_autocast(name, target):
    """Under autocast the layer computes in the lower dtype, as if cast by hand, and gives the leaves their own."""
    case = CASES[name]
    inputs = make_inputs(case, torch.float32)

    def in_autocast(*arguments):
        with torch.autocast("cpu", target):
            return engine(*arguments)

    got = evaluate(in_autocast, case, inputs, make_cotangents(case, target))
    low = inputs._replace(
        x=inputs.x.to(target),
        h0=inputs.h0.to(target),
        c0=None if inputs.c0 is None else inputs.c0.to(target),
        weights=[w.to(target) for w in inputs.weights],
    )
    want = evaluate(engine, case, low, make_cotangents(case, target))
    for key, t in want.items():
        assert got[key].dtype == (torch.float32 if key.startswith("d") else target), key
        assert torch.equal(got[key].to(target), t), key


def test_autocast_leaves_float64_alone():
    case = CASES["h_tail-gru"]
    with torch.autocast("cpu", torch.bfloat16):
        y = engine(*make_inputs(case, torch.float64), "gru", False)[0]
    assert y.dtype == torch.float64
    check(case, torch.float64, {"y": y})
