"""Two versions of this project against each other: python tests/bench/compare.py TREE_A TREE_B METHOD

A tree is a checkout. A process for each takes training steps of step.py's "ours", with the code of its tree,
the same model, and the same pairs, new ones in every step, in turn: A B, B A and so on. Prints loss and
gradient norm of the first step, which have to agree, and how long a step of B takes, by A's: the median and
its 95% confidence interval. With --memory it is the peak memory of three steps, in 5 processes of each: the
median, least and most.

Where a process happens to have its memory can make it some percent faster or slower than another one with
the same code, all along. The interval knows of that only with several --rounds, each in new processes.
"""

import argparse
import math
import multiprocessing
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

SPAWN = multiprocessing.get_context("spawn")


def load(tree: Path):
    """step.py of a tree, as a module."""
    sys.path[:0] = [str(tree), f"{tree}/tests/bench"]
    import step

    assert step.ROOT == tree, f"{step.ROOT} is not {tree}"
    step.transformers.utils.logging.set_verbosity_error()
    step.transformers.utils.logging.disable_progress_bar()
    return step


def prepare(tree: Path, folder: str) -> None:
    """Save the model that both train, as step.py does."""
    step = load(tree)
    config = step.SIZES["small"]
    step.torch.manual_seed(0)
    model = step.AutoModelForCausalLM.from_config(step.Qwen2Config(**config, tie_word_embeddings=True))
    model.generation_config = step.GenerationConfig(eos_token_id=config["vocab_size"], pad_token_id=0)
    model.save_pretrained(folder)


def work(pipe, tree: Path, lengths: str, *job) -> None:
    """What a process does: a step, or the measurement of memory, whenever it is told to."""
    sys.stdout = sys.stderr
    step = load(tree)
    contestant, steps = step.Contestant("ours", *job), 0
    draw = partial(step.make_pairs, contestant.pairs, lengths, step.SIZES["small"]["vocab_size"])
    pipe.send("ready")
    while order := pipe.recv():
        if order == "step":
            contestant.prepare(draw(seed=steps))
        start = time.perf_counter()
        result = contestant.step() if order == "step" else step.peak_memory(contestant, draw)
        pipe.send((result, time.perf_counter() - start))
        steps += 1


@contextmanager
def worker(*args):
    """A process, as a function from what it has to do to (result, seconds)."""
    pipe, other = SPAWN.Pipe()
    process = SPAWN.Process(target=work, args=(other, *args), daemon=True)
    process.start()
    other.close()  # so that recv() fails if the process does

    def ask(order: str) -> tuple:
        time.sleep(0.01)  # OpenMP's threads go on for some milliseconds after the other's step
        pipe.send(order)
        return pipe.recv()

    pipe.recv()
    yield ask
    pipe.send(None)
    process.join()


def compare_first(results: list[tuple[float, float]], tolerance: float) -> None:
    for name, (loss, norm) in zip("AB", results, strict=True):
        print(f"{name}: loss {loss:.7g}  gradient norm {norm:.7g}", flush=True)
    if not all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(*results, strict=True)):
        raise SystemExit("error: the first steps of A and B differ")


def interval(ratios: np.ndarray) -> np.ndarray:
    """That of the median, by bootstrap: of rounds, and of the steps of each."""
    rng, shape = np.random.default_rng(0), (10_000, *ratios.shape)
    samples = ratios[rng.integers(shape[1], size=shape[:2])]
    samples = np.take_along_axis(samples, rng.integers(shape[2], size=shape), axis=2)
    return np.quantile(np.median(samples, axis=(1, 2)), [0.025, 0.975])


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("trees", type=Path, nargs=2)
    parser.add_argument("method", choices=["dpo", "precomputed", "cpo", "simpo", "orpo", "xpo"])
    parser.add_argument("--lengths", default="chat", help="as for step.py")
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--size", type=int, default=4, help="pairs of a micro-batch")
    parser.add_argument("--steps", type=int, default=40, help="timed ones of a round; two more come before")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=5e-6, help="relative, of loss and gradient norm")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    trees = [tree.resolve() for tree in args.trees]
    order, rounds, turns = ("memory", 5, 1) if args.memory else ("step", args.rounds, args.steps + 2)
    found = np.zeros((2, rounds, turns))  # GiB, or seconds
    with tempfile.TemporaryDirectory() as folder:
        # On Linux the peak memory of a process starts with that of its parent: this one has to stay small.
        with SPAWN.Pool(1) as pool:
            pool.apply(prepare, (trees[0], folder))
        job = (args.lengths, args.method, folder, args.pairs, args.size)
        for i in range(rounds):
            with worker(trees[0], *job) as a, worker(trees[1], *job) as b:
                for j in range(turns):
                    answers = {ask: ask(order) for ask in ((a, b) if (i + j) % 2 == 0 else (b, a))}
                    results, seconds = zip(answers[a], answers[b], strict=True)
                    found[:, i, j] = results if args.memory else seconds
                    if j == 0 and not args.memory:
                        compare_first(results, args.tolerance)
    found = found if args.memory else found[:, :, 2:]
    ratios = found[1] / found[0]
    low, high = (ratios.min(), ratios.max()) if args.memory else interval(ratios)
    of_a = f"{np.median(found[0]):.3f} {'GiB' if args.memory else 's'}"
    print(
        f"{args.method} {args.lengths}: A {of_a}, B {np.median(ratios):.4f} times it ({low:.4f}, {high:.4f})"
    )


if __name__ == "__main__":
    main()
