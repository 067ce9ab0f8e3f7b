"""Encoder–decoder models, T5 and BART: log-probabilities, tokens, training steps and runs of the scripts."""

import importlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_pairs, run_script
from test_logps import SHAPES, gradient, of_completions
from test_runs import SHORT, assert_same_run, environment, metrics_of, stop, succeed
from tokenizers.processors import TemplateProcessing
from toy import make_toy
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
)

import common
from common import TOY_DATA, TOY_MODEL, Arguments, Data, choose_forward_pass, plain_token_logps, token_logps

CPU, PARTS = torch.device("cpu"), ("prompt", "chosen", "rejected")
T5 = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, eos_token_id=2)
T5["decoder_start_token_id"] = 0
BART = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
        {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
GEMMA = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GEMMA |= dict(num_key_value_heads=2, head_dim=8, dropout_rate=0.0, bos_token_id=1)
CONFIGS = {
    "t5": T5Config(**T5),
    "t5 untied": T5Config(**T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "bart": BartConfig(vocab_size=61, d_model=32, **BART, bos_token_id=1, pad_token_id=0, init_std=0.2),
    # Without decoder_start_token_id, transformers takes the BOS.
    "t5gemma": T5GemmaConfig(encoder=GEMMA, decoder=GEMMA, vocab_size=61, bos_token_id=1, eos_token_id=2),
}  # fmt: skip


def tiny(kind: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A random model without dropout, in float64."""
    config = type(CONFIGS[kind]).from_dict(CONFIGS[kind].to_dict())
    config.update(dict.fromkeys(("dropout_rate", "dropout"), 0.0) | changes)
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float64).train()
    if kind == "bart":  # the bias of its logits is 0 in a new model
        model.final_logits_bias.normal_()
    return model


def tokenizer_of(kind: str):
    """The example's tokenizer, which adds to a text what T5's, BART's or Gemma's adds."""
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
    template = {"t5": "$A </s>", "bart": "<s> $A </s>", "t5gemma": "<s> $A"}[kind]
    special_tokens = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=special_tokens
    )
    tokenizer.decoder_prompt = common.decoder_prompt_of(CONFIGS[kind])
    return tokenizer


def batch_of(model, pairs, **options) -> common.Batch:
    start = common.decoder_prompt_of(model.config)
    return common.collate(pairs, CPU, decoder_prompt=start, global_pairs=len(pairs), **options)


def by_hand(model, pairs) -> torch.Tensor:
    """Log-probabilities of all completion tokens, one sequence at a time."""
    logps = []
    for prompt, *completions in pairs:
        for completion in completions:
            labels = torch.tensor([completion])
            inputs = model.prepare_decoder_input_ids_from_labels(labels=labels)  # transformers shifts
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=inputs, use_cache=False).logits
            logps.append(logits[0].log_softmax(-1).gather(1, labels.T)[:, 0])
    return torch.cat(logps)


# --------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_logps_and_gradients_equal_those_of_single_sequences(kind, shape):
    model, pairs = tiny(kind), SHAPES[shape]
    want = by_hand(model, pairs)
    want_gradient = gradient(model, want)
    choose_forward_pass(model)
    assert model.forward_pass == "encoded once"
    batch = batch_of(model, pairs, score_prompts=True)  # as orpo.py asks for; there is nothing to score
    assert torch.equal(batch.scored, batch.completions)
    for forward_pass in ("encoded once", "padded", "the definition"):
        model.forward_pass = forward_pass
        got = (plain_token_logps if forward_pass == "the definition" else token_logps)(model, batch)
        got = of_completions(got, batch)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient(model, got), want_gradient, rtol=0, atol=1e-9)


def test_the_batch_has_the_labels_of_completions_shifted_right():
    p1, p2, c1, c2, c3, r1, r2, q1 = range(10, 18)
    batch = batch_of(tiny("bart"), [([p1, p2], [c1, c2, c3], [r1, r2]), ([q1], [c1, c2], [r1])])
    labels = [[c1, c2, c3], [r1, r2, 0], [c1, c2, 0], [r1, 0, 0]]
    assert batch.labels.tolist() == labels
    assert batch.completions.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]]
    inputs = {"input_ids": [[p1, p2], [p1, p2], [q1, 0], [q1, 0]]}
    inputs["attention_mask"] = [[1, 1], [1, 1], [1, 0], [1, 0]]
    found = {name: value.tolist() for name, value in batch.inputs.items()}
    assert found.pop("decoder_input_ids") == [[2, c1, c2], [2, r1, r2], [2, c1, c2], [2, r1, 0]]
    assert found == inputs


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("per_prompt", [1, 2, 3])
def test_the_encoder_reads_each_prompt_once(kind, per_prompt):
    model = tiny(kind)
    choose_forward_pass(model)
    pairs = [(p, *(c + [7] * i for i in range(per_prompt))) for p, c, _ in random_pairs(1, 4)]
    rows = {"encoder": 0, "decoder": 0}
    for name in rows:

        def count(module, args, kwargs, name=name):
            rows[name] += len(kwargs["input_ids"])

        getattr(model, f"get_{name}")().register_forward_pre_hook(count, with_kwargs=True)
    token_logps(model, batch_of(model, pairs)).sum().backward()
    assert rows == {"encoder": 4, "decoder": 4 * per_prompt}


def test_an_encoder_whose_outputs_cannot_be_repeated_runs_padded(capsys):
    model, pairs = tiny("t5"), random_pairs(2, 3)
    encoder = model.get_encoder()
    model.get_encoder = lambda: lambda **inputs: encoder(inputs["input_ids"])  # ignores the padding
    choose_forward_pass(model)
    assert model.forward_pass == "padded"
    assert "its encoded once log-probabilities differ" in capsys.readouterr().out
    batch = batch_of(model, pairs)
    got = of_completions(token_logps(model, batch), batch)
    torch.testing.assert_close(got, by_hand(model, pairs), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_gradient_checkpointing_changes_nothing(kind):
    model, pairs = tiny(kind), random_pairs(5, 3)
    choose_forward_pass(model)
    batch = batch_of(model, pairs)
    want = gradient(model, token_logps(model, batch).flatten())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(model, token_logps(model, batch).flatten()), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_batch_of_no_pairs_contributes_nothing_but_runs_the_model(kind):
    model = tiny(kind)
    choose_forward_pass(model)
    logps = token_logps(model, batch_of(model, [])).sum(1).view(-1, 2)
    assert logps.shape == (0, 2)
    logps.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())


# --------------------------------------------------------------------------------------------------- tokens


def ids(text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(TOY_MODEL)(text, add_special_tokens=False)["input_ids"]


def tokenize(row: dict, kind: str, max_length: int = 99, max_completion_length: int = 99) -> dict:
    limits = {"max_length": max_length, "max_completion": max_completion_length, "room": 1}
    return common.tokenize(row, tokenizer_of(kind), PARTS[1:], **limits)


@pytest.mark.parametrize("end", ["", "</s>"])
@pytest.mark.parametrize(
    ("kind", "prompt", "completion"),
    [("t5", "12</s>", "{}</s>"), ("bart", "<s>12</s>", "<s>{}</s>"), ("t5gemma", "<s>12", "{}</s>")],
)
def test_texts_get_what_the_tokenizer_adds_and_completions_one_eos(kind, prompt, completion, end):
    """Of T5Gemma's <s>, the decoder's start token, none is a label: it would be read twice."""
    row = tokenize({"prompt": "12", "chosen": f"one two{end}", "rejected": f"one{end}"}, kind)
    assert row["note"] == ""
    assert row["prompt"] == ids(prompt)
    assert [row[name] for name in PARTS[1:]] == [ids(completion.format(y)) for y in ("one two", "one")]


def test_a_completion_ends_at_its_first_eos():
    """mBART's tokenizer puts a language behind it."""
    tokenizer = tokenizer_of("t5")
    special_tokens = [("</s>", 2), ("<unk>", 3)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s> <unk>", special_tokens=special_tokens
    )
    assert common.encode_labels(tokenizer, "one") == ids("one</s>")


def test_targets_are_tokenized_as_targets():
    """Tokenizers for translation mark the language of the target, or have a vocabulary for it."""
    tokenizer = tokenizer_of("t5")
    tokenizer._switch_to_target_mode = lambda: setattr(
        tokenizer.backend_tokenizer, "post_processor",
        TemplateProcessing(single="<unk> $A </s>", special_tokens=[("</s>", 2), ("<unk>", 3)]),
    )  # fmt: skip
    assert common.encode_labels(tokenizer, "one") == ids("<unk>one</s>")


@pytest.mark.parametrize("kind", ["t5", "bart", "t5gemma"])
def test_messages_are_what_the_chat_template_makes_of_them(kind):
    chat = [[{"role": role, "content": text}] for role, text in
            (("user", "12"), ("assistant", "one two"), ("assistant", "one"))]  # fmt: skip
    row = tokenize(dict(zip(PARTS, chat, strict=True)), kind)
    assert [row[name] for name in PARTS] == [ids("<s>12="), ids("one two</s>"), ids("one</s>")]


def test_prompts_and_completions_are_cut_at_their_ends():
    row = {"prompt": "123456", "chosen": "one two", "rejected": "one three"}
    found = tokenize(row, "t5", max_length=4, max_completion_length=6)
    assert [found[name] for name in PARTS] == [ids("123</s>"), ids("one tw"), ids("one th")]
    assert found["note"] == "cut to fit max_length"
    note = tokenize(row, "t5", max_completion_length=5)["note"]
    assert note.startswith("dropped: the completions are identical")


def test_max_length_is_also_the_default_of_completions(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "123456", "chosen": "one two", "rejected": "two"}\n')
    for flags, chosen in (({}, "one t"), ({"max_completion_length": 2}, "on")):
        args = Arguments(dataset_name=str(path), eval_strategy="no", max_length=5, **flags)
        data, _ = common.load_data(args, tokenizer_of("t5"))
        assert data.tokens["chosen"][0] == ids(chosen) and data.decoder_prompt == [0]
        assert data.lengths.tolist() == [[5, len(chosen), min(4, len(chosen))]]


def test_several_processes_tokenize_alike(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "1", "chosen": "one", "rejected": "two"}\n' * 4)
    args = Arguments(dataset_name=str(path), eval_strategy="no", dataset_num_proc=2)
    data, _ = common.load_data(args, tokenizer_of("bart"))
    assert data.tokens["chosen"][3] == ids("<s>one</s>")


# -------------------------------------------------------------------------------------------- training steps


def data_of(model, pairs) -> Data:
    tokens = datasets.Dataset.from_dict(dict(zip(PARTS, map(list, zip(*pairs, strict=True)), strict=True)))
    lengths = np.array([[len(part) for part in pair] for pair in pairs])
    return Data(tokens, tokens, lengths, True, common.decoder_prompt_of(model.config))


def cpo_by_hand(chosen, rejected, n_chosen, n_rejected):
    margins = 0.1 * (chosen - rejected)
    return -F.logsigmoid(margins).mean() - chosen.sum() / n_chosen.sum()


def orpo_by_hand(chosen, rejected, n_chosen, n_rejected):
    p, q = (chosen / n_chosen).exp(), (rejected / n_rejected).exp()
    return -chosen.sum() / n_chosen.sum() - 0.1 * F.logsigmoid((p / (1 - p) / (q / (1 - q))).log()).mean()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(("method", "loss_by_hand"), [("cpo", cpo_by_hand), ("orpo", orpo_by_hand)])
def test_a_step_is_what_a_computation_by_hand_gives(method, loss_by_hand, kind):
    script, model, pairs = importlib.import_module(method), tiny(kind), random_pairs(7, 5)
    lengths = torch.tensor([[len(y) for y in completions] for _, *completions in pairs])
    sums = torch.stack([part.sum() for part in by_hand(model, pairs).split(lengths.flatten().tolist())])
    want = loss_by_hand(*sums.view(-1, 2).unbind(1), *lengths.unbind(1))
    want_gradient = torch.autograd.grad(want, [*model.parameters()])
    choose_forward_pass(model)
    model.token_logps = lambda batch: token_logps(model, batch)
    args = script.Arguments(model_name_or_path="none", dataset_name="none")
    parts = [
        script.loss_and_metrics(model, batch, args)
        for batch in common.micro_batches(data_of(model, pairs), np.arange(5), 2, CPU)
    ]
    loss = sum(loss for loss, _ in parts)
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-10)
    assert sum(metrics["logps/chosen"] for _, metrics in parts).item() == pytest.approx(
        sums[::2].mean().item()
    )
    for found, grad in zip(torch.autograd.grad(loss, [*model.parameters()]), want_gradient, strict=True):
        torch.testing.assert_close(found, grad, rtol=0, atol=1e-10)


SPLIT = """
import importlib, pickle, sys
from pathlib import Path
import torch
import common
from conftest import random_pairs
from gradients import step
from test_encoder_decoder import data_of

torch.set_default_dtype(torch.float64)
torch.float32, torch.float, torch.Tensor.float = torch.float64, torch.float64, torch.Tensor.double
folder, results = sys.argv[1], {}
args = common.Arguments("none", "none", dtype="float64", output_dir=f"{folder}/out")
rank, world, device = common.start(args)
for kind in ("t5", "bart"):
    args.model_name_or_path = f"{folder}/{kind}"
    for use_peft in (False, True):
        args.use_peft = use_peft
        policy = common.load_model(args.model_name_or_path, args, device, trainable=True)
        pairs = data_of(policy, random_pairs(11, 7))  # an odd number: one process has a batch of no pairs
        for method in ("cpo", "orpo"):
            script = importlib.import_module(method)
            options = script.Arguments(args.model_name_or_path, "none", batch_size=8)
            options.method, options.no_prompt_loss = method, False
            for size in (7, 2):
                metrics, gradient = step(script, options, policy, None, pairs, size)
                results[kind, use_peft, method, size] = metrics, gradient.tolist()
torch.distributed.destroy_process_group()
if rank == 0:
    Path(f"{folder}/{world}").write_bytes(pickle.dumps(results))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a model and its tokenizer of each kind, as they are on the Hub, with dropout."""
    folder = tmp_path_factory.mktemp("encoder_decoder")
    for kind in ("t5", "bart"):
        model = tiny(kind, vocab_size=43)
        model.config.update(CONFIGS[kind].to_diff_dict() | {"vocab_size": 43})
        model.save_pretrained(folder / kind)
        tokenizer_of(kind).save_pretrained(folder / kind)
    (folder / "pairs").mkdir()
    for split, rows in (("train", 40), ("test", 10)):  # of the built-in example
        lines = Path(TOY_DATA, f"{split}.jsonl").read_text().splitlines(keepends=True)[:rows]
        (folder / "pairs" / f"{split}.jsonl").write_text("".join(lines))
    return folder


def test_a_split_batch_has_the_same_gradient(tmp_path):
    for kind in ("t5", "bart"):
        tiny(kind).save_pretrained(tmp_path / kind)
    (tmp_path / "split.py").write_text(SPLIT)
    found = {}
    for world in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        command = [sys.executable, *torchrun, str(tmp_path / "split.py"), str(tmp_path)]
        result = subprocess.run(
            command, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr[-3000:]
        results = pickle.loads((tmp_path / str(world)).read_bytes())
        found |= {(*case, world): values for case, values in results.items()}
    assert len(found) == 2 * 2 * 2 * 2 * 2
    for (kind, use_peft, method, size, world), (metrics, grad) in found.items():
        want_metrics, want = found[kind, use_peft, method, 7, 1]
        assert metrics == pytest.approx(want_metrics, rel=1e-11, abs=1e-11), (
            kind,
            use_peft,
            method,
            size,
            world,
        )
        assert grad == pytest.approx(want, rel=0, abs=1e-11 * max(map(abs, want)))


# ------------------------------------------------------------------------------------- models and generation


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_dropout_is_off_in_training_and_in_the_configuration_that_is_saved(models, kind, tmp_path):
    args = Arguments(str(models / kind), dataset_name="d", output_dir=str(tmp_path))
    model = common.load_model(str(models / kind), args, CPU, trainable=True)
    assert model.training and model.forward_pass == "encoded once"
    batch = batch_of(model, random_pairs(1, 2, high=8))
    batch.inputs = {name: x % 43 for name, x in batch.inputs.items()}
    batch.labels = batch.labels % 43
    assert torch.equal(model.token_logps(batch), model.token_logps(batch))
    common.save_model(args, model, tokenizer_of(kind))
    config = AutoConfig.from_pretrained(tmp_path)
    assert getattr(config, "dropout_rate" if kind == "t5" else "dropout") == 0.1


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_greedy_completions_are_those_of_single_prompts(kind):
    """Prompts of several lengths in one batch; a completion ends with its EOS."""
    model, tokenizer = tiny(kind, vocab_size=43, seed=3).eval(), tokenizer_of(kind)
    args = Arguments("none", max_new_tokens=9, generation_batch_size=5)
    prompts = [[i % 43 for i in prompt] for prompt, *_ in random_pairs(4, 12)]
    start = common.decoder_prompt_of(model.config)
    found = common.generate(model, tokenizer, prompts, args, do_sample=False)
    for prompt, completion in zip(prompts, found, strict=True):
        want = []
        while len(want) < 9 and 2 not in want:
            inputs = torch.tensor([prompt]), torch.tensor([[*start, *want]])
            logits = model(input_ids=inputs[0], decoder_input_ids=inputs[1]).logits[0, -1]
            want.append(logits.argmax().item())
        assert completion == want
    assert len({*map(tuple, found)}) > 3


# ------------------------------------------------------------------------------------------ runs of scripts


def flags_of(models: Path, kind: str) -> list[str]:
    data = ["--dataset_name", str(models / "pairs"), "--dataset_test_split", "test"]
    return ["--model_name_or_path", str(models / kind), *SHORT, *data]


RUNS = [("cpo", "t5", 2, "--gradient_checkpointing"), ("orpo", "bart", 1, "--max_completion_length 20")]


@pytest.mark.parametrize(("method", "kind", "processes", "options"), RUNS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(models, tmp_path, method, kind, processes, options):
    flags = [*flags_of(models, kind), *options.split()]
    said = succeed(f"{method}.py", tmp_path / "a", *flags, processes=processes)
    assert "log-probabilities: encoded once (checked against padded)" in said
    stop(f"{method}.py", tmp_path / "b", *flags, after_steps=3, by=signal.SIGTERM, processes=processes)
    assert "resuming after step" in succeed(f"{method}.py", tmp_path / "b", *flags, processes=processes)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    before, *_, after = metrics_of(tmp_path / "a")
    assert after["eval_loss"] < before["eval_loss"] and 0 <= after["eval_exact_match"] <= 1


@pytest.mark.parametrize("options", ["", "--use_peft"])
@pytest.mark.parametrize(
    ("method", "kind"), [("cpo", "t5"), ("orpo", "bart"), ("dpo", "t5"), ("alphapo", "bart")]
)
def test_what_is_saved_has_the_logits_of_the_trained_model(
    models, tmp_path, monkeypatch, method, kind, options
):
    """The scripts train them all; what they save is the model in memory, and not the one before training."""
    saved = []
    save_model = common.save_model

    def keep(args, policy, tokenizer):
        batch = batch_of(policy, [([5, 6, 7], [8, 9], [10])])
        saved.append(policy.token_logps(batch).detach())
        save_model(args, policy, tokenizer)

    monkeypatch.setattr(common, "save_model", keep)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    out = tmp_path / "out"
    flags = flags_of(models, kind) + f"--max_steps 2 --dtype float64 --output_dir {out} {options}".split()
    run_script(monkeypatch, method, " ".join(flags))
    assert (out / "adapter_config.json").exists() == bool(options)
    before = AutoModelForSeq2SeqLM.from_pretrained(models / kind, dtype=torch.float64)
    model = AutoModelForSeq2SeqLM.from_pretrained(out, dtype=torch.float64)
    batch = batch_of(model, [([5, 6, 7], [8, 9], [10])])
    torch.testing.assert_close(plain_token_logps(model.eval(), batch), saved[0], rtol=0, atol=1e-6)
    assert (plain_token_logps(before.eval(), batch) - saved[0]).abs().max() > 1e-5
    first = AutoTokenizer.from_pretrained(out)("12")["input_ids"]
    assert first == tokenizer_of(kind)("12")["input_ids"]


# ---------------------------------------------------------------------------------------------- learning


def train_from_noisy_translations(folder: Path, seed: int, steps: int = 900, batch_size: int = 64) -> None:
    """What make_toy.sft does, for a T5: imitation of translators that are perfect 30% of the time."""
    tokenizer, rng = tokenizer_of("t5"), random.Random(seed)
    shape = dict(d_model=96, d_kv=24, d_ff=256, num_layers=2, num_heads=4)
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(
        T5Config(**T5 | shape | {"vocab_size": len(tokenizer)}, dropout_rate=0.0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / 50) * (1 - t / steps))
    for _ in range(steps):
        numbers = rng.choices(make_toy.TRAIN, k=batch_size)
        texts = [[make_toy.perfect(n), make_toy.adequate(n, rng), make_toy.wrong(n, rng)] for n in numbers]
        texts = [rng.choices(answers, [0.30, 0.55, 0.15])[0] for answers in texts]
        inputs = tokenizer([str(n) for n in numbers], padding=True, return_tensors="pt")
        labels = tokenizer(texts, padding=True, return_tensors="pt").input_ids
        labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
        masks = {"attention_mask": inputs.attention_mask}
        model(input_ids=inputs.input_ids, **masks, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_training_on_pairs_teaches_a_small_t5_the_perfect_form(tmp_path, seed):
    """Greedy exact match on 500 numbers that neither imitation nor the pairs have shown."""
    train_from_noisy_translations(tmp_path / "sft", seed)
    (tmp_path / "pairs").mkdir()
    for split in ("train", "test"):  # as texts, which are tokenized separately
        rows = map(json.loads, Path(TOY_DATA, f"{split}.jsonl").read_text().splitlines())
        rows = [row | {name: row[name][0]["content"] for name in PARTS} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "pairs" / f"{split}.jsonl").write_text(text)
    flags = f"--model_name_or_path {tmp_path}/sft --dataset_name {tmp_path}/pairs --seed {seed}"
    flags += " --max_steps 100 --batch_size 32 --per_device_train_batch_size 32 --learning_rate 1e-3"
    flags += " --per_device_eval_batch_size 250 --eval_prompts 500 --max_new_tokens 64"
    for method in ("cpo", "orpo"):
        succeed(f"{method}.py", tmp_path / method, *flags.split())
        before, *_, after = metrics_of(tmp_path / method)
        for name in ("exact_match", "exact_match_sampled", "rewards/accuracies"):
            print(
                f"seed {seed}  {method}  {name}: {before[f'eval_{name}']:.3f} -> {after[f'eval_{name}']:.3f}"
            )
        assert before["eval_exact_match"] < 0.5 and after["eval_exact_match"] > 0.8
