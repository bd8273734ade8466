"""The recovery axis: how much moves, against how much of the behaviour moves with it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.plots._style import COMPONENTS, NULL_LINE, OTHER, PAGE, nothing, plain_logarithmic, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.recovery import Recovery

# The Okabe–Ito colours without yellow, and one more; the shapes differ too, so that no curve is told by colour alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", COMPONENTS[OTHER])
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<", ">", "p", "*")
LINES = {"parameters": "-", "directions": (0, (4, 1.5)), "sites": (0, (1, 1.2))}
CHANCE = "random"  # in the name of a curve that moves what chance chose: drawn grey
LOWEST, HIGHEST = -0.35, 1.35  # beyond these a point is an arrow at the edge


def recovery_axis(
    result: "Recovery",
    *,
    curves: Sequence[str] | None = None,
    by_unit: bool = False,
    axes: "Sequence[Axes] | None" = None,
) -> np.ndarray:
    """Share moved (logarithmic) against share of the gain recovered, with 95 % intervals, a line a curve.

    Alternatives and single points are markers without a line. In the legend the area and its interval, where there is
    one. Solid: parameters; dashed: directions; dotted: sites; `by_unit` gives each a panel. Rules at 0, 0.95 and 1;
    arrows at the edge for points beyond −0.35 and 1.35. Returns the axes.

    Args:
        curves: which, in this order; by default all.
    """
    names = result.names if curves is None else list(curves)
    table, frame = result.table().set_index("curve"), result.to_frame()
    units = [u for u in result.units if (table.loc[names, "unit"] == u).any()]
    panels = units if by_unit else [None]
    looks = _looks(names)
    with styled():
        own = axes is None
        beside: Sequence[Any] = [None] * len(panels)
        if own:
            axes, beside = _panels([(table["unit"][names] == u).sum() if by_unit else len(names) for u in panels])
        for ax, side, unit in zip(axes, beside, panels, strict=True):
            shown = [n for n in names if unit is None or table.loc[n, "unit"] == unit]
            entries = {}
            for name in shown:
                part = frame[frame["curve"] == name]
                entries[_legend(name, table.loc[name])] = _draw(ax, part, table.loc[name], looks[name])
            _finish(
                ax, frame[frame["curve"].isin(shown)], unit or (units[0] if len(units) == 1 else "what can be moved")
            )
            title = "area under the curve, 95 %"
            if unit is None and len(units) > 1:
                title += "\n" + ", ".join(f"{_style_name(u)}: {u}" for u in units)
            where = {} if side is None else {"loc": "upper left", "borderaxespad": 0}
            box = (side or ax).legend(entries.values(), entries, title=title, alignment="left", **where)
            box.set_in_layout(False)  # its axes keep its place
            ax.set_ylabel("share of the gain recovered")
    return np.asarray(axes, dtype=object)


def _looks(names: list[str]) -> dict[str, dict[str, str]]:
    """Colour and marker by name; what chance chose is grey."""
    chance = [n for n in names if CHANCE in n]
    rest = [n for n in names if n not in chance]
    looks = {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            # a second round of colours has open markers
            "mfc": COLOURS[i % len(COLOURS)] if i < len(COLOURS) else "white",
        }
        for i, name in enumerate(rest)
    }
    for i, name in enumerate(chance):
        looks[name] = {"color": NULL_LINE, "marker": MARKERS[-1 - i % len(MARKERS)], "mfc": NULL_LINE}
    return looks


def _draw(ax: "Axes", part: Any, row: Any, look: dict[str, str]) -> Any:
    shares, recovery = part["share"].to_numpy(), part["recovery"].to_numpy()
    low, high = (np.clip(part[end], LOWEST, HIGHEST).to_numpy() for end in ("low", "high"))
    within = np.clip(recovery, LOWEST, HIGHEST)
    line = "none" if row["why"].startswith("alternatives") else LINES.get(row["unit"], "-")
    ax.vlines(shares, low, high, color=look["color"], lw=0.9, alpha=0.55, zorder=2)
    ax.plot(shares, within, ls=line, color=look["color"], lw=1.0, zorder=3)
    arrows = {"marker": "v", "mfc": "white"}, {"marker": "^", "mfc": "white"}
    for chosen, kind in zip((within == recovery, recovery < LOWEST, recovery > HIGHEST), ({}, *arrows), strict=True):
        if chosen.any():  # an empty line that is not clipped would be laid out at the corner of the figure
            ax.plot(
                shares[chosen], within[chosen], ls="none", ms=3.2, mew=0.7, zorder=3.5, clip_on=False, **look | kind
            )
    return ax.plot([], [], ls=line, lw=1.0, ms=3.2, mew=0.7, **look)[0]


def _legend(name: str, row: Any) -> str:
    if not np.isnan(row["area"]):
        ends = "" if np.isnan(row["area_low"]) else f" [{row['area_low']:.2f}, {row['area_high']:.2f}]"
        return f"{name}   {row['area']:.2f}{ends}"
    return f"{name}   undefined" if np.isnan(row["share"]) else name


def _style_name(unit: str) -> str:
    return {"parameters": "solid", "directions": "dashed", "sites": "dotted"}.get(unit, "solid")


def _panels(curves: "Sequence[int]") -> tuple[np.ndarray, np.ndarray]:
    """One above the other, each as high as its legend, which stands in empty axes beside it."""
    import matplotlib.pyplot as plt

    from finetune_lens.plots._figure import StyledFigure

    heights = [max(2.0 if len(curves) > 1 else 2.6, 0.6 + 0.15 * n) for n in curves]
    _, axes = plt.subplots(
        len(curves), 2, figsize=(PAGE, sum(heights)), squeeze=False, height_ratios=heights, width_ratios=[1.4, 1],
        FigureClass=StyledFigure,
    )  # fmt: skip
    for side in axes[:, 1]:
        side.axis("off")
    return axes[:, 0], axes[:, 1]


def _finish(ax: "Axes", frame: Any, unit: str) -> None:
    from matplotlib.transforms import blended_transform_factory

    for at, style in ((0, "-"), (0.95, (0, (3, 2))), (1, "-")):
        ax.axhline(at, color="0.75", lw=0.6, ls=style, zorder=0)
    beside = blended_transform_factory(ax.transAxes, ax.transData)
    ax.text(0.01, 0.945, "0.95", transform=beside, va="top", fontsize=6, color="0.5")
    ax.set_xscale("log")
    ax.set_xlim(frame["share"].min() / 1.4, 1.15)
    seen = np.clip(frame[["recovery", "low", "high"]].to_numpy(), LOWEST, HIGHEST)
    seen = seen[np.isfinite(seen)]
    ax.set_ylim(min(-0.06, seen.min(initial=0) - 0.03), max(1.08, seen.max(initial=1) + 0.03))
    plain_logarithmic(ax.xaxis)
    ax.set_xlabel(f"share of {unit} moved" if unit != "what can be moved" else "share moved")
    if frame["recovery"].isna().all():
        nothing(ax, "recovery is undefined:\ntuned − base is not clear of 0")
