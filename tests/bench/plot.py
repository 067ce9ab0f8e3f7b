"""Curves of one or more runs: python tests/bench/plot.py output/toy-dpo [output/toy-cpo ...]

It draws loss, margin, accuracy and log π of chosen and rejected answers against the step: lines are training,
dots are held-out pairs. It reads metrics.jsonl, also of a run that is not finished, and writes curves.png: of
one run to its directory, of several runs to the current directory.
"""

import argparse
import json
from pathlib import Path

PANELS = {  # title: metrics
    "loss": ["loss"],
    "margin": ["rewards/margins"],
    "accuracy": ["rewards/accuracies"],
    "log π(chosen) and, dotted line and rings, log π(rejected)": ["logps/chosen", "logps/rejected"],
}


def read(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; a value that was not finite is a gap."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [float("nan") if y is None else y for _, y in points]


def draw(folders: list[Path], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for panel, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        for i, folder in enumerate(folders):
            for name, style in zip(names, "-:", strict=False):
                panel.plot(
                    *read(folder, name), style, color=f"C{i}", label=folder.name if style == "-" else None
                )
                filled = {} if style == "-" else {"markerfacecolor": "none"}
                panel.plot(*read(folder, f"eval_{name}"), "o", color=f"C{i}", markersize=5, **filled)
    axes[0, 0].plot([], [], "o", color="black", label="held-out pairs")
    axes[0, 0].legend()
    figure.savefig(out, dpi=150)
    print(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="another name for the PNG")
    args = parser.parse_args()
    for folder in args.folders:
        if not (folder / "metrics.jsonl").exists():
            parser.error(f"{folder} has no metrics.jsonl: it is not the output_dir of a run")
    try:
        folder = args.folders[0] if len(args.folders) == 1 else Path()
        draw(args.folders, args.out or folder / "curves.png")
    except ModuleNotFoundError as error:
        parser.error(f"{error}: pip install matplotlib")


if __name__ == "__main__":
    main()
