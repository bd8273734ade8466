"""Sweeps as a labelled dataset: what patching, causal tracing and cross-model patching have in common."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.hooked.attribution import attribute
from finetune_lens.hooked.grid import Aligned, Grid
from finetune_lens.hooked.model import HookedModel
from finetune_lens.hooked.sweep import Side, sweep
from finetune_lens.metrics import METRICS
from finetune_lens.prompts import Prompt

if TYPE_CHECKING:
    import xarray as xr

METHODS = ("exact", "full", "attribution", "integrated", "both")


@dataclass(frozen=True)
class Direction:
    """donor → recipient, under the name that results use. `copies`: runs that are averaged into one example."""

    name: str
    recipient: Side
    donor: Side
    copies: int = 1


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        metric: the one that tables and figures show (and that attribution differentiates).
        method: "exact" re-enters the forward pass; "full" runs one forward pass a patch; "attribution" and
            "integrated" estimate to first order; "both" is exact with attribution beside it.
        steps: of integrated gradients.
    """

    metric: str = "logit_diff"
    method: str = "exact"
    steps: int = 10
    batch_size: int | None = None
    progress: bool = True
    partial: Path | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"metric {self.metric!r} is unknown; expected one of {', '.join(METRICS)}")
        if self.method not in METHODS:
            raise InputError(f"method {self.method!r} is unknown; expected one of {', '.join(METHODS)}")
        if self.steps < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise InputError(f"steps and batch size are at least 1; found {self.steps} and {self.batch_size}")


def effects(
    directions: Sequence[Direction],
    grid: Grid,
    where: Aligned,
    prompts: Sequence[Prompt],
    *,
    site: str,
    options: Options,
    arguments: dict[str, Any],
) -> "xr.Dataset":
    """Measure every patch of the grid in every direction, and label what was measured.

    `arguments` name what finished chunks belong to (beside models, prompts and grid).

    Raises:
        InputError: a metric that these prompts cannot have.
    """
    import xarray as xr

    _require_metric(options.metric, prompts, where)
    parts, notes, deviation = [], [], 0.0
    for direction in directions:
        variables, swept_notes, worst = _measured(direction, grid, options, _facts(direction, prompts, arguments))
        shape, dims = grid.shape, ("direction", *grid.dims, "example")
        data = {
            name: (dims, values.reshape(1, *shape, values.shape[-1]))
            if values.ndim == 2
            else (("direction", "example"), values[None])
            for name, values in variables.items()
        }
        parts.append(xr.Dataset(data, coords={"direction": np.array([direction.name], dtype=object), **grid.coords}))
        notes += [f"{direction.name}: {note}" for note in swept_notes]
        deviation = max(deviation, worst)
    data = xr.concat(parts, "direction")
    fields, hidden = _fields(prompts, {*map(str, data.variables), *map(str, data.dims), "tokens", "position"})
    notes += [f"the field {name!r} of the prompts is left out: the result has its own" for name in hidden]
    data = data.assign_coords({"example": np.array([p.id for p in prompts], dtype=object), **fields})
    tokens = where.tokens()
    if "position" in data.coords:
        tokens = tokens[:, [where.column(int(position)) for position in data.position.values]]
    data["tokens"] = (("example", "position"), tokens)
    if "position" not in data.coords:
        data = data.assign_coords(position=where.positions)
    record = {
        "notes": notes, "largest_deviation_of_an_unpatched_row": deviation, "prompts": describe_prompts(prompts),
        "models": [{"recipient": d.recipient.model.describe(), "donor": d.donor.model.describe()} for d in directions],
    }  # fmt: skip
    return data.assign_attrs(
        grid=" ".join(grid.dims), site=site, metric=options.metric, method=options.method, provenance=json.dumps(record)
    )


def describe_prompts(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Number and hash, for the record."""
    text = json.dumps([[p.id, p.prompt, p.answer, p.wrong, p.corrupt] for p in prompts])
    return {"count": len(prompts), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _require_metric(metric: str, prompts: Sequence[Prompt], where: Aligned) -> None:
    lacking = [p.id for p in prompts if not p.wrong]
    whole = where.clean.read_at.shape[1] > 1 or (len(lacking) < len(prompts) and not where.clean.wrongs.shape[1])
    if metric == "logit_diff" and whole:
        raise InputError("whole answers have no logit difference; pass metric='logprob' (--metric logprob)")
    if metric == "logit_diff" and lacking:
        raise InputError(
            f"the logit difference needs a wrong answer, and {len(lacking)} of {len(prompts)} prompts have none "
            f'(first: {lacking[0]}); add "wrong" to them, or pass another metric: {", ".join(list(METRICS)[1:])}'
        )
    if metric != "kl" and not all(p.answer for p in prompts):
        none = next(p.id for p in prompts if not p.answer)
        raise InputError(f"the metric {metric} needs answers; prompt {none} has none (kl needs none)")


def _measured(
    direction: Direction, grid: Grid, options: Options, facts: dict[str, Any]
) -> tuple[dict[str, np.ndarray], list[str], float]:
    """Variables of one direction, (patch, example) or (example,); notes; deviation of the unpatched rows."""
    found: dict[str, np.ndarray] = {}
    estimate_only = options.method in ("attribution", "integrated")
    known = direction.recipient.model.fingerprint and direction.donor.model.fingerprint
    partial = options.partial if known else None
    swept = sweep(
        direction.recipient, direction.donor, [] if estimate_only else grid.patches, batch_size=options.batch_size,
        full=options.method == "full", progress=options.progress and not estimate_only, label=direction.name,
        partial=None if estimate_only else partial, arguments=facts,
    )  # fmt: skip
    for name in swept.recipient:
        found[f"recipient_{name}"], found[f"donor_{name}"] = swept.recipient[name], swept.donor[name]
    if not estimate_only:
        found |= swept.effects
    if options.method != "exact" and options.method != "full":
        steps = options.steps if options.method == "integrated" else 0
        estimate = attribute(
            direction.recipient, direction.donor, grid.patches, options.metric, steps=steps,
            batch_size=options.batch_size, progress=options.progress,
        )  # fmt: skip
        if estimate_only:
            found[options.metric] = estimate
        else:
            found[f"attribution_{options.metric}"] = estimate
    averaged = {name: _averaged(values, direction.copies) for name, values in found.items()}
    return averaged, swept.notes, swept.deviation


def _averaged(values: np.ndarray, copies: int) -> np.ndarray:
    """The mean over the runs that belong to one example (they follow each other)."""
    return values.reshape(*values.shape[:-1], -1, copies).mean(-1)


def _fields(prompts: Sequence[Prompt], taken: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Free fields that every prompt has, as coordinates along the examples; and those whose names are taken."""
    common = set.intersection(*(set(p.fields) for p in prompts)) if prompts else set()
    found = {}
    for name in sorted(common - taken):
        values = [p.fields[name] for p in prompts]
        if all(isinstance(v, bool | int | float) for v in values):
            found[name] = ("example", np.array(values))
        else:
            texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
            found[name] = ("example", np.array(texts, dtype=object))
    return found, sorted(common & taken)


def _facts(direction: Direction, prompts: Sequence[Prompt], arguments: dict[str, Any]) -> dict[str, Any]:
    sides = {side: _side(getattr(direction, side).model) for side in ("recipient", "donor")}
    # Each direction keeps its own chunks: a store drops those of the same analysis with other facts.
    analysis = f"{arguments['analysis']}-{direction.name.replace('→', '-to-')}"
    return arguments | sides | {"analysis": analysis, "prompts": describe_prompts(prompts)["sha256"]}


def _side(model: HookedModel) -> dict[str, Any]:
    return model.describe() | {"adapted": model.adapted}
