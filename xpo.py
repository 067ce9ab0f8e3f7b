r"""Exploratory Preference Optimization (Xie et al. 2024, https://arxiv.org/abs/2405.21046), online.

At every step the policy π and the reference π_ref answer each prompt x once, with y and ỹ; a reward model
or a judge says which answer is better; DPO learns from that pair. And a bonus for optimism: the policy
gives up what the reference would have said, to leave probability for answers that nobody has tried.

    loss = -log σ(β log π(y_w|x)/π_ref(y_w|x) - β log π(y_l|x)/π_ref(y_l|x)) + α log π(ỹ|x)     Algorithm 1

The bonus acts on ỹ, the reference's answer, whoever wins. Log-probabilities are sums over tokens, the loss
is the mean over prompts. α = 0 is online DPO. Differs from the paper: one step of AdamW on a batch of new
pairs, where Algorithm 1 minimises over all pairs so far; the better score is the label, not a draw from the
scores' preference; and the last policy is the result, not the best so far.

    python xpo.py                                     the built-in example, about two minutes on a laptop
    torchrun --nproc_per_node 8 xpo.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --reward_model_path trl-lib/Qwen2-0.5B-Reward --dataset_name trl-lib/ultrafeedback-prompt
"""

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
from common import TOY_MODEL, Batch, Pairs, arg

# --------------------------------------------------------------------------------------------------- the loss


def xpo_loss(
    logps: Tensor,
    logps_of_ref_sample: Tensor,
    ref_logps: Tensor,
    ref_logps_of_ref_sample: Tensor,
    policy_wins: Tensor,
    *,
    beta: float = 0.1,
    alpha: float | Tensor = 1e-5,
    loss_type: str = "sigmoid",
) -> Tensor:
    """Losses (B,) of B prompts, from log-probabilities (B,) of the policy's sample y and the reference's ỹ.

    The first two are the policy's log-probabilities of y and of ỹ, the next two the reference's;
    policy_wins (B,), bool, says whether y is the better. Sums over tokens; for "ipo" the caller passes
    means, and α|ỹ| for alpha. Training minimises the mean of the losses. Raises ValueError for what is not
    defined. Source: Algorithm 1.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    log_ratios, log_ratios_of_ref_sample = logps - ref_logps, logps_of_ref_sample - ref_logps_of_ref_sample
    difference = log_ratios - log_ratios_of_ref_sample
    difference = torch.where(policy_wins, difference, -difference)  # chosen less rejected
    match loss_type:
        case "sigmoid":  # DPO
            losses = -F.logsigmoid(beta * difference)
        case "ipo":  # 2310.12036 eq. 17
            losses = (difference - 1 / (2 * beta)) ** 2
        case _:
            raise ValueError(f"unknown loss_type '{loss_type}'; known are sigmoid, ipo")
    return losses + alpha * logps_of_ref_sample


# -------------------------------------------------------------------------------------------------- arguments


@dataclass
class Arguments(common.Arguments):
    """XPO's own arguments; those of all methods are in common.py. A pair is a prompt and its two samples."""

    reward_model_path: str | None = arg(None, "a sequence classifier of one output: Hub or directory")
    judge: str | None = arg(None, "or path/to/file.py:function, of prompts and pairs of answers")
    alpha: list[float] = arg([1e-5], "weight of the exploration bonus: one value, or one per epoch")
    beta: list[float] = arg([0.1], "strength of the tie to the reference: one value, or one per epoch")
    loss_type: str = arg("sigmoid", "or ipo")
    learning_rate: float = arg(5e-7, "peak learning rate of AdamW")
    missing_eos_penalty: float | None = arg(None, "subtracted from the score of a completion without EOS")
    temperature: float = arg(1.0, "of the samples; 1 is the models' own distribution, as in the paper")
    top_p: float = arg(1.0, "sample from the likeliest tokens with this probability together")
    top_k: int = arg(0, "sample from so many tokens; 0: from all")
    min_p: float | None = arg(None, "sample from tokens with this share of the likeliest one's probability")
    sync_ref_model: bool = arg(False, "let the reference follow the policy (TR-DPO, 2404.09656)")
    ref_model_sync_steps: int = arg(512, "steps between these updates")
    ref_model_mixup_alpha: float = arg(0.6, "share of the policy in the updated reference")


# The built-in example: a 336k-parameter character model that translates numbers (tests/toy). So small a model
# takes a far larger learning rate than one of billions of parameters.
TOY = dict(learning_rate=3e-4, max_steps=60, batch_size=32, per_device_train_batch_size=32)
TOY |= dict(per_device_eval_batch_size=250, eval_prompts=500, max_new_tokens=64)


def check(args: Arguments) -> None:
    """ValueError for what is not defined or does not go together."""
    if not args.judge and args.model_name_or_path == TOY_MODEL:
        args.reward_model_path = args.reward_model_path or str(Path(TOY_MODEL).parent / "reward")
    if (args.reward_model_path is None) == (args.judge is None):
        raise ValueError("give --reward_model_path or --judge, one of them: it says which answer is better")
    if args.judge and args.missing_eos_penalty is not None:
        raise ValueError("missing_eos_penalty changes scores, but a judge gives none")
    if not args.temperature > 0:
        raise ValueError(f"temperature must be positive, not {args.temperature}: the method needs samples")
    if not (0 < args.top_p <= 1 and args.top_k >= 0 and 0 <= (args.min_p or 0) <= 1):
        raise ValueError("top_p must be in (0, 1], top_k at least 0, min_p in [0, 1]")
    if not args.alpha or min(args.alpha) < 0:
        raise ValueError(f"alpha must be one or more values of at least 0, not {args.alpha}")
    if args.max_new_tokens >= args.max_length:
        raise ValueError(f"max_length {args.max_length} has to exceed max_new_tokens {args.max_new_tokens}")
    if not 0 <= args.ref_model_mixup_alpha <= 1:
        raise ValueError(f"ref_model_mixup_alpha must be in [0, 1], not {args.ref_model_mixup_alpha}")
    if args.ref_model_sync_steps < 1:
        raise ValueError(f"ref_model_sync_steps must be at least 1, not {args.ref_model_sync_steps}")
    if args.judge:
        load_judge(args.judge)
    zero = torch.zeros(1)
    if not args.beta:
        raise ValueError("beta must be one or more values")
    for beta in args.beta:  # whatever else is wrong xpo_loss says, before any work
        xpo_loss(zero, zero, zero, zero, zero > 0, beta=beta, loss_type=args.loss_type)


# ----------------------------------------------------------------------------------------- samples and scores


def tokenize_prompt(row: dict, tokenizer, max_length: int, *, max_new_tokens: int) -> dict:
    """Token ids `prompt`, and `raw`, the prompt as JSON; or the `problem` that forbids to train on it."""
    result = {"prompt": [], "chosen": [], "rejected": [], "raw": "", "problem": "", "moved": False}
    prompt = row.get("prompt")
    if row.get("chosen") and row.get("rejected"):
        prompt = common.split_prompt(prompt, row["chosen"], row["rejected"])[0]
    if not prompt:
        return result | {"problem": "the prompt is empty"}
    try:
        ids = common.encode(tokenizer, prompt)
    except Exception as error:  # whatever a template does with what it was not written for
        return result | {"problem": f"the chat template refuses it: {common.first_line(error)}"}
    if not ids:
        return result | {"problem": "the prompt is empty"}
    if len(ids) > max_length - max_new_tokens:
        return result | {"problem": f"the prompt leaves no room for {max_new_tokens} more tokens"}
    return result | {"prompt": ids, "raw": json.dumps(prompt)}


@cache
def load_judge(path: str) -> Callable:
    """The function of `path/to/file.py:function`. It runs that file: ValueError if there is none.

    It takes prompts (texts or lists of messages) and pairs of answers (texts), and returns a list: for each
    pair 0 if the first is better, 1 if the second is, -1 if neither.
    """
    file, _, name = path.rpartition(":")
    if not (file.endswith(".py") and Path(file).is_file()):
        raise ValueError(f"judge must be path/to/file.py:function, and {file or path} is no such file")
    spec = importlib.util.spec_from_file_location("judge", file)
    module = sys.modules["judge"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"there is no function {name} in {file}")
    return getattr(module, name)


def load_scorer(args: Arguments, device: torch.device, prompt) -> Callable[[list, list[str]], Tensor]:
    """A function of prompts (texts or messages, as `prompt`) and completions (texts): the scores (B,)."""
    tokenizer = common.from_pretrained(AutoTokenizer, args.reward_model_path, args)
    if isinstance(prompt, list) and not tokenizer.chat_template:
        common.fail("the prompts are conversations, but the reward model's tokenizer has no chat template")
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    kind = AutoModelForSequenceClassification
    model = common.from_pretrained(kind, args.reward_model_path, args, dtype=dtype)
    if model.config.num_labels != 1:
        common.fail(f"{args.reward_model_path} has {model.config.num_labels} outputs; a reward model has one")
    model = common.shard(model.eval().requires_grad_(False), args, device, reshard_after_forward=True)

    @torch.no_grad()
    def scores(prompts: list, completions: list[str]) -> Tensor:
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            turn = [{"role": "assistant", "content": completion}]
            rows.append(common.encode(tokenizer, prompt, completion if isinstance(prompt, str) else turn))
        found = []
        for start in range(0, len(rows), args.per_device_eval_batch_size):
            part = rows[start : start + args.per_device_eval_batch_size]
            longest, used = max(map(len, part)), {token for row in part for token in row}
            # The model takes the score from the last token that is not padding: so padding has to be a
            # token that no text contains, which EOS, often used for it, is not.
            pad = next(token for token in range(len(used) + 1) if token not in used)
            model.config.get_text_config().pad_token_id = pad
            ids = torch.tensor([row + [pad] * (longest - len(row)) for row in part], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part], device=device)
            found.append(model(input_ids=ids, attention_mask=mask).logits[:, 0].float())
        return torch.cat(found)

    return scores


@dataclass
class Samples:
    """The answers of both models to B prompts, and which is better."""

    tokens: list[tuple[list[int], list[int], list[int]]]  # of prompt, the policy's y, the reference's ỹ
    texts: list[tuple[str, str]]  # of y and ỹ
    preferences: Tensor  # (B,) 1 if y is better, -1 if ỹ is, 0 if neither
    scores: Tensor | None  # (B, 2) of y and ỹ; a judge gives none
    ended: Tensor  # (B, 2) whether they end in EOS
    seconds: dict[str, float]

    def count_tokens(self) -> int:
        return sum(len(tokens) for prompt_and_answers in self.tokens for tokens in prompt_and_answers)


def sampling(args: Arguments) -> dict:
    """How completions are sampled, for generate()."""
    options = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    return options | ({} if args.min_p is None else {"min_p": args.min_p})


def sample(policy, reference, decide: Callable, tokenizer, rows: dict, args: Arguments) -> Samples:
    """Both models' answers to the prompts of these rows, scored or judged by `decide`."""
    start = time.perf_counter()
    models, options = (policy, reference), sampling(args)
    answers = [common.generate(model, tokenizer, rows["prompt"], args, **options) for model in models]
    generated = time.perf_counter()
    texts = [common.decode_answers(tokenizer, rows["prompt"], part) for part in answers]
    prompts, eos = [json.loads(raw) for raw in rows["raw"]], common.eos_ids(policy, tokenizer)
    ended = torch.tensor([[answer[-1] in eos for answer in pair] for pair in zip(*answers, strict=True)])
    scores = None
    if args.judge:
        # In random order: a judge that favours the first answer is not to favour a model.
        swapped = (torch.rand(len(prompts)) < 0.5).tolist()
        pairs = [(b, a) if swap else (a, b) for a, b, swap in zip(*texts, swapped, strict=True)]
        better = decide(prompts, pairs)
        if len(better) != len(pairs) or not {*better} <= {0, 1, -1}:
            wanted = f"0, 1 or -1 for each of {len(pairs)} pairs"
            common.fail(f"the judge must return {wanted}, not {better}", alone=True)
        sides = [(1, -1, 0)[b] * (-1 if swap else 1) for b, swap in zip(better, swapped, strict=True)]
        preferences = torch.tensor(sides)
    else:
        scores = torch.stack([decide(prompts, part).cpu() for part in texts], dim=1)
        if not scores.isfinite().all():
            common.fail("the reward model gave a score that is not finite", alone=True)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * ~ended
        preferences = (scores[:, 0] - scores[:, 1]).sign()
    seconds = {"time/generation": generated - start, "time/scoring": time.perf_counter() - generated}
    tokens = list(zip(rows["prompt"], *answers, strict=True))
    return Samples(tokens, list(zip(*texts, strict=True)), preferences, scores, ended, seconds)


# -------------------------------------------------------------------------------------------- one micro-batch


def loss_and_metrics(policy, reference, batch: Batch, wins: Tensor, args: Arguments, epoch: int):
    """This micro-batch's part of the loss, and of the means of the metrics, of the whole global batch.

    Its "chosen" are the policy's samples and its "rejected" the reference's; wins (B,), bool, says which is
    better. Parts are sums over pairs divided by the number of pairs in the global batch. So they add up,
    and neither loss nor gradient depends on how the batch is split over processes and micro-batches.
    """
    alpha, beta = at(args.alpha, epoch), at(args.beta, epoch)
    with torch.no_grad():  # first, for memory: it keeps nothing for a backward pass
        ref_logps = batch.sum(reference.score(batch).token_logps)  # (B, 2)
    scores = policy.score(batch)
    logps = batch.sum(scores.token_logps)  # (B, 2); XPO sums over tokens
    averages = args.loss_type == "ipo"  # IPO averages; the bonus is a sum nonetheless
    divisor = batch.lengths if averages else torch.ones_like(batch.lengths)  # (B, 2)
    values, ref_values = (logps / divisor).unbind(1), (ref_logps / divisor).unbind(1)
    options = {"beta": beta, "alpha": alpha * divisor[:, 1], "loss_type": args.loss_type}
    losses = xpo_loss(*values, *ref_values, wins, **options)
    loss = losses.sum() / batch.step_pairs

    bonus = alpha * logps[:, 1].detach()
    log_ratios = (logps - ref_logps).detach()  # (B, 2)
    labelled = torch.where(wins[:, None], logps.detach(), logps.detach().flip(1))  # (B, 2): chosen, rejected
    rewards = beta * torch.where(wins[:, None], log_ratios, log_ratios.flip(1))  # (B, 2): chosen, rejected
    sums = {
        "loss/dpo": (losses.detach() - bonus).sum(),
        "loss/xpo": bonus.sum(),
        "objective/kl": log_ratios.sum() / 2,  # over both samples, as TRL had it: no KL divergence
        "objective/policy_kl": log_ratios[:, 0].sum(),  # KL(π || π_ref), estimated on the policy's samples
        "objective/entropy": -labelled.sum() / 2,  # and this, of both samples, no entropy
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).sum(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum(),
        "logps/chosen": labelled[:, 0].sum(),
        "logps/rejected": labelled[:, 1].sum(),
    }
    parts = {name: value / batch.step_pairs for name, value in sums.items()}
    if policy.balancing_loss:
        # Of a mixture of experts. It is no sum over pairs: here it is the mean over micro-batches.
        parts["aux_loss"] = scores.aux_loss * len(batch.lengths) / batch.step_pairs
        loss = loss + policy.config.router_aux_loss_coef * parts["aux_loss"]
    return loss, {"loss": loss} | parts


def at(values: list[float], epoch: int) -> float:
    """The value of an epoch: the last of a schedule holds."""
    return values[min(epoch, len(values) - 1)]


def sample_metrics(samples: Samples, total: int) -> dict[str, Tensor]:
    """These samples' part of the means over `total` prompts."""
    sums = {
        "objective/win_rate": (samples.preferences > 0).sum() + (samples.preferences == 0).sum() / 2,
        "val/model_contain_eos_token": samples.ended[:, 0].sum(),
        "val/ref_contain_eos_token": samples.ended[:, 1].sum(),
        "val/model_tokens": sum(len(y) for _, y, _ in samples.tokens),
        "val/ref_tokens": sum(len(y) for _, _, y in samples.tokens),
    }
    if samples.scores is not None:
        sums["objective/model_scores"], sums["objective/ref_scores"] = samples.scores.sum(0)
        sums["objective/scores_margin"] = sums["objective/model_scores"] - sums["objective/ref_scores"]
    return {name: value / total for name, value in sums.items()}


# --------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def evaluate(policy, reference, decide, tokenizer, test: Pairs, args: Arguments, log, step: int) -> None:
    """How often the policy's samples beat the reference's on test prompts, and completions of them."""
    metrics, completions = common.complete(policy, tokenizer, test, args, step)
    if not completions:  # no prompts, or fewer than processes
        return log.evaluation(step, metrics, completions)
    prompts, rank, world = len(completions), dist.get_rank(), dist.get_world_size()
    rows = test.rows[range(rank, prompts, world)]
    samples = sample(policy, reference, decide, tokenizer, rows, args)
    log.add(sample_metrics(samples, prompts))
    repeated = [prompt for prompt in rows["prompt"] for _ in range(4)]
    four = common.generate(policy, tokenizer, repeated, args, **sampling(args))
    distinct = [len({tuple(y) for y in four[i : i + 4]}) for i in range(0, len(four), 4)]
    log.add({"distinct_of_4": sum(distinct) / prompts})
    columns = {"texts": samples.texts, "preference": samples.preferences.tolist()}
    columns |= {} if samples.scores is None else {"scores": samples.scores.tolist()}
    found = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    completions = [a | b for a, b in zip(completions, common.gather_rows(found), strict=True)]
    log.evaluation(step, log.means() | metrics, completions)


def main(args: Arguments) -> None:
    rank, world, device = common.start(args)
    tokenizer = common.load_tokenizer(args)
    tokenize = partial(tokenize_prompt, max_new_tokens=args.max_new_tokens)
    train, test = common.load_pairs(args, tokenizer, tokenize=tokenize)
    # All batches of the run, (steps, batch_size), are known to all processes.
    batches = common.global_batches(train.lengths, args)
    policy = common.load_model(args.model_name_or_path, args, device, trainable=True)
    compact = not args.sync_ref_model
    reference = common.load_model(args.model_name_or_path, args, device, trainable=False, compact=compact)
    prompt = json.loads(train.rows[0]["raw"])
    decide = load_judge(args.judge) if args.judge else load_scorer(args, device, prompt)
    optimizer = common.adamw(policy, args)
    extra = {"reference": reference.state_dict()} if args.sync_ref_model else {}
    first_step = common.resume(args, policy, optimizer, extra)

    log = common.Log(args, first_step, len(batches), len(train.rows), device)
    if test is not None and log.due(first_step):
        evaluate(policy, reference, decide, tokenizer, test, args, log, first_step)
    for step in range(first_step, len(batches)):
        common.seed(args.seed, step, rank)  # what a step depends on, besides the state in checkpoints
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, len(batches), args)
        epoch = step // (len(train.rows) // args.batch_size)
        samples = sample(policy, reference, decide, tokenizer, train.rows[batches[step][rank::world]], args)
        wins, start = samples.preferences.to(device) >= 0, time.perf_counter()  # a tie counts for the policy
        for i in range(0, len(wins), args.per_device_train_batch_size):
            part = slice(i, i + args.per_device_train_batch_size)
            batch = common.pack(samples.tokens[part], device, step_pairs=args.batch_size)
            loss, metrics = loss_and_metrics(policy, reference, batch, wins[part], args, epoch)
            (loss * world).backward()  # fully_shard averages over processes, but these are parts of a sum
            log.add(metrics)
        grad_norm = common.clip_grad_norm(policy, args.max_grad_norm)
        if math.isfinite(grad_norm):  # it is the same on all processes; else all skip the step
            optimizer.step()
        optimizer.zero_grad()

        seconds = samples.seconds | {"time/training": time.perf_counter() - start}
        log.add({name: value / world for name, value in seconds.items()} | {"tokens": samples.count_tokens()})
        log.add(sample_metrics(samples, args.batch_size))
        metrics = log.means() | {"alpha": at(args.alpha, epoch), "beta": at(args.beta, epoch)}
        if args.sync_ref_model and (step + 1) % args.ref_model_sync_steps == 0:
            for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
                old.data.lerp_(new.data, args.ref_model_mixup_alpha)
        log.step(step, metrics, grad_norm, group["lr"], args.batch_size, metrics.pop("tokens"))

        done = step + 1
        if done == len(batches) or log.interrupted or done % args.save_steps == 0:
            common.save_checkpoint(args, policy, optimizer, done, extra)
        if log.interrupted:
            common.leave(f"interrupted after step {done}, which is saved; the same command goes on")
        if test is not None and log.due(done):
            evaluate(policy, reference, decide, tokenizer, test, args, log, done)
    common.save_model(args, policy, tokenizer)
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(common.parse(Arguments, check, TOY))
