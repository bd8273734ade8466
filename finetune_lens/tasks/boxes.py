"""Entity tracking, which object is in which box: the scenes and counterfactuals of arXiv 2402.14811, with an oracle.

    The magnet is in Box X, the key is in Box T, the cup is in Box B. Box T contains the key.

The prompt drops the last word. A scene has seven boxes unless told otherwise; labels are distinct letters, objects are
distinct, and any box may be asked for. (In the published code the position of the queried box was looked up in the
question instead of the scene and so was always 0: about one counterfactual label in seven was the clean answer. Here
that cannot happen, and is asserted.)

`draw` gives rows of a prompt file. Each has a counterfactual, a prompt of as many words, chosen by name from
`COUNTERFACTUALS`; the first three are the desiderata with which the paper asks by DCM what a head carries, `random` is
its corruption for path patching, and `query`, the smallest change, is ours. Another scene shares no object and no label
with the prompt's but those named here. Let q be the position of the queried box in the scene of the prompt, and q′ ≠ q
that of the box which `corrupt` asks for in its own:

- `object`: another scene, queried at q′. With what the head carries taken from `corrupt`, a head that carries the
  value itself makes the model answer the object at q′ of `corrupt`.
- `label`: another scene, queried at q′ for a label that the prompt's scene has too, at a position neither q nor q′. A
  head that carries the queried label: the object in the box of that label in the prompt's scene.
- `position`: another scene, queried at q′. A head that carries the position: the object at q′ in the prompt's scene.
- `random`: another scene, asked for a box that neither scene has. There is no answer, and no `corrupt_answer`.
- `query`: the same scene, queried at q′. The right answer is the object at q′.

The answer named is the row's `corrupt_answer`. In the published data the scenes are drawn independently: labels may be
shared by chance, and a desideratum be met by the wrong variable. Drawing them apart is our change.

>>> scene = Scene(("magnet", "key", "cup"), ("X", "T", "B"))
>>> scene.prompt(1), scene.answer(1)
('The magnet is in Box X, the key is in Box T, the cup is in Box B. Box T contains the', ' key')
>>> row = draw(1, np.random.default_rng(0), counterfactual="position")[0]
>>> row["answer"] != row["corrupt_answer"] == row["wrong"]
True
"""

import hashlib
import re
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.tasks.strings import Split
from finetune_lens.tasks.word_level import word_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOXES = 7
LABELS = string.ascii_uppercase
# Common words, one token each, with a space before it, in GPT-2's vocabulary and its likes.
_OBJECTS = (
    "apple bag ball bell book bottle bowl bread brick brush cake camera card chain clock coat coffee coin cup disk "
    "dress drum engine fan file flag flower glass gun hat key knife lamp leaf letter magnet map milk mirror note paper "
    "phone pipe plant plate radio ring rock rope shirt shoe stone tie tool toy train tree watch wheel wire"
)
OBJECTS = tuple(_OBJECTS.split())

Counterfactual = Literal["object", "label", "position", "random", "query"]
COUNTERFACTUALS: tuple[Counterfactual, ...] = get_args(Counterfactual)

WORDS = ("The", " the", " is", " in", " Box", " contains", ",", ".")
_PIECE = " ?[A-Za-z0-9]+| ?[^A-Za-z0-9 ]"
SPECIAL = ("<pad>", "<bos>", "<eos>")


@dataclass(frozen=True)
class Scene:
    """Box `labels[i]` contains `objects[i]`, told in this order."""

    objects: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def text(self) -> str:
        told = ", ".join(f"the {o} is in Box {label}" for o, label in zip(self.objects, self.labels, strict=True))
        return f"T{told[1:]}."

    def prompt(self, query: int, *, label: str | None = None) -> str:
        """The question about the box at position `query`, or about the box `label`."""
        return f"{self.text} Box {self.labels[query] if label is None else label} contains the"

    def answer(self, query: int) -> str:
        """The oracle, with the space that belongs to the token."""
        return f" {self.objects[query]}"


def chance(boxes: int = BOXES) -> float:
    """The chance floor: the accuracy of naming any object of the scene."""
    return 1 / boxes


def split(scene: Scene) -> Split:
    """Where `scene` belongs, by the hash of its text: 1/16 validation, 1/16 test, the rest train."""
    bucket = hashlib.sha256(scene.text.encode()).digest()[0] % 16
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def draw_scene(
    generator: np.random.Generator,
    *,
    boxes: int = BOXES,
    part: Split = "test",
    apart: Scene | None = None,
    fixed: Mapping[int, str] | None = None,
) -> Scene:
    """A scene of split `part` that shares no object and no label with `apart`, but for the labels `fixed`, by place."""
    others = Scene((), ()) if apart is None else apart
    while True:
        objects = _choose(generator, OBJECTS, boxes, others.objects)
        labels = _choose(generator, LABELS, boxes, others.labels)
        for place, label in (fixed or {}).items():
            labels[place] = label
        scene = Scene(tuple(objects), tuple(labels))
        if split(scene) == part:
            return scene


def draw(
    n: int,
    generator: np.random.Generator,
    *,
    boxes: int = BOXES,
    queries: int = 1,
    counterfactual: Counterfactual = "label",
    part: Split = "test",
) -> list[dict[str, Any]]:
    """`n` scenes, each asked for `queries` different boxes: rows of a prompt file, n·queries of them.

    Beside `prompt`, `answer`, `wrong`, `corrupt`, `corrupt_answer` and `id`, a row has `scene` (its number), `query`
    and `corrupt_query` (q and q′, positions from 0), `label` and `corrupt_label` (of the boxes that `prompt` and
    `corrupt` ask for), `labels` and `objects` (as told), `boxes` and `counterfactual`. `wrong` is another object of the
    scene, `corrupt_answer` where that is one.

    Raises:
        InputError: the scene needs more distinct words than there are, or has fewer boxes than questions.
    """
    if not 3 <= boxes <= (len(LABELS) - 1) // 2:
        raise InputError(f"a scene and its counterfactual can have 3 to {(len(LABELS) - 1) // 2} boxes, not {boxes}")
    if not 1 <= queries <= boxes:
        raise InputError(f"a scene of {boxes} boxes can be asked 1 to {boxes} questions, not {queries}")
    if counterfactual not in COUNTERFACTUALS:
        raise InputError(f"no counterfactual {counterfactual!r}; there are: {', '.join(COUNTERFACTUALS)}")
    rows = []
    for number in range(n):
        scene = draw_scene(generator, boxes=boxes, part=part)
        for query in generator.permutation(boxes)[:queries].tolist():
            corrupt, place, label, target = _corrupt(scene, query, generator, counterfactual, part)
            answer = scene.answer(query)
            others = [scene.answer(i) for i in range(boxes) if i != query]
            row = {
                "id": f"{number}-{query}",
                "prompt": scene.prompt(query),
                "answer": answer,
                "wrong": target if target in others else others[int(generator.integers(boxes - 1))],
                "corrupt": corrupt,
                "corrupt_answer": target,
                "scene": number,
                "query": query,
                "corrupt_query": place,
                "label": scene.labels[query],
                "corrupt_label": label,
                "labels": "".join(scene.labels),
                "objects": " ".join(scene.objects),
                "boxes": boxes,
                "counterfactual": counterfactual,
            }
            assert answer not in {row["wrong"], target}, "a counterfactual that changes nothing"
            rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def solve(prompt: str) -> str | None:
    """The answer read off the text of a prompt; None where the box that is asked for is not in the scene."""
    asked = re.search(r"\. Box ([A-Z]) contains the$", prompt)
    if asked is None:
        raise ValueError(f"not a question about a box: {prompt!r}")
    found = re.search(rf"[Tt]he (\w+) is in Box {asked[1]}\b", prompt)
    return None if found is None else f" {found[1]}"


def pieces(text: str) -> list[str]:
    """The tokens of `text`: words with the space before them, and punctuation."""
    return re.findall(_PIECE, text)


def vocabulary(more: Sequence[str] = ()) -> list[str]:
    """Every token of `tokenizer(more)`, in the order of their ids."""
    return [*SPECIAL, *WORDS, *(f" {label}" for label in LABELS), *(f" {word}" for word in OBJECTS), *more]


def tokenizer(more: Sequence[str] = (), *, longest: int = 256) -> "PreTrainedTokenizerFast":
    """A tokenizer for tiny models: one token a word, which keeps the space before it, so that answers are one token.

    `<bos>` is put in front, decoding gives the text back, and a word outside `vocabulary(more)` has no reading.
    """
    return word_level(vocabulary(more), _PIECE, longest=longest)


def _corrupt(
    scene: Scene, query: int, generator: np.random.Generator, counterfactual: Counterfactual, part: Split
) -> tuple[str, int | None, str, str | None]:
    """The counterfactual prompt, the position and the label it asks for, and the answer that it stands for."""
    boxes = len(scene.objects)
    place, shared = generator.permutation([i for i in range(boxes) if i != query])[:2].tolist()
    if counterfactual == "query":
        return scene.prompt(place), place, scene.labels[place], scene.answer(place)
    fixed = {place: scene.labels[shared]} if counterfactual == "label" else None
    other = draw_scene(generator, boxes=boxes, part=part, apart=scene, fixed=fixed)
    if counterfactual == "random":
        (nowhere,) = _choose(generator, LABELS, 1, (*scene.labels, *other.labels))
        return other.prompt(0, label=nowhere), None, nowhere, None
    target = {"object": other.answer(place), "label": scene.answer(shared), "position": scene.answer(place)}
    return other.prompt(place), place, other.labels[place], target[counterfactual]


def _choose(generator: np.random.Generator, words: Sequence[str], n: int, without: Collection[str] = ()) -> list[str]:
    left = [word for word in words if word not in without]
    return [left[i] for i in generator.permutation(len(left))[:n]]
