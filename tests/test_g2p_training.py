"""examples/g2p.py: the loss, the schedule, averaged weights, a training that learns."""

import pytest
import torch
from g2p_cases import everything
from g2p_tool.data import PAD, Batch, Pairs
from g2p_tool.model import build, pronounce
from g2p_tool.scoring import error_rates
from g2p_tool.train import SETTINGS
from g2p_tool.training import Training, learning_rate, loss_of

WORDS = ["network", "a", "sequence", "o'clock", "memory"]
SMALL = SETTINGS | {"layers": 1, "hidden": 8, "embedding": 8, "dropout": 0.0}
MODELS = [
    {"cell": "gru"},
    {"cell": "lstm", "layers": 2, "attention": "bahdanau", "input_feeding": True},
    {"cell": "rnn", "attention": "none", "tied": True},
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # of models this small, more threads are only in each other's way


@pytest.fixture
def pairs() -> Pairs:
    return Pairs(WORDS, {word: everything()[word][:1] for word in WORDS})


def make(**settings) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(SMALL | settings).double()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("settings", MODELS)
def test_padding_changes_neither_the_loss_nor_a_gradient(pairs, settings, smoothing):
    model, batch = make(**settings), pairs.batch(torch.arange(5))
    more = batch.letters.new_full((3, 5), PAD)
    padded = Batch(
        torch.cat((batch.letters, more)),
        batch.lengths,
        torch.cat((batch.given, more)),
        torch.cat((batch.wanted, more)),
    )
    losses = [loss_of(model, b, smoothing) for b in (batch, padded)]
    found = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in losses]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", MODELS)
def test_the_loss_of_a_batch_is_the_mean_over_its_words_places(pairs, settings):
    """Each word alone, in a batch without any padding, against all in one batch."""
    model, places = make(**settings), pairs.places.tolist()
    alone = sum(n * loss_of(model, pairs.batch(torch.tensor([i])), 0.1) for i, n in enumerate(places))
    together = loss_of(model, pairs.batch(torch.arange(5)), 0.1)
    torch.testing.assert_close(together, alone / sum(places), rtol=1e-6, atol=0)


def test_smoothing_gives_every_answer_a_share(pairs):
    model, batch = make(), pairs.batch(torch.arange(5))
    log_p = model(batch.letters, batch.lengths, batch.given).log_softmax(-1)
    real = batch.wanted != PAD
    right = log_p.gather(-1, batch.wanted[..., None])[..., 0]
    wanted = -(0.9 * right + 0.1 * log_p.mean(-1))[real].mean()
    torch.testing.assert_close(loss_of(model, batch, 0.1).double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_learning_rate(decay):
    settings = SETTINGS | {"lr": 1.0, "warmup": 10, "decay": decay}
    rates = [learning_rate(step, settings, 110) for step in range(110)]
    assert rates[:10] == [i / 10 for i in range(1, 11)]
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert 0 < rates[-1] <= 0.01
    assert learning_rate(0, settings, 1) == 1.0, "fewer steps than the warm-up has"


def test_averaged_weights(pairs):
    training = Training(SMALL | {"ema": 0.5, "batch": 5}, pairs)
    name, weight = next(iter(training.model.named_parameters()))
    average = weight.detach().clone()
    for step in range(1, 15):
        training.advance()
        average.lerp_(weight.detach(), 1 - min(0.5, step / (step + 10)))
    torch.testing.assert_close(dict(training.average.named_parameters())[name], average, rtol=1e-6, atol=1e-8)
    assert not torch.equal(average, weight)


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(pairs):
    training = Training(SMALL | {"batch": 5}, pairs)
    before = [p.detach().clone() for p in training.model.parameters()]
    next(training.model.parameters()).register_hook(lambda g: g * torch.nan)
    with pytest.raises(FloatingPointError, match="step 1: wanted a finite loss and gradient, got loss .* norm nan"):
        training.advance()
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))


@pytest.mark.parametrize("settings", [*MODELS[:2], {"cell": "gru", "bf16": True}, MODELS[2]])
def test_a_trained_model_says_its_words(settings):
    words = ["night", "knight", "cell", "time", "gate", "layer"]
    dictionary = {word: everything()[word][:1] for word in words}
    size = {"layers": 1, "hidden": 32, "embedding": 32, "batch": 6, "steps": 120, "lr": 2e-2, "warmup": 10, "ema": 0.8}
    training = Training(SETTINGS | size | settings | {"dropout": 0.1}, Pairs(words, dictionary))
    losses = [training.advance() for _ in range(120)]
    assert losses[-1] < losses[0] / 3
    said = pronounce(training.average, words, batch=4)
    assert said == [dictionary[word][0] for word in words]
    assert error_rates(words, said, dictionary) == (0, 0)
