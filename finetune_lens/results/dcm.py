"""Masks over groups of heads: which desideratum each group carries, beside what other heads do."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.few import caution
from finetune_lens.results.tables import jsonable

if TYPE_CHECKING:
    import pandas as pd

# Which heads are patched on the test prompts; random sets have as many heads as were learnt.
PATCHED = ("learnt", "none", "all", "random in group", "random outside")
CONTROLS = PATCHED[1:]


class Masks(Result):
    """What `learn_masks` found.

    `data` has the dimensions desideratum, group, patched (of PATCHED), example (of the test split, each desideratum's
    own), member (heads of the group, in its order), step, and

    - accuracy (desideratum, group, patched, example): 1 where the target is the likeliest token, random sets of heads
      averaged; draws (desideratum, group, patched): so many sets, 0 where there are none;
    - mask (desideratum, group, member): the learnt one before rounding, 0 is patched; layer, head (group, member);
    - loss, validation (desideratum, group, step), best (desideratum, group): the course of it, and the step kept;
    - id (desideratum, example).

    Intervals are 95 % percentile bootstrap over the test prompts.
    """

    kind = "dcm"

    @property
    def desiderata(self) -> list[str]:
        return [str(name) for name in self.data.desideratum.values]

    @property
    def groups(self) -> list[str]:
        return [str(name) for name in self.data.group.values]

    @property
    def chance(self) -> float:
        """The chance floor; NaN where the prompts do not say how many answers there are to choose from."""
        return float(self.data.attrs["chance"])

    def heads(self, desideratum: str, group: str) -> list[tuple[int, int]]:
        """The heads (layer, head) that the learnt mask patches.

        Raises:
            InputError: no such desideratum or group.
        """
        cell = self._cell(desideratum, group)
        chosen = np.flatnonzero(np.round(cell["mask"].values) == 0)
        return [(int(cell["layer"][n]), int(cell["head"][n])) for n in chosen]

    def values(self, desideratum: str, group: str, patched: str = "learnt") -> np.ndarray:
        """(example,) of the test split: whether the target is the likeliest token, with these heads patched."""
        if patched not in PATCHED:
            raise InputError(f"patched is one of {', '.join(PATCHED)}; found {patched!r}")
        cell = self._cell(desideratum, group)
        return cell["accuracy"].sel(patched=patched).values[cell["id"].values != ""].astype(float)

    def _cell(self, desideratum: str, group: str) -> Any:
        for name, given, there in (("desideratum", desideratum, self.desiderata), ("group", group, self.groups)):
            if given not in there:
                raise InputError(f"no {name} {given!r}; there are {', '.join(there)}")
        return self.data.sel(desideratum=desideratum, group=group)

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        sizes = (self.data["layer"] >= 0).sum("member").values
        rows = []
        for desideratum in self.desiderata:
            one = self.data.sel(desideratum=desideratum)
            values = one["accuracy"].transpose("group", "patched", "example").sel(patched=list(PATCHED)).values
            values = values[..., one["id"].values != ""].astype(float)
            more = values[:, :1] - values
            ends = np.stack([*stats.interval_of_mean(values), *stats.interval_of_mean(more)], axis=-1)
            for n, group in enumerate(self.groups):
                learnt = len(self.heads(desideratum, group))
                for k, patched in enumerate(PATCHED):
                    low, high, more_low, more_high = ends[n, k].tolist()
                    rows.append(
                        {
                            "group": group, "position": str(one["position"].values[n]), "desideratum": desideratum,
                            "patched": patched, "heads": {"none": 0, "all": int(sizes[n])}.get(patched, learnt),
                            "of": int(sizes[n]), "accuracy": float(values[n, k].mean()), "low": low, "high": high,
                            "learnt_more": float(more[n, k].mean()), "more_low": more_low, "more_high": more_high,
                            "draws": int(one["draws"].sel(patched=patched).values[n]), "examples": values.shape[-1],
                        }
                    )  # fmt: skip
        order = {group: n for n, group in enumerate(self.groups)}
        return pd.DataFrame(sorted(rows, key=lambda row: order[row["group"]]))

    def to_frame(self) -> "pd.DataFrame":
        """A row a group, desideratum and set of patched heads.

        Accuracy of the target with its interval, and how much more the learnt heads give (paired, with its interval).
        """
        return self._frame.copy()

    def table(self) -> "pd.DataFrame":
        """A row a group and desideratum: the heads learnt, the accuracy they give, and that of the controls."""
        wide = self._frame.pivot(index=["group", "desideratum"], columns="patched", values="accuracy")
        found = self._frame[self._frame["patched"] == "learnt"]
        columns = ["group", "position", "desideratum", "heads", "of", "accuracy", "low", "high"]
        found = found[columns].join(wide[list(CONTROLS)], on=["group", "desideratum"]).reset_index(drop=True)
        carried = {group: self.carried(group) for group in self.groups}
        found["carried"] = [d == carried[g] for g, d in zip(found["group"], found["desideratum"], strict=True)]
        found["patched"] = [
            " ".join(f"{layer}.{head}" for layer, head in self.heads(d, g))
            for g, d in zip(found["group"], found["desideratum"], strict=True)
        ]
        return found

    def clear(self, group: str) -> list[str]:
        """The desiderata that a group can be made to answer: accuracy clear of the controls and of chance.

        The interval of the accuracy lies above the chance floor; the paired differences from no head patched and from
        as many heads outside the group (where there are any) are above 0.
        """
        learnt, found = self._of(group, "learnt"), []
        for desideratum, row in learnt.iterrows():
            more = [self._of(group, name).loc[desideratum, "more_low"] for name in ("none", "random outside")]
            if more[0] > 0 and not more[1] <= 0 and not row["low"] <= self.chance:  # NaN: there is none to compare with
                found.append(str(desideratum))
        return found

    def carried(self, group: str) -> str | None:
        """The desideratum that a group carries: the clear one whose interval lies above those of all the others.

        (They have other prompts, so differences are not paired.) None where there is no such desideratum.
        """
        learnt = self._of(group, "learnt")
        best = str(learnt["accuracy"].idxmax())
        alone = bool((learnt["high"].drop(best) < learnt.loc[best, "low"]).all())
        return best if alone and best in self.clear(group) else None

    def _of(self, group: str, patched: str) -> "pd.DataFrame":
        frame = self._frame[(self._frame["group"] == group) & (self._frame["patched"] == patched)]
        if frame.empty:
            raise InputError(f"no group {group!r}; there are {', '.join(self.groups)}")
        return frame.set_index("desideratum")

    def headline(self) -> dict[str, Any]:
        """What each group carries, and the accuracy, heads and controls of every desideratum."""
        table = self.table()
        chance = None if np.isnan(self.chance) else self.chance
        found: dict[str, Any] = {"chance": chance}
        for group in self.groups:
            rows = table[table["group"] == group].drop(columns=["group", "position", "carried"]).to_dict("records")
            desiderata = {row.pop("desideratum"): jsonable(row) for row in rows}
            found[group] = {"carries": self.carried(group), "desiderata": desiderata}
        return found

    def summary(self) -> str:
        """What each group carries, and the numbers behind it."""
        floor = "not known" if np.isnan(self.chance) else f"{self.chance:.3f}"
        lines = [
            f"Accuracy of the target on test prompts, by {self.data.attrs['by']}, with the learnt heads of a group "
            f"patched (chance floor {floor})"
        ]
        table = self.table()
        for group in self.groups:
            part = table[table["group"] == group]
            carried, clear = self.carried(group), self.clear(group)
            said = f"carries {carried or 'none'}"
            if clear and not carried:
                said = f"can be made to answer {' and '.join(clear)}, none clear of the others"
            lines.append(f"{group} ({part['of'].iloc[0]} heads at {part['position'].iloc[0]}): {said}")
            for row in part.to_dict("records"):
                beside = "; ".join(f"{name} {row[name]:.2f}" for name in CONTROLS if not np.isnan(row[name]))
                lines.append(
                    f"  {row['desideratum']}: {row['accuracy']:.2f} [{row['low']:.2f}, {row['high']:.2f}] with "
                    f"{row['heads']} ({row['patched'] or 'no head'}); {beside}"
                )
        tested = min(int((self.data["id"].sel(desideratum=one) != "").sum()) for one in self.desiderata)
        lines += caution(tested, "test prompts")
        return "\n".join(lines)
