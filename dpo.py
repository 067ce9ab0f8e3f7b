r"""Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

A policy π learns to prefer the chosen answer y_w to the rejected answer y_l of a prompt x. There is no reward
model. The reward of an answer is β times the log of a ratio: its probability under the policy over that under
the reference π_ref, a frozen copy of the policy made before training.

    reward(y) = β log π(y|x) / π_ref(y|x)             log-probabilities are summed over the tokens of y
    loss      = -log σ(reward(y_w) - reward(y_l))     eq. 7; the mean over pairs

What to expect: before the first step policy and reference agree, so all rewards are 0, the loss is log 2 =
0.693, and the accuracy is 0, because all pairs tie. In the built-in example, 100 steps take the loss on
held-out pairs to 0.58, the margin between the rewards to 0.23 and the accuracy to 0.99.

Differs from the paper: AdamW with linear decay of the learning rate, instead of RMSprop without decay.
Differs from the authors' code: sequences are packed instead of padded, which changes no result, and a row
whose prompt is too long is dropped, unless --truncate_prompt cuts it. DPO's relatives, their losses and
options, follow the training loop; skip them on a first reading.

    python dpo.py                                     the built-in example, about a minute on a laptop
    torchrun --nproc_per_node 8 dpo.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir Qwen2-0.5B-DPO

For a vision–language model, images are in the column image or images, and {"type": "image"} in the messages
of the prompt marks the place of each.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
from common import Batch, Data, arg

# --------------------------------------------------------------------------------------------------- the loss


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    **options,
) -> Tensor:
    """Losses (B,) of B pairs, from log-probabilities (B,) of their answers under policy and reference.

    Each is a sum over the tokens of an answer; for loss types in AVERAGED, pass means over tokens. Training
    minimises the mean of the losses. For the other loss types, and their `options`, see related_loss. Raises
    ValueError for options that are invalid.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if loss_type != "sigmoid" or options:
        logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
        return related_loss(*logps, beta=beta, loss_type=loss_type, **options)
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)  # β log π(y_w|x)/π_ref(y_w|x)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(chosen_rewards - rejected_rewards)  # eq. 7


# ------------------------------------------------------------------------------------------ one training step


def loss_and_metrics(
    policy, reference_logps: Callable[[Batch], Tensor], batch: Batch, args: Arguments, bco_rewards: Tensor
) -> tuple[Tensor, dict]:
    """What this micro-batch adds to the global batch's mean loss and metrics.

    That is a sum over its pairs, divided by the number of pairs in the global batch. So neither loss nor
    gradient depends on how a batch is split over processes and micro-batches. bco_rewards is for the loss
    type bco_pair only.
    """
    ref_logps = reference_logps(batch)  # (B, 2). First, before the policy's activations take up memory
    pair_weights = 1.0
    if args.use_weighting:  # WPO, a relative of DPO
        token_logps, pair_weights = token_logps_and_pair_weights(policy, batch)
    else:
        token_logps = policy.token_logps(batch)  # (2B, L): log π of each token of an answer, 0 elsewhere
    logps = sum_over_tokens(token_logps, batch, args)  # (B, 2): chosen, rejected

    # For DPO itself, this is the sum of dpo_loss(*logps.unbind(1), *ref_logps.unbind(1), beta=args.beta).
    sum_of_losses = weighted_sum_of_losses(logps, ref_logps, pair_weights, batch, args, bco_rewards)
    loss = sum_of_losses / batch.global_pairs

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
        sums["nll_loss"] = -(logps[:, 0] / answer_lengths(batch)[:, 0]).sum()
    metrics = {name: value / batch.global_pairs for name, value in sums.items()}
    if policy.router_loss is not None:
        # The router loss of a mixture of experts is that of a forward pass, not a sum over pairs. This is its
        # mean over micro-batches, weighted by their numbers of pairs.
        metrics["aux_loss"] = policy.router_loss * len(logps) / batch.global_pairs
        loss = loss + policy.config.get_text_config().router_aux_loss_coef * metrics["aux_loss"]
    return loss, {"loss": loss} | metrics


def sum_over_tokens(token_logps: Tensor, batch: Batch, args: Arguments) -> Tensor:
    """log π(y|x) of chosen and rejected answers, (B, 2), from those of their tokens, (2B, L)."""
    if args.ld_alpha is not None:  # LD-DPO, a relative of DPO
        token_logps = torch.where(in_both_answers(batch), token_logps, args.ld_alpha * token_logps)
    return token_logps.sum(1).view(-1, 2)  # DPO sums over tokens; SimPO averages them


# --------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def frozen_logps(open_reference, args: Arguments, batch: Batch) -> Tensor:
    """log π_ref(y|x) of chosen and rejected answers, (B, 2)."""
    with open_reference() as reference:
        return sum_over_tokens(reference.token_logps(batch), batch, args)


@torch.no_grad()
def evaluate(policy, reference_logps, tokenizer, test: Data, args, log, step: int, bco_rewards) -> None:
    """Metrics of the test pairs, all of them as one global batch, and completions of test prompts."""
    # The value of aot, which sorts what all processes hold at a time, depends on per_device_eval_batch_size.
    policy.eval()  # without the dropout of LoRA
    rows = test.lengths.sum(1).argsort(kind="stable")  # micro-batches of similar length
    for batch in common.micro_batches(test, rows, args.per_device_eval_batch_size, policy.device):
        log.add(loss_and_metrics(policy, reference_logps, batch, args, bco_rewards)[1])
    policy.train()
    metrics, samples = common.complete(policy, tokenizer, test, args, step)
    log.evaluation(step, log.all_reduce()[0] | metrics, samples)


def main(args: Arguments) -> None:
    rank, world, device = common.start(args)
    tokenizer = common.load_tokenizer(common.policy_path(args), args)
    if args.freeze_vision_tower and not hasattr(tokenizer, "vision"):
        common.fail(f"--freeze_vision_tower: {args.model_name_or_path} has no vision tower")
    train, test = common.load_data(args, tokenizer)
    # The row numbers of all batches, (steps, batch_size), are the same on all processes.
    batches = common.global_batches(train, args)
    policy = common.load_model(common.policy_path(args), args, device, trainable=True)
    if args.freeze_vision_tower:
        policy.get_encoder(modality="image").requires_grad_(False)
    open_reference = load_reference(args, device, tokenizer, policy)
    optimizer = common.adamw(policy, args)
    bco_rewards = torch.zeros(2, dtype=torch.float64)  # BCO: sum of mean rewards, and number of steps
    method_state = {"bco_rewards": bco_rewards}
    if args.sync_ref_model:
        with open_reference() as reference:
            method_state["reference"] = reference.state_dict()
    common.claim_output_dir(args)
    first_step = common.resume(args, policy, optimizer, method_state)

    train_ref_logps = test_ref_logps = partial(frozen_logps, open_reference, args)
    if args.precompute_ref_log_probs:
        train_ref_logps, test_ref_logps = precompute(train_ref_logps, train, test, batches, args, device)
        open_reference = None
        gc.collect()  # the model refers to itself through token_logps: only the collector frees it

    log = common.Log(args, first_step, batches, train)
    if test is not None and log.evaluation_due(first_step):
        evaluate(policy, test_ref_logps, tokenizer, test, args, log, first_step, bco_rewards)
    for step in range(first_step, len(batches)):
        torch.manual_seed(hash((args.seed, step, rank)))  # makes a step reproducible after a resume
        lr = common.set_learning_rate(optimizer, step, len(batches), args)
        for batch in common.micro_batches(train, batches[step], args.per_device_train_batch_size, device):
            loss, metrics = loss_and_metrics(policy, train_ref_logps, batch, args, bco_rewards)
            policy.set_requires_gradient_sync(batch.is_last or not args.sync_gradients_once)
            (loss * world).backward()  # fully_shard averages gradients over processes; the sum is needed
            log.add(metrics)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        grad_norm = norm.full_tensor().item()  # of the whole gradient, the same on all processes
        if math.isfinite(grad_norm):  # otherwise all processes skip the step
            optimizer.step()
        optimizer.zero_grad()

        metrics, interrupted = log.all_reduce()
        if math.isfinite(grad_norm):
            reward = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
            bco_rewards += torch.tensor([reward, 1.0], dtype=torch.float64)
        if args.sync_ref_model and (step + 1) % args.ref_model_sync_steps == 0:
            with open_reference() as reference:
                for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
                    old.data.lerp_(new.data, args.ref_model_mixup_alpha)
        tokens = train.lengths[batches[step]].sum()
        log.step(step, metrics | {"grad_norm": grad_norm, "learning_rate": lr}, tokens)

        done = step + 1
        if done == len(batches) or interrupted or done % args.save_steps == 0:
            common.save_checkpoint(args, policy, optimizer, done, method_state, interrupted=interrupted)
        if test is not None and log.evaluation_due(done):
            evaluate(policy, test_ref_logps, tokenizer, test, args, log, done, bco_rewards)
    common.save_model(args, policy, tokenizer)
    log.close()
    dist.destroy_process_group()


# ----------------------------------------------------------------------- DPO's relatives: their losses

# Grouped by what they depend on: the difference of the two rewards; the two rewards separately; means over
# tokens; or all pairs of a step, which are sorted.
MARGIN = ("sigmoid", "hinge", "robust", "exo_pair", "discopop")
REWARDS = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
AVERAGED = ("ipo", "sigmoid_norm", "sft")
WHOLE_BATCH = ("aot", "aot_unpaired", "aot_pair")
LOSS_TYPES = MARGIN + REWARDS + AVERAGED + WHOLE_BATCH
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", *WHOLE_BATCH)  # label_smoothing applies to these


def related_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    bco_delta: float = 0.0,
) -> Tensor:
    """dpo_loss for all loss types and options. In comments, ε is label_smoothing and z is `margins`."""
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in SMOOTHED):
        raise ValueError(f"label_smoothing must be in [0, 0.5), and is for {', '.join(SMOOTHED)} only")
    if not discopop_tau > 0:
        raise ValueError(f"discopop_tau must be positive, not {discopop_tau}")
    if f_divergence_type != "reverse_kl" and loss_type in LOSS_TYPES and loss_type not in MARGIN:
        raise ValueError(f"f_divergence_type {f_divergence_type} is for {', '.join(MARGIN)} only")

    chosen_log_ratio = chosen_logps - ref_chosen_logps  # log π(y_w|x)/π_ref(y_w|x)
    rejected_log_ratio = rejected_logps - ref_rejected_logps
    log_ratios = chosen_log_ratio, rejected_log_ratio
    chosen_rewards, rejected_rewards = beta * chosen_log_ratio, beta * rejected_log_ratio
    margins = f_margin(*log_ratios, beta, f_divergence_type, f_alpha_divergence_coef)  # z

    def classify(margins: Tensor) -> Tensor:
        # The logistic loss; with ε above 0, that of conservative DPO (cdpo.pdf eq. 3).
        return -F.logsigmoid(margins) * (1 - label_smoothing) - F.logsigmoid(-margins) * label_smoothing

    match loss_type:
        case "sigmoid" | "sigmoid_norm":
            # DPO, 2305.18290 eq. 7; length-normalised as in SimPO's appendix and Tülu 3
            return classify(margins)
        case "hinge":
            # RSO (2309.06657), SLiC (2305.10425): the hinge loss of support vector machines
            return F.relu(1 - margins)
        case "ipo":
            # 2310.12036 eq. 17, of means as in its experiments: take the difference to 1/2β, not to infinity
            return (chosen_log_ratio - rejected_log_ratio - 1 / (2 * beta)) ** 2
        case "robust":
            # 2403.00409: unbiased if a fraction ε of the labels is flipped; can go to -∞
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
            # The second term is σ(z/τ) e^(-z), written so that it cannot become 0·inf.
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
            return (chosen_log_ratio - 1 / (2 * beta)) ** 2 + (rejected_log_ratio + 1 / (2 * beta)) ** 2
        case "apo_zero":
            # 2408.06266 eq. 7: chosen up, rejected down; for chosen answers better than the policy's own
            return 1 - chosen_rewards.sigmoid() + rejected_rewards.sigmoid()
        case "apo_down":
            # 2408.06266 eq. 8: both down, rejected more; for when the policy's answers are better than both
            return chosen_rewards.sigmoid() + 1 - margins.sigmoid()
        case "aot":
            # 2406.05882: the sorted margins of the policy should exceed those of the reference, rank by rank
            policy_margins, ref_margins = chosen_logps - rejected_logps, ref_chosen_logps - ref_rejected_logps
            return classify(beta * (policy_margins.sort().values - ref_margins.sort().values))
        case "aot_unpaired" | "aot_pair":
            # the sorted rewards of all chosen answers should exceed those of all rejected, rank by rank;
            # aot_pair is TRL's older name for it
            return classify(beta * (chosen_log_ratio.sort().values - rejected_log_ratio.sort().values))
        case "sft":
            # imitation of the chosen answer, as a term of weighted sums such as MPO (2411.10442)
            return -chosen_logps
    raise ValueError(f"unknown loss_type '{loss_type}'; known are {', '.join(LOSS_TYPES)}")


def f_margin(
    chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, beta: float, f_divergence_type: str, alpha: float
) -> Tensor:
    """β (f'(u_w) - f'(u_l)), (B,), where u = π/π_ref, from log u_w and log u_l (B,).

    Source: f-DPO, 2309.16240 table 1. DPO itself has the reverse KL divergence, f' = log u. `alpha` is the
    paper's α, of the alpha divergence.
    """
    match f_divergence_type:
        case "reverse_kl":
            return beta * (chosen_log_ratio - rejected_log_ratio)
        case "js_divergence":  # f' = log 2u/(1+u) = log 2 + log σ(log u)
            return beta * (F.logsigmoid(chosen_log_ratio) - F.logsigmoid(rejected_log_ratio))
        case "forward_kl":  # f' = -1/u: up to a constant, the alpha divergence at α = 1
            return PowerDifference.apply(chosen_log_ratio, rejected_log_ratio, 1.0, beta)
        case "alpha_divergence":  # f' = (1 - u^-α)/α
            return PowerDifference.apply(chosen_log_ratio, rejected_log_ratio, alpha, beta)
    known = "reverse_kl, js_divergence, forward_kl, alpha_divergence"
    raise ValueError(f"unknown f_divergence_type '{f_divergence_type}'; known are {known}")


class PowerDifference(torch.autograd.Function):
    """β (e^(-αy) - e^(-αx))/α of x and y, all (B,); a value that overflows becomes the largest number."""

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
        def times_slope(t: Tensor) -> Tensor:  # d/dt of -β e^(-αt)/α; 0 where no gradient arrives
            return torch.where(grad == 0, grad, grad * (math.log(ctx.beta) - ctx.alpha * t).exp())

        x, y = ctx.saved_tensors
        return times_slope(x), -times_slope(y), None, None


# ---------------------------------------------------------------------- DPO's relatives: options of a step


def weighted_sum_of_losses(
    logps: Tensor, ref_logps: Tensor, pair_weights, batch: Batch, args: Arguments, bco_rewards: Tensor
) -> Tensor:
    """The weighted sum of the losses over loss types and pairs, from log-probabilities (B, 2) of answers."""
    total = 0.0
    for loss_type, loss_weight in zip(args.loss_type, args.loss_weights, strict=True):
        inputs = [logps, ref_logps]
        if loss_type in AVERAGED:
            inputs = [values / answer_lengths(batch) for values in inputs]
        elif loss_type in WHOLE_BATCH:
            inputs = [gather_pairs(values) for values in inputs]
        options = {"beta": args.beta, "loss_type": loss_type, **loss_options(loss_type, args, bco_rewards)}
        losses = dpo_loss(*inputs[0].unbind(1), *inputs[1].unbind(1), **options)
        if loss_type in WHOLE_BATCH:
            # Each rank sees all losses but differentiates only its own log-probabilities; the value, not the
            # gradient, is scaled by 1/world.
            losses = losses - losses.detach() * (1 - 1 / dist.get_world_size())
        total = total + loss_weight * (pair_weights * losses).sum()
    return total


def loss_options(loss_type: str, args: Arguments, bco_rewards: Tensor) -> dict:
    """The options of dpo_loss, for this loss type; none for DPO itself without label smoothing."""
    options, smoothing = {}, args.label_smoothing
    if loss_type == "exo_pair" and smoothing is None:
        smoothing = 1e-3
    if loss_type in SMOOTHED and smoothing:
        options["label_smoothing"] = smoothing
    if loss_type in MARGIN and args.f_divergence_type != "reverse_kl":
        options["f_divergence_type"] = args.f_divergence_type
        options["f_alpha_divergence_coef"] = args.f_alpha_divergence_coef
    if loss_type == "discopop":
        options["discopop_tau"] = args.discopop_tau
    if loss_type == "bco_pair":
        total, steps = bco_rewards.tolist()
        options["bco_delta"] = total / max(steps, 1)  # the mean reward of all steps that were not skipped
    return options


def answer_lengths(batch: Batch) -> Tensor:
    """The numbers of tokens of chosen and rejected answers, (B, 2)."""
    return batch.completions.sum(1).view(-1, 2)


def gather_pairs(logps: Tensor) -> Tensor:
    """Concatenate the (B, 2) of all processes; only this process's own have a gradient."""
    everyones = common.gather(logps.detach().cpu())
    everyones[dist.get_rank()] = logps
    return torch.cat([values.to(logps.device) for values in everyones])


def token_logps_and_pair_weights(policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """WPO, 2406.11827 eq. 2: pairs that the policy itself could have written count for more.

    Returns log-probabilities (2B, L) and weights (B,), at most 1: the product over both answers of the
    geometric mean of π(y_t) / Σ_v π(v)², over tokens t and with v in the vocabulary. They weight all terms
    of the loss, also those of rpo_alpha. No gradient goes through them.
    """

    def logps_and_collisions(logits: Tensor, labels: Tensor) -> Tensor:  # (N, 2): log π(y_t), log Σ_v π(v)²
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return torch.stack([logps.gather(1, labels[:, None])[:, 0], (2 * logps.detach()).logsumexp(1)], dim=1)

    token_logps, collisions = policy.token_logps(batch, of=logps_and_collisions).unbind(-1)  # (2B, L) each
    sums = (token_logps - collisions).detach().sum(1).view(-1, 2)
    log_weights = (sums / answer_lengths(batch)).sum(1)  # (B,)
    return token_logps, log_weights.exp().clamp(max=1)


def in_both_answers(batch: Batch) -> Tensor:
    """(2B, L) bool: where both answers of a pair have a token; LD-DPO weights the others by ld_alpha.

    Source: 2409.06411. The logged rewards and log-probabilities are weighted as well.
    """
    is_answer = batch.completions.unflatten(0, (-1, 2))  # (B, 2, L): both begin in the same column
    return is_answer.all(1, keepdim=True).expand_as(is_answer).flatten(0, 1)


def load_reference(args: Arguments, device: torch.device, tokenizer, policy):
    """The model that the policy is compared with; by default the policy as it is before training."""
    # Returns a function, for `with open_reference() as reference:`. With LoRA, the reference is the policy
    # itself, which is as it was before training until the block ends.
    path = args.ref_model_name_or_path
    other = common.load_tokenizer(path, args) if path else tokenizer
    if other.get_vocab() != tokenizer.get_vocab():
        common.fail(f"the reference {path} has another vocabulary than {args.model_name_or_path}")
    kinds = [[hasattr(x, "vision"), getattr(x, "decoder_prompt", None)] for x in (other, tokenizer)]
    if kinds[0] != kinds[1]:
        common.fail(f"the reference {path} and {args.model_name_or_path} differ in images or an encoder")
    open_reference = common.load_reference(path, policy, args, device, updated=args.sync_ref_model)
    with open_reference() as reference:
        shapes, policy_shapes = ([p.shape for p in m.parameters()] for m in (reference, policy))
        if args.sync_ref_model and shapes != policy_shapes:
            common.fail(f"--sync_ref_model averages weights, but those of {path} have other shapes")
    return open_reference


def precompute(reference_logps, train: Data, test: Data | None, batches, args: Arguments, device) -> tuple:
    """Compute the reference's log-probabilities of all pairs; returns what looks them up, for each split."""
    # The micro-batches of epoch 1, so that the reference rounds as the policy does; then the other rows.
    first_epoch = batches[: len(train.lengths) // batches.shape[1]]
    groups, size = [*first_epoch, np.setdiff1d(batches, first_epoch)], args.per_device_train_batch_size
    train_table = reference_table(reference_logps, train, "train", groups, size, args, device)
    if test is None:
        return train_table, None
    groups, size = [test.lengths.sum(1).argsort(kind="stable")], args.per_device_eval_batch_size
    return train_table, reference_table(reference_logps, test, "test", groups, size, args, device)


def reference_table(reference_logps, data: Data, name: str, groups, size: int, args, device) -> Callable:
    """A function of a batch of `data` that looks up what reference_logps says; the table is kept on disk."""
    path = Path(args.output_dir, f"reference_logps_{name}.npy")
    if not common.gather(path.exists())[0]:
        table = torch.zeros(len(data.lengths), 2, dtype=torch.float64, device=device)
        for rows in tqdm(groups, desc=f"reference, {name} split", disable=dist.get_rank() > 0):
            for batch in common.micro_batches(data, rows, size, device):
                table[batch.rows] = reference_logps(batch).double()
        dist.all_reduce(table)
        if dist.get_rank() == 0:
            np.save(path.with_suffix(".tmp.npy"), table.cpu().numpy())
            path.with_suffix(".tmp.npy").replace(path)
        dist.barrier()
    table = torch.from_numpy(np.load(path)).to(torch.float64 if args.dtype == "float64" else torch.float32)
    return lambda batch: common.copy_to(device, table[batch.rows])


# -------------------------------------------------------------------------------------------------- arguments


@dataclass
class Arguments(common.Arguments):
    """DPO's own arguments; those of all methods are in common.py."""

    beta: float = arg(0.1, "strength of the tie to the reference (IPO's τ)")
    loss_type: list[str] = arg(["sigmoid"], f"one or more of {', '.join(LOSS_TYPES)}")
    loss_weights: list[float] | None = arg(None, "weight of each loss type [1]")
    label_smoothing: float | None = arg(None, "ε: fraction of flipped labels [0; for exo_pair 1e-3]")
    f_divergence_type: str = arg("reverse_kl", "or js_divergence, forward_kl, alpha_divergence")
    f_alpha_divergence_coef: float = arg(0.5, "α of the alpha divergence")
    discopop_tau: float = arg(0.05, "temperature of discopop's blend")
    rpo_alpha: float | None = arg(None, "adds α times -log π(y_w)/|y_w| of each pair (IRPO, 2404.19733)")
    use_weighting: bool = arg(False, "weight pairs by their probability under the policy (WPO, 2406.11827)")
    ld_alpha: float | None = arg(None, "weight of tokens past the shorter answer's end (LD-DPO, 2409.06411)")
    ref_model_name_or_path: str | None = arg(None, "the reference [the policy as it is before training]")
    ref_adapter_name: str | None = arg(None, "the reference: an adapter in a folder of model_name_or_path")
    freeze_vision_tower: bool = arg(False, "train only the rest of a vision–language model")
    precompute_ref_log_probs: bool = arg(False, "compute the reference's log-probabilities, then free it")
    sync_ref_model: bool = arg(False, "let the reference follow the policy (TR-DPO, 2404.09656)")
    ref_model_sync_steps: int = arg(512, "steps between updates of the reference")
    ref_model_mixup_alpha: float = arg(0.6, "share of the policy in the updated reference")

    def __post_init__(self):
        super().__post_init__()
        self.loss_weights = self.loss_weights or [1.0] * len(self.loss_type)
        if len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"{len(self.loss_type)} loss types but {len(self.loss_weights)} loss_weights")
        if self.rpo_alpha is not None:
            if "sft" in self.loss_type:
                raise ValueError("rpo_alpha adds the loss type sft, which is there already: give it a weight")
            self.loss_type, self.loss_weights = [*self.loss_type, "sft"], [*self.loss_weights, self.rpo_alpha]
        types = {*self.loss_type}
        for name in types & {"cpo", "simpo", "alphapo", "orpo", "xpo"}:
            raise ValueError(f"loss_type {name} is in {'cpo' if name == 'simpo' else name}.py")
        if self.label_smoothing and not types & {*SMOOTHED}:
            raise ValueError(f"label_smoothing has no meaning for {', '.join(self.loss_type)}")
        if self.f_divergence_type != "reverse_kl" and not types & {*MARGIN}:
            raise ValueError(f"f_divergence_type has no meaning for {', '.join(self.loss_type)}")
        if self.use_weighting and types & {*WHOLE_BATCH}:
            raise ValueError("use_weighting weights pairs, but aot compares quantiles of the batch")
        if self.ld_alpha is not None and types & {*AVERAGED}:
            raise ValueError(f"ld_alpha changes sums of log-probabilities, but {', '.join(AVERAGED)} average")
        if self.ref_adapter_name and self.ref_model_name_or_path:
            raise ValueError("ref_adapter_name and ref_model_name_or_path both name the reference: give one")
        if self.sync_ref_model and self.use_peft:
            raise ValueError("sync_ref_model averages weights, and a reference of LoRA has none of its own")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("with sync_ref_model the reference changes: it cannot be precomputed")
        for name in ("ld_alpha", "ref_model_mixup_alpha"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps must be at least 1, not {self.ref_model_sync_steps}")
        per_process = self.batch_size // int(os.environ.get("WORLD_SIZE", 1))
        if types & {*WHOLE_BATCH} and self.per_device_train_batch_size < per_process:
            raise ValueError(f"aot needs the batch at once: --per_device_train_batch_size {per_process}")
        # Dry run: let dpo_loss check the remaining options before anything is loaded.
        for loss_type in self.loss_type:
            options = loss_options(loss_type, self, bco_rewards=torch.zeros(2))
            dpo_loss(*torch.zeros(4, 1), beta=self.beta, loss_type=loss_type, **options)


if __name__ == "__main__":
    # The model of the built-in example is tiny and needs a larger learning rate.
    main(common.parse(Arguments, learning_rate=3e-5))
