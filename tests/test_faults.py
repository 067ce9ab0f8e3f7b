"""What happens to training runs: kills anywhere, dying ranks, other machines, bad disks, bad numbers.

pytest -n 0 -m long tests/test_faults.py has hundreds of kills at random places; KILLS says how many.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import METHODS, ROOT
from safetensors.torch import load_file
from test_runs import assert_same_run, environment, last_wins, metrics_of

from common import TOY_DATA, TOY_MODEL

SCRIPTS = [f"{method}.py" for method in METHODS]
FLAGS = {"dpo.py": "--precompute_ref_log_probs", "cpo.py": "--loss_type simpo"}
FLAGS |= {"alphapo.py": "--use_peft --lora_dropout 0.1"}
SHORT = "--max_steps 4 --batch_size 8 --eval_prompts 4 --max_new_tokens 8 --eval_steps 2 --save_steps 1"


@cache
def few_pairs() -> str:
    """A directory with the first pairs of the built-in example."""
    folder = tempfile.mkdtemp()
    for name, rows in (("train", 64), ("test", 16)):
        lines = Path(TOY_DATA, f"{name}.jsonl").read_text().splitlines(keepends=True)[:rows]
        Path(folder, f"{name}.jsonl").write_text("".join(lines))
    return folder


def arguments(script: str, output_dir: Path, *flags: str) -> list[str]:
    data = ["--model_name_or_path", TOY_MODEL, "--dataset_name", few_pairs(), "--learning_rate", "1e-4"]
    flags = last_wins([*data, *SHORT.split(), *FLAGS.get(script, "").split(), *flags])
    return [str(ROOT / script), "--output_dir", str(output_dir), *flags]


def start(script: str, output_dir: Path, *flags: str, processes=1, fault=None, launch=(), output=None, **env):
    torchrun = ["-m", "torch.distributed.run", *(launch or ["--standalone"]), f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 or launch else [])]
    return subprocess.Popen(
        [*command, str(ROOT / "tests" / "faulty.py"), *arguments(script, output_dir, *flags)],
        stdout=output or subprocess.PIPE,
        stderr=output or subprocess.PIPE,
        text=True,
        env=environment() | env | ({"FAULT": json.dumps(fault)} if fault else {}),
        start_new_session=True,
    )


@cache
def server() -> subprocess.Popen:
    """Where runs of one process are started: there, everything is imported already."""
    command, pipe = [sys.executable, str(ROOT / "tests" / "faulty.py")], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment())


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and output."""
    try:
        said = "".join(process.communicate(timeout=300))
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # what may be left of it
        except ProcessLookupError:
            pass
    return process.returncode, said


def run(*args, processes=1, fault=None, launch=(), **env) -> tuple[int, str]:
    """Exit status and output of a run."""
    if processes > 1 or launch:
        return finish(start(*args, processes=processes, fault=fault, launch=launch, **env))
    env |= {"FAULT": json.dumps(fault or {})}
    with tempfile.NamedTemporaryFile("r") as output:
        request = {"argv": arguments(*args), "environment": env, "output": output.name}
        server().stdin.write(json.dumps(request) + "\n")
        server().stdin.flush()
        return int(server().stdout.readline()), output.read()


def succeed(*args, **options) -> str:
    status, said = run(*args, **options)
    assert status == 0, said[-3000:]
    return said


@cache
def uninterrupted(script: str, processes: int = 1) -> Path:
    """The output_dir of a run without a fault."""
    folder = Path(tempfile.mkdtemp(), "run")
    succeed(script, folder, processes=processes)
    return folder


CHAIN = {  # starts of one run, each of which is killed at another place: place, call, event, signal
    "dpo.py": [
        ("load_data", 1, 300, "SIGINT"),
        ("precompute", 1, 500, "SIGKILL"),
        ("evaluate", 1, 1000, "SIGKILL"),
        ("save_checkpoint", 1, 3000, "SIGKILL"),
        ("resume", 1, 100, "SIGKILL"),
        ("clip_grad_norm_", 1, 30, "SIGTERM"),
        ("rmtree", 1, 3, "SIGKILL"),
        ("save_model", 1, 300, "SIGKILL"),
    ],
    "xpo.py": [
        ("sample", 2, 20000, "SIGKILL"),
        ("generate", 9, 9000, "SIGINT"),
        ("save_model", 1, 9, "SIGKILL"),
    ],
}
OTHERS = [  # those of the other scripts
    ("loss_and_metrics", 3, 50, "SIGKILL"),
    ("save_checkpoint", 1, 3000, "SIGKILL"),
]
CHAINS = [("dpo.py", 2), *((script, 2 if script == "xpo.py" else 1) for script in SCRIPTS)]


@pytest.mark.parametrize(("script", "processes"), CHAINS)
def test_killed_anywhere_the_same_command_resumes_the_run(tmp_path, script, processes):
    faults = CHAIN.get(script, OTHERS)
    faults = faults[1::2] if len(faults) > 4 and processes == 2 else faults  # the others with one process
    for i, (where, call, event, sent) in enumerate(faults):
        fault = {"where": where, "call": call, "event": event, "signal": sent, "rank": i % processes}
        status, said = run(script, tmp_path / "b", processes=processes, fault=fault)
        assert status != 0, f"the fault did not happen: {fault}\n{said[-2000:]}"
    succeed(script, tmp_path / "b", processes=processes)
    assert_same_run(uninterrupted(script, processes), tmp_path / "b")
    steps = [line["step"] for line in metrics_of(tmp_path / "b") if "loss" in line]
    assert steps == [1, 2, 3, 4]


@pytest.mark.long
def test_hundreds_of_kills(tmp_path):
    kills, wanted, rng = 0, int(os.environ.get("KILLS", 200)), random.Random(int(os.environ.get("SEED", 0)))
    failures, missed = [], 0
    rounds = [(script, processes) for script in SCRIPTS for processes in (1, 2)]
    counts = {}
    while kills < wanted:
        for script, processes in rounds:
            whole, killed = tmp_path / f"{script}-{processes}", tmp_path / "killed"
            if not whole.exists():
                counts_file = tmp_path / "counts.json"
                succeed(script, whole, processes=processes, COUNTS=str(counts_file))
                counts[script, processes] = json.loads(counts_file.read_text())
            history = []
            for _ in range(12 if processes == 1 else 6):
                places = {place: events for place, events in counts[script, processes].items() if events}
                where = rng.choice([*places])
                call = int(rng.random() ** 3 * len(places[where]))  # a run that is resumed makes fewer calls
                event = 1 + int(rng.random() * 0.9 * places[where][call])  # counting adds some calls
                fault = {"where": where, "call": call + 1, "event": event}
                fault |= {
                    "signal": rng.choice(["SIGKILL", "SIGTERM", "SIGINT"]),
                    "rank": rng.randrange(processes),
                }
                fault |= {"who": rng.choice(["one", "all"])}
                history.append(fault)
                status, said = run(script, killed, processes=processes, fault=fault)
                kills, missed = kills + (status != 0), missed + (status == 0)
                if "finished already" in said or status == 0:
                    break
            status, said = run(script, killed, processes=processes)
            try:
                assert status == 0, said
                assert_same_run(whole, killed)
            except AssertionError as error:
                failures.append((script, processes, history, str(error)[-20_000:]))
            shutil.rmtree(killed)
            print(f"{kills} kills, {missed} that came too late, {len(failures)} failures", flush=True)
    assert not failures, "\n".join(map(str, failures))


def test_torchrun_restarts_a_run_whose_rank_died(tmp_path):
    fault = {"where": "clip_grad_norm_", "call": 3, "event": 20, "signal": "SIGKILL", "rank": 1}
    launch = ["--standalone", "--max-restarts", "1"]
    said = succeed("dpo.py", tmp_path / "b", processes=2, fault=fault, launch=launch)
    assert "resuming after step 2" in said
    assert_same_run(uninterrupted("dpo.py", processes=2), tmp_path / "b")

    # Two agents, as on two nodes.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    launch = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
    nodes = [start("dpo.py", tmp_path / "c", launch=launch) for _ in range(2)]
    for status, said in map(finish, nodes):
        assert status == 0, said[-2000:]
    assert_same_run(uninterrupted("dpo.py", processes=2), tmp_path / "c")


EIGHT = pytest.param(8, 4, marks=pytest.mark.long)  # as many as the GPUs of a node


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), EIGHT])
def test_a_run_is_resumed_with_another_number_of_processes(tmp_path, before, after):
    fault = {"where": "clip_grad_norm_", "call": 3, "event": 9, "signal": "SIGKILL", "who": "all"}
    assert run("cpo.py", tmp_path / "b", processes=before, fault=fault)[0] != 0
    succeed("cpo.py", tmp_path / "b", processes=after)
    runs = uninterrupted("cpo.py", before), tmp_path / "b"
    a, b = (load_file(run / "model.safetensors") for run in runs)
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("script", ["dpo.py", "cpo.py"])
def test_a_mesh_of_two_by_two_trains_as_one_process(tmp_path, script):
    flags, on_mesh = ["--dtype", "float64"], ["--hsdp_shard_size", "2"]
    assert run(script, tmp_path / "a", *flags)[0] == 0
    fault = {"where": "clip_grad_norm_", "call": 3, "event": 9, "signal": "SIGKILL", "who": "all"}
    assert run(script, tmp_path / "b", *flags, *on_mesh, processes=4, fault=fault)[0] != 0
    assert "resuming after step 2" in succeed(script, tmp_path / "b", *flags, *on_mesh, processes=4)
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in "ab")
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-10
    a, b = (metrics_of(tmp_path / run) for run in "ab")
    for line, other in zip(a, b, strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & {*line}:
            assert other[name] == pytest.approx(line[name], rel=1e-9)


def checkpoint_after_three_steps(output_dir: Path, processes: int = 1) -> Path:
    fault = {"where": "clip_grad_norm_", "call": 4, "event": 9, "signal": "SIGKILL", "who": "all"}
    assert run("cpo.py", output_dir, processes=processes, fault=fault)[0] != 0
    return output_dir / "checkpoints" / "00000003"


DAMAGES = {  # of the newest checkpoint: its directory, and one of its files
    "a short file": lambda folder, file: os.truncate(file, 1000),
    "a missing file": lambda folder, file: file.unlink(),
    "unreadable metadata": lambda folder, file: (folder / ".metadata").write_bytes(b"damaged"),
}


@pytest.mark.parametrize(("damage", "processes"), [*((name, 1) for name in DAMAGES), ("a missing file", 2)])
def test_a_checkpoint_that_cannot_be_loaded_is_named_and_the_one_before_it_used(tmp_path, damage, processes):
    folder = checkpoint_after_three_steps(tmp_path / "b", processes)
    DAMAGES[damage](folder, folder / f"__{processes - 1}_0.distcp")
    said = succeed("cpo.py", tmp_path / "b", processes=processes)
    assert re.search(rf"the checkpoint {folder} cannot be loaded \(.+\): the one before it is used", said)
    assert "resuming after step 2" in said
    assert_same_run(uninterrupted("cpo.py", processes), tmp_path / "b")


def test_a_checkpoint_is_complete_once_it_has_metadata(tmp_path):
    (checkpoint_after_three_steps(tmp_path / "b") / ".metadata").unlink()
    said = succeed("cpo.py", tmp_path / "b")
    assert "resuming after step 2" in said and "cannot be loaded" not in said
    assert_same_run(uninterrupted("cpo.py"), tmp_path / "b")


def test_a_run_without_a_checkpoint_that_can_be_loaded_fails(tmp_path):
    folder = checkpoint_after_three_steps(tmp_path / "a")
    for file in folder.parent.glob("*/*.distcp"):
        os.truncate(file, 1000)
    metrics = metrics_of(tmp_path / "a")
    status, said = run("cpo.py", tmp_path / "a")
    assert status == 1 and "Traceback" not in said
    assert f"error: no checkpoint in {tmp_path / 'a'} can be loaded; to start anew, delete it" in said
    assert metrics_of(tmp_path / "a") == metrics


def test_a_full_disk_costs_no_step_that_was_saved(tmp_path):
    """Files of a certain size stand for a disk of that size: a write fails in the same way."""
    folder = checkpoint_after_three_steps(tmp_path / "b")
    limit = (folder / "__0_0.distcp").stat().st_size // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status, said = finish(start("cpo.py", tmp_path / "b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1 and "Traceback" not in said
    assert re.search(r"error: cannot save a checkpoint after step 4 .*earlier ones are intact", said)
    assert "resuming after step 3" in succeed("cpo.py", tmp_path / "b")
    assert_same_run(uninterrupted("cpo.py"), tmp_path / "b")


@pytest.mark.long
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        succeed("cpo.py", tmp_path / "a", "--save_total_limit", "9")
        status, said = run("cpo.py", disk / "b", "--save_total_limit", "9")
        assert status == 1 and re.search(r"error: cannot save a checkpoint .* \(\d MiB are free\)", said)
        subprocess.run(["mount", "-o", "remount,size=99m", disk], check=True)
        assert "resuming after step" in succeed("cpo.py", disk / "b", "--save_total_limit", "9")
        assert_same_run(tmp_path / "a", disk / "b")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        status, said = run("cpo.py", disk / "c")
        assert status == 1 and "cannot write to --output_dir" in said and "Traceback" not in said
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_runs_in_one_place(tmp_path):
    uninterrupted("cpo.py")  # from here on, the second run starts without delay
    longer = "--max_steps", "120", "--save_steps", "120", "--eval_strategy", "no"
    first = start("cpo.py", tmp_path / "a", *longer)
    while not (tmp_path / "a" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second, said = run("cpo.py", tmp_path / "a", *longer)
    assert second == 1 and "another run is running in" in said and "Traceback" not in said
    assert finish(first)[0] == 0
    assert [line["step"] for line in metrics_of(tmp_path / "a")] == [*range(1, 121)]


@pytest.mark.parametrize(
    ("value", "calls"), [("nan", [2]), ("inf", [3]), ("1e38", [2, 3]), ("nan", [2, 3, 4])]
)
def test_numbers_that_are_not_finite_on_one_rank_skip_the_step_on_all(tmp_path, value, calls):
    fault = {"where": "loss_and_metrics", "calls": calls, "value": float(value), "rank": 1}
    # Two micro-batches would hide nothing: each process has one, and evaluations of step 0 are off.
    flags = ("--eval_strategy", "no", "--max_grad_norm", "1e-3")
    status, said = run("orpo.py", tmp_path / "a", *flags, processes=2, fault=fault)
    lines = metrics_of(tmp_path / "a")
    assert [line["skipped"] for line in lines] == [float(line["step"] in calls) for line in lines]
    assert all(line["grad_norm"] is None for line in lines if line["skipped"])
    if len(calls) == 3:
        assert status == 1 and "the gradient was not finite in three steps up to 4" in said
        assert (tmp_path / "a" / "checkpoints" / "00000003" / ".metadata").exists()
        return
    assert status == 0, said[-2000:]
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_the_threshold_of_bco_leaves_out_a_step_that_was_skipped(tmp_path):
    """It is the mean reward of the others."""
    flags = ("--loss_type", "bco_pair", "--eval_strategy", "no")
    fault = {"where": "loss_and_metrics", "calls": [2], "value": float("nan")}
    assert run("dpo.py", tmp_path / "a", *flags, fault=fault)[0] == 0
    lines = metrics_of(tmp_path / "a")
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0]
    rewards = [(line["rewards/chosen"] + line["rewards/rejected"]) / 2 for line in lines]
    found = {"bco_rewards": torch.zeros(2, dtype=torch.float64)}
    dcp.load(found, checkpoint_id=tmp_path / "a" / "checkpoints" / "00000004", no_dist=True)
    assert found["bco_rewards"].tolist() == pytest.approx([sum(rewards) - rewards[1], 3])
    assert rewards[1] != 0


@pytest.mark.long
@pytest.mark.parametrize("script", ["dpo.py", "xpo.py"])
def test_memory_and_open_files_do_not_grow_in_2000_steps(tmp_path, script):
    flags = "--max_steps 2000 --eval_steps 50 --save_steps 50 --batch_size 4 --max_new_tokens 4".split()
    with (tmp_path / "said").open("w") as said:
        process = start(script, tmp_path / "a", *flags, output=said)
        files, memory = [], []
        while process.poll() is None:
            time.sleep(0.5)
            try:
                files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
                status = Path(f"/proc/{process.pid}/status").read_text()
                memory.append(int(re.search(r"VmRSS:\s*(\d+)", status)[1]) / 1024)
            except (OSError, TypeError):
                break  # it has just ended
        assert process.wait() == 0, (tmp_path / "said").read_text()[-2000:]
    quarter = len(memory) // 4
    assert quarter > 20
    slope = np.polyfit(np.arange(len(memory) - quarter), memory[quarter:], 1)[0] * len(memory)
    print(
        f"{script}: {np.median(memory):.0f} MiB, {slope:+.1f} MiB in 2000 steps; {max(files)} files at most"
    )
    assert slope < 0.03 * np.median(memory)
    assert max(files[2 * quarter :]) <= max(files[: 2 * quarter])
    assert len(metrics_of(tmp_path / "a")) == 2000 + 41
