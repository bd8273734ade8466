"""Mistakes put into a step by rules: a number, a word for its opposite, an entity for another, a negation.

>>> import numpy as np
>>> generator = np.random.default_rng(0)
>>> mistake("She makes 9 * 2 = $18 every day.", generator)
'She makes 9 * 2 = $26 every day.'
>>> mistake("We have x + y.", generator), mistake("Lips can turn blue.", generator), mistake("Let us think", generator)
('We have x - y.', 'Lips cannot turn blue.', None)
"""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from finetune_lens.cot.answers import ANNOTATION, DIGITS, LONGEST, TENS
from finetune_lens.cot.steps import STARTERS, split_steps

Change = tuple[int, int, str]  # from where to where in the step, and what stands there then

LIST_LABEL = re.compile(r"\s*+[-*•]?\s*+(?:\(?[0-9]{1,3}[.)]|(?:Step|Part)\s+[0-9]+[.:]?)(?=\s)")
SINGLE_NUMBER = re.compile(rf"(?<![A-Za-z_0-9.#])(?:{DIGITS})(?![0-9]|(?:st|nd|rd|th)\b)")
_YEARS = range(1000, 2100)


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split("/") for pair in text.split())


_ONE_WAY = _pairs("fewer/more larger/smaller bigger/smaller big/small first/last")
_BOTH_WAYS = _pairs(
    "more/less before/after greater/smaller higher/lower older/younger taller/shorter heavier/lighter faster/slower "
    "earlier/later increase/decrease increases/decreases increased/decreased increasing/decreasing add/subtract "
    "adds/subtracts added/subtracted adding/subtracting plus/minus multiply/divide multiplying/dividing "
    "multiplied/divided sum/difference twice/half always/never many/few above/below inside/outside buy/sell "
    "buys/sells bought/sold won/lost wins/loses alive/dead male/female husband/wife mother/father brother/sister "
    "hot/cold north/south east/west legal/illegal possible/impossible true/false able/unable large/small rich/poor "
    "safe/dangerous common/rare ancient/modern easy/difficult strong/weak summer/winter with/without birth/death "
    "expensive/cheap maximum/minimum start/end starts/ends started/ended begins/ends began/ended day/night "
    "days/nights early/late positive/negative correct/incorrect everyone/nobody everything/nothing"
)
OPPOSITES = _ONE_WAY | {b: a for a, b in _BOTH_WAYS.items()} | _BOTH_WAYS
CLASSES = (
    ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    ("third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    ("January", "February", "April", "June", "July", "August", "September", "October", "November", "December"),
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
)
OPERATORS = {"+": "-", "-": "+", "−": "+", "*": "/", "/": "*", "×": "÷", "÷": "×"}
_OPERATOR = re.compile(r"(?<=[\w)] )[-+*/×÷−](?= [\w($])")

# Words that stand in front of a name with a capital, at the start of a sentence.
_NO_NAMES = STARTERS.union(
    ("i'm", "i’m", "would", "did", "does", "do", "could", "can", "will", "was", "were", "has", "have", "had", "should"),
    (
        "may",
        "must",
        "while",
        "although",
        "though",
        "during",
        "with",
        "among",
        "between",
        "both",
        "many",
        "most",
        "some",
    ),
    ("all", "not", "no", "only", "also", "given", "assuming", "until", "unless", "once", "today", "yesterday", "twice"),
    ("half", "another", "other", "one", "two", "three", "where", "which", "why"),
)
_BE = "is|are|was|were|will|could|should|would|must|may|might"
_DO = "do|does|did|has|have|had"
_NEGATIONS = (
    (rf"\b({_BE}|{_DO}|can) not\b", r"\1"),
    (rf"\b({_BE}|{_DO})n['’]t\b", r"\1"),
    (r"\bcan(?:not|['’]t)\b", "can"),
    (r"\bwon['’]t\b", "will"),
    (r"\b(is|are|was|were|has|have|had) no\b", r"\1 some"),
)
_INSERTIONS = (
    (rf"\b({_BE})\b(?! not)", r"\1 not"),
    (r"(?<!\ba )(?<!\bthe )(?<!\beach )(?<!\bper )(?<!\bone )\bcan\b(?! of\b)", "cannot"),
    (r"\b(has|have|had)\b(?= been\b)", r"\1 not"),
)
_PRESENT = _pairs(
    "has/have needs/need lives/live wants/want makes/make takes/take gets/get uses/use means/mean costs/cost "
    "contains/contain includes/include requires/require comes/come goes/go becomes/become works/work plays/play "
    "eats/eat gives/give holds/hold knows/know sells/sell buys/buy pays/pay weighs/weigh allows/allow causes/cause "
    "exists/exist occurs/occur produces/produce provides/provide speaks/speak owns/own remains/remain runs/run "
    "serves/serve shows/show stands/stand starts/start wears/wear follows/follow features/feature refers/refer "
    "helps/help leads/lead grows/grow enjoys/enjoy receives/receive measures/measure involves/involve turns/turn"
)
_PAST = _pairs(
    "had/have lived/live made/make took/take got/get used/use came/come went/go became/become worked/work "
    "played/play ate/eat gave/give held/hold knew/know sold/sell bought/buy paid/pay died/die wrote/write won/win "
    "created/create produced/produce spoke/speak owned/own ran/run served/serve started/start began/begin wore/wear "
    "invented/invent discovered/discover visited/visit appeared/appear occurred/occur spent/spend earned/earn"
)


def mistake(step: str, generator: np.random.Generator, *, context: str = "") -> str | None:
    """The step with one mistake in it; None where no rule finds anything to change.

    The first of these that the step has, one of its places at random: the result of its last equation, else a number
    (which changes by up to half, in as many leading digits as it has; a year by up to 60); a number word, month, day or
    a word with an opposite, or an operator between symbols; an entity; a negation, put in or taken out.

    Args:
        context: the chain and its question, whose other entities may take an entity's place.
    """
    finders: list[Callable[[], list[Change]]] = [
        lambda: _numbers(step, generator),
        lambda: _words(step, generator),
        lambda: _entities(step, context),
        lambda: _negations(step),
    ]
    for find in finders:
        if found := find():
            start, end, text = found[int(generator.integers(len(found)))]
            return step[:start] + text + step[end:]
    return None


def changed_digits(digits: str, generator: np.random.Generator) -> str:
    """Another number, written alike: `1,200` becomes `1,500`, `.75` may become `.61`; never of the same value."""
    separator = re.sub(r"[0-9.]", "", digits)[:1]
    whole, _, part = re.sub(r"[^0-9.]", "", digits).partition(".")
    number = int(whole + part)
    zeros = len(str(number)) - len(str(number).rstrip("0")) if number else 0
    if number in _YEARS and digits.isdigit():
        zeros, most = 0, 60
    else:
        most = max(3, number // 10**zeros // 2)
    leading = number // 10**zeros
    by = int(generator.integers(1, min(most, 10**15) + 1))
    leading += by if leading <= by or generator.random() < 0.5 else -by
    text = str(leading * 10**zeros).rjust(len(part) + 1, "0")
    front, back = text[: len(text) - len(part)], text[len(text) - len(part) :]
    front = f"{int(front):,}".replace(",", separator) if separator else front if whole or int(front) else ""
    return f"{front}.{back}" if part else front


def _numbers(step: str, generator: np.random.Generator) -> list[Change]:
    label = LIST_LABEL.match(step)
    outside = [(label.start(), label.end())] if label else []
    outside += [match.span() for match in ANNOTATION.finditer(step)]

    def inside(pattern: str | re.Pattern[str]) -> list[re.Match[str]]:
        return [m for m in re.finditer(pattern, step) if not any(a <= m.start() < b for a, b in outside)]

    found = [match for match in inside(SINGLE_NUMBER) if len(match[0]) <= LONGEST]
    equals = [match.start() for match in inside("=")]
    results = [match for match in found if equals and match.start() > equals[-1]]
    return [_number_changed(step, match, generator) for match in results[:1] or found]


def _number_changed(step: str, match: re.Match[str], generator: np.random.Generator) -> Change:
    """The number changed, and with it the result in the calculator's annotation before it."""
    new = changed_digits(match[0], generator)
    before = re.search(r"=[^=<>\n]*>>\$?$", step[: match.start()])
    if not before:
        return match.start(), match.end(), new
    kept = before[0].partition(">>")[2]
    return before.start(), match.end(), f"={new.replace(',', '')}>>{kept}{new}"


def _words(step: str, generator: np.random.Generator) -> list[Change]:
    found = [(m.start(), m.end(), OPERATORS[m[0]]) for m in _OPERATOR.finditer(step)]
    for match in re.finditer(r"(?<![\w'’-])[A-Za-z]+(?![\w'’-])", step):
        word = match[0]
        classes = [[other for other in members if other != word] for members in CLASSES if word in members]
        others = classes[0] if classes else [OPPOSITES[word]] if word in OPPOSITES else []
        if others and not re.search(rf"(?:{'|'.join(TENS)})\s$", step[: match.start()]):
            found.append((*match.span(), others[int(generator.integers(len(others)))]))
    return found


def entities(text: str) -> list[str]:
    """Names in a text, in order: capitalised words within a sentence, alone or in a row; each once."""
    found: dict[str, None] = {}
    for sentence in split_steps(text):
        words = list(re.finditer(r"[A-Z][\w'’-]+(?:\s(?:of\s|the\s)*[A-Z][\w'’-]+)*", sentence))
        first = re.search(r"\w", sentence)
        for match in words:
            name = re.sub(r"['’]s?$", "", match[0])
            head, _, rest = name.partition(" ")
            opens = bool(first) and match.start() == first.start()  # the capital may be the sentence's own
            if head.lower() in _NO_NAMES or (opens and not rest):
                name = re.sub(r"^(?:of |the )+", "", rest)
            if name:
                found[name] = None
    return list(found)


def _entities(step: str, context: str) -> list[Change]:
    """The step with another entity in place of one; where the context has no other, with two of its own exchanged."""
    known = entities(f"{context}\n{step}")
    inside = [name for name in known if re.search(_standing_alone([name]), step)]
    outside = [name for name in known if not re.search(rf"\b{re.escape(name)}", step)]
    changes = []
    for name in inside:
        for other in outside or [n for n in inside if n not in name and name not in n]:
            swapped = _replaced(step, {name: other, other: name})
            changes.append((0, len(step), swapped))
    return changes


def _standing_alone(names: Iterable[str]) -> str:
    return rf"\b(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})\b"


def _replaced(text: str, by: Mapping[str, str]) -> str:
    return re.sub(_standing_alone(by), lambda match: by[match[0]], text)


def _negations(step: str) -> list[Change]:
    if step.rstrip().endswith("?"):
        return []
    for rules in (_NEGATIONS, _INSERTIONS):
        found = [(*match.span(), match.expand(new)) for pattern, new in rules for match in re.finditer(pattern, step)]
        if found:
            return found
    forms = [(m, "does not", _PRESENT) for m in re.finditer(_standing_alone(_PRESENT), step)]
    forms += [(m, "did not", _PAST) for m in re.finditer(_standing_alone(_PAST), step)]
    found = [(*match.span(), f"{auxiliary} {table[match[0]]}") for match, auxiliary, table in forms]
    after_plurals = re.finditer(rf"(?<=s ){_standing_alone(_PRESENT.values())}", step)
    return found or [(*match.span(), f"do not {match[0]}") for match in after_plurals]
