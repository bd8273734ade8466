"""The recovery axis: share moved against share of the gain recovered, of several methods."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.curves import Curve
from finetune_lens.results.few import caution
from finetune_lens.results.tables import aligned, jsonable

if TYPE_CHECKING:
    import pandas as pd

TARGET = 0.95
SAME = 1e-9  # shares, and recoveries, nearer than this are one


@dataclass(frozen=True, eq=False)
class _Resampled:
    """A curve with share > 0, its recovery (point,) and that of each resample (point, resample)."""

    shares: np.ndarray
    recovery: np.ndarray
    resamples: np.ndarray
    gain: np.ndarray  # mean, lower and upper end
    defined: bool
    alternatives: bool

    @property
    def weights(self) -> np.ndarray:
        """w with ∫ = w·recovery, by trapezoids from (0, 0)."""
        left = np.diff(self.shares, prepend=0)
        return (left + np.append(left[1:], 0)) / 2

    @property
    def why(self) -> str:
        """Why there is no area; "" where there is."""
        if not self.defined:
            return "the gain is not clear of 0"
        if self.alternatives:
            return "alternatives, not a curve"
        reach = self.shares[-1]
        return "" if reach > 1 - SAME else f"measured up to share {reach:.3g}"

    def interval(self, numbers: np.ndarray) -> np.ndarray:
        """Of one number a resample."""
        return stats.percentile_interval(numbers[None])[:, 0]


class Recovery(Result):
    """What `recovery_axis` gathered.

    `data` has the dimensions curve, point, example and, NaN or "" behind the last,

    - share, label (curve, point), value (curve, point, example), base, tuned, id (curve, example);
    - unit (parameters, directions, sites), metric, source (kind of the result), alternatives (1 where the points are
      alternatives, such as each layer alone) (curve).

    Recovery is (value − base)/(tuned − base), a ratio of means; NaN where the interval of the gain covers 0. Intervals
    are 95 % percentile bootstrap over the examples, all points of a curve and its denominator on the same draws.
    """

    kind = "recovery"

    @property
    def names(self) -> list[str]:
        return [str(c) for c in self.data.curve.values]

    @property
    def units(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(str(u) for u in self.data.unit.values))

    def curve(self, name: str) -> Curve:
        """The curve as it was given.

        Raises:
            InputError: there is none of that name.
        """
        one, keep = self._one(name)
        points = one.share.notnull().values
        return Curve(
            name, str(one.unit.item()), one.share.values[points], one.value.values[points][:, keep],
            one.base.values[keep], one.tuned.values[keep], [str(x) for x in one.label.values[points]],
            bool(one.alternatives),
        )  # fmt: skip

    def examples(self, name: str) -> list[str]:
        """Their ids."""
        one, keep = self._one(name)
        return [str(i) for i in one.id.values[keep]]

    def _one(self, name: str) -> tuple[Any, np.ndarray]:
        if name not in self.names:
            raise InputError(f"there is no curve {name!r}; there are {', '.join(map(repr, self.names))}")
        one = self.data.sel(curve=name).transpose("point", "example", ...)
        return one, one.id.values != ""

    @cached_property
    def _resampled(self) -> dict[str, _Resampled]:
        return {name: _resample(self.curve(name)) for name in self.names}

    def table(self, *, target: float = TARGET) -> "pd.DataFrame":
        """A row a curve: gain, area, and the smallest measured share whose recovery is at least `target`.

        `area_measured` is the integral up to `reach`, the largest share measured; `area` is that where the reach is 1
        and NaN otherwise. A share of ∞ is "at none that was measured"; `never` is how often that happens among the
        resamples.
        """
        import pandas as pd

        rows = []
        for name, at in self._resampled.items():
            one = self.data.sel(curve=name)
            measured = (np.nan,) * 3
            if not at.alternatives:
                measured = at.weights @ at.recovery, *at.interval(at.weights @ at.resamples)
            area = (np.nan,) * 3 if at.why else measured
            share, share_low, share_high, never = share_at(at.shares, at.recovery, at.resamples, target)
            rows.append(
                {
                    "curve": name, "unit": str(one.unit.item()), "metric": str(one.metric.item()),
                    "examples": len(self.examples(name)), "points": len(at.shares), "reach": at.shares[-1],
                    "gain": at.gain[0], "gain_low": at.gain[1], "gain_high": at.gain[2],
                    "area": area[0], "area_low": area[1], "area_high": area[2], "area_measured": measured[0],
                    "area_measured_low": measured[1], "area_measured_high": measured[2],
                    "share": share, "share_low": share_low, "share_high": share_high, "never": never, "why": at.why,
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def to_frame(self) -> "pd.DataFrame":
        """A row a curve and point: share, label, mean, recovery with its interval."""
        import pandas as pd

        frames = []
        for name, at in self._resampled.items():
            curve = _clean(self.curve(name))
            low, high = stats.percentile_interval(at.resamples)
            frames.append(
                pd.DataFrame(
                    {
                        "curve": name, "unit": curve.unit, "share": at.shares, "label": curve.labels,
                        "mean": np.nanmean(curve.values, axis=1), "recovery": at.recovery, "low": low, "high": high,
                    }
                )
            )  # fmt: skip
        return pd.concat(frames, ignore_index=True)

    def share_at(self, name: str, target: float = TARGET) -> tuple[float, float, float, float]:
        """The smallest measured share with recovery ≥ target, its interval, and the share of resamples without one.

        ∞ where no measured share reaches it; NaN where recovery is undefined.
        """
        self._one(name)
        at = self._resampled[name]
        return share_at(at.shares, at.recovery, at.resamples, target)

    def compare(self, a: str, b: str) -> dict[str, Any]:
        """The difference of two areas, a − b, on the examples that both have, with its paired interval.

        Raises:
            InputError: no such curve, fewer than two examples in common, a curve without an area.
        """
        shared = [i for i in self.examples(a) if i in {*self.examples(b)}]
        if len(shared) < 2:
            raise InputError(
                f"{a!r} and {b!r} have {len(shared)} examples in common; methods are compared on the same examples: "
                "measure both on one file"
            )
        areas, resampled = [], []
        for name in (a, b):
            curve, ids = self.curve(name), self.examples(name)
            rows = [ids.index(i) for i in shared]
            part = {"values": curve.values[:, rows], "base": curve.base[rows], "tuned": curve.tuned[rows]}
            at = _resample(replace(curve, **part))
            if at.why:
                raise InputError(f"{name!r} has no area to compare: {at.why}")
            areas.append(at.weights @ at.recovery)
            resampled.append(at.weights @ at.resamples)
        low, high = at.interval(resampled[0] - resampled[1])
        return {
            "a": a, "b": b, "examples": len(shared), "area_a": float(areas[0]), "area_b": float(areas[1]),
            "difference": float(areas[0] - areas[1]), "low": float(low), "high": float(high),
        }  # fmt: skip

    @cached_property
    def _comparisons(self) -> list[dict[str, Any]]:
        """The first curve with an area against each other one of its unit and metric that has one."""
        table = self._table
        with_area = table[table["why"] == ""]
        if with_area.empty:
            return []
        first = with_area.iloc[0]
        alike = with_area[(with_area["unit"] == first["unit"]) & (with_area["metric"] == first["metric"])]
        found = []
        for other in alike["curve"].iloc[1:]:
            try:
                found.append(self.compare(first["curve"], other))
            except InputError:  # nothing in common, or on what is in common the gain is not clear of 0
                continue
        return found

    @cached_property
    def _table(self) -> "pd.DataFrame":
        return self.table()

    def headline(self) -> dict[str, Any]:
        """By curve the row of the table; the first curve against the others."""
        rows = {row.pop("curve"): jsonable(row) for row in self._table.to_dict("records")}
        return {"curves": rows, "differences": [jsonable(row) for row in self._comparisons], "notes": self._notes}

    @property
    def _notes(self) -> list[str]:
        return [str(note) for note in self.provenance.get("notes", [])]

    def summary(self) -> str:
        """Area and share of each curve, what is compared, and what to be wary of."""
        rows = [
            [
                r["curve"], r["unit"], f"{r['examples']}", f"{r['gain']:+.3g}",
                *_number_and_ends(r, "area_measured", "{:.3f}".format),
                *_number_and_ends(r, "share", lambda share: "none" if np.isinf(share) else f"{share:.3g}"), r["why"],
            ]
            for r in self._table.to_dict("records")
        ]  # fmt: skip
        head = ["", "unit", "examples", "gain", "area", "95 %", f"share at {TARGET:g}", "95 %", ""]
        lines = aligned(head, rows)
        for row in self._comparisons:
            lines.append(
                f"area, {row['a']} − {row['b']}: {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] on "
                f"{row['examples']} examples"
            )
        if self._table["unit"].nunique() > 1:
            lines.append("shares of different units are not the same amount of anything: compare curves of one unit")
        lines += caution(int(self._table["examples"].min()))
        return "\n".join([*lines, *self._notes])


def of_curves(curves: Mapping[str, Curve], facts: Mapping[str, Mapping[str, Any]] | None = None) -> Recovery:
    """Curves by name as a result; `facts`: of each its metric, source, ids (by default numbers).

    Examples whose id is "" are padding, and left out.
    """
    import xarray as xr

    facts = facts or {}
    kept: dict[str, Curve] = {}
    ids: dict[str, np.ndarray] = {}
    for name, curve in curves.items():
        given = facts.get(name, {}).get("ids")
        known = np.array([str(i) for i in (np.arange(len(curve.base)) if given is None else given)], dtype=object)
        if len(known) != len(curve.base) or len({*known} - {""}) < (known != "").sum():
            raise InputError(f"{name!r}: expected an id of its own for each of {len(curve.base)} examples")
        there = known != ""
        kept[name] = replace(
            curve, shares=np.asarray(curve.shares, float), values=np.asarray(curve.values)[:, there],
            base=np.asarray(curve.base)[there], tuned=np.asarray(curve.tuned)[there],
        )  # fmt: skip
        ids[name] = known[there]
    points = max(len(c.shares) for c in kept.values())
    examples = max(len(i) for i in ids.values())
    share, value = np.full((len(kept), points), np.nan), np.full((len(kept), points, examples), np.nan)
    base, tuned = np.full((2, len(kept), examples), np.nan)
    label, names = np.full(share.shape, "", dtype=object), np.full(base.shape, "", dtype=object)
    for row, (name, curve) in enumerate(kept.items()):
        p, e = curve.values.shape
        share[row, :p], value[row, :p, :e], base[row, :e], tuned[row, :e] = (
            curve.shares, curve.values, curve.base, curve.tuned,
        )  # fmt: skip
        label[row, :p], names[row, :e] = curve.labels, ids[name]
    texts = {
        key: ("curve", np.array([str(facts.get(name, {}).get(key, "")) for name in kept], dtype=object))
        for key in ("metric", "source")
    }
    alternatives = np.array([curve.alternatives for curve in kept.values()], dtype=np.int8)
    data = {
        "share": (("curve", "point"), share), "value": (("curve", "point", "example"), value),
        "base": (("curve", "example"), base), "tuned": (("curve", "example"), tuned),
        "label": (("curve", "point"), label), "id": (("curve", "example"), names),
        "alternatives": ("curve", alternatives),
    }  # fmt: skip
    coords = {
        "curve": np.array(list(kept), dtype=object),
        "unit": ("curve", np.array([c.unit for c in kept.values()], dtype=object)),
        **texts,
    }
    return Recovery(xr.Dataset(data, coords))


def _clean(curve: Curve) -> Curve:
    """By rising share, without what moves nothing (the base itself), and of equal points (swaps beyond a layer that did
    not change) one."""
    order = [int(i) for i in np.argsort(curve.shares, kind="stable") if curve.shares[i] > SAME]
    kept: list[int] = []
    for i in order:
        alike = (j for j in kept if curve.shares[i] - curve.shares[j] < SAME)
        if not any(np.array_equal(curve.values[i], curve.values[j], equal_nan=True) for j in alike):
            kept.append(i)
    if not kept:
        raise InputError(f"the curve {curve.method!r} has no point with a share above 0")
    labels = [curve.labels[i] for i in kept]
    return replace(curve, shares=curve.shares[kept], values=curve.values[kept], labels=labels)


def _resample(curve: Curve) -> _Resampled:
    curve = _clean(curve)
    over = curve.values.astype(np.float64) - curve.base
    gain = curve.tuned.astype(np.float64) - curve.base
    recovery, resamples = stats.resampled_ratio(over, np.broadcast_to(gain, over.shape))
    gain = np.array([np.nanmean(gain), *stats.interval_of_mean(gain)])
    tied = bool((np.diff(curve.shares) < SAME).any())
    defined = not np.isnan(recovery).any()
    return _Resampled(curve.shares, recovery, resamples, gain, defined, curve.alternatives or tied)


def share_at(
    shares: np.ndarray, recovery: np.ndarray, resamples: np.ndarray, target: float
) -> tuple[float, float, float, float]:
    """The smallest of the rising shares whose recovery reaches the target, its interval, the resamples without one.

    Args:
        shares, recovery: (point,).
        resamples: recovery of the same, (point, resample). Quantiles are taken among the shares that were measured.
    """
    if np.isnan(recovery).any():
        return (np.nan,) * 4
    rising = np.append(shares, np.inf)

    def first(values: np.ndarray) -> np.ndarray:
        # a ratio of sums that is the target but for rounding reaches it
        reached = np.concatenate([values >= target - SAME, np.ones((1, values.shape[1]), bool)])
        return rising[reached.argmax(0)]

    drawn = first(resamples[:, ~np.isnan(resamples).any(0)])
    if len(drawn) == 0:  # one example: there is nothing to resample
        return float(first(recovery[:, None])[0]), np.nan, np.nan, np.nan
    tail = (1 - stats.LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    return float(first(recovery[:, None])[0]), float(low), float(high), float(np.isinf(drawn).mean())


def _number_and_ends(row: dict[str, Any], name: str, written: Callable[[float], str]) -> list[str]:
    number, *ends = (row[name + end] for end in ("", "_low", "_high"))
    if np.isnan(number):
        return ["–", ""]
    return [written(number), "" if np.isnan(ends).any() else f"[{written(ends[0])}, {written(ends[1])}]"]
