"""What a run leaves in output_dir, what becomes of the next run there, and where else results go."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import tiny
from test_runs import SHORT, environment, last_wins, metrics_of, run, stop, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import dpo
from common import TOY_DATA, TOY_MODEL


def saved(tmp_path, kind: str, **changes):
    """A tiny model, loaded as the scripts load it, its tokenizer, and arguments to save it with."""
    tiny(kind, **changes).float().save_pretrained(tmp_path / "before")
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
    args = dpo.Arguments(
        model_name_or_path="m", dataset_name="d", output_dir=str(tmp_path / "after"), bf16=False
    )
    policy = common.load_model(str(tmp_path / "before"), args, torch.device("cpu"), trainable=True)
    return policy, tokenizer, args


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "mixtral", "gpt2", "gemma2"]
)  # qwen2, gpt2, gemma2 tie weights
def test_what_is_saved_loads_with_the_same_logits(tmp_path, kind):
    policy, tokenizer, args = saved(tmp_path, kind)
    with torch.no_grad():
        for parameter in policy.parameters():  # as if it had been trained
            parameter.data.mul_(1.1)
    common.save_model(args, policy, tokenizer)
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded = AutoModelForCausalLM.from_pretrained(args.output_dir, dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, policy(ids).logits)
    assert loaded.config.architectures == [type(tiny(kind)).__name__]
    assert AutoTokenizer.from_pretrained(args.output_dir).chat_template == tokenizer.chat_template
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).glob("*.safetensors")) for d in ("before", "after")]
    assert sizes[1] < 1.1 * sizes[0]  # tied weights are there once
    assert json.loads((tmp_path / "after" / "run.json").read_text())["finished"]


def test_dropout_is_off_in_training_and_as_it_was_in_what_is_saved(tmp_path):
    policy, tokenizer, args = saved(tmp_path, "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert policy.training and torch.equal(policy(ids).logits, policy(ids).logits)
    common.save_model(args, policy, tokenizer)
    assert json.loads((tmp_path / "after" / "config.json").read_text())["attn_pdrop"] == 0.5


def test_the_model_card_says_what_was_trained_and_how_well(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/here/dpo.py", "--beta", "0.2"])
    names = {"model_name_or_path": "org/base", "dataset_name": TOY_DATA}
    args = dpo.Arguments(**names, output_dir=str(tmp_path))
    lines = [{"step": 0, "eval_loss": 0.7}, {"step": 5, "eval_loss": 0.25}, {"step": 6, "loss": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common.write_model_card(args)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/base" and card.data.datasets is None  # a file is no name of the Hub
    assert card.data.library_name == "transformers" and "dpo" in card.data.tags
    assert "| eval_loss | 0.25 |" in card.text and "0.7" not in card.text and "dpo.py --beta 0.2" in card.text
    args.model_name_or_path = "other"
    common.write_model_card(args)
    assert "other trained with dpo" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    common.write_model_card(args)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_upload(tmp_path, monkeypatch):
    """--push_to_hub creates the repository and uploads what from_pretrained needs, without checkpoints."""
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append(name)
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            calls.append((repo_id, Path(folder_path, "model.safetensors").exists(), ignore_patterns[0]))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    policy, tokenizer, args = saved(tmp_path, "llama")
    args.push_to_hub = True
    common.save_model(args, policy, tokenizer)
    assert calls == ["after", ("me/after", True, "checkpoints/*")]


TRACKERS = """
import json
def write(*row):
    with open("tracked.jsonl", "a") as file:
        file.write(json.dumps(row) + chr(10))
def init(project, name, config): write("init", project, name, config["beta"])
def log(metrics, step): write("log", step, metrics.get("loss"))
def finish(): write("finish")
"""


def test_an_output_dir_holds_one_run(tmp_path):
    flags = [
        *SHORT,
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--report_to",
        "wandb",
        "--run_name",
        "first",
    ]
    (tmp_path / "wandb.py").write_text(TRACKERS)  # stands in for the package, and for trackio, which is alike
    command = [sys.executable, Path(dpo.__file__), "--output_dir", "out", *last_wins(flags)]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run(command, env=environment() | {"PYTHONPATH": str(tmp_path)}, **options)
    assert result.returncode == 0, result.stderr[-2000:]
    tracked = [json.loads(line) for line in (tmp_path / "tracked.jsonl").read_text().splitlines()]
    metrics = metrics_of(tmp_path / "out")
    losses = {line["step"]: line["loss"] for line in metrics if "loss" in line}
    assert tracked[0] == ["init", "out", "first", 0.1] and tracked[-1] == ["finish"]
    assert [row[1:] for row in tracked[1:-1] if row[2]] == [[1, losses[1]], [2, losses[2]]]

    out, flags = tmp_path / "out", [*SHORT, "--max_steps", "2"]
    assert "finished already" in succeed("dpo.py", out, *flags)
    result = run("dpo.py", out, *flags, "--beta", "0.2")
    assert (
        result.returncode == 1 and "beta 0.1 (now 0.2)" in result.stderr and "Traceback" not in result.stderr
    )
    result = run("cpo.py", out, *flags)
    assert result.returncode == 1 and "script dpo.py (now cpo.py)" in result.stderr
    assert metrics_of(out) == metrics


def test_a_run_of_another_version_is_not_resumed(tmp_path):
    """Its files have another format: run.json has had a number for it since the second one."""
    args = dpo.Arguments("m", dataset_name="d", output_dir=str(tmp_path))
    common.write_run(args, finished=False)
    common.check_output_dir(args)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run.pop("format") == 2
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(SystemExit, match="^error: another run.*format None .now 2.; .*delete that one$"):
        common.check_output_dir(args)


def test_tensorboard_has_every_step_at_once(tmp_path, monkeypatch):
    """A process that is killed does not close it, and a resumed run writes no step again."""
    calls = []

    class Writer:  # as torch.utils.tensorboard's
        def __init__(self, folder):
            calls.append(folder)

        def __getattr__(self, name):
            return lambda *args: calls.append((name, *args))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    args = common.Arguments("m", output_dir=str(tmp_path))
    args.report_to = "tensorboard"
    tracker = common.open_tracker(args)
    tracker.log({"loss": 0.5, "lr": 0.1}, step=3)
    tracker.finish()
    rows = [("add_scalar", "loss", 0.5, 3), ("add_scalar", "lr", 0.1, 3)]
    assert calls == [str(tmp_path), *rows, ("flush",), ("close",)]


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_a_run_does_not_overwrite_a_model_such_as_the_one_it_loads(tmp_path, file):
    (tmp_path / file).write_text("{}")
    args = dpo.Arguments(str(tmp_path), dataset_name="d", output_dir=str(tmp_path))
    with pytest.raises(SystemExit, match="^error: --output_dir .* has a model, which would be overwritten"):
        common.check_output_dir(args)


def test_a_run_does_not_overwrite_the_result_of_another(tmp_path):
    policy, tokenizer, args = saved(tmp_path, "llama")
    common.save_model(args, policy, tokenizer)
    args = dpo.Arguments(args.output_dir, dataset_name="d", output_dir=args.output_dir)
    with pytest.raises(SystemExit, match="^error: another run is in"):
        common.check_output_dir(args)


def test_a_run_is_resumed_with_the_data_it_began_with(tmp_path):
    """And with fewer pairs at a time, if memory was short."""
    rows = [{"prompt": f"{i}=", "chosen": "one", "rejected": "ones"} for i in range(40)]
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"

    def write(rows: list[dict]) -> None:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    flags = ["--model_name_or_path", TOY_MODEL, "--dataset_name", str(data), "--batch_size", "8"]
    flags += ["--max_steps", "200", "--precompute_ref_log_probs", "--eval_strategy", "no"]
    write(rows)
    stop("dpo.py", out, *flags, after_steps=3, by=signal.SIGTERM)
    before = metrics_of(out)
    write([*rows[:7], rows[7] | {"chosen": "six"}, *rows[8:]])
    result = run("dpo.py", out, *flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"another run is in {out}: data_digest " in result.stderr
    assert metrics_of(out) == before
    write(rows)
    fewer = ["--per_device_train_batch_size", "4", "--gradient_checkpointing"]
    stop("dpo.py", out, *flags, *fewer, after_steps=before[-1]["step"] + 2, by=signal.SIGTERM)
    assert [line["step"] for line in metrics_of(out)][: len(before) + 2] == [*range(1, len(before) + 3)]


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    result = run("dpo.py", tmp_path / "out", *SHORT, "--report_to", "trackio")
    assert result.returncode == 1 and "pip install trackio" in result.stderr
    assert not (tmp_path / "out").exists()
