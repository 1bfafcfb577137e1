"""Turns JSON lines of run.py into a terminal table, a page with every case, a plot, and the README's table.

    python bench/report.py bench/out/cpu.jsonl
    python bench/report.py bench/results/cpu.jsonl --readme

Writes NAME.png and NAME.md beside the first NAME.jsonl. With --readme it also replaces what stands between the markers
in README.md; nothing else writes numbers there, and lines of a --quick run or without the extension are refused.
Lines of a GPU have a table, a page and markers of their own, and so have the results of bench/attention.py,
bench/decoding.py and `examples/g2p.py evaluate`:

    python bench/report.py bench/results --readme
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

from bench import gpu_summary, seq2seq_summary  # noqa: E402
from bench.sources import ROOT, csrc_hash  # noqa: E402
from bench.summary import (  # noqa: E402
    COLUMNS,
    TITLES,
    WORDS,
    Cell,
    Line,
    Setting,
    markdown_table,
    read,
    settings,
    verdict,
)
from bench.terminal import Console, Table  # noqa: E402

BEGIN, END = "<!-- results: written by bench/report.py -->", "<!-- /results -->"
GPU_BEGIN, GPU_END = "<!-- gpu: written by bench/report.py -->", "<!-- /gpu -->"
SEQ2SEQ_BEGIN, SEQ2SEQ_END = "<!-- seq2seq: written by bench/report.py -->", "<!-- /seq2seq -->"
COLORS = {"win": "green", "even": "yellow", "loss": "red", "wrong": "bold white on red"}
MARKS = {"win": "", "even": " ~", "loss": " slower", "wrong": " WRONG"}


def columns_of(setting: Setting) -> list[tuple[str, tuple[str, str], list[str]]]:
    """Title, (pass, dtype) and peers of each column of the summary: torch first, then the fastest of the others."""
    others = [peer for peer in setting.peers if peer != "torch"]
    columns = []
    for peers in (["torch"], others):
        for column in COLUMNS:
            if any(line["peer"] in peers and (line["pass"], line["dtype"]) == column for line in setting.lines):
                name = "torch.nn" if peers == ["torch"] else "fastest of " * (len(peers) > 1) + ", ".join(peers)
                columns.append((f"{TITLES[column[0]]} {column[1]}, {name}", column, peers))
    return columns


def cell_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    wrong = f" {cell.wrong} WRONG" if cell.wrong else ""
    if cell.count == 0:
        return wrong.strip()
    return f"{cell.mean:.2f}" + (f" ({cell.lowest:.2f})" if cell.count > 1 else "") + wrong


# ------------------------------------------------------------------------------------------------------- terminal


def print_setting(setting: Setting, console: Console) -> None:
    every = Table(title="Every case: milliseconds a call, median (p10, p90)", title_justify="left")
    for name in ("case", "peer", "seqkern ms", "peer ms", "ratio", "GF/s", "% of peak"):
        every.add_column(name, justify="left" if name in ("case", "peer") else "right", no_wrap=name == "ratio")
    for line in setting.lines:
        every.add_row(*case_row(line), style=COLORS[verdict(line)] if verdict(line) != "win" else "")
    console.print(every)

    columns = columns_of(setting)
    summary = Table(title="Peer time / seqkern time: geometric mean (lowest case)", title_justify="left")
    summary.add_column("regime")
    for title, _, _ in columns:
        summary.add_column(title, justify="right")
    for group in setting.groups:
        cells = [setting.cell(group, column, peers) for _, column, peers in columns]
        summary.add_row(group, *(colored(cell) for cell in cells))
    console.print(summary)
    if kept := [line for line in setting.lines if "kept" in line and line["peer"] == "torch"]:
        memory = Table(title="Kept for backward, in multiples of the output", title_justify="left")
        for name in ("case", "seqkern", "torch.nn"):
            memory.add_column(name, justify="left" if name == "case" else "right")
        for line in kept:
            memory.add_row(line["case"], f"{line['kept']:.2f}", f"{line['peer_kept']:.2f}")
        console.print(memory)
    console.print(counts(setting), markup=False)
    console.print(setting.where(), markup=False)


def case_row(line: Line) -> list[str]:
    if "wrong" in line:
        return [line["case"], line["peer"], "not timed", "", "WRONG", "", line["wrong"]]
    share = f"{line['peak_share']:.0%}" if "peak_share" in line else ""
    return [
        line["case"],
        line["peer"],
        f"{line['ms']:.4g} ({line.get('p10', line['ms']):.4g}, {line.get('p90', line['ms']):.4g})",
        f"{line['peer_ms']:.4g}",
        f"{line['ratio']:.2f}{MARKS[verdict(line)]}",
        f"{line['gflops']:.4g}" if "gflops" in line else "",
        share,
    ]


def colored(cell: Cell | None) -> str:
    color = "" if cell is None or cell.lowest >= 1 and not cell.wrong else "red" if not cell.mean >= 1 else "yellow"
    return f"[{color}]{cell_text(cell)}[/]" if color else cell_text(cell)


def counts(setting: Setting) -> str:
    """How many cases won and lost against each peer."""
    parts = []
    for peer in setting.peers:
        found = [verdict(line) for line in setting.lines if line["peer"] == peer]
        tally = ", ".join(f"{found.count(kind)} {word}" for kind, word in WORDS.items() if found.count(kind))
        parts.append(f"against {peer}: {tally}")
    return "; ".join(parts).capitalize() + "."


# ------------------------------------------------------------------------------------------------------- markdown


def summary_markdown(setting: Setting, plot: str, page: str, csrc: str) -> str:
    columns = columns_of(setting)
    rows = []
    for group in setting.groups:
        cells = [setting.cell(group, column, peers) for _, column, peers in columns]
        rows.append([group, *(f"**{cell_text(c)}**" if c and not c.lowest >= 1 else cell_text(c) for c in cells)])
    losses = setting.named(lambda kind: kind in ("loss", "wrong"))
    parts = [
        "Peer time / seqkern time, above 1 seqkern is faster: geometric mean of the cases of a regime (lowest single "
        "case). Bold: a case below 1.",
        markdown_table(["regime", *(title for title, _, _ in columns)], rows),
        f"Measured on {setting.where()} {counts(setting)}",
    ]
    if losses:
        listed = ", ".join(f"{line['case']} ({line['peer']}: {case_row(line)[4]})" for line in losses)
        parts.append(f"Slower or wrong beyond noise: {listed}.")
    if stale := setting.stale(csrc):
        parts.append(f"**{stale} of {len(setting.lines)} lines were measured on other sources than these in csrc/.**")
    parts.append(f"[Every case]({page}).\n\n![ratio of each case, by regime]({plot})")
    return "\n\n".join(parts)


def every_case_markdown(setting: Setting) -> str:
    head = ["case", "peer", "seqkern ms (p10, p90)", "peer ms", "ratio", "GF/s", "% of peak", "kept", "torch keeps"]
    rows = []
    for line in setting.lines:
        kept = [f"{line[key]:.1f}" if key in line else "" for key in ("kept", "peer_kept")]
        rows.append([*case_row(line), *kept])
    return f"{setting.where()}\n\n{markdown_table(head, rows)}\n"


def replace_between_markers(text: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """The text with new content between the markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"wanted {begin} and {end}, once each and in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def refusal(lines: Sequence[Line]) -> str | None:
    """Why these lines may not go into the README, or None."""
    if any(line.get("quick") for line in lines):
        return "these lines are from a --quick run"
    cuda = lines[0]["device"] == "cuda"
    ran = [line.get("engine", "unknown") if cuda else line["isa"] for line in lines]
    if {"reference", "unknown"} & set(ran):
        return "these lines were measured without the extension" + " or its CUDA engines" * cuda
    return None


# ----------------------------------------------------------------------------------------------------------- main


def draw(setting: Setting, image: Path, console: Console, where: str | None = None) -> Path | None:
    """The plot's path; None where nothing was timed or matplotlib is not installed."""
    if all("wrong" in line for line in setting.lines):
        return None
    try:
        from bench.plot import plot, plot_gpu
    except ImportError:
        console.print("no plot: matplotlib is not installed", markup=False)
        return None
    if where is None:
        plot(setting, image)
    else:
        plot_gpu(setting, where, image)
    console.print(f"plot: {image}", markup=False)
    return image


def relative(path: Path, readme: Path | None) -> str:
    return os.path.relpath(path.resolve(), (readme or ROOT / "README.md").resolve().parent).replace(os.sep, "/")


def report_cpu(lines: Sequence[Line], base: Path, readme: Path | None, console: Console) -> str:
    """Prints, plots and writes the page; returns the README's part. Machines that ran these sources come first."""
    csrc, sections, pages = csrc_hash(), [], []
    page = base.with_suffix(".md")
    for setting in sorted(settings(lines), key=lambda s: s.stale(csrc) / len(s.lines)):
        first = setting.lines[0]
        suffix = f"-{first['isa']}-{first['threads']}t" if sections else ""
        print_setting(setting, console)
        if stale := setting.stale(csrc):
            console.print(f"[yellow]{stale} of {len(setting.lines)} lines were measured on other sources in csrc/[/]")
        image = base.with_name(f"{base.stem}{suffix}.png")
        draw(setting, image, console)
        sections.append(summary_markdown(setting, relative(image, readme), relative(page, readme), csrc))
        pages.append(every_case_markdown(setting))
    page.write_text("# Every case\n\n" + "\n".join(pages))
    console.print(f"every case: {page}", markup=False)
    return "\n\n".join(sections)


def report_gpu(lines: Sequence[Line], base: Path, readme: Path | None, console: Console) -> str:
    """Prints, plots and writes the page; returns the README's part."""
    csrc, sections, pages = csrc_hash(), [], []
    page = base.with_suffix(".md")
    for setting in gpu_summary.by_gpu(lines):
        section = gpu_summary.summary(setting, csrc)
        console.print(section, markup=False)
        image = base.with_name(f"{base.stem}{'-2' * len(pages)}.png")
        image = draw(setting, image, console, gpu_summary.where(setting))
        links = f"[Every case]({relative(page, readme)})."
        if image:
            links += f"\n\n![ratio of each case, by regime]({relative(image, readme)})"
        sections.append(f"{section}\n\n{links}")
        pages.append(gpu_summary.page(setting, csrc))
    page.write_text("# Beside cuDNN\n\n" + "\n".join(pages))
    console.print(f"every case: {page}", markup=False)
    return "\n\n".join(sections)


def report_seq2seq(folder: Path, readme: Path | None, console: Console) -> int:
    """Prints the Seq2Seq part of the README, and puts it there. Returns 0, or 2 if there is nothing to report."""
    try:
        section = seq2seq_summary.section(folder, csrc_hash())
    except ValueError as broken:
        section, why = "", str(broken)
    else:
        why = f"{folder}: no results of bench/attention.py, bench/decoding.py or g2p"
    console.print(section or why, markup=False)
    if section and readme:
        readme.write_text(replace_between_markers(readme.read_text(), section, SEQ2SEQ_BEGIN, SEQ2SEQ_END))
        console.print(f"updated: {readme}", markup=False)
    return 0 if section else 2


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 if a result was wrong, 2 if there is nothing to report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="+", type=Path, help="files of JSON lines; a folder: its Seq2Seq results")
    parser.add_argument("--readme", nargs="?", type=Path, const=ROOT / "README.md", help="update the table in it")
    options = parser.parse_args(argv)
    console = Console(soft_wrap=True, highlight=False, width=max(140, Console().width))  # a case must stay legible
    if options.json[0].is_dir():
        return report_seq2seq(options.json[0], options.readme, console)
    try:
        lines = read(options.json)
    except (OSError, ValueError) as unreadable:
        console.print(str(unreadable), markup=False)
        return 2
    devices = {line["device"] for line in lines}
    if len(devices) != 1:
        wanted = "no lines" if not lines else f"wanted lines of one device, got {' and '.join(sorted(devices))}"
        console.print(f"{', '.join(map(str, options.json))}: {wanted}", markup=False)
        return 2
    if options.readme and (reason := refusal(lines)):
        console.print(f"{options.readme} is left as it is: {reason}", markup=False)
        return 2
    cuda = devices == {"cuda"}
    section = (report_gpu if cuda else report_cpu)(lines, options.json[0], options.readme, console)
    if options.readme:
        text = options.readme.read_text()
        options.readme.write_text(replace_between_markers(text, section, *((GPU_BEGIN, GPU_END) if cuda else ())))
        console.print(f"updated: {options.readme}", markup=False)
    return 1 if any("wrong" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
