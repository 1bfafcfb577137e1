"""MinGRU and MinLSTM (Feng et al. 2024, "Were RNNs all we needed?"): recurrent layers whose gates see the input alone.

Their state is linear in the state before, h_t = a_t h_{t-1} + b_t, so that pieces of time can be worked on at once: the
kernels split the units over threads or, where there are too few, time. Work and memory grow linearly with T.

    MinGRU:   z = sigmoid(W_z x + b_z), c = W_h x + b_h,                                 h' = (1 - z) h + z c
    MinLSTM:  f = sigmoid(W_f x + b_f), i = sigmoid(W_i x + b_i), c = W_h x + b_h,       h' = (f h + i c) / (f + i)

With `positive`, c is g(W_h x + b_h), g(v) = v + 1/2 for v >= 0, else sigmoid(v), as in the paper's version over
logarithms.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import functional, options

__all__ = ["MinGRU", "MinLSTM", "scan"]

GATES = {"mingru": 2, "mingru_positive": 2, "minlstm": 3, "minlstm_positive": 3}


def _gates(p: Tensor, cell: str) -> tuple[Tensor, Tensor]:
    """a and b of h_t = a_t h_{t-1} + b_t, [..., H] each, from p [..., G*H]."""
    name, _, positive = cell.partition("_")
    *gates, c = p.chunk(GATES[cell], -1)
    if positive:
        c = torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
    if name == "mingru":
        return torch.sigmoid(-gates[0]), torch.sigmoid(gates[0]) * c
    # f / (f + i) of two sigmoids as one, of the difference of their logarithms.
    u = nn.functional.logsigmoid(gates[0]) - nn.functional.logsigmoid(gates[1])
    return torch.sigmoid(u), torch.sigmoid(-u) * c


def reference(p: Tensor, h0: Tensor | None, keep: Tensor | None, cell: str) -> Tensor:
    """The definition, step by step: h [T, B, H] from p [T, B, G*H], h0 [B, H] or None, and keep [T, B] or None."""
    a, b = _gates(p, cell)
    h, found = torch.zeros_like(b[0]) if h0 is None else h0, []
    for t in range(p.size(0)):
        if keep is not None:
            k = keep[t].unsqueeze(-1)
            h = torch.where(k == 0, 0, h * k.to(h.dtype))
        h = a[t] * h + b[t]
        found.append(h)
    return torch.stack(found)


@torch.library.register_fake("seqkern::scan")
def _(p, h0, keep, cell):
    return p.new_empty(p.size(0), p.size(1), p.size(2) // GATES[cell])


@torch.library.register_fake("seqkern::scan_backward")
def _(dh, p, h0, keep, h, cell):
    return p.new_empty(p.shape), p.new_empty(p.size(1), p.size(2) // GATES[cell])


def _setup(ctx, inputs, output):
    p, h0, keep, ctx.cell = inputs
    ctx.save_for_backward(p, h0, keep, output)


def _backward(ctx, dh):
    p, h0, keep, h = ctx.saved_tensors
    dp, dh0 = torch.ops.seqkern.scan_backward(dh, p, h0, keep, h, ctx.cell)
    return dp, dh0 if ctx.needs_input_grad[1] else None, None, None


def _double_setup(ctx, inputs, output):
    dh, p, h0, keep, _, ctx.cell = inputs
    ctx.save_for_backward(dh, p, h0, keep)


def _double_backward(ctx, d_dp, d_dh0):
    """Differentiates the reference's backward; see `ops.second_derivatives` for the aliases."""
    dh, p, h0, keep = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()

    def alias(t):
        if t is None:
            return None
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad():
        dh, p, h0 = alias(dh), alias(p), alias(h0)
        start = p.new_zeros(p.size(1), p.size(2) // GATES[ctx.cell], requires_grad=True) if h0 is None else h0
        first = torch.autograd.grad(reference(p, start, keep, ctx.cell), (p, start), dh, create_graph=True)
        wanted = [t for t in (dh, p, h0) if t is not None]
        grads = torch.autograd.grad(first, wanted, (d_dp, d_dh0), create_graph=create_graph, allow_unused=True)
    d_dh, d_p, *rest = grads
    return d_dh, d_p, rest[0] if rest else None, None, None, None


torch.library.register_autograd("seqkern::scan", _backward, setup_context=_setup)
torch.library.register_autograd("seqkern::scan_backward", _double_backward, setup_context=_double_setup)


def scan(p: Tensor, h0: Tensor | None, keep: Tensor | None, cell: str) -> Tensor:
    """h [T, B, H] of one layer, on the kernels where there are any, else step by step.

    Args:
        p: [T, B, G*H], W x + b, gate by gate: z, c (MinGRU) or f, i, c (MinLSTM).
        h0: [B, H] in p's dtype; None means zeros.
        keep: [T, B], what the state is multiplied by before each step, in float32 (float64 where p is).
        cell: mingru, mingru_positive, minlstm or minlstm_positive.
    """
    grad = keep is not None and keep.requires_grad and torch.is_grad_enabled()
    if not functional.has_kernel(p.device, p.dtype) or functional.transformed() or grad:
        return reference(p, h0, keep, cell)
    return torch.ops.seqkern.scan(p, h0, keep, cell)


class _MinRNN(nn.Module):
    """What MinGRU and MinLSTM share.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, device, dtype: as in torch.nn.GRU.
        positive: the candidate is made positive. Default: False.

    Parameters, for layer k: weight_ih_l{k} [G*H, I or H] and bias_ih_l{k} [G*H].
    """

    _cell: str
    _gates: tuple[str, ...]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, *, positive: bool = False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be a positive int, got {value!r}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"{type(self).__name__}: dropout must be a probability in [0, 1], got {dropout!r}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.positive = bias, batch_first, dropout, positive
        rows = len(self._gates) * hidden_size
        for layer in range(num_layers):
            size = hidden_size if layer else input_size
            weight = nn.Parameter(torch.empty(rows, size, device=device, dtype=dtype))
            self.register_parameter(f"weight_ih_l{layer}", weight)
            biases = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
            self.register_parameter(f"bias_ih_l{layer}", biases)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(H), as torch.nn.GRU."""
        bound = 1 / math.sqrt(self.hidden_size)
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def extra_repr(self) -> str:
        shown = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "positive": False}
        more = "".join(f", {n}={getattr(self, n)}" for n, default in shown.items() if getattr(self, n) != default)
        return f"{self.input_size}, {self.hidden_size}{more}"

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y and the last state.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, or unbatched [T, I].
            hx: [L, B, H], or [L, H] for unbatched input; None means zeros.
            lengths, resets: as in seqkern.GRU.

        Returns:
            y [T, B, H] ([B, T, H], [T, H]) and h_n [L, B, H] ([L, H]).

        Raises:
            ValueError, TypeError: a shape or dtype does not fit.
        """
        name = type(self).__name__
        if input.dim() not in (2, 3) or input.size(-1) != self.input_size:
            raise ValueError(
                f"{name}: input must be 2-D or 3-D with last size {self.input_size}, got {list(input.shape)}"
            )
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        swap = batched and self.batch_first
        if not batched:
            if lengths is not None:
                raise ValueError(f"{name}: lengths are for batched input: shorten an unbatched one instead")
            resets = None if resets is None else resets.unsqueeze(-1)
            hx = None if hx is None else hx.unsqueeze(1)
        elif swap:
            x, resets = x.transpose(0, 1), None if resets is None else resets.transpose(0, 1)
        if x.size(0) == 0:
            raise RuntimeError(f"{name}: Expected sequence length to be larger than 0 in RNN, got {list(input.shape)}")
        wanted = (self.num_layers, x.size(1), self.hidden_size)
        if hx is not None and hx.shape != wanted:
            raise ValueError(f"{name}: hx must be [L, B, H] = {list(wanted)}, got {list(hx.shape)} (batch second)")
        y, h_n = self._run(x, hx, lengths, resets)
        if not batched:
            return y.squeeze(1), h_n.squeeze(1)
        return y.transpose(0, 1) if swap else y, h_n

    def _run(self, x: Tensor, hx: Tensor | None, lengths, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        keep = None if resets is None else options.keep_mask(name, resets, x)
        inside = None
        if lengths is not None:
            lengths = options.check_lengths(name, lengths, x)
            inside = (torch.arange(x.size(0), device=x.device).unsqueeze(1) < lengths).unsqueeze(-1)
            x = torch.where(inside, x, 0)  # whatever stands there must not reach a gradient
        last = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = torch.dropout(x, self.dropout, True)
            p = linear(x, getattr(self, f"weight_ih_l{layer}"), getattr(self, f"bias_ih_l{layer}"))
            h0 = None if hx is None else hx[layer].to(p.dtype)
            h = scan(p, h0, keep, self._cell + "_positive" * self.positive)
            if inside is None:
                last.append(h[-1])
                x = h
                continue
            x = torch.where(inside, h, 0)
            start = torch.zeros_like(h[0]) if h0 is None else h0
            at = (lengths - 1).clamp_min(0).view(1, -1, 1).expand(1, -1, h.size(2))
            last.append(torch.where((lengths > 0).unsqueeze(-1), h.gather(0, at)[0], start))
        return x, torch.stack(last)


class MinGRU(_MinRNN):
    __doc__ = f"""h' = (1 - z) h + z c with z = sigmoid(W_z x + b_z), c = W_h x + b_h; gates stacked as z, c.
{_MinRNN.__doc__}"""
    _cell, _gates = "mingru", ("z", "c")


class MinLSTM(_MinRNN):
    __doc__ = f"""h' = (f h + i c) / (f + i) with f, i = sigmoid(W x + b), c = W_h x + b_h; gates stacked as f, i, c.
{_MinRNN.__doc__}"""
    _cell, _gates = "minlstm", ("f", "i", "c")
