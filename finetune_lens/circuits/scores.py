"""Scores of circuits: which heads are kept in each run that an evaluation needs, and what those runs score."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.circuits.circuit import Circuit

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel
    from finetune_lens.hooked.grid import Aligned


@dataclass(frozen=True)
class Layout:
    """A circuit on the slots (positions) of all circuits together.

    Attributes:
        members: (group, slot, layer, head).
        shape: (slot, layer, head).
        knockouts: name → K, indices of members.
        random: (draw, slot, layer, head).
    """

    members: list[tuple[str, int, int, int]]
    shape: tuple[int, int, int]
    columns: list[Any]  # by slot, as `Place` takes them
    knockouts: dict[str, tuple[int, ...]]
    random: np.ndarray

    @property
    def groups(self) -> dict[str, list[int]]:
        """Name → its members."""
        found: dict[str, list[int]] = {}
        for index, (group, *_) in enumerate(self.members):
            found.setdefault(group, []).append(index)
        return found

    def kept(self, without: Sequence[int] = ()) -> np.ndarray:
        """(slot, layer, head): the circuit less some members, wherever else they are listed at that position."""
        gone = np.zeros(self.shape, bool)
        kept = np.zeros(self.shape, bool)
        for index, (_, *place) in enumerate(self.members):
            kept[tuple(place)] = True
            gone[tuple(place)] |= index in without
        return kept & ~gone

    def places(self, members: Sequence[int]) -> list[Any]:
        """What the whole model loses with these members."""
        from finetune_lens.hooked.sweep import Place

        chosen = dict.fromkeys(self.members[index][1:] for index in members)
        return [Place("z", layer, head, self.columns[slot]) for slot, layer, head in chosen]


def lay_out(
    circuits: Mapping[str, Circuit], where: "Aligned", model: "HookedModel", random: int, subsets: int, seed: int
) -> dict[str, Layout]:
    from finetune_lens.hooked.grid import whole_number

    def known(position: int | str) -> int | str:
        number = whole_number(position)
        return position if number is None else number

    positions = list(dict.fromkeys(known(g.position) for c in circuits.values() for g in c.groups.values()))
    columns = [tuple(where.each(position).tolist()) for position in positions]
    shape = (len(positions), model.layers, model.heads)
    layouts = {}
    for name, circuit in circuits.items():
        members = [
            (group, positions.index(known(g.position)), layer, head)
            for group, g in circuit.groups.items()
            for layer, head in g.heads
        ]
        layout = Layout(members, shape, columns, {}, np.zeros((random, *shape), bool))
        layout.knockouts.update((f"group {group}", tuple(its)) for group, its in layout.groups.items())
        generator = np.random.default_rng([seed, 0])
        for number in range(1, subsets + 1):
            chosen: np.ndarray = np.zeros(0, int)
            while not len(chosen):
                chosen = np.flatnonzero(generator.integers(2, size=len(members)))
            layout.knockouts[f"random {number}"] = tuple(chosen.tolist())
        generator = np.random.default_rng([seed, 1])
        counts = layout.kept().sum((1, 2))
        for draw in layout.random:
            for slot in np.flatnonzero(counts):
                chosen = generator.choice(draw[slot].size, counts[slot], replace=False)
                draw[slot].reshape(-1)[chosen] = True
        layouts[name] = layout
    return layouts


class Measured:
    """All circuits in one model: every score by circuit, (…, example)."""

    def __init__(
        self, name: str, model: "HookedModel", *, where: "Aligned", averaged: Any, layouts: dict[str, Layout],
        metric: str, minimality: bool, partners: float, threshold: float, batch_size: int | None, progress: bool,
        partial: Path | None,
    ):  # fmt: skip
        from finetune_lens.hooked.ablation import knock_out, mean_z
        from finetune_lens.hooked.sweep import hash_of

        self.name, self.model, self.prompts = name, model, where.clean
        self.layouts, self.metric = layouts, metric
        self.means = mean_z(model, averaged, batch_size=batch_size)
        facts = model.describe() | {"adapted": model.adapted, "reference": hash_of(averaged)}
        self.running: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        self.running["partial"] = partial if model.fingerprint else None
        self.facts = facts
        self.deviation, self.notes = 0.0, []

        first = {
            circuit: [
                layout.kept(),
                *layout.random,
                *(layout.kept(k) for k in layout.knockouts.values()),
                *(layout.kept(pair) for pair in (_pairs(layout) if minimality else [])),
            ]
            for circuit, layout in layouts.items()
        }
        scored = self._scored("first", first)
        self.values: dict[str, dict[str, np.ndarray]] = {}
        pairs = {}
        for circuit, layout in layouts.items():
            cuts = np.cumsum([1, len(layout.random), len(layout.knockouts)])
            alone, random, without, pairs[circuit] = np.split(scored[circuit], cuts)
            self.values[circuit] = {"alone": alone[0], "random": random, "without": without}

        sets = [layout.places(k) for layout in layouts.values() for k in layout.knockouts.values()]
        swept = knock_out(
            model, self.prompts, self.means, sets, label=f"{name}: knock-outs",
            arguments=facts | {"analysis": f"circuit-evaluation-{name}-knockouts"}, **self.running,
        )  # fmt: skip
        self._note(swept)
        self.full = swept.recipient[metric]
        effects = np.split(swept.effects[metric], np.cumsum([len(la.knockouts) for la in layouts.values()])[:-1])
        for circuit, effect in zip(layouts, effects, strict=True):
            self.values[circuit]["model_without"] = self.full + effect
        if minimality:
            self._judge(pairs, partners, threshold)

    def _scored(self, phase: str, kept: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        """circuit → (kept, example)."""
        from finetune_lens.hooked.ablation import keep_only

        many = len(self.prompts)
        columns = np.stack([np.broadcast_to(c, many) for c in next(iter(self.layouts.values())).columns])
        stacked = np.stack([one for some in kept.values() for one in some])
        facts = self.facts | {"analysis": f"circuit-evaluation-{self.name}-{phase}"}
        found = keep_only(
            self.model, self.prompts, self.means, columns, stacked, metric=self.metric,
            label=f"{self.name}: circuits, {phase} round", arguments=facts, **self.running,
        )  # fmt: skip
        self._note(found)
        self.nothing = found.nothing
        return dict(zip(kept, np.split(found.values, np.cumsum([len(s) for s in kept.values()])[:-1]), strict=True))

    def _note(self, found: Any) -> None:
        self.deviation = max(self.deviation, found.deviation)
        self.notes += [note for note in found.notes if note not in self.notes]

    def _judge(self, pairs: dict[str, np.ndarray], partners: float, threshold: float) -> None:
        """Minimality of every head, and the circuits without those that fail."""
        second: dict[str, list[np.ndarray]] = {}
        for circuit, layout in self.layouts.items():
            chosen = _partners(layout, dict(zip(_pairs(layout), pairs[circuit].mean(1), strict=True)), partners)
            sets = [k for v, its in enumerate(chosen) for k in (its, (*its, v))]
            second[circuit] = [layout.kept(k) for k in sets]
            self.values[circuit]["partner"] = np.array([[w in its for w in range(len(chosen))] for its in chosen])
        third = {}
        for circuit, found in self._scored("second", second).items():
            held, dropped = found[::2], found[1::2]
            before, after = held.mean(1), dropped.mean(1)
            # Of a positive F, the criterion as published; where nothing is left on either side it cannot be judged.
            needed = before - after >= threshold * np.abs(after)
            self.values[circuit] |= {"held": held, "dropped": dropped, "needed": needed}
            third[circuit] = [self.layouts[circuit].kept(np.flatnonzero(~needed))]
        for circuit, found in self._scored("third", third).items():
            self.values[circuit]["pruned"] = found[0]


def _pairs(layout: Layout) -> list[tuple[int, ...]]:
    """Every member, and every two of one group."""
    singles = [(v,) for v in range(len(layout.members))]
    return singles + [pair for its in layout.groups.values() for pair in combinations(its, 2)]


def _partners(layout: Layout, score: Mapping[tuple[int, ...], float], share: float) -> list[tuple[int, ...]]:
    """K of each member: those of its group whose loss makes its own hurt most."""
    chosen = []
    for its in layout.groups.values():
        for v in its:
            drop = {w: score[(w,)] - score[(min(v, w), max(v, w))] for w in its if w != v}
            ranked = sorted((w for w in drop if drop[w] > 0), key=lambda w: -drop[w])
            chosen.append(tuple(ranked[: math.ceil(share * len(its))]))
    return chosen
