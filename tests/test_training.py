"""Training by plain calls: what goes past the operator gives what it does, to the bit, and steps aside for it."""

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import seqkern
from seqkern import training
from seqkern.diagnostics import gradient_flow

I, H = 5, 19  # noqa: E741
LAYERS = {
    "RNN": {},
    "relu": {"nonlinearity": "relu"},
    "LSTM": {},
    "GRU": {"bias": False},
    "proj": {"proj_size": 7},
    "both": {"bidirectional": True},
    "stack": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
CLASSES = {"relu": "RNN", "proj": "LSTM", "both": "LSTM", "stack": "GRU"}
CELLS = {"RNNCell": {}, "relu": {"nonlinearity": "relu"}, "LSTMCell": {}, "GRUCell": {"bias": False}}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Counts:
    """Plain calls that were taken since, forward and backward."""

    def __init__(self, monkeypatch):
        self.taken = {"forward": 0, "backward": 0}
        self.short = True
        for name in self.taken:
            monkeypatch.setattr(training._C, name, self._counted(name, getattr(training._C, name)))

    def _counted(self, name, function):
        def call(*a):
            done = function(*a) if self.short else None
            self.taken[name] += done is not None
            return done

        return call

    def pop(self) -> tuple[int, int]:
        found = tuple(self.taken.values())
        self.taken = dict.fromkeys(self.taken, 0)
        return found


@pytest.fixture
def counts(monkeypatch) -> Counts:
    return Counts(monkeypatch)


def both_ways(counts, run, forwards, backwards):
    """Results of `run` by the short way, held to those of the operators."""
    counts.short = True
    got = run()
    assert counts.pop() == (forwards, backwards)
    counts.short = False
    want = run()
    assert counts.pop() == (0, 0)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return got


def flat(results) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else [t for r in results for t in flat(r)]


def normal(*shape, dtype, grad=False) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, dtype, counts):
    torch.manual_seed(3)
    m = getattr(seqkern, CLASSES.get(kind, kind))(I, H, **LAYERS[kind]).to(dtype)
    states = m.num_layers * (2 if m.bidirectional else 1)
    for steps, batch, given in itertools.product((1, 2, 14), (1, 3), (True, False)):
        x = normal(*((batch, steps) if m.batch_first else (steps, batch)), I, dtype=dtype, grad=True)
        h = normal(states, batch, m.proj_size or H, dtype=dtype, grad=True)
        c = normal(states, batch, H, dtype=dtype, grad=True)
        hx = None if not given else (h, c) if m.mode == "LSTM" else h
        wanted = [x, *m.parameters(), *(flat(hx) if given else [])]

        def run(m=m, x=x, hx=hx, wanted=wanted, which=slice(None)):
            outputs = flat(m(x, hx))[which]
            torch.manual_seed(4)
            cotangents = [torch.randn(*y.shape).to(y.dtype) for y in outputs]
            return [*outputs, *torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)]

        turned = m.batch_first and batch > 1 and steps > 1  # the first layer's input is strided
        backwards = 2 if kind == "stack" else 1
        both_ways(counts, run, backwards - turned, backwards - 2 * turned if turned else backwards)
        if kind != "stack":
            for which in (slice(1), slice(1, 2), slice(1, None)):
                both_ways(counts, lambda which=which, run=run: run(which=which), 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, dtype, counts):
    torch.manual_seed(5)
    m = getattr(seqkern, "RNNCell" if kind == "relu" else kind)(I, H, **CELLS[kind]).to(dtype)
    for batch, given in itertools.product(([], [1], [2], [9]), (True, False)):
        x, h, c = (normal(*batch, n, dtype=dtype, grad=True) for n in (I, H, H))
        hx = None if not given else (h, c) if kind == "LSTMCell" else h
        wanted = [x, *m.parameters(), *(flat(hx) if given else [])]

        def run(x=x, hx=hx, wanted=wanted, which=slice(None)):
            outputs = flat(m(x, hx))[which]
            torch.manual_seed(6)
            cotangents = [torch.randn(*y.shape).to(y.dtype) for y in outputs]
            return [*outputs, *torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)]

        both_ways(counts, run, 1, 1)
        if kind == "LSTMCell":
            both_ways(counts, lambda run=run: run(which=slice(1)), 1, 1)
            both_ways(counts, lambda run=run: run(which=slice(1, 2)), 1, 1)


def test_a_loop_of_cells(counts):
    m, x = seqkern.LSTMCell(I, H), normal(6, 4, I, dtype=torch.float32, grad=True)

    def run():
        state, loss = None, 0
        for step in x:
            state = m(step, state)
            loss = loss + state[0].square().sum()
        return torch.autograd.grad(loss, [x, *m.parameters()])

    both_ways(counts, run, 6, 6)


@pytest.mark.parametrize("needed", itertools.product((True, False), repeat=5), ids=str)
def test_only_what_is_needed(needed, counts):
    if not any(needed):
        pytest.skip("nothing to do")
    m = seqkern.LSTM(I, H)
    x, h, c = (normal(*s, dtype=torch.float32) for s in ((3, 2, I), (1, 2, H), (1, 2, H)))
    tensors = [x, h, c, m.weight_ih_l0, m.bias_hh_l0]
    m.requires_grad_(False)
    for t, need in zip(tensors, needed, strict=True):
        t.requires_grad_(need)

    def run():
        for t in [*tensors, *m.parameters()]:
            t.grad = None
        y, _ = m(x, (h, c))
        y.backward(torch.ones(y.shape))
        return [t.grad for t in [*tensors, *m.parameters()]]

    got = both_ways(counts, run, 1, 1)
    assert [g is not None for g in got[:5]] == list(needed)


def test_what_is_not_plain(counts):
    m, x = seqkern.GRU(I, H), normal(3, 2, I, dtype=torch.float32, grad=True)
    m(x)[0].sum().backward()  # its gradient lies in one element
    assert counts.pop() == (1, 0)
    m(x.transpose(0, 1))[0].backward(torch.ones(2, 3, H))
    assert counts.pop() == (0, 0)
    y = m(x)[0]
    (g,) = torch.autograd.grad(y, x, torch.ones(y.shape), create_graph=True)
    g.square().sum().backward()
    assert counts.pop() == (1, 0)
    y = m(x)[0]
    with pytest.raises(RuntimeError, match="Batching rule"):  # the operator's; nothing may be read as if it were dense
        torch.autograd.grad(y, x, torch.ones(4, *y.shape), is_grads_batched=True)
    assert counts.pop() == (1, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert m(x)[0].dtype is torch.bfloat16
    assert counts.pop() == (0, 0)
    m(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 1])))[0].data.backward(torch.ones(4, H))
    assert counts.pop() == (0, 0)

    class Seen(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen():
        y = m(x)[0]
        y.backward(torch.ones(y.shape))
    assert counts.pop() == (0, 0) and {"seqkern.rnn_layer.default", "seqkern.rnn_layer_backward.default"} <= {
        *Seen.names
    }
    with gradient_flow(m) as flow:
        y = m(x)[0]
        y.backward(torch.ones(y.shape))
    assert counts.pop() == (1, 0) and len(flow.records) == 1


def test_checkpoint_and_changed_tensors(counts):
    m, x = seqkern.LSTM(I, H), normal(3, 2, I, dtype=torch.float32, grad=True)

    def run():
        y = checkpoint(lambda x: m(x)[0], x, use_reentrant=False)
        return torch.autograd.grad(y, [x, *m.parameters()], torch.ones(y.shape))

    both_ways(counts, run, 2, 1)
    counts.short = True
    y = m(x)[0]
    with torch.no_grad():
        m.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones(y.shape))


def test_wrong_arguments_lose_nothing():
    x, w = torch.zeros(2, 3, I), (torch.zeros(4 * H, I), torch.zeros(4 * H, H))
    plain = (x, None, None, w, 2, False, False)
    assert len(training._C.forward(*plain)) == 4
    others = {
        0: (x[0], x.int(), x.to("meta"), x[..., :1], x[:0], x[:, :0], x[..., ::2], None, x.double()),
        1: (torch.zeros(1, 3, I), torch.zeros(2, 3, H), x, 1),
        2: (torch.zeros(1, 3, I), torch.zeros(1, 2, H), torch.zeros(1, 3, H).double()),
        3: ((), w[:1], (*w, w[0]), w * 3, (w[1], w[0]), (w[0].double(), w[1]), (w[0][:-1], w[1]), None, (1, 2)),
        4: (0, 3),
        5: (True,),
        6: (True,),
    }
    for at, values in others.items():
        for value in values:
            assert training._C.forward(*plain[:at], value, *plain[at + 1 :]) is None, (at, value)
    y, h_n, c_n, reserve = training._C.forward(*plain)
    back = (y, h_n, c_n, x, None, None, w, y, reserve, 2, False, False, True, True, True, True)
    assert [t.shape for t in flat(training._C.backward(*back))] == [t.shape for t in (x, h_n, c_n, *w)]
    for at in (0, 1, 2, 7, 8):
        assert training._C.backward(*back[:at], x.double(), *back[at + 1 :]) is None
    for function, count in (("forward", 7), ("backward", 16)):
        with pytest.raises(TypeError, match=f"{function} takes {count} arguments, got 2"):
            getattr(training._C, function)(1, 2)
        with pytest.raises(TypeError):
            getattr(training._C, function)(*["x"] * count)
    watched = [x, *w, y, h_n, c_n, reserve, torch.Tensor]
    before = [sys.getrefcount(t) for t in watched]
    for _ in range(3):
        training._C.forward(*plain)
        training._C.backward(*back)
        training._C.backward(*back[:12], False, False, False, False)
        training._C.backward(*back[:8], None, *back[9:])
    assert [sys.getrefcount(t) for t in watched] == before


def test_a_torch_without_the_exchange_table():
    code = """
        import torch
        del torch.Tensor.__dlpack_c_exchange_api__
        import seqkern
        m, x = seqkern.LSTM(5, 7), torch.randn(3, 2, 5, requires_grad=True)
        m(x)[0].sum().backward()
        with torch.no_grad():
            assert seqkern.inference.call(m, x, None) is None
            assert torch.equal(m(x)[0], seqkern.functional.lstm(x, None, list(m.parameters()))[0])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
