"""How alike two models represent the same texts."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.tables import jsonable

if TYPE_CHECKING:
    import pandas as pd

# Measure → what tables call it, and its value for equals.
MEASURES = {
    "cka_debiased": ("CKA, debiased", 1.0), "cka": ("CKA, biased", 1.0), "rsa": ("RSA", 1.0),
    "procrustes": ("Procrustes distance", 0.0), "cosine": ("cosine of rows", 1.0), "change": ("relative change", 0.0),
}  # fmt: skip
RANGE = {"procrustes": (0.0, 2.0), "change": (0.0, np.inf)}  # others −1 to 1
CLEAR = 0.05


class Representations(Result):
    """What `compare_representations` measured, by depth (0: the embedding; n: after n blocks; or the layer).

    `data` has the dimensions base_depth, tuned_depth and, where the models have the same number of layers, depth,
    measure, fold, draw, model, flip, direction (promoted, suppressed), rank, and

    - cka, cka_debiased (base_depth, tuned_depth): every depth of base with every depth of tuned;
    - value (measure, depth): cka, cka_debiased, rsa, procrustes, cosine, change, base with tuned; left_out
      (measure, depth, fold): the same without a tenth of the texts; shuffled (measure, depth, draw): with the tuned
      model's rows in another order; null (measure, depth, model): base with each null model, where there are any;
    - size (depth): length of the mean difference tuned − base, of base's mean length of an activation, and
      size_flipped (depth, flip): the same with the signs of texts flipped at random;
    - token, logit, p_adjusted (depth, direction, rank): what that difference says, read through the tuned model's
      final norm and unembedding.

    Intervals of `value` are 95 %, from the delete-a-group jackknife over the texts: value ± t·s, s² = (F−1)/F·Σ(θ_f −
    θ̄)², with F − 1 degrees of freedom for F folds. Attributes: site, pool, texts, rows, features (the
    width).
    """

    kind = "representations"

    @property
    def matched(self) -> bool:
        """Whether depths correspond: both models have the same number of layers."""
        return "value" in self.data

    @property
    def has_lens(self) -> bool:
        return "logit" in self.data

    @property
    def models(self) -> list[str]:
        """The null models."""
        return [str(name) for name in self.data["model"].values] if "null" in self.data else []

    def layers(self) -> "pd.DataFrame":
        """A row a measure and depth: value, interval, range of shuffled rows and of the null models.

        Raises:
            InputError: models of different depth.
        """
        return self._layers.copy()

    @cached_property
    def _layers(self) -> "pd.DataFrame":
        import pandas as pd

        if not self.matched:
            raise InputError("the two models have different numbers of layers: depths do not correspond; see data.cka")
        rows = []
        for measure, equal in ((m, e) for m, (_, e) in MEASURES.items()):
            one = self.data.sel(measure=measure)
            value = one["value"].values
            low, high = _jackknife(value, one["left_out"].transpose("depth", "fold").values)
            limits = RANGE.get(measure, (-1.0, 1.0))
            columns = {"measure": measure, "depth": self.data["depth"].values, "value": value}
            columns |= {"low": np.clip(low, *limits), "high": np.clip(high, *limits)}
            columns["shuffled_low"], columns["shuffled_high"] = _extremes(
                one["shuffled"].transpose("depth", ...).values
            )
            if self.models:
                null = one["null"].transpose("depth", "model").values
                columns["null_low"], columns["null_high"] = _extremes(null)
                least = columns["null_high"] if equal == 1 else columns["null_low"]
                columns["closer_than_null"] = np.abs(value - equal) < np.abs(least - equal)
            rows.append(pd.DataFrame(columns))
        return pd.concat(rows, ignore_index=True)

    def to_frame(self) -> "pd.DataFrame":
        """`layers()`; of models of different depth a row every two depths, with both kinds of CKA."""
        if self.matched:
            return self.layers()
        names = ["base_depth", "tuned_depth", "cka", "cka_debiased"]
        return self.data[["cka", "cka_debiased"]].to_dataframe().reset_index()[names]

    def tokens(self) -> "pd.DataFrame":
        """A row a token: depth, direction, rank, token, logit, p_adjusted.

        Raises:
            InputError: compared without the lens.
        """
        if not self.has_lens:
            raise InputError("the mean difference was not read: compare with lens=True, models of one depth and width")
        names = ["depth", "direction", "rank", "token", "logit", "p_adjusted"]
        return self.data[["token", "logit", "p_adjusted"]].to_dataframe().reset_index()[names]

    def sizes(self) -> "pd.DataFrame":
        """By depth: size of the mean difference, and the largest that 95 % of random flips of signs give."""
        import pandas as pd

        flipped = self.data["size_flipped"].transpose("depth", "flip").values
        columns = {"depth": self.data["depth"].values, "size": self.data["size"].values}
        return pd.DataFrame(columns | {"chance": np.quantile(flipped, 0.95, axis=1)})

    def farthest(self) -> "pd.DataFrame":
        """Of each measure the row of `layers()` where base and tuned are least alike."""
        frame = self.layers()
        away = np.abs(frame["value"] - frame["measure"].map({m: e for m, (_, e) in MEASURES.items()}))
        known = away[away.notna()]
        return frame.loc[known.groupby(frame["measure"]).idxmax()].set_index("measure").reindex(MEASURES).reset_index()

    def headline(self) -> dict[str, Any]:
        """Sizes; of each measure where base and tuned are least alike; what the last depth's difference says."""
        names = ("site", "pool", "texts", "rows")
        found: dict[str, Any] = {n: v.item() if hasattr(v := self.data.attrs[n], "item") else v for n in names}
        found["null_models"] = len(self.models)
        if self.matched:
            found["least_alike"] = {row.pop("measure"): jsonable(row) for row in self.farthest().to_dict("records")}
        if self.has_lens:
            frame = self.tokens()
            last = frame[(frame["depth"] == frame["depth"].max()) & (frame["rank"] < 3)]
            found["difference"] = [jsonable(row) for row in last.to_dict("records")]
        return found

    def summary(self) -> str:
        """Where the two are least alike by each measure, against what is alike by chance; what the difference says."""
        attrs, count = self.data.attrs, self.data.sizes["base_depth"]
        lines = [
            f"{attrs['texts']} texts, {attrs['rows']} rows (pool {attrs['pool']}), {count} depths of {attrs['site']}"
        ]
        if attrs["rows"] < attrs["features"]:
            lines.append(f"fewer rows than features ({attrs['features']}): biased CKA is near 1 whatever the data")
        if not self.matched:
            best = self.data["cka_debiased"]
            lines.append(f"debiased CKA of every two depths: {float(best.min()):.3f} to {float(best.max()):.3f}")
        else:
            lines += self._measured()
        if self.has_lens:
            lines += self._read()
        return "\n".join([*lines, *map(str, self.provenance.get("notes", []))])

    def _measured(self) -> list[str]:
        lines = ["least alike at depth; 95 % over texts; rows shuffled; null models"]
        for row in self.farthest().to_dict("records"):
            if np.isnan(row["value"]):
                lines.append(f"  {MEASURES[row['measure']][0]}: not defined here")
                continue
            line = f"  {MEASURES[row['measure']][0]}: {row['value']:.3f}"
            line += "" if np.isnan(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]"
            line += f" at {row['depth']:.0f}; {row['shuffled_low']:.3f} to {row['shuffled_high']:.3f}"
            lines.append(line + (f"; {row['null_low']:.3f} to {row['null_high']:.3f}" if self.models else ""))
        if self.models:
            frame = self.layers()
            near = frame[frame["measure"] == "cka_debiased"]["closer_than_null"]
            lines.append(f"closer to base than every null model, by debiased CKA: {near.sum()} of {len(near)} depths")
        else:
            lines.append("no null models: whether this is less than another seed differs is not known (--null)")
        return lines

    def _read(self) -> list[str]:
        sizes, tokens = self.sizes().set_index("depth"), self.tokens()
        lines = ["mean difference tuned − base, of base's mean length (by chance); what it says (p < 0.05)"]
        for depth, part in tokens.groupby("depth"):
            size = sizes.loc[depth]
            said = []
            for direction, name in (("promoted", "up"), ("suppressed", "down")):
                clear = part[(part["direction"] == direction) & (part["p_adjusted"] < CLEAR)].sort_values("rank")
                if len(clear):
                    said.append(f"{name} {', '.join(map(repr, clear['token'].head(5)))}")
            lines.append(f"  {depth}: {size['size']:.3f} ({size['chance']:.3f}); {'; '.join(said) or 'nothing clear'}")
        return lines


def _extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the last axis; NaN where there is nothing."""
    return np.fmin.reduce(values, -1), np.fmax.reduce(values, -1)


def _jackknife(value: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interval of each value, (depth,), from those without each fold, (depth, fold); NaN of fewer than two folds."""
    from scipy.stats import t

    folds = left_out.shape[-1]
    if folds < 2:
        return np.full_like(value, np.nan), np.full_like(value, np.nan)
    centred = left_out - left_out.mean(-1, keepdims=True)
    reach = t.ppf(0.975, folds - 1) * np.sqrt((folds - 1) / folds * (centred**2).sum(-1))
    return value - reach, value + reach
