"""LoRA: the reference is the policy before training, only the adapter is trained, and it loads elsewhere."""

import json

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import METHODS, batch_of, parse, random_pairs, save_adapter, tiny
from safetensors.torch import load_file
from test_runs import SHORT, metrics_of, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import dpo

CPU = torch.device("cpu")
PAIRS = random_pairs(3, 4)


def arguments(base, **options) -> dpo.Arguments:
    return dpo.Arguments(str(base), dataset_name="none", use_peft=True, **options)


def logps(model) -> torch.Tensor:
    """The definition, of a model that transformers or peft has loaded."""
    with torch.no_grad():
        return common.plain_token_logps(model, batch_of(PAIRS))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's directory, and beside it two adapters of the model, start and other."""
    folder = tmp_path_factory.mktemp("lora")
    tiny("llama").float().save_pretrained(folder / "base")
    save_adapter(folder / "base", folder / "adapters" / "start")
    save_adapter(folder / "base", folder / "adapters" / "other", seed=1)
    return folder / "base"


def load(base, adapter: str | None = None, reference: str | None = None, **options):
    """(policy, reference) as dpo.py loads them."""
    path, names = base.parent / "adapters" if adapter else base, {"ref_adapter_name": reference}
    args = arguments(path, model_adapter_name=adapter, **names, **options)
    policy = common.load_model(common.policy_path(args), args, CPU, trainable=True)
    return policy, common.load_reference(args.ref_model_name_or_path, policy, args, CPU)


def test_without_its_adapter_the_policy_is_the_base_to_the_bit(base):
    policy, reference = load(base)
    want = policy.token_logps(batch_of(PAIRS)).detach()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.equal(policy.token_logps(batch_of(PAIRS)), want)
    for _ in range(3):
        with reference() as model, torch.no_grad():
            assert model is policy and torch.equal(model.token_logps(batch_of(PAIRS)), want)
    torch.testing.assert_close(want, logps(AutoModelForCausalLM.from_pretrained(base)))


@pytest.mark.parametrize("start", [None, "start"])
def test_switching_within_a_step_changes_neither_gradient_nor_what_is_trained(base, start):
    def gradient(switches: int) -> list[torch.Tensor]:
        policy, reference = load(base, start, gradient_checkpointing=True)
        for batch in (batch_of(PAIRS[:2]), batch_of(PAIRS[2:])):
            for _ in range(switches):
                with reference() as model, torch.no_grad():
                    model.token_logps(batch)
            policy.token_logps(batch).sum().backward()
        trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in policy.named_parameters() if ".default." in name}
        return [parameter.grad.full_tensor() for parameter in policy.parameters() if parameter.requires_grad]

    for want, got in zip(gradient(0), gradient(3), strict=True):
        assert torch.equal(want, got) and (start is None or want.abs().max() > 0)


@pytest.mark.parametrize("reference_name", [None, "other"])
def test_an_adapter_is_trained_on_and_compared_with_itself_or_another(base, reference_name):
    policy, reference = load(base, "start", reference_name)
    adapters = base.parent / "adapters"
    found = [policy.token_logps(batch_of(PAIRS)).detach()]
    with reference() as model, torch.no_grad():
        found.append(model.token_logps(batch_of(PAIRS)))
    assert torch.equal(*found) == (reference_name is None)
    for name, got in zip(("start", reference_name or "start"), found, strict=True):
        torch.testing.assert_close(got, logps(AutoModelForCausalLM.from_pretrained(adapters / name)))


def test_the_reference_may_be_another_model_or_adapter(base):
    other = str(base.parent / "adapters" / "other")
    _, reference = load(base, "start", ref_model_name_or_path=other)
    with reference() as model, torch.no_grad():
        got = model.token_logps(batch_of(PAIRS))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(got, logps(AutoModelForCausalLM.from_pretrained(other)))


def test_dropout_is_for_training_alone(base):
    save_adapter(base, base.parent / "adapters" / "dropped", lora_dropout=0.5)
    policy, reference = load(base, "dropped")
    want = logps(AutoModelForCausalLM.from_pretrained(base.parent / "adapters" / "dropped"))
    found = []
    for training in (True, True, False):
        found.append(policy.train(training).token_logps(batch_of(PAIRS)).detach())
    policy.train()
    with reference() as model, torch.no_grad():
        torch.testing.assert_close(model.token_logps(batch_of(PAIRS)), want)
    torch.testing.assert_close(found[2], want)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_frozen_is_in_the_dtype_of_the_computation(base, bf16):
    policy, _ = load(base, "start", bf16=bf16)
    for name, parameter in policy.named_parameters():
        trained = ".default." in name
        assert parameter.requires_grad == trained
        assert parameter.dtype == (torch.bfloat16 if bf16 and not trained else torch.float32)
    assert len(common.adamw(policy, arguments(base)).param_groups[0]["params"]) == 2 * 2 * 7


PROCESSES = {"dpo": 2, "xpo": 2}
OPTIONS = {"dpo": "--bf16 true --gradient_checkpointing"}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_starts_at_zero_and_its_adapter_loads_elsewhere(tmp_path, method):
    flags = [*SHORT, "--use_peft", "--max_steps", "2", *OPTIONS.get(method, "--eval_strategy no").split()]
    said = succeed(f"{method}.py", tmp_path / "a", *flags, processes=PROCESSES.get(method, 1))
    assert "training 87,552 of 424,128 parameters (20.64%)" in said
    if method == "dpo":
        before, first = metrics_of(tmp_path / "a")[:2]
        for metrics, prefix in ((before, "eval_"), (first, "")):
            assert metrics[f"{prefix}rewards/chosen"] == metrics[f"{prefix}rewards/rejected"] == 0
    assert {*load_file(tmp_path / "a" / "adapter_model.safetensors")} >= {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    }
    assert not list((tmp_path / "a").glob("model*"))
    saved = dcp.FileSystemReader(tmp_path / "a" / "checkpoints" / "00000002").read_metadata()
    tensors = {name for name in saved.state_dict_metadata if name.startswith("model.")}
    assert len(tensors) == 2 * 3 * 7 and all("lora_" in name for name in tensors)
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    other = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    plain = AutoModelForCausalLM.from_pretrained(common.TOY_MODEL)
    batch = batch_of([([3, 4, 5], [6, 7, 2], [8, 9, 10, 2])])
    with torch.no_grad():
        a, b, c = (common.plain_token_logps(model.eval(), batch) for model in (one, other, plain))
    assert torch.equal(a, b) and not torch.equal(a, c)
    AutoTokenizer.from_pretrained(tmp_path / "a")


def test_the_saved_adapter_has_the_trained_log_probabilities_to_the_bit(base, tmp_path):
    policy, _ = load(base, "start")
    optimizer = common.adamw(policy, arguments(base, learning_rate=0.1))
    policy.token_logps(batch_of(PAIRS)).sum().backward()
    optimizer.step()
    args = arguments(base, output_dir=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(common.TOY_MODEL)
    common.save_model(args, policy, tokenizer)
    want = logps(policy)
    assert torch.equal(logps(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), want)
    assert torch.equal(logps(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()), want)
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").merge_and_unload()
    torch.testing.assert_close(logps(merged), want, rtol=1e-3, atol=1e-4)


def test_embeddings_may_have_an_adapter_and_the_base_is_found_from_everywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    args = arguments("base", lora_target_modules=["embed_tokens", "q_proj"], output_dir=str(tmp_path))
    policy = common.load_model("base", args, CPU, trainable=True)
    with torch.no_grad():
        for _, parameter in (each for each in policy.named_parameters() if "lora_" in each[0]):
            parameter.normal_()
    common.save_model(args, policy, AutoTokenizer.from_pretrained(common.TOY_MODEL))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logps(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()), logps(policy))
    args = arguments(tmp_path)
    again = common.load_model(str(tmp_path), args, CPU, trainable=True)
    assert torch.equal(logps(again), logps(policy))


def test_training_goes_on_with_an_adapter(tmp_path, monkeypatch):
    flags = [*SHORT, "--max_steps", "2"]
    succeed("dpo.py", tmp_path / "a", *flags, "--use_peft", "--lora_dropout", "0.5")
    data = ["--model_name_or_path", str(tmp_path / "a"), "--dataset_name", common.TOY_DATA]
    said = succeed("dpo.py", tmp_path / "b", *flags, *data)
    assert "training 87,552 of" in said
    first, last = metrics_of(tmp_path / "b")[0], metrics_of(tmp_path / "a")[-1]
    assert first["eval_rewards/chosen"] == 0  # without dropout in both evaluations
    assert first["eval_logps/chosen"] == pytest.approx(last["eval_logps/chosen"], rel=1e-6)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"] == 16
    args = parse(monkeypatch, "dpo", " ".join([*data, "--use_peft false"]))
    assert args.use_peft and args.learning_rate == pytest.approx(1e-5)


def test_the_initial_adapter_is_a_function_of_the_seed(base):
    first, same, other = (dict(load(base, seed=seed)[0].named_parameters()) for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first[name].full_tensor(), same[name].full_tensor())
    assert not torch.equal(first[name].full_tensor(), other[name].full_tensor())


def test_an_adapter_knows_the_revision_of_the_model_it_belongs_to(base, tmp_path):
    args = arguments(base, model_revision="v2")
    model = common.load_model(str(base), args, torch.device("cpu"), trainable=True)
    model.peft_config["default"].base_model_name_or_path = "on/the-hub"
    model.peft_config["default"].save_pretrained(tmp_path)
    later = arguments(tmp_path)
    assert common.adapter_base(str(tmp_path), later) == "on/the-hub"
    assert common.revision_of("on/the-hub", later) == "v2" and common.revision_of("other", later) == "main"


@pytest.mark.parametrize("method", METHODS)
def test_the_learning_rate_of_lora_is_ten_times_as_large(monkeypatch, base, method):
    judge = " --judge tests/conftest.py:tiny" if method == "xpo" else ""
    real = f"--model_name_or_path {base} --dataset_name d{judge}"
    for flags, factor in (("--max_steps 9", 3), (real, 10)):
        rate = parse(monkeypatch, method, flags).learning_rate
        assert parse(monkeypatch, method, f"{flags} --use_peft").learning_rate == pytest.approx(factor * rate)
        for flag in ("--learning_rate", "--learning-rate"):  # the parser takes both
            assert parse(monkeypatch, method, f"{flags} --use_peft {flag} 7e-9").learning_rate == 7e-9
    with pytest.raises(SystemExit, match="--lora_r is for a new adapter"):
        parse(monkeypatch, method, f"{real} --lora-r 4")
    adapter = real.replace(str(base), str(base.parent / "adapters" / "start"))
    assert parse(monkeypatch, method, adapter).learning_rate == pytest.approx(10 * rate)
    assert parse(monkeypatch, method, adapter).use_peft


# ----------------------------------------------------------------------------------------------------- 4 bits


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model that bitsandbytes can quantize on a CPU: its dimensions are multiples of 64."""
    path = tmp_path_factory.mktemp("4bit") / "base"
    tiny("llama", hidden_size=64, intermediate_size=128, vocab_size=64).float().save_pretrained(path)
    return path


def test_weights_in_4_bits(wide):
    args = arguments(wide, load_in_4bit=True)
    policy = common.load_model(str(wide), args, CPU, trainable=True)
    reference = common.load_reference(None, policy, args, CPU)
    kinds = {type(module.base_layer).__name__ for module in policy.modules() if hasattr(module, "base_layer")}
    assert kinds == {"Linear4bit"} and policy.forward_pass == "packed"
    logps = policy.token_logps(batch_of(PAIRS))
    with reference() as model, torch.no_grad():
        assert torch.equal(model.token_logps(batch_of(PAIRS)), logps)
    logps.sum().backward()
    trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7 and {parameter.dtype for _, parameter in trained} == {torch.float32}
    assert all(p.grad.full_tensor().abs().max() > 0 for name, p in trained if "lora_B" in name)


def test_a_run_with_weights_in_4_bits(wide, tmp_path):
    AutoTokenizer.from_pretrained(common.TOY_MODEL).save_pretrained(wide)
    flags = [
        "--model_name_or_path",
        str(wide),
        "--dataset_name",
        common.TOY_DATA,
        "--load_in_4bit",
        "--use_peft",
    ]
    flags += ["--learning_rate", "1e-3", "--max_train_samples", "64"]
    succeed("dpo.py", tmp_path / "a", *SHORT, *flags, processes=2)
    before, first, *_, last = metrics_of(tmp_path / "a")
    assert before["eval_rewards/chosen"] == first["rewards/chosen"] == 0
    assert last["eval_loss"] < before["eval_loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")
