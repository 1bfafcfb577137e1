"""zoneout: units that keep their old value, held to a loop of torch's cells with the same masks."""

import pickle

import pytest
import torch
from loops import DTYPES, LAYERS, call, check, make, run, state
from torch.autograd import gradcheck, gradgradcheck

from seqkern import functional, masks, option_ops, options, recurrence

T, B, I, H = 7, 4, 3, 6  # noqa: E741
each_layer = pytest.mark.parametrize("kind", LAYERS)


def problem(kind, c_too=True, **settings):
    lstm = kind in ("LSTM", "proj")
    m = make(kind, I, H, zoneout=(0.3, 0.4) if lstm and c_too else 0.3, **settings)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    return m, x, state(m, B)


def drawn(m, x, seed, layer, purpose, p, width):
    """The masks [T, B, D, width] that a call with this seed draws, from their definition in plain torch."""
    d = 2 if m.bidirectional else 1
    n = x.size(0) * x.size(1) * d * width
    bits = masks.bits(seed, layer * 8 + purpose, n)
    return (bits < round(p * 2**32)).double().view(x.size(0), x.size(1), d, width)


def zone(m, x, seed):
    """The loop's `after`."""
    rate_h, rate_c = m._settings.zoneout
    width = m.proj_size or m.hidden_size

    def after(old_h, old_c, new_h, new_c, t, layer, d):
        if m.training:
            zh = drawn(m, x, seed, layer, options._ZONE_H, rate_h, width)[t, :, d]
            zc = drawn(m, x, seed, layer, options._ZONE_C, rate_c, m.hidden_size)[t, :, d] if rate_c else 0
        else:
            zh, zc = rate_h, rate_c
        return zh * old_h + (1 - zh) * new_h, None if new_c is None else zc * old_c + (1 - zc) * new_c

    return after


def twice():
    """Two generators in the same state, and the seed that a call draws from them."""
    a, b, c = (torch.Generator().manual_seed(11) for _ in range(3))
    return a, b, masks.draw_seed(c, torch.device("cpu"))


@each_layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "stack"])
def test_equals_a_loop_of_cells(kind, training, settings):
    m, x, hx = problem(kind, **settings)
    m.train(training)
    generator, again, seed = twice()
    want = run(m, x, hx, after=zone(m, x, seed))
    check(m, call(m, x, hx, generator=generator, return_all_states=True), want, [x, hx])
    check(m, call(m, x, hx, generator=again), want, [x, hx])


@each_layer
def test_kernels_equal_reference_with_everything_else(kind, monkeypatch):
    """Zoneout together with resets, a mask on h, and clipping: what the kernels do against the reference."""
    torch.set_num_threads(2)
    m, x, hx = problem(kind, bidirectional=True, recurrent_dropout=0.3, grad_clip=0.5, weight_dropout=0.2)
    resets = torch.rand(T, B) < 0.3
    lengths = [7, 2, 0, 5]
    a, b, _ = twice()
    got = call(m, x, hx, resets=resets, lengths=lengths, generator=a, return_all_states=True)
    for operators in (option_ops, recurrence):
        monkeypatch.setattr(operators, "covers", lambda *_: False)
    check(m, got, call(m, x, hx, resets=resets, lengths=lengths, generator=b, return_all_states=True), [x, hx])
    monkeypatch.setattr(functional, "has_kernel", lambda *_: False)  # not even packed, as on another device
    c, _, _ = twice()
    check(m, got, call(m, x, hx, resets=resets, lengths=lengths, generator=c, return_all_states=True), [x, hx])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "proj"])
def test_dtypes(kind, dtype):
    torch.set_num_threads(2)
    m = make(kind, 8, 37, zoneout=0.2, dtype=dtype)
    x = torch.randn(11, 20, 8).to(dtype).requires_grad_()
    generator, _, seed = twice()
    y = m(x, generator=generator)[0]
    wide = make(kind, 8, 37, zoneout=0.2)
    wide.load_state_dict(m.state_dict())
    twin = x.detach().double().requires_grad_()
    want = run(wide, twin, after=zone(wide, x, seed))["y"]
    got = [y, *torch.autograd.grad(y.double().square().sum(), [x, *m.parameters()])]
    right = [want, *torch.autograd.grad(want.square().sum(), [twin, *wide.parameters()])]
    for a, b in zip(got, right, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=DTYPES[dtype] * max(1, b.abs().max().item()))


@each_layer
@pytest.mark.parametrize("training", [True, False])
def test_derivatives(kind, training):
    m = make(kind, 2, 4, zoneout=0.4).train(training)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x):
        y, last = m(x, generator=torch.Generator().manual_seed(3))
        return y, *(last if isinstance(last, tuple) else (last,))

    assert gradcheck(function, (x,))
    assert gradgradcheck(function, (x,))


def test_masks_differ_between_steps_calls_and_layers():
    """A unit that is zoned out keeps its value exactly: the pattern is seen in the output."""
    m = make("GRU", I, 64, zoneout=0.5, num_layers=2, bidirectional=True)
    x = torch.randn(6, 8, I, dtype=torch.float64)
    _, _, hs = m(x, return_all_states=True)
    held = [(hs[layer, 1:, :, :64] == hs[layer, :-1, :, :64]) for layer in (0, 1)]
    for pattern in held:
        assert 0.45 < pattern.double().mean() < 0.55
        for t in range(4):
            assert 0.4 < (pattern[t] == pattern[t + 1]).double().mean() < 0.6
    assert 0.4 < (held[0] == held[1]).double().mean() < 0.6
    backwards = hs[0, :-1, :, 64:] == hs[0, 1:, :, 64:]
    assert 0.4 < (held[0] == backwards).double().mean() < 0.6
    assert not torch.equal(m(x)[0], m(x)[0])
    torch.manual_seed(1)
    first = m(x)[0]
    torch.manual_seed(1)
    assert torch.equal(m(x)[0], first)
    m.eval()
    assert torch.equal(m(x)[0], m(x)[0])


def test_expectation_in_eval_mode():
    m = make("LSTM", I, H, zoneout=(0.3, 0.4))
    x = torch.randn(1, B, I, dtype=torch.float64)
    hx = tuple(t.detach() for t in state(m, B))
    mean = torch.stack([m(x, hx)[0] for _ in range(3000)]).mean(0)
    torch.testing.assert_close(m.eval()(x, hx)[0], mean, rtol=0, atol=0.03)


def test_errors_text_and_pickle():
    for bad in (1.0, -0.1, "a", (0.1, 0.2, 0.3), True, float("nan")):
        with pytest.raises(ValueError, match="zoneout"):
            make("LSTM", I, H, zoneout=bad)
    with pytest.raises(ValueError, match="zoneout of a cell state is for the LSTM"):
        make("GRU", I, H, zoneout=(0.1, 0.1))
    m, x, _ = problem("LSTM")
    assert "zoneout=(0.3, 0.4)" in repr(m)
    m.eval()
    torch.testing.assert_close(pickle.loads(pickle.dumps(m))(x), m(x))
