"""Packed weights that inference keeps from call to call: any change of the weights takes effect at the next call."""

import copy
import itertools
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loops import make
from torch import nn

import seqkern

mark = torch.ops.seqkern._cpu_mark
KINDS = {
    "rnn": ("RNN", {}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "proj": ("LSTM", {"proj_size": 9}),
    "both": ("LSTM", {"bidirectional": True}),
    "two layers": ("GRU", {"num_layers": 2}),
}


def negate(p):
    p.data.neg_()


def one_element(p):
    p.data.view(-1)[p.numel() * 2 // 3] += 0.5


def signs_of_a_column(p):
    p.data[:, 1] *= -1


def swap(p):
    p.data[[0, 5]] = p.data[[5, 0]]


def by_numpy(p):
    p.data.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]).numpy()[...] += 3 << 3


def replaced(p):
    p.data = torch.rand_like(p) - 0.5


CHANGES = [negate, one_element, signs_of_a_column, swap, by_numpy, replaced]


def run(m, x):
    with torch.no_grad():
        y, state = m(x)
    return [y, *(state if isinstance(state, tuple) else [state])]


def equal(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def copied(m):
    """The same layer on other addresses, whose weights nobody has packed."""
    return copy.deepcopy(m)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_change_takes_effect(kind, batch, dtype):
    """Whatever weight changes and however: the result is that of a layer that was never called before, bit for bit."""
    name, options = KINDS[kind]
    m = make(name, 13, 70, **options).to(dtype).eval()
    x = torch.randn(20, batch, 13, dtype=dtype)
    before = run(m, x)
    for _ in range(3):
        assert equal(before, run(m, x)), "each call is the first"
    matrices = [n for n, p in m.named_parameters() if p.dim() == 2]
    for (name, change), _ in zip(itertools.product(matrices, CHANGES), range(24), strict=False):
        change(m.get_parameter(name))
        now = run(m, x)
        assert equal(now, run(copied(m), x)), f"{name}: {change.__name__}"
        assert not equal(now, before) or change is by_numpy, f"{name}: {change.__name__} changes nothing"
        before = now
    assert equal(before, run(m, x))


def test_training_between():
    """As an optimizer's step changes weights, between one evaluation and the next."""
    m, x = seqkern.LSTM(12, 40), torch.randn(15, 4, 12)
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    for _ in range(3):
        evaluated = run(m, x)
        assert equal(evaluated, run(copied(m), x))
        y = m(x)[0]
        torch.testing.assert_close(y.detach(), evaluated[0])
        y.square().sum().backward()
        optimizer.step()


def test_layers_of_other_shapes_on_the_same_addresses():
    weights = (torch.rand(2, 4 * 40 * 40) - 0.5) / 3
    for hidden in (40, 20, 40, 30, 20):
        fused, plain = (library.LSTM(hidden, hidden, bias=False) for library in (seqkern, nn))
        for name, row in (("weight_ih_l0", 0), ("weight_hh_l0", 1)):
            part = weights[row, : 4 * hidden * hidden].view(4 * hidden, hidden)
            fused.get_parameter(name).data = plain.get_parameter(name).data = part
        x = torch.randn(14, 5, hidden)
        torch.testing.assert_close(run(fused, x), run(plain, x))


def test_calls_at_the_same_time():
    """Each thread gets memory of its own; the weights change between the rounds."""
    m, x = make("LSTM", 33, 65).eval(), torch.randn(20, 3, 33, dtype=torch.float64)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            m.weight_hh_l0.data.add_(0.01)
            want = run(copied(m), x)
            assert all(equal(want, got) for got in pool.map(lambda _: run(m, x), range(24)))


def run_program(text, mib):
    """In a process of its own, whose limit is `mib`."""
    command = [sys.executable, "-c", textwrap.dedent(text)]
    environment = os.environ | {"SEQKERN_KEPT_WEIGHTS_MIB": mib}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("room", ["0", "1"])
def test_without_room(room):
    """The same bits, and no more memory than is allowed, where some or all layers find no room."""
    program = """
        import hashlib, torch, seqkern
        torch.manual_seed(3)
        m = seqkern.LSTM(64, 128, num_layers=4, bidirectional=True).eval()
        x = torch.randn(16, 2, 64)
        with torch.no_grad():
            for _ in range(3): y = m(x)[0]
        print(hashlib.sha256(y.numpy().tobytes()).hexdigest(), *torch.ops.seqkern._cpu_kept_weights())
    """
    found = [run_program(program, mib).stdout.split() for mib in (room, "")]
    assert found[0][0] == found[1][0]
    assert int(found[0][1]) < int(found[1][1]) == 4
    assert int(found[0][2]) <= int(room) << 20 < int(found[1][2])


def test_weights_made_for_each_call_take_no_room():
    program = """
        import torch, seqkern
        m, x, before = seqkern.LSTM(64, 128).eval(), torch.randn(4, 4, 64), []
        with torch.no_grad():
            for _ in range(20):
                before.append([torch.empty_like(p) for p in m.parameters()])  # no address comes back
                weights = {n: p * 1.0 for n, p in m.named_parameters()}
                torch.func.functional_call(m, weights, (x,))
                before.append(weights)
        assert torch.ops.seqkern._cpu_kept_weights() == [0, 0]
        with torch.no_grad():
            for _ in range(3): m(x)
        assert torch.ops.seqkern._cpu_kept_weights()[0] == 1
    """
    done = run_program(program, "")
    assert done.returncode == 0, done.stderr


def test_what_is_unused_makes_room():
    program = """
        import torch, seqkern
        with torch.no_grad():
            for i in range(300):
                m, x = seqkern.GRU(64, 128 + i % 3).eval(), torch.randn(1, 4, 64)
                for _ in range(4): m(x)
                layers, held = torch.ops.seqkern._cpu_kept_weights()
                assert layers <= 128 and held <= 2 << 20, (layers, held)
        assert layers > 1
    """
    done = run_program(program, "2")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["-1", "many", "1.5"])
def test_a_limit_that_is_none(value):
    program = "import torch, seqkern; seqkern.LSTM(4, 4).requires_grad_(False)(torch.randn(5, 4, 4))"
    done = run_program(program, value)
    assert done.returncode != 0
    assert f"SEQKERN_KEPT_WEIGHTS_MIB must be a whole number of MiB, 0 or more, got {value}" in done.stderr


def test_every_bit_counts():
    x = torch.randint(-(1 << 31), 1 << 31, (150,), dtype=torch.int64).to(torch.int32)
    marks = {mark(x)}
    for i, bit in itertools.product(range(len(x)), range(32)):
        changed = x.clone()
        changed[i] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        marks.add(mark(changed))
    assert len(marks) == 150 * 32 + 1
    assert 0 not in marks


@pytest.mark.parametrize("base", ["zeros", "ones", "random"])
def test_two_changes_do_not_cancel(base):
    """Above all those of signs, and of numbers whose lower bits are zeros, in places that one lane of a chain takes."""
    x = torch.rand(600) if base == "random" else getattr(torch, base)(600)
    marks, count = set(), 0
    for i, step in itertools.product(range(0, 40), range(1, 260)):
        changed = x.clone()
        changed[i], changed[i + step] = -x[i] - 1, -x[i + step] - 1
        marks.add(mark(changed))
        count += 1
        changed = x.clone().view(torch.int32)
        changed[[i, i + step]] ^= -(1 << 31)
        marks.add(mark(changed))
        count += 1
    assert len(marks) == count


def test_zeros_at_the_end_count():
    """Of one length a mark sees all bytes, the last few too."""
    for n in range(1, 300):
        x = torch.zeros(n, dtype=torch.uint8)
        y = x.clone()
        y[-1] = 1
        assert mark(x) != mark(y)
    assert len({mark(torch.full((64,), i % 251, dtype=torch.uint8)) for i in range(251)}) == 251


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_loop_of_cells_in_training(kind):
    cell, x = getattr(seqkern, kind)(40, 48), torch.randn(5, 40)

    def run(m) -> list[torch.Tensor]:
        state, outputs = None, []
        for _ in range(3):
            state = m(x, state)
            outputs.append(state[0] if kind == "LSTMCell" else state)
        return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), list(m.parameters()))]

    run(cell)
    layers = torch.ops.seqkern._cpu_kept_weights()[0]
    for _ in range(2):
        assert all(map(torch.equal, run(cell), run(copy.deepcopy(cell))))
        cell.weight_hh.data.numpy()[3, 5] += 1  # leaves no trace in the tensor's version
        for p in cell.parameters():
            p.data.mul_(0.9)
    assert layers > 0
