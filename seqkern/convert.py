"""Turning torch.nn's recurrent layers into seqkern's: `accelerate` for a model at hand, `patched` for code that builds
one."""

import functools
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from . import modules

__all__ = ["accelerate", "patched"]

_NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
_REPLACEMENTS = {getattr(nn, name): getattr(modules, name) for name in _NAMES}
# A subclass may override these and still have the forward that is replaced.
_HARMLESS = frozenset({"extra_repr", "reset_parameters"})
_Model = TypeVar("_Model", bound=nn.Module)


def _changes(cls: type, base: type) -> bool:
    """Whether `cls` or a class between it and `base` overrides a method of `base`'s that the forward may rely on."""
    relied_on = {name for name in dir(base) if not name.startswith("__")} - _HARMLESS
    relied_on |= {"__call__", "__getattr__", "__getstate__", "__setattr__", "__setstate__"}
    return any(relied_on & vars(c).keys() for c in cls.__mro__[: cls.__mro__.index(base)])


def _rebuild(cls: type) -> nn.Module:
    """What a pickled instance of a generated class starts as; `cls` is the user's class."""
    new = _accelerated(cls)
    return new.__new__(new)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """pickle cannot find a generated class by name: it is made again from the user's."""
    return _rebuild, (type(self).__bases__[0],), *object.__reduce_ex__(self, protocol)[2:]


@functools.cache
def _accelerated(cls: type) -> type | None:
    """The class to give to an instance of `cls`; None if it is to be left alone."""
    if cls in _REPLACEMENTS:
        return _REPLACEMENTS[cls]
    base = next((c for c in cls.__mro__ if c in _REPLACEMENTS), None)
    if base is None or issubclass(cls, _REPLACEMENTS[base]) or _changes(cls, base):
        return None
    # The user's class first: its methods win, and what it inherited from torch.nn's now comes from seqkern's.
    return type(cls.__name__, (cls, _REPLACEMENTS[base]), {"__module__": cls.__module__, "__reduce_ex__": _reduce})


def _accelerated_instance(module: nn.Module) -> type | None:
    cls = type(module)
    if not parametrize.is_parametrized(module):
        return _accelerated(cls)
    # torch made this class for the instance, as a subclass of the original with a property for each parametrized
    # weight. Removing the parametrizations gives the instance its only base again: make the same on another base.
    base = _accelerated(cls.__base__)
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return base and type(cls.__name__, (base,), own)


def accelerate(model: _Model) -> _Model:
    """Makes every torch.nn RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell in `model` a seqkern one, in place.

    A layer changes its class and nothing else: it stays the same object with the same Parameters, buffers, hooks,
    training flag and parametrizations, so that optimizers, shared layers and every other reference stay valid; that
    holds for `model` itself too. Layers that are seqkern's already are left as they are.

    Instances of subclasses of those classes are changed as well, to a class made from theirs and seqkern's, unless
    the subclass overrides forward or something that it relies on (any of the base's methods but `__init__`,
    `extra_repr` and `reset_parameters`), or the instance has a forward of its own. Those are left alone: the code
    that they bring would no longer run, or would run on something that it was not written for.

    Args:
        model: any module.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        cls = _accelerated_instance(module)
        if cls is not None and "forward" not in vars(module):
            module.__class__ = cls
            vars(module).pop("_flat_weights", None)  # seqkern's layers keep no list of weights
    return model


_PLACES = (nn, nn.modules, nn.modules.rnn)
_lock = threading.Lock()
_depth = 0
_originals: dict[tuple[ModuleType, str], type] = {}


@contextmanager
def patched() -> Iterator[None]:
    """Inside the block `torch.nn.LSTM`, `torch.nn.modules.LSTM` and `torch.nn.modules.rnn.LSTM`, and likewise RNN,
    GRU and the three cells, are seqkern's: for code that builds, or unpickles, a model by those names.

    Names that other modules have imported before (`from torch.nn import LSTM`) are not reached; use `accelerate` on
    what they build. The names are for the whole process, every thread; blocks may nest and overlap, and the last to
    end puts the original names back, also after an exception. Also a decorator.
    """
    global _depth
    with _lock:
        if _depth == 0:
            for place, name in itertools.product(_PLACES, _NAMES):
                _originals[place, name] = getattr(place, name)
                setattr(place, name, getattr(modules, name))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for (place, name), original in _originals.items():
                    setattr(place, name, original)
