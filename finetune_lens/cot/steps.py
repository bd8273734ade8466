"""Where a chain of thought is cut into steps.

A step is a sentence, a line, or whatever a regular expression ends. Nothing is lost: the steps joined are the chain.
White space between two steps belongs to the second, so that a chain cut after a step ends in a visible character, as
tokenizers want it.

>>> split_steps("He pays $3.50 to Mr. Ito. So 2 * 3.50 = 7.\\nDone!", "sentence")
['He pays $3.50 to Mr. Ito.', ' So 2 * 3.50 = 7.', '\\nDone!']
>>> split_steps("1. Add them.\\n2. Halve. Stop.", "line")
['1. Add them.', '\\n2. Halve. Stop.']
>>> split_steps("a=3; b=4; c=7", ";")
['a=3;', ' b=4;', ' c=7']
"""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise, zip_longest

from finetune_lens.errors import InputError

CLOSING = "\"'”’»)]}*_`"  # may stand between the mark that ends a sentence and the space after it
OPENING = "\"'“‘«([{*_`#-"
WIDE = re.compile(r"[。！？]+[”’」』）]*")  # end a sentence with no space after them


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Abbreviations (without their last full stop, in lower case) by what may come after them.
IN_A_SENTENCE = _words(
    "mr mrs ms dr prof st mt gen sen rep gov capt lt sgt col hon rev vs e.g i.e eg ie cf viz fig eq ca"
)
BEFORE_NUMBERS = _words("no nos vol p pp ch sec jan feb mar apr jun jul aug sep sept oct nov dec")
BEFORE_LOWER_CASE = _words(
    "etc al a.m p.m am pm lb lbs oz ft hr hrs min mins mph kg km inc ltd co corp jr sr b.c a.d approx ave"
)
INITIALS = re.compile(r"[A-Z]|(?:[A-Za-z]\.)+[A-Za-z]|Ph\.D")
STARTERS = _words(
    "the a an this that these those he she it they we i you his her its their our my there here so then thus hence "
    "therefore however but and if when since because in on at by for from to after before each every let now next "
    "first finally what how who is are as combining dividing adding subtracting multiplying substituting using"
)
_NUMBERED = re.compile(r"\d{1,3}|[A-Za-z]")


def split_steps(chain: str, how: str = "sentence") -> list[str]:
    """The steps of a chain, none of them blank; joined they are the chain.

    Args:
        how: "sentence": after `.`, `!`, `?` or `…` before white space, unless an abbreviation, an initial or the number
            of a list stands there, and at every line break; "line": at line breaks; anything else is a regular
            expression, and a step ends where a match of it ends (`;`, or `(?=Step \\d)` for what begins a step).

    Returns:
        An empty chain has no steps; a chain of white space alone has one.

    Raises:
        InputError: no valid regular expression, or a bare word, which is a slip of the two names.
    """
    if how == "sentence":
        ends = _sentence_ends(chain)
    elif how == "line":
        ends = (gap.start() for gap in re.finditer(r"\s+", chain) if _breaks(gap[0]))
    else:
        ends = (match.end() for match in pattern_of(how).finditer(chain))
    return _cut(chain, ends)


def pattern_of(how: str) -> re.Pattern[str]:
    """The regular expression after whose matches a step ends; InputError where `how` is none."""
    if how.isalnum() or not how:
        raise InputError(
            f"steps: expected 'sentence', 'line' or a regular expression that ends a step such as ';', found {how!r}"
        )
    try:
        return re.compile(how)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"steps: {how!r} is not a regular expression: {error}") from None


def _cut(chain: str, ends: Iterable[int]) -> list[str]:
    """The chain cut at `ends`; a blank piece goes with what follows it, the last one with what it follows."""
    cuts = [0]
    for end in ends:
        if chain[cuts[-1] : end].strip():
            cuts.append(end)
    if len(cuts) > 1 and not chain[cuts[-1] :].strip():
        cuts.pop()
    return [chain[start:end] for start, end in pairwise([*cuts, len(chain)])] if chain else []


def _breaks(gap: str) -> bool:
    return len(f"x{gap}x".splitlines()) > 1


def _sentence_ends(chain: str) -> Iterator[int]:
    words = list(re.finditer(r"\S+", chain))
    before: list[str] = []  # words of this sentence
    for word, following in zip_longest(words, words[1:]):
        for match in WIDE.finditer(word[0]):
            before = []
            yield word.start() + match.end()
        if following is None:
            return
        if _breaks(chain[word.end() : following.start()]) or _ends(word[0], before, following[0]):
            before = []
            yield word.end()
        elif any(map(str.isalnum, word[0])):
            before.append(word[0])


def _ends(word: str, before: list[str], after: str) -> bool:
    """Whether a sentence ends with this word."""
    core = word.rstrip(CLOSING)
    following = after.lstrip(OPENING)
    first = following[:1]
    if not core.endswith((".", "!", "?", "…")) or not (first.isalnum() or first in "$€£\\" or not first):
        return False
    lower = first.islower()
    if core[-1] in "!?…" or core.endswith("..") or core != word.rstrip("*_`"):
        return not lower
    core = core[:-1].lstrip(OPENING)
    if _NUMBERED.fullmatch(core) and (not before or _opens_list(before, core)):
        return False
    name = core.lower()
    if name in IN_A_SENTENCE:
        return False
    if name in BEFORE_NUMBERS and first.isdigit():
        return False
    if name in BEFORE_LOWER_CASE:
        return not lower and not first.isdigit()
    if INITIALS.fullmatch(core):
        return re.split(r"\W", following, maxsplit=1)[0].lower() in STARTERS and not lower
    return True


def _opens_list(before: list[str], core: str) -> bool:
    """Whether the words before a number say that it counts steps: "Step 1.", "the steps are: 1."."""
    last = before[-1].strip(CLOSING + OPENING)
    return last.endswith(":") or (len(before) == 1 and core.isdigit() and last.lower() in ("step", "part", "case"))
