"""Masks over the entries of a model's weights, and grafts: a mask with the tuned values at its entries.

A mask is a mapping of weight names to Boolean tensors (out, in); weights that it does not name have no entry in it. A
graft is what remains of a mask when the tuned model is gone: positions and values, in a safetensors file of its own.

>>> import torch
>>> one, other = ({"a": torch.tensor([True, True, False, False])}, {"a": torch.tensor([True, False, False, True])})
>>> size(one), shared(one, other)
(2, 1)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_lens.errors import InputError
from finetune_lens.files import whole_file

Mask = Mapping[str, Tensor]
FORMAT = "finetune_lens graft 1"


def size(mask: Mask) -> int:
    """Number of entries."""
    return sum(int(part.sum()) for part in mask.values())


def shared(one: Mask, other: Mask) -> int:
    """Number of entries that are in both."""
    return sum(int((part & other[name]).sum()) for name, part in one.items() if name in other)


def joined(masks: Sequence[Mask]) -> dict[str, Tensor]:
    """The union."""
    found: dict[str, Tensor] = {}
    for mask in masks:
        for name, part in mask.items():
            found[name] = found[name] | part if name in found else part.clone()
    return found


@dataclass(frozen=True)
class Graft:
    """Entries of a tuned model, to be put into its base.

    Attributes:
        positions: by weight, sorted positions in the flattened (out, in) matrix, int64.
        values: the tuned model's numbers there.
        shapes: (out, in) of these weights.
        digests: SHA-256 of the base's weights that it was made for.
        facts: what it is and how it was made.
    """

    positions: dict[str, Tensor]
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    digests: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(len(p) for p in self.positions.values())

    def mask(self) -> dict[str, Tensor]:
        """Where its entries are."""
        found = {}
        for name, at in self.positions.items():
            flat = torch.zeros(_count(self.shapes[name]), dtype=torch.bool)
            flat[at] = True
            found[name] = flat.reshape(self.shapes[name])
        return found

    def save(self, path: str | Path) -> Path:
        """Write it as safetensors: `NAME.position` and `NAME.value` of every weight that has entries."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {}
        for name, at in self.positions.items():
            if len(at):
                tensors[f"{name}.position"] = at.contiguous()
                tensors[f"{name}.value"] = self.values[name].contiguous()
        shapes = {name: list(shape) for name, shape in self.shapes.items() if len(self.positions[name])}
        digests = {name: self.digests[name] for name in shapes if name in self.digests}
        record = {"format": FORMAT, "shapes": json.dumps(shapes), "base_sha256": json.dumps(digests)}
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=record | {"facts": json.dumps(self.facts, default=str)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Graft":
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not a graft.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise InputError(f"no such graft: {path}; expected the graft.safetensors of `finetune_lens.grafting`")
        try:
            with safe_open(path, "pt") as file:
                record = file.metadata() or {}
                if record.get("format") != FORMAT:
                    raise InputError(
                        f"{path} is no graft: expected the graft.safetensors that `finetune_lens.grafting` writes"
                    )
                shapes = {name: tuple(shape) for name, shape in json.loads(record["shapes"]).items()}
                positions = {name: file.get_tensor(f"{name}.position") for name in shapes}
                values = {name: file.get_tensor(f"{name}.value") for name in shapes}
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise InputError(f"{path} is truncated or not a graft: {error}; make it again") from None
        for name, at in positions.items():
            count = _count(shapes[name])
            if len(at) != len(values[name]) or (len(at) and not 0 <= int(at.min()) <= int(at.max()) < count):
                raise InputError(f"{path}: {name} holds positions outside its {shapes[name]}; make the graft again")
        return cls(positions, values, shapes, json.loads(record["base_sha256"]), json.loads(record["facts"]))


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def merged(grafts: Sequence[Graft]) -> Graft:
    """Several grafts of one base in one: where they share an entry the earlier one keeps it.

    This is continual grafting: what was learnt first is not written over by what is learnt next (Panigrahi et al. 2023,
    §6).
    """
    positions: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    digests: dict[str, str] = {}
    for graft in grafts:
        for name, at in graft.positions.items():
            if shapes.setdefault(name, graft.shapes[name]) != graft.shapes[name]:
                raise InputError(
                    f"the grafts are of different models: {name} is {shapes[name]} in one and {graft.shapes[name]} in "
                    "another"
                )
            if digests.setdefault(name, graft.digests.get(name, "")) != graft.digests.get(name, ""):
                raise InputError(f"the grafts are of different bases: {name} has other values in one than in another")
            before = positions.get(name, at.new_empty(0))
            new = ~torch.isin(at, before)
            dtype = torch.promote_types(values[name].dtype, graft.values[name].dtype) if name in values else None
            kept = values[name].to(dtype) if name in values else graft.values[name].new_empty(0)
            both = torch.cat([before, at[new]])
            order = torch.argsort(both)
            positions[name] = both[order]
            values[name] = torch.cat([kept, graft.values[name].to(dtype or kept.dtype)[new]])[order]
    facts = {"merged": [graft.facts.get("tuned", "") for graft in grafts]}
    return Graft(positions, values, shapes, {n: d for n, d in digests.items() if d}, facts)
