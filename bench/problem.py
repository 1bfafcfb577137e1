"""A case made concrete: two layers with the same weights, their inputs, the check that comes before any timing, and
what each keeps for backward."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkern
from bench.cases import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
Hidden = Tensor | tuple[Tensor, Tensor] | None
Results = dict[str, Tensor]


class WrongResult(Exception):
    """A result that is not within its bound of the float64 truth."""


@dataclass
class Inputs:
    """What a layer is called with, in one dtype, and the gradient of its output."""

    x: Tensor  # [T, B, I], or the rows [N, I] of a packed sequence; requires grad in training
    hx: Hidden
    packing: PackedSequence | None

    def sequence(self) -> Tensor | PackedSequence:
        if self.packing is None:
            return self.x
        p = self.packing
        return PackedSequence(self.x, p.batch_sizes, p.sorted_indices, p.unsorted_indices)

    def to(self, dtype: torch.dtype) -> "Inputs":
        x = self.x.detach().to(dtype).requires_grad_(self.x.requires_grad)
        hx = tuple(h.to(dtype) for h in self.hx) if isinstance(self.hx, tuple) else self.hx
        return Inputs(x, hx.to(dtype) if isinstance(hx, Tensor) else hx, self.packing)


class Problem:
    """The layers and inputs of a case, the same on every run."""

    def __init__(self, case: Case, device: str):
        self.case = case
        self.train = case.passes == "train"
        generator = torch.Generator(device).manual_seed(20240229)
        dtype = DTYPES[case.dtype]
        torch.manual_seed(0)
        options = {"num_layers": case.layers, "bidirectional": case.bidirectional}
        if case.proj:
            options["proj_size"] = case.proj
        name = case.cell.upper()
        self.torch = getattr(nn, name)(case.input, case.hidden, **options, device=device, dtype=dtype)
        self.ours = getattr(seqkern, name)(case.input, case.hidden, **options, device=device, dtype=dtype)
        self.ours.load_state_dict(self.torch.state_dict())
        for layer in (self.torch, self.ours):
            layer.train(self.train)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        x, packing = normal(case.time, case.batch, case.input), None
        self.rows = case.time * case.batch
        if case.packed:
            least = (case.time + 1) // 2
            lengths = torch.randint(least, case.time + 1, (case.batch,), generator=generator, device=device).cpu()
            packing = pack_padded_sequence(x, lengths, enforce_sorted=False)
            x, self.rows = packing.data, int(lengths.sum())
        out, directions = case.proj or case.hidden, 2 if case.bidirectional else 1
        hx: Hidden = None
        if case.carried:
            hx = normal(case.layers * directions, case.batch, out)
            if case.cell == "lstm":
                hx = (hx, normal(case.layers * directions, case.batch, case.hidden))
        self.inputs = Inputs(x.requires_grad_(self.train), hx, packing)
        self.dy = normal(*x.shape[:-1], out * directions)

    def call(self, layer: nn.Module, inputs: Inputs | None = None) -> Results:
        """Everything the layer computes: y, the last states, and in training the gradients."""
        inputs = inputs or self.inputs
        with torch.inference_mode(not self.train):
            y, state = layer(inputs.sequence(), inputs.hx)
        y = y.data if isinstance(y, PackedSequence) else y
        results = {"y": y, **dict(zip(("h_n", "c_n"), state if isinstance(state, tuple) else (state,), strict=False))}
        if self.train:
            parameters = dict(layer.named_parameters())
            wanted = {"x": inputs.x, **parameters}
            grads = torch.autograd.grad(y, list(wanted.values()), self.dy.to(y.dtype))
            results |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
        return {name: value.detach() for name, value in results.items()}

    def truth(self) -> Results:
        """The same in float64, by torch.nn without cuDNN, from the rounded weights and inputs."""
        with torch.backends.cudnn.flags(enabled=False):
            return self.call(copy.deepcopy(self.torch).double(), self.inputs.to(torch.float64))

    def timed(self, layer: nn.Module) -> Callable[[], object]:
        """What is timed: a call in inference mode, or forward and backward to x and the weights, .grad None before."""
        sequence, hx, dy = self.inputs.sequence(), self.inputs.hx, self.dy
        if not self.train:

            def infer() -> object:
                with torch.inference_mode():
                    return layer(sequence, hx)

            return infer
        leaves = [self.inputs.x, *layer.parameters()]

        def step() -> None:
            for leaf in leaves:
                leaf.grad = None
            y, _ = layer(sequence, hx)
            (y.data if isinstance(y, PackedSequence) else y).backward(dy)

        return step


def error(result: Tensor, truth: Tensor) -> float:
    """The largest absolute error, as a fraction of the largest absolute value of the truth; inf for NaN or a shape
    that differs."""
    if result.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    worst = float((result.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-300))
    return worst if worst == worst else float("inf")


def check(
    results: Results, native: Results, truth: Results, dtype: torch.dtype, slack: float = 1, eps: float | None = None
) -> float:
    """Holds every tensor to 4 times the error of torch's own layer in the same dtype, plus 4 eps, both against float64.

    Args:
        slack: widens the bound, for peers that approximate the activations.
        eps: of the arithmetic, where that is coarser than the dtype's (TF32); by default the dtype's.

    Returns:
        The largest error as a fraction of its bound.

    Raises:
        WrongResult: a tensor is missing or beyond its bound.
    """
    if results.keys() != native.keys():
        raise WrongResult(f"wanted {', '.join(native)}, got {', '.join(results)}")
    worst = 0.0
    for name, value in results.items():
        bound = slack * (4 * error(native[name], truth[name]) + 4 * (eps or torch.finfo(dtype).eps))
        found = error(value, truth[name])
        if not found <= bound:
            raise WrongResult(f"{name} is off by {found:.1e} of its largest value, more than {bound:.1e}")
        worst = max(worst, found / bound)
    return worst


def kept(problem: Problem, layer: nn.Module) -> float:
    """Bytes that autograd keeps between forward and backward, as a multiple of the output's bytes.

    Counts each storage once and whole, however many saved tensors view it; inputs and parameters, which live on
    anyway, are not counted, and the output is.
    """
    inputs = problem.inputs
    given = [inputs.x, *layer.parameters(), *(inputs.hx if isinstance(inputs.hx, tuple) else [inputs.hx])]
    lives = {t.untyped_storage().data_ptr() for t in given if t is not None}
    storages = {}  # holds the storages themselves, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = layer(inputs.sequence(), inputs.hx)
    data = y.data if isinstance(y, PackedSequence) else y
    total = sum(storage.nbytes() for address, storage in storages.items() if address not in lives)
    return total / (data.numel() * data.element_size())
