"""Options under torch.func, torch.compile, autocast, and on the meta device; schema checks of their operators."""

import pytest
import torch
from loops import make
from torch.func import functional_call, grad, jacrev, vmap

T, B, I, H = 6, 4, 3, 5  # noqa: E741
KINDS = ("RNN", "LSTM", "GRU")


def problem(kind, dtype=torch.float64, **options):
    m = make(kind, I, H, dtype=dtype, **options)
    return m, torch.randn(T, B, I, dtype=dtype), torch.rand(T, B) < 0.3, torch.tensor([6, 0, 3, 1])


def loss(m, weights, x, **options):
    return functional_call(m, weights, (x,), options)[0].square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(kind):
    """vmap(grad) over the batch, as torch.func users and Opacus take them, against one sample at a time."""
    m, x, resets, _ = problem(kind)
    weights = {n: p.detach() for n, p in m.named_parameters()}
    got = vmap(grad(lambda w, v, r: loss(m, w, v, resets=r)), (None, 1, 1))(weights, x, resets)
    for b in range(B):
        want = torch.autograd.grad(m(x[:, b], resets=resets[:, b])[0].square().sum(), list(m.parameters()))
        torch.testing.assert_close([g[b] for g in got.values()], list(want))


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_and_jacrev_with_lengths(kind):
    m, x, _, lengths = problem(kind)
    many = torch.stack([lengths, lengths.flip(0)])
    got = vmap(lambda n: m(x, lengths=n)[0])(many)
    torch.testing.assert_close(got, torch.stack([m(x, lengths=n)[0] for n in many]))
    jacobian = jacrev(lambda v: m(v, lengths=lengths)[0])(x)
    want = torch.autograd.functional.jacobian(lambda v: m(v, lengths=lengths)[0], x)
    torch.testing.assert_close(jacobian, want)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_in_one_graph(kind):
    m, x, resets, _ = problem(kind, torch.float32, zoneout=0.2, grad_clip=1.0)
    m.eval()
    x.requires_grad_()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    got, want = (layer(x, resets=resets) for layer in (compiled, m))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y, _ in (got, want)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compile_another_cell_in_one_graph(kind):
    m, x, resets, _ = problem(kind, torch.float32, layer_norm=True, grad_clip=("norm", 1.0))
    x.requires_grad_()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    got, want = (layer(x, resets=resets) for layer in (compiled, m))
    torch.testing.assert_close(got, want)
    leaves = [x, *m.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y, _ in (got, want)))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    m, x, resets, lengths = problem(kind, torch.float32)
    want = m(x, resets=resets, lengths=lengths)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = m(x, resets=resets, lengths=lengths)[0]
        rest = m(x, resets=torch.rand(T, B))[0]
    assert got.dtype == rest.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_meta(kind):
    m, x, resets, _ = problem(kind, bidirectional=True)
    m, x, resets = m.to("meta"), x.to("meta"), resets.to("meta")
    y, last, states = m(x, resets=resets, return_all_states=True)
    assert y.shape == (T, B, 2 * H) and y.device.type == "meta"


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(cell, packed):
    lstm, gates = cell == "lstm", {"lstm": 4, "gru": 3}.get(cell, 1)
    batch_sizes = torch.tensor([3, 2, 1]) if packed else None
    rows, lead = (6, (6,)) if packed else (9, (3, 3))
    leaf = lambda *s: torch.randn(s, requires_grad=True)  # noqa: E731
    h0, c0 = leaf(1, 3, H), leaf(1, 3, H) if lstm else None
    weights = [leaf(gates * H, I), leaf(gates * H, H), leaf(gates * H), leaf(gates * H)]
    x, keep = leaf(*lead, I), (torch.rand(rows) < 0.7).float()
    masks = [keep, torch.rand(1, 3, H), torch.rand(rows, H).round(), torch.rand(rows, H).round() if lstm else None, 0.5]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.seqkern.option_layer.default
    torch.library.opcheck(op, (x, h0, c0, weights, batch_sizes, *masks, cell, False, True, True), test_utils=checks)
    with torch.no_grad():
        y, h_n, c_n, c_all, reserve = op(x, h0, c0, weights, batch_sizes, *masks, cell, False, True, True)
    cotangents = [leaf(*y.shape), leaf(*h_n.shape), *([leaf(*c_n.shape), leaf(*c_all.shape)] if lstm else [None, None])]
    op = torch.ops.seqkern.option_layer_backward.default
    for flow in (False, True):
        inputs = (x, h0, c0, weights, batch_sizes, *masks)
        rest = (y, c_all, reserve, cell, False, True, True, flow)
        torch.library.opcheck(op, (*cotangents, *inputs, *rest), test_utils=checks)


def test_operator_checks_its_masks():
    m, x, *_ = problem("GRU")
    w = [p.detach() for p in m.parameters()]
    op = torch.ops.seqkern.option_layer
    for masks, text in (
        ((torch.ones(5, dtype=torch.float64), None, None), r"keep must be \[N\] = \[24\], got \[5\]"),
        ((torch.ones(24), None, None), "keep must be float64"),
        ((None, torch.ones(1, B, H), None), "h_mask must be float64"),
        ((None, None, torch.ones(2, H, dtype=torch.float64)), r"zone_h must be \[N or 1, D\*P\] = \[24, 5\], got \[2"),
    ):
        with pytest.raises(RuntimeError, match=text):
            op(x, None, None, w, None, *masks, None, 0.0, "gru", False, False, False)
