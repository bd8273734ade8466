"""What lies between base and tuned model, and which layers or components of the update carry the gain?

    θ(γ) = θ0 + γ⊙Δ,    Δ = θ1 − θ0,

- path: γ = α everywhere, beyond both ends too (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", §3), and
  the barrier max_{α∈[0,1]} L(α) − ((1−α)L(0) + αL(1)) (Frankle et al. 2020, "Linear Mode Connectivity and the Lottery
  Ticket Hypothesis", §2);
- groups: γ = α in one layer, component or matrix, and 0 in the rest (what it brings alone) or 1 (what is lost without);
- splits: the base below layer ℓ and the tuned model from ℓ on, and the reverse;
- reset: half of the parameter kinds of every block back at the base (Hui et al. 2024, "HFT: Half Fine-Tuning for Large
  Language Models", §3), and each kind alone;
- sharpness of layer ℓ along the path: S_ℓ(α) = E_{δ∼N(0, ρ² diag θ_ℓ²)} L(θ(α) + δ) − L(θ(α)), with the same draws at
  every α (Andriushchenko et al. 2023, "A Modern Look at the Relationship between Sharpness and Generalization", §2).

Everything is measured on every example, so that intervals and differences are paired.

Cost: one evaluation (a forward pass over all examples) for each different model; models that differ only where Δ = 0
are one. Memory: one model.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> pair = ModelPair.load(folder / "base", folder / "full")
>>> found = interpolate(pair, folder / "prompts.jsonl", alphas=(0, 0.5, 1), by="layer", limit=16, progress=False)
>>> path = found.path().query("metric == 'accuracy'").set_index("alpha")["mean"]
>>> bool(path[0] < 0.1 < 0.9 < path[1])
True
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.evaluation import Examples
    from finetune_lens.hybrid import Hybrid
    from finetune_lens.interpolation.points import Grid
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.interpolation import Interpolation

ALPHAS = tuple(i / 10 for i in range(-5, 16))
PARTS = ("path", "groups", "splits", "reset", "sharpness")
BY = ("layer", "component", "matrix")


@recorded
def interpolate(
    pair: "ModelPair",
    prompts: Any,
    *,
    alphas: Sequence[float] = ALPHAS,
    by: str | None = None,
    group_alphas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    parts: Sequence[str] | None = None,
    reset_seeds: int = 5,
    sharpness_alphas: Sequence[float] = (0.0, 0.5, 1.0),
    rho: float = 0.05,
    draws: int = 5,
    objective: str = "auto",
    template: str = "none",
    batch_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
    partial: Path | None = None,
) -> "Interpolation":
    """Measure the models between base and tuned model, and beyond them.

    Args:
        pair: base and tuned; the base has to run.
        prompts: JSONL file or list of prompts, or several of them by name; the first is the task.
        alphas: points of the path.
        by: "layer", "component" or "matrix": the groups whose update is scaled.
        group_alphas: at these α; 0 and 1 are among them anyway.
        parts: of path, groups, splits, reset, sharpness; by default path and splits, and groups where `by` is given.
        reset_seeds: number of halves drawn.
        sharpness_alphas: points of the path whose sharpness is measured.
        rho: size of the perturbation, relative to each weight.
        draws: perturbations a layer.
        objective: as of `finetune_lens.evaluation`: auto, answer, labels (among all files' answers), text.
        template: "none"; "each" puts the prompts through the chat template, the same tokens for both models.
        batch_size: examples at once.
        limit: only the first so many examples of each file.
        seed: of the halves and the perturbations.
        partial: folder in which finished evaluations wait, so that an interrupted run continues.

    Raises:
        InputError: an option out of range, weights with NaN or Inf, prompts that cannot be scored.
    """
    from finetune_lens.hybrid import Hybrid
    from finetune_lens.interpolation import points
    from finetune_lens.prompts import require_template
    from finetune_lens.results.interpolation import Interpolation

    numbers = {"alphas": alphas, "group_alphas": group_alphas, "sharpness_alphas": sharpness_alphas}
    numbers = {name: _numbers(name, values) for name, values in numbers.items()}
    parts = _parts(parts, by)
    if min(reset_seeds, draws) < 1 or not 0 < rho < np.inf:
        raise InputError(f"reset_seeds and draws are at least 1 and rho above 0; found {reset_seeds}, {draws}, {rho}")
    templated = require_template(template)
    hybrid = Hybrid(pair, device=device, dtype=dtype)
    examples = _examples(hybrid, prompts, objective, templated, limit)
    weights, hashes = _weights(hybrid)
    every = hybrid.weights.values()

    grids = {"ends": points.along(hybrid, [0.0, 1.0], "end")}
    if "path" in parts:
        grids["path"] = points.along(hybrid, numbers["alphas"], "alpha")
    if "groups" in parts:
        grids["scaling"] = points.scaled(hybrid, by, sorted({0.0, 1.0, *numbers["group_alphas"]}))
        weights["group_of"] = ("weight", np.array([points.group_of(w, by) for w in every], dtype=object))
    if "splits" in parts:
        grids["splits"] = points.split(hybrid)
        weights["lower"] = ("weight", np.array([points.is_lower(w) for w in every]))
    if "reset" in parts:
        halves = {i: points.half(hybrid, np.random.default_rng([seed, i])) for i in range(reset_seeds)}
        grids["halves"] = points.reset(hybrid, "half", halves)
        grids["kinds"] = points.reset(hybrid, "kind", points.grouped(hybrid, "component"))
        weights["was_reset"] = (("half", "weight"), np.array([[w.name in h for w in every] for h in halves.values()]))
    if "sharpness" in parts:
        grids["unperturbed"] = points.along(hybrid, numbers["sharpness_alphas"], "sharpness_alpha")
        grids["perturbed"] = points.perturbed(hybrid, numbers["sharpness_alphas"], draws)

    moving = [w.name for w, square in zip(every, weights["update_square"][1], strict=True) if square > 0]
    evaluator = points.Evaluator(hybrid, examples, moving, batch_size=batch_size, rho=rho, seed=seed)
    found = evaluator.evaluate([p for grid in grids.values() for p in grid.points], progress=progress, partial=partial)

    notes = list(hybrid.notes)
    if "splits" in parts and all(w.component != "unembed" for w in every):
        notes.append("the unembedding is the embedding, tied: in splits it goes with the lower part")
    broken = sum(bool(np.isnan(s[:, row, : len(e)]).any()) for s in found for row, e in enumerate(examples.values()))
    if broken:
        notes.append(f"losses of {broken} evaluations of a file are NaN: so are their means")
    data, record = _labelled(grids, found, weights, examples), hashes | _record(hybrid, examples, notes)
    return Interpolation(data.assign_attrs(by=by or "", rho=rho, provenance=json.dumps(record)))


def _numbers(name: str, values: Sequence[float]) -> list[float]:
    """Distinct numbers in their order from small to large; −0 is 0."""
    found = sorted({float(v) + 0.0 for v in values})
    if not found or not np.isfinite(found).all():
        raise InputError(f"{name} are numbers, one at least; found {list(values)}")
    return found


def _parts(parts: Sequence[str] | None, by: str | None) -> tuple[str, ...]:
    if by is not None and by not in BY:
        raise InputError(f"by is one of {', '.join(BY)}; found {by!r}")
    if parts is None:
        return ("path", "groups", "splits") if by else ("path", "splits")
    strange = [part for part in parts if part not in PARTS]
    if strange or not parts:
        raise InputError(f"parts are of {', '.join(PARTS)}; found {', '.join(map(repr, strange)) or 'none'}")
    if ("groups" in parts) != (by is not None):
        raise InputError(
            f"the part groups and by (one of {', '.join(BY)}) go together; found parts {','.join(parts)}, by {by}"
        )
    return tuple(parts)


def _examples(
    hybrid: "Hybrid", prompts: Any, objective: str, template: bool, limit: int | None
) -> dict[str, "Examples"]:
    """The files by name."""
    from finetune_lens.evaluation import label_words, read_examples
    from finetune_lens.prompts import read_prompts

    files = prompts
    if not isinstance(prompts, Mapping):
        files = {Path(prompts).stem if isinstance(prompts, str | Path) else "task": prompts}
    if not files:
        raise InputError("no file of prompts is given; expected one at least, that of the task")
    read = {str(name): read_prompts(source, limit=limit) for name, source in files.items()}
    labels = label_words(list(read.values())) if objective == "labels" else ()
    how = {"objective": objective, "labels": labels, "template": template}
    return {name: read_examples(source, hybrid.tokenizers, **how) for name, source in read.items()}


def _weights(hybrid: "Hybrid") -> tuple[dict[str, Any], dict[str, Any]]:
    """Place, number of entries and ‖Δ‖² of every weight; and their hashes.

    Raises:
        InputError: NaN or Inf.
    """
    import torch

    from finetune_lens.stream import each_matrix

    def size(matrix: Any) -> dict[str, Any]:
        delta = matrix.delta(torch.promote_types(matrix.base.dtype, torch.float32))
        return {"square": float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2}

    facts = {"analysis": "interpolation", "device": torch.device("cpu")}
    rows = each_matrix(hybrid.pair, list(hybrid.weights), size, progress=False, arguments=facts)
    for name, problem in rows.excluded.items():
        raise InputError(
            f"{len(rows.excluded)} weights hold NaN or Inf, such as {name} ({problem}): such a model cannot be measured"
        )
    every = hybrid.weights.values()
    found = {
        "weight": ("weight", _ticks(hybrid.weights)),
        "layer_of": ("weight", np.array([-1 if w.layer is None else w.layer for w in every])),
        "component_of": ("weight", np.array([w.component for w in every], dtype=object)),
        "parameters": ("weight", np.array([w.count for w in every])),
        "update_square": ("weight", rows.stacked("square")),
    }
    return found, json.loads(rows.provenance(torch.device("cpu")))


def _labelled(
    grids: dict[str, "Grid"], found: list[np.ndarray], weights: dict[str, Any], examples: dict[str, "Examples"]
) -> "xr.Dataset":
    import xarray as xr

    from finetune_lens.evaluation import METRICS

    data, scores = dict(weights), iter(found)
    coords: dict[str, Any] = {"metric": _ticks(METRICS), "file": _ticks(examples)}
    coords["objective"] = ("file", _ticks(e.objective for e in examples.values()))
    coords["examples"] = ("file", _ticks(len(e) for e in examples.values()))
    for name, grid in grids.items():
        values = np.stack([next(scores) for _ in grid.points])
        values = values.reshape(*map(len, grid.axes.values()), *values.shape[1:])
        data[name] = (("metric", *grid.axes, "file", "example"), np.moveaxis(values, len(grid.axes), 0))
        coords |= {axis: _ticks(ticks) for axis, ticks in grid.axes.items()}
    ids = np.full((len(examples), values.shape[-1]), "", dtype=object)
    for row, e in enumerate(examples.values()):
        ids[row, : len(e)] = [p.id for p in e.prompts]
    data["prompt"] = (("file", "example"), ids)
    return xr.Dataset(data, coords=coords)


def _ticks(values: Iterable[Any]) -> np.ndarray:
    values = list(values)
    return np.array(values, dtype=object if isinstance(values[0], str) else None)


def _record(hybrid: "Hybrid", examples: dict[str, "Examples"], notes: list[str]) -> dict[str, Any]:
    from finetune_lens.hooked.effects import describe_prompts

    model = hybrid.model.describe()
    return {
        "notes": notes, "model": model, "device": model["device"], "dtype": model["dtype"],
        "prompts": {name: describe_prompts(e.prompts) for name, e in examples.items()},
    }  # fmt: skip


def main() -> None:
    from finetune_lens.interpolation.__main__ import main as command

    command()
