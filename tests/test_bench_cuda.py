"""The comparison with cuDNN without a GPU: cases, the rule of cuDNN's algorithm, measuring on a faked device."""

import os
from dataclasses import replace
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch

import seqkern
from bench import cudnn, gpu, gpu_cases, gpu_measure, problem, timing
from bench.cases import Case
from bench.sources import slug

H200 = cudnn.Gpu(9, 0, 132, 91501)
CASE = Case("lstm-fp16", "lstm", 16, 256, 1024, 1024, dtype="fp16", passes="train")
TINY = Case("lstm-bf16", "lstm", 2, 5, 3, 4, passes="train", dtype="bf16")


@pytest.mark.parametrize(
    "changes, forward, backward",
    [
        ({}, "persist_static", "persist_static"),
        ({"dtype": "bf16"}, "standard", "standard"),
        ({"dtype": "fp32"}, "standard", "standard"),
        ({"cell": "gru"}, "standard", "standard"),
        ({"bidirectional": True}, "standard", "standard"),
        ({"layers": 2}, "standard", "standard"),
        ({"packed": True}, "standard", "standard"),
        ({"proj": 512}, "standard", "standard"),
        ({"batch": 12}, "standard", "standard"),
        ({"batch": 136}, "standard", "standard"),
        ({"hidden": 960}, "standard", "standard"),
        ({"hidden": 1152}, "standard", "standard"),
        ({"input": 100}, "standard", "standard"),
        ({"cell": "rnn", "batch": 88}, "persist_static", "persist_static"),
        ({"cell": "rnn", "batch": 96}, "standard", "standard"),
        ({"cell": "rnn", "batch": 96, "hidden": 768}, "persist_static", "persist_static"),
        ({"hidden": 128}, "persist_static_small_h", "persist_static_small_h"),
        ({"hidden": 192, "dtype": "bf16", "layers": 2, "bidirectional": True}, "persist_static_small_h", "standard"),
        ({"hidden": 193, "dtype": "bf16"}, "standard", "standard"),
        ({"hidden": 384, "cell": "rnn"}, "persist_static_small_h", "persist_static"),
        ({"hidden": 64, "packed": True}, "standard", "standard"),
        ({"hidden": 64, "dtype": "fp64"}, "standard", "standard"),
    ],
    ids=str,
)
def test_algorithm_that_pytorch_names(changes, forward, backward):
    case = replace(CASE, **changes)
    assert cudnn.algorithms(case, H200) == {"forward": forward, "backward": backward}
    assert cudnn.algorithms(replace(case, passes="infer"), H200) == {"forward": forward}


def test_algorithm_depends_on_the_device():
    old_cudnn, a10, t4, v100 = (
        replace(H200, cudnn=91200), cudnn.Gpu(8, 6, 100, 91501), cudnn.Gpu(7, 5, 40, 91501), cudnn.Gpu(7, 0, 80, 91501)
    )  # fmt: skip
    assert cudnn.algorithm(replace(CASE, dtype="bf16"), old_cudnn, True) == "native"
    assert [cudnn.algorithm(CASE, g, True) for g in (a10, replace(H200, sms=97), t4)] == ["standard"] * 3
    volta = [replace(CASE, cell="gru", batch=b, time=t) for b, t in ((16, 256), (80, 256), (128, 30), (8, 10), (8, 9))]
    assert [cudnn.algorithm(c, v100, True) == "persist_static" for c in volta] == [True, False, False, True, False]


def test_cases_meet_every_pair_and_stay_few():
    cases = gpu_cases.all_cases()
    assert len({case.name for case in cases}) == len(cases) <= 200
    axes = (gpu_cases.CELLS, gpu_cases.DTYPES, gpu_cases.BATCHES, gpu_cases.HIDDEN, tuple(gpu_cases.KINDS))

    def place(case):
        options = {k: getattr(case, k) for k in ("layers", "bidirectional", "packed")}
        standard = {"layers": 1, "bidirectional": False, "packed": False}
        kind = next(name for name, wanted in gpu_cases.KINDS.items() if options == standard | wanted)
        return case.cell, case.dtype, case.batch, case.hidden, kind

    for passes in ("infer", "train"):
        met = {pair for c in cases if c.passes == passes for pair in combinations(enumerate(place(c)), 2)}
        assert {pair for combo in product(*axes) for pair in combinations(enumerate(combo), 2)} <= met
    ran = {cudnn.algorithm(case, H200, True) for case in cases}
    assert ran == {"standard", "persist_static", "persist_static_small_h"}
    quick = [case for case in cases if case.quick]
    assert len(quick) <= 24 and {case.group for case in quick} == {c.group for c in cases} - {"long", "pairwise"}
    assert {case.time for case in cases} == {256, 1024}
    assert {case.group for case in cases[:30]} == {case.group for case in cases}  # of use when cut short


def test_what_nvidia_smi_says():
    assert gpu.parse_smi("580.159.04, 1980, 3201, [N/A], 700.00, 31") == {
        "driver": "580.159.04", "clock_sm": 1980, "clock_mem": 3201, "power_limit": 700, "temperature": 31
    }  # fmt: skip
    assert gpu.parse_smi("NVIDIA-SMI has failed") == {}
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_engine_is_forced_inside_only(monkeypatch):
    monkeypatch.setenv(gpu.ENGINE, "grid")
    with gpu.forced("step"):
        assert os.environ[gpu.ENGINE] == "step"
    with gpu.forced(""):
        assert os.environ[gpu.ENGINE] == "grid"
    monkeypatch.delenv(gpu.ENGINE)
    with pytest.raises(KeyError), gpu.forced("step"):
        raise KeyError
    assert gpu.ENGINE not in os.environ


def test_engine_as_explained(monkeypatch):
    split = "forward: grid: weights stay on chip; 64 blocks\nbackward: step: the recurrent weights do not fit"
    monkeypatch.setattr(seqkern, "explain", lambda *args: SimpleNamespace(engine="cuda-grid", why="w", split=split))
    found = gpu.engines(None, TINY)
    assert (found["engine"], found["engine_backward"]) == ("grid", "step") and "do not fit" in found["engine_why"]
    assert "engine_backward" not in gpu.engines(None, replace(TINY, passes="infer"))
    monkeypatch.setattr(seqkern, "explain", lambda *args: SimpleNamespace(engine="reference", why="no kernel"))
    assert gpu.engines(None, TINY) == {"engine": "reference", "engine_why": "no kernel"}
    monkeypatch.setattr(seqkern, "explain", lambda *args: 1 / 0)
    assert gpu.engines(None, TINY)["engine"] == "unknown"


def test_events_give_seconds_per_call(monkeypatch):
    class Event:
        now = 0.0  # ms, of the device

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def work():
        Event.now += 3.0

    assert gpu.events(work, 4) == pytest.approx(3e-3)


def test_weights_are_put_together_for_bf16(monkeypatch):
    class Weight:
        is_cuda, place = True, 0

        def untyped_storage(self):
            return SimpleNamespace(data_ptr=lambda: self.place or id(self))

    layer = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    assert not cudnn.flatten(layer)
    fake = SimpleNamespace(
        flatten_parameters=lambda: None, _flat_weights=[Weight(), Weight()], bias=True, proj_size=0, mode="LSTM",
        input_size=3, hidden_size=4, num_layers=2, batch_first=False, bidirectional=True,
    )  # fmt: skip

    def together(weights, count, *sizes):
        assert (count, sizes) == (4, (3, 2, 4, 0, 2, False, True))  # 2: cuDNN's number of the LSTM
        for weight in weights:
            weight.place = 1

    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", together, raising=False)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda mode: {"LSTM": 2}[mode])
    assert cudnn.flatten(fake)


@pytest.fixture
def device(monkeypatch):
    """Lets the CPU stand for the GPU."""
    found = problem.Problem
    monkeypatch.setattr(gpu_measure, "Problem", lambda case, device: found(case, "cpu"))
    monkeypatch.setattr(gpu, "gpu", lambda: H200)
    monkeypatch.setattr(gpu, "events", timing.clock)
    monkeypatch.setattr(gpu, "graphed", lambda run: run)
    monkeypatch.setattr(gpu_measure, "QUICK", timing.Budget(samples=2, low=0, high=0.1))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)


@pytest.mark.parametrize(
    "changes", [{}, {"passes": "infer", "engine": "step"}, {"packed": True, "cell": "gru"}], ids=str
)
def test_measure_fills_a_line(device, changes):
    case = replace(TINY, **changes)
    line = gpu_measure.measure(case, quick=True)
    assert "wrong" not in line and line["error"] <= 1 and line["peer_error"] < 0.1
    assert line["us_step"] == pytest.approx(line["ms"] * 1e3 / 5)
    assert ("graph_ratio" in line) == (not case.packed)
    assert line["cudnn_forward"] == ("standard" if case.packed else "persist_static_small_h")
    assert case.name in gpu_measure.sentence(case, line) and "cuDNN (" in gpu_measure.sentence(case, line)


def test_failed_capture_is_noted(device, monkeypatch):
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu, "graphed", refuse)
    line = gpu_measure.measure(TINY, quick=True)
    assert line["graph_error"].endswith("capturing") and line["ratio"] > 0


def test_wrong_and_failing_cases_have_no_times(device, monkeypatch):
    right = seqkern.LSTM.forward

    def off(self, *args):
        y, state = right(self, *args)
        return y * 1.5, state

    monkeypatch.setattr(seqkern.LSTM, "forward", off)
    line = gpu_measure.measure(TINY, quick=True)
    assert line["wrong"].startswith("seqkern: y is off by") and "ms" not in line and "engine" in line

    def broken(self, *args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nat x")

    monkeypatch.setattr(seqkern.LSTM, "forward", broken)
    assert gpu_measure.measure(TINY, quick=True)["wrong"].endswith("was encountered")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: broken(None))
    with pytest.raises(gpu_measure.Lost, match="the device then failed"):
        gpu_measure.measure(TINY, quick=True)
