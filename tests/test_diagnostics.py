"""gradient_flow: the norms of dL/dh_t and dL/dc_t against hooks in a loop of cells, and what is said about them."""

import math

import pytest
import torch
from loops import LAYERS, make, run, state
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqkern
from seqkern import functional
from seqkern.diagnostics import Record, gradient_flow

T, B, I, H = 9, 4, 3, 6  # noqa: E741
each_layer = pytest.mark.parametrize("kind", LAYERS)


def hooked_norms(m, x, hx, loss, lengths=None, before=None):
    """{(which, layer, direction): [T] norms}, from hooks on what each step of the loop leaves."""
    squares = {}

    def after(_, __, h, c, t, layer, d):
        for which, v in (("h", h), ("c", c)):
            if v is not None and v.requires_grad:
                steps = squares.setdefault((which, layer, d), torch.zeros(T, dtype=torch.float64))

                def take(grad, steps=steps):
                    steps[t] = grad.double().square().sum()

                v.register_hook(take)
        return h, c

    options = {} if before is None else {"before": before}
    loss(run(m, x, hx, lengths, after=after, **options)["y"]).backward()
    return {key: s.sqrt() for key, s in squares.items()}


def held_to_hooks(m, x, hx=None, lengths=None, **options):
    weight = torch.randn(T, B, (m.proj_size or m.hidden_size) * (2 if m.bidirectional else 1), dtype=x.dtype)

    def loss(y):
        return (y * weight[: y.size(0)]).sum()

    with gradient_flow(m) as flow:
        y = m(x, hx, lengths=None if lengths is None else torch.tensor(lengths), **options)[0]
        loss(y).backward()
    want = hooked_norms(m, x, hx, loss, lengths)
    assert len(flow.records) == m.num_layers * (2 if m.bidirectional else 1)
    for r in flow.records:
        for which in ("h", "c"):
            norms = getattr(r, which)
            assert (norms is None) == (which == "c" and m.mode != "LSTM")
            if norms is not None:
                expected = want[which, r.layer, r.direction][: len(norms)]
                torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=1e-9)
    return flow


@each_layer
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "stack"])
def test_norms_equal_hooks_in_a_loop(kind, options, kernels, monkeypatch):
    torch.set_num_threads(2)
    if not kernels:
        monkeypatch.setattr(functional, "has_kernel", lambda *_: False)
    m = make(kind, I, H, **options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    hx = state(m, B)
    held_to_hooks(m, x, hx)
    if kernels:
        held_to_hooks(m, x, hx, lengths=[9, 2, 5, 0])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_wide_float32_and_units_over_threads(kind):
    torch.set_num_threads(2)
    m = make(kind, 8, 200, dtype=torch.float32)
    x = torch.randn(T, B, 8)
    held_to_hooks(m, x)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_zoneout_on_kernels_and_in_the_reference(kind, monkeypatch):
    """The LSTM's h is read from the c before the mixture, so that dL/dc has no part that comes through h."""
    m = make(kind, I, H, zoneout=(0.2, 0.3) if kind == "LSTM" else 0.3)
    x = torch.randn(T, B, I, dtype=torch.float64)

    def norms() -> list:
        with gradient_flow(m) as flow:
            m(x, generator=torch.Generator().manual_seed(3))[0].square().sum().backward()
        return [t for r in flow.records for t in (r.h, r.c) if t is not None]

    got = norms()
    monkeypatch.setattr(functional, "has_kernel", lambda *_: False)
    want = norms()
    assert len(got) == len(want) == 1 + (kind == "LSTM")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_gradients_are_what_they_are_without(kind):
    m = make(kind, I, H, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(m(x)[0].square().sum(), [x, *m.parameters()])
    with gradient_flow(m):
        got = torch.autograd.grad(m(x)[0].square().sum(), [x, *m.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    packed = pack_padded_sequence(x, torch.tensor([3, 9, 1, 5]), enforce_sorted=False)
    with gradient_flow(m) as flow:
        m(packed)[0].data.sum().backward()
    assert [len(r.h) for r in flow.records] == [9, 9]


def test_names_calls_and_models():
    model = nn.ModuleDict({"enc": nn.GRU(I, H), "dec": nn.LSTM(H, H, num_layers=2), "head": nn.Linear(H, 1)})
    seqkern.accelerate(model)
    with gradient_flow(model) as flow:
        y, _ = model["enc"](torch.randn(T, B, I))
        z, s = model["dec"](y)
        z, _ = model["dec"](z, s)
        model["head"](z[-1]).sum().backward()
    assert [(r.name, r.call, r.layer) for r in flow.records] == [
        ("dec", 0, 0), ("dec", 0, 1), ("dec", 1, 0), ("dec", 1, 1), ("enc", 0, 0),
    ]  # fmt: skip
    assert flow.report().count("\n") == 4 and "enc, layer 0" in flow.report() and "call 1" in flow.report()


def record(norms, direction=0):
    return Record("rnn", 0, 0, direction, torch.tensor(norms), None, None)


def test_what_is_said():
    steps = torch.arange(50, dtype=torch.float64)
    vanishing = record((0.5 ** (49 - steps)).tolist())
    assert "vanishes: from step 39 back" in vanishing.verdict()  # 0.5^10 < 1e-3 < 0.5^9
    assert math.isclose(vanishing.rate, 0.5, rel_tol=1e-6)
    exploding = record((2.0 ** (49 - steps)).tolist())
    assert "explodes: 1000 times as large at step 39" in exploding.verdict()
    assert math.isclose(exploding.rate, 2.0, rel_tol=1e-6)
    assert "explodes: 1000 times as large at step 10" in record((2.0**steps).tolist(), 1).verdict()
    assert "reaches the far end: 0.61" in record((0.99 ** (49 - steps)).tolist()).verdict()
    assert "not finite from step 1" in record([1.0, math.inf, 1.0]).verdict()
    assert "no gradient" in record([0.0, 0.0]).verdict()
    assert math.isnan(record([0.0, 1.0]).rate)


def test_an_lstm_is_judged_by_its_cell_state():
    """Its dL/dh of the early steps is small where the loss reads late outputs only; what it remembers is in c."""
    steps = torch.arange(50, dtype=torch.float64)
    lstm = Record("rnn", 0, 0, 0, 0.5 ** (49 - steps), 0.99 ** (49 - steps), None)
    assert lstm.carried == "c" and "reaches the far end" in lstm.verdict() and math.isclose(lstm.rate, 0.99)
    assert torch.equal(lstm.backward("h"), lstm.h.flip(0))


def test_a_linear_rnn_follows_its_spectral_radius(tmp_path):
    m = seqkern.RNN(2, 4, dtype=torch.float64)
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
        m.weight_hh_l0.copy_(0.8 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0])
    with gradient_flow(m) as flow:
        m(torch.zeros(40, 1, 2, dtype=torch.float64))[0][-1].sum().backward()
    (r,) = flow.records
    assert math.isclose(r.radius, 0.8, rel_tol=1e-9) and math.isclose(r.rate, 0.8, rel_tol=1e-6)
    assert "spectral radius 0.8" in flow.report()
    pytest.importorskip("matplotlib")
    axis = flow.plot(str(tmp_path / "flow.png"))
    assert (tmp_path / "flow.png").stat().st_size > 1000 and axis.get_yscale() == "log"
    drawn, bound = (line.get_ydata() for line in axis.lines)
    torch.testing.assert_close(torch.as_tensor(drawn), torch.as_tensor(bound), rtol=1e-5, atol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="Linear has no seqkern RNN"), gradient_flow(nn.Linear(1, 1)):
        pass
    with pytest.raises(ValueError, match="recomputes"), gradient_flow(seqkern.GRU(1, 1, recompute=2)):
        pass
    m = seqkern.GRU(1, 1)
    with gradient_flow(m), pytest.raises(RuntimeError, match="another one is open"), gradient_flow(m):
        pass
    with gradient_flow(m) as flow:
        m(torch.randn(2, 1, 1))
    assert "no recurrent layer" in flow.report()
