"""Forecasting: the electricity demand of the next 24 hours, from the last week.

    python examples/forecast.py --plot forecast.png

Demand in England and Wales every half-hour from 5 June to 27 August 2000, in megawatts (Taylor 2003): 84 days, the last
14 to test, the 7 before to watch. The layer reads a week of it, T = 336, with the time of the day and of the week, and
at every step says how the next 48 half-hours will differ from the same ones a week before. So a window has hundreds of
forecasts to learn from, and a test needs one call for many origins. Error: mean absolute percentage error (MAPE) of
all 48 half-hours, from each origin in the test part.

Baselines: the same half-hour yesterday, and a week before.

Needs: pip install tqdm matplotlib, and pip install --no-deps pmdarima (for its data only: it is not imported)
"""

import ast
import math
from collections.abc import Iterator
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

import seqkern

DAY, WEEK = 48, 7 * 48
AHEAD = DAY  # half-hours to say
WARM_UP = DAY  # steps of a window whose forecasts do not count: the layer has seen too little
TEST, WATCH = 2 * WEEK, WEEK
INSTALL = "pip install --no-deps pmdarima"


class Series(NamedTuple):
    demand: Tensor  # [N] megawatts
    x: Tensor  # [N, 6]: what the layer reads at each half-hour
    difference: Tensor  # [N, 48]: the next half-hours less those a week before, in `scale`; NaN where unknown
    scale: float


class Forecaster(nn.Module):
    def __init__(self, cell: str, hidden: int):
        super().__init__()
        self.rnn = getattr(seqkern, cell)(6, hidden)
        self.dropout = nn.Dropout(0.2)
        self.ahead = nn.Linear(hidden, AHEAD)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, 48] from x [T, B, 6]: at each step, the next half-hours' differences from a week before."""
        y, _ = self.rnn(x)
        return self.ahead(self.dropout(y))


def read() -> Tensor:
    """Demand [4032]: the longest list of numbers in the package's source file."""
    source = common.package_file("pmdarima", "datasets/taylor.py", INSTALL).read_text()
    lists = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.List)]
    return torch.tensor(ast.literal_eval(max(lists, key=lambda node: len(node.elts))), dtype=torch.float32)


def prepare(demand: Tensor) -> Series:
    known = demand[: len(demand) - TEST - WATCH]  # what may be used to normalise
    n = torch.arange(len(demand))
    phases = [2 * math.pi * n / period for period in (DAY, WEEK)]
    last_week = torch.cat([demand[:WEEK], demand[:-WEEK]])
    scale = float((known[WEEK:] - known[:-WEEK]).std())
    values = [(demand - known.mean()) / known.std(), (demand - last_week) / scale]
    x = torch.stack([*values, *(f(p) for p in phases for f in (torch.sin, torch.cos))], -1)
    differences = torch.cat([values[1].masked_fill(n < WEEK, math.nan), torch.full((AHEAD,), math.nan)])
    difference = differences.unfold(0, AHEAD, 1)[1:]  # row n: n+1 to n+48
    return Series(demand, x, difference, scale)


def windows(series: Series, starts: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, B, 6] and the differences that follow each step [T, B, 48], T a week."""
    rows = torch.arange(WEEK).unsqueeze(1) + starts
    return series.x[rows], series.difference[rows]


def batches(series: Series, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows whose last forecast ends before the watched part."""
    generator = torch.Generator().manual_seed(seed)
    last = len(series.demand) - TEST - WATCH - AHEAD - WEEK
    while True:
        yield windows(series, torch.randint(WEEK, last + 1, (size,), generator=generator))


def loss_of(model: Forecaster, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, difference = batch
    return l1_loss(model(x)[WARM_UP:], difference[WARM_UP:])


def forecast(model: Forecaster, series: Series, origins: Tensor) -> Tensor:
    """Megawatts [B, 48] after each of the half-hours `origins` [B], from the week up to it."""
    x, _ = windows(series, origins - WEEK + 1)
    with torch.no_grad():
        return same_last(series, origins, WEEK) + series.scale * model(x)[-1]


def same_last(series: Series, origins: Tensor, period: int) -> Tensor:
    """The same half-hours a day or week before [B, 48]."""
    return series.demand[origins.unsqueeze(1) + torch.arange(1, AHEAD + 1) - period]


def truth(series: Series, origins: Tensor) -> Tensor:
    return series.demand[origins.unsqueeze(1) + torch.arange(1, AHEAD + 1)]


def watched_origins(series: Series) -> Tensor:
    """Every two hours of the week before the test part."""
    end = len(series.demand) - TEST
    return torch.arange(end - WATCH - 1, end - AHEAD, 4)


def errors(forecasts: Tensor, series: Series, origins: Tensor) -> Tensor:
    """Mean absolute percentage error at each of the 48 horizons."""
    wanted = truth(series, origins)
    return 100 * ((forecasts - wanted).abs() / wanted).mean(0)


def scores(forecasts: Tensor, series: Series, origins: Tensor) -> dict[str, str]:
    by_horizon = errors(forecasts, series, origins)
    off = (forecasts - truth(series, origins)).abs().mean()
    first = {f"MAPE {h / 2:g} h, %": f"{by_horizon[h - 1]:.2f}" for h in (2, 12, AHEAD)}
    return {"MAPE, %": f"{by_horizon.mean():.2f}", "MAE, MW": f"{off:.0f}", **first}


def plot(runs: list[common.Run], series: Series, origins: Tensor, path: str) -> None:
    """The error while training; three days' forecasts, each made at midnight; the error by horizon."""
    watched = watched_origins(series)
    naive = float(errors(same_last(series, watched, WEEK), series, watched).mean())
    figure, axes = common.figure(runs, "MAPE in the week before the test, %", 2, ("a week before", naive))
    midnights = len(series.demand) - TEST - 1 + DAY * torch.arange(4, 7)  # the test part starts on a Monday
    hours, ahead = torch.arange(len(midnights) * DAY) / 2, torch.arange(1, AHEAD + 1) / 2
    axes[1].plot(hours, truth(series, midnights).flatten() / 1000, color="#bbbbbb", linewidth=4, label="truth")
    grey = {"color": common.GREY, "linestyle": ":", "label": "a week before"}
    axes[1].plot(hours, same_last(series, midnights, WEEK).flatten() / 1000, **grey)
    axes[2].plot(ahead, errors(same_last(series, origins, WEEK), series, origins), **grey)
    for r in runs:
        style = {"color": common.COLORS[r.cell], "label": r.cell}
        axes[1].plot(hours, forecast(r.model, series, midnights).flatten() / 1000, linewidth=1.2, **style)
        axes[2].plot(ahead, errors(forecast(r.model, series, origins), series, origins), **style)
    axes[1].set(title="each day forecast at its midnight", ylabel="gigawatts", xticks=[12, 36, 60])
    axes[1].set_xticklabels(["Friday", "Saturday", "Sunday"])
    axes[2].set(title="test part, by horizon", xlabel="hours ahead", ylabel="MAPE, %", ylim=(0, None))
    for axis in axes[1:]:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = common.arguments(__doc__, updates=150, quick=20)
    parser.add_argument("--hidden", type=int, default=64)
    a = common.parse(parser)
    series = prepare(read())
    end = len(series.demand)
    watched = watched_origins(series)
    origins = torch.arange(end - TEST - 1, end - AHEAD)
    runs = []
    for cell in a.cell:
        torch.manual_seed(a.seed)
        check = lambda model: float(errors(forecast(model, series, watched), series, watched).mean())  # noqa: E731
        model = Forecaster(cell, a.hidden)
        runs.append(r := common.train(cell, model, batches(series, 32, a.seed), loss_of, check, a.updates))
        r.scores.update(scores(forecast(r.model, series, origins), series, origins))
    naive = {"yesterday": DAY, "a week before": WEEK}
    print(
        common.table(runs, {name: scores(same_last(series, origins, p), series, origins) for name, p in naive.items()})
    )
    if a.plot:
        plot(runs, series, origins, a.plot)


if __name__ == "__main__":
    main()
