"""The Python half of the attention decoder's operators: fake kernels, autograd and autocast.

Their schemas stand in csrc/library.cpp; the meaning of their arguments in `reference.attention_decoder`.
"""

import torch
from torch import Tensor

from .. import ops
from ..reference import CELLS
from . import reference

attention_decoder = torch.ops.seqkern.attention_decoder.default
attention_decoder_backward = torch.ops.seqkern.attention_decoder_backward.default

# Places of attention_decoder's arguments.
C0, WEIGHTS, KEYS, VALUES, LENGTHS, W_QUERY, V, W_PRE, B_PRE, MASKS, CELL = range(3, 14)


@torch.library.register_fake("seqkern::attention_decoder")
def _(gx, feed0, h0, c0, weights, keys, values, lengths, w_query, v, w_pre, b_pre, masks, cell, save, tokens=None):
    torch._check(cell in CELLS, lambda: f"cell must be one of {', '.join(CELLS)}, got {cell}")
    steps, batch = gx.shape[:2] if tokens is None else tokens.shape
    layers, hidden = h0.size(0), h0.size(2)
    kept = layers * (CELLS[cell].saved + 1) * hidden + (0 if v is None else v.size(0))
    return (
        gx.new_empty(steps, batch, values.size(2)),
        gx.new_empty(layers, batch, hidden),
        gx.new_empty(layers, batch, hidden) if cell == "lstm" else gx.new_empty(0),
        gx.new_empty(steps, batch, keys.size(1)),
        gx.new_empty(steps * batch * kept if save else 0),
    )


@torch.library.register_fake("seqkern::attention_decoder_backward")
def _(
    da, dh_n, dc_n, dalpha, gx, feed0, h0, c0, weights, keys, values, lengths, w_query, v, w_pre, b_pre, masks, a,
    alpha, reserve, cell, need_sources, need_weights, need_masks, tokens=None,
):  # fmt: skip
    def like(t, wanted=True):
        return gx.new_empty(t.shape if wanted and t is not None else (0,))

    return (
        like(gx), like(feed0), like(h0), like(c0), [like(w) for w in weights] if need_weights else [],
        like(keys, need_sources), like(values, need_sources), like(w_query, need_weights), like(v, need_weights),
        like(w_pre, need_weights), like(b_pre, need_weights), like(masks, need_masks),
    )  # fmt: skip


def _setup(ctx, inputs, output):
    *tensors, ctx.cell, _, tokens = inputs
    weights = tensors.pop(WEIGHTS)
    a, _, c_n, alpha, reserve = output
    ctx.count = len(weights)
    ctx.mark_non_differentiable(reserve, *([] if ctx.cell == "lstm" else [c_n]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, a, alpha, reserve, tokens, *weights)


def _saved(ctx) -> list:
    """The tensors among attention_decoder's arguments up to the masks, in their order, and what else was saved."""
    tensors, others, weights = ctx.saved_tensors[:12], ctx.saved_tensors[12:16], ctx.saved_tensors[16:]
    return [*tensors[:WEIGHTS], list(weights), *tensors[WEIGHTS:]], others


def _backward(ctx, da, dh_n, dc_n, dalpha, _):
    needed = list(ctx.needs_input_grad)
    if da is None and dh_n is None and dc_n is None and dalpha is None:
        return tuple([None] * ctx.count if i == WEIGHTS else None for i in range(len(needed)))
    arguments, (a, alpha, reserve, tokens) = _saved(ctx)
    need_sources = needed[KEYS] or needed[VALUES]
    need_weights = any(needed[WEIGHTS]) or any(needed[i] for i in (W_QUERY, V, W_PRE, B_PRE))
    kept, needs = (a, alpha, reserve, ctx.cell), (need_sources, need_weights, needed[MASKS])
    found = attention_decoder_backward(da, dh_n, dc_n, dalpha, *arguments, *kept, *needs, tokens)
    dgx, dfeed0, dh0, dc0, dweights, dkeys, dvalues, *rest = found
    grads = [dgx, dfeed0, dh0, dc0, dweights or [None] * ctx.count, dkeys, dvalues, None, *rest]
    for i, flag in enumerate(needed[:13]):
        if i == WEIGHTS:
            grads[i] = [g if n else None for g, n in zip(grads[i], flag, strict=True)]
        elif not flag:
            grads[i] = None
    return (*grads, *[None] * (len(needed) - len(grads)))  # none for cell, save and, where they were given, tokens


torch.library.register_autograd("seqkern::attention_decoder", _backward, setup_context=_setup)


def _double_setup(ctx, inputs, output):
    *tensors, ctx.cell, ctx.need_sources, ctx.need_weights, ctx.need_masks, tokens = inputs
    cotangents, arguments = tensors[:4], tensors[4:17]
    weights = arguments.pop(WEIGHTS)
    ctx.count = len(weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, *cotangents, *arguments, *weights)


def _double_backward(ctx, *second):
    """Differentiates the reference's backward; see `ops.second_derivatives` for the aliases."""
    tokens, *saved = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()

    def alias(t):
        if t is None or not t.is_floating_point():
            return t
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    # What comes in for outputs that were not wanted is for empty tensors.
    wanted_of = [True] * 4 + [ctx.need_sources] * 2 + [ctx.need_weights] * 4 + [ctx.need_masks]
    d_weights = list(second[WEIGHTS] or []) if ctx.need_weights else []
    others = [s if w else None for s, w in zip([*second[:WEIGHTS], *second[WEIGHTS + 1 :]], wanted_of, strict=True)]
    with torch.enable_grad():
        tensors = [alias(t) for t in saved]
        cotangents, given, weights = tensors[:4], tensors[4:16], tensors[16:]
        arguments = [*given[:WEIGHTS], weights, *given[WEIGHTS:]]
        outputs = reference.attention_decoder(*arguments, ctx.cell, tokens)
        pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if g is not None]
        floating = [*given[:6], *given[7:]]  # all but lengths
        leaves = [t for t in (*floating, *weights) if t is not None]
        first = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], leaves, [g for _, g in pairs], create_graph=True, materialize_grads=True
            )
        )
        firsts = [next(first) if t is not None else None for t in (*floating, *weights)]
        incoming = [*others, *(d_weights or [None] * ctx.count)]
        chain = [(f, s) for f, s in zip(firsts, incoming, strict=True) if f is not None and s is not None]
        wanted = [*cotangents, *floating, *weights]
        known = [t for t in wanted if t is not None]
        found = iter([None] * len(known))
        if chain:
            found = iter(
                torch.autograd.grad(
                    [f for f, _ in chain],
                    known,
                    [s for _, s in chain],
                    create_graph=create_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )  # fmt: skip
            )
    grads = [next(found) if t is not None else None for t in wanted]
    d_cotangents, d_given, d_weights = grads[:4], grads[4:15], grads[15:]
    d_arguments = [*d_given[:4], d_weights, *d_given[4:6], None, *d_given[6:]]
    return (*d_cotangents, *d_arguments, *[None] * (len(ctx.needs_input_grad) - 17))


torch.library.register_autograd("seqkern::attention_decoder_backward", _double_backward, setup_context=_double_setup)
ops.register_autocast("attention_decoder", "cpu", "AutocastCPU")


def run(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.attention_decoder`'s arguments and results."""
    save = torch.is_grad_enabled() and any(
        t.requires_grad
        for argument in arguments[:13]
        if argument is not None
        for t in (argument if isinstance(argument, (list, tuple)) else [argument])
    )
    upto = CELL + 1
    return attention_decoder(*arguments[:upto], save, *arguments[upto:])[:4]
