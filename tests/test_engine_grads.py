"""Which gradients are asked for, and what backward has to start from, must not change the ones that come back."""

import pytest
import torch
from cases import CASES, DTYPES, Case, make_cotangents, make_inputs
from oracle import check, engine, evaluate, torch_layer

from seqkern import ops, reference

GROUNDS = ["h_tail-lstm", "h_tail-gru", "packed_bidirectional-rnn_tanh", "packed-rnn_relu", "packed_proj-lstm"]
grounds = pytest.mark.parametrize("case", [CASES[name] for name in GROUNDS], ids=GROUNDS)


def leaves_of(case: Case, dtype: torch.dtype, wanted: set[str] | None = None) -> tuple[list, dict[str, torch.Tensor]]:
    """The operator's first five arguments, and by name those tensors among them that require a gradient."""
    x, h0, c0, weights, batch_sizes = make_inputs(case, dtype)
    named = {"x": x, "h0": h0, "c0": c0} | dict(zip(case.weight_shapes, weights, strict=True))
    leaves = {k: t.detach() for k, t in named.items() if t is not None}
    for name, t in leaves.items():
        t.requires_grad_(wanted is None or name in wanted)
    arguments = [leaves["x"], leaves.get("h0"), leaves.get("c0"), [leaves[k] for k in case.weight_shapes], batch_sizes]
    return arguments, {k: t for k, t in leaves.items() if t.requires_grad}


def gradients(layer, case: Case, outputs: list[int], wanted: set[str] | None) -> dict[str, torch.Tensor]:
    """float64 gradients of those outputs (0 y, 1 h_n, 2 c_n) with respect to those leaves."""
    arguments, leaves = leaves_of(case, torch.float64, wanted)
    found = layer(*arguments, case.cell, case.bidirectional)
    cotangents = make_cotangents(case, torch.float64)
    got = torch.autograd.grad(
        [found[i] for i in outputs],
        list(leaves.values()),
        [cotangents[i] for i in outputs],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, got, strict=True))


def assert_same(case: Case, outputs: list[int], wanted: set[str] | None) -> None:
    got, want = (gradients(layer, case, outputs, wanted) for layer in (engine, reference.layer))
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"d{n}: {m}")


@grounds
@pytest.mark.parametrize("outputs", [[0], [1], [0, 1]], ids=["y", "h_n", "y+h_n"])
def test_some_outputs_have_no_gradient(case, outputs):
    assert_same(case, outputs, None)


@pytest.mark.parametrize("name", ["h_tail-lstm", "bidirectional-lstm", "packed_proj_bidirectional-lstm"])
@pytest.mark.parametrize("outputs", [[2], [1, 2], [0, 2]], ids=["c_n", "h_n+c_n", "y+c_n"])
def test_gradient_through_the_cell_state(name, outputs):
    assert_same(CASES[name], outputs, None)


@grounds
@pytest.mark.parametrize("wanted", [{"x"}, {"h0"}, {"weight_ih"}, {"weight_hh"}, {"bias_hh"}, {"x", "h0", "bias_ih"}])
def test_some_inputs_need_no_gradient(case, wanted):
    assert_same(case, [0, 1], wanted)


@pytest.mark.parametrize("wanted", [{"c0"}, {"h0", "c0"}, {"weight_hr"}])
def test_state_and_projection_alone(wanted):
    assert_same(CASES["packed_proj-lstm"], [0, 1, 2], wanted)


@grounds
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_recomputes_what_forward_did_not_keep(case, dtype):
    """save=False leaves an empty reserve; the gradients are still right."""

    def forgetful(*arguments):
        y, h_n, c_n, reserve = ops.rnn_layer(*arguments, False)
        assert reserve.numel() == 0
        return y, h_n, c_n

    check(case, dtype, evaluate(forgetful, case, make_inputs(case, dtype), make_cotangents(case, dtype)))


def backward_arguments(case: Case, dtype: torch.dtype) -> tuple[list, list]:
    """What rnn_layer_backward takes, up to the two flags: cotangents, then everything else."""
    inputs = make_inputs(case, dtype)
    y, _, _, reserve = ops.rnn_layer(*inputs, case.cell, case.bidirectional, True)
    cotangents = make_cotangents(case, dtype) + [None] * (case.cell != "lstm")
    return cotangents, [*inputs, y, reserve, case.cell, case.bidirectional]


@grounds
def test_backward_operator_leaves_out_what_is_not_needed(case):
    cotangents, rest = backward_arguments(case, torch.float32)
    backward = torch.ops.seqkern.rnn_layer_backward
    dx, dh0, dc0, dweights = backward(*cotangents, *rest, True, True)
    assert [list(w.shape) for w in dweights] == [list(shape) for shape in case.weight_shapes.values()]
    only_dx = backward(*cotangents, *rest, True, False)
    only_dw = backward(*cotangents, *rest, False, True)
    assert torch.equal(only_dx[0], dx) and sum(w.numel() for w in only_dx[3]) == 0
    assert only_dw[0].numel() == 0 and all(map(torch.equal, only_dw[3], dweights))
    for found in (only_dx, only_dw):
        assert torch.equal(found[1], dh0) and torch.equal(found[2], dc0)


@grounds
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_backward_operator_takes_no_gradient_for_zeros(case, missing):
    cotangents, rest = backward_arguments(case, torch.float32)
    if cotangents[missing] is None:
        cotangents[missing] = cotangents[1].new_empty(0)  # a GRU has no c_n to send a gradient to
        missing = 0
    zeros, none = list(cotangents), list(cotangents)
    zeros[missing], none[missing] = torch.zeros_like(cotangents[missing]), None
    zeros, none = ([None if t is None or t.numel() == 0 else t for t in c] for c in (zeros, none))
    got = torch.ops.seqkern.rnn_layer_backward(*none, *rest, True, True)
    want = torch.ops.seqkern.rnn_layer_backward(*zeros, *rest, True, True)
    for a, b in zip([*got[:3], *got[3]], [*want[:3], *want[3]], strict=True):
        assert torch.equal(a, b)


@grounds
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_only_read(case, dtype):
    arguments, leaves = leaves_of(case, dtype)
    cotangents = make_cotangents(case, dtype)
    before = [t.detach().clone() for t in [*leaves.values(), *cotangents]]
    outputs = engine(*arguments, case.cell, case.bidirectional)[: len(cotangents)]
    torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    assert all(map(torch.equal, [*leaves.values(), *cotangents], before))


@pytest.mark.parametrize("name", ["h_tail-gru", "h_tail-rnn_tanh"])
def test_output_changed_in_place_before_backward_raises(name):
    """Backward reads y; as with torch.nn's own layers, changing it must not give wrong gradients silently."""
    case = CASES[name]
    arguments, leaves = leaves_of(case, torch.float32)
    y = engine(*arguments, case.cell, case.bidirectional)[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), list(leaves.values()))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_weights_changed_between_calls_take_effect(cell):
    """A write to a weight in place or through .data is seen by the next call, whatever the engine keeps packed."""
    case = CASES[f"h_tail-{cell}"]
    inputs = make_inputs(case, torch.float32)
    with torch.no_grad():
        for write in (lambda w: w.mul_(0.5), lambda w: w.data.add_(0.25), lambda w: w.set_(w.neg())):
            engine(*inputs, cell, False)
            for w in inputs.weights:
                write(w)
            got, want = (layer(*inputs, cell, False)[0] for layer in (engine, torch_layer))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
