"""MinGRU and MinLSTM: the scan against their formulas step by step, at any length, with resets and lengths."""

import copy
import pickle

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import seqkern
from seqkern import scan

CELLS = tuple(scan.GATES)
T, B, I, H = 9, 4, 3, 6  # noqa: E741
each_cell = pytest.mark.parametrize("cell", CELLS)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 6e-3}


def written_out(m, x, hx=None, lengths=None, keep=None):
    """The papers' formulas on x [T, B, I], row by row; y and h_n."""
    last = []
    steps, batch = x.shape[:2]
    for layer in range(m.num_layers):
        w, b = getattr(m, f"weight_ih_l{layer}"), getattr(m, f"bias_ih_l{layer}")
        rows = []
        for r in range(batch):
            h = x.new_zeros(m.hidden_size) if hx is None else hx[layer, r]
            out = []
            for t in range(steps):
                if lengths is not None and t >= lengths[r]:
                    out.append(torch.zeros_like(h))
                    continue
                if keep is not None:
                    h = h * keep[t, r]
                p = w @ x[t, r] + (0 if b is None else b)
                *gates, c = p.split(m.hidden_size)
                if m.positive:
                    c = torch.where(c >= 0, c + 0.5, c.sigmoid())
                if isinstance(m, seqkern.MinGRU):
                    z = gates[0].sigmoid()
                    h = (1 - z) * h + z * c
                else:
                    f, i = gates[0].sigmoid(), gates[1].sigmoid()
                    h = (f * h + i * c) / (f + i)
                out.append(h)
            rows.append((torch.stack(out), h))
        x = torch.stack([y for y, _ in rows], 1)
        last.append(torch.stack([h for _, h in rows]))
    return x, torch.stack(last)


def problem(cell, **more):
    name, _, positive = cell.partition("_")
    cls = seqkern.MinGRU if name == "mingru" else seqkern.MinLSTM
    m = cls(I, H, **{"dtype": torch.float64, "positive": bool(positive)} | more)
    return m, torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)


def check(m, got, want, leaves):
    leaves = [*leaves, *m.parameters()]
    weights = [torch.randn_like(t) for t in want]
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad([(t * w).sum() for t, w in zip(o, weights, strict=True)], leaves) for o in (got, want)]
    torch.testing.assert_close(*grads)


@each_cell
@pytest.mark.parametrize("kernels", [True, False])
def test_equals_the_formulas(cell, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(scan.functional, "has_kernel", lambda *_: False)
    m, x = problem(cell, num_layers=2)
    hx = torch.randn(2, B, H, dtype=torch.float64, requires_grad=True)
    check(m, m(x, hx), written_out(m, x, hx), [x, hx])
    check(m, m(x), written_out(m, x), [x])
    keep, lengths = (torch.rand(T, B) < 0.7).double(), [9, 0, 4, 1]
    check(m, m(x, hx, resets=keep == 0), written_out(m, x, hx, keep=keep), [x, hx])
    got = m(x, hx, resets=keep == 0, lengths=lengths)
    check(m, got, written_out(m, x, hx, lengths, keep), [x, hx])
    keep = torch.rand(T, B, dtype=torch.float64)
    check(m, m(x, hx, resets=keep), written_out(m, x, hx, keep=keep), [x, hx])


@each_cell
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 3, 33), (700, 1, 3), (1500, 1, 1), (40, 30, 64)], ids=str)
def test_operator_in_every_dtype_and_split(cell, dtype, shape):
    """Few units and many steps: time is cut into pieces, with resets on both sides of the cut."""
    torch.set_num_threads(3)
    steps, batch, hidden = shape
    p = torch.randn(steps, batch, scan.GATES[cell] * hidden).to(dtype).requires_grad_()
    h0 = torch.randn(batch, hidden).to(dtype).requires_grad_()
    for rate in (0.0, 0.02):
        keep = (torch.rand(steps, batch) >= rate).to(torch.float64 if dtype == torch.float64 else torch.float32)
        h = scan.scan(p, h0, keep, cell)
        dh = torch.randn(h.shape).to(dtype)
        wide = [t.detach().double().requires_grad_() for t in (p, h0)]
        want = scan.reference(*wide, keep.double(), cell)
        assert h.dtype == dtype
        got = [h, *torch.autograd.grad(h, (p, h0), dh)]
        right = [want, *torch.autograd.grad(want, wide, dh.double())]
        for a, b in zip(got, right, strict=True):
            limit = TOLERANCE[dtype] * max(1, b.abs().max().item())
            torch.testing.assert_close(a.double(), b, rtol=0, atol=limit)


@each_cell
def test_extreme_gates(cell):
    """Sigmoids that round to 0: no 0 / 0."""
    p = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0])
    p = torch.cartesian_prod(*[p] * scan.GATES[cell]).t().reshape(1, 1, -1).repeat(3, 1, 1).requires_grad_()
    h = scan.scan(p, None, None, cell)
    want = scan.reference(p.double(), None, None, cell)
    torch.testing.assert_close(h.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(h.sum(), p)[0].isfinite().all()


@each_cell
def test_derivatives(cell):
    p = torch.randn(4, 2, scan.GATES[cell] * 2, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[1, 1], [0, 1], [1, 0.5], [1, 1]], dtype=torch.float64)
    for given in (keep, None):
        assert gradcheck(lambda p, h, k=given: scan.scan(p, h, k, cell), (p, h0))
        assert gradgradcheck(lambda p, h, k=given: scan.scan(p, h, k, cell), (p, h0))
        assert gradgradcheck(lambda p, k=given: scan.scan(p, None, k, cell), (p,))


@each_cell
def test_opcheck(cell):
    p = torch.randn(4, 2, scan.GATES[cell] * 3, requires_grad=True)
    h0 = torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.seqkern.scan.default, (p, h0, torch.ones(4, 2), cell))
    torch.library.opcheck(torch.ops.seqkern.scan.default, (p, None, None, cell))


def test_padding_and_resets_stop_what_is_not_a_number():
    m, x = problem("mingru")
    lengths = [9, 0, 4, 1]
    want = torch.autograd.grad(m(x, lengths=lengths)[0].sum(), list(m.parameters()))
    spoilt = x.detach().clone()
    for b, n in enumerate(lengths):
        spoilt[n:, b] = float("nan")
    torch.testing.assert_close(torch.autograd.grad(m(spoilt, lengths=lengths)[0].sum(), list(m.parameters())), want)
    spoilt = x.detach().clone()
    spoilt[2, 1] = float("nan")
    resets = torch.zeros(T, B).bool()
    resets[3, 1] = True
    y, _ = m(spoilt, resets=resets)
    assert y[2, 1].isnan().all() and not y[3:].isnan().any()


@each_cell
def test_layouts_copies_and_text(cell):
    m, x = problem(cell, batch_first=True, num_layers=2, bias=False)
    resets = torch.rand(B, T) < 0.3
    y, h = m(x.transpose(0, 1), resets=resets, lengths=torch.tensor([9, 3, 9, 9]))
    one, h_one = m(x[:, 0], resets=resets[0])
    torch.testing.assert_close((one, h_one), (y[0], h[:, 0]))
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        torch.testing.assert_close(twin(x[:, 0], resets=resets[0]), (one, h_one))
    assert "num_layers=2, bias=False, batch_first=True" in repr(m)
    with torch.autocast("cpu", torch.bfloat16):
        assert m.float()(x.float().transpose(0, 1))[0].dtype == torch.bfloat16
    assert m(torch.zeros(0, T, I))[0].shape == (0, T, H)


def test_vmap():
    m, x = problem("minlstm")
    torch.testing.assert_close(torch.func.vmap(lambda v: m(v)[0], in_dims=1, out_dims=1)(x), m(x)[0])


def test_errors():
    m, x = problem("mingru")
    for call, error, text in (
        (lambda: m(x[..., :2]), ValueError, "last size 3"),
        (lambda: m(x, torch.zeros(1, B, H + 1)), ValueError, r"hx must be \[L, B, H\] = \[1, 4, 6\]"),
        (lambda: m(x, lengths=[10, 1, 1, 1]), ValueError, r"lengths must be in \[0, T\]"),
        (lambda: m(x, resets=torch.zeros(B, T).bool()), ValueError, r"resets must be \[T, B\]"),
        (lambda: m(x[:, 0], lengths=[3]), ValueError, "batched input"),
        (lambda: m(x[:0]), RuntimeError, "larger than 0"),
        (lambda: seqkern.MinGRU(0, 1), ValueError, "input_size must be a positive int"),
        (lambda: seqkern.MinGRU(1, 1, dropout=2), ValueError, "dropout must be a probability"),
        (lambda: torch.ops.seqkern.scan(x, None, None, "gru"), RuntimeError, "cell must be one of"),
        (lambda: torch.ops.seqkern.scan(x, None, None, "mingru"), RuntimeError, "p must be"),
    ):
        with pytest.raises(error, match=text):
            call()


@each_cell
def test_a_reset_clears_what_is_not_a_number_in_pieces_of_time_too(cell):
    torch.set_num_threads(3)
    p = torch.randn(1500, 1, scan.GATES[cell])
    keep = torch.ones(1500, 1)
    keep[700] = 0
    h = torch.ops.seqkern.scan(p, torch.full((1, 1), float("nan")), keep, cell)
    assert h[:700].isnan().all() and h[700:].isfinite().all()
