"""The scripts as users run them, on the built-in example: resumed runs, references, sums over processes."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT, run_script
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

import common
import dpo

SHORT = "--max_steps 6 --batch_size 8 --eval_prompts 4 --max_new_tokens 8 --eval_steps 3 --save_steps 2"
SHORT = [*SHORT.split(), "--dataset_test_split", "validation"]  # which is short as well
TIMES = ("pairs_per_second", "tokens_per_second", "peak_memory_gib", "generation", "scoring", "time/training")


def last_wins(flags) -> list[str]:
    """The flags, each once: those that a test adds to SHORT replace its own."""
    found = {}
    for word in flags:
        if word.startswith("--"):
            found.pop(word, None)
            name = word
            found[name] = []
        else:
            found[name].append(word)
    return [word for name, values in found.items() for word in (name, *values)]


def command(script: str, output_dir: Path, *flags: str, processes: int = 1) -> list[str]:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    start = [sys.executable] if processes == 1 else torchrun
    return [*start, str(ROOT / script), "--output_dir", str(output_dir), *last_wins(flags)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}


def run(*args, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*args, **options), capture_output=True, text=True, env=environment(), timeout=300
    )


def succeed(*args, **options) -> str:
    result = run(*args, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def stop(script: str, output_dir: Path, *flags: str, after_steps: int, by: signal.Signals, **options) -> None:
    """Start a run and send it a signal once metrics.jsonl has so many steps."""
    metrics = output_dir / "metrics.jsonl"
    process = subprocess.Popen(
        command(script, output_dir, *flags, **options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    while process.poll() is None and (
        not metrics.exists() or f'"step": {after_steps}, "loss"' not in metrics.read_text()
    ):
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be stopped"
    for pid in [process.pid] if by != signal.SIGKILL else [process.pid, *children(process.pid)]:
        os.kill(pid, by)  # torchrun passes SIGTERM and SIGINT on to its processes
    assert process.wait(timeout=120) != 0


def children(parent: int) -> list[int]:
    stats = [path.read_text().rsplit(")", 1) for path in Path("/proc").glob("[0-9]*/stat")]
    return [int(name.split()[0]) for name, rest in stats if int(rest.split()[1]) == parent]


def metrics_of(output_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(TIMES)} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics_of(a) == metrics_of(b)
    assert (a / "completions.jsonl").read_text() == (b / "completions.jsonl").read_text()
    name = "model.safetensors" if (a / "model.safetensors").exists() else "adapter_model.safetensors"
    weights = load_file(a / name), load_file(b / name)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    names = [sorted(str(path.relative_to(top)) for path in top.rglob("*")) for top in (a, b)]
    assert names[0] == names[1]


SYNC = "--loss_type bco_pair --sync_ref_model --ref_model_sync_steps 2"
LORA = "--use_peft --lora_dropout 0.1 --gradient_checkpointing"


@pytest.mark.parametrize(("processes", "options"), [(2, SYNC), (2, LORA)])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, processes, options):
    flags = [*SHORT, *options.split()]
    succeed("dpo.py", tmp_path / "a", *flags, processes=processes)
    if options == SYNC:
        stop("dpo.py", tmp_path / "b", *flags, after_steps=3, by=signal.SIGTERM, processes=processes)
    stop("dpo.py", tmp_path / "b", *flags, after_steps=5, by=signal.SIGKILL, processes=processes)
    said = succeed("dpo.py", tmp_path / "b", *flags, processes=processes)
    assert "resuming after step" in said
    assert_same_run(tmp_path / "a", tmp_path / "b")
    steps = [line["step"] for line in metrics_of(tmp_path / "b") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics_of(tmp_path / "b") if "eval_loss" in line] == [0, 3, 6]


def test_the_reference_computed_beforehand_changes_nothing(tmp_path):
    flags = [*SHORT, "--save_steps", "3", "--save_total_limit", "1"]
    succeed("dpo.py", tmp_path / "a", *flags)
    succeed("dpo.py", tmp_path / "b", *flags, "--precompute_ref_log_probs")
    (tmp_path / "b" / "reference_logps_train.npy").unlink()
    (tmp_path / "b" / "reference_logps_test.npy").unlink()
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_reference_that_was_computed_beforehand_is_freed(tmp_path, monkeypatch):
    def count(*args):
        raise SystemExit(str(sum(isinstance(each, LlamaForCausalLM) for each in gc.get_objects())))

    monkeypatch.setattr(common, "Log", count)
    gc.collect()
    before = sum(isinstance(each, LlamaForCausalLM) for each in gc.get_objects())
    with pytest.raises(SystemExit, match=f"^{before + 1}$"):
        run_script(monkeypatch, "dpo", f"--precompute_ref_log_probs --max_steps 1 --output_dir {tmp_path}/a")


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_reduced_once_train_alike(tmp_path, monkeypatch, method):
    flags = "--max_steps 2 --batch_size 8 --per_device_train_batch_size 3 --eval_strategy no --dtype float64"
    for run, flag in (("a", ""), ("b", "--sync_gradients_once")):
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
            run_script(patch, method, f"{flags} {flag} --output_dir {tmp_path / run}")
    for line, other in zip(metrics_of(tmp_path / "a"), metrics_of(tmp_path / "b"), strict=True):
        for name in ("loss", "grad_norm"):
            assert other[name] == pytest.approx(line[name], rel=1e-9)
        assert line["grad_norm"] > 0


def test_before_the_first_step_policy_and_reference_agree_exactly(tmp_path):
    succeed("dpo.py", tmp_path / "a", *SHORT, "--max_steps", "1", "--bf16", "true", processes=2)
    before, first, *_ = metrics_of(tmp_path / "a")
    for metrics, prefix in ((before, "eval_"), (first, "")):
        assert metrics[f"{prefix}rewards/chosen"] == metrics[f"{prefix}rewards/rejected"] == 0
        assert metrics[f"{prefix}loss"] == pytest.approx(0.6931471805599453, abs=1e-7)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_reference_is_in_the_dtype_of_the_computation_unless_it_is_updated(bf16):
    frozen = torch.bfloat16 if bf16 else torch.float32
    tokenizer, device = AutoTokenizer.from_pretrained(common.TOY_MODEL), torch.device("cpu")
    args = dpo.Arguments(common.TOY_MODEL, bf16=bf16)
    policy = common.load_model(common.TOY_MODEL, args, device, trainable=True)
    for sync_ref_model, dtype in ((False, frozen), (True, torch.float32)):
        args = dpo.Arguments(common.TOY_MODEL, bf16=bf16, sync_ref_model=sync_ref_model)
        reference = dpo.load_reference(args, device, tokenizer, policy)
        with reference() as model:
            assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


SUMS = """
import sys
from types import SimpleNamespace
import torch.distributed as dist
import common

dist.init_process_group("gloo")
with open(f"{sys.argv[1]}/{dist.get_rank()}", "w") as file:
    for names in (["a", "b"], ["b", "a"], ["a"], ["a", "c"]):
        log = SimpleNamespace(shares={}, signals=[])
        for i, name in enumerate(names if dist.get_rank() else ["a", "b"]):
            common.Log.add(log, {name: i + 1.5})
        try:
            print(common.Log.all_reduce(log), file=file)
        except SystemExit as stop:
            print(stop, file=file)
dist.destroy_process_group()
"""


def test_processes_that_log_different_metrics_fail_and_say_so(tmp_path):
    (tmp_path / "sums.py").write_text(SUMS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, str(tmp_path / "sums.py"), str(tmp_path)]
    subprocess.run(command, env=environment() | {"PYTHONPATH": str(ROOT)}, timeout=120, check=True)
    first, second = ((tmp_path / rank).read_text().splitlines() for rank in "01")
    assert first[0] == second[0] == "({'a': 3.0, 'b': 5.0}, False)"
    said = [
        f"error: processes log different metrics: a, b, interrupted and {names}interrupted"
        for names in ("b, a, ", "a, ", "a, c, ")
    ]
    assert first[1:] == said and second[1:] == ["1"] * 3  # the first process of a machine says it
