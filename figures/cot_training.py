"""Training with a written bridge and without: accuracy, where the bridge emerges, and which states carry the answer.

    python -m figures.cot_training

Reads analyses/results; writes figures/cot_training.png and .pdf.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from analyses import cot_training as study
from analyses.cot_training_claims import accuracy, last_position
from finetune_lens import stats
from finetune_lens.plots import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY, CLAIMS = "python -m analyses.cot_training", "cot_training.md"
GALLERY = {
    "cot_training": (
        "What does training with a written bridge build?",
        "Two-hop facts told with the bridge entity and without: accuracy along training, "
        "where the bridge emerges, and which states carry the answer.",
    ),
}
LINES = {  # measure: words, colour, line
    "fact ood": ("atomic facts, OOD", "0.45", ":"), "t train": ("two-hop, trained", "#009E73", "--"),
    "t held": ("two-hop, ID", _style.OBSERVED, "-"), "t ood": ("two-hop, OOD", _style.MARK, "-"),
}  # fmt: skip
ARM_LOOK = {"with": (_style.OBSERVED, "o"), "without": (_style.MARK, "s")}
ARM_WORDS = {"with": "with the bridge", "without": "without"}
SHARES = (  # of what the text is given: words, map, case
    ("another b:\nits t", "with t b", "other answer"),
    ("another h, same b:\nthe same t", "with t h", "answer kept"),
    ("another r1, same b:\nthe same t", "with t r1", "answer kept"),
)
SPLIT_LOOK = {
    "train": ("trained", "#009E73", "D"),
    "held": ("ID", _style.OBSERVED, "o"),
    "ood": ("OOD", _style.MARK, "s"),
}


def draw(results: study.Study) -> "Figure":
    """Accuracy along training, the bridge's MRR by depth and position, maps of the tracing: one seed; others thin."""
    import matplotlib.pyplot as plt

    from finetune_lens.plots._figure import StyledFigure

    told, seen, moved = (results.stored(name) for name in ("train", "lens", "trace"))
    seed = int(told["seed"].values[0])
    with _style.styled():
        figure = plt.figure(figsize=(_style.PAGE, 7.3), FigureClass=StyledFigure)
        top, middle, third, last = figure.subfigures(4, 1, height_ratios=(1.0, 1.05, 0.95, 0.95))
        curves = top.subplots(1, 2, sharey=True)
        for ax, arm in zip(curves, study.ARMS, strict=True):
            _training(ax, told, seed, arm)
        curves[1].legend(loc="upper left")
        curves[0].set_ylabel("accuracy")
        ranks = middle.subplots(1, 3, width_ratios=(1.15, 0.9, 1.4))
        for ax, arm in zip(ranks, study.ARMS, strict=False):
            mesh = _emergence(ax, seen.sel(seed=seed, arm=arm, split="held", target="b"))
            ax.set_title(f"b, ID, {ARM_WORDS[arm]}")
        _bar(middle, mesh, ranks[:2], "MRR")
        _depths(ranks[2], seen.sel(seed=seed))
        names = [str(name) for name in moved["map"].values]
        told_with = [name for name in names if name.startswith("with ")]
        maps = third.subplots(1, len(told_with))
        _tracing(maps, moved.sel(seed=seed, split="ood"), told_with)
        third.suptitle(
            "(f) causal tracing with the bridge, OOD items: of b after r2, of t after the written b", fontsize=8
        )
        left, right = last.subfigures(1, 2, width_ratios=(1.25, 1.0))
        told_without = [name for name in names if name not in told_with]
        beside = left.subplots(1, len(told_without))
        mesh = _tracing(beside, moved.sel(seed=seed, split="train"), told_without)
        left.suptitle("(g) causal tracing without, trained items", fontsize=8)
        _bar(left, mesh, beside, "fall of the answer's\nprobability")
        shares = right.subplots()
        _shares(shares, moved.sel(seed=seed))
        for letter, ax in zip("abcdeh", (*curves, *ranks, shares), strict=True):
            ax.set_title(f"({letter}) {ax.get_title()}", loc="left")
            ax.set_title("", loc="center")
    return figure


def _bar(figure: Any, mesh: Any, axes: Any, label: str) -> None:
    figure.colorbar(mesh, ax=axes, label=label, pad=0.02, aspect=15).outline.set_visible(False)


def _training(ax: "Axes", told: Any, seed: int, arm: str) -> None:
    from matplotlib.ticker import NullLocator

    for measure, (words, colour, line) in LINES.items():
        frame = accuracy(told, seed, arm, measure)
        ax.fill_between(frame["step"], frame["low"], frame["high"], color=colour, alpha=0.2, lw=0)
        ax.plot(frame["step"], frame["mean"], line, color=colour, label=words)
        for other in told["seed"].values[1:]:
            again = accuracy(told, int(other), arm, measure)
            ax.plot(again["step"], again["mean"], line, color=colour, lw=0.5, alpha=0.6)
    ax.axhspan(0, float(told["commonest"].max()), color=_style.NULL_BAND, lw=0, zorder=0)
    last = int(told["step"].values[-1])
    ax.set_xscale("symlog", linthresh=50, linscale=0.4)
    ticks = [n for n in (100, 300, 1000, 3000, 10_000, 100_000) if n <= last]
    ax.set_xticks([0, *ticks], ["0", *(f"{n:,}".replace(",", " ") for n in ticks)])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlim=(-5, last * 1.05), ylim=(-0.03, 1.03), xlabel="steps of training", title=ARM_WORDS[arm])


def _emergence(ax: "Axes", one: Any) -> Any:
    positions = [p for p in study.POSITIONS if (one["rank"].sel(position=p) >= 0).any()]
    ranks = one["rank"].sel(position=positions).transpose("depth", "position", "item").values
    values = np.nanmean(study.reciprocal(ranks), axis=-1)
    mesh = _cells(ax, values, positions, vmax=1.0)
    ax.set(xlabel="position", ylabel="blocks passed")
    return mesh


def _cells(ax: "Axes", values: np.ndarray, positions: list[str], *, vmax: float) -> Any:
    """Depth upwards, a number in each cell."""
    rows, columns = values.shape
    mesh = ax.pcolormesh(
        np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, values, vmin=0, vmax=vmax, cmap=_style.SEQUENTIAL,
        edgecolors="white", linewidth=0.3,
    )  # fmt: skip
    for (y, x), value in np.ndenumerate(values):
        text = "1" if value > 0.995 else "0" if value < 0.005 else f"{value:.2f}".removeprefix("0")
        ax.text(x, y, text, ha="center", va="center", fontsize=5.5, color="white" if value > 0.55 * vmax else "black")
    ax.set_xticks(range(columns), positions)
    ax.set_yticks(range(rows))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return mesh


def _depths(ax: "Axes", seen: Any) -> None:
    one = seen.sel(position="r1", target="b")
    null = one["null"].sel(split=["held", "ood"]).max(["arm", "split"])
    depths = np.arange(one.sizes["depth"])
    ax.fill_between(depths, 0, null.sel(end="high").values, color=_style.NULL_BAND, lw=0)
    for arm, (colour, mark) in ARM_LOOK.items():
        for split, line in (("held", "-"), ("ood", "--")):
            values = study.reciprocal(one["rank"].sel(arm=arm, split=split).transpose("depth", "item").values)
            low, high = stats.interval_of_mean(values)
            ax.fill_between(depths, low, high, color=colour, alpha=0.2, lw=0)
            label = f"{arm}, {'ID' if split == 'held' else 'OOD'}"
            ax.plot(depths, np.nanmean(values, axis=1), line, marker=mark, color=colour, label=label)
    ax.set_xticks(depths)
    ax.set(xlabel="blocks passed", ylabel="MRR of b", ylim=(-0.03, 1.03), title="b at r1")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.06), handlelength=3)


def _tracing(axes: np.ndarray, moved: Any, names: list[str]) -> Any:
    """A map a counterfactual; the position at which the answer is read is hatched."""
    from matplotlib.patches import Rectangle

    for ax, name in zip(axes, names, strict=True):
        one = moved["lost"].sel(map=name, end="mean")
        positions = [p for p in study.POSITIONS if not np.isnan(one.sel(position=p)).all()]
        mesh = _cells(ax, one.sel(position=positions).transpose("layer", "position").values, positions, vmax=1.0)
        at = positions.index(last_position(name))
        ax.add_patch(Rectangle((at - 0.5, -0.5), 1, moved.sizes["layer"], fc="none", ec="0.6", hatch="////", lw=0))
        _, asked, what = name.split()
        ax.set_title(f"another {what}: {asked}")
    axes[0].set_ylabel("blocks passed")
    return mesh


def _shares(ax: "Axes", moved: Any) -> None:
    for offset, (split, (words, colour, mark)) in zip((-0.2, 0, 0.2), SPLIT_LOOK.items(), strict=True):
        for place, (_, name, case) in enumerate(SHARES):
            value, low, high = moved["said"].sel(map=name, case=case, split=split).values
            ax.plot([low, high], [place + offset] * 2, color=colour, lw=1.2)
            ax.plot([value], [place + offset], mark, color=colour, label=None if place else words, ls="")
    ax.set_yticks(range(len(SHARES)), [words for words, *_ in SHARES])
    ax.invert_yaxis()
    ax.set(xlim=(-0.03, 1.03), xlabel="share of items", title="what t follows, with the bridge")
    ax.legend(loc="lower left")


def figures() -> "dict[str, Figure]":
    """From the stored results, by the names of their files."""
    return {"cot_training": draw(study.Study())}


def main() -> None:
    from figures.gallery import write

    write(figures)


if __name__ == "__main__":
    main()
