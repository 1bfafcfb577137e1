"""Files that are whole or not there: checkpoints, results and the log survive a kill at any moment."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """`write` fills a temporary file in the same folder, which then takes the place of `path` in one step.

    The file is on the disk before it gets its name, and the name is on the disk before this returns: after a kill or
    a power cut at any moment, `path` holds the old contents or the new ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")  # one name, so that what a kill leaves is overwritten next time
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def save(path: Path, state: dict[str, Any]) -> None:
    """A dictionary of tensors and plain values, for `load`."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """What `save` wrote; no code in it is run. With `mmap`, tensors are read only where they are used."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log's lines; a last one without its end, which a kill may leave, is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def cut_log(path: Path, step: int) -> None:
    """Drops the lines after this step: a resumed training writes them again."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step))


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the folder for one training. Raises BlockingIOError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process ends, however it ends
        yield
