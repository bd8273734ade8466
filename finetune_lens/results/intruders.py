"""Intruder dimensions: for each leading singular vector of the tuned weights, its best match in the base."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results import Result

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

VERDICTS = {1: "intruder", 0: "not", -1: "undetermined"}
NULL_DRAWS = 10_000
FEW = 8  # matrices below which resampled p-values claim more than the draws allow
CHUNK = 4_000_000  # numbers held at once while resampling


@dataclass(frozen=True)
class Null:
    """The count that one more random update would give: mean, 95 % interval, and the chance of at least the observed.

    From a few draws a matrix, so the p-value is no smaller than these allow: for fewer than 8 matrices it is at least
    the exact one of exchangeable draws, (1 + #{draws ≥ observed}) / (1 + draws).
    """

    mean: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.0f}, {self.high:.0f}]"


def resampled_totals(counts: np.ndarray) -> np.ndarray:
    """Predicted totals over the matrices from counts (draw, matrix, point), one draw a matrix: (resample, point).

    total = Σ_draw [pick = draw] @ counts[draw], in pieces, so that memory does not grow with the number of matrices.
    The spread of resamples of D draws is (D − 1)/D of the variance, that of one more update about their mean (D + 1)/D:
    it is widened by that ratio.
    """
    draws, n, points = counts.shape
    generator = np.random.default_rng(0)
    rows = max(1, CHUNK // max(n, points))
    totals = np.empty((NULL_DRAWS, points), np.float32)
    for start in range(0, NULL_DRAWS, rows):
        pick = generator.integers(draws, size=(min(rows, NULL_DRAWS - start), n))
        pieces = ((pick == d).astype(np.float32) @ counts[d].astype(np.float32) for d in range(draws))
        totals[start : start + rows] = sum(pieces)
    if draws > 1:
        mean = counts.mean(0).sum(0)
        totals = (mean + (totals - mean) * ((draws + 1) / (draws - 1)) ** 0.5).clip(0)
    return totals


class Intruders(Result):
    """What `find_intruders` found.

    `data` has the dimensions matrix, side (left, right), rank (of the tuned singular vector, from 1), null (evenly: Δ's
    norm and rank, energy spread evenly; spectrum: Δ's own singular values), draw, base_rank, and

    - max_cos, best_base_rank, subspace_cos (side, matrix, rank): max_i |⟨u_j, x_i⟩|, its i, and the cosine with the
      span of base vectors of about the same σ; lower, upper: the interval the true maximum lies in;
    - certified (side, matrix, rank): 1 where a proof settled the vector, 0 where the matrix' `route` did ("gram" and
      "svd" exact, "cached"). A proof tells on which side of the run's ε the maximum lies, and max_cos is then the
      largest cosine found, at a base vector that the proof came upon;
    - sigma, gap (matrix, rank), sigma_base (matrix, base_rank): singular values, relative gap to the nearest neighbour;
    - null_max_cos (null, draw, side, matrix, null_rank): the same maximum for a random update;
    - similarity (side, matrix, similarity_rank, similarity_base_rank): leading block of |⟨u_j, x_i⟩|;
    - delta_norm, base_norm, delta_rank, effective_rank, unchanged, route, out, in (matrix).
    """

    kind = "intruders"

    @property
    def k(self) -> int:
        """The number of leading vectors that the run was asked to judge."""
        return int(self.data.attrs["k"])

    @property
    def epsilon(self) -> float:
        """The threshold that the run was asked to judge by."""
        return float(self.data.attrs["epsilon"])

    @property
    def sides(self) -> list[str]:
        return [str(s) for s in self.data.side.values]

    def verdict(self, *, epsilon: float | None = None) -> "xr.DataArray":
        """1 intruder (certainly < ε), 0 not, −1 undetermined: the error interval covers ε, or σ is below the rank
        tolerance; (side, matrix, rank). Ranks that a matrix does not have are −2."""
        import xarray as xr

        epsilon = self.epsilon if epsilon is None else epsilon
        values = xr.where(self.data.upper < epsilon, 1, xr.where(self.data.lower >= epsilon, 0, -1))
        return values.where(self.data.max_cos.notnull(), -2).astype("int8")

    def count(self, *, epsilon: float | None = None, k: int | None = None, side: str | None = None) -> int:
        """Intruders among the top k vectors of every matrix, summed over the matrices (certain ones only)."""
        return int((self._top(epsilon, k, side) == 1).sum())

    def undetermined(self, *, epsilon: float | None = None, k: int | None = None, side: str | None = None) -> int:
        """Vectors among the same of which the numbers do not tell."""
        return int((self._top(epsilon, k, side) == -1).sum())

    def _top(self, epsilon: float | None, k: int | None, side: str | None) -> "xr.DataArray":
        return self.verdict(epsilon=epsilon).sel(side=self.chosen_side(side)).isel(rank=slice(self._checked(k)))

    def _checked(self, k: int | None) -> int:
        """k, or the run's; an error where the result does not reach that far."""
        k = self.k if k is None else int(k)
        reach = int(self.data.attrs.get("ranks", 0))  # 0: all there are
        if k < 1 or 0 < reach < k:
            limit = f" and at most {reach}, the vectors that were looked at (ranks)" if reach else ""
            raise InputError(f"k is at least 1{limit}; found {k}")
        return k

    def chosen_side(self, side: str | None) -> str:
        """The side asked for, or the first that was computed."""
        side = self.sides[0] if side is None else side
        if side not in self.sides:
            raise InputError(f"side {side!r} was not computed; this result has {', '.join(self.sides)}")
        return side

    def grid(self, epsilons: Iterable[float], ks: Iterable[int], *, side: str | None = None) -> "xr.DataArray":
        """Counts on every ε × k: (epsilon, k)."""
        import xarray as xr

        epsilons, ks = np.asarray(list(epsilons), float), np.asarray([self._checked(k) for k in ks], int)
        upper = self.data.upper.sel(side=self.chosen_side(side)).values  # NaN compares false
        counts = np.stack([np.cumsum((upper < e).sum(0))[np.minimum(ks, upper.shape[1]) - 1] for e in epsilons])
        return xr.DataArray(counts, {"epsilon": epsilons, "k": ks}, ("epsilon", "k"), name="count")

    def null(
        self,
        *,
        epsilon: float | None = None,
        k: int | None = None,
        side: str | None = None,
        null: str = "spectrum",
        matrices: Any = slice(None),
    ) -> Null | None:
        """The count that random singular vectors give; None when no null was drawn, or k is beyond it.

        The draws of different matrices are independent, so the total is resampled by taking one draw a matrix, 10,000
        times (seeded): the interval is that of one more total, not of the mean.
        """
        per_draw = self._null_counts(epsilon, k, side, null)
        if per_draw is None:
            return None
        per_draw = per_draw[:, matrices]
        totals = resampled_totals(per_draw[:, :, None])[:, 0]
        observed = int((self._top(epsilon, k, side) == 1).values[matrices].sum())
        low, high = np.quantile(totals, [0.025, 0.975])
        p_value = (1 + (totals >= observed).sum()) / (1 + NULL_DRAWS)
        draws, n = per_draw.shape
        if n < FEW:
            p_value = max(p_value, (1 + (per_draw.sum(1) >= observed).sum()) / (1 + draws))
        return Null(float(per_draw.mean(0).sum()), float(low), float(high), float(p_value))

    def _null_counts(self, epsilon: float | None, k: int | None, side: str | None, null: str) -> np.ndarray | None:
        """Counts (draw, matrix)."""
        k = self.k if k is None else k
        epsilon = self.epsilon if epsilon is None else epsilon
        if "null_max_cos" not in self.data:
            return None
        if k > self.data.attrs.get("null_ranks", self.data.sizes["null_rank"]):
            return None
        values = self.data.null_max_cos.sel(null=null, side=self.chosen_side(side)).isel(null_rank=slice(k))
        return (values < epsilon).sum("null_rank").values

    def table(
        self, by: str = "component", *, epsilon: float | None = None, k: int | None = None, side: str | None = None
    ) -> "pd.DataFrame":
        """Counts beside the null by `component`, `layer`, `matrix`, or `all`, one row each."""
        import pandas as pd

        top = self._top(epsilon, k, side).values
        if by not in ("component", "layer", "matrix", "all"):
            raise InputError(f"by is one of component, layer, matrix, all; found {by!r}")
        labels = np.full(len(top), "all") if by == "all" else self.data[by].values
        rows = []
        for label in dict.fromkeys(labels.tolist()):
            chosen = np.flatnonzero(labels == label)
            null = self.null(epsilon=epsilon, k=k, side=side, matrices=chosen)
            rows.append(
                {
                    by: label,
                    "matrices": len(chosen),
                    "vectors": int((top[chosen] != -2).sum()),
                    "intruders": int((top[chosen] == 1).sum()),
                    "undetermined": int((top[chosen] == -1).sum()),
                    "null_mean": null.mean if null else np.nan,
                    "null_low": null.low if null else np.nan,
                    "null_high": null.high if null else np.nan,
                    "p_value": null.p_value if null else np.nan,
                    "effective_rank": float(self.data.effective_rank[chosen].median()),
                }
            )
        return pd.DataFrame(rows)

    def to_frame(self, *, k: int | None = None) -> "pd.DataFrame":
        """One row a (matrix, side, vector) for the top k vectors."""
        data = self.data.isel(rank=slice(self._checked(k)))
        names = ["max_cos", "lower", "upper", "best_base_rank", "subspace_cos"]
        frame = data[names].to_dataframe(dim_order=["matrix", "side", "rank"]).reset_index()
        flat = data[["sigma", "gap"]].to_dataframe(dim_order=["matrix", "rank"]).reset_index()
        frame = frame.merge(flat[["matrix", "rank", "sigma", "gap"]], on=["matrix", "rank"], how="left")
        verdict = self.verdict().isel(rank=slice(data.sizes["rank"])).rename("verdict")
        verdict = verdict.to_dataframe(dim_order=["matrix", "side", "rank"])["verdict"].to_numpy()
        frame["verdict"] = [VERDICTS.get(v, "") for v in verdict]
        settled = data.certified.to_dataframe(dim_order=["matrix", "side", "rank"])["certified"].to_numpy()
        routes = np.repeat(data.route.values, data.sizes["side"] * data.sizes["rank"])
        frame["route"] = np.where(settled == 1, "certified", routes)
        frame["margin"] = np.select(
            [verdict == 1, verdict == 0], [self.epsilon - frame["upper"], frame["lower"] - self.epsilon], 0
        )
        frame["near_degenerate"] = frame["gap"] < float(self.data.attrs["gap"])
        frame = frame[verdict != -2]
        frame["best_base_rank"] = frame["best_base_rank"].astype(int)
        first = ["matrix", "layer", "component", "side", "rank", "sigma", "max_cos", "verdict"]
        return frame[[*first, *(c for c in frame.columns if c not in first)]].reset_index(drop=True)

    def headline(self) -> dict[str, Any]:
        """By side: count, undetermined, both nulls."""
        from dataclasses import asdict

        record: dict[str, Any] = {"epsilon": self.epsilon, "k": self.k, "matrices": self.data.sizes["matrix"]}
        for side in self.sides:
            nulls = {name: self.null(side=side, null=name) for name in ("spectrum", "evenly")}
            record[side] = {
                "intruders": self.count(side=side),
                "undetermined": self.undetermined(side=side),
                "null": {name: null and asdict(null) for name, null in nulls.items()},
            }
        return record

    def summary(self) -> str:
        """The count, its null and its caveats."""
        data, k = self.data, self.k
        n, unchanged = data.sizes["matrix"], int(data.unchanged.sum())
        if n and unchanged == n:
            return f"All {n} matrices are identical in base and tuned model: 0 intruders, because nothing changed."
        lines = []
        for side in self.sides:
            count, open_ = self.count(side=side), self.undetermined(side=side)
            vectors = int((self._top(None, k, side) != -2).sum())
            lines.append(
                f"{count} intruder dimensions among the top {k} {side} singular vectors of {n} matrices "
                f"({vectors} vectors, ε = {self.epsilon:g}); {open_} undetermined"
            )
            null, even = (self.null(side=side, null=name) for name in ("spectrum", "evenly"))
            if null is None:
                lines.append("  no null was drawn")
            else:
                chance = "random directions with the update's own singular values give"
                if count > null.high:
                    reading = f"more than {chance}"
                elif count + open_ < null.low:
                    reading = f"fewer than {chance}"
                elif null.low <= count and count + open_ <= null.high:
                    reading = f"what {chance}"
                else:
                    reading = "open, for the vectors that are undetermined"
                lines.append(f"  null, update's own spectrum: {null}, p = {null.p_value:.2g}: {reading}")
                lines.append(f"  null, energy spread evenly:  {even}")
        flagged = self.to_frame()
        flagged = flagged[flagged["near_degenerate"] & (flagged["verdict"] == "intruder")]
        if len(flagged):
            lines.append(
                f"{len(flagged)} of these have a near-degenerate σ (gap < {float(data.attrs['gap']):g}), where vectors "
                f"rotate under small updates; their median subspace cosine is {flagged['subspace_cos'].median():.2f}"
            )
        if unchanged:
            lines.append(f"{unchanged} of {n} matrices are identical in base and tuned model and count 0")
        rank = float(data.effective_rank.median())
        known = "not computed (it needs all singular values of the update)" if np.isnan(rank) else f"{rank:.1f}"
        lines.append(f"median effective rank of the update: {known}")
        proved = int((data.certified.isel(rank=slice(k)) == 1).sum())
        if proved:
            lines.append(f"{proved} of these verdicts are proofs, made without decomposing the base")
        excluded = self.provenance.get("excluded", {})
        lines += [f"excluded: {name} ({why})" for name, why in excluded.items()]
        return "\n".join(lines)
