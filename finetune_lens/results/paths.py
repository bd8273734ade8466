"""Effects of paths from every head to groups of receivers, and the circuit that they make up."""

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.few import caution
from finetune_lens.results.patching import METRICS
from finetune_lens.results.tables import jsonable, mean_of

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

RELATIVE = "relative_prob"
WORDS = {RELATIVE: "relative change of the answer's probability"}


class Paths(Result):
    """What `trace_paths` and `find_circuit` measured.

    `data` has the dimensions model, group (of receivers), layer, head (the sender) and example, and for each metric M

    - M (model, group, layer, head, example): metric(path patched) − metric(clean);
    - recipient_M, donor_M (model, example): of the clean and the corrupt run;
    - attribution_M (model, group, layer, head): the mean estimate by edge attribution, of one M, where asked for.

    `metric` may also be "relative_prob", the published score: M = prob over recipient_prob. Its groups, their receivers
    and positions are in the attribute `groups` (JSON); `circuit` holds what was found (JSON; "" where nothing was asked
    for). Intervals are 95 % percentile bootstrap over the examples.
    """

    kind = "paths"

    @property
    def metric(self) -> str:
        return self.data.attrs["metric"]

    @property
    def models(self) -> list[str]:
        return [str(m) for m in self.data.model.values]

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """By name: receivers (a kind), of (a group, heads or nothing), position."""
        return json.loads(self.data.attrs["groups"])

    @property
    def circuit(self) -> dict[str, Any] | None:
        """What was found, as its file says it; None where nothing was."""
        return json.loads(self.data.attrs["circuit"]) if self.data.attrs.get("circuit") else None

    def values(self, metric: str | None = None) -> "xr.DataArray":
        """(model, group, layer, head, example) of an effect."""
        metric = metric or self.metric
        if metric == RELATIVE:
            found = self.data["prob"] / self.data["recipient_prob"]
        elif metric in METRICS and metric in self.data:
            found = self.data[metric]
        else:
            raise InputError(f"metric {metric!r} was not measured; expected {RELATIVE} or one of {', '.join(METRICS)}")
        return found.transpose("model", "group", "layer", "head", "example")

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        return self._summarised(self.values())

    def _summarised(self, values: "xr.DataArray") -> "pd.DataFrame":
        """Mean, interval and adjusted p of every head, the correction over the heads of one group and model."""
        numbers = values.values
        over = values.isel(example=0, drop=True)
        frame = over.copy(data=mean_of(numbers)).to_dataframe("effect").reset_index()
        frame = frame[["model", "group", "layer", "head", "effect"]]
        low, high = stats.interval_of_mean(numbers)
        frame["low"], frame["high"] = low.ravel(), high.ravel()
        reaches = np.abs(numbers).max(-1) > 0  # what cannot is no test
        tested = np.where(reaches, stats.two_sided_p(numbers), np.nan)
        adjusted = [[stats.benjamini_hochberg(p) for p in one] for one in tested]
        frame["p_adjusted"] = np.array(adjusted).ravel()
        return frame

    def to_frame(self, metric: str | None = None) -> "pd.DataFrame":
        """A row a model, group of receivers and sending head: effect, low, high, p_adjusted, whether it was chosen."""
        frame = self._frame.copy() if metric in (None, self.metric) else self._summarised(self.values(metric))
        chosen = self.chosen()
        frame["chosen"] = [tuple(key) in chosen for key in frame[["group", "layer", "head"]].values.tolist()]
        return frame

    def chosen(self) -> set[tuple[str, int, int]]:
        """(group, layer, head) of the circuit that was found."""
        found = self.circuit or {"groups": {}}
        return {(name, *head) for name, group in found["groups"].items() for head in group["heads"]}

    def top(self, n: int = 10, *, group: str | None = None, model: str | None = None) -> "pd.DataFrame":
        """The heads with the largest mean effect either way."""
        frame = self.to_frame()
        for name, value in (("group", group), ("model", model)):
            if value is not None:
                frame = frame[frame[name] == value]
        return frame.reindex(frame["effect"].abs().sort_values(ascending=False, kind="stable").index).head(n)

    def differences(self) -> "pd.DataFrame":
        """Tuned − base of every head's effect, on the same examples: difference, low, high, p_adjusted (over a group).

        Raises:
            InputError: only one model was run.
        """
        if len(self.models) < 2:
            raise InputError("heads change between two models, and one was run; pass a pair")
        values = self.values()
        base, tuned = (values.isel(model=i, drop=True) for i in (0, 1))
        frame = self._summarised((tuned - base).expand_dims("model"))
        frame = frame.rename(columns={"effect": "difference"}).drop(columns="model")
        frame["base"], frame["tuned"] = (mean_of(side.values).ravel() for side in (base, tuned))
        return frame[["group", "layer", "head", "base", "tuned", "difference", "low", "high", "p_adjusted"]]

    def agreement(self) -> "pd.DataFrame":
        """Of edge attribution with the effects, by group: as `Edges.agreement`.

        Raises:
            InputError: it was not estimated.
        """
        import pandas as pd

        if not self.data.attrs.get("agreement"):
            raise InputError("paths were not estimated by edge attribution; measure with attribution=True")
        return pd.DataFrame(json.loads(self.data.attrs["agreement"]))

    def headline(self) -> dict[str, Any]:
        """The circuit, and the largest effects of every group."""
        found: dict[str, Any] = {"metric": self.metric, "examples": int(self.data.sizes["example"])}
        found |= {"models": self.models, "circuit": self.circuit}
        columns = ["model", "layer", "head", "effect", "low", "high"]
        found["groups"] = {
            name: [jsonable(row) for row in self.top(3, group=name)[columns].to_dict("records")] for name in self.groups
        }
        return found

    def summary(self) -> str:
        """Which heads reach which receivers, and how much of the answer hangs on it."""
        frozen = self.data.attrs["freeze"]
        lines = [
            f"paths of {self.data.sizes['layer']} × {self.data.sizes['head']} heads, {self.data.sizes['example']} "
            f"examples; {WORDS.get(self.metric, self.metric)}; held at clean values: {frozen or 'nothing'}"
        ]
        frame, found = self.to_frame(), self.circuit
        for name, group in self.groups.items():
            sent = f", senders patched at {group['sender_position']}" if "sender_position" in group else ""
            lines.append(f"{name}, to {group['to']} at {group['position']}{sent}:")
            for model in self.models:
                part = frame[(frame["group"] == name) & (frame["model"] == model)]
                clear = int((part["p_adjusted"] < 0.05).sum())
                chosen = f", {int(part['chosen'].sum())} chosen" if found else ""
                lines.append(f"  {model}: {clear} of {len(part)} heads clear of 0{chosen}")
                part = part[part["effect"] != 0]
                part = part.reindex(part["effect"].abs().sort_values(ascending=False, kind="stable").index).head(4)
                lines += [
                    f"    {row['layer']}.{row['head']}: {row['effect']:+.3g} [{row['low']:.3g}, {row['high']:.3g}]"
                    + (" *" if row["chosen"] else "")
                    for row in part.to_dict("records")
                ]
        if len(self.models) > 1:
            changed = self.differences()
            some = changed[changed["p_adjusted"] < 0.05]
            some = some.reindex(some["difference"].abs().sort_values(ascending=False, kind="stable").index)
            lines.append(f"{len(some)} of {len(changed)} effects differ between {self.models[0]} and {self.models[1]}")
            lines += [
                f"  {row['group']} {row['layer']}.{row['head']}: {row['base']:+.3g} → {row['tuned']:+.3g}, difference "
                f"{row['difference']:+.3g} [{row['low']:.3g}, {row['high']:.3g}]"
                for row in some.head(4).to_dict("records")
            ]
        if self.data.attrs.get("agreement"):
            lines.append("edge attribution against these paths:")
            lines += [
                f"  {row['group']}: rank correlation {row['rank_correlation']:.2f}, slope {row['slope']:.2f} over "
                f"{row['cells']} heads; worst at {row['worst_at']} ({row['worst']:.2g})"
                for row in self.agreement().to_dict("records")
            ]
        if found:
            sizes = ", ".join(f"{len(group['heads'])} {name}" for name, group in found["groups"].items())
            lines.append(f"circuit: {sizes}")
        lines += caution(self.data.sizes["example"])
        lines += [str(note) for note in self.provenance.get("notes", [])]
        return "\n".join(lines)
