"""pytest -m gpu: what only a GPU shows. Skipped without CUDA."""

import pytest
import torch
from conftest import METHODS
from test_runs import SHORT, metrics_of, stop, succeed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("method", METHODS)
def test_the_built_in_example_in_bfloat16(tmp_path, method):
    succeed(f"{method}.py", tmp_path / "run")
    before, *_, after = [line for line in metrics_of(tmp_path / "run") if "eval_exact_match" in line]
    assert before["eval_exact_match"] < 0.1 and after["eval_exact_match"] > 0.9
    if method == "dpo":
        assert before["eval_rewards/chosen"] == before["eval_rewards/rejected"] == 0


def test_a_run_is_resumed_where_it_was_stopped(tmp_path):
    succeed("dpo.py", tmp_path / "a", *SHORT)
    stop("dpo.py", tmp_path / "b", *SHORT, after_steps=3, by=15)
    assert "resuming after step" in succeed("dpo.py", tmp_path / "b", *SHORT)
    for a, b in zip(metrics_of(tmp_path / "a"), metrics_of(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-2)  # attention adds up in an order of its own on a GPU
