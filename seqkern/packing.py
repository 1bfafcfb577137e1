"""Padded sequences of any lengths, in any order, as the rows of a packed sequence, and back."""

import torch
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows `index` (each at most once) of v [M, K]."""

    @staticmethod
    def forward(ctx, v, index):
        ctx.save_for_backward(index)
        ctx.rows = v.size(0)
        return v.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return _Scatter.apply(grad, ctx.saved_tensors[0], ctx.rows), None


class _Scatter(torch.autograd.Function):
    """[rows, K] with row index[i] from v[i], and zeros elsewhere."""

    @staticmethod
    def forward(ctx, v, index, rows):
        ctx.save_for_backward(index)
        return v.new_zeros(rows, v.size(1)).index_copy_(0, index, v)

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad.reshape(grad.shape), ctx.saved_tensors[0]), None, None


class Packing:
    """Where the rows of a padded [T, B] problem stand when sequences go by falling length and padding is left out.

    lengths: [B] int64 on the CPU, in [0, T]. Sequences without a step are not in the packed problem at all.
    """

    def __init__(self, lengths: Tensor, steps: int):
        self.padded_steps, self.padded_batch = steps, lengths.numel()
        self.padded_rows = steps * self.padded_batch
        ordered, order = lengths.sort(descending=True, stable=True)
        there = int((ordered > 0).sum())
        self.order = order[:there]  # packed sequence b was sequence order[b]
        self.whole = bool((lengths == steps).all())  # nothing to leave out: the padded problem will do
        self.steps = int(ordered[0]) if there else 0
        inside = ordered[:there] > torch.arange(self.steps).unsqueeze(1)
        self.batch_sizes = inside.sum(1)
        self.rows = (torch.arange(self.steps).unsqueeze(1) * self.padded_batch + self.order)[inside]

    def pack(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> list[Tensor | None]:
        """x [T, B, I] as [N, I], and the states [L*D, B, *] in the packed order."""
        states = [None if s is None else s.index_select(1, self.order) for s in (h, c)]
        swapped = x.transpose(0, 1)
        if swapped.is_contiguous():  # a batch_first input: no copy of all of it first
            b, t = self.rows % self.padded_batch, self.rows // self.padded_batch
            return [_Gather.apply(swapped.reshape(-1, x.size(2)), b * self.padded_steps + t), *states]
        return [_Gather.apply(x.reshape(-1, x.size(2)), self.rows), *states]

    def unpack(self, y: Tensor) -> Tensor:
        """[N, K] as [T, B, K], zero past each sequence's end."""
        return _Scatter.apply(y, self.rows, self.padded_rows).view(self.padded_steps, self.padded_batch, -1)

    def last(self, state: Tensor, initial: Tensor | None) -> Tensor:
        """The last states [L*D, B, *] in the caller's order; the initial one where there was no step."""
        if initial is None:
            initial = state.new_zeros(state.size(0), self.padded_batch, state.size(2))
        return initial.to(state.dtype).index_copy(1, self.order, state)
