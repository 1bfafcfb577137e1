"""What the examples share: arguments, a training loop, and RNN, LSTM and GRU side by side in a table and a plot."""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

CELLS = ("RNN", "LSTM", "GRU")
COLORS = dict(zip(CELLS, ("#d1495b", "#00798c", "#edae49"), strict=True))
GREY = "#666666"  # what is no cell: baselines, the truth


def arguments(doc: str, updates: int, quick: int) -> argparse.ArgumentParser:
    """A parser with what every example takes; `quick` updates stand for --quick."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs="+", default=list(CELLS), choices=CELLS, help="default: all three")
    parser.add_argument("--updates", type=int, default=updates, help=f"training steps of each; default: {updates}")
    parser.add_argument("--quick", dest="updates", action="store_const", const=quick, help=f"{quick} steps: a trial")
    parser.add_argument("--plot", metavar="PNG")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    return a


def package_file(package: str, path: str, install: str) -> Path:
    """A data file of an installed package, which is not imported: that would need all that the package needs.

    Raises:
        SystemExit: the package is missing; the message says that `install` installs it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The data of this example comes with the package {package}: {install}")
    file = Path(spec.submodule_search_locations[0], path)
    if not file.is_file():
        raise SystemExit(f"{package} is installed, but has no file {path}; another version may: {install}")
    return file


class Run(NamedTuple):
    cell: str
    model: nn.Module
    curve: list[tuple[float, float]]  # (seconds of training, score) now and then
    seconds: float
    scores: dict[str, str]  # what the table shows, by column

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def train(
    cell: str,
    model: nn.Module,
    batches: Iterator[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    check: Callable[[nn.Module], float],
    updates: int,
    rate: float = 5e-3,
) -> Run:
    """Trains with Adam, gradients clipped to norm 1, at a rate that rises to `rate` and falls to 0.

    `check` gives the score for the curve, ten times, in evaluation mode; its time does not count.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates)
    curve, seconds = [], 0.0
    with tqdm(total=updates, desc=cell, unit="step", leave=False, disable=None) as bar:
        for update in range(1, updates + 1):
            start = time.perf_counter()
            loss = loss_of(model.train(), next(batches))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seconds += time.perf_counter() - start
            bar.update()
            if update % max(1, updates // 10) == 0:
                with torch.no_grad():
                    curve.append((seconds, check(model.eval())))
                bar.set_postfix_str(f"loss {loss.item():.3f}, held out {curve[-1][1]:.3f}")
    return Run(cell, model.eval(), curve, seconds, {})


def table(runs: Sequence[Run], baselines: dict[str, dict[str, str]] | None = None) -> str:
    """A line for each cell, and for each of the baselines: name -> scores."""
    columns = list(runs[0].scores)
    rows = [["", "parameters", "training", *columns]]
    for r in runs:
        rows.append([r.cell, f"{r.parameters:,}", f"{r.seconds:.1f} s", *(r.scores[c] for c in columns)])
    for name, scores in (baselines or {}).items():
        rows.append([name, "", "", *(scores.get(c, "") for c in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]])
    return "\n".join(
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows
    )


def figure(runs: Sequence[Run], score: str, panels: int, baseline: tuple[str, float] | None = None):
    """A figure and its axes: the first has each cell's `score` over seconds of training, `panels` more are empty."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(5.2 * (1 + panels), 4.2), layout="constrained")
    axes = made.subplots(1, 1 + panels, squeeze=False)[0]
    for r in runs:
        axes[0].plot(*zip(*r.curve, strict=True), color=COLORS[r.cell], label=r.cell, marker="o", markersize=3)
    if baseline:
        axes[0].axhline(baseline[1], color=GREY, linestyle=":", label=baseline[0])
    axes[0].set(xlabel="seconds of training", ylabel=score, title="while training")
    axes[0].legend()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes


def last_state(state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """h of what a layer returned as its state: the LSTM's is (h, c)."""
    return state[0] if isinstance(state, tuple) else state
