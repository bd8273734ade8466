"""Verdicts of the trust gate: what was measured, against which limit, and what to do where it does not hold."""

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.results import Result

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = ("pass", "FAIL", "note", "skipped")


class Check(Result):
    """What `check_pair` found.

    `data` has the dimension gate, with the coordinates gate (its name) and side (base, tuned or both), and

    - verdict: pass, FAIL, note (worth knowing, no fault), skipped;
    - measured, limit: NaN where the gate is no number;
    - message: what was found, and where it fails what to do.
    """

    kind = "check"

    @property
    def passed(self) -> bool:
        """Whether no gate failed."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """The failed gates, a line each."""
        return [_line(row) for row in self._rows() if row["verdict"] == "FAIL"]

    def to_frame(self) -> "pd.DataFrame":
        """One row a gate and side."""
        import pandas as pd

        return pd.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        columns = {name: self.data[name].values for name in ("gate", "side", "verdict")}
        columns |= {name: self.data[name].values.astype(float) for name in ("measured", "limit")}
        columns["message"] = self.data["message"].values
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def headline(self) -> dict[str, Any]:
        """Whether it passed, how many of each verdict, and the failures."""
        verdicts = [row["verdict"] for row in self._rows()]
        counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
        return {"passed": self.passed, "verdicts": counts, "failures": self.failures}

    def summary(self) -> str:
        """A line a gate, and what that makes of the pair."""
        rows = self._rows()
        if self.passed:
            last = f"Safe to compare: none of {len(rows)} gates failed."
        else:
            last = f"NOT safe to compare: {len(self.failures)} of {len(rows)} gates failed."
        return "\n".join([*map(_line, rows), last])


def _line(row: dict[str, Any]) -> str:
    """`FAIL     padding on the left (tuned): 0.8 (limit 1e-04); …`"""
    number = "" if np.isnan(row["measured"]) else f": {row['measured']:.2g}"
    if not np.isnan(row["limit"]):
        number += f" (limit {row['limit']:.0e})"
    message = f"; {row['message']}" if number and row["message"] else f": {row['message']}" if row["message"] else ""
    return f"{row['verdict']:<8} {row['gate']} ({row['side']}){number}{message}"
