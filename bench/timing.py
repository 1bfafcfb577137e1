"""Paired timing of two callables, and the statistics of what was measured."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Run = Callable[[], object]
Sample = Callable[[Run, int], float]  # a callable and how often to call it, to seconds per call


def percentile(samples: Sequence[float], p: float) -> float:
    """The p-th percentile (0 to 100), linear between the two nearest samples."""
    if not samples:
        raise ValueError("percentile wants at least one sample, got none")
    ordered = sorted(samples)
    at = (len(ordered) - 1) * p / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(samples: Sequence[float]) -> float:
    return percentile(samples, 50)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the true median with at least 95 % confidence, from order statistics.

    The number of samples below the median is Binomial(n, 1/2) whatever the distribution, so the samples with k others
    below and with k others above enclose it with confidence 1 - 2 P(Binomial(n, 1/2) <= k). Below 6 samples no k
    reaches 95 %, and the whole range is returned.
    """
    ordered = sorted(samples)
    n = len(ordered)
    k, tail = 0, 0.5**n
    while tail <= 0.025:
        k += 1
        tail += math.comb(n, k) * 0.5**n
    k = max(k - 1, 0)
    return ordered[k], ordered[n - 1 - k]


def geomean(values: Sequence[float]) -> float:
    """The geometric mean: 2x faster and 2x slower cancel."""
    if not values:
        raise ValueError("geomean wants at least one value, got none")
    return math.exp(sum(map(math.log, values)) / len(values))


@dataclass(frozen=True)
class Budget:
    """When a case has been measured for long enough: `samples` of each side, but at least `low` and at most `high`
    seconds in all, and always one round."""

    samples: int = 30
    low: float = 0.5
    high: float = 4.0


FULL = Budget()
QUICK = Budget(samples=12, low=0.1, high=0.8)


@dataclass
class Paired:
    ours: list[float] = field(default_factory=list)  # seconds per call
    peer: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # peer / ours, one per A B B A round

    def summary(self) -> dict[str, float]:
        """Milliseconds of both sides, and the ratio: the median over the rounds, with the interval of that median.

        The ratio of a round compares samples taken within moments of each other, so a slow spell of the machine
        moves both; it may differ a little from peer_ms / ms.
        """
        low, high = median_interval(self.ratios)
        if len(self.ratios) < 6:  # too few for any confidence: everything that the samples allow
            low, high = min(self.peer) / max(self.ours), max(self.peer) / min(self.ours)
        return {
            "ms": median(self.ours) * 1e3,
            "p10": percentile(self.ours, 10) * 1e3,
            "p90": percentile(self.ours, 90) * 1e3,
            "peer_ms": median(self.peer) * 1e3,
            "peer_p10": percentile(self.peer, 10) * 1e3,
            "peer_p90": percentile(self.peer, 90) * 1e3,
            "ratio": median(self.ratios),
            "ratio_low": low,
            "ratio_high": high,
            "samples": len(self.ours),
        }


def clock(run: Run, calls: int) -> float:
    """Seconds per call by this process's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def cpu_time(run: Run, calls: int) -> float:
    """Seconds per call that the process spent on the CPU: for one thread on a machine with other work."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def _warm(run: Run, sample: Sample, span: float = 1e-3) -> tuple[float, int]:
    """Calls until caches, pools and pages are there; returns a call's duration and how many make `span` seconds."""
    first = sample(run, 1)
    if first > 0.5:
        return first, 1
    sample(run, max(2, min(20, int(0.02 / first))))
    duration = sample(run, 1)
    return duration, max(1, min(1000, math.ceil(span / duration)))


def paired(
    ours: Run,
    peer: Run,
    budget: Budget,
    sample: Sample = clock,
    linger: float = 5e-3,
) -> Paired:
    """Times two callables in turn, A B B A, until the budget is used.

    A thread pool spins for a while after its last task, on the cores that the other side is about to use. So each
    change of sides waits `linger` seconds, longer than the pools spin, and where calls are short makes one untimed call
    that wakes the side's own pool.
    """
    durations, counts = zip(_warm(ours, sample), _warm(peer, sample), strict=True)
    sides, result = (ours, peer), Paired()
    samples = (result.ours, result.peer)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, current = time.perf_counter(), 1
        while True:
            for side in (0, 1, 1, 0):
                if side != current:
                    time.sleep(linger)
                    if durations[side] < 1e-2:
                        sample(sides[side], 1)
                    current = side
                samples[side].append(sample(sides[side], counts[side]))
            result.ratios.append(sum(result.peer[-2:]) / sum(result.ours[-2:]))
            elapsed = time.perf_counter() - start
            if elapsed >= budget.high or (len(result.ours) >= budget.samples and elapsed >= budget.low):
                return result
    finally:
        if collecting:
            gc.enable()
