"""Host execution of CUDA kernels: every primitive of csrc/cuda/simt.cuh on a small kernel, and what is reported when a
kernel is broken. The kernels are in csrc/testing/simt_kernels.h. Seeds are in the names of the tests."""

from collections.abc import Callable
from typing import NamedTuple

import host
import numpy as np
import pytest

SEEDS = [0, 1, 2, 3, 4]
needs_tracking = pytest.mark.skipif(host.SANITIZE, reason="the sanitizers find it in their own way")


@pytest.fixture(scope="session")
def simt():
    return host.load("simt")


def draw(n: int) -> np.ndarray:
    """Multiples of 1/8 that every 16-bit type holds, and whose products' sums are exact."""
    return (np.random.default_rng(n).integers(-16, 17, n) / 8).astype(np.float32)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def shuffles(x: np.ndarray) -> np.ndarray:
    warps, lanes = x.reshape(-1, 32), np.arange(32)
    bits = (warps > 0) @ (np.int64(1) << lanes)
    y = np.empty((*warps.shape, 8))
    y[..., 0] = warps[:, lanes * 7 % 32]
    y[..., 1] = warps[:, lanes ^ 5]
    y[..., 2] = warps[:, np.where(lanes + 3 < 32, lanes + 3, lanes)]
    y[..., 3] = (bits & 0xFFFF)[:, None]
    y[..., 4] = (bits >> 16)[:, None]
    y[..., 5] = warps[:, np.where(lanes < 16, 3, 20)]
    y[..., 6] = warps[:, lanes ^ 1]
    y[..., 7] = warps[:, 31:] + 0.25
    return y.ravel()


def product(k: int) -> Callable[[np.ndarray], np.ndarray]:
    def result(x: np.ndarray) -> np.ndarray:
        a, b, c = np.split(x, [16 * k, 16 * k + 8 * k])
        return (a.reshape(16, k) @ b.reshape(k, 8) + c.reshape(16, 8)).ravel()

    return result


def tile(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    return (values[:256].reshape(16, 16) @ values[256:].reshape(16, 8)).ravel()


def smooth(x: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        x = np.float32(0.5) * (x + np.roll(x, -1))
    return x


class Case(NamedTuple):
    x: np.ndarray
    result: Callable[[np.ndarray], np.ndarray]
    blocks: int
    threads: int
    n: int = 0
    shared_bytes: int = 0
    cluster: int = 1
    sorts: bool = False  # the order of the output is free


TILE = bf16_bits(draw(384)).view(np.float32)
CASES = {
    "reverse": Case(draw(240), lambda x: x.reshape(5, 48)[:, ::-1].ravel(), 5, 48, shared_bytes=192),
    "reverse_static": Case(draw(192), lambda x: x.reshape(3, 64)[:, ::-1].ravel(), 3, 64),
    "quads": Case(draw(480), lambda x: x.reshape(5, 96)[:, ::-1].ravel(), 5, 24, shared_bytes=480),
    "warp": Case(draw(192), shuffles, 2, 96, shared_bytes=384),
    "mma_bf16": Case(draw(512), product(16), 1, 32),
    "mma_f16": Case(draw(512), product(16), 1, 32),
    "mma_tf32": Case(draw(320), product(8), 1, 32),
    "tile": Case(TILE, tile, 1, 32, shared_bytes=768),
    "ring": Case(draw(512), lambda x: smooth(x, 9), 8, 64, n=9),
    "ring_barrier": Case(draw(512), lambda x: smooth(x, 9), 8, 64, n=9),
    "cluster": Case(draw(384), lambda x: np.roll(x.reshape(2, 3, 64), -1, 1).ravel(), 6, 64, 0, 256, 3),
    "mail": Case(draw(128), lambda x: x * 0 + np.tile(x.reshape(4, 32).sum(0), 4), 4, 32, 4, 384, 4),
    "arrive": Case(draw(96), lambda x: x.reshape(2, 48)[:, ::-1].ravel(), 2, 48, shared_bytes=208),
    "take_places": Case(draw(160), np.sort, 5, 32, sorts=True),
}


def run(simt, kernel: str, seed: int, broken: str = "whole", case: Case | None = None) -> np.ndarray:
    c = case or CASES[kernel]
    options = {"shared_bytes": c.shared_bytes, "cluster": c.cluster, "seed": seed, "broken": broken}
    y = simt.simt(kernel, c.x, c.result(c.x).size, c.n, c.blocks, c.threads, options)
    return np.sort(y) if c.sorts else y


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", CASES)
def test_primitive(simt, kernel, seed):
    np.testing.assert_array_equal(run(simt, kernel, seed), CASES[kernel].result(CASES[kernel].x))


def test_hundreds_of_steps_over_a_thousand_threads(simt):
    case = Case(draw(1024), lambda x: smooth(x, 300), 8, 128, n=300)
    np.testing.assert_array_equal(run(simt, "ring", 7, case=case), case.result(case.x))


def test_the_seed_decides_the_order(simt):
    def places(seed: int) -> tuple:
        x = np.arange(160, dtype=np.float32)
        return tuple(simt.simt("take_places", x, 160, 0, 5, 32, {"seed": seed}))

    assert len({places(seed) for seed in SEEDS}) == len(SEEDS)
    assert places(3) == places(3)


# What is left out of a kernel, and what the report says.
BROKEN = [
    ("reverse", "no_barrier", "nothing was written there|race with a read"),
    ("reverse", "divergent", "divergent barrier: .*ha(s|ve) ended|divergent barrier: ends, while"),
    ("reverse", "other_barrier", r"divergent barrier: in block_sync at simt_kernels.h:\d+, while .* is in the one at"),
    ("reverse", "out_of_range", r"reads 4 bytes, byte 192 of shared memory of block .* \(192 bytes\): out of range"),
    ("reverse", "unwritten", "reads 4 bytes, byte 12 of shared memory .* nothing was written there"),
    ("reverse", "misaligned", "byte 10 of shared memory .* misaligned"),
    ("reverse", "short", r"nothing was written to byte 4 of y \(960 bytes\)"),
    ("reverse_static", "no_barrier", "nothing was written there|race with a read"),
    ("reverse_static", "out_of_range", r"byte 256 of s of block .* \(256 bytes\): out of range"),
    ("reverse_static", "unwritten", "byte 12 of s of block .* nothing was written there"),
    ("quads", "out_of_range", "writes 4 bytes, byte .* of shared memory .* out of range"),
    ("quads", "unwritten", "byte 398 of shared memory .* nothing was written there"),
    ("quads", "short", r"nothing was written to byte 16 of y \(1920 bytes\)"),
    ("warp", "no_barrier", "nothing was written there|race with a (read|write)"),
    ("warp", "divergent", "lane 5 has ended|ends, while other lanes of its warp wait for it in shfl"),
    ("warp", "other_barrier", "divergent warp"),
    ("warp", "out_of_range", "shuffles from lane 3, which takes no part"),
    ("mma_bf16", "divergent", "lane 7 has ended|ends, while other lanes of its warp wait for it in mma"),
    ("tile", "no_wait", "an asynchronous copy to them is not finished"),
    ("tile", "no_barrier", "not finished|nothing was written there|race with a write"),
    ("tile", "misaligned", "misaligned"),
    ("ring", "no_barrier", "nothing was written there|race with a (read|write)"),
    ("ring", "no_wait", "nothing was written there|race with a (read|write)"),
    ("ring", "no_signal", r"deadlock: .*wait_acquire at simt_kernels.h:\d+"),
    ("ring", "poll", "does it poll without wait_acquire"),
    ("ring_barrier", "no_barrier", "nothing was written there|race with a (read|write)"),
    ("cluster", "no_barrier", "nothing was written there|race with a (read|write)"),
    ("cluster", "out_of_range", "map_shared: block . of a cluster of 3"),
    ("cluster", "leave", "its block has ended|race with a read"),
    ("mail", "no_wait", "asynchronous copy|nothing was written there|race with a (read|write)"),
    ("mail", "no_barrier", "asynchronous copy|race with a (read|write)"),
    ("arrive", "no_barrier", "not initialised|nothing was written there|race with a (read|write)"),
    ("arrive", "no_wait", "nothing was written there|race with a (read|write)"),
    ("arrive", "no_signal", "deadlock: .*mbarrier_wait"),
]


@needs_tracking
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel, broken, report", BROKEN, ids=[f"{k}-{b}" for k, b, _ in BROKEN])
def test_a_broken_kernel_is_reported(simt, kernel, broken, report, seed):
    with pytest.raises(simt.Fault, match=report) as error:
        run(simt, kernel, seed, broken)
    assert broken == "short" or "block (" in str(error.value)
    run(simt, kernel, seed)  # the next launch starts afresh


@pytest.mark.parametrize("kernel", ["mma_bf16", "mma_f16", "mma_tf32"])
def test_swapped_fragment_registers_show(simt, kernel):
    wrong = run(simt, kernel, 0, "swapped") != CASES[kernel].result(CASES[kernel].x)
    assert wrong.mean() > 0.5


@needs_tracking
def test_edited_sources_stand_in_for_a_while(simt):
    """How tests break the engines: as an edit of their sources."""
    simt_kernels = "testing/simt_kernels.h"
    edits = host.edited((simt_kernels, "y[1] = shfl_xor(x, 5);", "y[1] = shfl_xor(x, 4);"))
    with host.changed("simt", "shuffle", edits) as broken:
        assert host.load("simt") is broken and broken is not simt
        wrong = (run(broken, "warp", 0) != CASES["warp"].result(CASES["warp"].x)).reshape(-1, 8)
        assert wrong[:, 1].any() and not wrong[:, [0, *range(2, 8)]].any()
    assert host.load("simt") is simt
    with pytest.raises(ValueError, match="0 times"):
        host.edited((simt_kernels, "no such text", ""))


def test_launch_limits(simt):
    case = CASES["reverse"]
    for wrong, message in [
        ({"threads": 1056}, "1056"),
        ({"blocks": 0}, "grid of"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory"),
        ({"cluster": 2}, "clusters of 2"),
    ]:
        with pytest.raises(simt.Fault, match=message):
            run(simt, "reverse", 0, case=case._replace(**wrong))


def edges(bits: np.ndarray, width: int) -> np.ndarray:
    """float32 at, just below and just above every value of a coarser type given as float32 bits."""
    half = 1 << (width - 1)
    near = np.concatenate([bits + np.uint32(d) for d in (0, half - 1, half, half + 1)])
    return near.astype(np.uint32).view(np.float32)


def test_conversions_round_as_the_device_does(simt):
    every = np.arange(1 << 16, dtype=np.uint32)
    halves = every.astype(np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(simt.of_f16(every.astype(np.uint16)), halves.astype(np.float32))
        x = np.concatenate([edges(halves.astype(np.float32).view(np.uint32), 13), draw(1000) * np.float32(2e-8)])
        ours = simt.to_f16(x).astype(np.uint16).view(np.float16)
        np.testing.assert_array_equal(ours, x.astype(np.float16))
        x = edges(every << 16, 16)
        finite = x[np.isfinite(x)]
        ours = (simt.to_bf16(finite).astype(np.uint32) << 16).view(np.float32)
    bits = finite.view(np.uint32).astype(np.uint64)
    expected = (((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(ours, expected)
    assert np.isnan((simt.to_bf16(np.float32([np.nan])).astype(np.uint32) << 16).view(np.float32)).all()
    # TF32 rounds ties away from zero.
    x = np.float32([1, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 - 2**-20, -1 - 2**-11, np.inf])
    expected = np.float32([1, 1 + 2**-10, 1 + 2**-9, 1, -1 - 2**-10, np.inf])
    np.testing.assert_array_equal(simt.to_tf32(x).astype(np.uint32).view(np.float32), expected)
