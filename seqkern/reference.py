"""The cells and the layer in plain torch operations: the definition that every kernel is held to.

Nothing here is fast. Everything here is differentiable to any order, runs on every device and in every dtype that
torch's own operations support, and reads like the formulas in the documentation of `torch.nn.RNN`, `torch.nn.LSTM`
and `torch.nn.GRU`. It is the double backward of the fused operators, their fallback on devices and dtypes without a
kernel, and, run in float64, the oracle of the tests.

Shapes: T time, B batch, N rows of a packed sequence, I input, H hidden, P output (the projection's size where there
is one, else H), G gates, D directions.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class State(NamedTuple):
    """What a cell carries from step to step: the output h [B, P] and, for the LSTM, the cell state c [B, H]."""

    h: Tensor
    c: Tensor | None = None


def _rnn_tanh(gx: Tensor, gh: Tensor, state: State) -> State:
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return State(torch.tanh(gx + gh))


def _rnn_relu(gx: Tensor, gh: Tensor, state: State) -> State:
    """h' = max(0, W_ih x + b_ih + W_hh h + b_hh)."""
    return State(torch.relu(gx + gh))


def _lstm(gx: Tensor, gh: Tensor, state: State) -> State:
    """c' = f c + i g,  h' = o tanh(c'), with the gates stacked as i, f, g, o."""
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
    return State(torch.sigmoid(o) * torch.tanh(c), c)


def _gru(gx: Tensor, gh: Tensor, state: State) -> State:
    """n = tanh(x_n + r h_n),  h' = (1 - z) n + z h, with the gates stacked as r, z, n."""
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz, hn = gh.chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return State(n + z * (state.h - n))


class Cell(NamedTuple):
    gates: int  # weight matrices have gates * H rows
    saved: int  # elements per row and hidden unit that the forward kernel keeps for the backward kernel
    step: Callable[[Tensor, Tensor, State], State]  # from W_ih x + b_ih, W_hh h + b_hh (each [B, G*H]) and the state


CELLS = {
    "rnn_tanh": Cell(1, 0, _rnn_tanh),
    "rnn_relu": Cell(1, 0, _rnn_relu),
    "lstm": Cell(4, 5, _lstm),
    "gru": Cell(3, 4, _gru),
}


class Weights(NamedTuple):
    """The parameters of one direction."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None = None  # [G*H]
    b_hh: Tensor | None = None  # [G*H]
    w_hr: Tensor | None = None  # [P, H]: the LSTM's projection


def split_weights(weights: Sequence[Tensor], bidirectional: bool) -> list[Weights]:
    """Groups a flat list, in torch.nn's order, by direction. The list's length tells which parts are there."""
    directions = 2 if bidirectional else 1
    per, rest = divmod(len(weights), directions)
    if rest or per not in (2, 3, 4, 5):
        raise ValueError(
            f"weights must hold, for each of {directions} directions, w_ih, w_hh[, b_ih, b_hh][, w_hr], "
            f"got {len(weights)} tensors"
        )
    groups = [list(weights[d * per : (d + 1) * per]) for d in range(directions)]
    if per == 3:
        return [Weights(g[0], g[1], w_hr=g[2]) for g in groups]
    return [Weights(*g) for g in groups]


def _direction(x: Tensor, state: State, w: Weights, sizes: list[int], cell: Cell, reverse: bool):
    """One direction over the time-major rows x [N, I]; step t has sizes[t] rows, and sizes never grows with t."""
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    h, c, batch = state.h, state.c, state.h.size(0)
    outputs: list[Tensor] = [x.new_empty(0)] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        gx = linear(x[starts[t] : starts[t] + n], w.w_ih, w.b_ih)
        gh = linear(h[:n], w.w_hh, w.b_hh)
        new_h, new_c = cell.step(gx, gh, State(h[:n], None if c is None else c[:n]))
        if w.w_hr is not None:
            new_h = linear(new_h, w.w_hr)
        outputs[t] = new_h
        # Rows beyond n have ended (or, in reverse, have not begun): their state stays as it is.
        h = new_h if n == batch else torch.cat([new_h, h[n:]])
        if c is not None:
            c = new_c if n == batch else torch.cat([new_c, c[n:]])
    return torch.cat(outputs), State(h, c)


def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    cell: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One recurrent layer, one or two directions; the same arguments as the operator `seqkern::rnn_layer`.

    Args:
        x: [T, B, I], or with batch_sizes the data of a PackedSequence, [N, I].
        h0: [D, B, P]; None means zeros.
        c0: [D, B, H], for the LSTM only; None means zeros.
        weights: for each direction w_ih [G*H, I], w_hh [G*H, P], then b_ih and b_hh [G*H] or neither, then w_hr
            [P, H] or not.
        batch_sizes: [T] int64 on the CPU, never growing: how many rows each step has. None: x is not packed.
        cell: a key of CELLS.

    Returns:
        y [T, B, D*P] or [N, D*P], h_n [D, B, P], c_n [D, B, H] (LSTM; else an empty tensor).
    """
    groups = split_weights(weights, bidirectional)
    sizes = [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist()
    rows = x.reshape(-1, x.size(-1))
    hidden = groups[0].w_ih.size(0) // CELLS[cell].gates
    ys, hs, cs = [], [], []
    for d, w in enumerate(groups):
        h = x.new_zeros(sizes[0], w.w_hh.size(1)) if h0 is None else h0[d]
        c = None
        if cell == "lstm":
            c = x.new_zeros(sizes[0], hidden) if c0 is None else c0[d]
        y, last = _direction(rows, State(h, c), w, sizes, CELLS[cell], reverse=d == 1)
        ys.append(y)
        hs.append(last.h)
        cs.append(last.c)
    y = torch.cat(ys, -1)
    if batch_sizes is None:
        y = y.view(x.size(0), x.size(1), y.size(-1))
    return y, torch.stack(hs), torch.stack(cs) if cell == "lstm" else x.new_empty(0)
