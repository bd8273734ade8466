"""Effects of cross-model patches, with their controls."""

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.results.patching import Patching
from finetune_lens.results.tables import jsonable, mean_of

if TYPE_CHECKING:
    import pandas as pd


class CrossPatching(Patching):
    """What `cross_patch` measured: a `Patching` whose directions are tuned→base and base→tuned, and its controls.

    - random_M (direction, …, example): the effect with the donor run on another prompt;
    - self_donor (direction): the largest change of a metric when a run is patched with itself, everywhere at once.
    """

    kind = "cmap"

    @property
    def has_null(self) -> bool:
        return f"random_{self.metric}" in self.data

    def null(self, *, direction: str, metric: str | None = None) -> tuple[float, float, float]:
        """Of the mean effects with donors on other prompts, over the cells: median, and the central 95 %."""
        values = self.data[f"random_{metric or self.metric}"].sel(direction=direction).transpose(..., "example").values
        cells = mean_of(values).ravel()
        cells = cells[np.isfinite(cells)]
        if not len(cells):
            return np.nan, np.nan, np.nan
        return float(np.median(cells)), *map(float, np.quantile(cells, (0.025, 0.975)))

    def to_frame(self) -> "pd.DataFrame":
        """As of `Patching`, with random_effect and the paired difference to it: specific, with its interval."""
        frame = super().to_frame()
        if not self.has_null:
            return frame
        order = ("direction", *self.dims, "example")
        random = self.data[f"random_{self.metric}"].transpose(*order).values
        difference = self.data[self.metric].transpose(*order).values - random
        low, high = stats.interval_of_mean(difference)
        frame["random_effect"] = mean_of(random).ravel()
        frame["specific"], frame["specific_low"], frame["specific_high"] = (
            mean_of(difference).ravel(), low.ravel(), high.ravel(),
        )  # fmt: skip
        return frame

    def _beside(self, row: "pd.Series") -> str:
        if "specific" not in row or np.isnan(row["specific"]):
            return ""
        ends = "" if np.isnan(row["specific_low"]) else f" [{row['specific_low']:.3g}, {row['specific_high']:.3g}]"
        return f"; beyond another prompt's donor ({row['random_effect']:+.3g}): {row['specific']:+.3g}{ends}"

    def headline(self) -> dict[str, Any]:
        """As of `Patching`, with the controls."""
        found = super().headline()
        for direction in self.directions:
            top = self.top(3, direction=direction)
            for entry, row in zip(found[direction]["top"], top.to_dict("records"), strict=True):
                names = [n for n in ("random_effect", "specific", "specific_low", "specific_high") if n in row]
                entry.update(jsonable({name: row[name] for name in names}))
            found[direction]["self_donor"] = float(self.data["self_donor"].sel(direction=direction))
            if self.has_null:
                _, low, high = self.null(direction=direction)
                found[direction]["random_donor"] = [low, high] if np.isfinite([low, high]).all() else None
        return found

    def _lines(self, gap: dict[str, Any]) -> list[str]:
        lines = super()._lines(gap)
        direction = gap["direction"]
        value = float(self.data["self_donor"].sel(direction=direction))
        lines.append(
            f"  self-donor, every place at once: {'no change' if value == 0 else f'logits change by {value:.2g}'}"
        )
        if self.has_null:
            median, low, high = self.null(direction=direction)
            lines.append(
                f"  random donors, all cells: median effect {median:+.3g}, 95 % of cells in [{low:.3g}, {high:.3g}]"
            )
        return lines
