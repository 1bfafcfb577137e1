"""The Python half of the operators with options, after the pattern of `seqkern.ops`: fake kernels, autograd, autocast.

The meaning of their arguments stands in `seqkern.reference.Options`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import eager, functional, reference, watch
from .ops import Sizes, register_autocast, second_derivatives, tf32_allowed
from .reference import CELLS, Options

option_layer = torch.ops.seqkern.option_layer.default
option_layer_backward = torch.ops.seqkern.option_layer_backward.default


def covers(cell: str, sequence: Sequence[Tensor | None], weights: Sequence[Tensor], o: Options) -> bool:
    """Whether the fused operators do all of `o`; the reference does the rest."""
    x = sequence[0]
    if o.variant or not functional.has_kernel(x.device, x.dtype):
        return False
    if not functional.takes_lengths(x.device) and (o.clip_norm or o.lengths is not None):
        return False
    if o.keep is not None and o.keep.requires_grad and torch.is_grad_enabled():
        return False
    # An RNN's derivative is taken from its output, which a share of the old state hides.
    training = o.zone_h is None or o.zone_h.size(0) > 1 or x.shape[:-1].numel() == 1
    return not cell.startswith("rnn") or training or not torch.is_grad_enabled()


def last_arguments(x: Tensor, o: Options) -> tuple[Tensor | None, float, bool]:
    """Of both operators."""
    return o.lengths, o.clip_norm, tf32_allowed(x)


def layer(
    cell: str, sequence: Sequence[Tensor | None], weights: Sequence[Tensor], batch_sizes: Tensor | None,
    bidirectional: bool, o: Options, want_c: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h_n, c_n and, with want_c, c of every step."""
    save = torch.is_grad_enabled() and functional.wants_grad(sequence, weights)
    masks = (o.keep, o.h_mask, o.zone_h, o.zone_c, o.clip_value)
    others = (batch_sizes, *masks, cell, bidirectional, want_c, save, *last_arguments(sequence[0], o))
    return eager.call(_FORMULA, *sequence, weights, others, save)[:4]


@torch.library.register_fake("seqkern::option_layer")
def _(
    x, h0, c0, weights, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, cell, bidirectional, want_c, save,
    lengths=None, clip_norm=0.0, tf32=False,
):  # fmt: skip
    s = Sizes(x, weights, batch_sizes, cell, bidirectional)
    batch, lstm = s.batch(x, h0, c0), cell == "lstm"
    return (
        x.new_empty(*s.leading, s.directions * s.output),
        x.new_empty(s.directions, batch, s.output),
        x.new_empty(s.directions, batch, s.hidden) if lstm else x.new_empty(0),
        x.new_empty(*s.leading, s.directions * s.hidden)
        if lstm and (want_c or (save and zone_c is not None))
        else x.new_empty(0),
        x.new_empty(s.directions * s.rows * CELLS[cell].saved * s.hidden if save else 0),
    )


def _setup(ctx, inputs, output):
    x, h0, c0, weights, batch_sizes, *masks, ctx.clip, ctx.cell, ctx.bidirectional, want_c, _ = inputs[:14]
    lengths, ctx.clip_norm, ctx.tf32 = inputs[14:]
    y, _, c_n, c_all, reserve = output
    ctx.count = len(weights)
    ctx.watcher = watch.claim()
    lstm = ctx.cell == "lstm"
    ctx.mark_non_differentiable(reserve, *([] if lstm else [c_n]), *([] if lstm and want_c else [c_all]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h0, c0, batch_sizes, *masks, y, c_all, reserve, lengths, *weights)


def _gradients(ctx, saved, needed, dy, dh_n, dc_n, dc_all, _):
    x, h0, c0, batch_sizes, *masks, y, c_all, reserve, lengths = saved[:12]
    weights = list(saved[12:])
    need_x, need_h0, need_c0, need_weights = needed
    if dy is None and dh_n is None and dc_n is None and dc_all is None:
        return None, None, None, [None] * ctx.count
    dx, dh0, dc0, dweights, flow = option_layer_backward(
        dy, dh_n, dc_n, dc_all, x, h0, c0, weights, batch_sizes, *masks, ctx.clip, y, c_all, reserve,
        ctx.cell, ctx.bidirectional, need_x, any(need_weights), ctx.watcher is not None, lengths, ctx.clip_norm,
        ctx.tf32,
    )  # fmt: skip
    if ctx.watcher is not None:
        watch.deliver(ctx.watcher, flow, x, batch_sizes)
    dweights = dweights or [None] * ctx.count
    return (
        dx if need_x else None,
        dh0 if need_h0 else None,
        dc0 if need_c0 else None,
        [g if n else None for g, n in zip(dweights, need_weights, strict=True)],
    )


_FORMULA = eager.Formula(option_layer, _setup, _gradients)
_FORMULA.register("seqkern::option_layer")


@torch.library.register_fake("seqkern::option_layer_backward")
def _(
    dy, dh_n, dc_n, dc_all, x, h0, c0, weights, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, y, c_all,
    reserve, cell, bidirectional, need_dx, need_dw, want_flow, lengths=None, clip_norm=0.0, tf32=False,
):  # fmt: skip
    s = Sizes(x, weights, batch_sizes, cell, bidirectional)
    batch = s.batch(x, h0, c0, dh_n, dc_n)
    units = 1 if x.is_cuda else 8  # that share an element of flow
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(s.directions, batch, s.output),
        x.new_empty(s.directions, batch, s.hidden) if cell == "lstm" else x.new_empty(0),
        [w.new_empty(w.shape) for w in weights] if need_dw else [],
        x.new_empty(2, s.directions, s.rows, (max(s.hidden, s.output) + units - 1) // units, dtype=s.sums)
        if want_flow
        else x.new_empty(0),
    )


def _double_setup(ctx, inputs, output):
    dy, dh_n, dc_n, dc_all, x, h0, c0, weights, batch_sizes = inputs[:9]
    ctx.cell, ctx.bidirectional, ctx.need_dx, ctx.need_dw = inputs[17:21]
    ctx.mark_non_differentiable(output[4])
    ctx.clip, ctx.count, ctx.clip_norm = inputs[13], len(weights), inputs[23]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy, dh_n, dc_n, dc_all, x, h0, c0, batch_sizes, *inputs[9:13], inputs[22], *weights)


def _double_backward(ctx, *second: Tensor | list[Tensor] | None):
    saved = ctx.saved_tensors
    cotangents, (x, h0, c0, batch_sizes, *masks), weights = saved[:4], saved[4:13], list(saved[13:])
    named = dict(zip(("keep", "h_mask", "zone_h", "zone_c", "lengths"), masks, strict=True))
    options = Options(**named, clip_value=ctx.clip, clip_norm=ctx.clip_norm)

    def layer(x, h0, c0, weights):
        return reference.layer_with(options, x, h0, c0, weights, batch_sizes, ctx.cell, ctx.bidirectional)

    grads = second_derivatives(ctx, second[:4], layer, cotangents, (x, h0, c0, *weights))
    return (*grads[:7], grads[7:], *[None] * (len(ctx.needs_input_grad) - 8))


torch.library.register_autograd("seqkern::option_layer_backward", _double_backward, setup_context=_double_setup)


@torch.library.register_fake("seqkern::_bernoulli")
def _(like, size, seed, stream, p, value):
    return like.new_empty(size)


def _cast_last(args, cast):
    """keep, the sixth argument, stays in the type that sums are in."""
    return [a if i == 5 else cast(a) for i, a in enumerate(args)]


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    register_autocast("option_layer", _device, _key, _cast_last)
