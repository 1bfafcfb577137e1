"""Which algorithm cuDNN runs when torch.nn's recurrent layers call it.

cuDNN does not choose by itself: PyTorch names the algorithm, by a rule over shape, dtype and device that is restated
here from aten/src/ATen/native/cudnn/RNN.cpp (get_algo and the three use_* predicates) and aten/src/ATen/native/RNN.cpp
(use_cudnn), read at PyTorch's commit 00fc08aa of 2026. Forward and backward choose apart from each other.
"""

from dataclasses import dataclass

from torch import nn

from bench.cases import Case

STANDARD, PERSIST_STATIC, SMALL_H = "standard", "persist_static", "persist_static_small_h"
NATIVE = "native"  # cuDNN is not called: a GEMM and a pointwise kernel each step, from ATen
WORDS = {
    STANDARD: "per-step",
    PERSIST_STATIC: "persistent",
    SMALL_H: "persistent for small H",
    NATIVE: "none (ATen's own kernels)",
}


@dataclass(frozen=True)
class Gpu:
    major: int  # of the compute capability
    minor: int
    sms: int
    cudnn: int  # version as torch.backends.cudnn.version() gives it: 91300 is 9.13.0


def algorithm(case: Case, gpu: Gpu, forward: bool) -> str:
    """The algorithm of the forward or the backward pass of torch.nn's layer.

    torch.nn's forward in training mode chooses as in inference; only the backward call chooses for backward.
    """
    if case.dtype == "bf16" and (gpu.cudnn < 91300 or gpu.major < 8):
        return NATIVE
    if case.proj or case.packed:
        return STANDARD
    if case.dtype != "fp64" and case.hidden <= _small(case.cell, forward) and gpu.major >= 6:
        return SMALL_H
    if case.dtype == "fp16" and _persistent_shape(case) and _persistent_device(case, gpu):
        return PERSIST_STATIC
    return STANDARD


def algorithms(case: Case, gpu: Gpu) -> dict[str, str]:
    """By pass: forward, and in training backward."""
    found = {"forward": algorithm(case, gpu, True)}
    if case.passes == "train":
        found["backward"] = algorithm(case, gpu, False)
    return found


def _small(cell: str, forward: bool) -> int:
    """The largest H for which the small-H algorithm is chosen, whatever the layers and directions."""
    if cell == "rnn":
        return 384 if forward else 256
    return 192 if forward else 128


def _persistent_shape(case: Case) -> bool:
    one = case.layers == 1 and not case.bidirectional
    return one and case.hidden <= 1024 and case.hidden % 128 == 0 and case.input % 128 == 0


def _persistent_device(case: Case, gpu: Gpu) -> bool:
    b, t = case.batch, case.time
    if gpu.major == 7:
        if gpu.minor == 5:
            return False
        whole = b == 8 or (b % 16 == 0 and b not in (80, 112))
        return whole and any(t >= steps and b <= most for steps, most in ((40, 128), (20, 96), (10, 32)))
    if gpu.major < 8 or gpu.sms < 98 or gpu.minor == 6 or case.cell == "gru":
        return False
    if b % 8 or b > 128:
        return False
    return case.cell == "lstm" or b < 96 or case.hidden < 896


def flatten(layer: nn.RNNBase) -> bool:
    """Puts the layer's weights into the one buffer that cuDNN reads; returns whether they are there.

    torch.nn's own flatten_parameters does nothing for bfloat16 (torch.backends.cudnn.is_acceptable does not list it),
    and the weights are then copied together at every call. The comparison gives cuDNN the better of the two.
    """
    import torch
    from torch.backends.cudnn import rnn

    layer.flatten_parameters()
    weights = layer._flat_weights

    def together() -> bool:
        return len({w.untyped_storage().data_ptr() for w in weights}) == 1

    if together() or not weights[0].is_cuda:
        return together()
    count = 2 + 2 * layer.bias + (layer.proj_size > 0)
    mode = rnn.get_cudnn_mode(layer.mode)
    sizes = (layer.input_size, mode, layer.hidden_size, layer.proj_size, layer.num_layers)
    try:
        with torch.no_grad():
            torch._cudnn_rnn_flatten_weight(weights, count, *sizes, layer.batch_first, bool(layer.bidirectional))
    except RuntimeError:  # a cuDNN without this dtype
        return False
    return together()
