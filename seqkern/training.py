"""Autograd for plain eager calls: the operator's own takes 0.1 ms more Python time.

On the CPU these functions call the extension on Python's objects (csrc/training.cpp), past the dispatcher; where
tensors are not plain, or anything has to see operators, they call the operators.
"""

import torch
from torch import Tensor

from . import _C, ops
from .plain import CELLS, watched


def _below_autograd(create_graph: bool):
    """For a second derivative the operator's own formula is wanted, else only its kernel."""
    return torch.enable_grad() if create_graph else torch._C._AutoDispatchBelowAutograd()


class EagerLayer(torch.autograd.Function):
    """rnn_layer with gradients.

    apply(x, h0, c0, batch_sizes, cell, bidirectional, tf32, *weights) gives y, h_n, c_n.
    """

    @staticmethod
    def forward(ctx, x, h0, c0, batch_sizes, cell, bidirectional, tf32, *weights):
        done = None
        if batch_sizes is None and not watched():
            done = _C.forward(x, h0, c0, weights, CELLS[cell], bidirectional, False)
        if done is None:
            with torch._C._AutoDispatchBelowAutograd():
                done = ops.rnn_layer(x, h0, c0, weights, batch_sizes, cell, bidirectional, True, tf32)
        y, h_n, c_n, reserve = done
        ops.keep(ctx, (x, h0, c0), weights, batch_sizes, (cell, bidirectional, tf32), (y, reserve))
        if cell != "lstm":
            return y, h_n, None
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        needed, need_weights = ctx.needs_input_grad[:3], ctx.needs_input_grad[7:]
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (7 + ctx.count)
        saved = ctx.saved_tensors  # with autograd on: torch.utils.checkpoint runs forward again here
        create_graph, any_weight, done = torch.is_grad_enabled(), any(need_weights), None
        if not create_graph and ctx.watcher is None and saved[3] is None and not watched():
            x, h0, c0, _, y, reserve, *weights = saved
            done = _C.backward(
                dy, dh_n, dc_n, x, h0, c0, weights, y, reserve, CELLS[ctx.cell], ctx.bidirectional, False, *needed,
                any_weight,
            )  # fmt: skip
        if done is None:
            with _below_autograd(create_graph):
                states, dweights = ops.gradients(ctx, saved, (dy, dh_n, dc_n), needed, any_weight)
        else:
            *states, dweights = done
        return (*states, None, None, None, None, *_needed(dweights, need_weights))


class EagerCell(torch.autograd.Function):
    """One step of RNNCell and its like: apply(x, h, c, cell, tf32, *weights) gives h' or, of an LSTM, h' and c'.

    Shapes: x [B, I] or [I], h and c [B, H] or [H] or None for zeros.
    """

    @staticmethod
    def forward(ctx, x, h, c, cell, tf32, *weights):
        lstm, done = cell == "lstm", None
        if not watched():
            done = _C.forward(x, h, c, weights, CELLS[cell], False, True)
        if done is None:
            with torch._C._AutoDispatchBelowAutograd():
                _, h_n, c_n, reserve = ops.rnn_layer(*_as_sequence(x, h, c), weights, None, cell, False, True, tf32)
            h_n, c_n = ((t[0] if x.dim() == 2 else t[0, 0]) for t in (h_n, c_n if lstm else h_n))
            done = h_n, c_n if lstm else None, reserve
        h_n, c_n, reserve = done
        ctx.one_dim = x.dim() == 1
        ops.keep(ctx, (x, h, c), weights, None, (cell, False, tf32), (h_n, reserve))
        return (h_n, c_n) if lstm else h_n

    @staticmethod
    def backward(ctx, dh_n, dc_n=None):
        needed, need_weights = ctx.needs_input_grad[:3], ctx.needs_input_grad[5:]
        if dh_n is None and dc_n is None:
            return (None,) * (5 + ctx.count)
        saved = ctx.saved_tensors
        create_graph, any_weight, done = torch.is_grad_enabled(), any(need_weights), None
        if not create_graph and not watched():
            x, h, c, _, y, reserve, *weights = saved
            done = _C.backward(
                None, dh_n, dc_n, x, h, c, weights, y, reserve, CELLS[ctx.cell], False, True, *needed, any_weight
            )  # fmt: skip
        if done is None:
            with _below_autograd(create_graph):
                x, h, c, _, y, reserve, *weights = saved
                x, h, c, y, dh_n, dc_n = _as_sequence(x, h, c, y, dh_n, dc_n)
                states, dweights = ops.gradients(
                    ctx, (x, h, c, None, y, reserve, *weights), (None, dh_n, dc_n), needed, any_weight
                )
                states = [g if g is None else g[0, 0] if ctx.one_dim else g[0] for g in states]
        else:
            *states, dweights = done
        return (*states, None, None, *_needed(dweights, need_weights))


def _as_sequence(*tensors: Tensor | None) -> list[Tensor | None]:
    """[1, B, n] from [B, n], [1, 1, n] from [n]."""
    return [t if t is None else t[None] if t.dim() == 2 else t[None, None] for t in tensors]


def _needed(gradients, needed) -> list[Tensor | None]:
    if gradients is None:
        return [None] * len(needed)
    return [g if n else None for g, n in zip(gradients, needed, strict=True)]
