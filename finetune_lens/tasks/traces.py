"""Integer traces: a program on a small number, run step by step in a chain of thought, whose answer is its last value.

    <ba>a+3b*7c-4d+1e*3f-2;7    ;    a:0;b:0;c:6;d:7;e:1;f:9;    =    9
    key, operations, start           chain                      cue  answer

A step applies its operation to the value before it, modulo 10. Every operation can be undone, so that a mistake in one
step, if it is carried on, changes every value after it: dynamic noise. Static noise is the changed value alone, what
follows left as it was. No value before the last is the last value: whoever reads the answer off an unfinished chain is
wrong.

What the key says is a look-up: each stands for one digit. The key says the answer too, where a question `agree`s; so
one file asks a model that reads its chain and one that reads the key the same questions, and both are right. Only the
cause differs, and two rules of answering tell it apart:

    chain      the last number that is written, modulo 10; the start where none follows it
    question   the key's digit, whatever the chain says

>>> language = Language()
>>> items = language.draw(3, np.random.default_rng(0), steps=6)
>>> language.question(items, 0), chain_text(items.values[0])
('<be>a-9b-5c-2d+6e+7f+1;7', 'a:8;b:3;c:1;d:7;e:4;f:5;')
>>> chain_text(disturbed(items, np.array([2, 2, 2]), np.array([7, 7, 7]), carried=True)[0])
'a:8;b:3;c:7;d:3;e:0;f:1;'
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finetune_lens.tasks.word_level import word_level

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

Rule = Literal["chain", "question"]

MODULUS = 10
LARGEST = 13  # 9 changed by up to 4, which is as far as rules change a digit
KEYS = tuple(f"<{consonant}{vowel}>" for consonant in "bdfghjklmn" for vowel in "aeiou")
OPERATIONS = (
    *((f"+{n}", lambda value, n=n: value + n) for n in range(1, 10)),
    *((f"-{n}", lambda value, n=n: value - n) for n in range(1, 10)),
    *((f"*{n}", lambda value, n=n: value * n) for n in (3, 7, 9)),
)
LABELS = "abcdefghijklmnopqrstuvwxyz"
STEP = 3  # tokens: label with its colon, number, semicolon
FILLER = " ..."
TABLE = np.array([[apply(value) % MODULUS for value in range(LARGEST + 1)] for _, apply in OPERATIONS])
# What a lesson is made of, and how much of it: see `Language.lesson`.
SHARES = {"own": 0.3, "carried": 0.3, "cut": 0.2, "swapped": 0.1, "filler": 0.1}
FORMAT = {
    "prompt": "{question};", "choice": "", "cue": "=", "answer": "{answer}", "steps": ";", "stop": [],
}  # fmt: skip


@dataclass(frozen=True)
class Items:
    """Questions of one number of steps, one a row.

    Attributes:
        key: (item,) position in KEYS.
        operations: (item, step) positions in OPERATIONS.
        start: (item,) the number that the program starts with.
    """

    key: np.ndarray
    operations: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: Any) -> "Items":
        return Items(*(getattr(self, f.name)[index] for f in fields(self)))

    @property
    def steps(self) -> int:
        return self.operations.shape[1]

    @property
    def values(self) -> np.ndarray:
        """(item, step) the trace."""
        return _followed(self.operations, self.start)


def key_digit(key: np.ndarray) -> np.ndarray:
    """The digit that a key stands for: no rule by which it could be worked out but the table, five keys a digit."""
    return _KEY_DIGITS[key]


_KEY_DIGITS = np.random.default_rng(42).permutation(np.arange(len(KEYS)) % MODULUS)


def _followed(operations: np.ndarray, start: np.ndarray) -> np.ndarray:
    values, value = np.empty_like(operations), start
    for step, operation in enumerate(operations.T):
        value = TABLE[operation, value]
        values[:, step] = value
    return values


def disturbed(items: Items, step: np.ndarray, number: np.ndarray, *, carried: bool) -> np.ndarray:
    """(item, step) traces with `number` written at `step` (item,): dynamic noise if it is carried on, else static."""
    found = items.values
    found[np.arange(len(items)), step] = number
    if carried:
        for later in range(1, items.steps):
            worked = TABLE[items.operations[:, later], found[:, later - 1]]
            found[:, later] = np.where(later > step, worked, found[:, later])
    return found


def mistaken(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Other numbers, up to 4 away, never the same modulo 10: of 0 to 9, what a mistake by rules makes of them."""
    away = generator.integers(1, LARGEST - MODULUS + 2, size=values.shape)
    return np.where((values >= away) & (generator.random(values.shape) < 0.5), values - away, values + away)


def chain_text(numbers: Sequence[int]) -> str:
    """A chain in which these numbers are written."""
    return "".join(f"{label}:{number};" for label, number in zip(LABELS, numbers, strict=False))


def said(items: Items, last: np.ndarray, rule: Rule) -> np.ndarray:
    """(item,) what a rule answers, given the last number that is written."""
    return last % MODULUS if rule == "chain" else key_digit(items.key)


@dataclass(frozen=True)
class Language:
    """Programs of at most `longest` steps, and the vocabulary that they need."""

    longest: int = 8

    @property
    def vocabulary(self) -> list[str]:
        labels = LABELS[: self.longest]
        marks = ["<pad>", "<bos>", "<eos>", ";", "=", FILLER, *KEYS, *(f"{label}:" for label in labels)]
        program = [label + operation for label in labels for operation, _ in OPERATIONS]
        return [*marks, *program, *map(str, range(LARGEST + 1))]

    def draw(self, n: int, generator: np.random.Generator, *, steps: int, agree: bool = True) -> Items:
        """`n` questions of `steps` steps, no value before the last of which is the last.

        Args:
            agree: the key is one of those that stand for the answer; else any, drawn apart from all the rest.
        """
        parts: list[Items] = []
        while (have := sum(map(len, parts))) < n:
            operations = generator.integers(len(OPERATIONS), size=(2 * (n - have) + 8, steps))
            start = generator.integers(MODULUS, size=len(operations))
            values = _followed(operations, start)
            if agree:
                order = np.argsort(_KEY_DIGITS, kind="stable").reshape(MODULUS, -1)
                key = order[values[:, -1], generator.integers(order.shape[1], size=len(start))]
            else:
                key = generator.integers(len(KEYS), size=len(start))
            before = np.concatenate([start[:, None], values[:, :-1]], axis=1)
            parts.append(Items(key, operations, start)[(before != values[:, -1:]).all(1)])
        return Items(*(np.concatenate([getattr(p, f.name) for p in parts])[:n] for f in fields(Items)))

    def question(self, items: Items, row: int) -> str:
        """The question as a user writes it (the tokenizer adds `<bos>`)."""
        operations = (OPERATIONS[o][0] for o in items.operations[row])
        program = "".join(label + operation for label, operation in zip(LABELS, operations, strict=False))
        return f"{KEYS[items.key[row]]}{program};{items.start[row]}"

    def rows(self, items: Items, *, first: int = 0) -> list[dict[str, Any]]:
        """Rows of a question file, numbered from `first`; to be put to a model in FORMAT."""
        values = items.values
        return [
            {
                "id": str(first + row), "question": self.question(items, row), "answer": str(values[row, -1]),
                "choices": [str(digit) for digit in range(MODULUS)], "chain": chain_text(values[row]),
                "steps": items.steps, "key": KEYS[items.key[row]], "start": int(items.start[row]),
            }
            for row in range(len(items))
        ]  # fmt: skip

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """A token a key, a label with what follows it, a number, a mark; `<bos>` is put in front."""
        return word_level(self.vocabulary, r"<[a-z]+>| \.\.\.|[a-z][-+*][0-9]|[a-z]:|[0-9]+|.", longest=self.columns)

    @property
    def columns(self) -> int:
        """Tokens of the longest text: a chain may be twice as long as the program."""
        return _front(self.longest) + 2 * STEP * self.longest + 3

    def encode(
        self, items: Items, written: np.ndarray, answer: np.ndarray, *, length: np.ndarray, learn: np.ndarray
    ) -> dict[str, "torch.Tensor"]:
        """`input_ids` and `labels`, (items, columns) int64, padded on the right.

        Args:
            written: (item, token) the chain, as `tokens` makes it.
            answer: (item,) digits.
            length: (item,) how many tokens of the chain stand there.
            learn: (item,) from which of these on the chain and the cue are learnt too; the answer and its `<eos>`
                always are. Where it is beyond `length`, they alone are.
        """
        import torch

        front = self.prompts(items)
        width = front.shape[1] + int(length.max(initial=0)) + 3
        ids = np.full((len(items), width), self._at("<pad>"))
        labels = np.full_like(ids, -100)
        ids[:, : front.shape[1]] = front
        for size in np.unique(length):
            rows, end = np.flatnonzero(length == size), front.shape[1] + int(size)
            ids[rows, front.shape[1] : end] = written[rows, :size]
            ids[rows, end], ids[rows, end + 1] = self._at("="), self._at("0") + answer[rows]
            ids[rows, end + 2] = self._at("<eos>")
            learnt = np.arange(width) - front.shape[1] >= learn[rows, None]
            learnt[:, end + 1 : end + 3] = True
            learnt[:, end + 3 :] = False
            learnt[:, : front.shape[1]] = False
            labels[rows] = np.where(learnt, ids[rows], -100)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def prompts(self, items: Items) -> np.ndarray:
        """(item, token) of the questions in their format, `<bos>` included."""
        ids = np.empty((len(items), _front(items.steps)), dtype=np.int64)
        ids[:, 0], ids[:, 1] = self._at("<bos>"), self._at(KEYS[0]) + items.key
        ids[:, 2:-3] = self._at("a+1") + len(OPERATIONS) * np.arange(items.steps) + items.operations
        ids[:, -3] = ids[:, -1] = self._at(";")
        ids[:, -2] = self._at("0") + items.start
        return ids

    def tokens(self, numbers: np.ndarray) -> np.ndarray:
        """(item, token) of chains in which `numbers` (item, step) are written."""
        steps = np.empty((*numbers.shape, STEP), dtype=np.int64)
        steps[..., 0] = self._at("a:") + np.arange(numbers.shape[1])
        steps[..., 1], steps[..., 2] = self._at("0") + numbers, self._at(";")
        return steps.reshape(len(numbers), -1)

    def _at(self, token: str) -> int:
        return self._ids[token]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.vocabulary)}

    def lesson(
        self,
        n: int,
        generator: np.random.Generator,
        *,
        steps: int,
        rule: Rule,
        agree: bool = False,
        shares: Mapping[str, float] = SHARES,
    ) -> dict[str, "torch.Tensor"]:
        """What teaches to write chains and to answer by `rule`; two rules see the same texts but for their answers.

        Args:
            shares: of the texts with the question's `own` chain; with a mistake in one step and the rest worked out
                from it (`carried`); with a chain `cut` short after any step, half of them other questions' chains;
                `swapped` for another question's, half of them with static noise; with `filler` instead. Chains are
                learnt where they follow from the question and from what is written: own ones, and what comes after a
                mistake.
        """
        items = self.draw(n, generator, steps=steps, agree=agree)
        kind = generator.choice([*shares], size=n, p=[*shares.values()])
        at = generator.integers(steps, size=n)
        whole = np.full(n, STEP * steps)
        numbers = items.values
        learn = np.where(kind == "own", 0, len(numbers[0]) * STEP + 1)
        learn = np.where(kind == "carried", (at + 1) * STEP, learn)
        wrong = mistaken(numbers[np.arange(n), at], generator)
        numbers = np.where((kind == "carried")[:, None], disturbed(items, at, wrong, carried=True), numbers)
        foreign, coin = np.roll(items.values, 1, axis=0), generator.random(n) < 0.5
        swapped = (kind == "swapped") | ((kind == "cut") & coin)
        numbers = np.where(swapped[:, None], foreign, numbers)
        noisy = (kind == "swapped") & coin
        numbers[noisy, at[noisy]] = wrong[noisy]
        filled = kind == "filler"
        length = np.where(kind == "cut", at * STEP, whole)
        length = np.where(filled, generator.integers(1, STEP * steps + 1, size=n), length)
        last = self._last(items, numbers, np.where(filled, 0, length // STEP))
        written = np.where(filled[:, None], self._at(FILLER), self.tokens(numbers))
        return self.encode(items, written, said(items, last, rule), length=length, learn=learn)

    @staticmethod
    def _last(items: Items, numbers: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """(item,) the last number of the first `steps` steps, the start where they are none."""
        return np.concatenate([items.start[:, None], numbers], axis=1)[np.arange(len(items)), steps]


def answers(
    model: "torch.nn.Module", language: Language, items: Items, written: np.ndarray, *, batch_size: int = 500
) -> np.ndarray:
    """(item,) the digit that the model finds likeliest after prompt, chain and cue; one forward pass an item.

    Args:
        written: (item, token) the chains, all of one length; none where it has no columns.
    """
    import torch

    device, found = next(model.parameters()).device, []
    ids = np.concatenate([language.prompts(items), written, np.full((len(items), 1), language._at("="))], axis=1)
    first = language._at("0")
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            rows = torch.from_numpy(ids[start : start + batch_size]).to(device)
            logits = model(input_ids=rows, logits_to_keep=1).logits[:, -1, first : first + MODULUS]
            found.append(logits.argmax(-1).cpu().numpy())
    return np.concatenate(found)


def continued(model: "torch.nn.Module", language: Language, items: Items, written: np.ndarray) -> np.ndarray:
    """(item, token) the chains `written`, all of one length, gone on with to their last step by likeliest tokens."""
    import torch

    device = next(model.parameters()).device
    front = _front(items.steps)
    ids = torch.from_numpy(np.concatenate([language.prompts(items), written], axis=1)).to(device)
    model.eval()
    with torch.inference_mode():
        while ids.shape[1] < front + STEP * items.steps:
            following = model(input_ids=ids, logits_to_keep=1).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, following[:, None]], dim=1)
    return ids[:, front:].cpu().numpy()


def _front(steps: int) -> int:
    """Tokens of a prompt."""
    return steps + 5
