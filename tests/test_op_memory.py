"""Operators and plain calls leave no memory behind: bytes in use by malloc are the same after thousands of calls."""

import ctypes
import gc

import pytest
import torch

import seqkern
from seqkern import ops

CALLS = 2000
FIELDS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class Mallinfo2(ctypes.Structure):
    """struct mallinfo2 of glibc's malloc.h; uordblks: bytes in use."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


@pytest.fixture
def grown():
    """grown(call): bytes in use that a call adds."""
    try:
        info = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("needs mallinfo2 of glibc 2.33")
    info.restype = Mallinfo2

    def measure(call) -> float:
        for _ in range(CALLS // 4):
            call()
        gc.collect()
        before = info().uordblks
        for _ in range(CALLS):
            call()
        gc.collect()
        return (info().uordblks - before) / CALLS

    return measure


def test_a_leak_is_seen(grown):
    kept = []
    assert grown(lambda: kept.append(ctypes.create_string_buffer(600))) > 600


CELLS = {"lstm": seqkern.LSTM, "gru": seqkern.GRU, "rnn_tanh": seqkern.RNN}


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_operators(cell, grown):
    torch.manual_seed(0)
    layer, x = CELLS[cell](8, 8), torch.randn(3, 2, 8)
    weights = [p.detach() for p in layer.parameters()]
    y, h_n, _, reserve = ops.rnn_layer(x, None, None, weights, None, cell, False, True, False)

    def backward():
        needed = True, True
        ops.rnn_layer_backward(y, h_n, None, x, None, None, weights, None, y, reserve, cell, False, *needed, False)

    assert grown(lambda: ops.rnn_layer(x, None, None, weights, None, cell, False, True, False)) < 8
    assert grown(backward) < 8


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_training(cell, contiguous, grown):
    """Gradients that a call takes as they lie, and those for which it goes to the operator."""
    torch.manual_seed(0)
    layer, x = CELLS[cell](8, 8), torch.randn(3, 2, 8)
    dy = torch.randn(3, 2, 8) if contiguous else torch.ones(()).expand(3, 2, 8)
    assert grown(lambda: layer(x)[0].backward(dy)) < 8


def test_an_error(grown):
    x, layer = torch.randn(3, 2, 8), seqkern.LSTM(8, 8)
    weights = [p.detach() for p in layer.parameters()]

    def wrong():
        with pytest.raises(RuntimeError, match="cell"):
            ops.rnn_layer(x, None, None, weights, None, "none such", False, True, False)

    assert grown(wrong) < 8
