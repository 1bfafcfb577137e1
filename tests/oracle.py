"""The judge of every engine: the reference in float64, and how far torch's own layer strays from it in each dtype.

A result passes when, tensor by tensor,

    max |got - truth|  <=  4 x max |native - truth|  +  4 eps x max |truth|  +  one subnormal

where truth is `reference.layer` in float64 on inputs that were rounded to the dtype, and native is torch.nn's layer in
the dtype on the same inputs. The bound needs no table of tolerances: a long or saturated case loosens it for both.
At a kink of relu that rounding decides, truth goes the way of the result.
In float64 truth is itself rounded, in the same order of operations as native, so that their difference says nothing;
there the native figure is float32's, scaled by the ratio of the two eps, and truth sums its products in long double:
the chains of BLAS over 300 inputs were off by twice as much as the kernel under test. NaN and infinity must be where
truth has them.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from unittest import mock

import numpy as np
import torch
from cases import Case, Inputs, make_cotangents, make_inputs
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqkern import ops, reference

FACTOR = 4.0
Layer = Callable[..., Sequence[Tensor]]  # (x, h0, c0, weights, batch_sizes, cell, bidirectional) -> y, h_n, c_n


def engine(*arguments) -> Sequence[Tensor]:
    """The operator under test, with everything kept that backward needs."""
    return ops.rnn_layer(*arguments, True)[:3]


def evaluate(layer: Layer, case: Case, inputs: Inputs, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs and all gradients of `layer`, by name; a name starting with d is a gradient."""

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().requires_grad_()

    x, h0, c0, weights, batch_sizes = inputs
    x, h0, c0, weights = leaf(x), leaf(h0), leaf(c0), [leaf(w) for w in weights]
    outputs = layer(x, h0, c0, weights, batch_sizes, case.cell, case.bidirectional)
    outputs = dict(zip(("y", "h_n", "c_n"), outputs, strict=True))
    if case.cell != "lstm":
        c_n = outputs.pop("c_n")
        assert c_n.numel() == 0, f"{case.name}: c_n must be empty, got {list(c_n.shape)}"
    leaves = {"x": x, "h0": h0, "c0": c0} | dict(zip(case.weight_shapes, weights, strict=True))
    leaves = {name: t for name, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return {k: v.detach() for k, v in outputs.items()} | {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}


def torch_layer(x, h0, c0, weights, batch_sizes, cell, bidirectional) -> Sequence[Tensor]:
    """torch.nn's layer behind the operator's signature; the reference where torch.nn has no such cell."""
    cls = {"rnn_tanh": nn.RNN, "rnn_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}.get(cell)
    if cls is None:
        return reference.layer(x, h0, c0, weights, batch_sizes, cell, bidirectional)
    per_direction = len(weights) // (2 if bidirectional else 1)
    options = {"bidirectional": bidirectional, "bias": per_direction > 3}
    if cls is nn.RNN:
        options["nonlinearity"] = cell.removeprefix("rnn_")
    if per_direction in (3, 5):
        options["proj_size"] = weights[1].size(1)
    hidden = weights[0].size(0) // reference.CELLS[cell].gates
    module = cls(x.size(-1), hidden, **options, device="meta")
    names = [name for name, _ in module.named_parameters()]
    if h0 is None and c0 is not None:
        h0 = x.new_zeros(*c0.shape[:2], weights[1].size(1))
    if c0 is None and h0 is not None:
        c0 = x.new_zeros(*h0.shape[:2], hidden)
    hx = None if h0 is None else (h0, c0) if cell == "lstm" else h0
    data = x if batch_sizes is None else PackedSequence(x, batch_sizes)
    y, last = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (data, hx))
    h_n, c_n = last if cell == "lstm" else (last, x.new_empty(0))
    return (y if batch_sizes is None else y.data), h_n, c_n


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def _in_float64(layer: Layer, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    x, h0, c0, weights, batch_sizes = make_inputs(case, dtype)
    inputs = Inputs(x.double(), _double(h0), _double(c0), [w.double() for w in weights], batch_sizes)
    return evaluate(layer, case, inputs, [d.double() for d in make_cotangents(case, dtype)])


class _ExactLinear(torch.autograd.Function):
    """x W^T + b and its gradients in float64, each rounded once (where long double is longer than double)."""

    @staticmethod
    def _product(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
        sums = a.numpy().astype(np.longdouble) @ b.numpy().astype(np.longdouble)
        return torch.from_numpy((sums if plus is None else sums + plus.numpy()).astype(np.float64))

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return _ExactLinear._product(x, w.mT, b)

    @staticmethod
    def backward(ctx, d):
        x, w = ctx.saved_tensors
        return _ExactLinear._product(d, w), _ExactLinear._product(d.mT, x), d.sum(0)


def _exact_linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    if b is None:
        b = x.new_zeros(len(w))
    return _ExactLinear.apply(x.reshape(-1, x.size(-1)), w, b).unflatten(0, x.shape[:-1])


@lru_cache(maxsize=64)
def truth(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference in float64 on the inputs that `dtype` sees. Do not write to it."""
    linear = _exact_linear if dtype == torch.float64 else reference.linear
    with mock.patch.object(reference, "linear", linear):
        return _in_float64(reference.layer, case, dtype)


def truth_beside(case: Case, dtype: torch.dtype, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The truth to hold `found` to: with relu, its gradients are those on the side of each kink that `found` took.

    Where relu's argument is within rounding of 0, either side's derivative is right, and y tells which one was taken.
    y itself is held to the plain truth, so that only such arguments can differ.
    """
    want = truth(case, dtype)
    positive = found["y"] > 0
    if case.cell != "rnn_relu" or positive.shape != want["y"].shape or torch.equal(positive, want["y"] > 0):
        return want
    sizes = [case.B] * case.T if case.lengths is None else case.batch_sizes.tolist()
    forward, *reverse = (d.split(sizes) for d in positive.reshape(case.N, -1).chunk(case.D, -1))
    steps = iter([*forward, *(step for d in reverse for step in reversed(d))])

    def step(gx: Tensor, gh: Tensor, _: reference.State) -> reference.State:
        return reference.State(torch.where(next(steps), gx + gh, 0.0))

    cell = reference.CELLS["rnn_relu"]._replace(step=step)
    with mock.patch.dict(reference.CELLS, rnn_relu=cell):
        gradients = _in_float64(reference.layer, case, dtype)
    return gradients | {name: want[name] for name in ("y", "h_n")}


def distance(got: Tensor, want: Tensor) -> float:
    """The largest |got - want| where both are finite; 0 for an empty tensor."""
    both = got.isfinite() & want.isfinite()
    gap = (got.double() - want)[both].abs()
    return gap.max().item() if gap.numel() else 0.0


def largest(t: Tensor) -> float:
    t = t[t.isfinite()]
    return t.abs().max().item() if t.numel() else 0.0


@lru_cache(maxsize=64)
def native(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """How far torch.nn's layer is from the truth in `dtype`, for each tensor."""
    if dtype == torch.float64:
        shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return {name: figure * shrink for name, figure in native(case, torch.float32).items()}
    # On a busy machine torch's 16-bit layers take a thousand times longer with two threads than with one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = evaluate(torch_layer, case, make_inputs(case, dtype), make_cotangents(case, dtype))
    torch.set_num_threads(threads)
    return {name: distance(found[name], want) for name, want in truth_beside(case, dtype, found).items()}


def fault(got: Tensor, want: Tensor, native_error: float) -> str | None:
    """What is wrong with `got`, whose dtype sets eps, or None. `want` is the truth in float64."""
    if got.shape != want.shape:
        return f"must be {list(want.shape)}, got {list(got.shape)}"
    info = torch.finfo(got.dtype)
    # A truth beyond the dtype's range can only be an infinity there.
    limits = want.to(got.dtype)
    if not torch.equal(got.isnan(), limits.isnan()):
        return f"has {got.isnan().sum()} NaN, the truth has {limits.isnan().sum()}, or they are elsewhere"
    infinite = limits.isinf()
    if not torch.equal(got.isinf(), infinite) or not torch.equal(got[infinite], limits[infinite]):
        return f"has {got.isinf().sum()} infinities, the truth has {infinite.sum()}, or they are elsewhere"
    bound = FACTOR * native_error + FACTOR * info.eps * largest(want) + info.smallest_normal * info.eps
    error = distance(got, want)
    if error <= bound:
        return None
    place = (got.double() - want).abs().nan_to_num(0.0, 0.0).flatten().argmax().item()
    return (
        f"is off by {error:.3g} > {bound:.3g} = {FACTOR:g} x native ({native_error:.3g}) + {FACTOR:g} eps x "
        f"{largest(want):.3g}; at flat index {place} of {list(want.shape)}: got {got.flatten()[place].item():.6g}, "
        f"want {want.flatten()[place].item():.6g}"
    )


def faults(case: Case, dtype: torch.dtype, found: dict[str, Tensor]) -> list[str]:
    """One line for each tensor of `found` (by the names of `evaluate`) that misses the bound."""
    want, figures = truth_beside(case, dtype, found), native(case, dtype)
    lines = []
    for name, got in found.items():
        wrong = f"must be {dtype}, got {got.dtype}" if got.dtype != dtype else fault(got, want[name], figures[name])
        if wrong:
            lines.append(f"{case.name} {dtype}: {name} {wrong}")
    return lines


def check(case: Case, dtype: torch.dtype, found: dict[str, Tensor]) -> None:
    """Raises AssertionError, naming tensors and figures, unless everything in `found` is within the bound."""
    wrong = faults(case, dtype, found)
    assert not wrong, "\n".join(wrong)
