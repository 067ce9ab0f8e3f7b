"""Fixtures: the methods, tiny random models of several architectures, and a world of one process."""

import os
import re
import runpy
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import common

os.environ["HF_HUB_OFFLINE"] = "1"
huggingface_hub.constants.HF_HUB_OFFLINE = True  # it was read when the library was imported
ROOT = Path(__file__).parent.parent
# A file with a loss is a method's script: the tests find it here, a new one as well.
METHODS = [
    path.stem for path in sorted(ROOT.glob("*.py")) if re.search("\n# -+ the loss\n", path.read_text())
]
torch.set_num_threads(1)  # with busy cores, small tensors on more threads are a hundred times slower
SMALL = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
# Larger initial weights than usual: attention then matters, so that wrong attention shows.
ARCHITECTURES = {
    "llama": SMALL,
    "qwen2": SMALL | dict(tie_word_embeddings=True),
    "mistral": SMALL | dict(sliding_window=5),
    "mixtral": SMALL | dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt2": dict(
        vocab_size=61,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
    "gemma2": SMALL
    | dict(head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "olmo2": SMALL,
    "cohere": SMALL | dict(logit_scale=0.3),
    "granite": SMALL | dict(logits_scaling=3.0),
    "falcon": dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    "phi": SMALL,
}
# The attention of the first two has a softcap or a bias for positions, and the head of the third has a bias.
PADDED = ("gemma2", "falcon", "phi")
PACKED = tuple(kind for kind in ARCHITECTURES if kind not in PADDED)


@pytest.fixture(scope="session", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def exact(monkeypatch):
    """Let transformers' normalisation layers, which compute in float32, keep the float64 of the tests."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def run_script(monkeypatch, method: str, flags: str) -> None:
    """Run a method's script in this process, which has a process group already, and keeps it."""
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(sys, "argv", [f"{method}.py", *flags.split()])
    runpy.run_path(str(ROOT / f"{method}.py"), run_name="__main__")


def parse(monkeypatch, method: str, flags: str) -> common.Arguments:
    """The arguments that the last line of a method's script makes of a command line."""

    class Parsed(Exception):
        pass

    def start(args):  # where main begins
        raise Parsed(args)

    monkeypatch.setattr(common, "start", start)
    with pytest.raises(Parsed) as found:
        run_script(monkeypatch, method, flags)
    return found.value.args[0]


def tiny(kind: str, seed: int = 0, **changes) -> torch.nn.Module:
    config = CONFIG_MAPPING[kind](**{**ARCHITECTURES[kind], "initializer_range": 0.2, **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, experts_implementation="eager"
    ).train()


def save_adapter(base: Path, path: Path, seed: int = 0, **options) -> None:
    """A LoRA adapter as peft saves it, with random weights that change the model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options
    torch.manual_seed(seed)
    peft.get_peft_model(model, peft.LoraConfig(**options, task_type="CAUSAL_LM")).save_pretrained(path)


def random_pairs(
    seed: int, n: int, low: int = 1, high: int = 12
) -> list[tuple[list[int], list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, 61, rng.integers(low, high)).tolist() for _ in range(3)) for _ in range(n)]


def batch_of(pairs, score_prompts: bool = False) -> common.Batch:
    tokens = {
        name: sum(len(pair[i]) for pair in pairs) for i, name in enumerate(("prompt", "chosen", "rejected"))
    }
    counts = {"rows": np.arange(len(pairs)), "global_pairs": len(pairs), "global_tokens": tokens}
    return common.collate(pairs, torch.device("cpu"), score_prompts=score_prompts, **counts)
