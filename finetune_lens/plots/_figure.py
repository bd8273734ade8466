"""The figure that keeps its style: what matplotlib looks up only when saving is still the style's then."""

from typing import Any

from matplotlib.figure import Figure

from finetune_lens.plots._style import styled


class StyledFigure(Figure):
    """A matplotlib figure whose `savefig` runs in the project's style (resolution, fonts embedded as TrueType)."""

    def savefig(self, *args: Any, **options: Any) -> None:
        with styled():
            super().savefig(*args, **options)
