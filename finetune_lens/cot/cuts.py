"""What hangs on one step of a chain? All attention from later tokens to its tokens is cut, step by step.

Attention suppression (Bogdan et al. 2025, "Thought Anchors", arXiv 2506.19143, §5). With the tokens S_i of step i, in
the chosen layers and heads (all by default), for every query q behind the step's last token,

    score(q, k) = −∞ for k in S_i, before the softmax, which is normalised over what is left,

and of the next-token distributions, in nats,

    kl[i, j]        mean over the tokens t of step j of KL_t,    KL_t = KL(p(· | ≤ t) ‖ p_cut(· | ≤ t))
    log_kl[i, j]    mean over the tokens t of step j of ln(KL_t + 1e-9), as in the authors' code
    answer_kl[i]    mean over the tokens that the answer is read behind
    logprob[i]      ln p_cut(answer) − ln p(answer) of the full chain's own answer: negative where it needs the step
    changed[i]      1 where the likeliest option is another; of an answer that was written, where one of its tokens is

Signs: a positive kl says that step j depends on step i. The dependence is total: a step between the two that was
changed by the cut passes it on, though its words stay what they were. (The authors take KL at temperature 0.6; here 1.)

The same for as many random tokens from before the step, cut from the same queries (`random_…`): what cutting that much
context does. The first token is spared, for attention without an aim rests there.

What comes before a step is not computed again: its keys and values are the full chain's. Tokens of the step itself do
not see the cut either: what KL they show is rounding (`rounding`).

Cost: one forward pass a chain and two of what follows each step's beginning, about 1 + 1.1·steps in all, with attention
written out (1 + 2·steps where `tree.unpackable` has a reason against kept keys); times the number of options that
differ in more than their last token. Memory: patterns, keys and values of the rows at once, and logits of two rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finetune_lens.cot.spans import Spans
from finetune_lens.cot.tree import unpackable
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked.model import _eager

CUTS = "finetune_lens_cuts"  # our name among transformers' attention implementations
FLOOR = 1e-9  # nats; added to a KL before its logarithm
COLUMNS = {"cpu": 4096, "cuda": 32768}  # tokens in a forward pass
LOGITS = 1 << 26  # numbers of a batch's logits
SPARED = 8  # rows of a pass begin where the first does, within this fraction of what is left
WIDE = 1 << 22  # of these, in float64 at once

_HIDDEN: dict[nn.Module, Tensor] = {}  # attention module → (row, 1 or head, query, key), True where it does not see
_SEEN: set[nn.Module] = set()


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple:
    """The architecture's own attention, without what is hidden from it."""
    hidden = _HIDDEN.get(module)
    if hidden is not None:
        _SEEN.add(module)
        mask = torch.where(hidden, torch.finfo(mask.dtype).min, mask)
    return _eager(module)(module, query, key, value, mask, **options)


class _Cut(NamedTuple):
    """Which tokens are not seen from the column `end` on; up to `begin`, where their step begins, nothing changes."""

    keys: Sequence[int]
    begin: int
    end: int


@contextmanager
def hidden(
    model: HookedModel, keys: Tensor, first: Tensor, *, layers: Sequence[int], heads: Sequence[int] | None = None,
    begin: int = 0,
) -> Iterator[None]:  # fmt: skip
    """Within: in these layers and heads, tokens from the column `first` of each row on do not see its `keys`.

    Args:
        keys: (row, pos) bool.
        first: (row,) column.
        heads: query heads; None: all.
        begin: column of the first query; keys and values of those before it are kept ones.

    Raises:
        InputError: an architecture that does not compute its attention where it can be cut.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    model.require(["pattern"], layers)
    device, width = model.device, keys.shape[1]
    later = torch.arange(begin, width, device=device) >= first.to(device)[:, None]
    unseen = (later[:, :, None] & keys.to(device)[:, None, :])[:, None]
    if heads is not None:
        chosen = torch.zeros(model.heads, dtype=torch.bool, device=device)
        chosen[list(heads)] = True
        unseen = unseen & chosen[None, :, None, None]
    AttentionInterface.register(CUTS, _attention)
    AttentionMaskInterface.register(CUTS, eager_mask)
    before = model.module.config._attn_implementation
    blocks = [model.anatomy.blocks[layer].attention for layer in layers]
    owners = [[m for m in block.modules() if hasattr(m, "is_causal") or m is block] for block in blocks]
    _HIDDEN.update({owner: unseen for found in owners for owner in found})
    _SEEN.clear()
    model.module.set_attn_implementation(CUTS)
    try:
        yield
        if not all(_SEEN.intersection(found) for found in owners):
            raise InputError(
                f"{model.name} ({type(model.module).__name__}) does not compute its attention where it can be cut; "
                "leave the cuts out (--parts heads,states)"
            )
    finally:
        model.module.set_attn_implementation(before)
        for found in owners:
            for owner in found:
                _HIDDEN.pop(owner, None)


def cut_steps(
    model: HookedModel,
    chain: Spans,
    own: int | None,
    *,
    layers: Sequence[int],
    heads: Sequence[int] | None = None,
    written: bool = False,
    seed: Sequence[int] = (0,),
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Cut attention to every step of a chain.

    Args:
        own: which of the chain's answers is the model's own after the full chain; None where it gave none.
        layers, heads: where attention is cut.
        written: the answer was written token by token: it stays where each of its tokens is the likeliest.
        seed: of the random tokens.

    Returns:
        kl, log_kl (source, target), NaN unless the target comes later; answer_kl, logprob, changed (source,); the same
        with `random_` in front; uncut_logprob, rounding ().

    Raises:
        InputError: an architecture whose attention cannot be cut, a chain longer than the model reads.
    """
    count = len(chain.ends)
    generator = np.random.default_rng(list(seed))
    keys = [list(chain.span(i)) for i in range(count)]
    random = [_drawn(chain, i, generator) for i in range(count)]
    answer = min((chain.reads(o).start for o in range(len(chain.answers))), default=len(chain.ids))
    starts = [min(chain.span(i).start, answer) for i in range(count)]  # an answer may be read behind the prompt
    cuts = [_Cut(*cut) for cut in zip([*keys, *random], starts * 2, chain.ends * 2, strict=True)]
    bodies: dict[tuple[int, ...], list[int]] = {}
    for option, branch in enumerate(chain.answers):
        bodies.setdefault(branch.tokens[:-1], []).append(option)
    main = [] if own is None else bodies[chain.answers[own].tokens[:-1]]
    rows = 1 + len(cuts)  # the first is no cut
    logs = np.full((rows, len(chain.answers)), np.nan)
    longest = max(map(len, [chain.ids, *map(chain.row, range(len(chain.answers)))]))
    given = {"layers": layers, "heads": heads, "batch_size": batch_size, "keep": not unpackable(model, longest)}
    row = chain.row(own) if main else list(chain.ids)
    kl, best = np.zeros((rows, len(row))), np.zeros(rows, bool)
    reads = chain.reads(own) if main else range(len(row) - 1, len(row))
    begin = min(chain.front, reads[0])
    for numbers, first, found, reference in _distributions(model, row, range(begin, len(row)), cuts, **given):
        kl[numbers, first:] = _divergence(reference, found)
        for r, values in zip(numbers, found, strict=True):
            _score(logs[r], chain, main, values, first)
            if main:
                likeliest = values[[t - first for t in reads]].argmax(-1).tolist()
                best[r] = tuple(likeliest) == chain.own(own)
    for options in bodies.values():
        if options != main and not written:
            begin, row = min(chain.reads(o).start for o in options), chain.row(options[0])
            for numbers, first, found, _ in _distributions(model, row, range(begin, len(row)), cuts, **given):
                for r, values in zip(numbers, found, strict=True):
                    _score(logs[r], chain, options, values, first)
    changed = ~best if written or not main else logs.argmax(-1) != own
    return _summed(chain, kl, reads, logs[:, own] if main else np.full(rows, np.nan), changed)


def _score(logs: np.ndarray, chain: Spans, options: Sequence[int], found: Tensor, first: int) -> None:
    """Put the summed log-probability of each option into its place; logits are (read, vocab) from column `first` on."""
    for o in options:
        reads = zip(chain.reads(o), chain.own(o), strict=True)
        logs[o] = sum(float(_logs(found[t - first])[token]) for t, token in reads)


def _drawn(chain: Spans, step: int, generator: np.random.Generator) -> list[int]:
    """As many tokens as the step has, from before it and not the first; fewer where there are none."""
    span = chain.span(step)
    before = np.arange(1, max(1, span.start))
    return sorted(generator.choice(before, min(len(span), len(before)), replace=False).tolist())


def _distributions(
    model: HookedModel, row: list[int], at: range, cuts: Sequence[_Cut], layers: Sequence[int],
    heads: Sequence[int] | None, batch_size: int | None, keep: bool,
) -> Iterator[tuple[list[int], int, Tensor, Tensor]]:  # fmt: skip
    """Logits behind the tokens `at`: without a cut (0), and with each (1, …), some cuts at a time.

    Yields:
        Their numbers; the first of the tokens that the logits are behind, before which they are those without a cut;
        the logits (cut, read, vocab); and those without a cut (read, vocab).
    """
    ids, places = torch.tensor([row]), torch.tensor([[*at]])
    with hidden(model, torch.zeros(ids.shape, dtype=torch.bool), torch.zeros(1), layers=layers):
        whole = model.run(ids, logits_at=places, keys_values=keep)
    reference = whole.logits[0]
    yield [0], at.start, whole.logits, reference
    columns = COLUMNS.get(model.device.type, COLUMNS["cpu"])
    todo = sorted(range(len(cuts)), key=lambda n: cuts[n].begin)
    while todo:
        begin = cuts[todo[0]].begin if keep else 0
        width = len(row) - begin
        size = batch_size or max(1, min(columns // width, LOGITS // (len(at) * model.vocabulary)))
        batch = [n for n in todo[:size] if not keep or cuts[n].begin <= begin + width // SPARED]
        try:
            found = _cut(model, ids, [cuts[n] for n in batch], begin, at, whole.keys_values, layers=layers, heads=heads)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            batch_size = len(batch) // 2
            continue
        yield [1 + n for n in batch], max(begin, at.start), found, reference[max(0, begin - at.start) :]
        todo = todo[len(batch) :]


def _cut(
    model: HookedModel, ids: Tensor, cuts: Sequence[_Cut], begin: int, at: range, kept: Sequence[tuple[Tensor, Tensor]],
    *, layers: Sequence[int], heads: Sequence[int] | None,
) -> Tensor:  # fmt: skip
    """Logits (cut, read, vocab) behind those of the tokens `at` that stand at the column `begin` or later."""
    from transformers import DynamicCache

    rows, width = len(cuts), ids.shape[1]
    keys = torch.zeros(rows, width, dtype=torch.bool)
    for r, cut in enumerate(cuts):
        keys[r, list(cut.keys)] = True
    reads = torch.tensor([t - begin for t in at if t >= begin]).repeat(rows, 1)
    inputs = model.inputs(ids[:, begin:].repeat(rows, 1), None)
    if begin:
        cache = DynamicCache()
        for layer, pair in enumerate(kept):
            cache.update(*(x[:, :, :begin].expand(rows, -1, -1, -1) for x in pair), layer)
        positions = torch.arange(begin, width, device=model.device).repeat(rows, 1)
        inputs |= {"past_key_values": cache, "use_cache": True, "position_ids": positions}
    first = torch.tensor([cut.end for cut in cuts])
    unseen = hidden(model, keys, first, layers=layers, heads=heads, begin=begin)
    with unseen, model.side(), model.logits_at(reads), torch.no_grad():
        return model.module(**inputs).logits


def _logs(logits: Tensor) -> Tensor:
    """Log-probabilities in float64, where the device has it."""
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64).log_softmax(-1)


def _divergence(reference: Tensor, logits: Tensor) -> np.ndarray:
    """KL(p ‖ q), (cut, read), of the reference's distributions p (read, vocab) and q (cut, read, vocab)."""
    found = torch.empty(logits.shape[:2], dtype=torch.float64)
    step = max(1, WIDE // logits.shape[-1])  # tokens at a time
    for start in range(0, len(reference), step):
        p = _logs(reference[start : start + step])
        weights, there = p.exp(), p > -torch.inf
        for r, row in enumerate(logits[:, start : start + step]):
            kl = torch.where(there, weights * (p - _logs(row)), 0).sum(-1)
            found[r, start : start + step] = kl.clamp_min(0)
    return found.numpy()


def _summed(
    chain: Spans, kl: np.ndarray, reads: Sequence[int], logs: np.ndarray, changed: np.ndarray
) -> dict[str, np.ndarray]:
    """Tokens joined into steps and answer; the rows are no cut, each step's, and each step's random one."""
    count, rounding = len(chain.ends), 0.0
    result: dict[str, np.ndarray] = {}
    for name, first in (("", 1), ("random_", 1 + count)):
        pairs = {key: np.full((count, count), np.nan) for key in ("kl", "log_kl")}
        single = {key: np.full(count, np.nan) for key in ("answer_kl", "logprob", "changed")}
        for i, r in enumerate(range(first, first + count)):
            if not len(chain.span(i)):
                continue
            for j in range(i + 1, count):
                if tokens := list(chain.span(j)):
                    pairs["kl"][i, j] = kl[r, tokens].mean()
                    pairs["log_kl"][i, j] = np.log(kl[r, tokens] + FLOOR).mean()
            rounding = max(rounding, kl[r, chain.front : chain.ends[i]].max(initial=0))
            single["answer_kl"][i] = kl[r, list(reads)].mean()
            if np.isfinite(logs[0]):
                single["logprob"][i], single["changed"][i] = logs[r] - logs[0], changed[r]
        result |= {name + key: values for key, values in (pairs | single).items()}
    return result | {"uncut_logprob": np.array(logs[0]), "rounding": np.array(rounding)}
