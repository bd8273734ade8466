"""What a probe is to read out: labels, their split into training and test, and the labels of the control task."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

    from finetune_lens.prompts import Encoded, Prompt

KINDS = ("auto", "classes", "regression")
FEWEST = 10  # examples
TRIES = 100
VARIED = 10  # effective number of different tokens from which a control task can be one of tokens
PARTS = {"train": True, "test": False}
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Labels:
    """(example,) class numbers with their names, in order; or values, without names."""

    values: np.ndarray
    names: tuple[str, ...]


def read_labels(
    prompts: "Sequence[Prompt]", field: str, *, given: Sequence[Any] | None = None, kind: str = "auto"
) -> Labels:
    """The labels of all prompts, from their field or a list beside them.

    Text, true/false and whole numbers are classes; numbers with a decimal point are values to regress on. `kind`
    overrides.

    Raises:
        InputError: a prompt without a label, labels of several kinds, one class only, too few prompts.
    """
    if kind not in KINDS:
        raise InputError(f"kind is one of {', '.join(KINDS)}; found {kind!r}")
    if given is None:
        lacking = [p.id for p in prompts if p.fields.get(field) is None]
        if lacking:
            raise InputError(
                f"{len(lacking)} of {len(prompts)} prompts have no `{field}` (first: {lacking[0]}); add it to the "
                "file, or name the field that holds the label (--label)"
            )
        given = [p.fields[field] for p in prompts]
    given = [value.item() if isinstance(value, np.generic) else value for value in given]
    types = {}
    for prompt, value in zip(prompts, given, strict=True):
        if type(value) not in TYPES or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"prompt {prompt.id}: the label is text, a number, true or false; found {value!r}")
        types.setdefault(type(value), (prompt.id, value))
    if len(types) > 1 and set(types) != {int, float}:
        shown = " and ".join(f"{TYPES[t]} ({value!r}, prompt {name})" for t, (name, value) in types.items())
        raise InputError(f"labels are of one kind; found {shown}")
    if len(prompts) < FEWEST:
        raise InputError(f"a probe needs {FEWEST} prompts or more; found {len(prompts)}")
    if len(set(given)) == 1:
        raise InputError(f"every prompt has the label {given[0]!r}: there is nothing to tell apart")
    if kind == "classes" or (kind == "auto" and float not in types):
        names, values = np.unique(np.array(given), return_inverse=True)
        return Labels(values, tuple(str(name) for name in names))
    if not set(types) <= {int, float}:
        raise InputError(f"a regression needs numbers as labels; found {given[0]!r} (kind, --kind)")
    return Labels(np.array(given, dtype=np.float64), ())


@dataclass(frozen=True)
class Split:
    """Which examples are fitted on and which are held out, seed by seed.

    Attributes:
        train: (seed, example) True where fitted, False where tested.
        group: (example,) number of the group that is never divided.
        given: the prompts said themselves which are which.
    """

    train: np.ndarray
    group: np.ndarray
    given: bool


def split(
    prompts: "Sequence[Prompt]", labels: Labels, *, group: str | None, test: float, seeds: int, seed: int
) -> Split:
    """Hold out a share of the groups at random, of every class the same; or as the field `split` of the prompts says.

    Prompts of the same text are a group, and so are those with the same value of the field `group`.

    Raises:
        InputError: a class that cannot be in both parts; a `split` other than train and test; a missing field.
    """
    groups = _groups(prompts, group)
    said = [p.fields.get("split") for p in prompts]
    if any(part is not None for part in said):
        for prompt, part in zip(prompts, said, strict=True):
            if not isinstance(part, str) or part not in PARTS:
                raise InputError(f"prompt {prompt.id}: `split` is train or test; found {part!r}")
        train = np.tile([PARTS[part] for part in said], (seeds, 1))
    else:
        if not 0 < test < 1:
            raise InputError(f"test is the share of texts held out, between 0 and 1; found {test:g}")
        strata = _strata(labels, groups, group)
        drawn = [_drawn(strata, labels, groups, test, np.random.default_rng([seed, n])) for n in range(seeds)]
        train = np.stack(drawn)
    for name, chosen in (("training", train), ("test", ~train)):
        if lacking := next(filter(None, (_lacking(labels, part) for part in chosen)), ""):
            raise InputError(f"the {name} part holds {lacking}; expected some of each in both parts")
    return Split(train, groups, said[0] is not None)


def _groups(prompts: "Sequence[Prompt]", field: str | None) -> np.ndarray:
    """(example,) components of "same text or same value of the field"."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    texts = np.unique([p.prompt for p in prompts], return_inverse=True)[1]
    if field is None:
        return texts
    values = np.unique(_values(prompts, field), return_inverse=True)[1]
    size = texts.max() + values.max() + 2
    joined = coo_array((np.ones(len(texts)), (texts, texts.max() + 1 + values)), shape=(size, size))
    return np.unique(connected_components(joined, directed=False)[1][texts], return_inverse=True)[1]


def _values(prompts: "Sequence[Prompt]", field: str) -> list[str]:
    for prompt in prompts:
        if field not in prompt.fields:
            raise InputError(f"prompt {prompt.id} has no field {field!r}; expected it in all prompts")
    return [json.dumps(p.fields[field], ensure_ascii=False) for p in prompts]


def _strata(labels: Labels, groups: np.ndarray, field: str | None) -> list[np.ndarray]:
    """The groups by their rarest class; of values all of them.

    Raises:
        InputError: a class of fewer than two groups.
    """
    classes = labels.values if labels.names else np.zeros(len(groups), int)
    for number in np.unique(classes):
        count = len(np.unique(groups[classes == number]))
        if count < 2:
            what = "different texts" if field is None else f"groups of one {field!r}"
            whose = f" of the class {labels.names[number]!r}" if labels.names else ""
            raise InputError(
                f"training and test need one each at the least; expected 2 or more {what}{whose}, found {count}: add "
                "examples, or leave out the class"
            )
    order = np.argsort(np.bincount(classes)[classes], kind="stable")
    number, first = np.unique(groups[order], return_index=True)
    of = classes[order][first]
    return [number[of == one] for one in np.unique(of)]


def _drawn(
    strata: list[np.ndarray], labels: Labels, groups: np.ndarray, test: float, generator: np.random.Generator
) -> np.ndarray:
    """(example,) True in training; drawn again where groups of several classes leave a part without one."""
    for _ in range(TRIES):
        held_out = []
        for members in strata:
            count = round(test * len(members))
            if len(members) > 1:
                count = min(max(count, 1), len(members) - 1)
            held_out.append(generator.permutation(members)[:count])
        train = ~np.isin(groups, np.concatenate(held_out))
        if not any(_lacking(labels, part) for part in (train, ~train)):
            break
    return train


def _lacking(labels: Labels, part: np.ndarray) -> str:
    """What keeps a part from being fitted or tested on; "" when nothing does."""
    if not labels.names and len(np.unique(labels.values[part])) < 2:
        return "fewer than two different labels"
    missing = np.setdiff1d(np.arange(len(labels.names)), labels.values[part])
    return f"no example of the class {labels.names[missing[0]]!r}" if len(missing) else ""


def types_of(
    prompts: "Sequence[Prompt]", encoded: "Encoded", columns: "Bool[Tensor, 'example pos']", field: str | None
) -> tuple[np.ndarray, str]:
    """(example,) the type that a control task labels at random, and what it is.

    The field where one is named; else the token that is read, where one is read and tokens vary (exp of their entropy
    is VARIED or more); else the text.
    """
    if field is not None:
        return np.unique(_values(prompts, field), return_inverse=True)[1], f"value of {field!r}"
    if bool((columns.sum(1) == 1).all()):
        _, numbers, counts = np.unique(encoded.ids[columns].numpy(), return_inverse=True, return_counts=True)
        share = counts / counts.sum()
        if np.exp(-(share * np.log(share)).sum()) >= VARIED:
            return numbers, "token at the position"
    return np.unique([p.prompt for p in prompts], return_inverse=True)[1], "text"


def controls(labels: Labels, types: np.ndarray, *, seeds: int, seed: int) -> np.ndarray:
    """(seed, example) labels of the control task: for each type one of the real labels, drawn at random."""
    drawn = []
    for n in range(seeds):
        generator = np.random.default_rng([seed, n, 1])
        drawn.append(generator.choice(labels.values, size=types.max() + 1)[types])
    return np.stack(drawn)
