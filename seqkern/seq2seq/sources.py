"""The Python half of the operator that projects a source: fake kernels, autograd and autocast.

Its schema stands in csrc/library.cpp; the meaning of its arguments in `reference.project_sources`.
"""

import torch
from torch import Tensor

from .. import ops
from . import reference

project_sources = torch.ops.seqkern.project_sources.default
project_sources_backward = torch.ops.seqkern.project_sources_backward.default


@torch.library.register_fake("seqkern::project_sources")
def _(memory, lengths, w_key, b_key, w_value):
    steps, batch = memory.size(0), memory.size(1)
    return memory.new_empty(batch, steps, w_key.size(0)), memory.new_empty(batch, steps, w_value.size(0))


@torch.library.register_fake("seqkern::project_sources_backward")
def _(dkeys, dvalues, memory, lengths, w_key, b_key, w_value, need_memory, need_weights):
    def like(t, wanted=need_weights):
        return memory.new_empty(t.shape if wanted and t is not None else (0,))

    return like(memory, need_memory), like(w_key), like(b_key), like(w_value)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dkeys, dvalues):
    inputs, needed = ctx.saved_tensors, ctx.needs_input_grad
    memory, _, w_key, b_key, w_value = inputs
    need_weights = needed[2] or needed[3] or needed[4]
    if torch.is_grad_enabled():  # for derivatives of higher order
        found = _differentiable(dkeys, dvalues, *inputs)
    else:
        found = project_sources_backward(dkeys, dvalues, *inputs, needed[0], need_weights)
    dmemory, dw_key, db_key, dw_value = found
    grads = (dmemory, None, dw_key, db_key, dw_value)
    return tuple(g if n else None for g, n in zip(grads, needed, strict=True))


def _differentiable(dkeys, dvalues, memory, lengths, w_key, b_key, w_value) -> tuple[Tensor, ...]:
    """The gradients of the other arguments as functions that torch differentiates."""
    inside = reference.places_inside(lengths, memory.size(0), memory.device).unsqueeze(-1)
    dkeys, dvalues = (torch.where(inside, d, 0) for d in (dkeys, dvalues))
    rows = memory.transpose(0, 1)
    dmemory = (dkeys @ w_key + dvalues @ w_value).transpose(0, 1)
    weights = (torch.einsum("bsn,bsm->nm", d, torch.where(inside, rows, 0)) for d in (dkeys, dvalues))
    dw_key, dw_value = weights
    return dmemory, dw_key, None if b_key is None else dkeys.sum((0, 1)), dw_value


torch.library.register_autograd("seqkern::project_sources", _backward, setup_context=_setup)
ops.register_autocast("project_sources", "cpu", "AutocastCPU")
