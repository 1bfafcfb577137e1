"""Lines of `run.py --device cuda` into markdown: ratios by cuDNN's algorithm and seqkern's engine, targets, losses."""

from collections.abc import Callable, Sequence

from bench.summary import Line, Setting, markdown_table, verdict
from bench.timing import geomean

PATHS = {
    "standard": "per-step",
    "persist_static": "persistent",
    "persist_static_small_h": "persistent for small H",
    "mixed": "one way forward, another backward",
    "native": "not cuDNN: ATen",
}
PASSES = {"infer": "forward", "train": "forward + backward"}
KEYS = {"ratio": "", "graph_ratio": ", as CUDA graphs"}

# Engine, cuDNN's path, pass, and the ratio wanted.
TARGETS = [
    ("grid", "standard", "infer", 3.0),
    ("grid", "standard", "train", 2.0),
    ("grid", "persist_static", "infer", 1.0),
    ("grid", "persist_static", "train", 1.0),
    ("step", "standard", "infer", 1.0),
    ("step", "standard", "train", 1.0),
]

# Estimated lower bounds of the recurrence, LSTM forward in bf16: (B, H) to microseconds a step on an H100.
BOUNDS = {
    (16, 256): (0.5, 0.7),
    (64, 256): (0.5, 0.7),
    (16, 512): (0.6, 1.1),
    (64, 512): (0.6, 1.1),
    (16, 1024): (1.1, 2.0),
    (64, 1024): (1.9, 3.4),
    (16, 2048): (1.6, 3.1),
    (64, 2048): (3.0, 5.5),
}


def path(line: Line) -> str:
    """What cuDNN ran: one algorithm, or "mixed" where backward took another."""
    forward = line.get("cudnn_forward", "?")
    return forward if line.get("cudnn_backward", forward) == forward else "mixed"


def engine(line: Line) -> str:
    """What seqkern ran: one engine, or both where backward took another."""
    forward = line.get("engine", "?")
    backward = line.get("engine_backward", forward)
    return forward if backward == forward else f"{forward}, backward {backward}"


def by_gpu(lines: Sequence[Line]) -> list[Setting]:
    names = dict.fromkeys(line["gpu"] for line in lines)
    return [Setting([line for line in lines if line["gpu"] == name]) for name in names]


def ratios(lines: Sequence[Line], key: str = "ratio") -> list[float]:
    return [line[key] for line in lines if "wrong" not in line and key in line]


def text(values: Sequence[float]) -> str:
    """Geometric mean (lowest), and of how many; bold where one is below 1."""
    if not values:
        return ""
    shown = f"{geomean(values):.2f} ({min(values):.2f}), {len(values)}"
    return f"**{shown}**" if min(values) < 1 else shown


def table(lines: Sequence[Line], heads: Sequence[str], key: Callable[[Line], tuple]) -> str:
    """A row for each key, with a column for each pass, eager and as graphs."""
    columns = [(name, ratio) for ratio in KEYS for name in PASSES]
    rows = []
    for row in dict.fromkeys(map(key, lines)):
        here = [line for line in lines if key(line) == row]
        cells = [text(ratios([line for line in here if line["pass"] == name], ratio)) for name, ratio in columns]
        rows.append([*map(str, row), *cells])
    return markdown_table([*heads, *(PASSES[name] + KEYS[ratio] for name, ratio in columns)], rows)


def targets(lines: Sequence[Line]) -> str:
    rows = []
    for ran, wanted, name, least in TARGETS:
        chosen = [x for x in lines if (engine(x), path(x), x["pass"]) == (ran, wanted, name)]
        if not (found := ratios(chosen)):
            outcome = "not measured"
        else:
            outcome = f"{geomean(found):.2f} of {len(found)}, " + ("met" if geomean(found) >= least else "**missed**")
        rows.append([f"{ran} against cuDNN {PATHS[wanted]}, {PASSES[name]}", f"{least:.1f}", outcome])
    return markdown_table(["geometric mean of cuDNN time / seqkern time", "target", "measured"], rows)


def bounds(lines: Sequence[Line]) -> str:
    """Measured time a step beside the estimates; "" where no such case was measured."""
    rows = []
    for line in lines:
        plain = (line["cell"], line["dtype"], line["pass"]) == ("lstm", "bf16", "infer") and "wrong" not in line
        one = line["layers"] == 1 and not line["bidirectional"] and not line["packed"] and "forced" not in line
        found = BOUNDS.get((line["batch"], line["hidden"]))
        if not (plain and one and found):
            continue
        us = line["graph_ms"] * 1e3 / line["time"] if "graph_ms" in line else line["us_step"]
        shape = f"B={line['batch']} H={line['hidden']}"
        rows.append([shape, line["engine"], f"{found[0]:g} to {found[1]:g}", f"{us:.2f}", f"{us / found[1]:.1f}"])
    heads = ["LSTM bf16 forward", "engine", "estimate, us a step", "measured, as a graph", "measured / upper estimate"]
    return markdown_table(heads, rows) if rows else ""


def where(setting: Setting) -> str:
    """GPU, versions, clocks and flags, in a sentence."""
    first = setting.lines[0]
    facts = [f"{first['gpu']}", f"driver {first.get('driver', '?')}", f"CUDA {first.get('cuda', '?')}"]
    facts += [f"cuDNN {first.get('cudnn', '?')}", f"torch {first.get('torch', '?')}"]
    clocks = [line["clock_sm"] for line in setting.lines if "clock_sm" in line]
    if clocks:
        most = f" (of {first['clock_sm_max']:g})" if "clock_sm_max" in first else ""
        facts.append(f"{min(clocks):g} MHz under load{most}")
    facts.append(f"TF32 in recurrent layers {first.get('tf32_rnn', '?')}, in products {first.get('tf32_matmul', '?')}")
    commits = ", ".join(dict.fromkeys(str(line.get("commit", "?")) for line in setting.lines))
    return f"{', '.join(facts)}, csrc {first.get('csrc', '?')}, commit {commits}."


def tally(lines: Sequence[Line]) -> str:
    found = [verdict(line) for line in lines]
    words = {"win": "faster", "even": "within noise of 1", "loss": "slower", "wrong": "wrong"}
    return ", ".join(f"{found.count(kind)} {word}" for kind, word in words.items() if found.count(kind))


def losses(setting: Setting) -> str:
    """The cases that lose or are wrong, lowest ratio first; "" for none."""
    named = []
    for line in setting.named(lambda kind: kind in ("loss", "wrong")):
        ratio = "WRONG" if "wrong" in line else f"{line['ratio']:.2f}"
        named.append(f"{line['case']} ({engine(line)} against {PATHS.get(path(line), '?')}: {ratio})")
    return f"Slower or wrong beyond noise: {', '.join(named)}." if named else ""


def summary(setting: Setting, csrc: str) -> str:
    """What the README shows: by path and engine, targets, losses, where."""
    timed = setting.lines
    parts = [
        "cuDNN time / seqkern time of one call of the layer, above 1 seqkern is faster: geometric mean (lowest case), "
        "number of cases. Bold: a case below 1.",
        table(timed, ["cuDNN ran", "seqkern ran"], lambda x: (PATHS.get(path(x), path(x)), engine(x))),
        targets(timed),
        f"Measured on {where(setting)} {tally(timed).capitalize()}.",
        losses(setting),
    ]
    if stale := setting.stale(csrc):
        parts.append(f"**{stale} of {len(timed)} lines were measured on other sources than these in csrc/.**")
    return "\n\n".join(filter(None, parts))


def page(setting: Setting, csrc: str) -> str:
    """The summary, the regimes, the lower bounds and every case."""
    rows = []
    for line in setting.lines:
        algorithms = [PATHS.get(line[key], line[key]) for key in ("cudnn_forward", "cudnn_backward") if key in line]
        row = [line["case"], engine(line), " / ".join(dict.fromkeys(algorithms))]
        if "wrong" in line:
            rows.append([*row, "", "", "WRONG", "", "", line["wrong"]])
            continue
        scale = 1e3 / line["time"]
        spread = [
            f"{line[f'{side}ms'] * scale:.3g} ({line[f'{side}p10'] * scale:.3g}, {line[f'{side}p90'] * scale:.3g})"
            for side in ("", "peer_")
        ]
        graph = f"{line['graph_ratio']:.2f}" if "graph_ratio" in line else ""
        notes = [] if line.get("peer_flat", True) else ["cuDNN's weights not in one buffer"]
        notes += [f"no graph: {line['graph_error']}"] if "graph_error" in line else []
        rows.append([*row, *spread, f"{line['ratio']:.2f}", graph, f"{line['error']:.2f}", "; ".join(notes)])
    heads = ["case", "engine", "cuDNN ran", "seqkern us a step (p10, p90)", "cuDNN us a step (p10, p90)", "ratio"]
    heads += ["as graphs", "error / bound", "notes"]
    parts = [summary(setting, csrc), "## By regime", table(setting.lines, ["regime"], lambda line: (line["group"],))]
    if shown := bounds(setting.lines):
        said = "The time is the whole call's, input projection included."
        parts += ["## Beside the estimated lower bounds", said, shown]
    parts += ["## Every case", markdown_table(heads, rows)]
    return "\n\n".join(parts) + "\n"
