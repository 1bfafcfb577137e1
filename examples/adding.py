"""The adding problem: how far RNN, LSTM and GRU learn to look back, and how far their gradients reach.

    python examples/adding.py --time 100 400 --plot adding.png

A sequence has two rows: numbers from [0, 1), and marks, a 1 at two steps and 0 elsewhere, the first in the first half.
The answer, wanted after the last step, is the sum of the two marked numbers (Hochreiter and Schmidhuber 1997). Who
always answers 1 has a mean squared error of 1/6; below that, a model has carried something over time.

For each cell and length this trains a model, and shows with `seqkern.diagnostics.gradient_flow` the gradient of the
loss with respect to the state at every step, before training and after.

Needs: pip install matplotlib (for --plot)
"""

import argparse
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import seqkern
from seqkern.diagnostics import Flow, gradient_flow

CELLS = ("RNN", "LSTM", "GRU")
NOTHING_LEARNT = 1 / 6


class Adder(nn.Module):
    def __init__(self, cell: str, hidden: int, steps: int):
        super().__init__()
        # A start for long sequences: a forget gate that keeps about as long as they are (Tallec and Ollivier 2018), and
        # recurrent weights that neither stretch nor shrink.
        options = {"forget_bias": math.log(steps)} if cell == "LSTM" else {}
        self.rnn = getattr(seqkern, cell)(2, hidden, recurrent_init="orthogonal", **options)
        self.answer = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B] from x [T, B, 2]."""
        y, _ = self.rnn(x)
        return self.answer(y[-1]).squeeze(-1)


def draw(steps: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [T, B, 2] and the sums [B]."""
    numbers, marks = torch.rand(steps, batch, generator=generator), torch.zeros(steps, batch)
    first = torch.randint(steps // 2, (1, batch), generator=generator)
    second = torch.randint(steps // 2, steps, (1, batch), generator=generator)
    marks.scatter_(0, torch.cat([first, second]), 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


class Run(NamedTuple):
    cell: str
    steps: int
    losses: list[float]  # of every training step
    error: float  # mean squared error on fresh sequences
    before: Flow
    after: Flow
    seconds: float


def flow_of(model: Adder, x: Tensor, sums: Tensor) -> Flow:
    with gradient_flow(model) as flow:
        mse_loss(model(x), sums).backward()
    model.zero_grad()
    return flow


def run(cell: str, steps: int, updates: int, hidden: int, batch: int, seed: int, rate: float = 5e-3) -> Run:
    torch.manual_seed(seed)
    model = Adder(cell, hidden, steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    check = draw(steps, 256, generator)
    before, losses, start = flow_of(model, *check), [], time.perf_counter()
    for _ in range(updates):
        x, sums = draw(steps, batch, generator)
        loss = mse_loss(model(x), sums)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    after = flow_of(model, *check)
    with torch.no_grad():
        error = mse_loss(model(check[0]), check[1]).item()
    return Run(cell, steps, losses, error, before, after, seconds)


def plot(runs: list[Run], path: str) -> None:
    """A row for each length: the error while training, the gradient over time before, and after."""
    from matplotlib.figure import Figure

    lengths = sorted({r.steps for r in runs})
    figure = Figure(figsize=(13, 3.4 * len(lengths)), layout="constrained")
    axes = figure.subplots(len(lengths), 3, squeeze=False)
    for row, steps in zip(axes, lengths, strict=True):
        for i, r in enumerate(r for r in runs if r.steps == steps):
            window = max(1, len(r.losses) // 50)
            smooth = torch.tensor(r.losses).unfold(0, window, 1).mean(-1)
            row[0].plot(range(window - 1, len(r.losses)), smooth, color=f"C{i}", label=r.cell)
            for axis, flow in zip(row[1:], (r.before, r.after), strict=True):
                axis.plot(flow.records[0].h.clamp_min(1e-30), color=f"C{i}", label=r.cell)
        row[0].axhline(NOTHING_LEARNT, color="black", linewidth=1, linestyle=":", label="always 1")
        row[0].set(xlabel="update", ylabel="mean squared error", yscale="log", title=f"T = {steps}")
        for axis, when in zip(row[1:], ("before training", "after training"), strict=True):
            axis.set(xlabel="step t", ylabel="norm of dL/dh_t", yscale="log", title=f"T = {steps}, {when}")
        for axis in row:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=int, nargs="+", default=[100], metavar="T")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PNG")
    a = parser.parse_args()
    runs = []
    for steps in a.time:
        for cell in a.cells:
            runs.append(r := run(cell, steps, a.updates, a.hidden, a.batch, a.seed))
            print(f"T={steps} {cell}: error {r.error:.4f} (always 1: {NOTHING_LEARNT:.4f}), {r.seconds:.1f} s")
            print(f"  before: {r.before.report()}\n  after:  {r.after.report()}", flush=True)
    if a.plot:
        plot(runs, a.plot)


if __name__ == "__main__":
    main()
