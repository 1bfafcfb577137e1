"""The report's figures."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from g2p_tool.data import PHONEMES

TRAINED, VALIDATED, OTHER = "#9db4cf", "#2563ab", "#c2571a"


def curves(log: Sequence[dict[str, Any]]) -> Figure:
    """Loss, error rates, learning rate and words/s over the steps of a log."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    loss, rates, lr, speed = figure.subplots(2, 2, sharex=True).flat
    checked = [line for line in log if "wer" in line]
    steps, at = [line["step"] for line in log], [line["step"] for line in checked]
    loss.plot(steps, [line["loss"] for line in log], color=TRAINED, label="training, with smoothing and dropout")
    loss.plot(at, [line["validation_loss"] for line in checked], "o-", ms=3, color=VALIDATED, label="validation")
    loss.set_title("cross-entropy per phoneme")
    if log:
        ordered = sorted(line["loss"] for line in log)
        loss.set_ylim(0, 1.5 * ordered[9 * len(ordered) // 10])  # not the first steps' losses, or all else is flat
    rates.plot(at, [line["wer"] for line in checked], "o-", ms=3, color=VALIDATED, label="WER")
    rates.plot(at, [line["per"] for line in checked], "o-", ms=3, color=OTHER, label="PER")
    if checked:
        best = min(checked, key=lambda line: (line["wer"], line["per"]))
        for name in ("wer", "per"):
            place = (best["step"], best[name])
            rates.annotate(f"{best[name]:.2f}", place, (0, 6), textcoords="offset points", ha="right")
        highest = checked[min(len(checked) - 1, 1)]["wer"]  # the first validation may be far above the others
        rates.set_ylim(0, max(1.25 * highest, 1))
    rates.set_title("errors, %")
    lr.plot(steps, [line["lr"] for line in log], color=VALIDATED)
    lr.set(title="learning rate", xlabel="step")
    speed.plot(steps, [line["words_per_second"] for line in log], color=VALIDATED)
    speed.set(title="words/s while training", xlabel="step")
    speed.set_ylim(bottom=0)
    for axes in (loss, rates):
        axes.legend(frameon=False)
    for axes in (loss, rates, lr, speed):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def confusion_map(counts: Counter[tuple[str | None, str | None]], size: int = 22) -> Figure:
    """Counts of the phonemes that take part in most errors: dictionary down, model across."""
    part = Counter()
    for (right, said), n in counts.items():
        for phoneme in (right, said):
            part[phoneme] += n
    among = {phoneme for phoneme, _ in part.most_common(size)}
    names: list[str | None] = [p for p in PHONEMES if p in among] + [None] * (None in among)
    figure = Figure(figsize=(6.4, 6.2), layout="constrained")
    axes = figure.add_subplot(xlabel="model", ylabel="dictionary")
    shown = [[counts[right, said] for said in names] for right in names]
    picture = axes.imshow(shown, cmap="Blues")
    labels = [name or "-" for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, shrink=0.7, label="times")
    return figure


def by_length(words: Sequence[str], wrong: Sequence[str]) -> Figure:
    """Share of wrong words for each number of letters; lengths with fewer than 5 words are left out."""
    total, bad = Counter(map(len, words)), Counter(map(len, wrong))
    lengths = sorted(length for length, n in total.items() if n >= 5)
    figure = Figure(figsize=(11, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="letters")
    bars = axes.bar(lengths, [bad[length] / total[length] for length in lengths], color=VALIDATED)
    axes.bar_label(bars, [f"{total[length]:,}" for length in lengths], fontsize=8, color="#5d6876")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xticks(lengths)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
