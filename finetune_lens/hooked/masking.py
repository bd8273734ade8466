"""A mask a head: what some heads give at one position is taken, wholly or in part, from the run on another prompt.

    z ← m·z + (1 − m)·z_source        for each head of a group, at one position of each example

The source is the other run's own corresponding position. With m = 1 the run is as it was, with m = 0 it is patched.
Masks are learnt as published for DCM (Prakash et al. 2024, arXiv 2402.14811, §4): Adam on −mean target logit +
λ·Σ(1 − m), clamped to [0, 1] before each step; the clamped and rounded mask is judged by the accuracy of the target on
other examples every 4 batches, and the best is kept.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from finetune_lens.errors import InputError
from finetune_lens.hooked.model import Edit, HookedModel
from finetune_lens.hooked.sites import site_name
from finetune_lens.metrics import score
from finetune_lens.prompts import Encoded

EVERY = 4  # batches from one judgement of the mask to the next
Head = tuple[int, int]  # layer, head


class MixedRuns:
    """A model's runs on prompts, with heads' z at one position of each example mixed with those of another run.

    Args:
        prompts, others: of which runs, and from which; answers and columns to read are those of `prompts`.
        columns, other_columns: (example,): the position of each example in `prompts` and in `others`.
        batch_size: examples a forward pass.

    Cost: one forward pass over `others`; memory: one vector an example and head of the model.
    """

    def __init__(
        self, model: HookedModel, prompts: Encoded, others: Encoded, columns: np.ndarray, other_columns: np.ndarray, *,
        batch_size: int,
    ):  # fmt: skip
        self.model, self.prompts, self.batch_size = model, prompts, batch_size
        self.columns = torch.from_numpy(columns.copy())
        model.require(["z"], range(model.layers))
        names = [site_name("z", layer) for layer in range(model.layers)]
        parts: list[list[Tensor]] = [[] for _ in names]
        for rows in self.batches(np.arange(len(others))):
            cache = model.run(
                others.ids[rows], mask=others.mask[rows], capture=names, logits_at=others.read_at[rows, :1]
            ).cache
            at = torch.from_numpy(other_columns[rows])
            for part, name in zip(parts, names, strict=True):
                part.append(cache[name][torch.arange(len(rows)), at.to(cache[name].device)])
        self.source: list[Float[Tensor, "example head d_head"]] = [torch.cat(part) for part in parts]

    def batches(self, examples: np.ndarray) -> Iterator[np.ndarray]:
        """Some examples at a time, in their order."""
        return (examples[at : at + self.batch_size] for at in range(0, len(examples), self.batch_size))

    def logits(
        self, examples: np.ndarray, heads: Sequence[Head], mask: Float[Tensor, " head"]
    ) -> Float[Tensor, "example vocab"]:
        """What is said of the next token after each prompt; where `mask` requires a gradient, with its graph."""
        edits: list[Edit] = []
        layers = sorted({layer for layer, _ in heads})
        if layers and mask.requires_grad:  # the graph begins at the first mask
            edits.append((site_name("resid_pre", layers[0]), torch.Tensor.detach))
        for layer in layers:
            places = [n for n, head in enumerate(heads) if head[0] == layer]
            mix = functools.partial(
                self._mixed, examples=torch.from_numpy(examples), layer=layer, heads=[heads[n][1] for n in places],
                mask=mask[places],
            )  # fmt: skip
            edits.append((site_name("z", layer), mix))
        given = self.prompts
        run = self.model.run(
            given.ids[examples], mask=given.mask[examples], edits=edits, logits_at=given.read_at[examples, :1],
            gradients=mask.requires_grad,
        )  # fmt: skip
        return run.logits[:, 0]

    def _mixed(
        self, z: Float[Tensor, "example pos head d_head"], *, examples: Tensor, layer: int, heads: list[int],
        mask: Float[Tensor, " masked"],
    ) -> Float[Tensor, "example pos head d_head"]:  # fmt: skip
        rows = torch.arange(len(z), device=z.device)[:, None]
        at = rows, self.columns[examples].to(z.device)[:, None], torch.tensor(heads, device=z.device)
        source = self.source[layer].to(z.device)[examples.to(z.device)[:, None], at[2]]
        share = mask.to(z.device)[:, None]
        return z.index_put(at, (share * z[at] + (1 - share) * source).to(z.dtype))

    def targets(self, examples: np.ndarray, heads: Sequence[Head], mask: Tensor) -> Float[Tensor, " example"]:
        """The logit of each example's answer."""
        logits = self.logits(examples, heads, mask)
        answers = self.prompts.answers[examples, 0, :1].to(logits.device)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).gather(1, answers)[:, 0]

    def accuracy(self, examples: np.ndarray, patched: Sequence[Head]) -> np.ndarray:
        """(example,): 1 where the answer has the highest logit, with these heads wholly taken from the other run."""
        found = []
        mask = torch.zeros(len(patched), device=self.model.device)
        for rows in self.batches(examples):
            logits = self.logits(rows, patched, mask)[:, None]
            right = score(logits, self.prompts.answers[rows], self.prompts.wrongs[rows], only="accuracy")["accuracy"]
            found.append(right.cpu().numpy().astype(float))
        return np.concatenate(found)


@dataclass(frozen=True)
class Learnt:
    """A mask and how it came about.

    Attributes:
        mask: (head,) the best, clamped, not yet rounded.
        losses: (step,).
        validation: (step,) accuracy of the rounded mask after the step; NaN where it was not judged.
        best: the step (from 0) that left the best mask.
    """

    mask: np.ndarray
    losses: np.ndarray
    validation: np.ndarray
    best: int

    @property
    def patched(self) -> np.ndarray:
        """(head,): True where the mask rounds to 0."""
        return np.round(self.mask) == 0


def learn(
    runs: MixedRuns, heads: Sequence[Head], train: np.ndarray, validation: np.ndarray, *, rate: float, epochs: int,
    penalty: float, tick: Callable[[], None] = lambda: None,
) -> Learnt:  # fmt: skip
    """Which of the heads, patched, make the model answer as the other run's prompt asks for.

    Args:
        train, validation: which examples; batches come in this order in every epoch.
        rate: of Adam.
        penalty: λ, what a fully patched head costs, in logits of the target.
        tick: called after every step.

    Ties in accuracy go to the mask with more patched heads, then to the earlier. It is judged as published, after the
    first of every 4 batches of an epoch, and also after the last step.

    Raises:
        InputError: the target's logits are not finite.

    Cost: a step is one forward pass of a batch, and one backward as far as the first layer with a mask.
    """
    kind = torch.promote_types(runs.model.dtype, torch.float32)
    mask = torch.ones(len(heads), dtype=kind, device=runs.model.device, requires_grad=True)
    optimiser = torch.optim.Adam([mask], lr=rate)
    batches = list(runs.batches(train))
    losses, judged, best, kept = [], [], (-1.0, -1), (0, np.ones(len(heads)))
    with _frozen(runs.model.module):
        for step in range(epochs * len(batches)):
            number = step % len(batches)
            with torch.no_grad():
                mask.clamp_(0, 1)
            loss = -runs.targets(batches[number], heads, mask).mean() + penalty * (1 - mask).sum()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise InputError(
                    f"the loss is {losses[-1]} at step {step + 1}: {runs.model.name} gives logits that are not finite "
                    "on these prompts; load it in float32 (--dtype float32)"
                )
            (mask.grad,) = torch.autograd.grad(loss, mask)
            optimiser.step()
            judged.append(math.nan)
            if number % EVERY == 0 or step == epochs * len(batches) - 1:
                now = mask.detach().clamp(0, 1)
                patched = [head for head, m in zip(heads, now.round().tolist(), strict=True) if not m]
                judged[-1] = float(runs.accuracy(validation, patched).mean())
                if (judged[-1], len(patched)) > best:
                    best, kept = (judged[-1], len(patched)), (step, now.cpu().numpy().copy())
            tick()
    return Learnt(kept[1], np.array(losses), np.array(judged), kept[0])


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within: no parameter takes a gradient."""
    moving = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)
