"""The README's tables of time and memory, each by one command; results go to a .json beside this file.

    python tests/bench/tables.py trl [--xpo PYTHON]    against TRL 1.16; XPO: one with TRL 1.13
    python tests/bench/tables.py where                 what the time of a step goes into, ours and TRL's
    python tests/bench/tables.py growth                with completion length, vocabulary, processes
    python tests/bench/tables.py startup               with the number of pairs in the dataset
    python tests/bench/tables.py figures               bars of the first table, curves of the second

Measurements need an idle machine. A part that is in the .json already is not measured again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from itertools import pairwise, product
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TITLES = {
    "dpo": "DPO",
    "precomputed": "DPO, reference precomputed",
    "cpo": "CPO",
    "simpo": "SimPO",
    "orpo": "ORPO",
    "xpo": "XPO, training",
    "generation": "XPO, generation",
}
LENGTHS = ("chat", "summary", "story")
WHERE = ("dpo", "cpo")
KINDS = ("layers", "attention", "head", "softmax over the vocabulary", "optimizer", "the rest")
NAMES = ("ours", "lean", "trl", "fast", "best")


def step(*flags, python: str = sys.executable, processes: int = 1, threads: int | None = None) -> dict:
    """What step.py says."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [python, *launch, str(HERE / "step.py"), *map(str, flags), "--json"]
    threads = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not found:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(found[0])


class Results:
    """A .json of results by key; what is there is not measured again."""

    def __init__(self, name: str):
        self.path = HERE / f"{name}.json"
        self.content = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, key: str, measure) -> dict:
        if key not in self.content:
            self.content[key] = measure() | provenance()
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")
            print(key, self.content[key], flush=True)
        return self.content[key]


def provenance() -> dict:
    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    command = ["PYTHON" if before == "--xpo" else word for before, word in pairwise(sys.argv)]
    return versions | {"device": device, "commit": commit.stdout.strip(), "command": " ".join(command)}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{os.cpu_count()} cores {name}"


def against_trl(args) -> None:
    results = Results("trl")
    methods = [method for method in args.methods if args.xpo or method not in ("xpo", "generation")]
    for lengths, method in product(args.lengths, methods):
        if method == "generation" and lengths != "chat":
            continue
        python = args.xpo if method in ("xpo", "generation") else sys.executable
        steps = args.steps * (2 if method == "generation" else 1)
        flags = (method, "--lengths", lengths, "--steps", steps)
        results.get(f"{method} {lengths}", lambda flags=flags, python=python: step(*flags, python=python))
        if method in ("simpo", "generation"):  # in memory as CPO; nothing to see
            continue
        for name in NAMES:
            flags = (method, "--lengths", lengths, "--memory", name)
            key = f"{method} {lengths} memory {name}"
            results.get(key, lambda flags=flags, python=python: step(*flags, python=python))
    print(
        "| method | lengths | ours, pairs/s | TRL takes: defaults | no checkpointing | best | ours, GiB "
        "| checkpointing | TRL: defaults | no checkpointing | best |\n|" + "---|" * 11
    )
    for lengths, method in product(LENGTHS, TITLES):
        row, key = results.content.get(f"{method} {lengths}"), f"{method} {lengths} memory"
        if not row:
            continue
        cells = [f"{row['ours']['pairs_per_second']:.2f}"]
        for name in NAMES[2:]:
            low, high = row[name]["quartiles"]
            cells.append(f"{row[name]['times_as_long']:.2f} ({low:.2f}–{high:.2f})")
        memory = [results.content.get(f"{key} {name}") for name in NAMES]
        cells += [f"{found['gib']:.2f}" if found else "" for found in memory]
        print(f"| {TITLES[method]} | {lengths} | " + " | ".join(cells) + " |")


def where(args) -> None:
    results = Results("where")
    cases = list(product(WHERE, LENGTHS[:2], ("ours", "best")))
    columns = []
    for method, lengths, name in cases:
        flags = (method, "--lengths", lengths, "--profile", name)
        found = results.get(f"{method} {lengths} {name}", lambda flags=flags: step(*flags))
        columns.append([found.get(kind, 0.0) for kind in KINDS])
        columns[-1] += [found["step"] - sum(columns[-1]), found["step"]]
    heads = [f"{TITLES[m]}, {lengths}: {'ours' if name == 'ours' else 'TRL'}" for m, lengths, name in cases]
    print("| seconds of a step | " + " | ".join(heads) + " |\n|" + "---|" * (1 + len(heads)))
    for kind, *row in zip([*KINDS, "outside of operations", "in all"], *columns, strict=True):
        print(f"| {kind} | " + " | ".join(f"{seconds:.2f}" for seconds in row) + " |")


def growth(args) -> None:
    results = Results("growth")
    axes = {"completion": (128, 256, 512, 1024, 2048, 4096), "vocabulary": (1024, 8192, 32768, 131072)}
    flags = {"completion": "--lengths", "vocabulary": "--vocabulary"}
    print("| DPO, 2 pairs | ours, pairs/s | TRL's best | ours, GiB | TRL's best |\n|---|---|---|---|---|")
    for axis, value in [(axis, value) for axis, values in axes.items() for value in values]:
        common, names = ("dpo", flags[axis], value, "--pairs", 2, "--size", 2), ("ours", "best")
        timed = (*common, "--steps", 3, "--names", *names)
        speed = results.get(f"{axis} {value}", lambda timed=timed: step(*timed))
        cells = [f"{speed[name]['pairs_per_second']:.2f}" for name in names]
        for name in names:
            measured = (*common, "--memory", name)
            found = results.get(f"{axis} {value} memory {name}", lambda measured=measured: step(*measured))
            cells.append(f"{found['gib']:.2f}")
        print(f"| {axis} {value:,} | " + " | ".join(cells) + " |")
    print("\n| processes | threads of each | pairs/s |\n|---|---|---|")
    for processes, threads in ((1, 1), (1, 2), (2, 1)):
        flags = ("dpo", "--names", "ours", "--steps", args.steps)
        row = results.get(
            f"processes {processes} threads {threads}",
            lambda f=flags, p=processes, t=threads: step(*f, processes=p, threads=t),
        )
        print(f"| {processes} | {threads} | {row['ours']['pairs_per_second']:.2f} |")


STARTUP = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import common, dpo
args = dpo.Arguments(model_name_or_path=common.TOY_MODEL, dataset_name=sys.argv[2], output_dir=sys.argv[3])
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
common.start(args)
tokenizer = common.load_tokenizer(common.TOY_MODEL, args)
before, start = rss(), time.perf_counter()
train, _ = common.load_data(args, tokenizer)
batches = common.global_batches(train, args)
rows = train.tokens[batches[0]]
print("result", time.perf_counter() - start, rss() - before)
"""


def startup(args) -> None:
    results = Results("startup")
    print("| pairs | seconds, first start | later starts | memory above the libraries', GiB, first | later |")
    print("|---|---|---|---|---|")
    for pairs in (1000, 10_000, 100_000, 1_000_000):

        def measure(pairs=pairs) -> dict:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "pairs.jsonl")
                with path.open("w") as file:
                    for i in range(pairs):
                        row = {"prompt": f"{i} = ", "chosen": f"the number {i} itself", "rejected": "no idea"}
                        file.write(json.dumps(row) + "\n")
                found = []
                for _ in range(2):
                    command = [sys.executable, "-c", STARTUP, str(ROOT), str(path), f"{folder}/run"]
                    env = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache"}
                    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
                    line = next(line for line in done.stdout.splitlines() if line.startswith("result"))
                    found += map(float, line.split()[1:])
            return dict(zip(("first", "first_gib", "later", "later_gib"), found, strict=True))

        row = results.get(str(pairs), measure)
        print(f"| {pairs:,} | {row['first']:.1f} | {row['later']:.1f} ", end="")
        print(f"| {row['first_gib']:.2f} | {row['later_gib']:.2f} |")


def figures(args) -> None:
    import matplotlib.pyplot as plt

    content = Results("trl").content
    methods = [m for m in TITLES if f"{m} chat" in content and m != "generation"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    for i, (name, label) in enumerate({"trl": "TRL's defaults", "best": "TRL's best settings"}.items()):
        ratios = [content[f"{m} chat"][name]["times_as_long"] for m in methods]
        left.bar([x + 0.4 * i for x in range(len(methods))], ratios, 0.38, label=label)
    left.axhline(1, color="black", linewidth=1)
    left.set_ylim(0, 3)
    left.set_xticks([x + 0.2 for x in range(len(methods))], [TITLES[m].replace(", ", ",\n") for m in methods])
    left.tick_params(axis="x", labelsize=8)
    left.set_ylabel("time of a step, ours = 1")
    left.legend(frameon=False)
    content, lengths = Results("growth").content, (128, 256, 512, 1024, 2048, 4096)
    for name, label in {"ours": "ours", "best": "TRL's best settings"}.items():
        right.plot(
            lengths, [content[f"completion {n} memory {name}"]["gib"] for n in lengths], "o-", label=label
        )
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("tokens of each completion (DPO, 2 pairs, a prompt of 128)")
    right.set_ylabel("peak memory of a step, GiB")
    right.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(HERE / "figures.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {"trl": against_trl, "where": where, "growth": growth, "startup": startup, "figures": figures}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lengths", nargs="*", choices=LENGTHS, default=LENGTHS, help="of the first table")
    parser.add_argument("--methods", nargs="*", choices=TITLES, default=[*TITLES], help="of the first table")
    parser.add_argument("--xpo", help="the Python of an environment with TRL 1.13")
    args = parser.parse_args()
    tables[args.table](args)
