"""examples/g2p.py: files that survive a kill."""

import os
import subprocess
import sys

import pytest
import torch
from g2p_cases import EXAMPLES
from g2p_tool import files

KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import pathlib, torch
from g2p_tool import files

torch.set_num_threads(1)
path, seen, temporary = pathlib.Path(sys.argv[2]), [], 0
random.seed(0)
files.save(path, {"step": 0, "weights": torch.zeros(300_000)})
for _ in range(25):
    child = os.fork()
    if child == 0:
        step = files.load(path)["step"]
        while True:
            step += 1
            files.save(path, {"step": step, "weights": torch.full((300_000,), float(step))})
    time.sleep(random.uniform(0.005, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    temporary += path.with_name(path.name + ".tmp").exists()
    state = files.load(path)
    assert (state["weights"] == state["step"]).all(), "weights of one step, number of another"
    seen.append(state["step"])
assert seen == sorted(seen), seen
print(seen[-1], temporary)
"""


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    arguments = [sys.executable, "-c", KILLED, str(EXAMPLES), str(tmp_path / "last.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps, interrupted = map(int, done.stdout.split())
    assert steps > 0 and interrupted > 0, "no kill came while a file was being written"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    files.write_text(path, "old")

    def half(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, half)
    assert path.read_text() == "old"


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), replace(a, b))[1])
    files.save(tmp_path / "x.pt", {"x": torch.ones(2)})
    assert done == [str(tmp_path / "x.pt.tmp"), "renamed", str(tmp_path)]


def test_the_log_is_cut_to_a_step_and_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    assert files.read_log(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    files.cut_log(path, 2)
    assert files.read_log(path) == [{"step": 1}, {"step": 2}]


def test_one_training_at_a_time(tmp_path):
    with files.only_one(tmp_path), pytest.raises(BlockingIOError), files.only_one(tmp_path):
        pass
    with files.only_one(tmp_path):
        pass
