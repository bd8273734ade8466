"""Questions, and the text in which they are put to a model.

A question file is JSONL, or a JSON list, of `question` and `answer`, optionally `choices`, `chain`, `id`; other fields
are kept. GSM8K and StrategyQA are read as they are published:

    gsm8k        the worked solution before `####` is the chain, what stands behind it the answer; the calculator's
                 annotations, <<9*2=18>>, are left out unless asked for
    strategyqa   the answer is yes or no; the `facts` are the chain, a sentence each; where a file has none, the
                 questions of the `decomposition` are, in which #1 stands for the first one's answer

A `Format` writes a question as prompt; after it comes the chain, then the cue, then the answer:

    Question: Which is in Italy?          ┐
    (A) Paris                             │ prompt
    (B) Rome                              │
    Let's think step by step.             ┘
    Paris is in France, Rome is not.        chain
    So the answer is B                      cue and answer

>>> [asked] = read_questions([{"question": "Which is in Italy?", "choices": ["Paris", "Rome"], "answer": "B"}])
>>> asked.kind, asked.answer, Format().options_of(asked), Format().right(asked)
('choices', 'Rome', (' A', ' B'), 1)
>>> print(Format().prompt_of(asked) + "Rome." + Format().cue + Format().answer_of(asked))
Question: Which is in Italy?
(A) Paris
(B) Rome
Let's think step by step.
Rome.
So the answer is B
>>> [solved] = read_questions([{"question": "How much?", "answer": "He has 2 * $9 = $<<2*9=18>>18.\\n#### 18"}])
>>> solved.kind, solved.chain, solved.answer
('numeric', 'He has 2 * $9 = $18.', '18')
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from finetune_lens.cot.answers import ANNOTATION, BOOLEANS, LABELS, number_of, number_text, plain
from finetune_lens.cot.steps import pattern_of
from finetune_lens.errors import InputError

Kind = Literal["choices", "boolean", "numeric", "text"]
EXPECTED = '{"question": "How many legs have 3 cats?", "answer": "12"}'
_KNOWN = ("id", "question", "answer", "choices", "chain")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: the file's, else the number of its line.
        question: its text.
        answer: the right answer; of a question with choices the text of the right one, given as that or as its label
            (A, B, …); of a yes-or-no question yes or no (true and false are read as these).
        choices: what to choose from, in order; empty for open questions.
        chain: a chain of thought that was supplied.
        fields: everything else that the file says of it.

    Raises:
        InputError: a text that is empty or none, a single choice or two of one text, an answer that is no choice.
    """

    id: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    chain: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "question", "answer"):
            _require_text(name, getattr(self, name))
        if self.chain is not None:
            _require_text("chain", self.chain, empty=True)
        if isinstance(self.choices, str) or not isinstance(self.choices, list | tuple):
            raise InputError(f"`choices`: expected a list of strings, found {_shown(self.choices)}")
        for choice in self.choices:
            _require_text("choices", choice)
        answer = self.answer.strip()
        if self.choices:
            answer = _chosen(self.answer, self.choices)
        elif answer.casefold() in BOOLEANS:
            answer = BOOLEANS[answer.casefold()]
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "answer", answer)

    @property
    def kind(self) -> Kind:
        """Choices where there are any; boolean for yes and no; numeric where the answer is a number; else text."""
        if self.choices:
            return "choices"
        if self.answer in BOOLEANS.values():
            return "boolean"
        return "text" if number_of(self.answer) is None else "numeric"

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The answers it may have: its choices; yes and no; none are listed for open questions."""
        return ("yes", "no") if self.kind == "boolean" else self.choices


def _chosen(answer: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    found = [plain(choice) for choice in choices]
    if len(choices) < 2 or len(set(found)) < len(found):
        raise InputError(f"`choices`: expected two or more different texts, found {_shown(choices)}")
    if plain(answer) in found:
        return choices[found.index(plain(answer))]
    label = answer.strip().strip("().").upper()
    if len(label) == 1 and label in LABELS[: len(choices)]:
        return choices[LABELS.index(label)]
    raise InputError(f"`answer`: expected one of the choices or its label (A, B, …), found {_shown(answer)}")


def read_questions(
    source: "str | Path | Iterable[Question | Mapping]",
    *,
    layout: Literal["auto", "ours", "gsm8k", "strategyqa"] = "auto",
    limit: int | None = None,
    annotations: bool = False,
) -> list[Question]:
    """Questions of a file, or made from what is given.

    Args:
        source: a .jsonl file, one object a line; a .json file with a list of objects; or an iterable of `Question` or
            such objects.
        layout: whose fields the objects have; "auto" goes by the first of them.
        limit: how many to read.
        annotations: keep the calculator's annotations in GSM8K's chains.

    Raises:
        InputError: which line (item) is wrong and why; no questions; two of one id.
    """
    if layout not in ("auto", *_LAYOUTS):
        raise InputError(f"layout: expected auto, {', '.join(_LAYOUTS)}; found {layout!r}")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected how many questions to read, 1 or more; found {limit}")
    if isinstance(source, str | Path):
        items, place = _rows(Path(source)), f"{source}, {'line' if Path(source).suffix.lower() == '.jsonl' else 'item'}"
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        items, place = enumerate(source, 1), "question"
    else:
        raise InputError(f"expected the path of a file or several questions, found {_shown(source)}")
    questions: dict[str, Question] = {}
    places: dict[str, int] = {}
    for number, item in items:
        try:
            if layout == "auto":
                layout = _layout_of(item)
            question = item if isinstance(item, Question) else _question(item, number, layout, annotations)
        except InputError as error:
            raise InputError(f"{place} {number}: {error}") from None
        if question.id in questions:
            raise InputError(
                f"{place} {number}: the id {question.id!r} is that of {place.split()[-1]} {places[question.id]}; give "
                "each question an id of its own, or none (its number is its id then)"
            )
        questions[question.id], places[question.id] = question, number
        if len(questions) == limit:
            break
    if not questions:
        raise InputError(f"{source if isinstance(source, str | Path) else 'the list'} holds no questions")
    return list(questions.values())


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not blank, or of each item of the list."""
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json"):
        raise InputError(
            f"{path}: questions are read from JSON lines, a file named *.jsonl with one object a line such as "
            f"{EXPECTED}, or from a list of such objects, a file named *.json"
        )
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; expected a file of questions")
    if suffix == ".json":
        found = _parsed(path.read_bytes(), f"{path}")
        if not isinstance(found, list):
            raise InputError(f"{path}: expected a list of objects such as {EXPECTED}, found {_shown(found)}")
        yield from enumerate(found, 1)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, _parsed(line, f"{path}, line {number}")


def _parsed(raw: bytes, place: str) -> Any:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{place} is not UTF-8 text; is this the file of the questions?")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error}): {_shown(text.strip())}; expected {EXPECTED}") from None


def _question(item: Any, number: int, layout: str, annotations: bool) -> Question:
    if not isinstance(item, Mapping):
        raise InputError(f"expected an object such as {EXPECTED}, found {_shown(item)}")
    given = _LAYOUTS[layout](item)
    for name in ("question", "answer"):
        if given.get(name) is None:
            raise InputError(f"no `{name}` among {', '.join(map(str, item)) or 'its fields: it has none'}")
    name = given.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise InputError(f"`id`: expected text or a whole number, found {_shown(name)}")
    chain, choices = given.get("chain"), given.get("choices") or ()
    if layout == "gsm8k" and not annotations:
        chain = ANNOTATION.sub("", chain)
    return Question(
        str(name),
        given["question"],
        _as_text(given["answer"]),
        tuple(map(_as_text, choices)) if isinstance(choices, list | tuple) else choices,
        chain,
        {key: value for key, value in given.items() if key not in _KNOWN},
    )


def _layout_of(item: Any) -> str:
    if isinstance(item, Mapping) and "chain" not in item:
        if "####" in str(item.get("answer")):
            return "gsm8k"
        if isinstance(item.get("answer"), bool) and ("facts" in item or "decomposition" in item):
            return "strategyqa"
    return "ours"


def _of_gsm8k(item: Mapping) -> dict[str, Any]:
    solution, mark, answer = str(item.get("answer", "")).rpartition("####")
    if not mark or not answer.strip():
        raise InputError(f"`answer`: expected a solution that ends in '#### 18', found {_shown(item.get('answer'))}")
    return {**item, "chain": solution.strip(), "answer": answer.strip()}


def _of_strategyqa(item: Mapping) -> dict[str, Any]:
    if not isinstance(item.get("answer"), bool):
        raise InputError(f"`answer`: expected true or false, found {_shown(item.get('answer'))}")
    steps = item.get("facts") or item.get("decomposition") or []
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise InputError(f"`facts`: expected a list of sentences, found {_shown(steps)}")
    steps = [step.strip() for step in steps if step.strip()]
    chain = " ".join(step if step.endswith((".", "!", "?")) else f"{step}." for step in steps)
    known = {"id": item["qid"]} if "qid" in item else {}
    kept = {name: value for name, value in item.items() if name not in ("qid", "evidence")}
    return {**kept, **known, "chain": chain or None}


_LAYOUTS: dict[str, Callable[[Mapping], Mapping]] = {
    "ours": lambda item: item,
    "gsm8k": _of_gsm8k,
    "strategyqa": _of_strategyqa,
}


@dataclass(frozen=True)
class Format:
    """How a question is put, and how its answer is asked for after the chain.

    Braces are places: any others stand for themselves.

    Attributes:
        prompt: the text before the chain; `{question}`, and `{choices}` where the choices are listed.
        choice: one choice in that list; `{label}` (A, B, …) and `{text}`. Without `{label}`, and where it is empty and
            the choices are not listed, the choices' texts are the answers, else their labels.
        cue: what comes after the chain and asks for the answer.
        answer: an answer after the cue; `{answer}`.
        steps: how a chain is cut into steps; see `split_steps`.
        stop: texts at which a chain that is being written is over; the cue, without white space, is always one.

    Raises:
        InputError: a place that is missing, a setting of the wrong type, no valid regular expression.
    """

    prompt: str = "Question: {question}{choices}\nLet's think step by step.\n"
    choice: str = "\n({label}) {text}"
    cue: str = "\nSo the answer is"
    answer: str = " {answer}"
    steps: str = "sentence"
    stop: tuple[str, ...] = ("####", "\nQuestion:")

    def __post_init__(self) -> None:
        for name in ("prompt", "choice", "cue", "answer", "steps"):
            _require_text(name, getattr(self, name), empty=name in ("choice", "cue"))
        for name, place in (("prompt", "{question}"), ("answer", "{answer}"), ("choice", "{text}")):
            text = getattr(self, name)
            if text and place not in text:
                raise InputError(f"`{name}` of the format: expected a place {place} in it, found {_shown(text)}")
        if self.steps not in ("sentence", "line"):
            pattern_of(self.steps)
        if isinstance(self.stop, str) or not isinstance(self.stop, list | tuple):
            raise InputError(f"`stop` of the format: expected a list of strings, found {_shown(self.stop)}")
        for text in self.stop:
            _require_text("stop", text)
        cue = self.cue.strip()
        object.__setattr__(self, "stop", tuple(dict.fromkeys([*([cue] if cue else []), *self.stop])))

    @classmethod
    def load(cls, path: "str | Path") -> "Format":
        """The format of a JSON file: an object with some of these settings, the others as they are by default."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; expected a JSON file")
        found = _parsed(path.read_bytes(), str(path))
        known = [f.name for f in fields(cls)]
        if not isinstance(found, dict) or (unknown := [name for name in found if name not in known]):
            what = unknown[0] if isinstance(found, dict) else _shown(found)
            raise InputError(f"{path}: expected an object of {', '.join(known)}; found {what}")
        try:
            return cls(**found)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_json(self) -> str:
        """The text of a file that `load` reads."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    @property
    def labelled(self) -> bool:
        """Whether choices are answered by their labels."""
        return "{label}" in self.choice

    def prompt_of(self, question: Question) -> str:
        """The text before the chain.

        Raises:
            InputError: choices that the prompt has no place for; more of them than there are labels.
        """
        if question.choices and self.choice and "{choices}" not in self.prompt:
            raise InputError(
                "`prompt` of the format has no place {choices} for the choices of this question; put it there, or set "
                "`choice` to an empty text to leave them out"
            )
        listed = zip(_labels(question) if self.labelled else question.choices, question.choices, strict=True)
        choices = "".join(_filled(self.choice, label=label, text=text) for label, text in listed)
        return _filled(self.prompt, question=question.question, choices=choices)

    def options_of(self, question: Question) -> tuple[str, ...]:
        """The texts that are scored after the cue, in the order of `question.alternatives`; none for open questions."""
        shown = _labels(question) if question.choices and self.labelled else question.alternatives
        return tuple(_filled(self.answer, answer=text) for text in shown)

    def right(self, question: Question) -> int | str:
        """Which option is right; of an open question the answer as `extract_answer` spells it."""
        if question.alternatives:
            return question.alternatives.index(question.answer)
        value = number_of(question.answer)
        return plain(question.answer) if value is None else number_text(value)

    def answer_of(self, question: Question) -> str:
        """The right answer as it stands after the cue."""
        options = self.options_of(question)
        return options[int(self.right(question))] if options else _filled(self.answer, answer=question.answer)


def _labels(question: Question) -> str:
    if len(question.choices) > len(LABELS):
        raise InputError(
            f"question {question.id} has {len(question.choices)} choices, and labels are {len(LABELS)}; leave "
            "{label} out of `choice` in the format to have their texts as answers"
        )
    return LABELS[: len(question.choices)]


def _filled(template: str, **texts: str) -> str:
    """The template with each {name} replaced; the texts themselves are not looked into."""
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)


def _require_text(name: str, value: Any, *, empty: bool = False) -> None:
    if not isinstance(value, str) or not (value.strip() or empty):
        raise InputError(f"`{name}`: expected text{'' if empty else ' that is not empty'}, found {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"`{name}`: {_shown(value)} is not valid Unicode (half a character, {error.reason})") from None


def _as_text(value: Any) -> Any:
    """Numbers, true and false as text; what is neither is left for the checks."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return value


def _shown(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"
