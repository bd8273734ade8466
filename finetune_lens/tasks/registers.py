"""State tracking with registers, and the lookups it is built from: other tasks than boxes, in the words of boxes.

    Store magnet in X, store key in T, store cup in B. Copy X to T. T holds magnet. B holds cup.

A text is a list of (piece, asked): its tokens as `boxes.pieces` cuts them, and whether the piece is an answer. The
three lookups ask what stood beside a letter, over growing distances:

- `follows`:  ` X magnet T key … T key`
- `precedes`: ` magnet X key T. T key`
- `tagged`:   ` magnet in X, key in T. T = key.`

>>> text = registers(np.random.default_rng(0), size=3, copies=1, questions=2)
>>> "".join(piece for piece, _ in text)
'Store coffee in Y, store glass in H, store dress in F. Copy H to F. Y holds coffee. H holds glass.'
>>> [piece for piece, asked in text if asked]
[' coffee', ' glass']
"""

from collections.abc import Sequence

import numpy as np

from finetune_lens.tasks.boxes import LABELS, OBJECTS, Scene, pieces

WORDS = ("Store", " store", " Copy", " to", " holds", " =")  # beyond those of boxes
LOOKUPS = ("follows", "precedes", "tagged")
Text = list[tuple[str, bool]]


def registers(generator: np.random.Generator, *, size: int, copies: int, questions: int) -> Text:
    """`size` registers are filled, `copies` of them copied onto others one after the other, then `questions` asked."""
    objects, labels = _drawn(generator, size)
    told = ", ".join(f"store {o} in {label}" for o, label in zip(objects, labels, strict=True))
    text = _said(f"S{told[1:]}.")
    holds = dict(zip(labels, objects, strict=True))
    for _ in range(copies):
        one, other = (labels[i] for i in generator.permutation(size)[:2])
        text += _said(f" Copy {one} to {other}.")
        holds[other] = holds[one]
    for label in _asked(generator, labels, questions):
        text += [*_said(f" {label} holds"), (f" {holds[label]}", True), (".", False)]
    return text


def lookup(kind: str, generator: np.random.Generator, *, size: int, questions: int) -> Text:
    """One of LOOKUPS, of `size` letters and objects."""
    objects, labels = _drawn(generator, size)
    pairs = list(zip(objects, labels, strict=True))
    told = {
        "follows": "".join(f" {label} {o}" for o, label in pairs),
        "precedes": "".join(f" {o} {label}" for o, label in pairs) + ".",
        "tagged": ",".join(f" {o} in {label}" for o, label in pairs) + ".",
    }
    text = _said(told[kind])
    for label in _asked(generator, labels, questions):
        answer = (f" {objects[labels.index(label)]}", True)
        text += [*_said(f" {label} ="), answer, (".", False)] if kind == "tagged" else [(f" {label}", False), answer]
    return text


def boxes(generator: np.random.Generator, scene: Scene, *, questions: int, wrong: float = 0.0) -> Text:
    """A scene of boxes and some questions; each answer is, at the rate `wrong`, another object of the scene."""
    text = _said(scene.text)
    count = len(scene.objects)
    for query in generator.integers(count, size=questions).tolist():
        said = (query + int(generator.integers(1, count))) % count if generator.random() < wrong else query
        text += [*_said(scene.prompt(query).removeprefix(scene.text)), (f" {scene.objects[said]}", True), (".", False)]
    return text


def _said(text: str) -> Text:
    return [(piece, False) for piece in pieces(text)]


def _drawn(generator: np.random.Generator, size: int) -> tuple[list[str], list[str]]:
    objects, labels = (generator.permutation(words)[:size].tolist() for words in (OBJECTS, list(LABELS)))
    return objects, labels


def _asked(generator: np.random.Generator, labels: Sequence[str], questions: int) -> list[str]:
    return [labels[i] for i in generator.integers(len(labels), size=questions)]
