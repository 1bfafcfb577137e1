"""The `step` engine's options run on the host, beside the reference in float64 and in the dtype itself."""

import dataclasses
import zlib
from unittest import mock

import host_operator
import torch
from cases import Case, Inputs, make_inputs
from oracle import distance, fault
from torch import Tensor

from seqkern import reference
from seqkern.reference import Options

MASKS = ("keep", "h_mask", "zone_h", "zone_c")


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def make_options(case: Case, dtype: torch.dtype, names: str) -> Options:
    """Options drawn for a case; names: of some of them, with spaces between."""
    g = torch.Generator().manual_seed(zlib.crc32(f"{case.name}/{names}".encode()))
    wanted, o = set(names.split()), {}

    def dropped(*shape: int, p: float, value: float = 1.0) -> Tensor:
        return (torch.rand(shape, generator=g) < p).to(dtype) * value

    if "keep" in wanted:
        o["keep"] = (torch.randint(0, 4, (case.N,), generator=g).clamp(max=2) / 2).to(wide(dtype))  # 0, 1/2, 1, 1
    if "lengths" in wanted:
        drawn = torch.randint(0, case.T + 1, (case.B,), generator=g)
        o["lengths"] = torch.cat([torch.tensor([0, case.T]), drawn[2:]])[torch.randperm(case.B, generator=g)]
    if "h_mask" in wanted:
        o["h_mask"] = dropped(case.D, case.B, case.P, p=0.7, value=1 / 0.7)
    for name, width in (("zone_h", case.P), ("zone_c", case.H)):
        if name == "zone_c" and case.cell != "lstm":
            continue
        if "zone" in wanted:
            o[name] = dropped(case.N, case.D * width, p=0.3)
        if "zone_eval" in wanted:
            o[name] = torch.full((1, case.D * width), 0.3, dtype=dtype)
    if "clip" in wanted:
        o["clip_value"] = 0.25
    if "clip_norm" in wanted:
        o["clip_norm"] = 0.5
    return Options(**o)


def cast(o: Options, dtype: torch.dtype) -> Options:
    masks = {n: getattr(o, n) for n in MASKS}
    return dataclasses.replace(o, **{n: None if m is None else m.to(dtype) for n, m in masks.items()})


def cotangents_of(case: Case, dtype: torch.dtype, with_c: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(zlib.crc32(f"{case.name}/cotangents".encode()))
    steps = (case.T, case.B) if case.lengths is None else (case.N,)
    shapes = {"y": (*steps, case.D * case.P), "h_n": (case.D, case.B, case.P)}
    if case.cell == "lstm":
        shapes["c_n"] = (case.D, case.B, case.H)
        if with_c:
            shapes["c_all"] = (*steps, case.D * case.H)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def evaluate(case: Case, inputs: Inputs, cotangents: dict[str, Tensor], o: Options) -> dict[str, Tensor]:
    """The reference's outputs and gradients, by the names of `run`; and `flow` from hooks on its states."""

    class Watcher:
        def __init__(self):
            self.squares = torch.zeros(2, case.D, case.N, dtype=wide(inputs.x.dtype))

        def on(self, which: int, d: int, rows: slice, state: Tensor) -> None:
            def hook(grad: Tensor) -> None:
                self.squares[which, d, rows] = grad.to(self.squares.dtype).square().sum(-1)

            if state.requires_grad:
                state.register_hook(hook)

    watcher = Watcher()
    o = dataclasses.replace(o, watcher=watcher)
    x, h0, c0 = (None if t is None else t.detach().requires_grad_() for t in inputs[:3])
    weights = [w.detach().requires_grad_() for w in inputs.weights]
    found = reference.layer_with(o, x, h0, c0, weights, inputs.batch_sizes, case.cell, case.bidirectional)
    found = {name: t for name, t in zip(("y", "h_n", "c_n", "c_all"), found, strict=True) if name in cotangents}
    leaves = {"x": x, "h0": h0, "c0": c0} | dict(zip(case.weight_shapes, weights, strict=True))
    leaves = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(
        list(found.values()), list(leaves.values()), [cotangents[n] for n in found],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    found = {n: t.detach() for n, t in found.items()}
    return found | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)} | {"flow": watcher.squares}


def run(
    case: Case, inputs: Inputs, cotangents: dict[str, Tensor], o: Options, seed: int = 1, device: dict | None = None
) -> dict[str, Tensor]:
    """Outputs, all gradients and `flow` of the kernels on the host, each launch's threads in an order from `seed`.

    device: to plan for; None: the step engine.
    """
    masks, last = [getattr(o, n) for n in MASKS], (o.lengths, o.clip_norm)
    begin = (*inputs, *masks, o.clip_value)
    with mock.patch.multiple(host_operator, SEED=seed, DEVICE=device):
        outputs = host_operator.option_layer(*begin, case.cell, case.bidirectional, "c_all" in cotangents, True, *last)
        *found, c_all, reserve = outputs
        given = [cotangents.get(n) for n in ("y", "h_n", "c_n", "c_all")]
        dx, dh0, dc0, dweights, flow = host_operator.option_layer_backward(
            *given, *begin, found[0], c_all, reserve, case.cell, case.bidirectional, True, True, True, *last
        )
    results = dict(zip(("y", "h_n", "c_n"), found, strict=True)) | {"c_all": c_all, "dx": dx, "dh0": dh0, "dc0": dc0}
    absent = {"dc0", "c_n"} if case.cell != "lstm" else set()
    absent |= {f"d{n}" for n in ("h0", "c0") if getattr(inputs, n) is None} | {"c_all"} - cotangents.keys()
    results = {n: t for n, t in results.items() if n not in absent}
    return results | {f"d{n}": t for n, t in zip(case.weight_shapes, dweights, strict=True)} | {"flow": flow.sum(-1)}


def outcome(case: Case, dtype: torch.dtype, names: str, spoil=None, device: dict | None = None) -> list[str]:
    """What is wrong with a run, a line for each tensor. names: of options, and `states` for c of every step.

    spoil(inputs, options): changes what the kernels alone are given.
    """
    o = make_options(case, dtype, names)
    inputs, cotangents = make_inputs(case, dtype), cotangents_of(case, dtype, "states" in names.split())
    right = evaluate(case, in_dtype(inputs, torch.float64), {n: t.double() for n, t in cotangents.items()},
                     cast(o, torch.float64))  # fmt: skip
    low = torch.float32 if dtype == torch.float64 else dtype
    near = evaluate(case, in_dtype(inputs, low), {n: t.to(low) for n, t in cotangents.items()}, cast_keep(o, low))
    shrink = torch.finfo(dtype).eps / torch.finfo(low).eps
    if spoil is not None:
        inputs = spoil(inputs, o)
    lines = []
    for name, got in run(case, inputs, cotangents, o, device=device).items():
        wrong = fault(got, right[name], shrink * distance(near[name], right[name]))
        if wrong:
            lines.append(f"{case.name} {dtype} {names}: {name} {wrong}")
    return lines


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    x, h0, c0 = (None if t is None else t.to(dtype) for t in inputs[:3])
    return Inputs(x, h0, c0, [w.to(dtype) for w in inputs.weights], inputs.batch_sizes)


def cast_keep(o: Options, dtype: torch.dtype) -> Options:
    """The masks in dtype, keep in the type that its sums are in."""
    o = cast(o, dtype)
    return o if o.keep is None else dataclasses.replace(o, keep=o.keep.to(wide(dtype)))
