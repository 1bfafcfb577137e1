"""The layers against torch.nn's: outputs and all gradients on a pairwise set of configurations, dropout, packing."""

import itertools

import pytest
import torch
from oracle import distance, fault
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkern

FACTORS = {
    "cell": ("LSTM", "GRU", "RNN", "RNN_RELU"),
    "dtype": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "num_layers": (1, 2, 3),
    "kind": ("batched", "unbatched", "packed", "unsorted", "strided"),
    "bidirectional": (False, True),
    "bias": (True, False),
    "batch_first": (False, True),
    "hx": (False, True),
    "proj_size": (0, 3),
}
LENGTHS = (2, 5, 1, 4)
INPUT, HIDDEN = 6, 7


def pairwise(factors: dict[str, tuple]) -> list[dict]:
    """Rows in which every two values of different factors meet, chosen greedily from the full cross."""
    pairs = [((a, i), (b, j)) for a, b in itertools.combinations(factors, 2) for i in factors[a] for j in factors[b]]
    missing, rows = dict.fromkeys(pairs), []
    while missing:
        (a, i), (b, j) = next(iter(missing))
        row = {a: i, b: j}
        for name in factors:
            if name not in row:
                row[name] = max(
                    factors[name], key=lambda v: sum(_pair(factors, (name, v), p) in missing for p in row.items())
                )
        rows.append(row)
        for p in itertools.combinations(row.items(), 2):
            missing.pop(_pair(factors, *p), None)
    return rows


def _pair(factors, p, q):
    return (p, q) if list(factors).index(p[0]) < list(factors).index(q[0]) else (q, p)


def _name(row: dict) -> str:
    return "-".join(f"{v}".removeprefix("torch.") for v in row.values())


def build(row: dict, library) -> nn.Module:
    """The layer of `row` from torch.nn or from seqkern, with the same weights."""
    cls, options = row["cell"], {k: row[k] for k in ("num_layers", "bidirectional", "bias", "batch_first", "dtype")}
    if cls == "RNN_RELU":
        cls, options["nonlinearity"] = "RNN", "relu"
    if cls == "LSTM":
        options["proj_size"] = row["proj_size"]
    torch.manual_seed(7)
    return getattr(library, cls)(INPUT, HIDDEN, **options)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(row: dict, layer: nn.Module):
    """Input, state and the leaves among them, in the layer's dtype."""
    dtype, kind = layer.weight_hh_l0.dtype, row["kind"]
    shape = [max(LENGTHS), len(LENGTHS), INPUT]
    if row["batch_first"]:
        shape[0], shape[1] = shape[1], shape[0]
    shape = [max(LENGTHS), INPUT] if kind == "unbatched" else shape
    leaf = draw(*shape, seed=1).to(row["dtype"]).to(dtype).requires_grad_()
    x = leaf
    if kind in ("packed", "unsorted"):
        lengths = torch.tensor(LENGTHS if kind == "unsorted" else sorted(LENGTHS, reverse=True))
        x = pack_padded_sequence(leaf, lengths, row["batch_first"], enforce_sorted=kind == "packed")
    if kind == "strided":
        x = torch.stack([leaf, leaf.detach()], -1)[..., 0]
    states = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if kind == "unbatched" else (len(LENGTHS),)
    sizes = (layer.proj_size or HIDDEN, HIDDEN)[: 2 if row["cell"] == "LSTM" else 1]
    state = [
        draw(states, *batch, n, seed=2 + i).to(row["dtype"]).to(dtype).requires_grad_() for i, n in enumerate(sizes)
    ]
    if not row["hx"]:
        return x, None, {"x": leaf}
    return (
        x,
        tuple(state) if row["cell"] == "LSTM" else state[0],
        {"x": leaf, **{f"hx{i}": s for i, s in enumerate(state)}},
    )


def evaluate(row: dict, layer: nn.Module) -> dict[str, torch.Tensor]:
    """Outputs and the gradients of everything under random cotangents of all outputs, by name."""
    x, hx, leaves = arguments(row, layer)
    y, last = layer(x, hx)
    if isinstance(x, PackedSequence):
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            assert getattr(y, name) is getattr(x, name)
        y = y.data
    outputs = dict(zip(("y", "h_n", "c_n"), (y, *last) if isinstance(last, tuple) else (y, last), strict=False))
    cotangents = [draw(*o.shape, seed=10 + i).to(row["dtype"]).to(o.dtype) for i, o in enumerate(outputs.values())]
    leaves |= dict(layer.named_parameters())
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return {k: v.detach() for k, v in outputs.items()} | {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}


def differences(row: dict) -> list[str]:
    """One line for each tensor further from torch.nn in float64 than the oracle's bound allows."""
    theirs, ours = build(row, nn), build(row, seqkern)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q)
    found, native = evaluate(row, ours), evaluate(row, theirs)
    want = evaluate(row, theirs.double())
    assert found.keys() == want.keys()
    shrink = 1.0
    if row["dtype"] == torch.float64:  # torch's own rounding, which says nothing in float64, from float32's
        single = row | {"dtype": torch.float32}
        native, shrink = (
            evaluate(single, build(single, nn)),
            torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps,
        )
        want32 = evaluate(single, build(single, nn).double())
        figures = {k: distance(native[k], want32[k]) * shrink for k in want}
    else:
        figures = {k: distance(native[k], want[k]) for k in want}
    wrong = [(k, fault(found[k], want[k], figures[k])) for k in want]
    assert all(found[k].dtype == row["dtype"] for k in found)
    return [f"{k} {line}" for k, line in wrong if line]


@pytest.mark.parametrize("row", [pytest.param(row, id=_name(row)) for row in pairwise(FACTORS)])
def test_equals_torch(row):
    assert not differences(row)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["batched", "unbatched", "unsorted"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_dropout_draws_torchs_masks(cell, kind, dtype):
    row = {"cell": cell, "dtype": dtype, "num_layers": 3, "kind": kind, "bidirectional": True, "bias": True}
    row |= {"batch_first": kind == "batched", "hx": False, "proj_size": 0}
    results = []
    for library in (nn, seqkern):
        layer = build(row, library)
        layer.dropout = 0.4
        torch.manual_seed(3)
        results.append(evaluate(row, layer))
        layer.eval()
        results.append(evaluate(row, layer))
    torch_train, torch_eval, train, evaluation = results
    assert not torch.equal(train["y"], evaluation["y"])
    torch.testing.assert_close(train, torch_train)
    torch.testing.assert_close(evaluation, torch_eval)  # gradients too: backward works in eval mode


def test_dropout_of_one_and_a_single_layer():
    x = torch.randn(4, 2, 3)
    layer = seqkern.GRU(3, 5, 2, dropout=1.0)
    lower = seqkern.GRU(3, 5)
    lower.load_state_dict({k: v for k, v in layer.state_dict().items() if k.endswith("l0")})
    upper = seqkern.GRU(5, 5)
    upper.load_state_dict({k.replace("l1", "l0"): v for k, v in layer.state_dict().items() if k.endswith("l1")})
    torch.testing.assert_close(layer(x)[0], upper(torch.zeros(4, 2, 5))[0])
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        one = seqkern.GRU(3, 5, dropout=0.5)
    one.load_state_dict(lower.state_dict())
    assert torch.equal(one(x)[0], lower(x)[0])


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_zero_batch(cell):
    row = {"cell": cell, "dtype": torch.float32, "num_layers": 2, "bidirectional": True, "bias": True}
    ours, theirs = (build(row | {"batch_first": False, "proj_size": 0}, library) for library in (seqkern, nn))
    x = torch.zeros(4, 0, INPUT)
    y, last = ours(x)
    want, want_last = theirs(x)
    assert y.shape == want.shape
    assert [s.shape for s in last] == [s.shape for s in want_last]
    y.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ours.parameters())
