"""The same chains before two models: their steps, their tokens, and what each model answers after them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_lens.cot.chains import Chain
from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from finetune_lens.cot.questions import Format, Question
    from finetune_lens.cot.spans import Spans
    from finetune_lens.hooked import HookedModel
    from finetune_lens.stream import Store

SIDES = ("base", "tuned")
OWN = (*SIDES, "question")  # whose chains, where no others are given


@dataclass(frozen=True)
class Study:
    """The chains as both models read them.

    Attributes:
        steps: of each chain, all.
        spans: of each chain as tokens, with the steps that are measured and the answers that matter.
        answers: of each side and question, what it answers after the full chain.
        own: of each side and question, which of the chain's answers that is; None where there is no text,
            or none that is read again.
        open: of each question, whether its answers are written.
    """

    models: "tuple[HookedModel, HookedModel]"
    questions: "list[Question]"
    format: "Format"
    chains: "list[Chain]"
    steps: list[list[str]]
    spans: "list[Spans]"
    answers: list[list[str | None]]
    own: list[list[int | None]]
    open: list[bool]

    @classmethod
    def of(
        cls, models: Any, questions: Any, format: "Format", chains: "list[Chain]", max_steps: int, scoring: str,
        answer_tokens: int, written: dict[str, Any],
    ) -> "Study":  # fmt: skip
        from finetune_lens.cot.asking import ask
        from finetune_lens.cot.generate import templated
        from finetune_lens.cot.spans import spans
        from finetune_lens.cot.steps import split_steps
        from finetune_lens.cot.trials import token_counts

        texts = [chain.text for chain in chains]
        asked = [
            ask(
                model, questions, format, texts, [[t] for t in texts], scoring=scoring, max_tokens=answer_tokens,
                **written,
            )
            for model in models
        ]  # fmt: skip
        said = [[row[0] for row in side.texts] for side in asked]
        shown = [format.options_of(q) if scoring == "auto" else () for q in questions]
        spelt = list(dict.fromkeys(t for side in said for t, s in zip(side, shown, strict=True) if t and not s))
        counts = token_counts([format.cue + text for text in spelt], models[0].require_tokenizer())
        readable = {text for text, count in zip(spelt, counts, strict=True) if count is not None}
        options = [
            s or tuple(dict.fromkeys(t for t in pair if t in readable)) for s, *pair in zip(shown, *said, strict=True)
        ]
        steps = [split_steps(text, format.steps) for text in texts]
        fronts = [format.prompt_of(q) for q in questions]
        sides = []
        for model in models:
            own = templated(fronts, model.tokenizer) if written["template"] else fronts
            sides.append(spans(model.tokenizer, own, steps, format.cue, options, template=written["template"]))
        for question, one, other in zip(questions, *sides, strict=True):
            if one != other:
                raise InputError(
                    f"{models[0].name} and {models[1].name} read question {question.id} with its chain as different "
                    "tokens; give one tokenizer to both (--tokenizer)"
                )
        read = [replace(one, ends=one.ends[:max_steps]) for one in sides[0]]
        at = [[o.index(t) if t in o else None for o, t in zip(options, side, strict=True)] for side in said]
        return cls(
            models, questions, format, chains, steps, read, [[row[0] for row in side.answers] for side in asked], at,
            [not s for s in shown],
        )  # fmt: skip

    def measured(self, question: int) -> int:
        """How many of its steps are measured."""
        return len(self.spans[question].ends)

    def truth(self, question: int) -> str:
        """The right answer as `ask` spells it."""
        asked = self.questions[question]
        return asked.answer if asked.alternatives else str(self.format.right(asked))

    def store(self, partial: Path | None, side: int, facts: dict[str, Any]) -> "Store | None":
        """Of one model, where it has files."""
        from finetune_lens.stream import Store

        model = self.models[side]
        if partial is None or not model.fingerprint:
            return None
        whose = {"analysis": f"inside-{SIDES[side]}", "model": model.describe() | {"adapted": model.adapted}}
        return Store(partial, model.fingerprint, facts | whose)

    def key(self, question: int, side: int) -> str:
        """Changes with whatever of the chain and its answer is measured."""
        text = repr((self.questions[question].id, self.spans[question], self.own[side][question]))
        return hashlib.sha256(text.encode()).hexdigest()


def given_chains(
    chains: Any, questions: "Sequence[Question]", *, others: "Callable[[str], bool]" = lambda name: False
) -> "list[Chain] | None":
    """One chain a question, where a model is not to write them.

    Args:
        others: whether an id is that of a question whose chains are passed over.
    """
    from finetune_lens.cot.chains import read_chains

    if isinstance(chains, str) and chains in SIDES:
        return None
    if isinstance(chains, str) and chains == "question":
        without = [q.id for q in questions if q.chain is None]
        if without:
            raise InputError(f"{len(without)} of {len(questions)} questions have no `chain`: {', '.join(without[:3])}")
        return [Chain(q.id, 0, str(q.chain)) for q in questions]
    if isinstance(chains, str | Path):
        path = Path(chains)
        if path.suffix != ".jsonl":
            raise InputError(f"chains: expected {', '.join(OWN)} or a .jsonl file of chains; found {chains!r}")
        chains = read_chains(path, questions, others=others)
    first: dict[str, Chain] = {}
    for chain in chains:
        first.setdefault(chain.question, chain)
    if without := [q.id for q in questions if q.id not in first]:
        raise InputError(f"no chain for {len(without)} of {len(questions)} questions: {', '.join(without[:3])}")
    return [first[q.id] for q in questions]


def written_chains(
    model: "HookedModel", questions: "Sequence[Question]", format: "Format", max_tokens: int, partial: Path | None,
    *, room: int, template: bool, **options: Any,
) -> "list[Chain]":  # fmt: skip
    """What the model writes by likeliest tokens, with `room` left for an answer; options as of `generate.sample`.

    Raises:
        InputError: as `generate.sample`; a question that leaves no room for a chain.
    """
    from finetune_lens.cot.generate import token_ids
    from finetune_lens.cot.trials import require_room, written_within

    names = [q.id for q in questions]
    prompts = token_ids(model.require_tokenizer(), [format.prompt_of(q) for q in questions], names, template)
    require_room(model, questions, prompts, room)
    return written_within(
        model, prompts, names=names, room=room, temperature=0, max_tokens=max_tokens,
        stop=format.stop, partial=None if partial is None else partial / "chains", **options,
    )  # fmt: skip
