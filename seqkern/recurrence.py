"""The recurrence of a layer, from projected inputs: cells beyond torch.nn's and, on the CPU, clipping by norm.

The layer is `linear` (and `layer_norm`) for the inputs of all steps, in torch, and then the operator
`seqkern::recurrence`. Its arguments, all float32 or float64 (16-bit tensors are widened before and narrowed after):

    gx: W_ih x with all biases, [T, B, D*G*H] or, with batch_sizes, [N, D*G*H]; but for b_hn of a GRU whose reset gate
        acts behind the product, which is params' bias_n.
    h0, c0: [D, B, H] or None.
    params: w_hh [D, G*H, H], then, where `flags` has their bit, bias_n [D, H] (BIAS_N), peephole [D, 3*H or 2*H]
        (PEEPHOLE), gain_h [D, G*H] and for the LSTM gain_c and bias_c [D, H] (NORMAL).
    keep, h_mask, zone_h, zone_c, clip_value, clip_norm, lengths: as in `reference.Options`; lengths on CUDA alone.
    tf32: whether CUDA may round the operands of W_hh h, and those of dW_hh, to TF32.

Its results: y [T, B, D*H] or [N, D*H], h_n, c_n [D, B, H], with want_c c of every step, and with `save` what backward
needs: read [D, N, H], h as each step read it, and the reserve, rows of what the cell computed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from . import eager, functional, reference, watch
from .ops import _library, second_derivatives, tf32_allowed
from .reference import Extra, Options, Weights

# As in csrc/core/recurrence_problem.h.
COUPLED, HARD, RESET_BEFORE, NORMAL, PEEPHOLE, BIAS_N = (1 << bit for bit in range(6))
MASKS = ("keep", "h_mask", "zone_h", "zone_c", "lengths")

recurrence = torch.ops.seqkern.recurrence.default
recurrence_backward = torch.ops.seqkern.recurrence_backward.default


def covers(sequence: Sequence[Tensor | None], weights: Sequence[Tensor], bidirectional: bool, o: Options) -> bool:
    """Whether the operator does all of `o`; the reference does the rest."""
    x, per_direction = sequence[0], len(weights) // (2 if bidirectional else 1)
    if not functional.has_kernel(x.device, x.dtype) or watch.listening():
        return False
    if o.lengths is not None and not functional.takes_lengths(x.device):
        return False
    if o.keep is not None and o.keep.requires_grad and torch.is_grad_enabled():
        return False
    projected, normal = per_direction in (3, 5), any(e.gain_h is not None for e in o.extra)
    return not projected and not (o.reset_before and normal)


def layer(
    cell: str, sequence: Sequence[Tensor | None], weights: Sequence[Tensor], batch_sizes: Tensor | None,
    bidirectional: bool, o: Options, want_c: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h_n, c_n and, with want_c, c of every step; under autocast in its dtype, as the other operators."""
    device = sequence[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        sequence, weights = [functional.cast(t, dtype) for t in sequence], [functional.cast(w, dtype) for w in weights]
        o = functional.cast_options(o, dtype)
    with torch.autocast(device, enabled=False):
        functional.check_types(cell, sequence, (*weights, *(t for e in o.extra for t in e)), batch_sizes, bidirectional)
        dtype = sequence[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        x, *states = sequence
        h0, c0 = (None if t is None else t.to(wide) for t in states)
        narrow = x.is_cuda and dtype != wide  # 16-bit products of the inputs, as in torch.nn's layers
        x = x if narrow else x.to(wide)
        groups = [
            Weights(w.w_ih.to(x.dtype), *(None if t is None else t.to(wide) for t in w[1:]))
            for w in reference.split_weights(weights, bidirectional)
        ]
        extra = [Extra(*(None if t is None else t.to(wide) for t in e)) for e in o.extra] or [Extra()] * len(groups)
        params, flags = _params(cell, groups, extra, o)
        masks = [None if m is None else m.to(wide) for m in (o.keep, o.h_mask, o.zone_h, o.zone_c)]
        save = torch.is_grad_enabled() and functional.wants_grad((x, h0, c0), (*params, *weights))
        gx = _project(cell, x, groups, extra, o, wide)
        numbers = (o.clip_value, o.clip_norm, cell, flags, want_c, save, o.lengths, narrow or tf32_allowed(x))
        results = eager.call(_FORMULA, gx, h0, c0, params, (batch_sizes, *masks, *numbers), save)[:4]
        return tuple(t.to(dtype) for t in results)


def _params(cell, groups, extra, o: Options) -> tuple[list[Tensor], int]:
    """The operator's params and flags."""
    hidden = groups[0].w_hh.size(1)
    biases = [None if w.b_hh is None or cell != "gru" or o.reset_before else w.b_hh[2 * hidden :] for w in groups]
    candidates = [(BIAS_N, biases), (PEEPHOLE, [e.peephole for e in extra])]
    candidates += [(NORMAL, [getattr(e, name) for e in extra]) for name in ("gain_h", "gain_c", "bias_c")]
    params = [_stacked([w.w_hh for w in groups])]
    flags = COUPLED * o.coupled | HARD * o.hard_sigmoid | RESET_BEFORE * o.reset_before
    for flag, tensors in candidates:
        if tensors[0] is not None:
            params.append(_stacked(tensors))
            flags |= flag
    return params, flags


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack, which copies, only where there are two directions."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _project(cell: str, x: Tensor, groups, extra, o: Options, wide: torch.dtype) -> Tensor:
    """gx, in `wide`."""
    biases = []
    for w in groups:
        bias = None if w.b_ih is None else w.b_ih + w.b_hh
        if bias is not None and cell == "gru" and not o.reset_before:
            split = 2 * w.w_hh.size(1)
            bias = torch.cat([bias[:split], w.b_ih[split:]])
        biases.append(bias)
    gains = [e.gain_x for e in extra]
    if gains[0] is None:
        one = len(groups) == 1
        bias = biases[0] if one or biases[0] is None else torch.cat(biases)
        weight = groups[0].w_ih if one else torch.cat([w.w_ih for w in groups])
        if x.dtype == wide:
            return linear(x, weight, bias)
        product = linear(x, weight).to(wide)
        return product if bias is None else product + bias
    parts = [
        layer_norm(linear(x, w.w_ih).to(wide), gain.shape, gain, bias)
        for w, gain, bias in zip(groups, gains, biases, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@torch.library.register_fake("seqkern::recurrence")
def _(
    gx, h0, c0, params, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, clip_norm, cell, flags, want_c, save,
    lengths=None, tf32=False,
):  # fmt: skip
    directions, width, hidden = params[0].shape
    leading = gx.shape[:-1]
    if batch_sizes is None:
        batch = gx.size(1)
    else:  # a value that a fake kernel cannot read
        known = h0 if h0 is not None else c0
        batch = torch.library.get_ctx().new_dynamic_size(min=1) if known is None else known.size(1)
    rows = leading.numel() if batch_sizes is None else gx.size(0)
    y, state = gx.new_empty(*leading, directions * hidden), gx.new_empty(directions, batch, hidden)
    lstm, none = cell == "lstm", gx.new_empty(0)
    return (
        y,
        state,
        torch.empty_like(state) if lstm else none,
        torch.empty_like(y) if lstm and want_c else gx.new_empty(0),
        gx.new_empty(directions, rows, hidden) if save else gx.new_empty(0),
        gx.new_empty(directions, rows, _saved(cell, flags, width, hidden)) if save else gx.new_empty(0),
    )


def _saved(cell: str, flags: int, width: int, hidden: int) -> int:
    """Columns of the reserve."""
    values = {"lstm": 6, "gru": 4}.get(cell, 1) * hidden
    return values + (width + 16) // 16 * 16 if flags & NORMAL else values


def _setup(ctx, inputs, output):
    gx, h0, c0, params, batch_sizes, *masks, ctx.clip_value, ctx.clip_norm, ctx.cell, ctx.flags, want_c, _ = inputs[:15]
    lengths, ctx.tf32 = inputs[15:]
    lstm = ctx.cell == "lstm"
    _, _, c_n, c_all, read, reserve = output
    ctx.mark_non_differentiable(read, reserve, *([] if lstm else [c_n]), *([] if lstm and want_c else [c_all]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gx, h0, c0, batch_sizes, *masks, read, reserve, lengths, *params)


def _gradients(ctx, saved, needed, dy, dh_n, dc_n, dc_all, *_):
    gx, h0, c0, batch_sizes, *masks, read, reserve, lengths = saved[:11]
    need_gx, need_h0, need_c0, need_params = needed
    if dy is None and dh_n is None and dc_n is None and dc_all is None:
        return None, None, None, [None] * len(need_params)
    dgx, dh0, dc0, dparams = recurrence_backward(
        dy, dh_n, dc_n, dc_all, gx, h0, c0, list(saved[11:]), batch_sizes, *masks, ctx.clip_value, ctx.clip_norm,
        read, reserve, ctx.cell, ctx.flags, lengths, ctx.tf32,
    )  # fmt: skip
    states = [g if n else None for g, n in zip((dgx, dh0, dc0), (need_gx, need_h0, need_c0), strict=True)]
    return *states, [g if n else None for g, n in zip(dparams, need_params, strict=True)]


_FORMULA = eager.Formula(recurrence, _setup, _gradients)
_FORMULA.register("seqkern::recurrence")


def _backward(
    dy, dh_n, dc_n, dc_all, gx, h0, c0, params, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, clip_norm,
    read, reserve, cell, flags, lengths=None, tf32=False,
):  # fmt: skip
    inputs = (gx, h0, c0, params, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, clip_norm)
    if reserve.numel() == 0:  # forward kept nothing: run it again
        read, reserve = recurrence(*inputs, cell, flags, False, True, lengths, tf32)[4:]
    cotangents = (dy, dh_n, dc_n, dc_all)
    more = (read, reserve, cell, flags, lengths, tf32)
    dgx, dgh, dh0, dc0, sums = torch.ops.seqkern._recurrence_backward(*cotangents, *inputs, *more)
    directions, width, hidden = params[0].shape
    if dgh.numel() == 0:
        dgh = dgx.view(-1, directions, width).transpose(0, 1)
    entering = _times_mask(read, h_mask, batch_sizes)
    dw = torch.empty_like(params[0])
    rounded = tf32 and dgx.is_cuda
    product = torch.ops.seqkern._transposed_product if rounded else lambda out, a, b: torch.mm(a.T, b, out=out)
    for d in range(directions):
        if flags & RESET_BEFORE:
            product(dw[d, : 2 * hidden], dgh[d, :, : 2 * hidden], entering[d])
            product(dw[d, 2 * hidden :], dgh[d, :, 2 * hidden :], entering[d] * reserve[d, :, :hidden])
        else:
            product(dw[d], dgh[d], entering[d])
    others = sums.sum(0).split([p.size(1) for p in params[1:]], 1)
    return dgx, dh0, dc0, [dw, *(g.contiguous() for g in others)]


def _times_mask(read: Tensor, h_mask: Tensor | None, batch_sizes: Tensor | None) -> Tensor:
    """[D, N, H] h as it went into the products."""
    if h_mask is None:
        return read
    if batch_sizes is not None:
        return read * torch.cat([h_mask[:, :n] for n in batch_sizes.tolist()], 1)
    directions, batch, hidden = h_mask.shape
    return (read.view(directions, -1, batch, hidden) * h_mask.unsqueeze(1)).view_as(read)


for _key in ("CPU", "CUDA"):
    _library.impl("recurrence_backward", _backward, _key)


@torch.library.register_fake("seqkern::recurrence_backward")
def _(
    dy, dh_n, dc_n, dc_all, gx, h0, c0, params, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, clip_norm,
    read, reserve, cell, flags, lengths=None, tf32=False,
):  # fmt: skip
    directions, _, hidden = params[0].shape
    states = [t for t in (h0, c0, dh_n, dc_n) if t is not None]
    if batch_sizes is None:
        batch = gx.size(1)
    else:
        batch = states[0].size(1) if states else torch.library.get_ctx().new_dynamic_size(min=1)
    dh0 = gx.new_empty(directions, batch, hidden)
    dc0 = torch.empty_like(dh0) if cell == "lstm" else gx.new_empty(0)
    return gx.new_empty(gx.shape), dh0, dc0, [p.new_empty(p.shape) for p in params]


def _double_setup(ctx, inputs, output):
    *cotangents, gx, h0, c0, params, batch_sizes = inputs[:9]
    ctx.clip_value, ctx.clip_norm, _, _, ctx.cell, ctx.flags, lengths, _ = inputs[13:]
    ctx.need_dx, ctx.need_dw, ctx.count = True, True, len(params)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*cotangents, gx, h0, c0, batch_sizes, *inputs[9:13], lengths, *params)


def _double_backward(ctx, *second: Tensor | list[Tensor] | None):
    saved = ctx.saved_tensors
    cotangents, (gx, h0, c0, batch_sizes, *masks), params = saved[:4], saved[4:13], list(saved[13:])

    def layer(gx, h0, c0, params):
        return by_reference(gx, (h0, c0), params, batch_sizes, masks, (ctx.clip_value, ctx.clip_norm), ctx)

    grads = second_derivatives(ctx, second, layer, cotangents, (gx, h0, c0, *params))
    return (*grads[:7], grads[7:], *[None] * (len(ctx.needs_input_grad) - 8))


def by_reference(gx, states, params, batch_sizes, masks, clips, how) -> Sequence[Tensor]:
    """The operator's first four results in plain torch. how: has its cell and flags."""
    names = iter(params)
    w_hh, flags, cell = next(names), how.flags, how.cell
    take = lambda flag: next(names) if flags & flag else [None] * len(w_hh)  # noqa: E731
    bias_n, peephole, gain_h = take(BIAS_N), take(PEEPHOLE), take(NORMAL)
    gain_c, bias_c = (take(NORMAL), take(NORMAL)) if cell == "lstm" else ([None] * len(w_hh),) * 2
    groups, extra = [], []
    for d, w in enumerate(w_hh):
        bias = None if bias_n[d] is None else torch.cat([w.new_zeros(2 * w.size(1)), bias_n[d]])
        groups.append(reference.Weights(w, w, None, bias))
        if flags & (PEEPHOLE | NORMAL):
            extra.append(Extra(peephole[d], None, gain_h[d], gain_c[d], bias_c[d]))
    o = Options(
        **dict(zip(MASKS, masks, strict=True)), clip_value=clips[0], clip_norm=clips[1], coupled=bool(flags & COUPLED),
        hard_sigmoid=bool(flags & HARD), reset_before=bool(flags & RESET_BEFORE), extra=extra,
    )  # fmt: skip
    sizes = [gx.size(1)] * gx.size(0) if batch_sizes is None else batch_sizes.tolist()
    rows = gx.reshape(-1, len(w_hh), w_hh.size(1)).unbind(1)
    y, h_n, c_n, c_all = reference.recurrence(o, rows, *states, groups, sizes, cell)
    lead = gx.shape[:-1]
    return y.unflatten(0, lead), h_n, c_n, c_all.unflatten(0, lead) if cell == "lstm" else c_all


torch.library.register_autograd("seqkern::recurrence_backward", _double_backward, setup_context=_double_setup)
