"""recurrent_dropout and weight_dropout, and the masks behind all random options."""

import pytest
import torch
from loops import LAYERS, call, check, make, run, state, torch_step
from torch.autograd import gradcheck, gradgradcheck

from seqkern import masks, options

T, B, I, H = 7, 4, 3, 6  # noqa: E741
each_layer = pytest.mark.parametrize("kind", LAYERS)


def twice():
    a, b = (torch.Generator().manual_seed(5) for _ in range(2))
    return a, masks.draw_seed(b, torch.device("cpu"))


def mask(seed, stream, shape, p):
    """0 with probability p, else 1 / (1 - p), from the definition in plain torch."""
    kept = masks.bits(seed, stream, torch.Size(shape).numel()) < round((1 - p) * 2**32)
    return kept.double().view(shape) / (1 - p)


@each_layer
@pytest.mark.parametrize("lengths", [None, [3, 0, 7, 1]], ids=["whole", "lengths"])
def test_recurrent_dropout_equals_a_loop_of_cells(kind, lengths):
    m = make(kind, I, H, num_layers=2, bidirectional=True, recurrent_dropout=0.4)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    generator, seed = twice()
    width = m.proj_size or H

    def step(m, x, h, c, w, t, layer, d):
        dropped = h * mask(seed, layer * 8 + options._H, (2, B, width), 0.4)[d]
        if m.mode != "GRU":
            return torch_step(m, x, dropped, c, w)
        gx = torch.nn.functional.linear(x, w["weight_ih"], w["bias_ih"])
        gh = torch.nn.functional.linear(dropped, w["weight_hh"], w["bias_hh"])
        (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
        z = (xz + hz).sigmoid()
        return (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h, None  # the old h itself, not what was dropped

    hx = state(m, B)
    got = call(m, x, hx, generator=generator, lengths=lengths and torch.tensor(lengths), return_all_states=True)
    check(m, got, run(m, x, hx, lengths, step=step), [x, hx])


@each_layer
def test_weight_dropout_equals_a_loop_of_cells(kind):
    m = make(kind, I, H, bidirectional=True, weight_dropout=0.5)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    generator, seed = twice()

    def step(m, x, h, c, w, t, layer, d):
        w_hh = w["weight_hh"] * mask(seed, layer * 8 + options._WEIGHT + 4 * d, w["weight_hh"].shape, 0.5)
        return torch_step(m, x, h, c, w | {"weight_hh": w_hh})

    check(m, call(m, x, generator=generator), run(m, x, step=step), [x])


@each_layer
@pytest.mark.parametrize("option", ["recurrent_dropout", "weight_dropout"])
def test_eval_derivatives_and_errors(kind, option):
    m = make(kind, 2, 4, **{option: 0.5})
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x):
        return m(x, generator=torch.Generator().manual_seed(3))[0]

    assert gradcheck(function, (x,))
    assert gradgradcheck(function, (x,))
    plain = make(kind, 2, 4)
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(m.eval()(x), plain(x), rtol=0, atol=0)
    assert f"{option}=0.5" in repr(m)
    for bad in (1, -1, None, "0.5"):
        with pytest.raises(ValueError, match=option):
            make(kind, 2, 4, **{option: bad})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (70_001,), (0, 4)], ids=str)
def test_kernel_draws_the_defined_bits(dtype, shape):
    torch.set_num_threads(2)
    seed = torch.tensor([0x1234_5678_9ABC_DEF0])
    like = torch.empty(0, dtype=dtype)
    for p in (0.0, 1e-3, 0.37, 1.0):
        got = masks.bernoulli(like, shape, seed, 5, p, 2.5)
        want = (masks.bits(seed, 5, torch.Size(shape).numel()) < round(p * 2**32)).to(dtype).view(shape) * 2.5
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_bits_look_random():
    """Rate, neighbours, rows, streams and seeds: within five standard deviations of independent fair coins."""
    n = 1 << 18

    def coins(seed, stream):
        return masks.bits(torch.tensor([seed]), stream, n) >= 1 << 31

    a = coins(1, 0)
    bound = 5 * 0.5 / n**0.5
    assert abs(a.double().mean() - 0.5) < bound
    others = [a.roll(k) for k in (1, 2, 64, 256, 1024)] + [coins(1, 1), coins(2, 0), coins(1 << 32 | 1, 0), coins(0, 1)]
    for b in others:
        assert abs((a == b).double().mean() - 0.5) < bound
    for bit in range(32):
        words = masks.bits(torch.tensor([9]), 3, n) >> bit & 1
        assert abs(words.double().mean() - 0.5) < bound
