"""XPO: the loss, the samples, who decides, and the whole script."""

import json
import signal
from contextlib import nullcontext
from functools import partial
from math import exp, log
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import SMALL, tiny
from test_runs import SHORT, assert_same_run, metrics_of, stop, succeed
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import common
import xpo
from common import TOY_MODEL
from dpo import dpo_loss
from xpo import judge_pairs, load_judge, load_scorer, sample, score_pairs, value_in, xpo_loss


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


# -------------------------------------------------------------------------------------------- the loss


def test_worked_example():
    """Policy -3 and -5, reference -4 and -4.5: log-ratios 1 and -.5, difference 1.5; at β .2, z = .3."""
    logps = double(-3.0), double(-5.0), double(-4.0), double(-4.5)
    for wins, z in ((True, 0.3), (False, -0.3)):
        loss = xpo_loss(*logps, torch.tensor([wins]), beta=0.2, alpha=0.01)
        assert loss.item() == pytest.approx(log(1 + exp(-z)) - 0.01 * 5)
        loss = xpo_loss(*logps, torch.tensor([wins]), beta=0.2, alpha=0.01, loss_type="ipo")
        assert loss.item() == pytest.approx(((1.5 if wins else -1.5) - 2.5) ** 2 - 0.01 * 5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_without_exploration_it_is_online_dpo(loss_type):
    y, ref, ref_y, ref_ref = (torch.randn(50, dtype=torch.float64) * 20 - 30 for _ in range(4))
    wins = torch.rand(50) < 0.5
    chosen, rejected = torch.where(wins, y, ref), torch.where(wins, ref, y)
    ref_chosen, ref_rejected = torch.where(wins, ref_y, ref_ref), torch.where(wins, ref_ref, ref_y)
    want = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, loss_type=loss_type)
    torch.testing.assert_close(
        xpo_loss(y, ref, ref_y, ref_ref, wins, beta=0.3, alpha=0, loss_type=loss_type), want
    )


def test_the_bonus_acts_on_the_references_sample_whoever_wins():
    for wins in (True, False):
        logps = double(-3.0), double(-5.0), double(-4.0), double(-4.5)
        slopes = []
        for alpha in (0.0, 0.25):
            loss = xpo_loss(*logps, torch.tensor([wins]), alpha=alpha)
            slopes.append(torch.stack([g[0] for g in torch.autograd.grad(loss.sum(), logps)]))
        torch.testing.assert_close(slopes[1] - slopes[0], torch.tensor([0, 0.25, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("options", [{"beta": 0}, {"loss_type": "hinge"}])
def test_what_is_not_defined_is_refused(options):
    with pytest.raises(ValueError):
        xpo_loss(*[double(-1.0)] * 4, torch.tensor([True]), **options)


def test_the_last_value_of_a_schedule_holds():
    assert [value_in([0.1, 0.2, 0.3], epoch) for epoch in range(5)] == [0.1, 0.2, 0.3, 0.3, 0.3]


# ----------------------------------------------------------------------------------------- the samples


def arguments(**changes):
    options = {"model_name_or_path": "m", "dataset_name": "d", "reward_model_path": "r", "max_new_tokens": 8}
    return xpo.Arguments(**options | changes)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_models_distribution(temperature):
    """Chi-square of first tokens, from a checkpoint whose own generation config would have changed them."""
    model, tokenizer = tiny("gpt2", vocab_size=8), SimpleNamespace(eos_token_id=2, pad_token_id=2)
    model.generation_config.top_k, model.generation_config.temperature = 2, 0.1
    model.generation_config.repetition_penalty = 1.5
    args = arguments(max_new_tokens=1, temperature=temperature, generation_batch_size=1000)
    torch.manual_seed(1)
    n = 4000
    found = common.generate(model, tokenizer, [[3, 4]] * n, args, **xpo.sampling(args))
    counts = torch.tensor([y[0] for y in found]).bincount(minlength=8)
    probs = (model(torch.tensor([[3, 4]])).logits[0, -1] / temperature).softmax(-1)
    chi_square = ((counts - n * probs) ** 2 / (n * probs)).sum().item()
    assert chi_square < 24.3  # 7 degrees of freedom: by chance in one of 1,000 cases


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(kind):
    model, tokenizer = tiny(kind).eval(), SimpleNamespace(eos_token_id=2, pad_token_id=2)
    prompts = [
        [5, 6, 7, 8, 9, 10],
        [11],
        [2, 12, 13],
    ]  # the last one has an EOS in it, which is the padding, too
    alone = [common.generate(model, tokenizer, [p], arguments(), do_sample=False)[0] for p in prompts]
    assert all(2 not in y[:-1] and len(y) <= 8 for y in alone) and len({*map(tuple, alone)}) == 3
    sizes = []
    count = lambda module, args, inputs: sizes.append(len(inputs["input_ids"]))  # noqa: E731
    model.register_forward_pre_hook(count, with_kwargs=True)
    for size in (1, 2, 3):
        args = arguments(generation_batch_size=size)
        assert common.generate(model, tokenizer, prompts, args, do_sample=False) == alone
    assert {*sizes} == {1, 2, 3}


def test_what_ends_a_completion():
    """A model tuned to another EOS than its generation config has still ends, and so do its old ways."""
    model, tokenizer = tiny("llama").eval(), SimpleNamespace(eos_token_id=2, pad_token_id=0)
    for there, ends in ((None, [2]), (2, [2]), (5, [2, 5]), ([5, 7], [2, 5, 7])):
        model.generation_config.eos_token_id = there
        assert common.eos_ids(model, tokenizer) == ends
    said = common.generate(
        model, tokenizer, [[3]] * 300, arguments(max_new_tokens=40), **xpo.sampling(arguments())
    )
    assert {y[-1] for y in said if len(y) < 40} == {2, 5, 7}


def test_answers_keep_the_space_they_begin_with():
    """As SentencePiece has it: a word's first token holds the space before it."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁The": 3, "▁capital:": 4, "▁Paris": 5, "▁.": 6}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.decoder = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    assert tokenizer.batch_decode([[5, 6, 2]], skip_special_tokens=True) == ["Paris ."]
    found = common.decode_answers(tokenizer, [[1, 3, 4], [1]], [[5, 6, 2], [5]])
    assert found == [" Paris .", "Paris"]


def test_evaluations_and_training_steps_have_different_seeds(monkeypatch):
    """An evaluation after `step` steps, and training step `step`, which follows it."""
    args, evaluations, training = arguments(), [], []

    def generate(model, tokenizer, prompts, args, images=(), **how):
        evaluations.append(torch.initial_seed())
        return prompts

    monkeypatch.setattr(common, "generate", generate)
    rows = datasets.Dataset.from_dict({"prompt": [[5, 6]]})
    test = common.Data(rows, rows, rows)
    for step in range(4):
        common.complete(None, AutoTokenizer.from_pretrained(TOY_MODEL), test, args, step)
        torch.manual_seed(hash((args.seed, step, 0)))  # as in every script
        training.append(torch.initial_seed())
    assert len({*evaluations}) == len({*training}) == 4 and {*evaluations}.isdisjoint(training)


@pytest.mark.parametrize(
    ("processes", "prompts", "rows"), [(4, 1, 4), (4, 8, 8), (4, 5, 8), (4, 100, 8), (12, 1, 0)]
)
def test_every_process_completes_equally_many_test_prompts(monkeypatch, processes, prompts, rows):
    """At least one each, if there are so many rows: XPO's win rate needs completions on all processes."""
    data = datasets.Dataset.from_dict({"prompt": [[5, 6]] * 11})
    test, found = common.Data(data, data, data), []
    monkeypatch.setattr(common, "generate", lambda model, tokenizer, prompts, *args, **options: prompts)
    monkeypatch.setattr(common, "gather_rows", lambda columns: columns["row"])
    monkeypatch.setattr(common.dist, "get_world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(common.dist, "get_rank", lambda rank=rank: rank)
        tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
        found.append(common.complete(None, tokenizer, test, arguments(eval_prompts=prompts), 0)[1])
    assert {*map(len, found)} == {rows // processes} and len({*sum(found, [])}) == rows


# ----------------------------------------------------------------------------------------- who decides


def named(name: str, eos: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, generation_config=SimpleNamespace(eos_token_id=eos))


def two_models(monkeypatch, policy_says: list[int], reference_says: list[int]) -> None:
    said = {"policy": policy_says, "reference": reference_says}
    monkeypatch.setattr(common, "generate", lambda model, *args, **options: said[model.name])


def sampled(monkeypatch, decide, *, judge=None, **options):
    """Of two prompts: the policy says '7' and '8' with EOS, the reference '9' without and '8' with."""
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
    encode, eos = (lambda text: tokenizer(text)["input_ids"]), tokenizer.eos_token_id
    two_models(monkeypatch, [[*encode("7"), eos], [*encode("8"), eos]], [encode("9"), [*encode("8"), eos]])
    policy, reference = named("policy", eos), partial(nullcontext, named("reference", eos))
    raw = datasets.Dataset.from_dict({"prompt": ["0=", "1=", "2="]})
    tokens = raw.map(lambda row: {"prompt": encode(row["prompt"])}, remove_columns="prompt")
    args = arguments(**options)
    args.judge = judge
    penalty = args.missing_eos_penalty or 0.0
    decide = partial(judge_pairs, decide) if judge else partial(score_pairs, decide, penalty)
    return sample(policy, reference, decide, tokenizer, common.Data(raw, tokens, None), [1, 2], args)


def test_scores_decide_and_a_missing_eos_costs(monkeypatch):
    def decide(prompts, texts, ended):
        assert prompts == ["1=", "2="]
        return torch.tensor([float(text) for text in texts])

    samples = sampled(monkeypatch, decide)
    assert samples.texts == [("7", "9"), ("8", "8")]
    assert samples.preferences.tolist() == [-1, 0] and samples.scores.tolist() == [[7, 9], [8, 8]]
    assert samples.ended.tolist() == [[True, False], [True, True]]
    samples = sampled(monkeypatch, decide, missing_eos_penalty=3.0)
    assert samples.preferences.tolist() == [1, 0] and samples.scores.tolist() == [[7, 6], [8, 8]]


def test_the_scorer_is_told_which_answers_ended(monkeypatch):
    seen = []

    def decide(prompts, texts, ended):
        seen.append((texts, ended))
        return torch.zeros(2)

    sampled(monkeypatch, decide)
    assert seen == [(["7", "8"], [True, True]), (["9", "8"], [False, True])]


def test_special_tokens_are_visible_but_for_a_final_eos(monkeypatch):
    """The policy is trained on all of its tokens, so whoever decides has to see them."""
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
    decide, prompt = (lambda prompts, texts, ended: torch.zeros(2)), tokenizer("1=")["input_ids"]
    two, (bos, eos) = tokenizer("2")["input_ids"], tokenizer("<s></s>")["input_ids"]
    two_models(monkeypatch, [[*two, bos, *two, eos], [eos]], [[*two, bos], [bos, eos]])
    policy, reference = named("policy", eos), partial(nullcontext, named("reference", eos))
    data = common.Data([{"prompt": "1="}] * 2, datasets.Dataset.from_dict({"prompt": [prompt] * 2}), None)
    decide = partial(score_pairs, decide, 0.0)
    samples = sample(policy, reference, decide, tokenizer, data, [0, 1], arguments())
    assert samples.texts == [("2<s>2", "2<s>"), ("", "<s>")]


def test_a_judge_sees_the_answers_in_random_order(monkeypatch):
    orders, totals = set(), torch.zeros(2)

    def larger(prompts, pairs):
        assert prompts == ["1=", "2="]
        orders.add(pairs[0])
        return [0 if a > b else 1 if b > a else -1 for a, b in pairs]

    for attempt in range(20):
        torch.manual_seed(attempt)
        assert sampled(monkeypatch, larger, judge="larger").preferences.tolist() == [-1, 0]
    assert orders == {("7", "9"), ("9", "7")}
    for _ in range(200):  # a judge that favours the first answer favours no model
        totals += sampled(monkeypatch, lambda prompts, pairs: [0, 0], judge="first").preferences
    assert totals.abs().max() < 60


@pytest.fixture
def reward_model(tmp_path):
    """(model, tokenizer, scores): a random reward model for 128 tokens, and load_scorer's function of it."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"num_labels": 1, "pad_token_id": 2, "initializer_range": 0.3})
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    args = arguments(reward_model_path=str(tmp_path), bf16=False, per_device_eval_batch_size=3)
    return model, tokenizer, load_scorer(args, torch.device("cpu"), [])


def score_of(model, ids: list[int]) -> float:
    return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0].item()


@pytest.mark.parametrize("chat", [False, True])
def test_rewards_are_read_at_the_last_real_token(reward_model, chat):
    """Also where padding is EOS, which texts end in; of an answer that was cut off, it is no end."""
    model, tokenizer, scores = reward_model
    prompts = [[{"role": "user", "content": text}] if chat else text for text in ("1", "22222", "333", "4")]
    answers, ended, want = ["one", "a longer one", "x", "one an"], [True, True, True, False], []
    for prompt, answer, end in zip(prompts, answers, ended, strict=True):
        completion = [{"role": "assistant", "content": answer}] if chat else answer
        ids = common.encode(tokenizer, prompt, completion)
        assert ids[-1] == tokenizer.eos_token_id
        want.append(score_of(model, ids if end else ids[:-1]))
    assert scores(prompts, answers, ended).tolist() == pytest.approx(want, abs=1e-5)
    assert len({round(value, 3) for value in want}) == 4


@pytest.mark.parametrize(("model_max_length", "longest"), [(100, 100), (10**30, 128)])
def test_the_reward_model_reads_bos_and_the_end_of_too_long_a_text(
    tmp_path, reward_model, model_max_length, longest
):
    model, tokenizer, _ = reward_model
    tokenizer.model_max_length = model_max_length
    tokenizer.save_pretrained(tmp_path)
    scores = load_scorer(arguments(reward_model_path=str(tmp_path), bf16=False), torch.device("cpu"), "")
    found = [scores([f"<s>{start}{'7' * 200}1="], ["one"], [True]).item() for start in "78"]
    want = score_of(model, tokenizer("<s>" + "7" * (longest - 7) + "1=one</s>")["input_ids"])
    assert found == pytest.approx([want] * 2, abs=1e-5)
    assert scores(["<s>" + "8" * 200 + "1="], ["one"], [True]).item() != pytest.approx(want, abs=1e-5)


def test_an_answer_that_a_template_cannot_leave_open_is_scored_as_ended(tmp_path, reward_model):
    model, tokenizer, _ = reward_model
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content | replace('a', 'b') }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    scores = load_scorer(arguments(reward_model_path=str(tmp_path), bf16=False), torch.device("cpu"), [])
    found = scores([[{"role": "user", "content": "1"}]], ["a"], [False]).item()
    assert found == pytest.approx(score_of(model, tokenizer("1</s>b</s>")["input_ids"]), abs=1e-5)


def test_judges_are_functions_of_files(tmp_path):
    lines = ["from __future__ import annotations", "from dataclasses import dataclass", "@dataclass"]
    lines += ["class Vote:", "    answer: int", "def better(prompts, pairs):", "    return [Vote(0).answer]"]
    for name in ("j.py", "j.txt"):
        (tmp_path / name).write_text("\n".join(lines))
    assert load_judge(f"{tmp_path}/j.py:better")([], []) == [0]
    for wrong in (f"{tmp_path}/j.py:worse", f"{tmp_path}/k.py:better", f"{tmp_path}/j.txt:better", "better"):
        with pytest.raises(ValueError):
            load_judge(wrong)


# ------------------------------------------------------------------------------------ the whole script

JUDGE = """
def longer(prompts, pairs):
    return [-1 if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]
"""


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    data = ["--model_name_or_path", TOY_MODEL, "--dataset_name", common.TOY_DATA, "--learning_rate", "1e-3"]
    return [*data, "--judge", f"{tmp_path}/judge.py:longer", *SHORT, "--max_new_tokens", "24"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, judge, processes):
    flags = [*judge, *"--sync_ref_model --ref_model_sync_steps 2 --alpha 1e-3 0 --bf16 true".split()]
    succeed("xpo.py", tmp_path / "a", *flags, processes=processes)
    stop("xpo.py", tmp_path / "b", *flags, after_steps=3, by=signal.SIGKILL, processes=processes)
    succeed("xpo.py", tmp_path / "b", *flags, processes=processes)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    last = metrics_of(tmp_path / "a")[-1]
    assert 0 <= last["eval_objective/win_rate"] <= 1 and 1 <= last["eval_distinct_of_4"] <= 4
    sample = json.loads((tmp_path / "a" / "completions.jsonl").read_text().splitlines()[0])
    assert {"step", "prompt", "greedy", "sampled", "answer", "policy", "reference", "winner"} <= sample.keys()


def test_processes_sample_independently(tmp_path, judge):
    """Asked the same, with the same model, two processes do not say the same."""
    (tmp_path / "data").mkdir()
    rows = [{"prompt": [{"role": "user", "content": "7777"}]}] * 8
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*judge, "--dataset_name", f"{tmp_path}/data", "--max_steps", "1", "--temperature", "3"]
    flags += ["--dataset_test_split", "test"]
    succeed("xpo.py", tmp_path / "a", *flags, processes=2)
    lines = [json.loads(line) for line in (tmp_path / "a" / "completions.jsonl").read_text().splitlines()]
    first, second, *_ = ((line["policy"], line["reference"]) for line in lines)  # of rank 0 and rank 1
    assert first[0] != second[0] and first[1] != second[1]
