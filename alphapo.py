r"""AlphaPO: the shape of the reward matters (Gupta et al. 2025, https://arxiv.org/abs/2501.03884).

A policy π learns to prefer the chosen answer y_w to the rejected answer y_l of a prompt x. There is no
reference: the reward is a function of the policy's log-probability per token, t = log π(y|x) / |y|, and α
bends that function.

    r(t) = (1 - e^(-αt)) / α                           eq. 4; r(t) = t, so SimPO, at α = 0
    loss = -log σ(β r(t_w) - β r(t_l) - γ)             the mean over pairs

The slope r'(t) = e^(-αt) says how hard an answer is pushed. All t are negative; unlikely answers have the
lowest ones.

    α > 0   The slope is larger for unlikely answers. Rejected answers are pushed further down, but a chosen
            answer that has become unlikely is also pushed back up.
    α = 0   The slope is 1: SimPO pushes all answers alike.
    α < 0   The slope vanishes for unlikely answers, which are left alone: r stays between -1/|α| and 0.

What to expect: without a reference, the first loss and accuracy say how well the policy orders the pairs
already. In the built-in example, 100 steps take the loss on held-out pairs from 0.70 to 0.63 and the accuracy
from 0.65 to 1.00.

Differs from the paper: where e^(-αt) overflows, the difference of the rewards does not become NaN.

    python alphapo.py                                 the built-in example, about a minute on a laptop
    torchrun --nproc_per_node 8 alphapo.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir Qwen2-0.5B-AlphaPO
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


def alphapo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float = 2.5,
    gamma: float = 0.1,
    alpha: float = 0.25,
) -> Tensor:
    """Losses (B,) of B pairs, from the policy's mean log-probabilities per token (B,) of their completions.

    Training minimises the mean of the losses. Raises ValueError unless beta is positive. Source: eq. 4.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    return -F.logsigmoid(PowerDifference.apply(chosen_logps, rejected_logps, alpha, beta) - gamma)


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


def log_odds(logps: Tensor) -> Tensor:
    """log p/(1-p) of p = e^logps, of any shape: exact for p near 1, and finite if p was rounded to 1."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).tiny)
    return logps - (-torch.expm1(logps)).log()


# ------------------------------------------------------------------------------------------ one training step


def loss_and_metrics(policy, batch: Batch, args: Arguments) -> tuple[Tensor, dict]:
    """What this micro-batch adds to the global batch's mean loss and metrics.

    That is a sum over its pairs, divided by their number in the global batch. So neither loss nor gradient
    depends on how a batch is split over processes and micro-batches.
    """
    token_logps = policy.token_logps(batch)  # (2B, L): log π of each token of an answer
    logps = token_logps.sum(1).view(-1, 2)  # (B, 2): chosen, rejected
    # AlphaPO's reward depends on the mean over tokens.
    averages = logps / batch.completions.sum(1).view(-1, 2)
    losses = alphapo_loss(*averages.unbind(1), beta=args.beta, gamma=args.gamma, alpha=args.alpha)
    loss = losses.sum() / batch.global_pairs
    nll_loss = -logps[:, 0].detach().sum() / batch.global_tokens["chosen"]  # to watch; it is not in the loss

    averages = averages.detach()
    rewards = -torch.expm1(-args.alpha * averages) / args.alpha if args.alpha else averages
    rewards = args.beta * rewards  # (B, 2)
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
    train, test = common.load_data(args, tokenizer)
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
    """AlphaPO's own arguments; those of all methods are in common.py."""

    beta: float = arg(2.5, "scale of the reward")
    gamma: float = arg(0.1, "target margin of the rewards")
    alpha: float = arg(0.25, "shape of the reward; 0 is SimPO")
    learning_rate: float = arg(7e-7, "peak learning rate of AdamW; with LoRA, ten times the default")

    def __post_init__(self):
        super().__post_init__()
        # Dry run: let alphapo_loss check the options before anything is loaded.
        alphapo_loss(*torch.zeros(2, 1), beta=self.beta, gamma=self.gamma, alpha=self.alpha)


if __name__ == "__main__":
    # The model of the built-in example is tiny and needs a larger learning rate.
    main(common.parse(Arguments, learning_rate=3e-5))
