"""Task vectors: how the updates of several tuned models of one base lie to each other, beside chance."""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.stats import benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

NORMAL = 1.959963984540054  # half the width of a 95 % interval, in standard deviations
SHOWN = 10  # pairs of models in the summary
MOST_DRAWN_FROM = 10**9  # numpy draws hypergeometric numbers up to here


class TaskVectors(Result):
    """What `compare_task_vectors` measured.

    `data` has the dimensions model, other, tau, matrix, and holds sums over the entries of each weight, of which
    `measures` makes every quantity in total or by layer and component:

    - entries (matrix); total, positive, negative (model, matrix): ΣΔ_i, and how many entries are above and below 0;
    - dot, signed, both (model, other, matrix): Σ Δ_i·Δ_j, Σ sign Δ_i · sign Δ_j, and how many entries both change;
    - taken (model, tau, matrix), common (model, other, tau, matrix): entries among the K largest |Δ_i| of the whole
      model, and among those of both; k, threshold (model, tau): how many are taken, and the smallest |Δ_i| of them.
    """

    kind = "task_vectors"

    @property
    def models(self) -> list[str]:
        return [str(name) for name in self.data.model.values]

    @property
    def taus(self) -> list[float]:
        return [float(tau) for tau in self.data.tau.values]

    @property
    def tau(self) -> float:
        """The τ that summary and figure show: the middle one."""
        return self.taus[len(self.taus) // 2]

    @functools.cached_property
    def total(self) -> "xr.Dataset":
        """`measures()`."""
        return self.measures()

    def measures(self, *by: str) -> "xr.Dataset":
        """Every quantity (model, other), of the Jaccard index and shares (model, other, tau), beside chance.

        - cosine: Σ Δ_i·Δ_j / (‖Δ_i‖·‖Δ_j‖);
        - sign_conflict: among the entries that both models change, the share whose signs differ;
        - jaccard: |A∩B| / |A∪B| of the entries with the largest |Δ|; share: |A∩B| / |B|, B that of `other`.

        Chance (…_null, the mean, and its 95 % interval …_null_low, …_null_high) is the entries of one side permuted
        within each weight. Mean and variance of cosine and conflict are the exact ones of that permutation (Hoeffding
        1951), interval and two-sided p-value those of a normal law; a conflict is a ratio, expanded to first order. The
        overlap of a permuted set is hypergeometric in each weight, drawn `null_draws` times. …_p_adjusted: Benjamini–
        Hochberg over all pairs, groups and τ that are here.

        Args:
            by: nothing for all weights together, or "layer", "component" or both: then along a dimension `group`.

        Raises:
            InputError: another name.
        """
        import xarray as xr
        from scipy.stats import norm

        if not set(by) <= {"layer", "component"}:
            raise InputError(f"task vectors are measured by layer, component or both; found {', '.join(by)}")
        labels, member = self._groups(by)
        data = self.data.transpose("model", "other", "tau", ..., "matrix", missing_dims="ignore")
        entries = data.entries.values.astype(float)
        dot, signed, both, total, taken, common = (
            data[name].values.astype(float) for name in ("dot", "signed", "both", "total", "taken", "common")
        )
        square, changed = (np.einsum("iim->im", x) for x in (dot, both))
        sign_total = (data.positive - data.negative).values.astype(float)

        def summed(values: np.ndarray) -> np.ndarray:
            return values @ member.T

        def products(values: np.ndarray) -> np.ndarray:
            return values[:, None] * values[None]

        def covariance(cross: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            """Of Σ a_i·a_j and Σ b_i·b_j when one side is permuted; `cross` = Σ a·b of one side."""
            return summed(products(cross - a * b / entries) / np.maximum(entries - 1, 1))

        with np.errstate(divide="ignore", invalid="ignore"):
            norms = np.sqrt(summed(square))
            scale = products(norms)
            deviation = np.sqrt(np.maximum(covariance(square, total, total), 0)) / scale
            cosine = _beside(summed(dot) / scale, summed(products(total) / entries) / scale, deviation, -1, 1)

            expected = summed(products(changed) / entries)
            rate = (expected - summed(products(sign_total) / entries)) / 2 / expected
            variance = (
                (0.5 - rate) ** 2 * covariance(changed, changed, changed)
                + covariance(changed, sign_total, sign_total) / 4
                - (0.5 - rate) * covariance(sign_total, changed, sign_total)
            )
            found = summed(both - signed) / 2 / summed(both)
            conflict = _beside(found, rate, np.sqrt(np.maximum(variance, 0)) / expected, 0, 1)
            for quantity in (cosine, conflict):
                z = (quantity[""] - quantity["_null"]) / quantity.pop("deviation")
                quantity["_p"] = np.where(np.isfinite(z), 2 * norm.sf(np.abs(z)), np.nan)

        size, shared = summed(taken), summed(common)
        jaccard, share = self._overlap(entries, taken, size, shared, member)
        variables: dict[str, Any] = {}
        names = {"cosine": cosine, "sign_conflict": conflict, "jaccard": jaccard, "share": share}
        upper = np.triu_indices(len(norms), 1)
        for name, quantity in names.items():
            dims = ("model", "other", *(["tau"] if quantity[""].ndim == 4 else []), "group")
            if "_p" in quantity:
                adjusted = np.full_like(quantity["_p"], np.nan)
                adjusted[upper] = benjamini_hochberg(quantity["_p"][upper])
                adjusted.swapaxes(0, 1)[upper] = adjusted[upper]
                quantity["_p_adjusted"] = adjusted
                quantity["_p"][np.diag_indices(len(norms))] = np.nan
            variables |= {f"{name}{part}": (dims, values) for part, values in quantity.items()}
        variables["both_changed"] = (("model", "other", "group"), summed(both) / summed(entries))
        variables["norm"] = (("model", "group"), norms)
        coordinates = {name: data[name].values for name in ("model", "other", "tau")}
        found = xr.Dataset(variables, coordinates | {name: ("group", values) for name, values in labels.items()})
        return found if by else found.isel(group=0)

    def _groups(self, by: tuple[str, ...]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The labels of the groups, and which weight is in which (group, matrix)."""
        import pandas as pd

        if not by:
            return {}, np.ones((1, self.data.sizes["matrix"]))
        keys = pd.DataFrame({name: self.data[name].values for name in by})
        index = keys.groupby(list(by), sort=False).ngroup().to_numpy()
        first = keys.drop_duplicates()
        return {name: first[name].to_numpy() for name in by}, (index == np.arange(len(first))[:, None]).astype(float)

    def _overlap(
        self, entries: np.ndarray, taken: np.ndarray, size: np.ndarray, shared: np.ndarray, member: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Jaccard index and share (model, other, tau, group), with chance."""

        def index(common: np.ndarray) -> np.ndarray:
            return common / (size[:, None] + size[None] - common)

        with np.errstate(divide="ignore", invalid="ignore"):
            expected = (taken[:, None] * taken[None] / entries) @ member.T
            jaccard = {"": index(shared), "_null": index(expected)}
            share = {"": shared / size[None], "_null": expected / size[None]}
            ends = np.full((2, *shared.shape), np.nan)
            p = np.full(shared.shape, np.nan)
            for i, j in zip(*np.triu_indices(len(size), 1), strict=True):
                drawn = self._permuted(entries, taken[i], taken[j], seed=(int(i), int(j))) @ member.T
                ends[:, i, j] = ends[:, j, i] = np.quantile(drawn, [0.025, 0.975], axis=0)
                tail = np.minimum((drawn <= shared[i, j]).sum(0), (drawn >= shared[i, j]).sum(0))
                known = (size[i] > 0) & (size[j] > 0)
                p[i, j] = p[j, i] = np.where(known, np.minimum(1, 2 * (1 + tail) / (1 + len(drawn))), np.nan)
            for quantity, of in ((jaccard, index), (share, lambda common: common / size[None])):
                quantity["_null_low"], quantity["_null_high"] = of(ends[0]), of(ends[1])
        jaccard["_p"] = p
        return jaccard, share

    def _permuted(self, entries: np.ndarray, a: np.ndarray, b: np.ndarray, *, seed: tuple[int, int]) -> np.ndarray:
        """|A∩B| of each weight when B's entries are permuted within it, (draw, tau, matrix)."""
        draws = int(self.data.attrs["null_draws"])
        generator = np.random.default_rng([int(self.data.attrs["seed"]), *seed])
        a, b, entries = (np.broadcast_to(x, a.shape).astype(np.int64) for x in (a, b, entries))
        small = entries < MOST_DRAWN_FROM
        found = np.empty((draws, *a.shape))
        found[:, small] = generator.hypergeometric(a[small], (entries - a)[small], b[small], (draws, small.sum()))
        if not small.all():  # of so many entries, drawing with replacement is the same
            found[:, ~small] = generator.binomial(b[~small], (a / entries)[~small], (draws, (~small).sum()))
        return found

    def table(self, *by: str) -> "pd.DataFrame":
        """One row a pair of models (and layer, component); columns as in `measures`, those of a τ end in it.

        `jaccard_uniform_τ` is τ/(2 − τ), chance if the largest entries lay anywhere in the model; `of_model_τ` and
        `of_other_τ` are |A∩B| as shares of the largest entries of either.

        Raises:
            InputError: by something else than layer and component.
        """
        import pandas as pd

        found = self.measures(*by) if by else self.total
        found = found.expand_dims("group") if not by else found
        found = found.transpose("model", "other", "tau", "group")
        parts = ("", "_null", "_null_low", "_null_high", "_p", "_p_adjusted")
        columns = [f"{name}{part}" for name in ("cosine", "sign_conflict") for part in parts] + ["both_changed"]
        rows = []
        for i, j in zip(*np.triu_indices(len(self.models), 1), strict=True):
            for g in range(found.sizes["group"]):
                row: dict[str, Any] = {name: found[name].values[g] for name in by}
                row |= {"model": self.models[i], "other": self.models[j]}
                row |= {name: float(found[name].values[i, j, g]) for name in columns}
                for t, tau in enumerate(self.taus):
                    for part in parts:
                        row[f"jaccard{part}_{tau:g}"] = float(found[f"jaccard{part}"].values[i, j, t, g])
                    row[f"jaccard_uniform_{tau:g}"] = tau / (2 - tau)
                    row[f"of_model_{tau:g}"] = float(found.share.values[j, i, t, g])
                    row[f"of_other_{tau:g}"] = float(found.share.values[i, j, t, g])
                rows.append(row)
        return pd.DataFrame(rows)

    def to_frame(self) -> "pd.DataFrame":
        """One row a pair of models, over all weights."""
        return self.table()

    def headline(self) -> dict[str, Any]:
        """By pair: cosine, sign conflict, and Jaccard index at `tau`, each with the mean of chance."""
        found = self.total.sel(tau=self.tau)
        names = ("cosine", "cosine_null", "sign_conflict", "sign_conflict_null", "jaccard", "jaccard_null")
        pairs = []
        for i, j in zip(*np.triu_indices(len(self.models), 1), strict=True):
            values = {name: float(found[name].values[i, j]) for name in names}
            pair = {name: value if np.isfinite(value) else None for name, value in values.items()}
            pairs.append({"model": self.models[i], "other": self.models[j]} | pair)
        return {"models": self.models, "weights": self.data.sizes["matrix"], "tau": self.tau, "pairs": pairs}

    def summary(self) -> str:
        """A line a pair: each quantity beside the 95 % interval of chance."""
        data, frame, tau = self.data, self.to_frame(), self.tau
        lines = [
            f"updates of {len(self.models)} models of one base over {data.sizes['matrix']} weights, "
            f"{int(data.entries.sum()):,} entries"
        ]
        norms = self.total.norm.values
        same = [name for name, norm in zip(self.models, norms, strict=True) if norm == 0]
        lines += [f"{name} does not differ from the base" for name in same]
        frame = frame[~frame["model"].isin(same) & ~frame["other"].isin(same)]
        order = frame["cosine"].abs().sort_values(ascending=False, kind="stable").index
        left = len(frame) - SHOWN
        if left > 0:
            frame = frame.loc[order[:SHOWN]]
            lines.append(f"the {SHOWN} pairs of largest |cosine| ({left} more in the table):")
        for row in frame.to_dict("records"):
            conflict = (
                f"sign conflict {_beside_chance(row, 'sign_conflict')}"
                if row["both_changed"]
                else "no entry changed by both"
            )
            lines.append(
                f"{row['model']} · {row['other']}: cosine {_beside_chance(row, 'cosine')}; {conflict}; "
                f"largest {100 * tau:g} %: Jaccard {_beside_chance(row, 'jaccard', f'_{tau:g}')}"
            )
        if len(frame):
            lines.append(
                "in brackets: 95 % of permutations within each weight; Jaccard of sets spread evenly over the model, "
                f"τ/(2 − τ): {tau / (2 - tau):.3g}"
            )
        left_out = self.provenance.get("left_out", [])
        if left_out:
            lines.append(f"left out, not in every model: {', '.join(left_out[:3])}" + " …" * (len(left_out) > 3))
        excluded = self.provenance.get("excluded", {})
        lines += [f"excluded: {name} ({why})" for name, why in excluded.items()]
        return "\n".join(lines)


def _beside(found: np.ndarray, null: np.ndarray, deviation: np.ndarray, least: float, most: float) -> dict[str, Any]:
    """A quantity, the mean of chance, and its interval within what is possible."""
    low, high = (np.clip(null + sign * NORMAL * deviation, least, most) for sign in (-1, 1))
    return {"": found, "_null": null, "_null_low": low, "_null_high": high, "deviation": deviation}


def _beside_chance(row: dict[str, Any], name: str, ending: str = "") -> str:
    """`0.230 [-0.002, 0.002]`, with as many digits as the interval has use for."""
    low, high = (row[f"{name}_null_{end}{ending}"] for end in ("low", "high"))
    digits = min(6, max(3, 1 - int(np.floor(np.log10(high - low))))) if high > low else 3
    return f"{row[f'{name}{ending}']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
