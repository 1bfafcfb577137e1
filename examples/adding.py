"""The adding problem: how far RNN, LSTM and GRU learn to look back, and how far their gradients reach.

    python examples/adding.py --plot adding.png                 T = 100: half a minute
    python examples/adding.py --time 100 300 1000 --plot adding.png

A sequence has two rows: numbers from [0, 1), and marks, a 1 at two steps and 0 elsewhere, the first in the first half.
The answer, wanted after the last step, is the sum of the two marked numbers (Hochreiter and Schmidhuber 1997). Who
always answers 1 has a mean squared error of 1/6; below that, a model has carried something over time.

For each cell and length this trains a model, and shows with `seqkern.diagnostics.gradient_flow` the gradient of the
loss with respect to the state at every step, before training and after. Gates start open for about as long as the
sequences are (`open_gates`): so LSTM and GRU solve T = 100, 300 and 1000 in 1,500 updates, while an LSTM of which only
the forget gate's bias starts at log(T) did not solve T = 100. The RNN's gradient vanishes, and it does no
better than who always answers 1.

Needs: pip install matplotlib (for --plot)
"""

import argparse
import time
from typing import NamedTuple

import torch
from common import CELLS, COLORS
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import seqkern
from seqkern.diagnostics import Flow, gradient_flow

NOTHING_LEARNT = 1 / 6


class Adder(nn.Module):
    def __init__(self, cell: str, hidden: int, steps: int):
        super().__init__()
        self.rnn = getattr(seqkern, cell)(2, hidden, recurrent_init="orthogonal")
        self.answer = nn.Linear(hidden, 1)
        open_gates(self.rnn, steps)

    def forward(self, x: Tensor) -> Tensor:
        """[B] from x [T, B, 2]."""
        y, _ = self.rnn(x)
        return self.answer(y[-1]).squeeze(-1)


@torch.no_grad()
def open_gates(rnn: nn.RNNBase, steps: int) -> None:
    """The chrono initialisation (Tallec and Ollivier 2018): unit by unit, a memory of 1 to `steps` steps to start with.

    A gate with bias log(u) keeps its state for about u steps. The LSTM's input gate starts at -log(u): what is kept
    for u steps may grow by 1/u a step. An RNN has no gate.
    """
    size, gates = rnn.hidden_size, {"LSTM": {0: -1, 1: 1}, "GRU": {1: 1}}.get(rnn.mode, {})
    log_u = torch.empty(size).uniform_(1, max(2, steps - 1)).log()
    for gate, sign in gates.items():
        rows = slice(gate * size, (gate + 1) * size)
        rnn.bias_ih_l0[rows], rnn.bias_hh_l0[rows] = sign * log_u, 0.0


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


def carried(flow: Flow) -> Tensor:
    """[T] norms of the gradient of what the cell carries from step to step: dL/dc_t of an LSTM, dL/dh_t of the others.

    An LSTM's h reaches the next step through gates alone, its c directly.
    """
    record = flow.records[0]
    return record.h if record.c is None else record.c


def reach(flow: Flow) -> str:
    norms = carried(flow)
    return f"{norms[0] / norms.max():.1e} of the largest gradient is left at the first step"


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
        for r in (r for r in runs if r.steps == steps):
            window = max(1, len(r.losses) // 50)
            smooth = torch.tensor(r.losses).unfold(0, window, 1).mean(-1)
            row[0].plot(range(window - 1, len(r.losses)), smooth, color=COLORS[r.cell], label=r.cell)
            for axis, flow in zip(row[1:], (r.before, r.after), strict=True):
                axis.plot(carried(flow).clamp_min(1e-30), color=COLORS[r.cell], label=r.cell)
        row[0].axhline(NOTHING_LEARNT, color="black", linewidth=1, linestyle=":", label="always 1")
        row[0].set(xlabel="update", ylabel="mean squared error", yscale="log", title=f"T = {steps}")
        for axis, when in zip(row[1:], ("before training", "after training"), strict=True):
            axis.set(
                xlabel="step t", ylabel="norm of dL/dh_t (LSTM: dL/dc_t)", yscale="log", title=f"T = {steps}, {when}"
            )
        for axis in row:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=int, nargs="+", default=[100], metavar="T")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="PNG")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    runs = []
    for steps in a.time:
        for cell in a.cells:
            runs.append(r := run(cell, steps, a.updates, a.hidden, a.batch, a.seed))
            print(f"T={steps} {cell}: error {r.error:.4f} (always 1: {NOTHING_LEARNT:.4f}), {r.seconds:.1f} s")
            print(f"  before: {reach(r.before)}\n  after:  {reach(r.after)}", flush=True)
    if a.plot:
        plot(runs, a.plot)


if __name__ == "__main__":
    main()
