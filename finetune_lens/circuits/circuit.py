"""A circuit: groups of heads, each at a position, and the file it is kept in.

    {"kind": "circuit", "model": {"model": "base", "files_sha256": "…", "layers": 3, "heads": 3}, "task": {…},
     "groups": {"value_fetcher": {"position": -1, "heads": [[2, 0], [2, 1]], "scores": [-0.41, -0.12]}, …}}

The lists published with arXiv 2402.14811 are read too: {"value_fetcher": [[24, 5], …], "pos_transmitter": […], …}; they
name no model, and their positions are those of the paper.

>>> circuit = Circuit({"reader": Group(-1, ((2, 0), (2, 1)))})
>>> circuit.heads, circuit.sets()
({(2, 0), (2, 1)}, {'reader': ['blocks.2.attn.hook_z[0]@-1', 'blocks.2.attn.hook_z[1]@-1']})
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_lens.errors import InputError
from finetune_lens.files import whole_file

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel

Head = tuple[int, int]  # layer, head
KIND = "circuit"
EXPECTED = (
    'expected {"groups": {NAME: {"position": -1, "heads": [[LAYER, HEAD], …]}}} or, as published, '
    "{NAME: [[LAYER, HEAD], …]}"
)
# Published name → ours, the position in the entity-tracking prompt (its end, the label of the box that is asked for,
# where that label was told), and what the group leads to (arXiv 2402.14811, §3).
PUBLISHED = {
    "value_fetcher": ("value_fetcher", -1, "the logits"),
    "pos_transmitter": ("position_transmitter", -1, "q of value_fetcher"),
    "pos_detector": ("position_detector", "label:last", "v of position_transmitter"),
    "struct_reader": ("structure_reader", "label:first", "v of position_detector"),
}


@dataclass(frozen=True)
class Group:
    """Heads that do one thing at one position.

    Attributes:
        position: counted from the start, from the end (negative), or a mention of a field (`label:first`).
        heads: (layer, head), in the order of their scores where there are any.
        scores: what they were chosen by.

    Raises:
        InputError: no heads, one twice, or scores of another number.
    """

    position: int | str
    heads: tuple[Head, ...]
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.heads:
            raise InputError("a group has one head or more; found none")
        twice = [head for n, head in enumerate(self.heads) if head in self.heads[:n]]
        if twice:
            raise InputError(f"head {head_name(twice[0])} is twice in a group")
        if self.scores and len(self.scores) != len(self.heads):
            raise InputError(f"expected a score a head; found {len(self.scores)} scores of {len(self.heads)} heads")

    def without(self, heads: Sequence[Head]) -> "Group | None":
        """The group less these heads; None where nothing is left."""
        kept = [n for n, head in enumerate(self.heads) if head not in heads]
        if not kept:
            return None
        scores = tuple(self.scores[n] for n in kept) if self.scores else ()
        return Group(self.position, tuple(self.heads[n] for n in kept), scores)


@dataclass(frozen=True)
class Circuit:
    """Named groups of heads.

    Attributes:
        groups: by name, in the order of discovery (from the output back).
        model: what it was found in: name, class, `files_sha256`, layers, heads; {} where the file does not say.
        task: prompts (their number and hash), metric, procedure.
    """

    groups: Mapping[str, Group]
    model: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.groups:
            raise InputError("a circuit has one group or more; found none")
        for name, group in self.groups.items():
            require_in_range(name, group, self.model.get("layers"), self.model.get("heads"), "the circuit's own model")

    @property
    def heads(self) -> set[Head]:
        """Every head of it, wherever it acts."""
        return {head for group in self.groups.values() for head in group.heads}

    @property
    def places(self) -> set[tuple[int | str, int, int]]:
        """(position, layer, head) of everything in it."""
        return {(group.position, *head) for group in self.groups.values() for head in group.heads}

    def sets(self) -> dict[str, list[str]]:
        """The groups as named sets of places, as `cross_patch(sets=…)` and `patch(sets=…)` take them."""
        return {
            name: [f"blocks.{layer}.attn.hook_z[{head}]@{group.position}" for layer, head in group.heads]
            for name, group in self.groups.items()
        }

    def without(self, places: Sequence[tuple[str, Head]]) -> "Circuit | None":
        """The circuit less (group, head) pairs; None where nothing is left."""
        kept = {
            name: smaller
            for name, group in self.groups.items()
            if (smaller := group.without([head for where, head in places if where == name])) is not None
        }
        return Circuit(kept, self.model, self.task) if kept else None

    def require(self, *models: "HookedModel", force: bool = False) -> None:
        """Raise InputError where the circuit has heads that a model lacks, or was found in none of these models.

        Args:
            force: do not ask where it was found.
        """
        for model in models:
            for name, group in self.groups.items():
                require_in_range(name, group, model.layers, model.heads, model.name)
        known = self.model.get("files_sha256")
        here = {model.name: model.fingerprint for model in models}
        if known and all(here.values()) and known not in here.values() and not force:
            found = ", ".join(f"{name} ({print_[:12]}…)" for name, print_ in here.items())
            raise InputError(
                f"this circuit was found in {self.model.get('model', 'another model')} ({known[:12]}…), not in "
                f"{found}; to use it all the same pass force=True (--force)"
            )

    def describe(self) -> dict[str, Any]:
        """Its groups and where it was found, for the record."""
        return {"groups": {name: [*map(list, group.heads)] for name, group in self.groups.items()}} | {
            "found_in": self.model.get("model", "")
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, a head list a line."""
        path = Path(path)
        record = {"kind": KIND, "model": dict(self.model), "task": dict(self.task)}
        lines = [f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in record.items()]
        groups = [f"  {json.dumps(name)}: {_group_line(group)}" for name, group in self.groups.items()]
        text = ",\n".join([*lines, ' "groups": {\n' + ",\n".join(groups) + "\n }"])
        with whole_file(path) as target:
            target.write_text(f"{{\n{text}\n}}\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read a circuit that `save` wrote, or a published list.

        Raises:
            InputError: no such file, not a circuit, an empty group.
        """
        path = Path(path)
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(f"no such circuit: {path}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a circuit (JSON): {error}") from None
        try:
            if isinstance(record, dict) and "groups" in record:
                groups = {name: _read(name, **group) for name, group in record["groups"].items()}
                return cls(groups, record.get("model") or {}, record.get("task") or {})
            if not isinstance(record, dict):
                raise TypeError(f"found a {type(record).__name__}")
            order = sorted(record, key=lambda name: [*PUBLISHED, name].index(name))
            steps = {PUBLISHED[name][0]: {"to": PUBLISHED[name][2]} for name in order if name in PUBLISHED}
            return cls(dict(_published(name, record[name]) for name in order), task={"steps": steps} if steps else {})
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is not a circuit ({error}); {EXPECTED}") from None


def head_name(head: Head) -> str:
    """`layer.head`, as papers write it."""
    return f"{head[0]}.{head[1]}"


def require_in_range(name: str, group: Group, layers: int | None, heads: int | None, where: str) -> None:
    if layers is None or heads is None:
        return
    for layer, head in group.heads:
        if not (0 <= layer < layers and 0 <= head < heads):
            raise InputError(
                f"group {name!r} has head {layer}.{head}, and {where} has layers 0 to {layers - 1} of heads 0 to "
                f"{heads - 1}"
            )


def _group_line(group: Group) -> str:
    kept = {key: value for key, value in asdict(group).items() if value != ()}
    if "scores" in kept:
        kept["scores"] = [round(score, 6) for score in kept["scores"]]
    return json.dumps(kept, ensure_ascii=False)


def _read(name: str, *, position: int | str, heads: Any, scores: Any = ()) -> Group:
    return _named(name, position, _heads(heads), tuple(float(score) for score in scores))


def _published(name: str, heads: Any) -> tuple[str, Group]:
    ours, position, _ = PUBLISHED.get(name, (name, -1, ""))
    return ours, _named(name, position, _heads(heads), ())


def _heads(listed: Any) -> tuple[Head, ...]:
    if not isinstance(listed, list) or not all(
        isinstance(head, list) and len(head) == 2 and all(type(n) is int and n >= 0 for n in head) for head in listed
    ):
        raise TypeError(f"heads are [LAYER, HEAD] pairs of numbers from 0 on; found {str(listed)[:60]}")
    return tuple((layer, head) for layer, head in listed)


def _named(name: str, position: int | str, heads: tuple[Head, ...], scores: tuple[float, ...]) -> Group:
    if isinstance(position, bool) or not isinstance(position, int | str):
        raise TypeError(f"a position is a number or a mention such as label:first; found {position!r}")
    try:
        return Group(position, heads, scores)
    except InputError as error:
        raise InputError(f"group {name!r}: {error}") from None
