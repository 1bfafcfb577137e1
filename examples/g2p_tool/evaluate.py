"""`evaluate`: word and phoneme error rates on the test set, greedy and with a beam, as a table and as JSON."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from g2p_tool import files
from g2p_tool.data import PROTOCOL, read_dictionary, split
from g2p_tool.model import best_path, last_path, load_model, parameters, pronounce
from g2p_tool.scoring import error_rates

# Published on this split of the CMUdict of its time (2017; today's has a few words more): WER in per cent, and where.
PUBLISHED = (
    ("g2p-seq2seq, LSTM 2 x 64", 39.61),
    ("Phonetisaurus, n-gram WFST", 33.89),
    ("g2p-seq2seq, LSTM 2 x 512", 31.14),
    ("g2p-seq2seq, Transformer 3 x 256", 30.2),
)
SOURCE = "cmusphinx/g2p-seq2seq, README"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench/out/g2p"), help="the training's folder")
    parser.add_argument("--beam", type=int, default=5, help="hypotheses of the beam search, default 5")
    parser.add_argument("--json", type=Path, default=Path("bench/results/g2p.json"), help="where the results go")
    parser.add_argument("--threads", type=int, help="default: torch's")


def train_seconds(folder: Path, stored: dict[str, Any]) -> float:
    """Wall time of the whole training so far, with its validations: also what came after the best model."""
    path = last_path(folder)
    return files.load(path, mmap=True)["seconds"] if path.exists() else stored["seconds"]


def measure(folder: Path, beam: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results, and what the model said to each test word: {"words", "greedy", "beam"}."""
    model, stored = load_model(best_path(folder))
    dictionary = read_dictionary()
    words = split(list(dictionary)).test
    said, rates, seconds = {}, {}, {}
    for name, width in (("greedy", 1), ("beam", beam)):
        start = time.perf_counter()
        said[name] = pronounce(model, words, width)
        seconds[name] = round(time.perf_counter() - start, 4)
        rates[name] = error_rates(words, said[name], dictionary)
    machine = describe("cpu")
    results = {
        "protocol": PROTOCOL,
        "wer_greedy": round(rates["greedy"].wer, 3),
        "wer_beam": round(rates["beam"].wer, 3),
        "per": round(rates["greedy"].per, 3),
        "per_beam": round(rates["beam"].per, 3),
        "beam": beam,
        "train_seconds": round(train_seconds(folder, stored), 1),
        "train_threads": stored["threads"],
        "train_commit": stored["commit"],
        "step": stored["report"]["step"],
        "validation": {name: round(stored["report"][name], 3) for name in ("wer", "per", "validation_loss")},
        "params": parameters(model),
        "test_words": len(words),
        "greedy_seconds": seconds["greedy"],
        "beam_seconds": seconds["beam"],
        "settings": stored["settings"],
        **{name: machine[name] for name in ("cpu", "cores", "isa", "threads", "torch", "csrc", "commit")},
    }
    return results, {"words": words, **said}


def table_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, WER and PER of this model and of published ones, the worst first."""
    minutes, size, threads = results["train_seconds"] / 60, results["params"] / 1e6, results["train_threads"]
    name = f"this model, {size:.2f} M parameters, {minutes:.3g} minutes on {threads} thread{'s' * (threads != 1)}"
    rows = [
        (f"{name}, greedy", results["wer_greedy"], f"{results['per']:.2f}"),
        (f"{name}, beam {results['beam']}", results["wer_beam"], f"{results['per_beam']:.2f}"),
        *((f"{title} ({SOURCE})", wer, "") for title, wer in PUBLISHED),
    ]
    return [(title, f"{wer:.2f}", per) for title, wer, per in sorted(rows, key=lambda row: -row[1])]


def table(results: dict[str, Any]) -> str:
    rows = [("", "WER %", "PER %"), *table_rows(results)]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:{width}}  {wer:>5}  {per:>5}" for name, wer, per in rows)


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for a beam or threads below 1, FileNotFoundError without a model."""
    for name in ("beam", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    results, said = measure(args.out, args.beam)
    files.write_text(args.json, json.dumps(results, indent=2) + "\n")
    files.write_text(args.out / "evaluation.json", json.dumps({"results": results, "said": said}) + "\n")
    print(table(results))
    for name in ("greedy", "beam"):
        words, seconds = results["test_words"], results[f"{name}_seconds"]
        print(f"{name}: {words:,} words in {seconds:.1f} s, {words / seconds:,.0f} words/s")
    print(f"written to {args.json}")
    return 0
