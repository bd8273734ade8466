"""The answers of both sides as labelled arrays, and as lines to read.

An answer is a number: which of the spellings that were given to its question, the right one first.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.cot.answers import LABELS
from finetune_lens.cot.trials import CORRUPTED, FRACTIONS
from finetune_lens.files import whole_file
from finetune_lens.results.cot import FIXED, MISSING, UNPARSED

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.cot.course import Course
    from finetune_lens.cot.questions import Format, Question


def dataset(
    questions: "Sequence[Question]", format: "Format", tests: Sequence[str], courses: "Mapping[str, Course]"
) -> "xr.Dataset":
    """What `results.cot.Faithfulness` describes."""
    import xarray as xr

    curves = [test for test in tests if test not in CORRUPTED]
    every = [item for course in courses.values() for item in course.items]
    row = {q.id: n for n, q in enumerate(questions)}
    spelling: list[dict[str, int]] = [{_right(q, format): 0} for q in questions]
    shape = (len(courses), len(questions), max(item.chain.sample for item in every) + 1)
    places = max(len(item.steps) for item in every) + 1
    steps = np.full(shape, MISSING, np.int32)
    answers = {name: np.full(shape, MISSING, np.int16) for name in ("full", "without")}
    curve = {
        "answer": np.full((len(curves), *shape, places), MISSING, np.int16),
        "probability": np.full((len(curves), *shape, places), np.nan, np.float32),
    }
    counts = {name: np.zeros((len(curves), *shape), np.int32) for name in ("unedited", "cut_off")}
    chain, ending = (np.full(shape, "", dtype=object) for _ in range(2))

    for s, course in enumerate(courses.values()):
        for n, item in enumerate(course.items):
            question = row[item.question.id]
            at, known = (s, question, item.chain.sample), spelling[question]
            steps[at], ending[at] = len(item.steps), item.chain.ending
            chain[at] = item.chain.text.replace("\0", "␀")  # NetCDF's strings end at one
            early = course.answers["early"][n]
            answers["without"][at], *_, answers["full"][at] = _numbers(early, known)
            for t, test in enumerate(curves):
                found, trial = course.answers[test][n], course.trials[test][n]
                if not item.steps:
                    continue
                curve["answer"][t, *at, found["places"]] = _numbers(found, known)
                if test in FIXED:
                    curve["answer"][t, *at, FIXED[test] % (len(item.steps) + 1)] = answers["full"][at]
                counts["unedited"][t, *at], counts["cut_off"][t, *at] = trial.unedited, trial.cut_off
                if item.question.alternatives and found["logprob"].shape[-1] and answers["full"][at] >= 0:
                    option = item.question.alternatives.index(str(early["answers"][-1]))
                    chances = _chances(found["logprob"])[:, option]
                    curve["probability"][t, *at, found["places"]] = chances
                    if test in FIXED:
                        whole = _chances(early["logprob"])[-1, option]
                        curve["probability"][t, *at, FIXED[test] % (len(item.steps) + 1)] = whole

    sides = ("side", "question", "sample")
    data: dict[str, Any] = {
        "steps": (sides, steps), "ending": (sides, ending), "chain": (sides, chain),
        **{name: (sides, values) for name, values in answers.items()},
        **{name: (("test", *sides, "place"), values) for name, values in curve.items()},
        **{name: (("test", *sides), values) for name, values in counts.items()},
        "options": ("question", np.array([len(q.alternatives) for q in questions])),
        **_spelt(questions, format, spelling),
    }  # fmt: skip
    coords: dict[str, Any] = {
        "side": np.array([*courses], dtype=object), "test": np.array(curves, dtype=object),
        "question": np.array([*row], dtype=object),
    }  # fmt: skip
    kinds = [kind for test in CORRUPTED if test in tests for kind in CORRUPTED[test]]
    if kinds:
        hurt = np.full((len(kinds), *shape, 1 + len(FRACTIONS)), np.nan)
        for s, course in enumerate(courses.values()):
            for n, item in enumerate(course.items):
                at = (s, row[item.question.id], item.chain.sample)
                for k, kind in enumerate(kinds):
                    hurt[k, *at] = course.right[kind][n]
        data["right_logprob"] = (("corruption", *sides, "fraction"), hurt)
        of = {kind: test for test, some in CORRUPTED.items() for kind in some}
        coords |= {
            "corruption": np.array(kinds, dtype=object), "fraction": [0.0, *FRACTIONS],
            "destroys": ("corruption", np.array([of[kind] for kind in kinds], dtype=object)),
        }  # fmt: skip
    return xr.Dataset(data, coords)


def _right(question: "Question", format: "Format") -> str:
    """As `extract_answer` spells it."""
    return question.answer if question.alternatives else str(format.right(question))


def _numbers(row: Mapping[str, np.ndarray], known: dict[str, int]) -> list[int]:
    """The number of each answer; new ones are added to those that are known."""
    return [
        known.setdefault(str(answer), len(known)) if parsed else UNPARSED
        for answer, parsed in zip(row["answers"], row["parsed"], strict=True)
    ]


def _chances(logprob: np.ndarray) -> np.ndarray:
    """(place, option) probabilities among the options; NaN behind a question's last."""
    odds = np.exp(logprob - np.nanmax(logprob, axis=-1, keepdims=True)) if logprob.size else logprob
    return odds / np.nansum(odds, axis=-1, keepdims=True)


def _spelt(
    questions: "Sequence[Question]", format: "Format", spelling: Sequence[Mapping[str, int]]
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Each question's answers, and by what they are compared with another question's: the label, where it has one."""
    most = max(map(len, spelling))
    texts, compared = (np.full((len(questions), most), "", dtype=object) for _ in range(2))
    for n, (question, known) in enumerate(zip(questions, spelling, strict=True)):
        for text, number in known.items():
            labelled = question.choices and format.labelled
            texts[n, number] = text.replace("\0", "␀")
            compared[n, number] = LABELS[question.choices.index(text)] if labelled else texts[n, number]
    dims = ("question", "spelling")
    return {"spelt": (dims, texts), "compared": (dims, compared)}


def write_answers(path: Path, courses: "Mapping[str, Course]") -> None:
    """JSONL, a line an answer: side, id, sample, test, place, chain (behind which it was asked), text, answer, same."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for side, course in courses.items():
            for line in _lines(course):
                file.write(json.dumps({"side": side} | line, ensure_ascii=False) + "\n")


def _lines(course: "Course") -> Iterator[dict[str, Any]]:
    for test, trials in course.trials.items():
        for item, trial, row, early in zip(
            course.items, trials, course.answers[test], course.answers["early"], strict=True
        ):
            full = str(early["answers"][-1]) if early["parsed"][-1] else None
            of = {"id": item.question.id, "sample": item.chain.sample, "test": test}
            for place, parsed, answer, text in zip(
                row["places"].tolist(), row["parsed"], row["answers"], row["texts"], strict=True
            ):
                said = str(answer) if parsed else None
                same = said is not None and said == full
                yield of | {
                    "place": place, "chain": trial.cuts[place], "text": str(text), "answer": said, "same": same,
                }  # fmt: skip
