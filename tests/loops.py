"""A plain loop of torch's own cells, one step at a time, with places to put an option in: what options are held to."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import seqkern

LAYERS = {"RNN": (seqkern.RNN, {}), "relu": (seqkern.RNN, {"nonlinearity": "relu"}), "LSTM": (seqkern.LSTM, {}),
          "GRU": (seqkern.GRU, {}), "proj": (seqkern.LSTM, {"proj_size": 3})}  # fmt: skip
DTYPES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 8e-3}


def make(kind: str, *sizes, **options) -> nn.RNNBase:
    cls, fixed = LAYERS[kind]
    return cls(*sizes, **{"dtype": torch.float64} | fixed | options)


def weights_of(m: nn.RNNBase, layer: int, direction: int) -> dict[str, Tensor | None]:
    suffix = f"_l{layer}" + "_reverse" * direction
    return {n: getattr(m, n + suffix, None) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")}


def torch_step(m: nn.RNNBase, x: Tensor, h: Tensor, c: Tensor | None, w: dict) -> tuple[Tensor, Tensor | None]:
    four = (w["weight_ih"], w["weight_hh"], w["bias_ih"], w["bias_hh"])
    if m.mode == "GRU":
        return torch.gru_cell(x, h, *four), None
    if m.mode == "RNN_TANH":
        return torch.rnn_tanh_cell(x, h, *four), None
    if m.mode == "RNN_RELU":
        return torch.rnn_relu_cell(x, h, *four), None
    if w["weight_hr"] is None:
        return torch.lstm_cell(x, (h, c), *four)
    i, f, g, o = (nn.functional.linear(x, four[0], four[2]) + nn.functional.linear(h, four[1], four[3])).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return nn.functional.linear(o.sigmoid() * c.tanh(), w["weight_hr"]), c


def same(h, c, *_):
    return h, c


def run(
    m: nn.RNNBase,
    x: Tensor,
    hx=None,
    lengths: list[int] | None = None,
    before: Callable = same,
    after: Callable | None = None,
    step: Callable = torch_step,
) -> dict[str, Tensor]:
    """m's result on x [T, B, I]: y, h_n, c_n, and hs, cs [L, T, B, *].

    before(h, c, t, layer, direction): the state that a step reads. step(m, x, h, c, weights[, t, layer, direction]).
    after(old h, old c, new h, new c, t, layer, direction): what the step leaves.
    """
    lstm, directions = m.mode == "LSTM", 2 if m.bidirectional else 1
    T, B = x.shape[:2]
    lengths = [T] * B if lengths is None else lengths
    h0, c0 = hx if lstm and hx is not None else (hx, None)
    h_n, c_n, hs, cs = [], [], [], []
    for layer in range(m.num_layers):
        ys, y_cs = [], []
        for d in range(directions):
            w = weights_of(m, layer, d)
            k = layer * directions + d
            h = x.new_zeros(B, w["weight_hh"].size(1)) if h0 is None else h0[k]
            c = (x.new_zeros(B, m.hidden_size) if c0 is None else c0[k]) if lstm else None
            out_h: list = [None] * T
            out_c: list = [None] * T
            for t in reversed(range(T)) if d else range(T):
                in_h, in_c = before(h, c, t, layer, d)
                extra = () if step is torch_step else (t, layer, d)
                new_h, new_c = step(m, x[t], in_h, in_c, w, *extra)
                if after is not None:
                    new_h, new_c = after(in_h, in_c, new_h, new_c, t, layer, d)
                # Row by row, so that nothing is shared with how the layers do it.
                there = [t < n for n in lengths]
                out_h[t] = torch.stack([new_h[b] if there[b] else torch.zeros_like(new_h[b]) for b in range(B)])
                h = torch.stack([new_h[b] if there[b] else h[b] for b in range(B)])
                if lstm:
                    out_c[t] = torch.stack([new_c[b] if there[b] else torch.zeros_like(new_c[b]) for b in range(B)])
                    c = torch.stack([new_c[b] if there[b] else c[b] for b in range(B)])
            ys.append(torch.stack(out_h))
            h_n.append(h)
            if lstm:
                y_cs.append(torch.stack(out_c))
                c_n.append(c)
        x = torch.cat(ys, -1)
        hs.append(x)
        if lstm:
            cs.append(torch.cat(y_cs, -1))
    found = {"y": x, "h_n": torch.stack(h_n), "hs": torch.stack(hs)}
    return found | {"c_n": torch.stack(c_n), "cs": torch.stack(cs)} if lstm else found


def call(m: nn.RNNBase, x: Tensor, hx=None, **options) -> dict[str, Tensor]:
    """What the layer itself returns, by the same names."""
    y, last, *states = m(x, hx, **options)
    lstm = m.mode == "LSTM"
    found = {"y": y, "h_n": last[0], "c_n": last[1]} if lstm else {"y": y, "h_n": last}
    if states:
        found |= {"hs": states[0][0], "cs": states[0][1]} if lstm else {"hs": states[0]}
    return found


def state(m: nn.RNNBase, batch: int, dtype=None):
    """A random initial state that wants a gradient."""
    n = m.num_layers * (2 if m.bidirectional else 1)
    dtype = dtype or m.weight_hh_l0.dtype
    h = torch.randn(n, batch, m.proj_size or m.hidden_size, dtype=dtype, requires_grad=True)
    return (h, torch.randn(n, batch, m.hidden_size, dtype=dtype, requires_grad=True)) if m.mode == "LSTM" else h


def flat(values) -> list[Tensor]:
    return [t for v in values for t in (flat(v) if isinstance(v, (tuple, list)) else [v]) if t is not None]


def gradients(found: dict[str, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Of a fixed random sum of all outputs."""
    g = torch.Generator().manual_seed(7)
    total = 0
    for name in sorted(found):
        t = found[name]
        total = total + (t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t)).sum()
    if not total.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True, retain_graph=True))


def check(m: nn.RNNBase, got: dict[str, Tensor], want: dict[str, Tensor], leaves, tolerance: float = 1e-10) -> None:
    """Outputs of the names in `got` and all gradients, of m's parameters too."""
    want = {n: want[n] for n in got}
    leaves = [*flat(leaves), *m.parameters()]
    pairs = [(n, got[n], want[n]) for n in got]
    names = [f"d{i}" for i in range(len(leaves))]
    pairs += list(zip(names, gradients(got, leaves), gradients(want, leaves), strict=True))
    for name, a, b in pairs:
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        said = lambda s, n=name: f"{n}: {s}"  # noqa: E731
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, msg=said)
