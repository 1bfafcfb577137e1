"""Inference on the CPU: a layer's call with gradients off, past the operator.

For a small layer, or one step of a stream, most of such a call is the way to its kernel: the operator's boxed arguments
and results, the driver of stacks, checks that ask one tensor after the other. `call` leaves all that to one C function
(csrc/inference.cpp). Whatever is not plain goes the usual way, which also words the errors.
"""

import torch
from torch import Tensor, nn

from . import _C
from .plain import CELLS, watched

_MODES = {name.upper(): number for name, number in CELLS.items()}


def call(m: nn.RNNBase, x: Tensor, hx) -> tuple | None:
    """The layer's results on x, or None where gradients are on or anything is not plain."""
    if torch.is_grad_enabled() or m._settings is not None or watched():
        return None
    layers = m.num_layers
    if m.training and m.dropout and layers > 1:
        return None
    return _C.infer(
        x, hx, m._parameters, m._flat_weights_names, _MODES[m.mode], m.input_size, m.hidden_size, m.proj_size, layers,
        m.bidirectional, m.bias, m.batch_first, False,
    )  # fmt: skip


_NAMES = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
_WEIGHTS = _NAMES[:2]


def step(m: nn.RNNCellBase, cell: str, x: Tensor, hx) -> Tensor | tuple | None:
    """Likewise for RNNCell, LSTMCell and GRUCell."""
    if torch.is_grad_enabled() or watched():
        return None
    bias = m.bias
    return _C.infer(
        x, hx, m._parameters, _NAMES if bias else _WEIGHTS, CELLS[cell], m.input_size, m.hidden_size, 0, 1, False,
        bias, False, True,
    )  # fmt: skip
