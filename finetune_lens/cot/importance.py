"""How much does it matter that a step was written? The rest of the chain is sampled anew from before and behind it.

Resampling importance (Bogdan et al. 2025, "Thought Anchors", arXiv 2506.19143, §3). Let acc_k be the share of right
answers over R continuations of the chain's first k steps. Signs differ between publications; here, for step i = 0 …:

    importance[i]   acc_{i+1} − acc_i: positive where writing the step makes the right answer likelier
    same[i]         the same for the answer that the model gives after the full chain
    shift[i]        KL(P_{i+1} ‖ P_i) in nats of the distributions of answers, each count + ½ (unparsable is one
                    answer); the authors take it the other way round

The paper's counterfactual importance leaves out continuations that say the same as the step; here all count. Two
finite samples always differ: the null of `shift` is its mean over random splits of the two samples' answers.

Behind the last step the chain is whole: its one answer stands for all R.

Cost: R continuations from each of n steps a chain and side, and an answer each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.cot.asking import ask
from finetune_lens.cot.spans import Spans
from finetune_lens.cot.trials import answer_room, written_within

if TYPE_CHECKING:
    from finetune_lens.cot.questions import Format, Question
    from finetune_lens.hooked import HookedModel

SPLITS = 200


def resample(
    model: "HookedModel",
    questions: "Sequence[Question]",
    format: "Format",
    steps: Sequence[Sequence[str]],
    chains: Sequence[Spans],
    answers: Sequence[str | None],
    *,
    whole: Sequence[bool],
    rollouts: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    answer_tokens: int,
    scoring: str = "auto",
    template: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    partial: Path | None = None,
    progress: bool = True,
) -> list[list[list[str | None]]]:
    """Answers of every continuation: of each question, by how many steps stood there before it.

    Args:
        steps: the texts of the measured steps of each chain.
        chains: the same as tokens.
        answers: the model's own answer after each full chain.
        whole: whether the measured steps of a chain are all of it.
        rollouts: R.
        temperature, top_p, max_tokens, seed, partial: of the continuations, as in `sample`; cut off where the model
            would have no room for an answer.

    Raises:
        InputError: as `sample` and `ask`.
    """
    places = [(q, k) for q, row in enumerate(steps) for k in range(len(row) + (not whole[q])) if row]
    room = answer_room(model, questions, format, scoring=scoring, answer_tokens=answer_tokens) if places else 0
    written = [] if not places else written_within(
        model, [chains[q].ids[: (chains[q].front, *chains[q].ends)[k]] for q, k in places],
        names=[f"{questions[q].id} after {k}" for q, k in places], samples=1 if temperature == 0 else rollouts,
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=format.stop, seed=seed,
        batch_size=batch_size, partial=partial, progress=progress, room=room,
    )  # fmt: skip
    each = len(written) // max(1, len(places))
    texts: list[list[str]] = [[] for _ in questions]
    for n, (q, k) in enumerate(places):
        before = "".join(steps[q][:k])
        texts[q] += [before + chain.text for chain in written[n * each : (n + 1) * each]]
    asked = ask(
        model, questions, format, ["".join(row) for row in steps], texts, scoring=scoring, template=template,
        max_tokens=answer_tokens, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    found = []
    for q, row in enumerate(steps):
        given = asked.answers[q]
        found.append([given[n * each : (n + 1) * each] for n in range(len(given) // max(1, each))])
        if row and whole[q]:
            found[-1].append([answers[q]] * each)
    return found


def shift(later: Sequence[str | None], earlier: Sequence[str | None]) -> float:
    """KL(later ‖ earlier) of the distributions of answers, each count + ½."""
    kinds = list({*later, *earlier})
    counts = np.array([[answers.count(kind) + 0.5 for kind in kinds] for answers in (list(later), list(earlier))])
    p, q = counts / counts.sum(1, keepdims=True)
    return float((p * np.log(p / q)).sum())


def shift_by_chance(
    later: Sequence[str | None], earlier: Sequence[str | None], generator: np.random.Generator
) -> float:
    """The mean `shift` between random splits of both samples together."""
    if len({*later, *earlier}) == 1:
        return 0.0
    both = [*later, *earlier]
    orders = (generator.permutation(len(both)) for _ in range(SPLITS))
    splits = (([both[i] for i in o[: len(later)]], [both[i] for i in o[len(later) :]]) for o in orders)
    return float(np.mean([shift(*split) for split in splits]))
