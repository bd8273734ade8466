"""Where do the steps of a chain lie among its tokens, and which tokens does its answer have?

A token belongs to the first step whose end it reaches: step i has the tokens that prompt and steps 0 … i share with
the whole text, tokenised as one, and that steps 0 … i − 1 do not. A token across two steps is the later one's.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> tokenizer = ModelPair.load(folder / "base", folder / "full").base.tokenizer
>>> [one] = spans(tokenizer, ["<copy>gaf="], [["ga", "f"]], "", [("g",)])
>>> one.ends, one.span(1), one.answers[0].scored
((8, 9), range(8, 9), 1)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_lens.cot.layout import Branch, lay_out
from finetune_lens.errors import InputError


@dataclass(frozen=True)
class Spans:
    """A chain as tokens; made by `spans`.

    Attributes:
        front: tokens of the prompt, with special ones before it.
        ends: how many tokens there are up to the end of each step.
        ids: tokens of prompt, chain and cue, as far as all options begin with them.
        answers: of each option the tokens that follow the first `cut`, the last `scored` its own.
        cut: how many of `ids` are the whole text's own.
    """

    front: int
    ends: tuple[int, ...]
    ids: tuple[int, ...]
    cut: int
    answers: tuple[Branch, ...]

    def span(self, step: int) -> range:
        """The tokens of a step; empty where all of them are a later step's."""
        return range((self.front, *self.ends)[step], self.ends[step])

    def row(self, option: int) -> list[int]:
        """All tokens, with those of an option but its last."""
        return [*self.ids[: self.cut], *self.answers[option].tokens[:-1]]

    def reads(self, option: int) -> range:
        """The tokens of `row` behind which the option's are read."""
        tokens, scored = self.answers[option]
        return range(self.cut + len(tokens) - scored - 1, self.cut + len(tokens) - 1)

    def own(self, option: int) -> tuple[int, ...]:
        """The option's own tokens."""
        tokens, scored = self.answers[option]
        return tokens[-scored:]


def spans(
    tokenizer: Any,
    fronts: Sequence[str],
    steps: Sequence[Sequence[str]],
    cue: str,
    options: Sequence[Sequence[str]],
    *,
    template: bool = False,
) -> list[Spans]:
    """Tokens of prompt + steps + cue + option, a row a chain.

    Args:
        fronts: the prompt of each chain.
        steps: of each chain; joined they are the chain.
        options: what may follow the cue; none where there is no answer.
        template: the prompts hold a chat template with its special tokens: none are put in front.

    Raises:
        InputError: an unknown character, a prompt without tokens.

    Cost: tokenises each beginning of a chain twice.
    """
    wholes = [front + "".join(row) for front, row in zip(fronts, steps, strict=True)]
    beginnings = [
        [front + "".join(row[:k]) for k in range(len(row) + 1)] for front, row in zip(fronts, steps, strict=True)
    ]
    apart = lay_out(tokenizer, wholes, beginnings, "", [()] * len(wholes), template=template)
    asked = lay_out(tokenizer, wholes, [[whole] for whole in wholes], cue, options, template=template)
    found = []
    for row, (front, *ends) in enumerate(apart.cuts):
        cut, cues, branches = (held[row][0] for held in (asked.cuts, asked.cues, asked.branches))
        if not front:
            raise InputError(f"row {row}: expected a prompt of one token or more before the chain, found none")
        cue_tokens = cues if not branches else branches[0].tokens[: len(branches[0].tokens) - branches[0].scored]
        ids = (*asked.prefixes[row][:cut], *cue_tokens)
        found.append(Spans(min(front, cut), tuple(min(end, cut) for end in ends), ids, cut, tuple(branches)))
    return found
