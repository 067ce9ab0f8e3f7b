"""Every method, three seeds each, on held-out data: the README's tables.

    python tests/bench/quality.py choose       learning rates for the built-in example, one seed
    python tests/bench/quality.py toy          the built-in example: about 20 minutes on two idle cores
    python tests/bench/quality.py lora         the same with LoRA (rank 16, three times the learning rate)
    python tests/bench/quality.py stories DIR  a real model, DIR/models/stories260K, on DIR/data/stories

Results go to choose.json, toy.json, lora.json or stories.json beside this file; a run that is there is not
run again. Exact match of `choose` is that of every third test number; exact match of the others is that of
the other numbers. So a result is never measured on the numbers that its learning rate was chosen on.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
import transformers

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOY = {  # name: script and flags
    "DPO": "dpo.py",
    "DPO, lr 1e-3": "dpo.py --learning_rate 1e-3",
    "CPO": "cpo.py",
    "SimPO": "cpo.py --loss_type simpo",
    "SimPO, lr 3e-4": "cpo.py --loss_type simpo --learning_rate 3e-4",
    "CPO-SimPO": "cpo.py --loss_type simpo --cpo_alpha 1",
    "AlphaPO": "alphapo.py",
    "AlphaPO, lr 3e-4": "alphapo.py --learning_rate 3e-4",
    "ORPO": "orpo.py",
    "XPO": "xpo.py",
    "online DPO (α = 0)": "xpo.py --alpha 0",
}
LORA = {"DPO": "dpo.py --use_peft", "DPO, lr 3e-4": "dpo.py --use_peft --learning_rate 3e-4"}
LORA |= {f"DPO, rank {r}": f"dpo.py --use_peft --lora_r {r} --lora_alpha {2 * r}" for r in (4, 64)}
LORA |= {name: f"{TOY[name]} --use_peft" for name in ("SimPO", "XPO", "AlphaPO", "ORPO", "CPO")}
RATES = {  # around the rates of the built-in example: a third, once and three times
    "dpo.py": (1e-5, 3e-5, 1e-4),
    "cpo.py": (1.7e-4, 5e-4, 1.5e-3),
    "cpo.py --loss_type simpo": (1e-5, 3e-5, 1e-4),
    "alphapo.py": (1e-5, 3e-5, 1e-4),
    "orpo.py": (3e-4, 1e-3, 3e-3),
    "xpo.py": (3e-5, 1e-4, 3e-4, 1e-3),
}
CHOOSE = {f"{m}, lr {lr:g}": f"{m} --learning_rate {lr:g}" for m, rates in RATES.items() for lr in rates}
STORIES = {
    "DPO": "dpo.py --learning_rate 1e-4",
    "DPO, LoRA, lr 3e-4": "dpo.py --use_peft --learning_rate 3e-4",
    "DPO, LoRA, lr 1e-3": "dpo.py --use_peft --learning_rate 1e-3",
    "CPO": "cpo.py --learning_rate 3e-4",
    "SimPO": "cpo.py --loss_type simpo --learning_rate 1e-4",
    "AlphaPO": "alphapo.py --learning_rate 1e-4",
    "ORPO": "orpo.py --learning_rate 1e-3",
}
STORIES_FLAGS = "--batch_size 32 --max_length 512 --max_new_tokens 60 --per_device_eval_batch_size 32"
SEEDS = (1, 2, 3)
COLUMNS = {  # metric: title, scale, digits
    "exact_match": ("greedy exact match, %", 100, 1),
    "exact_match_sampled": ("sampled, %", 100, 1),
    "rewards/accuracies": ("accuracy, %", 100, 1),
    "logps/chosen": ("log π(chosen)", 1, 2),
    "logps/rejected": ("log π(rejected)", 1, 2),
    "distinct_of_4": ("distinct of 4 samples", 1, 2),
}


def run(command: list[str], choose: bool) -> dict:
    """The evaluations before and after one run, with exact match on the numbers to choose by, or the rest."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, ROOT / command[0], *command[1:], "--output_dir", f"{folder}/run"]
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        samples = list(map(json.loads, Path(folder, "run", "completions.jsonl").open()))
    evaluations = [line for line in lines if any(name.startswith("eval_") for name in line)]
    for evaluation in (evaluations[0], evaluations[-1]):
        rows = [sample for sample in samples if sample["step"] == evaluation["step"] and "answer" in sample]
        rows = [sample for sample in rows if (sample["row"] % 3 == 0) == choose]
        for name, key in (("exact_match", "greedy"), ("exact_match_sampled", "sampled")) if rows else ():
            evaluation[f"eval_{name}"] = mean(sample[key].strip() == sample["answer"] for sample in rows)
    return {"before": evaluations[0], "after": evaluations[-1]}


def cell(found: list[dict], metric: str) -> str:
    _, scale, digits = COLUMNS[metric]
    values = [scale * evaluation[f"eval_{metric}"] for evaluation in found if f"eval_{metric}" in evaluation]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" if values else ""


METHODS = {"choose": CHOOSE, "toy": TOY, "lora": LORA, "stories": STORIES}


def table(data: str) -> list[str]:
    """The lines of a table, from the .json: mean and standard deviation over the seeds."""
    runs, methods = json.loads((HERE / f"{data}.json").read_text())["runs"], METHODS[data]
    seeds, first = SEEDS[:1] if data == "choose" else SEEDS, next(iter(methods.values()))
    rows = {"before training": [runs[f"{first} --seed {seed}"]["before"] for seed in seeds]}
    for name, command in methods.items():
        rows[name] = [runs[f"{command} --seed {seed}"]["after"] for seed in seeds]
    shown = [metric for metric in COLUMNS if any(cell(found, metric) for found in rows.values())]
    lines = [f"| method | {' | '.join(COLUMNS[metric][0] for metric in shown)} |"]
    lines += [f"|{'---|' * (len(shown) + 1)}"]
    for name, found in rows.items():
        lines += [f"| {name} | {' | '.join(cell(found, metric) for metric in shown)} |"]
    return lines


def main(data: str, folder: str = "") -> None:
    flags = []
    if data == "stories":
        flags = ["--model_name_or_path", f"{folder}/models/stories260K"]
        flags += ["--dataset_name", f"{folder}/data/stories", *STORIES_FLAGS.split()]
    path, seeds = HERE / f"{data}.json", SEEDS[:1] if data == "choose" else SEEDS
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "device": "2 CPU cores"}
    results = json.loads(path.read_text()) if path.exists() else {"versions": versions, "runs": {}}
    for command in METHODS[data].values():
        for seed in seeds:
            key = f"{command} --seed {seed}"
            if key not in results["runs"]:
                found = run([*command.split(), *flags, "--seed", str(seed)], data == "choose")
                results["runs"][key] = found | {"commit": commit.stdout.strip()}
                path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
                print(key, {name: found["after"].get(f"eval_{name}") for name in COLUMNS}, flush=True)
    print("", *table(data), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
