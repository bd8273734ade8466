"""What all figures share: style, sizes, colour and place of each component. Matplotlib is imported when drawing."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

COLUMN, PAGE = 3.35, 6.9  # widths in inches
OUTSIDE = -1  # the layer of what lies outside the blocks
OTHER = "other"

# One colour a component, in every figure; the order is that of rows and legends. The seven matrices of a block have the
# Okabe–Ito colours without its yellow, too pale for thin lines on white; fused ones take that of their first part.
COMPONENTS = {
    "q": "#0072B2", "k": "#56B4E9", "v": "#009E73", "qkv": "#0072B2", "o": "#CC79A7",
    "gate": "#E69F00", "up": "#D55E00", "gate_up": "#E69F00", "down": "#000000",
    "embed": "#7F7F7F", "unembed": "#4D4D4D", "pos": "#B3B3B3", "norm": "#8C6D31", "bias": "#BD9E39", OTHER: "#9467BD",
}  # fmt: skip
OBSERVED = "#0072B2"
MARK = "#D55E00"
PALE = "#A6CDE6"  # of OBSERVED, for areas beneath lines
NULL_BAND, NULL_LINE = "0.85", "0.45"
SEQUENTIAL = "magma_r"
DIVERGING = "RdBu_r"  # white at 0


@contextmanager
def styled() -> Iterator[None]:
    """The project's matplotlib style, for the time of the block."""
    import matplotlib.style

    with matplotlib.style.context(Path(__file__).with_name("finetune_lens.mplstyle")):
        yield
        interactive = matplotlib.is_interactive()
    # the first figure loads the backend; a notebook's turns interactive mode on, and without it shows no figure
    matplotlib.interactive(interactive)


def new_axes(*, width: float, height: float, columns: int = 1, rows: int = 1) -> np.ndarray:
    """A row of axes, or rows of them, in a new figure of that size in inches; call inside `styled`."""
    import matplotlib.pyplot as plt

    from finetune_lens.plots._figure import StyledFigure

    _, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, FigureClass=StyledFigure)
    return axes[0] if rows == 1 else axes


def legend(ax: "Axes", entries: dict[str, Any], *, own: bool, columns: int, title: str | None = None) -> None:
    """Label → handle: below the axes when the figure is ours, where it fits best inside when it is the caller's."""
    if not entries:
        return
    labels, handles = list(entries), list(entries.values())
    if own:
        ax.figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)
    else:
        ax.legend(handles, labels, title=title)


def plain_logarithmic(*axes: "Axis") -> None:
    """Logarithmic axes with numbers as they are written (0.1, 2, 30) instead of powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Decides which ticks have a label; writes them plainly."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    for axis in axes:
        axis.set_major_formatter(Plain())
        axis.set_minor_formatter(Plain(minor_thresholds=(1, 0.4)))


def grouped(components: Iterable[str], *, own_names: int = 0) -> list[str]:
    """The label of each component: its name, or "other" for unknown names once there are more than `own_names`."""
    names = [str(c) for c in components]
    unknown = {n for n in names if n not in COMPONENTS}
    return [OTHER if n in unknown and len(unknown) > own_names else n for n in names]


def ordered(labels: Iterable[str]) -> list[str]:
    """Each label once: the known components in their order, then unknown names as they come, "other" last."""
    known = [c for c in COMPONENTS if c != OTHER]
    labels = list(dict.fromkeys(labels))
    unknown = [n for n in labels if n not in COMPONENTS]
    return [c for c in known if c in labels] + unknown + [OTHER] * (OTHER in labels)


def median(values: np.ndarray) -> np.ndarray:
    """Over the first axis, NaN left out; NaN where there is nothing."""
    return np.ma.median(np.ma.masked_invalid(values), axis=0).filled(np.nan)


def nothing(ax: "Axes", why: str) -> None:
    """Say in the middle of empty axes why they are empty."""
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color="0.4")
