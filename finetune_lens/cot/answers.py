"""What a text answers, in one spelling for each answer; None where it cannot be told.

`extract_answer` reads what a model wrote after the cue, or a whole chain with its answer. Of several answers the last
one announced counts (`####`, `\\boxed{}`, the cue, "answer is", "Answer:"), and a text that announces none is taken for
what follows the cue. What remains open is not guessed at: two numbers of which neither stands first, a label beside
another choice's text, a range. Nothing is ever raised.

>>> from finetune_lens.cot.questions import Format, Question
>>> asked = Question("q", "How much?", "1,234.50")
>>> texts = ["He has 9 left.\\n#### 1234.5", " $1,234.50 a day.", " 4 x 5 = $20, not $30.", " between 10 and 20", "?"]
>>> [extract_answer(text, asked, Format()) for text in texts]
['1234.5', '1234.5', '20', None, None]
>>> asked = Question("q", "Which?", "Rome", ("Paris", "Rome"))
>>> [extract_answer(text, asked, Format()) for text in (" (B)", " B.", " Rome, of course", " either")]
['Rome', 'Rome', 'Rome', None]
"""

import re
import string
import unicodedata
from fractions import Fraction
from typing import TYPE_CHECKING

from finetune_lens.cot.steps import split_steps

if TYPE_CHECKING:
    from finetune_lens.cot.questions import Format, Question

LABELS = string.ascii_uppercase
BOOLEANS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculator: <<9*2=18>>

# Digits as they are written: 1,234.50  .5  18
DIGITS = (
    r"(?:[0-9]{1,3}(?:[,\u00a0\u2009\u202f][0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)
NUMBER = re.compile(
    rf"(?<![A-Za-z_0-9])(?:(?<![\w)\]}}%.])(?P<sign>[-−]))?(?:[$€£¥]\s?(?P<minus>[-−])?)?(?P<digits>{DIGITS})"
    r"(?:(?P<power>[eE][-+]?[0-9]{1,2}\b)|\s*[x×*·]\s*10\s*\^\s*\{?(?P<ten>[-−]?[0-9]{1,2})\}?)?"
    r"(?:\s*/\s*(?P<below>[0-9]+(?:\.[0-9]+)?)(?![0-9/])|\s+(?P<above>[0-9]+)/(?P<under>[0-9]+)(?![0-9/]))?"
    r"(?:\s?(?P<scale>hundred|thousand|million|billion|trillion)s?\b|(?P<k>k)\b)?"
)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS = {word: n for n, word in enumerate(ONES)} | {word: 10 * n for n, word in enumerate(TENS, 2)}
_WORD = "|".join([*WORDS, *SCALES])
_IN_WORDS = re.compile(rf"(?:{_WORD})(?:[\s-]+(?:and\s+)?(?:{_WORD}))*\b")
LONGEST = 40  # digits of a number that is read

_MARKERS = r"####|\\boxed\{(?P<boxed>(?:[^{}]|\{[^{}]*\})*)\}|(?i:\banswer is\b:?|\banswer\s*\**:)"
_GOES_ON = re.compile(r"\s*[-+*/x×÷·–−:,]\s*[$€£¥]?\s?[0-9]|(?:\.|\s+)[0-9]")  # a number that is part of something
_BESIDE = " -–—=:*\"'.)"  # may stand between a choice's label and its text
_MARKUP = string.whitespace + "*_`'\"$:([{≈~"
_POLARITY = re.compile(r"\b(not\s+)?(?:(yes|true|correct)|(false|incorrect|no(?!\s+\w)))\b", re.IGNORECASE)


def extract_answer(text: str, question: "Question", format: "Format") -> str | None:
    """The answer that a text gives, spelled as `Format.right` spells it; None where none can be told.

    Returns:
        Of a question with choices the choice's text; yes or no; a number as `number_text` writes it; else the first
        sentence, as `plain` writes it.
    """
    said = _announced(text, format)
    if question.choices:
        return _choice(said, question.choices, labelled=format.labelled)
    return {"boolean": _boolean, "numeric": _number, "text": _text}[question.kind](said)


def number_of(text: str) -> Fraction | None:
    """The number that the whole text is: `18`, `-$1,234.50`, `3/4`, `2 1/2`, `25%`, `1.5 million`."""
    cleaned = _tidied(text).strip().removesuffix("%").removesuffix(".").rstrip()
    match = NUMBER.fullmatch(cleaned)
    return _value(match) if match else None


def number_text(value: Fraction) -> str:
    """One spelling a number: `18`, `1234.5`, and `1/3` where decimals do not end."""
    below, twos, fives = value.denominator, 0, 0
    while below % 2 == 0:
        below, twos = below // 2, twos + 1
    while below % 5 == 0:
        below, fives = below // 5, fives + 1
    if below > 1:
        return str(value)
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    point = len(digits) - places
    return "-" * (value < 0) + digits[:point] + ("." + digits[point:] if places else "")


def plain(text: str) -> str:
    """A text without capitals, outer punctuation, a leading article and doubled spaces."""
    words = text.casefold().split()
    bare = " ".join(words).strip(string.punctuation + "“”‘’… ")
    bare = re.sub(r"^(?:an?|the) (?=\S)", "", bare)
    return bare or " ".join(words)


def _announced(text: str, format: "Format") -> str:
    """What comes after the last announcement of an answer that is followed by anything; all where there is none."""
    cue = format.cue.strip()
    announces = re.compile(rf"(?<!\w){re.escape(cue)}(?!\w)|{_MARKERS}" if cue else _MARKERS)
    for stop in format.stop:
        if not announces.search(stop) and stop in text:
            text = text[: text.index(stop)]
    for match in reversed(list(announces.finditer(text))):
        rest = match["boxed"] if match["boxed"] is not None else text[match.end() :]
        if rest.strip(" \n.:*"):
            return rest
    return text


def _choice(said: str, choices: tuple[str, ...], *, labelled: bool) -> str | None:
    line = _first_line(said)
    texts = _named(line, choices)
    named = {choice for _, choice in texts}
    if not labelled:
        leads = [choice for at, choice in texts[:1] if not line[:at].strip(string.whitespace + string.punctuation)]
        return leads[0] if leads else named.pop() if len(named) == 1 else None
    last = LABELS[min(len(choices), len(LABELS)) - 1]
    label = rf"([A-{last}a-{last.lower()}])(?!['’]?\w)"
    start = re.match(
        rf"[\W_]*+(?:(?:option|choice|answer)\b[\W_]*+)?{label}(?P<end>\s*+(?:[).:,*]|$))?", line, re.IGNORECASE
    )
    if start:
        rest, chosen = line[start.end() :], choices[LABELS.index(start[1].upper())]
        beside = next((c for at, c in texts if at >= start.end() and not line[start.end() : at].strip(_BESIDE)), chosen)
        other = re.match(rf"[\s,/&)]*+(?:(?:or|and)\s++)?\(?{label}", rest)
        marked = start["end"] is not None or line[: start.start(1)].rstrip(" *_").endswith("(")
        article = start[1] in "AI" and not marked and rest.strip() and not any(c == chosen for _, c in texts)
        if marked or (start[1].isupper() and not article):
            agreed = beside == chosen and not (other and other[1].isupper() and other[1] != start[1].upper())
            return chosen if agreed else None
    labels = {match[1].upper() for match in re.finditer(rf"\({label}\)", line)}
    if labels:
        return choices[LABELS.index(labels.pop())] if len(labels) == 1 else None
    return named.pop() if len(named) == 1 else None


def _named(line: str, choices: tuple[str, ...]) -> list[tuple[int, str]]:
    """Where the choices' texts stand in a line; of two that begin at one place the longer."""
    ordered = sorted(choices, key=len, reverse=True)
    any_of = "|".join(f"({re.escape(choice.strip())})" for choice in ordered)
    found = re.finditer(rf"(?<!\w)(?:{any_of})(?!\w)", line, re.IGNORECASE)
    return [(match.start(), ordered[match.lastindex - 1]) for match in found]


def _boolean(said: str) -> str | None:
    line = _first_line(said)
    first = re.match(r"[\W_]*(yes|no|true|false)\b", line, re.IGNORECASE)
    if first:
        return BOOLEANS[first[1].lower()]
    found = {(bool(negated) == bool(no)) for negated, _, no in _POLARITY.findall(line)}
    return ("yes" if found.pop() else "no") if len(found) == 1 else None


def _number(said: str) -> str | None:
    """The number at the start of the first sentence that has one, or what its last equation comes to.

    Where it starts with a number and ends in an equation, as in "18, since 9 * 2 = 18", the two must agree.
    """
    for sentence in split_steps(_tidied(said)):
        found = list(NUMBER.finditer(sentence))
        if not found:
            words = _IN_WORDS.match(sentence.strip(_MARKUP).lower())
            if words:
                return number_text(_of_words(words[0]))
            continue
        first, equal = found[0], sentence.rfind("=")
        lead = _standing(sentence, 0, first)
        if equal < 0:
            values = {_value(match) for match in found}
            value = lead if lead is not None else values.pop() if len(values) == 1 else None
        else:
            result = next((match for match in found if match.start() > equal), None)
            value = _standing(sentence, equal + 1, result)
            if lead is not None and lead != value and "=" not in re.split(r"[,;(]", sentence[first.end() :])[0]:
                value = None
        return None if value is None else number_text(value)
    return None


def _standing(sentence: str, start: int, match: re.Match[str] | None) -> Fraction | None:
    """The number, if only markup lies between `start` and it, and it is no part of a calculation, range or list."""
    if match is None or sentence[start : match.start()].strip(_MARKUP) or _GOES_ON.match(sentence, match.end()):
        return None
    return _value(match)


def _text(said: str) -> str | None:
    sentences = split_steps(said)
    return plain(sentences[0]) or None if sentences else None


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def _tidied(text: str) -> str:
    """Without the notations of LaTeX and of GSM8K's calculator, and with ½ as 1/2."""
    text = ANNOTATION.sub("", text).replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("\\,", "")
    text = re.sub(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)
    text = re.sub("[¼½¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)
    return re.sub(r"\\times|\\cdot", "×", text)


def _value(match: re.Match[str]) -> Fraction | None:
    """What a match of NUMBER is worth; None where it is nothing, such as 1/0."""
    parts = [match[name] or "" for name in ("digits", "below", "above", "under")]
    if max(map(len, parts)) > LONGEST:
        return None
    digits, below, above, under = parts
    value = Fraction(re.sub(r"[^0-9.]", "", digits)) * Fraction(10) ** int((match["power"] or "e0")[1:])
    value *= Fraction(10) ** int((match["ten"] or "0").replace("−", "-"))
    if (below and not Fraction(below)) or (under and not int(under)):
        return None
    value = value / Fraction(below) if below else value + Fraction(int(above), int(under)) if under else value
    value *= SCALES.get(match["scale"] or "", 1) * (1000 if match["k"] else 1)
    return -value if match["sign"] or match["minus"] else value


def _of_words(text: str) -> Fraction:
    total = current = 0
    for word in re.findall(r"[a-z]+", text):
        if word in WORDS:
            current += WORDS[word]
        elif word == "hundred":
            current = max(current, 1) * 100
        elif word in SCALES:
            total, current = total + max(current, 1) * SCALES[word], 0
    return Fraction(total + current)
