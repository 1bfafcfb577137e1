"""The operators on a GPU as torch uses them: streams, graphs, devices, autocast, flags, autograd, layers, errors."""

import cuda_checks
import pytest
import torch
from cases import CASES, CELLS, Case
from cuda_checks import check, engine, forced, inputs_on, run, tf32
from oracle import evaluate
from test_gradcheck import closed

import seqkern
from seqkern import ops, reference

engines = pytest.mark.parametrize("forced_engine", ["step", None], ids=["step", "grid"])
SHAPES = [
    Case("torch-lstm", "lstm", T=12, B=8, I=16, H=128),
    Case("torch-gru", "gru", T=12, B=8, I=16, H=128, bidirectional=True),
    Case("torch-packed", "lstm", lengths=(9, 9, 7, 3, 1), H=96, bidirectional=True),
    Case("torch-proj", "lstm", T=6, B=4, H=64, proj=24),
]
shapes = pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


def same(found, want) -> bool:
    return all(torch.equal(found[name].cpu(), t.cpu()) for name, t in want.items())


@engines
@shapes
def test_side_stream(case, forced_engine):
    """On a stream of the caller's, behind other work on it and with no synchronisation before."""
    with forced(forced_engine):
        want = run(case, torch.bfloat16)
        inputs, cotangents = inputs_on(case, torch.bfloat16), cuda_checks.cotangents_on(case, torch.bfloat16)
        x = inputs.x.clone()
        inputs.x.fill_(float("nan"))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # cycles; the copy below waits behind it
            inputs.x.copy_(x)
            found = evaluate(engine, case, inputs, cotangents)
        torch.cuda.current_stream().wait_stream(stream)
        assert same(found, want)


@engines
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_capture_and_replay(case, dtype, forced_engine):
    """Captured once, replayed on other inputs, forward and backward."""
    with forced(forced_engine):
        want = run(case, dtype)
        inputs, cotangents = inputs_on(case, dtype), cuda_checks.cotangents_on(case, dtype)
        x = inputs.x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            evaluate(engine, case, inputs, cotangents)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = evaluate(engine, case, inputs, cotangents)
        inputs.x.fill_(float("nan"))
        graph.replay()
        assert found["y"].isnan().any()
        for _ in range(3):
            inputs.x.copy_(x)
            graph.replay()
        torch.cuda.synchronize()
        assert same(found, want)


@two_gpus
@engines
@shapes
def test_second_gpu(case, forced_engine):
    """Tensors on cuda:1 while cuda:0 is the current device."""
    with forced(forced_engine):
        found = run(case, torch.bfloat16, "cuda:1")
        assert torch.cuda.current_device() == 0
        assert {t.device for t in found.values()} == {torch.device("cuda:1")}
        assert same(found, run(case, torch.bfloat16))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["h_tail-lstm", "h_tail-gru", "packed-rnn_relu", "proj-lstm"])
def test_autocast(name, target):
    case = CASES[name]
    inputs = inputs_on(case, torch.float32)

    def in_autocast(*arguments):
        with torch.autocast("cuda", target):
            return engine(*arguments)

    got = evaluate(in_autocast, case, inputs, cuda_checks.cotangents_on(case, target))
    low = inputs._replace(
        x=inputs.x.to(target),
        h0=inputs.h0.to(target),
        c0=None if inputs.c0 is None else inputs.c0.to(target),
        weights=[w.to(target) for w in inputs.weights],
    )
    want = evaluate(engine, case, low, cuda_checks.cotangents_on(case, target))
    for key, t in want.items():
        assert got[key].dtype == (torch.float32 if key.startswith("d") else target), key
        assert torch.equal(got[key].to(target), t), key


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="TF32 needs sm_80")
@engines
def test_tf32_follows_the_flag_of_rnns_and_not_that_of_matmul(forced_engine):
    case = Case("flags", "lstm", T=8, B=32, I=128, H=256)
    matmul = torch.backends.cuda.matmul.allow_tf32
    found = {}
    try:
        for products in (False, True):
            for rnn in (False, True):
                torch.backends.cuda.matmul.allow_tf32 = products
                with forced(forced_engine), tf32(rnn):
                    found[products, rnn] = run(case, torch.float32)["y"]
                assert torch.backends.cuda.matmul.allow_tf32 == products
                a = torch.randn(64, 256, device="cuda")
                exact = (a.double() @ a.double().T).float()
                assert ((a @ a.T - exact).abs().max() > 1e-3) == products  # torch's own products keep their mode
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
    truth = reference.layer(*[cuda_checks.to("cuda", t) for t in double_inputs(case)], "lstm", False)[0]
    errors = {flags: (y.double() - truth).abs().max().item() for flags, y in found.items()}
    assert torch.equal(found[False, False], found[True, False]) and torch.equal(found[False, True], found[True, True])
    assert errors[False, False] < 1e-5 < errors[False, True]


def double_inputs(case: Case) -> list:
    x, h0, c0, weights, batch_sizes = cuda_checks.make_inputs(case, torch.float32)
    return [x.double(), h0.double(), c0.double(), [w.double() for w in weights], batch_sizes]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", [{}, {"lengths": (3, 2, 1), "bidirectional": True}], ids=["plain", "packed"])
def test_gradcheck_and_gradgradcheck(cell, options):
    case = Case(f"cuda-gradcheck-{cell}", cell, **{"T": 3, "B": 2, "I": 2, "H": 3} | options)
    function, leaves = closed(engine, case)
    leaves = [t.detach().cuda().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_second_backward_under_retain_graph(cell):
    case = CASES[f"h_tail-{cell}"]
    x, h0, c0, weights, _ = inputs_on(case, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, h0, *weights)]
    y, h_n, _ = engine(x, h0, c0, weights, None, cell, False)
    cotangents = [torch.randn_like(y), torch.randn_like(h_n)]
    once = torch.autograd.grad((y, h_n), leaves, cotangents, retain_graph=True)
    again = torch.autograd.grad((y, h_n), leaves, cotangents)
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_layers_on_the_gpu(name):
    """A stack of two bidirectional layers gives what it gives on the CPU, and trains."""
    torch.manual_seed(1)
    layer = getattr(seqkern, name)(5, 24, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(3, 7, 5)
    with tf32(False):
        want, got = layer(x)[0], layer.cuda()(x.cuda())[0]
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
        got.sum().backward()
    assert all(p.grad.device.type == "cuda" and p.grad.isfinite().all() for p in layer.parameters())


def test_explain():
    layer = seqkern.LSTM(64, 256).cuda().bfloat16()
    plan = seqkern.explain(layer, batch=16, time=50)
    assert plan.engine in ("cuda-grid", "cuda-step")
    assert "forward: " in str(plan) and "backward: " in str(plan) and torch.cuda.get_device_name() in str(plan)
    with forced("step"):
        assert seqkern.explain(layer, batch=16, time=50).engine == "cuda-step"


@pytest.mark.parametrize("cell", CELLS)
def test_mixed_devices_and_dtypes_are_refused(cell):
    case = CASES[f"h_tail-{cell}"]
    x, h0, c0, weights, _ = inputs_on(case, torch.float32)
    with pytest.raises(RuntimeError, match=f"{cell}: states and weights must be on cuda:0 as x is, got one on"):
        ops.rnn_layer(x, h0.cpu(), c0, weights, None, cell, False, False)
    with pytest.raises(RuntimeError, match=f"{cell}: states and weights must be on cuda:0 as x is, got one on"):
        ops.rnn_layer(x, h0, c0, [weights[0], weights[1].cpu(), *weights[2:]], None, cell, False, False)
    with pytest.raises(RuntimeError, match=f"{cell}: h0 must be float32 as x is, got float64"):
        ops.rnn_layer(x, h0.double(), c0, weights, None, cell, False, False)
    with pytest.raises(RuntimeError, match=f"{cell}: x must be float64, float32, bfloat16 or float16, got "):
        ops.rnn_layer(x.long(), h0, c0, weights, None, cell, False, False)


@pytest.mark.parametrize("layer", [seqkern.LSTM(4, 8), seqkern.GRU(4, 8)], ids=["lstm", "gru"])
def test_a_layer_refuses_an_input_elsewhere(layer):
    with pytest.raises(RuntimeError, match="must be on cuda:0 as the input is, got one on cpu"):
        layer(torch.randn(3, 2, 4, device="cuda"))


def test_a_dtype_without_a_kernel_runs_on_the_reference():
    layer = seqkern.RNN(3, 4, dtype=torch.complex64, device="cuda")
    y, _ = layer(torch.randn(5, 2, 3, dtype=torch.complex64, device="cuda"))
    y.abs().sum().backward()
    assert y.dtype == layer.weight_ih_l0.grad.dtype == torch.complex64


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_views(offset):
    """Weights, states and inputs that do not begin at a multiple of a vector."""
    case = CASES["h_16-lstm"]

    def moved(t):
        store = torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)
        view = store[offset:].view(t.shape)
        return view.copy_(t)

    x, h0, c0, weights, _ = inputs_on(case, torch.bfloat16)
    inputs = cuda_checks.Inputs(moved(x), moved(h0), moved(c0), [moved(w) for w in weights], None)
    cotangents = [moved(t) for t in cuda_checks.cotangents_on(case, torch.bfloat16)]
    check(case, torch.bfloat16, evaluate(engine, case, inputs, cotangents))
