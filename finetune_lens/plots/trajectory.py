"""How did the intruder directions come about in training?"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import (
    COMPONENTS,
    NULL_BAND,
    NULL_LINE,
    OBSERVED,
    PAGE,
    grouped,
    legend,
    new_axes,
    nothing,
    ordered,
    plain_logarithmic,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.trajectory import Trajectory


def trajectory(
    result: "Trajectory", *, side: str | None = None, axes: "np.ndarray | None" = None
) -> "np.ndarray[Axes]":
    """Count, rank, σ (logarithmic) and max_i |⟨u_j, x_i⟩| of the intruder directions over the steps of training.

    Four panels. A line is one direction, followed from checkpoint to checkpoint (`Trajectory.tracks`), coloured by
    component; filled markers where it is an intruder, hollow where it is not, or not yet. The count stands beside what
    random updates with the same singular values give (mean and 95 % interval). Dashed: the run's ε.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    side = result.sides[0] if side is None else side
    counts = result.counts()
    counts = counts[counts.side == side]
    tracks = result.tracks(side)
    first = result.at(result.steps[0])
    with styled():
        own = axes is None
        if own:
            axes = new_axes(width=PAGE, height=2.3, columns=4)
        count, rank, sigma, cosine = axes
        entries = {}
        if counts.null_mean.notna().any():
            band = count.fill_between(counts.step, counts.null_low, counts.null_high, color=NULL_BAND, lw=0)
            (line,) = count.plot(counts.step, counts.null_mean, color=NULL_LINE, lw=0.8)
            entries["random update, same spectrum"] = (band, line)
        count.plot(counts.step, counts.intruders, color=OBSERVED, marker="o", ms=3)
        count.set(ylabel=f"intruders ({side})", ylim=(0, None))
        count.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        labels = dict(zip(tracks.matrix, grouped(tracks.component), strict=True)) if len(tracks) else {}
        many = tracks.track.nunique() > 30
        for _, track in tracks.groupby("track"):
            colour = COMPONENTS.get(labels[track.matrix.iloc[0]], "0.3")
            marked = track.verdict == "intruder"
            for ax, name in ((rank, "rank"), (sigma, "sigma"), (cosine, "max_cos")):
                ax.plot(track.step, track[name], color=colour, lw=0.7, alpha=0.4 if many else 0.8, zorder=1)
                faces = np.where(marked, colour, "white")
                ax.scatter(
                    track.step, track[name], s=5, c=faces, edgecolors=colour, linewidths=0.4, zorder=2, clip_on=False
                )
        for name in ordered(labels.values()):
            entries[name] = Line2D([], [], color=COMPONENTS.get(name, "0.3"), marker="o", ms=3, lw=0.8)
        rank.set(ylabel="rank of σ", ylim=(first.k + 0.5, 0.5))
        rank.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(tracks):
            sigma.set_yscale("log")
            plain_logarithmic(sigma.yaxis)
        sigma.set(ylabel="σ")
        cosine.set(ylabel="max$_i$ |cos| with the base", ylim=(0, 1.02))
        entries[f"ε = {first.epsilon:g}"] = cosine.axhline(first.epsilon, color="0.3", lw=0.7, ls="--", zorder=0)
        margin = 0.04 * (result.steps[-1] - result.steps[0])
        for ax in axes:
            ax.set(xlabel="training step", xlim=(result.steps[0] - margin, result.steps[-1] + margin))
        if not len(tracks):
            for ax in (rank, sigma, cosine):
                nothing(ax, "no intruder")
        if own:
            legend(count, entries, own=True, columns=6)
    return axes
