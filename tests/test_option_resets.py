"""resets: the state cleared, or scaled, before marked steps, held to a loop of torch's cells."""

import pickle

import pytest
import torch
from loops import DTYPES, LAYERS, call, check, make, run, state
from torch.autograd import gradcheck, gradgradcheck

import seqkern
from seqkern import functional, option_ops, recurrence

T, B, I, H = 9, 5, 3, 6  # noqa: E741
each_layer = pytest.mark.parametrize("kind", LAYERS)


def clear(keep):
    """The loop's `before`, with keep [T, B]."""

    def before(h, c, t, *_):
        k = keep[t].unsqueeze(-1)
        return h * k, None if c is None else c * k

    return before


def problem(kind, rate=0.3, **options):
    m = make(kind, I, H, **options)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    return m, x, state(m, B), torch.rand(T, B) < rate


@each_layer
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}, {"bias": False}],
    ids=["plain", "bidirectional", "two_layers", "no_bias"],
)
def test_equals_a_loop_of_cells(kind, options):
    m, x, hx, resets = problem(kind, **options)
    resets[0, 1] = resets[-1, 2] = resets[4] = True
    want = run(m, x, hx, before=clear(resets.logical_not().double()))
    check(m, call(m, x, hx, resets=resets, return_all_states=True), want, [x, hx])
    check(m, call(m, x, hx, resets=resets), want, [x, hx])


@each_layer
def test_keep_mask(kind):
    m, x, hx, _ = problem(kind)
    keep = torch.rand(T, B, dtype=torch.float64)
    check(m, call(m, x, hx, resets=keep), run(m, x, hx, before=clear(keep)), [x, hx])
    keep.requires_grad_()
    check(m, call(m, x, hx, resets=keep), run(m, x, hx, before=clear(keep)), [x, hx, keep])


@each_layer
def test_batch_first_unbatched_and_no_state(kind):
    m, x, hx, resets = problem(kind)
    want = m(x, resets=resets)
    m.batch_first = True
    y, last = m(x.transpose(0, 1), resets=resets.transpose(0, 1))
    torch.testing.assert_close((y.transpose(0, 1), last), want)
    one = m(x[:, 2], resets=resets[:, 2])
    torch.testing.assert_close(one[0], want[0][:, 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(9, 5, 3, 6), (20, 40, 16, 33), (12, 2, 8, 200)], ids=str)
@each_layer
def test_dtypes_and_sizes(kind, sizes, dtype):
    steps, batch, inputs, hidden = sizes
    torch.set_num_threads(2)
    m = make(kind, inputs, hidden, dtype=dtype, bidirectional=True)
    x = torch.randn(steps, batch, inputs).to(dtype).requires_grad_()
    resets = torch.rand(steps, batch) < 0.2
    hx = state(m, batch)
    got = call(m, x, hx, resets=resets)
    wide = make(kind, inputs, hidden, bidirectional=True)
    wide.load_state_dict(m.state_dict())
    twin = [t.detach().double().requires_grad_() for t in (x, *(hx if isinstance(hx, tuple) else (hx,)))]
    start = tuple(twin[1:]) if len(twin) == 3 else twin[1]
    want = run(wide, twin[0], start, before=clear(resets.logical_not().double()))
    got_grads, want_grads = (
        torch.autograd.grad(out["y"].double().square().sum(), [*leaves, *module.parameters()])
        for out, leaves, module in ((got, [x, *(hx if isinstance(hx, tuple) else (hx,))], m), (want, twin, wide))
    )
    for a, b in zip([*got.values(), *got_grads], [*(want[n] for n in got), *want_grads], strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=DTYPES[dtype] * max(1, b.abs().max().item()))


@each_layer
def test_second_derivatives(kind):
    m = make(kind, 2, 4, bidirectional=True)
    resets = torch.tensor([[0, 1], [1, 0], [0, 0]]).bool()
    x, w = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True), list(m.parameters())
    names = [n for n, _ in m.named_parameters()]

    def function(x, *weights):
        out = torch.func.functional_call(m, dict(zip(names, weights, strict=True)), (x,), {"resets": resets})
        return out[0], *(out[1] if isinstance(out[1], tuple) else (out[1],))

    assert gradcheck(function, (x, *w))
    assert gradgradcheck(function, (x, *w))


def test_clears_what_is_not_a_number_and_stops_gradients():
    m, x, _, resets = problem("LSTM", 0.0)
    x.data[3, 1] = float("nan")
    resets[4, 1] = True
    y, _ = m(x, resets=resets)
    assert y[3, 1].isnan().all() and not y[4:].isnan().any()
    m, x, _, resets = problem("GRU", 0.0)
    resets[5] = True
    (grad,) = torch.autograd.grad(m(x, resets=resets)[0][5:].sum(), x)
    assert (grad[:5] == 0).all() and (grad[5:] != 0).any()
    torch.testing.assert_close(m(x, resets=resets)[0][5:], m(x[5:])[0])


def test_no_reset_is_no_option():
    m, x, hx, _ = problem("LSTM")
    torch.testing.assert_close(m(x, hx, resets=torch.zeros(T, B).bool()), m(x, hx), rtol=0, atol=0)


def test_functional():
    m, x, hx, resets = problem("GRU")
    torch.testing.assert_close(functional.gru(x, hx, m._flat_weights, resets=resets), m(x, hx, resets=resets))


def test_errors():
    m, x, _, resets = problem("LSTM")
    for bad, error, text in (
        (resets.t(), ValueError, r"resets must be \[T, B\] = \[9, 5\], got \[5, 9\]"),
        (resets[0], ValueError, "resets must be"),
        (resets.long(), TypeError, "resets must be bool"),
        (resets.float() + 0.5, ValueError, r"keep-mask must be in \[0, 1\]"),
        (resets.float() * float("nan"), ValueError, r"keep-mask must be in \[0, 1\]"),
        (resets.to("meta"), ValueError, "resets must be on cpu"),
    ):
        with pytest.raises(error, match=text):
            m(x, resets=bad)
    with pytest.raises(ValueError, match="unbatched"):
        m(x[:, 0], resets=resets)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, I, dtype=torch.float64)])
    with pytest.raises(ValueError, match="padded input"):
        m(packed, resets=resets)


def test_pickled_layer_and_accelerated_layer():
    m, x, _, resets = problem("GRU")
    want = m(x, resets=resets)
    torch.testing.assert_close(pickle.loads(pickle.dumps(m))(x, resets=resets), want)
    theirs = torch.nn.GRU(I, H, dtype=torch.float64)
    theirs.load_state_dict(m.state_dict())
    torch.testing.assert_close(seqkern.accelerate(theirs)(x, resets=resets), want)


@each_layer
def test_the_kernels_are_what_ran(kind, monkeypatch):
    m, x, hx, resets = problem(kind, bidirectional=True)
    got = call(m, x, hx, resets=resets)
    calls = []
    layer = functional.reference_layer
    monkeypatch.setattr(functional, "reference_layer", lambda *a: calls.append(1) or layer(*a))
    call(m, x, hx, resets=resets)
    assert not calls
    monkeypatch.setattr(option_ops, "covers", lambda *_: False)
    monkeypatch.setattr(recurrence, "covers", lambda *_: False)
    check(m, got, call(m, x, hx, resets=resets), [x, hx])
    assert calls
