"""Where a prompt mentions what one of its fields holds.

>>> parse("label:first"), parse("subject"), parse("label:1+2")
(('label', 0, 0), ('subject', -1, 0), ('label', 1, 2))
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.prompts import Encoded, Prompt

WORDS = {"first": 0, "last": -1, None: -1}
NAME = re.compile(r"(?P<field>[^\W\d]\w*)(?::(?P<which>first|last|-?\d+))?(?P<offset>[+-]\d+)?")


def parse(name: str) -> tuple[str, int, int]:
    """`FIELD:first`, `FIELD:last`, `FIELD:N`: the field and the number of the mention (the last where none is said).

    The third number says how many tokens after the mention's last one: `FIELD:first+2`.

    Raises:
        InputError: not such a name.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise InputError(
            f"{name!r} is no position; expected a number such as -1, or a field of the prompts and which of its "
            "mentions, such as label:first, label:last, label:1 or label:first+2 (two tokens on)"
        )
    which = found["which"]
    return found["field"], WORDS[which] if which in WORDS else int(which), int(found["offset"] or 0)


def tokens_of(prompt: Prompt, encoded: Encoded, row: int, field: str, tokenizer: Any) -> np.ndarray:
    """(pos,): True on the tokens that hold the first mention of the field's text, whether or not they hold more.

    Raises:
        InputError: the prompt has no such field, or does not mention it.
    """
    begin, end = _found(prompt, encoded, row, field, tokenizer, whole=False)[0]
    held = np.zeros(encoded.ids.shape[1], bool)
    held[np.flatnonzero(encoded.mask[row].numpy())[begin:end]] = True
    return held


def column_of(prompt: Prompt, encoded: Encoded, row: int, name: str, tokenizer: Any) -> int:
    """The column of the last token of a mention (or of one so many tokens on), which begins and ends where tokens do.

    Raises:
        InputError: the prompt has no such field, or fewer such mentions.
    """
    field, number, offset = parse(name)
    found = _found(prompt, encoded, row, field, tokenizer, whole=True)
    if not -len(found) <= number < len(found):
        raise InputError(f"prompt {prompt.id}: position {name!r} does not exist: {field!r} is mentioned {len(found)} ×")
    own = np.flatnonzero((encoded.mask[row] & encoded.prompt_columns[row]).numpy())
    at = found[number][1] - 1 + offset
    if not 0 <= at < len(own) or not encoded.text_columns[row, own[at]]:
        count = int(encoded.text_columns[row].sum())
        raise InputError(f"prompt {prompt.id}: position {name!r} lies outside the prompt, which has {count} tokens")
    return int(own[at])


def own_column(prompt: Prompt, encoded: Encoded, row: int, number: int) -> int:
    """The column of a token of the prompt's own text, counted from its first: within a chat template too.

    Raises:
        InputError: the text has fewer tokens.
    """
    own = encoded.text_columns[row].nonzero()[:, 0]
    if number >= len(own):
        raise InputError(f"prompt {prompt.id}: position {number} does not exist, its text has {len(own)} tokens")
    return int(own[number])


def _found(
    prompt: Prompt, encoded: Encoded, row: int, field: str, tokenizer: Any, *, whole: bool
) -> Sequence[tuple[int, int]]:
    """(first, after the last) token of every mention in the prompt's own text, not in a chat template around it.

    `whole`: only those that begin and end with a token.
    """
    given = prompt.fields.get(field)
    wanted = "".join(given.split()) if isinstance(given, str) else ""
    told = encoded.mask[row] & encoded.prompt_columns[row]
    ids = encoded.ids[row, encoded.mask[row]].tolist()[: int(told.sum())]
    own = encoded.text_columns[row, encoded.mask[row]].numpy()
    text, starts, ends = spelt(tuple(ids), tokenizer)
    found, at = [], text.find(wanted) if wanted else -1
    while at >= 0:
        begin, end = np.flatnonzero(ends > at)[0], np.flatnonzero(starts < at + len(wanted))[-1] + 1
        as_asked = not whole or (starts[begin] == at and ends[end - 1] == at + len(wanted))
        if as_asked and own[begin:end].all():
            found.append((int(begin), int(end)))
        at = text.find(wanted, at + 1)
    if not found:
        raise InputError(f"prompt {prompt.id}: expected a field {field!r} holding a part of its text; found {given!r}")
    return found


@functools.lru_cache(maxsize=1 << 14)  # every position of a prompt reads it
def spelt(ids: tuple[int, ...], tokenizer: Any) -> tuple[str, np.ndarray, np.ndarray]:
    """The text of some tokens without its white space, and where in it each token begins and ends.

    Read from ever longer beginnings: a token alone may lose its space, or be a part of a character.
    """
    read = [tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) for end in range(1, len(ids) + 1)]
    ends = np.array([len("".join(text.rstrip("\ufffd").split())) for text in read])
    starts = np.concatenate([[0], ends[:-1]])
    ends += np.array([text.endswith("\ufffd") for text in read]) & (ends == starts)  # its character is still to come
    return "".join(read[-1].split()), starts, ends
