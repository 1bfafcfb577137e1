"""The plot: every case's ratio, by regime."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

from bench.summary import COLUMNS, TITLES, WORDS, Line, Setting, verdict  # noqa: E402
from bench.timing import geomean  # noqa: E402

COLORS = {"win": "#1b7f5c", "even": "#b8860b", "loss": "#c0392b"}


Panel = tuple[str, list[Line]]  # title, timed lines


def plot(setting: Setting, path: Path) -> None:
    """One panel for each peer, pass and dtype; one row for each regime; a dot for each case, on a log axis.

    What stands right of the line at 1 is faster with seqkern. The diamond is the geometric mean, also in figures.
    """
    timed = [line for line in setting.lines if "wrong" not in line]
    panels: list[Panel] = []
    for peer in setting.peers:
        for column in COLUMNS:
            here = [line for line in timed if line["peer"] == peer and (line["pass"], line["dtype"]) == column]
            title = f"{TITLES[column[0]]}, {column[1]}\nagainst {peer.replace('torch', 'torch.nn')}"
            panels += [(title, here)] if here else []
    _draw(panels, setting.groups, setting.where().replace(", torch ", "\ntorch ", 1), path)


def plot_gpu(setting: Setting, where: str, path: Path) -> None:
    """The same beside cuDNN: a panel for each pass, eager."""
    timed = [line for line in setting.lines if "wrong" not in line]
    panels = [(f"{title}, against cuDNN", [x for x in timed if x["pass"] == name]) for name, title in TITLES.items()]
    _draw([panel for panel in panels if panel[1]], setting.groups, where.replace(", TF32", "\nTF32", 1), path)


def _draw(panels: list[Panel], names: list[str], where: str, path: Path) -> None:
    if not panels:
        raise ValueError("no line has a time: nothing to plot")
    groups = names[::-1]
    wide = min(4, len(panels))
    high = -(-len(panels) // wide)
    size = (2.2 + 3.0 * wide, 1.6 + high * (0.9 + 0.3 * len(groups)))
    figure, axes = plt.subplots(high, wide, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    ratios = [line["ratio"] for _, lines in panels for line in lines]
    limits = min(0.5, min(ratios) / 1.2), max(2.0, max(ratios) * 1.2)
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        axis.axvspan(limits[0], 1, color=COLORS["loss"], alpha=0.06, lw=0)
        axis.axvline(1, color="black", lw=1.2)
        for row, group in enumerate(groups):
            if here := [line for line in lines if line["group"] == group]:
                _row(axis, row, here)
        axis.set_title(title, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xlim(*limits)
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", alpha=0.25)
        axis.set_yticks(range(len(groups)), groups)
        axis.set_ylim(-0.6, len(groups) - 0.2)
        axis.tick_params(labelsize=8, labelbottom=True)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    marks = [plt.Line2D([], [], marker="o", ls="", color=COLORS[k], label=f"a case: {WORDS[k]}") for k in COLORS]
    marks += [plt.Line2D([], [], marker="D", ls="", markerfacecolor="none", color="black", label="geometric mean")]
    figure.legend(handles=marks, loc="outside lower center", ncols=2 if wide == 1 else 4, fontsize=8, frameon=False)
    figure.suptitle(f"Peer time / seqkern time (right of 1: seqkern is faster)\n{where}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _row(axis: Axes, row: int, lines: list[Line]) -> None:
    colors = [COLORS[verdict(line)] for line in lines]
    axis.scatter([line["ratio"] for line in lines], [row] * len(lines), s=22, alpha=0.75, lw=0, c=colors)
    mean = geomean([line["ratio"] for line in lines])
    axis.scatter([mean], [row], marker="D", s=44, facecolor="none", edgecolor="black", zorder=3)
    label = axis.annotate(f"{mean:.2f}", (mean, row), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.4})
