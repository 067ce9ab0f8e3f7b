"""Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), all its losses.

A policy π learns to prefer the chosen answer y_w to the rejected answer y_l of a prompt x. No reward model, no
sampling: the policy's own log-probabilities, against a frozen copy of where it started, are the reward.

    reward(y) = β log π(y|x) / π_ref(y|x)             log-probabilities are summed over the tokens of y
    loss      = -log σ(reward(y_w) - reward(y_l))     eq. 7; the mean over pairs

Differs from the paper: AdamW in place of RMSprop. From the authors' code: prompt and answers are packed without
padding, which changes no number. The relatives of DPO say at their line in `dpo_loss` where they come from.

    python dpo.py                                     the built-in example, about a minute on a laptop
    torchrun --nproc_per_node 8 dpo.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir Qwen2-0.5B-DPO
"""

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

# ------------------------------------------------------------------------------------------------------ the loss

AVERAGED = (
    "ipo",
    "sigmoid_norm",
    "sft",
)  # these compare log-probabilities per token: sums divided by lengths
WHOLE_BATCH = (
    "aot",
    "aot_unpaired",
    "aot_pair",
)  # these sort, so that they need all pairs of the step at once
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "aot_pair")
OF_THE_MARGIN = (
    "sigmoid",
    "hinge",
    "robust",
    "exo_pair",
    "discopop",
)  # functions of z, which f-divergences redefine
LOSS_TYPES = (
    *OF_THE_MARGIN, "ipo", "sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sft",
    *WHOLE_BATCH,
)  # fmt: skip


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
    """Losses (B,) of B pairs, from log-probabilities (B,) of whole completions under the policy and the reference.

    Log-probabilities are sums over a completion's tokens; for the loss types in AVERAGED the caller passes means.
    The step minimises the mean of the losses. Raises ValueError for a loss type or an option that is not defined.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type '{loss_type}'; known are {', '.join(LOSS_TYPES)}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in SMOOTHED):
        raise ValueError(f"label_smoothing is a share of wrong labels in [0, 0.5), for {', '.join(SMOOTHED)}")
    if f_divergence_type != "reverse_kl" and loss_type not in OF_THE_MARGIN:
        raise ValueError(
            f"f_divergence_type {f_divergence_type} is defined for {', '.join(OF_THE_MARGIN)} only"
        )

    chosen = chosen_logps - ref_chosen_logps  # log π(y_w)/π_ref(y_w)
    rejected = rejected_logps - ref_rejected_logps  # log π(y_l)/π_ref(y_l)
    margin = beta * f_margin(chosen, rejected, f_divergence_type, f_alpha_divergence_coef)

    match loss_type:
        case (
            "sigmoid" | "sigmoid_norm"
        ):  # DPO, 2305.18290 eq. 7; smoothed: conservative DPO (ericmitchell.ai/cdpo.pdf)
            return -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
        case "hinge":  # RSO (2309.06657) and SLiC (2305.10425): a support vector machine on the same margin
            return F.relu(1 - margin)
        case "ipo":  # 2310.12036 eq. 17: regress the margin to 1/2β, rather than push it to infinity
            return (chosen - rejected - 1 / (2 * beta)) ** 2
        case "robust":  # 2403.00409: cDPO, made unbiased under a share of flipped labels; unbounded below
            return -F.logsigmoid(margin) - label_smoothing / (1 - 2 * label_smoothing) * margin
        case "exo_pair":  # 2402.00856 eq. 16: the reverse KL(q || (1-ε, ε)) of q = (σ(z), σ(-z))
            if label_smoothing == 0:
                raise ValueError("exo_pair needs a label_smoothing above 0, such as 1e-3: it enters as log ε")
            against_chosen = F.logsigmoid(margin) - math.log(1 - label_smoothing)
            against_rejected = F.logsigmoid(-margin) - math.log(label_smoothing)
            return margin.sigmoid() * against_chosen + (-margin).sigmoid() * against_rejected
        case (
            "discopop"
        ):  # 2406.08414 eq. 5: a blend of logistic and exponential loss, found by a language model
            blend = (-margin / discopop_tau).sigmoid()
            exponential = (
                -margin - F.softplus(-margin / discopop_tau)
            ).exp()  # σ(z/τ) e^(-z), which cannot be 0·inf
            return -blend * F.logsigmoid(margin) + exponential
        case (
            "nca_pair"
        ):  # 2402.05369: each reward against zero, so that chosen answers do not become less likely
            return (
                -F.logsigmoid(beta * chosen)
                - (F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)) / 2
            )
        case (
            "bco_pair"
        ):  # 2404.04656: a classifier of good and bad answers, its threshold δ the mean reward so far
            return -F.logsigmoid(beta * chosen - bco_delta) - F.logsigmoid(bco_delta - beta * rejected)
        case "sppo_hard":  # 2405.00675 eq. 4.7: the chosen log-ratio to 1/2β, the rejected one to -1/2β
            return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
        case (
            "apo_zero"
        ):  # 2408.06266 eq. 7: chosen up, rejected down; for a policy that is worse than the chosen answers
            return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()
        case (
            "apo_down"
        ):  # 2408.06266 eq. 8: both down, rejected further; for a policy that is better than both
            return (beta * chosen).sigmoid() + (-margin).sigmoid()
        case (
            "aot"
        ):  # 2406.05882: the policy's sorted margins should exceed the reference's, quantile by quantile
            margins = (chosen_logps - rejected_logps).sort().values - (
                ref_chosen_logps - ref_rejected_logps
            ).sort().values
        case (
            "aot_unpaired" | "aot_pair"
        ):  # the same for rewards: those of all chosen against those of all rejected
            margins = chosen.sort().values - rejected.sort().values
        case "sft":  # plain imitation of the chosen answer, for weighted sums such as MPO (2411.10442)
            return -chosen_logps
    return (
        -F.logsigmoid(beta * margins) * (1 - label_smoothing)
        - F.logsigmoid(-beta * margins) * label_smoothing
    )


def f_margin(chosen: Tensor, rejected: Tensor, f_divergence_type: str, alpha: float) -> Tensor:
    """f'(u_w) - f'(u_l), (B,), for u = π/π_ref = e^(log-ratio), all (B,): f-DPO, 2309.16240 table 1.

    The usual DPO is the reverse KL divergence, with f' = log u. `alpha` is the paper's α, of the alpha divergence.
    """
    match f_divergence_type:
        case "reverse_kl":
            return chosen - rejected
        case "js_divergence":  # f' = log 2u/(1+u) = log 2 + log σ(log u)
            return F.logsigmoid(chosen) - F.logsigmoid(rejected)
        case "forward_kl":  # f' = -1/u, the alpha divergence (up to a constant) at α = 1
            return PowerDifference.apply(chosen, rejected, 1.0)
        case "alpha_divergence":  # f' = (1 - u^-α)/α
            return PowerDifference.apply(chosen, rejected, alpha)
    raise ValueError(
        f"unknown f_divergence_type '{f_divergence_type}'; "
        "known are reverse_kl, js_divergence, forward_kl and alpha_divergence"
    )


class PowerDifference(torch.autograd.Function):
    """(e^(-αy) - e^(-αx))/α, (B,), of x, y (B,), where autograd of the plain formula gives inf - inf and 0·inf = NaN."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.alpha = alpha
        if alpha == 0:
            return x - y
        # The larger of the exponentials factored out, and all in logs: it overflows only where the result does.
        gap = -torch.expm1(-abs(alpha) * (x - y).abs())
        larger = torch.maximum(-alpha * x, -alpha * y)
        return (x - y).sign() * (larger + gap.log() - math.log(abs(alpha))).exp()

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, y = ctx.saved_tensors

        def push(
            t: Tensor,
        ) -> Tensor:  # d/dt is e^(-αt); where the loss is flat, even an infinite slope leaves nothing
            return torch.where(grad == 0, grad, grad * (-ctx.alpha * t).exp())

        return push(x), -push(y), None


# ----------------------------------------------------------------------------------------------------- arguments


@dataclass
class Arguments(common.Arguments):
    """DPO's own arguments; those that all methods share are in common.py."""

    beta: float = arg(0.1, "strength of the tie to the reference model (IPO's τ)")
    loss_type: list[str] = arg(["sigmoid"], f"one or more of {', '.join(LOSS_TYPES)}")
    loss_weights: list[float] | None = arg(None, "weights of several loss types in the sum [1 each]")
    label_smoothing: float | None = arg(None, "ε: share of pairs with swapped labels [0; exo_pair 1e-3]")
    f_divergence_type: str = arg("reverse_kl", "or js_divergence, forward_kl, alpha_divergence")
    f_alpha_divergence_coef: float = arg(0.5, "α of the alpha divergence")
    discopop_tau: float = arg(0.05, "temperature of discopop's blend")
    rpo_alpha: float | None = arg(
        None, "weight of an added -log π(y_w)/|y_w|, of each pair (IRPO, 2404.19733)"
    )
    use_weighting: bool = arg(False, "weight each pair by its probability under the policy (WPO, 2406.11827)")
    ld_alpha: float | None = arg(
        None, "weight of tokens beyond the shorter answer's length (LD-DPO, 2409.06411)"
    )
    ref_model_name_or_path: str | None = arg(None, "the reference [the policy before training]")
    precompute_ref_log_probs: bool = arg(False, "once before training; the reference then leaves memory")
    sync_ref_model: bool = arg(False, "let the reference follow the policy (TR-DPO, 2404.09656)")
    ref_model_sync_steps: int = arg(512, "steps between these updates")
    ref_model_mixup_alpha: float = arg(0.6, "share of the policy in the updated reference")


# Without arguments: a 336k-parameter character model that translates numbers, see tests/toy. Small models take, and
# need, far larger learning rates than large ones.
TOY = dict(
    learning_rate=3e-5,
    max_steps=100,
    batch_size=32,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=250,
    eval_prompts=500,
    max_new_tokens=64,
)


def check(args: Arguments) -> None:
    """Fill in defaults that depend on other arguments; ValueError for what does not go together."""
    if args.label_smoothing is None:
        args.label_smoothing = 1e-3 if "exo_pair" in args.loss_type else 0.0
    args.loss_weights = args.loss_weights or [1.0] * len(args.loss_type)
    if len(args.loss_weights) != len(args.loss_type):
        raise ValueError(f"{len(args.loss_type)} loss types but {len(args.loss_weights)} loss_weights")
    if args.rpo_alpha is not None:  # the same term by its other name
        args.loss_type, args.loss_weights = [*args.loss_type, "sft"], [*args.loss_weights, args.rpo_alpha]
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise ValueError(
            "sync_ref_model changes the reference, so precompute_ref_log_probs cannot be used with it"
        )
    if args.label_smoothing and not {*args.loss_type} & {*SMOOTHED}:
        raise ValueError(f"label_smoothing has no meaning for {', '.join(args.loss_type)}")
    if args.use_weighting and {*args.loss_type} & {*WHOLE_BATCH}:
        raise ValueError("use_weighting weights pairs, but aot compares quantiles of a batch")
    if args.ld_alpha is not None and {*args.loss_type} & {*AVERAGED}:
        raise ValueError(
            f"ld_alpha changes sums of log-probabilities; {', '.join(AVERAGED)} and rpo_alpha average"
        )
    if args.ref_model_sync_steps < 1:
        raise ValueError(f"ref_model_sync_steps must be at least 1, not {args.ref_model_sync_steps}")
    for loss_type in args.loss_type:  # dpo_loss says what else is wrong: ask it before any work
        losses_of(torch.zeros(1, 2), torch.zeros(1, 2), loss_type, args, 0.0)


# ------------------------------------------------------------------------------------------- one micro-batch


def losses_of(
    logps: Tensor, ref_logps: Tensor, loss_type: str, args: Arguments, bco_delta: float | Tensor
) -> Tensor:
    """dpo_loss with the options of `args`, from log-probabilities (B, 2) of chosen and rejected."""
    return dpo_loss(
        *logps.unbind(1),
        *ref_logps.unbind(1),
        beta=args.beta,
        loss_type=loss_type,
        label_smoothing=args.label_smoothing if loss_type in SMOOTHED else 0.0,
        f_divergence_type=args.f_divergence_type,
        f_alpha_divergence_coef=args.f_alpha_divergence_coef,
        discopop_tau=args.discopop_tau,
        bco_delta=bco_delta,
    )


def completion_logps(token_logps: Tensor, batch: Batch, args: Arguments) -> Tensor:
    """(B, 2): DPO sums over tokens, it does not average: its reward is of the whole answer."""
    if (
        args.ld_alpha is not None
    ):  # count tokens less that only the longer answer has; LD-DPO, 2409.06411 eq. 9
        shorter = batch.lengths.amin(1)[batch.owner // 2]  # (N,)
        token_logps = torch.where(batch.index < shorter, token_logps, args.ld_alpha * token_logps)
    return batch.sum(token_logps)


@torch.no_grad()
def reference_logps(reference, batch: Batch, args: Arguments) -> Tensor:
    """(B, 2)"""
    if batch.reference_logps is not None:
        return batch.reference_logps
    return completion_logps(reference.score(batch).token_logps, batch, args)


def gather_pairs(logps: Tensor) -> Tensor:
    """The (B, 2) of every process, one below the other; only this process's own carry a gradient."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, logps.detach().cpu())
    parts[dist.get_rank()] = logps
    return torch.cat([part.to(logps.device) for part in parts])


def loss_and_metrics(
    policy, reference, batch: Batch, args: Arguments, bco_delta: Tensor
) -> tuple[Tensor, dict]:
    """This micro-batch's part of the loss, and of the means of the metrics, of the whole global batch.

    Parts are sums over pairs divided by the number of pairs in the global batch: so they add up, and neither loss nor
    gradient depends on how the batch is split over processes and micro-batches.
    """
    ref_logps = reference_logps(
        reference, batch, args
    )  # first, for memory: it keeps nothing for a backward pass
    scores = policy.score(batch, collisions=args.use_weighting)
    logps = completion_logps(scores.token_logps, batch, args)  # (B, 2)

    weights = 1.0
    if (
        args.use_weighting
    ):  # WPO, 2406.11827 eq. 2: how likely the policy itself would be to give these answers
        log_weights = batch.sum(scores.token_logps.detach() - scores.log_collisions) / batch.lengths  # (B, 2)
        weights = log_weights.sum(1).exp().clamp(max=1)  # (B,)

    loss, averages = 0.0, logps / batch.lengths
    for loss_type, loss_weight in zip(args.loss_type, args.loss_weights, strict=True):
        if loss_type in AVERAGED:
            losses = losses_of(averages, ref_logps / batch.lengths, loss_type, args, bco_delta)
        elif loss_type in WHOLE_BATCH:
            losses = losses_of(gather_pairs(logps), gather_pairs(ref_logps), loss_type, args, bco_delta)
            # Every process has the losses of all pairs. Their gradients differ, and add up; their values are shared out.
            losses = losses - losses.detach() * (1 - 1 / dist.get_world_size())
        else:
            losses = losses_of(logps, ref_logps, loss_type, args, bco_delta)
        loss = loss + loss_weight * (weights * losses).sum() / batch.step_pairs

    rewards = args.beta * (logps - ref_logps).detach()  # (B, 2)
    sums = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/accuracies": rewards[:, 0] > rewards[:, 1],
        "rewards/margins": rewards[:, 0] - rewards[:, 1],
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }
    if "sft" in args.loss_type:
        sums["nll_loss"] = -averages[:, 0]
    parts = {name: values.sum() / batch.step_pairs for name, values in sums.items()}
    if (
        policy.balancing_loss
    ):  # of a mixture of experts; not a sum over pairs: the mean over micro-batches stands in
        parts["aux_loss"] = scores.aux_loss * len(batch.lengths) / batch.step_pairs
        loss = loss + policy.config.router_aux_loss_coef * parts["aux_loss"]
    return loss, {"loss": loss, **parts}


# --------------------------------------------------------------------------------------------------- training


def by_length(pairs: Pairs) -> np.ndarray:
    """The row numbers, short pairs first, so that those of a batch are alike."""
    return np.argsort(pairs.lengths.sum(1), kind="stable")


@torch.no_grad()
def evaluate(
    policy, reference, tokenizer, test: Pairs, args: Arguments, log, step: int, bco_delta: Tensor
) -> None:
    """The same metrics on the test pairs, all of them one global batch; and completions of test prompts."""
    for batch in common.micro_batches(test, by_length(test), args.per_device_eval_batch_size, log.device):
        log.add(loss_and_metrics(policy, reference, batch, args, bco_delta)[1])
    metrics, samples = common.complete(policy, tokenizer, test, args, step)
    log.evaluation(step, log.means() | metrics, samples)


@torch.no_grad()
def precompute(
    reference, pairs: Pairs, groups: list[np.ndarray], size: int, path: Path, args: Arguments
) -> Pairs:
    """The pairs with the reference's log-probabilities of those in `groups`, kept at `path` for when a run goes on."""
    if not path.exists():
        dtype = torch.promote_types(getattr(torch, args.dtype), torch.float32)
        logps = torch.zeros(len(pairs.rows), 2, dtype=dtype, device=reference.device)
        for rows in tqdm(groups, desc="reference", disable=dist.get_rank() > 0):
            for batch in common.micro_batches(pairs, rows, size, reference.device):
                logps[batch.rows] = reference_logps(reference, batch, args)
        dist.all_reduce(logps)
        if dist.get_rank() == 0:
            np.save(path.with_suffix(".tmp.npy"), logps.cpu().numpy())
            path.with_suffix(".tmp.npy").replace(path)
        dist.barrier()
    return pairs._replace(reference_logps=np.load(path))


def main(args: Arguments) -> None:
    try:
        check(args)
    except ValueError as error:
        common.fail(str(error))
    rank, world, device = common.start(args)
    if world * args.per_device_train_batch_size < args.batch_size and {*args.loss_type} & {*WHOLE_BATCH}:
        common.fail(
            f"aot sorts the whole batch: --per_device_train_batch_size {args.batch_size // world} holds it"
        )
    tokenizer = common.load_tokenizer(args)
    train, test = common.load_pairs(args, tokenizer)
    batches = common.global_batches(
        train.lengths, args
    )  # (steps, batch_size): the whole run, known to every process
    policy = common.load_model(args.model_name_or_path, args, device, trainable=True)
    path = args.ref_model_name_or_path or args.model_name_or_path
    reference = common.load_model(path, args, device, trainable=False, compact=not args.sync_ref_model)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(
        policy.parameters(), betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=True
    )
    bco_delta = torch.zeros((), dtype=torch.float64, device=device)  # the mean reward of all steps so far
    extra = {"bco_delta": bco_delta}
    if args.sync_ref_model:
        extra["reference"] = reference.state_dict()
    first_step = common.resume(args, policy, optimizer, extra)
    if args.precompute_ref_log_probs:
        # In the batches of the first epoch, so that packing and with it rounding are as in the policy's first pass.
        first_epoch = batches[: len(train.rows) // args.batch_size]
        rest = np.setdiff1d(batches, first_epoch)
        groups = [*first_epoch, *np.split(rest, range(args.batch_size, len(rest), args.batch_size))]
        path = Path(args.output_dir, "reference_logps_train.npy")
        train = precompute(reference, train, groups, args.per_device_train_batch_size, path, args)
        if test:
            path = Path(args.output_dir, "reference_logps_test.npy")
            test = precompute(reference, test, [by_length(test)], args.per_device_eval_batch_size, path, args)
        reference = None
    log = common.Log(args, first_step, len(batches), device)
    if first_step == 0 and test:
        evaluate(policy, reference, tokenizer, test, args, log, 0, bco_delta)

    skipped = 0
    for step in range(first_step, len(batches)):
        common.seed(
            args.seed, step, rank
        )  # a step depends on nothing else but the state that checkpoints hold
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, len(batches), args)
        for batch in common.micro_batches(train, batches[step], args.per_device_train_batch_size, device):
            loss, metrics = loss_and_metrics(policy, reference, batch, args, bco_delta)
            (loss * world).backward()  # fully_shard averages over processes, but these are parts of a sum
            log.add(metrics)
        grad_norm = (
            torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor().item()
        )
        if math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad()

        metrics = log.means()
        bco_delta += ((metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2 - bco_delta) / (step + 1)
        if args.sync_ref_model and (step + 1) % args.ref_model_sync_steps == 0:
            for ours, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
                ours.data.lerp_(theirs.data, args.ref_model_mixup_alpha)
        skipped = 0 if math.isfinite(grad_norm) else skipped + 1  # on every process alike
        metrics |= {"grad_norm": grad_norm, "skipped": float(skipped > 0), "learning_rate": group["lr"]}
        metrics["epoch"] = (step + 1) * args.batch_size / len(train.rows)
        log.step(step + 1, metrics, args.batch_size, int(train.lengths[batches[step]].sum()))
        if skipped == 3:
            common.fail(f"the gradient was not finite three times in a row, the last time in step {step + 1}")

        last = step + 1 == len(batches)
        if test and (last or (args.eval_steps and (step + 1) % args.eval_steps == 0)):
            evaluate(policy, reference, tokenizer, test, args, log, step + 1, bco_delta)
        if last or log.interrupted or (step + 1) % args.save_steps == 0:
            common.save_checkpoint(args, policy, optimizer, step + 1, extra)
        if log.interrupted:
            common.say(
                f"interrupted after step {step + 1}, which is saved; the same command goes on from there"
            )
            raise SystemExit(143)
    common.save_model(args, policy, tokenizer)
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(common.parse(Arguments, TOY))
