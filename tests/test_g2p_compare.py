"""examples/g2p.py compare: its model's masks, and its training on torch.nn beside seqkern."""

import argparse
import itertools
from types import SimpleNamespace

import pytest
import torch
from g2p_cases import everything, g2p, small_dictionary  # noqa: F401
from g2p_tool import compare
from g2p_tool.data import PAD, Batch, Pairs
from torch import nn

CELLS = ("rnn", "gru", "lstm")
TINY = ["compare", "--batch", "4", "--hidden", "8", "--threads", "1"]
WORDS = ["network", "a", "sequence", "o'clock", "memory"]


@pytest.fixture
def batch() -> Batch:
    return Pairs(WORDS, {word: everything()[word][:1] for word in WORDS}).batch(torch.arange(5))


@pytest.mark.parametrize("backend", compare.BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_padding_changes_neither_the_loss_nor_a_gradient(batch, cell, backend):
    torch.manual_seed(0)
    model = compare.Seq2Seq(compare.layer_classes(backend), cell, hidden=8).double()
    more = batch.letters.new_full((3, 5), PAD)
    letters, given, wanted = (torch.cat((x, more)) for x in (batch.letters, batch.given, batch.wanted))
    padded = Batch(letters, batch.lengths, given, wanted)
    found = [torch.autograd.grad(model.loss(b), list(model.parameters())) for b in (batch, padded)]
    torch.testing.assert_close(model.loss(padded), model.loss(batch), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("cell", CELLS)
def test_both_backends_give_the_same_curve(small, cell, capsys, tmp_path):
    image = tmp_path / "curves.png"
    assert g2p.main([*TINY, "--steps", "16", "--cell", cell, "--plot", str(image)]) == 0
    out = capsys.readouterr().out
    assert "the same curve" in out
    assert "seqkern trains" in out
    assert image.read_bytes().startswith(b"\x89PNG")


def _forward_off(h: torch.Tensor) -> torch.Tensor:
    return h * 1.001


def _one_words_gradient_off(h: torch.Tensor) -> torch.Tensor:
    # One word's and not all alike: Adam takes no notice of the scale of a gradient.
    factor = torch.ones(h.size(1), 1).index_fill(0, torch.tensor(0), 1.1)
    return h.detach() + factor * (h - h.detach())


@pytest.mark.parametrize("fault", [_forward_off, _one_words_gradient_off])
def test_another_curve_is_found(small, fault, monkeypatch, capsys):
    class Wrong(nn.GRU):
        def forward(self, x, hx=None):
            y, h = super().forward(x, hx)
            return y, fault(h)

    classes = {"torch": nn, "seqkern": SimpleNamespace(GRU=Wrong)}
    monkeypatch.setattr(compare, "layer_classes", classes.__getitem__)
    assert g2p.main([*TINY, "--steps", "30", "--batch", "8", "--hidden", "32"]) == 1
    assert "NOT THE SAME" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_is_not_the_same_curve(capsys):
    a, b = (SimpleNamespace(backend=name, blocks=[], losses=[1.0, 1.0]) for name in "ab")
    assert compare.same_curve(a, b)
    b.losses[1] = float("nan")
    assert not compare.same_curve(a, b)


@pytest.mark.parametrize("backend", compare.BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_it_learns_its_words(cell, backend):
    words = ["night", "knight", "cell", "time", "gate", "layer"]
    pairs = Pairs(words, {word: everything()[word][:1] for word in words})
    run = compare.Run(backend, argparse.Namespace(seed=0, cell=cell, hidden=32, lr=2e-2), 60)
    compare.train([run], compare.batches(pairs, len(words), 0), 60)
    assert run.losses[-1] < 0.05 < 3 < run.losses[0]


def test_batches_go_on_epoch_after_epoch():
    pairs = Pairs(WORDS, {word: everything()[word][:1] for word in WORDS})
    drawn = list(itertools.islice(compare.batches(pairs, 2, 0), 9))
    for epoch in (drawn[:3], drawn[3:6], drawn[6:]):
        assert sorted(int(n) for b in epoch for n in b.lengths) == sorted(map(len, WORDS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "0"], "--steps must be at least 1, got 0"), (["--cell", "tanh"], "invalid choice")],
)
def test_bad_arguments_are_told_before_training(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        g2p.main(["compare", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
