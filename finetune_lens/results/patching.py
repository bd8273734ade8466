"""Effects of patches, example by example, with what they are of the difference between donor and recipient."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.few import caution
from finetune_lens.results.tables import jsonable, mean_of

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

METRICS = ("logit_diff", "logprob", "prob", "reciprocal_rank", "accuracy", "kl")
NOTHING = 1e-5  # of the largest effect: what rounding leaves where nothing can change
ESTIMATES = {"attribution": "attribution", "integrated": "integrated gradients"}  # effects to first order only


class Patching(Result):
    """What `patch` and `trace` measured.

    `data` has the dimensions direction, those of the grid (of layer, head, position; or set), and example, and for
    each metric M

    - M (direction, …, example): metric(patched) − metric(unpatched row of the same batch), NaN where a patch does not
      exist for an example;
    - recipient_M, donor_M (direction, example): of the full runs;
    - attribution_M: the first-order estimate of the effect, where asked for;

    and tokens (example, position), as the tokenizer prints them. Intervals are 95 % percentile bootstrap over the
    examples, the same resamples for every cell.
    """

    kind = "patching"

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions of the grid."""
        return tuple(self.data.attrs["grid"].split())

    @property
    def metric(self) -> str:
        """The metric that tables and figures show."""
        return self.data.attrs["metric"]

    @property
    def metrics(self) -> list[str]:
        """Those that could be measured."""
        return [m for m in METRICS if m in self.data and bool(np.isfinite(self.data[m]).any())]

    @property
    def directions(self) -> list[str]:
        return [str(d) for d in self.data.direction.values]

    def _summarised(self, values: "xr.DataArray", numbers: tuple[np.ndarray, ...], names: tuple[str, ...]) -> Any:
        import xarray as xr

        over = values.isel(example=0, drop=True)
        return xr.Dataset({name: over.copy(data=n) for name, n in zip(names, numbers, strict=True)})

    def effect(self, metric: str | None = None) -> "xr.Dataset":
        """mean, low, high of the effect over the examples, by direction and cell."""
        values = self.data[metric or self.metric].transpose(..., "example")
        low, high = stats.interval_of_mean(values.values)
        return self._summarised(values, (mean_of(values.values), low, high), ("mean", "low", "high"))

    def recovery(self, metric: str | None = None) -> "xr.Dataset":
        """ratio, low, high: mean effect / (mean donor − mean recipient); NaN where that difference is not clear of 0.

        1: the patch carries all of the difference; below 0: it works against it.
        """
        import xarray as xr

        metric = metric or self.metric
        values = self.data[metric].transpose("direction", ..., "example")
        parts = []
        for direction in range(values.sizes["direction"]):
            gap = self.data[f"donor_{metric}"] - self.data[f"recipient_{metric}"]
            part = values.isel(direction=direction)
            numbers = stats.interval_of_ratio(part.values, gap.isel(direction=direction).values)
            if values.sizes["example"] > 1:  # a cell of one of several has no share to compare
                numbers = np.where(np.isnan(numbers[1]), np.nan, numbers[0]), *numbers[1:]
            parts.append(self._summarised(part, numbers, ("ratio", "low", "high")))
        return xr.concat(parts, "direction").assign_coords(direction=self.data.direction)

    def gap(self, metric: str | None = None) -> "pd.DataFrame":
        """By direction: recipient, donor, and their paired difference with its interval."""
        import pandas as pd

        metric = metric or self.metric
        rows = []
        for direction in self.directions:
            one = self.data.sel(direction=direction)
            recipient, donor = one[f"recipient_{metric}"].values, one[f"donor_{metric}"].values
            low, high = stats.interval_of_mean(donor - recipient)
            row = {"direction": direction, "recipient": mean_of(recipient), "donor": mean_of(donor)}
            rows.append(row | {"difference": mean_of(donor - recipient), "low": float(low), "high": float(high)})
        return pd.DataFrame(rows)

    def to_frame(self) -> "pd.DataFrame":
        """One row a patch: the effect on every metric; of the main one with interval, recovery and BH-adjusted p."""
        return self._frame.copy()

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        values = self.data[self.metric].transpose("direction", *self.dims, "example")
        main, recovery = self.effect(), self.recovery()
        frame = main["mean"].transpose("direction", *self.dims).to_dataframe(name="effect").reset_index()
        frame = frame[["direction", *self.dims, "effect"]]

        def column(table: "xr.DataArray") -> np.ndarray:
            return table.transpose("direction", *self.dims).values.ravel()

        frame["low"], frame["high"] = column(main["low"]), column(main["high"])
        frame["p_adjusted"] = stats.benjamini_hochberg(stats.two_sided_p(values.values).ravel())
        for name in ("ratio", "low", "high"):
            frame["recovery" if name == "ratio" else f"recovery_{name}"] = column(recovery[name])
        for metric in self.metrics:
            if metric != self.metric:
                others = self.data[metric].transpose("direction", *self.dims, "example").values
                frame[f"effect_{metric}"] = mean_of(others).ravel()
        estimate = f"attribution_{self.metric}"
        if estimate in self.data:
            frame["attribution"] = mean_of(
                self.data[estimate].transpose("direction", *self.dims, "example").values
            ).ravel()
        frame["examples"] = np.isfinite(values.values).sum(-1).ravel()
        return frame

    def top(self, n: int = 10, *, direction: str | None = None) -> "pd.DataFrame":
        """The patches with the largest mean effect either way; those of a single example come last."""
        frame = self.to_frame()
        if direction is not None:
            frame = frame[frame["direction"] == direction]
        size = frame["effect"].abs()
        if self.data.sizes["example"] > 1:
            size = size.where(frame["examples"] > 1, -1)
        return frame.reindex(size.sort_values(ascending=False, kind="stable").index).head(n)

    def agreement(self) -> "pd.DataFrame":
        """Of attribution with the exact effects, by direction: rank correlation, slope, worst disagreement and where.

        Over the cells in which either is not 0 (`cells`): a patch that cannot change anything agrees for nothing. The
        slope is that of attribution on the effects through 0: 1 where they agree, less where attribution saturates.

        Raises:
            InputError: only one of the two was measured.
        """
        import pandas as pd

        if f"attribution_{self.metric}" not in self.data:
            raise InputError("attribution and exact effects are not both there: measure with method='both'")

        frame = self.to_frame()
        rows = []
        for direction, part in frame.groupby("direction", sort=False):
            size = part[["attribution", "effect"]].abs()
            part = part[size.max(axis=1) > NOTHING * size.max().max()]
            off = (part["attribution"] - part["effect"]).abs()
            squares = float((part["effect"] ** 2).sum())
            worst = part.loc[off.idxmax()] if off.notna().any() else None
            rows.append(
                {
                    "direction": direction,
                    "cells": len(part),
                    "slope": float((part["attribution"] * part["effect"]).sum()) / squares if squares else np.nan,
                    "rank_correlation": stats.rank_correlation(part["attribution"].values, part["effect"].values),
                    "worst": np.nan if worst is None else float(off.max()),
                    "worst_at": "" if worst is None else self._place(worst),
                    "largest_effect": float(part["effect"].abs().max()),
                }
            )
        return pd.DataFrame(rows)

    def _place(self, row: "pd.Series") -> str:
        return ", ".join(f"{dim} {row[dim]}" for dim in self.dims)

    def headline(self) -> dict[str, Any]:
        """The gap and the largest effects by direction."""
        found: dict[str, Any] = {"site": self.data.attrs["site"], "metric": self.metric}
        found["examples"] = int(self.data.sizes["example"])
        for row in self.gap().to_dict("records"):
            top = self.top(3, direction=row["direction"])
            columns = [*self.dims, "effect", "low", "high", "recovery"]
            found[row.pop("direction")] = jsonable(row) | {
                "top": [jsonable(r) for r in top[columns].to_dict("records")]
            }
        return found

    def summary(self) -> str:
        """What was patched into what, the difference to recover, and where it is."""
        site, examples = self.data.attrs["site"], self.data.sizes["example"]
        cells = int(np.prod([self.data.sizes[dim] for dim in self.dims]))
        method = ESTIMATES.get(self.data.attrs.get("method"))
        how = f" (estimated by {method})" if method else ""
        grid = f"{cells} {' × '.join(self.dims)} cells"
        window = self.data.attrs.get("window", 1)
        windows = f" in windows of {window} layers (fewer at the ends)" if window > 1 else ""
        lines = [f"{site} patched{how}{windows}, {grid}, {examples} examples; metric {self.metric}"]
        for row in self.gap().to_dict("records"):
            lines += self._lines(row)
        lines += caution(examples)
        lines += [str(note) for note in self.provenance.get("notes", [])]
        return "\n".join(lines)

    def _beside(self, row: "pd.Series") -> str:
        """What else stands on the line of a patch."""
        return ""

    def _lines(self, gap: dict[str, Any]) -> list[str]:
        """One direction: the gap, then the largest effects."""
        lines = [
            f"{gap['direction']}: recipient {gap['recipient']:.3g}, donor {gap['donor']:.3g}, difference "
            f"{gap['difference']:.3g} [{gap['low']:.3g}, {gap['high']:.3g}]"
        ]
        for _, row in self.top(3, direction=gap["direction"]).iterrows():
            share = "" if np.isnan(row["recovery"]) else f", recovery {row['recovery']:.2f}"
            few = "" if row["examples"] == self.data.sizes["example"] else f", {row['examples']} examples"
            ends = "" if np.isnan(row["low"]) else f" [{row['low']:.3g}, {row['high']:.3g}]"
            lines.append(f"  {self._place(row)}: {row['effect']:+.3g}{ends}{share}{few}{self._beside(row)}")
        if not (gap["low"] > 0 or gap["high"] < 0):
            lines.append("  donor and recipient do not differ clearly: recovery is undefined")
        if f"attribution_{self.metric}" in self.data:
            agreement = self.agreement().set_index("direction").loc[gap["direction"]]
            lines.append(
                f"  attribution against exact, {agreement['cells']} cells that change anything: rank correlation "
                f"{agreement['rank_correlation']:.3f}, slope {agreement['slope']:.2f}, "
                f"worst disagreement {agreement['worst']:.3g} at {agreement['worst_at']}"
            )
        return lines
