"""Update anatomy: how large Δ is, how its energy is spread, and where it lies in the base."""

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.results import Result

if TYPE_CHECKING:
    import pandas as pd


class Updates(Result):
    """What `measure_updates` measured.

    `data` has the dimensions matrix, rank, k, and

    - base_norm, tuned_norm, delta_norm, relative_norm (‖Δ‖_F/‖W0‖_F), rounding (the largest relative norm that rounding
      to the stored types alone can give), delta_spectral, relative_spectral (‖Δ‖₂/‖W0‖₂), stable_rank
      (‖Δ‖_F²/‖Δ‖₂²), effective_rank (exp H(σ/Σσ)), delta_rank, out, in (matrix);
    - sigma_delta, sigma_base (matrix, rank);
    - energy (matrix, k): ‖U_kᵀ Δ V_k‖²/‖Δ‖² in the base's leading singular subspaces; energy_null, energy_low,
      energy_high: mean and 95 % interval for randomly turned Δ with the same singular values.

    Vectors (biases, norms) have norms only.
    """

    kind = "updates"

    @property
    def k(self) -> int:
        """The subspace size that tables and summary show: the largest up to an eighth of the typical matrix."""
        sizes = np.minimum(self.data["out"], self.data["in"]).values[np.isfinite(self.data.effective_rank.values)]
        ks = self.data.k.values
        fitting = ks[ks <= np.median(sizes) / 8] if len(sizes) else ks[:0]
        return int(fitting[-1] if len(fitting) else ks[0])

    def to_frame(self) -> "pd.DataFrame":
        """One row a weight; the energies at `k`."""
        data = self.data
        names = [n for n, v in data.data_vars.items() if v.dims == ("matrix",)]
        frame = data[names].to_dataframe().reset_index()
        at = data.sel(k=self.k)
        for name in ("energy", "energy_null", "energy_low", "energy_high"):
            frame[f"{name}_k{self.k}"] = at[name].values
        first = ["matrix", "layer", "component", "out", "in", "relative_norm"]
        return frame[[*first, *(c for c in frame.columns if c not in first)]]

    def by_component(self) -> "pd.DataFrame":
        """Share of the squared update norm, and relative norm, of each component."""
        frame = self.to_frame()
        squares = frame.assign(delta=frame["delta_norm"] ** 2, base=frame["base_norm"] ** 2)
        sums = squares.groupby("component", sort=False).agg(
            weights=("matrix", "size"), delta=("delta", "sum"), base=("base", "sum"),
            stable_rank=("stable_rank", "median"), effective_rank=("effective_rank", "median"),
        )  # fmt: skip
        total = sums["delta"].sum()
        sums["share_of_update"] = sums["delta"] / total if total else 0.0
        sums["relative_norm"] = np.sqrt(np.divide(sums["delta"], sums["base"].where(sums["base"] > 0)))
        columns = ["weights", "share_of_update", "relative_norm", "stable_rank", "effective_rank"]
        return sums[columns].sort_values("share_of_update", ascending=False).reset_index()

    def headline(self) -> dict[str, Any]:
        """Total relative norm, and medians over the matrices that changed."""
        frame = self.to_frame()
        moved = frame[frame["delta_norm"] > 0]
        return {
            "weights": len(frame),
            "changed": len(moved),
            "relative_norm": _total(frame),
            "stable_rank": _median(moved["stable_rank"]),
            "effective_rank": _median(moved["effective_rank"]),
        }

    def summary(self) -> str:
        """Size and shape of the update, and what rounding could explain."""
        frame = self.to_frame()
        matrices = frame[frame["effective_rank"].notna()]
        changed = frame[frame["delta_norm"] > 0]
        if changed.empty:
            return f"All {len(frame)} weights are identical in base and tuned model: there is no update."
        total = _total(frame)
        size = "undefined (the base is zero)" if total is None else f"{total:.4g}"
        lines = [
            f"‖Δ‖/‖W0‖ = {size} over {len(frame)} weights ({len(matrices)} matrices); "
            f"{len(frame) - len(changed)} identical"
        ]
        moved = matrices[matrices["delta_norm"] > 0]
        if len(moved):
            lines.append(
                f"median over the matrices that changed: relative norm {moved['relative_norm'].median():.3g}, "
                f"stable rank {moved['stable_rank'].median():.1f}, "
                f"effective rank {moved['effective_rank'].median():.1f}"
            )
            k = self.k
            ratio = (moved[f"energy_k{k}"] / moved[f"energy_null_k{k}"]).median()
            above = int((moved[f"energy_k{k}"] > moved[f"energy_high_k{k}"]).sum())
            lines.append(
                f"energy in the base's top-{k} subspaces: {ratio:.2g} × chance (median); "
                f"above the 95 % band of chance in {above} of {len(moved)} matrices"
            )
        rounding = changed[changed["relative_norm"] <= changed["rounding"]]
        if len(rounding):
            lines.append(f"{len(rounding)} updates are no larger than rounding to the stored type can make")
        excluded = self.provenance.get("excluded", {})
        lines += [f"excluded: {name} ({why})" for name, why in excluded.items()]
        return "\n".join(lines)


def _total(frame: "pd.DataFrame") -> float | None:
    """‖Δ‖/‖W0‖ over all weights; None where the base is zero."""
    base = float((frame["base_norm"] ** 2).sum())
    return float(np.sqrt((frame["delta_norm"] ** 2).sum() / base)) if base else None


def _median(values: "pd.Series") -> float | None:
    """None (null in JSON) where there is nothing to take a median of."""
    values = values.dropna()
    return float(values.median()) if len(values) else None
