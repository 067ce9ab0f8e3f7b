"""torchrun tests/gradients.py METHOD MODEL OUT: loss, metrics and gradient of one step, however it is split.

Writes {(case, pairs per micro-batch): (metrics, gradient)} in float64, for every case of the method.
"""

import importlib
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from conftest import random_pairs

import common

CASES = {
    "dpo": {
        **{
            name: {"loss_type": [name]}
            for name in (
                "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero "
                "apo_down discopop sigmoid_norm sft"
            ).split()
        },
        "several": {"loss_type": ["sigmoid", "aot", "sft"], "loss_weights": [1.0, 0.5, 0.2]},
        "rpo_alpha": {"rpo_alpha": 0.7},
        "use_weighting": {"use_weighting": True},
        "ld_alpha": {"ld_alpha": 0.3},
    },
}


def step(script, args, policy, reference, pairs, micro_batch: int) -> tuple[dict, torch.Tensor]:
    log = SimpleNamespace(args=args, device=policy.device, parts={}, signals=[])
    for batch in common.micro_batches(pairs, np.arange(len(pairs.rows)), micro_batch, policy.device):
        parts = (policy, reference, batch, args) if args.method == "dpo" else (policy, batch, args)
        extra = (torch.tensor(0.3, dtype=torch.float64),) if args.method == "dpo" else ()  # bco_delta
        loss, metrics = script.loss_and_metrics(*parts, *extra)
        (loss * torch.distributed.get_world_size()).backward()
        common.Log.add(log, metrics)
    metrics = common.Log.means(log)
    gradient = torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()])
    policy.zero_grad()
    return metrics, gradient


def main(method: str, model: str, out: str) -> None:
    script = importlib.import_module(method)
    arguments = {
        "model_name_or_path": model,
        "dataset_name": "none",
        "dtype": "float64",
        "output_dir": out + ".d",
    }
    args = script.Arguments(**arguments, batch_size=8)
    rank, world, device = common.start(args)
    policy = common.load_model(model, args, device, trainable=True)
    torch.manual_seed(1)
    reference = common.load_model(model, args, device, trainable=False)
    with torch.no_grad():
        for parameter in reference.parameters():  # away from the policy, so that no term vanishes
            parameter.data *= 1.2
    tokens = random_pairs(11, 8)
    columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*tokens, strict=True)), strict=True))
    lengths = np.array([[len(part) for part in pair] for pair in tokens])
    pairs = common.Pairs(datasets.Dataset.from_dict(columns), lengths)
    results = {}
    for name, options in CASES[method].items():
        args = script.Arguments(**arguments, **options)
        script.check(args)
        args.method = method
        for micro_batch in (8 // world,) if "aot" in str(options) else (8 // world, 3, 1):
            results[name, micro_batch] = step(script, args, policy, reference, pairs, micro_batch)
    if rank == 0:
        torch.save(results, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
