"""Measures the compiled searches beside the usual PyTorch loop, and appends one JSON line per case.

    python bench/decoding.py --quick
    python bench/decoding.py --json bench/results/decoding.jsonl --threads 1

Both sides start from the encoder's output and project the keys themselves. Tokens and scores are compared before
anything is timed; then the sides are timed in turn (A B B A). A line holds the case, its sizes, what `bench/run.py`
writes about times and the machine, us_step (a call's time over the steps), and prepared: whether the weights were
packed before (Seq2Seq.compile_search) or in every call (Seq2Seq.greedy, Seq2Seq.beam).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402

from bench import eager_search, machine, timing  # noqa: E402
from bench.sources import ROOT  # noqa: E402
from bench.terminal import Console, progress_bar  # noqa: E402
from seqkern.seq2seq import Decoder, Encoder, Seq2Seq, compiled  # noqa: E402
from seqkern.seq2seq.beam import BeamOptions  # noqa: E402
from seqkern.seq2seq.search import GreedyOptions  # noqa: E402

SOURCE, STEPS = 20, 20


@dataclass(frozen=True)
class Case:
    search: str  # "greedy" or "beam"
    attention: str
    batch: int
    hidden: int
    vocab: int
    prepared: bool = True
    width: int = 5

    @property
    def name(self) -> str:
        ready = "" if self.prepared else "-unprepared"
        return f"{self.search}-{self.attention}-b{self.batch}-h{self.hidden}-v{self.vocab}{ready}"


def all_cases() -> list[Case]:
    sizes = [(256, 40), (512, 8000)]
    found = [
        Case(search, attention, batch, hidden, vocab)
        for search in ("greedy", "beam")
        for hidden, vocab in sizes
        for attention in ("general", "bahdanau")
        for batch in (1, 32)
    ]
    return found + [Case("greedy", "general", batch, h, v, False) for h, v in sizes for batch in (1, 32)]


class Decoding:
    """A model with random weights that does not come to an end before STEPS, and both searches on one encoded batch."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        encoder = Encoder(30, 64, case.hidden // 2)
        decoder = Decoder(
            case.vocab, case.hidden, case.hidden, encoder.size, attention=case.attention,
            input_feeding=case.attention == "bahdanau",
        )  # fmt: skip
        self.model = Seq2Seq(encoder, decoder).eval().requires_grad_(False)
        decoder.out.bias.data[decoder.eos] = -1000  # a beam too goes on to the last step
        decoder.out.weight.data.mul_(4)  # so that no two tokens are all but equally likely
        source = torch.randint(30, (SOURCE, case.batch))
        self.memory, self.state = self.model.encode(source, torch.randint(SOURCE // 2, SOURCE + 1, (case.batch,)))
        self.eager = eager_search.EagerDecoder(decoder)
        self.program = compiled.Program(decoder)
        self.options = GreedyOptions(STEPS) if case.search == "greedy" else BeamOptions(case.width, max_len=STEPS)

    @torch.no_grad()
    def ours(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.case.prepared:
            found = getattr(self.program, self.case.search)(self.memory, self.state, self.options)
        else:
            found = compiled.find(self.case.search, self.model.decoder, self.memory, self.state, self.options)
        return found.tokens[0], found.scores[0]

    def peer(self) -> tuple[torch.Tensor, torch.Tensor]:
        given = (self.eager, self.memory.values, self.memory.lengths, self.state[0][0])
        if self.case.search == "greedy":
            return eager_search.greedy(*given, STEPS)
        return eager_search.beam(*given, self.case.width, STEPS)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "bench" / "out" / "decoding.jsonl", help="append lines here"
    )
    parser.add_argument("--cases", nargs="+", default=[], metavar="TEXT", help="those whose names hold one of these")
    parser.add_argument("--quick", action="store_true", help="few samples")
    parser.add_argument("--threads", type=int, help="for both sides (default: torch's own choice)")
    return parser.parse_args(argv)


def measure(case: Case, quick: bool) -> dict[str, object]:
    problem = Decoding(case)
    line = asdict(case) | {"case": case.name, "peer": "torch", "steps": STEPS, "places": SOURCE, "load": machine.load()}
    (wanted, scores), (ours, own_scores) = problem.peer(), problem.ours()
    found = torch.zeros_like(wanted)
    found[: ours.size(0)] = ours
    if not torch.allclose(own_scores, scores, rtol=1e-4, atol=1e-3):
        return line | {"wrong": f"scores differ by {float((own_scores - scores).abs().max()):.2g}"}
    if not found.equal(wanted):
        rows = int((found != wanted).any(0).sum())
        return line | {"wrong": f"{rows} of {case.batch} rows differ"}
    others = machine.Others()
    line |= timing.paired(problem.ours, problem.peer, timing.QUICK if quick else timing.FULL).summary()
    return line | {
        "others": others.cores(),
        "us_step": line["ms"] * 1e3 / STEPS,
        "us_peer_step": line["peer_ms"] * 1e3 / STEPS,
    }


def main(argv: list[str] | None = None, cases: Callable[[], list[Case]] = all_cases) -> int:
    """Runs the chosen cases. Returns 0, 1 if a result was wrong, 2 if nothing was chosen."""
    options = parse(argv)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    chosen = [c for c in cases() if not options.cases or any(text in c.name for text in options.cases)]
    if not chosen:
        console.print(f"no case's name holds any of {' '.join(options.cases)}", markup=False)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    where, wrong = machine.describe("cpu") | {"quick": options.quick}, 0
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with options.json.open("a") as file, progress_bar(console) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.name)
            line = measure(case, options.quick)
            line |= where | {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            file.write(
                json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}) + "\n"
            )
            file.flush()
            wrong += "wrong" in line
            progress.console.print(sentence(line), markup=False)
            progress.advance(task)
    return 1 if wrong else 0


def sentence(line: dict) -> str:
    if "wrong" in line:
        return f"{line['case']}: WRONG, not timed: {line['wrong']}"
    return (
        f"{line['case']}: {line['us_step']:.4g} us a step, torch {line['us_peer_step']:.4g}: {line['ratio']:.2f}x "
        f"({line['ratio_low']:.2f} to {line['ratio_high']:.2f}), others used {line['others']} cores"
    )


if __name__ == "__main__":
    sys.exit(main())
