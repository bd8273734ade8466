"""Attribution patching: what a patch would do, to first order in the difference of the activations.

    effect ≈ Σ (a_donor − a_recipient) · ∂metric/∂a,   the gradient taken at the recipient's run

(Nanda 2023; Syed et al. 2023, arXiv 2310.10348). The direction is that of the patch it estimates: the donor's
activation takes the recipient's place. With `steps`, the gradient is averaged along the straight line between the two
activations, layer by layer (integrated gradients, Sundararajan et al. 2017): the attributions of a whole layer then
sum to the effect of patching that layer whole.

Cost: two forward passes and one backward; with steps, layers × steps forward and backward passes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from finetune_lens.errors import InputError
from finetune_lens.hooked.sites import site_name
from finetune_lens.hooked.sweep import Patch, Place, Side, require_places
from finetune_lens.metrics import DIFFERENTIABLE, score


def attribute(
    recipient: Side,
    donor: Side,
    patches: Sequence[Patch],
    metric: str,
    *,
    steps: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """The estimated effect of each patch on each example: (patch, example); NaN where it does not exist.

    Args:
        metric: one that has a gradient.
        steps: points on the line between the activations; 0: the recipient's end alone.

    Raises:
        InputError: a metric without a gradient, sites that a model lacks.
    """
    from tqdm.auto import tqdm

    if metric not in DIFFERENTIABLE or metric == "kl":
        raise InputError(f"attribution needs a metric with a gradient at the recipient; found {metric!r}; expected one "
                         "of logit_diff, logprob, prob")  # fmt: skip
    require_places(recipient.model, donor.model, patches)
    examples = len(recipient.prompts)
    size = min(batch_size or 16, examples)
    valid = (recipient.prompts.prompt_columns & donor.prompts.prompt_columns).numpy()
    found = np.full((len(patches), examples), np.nan)
    for begin in tqdm(range(0, examples, size), desc="attribution", disable=not progress, dynamic_ncols=True):
        batch = np.arange(begin, min(begin + size, examples))
        maps = _maps(recipient, donor, patches, metric, batch, steps, torch.from_numpy(valid[batch]))
        for number, patch in enumerate(patches):
            exists = np.ones(len(batch), bool)
            for place in patch:
                if place.column is not None:
                    exists &= valid[batch, place.columns(batch)]
            sites = sorted({(place.kind, place.layer) for place in patch})
            total = sum(_read(maps[site], [p for p in patch if (p.kind, p.layer) == site], batch) for site in sites)
            found[number, batch] = np.where(exists, total, np.nan)
    return found


def _maps(
    recipient: Side, donor: Side, patches: Sequence[Patch], metric: str, batch: np.ndarray, steps: int, valid: Tensor
) -> dict[tuple[str, int], np.ndarray]:
    """By site: (example, pos), (example, pos, head), or (example, head) of patterns; zero outside the prompt."""
    sites = sorted({(place.kind, place.layer) for patch in patches for place in patch})
    names = [site_name(*site) for site in sites]
    theirs = donor.prompts.rows(batch)
    given = donor.model.run(
        theirs.ids, mask=theirs.mask, capture=names, edits=donor.edits_of(batch), logits_at=theirs.read_at
    ).cache
    own, gradients = _gradients(recipient, batch, metric, names, [])
    if steps:
        for name in names:
            ends, total = own[name], torch.zeros_like(own[name])
            for step in range(steps):
                share = (step + 0.5) / steps
                mixed = ends + share * (given[name].to(ends) - ends)
                here = valid.to(ends.device)
                if "pattern" not in name:
                    mixed = torch.where(here.reshape(*here.shape, *[1] * (ends.ndim - 2)), mixed, ends)
                mixed.requires_grad_()
                total += _gradients(recipient, batch, metric, [name], [(name, mixed)])[1][name]
            gradients[name] = total / steps
    maps = {}
    for site, name in zip(sites, names, strict=True):
        product = (given[name].to(own[name]) - own[name]) * gradients[name]
        if site[0] == "pattern":
            maps[site] = product.sum((-2, -1))
        else:
            here = valid.to(product.device)
            product = product.sum(-1)
            maps[site] = torch.where(here.reshape(*here.shape, *[1] * (product.ndim - 2)), product, 0)
    return {site: values.double().cpu().numpy() for site, values in maps.items()}


def _gradients(
    side: Side, batch: np.ndarray, metric: str, names: list[str], edits: list
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations and the metric's gradient at each of them, example by example (examples do not mix)."""
    prompts = side.prompts.rows(batch)
    run = side.model.run(
        prompts.ids, mask=prompts.mask, capture=names, edits=[*side.edits_of(batch), *edits],
        logits_at=prompts.read_at, gradients=True,
    )  # fmt: skip
    values = score(run.logits, prompts.answers, prompts.wrongs, only=metric)[metric]
    gradients = run.gradients(values.nansum())
    return {name: x.detach() for name, x in run.cache.items()}, gradients


def _read(values: np.ndarray, places: Sequence[Place], batch: np.ndarray) -> np.ndarray:
    """What some places take together from their site's map, each entry once: (example,)."""
    chosen = np.zeros(values.shape, dtype=bool)
    for place in places:
        head = slice(None) if place.head is None else place.head
        if place.kind == "pattern":
            chosen[:, head] = True
        elif place.column is None:
            chosen[(slice(None), slice(None), head)[: chosen.ndim]] = True
        else:
            chosen[(np.arange(len(batch)), place.columns(batch), head)[: chosen.ndim]] = True
    return np.where(chosen, values, 0).reshape(len(values), -1).sum(1)
