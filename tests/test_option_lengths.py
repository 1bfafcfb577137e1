"""lengths: padded sequences of any lengths in any order, held to a loop of torch's cells and to PackedSequence."""

import pytest
import torch
from loops import LAYERS, call, check, make, run, state
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqkern import functional

T, B, I, H = 8, 6, 3, 5  # noqa: E741
LENGTHS = {"mixed": [3, 0, 8, 1, 0, 5], "none": [0] * 6, "all": [8] * 6, "short": [2, 1, 2, 0, 1, 1]}
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def problem(kind, **options):
    m = make(kind, I, H, **options)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    return m, x, state(m, B)


@each_layer
@each_lengths
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}], ids=["one", "both", "stack"]
)
@pytest.mark.parametrize("kernels", [True, False])
def test_equals_a_loop_of_cells(kind, lengths, options, kernels, monkeypatch):
    if not kernels:  # what other devices do
        monkeypatch.setattr(functional, "has_kernel", lambda *_: False)
    m, x, hx = problem(kind, **options)
    got = call(m, x, hx, lengths=torch.tensor(lengths), return_all_states=True)
    check(m, got, run(m, x, hx, lengths), [x, hx])
    for b, n in enumerate(lengths):
        assert (got["y"][n:, b] == 0).all()
        if n == 0 and not options:
            assert torch.equal(got["h_n"][:, b], (hx[0] if isinstance(hx, tuple) else hx)[:, b])
    check(m, call(m, x, None, lengths=torch.tensor(lengths)), run(m, x, None, lengths), [x])


@each_layer
@pytest.mark.parametrize("kernels", [True, False])
def test_with_resets(kind, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(functional, "has_kernel", lambda *_: False)
    m, x, hx = problem(kind, bidirectional=True)
    keep = torch.rand(T, B, dtype=torch.float64).round()

    def before(h, c, t, *_):
        return h * keep[t].unsqueeze(-1), None if c is None else c * keep[t].unsqueeze(-1)

    lengths = LENGTHS["mixed"]
    got = call(m, x, hx, lengths=torch.tensor(lengths), resets=keep == 0)
    # Rows that have ended hold the state that their own last step left: a reset past the end does not reach it.
    check(m, got, run(m, x, hx, lengths, before=before), [x, hx])


@each_layer
def test_equals_packed_sequence(kind):
    m, x, hx = problem(kind, bidirectional=True, batch_first=True)
    x = x.transpose(0, 1)
    lengths = torch.tensor([3, 1, 8, 1, 2, 5])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y, last = m(packed, hx)
    y, _ = pad_packed_sequence(y, batch_first=True, total_length=T)
    torch.testing.assert_close(m(x, hx, lengths=lengths), (y, last), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes_and_lists(dtype):
    m, x, _ = problem("GRU")
    want = m(x, lengths=torch.tensor(LENGTHS["mixed"]))
    torch.testing.assert_close(m(x, lengths=torch.tensor(LENGTHS["mixed"], dtype=dtype)), want)
    torch.testing.assert_close(m(x, lengths=LENGTHS["mixed"]), want)


@pytest.mark.parametrize("layout", ["time", "batch", "strided"])
def test_layouts(layout):
    m, x, _ = problem("LSTM")
    want = m(x, lengths=LENGTHS["mixed"])
    if layout == "batch":
        x = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":
        x = torch.stack([x.detach(), x.detach()], -1)[..., 0]
    torch.testing.assert_close(m(x, lengths=LENGTHS["mixed"]), want)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_second_derivatives(kind):
    m = make(kind, 2, 2, bidirectional=True)
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(x, *hx):
        y, last = m(x, hx if kind == "LSTM" else hx[0], lengths=[2, 0, 3])
        return y, *(last if kind == "LSTM" else (last,))

    hx = state(m, 3)
    leaves = (x, *(hx if kind == "LSTM" else (hx,)))
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_padding_is_never_read():
    m, x, _ = problem("LSTM", bidirectional=True)
    lengths = LENGTHS["mixed"]
    want = m(x, lengths=lengths)
    spoilt = x.detach().clone()
    for b, n in enumerate(lengths):
        spoilt[n:, b] = float("nan")
    torch.testing.assert_close(m(spoilt, lengths=lengths), want)


def test_batch_of_none():
    m, x, _ = problem("LSTM")
    y, (h, c) = m(x[:, :0], lengths=torch.zeros(0, dtype=torch.int64))
    assert (y.shape, h.shape, c.shape) == ((T, 0, H), (1, 0, H), (1, 0, H))


def test_functional():
    m, x, hx = problem("RNN")
    lengths = torch.tensor(LENGTHS["mixed"])
    torch.testing.assert_close(functional.rnn(x, hx, m._flat_weights, lengths=lengths), m(x, hx, lengths=lengths))


def test_errors():
    m, x, _ = problem("GRU")
    for bad, error, text in (
        ([9, 1, 1, 1, 1, 1], ValueError, r"lengths must be in \[0, T\] = \[0, 8\], got 1 to 9"),
        ([-1, 1, 1, 1, 1, 1], ValueError, "lengths must be in"),
        ([1, 2], ValueError, r"lengths must be \[B\] = \[6\], got \[2\]"),
        ([1.0] * 6, TypeError, "integer dtype, got torch.float32"),
        (torch.ones(6).bool(), TypeError, "integer dtype"),
    ):
        with pytest.raises(error, match=text):
            m(x, lengths=bad)
    with pytest.raises(ValueError, match="batched input"):
        m(x[:, 0], lengths=[3])
    with pytest.raises(ValueError, match="padded input"):
        m(torch.nn.utils.rnn.pack_sequence([x[:, 0]]), lengths=torch.tensor([3]))
