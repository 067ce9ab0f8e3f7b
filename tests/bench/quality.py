"""python tests/bench/quality.py: every method on the built-in example, three seeds each: the README's table.

Runs the scripts one after the other (about half an hour on two cores) and writes quality.json beside
itself: per run the metrics before and after training. A run that is there already is not run again. Then
prints the table.
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
RUNS = {  # name: script and flags
    "DPO": "dpo.py",
    "DPO, β 1": "dpo.py --beta 1 --learning_rate 1e-4",
    "DPO, too fast": "dpo.py --learning_rate 1e-3",
    "CPO": "cpo.py",
    "SimPO": "cpo.py --loss_type simpo",
    "CPO-SimPO": "cpo.py --loss_type simpo --cpo_alpha 1",
    "SimPO, too fast": "cpo.py --loss_type simpo --learning_rate 3e-4",
    "AlphaPO": "alphapo.py",
    "ORPO": "orpo.py",
    "XPO": "xpo.py",
    "online DPO": "xpo.py --alpha 0",
}
SEEDS = (1, 2, 3)
COLUMNS = (("exact_match", 100), ("exact_match_sampled", 100), ("logps/chosen", 1), ("distinct_of_4", 1))


def run(command: str, seed: int) -> dict:
    """The evaluations before and after one run."""
    script, *flags = command.split()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, ROOT / script, *flags, "--seed", str(seed), "--output_dir", folder]
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_exact_match" in line]
    return {"before": evaluations[0], "after": evaluations[-1]}


def main() -> None:
    path = HERE / "quality.json"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    results = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    results |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": __doc__.split(":")[0],
    }
    for name, command in RUNS.items():
        for seed in SEEDS:
            key = f"{command} --seed {seed}"
            if key not in results["runs"]:
                results["runs"][key] = run(command, seed) | {"commit": commit.strip()}
                path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
                print(name, seed, results["runs"][key]["after"]["eval_exact_match"], flush=True)

    def row(name: str, found: list[dict]) -> None:
        cells = [name]
        for metric, scale in COLUMNS:
            values = [f[f"eval_{metric}"] for f in found if f"eval_{metric}" in f]
            cells.append(f"{scale * mean(values):.1f} ± {scale * stdev(values):.1f}" if values else "")
        print(f"| {' | '.join(cells)} |")

    print("\n| method | greedy exact match, % | sampled, % | log π(chosen) | distinct of 4 samples |")
    print("|---|---|---|---|---|")
    row("SFT", [results["runs"][f"dpo.py --seed {seed}"]["before"] for seed in SEEDS])
    for name, command in RUNS.items():
        row(name, [results["runs"][f"{command} --seed {seed}"]["after"] for seed in SEEDS])


if __name__ == "__main__":
    main()
