"""How few bits the update of a model needs."""

import functools
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.curves import Curve
from finetune_lens.results.few import caution
from finetune_lens.results.tables import aligned, ends, jsonable

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("ternary", "pruned", "random")
STORED = 16  # bits of a parameter that is not compressed
ENOUGH = 0.95


class Compression(Result):
    """What `compress` measured.

    `data` has the dimensions density, scale, example, reference (base, tuned, and blocks: all of the update that was
    compressed, in full precision), and, of the metrics accuracy and logprob,

    - ternary_…, random_… (density, scale, example), pruned_… (density, example), reference_… (reference, example);
    - kept (density): share of the entries of τ that are kept and are not 0;
    - half (example): "choice" where α is chosen, "report" where what it gives is reported; with one scale there is no
      choice, and all examples are "report".

    Intervals are 95 % percentile bootstrap over examples, all measures of an example drawn together.
    """

    kind = "compression"

    @property
    def metric(self) -> str:
        """What is recovered unless another metric is asked for: of texts logprob, else accuracy."""
        return "logprob" if self.data.attrs["objective"] == "text" else "accuracy"

    @property
    def densities(self) -> list[float]:
        return [float(d) for d in self.data.density.values]

    @property
    def scales(self) -> list[float]:
        return [float(s) for s in self.data.scale.values]

    def bits(self, method: str = "ternary") -> np.ndarray:
        """(density,) bits a parameter of the update: 16 are what it takes as it stands."""
        return (masked_bits if method == "pruned" else ternary_bits)(self.data.kept.values)

    def values(self, method: str = "ternary", *, metric: str | None = None) -> np.ndarray:
        """(density, scale, example) of a metric; of "pruned", which has no scale, one."""
        metric = self._known(method, metric)
        values = self.data[f"{method}_{metric}"].transpose("density", ..., "example").values
        return values[:, None] if method == "pruned" else values

    def reference(self, name: str, *, metric: str | None = None) -> np.ndarray:
        """(example,) of a metric: "base", "tuned" or "blocks"."""
        return self.data[f"reference_{self._known('ternary', metric)}"].sel(reference=name).values

    def recovery(
        self, values: np.ndarray, *, metric: str | None = None, half: str | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(P − P_base) / (P_tuned − P_base), a ratio of means, and its interval.

        Args:
            values: P of each example, (…, example).
            half: only the examples of that half.

        Returns:
            Recovery, lower and upper end, (…); NaN where the interval of P_tuned − P_base covers 0.
        """
        base, tuned = (self.reference(name, metric=metric) for name in ("base", "tuned"))
        at = slice(None) if half is None else self.data.half.values == half
        return stats.interval_of_ratio((values - base)[..., at], (tuned - base)[at])

    def chosen(self, method: str = "ternary", *, metric: str | None = None) -> np.ndarray:
        """(density,) position of the best scale on the examples of "choice": the mean metric nearest to the tuned
        model's side, of equal ones the higher log-probability, of equal ones the smaller scale."""
        if method == "pruned" or len(self.scales) == 1:
            return np.zeros(len(self.densities), dtype=int)
        at = self.data.half.values == "choice"
        orders = []
        for name in (metric or self.metric, "logprob"):
            gap = (self.reference("tuned", metric=name) - self.reference("base", metric=name))[at].mean()
            orders.append((-1 if gap < 0 else 1) * self.values(method, metric=name)[..., at].mean(-1))
        first, second = orders
        best = first >= first.max(1, keepdims=True) - 1e-12
        return np.where(best, second, -np.inf).argmax(1)

    def table(self, *, metric: str | None = None) -> "pd.DataFrame":
        """A row a method and density, at the scale chosen on one half of the examples, measured on the other."""
        metric = self._known("ternary", metric)
        return self._table.copy() if metric == self.metric else self._tabled(metric)

    @functools.cached_property
    def _table(self) -> "pd.DataFrame":
        return self._tabled(self.metric)

    def _tabled(self, metric: str) -> "pd.DataFrame":
        import pandas as pd

        frames = []
        report = self.data.half.values == "report"
        for method in METHODS:
            chosen = self.chosen(method, metric=metric)
            values = self.values(method, metric=metric)[np.arange(len(chosen)), chosen]
            found, low, high = self.recovery(values, metric=metric, half="report")
            scales = np.nan if method == "pruned" else np.array(self.scales)[chosen]
            bits = self.bits(method)
            frames.append(
                pd.DataFrame(
                    {
                        "method": method, "density": self.densities, "scale": scales, "kept": self.data.kept.values,
                        "bits": bits, "ratio": STORED / bits, metric: values[:, report].mean(1), "recovery": found,
                        "low": low, "high": high,
                    }
                )
            )  # fmt: skip
        return pd.concat(frames, ignore_index=True)

    def to_frame(self) -> "pd.DataFrame":
        """A row a method, density and scale, over all examples."""
        import pandas as pd

        frames = []
        for method in METHODS:
            values = self.values(method)
            found, low, high = self.recovery(values)
            scales = [np.nan] if method == "pruned" else self.scales
            grid = pd.MultiIndex.from_product([self.densities, scales], names=["density", "scale"]).to_frame(False)
            per_density = pd.DataFrame({"kept": self.data.kept.values, "bits": self.bits(method)}).assign(
                ratio=lambda frame: STORED / frame["bits"]
            )
            columns = {name: np.repeat(per_density[name].to_numpy(), len(scales)) for name in per_density}
            for metric in ("accuracy", "logprob"):
                columns[metric] = self.values(method, metric=metric).mean(-1).ravel()
            columns |= {"recovery": found.ravel(), "low": low.ravel(), "high": high.ravel()}
            frames.append(grid.assign(**columns).assign(method=method))
        frame = pd.concat(frames, ignore_index=True)
        return frame[["method", *(c for c in frame.columns if c != "method")]]

    def curves(self, *, metric: str | None = None) -> list[Curve]:
        """Metric against the share of the parameters that is moved, on the examples of "report"; at the chosen scale.

        The shares are of all parameters that could have been moved, unchanged ones with them. Where all that changed
        is moved, a point at share 1 follows: to move the rest changes nothing.
        """
        report = self.data.half.values == "report"
        base, tuned = (self.reference(name, metric=metric)[report] for name in ("base", "tuned"))
        of_all = self.data.attrs["entries"] / self.data.attrs["parameters"]
        shares, order = np.unique(self.data.kept.values, return_index=True)  # one where all that moved is kept already
        shares = shares * of_all
        all_moved = round(self.data.kept.values.max() * self.data.attrs["entries"]) == self.data.attrs["moved"]
        if all_moved and shares[-1] < 1:
            shares, order = np.append(shares, 1.0), np.append(order, order[-1])
        found = []
        for method in METHODS:
            chosen = self.chosen(method, metric=metric)
            values = self.values(method, metric=metric)[np.arange(len(chosen)), chosen][:, report]
            labels = [f"{d:.3g}" + ("" if method == "pruned" else f", α = {self.scales[i]:g}")
                      for d, i in zip(self.densities, chosen, strict=True)]  # fmt: skip
            found.append(
                Curve(
                    {"ternary": "ternary top-|τ|", "pruned": "top-|τ|", "random": "ternary, random entries"}[method],
                    "parameters", shares, values[order], base, tuned,
                    [labels[i] for i in order],
                )
            )  # fmt: skip
        return found

    def smallest(self, method: str = "ternary") -> "dict[str, Any] | None":
        """The row of `table` with the fewest bits whose recovery is 0.95 or more; None where none is."""
        table = self.table()
        rows = table[(table["method"] == method) & (table["recovery"] >= ENOUGH)].sort_values("bits", kind="stable")
        return jsonable(rows.iloc[0].to_dict()) if len(rows) else None

    def headline(self) -> dict[str, Any]:
        """The fewest bits a parameter that recover 95 %, by method; the references; what was compressed."""
        means = {
            str(name): float(self.reference(name)[self.data.half.values == "report"].mean())
            for name in self.data.reference.values
        }
        sizes = {name: int(self.data.attrs[name]) for name in ("entries", "parameters")}
        adapter = float(self.data.attrs["factor_bits"])
        blocks = [jsonable({"": float(x)})[""] for x in self.recovery(self.reference("blocks"), half="report")]
        return sizes | {
            "metric": self.metric,
            "examples": {half: int((self.data.half == half).sum()) for half in ("choice", "report")},
            "references": means,
            "blocks_recovery": dict(zip(("recovery", "low", "high"), blocks, strict=True)),
            "factor_bits": adapter if np.isfinite(adapter) else None,
            "smallest": {method: self.smallest(method) for method in METHODS},
        }

    def summary(self) -> str:
        """The table, the references, and the fewest bits that are enough."""
        data, metric = self.data, self.metric
        report, choice = ((data.half.values == half).sum() for half in ("report", "choice"))
        base, tuned, blocks = (
            self.reference(name)[data.half.values == "report"].mean() for name in ("base", "tuned", "blocks")
        )
        found, low, high = self.recovery(self.reference("blocks"), half="report")
        lines = [
            f"τ = tuned − base: {data.attrs['entries']:,} entries, standard deviation {data.attrs['spread']:.3g}; "
            f"{report} examples"
            + (f", α chosen on {choice} others" if choice else ""),
            f"{metric}: base {base:.3g}, tuned {tuned:.3g}; the update that is compressed, in full: {blocks:.3g}"
            + ("" if np.isnan(found) else f", recovery {found:.3g}{ends(low, high)}"),
        ]  # fmt: skip
        rows = [
            [
                r["method"], f"{r['density']:g}", "" if np.isnan(r["scale"]) else f"{r['scale']:g}",
                f"{r['bits']:.3g}", f"{r['ratio']:.3g}×", f"{r[metric]:.3g}",
                "" if np.isnan(r["recovery"]) else f"{r['recovery']:.3g}",
                ends(r["low"], r["high"]).strip(),
            ]
            for r in self.table().to_dict("records")
        ]  # fmt: skip
        lines += aligned(["", "density", "α", "bits", "smaller", metric, "recovery", "95 %"], rows)
        if np.isnan(found):
            lines.append(f"recovery is undefined: the interval of the difference of {metric}, tuned − base, covers 0")
        else:
            best = self.smallest()
            lines.append(
                f"no density recovers {ENOUGH:.0%} in ternary"
                if best is None
                else f"{best['bits']:.3g} bits a parameter are enough: density {best['density']:g}, α = "
                f"{best['scale']:g} recover {best['recovery']:.3g}{ends(best['low'], best['high'])}"
            )
            if best is not None and len(self.scales) > 1 and best["scale"] in (self.scales[0], self.scales[-1]):
                lines.append("that α is the end of the grid: others beyond it may do better")
        if np.isfinite(data.attrs["factor_bits"]):
            lines.append(f"the adapter's own factors take {data.attrs['factor_bits']:.3g} bits a parameter of BA")
        for names, what in (("outside", "stay at the base"), ("unchanged", "weights are equal in both models")):
            listed = json.loads(data.attrs[names])
            if listed:
                few = ", ".join(listed[:3]) + (" …" if len(listed) > 3 else "")
                lines.append(f"{len(listed)} {what}, and are not part of τ: {few}")
        lines += caution(report)
        lines += [str(note) for note in self.provenance.get("notes", [])]
        return "\n".join(lines)

    def _known(self, method: str, metric: str | None) -> str:
        metric = metric or self.metric
        if method not in METHODS or metric not in ("accuracy", "logprob"):
            raise InputError(
                f"a method is one of {', '.join(METHODS)}, a metric accuracy or logprob; found {method!r} and "
                f"{metric!r}"
            )
        return metric


def ternary_bits(kept: np.ndarray) -> np.ndarray:
    """−[(1 − k)·log₂(1 − k) + k·log₂(k/2)]: the entropy of an entry that is 0, or either sign, k of them not 0."""
    from scipy.special import xlogy

    kept = np.asarray(kept, dtype=float)
    return -(xlogy(1 - kept, 1 - kept) + xlogy(kept, kept / 2)) / np.log(2)


def masked_bits(kept: np.ndarray) -> np.ndarray:
    """16·k bits for the values that are kept, and the entropy of where they are."""
    kept = np.asarray(kept, dtype=float)
    return STORED * kept + ternary_bits(kept) - kept  # a mask has no signs
