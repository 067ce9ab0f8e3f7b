r"""ORPO: Odds Ratio Preference Optimization (Hong et al. 2024, https://arxiv.org/abs/2403.07691) in one file.

ORPO learns from instructions and preferences in one stage and needs no reference model. The policy π imitates
the chosen answer y_w of a prompt x, while the odds of y_w grow against those of the rejected answer y_l.

    p(y)    = π(y|x)^(1/|y|)                           the geometric mean of its tokens' probabilities
    odds(y) = p(y) / (1 - p(y))                        eq. 4
    loss    = NLL - β log σ(log odds(y_w)/odds(y_l))   eq. 6 and 7; the paper writes λ for β

|y| counts the tokens of y, with the EOS. The second term is averaged over pairs. NLL is averaged over all
prompt and chosen tokens of the global batch, which is the default of the authors' code. The paper's equation
has the chosen tokens only: use --no_prompt_loss. An encoder–decoder model does not predict prompts. Differs
from the authors' code: sequences are packed instead of padded, and log(1 - p) is exact for p near 1.

What to expect: the first evaluation shows the untrained policy, how well it imitates the chosen answers and
how often it already prefers them. In the built-in example, 100 steps take the loss on held-out pairs from
1.15 to 0.22 and the accuracy from 0.65 to 1.00.

    python orpo.py                                    the built-in example, about a minute on a laptop
    torchrun --nproc_per_node 8 orpo.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir Qwen2-0.5B-ORPO
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import common
from common import Batch, Data, arg

# --------------------------------------------------------------------------------------------------- the loss


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """The odds ratio loss of each pair (B,), from the mean log-probabilities per token (B,), below 0.

    ORPO minimises β times their mean, plus the NLL. Source: eq. 7.
    """
    return -F.logsigmoid(log_odds(chosen_logps) - log_odds(rejected_logps))


def log_odds(logps: Tensor) -> Tensor:
    """log p/(1-p) of p = e^logps, of any shape: exact for p near 1, and finite if p was rounded to 1."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).tiny)
    return logps - (-torch.expm1(logps)).log()


# ------------------------------------------------------------------------------------------ one training step


def loss_and_metrics(policy, batch: Batch, args: Arguments) -> tuple[Tensor, dict]:
    """What this micro-batch adds to the global batch's mean loss and metrics.

    That is a sum over its pairs or tokens, divided by their number in the global batch. So neither loss nor
    gradient depends on how a batch is split over processes and micro-batches.
    """
    token_logps = policy.token_logps(batch)  # (2B, L): log π of each token of an answer, and of prompts once
    logps = torch.where(batch.completions, token_logps, 0.0).sum(1).view(-1, 2)  # (B, 2): chosen, rejected
    averages = logps / batch.completions.sum(1).view(-1, 2)  # ORPO normalizes by length
    nll, tokens = -logps[:, 0].sum(), batch.global_tokens["chosen"]
    if not args.no_prompt_loss:
        # Prompts and chosen answers. Nothing predicts the first token of a prompt.
        nll = -token_logps[::2].sum()
        tokens += batch.global_tokens["prompt"] - batch.global_pairs
    nll_loss = nll / tokens
    loss = nll_loss + args.beta * orpo_loss(*averages.unbind(1)).sum() / batch.global_pairs

    averages = averages.detach()
    rewards = args.beta * averages  # (B, 2)
    log_odds_chosen = log_odds(averages[:, 0]) - log_odds(averages[:, 1])
    sums = {
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/accuracies": (averages[:, 0] > averages[:, 1]).sum(),  # also if β is 0
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum(),
        "logps/chosen": logps[:, 0].sum(),
        "logps/rejected": logps[:, 1].sum(),
        "log_odds_chosen": log_odds_chosen.sum(),
        "log_odds_ratio": F.logsigmoid(log_odds_chosen).sum(),
    }
    metrics = {name: value / batch.global_pairs for name, value in sums.items()}
    if policy.router_loss is not None:
        # The router loss of a mixture of experts is that of a forward pass, not a sum over pairs. This is its
        # mean over micro-batches, weighted by their numbers of pairs.
        metrics["aux_loss"] = policy.router_loss * len(logps) / batch.global_pairs
        loss = loss + policy.config.get_text_config().router_aux_loss_coef * metrics["aux_loss"]
    return loss, {"loss": loss, "nll_loss": nll_loss} | metrics


# --------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def evaluate(policy, tokenizer, test: Data, args: Arguments, log, step: int) -> None:
    """Metrics of the test pairs, all of them as one global batch, and completions of test prompts."""
    policy.eval()  # without the dropout of LoRA
    rows = test.lengths.sum(1).argsort(kind="stable")  # micro-batches of similar length
    for batch in common.micro_batches(test, rows, args.per_device_eval_batch_size, policy.device):
        log.add(loss_and_metrics(policy, batch, args)[1])
    policy.train()
    metrics, samples = common.complete(policy, tokenizer, test, args, step)
    log.evaluation(step, log.all_reduce()[0] | metrics, samples)


def main(args: Arguments) -> None:
    rank, world, device = common.start(args)
    tokenizer = common.load_tokenizer(common.policy_path(args), args)
    train, test = common.load_data(args, tokenizer, score_prompts=not args.no_prompt_loss)
    # The row numbers of all batches, (steps, batch_size), are the same on all processes.
    batches = common.global_batches(train, args)
    policy = common.load_model(common.policy_path(args), args, device, trainable=True)
    optimizer = common.adamw(policy, args)
    common.claim_output_dir(args)
    first_step = common.resume(args, policy, optimizer, {})

    log = common.Log(args, first_step, batches, train)
    if test is not None and log.evaluation_due(first_step):
        evaluate(policy, tokenizer, test, args, log, first_step)
    for step in range(first_step, len(batches)):
        torch.manual_seed(hash((args.seed, step, rank)))  # makes a step reproducible after a resume
        lr = common.set_learning_rate(optimizer, step, len(batches), args)
        for batch in common.micro_batches(train, batches[step], args.per_device_train_batch_size, device):
            loss, metrics = loss_and_metrics(policy, batch, args)
            policy.set_requires_gradient_sync(batch.is_last or not args.sync_gradients_once)
            (loss * world).backward()  # fully_shard averages gradients over processes; the sum is needed
            log.add(metrics)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        grad_norm = norm.full_tensor().item()  # of the whole gradient, the same on all processes
        if math.isfinite(grad_norm):  # otherwise all processes skip the step
            optimizer.step()
        optimizer.zero_grad()

        metrics, interrupted = log.all_reduce()
        tokens = train.lengths[batches[step]].sum()
        log.step(step, metrics | {"grad_norm": grad_norm, "learning_rate": lr}, tokens)

        done = step + 1
        if done == len(batches) or interrupted or done % args.save_steps == 0:
            common.save_checkpoint(args, policy, optimizer, done, {}, interrupted=interrupted)
        if test is not None and log.evaluation_due(done):
            evaluate(policy, tokenizer, test, args, log, done)
    common.save_model(args, policy, tokenizer)
    log.close()
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------- arguments


@dataclass
class Arguments(common.Arguments):
    """ORPO's own arguments; those of all methods are in common.py."""

    beta: float = arg(0.1, "weight of the odds ratio against the NLL (the paper's λ)")
    learning_rate: float = arg(5e-6, "peak learning rate of AdamW; with LoRA, ten times the default")
    no_prompt_loss: bool = arg(False, "NLL of the chosen answers only, not of prompts")

    def __post_init__(self):
        super().__post_init__()
        if not self.beta >= 0:
            raise ValueError(f"beta must not be negative, as {self.beta} is")


if __name__ == "__main__":
    # The model of the built-in example is tiny and needs a larger learning rate.
    main(common.parse(Arguments, learning_rate=1e-3))
