"""pytest -n 0 -m gpu: what only a GPU shows. Skipped without CUDA.

Writes gpu.json to the current directory: device, versions, attention kernels and what was measured.
"""

import json
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import METHODS, random_pairs, save_adapter
from test_runs import SHORT, metrics_of, stop, succeed
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import common
from common import TOY_MODEL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
SIZES = dict(vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
SIZES |= dict(num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def report():
    """What gpu.json says: tests add to it."""
    device = common.prepare_cuda()
    found = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found |= {"transformers": transformers.__version__}
    yield found
    Path("gpu.json").write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture
def base(tmp_path) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, initializer_range=0.05))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(TOY_MODEL).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def load(path: str, **options):
    options = {"model_name_or_path": path, "dataset_name": "d", "bf16": True} | options
    args = common.Arguments(**options)
    return common.load_model(path, args, torch.device("cuda", 0), trainable=True), args


def on_gpu(pairs) -> common.Batch:
    tokens = dict.fromkeys(("prompt", "chosen", "rejected"), 1)
    return common.collate(pairs, torch.device("cuda", 0), global_pairs=len(pairs), global_tokens=tokens)


def test_packed_is_plain_up_to_the_rounding_of_bfloat16(report, base):
    model, _ = load(base)
    exact, _ = load(base, bf16=False)
    pairs = random_pairs(0, 8, low=20, high=300)
    assert model.forward_pass == "packed"
    with torch.no_grad():
        want = exact.token_logps(on_gpu(pairs))
        errors = {}
        for forward_pass in ("packed", "padded"):
            model.forward_pass = forward_pass
            errors[forward_pass] = (model.token_logps(on_gpu(pairs)) - want).abs().mean().item()
    report["mean error of a log-probability in bfloat16"] = errors
    assert errors["packed"] < 1.2 * errors["padded"] < 0.1


@pytest.mark.parametrize("window", [None, 60])
def test_attention_in_one_call_is_that_in_a_call_for_each_row(base, window):
    model, _ = load(base)
    assert model.forward_pass == "packed"
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    grads, values, batch = [], [], on_gpu(random_pairs(4, 8, low=1, high=300))
    for name in ("packed", "varlen"):
        model.set_attn_implementation(name)
        values.append(model.token_logps(batch))
        values[-1].mean().backward()
        grads.append(torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]))
        model.zero_grad()
    assert (values[0] - values[1]).abs().mean() < 0.02
    assert (grads[0] - grads[1]).norm() < 0.03 * grads[0].norm()


def test_attention_runs_a_flash_kernel(report, base):
    model, _ = load(base)
    batch = on_gpu(random_pairs(1, 4, low=50, high=200))
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        model.token_logps(batch).sum().backward()
        torch.cuda.synchronize()
    names = {event.key for event in profiled.key_averages()}
    kernels = sorted(name for name in names if any(k in name.lower() for k in ("flash", "fmha", "cudnn")))
    report["attention kernels"] = kernels
    assert any("flash" in name for name in kernels) and not any("cudnn" in name.lower() for name in kernels)


def test_a_new_length_costs_no_more_than_a_known_one(report, base):
    """cuDNN would plan for tens of milliseconds at each."""
    model, _ = load(base)
    seconds = []
    for length in [*range(200, 240), *range(200, 240)]:
        batch = on_gpu([([5] * length, [6] * length, [7] * length)])
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.token_logps(batch).sum().backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    new, known = (torch.tensor(part[5:]).median().item() for part in (seconds[:40], seconds[40:]))
    report["median seconds of a step of a new, of a known length"] = [new, known]
    assert new < 2 * known


def test_generation_sees_the_weights_that_are_trained(base):
    model, args = load(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    args.max_new_tokens = 16
    prompts = [[5, 6, 7], [8]]
    for prompt, answer in zip(
        prompts, common.generate(model, tokenizer, prompts, args, do_sample=False), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer], device="cuda"), use_cache=False).logits[0].float()
        logits = logits[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer, device="cuda")[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < 0.05  # up to rounding, the likeliest token each time


def test_an_adapter_that_is_off_is_the_model_before_training(base, tmp_path):
    save_adapter(Path(base), tmp_path / "adapter")
    args = common.Arguments(base, dataset_name="d", bf16=True, use_peft=True)
    model = common.load_model(base, args, torch.device("cuda", 0), trainable=True)
    plain, _ = load(base)
    batch = on_gpu(random_pairs(2, 3))
    with torch.no_grad(), common.as_before_training(model) as reference:
        assert torch.equal(reference.token_logps(batch), plain.token_logps(batch))


def test_a_save_needs_little_memory_of_the_host(report, base, tmp_path):
    model, args = load(base)
    args.output_dir = str(tmp_path / "run")
    optimizer = common.adamw(model, args)
    model.token_logps(on_gpu(random_pairs(3, 2))).sum().backward()
    optimizer.step()
    state = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    Path(args.output_dir).mkdir()
    common.save_checkpoint(args, model, optimizer, 1, {}, interrupted=False)
    report["host memory of a save, by the state's size"] = (memory("VmHWM") - before) / state


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.mark.parametrize("method", METHODS)
def test_the_built_in_example_in_bfloat16(report, tmp_path, method):
    start = time.perf_counter()
    succeed(f"{method}.py", tmp_path / "run")
    before, *_, after = [line for line in metrics_of(tmp_path / "run") if "eval_exact_match" in line]
    report[f"{method}, built-in example"] = {"seconds": time.perf_counter() - start}
    report[f"{method}, built-in example"] |= {"exact_match": after["eval_exact_match"]}
    assert before["eval_exact_match"] < 0.1 and after["eval_exact_match"] > 0.9
    if method == "dpo":
        assert before["eval_rewards/chosen"] == before["eval_rewards/rejected"] == 0


def test_two_runs_agree_and_one_is_resumed_where_it_was_stopped(tmp_path):
    for name in ("a", "again"):
        succeed("dpo.py", tmp_path / name, *SHORT)
    stop("dpo.py", tmp_path / "b", *SHORT, after_steps=3, by=15)
    assert "resuming after step" in succeed("dpo.py", tmp_path / "b", *SHORT)
    for other in ("again", "b"):
        for a, b in zip(metrics_of(tmp_path / "a"), metrics_of(tmp_path / other), strict=True):
            assert a == pytest.approx(b, rel=1e-2, abs=1e-2)  # the order of additions varies on a GPU
