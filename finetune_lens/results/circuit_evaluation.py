"""Circuits evaluated: each score on each example, and what they say of faithfulness, completeness and minimality."""

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


class CircuitEvaluation(Result):
    """What `evaluate_circuit` measured. F is the metric, M the model, C a circuit, ∅ no head.

    `data` has the dimensions circuit, model (base, tuned; or model), example, draw, knockout and member, and

    - full, nothing (model, example): F(M), F(∅);
    - alone (circuit, model, example): F(C); pruned: F(the minimal circuit);
    - random (circuit, model, draw, example): F of random circuits of its size, the same in each model;
    - without, model_without (circuit, model, knockout, example): F(C∖K), F(M∖K); removed_name (circuit, knockout) says
      which K it is, removed (circuit, knockout, member) which heads are in it;
    - held, dropped (circuit, model, member, example): F(C∖K), F(C∖(K ∪ {v})) of minimality, K in together (circuit,
      model, member, partner); needed (circuit, model, member): 1 where v stays in the minimal circuit;
    - group, layer, head (circuit, member).

    NaN, "" and −1 fill what a circuit has fewer of, and what was not measured. Intervals are 95 % percentile bootstrap
    over examples, the same resamples for every score.
    """

    kind = "circuit_evaluation"

    @property
    def metric(self) -> str:
        return str(self.data.attrs["metric"])

    @property
    def threshold(self) -> float:
        """Of minimality."""
        return float(self.data.attrs["threshold"])

    @property
    def circuits(self) -> list[str]:
        return [str(name) for name in self.data.circuit.values]

    @property
    def models(self) -> list[str]:
        return [str(name) for name in self.data.model.values]

    @property
    def has_minimality(self) -> bool:
        return bool((self.data.needed >= 0).any())

    def chosen(self, circuit: str | None, model: str | None) -> tuple[str, str]:
        """The circuit and model of these names, or the only ones.

        Raises:
            InputError: no such one, or several to choose from.
        """
        found = []
        for what, name, names in (("circuit", circuit, self.circuits), ("model", model, self.models)):
            if name is None and len(names) > 1:
                raise InputError(f"several {what}s were evaluated, say which: {', '.join(names)}")
            if name is not None and name not in names:
                raise InputError(f"no {what} {name!r} was evaluated; found {', '.join(names)}")
            found.append(names[0] if name is None else name)
        return found[0], found[1]

    def table(self) -> "pd.DataFrame":
        """A row a circuit and model.

        full, circuit_score, floor: F(M), F(C), F(∅). faithfulness: F(C)/F(M) with low and high; normalised: the same
        above the floor; NaN where the denominator is not clear of 0. random: mean F of random circuits, with their 5
        and 95 % quantiles; percentile: share of them below F(C), ties half, in %; p: (1 + those that reach F(C)) /
        (1 + all). minimal: heads left, F and faithfulness of the minimal circuit.
        """
        return self._table.copy()

    @cached_property
    def _table(self) -> "pd.DataFrame":
        import pandas as pd

        rows = []
        for circuit in self.circuits:
            for model in self.models:
                one = self.data.sel(circuit=circuit, model=model)
                full, floor, alone = (one[name].values for name in ("full", "nothing", "alone"))
                row = {"circuit": circuit, "model": model, "heads": int((one.layer >= 0).sum())}
                row |= {"full": mean_of(full)} | _ends(full, "full")
                row |= {"circuit_score": mean_of(alone)} | _ends(alone, "circuit_score") | {"floor": mean_of(floor)}
                row |= _ratio(alone, full, "faithfulness") | _ratio(alone - floor, full - floor, "normalised")
                row |= _null(mean_of(one.random.transpose("draw", "example").values), mean_of(alone))
                needed = one.needed.values
                row["minimal_heads"] = int((needed == 1).sum()) if self.has_minimality else np.nan
                row |= {"minimal_score": mean_of(one.pruned.values)} | _ends(one.pruned.values, "minimal_score")
                row |= _ratio(one.pruned.values, full, "minimal_faithfulness")
                rows.append(row)
        return pd.DataFrame(rows)

    def completeness(self, circuit: str | None = None, model: str | None = None) -> "pd.DataFrame":
        """A row a K: heads in it, F(C∖K), F(M∖K), their difference with interval, and gap, its size.

        Args:
            circuit, model: only these; default all.
        """
        import pandas as pd

        parts = []
        for name, side in self._pairs(circuit, model):
            one = self.data.sel(circuit=name, model=side)
            labels = one.removed_name.values.astype(str)
            there = labels != ""
            mine, theirs = (one[v].transpose("knockout", "example").values[there] for v in ("without", "model_without"))
            low, high = stats.interval_of_mean(mine - theirs)
            difference = mean_of(mine - theirs)
            parts.append(pd.DataFrame({
                "circuit": name, "model": side, "removed": labels[there],
                "heads": (one.removed.values[there] == 1).sum(1), "circuit_score": mean_of(mine),
                "model_score": mean_of(theirs), "difference": difference, "low": low, "high": high,
                "gap": np.abs(difference),
            }))  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    def minimality(self, circuit: str | None = None, model: str | None = None) -> "pd.DataFrame":
        """A row a head v: K, F(C∖K), F(C∖(K ∪ {v})), score with interval, and whether it stays.

        score: (F(C∖K) − F(C∖(K ∪ {v}))) / |F(C∖(K ∪ {v}))|, infinite where only the denominator is 0. Where both are
        0, with K gone there is nothing left that v could add to: the verdict is "undetermined", and v stays.

        Raises:
            InputError: minimality was not measured.
        """
        import pandas as pd

        if not self.has_minimality:
            raise InputError("minimality was not measured: evaluate with minimality=True")
        parts = []
        for name, side in self._pairs(circuit, model):
            one = self.data.sel(circuit=name, model=side)
            there = one.layer.values >= 0
            layer, head = one.layer.values[there], one["head"].values[there]
            heads = np.array([f"{a}.{b}" for a, b in zip(layer, head, strict=True)])
            held, dropped = (one[v].transpose("member", "example").values[there] for v in ("held", "dropped"))
            before, after = mean_of(held), mean_of(dropped)
            sign = np.where(after < 0, -1.0, 1.0)[:, None]
            _, low, high = np.transpose([stats.interval_of_ratio(a - b, s * b)
                                         for a, b, s in zip(held, dropped, sign, strict=True)])  # fmt: skip
            with np.errstate(divide="ignore", invalid="ignore"):
                score = (before - after) / np.abs(after)
            kept = one.needed.values[there] == 1
            verdict = np.where(kept, "needed", "not needed").astype(object)
            verdict[(before == 0) & (after == 0)] = "undetermined"
            beside = one.together.transpose("member", "partner").values[np.ix_(there, there)] == 1
            parts.append(pd.DataFrame({
                "circuit": name, "model": side, "group": one.group.values[there].astype(str), "layer": layer,
                "head": head, "partners": [" ".join(heads[row]) for row in beside], "held": before, "dropped": after,
                "score": score, "low": low, "high": high, "kept": kept, "verdict": verdict,
            }))  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    def difference(self) -> "pd.DataFrame":
        """A row a circuit: its faithfulness in base and tuned, and tuned − base with the interval of paired resamples.

        Raises:
            InputError: one model only was measured.
        """
        import pandas as pd

        if len(self.models) < 2:
            raise InputError("one model was evaluated: there is nothing to take a difference from")
        base, tuned = (self.data.sel(model=side) for side in self.models)
        rows = []
        for circuit in self.circuits:
            (before, before_drawn), (after, after_drawn) = (
                stats.resampled_ratio(one.alone.sel(circuit=circuit).values[None], one.full.values[None])
                for one in (base, tuned)
            )
            [[low], [high]] = stats.percentile_interval(after_drawn - before_drawn)
            row = {"circuit": circuit, "base": before[0], "tuned": after[0], "difference": after[0] - before[0]}
            rows.append(row | {"low": low, "high": high})
        return pd.DataFrame(rows)

    def to_frame(self) -> "pd.DataFrame":
        """The table."""
        return self.table()

    def headline(self) -> dict[str, Any]:
        """By circuit and model: scores, faithfulness, the null, the largest gap of completeness, heads needed."""
        gaps = self._gaps()
        found: dict[str, Any] = {"metric": self.metric, "examples": int(self.data.sizes["example"])}
        names = (
            "heads", "full", "circuit_score", "floor", "faithfulness", "faithfulness_low", "faithfulness_high",
            "random", "p", "minimal_heads", "minimal_faithfulness",
        )  # fmt: skip
        for row in self.table().to_dict("records"):
            key = row["circuit"], row["model"]
            found.setdefault(row["circuit"], {})[row["model"]] = jsonable({n: row[n] for n in names} | gaps[key])
        if len(self.models) > 1:
            for row in self.difference().to_dict("records"):
                found[row["circuit"]]["tuned − base"] = jsonable({n: row[n] for n in ("difference", "low", "high")})
        return found

    def summary(self) -> str:
        """Each circuit in each model, then the models against each other."""
        draws = self.data.sizes["draw"]
        lines = [f"{self.metric} over {self.data.sizes['example']} examples; other heads at their means"]
        gaps = self._gaps()
        for row in self.table().to_dict("records"):
            lines.append(
                f"{row['circuit']} ({row['heads']} heads) in {row['model']}: full {row['full']:.3g}, circuit "
                f"{row['circuit_score']:.3g}, no head {row['floor']:.3g}; faithfulness {_said(row, 'faithfulness')}, "
                f"above the floor {_said(row, 'normalised')}"
            )
            if draws:
                lines.append(
                    f"  {draws} random circuits: {row['random']:.3g} [{row['random_low']:.3g}, "
                    f"{row['random_high']:.3g}]; p {row['p']:.2g}"
                )
            lines.append("  completeness: " + "; ".join(
                f"{name.replace('_', ' ')} {value:.3g}" for name, value in gaps[row["circuit"], row["model"]].items()
            ))  # fmt: skip
            if self.has_minimality:
                lines.append(
                    f"  minimality: {row['minimal_heads']:.0f} of {row['heads']} heads stay; circuit of them "
                    f"{row['minimal_score']:.3g}, faithfulness {_said(row, 'minimal_faithfulness')}"
                )
        if len(self.models) > 1:
            for row in self.difference().to_dict("records"):
                said = _said(row, "difference", ends=("low", "high"), sign="+")
                lines.append(f"{row['circuit']}: faithfulness tuned − base {said}")
        lines += caution(self.data.sizes["example"])
        lines += [str(note) for note in self.provenance.get("notes", [])]
        return "\n".join(lines)

    def _pairs(self, circuit: str | None, model: str | None) -> list[tuple[str, str]]:
        """The circuits and models asked for."""
        names, sides = ([circuit] if circuit else self.circuits), ([model] if model else self.models)
        return [self.chosen(name, side) for name in names for side in sides]

    def _gaps(self) -> dict[tuple[str, str], dict[str, float]]:
        """By circuit and model: the largest gap over groups, and the mean and largest over random subsets."""
        found = {}
        for key, part in self.completeness().groupby(["circuit", "model"], sort=False):
            random = part["removed"].str.startswith("random ")
            gaps = {"largest_gap_of_a_group": float(part["gap"][~random].max())}
            if random.any():
                gaps["mean_gap_of_random_subsets"] = float(part["gap"][random].mean())
                gaps["largest_gap_of_random_subsets"] = float(part["gap"][random].max())
            found[key] = gaps
        return found


def _ends(values: np.ndarray, name: str) -> dict[str, float]:
    low, high = stats.interval_of_mean(values)
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _ratio(numerator: np.ndarray, denominator: np.ndarray, name: str) -> dict[str, float]:
    ratio = stats.interval_of_ratio(numerator, denominator)
    return {key: float(v) for key, v in zip((name, f"{name}_low", f"{name}_high"), ratio, strict=True)}


def _null(random: np.ndarray, score: float) -> dict[str, float]:
    """Of the random circuits' mean scores: mean, 5 and 95 %, and where the circuit's own lies."""
    if not len(random):
        return dict.fromkeys(("random", "random_low", "random_high", "percentile", "p"), np.nan)
    low, high = np.quantile(random, (0.05, 0.95))
    percentile = 100 * float((random < score).mean() + (random == score).mean() / 2)
    p = (1 + int((random >= score).sum())) / (1 + len(random))
    return {"random": float(random.mean()), "random_low": float(low), "random_high": float(high),
            "percentile": percentile, "p": p}  # fmt: skip


def _said(row: dict[str, Any], name: str, *, ends: tuple[str, str] | None = None, sign: str = "") -> str:
    low, high = ends or (f"{name}_low", f"{name}_high")
    if np.isnan(row[name]):
        return "undefined (the denominator is not clear of 0)"
    interval = "" if np.isnan(row[low]) else f" [{row[low]:{sign}.3g}, {row[high]:{sign}.3g}]"
    return f"{row[name]:{sign}.3g}{interval}"
