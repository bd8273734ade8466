"""Can a line through the activations tell what the model was taught, at which depth, and by the same code after tuning?

A linear probe (Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes") is fitted at
every depth of both models on the same prompts, on standardised activations:

    logistic regression  min ½ λ‖w‖² − Σ log p(label | x̃·w + b),   ridge  min λ‖w‖² + Σ (y − x̃·w − b)²,

and scored on held-out prompts. What its accuracy is to be held against stands beside it: the majority class; a control
task of the same size, in which a label is drawn at random for each type (Hewitt and Liang 2019, "Designing and
Interpreting Probes with Control Tasks", §2), whose distance is the selectivity; and transfer, the base's probe on the
tuned model's activations and the reverse, as they are and with the means of both made equal. A capability that tuning
wrapped up stays readable; one that it deleted does not (Jain et al. 2023, arXiv 2311.12786, §4).

Cost: a forward pass a side up to the last block, and 2 · depths · splits fits, each 2·n·d² + d³ flops and some tens of
passes over its n training rows of d features. Activations beyond 2 GiB wait on the disk.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> pair = ModelPair.load(folder / "base", folder / "full")
>>> words = [a + b for a in "abcdefgh" for b in "klmnopqr"]
>>> rows = [{"prompt": f"<{task}>{word}=", "label": task} for word in words for task in ("copy", "flip")]
>>> found = probe(pair, rows, position=1, seeds=1, progress=False)
>>> row = found.to_frame().query("side == 'base' and depth == 1").iloc[0]
>>> float(row["score"]), round(found.majority()[0], 2), bool(row["selectivity_low"] > 0.1)
(1.0, 0.5, True)
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.hooked.features import Features
    from finetune_lens.hooked.model import HookedModel
    from finetune_lens.pair import ModelPair
    from finetune_lens.probing.fits import Unit
    from finetune_lens.probing.labels import Labels, Split
    from finetune_lens.prompts import Encoded, Prompt
    from finetune_lens.results.probing import Probing

BY = ("layer", "layer,head")


@recorded
def probe(
    pair: "ModelPair",
    prompts: Any,
    *,
    label: str = "label",
    labels: Sequence[Any] | None = None,
    site: str = "resid_post",
    position: int | str = "last",
    by: str = "layer",
    kind: str = "auto",
    penalty: float = 1.0,
    test: float = 0.3,
    seeds: int = 5,
    group: str | None = None,
    control: bool = True,
    control_field: str | None = None,
    template: str = "none",
    batch_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    check: bool = True,
    progress: bool = True,
    partial: Path | None = None,
) -> "Probing":
    """Fit probes of a label at every depth of both models, and score them on held-out prompts.

    Args:
        pair: base and tuned; both have to run, with the same number of layers and widths.
        prompts: JSONL file or list of prompts, each with its label in the field `label`.
        labels: the labels, one a prompt, where they are not in the prompts.
        site: kind of site. "resid_post" is the residual stream after each block, with the embedding as depth 0.
        position: where it is read: "last", a number, "mean" over the text, "mean:N" over the last N tokens, or a
            mention of a field such as "subject:first+1".
        by: "layer", or "layer,head" at sites of heads (z, q, k, v).
        kind: "classes" or "regression"; "auto" takes text, true/false and whole numbers for classes.
        penalty: λ; scikit-learn's C = 1/λ, of ridge its alpha. Features are standardised by the training part.
        test: share held out, of the texts of each class. Prompts with a field `split` (train or test) are divided by
            it instead.
        seeds: how many splits, each with a control task of its own.
        group: a field whose values are never divided between training and test; the same texts never are.
        control: fit the control task.
        control_field: the field whose values are the types of the control task. By default the token that is read,
            where its entropy is ln 10 or more, else the text.
        template: "none"; "each" puts the prompts through the chat template on both sides. Then mentions, means and
            numbers from 0 on are of the prompt's own text; "last" and negative ones count from where the answer begins.
        batch_size: texts at once.
        check: refuse a pair that fails the trust gate (`check_pair`).
        partial: folder for activations, from which an interrupted call continues.

    Raises:
        InputError: labels that are missing, of several kinds or all the same; a class too small for both parts; a
            position that a prompt does not have; models of other depths; tokenizers that read a prompt differently.
        GateFailed: the trust gate found this pair unsafe to compare.
    """
    from finetune_lens.check import require_safe
    from finetune_lens.device import choose
    from finetune_lens.hooked.features import columns_at
    from finetune_lens.probing.fits import Task, fit_all
    from finetune_lens.probing.labels import controls, read_labels, split, types_of
    from finetune_lens.prompts import read_prompts, require_template
    from finetune_lens.results.probing import Probing

    if seeds < 1 or not penalty > 0 or (batch_size is not None and batch_size < 1):
        raise InputError(
            f"seeds and batch size are at least 1, the penalty above 0; found {seeds}, {batch_size}, {penalty}"
        )
    framed = require_template(template)
    items = read_prompts(prompts, limit=limit if labels is None else None)
    if labels is not None:
        if len(labels) != len(items):
            raise InputError(f"expected a label for each of the {len(items)} prompts; found {len(labels)}")
        items, labels = items[:limit], labels[:limit]
    target = read_labels(items, label, given=labels, kind=kind)
    parts = split(items, target, group=group, test=test, seeds=seeds, seed=seed)
    models = pair.models(device=device, dtype=dtype)
    units, axis = _units(models, site, by)
    encoded = _encoded(items, models, framed)
    columns = columns_at(position, items, encoded, models[0].require_tokenizer(), template=framed)
    types, what = types_of(items, encoded, columns, control_field)
    if check:
        require_safe(pair, device=device, dtype=dtype)
    targets = np.tile(target.values, (seeds, 1))[..., None]
    if control:
        targets = np.concatenate([targets, controls(target, types, seeds=seeds, seed=seed)[..., None]], 2)
    sides = _collected(models, encoded, columns, units, batch_size, progress, partial)
    where = choose(device)
    task = Task(targets, parts.train, len(target.names), float(penalty))
    with _bar(len(units) * seeds, "probes", progress) as bar:
        found = fit_all(sides, units, task, choose("cpu") if where.type == "mps" else where, tick=bar.update)
    data = _labelled(found, target, parts, items, units, axis, models, control)
    if control:
        data["control_seen"] = ("seed", [np.isin(types[~part], types[part]).mean() for part in parts.train])
    return Probing(
        data.assign_attrs(
            label=label, site=site, position=str(position), penalty=float(penalty), classes=len(target.names),
            class_names=json.dumps(target.names, ensure_ascii=False), control=what if control else "",
        )
    )  # fmt: skip


def _units(models: "Sequence[HookedModel]", site: str, by: str) -> "tuple[list[Unit], str]":
    """What is probed, in the order of the result; and what its layers are called.

    Raises:
        InputError: models of different shape, a site that they do not have, heads where there are none.
    """
    from finetune_lens.hooked.features import shape_at
    from finetune_lens.hooked.sites import HEADS, known, site_name

    base, tuned = models
    if by not in BY:
        raise InputError(f"by is one of {' or '.join(BY)}; found {by!r}")
    if known(site) == "pattern" or (by == "layer,head" and site not in HEADS):
        heads = ", ".join(name for name in HEADS if name != "pattern")
        raise InputError(f"the site {site!r} cannot be probed by {by}; heads are told apart at {heads}")
    if base.layers != tuned.layers:
        raise InputError(
            f"{base.name} has {base.layers} layers and {tuned.name} {tuned.layers}: their probes cannot be compared "
            "depth by depth; expected two versions of one architecture"
        )
    names = [site_name(site, layer) for layer in range(base.layers)]
    shapes = [[shape_at(model, name) for name in names] for model in models]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{base.name} has activations of shape {shapes[0][0]} at {site} and {tuned.name} {shapes[1][0]}; a probe "
            "of one could not read the other"
        )
    if by == "layer,head":
        return [(name, head) for name in names for head in range(shapes[0][0][0])], "layer"
    if site == "resid_post":
        return [(name, None) for name in (site_name("resid_pre", 0), *names)], "depth"
    return [(name, None) for name in names], "layer"


def _encoded(items: "Sequence[Prompt]", models: "Sequence[HookedModel]", template: bool) -> "Encoded":
    """The prompts without their answers, as both models read them.

    Raises:
        InputError: tokenizers that read a prompt differently.
    """
    from finetune_lens.prompts import encode

    bare = [replace(item, answer=(), wrong=(), corrupt=None) for item in items]
    options: dict[str, Any] = {"template": template, "need_answer": False, "padding": "right"}
    base, tuned = (encode(bare, m.require_tokenizer(), **options) for m in models)
    for row, item in enumerate(items):
        if base.ids[row, base.mask[row]].tolist() != tuned.ids[row, tuned.mask[row]].tolist():
            raise InputError(
                f"base and tuned model read prompt {item.id} as different tokens: {base.tokens[row]} and "
                f"{tuned.tokens[row]}; give one tokenizer to both (--tokenizer)"
            )
    return base


def _collected(
    models: "Sequence[HookedModel]", encoded: "Encoded", columns: Any, units: "Sequence[Unit]",
    batch_size: int | None, progress: bool, partial: Path | None,
) -> "list[Features]":  # fmt: skip
    from finetune_lens.hooked.features import collect

    sites = list(dict.fromkeys(name for name, _ in units))
    found = []
    with _bar(2 * len(encoded), "texts", progress) as bar:
        for side, model in zip(("base", "tuned"), models, strict=True):
            folder = None if partial is None else partial / side
            found.append(
                collect(
                    model, encoded, sites, columns=columns, folder=folder, batch_size=batch_size, tick=bar.update
                )
            )  # fmt: skip
    return found


def _bar(total: int, what: str, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, unit="", disable=not progress, dynamic_ncols=True)


def _labelled(
    found: dict[str, np.ndarray], target: "Labels", parts: "Split", items: "Sequence[Prompt]",
    units: "Sequence[Unit]", axis: str, models: "Sequence[HookedModel]", control: bool,
) -> "xr.Dataset":  # fmt: skip
    import xarray as xr

    from finetune_lens.hooked.effects import describe_prompts

    heads = 1 + max(head if head is not None else 0 for _, head in units)
    apart = units[0][1] is not None
    place, shape = ((axis, "head"), (-1, heads)) if apart else ((axis,), (-1,))
    front = {"score": ("trained_on", "tested_on")}
    back = {"converged": ("target", "seed"), "leaked_rows": ("seed",)}
    data = {}
    for name, values in found.items():
        lead = len(front.get(name, ("side",)))
        values = values.reshape(*values.shape[:lead], *shape, *values.shape[lead + 1 :])
        data[name] = ((*front.get(name, ("side",)), *place, *back.get(name, ("seed", "example"))), values)
    held_out = ~parts.train
    data["weight"], data["majority_score"] = (
        (("seed", "example"), values) for values in _baseline(target, parts.train)
    )
    texts = np.array([item.prompt for item in items])
    data["leaked_texts"] = ("seed", [np.isin(texts[h], texts[~h]).mean() for h in held_out])
    shown = target.values if not target.names else np.array(target.names, dtype=object)[target.values]
    data |= {"label": ("example", shown), "group": ("example", parts.group)}
    sides = np.array(["base", "tuned"], dtype=object)
    coords = dict.fromkeys(("trained_on", "tested_on", "side"), sides) | {
        "target": np.array(["label", "control"][: 1 + control], dtype=object),
        "example": np.array([item.id for item in items], dtype=object),
        "seed": np.arange(len(parts.train)),
        axis: np.arange(len(units) // (heads if apart else 1)),
    }
    if apart:
        coords["head"] = np.arange(heads)
    notes = ["the prompts' own field `split` divides them: splits differ in their control task only"] * parts.given
    record = {
        "notes": notes, "prompts": describe_prompts(items),
        "models": {side: model.describe() for side, model in zip(sides, models, strict=True)},
    }  # fmt: skip
    return xr.Dataset(data, coords=coords).assign_attrs(
        measure="accuracy" if target.names else "R²", provenance=json.dumps(record)
    )


def _baseline(target: "Labels", train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(seed, example) what a score counts for, and the score of the training part's majority or mean."""
    weight, score = np.zeros((2, *train.shape))
    for n, part in enumerate(train):
        labels, held_out = target.values[part], target.values[~part]
        if target.names:
            weight[n, ~part], score[n, ~part] = 1, held_out == np.bincount(labels).argmax()
        else:
            weight[n, ~part] = (held_out - held_out.mean()) ** 2
            score[n, ~part] = weight[n, ~part] - (held_out - labels.mean()) ** 2
    return weight, score
