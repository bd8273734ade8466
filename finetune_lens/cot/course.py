"""One side of an examination: its chains, what takes their place, and what it answers behind that.

Everything is kept in a folder as it is finished, by what it is of: a chain by its question and sample, an answer by the
texts behind which it was asked.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.cot.asking import ask, score_right
from finetune_lens.cot.chains import Chain
from finetune_lens.cot.edits import Editor, FileEditor, LocalEditor, filler
from finetune_lens.cot.generate import templated
from finetune_lens.cot.questions import Format, Question
from finetune_lens.cot.trials import (
    CORRUPTED,
    Item,
    Trial,
    answer_room,
    beginnings,
    carried_on,
    corrupted,
    early,
    edits_of,
    filled,
    foreign_steps,
    require_room,
    token_counts,
    tokens_of,
    write_on,
    written_within,
)
from finetune_lens.errors import InputError
from finetune_lens.stream import Row, Store

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel

SIDES = ("base", "tuned")
TEMPLATES = {"none": (False, False), "each": (True, True), "tuned": (False, True)}  # on the base's, the tuned's prompts
UNLIKE = "the tuned model read the prompts within its chat template, the base without"
AT_ONCE = 64  # chains that are asked, and kept, as one
FILES = {"mistakes": "--mistakes FILE", "paraphrase": "--paraphrases FILE"}


@dataclass(frozen=True)
class Settings:
    """What both sides have in common; see `examine_chains`. `drawing`: temperature and top_p."""

    format: Format
    tests: tuple[str, ...]
    scoring: str
    answer_tokens: int
    max_tokens: int
    seed: int
    batch_size: int | None
    progress: bool
    drawing: Mapping[str, float]

    @property
    def sampling(self) -> dict[str, Any]:
        """What is given wherever the models write."""
        given = {"max_tokens": self.max_tokens, "stop": self.format.stop, "seed": self.seed}
        return {**self.drawing, **given, "batch_size": self.batch_size, "progress": self.progress}


@dataclass(eq=False)
class Course:
    """One side.

    Attributes:
        templated: whether its prompts go through its chat template.
        items: the chains.
        edits: test → of each item: what stands there instead of each step.
        trials: test → of each item; "early" is always among them.
        answers: test → of each item: places, parsed, answers, texts, logprob of what was asked.
        right: corruption → of each item: log-probability of the right answer behind the chain, then behind each
            fraction of it destroyed.
    """

    side: str
    model: "HookedModel"
    questions: Sequence[Question]
    settings: Settings
    templated: bool
    partial: Path | None
    items: list[Item] = field(default_factory=list)
    edits: dict[str, list[list[str | None]]] = field(default_factory=dict)
    trials: dict[str, list[Trial]] = field(default_factory=dict)
    answers: dict[str, list[Row]] = field(default_factory=dict)
    right: dict[str, list[list[float]]] = field(default_factory=dict)
    store: Store | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        self.tokenizer = self.model.require_tokenizer()
        self.prompts = {q.id: settings.format.prompt_of(q) for q in self.questions}
        if self.templated:
            templated([""], self.tokenizer)  # refuses before anything is computed
        self.options = {q.id: settings.format.options_of(q) for q in self.questions if settings.scoring == "auto"}
        cue = settings.format.cue
        cues = {cue + o: f"of question {name}" for name, some in self.options.items() for o in ("", *some)}
        prompts = {text: f"of question {name}" for name, text in self.prompts.items()}
        self._require_readable("", {text: name for text, name in (prompts | cues).items() if text.strip()})
        if "filler" in settings.tests:
            self._require_readable("filler", {filler(1): "filler"})

    def _key(self, item: Item) -> list:
        """By what an answer is kept, with the texts behind which it was asked."""
        question = item.question
        return [question.id, item.chain.sample, self.prompts[question.id], question.answer, question.choices]

    def _part(self, name: str) -> Path | None:
        return None if self.partial is None else self.partial / name

    @functools.cached_property
    def room(self) -> int:
        """Tokens that the cue and the longest answer need."""
        asked = {"scoring": self.settings.scoring, "answer_tokens": self.settings.answer_tokens}
        return answer_room(self.model, self.questions, self.settings.format, **asked)

    def reason(self, supplied: list[Chain] | None, samples: int) -> None:
        """Take the chains, or sample them, and ask behind their beginnings."""
        put, chains = self.settings.format, supplied
        if chains is None:
            prompts = tokens_of(self.model, [(self.prompts[q.id], "") for q in self.questions], template=self.templated)
            require_room(self.model, self.questions, prompts, self.room)
            chains = written_within(
                self.model, prompts, names=[q.id for q in self.questions], samples=samples, room=self.room,
                partial=self._part("chains"), **self.settings.sampling,
            )  # fmt: skip
        by_id = {q.id: q for q in self.questions}
        self.items = [Item.of(by_id[c.question], c, put.steps) for c in chains]
        every = "early" in self.settings.tests
        self.trials["early"] = [early(item, every=every) for item in self.items]
        self.store = self._opened()
        self._ask("early")
        if "filler" in self.settings.tests:
            self.trials["filler"] = [filled(i, self.tokenizer) if i.steps else Trial("", ()) for i in self.items]

    def unparsed(self) -> str:
        """That no answer behind its chains can be parsed, and what to do; empty where one can."""
        if any(row["parsed"][-1] for row in self.answers["early"]):
            return ""
        shown = str(self.answers["early"][0]["texts"][-1])
        return (
            f"none of the {len(self.items)} answers of {self.model.name} ({self.side}) behind its chains can be "
            f"parsed; the first is {shown[:60]!r}. Change the format's prompt and cue (--format FILE), or have options "
            "scored (`choices` in the question file, scoring auto)"
        )

    def _opened(self) -> Store | None:
        """Where answers are kept."""
        if self.partial is None or not self.model.fingerprint:
            return None
        facts = {
            "analysis": "answers", "model": self.model.describe() | {"adapted": self.model.adapted},
            "format": asdict(self.settings.format), "scoring": self.settings.scoring, "template": self.templated,
            "tokens": self.settings.answer_tokens,
        }  # fmt: skip
        return Store(self.partial / "answers", self.model.fingerprint, facts)

    def edit(self, test: str, editor: Editor) -> None:
        """Edit every step, and see that all can be read, before anything is written after one."""
        found = edits_of(self.items, editor, partial=self._part(f"{test}-edits"))
        if isinstance(editor, LocalEditor):  # what a model writes may be anything; steps without an edit are counted
            found = [[edit if edit and self._reads(edit) else None for edit in edits] for edits in found]
        edited = {
            edit: f"of question {item.question.id}"
            for item, edits in zip(self.items, found, strict=True)
            for edit in edits
            if edit is not None and edit.strip()
        }
        if not edited and isinstance(editor, FileEditor) and any(item.steps for item in self.items):
            raise InputError(
                f"test {test}: {editor.path} has no edit for any step of the {self.side}'s chains; expected lines with "
                "the `id` of a question, `sample` and `step` from 0, and another text than the step's"
            )
        self._require_readable(test, edited)
        self.edits[test] = found

    def _reads(self, text: str) -> bool:
        return token_counts([text], self.tokenizer) != [None]

    def _require_readable(self, test: str, texts: Mapping[str, str]) -> None:
        """Refuse texts, with what each is of, that the tokenizer has no tokens for; of no test: those of questions."""
        from finetune_lens.prompts import Prompt, encode

        if not texts:
            return
        try:
            encode([Prompt(text, id=name) for text, name in texts.items()], self.tokenizer, need_answer=False)
        except InputError as error:
            if not test:
                raise InputError(f"{error}; how questions are put is told by --format FILE") from None
            rest = ",".join(name for name in self.settings.tests if name != test)
            ways = [f"supply edits that it reads ({FILES[test]})"] if test in FILES else []
            ways += [f"leave the test out (--tests {rest})"] if rest else []
            raise InputError(
                f"test {test}: {self.model.name} cannot read what is to stand in the chain: {error}; "
                f"{' or '.join(ways) or 'take another test (--tests)'}"
            ) from None

    def _carried(self, test: str, edits: list[list[str | None]]) -> list[Trial]:
        begun = [beginnings(test, item, row) for item, row in zip(self.items, edits, strict=True)]
        keys = {
            (item.question.id, item.chain.sample, k): (self.prompts[item.question.id], text)
            for item, found in zip(self.items, begun, strict=True)
            for k, text in found.items()
        }
        rests = write_on(
            self.model, keys, test=test, template=self.templated, room=self.room, partial=self._part(test),
            **self.settings.sampling,
        )  # fmt: skip
        return [
            carried_on(
                test, item, found,
                {k: rests[key] for k in found if (key := (item.question.id, item.chain.sample, k)) in rests},
                0 if test == "resample" else sum(edit is None for edit in row),
            )
            for item, found, row in zip(self.items, begun, edits, strict=True)
        ]  # fmt: skip

    def answer(self) -> None:
        """Write on after every edit, and ask behind everything."""
        if "resample" in self.settings.tests:
            self.edits["resample"] = [[None] * len(item.steps) for item in self.items]
        self.trials |= {test: self._carried(test, edits) for test, edits in self.edits.items()}
        for test in self.trials:
            if test not in self.answers:
                self._ask(test)
        for kind in (kind for test in CORRUPTED if test in self.settings.tests for kind in CORRUPTED[test]):
            self.right[kind] = self._hurt(kind)

    def _ask(self, test: str) -> None:
        trials = self.trials[test]
        keys = [[test, *self._key(item), *trial[:2]] for item, trial in zip(self.items, trials, strict=True)]
        self.answers[test] = self._kept(test, keys, lambda rows: self._asked(rows, trials))

    def _asked(self, rows: list[int], trials: list[Trial]) -> list[Row]:
        places = [[k for k, cut in enumerate(trials[row].cuts) if cut is not None] for row in rows]
        items = [self.items[row] for row in rows]
        found = ask(
            self.model, [i.question for i in items], self.settings.format, [trials[row].whole for row in rows],
            [[trials[row].cuts[k] for k in at] for row, at in zip(rows, places, strict=True)],
            prompts=[self.prompts[i.question.id] for i in items], scoring=self.settings.scoring,
            template=self.templated, max_tokens=self.settings.answer_tokens, batch_size=self.settings.batch_size,
        )  # fmt: skip
        return [
            {
                "places": np.array(at, np.int64), "parsed": np.array([a is not None for a in answers], bool),
                "answers": np.array([a or "" for a in answers], str), "texts": np.array(found.texts[n], str),
                "logprob": found.logprob[n, : len(at)],
            }
            for n, (at, answers) in enumerate(zip(places, found.answers, strict=True))
        ]  # fmt: skip

    def _hurt(self, kind: str) -> list[list[float]]:
        """Of each item: log-probability of the right answer behind the chain, then behind each fraction destroyed."""
        seed = self.settings.seed
        steps = {q.id: foreign_steps(self.items, q.id, seed=seed) for q in self.questions if kind == "insert"}
        texts = [corrupted(i, kind, seed=seed, foreign=steps.get(i.question.id, [])) for i in self.items]
        keys = [[kind, *self._key(i), i.chain.text, found] for i, found in zip(self.items, texts, strict=True)]

        def work(rows: list[int]) -> list[Row]:
            items = [self.items[row] for row in rows]
            cuts = [
                [i.chain.text, *(t for t in texts[row] if t is not None)] for i, row in zip(items, rows, strict=True)
            ]
            found = score_right(
                self.model, [i.question for i in items], self.settings.format, [i.chain.text for i in items], cuts,
                prompts=[self.prompts[i.question.id] for i in items], template=self.templated,
                batch_size=self.settings.batch_size,
            )  # fmt: skip
            return [{"logprob": values[: len(cut)]} for values, cut in zip(found, cuts, strict=True)]

        found = []
        for row, some in zip(self._kept(kind, keys, work), texts, strict=True):
            values = iter(row["logprob"].tolist())
            found.append([next(values), *(np.nan if text is None else next(values) for text in some)])
        return found

    def _kept(self, name: str, keys: list[list], work: Callable[[list[int]], list[Row]]) -> list[Row]:
        """A row of each item: what is kept, and the rest by `work`, some at a time."""
        from tqdm.auto import tqdm

        names = [json.dumps(key) for key in keys]
        found = {n: row for n, key in enumerate(names) if self.store and (row := self.store.get(key)) is not None}
        todo = [n for n in range(len(names)) if n not in found]
        options = {"desc": f"{self.side}: {name}", "unit": "", "disable": not self.settings.progress}
        with tqdm(total=len(names), initial=len(found), **options) as bar:
            for start in range(0, len(todo), AT_ONCE):
                some = todo[start : start + AT_ONCE]
                for n, row in zip(some, work(some), strict=True):
                    found[n] = row
                    if self.store:
                        self.store.put(names[n], row)
                bar.update(len(some))
        return [found[n] for n in range(len(names))]
