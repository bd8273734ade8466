"""Two classes of prompts, their halves, and the direction between them at one depth of both models."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.directions import separation
from finetune_lens.stats import RESAMPLES, percentile_interval

if TYPE_CHECKING:
    from finetune_lens.prompts import Prompt

FEWEST = 4  # texts of a class: two in either half
NULL, HALVES = 200, 50  # random contrasts; ways to divide the training half
BLOCK = 1000  # resamples at once
NOTHING = 1e-6  # of the length of an activation: what rounding leaves of a difference


def classes(items: "Sequence[Prompt]", field: str, positive: Any) -> tuple[np.ndarray, tuple[str, str]]:
    """(example,) whether of the positive class; names of the negative and the positive one.

    Raises:
        InputError: a prompt without the field, one class only, several and none chosen.
    """
    lacking = [item.id for item in items if item.fields.get(field) is None]
    if lacking:
        raise InputError(
            f"{len(lacking)} of {len(items)} prompts have no `{field}` (first: {lacking[0]}); add it to the file, or "
            "name the field that holds the class (--label)"
        )
    values = [json.dumps(item.fields[field], ensure_ascii=False, sort_keys=True) for item in items]
    known = {value: str(json.loads(value)) for value in sorted(set(values))}
    if len(known) == 1:
        raise InputError(f"every prompt has the {field} {next(iter(known.values()))!r}: there is nothing to tell apart")
    if positive is None:
        if len(known) > 2:
            raise InputError(
                f"`{field}` has {len(known)} values: {', '.join(list(known.values())[:5])}{' …' * (len(known) > 5)}; "
                "name the one that the direction points to (positive, --positive)"
            )
        chosen = list(known)[-1]
    else:
        match = [value for value, name in known.items() if str(positive) in (name, value)]
        if not match:
            raise InputError(f"no prompt has the {field} {positive!r}; there are {', '.join(known.values())}")
        chosen = match[0]
    others = [name for value, name in known.items() if value != chosen]
    negative = others[0] if len(others) == 1 else f"not {known[chosen]}"
    return np.array([value == chosen for value in values]), (negative, known[chosen])


def halved(items: "Sequence[Prompt]", is_positive: np.ndarray, names: tuple[str, str], seed: int) -> np.ndarray:
    """(example,) True in the training half: half the texts of either class, a text in one half only.

    Raises:
        InputError: a class with too few texts.
    """
    rng = np.random.default_rng(seed)
    _, first, group = np.unique([item.prompt for item in items], return_index=True, return_inverse=True)
    chosen = []
    for value, name in enumerate(names):
        members = rng.permutation(np.flatnonzero(is_positive[first] == value))
        if len(members) < FEWEST:
            raise InputError(f"the class {name!r} has {len(members)} different texts; expected {FEWEST} or more")
        chosen.append(members[: -(-len(members) // 2)])
    return np.isin(group, np.concatenate(chosen))


def at_depth(both: Sequence[np.ndarray], positive: np.ndarray, train: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Directions of base and tuned model from the training half, and how they lie to each other and to the rest.

    Args:
        both: the sides' activations, (example, feature) each.
        positive, train: (example,).
        seed: of resamples and halves; one for all depths.

    Returns:
        The variables of `Directions` but those of interventions, of one depth.
    """
    both = [side.astype(np.float64) for side in both]
    fit, p, rest = [side[train] for side in both], positive[train], positive[~train]
    sizes = [np.linalg.norm(x, axis=1).mean() for x in fit]

    def directions(weights: np.ndarray) -> list[np.ndarray]:
        """(…, feature) of either side, 0 where all that there is is rounding."""
        found = [weights @ x for x in fit]
        lengths = [np.linalg.norm(one, axis=-1, keepdims=True) for one in found]
        return [np.where(n > NOTHING * size, one, 0.0) for one, n, size in zip(found, lengths, sizes, strict=True)]

    r = directions(_contrast(p, ~p))
    drawn = [_cosine(*directions(weights)) for weights in _resampled(p, seed)]
    mixed, half = _halves(p, [seed, 1], NULL), _halves(p, [seed, 2], HALVES)
    chance = directions((_contrast(mixed & p, ~mixed & p) + _contrast(mixed & ~p, ~mixed & ~p)) / 2)
    pieces = list(zip(*(directions(_contrast(p & some, ~p & some)) for some in (half, ~half)), strict=True))
    crossed = [
        [*separation(one @ x.T, p, ~half), *separation(other @ x.T, p, half)]
        for (one, other), x in zip(pieces, fit, strict=True)
    ]
    with np.errstate(invalid="ignore"):
        one, other = (vector / np.linalg.norm(vector) for vector in r)  # base's, tuned's
    projection = np.array([[both[0] @ one, both[0] @ other], [both[1] @ other, both[1] @ one]])
    low, high = percentile_interval(np.concatenate(drawn)[None])[:, 0]
    return {
        "direction": np.array(r, dtype=np.float32),
        "cosine": _cosine(*r), "cosine_low": low, "cosine_high": high, "cosine_null": _cosine(*chance),
        "cosine_halves": np.array([_cosine(*two) for two in pieces]),
        "cross_fitted": np.array([_mean(values) for values in crossed]),
        "projection": np.where(train, np.nan, projection),
        "separation_null": np.array([separation(c @ x[~train].T, rest) for c, x in zip(chance, both, strict=True)]),
    }  # fmt: skip


def _contrast(plus: np.ndarray, minus: np.ndarray) -> np.ndarray:
    """(…, row) weights: the mean of some rows less that of others."""
    return plus / plus.sum(-1, keepdims=True) - minus / minus.sum(-1, keepdims=True)


def _resampled(positive: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The weights of bootstrap resamples, each class drawn by itself, (resample, row), some at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, BLOCK):
        weights = np.zeros((min(BLOCK, RESAMPLES - start), len(positive)))
        for members, sign in ((positive, 1), (~positive, -1)):
            count = int(members.sum())
            weights[:, members] = sign * rng.multinomial(count, np.full(count, 1 / count), size=len(weights)) / count
        yield weights


def _halves(positive: np.ndarray, seed: list[int], number: int) -> np.ndarray:
    """(half, row) True in one half of the rows of each class, at random."""
    rng = np.random.default_rng(seed)
    found = np.zeros((number, len(positive)), bool)
    for row in found:
        for members in (positive, ~positive):
            at = rng.permutation(np.flatnonzero(members))
            row[at[: len(at) // 2]] = True
    return found


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row; NaN where one is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def _mean(values: list[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    there = [value for value in values if np.isfinite(value)]
    return float(np.mean(there)) if there else np.nan
