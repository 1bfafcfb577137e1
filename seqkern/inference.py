"""Inference on the CPU: a layer's call with gradients off, past the operator.

For a small layer, or one step of a stream, most of such a call is the way to its kernel: the operator's boxed arguments
and results, the driver of stacks, checks that ask one tensor after the other. `call` leaves all that to one C function
(csrc/inference.cpp). Whatever is not plain goes the usual way, which also words the errors.
"""

import torch
from torch import Tensor, nn

from . import _C, functional

_CELLS = {"RNN_TANH": 0, "RNN_RELU": 1, "LSTM": 2, "GRU": 3}  # as enum Cell
_STEPS = {name.lower(): number for name, number in _CELLS.items()}
_C.bind_inference(Tensor, nn.Parameter, torch.empty_like)


def _watched() -> bool:
    """Whether anything has to see operators: a mode, a transform, a compiler, a tracer, autocast, a profiler."""
    c = torch._C
    return bool(
        c._len_torch_function_stack()
        or c._len_torch_dispatch_stack()
        or functional.transformed()
        or c._autograd._profiler_enabled()
        or c._is_tracing()
        or c.is_autocast_enabled("cpu")
    )


def _plain() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or _watched())


def call(m: nn.RNNBase, x: Tensor, hx) -> tuple | None:
    """The layer's results on x, or None where gradients are on or anything is not plain."""
    if not _plain() or m._settings is not None:
        return None
    layers = m.num_layers
    if m.training and m.dropout and layers > 1:
        return None
    return _C.infer(
        x, hx, m._parameters, m._flat_weights_names, _CELLS[m.mode], m.input_size, m.hidden_size, m.proj_size, layers,
        m.bidirectional, m.bias, m.batch_first, False,
    )  # fmt: skip


_NAMES = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
_WEIGHTS = _NAMES[:2]


def step(m: nn.RNNCellBase, cell: str, x: Tensor, hx) -> Tensor | tuple | None:
    """Likewise for RNNCell, LSTMCell and GRUCell."""
    if not _plain():
        return None
    bias = m.bias
    return _C.infer(
        x, hx, m._parameters, _NAMES if bias else _WEIGHTS, _STEPS[cell], m.input_size, m.hidden_size, 0, 1, False, bias,
        False, True,
    )  # fmt: skip
