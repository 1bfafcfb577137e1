"""Training a decoder with attention and input feeding: seqkern's fused operator beside a loop over torch.nn's cells.

    python bench/attention.py --quick
    python bench/attention.py --json bench/results/attention.jsonl --threads 1
    python bench/attention.py --cases 'gru-*' --cpu-time          # on a busy machine, with one thread

The loop is what JoeyNMT and OpenNMT write: per step the cell on [embedding; fed-back vector], scores of the keys, which
are projected once, softmax, context, tanh(W [h; context]). Both sides take tokens to logits (V = 40), and gradients
back to the memory, the first state and all parameters, with the same weights. Before it is timed a case is checked:
seqkern's outputs and gradients against the loop in float64, within 4 times the loop's own error in float32.

Lines are those of bench/run.py. With --cpu-time they hold "clock": "cpu": times are this process's, not the wall's.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench import machine, timing  # noqa: E402
from bench.problem import WrongResult, check  # noqa: E402
from bench.run import rounded, sentence  # noqa: E402
from bench.sources import ROOT  # noqa: E402
from bench.terminal import Console, progress_bar  # noqa: E402
from seqkern.seq2seq import Decoder  # noqa: E402
from seqkern.seq2seq.encoder import Memory  # noqa: E402

V, S, T, H, M = 40, 20, 20, 256, 512  # M: of an encoder of two directions of H
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    cell: str
    attention: str
    batch: int
    embedding: int
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.cell}-{self.attention}-train-fp32-B{self.batch}-T{T}-S{S}-E{self.embedding}-H{H}"

    def flops(self) -> float:
        """Of all products of the loop, forward and backward, which both sides' rates are given for. seqkern does fewer:
        it projects V tokens in place of T*B, and of the source only the places before each length (here 3 in 4)."""
        gates = {"gru": 3, "lstm": 4}[self.cell]
        step = gates * H * (self.embedding + 2 * H) + H * H + 2 * S * H + V * H
        step += H * H * (self.attention == "bahdanau")
        return 3 * 2 * self.batch * (T * step + S * 2 * M * H)


CASES = [
    Case(cell, attention, batch, embedding, quick=cell == "gru" and embedding == 64)
    for cell in ("gru", "lstm")
    for attention in ("general", "bahdanau")
    for batch in (32, 128)
    for embedding in (64, 256)
]


class Loop(nn.Module):
    """The peer, with the weights of a `Decoder`."""

    def __init__(self, d: Decoder):
        super().__init__()
        weights = d.layers._flat_weights
        self.cell = (nn.GRUCell if d.cell == "gru" else nn.LSTMCell)(weights[0].size(1), d.hidden)
        self.embedding, self.key, self.query = map(copy.deepcopy, (d.embedding, d.attention.key, d.attention.query))
        self.score, self.out = map(copy.deepcopy, (d.attention.score, d.out))
        self.pre = nn.Linear(d.hidden + d.context.in_features, d.pre.out_features)
        with torch.no_grad():
            for own, given in zip(self.cell.parameters(), weights, strict=True):
                own.copy_(given)
            self.pre.weight.copy_(torch.cat([d.pre.weight, d.context.weight], 1))
            self.pre.bias.copy_(d.pre.bias)

    def forward(self, given: Tensor, values: Tensor, lengths: Tensor, h: Tensor, c: Tensor | None) -> Tensor:
        """Logits [T, B, V] from given [T, B], values [B, S, M], lengths [B], h and c [B, H]."""
        x, keys = self.embedding(given), self.key(values)
        outside = torch.arange(values.size(1)) >= lengths.unsqueeze(1)
        feed = h.new_zeros(h.size(0), self.pre.out_features)
        found = []
        for t in range(x.size(0)):
            read = torch.cat([x[t], feed], 1)
            if c is None:
                h = self.cell(read, h)
            else:
                h, c = self.cell(read, (h, c))
            if self.query is None:
                scores = torch.bmm(keys, h.unsqueeze(2)).squeeze(2)
            else:
                scores = self.score(torch.tanh(self.query(h).unsqueeze(1) + keys)).squeeze(2)
            weights = torch.softmax(scores.masked_fill(outside, -torch.inf), 1)
            context = torch.bmm(weights.unsqueeze(1), values).squeeze(1)
            feed = torch.tanh(self.pre(torch.cat([h, context], 1)))
            found.append(feed)
        return self.out(torch.stack(found))


class Problem:
    """Both sides of a case and their inputs."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.ours = Decoder(V, case.embedding, H, M, cell=case.cell, attention=case.attention, input_feeding=True)
        self.loop = Loop(self.ours)
        self.given = torch.randint(3, V, (T, case.batch))
        self.lengths = torch.randint(S // 2, S + 1, (case.batch,))
        self.lengths[0] = S
        self.states = [torch.rand(case.batch, H) - 0.5 for _ in range(1 + (case.cell == "lstm"))]
        self.values = torch.randn(S, case.batch, M)
        self.dy = torch.randn(T, case.batch, V)

    def run_ours(self, d: Decoder, values: Tensor, states: list[Tensor]) -> Tensor:
        h, c = [s.unsqueeze(0) for s in states] + [None] * (2 - len(states))
        return d(self.given, Memory(values, self.lengths, (h, c)), (h, c))

    def run_loop(self, loop: Loop, values: Tensor, states: list[Tensor]) -> Tensor:
        return loop(self.given, values, self.lengths, *states, *[None] * (2 - len(states)))

    def leaves(self, batch_major: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
        """Values, as each side has them from its encoder, and states, to be differentiated."""
        values = self.values.transpose(0, 1).contiguous() if batch_major else self.values
        own = [t.to(dtype).clone().requires_grad_() for t in (values, *self.states)]
        return own[0], own[1:]

    def results(self, side: str, dtype: torch.dtype = torch.float32) -> Results:
        """Logits and gradients by the loop's names; `side`: ours or loop."""
        run, module = (self.run_ours, self.ours) if side == "ours" else (self.run_loop, self.loop)
        module = copy.deepcopy(module).to(dtype)
        values, states = self.leaves(side == "loop", dtype)
        y = run(module, values, states)
        y.backward(self.dy.to(dtype))
        found = {"logits": y.detach(), "dvalues": values.grad if side == "ours" else values.grad.transpose(0, 1)}
        found |= {f"dstate{i}": s.grad for i, s in enumerate(states)}
        if side == "loop":
            return found | {n: p.grad for n, p in module.named_parameters()}
        cell = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        grads = {f"cell.{n}": getattr(module.layers, f"{n}_l0").grad for n in cell}
        parts = {"embedding": module.embedding, "key": module.attention.key, "query": module.attention.query}
        parts |= {"score": module.attention.score, "out": module.out}
        for name, part in parts.items():
            grads |= {f"{name}.{n}": p.grad for n, p in (part.named_parameters() if part is not None else ())}
        grads["pre.weight"] = torch.cat([module.pre.weight.grad, module.context.weight.grad], 1)
        return found | grads | {"pre.bias": module.pre.bias.grad}

    def timed(self, side: str) -> Callable[[], None]:
        run, module = (self.run_ours, self.ours) if side == "ours" else (self.run_loop, self.loop)
        values, states = self.leaves(side == "loop")
        own = [values, *states, *module.parameters()]

        def step() -> None:
            for t in own:
                t.grad = None
            run(module, values, states).backward(self.dy)

        return step


def cpu_clock(run: timing.Run, calls: int) -> float:
    """Seconds per call of this process on its cores: on a busy machine the wall's clock counts other processes too."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def measure(case: Case, options: argparse.Namespace) -> dict[str, object]:
    """A line: the case checked, then timed."""
    problem = Problem(case)
    line = {"case": case.name, "group": f"attention-{case.attention}", "cell": case.cell, "pass": "train"}
    line |= {"dtype": "fp32", "batch": case.batch, "time": T, "source": S, "input": case.embedding, "hidden": H}
    line |= {"memory": M, "vocab": V, "attention": case.attention, "peer": "torch", "load": machine.load()}
    line["clock"] = "cpu" if options.cpu_time else "wall"
    try:
        truth = problem.results("loop", torch.float64)
        line["error"] = check(problem.results("ours"), problem.results("loop"), truth, torch.float32)
    except WrongResult as wrong:
        return line | {"wrong": f"seqkern: {wrong}"}
    others, sample = machine.Others(), cpu_clock if options.cpu_time else timing.clock
    budget = timing.QUICK if options.quick else timing.Budget(samples=30, low=1.0, high=20.0)
    found = timing.paired(problem.timed("ours"), problem.timed("loop"), budget, sample).summary()
    found["others"] = others.cores()
    giga = case.flops() / 1e9
    return line | found | {"gflops": giga / found["ms"] * 1e3, "peer_gflops": giga / found["peer_ms"] * 1e3}


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 if a result was wrong, 2 if there was nothing to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "out" / "attention.jsonl")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--quick", action="store_true", help="four cases, few samples: about a minute")
    parser.add_argument("--threads", type=int, help="for both sides (default: torch's own choice)")
    parser.add_argument("--cpu-time", action="store_true", help="this process's time, with one thread")
    options = parser.parse_args(argv)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    chosen = [c for c in CASES if any(fnmatchcase(c.name, glob) for glob in options.cases)]
    chosen = [c for c in chosen if c.quick] if options.quick else chosen
    if not chosen:
        console.print(f"no case matches {' '.join(options.cases)}; there are:", markup=False)
        console.print("\n".join(c.name for c in CASES), markup=False)
        return 2
    if options.threads or options.cpu_time:
        torch.set_num_threads(1 if options.cpu_time else options.threads)
    if notice := machine.stale_extension():
        console.print(f"[yellow]{notice}[/]")
    where, wrong = machine.describe("cpu") | {"quick": options.quick}, 0
    console.print(", ".join(f"{key} {value}" for key, value in where.items()), markup=False)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with options.json.open("a") as file, progress_bar(console) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.name)
            line = measure(case, options)
            wrong += "wrong" in line
            line = rounded(line | where | {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
            file.write(json.dumps(line) + "\n")
            file.flush()
            progress.console.print(sentence(line))
            progress.advance(task)
    console.print(str(options.json), markup=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
