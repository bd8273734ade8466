"""What two models predict on the same texts."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.few import caution
from finetune_lens.results.tables import aligned, jsonable, mean_of

if TYPE_CHECKING:
    import pandas as pd

ANSWERS = ("accuracy", "prob", "logprob", "logit_diff", "reciprocal_rank")
# Name in tables → variable, of measures that are one number a position, not one a side.
BETWEEN = {"KL(base ‖ tuned)": "kl", "KL(tuned ‖ base)": "kl_reverse", "Jensen–Shannon": "js", "top-1 flips": "flip"}


class Outputs(Result):
    """What `compare_outputs` measured. Numbers are in nats.

    `data` has the dimensions example, position (counted from the first compared token), side (base, tuned), word, and
    with the lens depth (0: the embedding; n: after n blocks), and

    - kl, kl_reverse, js, flip (example, position); entropy, loss, top, top_prob (side, example, position): of the
      prediction made after that token; loss is NaN after a text's last;
    - token (example, position): as the tokenizer prints it;
    - accuracy, prob, logprob, logit_diff, reciprocal_rank (side, example): of the answers, where there are any;
    - shift, shift_error, base_prob (word): mean change of the probability of the tokens that changed most over all
      positions, its standard error over texts, and their mean probability in the base;
    - lens_loss, lens_agreement, lens_answer (side, depth, example), lens_kl (depth, example): of predictions read out
      after each block: loss, share of positions whose likeliest token is the final one, log-probability of the answer,
      and KL(base ‖ tuned).

    Intervals are 95 % percentile bootstrap over the texts, both sides of a text drawn together.
    """

    kind = "outputs"

    @property
    def has_lens(self) -> bool:
        return "lens_kl" in self.data

    @property
    def answers(self) -> list[str]:
        """The metrics of answers that could be measured."""
        return [m for m in ANSWERS if m in self.data and bool(np.isfinite(self.data[m]).any())]

    @cached_property
    def _table(self) -> "pd.DataFrame":
        import pandas as pd

        rows = []
        for label, name in BETWEEN.items():
            by_text = mean_of(self.data[name].transpose("example", "position").values)
            rows.append({"measure": label, "base": np.nan, "tuned": np.nan} | _interval(by_text))
        if self.answers:
            for label, name in (("KL(base ‖ tuned)", "kl"), ("top-1 flips", "flip")):
                row = {"measure": f"answer: {label}", "base": np.nan, "tuned": np.nan}
                rows.append(row | _interval(self._where_answered(name)))
        sided = {"entropy": "entropy", "loss on the text": "loss"} | {f"answer: {m}": m for m in self.answers}
        for label, name in sided.items():
            values = self.data[name].transpose("side", "example", ...).values.astype(float)
            base, tuned = values if values.ndim == 2 else mean_of(values)
            rows.append({"measure": label, "base": mean_of(base), "tuned": mean_of(tuned)} | _interval(tuned - base))
        return pd.DataFrame(rows)

    def _where_answered(self, name: str) -> np.ndarray:
        """(example,) of a measure at the last compared position, where the answer begins; NaN without an answer."""
        values = self.data[name].transpose("example", "position").values
        last = (self.data["token"].transpose("example", "position").values != "").sum(1) - 1
        answered = np.isfinite(self.data[self.answers[0]].transpose("side", "example").values).all(0)
        return np.where(answered, values[np.arange(len(last)), last], np.nan)

    def table(self) -> "pd.DataFrame":
        """A row a measure: base, tuned, and their paired difference (or what lies between them) with its interval."""
        return self._table.copy()

    def to_frame(self) -> "pd.DataFrame":
        """A row a position: the text's token, both predictions, and how they differ."""
        import pandas as pd

        there = self.data["token"].values != ""
        example, position = np.nonzero(there)
        columns = {"example": self.data["example"].values[example], "position": position}
        columns["token"] = self.data["token"].values[there]
        following = np.full(there.shape, "", dtype=object)
        following[:, :-1] = self.data["token"].values[:, 1:]
        columns["next"] = following[there]
        columns |= {name: self.data[name].values[there] for name in ("kl", "kl_reverse", "js")}
        columns["flip"] = self.data["flip"].values[there].astype(bool)
        for name in ("entropy", "loss", "top", "top_prob"):
            for side in ("base", "tuned"):
                columns[f"{name}_{side}"] = self.data[name].sel(side=side).values[there]
        return pd.DataFrame(columns)

    def positions(self, n: int = 10) -> "pd.DataFrame":
        """The positions whose prediction changed most (by Jensen–Shannon divergence), with the text before them."""
        frame = self.to_frame()
        frame = frame.sort_values("js", ascending=False, kind="stable").head(n)
        tokens = dict(zip(self.data["example"].values, self.data["token"].values, strict=True))
        context = ["".join(tokens[e][: p + 1])[-40:] for e, p in zip(frame["example"], frame["position"], strict=True)]
        frame.insert(2, "context", context)
        return frame

    def tokens(self, n: int = 10) -> "pd.DataFrame":
        """The tokens whose mean probability over all positions changed most: base, shift, and its 95 % interval."""
        import pandas as pd

        names = ("base_prob", "shift", "shift_error")
        frame = pd.DataFrame({"token": self.data["word"].values} | {k: self.data[k].values for k in names})
        reach = 1.96 * frame.pop("shift_error")
        frame["low"], frame["high"] = frame["shift"] - reach, frame["shift"] + reach
        return frame[frame["shift"] != 0].head(n)

    def lens(self) -> "pd.DataFrame":
        """By depth and side: loss, agreement with the final prediction, log-probability of the answer; and the KL.

        Raises:
            InputError: compared without the lens.
        """
        import pandas as pd

        if not self.has_lens:
            raise InputError("the logit lens was not measured: compare with lens=True")
        frames = []
        for side in ("base", "tuned"):
            one = self.data.sel(side=side)
            columns: dict[str, Any] = {"depth": self.data["depth"].values, "side": side}
            for name in ("lens_loss", "lens_agreement", "lens_answer", "lens_kl"):
                values = one[name].transpose("depth", "example").values
                low, high = stats.interval_of_mean(values)
                short = name.removeprefix("lens_")
                columns |= {short: mean_of(values), f"{short}_low": low, f"{short}_high": high}
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def headline(self) -> dict[str, Any]:
        """The table by measure, and the most changed positions and tokens."""
        rows = {row.pop("measure"): jsonable(row) for row in self.table().to_dict("records")}
        short = ["example", "position", "token", "js", "top_base", "top_tuned"]
        positions = [jsonable(row) for row in self.positions(3)[short].to_dict("records")]
        tokens = [jsonable(row) for row in self.tokens(3).to_dict("records")]
        sizes = {"texts": int(self.data.sizes["example"]), "positions": int((self.data["token"] != "").sum())}
        return sizes | {"measures": rows, "most_changed_positions": positions, "most_changed_tokens": tokens}

    def summary(self) -> str:
        """The table, and where and in which tokens the two differ most."""
        count = int((self.data["token"].values != "").sum())
        lines = [f"{self.data.sizes['example']} texts, {count} positions; nats, 95 % intervals over texts"]
        lines += aligned(
            ["", "base", "tuned", "difference", "95 %"], [_row(r) for r in self.table().to_dict("records")]
        )
        rows = self.table().set_index("measure")
        guessing = np.log(self.data.attrs.get("vocabulary", np.inf))
        if rows.loc["loss on the text", ["base", "tuned"]].max() > guessing:
            lines.append(
                f"a loss above that of guessing ({guessing:.3g}): the texts are not what the models predict; look at "
                "the answers"
            )
        lines.append("predictions that changed most:")
        for row in self.positions(3).to_dict("records"):
            lines.append(
                f"  after {row['context']!r} (text {row['example']}): base {row['top_base']!r} "
                f"({row['top_prob_base']:.2f}), tuned {row['top_tuned']!r} ({row['top_prob_tuned']:.2f}), "
                f"JS {row['js']:.2f}"
            )
        moved = self.tokens(100)
        for word, part in (("up", moved[moved["shift"] > 0]), ("down", moved[moved["shift"] < 0])):
            shown = [
                f"{r['token']!r} {r['shift']:+.2g} ± {r['high'] - r['shift']:.1g}"
                for r in part.head(3).to_dict("records")
            ]
            if shown:
                lines.append(f"tokens {word}, mean probability: {', '.join(shown)}")
        if self.has_lens:
            kl = mean_of(self.data["lens_kl"].transpose("depth", "example").values)
            shown = ", ".join(f"{v:.2g}" for v in kl)
            lines.append(f"logit lens, KL(base ‖ tuned) after 0, 1, … blocks: {shown}")
        lines += caution(self.data.sizes["example"], "texts")
        lines += [str(note) for note in self.provenance.get("notes", [])]
        return "\n".join(lines)


def _interval(values: np.ndarray) -> dict[str, Any]:
    low, high = stats.interval_of_mean(values)
    return {"difference": mean_of(values), "low": float(low), "high": float(high)}


def _row(row: dict[str, Any]) -> list[str]:
    def number(value: float) -> str:
        return "" if np.isnan(value) else f"{value:.3g}"

    ends = "" if np.isnan(row["low"]) else f"[{row['low']:.3g}, {row['high']:.3g}]"
    signed = (
        number(row["difference"])
        if np.isnan(row["base"]) or np.isnan(row["difference"])
        else f"{row['difference']:+.3g}"
    )
    return [row["measure"], number(row["base"]), number(row["tuned"]), signed, ends]
