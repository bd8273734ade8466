"""Wrapper or loss: tuning, probes, pruning and revival of the family `wrappers`.

    python -m figures.wrappers

Reads analyses/results; writes figures/wrappers.png and .pdf, and figures/wrappers_cka.png and .pdf.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from analyses import wrappers as study
from finetune_lens import plots
from finetune_lens.plots import _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY, CLAIMS = "python -m analyses.wrappers", "wrappers.md"
GALLERY = {
    "wrappers": (
        "Wrapper or loss?",
        "Tuning with a cue hides what the base could do, tuning without one loses it; probes, pruning and "
        "revival beside models that never could.",
    ),
    "wrappers_cka": (
        "Which layers moved",
        "CKA of base and tuned model at every two depths, tuned without the cue and with it.",
    ),
}
ARMS = {  # colour, mark
    "tuned-0": ("#009E73", "^"), "tuned-50": ("#56B4E9", "X"), "tuned-80": ("#E69F00", "P"),
    "tuned-100": (_style.MARK, "s"), "absent-100": ("0.35", "v"), "absent-again": ("0.35", "<"),
    "scratch-100": ("0.6", "D"), "scratch": ("0.75", "o"),
}  # fmt: skip
FILES = {
    "a": (_style.OBSERVED, "-"),
    "a, cue": (_style.OBSERVED, "--"),
    "b": (_style.MARK, "-"),
    "b, cue": (_style.MARK, "--"),
}
FILE_WORDS = {"a": "counts a", "a, cue": "counts a, on the cue", "b": "counts b", "b, cue": "counts b, on the cue"}


def draw(results: study.Study) -> "Figure":
    """Two panels of tuning, and one each of probes, pruning, revival curves and steps to the threshold."""
    import matplotlib.pyplot as plt

    from finetune_lens.plots._figure import StyledFigure

    with _style.styled():
        figure, axes = plt.subplots(3, 2, figsize=(_style.PAGE, 6.9), FigureClass=StyledFigure, squeeze=False)
        for ax, arm in zip(axes[0], ("tuned-0", "tuned-100"), strict=True):
            _tuning(ax, results.stored(f"tune-{arm}"))
            ax.set_title(f"tuning to count b, {study.WORDS[arm]} of texts")
        axes[0, 1].legend(loc="center right", bbox_to_anchor=(1.0, 0.4))
        _probes(axes[1, 0], {arm: results.stored(f"probe-{arm}") for arm in study.PROBED_ARMS})
        _pruning(axes[1, 1], {arm: results.stored(f"prune-{arm}") for arm in study.PRUNED})
        revived = results.stored("revive-full")
        _revival(axes[2, 0], revived)
        _steps(axes[2, 1], revived)
        for letter, ax in zip("abcdef", axes.ravel(), strict=True):
            ax.set_title(f"({letter}) {ax.get_title()}", loc="left")
            ax.set_title("", loc="center")
    return figure


def _name(start: str) -> str:
    return study.WORDS.get(study.SHOWN if start == "tuned" else start, start)


def _look(start: str) -> dict[str, Any]:
    colour, marker = ARMS.get(study.SHOWN if start == "tuned" else start, ("#CC79A7", "h"))
    return {"color": colour, "marker": marker, "ms": 3}


def _tuning(ax: "Axes", result: Any) -> None:
    for file, (colour, style) in FILES.items():
        frame = result.curves(file)
        ax.fill_between(frame["step"], frame["low"], frame["high"], color=colour, alpha=0.2, lw=0)
        ax.plot(frame["step"], frame["accuracy"], style, color=colour, label=FILE_WORDS[file])
    _log(ax, int(result.steps[-1]), "steps of tuning")
    ax.set(ylabel="accuracy", ylim=(-0.03, 1.03))


def _probes(ax: "Axes", found: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = found["tuned-100"].majority()[1:]
    ax.axhspan(low, high, color=_style.NULL_BAND, lw=0)
    for arm, result in found.items():
        frame = result.to_frame().query("side == 'tuned'")
        look = _look(arm)
        ax.fill_between(
            frame["depth"], frame["centred_low"], frame["centred_high"], color=look["color"], alpha=0.15, lw=0
        )
        ax.plot(frame["depth"], frame["centred"], label=f"{study.WORDS[arm]}: base's probe", **look)
        label = "each model's own probe" if arm == "absent-100" else None
        ax.plot(frame["depth"], frame["score"], ":", color=look["color"], lw=1.2, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(
        title="probes of the count of a",
        xlabel="after so many blocks",
        ylabel="R² on held-out texts",
        ylim=(-0.5, 1.05),
    )
    ax.legend(loc="lower left")


def _pruning(ax: "Axes", found: dict[str, Any]) -> None:
    drawn = found["tuned-100"].band()
    ax.fill_between(drawn["count"], drawn["low"], drawn["high"], color=_style.NULL_BAND, lw=0)
    for arm, result in found.items():
        frame = result.to_frame().query("file == 'task' and side == 'tuned' and score == 'gradient'")
        ax.fill_between(frame["count"], frame["low"], frame["high"], color=_look(arm)["color"], alpha=0.15, lw=0)
        ax.plot(frame["count"], frame["mean"], label=study.WORDS[arm], **_look(arm))
    ax.axhline(found["tuned-100"].unpruned().set_index("file").loc["task", "commonest"], color="0.3", lw=0.8, ls=":")
    _log(ax, max(result.counts[-1] for result in found.values()), "neurons removed")
    ax.set(title="pruning, then counting a", ylabel="accuracy", ylim=(-0.02, 0.62))
    ax.legend()


def _revival(ax: "Axes", result: Any) -> None:
    frame = result.curves()
    for start in result.starts:
        part = frame[frame["start"] == start]
        ax.fill_between(part["step"], part["low"], part["high"], color=_look(start)["color"], alpha=0.15, lw=0)
        ax.plot(part["step"], part["accuracy"], **_look(start))
    ax.axhline(result.threshold, color="0.3", lw=0.8, ls=":")
    _log(ax, int(result.steps[-1]), "steps of training to count a")
    ax.set(title="revival", ylabel="accuracy", ylim=(-0.03, 1.03))


def _steps(ax: "Axes", result: Any) -> None:
    from matplotlib.ticker import NullLocator

    last = float(result.steps[-1])
    frame = result.crossings()
    for row, one in enumerate(frame.to_dict("records")):
        at, low, high = (min(one[name], 1.35 * last) for name in ("steps", "low", "high"))
        look = _look(one["start"])
        ax.plot([low, high], [row, row], color=look["color"], lw=1.2)
        ax.plot([at], [row], **look, mfc="white" if np.isinf(one["steps"]) else look["color"], ls="")
    ax.axvline(last, color="0.3", lw=0.8, ls=":")
    ax.set_yticks(range(len(frame)), [_name(start) for start in frame["start"]])
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xticks([30, 50, 100, 200, 300], ["30", "50", "100", "200", "300"])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(title="steps until counting a is back", xlabel="steps (right of the line: not reached)")


def _log(ax: "Axes", last: int, label: str) -> None:
    from matplotlib.ticker import NullLocator

    ax.set_xscale("symlog", linthresh=1, linscale=0.6)
    powers = [10**n for n in range(9) if 10**n <= last]
    ax.set_xticks([0, *powers], ["0", *map(str, powers)])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlim=(-0.15, last * 1.15), xlabel=label)


def draw_cka(results: study.Study) -> "Figure":
    """Base against the arms, every two depths."""
    import matplotlib.pyplot as plt

    from finetune_lens.plots._figure import StyledFigure

    with _style.styled():
        figure, axes = plt.subplots(1, 2, figsize=(_style.PAGE, 2.9), FigureClass=StyledFigure)
        for ax, arm in zip(axes, study.COMPARED, strict=True):
            plots.cka_matrix(results.stored(f"compare-{arm}"), ax=ax)
            ax.set_title(f"{study.WORDS[arm]} of texts")
    return figure


def figures() -> "dict[str, Figure]":
    """From the stored results, by the names of their files."""
    results = study.Study()
    return {"wrappers": draw(results), "wrappers_cka": draw_cka(results)}


def main() -> None:
    from figures.gallery import write

    write(figures)


if __name__ == "__main__":
    main()
