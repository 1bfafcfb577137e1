"""return_all_states: h and c of every layer and step, with gradients."""

import pytest
import torch
from loops import LAYERS, call, check, make, run, state
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from seqkern import functional

T, B, I, H = 6, 4, 3, 5  # noqa: E741
each_layer = pytest.mark.parametrize("kind", LAYERS)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_a_loop_of_cells(kind, dtype):
    m = make(kind, I, H, num_layers=2, bidirectional=True, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    hx = state(m, B)
    got = call(m, x, hx, return_all_states=True)
    assert got["hs"].shape == (2, T, B, 2 * (m.proj_size or H))
    check(m, got, run(m, x, hx), [x, hx], 1e-10 if dtype == torch.float64 else 1e-4)
    if "cs" in got:
        assert torch.equal(got["cs"][1, -1, :, :H], got["c_n"][2])
        assert torch.equal(got["cs"][1, 0, :, H:], got["c_n"][3])


@each_layer
def test_second_derivatives(kind):
    m = make(kind, 2, 4)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x):
        states = m(x, return_all_states=True)[2]
        return states if isinstance(states, tuple) else (states,)

    assert gradcheck(function, (x,))
    assert gradgradcheck(function, (x,))


@each_layer
def test_layouts(kind):
    m = make(kind, I, H, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    *_, want = m(x, return_all_states=True)
    want = want if isinstance(want, tuple) else (want,)

    def states(x):
        found = m(x, return_all_states=True)[2]
        return found if isinstance(found, tuple) else (found,)

    for got, all_states in zip(states(x[:, 1]), want, strict=True):
        torch.testing.assert_close(got, all_states[:, :, 1])
    packed = pack_padded_sequence(x, torch.full((B,), T))
    assert isinstance(m(packed)[0], PackedSequence)
    for got, all_states in zip(states(packed), want, strict=True):
        torch.testing.assert_close(got, all_states.flatten(1, 2))
    m.batch_first = True
    for got, all_states in zip(states(x.transpose(0, 1)), want, strict=True):
        torch.testing.assert_close(got, all_states.transpose(1, 2))


def test_functional_and_inference():
    m = make("LSTM", I, H)
    x = torch.randn(T, B, I, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            functional.lstm(x, None, m._flat_weights, return_all_states=True), m(x, return_all_states=True)
        )
