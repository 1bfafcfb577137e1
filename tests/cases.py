"""Named problems, shared by the tests and the benches.

A `Case` is the shape of one recurrent layer together with the options that change which code runs. It knows nothing
of dtypes: `make_inputs` and `make_cotangents` draw its tensors, rounded to the dtype that is asked for, from a
generator seeded with the case's name, so that a case is the same problem in every process.

One alphabet: T time, B batch, I input, H hidden, P output (the projection's size where there is one, else H), G gates,
D directions, N rows of a packed sequence.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
CELLS = tuple(GATES)


@dataclass(frozen=True)
class Case:
    """One layer's problem. `lengths`, never growing, makes it a packed one and sets T and B."""

    name: str
    cell: str
    T: int = 5
    B: int = 3
    I: int = 6  # noqa: E741
    H: int = 8
    bidirectional: bool = False
    bias: bool = True
    proj: int = 0
    lengths: tuple[int, ...] | None = None
    h0: bool = True
    c0: bool = True
    layout: str = "contiguous"
    expanded_dy: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.cell not in GATES:
            raise ValueError(f"cell must be one of {CELLS}, got {self.cell!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {tuple(LAYOUTS)}, got {self.layout!r}")
        if self.proj and self.cell != "lstm":
            raise ValueError(f"proj is an option of the lstm, got {self.cell}")
        if self.lengths is not None:
            if list(self.lengths) != sorted(self.lengths, reverse=True) or self.lengths[-1] < 1:
                raise ValueError(f"lengths must be positive and never grow, got {self.lengths}")
            object.__setattr__(self, "T", self.lengths[0])
            object.__setattr__(self, "B", len(self.lengths))

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def G(self) -> int:
        return GATES[self.cell]

    @property
    def P(self) -> int:
        return self.proj or self.H

    @property
    def N(self) -> int:
        """Rows over all steps."""
        return self.T * self.B if self.lengths is None else sum(self.lengths)

    @property
    def batch_sizes(self) -> Tensor | None:
        """[T] int64, as `PackedSequence.batch_sizes`, or None."""
        if self.lengths is None:
            return None
        return torch.tensor([sum(length > t for length in self.lengths) for t in range(self.T)])

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters in torch.nn's order and by its names, without the layer's number."""
        rows = self.G * self.H
        one = {"weight_ih": (rows, self.I), "weight_hh": (rows, self.P)}
        if self.bias:
            one |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if self.proj:
            one["weight_hr"] = (self.P, self.H)
        return {name + suffix: shape for suffix in ("", "_reverse")[: self.D] for name, shape in one.items()}


class Inputs(NamedTuple):
    """The tensor arguments of `seqkern::rnn_layer`."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    batch_sizes: Tensor | None


def _batch_first(t: Tensor) -> Tensor:
    """x as a `batch_first` layer hands it over; the others as the first columns of wider tensors."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else pad(t, (0, 3))[..., :-3]


def _expanded(t: Tensor) -> Tensor:
    """x and the state repeat one row of the batch with stride 0. Weights do not come that way."""
    return t[:, :1].expand_as(t) if t.dim() == 3 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "batch_first": _batch_first,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: torch.stack([t, t.neg()], -1)[..., 0],
    "expanded": _expanded,
}


def _generator(case: Case, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{case.name}/{purpose}".encode()))


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Draws x and the state from a normal distribution, the weights as torch.nn does, times `case.scale`."""
    generator = _generator(case, "inputs")
    layout = LAYOUTS[case.layout]

    def normal(*shape: int) -> Tensor:
        return layout(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))

    def uniform(*shape: int) -> Tensor:
        bound = case.scale * case.H**-0.5
        return layout(torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator).to(dtype))

    x = normal(case.T, case.B, case.I) if case.lengths is None else normal(case.N, case.I)
    h0 = normal(case.D, case.B, case.P) if case.h0 else None
    c0 = normal(case.D, case.B, case.H) if case.c0 and case.cell == "lstm" else None
    return Inputs(x, h0, c0, [uniform(*shape) for shape in case.weight_shapes.values()], case.batch_sizes)


def make_cotangents(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """A random gradient for each output: y, h_n and, for the LSTM, c_n. One number for all with `expanded_dy`."""
    generator = _generator(case, "cotangents")
    steps = (case.T, case.B) if case.lengths is None else (case.N,)
    shapes = [(*steps, case.D * case.P), (case.D, case.B, case.P)]
    if case.cell == "lstm":
        shapes.append((case.D, case.B, case.H))
    cotangents = []
    for shape in shapes:
        drawn = torch.randn((1,) * len(shape) if case.expanded_dy else shape, generator=generator, dtype=torch.float64)
        cotangents.append(drawn.to(dtype).expand(shape))
    return cotangents


_RAGGED = (70, 55, 41, 40, 17, 3, 2, 1, 1)
_MANY_ROWS = tuple(9 - row // 8 for row in range(70))
_ALL, _PROJ = CELLS, ("lstm",)

# Every shape meets the LSTM or the GRU, every cell meets every kind of option; the full cross would only take longer.
_SHAPES: list[tuple[str, Sequence[str], dict]] = [
    ("t1_b1_h1", _ALL, {"T": 1, "B": 1, "I": 1, "H": 1}),
    ("t1_bidirectional", ("rnn_tanh", "lstm"), {"T": 1, "bidirectional": True}),
    ("h_below_vector", _ALL, {"H": 3}),
    ("h_tail", _ALL, {"B": 5, "H": 33}),
    ("h_16", ("lstm", "gru"), {"B": 6, "I": 16, "H": 16}),
    ("all_odd", ("rnn_relu", "gru"), {"T": 7, "B": 7, "I": 13, "H": 17}),
    ("input_1", ("rnn_tanh", "lstm"), {"I": 1, "H": 20}),
    ("odd_i", ("rnn_relu", "gru"), {"I": 37, "H": 16}),
    ("wide_input", ("rnn_tanh", "lstm"), {"I": 300, "H": 8}),
    ("long_t", _ALL, {"T": 130, "B": 2, "I": 3, "H": 9}),
    ("batch_gt_tile", _ALL, {"B": 67, "H": 20}),
    ("b_many_h_small", ("rnn_tanh", "lstm", "gru"), {"T": 3, "B": 300, "H": 4}),
    ("few_rows_many_units", _ALL, {"T": 4, "B": 2, "I": 16, "H": 384}),
    ("one_row", ("rnn_tanh", "gru"), {"T": 12, "B": 1, "I": 24, "H": 200}),
    ("rows_and_units", ("rnn_relu", "lstm", "gru"), {"T": 6, "B": 48, "I": 64, "H": 96}),
    ("zero_batch", _ALL, {"B": 0}),
    ("zero_batch_bidirectional", ("lstm", "rnn_relu"), {"B": 0, "bidirectional": True}),
    ("no_bias", _ALL, {"bias": False}),
    ("no_state", _ALL, {"h0": False, "c0": False}),
    ("no_c0", ("lstm",), {"c0": False}),
    ("no_h0", ("lstm",), {"h0": False}),
    ("noncontiguous", _ALL, {"layout": "transposed", "B": 4, "H": 18}),
    ("batch_first", ("lstm", "gru"), {"layout": "batch_first", "B": 4, "H": 18}),
    ("strided", ("rnn_tanh", "lstm", "gru"), {"layout": "strided", "H": 18}),
    ("expanded_x", ("rnn_relu", "gru"), {"layout": "expanded", "B": 6}),
    ("expanded_dy", _ALL, {"expanded_dy": True, "H": 18}),
    ("bidirectional", _ALL, {"bidirectional": True, "B": 5, "H": 10}),
    ("bidirectional_wide", ("lstm", "gru"), {"bidirectional": True, "B": 4, "I": 40, "H": 144}),
    ("bidirectional_bare", ("rnn_tanh", "gru"), {"bidirectional": True, "bias": False, "h0": False}),
    ("proj", _PROJ, {"H": 12, "proj": 5}),
    ("proj_1", _PROJ, {"H": 8, "proj": 1}),
    ("proj_tail", _PROJ, {"B": 5, "H": 33, "proj": 17, "bias": False}),
    ("proj_wide", _PROJ, {"B": 2, "H": 320, "proj": 96, "c0": False}),
    ("proj_bidirectional", _PROJ, {"H": 20, "proj": 7, "bidirectional": True}),
    ("proj_bare", _PROJ, {"H": 9, "proj": 4, "bias": False, "h0": False, "c0": False, "bidirectional": True}),
    ("packed", _ALL, {"lengths": (5, 4, 4, 2, 1), "H": 18}),
    ("packed_bidirectional", _ALL, {"lengths": (6, 4, 4, 3, 1), "bidirectional": True}),
    ("packed_equal", ("rnn_relu", "lstm"), {"lengths": (4, 4, 4)}),
    ("packed_one_row", ("rnn_tanh", "gru"), {"lengths": (6,), "bidirectional": True}),
    ("packed_batch_gt_tile", ("lstm", "gru"), {"lengths": _MANY_ROWS, "H": 20}),
    ("packed_ragged_long", ("rnn_tanh", "lstm", "gru"), {"lengths": _RAGGED, "H": 18, "bidirectional": True}),
    ("packed_wide", ("lstm", "gru"), {"lengths": (7, 3, 1), "I": 20, "H": 256, "bidirectional": True}),
    ("packed_bare", ("rnn_relu", "lstm"), {"lengths": (5, 3, 3, 1), "bias": False, "h0": False, "c0": False}),
    ("packed_noncontiguous", ("rnn_tanh", "gru"), {"lengths": (5, 3, 3, 1), "layout": "strided"}),
    ("packed_expanded_dy", ("rnn_relu", "lstm"), {"lengths": (5, 3, 3, 1), "expanded_dy": True}),
    ("packed_proj", _PROJ, {"lengths": (5, 3, 3, 1), "H": 18, "proj": 7}),
    ("packed_proj_bidirectional", _PROJ, {"lengths": (6, 3, 3, 1), "H": 18, "proj": 7, "bidirectional": True}),
    ("saturated", ("rnn_tanh", "lstm", "gru"), {"scale": 5.0, "T": 4, "H": 18}),
    ("near_zero", ("rnn_tanh", "lstm", "gru"), {"scale": 1e-3, "T": 3, "H": 18}),
]

CASES: dict[str, Case] = {
    f"{shape}-{cell}": Case(f"{shape}-{cell}", cell, **options) for shape, cells, options in _SHAPES for cell in cells
}
