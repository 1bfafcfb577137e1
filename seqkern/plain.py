"""Which eager calls may go past PyTorch's dispatcher, straight to the extension's functions of Python objects."""

import contextlib

import torch
from torch.autograd import forward_ad

from . import _C

with contextlib.suppress(AttributeError, ImportError):  # a torch that cannot be read so: all calls take the operators
    _C.bind_tensors(torch.Tensor, torch.nn.Parameter, torch.empty_like)
CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3}  # as enum Cell


def transformed() -> bool:
    """Whether vmap, jvp and the like are active, which differentiate or batch operation by operation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched() -> bool:
    """Whether anything has to see operators: a mode, a transform, a compiler, a tracer, autocast, a profiler."""
    if torch.compiler.is_compiling():  # first: a compiler cannot trace the others
        return True
    c = torch._C
    return bool(
        c._len_torch_function_stack()
        or c._len_torch_dispatch_stack()
        or transformed()
        or c._autograd._profiler_enabled()
        or c._is_tracing()
        or c.is_autocast_enabled("cpu")
    )
