"""Training steps against TRL's: python tests/bench/step.py METHOD [--lengths chat] [--steps 10]

The same model (random weights), pairs, batch, precision and optimizer; steps of ours and of TRL's in turn,
in one process, every step on new pairs. Prints loss and gradient norm of each, which have to agree, and how
long a step takes. METHOD
is dpo, precomputed (DPO, reference log-probabilities known), cpo, simpo, orpo, which need `pip install
.[bench]` (TRL 1.16), or xpo (the training part of a step), generation (XPO's), which need TRL 1.13, the last
release with an XPO trainer. The contestants:

    ours    our defaults
    lean    ours with gradient checkpointing
    trl     TRL's defaults: gradient checkpointing, pairs of a micro-batch in random order
    fast    TRL without gradient checkpointing
    best    the same, pairs of similar length together, and on CPUs, too, the head only where it is needed

--lora trains an adapter (rank 16, on all linear layers) that has been saved with random weights before; the
reference is that adapter as it was. For dpo, cpo, simpo and orpo.

--memory NAME prints the peak memory of three steps of the one, less what was there before the first;
--profile NAME, on a CPU, what the time of a step goes into.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import cpo  # noqa: E402
import dpo  # noqa: E402
import orpo  # noqa: E402
import xpo  # noqa: E402

SIZES = {  # the head has a quarter of the weights in both
    "small": dict(vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=3)
    | dict(num_attention_heads=4, num_key_value_heads=2),
    "0.5b": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
    | dict(num_attention_heads=14, num_key_value_heads=2),
}
# Tokens of prompt and completion, on average and at most: as in UltraFeedback, in summarisation, in fiction.
LENGTHS = {"chat": (190, 512, 280, 512), "summary": (700, 896, 60, 128), "story": (30, 128, 600, 896)}
METHODS = ["dpo", "precomputed", "cpo", "simpo", "orpo", "xpo", "generation"]
ADAPTER = "{}/adapter"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEW_TOKENS = 64


def make_pairs(n: int, lengths: str, vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Token ids; lengths are log-normal, or with a number for `lengths` that of all completions."""
    rng = np.random.default_rng(seed)
    exact = (128, 128, int(lengths), int(lengths)) if lengths.isdigit() else None
    prompt, longest_prompt, completion, longest_completion = exact or LENGTHS[lengths]

    def draw(mean: float, most: int) -> list[int]:
        length = most if exact else int(np.clip(rng.lognormal(np.log(mean) - 0.125, 0.5), 8, most))
        return rng.integers(10, vocabulary, length).tolist()

    def pair() -> dict[str, list[int]]:
        sides = {side: draw(completion, longest_completion) for side in ("chosen", "rejected")}
        return {"prompt": draw(prompt, longest_prompt)} | sides

    return [pair() for _ in range(n)]


class Contestant:
    """A model with its optimizer. After prepare(pairs), step() takes a training step on these pairs.

    What step() returns is (loss, gradient norm). `pairs`, the number of pairs of a step, is the same always.
    """

    def __init__(self, name, method, folder: str, pairs: int, size: int, lora=False, loss_type="sigmoid"):
        self.pairs, self.size, self.lora, self.loss_type, self.name = pairs, size, lora, loss_type, name
        if name in ("ours", "lean"):
            self.begin_ours(method, folder, name == "lean")
            return
        self.checkpointing = name == "trl"
        if name == "best":
            if method in ("dpo", "precomputed"):
                import trl.trainer.utils

                trl.trainer.utils._use_triton = lambda device: True  # here this decides about the head only
        {"xpo": self.begin_trl_xpo, "generation": self.begin_trl_xpo}.get(method, self.begin_trl)(
            method, folder
        )

    def step(self) -> tuple[float, float]:
        total = 0.0
        for loss in self.losses():
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item(), norm.item()

    def begin_ours(self, method: str, folder: str, checkpointing: bool) -> None:
        script = {"cpo": cpo, "simpo": cpo, "orpo": orpo, "xpo": xpo, "generation": xpo}.get(method, dpo)
        options = {"loss_type": "simpo"} if method == "simpo" else {}
        options |= {"loss_type": [self.loss_type]} if script is dpo else {}
        options |= {"judge": f"{ROOT}/tests/bench/happy.py:happier"} if script is xpo else {}
        path = ADAPTER.format(folder) if self.lora else folder
        args = script.Arguments(
            model_name_or_path=path,
            use_peft=self.lora,
            dataset_name="none",
            output_dir=f"{folder}/ours",
            batch_size=self.pairs,
            per_device_train_batch_size=self.size,
            per_device_eval_batch_size=self.pairs,
            max_new_tokens=NEW_TOKENS,
            gradient_checkpointing=checkpointing,
            **options,
        )
        _, _, device = common.start(args)
        self.model = common.load_model(path, args, device, trainable=True)
        self.optimizer, reference = common.adamw(self.model, args), None
        if script in (dpo, xpo):
            reference = common.load_reference(None, self.model, args, device)
        reference_logps = partial(dpo.frozen_logps, reference, args)

        def prepare(pairs: list[dict]) -> None:
            parts = ("prompt", "chosen", "rejected")
            lengths = np.array([[len(pair[part]) for part in parts] for pair in pairs])
            tokens = datasets.Dataset.from_list(pairs)
            self.prompts = [pair["prompt"] for pair in pairs]
            self.data = common.Data(tokens, tokens, lengths, score_prompts=method == "orpo")
            self.reference_logps = reference_logps
            if method == "precomputed":
                batches = common.micro_batches(self.data, np.arange(len(lengths)), self.size, device)
                table = torch.cat([reference_logps(batch) for batch in batches])
                self.reference_logps = lambda batch: table[batch.rows]

        def losses():
            rows = self.data.lengths.sum(1).argsort(kind="stable")
            for batch in common.micro_batches(self.data, rows, self.size, device):
                if script is xpo:  # chosen and rejected stand for the samples of policy and reference
                    wins = torch.from_numpy(batch.rows % 2 == 0).to(device)
                    yield xpo.loss_and_metrics(self.model, reference, batch, wins, args, epoch=0)[0]
                elif script is dpo:
                    bco_rewards = torch.zeros(2)
                    yield dpo.loss_and_metrics(self.model, self.reference_logps, batch, args, bco_rewards)[0]
                else:
                    yield script.loss_and_metrics(self.model, batch, args)[0]

        def generate():
            tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None)
            common.generate(self.model, tokenizer, self.prompts, args, **xpo.sampling(args))
            with reference() as model:
                common.generate(model, tokenizer, self.prompts, args, **xpo.sampling(args))
            return 0.0, 0.0

        self.prepare, self.losses = prepare, losses
        if method == "generation":
            self.step = generate

    def begin_trl(self, method: str, folder: str) -> None:
        """TRL's data collator (host work counts, as ours does), its loss and its precision."""
        tokenizer = AutoTokenizer.from_pretrained(common.TOY_MODEL)
        options = dict(output_dir=f"{folder}/trl", per_device_train_batch_size=self.size, report_to="none")
        options |= dict(max_length=8192, bf16=DEVICE.type == "cuda", disable_tqdm=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if self.lora:
            import peft

            self.model = peft.PeftModel.from_pretrained(self.model, ADAPTER.format(folder), is_trainable=True)
        text = datasets.Dataset.from_list([dict.fromkeys(("prompt", "chosen", "rejected"), "0")])
        data = dict(train_dataset=text, processing_class=tokenizer)
        if method in ("dpo", "precomputed"):
            from trl import DPOConfig, DPOTrainer

            options |= {"loss_type": [self.loss_type]}
            trainer = DPOTrainer(self.model, args=DPOConfig(**options), **data)
        else:
            from trl.experimental.cpo import CPOConfig, CPOTrainer
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            config, kind = (ORPOConfig, ORPOTrainer) if method == "orpo" else (CPOConfig, CPOTrainer)
            options |= dict(max_completion_length=8192) if method == "orpo" else {}
            if method == "simpo":
                options |= dict(loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=1.375)
            trainer = kind(self.model, args=config(**options), **data)
        self.model.train()
        if self.checkpointing:  # as Trainer.train() does
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)
        reference = getattr(trainer, "ref_model", None)

        def row_of(pair: dict) -> dict:
            if method in ("dpo", "precomputed"):
                return {f"{part}_ids": ids for part, ids in pair.items()}
            row = {"prompt": "", "chosen": "", "rejected": "", "prompt_input_ids": pair["prompt"]}
            row["prompt_attention_mask"] = [1] * len(pair["prompt"])
            for side in ("chosen", "rejected"):
                ids = pair["prompt"] + pair[side]
                row[f"{side}_input_ids"], row[f"{side}_attention_mask"] = ids, [1] * len(ids)
                row[f"{side}_labels"] = [-100] * len(pair["prompt"]) + pair[side]
            return row

        def batches():
            for start in range(0, len(self.rows), self.size):
                part = self.rows[start : start + self.size]
                yield part, trainer._prepare_inputs(trainer.data_collator(part))

        def prepare(pairs: list[dict]) -> None:
            self.rows = [row_of(pair) for pair in self.in_order(pairs)]
            if method == "precomputed":
                trainer.precompute_ref_logps, trainer.ref_model = False, reference
                for part, batch in batches():
                    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
                    for row, y_w, y_l in zip(part, chosen.tolist(), rejected.tolist(), strict=True):
                        row |= {"ref_chosen_logps": y_w, "ref_rejected_logps": y_l}
                trainer.precompute_ref_logps, trainer.ref_model = True, None

        def losses():
            for part, batch in batches():
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model, batch)
                yield loss * len(part) / len(self.rows)

        self.prepare, self.losses = prepare, losses

    def in_order(self, pairs: list[dict]) -> list[dict]:
        """TRL's best has pairs of similar length together; by default their order is random."""
        return sorted(pairs, key=lambda pair: sum(map(len, pair.values()))) if self.name == "best" else pairs

    def begin_trl_xpo(self, method: str, folder: str) -> None:
        """The training part of a step of TRL 1.13: its log-probabilities and loss."""
        from accelerate import Accelerator
        from trl.experimental.xpo import XPOTrainer

        self.model, reference = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE) for _ in range(2)
        )
        reference.eval().requires_grad_(False)
        self.model.train()
        if self.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        bf16 = "bf16" if DEVICE.type == "cuda" else "no"
        accelerator = Accelerator(mixed_precision=bf16, cpu=DEVICE.type == "cpu")
        options = dict(max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        options |= dict(eos_token_id=self.model.generation_config.eos_token_id, pad_token_id=0)
        options |= dict(use_cache=not self.checkpointing)
        trainer = SimpleNamespace(
            ref_model=reference,
            args=SimpleNamespace(loss_type="sigmoid"),
            beta=0.1,
            alpha=1e-5,
            accelerator=accelerator,
            generation_kwargs=options,
            generation_config=GenerationConfig(**options),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

        def padded(pairs: list[dict], *parts: str, prompt_length: int = 0) -> dict[str, torch.Tensor]:
            """Prompts padded on the left, completions on the right."""
            rows = [[pair["prompt"], *(pair[part] for part in parts)] for pair in pairs]
            longest, ids, mask = max(len(y) for row in rows for y in row[1:] or [[]]), [], []
            for prompt, *rest in rows:
                left = [0] * (prompt_length - len(prompt))
                completion = rest[0] if rest else []
                right = [0] * (longest - len(completion))
                ids.append(left + prompt + completion + right)
                mask.append([0] * len(left) + [1] * len(prompt + completion) + [0] * len(right))
            ids, mask = torch.tensor(ids, device=DEVICE), torch.tensor(mask, device=DEVICE)
            return {"input_ids": ids, "attention_mask": mask}

        def prepare(pairs: list[dict]) -> None:
            self.wins = {id(pair): i % 2 == 0 for i, pair in enumerate(pairs)}  # in whatever order
            self.rows = self.in_order(pairs)

        def losses():
            for start in range(0, len(self.rows), self.size):
                part = self.rows[start : start + self.size]
                length = max(len(pair["prompt"]) for pair in part)
                data = [padded(part, side, prompt_length=length) for side in ("chosen", "rejected")]
                with accelerator.autocast():
                    logps = XPOTrainer._compute_logprobs(trainer, self.model, *data, length)
                policy_wins = torch.tensor([self.wins[id(pair)] for pair in part], device=DEVICE)
                loss, _, _ = XPOTrainer._compute_losses(trainer, *logps, policy_wins)
                yield loss * len(part) / len(self.rows)

        def generate():
            length = max(len(pair["prompt"]) for pair in self.rows)
            prompts = padded(self.rows, prompt_length=length)
            with torch.no_grad(), accelerator.autocast():
                XPOTrainer._generate_completions(trainer, prompts, self.model)
            return 0.0, 0.0

        self.prepare, self.losses = prepare, losses
        if method == "generation":
            self.step = generate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--lengths", default="chat", help=f"{', '.join(LENGTHS)}, or tokens of a completion")
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--vocabulary", type=int, help="[that of the model]")
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--size", type=int, default=4, help="pairs of a micro-batch")
    parser.add_argument("--steps", type=int, default=10, help="timed ones; two more come before")
    parser.add_argument("--names", nargs="*", default=["ours", "trl", "fast", "best"])
    everybody = ["ours", "lean", "trl", "fast", "best"]
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--loss_type", default="sigmoid", help="of dpo")
    parser.add_argument("--memory", choices=everybody)
    parser.add_argument("--profile", choices=everybody)
    parser.add_argument("--json", action="store_true", help="print results as one line of JSON")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    config = SIZES[args.model] | ({"vocab_size": args.vocabulary} if args.vocabulary else {})
    draw = partial(make_pairs, args.pairs, args.lengths, config["vocab_size"])  # of a seed
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen2Config(**config, tie_word_embeddings=True))
        # No token ends a completion: in generation, all have NEW_TOKENS.
        model.generation_config = GenerationConfig(eos_token_id=config["vocab_size"], pad_token_id=0)
        model.save_pretrained(folder)
        del model
        options = args.pairs, args.size, args.lora, args.loss_type
        if args.lora:
            import peft

            model = AutoModelForCausalLM.from_pretrained(folder)
            lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
            model = peft.get_peft_model(model, peft.LoraConfig(**lora, task_type="CAUSAL_LM"))
            model.save_pretrained(ADAPTER.format(folder))
            del model
        if args.memory:
            contestant = Contestant(args.memory, args.method, folder, *options)
            gib = peak_memory(contestant, draw)
            print(json.dumps({"gib": gib}) if args.json else f"{args.memory}: {gib:.2f} GiB")
            return
        if args.profile:
            contestant = Contestant(args.profile, args.method, folder, *options)
            seconds = profile(contestant, draw, config["vocab_size"])
            print(json.dumps(seconds) if args.json else seconds)
            return
        contestants = {name: Contestant(name, args.method, folder, *options) for name in args.names}
        times = {name: [] for name in contestants}
        first, differences = {}, dict.fromkeys(contestants, 0.0)
        tokens = 0
        for i in range(args.steps + 2):
            pairs = draw(seed=i)
            if i >= 2:
                tokens += sum(len(part) for pair in pairs for part in pair.values()) / args.steps
            for name, contestant in contestants.items():
                contestant.prepare(pairs)
                start = time.perf_counter()
                result = contestant.step()
                seconds = time.perf_counter() - start
                if i == 0:
                    first[name] = result
                if name == args.names[0]:
                    want = result
                apart = max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(want, result, strict=True))
                differences[name] = max(differences[name], apart)
                if i >= 2:
                    times[name].append(seconds)
    results = {}
    tokens = 2 * NEW_TOKENS * args.pairs if args.method == "generation" else tokens
    for name, seconds in times.items():
        ratios = [b / a for a, b in zip(times[args.names[0]], seconds, strict=True)]
        results[name] = {
            "loss": first[name][0],
            "grad_norm": first[name][1],
            "difference": differences[name],
            "pairs_per_second": args.pairs / statistics.mean(seconds),
            "tokens_per_second": tokens / statistics.mean(seconds),
            "times_as_long": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
    if args.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        print(
            f"{args.method} {name:5} loss {result['loss']:.6f}  gradient norm {result['grad_norm']:.5f}  "
            f"(of all steps within {result['difference']:.0e} of the first)  "
            f"{result['pairs_per_second']:.2f} pairs/s  {result['tokens_per_second']:.0f} tokens/s  "
            f"takes {result['times_as_long']:.2f} times as long "
            f"(quartiles {result['quartiles'][0]:.2f}, {result['quartiles'][1]:.2f})"
        )


def peak_memory(contestant: Contestant, draw) -> float:
    """GiB that three steps need more than there was before the first."""
    steps = [draw(seed=i) for i in range(3)]
    contestant.prepare(steps[0])
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for pairs in steps:
            contestant.prepare(pairs)
            contestant.step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for pairs in steps:
        contestant.prepare(pairs)
        contestant.step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def profile(contestant: Contestant, draw, vocabulary: int, steps: int = 5) -> dict[str, float]:
    """Seconds of a step by kind of operation, and all of them, `step`, which Python's own are a part of."""
    contestant.prepare(draw(seed=0))
    contestant.step()
    with torch.profiler.profile(record_shapes=True) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            contestant.step()
        seconds = {"step": (time.perf_counter() - start) / steps}
    for event in profiler.key_averages(group_by_input_shape=True):
        # What has an axis as long as the vocabulary belongs to the head, or to its softmax.
        of_head = any(vocabulary in shape for shape in event.input_shapes if isinstance(shape, list))
        product = event.key in ("aten::mm", "aten::addmm", "aten::bmm")
        if "adam" in event.key or "foreach" in event.key:
            kind = "optimizer"
        elif "scaled_dot_product" in event.key or event.key == "aten::bmm":
            kind = "attention"
        elif product:
            kind = "head" if of_head else "layers"
        else:
            kind = "softmax over the vocabulary" if of_head else "the rest"
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6 / steps
    return seconds


if __name__ == "__main__":
    main()
