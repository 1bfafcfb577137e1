"""Plain eager calls of the operators with options, without the operators' own autograd.

An operator's autograd flattens and rebuilds its lists of tensors on every call, which takes 0.2 ms of Python a training
step: as long as the kernels of a small layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional


class Formula(NamedTuple):
    """An operator whose fourth argument is its list of weights, and the two halves of its autograd."""

    operator: Callable
    setup: Callable  # (ctx, inputs, output), as for torch.library.register_autograd
    gradients: Callable  # (ctx, saved, needed, *cotangents) -> gradients of x, h0, c0 and a list of the weights'

    def register(self, name: str) -> None:
        """As the operator's autograd."""

        def backward(ctx, *cotangents):
            needed, others = ctx.needs_input_grad[:4], len(ctx.needs_input_grad) - 4  # less those left at a default
            return (*self.gradients(ctx, ctx.saved_tensors, needed, *cotangents), *[None] * others)

        torch.library.register_autograd(name, backward, setup_context=self.setup)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, formula: Formula, others: tuple, x, h0, c0, *weights):
        inputs = (x, h0, c0, weights, *others)
        with torch._C._AutoDispatchBelowAutograd():
            results = formula.operator(*inputs)
        formula.setup(ctx, inputs, results)
        ctx.formula = formula
        return results

    @staticmethod
    def backward(ctx, *cotangents):
        needed = (*ctx.needs_input_grad[2:5], ctx.needs_input_grad[5:])
        saved = ctx.saved_tensors  # with autograd on: torch.utils.checkpoint runs forward again here
        if torch.is_grad_enabled():  # a second derivative is wanted: through the backward operator's own formula
            *states, weights = ctx.formula.gradients(ctx, saved, needed, *cotangents)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                *states, weights = ctx.formula.gradients(ctx, saved, needed, *cotangents)
        return None, None, *states, *weights


def call(formula: Formula, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights, others: tuple, save: bool) -> Any:
    """The operator's results; save: whether gradients are wanted."""
    if save and functional._plain_eager(x.device.type):
        return _Call.apply(formula, others, x, h0, c0, *weights)
    if save or torch.compiler.is_compiling():
        return formula.operator(x, h0, c0, list(weights), *others)
    with torch._C._AutoDispatchBelowAutograd():
        return formula.operator(x, h0, c0, list(weights), *others)
