"""The README's figures, each by one command; they go to the folder figures beside this file.

    python tests/bench/figures.py curves          training curves of DPO on the built-in example
    python tests/bench/figures.py displacement    the same run beside one with too large a learning rate
    python tests/bench/figures.py losses          losses of dpo.py against the reward margin
    python tests/bench/figures.py alphapo         AlphaPO's reward and its slope for some values of α
    python tests/bench/figures.py packed          what the fast forward pass makes of two pairs
    python tests/bench/figures.py all             all of them

The first two train, one to two minutes for each learning rate; the others take seconds.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Blue, vermilion, green, purple and orange, of Okabe and Ito: the colour-blind can tell them apart.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]
DASHES = ["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1))]
KINDS = {"prompt": "#bbbbbb", "chosen completion": "#56b4e9", "rejected completion": "#e69f00"}
STYLE = {"font.size": 11, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3, "lines.linewidth": 2}
STYLE |= {"savefig.facecolor": "white", "savefig.bbox": "tight", "savefig.pad_inches": 0.2}


def panels(*titles: str, height: float):
    """A figure of panels side by side."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(titles), figsize=(10, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title)
        panel.grid()
    return figure, axes


def save(figure, name: str) -> None:
    from PIL import Image

    path = HERE / "figures" / f"{name}.png"
    figure.savefig(path, dpi=120)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB", flush=True)


@cache
def train(folder: Path, learning_rate: str) -> Path:
    """The output_dir of a run of dpo.py on the built-in example; the legend has its name."""
    output_dir = folder / f"learning rate {learning_rate}"
    flags = ["--learning_rate", learning_rate, "--eval_steps", "10", "--output_dir", output_dir]
    done = subprocess.run([sys.executable, ROOT / "dpo.py", *flags], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"dpo.py failed:\n{done.stderr[-2000:]}")
    return output_dir


def curves(folder: Path) -> None:
    from matplotlib import pyplot
    from plot import draw

    draw([train(folder, "3e-5")], folder / "curves.png")
    figure = pyplot.gcf()
    figure.suptitle("DPO learns the built-in example (lines: training, dots: held-out pairs)")
    save(figure, "curves")


def displacement(folder: Path) -> None:
    from plot import read

    titles = "Both runs lower the loss,", "one makes chosen answers rare", "and answers nothing rightly."
    figure, (loss, chosen, match) = panels(*titles, height=3.8)
    figure.suptitle("Likelihood displacement: the run with the lower loss has unlearned its task")
    for learning_rate, color, marker in zip(("3e-5", "1e-3"), COLORS, "os", strict=False):
        run = train(folder, learning_rate)
        loss.plot(*read(run, "loss"), "-", color=color, alpha=0.5, linewidth=1.5)
        loss.plot(*read(run, "eval_loss"), marker, color=color, label=run.name)
        chosen.plot(*read(run, "eval_logps/chosen"), f"{marker}-", color=color)
        steps, shares = read(run, "eval_exact_match")
        match.plot(steps, [100 * share for share in shares], f"{marker}-", color=color)
    loss.set(xlabel="step", ylabel="loss (lines: training, marks: held out)")
    loss.legend(loc="upper right", bbox_to_anchor=(1, 0.8))
    chosen.set(xlabel="step", ylabel="log π(chosen), held out")
    chosen.set_yscale("symlog", linthresh=1)
    chosen.set_yticks([0, -1, -10, -100], ["0", "−1", "−10", "−100"])
    match.set(xlabel="step", ylabel="exact match, held out, %")
    save(figure, "displacement")


def losses(folder: Path) -> None:
    import torch

    from dpo import dpo_loss

    rising = {  # label: loss type and options
        "sigmoid (DPO)": ("sigmoid", {}),
        "hinge": ("hinge", {}),
        "robust, ε = 0.1": ("robust", {"label_smoothing": 0.1}),
        "apo_zero *": ("apo_zero", {}),
        "discopop": ("discopop", {}),
    }
    turning = {
        "sigmoid (DPO), to compare": ("sigmoid", {}),
        "sigmoid, ε = 0.1 (cDPO)": ("sigmoid", {"label_smoothing": 0.1}),
        "exo_pair, ε = 0.1": ("exo_pair", {"label_smoothing": 0.1}),
        "nca_pair *": ("nca_pair", {}),
        "ipo (z of means over tokens)": ("ipo", {}),
    }
    titles = "These losses do not punish a large margin,", "and these do: each has a best margin."
    figure, axes = panels(*titles, height=5)
    z = torch.linspace(-4, 6, 1001, dtype=torch.float64)
    for panel, lines in zip(axes, (rising, turning), strict=True):
        for label, (loss_type, options) in lines.items():
            # At β = 1, and with reference log-probabilities of 0, these are rewards of z/2 and -z/2.
            panel.plot(
                z,
                dpo_loss(z / 2, -z / 2, 0 * z, 0 * z, beta=1.0, loss_type=loss_type, **options),
                label=label,
            )
        panel.set(xlim=(-4, 6), ylim=(-0.8, 4.2), xlabel="z, the margin between the rewards, at β = 1")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=10)
    axes[0].set_ylabel("loss of a pair")
    note = "ε: label_smoothing      *: depends on both rewards, drawn for z/2 (chosen) and −z/2 (rejected)"
    figure.supxlabel(note, fontsize=10)
    save(figure, "losses")


def alphapo(folder: Path) -> None:
    import torch

    from alphapo import PowerDifference

    titles = "α bends the reward of AlphaPO.", "The larger α, the harder it pushes unlikely answers."
    figure, (left, right) = panels(*titles, height=4)
    for alpha in (1.0, 0.25, 0.0, -0.25, -1.0):
        t = torch.linspace(-4, 0, 401, dtype=torch.float64, requires_grad=True)
        reward = PowerDifference.apply(t, torch.zeros_like(t), alpha, 1.0)  # r(t) - r(0), and r(0) = 0
        (slope,) = torch.autograd.grad(reward.sum(), t)
        left.plot(t.detach(), reward.detach(), label=f"α = {alpha:g}" + " (SimPO)" * (alpha == 0))
        right.plot(t.detach(), slope)
    left.set(ylim=(-7.5, 0.3), xlabel="t, the mean log-probability per token", ylabel="reward r(t)")
    left.legend(loc="lower right", handlelength=3)
    right.set(
        yscale="log", xlabel="t, the mean log-probability per token", ylabel="slope of the reward, exp(−αt)"
    )
    right.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    save(figure, "alphapo")


def packed(folder: Path) -> None:
    import torch
    from matplotlib import pyplot

    from common import collate, packed_attention

    pairs = ("p1 p2 p3", "c1 c2 c3", "r1 r2 r3 r4"), ("q1 q2", "c1 c2 c3", "r1 r2 r3")
    words = sorted({word for pair in pairs for text in pair for word in text.split()})
    examples = [tuple([words.index(word) for word in text.split()] for text in pair) for pair in pairs]
    batch = collate(examples, torch.device("cpu"), global_pairs=2)  # its fields for the packed row: pack's
    tokens = [words[i] for i in batch.packed_inputs["input_ids"][0]]
    predicts = defaultdict(list)  # for places in the row: the tokens that they predict
    for place, label in zip(batch.packed_index.tolist(), batch.labels[*batch.padded_index], strict=True):
        predicts[place].append(words[label])
    colors = []
    for start, *ends in batch.spans:
        for color, begin, end in zip(KINDS.values(), [start, *ends], ends, strict=False):
            colors += [color] * (end - begin)
    # Queries and keys are 0, so the result for a token is the mean of all values that it attends to.
    zeros, values = torch.zeros(1, 1, len(tokens), len(tokens)), torch.eye(len(tokens))[None, None]
    module = SimpleNamespace(is_causal=True)
    means, _ = packed_attention(module, zeros, zeros, values, None, spans=batch.spans)  # (1, T, 1, T)

    figure, axes = pyplot.subplots(figsize=(10, 6.6), layout="constrained")
    figure.suptitle(
        "Two pairs in one row of tokens: each completion attends to its prompt and to itself only"
    )

    def cell(x: int, y: int, text, color: str = "white", **options) -> None:
        axes.add_patch(pyplot.Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white"))
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", **options)

    for y, name in enumerate(("token", "position", "predicts")):
        axes.text(-0.2, y + 0.5, name, ha="right", va="center")
    axes.text(0, 3.7, "The token at the left attends to the coloured tokens:")
    for x, (token, color) in enumerate(zip(tokens, colors, strict=True)):
        cell(x, 0, token, color, weight="bold")
        cell(x, 1, batch.packed_inputs["position_ids"][0, x].item())
        cell(x, 2, ", ".join(predicts[x]))
        cell(-1, 4 + x, token, color, weight="bold")
        for row in range(len(tokens)):
            cell(x, 4 + row, "", color if means[0, row, 0, x] > 0 else "#eeeeee")
    patches = [pyplot.Rectangle((0, 0), 1, 1, facecolor=color) for color in KINDS.values()]
    axes.legend(patches, KINDS, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0))
    axes.set(xlim=(-2, len(tokens)), ylim=(4 + len(tokens), 0))
    axes.axis("off")
    save(figure, "packed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    figures = {f.__name__: f for f in (curves, displacement, losses, alphapo, packed)}
    parser.add_argument("figure", choices=[*figures, "all"])
    name = parser.parse_args().figure
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        parser.error(f"{error}: pip install matplotlib")
    matplotlib.use("Agg")
    cycle = matplotlib.cycler(color=COLORS, linestyle=DASHES)
    matplotlib.rcParams.update(STYLE | {"axes.prop_cycle": cycle})
    sys.path.insert(0, str(ROOT))
    (HERE / "figures").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for draw_figure in figures.values() if name == "all" else [figures[name]]:
            draw_figure(Path(folder))
