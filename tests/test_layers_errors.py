"""What torch.nn refuses, seqkern refuses with the same exception type; and says what came."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import seqkern

I, H, T, B = 3, 5, 4, 2  # noqa: E741


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def packed(features=I, dtype=torch.float32, sort=True):
    lengths = torch.tensor([T, 2] if sort else [2, T])
    return pack_padded_sequence(zeros(T, B, features, dtype=dtype), lengths, enforce_sorted=sort)


def double(*shape):
    return zeros(*shape, dtype=torch.float64)


def state(*shapes, lstm):
    """A state with the given shape for h, and for the LSTM's c the last of the shapes."""
    return (zeros(*shapes[0]), zeros(*shapes[-1])) if lstm else zeros(*shapes[0])


def parameter(layer, make):
    """A parameter of weight_hh's shape."""
    return nn.Parameter(make(*layer.weight_hh_l0.shape))


# name: call on a layer (I, H) with two layers, and whether it is an LSTM
LAYER_CALLS = {
    "1-D input": lambda m, lstm: m(zeros(I)),
    "4-D input": lambda m, lstm: m(zeros(T, B, I, 1)),
    "a list": lambda m, lstm: m([zeros(T, B, I)]),
    "no input": lambda m, lstm: m(),
    "input size": lambda m, lstm: m(zeros(T, B, I + 1)),
    "unbatched input size": lambda m, lstm: m(zeros(T, I + 1)),
    "dtype": lambda m, lstm: m(double(T, B, I)),
    "integers": lambda m, lstm: m(zeros(T, B, I).long()),
    "dtype and size": lambda m, lstm: m(double(T, B, I + 1)),
    "no steps": lambda m, lstm: m(zeros(0, B, I)),
    "no steps, unbatched": lambda m, lstm: m(zeros(0, I)),
    "hx 2-D for batched": lambda m, lstm: m(zeros(T, B, I), state((2, H), lstm=lstm)),
    "hx 3-D for unbatched": lambda m, lstm: m(zeros(T, I), state((2, 1, H), lstm=lstm)),
    "hx layers": lambda m, lstm: m(zeros(T, B, I), state((1, B, H), lstm=lstm)),
    "hx batch": lambda m, lstm: m(zeros(T, B, I), state((2, B + 1, H), lstm=lstm)),
    "hx size": lambda m, lstm: m(zeros(T, B, I), state((2, B, H + 1), lstm=lstm)),
    "last state's size": lambda m, lstm: m(
        zeros(T, B, I), state((2, B, H), (2, B, H + 1), lstm=lstm) if lstm else zeros(1)
    ),
    "hx unbatched size": lambda m, lstm: m(zeros(T, I), state((2, H + 1), lstm=lstm)),
    "hx dtype": lambda m, lstm: m(zeros(T, B, I), (double(2, B, H), double(2, B, H)) if lstm else double(2, B, H)),
    "hx of the other kind": lambda m, lstm: m(
        zeros(T, B, I), zeros(2, B, H) if lstm else (zeros(2, B, H), zeros(2, B, H))
    ),
    "one state": lambda m, lstm: m(zeros(T, B, I), (zeros(2, B, H),)),
    "three states": lambda m, lstm: m(zeros(T, B, I), (zeros(2, B, H),) * 3),
    "packed input size": lambda m, lstm: m(packed(I + 1)),
    "packed dtype": lambda m, lstm: m(packed(dtype=torch.float64)),
    "packed hx batch": lambda m, lstm: m(packed(), state((2, B + 1, H), lstm=lstm)),
    "packed hx size": lambda m, lstm: m(packed(), state((2, B, H + 1), lstm=lstm)),
    "packed hx 2-D": lambda m, lstm: m(packed(), state((2, H), lstm=lstm)),
    "unsorted hx batch": lambda m, lstm: m(packed(sort=False), state((2, 1, H), lstm=lstm)),
    "unsorted hx 1-D": lambda m, lstm: m(packed(sort=False), state((H,), lstm=lstm)),
    "packed with no steps": lambda m, lstm: m(PackedSequence(zeros(0, I), torch.zeros(0, dtype=torch.int64))),
    "a zero length": lambda m, lstm: m(pack_sequence([zeros(2, I), zeros(0, I)])),
    "a weight of another dtype": lambda m, lstm: (setattr(m, "weight_hh_l1", parameter(m, double)), m(zeros(T, B, I))),
    "setattr of a tensor": lambda m, lstm: setattr(m, "weight_hh_l0", zeros(2, 2)),
}


def raised(call, *arguments) -> BaseException:
    with pytest.raises(Exception) as info:  # noqa: B017, PT011  the type is what the test is about
        call(*arguments)
    return info.value


@pytest.mark.parametrize("cls", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("name", LAYER_CALLS)
def test_layers_raise_what_torch_raises(name, cls):
    theirs, ours = (raised(LAYER_CALLS[name], getattr(lib, cls)(I, H, 2), cls == "LSTM") for lib in (nn, seqkern))
    assert type(ours) is type(theirs), f"torch: {theirs!r}\nseqkern: {ours!r}"
    assert str(ours)


CONSTRUCTORS = {
    "dropout above 1": ((I, H), {"dropout": 1.5}),
    "dropout a bool": ((I, H), {"dropout": True}),
    "no hidden units": ((I, 0), {}),
    "no input": ((0, H), {}),
    "hidden size a float": ((I, 2.5), {}),
    "no layers": ((I, H, 0), {}),
    "bias a number": ((I, H), {"bias": 1}),
    "batch_first a string": ((I, H), {"batch_first": "yes"}),
    "projection as large as the state": ((I, H), {"proj_size": H}),
    "negative projection": ((I, H), {"proj_size": -1}),
    "unknown nonlinearity": ((I, H), {"nonlinearity": "sigmoid"}),
    "unknown option": ((I, H), {"layers": 2}),
    "nothing": ((), {}),
}


@pytest.mark.parametrize("cls", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors_raise_what_torch_raises(name, cls):
    arguments, options = CONSTRUCTORS[name]
    theirs, ours = (raised(partial(getattr(lib, cls), *arguments, **options)) for lib in (nn, seqkern))
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs)


@pytest.mark.parametrize(
    "call, wanted, came",
    [
        (lambda m: m(zeros(T, B, I + 1)), str(I), str(I + 1)),
        (lambda m: m(double(T, B, I)), "float32", "float64"),
        (lambda m: m(zeros(T, B, I), zeros(2, B, H + 1)), f"(2, {B}, {H})", f"[2, {B}, {H + 1}]"),
        (lambda m: m(zeros(T, B, I), double(2, B, H)), "float32", "float64"),
        (lambda m: m(zeros(T, I), zeros(2, 1, H)), "2-D", "3-D"),
    ],
)
def test_messages_name_what_was_wanted_and_what_came(call, wanted, came):
    message = str(raised(call, seqkern.GRU(I, H, 2)))
    assert wanted in message
    assert came in message


META = torch.device("meta")
DEVICE_CALLS = {
    "input": lambda cls: cls(I, H)(zeros(T, B, I).to(META)),
    "weights": lambda cls: cls(I, H, device=META)(zeros(T, B, I)),
    "state": lambda cls: cls(I, H)(zeros(T, B, I), zeros(1, B, H).to(META)),
}


@pytest.mark.parametrize("cls", ["GRU", "RNN"])
@pytest.mark.parametrize("name", DEVICE_CALLS)
def test_mixed_devices_raise_what_torch_raises(name, cls):
    theirs, ours = (raised(DEVICE_CALLS[name], getattr(lib, cls)) for lib in (nn, seqkern))
    assert type(ours) is type(theirs) is RuntimeError
    assert "meta" in str(ours)
    assert "cpu" in str(ours)


def test_meta_layers_give_shapes():
    layer = seqkern.LSTM(I, H, 2, bidirectional=True, device=META)
    y, (h_n, c_n) = layer(zeros(T, B, I).to(META))
    assert (y.device, y.shape) == (META, (T, B, 2 * H))
    assert h_n.shape == c_n.shape == (4, B, H)


@pytest.mark.parametrize("cls", ["LSTM", "GRU", "RNN"])
def test_a_replaced_weight_that_does_not_fit_is_refused(cls):
    """torch's oneDNN path takes it, and reads beyond its end."""
    layer = getattr(seqkern, cls)(I, H, 2)
    layer.weight_hh_l0 = nn.Parameter(zeros(2, 2))
    with pytest.raises(RuntimeError, match=r"weight_hh must be .*\[2, 2\]"):
        layer(zeros(T, B, I))


def test_a_deleted_weight_is_missed():
    layer = seqkern.GRU(I, H)
    del layer.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        layer(zeros(T, B, I))
