"""exp, tanh and sigmoid of the instruction set in use, against values with more digits than they have."""

import mpmath
import pytest
import torch

FUNCTIONS = {"exp": mpmath.exp, "tanh": mpmath.tanh, "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x))}
DTYPES = [torch.float32, torch.float64]
# Measured over 28 million float32 values: exp 1.1, tanh 2.1, sigmoid 1.8; over 40 000 float64 values: 1.8, 4.1, 2.0.
BOUND_ULP = {torch.float32: 3.0, torch.float64: 5.0}
names = pytest.mark.parametrize("name", FUNCTIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
INF, NAN = float("inf"), float("nan")


def evaluate(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.seqkern._cpu_math(x, name)


def error_ulp(name: str, x: torch.Tensor) -> torch.Tensor:
    """The distance from the exact value, in units of the dtype's spacing at the exact value."""
    got = evaluate(name, x)
    digits = {torch.float32: 24, torch.float64: 53}[x.dtype]
    errors = []
    with mpmath.workprec(160):
        for a, b in zip(x.tolist(), got.tolist(), strict=True):
            exact = FUNCTIONS[name](mpmath.mpf(a))
            errors.append(float(abs(b - exact) / mpmath.ldexp(1, mpmath.frexp(exact)[1] - digits)) if exact else abs(b))
    return torch.tensor(errors, dtype=torch.float64)


def samples(dtype: torch.dtype, bound: float, count: int = 6000) -> torch.Tensor:
    """Evenly spread over the line and over the exponents, both signs."""
    even = torch.linspace(-bound, bound, count // 2, dtype=torch.float64)
    small = torch.logspace(-10, torch.tensor(bound).log10().item(), count // 4, dtype=torch.float64)
    drawn = torch.empty(count // 4, dtype=torch.float64).uniform_(-bound, bound)
    return torch.cat([even, small, -small, drawn]).clamp(-bound, bound).to(dtype)


@names
@dtypes
def test_error_where_cells_work(name, dtype):
    """|x| < 8, where most arguments of a gate lie."""
    assert error_ulp(name, samples(dtype, 8.0)).max() <= BOUND_ULP[dtype]


@names
def test_error_over_many_float32_values(name):
    """A million float32 values in |x| < 8 against float64, whose own error is far below a float32 ulp."""
    x = torch.empty(1_000_000).uniform_(-8, 8)
    exact = getattr(torch, name)(x.double())
    ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    assert ((evaluate(name, x).double() - exact).abs() / ulp).max() <= BOUND_ULP[x.dtype]


@names
@dtypes
def test_error_over_the_whole_range(name, dtype):
    """Beyond |x| = 8 the error stays small as long as the result is a normal number; below, it may be flushed to 0."""
    limit = {torch.float32: 87.0, torch.float64: 708.0}[dtype]
    assert error_ulp(name, samples(dtype, limit, 2000)).max() <= BOUND_ULP[dtype]
    tiny = torch.finfo(dtype).smallest_normal
    low = evaluate(name, torch.linspace(-limit * 1.3, -limit, 1000, dtype=torch.float64).to(dtype))
    if name != "tanh":
        assert (low >= 0).all() and (low <= 4 * tiny).all()


@dtypes
def test_limits(dtype):
    x = torch.tensor([INF, -INF, 1e30, -1e30, torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, NAN], dtype=dtype)
    want = {
        "exp": [INF, 0, INF, 0, INF, 0, 1, NAN],
        "tanh": [1, -1, 1, -1, 1, -1, 0, NAN],
        "sigmoid": [1, 0, 1, 0, 1, 0, 0.5, NAN],
    }
    for name, values in want.items():
        torch.testing.assert_close(evaluate(name, x), torch.tensor(values, dtype=dtype), rtol=0, atol=0, equal_nan=True)


@dtypes
def test_values_stay_in_range(dtype):
    """No rounding carries a gate outside [0, 1] or a tanh outside [-1, 1], nor exp below 0."""
    x = torch.cat([samples(dtype, 40.0), samples(dtype, 800.0)])
    assert (evaluate("tanh", x).abs() <= 1).all()
    assert ((evaluate("sigmoid", x) >= 0) & (evaluate("sigmoid", x) <= 1)).all()
    assert (evaluate("exp", x) >= 0).all()


@dtypes
def test_tanh_is_odd_and_exact_near_zero(dtype):
    info = torch.finfo(dtype)
    x = torch.logspace(-300 if dtype == torch.float64 else -37, 1, 3000, dtype=torch.float64).to(dtype)
    assert torch.equal(evaluate("tanh", -x), -evaluate("tanh", x))
    assert error_ulp("tanh", x).max() <= BOUND_ULP[dtype]
    denormal = torch.tensor([1.0, 2.0, 3.0, 1000.0], dtype=dtype) * (info.smallest_normal * info.eps)
    below = torch.cat([denormal, -denormal, torch.tensor([info.smallest_normal], dtype=dtype)])
    assert torch.equal(evaluate("tanh", below), below)
    negative_zero = evaluate("tanh", torch.tensor([-0.0], dtype=dtype))
    assert negative_zero.item() == 0 and negative_zero.signbit().item()


@names
@dtypes
def test_value_does_not_depend_on_the_place_in_the_array(name, dtype):
    """Whole vectors and the tail give the same bits."""
    x = samples(dtype, 12.0, 200)
    want = evaluate(name, x)
    for length in range(1, 70):
        assert torch.equal(evaluate(name, x[:length].clone()), want[:length])
        assert torch.equal(evaluate(name, x[length:].clone()), want[length:])


@dtypes
def test_nan_leaves_its_neighbours_alone(dtype):
    x = samples(dtype, 12.0, 64)
    for name in FUNCTIONS:
        want = evaluate(name, x)
        for place in (0, 5, 63):
            spoilt = x.clone()
            spoilt[place] = NAN
            found = evaluate(name, spoilt)
            assert found[place].isnan()
            found[place] = want[place]
            assert torch.equal(found, want)


COARSE = pytest.mark.parametrize("name", ["tanh", "sigmoid"])


@COARSE
@pytest.mark.parametrize("bound", [1e-3, 8.0, 80.0])
def test_for_bf16_error_is_a_fraction_of_its_rounding(name, bound):
    """As bfloat16's cells compute them, in float32: a sixteenth of bf16's rounding error, 2^-9, near zero too."""
    x = torch.cat([torch.empty(200_000).uniform_(-bound, bound), samples(torch.float32, bound)])
    exact = getattr(torch, name)(x.double())
    found = evaluate(f"{name}_bf16", x)
    assert ((found.double() - exact).abs() <= exact.abs() / 2**13 + torch.finfo(torch.float32).tiny).all()
    assert (found.bfloat16().abs() <= 1).all()


@COARSE
def test_for_bf16_limits(name):
    x = torch.tensor([INF, -INF, 3e38, -3e38, 200, -200, 0.0, NAN])
    want = torch.tensor({"tanh": [1.0, -1, 1, -1, 1, -1, 0, NAN], "sigmoid": [1.0, 0, 1, 0, 1, 0, 0.5, NAN]}[name])
    torch.testing.assert_close(evaluate(f"{name}_bf16", x), want, rtol=2**-13, atol=0, equal_nan=True)


def test_for_bf16_is_for_float32():
    with pytest.raises(RuntimeError, match="tanh_bf16 is for float32, got float64"):
        evaluate("tanh_bf16", torch.zeros(1, dtype=torch.float64))
