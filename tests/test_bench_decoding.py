"""bench/decoding.py: a line for each case, and a wrong result that is never timed."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import decoding, eager_search

CASES = [
    decoding.Case(s, a, 2, 16, 20, prepared=s == "beam") for s in ("greedy", "beam") for a in ("general", "bahdanau")
]


@pytest.fixture
def run(tmp_path):
    def run(*options):
        path = tmp_path / "lines.jsonl"
        code = decoding.main(["--json", str(path), "--quick", *options], lambda: CASES)
        return code, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return run


def test_lines(run):
    code, lines = run("--cases", "general")
    assert code == 0 and [line["case"] for line in lines] == [CASES[0].name, CASES[2].name]
    for line in lines:
        assert line["ratio"] > 0 and line["us_step"] > 0 and line["peer"] == "torch" and "commit" in line


def test_a_wrong_result_is_not_timed(run, monkeypatch):
    right = eager_search.beam
    monkeypatch.setattr(eager_search, "beam", lambda *given: (right(*given)[0] + 1, right(*given)[1]))
    code, lines = run("--cases", "beam-general")
    assert code == 1 and "rows differ" in lines[0]["wrong"] and "ms" not in lines[0]


def test_no_such_case(run):
    assert run("--cases", "nothing")[0] == 2
