"""Command lines: what carries over from TRL's documentation, and one clear line for what is wrong."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import common
import cpo
import dpo
import xpo

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


WRONG = [
    (dpo, "--loss_type sigmod", "unknown loss_type 'sigmod'; known are sigmoid"),
    (dpo, "--beta 0", "beta must be positive"),
    (dpo, "--lerning_rate 1", "did you mean --learning_rate?"),
    (dpo, "--label_smoothing 0.5", "label_smoothing must be in [0, 0.5)"),
    (dpo, "--label_smoothing 0.1 --loss_type hinge", "label_smoothing has no meaning for hinge"),
    (dpo, "--loss_type exo_pair --label_smoothing 0", "exo_pair needs a label_smoothing above 0"),
    (dpo, "--loss_type sigmoid sft --loss_weights 1", "2 loss types but 1 loss_weights"),
    (dpo, "--f_divergence_type kl", "unknown f_divergence_type 'kl'"),
    (dpo, "--f_divergence_type js_divergence --loss_type ipo", "f_divergence_type has no meaning for ipo"),
    (dpo, "--sync_ref_model --precompute_ref_log_probs", "cannot be precomputed"),
    (dpo, "--use_weighting --loss_type aot", "aot compares quantiles"),
    (dpo, "--ld_alpha 0.5 --loss_type ipo", "ipo, sigmoid_norm, sft average"),
    (dpo, "--dataset_name d", "go together"),
    (cpo, "--simpo_gamma 1", "simpo_gamma is for simpo, alphapo only"),
    (cpo, "--loss_type ipo --label_smoothing 0.1", "label_smoothing must be in [0, 0.5), and is for"),
    (xpo, "--judge nowhere.py:judge", "nowhere.py is no file"),
    (
        xpo,
        "--judge nowhere.py:judge --reward_model_path m",
        "give --reward_model_path or --judge, one of them",
    ),
    (xpo, "--model_name_or_path m --dataset_name d", "give --reward_model_path or --judge"),
    (xpo, "--model_name_or_path m --dataset_name d --judge nowhere.py:judge", "nowhere.py is no file"),
    (xpo, "--temperature 0", "the method needs samples"),
    (xpo, "--alpha -1", "alpha must be one or more values of at least 0"),
    (xpo, "--beta 0.1 0", "beta must be positive"),
    (xpo, "--max_new_tokens 2000", "has to exceed max_new_tokens"),
]


@pytest.mark.parametrize(("script", "command", "message"), WRONG, ids=[command for _, command, _ in WRONG])
def test_wrong_arguments_get_one_line(monkeypatch, script, command, message):
    with pytest.raises(SystemExit) as error:
        parse(monkeypatch, script, command)
    assert message in error.value.code
    assert "\n" not in error.value.code


LATE = {  # what shows only when processes, model and data are there, still before any work
    "--batch_size 7 --per_device_train_batch_size 0": "per_device_train_batch_size must be positive",
    "--gradient_accumulation_steps 2 --batch_size 8": "give one of them",
    "--loss_type aot --per_device_train_batch_size 4": "aot needs the batch at once",
    "--batch_size 5000": "do not fill a batch",
    "--model_name_or_path nowhere --dataset_name nowhere": "cannot load nowhere",
    "--max_length 3": "no training rows are left",
}


@pytest.mark.parametrize("command", LATE)
def test_wrong_arguments_leave_nothing_behind(tmp_path, command):
    arguments = [sys.executable, ROOT / "dpo.py", *command.split(), "--output_dir", tmp_path / "out"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert LATE[command] in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


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
