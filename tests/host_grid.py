"""A layer whose recurrence is the CUDA `grid` engine, run on the host: the operator's signature, with gradients.

What ops.cpp does by matrix products on the device around the recurrence is done here in torch. Products of float32 take
operands rounded to TF32, as that engine's do.
"""

import numpy as np
import torch
from tf32 import product
from torch import Tensor

from seqkern import reference

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")  # as enum Cell
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as enum Dtype
SAVED = {"rnn_tanh": 0, "rnn_relu": 0, "lstm": 5, "gru": 4}
# Columns of dgates, in multiples of H: those for W_ih x + b_ih in order of its gates; where W_hh h + b_hh's begin.
COLUMNS = {"rnn_tanh": ([0], 0), "rnn_relu": ([0], 0), "lstm": ([0, 1, 2, 3], 0), "gru": ([1, 2, 0], 1)}


def device(sms: int, cc: int = 90, shared: int = 227 << 10) -> dict:
    return {
        "sms": sms,
        "cc": cc,
        "shared_per_block": shared,
        "shared_per_sm": shared + 1024,
        "registers_per_sm": 65536,
        "threads_per_sm": 2048 if cc < 120 else 1536,
    }


def _numpy(t: Tensor) -> np.ndarray:
    t = t.detach().contiguous()
    return (t.view(torch.int16) if t.element_size() == 2 else t).numpy()


class _Grid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, cell, batch_sizes, bidirectional, x, h0, c0, *weights):
        groups = reference.split_weights(list(weights), bidirectional)
        rows = x.reshape(-1, x.size(-1))
        sizes = [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist()
        hidden, directions = groups[0].w_hh.size(1), len(groups)
        ctx.shape = {
            "cell": CELLS.index(cell),
            "dtype": DTYPES.index(x.dtype),
            "tf32": x.dtype == torch.float32,
            "steps": len(sizes),
            "batch": sizes[0],
            "hidden": hidden,
            "output": hidden,
            "directions": directions,
            "packed": batch_sizes is not None,
        }
        ctx.starts = torch.tensor([0, *sizes]).cumsum(0)
        given = {"starts": ctx.starts if batch_sizes is not None else None, "h0": h0, "c0": c0}
        for d, w in enumerate(groups):
            given |= {f"gates_x{d}": product(rows, w.w_ih.t()), f"w_hh{d}": w.w_hh}
            given |= {f"b_ih{d}": w.b_ih, f"b_hh{d}": w.b_hh}
        out = {
            "y": x.new_empty(len(rows), directions * hidden),
            "h_n": x.new_empty(directions, sizes[0], hidden),
        }
        if cell == "lstm":
            out["c_n"] = torch.empty_like(out["h_n"])
        if SAVED[cell]:
            out["reserve"] = x.new_empty(directions, len(rows), SAVED[cell], hidden)
        run(ctx.shape, len(rows), False, given, out)
        ctx.run, ctx.cell, ctx.sizes, ctx.bidirectional, ctx.optional = run, cell, sizes, bidirectional, (h0, c0)
        ctx.save_for_backward(x, out["y"], out.get("reserve", x.new_empty(0)), *weights)
        y = out["y"] if batch_sizes is not None else out["y"].view(*x.shape[:2], -1)
        return y.clone(), out["h_n"], out.get("c_n", x.new_empty(0))

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        x, y, reserve, *weights = ctx.saved_tensors
        (h0, c0), cell, hidden = ctx.optional, ctx.cell, ctx.shape["hidden"]
        groups = reference.split_weights(weights, ctx.bidirectional)
        rows = x.reshape(-1, x.size(-1))
        columns, skip = COLUMNS[cell]
        lstm = cell == "lstm"
        given = {"starts": ctx.starts if ctx.shape["packed"] else None, "h0": h0, "c0": c0, "y": y}
        given |= {"dy": dy, "dh_n": dh_n, "dc_n": dc_n if lstm else None, "reserve": reserve if SAVED[cell] else None}
        state = (len(groups), ctx.sizes[0], hidden)
        out = {"dh0": x.new_empty(state)} | ({"dc0": x.new_empty(state)} if lstm else {})
        for d, w in enumerate(groups):
            given[f"w_hh{d}"] = w.w_hh
            out[f"dgates{d}"] = x.new_empty(len(rows), (len(columns) + skip) * hidden)
        ctx.run(ctx.shape, len(rows), True, given, out)
        dx, dweights = torch.zeros(rows.shape), []
        for d, w in enumerate(groups):
            grads = out[f"dgates{d}"].view(len(rows), -1, hidden)
            of_x, of_h = grads[:, columns].flatten(1), grads[:, skip:].flatten(1)
            dx += product(of_x, w.w_ih).float()
            before = states_before(y[:, d * hidden : (d + 1) * hidden], h0, d, ctx.sizes)
            dweights += [product(of_x.t(), rows), product(of_h.t(), before)]
            if w.b_ih is not None:
                dweights += [of_x.float().sum(0).to(x.dtype), of_h.float().sum(0).to(x.dtype)]
        dh0 = out["dh0"] if h0 is not None else None
        dc0 = out["dc0"] if c0 is not None else None
        return None, None, None, None, dx.to(x.dtype).view_as(x), dh0, dc0, *dweights


def states_before(y: Tensor, h0: Tensor | None, d: int, sizes: list[int]) -> Tensor:
    """The state that each row's step read, [N, H]."""
    steps = y.split(sizes)
    first = y.new_zeros(sizes[0], y.size(1)) if h0 is None else h0[d]
    if d == 0:
        found = [first, *(h[:n] for h, n in zip(steps[:-1], sizes[1:], strict=True))]
    else:
        found = [torch.cat([h, first[len(h) : n]]) for h, n in zip(steps[1:], sizes[:-1], strict=True)]
        found.append(first[: sizes[-1]])
    return torch.cat(found)


def layer(module, on: dict, seed: int = 0, plans: list | None = None):
    """The operator on host execution of `module`, planned for the device `on`. Plans that ran are added to `plans`."""

    def run(shape, rows, backward, given, out):
        inputs = {name: _numpy(t) for name, t in given.items() if t is not None}
        arrays = {name: _numpy(t) for name, t in out.items()}  # they share memory with the tensors
        plan = module.grid(shape, on, rows, backward, inputs, arrays, seed)
        if plans is not None:
            plans.append(plan)

    def call(x, h0, c0, weights, batch_sizes, cell, bidirectional):
        return _Grid.apply(run, cell, batch_sizes, bidirectional, x, h0, c0, *weights)

    return call
