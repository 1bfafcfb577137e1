"""The cells and the layer in plain torch operations: the definition that every kernel is held to.

Nothing here is fast. Everything here is differentiable to any order, runs on every device and in every dtype that
torch's own operations support, and reads like the formulas in the documentation of `torch.nn.RNN`, `torch.nn.LSTM`
and `torch.nn.GRU`. It is the double backward of the fused operators, their fallback on devices and dtypes without a
kernel, and, run in float64, the oracle of the tests.

Shapes: T time, B batch, N rows of a packed sequence, I input, H hidden, P output (the projection's size where there
is one, else H), G gates, D directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear


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


class Extra(NamedTuple):
    """The parameters of one direction that torch.nn's layers do not have."""

    peephole: Tensor | None = None  # [3*H] for i, f, o; [2*H] for i, o where the gates are coupled
    gain_x: Tensor | None = None  # [G*H], of the layer normalisation of W_ih x
    gain_h: Tensor | None = None  # [G*H], of W_hh h
    gain_c: Tensor | None = None  # [H], of the LSTM's c, and its bias
    bias_c: Tensor | None = None  # [H]


@dataclass(frozen=True)
class Options:
    """What a layer does beyond torch.nn's, one call's worth; the defaults leave each out.

    In the order in which they act on a step, with h and c the state that the step before left:

    keep: [N], multiplies h and c: 0 starts the row anew, and stops its gradient there. Rows as in x.
    clip_value, clip_norm: the gradients with respect to these h and c, each on its own, are clamped to +-clip_value, or
        a row of them scaled down to the norm clip_norm, on their way to the step before. Forward is left alone.
    h_mask: [D, B, P], multiplies h on its way into W_hh, the same at every step.
    coupled, hard_sigmoid, reset_before, extra: another cell; see `_lstm_variant` and `_gru_variant`.
    zone_h, zone_c: [N or 1, D*P] and [N or 1, D*H], the share of the old h and c in the new: z old + (1 - z) new.
    lengths: [B] int64, not with batch_sizes: from step lengths[b] on, row b's output is 0 and its state stays; the
        reverse direction begins at step lengths[b] - 1.
    """

    keep: Tensor | None = None
    clip_value: float = 0.0
    clip_norm: float = 0.0
    h_mask: Tensor | None = None
    coupled: bool = False
    hard_sigmoid: bool = False
    reset_before: bool = False
    extra: Sequence[Extra] = ()
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None
    lengths: Tensor | None = None
    watcher: Any = None  # a `watch.Hooks`: takes the norms of the states' gradients

    @property
    def variant(self) -> bool:
        """Whether the cell is another than torch.nn's."""
        return self.coupled or self.hard_sigmoid or self.reset_before or bool(self.extra)


NONE = Options()


def _normal(v: Tensor, gain: Tensor | None) -> Tensor:
    """gain (v - mean) / sqrt(variance + 1e-5) over the last dimension; v itself without a gain."""
    return v if gain is None else layer_norm(v, v.shape[-1:]) * gain


def _hard_sigmoid(v: Tensor) -> Tensor:
    """As torch's, whose derivative in float64 is a float32's 1/6."""
    return (v / 6 + 0.5).clamp(0, 1)


def _lstm_variant(gx: Tensor, gh: Tensor, state: State, o: Options, e: Extra) -> State:
    """The LSTM with any of: peepholes, i += p_i c, f += p_f c, o += p_o c' before the sigmoid (Gers and Schmidhuber
    2000); coupled gates, f = 1 - i, stacked as i, g, o (Greff et al. 2017); clamp(v / 6 + 1/2, 0, 1) in place of the
    sigmoid; layer normalisation, h' = o tanh(gain_c LN(c') + bias_c) (Ba et al. 2016)."""
    sigmoid = _hard_sigmoid if o.hard_sigmoid else torch.sigmoid
    gates = gx + gh
    i, *f, g, out = gates.chunk(3 if o.coupled else 4, -1)
    p_i, *p_f, p_out = [0] * 3 if e.peephole is None else e.peephole.view(2 if o.coupled else 3, -1)
    i = sigmoid(i + p_i * state.c)
    f = 1 - i if o.coupled else sigmoid(f[0] + p_f[0] * state.c)
    c = f * state.c + i * torch.tanh(g)
    out = out + p_out * c
    read = c if e.gain_c is None else _normal(c, e.gain_c) + e.bias_c
    return State(sigmoid(out) * torch.tanh(read), c)


def _gru_variant(gx: Tensor, gh: Tensor, state: State, o: Options, product: Callable[[Tensor], Tensor]) -> State:
    """The GRU with hard sigmoids, or with the reset gate before the product, n = tanh(x_n + W_hn (r h) + b_hn) (Cho et
    al. 2014), or both. gh holds W_hh h + b_hh, of which the latter takes r and z; product(v) is W_hn v + b_hn."""
    sigmoid = _hard_sigmoid if o.hard_sigmoid else torch.sigmoid
    x_r, x_z, x_n = gx.chunk(3, -1)
    h_r, h_z, h_n = gh.chunk(3, -1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = torch.tanh(x_n + (product(r * state.h) if o.reset_before else r * h_n))
    return State((1 - z) * n + z * state.h)


class _ClipGradient(torch.autograd.Function):
    """x itself; its gradient is clamped to +-value, or each row of it scaled down to `norm`."""

    @staticmethod
    def forward(ctx, x, value, norm):
        ctx.value, ctx.norm = value, norm
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if ctx.value:
            grad = grad.clamp(-ctx.value, ctx.value)
        if ctx.norm:
            length = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
            grad = torch.where(length > ctx.norm, grad * (ctx.norm / length), grad)
        return grad, None, None


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


def _enter(state: State, rows: slice, o: Options) -> State:
    """The state that a step reads, from the one that the step before left."""

    def one(v: Tensor | None) -> Tensor | None:
        if v is None:
            return None
        if o.keep is not None:
            keep = o.keep[rows].unsqueeze(-1)
            v = torch.where(keep == 0, 0, v * keep.to(v.dtype))  # also where v is not a number
        return _ClipGradient.apply(v, o.clip_value, o.clip_norm) if o.clip_value or o.clip_norm else v

    return State(one(state.h), one(state.c))


def _mix(zone: Tensor | None, rows: slice, columns: slice, old: Tensor, new: Tensor) -> Tensor:
    if zone is None:
        return new
    z = (zone if zone.size(0) == 1 else zone[rows])[:, columns]
    return z * old + (1 - z) * new


def _project(v: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    if gain is None:
        return linear(v, weight, bias)
    normal = _normal(linear(v, weight), gain)
    return normal if bias is None else normal + bias


def _step(gx: Tensor, state: State, w: Weights, cell: Cell, o: Options, d: int) -> State:
    """One step's new state, from its projected input and the state that it reads."""
    e = o.extra[d] if o.extra else Extra()
    h = state.h if o.h_mask is None else state.h * o.h_mask[d, : state.h.size(0)]
    gh = _project(h, w.w_hh, w.b_hh, e.gain_h)
    if not o.variant:
        new = cell.step(gx, gh, state)
    elif cell is CELLS["lstm"]:
        new = _lstm_variant(gx, gh, state, o, e)
    else:
        last = slice(-w.w_hh.size(1), None)
        mask = 1 if o.h_mask is None else o.h_mask[d, : h.size(0)]
        new = _gru_variant(
            gx, gh, state, o, lambda v: linear(v * mask, w.w_hh[last], None if w.b_hh is None else w.b_hh[last])
        )
    return new if w.w_hr is None else State(linear(new.h, w.w_hr), new.c)


def _direction(gx: Tensor, state: State, w: Weights, sizes: list[int], cell: Cell, d: int, o: Options):
    """One direction, d = 0 or 1, over time-major rows of projected inputs, gx [N, G*H]; step t has sizes[t] rows, which
    never grow with t.

    Returns h of every step [N, P], c of every step [N, H] or None, and the last state.
    """
    starts = list(accumulate(sizes, initial=0))
    # Split rather than sliced: the gradient of a slice is as large as the whole.
    inputs = gx.split(sizes)
    h, c, batch = state.h, state.c, state.h.size(0)
    hs: list[Tensor] = [gx.new_empty(0)] * len(sizes)
    cs = list(hs)
    p, width = slice(d * h.size(1), (d + 1) * h.size(1)), 0 if c is None else c.size(1)
    for t in reversed(range(len(sizes))) if d == 1 else range(len(sizes)):
        n = sizes[t]
        rows = slice(starts[t], starts[t + 1])
        before = _enter(State(h[:n], None if c is None else c[:n]), rows, o)
        new_h, new_c = _step(inputs[t], before, w, cell, o, d)
        new_h = _mix(o.zone_h, rows, p, before.h, new_h)
        if c is not None:
            new_c = _mix(o.zone_c, rows, slice(d * width, (d + 1) * width), before.c, new_c)
        hs[t], cs[t] = new_h, new_c
        if o.watcher is not None:
            o.watcher.on(0, d, rows, new_h)
            if c is not None:
                o.watcher.on(1, d, rows, new_c)
        if o.lengths is not None:
            inside = (o.lengths > t).unsqueeze(-1)
            hs[t], new_h = torch.where(inside, new_h, 0), torch.where(inside, new_h, h)
            if c is not None:
                cs[t], new_c = torch.where(inside, new_c, 0), torch.where(inside, new_c, c)
        # Rows beyond n have ended (or, in reverse, have not begun): their state stays as it is.
        h = new_h if n == batch else torch.cat([new_h, h[n:]])
        if c is not None:
            c = new_c if n == batch else torch.cat([new_c, c[n:]])
    return torch.cat(hs), None if c is None else torch.cat(cs), State(h, c)


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
    return layer_with(NONE, x, h0, c0, weights, batch_sizes, cell, bidirectional)[:3]


def layer_with(
    options: Options,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    cell: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer` with options; after its results, c of every step: [T, B, D*H] or [N, D*H] (LSTM; else empty)."""
    groups = split_weights(weights, bidirectional)
    sizes = [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist()
    rows = x.reshape(-1, x.size(-1))
    extra = options.extra or [Extra()] * len(groups)
    gx = [_project(rows, w.w_ih, w.b_ih, e.gain_x) for w, e in zip(groups, extra, strict=True)]
    y, h_n, c_n, c_all = recurrence(options, gx, h0, c0, groups, sizes, cell)
    lead = x.shape[:-1]
    return y.unflatten(0, lead), h_n, c_n, c_all.unflatten(0, lead) if cell == "lstm" else c_all


def recurrence(
    options: Options,
    gx: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    groups: Sequence[Weights],
    sizes: list[int],
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer_with` from each direction's projected inputs, [N, G*H]; y c of every step: [N, D*P], [N, D*H]."""
    hs, cs, last = [], [], []
    for d, w in enumerate(groups):
        h = gx[d].new_zeros(sizes[0], w.w_hh.size(1)) if h0 is None else h0[d]
        c = None
        if cell == "lstm":
            hidden = w.w_hh.size(0) // (3 if options.coupled else 4)
            c = gx[d].new_zeros(sizes[0], hidden) if c0 is None else c0[d]
        found = _direction(gx[d], State(h, c), w, sizes, CELLS[cell], d, options)
        for to, what in zip((hs, cs, last), found, strict=True):
            to.append(what)
    y, h_n = torch.cat(hs, -1), torch.stack([s.h for s in last])
    if cell != "lstm":
        return y, h_n, y.new_empty(0), y.new_empty(0)
    return y, h_n, torch.stack([s.c for s in last]), torch.cat(cs, -1)
