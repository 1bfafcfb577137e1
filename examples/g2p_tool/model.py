"""The model of some settings, and what it says."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from g2p_tool.data import END, MAX_PHONEMES, PAD, SOURCE_VOCAB, START, TARGET_VOCAB, phoneme_names, spell
from g2p_tool.files import load
from seqkern.seq2seq import Decoder, Encoder, Seq2Seq

CELLS = ("gru", "lstm", "rnn")
ATTENTIONS = ("general", "dot", "bahdanau", "concat", "none")
MODEL_SETTINGS = {
    "cell": "lstm",
    "layers": 2,
    "hidden": 192,
    "embedding": 128,
    "attention": "general",
    "input_feeding": False,
    "dropout": 0.2,
    "tied": False,
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options without defaults: what is not given is not in the namespace, and MODEL_SETTINGS has it."""
    default = MODEL_SETTINGS
    parser.add_argument("--cell", choices=CELLS, help=f"default {default['cell']}")
    parser.add_argument("--layers", type=int, help=f"of encoder and decoder each, default {default['layers']}")
    parser.add_argument(
        "--hidden", type=int, help=f"of the decoder and each encoder direction, default {default['hidden']}"
    )
    parser.add_argument("--embedding", type=int, help=f"of a letter and of a phoneme, default {default['embedding']}")
    parser.add_argument("--attention", choices=ATTENTIONS, help=f"default {default['attention']}")
    parser.add_argument(
        "--input-feeding", action="store_true", help="the decoder is also told what it attended to a step before"
    )
    parser.add_argument("--dropout", type=float, help=f"default {default['dropout']}")
    parser.add_argument("--tied", action="store_true", help="the phonemes' vectors are the output weights too")


def build(settings: dict[str, Any]) -> Seq2Seq:
    """A model with fresh weights, drawn from torch's global generator."""
    cell, layers, hidden, embedding = (settings[name] for name in ("cell", "layers", "hidden", "embedding"))
    shared = {"cell": cell, "num_layers": layers, "dropout": settings["dropout"]}
    encoder = Encoder(SOURCE_VOCAB, embedding, hidden, bidirectional=True, padding_idx=PAD, **shared)
    decoder = Decoder(
        TARGET_VOCAB,
        embedding,
        hidden,
        2 * hidden,
        attention=settings["attention"],
        input_feeding=settings["input_feeding"],
        pre_output=embedding if settings["tied"] else None,
        tied=settings["tied"],
        pad=PAD,
        bos=START,
        eos=END,
        **shared,
    )
    return Seq2Seq(encoder, decoder)


def last_path(folder: Path) -> Path:
    return folder / "last.pt"


def best_path(folder: Path) -> Path:
    """The best model of the training in a folder. Raises FileNotFoundError where there is none."""
    path = folder / "best.pt"
    if not path.exists():
        raise FileNotFoundError(f"wanted the best model of a training, {path}, which is not there: run `train` first")
    return path


def load_model(path: Path) -> tuple[Seq2Seq, dict[str, Any]]:
    """The model that a training keeps as its best, in evaluation mode, and all that is stored with it."""
    stored = load(path)
    model = build(stored["settings"])
    model.load_state_dict(stored["model"])
    return model.eval(), stored


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def pronounce(model: Seq2Seq, words: Sequence[str], beam: int = 1, batch: int = 256) -> list[list[str]]:
    """The phonemes of each word, in the order of `words`: greedy with a beam of 1, else the best of the beam."""
    order = sorted(range(len(words)), key=lambda i: len(words[i]))  # words of one length need no padding
    said: list[list[str]] = [[]] * len(words)
    for part in (order[start : start + batch] for start in range(0, len(order), batch)):
        letters, lengths = spell([words[i] for i in part])
        if beam == 1:
            found = model.greedy(letters, lengths, max_len=MAX_PHONEMES)
        else:
            found = model.beam(letters, lengths, beam=beam, max_len=MAX_PHONEMES)
        for i, best in zip(part, found.sentences(), strict=True):
            said[i] = phoneme_names(best[0])
    return said
