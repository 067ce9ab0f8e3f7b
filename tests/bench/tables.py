"""The README's tables of time and memory, each by one command; results go to a .json beside this file.

    python tests/bench/tables.py trl [--xpo PYTHON]    against TRL 1.16; XPO: one with TRL 1.13
    python tests/bench/tables.py trl --lora            the same with LoRA, at chat lengths
    python tests/bench/tables.py gpu                   on a GPU: ours, compiled, TRL's best, at 0.5b and 1.5b
    python tests/bench/tables.py where                 what the time of a step goes into, ours and TRL's
    python tests/bench/tables.py growth                with completion length, vocabulary, processes
    python tests/bench/tables.py startup               with the number of pairs in the dataset
    python tests/bench/tables.py figures               bars of the first table, curves of the second

Measurements need an idle machine. A part that is in the .json already is not measured again.

gpu ends after about eight minutes (--minutes). The same command measures what is left. On a CPU, `gpu --model
small --results FOLDER` is a dry run with a tiny model.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
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
WITH_LORA = ("dpo", "simpo", "orpo")
# Pairs of a step and of a micro-batch. At 1.5b, TRL would come close to 80 GB, on paper, with four.
GPU_PAIRS = {"0.5b": (8, 4), "1.5b": (8, 2), "small": (1, 1)}


def step(*flags, **options) -> dict:
    """What step.py says of one kind of lengths."""
    found = steps(*flags, **options)
    if not found:
        raise SystemExit(1)
    return found[0]


def steps(*flags, python: str = sys.executable, processes: int = 1, threads: int | None = None) -> list[dict]:
    """What step.py says: of several lengths, as many as it measured before it ended or failed."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [python, *launch, str(HERE / "step.py"), *map(str, flags), "--json"]
    threads = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        print(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
    return [json.loads(line) for line in found]


class Results:
    """A .json of results by key; what is there is not measured again."""

    def __init__(self, name: str, folder: Path | None = None):
        self.path = (folder or HERE) / f"{name}.json"
        self.content = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, key: str, measure) -> dict:
        if key not in self.content:
            self.content[key] = measure() | provenance()
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")
            print(key, self.content[key], flush=True)
        return self.content[key]


def provenance() -> dict:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    paths = {"--xpo": "PYTHON", "--results": "FOLDER"}  # they say something about a machine only
    command = [paths.get(before, word) for before, word in pairwise(sys.argv)]
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
    cases, lora, suffix = product(args.lengths, methods), [], ""
    if args.lora:
        cases, lora, suffix = product(["chat"], [m for m in methods if m in WITH_LORA]), ["--lora"], " lora"
    for lengths, method in cases:
        if method == "generation" and lengths != "chat":
            continue
        python = args.xpo if method in ("xpo", "generation") else sys.executable
        count = args.steps * (2 if method == "generation" else 1)
        key, flags = f"{method} {lengths}{suffix}", (method, "--lengths", lengths, *lora)
        timed = (*flags, "--steps", count)
        results.get(key, lambda timed=timed, python=python: step(*timed, python=python))
        if method == "generation" or (method == "simpo" and not lora):  # in memory as CPO; nothing to see
            continue
        for name in NAMES:
            measured = (*flags, "--memory", name)
            name = f"{key} memory {name}"
            results.get(name, lambda measured=measured, python=python: step(*measured, python=python))
    print(
        "| method | lengths | ours, pairs/s | TRL takes: defaults | no checkpointing | best | ours, GiB "
        "| checkpointing | TRL: defaults | no checkpointing | best |\n|" + "---|" * 11
    )
    for lengths, method in product(LENGTHS, TITLES):
        key = f"{method} {lengths}{suffix}"
        row = results.content.get(key)
        if not row:
            continue
        cells = [f"{row['ours']['pairs_per_second']:.2f}"]
        for name in NAMES[2:]:
            low, high = row[name]["quartiles"]
            cells.append(f"{row[name]['times_as_long']:.2f} ({low:.2f}–{high:.2f})")
        memory = [results.content.get(f"{key} memory {name}") for name in NAMES]
        cells += [f"{found['gib']:.2f}" if found else "" for found in memory]
        print(f"| {TITLES[method]}{suffix and ', LoRA'} | {lengths} | " + " | ".join(cells) + " |")


def gpu_parts(args) -> Iterator[tuple]:
    """Of each process: method, size, lengths, what is special, flags for that, and contestants.

    The most important come first. At 1.5b, two contestants do not fit into 80 GB. The compiled one and varlen
    are always alone, so that the others are measured if they fail.
    """
    sizes = [args.model] if args.model else ["0.5b", "1.5b"]
    for size in sizes:
        apart = [("ours",), ("best",)] if size == "1.5b" else [("ours", "best")]
        for names in (*apart, ("compiled",), ("varlen",)):
            yield "dpo", size, args.lengths, "", (), names
    first = sizes[0]
    yield "dpo", first, ["chat"], " lora", ("--lora",), ("ours", "best")
    for power in (26, 27, 28):
        flags = ("--chunk_logits", 2**power, "--chunk_tokens", 4096)
        yield "dpo", first, ["chat"], f" 2^{power} logits", flags, ("ours",)
    for method in ("simpo", "orpo"):
        yield method, first, args.lengths, "", (), ("ours", "best")
        yield method, first, ["chat"], " lora", ("--lora",), ("ours", "best")


def on_gpu(args) -> None:
    import torch

    if not torch.cuda.is_available() and not (args.model == "small" and args.results):
        raise SystemExit("error: this needs a GPU; --model small --results FOLDER is a dry run on a CPU")
    results, start, rows = Results("gpu", args.results), time.monotonic(), []
    is_late = False
    for method, size, kinds, special, flags, names in gpu_parts(args):
        names = [name for name in names if name in args.names and method in args.methods]
        keys = {cell: f"{method} {size} {cell[0]}{special} {cell[1]}" for cell in product(kinds, names)}
        title = TITLES[method] + special.replace(" lora", ", LoRA")
        rows += [(size, title, *cell, key) for cell, key in keys.items()]
        if is_late or all(key in results.content for key in keys.values()):
            continue
        pairs, micro_batch = GPU_PAIRS[size]
        flags = (*flags, "--model", size, "--pairs", pairs, "--size", micro_batch, "--steps", args.steps)
        found = steps(method, *flags, "--lengths", *kinds, "--names", *names)
        for (lengths, name), key in keys.items():
            if row := dict(zip(kinds, found, strict=False)).get(lengths):  # none if step.py failed before
                results.get(key, partial(row.get, name))
        is_late = time.monotonic() - start > 60 * args.minutes
    print("| model | method | lengths | contestant | seconds | ours = 1 | pairs/s | MFU, % | GiB |")
    print("|" + "---|" * 9)
    content = results.content
    for *cells, key in rows:
        if row := content.get(key):
            ours = content.get(f"{key.rpartition(' ')[0]} ours")
            ratio = f"{row['seconds'] / ours['seconds']:.2f}" if ours else ""
            cells += [f"{row['seconds']:.3f}", ratio, f"{row['pairs_per_second']:.2f}"]
            cells += [
                f"{100 * row['mfu']:.1f}" if row["mfu"] else "",
                f"{row['gib']:.1f}" if row["gib"] else "",
            ]
            print(f"| {' | '.join(cells)} |")
    for device, kernel in sorted({(row["device"], row["kernel"]) for row in content.values()}):
        print(f"{device}; attention kernel: {kernel}")
    if left := sum(key not in content for *_, key in rows):
        print(f"{left} of {len(rows)} rows are missing; the same command measures them")


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {"trl": against_trl, "gpu": on_gpu, "where": where, "growth": growth, "startup": startup}
    tables |= {"figures": figures}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lengths", nargs="*", choices=LENGTHS, default=LENGTHS, help="of trl and gpu")
    parser.add_argument("--methods", nargs="*", choices=TITLES, default=[*TITLES], help="of trl and gpu")
    parser.add_argument("--xpo", help="of trl: the Python of an environment with TRL 1.13")
    parser.add_argument("--lora", action="store_true", help="of trl: train adapters")
    names = ("ours", "compiled", "varlen", "best")
    parser.add_argument("--names", nargs="*", choices=names, default=names, help="contestants of gpu")
    parser.add_argument("--model", choices=GPU_PAIRS, help="of gpu [0.5b and 1.5b]")
    parser.add_argument("--results", type=Path, help="folder for the gpu.json of gpu [this file's]")
    parser.add_argument("--minutes", type=float, default=8, help="after which gpu begins no other part")
    args = parser.parse_args()
    tables[args.table](args)


if __name__ == "__main__":
    main()
