"""Which heads look back at the same few steps? Receiver heads, by the kurtosis of the attention that steps receive.

Bogdan et al. 2025, "Thought Anchors" (arXiv 2506.19143), §4. Of each head, with the attention a(q, k):

    A[j, i]     mean over the tokens q of step j and k of step i of a(q, k)
    v[i]        mean over the steps j ≥ i + d of A[j, i]: the step's vertical score, d = 4 in the paper
    kurtosis    m_4/m_2² − 3 over the scores v, m the central moments: high where a few steps receive most

A head whose kurtosis is high is a receiver head. Of a handful of scores the kurtosis is coarse and bounded (of n equal
scores but one: n − 2 + 1/(n − 1) − 3), so it is compared with its null: each row of A shuffled among its own steps
(`null`), which keeps how much is received in all and takes away that it is the same steps.

Cost: one forward pass a chain, with attention written out. Memory: one layer's pattern.
"""

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from finetune_lens.cot.spans import Spans
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked.model import patterns_visible

FEWEST = 4  # scores that a kurtosis is taken of
SHUFFLES = 50


def step_attention(model: HookedModel, chain: Spans) -> np.ndarray:
    """A: (layer, head, later step, step), NaN where a step has no tokens.

    Raises:
        InputError: an architecture that does not hand out its attention pattern, a chain longer than the model reads.
    """
    model.require(["pattern"], range(model.layers))
    ids = torch.tensor([chain.ids])
    mean = torch.zeros(len(chain.ends), len(chain.ids))
    for step in range(len(chain.ends)):
        span = chain.span(step)
        mean[step, list(span)] = 1 / max(1, len(span))
    found: dict[int, np.ndarray] = {}

    def reader(layer: int) -> Callable[[Tensor], Tensor]:
        def touch(pattern: Tensor) -> Tensor:
            by = mean.to(pattern.device)
            found[layer] = (by @ pattern[0].float() @ by.T).cpu().numpy()
            return pattern

        return touch

    with ExitStack() as stack:
        stack.enter_context(model.side())
        stack.enter_context(torch.no_grad())
        for layer in range(model.layers):
            stack.enter_context(model.hook("pattern", layer, reader(layer), False))
        stack.enter_context(patterns_visible(model.module))
        stack.enter_context(model.logits_at(torch.tensor([[len(chain.ids) - 1]])))
        model.module(**model.inputs(ids, None))
    attention = np.stack([found[layer] for layer in range(model.layers)])
    empty = [not len(chain.span(step)) for step in range(len(chain.ends))]
    attention[..., empty, :] = attention[..., empty] = np.nan
    return attention


def received(attention: np.ndarray, distance: int) -> np.ndarray:
    """v: (…, step), NaN for the last `distance` steps; attention is (…, later step, step)."""
    count = attention.shape[-1]
    far = np.tril(np.ones((count, count), bool), -distance) & ~np.isnan(attention)
    total = np.where(far, attention, 0).sum(-2)
    return np.where(far.any(-2), total / np.maximum(far.sum(-2), 1), np.nan)


def kurtosis(scores: np.ndarray) -> np.ndarray:
    """Over the last axis, NaN left out; NaN where fewer than `FEWEST` scores are there, or all are the same."""
    there = ~np.isnan(scores)
    number = np.maximum(there.sum(-1), 1)
    centred = np.where(there, scores, 0)
    centred = np.where(there, centred - (centred.sum(-1) / number)[..., None], 0)
    second, fourth = ((centred**power).sum(-1) / number for power in (2, 4))
    scale = np.abs(np.where(there, scores, 0)).max(-1, initial=0)
    usable = (there.sum(-1) >= FEWEST) & (np.sqrt(second) > 1e-6 * scale)
    return np.where(usable, fourth / np.where(usable, second, 1) ** 2 - 3, np.nan)


def shuffled_kurtosis(attention: np.ndarray, distance: int, generator: np.random.Generator) -> np.ndarray:
    """The mean kurtosis where each later step's attention is shuffled among the steps that it may go to."""
    total = []
    for _ in range(SHUFFLES):
        shuffled = attention.copy()
        for later in range(distance, attention.shape[-1]):
            allowed = slice(0, later - distance + 1)
            shuffled[..., later, allowed] = generator.permuted(shuffled[..., later, allowed], axis=-1)
        total.append(kurtosis(received(shuffled, distance)))
    total = np.stack(total)
    there = ~np.isnan(total)
    return np.where(there.any(0), np.where(there, total, 0).sum(0) / np.maximum(there.sum(0), 1), np.nan)


def suited_distance(counts: np.ndarray) -> int:
    """4, as in the paper, or less where the typical chain is too short for `FEWEST` + 1 scores then."""
    return int(np.clip(np.median(counts) - FEWEST - 1, 1, 4)) if len(counts) else 4
