"""The models that interpolation looks at: γ of every weight, and their evaluation, each different model once."""

import hashlib
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from finetune_lens.evaluation import METRICS, Examples, measure
from finetune_lens.hybrid import Hybrid, Weight
from finetune_lens.stream import Store

ATTENTION = ("q", "k", "v", "qkv", "o")
BELOW = re.compile(r"embed|project_in")  # of names outside the blocks: embeddings, their norm, OPT's projection


@dataclass(frozen=True)
class Point:
    """One model to evaluate: γ of every weight; and where it is perturbed, the layer and the draw."""

    gamma: Mapping[str, float]
    noise: tuple[int, int] | None = None


@dataclass(frozen=True)
class Grid:
    """Points with one or more labelled axes, the last axis fastest."""

    axes: dict[str, list[Any]]
    points: list[Point]


def along(hybrid: Hybrid, alphas: Sequence[float], axis: str) -> Grid:
    """γ = α everywhere."""
    return Grid({axis: list(alphas)}, [Point(_gamma(hybrid, alpha)) for alpha in alphas])


def scaled(hybrid: Hybrid, by: str, alphas: list[float]) -> Grid:
    """γ = α in one group, and 0 or 1 in the rest."""
    groups, contexts = grouped(hybrid, by), {"base": 0.0, "tuned": 1.0}
    points = [
        Point(_gamma(hybrid, rest, names, alpha))
        for names in groups.values()
        for rest in contexts.values()
        for alpha in alphas
    ]
    return Grid({"group": list(groups), "context": list(contexts), "group_alpha": alphas}, points)


def split(hybrid: Hybrid) -> Grid:
    """The tuned model from a layer on ("above"), and below it ("below")."""
    cuts = list(range(hybrid.model.layers + 1))
    points = []
    for side in ("above", "below"):
        for cut in cuts:
            lower = [n for n, w in hybrid.weights.items() if (is_lower(w) if w.layer is None else w.layer < cut)]
            upper = [n for n in hybrid.weights if n not in set(lower)]
            points.append(Point(_gamma(hybrid, 0.0, upper if side == "above" else lower, 1.0)))
    return Grid({"side": ["above", "below"], "cut": cuts}, points)


def reset(hybrid: Hybrid, axis: str, what: Mapping[Any, Collection[str]]) -> Grid:
    """The tuned model with some weights back at the base."""
    return Grid({axis: list(what)}, [Point(_gamma(hybrid, 1.0, names, 0.0)) for names in what.values()])


def perturbed(hybrid: Hybrid, alphas: list[float], draws: int) -> Grid:
    """Every layer perturbed, at every α with the same draws."""
    axes = {"sharpness_alpha": alphas, "layer": list(range(hybrid.model.layers)), "draw": list(range(draws))}
    points = []
    for alpha in alphas:
        gamma = _gamma(hybrid, alpha)
        points += [Point(gamma, (layer, draw)) for layer in axes["layer"] for draw in axes["draw"]]
    return Grid(axes, points)


def grouped(hybrid: Hybrid, by: str) -> dict[str, list[str]]:
    """Names of the weights of each group; layers from below, what lies outside the blocks last."""
    found: dict[str, list[str]] = {}
    for weight in sorted(hybrid.weights.values(), key=lambda w: np.inf if w.layer is None else w.layer):
        found.setdefault(group_of(weight, by), []).append(weight.name)
    return found


def group_of(weight: Weight, by: str) -> str:
    if by == "matrix":
        return weight.name
    if by == "component":
        return weight.component
    return "outside" if weight.layer is None else str(weight.layer)


def is_lower(weight: Weight) -> bool:
    """Outside the blocks, and before them."""
    if weight.layer is not None or weight.component == "unembed":
        return False
    return weight.component in ("embed", "pos") or BELOW.search(weight.name) is not None


def half(hybrid: Hybrid, random: np.random.Generator) -> set[str]:
    """Names of half of the parameter kinds of every block: of its attention matrices, its other matrices, its vectors.

    Where their number is odd, half of the blocks get one more: of three, two in some blocks and one in the others.
    """
    blocks: dict[str, dict[int, dict[str, list[str]]]] = {}
    for weight in hybrid.weights.values():
        if weight.layer is None:
            continue
        if weight.base.is_matrix:
            sort, kind = "attention" if weight.component in ATTENTION else "mlp", weight.component
        else:
            sort, kind = "vectors", re.split(rf"(?:^|\.){weight.layer}\.", weight.name, maxsplit=1)[-1]
        blocks.setdefault(sort, {}).setdefault(weight.layer, {}).setdefault(kind, []).append(weight.name)
    chosen: set[str] = set()
    for layers in blocks.values():
        odd = [layer for layer, kinds in layers.items() if len(kinds) % 2]
        more = (len(odd) + int(random.integers(2))) // 2  # of an odd number of blocks one half or the other is larger
        larger = set(random.choice(odd, more, replace=False).tolist()) if odd else set()
        for layer, kinds in layers.items():
            for at in random.permutation(len(kinds))[: len(kinds) // 2 + (layer in larger)]:
                chosen.update(list(kinds.values())[at])
    return chosen


def _gamma(hybrid: Hybrid, rest: float, names: Collection[str] = (), value: float = 0.0) -> dict[str, float]:
    return dict.fromkeys(hybrid.weights, rest) | dict.fromkeys(names, value)


class Evaluator:
    """Evaluates points: each different model once.

    Args:
        moving: names of the weights whose update is not 0; γ of the others decides nothing.
        rho: size of the perturbation.
        seed: of its draws.
    """

    def __init__(
        self,
        hybrid: Hybrid,
        examples: dict[str, Examples],
        moving: Collection[str],
        *,
        batch_size: int | None,
        rho: float,
        seed: int,
    ):
        self.hybrid, self.examples, self.moving = hybrid, examples, sorted(moving)
        self.batch_size, self.rho, self.seed = batch_size, rho, seed

    def key(self, point: Point) -> str:
        """What decides the model: γ where Δ ≠ 0, and the noise."""
        noise = point.noise and (self.rho, self.seed, *point.noise)
        return hashlib.sha256(repr(([point.gamma[n] for n in self.moving], noise)).encode()).hexdigest()

    def evaluate(self, points: Sequence[Point], *, progress: bool, partial: Path | None) -> list[np.ndarray]:
        """(metric, file, example) of every point; finished ones are kept in `partial`, and read from there."""
        known = partial is not None and self.hybrid.pair.fingerprint
        store = Store(partial, self.hybrid.pair.fingerprint, self._facts()) if known else None
        keys = [self.key(point) for point in points]
        different: dict[str, Point] = {}
        for key, point in zip(keys, points, strict=True):
            different.setdefault(key, point)
        found = {key: row["scores"] for key in different if store and (row := store.get(key)) is not None}
        if progress:
            kept = f", {len(found)} of them kept from before" if found else ""
            examples = sum(map(len, self.examples.values()))
            tqdm.write(f"{len(different)} evaluations of {examples} examples{kept}", file=sys.stderr)
        bar = tqdm(
            total=len(different), initial=len(found), desc="evaluations", unit="", disable=not progress,
            dynamic_ncols=True,
        )  # fmt: skip
        with self.hybrid, bar:
            for key, point in different.items():
                if key in found:
                    continue
                found[key] = self._scores(point)
                if store:
                    store.put(key, {"scores": found[key]})
                bar.update()
        return [found[key] for key in keys]

    def _scores(self, point: Point) -> np.ndarray:
        """(metric, file, example), NaN behind the last example of a shorter file."""
        model, noise = self.hybrid.hold(point.gamma), nullcontext()
        if point.noise is not None:
            names = sorted(self.hybrid.names(layers=[point.noise[0]]))  # whatever the order in the file
            noise = self.hybrid.perturbed(names, self.rho, noise_of(self.seed, *point.noise))
        scores = np.full((len(METRICS), len(self.examples), max(map(len, self.examples.values()))), np.nan)
        with noise:
            for file, examples in enumerate(self.examples.values()):
                found = measure(model, examples, batch_size=self.batch_size)
                for row, metric in enumerate(METRICS):
                    scores[row, file, : len(examples)] = np.where(np.isnan(found.loss), np.nan, found.metric(metric))
        return scores

    def _facts(self) -> dict[str, Any]:
        """What decides the numbers beside the two models' files."""
        model = self.hybrid.model
        facts = {"analysis": "interpolation", "model": model.describe(), "config": model.module.config.to_dict()}
        return facts | {"examples": [e.identity() for e in self.examples.values()]}


def noise_of(seed: int, layer: int, draw: int) -> torch.Generator:
    """A stream for each layer and draw, whatever α is."""
    state = np.random.SeedSequence([seed, layer, draw]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
