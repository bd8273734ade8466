"""How accuracy returns along training, from several starts."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.few import FEW, caution, coverage
from finetune_lens.results.tables import aligned, ends, jsonable, mean_of

if TYPE_CHECKING:
    import pandas as pd

ALIKE = 2.0  # a ratio whose interval covers 1 and ends below this counts as no fewer steps
SAME = 1e-9  # a mean that is the threshold but for rounding reaches it
FAIR = (
    "scratch differs from the tuned model in everything: give the control that was tuned first and never had the "
    "capability (--control)"
)


class Revival(Result):
    """What `revive` and `follow` measured.

    `data` has the dimensions start, seed, step, file (the first has the threshold), example, and

    - accuracy, logprob (start, seed, step, file, example): NaN from where a run diverged; base_accuracy, base_logprob
      (file, example): of the model that is not trained, where there is one;
    - diverged (start, seed): at which step, −1 where it did not;
    - role (start): tuned, control, scratch, random, or "" of a start that is only followed;
    - id (file, example).

    The number of steps to the threshold is where the accuracy, mean over seeds and examples, first reaches it,
    interpolated between evaluations by log(1 + step); ∞ where it never does. A seed that diverged leaves the mean.
    Intervals are 95 % percentile bootstrap over seeds and examples together, the same draws for all starts and steps:
    the runs of one seed have seen the same batches.
    """

    kind = "revival"

    @property
    def starts(self) -> list[str]:
        return [str(s) for s in self.data.start.values]

    @property
    def files(self) -> list[str]:
        return [str(f) for f in self.data.file.values]

    @property
    def steps(self) -> np.ndarray:
        """After how many there was an evaluation."""
        return self.data.step.values.astype(float)

    @property
    def threshold(self) -> float:
        """The accuracy to be reached."""
        return float(self.data.attrs["threshold"])

    def role(self, start: str) -> str:
        return str(self.data["role"].sel(start=start).item())

    def values(self, *, file: str | None = None, metric: str = "accuracy") -> np.ndarray:
        """(start, seed, step, example) of one file, by default the first.

        Raises:
            InputError: it was not measured.
        """
        file = self._file(file)
        there = self.data["id"].sel(file=file).values != ""
        values = self.data[metric].sel(file=file).transpose("start", "seed", "step", "example").values
        return values[..., there].astype(float)

    def base(self, *, file: str | None = None) -> float:
        """Accuracy of the base; NaN where none was measured."""
        return float(mean_of(self.data["base_accuracy"].sel(file=self._file(file)).values)) if self.has_base else np.nan

    @property
    def has_base(self) -> bool:
        return "base_accuracy" in self.data

    def _file(self, file: str | None) -> str:
        if file is not None and file not in self.files:
            raise InputError(f"nothing was measured on {file!r}; there are {', '.join(self.files)}")
        return self.files[0] if file is None else file

    @cached_property
    def _kept(self) -> dict[str, np.ndarray]:
        return {}

    def _drawn(self, file: str) -> np.ndarray:
        """Resampled means of a file, drawn once."""
        if file not in self._kept:
            self._kept[file] = _resampled(self.values(file=file))
        return self._kept[file]

    def curves(self, file: str | None = None) -> "pd.DataFrame":
        """A row a start and step: mean accuracy over seeds and examples with its interval, and mean logprob."""
        import pandas as pd

        file = self._file(file)
        mean, logprob = (_over_runs(self.values(file=file, metric=m)) for m in ("accuracy", "logprob"))
        drawn = self._drawn(file)
        frames = []
        for row, start in enumerate(self.starts):
            low, high = stats.percentile_interval(drawn[row])
            columns = {"start": start, "step": self.data.step.values, "accuracy": mean[row], "low": low, "high": high}
            frames.append(pd.DataFrame(columns | {"logprob": logprob[row]}))
        return pd.concat(frames, ignore_index=True)

    def to_frame(self) -> "pd.DataFrame":
        """A row a file, start and step: as `curves`."""
        import pandas as pd

        frames = [self.curves(file).assign(file=file) for file in self.files]
        frame = pd.concat(frames, ignore_index=True)
        return frame[["file", *(c for c in frame if c != "file")]]

    def crossings(self, file: str | None = None) -> "pd.DataFrame":
        """A row a start: steps to the threshold, and how many times those of the tuned model that is.

        steps, low, high: ∞ beyond the last step. censored: share of the resamples that never reach the threshold.
        ratio: steps / the tuned model's; NaN where either is not reached, or the tuned model needs none. ratio_low,
        ratio_high: the interval's ends, where a start that does not reach the threshold counts as anything beyond the
        last step. ratio_censored: share of the resamples in which one of the two does not.
        """
        import pandas as pd

        file = self._file(file)
        mean, drawn, last = _over_runs(self.values(file=file)), self._drawn(file), self.steps[-1]
        tuned = self._tuned
        found = [steps_to(self.steps, curve, self.threshold) for curve in mean]
        resampled = [steps_to(self.steps, one.T, self.threshold) for one in drawn]
        rows = []
        for row, start in enumerate(self.starts):
            low, high = _ends(resampled[row], resampled[row])
            diverged = int((self.data["diverged"].sel(start=start).values >= 0).sum())
            columns = {"start": start, "role": self.role(start), "first": mean[row][0], "last": mean[row][-1]}
            columns |= {"steps": float(found[row]), "low": low, "high": high, "diverged": diverged}
            columns["censored"] = float(np.isinf(resampled[row]).mean())
            columns |= dict.fromkeys(("ratio", "ratio_low", "ratio_high", "ratio_censored"), np.nan)
            if tuned is not None and row != tuned and found[tuned] > 0:
                least, most = _bounds(found[row], found[tuned], last)
                columns["ratio"] = float(least) if least == most else np.nan
                columns["ratio_low"], columns["ratio_high"] = _ends(*_bounds(resampled[row], resampled[tuned], last))
                either = np.isinf(resampled[row]) | np.isinf(resampled[tuned])
                columns["ratio_censored"] = float(either.mean())
            rows.append(columns)
        return pd.DataFrame(rows)

    @property
    def _tuned(self) -> int | None:
        return next((row for row, start in enumerate(self.starts) if self.role(start) == "tuned"), None)

    def verdict(self) -> tuple[str, str]:
        """A word and why: wrapped, lost, kept, undecided; "" where no start is the tuned model. By the first file.

        wrapped: against every control the interval of the ratio lies above 1, and one was given beside fresh weights.
        lost: against one of them it covers 1 or lies below, and ends below 2: the tuned model needs no fewer steps.
        kept: the threshold is reached without training. undecided: all else.
        """
        if self._tuned is None:
            return "", "no start is the tuned model: nothing is compared"
        frame = self.crossings().set_index("role", drop=False)
        if frame.loc["tuned", "steps"] == 0:
            return "kept", "the tuned model reaches the threshold without training: there is nothing to revive"
        others = frame[frame["role"].isin(["control", "scratch"])]
        compared = frame[frame["role"].isin(["tuned", "control", "scratch"])]
        diverged = compared[compared["diverged"] == self.data.sizes["seed"]]
        if len(diverged):
            return "undecided", f"{diverged['start'].iloc[0]} diverged in every seed: lower the rate"
        able = others[others["steps"] == 0]
        if len(able):
            return "undecided", f"{able['start'].iloc[0]} reaches the threshold without training: it is no control"
        if not len(others):
            return "undecided", "there is no control: give one that was tuned first and never had the capability"
        lost = others[(others["ratio_low"] <= 1) & (others["ratio_high"] < ALIKE)]
        if len(lost):
            return "lost", f"the tuned model needs no fewer steps than {_said(lost.iloc[0])}"
        unclear = others[~(others["ratio_low"] > 1)]
        if len(unclear):
            one = unclear.iloc[0]
            if np.isinf(one["steps"]) and np.isinf(frame.loc["tuned", "steps"]):
                return "undecided", f"neither the tuned model nor {one['start']} reaches the threshold: train longer"
            return "undecided", f"whether it needs fewer steps than {_said(one)} is not clear"
        if "control" not in set(others["role"]):
            return "undecided", f"the tuned model needs fewer steps than {_said(others.iloc[0])}, but {FAIR}"
        return "wrapped", f"the tuned model needs fewer steps than {', '.join(_said(r) for _, r in others.iterrows())}"

    def headline(self) -> dict[str, Any]:
        """The verdict, the threshold, and the row of each start, on the first file; None for what is not reached."""
        rows = {row.pop("start"): jsonable(row) for row in self.crossings().to_dict("records")}
        word, why = self.verdict()
        facts = jsonable({"threshold": self.threshold, "base": self.base(), "steps": int(self.steps[-1])})
        return facts | {"file": self.files[0], "starts": rows, "verdict": word, "why": why}

    def summary(self) -> str:
        """On every file the steps to the threshold from each start, and the verdict."""
        examples = int((self.data["id"].sel(file=self.files[0]) != "").sum())
        seeds, last = self.data.sizes["seed"], self.steps[-1]
        base = f" (the base has {self.base():.3g} on {self.files[0]})" if self.has_base else ""
        lines = [
            f"steps to an accuracy of {self.threshold:.3g}{base}; {seeds} seed{'s' * (seeds > 1)}, {examples} held-out "
            "prompts, 95 % intervals over both"
        ]
        for file in self.files:
            rows = []
            for row in self.crossings(file).to_dict("records"):
                cells = [row["start"], f"{row['first']:.3g}", f"{row['last']:.3g}", _steps(row["steps"], last)]
                cells.append(f"[{_steps(row['low'], last)}, {_steps(row['high'], last)}]")
                cells += [f"{row['censored']:.0%}", _ratio(row)]
                rows.append(cells)
            head = [file, "at 0", f"at {last:g}", "steps", "95 %", "not reached", "ratio to tuned"]
            lines += aligned(head, rows)
        for start in self.starts:
            at = self.data["diverged"].sel(start=start).values
            if (at >= 0).any():
                steps = ", ".join(str(int(step)) for step in at[at >= 0])
                lines.append(
                    f"{start} diverged in {int((at >= 0).sum())} of {len(at)} seeds, at step {steps}: lower the rate"
                )
        word, why = self.verdict()
        lines.append(f"{word}: {why}" if word else why)
        lines += caution(examples, "held-out prompts")
        if 1 < seeds < FEW:
            lines.append(f"{seeds} seeds are few: an interval over so many alone holds about {coverage(seeds):.0%}")
        return "\n".join([*lines, *(str(note) for note in self.provenance.get("notes", []))])


def steps_to(steps: np.ndarray, values: np.ndarray, threshold: float) -> np.ndarray:
    """Where curves first reach the threshold, interpolated between evaluations by log(1 + step); ∞ where none does.

    Args:
        steps: (step,), rising.
        values: (…, step); NaN does not reach it.

    >>> float(steps_to(np.array([0, 1, 3]), np.array([0.0, 0.2, 0.6]), 0.4).round(3))       # halfway: √(2·4) − 1
    1.828
    """
    reached = values >= threshold - SAME
    at = reached.argmax(-1)
    before = np.maximum(at - 1, 0)
    lower, upper = (np.take_along_axis(values, i[..., None], -1)[..., 0] for i in (before, at))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(at == 0, 0.0, np.clip((threshold - lower) / (upper - lower), 0, 1))
    scale = np.log1p(steps)
    between = np.expm1(scale[before] + share * (scale[at] - scale[before]))
    found = np.where((at == 0) | (share == 1), steps[at], between)  # at an evaluation: its step, not but for rounding
    return np.where(reached.any(-1), found, np.inf)


def _resampled(values: np.ndarray) -> np.ndarray:
    """Mean accuracy (start, step, resample) where seeds and examples are drawn with replacement, both for all alike.

    Args:
        values: (start, seed, step, example); NaN where a run diverged.
    """
    starts, seeds, steps, examples = values.shape
    rng = np.random.default_rng(0)
    found = np.empty((starts, steps, stats.RESAMPLES))
    there = ~np.isnan(values)
    held = np.where(there, values, 0).reshape(-1, examples).T
    number = there.reshape(-1, examples).T.astype(float)
    size = max(1, stats.BLOCK // max(examples, starts * seeds * steps))
    for first in range(0, stats.RESAMPLES, size):
        count = min(size, stats.RESAMPLES - first)
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        of_examples = rng.multinomial(examples, np.full(examples, 1 / examples), size=count)
        sums = [
            np.einsum("rs,rnst->ntr", of_seeds, (of_examples @ part).reshape(count, starts, seeds, steps))
            for part in (held, number)
        ]
        with np.errstate(invalid="ignore"):
            found[..., first : first + count] = sums[0] / sums[1]
    return found


def _over_runs(values: np.ndarray) -> np.ndarray:
    """(start, step): mean over examples and the seeds that have not diverged."""
    return mean_of(values.transpose(0, 2, 1, 3).reshape(values.shape[0], values.shape[2], -1))


def _bounds(steps: np.ndarray, tuned: np.ndarray, last: float) -> tuple[np.ndarray, np.ndarray]:
    """What steps / tuned is at least and at most, where ∞ means beyond `last`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        bounds = np.minimum(steps, last) / tuned, steps / np.minimum(tuned, last)
    both = (steps == 0) & (tuned == 0)
    return tuple(np.where(both, 1.0, bound) for bound in bounds)


def _ends(low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    """Percentile interval, of values that may be ∞."""
    tail = (1 - stats.LEVEL) / 2
    return tuple(float(np.quantile(side, at, method="inverted_cdf")) for side, at in ((low, tail), (high, 1 - tail)))


def _steps(value: float, last: float) -> str:
    return f"> {last:g}" if np.isinf(value) else f"{value:.3g}"


def _ratio(row: dict[str, Any]) -> str:
    low, high, ratio = (row[name] for name in ("ratio_low", "ratio_high", "ratio"))
    if np.isnan(low):
        return ""
    if np.isnan(ratio):
        return f"> {low:.3g}" if np.isinf(high) else f"< {high:.3g}" if low == 0 else f"[{low:.3g}, {high:.3g}]"
    return f"{ratio:.3g}" + (ends(low, high) if np.isfinite(high) else f" [{low:.3g}, ∞)")


def _said(row: Any) -> str:
    return f"{row['start']} (ratio {_ratio(dict(row))})"
