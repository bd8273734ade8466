"""The direction between two classes of prompts in two models, and what it does."""

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

SIDES = ("base", "tuned")
SOURCES = ("own", "other")  # whose direction: the model's own, or that of the other one
INTERVENTIONS = ("ablate", "add")
METRICS = ("logit_diff", "logprob", "prob", "reciprocal_rank", "accuracy")


class Directions(Result):
    """What `find_directions` measured, by depth (0: the embedding; n: after n blocks; or the layer).

    `data` has the dimensions side (base, tuned), depth, feature, source (own, other), example, draw, half, intervention
    (ablate, add), random, and

    - direction (side, depth, feature): r, from the training half;
    - cosine, cosine_low, cosine_high (depth): of the two models' r, 95 % bootstrap over the training prompts of each
      class; cosine_null (depth, draw): of random contrasts, of one half of either class with the other; cosine_halves
      (side, depth, half): of two halves of one model's training prompts;
    - projection (side, source, depth, example): x·r̂ of held-out prompts, NaN of the others; along the side's own r̂ and
      the other's; separation_null (side, depth, draw): d′ of held-out prompts along the random contrasts; cross_fitted
      (side, depth): d′ within the training half, by which the depth of interventions is chosen;
    - positive, held_out (example);
    - where held-out prompts have answers, for each metric M: M (side, intervention, source, example), the effect
      metric(edited) − metric(unedited); random_M (side, intervention, source, random, example), of random directions as
      long as the source's; unedited_M (side, example).

    Attributes: site, position, label, positive, negative (names of the classes), depth (of the interventions),
    depth_given, scale, metric. Intervals are 95 % percentile bootstrap over held-out prompts, both models' numbers of a
    prompt drawn together.
    """

    kind = "directions"

    @property
    def has_effects(self) -> bool:
        return bool(self.data.attrs["metric"])

    @property
    def depth(self) -> int:
        """The depth whose directions the interventions use."""
        return int(self.data.attrs["depth"])

    def to_frame(self) -> "pd.DataFrame":
        """A row a depth: the cosine with its interval, null and ceiling; d′ of either model along its own direction and
        the other's, with intervals; and the paired difference tuned − base along their own."""
        return self._frame.copy()

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        columns: dict[str, Any] = {"depth": self.data["depth"].values}
        columns |= {name: self.data[name].values for name in ("cosine", "cosine_low", "cosine_high")}
        null = self.data["cosine_null"].transpose("depth", "draw").values
        columns["null_low"], columns["null_high"] = stats.percentile_interval(null)
        for side in SIDES:
            columns[f"halves_{side}"] = mean_of(
                self.data["cosine_halves"].sel(side=side).transpose("depth", "half").values
            )
        values, resampled = self._separations
        for s, side in enumerate(SIDES):
            for o, source in enumerate(SOURCES):
                name = f"{side}_{source}"
                columns[name] = values[s, o]
                columns[f"{name}_low"], columns[f"{name}_high"] = stats.percentile_interval(resampled[s, o])
            null = self.data["separation_null"].sel(side=side).transpose("depth", "draw").values
            columns[f"{side}_null_low"], columns[f"{side}_null_high"] = stats.percentile_interval(null)
        columns["difference"] = values[1, 0] - values[0, 0]
        low, high = stats.percentile_interval(resampled[1, 0] - resampled[0, 0])
        return pd.DataFrame(columns | {"difference_low": low, "difference_high": high})

    @cached_property
    def _separations(self) -> tuple[np.ndarray, np.ndarray]:
        """d′ of the held-out prompts (side, source, depth), and of every resample (side, source, depth, resample)."""
        data = self.data.isel(example=np.flatnonzero(self.data["held_out"].values))
        x = data["projection"].transpose("side", "source", "depth", "example").values
        positive = data["positive"].values
        x = x - x.mean(-1, keepdims=True)
        moments = [np.where(kept, x**power, np.nan) for kept in (positive, ~positive) for power in (1, 2)]
        flat = np.stack(moments).reshape(-1, x.shape[-1])
        drawn = stats.resampled_means(flat).reshape(4, *x.shape[:-1], -1)
        return separation(x, positive), _apart(drawn[0], drawn[2], drawn[1] - drawn[0] ** 2, drawn[3] - drawn[2] ** 2)

    def effects(self, metric: str | None = None) -> "pd.DataFrame":
        """A row a side, intervention, source and class of prompts: unedited metric, effect with interval, range of the
        effects of random directions of that length, what goes beyond their mean (`specific`) with its interval and
        BH-adjusted p over the rows; of the tuned model the paired difference of the effect to base's; of the other's
        direction the share of the own one's effect, a ratio of means, NaN where the latter's interval covers 0.

        Were this direction random too, its mean effect would be one more draw from a normal distribution that the R
        random ones are from: (effect − m)/(s·√(1 + 1/R)) has Student's t distribution of R − 1 degrees. p is the larger
        of that one and of the paired bootstrap over prompts; the reaches of both intervals are added in quadrature.

        Raises:
            InputError: held-out prompts without answers.
        """
        import pandas as pd

        if not self.has_effects:
            raise InputError("no held-out prompt has an answer: effects of interventions were not measured")
        metric = metric or self.data.attrs["metric"]
        positive = self.data["positive"].values
        classes = {"all": np.ones(len(positive), bool)}
        classes |= {self.data.attrs["positive"]: positive, self.data.attrs["negative"]: ~positive}
        rows = []
        for kind in INTERVENTIONS:
            one = self.data.sel(intervention=kind)
            effect = one[metric].transpose("side", "source", "example").values
            random = one[f"random_{metric}"].transpose("side", "source", "random", "example").values
            unedited = self.data[f"unedited_{metric}"].transpose("side", "example").values
            for name, kept in classes.items():
                if not np.isfinite(effect[..., kept]).any():
                    continue
                for s, side in enumerate(SIDES):
                    where = {"side": side, "intervention": kind, "class": name}
                    shift = effect[s] - effect[0] if s else np.full_like(effect[0], np.nan)
                    numbers = (values[..., kept] for values in (effect[s], random[s], unedited[s], shift))
                    rows += [where | row for row in _effect_rows(*numbers)]
        frame = pd.DataFrame(rows)
        frame["p_adjusted"] = stats.benjamini_hochberg(frame.pop("p"))
        return frame

    def headline(self) -> dict[str, Any]:
        """At the depth of the interventions the row of `to_frame`, and the effects over all held-out prompts."""
        attrs = self.data.attrs
        found: dict[str, Any] = {name: attrs[name] for name in ("site", "position", "positive", "negative")}
        found |= {"prompts": int(self.data.sizes["example"]), "held_out": int(self.data["held_out"].sum())}
        found["at"] = jsonable(self.to_frame().set_index("depth", drop=False).loc[self.depth].to_dict())
        if self.has_effects:
            found["metric"] = attrs["metric"]
            frame = self.effects()
            found["effects"] = [jsonable(row) for row in frame[frame["class"] == "all"].to_dict("records")]
        return found

    def summary(self) -> str:
        """Where the classes lie apart, whether along the same direction, and what the direction does."""
        attrs, frame = self.data.attrs, self.to_frame()
        row = frame.set_index("depth").loc[self.depth]
        held = self.data["held_out"].values
        chosen = "as given" if attrs["depth_given"] else "largest d′ within the training half"
        lines = [
            f"{attrs['positive']} − {attrs['negative']}, {attrs['site']} at {attrs['position']}: "
            f"{(~held).sum()} prompts for the directions, {held.sum()} held out",
            f"at depth {self.depth} ({chosen}):",
            f"  cos(base, tuned) {_shown(row, 'cosine')}; random contrasts {row['null_low']:.3f} to "
            f"{row['null_high']:.3f}; two halves of one model {row['halves_base']:.3f}, {row['halves_tuned']:.3f}",
        ]
        for side in SIDES:
            lines.append(
                f"  d′ in {side}: {_shown(row, f'{side}_own')} along its own, {_shown(row, f'{side}_other')} along the "
                f"other's; random contrasts {row[f'{side}_null_low']:.3f} to {row[f'{side}_null_high']:.3f}"
            )
        lines.append(f"  d′ tuned − base: {_shown(row, 'difference')}")
        if self.has_effects:
            lines.append(f"effects on {attrs['metric']} (added: {attrs['scale']:g} × r at depth {self.depth}):")
            lines += [_line(one) for one in self.effects().to_dict("records") if one["class"] == "all"]
        else:
            lines.append("no effects of interventions: no held-out prompt has an answer")
        lines += caution(int(held.sum()), "held-out prompts")
        return "\n".join([*lines, *map(str, self.provenance.get("notes", []))])


def separation(values: np.ndarray, positive: np.ndarray, there: np.ndarray | None = None) -> np.ndarray:
    """d′ = (μ₊ − μ₋)/√((σ₊² + σ₋²)/2) over the last axis, of all or of those `there`; NaN where none varies."""
    there = np.ones(values.shape[-1], bool) if there is None else there
    moments = []
    for kept in (positive & there, ~positive & there):
        count = kept.sum(-1)
        mean = np.where(kept, values, 0).sum(-1) / count
        moments.append((mean, (np.where(kept, values - mean[..., None], 0) ** 2).sum(-1) / count))
    (one, spread), (other, width) = moments
    return _apart(one, other, spread, width)


def _apart(one: np.ndarray, other: np.ndarray, spread: np.ndarray, width: np.ndarray) -> np.ndarray:
    pooled = (spread + width) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pooled > 0, (one - other) / np.sqrt(np.maximum(pooled, 0)), np.nan)


def _effect_rows(
    effect: np.ndarray, random: np.ndarray, unedited: np.ndarray, shift: np.ndarray
) -> list[dict[str, Any]]:
    """One row a source, of (source, example), (source, random, example), (example,) and (source, example)."""
    share = stats.interval_of_ratio(effect[1:], effect[0])
    rows = []
    for source, values, drawn, change in zip(SOURCES, effect, random, shift, strict=True):
        low, high = stats.interval_of_mean(values)
        means = mean_of(drawn)
        row = {"source": source, "unedited": mean_of(unedited), "effect": mean_of(values), "low": low, "high": high}
        row |= {"random_low": means.min(), "random_high": means.max()} | _specific(values, drawn)
        ends = stats.interval_of_mean(change)
        row |= {"difference": mean_of(change), "difference_low": ends[0], "difference_high": ends[1]}
        parts = share if source == "other" else np.full((3, 1), np.nan)
        row |= {name: part[0] for name, part in zip(("share", "share_low", "share_high"), parts, strict=True)}
        rows.append({name: v if isinstance(v, str) else float(v) for name, v in row.items()})
    return rows


def _specific(values: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """What an effect (example,) has beyond the mean of random ones (random, example); see `Directions.effects`."""
    from scipy.stats import t

    beyond, means = values - drawn.mean(0), mean_of(drawn)
    value, (low, high) = mean_of(beyond), stats.interval_of_mean(beyond)
    spread, degrees = means.std(ddof=1) * np.sqrt(1 + 1 / len(means)), len(means) - 1
    reach = t.ppf((1 + stats.LEVEL) / 2, degrees) * spread
    p = 2 * t.sf(abs(value) / spread, degrees) if spread > 0 else float(value == 0)
    return {
        "specific": value, "specific_low": value - np.hypot(value - low, reach),
        "specific_high": value + np.hypot(high - value, reach), "p": np.maximum(p, stats.two_sided_p(beyond)),
    }  # fmt: skip


def _shown(row: Any, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def _line(row: dict[str, Any]) -> str:
    said = f"  {row['side']}, {row['intervention']} {row['source']}: {row['unedited']:.3g} {row['effect']:+.3g}"
    said += "" if np.isnan(row["low"]) else f" [{row['low']:.3g}, {row['high']:.3g}]"
    said += f"; random {row['random_low']:+.2g} to {row['random_high']:+.2g}"
    if not np.isnan(row["share"]):
        said += f"; {row['share']:.2f} of its own" + (
            "" if np.isnan(row["share_low"]) else f" [{row['share_low']:.2f}, {row['share_high']:.2f}]"
        )
    return said
