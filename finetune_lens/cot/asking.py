"""What does a model answer after each of several texts that stand where its chain of thought would?

A row is one chain, c; its cuts are texts c_1 … c_m, most often beginnings of it, or such with an edit and another end.
Behind each comes the format's cue, then the answer:

    options    the likeliest:   argmax_o log p(o | prompt, c_k, cue), summed over the option's tokens
    open       what the model writes greedily, read by `extract_answer`; None where that tells no answer

Cost: that of `branches`: what the cuts of a row share with its chain is computed once. Equal rows are asked once.

>>> from finetune_lens import ModelPair, zoo
>>> from finetune_lens.cot.questions import Format, read_questions
>>> folder = zoo.path("traces")
>>> model = ModelPair.load(folder / "base", folder / "faithful").tuned
>>> [question] = read_questions(folder / "questions.jsonl", limit=1)
>>> question.chain, question.answer
('a:0;b:2;c:8;d:6;e:5;f:7;', '7')
>>> format = Format.load(folder / "format.json")
>>> ask(model, [question], format, [question.chain], [["a:0;b:2;", "a:0;b:2;c:8;", question.chain]]).answers
[['2', '8', '7']]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.cot.answers import extract_answer
from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from finetune_lens.cot.layout import Layout
    from finetune_lens.cot.questions import Format, Question
    from finetune_lens.hooked import HookedModel

SCORINGS = ("auto", "exact")
GROWN = 2048  # tokens of cuts, cues and options behind one trunk: attention among them grows with the square
ANNOUNCES = "####"  # a stop text of chains that may begin an answer


@dataclass(frozen=True, eq=False)
class Asked:
    """What a model answers after each of several texts of each row; made by `ask`.

    Attributes:
        answers: of each row, by cut: the alternative's text, or what `extract_answer` reads; None where it cannot.
        texts: the likeliest option, or what the model wrote.
        logprob: (row, cut, option) summed log-probability in nats, in the order of `question.alternatives`; NaN where
            there is none, as for answers that were written.
        moved, merged: of `layout.Layout`, over the rows that were asked.
    """

    answers: list[list[str | None]]
    texts: list[list[str]]
    logprob: np.ndarray
    moved: int
    merged: int

    def probability(self) -> np.ndarray:
        """(row, cut, option) of each option among the row's options; NaN where there is none."""
        if not self.logprob.shape[-1]:
            return self.logprob
        most = np.max(self.logprob, axis=-1, keepdims=True, initial=-np.inf, where=~np.isnan(self.logprob))
        odds = np.exp(self.logprob - most)
        with np.errstate(invalid="ignore"):
            return odds / np.nansum(odds, axis=-1, keepdims=True)


def require_answers(scoring: str, max_tokens: int) -> None:
    """Raise InputError where `ask` would, before anything is written that is to be answered."""
    if scoring not in SCORINGS:
        raise InputError(f"scoring is one of {', '.join(SCORINGS)}; found {scoring!r}")
    if max_tokens < 1:
        raise InputError(f"an answer has at least 1 token; found {max_tokens} (answer_tokens, --answer-tokens)")


def ask(
    model: "HookedModel",
    questions: "Sequence[Question]",
    format: "Format",
    wholes: Sequence[str],
    cuts: Sequence[Sequence[str]],
    *,
    prompts: Sequence[str] | None = None,
    scoring: str = "auto",
    template: bool = False,
    max_tokens: int = 32,
    batch_size: int | None = None,
    progress: bool = False,
) -> Asked:
    """The model's answer behind every cut of every row.

    Args:
        questions: of each row.
        wholes: the chain of each row; cuts that begin as it does are cheap.
        cuts: of each row, the texts behind which it is asked.
        prompts: the text before the chain of each row, by default `format.prompt_of` its question.
        scoring: "auto": options where the question has alternatives; "exact": every answer is written and read.
        template: put the prompts as a user's messages through the tokenizer's chat template.
        max_tokens: of an answer that is written.
        batch_size: rows at once; by default as many as memory holds.

    Raises:
        InputError: no tokenizer or chat template, a character that the tokenizer does not know, a text too long for
            the model, log-probabilities that are NaN.
    """
    require_answers(scoring, max_tokens)
    options = [format.options_of(q) if scoring == "auto" else () for q in questions]
    laid, number = _laid_out(model, questions, format, wholes, cuts, options, prompts, template)
    given = {"batch_size": batch_size, "progress": progress}
    scores = _scored(model, laid, **given)
    written = _written(model, laid, format, max_tokens=max_tokens, **given)
    answers: list[list[str | None]] = []
    texts: list[list[str]] = []
    for row, (question, shown) in enumerate(zip(questions, options, strict=True)):
        cut = range(len(cuts[row]))
        if shown:
            best = [int(scores[number[row], k, : len(shown)].argmax()) for k in cut]
            answers.append([question.alternatives[o] for o in best])
            texts.append([shown[o] for o in best])
        else:
            texts.append([written[number[row], k] for k in cut])
            answers.append([extract_answer(text, question, format) for text in texts[-1]])
    return Asked(answers, texts, scores[number], laid.moved, laid.merged)


def score_right(
    model: "HookedModel",
    questions: "Sequence[Question]",
    format: "Format",
    wholes: Sequence[str],
    cuts: Sequence[Sequence[str]],
    *,
    prompts: Sequence[str] | None = None,
    template: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """(row, cut) log-probability, in nats, of the right answer behind every cut, of open questions too; as `ask`."""
    options = [(format.answer_of(question),) for question in questions]
    laid, number = _laid_out(model, questions, format, wholes, cuts, options, prompts, template)
    return _scored(model, laid, batch_size=batch_size, progress=progress)[number, :, 0]


def _laid_out(
    model: "HookedModel", questions: "Sequence[Question]", format: "Format", wholes: Sequence[str],
    cuts: Sequence[Sequence[str]], options: Sequence[tuple[str, ...]], prompts: Sequence[str] | None, template: bool,
) -> "tuple[Layout, list[int]]":  # fmt: skip
    """The different rows as tokens, and which of them each row is."""
    from finetune_lens.cot.generate import templated
    from finetune_lens.cot.layout import lay_out
    from finetune_lens.prompts import Prompt, encode

    if not len(questions) == len(wholes) == len(cuts) == len(questions if prompts is None else prompts):
        raise InputError(f"expected a question, chain, cuts and prompt a row; found {len(questions)} questions")
    tokenizer = model.require_tokenizer()
    before = [format.prompt_of(q) for q in questions] if prompts is None else list(prompts)
    if template:
        before = templated(before, tokenizer)
    keys = [(*given[:2], tuple(given[2]), given[3]) for given in zip(before, wholes, cuts, options, strict=True)]
    rows: dict[tuple, str] = {}
    for key, question in zip(keys, questions, strict=True):
        rows.setdefault(key, question.id)
    texts = [prompt + whole for prompt, whole, *_ in rows]
    # For characters that it does not know: here, where the question's name is known.
    named = {text: name for text, name in zip(texts, rows.values(), strict=True) if text}
    named |= {
        text: name
        for (_, whole, found, _), name in rows.items()
        for text in found
        if text.strip() and not whole.startswith(text)
    }
    encode([Prompt(text, id=f"of question {name}") for text, name in named.items()], tokenizer, need_answer=False)
    truncations = [[prompt + text for text in found] for prompt, _, found, _ in rows]
    laid = lay_out(tokenizer, texts, truncations, format.cue, [key[3] for key in rows], template=template)
    _require_length(model, laid, [*rows.values()])
    at = {key: number for number, key in enumerate(rows)}
    return laid, [at[key] for key in keys]


def _require_length(model: "HookedModel", laid: "Layout", names: list[str]) -> None:
    """Refuse here, where the question's name is known."""
    most = getattr(model.module.config.get_text_config(), "max_position_embeddings", None)
    if not most:
        return
    for row, name in enumerate(names):
        for cut, cue, found in zip(laid.cuts[row], laid.cues[row], laid.branches[row], strict=True):
            needed = cut + max([len(cue) + 1, *(len(branch.tokens) - 1 for branch in found)])
            if needed > most:
                raise InputError(
                    f"question {name}: prompt, chain, cue and answer are {needed} tokens, and {model.name} reads "
                    f"{most}; take shorter chains (max_tokens, --max-tokens)"
                )


def _pieces(laid: "Layout", *, written: int) -> list[tuple[int, list[int]]]:
    """Rows, each with as many of its cuts as go behind one trunk; `written` tokens are added to each cut."""
    found: list[tuple[int, list[int]]] = []
    for row, cues in enumerate(laid.cues):
        if bool(written) == any(laid.branches[row]):
            continue
        grown = GROWN
        for k, cue in enumerate(cues):
            size = len(cue) + sum(branch.scored for branch in laid.branches[row][k]) + written
            grown += size
            if grown > GROWN:
                found.append((row, []))
                grown = size
            found[-1][1].append(k)
    return found


def _scored(model: "HookedModel", laid: "Layout", **given: object) -> np.ndarray:
    """(row, cut, option); NaN in rows without options."""
    from finetune_lens.cot.branches import score_branches

    most = max((len(b) for found in laid.branches for b in found), default=0)
    scores = np.full((len(laid.cuts), max(map(len, laid.cuts), default=0), most), np.nan)
    pieces = _pieces(laid, written=0)
    if not pieces:
        return scores
    prefixes = [laid.prefixes[row] for row, _ in pieces]
    cuts, branches = ([[held[row][k] for k in some] for row, some in pieces] for held in (laid.cuts, laid.branches))
    for (row, some), values in zip(pieces, score_branches(model, prefixes, cuts, branches, **given), strict=True):
        scores[row, some, : values.shape[-1]] = values[: len(some)]
        if any(np.isnan(values[n, : len(laid.branches[row][k])]).any() for n, k in enumerate(some)):
            raise InputError(f"{model.name} gives log-probabilities that are NaN: nothing can follow from them")
    return scores


def _written(
    model: "HookedModel", laid: "Layout", format: "Format", *, max_tokens: int, **given: object
) -> dict[tuple[int, int], str]:
    """By row and cut, of those without options."""
    from finetune_lens.cot.branches import greedy

    pieces = _pieces(laid, written=max_tokens)
    if not pieces:
        return {}
    prefixes = [laid.prefixes[row] for row, _ in pieces]
    cuts, cues = ([[held[row][k] for k in some] for row, some in pieces] for held in (laid.cuts, laid.cues))
    stop = [text for text in format.stop if text not in (format.cue.strip(), ANNOUNCES)]
    found = greedy(model, prefixes, cuts, cues, max_tokens=max_tokens, stop=stop, **given)
    return {
        (row, k): answer.text
        for (row, some), row_answers in zip(pieces, found, strict=True)
        for k, answer in zip(some, row_answers, strict=True)
    }
