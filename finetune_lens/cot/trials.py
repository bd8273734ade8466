"""What takes a chain's place in each test of whether the answer follows from it.

Lanham et al. 2023, "Measuring Faithfulness in Chain-of-Thought Reasoning" (arXiv 2307.13702), §2. Of a chain of the
steps 1 … n, at place k of 0 … n:

    early        its first k steps
    mistakes     the steps before k, step k + 1 with a mistake, and what the model writes after it; at n the chain
    paraphrase   the first k steps in other words, and what the model writes after them; at 0 the chain
    filler       " ..." over and over, of k/n of the chain's tokens
    resample     the first k steps, and what the model writes after them; at n the chain: what sampling again does by
                 itself, which is in mistakes and paraphrase too

>>> from finetune_lens.cot.questions import Question
>>> item = Item.of(Question("q", "How much?", "18"), Chain("q", 0, "She has 9. So 9 * 2 = 18."), "sentence")
>>> early(item).cuts
('', 'She has 9.', 'She has 9. So 9 * 2 = 18.')
>>> beginnings("mistakes", item, ["She has 7.", None])
{0: 'She has 7.'}
>>> beginnings("paraphrase", item, [None, " Hence it is 18."])
{2: 'She has 9. Hence it is 18.'}
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finetune_lens.cot.chains import CUT_OFF, Chain
from finetune_lens.cot.edits import CONTENT, STRUCTURE, Editor, LocalEditor, Place, corrupt, filler, generator_of
from finetune_lens.cot.steps import split_steps
from finetune_lens.errors import InputError
from finetune_lens.stream import Store

if TYPE_CHECKING:
    from finetune_lens.cot.questions import Format, Question
    from finetune_lens.hooked import HookedModel

EDITED = {"mistakes": "mistake", "paraphrase": "paraphrase"}  # test → what is done to its steps
CORRUPTED = {"structure": STRUCTURE, "content": CONTENT}
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
AT_ONCE = 64  # steps that a local editor rewrites before they are kept
FOREIGN = 200  # steps of other questions' chains to insert


class Item(NamedTuple):
    """A chain and its question.

    Attributes:
        steps: joined they are the chain's text; none where that is blank.
    """

    question: "Question"
    chain: Chain
    steps: tuple[str, ...]

    @classmethod
    def of(cls, question: "Question", chain: Chain, how: str) -> "Item":
        return cls(question, chain, tuple(split_steps(chain.text, how)) if chain.text.strip() else ())


class Trial(NamedTuple):
    """The texts behind which a model is asked, for one chain and test.

    Attributes:
        whole: what most of them begin as.
        cuts: by place, 0 … n; None where it is not asked: there is no edit, or the chain stands there as it is.
        unedited: steps that the editor left as they were.
        cut_off: texts that the model wrote on to the limit or to what it cannot read again, or had no room to write on
            after.
    """

    whole: str
    cuts: tuple[str | None, ...]
    unedited: int = 0
    cut_off: int = 0


def early(item: Item, *, every: bool = True) -> Trial:
    """Its beginnings; with `every` False the empty one and the chain alone. A blank chain has these two anyway."""
    places = range(1, len(item.steps)) if every else []
    found = ["".join(item.steps[:k]) if k in places else None for k in range(1, len(item.steps))]
    return Trial(item.chain.text, ("", *found, item.chain.text))


def filled(item: Item, tokenizer: object) -> Trial:
    """Filler of 0 to the chain's number of tokens."""
    n, tokens = len(item.steps), len(tokenizer(item.chain.text, add_special_tokens=False)["input_ids"])
    cuts = tuple(filler(int(k * tokens / n + 0.5), tokenizer) for k in range(n + 1))
    return Trial(cuts[-1], cuts)


def edits_of(items: Sequence[Item], editor: Editor, *, partial: Path | None = None) -> list[list[str | None]]:
    """By chain and step: what stands there instead, or None.

    Args:
        partial: where a local model's texts are kept.
    """
    places = [Place(item.question, item.chain.sample, item.steps, n) for item in items for n in range(len(item.steps))]
    found = _by_model(places, editor, partial) if isinstance(editor, LocalEditor) else editor(places)
    texts = iter(found)
    return [[next(texts) for _ in item.steps] for item in items]


def _by_model(places: Sequence[Place], editor: LocalEditor, partial: Path | None) -> list[str | None]:
    """A step's text decides what is written; so each is written and kept once."""
    store = None
    if partial is not None and editor.model.fingerprint:
        facts = {"analysis": "edits", "instruction": editor.instruction, "max_tokens": editor.max_tokens}
        store = Store(partial, editor.model.fingerprint, facts | {"model": editor.model.describe()})
    different = {place.steps[place.step]: place for place in places}
    found: dict[str, str | None] = {}
    for step in different if store else ():
        row = store.get(step)
        if row is not None:
            found[step] = str(row["text"]) if row["edited"] else None
    todo = [step for step in different if step not in found]
    for start in range(0, len(todo), AT_ONCE):
        some = todo[start : start + AT_ONCE]
        for step, text in zip(some, editor([different[step] for step in some]), strict=True):
            found[step] = text
            if store:
                store.put(step, {"text": text or "", "edited": text is not None})
    return [found[place.steps[place.step]] for place in places]


def beginnings(test: str, item: Item, edits: Sequence[str | None]) -> dict[int, str]:
    """Place → the text after which the model goes on writing; places without an edit are left out."""
    n, steps = len(item.steps), item.steps
    if test == "resample":
        return {k: "".join(steps[:k]) for k in range(n)}
    if test == "mistakes":
        return {k: "".join(steps[:k]) + edit for k, edit in enumerate(edits) if edit is not None}
    said = [step if edit is None else edit for step, edit in zip(steps, edits, strict=True)]
    first = next((k for k, edit in enumerate(edits) if edit is not None), n)
    return {k: "".join(said[:k]) for k in range(first + 1, n + 1)}


def carried_on(test: str, item: Item, begun: Mapping[int, str], rests: Mapping[int, Chain], unedited: int) -> Trial:
    """What was begun and what the model wrote after it, by place."""
    cuts = tuple(begun[k] + rests[k].text if k in rests else None for k in range(len(item.steps) + 1))
    whole = cuts[max(rests)] if test == "paraphrase" and rests else item.chain.text
    cut_off = sum(rest.ending in CUT_OFF for rest in rests.values()) + len(begun) - len(rests)
    return Trial(whole, cuts, unedited, cut_off)


def corrupted(item: Item, kind: str, *, seed: int, foreign: Sequence[str]) -> list[str | None]:
    """The chain with each of FRACTIONS of what `kind` names destroyed; None where it has nothing of that kind."""
    if not item.steps:
        return [None] * len(FRACTIONS)
    number = (*STRUCTURE, *CONTENT).index(kind)
    found = []
    for n, fraction in enumerate(FRACTIONS):
        generator = generator_of(seed, item.question.id, (item.chain.sample * 100 + number) * 10 + n)
        steps = corrupt(kind, item.steps, fraction, generator, question=item.question, foreign=foreign)
        found.append(None if steps is None else "".join(steps))
    return found


def foreign_steps(items: Sequence[Item], question: str, *, seed: int) -> list[str]:
    """Steps of other questions' chains, at most FOREIGN of them."""
    others = sorted({step for item in items if item.question.id != question for step in item.steps})
    chosen = generator_of(seed, question, 0).permutation(len(others))[:FOREIGN]
    return [others[n] for n in chosen]


def write_on(
    model: "HookedModel",
    begun: Mapping[tuple[str, int, int], tuple[str, str]],
    *,
    test: str,
    template: bool,
    room: int,
    **options: object,
) -> dict[tuple[str, int, int], Chain]:
    """What the model writes after each beginning of a chain; those that leave no room for it are left out.

    Args:
        begun: (question, sample, place) → the question's prompt, and the text from which to go on.
        room: tokens that cue and answer need.
        options: of `generate.sample`.
    """
    prompts = tokens_of(model, [*begun.values()], template=template)
    left = {key: ids for key, ids in zip(begun, prompts, strict=True) if room_after(model, ids) >= room}
    if not left:
        return {}
    names = [json.dumps([test, *key]) for key in left]
    return dict(zip(left, written_within(model, [*left.values()], names=names, room=room, **options), strict=True))


def tokens_of(model: "HookedModel", texts: Sequence[tuple[str, str]], *, template: bool) -> list[list[int]]:
    """Token ids of each question's prompt, with the chat template around it or without, and what is after it."""
    from finetune_lens.cot.generate import templated

    tokenizer, joined = model.require_tokenizer(), [prompt + text for prompt, text in texts]
    if template:
        fronts = templated([prompt for prompt, _ in texts], tokenizer)
        joined = [front + text for front, (_, text) in zip(fronts, texts, strict=True)]
        return tokenizer(joined, add_special_tokens=False)["input_ids"] if joined else []
    return _encoded(joined, tokenizer)


def _encoded(texts: Sequence[str], tokenizer: object) -> list[list[int]]:
    """With the special tokens that the tokenizer puts in front."""
    from finetune_lens.prompts import Prompt, encode

    if not texts:
        return []
    encoded = encode([Prompt(text) for text in texts], tokenizer, need_answer=False)
    return [ids[mask].tolist() for ids, mask in zip(encoded.ids, encoded.mask, strict=True)]


def room_after(model: "HookedModel", prompt: Sequence[int]) -> float:
    """How many more tokens the model reads."""
    most = getattr(model.module.config.get_text_config(), "max_position_embeddings", None)
    return (most or float("inf")) - len(prompt)


def answer_room(
    model: "HookedModel", questions: "Sequence[Question]", format: "Format", *, scoring: str, answer_tokens: int
) -> int:
    """Tokens that the cue and the longest answer of these questions need."""
    options = [format.options_of(q) if scoring == "auto" else () for q in questions]
    texts = [format.cue + option for option in dict.fromkeys(["", *(o for some in options for o in some)])]
    longest = max(len(ids) for ids in model.require_tokenizer()(texts, add_special_tokens=False)["input_ids"])
    return longest + (0 if all(options) else answer_tokens) + 1


def require_room(
    model: "HookedModel", questions: "Sequence[Question]", prompts: Sequence[Sequence[int]], room: int
) -> None:
    """Refuse a question whose prompt leaves no room for a chain and an answer."""
    for question, ids in zip(questions, prompts, strict=True):
        if room_after(model, ids) <= room:
            raise InputError(
                f"question {question.id} has {len(ids)} tokens, which leaves {model.name} no room for a chain and an "
                "answer; shorten the question or the format's prompt"
            )


def written_within(
    model: "HookedModel", prompts: Sequence[Sequence[int]], *, room: int | Sequence[int], max_tokens: int,
    stop: Sequence[str], **options: object,
) -> list[Chain]:  # fmt: skip
    """What `generate.sample` writes, cut off where it cannot be used: by and by texts are asked behind, not tokens.

    Cut off are the last tokens where the model would have no `room` after them, and whatever follows a token whose text
    the tokenizer has no tokens for (a vocabulary of words may hold one that it splits when it reads): the chain is
    `unreadable` then.

    Args:
        room: after every text, or after those of each prompt.
    """
    from finetune_lens.cot.generate import Ends, sample

    ends, samples, tokenizer = Ends(model, stop, max_tokens), int(options.get("samples", 1)), model.require_tokenizer()
    written = sample(model, prompts, max_tokens=max_tokens, stop=stop, **options)
    rooms = [room] * len(prompts) if isinstance(room, int) else room
    fronts = [ends.text([], [*prompt]) for prompt in prompts]
    known = [count or len(p) for count, p in zip(token_counts(fronts, tokenizer), prompts, strict=True)]
    each = [given for given in zip(prompts, rooms, fronts, known, strict=True) for _ in range(samples)]
    whole = token_counts([front + chain.text for (*_, front, _), chain in zip(each, written, strict=True)], tokenizer)
    found = []
    for (prompt, needed, front, before), chain, read in zip(each, written, whole, strict=True):
        most, tokens = max(0, room_after(model, prompt) - needed), chain.tokens

        def fits(count: int | None, kept: int, before: int = before, most: float = most) -> bool:
            """What is written as half a character is read as more tokens."""
            return count is not None and max(count - before, kept) <= most

        if fits(read, len(tokens)):
            found.append(chain)
            continue
        few, many = 0, len(tokens) + 1  # so many tokens can be used, so many cannot
        while many - few > 1:
            kept = (few + many) // 2
            (count,) = token_counts([front + ends.text([*prompt], [*tokens[:kept]])], tokenizer)
            if fits(count, kept):
                few = kept
            else:
                many, read = kept, count
        text = ends.text([*prompt], [*tokens[:few]])
        ending = "unreadable" if read is None else "length"
        found.append(Chain(chain.question, chain.sample, text, tokens[:few], ending))
    return found


def token_counts(texts: Sequence[str], tokenizer: object) -> list[int | None]:
    """How many tokens each text is, without special ones; None where the tokenizer has none for some of it."""
    from finetune_lens.prompts import _tokenised

    try:
        return [len(ids) for ids in _tokenised([*texts], [*texts], tokenizer)]
    except InputError:
        half = len(texts) // 2
        return [None] if not half else token_counts(texts[:half], tokenizer) + token_counts(texts[half:], tokenizer)
