"""Decompositions that state their error, and comparison of two singular bases.

Everything is float64. `decompose` is the exact route: a Gram eigendecomposition on the shorter side for large
matrices, an SVD for small ones or when asked. Either way each singular vector comes with a bound on the sine of the
angle to the true one, from backward stability and the gap to its neighbours (Davis & Kahan 1970; Wedin 1972), so that a
verdict drawn from it can say whether it is certain.
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
        # W v / σ_j multiplies the error of v along v_i by σ_i / σ_j: at most doubled where σ_i ≤ 2σ_j, and beyond that
        # no more than noise / σ_j².
        bound = 2 * torch.maximum(error, 2 * noise / squares.clamp_min(TINY)).clamp_max(0.5)
        bases[far] = Basis(derived, values, bound, clusters, rank)
    return values, bases


def _errors(
    values: Float[Tensor, " p"], noise: Float[Tensor, ""], rank: int
) -> tuple[Float[Tensor, " p"], Int[Tensor, " p"]]:
    """Bounds sin θ ≤ 2·noise / gap for each vector, or for the span of its cluster.

    Vectors whose own bound exceeds `WORST` are joined with the neighbour that is too near; what lies below the rank
    tolerance is one cluster. The bound of a cluster uses the gap to what lies outside it.
    """
    step = values[:-1] - values[1:]
    cut = step > 2 * noise / WORST
    cut[rank:] = False
    if 0 < rank < len(values):
        cut[rank - 1] = True
    clusters = torch.cat([cut.new_zeros(1, dtype=torch.long), cut.long().cumsum(0)])
    across = step[cut]  # the gap below cluster c, which is the gap above cluster c + 1
    edge = values.new_full((1,), torch.inf)
    gap = torch.minimum(torch.cat([edge, across]), torch.cat([across, edge]))[clusters]
    return (2 * noise / gap.clamp_min(TINY)).clamp_max(1) if values[0] > 0 else torch.ones_like(values), clusters


@dataclass(frozen=True)
class Match:
    """How the leading vectors of one basis lie in another: for each, max_i |⟨u_j, x_i⟩| and what is known of it."""

    max_cos: Float[Tensor, " k"]
    best: Int[Tensor, " k"]  # the i of the maximum
    lower: Float[Tensor, " k"]  # the true maximum lies in [lower, upper] …
    upper: Float[Tensor, " k"]  # … whatever basis of an undetermined span is taken
    subspace_cos: Float[Tensor, " k"]  # max_i ‖P_i u_j‖, P_i the span of the x with about the same σ as x_i
    similarity: Float[Tensor, "s t"]  # |⟨u_j, x_i⟩| of the leading vectors


def match(base: Basis, tuned: Basis, *, k: int, gap: float, block: int) -> Match:
    """Compare the top-k vectors u_j of `tuned` with *all* vectors x_i of `base`.

    Args:
        base, tuned: bases of the same side of two matrices.
        k: how many leading vectors of `tuned`.
        gap: relative width of the window |σ_i − σ_l| ≤ gap·σ_i that makes the subspace of x_i.
        block: side of the leading block of |⟨u_j, x_i⟩| to return.

    The interval: an ordinary pair contributes |⟨u_j, x_i⟩| ± (error of u_j + error of x_i). Of vectors that are
    determined only together, ‖P u_j‖ bounds each from above and ‖P u_j‖/√size the largest from below; where u_j itself
    is undetermined, the bound holds for every unit vector of its span. Below the rank tolerance of `tuned` nothing is
    known.

    Cost: 2·dim·p·k flops.
    """
    p = base.vectors.shape[1]
    # u_j is known only together with its cluster, which may reach beyond k.
    reach = int((tuned.clusters <= tuned.clusters[k - 1]).sum())
    cos = (base.vectors.T @ tuned.vectors[:, :reach]).abs().clamp_max(1)  # p × reach
    max_cos, best = cos[:, :k].max(0)
    square = cos.square()
    alone = (tuned.sizes == 1)[:reach]
    # Largest and mean cos² over the unit vectors of u_j's span; for an ordinary u_j both are cos².
    members = _one_hot(tuned.clusters[:reach])
    total = (square @ members)[:, tuned.clusters[:reach]][:, :k]
    mean = total / tuned.sizes[:k]
    most = torch.where(alone[:k], square[:, :k], total)

    # Mass on each base cluster; what lies below the base's rank tolerance is whatever the others leave over.
    groups = _one_hot(base.clusters)
    mass = groups.T @ most
    known = torch.ones(len(mass), 1, dtype=torch.bool, device=mass.device)
    rest = (1 - mean[: base.rank].sum(0)).clamp(0, 1)
    if base.rank < p:
        mass[-1] = torch.where(alone[:k], rest, 1.0)
        known[-1] = base.complete  # else the basis holds arbitrary vectors of a larger null space
    first = torch.searchsorted(base.clusters.contiguous(), torch.arange(len(mass), device=mass.device))
    error, size = base.error[first][:, None], base.sizes[first][:, None]
    slack = error + tuned.error[:k]
    norm = mass.sqrt().clamp_max(1)
    upper = (norm + slack).amax(0).clamp_max(1)
    floor = (norm - slack).clamp_min(0) / size.to(norm.dtype).sqrt()
    lower = torch.where(alone[:k], torch.where(known, floor, 0).amax(0), 0)
    beyond = torch.arange(k, device=cos.device) >= tuned.rank
    lower, upper = torch.where(beyond, 0, lower), torch.where(beyond, 1, upper)

    window = _windows(base, gap)
    sums = torch.cat([mean.new_zeros(1, k), mean.cumsum(0)])
    inside = sums[window[1]] - sums[window[0]]
    inside[base.rank :] = rest
    return Match(
        max_cos=max_cos,
        best=best,
        lower=torch.minimum(lower, max_cos),
        upper=torch.maximum(upper, max_cos),
        subspace_cos=inside.amax(0).clamp(0, 1).sqrt(),
        similarity=cos[:block, : min(block, k)].T,
    )


def _one_hot(clusters: Int[Tensor, " p"]) -> Float[Tensor, "p c"]:
    return torch.nn.functional.one_hot(clusters, int(clusters.max()) + 1).to(torch.float64)


def _windows(base: Basis, gap: float) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """[start, stop) of the vectors whose σ lies within gap·σ_i of σ_i; σ descends."""
    rising = base.values.flip(0).contiguous()
    p = len(rising)
    width = gap * base.values + 1e-12 * base.values[:1]
    stop = p - torch.searchsorted(rising, base.values - width)
    start = p - torch.searchsorted(rising, base.values + width, right=True)
    return start, stop


def relative_gaps(values: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """Distance of each singular value to its nearest neighbour, as a share of itself (inf for a lone one)."""
    step = values[:-1] - values[1:]
    edge = values.new_full((1,), torch.inf)
    nearest = torch.minimum(torch.cat([edge, step]), torch.cat([step, edge]))
    return nearest / values.clamp_min(TINY)


def singular_values(matrix: Float[Tensor, "out in"]) -> Float[Tensor, " p"]:
    """All singular values, float64, largest first. Cost ≈ 2·p²q + (4/3)·p³ flops.

    By the Gram route (shorter side from 256 on), values that the squares cannot resolve, about 1e-7 of the largest, are 0.
    """
    matrix = matrix.to(torch.float64)
    if min(matrix.shape) < GRAM_FROM:
        return torch.linalg.svdvals(matrix)
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares = torch.linalg.eigvalsh(short @ short.T).flip(0)
    squares[squares <= 2 * max(matrix.shape) * EPS * squares[0]] = 0
    return squares.sqrt()


def low_rank_values(left: Float[Tensor, "out r"], right: Float[Tensor, "r in"]) -> Float[Tensor, " p"]:
    """Singular values of left @ right without forming it: QR of both factors, SVD of an r × r core. O((out+in)·r²)."""
    _, a = torch.linalg.qr(left.to(torch.float64))
    _, b = torch.linalg.qr(right.to(torch.float64).T)
    return torch.linalg.svdvals(a @ b.T)


def effective_rank(values: Float[Tensor, " p"]) -> float:
    """exp of the entropy of σ/Σσ (Roy & Vetterli 2007); 0 for a zero matrix."""
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


def haar(rows: int, columns: int, *, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """`columns` orthonormal vectors in R^rows, uniform (QR of a Gaussian with the signs fixed; Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator))
    return q * torch.sign(torch.diagonal(r))


def null_max_cos(
    base_values: Float[Tensor, " p"],
    update_values: Float[Tensor, " r"],
    shape: tuple[int, int],
    *,
    k: int,
    sides: tuple[Side, ...],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> dict[Side, Float[Tensor, " k"]]:
    """max_i |⟨u_j, x_i⟩| of the top-k vectors of W0 + P diag(update_values) Qᵀ with uniformly random P and Q.

    In the singular basis of W0 the sum is diag(σ0) + P' diag(s) Q'ᵀ with P', Q' again uniform: no singular vector of W0
    is needed, and the coordinates of the sum's vectors are the cosines.

    Cost ≈ 2·p²q + (4/3)·p³ flops beside two QRs of (out, r) and (in, r).
    """
    rows, columns = shape
    r = len(update_values)
    left = haar(rows, r, generator=generator).to(device)
    right = haar(columns, r, generator=generator).to(device)
    total = (left * update_values) @ right.T
    p = len(base_values)
    total.diagonal()[:p] += base_values
    total /= total.abs().max().clamp_min(TINY)
    wide = rows <= columns
    short = total if wide else total.T
    near = _top_eigenvectors(short @ short.T, k)
    far = short.T @ near
    far /= torch.linalg.vector_norm(far, dim=0).clamp_min(TINY)
    vectors = {"left": near if wide else far, "right": far if wide else near}
    return {side: vectors[side][:p].abs().amax(0) for side in sides}


def _top_eigenvectors(gram: Float[Tensor, "p p"], k: int) -> Float[Tensor, "p k"]:
    """Eigenvectors of the k largest eigenvalues, largest first."""
    if gram.device.type != "cpu":
        return torch.linalg.eigh(gram)[1].flip(1)[:, :k]
    from scipy.linalg import eigh

    p = len(gram)
    _, vectors = eigh(gram.numpy(), subset_by_index=[p - k, p - 1], overwrite_a=True, check_finite=False)
    return torch.from_numpy(vectors[:, ::-1].copy())
