"""Cases of the attention decoder, and its judge: `oracle.fault` against the reference in float64."""

from dataclasses import dataclass
from functools import lru_cache
from unittest import mock

import oracle
import torch
from torch import Tensor

import seqkern.reference
from seqkern.seq2seq import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("a", "h_n", "c_n", "alpha")


@dataclass(frozen=True)
class Case:
    cell: str
    L: int = 1
    T: int = 3
    S: int = 5
    B: int = 3
    H: int = 6
    A: int = 7
    K: int | None = None  # additive scores with keys of that size; None: dot
    masked: bool = False
    lengths: tuple[int, ...] | None = None  # None: from 0 to S
    V: int | None = None  # tokens, of that vocabulary, and gx a row for each
    fed: bool = True  # False: no feed0, which stands for zeros

    @property
    def name(self) -> str:
        kind = "dot" if self.K is None else f"additive{self.K}"
        return (
            f"{self.cell}_l{self.L}_{kind}_t{self.T}_s{self.S}_b{self.B}_h{self.H}_a{self.A}"
            + "_masks" * self.masked
            + (f"_v{self.V}" if self.V else "")
            + "_unfed" * (not self.fed)
        )


# Pairwise over cells, layers, scorers, masks and sizes on either side of the vectors' and tiles' widths.
CASES = (
    Case("gru"),
    Case("lstm", 2, K=9, masked=True),
    Case("rnn_tanh", 3, 2, 1, 5, 17, 3, K=1),
    Case("rnn_relu", 2, 3, 9, 2, 5, 70, masked=True),
    Case("gru", 2, 6, 33, 9, 65, 33, K=40),
    Case("gru", 3, 2, 3, 19, 3, 1, masked=True, lengths=(3, 0, 1) * 6 + (2,)),
    Case("lstm", 1, 5, 20, 11, 64, 128),
    Case("lstm", 3, 1, 7, 1, 1, 2, K=3, lengths=(7,)),
    Case("rnn_tanh", 1, 7, 4, 8, 130, 64),
    Case("rnn_relu", 1, 3, 16, 4, 33, 16, K=64),
    Case("gru", 1, 30, 6, 12, 32, 48, K=32),
    Case("gru", 1, 13, 4, 33, 33, 65, V=9, fed=False),
    Case("lstm", 2, 4, 5, 3, 18, 7, K=9, masked=True, V=70, fed=False),
    Case("rnn_relu", 2, 6, 3, 4, 17, 70, V=1),
    Case("rnn_tanh", 1, 2, 3, 300, 5, 9, fed=False),
)


def lengths_of(case: Case) -> Tensor:
    if case.lengths is not None:
        return torch.tensor(case.lengths, dtype=torch.int64)
    return torch.arange(case.B) * case.S // max(case.B - 1, 1) if case.B > 1 else torch.full((case.B,), case.S)


def names(case: Case) -> list[str]:
    """Of the floating arguments, as `leaves` orders them."""
    weights = ["w_feed", "w_hh0", "b_hh0"]
    for layer in range(1, case.L):
        weights += [f"{w}{layer}" for w in ("w_ih", "w_hh", "b_ih", "b_hh")]
    found = ["gx", *["feed0"] * case.fed, "h0", *["c0"] * (case.cell == "lstm"), *weights, "keys", "values"]
    return [*found, *["w_query", "v"] * (case.K is not None), "w_pre", "b_pre", *["masks"] * case.masked]


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> list:
    """The reference's arguments, weights as a list; values representable in `dtype`; tokens where there are some."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    rows = seqkern.reference.CELLS[case.cell].gates * case.H
    k = case.H if case.K is None else case.K
    small = case.H**-0.5
    weights = [draw(rows, case.A, scale=case.A**-0.5), draw(rows, case.H, scale=small), draw(rows)]
    for _ in range(1, case.L):
        weights += [draw(rows, case.H, scale=small), draw(rows, case.H, scale=small), draw(rows), draw(rows)]
    masks = None
    if case.masked:
        masks = (torch.rand(case.T, case.L - 1, case.B, case.H, generator=g) < 0.7).to(dtype) * 1.5
    tokens = None if case.V is None else torch.randint(case.V, (case.T, case.B), generator=g)
    gx = draw(case.T, case.B, rows) if tokens is None else draw(case.V, rows)
    arguments = [
        gx, draw(case.B, case.A) if case.fed else None, draw(case.L, case.B, case.H),
        draw(case.L, case.B, case.H) if case.cell == "lstm" else None, weights,
        draw(case.B, case.S, k, scale=2 * small if case.K is None else 1.0), draw(case.B, case.S, case.A),
        lengths_of(case),
        None if case.K is None else draw(k, case.H, scale=small), None if case.K is None else draw(k, scale=k**-0.5),
        draw(case.A, case.H, scale=small), draw(case.A), masks, case.cell,
    ]  # fmt: skip
    return arguments if tokens is None else [*arguments, tokens]


def cotangents(case: Case, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    state = (case.L, case.B, case.H)
    shapes = [(case.T, case.B, case.A), state, *[state] * (case.cell == "lstm"), (case.T, case.B, case.S)]
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def leaves(arguments: list) -> list[Tensor]:
    """The floating tensors, in the order of `names`."""
    flat = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else [a])]
    return [t for t in flat if isinstance(t, Tensor) and t.is_floating_point()]


def with_leaves(arguments: list, tensors: list[Tensor]) -> list:
    """`arguments` with its floating tensors replaced, in order."""
    rest = iter(tensors)

    def swap(a):
        if isinstance(a, (list, tuple)):
            return [swap(t) for t in a]
        return next(rest) if isinstance(a, Tensor) and a.is_floating_point() else a

    return [swap(a) for a in arguments]


def evaluate(decoder, case: Case, arguments: list, dys: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of all floating arguments by name; `signs`, of the h of every step, where given."""
    tensors = [t.detach().requires_grad_() for t in leaves(arguments)]
    outputs = list(decoder(*with_leaves(arguments, tensors)))
    signs = outputs.pop()[: case.T * case.L * case.B * case.H] > 0 if len(outputs) == 5 else None
    outputs = dict(zip(OUTPUTS, outputs, strict=True))
    if case.cell != "lstm":
        assert outputs.pop("c_n").numel() == 0
    grads = torch.autograd.grad(list(outputs.values()), tensors, dys)
    found = {k: v.detach() for k, v in outputs.items()} | {f"d{n}": g for n, g in zip(names(case), grads, strict=True)}
    return found if signs is None else found | {"signs": signs}


def operator(*arguments):
    """With everything kept that backward needs."""
    upto = ops.CELL + 1
    return ops.attention_decoder(*arguments[:upto], True, *arguments[upto:])


@lru_cache(maxsize=64)
def truth(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    arguments = make(case, dtype)
    arguments = with_leaves(arguments, [t.double() for t in leaves(arguments)])
    return evaluate(reference.attention_decoder, case, arguments, [d.double() for d in cotangents(case, dtype)])


def relu_with(step) -> mock._patch_dict:
    """A context in which the reference's relu cell is h = step(gx + gh)."""
    cell = seqkern.reference.CELLS["rnn_relu"]._replace(
        step=lambda gx, gh, _: seqkern.reference.State(step(gx + gh)),
    )
    return mock.patch.dict(seqkern.reference.CELLS, rnn_relu=cell)


def relu_noting(signs: list[Tensor]) -> mock._patch_dict:
    """In it the relu cell appends to `signs`, step by step, the side of the kink that it took."""

    def step(total):
        signs.append(total > 0)
        return total.relu()

    return relu_with(step)


def relu_beside(signs: list[Tensor]) -> mock._patch_dict:
    """In it the relu cell takes, step by step, the side of each kink that `signs` says, where rounding decides."""
    steps = iter(signs)
    return relu_with(lambda total: torch.where(next(steps), total, 0.0))


def truth_beside(case: Case, dtype: torch.dtype, signs: Tensor) -> dict[str, Tensor]:
    """The truth; for relu on the side of each kink that the operator took."""
    if case.cell != "rnn_relu":
        return truth(case, dtype)
    with relu_beside(list(signs.reshape(case.T * case.L, case.B, case.H))):
        return truth.__wrapped__(case, dtype)


@lru_cache(maxsize=64)
def native(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """How far the reference in `dtype` is from the truth; in float64, where that is the truth, float32's scaled.

    The farthest of four: on the case itself, and on arguments beside it, a few per cent off. How errors of rounding add
    up on one set of figures is chance. Over 40 seeds of one case, where operator and reference err alike in the median,
    the operator strayed up to 50 times as far as the reference on the same figures.
    """
    if dtype == torch.float64:
        shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return {name: figure * shrink for name, figure in native(case, torch.float32).items()}
    g = torch.Generator().manual_seed(2)
    arguments, dys = make(case, dtype), cotangents(case, dtype)
    farthest: dict[str, float] = {}
    for draw in range(4):
        if draw:
            near = [t * (0.96875 + 0.0625 * torch.rand(t.shape, generator=g)).to(dtype) for t in leaves(arguments)]
            arguments = with_leaves(arguments, near)
        signs: list[Tensor] = []
        with relu_noting(signs):
            found = evaluate(reference.attention_decoder, case, arguments, dys)
        exact = with_leaves(arguments, [t.double() for t in leaves(arguments)])
        with relu_beside(signs):
            want = evaluate(reference.attention_decoder, case, exact, [d.double() for d in dys])
        for name, t in want.items():
            farthest[name] = max(farthest.get(name, 0.0), oracle.distance(found[name], t))
    return farthest


def check(case: Case, dtype: torch.dtype, found: dict[str, Tensor]) -> None:
    """AssertionError, naming tensors and figures, unless everything in `found` is within the oracle's bound."""
    found = dict(found)
    want, figures = truth_beside(case, dtype, found.pop("signs")), native(case, dtype)
    wrong = []
    for name, got in found.items():
        assert got.dtype == dtype, f"{name} must be {dtype}, got {got.dtype}"
        problem = oracle.fault(got, want[name], figures[name])
        if problem:
            wrong.append(f"{case.name} {dtype}: {name} {problem}")
    assert not wrong, "\n".join(wrong)
