"""Which tokens stand after each truncation of a chain, and how much of them do truncations have in common?

Truncation, cue and option are tokenised as one text, as a model would be asked. Tokens may span their boundaries; so a
truncation begins with as many of the whole chain's tokens as are also the first of that text, and what follows is a
branch: exact for any tokenizer, and short where it splits texts of one beginning alike.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> tokenizer = ModelPair.load(folder / "base", folder / "full").base.tokenizer
>>> laid = lay_out(tokenizer, ["<copy>gaf=ga"], [["<copy>gaf=", "<copy>gaf=g"]], "", [("g", "a")])
>>> laid.cuts, laid.branches[0][1]
([[6, 7]], (Branch(tokens=(18,), scored=1), Branch(tokens=(12,), scored=1)))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Branch(NamedTuple):
    """Tokens after a truncation, of which the last `scored` are an option's."""

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Layout:
    """Truncations of chains as tokens; made by `lay_out`. A list's entries are rows (chains), their entries cuts.

    Attributes:
        prefixes: tokens of prompt and whole chain.
        cuts: how many of them each truncation begins with.
        cues: the tokens from there to where the option begins.
        branches: those and an option's, for each option.
        moved: truncations whose own tokens are not the first of the chain's; what differs is part of the branch.
        merged: truncations at which an option's first token begins before the option; what the options are compared
            on begins there then.
    """

    prefixes: list[list[int]]
    cuts: list[list[int]]
    cues: list[list[tuple[int, ...]]]
    branches: list[list[tuple[Branch, ...]]]
    moved: int
    merged: int


def lay_out(
    tokenizer: Any,
    texts: Sequence[str],
    truncations: Sequence[Sequence[str]],
    cue: str,
    options: Sequence[Sequence[str]],
    *,
    template: bool = False,
) -> Layout:
    """Tokens of truncation + cue + option, each tokenised as one text, as branches of the whole text's tokens.

    Args:
        texts: prompt and whole chain, one a row.
        truncations: of each, most often its beginnings.
        options: of each row; none where answers are generated.
        template: the texts hold a chat template with its special tokens: none are put in front.

    Raises:
        InputError: an unknown character, a text without tokens.

    Cost: tokenises each truncation (2 + options) times.
    """
    from finetune_lens.prompts import Prompt, encode

    endings = [cue + option for row in options for option in row] or [cue]
    asked = [Prompt(text, id=f"of row {row}") for row, text in enumerate(texts)]
    asked += [Prompt(text, id=f"{text!r}") for text in dict.fromkeys(endings) if text]
    encoded = encode(asked, tokenizer, need_answer=False)
    special = encoded.prompt_columns & ~encoded.text_columns
    front = [] if template else encoded.ids[0][special[0]].tolist()

    def tokens(found: Sequence[str]) -> list[list[int]]:
        return [front + ids for ids in tokenizer(list(found), add_special_tokens=False)["input_ids"]] if found else []

    prefixes = tokens(texts)
    cuts, cues, branches = ([[] for _ in texts] for _ in range(3))
    moved = merged = 0
    for row, (prefix, cut_texts, row_options) in enumerate(zip(prefixes, truncations, options, strict=True)):
        heads = tokens([text + cue for text in cut_texts])
        joined = iter(tokens([text + cue + option for text in cut_texts for option in row_options]))
        for own, head in zip(tokens(cut_texts), heads, strict=True):
            wholes = [next(joined) for _ in row_options]
            begin = min([len(head), *(_shared(head, ids) for ids in wholes)])  # where options are scored from
            cut = min(_shared(prefix, head), begin)
            moved += _shared(prefix, own) < len(own)
            merged += begin < len(head)
            cuts[row].append(cut)
            cues[row].append(tuple(head[cut:]))
            branches[row].append(tuple(Branch(tuple(ids[cut:]), len(ids) - begin) for ids in wholes))
    return Layout(prefixes, cuts, cues, branches, moved, merged)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens the two have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
