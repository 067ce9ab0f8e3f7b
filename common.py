"""What the scripts share. Each script has its own losses, its own training step and its own training loop.

To understand a training step, read the first section: the batch, and log π of every token in it.
"""

from __future__ import annotations

import atexit
import copy
import difflib
import glob
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import reprlib
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Literal, NamedTuple, NoReturn, TextIO

import datasets
import filelock
import huggingface_hub
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dsd
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import has_file


# ------------------------------------------------------------------------------------------ log-probabilities
@dataclass
class Batch:
    """B prompts, each with a chosen and a rejected completion, as 2B rows of tokens, padded on the right.

    labels[i, j] is the token after input_ids[i, j]. Two pairs, with prompts p and q, chosen completions c,
    rejected completions r, and dots for what is masked:

        input_ids    p1 p2 c1 c2        labels    p2 c1 c2 c3        completions    .  x  x  x
                     p1 p2 r1 .                   p2 r1 r2 .                        .  x  x  .
                     q1 c1 .  .                   c1 c2 .  .                        x  x  .  .
                     q1 r1 r2 .                   r1 r2 r3 .                        x  x  x  .

    A completion is what the papers call an answer. Its last token is only ever a label. In an online method,
    the two completions of a prompt are the policy's and the reference's. A method with another number of
    completions for each prompt has that number of rows for each prompt.
    """

    # For model(**inputs): input_ids and attention_mask (2B, L), and the pixels of images, if any. With an
    # encoder, the first two are those of the prompts, (2B, P), and decoder_input_ids (2B, L) are the start
    # token and then all labels but the last.
    inputs: dict[str, Tensor]
    per_prompt: int  # rows for each prompt: 2
    labels: Tensor  # (2B, L)
    completions: Tensor  # (2B, L) bool: whether the label is a token of a completion
    scored: Tensor  # (2B, L) bool: whether its log-probability is wanted: completions, for ORPO also prompts
    padded_index: Tensor  # (2, N) rows and columns of the scored labels
    global_pairs: int  # pairs in the global batch, of which this batch is a part
    # The same tokens for the fast forward pass, from `pack`; None with an encoder, and with images.
    packed_inputs: dict[str, Tensor] | None = None
    packed_index: Tensor | None = None
    packed_lengths: list[list[int]] | None = None  # of queries and keys; a list, so that it stays on the host
    global_tokens: dict[str, int] | None = None  # tokens in the global batch: of prompts, chosen, rejected
    rows: np.ndarray | None = None  # (B,) row numbers of the pairs in the dataset
    is_last: bool = True  # whether it is this process's last part of the global batch


def plain_token_logps(model, batch: Batch) -> Tensor:
    """The definition: log π(label | all tokens before it), (2B, L), and 0 where `scored` is false."""
    logits = model(**batch.inputs, use_cache=False).logits  # (2B, L, V)
    return torch.where(batch.scored, label_logps(logits, batch.labels), 0.0)


def label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log π(label), (...), from logits (..., V), in float32 or better."""
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # (..., V)
    return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def token_logps(model, batch: Batch, *, of: Callable[[Tensor, Tensor], Tensor] = label_logps) -> Tensor:
    """What plain_token_logps returns, for less time and memory. Scripts call it as model.token_logps(batch).

    The packed forward pass saves the padding and the second pass over each prompt, and ChunkedHead does not
    keep the logits (next section). `of` maps logits (N, V) and labels (N,) to (N,) or (N, k); the result is
    (2B, L) or (2B, L, k).
    """
    rows, columns = batch.padded_index  # of the N labels that are scored
    weight = None
    if model.forward_pass == "packed":
        lengths = torch.tensor(batch.packed_lengths)  # for a list, layers would be compiled anew
        outputs = model.get_decoder()(**batch.packed_inputs, lengths=lengths, use_cache=False)
        config = model.config.get_text_config()  # Cohere has a scale of its logits, Granite a divisor
        scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
        hidden = outputs.last_hidden_state[0, batch.packed_index] * scale  # (N, D)
        weight = model.get_output_embeddings().weight
    else:  # "padded" and "encoded once" keep all logits
        inputs, k = dict(batch.inputs), batch.per_prompt
        if model.forward_pass == "encoded once":
            prompts = {name: inputs[name][::k] for name in ("input_ids", "attention_mask")}  # (B, P)
            inputs["encoder_outputs"] = encoded = model.get_encoder()(**prompts)
            encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(k, 0)  # (2B, P, D)
        outputs = model.forward(**inputs, use_cache=False)  # not model(...): FSDP's hooks have run already
        hidden = outputs.logits[rows, columns]  # (N, V) logits already, so ChunkedHead gets no weight
        model.router_loss = outputs.get("aux_loss")
    values = ChunkedHead.apply(hidden, weight, batch.labels[rows, columns], of)  # (N,) or (N, k)
    return values.new_zeros(*batch.labels.shape, *values.shape[1:]).index_put((rows, columns), values)


def collate(
    examples: list[tuple], device, score_prompts=False, decoder_prompt=None, vision=None, images=(), **fields
) -> Batch:
    """A Batch of examples (prompt, chosen, rejected) of token ids; `fields` are its last fields."""
    # All processes must run a sharded model equally often: without examples, on one token without a label.
    # Without images, they run the vision tower on a blank one, in a row that has no label either. Both are in
    # the inputs only, which may have more rows than the labels.
    inputs = examples or [([0], [0])]
    k = len(inputs[0]) - 1
    # With an encoder, the decoder's own prompt is its start token.
    rows = [(decoder_prompt or prompt, y) for prompt, *completions in inputs for y in completions]
    labeled = slice(len(rows) if examples else 0)
    rows += [(vision.blank_prompt, [0])] if vision and not images else []
    tokens, is_token = pad([[*prompt, *y] for prompt, y in rows])  # (2B, L + 1)
    prompt_ends = torch.tensor([[len(prompt)] for prompt, _ in rows])  # (2B, 1)
    has_label = is_token[:, 1:]  # (2B, L)
    completions = has_label & (torch.arange(1, tokens.shape[1]) >= prompt_ends)
    scored = completions.clone()
    if score_prompts:  # once for each prompt, in its first row
        scored[::k] = has_label[::k]
    tensors = {"labels": tokens[labeled, 1:], "completions": completions[labeled], "scored": scored[labeled]}
    tensors["padded_index"] = scored[labeled].nonzero().T
    tensors["inputs"] = {"input_ids": tokens[:, :-1], "attention_mask": has_label.long()}
    if decoder_prompt:
        prompts, mask = pad([prompt for prompt, *_ in inputs for _ in range(k)])  # (2B, P)
        of_encoder = {"input_ids": prompts, "attention_mask": mask.long()}
        tensors["inputs"] = of_encoder | {"decoder_input_ids": tokens[:, :-1]}
    elif vision:  # such models are not packed
        tensors["inputs"] = vision.inputs(tokens[:, :-1], images) | tensors["inputs"]
    else:
        tensors |= pack(tensors["inputs"], prompt_ends, scored[labeled], k)
    return Batch(per_prompt=k, **tree_map_only(Tensor, partial(copy_to, device), tensors), **fields)


def pad(sequences: list[list[int]], value: int = 0, side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids (n, longest), padded on one side, and a mask that is true where there is a token."""
    ids = pad_sequence([torch.tensor(ids) for ids in sequences], True, padding_value=-1, padding_side=side)
    return ids.where(ids >= 0, value), ids >= 0


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy a tensor from the host; a GPU copies from pinned memory, so the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# -------------------------------------------------------------------------------------- the fast forward pass
def pack(inputs: dict[str, Tensor], prompt_ends: Tensor, scored: Tensor, k: int) -> dict:
    """The fields of Batch for the fast forward pass: all tokens in one row, without padding."""
    # For the picture of Batch, it is p1 p2 c1 c2 r1 q1 c1 r1 r2: T tokens, and each prompt once.
    ids, is_token = inputs["input_ids"], inputs["attention_mask"].bool()  # (2B, L)
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    kept = is_token & (columns >= prompt_ends)
    kept[::k] = is_token[::k]  # a prompt comes from the first of its rows
    places = kept.flatten().cumsum(0).view_as(kept) - 1  # (2B, L): where in the row the tokens of a batch are
    places = torch.where(columns < prompt_ends, places[::k].repeat_interleave(k, 0), places)
    # Each row of the batch is one causal attention: its kept tokens are queries, and all its tokens are keys.
    # The row of a completion of one token has no queries and is left out.
    lengths = torch.stack([kept.sum(1), is_token.sum(1)])[:, kept.any(1)]  # (2, S) of the S rows with queries
    keys = places[is_token & kept.any(1, keepdim=True)]  # (K,), K keys in all
    # packed_attention ignores this mask. Without one, transformers would make one of T * T entries.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    row = {"input_ids": ids[kept][None], "position_ids": columns[kept][None], "attention_mask": mask}
    ends = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).int()  # (2, S + 1), from 0
    return {
        "packed_inputs": row | {"keys": keys, "ends": ends},  # input_ids and position_ids are (1, T)
        "packed_lengths": lengths.tolist(),
        "packed_index": places[: len(scored)][scored],  # (N,) places in the row that predict these labels
    }


@torch.compiler.disable  # it is a loop over rows, and would be compiled anew for every number of them
def packed_attention(module, query, key, value, mask, *, lengths=None, keys=None, ends=None, **options):
    """Attention of prompts and completions in the packed row: (1, heads, T, size) -> (1, T, heads, size).

    `lengths` are the numbers of queries and of keys of each causal call; `ends` are their sums. `keys` are
    the places of all keys in the packed row: those of a prompt come once for each of its completions.
    """
    if lengths is None:  # an ordinary call, such as one from generate()
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if "sliding_window" not in options and getattr(module.config, "sliding_window", None):
        raise NotImplementedError("its window is only in a mask")  # choose_forward_pass catches this
    key, value = (x.index_select(2, keys) for x in (key, value))  # (1, heads, K, size)
    if module.config._attn_implementation == "varlen":  # one call of flash attention, on a GPU and in 16 bits
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T or K, heads, size)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        window = (options.get("sliding_window") or 0) - 1  # tokens before the query's own; -1 for all of them
        how = {"scale": options.get("scaling"), "window_size": (window, 0)}
        return varlen_attn(q, k, v, *ends, *lengths.amax(1).tolist(), **how)[None], None

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # the queries belong to the last positions of k
        before, window = k.shape[2] - q.shape[2], options.get("sliding_window") or k.shape[2]
        if before > q.shape[2] or window < k.shape[2]:
            mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(before).triu(before + 1 - window)
            return sdpa_attention_forward(module, q, k, v, mask, **options)[0]
        # With zero queries in the place of the prompt, `is_causal` applies. That is faster than a mask, if
        # the prompt is not longer than the completion.
        q = torch.nn.functional.pad(q, (0, 0, before, 0)) if before else q
        return sdpa_attention_forward(module, q, k, v, None, **options | {"is_causal": True})[0][:, before:]

    of_queries, of_keys = lengths.tolist()  # of a tensor on the CPU, so this does not wait for the GPU
    parts = query.split(of_queries, dim=2), key.split(of_keys, dim=2), value.split(of_keys, dim=2)
    return torch.cat([causal(*part) for part in zip(*parts, strict=True)], dim=1), None


# At most this many tokens, and this many logits, go through the head at once. If a whole batch has no more
# logits, they are kept for the backward pass.
CHUNK_TOKENS, CHUNK_LOGITS = 1024, 2**26


class ChunkedHead(torch.autograd.Function):
    """of(hidden @ weight.T, labels) in less memory; without a weight, of(hidden, labels).

    The logits (N, V) are computed for one chunk of tokens at a time. Unless there are few, they are not kept
    but recomputed in the backward pass. They are in float32, and the weight's gradient is accumulated in
    float32: logits in bfloat16 would change a log-probability by about 0.01, and accumulating in bfloat16
    would change the gradient by about 1%.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor | None, labels: Tensor, of):
        vocabulary = hidden.shape[1] if weight is None else len(weight)
        ctx.size, ctx.of = max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary)), of
        ctx.save_for_backward(hidden, weight, labels)
        chunks = [*zip(hidden.split(ctx.size), labels.split(ctx.size), strict=True)]
        ctx.kept = [None] * len(chunks)
        if ctx.needs_input_grad[0] and len(hidden) * vocabulary <= CHUNK_LOGITS:
            ctx.kept = [logits_and_values(h, weight, y, of) for h, y in chunks]
            return torch.cat([values.detach() for _, values in ctx.kept])
        return torch.cat([of(h if weight is None else wide_product(h, weight.T), y) for h, y in chunks])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        hidden, weight, labels = ctx.saved_tensors
        hidden_grad, weight_grad = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        chunks = zip(*(x.split(ctx.size) for x in (hidden, hidden_grad, labels, grad)), strict=True)
        for i, (h, h_grad, y, values_grad) in enumerate(chunks):
            logits, values = ctx.kept[i] or logits_and_values(h, weight, y, ctx.of)
            ctx.kept[i] = None  # frees this chunk; another backward pass recomputes it
            logits_grad = torch.autograd.grad(values, logits, values_grad)[0].to(h.dtype)
            h_grad.copy_(logits_grad if weight is None else logits_grad @ weight)  # a part of hidden_grad
            if weight_grad is not None:
                weight_grad += wide_product(logits_grad.T, h)
            del logits, values, logits_grad  # before those of the next chunk are made
        return hidden_grad, weight_grad, None, None


def logits_and_values(hidden: Tensor, weight: Tensor | None, labels: Tensor, of) -> tuple[Tensor, Tensor]:
    """The logits, from which a gradient can be taken, and of(logits, labels)."""
    logits = (hidden if weight is None else wide_product(hidden, weight.T)).detach().requires_grad_()
    with torch.enable_grad():
        return logits, of(logits, labels)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 or better: products of bfloat16 are not rounded to bfloat16."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and dtype != a.dtype:  # out_dtype exists on CUDA only
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


for name in ("packed", "varlen"):
    AttentionInterface.register(name, packed_attention)
    AttentionMaskInterface.register(name, sdpa_mask)  # ordinary calls get their padding and window masks


def decoder_prompt_of(config) -> list[int] | None:
    """[the token from which a decoder with an encoder starts, as in generate()]; None for a decoder alone."""
    start, bos = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos"))
    return [bos if start is None else start] if config.is_encoder_decoder else None


@torch.no_grad()
def choose_forward_pass(model) -> None:
    """Set model.forward_pass to a fast one if it agrees with plain_token_logps, and otherwise to "padded"."""
    # Packing is wrong for architectures that do not call packed_attention, or that change the hidden states
    # before their head.
    examples = [([1, 2, 3, 4, 5], [4, 4, 1, 2, 5, 3], [1, 3, 2]), ([2], [5], [3, 1, 4, 1, 5, 2, 4])]
    decoder_prompt, attention = decoder_prompt_of(model.config), model.config._attn_implementation
    batch = collate(examples, model.device, decoder_prompt=decoder_prompt, global_pairs=2)
    config = model.config.get_text_config()
    model.forward_pass, model.router_loss = "encoded once" if decoder_prompt else "packed", None
    try:
        for name in ("attention_chunk_size", "output_router_logits", "vision_config"):
            if getattr(config, name, None) or getattr(model.config, name, None):
                raise NotImplementedError(f"its configuration has {name}")
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            raise NotImplementedError("its head has a bias")
        want = plain_token_logps(model, batch)
        if model.forward_pass == "packed":
            model.set_attn_implementation("packed")
        difference = (token_logps(model, batch) - want).abs().max().item()
        if not difference < (5e-3 if model.dtype.itemsize == 2 else 5e-5) * want.abs().max().item():
            raise ArithmeticError(f"its {model.forward_pass} log-probabilities differ by {difference:.0e}")
        if model.training:  # the policy, so that it is said once
            say(f"log-probabilities: {model.forward_pass} (checked against padded)")
    except Exception as error:  # whatever goes wrong, padding works
        model.forward_pass = "padded"
        model.set_attn_implementation(attention)
        name, reason = type(model).__name__, f"{type(error).__name__}: {first_line(error)}"
        say(f"warning: {name} runs with padding, which takes more time and memory, because {reason}")


# ------------------------------------------------------------------------------------------- data and batches
FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# The first of these that a dataset has is used.
TEST_SPLITS = ["test", "validation", "valid", "dev", "eval", "test_prefs", "test_sft"]
NO_PROMPT = "there is no prompt"
SHORT = reprlib.Repr()  # prints texts in quotes, and long ones without their middle
SHORT.maxstring = 200


class Data(NamedTuple):
    """A split of a dataset: its rows as read and as tokens, without the rows that cannot be used."""

    raw: datasets.Dataset  # the rows as they were read, with all columns
    tokens: datasets.Dataset  # token ids: column `prompt`, and a column for each completion
    lengths: np.ndarray  # (n, 1 + completions) the numbers of these tokens
    score_prompts: bool = False  # whether batches score the tokens of prompts as well
    decoder_prompt: list[int] | None = None  # see decoder_prompt_of
    vision: Vision | None = None  # what reads the images of `raw`, if the model takes images


def load_data(args: Arguments, tokenizer, completions=("chosen", "rejected"), *, score_prompts=False):
    """Training and test split as Data; None for the latter with eval_strategy "no" or fewer than 5 rows."""
    # `completions` names their columns: two for pairs, one for single completions with a label, none for a
    # method that samples (prompts then leave room for max_new_tokens). Prompts and completions are texts, or
    # lists of messages for the chat template. Other columns stay in Data.raw.
    decoder_prompt, vision = (getattr(tokenizer, name, None) for name in ("decoder_prompt", "vision"))
    if getattr(args, flag := "truncate_prompt" if decoder_prompt else "max_completion_length"):
        fail(f"--{flag} is for models with{'out' * bool(decoder_prompt)} an encoder")
    columns, data = ("prompt", *completions), []
    for name, raw in read_splits(args, columns).items():
        raw, tokens, lengths = tokenize_split(raw, name, args, tokenizer, columns)
        data.append(Data(raw, tokens, lengths, score_prompts, decoder_prompt, vision))
    train = data[0]
    used = {*columns, "chosen", "rejected", "answer", "tools", "chat_template_kwargs"}
    used |= {"image", "images"} if vision else set()
    if unused := [name for name in train.raw.column_names if name not in used]:
        say(f"columns that are not used: {', '.join(unused)}")
    if tokenizer.chat_template and isinstance(split_prompt(train.raw[0])[0], str):
        say('warning: texts get no chat template; messages do: "prompt": [{"role": "user", "content": ...}]')
        bos, is_first = tokenizer.bos_token, train.tokens[0]["prompt"][:1] == [tokenizer.bos_token_id]
        if bos and "bos_token" in str(tokenizer.chat_template) and not is_first:
            say(f"warning: the chat template begins with {bos}, which these texts lack: write it before them")
    example = [f"{name} {SHORT.repr(tokenizer.decode(ids))}" for name, ids in train.tokens[0].items()]
    say(f"the first row: {'  '.join(example)}")
    digest = hashlib.sha256(b"".join(split.lengths.tobytes() for split in data))
    for column in [column for split in data for column in split.tokens.data.columns]:
        for chunk in column.chunks:
            digest.update(chunk.flatten().to_numpy())
    args.data_digest = digest.hexdigest()[:12]  # a run resumes with the tokens it began with
    return (*data, None)[:2]


def read_splits(args: Arguments, columns: tuple) -> dict[str, datasets.Dataset]:
    """The split to train on and, unless eval_strategy is "no", the test split or rows that are held out."""
    path, kind = Path(args.dataset_name), FILES.get(Path(args.dataset_name).suffix)
    if path.is_file() and not (kind and path.stat().st_size):
        fail(f"{path} is empty" if kind else f"{path} is not a file of the kinds {', '.join(FILES)}")
    new_names = dict(pair.split("=") for pair in args.rename_columns)
    options = {"data_files": glob.escape(str(path))} if kind else {"name": args.dataset_config}
    if kind == "csv":  # read these columns as texts: 007 and null stay as written
        texts = dict.fromkeys((*columns, "chosen", "rejected", "answer", *new_names), str)
        separator = "\t" if path.suffix == ".tsv" else ","
        options |= {"converters": texts, "keep_default_na": False, "sep": separator}
    with one_line(f"cannot load the dataset {path}"):
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            splits = datasets.load_from_disk(path)  # what save_to_disk wrote: one split, or several
            splits = splits if isinstance(splits, dict) else {"train": splits}
        else:
            splits = datasets.load_dataset(kind or args.dataset_name, **options)
    train = [name for name in (args.dataset_train_split, "train", "train_prefs") if name in splits][:1]
    test = [name for name in (args.dataset_test_split, *TEST_SPLITS) if name in splits][:1]
    if not train or not {args.dataset_train_split, args.dataset_test_split} <= {None, *splits}:
        fail(f"--dataset_train_split and --dataset_test_split have to be among {', '.join(splits)}")
    names = train + test if args.eval_strategy != "no" else train
    with one_line("--rename_columns old=new"):
        splits = {name: splits[name].rename_columns(new_names) for name in names}
    rows = splits[train[0]]
    splits[train[0]] = rows = rows.select(range(len(rows))[: args.max_train_samples])
    if test or args.eval_strategy == "no":
        return splits
    size = min(max(64, (n := len(rows)) // 50), 512, n // 5)  # 2%; the same rows in every run
    say(f"no test split: {size} of {n} rows are held out for evaluation; --eval_strategy no trains on all")
    order = np.random.default_rng(0).permutation(n)
    parts = {"train": np.sort(order[size:]), "test": np.sort(order[:size])}
    return {name: rows.select(part) for name, part in parts.items()} if size else splits


def tokenize_split(raw: datasets.Dataset, name: str, args: Arguments, tokenizer, columns: tuple) -> tuple:
    """(raw, tokens, lengths) of the rows of a split that can be used; says how many cannot, and why."""
    completions, names = columns[1:], raw.column_names
    likely = [f" {x}=prompt" for x in ("question", "input", "instruction", "query") if x in names][:1]
    found = f"found {', '.join(names)}; see --rename_columns{''.join(likely)}"
    if not {*completions} <= {*names} or not {"prompt", "chosen"} & {*names}:
        fail(f"the {name} split needs columns {', '.join(columns)}; {found}")
    # `datasets` gives a column of texts and messages the type Json, and would read a text " 4" as 4.
    if mixed := [x for x in columns if x in names and type(raw.features[x]).__name__ == "Json"]:
        fail(f"the {name} split has texts and messages in column {mixed[0]}: give it rows of one kind")
    options = {"tokenizer": tokenizer, "completions": completions, "truncate_prompt": args.truncate_prompt}
    options |= {"max_length": args.max_length, "max_completion": args.max_completion_length}
    options |= {"room": 1 if completions else args.max_new_tokens}
    features = dict.fromkeys(columns, datasets.List(datasets.Value("int32")))
    features = datasets.Features(features | {"note": datasets.Value("string")})
    # The default fingerprint of `map` does not see that the code of a function has changed.
    state = [raw._fingerprint, Path(__file__).read_text(), [*options.values()]]
    how = {"new_fingerprint": datasets.fingerprint.Hasher.hash(state), "num_proc": args.dataset_num_proc}
    how |= {"features": features, "remove_columns": names, "fn_kwargs": options}
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:  # wait for the first process of this machine, then find its work in the cache
        dist.barrier()
    with one_line(f"the {name} split"):
        tokens = raw.map(tokenize, **how)
    if is_first:
        dist.barrier()
    notes = Counter(note for note in tokens["note"][:] if note)
    for note, n in notes.items():
        say(f"{n} of {len(raw)} rows ({n / len(raw):.1%}) of the {name} split are {note}")
    lengths = [pc.list_value_length(tokens.data.column(column)).to_numpy() for column in columns]
    kept = np.flatnonzero(lengths[0])  # rows that are dropped have no tokens
    # If most rows lack a prompt, its column has another name. In a few, completions begin alike by chance.
    if not len(kept) or notes[f"dropped: {NO_PROMPT}"] > len(raw) / 2:
        reason = max(notes, key=notes.get, default="missing")
        fail(f"most rows of the {name} split are {reason}" + f"; {found}" * reason.endswith(NO_PROMPT))
    lengths = np.stack(lengths, axis=1)[kept]
    means = [f"{column} {mean:.0f}" for column, mean in zip(columns, lengths.mean(0), strict=True)]
    say(f"{len(kept)} rows in the {name} split; tokens on average: {', '.join(means)}")
    return raw.select(kept), tokens.select(kept).select_columns([*columns]), lengths


def tokenize(row, tokenizer, completions, max_length, room=1, truncate_prompt=False, max_completion=None):
    """Token ids of a row's `prompt` and completions, or none; and a `note`, if the row is cut or dropped."""
    vision, columns = getattr(tokenizer, "vision", None), ("prompt", *completions)
    for name in sorted({"prompt", "chosen", "rejected", *completions} & {*row}):
        turns = row[name] if isinstance(row[name], list) else []
        is_chat = all(isinstance(turn, dict) and "role" in turn for turn in turns)
        if not isinstance(row[name], str | list | None) or not is_chat:
            raise ValueError(f"{name} is {row[name]!r:.50}, not a text or messages with role and content")
    images = vision.read(row) if vision else []
    # An error up to here, such as an image that cannot be read, ends the program. The others drop the row.
    try:
        prompt, *answers = checked_parts(row, tokenizer, completions)
        whole = parts = encode_row(row, tokenizer, images, prompt, answers)
        # A prompt is cut if completions do not get what they need, up to half of max_length. If they do not
        # even get an eighth, the row is dropped.
        longest = max(map(len, whole[1:]), default=0)
        needed, least = max(room, min(max_length // 2, longest)), max(room, min(max_length // 8, longest))
        if truncate_prompt and not images and len(whole[0]) > max_length - needed:
            parts = cut_prompt(row, tokenizer, prompt, answers, whole, max_length - needed)
        prompt_ids, space = parts[0], max_length - len(parts[0])  # for each completion
        if getattr(tokenizer, "decoder_prompt", None):  # for the encoder; its last token, perhaps EOS, stays
            prompt_ids = prompt_ids[: max_length - 1] + prompt_ids[max_length - 1 :][-1:]
            space, least = max_completion or max_length, 1
        if space < least:
            see = "; see --truncate_prompt" * (not truncate_prompt and not images)
            raise ValueError(f"the prompt leaves too little room in max_length {max_length}{see}")
        parts = [prompt_ids, *(ids[:space] for ids in parts[1:])]
        if not all(parts):
            raise ValueError("the prompt or a completion has no tokens")
        if len(parts) == 3 and parts[1] == parts[2]:
            raise ValueError("the completions are identical, at least up to where they are cut")
    except Exception as error:  # whatever a chat template or a tokenizer raises
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return {name: [] for name in columns} | {"note": f"dropped: {kind}{first_line(error)}"}
    note = "cut to fit max_length" if sum(map(len, parts)) < sum(map(len, whole)) else ""
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, tokenizer.eos_token_id}
    if unknown & {*sum(parts, [])}:
        note = f"in part unknown to the tokenizer, which writes {tokenizer.unk_token}"
    return dict(zip(columns, parts, strict=True)) | {"note": note}


def checked_parts(row: dict, tokenizer, completions: list[str]) -> list:
    """What split_prompt returns for a row, if it can be used. ValueError says why it cannot."""
    prompt, *answers = split_prompt(row, completions)
    messages = [turn for part in (prompt, *answers) if isinstance(part, list) for turn in part]
    contents = [turn["content"] for turn in messages if isinstance(turn.get("content"), list)]
    known = {"text", "image"} if hasattr(tokenizer, "vision") else {"text"}
    if others := {str(part.get("type")) for content in contents for part in content} - known:
        raise ValueError(f"a message has a part of type {min(others)}, which this model does not read")
    answers = answers[: len(completions)]  # a method that samples has no completions
    for name, y in zip(completions, answers, strict=True):
        turns = y if isinstance(y, list) else [{"role": "assistant", "content": y}]
        has_answer = any(turn["role"] == "assistant" for turn in turns)
        if not has_answer or not (turns[-1].get("content") or turns[-1].get("tool_calls")):
            raise ValueError(f"{name} is empty, or has no message of the assistant")
    if not prompt and not (completions and prompt == row.get("prompt") == ""):
        raise ValueError(NO_PROMPT)
    # Only the template may write special tokens: <|im_end|> in the text of a message would end its turn.
    text = json.dumps([prompt, answers], ensure_ascii=False, default=str) if isinstance(prompt, list) else ""
    if any(token.special and token.content in text for token in tokenizer.added_tokens_decoder.values()):
        raise ValueError("the text of a message spells a special token")
    return [prompt, *answers]


def encode_row(row: dict, tokenizer, images: list, prompt, answers: list) -> list[list[int]]:
    """Token ids of a row's prompt and completions, which begin where the prompt ends."""
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    template = {"tools": clean(tools)} | clean(row.get("chat_template_kwargs") or {})
    if getattr(tokenizer, "decoder_prompt", None) and isinstance(prompt, str):  # for encoder and decoder
        parts = [tokenizer(prompt)["input_ids"], *(encode_labels(tokenizer, y) for y in answers)]
    else:
        prompt_ids = encode(tokenizer, prompt, **template)
        whole = [encode(tokenizer, prompt, y, **template) for y in answers]
        # Tokenizers may merge characters across the boundary. The prompt is the beginning that all share.
        shared = shared_length(prompt_ids, *whole)
        parts = [prompt_ids[:shared], *(ids[shared:] for ids in whole)]
    if not parts[0] and answers and tokenizer.bos_token_id is not None:
        parts[0] = [tokenizer.bos_token_id]  # something has to predict a completion's first token
    return tokenizer.vision.insert(images, *parts) if hasattr(tokenizer, "vision") else parts


def cut_prompt(row: dict, tokenizer, prompt, answers: list, parts: list[list[int]], space: int) -> list:
    """The parts with at most `space` tokens of the prompt: the end of a text, or system and latest turns."""
    if isinstance(prompt, str):
        start = parts[0][: parts[0][:1] == [tokenizer.bos_token_id]]
        return [start + parts[0][len(parts[0]) - space + len(start) :], *parts[1:]]
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    starts = [i for i, turn in enumerate(prompt) if turn["role"] == "user" and i > len(system)]
    while len(parts[0]) > space and starts:
        parts = encode_row(row, tokenizer, [], system + prompt[starts.pop(0) :], answers)
    return parts


def split_prompt(row: dict, completions: list[str] | None = None) -> list:
    """[prompt, *completions] of a row, all texts or all lists of messages; by default of the row's pair."""
    # Without a prompt, a pair's shared beginning, in whole words or messages, is its prompt.
    names = completions or [name for name in ("chosen", "rejected") if row.get(name)]
    prompt, *answers = (clean(row.get(name)) for name in ("prompt", *names))
    if isinstance(prompt, list):
        answers = [[{"role": "assistant", "content": y}] if isinstance(y, str) else y for y in answers]
    if isinstance(prompt, str) and answers and isinstance(answers[0], list):
        # Unless the messages begin with the answer, they have the prompt as well.
        prompt = [{"role": "user", "content": prompt}] if answers[0][0].get("role") == "assistant" else None
    if prompt is not None or len(answers) != 2 or not all(answers):
        return [prompt, *answers]
    is_text = isinstance(answers[0], str)
    chosen, rejected = (re.findall(r"\s*\S+|\s+", y) if is_text else y for y in answers)
    n = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)  # leave something of both
    parts = [chosen[:n], chosen[n:], rejected[n:]]
    return ["".join(part) for part in parts] if is_text else parts


def clean(value):
    """Messages or tools without the None that Arrow adds; text parts of a content are joined to one text."""
    if isinstance(value, list):
        return [clean(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {name: clean(item) for name, item in value.items() if item is not None}
    content = value.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        value["content"] = "".join(part["text"] for part in content)
    return value


def shared_length(*lists: list) -> int:
    """How many elements lists have in common at their beginning."""
    n = min(map(len, lists))
    return next((i for i in range(n) if any(x[i] != lists[0][i] for x in lists)), n)


class Vision:
    """The processor of a vision–language model, and what makes tokens and pixels of a dataset's images."""

    def __init__(self, path: str, config, args: Arguments):
        self.processor = from_pretrained(transformers.AutoProcessor, path, args)
        self.tokenizer, self.save_pretrained = self.processor.tokenizer, self.processor.save_pretrained
        self.tokenizer.chat_template = self.processor.chat_template or self.tokenizer.chat_template
        self.tokenizer.vision = self
        model = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        self.accepted = {*inspect.signature(model.forward).parameters}
        folder = Path(args.dataset_name)
        self.folder = folder if folder.is_dir() else folder.parent  # names of files are relative to it
        # What a template writes for an image. The processor replaces it with many tokens.
        self.placeholder = getattr(self.processor, "boi_token", self.processor.image_token)
        self.blank = np.full((32, 32, 3), 255, dtype=np.uint8)
        self.blank_prompt = self.processor(self.blank, self.placeholder)["input_ids"][0]

    def read(self, row: dict) -> list:
        """The images of a row, from column `images` or `image`: names of files, their content, or images."""
        found = [x for x in row.get("images") or [row.get("image")] if x]
        found = [{"path": str(self.folder / x), "bytes": None} if isinstance(x, str) else x for x in found]
        found = [datasets.Image().decode_example(x) if isinstance(x, dict) else x for x in found]
        return [image.convert("RGB") for image in found]

    def insert(self, images: list, prompt: list[int], *answers: list[int]) -> list[list[int]]:
        """The token ids of prompt and answers, with those of the images in the place of placeholders."""
        place = self.tokenizer.convert_tokens_to_ids(self.placeholder)
        if any(place in y for y in answers):
            raise ValueError("a completion has an image")
        if (n := prompt.count(place)) != len(images):
            raise ValueError(f"the number of images is {len(images)}, and the prompt has places for {n}")
        options = {"text": self.placeholder, "add_special_tokens": False}
        ids = iter([self.processor(image, **options)["input_ids"][0] for image in images])
        return [sum([next(ids) if token == place else [token] for token in prompt], []), *answers]

    def inputs(self, input_ids: Tensor, images: list) -> dict[str, Tensor]:
        """What the model takes besides input_ids, which have places for these images, or for a blank one."""
        inputs = self.processor.image_processor(images or [self.blank], return_tensors="pt")
        is_image = (input_ids == self.processor.image_token_id).long()
        inputs |= {"token_type_ids": is_image, "mm_token_type_ids": is_image}
        return {name: x.to(input_ids.device) for name, x in inputs.items() if name in self.accepted}


def encode(tokenizer, prompt, completion=None, *, ended: bool = True, **template) -> list[int]:
    """Token ids of a prompt that waits for its completion, or of a prompt with its completion."""
    # Of messages, they are what the chat template makes, which gets the options `template`. Texts get one
    # BOS, if the tokenizer adds it or the text has it, and one EOS after a completion, unless it was cut off
    # and so has not `ended`.
    if isinstance(prompt, list):
        if completion and prompt[-1]["role"] == completion[0]["role"] == "assistant":  # one turn, continued
            content = [turn.get("content") or "" for turn in (prompt[-1], completion[0])]
            prompt, completion = [*prompt[:-1], prompt[-1] | {"content": "".join(content)}], completion[1:]
        messages = prompt + (completion or [])
        if hasattr(tokenizer, "vision"):  # templates that know images may read nothing but lists of parts
            parts = [turn.get("content") or "" for turn in messages]
            parts = [[{"type": "text", "text": x}] if isinstance(x, str) else x for x in parts]
            messages = [turn | {"content": x} for turn, x in zip(messages, parts, strict=True)]
        is_open = messages[-1]["role"] == "assistant" and (completion is None or not ended)
        how = {"continue_final_message": is_open, "add_generation_prompt": completion is None and not is_open}
        return tokenizer.apply_chat_template(messages, return_dict=False, **template, **how)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer(prompt + (completion or ""))["input_ids"]
    if ids[:2] == [bos, bos]:  # one is the tokenizer's, one the text's own
        ids = ids[1:]
    while ids[-1:] == [eos] and ids != [bos]:  # some tokenizers, such as OPT's, have BOS = EOS
        ids = ids[:-1]
    prompt_ends = prompt.endswith(tokenizer.eos_token or "\0") and ids != [bos]
    ends = prompt_ends if completion is None else ended
    return [*ids, eos] if ends and eos is not None else ids


def encode_labels(tokenizer, text: str) -> list[int]:
    """Token ids of a text that the decoder of an encoder–decoder model learns to write, with one EOS."""
    # BART's <s> is a label: its decoder reads </s> <s> ... as in pretraining, and as in transformers and TRL.
    # T5 has no BOS. A start token that a tokenizer adds (T5Gemma) is no label, nor is mBART's last language.
    ids, eos = tokenizer(text_target=text)["input_ids"], tokenizer.eos_token_id
    ids = ids[1:] if ids[:1] == tokenizer.decoder_prompt else ids
    return [*ids[: ids.index(eos) if eos in ids else None], eos]


def global_batches(data: Data, args: Arguments) -> np.ndarray:
    """The row numbers of all global batches of the run, (steps, batch_size). They follow from the seed."""
    # A batch is a random sample, sorted by length. Rows left over at the end of an epoch are not used.
    rows, world = len(data.lengths), dist.get_world_size()
    size = min(args.batch_size, rows // world * world)
    if not size:
        fail(f"{world} processes need at least {world} rows; there are {rows}")
    per_epoch = rows // size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch - 1e-9)
    few = "; so few change little: aim at 100 (--num_train_epochs, --batch_size)" * (steps < 20)
    say(f"training: {steps} steps, each of {size} of the {rows} rows{few}")
    epochs = range(math.ceil(steps / per_epoch))
    orders = [np.random.default_rng((args.seed, epoch)).permutation(rows) for epoch in epochs]
    batches = np.concatenate([order[: per_epoch * size] for order in orders]).reshape(-1, size)[:steps]
    short_first = data.lengths.sum(1)[batches].argsort(axis=1, kind="stable")
    return np.take_along_axis(batches, short_first, axis=1)


def micro_batches(data: Data, rows: np.ndarray, size: int, device: torch.device) -> Iterator[Batch]:
    """This process's part of a global batch, `size` rows at a time: equally many batches on all processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = rows[rank::world]  # neighbours have similar lengths: every process gets some of each length
    token_counts = dict(zip(data.tokens.column_names, data.lengths[rows].sum(0).tolist(), strict=True))
    if data.decoder_prompt:  # the decoder's own; what the encoder reads is never predicted
        token_counts["prompt"] = len(rows)
    rows_per_process = math.ceil(len(rows) / world)

    def batch_from(start: int) -> Batch:
        part = mine[start : start + size]
        examples = list(zip(*data.tokens[part].values(), strict=True))
        options = {"rows": part, "global_pairs": len(rows), "global_tokens": token_counts}
        options["is_last"] = start + size >= rows_per_process
        if data.vision:  # every completion's row has the images of the prompt
            completions = data.lengths.shape[1] - 1
            images = [completions * data.vision.read(data.raw[int(row)]) for row in part]
            options |= {"vision": data.vision, "images": sum(images, [])}
        return collate(examples, device, data.score_prompts, data.decoder_prompt, **options)

    batches = map(batch_from, range(0, rows_per_process, size))
    yield from look_ahead(batches, device) if data.vision else batches


def look_ahead(items: Iterator, device: torch.device) -> Iterator:
    """The items, each made by a thread while the one before it is used: making pixels takes long."""
    # Otherwise the thread would pin memory for the first GPU.
    begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=begin) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


# --------------------------------------------------------------------------------------- processes and models
def fail(message: str, *, alone: bool = False) -> NoReturn:
    """Exit with a line on stderr from the first process of each machine, or, `alone`, from this one."""
    if "--traceback" in sys.argv:
        raise RuntimeError(message)
    raise SystemExit(f"error: {message}" if alone or os.environ.get("LOCAL_RANK", "0") == "0" else 1)


@contextmanager
def one_line(what: str, *, alone: bool = False) -> Iterator[None]:
    """Turn an exception in the block into fail(what: ..., alone=alone)."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:  # the second is not a subclass of the first
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # its own message says only that an error occurred
        fail(f"{what}: {first_line(error)}", alone=alone)


def first_line(error: BaseException) -> str:
    """The first line of an exception; of a CheckpointException, that of its first failure."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().split("\n")[0] or type(error).__name__


def say(message: str) -> None:
    """Print a line from rank 0, above the progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message)


def gather(value) -> list:
    """The values of all processes, on all of them. The first one is rank 0's: with it, all decide alike."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def start(args: Arguments) -> tuple[int, int, torch.device]:
    """Join the other processes that torchrun has started, if any: (rank, world size, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = prepare_cuda() if torch.cuda.is_available() else torch.device("cpu")
    if args.bf16 is None:
        args.bf16 = device.type == "cuda" and args.dtype != "float64"
    if args.varlen_attention and not (args.bf16 and device.type == "cuda"):
        fail("--varlen_attention needs a GPU and --bf16")
    check_output_dir(args)
    if args.push_to_hub:
        with one_line("--push_to_hub"):  # fail now, not after training, if nothing could be uploaded
            huggingface_hub.HfApi().whoami()
    # The others wait while the first process tokenizes, perhaps for longer than the default timeout.
    timeout = timedelta(hours=2)
    store = next(dist.rendezvous("env://", timeout=timeout))[0] if "RANK" in os.environ else dist.HashStore()
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        # torchrun restarts processes with a store that still has the addresses of the dead ones.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo for Python objects
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    # A thread of gloo that still has a tensor to free when Python exits aborts the process
    # (https://github.com/pytorch/pytorch/issues/190489). It frees the tensor while this one sleeps.
    atexit.register(time.sleep, 0.3)
    transformers.utils.logging.disable_progress_bar()
    if rank > 0:
        datasets.disable_progress_bars()
    return rank, world, device


def prepare_cuda() -> torch.device:
    """The GPU of this process."""
    # Batches differ in size; segments that grow keep the memory from fragmenting. PyTorch reads this at the
    # first allocation.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    # cuDNN's attention plans anew for every length, which is slow, and with a mask its gradient can be NaN
    # (https://github.com/pytorch/pytorch/issues/196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    query = torch.empty(1, 8, 64, 64, dtype=torch.bfloat16, device=device)
    attention = torch.backends.cuda.SDPAParams(query, query, query, None, 0.0, True, False)
    is_flash = torch.backends.cuda.can_use_flash_attention(attention)
    say(f"{torch.cuda.get_device_name()}; attention kernel: {'flash' if is_flash else 'not flash'}")
    return device


def from_pretrained(kind, path: str, args: Arguments, **options):
    """kind.from_pretrained, with an error of one line."""
    options["revision"] = revision_of(path, args)
    if "dtype" in options and not args.trust_remote_code:  # of weights: refuse pickles
        options["use_safetensors"] = True
    with one_line(f"cannot load {path}" + ", which is not a directory here" * (not Path(path).exists())):
        return kind.from_pretrained(path, trust_remote_code=args.trust_remote_code, **options)


REVISIONS = {}  # of the models that adapters belong to; others are loaded from "main"


def revision_of(path: str, args) -> str:
    return args.model_revision if path == args.model_name_or_path else REVISIONS.get(path, "main")


def load_tokenizer(path: str, args: Arguments):
    """The tokenizer of a model this script can train, with `decoder_prompt` and, for images, `vision`."""
    base = adapter_base(path, args) or path
    has_tokenizer = base == path or has_file(path, "tokenizer_config.json", revision=revision_of(path, args))
    tokenizer = from_pretrained(transformers.AutoTokenizer, path if has_tokenizer else base, args)
    config = from_pretrained(AutoConfig, base, args)
    has_vision = bool(getattr(config, "vision_config", None))
    kind = "IMAGE_TEXT_TO_TEXT" if has_vision else "CAUSAL_LM"
    kind = "SEQ_TO_SEQ_CAUSAL_LM" if config.is_encoder_decoder else kind  # those with images are refused
    known = type(config) in getattr(transformers, f"MODEL_FOR_{kind}_MAPPING")
    # Only scripts with this argument take images. In PaliGemma, a prompt's tokens attend to later ones.
    if has_vision:
        known = known and hasattr(args, "freeze_vision_tower") and config.model_type != "paligemma"
    if not known and (has_vision or not args.trust_remote_code):
        fail(f"{path} is of type {config.model_type}, which this script cannot train")
    if has_vision:
        with one_line(f"cannot use the processor of {base}"):
            tokenizer = Vision(base, config, args).tokenizer
    tokenizer.decoder_prompt = decoder_prompt_of(config)
    if tokenizer.decoder_prompt == [None]:
        fail(f"the configuration of {path} has no decoder_start_token_id")
    if getattr(config, "quantization_config", None):
        fail(f"the weights of {base} are quantized already; --load_in_4bit takes a model that is not")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no EOS token to end completions with: set its eos_token")
    if len(tokenizer) > (size := config.get_text_config().vocab_size):
        fail(f"{path} has {len(tokenizer)} tokens, but embeds {size}: resize_token_embeddings of the model")
    return tokenizer


def load_model(path: str, args: Arguments, device: torch.device, *, trainable: bool, updated: bool = False):
    """A model or LoRA adapter, sharded over all processes, with the method `token_logps` of this file."""
    base, dtype = adapter_base(path, args), getattr(torch, args.dtype)
    adapted = bool(base) or (trainable and args.use_peft)
    # Weights that are neither trained nor `updated` (--sync_ref_model) have the dtype of the computation.
    compute_dtype = torch.bfloat16 if args.bf16 else dtype
    base_dtype = dtype if trainable and not adapted or updated else compute_dtype
    config = from_pretrained(AutoConfig, base or path, args)
    original_config = copy.deepcopy(config)
    # Dropout is off, so that policy and reference agree exactly before the first step.
    for part in filter(None, [config, *(getattr(config, name, None) for name in config.sub_configs)]):
        part.update({k: 0.0 for k, value in vars(part).items() if "drop" in k and isinstance(value, float)})
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kind = transformers.AutoModelForImageTextToText if getattr(config, "vision_config", None) else kind
    source, options = None, {"config": config, "dtype": "auto"}
    if args.load_in_4bit:
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        nf4 = transformers.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=compute_dtype)
        options |= {"quantization_config": nf4, "device_map": {"": device}, "dtype": compute_dtype}
    if args.load_in_4bit or dist.get_rank() == 0:
        source = from_pretrained(kind, base or path, args, **options)
        choose_forward_pass(source.train(trainable))
    if args.load_in_4bit:
        model = source
    else:  # only rank 0 reads the weights: others would need as much memory. receive_weights distributes them
        with torch.device("meta"):
            model = kind.from_config(config, dtype=base_dtype, trust_remote_code=args.trust_remote_code)
        model.to_empty(device="cpu").tie_weights()  # costs no memory until it is written
        found = source and (source.forward_pass, source.generation_config)
        model.forward_pass, model.generation_config = gather(found)[0]
        if model.forward_pass == "packed":
            model.set_attn_implementation("packed")
    model.original_config, model.adapted, model.router_loss = original_config, adapted, None
    if trainable and args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if adapted:
        add_adapters(model, base and path, args, trainable)
    if args.varlen_attention:
        if model.forward_pass != "packed":
            fail(f"--varlen_attention is for models that can be packed, and {path} cannot")
        model.set_attn_implementation("varlen")
    model.train(trainable)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # weights of 4 bits are not
            trained = trainable and (not adapted or "lora_" in name and ".default" in name)
            parameter.data = parameter.data.to(dtype if trained or updated else compute_dtype)
            parameter.requires_grad_(trained)
    if trainable and adapted:
        count, total = model.num_parameters(only_trainable=True), model.num_parameters()
        say(f"training {count:,} of {total:,} parameters ({count / total:.2%})")
    # The policy's embedding and head stay gathered until its backward pass. A reference has no such pass.
    model = shard(model, args, device, reshard_after_forward=not trainable)
    if not args.load_in_4bit:
        receive_weights(model, source)
    model.token_logps = MethodType(token_logps, model)
    register_fsdp_forward_method(model, "token_logps")
    return model


def receive_weights(model, source) -> None:
    """Fill a sharded model with the weights and buffers of `source`, which only rank 0 has."""
    weights, buffers = (source.state_dict(), dict(source.named_buffers())) if source else ({}, {})
    names = [name for name in model.state_dict() if "lora_" not in name]
    # peft renames the weight of a layer that gets an adapter to base_layer.weight.
    weights = {name: weights[name.replace(".base_layer", "")] for name in names if source}
    options = {"full_state_dict": True, "broadcast_from_rank0": True, "strict": False}
    dsd.set_model_state_dict(model, weights, options=dsd.StateDictOptions(**options))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers.get(name, buffer))
        dist.broadcast(buffer, 0)


def policy_path(args, adapter_name: str | None = None) -> str:
    """Where the policy is: a model, an adapter, or one of several adapters in a directory."""
    return str(Path(args.model_name_or_path, adapter_name or args.model_adapter_name or ""))


def adapter_base(path: str, args) -> str | None:
    """The model that the adapter in `path` belongs to; None if there is no adapter."""
    try:
        file = transformers.utils.find_adapter_config_file(path, revision=revision_of(path, args))
    except OSError:  # loading the model will say what is wrong
        return None
    if not file:
        return None
    config = json.loads(Path(file).read_text())
    REVISIONS[base := config["base_model_name_or_path"]] = config.get("revision") or "main"
    return base


def add_adapters(model, path: str | None, args: Arguments, trainable: bool) -> None:
    """Add to a model the adapter in `path`, or a fresh one; and the adapter that is the reference, if any."""
    # In a method with a reference that is not a model of its own, a policy that started from an adapter is
    # compared with a copy of that adapter, or with another one. A fresh adapter is left out instead.
    has_reference = trainable and hasattr(args, "ref_adapter_name")
    if path and has_reference and not getattr(args, "ref_model_name_or_path", None):
        load_adapter(model, "reference", policy_path(args, args.ref_adapter_name), args)
    if path:  # after the reference, because the model uses the adapter that was added last
        load_adapter(model, "default", path, args)
    else:
        add_fresh_adapter(model, args)
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        model.forward_pass = "padded"  # ChunkedHead would miss the head's adapter
        say("log-probabilities: padded, because the head has an adapter")


def add_fresh_adapter(model, args: Arguments) -> None:
    """Add to a model a new LoRA adapter (2106.09685), which at first adds only 0."""
    import peft

    targets = "all-linear" if args.lora_target_modules == ["all-linear"] else args.lora_target_modules
    known = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.ndim == 2}
    if targets != "all-linear" and (unknown := sorted({*targets} - known)):
        fail(f"--lora_target_modules {unknown[0]}: this model has {' '.join(sorted(known))}")
    options = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    if getattr(model.config, "vision_config", None):  # leave out modules outside of the language model
        names = {module: name for name, module in model.named_modules()}
        options["exclude_modules"] = rf"(?!{names[model.get_decoder()]}\.).*"
    options["task_type"] = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    options["revision"] = args.model_revision  # of the model that it belongs to
    config = peft.LoraConfig(**options, target_modules=targets, base_model_name_or_path=model.name_or_path)
    torch.manual_seed(args.seed)  # all processes draw the same initial values
    peft.inject_adapter_in_model(config, model, "default")  # model.add_adapter wants the newest peft


def load_adapter(model, name: str, path: str, args: Arguments) -> None:
    """Add to a model, under a name, the LoRA adapter in `path`."""
    import peft

    with one_line(f"cannot load the adapter {path}"), warnings.catch_warnings(action="ignore"):
        where = {"revision": revision_of(path, args)}
        config = peft.PeftConfig.from_pretrained(path, **where)
        more = config.modules_to_save or config.use_dora or config.trainable_token_indices
        if config.peft_type != "LORA" or config.bias != "none" or more:
            raise ValueError("it has other weights than LoRA's matrices")
        if os.path.realpath(base := config.base_model_name_or_path) != os.path.realpath(model.name_or_path):
            raise ValueError(f"it belongs to {base}, not to {model.name_or_path}")
        if name == "reference":
            config.lora_dropout = 0.0  # it runs while the policy is in training mode
        transformers.utils.logging.set_verbosity_error()  # it would report the other adapter as missing
        loaded = model.load_adapter(path, name, peft_config=config, download_kwargs=where)
        transformers.utils.logging.set_verbosity_warning()
        if loaded.unexpected_keys or any(f".{name}." in key for key in loaded.missing_keys):
            raise ValueError(f"its weights do not fit {model.name_or_path}")


@contextmanager
def as_before_training(policy) -> Iterator:
    """The policy with its adapter "reference", or, if it has none of this name, without an adapter."""
    # peft's own methods would also change which parameters have a gradient, in the middle of a step.
    layers = [module for module in policy.modules() if hasattr(module, "_active_adapter")]
    for layer in layers:
        layer._active_adapter = "reference"
    yield policy
    for layer in layers:
        layer._active_adapter = "default"


def load_reference(path: str | None, policy, args: Arguments, device, *, updated: bool = False) -> Callable:
    """A function, `with open_reference() as reference:`, of the model in `path` or the policy as it was."""
    if policy.adapted and not path:
        return partial(as_before_training, policy)  # the same model: there is no second copy in memory
    path = path or policy_path(args)
    return partial(nullcontext, load_model(path, args, device, trainable=False, updated=updated))


def shard(model, args: Arguments, device: torch.device, *, reshard_after_forward: bool):
    """Spread weights over processes. Those of layers are gathered one by one, others for the whole pass."""
    world, size = dist.get_world_size(), args.hsdp_shard_size or dist.get_world_size()
    axes = {"shard": size} if size == world else {"replicate": world // size, "shard": size}
    mesh = dist.init_device_mesh(device.type, (*axes.values(),), mesh_dim_names=(*axes,))
    options = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if args.bf16 else {}
    # FSDP must not cast the inputs of layers: generate() runs without its hooks, where nothing would be cast.
    precision = MixedPrecisionPolicy(**options, cast_forward_inputs=False)
    # Weights of 4 bits cannot be sharded: every process has copies of them, and of all other frozen weights.
    is_4bit, options = getattr(model, "is_loaded_in_4bit", False), {"mesh": mesh, "mp_policy": precision}
    options["ignored_params"] = {p for p in model.parameters() if is_4bit and not p.requires_grad}
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for layer in reversed(layers):  # inner ones first: MBart has attention within layers
        if args.torch_compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        fully_shard(layer, **options)
    return fully_shard(model, **options, reshard_after_forward=reshard_after_forward)


def adamw(model, args: Arguments) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "fused": True}
    with one_line("AdamW"):
        return torch.optim.AdamW(trained, args.learning_rate, weight_decay=args.weight_decay, **options)


def set_learning_rate(optimizer, step: int, steps: int, args: Arguments) -> float:
    """Set and return the learning rate of a step, 0 <= step < steps: linear warm-up, then decay."""
    warmup = args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * steps
    done = max(0.0, step - warmup) / max(1.0, steps - warmup)
    decay = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    lr = args.learning_rate * min(1.0, (step + 1) / max(1.0, warmup)) * decay[args.lr_scheduler_type]
    optimizer.param_groups[0]["lr"] = lr
    return lr


# ------------------------------------------------------------------------------------------------- generation
@contextmanager
def gathered(model, args: Arguments) -> Iterator[bool]:
    """Gather the weights once for a whole generation, unless memory is short; yields whether it did."""
    fits = torch.ones((), device=model.device)
    if model.device.type == "cuda" and not model.config.is_encoder_decoder:  # generate() runs encoders alone
        size = sum(p.numel() * (2 if args.bf16 else p.element_size()) for p in model.parameters())
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        fits *= size < 0.5 * free  # the rest is for keys and values
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)] if fits else []
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.unshard()
        # Remove FSDP's hooks, which are methods of its state: they would gather and shard the weights again
        # at every layer of every token. Other hooks are transformers', and collect the outputs of layers.
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            kept = {i: hook for i, hook in getattr(part, name).items() if not hasattr(hook, "__self__")}
            setattr(part, name, kept)
    yield bool(fits)
    for part, (before, after) in zip(parts, hooks, strict=True):
        part._forward_pre_hooks, part._forward_hooks = before, after
        part.reshard()


def eos_ids(model, tokenizer) -> list[int]:
    """The tokens that end a completion: the tokenizer's EOS and those of the model's generation config."""
    eos = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})


@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], args: Arguments, images=(), **sampling) -> list:
    """One completion for each prompt: token ids that end in EOS, unless max_new_tokens cut them off."""
    was_training, config, eos = model.training, model.generation_config, eos_ids(model, tokenizer)
    decoder_prompt, vision = decoder_prompt_of(model.config), getattr(tokenizer, "vision", None)
    sampling |= {"eos_token_id": eos, "pad_token_id": eos[0], "max_new_tokens": args.max_new_tokens}
    sampling |= {"decoder_start_token_id": decoder_prompt[0]} if decoder_prompt else {}
    # A fresh configuration: the checkpoint's temperature, top-k and so on must not change the distribution.
    model.generation_config = transformers.GenerationConfig(**sampling)
    model.eval()  # in training mode, gradient checkpointing would switch off the cache of keys and values
    shortest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so that padding is short
    completions, size = [[] for _ in prompts], args.generation_batch_size
    side = "right" if decoder_prompt else "left"  # left: completions begin in the same column
    # Layers run uncompiled: the growing cache of keys and values would make torch.compile start again.
    with gathered(model, args) as full, torch.compiler.set_stance("force_eager"):
        for start in range(0, len(prompts), size):
            rows = shortest_first[start : start + size]
            shown = [image for row in rows for image in images[row]] if images else []
            blank = [vision.blank_prompt] if vision and not shown else []  # as in collate
            ids, mask = pad([*(prompts[row] for row in rows), *blank], eos[0], side)
            inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}
            inputs |= vision.inputs(inputs["input_ids"], shown) if vision else {}
            if getattr(model.config, "output_router_logits", False):
                inputs["output_router_logits"] = False  # transformers fails to balance padded prompts
            # If weights are gathered at every token, all processes must generate equally many.
            output = model.generate(**inputs, synced_gpus=not full)
            output = output[:, 1 if decoder_prompt else ids.shape[1] :].tolist()
            for row, y in zip(rows, output[: len(rows)], strict=True):
                end = next((i + 1 for i, token in enumerate(y) if token in eos), len(y))
                completions[row] = y[:end]
    model.train(was_training)
    model.generation_config = config
    return completions


def complete(policy, tokenizer, test: Data, args: Arguments, step: int) -> tuple[dict, list[dict]]:
    """(metrics, samples) of completions of test prompts; metrics if there is a column `answer` to equal."""
    rank, world, n = dist.get_rank(), dist.get_world_size(), len(test.lengths)
    # Equally many on all processes.
    count = min(math.ceil(args.eval_prompts / world), n // world) * world
    if not count:
        return {}, []
    rows = [i * n // count for i in range(rank, count, world)]  # spread over the test split
    prompts = test.tokens[rows]["prompt"]
    before = [[] for _ in prompts] if test.decoder_prompt else prompts  # in the decoder
    torch.manual_seed(hash((args.seed, step, rank, 1)))  # the 1 keeps it from the seeds of training steps
    columns = {"step": [step] * len(rows), "row": rows}
    columns["prompt"] = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    if "answer" in test.raw.column_names:
        columns["answer"] = test.raw[rows]["answer"]
    elif "chosen" in test.tokens.column_names:
        columns["chosen"] = decode_answers(tokenizer, before, test.tokens[rows]["chosen"])
    images = [test.vision.read(test.raw[row]) for row in rows] if test.vision else []
    for name, options in (("greedy", {"do_sample": False}), ("sampled", {"do_sample": True, "top_k": 0})):
        answers = generate(policy, tokenizer, prompts, args, images, **options)
        columns[name] = decode_answers(tokenizer, before, answers)
    samples, metrics = gather_rows(columns), {}
    if "answer" in columns:
        for metric, name in (("exact_match", "greedy"), ("exact_match_sampled", "sampled")):
            metrics[metric] = sum(s[name].strip() == str(s["answer"]).strip() for s in samples) / count
    return metrics, samples


def decode_answers(tokenizer, prompts: list, answers: list, *, skip_special_tokens: bool = True) -> list[str]:
    """The texts of answers behind their prompts: decoded alone, some would lose a space they begin with."""
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    before = tokenizer.batch_decode(prompts, **options)
    whole = tokenizer.batch_decode([x + y for x, y in zip(prompts, answers, strict=True)], **options)
    return [text[len(prompt) :] for prompt, text in zip(before, whole, strict=True)]


def gather_rows(columns: dict[str, list]) -> list[dict]:
    """Interleave the rows of all processes, rank::world, to one list."""
    mine = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [row for rows in zip(*gather(mine), strict=True) for row in rows]


# -------------------------------------------------------------------------------------------------------- log
# What a line of the console shows, and how it is named there; metrics.jsonl has all metrics of every step.
REPORTED = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
REPORTED |= {"logps/chosen": "log π chosen", "logps/rejected": "rejected"}
REPORTED |= {"learning_rate": "lr", "pairs_per_second": "pairs/s"}


class Log:
    """Adds up metrics and writes them to metrics.jsonl (a line per step or evaluation), console, tracker.

    Scripts add sums over the pairs of micro-batches, divided by the number of pairs in the global batch; so
    the sum over processes is the mean. After SIGTERM or SIGINT, all_reduce says so at the end of the step.
    """

    def __init__(self, args: Arguments, first_step: int, batches: np.ndarray, train: Data):
        self.args, (self.steps, self.pairs) = args, batches.shape
        self.steps_per_epoch = len(train.lengths) // self.pairs
        self.shares, self.signals = {}, []
        self.skipped = 0  # consecutive steps skipped because of a gradient that was not finite
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.signals.append(number))
        self.is_main = dist.get_rank() == 0
        self.bar = tqdm(initial=first_step, total=self.steps, disable=not self.is_main, dynamic_ncols=True)
        if self.is_main:
            self.metrics = reopen(Path(args.output_dir, "metrics.jsonl"), first_step)
            self.completions = reopen(Path(args.output_dir, "completions.jsonl"), first_step)
        self.tracker = open_tracker(args) if self.is_main and args.report_to != "none" else None
        self.time = time.perf_counter()

    def add(self, shares: dict[str, Tensor | float]) -> None:
        for name, value in shares.items():
            self.shares[name] = self.shares.get(name, 0.0) + torch.as_tensor(value).detach().double()

    def all_reduce(self) -> tuple[dict[str, float], bool]:
        """The sums over all processes since the last call, and whether a process was told to stop."""
        shares, self.shares = {name: float(value) for name, value in self.shares.items()}, {}
        everyones = gather(shares | {"interrupted": len(self.signals)})
        if odd := [other for other in everyones if [*other] != [*everyones[0]]]:
            fail(f"processes log different metrics: {', '.join(everyones[0])} and {', '.join(odd[0])}")
        metrics = {name: sum(other[name] for other in everyones) for name in everyones[0]}
        return metrics, metrics.pop("interrupted") > 0

    def step(self, step: int, metrics: dict[str, float], tokens: int) -> None:
        """Write the metrics of a step, with the speed since the last step; `tokens` of the global batch."""
        seconds, self.time = time.perf_counter() - self.time, time.perf_counter()
        self.skipped = 0 if math.isfinite(metrics["grad_norm"]) else self.skipped + 1
        metrics |= {"skipped": float(self.skipped > 0), "epoch": (step + 1) / self.steps_per_epoch}
        metrics |= {"pairs_per_second": self.pairs / seconds, "tokens_per_second": float(tokens / seconds)}
        if torch.cuda.is_available():
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        shown = [f"{title} {metrics[name]:.3g}" for name, title in REPORTED.items() if name in metrics]
        self.bar.set_postfix_str(", ".join(shown[:3]), refresh=False)
        self.bar.update()
        if (step + 1) % self.args.logging_steps == 0 or step + 1 == self.steps:
            say(f"step {step + 1}/{self.steps}  {'  '.join(shown)}")
        self.write(step + 1, metrics)
        if self.skipped == 3:
            fail(f"the gradient was not finite in three steps up to {step + 1}; the checkpoints are intact")

    def evaluation_due(self, step: int) -> bool:
        """Whether an evaluation follows this step; the bar then says so."""
        is_due = step % (self.args.eval_steps or self.steps) == 0 or step == self.steps
        if is_due:
            self.bar.set_description_str("evaluating")
        return is_due

    def evaluation(self, step: int, metrics: dict[str, float], samples: list[dict]) -> None:
        """Write metrics of the test split and completions of test prompts; show what training changed."""
        self.write(step, {f"eval_{name}": value for name, value in metrics.items()}, samples)
        seconds, self.time = time.perf_counter() - self.time, time.perf_counter()
        if not self.is_main:
            return
        self.bar.set_description_str("", refresh=False)
        self.bar.start_t += seconds  # neither bar nor pairs_per_second count evaluations
        first = json.loads(Path(self.metrics.name).open().readline())  # the evaluation before training
        rows = map(json.loads, Path(self.completions.name).open())
        greedy = {row["row"]: row["greedy"] for row in rows if row["step"] == 0}
        title = f"evaluation after {step} of {self.steps} steps"
        lines = [f"{title:<40}{'before':>12}" + f"{'now':>12}" * (step > 0)]
        for name, now in metrics.items():
            before = math.nan if (x := first.get(f"eval_{name}")) is None else x  # None: it was not finite
            lines.append(f"    {name:<36}{before:12.4g}" + f"{now:12.4g}" * (step > 0))
        if samples:
            lines.append(f"    greedy answers, of {len(samples)} completed test prompts (--eval_prompts):")
        hidden = {"step", "row", "greedy", "sampled"}
        for sample in samples[len(samples) // 6 :: max(1, len(samples) // 3)][:3]:
            texts = {"prompt": sample["prompt"], "before": greedy.get(sample["row"])}
            texts |= {"now": sample["greedy"]} if step > 0 else {}
            texts |= {name: text for name, text in sample.items() if name not in hidden}
            lines += ["", *(f"    {name:<10}{SHORT.repr(text)}" for name, text in texts.items())]
        say("\n".join(lines))

    def write(self, step: int, metrics: dict[str, float], samples: list[dict] = ()) -> None:
        if self.tracker:
            self.tracker.log(metrics, step=step)
        if self.is_main:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            with one_line(f"cannot write the metrics of step {step}; the checkpoints are intact"):
                self.completions.writelines(json.dumps(sample) + "\n" for sample in samples)
                self.metrics.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")

    def close(self) -> None:
        self.bar.close()
        if self.tracker:
            self.tracker.finish()


def reopen(path: Path, first_step: int) -> TextIO:
    """Open a file of JSON lines to append to, after cutting off those that a resumed run will write again."""
    # A last line without a newline is incomplete: the process was killed while it wrote.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    # A step's own line is written before its checkpoint, an evaluation of that step after it.
    kept = sum(row["step"] < first_step + ("loss" in row) for row in map(json.loads, lines))
    file = path.open("a", buffering=1)
    file.truncate(sum(len(line) + 1 for line in lines[:kept]))  # json.dumps writes ASCII
    return file


def open_tracker(args: Arguments):
    """The tracker of --report_to: an object with wandb's log and finish, which trackio has as well."""
    if args.report_to == "tensorboard":
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(args.output_dir)

        def log(metrics: dict[str, float], step: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()  # what a kill loses would be missing from a resumed run

        return SimpleNamespace(log=log, finish=writer.close)
    tracker = importlib.import_module(args.report_to)
    tracker.init(project=Path(args.output_dir).name, name=args.run_name, config=asdict(args))
    return tracker


# ------------------------------------------------------------------------------------------------ checkpoints
# What may differ on resume; batch sizes of a process change rounding, and so perhaps what is sampled.
MAY_CHANGE = """output_dir dataset_num_proc logging_steps report_to run_name per_device_train_batch_size
    per_device_eval_batch_size generation_batch_size gradient_accumulation_steps gradient_checkpointing
    torch_compile varlen_attention sync_gradients_once hsdp_shard_size save_steps save_total_limit
    push_to_hub hub_model_id traceback""".split()
LOCKS = []  # held until the process ends; a notebook, which is one process, may start a run again
# What tells one run from another, besides its arguments. `format` is that of all files of a run.
RUN = {"format": 2, "script": Path(sys.argv[0]).name}


def write_run(args: Arguments, *, finished: bool) -> None:
    """Write run.json, which says what runs in output_dir: after a kill it has its old content or the new."""
    file = Path(args.output_dir, "run.json")
    file.with_suffix(".tmp").write_text(json.dumps({"finished": finished} | RUN | asdict(args), indent=2))
    file.with_suffix(".tmp").replace(file)


def check_output_dir(args: Arguments) -> None:
    """End the program unless this run can begin or resume in output_dir."""
    out, folder, file = args.output_dir, Path(args.output_dir).absolute(), Path(args.output_dir, "run.json")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        fail(f"cannot write to --output_dir {out}")
    if not file.exists():
        if any((folder / f"{name}config.json").exists() for name in ("", "adapter_")):
            fail(f"--output_dir {out} has a model, which would be overwritten")
        return
    old, new = json.loads(file.read_text()), RUN | asdict(args)
    may_change = MAY_CHANGE + ["data_digest"] * (args.data_digest is None)  # before the data are loaded
    if differ := [name for name in new if name not in may_change and old.get(name) != new[name]]:
        changes = ", ".join(f"{name} {old.get(name)} (now {new[name]})" for name in differ[:3])
        changes += f" and {len(differ) - 3} more" * (len(differ) > 3)
        fail(f"another run is in {out}: {changes}; choose another --output_dir, or delete that one")
    if old["finished"]:
        say(f"finished already, in {out}; to start anew, delete it")
        say(f"to train the finished model further: --model_name_or_path {out}")
        raise SystemExit(0)


def claim_output_dir(args: Arguments) -> None:
    """Begin or resume a run in output_dir, and lock it against other programs until this one ends."""
    check_output_dir(args)  # again, because now the data are known
    if dist.get_rank() == 0:  # the others wait for it when they look for checkpoints
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        LOCKS.append(filelock.FileLock(folder / ".lock", is_singleton=True))
        with one_line(f"another run is running in {args.output_dir}"):
            LOCKS[-1].acquire(blocking=False)
        write_run(args, finished=False)


def complete_checkpoints(args: Arguments) -> list[Path]:
    """The checkpoints' directories, oldest first. dcp.save writes .metadata last: incomplete ones lack it."""
    return sorted(path.parent for path in Path(args.output_dir, "checkpoints").glob("*/.metadata"))


def training_state(policy, optimizer, step: int, method_state: dict) -> dict:
    options = dsd.StateDictOptions(ignore_frozen_params=True)
    weights, moments = dsd.get_state_dict(policy, optimizer, options=options)
    if policy.adapted:  # a head that is tied to the frozen embedding would be saved otherwise
        weights = {name: w for name, w in weights.items() if "lora_" in name}
    return {"model": weights, "optimizer": moments, "step": step} | method_state


def save_checkpoint(args, policy, optimizer, step: int, method_state: dict, *, interrupted: bool) -> None:
    """Save the state after `step` steps; exit if interrupted. method_state has tensors, or dicts of them."""
    folder = Path(args.output_dir, "checkpoints", f"{step:08d}")
    # On a full disk, torch's own error is about its file format.
    free = f"{shutil.disk_usage(args.output_dir).free // 2**20} MiB are free"
    with one_line(f"cannot save a checkpoint after step {step} ({free}); earlier ones are intact"):
        if dist.get_rank() == 0:  # one that resume could not load may be there
            (folder / ".metadata").unlink(missing_ok=True)
        # Copying ahead would first copy the whole state to pinned memory of the host.
        writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
        dcp.save(training_state(policy, optimizer, step, method_state), storage_writer=writer)
        if dist.get_rank() == 0:
            kept = [path for path in complete_checkpoints(args) if path <= folder][-args.save_total_limit :]
            for old in [path for path in folder.parent.glob("*/") if path not in kept]:
                (old / ".metadata").unlink(missing_ok=True)  # first: half deleted, it must not look complete
                shutil.rmtree(old)
        dist.barrier()  # wait until the checkpoint is complete
    if interrupted:  # on all processes
        say(f"interrupted; step {step} is saved; run the same command again to resume")
        dist.destroy_process_group()
        raise SystemExit(128 + signal.SIGTERM)


def resume(args: Arguments, policy, optimizer, method_state: dict) -> int:
    """Load the newest checkpoint in place, and return its step; 0 without one."""
    checkpoints = gather(complete_checkpoints(args))[0]
    for folder in reversed(checkpoints):
        state = training_state(policy, optimizer, 0, method_state)
        try:
            # Weights that never had a gradient, as in LLaVA's last vision layer, have no moments in it.
            dcp.load(state, checkpoint_id=folder, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
        except (Exception, dcp.CheckpointException) as error:
            say(f"the checkpoint {folder} cannot be loaded ({first_line(error)}): the one before it is used")
            continue
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        dsd.set_state_dict(policy, optimizer, **parts, options=dsd.StateDictOptions(strict=False))
        say(f"resuming after step {state['step']}, from {folder}")
        return state["step"]
    if checkpoints:  # a load that failed may have changed some weights
        fail(f"no checkpoint in {args.output_dir} can be loaded; to start anew, delete it")
    if Path(args.output_dir, "metrics.jsonl").exists():
        say("there is no checkpoint yet (see --save_steps): the run starts from step 0")
    return 0


def save_model(args: Arguments, policy, tokenizer) -> None:
    """Save model and tokenizer for from_pretrained(output_dir), and upload them to the Hub if asked to."""
    on_rank_0 = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": policy.adapted}
    weights = dsd.get_model_state_dict(policy, options=dsd.StateDictOptions(**on_rank_0))
    if dist.get_rank() == 0:
        # Tied weights are saved under one name.
        weights = {name: w for name, w in weights.items() if name not in policy.all_tied_weights_keys}
        if policy.adapted:  # as peft writes an adapter; the model's own method wants the newest peft
            weights = {re.sub(r"\.default\b", "", n): w for n, w in weights.items() if "lora_" in n}
            weights = {f"base_model.model.{name}": w.contiguous() for name, w in weights.items()}
            save_file(weights, Path(args.output_dir, "adapter_model.safetensors"), {"format": "pt"})
            config = policy.peft_config["default"]
            if Path(base := config.base_model_name_or_path).is_dir():  # found from everywhere
                config.base_model_name_or_path = str(Path(base).resolve())
            config.save_pretrained(args.output_dir)
        else:
            policy.config = policy.original_config  # which has the dropout
            policy.save_pretrained(args.output_dir, state_dict=weights)
        getattr(tokenizer, "vision", tokenizer).save_pretrained(args.output_dir)
        write_model_card(args)
        if args.push_to_hub:
            hub, name = huggingface_hub.HfApi(), args.hub_model_id or Path(args.output_dir).name
            name = hub.create_repo(name, exist_ok=True).repo_id
            ignored = ["checkpoints/*", "*.npy", "completions.jsonl", "run.json", "events.out.*", ".lock"]
            hub.upload_folder(repo_id=name, folder_path=args.output_dir, ignore_patterns=ignored)
        write_run(args, finished=True)
        say(f"finished: {args.output_dir} has the model, metrics.jsonl and completions.jsonl")
        for tool in ("plot", "chat"):
            file = Path(__file__).parent / "tests" / "bench" / f"{tool}.py"
            if file.exists():  # the scripts may have been copied without it
                say(f"    {tool}: {shlex.join(['python', os.path.relpath(file), args.output_dir])}")
    dist.barrier()


def write_model_card(args: Arguments) -> None:
    """Write README.md, which the Hub shows: the model's base, data, method, command and held-out metrics."""
    path, method = Path(args.output_dir, "README.md"), Path(sys.argv[0]).stem
    if path.exists() and "preference-optimization" not in path.read_text():
        return  # it is not ours
    base, data = args.model_name_or_path, args.dataset_name
    facts = {"library_name": "peft" if args.use_peft else "transformers"}
    facts |= {} if Path(base).exists() else {"base_model": base}  # the Hub wants names that it knows
    facts |= {} if Path(data).exists() else {"datasets": data}
    card = huggingface_hub.ModelCardData(**facts, tags=[method, "preference-optimization"])
    text = ["---", card.to_yaml(), "---", f"{base} trained with {method} on {data}.", ""]
    text += [f"    {shlex.join(['python', *sys.argv])}", "", "| held-out metric | value |", "|---|---|"]
    rows = [json.loads(line) for file in Path(args.output_dir).glob("metrics.jsonl") for line in file.open()]
    last = {name: value for row in rows for name, value in row.items() if name.startswith("eval_")}
    path.write_text("\n".join([*text, *(f"| {name} | {value} |" for name, value in last.items()), ""]))


# -------------------------------------------------------------------------------------------------- arguments
# The built-in example: a 336k-parameter character model that translates numbers to words, and its pairs.
TOY_MODEL, TOY_DATA = (str(Path(__file__).parent / "tests" / "toy" / name) for name in ("sft", "pairs"))
TOY = dict(model_name_or_path=TOY_MODEL, dataset_name=TOY_DATA, max_steps=100, max_new_tokens=64)
TOY |= dict(batch_size=32, per_device_train_batch_size=32, per_device_eval_batch_size=250)
TOY |= dict(generation_batch_size=250, eval_prompts=500)
# Numbers that may be 0; others must be positive.
MAY_BE_ZERO = ["warmup_steps", "weight_decay", "lora_dropout", "eval_prompts", "seed"]
MAY_BE_ZERO += ["adam_beta1", "adam_beta2", "adam_epsilon"]


def arg(default, help: str, **options):
    """A dataclass field with a help text; each object gets its own copy of a default list."""
    default = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**default, metadata={"help": help, **options})


@dataclass
class Arguments:
    """What all methods take. Names are TRL's where TRL has the flag. Invalid values raise ValueError."""

    model_name_or_path: str | None = arg(None, "the policy: a Hub name or a directory [the built-in example]")
    model_revision: str = arg("main", "branch, tag or commit of the model on the Hub")
    trust_remote_code: bool = arg(False, "run the model's code, and load weights not in safetensors")
    use_peft: bool = arg(False, "train a LoRA adapter; a model that is one is trained further in any case")
    lora_r: int = arg(16, "rank of the adapter's matrices")
    lora_alpha: int = arg(32, "the adapter's output is scaled by lora_alpha / lora_r")
    lora_dropout: float = arg(0.0, "dropout of the adapter's inputs in training")
    lora_target_modules: list[str] = arg(["all-linear"], "names of the modules that get an adapter")
    model_adapter_name: str | None = arg(None, "train the adapter in this folder of model_name_or_path")
    load_in_4bit: bool = arg(False, "keep the frozen weights in 4 bits (NF4 with double quantization)")
    dataset_name: str | None = arg(None, "a Hub name, a directory, or a jsonl, json, csv, tsv, parquet file")
    dataset_config: str | None = arg(None, "configuration of the dataset on the Hub")
    dataset_train_split: str | None = arg(None, "split to train on [train, or train_prefs]")
    dataset_test_split: str | None = arg(None, "split to evaluate on [test, validation, ... or held out]")
    dataset_num_proc: int | None = arg(None, "processes that tokenize [1]")
    rename_columns: list[str] = arg([], "old=new names of columns, such as question=prompt")
    max_train_samples: int | None = arg(None, "use only so many rows of the training split [all]")
    max_length: int = arg(1024, "tokens of prompt and completion, or, with an encoder, of the prompt")
    max_completion_length: int | None = arg(None, "tokens of a completion, with an encoder [max_length]")
    truncate_prompt: bool = arg(False, "cut the beginning of long prompts; otherwise their rows are dropped")
    learning_rate: float = arg(1e-6, "peak learning rate of AdamW; the default is ten times this with LoRA")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = arg("linear", "decay after the warm-up")
    # --warmup_ratio is TRL's older name.
    warmup_steps: float = arg(0.1, "linear warm-up; below 1: a share", aliases=["--warmup_ratio"])
    num_train_epochs: float = arg(1.0, "passes over the training pairs")
    max_steps: int = arg(-1, "optimizer steps, if positive, instead of num_train_epochs")
    batch_size: int | None = arg(None, "pairs per optimizer step, over all processes [64]")
    gradient_accumulation_steps: int | None = arg(None, "micro-batches per step, which sets batch_size")
    weight_decay: float = arg(0.0, "weight decay of AdamW, on all parameters")
    adam_beta1: float = arg(0.9, "AdamW's decay of the running mean of gradients")
    adam_beta2: float = arg(0.999, "AdamW's decay of the running mean of squared gradients")
    adam_epsilon: float = arg(1e-8, "AdamW's term that keeps its denominator from 0")
    max_grad_norm: float = arg(1.0, "clip the norm of the whole gradient to this")
    seed: int = arg(42, "seed of data order and sampling")
    per_device_train_batch_size: int = arg(8, "pairs per forward pass of a process, at most")
    per_device_eval_batch_size: int = arg(8, "pairs per forward pass without training, at most")
    generation_batch_size: int = arg(64, "prompts that a process completes at a time, at most")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass, to save memory")
    dtype: Literal["float32", "bfloat16", "float64"] = arg("float32", "of the trained weights")
    torch_compile: bool = arg(False, "compile each layer, which takes minutes at the start")
    varlen_attention: bool = arg(False, "one call of flash attention for all rows; needs a GPU; untested")
    sync_gradients_once: bool = arg(False, "reduce gradients once per step: less traffic, more memory")
    hsdp_shard_size: int | None = arg(None, "shard over so many processes, replicate over the others [all]")
    # Not `bool | None`, for which the parser would not take --bf16 without a value.
    bf16: bool = arg(None, "compute in bfloat16; weights keep their dtype [true on a GPU]")
    eval_strategy: Literal["steps", "no"] = arg("steps", "when to evaluate")
    eval_steps: int | None = arg(None, "steps between evaluations [only before and after training]")
    eval_prompts: int = arg(8, "test prompts that an evaluation completes, greedily and by sampling")
    max_new_tokens: int = arg(128, "tokens of a generated completion, at most")
    output_dir: str | None = arg(None, "results; a disk that all nodes see [output/<model>-<script>-<loss>]")
    logging_steps: int = arg(10, "steps between reports on the console; metrics.jsonl has every step")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = arg("none", "the tracker")
    run_name: str | None = arg(None, "name of the run in the tracker of report_to")
    save_steps: int = arg(500, "steps between checkpoints; the last step also has one")
    save_total_limit: int = arg(2, "checkpoints to keep")
    push_to_hub: bool = arg(False, "upload the trained model to the Hub")
    hub_model_id: str | None = arg(None, "repository that push_to_hub uploads to [the name of output_dir]")
    traceback: bool = arg(False, "show where an error came from, not only its message")
    data_digest: str | None = field(default=None, init=False)  # not a flag: load_data fills it in

    def __post_init__(self):
        for name in [f.name for f in fields(Arguments) if f.name != "max_steps"]:
            value, zero = getattr(self, name), " or 0" if name in MAY_BE_ZERO else ""
            if type(value) in (int, float) and not (0 < value < math.inf or (zero and value == 0)):
                raise ValueError(f"{name} must be positive{zero}, not {value}")
        world, accumulated = int(os.environ.get("WORLD_SIZE", 1)), self.gradient_accumulation_steps
        if accumulated and self.batch_size:
            raise ValueError("batch_size follows from gradient_accumulation_steps: give one of them")
        default = self.per_device_train_batch_size * accumulated * world if accumulated else 64
        self.batch_size = self.batch_size or default
        if self.batch_size % world:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of the {world} processes")
        if world % (self.hsdp_shard_size or 1):
            raise ValueError(f"hsdp_shard_size {self.hsdp_shard_size} does not divide the {world} processes")
        if odd := [pair for pair in self.rename_columns if pair.count("=") != 1]:
            raise ValueError(f"rename_columns takes pairs such as question=prompt, not {odd[0]}")
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout must be below 1, not {self.lora_dropout}")
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("weights in 4 bits cannot be trained: --load_in_4bit needs --use_peft")
        needed = ["peft"] * self.use_peft + ["bitsandbytes"] * self.load_in_4bit + [self.report_to]
        if missing := [x for x in needed if x != "none" and importlib.util.find_spec(x) is None]:
            raise ValueError(f"packages are missing: pip install {' '.join(missing)}")


# The first argument of each group in --help; a method's own arguments come before these groups.
GROUPS = dict(model_name_or_path="model", dataset_name="data", learning_rate="optimization")
GROUPS |= dict(per_device_train_batch_size="memory", eval_strategy="evaluation", output_dir="output")


def help_text(parser: transformers.HfArgumentParser, toy: dict) -> str:
    """What --help prints: the method's own arguments, then the groups of those that all methods have."""
    method, shared = Path(sys.argv[0]).stem, [f.name for f in fields(Arguments)]
    lines = [f"{method}.py --model_name_or_path ... --dataset_name ... [--argument value ...]", "", method]
    actions = parser._actions[1:]  # all but --help
    for action in sorted(actions, key=lambda action: action.dest in shared):
        lines += ["", GROUPS[action.dest]] if action.dest in GROUPS else []
        value = action.default if not isinstance(action.default, list) else " ".join(map(str, action.default))
        text = action.help + (f": {', '.join(action.choices)}" if action.choices else "")
        default = "" if "[" in text or value is None or value is False else f" [{value}]"
        lines.append(f"  --{action.dest:<28} {text}{default}")
    settings = ", ".join(f"{name} {value}" for name, value in toy.items() if "name" not in name)
    lines += ["", f"With neither model nor dataset, the built-in example runs: {settings}", ""]
    return "\n".join(lines)


def parse(kind: type[Arguments], **toy) -> Arguments:
    """The command line's arguments. With neither model nor dataset given, TOY and `toy` are the defaults."""
    parser = transformers.HfArgumentParser(kind, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; --help lists all arguments")
    parser.format_help = partial(help_text, parser, TOY | toy)
    given, unknown = parser.parse_known_args()
    if unknown:
        near = difflib.get_close_matches(unknown[0], [f"--{f.name}" for f in fields(kind) if f.init], 2, 0.7)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all"
        fail(f"unknown argument {unknown[0]}; {hint}")
    if bool(given.model_name_or_path) != bool(given.dataset_name):
        fail("--model_name_or_path and --dataset_name go together (with neither, the built-in example runs)")
    if not given.model_name_or_path:
        parser.set_defaults(**TOY | toy | ({"batch_size": None} if given.gradient_accumulation_steps else {}))
    is_adapter = bool(given.model_name_or_path and adapter_base(policy_path(given), given))
    parser.set_defaults(use_peft=is_adapter)
    with one_line("wrong arguments"):
        (args,) = parser.parse_args_into_dataclasses()
    args.use_peft |= is_adapter  # also with --use_peft false
    words = [word.replace("-", "_") for word in sys.argv]  # the parser also takes --learning-rate
    if args.use_peft and not any(word.startswith("__learning_rate") for word in words):
        # Ten times would be too much for the example's model, of which the adapter is a fifth.
        args.learning_rate *= 10 if given.model_name_or_path else 3
    if getattr(args, "ref_adapter_name", None) and not is_adapter:
        fail(f"--ref_adapter_name is for adapters, and {policy_path(args)} is none; see --model_adapter_name")
    lora_flags = [word[2:] for word in words if word.startswith("__lora_")]
    if lora_flags and (is_adapter or not args.use_peft):
        fail(f"--{lora_flags[0]} is for a new adapter: it needs --use_peft, and a model that is no adapter")
    name = Path(given.model_name_or_path or "toy").resolve().name
    losses = getattr(args, "loss_type", "sigmoid")  # SimPO is a loss type, and gets a directory of its own
    losses = {losses} if isinstance(losses, str) else {*losses}
    parts = [name, Path(sys.argv[0]).stem, *sorted(losses - {"sigmoid"})]
    args.output_dir = args.output_dir or f"output/{'-'.join(parts)}"
    return args
