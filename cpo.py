r"""Contrastive Preference Optimization (Xu et al. 2024, https://arxiv.org/abs/2401.08417), and SimPO.

A policy π learns to prefer the chosen answer y_w to the rejected answer y_l of a prompt x, without a
reference model: CPO has a uniform one in its place, and imitates chosen answers, so that they stay likely.

    CPO:    -log σ(β log π(y_w|x) - β log π(y_l|x)) - cpo_alpha log π(y_w|x)      eq. 3-6; sums over tokens
    SimPO:  -log σ(β/|y_w| log π(y_w|x) - β/|y_l| log π(y_l|x) - γ)               2405.14734 eq. 6

Preferences: the mean over pairs. Imitation: the mean over all chosen tokens of the batch, as in the
authors' code; the paper writes the sum over a pair's tokens. CPO-SimPO is SimPO with a cpo_alpha above 0.
Differs from the authors' code: answers are packed, not padded, which changes no result.

    python cpo.py                                     the built-in example, about a minute on a laptop
    torchrun --nproc_per_node 8 cpo.py --loss_type simpo --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir Qwen2-0.5B-SimPO
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import common
from common import TOY_MODEL, Batch, Pairs, arg

# --------------------------------------------------------------------------------------------------- the loss

AVERAGED = ("ipo", "simpo", "alphapo")  # of log-probabilities per token: sums divided by lengths
LOSS_TYPES = ("sigmoid", "hinge", *AVERAGED)
SMOOTHED = ("sigmoid", "simpo", "alphapo")  # what label_smoothing applies to
TARGET_MARGIN = ("simpo", "alphapo")  # what simpo_gamma applies to


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """Losses (B,) of B pairs, from the policy's log-probabilities (B,) of their completions; no imitation.

    Log-probabilities are sums over the tokens of a completion; for loss types in AVERAGED the caller passes
    means. `simpo_gamma` is γ itself, of which SimPO's authors list γ/β. `alpha` is AlphaPO's α: where it
    is not 0, each log-probability t counts as (1 - e^(-αt))/α (alphapo.py explains it). Training minimises
    the mean of the losses. Raises ValueError for what is not defined.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type '{loss_type}'; known are {', '.join(LOSS_TYPES)}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in SMOOTHED):
        raise ValueError(f"label_smoothing must be in [0, 0.5), and is for {', '.join(SMOOTHED)} only")
    if simpo_gamma and loss_type not in TARGET_MARGIN:
        raise ValueError(f"simpo_gamma is for {', '.join(TARGET_MARGIN)} only")

    def classify(margins: Tensor) -> Tensor:  # logistic loss, where a share of the labels may be swapped
        return -F.logsigmoid(margins) * (1 - label_smoothing) - F.logsigmoid(-margins) * label_smoothing

    match loss_type:
        case "sigmoid":
            # CPO, eq. 3: DPO with a uniform reference, which cancels
            return classify(PowerDifference.apply(chosen_logps, rejected_logps, alpha, beta))
        case "hinge":
            # SLiC (2305.10425): a support vector machine on the same margin
            return F.relu(1 - PowerDifference.apply(chosen_logps, rejected_logps, alpha, beta))
        case "ipo":
            # 2310.12036 eq. 17: take the margin to 1/2β, not to infinity
            return (PowerDifference.apply(chosen_logps, rejected_logps, alpha, 1.0) - 1 / (2 * beta)) ** 2
        case "simpo" | "alphapo":
            # SimPO, eq. 6, and AlphaPO, 2501.03884 eq. 4: only margins beyond γ are good enough
            return classify(PowerDifference.apply(chosen_logps, rejected_logps, alpha, beta) - simpo_gamma)


class PowerDifference(torch.autograd.Function):
    """β (e^(-αy) - e^(-αx))/α of x and y, all (B,): without inf - inf, and in the gradient without 0·inf."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.alpha, ctx.beta = alpha, beta
        if alpha == 0:
            return beta * (x - y)
        # The larger exponential is factored out, all in logs; what overflows becomes the largest number.
        larger = torch.maximum(-alpha * x, -alpha * y)
        gap = -torch.expm1(-abs(alpha) * (x - y).abs())
        size = (larger + gap.log() + math.log(beta / abs(alpha))).exp().clamp(max=torch.finfo(x.dtype).max)
        return (x - y).sign() * size

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        def times_slope(t: Tensor) -> Tensor:  # d/dt of -β e^(-αt)/α, unless the loss is flat there
            return torch.where(grad == 0, grad, grad * (math.log(ctx.beta) - ctx.alpha * t).exp())

        x, y = ctx.saved_tensors
        return times_slope(x), -times_slope(y), None, None


# -------------------------------------------------------------------------------------------------- arguments


@dataclass
class Arguments(common.Arguments):
    """CPO's own arguments; those of all methods are in common.py."""

    loss_type: str = arg("sigmoid", f"one of {', '.join(LOSS_TYPES)}")
    beta: float | None = arg(None, "scale of the margin [0.1; simpo and alphapo 2.5]")
    cpo_alpha: float | None = arg(None, "weight of imitation [1; simpo and alphapo 0]")
    simpo_gamma: float | None = arg(None, "target margin γ, not γ/β [simpo 1.375, alphapo 0.1]")
    alpha: float | None = arg(None, "AlphaPO's α, for every loss type [0; alphapo 0.25]")
    label_smoothing: float = arg(0.0, "ε: share of pairs with swapped labels")
    learning_rate: float | None = arg(None, "peak learning rate of AdamW [1e-6; alphapo 7e-7]")


# What the options left open are, by loss type: as published, of SimPO for Llama-3-Instruct, of AlphaPO for
# Mistral-Instruct. The learning rate is that of models with billions of parameters, and of the built-in
# example.
OTHERS = {"beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.0, "alpha": 0.0, "learning_rate": (1e-6, 5e-4)}
DEFAULTS = {
    "simpo": OTHERS | {"beta": 2.5, "cpo_alpha": 0.0, "simpo_gamma": 1.375, "learning_rate": (1e-6, 3e-5)},
    "alphapo": {
        "beta": 2.5,
        "cpo_alpha": 0.0,
        "simpo_gamma": 0.1,
        "alpha": 0.25,
        "learning_rate": (7e-7, 3e-5),
    },
}
# The built-in example: a 336k-parameter character model that translates numbers (tests/toy).
TOY = dict(max_steps=100, batch_size=32, per_device_train_batch_size=32)
TOY |= dict(per_device_eval_batch_size=250, eval_prompts=500, max_new_tokens=64)


def check(args: Arguments) -> None:
    """Fill in defaults that depend on other arguments; ValueError for what does not go together."""
    for name, default in DEFAULTS.get(args.loss_type, OTHERS).items():
        if getattr(args, name) is None:
            small = args.model_name_or_path == TOY_MODEL
            setattr(args, name, default[small] if name == "learning_rate" else default)
    losses_of(torch.zeros(1, 2), args)  # whatever else is wrong cpo_loss says, before any work


# -------------------------------------------------------------------------------------------- one micro-batch


def losses_of(logps: Tensor, args: Arguments) -> Tensor:
    """cpo_loss (B,) with the options of `args`, from log-probabilities (B, 2) of chosen and rejected."""
    return cpo_loss(
        *logps.unbind(1),
        beta=args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        simpo_gamma=args.simpo_gamma,
        alpha=args.alpha,
    )


def loss_and_metrics(policy, batch: Batch, args: Arguments) -> tuple[Tensor, dict]:
    """This micro-batch's part of the loss, and of the means of the metrics, of the whole global batch.

    Parts are sums over pairs or tokens divided by their number in the global batch. So they add up, and
    neither loss nor gradient depends on how the batch is split over processes and micro-batches.
    """
    scores = policy.score(batch)
    logps = batch.sum(scores.token_logps)  # (B, 2); CPO sums over tokens
    values = logps / batch.lengths if args.loss_type in AVERAGED else logps  # SimPO averages
    nll_loss = -logps[:, 0].sum() / batch.step_tokens[1]  # a mean over tokens: long answers count for more
    loss = losses_of(values, args).sum() / batch.step_pairs + args.cpo_alpha * nll_loss

    values = values.detach()
    rewards = -torch.expm1(-args.alpha * values) / args.alpha if args.alpha else values
    rewards = args.beta * rewards  # (B, 2)
    sums = {
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).sum(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum(),
        "logps/chosen": logps[:, 0].sum(),
        "logps/rejected": logps[:, 1].sum(),
    }
    parts = {name: value / batch.step_pairs for name, value in sums.items()}
    if policy.balancing_loss:
        # Of a mixture of experts. It is no sum over pairs: here it is the mean over micro-batches.
        parts["aux_loss"] = scores.aux_loss * len(batch.lengths) / batch.step_pairs
        loss = loss + policy.config.router_aux_loss_coef * parts["aux_loss"]
    return loss, {"loss": loss, "nll_loss": nll_loss} | parts


# --------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def evaluate(policy, tokenizer, test: Pairs, args: Arguments, log, step: int) -> None:
    """The metrics of the test pairs, all of them as one global batch, and completions of test prompts."""
    rows = common.by_length(test)
    for batch in common.micro_batches(test, rows, args.per_device_eval_batch_size, policy.device):
        log.add(loss_and_metrics(policy, batch, args)[1])
    metrics, samples = common.complete(policy, tokenizer, test, args, step)
    log.evaluation(step, log.means() | metrics, samples)


def main(args: Arguments) -> None:
    rank, world, device = common.start(args)
    tokenizer = common.load_tokenizer(args)
    train, test = common.load_pairs(args, tokenizer)
    # All batches of the run, (steps, batch_size), are known to all processes.
    batches = common.global_batches(train.lengths, args)
    policy = common.load_model(args.model_name_or_path, args, device, trainable=True)
    optimizer = common.adamw(policy, args)
    first_step = common.resume(args, policy, optimizer, {})

    log = common.Log(args, first_step, len(batches), len(train.rows), device)
    if test is not None and log.due(first_step):
        evaluate(policy, tokenizer, test, args, log, first_step)
    for step in range(first_step, len(batches)):
        common.seed(args.seed, step, rank)  # what a step depends on, besides the state in checkpoints
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, len(batches), args)
        for batch in common.micro_batches(train, batches[step], args.per_device_train_batch_size, device):
            loss, metrics = loss_and_metrics(policy, batch, args)
            (loss * world).backward()  # fully_shard averages over processes, but these are parts of a sum
            log.add(metrics)
        grad_norm = common.clip_grad_norm(policy, args.max_grad_norm)
        if math.isfinite(grad_norm):  # it is the same on all processes; else all skip the step
            optimizer.step()
        optimizer.zero_grad()

        metrics = log.means()
        tokens = train.lengths[batches[step]].sum()
        log.step(step, metrics, grad_norm, group["lr"], args.batch_size, tokens)

        done = step + 1
        if done == len(batches) or log.interrupted or done % args.save_steps == 0:
            common.save_checkpoint(args, policy, optimizer, done, {})
        if log.interrupted:
            common.leave(f"interrupted after step {done}, which is saved; the same command goes on")
        if test is not None and log.due(done):
            evaluate(policy, tokenizer, test, args, log, done)
    common.save_model(args, policy, tokenizer)
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(common.parse(Arguments, check, TOY))
