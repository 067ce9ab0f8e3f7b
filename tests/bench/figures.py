"""The README's figures, each by one command; they go to the folder figures beside this file.

    python tests/bench/figures.py curves          training curves of DPO on the built-in example
    python tests/bench/figures.py displacement    the same run beside one with too large a learning rate
    python tests/bench/figures.py losses          losses of dpo.py against the reward margin
    python tests/bench/figures.py alphapo         AlphaPO's reward and its slope for some values of α
    python tests/bench/figures.py packed          what the fast forward pass makes of two pairs
    python tests/bench/figures.py all             all of them

The first two train, about a minute and a half for each learning rate; the others take seconds.
"""

import argparse
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

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

    shape = {"figsize": (10, height), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(1, len(titles), **shape)
    figure.get_layout_engine().set(wspace=0.06)
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title)
        panel.grid()
    return figure, axes[0]


def save(figure, name: str) -> None:
    from PIL import Image

    path = HERE / "figures" / f"{name}.png"
    figure.savefig(path, dpi=120)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # half the size
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

    draw([train(folder, "3e-5")], HERE / "figures" / "curves.png")
    figure = pyplot.gcf()  # the same again, with a title
    figure.suptitle("DPO learns the built-in example (lines: training pairs, dots: held-out pairs).")
    save(figure, "curves")


def displacement(folder: Path) -> None:
    from plot import read

    titles = "The loss falls in both runs.", "One loses the chosen answers.", "The other learns the task."
    figure, (loss, chosen, match) = panels(*titles, height=3.8)
    figure.suptitle("Likelihood displacement: the run with the lower loss gets every answer wrong.")
    for learning_rate, color, marker in zip(("3e-5", "1e-3"), COLORS, "os", strict=False):
        run = train(folder, learning_rate)
        loss.plot(*read(run, "loss"), "-", color=color, alpha=0.5, linewidth=1.5)
        loss.plot(*read(run, "eval_loss"), marker, color=color, label=run.name)
        chosen.plot(*read(run, "eval_logps/chosen"), f"{marker}-", color=color)
        match.plot(*read(run, "eval_exact_match"), f"{marker}-", color=color)
    loss.set(xlabel="step", ylabel="loss (lines: training, marks: held out)")
    loss.legend(loc="upper right", bbox_to_anchor=(1, 0.8))
    chosen.set(xlabel="step", ylabel="log π(chosen), held out")
    chosen.set_yscale("symlog", linthresh=1)
    chosen.set_yticks([0, -1, -10, -100], ["0", "−1", "−10", "−100"])
    match.set(xlabel="step", ylabel="share of exact answers, held out")
    save(figure, "displacement")


def losses(folder: Path) -> None:
    from dpo import dpo_loss

    # A label begins with the loss type.
    falling = "sigmoid (DPO)", "hinge", "robust with ε = 0.1", "apo_zero *", "discopop"
    turning = ["sigmoid (DPO), to compare", "sigmoid with ε = 0.1 (cDPO)", "exo_pair with ε = 0.1"]
    turning += ["nca_pair *", "ipo (z of means over tokens)"]
    titles = "These losses do not punish a large margin.", "These do: each has a best margin."
    figure, axes = panels(*titles, height=5)
    z = torch.linspace(-4, 6, 1001, dtype=torch.float64)
    logps = z / 2, -z / 2, 0 * z, 0 * z  # at β = 1, these are rewards of z/2 and -z/2
    for panel, labels in zip(axes, (falling, turning), strict=True):
        for label in labels:
            options = {"label_smoothing": 0.1} if "ε" in label else {}
            panel.plot(z, dpo_loss(*logps, beta=1.0, loss_type=label.split()[0], **options), label=label)
        panel.set(xlim=(-4, 6), ylim=(-0.8, 4.2), xlabel="z, the margin between the rewards, at β = 1")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=10)
    axes[0].set_ylabel("loss of a pair")
    note = "ε: label_smoothing      *: depends on both rewards, drawn for z/2 (chosen) and −z/2 (rejected)"
    figure.supxlabel(note, fontsize=10)
    save(figure, "losses")


def alphapo(folder: Path) -> None:
    from alphapo import PowerDifference

    titles = "α bends AlphaPO's reward of an answer.", "The larger α, the harder it pushes unlikely answers."
    figure, (left, right) = panels(*titles, height=4)
    for alpha in (1.0, 0.25, 0.0, -0.25, -1.0):
        t = torch.linspace(-4, 0, 401, dtype=torch.float64, requires_grad=True)
        reward = PowerDifference.apply(t, torch.zeros_like(t), alpha, 1.0)  # r(t) - r(0), and r(0) = 0
        (slope,) = torch.autograd.grad(reward.sum(), t)
        label = f"α = {alpha:g}".replace("-", "−") + (" (SimPO)" if alpha == 0 else "")
        left.plot(t.detach(), reward.detach(), label=label)
        right.plot(t.detach(), slope)
    left.set(ylim=(-7.5, 0.3), xlabel="t, the mean log-probability per token", ylabel="reward r(t)")
    left.legend(loc="lower right", handlelength=3)
    right.set(xlabel="t, the mean log-probability per token", ylabel="slope of the reward, exp(−αt)")
    right.set_yscale("log")
    right.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    save(figure, "alphapo")


def packed(folder: Path) -> None:
    from matplotlib.patches import Rectangle

    from common import collate, packed_attention

    pairs = ("p1 p2 p3", "c1 c2 c3", "r1 r2 r3 r4"), ("q1 q2", "c1 c2 c3", "r1 r2 r3")
    words = sorted({word for pair in pairs for text in pair for word in text.split()})
    examples = [tuple([words.index(word) for word in text.split()] for text in pair) for pair in pairs]
    batch = collate(examples, torch.device("cpu"), global_pairs=2)  # its fields for the packed row: pack's
    tokens = [words[i] for i in batch.packed_inputs["input_ids"][0]]
    predictions = list(zip(batch.packed_index, batch.labels[*batch.padded_index], strict=True))
    colors = []
    for parts in examples:
        lengths = len(parts[0]), *(len(completion) - 1 for completion in parts[1:])
        for color, length in zip(KINDS.values(), lengths, strict=True):
            colors += [color] * length
    # Queries and keys are 0, so the result for a token is the mean of all values that it attends to.
    zeros, values = torch.zeros(1, 1, len(tokens), len(tokens)), torch.eye(len(tokens))[None, None]
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(_attn_implementation="packed"))
    options = {"lengths": torch.tensor(batch.packed_lengths), "keys": batch.packed_inputs["keys"]}
    means, _ = packed_attention(module, zeros, zeros, values, None, **options)  # (1, T, 1, T)

    title = "Two pairs are one row of tokens: each completion attends to its own prompt and to itself only."
    figure, (axes,) = panels(title, height=6.6)

    def cell(x: int, y: int, text, color: str = "white", **options) -> None:
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white"))
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", **options)

    for y, name in enumerate(("token", "position", "predicts")):
        axes.text(-0.2, y + 0.5, name, ha="right", va="center")
    axes.text(0, 3.7, "The token at the left attends to the coloured tokens:")
    for x, (token, color) in enumerate(zip(tokens, colors, strict=True)):
        cell(x, 0, token, color, weight="bold")
        cell(x, 1, batch.packed_inputs["position_ids"][0, x].item())
        cell(x, 2, ", ".join(words[label] for place, label in predictions if place == x))
        cell(-1, 4 + x, token, color, weight="bold")
        for row in range(len(tokens)):
            cell(x, 4 + row, "", color if means[0, row, 0, x] > 0 else "#eeeeee")
    patches = [Rectangle((0, 0), 1, 1, facecolor=color) for color in KINDS.values()]
    axes.legend(patches, KINDS, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0))
    axes.set(xlim=(-2, len(tokens)), ylim=(4 + len(tokens), 0))
    axes.axis("off")
    save(figure, "packed")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
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
