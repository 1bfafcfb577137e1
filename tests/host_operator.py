"""The operators with options by the CUDA kernels run on the host, on CPU tensors: of whole layers, and `recurrence`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import host
import torch
from host_layer import CELL_NUMBERS, DTYPE_NUMBERS, named

from seqkern import recurrence as variants
from seqkern.reference import CELLS

PARTS = {2: "ih hh", 3: "ih hh hr", 4: "ih hh bias_ih bias_hh", 5: "ih hh bias_ih bias_hh hr"}
SEED = 1
TF32 = False
DEVICE = None  # what is planned for; None: the step engine
plans: list[dict] = []  # what the calls of the module returned


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _weight_names(weights, bidirectional: bool) -> list[str]:
    parts = PARTS[len(weights) // (2 if bidirectional else 1)].split()
    names = [part if "_" in part else f"weight_{part}" for part in parts]
    return [name + suffix for suffix in ("", "_reverse")[: 2 if bidirectional else 1] for name in names]


class _Call:
    """Sizes and arrays that both passes have."""

    def __init__(self, x, h0, c0, weights, batch_sizes, masks, bounds, cell, bidirectional):
        keep, h_mask, zone_h, zone_c, lengths = masks
        self.dtype, self.names = x.dtype, _weight_names(weights, bidirectional)
        self.D, self.H = 2 if bidirectional else 1, weights[0].size(0) // CELLS[cell].gates
        self.P = weights[1].size(1)
        self.steps = x.shape[:-1]
        sizes = [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist()
        self.B, self.N, self.lstm = sizes[0], sum(sizes), cell == "lstm"
        self.saved = CELLS[cell].saved
        one = [z is None or z.size(0) == 1 for z in (zone_h, zone_c)]
        self.sizes = {
            **{"T": len(sizes), "B": self.B, "N": self.N, "I": x.size(-1), "H": self.H, "P": self.P, "D": self.D},
            **{"packed": batch_sizes is not None, "batch_sizes": sizes, "tf32": TF32},
            **{"cell": CELL_NUMBERS[cell], "dtype": DTYPE_NUMBERS[x.dtype]},
            **{"clip_value": bounds[0], "clip_norm": bounds[1]},
            **{"zone_h_row": 0 if one[0] else self.D * self.P, "zone_c_row": 0 if one[1] else self.D * self.H},
        }
        self.given = {"x": x, "h0": h0, "c0": c0, "keep": keep, "h_mask": h_mask, "zone_h": zone_h, "zone_c": zone_c}
        self.given |= {"lengths": lengths} | dict(zip(self.names, weights, strict=True))

    def new(self, *shape: int, dtype=None) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype or self.dtype)

    def run(self, backward: bool, given: dict, to: dict) -> None:
        plans.append(host.load("step").layer(self.sizes, backward, named(given), named(to), SEED, DEVICE))


def option_layer(
    x, h0, c0, weights, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, cell, bidirectional, want_c, save,
    lengths=None, clip_norm=0.0, tf32=False,
):  # fmt: skip
    k = _Call(x, h0, c0, weights, batch_sizes, (keep, h_mask, zone_h, zone_c, lengths), (0.0, 0.0), cell, bidirectional)
    to = {"y": k.new(*k.steps, k.D * k.P), "h_n": k.new(k.D, k.B, k.P)}
    if k.lstm:
        to["c_n"] = k.new(k.D, k.B, k.H)
    if k.lstm and (want_c or (save and zone_c is not None)):
        to["c_all"] = k.new(*k.steps, k.D * k.H)
    if save and k.saved:
        to["reserve"] = k.new(k.D * k.N * k.saved * k.H)
    k.run(False, k.given, to)
    return tuple(to.get(name, x.new_empty(0)) for name in ("y", "h_n", "c_n", "c_all", "reserve"))


def option_layer_backward(
    dy, dh_n, dc_n, dc_all, x, h0, c0, weights, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, y, c_all,
    reserve, cell, bidirectional, need_dx, need_dw, want_flow, lengths=None, clip_norm=0.0, tf32=False,
):  # fmt: skip
    masks, bounds = (keep, h_mask, zone_h, zone_c, lengths), (clip_value, clip_norm)
    k = _Call(x, h0, c0, weights, batch_sizes, masks, bounds, cell, bidirectional)
    if k.saved and not reserve.numel():  # forward kept nothing
        forward = (x, h0, c0, weights, batch_sizes, *masks[:4], 0.0, cell, bidirectional, bool(c_all.numel()), True)
        y, _, _, c_all, reserve = option_layer(*forward, lengths)
    given = k.given | {"dy": dy, "dh_n": dh_n, "dc_n": dc_n, "dc_all": dc_all, "y": y}
    given |= {"c_all": c_all if c_all.numel() else None, "reserve": reserve if reserve.numel() else None}
    to = {"dh0": k.new(k.D, k.B, k.P)}
    if k.lstm:
        to["dc0"] = k.new(k.D, k.B, k.H)
    if need_dx:
        to["dx"] = k.new(*x.shape)
    dweights = [k.new(*w.shape) for w in weights] if need_dw else []
    to |= {f"d{name}": t for name, t in zip(k.names, dweights, strict=need_dw)} if need_dw else {}
    if want_flow:
        to["flow"] = k.new(2, k.D, k.N, max(k.H, k.P), dtype=_wide(x.dtype))
    k.run(True, given, to)
    none = x.new_empty(0)
    return to.get("dx", none), to["dh0"], to.get("dc0", none), dweights, to.get("flow", none)


class _Recurrence:
    """Sizes and arrays that both passes of `recurrence` have."""

    def __init__(self, gx, h0, c0, params, batch_sizes, masks, bounds, cell, flags, lengths):
        keep, h_mask, zone_h, zone_c = masks
        self.dtype, self.steps, self.lstm, self.flags = gx.dtype, gx.shape[:-1], cell == "lstm", flags
        self.D, self.width, self.H = params[0].shape
        sizes = [gx.size(1)] * gx.size(0) if batch_sizes is None else batch_sizes.tolist()
        self.B, self.N = sizes[0], sum(sizes)
        self.row = variants._saved(cell, flags, self.width, self.H)
        names = ["bias_n"] * bool(flags & variants.BIAS_N) + ["peephole"] * bool(flags & variants.PEEPHOLE)
        names += (["gain_h"] + ["gain_c", "bias_c"] * self.lstm) * bool(flags & variants.NORMAL)
        self.S = sum(p.size(1) for p in params[1:])
        bits = {"coupled": variants.COUPLED, "hard": variants.HARD, "reset_before": variants.RESET_BEFORE}
        bits |= {"normal": variants.NORMAL, "peephole": variants.PEEPHOLE}
        one = [z is None or z.size(0) == 1 for z in (zone_h, zone_c)]
        self.sizes = {
            **{"T": len(sizes), "B": self.B, "N": self.N, "H": self.H, "gates": self.width // self.H, "D": self.D},
            **{"S": self.S, "packed": batch_sizes is not None, "batch_sizes": sizes, "cell": CELL_NUMBERS[cell]},
            **{"dtype": DTYPE_NUMBERS[gx.dtype], "clip_value": bounds[0], "clip_norm": bounds[1]},
            **{name: bool(flags & bit) for name, bit in bits.items()},
            **{f"zone_{s}_row": 0 if is_one else self.D * self.H for s, is_one in zip("hc", one, strict=True)},
        }
        self.given = {"gx": gx, "h0": h0, "c0": c0, "keep": keep, "h_mask": h_mask, "zone_h": zone_h, "zone_c": zone_c}
        self.given |= {"lengths": lengths} | dict(zip(("w_hh", *names), params, strict=True))
        if not self.lstm:
            self.given["zone_c"] = None

    def new(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=self.dtype)

    def run(self, backward: bool, given: dict, to: dict) -> None:
        launches = host.load("recurrence").run(self.sizes, backward, named(given), named(to), SEED)
        plans.append({"engine": "recurrence", "launches": launches})


def recurrence(
    gx, h0, c0, params, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, clip_norm, cell, flags, want_c, save,
    lengths=None, tf32=False,
):  # fmt: skip
    masks = (keep, h_mask, zone_h, zone_c)
    k = _Recurrence(gx, h0, c0, params, batch_sizes, masks, (0.0, 0.0), cell, flags, lengths)
    to = {"y": k.new(*k.steps, k.D * k.H), "h_n": k.new(k.D, k.B, k.H)}
    if k.lstm:
        to["c_n"] = k.new(k.D, k.B, k.H)
    if k.lstm and want_c:
        to["c_all"] = k.new(*k.steps, k.D * k.H)
    if save:
        to |= {"read": k.new(k.D, k.N, k.H), "reserve": k.new(k.D, k.N, k.row)}
    k.run(False, k.given, to)
    return tuple(to.get(name, gx.new_empty(0)) for name in ("y", "h_n", "c_n", "c_all", "read", "reserve"))


def recurrence_backward(
    dy, dh_n, dc_n, dc_all, gx, h0, c0, params, batch_sizes, keep, h_mask, zone_h, zone_c, clip_value, clip_norm,
    read, reserve, cell, flags, lengths=None, tf32=False,
):  # fmt: skip
    masks = (keep, h_mask, zone_h, zone_c)
    k = _Recurrence(gx, h0, c0, params, batch_sizes, masks, (clip_value, clip_norm), cell, flags, lengths)
    given = k.given | {"dy": dy, "dh_n": dh_n, "read": read, "reserve": reserve}
    if k.lstm:
        given |= {"dc_n": dc_n, "dc_all": dc_all}
    to = {"dgx": k.new(*gx.shape), "dh0": k.new(k.D, k.B, k.H), "sums": k.new(k.B, k.D, k.S)}
    if k.lstm:
        to["dc0"] = k.new(k.D, k.B, k.H)
    if flags & variants.NORMAL or (cell == "gru" and not flags & variants.RESET_BEFORE):
        to["dgh"] = k.new(k.D, k.N, k.width)
    k.run(True, given, to)
    return tuple(to.get(name, gx.new_empty(0)) for name in ("dgx", "dgh", "dh0", "dc0", "sums"))


@contextmanager
def installed() -> Iterator[None]:
    """Inside, CPU tensors' calls of these operators run here."""
    library = torch.library.Library("seqkern", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are kernels already
        library.impl("option_layer", option_layer, "CPU", allow_override=True)
        library.impl("option_layer_backward", option_layer_backward, "CPU", allow_override=True)
        library.impl("recurrence", recurrence, "CPU", allow_override=True)
        library.impl("_recurrence_backward", recurrence_backward, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
