"""Grafts: how much of the gain a few entries of the update carry, beside other masks of the same size."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.curves import Curve
from finetune_lens.results.few import caution
from finetune_lens.results.tables import ends

if TYPE_CHECKING:
    import pandas as pd

EVEN = 0.5  # concentration from which Δ counts as spread over all entries; that of normal numbers is 2/π = 0.64
ALIKE = 0.9  # agreement from which a graft counts as doing what the tuned model does
METRIC = {"accuracy": "accuracy", "logprob": "log-probability (nats)"}


class Grafting(Result):
    """What `graft` found.

    `data` has the dimensions file (train: the examples that chose the mask), mask (graft, the masks beside it, "with
    NAME": joined with another graft), level (the sparsity of the base mask), example, step, matrix, head, and

    - accuracy, logprob, confidence, agreement (file, mask, level, example); base_M, tuned_M, blocks_M (file, example):
      of the base, the tuned model, and the base with all of the blocks' update. Random masks are averaged;
    - entries (mask, level), entries_by_weight (mask, level, matrix), head_entries (level, matrix, head): where the
      mask lies; count, delta_norm, delta_sum, sensitivity (matrix), head_delta_norm (matrix, head): of all entries;
    - search_metric, search_loss, search_entries, search_train_loss (level, step), search_best, search_rate (level);
    - shared (graft, other), size (graft): entries in common with other grafts.
    """

    kind = "grafting"

    @property
    def metric(self) -> str:
        """The one by which masks were chosen and Rel is taken."""
        return self.data.attrs["metric"]

    @property
    def files(self) -> list[str]:
        return [str(f) for f in self.data.file.values]

    @property
    def methods(self) -> list[str]:
        return [str(m) for m in self.data.mask.values]

    @property
    def levels(self) -> list[float]:
        """The sparsities of the base masks."""
        return [float(v) for v in self.data.level.values]

    @property
    def held_out(self) -> str:
        """The first file that was held out; "train" where there is none."""
        return self.files[1] if len(self.files) > 1 else "train"

    @property
    def concentration(self) -> float:
        """(Σ|Δ|)²/(N·Σ Δ²) over the blocks: 1 where all entries moved alike, 2/π for normal numbers, → 0 for few."""
        return float(self.data.attrs["concentration"])

    @property
    def is_dense(self) -> bool:
        """Whether the update is spread so evenly that localisation is not to be expected."""
        return self.concentration > EVEN

    def share(self, method: str = "graft", level: float | None = None) -> float:
        """Entries of the mask, of all entries of the blocks."""
        return float(self._entries(method, level)) / int(self.data.attrs["entries"])

    def _level(self, level: float | None) -> float:
        """The sparsity asked for, or the largest.

        Raises:
            InputError: it was not searched.
        """
        if level is not None and level not in self.levels:
            raise InputError(f"no search started from {level:g}; there are {', '.join(f'{v:g}' for v in self.levels)}")
        return self.levels[-1] if level is None else level

    def _file(self, file: str | None) -> str:
        """The file asked for, or the first held out.

        Raises:
            InputError: it was not measured.
        """
        if file is not None and file not in self.files:
            raise InputError(f"nothing was measured on {file!r}; there are {', '.join(self.files)}")
        return self.held_out if file is None else file

    def _entries(self, method: str, level: float | None) -> float:
        level = self._level(level)
        return float(self.data.entries.sel(mask=method, level=level))

    def values(self, name: str, *, file: str, method: str, level: float | None = None) -> np.ndarray:
        """(example,) of accuracy, logprob, confidence or agreement; method may be base, tuned or blocks."""
        file = self._file(file)
        if method in ("base", "tuned", "blocks"):
            return self.data[f"{method}_{name}"].sel(file=file).values.astype(float)
        level = self._level(level)
        return self.data[name].sel(file=file, mask=method, level=level).transpose("example").values.astype(float)

    def gap(self, file: str) -> dict[str, float]:
        """The metric of base and tuned model, and their paired difference with its interval."""
        base, tuned = (self.values(self.metric, file=file, method=side) for side in ("base", "tuned"))
        low, high = stats.interval_of_mean(tuned - base)
        return {
            "base": float(np.nanmean(base)), "tuned": float(np.nanmean(tuned)),
            "difference": float(np.nanmean(tuned - base)), "low": float(low), "high": float(high),
        }  # fmt: skip

    def recovery(self, *, file: str, method: str = "graft", level: float | None = None) -> tuple[float, float, float]:
        """Rel = (P_γ − P_0)/(P_1 − P_0) and its interval; NaN where the interval of P_1 − P_0 covers 0."""
        base, tuned, mine = (
            self.values(self.metric, file=file, method=m, level=level) for m in ("base", "tuned", method)
        )
        return tuple(float(x) for x in stats.interval_of_ratio(mine - base, tuned - base))

    def calibration(self, *, file: str, method: str, level: float | None = None) -> "tuple[pd.DataFrame, float]":
        """Reliability curve (confidence, accuracy, examples by bin) and expected calibration error; texts have none."""
        import pandas as pd

        said, right = (self.values(n, file=file, method=method, level=level) for n in ("confidence", "accuracy"))
        curve, error = stats.calibration(said, right)
        return pd.DataFrame(curve, columns=["confidence", "accuracy", "examples"]), error

    @cached_property
    def _gaps(self) -> dict[str, dict[str, float]]:
        return {file: self.gap(file) for file in self.files}

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        masks: list[tuple[str, float | None]] = []
        for level in self.levels:
            masks += [(method, level) for method in self.methods if not np.isnan(self._entries(method, level))]
        masks.append(("blocks", None))
        rows = []
        for file in self.files:
            found = [self.values(self.metric, file=file, method=method, level=level) for method, level in masks]
            base, tuned = (self.values(self.metric, file=file, method=side) for side in ("base", "tuned"))
            # at once: the resamples are those of the examples, whatever the mask
            rel = np.transpose(stats.interval_of_ratio(np.stack(found) - base, tuned - base))
            for (method, level), metric, three in zip(masks, found, rel.tolist(), strict=True):
                at = {"file": file, "level": np.nan if level is None else level}
                rows.append(at | self._row(file, method, level, metric, three))
        return pd.DataFrame(rows)

    def _row(
        self, file: str, method: str, level: float | None, metric: np.ndarray, recovery: list[float]
    ) -> dict[str, Any]:
        whole, gap = method == "blocks", self._gaps[file]
        rel, low, high = recovery
        agreed = self.values("agreement", file=file, method=method, level=level)
        return {
            "method": "all of the blocks" if whole else method,
            "entries": int(self.data.attrs["entries"]) if whole else round(self._entries(method, level)),
            "share": 1.0 if whole else self.share(method, level),
            "metric": float(np.nanmean(metric)), "base": gap["base"], "tuned": gap["tuned"],
            "recovery": rel, "recovery_low": low, "recovery_high": high,
            "agreement": float(np.nanmean(agreed)),
            "ece": self.calibration(file=file, method=method, level=level)[1],
        }  # fmt: skip

    def to_frame(self) -> "pd.DataFrame":
        """A row a file, sparsity and mask: entries, metric, Rel and its interval, agreement with the tuned, ECE."""
        return self._frame.copy()

    def table(self, *, file: str | None = None, level: float | None = None) -> "pd.DataFrame":
        """The rows of one file (the first held out) and sparsity (the largest)."""
        frame, level = self._frame, self._level(level)
        chosen = frame[(frame["file"] == self._file(file)) & ((frame["level"] == level) | frame["level"].isna())]
        return chosen.drop(columns=["file", "level"]).reset_index(drop=True)

    def where(self, by: str = "component", *, method: str = "graft", level: float | None = None) -> "pd.DataFrame":
        """Where the mask lies, by `component`, `layer`, `matrix`: its share there, that of all entries and of ‖Δ‖²."""
        level = self._level(level)
        if np.isnan(self.data.entries_by_weight.sel(mask=method, level=level)).all():
            raise InputError(
                f"where the mask {method!r} lies was not kept; of {', '.join(self.methods)} those of one graft are"
            )
        frame = self.data[["count", "delta_norm"]].to_dataframe().reset_index()
        frame["entries"] = self.data.entries_by_weight.sel(mask=method, level=level).values
        frame["energy"] = frame["delta_norm"] ** 2
        sums = frame.groupby(by, sort=False)[["entries", "count", "energy"]].sum()
        found = sums[["entries"]].copy()
        found["density"] = sums["entries"] / sums["count"]
        for name, source in (
            ("share_of_mask", "entries"),
            ("share_of_entries", "count"),
            ("share_of_update", "energy"),
        ):
            found[name] = sums[source] / sums[source].sum()
        return found.reset_index()

    def heads(self, *, level: float | None = None) -> "pd.DataFrame":
        """By layer, component (q, k, v, o) and head: density of the graft and ‖Δ‖; empty where heads are not known."""
        import pandas as pd

        if "head_entries" not in self.data:
            return pd.DataFrame(columns=["layer", "component", "head", "entries", "density", "delta_norm"])
        level = self._level(level)
        frame = self.data[["head_delta_norm"]].to_dataframe(dim_order=["matrix", "head"]).reset_index()
        frame["entries"] = self.data.head_entries.sel(level=level).transpose("matrix", "head").values.ravel()
        heads = self.data.head_delta_norm.transpose("matrix", "head").notnull().sum("head").values
        frame["density"] = frame["entries"] / np.repeat(
            self.data["count"].values / np.maximum(heads, 1), self.data.sizes["head"]
        )
        frame = frame.rename(columns={"head_delta_norm": "delta_norm"}).dropna(subset=["delta_norm"])
        return frame[["matrix", "layer", "component", "head", "entries", "density", "delta_norm"]].reset_index(
            drop=True
        )

    def overlap(self) -> "pd.DataFrame":
        """Of every two grafts: shared entries, |i∩j|/|j|, what chance gives (|i|/N), and P(at least as many by chance).

        Chance is a random mask of the same size over all entries of the blocks: hypergeometric.
        """
        import pandas as pd
        from scipy.stats import hypergeom

        if "shared" not in self.data:
            return pd.DataFrame(columns=["graft", "other", "shared", "overlap", "chance", "p_value"])
        total, sizes = int(self.data.attrs["entries"]), self.data["size"].values
        names = [str(n) for n in self.data.graft.values]
        shared = self.data.shared.transpose("graft", "other").values
        rows = []
        for i, one in enumerate(names):
            for j, other in enumerate(names):
                if i != j:
                    rows.append(
                        {
                            "graft": one, "other": other, "shared": int(shared[i, j]),
                            "overlap": shared[i, j] / sizes[j] if sizes[j] else np.nan, "chance": sizes[i] / total,
                            "p_value": float(hypergeom.sf(shared[i, j] - 1, total, sizes[i], sizes[j])),
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows)

    def smallest(self, target: float = 0.95, *, file: str | None = None, method: str = "graft") -> float:
        """The smallest share of entries at which Rel reaches `target`, of those tried; NaN where none does."""
        frame = self._frame[(self._frame["file"] == self._file(file)) & (self._frame["method"] == method)]
        reached = frame[frame["recovery"] >= target]
        return float(reached["share"].min()) if len(reached) else np.nan

    def along_search(self) -> "pd.DataFrame":
        """A row a level and step of the search: entries, their share, and Rel of the rounded mask.

        On the examples that choose among these masks: not held out.
        """
        import pandas as pd

        gap, frames = self.gap("train"), []
        for level in self.levels:
            at = self.data.sel(level=level)
            entries, metric = at.search_entries.values, at.search_metric.values
            rel = (metric - gap["base"]) / gap["difference"] if gap["low"] * gap["high"] > 0 else np.nan
            columns = {"level": level, "step": np.arange(len(entries)), "entries": entries}
            columns |= {"share": entries / int(self.data.attrs["entries"]), "metric": metric, "recovery": rel}
            frames.append(pd.DataFrame(columns | {"kept": np.arange(len(entries)) == int(at.search_best)}))
        return pd.concat(frames, ignore_index=True).dropna(subset=["entries"])

    def curves(self, file: str | None = None) -> list[Curve]:
        """Share of entries against the metric: a curve a method, with what all of the blocks give as its end."""
        file = self._file(file)
        base, tuned, whole = (self.values(self.metric, file=file, method=m) for m in ("base", "tuned", "blocks"))
        found = []
        for method in self.methods:
            levels = [v for v in self.levels if not np.isnan(self._entries(method, v))]
            if method.startswith("with "):
                continue
            levels.sort(key=lambda v, m=method: self.share(m, v))
            values = [self.values(self.metric, file=file, method=method, level=v) for v in levels]
            found.append(
                Curve(
                    method, "parameters", np.array([*(self.share(method, v) for v in levels), 1.0]),
                    np.stack([*values, whole]), base, tuned, [*(f"{v:g}" for v in levels), "all of the blocks"],
                )
            )  # fmt: skip
        return found

    def headline(self) -> dict[str, Any]:
        """Of the first held-out file: the gap, the table, the smallest share that recovers 95 %, how dense Δ is."""
        rows = {
            f"{level:g}": {
                row.pop("method"): {k: None if v != v else v for k, v in row.items()}
                for row in self.table(level=level).to_dict("records")
            }
            for level in self.levels
        }
        smallest = self.smallest()
        return {
            "file": self.held_out, "metric": self.metric, "gap": self.gap(self.held_out), "levels": rows,
            "share_at_95": None if np.isnan(smallest) else smallest,
            "concentration": self.concentration, "dense": self.is_dense, "notes": self.provenance.get("notes", []),
        }  # fmt: skip

    def summary(self) -> str:
        """How much is recovered, by what, where it lies, and what to be wary of."""
        file, data = self.held_out, self.data
        gap = self.gap(file)
        total = int(data.attrs["entries"])
        lines = [
            f"{METRIC[self.metric]} on {file}: base {gap['base']:.3g}, tuned {gap['tuned']:.3g}, difference "
            f"{gap['difference']:+.3g}{ends(gap['low'], gap['high'])}"
        ]
        if gap["low"] <= 0 <= gap["high"]:
            lines.append("  the interval covers 0: recovery is undefined")
        whole = self._frame[(self._frame["file"] == file) & (self._frame["method"] == "all of the blocks")].iloc[0]
        lines.append(f"all {total:,} entries of the blocks recover {_interval(whole)}")
        for level in self.levels:
            table = self.table(level=level).set_index("method")
            row = table.loc["graft"]
            lines.append(
                f"graft from the largest {level:g} of |Δ|: {row['entries']:,.0f} entries ({row['share']:.2g} of the "
                f"blocks) recover {_interval(row)}; agreement with the tuned model {row['agreement']:.2f}"
            )
            if row["recovery"] > 1 and row["agreement"] < ALIKE:
                lines.append("  more than the tuned model's own gain, and by other predictions: it is not that model")
            beside = [m for m in table.index if m not in ("graft", "all of the blocks") and not m.startswith("with ")]
            if beside:
                shown = ", ".join(f"{m} {_interval(table.loc[m])}" for m in beside)
                lines.append(f"  as many entries otherwise: {shown}")
            for name in (m for m in table.index if m.startswith("with ")):
                lines.append(
                    f"  {name}: {table.loc[name, 'entries']:,.0f} entries recover {_interval(table.loc[name])}"
                )
        ending = f", the graft from {self.levels[-1]:g}" if len(self.levels) > 1 else ""
        for other in self.files[2:]:
            gap, row = self._gaps[other], self.table(file=other).set_index("method").loc["graft"]
            lines.append(
                f"on {other}{ending}: base {gap['base']:.3g}, tuned {gap['tuned']:.3g}, graft {row['metric']:.3g}, "
                f"recovery {_interval(row)}; agreement with the tuned model {row['agreement']:.2f}"
            )
        part = self.where("component").sort_values("share_of_mask", ascending=False).head(3)
        lines.append(
            f"where it lies{ending}: "
            + ", ".join(
                f"{r['component']} {r['share_of_mask']:.0%} (of all entries {r['share_of_entries']:.0%})"
                for r in part.to_dict("records")
            )
        )
        errors = {m: self.calibration(file=file, method=m)[1] for m in ("base", "tuned", "graft")}
        if not np.isnan(errors["graft"]):
            lines.append(f"calibration error{ending}: " + ", ".join(f"{m} {e:.3f}" for m, e in errors.items()))
        for row in self.overlap().to_dict("records"):
            if row["graft"] == "this":
                lines.append(
                    f"overlap with {row['other']}: {row['overlap']:.3f} of it is in this graft, chance "
                    f"{row['chance']:.3g} ({_p(row['p_value'])})"
                )
        last = data.search_metric.notnull().sum("step").values - 1
        tuned, found = self.gap("train")["tuned"], data.search_metric.max("step").values
        searches = zip(self.levels, last, data.search_best.values, found, strict=True)
        rising = [v for v, n, best, metric in searches if n and n == best and metric < tuned]
        if rising:
            lines.append(
                f"the last step of the search from {', '.join(f'{v:g}' for v in rising)} was its best: more steps may "
                "recover more, with more entries"
            )
        if self.is_dense:
            lines.append(
                f"warning: Δ is spread over all entries (concentration (Σ|Δ|)²/(N·ΣΔ²) = {self.concentration:.2f}; 1 "
                "where all moved alike, 0.64 for normal numbers, near 0 where few did): localisation in few entries is "
                "not to be expected. So train LoRA, and AdamW, to which the paper adds an ℓ1 penalty on Δ (weight 1e-3)"
            )
        else:
            lines.append(
                f"concentration of Δ, (Σ|Δ|)²/(N·ΣΔ²): {self.concentration:.2g}; from {EVEN:g} on, localisation in few "
                "entries would not be expected"
            )
        lines += caution(int(np.isfinite(self.values(self.metric, file=file, method="base")).sum()))
        lines += [str(note) for note in self.provenance.get("notes", [])]
        return "\n".join(lines)


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value > 1e-300 else "p < 1e-300"


def _interval(row: "pd.Series | dict[str, Any]") -> str:
    if np.isnan(row["recovery"]):
        return "(undefined)"
    return f"{row['recovery']:.2f}{ends(row['recovery_low'], row['recovery_high'], '.2f')}"
