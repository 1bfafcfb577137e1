"""Measures seqkern's layers beside torch.nn's and other peers, and appends one JSON line per case and peer.

Every result is checked against float64 in the same run before it is timed; a wrong one is reported and never timed.
Both sides are then timed in turn (A B B A) with the same weights, inputs and thread count.

    python bench/run.py --device cpu --quick
    python bench/run.py --device cpu --json bench/results/cpu.jsonl --peers torch onnxruntime --peak
    python bench/run.py --device cpu --cases 'lstm-*' 'gru-train-bf16-*' --threads 1

A line holds: case, group, cell, pass, dtype, the shape, peer; ms, p10, p90 of a call of seqkern and peer_ms, peer_p10,
peer_p90 of the peer; ratio = peer time / seqkern time (median over paired rounds; above 1 seqkern is faster) with
ratio_low and ratio_high, the 95 % interval of that median; gflops of seqkern and of the peer; load, the load average
at the time, and others, the cores that other processes used; the machine, versions, commit and hash of csrc/. With
--memory, kept and peer_kept: bytes kept for backward as multiples of the output. A line with "wrong" has no times.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from bench import machine, peers, timing  # noqa: E402
from bench.cases import Case, select  # noqa: E402
from bench.problem import DTYPES, Problem, WrongResult, check, kept  # noqa: E402
from bench.sources import ROOT  # noqa: E402
from bench.summary import BUSY  # noqa: E402

Line = dict[str, object]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="append lines here (default: bench/out/DEVICE.jsonl)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="names, groups, or globs of either")
    parser.add_argument("--quick", action="store_true", help="one case a regime, few samples: under three minutes")
    parser.add_argument("--threads", type=int, help="for every side (default: torch's own choice)")
    parser.add_argument("--peers", nargs="+", default=["torch"], choices=list(peers.PEERS))
    parser.add_argument("--peak", action="store_true", help="measure the machine's peak and give the share reached")
    parser.add_argument("--memory", action="store_true", help="measure what is kept for backward; adds long cases")
    parser.add_argument("--list", action="store_true", help="print the names of the chosen cases and stop")
    return parser.parse_args(argv)


def device_problem(device: str) -> str | None:
    """Why nothing can be measured on this device, in one sentence, or None."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return f"--device cuda needs a GPU and a CUDA build of torch; torch {torch.__version__} sees no GPU."
    return "--device cuda: seqkern has no CUDA kernels yet, CUDA tensors run on the reference; nothing to measure."


def measure(case: Case, options: argparse.Namespace, console: Console) -> list[Line]:
    """Checks and times one case against each peer; a line for each peer that covers it."""
    problem = Problem(case, options.device)
    dtype, truth = DTYPES[case.dtype], problem.truth()
    native = problem.call(problem.torch)
    common = describe_case(case)
    if options.memory and problem.train:
        common |= {"kept": round(kept(problem, problem.ours), 3), "peer_kept": round(kept(problem, problem.torch), 3)}
    try:
        common["error"] = check(problem.call(problem.ours), native, truth, dtype)
    except WrongResult as wrong:
        return [common | {"peer": options.peers[0], "wrong": f"seqkern: {wrong}"}]
    lines = []
    for peer in options.peers:
        try:
            runnable = peers.PEERS[peer](problem, torch.get_num_threads())
        except peers.Unavailable as reason:
            if str(reason) not in options.told:
                options.told.add(str(reason))
                console.print(f"[dim]{reason}[/]")
            continue
        line = common | {"peer": peer, "load": machine.load()}
        try:
            check(runnable.results(), native, truth, dtype, runnable.slack)
        except WrongResult as wrong:
            lines.append(line | {"wrong": f"{peer}: {wrong}"})
            continue
        budget = timing.QUICK if options.quick else timing.FULL
        others = machine.Others()
        found = timing.paired(problem.timed(problem.ours), runnable.run, budget, linger=runnable.linger).summary()
        found["others"] = others.cores()
        giga = case.flops(problem.rows) / 1e9
        line |= found | {"gflops": giga / found["ms"] * 1e3, "peer_gflops": giga / found["peer_ms"] * 1e3}
        if case.dtype in options.peaks:
            ceiling, source = options.peaks[case.dtype]
            line |= {"peak_gflops": ceiling, "peak_share": line["gflops"] / ceiling, "peak_from": source}
        lines.append(line)
    return lines


def describe_case(case: Case) -> Line:
    line: Line = {"case": case.name, "group": case.group, "cell": case.cell, "pass": case.passes, "dtype": case.dtype}
    for key in ("batch", "time", "input", "hidden", "proj", "layers", "bidirectional", "packed"):
        line[key] = getattr(case, key)
    return line


def rounded(line: Line) -> Line:
    """Six significant digits: more than any timing means."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in line.items()}


def sentence(line: Line) -> str:
    """One line for the terminal."""
    memory = ""
    if "kept" in line:
        memory = f"  keeps {line['kept']:.1f} outputs, torch {line['peer_kept']:.1f}"
    if "wrong" in line:
        return f"[bold red]{line['case']}: WRONG, not timed: {line['wrong']}[/]"
    color = "green" if line["ratio_low"] > 1 else "red" if line["ratio_high"] < 1 else "yellow"
    busy = f"  [yellow]others used {line['others']:.1f} cores[/]" if (line["others"] or 0) > BUSY else ""
    share = f" ({line['peak_share']:.0%} of peak)" if "peak_share" in line else ""
    return (
        f"{line['case']}: {line['ms']:.4g} ms [{line['p10']:.4g}, {line['p90']:.4g}], "
        f"{line['gflops']:.4g} GF/s{share}; "
        f"{line['peer']} {line['peer_ms']:.4g} ms: [{color}]{line['ratio']:.2f}x[/] "
        f"({line['ratio_low']:.2f} to {line['ratio_high']:.2f}){memory}{busy}"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen cases. Returns 0, 1 if a result was wrong, 2 if there was nothing that could be run."""
    options = parse(argv)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        chosen = select(options.cases, options.quick, options.memory)
    except ValueError as unknown:
        console.print(str(unknown), markup=False)
        return 2
    if options.list:
        print("\n".join(f"{case.group:18} {case.name}" for case in chosen))
        return 0
    if reason := device_problem(options.device):
        console.print(reason, markup=False)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    for notice in filter(None, [machine.stale_extension(), *map(peers.missing, options.peers)]):
        console.print(f"[yellow]{notice}[/]")
    options.peers = [peer for peer in options.peers if not peers.missing(peer)]
    if not options.peers:
        return 2
    options.told = set()
    options.peaks = {}
    for dtype in sorted({case.dtype for case in chosen}) if options.peak else []:
        options.peaks[dtype] = machine.peak(DTYPES[dtype])
        console.print(f"peak {dtype}: {options.peaks[dtype][0]:.0f} GF/s ({options.peaks[dtype][1]})")

    where = machine.describe(options.device) | {"quick": options.quick}
    console.print(", ".join(f"{key} {value}" for key, value in where.items()), markup=False)
    out = options.json or ROOT / "bench" / "out" / f"{options.device}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    wrong = 0
    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
    with out.open("a") as file, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.name)
            for line in measure(case, options, console):
                line = rounded(line | where | {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
                file.write(json.dumps(line) + "\n")
                file.flush()
                wrong += "wrong" in line
                progress.console.print(sentence(line))
            progress.advance(task)
    console.print(f"{out}: {len(chosen)} cases" + (f", [bold red]{wrong} wrong[/]" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
