"""The exact route: singular vectors of a dense matrix, with a bound on the error of each.

Everything is float64. `decompose` is a Gram eigendecomposition on the shorter side for large matrices, an SVD for small
ones or when asked. Either way each singular vector comes with a bound on the sine of the angle to the true one, from
backward stability and the gap to its neighbours (Davis & Kahan 1970; Wedin 1972), so that a verdict drawn from it can
say whether it is certain.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny
GRAM_FROM = 256  # shorter side at which the Gram route overtakes the SVD (benchmarks/decompositions.py)
EXTRA = 12  # vectors beyond those asked for, so that the last of these has known neighbours
WORST = 1e-3  # a vector whose bound is larger than this counts as undetermined and is treated with its cluster

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Basis:
    """Singular vectors of one side of a matrix, best first, each with the bound on its error.

    `clusters[j]` numbers the runs of vectors that are determined only together (equal singular values, up to the error
    of the computation); a run of one is an ordinary vector. `rank` counts singular values above the rank tolerance; the
    vectors beyond it span nothing in particular unless the basis is `complete`. Where no more than cosines with other
    vectors is needed, `vectors` has no rows.
    """

    vectors: Float[Tensor, "dim p"]
    values: Float[Tensor, " p"]
    error: Float[Tensor, " p"]  # bound on sin(angle) of the vector, or of its cluster's span
    clusters: Int[Tensor, " p"]
    rank: int
    complete: bool = False  # as many vectors as dimensions

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
    matrix: Float[Tensor, "out in"],
    *,
    sides: tuple[Side, ...] = ("left",),
    route: str = "auto",
    top: int | None = None,
    near: Basis | None = None,
) -> Decomposition:
    """Singular values and vectors, with error bounds.

    Args:
        matrix: any real type; computed in float64 on the matrix's device.
        sides: which bases are wanted.
        route: "gram", "svd", or "auto" (Gram from a shorter side of 256 on).
        top: only so many leading vectors, by the Gram route (a few more are returned, as neighbours of the last).
        near: the basis of the matrix's shorter side where it is known already; the other side is derived from it.

    The Gram route squares the singular values: those below about 1e-7 of the largest are not told apart there, and the
    bounds say so. Cost for p = min(out, in), q = max(out, in): SVD ≈ 20·p²q flops; Gram ≈ 2·p²q + 9·p³ (with `top`
    2·p²q + (4/3)·p³), and 2·p²q more for the longer side's basis. Memory: the float64 matrix, its Gram matrix and the
    vectors.
    """
    matrix = matrix.to(torch.float64)
    if near is not None:
        noise = 2 * max(matrix.shape) * EPS * near.values[0].square()
        bases = _both_sides(matrix, near, noise, sides)
        return Decomposition(near.values, bases.get("left"), bases.get("right"), "gram")
    matrix, scale = scaled(matrix)
    if route == "auto":
        route = "gram" if min(matrix.shape) >= GRAM_FROM else "svd"
    values, bases = _by_gram(matrix, sides, top) if route == "gram" else _by_svd(matrix, sides)
    bases = {side: _rescaled(basis, scale) for side, basis in bases.items()}
    return Decomposition(values * scale, bases.get("left"), bases.get("right"), route)


def place(
    matrix: Float[Tensor, "out in"], vectors: dict[Side, Float[Tensor, "_ t"]]
) -> tuple[Float[Tensor, " p"], dict[Side, tuple[Basis, Float[Tensor, "p t"]]]]:
    """The cosines ⟨x_i, u⟩ of given vectors with *all* singular vectors x_i of a matrix, which are never formed.

    With the Gram matrix G = Q T Qᵀ, T tridiagonal with eigenvectors S, the cosines are Sᵀ(Qᵀu): the product Q·S, most
    of the work of an eigendecomposition, is left out.

    Returns:
        The singular values, and by side the basis (without vectors) with the cosines.

    Cost: 2·p²q + (4/3)·p³ flops, O(p²) for S, 4·p²·t for the cosines. Memory: the float64 matrix, G and S. CPU only.
    """
    from scipy.linalg import eigh_tridiagonal, lapack

    matrix, scale = scaled(matrix.to(torch.float64))
    side = near_side(matrix.shape)
    short = matrix if side == "left" else matrix.T
    gram = lower_gram(short).numpy()
    targets = {s: v.to(torch.float64) if s == side else short @ v.to(torch.float64) for s, v in vectors.items()}
    square = matrix.shape[0] == matrix.shape[1]
    longest = max(matrix.shape)
    del matrix, short
    p = len(gram)
    reflectors, diagonal, beside, tau = tridiagonal(gram)
    del gram
    squares, rotated = eigh_tridiagonal(diagonal, beside, lapack_driver="stemr", check_finite=False)
    squares = torch.from_numpy(squares[::-1].copy()).clamp_min(0)
    noise = 2 * longest * EPS * squares[0]
    rank = int((squares > noise).sum())
    clusters, gaps = clusters_and_gaps(squares, noise, rank)
    values = squares.sqrt()
    near = Basis(values.new_empty(0, p), values, _bound(squares, noise, gaps), clusters, rank, complete=True)
    placed: dict[Side, tuple[Basis, Tensor]] = {}
    for s, target in targets.items():
        turned = np.array(target.numpy(), order="F")  # overwritten: a copy
        below = np.asfortranarray(reflectors[1:, :-1])
        work = lapack.dormqr("L", "T", below, tau, turned[1:], lwork=-1)[1][0]
        turned[1:] = lapack.dormqr("L", "T", below, tau, turned[1:], lwork=int(work))[0]
        cosines = torch.from_numpy((rotated.T @ turned)[::-1].copy())
        basis = near
        if s != side:
            cosines = cosines / torch.where(values > 0, values, 1)[:, None]
            cosines[rank:] = 0
            basis = far_basis(near, noise, near.vectors, square=square)
        placed[s] = _rescaled(basis, scale), cosines
    return values * scale, placed


def lower_gram(short: Float[Tensor, "p q"]) -> Float[Tensor, "p p"]:
    """W Wᵀ in float64, of which only the lower triangle is to be read: on the CPU the rest is not computed."""
    if short.device.type != "cpu":
        return short @ short.T
    from scipy.linalg import blas

    # column-major for BLAS, without a copy: rows of W as columns of Wᵀ
    if short.is_contiguous():
        return torch.from_numpy(blas.dsyrk(1.0, short.numpy().T, trans=1, lower=1))
    return torch.from_numpy(blas.dsyrk(1.0, short.numpy(), lower=1))


def tridiagonal(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Householder reflectors (below the diagonal), diagonal, subdiagonal and their factors; overwrites `gram`.

    Only the lower triangle is read.
    """
    from scipy.linalg import lapack

    work, _ = lapack.dsytrd_lwork(len(gram), lower=1)
    return lapack.dsytrd(gram, lower=1, lwork=int(work), overwrite_a=1)[:4]


def scaled(matrix: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out in"], float]:
    """The matrix over a number that keeps squares from overflowing or vanishing, and that number (1 for usual ones)."""
    largest = float(torch.maximum(matrix.amax(), -matrix.amin()))
    if largest == 0 or 1e-100 < largest < 1e100:
        return matrix, 1.0
    return matrix / largest, largest


def near_side(shape: tuple[int, ...]) -> Side:
    """The side of the shorter dimension, whose Gram matrix is the smaller."""
    return "left" if shape[0] <= shape[1] else "right"


def _rescaled(basis: Basis, scale: float) -> Basis:
    return replace(basis, values=basis.values * scale)


def _by_svd(matrix: Tensor, sides: tuple[Side, ...]) -> tuple[Tensor, dict[Side, Basis]]:
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    noise = max(matrix.shape) * EPS * values[0]
    rank = int((values > noise).sum())
    clusters, gaps = clusters_and_gaps(values, noise, rank)
    error = _bound(values, noise, gaps)
    vectors = {"left": u, "right": vh.T}
    bases = {}
    for side in sides:
        longer = matrix.shape[side == "right"] > len(values)
        # On the longer side zero is one more singular value, and a neighbour of the small ones.
        bound = torch.maximum(error, 2 * noise / values.clamp_min(TINY)).clamp_max(1) if longer else error
        bound = torch.where(torch.arange(len(values), device=values.device) < rank, bound, error)
        bases[side] = Basis(vectors[side], values, bound, clusters, rank, complete=not longer)
    return values, bases


def _by_gram(matrix: Tensor, sides: tuple[Side, ...], top: int | None) -> tuple[Tensor, dict[Side, Basis]]:
    short = matrix if near_side(matrix.shape) == "left" else matrix.T
    gram = lower_gram(short)
    p = len(gram)
    if top is None or 4 * (top + EXTRA) > p or gram.device.type != "cpu":
        squares, vectors = torch.linalg.eigh(gram)
        kept = p
    else:
        kept = top + EXTRA
        squares, vectors = top_eigenpairs(gram, kept)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    noise = 2 * max(matrix.shape) * EPS * squares[0]
    rank = int((squares > noise).sum())
    clusters, gaps = clusters_and_gaps(squares, noise, rank, whole=kept == p)
    near = Basis(vectors, squares.sqrt(), _bound(squares, noise, gaps), clusters, rank, complete=kept == p)
    return near.values, _both_sides(matrix, near, noise, sides)


def top_eigenpairs(gram: Float[Tensor, "p p"], k: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "p k"]]:
    """The k largest eigenvalues, rising, and their vectors; overwrites `gram`. CPU only. Cost ≈ (4/3)·p³ flops."""
    from scipy.linalg import eigh

    p = len(gram)
    squares, vectors = eigh(gram.numpy(), subset_by_index=[p - k, p - 1], overwrite_a=True, check_finite=False)
    return torch.from_numpy(squares), torch.from_numpy(vectors)


def _both_sides(matrix: Tensor, near: Basis, noise: Tensor, sides: tuple[Side, ...]) -> dict[Side, Basis]:
    """The shorter side's basis, and the longer side's derived from it."""
    side = near_side(matrix.shape)
    bases = {side: near} if side in sides else {}
    if set(sides) - {side}:
        short = matrix if side == "left" else matrix.T
        vectors = short.T @ near.vectors
        vectors /= torch.where(near.values > 0, near.values, torch.ones_like(near.values))
        vectors[:, near.rank :] = 0  # below the rank tolerance the quotient is noise; no direction is claimed
        bases["right" if side == "left" else "left"] = far_basis(
            near, noise, vectors, square=matrix.shape[0] == matrix.shape[1]
        )
    return bases


def far_basis(near: Basis, noise: Float[Tensor, ""], vectors: Float[Tensor, "dim p"], *, square: bool) -> Basis:
    """The longer side's basis: the same values and clusters, and the bound for vectors W v / σ_j given that of v.

    The quotient multiplies the error of v along v_i by σ_i / σ_j: at most doubled where σ_i ≤ 2σ_j, and beyond that no
    more than noise / σ_j².
    """
    floor = 2 * noise / near.values.square().clamp_min(TINY)
    error = 2 * torch.maximum(near.error, floor).clamp_max(0.5)
    return Basis(vectors, near.values, error, near.clusters, near.rank, complete=near.complete and square)


def clusters_and_gaps(
    values: Float[Tensor, " p"], noise: Float[Tensor, ""], rank: int, *, whole: bool = True
) -> tuple[Int[Tensor, " p"], Float[Tensor, " p"]]:
    """Which vectors are determined only together, and the gap from each cluster to what lies outside it.

    Vectors whose own bound 2·noise / gap exceeds `WORST` are joined with the neighbour that is too near; what lies
    below the rank tolerance is one cluster. Where the values are not the `whole` spectrum, nothing is known of what
    follows the last: the gap of its cluster is 0.
    """
    step = values[:-1] - values[1:]
    cut = step > 2 * noise / WORST
    cut[rank:] = False
    if 0 < rank < len(values):
        cut[rank - 1] = True
    clusters = torch.cat([cut.new_zeros(1, dtype=torch.long), cut.long().cumsum(0)])
    across = step[cut]  # the gap below cluster c, which is the gap above cluster c + 1
    edge = values.new_full((1,), torch.inf)
    last = edge if whole else torch.zeros_like(edge)
    return clusters, torch.minimum(torch.cat([edge, across]), torch.cat([across, last]))[clusters]


def _bound(values: Float[Tensor, " p"], noise: Float[Tensor, ""], gaps: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """sin θ ≤ 2·noise / gap; nothing is known of the vectors of a zero matrix."""
    return (2 * noise / gaps.clamp_min(TINY)).clamp_max(1) if values[0] > 0 else torch.ones_like(values)
