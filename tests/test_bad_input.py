"""Wrong input ends a run soon, with one line that names what is wrong, and leaves nothing on the disk."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from conftest import ARCHITECTURES, METHODS, ROOT, run_script, save_adapter, tiny
from safetensors.torch import load_file, save_file
from test_runs import environment
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    Gemma3Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
)

from common import TOY_DATA, TOY_MODEL

PAIR = {"prompt": "1", "chosen": "one", "rejected": "two"}
CHAT = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "one"}]
ROLES = [{"role": "user", "content": "1"}, {"role": "user", "content": "one"}]
IMAGE = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "one"}]


def other(messages: list[dict]) -> list[dict]:
    return [*messages[:-1], messages[-1] | {"content": "two"}]


WRONG = [  # method, flags, what is said
    *((method, "--batch_size -8", "batch_size must be positive, not -8") for method in METHODS),
    *((method, "--zzz", "unknown argument --zzz; --help lists all") for method in METHODS),
    *((method, "--model_name_or_path m", "go together") for method in METHODS),
    # Arguments that do not parse.
    ("dpo", "--lerning_rate 1", "unknown argument --lerning_rate; did you mean --learning_rate?"),
    ("cpo", "--beta two", "argument --beta: invalid float value: 'two'"),
    ("cpo", "--max_steps 1.5", "invalid int value: '1.5'"),
    ("alphapo", "--beta", "argument --beta: expected one argument"),
    ("orpo", "--lr_scheduler_type sine", "invalid choice: 'sine'"),
    ("dpo", "--dataset_name d", "--model_name_or_path and --dataset_name go together"),
    # Out of range.
    ("dpo", "--learning_rate 0", "learning_rate must be positive"),
    ("dpo", "--learning_rate nan", "learning_rate must be positive"),
    ("cpo", "--learning_rate inf", "learning_rate must be positive"),
    ("orpo", "--max_grad_norm 0", "max_grad_norm must be positive"),
    ("alphapo", "--eval_steps -1", "eval_steps must be positive"),
    ("dpo", "--weight_decay -0.1", "weight_decay must be positive or 0, not -0.1"),
    ("cpo", "--adam_beta2 1", "AdamW: Invalid beta parameter at index 1: 1.0"),
    ("dpo", "--seed -1", "seed must"),
    ("dpo", "--warmup_steps -5", "warmup_steps must"),
    ("dpo", "--beta 0", "beta must be positive"),
    ("cpo", "--beta -1", "beta must be positive"),
    ("alphapo", "--beta 0", "beta must be positive"),
    ("orpo", "--beta -1", "beta must"),
    ("xpo", "--beta 0.1 0", "beta must be positive"),
    ("dpo", "--label_smoothing 0.5", "label_smoothing must be in [0, 0.5)"),
    ("xpo", "--temperature 0", "XPO needs samples"),
    ("xpo", "--top_p 0", "top_p must be in (0, 1]"),
    ("xpo", "--alpha -1", "alpha must be one or more values of at least 0"),
    ("dpo", "--ref_model_sync_steps 0", "ref_model_sync_steps must be at least 1"),
    ("dpo", "--sync_ref_model --ref_model_mixup_alpha 1.5", "ref_model_mixup_alpha must be in [0, 1]"),
    ("xpo", "--sync_ref_model --ref_model_mixup_alpha nan", "ref_model_mixup_alpha must be in [0, 1]"),
    ("dpo", "--ld_alpha -0.5", "ld_alpha must be in [0, 1]"),
    # Not known, or not together.
    ("dpo", "--loss_type sigmod", "unknown loss_type 'sigmod'; known are sigmoid"),
    ("cpo", "--loss_type dpo", "unknown loss_type 'dpo'"),
    ("xpo", "--loss_type hinge", "unknown loss_type 'hinge'; known are sigmoid, ipo"),
    ("dpo", "--f_divergence_type kl", "unknown f_divergence_type 'kl'"),
    ("dpo", "--label_smoothing 0.1 --loss_type hinge", "label_smoothing has no meaning for hinge"),
    ("dpo", "--loss_type exo_pair --label_smoothing 0", "exo_pair needs a label_smoothing above 0"),
    ("dpo", "--loss_type sigmoid sft --loss_weights 1", "2 loss types but 1 loss_weights"),
    ("dpo", "--f_divergence_type js_divergence --loss_type ipo", "has no meaning for ipo"),
    ("dpo", "--sync_ref_model --precompute_ref_log_probs", "cannot be precomputed"),
    ("dpo", "--loss_type sigmoid sft --rpo_alpha 2", "rpo_alpha adds the loss type sft, which is there"),
    ("dpo", "--use_weighting --loss_type aot", "aot compares quantiles"),
    ("dpo", "--loss_type aot --per_device_train_batch_size 4", "aot needs the batch at once"),
    ("dpo", "--ld_alpha 0.5 --loss_type ipo", "ipo, sigmoid_norm, sft average"),
    ("dpo", "--gradient_accumulation_steps 2 --batch_size 8", "give one of them"),
    ("cpo", "--simpo_gamma 1", "simpo_gamma is for simpo, alphapo only"),
    ("cpo", "--loss_type ipo --label_smoothing 0.1", "label_smoothing must be in [0, 0.5), and is for"),
    ("xpo", "--model_name_or_path m --dataset_name d", "give one of --reward_model_path and --judge"),
    (
        "xpo",
        "--model_name_or_path m --dataset_name d --judge nowhere.py:judge",
        "nowhere.py is no such file",
    ),
    ("xpo", "--judge nowhere.py:judge", "nowhere.py is no such file"),
    ("cpo", "--varlen_attention", "--varlen_attention needs a GPU and --bf16"),
    ("cpo", "--hsdp_shard_size 2", "hsdp_shard_size 2 does not divide the 1 processes"),
    ("xpo", "--judge {dir}/judge.py:g", "missing a required argument: 'b'"),
    ("xpo", "--judge pair_rm --reward_model_path m", "give one of --reward_model_path and --judge"),
    ("xpo", "--judge pair_rm:{dir}/nowhere", "cannot load {dir}/nowhere, which is not a directory here"),
    ("xpo", "--judge pair_rm:{toy}", "cannot load {toy}: 'DebertaV2Config' object has no attribute"),
    (
        "xpo",
        "--judge {root}/tests/bench/judge_server.py:judge",
        "needs the environment variables JUDGE_URL and JUDGE_MODEL",
    ),
    ("xpo", "--judge {dir}/judge.py:nobody", "there is no function nobody in"),
    ("xpo", "--judge {dir}/judge.py:f --reward_model_path m", "give one of --reward_model_path and --judge"),
    ("xpo", "--max_new_tokens 2000", "must exceed max_new_tokens"),
    ("dpo", "--report_to trackio", "pip install trackio"),
    ("orpo", "--push_to_hub", "--push_to_hub: "),  # no network, or no token
    # Files and models.
    ("dpo", "--output_dir {dir}/judge.py/out", "cannot write to --output_dir"),
    ("dpo", "--model_name_or_path {dir}/nowhere --dataset_name {data}", "cannot load {dir}/nowhere"),
    ("orpo", "--model_name_or_path {dir}/pickled --dataset_name {data}", "safetensors"),
    ("dpo", "--model_name_or_path {dir}/custom --dataset_name {data}", "cannot load {dir}/custom"),
    ("cpo", "--model_name_or_path {dir}/no_start --dataset_name {data}", "no decoder_start_token_id"),
    (
        "xpo",
        "--judge {dir}/judge.py:f --model_name_or_path {dir}/t5 --dataset_name {data}",
        "has an encoder; xpo.py is",
    ),
    (
        "orpo",
        "--model_name_or_path {dir}/t5 --dataset_name {data} --truncate_prompt true",
        "--truncate_prompt is for models without an encoder",
    ),
    (
        "cpo",
        "{model} {data} --max_completion_length 9",
        "--max_completion_length is for models with an encoder",
    ),
    ("dpo", "--model_name_or_path {dir}/clip --dataset_name {data}", "is of type clip, which this script"),
    ("dpo", "--model_name_or_path {dir}/no_eos --dataset_name {data}", "has no EOS token"),
    (
        "dpo",
        "--model_name_or_path {dir}/added --dataset_name {data}",
        "62 tokens, but embeds 61",
    ),
    (
        "cpo",
        "--model_name_or_path {dir}/vision --dataset_name {data}",
        "is of type gemma3, which this script",
    ),
    (
        "dpo",
        "--output_dir {dir}/t5 --model_name_or_path {dir}/t5 --dataset_name {data}",
        "would be overwritten",
    ),
    (
        "dpo",
        "{model} {data} --ref_model_name_or_path {dir}/small --output_dir out",
        "43 tokens, but embeds 20",
    ),
    (
        "dpo",
        "{model} {data} --sync_ref_model --ref_model_name_or_path {dir}/shapes",
        "those of {dir}/shapes have other shapes",
    ),
    (
        "dpo",
        "{model} {data} --ref_model_name_or_path {dir}/shuffled",
        "shuffled has another vocabulary than {toy}",
    ),
    (
        "dpo",
        "{model} {data} --ref_model_name_or_path {dir}/t5",
        "{dir}/t5 and {toy} differ in images or an encoder",
    ),
    ("xpo", "--reward_model_path {dir}/two", "has 2 outputs; a reward model has one"),
    ("xpo", "--reward_model_path {dir}/no_template", "reward model's tokenizer has no chat template"),
    # Data.
    ("dpo", "{model} {dir}/nowhere.jsonl", "cannot load the dataset {dir}/nowhere.jsonl: "),
    ("dpo", "{model} {dir}/malformed.jsonl", "cannot load the dataset {dir}/malformed.jsonl: "),
    ("cpo", "{model} {dir}/empty.jsonl", "{dir}/empty.jsonl is empty"),
    (
        "dpo",
        "{model} {dir}/pairs.txt",
        "pairs.txt is not a file of the kinds .json, .jsonl, .csv, .tsv, .parquet",
    ),
    ("dpo", "{model} {dir}/orca.jsonl", "most rows of the train split are dropped: there is no prompt"),
    (
        "orpo",
        "{model} {dir}/orca.jsonl",
        "found system, question, chosen, rejected; see --rename_columns question=prompt",
    ),
    (
        "cpo",
        "{model} {dir}/kto.jsonl",
        "needs columns prompt, chosen, rejected; found prompt, completion, label",
    ),
    (
        "cpo",
        "{model} {dir}/kto.jsonl --rename_columns completion",
        "pairs such as question=prompt, not completion",
    ),
    ("cpo", "{model} {dir}/kto.jsonl --rename_columns good=chosen", "--rename_columns old=new: "),
    (
        "cpo",
        "{model} {dir}/sharegpt.jsonl",
        "found conversations, chosen, rejected",
    ),
    ("cpo", "{model} {dir}/from.jsonl", "chosen is {'from': 'gpt'"),
    (
        "cpo",
        "{model} {dir}/messages.jsonl",
        "needs columns prompt, chosen, rejected; found messages",
    ),
    ("dpo", "{model} {dir}/missing.csv", "most rows of the train split are dropped: rejected is empty"),
    ("dpo", "--loss_type simpo", "loss_type simpo is in cpo.py"),
    ("dpo", "--loss_type sigmoid orpo", "loss_type orpo is in orpo.py"),
    # LoRA.
    ("dpo", "--lora_r 8", "--lora_r is for a new adapter: it needs --use_peft"),
    ("cpo", "--use_peft --lora_r 0", "lora_r must be positive, not 0"),
    ("orpo", "--use_peft --lora_dropout 1.5", "lora_dropout must be below 1"),
    ("orpo", "--load_in_4bit", "weights in 4 bits cannot be trained: --load_in_4bit needs --use_peft"),
    ("xpo", "--use_peft --sync_ref_model", "a reference of LoRA has none of its own"),
    (
        "dpo",
        "--use_peft --lora_target_modules q_proj up",
        "up: this model has down_proj embed_tokens gate_proj",
    ),
    ("dpo", "--use_peft --ref_adapter_name a", "--ref_adapter_name is for adapters, and"),
    ("dpo", "--use_peft --ref_adapter_name a --ref_model_name_or_path b", "both name the reference"),
    (
        "dpo",
        "--model_name_or_path {dir}/adapter --dataset_name d --lora_r 8",
        "--lora_r is for a new adapter: it needs --use_peft, and a model that is no adapter",
    ),
    ("cpo", "--model_name_or_path {dir}/lost --dataset_name " + TOY_DATA, "cannot load {dir}/nowhere"),
    (
        "cpo",
        "--model_name_or_path {dir}/biased --dataset_name " + TOY_DATA,
        "other weights than LoRA's matrices",
    ),
    ("orpo", "--model_name_or_path {dir}/short --dataset_name " + TOY_DATA, "its weights do not fit"),
    (
        "dpo",
        "--model_name_or_path {dir}/adapters --model_adapter_name a --ref_adapter_name b"
        " --dataset_name {data}",
        "cannot load the adapter {dir}/adapters/b: it belongs to {dir}/another, not to",
    ),
    ("alphapo", "--model_name_or_path {dir}/quantized --dataset_name " + TOY_DATA, "are quantized already"),
    ("cpo", "--gamma 1", "did you mean --simpo_gamma"),
    ("xpo", "--fp16", "did you mean --bf16"),
    ("xpo", "--missing_eos_penalty inf", "missing_eos_penalty must be at least 0, not inf"),
    ("dpo", "--max_prompt_length 512", " --max_length"),
    ("dpo", "--per_device_batch_size 2", " --per_device_train_batch_size"),
    (
        "dpo",
        "{model} {dir}/columns.jsonl",
        "the train split needs columns prompt, chosen, rejected; found question, answer",
    ),
    ("xpo", "{model} {dir}/columns.jsonl --reward_model_path r", "the train split needs columns prompt"),
    ("orpo", "{model} {dir}/numbers.jsonl", "the train split: chosen is 1, not a text"),
    ("alphapo", "{model} {dir}/blank.jsonl", "most rows of the train split are dropped: "),
    (
        "dpo",
        "{model} {dir}/one.jsonl --dataset_train_split validation",
        "--dataset_train_split and --dataset_test_split have to be among train",
    ),
    ("dpo", "--max_length 3", "most rows of the train split are dropped: "),
    (
        "dpo",
        "{model} {dir}/images.jsonl",
        "a message has a part of type image, which this model does not read",
    ),
    ("cpo", "{model} {dir}/roles.jsonl", "most rows of the train split are dropped: "),
    ("dpo", "{model} {dir}/mixed.jsonl", "the train split has texts and messages in column prompt"),
    ("dpo", "{model} {dir}/mixed_answers.jsonl", "the train split has texts and messages in column chosen"),
    (
        "dpo",
        "{model} {dir}/lists.jsonl",
        "chosen is ['one'], not a text or messages",
    ),
    (
        "dpo",
        "{model} {dir}/tokens.jsonl",
        "chosen is [1, 2], not a text or messages",
    ),
    (
        "xpo",
        "{model} {dir}/parts.jsonl --reward_model_path r",
        "the train split: prompt is [{'type': 'text', 'text': '1'}], not a text or messages",
    ),
    (
        "dpo",
        "--model_name_or_path {dir}/no_template --dataset_name {dir}/chat.jsonl",
        "chat_template is not set",
    ),
]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory) -> Path:
    """A directory of files and models with something wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    judges = "def f(prompts, pairs): return [0 for _ in pairs]\ndef g(prompt, a, b): return 0"
    (folder / "judge.py").write_text(judges)
    chat = {"chosen": CHAT, "rejected": other(CHAT)}
    rows = {
        "columns": {"question": "1", "answer": "a"},
        "numbers": PAIR | {"chosen": 1},
        "tokens": PAIR | {"chosen": [1, 2]},
        "parts": {"prompt": [{"type": "text", "text": "1"}]},
        "lists": PAIR | {"chosen": ["one"]},
        "blank": PAIR | {"chosen": ""},
        "one": PAIR,
        "chat": chat,
        "images": {"chosen": IMAGE, "rejected": other(IMAGE)},
        "roles": {"chosen": ROLES, "rejected": other(ROLES)},
    }
    rows |= {
        "orca": {"system": "s", "question": "1", "chosen": "one", "rejected": "two"},
        "kto": {"prompt": "1", "completion": "one", "label": True},
        "messages": {"messages": [{"role": "user", "content": "1"}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "1"}], "chosen": "one", "rejected": "two"},
        "from": {
            "prompt": "1",
            "chosen": {"from": "gpt", "value": "1"},
            "rejected": {"from": "gpt", "value": "2"},
        },
    }
    (folder / "pairs.txt").write_text(json.dumps(PAIR))
    (folder / "missing.csv").write_text("prompt,chosen,rejected\n1,one\n")
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row))
    (folder / "empty.jsonl").write_text("")
    mixed = {"mixed": {"prompt": [{"role": "user", "content": "1"}]}, "mixed_answers": {"chosen": CHAT}}
    for name, other_kind in mixed.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(PAIR)}\n{json.dumps(PAIR | other_kind)}\n")
    (folder / "malformed.jsonl").write_text(
        f'{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n{{"prompt": "1", "cho\n'
    )

    tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
    T5Config(decoder_start_token_id=0).save_pretrained(folder / "t5")
    T5Config().save_pretrained(folder / "no_start")
    CLIPConfig().save_pretrained(folder / "clip")
    Gemma3Config().save_pretrained(folder / "vision")
    for name in ("t5", "no_start", "clip", "vision"):
        tokenizer.save_pretrained(folder / name)
    tiny("llama", vocab_size=20).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    tiny("llama", vocab_size=43).save_pretrained(folder / "shapes")
    tokenizer.save_pretrained(folder / "shapes")
    model = tiny("llama")
    for name in ("pickled", "no_eos", "added", "no_template", "shuffled"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    file = folder / "shuffled" / "tokenizer.json"
    content = json.loads(file.read_text())
    tokens = content["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    file.write_text(json.dumps(content))
    tokenizer.save_pretrained(folder / "custom")
    (folder / "custom" / "code.py").write_text(
        "from pathlib import Path; Path('ran').touch(); class Config: pass"
    )
    custom = {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"},
    }
    (folder / "custom" / "config.json").write_text(json.dumps(custom))
    odd = AutoTokenizer.from_pretrained(TOY_MODEL)
    odd.eos_token = None
    odd.save_pretrained(folder / "no_eos")
    odd = AutoTokenizer.from_pretrained(TOY_MODEL)
    odd.chat_template = None
    (folder / "no_template" / "chat_template.jinja").unlink()
    odd.save_pretrained(folder / "no_template")
    odd = AutoTokenizer.from_pretrained(TOY_MODEL)
    odd.add_tokens([f"token{i}" for i in range(62 - len(odd))])
    odd.save_pretrained(folder / "added")
    config = LlamaConfig(**ARCHITECTURES["llama"] | {"num_labels": 2})
    LlamaForSequenceClassification(config).save_pretrained(folder / "two")
    tokenizer.save_pretrained(folder / "two")
    tiny("llama", quantization_config={"quant_method": "gptq", "bits": 4}).save_pretrained(
        folder / "quantized"
    )
    tokenizer.save_pretrained(folder / "quantized")
    for name in ("base", "another"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    save_adapter(folder / "base", folder / "adapter")
    save_adapter(folder / "base", folder / "biased", bias="lora_only")
    save_adapter(folder / "base", folder / "lost")
    save_adapter(folder / "base", folder / "short")
    save_adapter(folder / "base", folder / "adapters" / "a")
    save_adapter(folder / "another", folder / "adapters" / "b")
    config = folder / "lost" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / "base"), str(folder / "nowhere")))
    weights = load_file(folder / "short" / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, folder / "short" / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("method", "flags", "message"), WRONG)
def test_one_line_says_what_is_wrong(
    monkeypatch, tmp_path, tmp_path_factory, wrong, capsys, method, flags, message
):
    flags = flags.replace("{model}", "--model_name_or_path {toy} --dataset_name")
    paths = {"{dir}": str(wrong), "{toy}": TOY_MODEL, "{data}": TOY_DATA, "{root}": str(ROOT)}
    for name, path in paths.items():
        flags, message = flags.replace(name, path), message.replace(name, path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "bad_input")
    begin = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, method, flags)
    said = str(stop.value)
    assert said.startswith("error: ") and message in said and "\n" not in said and len(said) < 400
    assert time.monotonic() - begin < 30
    assert not [*tmp_path.iterdir()]  # not even output/


def start(*flags: str, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "dpo.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment() | env)


def test_as_a_process():
    result = start("--beta", "0")
    assert (
        result.returncode == 1 and result.stderr == "error: wrong arguments: beta must be positive, not 0.0\n"
    )
    result = start("--beta", "0", "--traceback")
    assert result.returncode == 1 and re.search(
        "Traceback.*in __post_init__.*beta must be", result.stderr, re.DOTALL
    )
    result = start("--beta", "0", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert result.returncode == 1 and not result.stderr  # the first process of the machine says it
