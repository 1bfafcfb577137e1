"""How far gradients reach back in time: the norms of dL/dh_t and dL/dc_t, as backward meets them.

with seqkern.diagnostics.gradient_flow(model) as flow:
    loss(model(x)).backward()
print(flow.report())
flow.plot("flow.png")
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import watch
from .modules import GRU, LSTM, RNN

__all__ = ["Flow", "Record", "gradient_flow"]

FAR = 1e-3  # a gradient is said to vanish below this share of its largest norm, to explode above its inverse


@dataclass
class Record:
    """One direction of one layer in one call."""

    name: str  # the module's in its model; "" for the model itself
    call: int  # of the module, counted from 0
    layer: int
    direction: int  # 0, or 1 for the reverse one
    h: Tensor  # [T] norm over batch and units of dL/dh_t, with all that follows h_t: later steps and layers
    c: Tensor | None  # [T] of dL/dc_t, for the LSTM
    radius: float | None  # spectral radius of weight_hh where that is what carries h from step to step: the RNN

    @property
    def title(self) -> str:
        more = ", reverse" * self.direction + f", call {self.call}" * (self.call > 0)
        return f"{self.name or 'layer'}, layer {self.layer}{more}"

    @property
    def carried(self) -> str:
        """What takes the layer's memory from step to step: "c" for the LSTM, whose dL/dh may vanish all the same."""
        return "h" if self.c is None else "c"

    def backward(self, which: str | None = None) -> Tensor:
        """The norms, of `carried` unless told "h" or "c", in backward's order: first the direction's last step."""
        norms = self.h if (which or self.carried) == "h" else self.c
        return norms if self.direction else norms.flip(0)

    @property
    def rate(self) -> float:
        """The factor by which the gradient of `carried` changes a step back in time, from the least squares line of its
        logarithm over the steps where it is positive; NaN where there are fewer than two."""
        norms = self.backward()
        there = norms > 0
        if there.sum() < 2:
            return math.nan
        k, logs = torch.arange(len(norms), dtype=torch.float64)[there], norms.double()[there].log()
        k = k - k.mean()
        return math.exp(float((k * logs).sum() / (k * k).sum()))

    def verdict(self) -> str:
        """One sentence: whether the gradient of `carried` vanishes or explodes, and from which step on."""
        norms = self.backward().double()
        steps = len(norms)
        if not norms.isfinite().all():
            first = int((~norms.isfinite()).nonzero()[0])
            return f"the gradient is not finite from step {self._time(first)} back"
        if norms.max() == 0:
            return "no gradient arrives"
        last = norms[int(norms.nonzero()[0])]  # the step nearest to the loss that has a gradient
        high = (norms > last / FAR).nonzero()
        if len(high):
            t = self._time(int(high[0]))
            return f"the gradient explodes: {1 / FAR:g} times as large at step {t} as near the loss"
        low = norms < FAR * norms.max()
        tail = steps - int(low.flip(0).logical_not().nonzero()[0]) if low[-1] else steps
        if tail < steps:
            return (
                f"the gradient vanishes: from step {self._time(tail)} back it stays below {FAR:g} of its largest "
                f"norm; at the far end {norms[-1] / norms.max():.1e} of it is left"
            )
        return f"the gradient reaches the far end: {norms[-1] / norms.max():.2g} of its largest norm is left there"

    def _time(self, k: int) -> int:
        return k if self.direction else len(self.h) - 1 - k


@dataclass
class Flow:
    """What `gradient_flow` yields; filled by backward."""

    _found: list[Record] = field(default_factory=list)
    _waiting: list[Callable[[], list[Record]]] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        """Ordered by module, call, layer and direction. Backward waits for nothing: who asks for them waits for it."""
        while self._waiting:
            self._found += self._waiting.pop()()
        self._found.sort(key=lambda r: (r.name, r.call, r.layer, r.direction))
        return self._found

    def report(self) -> str:
        """A line for each record: the rate per step, and in words how far the gradient reaches."""
        if not self.records:
            return "no recurrent layer of the model has been through backward"
        lines = []
        for r in self.records:
            radius = "" if r.radius is None else f", spectral radius {r.radius:.3g}"
            lines.append(f"{r.title}: {r.verdict()} (dL/d{r.carried}: x{r.rate:.3g} a step{radius})")
        return "\n".join(lines)

    def plot(self, path: str | None = None, axis=None):
        """Draws every record's norms over t, on a log axis, and returns the matplotlib axis.

        Dashed: dL/dc. Dotted, for an RNN: the spectral radius of weight_hh to the power of the steps from the loss, the
        rate at which a gradient decays or grows where no unit is saturated; saturated units only make it smaller.
        With `path` the figure is saved there.
        """
        if axis is None:
            from matplotlib.figure import Figure

            axis = Figure(figsize=(7, 4.2), layout="constrained").subplots()
        for i, r in enumerate(self.records):
            color = f"C{i % 10}"
            t = range(len(r.h))
            axis.plot(t, r.h.clamp_min(1e-45), color=color, label=r.title)
            if r.c is not None:
                axis.plot(t, r.c.clamp_min(1e-45), color=color, linestyle="--")
            if r.radius is not None and r.h.max() > 0:
                k = torch.arange(len(r.h), dtype=torch.float64)
                line = float(r.backward()[r.backward() > 0][0]) * r.radius**k
                line = (line if r.direction else line.flip(0)).clamp(1e-45, 1e38)
                axis.plot(t, line, color=color, linestyle=":", linewidth=1)
        axis.set_yscale("log")
        axis.set_xlabel("step t")
        axis.set_ylabel("norm of dL/dh_t (dashed: dL/dc_t)")
        axis.legend(fontsize=8)
        if path is not None:
            axis.figure.savefig(path, dpi=120)
        return axis


def _norms(squares: Tensor, sizes: Sequence[int]) -> Tensor:
    """[2, D, T] of squares [2, D, N]."""
    squares = squares.double().cpu()
    if len(set(sizes)) == 1:
        return squares.unflatten(-1, (len(sizes), -1)).sum(-1).sqrt()
    return torch.stack([s.sum(-1).sqrt() for s in squares.split(list(sizes), -1)], -1)


def _radius(weight: Tensor) -> float:
    return float(torch.linalg.eigvals(weight.double().cpu()).abs().max())


def _record(flow: Flow, name: str, module: nn.Module, call: int, layer: int, squares: Tensor, sizes: Sequence[int]):
    """squares [2, D, N]: of dL/dh and dL/dc, summed over the units of each row."""
    names = [f"weight_hh_l{layer}" + "_reverse" * d for d in range(squares.size(1))]
    weights = [getattr(module, n).detach().clone() for n in names] if isinstance(module, RNN) else [None] * len(names)

    def found() -> list[Record]:
        norms = _norms(squares, sizes)
        return [
            Record(name, call, layer, d, norms[0, d], norms[1, d] if isinstance(module, LSTM) else None,
                   None if w is None else _radius(w))
            for d, w in enumerate(weights)
        ]  # fmt: skip

    flow._waiting.append(found)


@contextmanager
def gradient_flow(model: nn.Module) -> Iterator[Flow]:
    """Records the norms of dL/dh_t and, for the LSTM, dL/dc_t for every seqkern RNN, LSTM and GRU in `model`.

    Forward and backward must both run inside the block. On the fused kernels backward writes the norms on its way, at
    a few percent of its time; elsewhere hooks on the reference's states take them.

    With a packed sequence or `lengths`, steps are those of the longest sequence, and the norms those of the rows that
    each step has.

    Yields:
        A `Flow`, filled as backward runs.

    Raises:
        ValueError: model has no such layer, or one with `recompute`, whose backward runs in pieces.
        RuntimeError: another gradient_flow is open.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (RNN, LSTM, GRU))}
    if not layers:
        raise ValueError(
            f"gradient_flow: {type(model).__name__} has no seqkern RNN, LSTM or GRU; seqkern.accelerate makes them"
        )
    for name, m in layers.items():
        if m._settings is not None and m._settings.recompute:
            raise ValueError(f"gradient_flow: {name or 'the layer'} recomputes, and its backward runs in pieces")
    flow, calls, hooks = Flow(), dict.fromkeys(layers, 0), []

    def before(name: str, module: nn.Module):
        def hook(*_):
            call, calls[name] = calls[name], calls[name] + 1
            watch.begin(lambda layer, *found: _record(flow, name, module, call, layer, *found))

        return hook

    watch.open_block()
    try:
        for name, module in layers.items():
            hooks.append(module.register_forward_pre_hook(before(name, module)))
            hooks.append(module.register_forward_hook(lambda *_: watch.end(), always_call=True))
        yield flow
    finally:
        for hook in hooks:
            hook.remove()
        watch.close_block()
