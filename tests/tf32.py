"""float32 whose products take operands rounded to TF32, in torch on the CPU: the error that tensor cores come with."""

from functools import lru_cache
from unittest import mock

import torch
from cases import Case, make_cotangents, make_inputs
from oracle import distance, evaluate, truth_beside
from torch import Tensor

from seqkern import reference


def rounded(t: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, ties away from zero; in t's dtype."""
    bits = t.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(t.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 sums, from operands as the tensor cores take them, in a's dtype."""
    if a.dtype == torch.float32:
        a, b = rounded(a), rounded(b)
    return (a.float() @ b.float()).to(a.dtype)


class Linear(torch.autograd.Function):
    """torch's own linear, had the CPU TF32."""

    @staticmethod
    def forward(ctx, x, w, b=None):
        ctx.save_for_backward(x, w)
        ctx.biased = b is not None
        return product(x, w.t()) + (0 if b is None else b)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return product(g, w), product(g.t(), x), g.sum(0) if ctx.biased else None


@lru_cache(maxsize=64)
def native(case: Case) -> dict[str, float]:
    """As the oracle's: the reference's own distance from the truth, by name, with such products."""
    with mock.patch.object(reference, "linear", lambda x, w, b=None: Linear.apply(x, w, b)):
        found = evaluate(reference.layer, case, make_inputs(case, torch.float32), make_cotangents(case, torch.float32))
    return {name: distance(found[name], want) for name, want in truth_beside(case, torch.float32, found).items()}
