"""tests/bench: make_stories.py on random models of ten words, step.py, tables.py, memory.py and chat.py."""

import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.autograd import DeviceType
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import step  # noqa: E402
import tables  # noqa: E402

WORDS = ["Ann", "Ben", "Lily", "Tom", "Sue", "Sam", "Max", "."]
VOCABULARY = {word: i for i, word in enumerate(["<s>", "</s>", *(f"▁{word}" for word in WORDS[:-1]), "."])}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a model, and with texts of five sentences, of which some begin alike."""
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="</s>"))
    split = pre_tokenizers.Split(".", "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Metaspace(prepend_scheme="first")])
    core.decoder = decoders.Metaspace()  # takes the first space away, as Llama's does
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    config = LlamaConfig(
        **sizes, num_attention_heads=2, initializer_range=0.5, bos_token_id=0, eos_token_id=1
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[:2] = 0  # rarely an end
    model.generation_config.update(top_k=1, do_sample=True)  # which must not count
    model.save_pretrained(tmp_path / "model")
    rng = random.Random(0)
    texts = [
        " ".join(f"{' '.join(rng.choices(WORDS[:-1], k=rng.randint(1, 4)))}." for _ in range(5))
        for _ in range(120)
    ]
    (tmp_path / "texts.txt").write_text("\n".join(["Too. Short.", *texts, *texts[:9]]))
    monkeypatch.chdir(tmp_path)
    verbosity = transformers.utils.logging.get_verbosity()
    yield texts
    transformers.utils.logging.set_verbosity(verbosity)


def make(
    monkeypatch, out: str, flags: str = "", texts: str = "texts.txt", model: str = "model"
) -> list[list]:
    """The rows of train.jsonl and of test.jsonl."""
    monkeypatch.setattr(sys, "argv", ["make_stories.py", model, texts, out, *flags.split()])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(ROOT / "tests/bench/make_stories.py"), run_name="__main__")
    files = [Path(out, f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    return [[json.loads(line) for line in lines] for lines in files]


def samples(splits: list[list]) -> dict[str, str]:
    return {row["prompt"]: row["rejected"] for rows in splits for row in rows}


def test_pairs_are_from_texts_and_no_text_is_in_both_splits(world, monkeypatch, capsys):
    train, test = make(monkeypatch, "out", "--test_share 0.2")
    found = []  # by split, the texts that its pairs are from
    for rows in (train, test):
        found.append(set())
        for row in rows:
            assert list(row) == ["prompt", "chosen", "rejected"] and row["chosen"] != row["rejected"]
            assert [row[x].count(".") for x in ("prompt", "chosen")] == [2, 2]
            assert (
                row["rejected"][0] in " ." and row["rejected"][-1] == "." and row["rejected"].count(".") >= 1
            )
            found[-1] |= {text for text in world if text.startswith(row["prompt"] + row["chosen"])}
        assert len(found[-1]) >= len(rows)
    assert not found[0] & found[1] and len(test) == round(0.2 * (len(train) + len(test)))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(
        f"out: {len(train)} pairs in train.jsonl, {len(test)} in test.jsonl; texts left out: "
    )
    counts = [int(count) for count in re.findall(r"(\d+) w", line)]
    assert "1 with too few sentences, " in line and sum(counts) + len(train) + len(test) == len(world) + 10


def test_a_seed_gives_the_same_files_and_another_one_other_samples(world, monkeypatch):
    one, same, other = (
        make(monkeypatch, f"{i}", f"--seed {seed} --pairs 30") for i, seed in enumerate([1, 1, 2])
    )
    assert one == same and [len(rows) for rows in one] == [27, 3]
    one, other = samples(one[::-1]), samples(other[::-1])  # in the order in which they were made
    both = [prompt for prompt in one if prompt in other]
    assert both and both != [prompt for prompt in other if prompt in one]
    assert sum(one[prompt] == other[prompt] for prompt in both) < len(both) / 2


def test_padding_does_not_change_samples(world, monkeypatch):
    """At a temperature of almost 0, when samples are no draws."""
    alone, together = (
        samples(make(monkeypatch, size, f"--temperature 1e-4 --max_new_tokens 20 --batch_size {size}"))
        for size in ("1", "64")
    )
    assert alone == together and len({*alone.values()}) > 5


def test_a_sample_ends_where_the_model_begins_another_text(world, monkeypatch):
    model = LlamaForCausalLM.from_pretrained("model")
    for layer in model.model.layers:  # take the layers out: a token alone decides about the next one
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    stop, word, bos = (VOCABULARY[x] for x in (".", "▁Ann", "<s>"))
    embed, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embed[:] = torch.eye(*embed.shape)
    head.zero_()
    head[stop, word] = head[word, bos] = 20.0  # logits of the next token, by this one
    head[word, stop], head[bos, stop] = 20.0, 20.0  # half of the time, " Ann" or another text follows
    model.save_pretrained("chain")
    AutoTokenizer.from_pretrained("model").save_pretrained("chain")
    found = samples(make(monkeypatch, "out", model="chain"))
    assert {*found.values()} == {" Ann.", " Ann. Ann."}
    shares = [sum(x == sample for x in found.values()) / len(found) for sample in (" Ann.", " Ann. Ann.")]
    assert abs(shares[0] - 0.5) < 0.3  # without an end it would be 0


def test_formats_of_texts(world, monkeypatch):
    Path("stories.txt").write_text("".join(f"{text}\n<|endoftext|>\n" for text in world))
    Path("lines.txt").write_text("".join(f"{text}\n" for text in world))
    Path("rows.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in world))
    one, two, three = (
        make(monkeypatch, f"{x}-out", texts=x) for x in ("stories.txt", "lines.txt", "rows.jsonl")
    )
    assert one == two == three
    Path("breaks.txt").write_text("\n<|endoftext|>\n".join(text.replace(". ", ".\n") for text in world))
    chosen = [row["chosen"] for rows in make(monkeypatch, "breaks-out", texts="breaks.txt") for row in rows]
    assert chosen and all(text[0] == "\n" and text.count("\n") == 2 for text in chosen)


def test_sentences():
    end = runpy.run_path(str(ROOT / "tests/bench/make_stories.py"))["END"]
    parts = ['"Stop!" said Mr. Lee.', " He had 3.5 cats.", ' "Why?"', "\n\n(No.)", " Oh..."]
    ends = [match.end() for match in end.finditer("".join(parts))]
    assert ends == [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    assert not list(end.finditer('Mr. Lee said, "Hi! and')) and not list(end.finditer("Mrs."))


@pytest.mark.parametrize(
    "what, message",
    [
        ({"texts": "none.txt"}, "cannot read none.txt: .*No such file"),
        ({"texts": "short.txt"}, "short.txt: 0 of 1 texts have enough sentences"),
        ({"texts": "other.jsonl"}, "cannot read other.jsonl: .*text"),
        ({"model": "none/such"}, "cannot load none/such: "),
        ({"out": "full"}, "full has a train.jsonl already"),
        ({"out": "texts.txt"}, "cannot write to texts.txt: "),
        ({"flags": "--pairs 1"}, "numbers have to be "),
    ],
)
def test_bad_input_is_one_line(world, monkeypatch, what, message):
    Path("full").mkdir()
    Path("full/train.jsonl").write_text("kept")
    Path("short.txt").write_text("One. Two.")
    Path("other.jsonl").write_text('{"story": "One. Two. Three. Four."}\n')
    with pytest.raises(SystemExit, match=f"^error: {message}.*$") as found:  # . is no line break
        make(monkeypatch, **{"out": "out"} | what)
    assert "\n" not in str(found.value) and not Path("out").exists()
    assert Path("full/train.jsonl").read_text() == "kept"


def test_collectives_of_a_step_are_those_that_the_traffic_is_computed_from():
    """Of a policy of four layers, with its backward pass, and of its reference."""
    line = "import json, memory as m; c = m.Qwen2Config(**json.loads('%s'), tie_word_embeddings=True); "
    line += "print(json.dumps([m.collectives(c, 8, group) for group in (8, 4)]))"
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    command = [sys.executable, "-c", line % json.dumps(sizes)]
    options = {"capture_output": True, "text": True, "cwd": ROOT / "tests" / "bench"}
    whole, groups = json.loads(subprocess.run(command, check=True, **options).stdout.splitlines()[-1])
    # Forward, backward without the root's weights, and the reference; each part has one gradient.
    assert whole == {"_allgather_base_": 5 + 4 + 5, "_reduce_scatter_base_": 5}
    assert groups == whole | {"allreduce_": 5}


def test_flops_are_six_of_the_policy_and_two_of_the_reference():
    sizes = dict(vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1)
    model = tiny("qwen2", **sizes, num_attention_heads=2, num_key_value_heads=1)
    # The embedding, which is the head as well; q, k, v with biases, o; the MLP; three norms.
    n = 10 * 4 + (4 * 4 + 4) + 2 * (4 * 2 + 2) + 4 * 4 + 3 * 4 * 6 + 3 * 4
    for method, want in {"dpo": 8 * n, "xpo": 8 * n, "precomputed": 6 * n, "simpo": 6 * n}.items():
        assert step.flops_per_token(model, method) == want
    model.requires_grad_(False).model.norm.requires_grad_()  # frozen weights have no gradient
    assert step.flops_per_token(model, "simpo") == 4 * n + 2 * 4


def test_a_step_counts_prompts_once_and_the_memory_of_one_contestant(monkeypatch):
    memory = SimpleNamespace(now=30, peak=0)  # 10 of a and 20 of b
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory.peak)
    monkeypatch.setattr(step, "timed", lambda step: (step(), 0.5))

    def fake(kept: int, passing: int):
        state = [kept]  # of the optimizer: the first step makes it, and later ones need more because of it

        def take():
            memory.peak = memory.now + passing
            memory.now += state.pop() if state else 0
            return 1.0, 1.0

        return SimpleNamespace(prepare=lambda pairs: None, step=take)

    contestants = {"a": fake(kept=3, passing=5), "b": fake(kept=6, passing=7)}
    args = SimpleNamespace(steps=2, names=["a", "b"], pairs=1, method="dpo")
    pairs = [{"prompt": [1, 2, 3], "chosen": [4], "rejected": [5, 6]}]
    found = step.measure(args, contestants, {"a": 10, "b": 20}, lambda seed: pairs)
    assert [found[name]["gib"] * 2**30 for name in "ab"] == [10 + 3 + 5, 20 + 6 + 7]
    assert found["a"]["tokens_per_second"] == 6 / 0.5 and found["a"]["seconds"] == 0.5


def test_a_profile_on_a_gpu_counts_every_kernel_once(monkeypatch):
    monkeypatch.setattr(step, "DEVICE", torch.device("cuda"))
    times = {"self_cpu_time_total": 1, "self_device_time_total": 7}
    kinds = [
        (DeviceType.CPU, False),
        (DeviceType.CUDA, False),
        (DeviceType.CPU, True),
    ]  # the last: annotations
    events = [SimpleNamespace(device_type=d, is_user_annotation=a, **times) for d, a in kinds]
    assert [step.self_time(event) for event in events] == [7, 0, 0]


def test_steps_of_several_lengths_and_chunks_compiled_and_not(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiled.append(forward) or forward)
    for name in ("CHUNK_LOGITS", "CHUNK_TOKENS"):
        monkeypatch.setattr(common, name, getattr(common, name))
    flags = "--names ours compiled --lengths 5 9 --pairs 1 --size 1 --steps 1 --vocabulary 64 --json"
    flags += " --chunk_logits 999 --chunk_tokens 7"
    monkeypatch.setattr(sys, "argv", ["step.py", "dpo", *flags.split()])
    step.main()
    assert (common.CHUNK_LOGITS, common.CHUNK_TOKENS) == (999, 7)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [[*line] for line in lines] == 2 * [["ours", "compiled"]]
    assert len(compiled) == 2 * 3  # layers of policy and reference of the second contestant
    for line in lines:
        assert line["compiled"]["difference"] < 1e-5 and line["ours"]["kernel"] == "cpu"
    assert lines[0]["ours"]["grad_norm"] != lines[1]["ours"]["grad_norm"]


def table(monkeypatch, capsys, flags: str) -> list[str]:
    """The lines that tables.py prints."""
    monkeypatch.setattr(sys, "argv", ["tables.py", *flags.split()])
    tables.main()
    return capsys.readouterr().out.splitlines()


def test_the_table_of_a_gpu_is_tried_on_a_cpu_only_if_one_says_so(monkeypatch, capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for flags in ("gpu", "gpu --model small", f"gpu --results {tmp_path}"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^error: this needs a GPU; .*$"):
            patch.setattr(tables, "steps", None)  # nothing is measured
            table(patch, capsys, flags)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = "gpu --model small --steps 1 --names ours --lengths summary --methods dpo --minutes 0"
    lines = table(monkeypatch, capsys, f"{flags} --results {tmp_path}")
    (row,) = [line.split(" | ") for line in lines if line.startswith("| small")]
    assert row[1:4] == ["DPO", "summary", "ours"] and float(row[4]) > 0 and row[5] == "1.00"
    assert lines[-1].startswith("4 of 5 rows are missing") and lines[-2].endswith("attention kernel: cpu")
    (content,) = json.loads((tmp_path / "gpu.json").read_text()).values()
    assert content["loss"] == pytest.approx(0.693147) and str(tmp_path) not in content["command"]


def test_the_table_of_a_gpu_goes_on_where_it_ended(monkeypatch, capsys, tmp_path):
    calls, works = [], 1  # how many of three lengths step.py measures before it fails

    def measured(method, *flags):
        names = flags[flags.index("--names") + 1 :]
        calls.append((method, flags[flags.index("--model") + 1], names, "--lora" in flags))
        row = {"seconds": 0.5, "pairs_per_second": 16.0, "mfu": 0.25, "gib": 1.0, "kernel": "flash"}
        return [{name: row for name in names}] * works

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tables, "provenance", lambda: {"device": "a GPU"})
    monkeypatch.setattr(tables, "steps", measured)
    flags = f"gpu --results {tmp_path} --methods dpo"
    first = table(monkeypatch, capsys, f"{flags} --minutes 0")
    assert calls == [("dpo", "0.5b", ("ours", "best"), False)]
    row = "| 0.5b | DPO | chat | best | 0.500 | 1.00 | 16.00 | 25.0 | 1.0 |"
    assert row in first and first[-1].startswith("27 of 29 rows are missing")
    works = 3
    lines = table(monkeypatch, capsys, flags)
    assert len([line for line in lines if line.startswith(("| 0.5b", "| 1.5b"))]) == 29
    assert not any("missing" in line for line in lines) and "a GPU; attention kernel: flash" in lines
    apart = [("dpo", "1.5b", (name,), False) for name in ("ours", "best", "compiled", "varlen")]
    assert calls[1] == calls[0] and calls[4:8] == apart and calls[8][-1] and len(calls) == 12
    table(monkeypatch, capsys, flags)
    assert len(calls) == 12


def test_lora_has_rows_of_its_own_in_the_table_against_trl(monkeypatch, capsys, tmp_path):
    timed = {name: {"pairs_per_second": 2, "times_as_long": 2, "quartiles": [1, 3]} for name in tables.NAMES}
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setattr(tables, "step", lambda *flags, **_: {"gib": 1} if "--memory" in flags else timed)
    lines = table(monkeypatch, capsys, "trl --lora")
    found = json.loads((tmp_path / "trl.json").read_text())
    assert [key for key in found if "memory" not in key] == [f"{m} chat lora" for m in tables.WITH_LORA]
    assert "dpo chat lora memory best" in found and len(found) == 3 * 6
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| DPO, LoRA", "| SimPO, LoRA", "| ORPO, LoRA"]


@pytest.mark.long
def test_memory_on_paper_is_what_both_pages_say():
    command = [sys.executable, str(ROOT / "tests" / "bench" / "memory.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    table, lora, traffic = (part.splitlines() for part in re.split("\nLoRA of|\nGB that", printed))
    front, bench = ((ROOT / name / "README.md").read_text().splitlines() for name in ("", "tests/bench"))
    rows = [row for row in table + traffic if re.match(r"\| (Qwen|Llama)", row) and " 512 | 512 " not in row]
    missing = [row for row in rows if row not in bench]
    assert {row.split("|")[1].strip() for row in missing} <= {"Llama 3 70B"} and len(missing) <= 3
    totals = {}  # of one and eight GPUs, of LoRA, of LoRA with 4 bits
    for row in table + lora:
        cells = [cell.strip() for cell in row.strip("| ").split("|")]
        if cells[0].startswith(("Qwen", "Llama")) and cells[1] not in ("64", "512"):
            totals.setdefault(cells[0].split(",")[0], []).append(cells[-2 if len(cells) > 6 else -1])
    assert all(f"| {name} | {' | '.join(sizes)} |" in front for name, sizes in totals.items()) and totals


def test_a_chat_is_one_conversation_until_a_new_one(monkeypatch, capsys):
    lines = iter(["12", "12", "/new", "12", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sys, "argv", ["chat.py", str(ROOT / "tests/toy/sft")])
    runpy.run_path(str(ROOT / "tests/bench/chat.py"), run_name="__main__")
    _, first, second, again = capsys.readouterr().out.splitlines()
    assert first == again == "twelve" != second


def test_a_chat_without_a_template_continues_the_text(monkeypatch, capsys):
    lines = iter(["<s>12=", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    flags = ["--text", "--max_new_tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["chat.py", str(ROOT / "tests/toy/sft"), *flags])
    runpy.run_path(str(ROOT / "tests/bench/chat.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[1:] == [
        "a text begins with <s> only if you write it: do so if the training data do",
        "<s>12=twe",
    ]
