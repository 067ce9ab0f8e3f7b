"""Command lines: what carries over from TRL's documentation, and that the documented ones are taken."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import common
import cpo
import dpo

ROOT = Path(__file__).parent.parent


def parse(monkeypatch, script, command: str):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *command.split()])
    return common.parse(script.Arguments, script.check, script.TOY)


def test_a_command_of_trls_documentation_is_taken_as_it_is(monkeypatch):
    command = (
        "--model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized "
        "--num_train_epochs 1 --logging_steps 25 --output_dir Qwen2-0.5B-DPO"
    )
    args = parse(monkeypatch, dpo, command)
    assert args.model_name_or_path == "Qwen/Qwen2-0.5B-Instruct"
    assert args.dataset_name == "trl-lib/ultrafeedback_binarized"
    assert (args.num_train_epochs, args.logging_steps, args.output_dir) == (1, 25, "Qwen2-0.5B-DPO")
    assert args.learning_rate == 1e-6  # the toy's defaults stay out


def test_without_arguments_the_built_in_example_runs(monkeypatch):
    args = parse(monkeypatch, dpo, "--beta 0.2")
    assert Path(args.model_name_or_path, "config.json").exists()
    assert args.beta == 0.2 and args.max_steps == dpo.TOY["max_steps"]


def test_simpo_needs_no_second_flag(monkeypatch):
    args = parse(monkeypatch, cpo, "--loss_type simpo --model_name_or_path m --dataset_name d")
    assert (args.beta, args.simpo_gamma, args.cpo_alpha, args.learning_rate) == (2.5, 1.375, 0, 1e-6)
    args = parse(monkeypatch, cpo, "--loss_type alphapo --model_name_or_path m --dataset_name d")
    assert (args.beta, args.simpo_gamma, args.alpha, args.learning_rate) == (2.5, 0.1, 0.25, 7e-7)
    args = parse(
        monkeypatch, cpo, "--loss_type simpo --beta 10 --simpo_gamma 5.4 --cpo_alpha 0.05"
    )  # CPO-SimPO
    assert (args.beta, args.simpo_gamma, args.cpo_alpha) == (10, 5.4, 0.05)


def test_weighted_sums_of_losses(monkeypatch):
    args = parse(monkeypatch, dpo, "--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0")
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])
    args = parse(monkeypatch, dpo, "--rpo_alpha 0.5")
    assert (args.loss_type, args.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])


def commands(text: str) -> list[list[str]]:
    """The scripts' command lines in README.md or a docstring, from the script's name on."""
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    found = [
        re.search(r"(?:python|torchrun)\b[^#`]*?\b((?:dpo|cpo|alphapo|orpo|xpo)\.py\b[^#`&]*)", line)
        for line in lines
    ]
    return [match[1].split("   ")[0].split() for match in found if match and "..." not in match[1]]


TEXTS = {path.name: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("*po.py"))}
COMMANDS = [(name, command) for name, text in TEXTS.items() for command in commands(text)]


@pytest.mark.parametrize(
    ("name", "command"), COMMANDS, ids=[f"{name}: {' '.join(c)}" for name, c in COMMANDS]
)
def test_documented_commands_are_taken(monkeypatch, name, command):
    monkeypatch.chdir(ROOT)
    script = importlib.import_module(command[0].removesuffix(".py"))
    parse(monkeypatch, script, " ".join(command[1:]))


def test_commands_are_found():
    assert {name for name, _ in COMMANDS} == TEXTS.keys() and len(COMMANDS) >= 12
