"""Inference on the CPU: a layer's call with gradients off, past the operator.

For a small layer, or one step of a stream, most of such a call is the way to its kernel: the operator's boxed arguments
and results, the driver of stacks, checks that ask one tensor after the other. `call` does the same in few checks and
hands addresses to the kernel. Whatever is not plain goes the usual way, which also words the errors.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import _C, functional

_CELLS = {"RNN_TANH": 0, "RNN_RELU": 1, "LSTM": 2, "GRU": 3}  # as enum Cell
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # as enum Dtype
_GATES = (1, 1, 4, 3)


@lru_cache(maxsize=256)
def _shapes(cell: int, inputs: int, hidden: int, proj: int, layers: int, directions: int, bias: bool) -> list[tuple]:
    """The weights' shapes, in the order of `_flat_weights_names`."""
    rows, output, found = _GATES[cell] * hidden, proj or hidden, []
    for layer in range(layers):
        one = [(rows, directions * output if layer else inputs), (rows, output)]
        one += [(rows,), (rows,)] if bias else []
        found += (one + ([(proj, hidden)] if proj else [])) * directions
    return found


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


_KINDS = {Tensor, Parameter}
_STRIDED = torch.strided
_empty_like = torch.empty_like


def _plain(t: object, shape: tuple, dtype: torch.dtype) -> bool:
    return (
        type(t) in _KINDS
        and t.layout is _STRIDED
        and t.dtype is dtype
        and t.shape == shape
        and t.is_cpu
        and t.is_contiguous()
    )


def call(m: nn.RNNBase, x: Tensor, hx) -> tuple | None:
    """The layer's results on x, or None where gradients are on or anything is not plain."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or m._settings is not None:
        return None
    if type(x) is not Tensor or not x.is_cpu or x.layout is not _STRIDED or _watched():
        return None
    shape, dtype = x.shape, x.dtype
    dim = len(shape)
    if dim == 3:
        batch_first = m.batch_first
        steps, batch = (shape[1], shape[0]) if batch_first else (shape[0], shape[1])
    elif dim == 2:
        steps, batch, batch_first = shape[0], 1, False
    else:
        return None
    number = _DTYPES.get(dtype)
    inputs, hidden, proj, layers = m.input_size, m.hidden_size, m.proj_size, m.num_layers
    if number is None or steps == 0 or batch == 0 or shape[-1] != inputs or not x.is_contiguous():
        return None
    if m.training and m.dropout and layers > 1:
        return None
    cell, directions, output = _CELLS[m.mode], 2 if m.bidirectional else 1, proj or hidden
    lstm = cell == 2
    middle = (batch,) if dim == 3 else ()
    state, cell_state = (layers * directions, *middle, output), (layers * directions, *middle, hidden)
    h = c = None
    if hx is not None:
        if lstm:
            if type(hx) is not tuple or len(hx) != 2:
                return None
            h, c = hx
            if not _plain(c, cell_state, dtype):
                return None
        else:
            h = hx
        if not _plain(h, state, dtype):
            return None
    parameters, addresses = m._parameters, []
    names, shapes = m._flat_weights_names, _shapes(cell, inputs, hidden, proj, layers, directions, m.bias)
    if len(names) != len(shapes):
        return None
    for name, wanted in zip(names, shapes, strict=True):
        w = parameters.get(name)
        if not (  # _plain, whose call takes a third of its time
            type(w) in _KINDS
            and w.layout is _STRIDED
            and w.dtype is dtype
            and w.shape == wanted
            and w.is_cpu
            and w.is_contiguous()
        ):
            return None
        addresses.append(w.data_ptr())

    # empty_like takes half the time of new_empty.
    h_n = x.new_empty(state) if h is None else _empty_like(h)
    c_n = None if not lstm else x.new_empty(cell_state) if c is None else _empty_like(c)
    size, rows = x.element_size(), directions * batch
    at, per = x.data_ptr(), len(addresses) // layers
    h_at, c_at = 0 if h is None else h.data_ptr(), 0 if c is None else c.data_ptr()
    h_n_at, c_n_at = h_n.data_ptr(), c_n.data_ptr() if lstm else 0
    width = directions * output
    turned = batch_first and steps > 1 and batch > 1  # y is made time-major, as everywhere
    for layer in range(layers):
        if turned:
            y = x.new_empty((steps, batch, width))
        else:
            y = _empty_like(x) if width == inputs else x.new_empty((*shape[:-1], width))
        _C.infer(
            cell, number, steps, batch, width if layer else inputs, hidden, output, directions, turned and not layer,
            at, h_at and h_at + layer * rows * output * size, c_at and c_at + layer * rows * hidden * size,
            y.data_ptr(), h_n_at + layer * rows * output * size, c_n_at and c_n_at + layer * rows * hidden * size,
            *addresses[layer * per : (layer + 1) * per],
        )  # fmt: skip
        at, kept = y.data_ptr(), y  # `kept`: until the next layer has read it
    return kept.transpose(0, 1) if turned else kept, (h_n, c_n) if lstm else h_n
