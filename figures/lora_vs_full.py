"""The figure of the study: intruder dimensions of LoRA and full fine-tuning, matched on accuracy.

    python -m figures.lora_vs_full

Reads analyses/results; writes figures/lora_vs_full.png and .pdf.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analyses import lora_vs_full as study
from finetune_lens.plots import _style

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY, CLAIMS = "python -m analyses.lora_vs_full", "lora_vs_full.md"
GALLERY = {
    "lora_vs_full": (
        "LoRA against full fine-tuning",
        "Intruder dimensions of 80 runs over ranks and rates, at equal accuracy, against their nulls, and "
        "what the runs forget.",
    ),
}
FULL = ("#0072B2", "o")
LORA = (("#F2B27E", "^"), ("#E5812F", "s"), ("#B4510C", "D"), ("#6B2D04", "p"))  # light to dark as the rank rises


def draw(data: "xr.Dataset") -> "Figure":
    """Counts at matched accuracy (a), against the rate (b) and the size of the update (c), and forgetting (d)."""
    import matplotlib.pyplot as plt

    from finetune_lens.plots._figure import StyledFigure

    frame = study.runs_of(data)
    ranks = sorted(frame["rank"].unique())
    looks = {rank: LORA[i - 1] if rank else FULL for i, rank in enumerate(ranks)}
    with _style.styled():
        figure, axes = plt.subplots(2, 2, figsize=(_style.PAGE, 5.4), FigureClass=StyledFigure)
        _matched(axes[0, 0], frame, looks)
        _rates(axes[0, 1], frame, looks)
        _sizes(axes[1, 0], frame, looks)
        _forgetting(axes[1, 1], frame, looks)
        titles = (
            "target reached in fewest steps | at lowest rate",
            "learning rate",
            "size of the update",
            "forgetting of the base tasks",
        )
        for letter, title, ax in zip("abcd", titles, axes.flat, strict=True):
            ax.set_title(rf"$\bf{{{letter}}}$  {title}", loc="left")
        _legend(figure, looks)
    return figure


def _matched(ax: "Axes", frame: "pd.DataFrame", looks: dict) -> None:
    """The chosen runs of each method beside what their nulls give."""
    places = dict(zip(study.CHOICES, (-0.2, 0.2), strict=True))
    for i, (rank, (colour, marker)) in enumerate(looks.items()):
        for choice, shift in places.items():
            runs = frame[(frame["rank"] == rank) & frame[choice]]
            if runs.empty:
                continue
            low, high = runs["null_low"].mean(), runs["null_high"].mean()
            ax.bar(i + shift, high - low, 0.34, bottom=low, color=_style.NULL_BAND, lw=0)
            ax.plot(
                [i + shift - 0.17, i + shift + 0.17], [runs["null_mean"].mean()] * 2, color=_style.NULL_LINE, lw=0.8
            )
            jitter = np.linspace(-0.08, 0.08, len(runs)) if len(runs) > 1 else [0.0]
            ax.plot(i + shift + np.asarray(jitter), runs["count"], ls="", marker=marker, color=colour, mew=0)
            ax.annotate(
                "\n".join(f"{rate:g}" for rate in sorted(runs["learning_rate"].unique())),
                (i + shift, 0), (0, -3), xycoords=ax.get_xaxis_transform(), textcoords="offset points", rotation=90,
                ha="center", va="top", fontsize=6, linespacing=1.1,
            )  # fmt: skip
    ax.set_xticks(range(len(looks)), [f"r = {rank}" if rank else "full" for rank in looks])
    ax.tick_params(axis="x", length=0, pad=28)
    ax.set_xlim(-0.5, len(looks) - 0.5)
    shown = frame[frame[list(study.CHOICES)].any(axis=1)]
    _counts(ax, "y", shown[["count", "null_high"]].max(axis=None))


def _rates(ax: "Axes", frame: "pd.DataFrame", looks: dict) -> None:
    for rank, (colour, _) in looks.items():
        means = frame[frame["rank"] == rank].groupby("learning_rate")["count"].mean()
        ax.plot(means.index, means, color=colour, lw=0.8)
    _runs(ax, frame, "learning_rate", "count", looks)
    ax.set(xlabel="learning rate", xscale="log")
    _style.plain_logarithmic(ax.xaxis)
    _counts(ax, "y", frame["count"].max())


def _sizes(ax: "Axes", frame: "pd.DataFrame", looks: dict) -> None:
    _runs(ax, frame, "relative_norm", "count", looks)
    ax.set(xlabel="‖Δ‖/‖W0‖", xscale="log")
    _style.plain_logarithmic(ax.xaxis)
    _counts(ax, "y", frame["count"].max())


def _forgetting(ax: "Axes", frame: "pd.DataFrame", looks: dict) -> None:
    _runs(ax, frame, "count", "loss_rise", looks)
    matched = frame[frame["reached"]]
    lines = ["Spearman's ρ, matched runs (95 %)"]
    for label, runs in (("all", matched), ("LoRA", matched[matched["rank"] > 0])):
        found = study.spearman(runs, "count", "loss_rise")
        words = f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]" if np.isfinite(found.value) else "undefined"
        lines.append(f"{label}: {words}")
    ax.text(0.03, 0.98, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=7)
    ax.set_ylabel("rise of loss (nats a token)")
    if frame["loss_rise"].min() >= 0:
        ax.set_ylim(bottom=0)
    _counts(ax, "x", frame["count"].max())


def _counts(ax: "Axes", name: str, most: float) -> None:
    """Linear to 2, logarithmic above: runs without intruders and runs with a hundred on one axis."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ax.set(**{f"{name}label": "intruder dimensions", f"{name}lim": (-0.3, 1.3 * np.nanmax([most, 2]))})
    getattr(ax, f"set_{name}scale")("symlog", linthresh=2, linscale=0.5)
    axis = getattr(ax, f"{name}axis")
    axis.set_major_locator(FixedLocator([0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _runs(ax: "Axes", frame: "pd.DataFrame", x: str, y: str, looks: dict) -> None:
    """A marker a run, hollow where it did not reach the target."""
    for rank, (colour, marker) in looks.items():
        for reached, runs in frame[frame["rank"] == rank].groupby("reached"):
            face = colour if reached else "white"
            ax.plot(runs[x], runs[y], ls="", marker=marker, mec=colour, mfc=face, mew=0.6, clip_on=False, zorder=3)


def _legend(figure: "Figure", looks: dict) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=colour, marker=marker, mew=0, label=f"LoRA, r = {rank}" if rank else "full fine-tuning")
        for rank, (colour, marker) in looks.items()
    ]
    handles.append(Line2D([], [], ls="", marker="o", mfc="white", mec="0.3", mew=0.6, label="target not reached"))
    handles.append(Patch(color=_style.NULL_BAND, label="null: Δ's own spectrum (95 %)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def figures(results: Path = study.RESULTS) -> "dict[str, Figure]":
    """From the results in a folder, by the names of their files."""
    return {"lora_vs_full": draw(study.load(results))}


def main() -> None:
    from figures.gallery import write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=study.RESULTS)
    results = parser.parse_args().results
    write(lambda: figures(results))


if __name__ == "__main__":
    main()
