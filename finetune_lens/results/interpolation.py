"""What lies between a base and a tuned model."""

from collections.abc import Sequence
from functools import cached_property
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

SHOWN = 12  # groups in the summary
BARRIER = ("barrier", "excess", "alpha", "low", "high", "at_alpha_low", "at_alpha_high", "verdict")
# Variable → the columns that say which model a row is of.
VARIABLES = {
    "path": ("alpha",), "scaling": ("group", "context", "group_alpha"), "splits": ("side", "cut"),
    "halves": ("half",), "kinds": ("kind",),
}  # fmt: skip


class Interpolation(Result):
    """What `interpolate` measured: accuracy and logprob (−loss, nats) of every example, by metric and file.

    `data` has the dimensions metric, file, example (NaN behind the last of a shorter file), weight, and

    - ends (metric, end, file, example): the base (end 0) and the tuned model (end 1);
    - path (metric, alpha, …): θ0 + αΔ;
    - scaling (metric, group, context, group_alpha, …): γ = α in the group, and in the rest 0 (context "base") or 1
      ("tuned");
    - splits (metric, side, cut, …): the tuned model from layer `cut` on (side "above"), or below it ("below"), the base
      in the rest; embeddings are below, final norm and unembedding above;
    - halves (metric, half, …), kinds (metric, kind, …): the tuned model with half of the parameter kinds of each block,
      or one component in all blocks, back at the base; was_reset (half, weight): which;
    - perturbed (metric, sharpness_alpha, layer, draw, …), unperturbed (metric, sharpness_alpha, …);
    - layer_of (−1 outside the blocks), component_of, parameters, update_square (‖Δ‖²) (weight).

    Intervals are 95 % percentile bootstrap over examples, all models on the same draws. Shares of parameters are of
    those in weights that the update changes. `recovery` is the share of the gain, tuned − base: NaN where the interval
    of the gain covers 0.
    """

    kind = "interpolation"

    @property
    def files(self) -> list[str]:
        """The first is the task."""
        return [str(f) for f in self.data["file"].values]

    @property
    def by(self) -> str:
        """What the groups are; "" where none were scaled."""
        return str(self.data.attrs["by"])

    def has(self, variable: str) -> bool:
        return variable in self.data

    def main_metric(self, file: str | None = None) -> str:
        """What is shown of a file: of texts logprob, else accuracy."""
        return "logprob" if str(self.data["objective"].sel(file=self._file(file)).item()) == "text" else "accuracy"

    def values(self, variable: str, metric: str | None = None, file: str | None = None) -> np.ndarray:
        """A variable as (…, example) of one metric and file.

        Raises:
            InputError: a part that was not measured, another metric, or no such file.
        """
        self._require(variable)
        metric, file = metric or self.main_metric(file), self._file(file)
        if metric not in self.data["metric"].values:
            raise InputError(f"metric is one of {', '.join(self.data['metric'].values)}; found {metric!r}")
        found = self.data[variable].sel(metric=metric, file=file).transpose(..., "example").values
        return found[..., : int(self.data["examples"].sel(file=file))]

    def gain(self) -> "pd.DataFrame":
        """By file and metric: base, tuned, and their difference with its interval."""
        import pandas as pd

        rows = []
        for file, metric in self._each():
            base, tuned = self.values("ends", metric, file)
            row = {"file": file, "metric": metric, "base": base.mean(), "tuned": tuned.mean()}
            rows.append(row | _interval("gain", tuned - base))
        return pd.DataFrame(rows)

    def path(self) -> "pd.DataFrame":
        """By file, metric and α: mean with interval, and share of the gain."""
        return self._means("path")

    def barrier(self) -> "pd.DataFrame":
        """By file and measure (loss, error): max over α in [0, 1] of L(α) − ((1−α)L(0) + αL(1)), and where it is.

        `excess` leaves the ends out, at which it is 0: it is below 0 where all of the path lies under its chord. A
        maximum over a grid is biased upward: noise alone lifts some α above the chord, and resampling lifts it again.
        So `low` and `high` are the largest ends of the simultaneous 95 % band over all α (its width from the largest
        standardised deviation of each resample), and the verdict is "barrier" only where `low` is above 0.
        `at_alpha_low` and `at_alpha_high` are the interval at `alpha` alone, as if it had been chosen beforehand.
        """
        import pandas as pd

        alphas = self._ticks("path", "alpha")
        inner = np.flatnonzero((alphas > 0) & (alphas < 1))
        rows = []
        for file in self.files:
            for measure, metric in (("loss", "logprob"), ("error", "accuracy")):
                row: dict[str, Any] = {"file": file, "measure": measure} | dict.fromkeys(BARRIER, np.nan)
                if len(inner):
                    row |= _barrier(-self._excess(metric, file)[inner], alphas[inner])
                rows.append(row)
        return pd.DataFrame(rows)

    def _excess(self, metric: str, file: str) -> np.ndarray:
        """(alpha, example): the path above the chord between its ends."""
        base, tuned = self.values("ends", metric, file)
        alphas = self._ticks("path", "alpha")[:, None]
        return self.values("path", metric, file) - ((1 - alphas) * base + alphas * tuned)

    def importance(self) -> "pd.DataFrame":
        """By file, metric and group: what its update brings alone, and what is lost without it.

        alone = metric(base + Δ_G) − metric(base); without = metric(tuned) − metric(tuned − Δ_G); each with interval and
        as a share of the gain; and the group's share of the parameters and of ‖Δ‖².
        """
        import pandas as pd

        self._require("scaling")
        groups, alphas = self._ticks("scaling", "group"), list(self._ticks("scaling", "group_alpha"))
        contexts = list(self._ticks("scaling", "context"))
        members = self.data["group_of"].values
        rows = []
        for file, metric in self._each():
            base, tuned = self.values("ends", metric, file)
            measured = self.values("scaling", metric, file)
            effects = {
                "alone": measured[:, contexts.index("base"), alphas.index(1.0)] - base,
                "without": tuned - measured[:, contexts.index("tuned"), alphas.index(0.0)],
            }
            columns = {"file": file, "metric": metric, "group": groups}
            columns["parameters"] = [self.share(members == g) for g in groups]
            columns["update"] = [self._update_share(members == g) for g in groups]
            for name, effect in effects.items():
                columns |= _interval(name, effect) | _recovery(f"{name}_recovery", effect, tuned - base)
            rows.append(pd.DataFrame(columns))
        return pd.concat(rows, ignore_index=True)

    def scaling(self) -> "pd.DataFrame":
        """By file, metric, group, context and α: mean with interval, and share of the gain."""
        return self._means("scaling").rename(columns={"group_alpha": "alpha"})

    def splits(self) -> "pd.DataFrame":
        """By file, metric, side and cut: share of the parameters that are the tuned model's; mean, interval, share of
        the gain."""
        frame = self._means("splits")
        shares = [self.share(self._tuned_in_split(s, c)) for s, c in zip(frame["side"], frame["cut"], strict=True)]
        frame.insert(4, "parameters", shares)
        return frame

    def resets(self) -> "pd.DataFrame":
        """By file, metric and what is reset: share of the parameters that are reset; mean, interval, share of the gain
        that is left, and change against the tuned model.

        `what` is a component, "half 0", "half 1" …, or "halves": the mean over those, with the standard deviation of
        their means as `spread`.
        """
        import pandas as pd

        self._require("kinds")
        kinds, members = self._ticks("kinds", "kind"), self.data["component_of"].values
        was = self.data["was_reset"].transpose("half", "weight").values
        what = ["halves", *(f"half {i}" for i in self._ticks("halves", "half")), *kinds]
        shares = [self.share(row) for row in was]
        shares = [float(np.mean(shares)), *shares, *(self.share(members == kind) for kind in kinds)]
        frames = []
        for file, metric in self._each():
            base, tuned = self.values("ends", metric, file)
            halves = self.values("halves", metric, file)
            values = np.concatenate([halves.mean(0)[None], halves, self.values("kinds", metric, file)])
            columns = {"file": file, "metric": metric, "what": what, "parameters": shares}
            columns |= _interval("mean", values) | _recovery("recovery", values - base, tuned - base)
            columns |= _interval("change", values - tuned)
            spread = halves.mean(1).std(ddof=1) if len(halves) > 1 else np.nan
            frames.append(pd.DataFrame(columns | {"spread": [spread] + [np.nan] * (len(what) - 1)}))
        return pd.concat(frames, ignore_index=True)

    def sharpness(self) -> "pd.DataFrame":
        """By file, α and layer: S_ℓ(α), mean over the draws, with its interval over examples; the standard error over
        draws beside it."""
        import pandas as pd

        self._require("perturbed")
        alphas, layers = (self._ticks("perturbed", d) for d in ("sharpness_alpha", "layer"))
        frames = []
        for file in self.files:
            rise = self._rise(file)
            mean = rise.mean(2)
            index = pd.MultiIndex.from_product([alphas, layers], names=["alpha", "layer"])
            columns = {k: np.ravel(v) for k, v in _interval("sharpness", mean).items()}
            draws = rise.shape[2]
            error = rise.mean(3).std(2, ddof=1) / np.sqrt(draws) if draws > 1 else np.full(mean.shape[:2], np.nan)
            frame = pd.DataFrame(columns | {"draw_error": error.ravel()}, index=index).reset_index()
            frame.insert(0, "file", file)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def _rise(self, file: str | None) -> np.ndarray:
        """(alpha, layer, draw, example): the loss that a perturbation adds."""
        return self.values("unperturbed", "logprob", file)[:, None, None] - self.values("perturbed", "logprob", file)

    def share(self, chosen: np.ndarray) -> float:
        """Of the parameters in weights that the update changes, those in the `chosen` (weight,) ones."""
        counts = np.where(self.data["update_square"].values > 0, self.data["parameters"].values, 0)
        return float(counts[np.asarray(chosen)].sum() / counts.sum()) if counts.sum() else np.nan

    def _update_share(self, chosen: np.ndarray) -> float:
        squares = self.data["update_square"].values
        return float(squares[chosen].sum() / squares.sum()) if squares.sum() else np.nan

    def _tuned_in_split(self, side: str, cut: int) -> np.ndarray:
        """(weight,) which ones are the tuned model's."""
        layer = self.data["layer_of"].values
        below = np.where(layer < 0, self.data["lower"].values, layer < cut)
        return below if side == "below" else ~below

    def curves(self, file: str | None = None, metric: str | None = None) -> list[Curve]:
        """What was measured as a metric against the share of the parameters that is moved into the base."""
        base, tuned = self.values("ends", metric, file)
        found = []

        def add(
            method: str, shares: Sequence[float], values: np.ndarray, labels: Sequence[str], alternatives: bool = False
        ) -> None:
            order = np.argsort(shares, kind="stable")
            shares, labels = np.asarray(shares, dtype=float)[order], [labels[i] for i in order]
            found.append(Curve(method, "parameters", shares, values[order], base, tuned, labels, alternatives))

        if self.has("path"):
            alphas = self._ticks("path", "alpha")
            kept = (alphas >= 0) & (alphas <= 1)
            values = self.values("path", metric, file)[kept]
            add("interpolation", alphas[kept], values, [f"α = {a:g}" for a in alphas[kept]])
        if self.has("splits"):
            cuts, values = self._ticks("splits", "cut"), self.values("splits", metric, file)
            for row, side in enumerate(self._ticks("splits", "side")):
                shares = [self.share(self._tuned_in_split(side, cut)) for cut in cuts]
                words = {"above": "from layer {} on", "below": "below layer {}"}[side]
                add(f"layers swapped from {side}", shares, values[row], [words.format(cut) for cut in cuts])
        if self.has("scaling"):
            groups, alphas = self._ticks("scaling", "group"), list(self._ticks("scaling", "group_alpha"))
            values, members = self.values("scaling", metric, file), self.data["group_of"].values
            shares = np.array([self.share(members == g) for g in groups])
            add(f"one {self.by}", shares, values[:, 0, alphas.index(1.0)], list(groups), alternatives=True)
            without = [f"without {g}" for g in groups]
            all_but_one = values[:, 1, alphas.index(0.0)]
            add(f"all but one {self.by}", 1 - shares, all_but_one, without, alternatives=True)
        if self.has("halves"):
            was = self.data["was_reset"].transpose("half", "weight").values
            labels = [f"half {i}" for i in self._ticks("halves", "half")]
            shares, values = [1 - self.share(row) for row in was], self.values("halves", metric, file)
            add("half reset", shares, values, labels, alternatives=True)
        return found

    def to_frame(self) -> "pd.DataFrame":
        """One row a file, metric and model: which part it is of, where in it, mean with interval, share of the gain;
        and the sharpness, whose mean is the loss added."""
        return self._frame.copy()

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        frames = [self._means(name).assign(part=name) for name in ("ends", *VARIABLES) if self.has(name)]
        if self.has("perturbed"):
            names = {"sharpness": "mean", "sharpness_low": "low", "sharpness_high": "high"}
            frames.append(self.sharpness().rename(columns=names).assign(part="sharpness", metric="loss"))
        frame = pd.concat(frames, ignore_index=True)
        frame["alpha"] = frame.get("alpha", np.nan)
        for own in ("group_alpha", "end"):
            if own in frame:
                frame["alpha"] = frame["alpha"].fillna(frame.pop(own))
        first = [c for c in ("part", "file", "metric", "alpha") if c in frame]
        last = [c for c in ("mean", "low", "high", "recovery", "recovery_low", "recovery_high") if c in frame]
        return frame[[*first, *(c for c in frame if c not in {*first, *last}), *last]]

    def _means(self, variable: str) -> "pd.DataFrame":
        import pandas as pd

        names = {"ends": ("end",), **VARIABLES}[variable]
        index = pd.MultiIndex.from_product([self._ticks(variable, name) for name in names], names=names)
        frames = []
        for file, metric in self._each():
            values = self.values(variable, metric, file)
            base, tuned = self.values("ends", metric, file)
            columns = _interval("mean", values) | _recovery("recovery", values - base, tuned - base)
            columns = {name.removeprefix("mean_"): np.ravel(column) for name, column in columns.items()}
            frame = pd.DataFrame(columns, index=index).reset_index()
            frame.insert(0, "file", file)
            frame.insert(1, "metric", metric)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def _each(self) -> list[tuple[str, str]]:
        return [(file, str(metric)) for file in self.files for metric in self.data["metric"].values]

    def _ticks(self, variable: str, dim: str) -> np.ndarray:
        self._require(variable)
        return self.data[dim].values

    def _file(self, file: str | None) -> str:
        if file is not None and file not in self.files:
            raise InputError(f"there is no file {file!r}; there are {', '.join(self.files)}")
        return self.files[0] if file is None else file

    def _require(self, variable: str) -> None:
        part = {"scaling": "groups", "kinds": "reset", "halves": "reset", "perturbed": "sharpness"}
        if not self.has(variable):
            raise InputError(f"the part {part.get(variable, variable)} was not measured")

    def headline(self) -> dict[str, Any]:
        """Gain, barrier, and what was measured of the task's main metric."""
        found: dict[str, Any] = {
            "examples": {f: int(n) for f, n in zip(self.files, self.data["examples"].values, strict=True)}
        }
        found["gain"] = [jsonable(row) for row in self.gain().to_dict("records")]
        tables = {"path": self.barrier, "scaling": self.importance, "splits": self.splits, "kinds": self.resets}
        named = {"path": "barrier", "scaling": "importance", "kinds": "resets"}
        for variable, table in tables.items():
            if self.has(variable):
                rows = table()
                if "metric" in rows:
                    rows = rows[(rows["file"] == self.files[0]) & (rows["metric"] == self.main_metric())]
                found[named.get(variable, variable)] = [jsonable(row) for row in rows.to_dict("records")]
        if self.has("perturbed"):
            found["sharpness"] = [jsonable(row) for row in self.sharpness().to_dict("records")]
        return found

    def summary(self) -> str:
        """The gain, the barrier, and which part of the update carries the gain."""
        lines = []
        gain = self.gain().set_index(["file", "metric"])
        for file in self.files:
            metric, count = self.main_metric(file), int(self.data["examples"].sel(file=file))
            row = gain.loc[(file, metric)]
            lines.append(
                f"{file}, {count} examples: {metric} base {row['base']:.3g}, tuned {row['tuned']:.3g}, "
                f"gain {row['gain']:+.3g}{ends(row['gain_low'], row['gain_high'])}"
            )
            if row["gain_low"] <= 0 <= row["gain_high"] or np.isnan(row["gain_low"]):
                lines.append(f"  the gain on {file} is not clear of 0: shares of it are undefined")
        if not self.data["update_square"].values.any():
            lines.append("the two models are identical: every model between them is the base")
        if self.has("path"):
            lines += self._about_path()
        if self.has("scaling"):
            lines += self._about_groups()
        for text in (self._about_splits, self._about_resets, self._about_sharpness):
            lines += text()
        lines += caution(min(int(self.data["examples"].sel(file=file)) for file in self.files))
        return "\n".join([*lines, *map(str, self.provenance.get("notes", []))])

    def _about_path(self) -> list[str]:
        path, lines = self.path(), []
        for file in self.files:
            part = path[(path["file"] == file) & (path["metric"] == self.main_metric(file))].dropna(subset="mean")
            if len(part):
                best = part[part["mean"] == part["mean"].max()]
                more = f" and {len(best) - 1} more" if len(best) > 1 else ""
                best = best.loc[best["alpha"].abs().idxmin()]
                lines.append(f"{file}: best on the path at α = {best['alpha']:g}{more}, {_ends(best, 'mean', '')}")
        for row in self.barrier().query("measure == 'loss'").to_dict("records"):
            if np.isfinite(row["barrier"]):
                lines.append(
                    f"{row['file']}: loss barrier {row['barrier']:.3g} nats; {row['excess']:+.3g} above the chord at "
                    f"α = {row['alpha']:g}, simultaneous 95 % [{row['low']:.3g}, {row['high']:.3g}]: {row['verdict']}"
                )
        return lines

    def _about_groups(self) -> list[str]:
        lines, frame = [], self.importance()
        for file in self.files:
            metric = self.main_metric(file)
            rows = frame[(frame["file"] == file) & (frame["metric"] == metric)]
            if len(rows) > SHOWN:
                size = rows[["alone", "without"]].abs().max(axis=1)
                rows = rows.loc[size.sort_values(ascending=False, kind="stable").index[:SHOWN]]
            head = [f"{file}, {metric} by {self.by}", "alone", "95 %", "lost without", "95 %", "parameters", "‖Δ‖²"]
            table = [
                [
                    r["group"],
                    *_signed(r, "alone"),
                    *_signed(r, "without"),
                    *("–" if np.isnan(r[name]) else f"{r[name]:.1%}" for name in ("parameters", "update")),
                ]
                for r in rows.to_dict("records")
            ]
            lines += aligned(head, table)
        return lines

    def _about_splits(self) -> list[str]:
        if not self.has("splits"):
            return []
        frame, lines = self.splits(), []
        words = {"above": "from layer ℓ on", "below": "below layer ℓ"}
        for side, word in words.items():
            rows = frame[
                (frame["file"] == self.files[0]) & (frame["metric"] == self.main_metric()) & (frame["side"] == side)
            ]
            shown = ", ".join(f"{row['cut']}: {row['mean']:.3g}" for row in rows.to_dict("records"))
            lines.append(f"{self.files[0]}, {self.main_metric()}, tuned {word}, ℓ = {shown}")
        return lines

    def _about_resets(self) -> list[str]:
        if not self.has("kinds"):
            return []
        frame = self.resets()
        rows = frame[(frame["file"] == self.files[0]) & (frame["metric"] == self.main_metric())].set_index("what")
        half, kinds = rows.loc["halves"], rows.loc[self._ticks("kinds", "kind")]
        number = self.data.sizes["half"]
        spread = f" (standard deviation {half['spread']:.2g})" if number > 1 else ""
        shown = ", ".join(f"{what} {row['mean']:.3g}" for what, row in kinds.iterrows())
        return [
            f"half of the kinds of every block reset, mean of {number}: {_ends(half, 'mean', 'mean_')}{spread}",
            f"reset everywhere: {shown}",
        ]

    def _about_sharpness(self) -> list[str]:
        if not self.has("perturbed"):
            return []
        frame = self.sharpness()
        frame = frame[frame["file"] == self.files[0]]
        lines = []
        for alpha, rows in frame.groupby("alpha"):
            shown = ", ".join(f"{row['sharpness']:.2g}" for row in rows.to_dict("records"))
            lines.append(f"sharpness at α = {alpha:g} of layers 0, 1, … (ρ = {self.data.attrs['rho']:g}): {shown} nats")
        return lines


def _barrier(excess: np.ndarray, alphas: np.ndarray) -> dict[str, Any]:
    """Of the loss above the chord (alpha, example), at the α between the ends."""
    means = excess.mean(1)
    if np.isnan(means).any() or excess.shape[1] < 2:
        return {}
    drawn = stats.resampled_means(excess)
    error = drawn.std(1)
    moved = error > 0
    apart = np.abs(drawn - means[:, None])[moved] / error[moved, None]
    reach = np.quantile(apart.max(0, initial=0), stats.LEVEL) * error  # of the band that holds all α at once
    at, low, high = int(means.argmax()), float((means - reach).max()), float((means + reach).max())
    alone = stats.interval_of_mean(excess[at])
    found = {"barrier": float(max(means[at], 0)), "excess": float(means[at]), "alpha": float(alphas[at])}
    found |= {"low": low, "high": high, "at_alpha_low": float(alone[0]), "at_alpha_high": float(alone[1])}
    return found | {"verdict": "barrier" if low > 0 else "no barrier on this grid" if high <= 0 else "no barrier shown"}


def _interval(name: str, values: np.ndarray) -> dict[str, Any]:
    """Mean over the last axis under `name`, and the ends of its interval; NaN where an example is."""
    mean = values.mean(-1)
    low, high = (np.where(np.isnan(mean), np.nan, end)[()] for end in stats.interval_of_mean(values))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _recovery(name: str, effect: np.ndarray, gain: np.ndarray) -> dict[str, Any]:
    broken = np.isnan(effect.mean(-1))
    ratio, low, high = (np.where(broken, np.nan, x)[()] for x in stats.interval_of_ratio(effect, gain))
    return {name: ratio, f"{name}_low": low, f"{name}_high": high}


def _ends(row: Any, name: str, prefix: str) -> str:
    return f"{row[name]:.3g}{ends(row[f'{prefix}low'], row[f'{prefix}high'])}"


def _signed(row: dict[str, Any], name: str) -> list[str]:
    return [f"{row[name]:+.3g}", ends(row[f"{name}_low"], row[f"{name}_high"]).strip()]
