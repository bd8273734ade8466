"""Character-string tasks: a task token, six letters, and what becomes of them.

`<reverse>gafbdk=` is answered `kdbfag<eos>`, one token a letter; the tokenizer puts `<bos>` in front. Seven base tasks
move or map letters; the new task, `flip`, recombines two of them: the reversed string, mirrored letter by letter. Its
task token is in the vocabulary from the start and occurs in no base task.

Every string belongs to one split by its hash, so that no string of the test split is ever trained on, in any task.

>>> answer("reverse", "gafbdk"), answer("next", "gafbdz")
('kdbfag', 'hbgcea')
>>> question("reverse", "gafbdk")
'<reverse>gafbdk='
"""

import hashlib
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from finetune_lens.tasks.word_level import word_level

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

LETTERS = string.ascii_lowercase
LENGTH = 6

_HALF = LENGTH // 2
_NEXT = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])
_MIRROR = str.maketrans(LETTERS, LETTERS[::-1])

BASE_TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text,
    "reverse": lambda text: text[::-1],
    "rotate": lambda text: text[1:] + text[0],
    "swap": lambda text: text[_HALF:] + text[:_HALF],
    "next": lambda text: text.translate(_NEXT),
    "mirror": lambda text: text.translate(_MIRROR),
    "sort": lambda text: "".join(sorted(text)),
}
NEW_TASK = "flip"
TASKS = BASE_TASKS | {NEW_TASK: lambda text: text[::-1].translate(_MIRROR)}

VOCABULARY = ["<pad>", "<bos>", "<eos>", *(f"<{task}>" for task in TASKS), "=", *LETTERS]
_ID = {token: i for i, token in enumerate(VOCABULARY)}

Split = Literal["train", "validation", "test"]
Item = tuple[str, str]  # task, string


def answer(task: str, text: str) -> str:
    """What `task` makes of `text`: the oracle."""
    return TASKS[task](text)


def question(task: str, text: str) -> str:
    """The prompt, as a user writes it (the tokenizer adds `<bos>`)."""
    return f"<{task}>{text}="


def split(text: str) -> Split:
    """Where `text` belongs, by its hash: 1/16 validation, 1/16 test, the rest train."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 16
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def draw(tasks: Sequence[str], n: int, generator: np.random.Generator, *, part: Split) -> list[Item]:
    """`n` items, tasks and strings uniform, strings all of split `part`; a string may come twice."""
    items: list[Item] = []
    while len(items) < n:
        letters = generator.integers(len(LETTERS), size=(n, LENGTH))
        texts = ["".join(LETTERS[i] for i in row) for row in letters]
        chosen = generator.integers(len(tasks), size=n)
        items += [(tasks[t], text) for t, text in zip(chosen, texts, strict=True) if split(text) == part]
    return items[:n]


def prompts(n: int, generator: np.random.Generator, *, part: Split = "test") -> list[dict[str, str]]:
    """`n` rows of a prompt file for the new task: the first letter of the answer, which the last of the text decides.

    `corrupt` has another last letter, and `wrong` is the first letter of its answer.
    """
    rows = []
    for number, (_, text) in enumerate(draw([NEW_TASK], n, generator, part=part)):
        others = [letter for letter in LETTERS if letter != text[-1]]
        other = text[:-1] + others[int(generator.integers(len(others)))]
        right, wrong = (answer(NEW_TASK, t)[0] for t in (text, other))
        prompt, corrupt = (f"<{NEW_TASK}>{t}=" for t in (text, other))
        rows.append({"id": str(number), "prompt": prompt, "answer": right, "wrong": wrong, "corrupt": corrupt})
    return rows


def tokenizer() -> "PreTrainedTokenizerFast":
    """One token a letter, one a task; `<bos>` is put in front; decoding gives the text back without spaces."""
    return word_level(VOCABULARY, "<[a-z]+>|.", longest=2 * LENGTH + 4)


def encode(items: Sequence[Item]) -> dict[str, "torch.Tensor"]:
    """`input_ids` and `labels`, (items, 2·LENGTH + 4) int64; labels are −100 but on the answer and its `<eos>`."""
    import torch

    rows = []
    for task, text in items:
        tokens = ["<bos>", f"<{task}>", *text, "=", *answer(task, text), "<eos>"]
        rows.append([_ID[token] for token in tokens])
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[:, : LENGTH + 3] = -100
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `n` items answered exactly."""

    correct: int
    n: int

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval."""
        from scipy.stats import binomtest

        interval = binomtest(self.correct, self.n).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)


def measure(model: "torch.nn.Module", items: Sequence[Item], *, batch_size: int = 500) -> Accuracy:
    """Exact-match accuracy of greedy answers, all letters and `<eos>`.

    One teacher-forced forward pass an item: greedy generation writes the right answer if and only if every token of it
    is the likeliest after the right tokens before it, so for exact match the two are the same.
    """
    import torch

    model.eval()
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            batch = encode(items[start : start + batch_size])
            likeliest = model(input_ids=batch["input_ids"]).logits[:, LENGTH + 2 : -1].argmax(-1)
            correct += int((likeliest == batch["labels"][:, LENGTH + 3 :]).all(1).sum())
    return Accuracy(correct, len(items))
