"""Chains of thought as they are kept: which question, which sample, what text, and what ended it.

>>> count([Chain("q1", 0, "Two and two are four."), Chain("q1", 1, "", ending="eos")])
{'given': 1, 'eos': 1, 'empty': 1}
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_lens.errors import InputError
from finetune_lens.files import whole_file

CUT_OFF = ("length", "unreadable")
ENDINGS = ("eos", "stop", *CUT_OFF, "given")
EXPECTED = '{"id": "q1", "sample": 0, "text": "Two and two are four."}'


@dataclass(frozen=True)
class Chain:
    """One chain of thought.

    Attributes:
        question: the id of the question.
        sample: which of the question's chains, from 0.
        text: what stands after the prompt, without the end-of-sequence token or the stop text.
        tokens: as they were generated; where the stop text begins within a token, those before it. Empty where given.
        ending: "eos", "stop", "length" (cut off), "unreadable" (cut off before what the tokenizer cannot read), or
            "given" (read from a file that does not say).
    """

    question: str
    sample: int
    text: str
    tokens: tuple[int, ...] = ()
    ending: str = "given"


def count(chains: Iterable[Chain]) -> dict[str, int]:
    """How many chains ended in each way, and how many are empty."""
    chains = list(chains)
    return {**Counter(chain.ending for chain in chains), "empty": sum(not chain.text.strip() for chain in chains)}


def write_chains(path: Path, chains: Iterable[Chain]) -> None:
    """Save chains as JSONL, one a line: id, sample, text, ending, tokens."""
    with whole_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for c in chains:
            line = {"id": c.question, "sample": c.sample, "text": c.text, "ending": c.ending, "tokens": [*c.tokens]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_chains(
    path: Path, questions: Iterable[Any], *, others: Callable[[str], bool] = lambda name: False
) -> list[Chain]:
    """Chains of a JSONL file, such as those of a model behind an API: `id` and `text`, question by question.

    Optional in a line: `sample` (else the chains of a question are numbered as they come), `ending`, `tokens`. Empty
    chains are read as such (`count` counts them).

    Args:
        questions: questions, or their ids; each needs a chain.
        others: whether an id is that of a question whose chains are passed over, as of those behind a limit.

    Raises:
        InputError: which line is wrong and why: an id that no question has, the same chain twice; questions without
            a chain.
    """
    known: dict[str, dict[int, Chain]] = {q if isinstance(q, str) else q.id: {} for q in questions}
    for place, item in _items(Path(path)):
        if isinstance(item, dict) and "id" in item and str(item["id"]) not in known and others(str(item["id"])):
            continue
        try:
            chain = _chain(item, known)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        known[chain.question][chain.sample] = chain
    without = [name for name, chains in known.items() if not chains]
    if without:
        few = ", ".join(without[:3]) + (" …" if len(without) > 3 else "")
        raise InputError(f"{path} has no chain for {len(without)} of {len(known)} questions: {few}")
    return [chains[number] for chains in known.values() for number in sorted(chains)]


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line that is not blank stands, and its JSON value."""
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; expected a .jsonl file of chains")
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line = raw.decode("utf-8-sig").strip()
            if line:
                yield f"{path}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is not JSON ({error}); expected {EXPECTED}") from None


def _chain(item: Any, known: dict[str, dict[int, Chain]]) -> Chain:
    if not isinstance(item, dict) or not {"id", "text"} <= item.keys():
        raise InputError(f"expected an object such as {EXPECTED}, found {json.dumps(item)[:60]}")
    name, text = str(item["id"]), item["text"]
    if name not in known:
        raise InputError(f"no question has the id {name!r}; they are {', '.join(list(known)[:3])} …")
    number = item.get("sample", max(known[name], default=-1) + 1)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise InputError(f"`sample`: expected a whole number from 0, found {number!r}")
    if number in known[name]:
        raise InputError(f"a second chain for question {name!r}, sample {number}")
    if not isinstance(text, str) or not _encodes(text):
        raise InputError(f"`text`: expected text (it may be empty), found {text!r}")
    ending, tokens = item.get("ending", "given"), item.get("tokens", [])
    if ending not in ENDINGS:
        raise InputError(f"`ending` is one of {', '.join(ENDINGS)}; found {ending!r}")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise InputError(f"`tokens`: expected a list of token ids, found {str(tokens)[:60]}")
    return Chain(name, number, text, tuple(tokens), ending)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return True
