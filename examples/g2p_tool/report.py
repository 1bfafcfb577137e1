"""`report`: a page about a training in one HTML file: results, curves, errors, confusions, attention, settings."""

import argparse
import base64
import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from g2p_tool import files, plots
from g2p_tool.attention import heat_maps
from g2p_tool.data import check_word, read_dictionary, split
from g2p_tool.evaluate import table_rows
from g2p_tool.model import best_path, load_model, parameters, pronounce
from g2p_tool.scoring import align, nearest

WORDS = ("knight", "phonetics", "thoroughly", "recurrent", "o'clock", "pseudonym")
GAP = "\N{MIDDLE DOT}"


class Error(NamedTuple):
    word: str
    right: list[str]  # the nearest pronunciation
    said: list[str]
    distance: int


class Said(NamedTuple):
    """What the best model said to some words, and which words these are."""

    title: str
    words: list[str]
    said: list[list[str]]
    errors: list[Error]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench/out/g2p"), help="the training's folder")
    parser.add_argument("--html", type=Path, help="default: report.html in that folder")
    parser.add_argument("--words", nargs="+", type=str.lower, default=list(WORDS), help="to draw the attention of")


def image(figure: Figure, alt: str) -> str:
    """The figure as an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def rows(cells: Sequence[Sequence[str]], heads: Sequence[str], classes: Sequence[str]) -> str:
    """A table. Cells are HTML already."""
    head = "".join(f'<th class="{c}">{h}</th>' for h, c in zip(heads, classes, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{c}">{x}</td>' for x, c in zip(row, classes, strict=True)) + "</tr>"
        for row in cells
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def marked(error: Error) -> tuple[str, str]:
    """Right and said phonemes as HTML, what differs in bold; a dot where one has nothing for the other's."""
    lines = ([], [])
    for pair in align(error.right, error.said):
        for line, phoneme in zip(lines, pair, strict=True):
            text = html.escape(phoneme or GAP)
            line.append(text if pair[0] == pair[1] else f"<b>{text}</b>")
    return " ".join(lines[0]), " ".join(lines[1])


def error_table(errors: Sequence[Error]) -> str:
    cells = [(html.escape(e.word), *marked(e), str(e.distance)) for e in errors]
    return rows(cells, ("word", "dictionary", "model", "edits"), ("", "phonemes", "phonemes", "number"))


def confusions(errors: Sequence[Error]) -> Counter[tuple[str | None, str | None]]:
    """How often a phoneme was said for another; None: nothing was there, or nothing was said."""
    return Counter(pair for e in errors for pair in align(e.right, e.said) if pair[0] != pair[1])


def confusion_table(counts: Counter[tuple[str | None, str | None]], count: int = 20) -> str:
    total, most = counts.total(), counts.most_common(count)
    cells = [
        (
            html.escape(right or "nothing"),
            html.escape(said or "nothing"),
            f"{n:,}",
            f"{100 * n / total:.1f}",
            f'<span class="bar" style="width: {120 * n / most[0][1]:.0f}px"></span>',
        )
        for (right, said), n in most
    ]
    heads = ("dictionary", "model", "times", "% of edits", "")
    return rows(cells, heads, ("phonemes", "phonemes", "number", "number", ""))


def said_of(folder: Path, model: Any, step: int) -> tuple[Said, dict[str, Any] | None]:
    """What `evaluate` stored of this very model, and its results.

    Where it has not seen this model: what the model says to a part of the validation words, and None.
    """
    dictionary = read_dictionary()
    path, results = folder / "evaluation.json", None
    stored = json.loads(path.read_text()) if path.exists() else None
    if stored and stored["results"]["step"] == step:
        results, words = stored["results"], stored["said"]["words"]
        title, said = f"{len(words):,} test words, beam {results['beam']}", stored["said"]["beam"]
    else:
        words = split(list(dictionary)).validation[::3]
        title, said = f"{len(words):,} validation words, greedy", pronounce(model, words)
    errors = []
    for word, one in zip(words, said, strict=True):
        distance, right = nearest(one, dictionary[word])
        if distance:
            errors.append(Error(word, right, one, distance))
    errors.sort(key=lambda e: (-e.distance, e.word))
    return Said(title, words, said, errors), results


def number_cards(results: dict[str, Any] | None, stored: dict[str, Any], params: int, seconds: float) -> str:
    if results:
        cards = [
            (f"{results['wer_beam']:.2f} %", f"WER, test, beam {results['beam']}"),
            (f"{results['wer_greedy']:.2f} %", "WER, test, greedy"),
            (f"{results['per_beam']:.2f} %", f"PER, test, beam {results['beam']}"),
        ]
    else:
        report = stored["report"]
        cards = [(f"{report['wer']:.2f} %", "WER, validation"), (f"{report['per']:.2f} %", "PER, validation")]
    cards += [(f"{params / 1e6:.2f} M", "parameters"), (f"{seconds / 60:.1f} min", "of training")]
    return "".join(f"<div><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>" for b, s in cards)


def section(title: str, text: str, *cards: str) -> str:
    inner = "".join(f'<div class="card">{card}</div>' for card in cards)
    inner = f'<div class="two">{inner}</div>' if len(cards) > 1 else inner
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{inner}</section>"


def error_sections(said: Said) -> list[str]:
    counts = confusions(said.errors)
    step = max(1, len(said.errors) // 30)
    sample = sorted(said.errors[step // 2 :: step][:30], key=lambda e: e.word)
    return [
        section(
            "Errors: the furthest off",
            f"{len(said.errors):,} of {said.title} are wrong; those with the most edits.",
            error_table(said.errors[:20]),
        ),
        section(
            "Errors: a cross-section",
            "Errors in equal steps from the furthest off to the nearest: what most of them are like.",
            error_table(sample),
        ),
        section(
            "Confusions",
            "Edits that make of the nearest pronunciation what the model said.",
            confusion_table(counts),
            image(plots.confusion_map(counts), "how often each phoneme was said for another"),
        ),
        section(
            "Length",
            "Share of wrong words by their length in letters; the number above is how many words have it.",
            image(plots.by_length(said.words, [e.word for e in said.errors]), "share of wrong words by length"),
        ),
    ]


def settings_section(stored: dict[str, Any]) -> str:
    cells = [(html.escape(name), html.escape(str(value))) for name, value in stored["settings"].items()]
    half = -(-len(cells) // 2)
    text = f"Best model at step {stored['report']['step']:,}; trained on commit {stored['commit']}"
    halves = (rows(part, ("setting", "value"), ("", "")) for part in (cells[:half], cells[half:]))
    return section("Settings", f"{text}, {stored['threads']} threads.", *halves)


def page(folder: Path, words: Sequence[str]) -> str:
    """The page of the training in a folder. Raises FileNotFoundError where none has a best model yet."""
    model, stored = load_model(best_path(folder))
    settings, log = stored["settings"], files.read_log(folder / "log.jsonl")
    said, results = said_of(folder, model, stored["report"]["step"])
    seconds = results["train_seconds"] if results else log[-1]["seconds"]
    parts = [f'<div class="numbers">{number_cards(results, stored, parameters(model), seconds)}</div>']
    if results:
        cells = [tuple(map(html.escape, row)) for row in table_rows(results)]
        cells = [tuple(f"<b>{x}</b>" for x in row) if row[0].startswith("this model") else row for row in cells]
        table = rows(cells, ("", "WER %", "PER %"), ("", "number", "number"))
        text = "Published on this split of the CMUdict of their time, 2017; today's has other words too."
        parts.append(section("Beside published results", text, table))
    text = "Error rates are those of the averaged weights on validation words, greedy."
    parts.append(section("Training", text, image(plots.curves(log), "loss, error rates, learning rate, words/s")))
    if said.errors:
        parts += error_sections(said)
    if model.decoder.attention is not None:
        text = "Where the model looked (letters, left to right) for each phoneme that it said (top to bottom)."
        parts.append(section("Attention", text, image(heat_maps(model, words), "attention heat maps")))
    parts.append(settings_section(stored))
    title = f"Letters to phonemes: {settings['layers']}-layer {settings['cell'].upper()}, hidden {settings['hidden']}"
    style = (Path(__file__).parent / "page.css").read_text()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head><body><main><h1>{title}</h1>'
        f"<p>CMUdict without stress; seqkern.seq2seq, attention: {settings['attention']}</p>{''.join(parts)}"
        "</main></body></html>\n"
    )


def run(args: argparse.Namespace) -> int:
    """Raises FileNotFoundError without a model, ValueError for words that it cannot read."""
    for word in args.words:
        check_word(word)
    path = args.html or args.out / "report.html"
    files.write_text(path, page(args.out, args.words))
    print(f"written to {path}")
    return 0
