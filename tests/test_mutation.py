"""The oracle must fail a wrong engine: copies of the reference with one thing changed, and it does, for every one.

`flipped` and `halved` leave the forward alone and spoil one path of the backward.
"""

import inspect
import types

import pytest
import torch
from cases import CASES, DTYPES, Case, make_cotangents, make_inputs
from oracle import evaluate, fault, faults

from seqkern import reference

FORWARD_TANH = "State(torch.tanh(gx + gh))"
FORWARD_RELU = "State(torch.relu(gx + gh))"
CELL_STATE = "torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)"
LSTM_OUTPUT = "State(torch.sigmoid(o) * torch.tanh(c), c)"
GRU_CANDIDATE = "n = torch.tanh(xn + r * hn)"
GRU_OUTPUT = "State(n + z * (state.h - n))"

# cell, text of the reference, text of the mutant
CELL_MUTANTS = [
    ("rnn_tanh", FORWARD_TANH, "State(torch.tanh(gx - gh))"),
    ("rnn_tanh", FORWARD_TANH, "State(torch.sigmoid(gx + gh))"),
    ("rnn_tanh", FORWARD_TANH, "State(torch.tanh(gx + halved(gh)))"),
    ("rnn_tanh", FORWARD_TANH, "State(torch.tanh(flipped(gx) + gh))"),
    ("rnn_relu", FORWARD_RELU, "State(torch.relu(gx - gh))"),
    ("rnn_relu", FORWARD_RELU, "State(torch.nn.functional.leaky_relu(gx + gh, 0.2))"),
    ("rnn_relu", FORWARD_RELU, "State(torch.relu(gx + flipped(gh)))"),
    ("rnn_relu", FORWARD_RELU, "State(torch.relu(halved(gx) + gh))"),
    ("lstm", "i, f, g, o = (gx", "f, i, g, o = (gx"),
    ("lstm", "i, f, g, o = (gx", "i, f, o, g = (gx"),
    ("lstm", CELL_STATE, CELL_STATE.replace(" + ", " - ")),
    ("lstm", CELL_STATE, CELL_STATE.replace("state.c", "halved(state.c)")),
    ("lstm", CELL_STATE, CELL_STATE.replace("(f)", "(flipped(f))")),
    ("lstm", CELL_STATE, CELL_STATE.replace("(i)", "(halved(i))")),
    ("lstm", LSTM_OUTPUT, "State(torch.sigmoid(o) * c, c)"),
    ("lstm", LSTM_OUTPUT, "State(torch.sigmoid(o) * torch.tanh(halved(c)), c)"),
    ("lstm", LSTM_OUTPUT, "State(torch.sigmoid(flipped(o)) * torch.tanh(c), c)"),
    ("lstm", LSTM_OUTPUT, "State(torch.sigmoid(o) * torch.tanh(c), halved(c))"),
    ("gru", "xr, xz, xn = gx", "xz, xr, xn = gx"),
    ("gru", "xr, xz, xn = gx", "xr, xn, xz = gx"),
    ("gru", GRU_CANDIDATE, "n = torch.tanh(r * (xn + hn))"),
    ("gru", GRU_CANDIDATE, "n = torch.tanh(xn - r * hn)"),
    ("gru", GRU_CANDIDATE, "n = torch.tanh(xn + halved(r) * hn)"),
    ("gru", GRU_CANDIDATE, "n = torch.tanh(xn + r * halved(hn))"),
    ("gru", GRU_OUTPUT, "State(state.h + z * (n - state.h))"),
    ("gru", GRU_OUTPUT, "State(n + z * (halved(state.h) - n))"),
    ("gru", GRU_OUTPUT, "State(n + flipped(z) * (state.h - n))"),
]
# case, text of the reference, text of the mutant
LAYER_MUTANTS = [
    ("bidirectional-lstm", "if d == 1 else range", "if False else range"),
    ("packed_bidirectional-gru", "if d == 1 else range", "if False else range"),
    ("h_tail-gru", "_project(h, w.w_hh, w.b_hh,", "_project(h, w.w_hh, 0.5 * w.b_hh,"),
    ("h_tail-lstm", "_project(h, w.w_hh, w.b_hh,", "_project(halved(h), w.w_hh, w.b_hh,"),
    ("packed-gru", "torch.cat([new_h, h[n:]])", "torch.cat([new_h, halved(h[n:])])"),
    ("packed-rnn_tanh", "torch.cat([new_h, h[n:]])", "torch.cat([new_h, 0 * h[n:]])"),
    ("packed-lstm", "torch.cat([new_c, c[n:]])", "torch.cat([new_c, 0 * c[n:]])"),
    ("proj-lstm", "linear(new.h, w.w_hr)", "linear(new.h, flipped(w.w_hr))"),
]


def flipped(t: torch.Tensor) -> torch.Tensor:
    """t, with its gradient's sign wrong."""
    return 2 * t.detach() - t


def halved(t: torch.Tensor) -> torch.Tensor:
    """t, with half its gradient."""
    return (t.detach() + t) / 2


def mutant(old: str, new: str) -> types.ModuleType:
    """A copy of the reference's module with `new` in place of `old`, which must be there once."""
    source = inspect.getsource(reference)
    assert source.count(old) == 1, (
        f"reference.py must have {old!r} once, has it {source.count(old)} times: update the mutants"
    )
    module = types.ModuleType("mutant")
    module.flipped, module.halved = flipped, halved
    exec(source.replace(old, new), module.__dict__)  # noqa: S102
    return module


def run(module: types.ModuleType, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The mutant in float64, rounded to the dtype at the end: its only fault is the mutation."""
    x, h0, c0, weights, batch_sizes = make_inputs(case, dtype)
    inputs = (
        x.double(),
        *(None if t is None else t.double() for t in (h0, c0)),
        [w.double() for w in weights],
        batch_sizes,
    )
    found = evaluate(module.layer, case, inputs, [d.double() for d in make_cotangents(case, dtype)])
    return {name: t.to(dtype) for name, t in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell, old, new", CELL_MUTANTS)
def test_cell_mutant_fails(cell, old, new, dtype):
    case = CASES[f"h_tail-{cell}"]
    wrong = faults(case, dtype, run(mutant(old, new), case, dtype))
    assert wrong
    if "halved" in new or "flipped" in new:
        assert not any(f": {output} " in line for line in wrong for output in ("y", "h_n", "c_n"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, old, new", LAYER_MUTANTS)
def test_layer_mutant_fails(name, old, new, dtype):
    assert faults(CASES[name], dtype, run(mutant(old, new), CASES[name], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["h_tail-lstm", "h_tail-gru", "packed-rnn_tanh", "bidirectional-rnn_relu", "proj-lstm"]
)
def test_unchanged_copy_passes(name, dtype):
    assert not faults(CASES[name], dtype, run(mutant("class Weights(", "class Weights("), CASES[name], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_element_fails(dtype):
    """A wrong element, an unexpected NaN or infinity, one that is missing, a wrong shape: each has its message."""
    want = torch.linspace(-1, 1, 101, dtype=torch.float64)
    good = want.to(dtype)
    off = good.clone()
    off[50] += 16 * torch.finfo(dtype).eps
    for value, message in ((float("nan"), "NaN"), (float("inf"), "infinities"), (float("-inf"), "infinities")):
        bad = good.clone()
        bad[3] = value
        assert message in fault(bad, want, 0.0)
        assert message in fault(good, bad.double(), 0.0)
        assert fault(bad, bad.double(), 0.0) is None
    assert fault(good, want, 0.0) is None
    assert "is off by" in fault(off, want, 0.0)
    assert "must be [101]" in fault(good[1:], want, 0.0)
