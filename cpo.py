r"""Contrastive Preference Optimization (Xu et al. 2024, https://arxiv.org/abs/2401.08417), and SimPO.

A policy π learns to prefer the chosen answer y_w to the rejected answer y_l of a prompt x, without a
reference model: CPO assumes a uniform one. It also imitates chosen answers, which keeps them likely.

    CPO:    -log σ(β log π(y_w|x) - β log π(y_l|x)) - cpo_alpha log π(y_w|x)      eq. 3-6; sums over tokens
    SimPO:  -log σ(β/|y_w| log π(y_w|x) - β/|y_l| log π(y_l|x) - γ)               2405.14734 eq. 6

The first term is averaged over pairs. Imitation is averaged over all chosen tokens of the batch, as in the
authors' code; the paper writes the sum over a pair's tokens. CPO-SimPO is SimPO with a cpo_alpha above 0.
Differs from the authors' code: sequences are packed instead of padded, which changes no result.

What to expect: without a reference, the first loss and accuracy say how well the policy orders the pairs
already. In the built-in example, 100 steps take the loss on held-out pairs from 0.68 to 0.01 and the accuracy
from 0.49 to 1.00; with SimPO, the loss from 1.54 to 1.41 and the accuracy from 0.65 to 1.00.

    python cpo.py                                     the built-in example, about a minute on a laptop
    torchrun --nproc_per_node 8 cpo.py --loss_type simpo --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir Qwen2-0.5B-SimPO
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import common
from common import TOY_MODEL, Batch, Data, arg

# --------------------------------------------------------------------------------------------------- the loss


AVERAGED = ("ipo", "simpo", "alphapo")  # on log-probabilities per token: sums divided by lengths
LOSS_TYPES = ("sigmoid", "hinge", *AVERAGED)
SMOOTHED = ("sigmoid", "simpo", "alphapo")  # label_smoothing applies to these
TARGET_MARGIN = ("simpo", "alphapo")  # simpo_gamma applies to these


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
    """Losses (B,) of B pairs, from the policy's log-probabilities (B,) of their answers.

    They do not include the imitation term. Log-probabilities are sums over the tokens of an answer; for loss
    types in AVERAGED the caller passes means. `simpo_gamma` is γ; SimPO's authors list γ/β instead. `alpha`
    is AlphaPO's α: unless it is 0, each log-probability t is replaced by (1 - e^(-αt))/α (alphapo.py
    explains it). Training minimises the mean of the losses. Raises ValueError for what is not defined.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in SMOOTHED):
        raise ValueError(f"label_smoothing must be in [0, 0.5), and is for {', '.join(SMOOTHED)} only")
    if simpo_gamma and loss_type not in TARGET_MARGIN:
        raise ValueError(f"simpo_gamma is for {', '.join(TARGET_MARGIN)} only")

    def classify(margins: Tensor) -> Tensor:  # logistic loss, where a fraction ε of the labels may be flipped
        return -F.logsigmoid(margins) * (1 - label_smoothing) - F.logsigmoid(-margins) * label_smoothing

    match loss_type:
        case "sigmoid":
            # CPO, eq. 3: DPO with a uniform reference, which cancels
            return classify(PowerDifference.apply(chosen_logps, rejected_logps, alpha, beta))
        case "hinge":
            # SLiC (2305.10425): a support vector machine on the same margin
            return F.relu(1 - PowerDifference.apply(chosen_logps, rejected_logps, alpha, beta))
        case "ipo":
            # 2310.12036 eq. 17: take the difference to 1/2β, not to infinity
            return (PowerDifference.apply(chosen_logps, rejected_logps, alpha, 1.0) - 1 / (2 * beta)) ** 2
        case "simpo" | "alphapo":
            # SimPO, eq. 6, and AlphaPO, 2501.03884 eq. 4: only margins beyond γ are good enough
            return classify(PowerDifference.apply(chosen_logps, rejected_logps, alpha, beta) - simpo_gamma)
    raise ValueError(f"unknown loss_type '{loss_type}'; known are {', '.join(LOSS_TYPES)}")


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


# ------------------------------------------------------------------------------------------ one training step


def loss_and_metrics(policy, batch: Batch, args: Arguments) -> tuple[Tensor, dict]:
    """What this micro-batch adds to the global batch's mean loss and metrics.

    That is a sum over its pairs or tokens, divided by their number in the global batch. So neither loss nor
    gradient depends on how a batch is split over processes and micro-batches.
    """
    token_logps = policy.token_logps(batch)  # (2B, L): log π of each token of an answer
    values = logps = token_logps.sum(1).view(-1, 2)  # (B, 2): chosen, rejected; CPO sums over tokens
    if args.loss_type in AVERAGED:  # SimPO averages
        values = logps / batch.completions.sum(1).view(-1, 2)
    losses = cpo_loss(
        *values.unbind(1),
        beta=args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        simpo_gamma=args.simpo_gamma,
        alpha=args.alpha,
    )
    nll_loss = -logps[:, 0].sum() / batch.global_tokens["chosen"]  # a mean over all chosen tokens
    loss = losses.sum() / batch.global_pairs + args.cpo_alpha * nll_loss

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

# Published settings: of SimPO for Llama-3-Instruct, of AlphaPO for Mistral-Instruct. The second learning rate
# is that of the built-in example: so small a model takes a far larger one than one of billions of parameters.
OTHERS = {"beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.0, "alpha": 0.0, "learning_rate": (1e-6, 5e-4)}
SIMPO = {"beta": 2.5, "cpo_alpha": 0.0, "simpo_gamma": 1.375, "learning_rate": (1e-6, 3e-5)}
ALPHAPO = {"beta": 2.5, "cpo_alpha": 0.0, "simpo_gamma": 0.1, "alpha": 0.25, "learning_rate": (7e-7, 3e-5)}
DEFAULTS = {"simpo": OTHERS | SIMPO, "alphapo": OTHERS | ALPHAPO}


@dataclass
class Arguments(common.Arguments):
    """CPO's own arguments; those of all methods are in common.py."""

    loss_type: str = arg("sigmoid", f"one of {', '.join(LOSS_TYPES)}")
    beta: float | None = arg(None, "scale of the margin [0.1; simpo and alphapo 2.5]")
    cpo_alpha: float | None = arg(None, "weight of imitation [1; simpo and alphapo 0]")
    simpo_gamma: float | None = arg(None, "target margin γ, not γ/β [simpo 1.375, alphapo 0.1]")
    alpha: float | None = arg(None, "AlphaPO's α, for every loss type [0; alphapo 0.25]")
    label_smoothing: float = arg(0.0, "ε: fraction of flipped labels")
    learning_rate: float | None = arg(None, "peak learning rate [1e-6; alphapo 7e-7; with LoRA ten times]")

    def __post_init__(self):
        super().__post_init__()
        for name, default in DEFAULTS.get(self.loss_type, OTHERS).items():
            if getattr(self, name) is None:
                is_toy = self.model_name_or_path == TOY_MODEL
                setattr(self, name, default[is_toy] if name == "learning_rate" else default)
        # Dry run: let cpo_loss check the options before anything is loaded.
        options = {"beta": self.beta, "loss_type": self.loss_type, "label_smoothing": self.label_smoothing}
        cpo_loss(*torch.zeros(2, 1), **options, simpo_gamma=self.simpo_gamma, alpha=self.alpha)


if __name__ == "__main__":
    main(common.parse(Arguments))
