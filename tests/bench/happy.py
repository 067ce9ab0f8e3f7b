"""A judge that prefers the story with more happy words, for xpo.py on a real model; and what became of it.

python xpo.py --judge tests/bench/happy.py:happier --output_dir happy ...    see the README
python tests/bench/happy.py happy-1 happy-2 happy-3         the table, mean and standard deviation of runs
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

HAPPY = {"happy", "love", "smile", "friend", "fun", "laugh", "hug"}


def happy_words(text: str) -> int:
    return sum(word in HAPPY for word in re.findall("[a-z]+", text.lower()))


def happier(prompts: list, pairs: list[tuple[str, str]]) -> list[int]:
    counts = [(happy_words(a), happy_words(b)) for a, b in pairs]
    return [-1 if a == b else int(b > a) for a, b in counts]


def evaluations(folder: str) -> dict[int, tuple[float, ...]]:
    """By step: happy words of policy and reference, the share of distinct words, KL to the reference."""
    lines = [json.loads(line) for line in Path(folder, "completions.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    name = "objective/policy_kl"
    kl = {line["step"]: line[name] for line in steps if name in line}  # of the step before
    found = {}
    for step in sorted({line["step"] for line in lines}):
        texts = [(line["policy"], line["reference"]) for line in lines if line["step"] == step]
        policy, reference = ([happy_words(pair[i]) for pair in texts] for i in (0, 1))
        words = [word for pair in texts for word in re.findall("[a-z]+", pair[0].lower())]
        found[step] = mean(policy), mean(reference), len({*words}) / len(words), kl.get(step, 0.0)
    return found


def main(*folders: str) -> None:
    runs = [evaluations(folder) for folder in folders]
    print("| steps | happy words: policy | reference | share of distinct words | KL, nats |")
    print("|---|---|---|---|---|")
    for step in runs[0]:
        columns = zip(*(run[step] for run in runs), strict=True)
        cells = [f"{mean(v):.2f}{f' ± {stdev(v):.2f}' if runs[1:] else ''}" for v in columns]
        print(f"| {step} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
