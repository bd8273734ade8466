"""The examples of a task in two parts, one to train or score on and one to measure, and other files to measure.

A text lies in one part only, however often it is in the file.

>>> from finetune_lens import zoo
>>> from finetune_lens.tasks import strings
>>> rows = [{"prompt": f"<copy>{word}=", "answer": word} for word in ("ab", "cd", "ef", "gh")]
>>> files = hold_out(rows, {"mirrored": [{"prompt": "<mirror>ab=", "answer": "zy"}]}, [strings.tokenizer()], share=0.25)
>>> len(files.train), {name: len(examples) for name, examples in files.measured.items()}
(3, {'task': 1, 'mirrored': 1})
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.evaluation import Examples, label_words, read_examples
from finetune_lens.prompts import read_prompts

TASK = "task"


@dataclass(frozen=True)
class Files:
    """What `hold_out` read.

    Attributes:
        train: to train or score on.
        measured: by name, the held-out part of the task (`TASK`) first where there is one.
        notes: what is to be said of them.
    """

    train: Examples
    measured: dict[str, Examples]
    notes: list[str]

    @property
    def objective(self) -> str:
        return self.train.objective

    @property
    def ids(self) -> np.ndarray:
        """(file, example) of what is measured; "" behind the last of a file."""
        found = np.full((len(self.measured), max(map(len, self.measured.values()))), "", dtype=object)
        for row, examples in zip(found, self.measured.values(), strict=True):
            row[: len(examples)] = [p.id for p in examples.prompts]
        return found

    def identity(self) -> dict[str, str]:
        """A hash of all that decides each part's scores."""
        return {name: examples.identity() for name, examples in [("", self.train), *self.measured.items()]}


def hold_out(
    prompts: Any,
    evaluate: Mapping[str, Any] | None,
    tokenizers: Sequence[Any],
    *,
    share: float,
    objective: str = "auto",
    template: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Files:
    """Read the task and what is measured beside it; hold a share of the task out.

    Args:
        prompts: the task: JSONL file or list of prompts.
        evaluate: name → other prompts to measure.
        tokenizers: of every model that reads them; they have to read alike.
        share: of the task's texts, to hold out; 0: the task is for training alone, and `evaluate` is measured.
        objective, template: as of `finetune_lens.evaluation`.
        limit: only the first so many prompts of each file.
        seed: of which texts are held out.

    Raises:
        InputError: fewer than two texts to part, files with and without answers, what `read_examples` refuses.
    """
    evaluate = dict(evaluate or {})
    task = read_prompts(prompts, limit=limit)
    notes, parts = [], {"": task}
    if share:
        if TASK in evaluate:
            raise InputError(f"{TASK!r} is what the held-out part of the task is called; give the file another name")
        texts = list(dict.fromkeys(p.prompt for p in task))
        if len(texts) < 2:
            raise InputError("the task is a single text; at least two are needed, one of them to be held out")
        order = np.random.default_rng(seed).permutation(len(texts))
        held = {texts[i] for i in order[: min(len(texts) - 1, max(1, round(share * len(texts))))]}
        parts = {"": [p for p in task if p.prompt not in held], TASK: [p for p in task if p.prompt in held]}
        notes.append(f"{len(parts[TASK])} of the {len(task)} prompts were held out, and are measured as {TASK!r}")
    parts |= {name: read_prompts(source, limit=limit) for name, source in evaluate.items()}
    labels = label_words(list(parts.values())) if objective == "labels" else ()
    how = {"objective": objective, "labels": labels, "template": template}
    found = {name: read_examples(part, tokenizers, **how) for name, part in parts.items()}
    if len({examples.objective for examples in found.values()}) > 1:
        said = ", ".join(f"{name or TASK}: {examples.objective}" for name, examples in found.items())
        raise InputError(f"some files have answers and some are texts alone ({said}); name one objective for all")
    train = found.pop("")
    known = set(train.texts)
    for name, examples in found.items():
        both = sum(text in known for text in examples.texts)
        if both:
            notes.append(
                f"{both} of the {len(examples)} prompts of {name} are among the task's own: they are not held out"
            )
    return Files(train, found, notes)


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Files under the names they have without folder and ending.

    Raises:
        InputError: two of one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise InputError(f"{path} and {found[path.stem]} are both called {path.stem!r}; give them different names")
        found[path.stem] = path
    return found
