"""torchrun tests/gradients.py MODEL OUT METHOD...: metrics and gradients of one step, differently split.

Writes {(method, case, pairs per micro-batch): (metrics, gradient)}, in float64.
"""

import importlib
import inspect
import sys
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from conftest import METHODS, random_pairs

import common
import dpo

CASES = {
    "dpo": {
        **{
            name: {"loss_type": [name]}
            for name in (
                "sigmoid hinge ipo exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero "
                "apo_down discopop sigmoid_norm sft"
            ).split()
        },
        "cdpo": {"label_smoothing": 0.1},
        "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
        "several": {"loss_type": ["sigmoid", "aot", "sft"], "loss_weights": [1.0, 0.5, 0.2]},
        "rpo_alpha": {"rpo_alpha": 0.7},
        "use_weighting": {"use_weighting": True},
        "ld_alpha": {"ld_alpha": 0.3},
    },
    "cpo": {
        **{name: {"loss_type": name} for name in ("sigmoid", "hinge", "ipo", "simpo", "alphapo")},
        "cpo-simpo": {"loss_type": "simpo", "cpo_alpha": 0.05},
        "uniform": {"cpo_alpha": 0.0},
    },
    "alphapo": {"alphapo": {}, "negative": {"alpha": -0.5}},
    "xpo": {
        "xpo": {"alpha": [0.3]},
        "online dpo": {"alpha": [0.0]},
        "ipo": {"alpha": [0.3], "loss_type": "ipo"},
    },
    "orpo": {"orpo": {}, "no_prompt_loss": {"no_prompt_loss": True}},
}
CASES["cpo"]["sync_gradients_once"] = {"sync_gradients_once": True}  # the same as "sigmoid"
for method in CASES:
    CASES[method]["lora"] = {"use_peft": True}
for method in METHODS:  # one that is not in the table has one case, if its step takes what cpo.py's takes
    takes = [*inspect.signature(importlib.import_module(method).loss_and_metrics).parameters]
    if takes == ["policy", "batch", "args"]:
        CASES.setdefault(method, {"defaults": {}})


def step(script, args, policy, reference, pairs, micro_batch: int) -> tuple[dict, torch.Tensor]:
    log = SimpleNamespace(shares={}, signals=[])
    pairs = pairs._replace(score_prompts=args.method == "orpo" and not args.no_prompt_loss)
    for batch in common.micro_batches(pairs, np.arange(len(pairs.lengths)), micro_batch, policy.device):
        if args.method == "dpo":
            loss, metrics = script.loss_and_metrics(
                policy, reference, batch, args, bco_rewards=torch.tensor([0.6, 2.0])
            )
        elif args.method == "xpo":
            wins = torch.from_numpy(batch.rows % 2 == 0)
            loss, metrics = script.loss_and_metrics(policy, reference, batch, wins, args, epoch=0)
        else:
            loss, metrics = script.loss_and_metrics(policy, batch, args)
        policy.set_requires_gradient_sync(batch.is_last or not args.sync_gradients_once)
        (loss * torch.distributed.get_world_size()).backward()
        common.Log.add(log, metrics)
    metrics, _ = common.Log.all_reduce(log)
    trained = [p for p in policy.parameters() if p.requires_grad]
    gradient = torch.cat([p.grad.full_tensor().flatten() for p in trained])
    policy.zero_grad()
    return metrics, gradient


def main(model: str, out: str, *methods: str) -> None:
    tokens = random_pairs(11, 8)
    columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*tokens, strict=True)), strict=True))
    lengths = np.array([[len(part) for part in pair] for pair in tokens])
    tokens = datasets.Dataset.from_dict(columns)
    pairs = common.Data(tokens, tokens, lengths)
    arguments = {
        "model_name_or_path": model,
        "dataset_name": "none",
        "dtype": "float64",
        "output_dir": out + ".d",
        "batch_size": 8,
    }
    args = common.Arguments(**arguments)
    rank, world, device = common.start(args)
    policy = common.load_model(model, args, device, trainable=True)
    reference = common.load_reference(model + "-reference", policy, args, device)
    folder, name = model.rsplit("/", 1)
    names = {"model_adapter_name": f"{name}-adapter", "ref_adapter_name": f"{name}-reference-adapter"}
    lora_args = dpo.Arguments(**arguments | {"model_name_or_path": folder}, **names)
    lora = common.load_model(common.policy_path(lora_args), lora_args, device, trainable=True)
    models = {False: (policy, reference), True: (lora, common.load_reference(None, lora, args, device))}
    results = {}
    for method in methods:
        script = importlib.import_module(method)
        for case, options in CASES[method].items():
            more = {"judge": f"{__file__}:main"} if method == "xpo" else {}
            args = script.Arguments(**arguments, **options, **more)
            args.method = method
            policy, reference = models[args.use_peft]
            given = partial(dpo.frozen_logps, reference, args) if method == "dpo" else reference
            for size in (8 // world,) if "aot" in str(options) else (8 // world, 3, 1):
                results[method, case, size] = step(script, args, policy, given, pairs, size)
    args, policy = dpo.Arguments(**arguments), models[False][0]
    args.method = "dpo"

    def uniform(batch: common.Batch) -> torch.Tensor:
        return torch.full((len(batch.rows), 2), -7.0, dtype=torch.float64)

    results["dpo-uniform", "sigmoid", 8] = step(dpo, args, policy, uniform, pairs, 8)
    if rank == 0:
        torch.save(results, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
