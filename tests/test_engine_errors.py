"""What the operator refuses, and that it says what was wanted and what came."""

import pytest
import torch
from cases import Case, make_inputs

from seqkern import ops

F64, I64 = torch.float64, torch.int64


def call(cell="lstm", bidirectional=False, options=None, **replaced):
    """The operator on T=4, B=3, I=6, H=5 with some arguments replaced; weights by torch.nn's names."""
    case = Case("errors", cell, **{"T": 4, "B": 3, "I": 6, "H": 5, "bidirectional": bidirectional} | (options or {}))
    x, h0, c0, weights, batch_sizes = make_inputs(case, torch.float32)
    named = dict(zip(case.weight_shapes, weights, strict=True))
    named |= {k: replaced.pop(k) for k in list(replaced) if k in named}
    kind = replaced.pop("kind", cell)
    arguments = {"x": x, "h0": h0, "c0": c0, "weights": list(named.values()), "batch_sizes": batch_sizes} | replaced
    return ops.rnn_layer(*arguments.values(), kind, bidirectional, False)


def zeros(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


PACKED = {"lengths": (4, 2)}
REFUSED = {
    "weight_hh shape": ({"weight_hh": zeros(20, 4)}, r"lstm: weight_hh must be \[4\*H, H\] = \[20, 5\], got \[20, 4\]"),
    "weight_ih shape": ({"weight_ih": zeros(20, 7)}, r"lstm: weight_ih must be \[4\*H, I\] = \[20, 6\], got \[20, 7\]"),
    "bias_ih shape": ({"bias_ih": zeros(19)}, r"lstm: bias_ih must be \[4\*H\] = \[20\], got \[19\]"),
    "bias_hh dims": ({"bias_hh": zeros(20, 1)}, r"lstm: bias_hh must be \[4\*H\] = \[20\], got \[20, 1\]"),
    "reverse": (
        {"cell": "gru", "bidirectional": True, "weight_hh_reverse": zeros(15, 4)},
        r"gru: weight_hh(_reverse)? must be \[3\*H, H\] = \[15, 5\], got \[15, 4\]",
    ),
    "weight_hr shape": (
        {"options": {"proj": 2}, "weight_hr": zeros(2, 4)},
        r"lstm: weight_hr must be \[P, H\] = \[2, 5\], got \[2, 4\]",
    ),
    "gates": ({"cell": "gru", "weight_ih": zeros(16, 6)}, r"gru: weight_ih must be \[3\*H, I\].*got \[16, 6\]"),
    "h0 shape": ({"h0": zeros(1, 2, 5)}, r"lstm: h0 must be \[D, B, [HP]\] = \[1, 3, 5\], got \[1, 2, 5\]"),
    "h0 directions": ({"h0": zeros(2, 3, 5)}, r"lstm: h0 must be \[D, B, [HP]\] = \[1, 3, 5\], got \[2, 3, 5\]"),
    "c0 shape": ({"c0": zeros(1, 3, 4)}, r"lstm: c0 must be \[D, B, H\] = \[1, 3, 5\], got \[1, 3, 4\]"),
    "c0 of a gru": ({"cell": "gru", "c0": zeros(1, 3, 5)}, r"gru: only the LSTM has a cell state, got c0 \[1, 3, 5\]"),
    "x dims": ({"x": zeros(4, 6)}, r"lstm: x must be \[T, B, I\].*got \[4, 6\]"),
    "packed x dims": ({"options": PACKED, "x": zeros(6, 1, 6)}, r"lstm: x must be \[N, I\].*got \[6, 1, 6\]"),
    "no steps": ({"x": zeros(0, 3, 6)}, r"lstm: .*sequence length .*got 0"),
    "x dtype": ({"x": zeros(4, 3, 6, dtype=I64)}, r"lstm: x must be float64, float32, bfloat16 or float16, got "),
    "weight dtype": ({"weight_ih": zeros(20, 6, dtype=F64)}, r"lstm: weight_ih must be .*got .*([Dd]ouble|float64)"),
    "h0 dtype": ({"h0": zeros(1, 3, 5, dtype=F64)}, r"lstm: h0 must be .*got .*([Dd]ouble|float64)"),
    "cell": ({"kind": "elman"}, r"cell must be .*rnn_tanh.*rnn_relu.*lstm.*gru.*got.*elman"),
    "too few weights": ({"weights": [zeros(20, 6)]}, r"lstm: weights must .*got 1"),
    "odd weights": ({"bidirectional": True, "weights": [zeros(20, 6)] * 5}, r"lstm: weights must .*got 5"),
    "projected gru": (
        {"cell": "gru", "weights": [zeros(15, 6)] * 3},
        r"gru: only the LSTM has a projection, got 3 weights",
    ),
    "growing": ({"options": PACKED, "batch_sizes": torch.tensor([2, 3, 1])}, r"lstm: batch_sizes must"),
    "ending in zero": ({"options": PACKED, "batch_sizes": torch.tensor([2, 2, 2, 0])}, r"lstm: batch_sizes must"),
    "negative": ({"options": PACKED, "batch_sizes": torch.tensor([8, -1, -1])}, r"lstm: batch_sizes must"),
    "sum": (
        {"options": PACKED, "batch_sizes": torch.tensor([2, 2, 1])},
        r"lstm: x must have as many rows as batch_sizes sum to, 5, got 6",
    ),
    "empty": ({"options": PACKED, "batch_sizes": torch.zeros(0, dtype=I64)}, r"lstm: .*got 0"),
    "sizes dtype": (
        {"options": PACKED, "batch_sizes": torch.tensor([2, 2, 1, 1]).int()},
        r"lstm: batch_sizes must .*int64",
    ),
    "sizes dims": (
        {"options": PACKED, "batch_sizes": torch.tensor([[2, 2, 1, 1]])},
        r"lstm: batch_sizes must be \[T\]",
    ),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_refused(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        call(**arguments)


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_unchanged_arguments_are_accepted(cell):
    """Nothing above fails for a reason other than the argument that it replaces."""
    assert call(cell)[0].shape == (4, 3, 5)
    assert call(cell, bidirectional=True)[0].shape == (4, 3, 10)
    assert call(cell, options=PACKED)[0].shape == (6, 5)
    assert call("lstm", options={"proj": 2})[0].shape == (4, 3, 2)


def test_backward_refuses_a_gradient_of_the_wrong_shape():
    case = Case("errors", "gru", T=4, B=3, I=6, H=5)
    inputs = make_inputs(case, torch.float32)
    y, _, _, reserve = ops.rnn_layer(*inputs, "gru", False, True)
    with pytest.raises(RuntimeError, match=r"gru: dy must be .*\[4, 3, 5\], got \[4, 3, 6\]"):
        torch.ops.seqkern.rnn_layer_backward(zeros(4, 3, 6), None, None, *inputs, y, reserve, "gru", False, True, True)
