"""The Python half of the operators: fake kernels, autograd and autocast, in the order of csrc/library.cpp.

`rnn_layer` and `rnn_layer_backward` are the operators themselves; their schemas stand in csrc/library.cpp, the meaning
of their arguments in `seqkern.reference.layer`.
"""

import torch
from torch import Tensor

from . import _C, reference, watch  # noqa: F401  (loading _C registers the operators)
from .reference import CELLS

rnn_layer = torch.ops.seqkern.rnn_layer.default
rnn_layer_backward = torch.ops.seqkern.rnn_layer_backward.default
BUILT_WITH_CUDA = torch._C._dispatch_has_kernel_for_dispatch_key("seqkern::rnn_layer", "CUDA")


def tf32_allowed(x: Tensor) -> bool:
    """Whether float32 products for x may round to TF32: torch's rule for RNNs, which is not that for its matmul.

    `torch.backends.cudnn.allow_tf32` and the newer `torch.backends.cudnn.rnn.fp32_precision` set it; default: yes.
    """
    return x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision == "tf32"


class Sizes:
    """The sizes that follow from an operator's inputs; symbolic where they are."""

    def __init__(self, x, weights, batch_sizes, cell, bidirectional):
        torch._check(cell in CELLS, lambda: f"cell must be one of {', '.join(CELLS)}, got {cell}")
        torch._check(
            all(w.device == x.device for w in weights),
            lambda: f"{cell}: weights must be on {x.device} as x is, got {[str(w.device) for w in weights]}",
        )
        self.directions = 2 if bidirectional else 1
        self.hidden = weights[0].size(0) // CELLS[cell].gates
        self.output = weights[1].size(1)
        # In the packed case the batch is batch_sizes[0], a value that a fake kernel cannot read: h0 or a fresh
        # symbol stands for it.
        self.packed = batch_sizes is not None
        self.sums = torch.promote_types(x.dtype, torch.float32)
        self.rows = x.size(0) if self.packed else x.size(0) * x.size(1)
        self.leading = (x.size(0),) if self.packed else (x.size(0), x.size(1))

    def batch(self, x, *states):
        if not self.packed:
            return x.size(1)
        known = next((t for t in states if t is not None), None)
        return torch.library.get_ctx().new_dynamic_size(min=1) if known is None else known.size(1)


@torch.library.register_fake("seqkern::rnn_layer")
def _(x, h0, c0, weights, batch_sizes, cell, bidirectional, save, tf32=False):
    s = Sizes(x, weights, batch_sizes, cell, bidirectional)
    batch, lstm = s.batch(x, h0, c0), cell == "lstm"
    return (
        x.new_empty(*s.leading, s.directions * s.output),
        x.new_empty(s.directions, batch, s.output),
        x.new_empty(s.directions, batch, s.hidden) if lstm else x.new_empty(0),
        x.new_empty(s.directions * s.rows * CELLS[cell].saved * s.hidden if save else 0),
    )


def keep(ctx, sequence, weights, batch_sizes, options, results):
    """What all autograd formulas of rnn_layer keep for backward."""
    ctx.cell, ctx.bidirectional, ctx.tf32 = options
    y, reserve = results
    ctx.count = len(weights)
    ctx.watcher = watch.claim()
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*sequence, batch_sizes, y, reserve, *weights)


def gradients(ctx, saved, cotangents, needed, any_weight):
    """Gradients of x, h0, c0 and the weights, None for those that are not needed; `needed`: of x, h0, c0."""
    x, h0, c0, batch_sizes, y, reserve, *weights = saved
    if reserve is None:  # a cell that keeps nothing, called past the operator
        reserve = x.new_empty(0)
    options = (ctx.cell, ctx.bidirectional, needed[0], any_weight)
    if ctx.watcher is None:
        dx, dh0, dc0, dweights = rnn_layer_backward(
            *cotangents, x, h0, c0, weights, batch_sizes, y, reserve, *options, ctx.tf32
        )
    else:
        dx, dh0, dc0, dweights, flow = torch.ops.seqkern.option_layer_backward(
            *cotangents, None, x, h0, c0, weights, batch_sizes, *[None] * 4, 0.0, y, x.new_empty(0), reserve,
            *options, True, None, 0.0, ctx.tf32,
        )  # fmt: skip
        watch.deliver(ctx.watcher, flow, x, batch_sizes)
    states = [g if n else None for g, n in zip((dx, dh0, dc0), needed, strict=True)]
    return states, dweights or [None] * ctx.count


def _rnn_layer_setup(ctx, inputs, output):
    x, h0, c0, weights, batch_sizes, cell, bidirectional, _, tf32 = inputs
    y, _, c_n, reserve = output
    keep(ctx, (x, h0, c0), weights, batch_sizes, (cell, bidirectional, tf32), (y, reserve))
    ctx.mark_non_differentiable(reserve, *([] if cell == "lstm" else [c_n]))


def _rnn_layer_backward(ctx, dy, dh_n, dc_n, _):
    *needed, need_weights = ctx.needs_input_grad[:4]
    others = [None] * (len(ctx.needs_input_grad) - 4)  # arguments left at their default are not counted
    if dy is None and dh_n is None and dc_n is None:
        return None, None, None, [None] * ctx.count, *others
    states, dweights = gradients(ctx, ctx.saved_tensors, (dy, dh_n, dc_n), needed, any(need_weights))
    return (*states, [g if n else None for g, n in zip(dweights, need_weights, strict=True)], *others)


torch.library.register_autograd("seqkern::rnn_layer", _rnn_layer_backward, setup_context=_rnn_layer_setup)


@torch.library.register_fake("seqkern::rnn_layer_backward")
def _(dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, y, reserve, cell, bidirectional, need_dx, need_dw, tf32=False):
    s = Sizes(x, weights, batch_sizes, cell, bidirectional)
    batch = s.batch(x, h0, c0, dh_n, dc_n)
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(s.directions, batch, s.output),
        x.new_empty(s.directions, batch, s.hidden) if cell == "lstm" else x.new_empty(0),
        [w.new_empty(w.shape) for w in weights] if need_dw else [],
    )


def _double_setup(ctx, inputs, output):
    dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes = inputs[:8]
    ctx.cell, ctx.bidirectional, ctx.need_dx, ctx.need_dw = inputs[10:14]
    ctx.set_materialize_grads(False)
    ctx.count = len(weights)
    ctx.save_for_backward(dy, dh_n, dc_n, x, h0, c0, batch_sizes, *weights)


def second_derivatives(ctx, second, layer, cotangents, inputs) -> list[Tensor | None]:
    """Differentiates the reference's backward, to any order: the gradients of `cotangents` and `inputs`.

    `layer` is the reference as a function of x, h0, c0 and a list of weights, which `inputs` holds; `second` are the
    gradients of the operator's outputs dx, dh0, dc0 and dweights.
    The reserve and y are functions of the other inputs and get no gradient of their own. Fresh aliases of the saved
    tensors make these partial derivatives: with the tensors themselves, paths through dy's own history back to the
    inputs would be counted too; with detached ones, third order would be lost.
    """
    create_graph = torch.is_grad_enabled()

    def alias(t):
        if t is None:
            return None
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad():
        cotangents = [alias(t) for t in cotangents]
        x, h0, c0, *weights = (alias(t) for t in inputs)
        outputs = layer(x, h0, c0, weights)
        pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if g is not None]
        inputs = [t for t in (x, h0, c0, *weights) if t is not None]
        first = torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        # Match the operator's outputs (dx, dh0, dc0, dweights) with what came back for each.
        flat = iter(first)
        by_output = [next(flat) if t is not None else None for t in (x, h0, c0)] + list(flat)
        d_x, d_h0, d_c0, d_weights = second
        incoming = [d_x if ctx.need_dx else None, d_h0, d_c0] + list(d_weights if ctx.need_dw else [None] * ctx.count)
        pairs = [(f, s) for f, s in zip(by_output, incoming, strict=True) if f is not None and s is not None]
        wanted = [*cotangents, x, h0, c0, *weights]
        leaves = [t for t in wanted if t is not None]
        if pairs:
            grads = iter(
                torch.autograd.grad(
                    [f for f, _ in pairs],
                    leaves,
                    [s for _, s in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        else:
            grads = iter([None] * len(leaves))
    grads = [next(grads) if t is not None else None for t in wanted]
    needed, states = ctx.needs_input_grad, len(cotangents) + 3
    flags = [*needed[:states], *needed[states]]
    return [g if n else None for g, n in zip(grads, flags, strict=True)]


def _double_backward(ctx, *second: Tensor | list[Tensor] | None):
    dy, dh_n, dc_n, x, h0, c0, batch_sizes, *weights = ctx.saved_tensors

    def layer(x, h0, c0, weights):
        return reference.layer(x, h0, c0, weights, batch_sizes, ctx.cell, ctx.bidirectional)

    grads = second_derivatives(ctx, second, layer, (dy, dh_n, dc_n), (x, h0, c0, *weights))
    return (*grads[:6], grads[6:], *[None] * (len(ctx.needs_input_grad) - 7))


torch.library.register_autograd("seqkern::rnn_layer_backward", _double_backward, setup_context=_double_setup)


_library = torch.library.Library("seqkern", "FRAGMENT")


def register_autocast(name: str, device_type: str, dispatch_key: str, cast_all=None) -> None:
    """Under autocast every floating-point tensor but float64 ones goes to autocast's dtype, as torch's layers do.

    cast_all(args, cast): the operator's arguments cast, where not all of them are to be.
    """
    off = torch._C._ExcludeDispatchKeyGuard
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))
    operator = getattr(torch.ops.seqkern, name).default

    def cast(value, dtype):
        if isinstance(value, Tensor):
            low = value.is_floating_point() and value.dtype != torch.float64 and value.device.type == device_type
            return value.to(dtype) if low else value
        return [cast(v, dtype) for v in value] if isinstance(value, (list, tuple)) else value

    def autocast(_, *args):
        dtype = torch.get_autocast_dtype(device_type)
        args = [cast(a, dtype) for a in args] if cast_all is None else cast_all(args, lambda a: cast(a, dtype))
        with off(keys):
            return operator(*args)

    _library.impl(name, autocast, dispatch_key, with_keyset=True)


register_autocast("rnn_layer", "cpu", "AutocastCPU")
register_autocast("rnn_layer", "cuda", "AutocastCUDA")
