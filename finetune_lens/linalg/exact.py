"""The exact route: singular vectors of a dense matrix, with a bound on the error of each.

Everything is float64. `decompose` is a Gram eigendecomposition on the shorter side for large matrices, an SVD for small
ones or when asked. Either way each singular vector comes with a bound on the sine of the angle to the true one, from
backward stability and the gap to its neighbours (Davis & Kahan 1970; Wedin 1972), so that a verdict drawn from it can
say whether it is certain.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny
GRAM_FROM = 256  # shorter side at which the Gram route overtakes the SVD (benchmarks/decompositions.py)
WORST = 1e-3  # a vector whose bound is larger than this counts as undetermined and is treated with its cluster

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Basis:
    """Singular vectors of one side of a matrix, best first, each with the bound on its error.

    `clusters[j]` numbers the runs of vectors that are determined only together (equal singular values, up to the error
    of the computation); a run of one is an ordinary vector. `rank` counts singular values above the rank tolerance; the
    vectors beyond it span nothing in particular unless the basis is `complete` (as many vectors as dimensions).
    """

    vectors: Float[Tensor, "dim p"]
    values: Float[Tensor, " p"]
    error: Float[Tensor, " p"]  # bound on sin(angle) of the vector, or of its cluster's span
    clusters: Int[Tensor, " p"]
    rank: int

    @property
    def complete(self) -> bool:
        return self.vectors.shape[0] == self.vectors.shape[1]

    @cached_property
    def sizes(self) -> Int[Tensor, " p"]:
        """How many vectors are in each vector's cluster."""
        return torch.bincount(self.clusters)[self.clusters]


@dataclass(frozen=True)
class Decomposition:
    """Singular values and the bases asked for. `route` is "gram" or "svd"."""

    values: Float[Tensor, " p"]
    left: Basis | None
    right: Basis | None
    route: str

    def side(self, side: Side) -> Basis:
        basis = self.left if side == "left" else self.right
        if basis is None:
            raise ValueError(f"the {side} basis was not asked for")
        return basis


def decompose(
    matrix: Float[Tensor, "out in"], *, sides: tuple[Side, ...] = ("left",), route: str = "auto"
) -> Decomposition:
    """Singular values and vectors, with error bounds.

    Args:
        matrix: any real type; computed in float64 on the matrix's device.
        sides: which bases are wanted.
        route: "gram", "svd", or "auto" (Gram from a shorter side of 256 on).

    The Gram route squares the singular values: those below about 1e-7 of the largest are not told apart there, and the
    bounds say so. Cost for p = min(out, in), q = max(out, in): SVD ≈ 20·p²q flops; Gram ≈ 2·p²q + 9·p³, and 2·p²q more
    for the longer side's basis. Memory: a few float64 copies of the matrix.
    """
    matrix = matrix.to(torch.float64)
    largest = matrix.abs().max() if matrix.numel() else matrix.new_zeros(())
    scale = largest if largest > 0 else torch.ones_like(largest)
    matrix = matrix / scale  # singular vectors do not change, and squares neither overflow nor vanish
    if route == "auto":
        route = "gram" if min(matrix.shape) >= GRAM_FROM else "svd"
    solve = _by_gram if route == "gram" else _by_svd
    values, bases = solve(matrix, sides)
    bases = {side: _rescaled(basis, scale) for side, basis in bases.items()}
    return Decomposition(values * scale, bases.get("left"), bases.get("right"), route)


def _rescaled(basis: Basis, scale: Tensor) -> Basis:
    return Basis(basis.vectors, basis.values * scale, basis.error, basis.clusters, basis.rank)


def _by_svd(matrix: Tensor, sides: tuple[Side, ...]) -> tuple[Tensor, dict[Side, Basis]]:
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    noise = max(matrix.shape) * EPS * values[0]
    rank = int((values > noise).sum())
    error, clusters = _errors(values, noise, rank)
    vectors = {"left": u, "right": vh.T}
    bases = {}
    for side in sides:
        longer = matrix.shape[side == "right"] > len(values)
        # On the longer side zero is one more singular value, and a neighbour of the small ones.
        bound = torch.maximum(error, 2 * noise / values.clamp_min(TINY)).clamp_max(1) if longer else error
        bound = torch.where(torch.arange(len(values), device=values.device) < rank, bound, error)
        bases[side] = Basis(vectors[side], values, bound, clusters, rank)
    return values, bases


def _by_gram(matrix: Tensor, sides: tuple[Side, ...]) -> tuple[Tensor, dict[Side, Basis]]:
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    squares, vectors = torch.linalg.eigh(short @ short.T)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    values = squares.sqrt()
    noise = 2 * max(matrix.shape) * EPS * squares[0]
    rank = int((squares > noise).sum())
    error, clusters = _errors(squares, noise, rank)
    near, far = ("left", "right") if wide else ("right", "left")
    bases: dict[Side, Basis] = {}
    if near in sides:
        bases[near] = Basis(vectors, values, error, clusters, rank)
    if far in sides:
        safe = torch.where(values > 0, values, torch.ones_like(values))
        derived = short.T @ vectors / safe
        derived[:, rank:] = 0  # below the rank tolerance the quotient is noise; no direction is claimed
        bases[far] = Basis(derived, values, derived_error(error, noise, squares), clusters, rank)
    return values, bases


def derived_error(
    error: Float[Tensor, " p"], noise: Float[Tensor, ""], squares: Float[Tensor, " p"]
) -> Float[Tensor, " p"]:
    """Bound for W v / σ_j, given that of v.

    The quotient multiplies the error of v along v_i by σ_i / σ_j: at most doubled where σ_i ≤ 2σ_j, and beyond that no
    more than noise / σ_j².
    """
    return 2 * torch.maximum(error, 2 * noise / squares.clamp_min(TINY)).clamp_max(0.5)


def _errors(
    values: Float[Tensor, " p"], noise: Float[Tensor, ""], rank: int
) -> tuple[Float[Tensor, " p"], Int[Tensor, " p"]]:
    """Bounds sin θ ≤ 2·noise / gap for each vector, or for the span of its cluster."""
    clusters, gaps = clusters_and_gaps(values, noise, rank, WORST)
    return (2 * noise / gaps.clamp_min(TINY)).clamp_max(1) if values[0] > 0 else torch.ones_like(values), clusters


def clusters_and_gaps(
    values: Float[Tensor, " p"], noise: Float[Tensor, ""], rank: int, worst: float
) -> tuple[Int[Tensor, " p"], Float[Tensor, " p"]]:
    """Which vectors are determined only together, and the gap from each cluster to what lies outside it.

    Vectors whose own bound 2·noise / gap exceeds `worst` are joined with the neighbour that is too near; what lies
    below the rank tolerance is one cluster.
    """
    step = values[:-1] - values[1:]
    cut = step > 2 * noise / worst
    cut[rank:] = False
    if 0 < rank < len(values):
        cut[rank - 1] = True
    clusters = torch.cat([cut.new_zeros(1, dtype=torch.long), cut.long().cumsum(0)])
    across = step[cut]  # the gap below cluster c, which is the gap above cluster c + 1
    edge = values.new_full((1,), torch.inf)
    return clusters, torch.minimum(torch.cat([edge, across]), torch.cat([across, edge]))[clusters]
