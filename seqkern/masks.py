"""Random masks from a counter: element n of a mask depends on the seed, the stream and n alone, so that it is the same
on every device, in every split over threads, and when backward asks for it again.

The bits are two rounds of a 32-bit integer hash (xor of a shift, times an odd number, twice; Wellons' lowbias32
constants), the first over the low half of n, the second over the high half, each with a key that is a hash of the
seed's halves and the stream.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops

_WORD = 0xFFFFFFFF
_KERNEL_DEVICES = frozenset({"cpu", "cuda"} if ops.BUILT_WITH_CUDA else {"cpu"})
_KERNEL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A seed, [1] int64 on `device`, from `generator` or torch's own for the generator's device (default: the CPU)."""
    source = torch.device("cpu") if generator is None else generator.device
    return torch.randint(2**63 - 1, (1,), generator=generator, device=source).to(device, non_blocking=True)


def _hash(x: Tensor) -> Tensor:
    """32-bit words in int64; a product may wrap, its low 32 bits are right all the same."""
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


def bits(seed: Tensor, stream: int | Tensor, count: int) -> Tensor:
    """[count] int64 in [0, 2^32): the definition that the kernels are held to. stream: a number, or [1] int64."""
    key = _hash(_hash(_hash(seed & _WORD) ^ (seed >> 32 & _WORD)) + stream & _WORD)
    n = torch.arange(count, device=seed.device)
    return _hash(_hash(n & _WORD ^ key) + (n >> 32) + key & _WORD)


def bernoulli(like: Tensor, size: Sequence[int], seed: Tensor, stream: int, p: float, value: float = 1.0) -> Tensor:
    """A tensor of `like`'s dtype and device that is `value` with probability p and else 0.

    Args:
        size: its shape.
        seed: [1] int64 on the same device.
        stream: tells masks from one seed apart.
        p: in [0, 1]; rounded to a multiple of 2^-32.
    """
    if like.device.type in _KERNEL_DEVICES and like.dtype in _KERNEL_DTYPES:
        return torch.ops.seqkern._bernoulli(like.detach(), size, seed, stream, p, value)
    count = torch.Size(size).numel()
    return torch.where(bits(seed, stream, count) < round(p * 2**32), value, 0.0).to(like.dtype).view(size)
