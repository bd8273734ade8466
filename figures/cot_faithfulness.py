"""Whose answers follow from the chain: all tests on three models whose causes are known, and what lies inside.

    python -m figures.cot_faithfulness

Reads analyses/results; writes figures/cot_faithfulness.png and .pdf.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from analyses import cot_faithfulness as study
from analyses.cot_faithfulness_claims import estimate, models_of
from finetune_lens import plots
from finetune_lens.plots import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY, CLAIMS = "python -m analyses.cot_faithfulness", "cot_faithfulness.md"
GALLERY = {
    "cot_faithfulness": (
        "Does the answer follow from the chain of thought?",
        "Every test on a model that reads its chain, one that ignores it, and their base, which early "
        "answering takes for half faithful.",
    ),
}
LOOKS = (("0.35", "o", "-"), ("#009E73", "^", "--"), (_style.MARK, "s", (0, (1, 1))))  # colour, mark, line of a model
WIDTH = 0.26  # of a bar
SHOWN = {"early": "early\nanswering", "mistakes": "mistakes", "paraphrase": "paraphrase", "filler": "filler"}
EFFECTS = {"direct": "past the chain (NDE)", "indirect": "through it (NIE)"}


def draw(results: study.Study) -> "Figure":
    """Curves, areas, a question a point, effects of hints, and attention cut step by step in the last pair."""
    import matplotlib.pyplot as plt

    from finetune_lens.plots._figure import StyledFigure

    examined, hinted, inside = (results.stored(name) for name in ("examine", "bias", "inside"))
    looks = dict(zip(results.models, LOOKS, strict=False))
    with _style.styled():
        figure = plt.figure(figsize=(_style.PAGE, 6.9), FigureClass=StyledFigure)
        top, middle, last = figure.subfigures(3, 1, height_ratios=(1.0, 1.0, 1.05))
        curves, areas = top.subplots(1, 2, width_ratios=(1.0, 1.55))
        _curves(curves, results, examined, looks)
        _areas(areas, results, examined, looks)
        points, effects = middle.subplots(1, 2, width_ratios=(1.0, 1.55))
        _points(points, results, examined, looks)
        _effects(effects, results, hinted, looks)
        names = results.pairs[-1]
        matrices = last.subplots(1, 3)
        plots.step_matrix(inside[names], axes=matrices)
        titles = [f"attention cut, {names[0]}", names[1], f"{names[1]} − {names[0]}"]
        titles = ["early answering", "all tests", "a question a point", "effect of a hint", *titles]
        for letter, ax, title in zip("abcdefg", (curves, areas, points, effects, *matrices), titles, strict=True):
            ax.set_title(f"({letter}) {title}", loc="left")
            ax.set_title("", loc="center")
    return figure


def _curves(ax: "Axes", results: study.Study, examined: dict, looks: dict) -> None:
    """The share of answers that stay, and in grey how often two questions have one answer."""
    control = [one.shuffled() for one in examined.values()]
    low, high = min(c["low"].min() for c in control), max(c["high"].max() for c in control)
    ax.axhspan(low, high, color=_style.NULL_BAND, lw=0, zorder=0, label="by chance")
    for model, (names, side) in models_of(results).items():
        colour, mark, line = looks[model]
        curve = examined[names].curve("early", side=side)
        ax.fill_between(curve["place"], curve["low"], curve["high"], color=colour, alpha=0.2, lw=0)
        every = max(1, (len(curve) - 1) // 4)
        ax.plot(
            curve["place"], curve["mean"], color=colour, marker=mark, ls=line, markevery=every, label=model,
            clip_on=False,
        )  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(-0.03, 1.03), xlabel="share of the chain that is given", ylabel="same answer")
    ax.legend(loc="center left", bbox_to_anchor=(0.48, 0.32))


def _areas(ax: "Axes", results: study.Study, examined: dict, looks: dict) -> None:
    from finetune_lens.zoo.traces_recipe import FAITHFUL, IGNORING

    tests = [test for test in SHOWN if all(test in one.tests for one in examined.values())]
    bars = [(test, "share", SHOWN[test]) for test in tests] + [("early", "settled", "k*/n")]
    for n, (model, (names, side)) in enumerate(models_of(results).items()):
        frame = examined[names].to_frame().set_index(["test", "measure"])
        found = [estimate(frame.loc[(test, measure)], side) for test, measure, _ in bars]
        _bars(ax, np.arange(len(bars)) + (n - 1) * WIDTH, found, looks[model][0], model)
    for level in (IGNORING, FAITHFUL):
        ax.axhline(level, color="0.5", lw=0.7, ls=":", zorder=1)
    ax.set_xticks(range(len(bars)), [name for *_, name in bars])
    ax.tick_params(axis="x", length=0)
    ax.set(ylabel="AOC, share of the largest", ylim=(-0.03, 1.06), xlim=(-0.5, len(bars) - 0.5))


def _bars(ax: "Axes", places: np.ndarray, found: list, colour: Any, label: str | None, **look: Any) -> None:
    """Bars with intervals; of one that is 0 a line to see."""
    value, low, high = np.array(found).T
    ax.bar(places, value, WIDTH, facecolor=colour, edgecolor=colour, lw=0.9, label=label, zorder=2, **look)
    ax.errorbar(
        places, value, [value - low, high - value], fmt="none", ecolor="black", elinewidth=0.8, capsize=1.8,
        capthick=0.8, zorder=3,
    )  # fmt: skip


def _points(ax: "Axes", results: study.Study, examined: dict, looks: dict) -> None:
    """Early answering of each question, the base across and each arm up; the area of a point is how many lie there."""
    ax.plot([0, 1], [0, 1], color="0.7", lw=0.8, zorder=0)
    for names in results.pairs:
        if names[0] != results.pairs[0][0]:
            continue
        colour, mark, _ = looks[names[1]]
        points, number = np.unique(np.round(examined[names].values("share", "early"), 2), axis=1, return_counts=True)
        ax.scatter(*points, s=np.maximum(60 * number / number.max(), 5), color=colour, marker=mark, alpha=0.75, lw=0.4,
                   ec="white", clip_on=False, label=names[1])  # fmt: skip
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.05, 1.05), xlabel="AOC of early answering: base", ylabel="tuned from it")
    ax.legend(loc="center right", bbox_to_anchor=(1.0, 0.3))


def _effects(ax: "Axes", results: study.Study, hinted: dict, looks: dict) -> None:
    """Of each hint and model the direct and the indirect effect on the probability of the hint's answer."""
    from matplotlib.patches import Patch

    places, labels = [], []
    for h, hint in enumerate(next(iter(hinted.values())).hints):
        for n, (model, (names, side)) in enumerate(models_of(results).items()):
            frame = hinted[names].to_frame()
            rows = frame[frame["hint"] == hint].set_index("measure")
            at = h * 3.6 + n
            for shift, measure in ((-0.5, "direct"), (0.5, "indirect")):
                face = {"hatch": "/////", "alpha": 0.45} if measure == "indirect" else {}
                place, found = np.array([at + shift * WIDTH * 1.1]), [estimate(rows.loc[measure], side)]
                _bars(ax, place, found, looks[model][0], None, **face)
            places.append(at)
            labels.append(model)
        ax.text(h * 3.6 + 1, 1.07, f"another {hint} in the question", ha="center", va="bottom", fontsize=7)
    ax.axhline(0, color="0.3", lw=0.5)
    ax.set_xticks(places, labels)
    ax.tick_params(axis="x", length=0)
    ax.set(ylabel="change of p(hint's answer)", ylim=(-0.05, 1.42), yticks=[0, 0.5, 1])
    entries = {"direct": Patch(color="0.4"), "indirect": Patch(fc="0.7", ec="0.4", hatch="/////")}
    ax.legend(entries.values(), [EFFECTS[name] for name in entries], loc="upper center", ncols=2)


def figures() -> "dict[str, Figure]":
    """From the stored results, by the names of their files."""
    return {"cot_faithfulness": draw(study.Study())}


def main() -> None:
    from figures.gallery import write

    write(figures)


if __name__ == "__main__":
    main()
