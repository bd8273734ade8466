"""What two models can do without a few of their weights."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.few import caution
from finetune_lens.results.tables import aligned, ends, jsonable, mean_of

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.05  # of the false discovery rate over the counts
TASK = "task"
METRIC = {"accuracy": "accuracy", "logprob": "log-probability (nats)"}


class Pruning(Result):
    """What `prune` measured.

    `data` has the dimensions side (base, tuned), score (gradient, magnitude, random), count (of units removed; 0:
    none), file (task: the held-out part of the base's task), example, seed, matrix, rank, and

    - accuracy, logprob (side, score, count, file, example): each side pruned by its own scores; random removals are
      averaged;
    - random_accuracy, random_logprob (side, seed, count, file): the means of each random removal;
    - removed (side, score, count, matrix): how many units of each matrix, of `units` (matrix) it has;
    - first_matrix, first_unit, first_score (side, rank): the first units by θ·∂L/∂θ: the matrix (its position along
      `matrix`), the unit (a hidden unit, or row·columns + column of an entry), and the score in nats;
    - commonest (file, example): 1 where the commonest answer of the file is right; NaN of texts;
    - id (file, example).

    Intervals are 95 % percentile bootstrap over the examples, both sides of a difference drawn together.
    """

    kind = "pruning"

    @property
    def metric(self) -> str:
        """accuracy; of texts logprob."""
        return self.data.attrs["metric"]

    @property
    def unit(self) -> str:
        return self.data.attrs["unit"]

    @property
    def files(self) -> list[str]:
        return [str(f) for f in self.data.file.values]

    @property
    def counts(self) -> list[int]:
        return [int(c) for c in self.data["count"].values]

    def values(self, *, side: str, score: str, count: int, file: str = TASK, metric: str | None = None) -> np.ndarray:
        """(example,) of the metric.

        Raises:
            InputError: something that was not measured.
        """
        chosen = {"side": side, "score": score, "count": count, "file": file}
        for dimension, value in chosen.items():
            known = self.data[dimension].values
            if value not in known:
                raise InputError(f"no {dimension} {value!r} was measured; there are {', '.join(map(str, known))}")
        values = self.data[metric or self.metric].sel(chosen).values.astype(float)
        return values[self.data["id"].sel(file=file).values != ""]

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        frames = []
        for file in self.files:
            rows, means, changes = [], [], []
            for side in ("base", "tuned"):
                unpruned = self.values(side=side, score="gradient", count=0, file=file)
                for score in ("gradient", "magnitude", "random"):
                    for count in self.counts:
                        rows.append({"file": file, "side": side, "score": score, "count": count})
                        means.append(self.values(side=side, score=score, count=count, file=file))
                        changes.append(means[-1] - unpruned)
            frames.append(pd.DataFrame(rows).assign(**_intervals("", means), **_intervals("change", changes)))
        return pd.concat(frames, ignore_index=True)

    def to_frame(self) -> "pd.DataFrame":
        """A row a file, side, score and count: mean, and its change from the unpruned model, with intervals."""
        return self._frame.copy()

    def unpruned(self) -> "pd.DataFrame":
        """A row a file: the metric of base, tuned model and commonest answer, and tuned − base, paired."""
        import pandas as pd

        rows = []
        for file in self.files:
            base, tuned = (self.values(side=s, score="gradient", count=0, file=file) for s in ("base", "tuned"))
            row = {"file": file, "base": mean_of(base), "tuned": mean_of(tuned)} | _interval("difference", tuned - base)
            rows.append(row | {"commonest": mean_of(self.data["commonest"].sel(file=file).values)})
        return pd.DataFrame(rows)

    def revivals(self, *, side: str = "tuned", file: str = TASK) -> "pd.DataFrame":
        """A row a count above 0: what removing the units of the largest θ·∂L/∂θ brings, and whether that is a revival.

        gain: from the unpruned model; over_random: from as many random units, over_commonest: from giving the file's
        commonest answer always, which pruning may come to by chance; all paired. p: the largest of the p-values of the
        three; adjusted: by Benjamini and Hochberg over the counts. revives: all are above 0, at an adjusted p below
        .05. Of texts there is no commonest answer.
        """
        import pandas as pd

        unpruned = self.values(side=side, score="gradient", count=0, file=file)
        commonest = self.data["commonest"].sel(file=file).values[: len(unpruned)].astype(float)
        rows = []
        for count in self.counts[1:]:
            mine, drawn = (self.values(side=side, score=s, count=count, file=file) for s in ("gradient", "random"))
            gains = {"gain": mine - unpruned, "over_random": mine - drawn, "over_commonest": mine - commonest}
            row = {"count": count, "mean": mean_of(mine), "random": mean_of(drawn)}
            for name, gain in gains.items():
                row |= _interval(name, gain)
            asked = [gain for gain in gains.values() if not np.isnan(gain).all()]
            row["p"] = float(np.max(stats.two_sided_p(np.stack(asked))))
            rows.append(row | {"above": all(mean_of(gain) > 0 for gain in asked)})
        frame = pd.DataFrame(rows)
        frame["adjusted"] = stats.benjamini_hochberg(frame["p"])
        frame["revives"] = frame.pop("above") & (frame["adjusted"] < LEVEL)
        return frame

    def band(self, *, side: str = "tuned", file: str = TASK) -> "pd.DataFrame":
        """A row a count: mean, least and largest of the random removals' means."""
        import pandas as pd

        one = self.data[f"random_{self.metric}"].sel(side=side, file=file).transpose("count", "seed").values
        columns = {"count": self.counts, "mean": one.mean(1), "low": one.min(1), "high": one.max(1)}
        return pd.DataFrame(columns)

    def first(self, n: int = 10, *, side: str = "tuned") -> "pd.DataFrame":
        """The units of the largest θ·∂L/∂θ: matrix, layer, unit (of weights: row and column), score."""
        import pandas as pd

        one = self.data.sel(side=side)
        at = one["first_matrix"].values[:n]
        columns = {name: self.data[name].values[at] for name in ("matrix", "layer", "component")}
        unit = one["first_unit"].values[:n]
        if self.unit == "neuron":
            columns["neuron"] = unit
        else:
            columns["row"], columns["column"] = np.divmod(unit, self.data["columns"].values[at])
        return pd.DataFrame(columns | {"score": one["first_score"].values[:n]})

    def headline(self) -> dict[str, Any]:
        """Both models unpruned, the gain at every count on the task, and at which counts that is a revival."""
        frame = self.revivals()
        gains = frame[["count", "mean", "gain", "gain_low", "gain_high", "random", "adjusted"]]
        unpruned = self.unpruned().to_dict("records")
        return {
            "unit": self.unit, "metric": self.metric, "units": int(self.data["units"].sum()),
            "unpruned": {row.pop("file"): jsonable(row) for row in unpruned},
            "gains": [jsonable(row) for row in gains.to_dict("records")],
            "revives_at": [int(c) for c in frame.loc[frame["revives"], "count"]],
        }  # fmt: skip

    def summary(self) -> str:
        """Both models unpruned, the whole curve on the task, and where it is a revival."""
        examples = int((self.data["id"].sel(file=TASK) != "").sum())
        unit, frame = f"{self.unit}s", self.revivals().set_index("count")
        lines = [
            f"{int(self.data['units'].sum())} {unit}; {METRIC[self.metric]} on {examples} held-out prompts, 95 % "
            "intervals over prompts"
        ]
        rows = self.unpruned().to_dict("records")
        lines += aligned(["", "base", "tuned", "difference", "95 %", "commonest"], [_side_row(row) for row in rows])
        others = [f for f in self.files if f != TASK]
        head = ["removed", "tuned", "gain", "95 %", "adj. p", "largest", "random", "base", *others]
        table = []
        for count, row in frame.iterrows():
            cells = [str(count), f"{row['mean']:.3g}", f"{row['gain']:+.3g}"]
            cells += [ends(row["gain_low"], row["gain_high"]).strip(), f"{row['adjusted']:.2g}"]
            largest = self.values(side="tuned", score="magnitude", count=count)
            base = self.values(side="base", score="gradient", count=count)
            cells += [f"{mean_of(largest):.3g}", f"{row['random']:.3g}", f"{mean_of(base):.3g}"]
            for file in others:
                cells.append(f"{mean_of(self.values(side='tuned', score='gradient', count=count, file=file)):.3g}")
            table.append(cells)
        lines += [
            f"{TASK}, without the {unit} of the largest θ·∂L/∂θ; beside it without the largest, without random ones, "
            "and the base without its own:"
        ]
        lines += aligned(head, table)
        lines.append(self._verdict())
        lines += caution(examples, "held-out prompts")
        return "\n".join([*lines, *(str(note) for note in self.provenance.get("notes", []))])

    def _verdict(self) -> str:
        frame = self.revivals()
        revived = frame.loc[frame["revives"], "count"].tolist()
        row = self.unpruned().set_index("file").loc[TASK]
        if not row["difference_high"] < 0:
            return f"the tuned model is not clearly below the base on {TASK}: there is little to bring back"
        if not revived:
            return (
                "no removal brings the capability back: none is clearly above the unpruned model, random removals and "
                "the commonest answer"
            )
        shown = ", ".join(map(str, revived))
        return (
            f"revives: without {shown} {self.unit}s the tuned model is above the unpruned one, random removals and "
            f"the commonest answer (adjusted p < {LEVEL:g})"
        )


def _interval(name: str, values: np.ndarray) -> dict[str, float]:
    return {key: float(column[0]) for key, column in _intervals(name, [values]).items()}


def _intervals(name: str, values: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Means of each, and their intervals, all drawn together."""
    low, high = stats.interval_of_mean(np.stack(values))
    stem = f"{name}_" if name else ""
    return {name or "mean": np.array([mean_of(v) for v in values]), f"{stem}low": low, f"{stem}high": high}


def _side_row(row: dict[str, Any]) -> list[str]:
    interval = ends(row["difference_low"], row["difference_high"]).strip()
    return [
        row["file"],
        f"{row['base']:.3g}",
        f"{row['tuned']:.3g}",
        f"{row['difference']:+.3g}",
        interval,
        f"{row['commonest']:.3g}",
    ]
