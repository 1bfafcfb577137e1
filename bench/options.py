"""Measures what the layers offer beyond torch.nn's, each beside the fastest plain-torch way to the same result, or
beside the plain seqkern layer; appends one JSON line per case, and makes docs/options.md's table from the file.

    python bench/options.py --threads 1 --json bench/results/options.jsonl
    python bench/options.py --cases 'layer_norm*' --table

Both sides run forward and backward in turn (A B B A) on the same weights and input; where the peer computes the same,
the outputs are compared first. A line holds case, peer, the shape, ms and peer_ms, ratio = peer / seqkern time (median
over the rounds) with the interval of that median, clock, load, and the machine. --cpu-time counts the process's time on
the CPU, not the wall clock's: for one thread on a machine with other work.

With --device cuda all products may round to TF32, times are between CUDA events, and where both sides can be captured
a line also holds graph_ms,
graph_peer_ms and graph_ratio, of replays as CUDA graphs: a loop's launches cost next to nothing there.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import layer_norm, linear  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

import seqkern  # noqa: E402
from bench import gpu, machine, timing  # noqa: E402

LAYERS = {"lstm": seqkern.LSTM, "gru": seqkern.GRU, "rnn": seqkern.RNN}
Function = Callable[[Tensor], Tensor]  # x to y


class Case(NamedTuple):
    shape: tuple[int, int, int]  # T, B, H = I
    peer: str
    make: Callable[[int, int, int], tuple[Function, Function]]  # ours, the peer
    same: bool = True  # whether both compute the same


@torch.jit.script
def scripted_lstm(x: Tensor, w: list[Tensor], eps: float = 1e-5) -> Tensor:
    """w: w_ih, w_hh, b_ih, b_hh, gain_x, gain_h, gain_c, bias_c. What does not depend on h stands before the loop."""
    h, c = x.new_zeros(x.size(1), w[1].size(1)), x.new_zeros(x.size(1), w[1].size(1))
    n, k = w[1].size(0), w[1].size(1)
    gx = layer_norm(linear(x, w[0]), [n], w[4], w[2])
    ys: list[Tensor] = []
    for g in gx.unbind(0):
        i, f, z, o = (g + layer_norm(linear(h, w[1]), [n], w[5], w[3])).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * layer_norm(c, [k], w[6], w[7]).tanh()
        ys.append(h)
    return torch.stack(ys)


@torch.jit.script
def scripted_gru(x: Tensor, w: list[Tensor]) -> Tensor:
    """w: w_ih, w_hh, b_ih, b_hh, gain_x, gain_h."""
    h, n = x.new_zeros(x.size(1), w[1].size(1)), w[1].size(0)
    gx = layer_norm(linear(x, w[0]), [n], w[4], w[2])
    ys: list[Tensor] = []
    for g in gx.unbind(0):
        xr, xz, xn = g.chunk(3, 1)
        hr, hz, hn = layer_norm(linear(h, w[1]), [n], w[5], w[3]).chunk(3, 1)
        z = (xz + hz).sigmoid()
        candidate = (xn + (xr + hr).sigmoid() * hn).tanh()
        h = candidate + z * (h - candidate)
        ys.append(h)
    return torch.stack(ys)


def normalised(cell: str):
    def make(T: int, B: int, H: int):
        m = LAYERS[cell](H, H, layer_norm=True)
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "gain_ih", "gain_hh"]
        names += ["gain_c", "bias_c"] * (cell == "lstm")
        weights = [getattr(m, name + "_l0") for name in names]
        loop = scripted_lstm if cell == "lstm" else scripted_gru
        return (lambda x: m(x)[0]), (lambda x: loop(x, weights))

    return make


def resets(T: int, B: int, H: int):
    m, cell = seqkern.LSTM(H, H), nn.LSTMCell(H, H)
    for name, p in cell.named_parameters():
        p.data = getattr(m, name + "_l0").data
    marks = torch.rand(T, B) < 1 / 20
    keep = marks.logical_not().float().unsqueeze(-1)

    def loop(x: Tensor) -> Tensor:
        h = c = x.new_zeros(B, H)
        ys = []
        for t in range(T):
            h, c = cell(x[t], (h * keep[t], c * keep[t]))
            ys.append(h)
        return torch.stack(ys)

    return (lambda x: m(x, resets=marks)[0]), loop


def lengths(cell: str):
    def make(T: int, B: int, H: int):
        m, theirs = LAYERS[cell](H, H), (nn.LSTM if cell == "lstm" else nn.GRU)(H, H)
        theirs.load_state_dict(m.state_dict())
        n = torch.linspace(T // 10, T, B).long()[torch.randperm(B)]
        on_host = n.cpu()

        def packed(x: Tensor) -> Tensor:
            y = theirs(pack_padded_sequence(x, on_host, enforce_sorted=False))[0]
            return pad_packed_sequence(y, total_length=T)[0]

        return (lambda x: m(x, lengths=n)[0]), packed

    return make


def beside_plain(cell: str, **options):
    def make(T: int, B: int, H: int):
        m, plain = LAYERS[cell](H, H, **options), LAYERS[cell](H, H)
        return (lambda x: m(x)[0]), (lambda x: plain(x)[0])

    return make


def mingru(T: int, B: int, H: int):
    m, theirs = seqkern.MinGRU(H, H), nn.GRU(H, H)
    return (lambda x: m(x)[0]), (lambda x: theirs(x)[0])


def mingru_steps(T: int, B: int, H: int):
    """A long sequence beside as many steps in pieces of 4096: 1 where time is linear in T."""
    m = seqkern.MinGRU(H, H)
    return (lambda x: m(x)[0]), (lambda x: torch.cat([m(part)[0] for part in x.split(4096)]))


USUAL, SMALL, TINY = (128, 32, 256), (128, 8, 128), (128, 2, 64)
CASES = {}
for cell in ("lstm", "gru"):
    for size, shape in (("", USUAL), ("-small", SMALL), ("-tiny", TINY)):
        CASES[f"layer_norm-{cell}{size}"] = Case(shape, "TorchScript loop", normalised(cell))
    CASES[f"lengths-{cell}"] = Case(USUAL, "pack, torch.nn, pad", lengths(cell))
    CASES[f"lengths-{cell}-long"] = Case((1000, 16, 64), "pack, torch.nn, pad", lengths(cell))
CASES["resets-lstm"] = Case(USUAL, "loop over LSTMCell", resets)
PLAIN = {
    "lstm": {"layer_norm": True, "peephole": True, "coupled": True, "gate_activation": "hard_sigmoid"},
    "gru": {"layer_norm": True, "reset_after": False, "gate_activation": "hard_sigmoid"},
    "rnn": {},
}
BOTH = {"grad_clip": 1.0, "clip_norm": ("norm", 1.0), "zoneout": 0.1, "recurrent_dropout": 0.1, "weight_dropout": 0.1}
for cell, options in PLAIN.items():
    for option, value in (options | BOTH | {"recompute": 16}).items():
        keyword = {"grad_clip" if option == "clip_norm" else option: value}
        CASES[f"plain-{option}-{cell}"] = Case(USUAL, "plain layer", beside_plain(cell, **keyword), False)
CASES["mingru"] = Case((4096, 8, 256), "torch.nn.GRU", mingru, False)
CASES["mingru-linear"] = Case((65536, 1, 256), "16 pieces of 4096 steps, each from zeros", mingru_steps, False)


def as_graphs(ours: gpu.Run, peer: gpu.Run, budget: timing.Budget) -> dict[str, object]:
    try:
        replays = gpu.graphed(ours), gpu.graphed(peer)
    except RuntimeError as failed:
        return {"graph_error": str(failed).splitlines()[0][:200]}
    found = timing.paired(*replays, budget, gpu.events, linger=0).summary()
    return {f"graph_{key}": found[key] for key in ("ms", "peer_ms", "ratio", "ratio_low", "ratio_high")}


def round_products(allowed: bool) -> None:
    """Whether CUDA may round all float32 operands to TF32; elsewhere nothing."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def measure(name: str, case: Case, budget: timing.Budget, clock: timing.Sample) -> dict[str, object]:
    """On the default device."""
    torch.manual_seed(0)
    T, B, H = case.shape
    ours, peer = case.make(T, B, H)
    x, dy = torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H)
    if case.same:
        # At first: rounding errors grow from step to step where a layer normalisation makes the recurrence chaotic.
        first = slice(0, 16)
        round_products(False)
        with torch.no_grad():
            torch.testing.assert_close(ours(x)[first], peer(x)[first], rtol=1e-4, atol=1e-4)
    round_products(x.is_cuda)
    train = lambda f: lambda: f(x).backward(dy)  # noqa: E731
    sides = train(ours), train(peer)
    result = timing.paired(*sides, budget, clock, linger=0 if x.is_cuda else 5e-3)
    line = {"case": name, "peer": case.peer, "T": T, "B": B, "H": H, "clock": clock.__name__}
    return line | result.summary() | (as_graphs(*sides, budget) if x.is_cuda else {}) | {"load": machine.load()}


def table(lines: list[dict]) -> str:
    """Markdown, the newest line of each case."""
    rows = ["| case | T, B, H | beside | ms | peer ms | ratio | interval |", "|---|---|---|---|---|---|---|"]
    for line in {line["case"]: line for line in lines}.values():
        shape = f"{line['T']}, {line['B']}, {line['H']}"
        interval = f"{line['ratio_low']:.2f} to {line['ratio_high']:.2f}"
        times = f"{line['ms']:.3g} | {line['peer_ms']:.3g} | {line['ratio']:.2f}"
        rows.append(f"| {line['case']} | {shape} | {line['peer']} | {times} | {interval} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, default=Path("bench/out/options.jsonl"), help="append lines here")
    parser.add_argument("--threads", type=int, help="for both sides (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=4.0, help="the most that a case takes")
    parser.add_argument("--cpu-time", action="store_true", help="instead of the wall clock's")
    parser.add_argument("--table", action="store_true", help="only make the table from the file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    if not args.table:
        torch.set_default_device(args.device)
        about = machine.describe(args.device) | (gpu.describe() if args.device == "cuda" else {})
        clock = gpu.events if args.device == "cuda" else timing.cpu_time if args.cpu_time else timing.clock
        chosen = [name for name in CASES if any(fnmatch.fnmatch(name, glob) for glob in args.cases)]
        budget = timing.Budget(samples=24, low=0.5, high=args.seconds)
        for i, name in enumerate(chosen):
            line = measure(name, CASES[name], budget, clock) | about
            times = f"{line['ms']:.2f} ms, peer {line['peer_ms']:.2f}, ratio {line['ratio']:.2f}"
            times += f", as graphs {line['graph_ratio']:.2f}" if "graph_ratio" in line else ""
            print(f"[{i + 1}/{len(chosen)}] {name}: {times}", flush=True)
            with args.json.open("a") as file:
                file.write(json.dumps(line) + "\n")
    print(table([json.loads(line) for line in args.json.read_text().splitlines()]))


if __name__ == "__main__":
    main()
