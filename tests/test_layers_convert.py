"""accelerate() and patched()."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import seqkern

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
X = torch.linspace(-1, 1, 30).view(5, 2, 3)


class Tagger(nn.Module):
    """Every kind of layer, one of them shared."""

    def __init__(self):
        super().__init__()
        self.shared = nn.GRU(3, 3)
        self.again = self.shared
        self.stack = nn.ModuleList([nn.LSTM(3, 3, 2, dropout=0.5), nn.Sequential(nn.RNN(3, 3, nonlinearity="relu"))])
        self.cells = nn.ModuleDict({name: getattr(nn, name)(3, 3) for name in CELLS})
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = self.again(self.shared(x)[0])[0]
        x = self.stack[1](self.stack[0](x)[0])[0]
        h, c = self.cells["LSTMCell"](x[-1])
        h = self.cells["GRUCell"](h, self.cells["RNNCell"](c))
        return self.head(h)


class Plain(nn.LSTM):
    def __init__(self, size: int):
        super().__init__(size, 4, batch_first=True)

    def last(self, x):
        return self(x)[1][0]


class Own(nn.LSTM):
    def forward(self, x, hx=None):
        return super().forward(x * 2, hx)


class OwnCheck(nn.GRU):
    def check_forward_args(self, *arguments):
        raise RuntimeError("mine")


def test_swaps_everything_in_place():
    model = Tagger().eval()
    want, parameters, modules = model(X), dict(model.named_parameters()), dict(model.named_modules())
    keys = list(model.state_dict())
    assert seqkern.accelerate(model) is model
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(m is modules[name] for name, m in model.named_modules())
    assert model.shared is model.again
    recurrent = [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]
    assert len(recurrent) == 6
    assert all(type(m).__module__ == "seqkern.modules" and not m.training for m in recurrent)
    torch.testing.assert_close(model(X), want)
    classes = [type(m) for m in model.modules()]
    seqkern.accelerate(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_the_model_may_be_the_layer(name):
    layer = getattr(nn, name)(3, 4)
    held = {"reference": layer}
    x = X if name in LAYERS else X[0]
    want = layer(x)
    assert type(seqkern.accelerate(layer)) is getattr(seqkern, name)
    assert held["reference"] is layer
    torch.testing.assert_close(layer(x), want)
    twin = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(twin(x), want)
    assert "_flat_weights" not in vars(layer)


def test_hooks_buffers_and_optimizers_stay():
    layer = nn.LSTM(3, 4)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_buffer("steps", torch.tensor(3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    seqkern.accelerate(layer)
    before = layer.weight_hh_l0.detach().clone()
    layer(X)[0].sum().backward()
    optimizer.step()
    assert calls == ["forward", "backward"]
    assert "steps" in layer.state_dict()
    assert not torch.equal(layer.weight_hh_l0, before)


@pytest.mark.parametrize("cls", ["LSTM", "GRU", "GRUCell"])
def test_parametrized_layers(cls):
    cell = cls.endswith("Cell")
    x, name = (X[0], "weight_hh") if cell else (X, "weight_hh_l0")
    layer = parametrizations.weight_norm(getattr(nn, cls)(3, 4), name)
    theirs, want = copy.deepcopy(layer), layer(x)
    seqkern.accelerate(layer)
    assert isinstance(layer, getattr(seqkern, cls))
    assert parametrize.is_parametrized(layer, name)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(copy.deepcopy(layer)(x), want)
    assert type(seqkern.accelerate(layer)) is type(layer)
    parametrize.remove_parametrizations(layer, name)
    assert type(layer) is getattr(seqkern, cls)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(theirs(x), want)  # the copy made before is torch's as before
    assert not isinstance(theirs, getattr(seqkern, cls))


def test_pruned_layers():
    layer = nn.GRU(3, 4)
    prune.random_unstructured(layer, "weight_ih_l0", 0.5)
    want = layer(X)
    torch.testing.assert_close(seqkern.accelerate(layer)(X), want)
    prune.remove(layer, "weight_ih_l0")
    torch.testing.assert_close(layer(X), want)


def test_subclasses():
    plain, own, check = Plain(3), Own(3, 4), OwnCheck(3, 4)
    want, want_last, want_own = plain(X), plain.last(X), own(X)
    for layer in (plain, own, check):
        seqkern.accelerate(layer)
    assert isinstance(plain, Plain)
    assert isinstance(plain, seqkern.LSTM)
    assert type(plain).__name__ == "Plain"
    torch.testing.assert_close(plain(X), want)
    torch.testing.assert_close(plain.last(X), want_last)
    twin = pickle.loads(pickle.dumps(plain))
    assert type(twin) is type(plain)
    torch.testing.assert_close(twin(X), want)
    torch.testing.assert_close(copy.deepcopy(plain)(X), want)
    assert type(own) is Own  # a forward of its own
    torch.testing.assert_close(own(X), want_own)
    assert type(check) is OwnCheck  # torch's forward would have called it
    wrapped = nn.LSTM(3, 4)
    wrapped.forward = lambda x: "mine"
    assert seqkern.accelerate(wrapped)(X) == "mine"


def test_accelerate_wants_a_module():
    with pytest.raises(TypeError, match=r"torch.nn.Module, got dict"):
        seqkern.accelerate({})


def names():
    return [getattr(place, name) for place in (nn, nn.modules, nn.modules.rnn) for name in LAYERS + CELLS]


def test_patched():
    before = names()
    with seqkern.patched():
        assert names() == [getattr(seqkern, name) for name in LAYERS + CELLS] * 3
        model = Tagger()
        with seqkern.patched():
            assert nn.LSTM is seqkern.LSTM
        assert nn.LSTM is seqkern.LSTM
    assert names() == before
    assert sum(type(m).__module__ == "seqkern.modules" for m in model.modules()) == 6
    with pytest.raises(KeyError), seqkern.patched():
        raise KeyError("inside")
    assert names() == before


def test_patched_blocks_of_two_threads_may_overlap():
    before, entered, leave = names(), threading.Event(), threading.Event()

    def other():
        with seqkern.patched():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with seqkern.patched():
        thread.start()
        assert entered.wait(10)
    assert nn.GRU is seqkern.GRU
    leave.set()
    thread.join()
    assert names() == before
