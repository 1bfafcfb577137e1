"""What seqkern is measured against. Each peer gets a problem and returns something to call, or says why it cannot."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.problem import Problem, Results

# torch.nn stacks the gates in one order, ONNX in another: ONNX's k-th gate is torch's ORDER[k]-th.
ORDER = {"rnn": [0], "lstm": [0, 3, 1, 2], "gru": [1, 0, 2]}
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass
class Runnable:
    """A peer, ready to be timed on one problem."""

    run: Callable[[], object]
    results: Callable[[], Results]
    linger: float  # seconds for which its threads may spin after a call
    slack: float  # how many times torch's own bound its results may be off


class Unavailable(Exception):
    """The peer does not cover this case, or is not installed."""


def torch_peer(problem: Problem, threads: int) -> Runnable:
    return Runnable(problem.timed(problem.torch), lambda: problem.call(problem.torch), linger=5e-3, slack=1)


def onnxruntime_peer(problem: Problem, threads: int) -> Runnable:
    _require("onnxruntime", problem.case)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Its threads spin within a run, as by default, but not beyond its end, on the cores that the other side then uses.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(onnx_model(problem), options, providers=["CPUExecutionProvider"])
    feed = _feed(problem)

    def results() -> Results:
        return _named(problem, [torch.from_numpy(out) for out in session.run(None, feed)])

    return Runnable(lambda: session.run(None, feed), results, linger=5e-2, slack=100)


def openvino_peer(problem: Problem, threads: int) -> Runnable:
    _require("openvino", problem.case)
    import openvino

    core = openvino.Core()
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(core.read_model(onnx_model(problem)), "CPU", config).create_infer_request()
    feed = {name: openvino.Tensor(value, shared_memory=True) for name, value in _feed(problem).items()}

    def run() -> object:
        return request.infer(feed, share_inputs=True, share_outputs=True)

    def results() -> Results:
        return _named(problem, [torch.from_numpy(np.array(out)) for out in run().values()])

    return Runnable(run, results, linger=1e-2, slack=100)


PEERS = {"torch": torch_peer, "onnxruntime": onnxruntime_peer, "openvino": openvino_peer}


def missing(peer: str) -> str | None:
    """Why a peer cannot be used at all, or None."""
    packages = [] if peer == "torch" else ["onnx", peer]
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{peer} is skipped: {' and '.join(absent)} not installed" if absent else None


def _require(peer: str, case: Case) -> None:
    if reason := missing(peer):
        raise Unavailable(reason)
    for wrong, what in (
        (case.passes != "infer", "training"),
        (case.dtype != "fp32", case.dtype),
        (case.packed, "packed sequences"),
        (case.proj > 0, "projections"),
    ):
        if wrong:
            raise Unavailable(f"{peer} has no {what} here")


def _feed(problem: Problem) -> dict[str, np.ndarray]:
    feed = {"x": problem.inputs.x.numpy()}
    hx = problem.inputs.hx
    if hx is not None:
        states = hx if isinstance(hx, tuple) else (hx,)
        feed |= {name: state.numpy() for name, state in zip(("h0", "c0"), states, strict=False)}
    return feed


def _named(problem: Problem, outputs: list[Tensor]) -> Results:
    return dict(zip(("y", "h_n", "c_n"), outputs, strict=False))


def onnx_model(problem: Problem) -> bytes:
    """The layer as a serialized ONNX graph: x [T, B, I] (and h0, c0) to y [T, B, D*H] and h_n (c_n), as torch."""
    from onnx import TensorProto, helper, numpy_helper

    case, module = problem.case, problem.torch
    directions = 2 if case.bidirectional else 1
    states = ["h", "c"] if case.cell == "lstm" else ["h"]
    if case.layers > 1 and case.carried:
        raise Unavailable("the ONNX graph here carries the state of one layer")
    nodes, constants = [], [numpy_helper.from_array(np.array([0, 0, -1]), "merged")]
    last: dict[str, list[str]] = {s: [] for s in states}
    source = "x"
    for layer in range(case.layers):
        for kind, value in zip("WRB", _onnx_weights(module, case, layer), strict=True):
            constants.append(numpy_helper.from_array(value, f"{kind}{layer}"))
        attributes = {"hidden_size": case.hidden, "direction": "bidirectional" if directions == 2 else "forward"}
        if case.cell == "gru":
            attributes["linear_before_reset"] = 1
        given = [f"{s}0" for s in states] if case.carried else []
        ends = [f"{s}_n{layer}" for s in states]
        inputs = [source, f"W{layer}", f"R{layer}", f"B{layer}", *([""] * bool(given)), *given]
        nodes.append(helper.make_node(case.cell.upper(), inputs, [f"Y{layer}", *ends], **attributes))
        # ONNX gives [T, D, B, H]; torch [T, B, D*H].
        nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"YT{layer}"], perm=[0, 2, 1, 3]))
        source = "y" if layer == case.layers - 1 else f"y{layer}"
        nodes.append(helper.make_node("Reshape", [f"YT{layer}", "merged"], [source]))
        for s, end in zip(states, ends, strict=True):
            last[s].append(end)
    for s in states:
        nodes.append(helper.make_node("Concat", last[s], [f"{s}_n"], axis=0))
    shapes = {"x": [case.time, case.batch, case.input]}
    state_shape = [case.layers * directions, case.batch, case.hidden]
    if case.carried:
        shapes |= {f"{s}0": state_shape for s in states}
    results = {"y": [case.time, case.batch, directions * case.hidden]} | {f"{s}_n": state_shape for s in states}

    def infos(named: dict[str, list[int]]) -> list:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in named.items()]

    graph = helper.make_graph(nodes, case.cell, infos(shapes), infos(results), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def _onnx_weights(module: nn.Module, case: Case, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W [D, G*H, I], R [D, G*H, H] and B [D, 2*G*H] of one layer, gates in ONNX's order."""

    def reordered(kind: str, suffix: str) -> Tensor:
        weight = getattr(module, f"{kind}_l{layer}{suffix}").detach()
        gates = weight.view(len(ORDER[case.cell]), case.hidden, -1)
        return gates[ORDER[case.cell]].reshape(weight.shape)

    suffixes = ["", "_reverse"] if case.bidirectional else [""]
    w, r, b_ih, b_hh = ([reordered(kind, s) for s in suffixes] for kind in KINDS)
    biases = [torch.cat(pair) for pair in zip(b_ih, b_hh, strict=True)]
    return tuple(torch.stack(part).numpy() for part in (w, r, biases))
