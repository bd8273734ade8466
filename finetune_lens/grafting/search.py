"""The scores of a graft and their optimisation, and the masks beside it. One pass over a weight at a time.

Elementwise work goes block by block, so that what is between two large tensors stays in the processor's cache: a step
beside its forward and backward pass reads θ0, θ1, S and the gradient once each.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune_lens.evaluation import Examples, add_gradient, measure
from finetune_lens.files import whole_file
from finetune_lens.hybrid import Hybrid, Rule
from finetune_lens.linalg import generator
from finetune_lens.masks import Mask, size

BIAS = 10.0  # b of the paper
BLOCK = 1 << 17  # entries worked on at once
SLOPE = 1e-4  # σ′ where the scores start, about


@dataclass
class Search:
    """Scores S of γ = γ_b + (1 − 2γ_b)·σ(S − b), over the weights `names` of a hybrid.

    Attributes:
        start: the base mask γ_b.
        scores: S by weight, (out, in) float32, drawn from U[0, 1].
    """

    hybrid: Hybrid
    names: list[str]
    start: Mask
    seed: int = 0
    bias: float = BIAS
    scores: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            live = self.hybrid.weights[name].live.read()
            drawn = torch.rand(live.shape, generator=generator(repr((self.seed, "scores", name))))
            self.scores[name] = _stored_like(live).copy_(drawn)

    def soft(self) -> dict[str, Rule]:
        """θ0 + γ⊙Δ by weight."""
        return {name: self._softly(name) for name in self.names}

    def _softly(self, name: str) -> Rule:
        def rule(zero: Tensor, one: Tensor) -> Tensor:
            theta = torch.empty_like(zero)
            for z, o, s, b, t in blocks(zero, one, self.scores[name], self.start[name], theta):
                gamma = s.sub(self.bias).sigmoid_()
                torch.lerp(z, o, torch.where(b, 1 - gamma, gamma).to(z), out=t)
            return theta

        return rule

    def rounded(self) -> dict[str, Tensor]:
        """γ rounded to 0 and 1, by weight."""
        return {name: self.start[name] ^ (self.scores[name] > self.bias) for name in self.names}

    def learn(
        self, train: Examples, index: Tensor, rate: float | None, *, step: float, batch_size: int | None = None
    ) -> tuple[float, float]:
        """One update of the scores by the mean loss over `index`. Returns that loss, and the learning rate.

        Without a rate it is step / (SLOPE·‖g⊙Δ‖), of this gradient.
        """
        self.hybrid.hold(self.soft())
        with gradients(self.hybrid, self.names):
            loss, _ = add_gradient(self.hybrid.model, train, index, batch_size=batch_size)
            if rate is None:
                norm = self.update_norm()
                rate = step / (SLOPE * norm) if norm else 0.0
            self.descend(rate)
        return loss, rate

    def update_norm(self) -> float:
        """‖g⊙Δ‖ over all entries."""
        total = 0.0
        for name, gradient, zero, one in self._gradients():
            for g, z, o in blocks(gradient, zero, one):
                total += float((o - z).mul_(g).square_().sum(dtype=torch.float64))
            del gradient, zero, one, name
        return total**0.5

    def descend(self, rate: float) -> None:
        """S ← S − rate·(1 − 2γ_b)⊙(g⊙Δ)⊙σ(1 − σ), with the gradient that is there."""
        for name, gradient, zero, one in self._gradients():
            for g, z, o, s, b in blocks(gradient, zero, one, self.scores[name], self.start[name]):
                gate = s.sub(self.bias).sigmoid_()
                change = (o - z).mul_(g).mul_(rate).to(s.dtype)
                change.mul_(torch.addcmul(gate, gate, gate, value=-1))
                s.add_(torch.where(b, change, -change))

    def _gradients(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        for name in self.names:
            gradient = self.hybrid.gradient(name)
            if gradient is not None:  # nothing reached it: its scores stay
                wide = torch.promote_types(gradient.dtype, torch.float32)
                yield name, gradient.to(wide), *self.hybrid.weights[name].ends(wide, gradient.device)


@dataclass
class Found:
    """What a search left.

    Attributes:
        mask: the best rounded mask, by weight.
        history: by step from 0, which is the base mask: loss (soft, on the step's examples; NaN at 0), metric and loss
            of the rounded mask on the selection examples, entries.
        best: the step of `mask`.
        rate: of the score update.
    """

    mask: dict[str, Tensor]
    history: dict[str, list[float]]
    best: int
    rate: float


def search(
    hybrid: Hybrid,
    start: Mask,
    train: Examples,
    selection: Examples,
    *,
    metric: str,
    step: float,
    rate: float | None = None,
    steps: int,
    examples: int,
    batch_size: int | None,
    seed: int,
    checkpoint: Path | None = None,
    tick: Callable[[str], None] = lambda words: None,
) -> Found:
    """Optimise the scores, look at the rounded mask after every step, and keep the best.

    Better is a higher mean metric on `selection`, then a smaller loss there, then fewer entries.

    Args:
        step: how far the first update moves the scores, in the norm ‖S‖, if σ′ is 1e-4 everywhere: the learning rate is
            step / (1e-4·‖g⊙Δ‖) with the first step's gradient, and the same in every step. A `rate` overrides it.
        examples: drawn from `train` for each step.
        checkpoint: file of this search alone; it continues after the last finished step that lies there.

    Memory: beside the model, a gradient and S of its size, and two Boolean masks.
    """
    names = list(start)
    state = Search(hybrid, names, start, seed)
    history: dict[str, list[float]] = {"train_loss": [], "metric": [], "loss": [], "entries": []}
    best: tuple[Any, ...] = ()
    kept: dict[str, Tensor] = {}

    def look(loss: float) -> None:
        nonlocal best, kept
        mask = state.rounded()
        scores = measure(hybrid.hold(mask), selection, batch_size=batch_size)
        entries = size(mask)
        rank = float(scores.metric(metric).mean()), -float(scores.loss.mean()), -entries
        if not best or rank > best[1:]:
            best, kept = (len(history["metric"]), *rank), mask
        for key, value in zip(history, (loss, rank[0], -rank[1], entries), strict=True):
            history[key].append(float(value))

    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=hybrid.model.device, mmap=True)
        for name in names:
            state.scores[name].copy_(saved["scores"][name])
        history, rate, best = saved["history"], saved["rate"], tuple(saved["best"])
        kept = {name: part.clone() for name, part in saved["mask"].items()}
    with hybrid:
        if not history["metric"]:
            look(float("nan"))
        tick(f"step {len(history['metric']) - 1}")
        for number in range(len(history["metric"]), steps + 1):
            index = draw(len(train), examples, seed, number)
            loss, rate = state.learn(train, index, rate, step=step, batch_size=batch_size)
            look(loss)
            tick(f"step {number}: {history['metric'][-1]:.3g} with {int(history['entries'][-1])} entries")
            if checkpoint is not None:
                saved = {"scores": state.scores, "history": history, "rate": rate, "best": best, "mask": kept}
                with whole_file(checkpoint) as path:
                    torch.save(saved, path)
    return Found(kept, history, best[0], float(rate or 0.0))


class gradients:
    """Within: the parameters of these weights have gradients, which are gone afterwards."""

    def __init__(self, hybrid: Hybrid, names: Sequence[str]):
        found = {id(p): p for p in (hybrid.parameter_of(hybrid.weights[name]) for name in names)}
        self.parameters = list(found.values())

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for parameter in self.parameters:
            parameter.grad = None
            parameter.requires_grad_(False)


def draw(count: int, examples: int, seed: int, step: int) -> Tensor:
    """Which of the training examples a step sees: all where there are no more, else drawn without replacement."""
    if examples >= count:
        return torch.arange(count)
    chosen = np.random.default_rng([seed, step]).choice(count, examples, replace=False)
    return torch.from_numpy(np.sort(chosen))


Values = Callable[[], Iterable[tuple[str, Tensor]]]


def magnitudes(hybrid: Hybrid, names: Sequence[str]) -> Values:
    """|Δ| by weight."""
    return _of_ends(hybrid, names, lambda zero, one: (one - zero).abs_())


def movements(hybrid: Hybrid, names: Sequence[str]) -> Values:
    """How far entries have moved away from 0: (θ1² − θ0²)/2, negative ones as 0.

    The score of movement pruning (Sanh et al. 2020, arXiv 2005.07683, §3), −Σ_t (∂L/∂θ)·θ, of gradient descent at a
    small rate: −rate·∂L/∂θ is the step, so that the sum is ∫ θ dθ.
    """
    return _of_ends(hybrid, names, lambda zero, one: (one.square() - zero.square()).mul_(0.5).clamp_min_(0))


def _of_ends(hybrid: Hybrid, names: Sequence[str], of: Callable[[Tensor, Tensor], Tensor]) -> Values:
    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, of(*hybrid.weights[name].ends(torch.float32, hybrid.model.device)).float()

    return stream


def first_order(hybrid: Hybrid, names: Sequence[str]) -> Values:
    """|g⊙Δ| by weight, with the gradients that are there."""

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            zero, one = hybrid.weights[name].ends(torch.float32, hybrid.model.device)
            gradient = hybrid.gradient(name)
            yield name, (one - zero).mul_(0 if gradient is None else gradient).abs_().float()

    return stream


def at_random(hybrid: Hybrid, names: Sequence[str], *seeds: int) -> Values:
    """Numbers of which any are as likely as any to be the largest."""

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            drawn = generator(repr((seeds[0], "mask", *seeds[1:], name)))
            yield name, torch.rand(hybrid.weights[name].base.shape, generator=drawn).to(hybrid.model.device)

    return stream


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of tensors of one shape, of about BLOCK entries, along the axis that memory runs through last."""
    lead = tensors[0]
    if lead.ndim == 2 and lead.stride(0) < lead.stride(1):
        tensors = tuple(t.T for t in tensors)
    rows = max(1, BLOCK * len(tensors[0]) // max(1, tensors[0].numel()))
    yield from zip(*(t.split(rows) for t in tensors), strict=True)


def _stored_like(tensor: Tensor) -> Tensor:
    """An empty float32 tensor of that shape whose axes lie in memory in the same order."""
    if tensor.ndim == 2 and tensor.stride(0) < tensor.stride(1):
        return torch.empty(tensor.shape[::-1], device=tensor.device).T
    return torch.empty(tensor.shape, device=tensor.device)
