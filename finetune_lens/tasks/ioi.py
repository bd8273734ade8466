"""Indirect-object identification (Wang et al. 2022, arXiv 2211.00593): who was something given to?

    When Mary and John went to the store, John gave a book to

is continued by ` Mary`, the indirect object IO; ` John` is the subject S, named twice. In an ABBA prompt the indirect
object is named first, in a BABA prompt the subject. The templates are our own. Names, places and objects are common
words, one token each with the space before it in GPT-2's vocabulary (published lists of the task have the same names),
so prompts of one template are aligned token by token.

`draw` gives rows of a prompt file; `corrupt`, by the name of the counterfactual:

- `abc`: three other names in place of the three mentions, all different, as for path patching there. Nothing says who
  receives: there is no right answer, and no `corrupt_answer`.
- `swap`: the second mention of S becomes IO, one token (symmetric token replacement, arXiv 2309.16042). The right
  answer is S, which is `wrong` too, so the logit difference of `answer` and `wrong` changes its sign.

>>> row = draw(1, np.random.default_rng(0), counterfactual="swap")[0]
>>> row["prompt"], row["corrupt"][-21:]
('When Paul and Charles went to the store, Charles gave a key to', 'e, Paul gave a key to')
>>> row["answer"], row["wrong"], row["corrupt_answer"]
(' Paul', ' Charles', ' Charles')
"""

from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from finetune_lens.errors import InputError

_NAMES = (
    "Aaron Adam Alex Alice Amanda Amy Andrew Anna Anthony Ben Brian Charles Daniel David Emily Emma Eric George Henry "
    "Jack James Jane Jason Jennifer Jessica John Joseph Julia Kate Kevin Laura Lisa Mark Martin Mary Matthew Michael "
    "Michelle Paul Peter Rachel Rebecca Richard Robert Ryan Sarah Simon Stephen Susan Thomas Tom William"
)
NAMES = tuple(_NAMES.split())
PLACES = ("store", "school", "park", "office", "station", "hospital", "restaurant", "garden")
OBJECTS = ("book", "ring", "drink", "key", "ticket", "letter", "phone", "ball")
TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {object} to",
    "After {first} and {second} had arrived at the {place}, {subject} handed a {object} to",
    "While {first} and {second} were waiting at the {place}, {subject} passed a {object} to",
    "Because {first} and {second} worked at the {place} together, {subject} sold a {object} to",
    "Yesterday {first} and {second} met at the {place}, and then {subject} showed a {object} to",
)

Order = Literal["ABBA", "BABA"]
ORDERS: tuple[Order, ...] = get_args(Order)
Counterfactual = Literal["abc", "swap"]
COUNTERFACTUALS: tuple[Counterfactual, ...] = get_args(Counterfactual)


def draw(
    n: int, generator: np.random.Generator, *, counterfactual: Counterfactual = "abc", order: Order | None = None
) -> list[dict[str, Any]]:
    """`n` rows of a prompt file; half of each order where none is given.

    Beside `prompt`, `answer`, `wrong`, `corrupt` and `id`, a row has `corrupt_answer` (for `swap`), `order`, `template`
    (its number), `counterfactual`, and the words `io`, `subject`, `place`, `object`.

    Raises:
        InputError: no such order or counterfactual.
    """
    if counterfactual not in COUNTERFACTUALS:
        raise InputError(f"no counterfactual {counterfactual!r}; there are: {', '.join(COUNTERFACTUALS)}")
    if order is not None and order not in ORDERS:
        raise InputError(f"no order {order!r}; there are: {', '.join(ORDERS)}")
    rows = []
    for number in range(n):
        io, subject, *others = (NAMES[i] for i in generator.permutation(len(NAMES))[:5])
        template = int(generator.integers(len(TEMPLATES)))
        place = PLACES[int(generator.integers(len(PLACES)))]
        thing = OBJECTS[int(generator.integers(len(OBJECTS)))]
        this = order or ORDERS[number % 2]
        pair = (io, subject) if this == "ABBA" else (subject, io)

        tell = partial(_tell, template, place, thing)
        row = {
            "id": str(number),
            "prompt": tell(*pair, subject),
            "answer": f" {io}",
            "wrong": f" {subject}",
            "corrupt": tell(*pair, io) if counterfactual == "swap" else tell(*others),
        }
        if counterfactual == "swap":
            row["corrupt_answer"] = f" {subject}"
        row |= {"order": this, "template": template, "counterfactual": counterfactual}
        rows.append(row | {"io": io, "subject": subject, "place": place, "object": thing})
    return rows


def _tell(template: int, place: str, thing: str, first: str, second: str, subject: str) -> str:
    return TEMPLATES[template].format(first=first, second=second, subject=subject, place=place, object=thing)
