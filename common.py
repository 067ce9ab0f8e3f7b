"""What the scripts share: arguments, processes, models, data, log-probabilities, sampling, log, checkpoints.

The scripts themselves have the losses, how log-probabilities are reduced to them, and the training loop.
"""

import difflib
import fcntl
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Literal, NamedTuple, NoReturn, TextIO

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dsd
import torch.nn.functional as F
import transformers
from datasets.fingerprint import Hasher
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# The built-in example: a model and pairs like any other.
TOY_MODEL, TOY_DATA = (str(Path(__file__).parent / "tests" / "toy" / name) for name in ("sft", "pairs"))

# -------------------------------------------------------------------------------------------------- arguments


def arg(default, help: str):
    """A dataclass field with a help text; a list as its default is copied."""
    default = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**default, metadata={"help": help})


@dataclass
class Arguments:
    """What all methods take. Names are TRL's where TRL has the flag; batch sizes count pairs."""

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
        None,
        "where results go, on a disk that all nodes see; the same command goes on there [output/<script>]",
    )
    overwrite_output_dir: bool = arg(False, "start anew: delete the earlier run in output_dir")
    learning_rate: float = arg(1e-6, "peak learning rate of AdamW")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = arg("linear", "its decay after the warm-up")
    warmup_steps: float = arg(0.1, "steps of linear warm-up; below 1: a share of all steps")
    num_train_epochs: float = arg(1.0, "passes over the training pairs")
    max_steps: int = arg(-1, "if positive, optimizer steps, in place of num_train_epochs")
    batch_size: int | None = arg(None, "pairs per optimizer step, over all processes [64]")
    gradient_accumulation_steps: int | None = arg(None, "sets batch_size to this x per device x processes")
    per_device_train_batch_size: int = arg(8, "at most so many pairs per forward pass")
    per_device_eval_batch_size: int = arg(8, "the same in evaluation, and prompts per call of generate()")
    weight_decay: float = arg(0.0, "AdamW's, on all parameters")
    adam_beta1: float = arg(0.9, "AdamW's")
    adam_beta2: float = arg(0.999, "AdamW's")
    adam_epsilon: float = arg(1e-8, "AdamW's")
    max_grad_norm: float = arg(1.0, "the norm of the whole gradient is clipped to this")
    bf16: bool | None = arg(None, "compute in bfloat16; weights keep their dtype [true on a GPU]")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass, to save memory")
    eval_strategy: Literal["steps", "no"] = arg("steps", "no: never evaluate")
    eval_steps: int | None = arg(None, "steps between evaluations, besides those before and after training")
    eval_prompts: int = arg(8, "test prompts that an evaluation completes, greedily and by sampling")
    max_new_tokens: int = arg(128, "tokens of a generated completion, at most")
    logging_steps: int = arg(10, "steps between reports of metrics; metrics.jsonl has every step")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = arg("none", "where to report them, too")
    run_name: str | None = arg(None, "name of the run there")
    save_steps: int = arg(500, "steps between checkpoints; the last step has one, too")
    save_total_limit: int = arg(2, "checkpoints to keep")
    seed: int = arg(42, "of data order and sampling")
    push_to_hub: bool = arg(False, "upload the trained model")
    hub_model_id: str | None = arg(None, "to this repository [the name of output_dir]")
    traceback: bool = arg(False, "show where an error came from, not only its message")
    data_digest: str | None = field(default=None, init=False)  # no flag: load_pairs fills it in


def fail(message: str, *, alone: bool = False) -> NoReturn:
    """End the program with one line from the first process of a machine, or, `alone`, from this one."""
    if "--traceback" in sys.argv:
        raise RuntimeError(message)
    raise SystemExit(f"error: {message}" if alone or os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def parse(kind: type[Arguments], check: Callable[[Arguments], None], toy: dict) -> Arguments:
    """The command line's arguments, checked; with neither model nor dataset, `toy` are the defaults."""
    parser = transformers.HfArgumentParser(kind, allow_abbrev=False)
    parser.error = fail
    flags = [w[2:].split("=")[0].replace("-", "_") for w in sys.argv[1:] if w.startswith("--")]
    if twice := [flag for flag in flags if flags.count(flag) > 1]:
        fail(f"--{twice[0]} is given twice")
    if not {*flags} & {"model_name_or_path", "dataset_name"}:
        if "gradient_accumulation_steps" in flags:
            toy = toy | {"batch_size": None}
        parser.set_defaults(model_name_or_path=TOY_MODEL, dataset_name=TOY_DATA, **toy)
    args, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        near = difflib.get_close_matches(unknown[0], [f"--{f.name}" for f in fields(kind)], 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all"
        fail(f"unknown argument {unknown[0]}; {hint}")
    if not (args.model_name_or_path and args.dataset_name):
        fail("--model_name_or_path and --dataset_name go together (with neither, the built-in example runs)")
    args.output_dir = args.output_dir or f"output/{Path(sys.argv[0]).stem}"
    try:
        check(args)
    except ValueError as error:
        fail(str(error))
    return args


# -------------------------------------------------------------------------------------------------- processes


def start(args: Arguments) -> tuple[int, int, torch.device]:
    """Check the arguments and join the other processes: (rank, world size, device).

    torchrun sets RANK, WORLD_SIZE and so on; plain `python script.py` is a world of one process.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.gradient_accumulation_steps and args.batch_size:
        fail("batch_size follows from gradient_accumulation_steps: give one of them")
    if args.gradient_accumulation_steps:
        args.batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    args.batch_size = args.batch_size or 64
    for name in POSITIVE:
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            fail(f"{name} must be positive, not {value}")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(args, name) < (1 if "beta" in name else math.inf):
            fail(f"{name} must not be negative{', and below 1' * ('beta' in name)}: {getattr(args, name)}")
    if args.batch_size % world:
        near = max(1, round(args.batch_size / world)) * world
        fail(f"batch_size {args.batch_size} cannot be split over {world} processes; {near} can")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        fail(f"--report_to {args.report_to} needs a package: pip install {args.report_to}")

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if args.bf16 and args.dtype == "float64":
        fail("bf16 computes in bfloat16: with --dtype float64 it has to be false")
    args.bf16 = device.type == "cuda" and args.dtype != "float64" if args.bf16 is None else args.bf16
    check_output_dir(args)
    if args.push_to_hub:
        check_hub()
    # Others wait while the first process tokenizes: for longer than the default of some minutes.
    timeout = timedelta(hours=2)
    store = next(dist.rendezvous("env://", timeout=timeout))[0] if "RANK" in os.environ else dist.HashStore()
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        # torchrun starts processes again with the store that has the addresses of those before. (On several
        # nodes it counts restarts apart: there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store.)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    rank = int(os.environ.get("RANK", 0))
    # Tensors on GPUs go by nccl, Python objects by gloo.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    transformers.utils.logging.disable_progress_bar()
    if rank > 0:
        datasets.disable_progress_bars()
    return rank, world, device


def check_hub() -> None:
    """Fail now, not after training, if nothing could be uploaded."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network
        fail(f"--push_to_hub: {first_line(error)}")


POSITIVE = """batch_size per_device_train_batch_size per_device_eval_batch_size num_train_epochs learning_rate
    max_grad_norm max_length max_new_tokens logging_steps eval_steps save_steps save_total_limit
    dataset_num_proc""".split()
NOT_NEGATIVE = "warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon eval_prompts seed".split()


def leave(message: str) -> NoReturn:
    """End the program, on all processes at the same point, as one that was told to terminate."""
    say(message)
    dist.destroy_process_group()
    raise SystemExit(128 + signal.SIGTERM)


def seed(*numbers: int) -> None:
    """Random numbers from here on are a function of these numbers, such as seed, step and rank."""
    torch.manual_seed(hash(numbers))


def learning_rate(step: int, steps: int, args: Arguments) -> float:
    """The learning rate of a step, 0 <= step < steps."""
    warmup = args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * steps
    done = max(0.0, step - warmup) / max(1.0, steps - warmup)
    decay = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return args.learning_rate * min(1.0, (step + 1) / max(1.0, warmup)) * decay[args.lr_scheduler_type]


# ----------------------------------------------------------------------------------------------------- models


def from_pretrained(kind, path: str, args: Arguments, **options):
    """kind.from_pretrained, which fails in one line."""
    revision = args.model_revision if path == args.model_name_or_path else "main"
    options |= {"revision": revision, "trust_remote_code": args.trust_remote_code}
    if "dtype" in options and not args.trust_remote_code:  # a model: the other format is a pickle
        options["use_safetensors"] = True
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        fail(f"cannot load {path}: {first_line(error)}")


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def load_tokenizer(args: Arguments):
    """The tokenizer of the policy, if that is a model these scripts can train."""
    path, kinds = args.model_name_or_path, (transformers.AutoTokenizer, AutoConfig)
    tokenizer, config = (from_pretrained(kind, path, args) for kind in kinds)
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or args.trust_remote_code
    if config.is_encoder_decoder or not known or getattr(config, "vision_config", None):
        fail(f"{path} is of type {config.model_type}, not a language model with a decoder alone")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no EOS token to end completions with: set its eos_token")
    if len(tokenizer) > config.get_text_config().vocab_size:
        sizes = f"{len(tokenizer)} tokens, but the model embeds {config.get_text_config().vocab_size}"
        fail(f"the tokenizer of {path} has {sizes}: resize_token_embeddings, or take out what was added")
    return tokenizer


def load_model(path: str, args: Arguments, device: torch.device, *, trainable: bool, compact: bool = False):
    """A causal language model, sharded over all processes, with the method `score` of this file.

    Dropout is off: policy and reference agree exactly before the first step. `compact` keeps the weights in
    the dtype of the computation, which loses nothing while they do not change.
    """
    config = from_pretrained(AutoConfig, path, args).to_dict()
    dropout = {name: value for name, value in config.items() if "drop" in name and isinstance(value, float)}
    options = {"dtype": getattr(torch, args.dtype)} | dict.fromkeys(dropout, 0.0)
    model = from_pretrained(AutoModelForCausalLM, path, args, **options)
    model.dropout_before = dropout  # what to save
    model.train(trainable).requires_grad_(trainable)
    enable_packing(model)
    if trainable and args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compact and args.bf16:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)

    # The policy's embedding and head stay gathered until its backward pass; a reference has no such pass.
    model = shard(model, args, device, reshard_after_forward=not trainable)
    model.score = MethodType(score, model)
    register_fsdp_forward_method(model, "score")
    return model


def shard(model, args: Arguments, device: torch.device, *, reshard_after_forward: bool):
    """Spread a model over all processes. A layer is gathered while it computes, the rest for a whole pass."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    # What a layer gets keeps its dtype, as it does in generate(), when FSDP's hooks are out (`gathered`).
    options = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if args.bf16 else {}
    precision = MixedPrecisionPolicy(**options, cast_forward_inputs=False)
    for layer in [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward)


def adamw(model, args: Arguments) -> torch.optim.AdamW:
    betas = (args.adam_beta1, args.adam_beta2)
    options = {"betas": betas, "eps": args.adam_epsilon, "weight_decay": args.weight_decay}
    return torch.optim.AdamW(model.parameters(), lr=args.learning_rate, fused=True, **options)


def clip_grad_norm(model, max_norm: float) -> float:
    """The norm of the whole gradient, over all processes, which is clipped to `max_norm`."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).full_tensor().item()


def balancing_loss(model):
    """The load-balancing loss of a mixture of experts, a function of router logits, if its config has it."""
    if not getattr(model.config, "output_router_logits", False):
        return None
    loss = sys.modules[type(model).__module__].load_balancing_loss_func
    return partial(loss, num_experts=model.num_experts, top_k=model.num_experts_per_tok)


# ------------------------------------------------------------------------------------------------------- data


class Pairs(NamedTuple):
    """Preference pairs: token ids `prompt`, `chosen`, `rejected`, and `answer` if the dataset has it."""

    rows: datasets.Dataset
    lengths: np.ndarray  # (n, 3) tokens of prompt, chosen, rejected
    score_prompts: bool = False  # whether batches have the tokens of prompts among their labels
    reference_logps: np.ndarray | None = None  # (n, 2) of chosen and rejected, if computed before training


def load_pairs(args: Arguments, tokenizer, **options) -> tuple[Pairs, Pairs | None]:
    """Training and test pairs; None for the latter if there is no such split or eval_strategy is "no".

    Columns are `prompt` (if none, it is what the completions share), `chosen`, `rejected`, each a text or a
    list of messages for the chat template, and optionally `answer`, a text to compare the policy's own
    completions with. The options are those of tokenize_pairs.
    """
    path = Path(args.dataset_name)
    kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if kind and not path.is_file():
        fail(f"there is no file {path}")
    try:
        if kind:
            # Of these columns all are texts, also 007 and null.
            texts = dict.fromkeys(("prompt", "chosen", "rejected", "answer"), str)
            reading = {"converters": texts, "keep_default_na": False} if kind == "csv" else {}
            splits = datasets.load_dataset(kind, data_files=glob.escape(str(path)), **reading)
        else:
            splits = datasets.load_dataset(args.dataset_name, args.dataset_config)
    except Exception as error:  # of many types: missing, malformed, no network
        cause = error.__cause__ or error
        line = malformed_line(path) if path.suffix == ".jsonl" else None
        where = f"{args.dataset_name}, line {line}" if line else args.dataset_name
        fail(f"cannot load the dataset {where}: {type(cause).__name__} {first_line(cause)}")
    if args.dataset_train_split not in splits:
        fail(f"{args.dataset_name} has no split '{args.dataset_train_split}'; it has {', '.join(splits)}")
    train = tokenize_pairs(splits[args.dataset_train_split], "training", args, tokenizer, **options)
    test = None
    if args.eval_strategy != "no" and args.dataset_test_split in splits:
        test = tokenize_pairs(splits[args.dataset_test_split], "test", args, tokenizer, **options)
    elif args.eval_strategy != "no":
        say(f"no evaluation: there is no split '{args.dataset_test_split}', only {', '.join(splits)}")
    lengths = np.concatenate([pairs.lengths for pairs in (train, test) if pairs])
    args.data_digest = hashlib.sha256(lengths.tobytes()).hexdigest()[:12]  # a run goes on with no other data
    return train, test


def malformed_line(path: Path) -> int | None:
    """The number of the first line that is not JSON, or not Unicode."""
    for number, line in enumerate(path.read_text(errors="replace").split("\n"), 1):
        try:
            json.dumps(json.loads(line or "0"), ensure_ascii=False).encode()
        except ValueError:
            return number


def tokenize_pairs(
    raw, name: str, args: Arguments, tokenizer, *, tokenize=None, score_prompts=False
) -> Pairs:
    """Rows as token ids, by tokenize_pair or `tokenize`, less those that cannot be used; says why."""
    tokenize, found = tokenize or tokenize_pair, raw.column_names
    if not {"chosen", "rejected"} <= {*found} and (tokenize is tokenize_pair or "prompt" not in found):
        fail(f"the {name} data lack columns chosen and rejected (XPO: or prompt); found {', '.join(found)}")
    if not len(raw):
        fail(f"the {name} data are empty")
    for column in [column for column in ("prompt", "chosen", "rejected") if column in found]:
        first = raw[0][column]
        messages = first if isinstance(first, list) else []
        if not isinstance(first, str | list | None) or not all("role" in message for message in messages):
            kind = f"lists of {type(first[0]).__name__}s" if messages else f"{type(first).__name__}s"
            fail(
                f"column {column} of the {name} data has {kind}, not texts or messages with role and content"
            )
        if messages and not tokenizer.chat_template:
            fail("the data are conversations, but the tokenizer has no chat template")
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first_here:  # wait for the first process of this machine, then find its work in the cache
        dist.barrier()
    options = {"tokenizer": tokenizer, "max_length": args.max_length}
    value = datasets.Value
    kinds = {list: datasets.List(value("int32")), str: value("string"), bool: value("bool")}
    features = {key: kinds[type(value)] for key, value in tokenize(raw[0], **options).items()}
    features |= {"answer": raw.features["answer"]} if "answer" in found else {}
    columns, processes = [column for column in found if column != "answer"], args.dataset_num_proc
    # Not the default fingerprint, to which a function is the same as long as its name is. (XPO's prompts
    # have to leave room for max_new_tokens.)
    module = sys.modules[getattr(tokenize, "func", tokenize).__module__]  # of a partial, its function's
    files = [Path(getattr(m, "__file__", __file__)) for m in (sys.modules[__name__], module)]
    code = [file.read_text() for file in files if file.is_file()]  # a notebook has none, a pipe no real one
    fingerprint = Hasher.hash([raw._fingerprint, code, tokenizer, args.max_length, args.max_new_tokens])
    how = {"remove_columns": columns, "features": datasets.Features(features), "num_proc": processes}
    rows = raw.map(tokenize, fn_kwargs=options, new_fingerprint=fingerprint, **how)
    if first_here:
        dist.barrier()

    problems = rows.data.column("problem")
    for problem in problems.filter(pc.not_equal(problems, "")).value_counts().to_pylist():
        say(f"{problem['counts']} of {len(raw)} {name} rows dropped: {problem['values']}")
    if moved := pc.sum(rows.data.column("moved")).as_py():
        say(f"in {moved} {name} rows a token spans prompt and completion: it counts as completion")
    kept = np.flatnonzero(pc.equal(problems, ""))
    if not len(kept):
        fail(f"no {name} rows are left")
    parts = ("prompt", "chosen", "rejected")
    lengths = np.stack([pc.list_value_length(rows.data[part]).to_numpy() for part in parts], axis=1)[kept]
    rows = rows.select(kept).remove_columns(["problem", "moved"])
    say(f"{len(rows)} {name} rows; tokens of prompt, chosen, rejected on average: {lengths.mean(0).round()}")
    if name == "training":
        texts = {part: tokenizer.decode(rows[0][part]) for part in parts if rows[0][part]}
        say("the first: " + " ".join(f"{part}【{text}】" for part, text in texts.items()))
    return Pairs(rows, lengths, score_prompts)


def tokenize_pair(row: dict, tokenizer, max_length: int) -> dict:
    """Token ids `prompt`, `chosen`, `rejected` of one pair, or the `problem` that forbids to train on it."""
    result = {"prompt": [], "chosen": [], "rejected": [], "problem": "", "moved": False}
    if not row["chosen"] or not row["rejected"]:
        return result | {"problem": "a completion is empty"}
    prompt, chosen, rejected = split_prompt(row.get("prompt"), row["chosen"], row["rejected"])
    if is_empty(chosen) or is_empty(rejected):
        return result | {"problem": "a completion is empty"}
    if prompt == []:
        return result | {"problem": "the conversations share no message"}
    roles = [[message.get("role") for message in y] for y in (chosen, rejected) if isinstance(y, list)]
    if not all("assistant" in turns for turns in roles):
        return result | {"problem": "a completion has no message of the assistant"}

    # Tokens may span the boundary or depend on what follows: the prompt is what all three have in common.
    try:
        alone = encode(tokenizer, prompt)
        chosen, rejected = encode(tokenizer, prompt, chosen), encode(tokenizer, prompt, rejected)
    except Exception as error:  # whatever a template does with what it was not written for
        return result | {"problem": f"the chat template refuses it: {first_line(error)}"}
    shared = min(shared_length(alone, chosen), shared_length(alone, rejected))
    prompt, chosen, rejected = alone[:shared], chosen[shared:], rejected[shared:]
    if not prompt:  # the first token of a completion has to be predicted from something
        if tokenizer.bos_token_id is None:
            return result | {"problem": "the prompt is empty, and there is no BOS token to stand for it"}
        prompt = [tokenizer.bos_token_id]
    room = max(0, max_length - len(prompt))
    chosen, rejected = chosen[:room], rejected[:room]
    if not room:
        return result | {"problem": f"the prompt leaves no room within max_length {max_length}"}
    if not chosen or not rejected:
        return result | {"problem": "a completion is empty"}
    if chosen == rejected:
        return result | {"problem": "the completions are identical"}
    return result | {"prompt": prompt, "chosen": chosen, "rejected": rejected, "moved": shared < len(alone)}


def split_prompt(prompt, chosen, rejected) -> tuple:
    """(prompt, chosen, rejected), all texts or all messages; a prompt of None is what the others share."""
    if isinstance(prompt, list) and isinstance(chosen, str):
        chosen, rejected = ([{"role": "assistant", "content": y}] for y in (chosen, rejected))
    if isinstance(prompt, str) and isinstance(chosen, list):  # unless the answers have it, too
        prompt = [{"role": "user", "content": prompt}] if chosen[0].get("role") == "assistant" else None
    return extract_prompt(chosen, rejected) if prompt is None else (prompt, chosen, rejected)


def is_empty(completion: str | list[dict]) -> bool:
    if isinstance(completion, str):
        return not completion
    return not any(message.get("content") or message.get("tool_calls") for message in completion)


def extract_prompt(chosen, rejected) -> tuple:
    """(prompt, chosen, rejected) of completions with the prompt in them: the words or messages they share."""
    is_text = isinstance(chosen, str)
    if is_text:
        chosen, rejected = (re.findall(r"\s*\S+|\s+", text) for text in (chosen, rejected))
    n = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)  # leave something of both
    parts = chosen[:n], chosen[n:], rejected[n:]
    return tuple("".join(part) for part in parts) if is_text else parts


def shared_length(a: list, b: list) -> int:
    """How many elements two lists have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def encode(tokenizer, prompt: str | list[dict], completion: str | list[dict] | None = None) -> list[int]:
    """Token ids of a prompt that waits for its completion, or of prompt, completion and end.

    Of conversations, what the chat template makes. Of texts: one BOS, if the tokenizer adds it or the text
    has it; one EOS after a completion; and a prompt keeps the EOS that it has.
    """
    if isinstance(prompt, list):
        if completion and prompt[-1]["role"] == completion[0]["role"] == "assistant":  # one turn
            content = [turn.get("content") or "" for turn in (prompt[-1], completion[0])]
            prompt, completion = [*prompt[:-1], prompt[-1] | {"content": "".join(content)}], completion[1:]
        messages = [{k: v for k, v in m.items() if v is not None} for m in prompt + (completion or [])]
        goes_on = completion is None and messages[-1]["role"] == "assistant"
        end = {"continue_final_message": goes_on, "add_generation_prompt": completion is None and not goes_on}
        return encode_messages(tokenizer, messages, **end)
    text, bos, eos = prompt + (completion or ""), tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer(text)["input_ids"]
    if ids[:2] == [bos, bos]:  # the tokenizer's and the text's own
        ids = ids[1:]
    while ids[-1:] == [eos] and ids != [bos]:  # OPT's BOS is EOS, too
        ids = ids[:-1]
    ends = completion is not None or (text.endswith(tokenizer.eos_token or "\0") and ids != [bos])
    return [*ids, eos] if ends and eos is not None else ids


MARK = "\ue000"  # a character for private use


def encode_messages(tokenizer, messages: list[dict], **options) -> list[int]:
    """Token ids of a conversation. Text in it that spells a special token stays text: no <|im_end|> in a
    user's message ends that message.
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
    for i, piece in enumerate(re.split(f"({pattern})", rendered)):  # every other one is marked
        options = {"add_special_tokens": False, "split_special_tokens": i % 2 == 1}
        ids += tokenizer(piece.replace(MARK, "") if i % 2 else piece, **options)["input_ids"]
    return ids


def by_length(pairs: Pairs) -> np.ndarray:
    """The row numbers, short pairs first, so that pairs of a micro-batch are alike."""
    return pairs.lengths.sum(1).argsort(kind="stable")


def global_batches(lengths: np.ndarray, args: Arguments) -> np.ndarray:
    """The row numbers of every batch of the run, (steps, batch_size): a function of seed and epoch.

    A batch is a random sample, sorted by length, so that processes and micro-batches get pairs that are
    alike. The pairs of an epoch that do not fill a batch wait for another epoch.
    """
    size, per_epoch = args.batch_size, len(lengths) // args.batch_size
    if not per_epoch:
        fail(f"{len(lengths)} pairs do not fill a batch: --batch_size can be {len(lengths)} at most")
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch - 1e-9)
    epochs = []
    for epoch in range(math.ceil(steps / per_epoch)):
        order = np.random.default_rng((args.seed, epoch)).permutation(len(lengths))
        order = order[: per_epoch * size].reshape(per_epoch, size)
        short_first = lengths.sum(1)[order].argsort(axis=1, kind="stable")
        epochs.append(np.take_along_axis(order, short_first, axis=1))
    return np.concatenate(epochs)[:steps]


# ----------------------------------------------------------------------------------- packed log-probabilities


@dataclass
class Batch:
    """B pairs in one row without padding: prompt, chosen, rejected, next prompt, ...

    A prompt's tokens are there once: both completions attend to them. The last token of a completion is only
    ever a label and not in the row. T tokens in the row, N completion tokens, sequences of at most L tokens.
    """

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T); each completion goes on where its prompt ends
    labels: Tensor  # (N,) the completion tokens: of the first chosen, the first rejected, the next chosen ...
    source: Tensor  # (N,) the place in the row whose hidden state predicts the label
    owner: Tensor  # (N,) whose the label is: 2i of the chosen, 2i + 1 of the rejected completion of pair i
    index: Tensor  # (N,) the label's index in its completion
    owners: int  # 2B; 3B if prompts are scored, too: their tokens come last, 2B + i owns those of pair i
    sequences: Tensor  # (2B, L) places in the row of each prompt and completion; the last fills it up
    home: Tensor  # (T,) and back: where in the flattened sequences a token of the row is
    lengths: Tensor  # (B, 2) tokens of chosen and rejected
    step_pairs: int  # pairs in the whole global batch, of which this is a part
    step_tokens: tuple[int, int, int] | None = None  # tokens there, of all prompts, chosen and rejected
    rows: np.ndarray | None = None  # (B,) row numbers of the pairs
    reference_logps: Tensor | None = None  # (B, 2), if computed before training

    def sum(self, token_values: Tensor) -> Tensor:
        """Sums (B, 2) of token values (N,) over each chosen and each rejected completion."""
        return self.sum_by_owner(token_values)[: self.lengths.numel()].view(-1, 2)

    def prompt_sum(self, token_values: Tensor) -> Tensor:
        """Sums (B,) over each prompt, if they are scored."""
        return self.sum_by_owner(token_values)[self.lengths.numel() :]

    def sum_by_owner(self, token_values: Tensor) -> Tensor:
        # Each value to a place of its own: index_add would add them in an order that varies on a GPU.
        rows = token_values.new_zeros(self.owners, self.sequences.shape[1])
        return rows.index_put((self.owner, self.index), token_values).sum(1)


def micro_batches(pairs: Pairs, rows: np.ndarray, size: int, device: torch.device) -> Iterator[Batch]:
    """This process's part of a global batch, `size` pairs at a time; equally many batches on all processes.

    An uneven end leaves some processes with a batch of no pairs: it contributes nothing, but keeps in step.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = rows[rank::world]  # neighbours are of similar length: every process gets some of each
    counts = {"step_pairs": len(rows), "step_tokens": tuple(pairs.lengths[rows].sum(0).tolist())}
    for start in range(0, math.ceil(len(rows) / world), size):
        part = mine[start : start + size]
        columns = pairs.rows[part] if len(part) else {"prompt": [], "chosen": [], "rejected": []}
        tokens = list(zip(columns["prompt"], columns["chosen"], columns["rejected"], strict=True))
        batch = pack(tokens, device, score_prompts=pairs.score_prompts, rows=part, **counts)
        if pairs.reference_logps is not None:
            batch.reference_logps = torch.from_numpy(pairs.reference_logps[part]).to(device)
        yield batch


def pack(pairs: list[tuple], device: torch.device, *, score_prompts: bool = False, **counts) -> Batch:
    """A Batch of pairs (prompt, chosen, rejected) of token ids; `counts` are more of its fields."""
    ids, sequences, source, end = [], [], [], 0  # end: of the row so far
    for prompt, *completions in pairs or [([0], [0], [0])]:  # without pairs, a token for the model to compute
        start, end = end, end + len(prompt)
        ids.append(prompt)
        for completion in completions:
            body = np.arange(end, end + len(completion) - 1)
            end += len(body)
            ids.append(completion[:-1])
            sequences.append(np.concatenate([np.arange(start, start + len(prompt)), body]))
            # The last token of the prompt predicts the first of the completion.
            source.append(sequences[-1][len(prompt) - 1 :])
    longest = max(map(len, sequences))
    home = np.empty(end, dtype=np.int64)
    for i, sequence in enumerate(sequences):
        home[sequence] = i * longest + np.arange(len(sequence))

    labels, source = [y for _, *completions in pairs for y in completions], source[: 2 * len(pairs)]
    lengths = np.array([len(y) for y in labels], dtype=np.int64).reshape(-1, 2)
    if score_prompts:  # all of a prompt but its first token, which nothing predicts
        labels += [prompt[1:] for prompt, *_ in pairs]
        source += [sequences[2 * i][: len(prompt) - 1] for i, (prompt, *_) in enumerate(pairs)]
    counts_of_labels = [len(y) for y in labels]
    arrays = {
        "input_ids": np.concatenate(ids)[None],
        "position_ids": (home % longest)[None],
        "labels": np.concatenate([*labels, []]),
        "source": np.concatenate([*source, []]),
        "owner": np.arange(len(labels)).repeat(counts_of_labels),
        "index": np.concatenate([*map(np.arange, counts_of_labels), []]),
        # Filled up with places of their own: many gradients added to one place would wait for each other.
        "sequences": np.stack([np.pad(s, (0, longest - len(s)), mode="edge") for s in sequences]),
        "home": home,
        "lengths": lengths,
    }
    tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    if device.type == "cuda":  # from pinned memory, so that the host does not wait for the device
        tensors = {name: x.pin_memory().to(device, non_blocking=True) for name, x in tensors.items()}
    return Batch(**tensors, owners=len(labels), **counts)


# What goes through the head at a time, of which the backward pass needs a few: tokens, and logits at most.
CHUNK_TOKENS, CHUNK_LOGITS = 1024, 2**26


class Scores(NamedTuple):
    """What a model says about a Batch."""

    token_logps: Tensor  # (N,) log-probability of each completion token, at least float32
    aux_loss: Tensor | float  # the load-balancing loss of a mixture of experts that has one, else 0
    log_collisions: Tensor | None  # (N,) log Σ_v π(v)² of the same predictions, detached, if asked for


def score(model, batch: Batch, *, collisions: bool = False) -> Scores:
    """model.score(batch): packed, with shared prompts, and no [tokens, vocabulary] tensor kept.

    Log-probabilities equal those of plain_score, the definition, which runs for architectures where they
    would not (enable_packing).
    """
    if not model.packed:
        return plain_score(model, batch, collisions=collisions)
    outputs = model.get_decoder()(
        input_ids=batch.input_ids,
        # Nothing looks at it. Of None, or of two dimensions where there is a window, [T, T] would be made.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
        position_ids=batch.position_ids,
        use_cache=False,
        packed_sequences=batch.sequences,
        packed_home=batch.home,
        **({"output_router_logits": True} if model.balancing_loss else {}),
    )
    hidden = outputs.last_hidden_state[0, batch.source]  # (N, D)

    def chunk_logps(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        return label_logps(model.get_output_embeddings()(hidden), labels, collisions)

    size = max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // model.config.get_text_config().vocab_size))
    chunks = zip(hidden.split(size), batch.labels.split(size), strict=True)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    parts = [checkpoint(chunk_logps, *chunk, **options) for chunk in chunks]
    token_logps, log_collisions = zip(*parts, strict=True)
    aux_loss = model.balancing_loss(outputs.router_logits) if model.balancing_loss else 0.0
    return Scores(torch.cat(token_logps), aux_loss, torch.cat(log_collisions) if collisions else None)


def plain_score(model, batch: Batch, *, collisions: bool = False) -> Scores:
    """The textbook's way: rows padded on the right, the model's own logits, log-softmax, gather."""
    places = batch.sequences
    mask = places.diff(dim=1, prepend=places[:, :1] - 1) > 0  # (2B, L); where a place repeats, it is padding
    row, column = (batch.home[batch.source] // mask.shape[1], batch.home[batch.source] % mask.shape[1])
    needed = torch.zeros_like(mask[0]).index_fill(0, column, True)
    outputs = model.forward(  # not model(...): FSDP has gathered the shards for `score` already
        input_ids=batch.input_ids[0, batch.sequences],
        attention_mask=mask.long(),
        use_cache=False,
        logits_to_keep=needed.nonzero()[:, 0],
    )
    if outputs.logits.shape[1] < len(needed):  # not all models know logits_to_keep
        column = needed.cumsum(0)[column] - 1
    logits = outputs.logits[row, column]  # (N, V)
    token_logps, log_collisions = label_logps(logits, batch.labels, collisions)
    aux_loss = outputs.aux_loss if model.balancing_loss else 0.0
    return Scores(token_logps, aux_loss, log_collisions)


def label_logps(logits: Tensor, labels: Tensor, collisions: bool) -> tuple[Tensor, Tensor | None]:
    """log π(label) (N,) under logits (N, V), and log Σ_v π(v)² if asked for; in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = -F.cross_entropy(logits, labels, reduction="none")
    if not collisions:
        return logps, None
    return logps, ((2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)).detach()


def packed_attention(module, query, key, value, mask, *, packed_sequences=None, packed_home=None, **options):
    """An attention function for transformers: q, k, v (1, heads, T, size) -> (1, T, heads, size).

    Each sequence becomes a causal row of its own, so that a flash kernel runs without a mask, and is packed
    again.
    """
    if packed_sequences is None:  # an ordinary call, such as from generate()
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise NotImplementedError("attention with a softcap or sinks")
    (rows, length), window = packed_sequences.shape, options.get("sliding_window")
    query, key, value = (
        x[0].index_select(1, packed_sequences.flatten()).unflatten(1, (rows, length)).transpose(0, 1)
        for x in (query, key, value)
    )  # (2B, heads, L, size); padding is on the right, where causal attention does not look
    mask = None
    if window and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    out, _ = sdpa_attention_forward(module, query, key, value, mask, **options | {"is_causal": True})
    return out.flatten(0, 1).index_select(0, packed_home)[None], None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)  # ordinary calls get their padding and window masks


@torch.no_grad()
def enable_packing(model) -> None:
    """Switch a model, not yet sharded, to packed attention if its log-probabilities then equal plain_score's.

    Not every architecture honours the attention interface; some do more to a hidden state than apply the
    head.
    """
    draw, vocabulary = np.random.default_rng(0).integers, model.config.get_text_config().vocab_size
    pairs = [[draw(1, min(100, vocabulary), n) for n in lengths] for lengths in ((9, 7, 5), (2, 1, 12))]
    batch = pack(pairs, model.device, step_pairs=2)
    model.balancing_loss = balancing_loss(model)
    want, before = plain_score(model, batch).token_logps, model.config._attn_implementation
    try:
        if getattr(model.config.get_text_config(), "attention_chunk_size", None):
            raise NotImplementedError("attention within chunks")
        model.packed = True
        model.set_attn_implementation("packed")
        difference = (score(model, batch).token_logps - want).abs().max().item()
        tolerance = (5e-3 if model.dtype == torch.bfloat16 else 5e-5) * want.abs().max().item()
        model.packed = difference < tolerance
        reason = f"{difference:.0e} from plain ones"
    except Exception as error:  # whatever a model does that nobody foresaw
        model.packed, reason = False, f"{type(error).__name__}: {first_line(error)}"
    if not model.packed:
        model.set_attn_implementation(before)
    way = "packed" if model.packed else "padded, which takes more time and memory: packed they would be"
    say(f"{type(model).__name__}: log-probabilities are {way} ({reason})")


# --------------------------------------------------------------------------------------------------- sampling


@contextmanager
def gathered(model, args: Arguments) -> Iterator[bool]:
    """Full weights on every process while generating, if they fit: gathered once, not for every token.

    Yields whether they do. If not, all processes must generate the same number of tokens (synced_gpus).
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
            # Without the hooks that gather and shard again, which cost time at every layer of every token.
            part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
        yield bool(fits)
    finally:
        for part, (before, after) in zip(parts, hooks, strict=True):
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


def eos_ids(model, tokenizer) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those of the checkpoint's generation config."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return sorted({*eos, tokenizer.eos_token_id})


@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], args: Arguments, **sampling) -> list[list[int]]:
    """One completion (token ids, ending in EOS unless cut off) per prompt; `sampling` as for generate()."""
    was_training, config = model.training, model.generation_config
    eos = eos_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    # A fresh configuration: the checkpoint's temperature, top-k and so on must not change the distribution.
    sampling |= {"eos_token_id": eos, "pad_token_id": pad, "max_new_tokens": args.max_new_tokens}
    model.generation_config = transformers.GenerationConfig(**sampling)
    completions, size = [], args.per_device_eval_batch_size
    model.eval()  # else gradient checkpointing would switch off the cache of keys and values
    try:
        with gathered(model, args) as full:
            for part in (prompts[start : start + size] for start in range(0, len(prompts), size)):
                longest = max(map(len, part))  # padding is on the left: completions begin in the same column
                ids = [[pad] * (longest - len(p)) + p for p in part]
                mask = [[0] * (longest - len(p)) + [1] * len(p) for p in part]
                ids, mask = (torch.tensor(rows, device=model.device) for rows in (ids, mask))
                out = model.generate(input_ids=ids, attention_mask=mask, synced_gpus=not full)
                completions += out[:, longest:].tolist()
    finally:
        model.train(was_training)
        model.generation_config = config
    ends = [next((i + 1 for i, token in enumerate(y) if token in eos), len(y)) for y in completions]
    return [y[:end] for y, end in zip(completions, ends, strict=True)]


def complete(policy, tokenizer, test: Pairs, args: Arguments, step: int) -> tuple[dict, list[dict]]:
    """Complete held-out prompts, greedily and by sampling; (metrics, samples), the same on every process.

    The metrics are the exact match of both with the dataset's `answer`, where it has one.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    count = min(args.eval_prompts, len(test.rows)) // world * world  # equally many on all processes
    if not count:
        return {}, []
    rows = test.rows[range(rank, count, world)]
    seed(args.seed, step, rank)
    greedy = generate(policy, tokenizer, rows["prompt"], args, do_sample=False)
    sampled = generate(policy, tokenizer, rows["prompt"], args, do_sample=True, temperature=1.0, top_k=0)
    prompts = tokenizer.batch_decode(rows["prompt"], skip_special_tokens=True)
    texts = [prompts, *(decode_answers(tokenizer, rows["prompt"], part) for part in (greedy, sampled))]
    columns = dict(zip(("step", "prompt", "greedy", "sampled"), ([step] * len(greedy), *texts), strict=True))
    columns |= {"answer": rows["answer"]} if "answer" in rows else {}
    mine = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    samples, metrics = gather_rows(mine), {}
    if "answer" in rows:
        for name, kind in (("exact_match", "greedy"), ("exact_match_sampled", "sampled")):
            right = [sample[kind].strip() == str(sample["answer"]).strip() for sample in samples]
            metrics[name] = sum(right) / count
    return metrics, samples


def decode_answers(tokenizer, prompts: list[list[int]], answers: list[list[int]]) -> list[str]:
    """Texts of answers as they follow on their prompts: alone, some would lose a space they begin with."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.batch_decode(prompts, **options)
    whole = tokenizer.batch_decode([x + y for x, y in zip(prompts, answers, strict=True)], **options)
    return [text[len(prompt) :] for prompt, text in zip(before, whole, strict=True)]


def gather_rows(mine: list) -> list:
    """Rows in order, of which each process has every world-th from its rank on, as many as the others."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [row for rows in zip(*parts, strict=True) for row in rows]


# -------------------------------------------------------------------------------------------------------- log


def say(message: str) -> None:
    """Print a line from rank 0, above the progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message)


class Log:
    """Global means of metrics: to metrics.jsonl, one line per step or evaluation, to console and tracker.

    Scripts `add` parts that sum to the mean over the whole global batch, such as a sum over some pairs
    divided by the number of pairs in the step. SIGTERM and SIGINT set `interrupted` after the step they fall
    into.
    """

    def __init__(self, args: Arguments, first_step: int, steps: int, pairs: int, device: torch.device):
        self.args, self.steps, self.pairs, self.device = args, steps, pairs, device
        self.parts: dict[str, Tensor | float] = {}
        self.signals: list[float] = []
        self.interrupted = False
        self.skipped = 0  # steps in a row, for a gradient that was not finite
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        self.main = dist.get_rank() == 0
        self.bar = tqdm(initial=first_step, total=steps, disable=not self.main, dynamic_ncols=True)
        self.track, done = (lambda metrics, step: None), [False]
        if self.main:
            self.metrics, lines = reopen(Path(args.output_dir, "metrics.jsonl"), first_step)
            done = [any(line["step"] == first_step and "learning_rate" not in line for line in lines)]
            # Completions are written before the metrics of an evaluation: without these it was cut short.
            last = first_step if done[0] else first_step - 1
            self.completions, _ = reopen(Path(args.output_dir, "completions.jsonl"), last)
            self.track = tracker(args)
        dist.broadcast_object_list(done)
        self.evaluated = first_step if done[0] else -1
        self.time = time.perf_counter()

    def on_signal(self, number: int, frame) -> None:
        self.signals.append(time.monotonic())
        if self.signals[-1] - self.signals[0] > 5:  # not the same one, sent twice: somebody insists
            raise SystemExit(128 + number)

    def add(self, parts: dict[str, Tensor | float]) -> None:
        for name, value in parts.items():
            value = value.detach().double() if isinstance(value, Tensor) else value
            self.parts[name] = self.parts.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """The sums over all processes of what was added since the last call, in one all-reduce."""
        parts, self.parts = self.parts | {"interrupted": float(len(self.signals))}, {}
        values = [torch.as_tensor(part, dtype=torch.float64, device=self.device) for part in parts.values()]
        values = torch.stack(values)
        dist.all_reduce(values)
        metrics = dict(zip(parts, values.tolist(), strict=True))
        self.interrupted = metrics.pop("interrupted") > 0
        return metrics

    def step(self, step: int, metrics: dict, grad_norm: float, lr: float, pairs: int, tokens: int) -> None:
        """Write the metrics of a step, on so many pairs and tokens in all."""
        seconds, self.time = time.perf_counter() - self.time, time.perf_counter()
        self.skipped = 0 if math.isfinite(grad_norm) else self.skipped + 1
        metrics |= {"grad_norm": grad_norm, "skipped": float(self.skipped > 0), "learning_rate": lr}
        metrics |= {"epoch": (step + 1) * pairs / self.pairs, "pairs_per_second": pairs / seconds}
        metrics |= {"tokens_per_second": float(tokens / seconds), "peak_memory_gib": peak_memory(self.device)}
        self.write(step + 1, metrics)
        shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
        shown = {short: f"{metrics[name]:.3g}" for short, name in shown.items() if name in metrics}
        self.bar.set_postfix(shown | {"pairs/s": f"{pairs / seconds:.1f}"}, refresh=False)
        self.bar.update()
        if (step + 1) % self.args.logging_steps == 0 or step + 1 == self.steps:
            self.report(step + 1, metrics)
        if self.skipped == 3:
            fail(f"the gradient was not finite in three steps up to {step + 1}; the checkpoints are intact")

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps; before a run was interrupted, that may have been done."""
        every = self.args.eval_steps or self.steps
        return step != self.evaluated and (step % every == 0 or step == self.steps)

    def evaluation(self, step: int, metrics: dict[str, float], samples: list[dict]) -> None:
        """Write metrics of the test pairs, and completions, after `step` steps."""
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        if self.main:
            self.completions.writelines(json.dumps(sample) + "\n" for sample in samples)
        self.write(step, metrics)
        self.report(step, metrics)
        for sample in samples[:3]:
            say("    " + "  ".join(f"{name} {value!r}" for name, value in sample.items() if name != "step"))
        self.time = time.perf_counter()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self.main:
            strict = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            try:
                self.metrics.write(json.dumps({"step": step, **strict}, allow_nan=False) + "\n")
            except OSError as error:
                fail(f"cannot write metrics of step {step}: {error}; the checkpoints are intact")

    def report(self, step: int, metrics: dict[str, float]) -> None:
        say(f"step {step}/{self.steps} " + " ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        self.track(metrics, step)

    def close(self) -> None:
        self.bar.close()
        self.track(None, self.steps)


def reopen(path: Path, last: int) -> tuple[TextIO, list[dict]]:
    """A .jsonl file to append to, and its lines, without those after step `last`: these steps run again."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what is after the last \n is torn
    lines = [line for line in map(json.loads, lines) if line["step"] <= last]
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path.open("a", buffering=1), lines


def replace_text(path: Path, text: str) -> None:
    """Write a file in one go: whatever happens, it has its old content or the new."""
    with path.with_suffix(".tmp").open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def peak_memory(device: torch.device) -> float:
    """GiB that this process had at most: of GPU memory, or of RAM if it runs on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def tracker(args: Arguments) -> Callable[[dict[str, float] | None, int], None]:
    """A function of metrics and step that reports to the tracker of --report_to; metrics None closes it."""
    if args.report_to == "none":
        return lambda metrics, step: None
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(Path(args.output_dir, "tensorboard"))
        write, close = lambda m, step: [writer.add_scalar(k, v, step) for k, v in m.items()], writer.close
    else:  # wandb and trackio have the same interface
        tracking = __import__(args.report_to)
        tracking.init(project=Path(args.output_dir).name, name=args.run_name, config=asdict(args))
        write, close = lambda m, step: tracking.log(m, step=step), tracking.finish
    return lambda metrics, step: close() if metrics is None else write(metrics, step)


# ------------------------------------------------------------------------------------------------ checkpoints

# When a run goes on; the second line changes rounding, and so may change what is sampled.
MAY_CHANGE = """output_dir overwrite_output_dir dataset_num_proc logging_steps report_to run_name save_steps
    per_device_train_batch_size per_device_eval_batch_size gradient_checkpointing
    save_total_limit push_to_hub hub_model_id traceback""".split()


def write_run(args: Arguments, finished: bool) -> None:
    """run.json: what runs in output_dir, and whether it is done."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    content = {"script": Path(sys.argv[0]).name, "arguments": asdict(args), "finished": finished} | versions
    replace_text(Path(args.output_dir, "run.json"), json.dumps(content, indent=2))


# What overwrite_output_dir deletes; run.json last, for while it is there nobody takes the rest for their own.
WRITTEN = """checkpoints metrics.jsonl completions.jsonl reference_logps_* tensorboard model*.safetensors
    model.safetensors.index.json run.json""".split()


def check_output_dir(args: Arguments) -> None:
    """An output_dir holds one run: the same command goes on with it, another is refused."""
    folder = Path(args.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        fail(f"cannot write to --output_dir {args.output_dir}")
    for name, path in asdict(args).items():
        if name.endswith("_path") and path and Path(path).resolve() == folder.resolve():
            fail(f"--output_dir is where --{name} is: it would be overwritten")
    if args.overwrite_output_dir or not (folder / "run.json").exists():
        return
    if changes := changes_since(args):
        fail(changes)
    if json.loads((folder / "run.json").read_text())["finished"]:
        say(f"finished already, in {args.output_dir}; --overwrite_output_dir starts anew")
        raise SystemExit(0)


def changes_since(args: Arguments) -> str:
    """What differs from the run in output_dir, in the command or the data, and what to do; "" if nothing."""
    run = json.loads(Path(args.output_dir, "run.json").read_text())
    new, old = {"script": Path(sys.argv[0]).name} | asdict(args), {"script": run["script"]} | run["arguments"]
    if args.data_digest is None:  # they are not loaded yet
        new.pop("data_digest")
    differ = [name for name in new if name not in MAY_CHANGE and old.get(name) != new[name]]
    changes = ", ".join(f"{name} {old.get(name)} (now {new[name]})" for name in differ)
    where = f"another run is in {args.output_dir}: {changes}; change --output_dir or --overwrite_output_dir"
    return where if changes else ""


LOCKED = set()  # directories: a notebook may start a run again in the same process


def lock(output_dir: str) -> bool:
    """Whether no other process has the lock of output_dir. It ends with the process, however that ends."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    try:
        if output_dir not in LOCKED:
            fcntl.flock(os.open(output_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    LOCKED.add(output_dir)
    return True


def complete_checkpoints(args: Arguments) -> list[Path]:
    """Directories of checkpoints, oldest first; digests.json is written last, so that a torn one has none."""
    return sorted(path.parent for path in Path(args.output_dir, "checkpoints").glob("*/digests.json"))


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of all files of a checkpoint, by name; every process computes a part of them."""
    mine, parts = {}, [None] * dist.get_world_size()
    names = [sorted(path.name for path in folder.iterdir() if path.name != "digests.json")]
    dist.broadcast_object_list(names)  # of a disk on a network, processes may see lists of different age
    for name in names[0][dist.get_rank() :: len(parts)]:
        with (folder / name).open("rb") as file:
            mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
    dist.all_gather_object(parts, mine)
    return {name: digest for part in parts for name, digest in part.items()}


def training_state(policy, optimizer, step: int, extra: dict) -> dict:
    model, optim = dsd.get_state_dict(policy, optimizer)
    return {"model": model, "optimizer": optim, "step": step, "processes": dist.get_world_size(), **extra}


def save_checkpoint(args: Arguments, policy, optimizer, step: int, extra: dict[str, Tensor]) -> None:
    """The state after `step` steps. `extra` is a method's own: tensors, or dicts of them."""
    folder = Path(args.output_dir, "checkpoints", f"{step:08d}")
    try:
        dcp.save(training_state(policy, optimizer, step, extra), checkpoint_id=folder)
        found = digests(folder)
        if dist.get_rank() == 0:
            replace_text(folder / "digests.json", json.dumps(found))
            for old in complete_checkpoints(args)[: -args.save_total_limit]:
                (old / "digests.json").unlink()  # first, so that a half-deleted one does not look complete
                shutil.rmtree(old)
        dist.barrier()  # nobody leaves before it is complete
    except (OSError, CheckpointException) as error:
        causes = error.failures.values() if isinstance(error, CheckpointException) else [(error,)]
        reason = first_line(next(iter(causes))[0])
        free = shutil.disk_usage(args.output_dir).free // 2**20
        reason += f" ({free} MiB are free)"
        alone = isinstance(error, OSError)  # the other kind of error all processes have
        fail(f"cannot save a checkpoint after step {step}: {reason}; earlier ones are intact", alone=alone)


def resume(args: Arguments, policy, optimizer, extra: dict[str, Tensor]) -> int:
    """Load the newest checkpoint in place; the number of steps that it has behind it, 0 if there is none."""
    found = [f"another run is running in {args.output_dir}"]  # a reason not to go on, or checkpoints
    if dist.get_rank() == 0 and lock(args.output_dir):
        there = Path(args.output_dir, "run.json").exists()
        changes = changes_since(args) if there else ""
        # Started again by torchrun, a run has deleted the earlier one already.
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and there and not changes
        if args.overwrite_output_dir and not again:
            for path in [p for name in WRITTEN for p in Path(args.output_dir).glob(name)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            changes = ""
        found = [changes or complete_checkpoints(args)]
        if not changes:
            for path in Path(args.output_dir, "checkpoints").glob("*"):
                if path.is_dir() and path not in found[0]:
                    shutil.rmtree(path)  # torn: the run was killed while it saved
            write_run(args, finished=False)
    dist.broadcast_object_list(found)  # one decision for all
    if isinstance(found[0], str):
        fail(found[0])
    for folder in reversed(found[0]):
        saved, now = json.loads((folder / "digests.json").read_text()), digests(folder)
        damaged = [name for name in saved if saved[name] != now.get(name)]
        if not damaged:
            break
        say(f"the checkpoint {folder} is damaged, in {', '.join(damaged)}: not used")
        if dist.get_rank() == 0:  # all have read them: digests() waits for all
            (folder / "digests.json").unlink()
    else:
        return 0
    state = training_state(policy, optimizer, 0, extra)
    dcp.load(state, checkpoint_id=folder)
    model, optim = state["model"], state["optimizer"]
    dsd.set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    say(f"going on after step {state['step']}, from {folder}")
    if state["processes"] != dist.get_world_size():
        processes = f"{state['processes']} processes, not {dist.get_world_size()}"
        say(f"it had {processes}: rounding will differ, and what is sampled")
    return state["step"]


def save_model(args: Arguments, policy, tokenizer) -> None:
    """Save model and tokenizer for from_pretrained(output_dir), and to the Hub if asked for."""
    # The whole model comes together on rank 0 alone, on its CPU.
    whole = dsd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dsd.get_model_state_dict(policy, options=whole)
    if dist.get_rank() == 0:
        # Tied weights are saved under one name.
        weights = {name: w for name, w in weights.items() if name not in policy.all_tied_weights_keys}
        policy.config.update(policy.dropout_before)
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
