"""`compare`: one training on torch.nn and on seqkern, from the same weights and on the same batches.

The model is a sequence to sequence in its seed form: a bidirectional encoder reads the letters; the last states of its
two directions, joined by a linear layer, are the context vector: the first state of the decoder, which writes the
phonemes one by one. While training, the decoder is given the right phonemes (teacher forcing), so that a whole word is
one call of the layer. It is written once: `layers` is `torch.nn` or `seqkern`.
"""

import argparse
import importlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence
from tqdm import tqdm

from g2p_tool.data import PAD, SOURCE_VOCAB, TARGET_VOCAB, Batch, Pairs, read_dictionary, split
from g2p_tool.model import CELLS

BACKENDS = {"torch": "torch.nn", "seqkern": "seqkern"}
BLOCK = 5  # steps that one backend makes before the other one's turn
WARM_UP = 2  # blocks that are not timed
COMPARED_STEPS = 200
# torch.nn in float32 is off its own float64 curve by 2e-7 to 3e-7, for each of the three cells; the bound leaves room
# for another order of summation. Wrong outputs and gradients are far above it, except a gradient that is wrong by one
# factor everywhere: Adam hides that.
LOSS_BOUND = 2e-6


def batches(pairs: Pairs, size: int, seed: int) -> Iterator[Batch]:
    """Epoch after epoch without end, in an order that the seed alone decides."""
    for number in itertools.count():
        yield from map(pairs.batch, pairs.epoch(size, seed, number))


class Seq2Seq(nn.Module):
    """Encoder, context vector, decoder.

    Args:
        layers: where the class of the recurrent layers comes from: `torch.nn` or `seqkern`.
        cell: "rnn", "gru" or "lstm".
        hidden: H, the size of the decoder's state and of each direction of the encoder.
        embedding: E, the size of a letter's and of a phoneme's vector.
    """

    def __init__(self, layers: ModuleType, cell: str, hidden: int, embedding: int = 64) -> None:
        super().__init__()
        recurrent = getattr(layers, cell.upper())
        self.letters = nn.Embedding(SOURCE_VOCAB, embedding, padding_idx=PAD)
        self.phonemes = nn.Embedding(TARGET_VOCAB, embedding, padding_idx=PAD)
        self.encoder = recurrent(embedding, hidden, bidirectional=True)
        states = 2 if cell == "lstm" else 1  # h and c, or h
        self.bridges = nn.ModuleList(nn.Linear(2 * hidden, hidden) for _ in range(states))
        self.decoder = recurrent(embedding, hidden)
        self.output = nn.Linear(hidden, TARGET_VOCAB)

    def encode(self, letters: Tensor, lengths: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The context vector. From letters [S, B] and lengths [B] the decoder's first state [1, B, H] (LSTM: h, c)."""
        _, state = self.encoder(pack_padded_sequence(self.letters(letters), lengths, enforce_sorted=False))
        parts = state if isinstance(state, tuple) else (state,)  # each [2, B, H]: both directions' last
        joined = [torch.tanh(b(torch.cat((p[0], p[1]), -1)))[None] for b, p in zip(self.bridges, parts, strict=True)]
        return joined[0] if len(joined) == 1 else tuple(joined)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [T, B, V] of the phoneme at each place, given the right ones before it."""
        y, _ = self.decoder(self.phonemes(batch.given), self.encode(batch.letters, batch.lengths))
        return self.output(y)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over the real places: padding has no part in it."""
        return cross_entropy(self(batch).flatten(0, 1), batch.wanted.flatten(), ignore_index=PAD)


def layer_classes(backend: str) -> ModuleType:
    return importlib.import_module(BACKENDS[backend])


class Run:
    """One model in training, and what it did so far. After its weights are drawn, nothing in it is random."""

    def __init__(self, backend: str, args: argparse.Namespace, steps: int) -> None:
        torch.manual_seed(args.seed)
        self.backend = backend
        self.model = Seq2Seq(layer_classes(backend), args.cell, args.hidden)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1, 0.02, total_iters=steps)
        self.losses: list[float] = []
        self.blocks: list[tuple[int, float]] = []  # words and seconds

    def train(self, block: Sequence[Batch]) -> None:
        start = time.perf_counter()
        for batch in block:
            self.optimizer.zero_grad()
            loss = self.model.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(loss.item())
        self.blocks.append((sum(len(batch.lengths) for batch in block), time.perf_counter() - start))

    def words_per_second(self) -> float:
        """In the training steps alone, warm-up left out; NaN where nothing is left."""
        timed = self.blocks[WARM_UP:]
        return sum(words for words, _ in timed) / sum(seconds for _, seconds in timed) if timed else math.nan


def train(runs: Sequence[Run], source: Iterator[Batch], steps: int) -> None:
    """Trains every run on the same batches. They take turns, A B B A, so that what else the machine does slows all."""
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for number, start in enumerate(range(0, steps, BLOCK)):
            block = list(itertools.islice(source, min(BLOCK, steps - start)))
            for run in runs if number % 2 == 0 else runs[::-1]:
                run.train(block)
            bar.set_postfix({run.backend: f"{run.losses[-1]:.4f}" for run in runs}, refresh=False)
            bar.update(len(block))


def same_curve(a: Run, b: Run) -> bool:
    """Prints how fast b is beside a and how far apart their loss curves are; False where that is beyond rounding."""
    ratios = [x / y for (_, x), (_, y) in zip(a.blocks[WARM_UP:], b.blocks[WARM_UP:], strict=True)]
    if ratios:
        low, median, high = torch.tensor(ratios).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        print(f"{b.backend} trains {median:.2f} times as fast as {a.backend}", end=" ")
        print(f"(median of {len(ratios)} paired blocks of up to {BLOCK} steps; p10 {low:.2f}, p90 {high:.2f})")
    x, y = (torch.tensor(run.losses[:COMPARED_STEPS], dtype=torch.float64) for run in (a, b))
    worst, step = ((x - y).abs() / x).max(0)
    same = bool(worst <= LOSS_BOUND)  # False for NaN
    print(f"largest relative difference of the losses over {len(x)} steps: {worst:.1e} (step {step + 1}),", end=" ")
    print(f"bound {LOSS_BOUND:.0e}: {'the same curve' if same else 'EXCEEDED, THE CURVES ARE NOT THE SAME'}")
    return same


def plot(runs: Sequence[Run], path: Path, title: str) -> None:
    """Writes an image of the loss curves."""
    from matplotlib.figure import Figure  # here, so that training needs no matplotlib

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="cross-entropy per phoneme")
    for run, style in zip(runs, ("-", "--"), strict=False):
        axes.plot(range(1, len(run.losses) + 1), run.losses, style, label=run.backend)
    axes.legend()
    figure.savefig(path, dpi=120)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cell", choices=CELLS, default="gru")
    parser.add_argument("--steps", type=int, default=COMPARED_STEPS, help=f"default {COMPARED_STEPS}")
    parser.add_argument("--batch", type=int, default=64, help="words per step, default 64")
    parser.add_argument("--hidden", type=int, default=256, help="default 256")
    parser.add_argument("--lr", type=float, default=2e-3, help="at the first step; falls linearly to a fiftieth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write the loss curves to this image")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if the losses differ. Raises ValueError for an option out of its range."""
    for name in ("steps", "batch", "hidden", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    dictionary = read_dictionary()
    pairs = Pairs(split(list(dictionary)).train, dictionary)
    runs = [Run(backend, args, args.steps) for backend in BACKENDS]
    title = f"G2P on CMUdict: {args.cell}, hidden {args.hidden}, batch {args.batch}, seed {args.seed}"
    print(f"{title}, {args.steps} steps, {torch.get_num_threads()} threads")
    train(runs, batches(pairs, args.batch, args.seed), args.steps)
    for one in runs:
        speed, losses = one.words_per_second(), one.losses
        print(f"{one.backend:8} {speed:8,.0f} words/s, loss {losses[0]:.4f} to {losses[-1]:.4f}")
    if args.plot:
        plot(runs, args.plot, title)
    return 0 if same_curve(*runs) else 1
