"""Where edited steps come from: rules, a file, or a local model.

An editor is called with places in chains and gives, for each, the text that takes the step's place, or None where it
has none; what it leaves undone is for the caller to count.

>>> from finetune_lens.cot.questions import Question
>>> asked = Question("q", "How much?", "18")
>>> RuleEditor("mistake", seed=1)([Place(asked, 0, ("She has 9 eggs.", " So 9 * 2 = 18."), 1)])
[' So 9 * 2 = 16.']
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np

from finetune_lens.cot.edits.mistakes import mistake
from finetune_lens.cot.edits.paraphrases import paraphrase
from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from finetune_lens.cot.questions import Question
    from finetune_lens.hooked import HookedModel

EXPECTED = '{"id": "q1", "sample": 0, "step": 2, "text": "So he has 7 left."}'
INSTRUCTIONS = {
    "mistake": "Rewrite this step of a solution so that it contains one mistake. Give the rewritten step alone.\n\n"
    "Step: {step}\nRewritten:",
    "paraphrase": "Say this step of a solution in other words, of the same meaning. Give the rewritten step alone.\n\n"
    "Step: {step}\nRewritten:",
}


class Place(NamedTuple):
    """One step of one chain.

    Attributes:
        question: what the chain answers.
        sample: which of the question's chains.
        steps: all steps of the chain.
        step: which of them, from 0.
    """

    question: "Question"
    sample: int
    steps: Sequence[str]
    step: int


class Editor(Protocol):
    """Gives other texts for steps."""

    def __call__(self, places: Sequence[Place]) -> list[str | None]:
        """For each place what stands there instead of its step, white space included; None where there is nothing."""
        ...


def generator_of(seed: int, question: str, step: int) -> np.random.Generator:
    """The generator of one step of a question's chains: the same in every process, whatever else is edited."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]), step])


@dataclass(frozen=True)
class RuleEditor:
    """Mistakes or paraphrases by rules, from a seed; an entity may be exchanged for one of the question or chain."""

    kind: Literal["mistake", "paraphrase"]
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in INSTRUCTIONS:
            raise InputError(f"kind of edit: expected {' or '.join(INSTRUCTIONS)}, found {self.kind!r}")

    def __call__(self, places: Sequence[Place]) -> list[str | None]:
        return [self._edited(place) for place in places]

    def _edited(self, place: Place) -> str | None:
        step, generator = place.steps[place.step], generator_of(self.seed, place.question.id, place.step)
        if self.kind == "mistake":
            return mistake(step, generator, context=f"{place.question.question}\n{''.join(place.steps)}")
        return _new(step, paraphrase(step, generator))


@dataclass(frozen=True)
class FileEditor:
    """Edits that a file supplies: JSONL of `id` (the question's), `sample` (0 where it is not given), `step` (from 0)
    and `text`. White space around a step is kept; a text that is the step itself is no edit.

    Raises:
        InputError: which line is wrong and why; two of one place.
    """

    path: str | Path
    texts: Mapping[tuple[str, int, int], str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", _read(Path(self.path)))

    def __call__(self, places: Sequence[Place]) -> list[str | None]:
        keys = [(place.question.id, place.sample, place.step) for place in places]
        return [_new(p.steps[p.step], self.texts.get(key, "")) for p, key in zip(places, keys, strict=True)]


@dataclass(frozen=True)
class LocalEditor:
    """Edits that a local model writes, greedily, one line each, without the question in view.

    Attributes:
        model: reads the instruction as a user's message where its tokenizer has a chat template.
        instruction: with the place {step}; see INSTRUCTIONS.
        max_tokens: of one edit; one that is cut off counts as none.
    """

    model: "HookedModel"
    instruction: str
    max_tokens: int = 128
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if "{step}" not in self.instruction:
            raise InputError(f"instruction: expected a place {{step}} in it, found {self.instruction!r}")

    def __call__(self, places: Sequence[Place]) -> list[str | None]:
        from finetune_lens.cot.generate import sample

        asked = [place.steps[place.step].strip() for place in places]
        steps = [step for step in dict.fromkeys(asked) if step]
        if not steps:
            return [None] * len(places)
        written = sample(
            self.model, [self.instruction.replace("{step}", step) for step in steps], names=steps, temperature=0,
            max_tokens=self.max_tokens, stop=("\n",), batch_size=self.batch_size, progress=False,
            template=bool(getattr(self.model.require_tokenizer(), "chat_template", None)),
        )  # fmt: skip
        texts = {chain.question: "" if chain.ending == "length" else chain.text for chain in written}
        return [_new(place.steps[place.step], texts.get(step, "")) for place, step in zip(places, asked, strict=True)]


def _new(step: str, text: str) -> str | None:
    """The text with the white space around the step; None where it is empty or the step itself."""
    body = step.strip()
    if not text.strip() or text.strip() == body:
        return None
    front, _, back = step.partition(body) if body else ("", "", "")
    return front + text.strip() + back


def _read(path: Path) -> dict[tuple[str, int, int], str]:
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; expected JSON lines of edits")
    found: dict[tuple[str, int, int], str] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        if not raw.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place} is not JSON ({error}); expected one object a line such as {EXPECTED}") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected an object such as {EXPECTED}, found {row!r}")
        row = {"sample": 0} | row
        for name, kinds in {"id": (str, int), "sample": (int,), "step": (int,), "text": (str,)}.items():
            if not isinstance(row.get(name), kinds) or isinstance(row[name], bool):
                raise InputError(f"{place}: `{name}` is {row.get(name)!r}; expected an object such as {EXPECTED}")
        key = (str(row["id"]), row["sample"], row["step"])
        if key in found:
            raise InputError(f"{place}: a second text for step {key[2]} of sample {key[1]} of question {key[0]}")
        found[key] = row["text"]
    if not found:
        raise InputError(f"{path} holds no edits; expected lines such as {EXPECTED}")
    return found
