"""A whole layer of the CUDA engines run on the host, for the oracle: cuda/layer.h on csrc/testing's fibers."""

import host
import torch
from cases import Case, Inputs
from torch import Tensor

from seqkern.reference import CELLS

CELL_NUMBERS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3}
DTYPE_NUMBERS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
# A small GPU to plan for, so that small layers take several blocks of the grid engine.
DEVICE = {
    "sms": 12,
    "cc": 90,
    "shared_per_block": 232448,
    "shared_per_sm": 233472,
    "registers_per_sm": 65536,
    "threads_per_sm": 2048,
}


def array(t: Tensor):
    """The tensor's memory as NumPy sees it; 16-bit numbers as integers, NumPy has no bfloat16."""
    t = t.detach().contiguous()
    return (t.view(torch.int16) if t.element_size() == 2 else t).numpy()


def named(tensors: dict[str, Tensor | None]) -> dict:
    return {name: array(t) for name, t in tensors.items() if t is not None}


def sizes_of(case: Case, dtype: torch.dtype, tf32: bool) -> dict:
    batch_sizes = case.batch_sizes
    return {
        **{name: getattr(case, name) for name in "TBNIHPD"},
        "packed": batch_sizes is not None,
        "batch_sizes": [case.B] * case.T if batch_sizes is None else batch_sizes.tolist(),
        "cell": CELL_NUMBERS[case.cell],
        "dtype": DTYPE_NUMBERS[dtype],
        "tf32": tf32,
    }


def run(case: Case, inputs: Inputs, cotangents, seed: int, device: dict | None = None, tf32: bool = False):
    """Outputs and all gradients by the names of `oracle.evaluate`, and what the two calls returned.

    device: plans for it, as on a GPU; None: the step engine.
    """
    module, dtype = host.load("step"), inputs.x.dtype
    sizes, lstm = sizes_of(case, dtype, tf32), case.cell == "lstm"

    def new(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    given = {"x": inputs.x, "h0": inputs.h0, "c0": inputs.c0}
    given |= dict(zip(case.weight_shapes, inputs.weights, strict=True))
    steps = (case.T, case.B) if case.lengths is None else (case.N,)
    forward = {"y": new(*steps, case.D * case.P), "h_n": new(case.D, case.B, case.P)}
    if lstm:
        forward["c_n"] = new(case.D, case.B, case.H)
    saved = CELLS[case.cell].saved
    kept = {"reserve": new(case.D, case.N, saved, case.H)} if saved else {}
    plans = [module.layer(sizes, False, named(given), named(forward | kept), seed, device)]

    dy, *of_states = cotangents
    if case.expanded_dy:  # as it comes: strides of 0
        sizes |= {"dy_step": 0, "dy_row": 0}
        dy = dy.reshape(-1, case.D * case.P)[:1].clone()
    given |= forward | kept | {"dy": dy} | dict(zip(("dh_n", "dc_n"), of_states, strict=False))
    for name in ("h_n", "c_n"):
        given.pop(name, None)
    backward = {"dx": new(*inputs.x.shape), "dh0": new(case.D, case.B, case.P)}
    if lstm:
        backward["dc0"] = new(case.D, case.B, case.H)
    backward |= {f"d{name}": new(*shape) for name, shape in case.weight_shapes.items()}
    plans.append(module.layer(sizes, True, named(given), named(backward), seed, device))
    if inputs.h0 is None:
        backward.pop("dh0")
    if inputs.c0 is None:
        backward.pop("dc0", None)
    return forward | backward, plans
