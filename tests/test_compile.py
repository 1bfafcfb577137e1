"""torch.compile and torch.export on the layers: one operator node per layer, dynamic time and batch, no graph break."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import seqkern

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
STACK = {"num_layers": 2, "bidirectional": True}


class Recorder:
    """A backend that keeps the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph

    def operators(self) -> int:
        return count(self.graphs[-1])


def count(graph: torch.fx.GraphModule) -> int:
    targets = (torch.ops.seqkern.rnn_layer, torch.ops.seqkern.rnn_layer.default)
    return sum(node.target in targets for node in graph.graph.nodes)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def flat(values) -> list[torch.Tensor]:
    return [values] if isinstance(values, torch.Tensor) else [t for v in values for t in flat(v)]


def hx_for(cls, *shape):
    h = torch.randn(shape)
    return (h, h.sin()) if cls.startswith("LSTM") else h


CONFIGURATIONS = {
    "plain": ({}, (5, 3, 4), None),
    "stack": (STACK, (5, 3, 4), None),
    "hx": (STACK | {"batch_first": True}, (3, 5, 4), (4, 3, 6)),
    "unbatched": (STACK, (5, 4), None),
    "unbatched_hx": ({"batch_first": True}, (5, 4), (1, 6)),
    "dropout": (STACK | {"dropout": 0.5}, (5, 3, 4), None),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_one_node_a_layer(name, cls, training):
    options, shape, state = CONFIGURATIONS[name]
    layer, recorder = getattr(seqkern, cls)(4, 6, **options).train(training), Recorder()
    arguments = (torch.randn(shape), *([hx_for(cls, *state)] if state else []))
    compiled = torch.compile(layer, fullgraph=True, backend=recorder)
    with torch.set_grad_enabled(training):
        torch.manual_seed(0)
        got = compiled(*arguments)
        torch.manual_seed(0)
        want = layer(*arguments)
    torch.testing.assert_close(got, want)
    assert len(recorder.graphs) == 1
    assert recorder.operators() == layer.num_layers


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("cls", LAYERS)
def test_training_with_dynamic_time_and_batch(cls, backend):
    layer = getattr(seqkern, cls)(4, 6, **STACK)
    model = nn.Sequential(nn.Linear(3, 4), layer)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for time, batch in ((5, 3), (7, 2), (11, 6)):
        x = torch.randn(time, batch, 3)
        gradients = []
        for run in (compiled, model):
            y, last = run(x)
            model.zero_grad()
            (y.sin().sum() + sum(s.pow(2).sum() for s in flat(last))).backward()
            gradients.append([y, *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*gradients)


def test_one_graph_serves_every_time_and_batch():
    layer, recorder = seqkern.LSTM(4, 6, **STACK), Recorder()
    compiled = torch.compile(layer, fullgraph=True, backend=recorder, dynamic=True)
    for time, batch in ((5, 3), (7, 2), (300, 9)):
        x, hx = torch.randn(time, batch, 4), hx_for("LSTM", 4, batch, 6)
        torch.testing.assert_close(compiled(x, hx), layer(x, hx))
    assert len(recorder.graphs) == 1


@pytest.mark.parametrize("cls", LAYERS)
def test_inference_with_inductor(cls):
    layer = getattr(seqkern, cls)(4, 6, **STACK).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for time, batch in ((5, 3), (8, 2)):
            x = torch.randn(time, batch, 4)
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("cls", CELLS)
def test_cells(cls):
    cell, recorder = getattr(seqkern, cls)(4, 6), Recorder()
    compiled = torch.compile(cell, fullgraph=True, backend=recorder)
    for batch in ((3,), ()):
        x, hx = torch.randn(*batch, 4), hx_for(cls, *batch, 6)
        torch.testing.assert_close(compiled(x, hx), cell(x, hx))
        torch.testing.assert_close(compiled(x), cell(x))
        assert recorder.operators() == 1


def test_functions():
    layer, recorder = seqkern.GRU(4, 6, **STACK), Recorder()

    def model(x, weights):
        return seqkern.functional.gru(x, None, weights, **STACK)

    x, weights = torch.randn(5, 3, 4), layer._flat_weights
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=recorder)(x, weights), layer(x))
    assert recorder.operators() == 2


def test_changed_and_parametrized_weights():
    layer, x = seqkern.LSTM(4, 6), torch.randn(5, 3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    torch.testing.assert_close(compiled(x), layer(x))
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)
    torch.testing.assert_close(compiled(x), layer(x))
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_accelerated_models_compile():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 6, **STACK)
            self.cell = nn.LSTMCell(12, 5)

        def forward(self, x):
            return self.cell(self.rnn(x)[0][-1])[0]

    model, recorder, x = seqkern.accelerate(Encoder()), Recorder(), torch.randn(5, 3, 4)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=recorder)(x), model(x))
    assert recorder.operators() == 3


def test_autocast():
    layer, x = seqkern.GRU(4, 6, **STACK), torch.randn(5, 3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(x), layer(x)
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("cls", LAYERS)
def test_export_with_dynamic_time_and_batch(cls, strict):
    layer = getattr(seqkern, cls)(4, 6, **STACK)
    dynamic = ({0: Dim("T", min=2, max=10_000), 1: Dim("B", min=2, max=512)},)
    program = torch.export.export(layer, (torch.randn(5, 3, 4),), dynamic_shapes=dynamic, strict=strict)
    assert count(program.graph_module) == 2
    for time, batch in ((2, 2), (17, 3), (200, 5)):
        x = torch.randn(time, batch, 4)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_export_of_a_model_that_starts_with_a_state():
    layer = seqkern.LSTM(4, 6, batch_first=True)
    time = Dim("T", min=2, max=1000)
    arguments = (torch.randn(3, 5, 4), hx_for("LSTM", 1, 3, 6))
    program = torch.export.export(layer, arguments, dynamic_shapes=({1: time}, (None, None)))
    x = torch.randn(3, 40, 4)
    torch.testing.assert_close(program.module()(x, arguments[1]), layer(x, arguments[1]))
    assert count(program.run_decompositions().graph_module) == 1


ALLOW_RNN = """
import sys, torch
{before}
import seqkern
assert {imported} == ("torch._dynamo" in sys.modules), "import seqkern imports torch._dynamo"
layer, x = seqkern.LSTM(4, 6), torch.randn(5, 3, 4)
compiled = torch.compile(layer, fullgraph=True, backend="eager")
assert torch._dynamo.config.allow_rnn
assert torch.equal(compiled(x)[0], layer(x)[0])
torch.compiler.reset()
torch._dynamo.config.allow_rnn = False
try:
    torch.compile(layer, fullgraph=True, backend="eager")(x)
except torch._dynamo.exc.Unsupported as error:
    assert "RNN" in str(error)
else:
    raise AssertionError("Dynamo takes RNNs without allow_rnn: the flag need not be set any more")
"""


@pytest.mark.parametrize("before", ["", "import torch._dynamo"])
def test_allow_rnn(before):
    """Importing seqkern sets the flag, before or after Dynamo, without importing Dynamo; without it Dynamo refuses."""
    script = ALLOW_RNN.format(before=before, imported=bool(before))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
