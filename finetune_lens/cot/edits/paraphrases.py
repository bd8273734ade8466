"""The same said in other words, by rules: digits and names stay as they are, and no statement is lost or added.

>>> import numpy as np
>>> paraphrase("So he often buys two pens and can't draw.", np.random.default_rng(0))
'Hence he frequently purchases 2 pens and cannot draw.'
>>> paraphrase(" x = 40", np.random.default_rng(0))
' To say it another way: x = 40'
"""

import re

import numpy as np

from finetune_lens.cot.answers import SCALES, WORDS
from finetune_lens.cot.edits.mistakes import LIST_LABEL
from finetune_lens.cot.steps import split_steps

OPENERS = ("In other words:", "Put differently:", "That is to say:", "To say it another way:")

# Each may stand for the others, in every sentence.
_GROUPS = (
    "therefore|thus, nearly|almost, approximately|roughly, often|frequently, usually|normally|typically, "
    "although|though, originally|initially, additional|extra, the entire|the whole, big|large, huge|enormous, "
    "famous|well-known, clever|smart, children|kids, movie|film, bought|purchased, buying|purchasing, "
    "finishes|completes, eats|consumes, each day|every day, each week|every week, each month|every month, "
    "each year|every year, each time|every time, in total|altogether, for example|for instance, calculate|compute, "
    "calculates|computes, calculated|computed, calculating|computing, needs to|has to, need to|have to, "
    "needed to|had to, wants to|would like to, tries to|attempts to, try to|attempt to, tried to|attempted to, "
    "located in|situated in, took place|occurred, takes place|occurs, years old|years of age, equals|is equal to, "
    "because of|due to, consists of|is made up of, consist of|are made up of, finally|lastly, collected|gathered, "
    "collects|gathers, a type of|a kind of, types of|kinds of, known for|famous for"
)
# The right one may stand for the left one, but not the other way round.
_ONE_WAY = {
    "adds up to": "comes to", "allowed": "permitted", "are composed of": "consist of", "are equal to": "equal",
    "are made of": "consist of", "as well as": "and also", "ate": "consumed", "buy": "purchase", "buys": "purchases",
    "came out to": "amounted to", "can't": "cannot", "cannot": "can't", "chose": "picked", "come out to": "amount to",
    "comes out to": "amounts to", "consisting of": "made up of", "currently": "at present", "died in": "passed away in",
    "during": "in the course of", "eat": "consume", "ensure": "make sure", "finished": "completed",
    "happened": "took place", "in order to": "to", "individuals": "people", "is able to": "can",
    "is composed of": "consists of", "is made of": "consists of", "live in": "reside in", "lived in": "resided in",
    "lives in": "resides in", "owns": "possesses", "received": "got", "require": "call for", "requires": "calls for",
    "sometimes": "at times", "such as": "like", "they're": "they are", "to create": "to make", "twice": "two times",
    "until": "till", "want to": "wish to", "wanted to": "wished to", "was born in": "came into the world in",
    "was composed of": "consisted of", "we find": "we obtain", "we get": "we obtain", "we're": "we are",
    "which means": "which implies", "won't": "will not", "you're": "you are",
}  # fmt: skip
_AUXILIARY = "(is|are|was|were|do|does|did|has|have|had|could|would|should)"
_PERIOD = "(day|week|month|year)"
_SUM = "(?:number|amount|cost|price|weight|length|time|distance|value|percentage)"
_DO = "(?:find|divide|calculate|add|multiply|subtract|determine|figure)"
_NO_PART = rf"(?! (?:{'|'.join([*WORDS, *SCALES])}|halves|thirds|quarters|\w+ths)\b)"  # of a longer number in words
_NO_VERB = r"(?! off\b| out\b| up\b| over\b)"

# Patterns that say what must stand around them.
_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(?<=, )so(?! that| far| much| many)", ("therefore", "hence")),
    (r"(?<=and )so(?= (?:he|she|it|they|we|the)\b)", ("therefore", "thus")),
    (r"because(?! of)", ("since",)),
    (r"(?<=, )but", ("yet",)),
    (r"also(?= [a-z])", ("additionally",)),
    (rf"starts{_NO_VERB}", ("begins",)),
    (rf"started{_NO_VERB}", ("began",)),
    (r"at least(?= \$?[0-9])", ("no less than",)),
    (r"at most(?= \$?[0-9])", ("no more than",)),
    (r"about(?= \$?[0-9])", ("around", "roughly")),
    (r"around(?= \$?[0-9])", ("about", "roughly")),
    (r"(?<!for )a total of", ("altogether",)),
    (r"allow(s?)(?! for\b)", (r"permit\1",)),
    (r"(?<!just )under(?= \$?[0-9])", ("less than",)),
    (r"several(?! (?:hundred|thousand|million)\b)", ("a number of",)),
    (
        r"(?<![hH]ow )(?<![aA]s )(?<![sS]o )(?<![tT]oo )(?<!very )(?<!the )many(?= (?!millions|thousands)[a-z]+s\b)",
        ("a large number of",),
    ),
    (rf"total(?= {_SUM}\b)", ("overall",)),
    (r"in all(?=[.,;]|$)", ("altogether",)),
    (r"as well(?=[.,;]|$)", ("too",)),
    (r"has(?= \$?[0-9])", ("has got",)),
    (r"(?<=they )have(?= \$?[0-9])", ("have got",)),
    (r"(ha(?:s|ve) [^.;a-z]*[0-9](?: \w+){0,2}) left(?=[.,;]|$)", (r"\1 remaining",)),
    (r"(?<=[s0-9] )remaining(?=[.,;]|$)", ("left",)),
    (r"earns(?= \$[0-9])", ("makes", "brings in")),
    (r"earned(?= \$[0-9])", ("made", "brought in")),
    (r"spends(?= \$[0-9])", ("pays out",)),
    (r"spent(?= \$[0-9])", ("paid out",)),
    (r"costs(?= \$[0-9])", ("is priced at",)),
    (r"gets(?= (?:\$?[0-9]|an? ))", ("receives",)),
    (r"receives(?= (?:\$?[0-9]|an? ))", ("gets",)),
    (r"called(?= [A-Z'\"“])", ("known as",)),
    (rf"per {_PERIOD}", (r"each \1", r"every \1")),
    (rf"(once|twice|times|hours|minutes|miles|dollars) a {_PERIOD}", (r"\1 per \2", r"\1 each \2")),
    (rf"(?<=to )find(?= the (?:total )?{_SUM}\b)", ("work out",)),
    (r"(is|are|was|were) used(?= (?:to|for|in|by|as)\b)", (r"\1 employed",)),
    (r"(he|she|it) will(?! not\b)", (r"\1 is going to",)),
    (r"(they|we|you) will(?! not\b)", (r"\1 are going to",)),
    (r"it['’]s(?= (?:a|an|the|not|in|on|about)\b)", ("it is",)),
    (rf"{_AUXILIARY} not", (r"\1n't",)),
    (rf"{_AUXILIARY}n['’]t", (r"\1 not",)),
    *(
        (rf"(?<!the )(?<!ty )(?<!hundred and )(?<!thousand and ){word}{_NO_PART}", (str(n),))
        for word, n in WORDS.items()
        if 2 <= n <= 12
    ),
)
# At the start of a sentence, with its capital.
_FIRST: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"So(?! far\b| much\b| many\b| that\b| long\b)", ("Therefore", "Thus", "Hence")),
    (r"(?:Therefore|Thus|Hence)", ("So", "Consequently")),
    (r"Because(?! of)", ("Since", "As")),
    (
        r"Since(?= [^,]* (?:is|are|was|were|has|have|had|did|does|can|will|costs?|needs?|\w+ed)\b[^,]*,)",
        ("Because", "As"),
    ),
    (r"Then,?", ("Next,", "After that,")),
    (r"Next,", ("Then,", "After that,")),
    (r"First,", ("To begin with,", "To start with,")),
    (rf"First(?= {_DO}\b)", ("To begin with,",)),
    (rf"Now(?= {_DO}\b)", ("At this point,",)),
    (r"Finally", ("Lastly",)),
    (r"Also,", ("In addition,",)),
    (r"However", ("Nevertheless",)),
    (r"(?:In total|In all)", ("Altogether",)),
    (r"Altogether", ("In total",)),
    (r"Together,?(?= they\b)", ("Combined,",)),
    (r"(?:This|That) means(?: that|(?= (?:he|she|it|they|there|we)\b))", ("It follows that",)),
    (r"(This|That) means", (r"\1 implies",)),
    (r"If(?! not| so)", ("Assuming that", "Provided that")),
    (r"(He|She|It) will(?! not\b)", (r"\1 is going to",)),
    (r"(They|We|You) will(?! not\b)", (r"\1 are going to",)),
    (r"There['’]s(?= an?\b)", ("There is",)),
    (r"It['’]s(?= (?:a|an|the|not|in|on|about)\b)", ("It is",)),
    (r"Let ([a-zA-Z]) (?:represent|be)(?= the\b)", (r"Let \1 stand for",)),
    (r"We know that", ("It is known that",)),
    (rf"To find(?= the (?:total )?{_SUM}\b)", ("To work out",)),
    (r"Many(?= [a-z]+s\b)", ("A large number of",)),
    (r"Most(?= [a-z]+s\b)", ("The majority of",)),
    (r"Some(?= [a-z]+s\b)", ("Certain",)),
    (r"Although", ("Though",)),
)
# "the dog and the cat" as the whole of what is said of: the same word before both, and nothing that belongs to one.
_CONJUNCTS = re.compile(
    r"(?<!\bof )(?<!\bwith )(?<!\bto )\b(?P<word>the|a|an|his|her|their|some) (?P<one>[a-z]+) (?P<and>and|or) "
    r"(?P=word) (?P<other>[a-z]+)(?=[.,;!?]|$| (?:is|are|was|were|will|can|have|has|had)\b)"
)
# "On Sunday, he ran 5 miles." may be put "He ran 5 miles on Sunday."
_NO_TIME = r"(?! (?:contrast|fact|addition|turn|short|general|particular|all|other words|conclusion|total)\b)"
_FRONT = re.compile(
    rf"(?P<when>(?:In|On|At|During|For|By){_NO_TIME} [^,.;:=]{{2,40}}), "
    r"(?P<rest>(?=\w)(?!i[A-Z]|[b-z]\b)[^,;:]+?)(?P<end>[.!]?\s*)$"  # no iPhone and no variable gets a capital
)
_SAID = re.compile(r"[^\W_]")
_LEAD = re.compile(r"[\s\"'“‘(*]*")
_JOINED = re.compile(r"\b(?:and|but|so|then|because|since|when|if|which|that|who)\b")


def _synonyms() -> dict[str, tuple[str, ...]]:
    groups = [group.strip().split("|") for group in _GROUPS.split(",")]
    found = {word: tuple(other for other in group if other != word) for group in groups for word in group}
    return found | {word: (other,) for word, other in _ONE_WAY.items()}


_SYNONYMS = _synonyms()
_PHRASES = "|".join(re.escape(word).replace("'", "['’]") for word in sorted(_SYNONYMS, key=len, reverse=True))
_WORDS = re.compile(rf"(?<![\w'’-])(?:{_PHRASES})(?![\w'’-])")


def paraphrase(text: str, generator: np.random.Generator) -> str:
    """The text with every rule that applies carried out, sentence by sentence.

    Rules are: words and phrases of the same meaning, contractions, number words as digits, and pairs joined by "and"
    or "or" in the other order. A sentence that no rule changes gets an opener such as "In other words:", so that only
    a text without letters and digits comes back as it is.
    """
    return "".join(_paraphrased(sentence, generator) for sentence in split_steps(text))


def _paraphrased(sentence: str, generator: np.random.Generator) -> str:
    label = LIST_LABEL.match(sentence)
    said = label.end() if label and _SAID.search(sentence, label.end()) else 0
    if not _SAID.search(sentence, said):
        return sentence
    start = _LEAD.match(sentence, said).end()
    result, at = "", 0
    for begin, end, new in sorted(_changes(sentence, start, generator), key=lambda change: (change[0], -change[1])):
        if begin >= at:
            result, at = result + sentence[at:begin] + new, end
    result = _reordered(result + sentence[at:], start)
    if result == sentence:
        opener = OPENERS[int(generator.integers(len(OPENERS)))]
        result = f"{sentence[:start]}{opener} {sentence[start:]}"
    return result


def _reordered(sentence: str, start: int) -> str:
    """The sentence with what stands before its comma at its end, where nothing else may claim it there."""
    match = _FRONT.match(sentence, start)
    if not match or _JOINED.search(match["rest"]) or "=" in match["rest"]:
        return sentence
    when, rest = match["when"], match["rest"]
    return f"{sentence[:start]}{rest[0].upper()}{rest[1:]} {when[0].lower()}{when[1:]}{match['end']}"


def _changes(sentence: str, start: int, generator: np.random.Generator) -> list[tuple[int, int, str]]:
    """Where something else may stand; places may overlap."""
    found = []

    def change(match: re.Match[str], others: tuple[str, ...]) -> None:
        if re.search(r"\ban?\s$", sentence[: match.start()]):  # the article must still fit
            others = tuple(other for other in others if (other[0] in "aeiou") == (match[0][0] in "aeiou"))
        if others:
            found.append((*match.span(), match.expand(others[int(generator.integers(len(others)))])))

    for pattern, others in _FIRST:
        if match := re.compile(rf"{pattern}(?![\w'’-])").match(sentence, start):
            change(match, others)
    for pattern, others in _RULES:
        for match in re.finditer(rf"(?<![\w'’-]){pattern}(?![\w'’-])", sentence):
            change(match, others)
    for match in _WORDS.finditer(sentence):
        change(match, _SYNONYMS[match[0].replace("’", "'")])
    for match in _CONJUNCTS.finditer(sentence):
        if match["one"] != match["other"] and "respectively" not in sentence:
            change(match, (r"\g<word> \g<other> \g<and> \g<word> \g<one>",))
    return found
