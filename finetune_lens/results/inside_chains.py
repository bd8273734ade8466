"""What later steps and the answer of chains of thought depend on, in two models that read the same chains."""

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

SIDES = ("base", "tuned")
# Quantity → its variable, that of its null, and what it says.
STEPS = {
    "answer_kl": ("answer_kl", "random_answer_kl", "KL at the answer where a step is cut"),
    "logprob": ("logprob", "random_logprob", "change of the answer's log-probability where a step is cut"),
    "changed": ("changed", "random_changed", "answers that change where a step is cut"),
    "importance": ("right_share", "", "right answers with the step − without, written anew"),
    "same": ("same_share", "", "answers as in the end with the step − without, written anew"),
    "shift": ("shift", "shift_null", "KL of the answers that the step makes, written anew"),
}
LEVEL = 0.05  # of the false discovery rate over the heads
ANNOUNCED = 3  # steps from the end, and heads, that a summary names


class InsideChains(Result):
    """What `look_inside_chains` measured, in nats where nothing else is said.

    `data` has the dimensions side (base, tuned), question, source and target (steps, from 0), and

    - chain, ending, steps, measured (question): the text, what ended it, how many steps it has and how many were
      measured; step_text, tokens (question, source);
    - answer, right (side, question): what each model answers after the full chain ("" where that cannot be told);
    - kl, log_kl (side, question, source, target), answer_kl, logprob, changed (side, question, source): attention to
      the source cut (`cot.cuts`); random_…: to as many random tokens from before it; uncut_logprob, rounding
      (side, question);
    - received (side, question, layer, head, source), kurtosis, null_kurtosis (side, question, layer, head):
      `cot.receivers`;
    - right_share, same_share (side, question, cut), shift, shift_null (side, question, source): the chain written anew
      behind its first `cut` steps (`cot.importance`);
    - state_effect (direction, question, depth, place), state_gap (direction, question): `cot.states`.

    NaN where a chain has no such step. Intervals are 95 % percentile bootstrap over the questions, both sides of a
    question drawn together; p-values, none smaller than an exact sign test gives (`few.smallest_p`), are adjusted
    (Benjamini–Hochberg) within a quantity. In tables a step is named by
    its place from the end: −1 is the chain's last.
    """

    kind = "inside_chains"

    @property
    def parts(self) -> list[str]:
        """Which of cuts, heads, states, resampling were measured."""
        return self.data.attrs["parts"].split()

    @property
    def questions(self) -> list[str]:
        return [str(q) for q in self.data["question"].values]

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        frames = [_compared(name, *given) for name, given in self._quantities().items()]
        return pd.concat([f for f in frames if len(f)], ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)

    def to_frame(self) -> "pd.DataFrame":
        """A row a quantity and place: base and tuned, tuned − base with its p, and the nulls, each with its interval.

        Places: of kl and log_kl the distance target − source; of what concerns one step its place from the end; of
        kurtosis layer.head; of state depth @ place, its effect in the base with the tuned model's state as `base`, in
        the tuned model with the base's as `tuned`. null_base, null_tuned: the random cut, the shuffled kurtosis, the
        shift by chance; NaN where 0 is the null.
        """
        return self._frame.copy()

    def _quantities(self) -> dict[str, tuple[list[str], np.ndarray, np.ndarray | None]]:
        """By quantity: the places; (side, place, question); the same of the null."""
        found: dict[str, tuple[list[str], np.ndarray, np.ndarray | None]] = {}
        for name in ("kl", "log_kl"):
            if "cuts" in self.parts:
                found[name] = self._by_distance(name)
        for name, (variable, null, _) in STEPS.items():
            if variable in self.data:
                values = self._steps(variable)
                found[name] = (*self._from_end(values), self._from_end(self._steps(null))[1] if null else None)
        if "heads" in self.parts:
            names = [f"{a}.{b}" for a in self.data["layer"].values for b in self.data["head"].values]
            both = (self._array(n, "layer", "head") for n in ("kurtosis", "null_kurtosis"))
            found["kurtosis"] = (names, *(x.reshape(2, x.shape[1], -1).transpose(0, 2, 1) for x in both))
        if "state_effect" in self.data:
            found["state"] = (*self._states(), None)
        return found

    def _array(self, name: str, *dims: str) -> np.ndarray:
        return self.data[name].transpose("side", "question", *dims).values.astype(float)

    def _steps(self, name: str) -> np.ndarray:
        """(side, question, source); of what is known by cut the change that each step makes."""
        if "cut" in self.data[name].dims:
            return np.diff(self._array(name, "cut"), axis=-1)
        return self._array(name, "source")

    def _by_distance(self, name: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Means over the pairs of steps that lie so far apart, of each question."""
        both = [self._array(n, "source", "target") for n in (name, f"random_{name}")]
        distances = range(1, both[0].shape[-1])
        means = [[mean_of(np.diagonal(x, d, axis1=2, axis2=3)) for d in distances] for x in both]
        shape = (len(distances), *both[0].shape[:2])
        return [f"+{d}" for d in distances], *(np.reshape(m, shape).transpose(1, 0, 2) for m in means)

    def _from_end(self, values: np.ndarray) -> tuple[list[str], np.ndarray]:
        """(side, question, source) by the place from the end, the last first: (side, place, question)."""
        total = self.data["steps"].values
        most = int(total.max(initial=0))
        found = np.full((values.shape[0], most, values.shape[1]), np.nan)
        for q, count in enumerate(total):
            for source in range(min(count, values.shape[2])):
                found[:, count - source - 1, q] = values[:, q, source]
        there = ~np.isnan(found).all((0, 2))
        return [f"-{n + 1}" for n in np.flatnonzero(there)], found[:, there]

    def _states(self) -> tuple[list[str], np.ndarray]:
        """Effects by depth and place, steps from the end."""
        effect = self.data["state_effect"].transpose("direction", "depth", "question", "place").values
        names, found = [], []
        for depth, one in zip(self.data["depth"].values, effect.swapaxes(0, 1), strict=True):
            places, steps = self._from_end(one[..., 1:-1])
            names += [f"{depth} @ {place}" for place in ("prompt", *places, "cue")]
            found += [one[..., 0], *steps.swapaxes(0, 1), one[..., -1]]
        return names, np.stack(found, 1)

    def pairs(self) -> "pd.DataFrame":
        """A row a question, step and later step or answer: its text, KL in base and tuned, tuned − base, and the nulls.

        Raises:
            InputError: attention was not cut.
        """
        import pandas as pd

        self._require("cuts")
        rows = []
        for question in self.questions:
            one = self.data.sel(question=question)
            matrix, random = (self.matrix(question, null=null) for null in (False, True))
            for source in range(int(one["measured"])):
                text = str(one["step_text"].values[source])
                for target in [*range(source + 1, int(one["measured"])), -1]:
                    (base, tuned), nulls = matrix[:, source, target], random[:, source, target]
                    rows.append(
                        {"question": question, "source": source, "text": text}
                        | {"target": "answer" if target < 0 else str(target), "base": base, "tuned": tuned}
                        | {"difference": tuned - base, "null_base": nulls[0], "null_tuned": nulls[1]}
                    )
        return pd.DataFrame(rows)

    def matrix(self, question: str, *, null: bool = False) -> np.ndarray:
        """(side, source, target and answer) KL in one question's chain, as long as it is.

        Raises:
            InputError: no such question, or attention was not cut.
        """
        self._require("cuts")
        if question not in self.questions:
            raise InputError(f"there is no question {question!r}; the first is {self.questions[0]!r}")
        at, before = self.questions.index(question), "random_" if null else ""
        count = int(self.data["measured"].values[at])
        steps = self._array(f"{before}kl", "source", "target")[:, at, :count, :count]
        return np.concatenate([steps, self._array(f"{before}answer_kl", "source")[:, at, :count, None]], -1)

    def receivers(self, n: int = 10, *, side: str = "tuned") -> "pd.DataFrame":
        """The heads of the highest mean kurtosis on one side, as rows of `to_frame` with layer and head.

        over_null: how far that side's kurtosis is above the shuffled one, paired, with interval (over_low, over_high)
        and p adjusted over the heads (over_adjusted); receives: it is above, at an adjusted p below .05.

        Raises:
            InputError: heads were not measured, or there is no such side.
        """
        self._require("heads")
        if side not in SIDES:
            raise InputError(f"side is base or tuned; found {side!r}")
        frame = self._frame[self._frame["quantity"] == "kurtosis"]
        frame = frame.assign(**{name: frame["at"].str.split(".").str[i].astype(int) for i, name in enumerate(HEAD)})
        both = (self._array(name, *HEAD)[SIDES.index(side)] for name in ("kurtosis", "null_kurtosis"))
        mine, null = (x.reshape(len(x), -1).T for x in both)
        low, high = stats.interval_of_mean(mine - null)
        adjusted = stats.benjamini_hochberg(stats.two_sided_p(mine - null))
        frame = frame.assign(over_null=mean_of(mine - null), over_low=low, over_high=high, over_adjusted=adjusted)
        frame["receives"] = (frame["over_null"] > 0) & (frame["over_adjusted"] < LEVEL)
        return frame.sort_values(side, ascending=False, kind="stable").head(n).reset_index(drop=True)

    def reliability(self) -> dict[str, float]:
        """Spearman's ρ over the heads of the mean kurtosis in one half of the questions with that in the other.

        Every second question is a half. NaN where a half has no chain long enough.
        """
        self._require("heads")
        values = self._array("kurtosis", "layer", "head").reshape(2, len(self.questions), -1).swapaxes(1, 2)
        halves = ((mean_of(side[:, ::2]), mean_of(side[:, 1::2])) for side in values)
        return {side: stats.rank_correlation(*both) for side, both in zip(SIDES, halves, strict=True)}

    def states(self) -> "pd.DataFrame":
        """A row a direction, depth and place from the end: effect, and recovery with its interval.

        Raises:
            InputError: states were not patched, or the models answer alike after every chain.
        """
        import pandas as pd

        self._require("states")
        if "state_effect" not in self.data:
            raise InputError("the two models answer alike after every chain: no state can carry another answer")
        names, values = self._states()
        frames = []
        for direction, effect, gap in zip(
            self.data["direction"].values, values, self.data["state_gap"].values, strict=True
        ):
            ratio, low, high = stats.interval_of_ratio(effect, gap)
            depth, place = zip(*(name.split(" @ ") for name in names), strict=True)
            columns = {"direction": direction, "depth": np.array(depth, int), "place": place, "effect": mean_of(effect)}
            frames.append(pd.DataFrame(columns | {"recovery": ratio, "low": low, "high": high}))
        return pd.concat(frames, ignore_index=True)

    def _require(self, part: str) -> None:
        if part not in self.parts:
            raise InputError(f"{part} were not measured; found {', '.join(self.parts)}")

    def rows(self, quantity: str) -> "pd.DataFrame":
        """The rows of one quantity, by place."""
        return self._frame[self._frame["quantity"] == quantity].set_index("at")

    def headline(self) -> dict[str, Any]:
        """Counts, and the first rows of every quantity: the nearest steps, the last ones, the highest heads."""
        counts = self.provenance.get("counts", {})
        short = ["at", "base", "tuned", "difference", "low", "high", "adjusted", "null_base", "null_tuned"]
        shown = {name: self._first(name)[short] for name in self._frame["quantity"].unique()}
        record: dict[str, Any] = {
            "questions": len(self.questions), "steps": float(mean_of(self.data["steps"].values.astype(float))),
            "right": dict(zip(SIDES, mean_of(self.data["right"].values).tolist(), strict=True)), "counts": counts,
            "quantities": {n: [jsonable(row) for row in rows.to_dict("records")] for n, rows in shown.items()},
        }  # fmt: skip
        if "heads" in self.parts:
            record["distance"] = int(self.data.attrs["distance"])
            record["reliability"] = jsonable(self.reliability())
        if "state_effect" in self.data:
            record["states"] = [jsonable(row) for row in self._carrying().to_dict("records")]
        return record

    def _first(self, quantity: str) -> "pd.DataFrame":
        """The nearest distances, the last steps, or the highest heads; of states where both models differ most."""
        if quantity == "kurtosis":
            return self.receivers(ANNOUNCED)
        rows = self._frame[self._frame["quantity"] == quantity]
        if quantity == "state":
            rows = rows.sort_values("difference", key=np.abs, ascending=False, kind="stable")
        return rows.head(ANNOUNCED)

    def _carrying(self) -> "pd.DataFrame":
        """Of each direction, of the steps and of prompt and cue before the last block: where recovery is highest."""
        frame = self.states()
        frame["of"] = frame["place"].where(frame["place"].isin(["prompt", "cue"]), "steps")
        frame = frame[(frame["of"] == "steps") | (frame["depth"] < frame["depth"].max())]
        return frame.loc[frame.groupby(["direction", "of"], sort=False)["effect"].idxmax()]

    def summary(self) -> str:
        """How chains were read, and of each quantity the first rows."""
        steps, counts = self.data["steps"].values, self.provenance.get("counts", {})
        whose = {"tuned": "the tuned model's chains", "base": "the base's chains", "given": "given chains"}
        right = mean_of(self.data["right"].values)
        length = f"{steps.min()}" if steps.min() == steps.max() else f"{steps.min()} to {steps.max()}"
        lines = [
            f"{len(self.questions)} questions, {whose.get(self.data.attrs['chains'], 'their own chains')} of {length} "
            f"steps; right after them: base {right[0]:.3g}, tuned {right[1]:.3g}"
        ]
        lines += [f"  {line}" for line in _told(counts)]
        head = ["", "n", "base", "95 %", "tuned", "95 %", "tuned − base", "95 %", "adj. p", "null", "null"]
        table = [
            _line(name, row)
            for name in self._frame["quantity"].unique()
            if name not in ("log_kl", "state", "same")
            for row in self._first(name).to_dict("records")
            if row["questions"]
        ]
        if "cuts" in self.parts:
            lines.append(f"KL before a cut, which is rounding: at most {np.nanmax(self.data['rounding'].values):.2g}")
        if table:
            lines += [
                "means over n questions; nulls of base and tuned: random tokens cut, attention shuffled, answers split "
                "at random:"
            ]
            lines += aligned(head, table)
            lines += caution(len(self.questions), "questions")
        long = self._frame.loc[self._frame["quantity"] == "kurtosis", "questions"].max()
        if "heads" in self.parts and not long > 1:
            lines.append(
                f"heads: {long} chains are long enough for a kurtosis, of four steps and more that later ones may "
                "attend to; to tell it from its null takes two"
            )
        elif "heads" in self.parts:
            found = {side: int(self.receivers(10**9, side=side)["receives"].sum()) for side in SIDES}
            halves = ", ".join(f"{side} {_plainly(rho, '.2f')}" for side, rho in self.reliability().items())
            lines.append(
                f"kurtosis of attention from {self.data.attrs['distance']} steps on, above that of shuffled attention "
                f"(false discovery rate {LEVEL:.0%}): base {found['base']}, tuned {found['tuned']} heads; ρ between "
                f"halves of the questions: {halves}"
            )
        lines += self._state_lines()
        return "\n".join([*lines, *map(str, self.provenance.get("notes", []))])

    def _state_lines(self) -> list[str]:
        if "states" not in self.parts:
            return []
        if "state_effect" not in self.data:
            return ["states: the two models answer alike after every chain, so that none can carry another answer"]
        apart = int((~np.isnan(self.data["state_gap"].values)).all(0).sum())
        lines = [
            f"states, on {apart} chains after which the models answer otherwise; the highest recovery of all depths "
            "and places, chosen after the fact:"
        ]
        for direction, rows in self._carrying().groupby("direction", sort=False):
            told = [
                f"{'step ' * (row['of'] == 'steps')}{row['place']} at depth {row['depth']}: {row['recovery']:.3g}"
                f"{ends(row['low'], row['high'])}"
                for row in rows.to_dict("records")
            ]
            lines.append(f"  {direction}: {'; '.join(told)}")
        return lines


HEAD = ("layer", "head")
COLUMNS = (
    "quantity", "at", "questions", "base", "base_low", "base_high", "tuned", "tuned_low", "tuned_high", "difference",
    "low", "high", "p", "adjusted", "null_base", "null_base_low", "null_base_high", "null_tuned", "null_tuned_low",
    "null_tuned_high",
)  # fmt: skip


def _compared(name: str, places: list[str], values: np.ndarray, null: np.ndarray | None) -> "pd.DataFrame":
    """Both sides and their difference, (side, place, question), with intervals."""
    import pandas as pd

    base, tuned = values
    columns: dict[str, Any] = {"quantity": name, "at": places, "questions": (~np.isnan(base + tuned)).sum(-1)}
    for stem, one in (("base", base), ("tuned", tuned)):
        low, high = stats.interval_of_mean(one)
        columns |= {stem: mean_of(one), f"{stem}_low": low, f"{stem}_high": high}
    columns["difference"] = mean_of(tuned - base)
    columns["low"], columns["high"] = stats.interval_of_mean(tuned - base)
    columns["p"] = stats.two_sided_p(tuned - base)
    columns["adjusted"] = stats.benjamini_hochberg(columns["p"])
    for side, one in zip(SIDES, np.full_like(values, np.nan) if null is None else null, strict=True):
        low, high = stats.interval_of_mean(one)
        columns |= {f"null_{side}": mean_of(one), f"null_{side}_low": low, f"null_{side}_high": high}
    return pd.DataFrame(columns)[list(COLUMNS)]


def _line(name: str, row: dict[str, Any]) -> list[str]:
    cells = [f"{name} {row['at']}", str(row["questions"]), _cell(row, "base"), _ends(row, "base_")]
    cells += [_cell(row, "tuned"), _ends(row, "tuned_"), _plainly(row["difference"], "+.3g"), _ends(row, "")]
    cells += [_cell(row, "adjusted")]
    return [*cells, _cell(row, "null_base"), _cell(row, "null_tuned")]


def _cell(row: dict[str, Any], name: str) -> str:
    return _plainly(row[name], ".3g")


def _plainly(value: float, form: str) -> str:
    return "–" if np.isnan(value) else f"{value:{form}}"


def _ends(row: dict[str, Any], stem: str) -> str:
    return ends(row[f"{stem}low"], row[f"{stem}high"]).strip()


def _told(counts: dict[str, Any]) -> list[str]:
    """What was not as it should be, in words; nothing of what there is none of."""
    chains = counts.get("chains", {})
    words = {
        "hit the length limit": chains.get("length", 0),
        "are cut off before a text that the tokenizer cannot read": chains.get("unreadable", 0),
        "are empty": chains.get("empty", 0),
        "have more steps than are measured": counts.get("capped", 0),
        "have a single step": counts.get("single_step", 0),
    }  # fmt: skip
    lines = [f"{number} chains {word}" for word, number in words.items() if number]
    if number := counts.get("steps_without_tokens", 0):
        lines.append(f"{number} steps have no tokens of their own")
    for name, word in (("unparsable", "answers cannot be told"), ("without_answer", "answers are empty or unreadable")):
        lines += [f"{side}: {number} {word}" for side, number in counts.get(name, {}).items() if number]
    return lines
