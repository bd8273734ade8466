"""Where one head looks in one prompt, in the base and in the tuned model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._cells import shown
from finetune_lens.plots._style import DIVERGING, PAGE, SEQUENTIAL, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune_lens.results.attention import Attention

MOST = 40  # tokens on an axis
TICKS = (0, 0.05, 0.2, 0.5, 1)


def attention_maps(
    result: "Attention",
    *,
    head: tuple[int, int] | None = None,
    example: str | None = None,
    axes: "Sequence[Axes] | None" = None,
) -> np.ndarray:
    """Attention of one head in one prompt: base, tuned, tuned − base; queries are rows, keys columns, both tokens. Of a
    long prompt the first token and the last 39. Colours of attention follow its square root. Returns the axes.

    Args:
        head: (layer, head); by default the one whose attention diverges most over the prompts.
        example: a prompt whose maps were kept; by default the one where that head diverges most.

    Raises:
        InputError: no such head, or a prompt whose maps were not kept.
    """
    from matplotlib.colors import Normalize, PowerNorm

    data = result.data
    if head is None:
        row = result.top(1).iloc[0]
        head = int(row["layer"]), int(row["head"])
    if head[0] not in data["layer"].values or head[1] not in data["head"].values:
        layers, heads = (", ".join(map(str, data[dim].values)) for dim in ("layer", "head"))
        raise InputError(f"head {head[0]}.{head[1]} was not measured; layers {layers} and heads {heads} were")
    one = data.sel(layer=head[0], head=head[1])
    kept = [str(name) for name in data["kept"].values]
    if example is None:
        example = kept[int(np.argmax(one["divergence"].sel(example=data["kept"].values).values))]
    if example not in kept:
        raise InputError(f"the maps of prompt {example!r} were not kept; those of {', '.join(kept)} were")
    maps = one["pattern"].sel(kept=example).transpose("side", "query", "key").values
    tokens = [str(token) for token in data["token"].sel(kept=example).values if token != ""]
    some = np.unique([0, *range(max(0, len(tokens) - MOST + 1), len(tokens))])
    names = [shown(tokens[i]) for i in some]
    base, tuned = maps[:, some[:, None], some]
    top, most = max(base.max(), tuned.max()), np.abs(tuned - base).max() or 1.0
    spread = PowerNorm(0.5, 0, top)
    panels = [(side, values, spread, SEQUENTIAL, "attention") for side, values in (("base", base), ("tuned", tuned))]
    panels.append(("tuned − base", tuned - base, Normalize(-most, most), DIVERGING, "difference of attention"))
    size = 7 if len(names) <= 14 else 5 if len(names) <= 24 else 3.5
    with styled():
        if axes is None:
            axes = new_axes(width=PAGE, height=3.15, columns=3)
        unseen = np.triu(np.ones(base.shape, bool), 1) & (base == 0) & (tuned == 0)
        for ax, (title, values, norm, colours, label) in zip(axes, panels, strict=True):
            image = ax.imshow(np.ma.masked_where(unseen, values), norm=norm, cmap=colours, aspect="equal")
            ax.set_xticks(np.arange(len(names)), names, rotation=90, fontsize=size)
            ax.set_yticks(np.arange(len(names)), names, fontsize=size)
            ax.set(title=title, xlabel="key")
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
            bar = ax.figure.colorbar(
                image,
                ax=ax,
                label=label,
                location="bottom",
                shrink=0.8,
                aspect=25,
                ticks=TICKS if norm is spread else None,
            )
            bar.outline.set_visible(False)
        axes[0].set(ylabel="query", title=f"base   (head {head[0]}.{head[1]}, prompt {example})")
    return np.asarray(axes, dtype=object)
