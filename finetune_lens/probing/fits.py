"""Probes of every unit (site, or head of a site) and split, on both sides' activations, a batch of fits at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune_lens.errors import InputError
from finetune_lens.hooked.features import Features
from finetune_lens.linalg.probes import Probes, fit_logistic, fit_ridge

BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # of what fits that are computed together hold
SIDES = ("base", "tuned")
Unit = tuple[str, int | None]  # site and head


@dataclass(frozen=True)
class Task:
    """What is fitted and tested.

    Attributes:
        targets: (seed, example, target) class numbers or values: the labels, and those of the control task.
        train: (seed, example) True where fitted, False where tested.
        classes: how many; 0 for values.
    """

    targets: np.ndarray
    train: np.ndarray
    classes: int
    penalty: float

    def fit(self, x: Tensor, targets: Tensor, there: Tensor) -> Probes:
        if self.classes:
            return fit_logistic(x, targets, there, classes=self.classes, penalty=self.penalty)
        return fit_ridge(x, targets, there, penalty=self.penalty)

    def scores(self, probes: Probes, x: Tensor, targets: Tensor, there: Tensor) -> Tensor:
        """(fit, row, target): 1 right, 0 wrong; of values (y − ȳ)² − (y − ŷ)²."""
        if self.classes:
            return (probes.classify(x) == targets).to(torch.int8)
        rows = there[..., None].to(x)
        mean = (targets * rows).sum(1, keepdim=True) / rows.sum(1, keepdim=True)
        return (targets - mean).square() - (targets - probes(x)[..., 0]).square()


def fit_all(
    sides: Sequence[Features],
    units: Sequence[Unit],
    task: Task,
    device: torch.device,
    *,
    tick: Callable[[int], object],
) -> dict[str, np.ndarray]:
    """Fit every probe and score it on the held-out examples.

    Returns:
        score (trained_on, tested_on, unit, seed, example), centred_score and control_score (side, unit, seed, example),
        −1 or NaN outside the test part; converged (side, unit, target, seed); leaked_rows (side, unit, seed): share of
        the test rows that are equal to one of the training rows.
    """
    seeds, examples, targets = task.targets.shape
    empty = np.array(-1, np.int8) if task.classes else np.array(np.nan, np.float32)
    found = {"score": np.full((2, 2, len(units), seeds, examples), empty)}
    for name in ("centred_score", "control_score")[:targets]:
        found[name] = np.full((2, len(units), seeds, examples), empty)
    found["converged"] = np.zeros((2, len(units), targets, seeds), bool)
    found["leaked_rows"] = np.zeros((2, len(units), seeds))
    jobs = [(unit, seed) for unit in range(len(units)) for seed in range(seeds)]
    rows, width = int(task.train.sum(1).max()), _rows(sides[0], units[0]).shape[1]
    each = 8 * (4 * rows * (width + 2 * targets * max(task.classes, 1)) + 3 * min(rows, width) ** 2)
    size, start = max(1, BYTES.get(device.type, BYTES["cpu"]) // each), 0
    while start < len(jobs):
        some = jobs[start : start + size]
        try:
            _fit(sides, units, task, device, some, found)
        except torch.OutOfMemoryError:
            if len(some) == 1:
                raise
            torch.cuda.empty_cache()
            size = len(some) // 2
            continue
        start += len(some)
        tick(len(some))
    return found


def _rows(features: Features, unit: Unit) -> np.ndarray:
    """(row, feature) of a unit; heads that are not told apart lie side by side."""
    site, head = unit
    values = features.values(site)
    return values.reshape(len(values), -1) if head is None else values[:, head]


def _fit(
    sides: Sequence[Features],
    units: Sequence[Unit],
    task: Task,
    device: torch.device,
    jobs: Sequence[tuple[int, int]],
    found: dict[str, np.ndarray],
) -> None:
    """Some (unit, seed), on both sides; what was found is put where it belongs."""
    held = {(s, u): _loaded(sides[s], units[u], s, device) for s in range(2) for u in {unit for unit, _ in jobs}}
    prints = {place: _fingerprints(rows) for place, rows in held.items()}
    train, test = ([np.flatnonzero(part[seed]) for _, seed in jobs] for part in (task.train, ~task.train))
    fitted, tested = _padded(train, device), _padded(test, device)
    targets = torch.from_numpy(task.targets[[seed for _, seed in jobs]]).to(device)
    means = [
        torch.stack([held[s, u][at].double().mean(0, keepdim=True) for (u, _), at in zip(jobs, train, strict=True)])
        for s in range(2)
    ]
    for trained_on in range(2):
        probes = task.fit(*_taken(held, trained_on, jobs, targets, *fitted))
        for tested_on in range(2):
            rows = _taken(held, tested_on, jobs, targets, *tested)
            scores = task.scores(probes, *rows).cpu().numpy()
            places = {("score", trained_on, tested_on): scores[..., 0]}
            if trained_on == tested_on:
                if "control_score" in found:
                    places["control_score", trained_on] = scores[..., 1]
            else:
                centred = probes.moved(means[tested_on] - means[trained_on])
                places["centred_score", tested_on] = task.scores(centred, *rows)[..., 0].cpu().numpy()
            for (name, *sides_of), score in places.items():
                for job, (unit, seed) in enumerate(jobs):
                    found[name][*sides_of, unit, seed, test[job]] = score[job, : len(test[job])]
        for job, (unit, seed) in enumerate(jobs):
            found["converged"][trained_on, unit, :, seed] = probes.converged[job].cpu().numpy()
            seen = np.isin(*(prints[trained_on, unit][part[job]] for part in (test, train)))
            found["leaked_rows"][trained_on, unit, seed] = seen.mean()


def _loaded(features: Features, unit: Unit, side: int, device: torch.device) -> Tensor:
    rows = torch.from_numpy(np.ascontiguousarray(_rows(features, unit))).to(device)
    broken = (~torch.isfinite(rows)).any(1).nonzero()[:, 0].tolist()
    if broken:
        raise InputError(
            f"the {SIDES[side]} model's activations at {unit[0]} hold NaN or Inf in {len(broken)} of {len(rows)} "
            f"examples (first: number {broken[0] + 1}); a wider dtype (--dtype float32) may help"
        )
    return rows


def _padded(index: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """(fit, row) numbers of examples, filled up with 0, and which are there."""
    most = max(map(len, index))
    there = np.stack([np.arange(most) < len(one) for one in index])
    filled = np.stack([np.pad(one, (0, most - len(one))) for one in index])
    return torch.from_numpy(filled).to(device), torch.from_numpy(there).to(device)


def _taken(
    held: dict[tuple[int, int], Tensor],
    side: int,
    jobs: Sequence[tuple[int, int]],
    targets: Tensor,
    index: Tensor,
    there: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (fit, row, feature) in float64, targets (fit, row, target), and which rows are there."""
    x = torch.stack([held[side, unit][at].double() for (unit, _), at in zip(jobs, index, strict=True)])
    return x, targets.gather(1, index[..., None].expand(-1, -1, targets.shape[2])), there


def _fingerprints(rows: Tensor) -> np.ndarray:
    """(row,) a whole number; the same for rows of the same bits, and for others as good as never."""
    factors = torch.randint(2**62, (rows.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    return (rows.view(torch.int32).long() * factors.to(rows.device)).sum(1).cpu().numpy()
