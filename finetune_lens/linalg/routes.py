"""Which way to compare two weights: several routes to one result, each stating its certainty.

- exact: both matrices decomposed (`gram`; `svd` for small ones, or where the squares leave a verdict open).
- update: only the base decomposed; a factored tuned side is read off in the base's coordinates (`lowrank`).
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from finetune_lens.linalg.cache import BasisCache
from finetune_lens.linalg.exact import EPS, GRAM_FROM, Basis, Side, decompose, far_basis, near_side
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
    route: str  # "gram", "svd", "update", or "unchanged" where there was nothing to compare


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
    cache: BasisCache | None = None,
    digest: str = "",
) -> Comparison:
    """Place the top `ranks` singular vectors of the tuned weight among the base's.

    Args:
        base: float64. `tuned` likewise, or None where the tuned weight is base + left @ right with `update` = (left,
            right).
        gap, block: as in `match`.
        epsilon, judged: a verdict at ε on the top `judged` vectors that the Gram route leaves open is settled by SVD.
        method: "exact" decomposes both sides; "update" reads a factored update off in the base's coordinates; "auto"
            takes that wherever the update is factored.
        cache, digest: where the base's basis may be found or left, and the name of its content.
    """
    tools = {"gap": gap, "block": block}
    near = _known(base, cache, digest)
    if update is not None and method != "exact":
        if near is None:
            near = decompose(base, sides=(near_side(base.shape),)).side(near_side(base.shape))
        found = _by_update(base, near, update, ranks=ranks, sides=sides, **tools)
        if not _open(found.matches, epsilon, judged):
            return found
    if tuned is None:
        tuned = base + update[0] @ update[1]
    if near is not None and min(base.shape) >= GRAM_FROM:
        one = decompose(base, sides=sides, near=near)
    else:
        one = decompose(base, sides=sides)
    other = decompose(tuned, sides=sides, top=ranks)
    while True:
        matches = {s: match(one.side(s), other.side(s), k=ranks, **tools) for s in sides}
        if one.route == "svd" or not _open(matches, epsilon, judged):
            return Comparison(one.values, other.values, matches, one.route)
        # what the squared values cannot tell, the values themselves may
        one, other = (decompose(w, sides=sides, route="svd") for w in (base, tuned))


def _known(base: Tensor, cache: BasisCache | None, digest: str) -> Basis | None:
    """The basis of the base's shorter side, from the cache or for it; None where it is not worth keeping."""
    if cache is None or min(base.shape) < GRAM_FROM:
        return None
    near = cache.get(digest)
    if near is None:
        side = near_side(base.shape)
        near = decompose(base, sides=(side,)).side(side)
        cache.put(digest, near)
    return Basis(*(v.to(base.device) for v in (near.vectors, near.values, near.error, near.clusters)), near.rank)


def _by_update(
    base: Tensor,
    near: Basis,
    update: tuple[Tensor, Tensor],
    *,
    ranks: int,
    sides: tuple[Side, ...],
    gap: float,
    block: int,
) -> Comparison:
    side = near_side(base.shape)
    noise = 2 * max(base.shape) * EPS * near.values[0].square()
    values, placed = update_in_base(near, base, *update, k=ranks, sides=sides)
    matches = {
        s: match(near if s == side else far_basis(near, noise, near.vectors[:0]), basis, k=ranks, gap=gap, block=block,
                 cosines=cosines)
        for s, (basis, cosines) in placed.items()
    }  # fmt: skip
    return Comparison(near.values, values, matches, "update")


def _open(matches: dict[Side, Match], epsilon: float, judged: int) -> bool:
    """Whether a verdict at ε among the judged vectors is undetermined."""
    return any(bool(((m.lower < epsilon) & (m.upper >= epsilon))[:judged].any()) for m in matches.values())
