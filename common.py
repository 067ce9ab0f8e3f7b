"""What the scripts share. Each script has its own losses, its own training step and its own training loop.

The sections follow the needs of a reader. To understand a training step, read the first one.

    log-probabilities      the batch, and log π of every token in it
    the fast forward pass  the same numbers without padding, with each prompt computed once
    batches                which rows a step trains on
    data                   from files to token ids
    models, processes, generation, log, checkpoints, arguments
"""

from __future__ import annotations

import difflib
import fcntl
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Literal, NamedTuple, NoReturn, TextIO

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dsd
import transformers
from datasets.fingerprint import Hasher
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# ------------------------------------------------------------------------------------------ log-probabilities


@dataclass
class Batch:
    """B prompts, each with a chosen and a rejected completion, as 2B rows of tokens, padded on the right.

    A label is the token that follows its place. Two pairs, with prompts p and q, chosen completions c,
    rejected completions r, and dots for padding:

        input_ids    p1 p2 c1 c2        labels    p2 c1 c2 c3        completions    .  x  x  x
                     p1 p2 r1 .                   p2 r1 r2 .                        .  x  x  .
                     q1 c1 .  .                   c1 c2 .  .                        x  x  .  .
                     q1 r1 r2 .                   r1 r2 r3 .                        x  x  x  .

    The last token of a completion is only ever a label, never an input. A method with another number of
    completions for each prompt has as many rows for each prompt.
    """

    inputs: dict[str, Tensor]  # for model(**inputs): input_ids (2B, L) and attention_mask (2B, L)
    labels: Tensor  # (2B, L)
    completions: Tensor  # (2B, L) bool: whether the label is a token of a completion
    scored: Tensor  # (2B, L) bool: whether its log-probability is wanted: completions, for ORPO also prompts
    # The same for the fast forward pass, which `pack` explains:
    packed_inputs: dict[str, Tensor]
    spans: list[list[int]]
    sources: Tensor
    places: Tensor
    global_pairs: int  # pairs in the global batch, of which this batch is a part
    global_tokens: dict[str, int] | None = None  # tokens in the global batch: of prompts, chosen, rejected
    rows: np.ndarray | None = None  # (B,) row numbers of the pairs in the dataset


def plain_token_logps(model, batch: Batch) -> Tensor:
    """log π(label | all tokens before it), (2B, L), and 0 where it is not wanted. This is the definition."""
    logits = model(**batch.inputs, use_cache=False).logits  # (2B, L, V)
    logps = logits.float().log_softmax(-1)
    logps = logps.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)  # (2B, L)
    return torch.where(batch.scored, logps, 0.0)


def label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log π(label), (N,), of logits (N, V), in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


# Tokens that go through the head at a time; fewer if that would be more logits than CHUNK_LOGITS.
CHUNK_TOKENS, CHUNK_LOGITS = 1024, 2**26


def token_logps(model, batch: Batch, *, of: Callable[[Tensor, Tensor], Tensor] = label_logps) -> Tensor:
    """What plain_token_logps returns, for less time and memory. Scripts call it as model.token_logps(batch).

    It saves the padding and the second pass over each prompt (next section), and it never keeps the logits
    of the whole batch: the head is applied to one chunk of tokens at a time, and again in the backward pass.
    `of` computes what is wanted of logits (N, V) and labels (N,): (N,), or (N, k) for a result (2B, L, k).
    """
    head, (rows, columns) = partial(logits_of, model), batch.places  # of the N labels that are scored
    if model.forward_pass == "packed":
        outputs = model.get_decoder()(**batch.packed_inputs, spans=batch.spans, use_cache=False)
        hidden = outputs.last_hidden_state[0, batch.sources]  # (N, D)
    elif model.forward_pass == "padded":
        outputs = model.get_decoder()(**batch.inputs, use_cache=False)
        hidden = outputs.last_hidden_state[rows, columns]
    else:  # the model's own logits. Not model(...): FSDP has gathered the weights for this function already
        outputs = model.forward(**batch.inputs, use_cache=False)
        hidden, head = outputs.logits[rows, columns], lambda logits: logits
        model.router_loss = outputs.get("aux_loss")

    def values_of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        return of(head(hidden), labels)

    size = max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // model.config.get_text_config().vocab_size))
    chunks = zip(hidden.split(size), batch.labels[rows, columns].split(size), strict=True)
    recompute = {"use_reentrant": False, "preserve_rng_state": False}  # the logits, in the backward pass
    values = torch.cat([checkpoint(values_of_chunk, *chunk, **recompute) for chunk in chunks])
    return values.new_zeros(*batch.labels.shape, *values.shape[1:]).index_put((rows, columns), values)


def logits_of(model, hidden: Tensor) -> Tensor:
    """The model's logits (N, V) of its last hidden states (N, D)."""
    logits, config = model.get_output_embeddings()(hidden), model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def collate(examples: list[tuple], device: torch.device, *, score_prompts: bool = False, **counts) -> Batch:
    """A Batch of examples (prompt, chosen, rejected) of token ids; `counts` are more of its fields."""
    # A process without examples passes one token through the model, because sharded models run in step. The
    # token is an input only: it has no label, and adds nothing to losses and metrics.
    inputs = examples or [([0], [0])]
    sequences = [torch.tensor([*prompt, *y]) for prompt, *completions in inputs for y in completions]
    tokens = pad_sequence(sequences, batch_first=True)  # (2B, L + 1)
    lengths = torch.tensor([[len(sequence)] for sequence in sequences])  # (2B, 1)
    prompt_lengths = torch.tensor([[len(prompt)] for prompt, *completions in inputs for _ in completions])
    next_column = torch.arange(1, tokens.shape[1])
    has_label = next_column < lengths  # (2B, L)
    completions = has_label & (next_column >= prompt_lengths)
    scored = completions.clone()
    if score_prompts:  # once for each prompt, in its first row
        rows_of_prompt = len(inputs[0]) - 1
        scored[::rows_of_prompt] = has_label[::rows_of_prompt]
    labeled = len(sequences) if examples else 0

    fields = {
        "inputs": {"input_ids": tokens[:, :-1], "attention_mask": has_label.long()},
        "labels": tokens[:labeled, 1:],
        "completions": completions[:labeled],
        "scored": scored[:labeled],
        **pack(inputs, scored[:labeled]),
    }
    return Batch(**{name: to_device(value, device) for name, value in fields.items()}, **counts)


def to_device(value, device: torch.device):
    """Copy a tensor, or a dictionary of tensors, without making the host wait; other values stay."""
    if isinstance(value, dict):
        return {name: to_device(part, device) for name, part in value.items()}
    if isinstance(value, Tensor) and device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value


# -------------------------------------------------------------------------------------- the fast forward pass


def pack(examples: list[tuple], scored: Tensor) -> dict[str, Any]:
    """The fields of Batch for the fast forward pass: its tokens in one row, without padding.

    The row of the picture above is p1 p2 c1 c2 r1 q1 c1 r1 r2. Each prompt is there once, and each of its
    completions attends to it. T tokens in the row; N labels that are scored.
    """
    ids, positions, spans, end = [], [], [], 0
    in_row = []  # for each row of the batch, where in the packed row its tokens are
    for prompt, *completions in examples:
        start, end = end, end + len(prompt)
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        spans.append([start, end])
        for completion in completions:
            length = len(completion) - 1
            ids.append(completion[:-1])
            positions.append(np.arange(len(prompt), len(prompt) + length))
            in_row.append(torch.cat([torch.arange(start, spans[-1][1]), torch.arange(end, end + length)]))
            end += length
            spans[-1].append(end)
    in_row = pad_sequence(in_row, batch_first=True)  # (2B, L)
    return {
        "packed_inputs": {
            "input_ids": torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],  # (1, T)
            "position_ids": torch.from_numpy(np.concatenate(positions))[None],  # (1, T)
            # Nothing reads this mask. From None, or from a mask of two dimensions, transformers would make
            # one of T * T entries.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        },
        "spans": spans,  # of each pair: where its prompt, chosen and rejected tokens begin, and the end
        "sources": in_row[: len(scored)][scored],  # (N,) places in the row whose outputs predict the labels
        "places": scored.nonzero().T,  # (2, N) rows and columns of these labels in the batch
    }


def packed_attention(module, query, key, value, mask, *, spans=None, **options):
    """An attention function for transformers: q, k, v (1, heads, T, size) -> (1, T, heads, size).

    Each completion sees its prompt and itself. Prompt and chosen completion lie side by side in the row; the
    rejected one is put behind a copy of its prompt. Both are causal, so that the kernel needs no mask.
    """
    if spans is None:  # an ordinary call, such as one from generate()
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("attention with a softcap or sinks")

    def causal(*qkv: Tensor) -> Tensor:
        length, window, mask = qkv[0].shape[2], options.get("sliding_window"), None
        if window and window < length:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        return sdpa_attention_forward(module, *qkv, mask, **options | {"is_causal": True})[0]

    results = []
    for start, chosen, *ends in spans:
        results.append(causal(*(x[:, :, start : ends[0]] for x in (query, key, value))))
        for begin, end in zip(ends, ends[1:], strict=False):
            if end > begin:  # a completion of one token is only a label
                parts = [(x[:, :, start:chosen], x[:, :, begin:end]) for x in (query, key, value)]
                results.append(causal(*(torch.cat(part, dim=2) for part in parts))[:, chosen - start :])
    return torch.cat(results, dim=1), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)  # ordinary calls get their padding and window masks


@torch.no_grad()
def choose_forward_pass(model) -> None:
    """Set model.forward_pass to the fastest one whose log-probabilities equal those of plain_token_logps.

    "packed" is described above. "padded" runs the padded rows, but applies the head in chunks; it is for
    architectures that do not call the attention function, or want more of it. "whole" takes the logits that
    the model returns, for architectures that do more to a hidden state than logits_of knows.
    """
    draw, config = np.random.default_rng(0).integers, model.config.get_text_config()
    lengths = ((9, 7, 5), (2, 1, 12))
    examples = [tuple(draw(1, min(100, config.vocab_size), n) for n in row) for row in lengths]
    batch = collate(examples, model.device, global_pairs=2)
    want, attention, reasons = plain_token_logps(model, batch), model.config._attn_implementation, []
    tolerance = (5e-3 if model.dtype == torch.bfloat16 else 5e-5) * want.abs().max().item()
    model.router_loss = None  # of the last forward pass, if the model is a mixture of experts that has one
    for forward_pass in ("packed", "padded", "whole"):
        model.forward_pass = forward_pass
        try:
            if model.forward_pass != "whole" and getattr(model.config, "output_router_logits", False):
                raise NotImplementedError("the load-balancing loss comes with the model's own logits")
            if model.forward_pass == "packed":
                if getattr(config, "attention_chunk_size", None):
                    raise NotImplementedError("attention within chunks")
                model.set_attn_implementation("packed")
            difference = (token_logps(model, batch) - want).abs().max().item()
            if difference < tolerance:
                break
            reasons.append(f"{model.forward_pass} they would differ by {difference:.0e}")
        except Exception as error:  # whatever an architecture does that nobody foresaw
            reasons.append(f"not {model.forward_pass}: {type(error).__name__}: {first_line(error)}")
        if model.forward_pass == "packed":
            model.set_attn_implementation(attention)
    costs = (
        "" if model.forward_pass == "packed" else f", which takes more time and memory ({'; '.join(reasons)})"
    )
    say(f"{type(model).__name__}: log-probabilities come from the {model.forward_pass} forward pass{costs}")


# ---------------------------------------------------------------------------------------------------- batches


def by_length(data: Data) -> np.ndarray:
    """The row numbers, short rows first, so that a micro-batch has rows of similar length."""
    return data.lengths.sum(1).argsort(kind="stable")


def global_batches(data: Data, args: Arguments) -> np.ndarray:
    """The row numbers of every global batch of the run, (steps, batch_size): a function of seed and epoch.

    A batch is a random sample. Inside, it is sorted by length, so that processes and micro-batches get rows
    of similar length. Rows that do not fill a batch at the end of an epoch wait for another epoch.
    """
    size, per_epoch = args.batch_size, len(data.lengths) // args.batch_size
    if not per_epoch:
        fail(f"{len(data.lengths)} rows do not fill a batch: --batch_size can be {len(data.lengths)} at most")
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch - 1e-9)
    epochs = []
    for epoch in range(math.ceil(steps / per_epoch)):
        order = np.random.default_rng((args.seed, epoch)).permutation(len(data.lengths))
        order = order[: per_epoch * size].reshape(per_epoch, size)
        short_first = data.lengths.sum(1)[order].argsort(axis=1, kind="stable")
        epochs.append(np.take_along_axis(order, short_first, axis=1))
    return np.concatenate(epochs)[:steps]


def micro_batches(data: Data, rows: np.ndarray, size: int, device: torch.device) -> Iterator[Batch]:
    """This process's part of a global batch of rows, `size` rows at a time.

    All processes get equally many micro-batches, because they run in step; some may have no rows.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = rows[rank::world]  # neighbours have similar lengths: every process gets some of each length
    tokens = dict(zip(data.tokens.column_names, data.lengths[rows].sum(0).tolist(), strict=True))
    for start in range(0, math.ceil(len(rows) / world), size):
        part = mine[start : start + size]
        examples = list(zip(*data.tokens[part].values(), strict=True)) if len(part) else []
        counts = {"rows": part, "global_pairs": len(rows), "global_tokens": tokens}
        yield collate(examples, device, score_prompts=data.score_prompts, **counts)


# ------------------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    """A split of a dataset: its rows as read and as tokens, without the rows that cannot be used."""

    raw: datasets.Dataset  # the columns that were read
    tokens: datasets.Dataset  # token ids: column `prompt`, and a column for each completion
    lengths: np.ndarray  # (n, 1 + completions) the numbers of these tokens
    score_prompts: bool = False  # whether batches score the tokens of prompts as well


def load_data(
    args: Arguments,
    tokenizer,
    *,
    completions: tuple[str, ...] = ("chosen", "rejected"),
    score_prompts: bool = False,
) -> tuple[Data, Data | None]:
    """The training and test split; None for the latter if there is none, or with eval_strategy "no".

    `completions` names the columns with completions: two for pairs, one for a method that labels single
    completions, none for a method that samples them (its prompts leave room for max_new_tokens). A prompt or
    completion is a text, or a list of messages for the chat template. Of pairs without a column `prompt`,
    the prompt is what both completions begin with. Other columns stay in Data.raw.
    """
    path = Path(args.dataset_name)
    kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if kind and not path.is_file():
        fail(f"there is no file {path}")
    with one_line(f"cannot load the dataset {args.dataset_name}"):
        if kind:
            # In a csv file these columns hold texts, even where they look like numbers, or like nothing.
            texts = dict.fromkeys(("prompt", "chosen", "rejected", "answer", *completions), str)
            options = {"converters": texts, "keep_default_na": False} if kind == "csv" else {}
            splits = datasets.load_dataset(kind, data_files=glob.escape(str(path)), **options)
        else:
            splits = datasets.load_dataset(args.dataset_name, args.dataset_config)
    if args.dataset_train_split not in splits:
        fail(f"{args.dataset_name} has no split '{args.dataset_train_split}'; it has {', '.join(splits)}")
    names = {"training": args.dataset_train_split}
    if args.eval_strategy != "no" and args.dataset_test_split in splits:
        names["test"] = args.dataset_test_split
    elif args.eval_strategy != "no":
        say(f"no evaluation: there is no split '{args.dataset_test_split}', only {', '.join(splits)}")
    found = [tokenize_split(splits[names[name]], name, args, tokenizer, completions) for name in names]

    if dist.get_rank() == 0:
        digest = hashlib.sha256()
        for column in (column for data in found for column in data.tokens.data.columns):
            for chunk in column.chunks:
                digest.update(chunk.offsets.to_numpy())
                digest.update(chunk.flatten().to_numpy())
        args.data_digest = digest.hexdigest()[:12]  # a run resumes with the data it began with
    train, test = [*(data._replace(score_prompts=score_prompts) for data in found), None][:2]
    return train, test


def tokenize_split(raw, name: str, args: Arguments, tokenizer, completions: tuple[str, ...]) -> Data:
    """Tokenize all rows of a split, drop those that cannot be used, and say how many and why."""
    check_columns(raw, name, tokenizer, completions)
    columns = ("prompt", *completions)
    features = dict.fromkeys(columns, datasets.List(datasets.Value("int32")))
    features |= {"problem": datasets.Value("string"), "straddles": datasets.Value("bool")}
    room = 1 if completions else args.max_new_tokens
    options = dict(tokenizer=tokenizer, completions=completions, max_length=args.max_length, room=room)
    # The default fingerprint of `map` does not see that the code of a function has changed.
    code = Path(__file__).read_text() if Path(__file__).is_file() else ""
    fingerprint = Hasher.hash([raw._fingerprint, code, [*options.items()]])
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:  # wait for the first process of this machine, then find its work in the cache
        dist.barrier()
    tokens = raw.map(
        tokenize,
        fn_kwargs=options,
        remove_columns=raw.column_names,
        features=datasets.Features(features),
        num_proc=args.dataset_num_proc,
        new_fingerprint=fingerprint,
        desc=f"tokenizing {name} rows",
    )
    if is_first:
        dist.barrier()

    problems = tokens.data.column("problem")
    for problem in problems.filter(pc.not_equal(problems, "")).value_counts().to_pylist():
        say(f"{problem['counts']} of {len(raw)} {name} rows dropped: {problem['values']}")
    if straddling := pc.sum(tokens.data.column("straddles")).as_py():
        say(f"in {straddling} {name} rows a token spans prompt and completion: it counts as completion")
    kept = np.flatnonzero(pc.equal(problems, ""))
    if not len(kept):
        fail(f"no {name} rows are left")
    lengths = [pc.list_value_length(tokens.data[column]).to_numpy()[kept] for column in columns]
    lengths = np.stack(lengths, axis=1)
    tokens = tokens.select(kept).select_columns([*columns])
    say(f"{len(kept)} {name} rows; tokens of {', '.join(columns)} on average: {lengths.mean(0).round()}")
    if name == "training":
        texts = {column: tokenizer.decode(ids) for column, ids in tokens[0].items()}
        say("the first: " + " ".join(f"{column}【{text}】" for column, text in texts.items()))
    return Data(raw.select(kept), tokens, lengths)


def check_columns(raw, name: str, tokenizer, completions: tuple[str, ...]) -> None:
    """Fail unless there are rows with the columns that are needed, of texts or messages."""
    found, pair = {*raw.column_names}, {"chosen", "rejected"}
    if not ("prompt" in found or pair <= found) or not {*completions} <= found:
        wanted = ", ".join(completions) or "prompt, or chosen and rejected"
        fail(f"the {name} data lack columns: {wanted} are needed; found {', '.join(raw.column_names)}")
    if not len(raw):
        fail(f"the {name} data are empty")
    for column in [column for column in ("prompt", "chosen", "rejected", *completions) if column in found]:
        first = raw[0][column]
        messages = first if isinstance(first, list) else []
        if not isinstance(first, str | list | None) or not all(is_message(message) for message in messages):
            kind = f"lists of {type(first[0]).__name__}s" if messages else f"{type(first).__name__}s"
            fail(
                f"column {column} of the {name} data has {kind}, not texts or messages with role and content"
            )
        if messages and not tokenizer.chat_template:
            fail("the data are conversations, but the tokenizer has no chat template")


def is_message(value) -> bool:
    return isinstance(value, dict) and "role" in value


def tokenize(row: dict, tokenizer, completions: tuple[str, ...], max_length: int, room: int) -> dict:
    """Token ids of a row's `prompt` and completions, or the `problem` that rules the row out.

    Completions are cut at the end so that `max_length` is kept; the prompt is never cut, and leaves `room`.
    """
    result = {name: [] for name in ("prompt", *completions)} | {"problem": "", "straddles": False}
    if not all(row[name] for name in completions):
        return result | {"problem": "a completion is empty"}
    prompt, *answers = split_prompt(row, completions)
    answers = answers[: len(completions)]  # a method that samples its completions takes none of the row's
    if any(is_empty(answer) for answer in answers):
        return result | {"problem": "a completion is empty"}
    if prompt == []:
        return result | {"problem": "the conversations share no message"}
    if not prompt and not completions:
        return result | {"problem": "the prompt is empty"}
    roles = [[message.get("role") for message in answer] for answer in answers if isinstance(answer, list)]
    if not all("assistant" in turns for turns in roles):
        return result | {"problem": "a completion has no message of the assistant"}

    try:
        alone = encode(tokenizer, prompt)
        whole = [encode(tokenizer, prompt, answer) for answer in answers]
    except Exception as error:  # whatever a template does with what it was not written for
        return result | {"problem": f"the chat template refuses it: {first_line(error)}"}
    # A token may span prompt and completion, or depend on what follows. So the prompt ends where the
    # encoded conversations part.
    shared = min([len(alone), *(shared_length(alone, ids) for ids in whole)])
    prompt, answers = alone[:shared], [ids[shared:] for ids in whole]
    if not prompt:  # the first token of a completion needs something to be predicted from
        if not completions:
            return result | {"problem": "the prompt is empty"}
        if tokenizer.bos_token_id is None:
            return result | {"problem": "the prompt is empty, and there is no BOS token to stand for it"}
        prompt = [tokenizer.bos_token_id]
    if len(prompt) + room > max_length:
        return result | {"problem": f"the prompt leaves no room for a completion in max_length {max_length}"}
    answers = [ids[: max_length - len(prompt)] for ids in answers]
    if not all(answers):
        return result | {"problem": "a completion is empty"}
    if len(answers) == 2 and answers[0] == answers[1]:
        return result | {"problem": "the completions are identical"}
    ids = dict(zip(completions, answers, strict=True))
    return result | ids | {"prompt": prompt, "straddles": shared < len(alone)}


def split_prompt(row: dict, completions: tuple[str, ...] = ()) -> list:
    """[prompt, *completions] of a row, all of them texts, or all of them lists of messages.

    Without `completions`, the row's own chosen and rejected ones tell where a prompt ends that is not given.
    """
    names = completions or [name for name in ("chosen", "rejected") if row.get(name)]
    prompt, answers = row.get("prompt"), [row[name] for name in names]
    if isinstance(prompt, list):
        answers = [[{"role": "assistant", "content": y}] if isinstance(y, str) else y for y in answers]
    if isinstance(prompt, str) and answers and isinstance(answers[0], list):
        # A text beside messages repeats the prompt that the messages have already, unless they begin with
        # the answer.
        prompt = [{"role": "user", "content": prompt}] if answers[0][0].get("role") == "assistant" else None
    return extract_prompt(*answers) if prompt is None and len(answers) == 2 else [prompt, *answers]


def is_empty(completion: str | list[dict]) -> bool:
    if isinstance(completion, str):
        return not completion
    return not any(message.get("content") or message.get("tool_calls") for message in completion)


def extract_prompt(chosen, rejected) -> list:
    """[prompt, chosen, rejected] of completions that begin with the prompt: the words or messages shared."""
    is_text = isinstance(chosen, str)
    if is_text:
        chosen, rejected = (re.findall(r"\s*\S+|\s+", text) for text in (chosen, rejected))
    n = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)  # leave something of both
    parts = chosen[:n], chosen[n:], rejected[n:]
    return ["".join(part) for part in parts] if is_text else [*parts]


def shared_length(a: list, b: list) -> int:
    """How many elements two lists have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def encode(
    tokenizer, prompt: str | list[dict], completion: str | list[dict] | None = None, *, ended: bool = True
) -> list[int]:
    """Token ids of a prompt that waits for its completion, or of a prompt with its completion.

    Of conversations, they are what the chat template makes. Of texts: one BOS, if the tokenizer adds it or
    the text has it; one EOS after a completion; and a prompt keeps an EOS that it has. A completion that
    has not `ended` was cut off: it gets no end of turn and no EOS.
    """
    if isinstance(prompt, list):
        if completion and prompt[-1]["role"] == completion[0]["role"] == "assistant":  # one turn, continued
            content = [turn.get("content") or "" for turn in (prompt[-1], completion[0])]
            prompt, completion = [*prompt[:-1], prompt[-1] | {"content": "".join(content)}], completion[1:]
        messages = [{k: v for k, v in m.items() if v is not None} for m in prompt + (completion or [])]
        is_open = messages[-1]["role"] == "assistant" and (completion is None or not ended)
        asks = completion is None and not is_open
        return encode_messages(
            tokenizer, messages, continue_final_message=is_open, add_generation_prompt=asks
        )
    text, bos, eos = prompt + (completion or ""), tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer(text)["input_ids"]
    if ids[:2] == [bos, bos]:  # one is the tokenizer's, one the text's own
        ids = ids[1:]
    while ids[-1:] == [eos] and ids != [bos]:  # some tokenizers, such as OPT's, have BOS = EOS
        ids = ids[:-1]
    ends = completion is not None and ended
    if completion is None:
        ends = text.endswith(tokenizer.eos_token or "\0") and ids != [bos]
    return [*ids, eos] if ends and eos is not None else ids


MARK = "\ue000"  # a character for private use


def encode_messages(tokenizer, messages: list[dict], **options) -> list[int]:
    """Token ids of a conversation, in which only the chat template can write special tokens.

    Text that spells one stays text: an <|im_end|> in a user's message does not end that message.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    text = json.dumps(messages, ensure_ascii=False, default=str)
    pattern = "|".join(map(re.escape, special)) or "(?!)"
    marked = re.sub(pattern, lambda match: match[0][0] + MARK + match[0][1:], text)
    if marked == text:
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)
    rendered = tokenizer.apply_chat_template(json.loads(marked), tokenize=False, **options)
    pattern = "|".join(re.escape(token[0] + MARK + token[1:]) for token in special)
    ids = []
    for i, piece in enumerate(re.split(f"({pattern})", rendered)):  # every other piece is a marked one
        options = {"add_special_tokens": False, "split_special_tokens": i % 2 == 1}
        ids += tokenizer(piece.replace(MARK, "") if i % 2 else piece, **options)["input_ids"]
    return ids


# -------------------------------------------------------------------------------------------------- processes


def fail(message: str, *, alone: bool = False) -> NoReturn:
    """End the program with one line from the first process of a machine, or, `alone`, from this one."""
    if "--traceback" in sys.argv:
        raise RuntimeError(message)
    raise SystemExit(f"error: {message}" if alone or os.environ.get("LOCAL_RANK", "0") == "0" else 1)


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Let any exception of the block end the program with one line: `what`, and what the exception says."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        fail(f"{what}: {first_line(cause) or type(cause).__name__}")


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def say(message: str) -> None:
    """Print a line from rank 0, above the progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message)


def start(args: Arguments) -> tuple[int, int, torch.device]:
    """Join the other processes: (rank, world size, device).

    torchrun sets RANK, WORLD_SIZE and so on; plain `python script.py` is a world of one process.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if args.bf16 is None:
        args.bf16 = device.type == "cuda" and args.dtype != "float64"
    if problem := output_dir_problem(args):
        fail(problem)
    if is_finished(args):
        say(f"finished already, in {args.output_dir}; --overwrite_output_dir starts anew")
        raise SystemExit(0)
    if args.push_to_hub:
        with one_line("--push_to_hub"):  # fail now, not after training, if nothing could be uploaded
            importlib.import_module("huggingface_hub").HfApi().whoami()

    # Others wait while the first process tokenizes: for longer than the default of some minutes.
    timeout = timedelta(hours=2)
    store = next(dist.rendezvous("env://", timeout=timeout))[0] if "RANK" in os.environ else dist.HashStore()
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        # torchrun restarts processes with a store that still has the addresses of the dead ones. (On several
        # nodes it counts restarts apart: there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # Tensors on GPUs go by nccl, Python objects by gloo.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    transformers.utils.logging.disable_progress_bar()
    if rank > 0:
        datasets.disable_progress_bars()
    return rank, world, device


def seed(*numbers: int) -> None:
    """Make random numbers from here on a function of these numbers, such as seed, step and rank."""
    torch.manual_seed(hash(numbers))


def all_reduce(values: dict[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """The sums over all processes of values that all of them give in the same order, under the same names."""
    checksum = zlib.crc32(" ".join(values).encode())
    extremes = torch.tensor([checksum, -checksum])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if extremes[0] != -extremes[1]:
        fail(f"the processes log different metrics; this one: {', '.join(values)}", alone=True)
    sums = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values.values()]
    sums = torch.stack(sums)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


# ----------------------------------------------------------------------------------------------------- models


def from_pretrained(kind, path: str, args: Arguments, **options):
    """kind.from_pretrained, which fails in one line."""
    options["revision"] = args.model_revision if path == args.model_name_or_path else "main"
    if "dtype" in options and not args.trust_remote_code:  # a model: the other format is a pickle
        options["use_safetensors"] = True
    with one_line(f"cannot load {path}"):
        return kind.from_pretrained(path, trust_remote_code=args.trust_remote_code, **options)


def load_tokenizer(path: str, args: Arguments):
    """The tokenizer of a model, if these scripts can train or score with that model."""
    tokenizer, config = (from_pretrained(kind, path, args) for kind in (AutoTokenizer, AutoConfig))
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or args.trust_remote_code
    if config.is_encoder_decoder or not known or getattr(config, "vision_config", None):
        fail(f"{path} is of type {config.model_type}, not a language model with a decoder alone")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no EOS token to end completions with: set its eos_token")
    if len(tokenizer) > config.get_text_config().vocab_size:
        sizes = f"{len(tokenizer)} tokens, but the model embeds {config.get_text_config().vocab_size}"
        fail(f"the tokenizer of {path} has {sizes}: resize_token_embeddings, or take out what was added")
    return tokenizer


def load_model(path: str, args: Arguments, device: torch.device, *, trainable: bool, updated: bool = False):
    """A causal language model, sharded over all processes, with the method `token_logps` of this file.

    Dropout is off in all models, so that policy and reference agree exactly before the first step. Weights
    that are neither trained nor `updated` otherwise are kept in the dtype of the computation.
    """
    config = from_pretrained(AutoConfig, path, args).to_dict()
    dropout = {name: value for name, value in config.items() if "drop" in name and isinstance(value, float)}
    options = {"dtype": getattr(torch, args.dtype)} | dict.fromkeys(dropout, 0.0)
    model = from_pretrained(AutoModelForCausalLM, path, args, **options)
    model.original_dropout = dropout  # save_model writes it into the configuration
    model.train(trainable).requires_grad_(trainable)
    choose_forward_pass(model)
    if trainable and args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.bf16 and not trainable and not updated:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    # The policy's embedding and head stay gathered until its backward pass. A reference has no such pass.
    model = shard(model, args, device, reshard_after_forward=not trainable)
    model.token_logps = MethodType(token_logps, model)
    register_fsdp_forward_method(model, "token_logps")
    return model


def shard(model, args: Arguments, device: torch.device, *, reshard_after_forward: bool):
    """Spread weights over all processes. A layer is gathered while it computes, the rest for a whole pass."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    options = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if args.bf16 else {}
    # FSDP must not cast the inputs of layers: generate() runs without its hooks and would not cast either.
    precision = MixedPrecisionPolicy(**options, cast_forward_inputs=False)
    for layer in [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward)


def adamw(model, args: Arguments) -> torch.optim.AdamW:
    betas = (args.adam_beta1, args.adam_beta2)
    options = {"betas": betas, "eps": args.adam_epsilon, "weight_decay": args.weight_decay, "fused": True}
    with one_line("AdamW"):
        return torch.optim.AdamW(model.parameters(), lr=args.learning_rate, **options)


def set_learning_rate(optimizer, step: int, steps: int, args: Arguments) -> float:
    """Set and return the learning rate of a step, 0 <= step < steps: linear warm-up, then decay."""
    warmup = args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * steps
    done = max(0.0, step - warmup) / max(1.0, steps - warmup)
    decay = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    lr = args.learning_rate * min(1.0, (step + 1) / max(1.0, warmup)) * decay[args.lr_scheduler_type]
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def clip_grad_norm(model, max_norm: float) -> float:
    """Clip the gradient, as one vector over all processes, to `max_norm`, and return its norm before that."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).full_tensor().item()


def mix_weights(reference, policy, share: float) -> None:
    """Move the reference's weights towards the policy's by `share` of the difference (TR-DPO, 2404.09656)."""
    for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
        old.data.lerp_(new.data, share)


# ------------------------------------------------------------------------------------------------- generation


@contextmanager
def gathered(model, args: Arguments) -> Iterator[bool]:
    """Keep full weights on every process while generating, if they fit: gathered once, not for every token.

    Yields whether they fit. If not, all processes must generate the same number of tokens (synced_gpus).
    """
    fits = torch.ones((), device=model.device)
    if model.device.type == "cuda":
        size = sum(p.numel() * (2 if args.bf16 else p.element_size()) for p in model.parameters())
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        fits *= size < 0.5 * free  # the rest is for keys and values
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)] if fits else []
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    try:
        for part in parts:
            part.unshard()
            # Without these hooks, which gather and shard again at every layer of every token.
            part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
        yield bool(fits)
    finally:
        for part, (before, after) in zip(parts, hooks, strict=True):
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


def eos_ids(model, tokenizer) -> list[int]:
    """The tokens that end a completion: the tokenizer's EOS and those of the model's generation config."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return sorted({*eos, tokenizer.eos_token_id})


@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], args: Arguments, **sampling) -> list[list[int]]:
    """One completion for each prompt: token ids that end in EOS, unless max_new_tokens cut them off.

    `sampling` are options of transformers' generate(), such as do_sample and temperature.
    """
    was_training, config = model.training, model.generation_config
    eos = eos_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    # A fresh configuration: the checkpoint's temperature, top-k and so on must not change the distribution.
    sampling |= {"eos_token_id": eos, "pad_token_id": pad, "max_new_tokens": args.max_new_tokens}
    model.generation_config = transformers.GenerationConfig(**sampling)
    completions, size = [], args.per_device_eval_batch_size
    model.eval()  # in training mode, gradient checkpointing would switch off the cache of keys and values
    try:
        with gathered(model, args) as full:
            for part in (prompts[start : start + size] for start in range(0, len(prompts), size)):
                # Padding is on the left, so that all completions begin in the same column.
                padded = {"batch_first": True, "padding_side": "left"}
                ids = pad_sequence([torch.tensor(p) for p in part], padding_value=pad, **padded)
                mask = pad_sequence([torch.ones(len(p), dtype=torch.long) for p in part], **padded)
                inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
                out = model.generate(**inputs, synced_gpus=not full)
                completions += out[:, ids.shape[1] :].tolist()
    finally:
        model.train(was_training)
        model.generation_config = config
    ends = [next((i + 1 for i, token in enumerate(y) if token in eos), len(y)) for y in completions]
    return [y[:end] for y, end in zip(completions, ends, strict=True)]


def complete(policy, tokenizer, test: Data, args: Arguments, step: int) -> tuple[dict, list[dict]]:
    """Complete test prompts, greedily and by sampling: (metrics, samples), the same on every process.

    If the dataset has a column `answer`, the metrics are the shares of completions that equal it.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    count = min(args.eval_prompts, len(test.lengths)) // world * world  # equally many on all processes
    if not count:
        return {}, []
    prompts = test.tokens[range(rank, count, world)]["prompt"]
    seed(args.seed, step, rank, 1)  # training steps have seeds of three numbers
    samples = {
        "step": [step] * len(prompts),
        "prompt": tokenizer.batch_decode(prompts, skip_special_tokens=True),
    }
    for name, how in (("greedy", {"do_sample": False}), ("sampled", {"do_sample": True, "top_k": 0})):
        samples[name] = decode_answers(tokenizer, prompts, generate(policy, tokenizer, prompts, args, **how))
    if "answer" in test.raw.column_names:
        samples["answer"] = test.raw[range(rank, count, world)]["answer"]
    samples, metrics = gather_rows(samples), {}
    if "answer" in test.raw.column_names:
        for name, kind in (("exact_match", "greedy"), ("exact_match_sampled", "sampled")):
            right = [sample[kind].strip() == str(sample["answer"]).strip() for sample in samples]
            metrics[name] = sum(right) / count
    return metrics, samples


def decode_answers(
    tokenizer, prompts: list[list[int]], answers: list[list[int]], *, skip_special_tokens: bool = True
) -> list[str]:
    """The texts of answers behind their prompts: decoded alone, some would lose a space they begin with."""
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    before = tokenizer.batch_decode(prompts, **options)
    whole = tokenizer.batch_decode([x + y for x, y in zip(prompts, answers, strict=True)], **options)
    return [text[len(prompt) :] for prompt, text in zip(before, whole, strict=True)]


def gather_rows(columns: dict[str, list]) -> list[dict]:
    """The rows of all processes, of which each has every world-th one, and as many as the others."""
    mine = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [row for rows in zip(*parts, strict=True) for row in rows]


# -------------------------------------------------------------------------------------------------------- log


class Log:
    """Global means of metrics, to metrics.jsonl (a line for each step and evaluation), console and tracker.

    A script adds the shares of its micro-batches, such as a sum over their pairs divided by the number of
    pairs in the global batch. Shares of the same name add up, over micro-batches and processes, to the mean
    over the global batch. After SIGTERM or SIGINT, the current step is finished and `all_reduce` says so.
    """

    def __init__(self, args: Arguments, first_step: int, steps: int, rows: int, device: torch.device):
        self.args, self.steps, self.rows, self.device = args, steps, rows, device
        self.shares: dict[str, Tensor | float] = {}
        self.signaled = False
        self.skipped = 0  # steps in a row, because of a gradient that was not finite
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        self.is_main = dist.get_rank() == 0
        self.bar = tqdm(initial=first_step, total=steps, disable=not self.is_main, dynamic_ncols=True)
        if self.is_main:
            self.metrics = reopen(Path(args.output_dir, "metrics.jsonl"), first_step)
            self.completions = reopen(Path(args.output_dir, "completions.jsonl"), first_step)
        self.track = tracker(args) if self.is_main else lambda metrics, step: None
        self.time = time.perf_counter()

    def on_signal(self, number: int, frame) -> None:
        self.signaled = True

    def add(self, shares: dict[str, Tensor | float]) -> None:
        for name, value in shares.items():
            value = value.detach().double() if isinstance(value, Tensor) else value
            self.shares[name] = self.shares.get(name, 0.0) + value

    def all_reduce(self) -> tuple[dict[str, float], bool]:
        """(metrics, interrupted): the sums of what all processes added since the last call, and whether one
        of them was told to stop.
        """
        sums = all_reduce(self.shares | {"interrupted": float(self.signaled)}, self.device)
        self.shares = {}
        return sums, sums.pop("interrupted") > 0

    def step(self, step: int, metrics: dict[str, float], tokens: int) -> None:
        """Write the metrics of a step, with its speed; `tokens` are those of the global batch."""
        seconds, self.time = time.perf_counter() - self.time, time.perf_counter()
        self.skipped = 0 if math.isfinite(metrics["grad_norm"]) else self.skipped + 1
        pairs = self.args.batch_size
        metrics |= {"skipped": float(self.skipped > 0), "epoch": (step + 1) * pairs / self.rows}
        metrics |= {"pairs_per_second": pairs / seconds, "tokens_per_second": float(tokens / seconds)}
        if self.device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.write(step + 1, metrics)
        shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
        shown = {short: f"{metrics[name]:.3g}" for short, name in shown.items() if name in metrics}
        self.bar.set_postfix(shown | {"pairs/s": f"{pairs / seconds:.1f}"}, refresh=False)
        self.bar.update()
        if (step + 1) % self.args.logging_steps == 0 or step + 1 == self.steps:
            self.report(step + 1, metrics)
        if self.skipped == 3:
            fail(f"the gradient was not finite in three steps up to {step + 1}; the checkpoints are intact")

    def evaluation_due(self, step: int) -> bool:
        return step % (self.args.eval_steps or self.steps) == 0 or step == self.steps

    def evaluation(self, step: int, metrics: dict[str, float], samples: list[dict]) -> None:
        """Write metrics of the test split and completions of test prompts, after `step` steps."""
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        if self.is_main:
            self.completions.writelines(json.dumps(sample) + "\n" for sample in samples)
        self.write(step, metrics)
        self.report(step, metrics)
        for sample in samples[:3]:
            say("    " + "  ".join(f"{name} {value!r}" for name, value in sample.items() if name != "step"))
        self.time = time.perf_counter()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self.is_main:
            strict = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            with one_line(f"cannot write the metrics of step {step}; the checkpoints are intact"):
                self.metrics.write(json.dumps({"step": step, **strict}, allow_nan=False) + "\n")

    def report(self, step: int, metrics: dict[str, float]) -> None:
        say(f"step {step}/{self.steps} " + " ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        self.track(metrics, step)

    def close(self) -> None:
        self.bar.close()
        self.track(None, self.steps)


def reopen(path: Path, first_step: int) -> TextIO:
    """Open a .jsonl file to append to, without the lines that a run resumed at `first_step` writes again."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # behind the last \n, a line is torn
    lines = [(json.loads(line), line) for line in lines]
    # A step's own line is written before its checkpoint, an evaluation of that step after it.
    kept = [
        line
        for row, line in lines
        if row["step"] < first_step or (row["step"] == first_step and "loss" in row)
    ]
    replace_text(path, "".join(line + "\n" for line in kept))
    return path.open("a", buffering=1)


def replace_text(path: Path, text: str) -> None:
    """Write a file by an atomic rename: whatever happens, it has its old content or the new."""
    with path.with_suffix(".tmp").open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def tracker(args: Arguments) -> Callable[[dict[str, float] | None, int], None]:
    """A function of metrics and step that reports to the tracker of --report_to; metrics None closes it."""
    if args.report_to == "none":
        return lambda metrics, step: None
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(Path(args.output_dir, "tensorboard"))
        write, close = lambda m, step: [writer.add_scalar(k, v, step) for k, v in m.items()], writer.close
    else:  # wandb and trackio have the same interface
        tracking = importlib.import_module(args.report_to)
        tracking.init(project=Path(args.output_dir).name, name=args.run_name, config=asdict(args))
        write, close = lambda m, step: tracking.log(m, step=step), tracking.finish
    return lambda metrics, step: close() if metrics is None else write(metrics, step)


# ------------------------------------------------------------------------------------------------ checkpoints

# Flags that may differ on resume. Those in the second line change rounding, and so perhaps what is sampled.
MAY_CHANGE = """output_dir overwrite_output_dir dataset_num_proc logging_steps report_to run_name save_steps
    per_device_train_batch_size per_device_eval_batch_size gradient_checkpointing
    save_total_limit push_to_hub hub_model_id traceback""".split()
# What overwrite_output_dir deletes; run.json last, because it tells that the rest belongs to a run.
WRITTEN = """checkpoints metrics.jsonl completions.jsonl reference_logps_* tensorboard model*.safetensors
    model.safetensors.index.json run.json""".split()
RUN_FORMAT = 2  # of run.json, checkpoints and metrics.jsonl; runs in another format cannot be resumed
LOCKS: dict[str, int] = {}  # by directory; a notebook may start a run again in the same process


def read_run(args: Arguments) -> dict | None:
    """The content of run.json, which tells what runs in output_dir; None if there is none, or it is to go."""
    file = Path(args.output_dir, "run.json")
    return json.loads(file.read_text()) if file.exists() and not args.overwrite_output_dir else None


def write_run(args: Arguments, *, finished: bool) -> None:
    run = {"format": RUN_FORMAT, "script": Path(sys.argv[0]).name, "arguments": asdict(args)}
    replace_text(Path(args.output_dir, "run.json"), json.dumps(run | {"finished": finished}, indent=2))


def is_finished(args: Arguments) -> bool:
    return (read_run(args) or {}).get("finished", False)


def output_dir_problem(args: Arguments) -> str:
    """Why a run with these arguments cannot begin or resume in output_dir; "" if it can."""
    folder = Path(args.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return f"cannot write to --output_dir {args.output_dir}"
    for name, path in asdict(args).items():
        if name.endswith("_path") and path and Path(path).resolve() == folder.resolve():
            return f"--output_dir is where --{name} is: it would be overwritten"
    if not (run := read_run(args)):
        return ""
    way_out = "change --output_dir or --overwrite_output_dir"
    if run.get("format") != RUN_FORMAT:
        return f"the run in {args.output_dir} is of another version of this program: {way_out}"
    new, old = {"script": Path(sys.argv[0]).name} | asdict(args), {"script": run["script"]} | run["arguments"]
    if args.data_digest is None:  # the data are not loaded yet
        new.pop("data_digest")
    differ = [name for name in new if name not in MAY_CHANGE and old.get(name) != new[name]]
    changes = ", ".join(f"{name} {old.get(name)} (now {new[name]})" for name in differ)
    return f"another run is in {args.output_dir}: {changes}; {way_out}" if changes else ""


def claim_output_dir(args: Arguments) -> None:
    """Lock output_dir for this run, which begins or resumes there; all processes fail if it cannot."""
    problem = [""]
    if dist.get_rank() == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        # torchrun's restart of a run with --overwrite_output_dir must not delete what that run has written.
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            args.overwrite_output_dir = False
        problem = [lock(args.output_dir) or output_dir_problem(args)]
        if not problem[0]:
            if args.overwrite_output_dir:
                for path in [p for name in WRITTEN for p in Path(args.output_dir).glob(name)]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_run(args, finished=False)
    dist.broadcast_object_list(problem)
    if problem[0]:
        fail(problem[0])


def lock(folder: str) -> str:
    """Keep other processes out of `folder` until this one ends, however it ends; why not, if it cannot."""
    try:
        if folder not in LOCKS:
            LOCKS[folder] = os.open(folder, os.O_RDONLY)
        fcntl.flock(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"another run is running in {folder}"
    except OSError:
        pass  # a file system without locks
    return ""


def complete_checkpoints(args: Arguments) -> list[Path]:
    """The checkpoints' directories, oldest first. dcp.save writes .metadata last, so a torn one has none."""
    return sorted(path.parent for path in Path(args.output_dir, "checkpoints").glob("*/.metadata"))


def tidy_checkpoints(args: Arguments) -> None:
    """Keep the newest save_total_limit checkpoints; delete older ones, and what a killed save has left."""
    kept = complete_checkpoints(args)[-args.save_total_limit :]
    for folder in Path(args.output_dir, "checkpoints").glob("*"):
        if folder not in kept:
            (folder / ".metadata").unlink(missing_ok=True)  # first: half deleted, it must not look complete
            shutil.rmtree(folder)


def training_state(policy, optimizer, step: int, method_state: dict) -> dict:
    model, optim = dsd.get_state_dict(policy, optimizer)
    return {
        "model": model,
        "optimizer": optim,
        "step": step,
        "processes": dist.get_world_size(),
        **method_state,
    }


def save_checkpoint(args: Arguments, policy, optimizer, step: int, method_state: dict) -> None:
    """Save the state after `step` steps. `method_state` is a method's own: tensors, or dicts of them."""
    folder = Path(args.output_dir, "checkpoints", f"{step:08d}")
    try:
        dcp.save(training_state(policy, optimizer, step, method_state), checkpoint_id=folder)
        if dist.get_rank() == 0:
            tidy_checkpoints(args)
        dist.barrier()  # nobody leaves before the checkpoint is complete
    except (OSError, CheckpointException) as error:
        free = shutil.disk_usage(args.output_dir).free // 2**20
        reason = f"{cause_of(error)} ({free} MiB are free)"
        alone = isinstance(error, OSError)  # the other kind of error reaches all processes
        fail(f"cannot save a checkpoint after step {step}: {reason}; earlier ones are intact", alone=alone)


def cause_of(error: BaseException) -> str:
    """The first line of an exception, or of the first one that dcp has collected from the processes."""
    failures = [*error.failures.values()] if isinstance(error, CheckpointException) else [(error,)]
    return first_line(failures[0][0]) or type(failures[0][0]).__name__


def resume(args: Arguments, policy, optimizer, method_state: dict) -> int:
    """Load the newest checkpoint in place, and return how many steps it has behind it; 0 without one."""
    found = [[]]
    if dist.get_rank() == 0:
        found = [complete_checkpoints(args)]
    dist.broadcast_object_list(found)  # one decision for all processes
    for folder in reversed(found[0]):
        state = training_state(policy, optimizer, 0, method_state)
        try:
            dcp.load(state, checkpoint_id=folder)
            break
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            say(f"the checkpoint {folder} cannot be loaded ({cause_of(error)}): the one before it is used")
    else:
        if found[0]:  # a load that fails in the middle has changed some weights
            fail(f"no checkpoint in {args.output_dir} can be loaded; --overwrite_output_dir starts anew")
        return 0
    optim = state["optimizer"]
    dsd.set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=optim)
    say(f"resuming after step {state['step']}, from {folder}")
    if state["processes"] != dist.get_world_size():
        processes = f"{state['processes']} processes, not {dist.get_world_size()}"
        say(f"it was saved by {processes}: rounding will differ, and what is sampled")
    return state["step"]


def stop_interrupted(step: int) -> NoReturn:
    """End the program after a signal, on all processes at the same point, as if it had been terminated."""
    say(f"interrupted; step {step} is saved; rerun the same command to resume")
    dist.destroy_process_group()
    raise SystemExit(128 + signal.SIGTERM)


def save_model(args: Arguments, policy, tokenizer) -> None:
    """Save model and tokenizer for from_pretrained(output_dir), and upload them to the Hub if asked to."""
    # The whole model comes together on rank 0 alone, in its CPU's memory.
    whole = dsd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dsd.get_model_state_dict(policy, options=whole)
    if dist.get_rank() == 0:
        # Tied weights are saved under one name.
        weights = {name: w for name, w in weights.items() if name not in policy.all_tied_weights_keys}
        policy.config.update(policy.original_dropout)
        policy.save_pretrained(args.output_dir, state_dict=weights)
        tokenizer.save_pretrained(args.output_dir)
        if args.push_to_hub:
            from huggingface_hub import HfApi

            hub, name = HfApi(), args.hub_model_id or Path(args.output_dir).name
            name = hub.create_repo(name, exist_ok=True).repo_id
            ignored = ["checkpoints/*", "*.npy", "completions.jsonl", "run.json", "tensorboard/*"]
            hub.upload_folder(repo_id=name, folder_path=args.output_dir, ignore_patterns=ignored)
            say(f"uploaded to {name}")
        write_run(args, finished=True)
        say(f"finished: the model is in {args.output_dir}")
    dist.barrier()


# -------------------------------------------------------------------------------------------------- arguments

# The built-in example: a 336k-parameter character model that translates numbers to words, and its pairs.
TOY_MODEL, TOY_DATA = (str(Path(__file__).parent / "tests" / "toy" / name) for name in ("sft", "pairs"))
TOY = dict(model_name_or_path=TOY_MODEL, dataset_name=TOY_DATA, max_steps=100, batch_size=32)
TOY |= dict(
    per_device_train_batch_size=32, per_device_eval_batch_size=250, eval_prompts=500, max_new_tokens=64
)


def arg(default, help: str):
    """A dataclass field with a help text; a list as its default is copied."""
    default = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**default, metadata={"help": help})


POSITIVE = """batch_size per_device_train_batch_size per_device_eval_batch_size num_train_epochs learning_rate
    max_grad_norm max_length max_new_tokens logging_steps eval_steps save_steps save_total_limit
    dataset_num_proc""".split()
NOT_NEGATIVE = "warmup_steps eval_prompts seed".split()


@dataclass
class Arguments:
    """What all methods take. Names are TRL's where TRL has the flag. Batch sizes count pairs.

    Raises ValueError for values that are not defined or do not go together.
    """

    model_name_or_path: str | None = arg(None, "the policy: a Hub name or a directory [the built-in example]")
    model_revision: str = arg("main", "branch, tag or commit of the model on the Hub")
    trust_remote_code: bool = arg(False, "run the model's code, and load weights not in safetensors")
    dtype: Literal["float32", "bfloat16", "float64"] = arg(
        "float32", "of the weights that AdamW updates; bfloat16 rounds small updates away"
    )
    dataset_name: str | None = arg(None, "a Hub name, a directory, or a json, jsonl, csv or parquet file")
    dataset_config: str | None = arg(None, "configuration of the dataset")
    dataset_train_split: str = arg("train", "split to train on")
    dataset_test_split: str = arg("test", "split to evaluate on")
    dataset_num_proc: int | None = arg(None, "processes that tokenize")
    max_length: int = arg(1024, "tokens of prompt and completion; a longer completion is cut at the end")
    output_dir: str | None = arg(
        None, "where results go, on a disk that all nodes see; rerun a command to resume it [output/<script>]"
    )
    overwrite_output_dir: bool = arg(False, "start anew: delete the earlier run in output_dir")
    learning_rate: float = arg(1e-6, "peak learning rate of AdamW")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = arg("linear", "its decay after the warm-up")
    warmup_steps: float = arg(0.1, "steps of linear warm-up; below 1: a share of all steps")
    num_train_epochs: float = arg(1.0, "passes over the training pairs")
    max_steps: int = arg(-1, "if positive, optimizer steps, instead of num_train_epochs")
    batch_size: int | None = arg(None, "pairs per optimizer step, over all processes [64]")
    gradient_accumulation_steps: int | None = arg(None, "sets batch_size to this x per device x processes")
    per_device_train_batch_size: int = arg(8, "pairs per forward pass, at most")
    per_device_eval_batch_size: int = arg(8, "the same in evaluation; also prompts per call of generate()")
    weight_decay: float = arg(0.0, "weight decay of AdamW, on all parameters")
    adam_beta1: float = arg(0.9, "AdamW's decay of the gradient's running mean")
    adam_beta2: float = arg(0.999, "AdamW's decay of the squared gradient's running mean")
    adam_epsilon: float = arg(1e-8, "AdamW's term that keeps its denominator from 0")
    max_grad_norm: float = arg(1.0, "clip the norm of the whole gradient to this")
    bf16: bool | None = arg(None, "compute in bfloat16; weights keep their dtype [true on a GPU]")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass, to save memory")
    eval_strategy: Literal["steps", "no"] = arg("steps", "no: never evaluate")
    eval_steps: int | None = arg(None, "steps between evaluations, besides those before and after training")
    eval_prompts: int = arg(8, "test prompts that an evaluation completes, greedily and by sampling")
    max_new_tokens: int = arg(128, "tokens of a generated completion, at most")
    logging_steps: int = arg(10, "steps between reports of metrics; metrics.jsonl has every step")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = arg("none", "also report metrics to this")
    run_name: str | None = arg(None, "name of the run there")
    save_steps: int = arg(500, "steps between checkpoints; the last step also has one")
    save_total_limit: int = arg(2, "checkpoints to keep")
    seed: int = arg(42, "seed of data order and sampling")
    push_to_hub: bool = arg(False, "upload the trained model")
    hub_model_id: str | None = arg(None, "to this repository [the name of output_dir]")
    traceback: bool = arg(False, "show where an error came from, not only its message")
    data_digest: str | None = field(default=None, init=False)  # not a flag: load_data fills it in

    def __post_init__(self):
        world = int(os.environ.get("WORLD_SIZE", 1))
        if self.gradient_accumulation_steps and self.batch_size:
            raise ValueError("batch_size follows from gradient_accumulation_steps: give one of them")
        if self.gradient_accumulation_steps:
            self.batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps * world
        self.batch_size = 64 if self.batch_size is None else self.batch_size
        for name in POSITIVE:
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, as {getattr(self, name)} is")
        if self.batch_size % world:
            near = max(1, round(self.batch_size / world)) * world
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split over {world} processes; {near} can"
            )
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise ValueError(f"--report_to {self.report_to} needs a package: pip install {self.report_to}")
        if self.bf16 and self.dtype == "float64":
            raise ValueError("bf16 computes in bfloat16: with --dtype float64 it has to be false")


def parse(kind: type[Arguments], **toy) -> Arguments:
    """The command line's arguments. With neither model nor dataset given, TOY and `toy` are the defaults."""
    parser = transformers.HfArgumentParser(kind, allow_abbrev=False)
    parser.error = fail
    given, unknown = parser.parse_known_args()
    if unknown:
        near = difflib.get_close_matches(unknown[0], [f"--{f.name}" for f in fields(kind)], 1)
        fail(f"unknown argument {unknown[0]}; {f'did you mean {near[0]}?' if near else '--help lists all'}")
    if not given.model_name_or_path and not given.dataset_name:
        parser.set_defaults(**TOY | toy | ({"batch_size": None} if given.gradient_accumulation_steps else {}))
    elif not given.model_name_or_path or not given.dataset_name:
        fail("--model_name_or_path and --dataset_name go together (with neither, the built-in example runs)")
    try:
        (args,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        fail(first_line(error))
    args.output_dir = args.output_dir or f"output/{Path(sys.argv[0]).stem}"
    return args
