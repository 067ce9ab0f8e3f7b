"""From files to token ids to batches: formats, templates, boundaries, what is dropped, the order of rows.

The built-in example's tokenizer has a token per character, so that expected ids can be written as text: its
chat template makes <s>12= twelve</s> of the question 12 and the answer " twelve".
"""

import contextlib
import csv
import importlib.util
import io
import json
import re
import sys
import types
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Strip
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import common
from common import Arguments, Data, encode, global_batches, load_data, micro_batches, split_prompt, tokenize

SHARED = Path(__file__).parents[2] / "shared"  # tokenizers of real models and real data, where there are any
TOYS = ["toy", "toy, adds BOS", "toy, adds BOS and EOS", "toy, adds BOS that is EOS"]
REAL = ["gpt2-tokenizer", "phi-3-mini-tokenizer", "stories260K"]
here = (SHARED / "models" / REAL[0]).exists()
needs_shared = pytest.mark.skipif(not here, reason="needs ../shared")
GPT2, PHI3, STORIES = (pytest.param(name, marks=needs_shared) for name in REAL)
PARTS = ("prompt", "chosen", "rejected")
fast = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def tokenizer(name: str = "toy", template: str | None = None):
    """A new one, which a test may change."""
    if name in REAL:
        return AutoTokenizer.from_pretrained(SHARED / "models" / name)
    toy = AutoTokenizer.from_pretrained(Path(__file__).parent / "toy" / "sft")
    if "adds" in name:
        toy.bos_token = "</s>" if "that is EOS" in name else "<s>"
        around = f"{toy.bos_token} $A </s>" if "and EOS" in name else f"{toy.bos_token} $A"
        specials = [("<s>", 1), ("</s>", 2)]
        toy.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=specials)
    if template:
        toy.add_tokens(["<|im_start|>", "<|im_end|>", "<|end|>", "<think>", "</think>", "\n", "|", "<", ">"])
        toy.chat_template = template
    return toy


TOY = tokenizer()


def ids(text: str, tok=TOY) -> list[int]:
    return tok(text, add_special_tokens=False)["input_ids"]


def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def answer(content: str) -> list[dict]:
    return [{"role": "assistant", "content": content}]


def pair(prompt, chosen, rejected) -> dict:
    prompt = {} if prompt is None else {"prompt": prompt}
    return prompt | {"chosen": chosen, "rejected": rejected}


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


def load(path: Path, tok=TOY, completions=PARTS[1:], **arguments) -> tuple[Data, Data | None]:
    """Without a test split, unless there is one, or eval_strategy says to hold one out."""
    arguments = {"eval_strategy": "steps" if path.is_dir() else "no"} | arguments
    return load_data(Arguments(dataset_name=str(path), **arguments), tok, completions=completions)


def tokenize_pair(row: dict, tok, max_length: int) -> dict:
    return tokenize(row, tok, PARTS[1:], max_length, room=1)


# ---------------------------------------------------------------------------------------------------- formats

FORMATS = {  # of a question, a chosen and a rejected answer
    "texts": lambda q, c, r: (f"<s>{q}=", c, r),
    "texts that begin with the prompt": lambda q, c, r: (None, f"<s>{q}={c}", f"<s>{q}={r}"),
    "messages": lambda q, c, r: (user(q), answer(c), answer(r)),
    "messages from the prompt on": lambda q, c, r: (None, user(q) + answer(c), user(q) + answer(r)),
    "messages, prompt as a text, too": lambda q, c, r: (q, user(q) + answer(c), user(q) + answer(r)),
    "messages, prompt a text": lambda q, c, r: (q, answer(c), answer(r)),
    "messages, answers texts": lambda q, c, r: (user(q), c, r),
}
FACTS = [("12", " twelve", " ten two"), ("7", " seven", " one"), ("30-1", " twenty-nine", " thirty one")]
KINDS = [".json", ".jsonl", ".csv", ".parquet", "directory"]  # in a csv file, there are no messages
CASES = [(format, kind) for format in FORMATS for kind in KINDS if kind != ".csv" or "messages" not in format]


@pytest.mark.parametrize("format, kind", CASES)
def test_what_says_the_same_has_the_same_tokens(format, kind, tmp_path, capsys):
    rows = [pair(*FORMATS[format](*fact)) for fact in FACTS]
    path = write(tmp_path / ("train.jsonl" if kind == "directory" else f"all [1]{kind}"), rows)
    if kind == "directory":
        path = write(tmp_path / "test.jsonl", rows[1:]).parent
    train, test = load(path)
    want = [(ids(f"<s>{q}="), ids(f"{c}</s>"), ids(f"{r}</s>")) for q, c, r in FACTS]
    assert [*zip(*(train.tokens[part] for part in PARTS), strict=True)] == want
    assert train.lengths.tolist() == [[*map(len, parts)] for parts in want]
    if kind == "directory":
        assert test.tokens[:] == train.tokens[1:] and test.lengths.tolist() == train.lengths[1:].tolist()
        assert load(path, eval_strategy="no")[1] is None
    else:
        assert test is None


@pytest.mark.parametrize("format", FORMATS)
def test_a_method_that_samples_completions_gets_the_same_prompts(format, tmp_path):
    rows = [pair(*FORMATS[format](*fact)) for fact in FACTS]
    prompts, _ = load(write(tmp_path / "pairs.jsonl", rows), completions=())
    pairs, _ = load(tmp_path / "pairs.jsonl")
    assert prompts.tokens.column_names == ["prompt"] and prompts.lengths.shape == (3, 1)
    assert prompts.tokens["prompt"][:] == pairs.tokens["prompt"][:]
    assert prompts.raw[:] == pairs.raw[:]
    texts = [f"<s>{q}=" if "texts" in format and "messages" not in format else user(q) for q, *_ in FACTS]
    assert [split_prompt(row)[0] for row in prompts.raw] == texts


def test_prompts_need_no_completions_beside_them(tmp_path):
    prompts, _ = load(write(tmp_path / "prompts.jsonl", [{"prompt": user("12")}]), completions=())
    assert prompts.tokens[:] == {"prompt": [ids("<s>12=")]}


@pytest.mark.parametrize("chat", [False, True])
def test_one_completion_for_each_prompt(tmp_path, chat):
    """As a method on unpaired data has it: the labels of the rows that are kept stay in Data.raw."""
    facts = [("1", " one", True), ("2", "", False), ("3", " two", False)]
    rows = [(user(q), answer(c), label) if chat else (f"<s>{q}=", c, label) for q, c, label in facts]
    rows = [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in rows]
    train, _ = load(write(tmp_path / "unpaired.jsonl", rows), completions=("completion",))
    want = {"prompt": [ids("<s>1="), ids("<s>3=")], "completion": [ids(" one</s>"), ids(" two</s>")]}
    assert train.tokens[:] == want and train.lengths.tolist() == [[3, 5], [3, 5]]
    assert train.raw["label"][:] == [True, False]
    (batch,) = micro_batches(train, np.array([1, 0]), 2, torch.device("cpu"))
    assert batch.labels[batch.completions].tolist() == ids(" two</s>") + ids(" one</s>")
    assert batch.global_tokens == {"prompt": 6, "completion": 10}
    assert train.raw[batch.rows]["label"] == [False, True]


def test_prompts_are_scored_for_a_method_that_asks_for_it(tmp_path):
    path = write(tmp_path / "test.jsonl", [pair("1=", "a", "b")])
    write(tmp_path / "train.jsonl", [pair("1=", "a", "b")])
    for wanted in (False, True):
        for data in load_data(Arguments(dataset_name=str(path.parent)), TOY, score_prompts=wanted):
            (batch,) = micro_batches(data, np.array([0]), 1, torch.device("cpu"))
            assert batch.scored.sum() == 4 + wanted


def digest(folder: Path, train: dict, test: dict, completions=PARTS[1:], **arguments) -> str:
    folder.mkdir()
    write(folder / "train.jsonl", [train] * 4)
    write(folder / "test.jsonl", [test])
    args = Arguments("m", dataset_name=str(folder), **arguments)
    load_data(args, TOY, completions=completions)
    return args.data_digest


def test_the_digest_is_of_all_tokens_of_training_and_test_data(tmp_path):
    one, two = pair("1=", "one", "x"), pair("2=", "two", "x")
    rows = [(one, two), (one, two), (one | {"chosen": "eno"}, two), (one, two | {"rejected": "y"})]
    rows += [(one | {"prompt": "3="}, two), (one, two | {"prompt": "3="})]
    digests = [digest(tmp_path / str(i), *splits) for i, splits in enumerate(rows)]
    assert digests[0] == digests[1] and len({*digests}) == 5
    # of prompts alone, too
    digests = [digest(tmp_path / f"prompts {i}", *splits, completions=()) for i, splits in enumerate(rows)]
    assert len({*digests[:4]}) == 1 and len({*digests}) == 3


def test_the_digest_does_not_depend_on_how_many_processes_tokenized(tmp_path):
    one, two = pair("1=", "one", "x"), pair("2=", "two", "x")
    assert digest(tmp_path / "a", one, two) == digest(tmp_path / "b", one, two, dataset_num_proc=2)


def test_a_csv_file_has_texts_even_if_they_look_like_numbers_or_nothing(tmp_path):
    rows = [{"": i} | pair(*parts) for i, parts in enumerate([("a", "null", "007"), ("", "nan", "1")])]
    path = write(tmp_path / "pairs.csv", rows)  # with row numbers, as pandas writes them
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # and a byte order mark, as Excel does
    train, _ = load(path)
    assert train.tokens["prompt"][:] == [ids("a"), ids("<s>")]
    assert train.tokens["chosen"][:] == [ids("null</s>"), ids("nan</s>")]
    assert train.tokens["rejected"][:] == [ids("007</s>"), ids("1</s>")]


def test_templates_see_only_the_fields_that_a_message_has(tmp_path):
    prompt = [{"role": "user", "content": "a", "name": "x"}, *answer("b"), *user("c")]
    tok = tokenizer("toy", "{% for m in messages %}{{ '-' if 'name' in m }}{{ m.content }}{% endfor %}")
    rows = [pair(prompt, answer("d"), answer("e"))]
    train, _ = load(write(tmp_path / "pairs.parquet", rows), tok)  # where the others' name is null
    assert [train.tokens[0][part] for part in PARTS] == [ids("-abc"), ids("d"), ids("e")]


# ------------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("begin, end", [("", ""), ("BOS", ""), ("", "EOS"), ("BOS", "EOS")])
@pytest.mark.parametrize("name", [*TOYS, GPT2, PHI3, STORIES])
def test_texts_begin_with_one_bos_if_any_and_end_with_one_eos(name, begin, end):
    tok = tokenizer(name)
    prompt, end = (begin and tok.bos_token) + "say hello", end and tok.eos_token
    row = tokenize_pair(pair(prompt, " to you" + end, " or not"), tok, 99)
    for completion, text in ((row["chosen"], "say hello to you"), (row["rejected"], "say hello or not")):
        *tokens, last = row["prompt"] + completion
        if begin or "adds" in name or name == "stories260K":
            first, *tokens = tokens
            assert first == tok.bos_token_id
        assert last == tok.eos_token_id
        assert not {tok.bos_token_id, tok.eos_token_id} & {*tokens}
        assert tok.decode(tokens) == text
    assert tok.decode(row["prompt"], skip_special_tokens=True) == "say hello" and not row["note"]
    cut_off = encode(tok, prompt, " to you" + end, ended=False)
    assert [*cut_off, tok.eos_token_id] == row["prompt"] + row["chosen"]


@pytest.mark.parametrize("name", TOYS[:3])
def test_a_prompt_keeps_an_eos_of_its_own(name):
    row = tokenize_pair(pair("<s>a</s>", "b", "c</s>"), tokenizer(name), 99)
    assert [row[part] for part in PARTS] == [ids("<s>a</s>"), ids("b</s>"), ids("c</s>")]
    assert not row["note"]


@pytest.mark.parametrize("name", [*TOYS, GPT2, PHI3, STORIES])
def test_bos_stands_for_an_empty_prompt(name):
    tok = tokenizer(name)
    row = tokenize_pair(pair("", "yes", "no"), tok, 99)
    assert row["prompt"] == [tok.bos_token_id] and not row["note"]
    assert row["rejected"] == [*ids("no", tok), tok.eos_token_id]
    if name == "toy":
        tok.bos_token = None
        assert "no tokens" in tokenize_pair(pair("", "yes", "no"), tok, 99)["note"]


IMPLICIT = [  # the prompt, and what follows it in both completions
    ("The", " sky", " sky is blue"),  # not "The sk", and something is left of both
    ("The", " skyline", " sky"),
    ("", "yes", "yes indeed"),
    ("\n\nHuman: hi\n\nAssistant:", " Hello.", " Hell"),
    (user("q"), answer("yes"), answer("yes")),
    (user("q"), answer("a") + user("r") + answer("s"), answer("a")),
    ([], answer("yes"), answer("no")),
]


@pytest.mark.parametrize("prompt, chosen, rejected", IMPLICIT)
def test_an_implicit_prompt_is_what_both_share(prompt, chosen, rejected):
    assert split_prompt(pair(None, prompt + chosen, prompt + rejected)) == [prompt, chosen, rejected]


words = st.text("ab \n", min_size=1, max_size=8)


@fast
@given(words, words, words)
def test_an_implicit_prompt_is_the_longest_that_splits_no_word_and_leaves_something(start, a, b):
    a, b = start + a, start + b

    def fits(n):
        return a[:n] == b[:n] and (n == 0 or not a[n - 1].isspace() and a[n].isspace() and b[n].isspace())

    n = max(filter(fits, range(min(len(a), len(b)))))
    assert split_prompt(pair(None, a, b)) == [a[:n], a[n:], b[n:]]


@pytest.mark.parametrize("name", ["toy", GPT2])
def test_a_token_across_the_boundary_is_the_completions(name, tmp_path):
    tok = tokenizer(name)
    tok.add_tokens(["world", "worm"] if name == "toy" else [])
    rows = [pair("hello wor", "ld", "m"), pair("hello", " wor", " x"), pair("wor", "ld", "m")]
    train, _ = load(write(tmp_path / "pairs.jsonl", rows), tok)
    starts = [tok.decode(prompt).strip() for prompt in train.tokens["prompt"]]
    assert starts == ["hello", "hello", tok.bos_token]
    for text, row, start in zip(rows, train.tokens, starts, strict=True):
        for part in ("chosen", "rejected"):
            tokens = row[part] if start == tok.bos_token else row["prompt"] + row[part]
            assert tokens == [*ids(text["prompt"] + text[part], tok), tok.eos_token_id]


BYTES, LETTERS = (tokenizer(REAL[0]), st.characters(codec="utf-8")) if here else (TOY, "01ab -=")
texts = st.text(LETTERS, max_size=9) | st.text("hello world", max_size=9)


@fast
@given(texts, texts, texts)
@example("hello wor", "ld", "m")
@example("", " ", "a")
def test_any_text_is_kept_whole_or_dropped(prompt, chosen, rejected):
    row = tokenize_pair(pair(prompt, chosen, rejected), BYTES, 1000)
    assert bool(row["note"]) == (not chosen or not rejected or chosen == rejected)
    if row["note"]:
        return
    for text, completion in ((prompt + chosen, row["chosen"]), (prompt + rejected, row["rejected"])):
        tokens = row["prompt"] + completion
        tokens = tokens[1:] if tokens[0] == BYTES.bos_token_id else tokens
        assert completion and tokens == [*ids(text, BYTES), BYTES.eos_token_id]
        assert BYTES.decode(tokens[:-1]) == text


# ---------------------------------------------------------------------------------------------- conversations

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
KIND = "<|im_start|>system\nbe kind<|im_end|>\n"
SYSTEM = "{% if messages[0].role != 'system' %}" + KIND + "{% endif %}"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
THINKS = "{% if m.role == 'assistant' and loop.last %}" + EMPTY_THOUGHT + "{% endif %}{{ m.content }}"
PHI = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
PHI += "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
HI = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TEMPLATES = {  # and what they make of the prompt "hi" and of the completion "yo"
    "toy": (TOY.chat_template, "<s>hi=", "yo</s>"),
    "like Qwen2.5's": (SYSTEM + TURNS + ASKS, KIND + HI, "yo<|im_end|>\n"),
    "like Qwen3's": (TURNS.replace("{{ m.content }}", THINKS) + ASKS, HI, EMPTY_THOUGHT + "yo<|im_end|>\n"),
    "like Phi-3's": (PHI, "<|user|>\nhi<|end|>\n<|assistant|>\n", "yo<|end|>\n</s>"),
    REAL[1]: (None, "<|user|>\nhi<|end|>\n<|assistant|>\n", "yo<|end|>\n<|endoftext|>"),
}
SYSTEM_TURN = [{"role": "system", "content": "a"}]
DIALOGUES = [user("hi"), user("hi") + answer("yes") + user("no"), SYSTEM_TURN + user("hi")]


@pytest.mark.parametrize("name", [*list(TEMPLATES)[:-1], PHI3])
def test_conversations_are_what_the_template_makes(name):
    template, prompt, completion = TEMPLATES[name]
    tok = tokenizer(name, template)

    def chat(messages, **options):
        return tok.apply_chat_template(messages, return_dict=False, **options)

    for dialogue in DIALOGUES:
        row = tokenize_pair(pair(dialogue, answer("yo"), answer("no")), tok, 999)
        assert row == tokenize_pair(pair(None, dialogue + answer("yo"), dialogue + answer("no")), tok, 999)
        assert row["prompt"] == chat(dialogue, add_generation_prompt=True) and not row["note"]
        assert row["prompt"] + row["chosen"] == chat(dialogue + answer("yo"))
        assert row["prompt"] + row["rejected"] == chat(dialogue + answer("no"))
        cut_off = encode(tok, dialogue, answer("yo"), ended=False)
        assert cut_off == chat(dialogue + answer("yo"))[: len(cut_off)] and tok.decode(cut_off).endswith("yo")
        if dialogue == user("hi"):
            assert row["prompt"] == ids(prompt, tok)
            assert row["prompt"] + row["chosen"] == ids(prompt + completion, tok)
    # These part at a turn of the user: the prompt ends in the open turn of the assistant before, as far as
    # the finished chat has it open (Qwen3's would have a thought in it).
    chosen, rejected = (user("hi") + answer("a") + user(x) + answer("b") for x in "xy")
    row = tokenize_pair(pair(None, chosen, rejected), tok, 999)
    before = chat(user("hi") + answer("a"), continue_final_message=True)
    assert row["prompt"] == (ids(HI, tok) if "Qwen3" in name else before)
    assert row["prompt"] + row["chosen"] == chat(chosen) and row["prompt"] + row["rejected"] == chat(rejected)


def test_a_generation_prompt_that_the_finished_chat_lacks_is_left_out(tmp_path):
    tok = tokenizer("toy", TURNS + ASKS.replace("assistant\n", "assistant\n<think>\n"))
    rows = [pair(user("hi"), answer("yo"), answer("no"))] * 2
    train, _ = load(write(tmp_path / "pairs.jsonl", rows), tok)
    assert train.tokens["prompt"][0] == ids(HI, tok) and train.tokens["chosen"][0] == ids(
        "yo<|im_end|>\n", tok
    )


@needs_shared
def test_politeness_pairs(capsys):
    path = SHARED / "data" / "politeness"
    for name, pairs in zip(("train", "test"), load(path, tokenizer(REAL[1])), strict=True):
        raw = [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]
        assert len(pairs.tokens) == sum(row["chosen"] != row["rejected"] for row in raw) > 50
        for completions in (pairs.tokens["chosen"], pairs.tokens["rejected"]):
            assert {tuple(tokens[-2:]) for tokens in completions} == {(32007, 32000)}  # <|end|><|endoftext|>
    assert " spans " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, text", [("toy", "one end of"), ("toy", "endend"), ("real", "a<|end|>\n<|user|>\nb")]
)
def test_a_message_that_spells_a_special_token_is_dropped(name, text):
    """It could end its turn. Plain texts are taken to be what a template made, special tokens and all."""
    if name == "real" and not here:
        pytest.skip("needs ../shared")
    tok = tokenizer(REAL[1] if name == "real" else "toy")
    if name == "toy":
        tok.add_special_tokens({"additional_special_tokens": ["end"]})
    special = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    for i in range(3):
        parts = ["a", "b", "c"]
        assert not tokenize_pair(pair(user("a"), answer("b"), answer("c")), tok, 999)["note"]
        parts[i] = text
        row = tokenize_pair(pair(user(parts[0]), answer(parts[1]), answer(parts[2])), tok, 999)
        assert row["note"] == "dropped: the text of a message spells a special token"
    row = tokenize_pair(pair(text, text, "b"), tok, 999)
    assert not row["note"] and special & {*row["prompt"]} and special & {*row["chosen"][:-1]}


# ------------------------------------------------------------------------------ what is cut, dropped, refused


@pytest.mark.parametrize("max_length", range(1, 13))
def test_max_length_cuts_the_ends_of_completions(max_length):
    row = tokenize_pair(pair("12345", "abc", "abxy z"), TOY, max_length)
    if max_length <= 5:
        assert f"dropped: the prompt leaves too little room in max_length {max_length}" in row["note"]
    elif max_length <= 7:  # "a", "ab"
        assert row["note"].startswith("dropped: the completions are identical")
    else:
        is_cut = len("12345abxy z") + 1 > max_length
        assert row["note"] == "cut to fit max_length" * is_cut and row["prompt"] == ids("12345")
        assert row["prompt"] + row["chosen"] == ids("12345abc</s>")[:max_length]
        assert row["prompt"] + row["rejected"] == ids("12345abxy z</s>")[:max_length]


@pytest.mark.parametrize("length", [1, 20])
def test_a_prompt_leaves_completions_what_they_need_or_an_eighth(length):
    completion = "a" * (length - 1)  # and EOS
    for prompt in range(1, 64):
        row = tokenize_pair(pair("1" * prompt, completion, "b" * (length - 1)), TOY, 64)
        is_dropped = 64 - prompt < min(length, 64 // 8) or length == 1  # then both are only EOS
        assert row["note"].startswith("dropped") == is_dropped, prompt


def test_prompts_leave_room_for_the_completions_that_are_sampled(tmp_path):
    prompts, _ = load(write(tmp_path / "a.json", [{"prompt": user("12")}]), completions=(), max_new_tokens=2)
    assert prompts.tokens[:] == {"prompt": [ids("<s>12=")]}
    row = {"prompt": user("3942")}
    fits = tokenize(row, TOY, (), 16, room=10)
    assert fits["prompt"] == ids("<s>3942=") and not fits["note"]
    assert "too little room in max_length 15" in tokenize(row, TOY, (), 15, room=10)["note"]
    with pytest.raises(
        SystemExit, match="most rows of the train split are dropped: .* leaves too little room"
    ):
        load(tmp_path / "a.json", completions=(), max_new_tokens=12, max_length=15)


def test_empty_prompts_are_not_sampled_from():
    tok = tokenizer()
    tok.backend_tokenizer.normalizer = Strip()
    for prompt in ("", " \n"):  # of which the second one has no tokens
        assert tokenize({"prompt": prompt}, tok, (), 16, room=10)["note"]


TURN, NOTHING = user("a") + answer("b"), user("a") + answer("")
EMPTY = [("a", "", "b"), ("a", "b", None), (None, "", ""), (user("a"), "b", "")]
EMPTY += [(user("a"), answer(""), answer("b")), (user("a"), [], answer("b")), (None, TURN, NOTHING)]


@pytest.mark.parametrize("prompt, chosen, rejected", EMPTY)
def test_empty_completions_are_found(prompt, chosen, rejected):
    problem = tokenize_pair(pair(prompt, chosen, rejected), TOY, 99)["note"]
    assert re.match("dropped: (chosen|rejected) is empty", problem)


def test_conversations_that_share_no_message_have_no_prompt():
    problem = tokenize_pair(pair(None, user("1") + answer("a"), user("2") + answer("b")), TOY, 99)["note"]
    assert problem == "dropped: there is no prompt"


@pytest.mark.parametrize("prompt", ["", "a</s>"])
def test_a_completion_without_a_token_is_empty(prompt):
    tok = tokenizer()
    tok.backend_tokenizer.normalizer = Strip()
    row = tokenize_pair(pair(prompt, " ", "b"), tok, 99)
    assert row["note"] == "dropped: the prompt or a completion has no tokens" or row["chosen"] == [
        tok.eos_token_id
    ]


def test_dropped_pairs_are_counted_and_the_others_keep_what_is_theirs(tmp_path, capsys):
    pairs = [("123456789", "a", "b"), ("1", "", "b"), ("2", "a", "b"), ("3", "abc", "abc"), ("1", "a", "")]
    pairs += [("12", "abcdefgh", "abcdefxy"), ("4", "a", "b"), ("123456789", "a", "")]
    rows = [pair(*parts) | {"answer": f"answer {i}"} for i, parts in enumerate(pairs)]
    train, _ = load(write(tmp_path / "pairs.jsonl", rows), max_length=8)
    assert train.raw["answer"][:] == ["answer 2", "answer 6"]
    assert train.tokens["prompt"][:] == [ids("2"), ids("4")] and train.lengths.tolist() == [[1, 2, 2]] * 2
    said = re.findall(
        r"(\d) of 8 rows \((.*)%\) of the train split are dropped: (.*)", capsys.readouterr().out
    )
    assert {*said} == {
        (
            "1",
            "12.5",
            "the prompt leaves too little room in max_length 8; see --truncate_prompt",
        ),
        ("1", "12.5", "chosen is empty, or has no message of the assistant"),
        ("2", "25.0", "rejected is empty, or has no message of the assistant"),
        ("2", "25.0", "the completions are identical, at least up to where they are cut"),
    }


def test_a_thousand_dropped_pairs_do_not_hide_the_next(tmp_path):
    rows = [pair("1", "", "b")] * 1001 + [pair("1", "a", "b")]
    assert len(load(write(tmp_path / "pairs.jsonl", rows))[0].tokens) == 1


ONE, CHAT = pair("1", "one", "two"), pair(user("1"), answer("one"), answer("two"))
ERRORS = {  # a row or the content of a file, what the message has to say
    "all dropped": (ONE | {"chosen": ""}, "most rows of the train split are dropped: chosen is empty"),
    "no column": ({"question": "1", "chosen": "a"}, "question, chosen"),
    "no template": (CHAT, "chat template"),
    "no template for the prompts": (CHAT | {"chosen": "a", "rejected": "b"}, "chat template"),
    "another split": (ONE, "have to be among train"),
    "no file": (None, "pairs.jsonl"),
    "no content": ("", "pairs.jsonl is empty"),
    "blank lines": ("\n\n", "pairs.jsonl: ."),
    "malformed": ('{"prompt": "1", "cho', "JSON"),
    "numbers": (ONE | {"chosen": 1, "rejected": 2}, "the train split: .* is [12], not a text or messages"),
    "dates": (ONE | {"chosen": "2020-01-01", "rejected": "2020-01-02"}, "the train split: .* not a text"),
    "lists": (ONE | {"chosen": [1, 2], "rejected": [1]}, "the train split: .* is \\[1.*\\], not a text"),
    "lists of texts": (ONE | {"chosen": ["a"], "rejected": ["a"]}, "the train split: .* is \\['a'\\], not a"),
    "lists, in two processes": (
        [ONE | {"chosen": [1]}] * 2,
        "the train split: chosen is \\[1\\], not a text",
    ),
    "parts": (ONE | {"prompt": [{"type": "text", "text": "a"}]}, "the train split: prompt is .*, not a text"),
    "prompts that are numbers": (ONE | {"prompt": 1}, "the train split: prompt is 1, not a text or messages"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_one_line(error, tmp_path):
    content, says = ERRORS[error]
    tok, path = tokenizer(), tmp_path / "pairs.jsonl"
    if "template" in error:
        tok.chat_template = None
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    split, processes = "validation" if "split" in error else "train", 2 if "processes" in error else None
    with pytest.raises(SystemExit) as stop:
        load(path, tok, dataset_train_split=split, dataset_num_proc=processes)
    assert re.fullmatch(f"error: .*{says}.*", str(stop.value))


def bytes_tokenizer():
    """A token per byte, EOS, and a chat template: decoding gives any text back."""
    bpe = Tokenizer(BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", bos_token="<s>")
    tok.chat_template = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    tok.chat_template += "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    return tok


contents = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(["", " ", "</s>", "x" * 5000])
contents |= st.sampled_from(["\udfff", "\ufeff", "\0", "e\u0301", "\u202e", "\r\n", "👩‍👩‍👧"])
dialogues = st.lists(contents, min_size=1, max_size=4) | contents.map(lambda text: [text] * 201)
rows = st.tuples(contents, contents, contents) | st.tuples(dialogues, contents, contents)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.lists(rows, min_size=1, max_size=6), st.booleans())
@example([(["a"] * 3001, "b", "c"), ("x" * 10**6, "b", "c")], True)  # thousands of turns, a huge prompt
def test_whatever_the_data_are_rows_are_kept_whole_or_dropped_and_counted(tmp_path_factory, found, chat):
    def say(text) -> list[dict]:
        roles = ["user", "assistant"] * (len(text) // 2 + 1)
        return [{"role": role, "content": content} for role, content in zip(roles, text, strict=False)]

    tok, data = bytes_tokenizer(), []
    for prompt, chosen, rejected in found:
        prompt = [prompt] if isinstance(prompt, str) else prompt
        prompt = prompt[: (len(prompt) - 1) // 2 * 2 + 1]  # the last turn is the user's
        data.append(
            pair(say(prompt), answer(chosen), answer(rejected))
            if chat
            else pair("".join(prompt), chosen, rejected)
        )
    path = write(tmp_path_factory.mktemp("fuzz") / "pairs.jsonl", data)
    broken = "\\udfff" in json.dumps(data)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            train, _ = load(path, tok, max_length=10**6)
        except SystemExit as stop:
            says = (
                "cannot load the dataset .*: .*surrogate"
                if broken
                else "most rows of the train split are dropped: "
            )
            assert re.fullmatch(f"error: {says}.*", str(stop))
            return
    assert not broken
    dropped = sum(
        map(int, re.findall(r"(\d+) of \d+ rows \S+ of the train split are dropped", said.getvalue()))
    )
    assert len(train.tokens) == len(data) - dropped
    kept = [row for row in data if not tokenize_pair(row, tok, 10**6)["note"]]
    for row, tokens in zip(kept, train.tokens, strict=True):
        for part in ("chosen", "rejected"):
            if chat:
                text = "".join(f"<s>{m['role']}:{m['content']}</s>" for m in row["prompt"] + row[part])
            else:
                text = row["prompt"] + row[part]
                text = text.removesuffix("</s>") + "</s>" if text.endswith("</s>") else text + "</s>"
            assert (
                tok.decode(tokens["prompt"] + tokens[part]).removeprefix(
                    "" if chat or row["prompt"] else "<s>"
                )
                == text
            )


def test_what_a_template_refuses_is_dropped(tmp_path, capsys):
    refuses = "{% if messages[2] %}{{ raise_exception('too long') }}{% endif %}"
    tok = tokenizer("toy", refuses + TOY.chat_template)
    rows = [CHAT, CHAT | {"prompt": user("1") + answer("a") + user("2")}]
    assert len(load(write(tmp_path / "pairs.jsonl", rows), tok)[0].tokens) == 1
    assert re.search("1 of 2 rows .* dropped: .*too long", capsys.readouterr().out)


def test_tokens_are_not_those_of_an_earlier_run_with_other_arguments_or_code(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))  # as in a notebook
    path = write(tmp_path / "pairs.jsonl", [ONE])
    assert load(path)[0].tokens["chosen"][:] == [ids("one</s>")]
    assert load(path, max_length=3)[0].tokens["chosen"][:] == [ids("on")]
    # To the cache of datasets.map, a module's function is the same as long as its name is.
    edited, code = tmp_path / "common.py", Path(common.__file__).read_text()
    edited.write_text(code.replace("ids[:space]", "ids[:1]"))
    spec = importlib.util.spec_from_file_location("common", edited)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "common", module)
    spec.loader.exec_module(module)
    train, _ = module.load_data(module.Arguments(dataset_name=str(path), eval_strategy="no"), TOY)
    for name in ("packed", "varlen"):  # as before
        common.AttentionInterface.register(name, common.packed_attention)
    assert train.tokens["chosen"][:] == [ids("o")]


# ---------------------------------------------------------------------------------------------------- batches


def some_lengths(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(1, 50, (n, 3))


def batches(rows: int, size: int, **arguments) -> np.ndarray:
    return global_batches(Data(None, None, some_lengths(rows)), Arguments(batch_size=size, **arguments))


@fast
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.integers(0, 99))
def test_an_epoch_has_no_row_twice_and_batches_are_sorted(n, size, epochs, seed):
    run = batches(n, size, num_train_epochs=epochs, seed=seed)
    size = min(n, size)  # a batch has no more pairs than there are
    assert run.shape == (n // size * epochs, size)
    for epoch in run.reshape(epochs, -1):
        assert len({*epoch}) == len(epoch) and {*epoch} <= {*range(n)}
    assert (np.diff(some_lengths(n).sum(1)[run], axis=1) >= 0).all()


STEPS = [(59, 1, 5), (59, 0.5, 3), (59, 2.2, 11), (59, 0.01, 1), (500, 1.1, 55)]


@pytest.mark.parametrize("pairs, epochs, steps", STEPS)
def test_epochs_and_steps(pairs, epochs, steps):
    run = batches(pairs, 10, num_train_epochs=epochs)
    longer = batches(pairs, 10, num_train_epochs=epochs, max_steps=steps + 20)
    assert len(run) == steps and len(longer) == steps + 20 and (longer[:steps] == run).all()
    assert len(batches(pairs, 10, num_train_epochs=9, max_steps=2)) == 2


def test_batches_are_random_samples_by_seed_and_epoch(monkeypatch):
    run, other = (batches(43, 10, num_train_epochs=20, seed=seed) for seed in (1, 2))
    samples = Counter(frozenset(batch) for batch in [*run.tolist(), *other.tolist()])
    assert max(samples.values()) == 1  # none comes again, in another epoch or with another seed
    assert {*run.flat} == {*range(43)}  # what an epoch leaves out, another has
    lengths = some_lengths(43).sum(1)
    assert np.median(lengths[run].max(1)) > np.quantile(lengths, 0.8)  # each has pairs of all lengths
    monkeypatch.setattr(common.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 5)
    np.random.seed(3)
    assert (batches(43, 10, num_train_epochs=20, seed=1) == run).all()


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_processes_share_a_batch(world, size, monkeypatch):
    draw, lengths = np.random.default_rng(0), some_lengths(20)
    tokens = [[draw.integers(60, size=n).tolist() for n in row] for row in lengths]
    rows = datasets.Dataset.from_list([dict(zip(PARTS, row, strict=True)) for row in tokens])
    data = Data(rows, rows, lengths)
    batch, seen, numbers = draw.permutation(20)[:12], [], set()
    totals = dict(zip(PARTS, lengths[batch].sum(0), strict=True))
    monkeypatch.setattr(common.dist, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(common.dist, "get_rank", lambda rank=rank: rank)
        parts = [*micro_batches(data, batch, size, torch.device("cpu"))]
        numbers.add(len(parts))
        for part in parts:
            assert len(part.rows) <= size and len(part.labels) == 2 * len(part.rows)
            assert (part.global_pairs, part.global_tokens) == (12, totals)
            want = sum((tokens[row][1] + tokens[row][2] for row in part.rows), [])
            assert part.labels[part.completions].tolist() == want
            seen += part.rows.tolist()
    assert sorted(seen) == sorted(batch) and len(numbers) == 1


def test_an_answer_that_goes_on_with_a_turn_is_one_turn():
    row = tokenize_pair(pair(user("a") + answer("on"), answer("e"), answer("ce")), TOY, 99)
    assert [row[part] for part in PARTS] == [ids("<s>a=on"), ids("e</s>"), ids("ce</s>")]
