"""What was built, what it runs on, and which engine a call would take."""

import json
import platform
from dataclasses import dataclass

import torch
from torch import nn

from . import functional, modules, options, reference

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

    engine: str  # cpu-generic, cpu-avx2, cpu-avx512, cpu-avx512_bf16, or reference
    why: str
    call: str  # the call that was planned, in words
    threads: int = 0  # that work on one layer; 0 where the engine does not say
    split: str = ""  # how they share it

    def __str__(self) -> str:
        lines = [f"{self.call}: engine {self.engine}", f"  {self.why}"]
        if self.threads:
            lines.append(f"  {self.threads} thread{'s' * (self.threads > 1)} a layer: {self.split}")
        return "\n".join(lines)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_split(module: nn.Module, batch: int, time: int, cell: str) -> tuple[int, str]:
    """Threads per layer and what each takes, as the engine itself plans the module's first layer."""
    bidirectional = getattr(module, "bidirectional", False)
    output = getattr(module, "proj_size", 0) or module.hidden_size
    ways = torch.ops.seqkern._cpu_plan(time, batch, module.input_size, module.hidden_size, output, cell, bidirectional)
    directions, rows, units = ways
    parts = [
        f"{n} {what}" for n, what in ((directions, "directions"), (rows, "row groups"), (units, "unit groups")) if n > 1
    ]
    return directions * rows * units, " x ".join(parts) or "not split"


def explain(module: nn.Module, batch: int, time: int, device: torch.device | str | None = None) -> Plan:
    """Which engine would run `module` on [time, batch] input, and why.

    Args:
        module: a seqkern layer or cell. The dtype is that of its weights, or autocast's where that is on.
        batch, time: B and T; a cell's time is 1 whatever is given.
        device: where to; by default where the weights are.

    Raises:
        TypeError: module is something else, for instance torch.nn's own layer.
        ValueError: batch is negative or time is not positive.
    """
    if not isinstance(module, _LAYERS + _CELLS):
        hint = "; seqkern.accelerate makes it one" if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else ""
        raise TypeError(f"explain: module must be a seqkern layer or cell, got {type(module).__name__}{hint}")
    if batch < 0 or time < 1:
        raise ValueError(f"explain: batch must be at least 0 and time at least 1, got batch={batch}, time={time}")
    is_cell = isinstance(module, _CELLS)
    cell, time = (module._cell, 1) if is_cell else (module.mode.lower(), time)
    weight = module.weight_hh if is_cell else module.weight_hh_l0
    device = torch.device(weight.device if device is None else device)
    dtype = weight.dtype
    if (
        torch.amp.is_autocast_available(device.type)
        and torch.is_autocast_enabled(device.type)
        and dtype != torch.float64
    ):
        dtype = torch.get_autocast_dtype(device.type)
    sizes = f"T={time} B={batch} I={module.input_size} H={module.hidden_size}"
    call = f"{type(module).__name__} {_short(dtype)} on {device}, {sizes}"
    if not functional.has_kernel(device, dtype):
        reason = f"device {device.type}" if device.type not in functional.KERNEL_DEVICES else f"dtype {_short(dtype)}"
        return Plan("reference", f"no kernel for {reason}: seqkern.reference, in plain torch operations", call)
    if lacking := options.unfused(getattr(module, "_settings", None)):
        why = f"no kernel for {lacking}: seqkern.reference, in plain torch operations"
        return Plan("reference", why, call)
    if device.type == "meta":
        return Plan("meta", "shapes only, nothing is computed", call)
    isa = torch.ops.seqkern._cpu_isa()
    why = f"fused kernels for {cell} in {_short(dtype)}, compiled for {isa}"
    return Plan(f"cpu-{isa}", why, call, *_cpu_split(module, batch, time, cell))


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
