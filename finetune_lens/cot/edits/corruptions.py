"""Chains whose structure or whose content is destroyed in part.

"LLMs Can Easily Learn to Reason from Demonstrations: Structure, Not Content, Is What Matters" (arXiv 2502.07374) sets
one against the other. A fraction f of n units is max(1, ⌊f·n + ½⌋) of them, and none where f is 0:

    structure   delete, shuffle: steps; insert: as many foreign steps as the fraction of the chain's own
    content     wrong_answer: mentions of the right answer; drop_keywords: words that lead the reasoning;
                corrupt_digits: digits

White space is no part of a step here: what stands first begins as the chain did.

>>> import numpy as np
>>> steps = ["First, 2 + 2 = 4.", " Then 4 * 3 = 12.", " So it is 12."]
>>> generator = np.random.default_rng(0)
>>> delete(steps, 0.3, generator)
['First, 2 + 2 = 4.', ' Then 4 * 3 = 12.']
>>> shuffle(steps, 1, generator)
['Then 4 * 3 = 12.', ' So it is 12.', ' First, 2 + 2 = 4.']
>>> insert(steps, 0.3, generator, ["Paris is in France."])
['Paris is in France.', ' First, 2 + 2 = 4.', ' Then 4 * 3 = 12.', ' So it is 12.']
>>> drop_keywords(steps, 1, generator)
['2 + 2 = 4.', ' 4 * 3 = 12.', ' It is 12.']
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.cot.answers import LONGEST, number_of, number_text
from finetune_lens.cot.edits.mistakes import SINGLE_NUMBER, changed_digits
from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from finetune_lens.cot.questions import Question

STRUCTURE = ("delete", "shuffle", "insert")
CONTENT = ("wrong_answer", "drop_keywords", "corrupt_digits")
KEYWORDS = re.compile(
    r"\b(?:(?i:therefore|thus|hence|consequently|so|because|since|then|finally|lastly|also|but|however|although|though|"
    r"alternatively|instead|otherwise|wait|let me (?:think|check|see|verify)|let['’]s|let us|which means|this means|"
    r"that means|in total|altogether|first of all|as a result|for example|to begin with)|First|Second|Next|Now)\b,?"
    r"[ \t]?"
)

Place = tuple[int, re.Match[str], str]  # which step, what stands there, and what may stand there


def corrupt(
    kind: str,
    steps: Sequence[str],
    fraction: float,
    generator: np.random.Generator,
    *,
    question: "Question",
    foreign: Sequence[str] = (),
) -> list[str] | None:
    """The steps with a fraction of what `kind` names destroyed; None where the chain has nothing of that kind.

    Args:
        kind: one of STRUCTURE and CONTENT.
        fraction: 0 (the steps as they are) to 1.
        question: whose right answer wrong_answer replaces.
        foreign: steps of other chains, for insert.

    Raises:
        InputError: another kind, or a fraction outside 0 to 1.
    """
    if kind == "insert":
        return insert(steps, fraction, generator, foreign)
    if kind == "wrong_answer":
        return wrong_answer(steps, fraction, generator, question)
    others = {"delete": delete, "shuffle": shuffle, "drop_keywords": drop_keywords, "corrupt_digits": corrupt_digits}
    if kind not in others:
        raise InputError(f"corruption: expected one of {', '.join(STRUCTURE + CONTENT)}; found {kind!r}")
    return others[kind](steps, fraction, generator)


def share(fraction: float, n: int) -> int:
    """How many of n units a fraction is: rounded, and at least one where it is above 0."""
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction: expected a share of the chain between 0 and 1, found {fraction}")
    return min(n, max(1, int(fraction * n + 0.5))) if fraction > 0 else 0


def delete(steps: Sequence[str], fraction: float, generator: np.random.Generator) -> list[str] | None:
    """A fraction of the steps is gone."""
    gone = _drawn(len(steps), share(fraction, len(steps)), generator)
    leads, bodies, tail = _apart(steps)
    kept = [n for n in range(len(steps)) if n not in gone]
    return _joined([leads[n] for n in kept], [bodies[n] for n in kept], leads[0], tail) if steps else None


def shuffle(steps: Sequence[str], fraction: float, generator: np.random.Generator) -> list[str] | None:
    """A fraction of the steps, at least two, change places in a ring: none of them stays where it was."""
    count = share(fraction, len(steps))
    leads, bodies, tail = _apart(steps)
    if len(set(bodies)) < 2:
        return None
    if count:
        ring = _drawn(len(steps), max(2, count), generator)
        if len({bodies[n] for n in ring}) < 2:  # one text everywhere: another is taken in
            others = [n for n in range(len(steps)) if bodies[n] != bodies[ring[0]]]
            ring[0] = others[int(generator.integers(len(others)))]
        moved = [bodies[n] for n in ring]
        for n, place in enumerate(ring):
            bodies[place] = moved[n - 1]
    return _joined(leads, bodies, leads[0], tail)


def insert(
    steps: Sequence[str], fraction: float, generator: np.random.Generator, foreign: Sequence[str]
) -> list[str] | None:
    """Steps of other chains before, between and after the chain's own; each of them once before one comes again."""
    count = share(fraction, len(steps))
    others = [step.strip() for step in foreign if step.strip()]
    if not others or not steps:
        return None
    leads, bodies, tail = _apart(steps)
    first, gap = leads[0], leads[1] if len(leads) > 1 else " "
    leads[0] = gap
    rounds = -(-count // len(others))
    for n in [n for _ in range(rounds) for n in generator.permutation(len(others))][:count]:
        at = int(generator.integers(len(bodies) + 1))
        bodies.insert(at, others[n])
        leads.insert(at, gap)
    return _joined(leads, bodies, first, tail)


def wrong_answer(
    steps: Sequence[str], fraction: float, generator: np.random.Generator, question: "Question"
) -> list[str] | None:
    """A fraction of the right answer's mentions give a wrong one, the same everywhere: another number or choice."""
    value = number_of(question.answer)
    if question.alternatives:
        others = [other for other in question.alternatives if other != question.answer]
        wrong = others[int(generator.integers(len(others)))]
        mention = re.compile(rf"(?<!\w){re.escape(question.answer)}(?!\w)", re.IGNORECASE)
        places = [(n, match, wrong) for n, step in enumerate(steps) for match in mention.finditer(step)]
    elif value is not None:
        wrong = changed_digits(number_text(abs(value)).partition("/")[0], generator)
        places = [
            (n, match, f"{int(wrong):,}" if "," in match[0] and wrong.isdigit() else wrong)
            for n, step in enumerate(steps)
            for match in SINGLE_NUMBER.finditer(step)
            if len(match[0]) <= LONGEST and Fraction(re.sub(r"[^0-9.]", "", match[0])) == abs(value)
        ]
    else:
        places = []
    return _replaced(steps, places, fraction, generator)


def drop_keywords(steps: Sequence[str], fraction: float, generator: np.random.Generator) -> list[str] | None:
    """A fraction of the words that lead the reasoning (KEYWORDS) is gone; a capital at a step's start stays one."""
    places = [(n, match, "") for n, step in enumerate(steps) for match in KEYWORDS.finditer(step)]
    found = _replaced(steps, places, fraction, generator)
    return found and [
        _with_capital(new) if old.lstrip()[:1].isupper() else new for old, new in zip(steps, found, strict=True)
    ]


def _with_capital(step: str) -> str:
    body = step.lstrip()
    return step[: len(step) - len(body)] + body[:1].upper() + body[1:]


def corrupt_digits(steps: Sequence[str], fraction: float, generator: np.random.Generator) -> list[str] | None:
    """A fraction of the digits are other digits."""
    places = [
        (n, match, str((int(match[0]) + int(generator.integers(1, 10))) % 10))
        for n, step in enumerate(steps)
        for match in re.finditer("[0-9]", step)
    ]
    return _replaced(steps, places, fraction, generator)


def _replaced(
    steps: Sequence[str], places: Sequence[Place], fraction: float, generator: np.random.Generator
) -> list[str] | None:
    """The steps with a fraction of the places changed; None where there are no places."""
    found = list(steps)
    for n in sorted(_drawn(len(places), share(fraction, len(places)), generator), reverse=True):
        step, match, new = places[n]
        found[step] = found[step][: match.start()] + new + found[step][match.end() :]
    return found if places else None


def _drawn(n: int, count: int, generator: np.random.Generator) -> list[int]:
    return generator.permutation(n)[:count].tolist()


def _apart(steps: Sequence[str]) -> tuple[list[str], list[str], str]:
    """The white space before each step, the steps without it, and the white space at the chain's end."""
    bodies = [step.lstrip() for step in steps]
    leads = [step[: len(step) - len(body)] for step, body in zip(steps, bodies, strict=True)]
    if not steps:
        return [], [], ""
    last = bodies.pop()
    return leads, [*bodies, last.rstrip()], last[len(last.rstrip()) :]


def _joined(leads: Sequence[str], bodies: Sequence[str], first: str, tail: str) -> list[str]:
    """Steps again, of which the first begins as the chain did and the last ends as it did."""
    steps = [lead + body for lead, body in zip([first, *leads[1:]], bodies, strict=False)]
    return [*steps[:-1], steps[-1] + tail] if steps else []
