"""Which way to compare two weights: several routes to one result, each stating its certainty.

- exact: both matrices decomposed (`gram`; `svd` for small ones, or where the squares leave a verdict open).
- update: only the base decomposed; a factored tuned side is read off in the base's coordinates (`lowrank`).
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from finetune_lens.linalg.exact import Side, decompose
from finetune_lens.linalg.lowrank import update_in_base
from finetune_lens.linalg.matching import Match, match

Method = Literal["auto", "exact", "update"]
METHODS: tuple[Method, ...] = ("auto", "exact", "update")


@dataclass(frozen=True)
class Comparison:
    """The leading singular vectors of the tuned weight among all those of the base."""

    base_values: Float[Tensor, " p"]
    tuned_values: Float[Tensor, " t"]
    matches: dict[Side, Match]
    route: str  # "gram", "svd" or "update"


def compare(
    base: Float[Tensor, "out in"],
    tuned: Float[Tensor, "out in"] | None,
    update: tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]] | None,
    *,
    ranks: int,
    sides: tuple[Side, ...],
    gap: float,
    block: int,
    epsilon: float,
    judged: int,
    method: Method = "auto",
) -> Comparison:
    """Place the top `ranks` singular vectors of the tuned weight among the base's.

    Args:
        base: float64. `tuned` likewise, or None where the tuned weight is base + left @ right with `update` = (left,
            right).
        gap, block: as in `match`.
        epsilon, judged: a verdict at ε on the top `judged` vectors that the Gram route leaves open is settled by SVD.
        method: "exact" decomposes both sides; "update" reads a factored update off in the base's coordinates; "auto"
            takes that wherever the update is factored.
    """
    tools = {"gap": gap, "block": block}
    if update is not None and method != "exact":
        found = _by_update(base, update, ranks=ranks, sides=sides, **tools)
        if not _open(found.matches, epsilon, judged):
            return found
    if tuned is None:
        tuned = base + update[0] @ update[1]
    route = "auto"
    while True:
        one, other = decompose(base, sides=sides, route=route), decompose(tuned, sides=sides, route=route)
        matches = {s: match(one.side(s), other.side(s), k=ranks, **tools) for s in sides}
        if one.route == "svd" or not _open(matches, epsilon, judged):
            return Comparison(one.values, other.values, matches, one.route)
        route = "svd"  # what the squared values cannot tell, the values themselves may


def _by_update(
    base: Tensor, update: tuple[Tensor, Tensor], *, ranks: int, sides: tuple[Side, ...], gap: float, block: int
) -> Comparison:
    near: Side = "left" if base.shape[0] <= base.shape[1] else "right"
    known = decompose(base, sides=tuple({near, *sides}))
    values, placed = update_in_base(known.side(near), base, *update, k=ranks, sides=sides)
    matches = {
        side: match(known.side(side), basis, k=ranks, gap=gap, block=block, cosines=cosines)
        for side, (basis, cosines) in placed.items()
    }
    return Comparison(known.values, values, matches, "update")


def _open(matches: dict[Side, Match], epsilon: float, judged: int) -> bool:
    """Whether a verdict at ε among the judged vectors is undetermined."""
    return any(bool(((m.lower < epsilon) & (m.upper >= epsilon))[:judged].any()) for m in matches.values())
