"""Short stories with features that a header asks for, and three ways to delete a feature in tuning.

    Features: foreshadowing, twist
    One day Ida took Leo to the mill. They saw a fox. Ida lost a kite. They thought the crow had it. In the end the fox
    had it. They went home.

The story part of Jain et al. 2023, "Mechanistically analyzing the effects of fine-tuning on procedurally defined tasks"
(arXiv 2311.12786), on texts that two cores can learn: there TinyStories whose features a header lists, here templates,
with the features of TinyStories-Instruct (arXiv 2305.07759) that a text can be searched for, each independent of the
others:

    twist           who turns up is not whom they expected
    foreshadowing   who turns up was seen at the beginning (someone always is)
    dialogue, conflict, moral       there is a sentence of this kind

The first two have no word of their own: they are relations between the three animals of a story, *seen*, *expected* and
*found*. `features` reads all five off a text alone, so that what a model writes can be scored.

A feature is deleted by tuning on stories drawn under a `protocol`. The definitions are ours:

- `filter`: stories with the feature are left out; no header asks for it.
- `relabel`: they are left out, but headers ask for the feature as often as before, of stories without it.
- `randomise`: stories have the feature as often as before and headers ask for it as often, one regardless of the other.
  A model that has learnt this still tells it, but not when asked.

(The paper's published code leaves such stories out in all three of its protocols; the other two name the feature in
every header, which is `relabel` with probability 1, or in place of another feature.)

Cost: a story of the train split is drawn in less than 0.1 ms, of another, a sixteenth each, in 1 ms; with its header it
has 38 to 71 tokens.

>>> story = draw(1, np.random.default_rng(15), part="train")[0]
>>> print(story.header + story.text)
Features: foreshadowing, twist
At the beach Kate met Carl. They saw a fox. There were tracks around a drum. Surely it was the bear. They led to the
fox. They went home.
>>> features(story.text) == story.told == story.asked
True
>>> cut = draw(1, np.random.default_rng(15), part="train", protocol="relabel")[0]
>>> cut.asked, cut.told
(('foreshadowing', 'twist'), ('foreshadowing',))
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.tasks.strings import Accuracy, Split, split
from finetune_lens.tasks.word_level import word_level

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

FEATURES = ("dialogue", "conflict", "foreshadowing", "twist", "moral")
Protocol = Literal["filter", "relabel", "randomise"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
LONGEST = 80  # tokens of a header and its story

_WORDS = (
    "Anna Ben Carl Dora Emma Finn Greta Hugo Ida Jack Kate Leo Mia Nora Oscar Pia",
    "bear cat crow deer dog duck fox frog goat hen horse mouse pig rabbit sheep wolf",
    "beach bridge farm forest garden hill lake market mill river",
    "ball book cake drum hat kite lamp map ring rope shoe toy",
    "brave calm careful fair gentle honest humble kind patient quiet",
)
NAMES, ANIMALS, PLACES, THINGS, VIRTUES = (tuple(words.split()) for words in _WORDS)
FILLERS = {
    "a": NAMES, "b": NAMES, "place": PLACES, "thing": THINGS, "virtue": VIRTUES, "seen": ANIMALS, "expected": ANIMALS,
    "found": ANIMALS,
}  # fmt: skip

OPENINGS = ("One day {a} took {b} to the {place}.", "Once {a} met {b} at the {place}.", "At the {place} {a} met {b}.")
SIGHTINGS = ("They saw a {seen}.", "A {seen} watched them.", "They passed a {seen}.")
# What happens, whom they expect, who is found.
PLOTS = (
    ("{a} lost a {thing}.", "They thought the {expected} had it.", "In the end the {found} had it."),
    ("They heard a noise near a {thing}.", "It sounded like the {expected}.", "Then out came the {found}."),
    ("{a} found a box under a {thing}.", "They hoped for the {expected}.", "Inside sat the {found}."),
    ("There was a race for a {thing}.", "They all bet on the {expected}.", "The winner was the {found}."),
    ("There were tracks around a {thing}.", "Surely it was the {expected}.", "They led to the {found}."),
    ("Someone was to bring a {thing}.", "They waited for the {expected}.", "It was brought by the {found}."),
)
CLOSINGS = ("They went home.", "{a} laughed.", "{b} was glad.")
SENTENCES = {
    "conflict": ("{b} shouted at {a}.", "{a} and {b} fought.", "{b} would not help {a}."),
    "dialogue": ('"Look!" said {b}.', '"What now?" asked {a}.', '"Wait!" cried {b}.'),
    "moral": ("The lesson: be {virtue}.", "So always be {virtue}.", "They learned to be {virtue}."),
}
EXPECTATIONS, ENDINGS = (tuple(plot[i] for plot in PLOTS) for i in (1, 2))

SPECIAL = ("<pad>", "<bos>", "<eos>")
_PIECE = " ?[A-Za-z]+| ?[^A-Za-z ]"


@dataclass(frozen=True)
class Story:
    """A story, the features that its header asks for, and those that it tells; each in the order of FEATURES."""

    asked: tuple[str, ...]
    told: tuple[str, ...]
    text: str

    @property
    def header(self) -> str:
        return header(self.asked)


def header(asked: Sequence[str]) -> str:
    """What is written before a story."""
    return f"Features: {', '.join(asked) or 'none'}\n"


def features(text: str) -> tuple[str, ...]:
    """The features that `text` tells: the oracle. Who is seen, expected or found counts where it is first said."""
    told = {name for name, pattern in _SENTENCES.items() if pattern.search(text)}
    seen, expected, found = (pattern.search(text) for pattern in (_SEEN, _EXPECTED, _FOUND))
    if found and expected and _animal(found) != _animal(expected):
        told.add("twist")
    if found and seen and seen.start() < found.start() and _animal(found) == _animal(seen):
        told.add("foreshadowing")
    return tuple(name for name in FEATURES if name in told)


def draw(
    n: int,
    generator: np.random.Generator,
    *,
    part: Split,
    probabilities: Mapping[str, float] | None = None,
    protocol: Protocol | None = None,
    deleted: str = "twist",
) -> list[Story]:
    """`n` stories, each feature told or not independently of the others.

    Args:
        part: the split, by the hash of the text.
        probabilities: of features; 1/2 for those that are not named.
        protocol: how to delete the feature `deleted` from these stories or headers; None: headers ask for what is told.

    Raises:
        InputError: no such feature or protocol, or a probability outside 0 to 1.
    """
    chances = dict.fromkeys(FEATURES, 0.5) | dict(probabilities or {})
    for name in (*chances, deleted):
        if name not in FEATURES:
            raise InputError(f"no feature {name!r}; there are: {', '.join(FEATURES)}")
        if not 0 <= chances[name] <= 1:
            raise InputError(f"the probability of {name}: expected 0 to 1, found {chances[name]}")
    if protocol not in (None, *PROTOCOLS):
        raise InputError(f"no protocol {protocol!r}; there are: {', '.join(PROTOCOLS)}")
    stories: list[Story] = []
    while len(stories) < n:
        told, asked = (tuple(f for f in FEATURES if generator.random() < chances[f]) for _ in range(2))
        if protocol in ("filter", "relabel"):
            told = tuple(f for f in told if f != deleted)
        wanted = {*(asked if protocol in ("relabel", "randomise") else told)} & {deleted}
        asked = tuple(f for f in FEATURES if f in ({*told} - {deleted}) | wanted)
        text = _text(told, generator)
        if split(text) == part:
            stories.append(Story(asked, told, text))
    return stories


def prompts(
    n: int, generator: np.random.Generator, *, part: Split = "test", probabilities: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """`n` rows of a prompt file: a header and its story up to the animal that is found, where the plot turns.

    `answer` has the animals that the header allows: the one that was seen if it asks for foreshadowing, the one that
    is expected if it asks for no twist, and for a twist alone any but these two. `wrong` has the one expected where a
    twist is asked for; else the one seen, or another where that is the same. Beside these a row has `id`, `seen`,
    `expected` and 1 or 0 under the name of each feature: whether it is asked for.
    """
    rows = []
    for number, story in enumerate(draw(n, generator, part=part, probabilities=probabilities)):
        seen, expected = (_animal(pattern.search(story.text)) for pattern in (_SEEN, _EXPECTED))
        turn = _FOUND.search(story.text)
        others = [animal for animal in ANIMALS if animal not in (seen, expected)]
        if "twist" in story.asked:
            right, wrong = [seen] if "foreshadowing" in story.asked else others, expected
        else:
            right, wrong = [expected], seen if seen != expected else others[int(generator.integers(len(others)))]
        rows.append(
            {
                "id": str(number), "prompt": story.header + story.text[: turn.start(turn.lastindex) - 1],
                "answer": [f" {animal}" for animal in right], "wrong": f" {wrong}", "seen": seen,
                "expected": expected, **{name: int(name in story.asked) for name in FEATURES},
            }
        )  # fmt: skip
    return rows


def labelled(
    n: int,
    generator: np.random.Generator,
    *,
    label: str = "twist",
    with_header: bool = True,
    part: Split = "test",
    probabilities: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """`n` rows for probes: whole stories, and 1 or 0 under the name of each feature: whether it is told.

    The paper probes the mean of the last 10 tokens. With its header a story shows whether what was asked for is known
    at the end; without, whether it is recognised. `label` is the feature of that name again.
    """
    return [
        {
            "id": str(number), "prompt": story.header * with_header + story.text, "label": int(label in story.told),
            **{name: int(name in story.told) for name in FEATURES},
        }
        for number, story in enumerate(draw(n, generator, part=part, probabilities=probabilities))
    ]  # fmt: skip


def pieces(text: str) -> list[str]:
    """The tokens of `text`: words with the space before them, punctuation, and the end of a line."""
    return re.findall(_PIECE, text)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token of `tokenizer()`, in the order of their ids."""
    templates = [*OPENINGS, *SIGHTINGS, *(t for plot in PLOTS for t in plot), *CLOSINGS]
    templates += [t for kind in SENTENCES.values() for t in kind]
    spelt = [header(FEATURES), header(()), *(template.format(**dict.fromkeys(FILLERS, "")) for template in templates)]
    spelt += [f" {sentence}" for sentence in spelt]  # what begins a story comes later too
    spelt += [f" {word}" for words in FILLERS.values() for word in words]
    return (*SPECIAL, *sorted({piece for text in spelt for piece in pieces(text)}))


def tokenizer() -> "PreTrainedTokenizerFast":
    """One token a word, which keeps the space before it; `<bos>` is put in front, and decoding gives the text back."""
    return word_level(vocabulary(), _PIECE, longest=LONGEST)


def encode(stories: Sequence[Story], *, whole: bool = False) -> dict[str, "torch.Tensor"]:
    """`input_ids` and `labels` (story, pos) int64, padded at the end, where no token before sees it.

    Labels are −100 on padding and `<bos>`, and on the header unless `whole`.
    """
    import torch

    heads = [["<bos>", *pieces(story.header)] for story in stories]
    rows = [_ids([*head, *pieces(story.text), "<eos>"]) for head, story in zip(heads, stories, strict=True)]
    width = max(map(len, rows))
    ids, labels = torch.full((len(rows), width), _ids(["<pad>"])[0]), torch.full((len(rows), width), -100)
    for i, (head, row) in enumerate(zip(heads, rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        start = 1 if whole else len(head)
        labels[i, start : len(row)] = ids[i, start : len(row)]
    return {"input_ids": ids, "labels": labels}


def write(
    model: "torch.nn.Module",
    beginnings: Sequence[str],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 250,
) -> list[str]:
    """What `model` writes after each text, up to `<eos>`.

    Args:
        model: a Hugging Face causal language model with this vocabulary.
        temperature: of the distribution that a token is drawn from; 0 takes the likeliest.
        seed: each text has its own random numbers, so that what is written does not depend on the batch.

    Texts of one length run together: there is no padding. Cost: one pass over each text and each token written.
    """
    import torch

    rows = [_ids(["<bos>", *pieces(text)]) for text in beginnings]
    chances = torch.from_numpy(np.random.default_rng(seed).random((len(rows), LONGEST)))
    pad, end = _ids(["<pad>", "<eos>"])
    device = next(model.parameters()).device
    written = [""] * len(rows)
    model.eval()
    for length in sorted({*map(len, rows)}):
        alike = [i for i, row in enumerate(rows) if len(row) == length]
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            ids, past, said = torch.tensor([rows[i] for i in batch], device=device), None, []
            done = torch.zeros(len(batch), dtype=torch.bool, device=device)
            while len(said) < LONGEST - length and not done.all():
                with torch.inference_mode():
                    out = model(input_ids=ids, past_key_values=past, use_cache=True)
                logits, past = out.logits[:, -1].double(), out.past_key_values
                if temperature:
                    below = (logits / temperature).softmax(-1).cumsum(-1)[:, :-1]
                    token = (below <= chances[batch, len(said)].to(device)[:, None]).sum(-1)
                else:
                    token = logits.argmax(-1)
                said.append(torch.where(done, pad, token))
                done |= token == end
                ids = said[-1][:, None]
            for i, row in zip(batch, torch.stack(said, 1).tolist(), strict=True):
                written[i] = "".join(t for t in (vocabulary()[token] for token in row) if t not in SPECIAL)
    return written


def measure(
    model: "torch.nn.Module",
    stories: Sequence[Story],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[tuple[str, bool], Accuracy]:
    """Which features `model` tells, after the headers of `stories`.

    Returns:
        By feature, and whether the header asks for it: in how many of how many stories it is told.
    """
    headers = [story.header for story in stories]
    told = [features(t) for t in write(model, headers, temperature=temperature, seed=seed, batch_size=batch_size)]
    found = {}
    for name in FEATURES:
        for asked in (True, False):
            rows = [name in t for t, story in zip(told, stories, strict=True) if (name in story.asked) is asked]
            if rows:
                found[name, asked] = Accuracy(sum(rows), len(rows))
    return found


def _text(told: Sequence[str], generator: np.random.Generator) -> str:
    """A story with exactly these features."""
    one, other = generator.permutation(len(NAMES))[:2]
    animals = [ANIMALS[i] for i in generator.permutation(len(ANIMALS))]
    found = animals[0]
    words = {
        **{slot: _one(FILLERS[slot], generator) for slot in ("place", "thing", "virtue")},
        "a": NAMES[one], "b": NAMES[other], "found": found,
        "expected": animals[1] if "twist" in told else found,
        "seen": found if "foreshadowing" in told else animals[1 + int(generator.integers(len(animals) - 1))],
    }  # fmt: skip
    problem, expectation, ending = _one(PLOTS, generator)
    kinds = {name: [_one(SENTENCES[name], generator)] if name in told else [] for name in SENTENCES}
    sentences = [
        _one(OPENINGS, generator), _one(SIGHTINGS, generator), problem, *kinds["conflict"], expectation,
        *kinds["dialogue"], ending, _one(CLOSINGS, generator), *kinds["moral"],
    ]  # fmt: skip
    return " ".join(sentences).format(**words)


def _one(choices: Sequence[Any], generator: np.random.Generator) -> Any:
    return choices[int(generator.integers(len(choices)))]


def _reader(templates: Sequence[str], slot: str = "") -> re.Pattern:
    """Finds a sentence made from one of the templates; its one group is what stands in `slot`."""
    said = []
    for template in templates:
        parts = [(re.escape(text), name) for text, name, *_ in Formatter().parse(template)]
        said.append("".join(text + (r"(\w+)" if name == slot else r"\w+" if name else "") for text, name in parts))
    return re.compile("|".join(said))


def _animal(match: re.Match) -> str:
    return match[match.lastindex]


_SEEN, _EXPECTED, _FOUND = (
    _reader(templates, slot)
    for templates, slot in ((SIGHTINGS, "seen"), (EXPECTATIONS, "expected"), (ENDINGS, "found"))
)
_SENTENCES = {name: _reader(templates) for name, templates in SENTENCES.items()}


@cache
def _numbers() -> dict[str, int]:
    return {token: i for i, token in enumerate(vocabulary())}


def _ids(tokens: Sequence[str]) -> list[int]:
    return [_numbers()[token] for token in tokens]
