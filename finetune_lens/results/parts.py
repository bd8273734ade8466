"""What several analyses say of each part of a model, and whether they agree."""

from typing import TYPE_CHECKING, Any

from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.tables import jsonable

if TYPE_CHECKING:
    import pandas as pd

LEVELS = ("matrix", "head", "layer", "component")
# What is compared, and how it is called in figures.
COLUMNS = {
    "relative_norm": "‖Δ‖ / ‖W0‖", "delta_norm": "‖Δ‖", "intruders": "intruders", "mask_density": "mask density",
    "sensitivity": "sensitivity", "alone": "gained alone", "without": "lost without", "patch_effect": "patch effect",
}  # fmt: skip
FDR = 0.05
SHOWN = 8  # pairs of a level in the summary


class Parts(Result):
    """What `join_parts` joined.

    `data` has for each level L (of matrix, head, layer, component) a dimension L, with the layer and component of its
    parts as coordinates L_layer, L_component, and

    - L_relative_norm, L_delta_norm, L_intruders, L_mask_density, L_sensitivity (mean of an entry), L_alone, L_without,
      L_patch_effect (L), of the last three the ends of their intervals too (_low, _high); NaN where a part was not
      measured;
    - rho, p, p_adjusted, null_low, null_high, rows (level, column, other): Spearman's ρ of two columns over the `rows`
      that both have and that moved, against permuted rows; adjusted over the pairs of the level.
    """

    kind = "parts"

    @property
    def levels(self) -> list[str]:
        return [str(level) for level in self.data["level"].values]

    def columns(self, level: str) -> list[str]:
        """What was measured at a level."""
        self._known(level)
        return [
            name
            for name in COLUMNS
            if f"{level}_{name}" in self.data and bool(self.data[f"{level}_{name}"].notnull().any())
        ]

    def table(self, level: str = "matrix") -> "pd.DataFrame":
        """A row a part.

        Raises:
            InputError: nothing was measured at that level.
        """
        import pandas as pd

        self._known(level)
        columns = {level: self.data[level].values}
        columns |= {
            name: self.data[f"{level}_{name}"].values
            for name in ("layer", "component")
            if f"{level}_{name}" in self.data.coords
        }
        for name in COLUMNS:
            columns |= {
                name + end: self.data[f"{level}_{name}{end}"].values
                for end in ("", "_low", "_high")
                if f"{level}_{name}{end}" in self.data
            }
        return pd.DataFrame(columns)

    def to_frame(self) -> "pd.DataFrame":
        """A row a part, of all levels."""
        import pandas as pd

        tables = [self.table(level).rename(columns={level: "part"}).assign(level=level) for level in self.levels]
        frame = pd.concat(tables, ignore_index=True)
        first = [c for c in ("level", "part", "layer", "component") if c in frame]
        return frame[[*first, *(c for c in frame if c not in first)]]

    def correlations(self, level: str | None = None) -> "pd.DataFrame":
        """A row a pair of columns: ρ, the central 95 % of the null, p, and p adjusted; those closest to 0 last."""
        import pandas as pd

        names = ("rows", "rho", "null_low", "null_high", "p", "p_adjusted")
        rows = []
        for one in self.levels if level is None else [level]:
            self._known(one)
            at, columns = self.data.sel(level=one), self.columns(one)
            for i, a in enumerate(columns):
                for b in columns[i + 1 :]:
                    rows.append(
                        {"level": one, "a": a, "b": b} | {n: float(at[n].sel(column=a, other=b)) for n in names}
                    )
        frame = pd.DataFrame(rows, columns=["level", "a", "b", *names])
        order = frame["rho"].abs().fillna(-1).sort_values(ascending=False, kind="stable").index
        return (
            frame.loc[order]
            .sort_values("level", key=lambda c: c.map(LEVELS.index), kind="stable")
            .reset_index(drop=True)
        )

    def _known(self, level: str) -> None:
        if level not in self.levels:
            raise InputError(f"nothing was joined by {level!r}; there is {', '.join(self.levels)}")

    def headline(self) -> dict[str, Any]:
        """By level the number of parts and every correlation."""
        return {
            level: {
                "parts": int(self.data.sizes[level]),
                "correlations": [
                    jsonable(row) for row in self.correlations(level).drop(columns="level").to_dict("records")
                ],
            }
            for level in self.levels
        } | {"notes": self._notes}

    @property
    def _notes(self) -> list[str]:
        return [str(note) for note in self.provenance.get("notes", [])]

    def summary(self) -> str:
        """By level, which columns go together more than chance."""
        lines = []
        for level in self.levels:
            frame, columns = self.correlations(level), self.columns(level)
            lines.append(f"by {level}: {self.data.sizes[level]} parts, {', '.join(COLUMNS[c] for c in columns)}")
            tested = frame[frame["rho"].notna()]
            clear = tested[tested["p_adjusted"] < FDR]
            for row in clear.head(SHOWN).to_dict("records"):
                lines.append(
                    f"  {COLUMNS[row['a']]} and {COLUMNS[row['b']]}: ρ = {row['rho']:+.2f} over {row['rows']:.0f}, "
                    f"chance [{row['null_low']:+.2f}, {row['null_high']:+.2f}], adjusted p = {row['p_adjusted']:.2g}"
                )
            if len(clear) > SHOWN:
                lines.append(f"  and {len(clear) - SHOWN} more")
            if len(tested):
                lines.append(f"  {len(clear)} of {len(tested)} pairs are beyond chance (false discovery rate {FDR:g})")
            else:
                lines.append("  no two columns with four parts and an order: nothing to correlate")
        return "\n".join([*lines, *self._notes])
