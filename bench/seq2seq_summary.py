"""The README's part on sequence to sequence, from attention.jsonl, decoding.jsonl and g2p*.json of a results folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from bench.summary import BUSY, Line, markdown_table
from bench.timing import geomean

# Word error rates on the same data and protocol, in per cent: cmusphinx/g2p-seq2seq's README and its history.
PUBLISHED = [
    ("LSTM 2 x 64, g2p-seq2seq", "39.6"),
    ("Phonetisaurus, joint n-grams", "33.9"),
    ("LSTM 2 x 512, g2p-seq2seq", "31.1"),
    ("Transformer 3 x 256, g2p-seq2seq", "30.2"),
]


def read_lines(path: Path) -> list[Line]:
    """The latest line of each case and setting; none where there is no file. ValueError for a broken line."""
    latest: dict[tuple, Line] = {}
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            latest[(line["cpu"], line["isa"], line["threads"], line["case"])] = line
        except (json.JSONDecodeError, KeyError) as broken:
            raise ValueError(f"{path}:{number}: not a line of a benchmark: {broken!r}") from broken
    if quick := [line["case"] for line in latest.values() if line.get("quick")]:
        raise ValueError(f"{path}: {quick[0]} is from a --quick run")
    return list(latest.values())


def ratio_text(line: Line) -> str:
    if "wrong" in line:
        return f"WRONG: {line['wrong']}"
    text = f"{line['ratio']:.2f} ({line['ratio_low']:.2f} to {line['ratio_high']:.2f})"
    return f"**{text}**" if line["ratio_low"] < 1 else text


def table(lines: Sequence[Line], unit: str) -> str:
    """One row a case; times are milliseconds a call or, with unit "us", microseconds a step."""
    rows = []
    for line in lines:
        fields = ("us_step", "us_peer_step") if unit == "us" else ("ms", "peer_ms")
        times = [f"{line[field]:.4g}" if field in line else "" for field in fields]
        rows.append([line["case"], *times, ratio_text(line)])
    named = "us a step" if unit == "us" else "ms a call"
    return markdown_table(["case", f"seqkern, {named}", f"PyTorch loop, {named}", "ratio (95 % interval)"], rows)


def where(lines: Sequence[Line], csrc: str) -> str:
    """On what these were measured."""
    first = lines[0]
    busy = max(line.get("others", 0) for line in lines)
    stale = sum(line["csrc"] != csrc for line in lines)
    ratios = [line["ratio"] for line in lines if "ratio" in line]
    return (
        (f"Geometric mean {geomean(ratios):.2f}. " if ratios else "")
        + f"{first['cpu']}, {first['isa']}, {first['threads']} threads, torch {first['torch']}, "
        + f"commit {first['commit']}"
        + (f"; other processes used up to {busy:.1f} cores" if busy > BUSY else "")
        + "."
        + (f" **{stale} of {len(lines)} lines were measured on other sources in csrc/.**" if stale else "")
    )


def g2p_rows(folder: Path) -> list[list[str]]:
    rows = [[name, "", wer, "", ""] for name, wer in PUBLISHED]
    for path in sorted(folder.glob("g2p*.json")):
        found = json.loads(path.read_text())
        threads = found["train_threads"]
        rows.append(
            [
                f"seqkern, [{path.stem}](bench/results/{path.name})",
                f"{found['params'] / 1e6:.2f} M",
                f"{found['wer_greedy']:.2f}",
                f"{found['wer_beam']:.2f}",
                f"{found['train_seconds'] / 60:.1f} min, {threads} thread{'s' * (threads > 1)}",
            ]
        )
    return rows


def section(folder: Path, csrc: str) -> str:
    """Markdown of all that there is in the folder. ValueError for lines that are broken or of a --quick run."""
    parts = []
    if any(folder.glob("g2p*.json")):
        head = ["model", "parameters", "word errors, greedy, %", "beam 5, %", "trained in"]
        parts.append("Letters to phonemes on CMUdict's test words ([protocol](docs/g2p.md)):")
        parts.append(markdown_table(head, g2p_rows(folder)))
    for name, title, unit in (
        (
            "attention",
            "Training the attention decoder with input feeding, forward and backward, beside a PyTorch loop",
            "ms",
        ),
        ("decoding", "Decoding, beside the usual PyTorch loop", "us"),
    ):
        if lines := read_lines(folder / f"{name}.jsonl"):
            parts += [f"{title}:", table(lines, unit), where(lines, csrc)]
    return "\n\n".join(parts)
