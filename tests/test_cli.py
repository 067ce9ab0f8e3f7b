"""Command lines: one of TRL's documentation is accepted, and so is every one of our own documentation."""

import re
from pathlib import Path

import pytest
from conftest import METHODS, ROOT, parse


def test_a_command_of_trls_documentation_is_accepted_as_it_is(monkeypatch):
    command = (
        "--model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized "
        "--num_train_epochs 1 --logging_steps 25 --output_dir Qwen2-0.5B-DPO"
    )
    args = parse(monkeypatch, "dpo", command)
    assert args.model_name_or_path == "Qwen/Qwen2-0.5B-Instruct"
    assert args.dataset_name == "trl-lib/ultrafeedback_binarized"
    assert (args.num_train_epochs, args.logging_steps, args.output_dir) == (1, 25, "Qwen2-0.5B-DPO")
    assert args.learning_rate == 1e-6  # the toy's defaults stay out


def test_trls_command_for_xpo_is_accepted_as_it_is(monkeypatch):
    command = (
        "--model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --judge pair_rm "
        "--dataset_name trl-lib/ultrafeedback-prompt --learning_rate 5.0e-7 --logging_steps 25 "
        "--output_dir Qwen2.5-0.5B-XPO-PairRM --warmup_ratio 0.1 --push_to_hub"
    )
    args = parse(monkeypatch, "xpo", command)
    assert (args.judge, args.is_pair_rm, args.reward_model_path) == ("pair_rm", True, None)
    assert (args.learning_rate, args.logging_steps, args.warmup_steps) == (5e-7, 25, 0.1)
    assert (args.output_dir, args.push_to_hub) == ("Qwen2.5-0.5B-XPO-PairRM", True)
    loaded = []
    module = __import__("xpo")
    monkeypatch.setattr(module.common, "from_pretrained", lambda kind, path, *_, **__: loaded.append(path))
    with pytest.raises(TypeError):  # there is no model to go on with
        module.load_pair_rm(args, None)
    assert loaded == ["llm-blender/PairRM-hf"] * 2


def test_without_arguments_the_built_in_example_runs(monkeypatch):
    args = parse(monkeypatch, "dpo", "--beta 0.2")
    assert Path(args.model_name_or_path, "config.json").exists()
    assert (args.beta, args.max_steps, args.batch_size, args.learning_rate) == (0.2, 100, 32, 3e-5)
    assert parse(monkeypatch, "xpo", "").max_steps == 60
    assert parse(monkeypatch, "dpo", "--gradient_accumulation_steps 2").batch_size == 64


@pytest.mark.parametrize("method", METHODS)
def test_a_flag_beats_the_value_of_the_built_in_example(monkeypatch, method):
    args = parse(monkeypatch, method, "--learning_rate 1e-7 --max_steps 7 --batch_size 16")
    assert (args.learning_rate, args.max_steps, args.batch_size) == (1e-7, 7, 16)


def test_simpo_needs_no_second_flag(monkeypatch):
    args = parse(monkeypatch, "cpo", "--loss_type simpo --model_name_or_path m --dataset_name d")
    assert (args.beta, args.simpo_gamma, args.cpo_alpha, args.learning_rate) == (2.5, 1.375, 0, 1e-6)
    args = parse(monkeypatch, "cpo", "--loss_type alphapo --model_name_or_path m --dataset_name d")
    assert (args.beta, args.simpo_gamma, args.alpha, args.learning_rate) == (2.5, 0.1, 0.25, 7e-7)
    cpo_simpo = "--loss_type simpo --beta 10 --simpo_gamma 5.4 --cpo_alpha 0.05"
    args = parse(monkeypatch, "cpo", cpo_simpo)
    assert (args.beta, args.simpo_gamma, args.cpo_alpha) == (10, 5.4, 0.05)


def test_weighted_sums_of_losses(monkeypatch):
    args = parse(monkeypatch, "dpo", "--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0")
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])
    args = parse(monkeypatch, "dpo", "--rpo_alpha 0.5")
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])


def commands(text: str) -> list[tuple[str, str]]:
    """(method, flags) of the scripts' command lines in README.md or in a docstring."""
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    pattern = rf"(?:python|torchrun)\b[^#`]*?\b({'|'.join(METHODS)})\.py\b([^#`&]*)"
    found = [re.search(pattern, line) for line in lines]
    return [(match[1], match[2].split("   ")[0]) for match in found if match and "..." not in match[2]]


TEXTS = {"README": ROOT / "README.md"} | {method: ROOT / f"{method}.py" for method in METHODS}
COMMANDS = [(name, *command) for name, path in TEXTS.items() for command in commands(path.read_text())]


@pytest.mark.parametrize(("name", "method", "flags"), COMMANDS)
def test_documented_commands_are_accepted(monkeypatch, name, method, flags):
    parse(monkeypatch, method, flags)


def test_the_readme_and_every_script_document_a_command():
    assert {name for name, *_ in COMMANDS} == TEXTS.keys() and len(COMMANDS) >= 12
    assert {method for name, method, _ in COMMANDS if name == method} == {*METHODS}
