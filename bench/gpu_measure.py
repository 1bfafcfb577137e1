"""One case of the comparison with cuDNN: checked against float64, then timed beside torch.nn, eager and as a graph."""

import gc

import torch

from bench import cudnn, gpu, timing
from bench.cases import Case
from bench.problem import DTYPES, Problem, WrongResult, check, error

Line = dict[str, object]
FULL = timing.Budget(samples=20, low=0.05, high=0.6)
QUICK = timing.Budget(samples=12, low=0.02, high=0.3)
PEER_LIMIT = 0.25  # torch.nn further than this from float64 is broken, and no yardstick


class Lost(Exception):
    """The device answers no more: nothing after this can be measured."""


def measure(case: Case, quick: bool) -> Line:
    """A line for the case; with "wrong" and without times if a side is wrong or fails.

    Raises:
        Lost: the CUDA context is unusable.
    """
    line: Line = {}
    try:
        with gpu.forced(case.engine):
            _measure(case, QUICK if quick else FULL, line)
    except WrongResult as wrong:
        line["wrong"] = str(wrong)
    except Exception as failed:  # noqa: BLE001  a case that fails is a result; the others still count
        line["wrong"] = f"{type(failed).__name__}: {str(failed).splitlines()[0] if str(failed) else ''}"[:300]
    if "wrong" in line:
        line = {key: value for key, value in line.items() if key not in ("ms", "peer_ms", "ratio")}
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise Lost(f"{case.name}: {line['wrong']}; the device then failed: {str(lost).splitlines()[0]}") from lost
    gc.collect()
    torch.cuda.empty_cache()
    return line


def _measure(case: Case, budget: timing.Budget, line: Line) -> None:
    """Fills the line as it goes, so that what was known before a failure is kept."""
    chosen = cudnn.algorithms(case, gpu.gpu())
    line |= {f"cudnn_{way}": algorithm for way, algorithm in chosen.items()}
    problem = Problem(case, "cuda")
    line["peer_flat"] = cudnn.flatten(problem.torch)
    line |= gpu.engines(problem.ours, case)

    truth, native = problem.truth(), problem.call(problem.torch)
    line["peer_error"] = max(error(native[name], truth[name]) for name in truth)
    if not line["peer_error"] <= PEER_LIMIT:
        raise WrongResult(f"torch.nn: off by {line['peer_error']:.1e} of the largest value")
    try:
        found = check(problem.call(problem.ours), native, truth, DTYPES[case.dtype], eps=gpu.error_eps(case))
    except WrongResult as wrong:
        raise WrongResult(f"seqkern: {wrong}") from wrong
    line["error"] = found
    del truth, native

    ours, peer = problem.timed(problem.ours), problem.timed(problem.torch)
    times = timing.paired(ours, peer, budget, sample=gpu.events, linger=0).summary()
    graph = {} if case.packed else _graph(ours, peer, budget)  # cuDNN copies the lengths from the host: no capture
    giga = case.flops(problem.rows) / 1e9
    line |= times | per_step(times, case) | graph
    line |= {"gflops": giga / times["ms"] * 1e3, "peer_gflops": giga / times["peer_ms"] * 1e3}


def per_step(times: dict[str, float], case: Case) -> Line:
    """Microseconds for each of the T steps, everything in the call included: projection, all layers and directions."""
    return {f"us_{side}step": times[f"{side}ms"] * 1e3 / case.time for side in ("", "peer_")}


def _graph(ours: gpu.Run, peer: gpu.Run, budget: timing.Budget) -> Line:
    try:
        replays = gpu.graphed(ours), gpu.graphed(peer)
    except RuntimeError as failed:
        return {"graph_error": str(failed).splitlines()[0][:200]}
    few = timing.Budget(max(6, budget.samples // 2), budget.low / 2, budget.high / 2)
    found = timing.paired(*replays, few, sample=gpu.events, linger=0).summary()
    return {f"graph_{key}": found[key] for key in ("ms", "peer_ms", "ratio", "ratio_low", "ratio_high")}


def sentence(case: Case, line: Line) -> str:
    """One line for the terminal, without markup."""
    if "wrong" in line:
        return f"{case.name}: WRONG, not timed: {line['wrong']}"
    ran = " / ".join(cudnn.WORDS[line[key]] for key in ("cudnn_forward", "cudnn_backward") if key in line)
    graph = f"; as graphs {line['graph_ratio']:.2f}x" if "graph_ratio" in line else ""
    return (
        f"{case.name}: {line['engine']} {line['us_step']:.3g} us a step, cuDNN ({ran}) {line['us_peer_step']:.3g}: "
        f"{line['ratio']:.2f}x ({line['ratio_low']:.2f} to {line['ratio_high']:.2f}){graph}"
    )
