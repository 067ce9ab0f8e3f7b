"""The losses of cpo.py, alphapo.py and orpo.py: worked examples, exact values at the extremes, identities."""

import math
from functools import partial
from math import exp, log

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpmath import mp
from torch.testing import assert_close

import cpo
from alphapo import alphapo_loss
from cpo import LOSS_TYPES, cpo_loss
from dpo import dpo_loss
from orpo import log_odds, orpo_loss

fast = settings(max_examples=60, deadline=None, derandomize=True, database=None)
mp.dps = 60


def double(*numbers):
    return [torch.tensor([float(x)], dtype=torch.float64) for x in numbers]


# -------------------------------------------------------------------------------------- worked by hand
# x -.5, y -1.5. At β 2: z = 2 (-.5 + 1.5) = 2. α 1: r(t) = 1 - e^-t, so r(x) = -.64872, r(y) = -3.48169.

R = (1 - exp(0.5)) - (1 - exp(1.5))  # r(x) - r(y) = 2.83297 at α = 1
P, Q = exp(-0.5), exp(-1.5)
WORKED = {
    "cpo": (cpo_loss, {"beta": 2}, log(1 + exp(-2))),
    "cpo, smoothed": (
        cpo_loss,
        {"beta": 2, "label_smoothing": 0.1},
        0.9 * log(1 + exp(-2)) + 0.1 * log(1 + exp(2)),
    ),
    "hinge": (cpo_loss, {"beta": 0.3, "loss_type": "hinge"}, 1 - 0.3 * 1),
    "ipo": (cpo_loss, {"beta": 2, "loss_type": "ipo"}, (1 - 0.25) ** 2),
    "simpo": (cpo_loss, {"beta": 2, "loss_type": "simpo", "simpo_gamma": 0.5}, log(1 + exp(-1.5))),
    "alphapo in cpo": (
        cpo_loss,
        {"beta": 2, "loss_type": "alphapo", "simpo_gamma": 0.5, "alpha": 1},
        log(1 + exp(0.5 - 2 * R)),
    ),
    "cpo with alpha": (cpo_loss, {"beta": 2, "alpha": 1}, log(1 + exp(-2 * R))),
    "hinge with alpha": (cpo_loss, {"beta": 0.3, "loss_type": "hinge", "alpha": 1}, 1 - 0.3 * R),
    "ipo with alpha": (cpo_loss, {"beta": 2, "loss_type": "ipo", "alpha": 1}, (R - 0.25) ** 2),
    "alphapo": (alphapo_loss, {"beta": 2, "gamma": 0.5, "alpha": 1}, log(1 + exp(0.5 - 2 * R))),
    "orpo": (
        orpo_loss,
        {},
        -log(P * (1 - Q) / (P * (1 - Q) + Q * (1 - P))),
    ),  # σ(log odds ratio), multiplied out
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_example(name):
    loss, options, want = WORKED[name]
    assert loss(*double(-0.5, -1.5), **options).item() == pytest.approx(want, rel=1e-12)


# ------------------------------------------------------------------------------------- at the extremes

LOGPS = st.sampled_from([-1e-9, -1e-3, -1.0, -87.0, -90.0, -720.0, -5e4]) | st.floats(-5e4, -1e-9)
ALPHAS = (
    st.sampled_from([0.0, 1e-8, -1e-8, 0.25, -0.5, 2.0, -2.0]) | st.floats(1e-8, 2) | st.floats(-2, -1e-8)
)


def exact(x, y, beta, alpha, gamma):
    """(loss, dx, dy) of AlphaPO, in 60 digits."""
    x, y, beta, alpha, gamma = map(mp.mpf, (x, y, beta, alpha, gamma))
    difference = (mp.exp(-alpha * y) - mp.exp(-alpha * x)) / alpha if alpha else x - y
    z = beta * difference - gamma
    loss = mp.log1p(mp.exp(-z)) if z > -1000 else -z
    push = beta / (1 + mp.exp(z)) if z < 1e6 else mp.mpf(0)
    return loss, -push * mp.exp(-alpha * x), push * mp.exp(-alpha * y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(LOGPS, LOGPS, st.sampled_from([0.01, 0.1, 2.5, 10.0]), ALPHAS)
@example(-5e4, -5e4, 10.0, 2.0)
@example(-5e4, -1e-9, 10.0, 2.0)
@example(-1e-9, -5e4, 10.0, 2.0)
@example(-1e-9, -5e4, 10.0, -2.0)
@example(-90.0, -90.5, 0.01, 1.0)
def test_alphapo_is_exact_or_overflows_where_the_truth_does(dtype, x, y, beta, alpha):
    x, y = (torch.tensor([t], dtype=dtype, requires_grad=True) for t in (x, y))
    loss = alphapo_loss(x, y, beta=beta, gamma=0.5, alpha=alpha)
    got = [loss.item(), *(g.item() for g in torch.autograd.grad(loss.sum(), (x, y)))]
    unit, largest = torch.finfo(dtype).eps, torch.finfo(dtype).max
    # Rounding of exponents and logs moves the result as if x and y were a few units of their last place off.
    slack = 8 * unit * max(abs(x.item()), abs(y.item()), 1) * max(abs(alpha), 1)
    want = exact(x.item(), y.item(), beta, alpha, 0.5)
    corners = [
        exact(x.item() + dx, y.item() + dy, beta, alpha, 0.5)
        for dx in (-slack, slack)
        for dy in (-slack, slack)
    ]
    for i, value in enumerate(got):
        assert not math.isnan(value)
        near = [corner[i] for corner in corners] + [want[i]]
        low, high = min(near), max(near)
        tolerance = (high - low) * 2 + 16 * unit * abs(want[i]) + unit * beta
        if abs(value) >= 0.99 * largest:
            assert max(abs(low), abs(high)) > 0.5 * largest
        else:
            assert low - tolerance <= value <= high + tolerance or max(abs(low), abs(high)) > 0.5 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(LOGPS)
@example(-math.log(2))
def test_log_odds_are_exact_with_their_gradient(dtype, t):
    t = torch.tensor(t, dtype=dtype, requires_grad=True)
    value = log_odds(t)
    (slope,) = torch.autograd.grad(value, t)
    exact_t = mp.mpf(t.item())
    want, want_slope = exact_t - mp.log(-mp.expm1(exact_t)), -1 / mp.expm1(exact_t)
    unit = 4 * torch.finfo(dtype).eps
    assert abs(value.item() - want) <= unit * max(1, abs(want), abs(exact_t))
    assert abs(slope.item() - want_slope) <= unit * 4 * abs(want_slope)


def test_certain_answers_have_finite_odds():
    t = torch.zeros(2, requires_grad=True)
    loss = orpo_loss(t, torch.tensor([-1.0, 0.0]))
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), t)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@fast
@given(LOGPS, LOGPS, st.sampled_from([0.01, 0.1, 2.5, 10.0]), ALPHAS)
def test_all_losses_are_never_nan(dtype, x, y, beta, alpha):
    for loss_type in LOSS_TYPES:
        chosen, rejected = (torch.tensor([t], dtype=dtype, requires_grad=True) for t in (x, y))
        loss = cpo_loss(chosen, rejected, beta=beta, loss_type=loss_type, alpha=alpha)
        for value in (loss, *torch.autograd.grad(loss.sum(), (chosen, rejected))):
            assert not value.isnan().any()
    loss = orpo_loss(chosen, rejected)
    for value in (loss, *torch.autograd.grad(loss.sum(), (chosen, rejected))):
        assert value.isfinite().all()


# ------------------------------------------------------------------------------ equalities, in float64

means = st.lists(st.tuples(st.floats(-30, -1e-3), st.floats(-30, -1e-3)), min_size=4, max_size=4).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64).unbind(1)
)
betas, gammas, smoothings = st.floats(0.01, 10), st.floats(-3, 3), st.floats(0, 0.49)


def equal(actual, expected, **tolerances):
    assert_close(actual, expected, **{"rtol": 1e-9, "atol": 1e-9} | tolerances)


@fast
@given(means, betas, gammas, smoothings)
def test_relatives(logps, beta, gamma, eps):
    x, y = logps
    simpo = cpo_loss(x, y, beta=beta, loss_type="simpo", simpo_gamma=gamma)
    equal(alphapo_loss(x, y, beta=beta, gamma=gamma, alpha=0.0), simpo)
    equal(cpo_loss(x, y, beta=beta, loss_type="simpo"), cpo_loss(x, y, beta=beta))
    uniform = torch.full_like(x, -7.0)
    for loss_type in ("sigmoid", "hinge", "ipo"):
        want = dpo_loss(x, y, uniform, uniform, beta=beta, loss_type=loss_type)
        equal(cpo_loss(x, y, beta=beta, loss_type=loss_type), want)
    want = dpo_loss(x, y, uniform, uniform, beta=beta, label_smoothing=eps)
    equal(cpo_loss(x, y, beta=beta, label_smoothing=eps), want)
    equal(dpo_loss(x, y, uniform, uniform * 2, beta=beta), cpo_loss(x - uniform, y - uniform * 2, beta=beta))
    # swapping chosen and rejected is swapping labels: γ -> -γ, ε -> 1 - ε
    swapped = cpo_loss(y, x, beta=beta, loss_type="simpo", simpo_gamma=-gamma, label_smoothing=eps)
    same = cpo_loss(x, y, beta=beta, loss_type="simpo", simpo_gamma=gamma, label_smoothing=eps)
    z = beta * (x - y) - gamma
    equal(swapped, same + (1 - 2 * eps) * z)


@fast
@given(means, betas, st.floats(-2, 2), st.floats(0.25, 4))
def test_alphapo_identities(logps, beta, alpha, k):
    x, y = logps
    zero = torch.zeros_like(x)
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    equal(
        alphapo_loss(x, y, beta=beta, gamma=0, alpha=alpha), dpo_loss(x, y, zero, zero, beta=beta, **options)
    )
    scaled = alphapo_loss(k * x, k * y, beta=beta, gamma=0.3, alpha=alpha)
    equal(scaled, alphapo_loss(x, y, beta=k * beta, gamma=0.3, alpha=k * alpha), rtol=1e-7)
    in_cpo = cpo_loss(x, y, beta=beta, loss_type="alphapo", simpo_gamma=0.3, alpha=alpha)
    equal(in_cpo, alphapo_loss(x, y, beta=beta, gamma=0.3, alpha=alpha))


@fast
@given(st.tuples(st.floats(-5, -0.01), st.floats(-5, -0.01)), st.floats(0.1, 3), gammas)
def test_alphapo_tends_to_simpo(logps, beta, gamma):
    x, y = double(*logps)
    simpo = cpo_loss(x, y, beta=beta, loss_type="simpo", simpo_gamma=gamma)
    z = beta * (x - y) - gamma
    for alpha in (1e-4, -1e-4):
        rate = -torch.sigmoid(-z) * beta * alpha * (y**2 - x**2) / 2
        found = alphapo_loss(x, y, beta=beta, gamma=gamma, alpha=alpha) - simpo
        equal(found, rate, rtol=0, atol=1e-5 * beta * (1 + beta))


@fast
@given(means, betas, st.floats(-2, -0.05))
def test_a_negative_alpha_bounds_the_margin(logps, beta, alpha):
    loss = alphapo_loss(*logps, beta=beta, gamma=0.0, alpha=alpha)
    assert (
        loss >= torch.nn.functional.softplus(torch.tensor(-beta / abs(alpha), dtype=torch.float64)) - 1e-9
    ).all()


@fast
@given(means, st.floats(-5, 5), betas)
def test_margin_losses_do_not_see_a_common_shift(logps, shift, beta):
    x, y = logps
    for loss_type in LOSS_TYPES:
        want = cpo_loss(x, y, beta=beta, loss_type=loss_type)
        equal(cpo_loss(x + shift, y + shift, beta=beta, loss_type=loss_type), want, rtol=1e-7, atol=1e-7)


@fast
@given(means)
def test_orpo_identities(logps):
    x, y = (t.clone().requires_grad_() for t in logps)
    p, q = x.exp(), y.exp()
    loss = orpo_loss(x, y)
    equal((-loss).exp(), p * (1 - q) / (p * (1 - q) + q * (1 - p)), rtol=1e-7)
    (slope,) = torch.autograd.grad(loss.sum(), x)
    t = log_odds(x) - log_odds(y)
    equal(slope, -torch.sigmoid(-t) / (1 - p), rtol=1e-7)
    equal(orpo_loss(x, x), torch.full_like(x, log(2)))


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0},
        {"loss_type": "dpo"},
        {"label_smoothing": 0.5},
        {"loss_type": "hinge", "label_smoothing": 0.1},
        {"simpo_gamma": 1.0},
    ],
)
def test_what_is_not_defined_is_refused(options):
    with pytest.raises(ValueError):
        cpo_loss(*double(-1, -2), **options)
    with pytest.raises(ValueError):
        alphapo_loss(*double(-1, -2), beta=0)


def test_a_loss_type_that_is_listed_but_has_no_case_is_refused(monkeypatch):
    monkeypatch.setattr(cpo, "LOSS_TYPES", (*LOSS_TYPES, "new"))
    with pytest.raises(ValueError, match="unknown loss_type 'new'"):
        cpo_loss(*double(-1, -2), loss_type="new")


BFLOAT16 = {
    **{f"cpo {name}": partial(cpo_loss, loss_type=name) for name in ("sigmoid", "hinge", "ipo", "simpo")},
    "alphapo": alphapo_loss,
    "orpo": lambda chosen, rejected: orpo_loss(chosen / 1000, rejected / 1000),  # of means over tokens
}


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_stays_finite(name):
    scale = 1000 if name == "alphapo" else 1  # of means, too
    values = torch.tensor([-1e-3, -1.0, -300.0, -1e4, -3e4], dtype=torch.bfloat16) / scale
    chosen, rejected = (t.flatten().requires_grad_() for t in torch.meshgrid(values, values, indexing="ij"))
    losses = BFLOAT16[name](chosen, rejected)
    for found in (losses, *torch.autograd.grad(losses.sum(), (chosen, rejected))):
        assert found.isfinite().all() and found.dtype == torch.bfloat16
