"""Memory per GPU on paper: python tests/bench/memory.py; --check compares it with what step.py measures.

Weights, gradients and AdamW's two moments are float32, sharded; their sizes are those of fully_shard's own
shards of the model on the meta device in a process group that only pretends to have so many processes. The
reference is bfloat16, sharded. While a layer computes, its weights and the next one's are whole, in bfloat16,
and so are those of embedding and head; a layer's gradient is whole once in bfloat16 and once in float32. The
activations that a backward pass needs are counted on a real forward pass of one and of two layers; their
gradients, of one layer at a time, are taken to be as large.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
import step  # noqa: E402

import common  # noqa: E402

LLAMA = dict(vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=False)
MODELS = {
    "Qwen2 0.5B": Qwen2Config(**step.SIZES["0.5b"], tie_word_embeddings=True),
    "Llama 3 8B": LlamaConfig(
        **LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    ),
    "Llama 3 70B": LlamaConfig(
        **LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
}
LENGTHS = (190, 280, 280)  # tokens of prompt, chosen, rejected
GIB = 2**30


def shard_sizes(config, gpus: int) -> tuple[int, int, int]:
    """Weights on one of so many GPUs; those of a whole layer; those of embedding and head."""
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - layer * config.num_hidden_layers
    args = SimpleNamespace(bf16=True, hsdp_shard_size=None, torch_compile=False)
    common.shard(model, args, torch.device("cpu"), reshard_after_forward=False)
    local = sum(p.to_local().numel() for p in model.parameters())
    dist.destroy_process_group()
    return local, layer, outside


def activations(config, pairs: int, lengths: tuple, dtype: torch.dtype) -> tuple[float, float, int]:
    """Bytes that the backward pass needs: of a layer, of what is outside layers; and of a layer's input."""
    rng = np.random.default_rng(0)
    examples = [tuple(rng.integers(1, 999, n).tolist() for n in lengths) for _ in range(pairs)]
    batch = common.collate(examples, torch.device("cpu"), global_pairs=pairs)
    found = []
    for layers in (1, 2):
        few = type(config)(**config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(few, dtype=dtype)
        model.to_empty(device="cpu")
        model.forward_pass = "packed"
        model.set_attn_implementation("packed")
        weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(tensor: torch.Tensor, weights=weights, saved=saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = (
                    storage.nbytes(),
                    storage,
                )  # held, so that no other takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            common.token_logps(model, batch)
        found.append(sum(size for size, _ in saved.values()))
        del model, saved
    tokens, width = batch.packed_inputs["input_ids"].numel(), torch.finfo(dtype).bits // 8
    return found[1] - found[0], 2 * found[0] - found[1], tokens * config.hidden_size * width


def head(width: int) -> int:
    """Bytes of a chunk of logits in the backward pass: as computed, in float32, and the gradients of both."""
    return common.CHUNK_LOGITS * (2 * width + 2 * 4)


def table(pairs: int) -> None:
    print(f"GiB per GPU, micro-batches of {pairs} pairs of {', '.join(map(str, LENGTHS))} tokens\n")
    print(
        "| model | GPUs | weights, gradient, AdamW | reference | whole weights in use | activations "
        "| with checkpointing | in all, with checkpointing | reference precomputed |\n|" + "---|" * 9
    )
    for name, config in MODELS.items():
        found = activations(config, 1, LENGTHS, torch.bfloat16)  # all proportional to the tokens
        layer_saved, outside_saved, layer_input = (pairs * size for size in found)
        layers = config.num_hidden_layers
        full = (layers + 1) * layer_saved + outside_saved + head(2)
        checkpointed = layers * layer_input + 2 * layer_saved + outside_saved + head(2)
        for gpus in (1, 8, 64, 512):
            local, layer, outside = shard_sizes(config, gpus)
            state, reference = 16 * local, 2 * local
            whole = 2 * (outside + 2 * layer) + 6 * max(layer, outside)
            rest = state + whole + checkpointed
            values = (state, reference, whole, full, checkpointed, rest + reference, rest)
            print(f"| {name} | {gpus} | " + " | ".join(f"{value / GIB:.1f}" for value in values) + " |")


def lora_table(pairs: int, rank: int = 16) -> None:
    """LoRA on all linear layers, on one GPU; the reference is the same model without the adapter."""
    print(f"\nLoRA of rank {rank} on one GPU, with gradient checkpointing\n")
    print("| model | frozen weights | weights in use | adapter, gradient, AdamW | activations | in all |")
    print("|---|" + "---|" * 5)
    for name, config in MODELS.items():
        found = activations(config, 1, LENGTHS, torch.bfloat16)
        layer_saved, outside_saved, layer_input = (pairs * size for size in found)
        checkpointed = config.num_hidden_layers * layer_input + 2 * layer_saved + outside_saved + head(2)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
        layers, total = sum(m.weight.numel() for m in linear), sum(p.numel() for p in model.parameters())
        adapter = 16 * sum(rank * (m.in_features + m.out_features) for m in linear)
        # fully_shard copies the weights that it gathers, also on one GPU. It leaves those in 4 bits alone,
        # which are expanded to bfloat16 one matrix at a time. Each 64 of them share a scale in 8 bits.
        gathered = 2 * (total - layers + 2 * layers // config.num_hidden_layers)
        kinds = {"bfloat16": (2 * total, gathered)}
        four_bits = layers / 2 + layers / 64 + 2 * (total - layers)
        kinds["4 bits"] = four_bits, 2 * max(m.weight.numel() for m in linear)
        for kind, (frozen, in_use) in kinds.items():
            values = (frozen, in_use, adapter, checkpointed, frozen + in_use + adapter + checkpointed)
            print(f"| {name}, {kind} | " + " | ".join(f"{value / GIB:.1f}" for value in values) + " |")


def traffic(parameters: int, outside: int, gpus: int, group: int) -> tuple[float, float]:
    """Bytes that a GPU receives for a micro-batch of DPO, within its group of so many, and from the others.

    `outside` of the parameters are embedding and head, which a backward pass does not gather again.
    """
    gathers = 2 * parameters + 2 * (parameters - outside) + 2 * parameters  # forward, backward, reference
    scatter = 4 * parameters  # gradients, in float32
    # Groups have the same weights, and add up their gradients: an all-reduce sends everything twice.
    groups = gpus // group
    return (gathers + scatter) * (group - 1) / group, 2 * scatter / group * (groups - 1) / groups


def traffic_table() -> None:
    print("\nGB that a GPU receives for a micro-batch of DPO\n")
    print("| model | GPUs | sharded over | within the group | from other groups |\n|---|---|---|---|---|")
    for name, config in MODELS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        total, layers = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers))
        for gpus, group in ((8, 8), (64, 64), (64, 8), (512, 512), (512, 8)):
            within, between = traffic(total, total - layers, gpus, group)
            print(f"| {name} | {gpus} | {group} | {within / 1e9:.1f} | {between / 1e9:.1f} |")


def collectives(config, gpus: int, group: int) -> dict[str, int]:
    """How often each collective runs in a micro-batch of DPO, counted in a group that only pretends."""
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    args, counts = SimpleNamespace(bf16=True, hsdp_shard_size=group, torch_compile=False), {}
    batch = common.collate([([1, 2, 3], [4, 5], [6, 7])], torch.device("cpu"), global_pairs=1)
    for trainable in (True, False):
        model = AutoModelForCausalLM.from_config(config).train(trainable).requires_grad_(trainable)
        model.forward_pass, model.token_logps = "packed", MethodType(common.token_logps, model)
        model.set_attn_implementation("packed")
        common.shard(model, args, torch.device("cpu"), reshard_after_forward=not trainable)
        common.register_fsdp_forward_method(model, "token_logps")
        with CommDebugMode() as mode:
            logps = model.token_logps(batch)
            if trainable:
                logps.sum().backward()
        for operation, count in mode.get_comm_counts().items():
            name = str(operation).split(".")[-1]
            counts[name] = counts.get(name, 0) + count
    dist.destroy_process_group()
    return counts


CASES = ((4096, 280), (4096, 1024), (32768, 280))  # vocabulary, tokens of a completion


def check() -> None:
    """Against the peak that the operating system reports, on this machine, in float32, of a DPO step."""
    measured = []  # first: to Linux, a process has at least the peak of the one that started it
    for vocabulary, completion in CASES:
        flags = ["dpo", "--lengths", str(completion), "--vocabulary", str(vocabulary), "--memory", "ours"]
        command = [sys.executable, step.__file__, *flags, "--pairs", "4", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        measured.append(json.loads([line for line in done.splitlines() if line.startswith("{")][0])["gib"])
    print("| vocabulary | tokens of a completion | GiB on paper | measured |\n|---|---|---|---|")
    for (vocabulary, completion), gib in zip(CASES, measured, strict=True):
        config = Qwen2Config(**step.SIZES["small"] | {"vocab_size": vocabulary}, tie_word_embeddings=True)
        layer, outside, _ = activations(config, 4, (128, completion, completion), torch.float32)
        with torch.device("meta"):
            weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        logits = 8 * completion * vocabulary
        chunk = min(common.CHUNK_LOGITS, common.CHUNK_TOKENS * vocabulary, logits)
        kept = logits if logits <= common.CHUNK_LOGITS else 0  # their logarithms are in `outside` already
        paper = (config.num_hidden_layers + 1) * layer + outside + 4 * (kept + 3 * chunk) + 12 * weights
        print(f"| {vocabulary} | {completion} | {paper / GIB:.2f} | {gib:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        check()
    else:
        table(args.pairs)
        lora_table(args.pairs)
        traffic_table()
