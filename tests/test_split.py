"""Metrics and gradients do not depend on how a batch is split over processes and micro-batches (float64)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import METHODS, save_adapter, tiny
from gradients import CASES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{processes: {(method, case, pairs per micro-batch): (metrics, gradient)}}."""
    folder = tmp_path_factory.mktemp("split")
    tiny("gpt2").save_pretrained(
        folder / "model"
    )  # GPT-2, for it computes all of it in the dtype of its weights
    tiny("gpt2", seed=1).save_pretrained(folder / "model-reference")
    save_adapter(folder / "model", folder / "model-adapter")
    save_adapter(folder / "model", folder / "model-reference-adapter", seed=1)
    found = {}
    for processes in (1, 2):
        out = folder / f"{processes}.pt"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [
            sys.executable,
            *torchrun,
            str(HERE / "gradients.py"),
            str(folder / "model"),
            str(out),
            *CASES,
        ]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        found[processes] = torch.load(out)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_a_case(method):
    if method not in CASES:
        pytest.skip(f"{method}.loss_and_metrics takes more than (policy, batch, args): write cases for it")


@pytest.mark.parametrize(("method", "case"), [(method, case) for method in CASES for case in CASES[method]])
def test_a_split_batch_has_the_same_gradient(results, method, case):
    want_metrics, want_gradient = results[1][method, case, 8]
    splits = [(n, size) for n in results for m, c, size in results[n] if (m, c) == (method, case)]
    assert len(splits) == (2 if "aot" in case or case == "several" else 6)
    for processes, size in splits:
        metrics, gradient = results[processes][method, case, size]
        assert metrics == pytest.approx(want_metrics, rel=1e-12, abs=1e-12)
        torch.testing.assert_close(
            gradient, want_gradient, rtol=0, atol=1e-12 * want_gradient.abs().max().item()
        )


def test_cases_differ(results):
    """Every option does something: no two cases of a method have the same gradient."""
    for method in CASES:
        gradients = {case: results[1][method, case, 8][1] for case in CASES[method]}
        same = {
            (a, b)
            for a in gradients
            for b in gradients
            if a < b
            and gradients[a].shape == gradients[b].shape
            and torch.allclose(gradients[a], gradients[b], rtol=1e-6, atol=1e-9)
        }
        assert same == ({("sigmoid", "sync_gradients_once")} if method == "cpo" else set())


def test_dpo_with_a_uniform_reference_is_cpo_without_imitation(results):
    """End to end, through both scripts: the reference's log-probabilities cancel."""
    want = results[1]["cpo", "uniform", 8][1]
    torch.testing.assert_close(results[1]["dpo-uniform", "sigmoid", 8][1], want, rtol=0, atol=1e-12)
