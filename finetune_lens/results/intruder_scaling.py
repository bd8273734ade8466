"""What the model does when its intruder dimensions are scaled, kept alone, or removed."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.curves import Curve
from finetune_lens.results.few import caution
from finetune_lens.results.tables import ends

if TYPE_CHECKING:
    import pandas as pd

LABELS = {"accuracy": "accuracy", "logprob": "log-probability (nats)"}
NAMES = {"intruder": "intruders", "leading": "leading others", "random": "random others"}
COMPARED = ("intruder", "neighbour", "difference")
SIGNIFICANT = 0.05


class IntruderScaling(Result):
    """What `scale_intruders` measured. Higher = better; intervals are 95 %, paired, over the examples of a file.

    `data` has the dimensions metric (accuracy; logprob, in nats), example (with its file), arm (intruder, neighbour),
    scale (λ), matrix, vector, and

    - base_score, tuned_score (metric, example): of the two models;
    - score (arm, scale, metric, example): of W1 + (λ − 1)·σ u vᵀ; NaN where there was nothing to scale;
    - rank, sigma (arm, matrix, vector): which singular vectors of W1 were scaled, from 1; 0 and NaN for none;
    - recovered (part, kind, count, metric, example): of W0 + PΔ (keep) and W1 − PΔ (remove), P on the first `count`
      intruders by σ, or in the same matrices on others of the top k, leading or random; moved (kind, count): how many
      there were;
    - out, in (matrix): of all matrices that were considered.
    """

    kind = "intruder_scaling"

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(self.data["file"].values.tolist()))

    @property
    def scales(self) -> list[float]:
        return self.data["scale"].values.tolist()

    @property
    def directions(self) -> int:
        """Σ min(out, in) over the matrices that were considered."""
        return int(np.minimum(self.data["out"], self.data["in"]).sum())

    @property
    def furthest(self) -> float | None:
        """The λ that the summary speaks of: the smallest below 1, else the largest; None where there is λ = 1 alone."""
        least, most = self.scales[0], self.scales[-1]
        return least if least < 1 else most if most > 1 else None

    def scaled(self, arm: str = "intruder") -> "pd.DataFrame":
        """A row a vector that is scaled: its matrix, rank and σ."""
        import pandas as pd

        one = self.data.sel(arm=arm)
        matrix, vector = np.nonzero(one["rank"].transpose("matrix", "vector").values)
        columns = {name: self.data[name].values[matrix] for name in ("matrix", "layer", "component")}
        for name in ("rank", "sigma"):
            columns[name] = one[name].transpose("matrix", "vector").values[matrix, vector]
        return pd.DataFrame(columns)

    def examples(self, name: str, file: str, **which: Any) -> np.ndarray:
        """The numbers of one file's examples, of the last axis.

        Raises:
            InputError: no such file.
        """
        if file not in self.files:
            raise InputError(f"no file {file!r} was measured; there are {', '.join(self.files)}")
        values = self.data[name].sel(**which).transpose(..., "example").values
        return values[..., self.data["file"].values == file]

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        rows = []
        for file in self.files:
            for metric in self.data["metric"].values.tolist():
                base, tuned = (self.examples(f"{side}_score", file, metric=metric) for side in ("base", "tuned"))
                scores = {arm: self.examples("score", file, metric=metric, arm=arm) for arm in COMPARED[:2]}
                columns: dict[str, Any] = {"file": file, "metric": metric, "scale": self.scales, "examples": len(base)}
                columns |= {"base": base.mean(), "tuned": tuned.mean()}
                columns |= {arm: values.mean(1) for arm, values in scores.items()}
                changes = {arm: values - tuned for arm, values in scores.items()}
                changes["difference"] = changes["intruder"] - changes["neighbour"]
                for name, values in changes.items():
                    low, high = stats.interval_of_mean(values)
                    columns |= {f"{name}_change": values.mean(1), f"{name}_low": low, f"{name}_high": high}
                columns["p"] = np.where(np.array(self.scales) == 1, np.nan, stats.two_sided_p(changes["difference"]))
                rows.append(pd.DataFrame(columns))
        frame = pd.concat(rows, ignore_index=True)
        frame["q"] = stats.benjamini_hochberg(frame["p"].to_numpy())
        return frame.rename(columns={"difference_change": "difference"})

    def to_frame(self) -> "pd.DataFrame":
        """A row a file, metric and λ: means; changes from the tuned model by scaling intruders and by scaling
        neighbours, and the difference of the two changes, each with its interval; p of the difference, and q, that
        adjusted for all rows."""
        return self._frame.copy()

    def curves(self, file: str, *, metric: str = "accuracy") -> list[Curve]:
        """Share of the directions that are taken from the tuned model against a metric: intruders and others kept on
        the base, and the whole update but for them. Empty where nothing was kept or removed.

        Raises:
            InputError: no such file.
        """
        base, tuned = (self.examples(f"{side}_score", file, metric=metric) for side in ("base", "tuned"))
        if "recovered" not in self.data:
            return []
        found = []
        for part, name in (("keep", "{} alone"), ("remove", "all but {}")):
            for kind, what in NAMES.items():
                kinds = [k for k in self.data["kind"].values.tolist() if k.split()[0] == kind]
                if not kinds:
                    continue
                values = self.examples(
                    "recovered", file, metric=metric, part=part, kind=kinds
                )  # (kind, count, example)
                moved = self.data["moved"].sel(kind=kinds[0]).values
                kept = moved if part == "keep" else self.directions - moved
                order = np.argsort(kept, kind="stable")
                found.append(
                    Curve(
                        name.format(what), "directions", kept[order] / self.directions, values.mean(0)[order], base,
                        tuned, [f"{moved[i]} {'kept' if part == 'keep' else 'removed'}" for i in order],
                    )
                )  # fmt: skip
        return found

    def headline(self) -> dict[str, Any]:
        """How many are scaled, and by file and metric the row of the λ that the summary speaks of."""
        attrs = self.data.attrs
        record: dict[str, Any] = {"epsilon": float(attrs["epsilon"]), "k": int(attrs["k"])}
        record |= {name: attrs[name] for name in ("side", "which")}
        record |= {"scaled": len(self.scaled()), "controls": len(self.scaled("neighbour"))}
        record |= {"directions": self.directions, "scale": self.furthest, "files": {}}
        frame = self.to_frame()
        for row in frame[frame["scale"] == self.furthest].to_dict("records"):
            numbers = {k: v if isinstance(v, str | int) or np.isfinite(v) else None for k, v in row.items()}
            record["files"].setdefault(numbers.pop("file"), {})[numbers.pop("metric")] = numbers
        return record | {"notes": self.provenance.get("notes", [])}

    def summary(self) -> str:
        """What was scaled, and by file whether it mattered more than scaling neighbours."""
        attrs, count = self.data.attrs, self.data.sizes["matrix"]
        vectors = f"among the top {attrs['k']} {attrs['side']} singular vectors of {count} matrices"
        scaled, control = self.scaled(), self.scaled("neighbour")
        notes = caution(min(int((self.data["file"].values == file).sum()) for file in self.files))
        notes += [str(note) for note in self.provenance.get("notes", [])]
        if scaled.empty:
            why = f"no vector {vectors} is certainly an intruder (ε = {attrs['epsilon']:g})"
            return "\n".join([f"Nothing to scale: {why}.", *(self._models(file) for file in self.files), *notes])
        what = "the intruder of the largest σ" if attrs["which"] == "top" else "all intruders"
        lines = [
            f"Scaled: {what} {vectors}, {len(scaled)} vectors in {scaled['matrix'].nunique()} matrices "
            f"(ε = {attrs['epsilon']:g}); control: {len(control)} neighbours that are none",
            f"median σ: {scaled['sigma'].median():.3g} (intruders), {control['sigma'].median():.3g} (neighbours): the "
            "larger the σ, the larger the change of the weights",
        ]
        frame = self.to_frame()
        for file in self.files:
            lines.append(self._models(file))
            for metric in self.data["metric"].values.tolist():
                part = frame[(frame["file"] == file) & (frame["metric"] == metric)]
                lines += self._of_metric(part)
                lines += self._of_recovery(file, metric)
        return "\n".join([*lines, *notes])

    def _models(self, file: str) -> str:
        frame = self.to_frame()
        one = frame[frame["file"] == file].groupby("metric", sort=False).first()
        sides = (f"{LABELS[m]} {row['base']:.3g} base, {row['tuned']:.3g} tuned" for m, row in one.iterrows())
        return f"{file} ({int(one['examples'].iloc[0])} examples): {'; '.join(sides)}"

    def _of_metric(self, part: "pd.DataFrame") -> list[str]:
        if self.furthest is None:
            return ["  λ = 1 alone was asked for, which is the tuned model"]
        row = part[part["scale"] == self.furthest].iloc[0]
        shown = [_interval(row, name) for name in COMPARED]
        lines = [
            f"  {row['metric']} at λ = {self.furthest:g}: intruders {shown[0]}, neighbours {shown[1]}, difference "
            f"{shown[2]}: {_reading(row)}"
        ]
        told = part[part["q"] < SIGNIFICANT]
        if len(told):
            at = ", ".join(f"{s:g}" for s in told["scale"])
            lines.append(f"    the two differ at λ = {at} (q < {SIGNIFICANT:g}, adjusted for all λ, files and metrics)")
        return lines

    def _of_recovery(self, file: str, metric: str) -> list[str]:
        """The share of the gain that all intruders hold; nothing where there is no gain to speak of."""
        base, tuned = (self.examples(f"{side}_score", file, metric=metric) for side in ("base", "tuned"))
        curves = self.curves(file, metric=metric)
        if not curves or np.isnan(stats.interval_of_ratio(tuned - base, tuned - base)[0]):
            return []
        what = "gain" if (tuned - base).mean() > 0 else "loss"
        number = int(self.data["count"].values[-1])
        heads = {
            "alone": f"{number} of {self.directions} directions alone on the base bring of the {what}",
            "all but": f"the tuned model without {number} directions keeps of the {what}",
        }
        lines = []
        for part, head in heads.items():
            shown = []
            for curve in curves:
                if part in curve.method:
                    at = -1 if part == "alone" else 0
                    numbers = stats.interval_of_ratio(curve.values[at] - base, tuned - base)
                    ratio, low, high = (round(float(n), 4) + 0.0 for n in numbers)  # + 0.0: no −0
                    shown.append(f"{ratio:.2g}{ends(low, high, '.2g')} ({curve.method.replace(part, '').strip()})")
            lines.append(f"    {head}: {', '.join(shown)}")
        return lines


def _interval(row: "pd.Series", name: str) -> str:
    value = row["difference" if name == "difference" else f"{name}_change"]
    return "none" if np.isnan(value) else f"{value:+.3g}{ends(row[f'{name}_low'], row[f'{name}_high'], '+.3g')}"


def _reading(row: "pd.Series") -> str:
    """What the difference between the two changes says."""
    if np.isnan(row["difference_low"]):
        return "nothing to compare with" if np.isnan(row["difference"]) else "one example tells no difference"
    if row["difference_low"] <= 0 <= row["difference_high"]:
        return "no difference can be told: the interval covers 0"
    helps = "restores" if row["base"] > row["tuned"] else "helps"
    one, other = ("intruders", "neighbours"), ("neighbours", "intruders")
    if row["difference"] < 0:
        cases = {"hurts": (row["intruder_high"] < 0, one), helps: (row["neighbour_low"] > 0, other)}
    else:
        cases = {helps: (row["intruder_low"] > 0, one), "hurts": (row["neighbour_high"] < 0, other)}
    for verb, (certain, (which, than)) in cases.items():
        if certain:
            return f"scaling {which} {verb} more than scaling {than}"
    return f"scaling intruders leaves it {'lower' if row['difference'] < 0 else 'higher'} than scaling neighbours"
