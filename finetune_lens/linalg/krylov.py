"""Block Lanczos: the leading eigenpairs of a large symmetric operator, and how vectors lie among all of them.

Full reorthogonalisation, twice, so that A Q = Q T + Q₊ R Eᵀ holds to rounding (E picks the last block): the residual of
every Ritz pair is read off R, and T has the moments of A from every starting vector up to twice the number of blocks.

Vectors are rows throughout: with a row-major weight, X @ W and X @ Wᵀ are several times faster than W @ x for few x.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finetune_lens.linalg.exact import EPS, EXTRA, TINY, Basis, clusters_and_gaps

Apply = Callable[[Float[Tensor, "b p"]], Float[Tensor, "b p"]]

ACCURATE = 1e-6  # bound on the error of a vector that iterating aims at
OVERSAMPLED = 6  # random vectors beside the wanted ones: a vector at right angles to all of them has probability 0
LARGEST = 1280  # dimension of the space at which iterating gives up


class Krylov:
    """The space of start, A·start, A²·start, …, grown a block at a time.

    `start_in_basis` holds the starting vectors in the coordinates of the first block; they need not be orthonormal.
    """

    def __init__(self, apply: Apply, start: Float[Tensor, "b p"], limit: int = LARGEST):
        self._apply = apply
        p = start.shape[1]
        self.limit = min(limit, p)
        self._rows = start.new_empty(self.limit, p)
        self._projected = start.new_zeros(self.limit, self.limit)
        self.dim = 0  # of the space that A has been applied to
        self.blocks = 0
        block, self.start_in_basis = torch.linalg.qr(start.T)
        self._next = block.T.contiguous()
        self._coupling, self._last = self._next.new_empty(0, 0), 0
        self.exhausted = False  # the space is invariant: everything reachable from the start is in it
        self.scale = 0.0

    @property
    def basis(self) -> Float[Tensor, "dim p"]:
        """The orthonormal basis, a row a vector."""
        return self._rows[: self.dim]

    @property
    def projected(self) -> Float[Tensor, "dim dim"]:
        """T = Q A Qᵀ."""
        return self._projected[: self.dim, : self.dim]

    @property
    def full(self) -> bool:
        """Whether no further block fits."""
        return self.exhausted or self.dim + len(self._next) > self.limit

    def step(self) -> None:
        """Grow by one block. Cost: one application of A to it, and 8·p·dim flops a column."""
        block, old = self._next, self.dim
        new = old + len(block)
        self._rows[old:new] = block
        grown = self._apply(block)
        inside = self._rows[:new]
        first = grown @ inside.T
        grown = grown - first @ inside
        second = grown @ inside.T
        grown -= second @ inside
        found = first + second
        self._projected[old:new, :new] = found
        self._projected[:new, old:new] = found.T
        own = found[:, old:]
        self._projected[old:new, old:new] = (own + own.T) / 2
        self.scale = max(self.scale, float(torch.linalg.vector_norm(found, dim=1).max()))
        self.dim, self.blocks, self._last = new, self.blocks + 1, old
        turned, self._coupling = torch.linalg.qr(grown.T)
        kept = len(grown)
        if bool((self._coupling.diagonal().abs() < 1e-6 * self.scale).any()):  # some direction is nearly used up
            u, s, vh = torch.linalg.svd(grown, full_matrices=False)
            kept = int((s > 100 * EPS * self.scale * grown.shape[1] ** 0.5).sum())
            rest = vh[:kept] - (vh[:kept] @ inside.T) @ inside  # a small remainder has large errors in its direction
            turned, r = torch.linalg.qr(rest.T)
            self._coupling = r @ (u[:, :kept] * s[:kept]).T
        self._next = turned.T.contiguous()
        self.exhausted = kept == 0

    def leaking(self, vectors: Float[Tensor, "dim n"]) -> Float[Tensor, " n"]:
        """‖(A Q − Q T) y‖ for vectors y in the coordinates of the basis; of a Ritz vector, its residual."""
        if self.exhausted:
            return vectors.new_zeros(vectors.shape[1])
        return torch.linalg.vector_norm(self._coupling @ vectors[self._last :], dim=0)

    def ritz(self) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"], Float[Tensor, " dim"]]:
        """Ritz values, falling, their vectors in the coordinates of the basis, and the residuals."""
        values, vectors = torch.linalg.eigh(self.projected)
        values, vectors = values.flip(0), vectors.flip(1)
        return values, vectors, self.leaking(vectors)


def certain(
    values: Float[Tensor, " d"], residuals: Float[Tensor, " d"], wanted: int, noise: float
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"]] | None:
    """Error bounds and clusters of the `wanted` leading Ritz pairs; None while they are not accurate.

    The gap below the last is to the upper end of what the next Ritz pair allows, so that pair must have come near, too.
    """
    if not 0 < wanted < len(values) or values[wanted] + residuals[wanted] >= values[wanted - 1]:
        return None
    known = torch.cat([values[:wanted], values[wanted, None] + residuals[wanted]])
    clusters, gaps = clusters_and_gaps(known, residuals[:wanted].max() + noise, len(known))
    error = (2 * (residuals[:wanted] + noise) / gaps[:wanted].clamp_min(TINY)).clamp_max(1)
    floor = noise  # further steps would not lower the bound by much
    rough = (error > ACCURATE) & (residuals[:wanted] > floor)
    if clusters[wanted - 1] == clusters[wanted] or bool(rough.any()):
        return None
    return error, clusters[:wanted]


def leading(
    apply: Apply, start: Float[Tensor, "b p"], k: int, noise_per_scale: float, *, noise_at_least: float = 0.0
) -> Basis | None:
    """The k leading eigenpairs of a positive semidefinite operator as a basis (`values` are square roots).

    Args:
        apply: the operator, a square of singular values.
        start: random vectors, or good guesses with some random ones among them.
        k: how many; a few more are returned, as neighbours of the last.
        noise_per_scale: the rounding error of `apply` as a share of the largest eigenvalue.
        noise_at_least: and as a number, where it comes from terms that cancel.

    Returns None when the space became too large first (near-equal values at the edge): another route must be taken.
    A vector is missed only if `start` is at right angles to it.
    """
    space = Krylov(apply, start)
    while not space.full:
        space.step()
        if not space.full and (space.dim < k + EXTRA or space.blocks % 4):
            continue
        values, vectors, residuals = space.ritz()
        noise = max(noise_per_scale * float(values[0]), noise_at_least)
        if residuals[k - 1] > 1e-3 * values[0]:
            continue
        # The edge lies where the spectrum has a gap, and beyond the k-th, whose neighbours are to be known.
        for wanted in [*range(k + 1, min(k + EXTRA, len(values))), *([k] if space.full else [])]:
            found = certain(values, residuals, wanted, noise)
            if found is None:
                continue
            error, clusters = found
            if int(torch.bincount(clusters).max()) >= len(start):
                return None  # a space grown from so many vectors cannot tell how many equal values there are
            squares = values[:wanted].clamp_min(0)
            rank = int((squares > noise).sum())
            return Basis((vectors[:, :wanted].T @ space.basis).T, squares.sqrt(), error, clusters, rank)
    return None
