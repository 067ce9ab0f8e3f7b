"""One training step against TRL's: python tests/bench/step.py METHOD [--steps 10] [--pairs 4]

Needs `pip install .[bench]`. The same model (random, Qwen2-shaped), pairs (lengths like UltraFeedback),
batch, precision and optimizer; ours and TRL's steps in turn, in one process. Prints the median and the
quartiles of the ratio of their times, and loss and gradient norm of both, which have to agree. With
--memory ours or trl, the peak memory of three steps of the one, less what was there before the first.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import cpo  # noqa: E402
import dpo  # noqa: E402
import orpo  # noqa: E402
import xpo  # noqa: E402

VOCABULARY = 8192
MODEL = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def make_pairs(n: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Token ids: prompts of about 190 tokens, completions of about 280, all in all at most 1,024."""
    rng = np.random.default_rng(seed)

    def draw(mean: float, most: int) -> list[int]:
        length = int(np.clip(rng.lognormal(np.log(mean) - 0.25, 0.7), 8, most))
        return rng.integers(10, VOCABULARY, length).tolist()

    return [
        {"prompt": draw(190, 512), "chosen": draw(280, 512), "rejected": draw(280, 512)} for _ in range(n)
    ]


def ours(method: str, folder: str, pairs: list[dict]):
    """A function that takes one training step on all pairs; (loss, gradient norm)."""
    script = {"dpo": dpo, "cpo": cpo, "simpo": cpo, "orpo": orpo, "xpo": xpo}[method]
    options = {"simpo": {"loss_type": "simpo"}, "xpo": {"judge": f"{__file__}:main"}}.get(method, {})
    args = script.Arguments(
        model_name_or_path=folder,
        dataset_name="none",
        output_dir=f"{folder}/ours",
        batch_size=len(pairs),
        per_device_train_batch_size=len(pairs),
        max_grad_norm=1e9,
        **options,
    )
    script.check(args)
    _, _, device = common.start(args)
    policy = common.load_model(folder, args, device, trainable=True)
    reference = common.load_model(folder, args, device, trainable=False) if method in ("dpo", "xpo") else None
    optimizer = common.adamw(policy, args)
    lengths = np.array([[len(pair[part]) for part in ("prompt", "chosen", "rejected")] for pair in pairs])
    rows = datasets.Dataset.from_list(pairs)
    data = common.Pairs(rows, lengths, score_prompts=method == "orpo")
    order = lengths.sum(1).argsort()

    def step() -> tuple[float, float]:
        for batch in common.micro_batches(data, order, len(pairs), device):
            if method == "dpo":
                loss, _ = dpo.loss_and_metrics(policy, reference, batch, args, torch.zeros(()))
            elif method == "xpo":  # chosen and rejected stand for the samples of policy and reference
                wins = torch.from_numpy(batch.rows % 2 == 0)
                loss, _ = xpo.loss_and_metrics(policy, reference, batch, wins, args, epoch=0)
            else:
                loss, _ = script.loss_and_metrics(policy, batch, args)
            loss.backward()
        norm = common.clip_grad_norm(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm

    return step


def trl(method: str, folder: str, pairs: list[dict]):
    """The same with TRL's trainer: its data collator, its loss, its backward pass, the same optimizer."""
    if method == "xpo":
        return trl_xpo(folder, pairs)
    tokenizer = AutoTokenizer.from_pretrained(common.TOY_MODEL)
    options = dict(
        output_dir=f"{folder}/trl", per_device_train_batch_size=len(pairs), report_to="none", bf16=False
    )
    options |= dict(max_length=1024, gradient_checkpointing=False, learning_rate=1e-6, max_grad_norm=1e9)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = [{name: "0" for name in ("prompt", "chosen", "rejected")}]
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            model,
            args=DPOConfig(**options),
            train_dataset=datasets.Dataset.from_list(text),
            processing_class=tokenizer,
        )
        rows = [{f"{k}_ids": v for k, v in pair.items()} for pair in pairs]
    else:
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        options |= (
            dict(loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=1.375) if method == "simpo" else {}
        )
        config, kind = (ORPOConfig, ORPOTrainer) if method == "orpo" else (CPOConfig, CPOTrainer)
        trainer = kind(
            model,
            args=config(**options, max_completion_length=512) if method == "orpo" else config(**options),
            train_dataset=datasets.Dataset.from_list(text),
            processing_class=tokenizer,
        )
        rows = []
        for pair in pairs:
            row = {"prompt": "", "chosen": "", "rejected": ""}
            row |= {"prompt_input_ids": pair["prompt"], "prompt_attention_mask": [1] * len(pair["prompt"])}
            for side in ("chosen", "rejected"):
                ids = pair["prompt"] + pair[side]
                row[f"{side}_input_ids"], row[f"{side}_attention_mask"] = ids, [1] * len(ids)
                row[f"{side}_labels"] = [-100] * len(pair["prompt"]) + pair[side]
            rows.append(row)
    trainer.model.train()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def step() -> tuple[float, float]:
        batch_now = trainer.data_collator(rows)  # host work counts, as ours does
        loss = trainer.compute_loss(trainer.model, batch_now)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1e9).item()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm

    return step


def trl_xpo(folder: str, pairs: list[dict]):
    """The training part of a step of TRL 1.13, the last release with XPO: its log-probabilities and loss."""
    from trl.experimental.xpo import XPOTrainer

    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    reference.eval().requires_grad_(False)
    args = SimpleNamespace(loss_type="sigmoid")
    trainer = SimpleNamespace(ref_model=reference, args=args, beta=0.1, alpha=1e-5)
    wins = torch.arange(len(pairs)) % 2 == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    prompt_length = max(len(pair["prompt"]) for pair in pairs)

    def padded(side: str) -> dict[str, torch.Tensor]:
        longest, ids, mask = max(len(pair[side]) for pair in pairs), [], []
        for pair in pairs:
            left, right = prompt_length - len(pair["prompt"]), longest - len(pair[side])
            ids.append([0] * left + pair["prompt"] + pair[side] + [0] * right)
            mask.append([0] * left + [1] * len(pair["prompt"] + pair[side]) + [0] * right)
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def step() -> tuple[float, float]:
        data = padded("chosen"), padded("rejected")
        logps = XPOTrainer._compute_logprobs(trainer, model, *data, prompt_length)
        loss, _, _ = XPOTrainer._compute_losses(trainer, *logps, wins)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=["dpo", "cpo", "simpo", "orpo", "xpo"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--memory", choices=["ours", "trl"])
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    pairs = make_pairs(args.pairs)
    tokens = sum(len(part) for pair in pairs for part in pair.values())
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(MODEL).save_pretrained(folder)
        if args.memory:
            step = {"ours": ours, "trl": trl}[args.memory](args.method, folder, pairs)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for _ in range(3):
                step()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            above, start = (peak - before) / 2**20, before / 2**20
            print(f"{args.method} {args.memory}: {above:.2f} GiB above {start:.2f} GiB")
            return
        steps = {"ours": ours(args.method, folder, pairs), "trl": trl(args.method, folder, pairs)}
        times = {name: [] for name in steps}
        for i in range(args.steps + 2):
            for name, step in steps.items():
                start = time.perf_counter()
                loss, norm = step()
                times[name].append(time.perf_counter() - start)
                if i == 0:
                    print(f"{name}: loss {loss:.6f}, gradient norm {norm:.5f}")
        ratios = sorted(b / a for a, b in list(zip(times["ours"], times["trl"], strict=True))[2:])
        quartiles = statistics.quantiles(ratios, n=4)
        seconds = statistics.median(times["ours"][2:])
        print(
            f"{args.method}: {statistics.median(ratios):.2f} times as fast (quartiles {quartiles[0]:.2f}, "
            f"{quartiles[2]:.2f}); ours {args.pairs / seconds:.2f} pairs/s, {tokens / seconds:.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
