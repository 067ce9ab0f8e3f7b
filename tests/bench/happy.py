"""A judge that prefers the story with more happy words, for xpo.py on a real model; and what became of it.

python xpo.py --judge tests/bench/happy.py:happier --output_dir happy ...    see the README
python tests/bench/happy.py happy                                            the table of that run
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean

HAPPY = {"happy", "love", "smile", "friend", "fun", "laugh", "hug"}


def happy_words(text: str) -> int:
    return sum(word in HAPPY for word in re.findall("[a-z]+", text.lower()))


def happier(prompts: list, pairs: list[tuple[str, str]]) -> list[int]:
    counts = [(happy_words(a), happy_words(b)) for a, b in pairs]
    return [-1 if a == b else int(b > a) for a, b in counts]


def main(folder: str) -> None:
    lines = [json.loads(line) for line in Path(folder, "completions.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    kl = {line["step"]: line["objective/policy_kl"] for line in steps if "objective/policy_kl" in line}
    print("| steps | happy words: policy | reference | distinct words | KL |\n|---|---|---|---|---|")
    for step in sorted({line["step"] for line in lines}):
        texts = [line["texts"] for line in lines if line["step"] == step]
        policy, reference = ([happy_words(pair[i]) for pair in texts] for i in (0, 1))
        words = [word for pair in texts for word in re.findall("[a-z]+", pair[0].lower())]
        share = f"{len({*words}) / len(words):.2f}"
        print(f"| {step} | {mean(policy):.2f} | {mean(reference):.2f} | {share} | {kl.get(step, 0):.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
