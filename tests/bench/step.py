"""Training steps against TRL's: python tests/bench/step.py METHOD [--lengths chat] [--steps 10]

The same model (random weights), pairs, batch, precision and optimizer; steps of ours and of TRL's in turn,
in one process, every step on new pairs. Prints loss and gradient norm of each, which have to agree, and how
long a step takes. METHOD
is dpo, precomputed (DPO, reference log-probabilities known), cpo, simpo, orpo, which need `pip install
.[bench]` (TRL 1.16), or xpo (the training part of a step), generation (XPO's), which need TRL 1.13, the last
release with an XPO trainer. The contestants:

    ours      our defaults
    lean      ours with gradient checkpointing
    compiled  ours with --torch_compile
    varlen    ours with --varlen_attention, on a GPU only
    trl       TRL's defaults: gradient checkpointing, pairs of a micro-batch in random order
    fast      TRL without gradient checkpointing
    best      the same, pairs of similar length together, and on CPUs, too, the head only where it is needed

On a GPU, all compute in bfloat16 with float32 weights, and none uses cuDNN's attention, which common.py
switches off. A step's time is that between two events on the GPU. Two more results are printed there. MFU
(model FLOPs utilization) is what flops_per_token counts, times the tokens of a second, divided by the GPU's
peak. The memory of a contestant is the peak during its steps, with its weights (and its reference, even if it
is precomputed), and without what the other contestants keep.

--lora trains an adapter (rank 16, on all linear layers) that has been saved with random weights before; the
reference is that adapter as it was. For dpo, cpo, simpo and orpo. On a GPU, frozen weights are in bfloat16.

--memory NAME prints the peak memory of three steps of the one, less what was there before the first;
--profile NAME prints what the time of a step goes into: the CPU's time or, on a GPU, that of its kernels.
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
import torch.distributed as dist
import transformers
from torch.autograd import DeviceType
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import cpo  # noqa: E402
import dpo  # noqa: E402
import orpo  # noqa: E402
import xpo  # noqa: E402

SIZES = {  # the head has a quarter of the weights in the first two, and 15% in the third
    "small": dict(vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=3)
    | dict(num_attention_heads=4, num_key_value_heads=2),
    "0.5b": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
    | dict(num_attention_heads=14, num_key_value_heads=2),
    "1.5b": dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28)
    | dict(num_attention_heads=12, num_key_value_heads=2),
}
# Tokens of prompt and completion, on average and at most: as in UltraFeedback, in summarisation, in fiction.
LENGTHS = {"chat": (190, 512, 280, 512), "summary": (700, 896, 60, 128), "story": (30, 128, 600, 896)}
METHODS = ["dpo", "precomputed", "cpo", "simpo", "orpo", "xpo", "generation"]
OURS, TRL = ("ours", "lean", "compiled", "varlen"), ("trl", "fast", "best")
# FLOP/s of products of dense bfloat16 matrices, from the data sheets. The first is the SXM version.
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
PEAK |= {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12}
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
        if name in OURS:
            self.begin_ours(method, folder)
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

    def begin_ours(self, method: str, folder: str) -> None:
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
            gradient_checkpointing=self.name == "lean",
            torch_compile=self.name == "compiled",
            varlen_attention=self.name == "varlen",
            bf16=DEVICE.type == "cuda",
            **options,
        )
        if not dist.is_initialized():  # another of ours may be in this process
            common.start(args)
        self.model = common.load_model(path, args, DEVICE, trainable=True)
        self.optimizer, reference = common.adamw(self.model, args), None
        if script in (dpo, xpo):
            reference = common.load_reference(None, self.model, args, DEVICE)
        reference_logps = partial(dpo.frozen_logps, reference, args)

        def prepare(pairs: list[dict]) -> None:
            parts = ("prompt", "chosen", "rejected")
            lengths = np.array([[len(pair[part]) for part in parts] for pair in pairs])
            tokens = datasets.Dataset.from_list(pairs)
            self.prompts = [pair["prompt"] for pair in pairs]
            self.data = common.Data(tokens, tokens, lengths, score_prompts=method == "orpo")
            self.reference_logps = reference_logps
            if method == "precomputed":
                batches = common.micro_batches(self.data, np.arange(len(lengths)), self.size, DEVICE)
                table = torch.cat([reference_logps(batch) for batch in batches])
                self.reference_logps = lambda batch: table[batch.rows]

        def losses():
            rows = self.data.lengths.sum(1).argsort(kind="stable")
            for batch in common.micro_batches(self.data, rows, self.size, DEVICE):
                if script is xpo:  # chosen and rejected stand for the samples of policy and reference
                    wins = torch.from_numpy(batch.rows % 2 == 0).to(DEVICE)
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
        frozen = torch.bfloat16 if self.lora and DEVICE.type == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=frozen)
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
        # As Trainer.train() does. The first is what makes TRL compute in bfloat16.
        trainer.accelerator.prepare_model(self.model.train())
        if self.checkpointing:
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
    lengths = f"{', '.join(LENGTHS)}, or tokens of a completion; for several, one after the other"
    parser.add_argument("--lengths", nargs="+", default=["chat"], help=lengths)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--vocabulary", type=int, help="[that of the model]")
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--size", type=int, default=4, help="pairs of a micro-batch")
    parser.add_argument("--steps", type=int, default=10, help="timed ones; two more come before")
    parser.add_argument("--names", nargs="*", choices=[*OURS, *TRL], default=["ours", *TRL])
    parser.add_argument("--chunk_logits", type=int, default=common.CHUNK_LOGITS, help="as in common.py")
    parser.add_argument("--chunk_tokens", type=int, default=common.CHUNK_TOKENS, help="as in common.py")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--loss_type", default="sigmoid", help="of dpo")
    parser.add_argument("--memory", choices=[*OURS, *TRL])
    parser.add_argument("--profile", choices=[*OURS, *TRL])
    parser.add_argument(
        "--json", action="store_true", help="print results as a line of JSON for each of --lengths"
    )
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if DEVICE.type == "cuda":
        common.prepare_cuda()  # for TRL as well: it switches cuDNN's attention off
    common.CHUNK_LOGITS, common.CHUNK_TOKENS = args.chunk_logits, args.chunk_tokens
    config = SIZES[args.model] | ({"vocab_size": args.vocabulary} if args.vocabulary else {})
    draws = [partial(make_pairs, args.pairs, lengths, config["vocab_size"]) for lengths in args.lengths]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with DEVICE:  # on a GPU, this takes a second instead of a minute
            model = AutoModelForCausalLM.from_config(Qwen2Config(**config, tie_word_embeddings=True))
        # No token ends a completion: in generation, all have NEW_TOKENS.
        model.generation_config = GenerationConfig(eos_token_id=config["vocab_size"], pad_token_id=0)
        model.save_pretrained(folder)
        if args.lora:
            import peft

            model = AutoModelForCausalLM.from_pretrained(folder)
            lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
            model = peft.get_peft_model(model, peft.LoraConfig(**lora, task_type="CAUSAL_LM"))
            model.save_pretrained(ADAPTER.format(folder))
        flops = flops_per_token(model, args.method)
        del model
        options = args.method, folder, args.pairs, args.size, args.lora, args.loss_type
        if args.memory:
            gib = peak_memory(Contestant(args.memory, *options), draws[0])
            print(json.dumps({"gib": gib}) if args.json else f"{args.memory}: {gib:.2f} GiB")
            return
        if args.profile:
            seconds = profile(Contestant(args.profile, *options), draws[0], config["vocab_size"])
            print(json.dumps(seconds) if args.json else seconds)
            return
        contestants, own = {}, {}  # own: the bytes of GPU memory that a contestant keeps between steps
        for name in args.names:
            before = torch.cuda.memory_allocated()  # 0 on a CPU
            contestants[name] = Contestant(name, *options)
            own[name] = torch.cuda.memory_allocated() - before
        device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
        peak = None if args.method == "generation" else PEAK.get(device)
        kernel = attention_kernel(config)
        for lengths, draw in zip(args.lengths, draws, strict=True):
            results = measure(args, contestants, own, draw)
            for result in results.values():
                mfu = result["tokens_per_second"] * flops / peak if peak else None
                result |= {"mfu": mfu, "kernel": kernel}
            if args.json:
                print(json.dumps(results), flush=True)
                continue
            print(f"attention kernel: {kernel}")
            for name, result in results.items():
                low, high = result["quartiles"]
                print(
                    f"{args.method} {lengths} {name:8} loss {result['loss']:.6f}  "
                    f"gradient norm {result['grad_norm']:.5f}  "
                    f"(of all steps within {result['difference']:.0e} of the first)  "
                    f"{result['pairs_per_second']:.2f} pairs/s  {result['tokens_per_second']:.0f} tokens/s  "
                    f"takes {result['times_as_long']:.2f} times as long (quartiles {low:.2f}, {high:.2f})"
                    + (f"  {result['gib']:.1f} GiB" if result["gib"] else "")
                    + (f"  MFU {result['mfu']:.1%}" if result["mfu"] else "")
                )


def measure(args, contestants: dict[str, Contestant], own: dict[str, int], draw) -> dict[str, dict]:
    """Results of each contestant: of args.steps steps in turn, after two that are not timed."""
    times = {name: [] for name in contestants}
    first, differences, peaks = {}, dict.fromkeys(contestants, 0.0), dict.fromkeys(contestants, 0)
    tokens = 0
    for i in range(args.steps + 2):
        pairs = draw(seed=i)
        if i >= 2:  # every prompt once
            tokens += sum(len(part) for pair in pairs for part in pair.values()) / args.steps
        for name, contestant in contestants.items():
            contestant.prepare(pairs)
            of_others = torch.cuda.memory_allocated() - own[name]
            result, seconds = timed(contestant.step)
            own[name] = torch.cuda.memory_allocated() - of_others
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - of_others)
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
            "seconds": statistics.median(seconds),
            "pairs_per_second": args.pairs / statistics.mean(seconds),
            "tokens_per_second": tokens / statistics.mean(seconds),
            "times_as_long": statistics.median(ratios),
            "quartiles": np.quantile(ratios, [0.25, 0.75], method="weibull").tolist(),
            "gib": peaks[name] / 2**30 or None,
        }
    return results


def timed(step) -> tuple[tuple[float, float], float]:
    """What step() returns, and its seconds: on a GPU, those between two events of its stream."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        return step(), time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before.record()
    result = step()
    after.record()
    after.synchronize()
    return result, before.elapsed_time(after) / 1000


def flops_per_token(model, method: str) -> int:
    """FLOPs for a token of a training step: 6 for each parameter of the policy, and 2 of the reference.

    Two are for the forward pass, two for gradients of hidden states and two for gradients of weights, which
    frozen weights do not have. Tied embeddings count once, as the head. Products of attention do not count.
    """
    parameters = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return 4 * parameters + 2 * trained + 2 * parameters * (method in ("dpo", "xpo"))


def attention_kernel(config: dict) -> str:
    """Names of the kernels of one call of attention, as in packed_attention; "cpu" on a CPU."""
    if DEVICE.type == "cpu":
        return "cpu"
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    query, key = (
        torch.randn(1, n, 470, size, dtype=torch.bfloat16, device=DEVICE) for n in (heads, kv_heads)
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    return ", ".join(sorted({event.key.removeprefix("void ").split("<")[0] for event in events}))


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
        seconds = {"step": sum(timed(contestant.step)[1] for _ in range(steps)) / steps}
    for event in profiler.key_averages(group_by_input_shape=True):
        # What has an axis as long as the vocabulary belongs to the head, or to its softmax.
        of_head = any(vocabulary in shape for shape in event.input_shapes if isinstance(shape, list))
        product = event.key in ("aten::mm", "aten::addmm", "aten::bmm")
        if "adam" in event.key or "foreach" in event.key:
            kind = "optimizer"
        elif "attention" in event.key or event.key == "aten::bmm":
            kind = "attention"
        elif product:
            kind = "head" if of_head else "layers"
        else:
            kind = "softmax over the vocabulary" if of_head else "the rest"
        seconds[kind] = seconds.get(kind, 0.0) + self_time(event) / 1e6 / steps
    return seconds


def self_time(event) -> float:
    """Microseconds of an operation without those that it calls: on a GPU, of the kernels that it starts."""
    if DEVICE.type == "cpu":
        return event.self_cpu_time_total
    # Kernels are events of their own as well, and an annotation has the time of all that is within it.
    is_operation = event.device_type == DeviceType.CPU and not event.is_user_annotation
    return event.self_device_time_total if is_operation else 0.0


if __name__ == "__main__":
    main()
