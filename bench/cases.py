"""The named cases, grouped by regime. A case is one layer on one shape, in one pass and one dtype.

T time, B batch, I input, H hidden, P projection, G gates, L layers, D directions, as everywhere in this repository.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

GATES = {"rnn": 1, "lstm": 4, "gru": 3}
PASSES = ("infer", "train")
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Case:
    group: str
    cell: str  # rnn (tanh) | lstm | gru
    batch: int
    time: int
    input: int
    hidden: int
    proj: int = 0
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False  # lengths uniform in [T/2, T], in no order
    carried: bool = False  # the state is given, as in a streaming loop
    passes: str = "infer"  # infer: no gradients | train: forward, and backward to x and the weights
    dtype: str = "fp32"
    quick: bool = False  # stands for its group in a --quick run
    engine: str = ""  # on a GPU, the engine of seqkern that is forced; "": seqkern's own choice

    @property
    def name(self) -> str:
        shape = f"B{self.batch}-T{self.time}-I{self.input}-H{self.hidden}"
        extras = [f"P{self.proj}"] * bool(self.proj) + [f"L{self.layers}"] * (self.layers > 1)
        extras += ["bi"] * self.bidirectional + ["packed"] * self.packed + ["carried"] * self.carried
        extras += [self.engine] * bool(self.engine)
        return "-".join([self.cell, self.passes, self.dtype, shape, *extras])

    def flops(self, rows: int) -> int:
        """Floating-point operations of the layer's matrix products over `rows` time steps of all sequences together.

        2 rows G H (I + P) per direction and layer (+ 2 rows P H for a projection); backward costs twice that again,
        once for the gradients of the activations and once for those of the weights.
        """
        out = self.proj or self.hidden
        directions = 2 if self.bidirectional else 1
        total = 0
        for layer in range(self.layers):
            wide = self.input if layer == 0 else out * directions
            total += 2 * rows * directions * (GATES[self.cell] * self.hidden * (wide + out) + self.proj * self.hidden)
        return total * (3 if self.passes == "train" else 1)


# (B, T, I, H); the first of each list stands for its group in a quick run.
SMALL = [
    (8, 128, 128, 128),
    (1, 128, 64, 64),
    (1, 128, 256, 256),
    (1, 64, 64, 512),
    (1, 32, 1024, 1024),
    (4, 128, 64, 128),
    (4, 32, 512, 512),
    (8, 512, 64, 64),
    (64, 64, 64, 128),
]
LARGE = [
    (32, 128, 256, 256),
    (32, 64, 64, 512),
    (64, 128, 512, 512),
    (32, 50, 1024, 1024),
    (128, 64, 256, 256),
    (128, 32, 64, 512),
]
PACKED = [(16, 128, 128, 128), (8, 64, 256, 256), (32, 64, 256, 256)]
MIXED = [(8, 128, 128, 128), (1, 64, 256, 256), (32, 64, 256, 256)]
PROJECTED = [(8, 128, 256, 256), (1, 128, 256, 256), (32, 64, 512, 512)]
STREAMING = [(1, 1, h, h) for h in (128, 64, 256, 512)]


def _shapes(group: str, cell: str, shapes: Sequence[tuple[int, int, int, int]], **options) -> list[Case]:
    return [Case(group, cell, *shape, quick=i == 0, **options) for i, shape in enumerate(shapes)]


def _crossed(cases: Sequence[Case], passes: Sequence[str] = PASSES, dtypes: Sequence[str] = DTYPES) -> list[Case]:
    return [replace(case, passes=p, dtype=d) for case in cases for p in passes for d in dtypes]


def all_cases() -> list[Case]:
    cases = []
    for cell in ("lstm", "gru", "rnn"):
        cases += _crossed(_shapes(f"{cell}-small", cell, SMALL))
        cases += _crossed(_shapes(f"{cell}-large", cell, LARGE))
    for cell in ("lstm", "gru"):
        cases += _crossed(_shapes(f"packed-{cell}", cell, PACKED, packed=True))
    for cell in ("lstm", "gru"):
        cases += _crossed(_shapes(f"packed-long-{cell}", cell, [(16, 1000, 64, 64)], packed=True), dtypes=["fp32"])
    for b, t, i, h in PROJECTED:
        quick = (b, t, i, h) == PROJECTED[0]
        cases += _crossed([Case("proj", "lstm", b, t, i, h, proj=h // 2, quick=quick)])
    for group, options in (("bidirectional", {"bidirectional": True}), ("two-layers", {"layers": 2})):
        for cell in ("lstm", "gru", "rnn"):
            found = _shapes(group, cell, MIXED, **options)
            cases += _crossed(found if cell == "lstm" else [replace(c, quick=False) for c in found])
    for cell in ("lstm", "gru"):
        cases += _crossed(_shapes(f"streaming-{cell}", cell, STREAMING, carried=True), passes=["infer"])
    return cases


def memory_cases() -> list[Case]:
    """Long sequences, where what is kept for backward decides whether a model fits."""
    return [Case("long", cell, 8, 4000, 256, 256, passes="train", quick=cell == "lstm") for cell in GATES]


def select(patterns: Sequence[str], quick: bool, memory: bool, everything: Sequence[Case] | None = None) -> list[Case]:
    """The cases that match any of the patterns (a case's name, a group, or a glob of either), else the default set.

    Args:
        everything: what is chosen from; by default the CPU's cases, to which memory adds the long ones.

    Raises:
        ValueError: a pattern matches nothing.
    """
    known = all_cases() + memory_cases() if everything is None else everything
    if not patterns:
        chosen = known if everything is not None else all_cases() + (memory_cases() if memory else [])
        return [case for case in chosen if case.quick] if quick else chosen
    for pattern in patterns:
        if not any(_matches(case, pattern) for case in known):
            groups = ", ".join(dict.fromkeys(case.group for case in known))
            raise ValueError(f"no case or group matches {pattern!r}; groups: {groups} (--list names every case)")
    return [case for case in known if any(_matches(case, pattern) for pattern in patterns)]


def _matches(case: Case, pattern: str) -> bool:
    return fnmatchcase(case.name, pattern) or fnmatchcase(case.group, pattern)
