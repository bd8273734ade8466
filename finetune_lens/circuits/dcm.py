"""What does a group of heads carry? Learn which of them, patched, move the answer as a counterfactual asks.

DCM, desiderata-based component masking (Davies et al. 2023, arXiv 2307.03637; here as in Prakash et al. 2024, arXiv
2402.14811, §4). A desideratum is a set of counterfactuals: a prompt, another (`corrupt`), and the answer that the model
would give, were a head's output on the other prompt to carry what the desideratum says (`corrupt_answer`). For each
group of a circuit and each desideratum one mask m a head is learnt from m = 1,

    z ← m·z + (1 − m)·z_source        loss = −mean target logit + λ·Σ(1 − m)

at the group's position, where z_source comes from the other prompt's own corresponding position. The rounded mask that
does best on a validation split is measured on a test split: a group carries what it can be made to answer. (The
published code looked positions up in the training batch when it validated and tested; here every prompt has its own.)

Beside it, on the same test prompts: no head patched, all of the group, as many others of the group, and as many heads
from outside the group at the same position.

Cost: a group and desideratum of n prompts: about 3·epochs·n/2 forward passes of one prompt to learn, n/4 for each
judgement, and up to 6·n for what stands beside it.

>>> import numpy as np
>>> from finetune_lens.circuits import Circuit, Group
>>> from finetune_lens.tasks import boxes
>>> from finetune_lens.zoo import path
>>> circuit = Circuit({"all": Group(-1, ((0, 0), (1, 0), (2, 0)))})
>>> rows = boxes.draw(40, np.random.default_rng(0), counterfactual="object")
>>> found = learn_masks(path("boxes") / "base", circuit, rows, batch_size=8, progress=False)
>>> found.desiderata, found.groups, len(found.heads("object", "all")) <= 3
(['object'], ['all'], True)
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.circuits.circuit import Circuit, Group, Head
from finetune_lens.errors import InputError
from finetune_lens.prompts import Prompt, read_prompts, require_template
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.hooked import HookedModel
    from finetune_lens.hooked.grid import Aligned
    from finetune_lens.hooked.masking import MixedRuns
    from finetune_lens.results.dcm import Masks

DRAWS = 10  # random sets of heads that are averaged
LEAST = 2  # rows of a split
Row = dict[str, Any]


@dataclass(frozen=True)
class _Settings:
    rate: float
    epochs: int
    penalty: float
    batch_size: int
    split: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.penalty >= 0 and self.epochs >= 1 and self.batch_size >= 1):
            raise InputError(
                "the rate is above 0, the penalty not below, epochs and batch size at least 1; found "
                f"rate {self.rate}, penalty {self.penalty}, {self.epochs} epochs, batch size {self.batch_size}"
            )
        if len(self.split) != 3 or min(self.split) <= 0 or not math.isclose(sum(self.split), 1):
            raise InputError(f"split: expected shares of train, validation and test that add to 1; found {self.split}")


@recorded
def learn_masks(
    model: "HookedModel | Any",
    circuit: Circuit | str | Path,
    prompts: Any,
    *,
    by: str = "counterfactual",
    target: str = "corrupt_answer",
    rate: float = 0.1,
    epochs: int = 2,
    penalty: float = 0.01,
    batch_size: int = 32,
    split: Sequence[float] = (0.5, 0.25, 0.25),
    groups: Sequence[str] | None = None,
    seed: int = 0,
    align: str = "error",
    template: str = "none",
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    config: Any = None,
    tokenizer: Any = None,
    force: bool = False,
    progress: bool = True,
    partial: Path | None = None,
) -> "Masks":
    """Learn a mask over the heads of each group for each desideratum.

    Args:
        model: a hooked model, a Hugging Face model, or where one lies (folder, file, cached hub id).
        circuit: its groups; or the file of one. A position that is a mention of a field (`label:first`) is looked up
            in the counterfactual prompt by `corrupt_FIELD`, where the prompt has such a field.
        prompts: a JSONL file, or a list of mappings, with prompt, corrupt, and the fields `by` and `target`.
        by: the field whose values are the desiderata.
        target: the field with the answer that a desideratum asks for, one token.
        rate: of Adam.
        epochs: passes over the training split.
        penalty: λ, what a patched head costs, in logits.
        batch_size: of training and measuring.
        split: shares of train, validation and test, drawn within each desideratum.
        groups: which of the circuit; by default all.
        seed: of the splits and of the random heads.
        align: "left" or "right": which positions correspond where prompts differ in length.
        template: "none"; "each" puts the prompts through the chat template; positions are as of `evaluate_circuit`.
        limit: so many rows of each desideratum.
        force: use a circuit that was found in another model.
        partial: folder in which finished masks wait, so that an interrupted run continues.

    Raises:
        InputError: prompts without counterfactual, target or desideratum, a target of several tokens or that is the
            answer, fewer than two rows in a split, a position that a prompt does not have, a circuit that is not of
            this model.
    """
    from finetune_lens.hooked.loading import as_model
    from finetune_lens.results.dcm import Masks

    framed = require_template(template)
    settings = _Settings(rate, epochs, penalty, batch_size, tuple(split), seed)
    circuit = circuit if isinstance(circuit, Circuit) else Circuit.load(circuit)
    chosen = _chosen(circuit, groups)
    items, desiderata = _desiderata(read_prompts(prompts), by, limit)
    items = _aimed(items, target)
    splits = {name: _split(name, rows, settings) for name, rows in desiderata.items()}
    model = as_model(model, device=device, dtype=dtype, config=config, tokenizer=tokenizer)
    circuit.require(model, force=force)
    where = _encoded(items, model.require_tokenizer(), target, align, framed)
    places = {name: _columns(where, group.position) for name, group in chosen.items()}
    rows = _learnt(model, chosen, where, places, splits, settings, progress=progress, partial=partial)
    data = _dataset(chosen, items, splits, rows)
    record = {
        "models": model.describe(), "circuit": circuit.describe(), "prompts": _described(where),
        "rows": {name: [len(part) for part in parts] for name, parts in splits.items()},
    }  # fmt: skip
    return Masks(data.assign_attrs(by=by, target=target, chance=_chance(items), provenance=json.dumps(record)))


def _chosen(circuit: Circuit, groups: Sequence[str] | None) -> dict[str, Group]:
    if groups is None:
        return dict(circuit.groups)
    there = ", ".join(circuit.groups)
    if not len(groups):
        raise InputError(f"expected one or more groups, or none given for all; found an empty list (there are {there})")
    unknown = [name for name in groups if name not in circuit.groups]
    if unknown:
        raise InputError(f"the circuit has no group {unknown[0]!r}; there are {there}")
    return {name: circuit.groups[name] for name in groups}


def _desiderata(items: Sequence[Prompt], by: str, limit: int | None) -> tuple[list[Prompt], dict[str, np.ndarray]]:
    """The prompts that are used, and which of them belong to each desideratum, in the order of the file."""
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected how many rows of each desideratum, 1 or more; found {limit}")
    _require(items, by, "the desideratum that a row belongs to", lambda p: p.fields.get(by) not in (None, ""))
    kept: list[Prompt] = []
    found: dict[str, list[int]] = {}
    for prompt in items:
        rows = found.setdefault(str(prompt.fields[by]), [])
        if limit is None or len(rows) < limit:
            rows.append(len(kept))
            kept.append(prompt)
    return kept, {name: np.array(rows) for name, rows in found.items()}


def _aimed(items: Sequence[Prompt], target: str) -> list[Prompt]:
    """The prompts with the target for their answer."""

    def aims(prompt: Prompt) -> bool:
        return isinstance(prompt.fields.get(target), str) and bool(prompt.fields[target])

    _require(items, target, "the answer that the desideratum asks for", aims)
    same = [p.id for p in items if p.fields[target] in p.answer]
    if same:
        raise InputError(
            f"{len(same)} of {len(items)} prompts have their own answer for `{target}` (first: {same[0]}): heads that "
            "change nothing would seem to carry it; draw other counterfactuals"
        )
    return [replace(p, answer=(p.fields[target],), wrong=()) for p in items]


def _require(items: Sequence[Prompt], field: str, what: str, has: Any) -> None:
    lacking = [p.id for p in items if not has(p)]
    if lacking:
        few = ", ".join(lacking[:3]) + (" …" if len(lacking) > 3 else "")
        raise InputError(f"{len(lacking)} of {len(items)} prompts have no `{field}` ({what}): {few}")


def _split(name: str, rows: np.ndarray, settings: _Settings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train, validation and test rows of a desideratum; the same for every group."""
    first, second = (int(share * len(rows)) for share in settings.split[:2])
    order = np.random.default_rng(settings.seed).permutation(rows)
    parts = order[:first], order[first : first + second], order[first + second :]
    if min(map(len, parts)) < LEAST:
        raise InputError(
            f"the desideratum {name!r} has {len(rows)} rows, which makes {', '.join(str(len(p)) for p in parts)} for "
            f"train, validation and test; expected {LEAST} or more in each: give more prompts, or another split"
        )
    steps = settings.epochs * math.ceil(len(parts[0]) / settings.batch_size)
    if steps * settings.rate < 0.5:  # a step of Adam moves a mask by the rate
        raise InputError(
            f"{steps} steps at rate {settings.rate:g} do not take a mask from 1 to below one half (desideratum "
            f"{name!r}, {len(parts[0])} training rows); give more prompts, more epochs, a smaller batch, or a higher "
            "rate"
        )
    return parts


def _encoded(items: Sequence[Prompt], tokenizer: Any, target: str, align: str, template: bool = False) -> "Aligned":
    from finetune_lens.hooked.grid import aligned

    where = aligned(items, tokenizer, corrupted=True, align=align, whole=True, template=template)
    several = np.flatnonzero((where.clean.answers >= 0).any(-1).sum(1).numpy() > 1)
    if len(several):
        prompt = items[several[0]]
        raise InputError(
            f"prompt {prompt.id}: `{target}`, {prompt.answer[0]!r}, is several tokens after the prompt; the target is "
            "one token, whose logit is raised"
        )
    return where


def _columns(where: "Aligned", position: int | str) -> tuple[np.ndarray, np.ndarray]:
    """(example,) twice: the columns of a position in the prompts, and in their counterfactuals."""
    from finetune_lens.hooked.grid import whole_number

    assert where.corrupt is not None
    count = len(where.prompts)
    mine = theirs = np.broadcast_to(where.columns(position), count)
    if whole_number(position) is None:
        theirs = np.array([_in_corrupt(where, row, str(position)) for row in range(count)])
    for name, side, columns in (("prompt", where.clean, mine), ("corrupt", where.corrupt, theirs)):
        there = where.there(side, position)[np.arange(count), columns]
        if not there.all():
            lacking = where.prompts[int(np.argmin(there))]
            raise InputError(
                f"prompt {lacking.id}: position {position} does not exist in its `{name}` text, which is shorter"
            )
    return mine, theirs


def _in_corrupt(where: "Aligned", row: int, position: str) -> int:
    from finetune_lens.hooked.mentions import column_of, parse

    prompt, (field, *_) = where.prompts[row], parse(position)
    theirs = f"corrupt_{position}" if f"corrupt_{field}" in prompt.fields else position
    try:
        return column_of(prompt, where.corrupt, row, theirs, where.tokenizer)
    except InputError as error:
        raise InputError(
            f"{error}. This is its `corrupt` text, where {position!r} is a mention of the field `corrupt_{field}` if "
            f"the prompt has one, else of `{field}`"
        ) from None


def _chance(items: Sequence[Prompt]) -> float:
    """1/boxes, where every prompt says how many there are to choose from; else NaN."""
    counts = [prompt.fields.get("boxes") for prompt in items]
    known = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in counts)
    return float(np.mean([1 / n for n in counts])) if known else math.nan


def _described(where: "Aligned") -> dict[str, Any]:
    """Number and hash, for the record: of what is run, and of the targets."""
    facts = [[p.id, p.prompt, p.corrupt, p.answer] for p in where.prompts]
    return {"count": len(facts), "sha256": hashlib.sha256(json.dumps(facts).encode()).hexdigest()}


def _learnt(
    model: "HookedModel", groups: Mapping[str, Group], where: "Aligned",
    places: Mapping[str, tuple[np.ndarray, np.ndarray]], splits: Mapping[str, tuple[np.ndarray, ...]],
    settings: _Settings, *, progress: bool, partial: Path | None,
) -> dict[tuple[str, str], Row]:  # fmt: skip
    """(desideratum, group) → what was learnt and measured; finished ones come from the store."""
    from tqdm.auto import tqdm

    from finetune_lens.hooked.masking import MixedRuns
    from finetune_lens.stream import Store

    texts = [where.clean.ids.tolist(), where.corrupt.ids.tolist(), where.clean.answers.tolist()]
    facts = {
        "analysis": "dcm", "settings": asdict(settings), "model": model.describe() | {"adapted": model.adapted},
        "groups": {name: [*map(list, g.heads)] for name, g in groups.items()},
        "columns": {name: [c.tolist() for c in columns] for name, columns in places.items()},
        "splits": {name: [part.tolist() for part in parts] for name, parts in splits.items()},
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }  # fmt: skip
    store = Store(partial, model.fingerprint, facts) if partial is not None and model.fingerprint else None
    rows: dict[tuple[str, str], Row] = {}
    steps = {n: settings.epochs * math.ceil(len(s[0]) / settings.batch_size) for n, s in splits.items()}
    total = len(groups) * sum(steps.values())
    with tqdm(total=total, desc="masks", unit="step", disable=not progress, dynamic_ncols=True) as bar:
        for name, group in groups.items():
            runs = None
            for desideratum, parts in splits.items():
                key = json.dumps([desideratum, name])
                row = store.get(key) if store else None
                if row is None:
                    bar.set_postfix_str(f"{name}: {desideratum}", refresh=False)
                    runs = runs or MixedRuns(
                        model, where.clean, where.corrupt, *places[name], batch_size=settings.batch_size
                    )
                    row = _measured(runs, group.heads, parts, settings, bar)
                    if store:
                        store.put(key, row)
                else:
                    bar.update(steps[desideratum])
                rows[desideratum, name] = row
    return rows


def _measured(
    runs: "MixedRuns", heads: Sequence[Head], parts: tuple[np.ndarray, ...], settings: _Settings, bar: Any
) -> Row:
    """The mask, and the accuracy of the target on the test rows: with it, and with other heads patched."""
    from finetune_lens.hooked.masking import learn
    from finetune_lens.results.dcm import PATCHED

    generator = np.random.default_rng(settings.seed)
    train, validation, test = parts
    learnt = learn(
        runs, heads, train, validation, rate=settings.rate, epochs=settings.epochs, penalty=settings.penalty,
        tick=bar.update,
    )  # fmt: skip
    patched = [head for head, chosen in zip(heads, learnt.patched, strict=True) if chosen]
    outside = [
        (layer, head)
        for layer, block in enumerate(runs.model.anatomy.blocks)
        for head in range(block.heads)
        if (layer, head) not in heads
    ]
    sets = {
        "learnt": [patched], "none": [[]], "all": [list(heads)],
        "random in group": _others(heads, len(patched), generator, without=patched),
        "random outside": _others(outside, len(patched), generator) if patched else [],
    }  # fmt: skip
    assert tuple(sets) == PATCHED
    accuracy = [
        np.mean([runs.accuracy(test, some) for some in each], axis=0) if each else np.full(len(test), np.nan)
        for each in sets.values()
    ]
    return {
        "mask": learnt.mask, "loss": learnt.losses, "validation": learnt.validation, "best": learnt.best,
        "accuracy": np.array(accuracy), "draws": np.array([len(each) for each in sets.values()]),
    }  # fmt: skip


def _others(
    heads: Sequence[Head], size: int, generator: np.random.Generator, *, without: Sequence[Head] = ()
) -> list[list[Head]]:
    """Up to DRAWS different sets of `size` heads, none of them `without`; all there are where there are no more."""
    if math.comb(len(heads), size) <= DRAWS + 1:
        found = [set(some) for some in combinations(heads, size)]
        found = [found[n] for n in generator.permutation(len(found))]
    else:
        found = []
        while len(found) <= DRAWS:
            some = {heads[n] for n in generator.permutation(len(heads))[:size]}
            if some not in found:
                found.append(some)
    return [sorted(some) for some in found if some != set(without)][:DRAWS]


def _dataset(
    groups: Mapping[str, Group], items: Sequence[Prompt], splits: Mapping[str, tuple[np.ndarray, ...]],
    rows: Mapping[tuple[str, str], Row],
) -> "xr.Dataset":  # fmt: skip
    import xarray as xr

    from finetune_lens.results.dcm import PATCHED
    from finetune_lens.stream import padded

    def table(key: str) -> np.ndarray:
        """(desideratum, group, …), NaN beyond what is there."""
        flat = padded([rows[desideratum, group][key] for desideratum in splits for group in groups])
        return flat.reshape(len(splits), len(groups), *flat.shape[1:])

    pairs = ("desideratum", "group")
    heads = padded([np.array(group.heads, float) for group in groups.values()])  # (group, head, 2)
    tests = [[items[n].id for n in parts[2]] for parts in splits.values()]
    widest = max(map(len, tests))
    variables = {
        "accuracy": ((*pairs, "patched", "example"), table("accuracy").astype(np.float32)),
        "draws": ((*pairs, "patched"), table("draws")),
        "mask": ((*pairs, "member"), table("mask")),
        "loss": ((*pairs, "step"), table("loss")),
        "validation": ((*pairs, "step"), table("validation")),
        "best": (pairs, table("best")),
        "layer": (("group", "member"), np.nan_to_num(heads[..., 0], nan=-1).astype(int)),
        "head": (("group", "member"), np.nan_to_num(heads[..., 1], nan=-1).astype(int)),
        "id": (("desideratum", "example"), np.array([t + [""] * (widest - len(t)) for t in tests], dtype=object)),
    }
    coords = {
        "desideratum": np.array(list(splits), dtype=object),
        "group": np.array(list(groups), dtype=object),
        "position": ("group", np.array([str(group.position) for group in groups.values()], dtype=object)),
        "patched": np.array(PATCHED, dtype=object),
    }
    return xr.Dataset(variables, coords=coords)
