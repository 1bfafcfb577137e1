"""Measures seqkern's layers beside torch.nn's and other peers, and appends one JSON line per case and peer.

Every result is checked against float64 in the same run before it is timed; a wrong one is reported and never timed.
Both sides are then timed in turn (A B B A) with the same weights, inputs and thread count.

    python bench/run.py --device cpu --quick
    python bench/run.py --device cpu --json bench/results/cpu.jsonl --peers torch onnxruntime --peak
    python bench/run.py --device cpu --cases 'lstm-*' 'gru-train-bf16-*' --threads 1
    python bench/run.py --device cuda --json bench/results --report

A line holds: case, group, cell, pass, dtype, the shape, peer; ms, p10, p90 of a call of seqkern and peer_ms, peer_p10,
peer_p90 of the peer; ratio = peer time / seqkern time (median over paired rounds; above 1 seqkern is faster) with
ratio_low and ratio_high, the 95 % interval of that median; gflops of seqkern and of the peer; load, the load average
at the time, and others, the cores that other processes used; the machine, versions, commit and hash of csrc/. With
--memory, kept and peer_kept: bytes kept for backward as multiples of the output. A line with "wrong" has no times.

With --device cuda the peer is torch.nn on cuDNN and times are between CUDA events. A line then also holds us_step and
us_peer_step (a call's time / T), graph_ms, graph_peer_ms and graph_ratio (both sides replayed as CUDA graphs),
cudnn_forward and cudnn_backward (the algorithms that PyTorch names to cuDNN), engine (seqkern's), peer_flat (whether
cuDNN's weights lay in one buffer), error and peer_error, the GPU, driver, clocks under load (MHz) and TF32 flags.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402

from bench import gpu, gpu_cases, gpu_measure, machine, peers, timing  # noqa: E402
from bench.cases import Case, select  # noqa: E402
from bench.problem import DTYPES, Problem, WrongResult, check, kept  # noqa: E402
from bench.sources import ROOT, slug  # noqa: E402
from bench.summary import BUSY  # noqa: E402
from bench.terminal import Console, progress_bar  # noqa: E402

Line = dict[str, object]
LIMITS = {False: 300.0, True: 40.0}  # seconds of a run on a GPU, full and quick


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="append lines here (default: bench/out); a folder: to DEVICE.jsonl")
    parser.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="names, groups, or globs of either")
    parser.add_argument("--quick", action="store_true", help="one case a regime, few samples: under three minutes")
    parser.add_argument("--threads", type=int, help="for every side (default: torch's own choice)")
    parser.add_argument("--peers", nargs="+", default=["torch"], choices=list(peers.PEERS))
    parser.add_argument("--peak", action="store_true", help="measure the machine's peak and give the share reached")
    parser.add_argument("--memory", action="store_true", help="measure what is kept for backward; adds long cases")
    parser.add_argument("--list", action="store_true", help="print the names of the chosen cases and stop")
    parser.add_argument("--report", action="store_true", help="make tables and plot from the lines afterwards")
    cuda = parser.add_argument_group("with --device cuda")
    cuda.add_argument("--engine", choices=gpu.ENGINES, help=f"force seqkern's engine, as {gpu.ENGINE} does")
    cuda.add_argument("--limit", type=float, help="start no case after so many seconds; 0: no limit (300; quick 40)")
    return parser.parse_args(argv)


def device_problem(device: str) -> str | None:
    """Why nothing can be measured on this device, in one sentence, or None."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return f"--device cuda needs a GPU and a CUDA build of torch; torch {torch.__version__} sees no GPU."
    if not machine.cuda_archs():
        return "--device cuda: seqkern is built without CUDA kernels; build it with SEQKERN_CUDA=1 on this machine."
    return None


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
    if case.engine:
        line["forced"] = case.engine
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


def choose(options: argparse.Namespace) -> list[Case]:
    """The cases of a run.

    Raises:
        ValueError: a pattern matches nothing, or an option is for the other device.
    """
    if options.device == "cpu":
        if options.engine or options.limit is not None:
            raise ValueError("--engine and --limit need --device cuda")
        return select(options.cases, options.quick, options.memory)
    if options.memory or options.peak or options.peers != ["torch"]:
        raise ValueError("--memory, --peak and --peers need --device cpu")
    chosen = select(options.cases, options.quick, False, gpu_cases.all_cases())
    if options.engine:
        chosen = [replace(case, engine=options.engine) for case in chosen]
    return list({case.name: case for case in chosen}.values())


def output(options: argparse.Namespace, where: dict[str, object]) -> Path:
    """The file that lines are appended to; its folder is made."""
    path = options.json or ROOT / "bench" / "out"
    if options.json is None or path.is_dir():
        path = path / f"{slug(where['gpu']) if options.device == 'cuda' else 'cpu'}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def measure_all(chosen: list[Case], options: argparse.Namespace, where: Line, console: Console) -> tuple[Path, int]:
    """Measures the cases and writes their lines; returns the file and how many were wrong or not reached."""
    out, wrong, done = output(options, where), 0, 0
    limit = (options.limit if options.limit is not None else LIMITS[options.quick]) or float("inf")
    with out.open("a") as file, progress_bar(console) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            if options.device == "cuda" and time.perf_counter() - options.start > limit:
                break
            progress.update(task, description=case.name)
            if options.device == "cpu":
                lines = [(line, sentence(line), True) for line in measure(case, options, console)]
            else:
                try:
                    found = gpu_measure.measure(case, options.quick)
                except gpu_measure.Lost as lost:
                    progress.console.print(str(lost), markup=False)
                    wrong += 1
                    break
                lines = [(describe_case(case) | {"peer": "torch"} | found, gpu_measure.sentence(case, found), False)]
            for line, text, markup in lines:
                line = rounded(line | where | {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
                file.write(json.dumps(line) + "\n")
                file.flush()
                wrong += "wrong" in line
                progress.console.print(text, markup=markup)
            progress.advance(task)
            done += 1
    console.print(f"{out}: {done} cases" + (f", [bold red]{wrong} wrong[/]" if wrong else ""))
    if done < len(chosen):
        console.print(f"{len(chosen) - done} of {len(chosen)} cases were not reached; --limit 0 measures all")
    return out, wrong


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen cases. Returns 0, 1 if a result was wrong, 2 if there was nothing that could be run."""
    options = parse(argv)
    options.start = time.perf_counter()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        chosen = choose(options)
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
    if options.device == "cuda":
        where |= gpu.describe()
    console.print(", ".join(f"{key} {value}" for key, value in where.items()), markup=False)
    out, wrong = measure_all(chosen, options, where, console)
    if options.report:
        from bench import report

        report.main([str(out)])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
