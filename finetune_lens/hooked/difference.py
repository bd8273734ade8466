"""What a mean difference of activations says, read as if it were a residual stream.

The activation-difference lens (Minder et al. 2025, arXiv 2510.13900, §3; the logit lens of nostalgebraist 2020 on a
difference). δ is the mean over texts of a difference of activations; what the model makes of it behind its last block,
without what it makes of any direction (the biases),

    ℓ(δ) = ½ (readout(δ) − readout(−δ)),

has the same value for every length of δ, for a norm comes first. The null flips the signs of whole texts: with none
different on average, every flip is as likely as what was seen. A token's p-value is the share of flips in which any
token of the vocabulary reaches its |ℓ|·‖δ‖ (Westfall and Young 1993: adjusted over the vocabulary).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from finetune_lens.hooked.model import HookedModel
from finetune_lens.hooked.reentry import read_out

LOGITS = 1 << 24  # held at once


@dataclass(frozen=True)
class Lens:
    """What a difference promotes, and what it suppresses.

    Attributes:
        token: (2, rank) ids: promoted most, suppressed most.
        logit: (2, rank) ℓ(δ) of each.
        p: (2, rank) adjusted over the vocabulary.
        size: ‖δ‖.
        sizes: (draw,) ‖δ‖ with the signs of texts flipped at random.
    """

    token: np.ndarray
    logit: np.ndarray
    p: np.ndarray
    size: float
    sizes: np.ndarray


def read_difference(
    model: HookedModel,
    differences: Float[np.ndarray, "text d_model"],
    *,
    length: float,
    count: int = 10,
    draws: int = 100,
    seed: int = 0,
) -> Lens:
    """Read the mean of the texts' differences through the model's final norm and unembedding.

    Args:
        differences: of each text, tuned − base.
        length: to which vectors are scaled before they are read, that of an activation: a norm's ε then counts as
            little as it does there.
        count: tokens of either sort.
        draws: flips.

    Cost: 2·(draws + 1) unembeddings.
    """
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(draws, len(differences)))
    means = np.concatenate([differences.mean(0, keepdims=True), signs @ differences / len(differences)])
    sizes = np.linalg.norm(means, axis=1)
    vocabulary = min(model.vocabulary, len(model.require_tokenizer()))
    count = min(count, vocabulary)
    if sizes[0] == 0:
        nothing = np.full((2, count), np.nan)
        return Lens(np.full((2, count), -1), nothing, nothing, 0.0, sizes[1:])
    with np.errstate(invalid="ignore", divide="ignore"):
        units = torch.from_numpy(np.nan_to_num(means / sizes[:, None] * length)).float()
    logits, most = torch.empty(0), []
    step = max(1, LOGITS // (2 * model.vocabulary))
    for start in range(0, len(units), step):
        found = _odd(model, units[start : start + step])[:, :vocabulary]
        logits = found[0] if start == 0 else logits
        most.append(found.abs().amax(1))
    reached = torch.cat(most).numpy()[1:] * sizes[1:] / sizes[0]
    order = torch.argsort(logits, descending=True, stable=True)
    token = torch.stack([order[:count], order.flip(0)[:count]])
    logit = logits[token].numpy()
    p = (1 + (reached >= np.abs(logit)[..., None]).sum(-1)) / (1 + draws)
    return Lens(token.numpy(), logit, p, float(sizes[0]), sizes[1:])


def _odd(model: HookedModel, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    there, back = (read_out(model, sign * vectors).double().cpu() for sign in (1, -1))
    return (there - back) / 2
