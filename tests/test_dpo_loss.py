"""The losses of dpo.py: examples worked by hand, exact values and gradients, equalities, errors."""

import math
from math import exp, log

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpmath import mp
from torch.testing import assert_close

import dpo
from dpo import LOSS_TYPES, dpo_loss, loss_options, related_loss

OF_Z = ("sigmoid", "hinge", "robust", "exo_pair", "discopop")  # the ones that f-divergences redefine
SORTED = ("aot", "aot_unpaired", "aot_pair")
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", *SORTED)  # may be; exo_pair must be
DIVERGENCES = ("js_divergence", "forward_kl", "alpha_divergence")
CASES = [(t, "reverse_kl") for t in LOSS_TYPES] + [(t, f) for t in OF_Z for f in DIVERGENCES]

fast = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def loss_of(loss_type, logps, **options):
    """dpo_loss of pc, pr, rc, rr, in float64."""
    logps = [torch.as_tensor(t, dtype=torch.float64).reshape(-1) for t in logps]
    return dpo_loss(*logps, loss_type=loss_type, **options)


# ----------------------------------------------------------------------------------- examples worked by hand
# pc -10, pr -14, rc -11, rr -12: a = 1, b = -2, h = 3; at β = .5 z = 1.5, r_w = .5, r_l = -1
# of 2 and 4 tokens the averages are -5, -3.5, -5.5, -3: a = .5, b = -.5, h' = 1; at β = .5 z = .5
smooth, e1, e2 = {"label_smoothing": 0.1}, exp(1), exp(-2)
q, m = 1 / (1 + exp(-1.5)), 1 / (1 + exp(-3))  # σ(z), and σ(z/τ) at τ = .5
js, forward, alpha = ({"f_divergence_type": t} for t in DIVERGENCES)
z_js = 0.5 * (log(2 * e1 / (1 + e1)) - log(2 * e2 / (1 + e2)))
z_half = 0.5 * ((1 - exp(-0.5)) / 0.5 - (1 - exp(1)) / 0.5)  # α = .5 is the default
z_minus = 0.5 * ((1 - e1) / -1 - (1 - e2) / -1)  # α = -1
WORKED = [
    ("sigmoid", {}, log(1 + exp(-1.5))),
    ("sigmoid", smooth, 0.9 * log(1 + exp(-1.5)) + 0.1 * log(1 + exp(1.5))),
    ("hinge", {}, 0.0),  # z is past 1
    ("hinge", {"beta": 0.25}, 1 - 0.75),
    ("ipo", {"beta": 0.25}, (1 - 2) ** 2),
    ("exo_pair", smooth, q * (log(q) - log(0.9)) + (1 - q) * (log(1 - q) - log(0.1))),
    ("nca_pair", {}, log(1 + exp(-0.5)) + log(1 + exp(0.5)) / 2 + log(1 + exp(-1)) / 2),
    ("robust", smooth, (0.9 * log(1 + exp(-1.5)) - 0.1 * log(1 + exp(1.5))) / 0.8),
    ("bco_pair", {}, log(1 + exp(-0.5)) + log(1 + exp(-1))),
    ("bco_pair", {"bco_delta": 0.2}, log(1 + exp(-0.3)) + log(1 + exp(-1.2))),
    ("sppo_hard", {"beta": 0.125}, (1 - 4) ** 2 + (-2 + 4) ** 2),
    ("apo_zero", {}, 1 - 1 / (1 + exp(-0.5)) + 1 / (1 + exp(1))),
    ("apo_down", {}, 1 / (1 + exp(-0.5)) + 1 - 1 / (1 + exp(-1.5))),
    ("discopop", {"discopop_tau": 0.5}, (1 - m) * log(1 + exp(-1.5)) + m * exp(-1.5)),
    ("sigmoid_norm", smooth, 0.9 * log(1 + exp(-0.5)) + 0.1 * log(1 + exp(0.5))),
    ("sft", {}, 5.0),
    ("sigmoid", js, log(1 + exp(-z_js))),
    ("sigmoid", forward, log(1 + exp(-0.5 * (-1 / e1 + 1 / e2)))),
    ("sigmoid", alpha, log(1 + exp(-z_half))),
    ("sigmoid", alpha | {"f_alpha_divergence_coef": -1.0}, log(1 + exp(-z_minus))),
]


@pytest.mark.parametrize("loss_type, options, expected", WORKED)
def test_worked_example(loss_type, options, expected):
    averaged = loss_type in ("ipo", "sigmoid_norm", "sft")
    logps = (-5, -3.5, -5.5, -3) if averaged else (-10, -14, -11, -12)
    assert loss_of(loss_type, logps, **{"beta": 0.5} | options).item() == pytest.approx(expected, rel=1e-13)


def test_defaults():
    """β .1 and τ .05: z = .3, z/τ = 6."""
    sigmoid, discopop = (loss_of(t, (-10, -14, -11, -12)).item() for t in ("sigmoid", "discopop"))
    assert sigmoid == pytest.approx(log(1 + exp(-0.3)))
    assert discopop == pytest.approx((log(1 + exp(-0.3)) + exp(6) * exp(-0.3)) / (1 + exp(6)))


def test_dpo_is_what_related_loss_has_under_its_name():
    logps = torch.randn(4, 1000, dtype=torch.float64) * torch.logspace(-3, 4, 1000)
    want = related_loss(*logps, beta=0.3, loss_type="sigmoid")
    assert_close(dpo_loss(*logps, beta=0.3), want, rtol=1e-12, atol=1e-12)


# aot: policy margins (4, 1), reference margins (0, 2); sorted (1, 4) - (0, 2) = (1, 2); 4 is pair 1's
# aot_unpaired: a = (1, 5), b = (-3, 6); sorted (1, 5) - (-3, 6) = (4, -1)
@pytest.mark.parametrize("loss_type, h", [("aot", (2, 1)), ("aot_unpaired", (4, -1))])
def test_worked_example_of_sorting(loss_type, h):
    pc = torch.tensor([-2.0, -4.0], dtype=torch.float64, requires_grad=True)
    loss = loss_of(loss_type, (pc, [-6.0, -5.0], [-3.0, -9.0], [-3.0, -11.0]), beta=0.5).sum()
    assert loss.item() == pytest.approx(sum(log(1 + exp(-0.5 * t)) for t in h))
    by_pc = torch.autograd.grad(loss, pc)[0].tolist()
    assert by_pc == pytest.approx([-0.5 / (1 + exp(0.5 * t)) for t in h])


# --------------------------------------------------------- exact values and gradients, also at the extremes

mp.dps = 60


def e(t):  # beyond 1000 these are 0, 1 or t to 434 digits, and mpmath would be slow
    return mp.exp(t) if t > -1000 else mp.mpf(0)


def sp(t):
    return t if t > 1000 else mp.log1p(e(t))


def s(t):
    return 1 / (1 + e(-t)) if t > -1000 else mp.mpf(0)


F_PRIME = {  # f' of a = log u, without the constant, which cancels in f'(u_w) - f'(u_l); and its slope
    "reverse_kl": lambda a, alpha: (a, 1),
    "js_divergence": lambda a, alpha: (-sp(-a), s(-a)),
    "forward_kl": lambda a, alpha: (-mp.exp(-a), mp.exp(-a)),
    "alpha_divergence": lambda a, alpha: (-mp.exp(-alpha * a) / alpha, mp.exp(-alpha * a)),
}


def exact(loss_type, f_divergence, a, b, beta, eps, alpha, tau, delta, largest, dz=0):
    """The loss and its derivatives by a and b, where z is moved by dz and then held within ±largest."""
    rw, rl, half = beta * a, beta * b, 1 / (2 * beta)
    (fa, slope_a), (fb, slope_b) = F_PRIME[f_divergence](a, alpha), F_PRIME[f_divergence](b, alpha)
    z = max(-largest, min(largest, beta * (fa - fb) + dz))
    match loss_type:
        case "ipo":
            return (a - b - half) ** 2, 2 * (a - b - half), -2 * (a - b - half)
        case "sppo_hard":
            return (a - half) ** 2 + (b + half) ** 2, 2 * (a - half), 2 * (b + half)
        case "nca_pair":
            return sp(-rw) + sp(rw) / 2 + sp(rl) / 2, beta * (s(rw) / 2 - s(-rw)), beta * s(rl) / 2
        case "bco_pair":
            return sp(delta - rw) + sp(rl - delta), -beta * s(delta - rw), beta * s(rl - delta)
        case "apo_zero":
            return s(-rw) + s(rl), -beta * s(rw) * s(-rw), beta * s(rl) * s(-rl)
        case "apo_down":
            return s(rw) + s(-z), beta * (s(rw) * s(-rw) - s(z) * s(-z)), beta * s(z) * s(-z)
        case "hinge":
            loss, by_z = max(0, 1 - z), -1 if z < 1 else 0
        case "robust":
            loss, by_z = sp(-z) - eps * z / (1 - 2 * eps), -s(-z) - eps / (1 - 2 * eps)
        case "exo_pair":
            loss = s(z) * (-sp(-z) - mp.log(1 - eps)) + s(-z) * (-sp(z) - mp.log(eps))
            by_z = s(z) * s(-z) * (z - mp.log((1 - eps) / eps))
        case "discopop":
            m, rest = s(z / tau), s(-z / tau)
            second = m * e(-z) if z > -1000 else 0  # for τ < 1
            loss = rest * sp(-z) + second
            by_z = second * (rest / tau - 1) - rest * (m / tau * sp(-z) + s(-z))
        case _:
            loss, by_z = (1 - eps) * sp(-z) + eps * sp(z), eps * s(z) - (1 - eps) * s(-z)
    return loss, beta * by_z * slope_a, -beta * by_z * slope_b


# Log-probabilities, and policies near to the reference; e^90 is beyond float32, e^711 beyond float64.
LOGPS = st.sampled_from([-1e-9, -1e-3, -1.0, -100.0, -5e4]) | st.floats(-5e4, -1e-9)
STEPS = [sign * t for sign in (1, -1) for t in (0.0, 1e-3, 0.5, 3.0, 17.0, 90.0, 711.0, 1e4)]
STEPS = st.sampled_from(STEPS) | st.floats(-1e4, 1e4) | st.floats(-5, 5)
NEAR = st.tuples(LOGPS, LOGPS, STEPS, STEPS).map(lambda t: (t[0] + t[2], t[1] + t[3], t[0], t[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("loss_type, f_divergence", [case for case in CASES if "sft" not in case])
@fast
@given(
    st.tuples(LOGPS, LOGPS, LOGPS, LOGPS) | NEAR,
    st.sampled_from([0.01, 0.1, 1.0, 10.0]) | st.floats(0.01, 10),
    st.sampled_from([0.0, 1e-3, 0.1, 0.49]),
    st.sampled_from([1e-8, -1e-8, 1e-3, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0]),
    st.sampled_from([0.05, 0.5]),
    st.floats(-2, 2),
)
@example((-1e-9,) * 4, 0.1, 0.0, 1e-8, 0.05, 0.0)
@example((-5e4,) * 4, 0.1, 0.0, -1e-8, 0.05, 0.0)
@example((-1e-9, -5e4, -5e4, -1e-9), 10.0, 0.0, 2.0, 0.05, 0.0)  # z at its largest, or infinite
@example((-5e4, -1e-9, -1e-9, -5e4), 10.0, 0.0, 2.0, 0.05, 0.0)
@example((-5e4, -1e-9, -1e-9, -5e4), 10.0, 0.1, -2.0, 0.05, 0.0)
@example((-12.0, -1.0, -1.0, -1.0), 1.0, 0.0, 1.0, 0.5, 0.0)  # z/τ past the threshold of F.softplus
@example((-91.0, -91.0, -1.0, -1.0), 0.01, 0.0, 1.0, 0.05, 0.0)  # 1/u exceeds float32, β/u does not
@example((-91.0, -2.0, -1.0, -1.0), 0.01, 0.0, 1.0, 0.05, 0.0)
@example((-712.0, -712.0, -1.0, -1.0), 0.01, 0.0, 1.0, 0.05, 0.0)  # the same for float64
@example((-712.0, -2.0, -1.0, -1.0), 0.01, 0.0, 1.0, 0.05, 0.0)
def test_exact_at_extremes(loss_type, f_divergence, dtype, logps, beta, eps, alpha, tau, delta):
    """Values and gradients agree with those of 60 digits, and are infinite where those exceed the type."""
    eps = (eps or 0.01) if loss_type == "exo_pair" else eps if loss_type in SMOOTHED else 0.0
    names = "beta", "label_smoothing", "f_alpha_divergence_coef", "discopop_tau", "bco_delta"
    options = dict(zip(names, (beta, eps, alpha, tau, delta), strict=True))
    tensors = [torch.tensor([t], dtype=dtype, requires_grad=True) for t in logps]
    chosen = {"loss_type": loss_type, "f_divergence_type": f_divergence, **options}
    if (loss_type, f_divergence, eps) == ("sigmoid", "reverse_kl", 0):
        chosen = {"beta": beta}  # DPO itself, the first lines of dpo_loss
    losses = dpo_loss(*tensors, **chosen)
    gradients = torch.autograd.grad(losses, tensors[:2])
    assert losses.dtype == dtype

    # Exact at the log-probabilities as the type holds them. Inside the loss, rounding moves a and b by a few
    # units of their last place (for aot, of pc - pr and rc - rr), and z by a few of its own or of 1. What
    # these moves do to the result, which is itself rounded, adds up to the tolerance.
    pc, pr, rc, rr = (mp.mpf(t.item()) for t in tensors)
    a, b, largest = pc - rc, pr - rr, torch.finfo(dtype).max
    options = [mp.mpf(t) for t in (*options.values(), largest)]
    (fa, slope_a), (fb, slope_b) = (F_PRIME[f_divergence](t, options[2]) for t in (a, b))
    z = beta * (fa - fb)
    unit = 4 * torch.finfo(dtype).eps
    in_logs = {"forward_kl": 2, "alpha_divergence": 2 + abs(log(abs(alpha)))}  # log|α| is one of these
    unit *= in_logs.get(f_divergence, 1)
    sizes = (abs(pc - pr), abs(rc - rr)) if loss_type == "aot" else (abs(a), abs(b))
    da, db, dz = unit * (sizes[0] + 1 / beta), unit * (sizes[1] + 1 / beta), unit * (1 + abs(z))
    moves = [[(da, 0, 0), (-da, 0, 0)], [(0, db, 0), (0, -db, 0)], [(0, 0, dz), (0, 0, -dz)]]
    if abs(z) <= beta * (slope_a * da + slope_b * db):  # a and b may become equal
        moves += 2 * [[(0, 0, -z)]]
    truths = exact(loss_type, f_divergence, a, b, *options)
    tolerances = [unit * abs(truth) + 1e-36 for truth in truths]
    for move in moves:
        moved = [exact(loss_type, f_divergence, a + i, b + j, *options, k) for i, j, k in move]
        tolerances = [t + max(abs(x[i] - truths[i]) for x in moved) for i, t in enumerate(tolerances)]
    if loss_type in ("apo_zero", "apo_down", "exo_pair", "discopop"):
        # σ near 1 is right to a unit of 1, and so is its derivative, if not 0; with factors of log ε and 1/τ
        by = beta if slope_a == 1 or abs(z) < 1000 else 0
        for i, size in enumerate((1, by * slope_a, by * slope_b)):
            tolerances[i] += 5 * unit * size

    for tensor, truth, tolerance in zip((losses, *gradients), truths, tolerances, strict=True):
        value = tensor.item()
        if math.isinf(value):  # as z or its slope may be before the factor ε or 1 - ε
            assert abs(truth) + tolerance > largest * (eps or 1) / 2, (value, truth, tolerance)
            assert math.copysign(1, value) * truth > -tolerance, (value, truth, tolerance)
        else:
            assert abs(value - truth) <= tolerance, (value, truth, tolerance)


# ----------------------------------------------------------------------------------- equalities, in float64

pairs = st.lists(st.tuples(*[st.floats(-200, -1e-9)] * 4), min_size=5, max_size=5).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64).unbind(1)
)
betas, smoothings, orders = st.floats(0.01, 10), st.floats(0, 0.49), st.permutations(range(5))


def equal(actual, expected):
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def softplus(t):  # F.softplus drops e^-t beyond t = 20
    return torch.logaddexp(t, torch.zeros_like(t))


def ratios(logps, beta):
    """a, b and z."""
    a, b = logps[0] - logps[2], logps[1] - logps[3]
    return a, b, beta * (a - b)


@fast
@given(pairs, betas, smoothings)
def test_conservative_and_robust_dpo(logps, beta, eps):
    z, flipped, share = ratios(logps, beta)[2], [logps[i] for i in (1, 0, 3, 2)], -eps / (1 - 2 * eps)
    dpo = loss_of("sigmoid", logps, beta=beta)
    cdpo, cdpo_flipped = (loss_of("sigmoid", t, beta=beta, label_smoothing=eps) for t in (logps, flipped))
    robust, robust_flipped = (loss_of("robust", t, beta=beta, label_smoothing=eps) for t in (logps, flipped))
    equal(dpo, softplus(-z))
    equal(cdpo, dpo + eps * z)
    equal(cdpo_flipped, eps * softplus(-z) + (1 - eps) * softplus(z))
    equal(loss_of("robust", logps, beta=beta), dpo)
    equal(robust, (1 - share) * softplus(-z) + share * softplus(z))  # cDPO at another ε
    equal((1 - eps) * robust + eps * robust_flipped, dpo)  # unbiased


@fast
@given(pairs, betas, st.floats(-50, 50), st.integers(1, 4096))
def test_relatives(logps, beta, step, length):
    a, b, z = ratios(logps, beta)
    both = softplus(beta * a) + softplus(-beta * a)
    equal(loss_of("nca_pair", logps, beta=beta), (loss_of("bco_pair", logps, beta=beta) + both) / 2)
    ipo_of_sums = loss_of("ipo", logps, beta=beta / 2)
    equal(loss_of("sppo_hard", logps, beta=beta), (ipo_of_sums + (a + b) ** 2) / 2)
    equal(loss_of("discopop", logps, beta=beta, discopop_tau=1), torch.sigmoid(-z) * (1 + softplus(-z)))
    log_js = torch.log(2 * a.exp() / (1 + a.exp())) - torch.log(2 * b.exp() / (1 + b.exp()))
    equal(loss_of("sigmoid", logps, beta=beta, **js), softplus(-beta * log_js))
    means = [t / length for t in logps]  # completions of equal lengths
    equal(loss_of("sigmoid_norm", means, beta=beta), loss_of("sigmoid", logps, beta=beta / length))
    ipo = loss_of("ipo", logps, beta=beta / length)
    assert_close(length**2 * loss_of("ipo", means, beta=beta), ipo, rtol=1e-9, atol=1e-6)
    # bco is least where δ is the mean reward
    delta = (beta * (a + b) / 2).requires_grad_()
    bco = loss_of("bco_pair", logps, beta=beta, bco_delta=delta)
    equal(torch.autograd.grad(bco.sum(), delta)[0], torch.zeros_like(a))
    assert (loss_of("bco_pair", logps, beta=beta, bco_delta=delta + step) >= bco - 1e-10).all()


@fast
@given(pairs, betas, smoothings, orders, orders)
def test_sorting(logps, beta, eps, order, other):
    """aot and aot_unpaired see sets, not pairs; sorting makes the sum least; of one pair it is cDPO."""

    def loss(loss_type, *logps):
        return loss_of(loss_type, logps, beta=beta, label_smoothing=eps).sum()

    pc, pr, rc, rr = logps
    equal(loss("aot", pc[order], pr[order], rc[other], rr[other]), loss("aot", *logps))
    equal(loss("aot_unpaired", pc[order], pr[other], rc[order], rr[other]), loss("aot_unpaired", *logps))
    equal(loss("aot_pair", *logps), loss("aot_unpaired", *logps))
    for loss_type in SORTED:
        assert loss(loss_type, *logps) <= loss("sigmoid", *logps) + 1e-9
        equal(loss(loss_type, *(t[:1] for t in logps)), loss("sigmoid", *(t[:1] for t in logps)))
    up, also_up, zero = pc.sort().values, pr.sort().values, torch.zeros_like(pc)
    equal(loss("aot", up, zero, also_up, zero), loss("sigmoid", up, zero, also_up, zero))
    equal(loss("aot_unpaired", up, also_up, zero, zero), loss("sigmoid", up, also_up, zero, zero))


@fast
@given(pairs, betas, st.floats(-0.1, -1e-9) | st.floats(1e-9, 0.1))
def test_alpha_divergence(logps, beta, coef):
    """α = 1 is forward_kl; α → 0 is dpo: f' = a - αa²/2 + O(α²) adds s(-z)αβ(a² - b²)/2 to the loss."""

    def loss(coef, logps, divergence=alpha):
        return loss_of("sigmoid", logps, beta=beta, f_alpha_divergence_coef=coef, **divergence)

    equal(loss(0.0, logps), loss_of("sigmoid", logps, beta=beta))
    equal(loss(1.0, logps), loss(0.3, logps, forward))
    near = [t / 200 for t in logps]  # |a| < 1, so that the second order is at most (β + β²)α²
    a, b, z = ratios(near, beta)
    slope = (loss(coef, near) - loss(0.0, near)) / coef
    error = slope - torch.sigmoid(-z) * beta * (a**2 - b**2) / 2
    assert (error.abs() <= abs(coef) * (beta + beta**2) + 1e-14 * (1 + beta) / abs(coef)).all()


@pytest.mark.parametrize("loss_type, f_divergence", CASES)
@fast
@given(pairs, st.lists(st.floats(-100, 100), min_size=5, max_size=5), betas, st.floats(0.1, 10))
def test_invariances(loss_type, f_divergence, logps, shift, beta, scale):
    options = {"f_divergence_type": f_divergence, "label_smoothing": 0.1 if loss_type == "exo_pair" else 0}

    def loss(*logps, beta=beta):
        return loss_of(loss_type, logps, beta=beta, **options)

    pc, pr, rc, rr = logps
    before, c = loss(*logps), torch.tensor(shift, dtype=torch.float64)
    assert before.shape == (5,)
    if loss_type not in SORTED:  # pairs do not see each other
        equal(loss(*(t[1:3] for t in logps)), before[1:3])
    if loss_type not in ("sft", "aot"):  # log-probabilities count relative to the reference's
        equal(loss(pc + c, pr, rc + c, rr), before)
        equal(loss(pc, pr + c, rc, rr + c), before)
    if loss_type == "aot":  # whose sets are of other differences
        equal(loss(pc + c[0], pr, rc + c[0], rr), before)
    if f_divergence == "reverse_kl":
        if loss_type in (*OF_Z, "ipo", "sigmoid_norm", "aot"):  # only margins count
            equal(loss(pc + c, pr + c, rc, rr), before)
        power = {"ipo": 2, "sppo_hard": 2, "sft": 1}.get(loss_type, 0)
        assert_close(loss(*(scale * t for t in logps)), loss(*logps, beta=scale * beta) * scale**power)


@fast
@given(pairs, betas, smoothings)
def test_at_initialisation(logps, beta, eps):
    """Where the policy is the reference: the first loss of a run, a number to know."""
    logps = (*logps[:2], *logps[:2])
    cases = [(t, {"label_smoothing": eps}, log(2)) for t in SMOOTHED]
    cases += [("sigmoid", t, log(2)) for t in (js, forward, alpha)]
    cases += [("hinge", {}, 1), ("ipo", {}, 1 / (4 * beta**2)), ("sppo_hard", {}, 1 / (2 * beta**2))]
    cases += [("nca_pair", {}, 2 * log(2)), ("bco_pair", {}, 2 * log(2)), ("discopop", {}, (1 + log(2)) / 2)]
    cases += [("apo_zero", {}, 1), ("apo_down", {}, 1)]
    for loss_type, options, value in cases:
        equal(loss_of(loss_type, logps, beta=beta, **options), torch.full_like(logps[0], value))


def at_margin(loss_type, h, **options):
    """The loss where pc - rc - (pr - rr) is h, and its derivative by h."""
    h = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    loss = loss_of(loss_type, (h, 0, 0, 0), **options)
    return loss.item(), torch.autograd.grad(loss, h)[0].item()


@fast
@given(betas, st.floats(1e-3, 0.49), st.floats(0.1, 50) | st.floats(-50, -0.1))
def test_minima(beta, eps, step):
    entropy, best = -(1 - eps) * log(1 - eps) - eps * log(eps), log((1 - eps) / eps) / beta
    for loss_type, least in (("sigmoid", entropy), ("exo_pair", 0)):
        options = {"beta": beta, "label_smoothing": eps}
        assert at_margin(loss_type, best, **options) == pytest.approx((least, 0), abs=1e-12)
        assert at_margin(loss_type, best + step / beta, **options)[0] > least
    assert at_margin("ipo", 1 / (2 * beta), beta=beta) == pytest.approx((0, 0), abs=1e-12)
    assert at_margin("ipo", 1 / (2 * beta) + step, beta=beta)[0] > 0
    # discopop at first shrinks the margin
    assert at_margin("discopop", 0.0, beta=beta)[1] == pytest.approx(beta * 0.784, abs=beta * 5e-4)


# ---------------------------------------------------------------------------------------------------- errors

REJECTED = [
    ({"loss_type": "dpo"}, "unknown loss_type 'dpo'.*" + ".*".join(LOSS_TYPES)),
    *(({"beta": t}, "beta must be positive") for t in (0.0, -0.1, math.nan)),
    *(({"loss_type": t, "label_smoothing": 0.5}, "label_smoothing") for t in ("sigmoid", "robust")),
    ({"label_smoothing": -0.1}, "label_smoothing"),
    *(
        ({"loss_type": t, **smooth}, "label_smoothing")
        for t in LOSS_TYPES
        if t not in (*SMOOTHED, "exo_pair")
    ),
    ({"loss_type": "exo_pair"}, "exo_pair needs a label_smoothing above 0"),
    ({"f_divergence_type": "total_variation"}, "unknown f_divergence_type 'total_variation'.*js_divergence"),
    *(({"loss_type": t, **forward}, "f_divergence_type") for t in LOSS_TYPES if t not in OF_Z),
]


@pytest.mark.parametrize("options, message", REJECTED)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*(torch.tensor([t]) for t in (-10.0, -14.0, -11.0, -12.0)), **options)


def test_a_loss_type_that_is_listed_but_has_no_case_is_refused(monkeypatch):
    monkeypatch.setattr(dpo, "LOSS_TYPES", (*LOSS_TYPES, "new"))
    with pytest.raises(ValueError, match="unknown loss_type 'new'"):
        dpo_loss(*torch.zeros(4, 1), loss_type="new")


# -------------------------------------------------------------------------------------- options of a step


def options_of(loss_types: list[str], bco_rewards=(0.0, 0.0), **arguments) -> list[dict]:
    args = dpo.Arguments("m", dataset_name="d", loss_type=loss_types, **arguments)
    return [loss_options(loss_type, args, torch.tensor(bco_rewards)) for loss_type in loss_types]


def test_label_smoothing_is_for_the_loss_types_that_have_it():
    """By default exo_pair alone has it; a value that is given is for all that can have it."""
    types = ["exo_pair", "sigmoid", "hinge", "sft"]
    assert options_of(types) == [{"label_smoothing": 1e-3}, {}, {}, {}]
    given = {"label_smoothing": 0.2}
    assert options_of(types, label_smoothing=0.2) == [given, given, {}, {}]


def test_the_threshold_of_bco_is_the_mean_reward_of_the_steps_that_counted():
    """Their sum and their number are kept: of rewards 2, 2, 2, after a step that was skipped, it is 2."""
    assert options_of(["bco_pair"]) == [{"bco_delta": 0}]
    assert options_of(["bco_pair", "sigmoid"], (6.0, 3.0)) == [{"bco_delta": 2}, {}]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_bfloat16_stays_finite(loss_type):
    """Where somebody else's log-probabilities have few digits; those of the scripts are float32 at least."""
    values = torch.tensor([0.0, -1e-3, -1.0, -300.0, -1e4, -3e4], dtype=torch.bfloat16)
    chosen, rejected = (t.flatten().requires_grad_() for t in torch.meshgrid(values, values, indexing="ij"))
    eps = 1e-3 if loss_type == "exo_pair" else 0.0
    reference = torch.full_like(chosen, -500.0)
    losses = dpo_loss(chosen, rejected, reference, reference, loss_type=loss_type, label_smoothing=eps)
    for found in (losses, *torch.autograd.grad(losses.sum(), (chosen, rejected), materialize_grads=True)):
        assert found.isfinite().all() and found.dtype == torch.bfloat16
