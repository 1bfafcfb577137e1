"""The CUDA planner: what it chooses fits the device, and where the grid engine does not run it says why."""

import math

import host
import pytest

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
DTYPES = ("float64", "float32", "bfloat16", "float16")
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
# sms, cc, KiB of shared memory a block and an SM, threads an SM
DEVICES = {
    "H100 SXM": (132, 90, 227, 228, 2048),
    "H200": (132, 90, 227, 228, 2048),
    "H100 PCIe": (114, 90, 227, 228, 2048),
    "A100": (108, 80, 163, 164, 2048),
    "RTX 5090": (170, 120, 99, 100, 1536),
    "RTX 5070": (48, 120, 99, 100, 1536),
}
LAYERS = {"one": (1, False), "bidirectional": (2, False), "packed": (1, True)}
BATCHES, SIZES = (1, 8, 16, 64, 128), (64, 128, 256, 512, 768, 1024, 2048)


def device(name: str) -> dict:
    sms, cc, block, sm, threads = DEVICES[name]
    kib = {"shared_per_block": block << 10, "shared_per_sm": sm << 10}
    return {"sms": sms, "cc": cc, "registers_per_sm": 65536, "threads_per_sm": threads, **kib}


def shape(cell="lstm", dtype="bfloat16", T=256, B=16, H=1024, P=None, D=1, packed=False, tf32=True) -> dict:
    return {
        "cell": CELLS.index(cell),
        "dtype": DTYPES.index(dtype),
        "tf32": tf32 and dtype == "float32",
        "steps": T,
        "batch": B,
        "hidden": H,
        "output": P or H,
        "directions": D,
        "packed": packed,
    }


def faults(plan: dict, s: dict, d: dict) -> list[str]:
    """What is wrong with a plan for the grid engine."""
    units, lines = plan["units_per_cta"], []

    def must(ok: bool, text: str) -> None:
        if not ok:
            lines.append(f"{text}: {plan}")

    must(plan["grid"] == plan["directions"] * plan["tiles"] * plan["ctas"], "grid is not the product of its parts")
    must(plan["grid"] <= d["sms"], "more blocks than SMs, one to each")
    must(plan["shared_bytes"] <= d["shared_per_block"], "more shared memory than a block may have")
    must(plan["shared_bytes"] + 1024 <= d["shared_per_sm"], "more shared memory than an SM has")
    must(plan["threads"] * 255 <= d["registers_per_sm"], "more registers than an SM has")
    must((plan["ctas"] - 1) * units < s["hidden"] <= plan["ctas"] * units, "blocks do not cover the units")
    must((plan["tiles"] - 1) * plan["batch_tile"] < s["batch"], "a tile without rows")
    must(s["batch"] <= plan["tiles"] * plan["batch_tile"], "tiles do not cover the batch")
    must(s["directions"] % plan["directions"] == 0, "directions left over")
    bytes_ = 4 if s["dtype"] == 1 else 2
    least = 2 * s["directions"] * s["batch"] * s["hidden"] * bytes_
    must(plan["workspace_bytes"] >= least, "workspace below the exchanged state")
    return lines


@pytest.mark.parametrize("name", DEVICES)
def test_every_shape_of_the_comparison_has_a_plan(name):
    d, module, by_grid, total = device(name), host.load("grid"), 0, 0
    for cell in CELLS:
        for dtype in ("float32", "bfloat16", "float16"):
            for directions, packed in LAYERS.values():
                for batch in BATCHES:
                    for hidden in SIZES:
                        s = shape(cell, dtype, B=batch, H=hidden, D=directions, packed=packed)
                        for backward in (False, True):
                            plan = module.plan(s, d, backward)
                            total += 1
                            by_grid += plan["engine"] == "grid"
                            assert plan["why"].startswith(plan["engine"] + ": "), plan
                            assert plan["engine"] in ("step", "grid")
                            assert plan["engine"] == "step" or not faults(plan, s, d), faults(plan, s, d)
    print(f"{name}: grid engine for {by_grid} of {total} plans")
    assert by_grid > total * (0.5 if name == "RTX 5070" else 0.75)


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("cell", CELLS)
def test_sizes_that_are_promised_on_an_h100(cell, backward):
    """16-bit cells to H = 2048 and to B = 128 at H = 1024; half of H in TF32, whose weights take twice the space."""
    for dtype, largest in (("bfloat16", 2048), ("float16", 2048), ("float32", 1024)):
        for batch, hidden in ((1, largest), (16, largest), (64, largest // 2), (128, largest // 2)):
            plan = host.load("grid").plan(shape(cell, dtype, B=batch, H=hidden), device("H100 SXM"), backward)
            assert plan["engine"] == "grid", plan


def test_a_large_batch_of_wide_rows_takes_one_product_a_step():
    for options, backward in (({"B": 64, "H": 2048}, True), ({"cell": "rnn_tanh", "B": 128, "H": 2048, "D": 2}, False)):
        plan = host.load("grid").plan(shape(**options), device("H200"), backward)
        assert plan["engine"] == "step" and "batch is large" in plan["why"], plan
    assert host.load("grid").plan(shape(B=64, H=2048), device("H200"), False)["engine"] == "grid"


REASONS = {
    "float64": ({"dtype": "float64"}, "float64"),
    "float32 without TF32": ({"dtype": "float32", "tf32": False}, "TF32"),
    "projection": ({"P": 512}, "projection"),
    "one step": ({"T": 1}, "single time step"),
    "empty batch": ({"B": 0}, "empty"),
    "large batch": ({"B": 4096}, "batch is large"),
    "many units": ({"H": 4096}, "more SMs"),
    "weights": ({"dtype": "float32", "H": 2048}, "do not fit"),
}


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("reason", REASONS)
def test_step_by_rule_with_a_reason(reason, backward):
    options, text = REASONS[reason]
    plan = host.load("grid").plan(shape(**options), device("H100 SXM"), backward)
    assert plan["engine"] == "step" and plan["why"].startswith("step: ") and text in plan["why"], plan


@pytest.mark.parametrize("backward", (False, True))
def test_options_take_the_grid_but_for_norms(backward):
    plan = host.load("grid").plan(shape() | {"options": True, "norms": True}, device("H100 SXM"), backward)
    assert plan["engine"] == "step" and "by norm" in plan["why"]
    with_options, plain = (
        host.load("grid").plan(shape() | {"options": on}, device("H100 SXM"), backward) for on in (True, False)
    )
    assert with_options["engine"] == plain["engine"] == "grid"
    assert with_options["shared_bytes"] > plain["shared_bytes"]  # h is carried too


def test_step_on_gpus_that_are_too_small_or_too_old():
    for change, text in (
        ({"cc": 75}, "older than sm_80"),
        ({"registers_per_sm": 32768}, "smaller than a block"),
        ({"shared_per_block": 16 << 10}, "do not fit"),
        ({"sms": 63}, "more SMs"),
    ):
        plan = host.load("grid").plan(shape(), device("H100 SXM") | change, False)
        assert plan["engine"] == "step" and text in plan["why"], plan


@pytest.mark.parametrize("hidden", (1, 15, 16, 17, 33, 100, 1000, 1023))
@pytest.mark.parametrize("batch", (1, 7, 9, 17, 33, 100, 127))
def test_sizes_that_divide_by_nothing(hidden, batch):
    for cell in CELLS:
        for backward in (False, True):
            for name in ("H100 SXM", "A100"):
                s = shape(cell, B=batch, H=hidden, D=2)
                plan = host.load("grid").plan(s, device(name), backward)
                if batch > 64 and "batch is large" in plan["why"]:
                    continue
                assert plan["engine"] == "grid" and not faults(plan, s, device(name)), plan


def test_the_batch_spreads_over_idle_sms():
    plan = host.load("grid").plan(shape(B=16, H=512), device("H100 SXM"), False)
    assert (plan["ctas"], plan["tiles"], plan["batch_tile"]) == (32, 2, 8)
    plan = host.load("grid").plan(shape(B=128, H=512), device("H100 SXM"), False)
    assert (plan["units_per_cta"], plan["ctas"], plan["tiles"], plan["batch_tile"]) == (16, 32, 4, 32)


def test_directions_one_after_the_other_where_both_do_not_fit():
    plan = host.load("grid").plan(shape(H=2048, D=2), device("H100 SXM"), False)
    assert (plan["engine"], plan["directions"], plan["ctas"]) == ("grid", 1, 128)
    plan = host.load("grid").plan(shape(H=1024, D=2), device("H100 SXM"), False)
    assert plan["directions"] == 2
    assert plan["workspace_bytes"] % 2 == 0 and math.gcd(plan["workspace_bytes"], 256) >= 128


def test_workspace_of_directions_in_turn_is_for_all():
    s = shape(H=2048, D=2)
    one, both = (host.load("grid").plan(s | {"directions": n}, device("H100 SXM"), True) for n in (1, 2))
    assert both["workspace_bytes"] == 2 * one["workspace_bytes"]
