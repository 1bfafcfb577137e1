"""JSON lines into what a reader asks: how much faster, in which regime, where not, and on what machine."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.timing import geomean

Line = dict
COLUMNS = [("infer", "fp32"), ("train", "fp32"), ("infer", "bf16"), ("train", "bf16")]
TITLES = {"infer": "inference", "train": "training"}
WORDS = {"win": "faster", "even": "within noise of 1", "loss": "slower", "wrong": "wrong"}
SETTING = ("device", "cpu", "isa", "threads")
BUSY = 0.2  # cores that other processes may use before a result is said to be taken on a busy machine
REQUIRED = (*SETTING, "case", "group", "pass", "dtype", "peer")


def read(paths: Iterable[Path]) -> list[Line]:
    """The lines of the files, the latest of each case, peer and setting (device, CPU model, ISA, threads,
    GPU).

    Raises:
        ValueError: a line is not JSON or lacks a field, with the file and the line's number.
    """
    latest: dict[tuple, Line] = {}
    for path in paths:
        for number, text in enumerate(path.read_text().splitlines(), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except json.JSONDecodeError as broken:
                raise ValueError(f"{path}:{number}: not a JSON line: {broken}") from broken
            needed = REQUIRED if "wrong" in line else (*REQUIRED, "ratio", "ms", "peer_ms")
            if absent := [key for key in needed if key not in line]:
                raise ValueError(f"{path}:{number}: lacks {', '.join(absent)}")
            setting = (*(line[key] for key in SETTING), line.get("gpu"))
            latest[(*setting, line["case"], line["peer"])] = line
    return list(latest.values())


def verdict(line: Line) -> str:
    """win | even | loss | wrong. Even: 1 lies within the interval of the median ratio."""
    if "wrong" in line:
        return "wrong"
    if line.get("ratio_low", line["ratio"]) > 1:
        return "win"
    return "loss" if line.get("ratio_high", line["ratio"]) < 1 else "even"


@dataclass(frozen=True)
class Cell:
    """One group in one pass and dtype against one peer."""

    mean: float  # geometric mean of the ratios
    lowest: float
    count: int
    wrong: int


@dataclass(frozen=True)
class Setting:
    """What was measured on one machine with one ISA and one number of threads."""

    lines: list[Line]

    @property
    def peers(self) -> list[str]:
        return _unique(line["peer"] for line in self.lines)

    @property
    def groups(self) -> list[str]:
        return _unique(line["group"] for line in self.lines)

    def cell(self, group: str, column: tuple[str, str], peers: Sequence[str] = ("torch",)) -> Cell | None:
        """Against several peers, each case counts once, against the fastest of them."""
        chosen = [
            line
            for line in self.lines
            if line["group"] == group and (line["pass"], line["dtype"]) == column and line["peer"] in peers
        ]
        ratios: dict[str, float] = {}
        for line in chosen:
            if "wrong" not in line:
                ratios[line["case"]] = min(line["ratio"], ratios.get(line["case"], line["ratio"]))
        wrong = sum("wrong" in line for line in chosen)
        if not ratios:
            return Cell(float("nan"), float("nan"), 0, wrong) if wrong else None
        return Cell(geomean(list(ratios.values())), min(ratios.values()), len(ratios), wrong)

    def where(self) -> str:
        """Machine, versions and load, in a sentence."""
        first = self.lines[0]
        loads = [line["load"] for line in self.lines if "load" in line]
        versions = " and ".join(_unique(str(line.get("torch", "?")) for line in self.lines))
        commits = ", ".join(_unique(str(line.get("commit", "?")) for line in self.lines))
        load = f"; load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
        others = max((line["others"] for line in self.lines if line.get("others") is not None), default=0)
        if others > BUSY:
            load += f"; other processes used up to {others:.1f} cores"
        unit = "thread" if first["threads"] == 1 else "threads"
        return f"{first['cpu']}, {first['isa']}, {first['threads']} {unit}, torch {versions}, commit {commits}{load}."

    def stale(self, csrc: str) -> int:
        """How many lines were measured on other sources than these."""
        return sum(line.get("csrc") != csrc for line in self.lines)

    def named(self, wanted: Callable[[str], bool]) -> list[Line]:
        """The lines whose verdict is wanted, lowest ratio first."""
        return sorted((line for line in self.lines if wanted(verdict(line))), key=lambda line: line.get("ratio", 0))


def settings(lines: Sequence[Line]) -> list[Setting]:
    keys = _unique(tuple(line[key] for key in SETTING) for line in lines)
    return [Setting([line for line in lines if tuple(line[key] for key in SETTING) == key]) for key in keys]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))
