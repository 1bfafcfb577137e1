"""What the layers offer beyond torch.nn's: the settings, the checks, and the stack of layers that heeds them.

Shapes: L layers, D directions, T time, B batch, N rows of a packed sequence, I input, H hidden, P output. The formulas
stand in `seqkern.reference.Options`, which holds one layer's worth of all this, and in docs/options.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import functional, masks, option_ops, recompute, recurrence, reference
from .packing import Packing
from .reference import Extra, Options

# Streams of random masks from one seed: four for each layer and direction.
_H, _ZONE_H, _ZONE_C, _WEIGHT = range(4)


@dataclass(frozen=True)
class Settings:
    """What holds for every call of a layer. See `seqkern.modules` for the meaning of each."""

    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    grad_clip: tuple[str, float] | None = None
    layer_norm: bool = False
    peephole: bool = False
    coupled: bool = False
    hard_sigmoid: bool = False
    reset_before: bool = False
    recompute: int = 0

    @property
    def extra(self) -> bool:
        """Whether the cell has parameters that torch.nn's has not."""
        return self.layer_norm or self.peephole


DEFAULT = Settings()


def by_rows(settings: Settings | None, device: str) -> str:
    """The options set that `recurrence` takes and the device's layers do not, in words."""
    s = settings or DEFAULT
    found = {
        "layer_norm": s.layer_norm,
        "peephole": s.peephole,
        "coupled": s.coupled,
        "gate_activation='hard_sigmoid'": s.hard_sigmoid,
        "reset_after=False": s.reset_before,
        "grad_clip of norms": clips_norms(s) and device != "cuda",
    }
    return ", ".join(name for name, on in found.items() if on)


def unfused(settings: Settings | None, device: str, projected: bool) -> str:
    """The options set that no kernel of the device, which has kernels, covers, in words; the empty string for none."""
    s = settings or DEFAULT
    rows = by_rows(s, device)
    found = {
        rows + " with proj_size": bool(rows) and projected,
        "layer_norm with reset_after=False": s.layer_norm and s.reset_before,
    }
    return ", ".join(name for name, on in found.items() if on)


def in_kernels(settings: Settings | None, training: bool, backward: bool) -> bool:
    """Whether a pass of a layer built so has options for its kernels, without those that come with a call."""
    s = settings or DEFAULT
    return bool(any(s.zoneout) or (training and s.recurrent_dropout) or (backward and s.grad_clip))


def clips_norms(settings: Settings | None) -> bool:
    return settings is not None and settings.grad_clip is not None and settings.grad_clip[0] == "norm"


class Call(NamedTuple):
    """What comes with one call of a stack."""

    lengths: Tensor | None = None
    resets: Tensor | None = None  # [T, B], bool or floating
    all_states: bool = False
    generator: torch.Generator | None = None


class Stack(NamedTuple):
    """What is fixed about a stack of layers."""

    cell: str  # a key of reference.CELLS
    num_layers: int
    bidirectional: bool
    dropout: float  # between layers, also when not training
    training: bool
    settings: Settings
    extra: Sequence[Extra] = ()  # for each layer and direction


def probability(name: str, value: float, most: float = 1.0) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most or value == 1:
        raise ValueError(f"{name} must be a probability in [0, 1), got {value!r}")
    return float(value)


def make_settings(cell: str, **given) -> Settings:
    """Settings from what users write. Raises ValueError for a bad value, or for an option that the cell lacks."""
    lstm, gru = cell == "lstm", cell == "gru"
    known = {f.name for f in fields(Settings)} - {"reset_before", "hard_sigmoid"} | {"reset_after", "gate_activation"}
    if unknown := sorted(set(given) - known):
        raise TypeError(f"{cell}: unknown option {unknown[0]!r}")
    zoneout = given.get("zoneout", 0.0)
    pair = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, 0.0)
    if len(pair) != 2:
        raise ValueError(f"{cell}: zoneout must be a probability or a pair of them, (h, c), got {zoneout!r}")
    pair = (probability("zoneout", pair[0]), probability("zoneout", pair[1]))
    if pair[1] and not lstm:
        raise ValueError(f"{cell}: zoneout of a cell state is for the LSTM, got {zoneout!r}")
    for name in ("layer_norm", "peephole", "coupled"):
        if given.get(name) and not (lstm or (gru and name == "layer_norm")):
            raise ValueError(f"{cell}: {name} is an option of the LSTM{' and the GRU' * (name == 'layer_norm')}")
    gate = given.get("gate_activation", "sigmoid")
    if gate not in ("sigmoid", "hard_sigmoid"):
        raise ValueError(f"{cell}: gate_activation must be 'sigmoid' or 'hard_sigmoid', got {gate!r}")
    if gate != "sigmoid" and not (lstm or gru):
        raise ValueError(f"{cell}: gate_activation is an option of the LSTM and the GRU")
    if not given.get("reset_after", True) and not gru:
        raise ValueError(f"{cell}: reset_after is an option of the GRU")
    recompute = given.get("recompute", 0)
    if isinstance(recompute, bool) or not isinstance(recompute, int) or recompute < 0:
        raise ValueError(f"{cell}: recompute must be a number of steps, 0 for none, got {recompute!r}")
    return Settings(
        pair,
        probability("recurrent_dropout", given.get("recurrent_dropout", 0.0)),
        probability("weight_dropout", given.get("weight_dropout", 0.0)),
        _grad_clip(cell, given.get("grad_clip")),
        *(bool(given.get(name, False)) for name in ("layer_norm", "peephole", "coupled")),
        gate == "hard_sigmoid",
        not given.get("reset_after", True),
        recompute,
    )


def from_keywords(cell: str, shape: tuple[int, bool, float, bool], given: dict) -> tuple[Stack, Call]:
    """What `functional`'s keywords say. shape: num_layers, bidirectional, dropout, training."""
    names = {"lengths": "lengths", "resets": "resets", "return_all_states": "all_states", "generator": "generator"}
    call = Call(**{to: given[name] for name, to in names.items() if name in given})
    extra = given.get("extra", ())
    settings = make_settings(cell, **{n: v for n, v in given.items() if n not in names and n != "extra"})
    wanted = shape[0] * (2 if shape[1] else 1) if settings.extra else 0
    if len(extra) != wanted:
        raise ValueError(f"{cell}: extra must hold parameters for {wanted} layers and directions, got {len(extra)}")
    return Stack(cell, *shape, settings, extra), call


def _grad_clip(cell: str, given) -> tuple[str, float] | None:
    if given is None:
        return None
    kind, value = given if isinstance(given, (tuple, list)) and len(given) == 2 else ("value", given)
    if kind not in ("value", "norm") or isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(
            f"{cell}: grad_clip must be a positive number, ('value', number) or ('norm', number), got {given!r}"
        )
    return kind, float(value)


def keep_mask(cell: str, resets: Tensor, x: Tensor) -> Tensor:
    """[T, B] in x's dtype (float32 for 16-bit ones): what the state is multiplied by before each step."""
    wanted = x.shape[:2]
    if resets.shape != wanted:
        raise ValueError(f"{cell}: resets must be [T, B] = {list(wanted)}, got {list(resets.shape)}")
    if resets.dtype != torch.bool and not resets.is_floating_point():
        raise TypeError(f"{cell}: resets must be bool, or a floating keep-mask in [0, 1], got {resets.dtype}")
    if resets.device != x.device:
        raise ValueError(f"{cell}: resets must be on {x.device} as the input is, got {resets.device}")
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32
    if resets.dtype == torch.bool:
        return resets.logical_not().to(dtype)
    if resets.device.type == "cpu" and not functional.transformed() and not torch.compiler.is_compiling():
        outside = resets.detach()
        if outside.numel() and not (outside.min() >= 0 and outside.max() <= 1):  # also not for NaN
            raise ValueError(f"{cell}: a keep-mask must be in [0, 1], got {outside.min()} to {outside.max()}")
    return resets.to(dtype)


def check_lengths(cell: str, lengths: Tensor, x: Tensor) -> Tensor:
    """[B] int64 on x's device, checked; without waiting for a GPU."""
    steps, batch = x.shape[:2]
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"{cell}: lengths must be [B] = [{batch}], got {list(lengths.shape)}")
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"{cell}: lengths must be of an integer dtype, got {lengths.dtype}")
    lengths = lengths.to(x.device, torch.int64, non_blocking=True)
    if functional.transformed():
        return lengths
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        if batch and not (lengths.min() >= 0 and lengths.max() <= steps):
            raise ValueError(
                f"{cell}: lengths must be in [0, T] = [0, {steps}], got {int(lengths.min())} to {int(lengths.max())}"
            )
    elif lengths.device.type != "meta":
        torch._assert_async(((lengths >= 0) & (lengths <= steps)).all(), f"{cell}: lengths must be in [0, {steps}]")
    return lengths


class _Masks:
    """The random masks of one call; the rows of a packed sequence get those that they would have padded."""

    def __init__(self, stack: Stack, x: Tensor, generator: torch.Generator | None, packing: Packing | None):
        s = stack.settings
        random = stack.training and (any(s.zoneout) or s.recurrent_dropout or s.weight_dropout)
        self.seed = masks.draw_seed(generator, x.device) if random else None
        self.stack, self.packing = stack, packing

    def _draw(self, like: Tensor, size: Sequence[int], layer: int, purpose: int, p: float, value: float) -> Tensor:
        return masks.bernoulli(like, size, self.seed, layer * 8 + purpose, p, value)

    def zone(self, x: Tensor, layer: int, purpose: int, width: int) -> Tensor | None:
        """[N or 1, width]: 0 or 1 in training, else the probability."""
        p = self.stack.settings.zoneout[purpose == _ZONE_C]
        if not p:
            return None
        if not self.stack.training:
            return x.new_full((1, width), p)
        rows = x.shape[:-1].numel() if self.packing is None else self.packing.padded_rows
        mask = self._draw(x, (rows, width), layer, purpose, p, 1.0)
        return mask if self.packing is None else mask.index_select(0, self.packing.rows)

    def hidden(self, x: Tensor, layer: int, directions: int, batch: int, width: int) -> Tensor | None:
        """[D, B, P]: 0 with probability p, else 1 / (1 - p)."""
        p = self.stack.settings.recurrent_dropout
        if not p or not self.stack.training:
            return None
        padded = batch if self.packing is None else self.packing.padded_batch
        mask = self._draw(x, (directions, padded, width), layer, _H, 1 - p, 1 / (1 - p))
        return mask if self.packing is None else mask.index_select(1, self.packing.order)

    def weights(self, weights: Sequence[Tensor], layer: int, directions: int) -> Sequence[Tensor]:
        """W_hh with elements dropped, the others scaled up."""
        p = self.stack.settings.weight_dropout
        if not p or not self.stack.training:
            return weights
        dropped, per = list(weights), len(weights) // directions
        for d in range(directions):
            w = weights[d * per + 1]
            dropped[d * per + 1] = w * self._draw(w, w.shape, layer, _WEIGHT + 4 * d, 1 - p, 1 / (1 - p))
        return dropped


def _layer(
    stack: Stack,
    sequence: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    o: Options,
    all_states: bool,
) -> Sequence[Tensor]:
    """One layer on the operators or on the reference: y, h_n, c_n, and c of every step where all_states wants it."""
    functional.check_devices(stack.cell, sequence[0], (*sequence[1:], *weights, *(t for e in o.extra for t in e)))
    # A cell whose c of every step is not asked for, and none of whose options is set, is torch.nn's.
    if o == reference.NONE and not (all_states and stack.cell == "lstm"):
        return functional.run_layer(stack.cell, sequence, weights, batch_sizes, stack.bidirectional)
    if option_ops.covers(stack.cell, sequence, weights, o) and not functional.transformed():
        return option_ops.layer(stack.cell, sequence, weights, batch_sizes, stack.bidirectional, o, all_states)
    if recurrence.covers(sequence, weights, stack.bidirectional, o) and not functional.transformed():
        return recurrence.layer(stack.cell, sequence, weights, batch_sizes, stack.bidirectional, o, all_states)
    return functional.reference_layer(stack.cell, sequence, weights, batch_sizes, stack.bidirectional, o)


def run_stack(
    stack: Stack,
    sequence: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`functional.run_stack` with options.

    Args:
        sequence: x [T, B, I] or, with batch_sizes, [N, I]; h [L*D, B, P] and c [L*D, B, H], or None for zeros.

    Returns:
        y, h_n, c_n as there; with call.all_states h of every layer and step [L, T, B, D*P] ([L, N, D*P]) and, for the
        LSTM, c [L, T, B, D*H] ([L, N, D*H]), else None.
    """
    x, h, c = sequence
    cell = stack.cell
    if batch_sizes is None and x.size(0) == 0:
        raise RuntimeError(f"{cell}: Expected sequence length to be larger than 0 in RNN, got x {list(x.shape)}")
    if batch_sizes is not None and (call.lengths is not None or call.resets is not None):
        raise ValueError(f"{cell}: lengths and resets are for padded input, got a packed sequence")
    keep = None if call.resets is None else keep_mask(cell, call.resets, x).reshape(-1)
    lengths = None if call.lengths is None else check_lengths(cell, call.lengths, x)
    packing = None
    on_cpu = x.device.type == "cpu" and functional.has_kernel(x.device, x.dtype)
    if lengths is not None and on_cpu and not functional.takes_lengths(x.device) and not functional.transformed():
        packing = Packing(lengths, x.size(0))
        lengths = None
        if packing.whole:
            packing = None
        else:
            (x, h, c), batch_sizes = packing.pack(x, h, c), packing.batch_sizes
            keep = None if keep is None else keep.index_select(0, packing.rows)
    if lengths is not None and torch.is_grad_enabled():
        # What stands in the padding is multiplied by gradients of zero: it must be finite.
        padding = torch.arange(x.size(0), device=x.device).unsqueeze(1) >= lengths
        x = x.masked_fill(padding.unsqueeze(-1), 0)
    if packing is not None and packing.steps == 0:
        return _nothing(stack, packing, (x, *sequence[1:]), weights, call)
    y, h_n, c_n, hs, cs = _run_layers(stack, (x, h, c), weights, batch_sizes, call, keep, lengths, packing)
    if packing is not None:
        y = packing.unpack(y)
        h_n, c_n = packing.last(h_n, sequence[1]), packing.last(c_n, sequence[2]) if cell == "lstm" else c_n
        hs, cs = ([packing.unpack(t) for t in ts] for ts in (hs, cs))
    if not call.all_states:
        return y, h_n, c_n, None, None
    return y, h_n, c_n, torch.stack(hs), torch.stack(cs) if cell == "lstm" else None


def _run_layers(stack: Stack, sequence, weights, batch_sizes, call: Call, keep, lengths, packing):
    x, h, c = sequence
    settings, directions = stack.settings, 2 if stack.bidirectional else 1
    per = len(weights) // stack.num_layers
    batch = x.size(1) if batch_sizes is None else int(batch_sizes[0])
    h_in = [None] * stack.num_layers if h is None else h.split(directions)
    c_in = [None] * stack.num_layers if c is None else c.split(directions)
    random = _Masks(stack, x, call.generator, packing)
    common = Options(
        keep=keep,
        **{"clip_" + settings.grad_clip[0]: settings.grad_clip[1]} if settings.grad_clip else {},
        coupled=settings.coupled,
        hard_sigmoid=settings.hard_sigmoid,
        reset_before=settings.reset_before,
        lengths=lengths,
    )
    h_out, c_out, hs, cs = [], [], [], []
    for layer in range(stack.num_layers):
        if stack.dropout and stack.training and layer:
            x = torch.dropout(x, stack.dropout, True)
        w = random.weights(weights[layer * per : (layer + 1) * per], layer, directions)
        output, hidden = w[1].size(1), w[1].size(0) // (3 if settings.coupled else reference.CELLS[stack.cell].gates)
        o = replace(
            common,
            h_mask=random.hidden(x, layer, directions, batch, output),
            zone_h=random.zone(x, layer, _ZONE_H, directions * output),
            zone_c=random.zone(x, layer, _ZONE_C, directions * hidden),
            extra=tuple(stack.extra[layer * directions : (layer + 1) * directions]),
        )
        arguments = (stack, (x, h_in[layer], c_in[layer]), w, batch_sizes, o, call.all_states)
        if settings.recompute and torch.is_grad_enabled():
            x, h_n, c_n, *c_all = recompute.in_pieces(_layer, *arguments)
        else:
            x, h_n, c_n, *c_all = _layer(*arguments)
        h_out.append(h_n)
        c_out.append(c_n)
        if call.all_states:
            hs.append(x)
            if stack.cell == "lstm":
                cs.append(c_all[0])
    return x, torch.cat(h_out), torch.cat(c_out) if stack.cell == "lstm" else c_n, hs, cs


def _nothing(stack: Stack, packing: Packing, sequence, weights, call: Call):
    """The results where no sequence has a step: zeros, and the initial state."""
    x, h, c = sequence
    directions, lstm = 2 if stack.bidirectional else 1, stack.cell == "lstm"
    output, hidden = weights[1].size(1), weights[1].size(0) // (3 if stack.settings.coupled else 4)
    states = stack.num_layers * directions
    shape = (packing.padded_steps, packing.padded_batch)
    # An empty sum of everything: a loss on these results can still be differentiated.
    link = torch.cat([t.reshape(-1)[:0] for t in (x, *weights)]).sum()
    y = link.expand(*shape, directions * output).clone()
    h_n = x.new_zeros(states, shape[1], output) if h is None else h.clone()
    c_n = x.new_empty(0) if not lstm else x.new_zeros(states, shape[1], hidden) if c is None else c.clone()
    if not call.all_states:
        return y, h_n, c_n, None, None
    cs = x.new_zeros(stack.num_layers, *shape, directions * hidden) if lstm else None
    return y, h_n, c_n, x.new_zeros(stack.num_layers, *y.shape), cs
