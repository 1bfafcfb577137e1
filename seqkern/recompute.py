"""A layer in pieces of time, of which only the states between them are kept for backward."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import functional, option_ops
from .reference import Options


class _Pieces:
    """Which steps and rows each piece has. x is [T, B, I], or with sizes (the rows of each step) [N, I]."""

    def __init__(self, x: Tensor, sizes: list[int] | None, o: Options, k: int):
        self.sizes, self.o = sizes, o
        self.steps, self.batch = (x.size(0), x.size(1)) if sizes is None else (len(sizes), sizes[0])
        self.firsts = range(0, self.steps, k)
        self.lasts = [min(first + k, self.steps) for first in self.firsts]
        bounds = zip(self.firsts, self.lasts, strict=True)
        # In one split: the gradient of a slice is as large as x itself.
        self.splits = k if sizes is None else [sum(sizes[first:last]) for first, last in bounds]

    def rows(self, i: int) -> int:
        """Of the batch that are left when piece i begins."""
        return self.batch if self.sizes is None else self.sizes[self.firsts[i]]

    def state_before(self, i: int, states: Tensor) -> Tensor:
        """[1, B, *] of all steps' states, those that the first step of piece i > 0 reads."""
        last, n = self.firsts[i] - 1, self.rows(i)
        if self.sizes is None:
            return states[last].clone().unsqueeze(0)
        first = sum(self.sizes[:last])
        return states[first : first + n].clone().unsqueeze(0)

    def arguments(self, i: int) -> tuple[Tensor | None, Options]:
        """batch_sizes and options of piece i."""
        first, last, o = self.firsts[i], self.lasts[i], self.o
        if self.sizes is None:
            rows, batch_sizes = slice(first * self.batch, last * self.batch), None
        else:
            rows = slice(sum(self.sizes[:first]), sum(self.sizes[:last]))
            batch_sizes = torch.tensor(self.sizes[first:last])
        masks = {n: getattr(o, n) for n in ("keep", "zone_h", "zone_c")}
        masks = {n: m if m is None or (n != "keep" and m.size(0) == 1) else m[rows] for n, m in masks.items()}
        if o.h_mask is not None:
            masks["h_mask"] = o.h_mask[:, : self.rows(i)]
        if o.lengths is not None:
            masks["lengths"] = (o.lengths - first).clamp(0, last - first)
        return batch_sizes, replace(o, **masks)


def _first(state: Tensor | None, n: int) -> Tensor | None:
    return None if state is None else state[:, :n]


def _joined(new: Tensor, old: Tensor | None) -> Tensor:
    """The rows that went on, with their new states, and those that had ended."""
    return new if old is None or new.size(1) == old.size(1) else torch.cat([new, old[:, new.size(1) :]], 1)


def in_pieces(
    layer: Callable, stack, sequence: Sequence[Tensor | None], weights: Sequence[Tensor], batch_sizes: Tensor | None,
    o: Options, all_states: bool,
) -> Sequence[Tensor]:  # fmt: skip
    """layer(stack, sequence, weights, batch_sizes, o, all_states), in pieces of stack.settings.recompute steps.

    Two directions meet a piece at different times: a bidirectional layer is one piece, none of whose gates are kept.
    """
    x, h, c = sequence
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    k = len(sizes or x) if stack.bidirectional else stack.settings.recompute
    pieces = _Pieces(x, sizes, o, k)
    if not stack.bidirectional and option_ops.covers(stack.cell, sequence, weights, o) and not functional.transformed():
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, h, c, *weights = (functional.cast(t, dtype) for t in (x, h, c, *weights))
            pieces.o = functional.cast_options(o, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _Fused.apply((stack.cell, pieces, all_states), x, h, c, *weights)
    found = []
    for i, part in enumerate(x.split(pieces.splits)):
        n = pieces.rows(i)
        y, h_n, c_n, *c_all = checkpoint(
            layer, stack, (part, _first(h, n), _first(c, n)), weights, *pieces.arguments(i), all_states,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        found.append((y, *c_all))
        h, c = _joined(h_n, h), _joined(c_n, c) if stack.cell == "lstm" else c_n
    y, *c_all = (torch.cat(parts) for parts in zip(*found, strict=True))
    return y, h, c, *c_all


class _Whole:
    """A tensor of all steps, filled piece by piece: a piece's own memory is the next one's, and still in the cache.

    like: has its last dimension and dtype; where it is a placeholder [0], so is this.
    """

    def __init__(self, x: Tensor, splits: int | list[int], like: Tensor):
        there = like.dim() > 1
        self.t = like.new_empty(*x.shape[:-1], like.size(-1)) if there else like.new_empty(0)
        self.pieces = self.t.split(splits) if there else None

    def put(self, i: int, piece: Tensor) -> None:
        if self.pieces is not None:
            self.pieces[i].copy_(piece)


class _Fused(torch.autograd.Function):
    """The pieces on the fused operators, without autograd's bookkeeping for each."""

    @staticmethod
    def forward(ctx, how, x, h, c, *weights):
        cell, pieces, want_c = how
        lstm, starts, none = cell == "lstm", [h, c], x.new_empty(0)
        sizes = None if pieces.sizes is None else torch.tensor(pieces.sizes)
        y, h, c, c_all = option_ops.layer(cell, (x, h, c), weights, sizes, False, pieces.o, lstm)
        for i in range(1, len(pieces.lasts)):  # after them all of c goes, unless it is asked for
            starts += [pieces.state_before(i, y), pieces.state_before(i, c_all) if lstm else None]
        c_all = c_all if want_c else none.clone()
        ctx.how, ctx.count = how, len(weights)
        ctx.save_for_backward(x, *weights, *starts)
        ctx.set_materialize_grads(False)
        if not lstm:
            ctx.mark_non_differentiable(none)
        if not (lstm and want_c):
            ctx.mark_non_differentiable(c_all)
        return y, h, c if lstm else none, c_all

    @staticmethod
    def backward(ctx, dy, dh, dc, dc_all):
        (x, *weights), starts = ctx.saved_tensors[: 1 + ctx.count], ctx.saved_tensors[1 + ctx.count :]
        cell, pieces, want_c = ctx.how
        if torch.is_grad_enabled():
            grads = _Fused.differentiable(ctx, (dy, dh, dc, dc_all), x, starts[0], starts[1], weights)
            return None, *(g if n else None for g, n in zip(grads, ctx.needs_input_grad[1:], strict=True))
        need_x, need_weights = ctx.needs_input_grad[1], any(ctx.needs_input_grad[4:])
        split = lambda t: [None] * len(pieces.lasts) if t is None else t.split(pieces.splits)  # noqa: E731
        parts, dys, dcs = x.split(pieces.splits), split(dy), split(dc_all)
        dx, dweights = _Whole(x, pieces.splits, x), []
        if pieces.sizes is not None:  # rows that end in an earlier piece join there
            dh = x.new_zeros(1, pieces.batch, weights[1].size(1)) if dh is None else dh
            if cell == "lstm" and dc is None:
                dc = x.new_zeros(1, pieces.batch, weights[0].size(0) // 4)
        for i in reversed(range(len(parts))):
            n = pieces.rows(i)
            sizes, o = pieces.arguments(i)
            masks = (o.keep, o.h_mask, o.zone_h, o.zone_c, o.clip_value)
            inputs = (parts[i], _first(starts[2 * i], n), _first(starts[2 * i + 1], n), weights, sizes, *masks)
            last = option_ops.last_arguments(x, o)
            y, _, _, c_all, reserve = option_ops.option_layer(*inputs, cell, False, want_c, True, *last)
            part_dx, dh0, dc0, more, _ = option_ops.option_layer_backward(
                dys[i], _first(dh, n), _first(dc, n), dcs[i], *inputs, y, c_all, reserve, cell, False,
                need_x, need_weights, False, *last,
            )  # fmt: skip
            if need_x:
                dx.put(i, part_dx)
            dh, dc = _joined(dh0, dh), _joined(dc0, dc) if cell == "lstm" else None
            more = [m.to(torch.promote_types(m.dtype, torch.float32)) for m in more]  # sums of 16-bit pieces
            dweights = [total.add_(m) for total, m in zip(dweights, more, strict=True)] if dweights else more
        needs_h, needs_c = ctx.needs_input_grad[2:4]
        dweights = [g.to(w.dtype) for g, w in zip(dweights, weights, strict=need_weights)] or [None] * ctx.count
        dweights = [g if n else None for g, n in zip(dweights, ctx.needs_input_grad[4:], strict=True)]
        return None, dx.t if need_x else None, dh if needs_h else None, dc if needs_c else None, *dweights

    @staticmethod
    def differentiable(ctx, cotangents, x, h, c, weights):
        """The gradients as functions of everything, for double backward: the layer in one piece, kept."""
        cell, pieces, want_c = ctx.how
        inputs = [None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
                  for t in (x, h, c, *weights)]  # fmt: skip
        sizes = None if pieces.sizes is None else torch.tensor(pieces.sizes)
        outputs = option_ops.layer(cell, inputs[:3], inputs[3:], sizes, False, pieces.o, want_c)
        pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if g is not None]
        leaves = [t for t in inputs if t is not None]
        grads = iter(torch.autograd.grad(
            [o for o, _ in pairs], leaves, [g for _, g in pairs], create_graph=True, allow_unused=True
        ))  # fmt: skip
        return [None if t is None else next(grads) for t in inputs]
