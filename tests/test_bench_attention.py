"""bench/attention.py end to end on tiny sizes: both sides agree, lines are written, a wrong result is not timed."""

import json

import pytest
import torch

pytest.importorskip("rich")

from bench import attention, timing


@pytest.fixture
def tiny(monkeypatch):
    for name, size in (("V", 7), ("S", 4), ("T", 3), ("H", 5), ("M", 6)):
        monkeypatch.setattr(attention, name, size)
    cases = [attention.Case(c, k, 2, 3, quick=True) for c in ("gru", "lstm") for k in ("general", "bahdanau")]
    monkeypatch.setattr(attention, "CASES", cases)
    monkeypatch.setattr(timing, "QUICK", timing.Budget(samples=2, low=0, high=0.2))


def run(path, *options):
    code = attention.main(["--quick", "--json", str(path), "--threads", "1", *options])
    return code, [json.loads(text) for text in path.read_text().splitlines()]


def test_lines(tiny, tmp_path):
    code, lines = run(tmp_path / "out.jsonl")
    assert code == 0 and [line["case"] for line in lines] == [case.name for case in attention.CASES]
    for line in lines:
        assert line["ms"] > 0 and line["ratio"] > 0 and 0 <= line["error"] <= 1
        assert line["peer"] == "torch" and line["pass"] == "train" and line["threads"] == 1


def test_both_sides_name_the_same_gradients(tiny):
    problem = attention.Problem(attention.CASES[3])
    ours, loop = problem.results("ours"), problem.results("loop")
    assert ours.keys() == loop.keys()
    assert len(loop) == 4 + len([*problem.loop.parameters()])  # logits, values, h, c


def test_a_wrong_result_is_not_timed(tiny, tmp_path, monkeypatch):
    plain = attention.Problem.run_ours
    monkeypatch.setattr(attention.Problem, "run_ours", lambda *a: plain(*a) + 1e-3 * torch.ones(()))
    code, lines = run(tmp_path / "out.jsonl", "--cases", "gru-general*")
    assert code == 1 and "logits is off" in lines[0]["wrong"] and "ms" not in lines[0]


def test_no_such_case(tiny, tmp_path):
    assert attention.main(["--cases", "transformer*", "--json", str(tmp_path / "out.jsonl")]) == 2
