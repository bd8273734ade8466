"""Two circuits side by side: which heads they share, beside chance, and which have another role."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.results import Result
from finetune_lens.results.tables import jsonable

if TYPE_CHECKING:
    import pandas as pd

PLACES, HEADS = "all places", "all heads"  # the whole circuit: (position, layer, head), or heads wherever they act
SHOWN = 8  # heads listed a line
CHANCE = ("chance", "chance_low", "chance_high", "p")


class CircuitOverlap(Result):
    """What `compare_circuits` found.

    `data` has the dimensions side (the names of the two circuits, the reference first), group, layer, head, and

    - held (side, group, layer, head): 1 where the group of that circuit has the head;
    - position (side, group): where the group acts, "" where the circuit has no such group.

    Chance is a circuit of as many heads, drawn at random without replacement: from all heads of the model (of a whole
    circuit in places, as many at each position), and `…_in_layers` from the heads of the same layers, as many in each.
    The number shared is then hypergeometric, or a sum of such numbers over positions and layers; p is its exact upper
    tail, P(shared or more). NaN where layers and heads of the model are not known, or a group is empty on one side.
    """

    kind = "circuit_overlap"

    @property
    def one(self) -> str:
        """The reference."""
        return str(self.data.side.values[0])

    @property
    def other(self) -> str:
        return str(self.data.side.values[1])

    @property
    def groups(self) -> list[str]:
        """Of either circuit."""
        return [str(g) for g in self.data.group.values]

    @property
    def shape_known(self) -> bool:
        """Whether layers and heads of the model are known: without them there is no chance to compare with."""
        return bool(self.data.attrs["shape_known"])

    @cached_property
    def _held(self) -> np.ndarray:
        """(side, group, layer, head)."""
        return self.data.held.transpose("side", "group", "layer", "head").values.astype(bool)

    @cached_property
    def _positions(self) -> np.ndarray:
        """(side, group)."""
        return self.data.position.transpose("side", "group").values.astype(str)

    def _places(self) -> np.ndarray:
        """(side, position, layer, head): the union of the groups at each position."""
        known = sorted({*self._positions.ravel()} - {""})
        return np.stack([(self._held * (self._positions == at)[..., None, None]).any(1) for at in known], axis=1)

    def table(self) -> "pd.DataFrame":
        """A row a group, and at the end one for all places and one for all heads of the circuits.

        `one`, `other`: numbers of heads. p_adjusted, p_in_layers_adjusted: Benjamini–Hochberg over the groups that both
        have; of the whole circuits, which are not of that family, p itself. A group that only one circuit has stays in
        the table with nothing to compare.
        """
        return self._table.copy()

    @cached_property
    def _table(self) -> "pd.DataFrame":
        import pandas as pd

        rows = []
        for i, name in enumerate(self.groups):
            rows.append({"part": name, "kind": "group"} | self._measured(*self._held[:, i, None]))
        rows.append({"part": PLACES, "kind": "circuit"} | self._measured(*self._places()))
        rows.append({"part": HEADS, "kind": "circuit"} | self._measured(*self._held.any(1)[:, None]))
        frame = pd.DataFrame(rows)
        group = frame["kind"] == "group"
        for p in ("p", "p_in_layers"):
            frame[f"{p}_adjusted"] = frame[p].where(~group, stats.benjamini_hochberg(frame[p].where(group)))
        return frame

    def matrix(self) -> "pd.DataFrame":
        """A row a group of one and a group of the other: heads shared wherever the groups act, and `share`, those of
        the heads of the row's group (one's); chance as in `table`, adjusted over all pairs of groups."""
        return self._matrix.copy()

    @cached_property
    def _matrix(self) -> "pd.DataFrame":
        import pandas as pd

        rows = []
        for i, j in np.argwhere(self._held[0].any((1, 2))[:, None] & self._held[1].any((1, 2))[None]):
            found = self._measured(self._held[0, i, None], self._held[1, j, None])
            found["share"] = found.pop("recall")
            found = {k: v for k, v in found.items() if k not in ("precision", "jaccard")}
            rows.append({"group": self.groups[i], "other_group": self.groups[j]} | found)
        frame = pd.DataFrame(rows)
        for p in ("p", "p_in_layers"):
            frame[f"{p}_adjusted"] = stats.benjamini_hochberg(frame[p])
        return frame

    def _measured(self, one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
        """Of two sets (position, layer, head)."""
        sizes = int(one.sum()), int(other.sum())
        shared, both = int((one & other).sum()), min(sizes) > 0
        row: dict[str, Any] = {"one": sizes[0], "other": sizes[1], "shared": shared}
        row["precision"] = shared / sizes[1] if both else np.nan
        row["recall"] = shared / sizes[0] if both else np.nan
        row["jaccard"] = shared / (sum(sizes) - shared) if both else np.nan
        positions, layers = one.shape[:2]
        for ending, strata in (("", positions), ("_in_layers", positions * layers)):
            numbers = (np.nan,) * len(CHANCE)
            if both and self.shape_known:
                counts = (side.reshape(strata, -1).sum(1) for side in (one, other))
                numbers = _chance(*counts, one.size // strata, shared)
            row |= {name + ending: number for name, number in zip(CHANCE, numbers, strict=True)}
        return row

    def only(self, side: str) -> dict[str, list[str]]:
        """By group, the heads (`layer.head`) that the other circuit does not have in the group of that name.

        Args:
            side: the name of a circuit.

        Raises:
            InputError: another name.
        """
        if side not in (self.one, self.other):
            raise InputError(f"there is no circuit {side!r}; there are {self.one!r} and {self.other!r}")
        at = int(side == self.other)
        found = {name: self._held[at, i] & ~self._held[1 - at, i] for i, name in enumerate(self.groups)}
        return {name: _written(heads) for name, heads in found.items() if heads.any()}

    def moved(self) -> dict[tuple[str, str], list[str]]:
        """(group of one, group of the other) → heads that are in the first in one alone and the second in the other
        alone; most heads first."""
        lost, gained = self._held[0] & ~self._held[1], self._held[1] & ~self._held[0]
        found = {
            (self.groups[i], self.groups[j]): _written(lost[i] & gained[j])
            for i, j in np.argwhere((lost[:, None] & gained[None]).any((2, 3)))
        }
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def to_frame(self) -> "pd.DataFrame":
        """A row a group and head: where it acts in each circuit, and `found_in`, both or the name of the only one."""
        import pandas as pd

        rows = []
        for i, layer, head in np.argwhere(self._held.any(0)):
            sides = self._held[:, i, layer, head]
            row = {"group": self.groups[i], "layer": layer, "head": head}
            row |= dict(zip(("position_one", "position_other"), self._positions[:, i], strict=True))
            rows.append(row | {"found_in": "both" if sides.all() else self.one if sides[0] else self.other})
        return pd.DataFrame(rows)

    def headline(self) -> dict[str, Any]:
        """The two circuits, every row of the table, the heads of each alone, and those in another group."""
        return {
            "one": self.one, "other": self.other, "parts": [jsonable(row) for row in self._table.to_dict("records")],
            "only": {side: self.only(side) for side in (self.one, self.other)},
            "moved": [{"from": a, "to": b, "heads": heads} for (a, b), heads in self.moved().items()],
        }  # fmt: skip

    def summary(self) -> str:
        """A line a group and for the whole circuits, roles that changed, and the heads of each alone."""
        size = f", of {' × '.join(map(str, self._held.shape[2:]))} heads" if self.shape_known else ""
        lines = [f"{self.one} (the reference) and {self.other}{size}"]
        for row in self._table.to_dict("records"):
            lines.append(f"{row['part']}: {self._line(row)}")
        lines += self._roles()
        for side in (self.one, self.other):
            for group, heads in self.only(side).items():
                lines.append(f"{group} in {side} alone: {_some(heads)}")
        for name, (a, b) in zip(self.groups, self._positions.T, strict=True):
            if a and b and a != b:
                lines.append(
                    f"{name} acts at {a} in {self.one} and at {b} in {self.other}: its heads are compared, and share "
                    "no place"
                )
        if self.shape_known:
            tested = int(self._table.query("kind == 'group'")["p"].notna().sum())
            lines.append(
                "chance, with its central 95 %: as many heads at random; p is one-sided, adjusted over the groups that "
                f"both have ({tested}; Benjamini–Hochberg)"
            )
        else:
            lines.append(
                "no chance to compare with: neither file says how many layers and heads the model has; pass layers and "
                "heads (--layer-count, --head-count)"
            )
        return "\n".join(lines + [str(note) for note in self.provenance.get("notes", [])])

    def _line(self, row: dict[str, Any]) -> str:
        if not (row["one"] and row["other"]):
            return f"a group of {self.one if row['one'] else self.other} alone, of size {row['one'] or row['other']}"
        line = (
            f"{row['shared']} shared of {row['one']} and {row['other']}; recall {row['recall']:.2f}, precision "
            f"{row['precision']:.2f}, Jaccard {row['jaccard']:.2f}"
        )
        if not self.shape_known:
            return line
        parts = []
        for ending, words in (("", "by chance"), ("_in_layers", "in the same layers")):
            mean, low, high = (row[name + ending] for name in CHANCE[:3])
            parts.append(f"{words} {mean:.1f} [{low:.0f}, {high:.0f}], {_p(row[f'p{ending}_adjusted'])}")
        return f"{line}; {'; '.join(parts)}"

    def _roles(self) -> list[str]:
        """Heads that left a group for another, with what the two groups share in all."""
        lines = []
        cells = self._matrix.set_index(["group", "other_group"])
        for (group, new), heads in self.moved().items():
            row = cells.loc[(group, new)]
            chance = f", by chance {row['chance']:.1f}, {_p(row['p_adjusted'])}" if self.shape_known else ""
            lines.append(
                f"from {group} in {self.one} to {new} in {self.other}: {_some(heads)} (the two share "
                f"{row['shared']:.0f} of {row['one']:.0f} and {row['other']:.0f}{chance})"
            )
        return lines


def of_heads(
    sides: list[str], groups: list[str], held: np.ndarray, positions: np.ndarray, *, shape_known: bool
) -> CircuitOverlap:
    """The result of two circuits.

    Args:
        held: (side, group, layer, head).
        positions: (side, group).
        shape_known: `held` has the layers and heads of the model, not only up to the last that is held.
    """
    import xarray as xr

    data = {
        "held": (("side", "group", "layer", "head"), held.astype(np.int8)),
        "position": (("side", "group"), positions.astype(object)),
    }
    coords = {"side": np.array(sides, dtype=object), "group": np.array(groups, dtype=object)}
    coords |= {"layer": np.arange(held.shape[2]), "head": np.arange(held.shape[3])}
    return CircuitOverlap(xr.Dataset(data, coords, {"shape_known": int(shape_known)}))


def _chance(one: np.ndarray, other: np.ndarray, size: int, shared: int) -> tuple[float, float, float, float]:
    """Mean and central 95 % of the number shared by chance, and P(`shared` or more).

    Args:
        one, other: (stratum,) numbers of heads of either circuit.
        size: heads of a stratum.
    """
    from scipy.stats import hypergeom

    law = np.ones(1)
    for a, b in zip(one, other, strict=True):
        if a and b:
            law = np.convolve(law, hypergeom.pmf(np.arange(min(a, b) + 1), size, a, b))
    below = np.cumsum(law)
    low, high = (int(np.searchsorted(below, q * below[-1])) for q in ((1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2))
    return float((one * other).sum() / size), low, high, min(1.0, float(law[shared:].sum()))


def _written(heads: np.ndarray) -> list[str]:
    return [f"{layer}.{head}" for layer, head in np.argwhere(heads)]


def _some(heads: list[str]) -> str:
    more = f" and {len(heads) - SHOWN} more" if len(heads) > SHOWN else ""
    return ", ".join(heads[:SHOWN]) + more


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value > 1e-300 else "p < 1e-300"
