"""Where the heads of two models look, on the same prompts."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.results import Result
from finetune_lens.results.few import caution
from finetune_lens.results.tables import jsonable, mean_of

if TYPE_CHECKING:
    import pandas as pd

ABOVE = 10  # times the floor: from here a divergence is more than rounding


class Attention(Result):
    """What `compare_attention` measured, in nats.

    `data` has the dimensions side (base, tuned), example, layer, head, kept (the prompts whose maps are here), query,
    key, and

    - divergence (example, layer, head): Jensen–Shannon divergence of base's and tuned's attention, mean over queries;
    - entropy, first (side, example, layer, head): entropy of the attention, and its share on the first token;
    - floor (kept, layer, head): divergence of the base from itself, prompts one by one against batches;
    - pattern (side, kept, layer, head, query, key): the maps, NaN beyond a prompt's end; token (kept, query).

    Intervals are 95 % percentile bootstrap over the prompts, both sides of a prompt drawn together.
    """

    kind = "attention"

    def to_frame(self) -> "pd.DataFrame":
        """A row a head: divergence with its interval and floor; of entropy and first base, tuned, and tuned − base with
        interval and BH-adjusted p over the heads."""
        return self._frame.copy()

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        at = ("layer", "head")
        layer, head = (grid.ravel() for grid in np.meshgrid(*(self.data[d].values for d in at), indexing="ij"))
        divergence = self.data["divergence"].transpose(*at, "example").values
        low, high = stats.interval_of_mean(divergence)
        columns = {"layer": layer, "head": head, "divergence": mean_of(divergence), "low": low, "high": high}
        columns["floor"] = self.data["floor"].transpose(*at, "kept").values.max(-1)
        for name in ("entropy", "first"):
            base, tuned = self.data[name].transpose("side", *at, "example").values
            columns |= {f"{name}_base": mean_of(base), f"{name}_tuned": mean_of(tuned)}
            columns[f"{name}_difference"] = mean_of(tuned - base)
            columns[f"{name}_low"], columns[f"{name}_high"] = stats.interval_of_mean(tuned - base)
            columns[f"{name}_p_adjusted"] = stats.benjamini_hochberg(stats.two_sided_p(tuned - base))
        return pd.DataFrame({name: np.ravel(values) for name, values in columns.items()})

    def top(self, n: int = 10) -> "pd.DataFrame":
        """The rows of the heads that differ most."""
        return self.to_frame().sort_values("divergence", ascending=False, kind="stable").head(n)

    def headline(self) -> dict[str, Any]:
        """Sizes, the mean over heads, how many differ beyond rounding, and the heads that differ most."""
        frame = self.to_frame()
        short = ["layer", "head", "divergence", "low", "high", "floor", "entropy_difference", "first_difference"]
        return {
            "prompts": int(self.data.sizes["example"]), "heads": len(frame),
            "mean_divergence": float(frame["divergence"].mean()), "beyond_rounding": int(self._beyond().sum()),
            "top": [jsonable(row) for row in self.top(3)[short].to_dict("records")],
        }  # fmt: skip

    def _beyond(self) -> np.ndarray:
        """(head,) whether a divergence is clearly more than what rounding makes of the same patterns."""
        frame = self.to_frame()
        return (frame["divergence"] > ABOVE * np.maximum(frame["floor"], np.finfo(float).eps)).to_numpy()

    def summary(self) -> str:
        """The heads that differ most, and how entropy and attention on the first token shift."""
        frame = self.to_frame()
        lines = [
            f"{self.data.sizes['example']} prompts, {len(frame)} heads",
            f"Jensen–Shannon divergence of attention, mean over queries and heads: {frame['divergence'].mean():.3g} "
            f"nats of at most {np.log(2):.2f}",
            f"more than {ABOVE} × rounding (at most {frame['floor'].max():.1g}): {self._beyond().sum()} heads",
            "heads that differ most, 95 % over prompts; entropy; share on the first token:",
        ]
        for row in self.top(5).to_dict("records"):
            ends = "" if np.isnan(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]"
            shifts = "; ".join(f"{row[f'{m}_base']:.2f} → {row[f'{m}_tuned']:.2f}" for m in ("entropy", "first"))
            lines.append(f"  {row['layer']}.{row['head']}: {row['divergence']:.3f}{ends}; {shifts}")
        for name, words in (("entropy", "attention spreads (up) or narrows"), ("first", "share on the first token")):
            clear = frame[frame[f"{name}_p_adjusted"] < 0.05]
            up = int((clear[f"{name}_difference"] > 0).sum())
            lines.append(f"{words}: up in {up} heads, down in {len(clear) - up} (clear of 0, false discovery rate 5 %)")
        lines += caution(self.data.sizes["example"], "prompts")
        return "\n".join([*lines, *map(str, self.provenance.get("notes", []))])
