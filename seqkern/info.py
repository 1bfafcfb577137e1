"""What was built, what it runs on, and which engine a call would take."""

import json
import platform
from dataclasses import dataclass

import torch
from torch import nn

from . import functional, modules, ops, options, reference

_LAYERS = (modules.RNN, modules.LSTM, modules.GRU)
_CELLS = (modules.RNNCell, modules.LSTMCell, modules.GRUCell)


def build() -> dict[str, str]:
    """What the extension was compiled as: version, hash of csrc/, torch, CUDA architectures ("" for none).

    A build that did not go through setup.py knows none of it.
    """
    unknown = {"version": "0+unknown", "csrc": "unknown", "torch": "unknown", "cuda_archs": ""}
    return unknown | json.loads(torch.ops.seqkern._build_info())


__version__ = build()["version"]


@dataclass(frozen=True)
class Plan:
    """Which engine runs a call, and why. `str()` is for people."""

    engine: str  # cpu-generic, cpu-avx2, cpu-avx512, cpu-avx512_bf16, cpu-amx, cuda-grid, cuda-step, or reference
    why: str
    call: str  # the call that was planned, in words
    threads: int = 0  # of the CPU that work on one layer; 0 where the engine does not say
    split: str = ""  # how they share it; on CUDA, the tiles

    def __str__(self) -> str:
        lines = [f"{self.call}: engine {self.engine}", f"  {self.why}"]
        if self.threads:
            lines.append(f"  {self.threads} thread{'s' * (self.threads > 1)} a layer: {self.split}")
        elif self.split:
            lines += [f"  {line}" for line in self.split.splitlines()]
        return "\n".join(lines)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_split(module: nn.Module, batch: int, time: int, cell: str) -> tuple[int, str, bool]:
    """Threads per layer, what each takes, and whether float32's products are a tile unit's, as the engine itself plans
    the module's first layer."""
    bidirectional = getattr(module, "bidirectional", False)
    output = getattr(module, "proj_size", 0) or module.hidden_size
    ways = torch.ops.seqkern._cpu_plan(time, batch, module.input_size, module.hidden_size, output, cell, bidirectional)
    directions, rows, units, tiles = ways
    parts = [
        f"{n} {what}" for n, what in ((directions, "directions"), (rows, "row groups"), (units, "unit groups")) if n > 1
    ]
    return directions * rows * units, " x ".join(parts) or "not split", bool(tiles)


def _cuda_plan(
    module: nn.Module, call: str, shape: tuple[int, int, str, torch.dtype], device: torch.device, special: str
) -> Plan:
    """What the CUDA planner says of the module's first layer, forward and backward.

    special: options whose cells have kernels of their own, in words.
    """
    batch, time, cell, dtype = shape
    if not torch.cuda.is_available():
        why = f"no kernel for device {device.type}: built for {build()['cuda_archs']}, but torch finds no GPU here"
        return Plan("reference", why, call)
    index = torch.cuda.current_device() if device.index is None else device.index
    why = f"fused kernels for {cell} in {_short(dtype)} on {torch.cuda.get_device_name(index)}"
    if special:
        return Plan("cuda-step", f"{why}; {special}: the recurrence, step by step, and torch's products", call)
    bidirectional = getattr(module, "bidirectional", False)
    sizes = [time, batch, module.hidden_size, getattr(module, "proj_size", 0) or module.hidden_size]
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"
    lines, engines = [], []
    arguments = (sizes, cell, _short(dtype), tf32, bidirectional)
    for name, backward in (("forward", False), ("backward", True)):
        settings = getattr(module, "_settings", None)
        with_options = options.in_kernels(settings, module.training, backward)
        norms = backward and options.clips_norms(settings)
        p = json.loads(torch.ops.seqkern._cuda_plan(*arguments, backward, index, with_options, norms))
        engines.append(p["engine"])
        line = f"{name}: {p['why']}"
        if p["engine"] == "grid":
            line += (
                f"; {p['directions'] * p['tiles'] * p['ctas']} blocks of {p['threads']} threads: {p['directions']} "
                f"directions x {p['tiles']} batch tiles of {p['batch_tile']} rows x {p['ctas']} blocks of "
                f"{p['units_per_cta']} units, {p['shared_bytes'] / 1024:.0f} KiB of shared memory each"
            )
        lines.append(line)
    return Plan(f"cuda-{engines[0]}", why, call, split="\n".join(lines))


def _placed(weight: torch.Tensor, device: torch.device | str | None) -> tuple[torch.device, torch.dtype]:
    """Where a call would run, and in which dtype under autocast as it is now."""
    device = torch.device(weight.device if device is None else device)
    dtype = weight.dtype
    if (
        torch.amp.is_autocast_available(device.type)
        and torch.is_autocast_enabled(device.type)
        and dtype != torch.float64
    ):
        dtype = torch.get_autocast_dtype(device.type)
    return device, dtype


def _sequences(module: nn.Module, batch: int, time: int, device: torch.device | str | None) -> Plan | None:
    from .seq2seq import plans  # which knows this module

    weight = next(module.parameters(), None)
    return None if weight is None else plans.plan(module, batch, time, *_placed(weight, device))


def explain(module: nn.Module, batch: int, time: int, device: torch.device | str | None = None) -> Plan:
    """Which engine would run `module` on [time, batch] input, and why.

    Args:
        module: a seqkern layer or cell, or a `Decoder` or `Seq2Seq` of seqkern.seq2seq. The dtype is that of its
            weights, or autocast's where that is on.
        batch, time: B and T; a cell's time is 1 whatever is given, a decoder's that of the target.
        device: where to; by default where the weights are.

    Raises:
        TypeError: module is something else, for instance torch.nn's own layer.
        ValueError: batch is negative or time is not positive.
    """
    if batch < 0 or time < 1:
        raise ValueError(f"explain: batch must be at least 0 and time at least 1, got batch={batch}, time={time}")
    if not isinstance(module, _LAYERS + _CELLS):
        if isinstance(module, nn.Module) and (found := _sequences(module, batch, time, device)):
            return found
        hint = "; seqkern.accelerate makes it one" if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else ""
        raise TypeError(
            f"explain: module must be a seqkern layer, cell, Decoder or Seq2Seq, got {type(module).__name__}{hint}"
        )
    is_cell = isinstance(module, _CELLS)
    cell, time = (module._cell, 1) if is_cell else (module.mode.lower(), time)
    weight = module.weight_hh if is_cell else module.weight_hh_l0
    device, dtype = _placed(weight, device)
    sizes = f"T={time} B={batch} I={module.input_size} H={module.hidden_size}"
    call = f"{type(module).__name__} {_short(dtype)} on {device}, {sizes}"
    if not functional.has_kernel(device, dtype):
        reason = f"device {device.type}" if device.type not in functional.KERNEL_DEVICES else f"dtype {_short(dtype)}"
        if device.type == "cuda" and not ops.BUILT_WITH_CUDA:
            reason += " in this build (with a CUDA toolkit and a CUDA build of torch, SEQKERN_CUDA=1 builds it)"
        return Plan("reference", f"no kernel for {reason}: seqkern.reference, in plain torch operations", call)
    settings, projected = getattr(module, "_settings", None), bool(getattr(module, "proj_size", 0))
    if lacking := options.unfused(settings, device.type, projected):
        why = f"no kernel for {lacking}: seqkern.reference, in plain torch operations"
        return Plan("reference", why, call)
    if device.type == "meta":
        return Plan("meta", "shapes only, nothing is computed", call)
    special = options.by_rows(settings, device.type)
    if device.type == "cuda":
        return _cuda_plan(module, call, (batch, time, cell, dtype), device, special)
    isa = torch.ops.seqkern._cpu_isa()
    why = f"fused kernels for {cell} in {_short(dtype)}, compiled for {isa}"
    if special:
        return Plan(f"cpu-{isa}", f"{why}; {special}: the recurrence, by rows of the batch, and torch's products", call)
    threads, split, tiles = _cpu_split(module, batch, time, cell)
    if isa == "amx" and dtype == torch.float32:
        why += "; products on the tile unit forward, on vectors backward" if tiles else "; products on vectors"
    return Plan(f"cpu-{isa}", why, call, threads, split)


def report() -> str:
    """The text of `python -m seqkern info`."""
    built = build()
    devices = [f"cpu ({platform.machine()}, {platform.processor() or 'model not reported'})"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    rows = {
        "seqkern": f"{built['version']}, csrc {built['csrc']}",
        "cpu isa": f"{torch.ops.seqkern._cpu_isa()} (this CPU runs {torch.ops.seqkern._cpu_isas()})",
        "threads": f"{torch.get_num_threads()}",
        "torch": f"{torch.__version__} (built against {built['torch']})",
        "cuda archs": built["cuda_archs"] or "none",
        "devices": ", ".join(devices),
        "python": platform.python_version(),
        "cells": ", ".join(reference.CELLS),
    }
    return "\n".join(f"{name:<11} {value}" for name, value in rows.items())
