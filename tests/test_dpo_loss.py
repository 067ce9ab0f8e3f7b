"""The losses of dpo.py: worked examples, exact values and gradients at the extremes, and identities between losses."""

import math
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpmath import mp
from torch.testing import assert_close

from dpo import LOSS_TYPES, dpo_loss

# those that an f-divergence can redefine
OF_Z = ("sigmoid", "hinge", "robust", "exo_pair", "discopop")
SORTED = ("aot", "aot_unpaired", "aot_pair")
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", *SORTED)
EPSILON = {"exo_pair": 0.1}  # the one loss that needs label smoothing

fast = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def loss_of(loss_type, logps, **options):
    """dpo_loss of float64 tensors or numbers (pc, pr, rc, rr), with the label smoothing that exo_pair needs."""
    options.setdefault("label_smoothing", EPSILON.get(loss_type, 0.0))
    logps = [torch.as_tensor(t, dtype=torch.float64) for t in logps]
    return dpo_loss(*(t.reshape(-1) for t in logps), loss_type=loss_type, **options)


# ------------------------------------------------------------------------------------------- worked examples, by hand
# pc -10, pr -14, rc -11, rr -12: a = 1, b = -2, h = 3. At β = .5: z = 1.5, r_w = .5, r_l = -1.
# With 2 and 4 tokens the averaged log-probabilities are -5, -3.5, -5.5, -3: a = .5, b = -.5, h' = 1; at β = .5 z = .5.

q, m = 1 / (1 + exp(-1.5)), 1 / (1 + exp(-1.5 / 0.5))  # σ(z), and σ(z/τ) at τ = .5
E, SQ = exp(1), exp(2)  # u_w = e, u_l = 1/e²
js = 0.5 * (log(2 * E / (1 + E)) - log((2 / SQ) / (1 + 1 / SQ)))
forward = 0.5 * (-1 / E + SQ)
WORKED = [
    ("sigmoid", {}, log(1 + exp(-1.5))),
    ("sigmoid", {"label_smoothing": 0.1}, 0.9 * log(1 + exp(-1.5)) + 0.1 * log(1 + exp(1.5))),
    ("hinge", {}, 0.0),  # z is past 1
    ("hinge", {"beta": 0.25}, 1 - 0.75),
    ("ipo", {"beta": 0.25}, (1 - 2) ** 2),
    ("exo_pair", {"label_smoothing": 0.1}, q * (log(q) - log(0.9)) + (1 - q) * (log(1 - q) - log(0.1))),
    ("nca_pair", {}, log(1 + exp(-0.5)) + log(1 + exp(0.5)) / 2 + log(1 + exp(-1)) / 2),
    ("robust", {"label_smoothing": 0.1}, (0.9 * log(1 + exp(-1.5)) - 0.1 * log(1 + exp(1.5))) / 0.8),
    ("bco_pair", {"bco_delta": 0.2}, log(1 + exp(-0.3)) + log(1 + exp(-1.2))),
    ("bco_pair", {}, log(1 + exp(-0.5)) + log(1 + exp(-1))),
    ("sppo_hard", {"beta": 0.125}, (1 - 4) ** 2 + (-2 + 4) ** 2),
    ("aot", {"label_smoothing": 0.1}, 0.9 * log(1 + exp(-1.5)) + 0.1 * log(1 + exp(1.5))),
    ("aot_unpaired", {"label_smoothing": 0.1}, 0.9 * log(1 + exp(-1.5)) + 0.1 * log(1 + exp(1.5))),
    ("aot_pair", {}, log(1 + exp(-1.5))),
    ("apo_zero", {}, 1 - 1 / (1 + exp(-0.5)) + 1 / (1 + exp(1))),
    ("apo_down", {}, 1 / (1 + exp(-0.5)) + 1 - 1 / (1 + exp(-1.5))),
    ("discopop", {"discopop_tau": 0.5}, (1 - m) * log(1 + exp(-1.5)) + m * exp(-1.5)),
    ("sigmoid_norm", {"label_smoothing": 0.2}, 0.8 * log(1 + exp(-0.5)) + 0.2 * log(1 + exp(0.5))),
    ("sft", {}, 5.0),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, log(1 + exp(-js))),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, log(1 + exp(-forward))),
    # f' = (1 - u^-α)/α with α = .5 (the default) and α = -1: z = β·2(-e^-.5 + e), and z = β(e - e^-2)
    ("sigmoid", {"f_divergence_type": "alpha_divergence"}, log(1 + exp(-(E - exp(-0.5))))),
    (
        "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": -1.0},
        log(1 + exp(-0.5 * (E - 1 / SQ))),
    ),
]


@pytest.mark.parametrize("loss_type, options, expected", WORKED)
def test_worked_example(loss_type, options, expected):
    averaged = loss_type in ("ipo", "sigmoid_norm", "sft")
    logps = (-5, -3.5, -5.5, -3) if averaged else (-10, -14, -11, -12)
    assert loss_of(loss_type, logps, **{"beta": 0.5} | options).item() == pytest.approx(expected, rel=1e-13)


def test_defaults_are_dpo_with_beta_a_tenth_and_the_papers_tau():
    numbers = [torch.tensor([t]) for t in (-10.0, -14.0, -11.0, -12.0)]
    assert dpo_loss(*numbers).item() == pytest.approx(log(1 + exp(-0.3)))
    assert dpo_loss(*numbers, loss_type="discopop").item() == pytest.approx(
        (log(1 + exp(-0.3)) + exp(6) * exp(-0.3)) / (1 + exp(6))  # z = .3, z/τ = 6
    )


def test_worked_example_of_sorting():
    """Two pairs; which value meets which, and whose log-probability the gradient reaches."""
    pc = torch.tensor([-2.0, -4.0], dtype=torch.float64, requires_grad=True)
    pr, rc, rr = (torch.tensor(t, dtype=torch.float64) for t in ([-6.0, -5.0], [-3.0, -9.0], [-3.0, -11.0]))
    # aot: policy margins (4, 1) and reference margins (0, 2); sorted (1, 4) - (0, 2) = (1, 2); times β .5, 1
    loss = dpo_loss(pc, pr, rc, rr, beta=0.5, loss_type="aot").sum()
    assert loss.item() == pytest.approx(log(1 + exp(-0.5)) + log(1 + exp(-1)))
    (grad,) = torch.autograd.grad(loss, pc)
    assert grad.tolist() == pytest.approx([-0.5 / (1 + exp(1)), -0.5 / (1 + exp(0.5))])
    # aot_unpaired: a = (1, 5) and b = (-3, 6); sorted (1, 5) - (-3, 6) = (4, -1); times β 2, -.5
    loss = dpo_loss(pc, pr, rc, rr, beta=0.5, loss_type="aot_unpaired").sum()
    assert loss.item() == pytest.approx(log(1 + exp(-2)) + log(1 + exp(0.5)))
    (grad,) = torch.autograd.grad(loss, pc)
    assert grad.tolist() == pytest.approx([-0.5 / (1 + exp(2)), -0.5 / (1 + exp(-0.5))])


# ------------------------------------------------------------------------- exact values and gradients at the extremes

mp.dps = 60


def e(t):  # beyond 1000 these are 0, 1 or t to 434 digits, and mpmath would be slow
    return mp.exp(t) if t > -1000 else mp.mpf(0)


def sp(t):
    return t if t > 1000 else mp.log1p(e(t))


def s(t):
    return 1 / (1 + e(-t)) if t > -1000 else mp.mpf(0)


F_PRIME = {  # f' as a function of a = log u, less its constant, which cancels in f'(u_w) - f'(u_l), and its slope
    "reverse_kl": lambda a, alpha: (a, 1),
    "js_divergence": lambda a, alpha: (-sp(-a), s(-a)),
    "forward_kl": lambda a, alpha: (-mp.exp(-a), mp.exp(-a)),
    "alpha_divergence": lambda a, alpha: (-mp.exp(-alpha * a) / alpha, mp.exp(-alpha * a)),
}


def exact(loss_type, f_divergence, a, b, o, dz=0):
    """The loss and its derivatives by a and b, as the papers state them, at a margin z moved by dz; s(-t) is 1 - s(t)."""
    rw, rl, half, c = o.beta * a, o.beta * b, 1 / (2 * o.beta), 1 - 2 * o.eps
    match loss_type:
        case "ipo":
            return (a - b - half) ** 2, 2 * (a - b - half), -2 * (a - b - half)
        case "sppo_hard":
            return (a - half) ** 2 + (b + half) ** 2, 2 * (a - half), 2 * (b + half)
        case "nca_pair":
            return sp(-rw) + sp(rw) / 2 + sp(rl) / 2, o.beta * (s(rw) / 2 - s(-rw)), o.beta * s(rl) / 2
        case "bco_pair":
            return sp(-(rw - o.delta)) + sp(rl - o.delta), -o.beta * s(o.delta - rw), o.beta * s(rl - o.delta)
        case "apo_zero":
            return s(-rw) + s(rl), -o.beta * s(rw) * s(-rw), o.beta * s(rl) * s(-rl)
        case "apo_down":
            by_z = -s(rw - rl) * s(rl - rw)
            return s(rw) + s(rl - rw), o.beta * (s(rw) * s(-rw) + by_z), -o.beta * by_z
    (fa, slope_a), (fb, slope_b) = (F_PRIME[f_divergence](t, o.alpha) for t in (a, b))
    z = o.beta * (fa - fb) + dz
    match loss_type:
        case "hinge":
            loss, by_z = max(0, 1 - z), -1 if z < 1 else 0
        case "robust":
            loss, by_z = sp(-z) - o.eps * z / c, -s(-z) - o.eps / c
        case "exo_pair":
            loss = s(z) * (-sp(-z) - mp.log(1 - o.eps)) + s(-z) * (-sp(z) - mp.log(o.eps))
            by_z = s(z) * s(-z) * (z - mp.log((1 - o.eps) / o.eps))
        case "discopop":
            m, rest = s(z / o.tau), s(-z / o.tau)
            second = m * e(-z) if z > -1000 else 0  # as τ < 1
            loss = rest * sp(-z) + second
            by_z = second * (rest / o.tau - 1) - rest * (m / o.tau * sp(-z) + s(-z))
        case "sigmoid" | "sigmoid_norm" | "aot" | "aot_unpaired" | "aot_pair":
            loss, by_z = (1 - o.eps) * sp(-z) + o.eps * sp(z), o.eps * s(z) - (1 - o.eps) * s(-z)
    return loss, o.beta * by_z * slope_a, -o.beta * by_z * slope_b


# log-probabilities of whole completions, and their distances to the reference's, with the places where e^x leaves
# float32 (89) and float64 (710)
LOGPS = st.sampled_from([-1e-9, -1e-3, -1.0, -100.0, -5e4]) | st.floats(-5e4, -1e-9)
SHIFTS = st.sampled_from([0.0, 1e-3, 0.5, 3.0, 17.0, 90.0, 711.0, 1e4]) | st.floats(0, 1e4) | st.floats(0, 5)


@st.composite
def extremes(draw):
    rc, rr = draw(LOGPS), draw(LOGPS)
    if draw(st.booleans()):
        return draw(LOGPS), draw(LOGPS), rc, rr
    pc, pr = (r + draw(st.sampled_from([1, -1])) * draw(SHIFTS) for r in (rc, rr))
    return tuple(min(max(t, -5e4), -1e-9) for t in (pc, pr, rc, rr))


CASES = [(t, "reverse_kl") for t in LOSS_TYPES if t != "sft"]
CASES += [(t, f) for t in OF_Z for f in F_PRIME if f != "reverse_kl"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("loss_type, f_divergence", CASES)
@fast
@given(
    logps=extremes(),
    beta=st.sampled_from([0.01, 0.1, 1.0, 10.0]) | st.floats(0.01, 10),
    eps=st.sampled_from([0.0, 1e-3, 0.1, 0.49]),
    alpha=st.sampled_from([1e-8, -1e-8, 1e-3, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0]),
    delta=st.floats(-2, 2),
    tau=st.sampled_from([0.05, 0.5]),
)
@example((-1e-9,) * 4, 0.1, 0.0, 1e-8, 0.0, 0.05)
@example((-5e4,) * 4, 0.1, 0.0, -1e-8, 0.0, 0.05)
@example((-1e-9, -5e4, -5e4, -1e-9), 10.0, 0.0, 2.0, 0.0, 0.05)  # z at its largest, or infinite
@example((-5e4, -1e-9, -1e-9, -5e4), 10.0, 0.0, 2.0, 0.0, 0.05)
@example((-5e4, -1e-9, -1e-9, -5e4), 10.0, 0.1, -2.0, 0.0, 0.05)
@example((-91.0, -91.0, -1.0, -1.0), 0.01, 0.0, 1.0, 0.0, 0.05)  # 1/u exceeds float32, β/u does not
@example((-91.0, -2.0, -1.0, -1.0), 0.01, 0.0, 1.0, 0.0, 0.05)
@example((-712.0, -712.0, -1.0, -1.0), 0.01, 0.0, 1.0, 0.0, 0.05)  # the same for float64
@example((-712.0, -2.0, -1.0, -1.0), 0.01, 0.0, 1.0, 0.0, 0.05)
def test_exact_at_extremes(loss_type, f_divergence, dtype, logps, beta, eps, alpha, delta, tau):
    """Values and gradients agree with those of 60 digits, and are infinite where those exceed the type."""
    if loss_type == "exo_pair":
        eps = eps or 0.01
    elif loss_type not in SMOOTHED:
        eps = 0.0
    tensors = [torch.tensor([t], dtype=dtype, requires_grad=True) for t in logps]
    losses = dpo_loss(
        *tensors,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=eps,
        f_divergence_type=f_divergence,
        f_alpha_divergence_coef=alpha,
        discopop_tau=tau,
        bco_delta=delta,
    )
    got = losses.item(), *(g.item() for g in torch.autograd.grad(losses, tensors[:2]))
    assert losses.dtype == dtype

    # Exact, at the log-probabilities as the type holds them. Rounding inside the loss moves a and b by a few units in
    # their last place (for aot, in that of pc - pr and rc - rr), and z by a few of its own or of 1; what each of these
    # moves does to the result, which is rounded once more, adds up to the tolerance.
    o = SimpleNamespace(**{k: mp.mpf(v) for k, v in dict(beta=beta, eps=eps, alpha=alpha, delta=delta, tau=tau).items()})
    pc, pr, rc, rr = (mp.mpf(t.item()) for t in tensors)
    a, b = pc - rc, pr - rr
    (fa, slope_a), (fb, slope_b) = (F_PRIME[f_divergence](t, o.alpha) for t in (a, b))
    z = o.beta * (fa - fb)
    unit = 4 * torch.finfo(dtype).eps
    if f_divergence == "forward_kl":
        unit *= 2  # powers are worked out in logs
    elif f_divergence == "alpha_divergence":
        unit *= 2 + abs(log(abs(alpha)))  # and log|α| can be the largest of them
    sizes = (abs(pc - pr), abs(rc - rr)) if loss_type == "aot" else (abs(a), abs(b))
    da, db = (unit * (size + 1 / o.beta) for size in sizes)
    dz = unit * (1 + abs(z))
    true = exact(loss_type, f_divergence, a, b, o)
    moves = [
        [exact(loss_type, f_divergence, a + i * da, b + j * db, o, k * dz) for i, j, k in (move, (-t for t in move))]
        for move in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    tolerances = [
        sum(max(abs(moved[i] - true[i]) for moved in move) for move in moves) + unit * abs(true[i]) + 1e-36
        for i in range(3)
    ]
    # σ near 1 is right to a unit of 1 only, and so are its derivative and what it is multiplied with: log ε, or 1/τ.
    factor = {"apo_zero": 1, "apo_down": 1, "exo_pair": 5, "discopop": 5}.get(loss_type, 0)
    tolerances[0] += unit * (factor if loss_type == "exo_pair" else 0)
    if f_divergence == "reverse_kl" or abs(z) < 1000:  # beyond, that derivative is 0
        tolerances[1] += factor * unit * o.beta * slope_a
        tolerances[2] += factor * unit * o.beta * slope_b

    largest = 0.99 * torch.finfo(dtype).max
    for name, value, truth, tolerance in zip(("loss", "by pc", "by pr"), got, true, tolerances, strict=True):
        if math.isinf(value):  # as z may already be, where the loss is a small multiple of it
            assert math.copysign(1, value) * truth + tolerance > largest or (
                name == "loss" and abs(z) > largest and value * truth > 0
            ), (name, value, truth, tolerance)
        else:
            assert abs(value - truth) <= tolerance, (name, value, truth, tolerance)
