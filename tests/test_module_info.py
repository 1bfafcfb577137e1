"""torch's own samples of the six recurrent modules (its ModuleInfo database), with seqkern's classes in their place."""

import pickle

import pytest
import torch
from oracle import distance, fault
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like

import seqkern

CLASSES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
INFOS = [info for info in module_db if info.module_cls in {getattr(nn, name) for name in CLASSES}]
each_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def samples(info, dtype=torch.float64, requires_grad=True, training=True):
    """torch's samples, those with packed sequences too."""
    more = {"with_packed_sequence": True} if info.module_cls in (nn.RNN, nn.GRU) else {}
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **more
    )
    assert found
    return found


def build(sample, info, dtype, training) -> tuple[nn.Module, nn.Module]:
    """seqkern's module and torch's, with the same weights."""
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    with seqkern.patched():
        ours = getattr(nn, info.module_cls.__name__)(*arguments, **options, device="cpu", dtype=dtype)
    theirs = info.module_cls(*arguments, **options, device="cpu", dtype=dtype)
    assert type(ours).__module__ == "seqkern.modules"
    theirs.load_state_dict(ours.state_dict())
    return ours.train(training), theirs.train(training)


def tensors(values) -> list[torch.Tensor]:
    if isinstance(values, PackedSequence):
        return [values.data]
    return [values] if isinstance(values, torch.Tensor) else [t for v in values for t in tensors(v)]


def gradients(module, outputs, inputs) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    leaves = inputs + list(module.parameters())
    return list(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True))


def convert(values, dtype):
    """The same arguments as leaves of another dtype."""
    if isinstance(values, PackedSequence):
        return PackedSequence(convert(values.data, dtype), *values[1:])
    if isinstance(values, torch.Tensor):
        return values.detach().to(dtype).requires_grad_()
    return tuple(convert(v, dtype) for v in values)


def evaluate(module, arguments) -> list[torch.Tensor]:
    """Outputs and gradients."""
    outputs = tensors(module(*arguments))
    return [o.detach() for o in outputs] + gradients(module, outputs, tensors(arguments))


@each_info
@each_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_and_gradients(info, training, dtype):
    for sample in samples(info, dtype, training=training):
        assert not sample.forward_input.kwargs
        ours, theirs = build(sample, info, dtype, training)
        found, native = (evaluate(m, sample.forward_input.args) for m in (ours, theirs))
        assert {t.dtype for t in found} == {dtype}
        if dtype == torch.float64:
            torch.testing.assert_close(found, native)
            continue
        truth = evaluate(theirs.double(), convert(sample.forward_input.args, torch.float64))
        # A weight's gradient may cancel among terms as large as the inputs, up to 9 here: the native error can be less
        # than their rounding by luck.
        terms = torch.finfo(dtype).eps * max(float(t.detach().abs().max()) for t in tensors(sample.forward_input.args))
        wrong = [fault(f, t, distance(n, t) + terms / 8) for f, t, n in zip(found, truth, native, strict=True)]
        assert not any(wrong), f"{theirs}: {[w for w in wrong if w]}"


@each_info
def test_torchs_reference_functions(info):
    checked = 0
    for sample in samples(info):
        if sample.reference_fn is None or isinstance(sample.forward_input.args[0], PackedSequence):
            continue
        ours, _ = build(sample, info, torch.float64, True)
        arguments = sample.forward_input.args
        torch.testing.assert_close(ours(*arguments), sample.reference_fn(ours, *arguments))
        checked += 1
    assert checked


def as_function(module, sample):
    """A function of tensors, those of the sample and the parameters, and the tensors."""
    names = [name for name, _ in module.named_parameters()]
    arguments, batch = sample.forward_input.args, None
    if isinstance(arguments[0], PackedSequence):
        batch = arguments[0].batch_sizes
    count = len(tensors(arguments))

    def function(*values):
        x, *state = values[:count]
        x = x if batch is None else PackedSequence(x, batch)
        state = (tuple(state) if len(state) == 2 else state[0],) if state else ()
        return tuple(
            tensors(torch.func.functional_call(module, dict(zip(names, values[count:], strict=True)), (x, *state)))
        )

    return function, [*tensors(arguments), *module.parameters()]


@each_info
@each_mode
def test_gradcheck(info, training):
    for sample in samples(info, training=training):
        ours, _ = build(sample, info, torch.float64, training)
        assert gradcheck(*as_function(ours, sample), fast_mode=True)


@each_info
def test_gradgradcheck(info):
    for sample in samples(info):
        ours, _ = build(sample, info, torch.float64, True)
        assert gradgradcheck(*as_function(ours, sample), fast_mode=True)


@each_info
def test_non_contiguous_inputs(info):
    for sample in samples(info, requires_grad=False):
        ours, _ = build(sample, info, torch.float64, True)
        function, values = as_function(ours, sample)
        values = [v.detach() for v in values]
        results = []
        for layout in (lambda t: t.clone(), noncontiguous_like):
            leaves = [layout(v).requires_grad_() for v in values]
            outputs = function(*leaves)
            results.append((outputs, torch.autograd.grad([o.sin().sum() for o in outputs], leaves)))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@each_info
def test_pickling(info):
    for sample in samples(info, torch.float32):
        ours, _ = build(sample, info, torch.float32, True)
        arguments = sample.forward_input.args
        twin = pickle.loads(pickle.dumps(ours))
        assert type(twin) is type(ours)
        torch.testing.assert_close(tensors(twin(*arguments)), tensors(ours(*arguments)), rtol=0, atol=0)


@each_info
def test_error_inputs(info):
    found = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    assert found
    cls = getattr(seqkern, info.module_cls.__name__)
    for error in found:
        built, called = error.module_error_input.constructor_input, error.module_error_input.forward_input
        with pytest.raises(error.error_type):  # by the constructor in some samples, by the call in the others
            cls(*built.args, **built.kwargs)(*called.args)
