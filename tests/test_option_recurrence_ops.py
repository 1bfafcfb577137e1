"""The operators behind test_option_recurrence.py: torch's own checks, and bad input."""

import pytest
import torch

from seqkern import recurrence
from seqkern.recurrence import BIAS_N, COUPLED, HARD, NORMAL, PEEPHOLE, RESET_BEFORE

T, B, H = 3, 2, 5
CASES = {
    "lstm-normal": ("lstm", NORMAL | PEEPHOLE, False),
    "lstm-coupled": ("lstm", COUPLED | HARD, True),
    "gru-normal": ("gru", NORMAL | BIAS_N, False),
    "gru-reset_before": ("gru", RESET_BEFORE, True),
    "rnn": ("rnn_tanh", 0, False),
}


def arguments(cell, flags, packed, dtype=torch.float64):
    gates = {"lstm": 3 if flags & COUPLED else 4, "gru": 3}.get(cell, 1)
    directions, leaf = 2, {"dtype": dtype, "requires_grad": True}
    sizes = torch.tensor([2, 2, 1]) if packed else None
    rows = 5 if packed else T * B
    widths = [H] * bool(flags & BIAS_N) + [(2 if flags & COUPLED else 3) * H] * bool(flags & PEEPHOLE)
    if flags & NORMAL:
        widths += [gates * H] + [H, H] * (cell == "lstm")
    params = [torch.randn(directions, gates * H, H, **leaf), *(torch.randn(directions, n, **leaf) for n in widths)]
    gx = torch.randn(*((rows,) if packed else (T, B)), directions * gates * H, **leaf)
    h0, c0 = torch.randn(directions, B, H, **leaf), torch.randn(directions, B, H, **leaf) if cell == "lstm" else None
    keep = (torch.rand(rows) < 0.8).to(dtype)
    zone = (torch.rand(rows, directions * H) < 0.3).to(dtype)
    masks = (keep, torch.rand(directions, B, H).to(dtype), zone, zone if cell == "lstm" else None)
    return [gx, h0, c0, params, sizes, *masks, 0.0, 0.0, cell, flags]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("want_c, save", [(True, True), (False, False)])
def test_opcheck(name, want_c, save):
    torch.library.opcheck(recurrence.recurrence, (*arguments(*CASES[name]), want_c, save))


@pytest.mark.parametrize("name", CASES)
def test_opcheck_backward(name):
    inputs = arguments(*CASES[name])
    with torch.no_grad():
        *outputs, read, reserve = recurrence.recurrence(*inputs, True, True)
    cotangents = [torch.randn_like(t).requires_grad_() if t.numel() else None for t in outputs]
    every = (*cotangents, *inputs[:-2], read, reserve, *inputs[-2:])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(recurrence.recurrence_backward, every, test_utils=checks)


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name):
    """Of everything that the operator takes a gradient of, with all masks on."""
    inputs = arguments(*CASES[name])
    h0, c0, params = inputs[1:4]
    leaves = [t for t in (inputs[0], h0, c0, *params) if t is not None]

    def function(gx, h0, *rest):
        rest = list(rest)
        c0 = rest.pop(0) if inputs[2] is not None else None
        outputs = recurrence.recurrence(gx, h0, c0, rest, *inputs[4:], True, True)[:4]
        return tuple(t for t in outputs if t.numel())

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_backward_without_a_reserve(name):
    """It runs forward again."""
    inputs = arguments(*CASES[name])
    grads = []
    for save in (True, False):
        outputs = [t for t in recurrence.recurrence(*inputs, True, save)[:4] if t.numel()]
        leaves = [t for t in [*inputs[:3], *inputs[3]] if t is not None]
        grads.append(torch.autograd.grad([t.sum() for t in outputs], leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, torch.randn(T, B, 7).double(), r"gx must have D\*G\*H = 40 columns, got 7"),
        (0, torch.randn(T, B, 40).to(torch.bfloat16), "gx must be float32 or float64, got bfloat16"),
        (1, torch.randn(2, 3, H).double(), r"h0 must be \[D, B, H\] = \[2, 2, 5\], got \[2, 3, 5\]"),
        (3, [torch.randn(20, H).double()], r"w_hh must be \[D, G\*H, H\]"),
        (3, [torch.randn(2, 20, H).double()], "params lack peephole"),
        (5, torch.ones(5).double(), r"keep must be \[N\] = \[6\], got \[5\]"),
        (7, torch.ones(4, 10).double(), r"zone_h must be \[N or 1, D\*H\] = \[6, 10\], got \[4, 10\]"),
        (12, RESET_BEFORE, "lstm: no kernel for flags 4"),
    ],
)
def test_bad_input(index, value, message):
    inputs = arguments(*CASES["lstm-normal"])
    inputs[index] = value
    with pytest.raises(RuntimeError, match=message), torch.no_grad():
        recurrence.recurrence(*inputs, False, False)
