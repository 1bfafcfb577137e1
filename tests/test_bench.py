"""The bench driver end to end on a tiny case, its refusal of wrong results, its timing and its peers."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import seqkern
from bench import cases, peers, problem, report, run, timing
from bench.cases import Case

TINY = Case("lstm-small", "lstm", 2, 5, 3, 4, passes="train")
FIELDS = [
    "case",
    "group",
    "cell",
    "pass",
    "dtype",
    "device",
    "peer",
    "ms",
    "p10",
    "p90",
    "peer_ms",
    "ratio",
    "ratio_low",
    "ratio_high",
    "gflops",
    "csrc",
    "commit",
    "threads",
    "isa",
    "load",
    "torch",
    "cpu",
    "at",
    "samples",
    "error",
]


@pytest.fixture
def tiny(monkeypatch):
    """Makes tiny cases the only ones, so that the driver's own selection is used."""

    def use(*chosen: Case) -> None:
        monkeypatch.setattr(cases, "all_cases", lambda: list(chosen))
        monkeypatch.setattr(timing, "QUICK", timing.Budget(samples=2, low=0, high=0.2))

    return use


def lines_of(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.mark.parametrize("passes", ["infer", "train"])
@pytest.mark.parametrize(
    "options",
    [{"cell": "lstm"}, {"cell": "gru", "packed": True}, {"cell": "rnn", "layers": 2, "bidirectional": True}]
    + [{"cell": "lstm", "proj": 2}, {"cell": "lstm", "carried": True}, {"cell": "gru", "dtype": "bf16"}],
    ids=str,
)
def test_driver_writes_a_line_for_a_checked_case(tiny, tmp_path, options, passes):
    case = Case(**{"group": "lstm-small", "batch": 2, "time": 5, "input": 3, "hidden": 4, **options, "passes": passes})
    tiny(case)
    out = tmp_path / "out.jsonl"
    for _ in range(2):
        assert run.main(["--json", str(out), "--quick", "--memory", "--cases", case.name]) == 0
    first, second = lines_of(out)
    assert not [field for field in FIELDS if field not in first]
    assert (first["case"], first["peer"], first["pass"]) == (case.name, "torch", passes)
    assert 0 < first["p10"] <= first["ms"] <= first["p90"]
    assert first["ratio_low"] <= first["ratio"] <= first["ratio_high"]
    assert 0 <= first["error"] <= 1
    assert second["csrc"] == first["csrc"]
    assert ("kept" in first) == (passes == "train")


def test_wrong_result_is_refused_before_timing(tiny, tmp_path, monkeypatch, capsys):
    tiny(TINY)
    right = seqkern.LSTM.forward

    def wrong(self, *args):
        y, state = right(self, *args)
        return y * (1 + 1e-4), state

    def never(*args, **kwargs):
        raise AssertionError("a wrong result was timed")

    monkeypatch.setattr(seqkern.LSTM, "forward", wrong)
    monkeypatch.setattr(timing, "paired", never)
    out = tmp_path / "out.jsonl"
    assert run.main(["--json", str(out), "--cases", TINY.name]) == 1
    (line,) = lines_of(out)
    assert "y is off by" in line["wrong"]
    assert not {"ms", "peer_ms", "ratio", "gflops"} & line.keys()
    assert "WRONG" in capsys.readouterr().err
    assert report.main([str(out)]) == 1


def test_check_sees_nan_a_wrong_shape_and_a_missing_gradient():
    p = problem.Problem(TINY, "cpu")
    truth, native = p.truth(), p.call(p.torch)
    assert set(native) == {"y", "h_n", "c_n", "dx", *(f"d{name}" for name, _ in p.torch.named_parameters())}
    assert problem.check(native, native, truth, torch.float32) <= 1
    for name, broken in (
        ("dx", torch.full_like(native["dx"], math.nan)),
        ("y", native["y"][:-1]),
        ("dbias_hh_l0", native["dbias_hh_l0"] * 1.001),
    ):
        with pytest.raises(problem.WrongResult, match=name):
            problem.check(native | {name: broken}, native, truth, torch.float32)
    with pytest.raises(problem.WrongResult, match="wanted"):
        problem.check({name: value for name, value in native.items() if name != "dx"}, native, truth, torch.float32)


def test_kept_counts_storages_once_and_not_the_inputs():
    class Layer(torch.nn.Module):
        def forward(self, x, hx):
            y = x.exp()  # keeps y
            return y * x * y, None  # keeps y and x, then y * x and y

    p = problem.Problem(TINY, "cpu")
    assert problem.kept(p, Layer()) == 2  # y and y * x; x is an input, the output is not kept


def test_regimes_quick_set_and_patterns():
    everything, quick = cases.select([], False, False), cases.select([], True, False)
    assert len({case.name for case in everything}) == len(everything)
    regimes = {(case.group, case.passes, case.dtype) for case in everything}
    assert regimes == {(case.group, case.passes, case.dtype) for case in quick}
    assert len(quick) == len(regimes)
    for case in everything:
        if case.group.endswith("-small"):
            assert case.batch <= 8 or case.hidden <= 128
        if case.group.endswith("-large"):
            assert 32 <= case.batch <= 128 and 256 <= case.hidden <= 1024
    assert {case.group for case in cases.select(["packed-*"], False, False)} == {
        f"packed-{kind}" for kind in ("lstm", "gru", "long-lstm", "long-gru")
    }
    assert any(case.time == 4000 for case in cases.select([], False, True))
    with pytest.raises(ValueError, match="no case or group matches 'nothing'"):
        cases.select(["nothing"], False, False)


def test_flops_by_hand():
    assert Case("", "lstm", 2, 5, 3, 4).flops(10) == 2 * 10 * 16 * (3 + 4)
    assert Case("", "gru", 2, 5, 3, 4, passes="train").flops(10) == 3 * 2 * 10 * 12 * (3 + 4)
    assert Case("", "rnn", 2, 5, 3, 4, layers=2, bidirectional=True).flops(10) == 2 * 10 * 2 * 4 * (3 + 4 + 8 + 4)
    assert Case("", "lstm", 2, 5, 3, 4, proj=2).flops(10) == 2 * 10 * (16 * (3 + 2) + 2 * 4)


@pytest.mark.parametrize("gpu", [False, True])
def test_cuda_without_kernels_is_one_sentence(capsys, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(run.machine, "cuda_archs", lambda: "")
    assert run.main(["--device", "cuda"]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("--device cuda") and message.endswith(".") and "Traceback" not in message


def test_statistics():
    assert timing.percentile([3, 1, 2], 50) == 2
    assert timing.percentile([0, 10], 10) == pytest.approx(1)
    assert timing.geomean([2, 0.5]) == pytest.approx(1)
    assert timing.median_interval([1, 2, 3, 4, 5]) == (1, 5)
    # Order-statistic tables: for n = 10 the 2nd and 9th values give 97.9 %, the 3rd and 8th only 89 %.
    assert timing.median_interval(range(1, 11)) == (2, 9)
    generator = random.Random(0)
    intervals = [timing.median_interval([generator.expovariate(1) for _ in range(15)]) for _ in range(1000)]
    assert sum(low <= math.log(2) <= high for low, high in intervals) >= 950
    for empty in (timing.percentile, timing.geomean):
        with pytest.raises(ValueError, match="got none"):
            empty([], *([50] if empty is timing.percentile else []))


class Clock:
    """A time that passes only where a test says so."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.log.append("pause")
        self.now += seconds

    def work(self, name, seconds):
        def call():
            self.log.append(name)
            self.now += seconds

        return call


@pytest.mark.parametrize("scale", [1, 2**-13], ids=["long calls", "short calls"])
def test_paired_alternates_pauses_and_measures(monkeypatch, scale):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    found = timing.paired(clock.work("a", scale), clock.work("b", 3 * scale), timing.Budget(6, 0, 1e3), linger=0.01)
    assert found.ours == pytest.approx([scale] * 6) and found.peer == pytest.approx([3 * scale] * 6)
    assert found.summary() == pytest.approx(
        {key: 1e3 * scale for key in ("ms", "p10", "p90")}
        | {key: 3e3 * scale for key in ("peer_ms", "peer_p10", "peer_p90")}
        | {"ratio": 3, "ratio_low": 3, "ratio_high": 3, "samples": 6}
    )
    if scale == 1:  # one warm-up each; a call is a sample
        assert "".join(clock.log).replace("pause", "-") == "ab" + "-a-bb-a" + "a-bb-a" * 2
    else:  # nine calls of a, three of b make a sample of a millisecond; one more after each pause
        timed = "".join(clock.log).replace("pause", "-").partition("-")[2]
        assert timed == "a" * 10 + "-" + "b" * 7 + "-" + ("a" * 19 + "-" + "b" * 7 + "-") * 2 + "a" * 10


def test_paired_stops_when_time_is_up(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    found = timing.paired(clock.work("a", 1), clock.work("b", 1), timing.Budget(30, 0.5, 7), linger=0)
    assert len(found.ratios) == 2 and len(found.ours) == 4


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "layers": 2}, {"carried": True}], ids=str)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_peer_computes_the_same_layer(peer, cell, options):
    if reason := peers.missing(peer):
        pytest.skip(reason)
    p = problem.Problem(Case("", cell, 2, 5, 3, 8, **options), "cpu")
    found = peers.PEERS[peer](p, 1)
    assert problem.check(found.results(), p.call(p.torch), p.truth(), torch.float32, found.slack) <= 1


@pytest.mark.parametrize("peer", ["torch", "onnxruntime"])
def test_peer_says_what_it_does_not_cover(peer):
    p = problem.Problem(TINY, "cpu")
    if peer == "torch":
        assert peers.missing("torch") is None and peers.PEERS["torch"](p, 1).slack == 1
    else:
        with pytest.raises(peers.Unavailable, match="training|not installed"):
            peers.PEERS[peer](p, 1)
