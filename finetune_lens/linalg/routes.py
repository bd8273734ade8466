"""Which way to compare two weights: several routes to one result, each stating its certainty.

- exact: both matrices decomposed, the base only as far as its cosines need (`gram`; `svd` for small matrices, or where
  the squares leave a verdict open);
- cached: the base's basis from a store, computed once; a factored tuned side is read off in its coordinates
  (`lowrank`), a dense one is projected on it;
- certified: neither decomposed; the leading tuned vectors by iteration, proofs for each (`certified`). What is not
  proved either way goes the exact way.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from finetune_lens.linalg.cache import Store
from finetune_lens.linalg.certified import Certificate, certify
from finetune_lens.linalg.exact import EPS, GRAM_FROM, Basis, Side, decompose, far_basis, near_side, place, scaled
from finetune_lens.linalg.krylov import OVERSAMPLED, leading
from finetune_lens.linalg.lowrank import update_in_base
from finetune_lens.linalg.matching import Match, match

Method = Literal["auto", "exact", "cached", "certified"]
METHODS: tuple[Method, ...] = ("auto", "exact", "cached", "certified")
CERTIFIED_FROM = 1024  # shorter side from which proofs are cheaper than a decomposition (benchmarks/spectra.py)
CERTIFIED_UP_TO = 64  # leading vectors that proofs are made for
Update = tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]


@dataclass(frozen=True)
class Comparison:
    """The leading singular vectors of the tuned weight among all those of the base.

    `base_values` are all of the base's, or with the certified route those that were found. `route` is "gram", "svd",
    "cached", "certified", or "unchanged" where there was nothing to compare; `certified[side]` tells which vectors were
    settled by proof where others had to take `route`.
    """

    base_values: Float[Tensor, " p"]
    tuned_values: Float[Tensor, " t"]
    matches: dict[Side, Match]
    route: str
    certified: dict[Side, Bool[Tensor, " k"]]
    leading: dict[Side, Float[Tensor, "_ judged"]]  # the first `judged` tuned vectors, where they were asked for


def choose(
    shape: tuple[int, ...], *, factored: bool, ranks: int, method: Method, stored: bool, values: bool
) -> Literal["exact", "cached", "certified"]:
    """The route for a matrix of this shape.

    Args:
        factored: the tuned side is base + a product of two thin matrices.
        ranks: leading tuned vectors wanted.
        stored: bases are kept, so that others will profit.
        values: all singular values of the base are wanted too.
    """
    p = min(shape)
    if method != "auto":
        return "exact" if method == "cached" and not (stored or factored) else method
    if stored or (factored and 2 * ranks > p):
        return "cached"
    return "certified" if p >= CERTIFIED_FROM and ranks <= CERTIFIED_UP_TO and not values else "exact"


def compare(
    base: Float[Tensor, "out in"],
    tuned: Float[Tensor, "out in"] | None,
    update: Update | None,
    *,
    ranks: int,
    sides: tuple[Side, ...],
    gap: float,
    block: int,
    epsilon: float,
    judged: int,
    route: Literal["exact", "cached", "certified"] = "exact",
    leading: bool = False,
    store: Store | None = None,
    digest: str = "",
) -> Comparison:
    """Place the top `ranks` singular vectors of the tuned weight among the base's.

    Args:
        base, tuned: any real type, on the device to compute on; computed in float64. `tuned` is None where it is base +
            left @ right with `update` = (left, right), in float64.
        gap, block: as in `match`.
        epsilon, judged: a verdict at ε on the top `judged` vectors that the route leaves open is settled by a more
            exact one.
        leading: return the first `judged` tuned vectors too.
        store, digest: where the base's basis may be found or left, and the name of its content.
    """
    options = {"ranks": ranks, "gap": gap, "block": block, "epsilon": epsilon, "judged": judged, "route": route,
               "leading": leading}  # fmt: skip
    if "right" in sides and base.shape[0] == base.shape[1]:
        # either side of a square matrix can be the one whose vectors need no division by σ
        mirrored = None if update is None else (update[1].T, update[0].T)
        right = _compare(base.T, None if tuned is None else tuned.T, mirrored, sides=("left",), store=store,
                         digest=f"{digest}ᵀ", **options)  # fmt: skip
        both = ("matches", "certified", "leading")
        found = replace(right, **{n: _as_right(getattr(right, n)) for n in both})
        if "left" in sides:
            left = _compare(base, tuned, update, sides=("left",), store=store, digest=digest, **options)
            whole = left if left.route != "certified" else right  # it names the route of what was not proved
            found = replace(whole, **{n: getattr(left, n) | getattr(found, n) for n in both})
        return found
    return _compare(base, tuned, update, sides=sides, store=store, digest=digest, **options)


def _compare(
    base: Tensor,
    tuned: Tensor | None,
    update: Update | None,
    *,
    ranks: int,
    sides: tuple[Side, ...],
    gap: float,
    block: int,
    epsilon: float,
    judged: int,
    route: str,
    leading: bool,
    store: Store | None,
    digest: str,
) -> Comparison:
    tools = {"gap": gap, "block": block}
    if route == "certified":
        found = _certified(base, tuned, update, ranks=ranks, sides=sides, epsilon=epsilon, judged=judged, **tools)
        if found is not None:
            return found
    near = _known(base, store, digest) if route == "cached" else None
    if route == "cached" and update is not None:
        if near is None:
            near = decompose(base, sides=(near_side(base.shape),)).side(near_side(base.shape))
        found = _in_base(base, near, update, ranks=ranks, sides=sides, leading=judged if leading else 0, **tools)
        if not _open(found.matches, epsilon, judged):
            return found
    other = decompose(_dense(base, tuned, update), sides=sides, top=ranks)
    small = min(base.shape) < GRAM_FROM
    if near is not None and not small:
        one = decompose(base, sides=sides, near=near)
        values, route_taken = one.values, "cached"
        matches = {s: match(one.side(s), other.side(s), k=ranks, **tools) for s in sides}
    elif small or 2 * ranks > min(base.shape) or base.device.type != "cpu":
        one = decompose(base, sides=sides)
        values, route_taken = one.values, one.route
        matches = {s: match(one.side(s), other.side(s), k=ranks, **tools) for s in sides}
    else:
        values, placed = place(base, {s: other.side(s).vectors for s in sides})
        route_taken = "gram"
        matches = {
            s: match(basis, other.side(s), k=ranks, cosines=cosines, **tools) for s, (basis, cosines) in placed.items()
        }
    if route_taken != "svd" and _open(matches, epsilon, judged):
        # what the squared values cannot tell, the values themselves may
        one, other = (decompose(w, sides=sides, route="svd") for w in (base, _dense(base, tuned, update)))
        values, route_taken = one.values, "svd"
        matches = {s: match(one.side(s), other.side(s), k=ranks, **tools) for s in sides}
    first = {s: other.side(s).vectors[:, :judged] for s in sides}
    return Comparison(values, other.values, matches, route_taken, _none(matches), first)


def _as_right(found: dict[Side, Any]) -> dict[Side, Any]:
    """What was found on the left of the transposed weight, if anything."""
    return {"right": found["left"]} if found else {}


def _none(matches: dict[Side, Match]) -> dict[Side, Bool[Tensor, " k"]]:
    return {s: torch.zeros_like(m.max_cos, dtype=torch.bool) for s, m in matches.items()}


def _dense(base: Tensor, tuned: Tensor | None, update: Update | None) -> Tensor:
    return torch.addmm(base.to(torch.float64), *update) if tuned is None else tuned


def _known(base: Tensor, store: Store | None, digest: str) -> Basis | None:
    """The basis of the base's shorter side, from the store or for it; None where it is not worth keeping."""
    if store is None or min(base.shape) < GRAM_FROM:
        return None
    near = store.get(digest)
    if near is None:
        side = near_side(base.shape)
        near = decompose(base, sides=(side,)).side(side)
        store.put(digest, near)
    tensors = (v.to(base.device) for v in (near.vectors, near.values, near.error, near.clusters))
    return Basis(*tensors, near.rank, complete=True)


def _in_base(
    base: Tensor,
    near: Basis,
    update: Update,
    *,
    ranks: int,
    sides: tuple[Side, ...],
    leading: int,
    gap: float,
    block: int,
) -> Comparison:
    side = near_side(base.shape)
    noise = 2 * max(base.shape) * EPS * near.values[0].square()
    square = base.shape[0] == base.shape[1]
    values, placed = update_in_base(near, base, *update, k=ranks, sides=tuple({side, *sides}))
    matches, first = {}, {}
    for s in sides:
        basis, cosines = placed[s]
        known = near if s == side else far_basis(near, noise, near.vectors[:0], square=square)
        matches[s] = match(known, basis, k=ranks, gap=gap, block=block, cosines=cosines)
    if leading:
        nearest = placed[side][1][:, :leading].T.contiguous() @ near.vectors.T
        for s in sides:
            rows = nearest if s == side else _Weight(base, update).across(nearest)
            first[s] = (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).T
    return Comparison(near.values, values, matches, "cached", _none(matches), first)


def _certified(
    base: Tensor,
    tuned: Tensor | None,
    update: Update | None,
    *,
    ranks: int,
    sides: tuple[Side, ...],
    gap: float,
    block: int,
    epsilon: float,
    judged: int,
) -> Comparison | None:
    """None where the leading tuned vectors do not converge, or squares would overflow or vanish."""
    if any(scaled(w)[1] != 1 for w in (base, tuned) if w is not None):
        return None
    side = near_side(base.shape)
    far: Side = "right" if side == "left" else "left"
    noise = 2 * max(base.shape) * EPS
    weight = _Weight(base if tuned is None else tuned, update if tuned is None else None)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(ranks + OVERSAMPLED, min(base.shape), dtype=torch.float64, generator=generator)
    near = leading(weight.square, start.to(base.device), ranks, noise)
    if near is None or near.rank < ranks:
        return None
    bases = {side: near}
    if far in sides:
        vectors = weight.across(near.vectors.T.contiguous()).T
        vectors /= torch.linalg.vector_norm(vectors, dim=0)
        bases[far] = far_basis(near, noise * near.values[0].square(), vectors, square=False)
    del weight
    weight = _Weight(base, None)
    certificates: dict[Side, Certificate] = {}
    for s in sides:
        operator = weight.coordinates(bases[s].vectors, near=s == side)
        if operator is None:
            return None
        apply, start, slack = operator
        certificates[s] = certify(
            apply, start, bases[s], k=ranks, epsilon=epsilon, gap=gap, block=block, noise_per_scale=noise, slack=slack
        )
    matches = {s: c.match for s, c in certificates.items()}
    first = {s: bases[s].vectors[:, :judged] for s in sides}
    settled = {s: (m.lower >= epsilon) | (m.upper < epsilon) for s, m in matches.items()}
    values = max((c.values for c in certificates.values()), key=len)
    if not _open(matches, epsilon, judged):
        return Comparison(values, near.values, matches, "certified", settled, first)
    del weight
    if base.device.type == "cpu":
        values, placed = place(base, {s: bases[s].vectors for s in sides})
        exact = {s: match(b, bases[s], k=ranks, gap=gap, block=block, cosines=c) for s, (b, c) in placed.items()}
    else:
        one = decompose(base, sides=sides)
        values = one.values
        exact = {s: match(one.side(s), bases[s], k=ranks, gap=gap, block=block) for s in sides}
    matches = {s: _merged(matches[s], exact[s], settled[s]) for s in sides}
    return None if _open(matches, epsilon, judged) else Comparison(values, near.values, matches, "gram", settled, first)


def _merged(certified: Match, exact: Match, settled: Bool[Tensor, " k"]) -> Match:
    """The certified entries where they settle a verdict, the exact ones elsewhere."""
    names = ("max_cos", "best", "lower", "upper", "subspace_cos")
    entries = {n: torch.where(settled, getattr(certified, n), getattr(exact, n)) for n in names}
    return Match(**entries, similarity=exact.similarity)


class _Weight:
    """Products of rows of vectors with a weight in float64: dense, or dense + left @ right."""

    def __init__(self, dense: Tensor, update: Update | None):
        self.side = near_side(dense.shape)
        self.dense = dense.to(torch.float64) if self.side == "left" else dense.to(torch.float64).T  # wide
        self.left, self.right = (None, None) if update is None else update
        if update is not None and self.side == "right":
            self.left, self.right = update[1].T, update[0].T

    def along(self, x: Float[Tensor, "b longer"]) -> Float[Tensor, "b shorter"]:
        y = x @ self.dense.T
        return y if self.left is None else y.addmm_(x @ self.right.T, self.left.T)

    def across(self, x: Float[Tensor, "b shorter"]) -> Float[Tensor, "b longer"]:
        y = x @ self.dense
        return y if self.left is None else y.addmm_(x @ self.left, self.right)

    def square(self, x: Float[Tensor, "b shorter"]) -> Float[Tensor, "b shorter"]:
        return self.along(self.across(x))

    def coordinates(self, u: Tensor, *, near: bool) -> "tuple | None":
        """The operator and the vectors u in coordinates whose unit vectors are all of the side's singular space.

        On the shorter side they are the usual ones. The longer side has directions that belong to no singular vector:
        with W Wᵀ = L Lᵀ, h = L⁻¹ W u has ⟨h, w_i⟩ = ⟨u, x_i⟩ for the eigenvectors w_i of Lᵀ L. None where W is too near
        to singular for that; else the third item bounds what it adds to the error of a cosine.
        """
        if near:
            return self.square, u.T.contiguous(), 0.0
        gram = self.dense @ self.dense.T
        factor, info = torch.linalg.cholesky_ex(gram)
        if info:
            return None
        largest = float(torch.linalg.matrix_norm(gram, 1))
        del gram
        v = torch.randn(len(factor), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        v = v.to(factor.device)
        for _ in range(6):  # inverse iteration: ‖L⁻¹‖² from below, doubled twice for what it has not reached
            v, _ = torch.linalg.qr(v)
            v = torch.cholesky_solve(v, factor)
        condition = 4 * largest * float(torch.linalg.matrix_norm(v, 2))
        slack = 8 * max(self.dense.shape) * EPS * condition
        if slack > 0.01:
            return None
        start = torch.linalg.solve_triangular(factor, self.along(u.T).T, upper=False)
        return (lambda x: (x @ factor.T) @ factor), start.T.contiguous(), slack


def _open(matches: dict[Side, Match], epsilon: float, judged: int) -> bool:
    """Whether a verdict at ε among the judged vectors is undetermined."""
    return any(bool(((m.lower < epsilon) & (m.upper >= epsilon))[:judged].any()) for m in matches.values())
