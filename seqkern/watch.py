"""Who wants to know the norms of the gradients that backward meets; `seqkern.diagnostics` is for people."""

from collections.abc import Callable

import torch
from torch import Tensor

# Called as sink(layer, squares [2, D, N], sizes): squares of dL/dh and dL/dc summed over units, rows of each step.
Sink = Callable[[int, Tensor, list[int]], None]

_open = False
_sink: Sink | None = None
_layer = 0
_pending: list[Callable[[], None]] = []  # what the reference's hooks have to deliver when the block ends


def open_block() -> None:
    global _open
    if _open:
        raise RuntimeError("gradient_flow: another one is open")
    _open = True


def close_block() -> None:
    global _open
    _open = False
    end()
    for take in _pending:
        take()
    _pending.clear()


def begin(sink: Sink) -> None:
    """The layers that run from now on belong to `sink`."""
    global _sink, _layer
    _sink, _layer = sink, 0


def end() -> None:
    global _sink
    _sink = None


def listening() -> bool:
    return _sink is not None


def claim() -> Callable[[Tensor, list[int]], None] | None:
    """What takes the squares of the layer that runs now, if anybody does."""
    global _layer
    if _sink is None:
        return None
    sink, layer = _sink, _layer
    _layer += 1
    return lambda squares, sizes: sink(layer, squares, sizes)


def deliver(take: Callable, flow: Tensor, x: Tensor, batch_sizes: Tensor | None) -> None:
    """A fused backward's squares [2, D, N, K]."""
    take(flow.detach().sum(-1), [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist())


class Hooks:
    """Squares of the gradients of a reference layer's states, from hooks on them."""

    def __init__(self, take: Callable, directions: int, sizes: list[int], like: Tensor):
        self.squares = torch.zeros(2, directions, sum(sizes), device=like.device, dtype=torch.float32)
        _pending.append(lambda: take(self.squares, sizes))

    def on(self, which: int, d: int, rows: slice, state: Tensor) -> None:
        def hook(grad: Tensor) -> None:
            self.squares[which, d, rows] = grad.detach().float().square().sum(-1)

        if state.requires_grad:
            state.register_hook(hook)
