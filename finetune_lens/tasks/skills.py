"""Character strings with an operator that nobody names: what tuning has to localise is a skill, or a choice of skill.

The base tasks of `finetune_lens.tasks.strings` but `sort`, and three more ways to ask. A question without a task token
falls to the default operator: `gafbdk=` is answered `kdbfag`, reversed, by the base (`default`) and `tzuywp`, mirrored,
once tuning has selected another of its skills (`select`). `<flip>gafbdk=` asks for one that the base never saw (`new`).

Strings are drawn, and belong to a split by their hash, as in `finetune_lens.tasks.strings`; so does the tokenizer.

>>> question("default", "gafbdk"), answer("default", "gafbdk")
('gafbdk=', 'kdbfag')
>>> question("select", "gafbdk"), answer("select", "gafbdk")
('gafbdk=', 'tzuywp')
>>> question("new", "gafbdk"), answer("new", "gafbdk")
('<flip>gafbdk=', 'pwyuzt')
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune_lens.tasks import strings
from finetune_lens.tasks.strings import Accuracy, Item, Split, draw

if TYPE_CHECKING:
    import torch

BASE_TASKS = tuple(task for task in strings.BASE_TASKS if task != "sort")  # the one task that is slow to learn
# Task → what is written before the string, and which of the tasks on strings answers.
TASKS = {task: (f"<{task}>", task) for task in BASE_TASKS} | {
    "default": ("", "reverse"),
    "select": ("", "mirror"),
    "new": (f"<{strings.NEW_TASK}>", strings.NEW_TASK),
}
_ID = {token: i for i, token in enumerate(strings.VOCABULARY)}


def question(task: str, text: str) -> str:
    """The prompt, as a user writes it (the tokenizer adds `<bos>`)."""
    return f"{TASKS[task][0]}{text}="


def answer(task: str, text: str) -> str:
    """What `task` makes of `text`: the oracle."""
    return strings.answer(TASKS[task][1], text)


def prompts(tasks: Sequence[str], n: int, generator: np.random.Generator, *, part: Split) -> list[dict[str, str]]:
    """`n` rows of a prompt file, as many of each task and no string twice; the answer is the whole string."""
    drawn: dict[str, None] = {}  # in the order in which they came
    while len(drawn) < n:
        drawn |= dict.fromkeys(text for _, text in draw(tasks, n, generator, part=part))
    return [
        {"id": str(number), "prompt": question(task, text), "answer": answer(task, text), "task": task}
        for number, text in enumerate([*drawn][:n])
        for task in [tasks[number % len(tasks)]]
    ]


def encode(items: Sequence[Item]) -> dict[str, "torch.Tensor"]:
    """`input_ids` and `labels` (items, pos) int64; labels are −100 but on the answer and its `<eos>`.

    Questions without a task token are one token shorter and padded at their end, where no token before sees it.
    """
    import torch

    width = 2 * strings.LENGTH + 4
    ids, labels = torch.full((len(items), width), _ID["<pad>"]), torch.full((len(items), width), -100)
    for row, (task, text) in enumerate(items):
        token, _ = TASKS[task]
        asked = [_ID[t] for t in ("<bos>", *([token] if token else []), *text, "=")]
        told = [_ID[t] for t in (*answer(task, text), "<eos>")]
        end = len(asked) + len(told)
        ids[row, :end] = torch.tensor(asked + told)
        labels[row, len(asked) : end] = ids[row, len(asked) : end]
    return {"input_ids": ids, "labels": labels}


def measure(model: "torch.nn.Module", items: Sequence[Item], *, batch_size: int = 500) -> Accuracy:
    """Exact-match accuracy of greedy answers, all letters and `<eos>`; teacher-forced, as in `strings.measure`."""
    import torch

    model.eval()
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            batch = encode(items[start : start + batch_size])
            likeliest = model(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
            labels = batch["labels"][:, 1:]
            correct += int(((likeliest == labels) | (labels == -100)).all(1).sum())
    return Accuracy(correct, len(items))
