r"""Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), all its losses.

A policy π learns to prefer the chosen answer y_w to the rejected answer y_l of a prompt x. There is no reward
model: its own log-probabilities, against those of a frozen copy of where it started, are the reward.

    reward(y) = β log π(y|x) / π_ref(y|x)             log-probabilities are summed over the tokens of y
    loss      = -log σ(reward(y_w) - reward(y_l))     eq. 7; the mean over pairs

Differs from the paper: AdamW and a learning rate that falls, not RMSprop and a constant one. Differs from
the authors' code: answers are packed, not padded, which changes no result. DPO's relatives are the other
cases of `dpo_loss`, each with its source.

    python dpo.py                                     the built-in example, about a minute on a laptop
    torchrun --nproc_per_node 8 dpo.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir Qwen2-0.5B-DPO
"""

import gc
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
from common import Batch, Pairs, arg

# --------------------------------------------------------------------------------------------------- the loss

OF_THE_MARGIN = ("sigmoid", "hinge", "robust", "exo_pair", "discopop")  # f-divergences redefine the margin z
OF_REWARDS = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")  # of both rewards, not only of z
AVERAGED = ("ipo", "sigmoid_norm", "sft")  # of log-probabilities per token: sums divided by lengths
WHOLE_BATCH = ("aot", "aot_unpaired", "aot_pair")  # they sort, so they need all pairs of the step at once
LOSS_TYPES = OF_THE_MARGIN + OF_REWARDS + AVERAGED + WHOLE_BATCH
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", *WHOLE_BATCH)  # what label_smoothing applies to


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    bco_delta: float | Tensor = 0.0,
) -> Tensor:
    """Losses (B,) of B pairs, from log-probabilities (B,) of their completions under policy and reference.

    Log-probabilities are sums over the tokens of a completion; for loss types in AVERAGED the caller passes
    means. Training minimises the mean of the losses. Raises ValueError for what is not defined.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type '{loss_type}'; known are {', '.join(LOSS_TYPES)}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in SMOOTHED):
        raise ValueError(f"label_smoothing must be in [0, 0.5), and is for {', '.join(SMOOTHED)} only")
    if not discopop_tau > 0:
        raise ValueError(f"discopop_tau must be positive, not {discopop_tau}")
    if f_divergence_type != "reverse_kl" and loss_type not in OF_THE_MARGIN:
        raise ValueError(f"f_divergence_type {f_divergence_type} is for {', '.join(OF_THE_MARGIN)} only")

    chosen = chosen_logps - ref_chosen_logps  # log π(y_w)/π_ref(y_w)
    rejected = rejected_logps - ref_rejected_logps  # log π(y_l)/π_ref(y_l)
    chosen_rewards, rejected_rewards = beta * chosen, beta * rejected
    margins = f_margin(chosen, rejected, beta, f_divergence_type, f_alpha_divergence_coef)  # z in the papers

    def classify(margins: Tensor) -> Tensor:  # logistic loss; smoothed: conservative DPO (cdpo.pdf eq. 3)
        return -F.logsigmoid(margins) * (1 - label_smoothing) - F.logsigmoid(-margins) * label_smoothing

    match loss_type:
        case "sigmoid" | "sigmoid_norm":
            # DPO, 2305.18290 eq. 7; length-normalised as in SimPO's appendix and Tülu 3
            return classify(margins)
        case "hinge":
            # RSO (2309.06657), SLiC (2305.10425): a support vector machine on the same margin
            return F.relu(1 - margins)
        case "ipo":
            # 2310.12036 eq. 17, of means as in its experiments: take the margin to 1/2β, not to infinity
            return (chosen - rejected - 1 / (2 * beta)) ** 2
        case "robust":
            # 2403.00409: conservative DPO made unbiased under a share ε of swapped labels; unbounded below
            return -F.logsigmoid(margins) - label_smoothing / (1 - 2 * label_smoothing) * margins
        case "exo_pair":
            # 2402.00856 eq. 16: the divergence KL(q || p) of q = (σ(z), σ(-z)) from the labels p = (1-ε, ε)
            if label_smoothing == 0:
                raise ValueError("exo_pair needs a label_smoothing above 0, such as 1e-3: it enters as log ε")
            to_chosen = F.logsigmoid(margins) - math.log(1 - label_smoothing)
            to_rejected = F.logsigmoid(-margins) - math.log(label_smoothing)
            return margins.sigmoid() * to_chosen + (-margins).sigmoid() * to_rejected
        case "discopop":
            # 2406.08414 eq. 5, found by a language model: logistic and exponential loss, blended by σ(z/τ).
            # The second term is σ(z/τ) e^(-z), written so that it cannot be 0·inf.
            logistic = -(-margins / discopop_tau).sigmoid() * F.logsigmoid(margins)
            return logistic + (F.logsigmoid(margins / discopop_tau) - margins).exp()
        case "nca_pair":
            # 2402.05369: each reward is also compared with 0, which keeps chosen answers likely
            both = F.logsigmoid(-chosen_rewards) + F.logsigmoid(-rejected_rewards)
            return -F.logsigmoid(chosen_rewards) - both / 2
        case "bco_pair":
            # 2404.04656: a classifier of good and bad answers; its threshold δ is the mean reward so far
            return -F.logsigmoid(chosen_rewards - bco_delta) - F.logsigmoid(bco_delta - rejected_rewards)
        case "sppo_hard":
            # 2405.00675 eq. 4.7: take the chosen log-ratio to 1/2β, the rejected one to -1/2β
            return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
        case "apo_zero":
            # 2408.06266 eq. 7: chosen up, rejected down; for when chosen answers are better than the policy's
            return 1 - chosen_rewards.sigmoid() + rejected_rewards.sigmoid()
        case "apo_down":
            # 2408.06266 eq. 8: both down, rejected more; for when the policy's answers are better than both
            return chosen_rewards.sigmoid() + 1 - margins.sigmoid()
        case "aot":
            # 2406.05882: the sorted margins of the policy should exceed those of the reference, rank by rank
            policy, reference = chosen_logps - rejected_logps, ref_chosen_logps - ref_rejected_logps
            return classify(beta * (policy.sort().values - reference.sort().values))
        case "aot_unpaired" | "aot_pair":
            # the sorted rewards of all chosen answers should exceed those of all rejected, rank by rank
            return classify(beta * (chosen.sort().values - rejected.sort().values))
        case "sft":
            # imitation of the chosen answer, as a part of weighted sums such as MPO (2411.10442)
            return -chosen_logps


def f_margin(chosen: Tensor, rejected: Tensor, beta: float, f_divergence_type: str, alpha: float) -> Tensor:
    """β (f'(u_w) - f'(u_l)), (B,), of u = π/π_ref, from log u_w and log u_l (B,): f-DPO, 2309.16240 table 1.

    DPO itself is the reverse KL divergence, f' = log u. `alpha` is the paper's α, of the alpha divergence.
    """
    match f_divergence_type:
        case "reverse_kl":
            return beta * (chosen - rejected)
        case "js_divergence":  # f' = log 2u/(1+u) = log 2 + log σ(log u)
            return beta * (F.logsigmoid(chosen) - F.logsigmoid(rejected))
        case "forward_kl":  # f' = -1/u: but for a constant, the alpha divergence at α = 1
            return PowerDifference.apply(chosen, rejected, 1.0, beta)
        case "alpha_divergence":  # f' = (1 - u^-α)/α
            return PowerDifference.apply(chosen, rejected, alpha, beta)
    known = "reverse_kl, js_divergence, forward_kl, alpha_divergence"
    raise ValueError(f"unknown f_divergence_type '{f_divergence_type}'; known are {known}")


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
    """DPO's own arguments; those of all methods are in common.py."""

    beta: float = arg(0.1, "strength of the tie to the reference (IPO's τ)")
    loss_type: list[str] = arg(["sigmoid"], f"one or more of {', '.join(LOSS_TYPES)}")
    loss_weights: list[float] | None = arg(None, "weights of the loss types in their sum [1 each]")
    label_smoothing: float | None = arg(None, "ε: share of pairs with swapped labels [0; for exo_pair 1e-3]")
    f_divergence_type: str = arg("reverse_kl", "or js_divergence, forward_kl, alpha_divergence")
    f_alpha_divergence_coef: float = arg(0.5, "α of the alpha divergence")
    discopop_tau: float = arg(0.05, "temperature of discopop's blend")
    rpo_alpha: float | None = arg(None, "adds α times -log π(y_w)/|y_w| of each pair (IRPO, 2404.19733)")
    use_weighting: bool = arg(False, "weight pairs by their probability under the policy (WPO, 2406.11827)")
    ld_alpha: float | None = arg(None, "weight of tokens past the shorter answer's end (LD-DPO, 2409.06411)")
    ref_model_name_or_path: str | None = arg(None, "the reference [the policy as it is before training]")
    precompute_ref_log_probs: bool = arg(False, "once, before training; the reference then leaves memory")
    sync_ref_model: bool = arg(False, "let the reference follow the policy (TR-DPO, 2404.09656)")
    ref_model_sync_steps: int = arg(512, "steps between these updates")
    ref_model_mixup_alpha: float = arg(0.6, "share of the policy in the updated reference")


# The built-in example: a 336k-parameter character model that translates numbers (tests/toy). So small a model
# takes a far larger learning rate than one of billions of parameters.
TOY = dict(learning_rate=3e-5, max_steps=100, batch_size=32, per_device_train_batch_size=32)
TOY |= dict(per_device_eval_batch_size=250, eval_prompts=500, max_new_tokens=64)


def check(args: Arguments) -> None:
    """Fill in defaults that depend on other arguments; ValueError for what does not go together."""
    if args.label_smoothing is None:
        args.label_smoothing = 1e-3 if "exo_pair" in args.loss_type else 0.0
    args.loss_weights = args.loss_weights or [1.0] * len(args.loss_type)
    if len(args.loss_weights) != len(args.loss_type):
        raise ValueError(f"{len(args.loss_type)} loss types but {len(args.loss_weights)} loss_weights")
    if args.rpo_alpha is not None and "sft" in args.loss_type:
        raise ValueError("rpo_alpha adds the loss type sft, which is there already: give it a weight instead")
    if args.rpo_alpha is not None:
        args.loss_type, args.loss_weights = [*args.loss_type, "sft"], [*args.loss_weights, args.rpo_alpha]
    types = {*args.loss_type}
    if args.label_smoothing and not types & {*SMOOTHED}:
        raise ValueError(f"label_smoothing has no meaning for {', '.join(args.loss_type)}")
    if args.f_divergence_type != "reverse_kl" and not types & {*OF_THE_MARGIN}:
        raise ValueError(f"f_divergence_type has no meaning for {', '.join(args.loss_type)}")
    if args.use_weighting and types & {*WHOLE_BATCH}:
        raise ValueError("use_weighting weights pairs, but aot compares quantiles of the batch")
    if args.ld_alpha is not None and types & {*AVERAGED}:
        raise ValueError(f"ld_alpha changes sums of log-probabilities, but {', '.join(AVERAGED)} average")
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise ValueError("with sync_ref_model the reference changes: it cannot be precomputed")
    for name in ("ld_alpha", "ref_model_mixup_alpha"):
        if not 0 <= (getattr(args, name) or 0) <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {getattr(args, name)}")
    if args.ref_model_sync_steps < 1:
        raise ValueError(f"ref_model_sync_steps must be at least 1, not {args.ref_model_sync_steps}")
    for loss_type in args.loss_type:  # whatever else is wrong dpo_loss says, before any work
        losses_of(torch.zeros(1, 2), torch.zeros(1, 2), loss_type, args, 0.0)


# -------------------------------------------------------------------------------------------- one micro-batch


def losses_of(logps: Tensor, ref_logps: Tensor, loss_type: str, args: Arguments, bco_delta) -> Tensor:
    """dpo_loss (B,) with the options of `args`, from log-probabilities (B, 2) of chosen and rejected."""
    return dpo_loss(
        *logps.unbind(1),
        *ref_logps.unbind(1),
        beta=args.beta,
        loss_type=loss_type,
        label_smoothing=args.label_smoothing if loss_type in SMOOTHED else 0.0,
        f_divergence_type=args.f_divergence_type if loss_type in OF_THE_MARGIN else "reverse_kl",
        f_alpha_divergence_coef=args.f_alpha_divergence_coef,
        discopop_tau=args.discopop_tau,
        bco_delta=bco_delta,
    )


def sum_logps(token_logps: Tensor, batch: Batch, args: Arguments) -> Tensor:
    """Log-probabilities (B, 2) of chosen and rejected. DPO sums over tokens: rewards are of whole answers."""
    if args.ld_alpha is not None:  # LD-DPO counts the tokens that only the longer answer has for less
        shorter = batch.lengths.amin(1)[batch.owner // 2]  # (N,)
        token_logps = torch.where(batch.index < shorter, token_logps, args.ld_alpha * token_logps)
    return batch.sum(token_logps)


@torch.no_grad()
def reference_logps(reference, batch: Batch, args: Arguments) -> Tensor:
    """(B, 2)"""
    if batch.reference_logps is not None:
        return batch.reference_logps
    return sum_logps(reference.score(batch).token_logps, batch, args)


def gather_pairs(logps: Tensor) -> Tensor:
    """The (B, 2) of every process, one below the other; only this process's own carry a gradient."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, logps.detach().cpu())
    parts[dist.get_rank()] = logps
    return torch.cat([part.to(logps.device) for part in parts])


def loss_and_metrics(policy, reference, batch: Batch, args: Arguments, bco_delta) -> tuple[Tensor, dict]:
    """This micro-batch's part of the loss, and of the means of the metrics, of the whole global batch.

    Parts are sums over pairs divided by the number of pairs in the global batch. So they add up, and neither
    loss nor gradient depends on how the batch is split over processes and micro-batches.
    """
    # First, for memory: it keeps nothing for a backward pass.
    ref_logps = reference_logps(reference, batch, args)
    scores = policy.score(batch, collisions=args.use_weighting)
    logps = sum_logps(scores.token_logps, batch, args)  # (B, 2)
    averages = logps / batch.lengths

    weights = 1.0
    if args.use_weighting:
        # WPO, 2406.11827 eq. 2: pairs that the policy itself could have written count for more.
        log_weights = batch.sum(scores.token_logps.detach() - scores.log_collisions) / batch.lengths  # (B, 2)
        weights = log_weights.sum(1).exp().clamp(max=1)  # (B,)

    loss = 0.0
    for loss_type, loss_weight in zip(args.loss_type, args.loss_weights, strict=True):
        if loss_type in AVERAGED:
            losses = losses_of(averages, ref_logps / batch.lengths, loss_type, args, bco_delta)
        elif loss_type in WHOLE_BATCH:
            losses = losses_of(gather_pairs(logps), gather_pairs(ref_logps), loss_type, args, bco_delta)
            # Every process has the losses of all pairs, with the gradient of its own: the gradients add up as
            # they are; of the value, each process counts a share.
            losses = losses - losses.detach() * (1 - 1 / dist.get_world_size())
        else:
            losses = losses_of(logps, ref_logps, loss_type, args, bco_delta)
        loss = loss + loss_weight * (weights * losses).sum() / batch.step_pairs

    rewards = args.beta * (logps - ref_logps).detach()  # (B, 2)
    sums = {
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).sum(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum(),
        "logps/chosen": logps[:, 0].sum(),
        "logps/rejected": logps[:, 1].sum(),
    }
    if "sft" in args.loss_type:
        sums["nll_loss"] = -averages[:, 0].sum()
    parts = {name: value / batch.step_pairs for name, value in sums.items()}
    if policy.balancing_loss:
        # Of a mixture of experts. It is no sum over pairs: here it is the mean over micro-batches.
        parts["aux_loss"] = scores.aux_loss * len(batch.lengths) / batch.step_pairs
        loss = loss + policy.config.router_aux_loss_coef * parts["aux_loss"]
    return loss, {"loss": loss} | parts


# --------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def precompute(reference, pairs: Pairs, groups, size: int, path: Path, args: Arguments) -> Pairs:
    """Pairs with the reference's log-probabilities of the rows in `groups`, kept at `path` for resuming."""
    known = [path.exists()]
    dist.broadcast_object_list(known)  # one decision for all
    if known[0]:
        return pairs._replace(reference_logps=np.load(path))
    logps = torch.zeros(len(pairs.rows), 2, dtype=torch.float64, device=reference.device)
    for rows in tqdm(groups, desc="reference", disable=dist.get_rank() > 0):
        for batch in common.micro_batches(pairs, rows, size, reference.device):
            found = reference_logps(reference, batch, args)
            logps[batch.rows] = found.double()
    dist.all_reduce(logps)
    logps = logps.to(found.dtype).cpu().numpy()
    if dist.get_rank() == 0:
        np.save(path.with_suffix(".tmp.npy"), logps)
        path.with_suffix(".tmp.npy").replace(path)
    return pairs._replace(reference_logps=logps)


@torch.no_grad()
def evaluate(policy, reference, tokenizer, test: Pairs, args: Arguments, log, step: int, bco_delta) -> None:
    """The metrics of the test pairs, all of them as one global batch, and completions of test prompts."""
    # Only aot sorts what all processes have in memory at a time, not all pairs.
    rows = common.by_length(test)
    for batch in common.micro_batches(test, rows, args.per_device_eval_batch_size, policy.device):
        log.add(loss_and_metrics(policy, reference, batch, args, bco_delta)[1])
    metrics, samples = common.complete(policy, tokenizer, test, args, step)
    log.evaluation(step, log.means() | metrics, samples)


def main(args: Arguments) -> None:
    rank, world, device = common.start(args)
    if world * args.per_device_train_batch_size < args.batch_size and {*args.loss_type} & {*WHOLE_BATCH}:
        common.fail(f"aot needs the batch at once: --per_device_train_batch_size {args.batch_size // world}")
    tokenizer = common.load_tokenizer(args)
    train, test = common.load_pairs(args, tokenizer)
    # All batches of the run, (steps, batch_size), are known to all processes.
    batches = common.global_batches(train.lengths, args)
    policy = common.load_model(args.model_name_or_path, args, device, trainable=True)
    path = args.ref_model_name_or_path or args.model_name_or_path
    reference = common.load_model(path, args, device, trainable=False, compact=not args.sync_ref_model)
    if reference.config.get_text_config().vocab_size < len(tokenizer):
        common.fail(f"{path} has fewer tokens than {args.model_name_or_path}: it cannot be the reference")
    optimizer = common.adamw(policy, args)
    bco_delta = torch.zeros((), dtype=torch.float64, device=device)  # the mean reward of all earlier steps
    extra = {"bco_delta": bco_delta} | ({"reference": reference.state_dict()} if args.sync_ref_model else {})
    first_step = common.resume(args, policy, optimizer, extra)

    if args.precompute_ref_log_probs:
        # In the batches of the first epoch: packed alike, they are rounded as the policy's are.
        first_epoch = batches[: len(train.rows) // args.batch_size]
        groups = [*first_epoch, np.setdiff1d(batches, first_epoch)]
        path = Path(args.output_dir, "reference_logps_train.npy")
        train = precompute(reference, train, groups, args.per_device_train_batch_size, path, args)
        if test is not None:
            path = Path(args.output_dir, "reference_logps_test.npy")
            groups, size = [common.by_length(test)], args.per_device_eval_batch_size
            test = precompute(reference, test, groups, size, path, args)
        reference = None
        gc.collect()  # it refers to itself

    log = common.Log(args, first_step, len(batches), len(train.rows), device)
    if test is not None and log.due(first_step):
        evaluate(policy, reference, tokenizer, test, args, log, first_step, bco_delta)
    for step in range(first_step, len(batches)):
        common.seed(args.seed, step, rank)  # what a step depends on, besides the state in checkpoints
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, len(batches), args)
        for batch in common.micro_batches(train, batches[step], args.per_device_train_batch_size, device):
            loss, metrics = loss_and_metrics(policy, reference, batch, args, bco_delta)
            (loss * world).backward()  # fully_shard averages over processes, but these are parts of a sum
            log.add(metrics)
        grad_norm = common.clip_grad_norm(policy, args.max_grad_norm)
        if math.isfinite(grad_norm):  # it is the same on all processes; else all skip the step
            optimizer.step()
        optimizer.zero_grad()

        metrics = log.means()
        if math.isfinite(grad_norm):
            reward = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
            bco_delta += (reward - bco_delta) / (step + 1)
        if args.sync_ref_model and (step + 1) % args.ref_model_sync_steps == 0:
            for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
                old.data.lerp_(new.data, args.ref_model_mixup_alpha)
        tokens = train.lengths[batches[step]].sum()
        log.step(step, metrics, grad_norm, group["lr"], args.batch_size, tokens)

        done = step + 1
        if done == len(batches) or log.interrupted or done % args.save_steps == 0:
            common.save_checkpoint(args, policy, optimizer, done, extra)
        if log.interrupted:
            common.leave(f"interrupted after step {done}, which is saved; the same command goes on")
        if test is not None and log.due(done):
            evaluate(policy, reference, tokenizer, test, args, log, done, bco_delta)
    common.save_model(args, policy, tokenizer)
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(common.parse(Arguments, check, TOY))
