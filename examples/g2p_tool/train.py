"""`train`: the loop around a training: reports, checkpoints, the best model, and an orderly end at a signal."""

import argparse
import contextlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.machine import isa
from bench.sources import commit
from g2p_tool import files
from g2p_tool.data import Dictionary, Pairs, read_dictionary, split
from g2p_tool.model import MODEL_SETTINGS, add_model_options, last_path, parameters, pronounce
from g2p_tool.scoring import error_rates
from g2p_tool.training import TRAIN_SETTINGS, Training, learning_rate, loss_of

SETTINGS = MODEL_SETTINGS | TRAIN_SETTINGS | {"validate_words": 2000, "validate_every": 0, "log_every": 100}
POSITIVE = {"layers", "hidden", "embedding", "batch", "epochs", "steps", "lr", "clip"}
POSITIVE |= {"validate_words", "log_every", "threads"}
NOT_NEGATIVE = ("warmup", "validate_every", "save_minutes")
BF16_ISAS = ("avx512_bf16", "amx")
SHARES = ("dropout", "smoothing", "ema")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help=f"default {SETTINGS['epochs']:g}")
    length.add_argument("--steps", type=int, help="instead of epochs")
    parser.add_argument("--batch", type=int, help=f"pairs of a step, default {SETTINGS['batch']}")
    parser.add_argument("--lr", type=float, help=f"highest learning rate, default {SETTINGS['lr']}")
    parser.add_argument("--warmup", type=int, help=f"steps over which it rises, default {SETTINGS['warmup']}")
    parser.add_argument("--decay", choices=("linear", "cosine"), help="how it falls to 0, default linear")
    parser.add_argument("--clip", type=float, help=f"largest norm of the gradient, default {SETTINGS['clip']:g}")
    parser.add_argument("--smoothing", type=float, help=f"of the labels, default {SETTINGS['smoothing']}")
    parser.add_argument("--ema", type=float, help=f"averaging of the weights, default {SETTINGS['ema']}")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="autocast to bfloat16; default: where the CPU has it"
    )
    parser.add_argument("--seed", type=int, help=f"default {SETTINGS['seed']}")
    parser.add_argument("--validate-words", type=int, help=f"default {SETTINGS['validate_words']}")
    parser.add_argument("--validate-every", type=int, help="steps; default: an epoch")
    parser.add_argument("--log-every", type=int, help=f"steps, default {SETTINGS['log_every']}")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="between checkpoints, default 3")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's, resumed: as before")
    parser.add_argument("--out", type=Path, default=Path("bench/out/g2p"), help="folder, default bench/out/g2p")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", default=False, help="go on from the folder's checkpoint")
    start.add_argument("--overwrite", action="store_true", default=False, help="drop the training in the folder")


def check(settings: dict[str, Any]) -> None:
    """Raises ValueError for a setting out of its range."""
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if name in POSITIVE and value is not None and not value > 0:
            raise ValueError(f"{option} must be more than 0, got {value}")
        if name in NOT_NEGATIVE and not value >= 0:
            raise ValueError(f"{option} must be 0 or more, got {value}")
        if name in SHARES and not 0 <= value < 1:
            raise ValueError(f"{option} must be at least 0 and less than 1, got {value}")


class Stop:
    """Set by SIGINT or SIGTERM inside the block. A second one has its usual effect."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "Stop":
        self.before = {number: signal.signal(number, self._seen) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _seen(self, number: int, _: object) -> None:
        self.signal = number
        signal.signal(number, self.before[number])


class Validation:
    """A fixed part of the validation words: every k-th of them."""

    def __init__(self, words: list[str], dictionary: Dictionary, count: int) -> None:
        self.words, self.dictionary = words[:: max(1, len(words) // count)][:count], dictionary
        pairs = Pairs(self.words, dictionary)
        self.batches = [pairs.batch(rows) for rows in pairs.epoch(256, 0, 0)]

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        """Error rates of what it says greedily, in per cent, and the loss without smoothing."""
        losses = [(loss_of(model, batch).item(), int((batch.wanted != 0).sum())) for batch in self.batches]
        rates = error_rates(self.words, pronounce(model, self.words), self.dictionary)
        mean = sum(loss * places for loss, places in losses) / sum(places for _, places in losses)
        return {"validation_loss": mean, "wer": rates.wer, "per": rates.per}


class Run:
    """A training in its folder: last.pt to go on from, best.pt the best averaged weights so far, log.jsonl."""

    def __init__(self, folder: Path, training: Training, validation: Validation) -> None:
        self.folder, self.training, self.validation = folder, training, validation
        self.commit = commit()
        self.saved = time.monotonic()

    def save(self) -> None:
        files.save(last_path(self.folder), self.training.state() | {"threads": torch.get_num_threads()})
        self.saved = time.monotonic()

    def save_best(self) -> None:
        training = self.training
        best = {
            "settings": training.settings,
            "model": training.average.state_dict(),
            "report": training.best,
            "params": parameters(training.average),
            "seconds": training.seconds,
            "threads": torch.get_num_threads(),
            "commit": self.commit,
        }
        files.save(self.folder / "best.pt", best)

    def report(self, words_per_second: float) -> dict[str, Any]:
        """Writes a line of the log; with error rates where the step asks for them."""
        t = self.training
        line = {"step": t.step, "epoch": round(t.step / t.per_epoch, 4), **t.means()}
        line["lr"] = learning_rate(t.step - 1, t.settings, t.steps)
        if self.validates():
            line |= self.validation(t.average)
            line["best"] = t.best is None or (line["wer"], line["per"]) < (t.best["wer"], t.best["per"])
        line |= {"seconds": round(t.seconds, 1), "words_per_second": round(words_per_second, 1)}
        if line.get("best"):
            t.best = line
            self.save_best()
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        return line

    def validates(self) -> bool:
        t = self.training
        return t.step % (t.settings["validate_every"] or t.per_epoch) == 0 or t.step == t.steps

    def reports(self) -> bool:
        return self.training.step % self.training.settings["log_every"] == 0 or self.validates()

    def train(self, save_minutes: float, stop: Stop) -> None:
        """To the end, or to a signal; saves at the start, at times and at the end."""
        t = self.training
        self.save()
        began = time.monotonic() - t.seconds
        with tqdm(total=t.steps, initial=t.step, unit="step", disable=None, smoothing=0.05) as bar:
            shown: dict[str, str] = {}
            busy = 0.0
            while t.step < t.steps and stop.signal is None:
                start = time.perf_counter()
                loss = t.advance()
                busy += time.perf_counter() - start
                t.seconds = time.monotonic() - began
                shown["loss"] = f"{loss:.3f}"
                if self.reports():
                    line = self.report(t.since["words"] / busy)
                    t.seconds = time.monotonic() - began
                    shown |= {"words/s": f"{line['words_per_second']:,.0f}"}
                    busy = 0.0
                    if "wer" in line:
                        shown |= {"PER": f"{line['per']:.2f}", "WER": f"{line['wer']:.2f}"}
                        bar.write(self.told(line))
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if time.monotonic() - self.saved > 60 * save_minutes:
                    self.save()
            self.save()

    def told(self, line: dict[str, Any]) -> str:
        left = line["seconds"] / line["step"] * (self.training.steps - line["step"])
        return (
            f"step {line['step']:6} epoch {line['epoch']:5.2f}  {line['seconds']:7.0f} s  loss {line['loss']:.4f}  "
            f"validation {line['validation_loss']:.4f}  PER {line['per']:5.2f} %  WER {line['wer']:5.2f} %"
            f"{' best' if line['best'] else '     '}  {line['words_per_second']:7,.0f} words/s  {left:6.0f} s left"
        )


def start(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The settings, and the state to go on from. Raises ValueError where the folder or the options do not fit."""
    given = {name: value for name, value in vars(args).items() if name in SETTINGS}
    check(SETTINGS | vars(args))
    path = last_path(args.out)
    if not args.resume:
        if path.exists() and not args.overwrite:
            raise ValueError(f"{args.out} holds a training: go on with --resume, or drop it with --overwrite")
        settings = SETTINGS | given
        if settings["bf16"] is None:
            settings["bf16"] = isa() in BF16_ISAS
        return settings, None
    if not path.exists():
        raise ValueError(f"--resume wants a checkpoint {path}, which is not there")
    state = files.load(path)
    for name, value in given.items():
        if state["settings"][name] != value:
            raise ValueError(f"{path} was trained with {name} {state['settings'][name]}, got {value}")
    return state["settings"], state


def clear(folder: Path) -> None:
    for name in ("last.pt", "best.pt", "log.jsonl", "evaluation.json"):
        (folder / name).unlink(missing_ok=True)


def run(args: argparse.Namespace) -> int:
    settings, state = start(args)
    threads = args.threads or (state["threads"] if state else None)
    if threads:
        torch.set_num_threads(threads)
    dictionary = read_dictionary()
    parts = split(list(dictionary))
    training = Training(settings, Pairs(parts.train, dictionary))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.only_one(args.out))
        except BlockingIOError:
            raise ValueError(f"another process trains in {args.out}") from None
        if state is None:
            clear(args.out)
        else:
            training.restore(state)
            files.cut_log(args.out / "log.jsonl", training.step)
        stop = stack.enter_context(Stop())
        work = Run(args.out, training, Validation(parts.validation, dictionary, settings["validate_words"]))
        told = ", ".join(f"{name} {value}" for name, value in settings.items() if value != SETTINGS[name])
        print(f"{args.out}: {parameters(training.model):,} parameters, {len(training.pairs):,} pairs,", end=" ")
        print(f"{training.steps:,} steps, {torch.get_num_threads()} threads; {told or 'default settings'}")
        if state is not None:
            print(f"resumed at step {training.step:,}, after {training.seconds:,.0f} s")
        work.train(args.save_minutes, stop)
    if stop.signal is not None and training.step < training.steps:
        name = signal.Signals(stop.signal).name
        print(f"{name}: stopped after step {training.step:,} of {training.steps:,}, saved; go on with --resume")
        return 128 + stop.signal
    best = training.best
    print(f"done in {training.seconds:,.0f} s; best at step {best['step']:,}:", end=" ")
    print(f"PER {best['per']:.2f} %, WER {best['wer']:.2f} % on {len(work.validation.words):,} validation words")
    return 0
