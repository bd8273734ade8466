"""Are two circuits made of the same heads, in the same roles?

    recall = |one ∩ other| / |one|,   precision = |one ∩ other| / |other|,   Jaccard = |one ∩ other| / |one ∪ other|

of the groups of the same name and of the whole circuits; `one` is the reference. The table in the code of
arXiv 2402.14811 takes the tuned circuit as the reference, so its precision is the recall here. Beside each number
stands chance: as many heads drawn at random without replacement from all heads of the model (Fisher's exact test, one
tail), and drawn from the same layers only, since two circuits that lie in the middle layers share heads by that alone.
Every group of one is also held against every group of the other: a head may have changed its role.

Works on circuit files alone: no model is run. Cost: milliseconds.

>>> from finetune_lens.circuits.circuit import Circuit, Group
>>> base = Circuit({"reader": Group(-1, ((2, 0), (2, 1)))}, {"model": "base", "layers": 3, "heads": 4})
>>> tuned = Circuit({"reader": Group(-1, ((2, 1), (2, 2), (1, 0)))}, {"model": "tuned", "layers": 3, "heads": 4})
>>> row = compare_circuits(base, tuned).table().iloc[0]
>>> print(*row[["part", "shared", "recall", "jaccard", "chance"]])
reader 1 0.5 0.25 0.5
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.circuits.circuit import Circuit, require_in_range
from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from finetune_lens.results.circuit_overlap import CircuitOverlap


class Circuits(dict[str, Circuit]):
    """Name → circuit."""

    def describe(self) -> dict[str, Any]:
        return {name: circuit.describe() for name, circuit in self.items()}


def compare_circuits(
    one: Circuit | str | Path, other: Circuit | str | Path, *, layers: int | None = None, heads: int | None = None
) -> "CircuitOverlap":
    """Which heads two circuits share, group by group and in all, beside chance.

    Args:
        one: the reference, a circuit or its file; published lists of heads too.
        other: what is held against it.
        layers, heads: of the model, heads of one layer; for circuits whose file does not say. Without them chance is
            NaN.

    Raises:
        InputError: no such file, not a circuit, heads that the model lacks, circuits of models of different shape.
    """
    circuits = Circuits(zip(_names(one, other), map(_read, (one, other)), strict=True))
    return _compare(circuits, layers=layers, heads=heads)


@recorded
def _compare(circuits: Circuits, *, layers: int | None, heads: int | None) -> "CircuitOverlap":
    from finetune_lens.results.circuit_overlap import of_heads

    shape = _shape(circuits, layers, heads)
    if shape is not None:
        for side, circuit in circuits.items():
            for name, group in circuit.groups.items():
                require_in_range(f"{name} of {side}", group, *shape, "the model")
    groups = list(dict.fromkeys(group for circuit in circuits.values() for group in circuit.groups))
    everything = np.array([head for circuit in circuits.values() for head in circuit.heads])
    held = np.zeros((2, len(groups), *(shape or everything.max(0) + 1)), np.int8)
    positions = np.full((2, len(groups)), "", dtype=object)
    for side, circuit in enumerate(circuits.values()):
        for name, group in circuit.groups.items():
            row = groups.index(name)
            held[(side, row, *np.transpose(group.heads))] = 1
            positions[side, row] = str(group.position)
    result = of_heads(list(circuits), groups, held, positions, shape_known=shape is not None)
    result.data.attrs["provenance"] = json.dumps({"analysis": "compare_circuits"})
    return result


def _read(given: Circuit | str | Path) -> Circuit:
    return given if isinstance(given, Circuit) else Circuit.load(given)


def _names(one: Circuit | str | Path, other: Circuit | str | Path) -> tuple[str, str]:
    """The models' names where they differ, else the files': the parts of the paths that tell them apart."""
    models = [str(_read(given).model.get("model") or "") for given in (one, other)]
    files = ["" if isinstance(given, Circuit) else str(Path(given).resolve().with_suffix("")) for given in (one, other)]
    for a, b in (models, files):
        if a and b and a != b:
            parts = a.split("/"), b.split("/")
            for end in (-1, 0):
                while min(map(len, parts)) > 1 and parts[0][end] == parts[1][end]:
                    parts = tuple(part[:-1] if end else part[1:] for part in parts)
            return "/".join(parts[0]), "/".join(parts[1])
    return "one", "other"


def _shape(circuits: Circuits, layers: int | None, heads: int | None) -> tuple[int, int] | None:
    """Layers and heads of a layer; None where nothing says them."""
    if (layers is None) != (heads is None):
        raise InputError(
            f"layers and heads go together (--layer-count, --head-count); found layers {layers}, heads {heads}"
        )
    if layers is not None and min(layers, heads) < 1:
        raise InputError(f"a model has one layer and one head or more; found layers {layers}, heads {heads}")
    said = {name: (c.model.get("layers"), c.model.get("heads")) for name, c in circuits.items()}
    said = {name: shape for name, shape in said.items() if None not in shape}
    if layers is not None:
        said["layers and heads as given"] = (layers, heads)
    if len(set(said.values())) > 1:
        found = ", ".join(f"{name}: {n} × {m}" for name, (n, m) in said.items())
        raise InputError(f"expected circuits of models of one shape, layers × heads; found {found}")
    return next(iter(said.values()), None)
