"""What linear probes read out of two models' activations."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.results import Result
from finetune_lens.results.few import caution
from finetune_lens.results.tables import aligned, ends, jsonable

if TYPE_CHECKING:
    import pandas as pd

SIDES = ("base", "tuned")
FDR = 0.05
BLOCK = 512  # quantities resampled at once


class Probing(Result):
    """What `probe` found. A score is the accuracy on held-out examples, or of values R² = 1 − Σ(y − ŷ)² / Σ(y − ȳ)².

    `data` has the dimensions seed (a split into training and test, and a control task), example, trained_on, tested_on
    and side (base, tuned), depth (of the residual stream after blocks; 0: the embedding; n: after n blocks) or layer
    (of other sites), head where heads are probed apart, target (label, control), and

    - score (trained_on, tested_on, depth, …, seed, example): 1 right, 0 wrong, −1 not in the test part; of values
      (y − ȳ)² − (y − ŷ)², NaN outside. Where trained_on is not tested_on, the probe of one model reads the other's
      activations as they are;
    - centred_score (side, depth, …, seed, example): of the other model's probe on this side's activations after these
      are moved so that the means of the two training parts agree: a shift that all texts share is no other code;
    - control_score (side, depth, …, seed, example): the same of the control task, where there is one; control_seen
      (seed): share of the test part whose type, that which has a random label, occurs in training;
    - majority_score (seed, example): of always saying the training part's commonest class (its mean);
    - weight (seed, example): what a score counts for: 1, of values (y − ȳ)²; 0 outside the test part. Score = Σ score /
      Σ weight over splits and examples;
    - converged (side, depth, …, target, seed); leaked_rows (side, depth, …, seed): share of the test part whose
      activations are equal to those of a training example; leaked_texts (seed): the same of texts;
    - label, group (example): groups are never divided between training and test.

    Intervals are 95 % percentile bootstrap over groups, all splits, models and tasks of a group drawn together, NaN
    where fewer than two were tested; probes are not fitted anew, and `spread` is the standard deviation over splits.
    p-values are of a gain over the majority of 0, not below that of an exact sign test of the groups, adjusted over
    depths and heads (Benjamini and Hochberg 1995).
    """

    kind = "probing"

    @property
    def measure(self) -> str:
        """What a score is."""
        return str(self.data.attrs["measure"])

    @property
    def places(self) -> list[str]:
        """depth or layer, and head where heads are probed apart."""
        return [name for name in ("depth", "layer", "head") if name in self.data.dims]

    @property
    def has_control(self) -> bool:
        return "control_score" in self.data

    @cached_property
    def _sums(self) -> dict[Any, np.ndarray]:
        """(unit, group) sums over splits and the group's examples: of scores by (trained_on, tested_on), of controls by
        side, of the majority (1, group); and of weights (group,)."""
        groups, count = np.unique(self.data["group"].values, return_inverse=True)[1], len(np.unique(self.data["group"]))

        def summed(name: str, **side: str) -> np.ndarray:
            order = [*(p for p in self.places if p in self.data[name].dims), "seed", "example"]
            values = self.data[name].sel(side).transpose(*order).values
            values = np.where(self.data["weight"].transpose("seed", "example").values > 0, values, 0).sum(-2)
            values = values.reshape(-1, values.shape[-1]).astype(np.float64)
            total = np.zeros((count, len(values)))
            np.add.at(total, groups, values.T)
            return total.T

        found: dict[Any, np.ndarray] = {
            (one, other): summed("score", trained_on=one, tested_on=other) for one in SIDES for other in SIDES
        }
        if self.has_control:
            found |= {side: summed("control_score", side=side) for side in SIDES}
        found |= {("centred", side): summed("centred_score", side=side) for side in SIDES}
        return found | {"majority": summed("majority_score"), "weight": summed("weight")[0]}

    @cached_property
    def _estimates(self) -> dict[tuple[str, str], np.ndarray]:
        """Quantity and side → (6, unit): value, 95 % interval, p, and the interval that holds for all units at once."""
        sums = self._sums
        wanted = {("majority", ""): sums["majority"], ("difference", ""): sums["tuned", "tuned"] - sums["base", "base"]}
        for side, other in (SIDES, SIDES[::-1]):
            own, moved = sums[side, side], sums[other, side]
            wanted |= {
                ("score", side): own, ("gain", side): own - sums["majority"], ("transfer", side): moved,
                ("centred", side): sums["centred", side], ("centred_change", side): sums["centred", side] - own,
            }  # fmt: skip
            if self.has_control:
                wanted |= {("control", side): sums[side], ("selectivity", side): own - sums[side]}
        units = len(sums["base", "base"])
        found = _ratios(np.concatenate(list(wanted.values())), sums["weight"], units)
        ends = np.cumsum([len(part) for part in wanted.values()])[:-1]
        return dict(zip(wanted, np.split(found, ends, axis=1), strict=True))

    @cached_property
    def _table(self) -> "pd.DataFrame":
        import pandas as pd

        frames = []
        for side in SIDES:
            frame = pd.DataFrame(self._coordinates() | {"side": side})
            for name in ("score", "gain", "control", "selectivity", "transfer", "centred", "centred_change"):
                if (name, side) in self._estimates:
                    value, low, high = self._estimates[name, side][:3]
                    frame = frame.assign(**{name: value, f"{name}_low": low, f"{name}_high": high})
            frame["p"] = stats.benjamini_hochberg(self._estimates["gain", side][3])
            by_seed = self._by_seed(side)
            frame["spread"] = by_seed.std(-1, ddof=1) if by_seed.shape[-1] > 1 else np.nan
            frame["converged"] = self._flat("converged", side, "target", "seed").mean((-1, -2))
            frame["leaked_rows"] = self._flat("leaked_rows", side, "seed").mean(-1)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def _coordinates(self) -> dict[str, np.ndarray]:
        grids = np.meshgrid(*(self.data[name].values for name in self.places), indexing="ij")
        return {name: grid.ravel() for name, grid in zip(self.places, grids, strict=True)}

    def _flat(self, name: str, side: str, *last: str) -> np.ndarray:
        values = self.data[name].sel(side=side).transpose(*self.places, *last).values
        return values.reshape(-1, *values.shape[len(self.places) :])

    def _by_seed(self, side: str) -> np.ndarray:
        """(unit, seed) scores."""
        weight = self.data["weight"]
        score = self.data["score"].sel(trained_on=side, tested_on=side).where(weight > 0, 0).sum("example")
        values = (score / weight.sum("example")).transpose(*self.places, "seed").values
        return values.reshape(-1, values.shape[-1])

    def to_frame(self) -> "pd.DataFrame":
        """A row a depth (and head) and side: score of its own probe, gain over the majority, control and selectivity;
        transfer, the score of the other model's probe on this side's activations, as they are and centred, and how far
        the centred one is from the own."""
        return self._table.copy()

    def differences(self) -> "pd.DataFrame":
        """tuned − base, a row a depth (and head): score of own probes, paired; p as for `to_frame`."""
        import pandas as pd

        value, low, high, p = self._estimates["difference", ""][:4]
        numbers = {"difference": value, "low": low, "high": high, "p": stats.benjamini_hochberg(p)}
        return pd.DataFrame(self._coordinates() | numbers)

    def majority(self) -> tuple[float, float, float]:
        """Score of the majority class, or of the mean: value, low, high."""
        return tuple(self._estimates["majority", ""][:3, 0].tolist())

    def best(self, side: str) -> dict[str, Any]:
        """The row of `to_frame` with the highest score. Score, gain and selectivity have intervals that hold wherever
        that is (95 % for all depths and heads at once, Bonferroni), for it is chosen by the examples that score it."""
        frame = self._table[self._table["side"] == side].reset_index(drop=True)
        at = int(frame["score"].argmax())
        row = frame.iloc[at].to_dict()
        for name in ("score", "gain", "selectivity"):
            if (name, side) in self._estimates:
                row[f"{name}_low"], row[f"{name}_high"] = self._estimates[name, side][4:, at]
        return row

    def first_clear(self, side: str) -> dict[str, int] | None:
        """The first depth (and head) whose score is above the majority's at a false discovery rate of 5 %; or None."""
        frame = self._table[self._table["side"] == side]
        clear = frame[(frame["gain"] > 0) & (frame["p"] <= FDR)]
        return None if clear.empty else {name: int(clear.iloc[0][name]) for name in self.places}

    def headline(self) -> dict[str, Any]:
        """Per side the best depth and the first clear one; the majority; the difference where the base is best."""
        value, low, high = self.majority()
        found: dict[str, Any] = {
            "examples": int(self.data.sizes["example"]),
            "measure": self.measure,
            "majority": jsonable({"score": value, "low": low, "high": high}),
        }
        for side in SIDES:
            found[side] = {"best": jsonable(self.best(side)), "first_clear": self.first_clear(side)}
        found["differences"] = [jsonable(row) for row in self._at_best().to_dict("records")]
        return found

    def _at_best(self) -> "pd.DataFrame":
        """The differences at the depth that is best for the base, and at the tuned model's."""
        frame = self.differences()
        best = [self.best(side) for side in SIDES]
        chosen = [(frame[self.places] == [row[name] for name in self.places]).all(axis=1) for row in best]
        return frame[chosen[0] | chosen[1]]

    def summary(self) -> str:
        """The best depth of both models, what it is to be held against, and whether the two share one code."""
        sizes, attrs, word = self.data.sizes, self.data.attrs, self.measure
        value, low, high = self.majority()
        null = "majority" if word == "accuracy" else "mean"
        share, tested = float((self.data["weight"] > 0).mean()), int((self._sums["weight"] > 0).sum())
        groups = len(np.unique(self.data["group"].values))
        over = "prompts" if groups == sizes["example"] else f"{tested} groups of prompts"
        lines = [
            f"{attrs['label']}{self._classes()} from {attrs['site']} at {attrs['position']}: {sizes['example']} "
            f"prompts, {sizes['seed']} splits with {share:.0%} held out; 95 % intervals over {over}",
            f"{null}: {word} {value:.3g} [{low:.3g}, {high:.3g}]",
        ]
        head = ["", "best", word, f"over {null}", "control", "selectivity", "first clear"]
        rows = []
        for side in SIDES:
            row, first = self.best(side), self.first_clear(side)
            rows.append([
                side, self._place(row), *(_shown(row, n) for n in ("score", "gain")),
                *(_shown(row, n) if self.has_control else "" for n in ("control", "selectivity")),
                self._place(first) if first else "none",
            ])  # fmt: skip
        lines += aligned(head, rows)
        lines += [
            f"tuned − base at {self._place(row)}: {row['difference']:+.3g} [{row['low']:.3g}, {row['high']:.3g}]"
            for row in self._at_best().to_dict("records")
        ]
        for side, other in (SIDES, SIDES[::-1]):
            row = self.best(side)
            lines.append(
                f"{other} probe on {side} activations at {self._place(row)}: {_shown(row, 'transfer')}; means equal: "
                f"{_shown(row, 'centred')}, {_shown(row, 'centred_change', sign='+')} against its own"
            )
        lines += self._checks()
        if tested < 2:
            lines.append("one group was tested: there are no intervals; more splits (--seeds) test others")
        lines += caution(tested, "tested prompts" if over == "prompts" else "tested groups")
        return "\n".join([*lines, *map(str, self.provenance.get("notes", []))])

    def _classes(self) -> str:
        classes = self.data.attrs["classes"]
        return f" ({classes} classes)" if classes else ""

    def _unseen(self) -> str:
        """What to think of a control task whose labels could not be learnt by heart for the test."""
        if "control_seen" not in self.data or self.data["control_seen"].any():
            return ""
        return (
            ", none of the test in training: it is at chance whatever a probe can learn by heart, and selectivity adds "
            "nothing to the gain; name a field whose values recur (--control-field)"
        )

    def _place(self, row: dict[str, Any]) -> str:
        return " ".join(f"{name} {int(row[name])}" for name in self.places)

    def _checks(self) -> list[str]:
        """Leakage, what the control task labels, and fits that did not converge."""
        rows = [self.best(side) for side in SIDES]
        shown = ", ".join(f"{row['leaked_rows']:.0%} ({row['side']}, {self._place(row)})" for row in rows)
        lines = [
            f"occur in training: {float(self.data['leaked_texts'].mean()):.0%} of the test texts; of the test "
            f"activations {shown}"
        ]
        if self.has_control:
            lines.append(f"control task: a random label for each {self.data.attrs['control']}{self._unseen()}")
        failed = int((~self.data["converged"].astype(bool)).sum())
        if failed:
            lines.append(f"{failed} of {self.data['converged'].size} fits did not converge; a larger penalty helps")
        return lines


def _shown(row: dict[str, Any], name: str, sign: str = "") -> str:
    return f"{row[name]:{sign}.3g}{ends(row[f'{name}_low'], row[f'{name}_high'])}"


def _ratios(over: np.ndarray, under: np.ndarray, units: int) -> np.ndarray:
    """(6, entry): Σ over / Σ under (entry, group), its interval, p of 0, and the interval that holds for `units`."""
    found = np.empty((6, len(over)))
    below = stats.resampled_means(under[None])
    for start in range(0, len(over), BLOCK):
        rows = slice(start, start + BLOCK)
        with np.errstate(all="ignore"):
            drawn = stats.resampled_means(over[rows]) / below
            found[0, rows] = over[rows].sum(1) / under.sum()
        if (under > 0).sum() < 2:  # the same ratio in every resample
            drawn[:] = np.nan
        found[1:3, rows] = stats.percentile_interval(drawn)
        tail = np.minimum((drawn <= 0).sum(1), (drawn >= 0).sum(1))
        p = np.clip(2 * (1 + tail) / (1 + drawn.shape[1]), stats.smallest_p((over[rows] != 0).sum(1)), 1)
        found[3, rows] = np.where(np.isnan(drawn).all(1), np.nan, p)
        found[4:, rows] = stats.percentile_interval(drawn, level=1 - (1 - stats.LEVEL) / units)
    return found
