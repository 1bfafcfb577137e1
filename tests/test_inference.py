"""A layer's call in inference: the short way gives what the usual one does, and steps aside for it."""

import copy
import itertools
import sys

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import seqkern
from seqkern import inference

I, H = 5, 19  # noqa: E741
SETTINGS = {
    "plain": {},
    "no_bias": {"bias": False},
    "stack": {"num_layers": 3},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "batch_first": {"batch_first": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}
KINDS = ("RNN", "relu", "LSTM", "GRU", "proj")


def make(kind: str, **settings) -> nn.RNNBase:
    torch.manual_seed(1)
    if kind == "relu":
        return seqkern.RNN(I, H, nonlinearity="relu", **settings)
    if kind == "proj":
        return seqkern.LSTM(I, H, proj_size=7, **settings)
    return getattr(seqkern, kind)(I, H, **settings)


def state(m: nn.RNNBase, *batch: int):
    first = m.num_layers * (2 if m.bidirectional else 1)
    dtype = m.weight_ih_l0.dtype
    h = torch.randn(first, *batch, m.proj_size or m.hidden_size, dtype=dtype)
    return (h, torch.randn(first, *batch, m.hidden_size, dtype=dtype)) if m.mode == "LSTM" else h


def flat(results) -> list[torch.Tensor]:
    y, last = results
    return [y, *(last if isinstance(last, tuple) else (last,))]


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Whether each call since took the short way."""
    found, call = [], inference.call
    monkeypatch.setattr(inference, "call", lambda *a: (found.append((r := call(*a)) is not None), r)[1])
    return found


def usual(monkeypatch, m, *arguments):
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(inference, "call", lambda *_: None)
        return flat(m(*arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_gives_the_same(kind, settings, dtype, taken, monkeypatch):
    m = make(kind, **SETTINGS[settings]).to(dtype)
    for steps, batch, given in itertools.product((1, 2, 14), (1, 3, None), (True, False)):
        shape = (steps, I) if batch is None else (batch, steps, I) if m.batch_first else (steps, batch, I)
        x = torch.randn(shape, dtype=dtype)
        hx = state(m, *([] if batch is None else [batch])) if given else None
        kept = copy.deepcopy((x, hx))
        with torch.inference_mode():
            got = flat(m(x, hx))
        assert taken.pop()
        want = usual(monkeypatch, m, x, hx)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
            assert a.stride() == b.stride() or min(steps, batch or 1) == 1
        assert len({t.data_ptr() for t in got}) == len(got)
        assert torch.equal(x, kept[0]) and (hx is None or all(map(torch.equal, flat((x, hx)), flat(kept))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell", "relu"])
def test_cells_give_the_same(kind, bias, dtype, monkeypatch):
    name, options = ("RNNCell", {"nonlinearity": "relu"}) if kind == "relu" else (kind, {})
    m = getattr(seqkern, name)(I, H, bias=bias, **options).to(dtype)
    step, taken = inference.step, []
    monkeypatch.setattr(inference, "step", lambda *a: (taken.append((r := step(*a)) is not None), r)[1])

    def run(x, hx) -> tuple[torch.Tensor, ...]:
        result = m(x, hx)
        return result if kind == "LSTMCell" else (result,)

    for batch, given in itertools.product(([], [1], [2], [9]), (True, False)):
        x, h, c = (torch.randn(*batch, n, dtype=dtype) for n in (I, H, H))
        hx = None if not given else (h, c) if kind == "LSTMCell" else h
        with torch.no_grad():
            got = run(x, hx)
            assert taken.pop()
            with monkeypatch.context() as patch:
                patch.setattr(inference, "step", lambda *_: None)
                want = run(x, hx)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and torch.equal(a, b)
        assert len({t.data_ptr() for t in got}) == len(got)
        run(x.requires_grad_(), hx)[0].sum().backward()
        assert not taken.pop() and x.grad is not None
    with torch.no_grad():
        x, h = torch.randn(3, I, dtype=dtype), torch.randn(3, H + 1, dtype=dtype)
        for wrong in (h, h[:2, :H], h[None, :, :H], h[0, :H]):
            with pytest.raises((RuntimeError, ValueError), match="hidden state h"):
                m(x, (wrong, wrong) if kind == "LSTMCell" else wrong)


@torch.no_grad()
def test_weights_are_read_anew(taken, monkeypatch):
    m, x = make("LSTM"), torch.randn(1, 2, I)
    hx = state(m, 2)
    changes = (
        lambda: m.weight_hh_l0.mul_(2),
        lambda: setattr(m.weight_ih_l0, "data", torch.randn(4 * H, I)),
        lambda: setattr(m, "bias_hh_l0", nn.Parameter(torch.randn(4 * H))),
        lambda: m.load_state_dict(seqkern.LSTM(I, H).state_dict()),
        lambda: m.weight_hh_l0.copy_(torch.randn(4 * H, H)),
    )
    before = flat(m(x, hx))
    for change in changes:
        change()
        got = flat(m(x, hx))
        assert taken[-1] and not torch.equal(got[0], before[0])
        assert all(map(torch.equal, got, usual(monkeypatch, m, x, hx)))
        before = got


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_plain_goes_the_usual_way(kind, taken, monkeypatch):
    m, x = make(kind, num_layers=2), torch.randn(1, 3, I)
    cases = {
        "strided input": (m, torch.randn(1, I, 3).transpose(1, 2), None),
        "strided state": (m, x, state(m, 6)[:, ::2] if m.mode != "LSTM" else tuple(s[:, ::2] for s in state(m, 6))),
        "dropout": (make(kind, num_layers=2, dropout=0.5), x, None),
        "option": (make(kind, num_layers=2, zoneout=0.1), x, None),
        "subclass": (m, torch.Tensor._make_subclass(_Sub, x), None),
    }
    for name, (layer, given, hx) in cases.items():
        torch.manual_seed(2)
        got = flat(layer(given, hx))
        assert not (taken and taken.pop()), name
        torch.manual_seed(2)
        assert all(map(torch.equal, got, usual(monkeypatch, layer, given, hx))), name
    strided = make(kind)
    strided.weight_hh_l0 = nn.Parameter(strided.weight_hh_l0.t().contiguous().t())
    assert all(map(torch.equal, flat(strided(x)), usual(monkeypatch, strided, x))) and not taken.pop()
    normed = nn.utils.parametrizations.weight_norm(make(kind), "weight_hh_l0")
    assert all(map(torch.equal, flat(normed(x)), usual(monkeypatch, normed, x))) and not taken.pop()


class _Sub(torch.Tensor):
    pass


def test_gradients_are_not_lost(taken):
    m, x = make("GRU"), torch.randn(1, 2, I, requires_grad=True)
    m(x)[0].sum().backward()
    assert taken == [False] and x.grad is not None and m.weight_ih_l0.grad is not None


@torch.no_grad()
def test_whoever_watches_operators_sees_one(taken):
    m, x, seen = make("LSTM"), torch.randn(1, 2, I), []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Dispatch():
        m(x)
    assert any("rnn_layer" in name for name in seen)
    with Function():
        m(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert m(x)[0].dtype == torch.bfloat16
    with torch.profiler.profile() as profile:
        m(x)
    assert any("rnn_layer" in event.key for event in profile.key_averages())
    torch.func.vmap(lambda row: m(row)[0])(torch.randn(3, 1, 2, I))
    assert taken and not any(taken)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_torchs(kind):
    m = make(kind)
    theirs = {"relu": lambda: nn.RNN(I, H, nonlinearity="relu"), "proj": lambda: nn.LSTM(I, H, proj_size=7)}
    peer = theirs.get(kind, lambda: getattr(nn, kind)(I, H))()
    wrong = [
        (torch.randn(1, 2, I + 1), None),
        (torch.randn(1, 2, I), state(m, 3)),
        (torch.randn(1, I), state(m, 1)),
        (torch.randn(1, 2, I).double(), None),
        (torch.randn(1, 1, 2, I), None),
    ]
    for x, hx in wrong:
        with pytest.raises(Exception) as expected:
            peer(x, hx)
        with pytest.raises(type(expected.value)):
            m(x, hx)


def test_in_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    m, xs = make("LSTM", num_layers=2), torch.randn(64, 1, 2, I)

    def one(x):
        with torch.inference_mode():
            return m(x)[0]

    want = [one(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(one, xs), want))


def test_the_extension_checks_its_arguments():
    with pytest.raises(TypeError, match="infer takes 13 arguments, got 3"):
        inference._C.infer(1, 2, 3)
    with pytest.raises(TypeError):
        inference._C.infer(*["x"] * 13)
    assert inference._C.infer(*[None] * 4, *[1] * 9) is None
    assert inference._C.infer(torch.zeros(1, 1, 1), None, {}, ["w"] * 4, *[1] * 9) is None
    with pytest.raises(TypeError, match="takes 3 arguments"):
        inference._C.bind_tensors()
    with pytest.raises(AttributeError, match="__dlpack_c_exchange_api__"):
        inference._C.bind_tensors(int, nn.Parameter, torch.empty_like)


@torch.no_grad()
def test_unusual_tensors(taken, monkeypatch):
    m, one, x = make("LSTM"), seqkern.LSTM(1, H), torch.randn(1, 3, I)
    part = torch.randn(1, 1, 1, dtype=torch.complex64).conj().imag
    assert part.is_neg() and part.is_contiguous()
    for layer, unusual in ((one, part), (m, torch._efficientzerotensor((1, 3, I))), (m, x[:, :1].expand(1, 3, I))):
        got = flat(layer(unusual))
        assert taken == [False] and all(map(torch.equal, got, usual(monkeypatch, layer, unusual.resolve_neg())))
        taken.clear()
    for refused in (
        x.to_sparse(),
        x.to("meta"),
        x.int(),
        x.double(),
        x.to(torch.complex64),
        x[0, 0],
        x[None],
        x[..., :2],
    ):
        assert inference.call(m, refused, None) is None
    h, c = state(m, 3)
    for refused in (h, (h,), [h, c], (h, c, c), (h, c.double()), (h, c[0]), (c[..., :2], h), (h, None)):
        assert inference.call(m, x, refused) is None
    assert not m(nn.Parameter(x), (nn.Parameter(h), c.requires_grad_()))[0].requires_grad
    m.weight_hh_l0.data = m.weight_hh_l0.data.double()
    assert inference.call(m, x, (h, c)) is None


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS)
def test_holds_on_to_nothing(settings, taken):
    m = make("LSTM", **SETTINGS[settings])
    x, hx = torch.randn(2, 3, I), state(m, 2 if m.batch_first else 3)
    watched = [
        x,
        *hx,
        hx,
        *m.parameters(),
        m._parameters,
        m._flat_weights_names,
        torch.Tensor,
    ]  # each tensor holds its class
    m(x, hx)
    before = [sys.getrefcount(o) for o in watched]
    for _ in range(3):
        m(x, hx)
        m(x)
        inference.call(m, x, (hx[0], None))
    assert taken == [True] + 3 * [True, True, False] and [sys.getrefcount(o) for o in watched] == before
