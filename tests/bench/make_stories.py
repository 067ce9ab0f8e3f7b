"""Make preference pairs from texts: how a text goes on is chosen, how a model goes on is rejected.

    python tests/bench/make_stories.py MODEL TEXTS OUT
    python dpo.py --model_name_or_path MODEL --dataset_name OUT --output_dir ...

MODEL is a directory or a Hub name. TEXTS is a .jsonl file with a column `text`, or a text file with a text on
each line, or with a line <|endoftext|> between texts, as the files of TinyStories are. OUT is a directory and
gets train.jsonl and test.jsonl, with the columns prompt, chosen and rejected.

A text makes one pair. Its first sentences are the prompt and the next ones are chosen. A sample of the model,
cut after as many sentences, is rejected. Of texts with the same prompt the first one is used, so that no
prompt is in both files. Sentences end as in English. The same seed and batch size give the same files.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub
import pyarrow.json
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import decode_answers, encode, eos_ids, fail, one_line  # noqa: E402

OPTIONS = {  # default and help
    "pairs": (2000, "pairs in both files together"),
    "test_share": (0.1, "share of the pairs that go to test.jsonl"),
    "prompt_sentences": (2, "sentences of a prompt"),
    "completion_sentences": (2, "sentences of a completion"),
    "temperature": (1.0, "of sampling"),
    "max_new_tokens": (100, "of a sample, before it is cut to whole sentences"),
    "batch_size": (64, "prompts that are continued at once"),
    "seed": (0, "of the choice of texts and of the samples"),
}
# A full stop before a capital, a quotation mark or the end: "Stop!" said Mr. Lee. is one sentence.
END = re.compile(r"""\w["'”’)]*(?<!\bMr|\bMs|\bDr)(?<!\bMrs)[.!?]+["'”’)]*(?=\s+[^a-z\s]|\s*$)""")


def main(args) -> None:
    numbers = [getattr(args, name) for name in OPTIONS if name != "seed"]
    if min(numbers) <= 0 or args.pairs < 2 or args.test_share >= 1:
        fail("numbers have to be more than 0, --pairs more than 1, --test_share less than 1")
    if (args.OUT / "train.jsonl").exists():
        fail(f"{args.OUT} has a train.jsonl already")
    texts, left_out = read_texts(args.TEXTS), Counter()  # the latter by reason
    starts = cut_texts(texts, args, left_out)
    if len(starts) < 2:
        fail(f"{args.TEXTS}: {len(starts)} of {len(texts)} texts have enough sentences and their own prompt")
    model, tokenizer = load(args)
    with one_line(f"cannot write to {args.OUT}"):
        args.OUT.mkdir(parents=True, exist_ok=True)
    # Where no text has a line break, one in a sample would give it away, and becomes a space.
    flat = not any("\n" in text for text in texts)
    pairs = make_pairs(model, tokenizer, starts, flat, args, left_out)
    if len(pairs) < 2:
        fail(f"{args.TEXTS}: {len(pairs)} of {len(texts)} texts have a sample that can be used")

    left_out["not needed"] = len(texts) - len(pairs) - left_out.total()
    tests = min(max(round(len(pairs) * args.test_share), 1), len(pairs) - 1)
    for name, part in (("test", pairs[:tests]), ("train", pairs[tests:])):
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in part]
        (args.OUT / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count) or "none"
    counts = f"{len(pairs) - tests:,} pairs in train.jsonl, {tests:,} in test.jsonl"
    print(f"{args.OUT}: {counts}; texts left out: {reasons}")


def read_texts(path: Path) -> list[str]:
    with one_line(f"cannot read {path}"):
        if path.suffix == ".jsonl":
            texts = pyarrow.json.read_json(path).column("text").cast("string").to_pylist()
        else:
            whole = path.read_text(encoding="utf-8")
            parts = re.split(r"^<\|endoftext\|>$", whole, flags=re.MULTILINE)
            texts = parts if len(parts) > 1 else whole.split("\n")
    return [text.strip() for text in texts if text and text.strip()]


def cut_texts(texts: list[str], args, left_out: Counter) -> list[tuple[str, str]]:
    """(prompt, chosen) of the texts that have enough sentences, each with a prompt of its own."""
    starts, middle = {}, args.prompt_sentences - 1
    last = middle + args.completion_sentences
    for text in texts:
        ends = [match.end() for match in END.finditer(text)]
        if len(ends) <= last:
            left_out["with too few sentences"] += 1
        elif (prompt := text[: ends[middle]]) in starts:
            left_out["with the prompt of an earlier one"] += 1
        else:
            starts[prompt] = text[ends[middle] : ends[last]]
    return list(starts.items())


def load(args):
    """The model, set to sample, and its tokenizer."""
    for library in (transformers, huggingface_hub):  # an error is one line
        library.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": "auto", "output_loading_info": True}
    with one_line(f"cannot load {args.MODEL}"):
        tokenizer = AutoTokenizer.from_pretrained(args.MODEL)
        model, report = AutoModelForCausalLM.from_pretrained(args.MODEL, **options)
    # BOS ends a sample, too: a model that was trained on one text after the other begins the next with it.
    ends = sorted({*eos_ids(model, tokenizer), tokenizer.bos_token_id} - {None})
    if report["missing_keys"] or not ends:
        fail(f"{args.MODEL} has no {min(report['missing_keys'], default='EOS token')}")
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    sampling |= {"max_new_tokens": args.max_new_tokens, "eos_token_id": ends, "pad_token_id": ends[0]}
    model.generation_config = GenerationConfig(**sampling)  # a new one: nothing of the checkpoint's own stays
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def make_pairs(model, tokenizer, starts: list, flat: bool, args, left_out: Counter) -> list[dict[str, str]]:
    random.Random(args.seed).shuffle(starts)
    torch.manual_seed(args.seed)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", 10**9) - args.max_new_tokens
    pairs, bar = [], tqdm(total=min(args.pairs, len(starts)), unit=" pairs")
    while starts and len(pairs) < args.pairs:
        batch, starts = starts[: args.batch_size], starts[args.batch_size :]
        batch = [(encode(tokenizer, prompt), prompt, chosen) for prompt, chosen in batch]
        fitting = [row for row in batch if len(row[0]) <= room]
        left_out["too long for the model"] += len(batch) - len(fitting)
        samples = sample(model, tokenizer, [ids for ids, _, _ in fitting]) if fitting else []
        for (_, prompt, chosen), text in zip(fitting, samples, strict=True):
            text = re.sub(r"\s+", " ", text) if flat else text
            ends = [match.end() for match in END.finditer(text)][: args.completion_sentences]
            if not ends:
                left_out["whose sample has no whole sentence"] += 1
            elif text[: ends[-1]] == chosen:
                left_out["whose sample is the same"] += 1
            elif len(pairs) < args.pairs:
                pairs.append({"prompt": prompt, "chosen": chosen, "rejected": text[: ends[-1]]})
        bar.update(len(pairs) - bar.n)
    bar.close()
    return pairs


@torch.no_grad()
def sample(model, tokenizer, prompts: list[list[int]]) -> list[str]:
    """A continuation of each prompt, with the space it begins with."""
    rows, left = [torch.tensor(prompt) for prompt in prompts], {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence(rows, padding_value=model.generation_config.pad_token_id, **left).to(model.device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], **left).to(model.device)  # both (B, L)
    output = model.generate(input_ids=ids, attention_mask=mask)  # (B, L + new)
    return decode_answers(tokenizer, prompts, output[:, ids.shape[1] :].tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, kind in {"MODEL": str, "TEXTS": Path, "OUT": Path}.items():
        parser.add_argument(name, type=kind)
    for name, (default, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} ({default})")
    main(parser.parse_args())
