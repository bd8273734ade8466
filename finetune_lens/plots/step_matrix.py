"""Which steps of a chain do later steps and the answer depend on, in base and tuned model?"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.plots._style import DIVERGING, PAGE, SEQUENTIAL, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.inside_chains import InsideChains

GAP = 0.35  # columns, before the answer's
LONGEST = 16  # characters of a step on an axis


def step_matrix(
    result: "InsideChains", *, question: str | None = None, axes: "Sequence[Axes] | None" = None
) -> np.ndarray:
    """KL at each later step and the answer (columns) where attention to a step (rows) is cut: base, tuned, difference.

    Base and tuned share a scale, whose colours follow the square root. Returns the axes.

    Args:
        question: whose chain; by default the mean over the chains of the commonest number of steps.

    Raises:
        InputError: no such question, or attention was not cut.
    """
    from matplotlib.colors import Normalize, PowerNorm

    base, tuned, rows, title = _matrices(result, question)
    count = len(base)
    top = max(np.nanmax(base, initial=0), np.nanmax(tuned, initial=0)) or 1.0
    most = np.nanmax(np.abs(tuned - base), initial=0) or 1.0
    spread = PowerNorm(0.5, 0, top)
    panels = [("base", base, spread, SEQUENTIAL), ("tuned", tuned, spread, SEQUENTIAL)]
    panels.append(("tuned − base", tuned - base, Normalize(-most, most), DIVERGING))
    edges = np.array([*range(1, count + 1), count + GAP, count + 1 + GAP]) - 0.5
    columns = [*map(str, range(2, count + 1)), "answer"]
    places = [*range(1, count), count + GAP]
    size = 7 if count <= 12 else 5 if count <= 24 else 3.5
    with styled():
        own = axes is None
        if own:
            axes = new_axes(width=PAGE, height=2.6, columns=3)
        images = []
        for ax, (name, values, norm, colours) in zip(axes, panels, strict=True):
            shown = np.insert(values[:, 1:], count - 1, np.nan, axis=1)  # the gap
            image = ax.pcolormesh(
                edges, np.arange(count + 1) - 0.5, np.ma.masked_invalid(shown), norm=norm, cmap=colours,
                edgecolors="white", linewidth=0.3 if count <= 24 else 0,
            )  # fmt: skip
            images.append(image)
            ax.set_xticks(places, columns, rotation=90 if count > 12 else 0, fontsize=size)
            ax.set_yticks(np.arange(count), rows if ax is axes[0] else [""] * count, fontsize=size)
            ax.set(ylim=(count - 0.5, -0.5), title=name, xlabel="later step")
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
        axes[0].set(ylabel="attention cut to step", title=f"base   ({title})")
        for image, over, label in (
            (images[0], list(axes[:2]), "KL (nats)"), (images[2], axes[2], "difference of KL (nats)"),
        ):  # fmt: skip
            bar = axes[0].figure.colorbar(image, ax=over, label=label, location="bottom", shrink=0.7, aspect=25)
            bar.outline.set_visible(False)
    return np.asarray(axes, dtype=object)


def _matrices(result: "InsideChains", question: str | None) -> tuple[np.ndarray, np.ndarray, list[str], str]:
    """Both sides' (source, target and answer), the steps' names, and whose they are."""
    if question is not None:
        base, tuned = result.matrix(question)
        texts = result.data["step_text"].sel(question=question).values[: len(base)]
        names = [f"{n}  {_short(str(text))}" for n, text in enumerate(texts, 1)]
        return base, tuned, names, f"question {_short(question)}"
    lengths = Counter(int(n) for n in result.data["measured"].values)
    count = max(lengths, key=lambda n: (n > 0, lengths[n], n))
    same = [q for q, n in zip(result.questions, result.data["measured"].values, strict=True) if n == count]
    total = np.stack([result.matrix(q) for q in same])
    there = ~np.isnan(total)
    mean = np.where(there.any(0), np.where(there, total, 0).sum(0) / np.maximum(there.sum(0), 1), np.nan)
    title = f"mean of {len(same)} chains" if len(same) > 1 else f"question {_short(same[0])}"
    return mean[0], mean[1], [str(n) for n in range(1, count + 1)], title


def _short(text: str, longest: int = LONGEST) -> str:
    text = " ".join(text.split())
    return (text if len(text) <= longest else f"{text[: longest - 1]}…").replace("$", r"\$")
