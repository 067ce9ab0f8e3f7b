"""What a newcomer meets: data in other shapes, splits, --help, and what a run prints. Each trap says so."""

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from conftest import METHODS, ROOT, parse, run_script
from test_data import TOY, answer, ids, load, pair, user, write
from test_runs import SHORT, last_wins, run, stop, succeed

import common
import dpo
from common import FILES, Arguments, tokenize

ONE = pair("1", "one", "two")
CHAT = pair(user("12"), answer("twelve"), answer("ten two"))


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def numbered(n: int) -> list[dict]:
    return [pair(f"{i}", "one", "two") | {"answer": str(i)} for i in range(n)]


# ----------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "n, size", [(4, 0), (5, 1), (100, 20), (320, 64), (3200, 64), (5000, 100), (30000, 512)]
)
def test_a_share_is_held_out_where_there_is_no_test_split(n, size, tmp_path, capsys):
    args = Arguments(dataset_name=str(write(tmp_path / "pairs.jsonl", numbered(n))))
    splits, again = (common.read_splits(args, ("prompt", "chosen", "rejected")) for _ in range(2))
    assert f"{size} of {n} rows are held out for evaluation" in capsys.readouterr().out
    assert [len(splits[name]) for name in splits] == [n - size, size][: 1 + (size > 0)]
    assert sorted(int(answer) for split in splits.values() for answer in split["answer"][:]) == [*range(n)]
    assert all(splits[name]["answer"][:] == again[name]["answer"][:] for name in splits)


def test_held_out_rows_are_said_and_evaluated(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", numbered(50))
    train, test = load(path, eval_strategy="steps")
    assert (len(train.tokens), len(test.tokens)) == (40, 10)
    assert "10 of 50 rows are held out for evaluation; --eval_strategy no" in capsys.readouterr().out
    assert {*train.raw["prompt"]} | {*test.raw["prompt"]} == {str(i) for i in range(50)}
    assert load(path)[1] is None and len(load(path)[0].tokens) == 50  # with eval_strategy no


@pytest.mark.parametrize("name", "test validation valid dev eval test_prefs test_sft".split())
def test_test_splits_are_found_under_their_usual_names(tmp_path, name, capsys):
    splits = {"train_prefs": numbered(6), name: numbered(2), "other": numbered(3)}
    data = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})
    data.save_to_disk(tmp_path / "saved")
    train, test = load(tmp_path / "saved")
    assert (len(train.tokens), len(test.tokens)) == (6, 2)
    said = capsys.readouterr().out
    assert "6 rows in the train_prefs split" in said and f"2 rows in the {name} split" in said
    _, test = load(tmp_path / "saved", dataset_test_split="other")
    assert len(test.tokens) == 3
    with pytest.raises(
        SystemExit, match="--dataset_train_split and --dataset_test_split have to be among train_prefs, "
    ):
        load(tmp_path / "saved", dataset_test_split="nothing")


def test_without_a_training_split_its_name_is_asked_for(tmp_path):
    datasets.DatasetDict({"mine": datasets.Dataset.from_list([ONE])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        SystemExit, match="--dataset_train_split and --dataset_test_split have to be among mine"
    ):
        load(tmp_path / "saved")
    assert len(load(tmp_path / "saved", dataset_train_split="mine")[0].tokens) == 1


def test_only_some_rows_for_a_first_try(tmp_path):
    path = write(tmp_path / "pairs.jsonl", numbered(50))
    assert load(path, max_train_samples=7)[0].raw["answer"][:] == [str(i) for i in range(7)]
    assert len(load(path, max_train_samples=70)[0].tokens) == 50


def test_a_batch_has_no_more_pairs_than_there_are(tmp_path, capsys):
    train, _ = load(write(tmp_path / "pairs.jsonl", numbered(5)))
    batches = common.global_batches(train, Arguments(batch_size=64, num_train_epochs=3))
    said = capsys.readouterr().out
    assert (
        batches.shape == (3, 5)
        and "3 steps, each of 5 of the 5 rows; so few change little: aim at 100" in said
    )
    assert common.global_batches(train, Arguments(batch_size=5, max_steps=20)).shape == (20, 5)
    assert "20 steps, each of 5 of the 5 rows\n" in capsys.readouterr().out


def test_all_processes_get_equally_many_of_few_rows(tmp_path, monkeypatch):
    train, _ = load(write(tmp_path / "pairs.jsonl", numbered(5)))
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 2)
    assert common.global_batches(train, Arguments(batch_size=64)).shape == (1, 4)
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 8)
    with pytest.raises(SystemExit, match="8 processes need at least 8 rows; there are 5"):
        common.global_batches(train, Arguments(batch_size=64))


# ------------------------------------------------------------------------------------------ files and columns


def test_files_are_read_by_their_suffix(tmp_path):
    want = load(write(tmp_path / "a.json", [ONE]))[0].tokens[:]
    for suffix in FILES:
        path = write(tmp_path / f"b{suffix}", [ONE])
        if suffix == ".tsv":
            path.write_text("prompt\tchosen\trejected\n1\tone\ttwo\n")
        elif suffix == ".csv":
            path.write_text("prompt,chosen,rejected\n1,one,two\n")
        assert load(path)[0].tokens[:] == want
    datasets.Dataset.from_list([ONE]).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved")[0].tokens[:] == want


def test_columns_that_are_not_used_are_named_once(tmp_path, capsys):
    rows = {"system": "s", "score": 1.0, "answer": "one", "tools": None} | ONE
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", [rows])
    load(tmp_path / "data")
    assert re.findall("not used: (.*)", capsys.readouterr().out) == ["system, score"]
    load(write(tmp_path / "one.jsonl", [ONE]))
    assert "not used" not in capsys.readouterr().out


def test_pairs_without_a_prompt_are_dropped_and_a_file_of_them_is_refused(tmp_path, capsys):
    shared = {"chosen": "2 + 2 = four", "rejected": "2 + 2 = five"}
    odd = {"question": "q", "chosen": "one", "rejected": "two"}
    train, _ = load(write(tmp_path / "few.jsonl", [shared, shared, odd]))
    assert len(train.tokens) == 2
    assert "1 of 3 rows (33.3%) of the train split are dropped: there is no prompt" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="found question, .*--rename_columns question=prompt"):
        load(write(tmp_path / "many.jsonl", [odd, odd, shared | {"question": "q"}]))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_columns_are_renamed(tmp_path, suffix):
    path, rows = tmp_path / f"pairs{suffix}", [{"query": "007", "good": "one", "bad": "two"}] * 3
    if suffix in (".csv", ".tsv"):  # a column that is renamed is read as text as well
        separator = "," if suffix == ".csv" else "\t"
        path.write_text("\n".join(separator.join(row) for row in [rows[0], *(row.values() for row in rows)]))
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{FILES[suffix]}")(path)
    with pytest.raises(SystemExit, match="found query, good, bad; .*--rename_columns query=prompt"):
        load(path)
    with pytest.raises(SystemExit, match="found prompt, good, bad; see --rename_columns"):
        load(path, rename_columns=["query=prompt"])
    train, test = load(path, rename_columns=["query=prompt", "good=chosen", "bad=rejected"])
    assert train.tokens[0] == {
        "prompt": ids("007"),
        "chosen": ids("one") + [TOY.eos_token_id],
        "rejected": ids("two") + [TOY.eos_token_id],
    }


def test_texts_for_a_model_with_a_chat_template_are_pointed_out(tmp_path, capsys):
    load(write(tmp_path / "texts.jsonl", [ONE]))
    assert 'messages do: "prompt": [{"role": "user", "content": ...}]' in capsys.readouterr().out
    load(write(tmp_path / "chat.jsonl", [CHAT]))
    assert "messages do" not in capsys.readouterr().out


def test_the_first_row_is_short_and_shows_the_end_token(tmp_path, capsys):
    load(write(tmp_path / "long.jsonl", [pair("1" * 900, "one", "two")]), max_length=2000)
    (line,) = re.findall("the first row: (.*)", capsys.readouterr().out)
    assert len(line) < 300 and "..." in line and "chosen 'one</s>'" in line and "rejected 'two</s>'" in line


# --------------------------------------------------------------------------------------------------- messages


def test_content_in_parts_is_joined_and_other_parts_are_refused_by_name(tmp_path):
    def parts(*texts: str) -> list[dict]:
        return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]

    train, _ = load(write(tmp_path / "parts.jsonl", [CHAT | {"prompt": parts("1", "2")}]))
    assert train.tokens["prompt"][:] == [ids("<s>12=")]
    image = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    problem = tokenize(CHAT | {"prompt": image}, TOY, ("chosen", "rejected"), 99, 1)["note"]
    assert "a message has a part of type image, which this model does not read" in problem


SHOWS = (
    "{% for t in tools or [] %}tool {{ t.name }} {{ t.args | tojson }} {% endfor %}"
    "{% if thinking %}think {% endif %}"
)


@pytest.mark.parametrize("tools", [[{"name": "f", "args": {"a": 1}}], '[{"name": "f", "args": {"a": 1}}]'])
def test_templates_get_tools_and_options_of_the_row(tmp_path, tools):
    tok = common.transformers.AutoTokenizer.from_pretrained(common.TOY_MODEL)
    tok.add_tokens(["\n", '"', "{", "}", ":"])
    tok.chat_template = SHOWS + tok.chat_template
    rows = [CHAT | {"tools": tools, "chat_template_kwargs": {"thinking": True}}]
    train, _ = load(write(tmp_path / "tools.jsonl", rows), tok)
    assert tok.decode(train.tokens["prompt"][0]) == 'tool f {"a": 1} think <s>12='
    train, _ = load(write(tmp_path / "none.jsonl", [CHAT]), tok)
    assert tok.decode(train.tokens["prompt"][0]) == "<s>12="


def test_arrows_missing_fields_do_not_reach_the_template():
    """Of two tools with different arguments, Arrow gives each the other's, as None."""
    tools = [{"name": "f", "a": 1, "b": None}, {"name": "g", "a": None, "b": [{"c": None}]}]
    assert common.clean(tools) == [{"name": "f", "a": 1}, {"name": "g", "b": [{}]}]


# ------------------------------------------------------------------------------------------- what is too long


@pytest.mark.parametrize("max_length", [6, 8, 12, 20])
def test_truncate_prompt_keeps_the_end_of_a_text(max_length, tmp_path, capsys):
    text = "123456789"
    for prompt in (text, "<s>" + text):
        row = pair(prompt, "abc", "xy")
        kept = tokenize(row, TOY, ("chosen", "rejected"), max_length, 1, truncate_prompt=True)
        whole, bos = ids(prompt), ids(prompt)[:1] if prompt != text else []
        assert (
            not kept["note"].startswith("dropped") and len(kept["prompt"]) + len(kept["chosen"]) <= max_length
        )
        # Completions get what they need, up to half of max_length.
        space = max_length - min(max_length // 2, len(ids("abc</s>")))
        if len(whole) <= space:
            assert kept["prompt"] == whole
        else:
            assert kept["prompt"] == bos + whole[len(whole) - space + len(bos) :]
            assert kept["note"] == "cut to fit max_length"


def test_truncate_prompt_keeps_the_system_message_and_the_latest_turns():
    tok = common.transformers.AutoTokenizer.from_pretrained(common.TOY_MODEL)
    tok.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    tok.chat_template += "{% if add_generation_prompt %}a{% endif %}"
    system = [{"role": "system", "content": "0"}]
    turns = [*user("1"), *answer("2"), *user("3"), *answer("4"), *user("5")]

    def prompt(max_length: int, messages: list) -> str:
        row = pair(messages, answer("67"), answer("8"))
        found = tokenize(row, tok, ("chosen", "rejected"), max_length, 1, truncate_prompt=True)
        return tok.decode(found["prompt"]) or found["note"]

    assert prompt(99, system + turns) == "s0u1a2u3a4u5a"
    assert prompt(15, system + turns) == "s0u1a2u3a4u5a"  # there is room for both tokens of the answer
    assert prompt(14, system + turns) == prompt(11, system + turns) == "s0u3a4u5a"
    assert prompt(10, system + turns) == "s0u5a"
    assert prompt(9, turns) == "u3a4u5a" and prompt(6, turns) == "u5a"
    assert "leaves too little room" in prompt(3, turns)  # the last turn alone is too long


def test_what_is_cut_is_counted(tmp_path, capsys):
    rows = [pair("123", "abcdef", "abc"), pair("123", "a", "b"), pair("12345678", "a", "b")]
    rows.append(
        pair("123", "abcdefgh", "abcdefxy")
    )  # identical once it is cut: dropped, and not counted twice
    load(write(tmp_path / "pairs.jsonl", rows), max_length=8)
    said = capsys.readouterr().out
    assert "1 of 4 rows (25.0%) of the train split are cut to fit max_length" in said
    assert "1 of 4 rows (25.0%) of the train split are dropped: the prompt leaves too little room" in said
    load(tmp_path / "pairs.jsonl", max_length=8, truncate_prompt=True)
    said = capsys.readouterr().out
    assert "dropped: the prompt" not in said and "2 of 4 rows (50.0%) of the train split are cut" in said


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_texts_that_lack_the_bos_token_of_the_template_are_said(tmp_path, capsys, bos):
    load(write(tmp_path / "pairs.jsonl", [pair(f"{bos}1", "one", "two")]))
    said = capsys.readouterr().out
    assert ("the chat template begins with <s>, which these texts lack" in said) == (not bos)
    load(write(tmp_path / "chat.jsonl", [CHAT]))  # the template writes it
    assert "lack" not in capsys.readouterr().out


def test_texts_that_the_tokenizer_does_not_know_are_counted(tmp_path, capsys):
    rows = [pair("1", "one", "two"), pair("2%", "two", "one"), pair("3", "thr€e", "two")]
    train, _ = load(write(tmp_path / "pairs.jsonl", rows))
    said = "2 of 3 rows (66.7%) of the train split are in part unknown to the tokenizer, which writes <unk>"
    assert said in capsys.readouterr().out and len(train.lengths) == 3
    # Some tokenizers, such as GPT-2's, name their EOS as the unknown token, and write it after every text.
    tok = common.transformers.AutoTokenizer.from_pretrained(common.TOY_MODEL)
    tok.unk_token = tok.eos_token
    assert not tokenize(rows[0], tok, ("chosen", "rejected"), 99)["note"]


# ---------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("method", METHODS)
def test_help_has_each_flag_once_with_the_defaults_of_a_real_run(monkeypatch, capsys, method):
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, method, "--help")
    text = capsys.readouterr().out
    flags = re.findall(r"^  --(\w+) +(\S.*)$", text, re.MULTILINE)
    args = parse(monkeypatch, method, "--model_name_or_path m --dataset_name d " + XPO[method == "xpo"])
    names = {name for name in vars(args) if name != "data_digest"}
    assert stopped.value.code == 0 and len(flags) == len(names) and {name for name, _ in flags} == names
    assert str(ROOT) not in text and max(map(len, text.splitlines()[:-1])) < 240
    groups = re.findall(r"^(\w+)$", text, re.MULTILINE)
    assert groups == [method, "model", "data", "optimization", "memory", "evaluation", "output"]
    own = {name for name, _ in flags[: len(names - {f.name for f in common.fields(Arguments)})]}
    assert own.isdisjoint(f.name for f in common.fields(Arguments))  # the method's own come first
    helps = dict(flags)
    rate = float(re.search(r"\[([\d.e-]+)", helps["learning_rate"])[1])
    assert rate == args.learning_rate and "[64]" in helps["batch_size"]
    assert "max_steps 60" in text if method == "xpo" else "max_steps 100" in text


XPO = ("", "--reward_model_path r")


def test_flags_that_people_try(monkeypatch):
    assert parse(monkeypatch, "dpo", "--bf16").bf16 is True
    assert (
        parse(monkeypatch, "dpo", "--bf16 false").bf16 is False and parse(monkeypatch, "dpo", "").bf16 is None
    )
    assert parse(monkeypatch, "xpo", "--warmup_ratio 0.2").warmup_steps == 0.2  # in TRL's XPO command
    assert parse(monkeypatch, "dpo", "--warmup_ratio=0.2").warmup_steps == 0.2


def test_runs_have_directories_of_their_own(monkeypatch):
    assert parse(monkeypatch, "dpo", "").output_dir == "output/toy-dpo"
    args = parse(monkeypatch, "orpo", "--model_name_or_path Qwen/Qwen2-0.5B --dataset_name d")
    assert args.output_dir == "output/Qwen2-0.5B-orpo"
    args = parse(monkeypatch, "cpo", "--model_name_or_path output/toy-dpo/ --dataset_name d")
    assert args.output_dir == "output/toy-dpo-cpo"
    assert parse(monkeypatch, "cpo", "--loss_type simpo").output_dir == "output/toy-cpo-simpo"
    assert parse(monkeypatch, "dpo", "--loss_type sigmoid sft").output_dir == "output/toy-dpo-sft"
    args = parse(monkeypatch, "cpo", "--model_name_or_path . --dataset_name d")
    assert args.output_dir == f"output/{Path.cwd().name}-cpo"


def test_another_run_is_told_apart_by_three_differences_and_both_ways_out(tmp_path):
    args = dict(model_name_or_path="m", dataset_name="d", output_dir=str(tmp_path))
    common.write_run(dpo.Arguments(**args), finished=False)
    changed = dpo.Arguments(**args, beta=0.2, seed=1, max_length=7, max_steps=3, learning_rate=1.0)
    with pytest.raises(SystemExit) as stopped:
        common.check_output_dir(changed)
    said = str(stopped.value)
    assert said.count("(now") == 3 and "and 2 more;" in said and len(said) < 400
    assert "another --output_dir" in said and "or delete that one" in said
    with pytest.raises(SystemExit, match="beta 0.1 \\(now 0.2\\); choose"):
        common.check_output_dir(dpo.Arguments(**args, beta=0.2))


# ------------------------------------------------------------------------------------------------ the console


@pytest.mark.parametrize("script", ["dpo.py", "xpo.py"])
def test_what_a_run_prints(tmp_path, script):
    said = succeed(script, tmp_path / "out", *SHORT, "--logging_steps", "2", "--learning_rate", "1e-2")
    lines = said.splitlines()
    assert max(map(len, lines)) <= 240 and said.count("log-probabilities: packed") == 1
    reports = [line for line in lines if re.match(r"step \d+/6 ", line)]
    assert len(reports) == 3 and max(map(len, reports)) <= 120
    names = ["loss", "margin", "accuracy", "log π chosen", "rejected", "lr", "pairs/s"]
    assert all(re.search(f"  {name} \\S", line) for line in reports for name in names)
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    first, last = (
        {k: v for k, v in row.items() if k.startswith("eval_")} for row in (metrics[0], metrics[-1])
    )
    table = dict(
        re.findall(
            r"^    (\S+) +([-\d.e]+ +[-\d.e]+)$", said.split("evaluation after 6 of 6")[1], re.MULTILINE
        )
    )
    assert {f"eval_{name}" for name in table} == first.keys() == last.keys()
    for name, numbers in table.items():
        want = [first[f"eval_{name}"], last[f"eval_{name}"]]
        assert [float(x) for x in numbers.split()] == pytest.approx(want, rel=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    prompts = re.findall("^    prompt    (.*)$", said, re.MULTILINE)
    assert {*prompts} <= {repr(row["prompt"]) for row in rows} and len(prompts) >= 3 * 3
    for name, step in (("before", 0), ("now", 6)):  # of the last evaluation
        shown = re.findall(f"^    {name:<10}(.*)$", said.split("evaluation after 6 of 6")[1], re.MULTILINE)
        assert {*shown} <= {repr(row["greedy"]) for row in rows if row["step"] == step}
    assert {row["row"] for row in rows} == {0, 12, 25, 37}  # spread over the 50 test rows
    if script == "xpo.py":
        winners = re.findall("^    winner    '(.*)'$", said, re.MULTILINE)
        assert len(winners) == len(prompts) and {*winners} <= {"policy", "reference", "neither"}
    at_start = said.split("evaluation after 0 of 6")[1].split("step 2/6")[0]
    assert "before" in at_start and "now" not in at_start  # there is only one model yet
    end = lines[-3:]
    assert [re.sub(" .*", "", line.strip()) for line in end] == ["finished:", "plot:", "chat:"]
    assert all((ROOT / re.search(r"python (\S+)", line)[1]).exists() for line in end[1:])


def test_samples_without_an_answer_are_beside_the_chosen_one(tmp_path):
    data = write(tmp_path / "pairs.jsonl", [pair(f"{i}", f"{i} one", "two") for i in range(40)])
    flags = ["--model_name_or_path", common.TOY_MODEL, "--dataset_name", str(data)]
    flags += ["--max_steps", "1", "--batch_size", "8", "--max_new_tokens", "2"]
    said = succeed("dpo.py", tmp_path / "out", *flags)
    rows = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and all(row["chosen"] == f"{row['prompt']} one" for row in rows)
    assert {*re.findall("^    chosen    '(.*)'$", said, re.MULTILINE)} <= {row["chosen"] for row in rows}


def test_a_resumed_run_still_compares_with_the_start(tmp_path):
    flags = last_wins([*SHORT, "--save_steps", "1"])
    whole = succeed("dpo.py", tmp_path / "a", *flags)
    stop("dpo.py", tmp_path / "b", *flags, after_steps=4, by=common.signal.SIGKILL)
    resumed = succeed("dpo.py", tmp_path / "b", *flags)
    assert "resuming after step" in resumed
    assert (
        resumed.split("evaluation after 6")[1].split("finished")[0]
        == (whole.split("evaluation after 6")[1].split("finished")[0])
    )


def test_a_batch_that_shrank_is_resumed_with_what_was_asked_for(tmp_path):
    path = write(tmp_path / "pairs.jsonl", numbered(5))
    flags = ["--model_name_or_path", common.TOY_MODEL, "--dataset_name", str(path), "--eval_strategy", "no"]
    said = succeed("orpo.py", tmp_path / "out", *flags, "--max_steps", "2")
    assert "each of 5 of the 5 rows" in said
    assert json.loads((tmp_path / "out" / "run.json").read_text())["batch_size"] == 64
    assert "finished already" in succeed("orpo.py", tmp_path / "out", *flags, "--max_steps", "2")
    result = run("orpo.py", tmp_path / "out", *flags, "--max_steps", "2", "--batch_size", "5")
    assert "batch_size 64 (now 5)" in result.stderr
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in metrics] == [1, 2]


def test_the_bar_says_that_it_evaluates_and_leaves_that_time_out(tmp_path):
    args = dpo.Arguments("m", dataset_name="d", output_dir=str(tmp_path), eval_steps=2)
    data = common.Data(None, None, torch.ones(8, 3))
    log = common.Log(args, 0, torch.zeros(4, 8), data)
    assert not log.evaluation_due(1) and log.bar.desc == ""
    assert log.evaluation_due(2) and log.bar.desc == "evaluating"
    started, log.time = log.bar.start_t, log.time - 100
    log.evaluation(2, {"loss": 1.0}, [])
    assert log.bar.desc == "" and log.bar.start_t == pytest.approx(started + 100, abs=5)
    log.close()
