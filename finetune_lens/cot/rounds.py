"""Which chains does a comparison of hints need, and where are they from? Each round of them has prompts of one kind.

    ""                 the questions as they are, once for all hints that leave them so
    HINT               with the hint
    HINT-without       without it, where that is another prompt than the question alone: worked examples in turn

A chain is kept in files under the id ROUND/QUESTION, without a hint under the question's own. All rounds of a model are
sampled by the same random numbers of each question: what differs between two chains is what the hint did.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_lens.cot.chains import Chain, read_chains, write_chains
from finetune_lens.cot.hints import Posed
from finetune_lens.cot.questions import Format
from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel

PLAIN = ""

Rounds = dict[str, dict[str, str]]  # name of the round → id of a question → its prompt
Chains = dict[str, dict[str, dict[int, Chain]]]  # the same → number of the sample → chain


def rounds_of(posed: Mapping[str, Sequence[Posed]], format: Format) -> Rounds:
    """The rounds that are needed of questions posed with each hint, by its name."""
    rounds: Rounds = {PLAIN: {}}
    for name, rows in posed.items():
        for row in rows:
            bare = row.plain == format.prompt_of(row.question)
            rounds.setdefault(PLAIN if bare else _without(name), {})[row.question.id] = row.plain
            rounds.setdefault(name, {})[row.question.id] = row.prompt
    return {name: prompts for name, prompts in rounds.items() if prompts}


def sampled(
    model: "HookedModel", rounds: Rounds, hints: Sequence[str], *, room: int, template: bool, **options: Any
) -> Chains:
    """Chains that the model writes; each leaves `room` for an answer behind all prompts that it is asked after.

    Args:
        options: of `generate.sample`.

    Raises:
        InputError: as `generate.sample`; a prompt that leaves no room for a chain.
    """
    from finetune_lens.cot.generate import token_ids
    from finetune_lens.cot.trials import room_after, written_within

    tokenizer = model.require_tokenizer()
    ids = {
        name: dict(zip(prompts, token_ids(tokenizer, [*prompts.values()], [*prompts], template), strict=True))
        for name, prompts in rounds.items()
    }
    longest = {name: {question: len(tokens) for question, tokens in held.items()} for name, held in ids.items()}
    for both in (_of(name, rounds) for name in hints):
        for question in rounds[both[1]]:
            most = max(len(ids[name][question]) for name in both)
            for name in both:
                longest[name][question] = max(longest[name][question], most)
    for name, lengths in longest.items():
        for question, length in lengths.items():
            if room_after(model, range(length)) <= room:
                raise InputError(
                    f"question {question} with the hint {name or hints[0]} has {length} tokens, which leaves "
                    f"{model.name} no room for a chain and an answer; shorten it, or leave the hint out (--hints)"
                )
    found: Chains = {}
    for name, held in ids.items():
        rooms = [room + longest[name][question] - len(tokens) for question, tokens in held.items()]
        found[name] = {question: {} for question in held}
        for chain in written_within(model, [*held.values()], names=[*held], room=rooms, **options):
            found[name][chain.question][chain.sample] = chain
    return found


def supplied(
    path: Path, rounds: Rounds, hints: Sequence[str], *, others: Callable[[str], bool] = lambda name: False
) -> Chains:
    """Chains of a file.

    Args:
        others: whether an id is that of a question that is passed over, with a hint or without.

    Raises:
        InputError: as `read_chains`; samples of a question that are not the same without and with a hint.
    """
    names: dict[str, tuple[str, str]] = {}
    for name, prompts in rounds.items():
        for question in prompts:
            if _named(name, question) in names:
                raise InputError(
                    f"the question {_named(name, question)!r} is called as a chain with a hint is; rename it"
                )
            names[_named(name, question)] = name, question
    found: Chains = {name: {question: {} for question in prompts} for name, prompts in rounds.items()}
    for chain in read_chains(path, names, others=lambda name: others(name) or others(name.partition("/")[2])):
        name, question = names[chain.question]
        found[name][question][chain.sample] = dataclasses.replace(chain, question=question)
    for without, name in (_of(name, rounds) for name in hints):
        for question in rounds[name]:
            mine, theirs = sorted(found[name][question]), sorted(found[without][question])
            if mine != theirs:
                raise InputError(
                    f"{path}: {_named(name, question)!r} has the samples {mine} and {_named(without, question)!r} "
                    f"{theirs}; chains without and with a hint are compared sample by sample, so give both the same"
                )
    return found


def paired(hint: str, row: Posed, rounds: Rounds, chains: Chains) -> list[tuple[Chain, Chain]]:
    """The chains of a question without and with a hint, sample by sample."""
    one, other = (chains[name][row.question.id] for name in _of(hint, rounds))
    return [(one[number], other[number]) for number in sorted(one)]


def save(path: Path, chains: Chains) -> None:
    """Write chains of all rounds as JSONL that `supplied` reads."""
    kept = [
        dataclasses.replace(chain, question=_named(name, chain.question))
        for name, questions in chains.items()
        for numbered in questions.values()
        for _, chain in sorted(numbered.items())
    ]
    write_chains(path, kept)


def _without(hint: str) -> str:
    return f"{hint}-without"


def _of(hint: str, rounds: Rounds) -> tuple[str, str]:
    """The rounds of a hint's chains, without and with it."""
    return (_without(hint) if _without(hint) in rounds else PLAIN), hint


def _named(name: str, question: str) -> str:
    """The id of a chain in a file."""
    return f"{name}/{question}" if name else question
