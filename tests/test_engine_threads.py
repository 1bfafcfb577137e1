"""The same bits every time, whatever else runs: repeated calls, numbers of threads, Python threads, forked workers."""

import contextlib
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES, make_cotangents, make_inputs
from oracle import check, engine, evaluate
from torch.utils.data import DataLoader, Dataset

import seqkern

# One for each way to split the work: by rows, by units with a barrier, by direction, ragged, and not at all.
SPLITS = [
    "batch_gt_tile-lstm",
    "few_rows_many_units-lstm",
    "few_rows_many_units-gru",
    "bidirectional_wide-gru",
    "packed_wide-lstm",
    "proj_wide-lstm",
    "rows_and_units-rnn_relu",
    "h_below_vector-rnn_tanh",
]
splits = pytest.mark.parametrize("case", [CASES[name] for name in SPLITS], ids=SPLITS)


def run(case, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return evaluate(engine, case, make_inputs(case, dtype), make_cotangents(case, dtype))


def assert_same_bits(found, want) -> None:
    different = [name for name in want if not torch.equal(found[name], want[name])]
    assert not different


@splits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_runs_repeat_bit_for_bit(case, dtype, threads):
    torch.set_num_threads(threads)
    first = run(case, dtype)
    for _ in range(4):
        assert_same_bits(run(case, dtype), first)


@splits
def test_thread_count_may_change_between_calls(case):
    """Forward with one number of threads, backward with another; the number may also grow after the first call."""
    inputs, cotangents = make_inputs(case, torch.float32), make_cotangents(case, torch.float32)
    for before, after in ((1, 4), (4, 1), (2, 3)):

        def layer(*arguments, before=before, after=after):
            torch.set_num_threads(before)
            outputs = engine(*arguments)
            torch.set_num_threads(after)
            return outputs

        check(case, torch.float32, evaluate(layer, case, inputs, cotangents))


@splits
def test_a_busy_machine_changes_nothing(case):
    """Another Python thread keeps the cores busy with matmuls meanwhile."""
    want, stop = run(case), threading.Event()

    def load():
        a = torch.randn(200, 200)
        while not stop.is_set():
            a @ a

    other = threading.Thread(target=load)
    other.start()
    try:
        for _ in range(5):
            assert_same_bits(run(case), want)
    finally:
        stop.set()
        other.join()


def test_calls_from_several_python_threads():
    """The engine has no state that calls share: eight at once, each with its own problem, all right."""
    cases = [CASES[name] for name in SPLITS]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for case, found in zip(cases, pool.map(run, cases), strict=True):
                check(case, torch.float32, found)


class Problems(Dataset):
    """Item i is the case SPLITS[i], computed where the item is fetched: in a worker process."""

    def __len__(self) -> int:
        return len(SPLITS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return run(CASES[SPLITS[index]])


def test_forked_workers():
    """A DataLoader forks its workers after the parent has used the engine and started its threads."""
    torch.set_num_threads(2)
    for name in SPLITS:
        run(CASES[name])
    loader = DataLoader(Problems(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    for name, found in zip(SPLITS, loader, strict=True):
        check(CASES[name], torch.float32, found)
    torch.set_num_threads(2)
    check(CASES[SPLITS[0]], torch.float32, run(CASES[SPLITS[0]]))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone places threads so")
def test_threads_wake_up_on_another_core_than_the_caller():
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    torch.set_num_threads(2)
    layer, x = seqkern.LSTM(256, 256), torch.randn(200, 32, 256)

    def allowed() -> list[set[int]]:
        found = []
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                found.append(os.sched_getaffinity(int(thread)))
        return found

    seen, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.extend(a for a in allowed() if a != cores)
            time.sleep(1e-3)

    with torch.no_grad():
        layer(x)  # from now on it knows its threads
        time.sleep(0.01)
        before = allowed()
        watcher = threading.Thread(target=watch)
        watcher.start()
        want = layer(x)[0]
        done.set()
        watcher.join()
    assert seen and all(len(a) == len(cores) - 1 and a < cores for a in seen)
    assert [a for a in allowed() if a != cores] == [a for a in before if a != cores]
    with torch.no_grad():
        assert torch.equal(layer(x)[0], want)
