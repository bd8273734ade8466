"""Do the intruder dimensions carry what was learnt, or what was forgotten? They are scaled, and the model is measured.

    W(λ) = W1 + (λ − 1)·σ_i u_i v_iᵀ

from the singular value decomposition of W1, in all matrices together: of each the intruder of the largest σ, or all
intruders among its top k (Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv
2410.21228, the section on scaling intruder dimensions; λ ∈ {0, .25, .5, .75, 1, 1.5, 2}). λ = 1 is the tuned model bit
for bit, λ = 0 the tuned model without them. The control scales in the same matrices the neighbour in rank that is
certainly no intruder. With P the projector on intruders, two more models say how much of the gain they hold:

    keep: W0 + PΔ        remove: W1 − PΔ

beside as many others of the top k: the leading ones, and random ones. Of the right side it is ΔP.

Cost: one model in memory; a partial decomposition of W1 for every matrix with an intruder; then an evaluation for each
λ and side of the comparison, and for n intruders about 2·(2 + draws)·(2 + log2 n) of the models that keep or remove.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> found = scale_intruders(
...     ModelPair.load(folder / "base", folder / "lora"), {"task": folder / "prompts.jsonl"},
...     scales=[0, 1], recovery=False, limit=7, progress=False,
... )                                                            # the first block alone
>>> frame = found.to_frame().set_index(["metric", "scale"])
>>> frame.loc[("accuracy", 1.0), "intruder"] == frame.loc[("accuracy", 1.0), "tuned"]
np.True_
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from finetune_lens.evaluation import Examples
    from finetune_lens.hybrid import Gamma, Hybrid, Rule
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.intruder_scaling import IntruderScaling
    from finetune_lens.results.intruders import Intruders

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
WHICH = ("top", "all")
ARMS = ("intruder", "neighbour")
PARTS = ("keep", "remove")
SAME_SIGMA = 1e-4  # relative to the largest, up to which two decompositions of one matrix may differ

Ranks = dict[str, list[int]]  # by matrix, ranks from 0
Direction = tuple[str, int]  # matrix, rank


@recorded
def scale_intruders(
    pair: "ModelPair",
    prompts: Mapping[str, Any],
    *,
    scales: Iterable[float] = SCALES,
    which: Literal["top", "all"] = "top",
    epsilon: float = 0.5,
    k: int = 10,
    side: Literal["left", "right"] = "left",
    recovery: bool = True,
    random_draws: int = 3,
    embeddings: bool = False,
    found: "Intruders | None" = None,
    hybrid: "Hybrid | None" = None,
    template: str = "none",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
    partial: Path | None = None,
) -> "IntruderScaling":
    """Scale intruders and their neighbours, keep and remove intruders, and measure every example each time.

    Args:
        pair: base and tuned; they have to run.
        prompts: by name a JSONL file or a list of prompts: of the new task, and of what the base could do.
        scales: the λ.
        which: "top" scales one vector a matrix, as published; "all" every intruder among the top k.
        epsilon, k, side, embeddings, limit: which vectors are intruders, of which matrices (`find_intruders`).
        recovery: measure the models that keep or remove intruders.
        random_draws: sets of random vectors beside the intruders kept or removed.
        found: what `find_intruders` found of this pair; by default it is run, without nulls.
        hybrid: the pair's, where it is loaded already.
        template: "none"; "each" puts the prompts through the chat template, the same tokens for both models.
        seed: of the random vectors.
        dtype: the type the model runs in; W(λ) is rounded to it.
        partial: folder in which finished measurements wait, so that an interrupted run continues.

    Raises:
        InputError: an option out of range, no prompts, weights that do not run, `found` of another pair or side.
    """
    from finetune_lens import device as devices
    from finetune_lens.evaluation import read_examples
    from finetune_lens.hybrid import Hybrid
    from finetune_lens.intruders import find_intruders
    from finetune_lens.prompts import require_template
    from finetune_lens.results.intruder_scaling import IntruderScaling

    scales = checked(scales, which=which, side=side, random_draws=random_draws)
    templated = require_template(template)
    if not prompts:
        raise InputError("nothing to measure on: expected prompts by name, such as {'task': 'task.jsonl'}")
    hybrid = Hybrid(pair, device=device, dtype=dtype) if hybrid is None else hybrid
    examples = {
        str(name): read_examples(source, hybrid.tokenizers, template=templated) for name, source in prompts.items()
    }
    if found is None:
        found = find_intruders(
            pair, epsilon=epsilon, k=k, side=side, null_draws=0, embeddings=embeddings, limit=limit, device=device,
            progress=progress,
        )  # fmt: skip
    plan = _planned(
        found,
        epsilon=epsilon,
        k=k,
        side=found.chosen_side(side),
        which=which,
        live=set(hybrid.weights),
        random_draws=random_draws if recovery else 0,
        seed=seed,
    )
    vectors = _vectors(pair, plan.needed(), found, side, devices.choose(device))
    counts = _doubling(len(plan.ordered["intruder"])) if recovery else []
    points = _points(plan, vectors, [s for s in scales if s != 1], counts, list(hybrid.weights))
    measured = _measured(points, hybrid, examples, batch_size, _store(partial, pair, hybrid, examples, plan), progress)
    data = _dataset(measured, plan, scales, counts, found, examples)
    provenance = {name: found.provenance.get(name) for name in ("weights_sha256", "excluded")}
    data.attrs |= {
        "epsilon": float(epsilon),
        "k": int(k),
        "side": side,
        "which": which,
        "provenance": json.dumps(provenance | _record(hybrid, examples, plan)),
    }
    return IntruderScaling(data)


def checked(scales: Iterable[float], *, which: str, side: str, random_draws: int) -> list[float]:
    """The λ, each once and rising.

    Raises:
        InputError: one of these options is out of range.
    """
    found = sorted({float(scale) for scale in scales})
    if not found or not all(map(math.isfinite, found)):
        raise InputError(f"scales are one or more finite numbers λ; found {found}")
    if which not in WHICH:
        raise InputError(f"which is one of {', '.join(WHICH)}; found {which!r}")
    if side not in ("left", "right"):
        raise InputError(f"one side is scaled, left or right; found {side!r}")
    if random_draws < 0:
        raise InputError(f"random_draws is at least 0; found {random_draws}")
    return found


@dataclass(frozen=True)
class _Plan:
    """Which vectors are scaled, kept and removed.

    Attributes:
        arms: of the intruders and of their neighbours, by matrix, the ranks that are scaled.
        ordered: by the kind of vector, the directions that are kept or removed, in the order in which they are taken:
            the intruders by falling σ, and at the same place another vector of the same matrix; None where there is
            none left.
        notes: what is not as asked for.
    """

    arms: dict[str, Ranks]
    ordered: dict[str, list[Direction | None]]
    notes: list[str]

    def needed(self) -> Ranks:
        """By matrix, all ranks of which a vector is needed."""
        pairs = {(name, r) for ranks in self.arms.values() for name, rs in ranks.items() for r in rs}
        pairs |= {direction for each in self.ordered.values() for direction in each if direction is not None}
        found: Ranks = {}
        for name, rank in sorted(pairs):
            found.setdefault(name, []).append(rank)
        return found


def _planned(
    found: "Intruders",
    *,
    epsilon: float,
    k: int,
    side: str,
    which: str,
    live: set[str],
    random_draws: int,
    seed: int,
) -> _Plan:
    notes = []
    names = [str(name) for name in found.data.matrix.values]
    verdicts = dict(zip(names, found.verdict(epsilon=epsilon).sel(side=side).values, strict=True))
    sigma = dict(zip(names, found.data.sigma.values, strict=True))
    intruders = {name: np.flatnonzero(v[:k] == 1).tolist() for name, v in verdicts.items()}
    intruders = {name: ranks for name, ranks in intruders.items() if ranks}
    dead = [name for name in intruders if name not in live]
    if dead:
        notes.append(f"not scaled, since the running model has no such weight: {', '.join(dead)}")
        intruders = {name: ranks for name, ranks in intruders.items() if name in live}
    scaled = intruders if which == "all" else {name: ranks[:1] for name, ranks in intruders.items()}
    neighbours = {name: _neighbours(verdicts[name], ranks) for name, ranks in scaled.items()}
    short = [name for name, ranks in neighbours.items() if len(ranks) < len(scaled[name])]
    if short:
        what = "no vector is" if which == "top" else "too few vectors are"
        notes.append(f"left out of the control, or short there, since {what} certainly no intruder: {', '.join(short)}")
    arms = {"intruder": scaled, "neighbour": {name: ranks for name, ranks in neighbours.items() if ranks}}

    order = sorted(((name, r) for name, ranks in intruders.items() for r in ranks), key=lambda d: -sigma[d[0]][d[1]])
    others = {name: np.flatnonzero(verdicts[name][:k] == 0) for name in intruders}
    ordered: dict[str, list[Direction | None]] = {"intruder": order, "leading": _beside(order, others)}
    for draw in range(random_draws):
        generator = np.random.default_rng([seed, draw])
        shuffled = {name: generator.permutation(ranks) for name, ranks in others.items()}
        ordered[f"random {draw + 1}"] = _beside(order, shuffled)
    if None in ordered["leading"]:
        notes.append(
            f"of the {len(order)} intruders {ordered['leading'].count(None)} have no other vector of their matrix' top "
            f"{k} beside them: the controls of what is kept and removed are smaller by as many"
        )
    return _Plan(arms, ordered, notes)


def _neighbours(verdict: np.ndarray, ranks: Sequence[int]) -> list[int]:
    """For each rank the nearest that is certainly no intruder, the one of lower σ first; none is taken twice."""
    free = set(np.flatnonzero(verdict == 0).tolist())
    chosen = []
    for rank in ranks:
        if free:
            nearest = min(free, key=lambda other: (abs(other - rank), other < rank))
            free.remove(nearest)
            chosen.append(nearest)
    return chosen


def _beside(order: Sequence[Direction], others: Mapping[str, Sequence[int]]) -> list[Direction | None]:
    """For each direction another of the same matrix, in the order in which they are given."""
    left = {name: iter(ranks) for name, ranks in others.items()}
    ranks = ((name, next(left[name], None)) for name, _ in order)
    return [None if rank is None else (name, int(rank)) for name, rank in ranks]


@dataclass(frozen=True)
class _Vectors:
    """Singular vectors of one W1, unit columns of one side (dim, n), at the ranks named; and σ v on the other side."""

    side: str
    ranks: list[int]
    unit: "torch.Tensor"
    other: "torch.Tensor"  # uᵀ W1 (n, in), or W1 v (out, n)

    def _columns(self, ranks: Sequence[int]) -> list[int]:
        return [self.ranks.index(rank) for rank in ranks]

    def scaled(self, ranks: Sequence[int], scale: float) -> "Rule":
        """W1 + (λ − 1) Σ σ u vᵀ."""
        at = self._columns(ranks)
        left, right = (
            (self.unit[:, at], self.other[at]) if self.side == "left" else (self.other[:, at], self.unit.T[at])
        )
        return lambda zero, one: one.addmm(left.to(one), right.to(one), alpha=scale - 1)

    def kept(self, ranks: Sequence[int]) -> "Rule":
        """W0 + PΔ."""
        return lambda zero, one: zero + self._projected(one - zero, ranks)

    def removed(self, ranks: Sequence[int]) -> "Rule":
        """W1 − PΔ."""
        return lambda zero, one: one - self._projected(one - zero, ranks)

    def _projected(self, delta: "torch.Tensor", ranks: Sequence[int]) -> "torch.Tensor":
        unit = self.unit[:, self._columns(ranks)].to(delta)
        return unit @ (unit.T @ delta) if self.side == "left" else (delta @ unit) @ unit.T


def _vectors(
    pair: "ModelPair", needed: Ranks, found: "Intruders", side: Any, where: "torch.device"
) -> dict[str, _Vectors]:
    """The vectors that are scaled, kept or removed; one matrix at a time is decomposed.

    Raises:
        InputError: the σ are not those that were found.
    """
    import torch

    from finetune_lens import device as devices
    from finetune_lens import linalg

    known = dict(zip(found.data.matrix.values, found.data.sigma.values, strict=True))
    strange = [name for name in needed if name not in pair.names()]
    vectors = {}
    for matrix in pair.matrices([name for name in needed if name not in strange]):
        ranks = needed[matrix.name]
        with devices.threads_for(matrix.order):
            dense = matrix.tuned_dense(torch.float64, where)
            basis = linalg.decompose(dense, sides=(side,), top=ranks[-1] + 1).side(side)
            unit = basis.vectors[:, ranks]
            other = unit.T @ dense if side == "left" else dense @ unit
        sigma = basis.values[ranks].cpu().numpy()
        if np.abs(sigma - known[matrix.name][ranks]).max() > SAME_SIGMA * float(basis.values[0]):
            strange.append(matrix.name)
        vectors[matrix.name] = _Vectors(side, ranks, unit.cpu(), other.cpu())
    if strange:
        raise InputError(
            f"the intruders given (`found`) are those of another pair: {strange[0]} has other singular values here"
        )
    return vectors


def _doubling(count: int) -> list[int]:
    """1, 2, 4, … and the count itself."""
    return [*(1 << i for i in range((count - 1).bit_length())), count] if count else []


def _points(
    plan: _Plan, vectors: dict[str, _Vectors], scales: Sequence[float], counts: Sequence[int], names: Sequence[str]
) -> "dict[tuple, Gamma]":
    """What is measured, in an order in which few weights change from one to the next."""
    tuned = dict.fromkeys(names, 1.0)

    def partly(part: str) -> "dict[tuple, Gamma]":
        found = {}
        for kind, directions in plan.ordered.items():
            for count in counts:
                ranks: Ranks = {}
                for name, rank in filter(None, directions[:count]):
                    ranks.setdefault(name, []).append(rank)
                rules = {
                    n: vectors[n].kept(chosen) if part == "keep" else vectors[n].removed(chosen)
                    for n, chosen in ranks.items()
                }
                found[part, kind, count] = rules if part == "keep" else tuned | rules
        return found

    points: dict[tuple, Gamma] = {("base",): 0.0} | partly("keep") | {("tuned",): 1.0}
    for arm, ranks in plan.arms.items():
        for scale in scales if ranks else ():
            rules = {name: vectors[name].scaled(chosen, scale) for name, chosen in ranks.items()}
            points["scale", arm, scale] = tuned | rules
    return points | partly("remove")


def _measured(
    points: "dict[tuple, Gamma]",
    hybrid: "Hybrid",
    examples: "dict[str, Examples]",
    batch_size: int | None,
    store: Any,
    progress: bool,
) -> dict[tuple, np.ndarray]:
    """Of each point the scores of all examples of all files, (metric, example)."""
    from tqdm.auto import tqdm

    from finetune_lens.evaluation import METRICS, measure

    found = {}
    with hybrid:
        for key, gamma in tqdm(points.items(), desc="models", unit="", disable=not progress, dynamic_ncols=True):
            name = " ".join(map(str, key))
            row = store.get(name) if store else None
            if row is None:
                model = hybrid.hold(gamma)
                scores = [measure(model, e, batch_size=batch_size) for e in examples.values()]
                row = {metric: np.concatenate([s.metric(metric) for s in scores]) for metric in METRICS}
                if store:
                    store.put(name, row)
            found[key] = np.stack([row[metric] for metric in METRICS])
    return found


def _store(
    partial: Path | None, pair: "ModelPair", hybrid: "Hybrid", examples: "dict[str, Examples]", plan: _Plan
) -> Any:
    from finetune_lens.stream import Store

    if partial is None or not pair.fingerprint:
        return None
    facts = {
        "analysis": "intruder_scaling",
        "arms": plan.arms,
        "ordered": plan.ordered,
        "model": hybrid.model.describe(),
        "config": str(pair.config),
        "examples": {name: e.identity() for name, e in examples.items()},
    }
    return Store(partial, pair.fingerprint, facts)


def _dataset(
    measured: dict[tuple, np.ndarray],
    plan: _Plan,
    scales: Sequence[float],
    counts: Sequence[int],
    found: "Intruders",
    examples: "dict[str, Examples]",
) -> "xr.Dataset":
    import xarray as xr

    from finetune_lens.evaluation import METRICS

    tuned = measured["tuned",]
    nothing = np.full_like(tuned, np.nan)  # where there is nothing to scale, nothing was measured
    scores = [
        [(tuned if scale == 1 else measured["scale", arm, scale]) if plan.arms[arm] else nothing for scale in scales]
        for arm in ARMS
    ]
    names = [str(name) for name in found.data.matrix.values]
    slots = max((len(ranks) for ranks in plan.arms["intruder"].values()), default=0)
    rank = np.zeros((len(ARMS), len(names), slots), int)
    for a, arm in enumerate(ARMS):
        for m, name in enumerate(names):
            chosen = plan.arms[arm].get(name, [])
            rank[a, m, : len(chosen)] = np.array(chosen, int) + 1
    sigma = np.where(rank > 0, np.take_along_axis(found.data.sigma.values[None], np.maximum(rank, 1) - 1, 2), np.nan)
    files = np.repeat(list(examples), [len(e) for e in examples.values()])
    data = {
        "base_score": (("metric", "example"), measured["base",]),
        "tuned_score": (("metric", "example"), tuned),
        "score": (("arm", "scale", "metric", "example"), np.array(scores)),
        "rank": (("arm", "matrix", "vector"), rank),
        "sigma": (("arm", "matrix", "vector"), sigma),
        "out": ("matrix", found.data["out"].values),
        "in": ("matrix", found.data["in"].values),
    }
    coordinates = {
        "metric": list(METRICS),
        "arm": list(ARMS),
        "scale": list(scales),
        "file": ("example", files.astype(object)),
        "id": ("example", np.array([p.id for e in examples.values() for p in e.prompts], dtype=object)),
        "matrix": np.array(names, dtype=object),
        "layer": ("matrix", found.data.layer.values),
        "component": ("matrix", found.data.component.values),
    }
    if counts:
        kinds = list(plan.ordered)
        data["recovered"] = (
            ("part", "kind", "count", "metric", "example"),
            np.array([[[measured[part, kind, count] for count in counts] for kind in kinds] for part in PARTS]),
        )
        moved = [[sum(d is not None for d in plan.ordered[kind][:count]) for count in counts] for kind in kinds]
        data["moved"] = (("kind", "count"), np.array(moved))
        coordinates |= {"part": list(PARTS), "kind": kinds, "count": list(counts)}
    return xr.Dataset(data, coordinates)


def _record(hybrid: "Hybrid", examples: "dict[str, Examples]", plan: _Plan) -> dict[str, Any]:
    from finetune_lens.hooked.effects import describe_prompts

    return {
        "model": hybrid.model.describe(),
        "prompts": {name: describe_prompts(e.prompts) for name, e in examples.items()},
        "objectives": {name: e.objective for name, e in examples.items()},
        "notes": [*hybrid.notes, *plan.notes],
    }
