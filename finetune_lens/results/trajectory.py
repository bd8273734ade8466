"""Intruder dimensions of several checkpoints of one run, each followed from one checkpoint to the next."""

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.intruders import VERDICTS, Intruders

if TYPE_CHECKING:
    import pandas as pd

FOLLOWED = 0.5  # |⟨u_j, u_l⟩| from which a vector of the next checkpoint continues one of this


class Trajectory(Result):
    """What `find_intruders` found in a `ModelSeries`.

    `data` holds, along a first dimension `step`, the variables of `Intruders`, and

    - link (step, side, matrix, link_rank, link_next_rank): |⟨u_j, u_l⟩| between the leading vectors of a checkpoint and
      those of the next; NaN for the last, and beside a checkpoint that does not differ from the base.
    """

    kind = "trajectory"

    @property
    def steps(self) -> list[int]:
        return [int(step) for step in self.data.step.values]

    @property
    def sides(self) -> list[str]:
        return [str(side) for side in self.data.side.values]

    def at(self, step: int) -> Intruders:
        """The result of one checkpoint, as `find_intruders` gives it."""
        if step not in self.steps:
            raise InputError(f"there is no checkpoint at step {step}; this result has {self.steps}")
        data = self.data.sel(step=step, drop=True).drop_vars("link")
        return Intruders(data.drop_dims(["link_rank", "link_next_rank"], errors="ignore"))

    def to_frame(self) -> "pd.DataFrame":
        """One row a (step, matrix, side, vector), as `Intruders.to_frame` gives them."""
        import pandas as pd

        frames = [self.at(step).to_frame().assign(step=step) for step in self.steps]
        frame = pd.concat(frames, ignore_index=True)
        return frame[["step", *(c for c in frame.columns if c != "step")]]

    def counts(self) -> "pd.DataFrame":
        """One row a (step, side): intruders, undetermined, and what random updates of the same spectrum give."""
        import pandas as pd

        rows = []
        for step in self.steps:
            found = self.at(step)
            for side in self.sides:
                null = found.null(side=side)
                rows.append(
                    {
                        "step": step,
                        "side": side,
                        "intruders": found.count(side=side),
                        "undetermined": found.undetermined(side=side),
                        "null_mean": null.mean if null else np.nan,
                        "null_low": null.low if null else np.nan,
                        "null_high": null.high if null else np.nan,
                    }
                )
        return pd.DataFrame(rows)

    def tracks(self, side: str | None = None) -> "pd.DataFrame":
        """Every direction that is an intruder at some checkpoint, through all checkpoints in which it is found.

        Between neighbouring checkpoints the leading vectors of a matrix are assigned to each other so that Σ cos² is
        largest; a pair continues a track from |cos| ≥ 0.5 on. One row a (track, step): rank, sigma, max_cos, lower,
        upper, verdict, and `link`, the |cos| with the same direction one checkpoint earlier.
        """
        import pandas as pd
        from scipy.optimize import linear_sum_assignment

        side = self.sides[0] if side is None else side
        if side not in self.sides:
            raise InputError(f"side {side!r} was not computed; this result has {', '.join(self.sides)}")
        data = self.data.sel(side=side)
        k = data.sizes["link_rank"]
        verdicts = np.stack([self.at(s).verdict().sel(side=side).values[:, :k] for s in self.steps])
        values = {
            name: data[name].transpose("step", "matrix", "rank").values[..., :k]
            for name in ("sigma", "max_cos", "lower", "upper")
        }
        link = data.link.transpose("step", "matrix", "link_rank", "link_next_rank").values
        rows: list[dict[str, Any]] = []
        track = 0
        named = zip(data.matrix.values, data.layer.values, data.component.values, strict=True)
        for m, (matrix, layer, component) in enumerate(named):
            label = {"matrix": str(matrix), "layer": int(layer), "component": str(component)}
            there = {j: [(0, j, np.nan)] for j in range(k) if verdicts[0, m, j] != -2}
            ended: list[list[tuple[int, int, float]]] = []
            for t in range(len(self.steps) - 1):
                cosines = np.nan_to_num(link[t, m])
                pairs = {
                    int(j): (int(n), float(cosines[j, n]))
                    for j, n in zip(*linear_sum_assignment(-(cosines**2)), strict=True)
                    if cosines[j, n] >= FOLLOWED
                }
                ended += [path for j, path in there.items() if j not in pairs]
                goes_on = {n: [*there[j], (t + 1, n, c)] for j, (n, c) in pairs.items() if j in there}
                begins = {n: [(t + 1, n, np.nan)] for n in range(k) if verdicts[t + 1, m, n] != -2}
                there = begins | goes_on
            for path in (*ended, *there.values()):
                if not any(verdicts[t, m, j] == 1 for t, j, _ in path):
                    continue
                for t, j, cosine in path:
                    found = {name: float(v[t, m, j]) for name, v in values.items()}
                    verdict = VERDICTS[int(verdicts[t, m, j])]
                    rows.append(
                        label | {"track": track, "step": self.steps[t], "rank": j + 1, **found}
                        | {"verdict": verdict, "link": cosine}
                    )  # fmt: skip
                track += 1
        columns = ["matrix", "layer", "component", "track", "step", "rank", *values, "verdict", "link"]
        return pd.DataFrame(rows, columns=columns)

    def headline(self) -> dict[str, Any]:
        """By step: count and null."""
        return {"steps": self.steps, "at": {str(step): self.at(step).headline() for step in self.steps}}

    def summary(self) -> str:
        """The counts over the steps beside the null, and how many directions they are."""
        first = self.at(self.steps[0])
        n = self.data.sizes["matrix"]
        lines = []
        counts = self.counts()
        for side in self.sides:
            lines.append(
                f"intruder dimensions among the top {first.k} {side} singular vectors of {n} matrices, "
                f"ε = {first.epsilon:g}:"
            )
            for row in counts[counts.side == side].itertuples():
                known = not np.isnan(row.null_mean)
                null = f"; null {row.null_mean:.1f} [{row.null_low:.0f}, {row.null_high:.0f}]" if known else ""
                open_ = f"; {row.undetermined} undetermined" if row.undetermined else ""
                lines.append(f"  step {row.step}: {row.intruders}{null}{open_}")
            tracks = self.tracks(side)
            if len(tracks):
                lasting = int((tracks.groupby("track").size() > 1).sum())
                lines.append(
                    f"  {tracks.track.nunique()} different directions; {lasting} of them found again at the next "
                    f"checkpoint (|cos| ≥ {FOLLOWED:g})"
                )
        excluded = self.provenance.get("excluded", {})
        lines += [f"excluded: {name} ({why})" for name, why in excluded.items()]
        return "\n".join(lines)
