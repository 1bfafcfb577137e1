"""examples/forecast.py: the series, what a forecast may know, and a short training against a week before."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="the examples' progress bar, PyPI tqdm, is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import common  # noqa: E402
import forecast as example  # noqa: E402

END = 4032


@pytest.fixture(scope="module")
def series():
    try:
        return example.prepare(example.read())
    except SystemExit as error:
        pytest.skip(str(error))


def test_the_series(series):
    assert series.demand.shape == (END,) and series.demand[:3].tolist() == [22262, 21756, 22247]
    n, h = 1000, 7
    expected = (series.demand[n + h] - series.demand[n + h - example.WEEK]) / series.scale
    torch.testing.assert_close(series.difference[n, h - 1], expected)
    assert series.difference[example.WEEK - 1 : END - example.AHEAD].isfinite().all()


def test_training_does_not_see_what_is_tested(series):
    """Another demand in the watched and the test part changes nothing that training reads or wants."""
    changed = series.demand.clone()
    changed[END - example.TEST - example.WATCH :] += 5000
    ours, theirs = (example.batches(s, 64, 3) for s in (series, example.prepare(changed)))
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(next(ours), next(theirs), strict=True))


def test_a_forecast_does_not_see_its_future(series):
    model, origins = example.Forecaster("GRU", 8).eval(), torch.tensor([3500, 3600])
    changed = series.demand.clone()
    changed[3501:3600] += 3000
    ours, theirs = (example.forecast(model, s, origins) for s in (series, example.prepare(changed)))
    torch.testing.assert_close(ours[0], theirs[0])
    assert (ours[1] - theirs[1]).abs().max() > 100


def test_baselines_by_hand(series):
    origins = torch.tensor([3000])
    week = example.same_last(series, origins, example.WEEK)
    assert week[0, 0] == series.demand[3001 - 336] and week[0, -1] == series.demand[3048 - 336]
    off = example.errors(week, series, origins)
    assert off[0] == pytest.approx(float(100 * abs(week[0, 0] - series.demand[3001]) / series.demand[3001]))


def test_a_short_training(series, tmp_path):
    origins = torch.arange(END - example.TEST - 1, END - example.AHEAD, 6)
    score = lambda forecasts: float(example.errors(forecasts, series, origins).mean())  # noqa: E731
    check = lambda model: score(example.forecast(model, series, origins))  # noqa: E731
    batches = example.batches(series, 8, 0)
    run = common.train("GRU", example.Forecaster("GRU", 24), batches, example.loss_of, check, 40, rate=1e-2)
    assert run.curve[-1][1] < score(example.same_last(series, origins, example.WEEK))
    assert run.curve[-1][1] < 0.4 * score(example.same_last(series, origins, example.DAY))
    pytest.importorskip("matplotlib")
    example.plot([run], series, origins, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
