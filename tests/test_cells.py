"""RNNCell, LSTMCell and GRUCell against torch.nn's."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations

import seqkern
from seqkern import training

CELLS = {
    "RNNCell": {},
    "RNNCell-relu": {"nonlinearity": "relu"},
    "LSTMCell": {},
    "GRUCell": {},
    "GRUCell-bare": {"bias": False},
}
each_cell = pytest.mark.parametrize("name", CELLS)
I, H, B = 3, 5, 4  # noqa: E741


def twins(name, **options):
    options |= CELLS[name]
    cls = name.partition("-")[0]
    torch.manual_seed(4)
    ours = getattr(seqkern, cls)(I, H, **options)
    torch.manual_seed(4)
    theirs = getattr(nn, cls)(I, H, **options)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    return ours, theirs


def inputs(name, dtype=torch.float64, batch=(B,)):
    x, h, c = (torch.randn(*batch, n, dtype=dtype, requires_grad=True) for n in (I, H, H))
    return (x, (h, c)) if name == "LSTMCell" else (x, h)


def flat(values) -> list[torch.Tensor]:
    return [values] if isinstance(values, torch.Tensor) else [t for v in values for t in flat(v)]


@each_cell
@pytest.mark.parametrize("batch", [(B,), (), (0,)], ids=["batched", "unbatched", "zero_batch"])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "no_hx"])
def test_equals_torch(name, batch, given):
    ours, theirs = twins(name, dtype=torch.float64)
    arguments = inputs(name, batch=batch)[: 2 if given else 1]
    outputs, want = ours(*arguments), theirs(*arguments)
    assert type(outputs) is type(want)
    torch.testing.assert_close(outputs, want)
    cotangents = [torch.randn_like(t) for t in flat(want)]
    got, expected = (
        torch.autograd.grad(flat(o), [*flat(arguments), *m.parameters()], cotangents)
        for o, m in ((outputs, ours), (want, theirs))
    )
    torch.testing.assert_close(got, expected)


@each_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype):
    ours, theirs = twins(name, dtype=dtype)
    arguments = inputs(name, dtype)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype != torch.float32 else {}
    torch.testing.assert_close(ours(*arguments), theirs(*arguments), **tolerance)


@each_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    ours, _ = twins(name)
    arguments = inputs(name, torch.float32)
    with torch.autocast("cpu", dtype):
        low = ours(*arguments)
    assert {t.dtype for t in flat(low)} == {dtype}
    torch.testing.assert_close([t.float() for t in flat(low)], flat(ours(*arguments)), rtol=0.05, atol=0.05)


@each_cell
def test_derivatives(name):
    ours, _ = twins(name, dtype=torch.float64)
    leaves = flat(inputs(name))

    def function(x, *state):
        return tuple(flat(ours(x, state if name == "LSTMCell" else state[0])))

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@each_cell
def test_a_loop_of_cells_is_a_layer(name):
    cell, _ = twins(name)
    bias, mode = cell.bias, {"nonlinearity": cell.nonlinearity} if "RNN" in name else {}
    layer = getattr(seqkern, name.partition("Cell")[0])(I, H, bias=bias, **mode)
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x, state, hs = torch.randn(6, B, I), None, []
    for step in x:
        state = cell(step, state)
        hs.append(state[0] if name == "LSTMCell" else state)
    y, last = layer(x)
    torch.testing.assert_close(torch.stack(hs), y)
    torch.testing.assert_close(flat(state), [t[0] for t in flat(last)])


@each_cell
def test_one_call(name, monkeypatch):
    ours, _ = twins(name)
    calls = []
    for module, function in ((training.ops, "rnn_layer"), (training._C, "forward")):
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, original=original: calls.append(a) or original(*a))
    ours(*inputs(name, torch.float32))
    assert len(calls) == 1
    with torch.autograd.profiler.profile():
        ours(*inputs(name, torch.float32))
    assert len(calls) == 2


@each_cell
def test_weights_by_attribute(name):
    ours, theirs = twins(name)
    arguments = inputs(name, torch.float32)
    for cell in (ours, theirs):
        parametrizations.weight_norm(cell, "weight_hh")
        cell.weight_ih.data.mul_(2)
    torch.testing.assert_close(ours(*arguments), theirs(*arguments))
    torch.testing.assert_close(copy.deepcopy(ours)(*arguments), theirs(*arguments))
    plain, _ = twins(name)
    torch.testing.assert_close(pickle.loads(pickle.dumps(plain))(*arguments), plain(*arguments))


def zeros(*shape):
    return torch.zeros(shape)


def pair(state, lstm):
    return (state, state) if lstm else state


CALLS = {
    "0-D input": lambda m, lstm: m(zeros()),
    "3-D input": lambda m, lstm: m(zeros(1, B, I)),
    "input size": lambda m, lstm: m(zeros(B, I + 1)),
    "unbatched input size": lambda m, lstm: m(zeros(I + 1)),
    "hx 3-D": lambda m, lstm: m(zeros(B, I), pair(zeros(1, B, H), lstm)),
    "hx batch": lambda m, lstm: m(zeros(B, I), pair(zeros(B + 1, H), lstm)),
    "hx of batch 1": lambda m, lstm: m(zeros(B, I), pair(zeros(1, H), lstm)),
    "hx size": lambda m, lstm: m(zeros(B, I), pair(zeros(B, H + 1), lstm)),
    "hx size, unbatched": lambda m, lstm: m(zeros(I), pair(zeros(H + 1), lstm)),
    "hx 2-D, unbatched": lambda m, lstm: m(zeros(I), pair(zeros(B, H), lstm)),
    "hx 1-D, batched": lambda m, lstm: m(zeros(B, I), pair(zeros(H), lstm)),
    "one state": lambda m, lstm: m(zeros(B, I), (zeros(B, H),)),
    "hx dtype": lambda m, lstm: m(zeros(B, I), pair(zeros(B, H).double(), lstm)),
    "input dtype": lambda m, lstm: m(zeros(B, I).double(), pair(zeros(B, H).double(), lstm)),
    "integers": lambda m, lstm: m(zeros(B, I).long(), pair(zeros(B, H), lstm)),
    "a list": lambda m, lstm: m([zeros(I)]),
    "unknown nonlinearity": lambda m, lstm: (
        setattr(m, "nonlinearity", "elu"),
        m(zeros(B, I if hasattr(m, "mode") else 1)),
    ),
}


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("call", CALLS)
def test_errors_are_torchs(call, name):
    errors = []
    for cell in twins(name):
        with pytest.raises(Exception) as info:  # noqa: B017, PT011  the type is what the test is about
            CALLS[call](cell, name == "LSTMCell")
        errors.append(info.value)
    ours, theirs = errors
    assert type(ours) is type(theirs), f"torch: {theirs!r}\nseqkern: {ours!r}"
    assert str(ours)
