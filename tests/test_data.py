"""From files to token ids to batches: formats, templates, boundaries, what is dropped, the order of pairs.

The built-in example's tokenizer has a token per character, so that expected ids can be written as text: its
chat template makes <s>12= twelve</s> of the question 12 and the answer " twelve".
"""

import csv
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import Strip
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import common
from common import Arguments, Pairs, extract_prompt, global_batches, load_pairs, micro_batches, tokenize_pair

SHARED = Path(__file__).parents[2] / "shared"  # tokenizers of real models, where there are any
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the tokenizers and data in ../shared")
REAL = [
    pytest.param(path, marks=needs_shared)
    for path in ("gpt2-tokenizer", "phi-3-mini-tokenizer", "stories260K")
]
GPT2, PHI3, _ = REAL
fast = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tokenizer(name: str = "toy"):
    """A real tokenizer by its name, or the toy's; "toy+s", "toy+s/s": it adds BOS, BOS and EOS to every text."""
    if "toy" not in name:
        return AutoTokenizer.from_pretrained(SHARED / "models" / name)
    toy = AutoTokenizer.from_pretrained(common.TOY / "sft")
    if "+" in name:
        around = "<s> $A </s>" if name.endswith("/s") else "<s> $A"
        specials = [("<s>", toy.bos_token_id), ("</s>", toy.eos_token_id)]
        toy.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=specials)
    return toy


def chat(template: str):
    """The toy tokenizer with another chat template, and tokens for it."""
    toy = tokenizer()
    toy.add_tokens(["<|im_start|>", "<|im_end|>", "<|end|>", "<think>", "</think>", "\n"])
    toy.chat_template = template
    return toy


def ids(text: str, tok=None) -> list[int]:
    return (tok or tokenizer())(text, add_special_tokens=False)["input_ids"]


def message(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def user(content: str) -> list[dict]:
    return [message("user", content)]


def answer(content: str) -> list[dict]:
    return [message("assistant", content)]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


def load(path: Path, tok=None, **arguments) -> tuple[Pairs, Pairs | None]:
    return load_pairs(Arguments(dataset_name=str(path), **arguments), tok or tokenizer())


# ---------------------------------------------------------------------------------------------------- formats

FACTS = [("12", " twelve", " ten two"), ("7", " seven", " one"), ("30-1", " twenty-nine", " thirty one")]
FORMATS = {
    "texts": lambda q, c, r: {"prompt": f"<s>{q}=", "chosen": c, "rejected": r},
    "texts with the prompt in them": lambda q, c, r: {"chosen": f"<s>{q}={c}", "rejected": f"<s>{q}={r}"},
    "conversations": lambda q, c, r: {"prompt": user(q), "chosen": answer(c), "rejected": answer(r)},
    "with the prompt in them": lambda q, c, r: {
        "chosen": user(q) + answer(c),
        "rejected": user(q) + answer(r),
    },
    "and as a text, too": lambda q, c, r: {
        "prompt": q,
        "chosen": user(q) + answer(c),
        "rejected": user(q) + answer(r),
    },
    "prompt a text": lambda q, c, r: {"prompt": q, "chosen": answer(c), "rejected": answer(r)},
    "answers texts": lambda q, c, r: {"prompt": user(q), "chosen": c, "rejected": r},
}


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".parquet", "directory"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_says_the_same_has_the_same_tokens(format, kind, tmp_path, capsys):
    if kind == ".csv" and "text" not in format.split()[0]:
        pytest.skip("conversations are not in csv files")
    rows = [FORMATS[format](*fact) for fact in FACTS]
    path = tmp_path if kind == "directory" else tmp_path / f"pairs{kind}"
    if kind == "directory":
        write(path / "train.jsonl", rows)
        write(path / "test.jsonl", rows[1:])
    else:
        write(path, rows)
    train, test = load(path)
    want = [(ids(f"<s>{q}="), ids(f"{c}</s>"), ids(f"{r}</s>")) for q, c, r in FACTS]
    assert [*zip(*(train.rows[name] for name in ("prompt", "chosen", "rejected")), strict=True)] == want
    assert train.lengths.tolist() == [[*map(len, pair)] for pair in want]
    if kind == "directory":
        assert test.rows[:] == train.rows[1:]
        assert load(path, eval_strategy="no")[1] is None
    else:
        assert test is None
    assert ("no split 'test'" in capsys.readouterr().out) == (kind != "directory")


def test_a_csv_file_holds_texts(tmp_path):
    rows = [
        {"prompt": "007", "chosen": "null", "rejected": "nan"},
        {"prompt": "", "chosen": "a b", "rejected": "a c"},
    ]
    train, _ = load(write(tmp_path / "pairs.csv", rows))
    assert train.rows["prompt"] == [ids("007"), ids("<s>")]
    assert train.rows["chosen"] == [ids("null</s>"), ids("a b</s>")]


def test_templates_see_the_fields_that_a_message_has(tmp_path):
    rows = [
        {"chosen": [message("user", "a", name="x"), *answer("b")], "rejected": user("a") + answer(y)}
        for y in "cd"
    ]
    rows[0]["rejected"][0] = rows[1]["rejected"][0] = rows[0]["chosen"][0]
    tok = chat(
        "{% for m in messages %}{% if 'name' in m %}{{ m.name }}-{% endif %}{{ m.content }}{% endfor %}"
    )
    for suffix in (".jsonl", ".parquet"):
        train, _ = load(write(tmp_path / f"pairs{suffix}", rows), tok)
        assert [train.rows[0][name] for name in ("prompt", "chosen")] == [ids("x-a", tok), ids("b", tok)]


# ------------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("end", ["", "EOS"])
@pytest.mark.parametrize("begin", ["", "BOS"])
@pytest.mark.parametrize("name", ["toy", "toy+s", "toy+s/s", *REAL])
def test_texts_begin_with_one_bos_if_any_and_end_with_one_eos(name, begin, end):
    tok = tokenizer(name)
    row = {
        "prompt": begin and tok.bos_token,
        "chosen": " to you",
        "rejected": " or not" + (end and tok.eos_token),
    }
    row = tokenize_pair(row | {"prompt": row["prompt"] + "say hello"}, tok, 99)
    for completion, text in (("chosen", "say hello to you"), ("rejected", "say hello or not")):
        *tokens, last = row["prompt"] + row[completion]
        if begin or name in ("toy+s", "toy+s/s", "stories260K"):
            first, *tokens = tokens
            assert first == tok.bos_token_id
        assert last == tok.eos_token_id
        assert not {tok.bos_token_id, tok.eos_token_id} & {*tokens}
        assert tok.decode(tokens) == text
    assert tok.decode(row["prompt"], skip_special_tokens=True) == "say hello" and not row["moved"]


@pytest.mark.parametrize("name", ["toy", "toy+s", "toy+s/s", *REAL])
def test_bos_stands_for_an_empty_prompt(name):
    tok = tokenizer(name)
    row = tokenize_pair({"prompt": "", "chosen": "yes", "rejected": "no"}, tok, 99)
    assert row["prompt"] == [tok.bos_token_id] and not row["moved"]
    assert row["rejected"] == [*ids("no", tok), tok.eos_token_id]
    if name == "toy":
        tok.bos_token = None
        assert "BOS" in tokenize_pair({"prompt": "", "chosen": "yes", "rejected": "no"}, tok, 99)["problem"]


@pytest.mark.parametrize("name", ["toy+s/s", "toy"])
def test_prompts_keep_an_eos_of_their_own(name):
    row = tokenize_pair({"prompt": "<s>a</s>", "chosen": "b", "rejected": "c</s>"}, tokenizer(name), 99)
    assert [row[part] for part in ("prompt", "chosen", "rejected")] == [
        ids("<s>a</s>"),
        ids("b</s>"),
        ids("c</s>"),
    ]
    assert not row["moved"]


IMPLICIT = [
    ("The sky", "The sky is blue", "The"),  # not "The sk", and something is left of both
    ("The skyline", "The sky", "The"),
    ("yes", "no", ""),
    ("yes", "yes indeed", ""),
    ("a\nb", "a b", "a"),
    (
        "\n\nHuman: hi\n\nAssistant: Hello.",
        "\n\nHuman: hi\n\nAssistant: Hell no.",
        "\n\nHuman: hi\n\nAssistant:",
    ),
    (user("q") + answer("yes"), user("q") + answer("no"), user("q")),
    (user("q") + answer("yes"), user("q") + answer("yes"), user("q")),
    (user("q") + answer("a") + user("r") + answer("s"), user("q") + answer("a"), user("q")),
    (answer("yes"), answer("no"), []),
]


@pytest.mark.parametrize("chosen, rejected, prompt", IMPLICIT)
def test_an_implicit_prompt_is_what_both_share(chosen, rejected, prompt):
    n = len(prompt)
    assert extract_prompt(chosen, rejected) == (prompt, chosen[n:], rejected[n:])


words = st.text("ab \n", min_size=1, max_size=8)


@fast
@given(words, words, words)
def test_an_implicit_prompt_is_the_longest_that_splits_no_word_and_leaves_both_something(start, a, b):
    a, b = start + a, start + b

    def ends_a_word(n):
        return n == 0 or not a[n - 1].isspace() and a[n].isspace() and b[n].isspace()

    n = max(n for n in range(min(len(a), len(b))) if a[:n] == b[:n] and ends_a_word(n))
    assert extract_prompt(a, b) == (a[:n], a[n:], b[n:])


@pytest.mark.parametrize("name", ["toy", GPT2])
def test_a_token_across_the_boundary_is_the_completions(name, tmp_path, capsys):
    tok = tokenizer(name)
    if name == "toy":
        tok.add_tokens(["world", "worm"])
    pairs = [
        ("hello wor", "ld", "m"),
        ("hello", " wor", " x"),
        ("hello wor", "ld war", "m"),
        ("wor", "ld", "m"),
    ]
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    train, _ = load(write(tmp_path / "pairs.jsonl", rows), tok)
    for row, (prompt, chosen, rejected) in zip(train.rows, pairs[:3], strict=False):
        assert row["prompt"] + row["chosen"] == [*ids(prompt + chosen, tok), tok.eos_token_id]
        assert row["prompt"] + row["rejected"] == [*ids(prompt + rejected, tok), tok.eos_token_id]
    assert train.rows["prompt"][1] == ids("hello", tok)
    assert tok.decode(train.rows["prompt"][0]).rstrip() == "hello"
    assert train.rows[3] == {  # nothing is left of the prompt
        "prompt": [tok.bos_token_id],
        "chosen": [*ids("world", tok), tok.eos_token_id],
        "rejected": [*ids("worm", tok), tok.eos_token_id],
    }
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "spans" in line]
    assert "in 3 training" in line


anything = (
    st.text(max_size=12) | st.text("a \n\t", max_size=6) | st.sampled_from(["", " ", "é", "e\u0301", "👩‍🚀"])
)
letters = st.text("0123456789abcdefghijklmnopqrstuvwxyz -=", max_size=8)


def check_any_text(tok, prompt: str, chosen: str, rejected: str):
    row = tokenize_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tok, 1000)
    assert bool(row["problem"]) == (not chosen or not rejected or chosen == rejected)
    if row["problem"]:
        return
    start = ids(prompt, tok) or [tok.bos_token_id]
    assert row["moved"] == (row["prompt"] != start)
    for text, completion in ((prompt + chosen, row["chosen"]), (prompt + rejected, row["rejected"])):
        tokens = row["prompt"] + completion
        tokens = tokens[1:] if tokens[0] == tok.bos_token_id else tokens
        assert completion and tokens == [*ids(text, tok), tok.eos_token_id]
        assert tok.decode(tokens[:-1]) == text


@fast
@given(letters, letters, letters)
@example("", "a", "b")
def test_any_text_of_the_toys_alphabet(prompt, chosen, rejected):
    check_any_text(TOY, prompt, chosen, rejected)


@needs_shared
@fast
@given(anything, anything, anything)
@example("", " ", "\n")
def test_any_text_in_bytes(prompt, chosen, rejected):
    check_any_text(BYTES, prompt, chosen, rejected)


TOY, BYTES = tokenizer(), tokenizer("gpt2-tokenizer") if SHARED.exists() else None


# ---------------------------------------------------------------------------------------------- conversations

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n"
TEMPLATES = {  # template, prompt, completion "yo"
    "toy": (tokenizer().chat_template, "<s>hi=", "yo</s>"),
    "qwen2.5-like": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
        + TURNS
        + ASKS
        + "{% endif %}",
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "yo<|im_end|>\n",
    ),
    "qwen3-like": (
        TURNS.replace(
            "{{ m.c", "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.c"
        )
        + ASKS
        + "{% endif %}",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nyo<|im_end|>\n",
    ),
    "phi-3-like": (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% else %}{{ eos_token }}{% endif %}",
        "user\nhi<|end|>\nassistant\n",
        "yo<|end|>\n</s>",
    ),
}
DIALOGUES = [
    user("hi"),
    user("hi") + answer("yes") + user("more"),
    [message("system", "be brief"), *user("hi")],
]


def check_dialogue(tok, prompt: list[dict], chosen: str, rejected: str) -> dict:
    rows = [{"prompt": prompt, "chosen": answer(chosen), "rejected": answer(rejected)}]
    rows += [{"chosen": prompt + answer(chosen), "rejected": prompt + answer(rejected)}]
    row, implicit = (tokenize_pair(row, tok, 999) for row in rows)
    assert row == implicit and not row["problem"] and not row["moved"]
    generation = tok.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert row["prompt"] == generation
    for completion, text in (("chosen", chosen), ("rejected", rejected)):
        whole = tok.apply_chat_template(prompt + answer(text), return_dict=False)
        assert row["prompt"] + row[completion] == whole
    return row


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_what_the_template_makes(name):
    template, prompt, completion = TEMPLATES[name]
    tok = chat(template)
    for dialogue in DIALOGUES:
        row = check_dialogue(tok, dialogue, "yo", "no")
        assert (row["prompt"] == ids(prompt, tok)) == (dialogue == user("hi"))
        assert row["chosen"] == ids(completion, tok)
        assert row["rejected"] == ids(completion.replace("yo", "no"), tok)
    # The conversations part at a user's turn: the prompt is open at the end of the assistant's before.
    chosen, rejected = (user("hi") + answer("a") + user(x) + answer("b") for x in "xy")
    row = tokenize_pair({"chosen": chosen, "rejected": rejected}, tok, 999)
    assert row["prompt"] + row["chosen"] == tok.apply_chat_template(chosen, return_dict=False)
    assert row["prompt"] + row["rejected"] == tok.apply_chat_template(rejected, return_dict=False)


@pytest.mark.parametrize("name", [PHI3])
def test_phi_3_ends_a_chat_once(name):
    tok = tokenizer(name)
    for dialogue in DIALOGUES:
        row = check_dialogue(tok, dialogue, "Yes, please.", "No.")
        assert tok.convert_ids_to_tokens(row["prompt"])[-1] == "<|assistant|>"
        for completion in (row["chosen"], row["rejected"]):
            assert tok.convert_ids_to_tokens(completion)[-2:] == ["<|end|>", "<|endoftext|>"]
            assert tok.eos_token_id not in row["prompt"] + completion[:-1]
            assert tok.bos_token_id not in row["prompt"] + completion


def test_a_generation_prompt_that_the_finished_chat_lacks_is_left_out(tmp_path, capsys):
    tok = chat(TURNS + ASKS + "<think>\n{% endif %}")
    rows = [FORMATS["conversations"]("hi", "yo", "no")] * 2
    train, _ = load(write(tmp_path / "pairs.jsonl", rows), tok)
    assert train.rows["prompt"][0] == ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", tok)
    assert train.rows["chosen"][0] == ids("yo<|im_end|>\n", tok)
    assert len(re.findall("in 2 training .*completion", capsys.readouterr().out)) == 1


@needs_shared
def test_politeness_pairs(capsys):
    tok, path = tokenizer("phi-3-mini-tokenizer"), SHARED / "data" / "politeness"
    for name, pairs in zip(("train", "test"), load(path, tok), strict=True):
        raw = [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]
        assert len(pairs.rows) == sum(row["chosen"] != row["rejected"] for row in raw) > 99
        for completions in (pairs.rows["chosen"], pairs.rows["rejected"]):
            assert {tuple(ids[-2:]) for ids in completions} == {(32007, 32000)}  # <|end|><|endoftext|>
    assert "spans" not in capsys.readouterr().out


# ------------------------------------------------------------------------------- what is cut, dropped,
# refused


@pytest.mark.parametrize("max_length", range(1, 12))
def test_max_length_cuts_the_ends_of_completions(max_length):
    row = tokenize_pair({"prompt": "12345", "chosen": "abc", "rejected": "abxy z"}, tokenizer(), max_length)
    if max_length <= 5:
        assert f"no room within max_length {max_length}" in row["problem"]
    elif max_length <= 7:  # "a", "ab"
        assert "identical" in row["problem"]
    else:
        assert not row["problem"] and row["prompt"] == ids("12345")
        assert row["prompt"] + row["chosen"] == ids("12345abc</s>")[:max_length]
        assert row["prompt"] + row["rejected"] == ids("12345abxy z</s>")[:max_length]


EMPTY = [
    ("a", "", "b"),
    ("a", "b", None),
    (None, "", ""),
    (user("a"), answer(""), answer("b")),
    (user("a"), [], answer("b")),
]
EMPTY += [(None, user("a") + answer("b"), user("a") + answer("")), (user("a"), "b", "")]


@pytest.mark.parametrize("prompt, chosen, rejected", EMPTY)
def test_empty_completions_are_found(prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert tokenize_pair(row, tokenizer(), 99)["problem"] == "a completion is empty"


def test_completions_without_a_token_are_empty():
    tok = tokenizer()
    tok.backend_tokenizer.normalizer = Strip()
    for prompt in ("", "a</s>"):
        row = tokenize_pair({"prompt": prompt, "chosen": " ", "rejected": "b"}, tok, 99)
        assert row["problem"] or row["chosen"] and row["rejected"]


def test_dropped_pairs_are_counted_and_the_others_keep_what_is_theirs(tmp_path, capsys):
    pairs = [("123456789", "a", "b"), ("1", "", "b"), ("2", "a", "b"), ("3", "abc", "abc"), ("1", "a", "")]
    pairs += [("12", "abcdefgh", "abcdefxy"), ("4", "a", "b"), ("123456789", "a", "")]
    rows = [
        dict(zip(("prompt", "chosen", "rejected"), p, strict=True), answer=f"{i}")
        for i, p in enumerate(pairs)
    ]
    train, _ = load(write(tmp_path / "pairs.jsonl", rows), max_length=8)
    assert train.rows["answer"] == ["2", "6"]
    assert train.rows["prompt"] == [ids("2"), ids("4")] and train.lengths.tolist() == [[1, 2, 2]] * 2
    dropped = dict(re.findall(r"(\d+ of 8) training \w+ dropped: (.*)", capsys.readouterr().out))
    assert Counter(dropped) == {
        "3 of 8": "a completion is empty",
        "2 of 8": "the completions are identical",
        "1 of 8": "the prompt leaves no room within max_length 8",
    }


def test_a_thousand_dropped_pairs_do_not_hide_the_next(tmp_path):
    rows = [FORMATS["texts"]("1", "", "b")] * 1001 + [FORMATS["texts"]("1", "a", "b")]
    assert len(load(write(tmp_path / "pairs.jsonl", rows))[0].rows) == 1


PAIR = {"prompt": "1", "chosen": "one", "rejected": "two"}
CHAT = FORMATS["conversations"]("1", "a", "b")
REFUSES = "{{ raise_exception('no system role') }}"
ERRORS = {  # rows or the content of a file, what the message has to say
    "all dropped": ([PAIR | {"chosen": ""}], "no training"),
    "no column": ([{"question": "1", "chosen": "a"}], "question, chosen"),
    "no template": ([CHAT], "chat template"),
    "no template for prompts": ([CHAT | {"chosen": "a", "rejected": "b"}], "chat template"),
    "a template that refuses": ([CHAT], "no system role"),
    "another split": ([PAIR], "'validation'; it has train"),
    "no file": (None, "pairs.jsonl"),
    "no content": ("", "pairs.jsonl: ."),
    "malformed": ('{"prompt": "1", "cho', "JSON"),
    "numbers": ([PAIR | {"chosen": 1, "rejected": 2}], "text"),
    "dates": ([PAIR | {"chosen": "2020-01-01", "rejected": "2020-01-02"}], "text"),
    "prompts that are numbers": ([PAIR | {"prompt": 1}], "text"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_one_line(error, tmp_path):
    content, says = ERRORS[error]
    tok, path = tokenizer(), tmp_path / "pairs.jsonl"
    if "template" in error:
        tok.chat_template = REFUSES if "refuses" in error else None
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content[0]))
    with pytest.raises(SystemExit) as stop:
        load(path, tok, dataset_train_split="validation" if "split" in error else "train")
    assert re.match(f"error: .*{says}", str(stop.value)) and "\n" not in str(stop.value)


def test_tokens_are_not_those_of_an_earlier_version_of_the_code(tmp_path, monkeypatch):
    """datasets caches by the name of a function in a module, not by its content."""
    path = write(tmp_path / "pairs.jsonl", [PAIR])
    assert load(path)[0].rows["prompt"] == [ids("1")]
    assert load(path, max_length=3)[0].rows["chosen"] == [ids("on")]
    edited = tmp_path / "common.py"
    edited.write_text(
        Path(common.__file__).read_text().replace("text, bos, eos = prompt", "text, bos, eos = '0' + prompt")
    )
    spec = importlib.util.spec_from_file_location("common", edited)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "common", module)
    spec.loader.exec_module(module)
    rows = module.load_pairs(module.Arguments(dataset_name=str(path)), tokenizer())[0].rows
    common.AttentionInterface.register("packed", common.packed_attention)  # as it was
    assert rows["prompt"] == [ids("01")]


# ---------------------------------------------------------------------------------------------------- batches


def some_lengths(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(1, 50, (n, 3))


@fast
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.integers(0, 99))
def test_an_epoch_has_no_row_twice_and_batches_are_sorted(n, size, epochs, seed):
    lengths, args = some_lengths(n), Arguments(batch_size=size, num_train_epochs=epochs, seed=seed)
    if n < size:
        with pytest.raises(SystemExit, match=f"error: {n} pairs .* {n} at most"):
            global_batches(lengths, args)
        return
    batches = global_batches(lengths, args)
    assert batches.shape == (n // size * epochs, size)
    for epoch in batches.reshape(epochs, -1):
        assert len({*epoch}) == len(epoch) and {*epoch} <= {*range(n)}
    assert (np.diff(lengths.sum(1)[batches], axis=1) >= 0).all()


@pytest.mark.parametrize(
    "pairs, epochs, steps", [(59, 1, 5), (59, 0.5, 3), (59, 2.2, 11), (59, 0.01, 1), (500, 1.1, 55)]
)
def test_epochs_and_steps(pairs, epochs, steps):
    lengths = some_lengths(pairs)
    batches = global_batches(lengths, Arguments(batch_size=10, num_train_epochs=epochs))
    assert len(batches) == steps
    longer = global_batches(lengths, Arguments(batch_size=10, num_train_epochs=epochs, max_steps=steps + 20))
    assert len(longer) == steps + 20 and (longer[:steps] == batches).all()
    assert len(global_batches(lengths, Arguments(batch_size=10, num_train_epochs=9, max_steps=2))) == 2


def test_batches_are_random_samples_by_seed_and_epoch(monkeypatch):
    lengths = some_lengths(43)
    args = Arguments(batch_size=10, num_train_epochs=20, seed=1)
    batches = global_batches(lengths, args)
    samples = Counter(frozenset(batch.tolist()) for batch in batches)
    samples.update(
        frozenset(batch.tolist()) for batch in global_batches(lengths, Arguments(**vars(args) | {"seed": 2}))
    )
    assert samples.most_common(1)[0][1] == 1  # no batch comes again
    assert {*range(43)} == {*batches.flat}  # what an epoch leaves out, others have
    short = [lengths.sum(1)[batch].max() for batch in batches]
    assert np.median(short) > np.quantile(lengths.sum(1), 0.8)  # a batch has pairs of all lengths
    monkeypatch.setenv("RANK", "3"), monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setattr(common.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 5)
    np.random.seed(3)
    assert (global_batches(lengths, args) == batches).all()


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_processes_share_a_batch(world, size, monkeypatch):
    draw = np.random.default_rng(0)
    lengths = some_lengths(20)
    columns = {p: [draw.integers(3, 60, n).tolist() for n in lengths[:, i]] for i, p in enumerate(PAIR)}
    pairs = Pairs(datasets.Dataset.from_dict(columns), lengths, reference_logps=draw.random((20, 2)))
    batch, seen, numbers = draw.permutation(20)[:12], [], set()
    monkeypatch.setattr(common.dist, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(common.dist, "get_rank", lambda rank=rank: rank)
        parts = [*micro_batches(pairs, batch, size, torch.device("cpu"))]
        numbers.add(len(parts))
        for part in parts:
            seen += part.rows.tolist()
            assert len(part.rows) <= size and part.step_pairs == 12
            assert part.step_tokens == tuple(lengths[batch].sum(0))
            assert part.lengths.tolist() == lengths[part.rows, 1:].tolist()
            labels = [t for row in part.rows for p in ("chosen", "rejected") for t in columns[p][row]]
            assert part.labels.tolist() == labels
            assert part.reference_logps.tolist() == pairs.reference_logps[part.rows].tolist()
    assert sorted(seen) == sorted(batch) and len(numbers) == 1
