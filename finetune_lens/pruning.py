"""Does removing a few weights of the tuned model bring back what the base could do?

If tuning hid a capability beneath a few new weights instead of overwriting it, then it returns when they are removed
(Jain et al. 2023, "Mechanistically analyzing the effects of fine-tuning on procedurally defined tasks",
arXiv 2311.12786, "Pruning"). Setting a weight θ to 0 changes the loss L on the base's task by

    L(θ = 0) − L(θ) = −θ·∂L/∂θ + O(θ²),

so that the K weights of the largest θ·∂L/∂θ are zeroed, in one shot. A neuron is a hidden unit of an MLP: a column of
its down projection, whose score is the sum over the column, a·∂L/∂a of its activation a. Beside it, with the same K:
the largest weights (neurons: columns of the largest norm), and random ones. Both sides are pruned by their own scores:
the base's curve shows what the same removal costs a model that has the capability.

Scores are taken on one part of the task's prompts; what is reported is measured on the other.

Cost: a forward and backward pass over the scored part a side, then (2 + random seeds)·|K| evaluations a side. Memory:
one model and the gradient of the weights that are scored.

>>> import numpy as np
>>> from finetune_lens import ModelPair, prune, zoo
>>> from finetune_lens.tasks import strings
>>> folder, drawn = zoo.path("strings"), strings.draw(["copy"], 32, np.random.default_rng(0), part="test")
>>> rows = [{"prompt": strings.question(*item), "answer": strings.answer(*item)} for item in drawn]
>>> pair = ModelPair.load(folder / "base", folder / "full")
>>> found = prune(pair, rows, counts=(2, 8), random_seeds=2, progress=False)
>>> found.unpruned()[["file", "base", "tuned"]].to_dict("records")
[{'file': 'task', 'base': 1.0, 'tuned': 0.0}]
>>> found.headline()["revives_at"]                              # neither removal brings copying back
[]
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from finetune_lens.held_out import Files
    from finetune_lens.hybrid import Hybrid, Rule
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.pruning import Pruning

SIDES = ("base", "tuned")
SCORES = ("gradient", "magnitude", "random")
COUNTS = {
    "neuron": (0, 1, 2, 5, 10, 15, 20, 50, 100, 200, 500),
    "weight": (0, 1, 10, 100, 1000, 10_000, 100_000),
}
SHARE = 0.5  # of the task's texts that are measured
KEPT = 500  # of the removed units, which are listed


@recorded
def prune(
    pair: "ModelPair",
    prompts: Any,
    *,
    evaluate: Mapping[str, Any] | None = None,
    unit: str = "neuron",
    counts: Sequence[int] | None = None,
    random_seeds: int = 5,
    objective: str = "auto",
    template: str = "none",
    seed: int = 0,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
    partial: Path | None = None,
) -> "Pruning":
    """Remove units from both models, and measure what they can do.

    The weights are put back bit for bit; no file is written to. Of an adapter, the merged weights are pruned.

    Args:
        pair: base and tuned; the base has to run.
        prompts: of the base's task, whose capability may be hidden: JSONL file or list of prompts. One half, drawn by
            text, gives the scores; the other is measured, as the file "task".
        evaluate: name → other prompts to measure, such as those of the task that was tuned on.
        unit: "neuron" (hidden units of MLPs) or "weight" (entries of the blocks' matrices).
        counts: how many units to remove; by default 1, 2, 5, 10, 15, 20, 50 … (weights: powers of ten), to half of all.
        random_seeds: random removals whose accuracies are averaged.
        objective: answer, labels, text or auto, as of `finetune_lens.evaluation`.
        template: "none"; "each" puts the prompts through the chat template, the same tokens for both models.
        seed: of the halves and the random removals.
        partial: folder in which finished measurements wait, so that an interrupted run continues.

    Raises:
        InputError: an option out of range, more units than there are, no MLP, gradients that are not finite.
    """
    from tqdm.auto import tqdm

    from finetune_lens.held_out import hold_out
    from finetune_lens.hybrid import Hybrid
    from finetune_lens.prompts import require_template
    from finetune_lens.results.pruning import Pruning
    from finetune_lens.stream import Store

    if unit not in COUNTS:
        raise InputError(f"unit is neuron or weight; found {unit!r}")
    if random_seeds < 1 or seed < 0:
        raise InputError(f"random_seeds is at least 1 and seed at least 0; found {random_seeds} and {seed}")
    templated = require_template(template)
    hybrid = Hybrid(pair, device=device, dtype=dtype)
    options = {"share": SHARE, "objective": objective, "template": templated, "limit": limit, "seed": seed}
    files = hold_out(prompts, evaluate, hybrid.tokenizers, **options)
    course = _Course(hybrid, files, unit, seed, batch_size)
    levels = _levels(counts, unit, sum(course.units.values()))
    facts = {
        "analysis": "pruning", "unit": unit, "seed": seed, "dtype": str(hybrid.model.dtype), "texts": files.identity(),
    }  # fmt: skip
    if partial is not None and pair.fingerprint:
        course.store = Store(partial, pair.fingerprint, facts)
    removals = [("gradient", 0), ("magnitude", 0), *(("random", n) for n in range(random_seeds))]
    rows: dict[tuple[str, str, int, int], dict[str, np.ndarray]] = {}
    orders: dict[tuple[str, str, int], _Order] = {}
    total = len(SIDES) * (1 + len(removals) * (len(levels) - 1))
    with hybrid, tqdm(total=total, desc="pruning", unit="", disable=not progress, dynamic_ncols=True) as bar:
        for side in SIDES:
            unpruned = course.row(side, "none", 0, [])
            bar.update()
            for score, number in removals:
                order = orders[side, score, number] = course.order(side, score, number, levels[-1])
                rows[side, score, number, 0] = unpruned
                for count in levels[1:]:
                    bar.set_postfix_str(f"{side}: {count} by {score}", refresh=False)
                    rows[side, score, number, count] = course.row(side, f"{score}-{number}", count, order.first(count))
                    bar.update()
    data = _dataset(course, levels, random_seeds, rows, orders)
    record = {
        "notes": [*hybrid.notes, *files.notes], "models": hybrid.model.describe(), "files_sha256": pair.fingerprint,
        "examples": {"scored": len(files.train)} | {n: len(e) for n, e in files.measured.items()},
    }  # fmt: skip
    metric = "logprob" if files.objective == "text" else "accuracy"
    return Pruning(data.assign_attrs(unit=unit, metric=metric, provenance=json.dumps(record)))


def _levels(counts: Sequence[int] | None, unit: str, total: int) -> list[int]:
    if counts is None:
        return [count for count in COUNTS[unit] if count <= total / 2]
    levels = sorted({0, *(int(count) for count in counts)})
    if levels[0] < 0 or levels[-1] > total:
        raise InputError(f"counts are from 0 to {total}, all {unit}s of the blocks; found {levels[0]} to {levels[-1]}")
    if len(levels) == 1:
        raise InputError(f"expected a count above 0, of {unit}s to remove; found {list(counts)}")
    return levels


@dataclass(frozen=True)
class _Order:
    """The units that one score removes, the first first.

    Attributes:
        names: of all matrices.
        matrix, unit: (rank,) in which of `names`, and which of its units.
        score: (rank,).
    """

    names: list[str]
    matrix: "torch.Tensor"
    unit: "torch.Tensor"
    score: "torch.Tensor"

    def first(self, count: int) -> "list[tuple[str, torch.Tensor]]":
        """Of the first so many units: those of each matrix that has any."""
        matrix, unit = self.matrix[:count], self.unit[:count]
        return [(self.names[m], unit[matrix == m]) for m in matrix.unique().tolist()]


class _Course:
    """One run's scores and measurements.

    Attributes:
        units: name of each matrix → how many units it has.
    """

    def __init__(self, hybrid: "Hybrid", files: "Files", unit: str, seed: int, batch_size: int | None):
        self.hybrid, self.files, self.unit, self.seed, self.batch_size = hybrid, files, unit, seed, batch_size
        self.store: Any = None
        neurons = unit == "neuron"
        self.units = {
            name: weight.base.shape[1] if neurons else weight.count
            for name, weight in hybrid.weights.items()
            if weight.layer is not None and weight.base.is_matrix and (weight.component == "down" or not neurons)
        }
        if not self.units:
            what = "no down projection of an MLP" if neurons else "no matrix"
            raise InputError(f"{hybrid.model.name}: {what} lies in a block; expected a model of layers")

    def order(self, side: str, score: str, number: int, most: int) -> _Order:
        """The `most` units of the largest score; of equal ones the earlier first."""
        import torch

        from finetune_lens.linalg.selection import largest

        with self._scores(side, score, number) as stream:
            taken = largest(stream, most)
            values = torch.cat([values[taken[name]] for name, values in stream()])
        matrix = torch.cat([torch.full((int(at.sum()),), m) for m, at in enumerate(taken.values())])
        unit = torch.cat([at.nonzero().squeeze(1) for at in taken.values()])
        by = torch.argsort(values, descending=True, stable=True)
        return _Order(list(taken), matrix.to(by.device)[by], unit[by], values[by])

    @contextmanager
    def _scores(self, side: str, score: str, number: int) -> "Iterator[Callable[[], Iterable]]":
        """Within: a stream of (name, the score of each of its units)."""
        import torch

        from finetune_lens.evaluation import add_gradient
        from finetune_lens.linalg import generator

        hybrid, neurons = self.hybrid, self.unit == "neuron"

        def stream() -> "Iterator[tuple[str, torch.Tensor]]":
            for name, count in self.units.items():
                if score == "random":
                    drawn = generator(repr((self.seed, "prune", number, name)))
                    yield name, torch.rand(count, generator=drawn).to(hybrid.model.device)
                    continue
                theta = hybrid.weights[name].ends(torch.float32, hybrid.model.device)[SIDES.index(side)]
                if score == "magnitude":
                    yield name, theta.norm(dim=0) if neurons else theta.abs().flatten()
                    continue
                gradient = hybrid.gradient(name)  # None: no example of the task came here
                change = theta * (0 if gradient is None else gradient.to(theta))
                change = change.sum(0) if neurons else change.flatten()
                if not bool(torch.isfinite(change).all()):
                    raise InputError(
                        f"{name}: the gradient in the {side} model is not finite; is its loss on the task?"
                    )
                yield name, change

        if score != "gradient":
            yield stream
            return
        model = hybrid.hold(float(SIDES.index(side)))
        found = {id(p): p for p in (hybrid.parameter_of(hybrid.weights[name]) for name in self.units)}
        try:
            for parameter in found.values():
                parameter.requires_grad_(True)
            add_gradient(model, self.files.train, torch.arange(len(self.files.train)), batch_size=self.batch_size)
            yield stream
        finally:
            for parameter in found.values():
                parameter.grad = None
                parameter.requires_grad_(False)

    def row(
        self, side: str, score: str, count: int, removed: "list[tuple[str, torch.Tensor]]"
    ) -> dict[str, np.ndarray]:
        """accuracy and logprob (file, example) of one side without some units."""
        from finetune_lens.evaluation import measure
        from finetune_lens.stream import padded

        key = f"{side}-{score}-{count}"
        row = self.store.get(key) if self.store else None
        if row is None:
            end = SIDES.index(side)
            gamma = dict.fromkeys(self.hybrid.weights, float(end))
            model = self.hybrid.hold(gamma | {name: _without(at, end, self.unit) for name, at in removed})
            scores = [measure(model, e, batch_size=self.batch_size) for e in self.files.measured.values()]
            row = {"accuracy": padded([s.accuracy for s in scores]), "logprob": padded([-s.loss for s in scores])}
            if self.store:
                self.store.put(key, row)
        return row


def _without(at: "torch.Tensor", end: int, unit: str) -> "Rule":
    """A weight of one side, its units `at` set to 0."""
    import torch

    def rule(zero: "torch.Tensor", one: "torch.Tensor") -> "torch.Tensor":
        theta = (zero, one)[end].clone(memory_format=torch.contiguous_format)
        if unit == "neuron":
            theta[:, at] = 0
        else:
            theta.view(-1)[at] = 0
        return theta

    return rule


def _dataset(
    course: _Course, levels: list[int], random_seeds: int, rows: Mapping[tuple[str, str, int, int], dict],
    orders: Mapping[tuple[str, str, int], _Order],
) -> "xr.Dataset":  # fmt: skip
    import xarray as xr

    names = list(course.units)
    ids = course.files.ids
    shape = (len(SIDES), len(SCORES), len(levels), *ids.shape)
    data: dict[str, Any] = {}
    for metric in ("accuracy", "logprob"):
        values = np.full(shape, np.nan, np.float32)
        drawn = np.full((len(SIDES), random_seeds, len(levels), len(ids)), np.nan, np.float32)
        for s, side in enumerate(SIDES):
            for c, count in enumerate(levels):
                for k, score in enumerate(SCORES):
                    seeds = range(random_seeds if score == "random" else 1)
                    each = np.stack([rows[side, score, n, count][metric] for n in seeds])
                    values[s, k, c] = each.mean(0)
                drawn[s, :, c] = np.nanmean(each, axis=-1)
        data[metric] = (("side", "score", "count", "file", "example"), values)
        data[f"random_{metric}"] = (("side", "seed", "count", "file"), drawn)
    removed = np.zeros((*shape[:3], len(names)))
    for (side, score, _), order in orders.items():
        at = SIDES.index(side), SCORES.index(score)
        for c, count in enumerate(levels):
            share = 1 / random_seeds if score == "random" else 1
            removed[(*at, c)] += share * np.bincount(order.matrix[:count].cpu().numpy(), minlength=len(names))
    data["removed"] = (("side", "score", "count", "matrix"), removed)
    own = [orders[side, "gradient", 0] for side in SIDES]
    for name in ("matrix", "unit", "score"):
        data[f"first_{name}"] = (("side", "rank"), np.stack([getattr(o, name)[:KEPT].cpu().numpy() for o in own]))
    data["commonest"] = (("file", "example"), _commonest(course.files))
    data["units"] = ("matrix", np.array(list(course.units.values())))
    data["id"] = (("file", "example"), ids)
    weights = [course.hybrid.weights[name] for name in names]
    coords = {
        "side": np.array(SIDES, dtype=object), "score": np.array(SCORES, dtype=object), "count": np.array(levels),
        "file": np.array(list(course.files.measured), dtype=object), "matrix": np.array(names, dtype=object),
        "layer": ("matrix", np.array([w.layer for w in weights])),
        "component": ("matrix", np.array([w.component for w in weights], dtype=object)),
        "columns": ("matrix", np.array([w.base.shape[1] for w in weights])),
    }  # fmt: skip
    return xr.Dataset(data, coords)


def _commonest(files: "Files") -> np.ndarray:
    """(file, example) 1 where the file's commonest answer is accepted, 0 where not; NaN of texts."""
    found = np.full(files.ids.shape, np.nan, np.float32)
    if files.objective != "text":
        for row, examples in zip(found, files.measured.values(), strict=True):
            ((answer, _),) = Counter(a for p in examples.prompts for a in p.answer).most_common(1)
            row[: len(examples)] = [answer in p.answer for p in examples.prompts]
    return found


def main() -> None:
    import typer

    from finetune_lens.command import Base, OutputFolder, Running, Template, Tuned, finish, numbers, run

    def pruning(
        base: Base,
        tuned: Tuned,
        task: Annotated[
            Path,
            typer.Argument(metavar="TASK", help="JSONL: prompt, answer, of what the base can do and may be hidden."),
        ],
        *,
        evaluate: Annotated[
            list[Path],
            typer.Option("--eval", help="JSONL to measure too, such as the task that was tuned on; may be repeated."),
        ] = [],  # noqa: B006 (typer reads it)
        unit: Annotated[str, typer.Option(help="neuron (hidden units of MLPs) or weight.")] = "neuron",
        counts: Annotated[
            str | None,
            typer.Option(help="How many to remove, as 1,2,5,10.  [default: up to half]", show_default=False),
        ] = None,
        random_seeds: Annotated[int, typer.Option(help="Random removals.")] = 5,
        objective: Annotated[str, typer.Option(help="auto, answer, labels (label words), text.")] = "auto",
        template: Template = "none",
        common: Running,
    ) -> None:
        """Remove the few units that hide a capability, and see whether it returns."""
        from finetune_lens.held_out import named

        folder = OutputFolder(common.out, "pruning", force=common.force)
        held = named(evaluate)
        pair = common.pair(base, tuned)
        folder.check()
        result = prune(
            pair, task, evaluate=held, unit=unit, counts=numbers(counts) if counts else None, random_seeds=random_seeds,
            objective=objective, template=template, seed=common.seed, partial=folder.partial, **common.execution(),
        )  # fmt: skip
        finish(result, folder, common)

    run(pruning)


if __name__ == "__main__":
    from finetune_lens.pruning import main

    main()
