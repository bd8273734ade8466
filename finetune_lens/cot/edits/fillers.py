"""Text without content in a chain's place.

>>> filler(3)
' ... ... ...'
"""

from typing import TYPE_CHECKING

from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def filler(n_tokens: int, tokenizer: "PreTrainedTokenizerBase | None" = None, *, unit: str = " ...") -> str:
    """`unit` over and over: as often as fits into `n_tokens` of the tokenizer; without one, `n_tokens` times.

    Where the unit is one token and does not join with its like, that is exactly `n_tokens`.

    Raises:
        InputError: an empty unit, or a negative length.
    """
    if n_tokens < 0 or not unit:
        raise InputError(f"filler: expected a unit and 0 tokens or more, found {unit!r} and {n_tokens}")
    if tokenizer is None:
        return unit * n_tokens
    few, many = 0, n_tokens + 1  # the first fits, the second does not: a unit that vanishes is left out
    while many - few > 1:
        count = (few + many) // 2
        if len(tokenizer(unit * count, add_special_tokens=False)["input_ids"]) <= n_tokens:
            few = count
        else:
            many = count
    return unit * few
