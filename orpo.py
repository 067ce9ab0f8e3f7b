r"""ORPO: Odds Ratio Preference Optimization (Hong et al. 2024, https://arxiv.org/abs/2403.07691) in one file.

Fine-tuning and preference learning in one step, without a reference: a policy π imitates the chosen answer
y_w of a prompt x, while the odds of y_w grow against those of the rejected answer y_l.

    p(y)    = π(y|x)^(1/|y|)                           the geometric mean of its tokens' probabilities
    odds(y) = p(y) / (1 - p(y))                        eq. 4
    loss    = NLL - β log σ(log odds(y_w)/odds(y_l))   eq. 6 and 7, where β is called λ; its mean over pairs

NLL is the mean negative log-probability per token over all prompt and chosen tokens of the batch, as in the
authors' code by default; --no_prompt_loss leaves the prompts out, as the paper writes it. Differs from the
authors' code: answers are packed, not padded, and log(1 - p) is exact for p near 1.

    python orpo.py                                    the built-in example, about a minute on a laptop
    torchrun --nproc_per_node 8 orpo.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir Qwen2-0.5B-ORPO
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import common
from common import Batch, Pairs, arg

# --------------------------------------------------------------------------------------------------- the loss


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """Odds ratio losses (B,) of B pairs, from the policy's mean log-probabilities per token (B,), below 0.

    ORPO minimises β times their mean, plus the NLL. Source: eq. 7.
    """
    return -F.logsigmoid(log_odds(chosen_logps) - log_odds(rejected_logps))


def log_odds(logps: Tensor) -> Tensor:
    """log p/(1-p) of p = e^logps, of any shape: exact for p near 1, finite even for a p rounded to 1."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).tiny)
    return logps - (-torch.expm1(logps)).log()


# -------------------------------------------------------------------------------------------------- arguments


@dataclass
class Arguments(common.Arguments):
    """ORPO's own arguments; those of all methods are in common.py."""

    beta: float = arg(0.1, "weight of the odds ratio against the NLL (the paper's λ)")
    no_prompt_loss: bool = arg(False, "NLL of the chosen answers only, not of prompts")


# The built-in example: a 336k-parameter character model that translates numbers (tests/toy). So small a model
# takes a far larger learning rate than one of billions of parameters.
TOY = dict(learning_rate=1e-3, max_steps=100, batch_size=32, per_device_train_batch_size=32)
TOY |= dict(per_device_eval_batch_size=250, eval_prompts=500, max_new_tokens=64)


def check(args: Arguments) -> None:
    """ValueError for what is not defined."""
    if not args.beta >= 0:
        raise ValueError(f"beta must not be negative, as {args.beta} is")


# -------------------------------------------------------------------------------------------- one micro-batch


def loss_and_metrics(policy, batch: Batch, args: Arguments) -> tuple[Tensor, dict]:
    """This micro-batch's part of the loss, and of the means of the metrics, of the whole global batch.

    Parts are sums over pairs or tokens divided by their number in the global batch. So they add up, and
    neither loss nor gradient depends on how the batch is split over processes and micro-batches.
    """
    scores = policy.score(batch)
    logps = batch.sum(scores.token_logps)  # (B, 2)
    averages = logps / batch.lengths  # ORPO's odds are of the geometric mean
    nll, tokens = -logps[:, 0].sum(), batch.step_tokens[1]
    if not args.no_prompt_loss:
        nll = nll - batch.prompt_sum(scores.token_logps).sum()
        tokens += batch.step_tokens[0] - batch.step_pairs  # the first token of a prompt has no prediction
    nll_loss = nll / tokens
    loss = nll_loss + args.beta * orpo_loss(*averages.unbind(1)).sum() / batch.step_pairs

    averages = averages.detach()
    rewards = args.beta * averages  # (B, 2)
    log_odds_chosen = log_odds(averages[:, 0]) - log_odds(averages[:, 1])
    sums = {
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).sum(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum(),
        "logps/chosen": logps[:, 0].sum(),
        "logps/rejected": logps[:, 1].sum(),
        "log_odds_chosen": log_odds_chosen.sum(),
        "log_odds_ratio": F.logsigmoid(log_odds_chosen).sum(),
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
    train, test = common.load_pairs(args, tokenizer, score_prompts=not args.no_prompt_loss)
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
