"""A direction taken out of the residual stream, or added to it, and what that does to the answers.

Ablation (Arditi et al. 2024, arXiv 2406.11717, §2.4): x ← x − (x·r̂)r̂ at every token, before every block, between its
halves and after the last, so that nothing reads or writes along r. Addition: x ← x + v at every token, at one site.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from finetune_lens.hooked.model import Edit, HookedModel
from finetune_lens.hooked.sites import site_name
from finetune_lens.metrics import METRICS, score
from finetune_lens.prompts import Encoded

TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 16384}  # columns in a forward pass
SCORED = tuple(name for name in METRICS if name != "kl")


def ablation(model: HookedModel, direction: Float[np.ndarray, " d_model"]) -> list[Edit]:
    """Edits that leave nothing along the direction, wherever a block reads the residual stream.

    Raises:
        ValueError: a direction of length 0.
    """
    length = np.linalg.norm(direction)
    if not length > 0:
        raise ValueError("a direction of length 0 cannot be taken out")
    unit = torch.from_numpy(direction / length)

    def without(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = unit.to(wide)
        return (wide - (wide @ r)[..., None] * r).to(x.dtype)

    layers = range(model.layers)
    names = [
        site_name(kind, n) for n in layers for kind in ("resid_pre", "resid_mid") if not model.lacks(kind, n)
    ]  # fmt: skip
    return [(name, without) for name in (*names, site_name("resid_post", model.layers - 1))]


def addition(site: str, vector: Float[np.ndarray, " d_model"]) -> list[Edit]:
    """The edit that adds the vector at every token."""
    return [(site, lambda x: x + torch.from_numpy(vector).to(x))]


def scores(
    model: HookedModel,
    encoded: Encoded,
    edits: Sequence[Edit] = (),
    *,
    vocabulary: int | None = None,
    batch_size: int | None = None,
    tick: Callable[[int], object] | None = None,
) -> dict[str, Float[np.ndarray, " example"]]:
    """SCORED of each prompt's answer in a run with these edits; NaN where a prompt has no (wrong) answer.

    Args:
        vocabulary: only the first so many tokens count.
        tick: called with the number of prompts done, after each batch.

    Cost: a forward pass a prompt; logits are computed where the answer is read.
    """
    lengths = encoded.mask.sum(1)
    order = torch.argsort(lengths, descending=True, stable=True)
    found = {name: np.full(len(encoded), np.nan) for name in SCORED}
    limit, start = len(encoded), 0
    while start < len(order):
        longest = int(lengths[order[start]])
        size = batch_size or max(1, TOKENS.get(model.device.type, TOKENS["cpu"]) // longest)
        index = order[start : start + min(limit, size)].sort().values
        part = encoded.rows(index)
        try:
            run = model.run(part.ids, mask=part.mask, edits=edits, logits_at=part.read_at)
        except torch.OutOfMemoryError:
            if len(index) == 1:
                raise
            torch.cuda.empty_cache()
            limit = len(index) // 2
            continue
        for name, values in score(run.logits[..., :vocabulary], part.answers, part.wrongs).items():
            found[name][index.numpy()] = values.double().cpu().numpy()
        start += len(index)
        if tick is not None:
            tick(len(index))
    return found
