"""Weights and state of the layers: whatever replaces a weight counts at once, and nothing stale or non-leaf is kept."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as hooked_weight_norm

import seqkern

LAYERS = ("RNN", "LSTM", "GRU")
OPTIONS = {"num_layers": 2, "bidirectional": True}
PAIRS = [(cls, OPTIONS) for cls in LAYERS] + [("LSTM", OPTIONS | {"proj_size": 2, "bias": False})]
EACH = pytest.mark.parametrize("cls, options", PAIRS, ids=["RNN", "LSTM", "GRU", "LSTM-proj"])


def make(library, cls, options, **more):
    torch.manual_seed(11)
    return getattr(library, cls)(3, 4, **options, **more)


@pytest.fixture
def x():
    return torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))


def same(ours, theirs, x):
    torch.testing.assert_close(ours(x), theirs(x))


@EACH
def test_initial_weights_are_torchs_bit_for_bit(cls, options):
    ours, theirs = make(seqkern, cls, options), make(nn, cls, options)
    assert isinstance(ours, getattr(nn, cls))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
    assert repr(ours) == repr(theirs)
    assert all(p is q for p, q in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert [p.shape for row in ours.all_weights for p in row] == [p.shape for row in theirs.all_weights for p in row]
    torch.manual_seed(5)
    ours.reset_parameters()
    torch.manual_seed(5)
    theirs.reset_parameters()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_positional_arguments_and_defaults():
    assert seqkern.LSTM(3, 4, 2, False, True, 0.5, True, 2).proj_size == 2
    assert seqkern.RNN(3, 4, 2, "relu", False).mode == "RNN_RELU"
    half = seqkern.GRU(3, 4, device="cpu", dtype=torch.bfloat16)
    assert half.weight_ih_l0.dtype == torch.bfloat16


@EACH
def test_state_dict_goes_both_ways(cls, options, x):
    ours, theirs = getattr(seqkern, cls)(3, 4, **options), getattr(nn, cls)(3, 4, **options)
    ours.load_state_dict(theirs.state_dict())
    same(ours, theirs, x)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    same(ours, theirs, x)


def replace_by_setattr(layer):
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)


def replace_data(layer):
    layer.weight_hh_l0.data = layer.weight_hh_l0.data * 2


def write_through_data(layer):
    layer.weight_hh_l0.data.mul_(2)


def copy_into(layer):
    with torch.no_grad():
        layer.weight_hh_l0.copy_(layer.weight_hh_l0 * 2)


def optimizer_step(layer):
    layer.weight_hh_l0.grad = layer.weight_hh_l0.detach().neg()
    torch.optim.SGD([layer.weight_hh_l0], lr=1.0).step()


def replace_in_parameters(layer):
    layer._parameters["weight_hh_l0"] = nn.Parameter(layer.weight_hh_l0.detach() * 2)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "change",
    [replace_by_setattr, replace_data, write_through_data, copy_into, optimizer_step, replace_in_parameters],
)
def test_changed_weights_count_at_once(change, grad, cls, x):
    ours, fresh = make(seqkern, cls, {}), make(nn, cls, {})
    with torch.set_grad_enabled(grad):
        before = ours(x)[0]
        change(ours)
        fresh.load_state_dict(ours.state_dict())
        after = ours(x)[0]
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, fresh(x)[0])
        assert ours._flat_weights[1] is ours.weight_hh_l0 is ours.all_weights[0][1]


def test_an_assigned_list_of_weights_counts(x):
    layer, other = make(seqkern, "GRU", OPTIONS), seqkern.GRU(3, 4, **OPTIONS)
    layer._flat_weights = list(other.parameters())
    assert layer.weight_hh_l1 is other.weight_hh_l1
    same(layer, other, x)
    with pytest.raises(TypeError, match="cannot assign"):
        layer._flat_weights = [p * 2 for p in other.parameters()]


def test_replaced_weights_are_let_go():
    layer = seqkern.LSTM(3, 4)
    old = weakref.ref(layer.weight_hh_l0)
    replace_by_setattr(layer)
    assert old() is None


def test_to_another_dtype_and_back(x):
    ours, theirs = make(seqkern, "GRU", OPTIONS), make(nn, "GRU", OPTIONS)
    assert ours.double() is ours
    same(ours, theirs.double(), x.double())
    same(ours.to(torch.float32), theirs.to(torch.float32), x)
    assert ours.flatten_parameters() is None
    assert seqkern.GRU(3, 4, device="meta").to_empty(device="cpu").weight_ih_l0.device.type == "cpu"


@EACH
def test_functional_call(cls, options, x):
    ours, theirs = make(seqkern, cls, options), make(nn, cls, options)
    doubled = {name: (p.detach() * 2).requires_grad_() for name, p in ours.named_parameters()}
    want = functional_call(theirs, doubled, (x,))
    got = functional_call(ours, doubled, (x,))
    torch.testing.assert_close(got, want)
    g = torch.autograd.grad(got[0].sum(), list(doubled.values()))
    torch.testing.assert_close(g, torch.autograd.grad(want[0].sum(), list(doubled.values())))
    same(ours, theirs, x)  # and the layer's own weights are back


NORMS = {
    "parametrization": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0").eval(),
    "hook": lambda m: hooked_weight_norm(m, "weight_hh_l0"),
    "pruning": lambda m: (prune.l1_unstructured(m, "weight_hh_l0", 0.4), m)[1],
}


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_normalised_and_pruned_weights(norm, cls, x):
    torch.manual_seed(2)
    theirs = NORMS[norm](make(nn, cls, {}))
    torch.manual_seed(2)
    ours = NORMS[norm](make(seqkern, cls, {}))
    for _ in range(3):
        y, want = ours(x)[0], theirs(x)[0]
        torch.testing.assert_close(y, want)
        for layer, out in ((ours, y), (theirs, want)):
            layer.zero_grad()
            out.pow(2).sum().backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")
            with torch.no_grad():
                p -= 0.1 * p.grad
                q -= 0.1 * q.grad
    twin = copy.deepcopy(ours)
    torch.testing.assert_close(twin(x)[0], ours(x)[0])
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    same(ours, theirs, x)  # the copy shares nothing


def test_parametrization_is_removed(x):
    layer = make(seqkern, "LSTM", {})
    before = layer(x)[0]
    parametrizations.weight_norm(layer, "weight_hh_l0")
    assert parametrize.is_parametrized(layer)
    torch.testing.assert_close(layer(x)[0], before)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is seqkern.LSTM
    torch.testing.assert_close(layer(x)[0], before)
    assert all(isinstance(w, nn.Parameter) for w in layer._flat_weights)


def test_a_weight_computed_by_the_caller_before_each_call(x):
    """Weight-drop wrappers replace the Parameter by a computed tensor and set it again before every forward."""
    layer, theirs = make(seqkern, "LSTM", {}), make(nn, "LSTM", {})
    raw = nn.Parameter(layer.weight_hh_l0.detach().clone())
    results = []
    for m in (layer, theirs):
        del m.weight_hh_l0
        m.weight_hh_l0 = raw * 0.5
        results.append(m(x)[0])
    torch.testing.assert_close(*results)
    grads = [torch.autograd.grad(y.sum(), raw)[0] for y in results]
    torch.testing.assert_close(*grads)
    assert copy.deepcopy(layer)(x)[0].shape == results[0].shape


@EACH
def test_copies_and_pickles(cls, options, x):
    layer = make(seqkern, cls, options)
    want = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert type(twin) is type(layer)
        torch.testing.assert_close(twin(x), want, rtol=0, atol=0)
        assert all(p is not q for p, q in zip(twin.parameters(), layer.parameters(), strict=True))
        assert all(p is q for p, q in zip(twin._flat_weights, twin.parameters(), strict=True))
        pickle.dumps(twin)


@EACH
def test_pickles_of_torch_layers_load(cls, options, x):
    theirs = make(nn, cls, options)
    data = pickle.dumps(theirs)
    with seqkern.patched():
        layer = pickle.loads(data)
    assert type(layer) is getattr(seqkern, cls)
    same(layer, theirs, x)
    same(seqkern.accelerate(pickle.loads(data)), theirs, x)


def test_a_pickle_from_before_weight_names(x):
    """Old files hold `all_weights` for `_all_weights`, no `proj_size` and no `_flat_weights`."""
    layer = make(seqkern, "LSTM", {})
    state = layer.__getstate__()
    state["all_weights"] = state.pop("_all_weights")
    del state["proj_size"]
    old = seqkern.LSTM.__new__(seqkern.LSTM)
    old.__setstate__(state)
    torch.testing.assert_close(old(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripting_gives_torchs_layer(x):
    layer, cell = make(seqkern, "GRU", OPTIONS), seqkern.LSTMCell(3, 4)
    torch.testing.assert_close(torch.jit.script(nn.Sequential(layer))(x), layer(x))
    torch.testing.assert_close(torch.jit.script(cell)(x[0]), cell(x[0]))


def test_data_parallel_replicas_see_their_own_weights(x):
    layer = make(seqkern, "GRU", {})
    replica = layer._replicate_for_data_parallel()
    for name, p in layer.named_parameters():
        setattr(replica, name, p.detach() * 2)
    fresh = nn.GRU(3, 4)
    fresh.load_state_dict({name: p * 2 for name, p in layer.state_dict().items()})
    torch.testing.assert_close(replica(x), fresh(x))
