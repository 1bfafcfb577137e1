"""Bad arguments of the attention decoder: errors that name what was wanted and what came, before any kernel runs."""

import pytest
import torch
from decoder_cases import Case, make

from seqkern.seq2seq import ops

GX, FEED0, H0, C0, WEIGHTS, KEYS, VALUES, LENGTHS, W_QUERY, V, W_PRE, B_PRE, MASKS, CELL = range(14)
ADDITIVE = Case("lstm", 2, K=4, masked=True)
DOT = Case("gru")


def error(case, change, match):
    arguments = make(case, torch.float32)
    change(arguments)
    with pytest.raises(RuntimeError, match=match):
        ops.run(*arguments)


def put(place, value):
    def change(arguments):
        arguments[place] = value(arguments[place]) if callable(value) else value

    return change


def put_weight(i, value):
    def change(arguments):
        arguments[WEIGHTS][i] = value(arguments[WEIGHTS][i])

    return change


@pytest.mark.parametrize(
    "place, value, match",
    [
        (GX, lambda t: t[0], r"gx must be \[T, B, G\*H\], got \[3, 24\]"),
        (GX, lambda t: t[..., 1:], r"gx must be \[T, B, G\*H\] = \[3, 3, 24\], got \[3, 3, 23\]"),
        (GX, lambda t: t[:0], r"must be at least 1, got \[0, "),
        (FEED0, lambda t: t[:, 1:], r"feed0 must be \[B, A\] = \[3, 7\], got \[3, 6\]"),
        (FEED0, lambda t: t.double(), "feed0 must be float32 as x is, got float64"),
        (H0, lambda t: t[:1], r"c0 must be \[L, B, H\] = \[1, 3, 6\], got \[2, 3, 6\]"),
        (C0, None, "c0 must be given"),
        (WEIGHTS, lambda w: w[:-1], r"4\*L - 1 = 7 tensors, got 6"),
        (KEYS, lambda t: t[:2], r"keys must be \[B, S, K\] = \[3, 5, 4\], got \[2, 5, 4\]"),
        (KEYS, lambda t: t[:, :0], "must be at least 1"),
        (VALUES, lambda t: t[:, 1:], r"values must be \[B, S, A\] = \[3, 5, 7\], got \[3, 4, 7\]"),
        (LENGTHS, lambda t: t.int(), r"lengths must be \[B\] = \[3\] int64 on the CPU, got \[3\] "),
        (LENGTHS, lambda t: t[1:], r"lengths must be \[B\] = \[3\]"),
        (LENGTHS, lambda t: t + 1, r"lengths must be in \[0, S\] = \[0, 5\], got 6"),
        (LENGTHS, lambda t: t - 1, r"lengths must be in \[0, S\] = \[0, 5\], got -1"),
        (W_QUERY, lambda t: t[1:], r"w_query must be \[K, H\] = \[4, 6\], got \[3, 6\]"),
        (V, None, "w_query and v must be given both or not at all"),
        (W_PRE, lambda t: t.T, r"w_pre must be \[A, H\] = \[7, 6\], got \[6, 7\]"),
        (B_PRE, lambda t: t.bfloat16(), "b_pre must be float32"),
        (MASKS, lambda t: t[0], r"masks must be \[T, L-1, B, H\] = \[3, 1, 3, 6\], got \[1, 3, 6\]"),
        (CELL, "tanh", "cell must be one of rnn_tanh, rnn_relu, lstm, gru, got tanh"),
    ],
)
def test_argument(place, value, match):
    error(ADDITIVE, put(place, value), match)


@pytest.mark.parametrize(
    "i, name", enumerate(["w_feed", "w_hh", "b_hh", "w_ih of layer 1", "w_hh of layer 1", "b_ih of layer 1"])
)
def test_weight(i, name):
    error(ADDITIVE, put_weight(i, lambda t: t[1:]), f"{name} must be ")
    error(ADDITIVE, put_weight(i, lambda t: t.double()), f"{name} must be float32")


@pytest.mark.parametrize(
    "tokens, match",
    [
        (torch.tensor([[0, 4]]), r"tokens must be in \[0, V\) = \[0, 4\), got 4"),
        (torch.tensor([[0, -1]]), r"tokens must be in \[0, V\) = \[0, 4\), got -1"),
        (torch.tensor([[0, 1]], dtype=torch.int32), "tokens must be int64 on the CPU, got Int"),
        (torch.tensor([0, 1]), r"tokens must be \[T, B\], got \[2\]"),
        (torch.zeros(0, 2, dtype=torch.int64), r"must be at least 1, got \[0, "),
    ],
)
def test_tokens(tokens, match):
    case = Case("gru", T=1, B=2, V=4)
    error(case, lambda arguments: arguments.__setitem__(-1, tokens), match)
    error(case, put(GX, lambda t: t[..., 1:]), r"gx must be \[V, G\*H\] = \[4, 18\], got \[4, 17\]")
    error(case, put(GX, lambda t: t[None]), r"gx must be \[V, G\*H\] beside tokens, got \[1, 4, 18\]")


def test_dot_needs_keys_as_wide_as_the_state():
    error(DOT, put(KEYS, lambda t: t[..., 1:]), r"keys must be \[B, S, H\] without w_query, H = 6, got \[3, 5, 5\]")


def test_only_the_lstm_has_a_cell_state():
    error(DOT, put(C0, torch.zeros(1, 3, 6)), "only the LSTM has a c0")


def test_dtype_without_a_kernel():
    arguments = [
        a.to(torch.complex64) if torch.is_tensor(a) and a.is_floating_point() else a for a in make(DOT, torch.float32)
    ]
    arguments[WEIGHTS] = [w.to(torch.complex64) for w in arguments[WEIGHTS]]
    with pytest.raises(RuntimeError, match="x must be float64, float32, bfloat16 or float16"):
        ops.run(*arguments)


def test_cotangents():
    arguments = make(DOT, torch.float32)
    *inputs, cell = arguments
    a, _, _, alpha, reserve = ops.attention_decoder(*arguments, True)
    for dys, match in (
        ((a[1:], None, None, None), r"da must be \[T, B, A\]"),
        ((None, arguments[H0][:, 1:], None, None), r"dh_n must be \[L, B, H\]"),
        ((None, None, None, alpha.double()), "dalpha must be float32"),
    ):
        with pytest.raises(RuntimeError, match=match):
            ops.attention_decoder_backward(*dys, *inputs, a, alpha, reserve, cell, True, True, True)
    with pytest.raises(RuntimeError, match="reserve must be"):
        ops.attention_decoder_backward(a, None, None, None, *inputs, a, alpha, reserve[1:], cell, True, True, True)
