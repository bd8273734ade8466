"""Do the states at a chain's steps carry the answer from one model to the other? Both read the same chain.

Cross-model activation patching (Prakash et al. 2024, arXiv 2402.14811, §5) with steps as places: the donor's residual
stream at all tokens of a step, after so many blocks, is put into the recipient's run. Where the two models answer
otherwise after the same chain,

    m           ln p(donor's answer) − ln p(recipient's answer), all tokens of both
    effect      m(patched) − m(recipient)
    gap         m(donor) − m(recipient); recovery = effect / gap, a ratio of means

Beside the steps stand all other tokens: `prompt`, and `cue` with those of the answer behind which more of it is read
(none of an answer of one token). After the last block these alone are what the donor says, and recovery is 1.

Cost: two sweeps of (steps + 2)·(layers + 1) patches a chain and direction, by re-entry.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.cot.spans import Spans

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel
    from finetune_lens.prompts import Encoded

DIRECTIONS = ("tuned→base", "base→tuned")


def patch_states(
    sides: "tuple[HookedModel, HookedModel]",
    chains: Sequence[Spans],
    own: Sequence[Sequence[int]],
    *,
    batch_size: int | None = None,
    partial: Path | None = None,
    progress: bool = True,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Patch every step of every chain, at every depth, both ways.

    Args:
        sides: base and tuned.
        chains: on which they answer otherwise.
        own: of each side and chain, which of the chain's answers is its own.

    Returns:
        effect (direction, chain, depth, place) and gap (direction, chain); places are prompt, the steps (as many as
        the longest chain has, NaN where there is none), cue. And notes of the sweeps.

    Raises:
        InputError: models of different depth or width, chains longer than the models read.
    """
    from finetune_lens.hooked.sweep import Place, Side, sweep

    base, tuned = sides
    base.require(["resid_post"], range(base.layers))
    steps = max(len(chain.ends) for chain in chains)
    sites = [("resid_pre", 0), *(("resid_post", layer) for layer in range(base.layers))]
    models = {DIRECTIONS[0]: (base, tuned), DIRECTIONS[1]: (tuned, base)}
    effects, gaps, notes = [], [], []
    for direction, (recipient, donor) in models.items():
        signed, gap = 0.0, 0.0
        for whose, sign in ((donor, 1), (recipient, -1)):
            answers = own[0 if whose is base else 1]
            patches = [
                tuple(Place(*site, None, column) for column in columns)
                for site in sites
                for columns in _columns(chains, steps, answers)
            ]
            texts = _encoded(recipient, chains, answers)
            name = "donor" if whose is donor else "recipient"
            label = f"{direction}, {name}'s answer"
            known = partial if recipient.fingerprint and donor.fingerprint else None
            facts = {
                "analysis": f"states-{'base' if recipient is base else 'tuned'}-{name}",
                "models": [m.describe() | {"adapted": m.adapted} for m in (recipient, donor)],
            }  # fmt: skip
            swept = sweep(
                Side(recipient, texts), Side(donor, texts), patches, batch_size=batch_size, progress=progress,
                label=label, partial=known, arguments=facts,
            )  # fmt: skip
            signed = signed + sign * swept.effects["logprob"]
            gap = gap + sign * (swept.donor["logprob"] - swept.recipient["logprob"])
            notes += [f"{label}: {note}" for note in swept.notes]
        effects.append(np.reshape(signed, (base.layers + 1, steps + 2, len(chains))).transpose(2, 0, 1))
        gaps.append(gap)
    return {"effect": np.stack(effects), "gap": np.stack(gaps)}, notes


def _columns(chains: Sequence[Spans], steps: int, answers: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """Of prompt, each step and cue: columns, each with its own in every chain; those of fewer tokens repeat one.

    A chain without that step, or without tokens in it, has the column behind its last token there.
    """
    places = [[range(c.front) for c in chains]]
    for step in range(steps):
        places.append([c.span(step) if step < len(c.ends) else range(0) for c in chains])
    lengths = [len(c.row(answer)) for c, answer in zip(chains, answers, strict=True)]
    places.append([range(max((c.front, *c.ends)), length) for c, length in zip(chains, lengths, strict=True)])
    found = []
    for spans in places:
        width = max(1, *map(len, spans))
        each = [
            [span[min(n, len(span) - 1)] if span else length for length, span in zip(lengths, spans, strict=True)]
            for n in range(width)
        ]
        found.append([tuple(columns) for columns in each])
    return found


def _encoded(model: "HookedModel", chains: Sequence[Spans], own: Sequence[int]) -> "Encoded":
    """The chains, each followed by one of its answers; padded on the right by a column or more."""
    import torch

    from finetune_lens.prompts import Encoded, printer

    rows = [chain.row(option) for chain, option in zip(chains, own, strict=True)]
    scored = [chain.own(option) for chain, option in zip(chains, own, strict=True)]
    width, longest = max(map(len, rows)) + 1, max(map(len, scored))
    count, show = len(rows), printer(model.require_tokenizer())
    ids = torch.zeros(count, width, dtype=torch.int64)
    mask = torch.zeros(count, width, dtype=torch.bool)
    read_at = torch.zeros(count, longest, dtype=torch.int64)
    answers = torch.full((count, longest, 1), -1)
    for i, (chain, row) in enumerate(zip(chains, rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
        reads = chain.reads(own[i])
        read_at[i] = torch.tensor([*reads] + [reads[-1]] * (longest - len(reads)))
        answers[i, : len(scored[i]), 0] = torch.tensor(scored[i])
    none: Any = torch.full((count, 0), -1)
    # all may be patched, the answer's own tokens too
    return Encoded(ids, mask, read_at, answers, none, mask, mask, [[show(t) for t in row] for row in rows])
