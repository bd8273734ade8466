"""Does a circuit do the task, all of it, and with no head too many; and does it do so in the other model?

F(S) is the metric of the model in which every head outside S has its z replaced by that head's mean at that position
over a reference set of prompts; where a circuit C has no group, all heads are replaced (Prakash et al. 2024, arXiv
2402.14811, §4 and §5).

    faithfulness   F(C) / F(M), and beside it (F(C) − F(∅)) / (F(M) − F(∅)), which takes off what is left with no head
    completeness   |F(C∖K) − F(M∖K)|: the circuit should miss K as much as the model does. K is each group, and random
                   subsets, each head with probability 1/2
    minimality     F(C∖K) / F(C∖(K ∪ {v})) − 1 ≥ 0.01 for a head v. K are the heads of v's group that make v matter most
                   when they are gone, by F(C∖{w}) − F(C∖{v, w}) > 0; at most 30 % of the group, rounded up

Heads that fail the last are taken out together: the minimal circuit, and its faithfulness. K is chosen on the same
examples that the criterion is measured on, so that a score of a head that does nothing lies a little above 0.

The null: circuits of as many heads at each position, drawn at random from all heads of the model without replacement,
p = (1 + #{F(random) ≥ F(C)}) / (1 + n). Between two models: the difference of a circuit's faithfulness, tuned − base,
on the same examples.

Cost, for each model, circuit and example: 1 + random + subsets + groups + Σ_groups n(n + 1)/2 + 2·heads circuits, each
on the circuit's own positions only, and a re-entered pass for each K. The pairs of heads within a group are the
largest part of a large circuit; `minimality=False` leaves them out.

>>> from finetune_lens import zoo
>>> from finetune_lens.circuits import Circuit, Group
>>> model = zoo.path("strings") / "base"
>>> prompts = [{"prompt": f"<copy>{text}=", "answer": text[0]} for text in ("gafbdk", "kqwefz", "ttzabc", "mnbvcx")]
>>> heads = tuple((layer, head) for layer in range(3) for head in range(6))
>>> end, all_ = (Circuit({str(p): Group(p, heads) for p in positions}) for positions in ((-1,), range(9)))
>>> options = {"random": 3, "minimality": False, "progress": False}
>>> found = evaluate_circuit(model, {"heads at the end": end, "heads everywhere": all_}, prompts, **options)
>>> found.table()[["circuit", "full", "circuit_score", "floor"]].values.tolist()
[['heads at the end', 1.0, 0.25, 0.25], ['heads everywhere', 1.0, 1.0, 0.25]]
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial as bound
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.circuits.circuit import Circuit, Group
from finetune_lens.circuits.scores import Layout, Measured, lay_out
from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.hooked import HookedModel
    from finetune_lens.hooked.grid import Aligned
    from finetune_lens.prompts import Prompt
    from finetune_lens.results.circuit_evaluation import CircuitEvaluation

SIDES = ("base", "tuned")
METRICS = ("accuracy", "prob", "logit_diff", "logprob", "reciprocal_rank")


@recorded
def evaluate_circuit(
    models: Any,
    circuits: "Circuit | str | Path | Mapping[str, Circuit | str | Path]",
    prompts: Any,
    *,
    reference: Any = None,
    metric: str = "accuracy",
    random: int = 100,
    subsets: int = 20,
    minimality: bool = True,
    partners: float = 0.3,
    threshold: float = 0.01,
    align: str = "error",
    template: str = "none",
    seed: int = 0,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    config: Any = None,
    tokenizer: Any = None,
    force: bool = False,
    check: bool = True,
    progress: bool = True,
    partial: Path | None = None,
) -> "CircuitEvaluation":
    """Score circuits alone, without parts of them, and beside random ones; in one model, or in base and tuned.

    Args:
        models: a pair, for both sides; or a hooked model, a Hugging Face model, or where one lies.
        circuits: one, or several by name (those of base and of tuned, say), or their files. Each is evaluated in each
            model.
        prompts: a JSONL file, or a list of mappings with prompt, answer; and the fields that positions name.
        reference: prompts over which z is averaged; by default `prompts` themselves.
        metric: F.
        random: number of random circuits.
        subsets: random subsets K for completeness.
        minimality: judge every head, and prune.
        partners: of minimality: largest share of a group in K.
        threshold: of minimality.
        align: "left" or "right": which positions correspond where prompts differ in length.
        template: "none"; "each" puts prompts and reference through the chat template. Then a group at a number from 0
            on or at a mention is at a token of the prompt's own text, one at a negative number counts from where the
            answer begins.
        seed: of random circuits and subsets.
        config, tokenizer: of a single model, where they do not lie beside the weights.
        force: circuits that were found in another model.
        check: refuse a pair that fails the trust gate (`check_pair`).
        partial: folder in which finished batches wait, so that an interrupted run continues.

    Raises:
        InputError: a circuit found in another model, heads that a model lacks, a position that a prompt or the
            reference does not have, an option out of range.
        GateFailed: the trust gate found this pair unsafe to compare.
    """
    from finetune_lens.hooked.effects import _require_metric
    from finetune_lens.prompts import read_prompts, require_template
    from finetune_lens.results.circuit_evaluation import CircuitEvaluation

    _require_options(metric, random, subsets, partners, threshold, seed, batch_size)
    framed = require_template(template)
    named = _named(circuits)
    items = read_prompts(prompts, limit=limit)
    others = items if reference is None else read_prompts(reference)
    sides = _sides(models, device=device, dtype=dtype, config=config, tokenizer=tokenizer)
    for circuit in named.values():
        circuit.require(*sides.values(), force=force)
    where, averaged = _read(items, others, sides, align, framed)
    _require_metric(metric, items, where)
    if check and len(sides) > 1:
        from finetune_lens.check import require_safe

        require_safe(models, device=device, dtype=dtype)
    layouts = lay_out(named, where, next(iter(sides.values())), random, subsets, seed)
    run = bound(
        Measured, where=where, averaged=averaged, layouts=layouts, metric=metric, minimality=minimality,
        partners=partners, threshold=threshold, batch_size=batch_size, progress=progress, partial=partial,
    )  # fmt: skip
    measured = {name: run(name, model) for name, model in sides.items()}
    data = _dataset(measured, layouts, items, others, sides, random)
    return CircuitEvaluation(data.assign_attrs(metric=metric, threshold=threshold, circuits=_as_json(named)))


def minimal_circuit(found: "CircuitEvaluation", *, circuit: str | None = None, model: str | None = None) -> Circuit:
    """The circuit less the heads that minimality takes out of it in a model.

    Args:
        circuit, model: which, where several were evaluated.

    Raises:
        InputError: nothing is left; or minimality was not measured.
    """
    circuit, model = found.chosen(circuit, model)
    record = json.loads(found.data.attrs["circuits"])[circuit]
    groups = {
        name: Group(group["position"], tuple(map(tuple, group["heads"])), tuple(group["scores"]))
        for name, group in record["groups"].items()
    }
    whole = Circuit(groups, record["model"], record["task"] | {"minimal_in": model, "threshold": found.threshold})
    table = found.minimality(circuit=circuit, model=model)
    pruned = [(row.group, (row.layer, row.head)) for row in table[~table["kept"]].itertuples()]
    left = whole.without(pruned)
    if left is None:
        raise InputError(f"no head of {circuit!r} is needed in {model!r}: nothing is left of the circuit")
    return left


def _require_options(
    metric: str, random: int, subsets: int, partners: float, threshold: float, seed: int, batch_size: int | None
) -> None:
    if metric not in METRICS:
        raise InputError(f"the metric of a circuit is one of {', '.join(METRICS)}; found {metric!r}")
    if random < 0 or subsets < 0 or seed < 0:
        raise InputError(f"random, subsets and seed are at least 0; found {random}, {subsets} and {seed}")
    if not 0 <= partners <= 1:
        raise InputError(f"partners is a share of a group, between 0 and 1; found {partners:g}")
    if not threshold > 0:
        raise InputError(f"the threshold of minimality is above 0; found {threshold:g}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"the batch size is at least 1; found {batch_size}")


def _named(circuits: Any) -> dict[str, Circuit]:
    if not isinstance(circuits, Mapping):
        circuits = {"circuit": circuits}
    if not circuits:
        raise InputError("expected one circuit or more; found none")
    return {str(name): c if isinstance(c, Circuit) else Circuit.load(c) for name, c in circuits.items()}


def _sides(models: Any, *, device: str, dtype: str, config: Any, tokenizer: Any) -> "dict[str, HookedModel]":
    """base and tuned of a pair, or the one model."""
    from finetune_lens.hooked.loading import as_model
    from finetune_lens.pair import ModelPair

    if not isinstance(models, ModelPair):
        return {"model": as_model(models, device=device, dtype=dtype, config=config, tokenizer=tokenizer)}
    if config is not None or tokenizer is not None:
        raise InputError("config and tokenizer of a pair are given to ModelPair.load")
    sides = dict(zip(SIDES, models.models(device=device, dtype=dtype), strict=True))
    shapes = [(model.layers, model.heads) for model in sides.values()]
    if shapes[0] != shapes[1]:
        raise InputError(f"base and tuned have {shapes[0]} and {shapes[1]} layers and heads; expected the same of both")
    return sides


def _read(
    items: "Sequence[Prompt]", others: "Sequence[Prompt]", sides: "dict[str, HookedModel]", align: str, template: bool
) -> "tuple[Aligned, Any]":
    """The prompts, and the reference in the same columns.

    Raises:
        InputError: two tokenizers that differ; a position of the prompts that no prompt of the reference has.
    """
    from finetune_lens.hooked.grid import aligned, require_same_tokens

    silent = [replace(prompt, answer=(), wrong=()) for prompt in others]
    both = items if others is items else [*items, *silent]
    reading: dict[str, Any] = {"corrupted": False, "align": align, "template": template, "need_answer": False}
    read = [aligned(both, model.require_tokenizer(), **reading) for model in sides.values()]
    for other in read[1:]:
        require_same_tokens(read[0], other, both)
    whole = read[0]
    where = replace(whole, clean=whole.clean.rows(slice(len(items))), prompts=items)
    averaged = whole.clean if others is items else whole.clean.rows(slice(len(items), None))
    there = where.clean.prompt_columns.any(0) & ~averaged.prompt_columns.any(0)
    if bool(there.any()):
        position = whole.positions[int(there.nonzero()[0])]
        raise InputError(
            f"no prompt of the reference has a position {position}, and a prompt here does: its mean is not known; "
            "give a reference of prompts as long as these"
        )
    return where, averaged


def _dataset(
    measured: Mapping[str, Measured], layouts: Mapping[str, Layout], items: "Sequence[Prompt]",
    others: "Sequence[Prompt]", sides: "Mapping[str, HookedModel]", random: int,
) -> "xr.Dataset":  # fmt: skip
    import xarray as xr

    from finetune_lens.hooked.effects import _fields, describe_prompts

    many = len(items)
    sizes = {"member": max(len(la.members) for la in layouts.values()), "draw": random}
    sizes["knockout"] = max(len(la.knockouts) for la in layouts.values())
    sizes["partner"] = sizes["member"]
    dims = {
        "alone": (), "random": ("draw",), "without": ("knockout",), "model_without": ("knockout",),
        "held": ("member",), "dropped": ("member",), "pruned": (),
    }  # fmt: skip
    data: dict[str, Any] = {
        "full": (("model", "example"), np.stack([m.full for m in measured.values()])),
        "nothing": (("model", "example"), np.stack([m.nothing for m in measured.values()])),
    }

    def gathered(key: str, *along: str, last: int | None = many, missing: Any = np.nan) -> np.ndarray:
        """(circuit, model, …): padded where a circuit has fewer."""
        tail = () if last is None else (last,)
        table = np.full((len(layouts), len(measured), *(sizes[a] for a in along), *tail), missing)
        for at, circuit in enumerate(layouts):
            for side, m in enumerate(measured.values()):
                values = m.values[circuit].get(key)
                if values is not None:
                    table[(at, side, *(slice(n) for n in values.shape))] = values
        return table

    for key, along in dims.items():
        data[key] = (("circuit", "model", *along, "example"), gathered(key, *along))
    of_heads = {"last": None, "missing": -1}
    data["needed"] = (("circuit", "model", "member"), gathered("needed", "member", **of_heads).astype(np.int8))
    data["together"] = (
        ("circuit", "model", "member", "partner"), gathered("partner", "member", "partner", **of_heads).astype(np.int8),
    )  # fmt: skip
    data |= _members(layouts, sizes)
    fields, hidden = _fields(items, {*data, *sizes, "circuit", "model", "example"})
    coords = {"circuit": list(layouts), "model": list(measured), "example": [p.id for p in items]}
    record = {
        "notes": [f"{name}: {note}" for name, m in measured.items() for note in m.notes]
        + [f"the field {name!r} of the prompts is left out: the result has its own" for name in hidden],
        "largest_deviation_of_a_logit": max(m.deviation for m in measured.values()),
        "prompts": describe_prompts(items), "reference": describe_prompts(others),
        "models": {name: model.describe() for name, model in sides.items()},
    }  # fmt: skip
    return xr.Dataset(
        data, coords={name: np.array(values, dtype=object) for name, values in coords.items()} | fields,
        attrs={"provenance": json.dumps(record)},
    )  # fmt: skip


def _members(layouts: Mapping[str, Layout], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The heads of each circuit and the members of each K."""
    count, members, knockouts = len(layouts), sizes["member"], sizes["knockout"]
    group, name = np.full((count, members), "", dtype=object), np.full((count, knockouts), "", dtype=object)
    place = np.full((2, count, members), -1)
    removed = np.full((count, knockouts, members), -1, np.int8)
    for at, layout in enumerate(layouts.values()):
        for index, (of, _, *head) in enumerate(layout.members):
            group[at, index], place[:, at, index] = of, head
        for number, (label, chosen) in enumerate(layout.knockouts.items()):
            name[at, number] = label
            removed[at, number, : len(layout.members)] = np.isin(np.arange(len(layout.members)), chosen)
    return {
        "group": (("circuit", "member"), group), "layer": (("circuit", "member"), place[0]),
        "head": (("circuit", "member"), place[1]), "removed_name": (("circuit", "knockout"), name),
        "removed": (("circuit", "knockout", "member"), removed),
    }  # fmt: skip


def _as_json(circuits: Mapping[str, Circuit]) -> str:
    def group(g: Group) -> dict[str, Any]:
        return {"position": g.position, "heads": [*map(list, g.heads)], "scores": list(g.scores)}

    return json.dumps({
        name: {"model": dict(c.model), "task": dict(c.task), "groups": {n: group(g) for n, g in c.groups.items()}}
        for name, c in circuits.items()
    })  # fmt: skip
