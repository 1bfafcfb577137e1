"""The named cases of the comparison with cuDNN: not the full cross of shapes and options, which are thousands.

The lists below hold what the targets name; `pairwise` adds shapes until every two values of different axes (cell,
dtype, batch, hidden size, kind of layer) meet in some case.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

from bench.cases import PASSES, Case

CELLS = ("lstm", "gru", "rnn")
DTYPES = ("bf16", "fp16", "fp32")  # fp32 with TF32 where torch's flags for recurrent layers allow it
BATCHES = (1, 8, 16, 64, 128)
HIDDEN = (64, 128, 256, 512, 768, 1024, 2048)
KINDS: dict[str, dict[str, object]] = {
    "single": {},
    "two-layers": {"layers": 2},
    "bidirectional": {"bidirectional": True},
    "packed": {"packed": True},
}
TIME = 256

# (B, H); the first of each list stands for its group in a quick run.
LSTM = [(16, 1024), (1, 256), (16, 256), (64, 256), (1, 512), (16, 512), (64, 512), (16, 768), (1, 1024)]
LSTM += [(8, 1024), (64, 1024), (128, 1024), (16, 2048), (64, 2048)]
GRU = [(16, 512), (1, 512), (64, 256), (16, 1024), (64, 1024), (16, 2048)]
RNN = [(16, 1024), (1, 512), (64, 512), (64, 2048)]
KIND = [(16, 512), (64, 1024)]  # of LSTM and GRU, for two layers, both directions and packed
PERSISTENT = [(16, 1024), (16, 256), (16, 512), (64, 512), (16, 768), (8, 1024), (64, 1024), (128, 1024)]
SMALL = [(16, 128), (1, 64), (64, 128)]
TF32 = [(16, 512), (64, 1024)]
STEP = [("lstm", 16, 1024), ("lstm", 64, 512), ("lstm", 1, 512), ("gru", 16, 512), ("rnn", 64, 1024)]


def _case(group: str, cell: str, dtype: str, shape: tuple[int, int], **options) -> Case:
    batch, hidden = shape
    return Case(group, cell, batch, options.pop("time", TIME), hidden, hidden, dtype=dtype, **options)


def _listed(group: str, cell: str, dtype: str, shapes: Sequence[tuple[int, int]], **options) -> list[Case]:
    return [_case(group, cell, dtype, shape, quick=i == 0, **options) for i, shape in enumerate(shapes)]


def pairwise(axes: Sequence[Sequence]) -> list[tuple]:
    """Combinations, few and in a fixed order, in which every two values of different axes meet.

    Greedy: each combination is the one, of all, that adds most pairs; the full cross here is small enough to search.
    """
    cross = list(product(*axes))

    def pairs(combination: tuple) -> set:
        return set(combinations(enumerate(combination), 2))

    missing = set().union(*map(pairs, cross))
    chosen = []
    while missing:
        best = max(cross, key=lambda combination: len(pairs(combination) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def shapes() -> list[Case]:
    """One inference case for each shape; a shape that two lists name is in the first one's group."""
    found = _listed("lstm-bf16", "lstm", "bf16", LSTM)
    found += _listed("gru-bf16", "gru", "bf16", GRU)
    found += _listed("rnn-bf16", "rnn", "bf16", RNN)
    for kind in ("two-layers", "bidirectional", "packed"):
        for cell in ("lstm", "gru"):
            listed = _listed(kind, cell, "bf16", KIND, **KINDS[kind])
            found += listed if cell == "lstm" else [replace(case, quick=False) for case in listed]
    found += _listed("lstm-fp16", "lstm", "fp16", PERSISTENT)
    found += _listed("small", "lstm", "fp16", SMALL)
    found += _listed("fp32", "lstm", "fp32", TF32) + [_case("fp32", "gru", "fp32", (16, 512))]
    found += [_case("long", "lstm", dtype, (16, 768), time=1024) for dtype in ("bf16", "fp16")]
    for i, (cell, batch, hidden) in enumerate(STEP):
        found.append(_case("step", cell, "bf16", (batch, hidden), engine="step", quick=i == 0))
    for cell, dtype, batch, hidden, kind in pairwise((CELLS, DTYPES, BATCHES, HIDDEN, tuple(KINDS))):
        found.append(_case("pairwise", cell, dtype, (batch, hidden), **KINDS[kind]))
    named: dict[str, Case] = {}
    for case in found:
        named.setdefault(case.name, case)
    return list(named.values())


def all_cases() -> list[Case]:
    """Groups in turn, so that a run that is cut short has some of each."""
    groups: dict[str, list[Case]] = {}
    for case in shapes():
        groups.setdefault(case.group, []).append(case)
    total = {group: len(cases) for group, cases in groups.items()}
    ranked = [(i / total[group], case) for group, cases in groups.items() for i, case in enumerate(cases)]
    ranked.sort(key=lambda pair: pair[0])
    return [replace(case, passes=passes) for _, case in ranked for passes in PASSES]
