"""float64 computed in long double: a tensor type whose every operation, autograd's too, runs on numpy's longdouble.

A truth for float64 that is itself computed in float64 is off by about as much as what it judges; x86's long double has
11 bits more. An operation that is not listed raises NotImplementedError with its name.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Exact(Tensor):
    """Shows itself to autograd as float64; holds `array`, in long double."""

    @staticmethod
    def __new__(cls, array):
        return Tensor._make_wrapper_subclass(cls, array.shape, dtype=torch.float64)

    def __init__(self, array):
        self.array = array

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in _OPERATIONS:
            raise NotImplementedError(f"tests/exact.py has no {func}")
        args, kwargs = pytree.tree_map(_array, (args, kwargs or {}))
        for ignored in ("dtype", "layout", "device", "pin_memory", "memory_format"):
            kwargs.pop(ignored, None)
        return pytree.tree_map(_tensor, _OPERATIONS[name](*args, **kwargs))


def exact(t: Tensor) -> Exact:
    """`t` in long double, a leaf that wants a gradient if t does."""
    return Exact(t.detach().numpy().astype(np.longdouble)).requires_grad_(t.requires_grad)


def rounded(t: Tensor) -> Tensor:
    """A result as a plain float64 tensor."""
    return torch.from_numpy(t.array.astype(np.float64)) if isinstance(t, Exact) else t


def _array(v):
    return v.array if isinstance(v, Exact) else v.numpy() if isinstance(v, Tensor) else v


def _tensor(v):
    if not isinstance(v, (np.ndarray, np.generic)):
        return v
    return Exact(np.asarray(v)) if v.dtype == np.longdouble else torch.from_numpy(np.asarray(v))


def _axes(dim):
    return (
        tuple(dim) if isinstance(dim, (list, tuple)) and len(dim) else None if isinstance(dim, (list, tuple)) else dim
    )


def _sum(x, dim=None, keepdim=False):
    return np.asarray(x.sum(axis=_axes(dim), keepdims=keepdim))


def _mean(x, dim=None, keepdim=False):
    return np.asarray(x.mean(axis=_axes(dim), keepdims=keepdim))


def _slice(x, dim=0, start=None, end=None, step=1):
    return x[(slice(None),) * (dim % x.ndim) + (slice(start, end, step),)]


def _slice_backward(grad, sizes, dim, start, end, step):
    whole = np.zeros(sizes, np.longdouble)
    _slice(whole, dim, start, end, step)[...] = grad
    return whole


def _select_backward(grad, sizes, dim, index):
    whole = np.zeros(sizes, np.longdouble)
    np.moveaxis(whole, dim, 0)[index] = grad
    return whole


def _split(x, sizes, dim=0):
    """sizes: of each part, or of all but the last."""
    cuts = range(sizes, x.shape[dim], sizes) if isinstance(sizes, int) else np.cumsum(sizes)[:-1]
    return np.split(x, list(cuts), dim)


def _norm(x, ord=2, dim=None, keepdim=False):
    assert ord == 2
    return np.sqrt(_sum(x * x, dim, keepdim))


def _clamp(x, low=None, high=None):
    return np.clip(x, low, high)


def _where(condition, a, b):
    return np.where(condition, np.longdouble(a) if np.isscalar(a) else a, np.longdouble(b) if np.isscalar(b) else b)


def _zeros(x, size=None):
    return np.zeros(x.shape if size is None else size, np.longdouble)


_OPERATIONS = {
    "add": lambda a, b, alpha=1: a + b * alpha,
    "sub": lambda a, b, alpha=1: a - b * alpha,
    "rsub": lambda a, b, alpha=1: b - a * alpha,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": np.negative,
    "mm": lambda a, b: a @ b,
    "addmm": lambda c, a, b: c + a @ b,
    "sqrt": np.sqrt,
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "pow": lambda x, n: x**n,
    "tanh": np.tanh,
    "tanh_backward": lambda d, y: d * (1 - y * y),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sigmoid_backward": lambda d, y: d * y * (1 - y),
    "relu": lambda x: np.maximum(x, 0),
    "threshold_backward": lambda d, y, t: np.where(y > t, d, np.longdouble(0)),
    "clamp": _clamp,
    "linalg_vector_norm": _norm,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "logical_and": np.logical_and,
    "where": _where,
    "masked_fill": lambda x, mask, v: np.where(mask, np.longdouble(v), x),
    "sum": _sum,
    "mean": _mean,
    "t": np.transpose,
    "transpose": np.swapaxes,
    "view": lambda x, size: x.reshape(size),
    "_unsafe_view": lambda x, size: x.reshape(size),
    "expand": lambda x, size: np.broadcast_to(x, [n if n >= 0 else x.shape[i] for i, n in enumerate(size)]),
    "unsqueeze": np.expand_dims,
    "squeeze": lambda x, dim: np.squeeze(x, dim),
    "select": lambda x, dim, index: np.take(x, index, dim),
    "select_backward": _select_backward,
    "slice": _slice,
    "slice_backward": _slice_backward,
    "split": _split,
    "split_with_sizes": _split,
    "unbind": lambda x, dim=0: list(np.moveaxis(x, dim, 0)),
    "cat": lambda parts, dim=0: np.concatenate(parts, dim),
    "stack": lambda parts, dim=0: np.stack(parts, dim),
    "detach": lambda x: x,
    "alias": lambda x: x,
    "clone": lambda x: x.copy(),
    "zeros_like": _zeros,
    "new_zeros": _zeros,
    "new_empty": _zeros,
    "ones_like": lambda x: np.ones(x.shape, np.longdouble),
}
