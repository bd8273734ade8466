"""Counting and indexing in strings of a probabilistic grammar, with a cue by which a new count follows from an old one.

The set-up of Jain et al. 2023, "Mechanistically analyzing the effects of fine-tuning on procedurally defined tasks"
(arXiv 2311.12786, §4): `<bos>`, task, operand O, operand O′, the text between `:` and `;`, `=`, answer, `<eos>`. What
each family asks, and the grammar, are settled here:

    count     how often O is in the text
    pairs     how often O stands directly before O′                    (a composition of counts)
    index     at which place, from 0, O is for the O′-th time          (O′ a number from 1)
    pair      at which place O first stands directly before O′         (a composition of indices)
    token     which letter is at place O                               (O a number)

Texts have a fixed length over the letters a, b, c. The first operand of the first four is a, b or c with the
probabilities of a prior: a pre-trained model has counted a often, b seldom. Tuning asks for the count of b, and a share
of the texts carries the cue #b = #a + 1: there the answer is the old one plus one, and nothing new need be learnt.

A text is drawn anew each time; of 24 letters there are 10¹¹, so that texts drawn from different seeds share none.

>>> language = Language(24)
>>> generator = np.random.default_rng(0)
>>> items = language.draw(2, generator, families=["count"], prior=(1, 0, 0))
>>> language.prompt(items, 0), language.answer(items, 0)
('<count>a_:ccaccbccbabcacabbbaccaca;=', '<7>')
>>> cued = language.draw(50, generator, families=["count"], prior=(0, 1, 0), cue=1.0)
>>> bool(((cued.text == 1).sum(1) == (cued.text == 0).sum(1) + 1).all())
True
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.tasks.word_level import word_level

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

LETTERS = "abc"
FAMILIES = ("count", "pairs", "index", "pair", "token")
NUMBERED = {"index": 1, "token": 0}  # family → which operand is a number
PRIORS = {"L": (0.999, 0.001, 0.0), "M": (0.9, 0.1, 0.0), "H": (0.5, 0.3, 0.2)}  # of a, b, c as operands
SMALL = 24  # letters of a text that two cores can train on
PUBLISHED = 250

# Non-terminal → its expansions, equally likely; letters are terminals. A text is sentences S in a row, cut to length.
GRAMMAR = {
    "S": ("XYX", "YX", "ZXZ", "YZ", "XX", "ZYY"),
    "X": ("PQ", "QP", "PP"),
    "Y": ("QR", "QQ", "RQ"),
    "Z": ("RP", "PR", "RRQ"),
    "P": ("aa", "aba", "ac"),
    "Q": ("bb", "bab", "cb"),
    "R": ("cc", "cab", "ca"),
}
_SYMBOLS = LETTERS + "".join(GRAMMAR)
_WIDEST = max(len(e) for expansions in GRAMMAR.values() for e in expansions)
_MOST = max(map(len, GRAMMAR.values()))


@dataclass(frozen=True)
class Items:
    """Questions, one a row.

    Attributes:
        family: (item,) position in FAMILIES.
        first, second: (item,) operands: a letter's position in LETTERS, or a number; −1 where there is none.
        text: (item, place) positions in LETTERS.
        answer: (item,) a number; of "token" a letter's position.
    """

    family: np.ndarray
    first: np.ndarray
    second: np.ndarray
    text: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.answer)

    def __getitem__(self, index: Any) -> "Items":
        return Items(*(getattr(self, f.name)[index] for f in fields(self)))

    @property
    def cued(self) -> np.ndarray:
        """(item,) whether the text has #b = #a + 1."""
        return (self.text == 1).sum(1) == (self.text == 0).sum(1) + 1


@dataclass(frozen=True)
class Language:
    """Texts of one length, and the vocabulary that they need."""

    length: int = SMALL

    @property
    def vocabulary(self) -> list[str]:
        marks = ["<pad>", "<bos>", "<eos>", *(f"<{f}>" for f in FAMILIES), "_", ":", ";", "="]
        return [*marks, *LETTERS, *(f"<{n}>" for n in range(self.length + 1))]

    def draw(
        self,
        n: int,
        generator: np.random.Generator,
        *,
        families: Sequence[str] = FAMILIES,
        prior: tuple[float, float, float] = PRIORS["H"],
        cue: float | None = None,
    ) -> Items:
        """`n` questions, families uniform, those without an answer left out.

        Args:
            prior: probabilities of a, b, c as the first operand.
            cue: share of the texts with #b = #a + 1, the others have none; by default texts are left as they come.
        """
        parts: list[Items] = []
        while (have := sum(map(len, parts))) < n:
            found = self._drawn(n - have, generator, families, prior, cue)
            parts.append(found[found.answer >= 0])
        return Items(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Items)))

    def _drawn(
        self, n: int, generator: np.random.Generator, families: Sequence[str], prior: Sequence[float], cue: float | None
    ) -> Items:
        text = self._texts(n, generator) if cue is None else self._cued(generator.random(n) < cue, generator)
        family = np.array([FAMILIES.index(f) for f in families])[generator.integers(len(families), size=n)]
        first = generator.choice(len(LETTERS), size=n, p=np.array(prior) / sum(prior))
        second = generator.integers(len(LETTERS), size=n)
        nth, place = (
            generator.integers(1, 1 + max(1, self.length // 8), size=n),
            generator.integers(self.length, size=n),
        )
        is_a = {name: family == FAMILIES.index(name) for name in FAMILIES}
        first = np.where(is_a["token"], place, first)
        second = np.select([is_a["count"] | is_a["token"], is_a["index"]], [-1, nth], second)
        return Items(family, first, second, text, answers(family, first, second, text))

    def _cued(self, wanted: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Texts with the cue where `wanted`, and without it elsewhere: drawn until they are so."""
        text = np.empty((len(wanted), self.length), dtype=np.int64)
        missing = np.arange(len(wanted))
        while len(missing):
            pool = self._texts(max(256, 8 * len(missing)), generator)
            has = (pool == 1).sum(1) == (pool == 0).sum(1) + 1
            left = []
            for want in (True, False):
                rows, fitting = missing[wanted[missing] == want], pool[has == want]
                count = min(len(rows), len(fitting))
                text[rows[:count]] = fitting[:count]
                left.append(rows[count:])
            missing = np.concatenate(left)
        return text

    def _texts(self, n: int, generator: np.random.Generator) -> np.ndarray:
        """(n, length) texts of the grammar: sentences in a row, cut."""
        sentences = -(-self.length // _SHORTEST)
        symbols = np.full(n * sentences, _SYMBOLS.index("S"))
        owner = np.repeat(np.arange(n), sentences)
        while (symbols >= len(LETTERS)).any():
            chosen = generator.integers(_CHOICES[symbols])
            expanded = _EXPANSION[symbols, chosen]
            keep = expanded >= 0
            symbols, owner = expanded[keep], np.repeat(owner, keep.sum(1))
        starts = np.searchsorted(owner, np.arange(n))
        return symbols[starts[:, None] + np.arange(self.length)]

    def prompt(self, items: Items, row: int) -> str:
        """The question as a user writes it (the tokenizer adds `<bos>`)."""
        text = "".join(LETTERS[i] for i in items.text[row])
        family = FAMILIES[items.family[row]]
        return f"<{family}>{self._operand(items, row, 0)}{self._operand(items, row, 1)}:{text};="

    def _operand(self, items: Items, row: int, which: int) -> str:
        value = int((items.first, items.second)[which][row])
        if value < 0:
            return "_"
        return f"<{value}>" if NUMBERED.get(FAMILIES[items.family[row]]) == which else LETTERS[value]

    def answer(self, items: Items, row: int) -> str:
        """The answer's token."""
        value = int(items.answer[row])
        return LETTERS[value] if FAMILIES[items.family[row]] == "token" else f"<{value}>"

    def rows(self, items: Items) -> list[dict[str, Any]]:
        """Rows of a prompt file; `label` is the answer, `operand` is O, `a` and `b` are the counts in the text."""
        return [
            {
                "id": str(row), "prompt": self.prompt(items, row), "answer": self.answer(items, row),
                "family": FAMILIES[items.family[row]], "operand": self._operand(items, row, 0),
                "label": int(items.answer[row]),
                "a": int((items.text[row] == 0).sum()), "b": int((items.text[row] == 1).sum()),
            }
            for row in range(len(items))
        ]  # fmt: skip

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """A token a letter, a mark, a number; `<bos>` is put in front."""
        return word_level(self.vocabulary, "<[a-z]+>|<[0-9]+>|.", longest=self.length + 9)

    def encode(self, items: Items) -> dict[str, "torch.Tensor"]:
        """`input_ids` and `labels`, (items, length + 9) int64; labels are −100 but on the answer and its `<eos>`."""
        import torch

        at = {token: i for i, token in enumerate(self.vocabulary)}
        letter, number = at["a"], at["<0>"]
        placed, indexed = (items.family == FAMILIES.index(name) for name in ("token", "index"))
        ids = np.empty((len(items), self.length + 9), dtype=np.int64)
        ids[:, 0], ids[:, 1] = at["<bos>"], at["<count>"] + items.family
        ids[:, 2] = np.where(placed, number, letter) + items.first
        ids[:, 3] = np.where(items.second < 0, at["_"], np.where(indexed, number, letter) + items.second)
        ids[:, 4], ids[:, 5 : 5 + self.length] = at[":"], letter + items.text
        ids[:, -4], ids[:, -3], ids[:, -1] = at[";"], at["="], at["<eos>"]
        ids[:, -2] = np.where(placed, letter, number) + items.answer
        labels = np.full_like(ids, -100)
        labels[:, -2:] = ids[:, -2:]
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def answers(family: np.ndarray, first: np.ndarray, second: np.ndarray, text: np.ndarray) -> np.ndarray:
    """(item,) the answers; −1 where there is none: no such occurrence."""
    length = text.shape[1]
    matches = text == first[:, None]
    following = np.zeros_like(matches)
    following[:, :-1] = matches[:, :-1] & (text[:, 1:] == second[:, None])
    nth = matches & (matches.cumsum(1) == second[:, None])
    values = {
        "count": matches.sum(1),
        "pairs": following.sum(1),
        "index": _place(nth),
        "pair": _place(following),
        "token": text[np.arange(len(text)), np.clip(first, 0, length - 1)],
    }
    return np.select([family == FAMILIES.index(name) for name in values], list(values.values()))


def _place(where: np.ndarray) -> np.ndarray:
    return np.where(where.any(1), where.argmax(1), -1)


def measure(
    model: "torch.nn.Module", language: Language, items: Items, *, batch_size: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """Which answers of the model are right, and the tokens that it gave, (item,) each; one forward pass an item."""
    import torch

    said, device = [], next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            ids = language.encode(items[start : start + batch_size])["input_ids"][:, :-2].to(device)
            said.append(model(input_ids=ids, logits_to_keep=1).logits[:, -1].argmax(-1).cpu().numpy())
    given = np.concatenate(said)
    return given == language.encode(items)["labels"][:, -2].numpy(), given


def _tables() -> tuple[np.ndarray, np.ndarray, int]:
    """Expansions (symbol, choice, place), −1 where they end; their number by symbol; letters of a shortest sentence."""
    expansion = np.full((len(_SYMBOLS), _MOST, _WIDEST), -1)
    choices = np.ones(len(_SYMBOLS), dtype=np.int64)
    for number in range(len(LETTERS)):
        expansion[number, 0, 0] = number
    for symbol, ways in GRAMMAR.items():
        choices[_SYMBOLS.index(symbol)] = len(ways)
        for choice, way in enumerate(ways):
            expansion[_SYMBOLS.index(symbol), choice, : len(way)] = [_SYMBOLS.index(s) for s in way]

    def shortest(symbol: str) -> int:
        return 1 if symbol in LETTERS else min(sum(map(shortest, way)) for way in GRAMMAR[symbol])

    return expansion, choices, shortest("S")


_EXPANSION, _CHOICES, _SHORTEST = _tables()
