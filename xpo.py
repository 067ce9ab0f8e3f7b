r"""Exploratory Preference Optimization (Xie et al. 2024, https://arxiv.org/abs/2405.21046), online.

At every step and for each prompt x, the policy π writes one answer y, and the reference π_ref one answer ỹ.
A reward model or a judge says which is better, and DPO learns from that pair. The term α log π(ỹ|x) is added
to the loss. It lowers the probability of ỹ, which leaves probability for answers that nobody has tried.

    loss = -log σ(β log π(y_w|x)/π_ref(y_w|x) - β log π(y_l|x)/π_ref(y_l|x)) + α log π(ỹ|x)     Algorithm 1

y_w is the better of y and ỹ, and y_l the other one. The last term, called the bonus for exploration, acts on
ỹ even if ỹ is y_w. Log-probabilities are sums over tokens, and the loss is a mean over prompts. α = 0 is DPO
on these online pairs.

Differs from the paper: a step of AdamW uses a batch of new pairs; Algorithm 1 minimises over all pairs so
far. The better score is the label; the paper draws it from a preference probability. The last policy is the
result; the paper takes the best one so far. Loss type ipo averages log-probabilities over tokens.

What to expect: before the first step policy and reference agree, so the rewards are 0, the loss is log 2 =
0.693 up to the bonus (ipo: 1/(4β²)), and the policy's answers win half of the time. In the built-in example,
60 steps take the win rate on held-out prompts to 0.79, and the share of right answers from 0.01 to 0.99.

    python xpo.py                                     the built-in example, about two minutes on a laptop
    torchrun --nproc_per_node 8 xpo.py --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --reward_model_path trl-lib/Qwen2-0.5B-Reward --dataset_name trl-lib/ultrafeedback-prompt
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Model, DebertaV2PreTrainedModel

import common
from common import TOY_MODEL, Batch, Data, arg

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

    The first two are the policy's log-probabilities of y and of ỹ, the next two the reference's.
    policy_wins (B,), bool, says whether y is the better answer. Log-probabilities are sums over tokens; for
    "ipo" the caller passes means, and alpha times the length of ỹ. Training minimises the mean of the
    losses. Raises ValueError for what is not defined. Source: Algorithm 1.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    log_ratios, log_ratios_of_ref_sample = logps - ref_logps, logps_of_ref_sample - ref_logps_of_ref_sample
    difference = log_ratios - log_ratios_of_ref_sample
    difference = torch.where(policy_wins, difference, -difference)  # chosen minus rejected
    match loss_type:
        case "sigmoid":  # DPO
            losses = -F.logsigmoid(beta * difference)
        case "ipo":  # 2310.12036 eq. 17
            losses = (difference - 1 / (2 * beta)) ** 2
        case _:
            raise ValueError(f"unknown loss_type '{loss_type}'; known are sigmoid, ipo")
    return losses + alpha * logps_of_ref_sample


# ------------------------------------------------------------------------------------------ one training step


def loss_and_metrics(
    policy, open_reference, batch: Batch, policy_wins: Tensor, args: Arguments, epoch: int
) -> tuple[Tensor, dict]:
    """What this micro-batch adds to the global batch's mean loss and metrics.

    The two rows of a pair are the policy's answer y and the reference's ỹ; policy_wins (B,), bool, says
    whether y is the better one. What is returned is a sum over pairs, divided by their number in the global
    batch. So neither loss nor gradient depends on how a batch is split over processes and micro-batches.
    """
    alpha, beta = value_in(args.alpha, epoch), value_in(args.beta, epoch)
    # First, before the policy's activations take up memory.
    with torch.no_grad(), open_reference() as reference:
        ref_logps = reference.token_logps(batch).sum(1).view(-1, 2)  # (B, 2): of y and ỹ
    token_logps = policy.token_logps(batch)  # (2B, L): log π of each token of an answer
    logps = token_logps.sum(1).view(-1, 2)  # (B, 2): of y and ỹ; DPO sums over tokens
    # IPO compares means over tokens. alpha times the length of ỹ keeps the bonus a sum.
    divisors = torch.ones_like(logps)
    if args.loss_type == "ipo":
        divisors = divisors * batch.completions.sum(1).view(-1, 2)
    losses = xpo_loss(
        *(logps / divisors).unbind(1),
        *(ref_logps / divisors).unbind(1),
        policy_wins,
        beta=beta,
        alpha=alpha * divisors[:, 1],
        loss_type=args.loss_type,
    )
    loss = losses.sum() / batch.global_pairs

    bonus = alpha * logps[:, 1].detach()
    log_ratios = (logps - ref_logps).detach()  # (B, 2): of y and ỹ; sums over tokens, also for IPO
    won = policy_wins[:, None]
    chosen_rejected = torch.where(won, logps.detach(), logps.detach().flip(1))  # (B, 2): of y_w and y_l
    rewards = beta * torch.where(won, log_ratios, log_ratios.flip(1))  # (B, 2): of y_w and y_l
    sums = {
        "loss/dpo": (losses.detach() - bonus).sum(),
        "loss/xpo": bonus.sum(),
        # Estimates KL(π || π_ref), if samples are drawn at temperature 1, without top_p, top_k and min_p.
        "objective/policy_kl": log_ratios[:, 0].sum(),
        # Means over both answers, as in TRL. They estimate neither a KL divergence nor an entropy.
        "objective/kl": log_ratios.sum() / 2,
        "objective/entropy": -logps.detach().sum() / 2,
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).sum(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum(),
        "logps/chosen": chosen_rejected[:, 0].sum(),
        "logps/rejected": chosen_rejected[:, 1].sum(),
    }
    metrics = {name: value / batch.global_pairs for name, value in sums.items()}
    if policy.router_loss is not None:
        # The router loss of a mixture of experts is that of a forward pass, not a sum over pairs. This is its
        # mean over micro-batches, weighted by their numbers of pairs.
        metrics["aux_loss"] = policy.router_loss * len(logps) / batch.global_pairs
        loss = loss + policy.config.get_text_config().router_aux_loss_coef * metrics["aux_loss"]
    return loss, {"loss": loss} | metrics


def value_in(values: list[float], epoch: int) -> float:
    """values[epoch]; after the last entry, the last entry."""
    return values[min(epoch, len(values) - 1)]


# ---------------------------------------------------------------------------------------- samples and scores


@dataclass
class Samples:
    """The answers of both models to B prompts, and which is better."""

    tokens: list[tuple[list[int], list[int], list[int]]]  # of the prompt, the policy's y, the reference's ỹ
    texts: list[tuple[str, str]]  # of y and ỹ
    preferences: Tensor  # (B,) 1 if y is better, -1 if ỹ is, 0 if neither, NaN if the judge failed
    scores: Tensor | None  # (B, 2) of y and ỹ; a judge gives none
    ended: Tensor  # (B, 2) bool: whether y and ỹ end in EOS
    seconds: dict[str, float]


def sample(policy, open_reference, decide: Callable, tokenizer, data: Data, rows, args: Arguments) -> Samples:
    """Let both models answer the prompts of these rows, and `decide` say which answer is better."""
    start = time.perf_counter()
    prompts, eos = data.tokens[rows]["prompt"], common.eos_ids(policy, tokenizer)
    options = sampling(args)
    answers = [common.generate(policy, tokenizer, prompts, args, **options)]
    with open_reference() as reference:
        answers.append(common.generate(reference, tokenizer, prompts, args, **options))
    generated = time.perf_counter()
    ended = torch.tensor([[y[-1] in eos for y in pair] for pair in zip(*answers, strict=True)])
    # The judge or reward model sees every generated token, including special tokens, except a final EOS.
    visible = [[y[:-1] if y[-1] in eos else y for y in part] for part in answers]
    texts = [common.decode_answers(tokenizer, prompts, part, skip_special_tokens=False) for part in visible]
    # Texts or messages, as in the dataset: not cut by truncate_prompt, and without tools.
    raw_prompts = [common.split_prompt(data.raw[int(row)])[0] for row in rows]
    preferences, scores = decide(raw_prompts, texts, ended)
    seconds = {"time/generation": generated - start, "time/scoring": time.perf_counter() - generated}
    tokens = list(zip(prompts, *answers, strict=True))
    return Samples(tokens, list(zip(*texts, strict=True)), preferences, scores, ended, seconds)


def sampling(args: Arguments) -> dict:
    """Options for generate()."""
    options = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    return options | ({} if args.min_p is None else {"min_p": args.min_p})


def score_pairs(scorer: Callable, penalty: float, prompts: list, texts: list, ended: Tensor) -> tuple:
    """Preferences (B,) and scores (B, 2) of a reward model, as in Samples."""
    columns = zip(texts, ended.T.tolist(), strict=True)  # of the policy, then of the reference
    scores = torch.stack([scorer(prompts, *column).cpu() for column in columns], dim=1)
    if not scores.isfinite().all():
        common.fail("the reward model gave a score that is not finite", alone=True)
    scores = scores - penalty * ~ended
    return (scores[:, 0] - scores[:, 1]).sign(), scores


def judge_pairs(judge: Callable, prompts: list, texts: list, ended: Tensor) -> tuple:
    """Preferences (B,) of a judge, and no scores. It sees each pair in random order, and favours no model."""
    swapped = (torch.rand(len(prompts)) < 0.5).tolist()
    pairs = [(b, a) if swap else (a, b) for a, b, swap in zip(*texts, swapped, strict=True)]
    with common.one_line("the judge failed", alone=True):
        verdicts = judge(prompts, pairs)
    if len(verdicts) != len(pairs) or not {*verdicts} <= {0, 1, -1, None}:
        common.fail(f"the judge must return {len(pairs)} times 0, 1, -1 or None, not {verdicts}", alone=True)
    for_first = [{0: 1, 1: -1, -1: 0, None: math.nan}[verdict] for verdict in verdicts]
    return torch.tensor([-x if swap else x for x, swap in zip(for_first, swapped, strict=True)]), None


@cache
def load_judge(path: str) -> Callable:
    """The function of `path/to/file.py:function`. Executes the file. ValueError if there is no such function.

    The function takes prompts (texts or lists of messages) and pairs of answers (texts), and returns a list:
    for each pair 0 if the first answer is better, 1 if the second is, -1 for a tie, None if the judge failed.
    A tie is trained as a win of the policy, as equal scores are. The winner of a failed pair is random.
    """
    file, _, name = path.rpartition(":")
    if not (file.endswith(".py") and Path(file).is_file()):
        raise ValueError(f"judge must be path/to/file.py:function, and {file or path} is no such file")
    spec = importlib.util.spec_from_file_location("judge", file)
    module = sys.modules["judge"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(judge := getattr(module, name, None)):
        raise ValueError(f"there is no function {name} in {file}")
    inspect.signature(judge).bind([], [])  # or a TypeError: it has to take prompts and pairs
    return judge


class PairRM(DebertaV2PreTrainedModel):
    """Compares two answers. Source: https://arxiv.org/abs/2306.02561 and the Hub's llm-blender/PairRM-hf."""

    def __init__(self, config):
        super().__init__(config)
        self.prefixes = ["<|source|>", "<|candidate1|>", "<|candidate2|>"]  # of the prompt and both answers
        self.prefix_ids = [config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id]
        self.pretrained_model, size = DebertaV2Model(config), config.hidden_size
        layers = [nn.Dropout(config.drop_out), nn.Linear(2 * size, size), nn.Tanh()]
        self.head_layer = nn.Sequential(*layers, nn.Dropout(config.drop_out), nn.Linear(size, config.n_tasks))
        self.post_init()

    def forward(self, sequences: list[list[int]]) -> Tensor:
        """How much better the first answer of each sequence of tokens is, (B,)."""
        ids, mask = (x.to(self.device) for x in common.pad(sequences, self.config.pad_token_id))  # (B, L)
        hidden = self.pretrained_model(ids, mask.long()).last_hidden_state  # (B, L, H)
        source, *answers = (hidden[range(len(ids)), (ids == i).int().argmax(1)] for i in self.prefix_ids)
        first, second = (self.head_layer(torch.cat([source, y], dim=1)) for y in answers)  # (B, n_tasks)
        return (first - second).mean(1).float()


def load_pair_rm(args: Arguments, device: torch.device) -> Callable:
    """PairRM as a judge, as load_judge describes it: that of the Hub, or of the directory in pair_rm:PATH."""
    path, dtype = args.judge[8:] or "llm-blender/PairRM-hf", torch.bfloat16 if args.bf16 else torch.float32
    tokenizer = common.from_pretrained(AutoTokenizer, path, args)
    model, info = common.from_pretrained(PairRM, path, args, dtype=dtype, output_loading_info=True)
    if info["missing_keys"] or tokenizer.convert_tokens_to_ids(model.prefixes) != model.prefix_ids:
        common.fail(f"{path} is no PairRM: it lacks weights, or the tokens {' '.join(model.prefixes)}")
    model = model.eval().to(device)
    special = re.compile("|".join(map(re.escape, [*model.prefixes, *tokenizer.all_special_tokens])))

    def encode(prompt, *answers: str) -> list[int]:
        """[CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> a [SEP] [CLS] <|candidate2|> b [SEP]"""
        if isinstance(prompt, list):  # paragraphs with roles; the user's first message has none
            turns = (f"{turn['role'].capitalize()}: {turn.get('content', '')}" for turn in prompt)
            prompt = "\n\n".join(turns).removeprefix("User: ")
        texts = [special.sub(" ", text) for text in (prompt, *answers)]  # none can imitate the tokens above
        source, *answers = map("".join, zip(model.prefixes, texts, strict=True))
        ids = tokenizer(source, truncation=True, max_length=1224)["input_ids"]
        return sum(tokenizer(answers, truncation=True, max_length=(2048 - len(ids)) // 2)["input_ids"], ids)

    @torch.no_grad()
    def judge(prompts: list, pairs: list[tuple[str, str]]) -> list[int | None]:
        rows = [(encode(x, a, b), encode(x, b, a)) for x, (a, b) in zip(prompts, pairs, strict=True)]
        size = args.per_device_eval_batch_size
        margins = []  # twice the mean of the scores in both orders
        for start in range(0, len(rows), size):
            first, swapped = zip(*rows[start : start + size], strict=True)
            margins += (model(first) - model(swapped)).tolist()
        return [None if math.isnan(m) else int(m < 0) if m else -1 for m in margins]

    return judge


def load_scorer(args: Arguments, device: torch.device, prompt) -> Callable[..., Tensor]:
    """The reward model: a function of prompts, answers and whether they ended that returns scores (B,).

    `prompt` is an example that shows whether prompts are texts or messages.
    """
    tokenizer = common.from_pretrained(AutoTokenizer, args.reward_model_path, args)
    if isinstance(prompt, list) and not tokenizer.chat_template:
        common.fail("the prompts are conversations, but the reward model's tokenizer has no chat template")
    kind, dtype = AutoModelForSequenceClassification, torch.bfloat16 if args.bf16 else torch.float32
    model = common.from_pretrained(kind, args.reward_model_path, args, dtype=dtype)
    if model.config.num_labels != 1:
        common.fail(f"{args.reward_model_path} has {model.config.num_labels} outputs; a reward model has one")
    model = common.shard(model.eval().requires_grad_(False), args, device, reshard_after_forward=True)
    config = model.config.get_text_config()
    longest = min(getattr(config, "max_position_embeddings", None) or sys.maxsize, tokenizer.model_max_length)

    def encode(prompt, answer: str, ended: bool) -> list[int]:
        completion = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        try:
            ids = common.encode(tokenizer, prompt, completion, ended=ended)
        except ValueError:  # some templates rewrite the last turn, and so cannot leave it open
            ids = common.encode(tokenizer, prompt, completion)
        bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []  # of a longer input, keep BOS and the end
        return ids if len(ids) <= longest else bos + ids[len(bos) - longest :]

    @torch.no_grad()
    def scores(prompts: list, answers: list[str], ended: list[bool]) -> Tensor:
        sequences, parts = [*map(encode, prompts, answers, ended)], []
        for start in range(0, len(sequences), args.per_device_eval_batch_size):
            part = sequences[start : start + args.per_device_eval_batch_size]
            used = {token for ids in part for token in ids}
            # The model reads the score at the last token whose id is not that of padding. So padding has to
            # be a token that occurs in none of these texts. EOS occurs in them.
            config.pad_token_id = next(token for token in range(config.vocab_size) if token not in used)
            ids, mask = common.pad(part, config.pad_token_id)
            logits = model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits  # (B, 1)
            parts.append(logits[:, 0].float())
        return torch.cat(parts)

    return scores


def sample_metrics(samples: Samples, total: int) -> dict[str, Tensor | float]:
    """These samples' share of the means over `total` prompts; `val/` is TRL's name, also in training."""
    sums = {
        "objective/win_rate": (samples.preferences.nan_to_num() + 1).sum() / 2,  # a tie counts half
        "objective/ties": (samples.preferences.nan_to_num() == 0).sum(),  # failures among them
        "objective/judge_failures": samples.preferences.isnan().sum(),
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
def evaluate(policy, open_reference, decide, tokenizer, test: Data, args: Arguments, log, step: int) -> None:
    """Log how often the policy's answers beat the reference's on test prompts, with completions."""
    metrics, completions = common.complete(policy, tokenizer, test, args, step)
    if not completions:  # there are fewer test prompts than processes, or eval_prompts is 0
        return log.evaluation(step, metrics, completions)
    total = len(completions)
    rows = [completion["row"] for completion in completions][dist.get_rank() :: dist.get_world_size()]
    samples = sample(policy, open_reference, decide, tokenizer, test, rows, args)
    log.add(sample_metrics(samples, total))
    repeated = [prompt for prompt, _, _ in samples.tokens for _ in range(4)]
    four = common.generate(policy, tokenizer, repeated, args, **sampling(args))
    distinct = [len({tuple(y) for y in four[i : i + 4]}) for i in range(0, len(four), 4)]
    log.add({"distinct_of_4": sum(distinct) / total})
    columns = dict(zip(("policy", "reference"), zip(*samples.texts, strict=True), strict=True))
    names = {1: "policy", -1: "reference"}
    columns["winner"] = [names.get(preference, "neither") for preference in samples.preferences.tolist()]
    columns |= {} if samples.scores is None else {"scores": samples.scores.tolist()}
    completions = [a | b for a, b in zip(completions, common.gather_rows(columns), strict=True)]
    log.evaluation(step, log.all_reduce()[0] | metrics, completions)


def main(args: Arguments) -> None:
    rank, world, device = common.start(args)
    tokenizer = common.load_tokenizer(common.policy_path(args), args)
    if tokenizer.decoder_prompt:
        common.fail(f"{args.model_name_or_path} has an encoder; xpo.py is for models with a decoder alone")
    train, test = common.load_data(args, tokenizer, completions=())
    # The row numbers of all batches, (steps, batch_size), are the same on all processes.
    batches = common.global_batches(train, args)
    policy = common.load_model(common.policy_path(args), args, device, trainable=True)
    open_reference = common.load_reference(None, policy, args, device, updated=args.sync_ref_model)
    if args.judge:
        judge = load_pair_rm(args, device) if args.is_pair_rm else load_judge(args.judge)
        decide = partial(judge_pairs, judge)
    else:
        scorer = load_scorer(args, device, common.split_prompt(train.raw[0])[0])
        decide = partial(score_pairs, scorer, args.missing_eos_penalty or 0.0)
    optimizer = common.adamw(policy, args)
    method_state = {}
    if args.sync_ref_model:
        with open_reference() as reference:
            method_state["reference"] = reference.state_dict()
    common.claim_output_dir(args)
    first_step = common.resume(args, policy, optimizer, method_state)

    log = common.Log(args, first_step, batches, train)
    if test is not None and log.evaluation_due(first_step):
        evaluate(policy, open_reference, decide, tokenizer, test, args, log, first_step)
    for step in range(first_step, len(batches)):
        torch.manual_seed(hash((args.seed, step, rank)))  # makes a step reproducible after a resume
        lr = common.set_learning_rate(optimizer, step, len(batches), args)
        epoch = step // (len(train.lengths) // batches.shape[1])
        samples = sample(policy, open_reference, decide, tokenizer, train, batches[step][rank::world], args)
        # A tie counts as a win of the policy. Where the judge failed, a coin decides.
        better, coins = samples.preferences, torch.rand(len(samples.preferences)) < 0.5
        policy_wins = torch.where(better.isnan(), coins, better >= 0).to(device)  # (B,) bool
        start = time.perf_counter()
        for i in range(0, len(policy_wins), args.per_device_train_batch_size):
            part = slice(i, i + args.per_device_train_batch_size)
            counts = {"global_pairs": batches.shape[1], "is_last": part.stop >= len(policy_wins)}
            batch = common.collate(samples.tokens[part], device, **counts)
            loss, metrics = loss_and_metrics(policy, open_reference, batch, policy_wins[part], args, epoch)
            policy.set_requires_gradient_sync(batch.is_last or not args.sync_gradients_once)
            (loss * world).backward()  # fully_shard averages gradients over processes; the sum is needed
            log.add(metrics)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        grad_norm = norm.full_tensor().item()  # of the whole gradient, the same on all processes
        if math.isfinite(grad_norm):  # otherwise all processes skip the step
            optimizer.step()
        optimizer.zero_grad()

        seconds = samples.seconds | {"time/training": time.perf_counter() - start}
        log.add({name: value / world for name, value in seconds.items()})
        log.add(sample_metrics(samples, batches.shape[1]))
        log.add({"tokens": sum(len(ids) for three in samples.tokens for ids in three)})
        metrics, interrupted = log.all_reduce()
        metrics |= {"alpha": value_in(args.alpha, epoch), "beta": value_in(args.beta, epoch)}
        if args.sync_ref_model and (step + 1) % args.ref_model_sync_steps == 0:
            with open_reference() as reference:
                for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
                    old.data.lerp_(new.data, args.ref_model_mixup_alpha)
        tokens = metrics.pop("tokens")
        log.step(step, metrics | {"grad_norm": grad_norm, "learning_rate": lr}, tokens)

        done = step + 1
        if done == len(batches) or interrupted or done % args.save_steps == 0:
            common.save_checkpoint(args, policy, optimizer, done, method_state, interrupted=interrupted)
        if test is not None and log.evaluation_due(done):
            evaluate(policy, open_reference, decide, tokenizer, test, args, log, done)
    common.save_model(args, policy, tokenizer)
    log.close()
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------- arguments


@dataclass
class Arguments(common.Arguments):
    """XPO's own arguments; those of all methods are in common.py. A pair is a prompt and its two samples."""

    reward_model_path: str | None = arg(None, "a sequence classifier with one output: Hub name or directory")
    judge: str | None = arg(None, "or a judge: pair_rm, pair_rm:PATH, file.py:function (see load_judge)")
    alpha: list[float] = arg([1e-5], "weight of the exploration bonus: one value, or one per epoch")
    beta: list[float] = arg([0.1], "strength of the tie to the reference: one value, or one per epoch")
    loss_type: str = arg("sigmoid", "sigmoid (DPO) or ipo")
    learning_rate: float = arg(5e-7, "peak learning rate of AdamW; with LoRA, ten times the default")
    max_length: int = arg(1024, "tokens of prompt and completion; a prompt has max_new_tokens less")
    missing_eos_penalty: float | None = arg(None, "subtracted from the score of a completion without EOS")
    temperature: float = arg(1.0, "of the samples; 1 is the models' own distribution, as in the paper")
    top_p: float = arg(1.0, "sample from the smallest set of tokens with this total probability")
    top_k: int = arg(0, "sample from the k likeliest tokens; 0: from all")
    min_p: float | None = arg(None, "sample from tokens at least this fraction as likely as the likeliest")
    ref_adapter_name: str | None = arg(None, "the reference: an adapter in a folder of model_name_or_path")
    sync_ref_model: bool = arg(False, "let the reference follow the policy (TR-DPO, 2404.09656)")
    ref_model_sync_steps: int = arg(512, "steps between updates of the reference")
    ref_model_mixup_alpha: float = arg(0.6, "share of the policy in the updated reference")

    @property
    def is_pair_rm(self) -> bool:
        return (self.judge or "").split(":")[0] == "pair_rm"

    def __post_init__(self):
        super().__post_init__()
        if not self.judge and self.model_name_or_path == TOY_MODEL:
            self.reward_model_path = self.reward_model_path or str(Path(TOY_MODEL).parent / "reward")
        if (self.reward_model_path is None) == (self.judge is None):
            raise ValueError("give one of --reward_model_path and --judge, to say which answer is better")
        if self.judge and self.missing_eos_penalty is not None:
            raise ValueError("missing_eos_penalty changes scores, but a judge gives none")
        if not 0 <= (self.missing_eos_penalty or 0) < math.inf:
            raise ValueError(f"missing_eos_penalty must be at least 0, not {self.missing_eos_penalty}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, not {self.temperature}: XPO needs samples")
        if not (0 < self.top_p <= 1 and self.top_k >= 0 and 0 <= (self.min_p or 0) <= 1):
            raise ValueError("top_p must be in (0, 1], top_k at least 0, min_p in [0, 1]")
        if not self.alpha or not all(0 <= alpha < math.inf for alpha in self.alpha):
            raise ValueError(f"alpha must be one or more values of at least 0, not {self.alpha}")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"max_length {self.max_length} must exceed max_new_tokens {self.max_new_tokens}")
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in [0, 1], not {self.ref_model_mixup_alpha}")
        if self.sync_ref_model and self.use_peft:
            raise ValueError("sync_ref_model averages weights, and a reference of LoRA has none of its own")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps must be at least 1, not {self.ref_model_sync_steps}")
        if self.judge and not self.is_pair_rm:
            load_judge(self.judge)
        # Dry run: let xpo_loss check the remaining options before anything is loaded.
        for beta in self.beta:
            zero = torch.zeros(1)
            xpo_loss(zero, zero, zero, zero, zero > 0, beta=beta, loss_type=self.loss_type)


if __name__ == "__main__":
    # The model of the built-in example is tiny and needs a larger learning rate.
    main(common.parse(Arguments, learning_rate=1e-4, max_steps=60))
