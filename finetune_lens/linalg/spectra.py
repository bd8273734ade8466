"""Singular values, what is summed up in them, and what random singular vectors would give."""

import torch
from jaxtyping import Float
from torch import Tensor

from finetune_lens.linalg.exact import EPS, GRAM_FROM, TINY, Side, lower_gram, scaled, top_eigenpairs, tridiagonal


def relative_gaps(values: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """Distance of each singular value to its nearest neighbour, as a share of itself (inf for a lone one)."""
    step = values[:-1] - values[1:]
    edge = values.new_full((1,), torch.inf)
    nearest = torch.minimum(torch.cat([edge, step]), torch.cat([step, edge]))
    return nearest / values.clamp_min(TINY)


def singular_values(matrix: Float[Tensor, "out in"]) -> Float[Tensor, " p"]:
    """All singular values, float64, largest first. Cost ≈ 2·p²q + (4/3)·p³ flops.

    By the Gram route (shorter side from 256 on), values that the squares cannot resolve (about 1e-7 of the largest) are
    0.
    """
    matrix, scale = scaled(matrix.to(torch.float64))
    if min(matrix.shape) < GRAM_FROM:
        return torch.linalg.svdvals(matrix) * scale
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = lower_gram(short)
    if gram.device.type == "cpu":  # twice as fast as torch's
        from scipy.linalg import eigvalsh_tridiagonal

        _, diagonal, beside, _ = tridiagonal(gram.numpy())
        squares = torch.from_numpy(eigvalsh_tridiagonal(diagonal, beside, lapack_driver="sterf")[::-1].copy())
    else:
        squares = torch.linalg.eigvalsh(gram).flip(0)
    squares[squares <= 2 * max(matrix.shape) * EPS * squares[0]] = 0
    return squares.sqrt() * scale


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


def energy(values: Float[Tensor, "*shape"]) -> float:
    """√Σx², the Frobenius norm of a matrix or of its singular values, without overflow on the way."""
    if values.numel() == 0 or not values.any():
        return 0.0
    largest = float(torch.maximum(values.amax(), -values.amin()))
    if 1e-100 < largest < 1e100:
        return float(torch.linalg.vector_norm(values))
    return largest * float(torch.linalg.vector_norm(values / largest))


def haar(rows: int, columns: int, *, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """`columns` orthonormal vectors in R^rows, uniform (QR of a Gaussian with the signs fixed; Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator))
    return q.mul_(torch.sign(torch.diagonal(r)))


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
    total = left.mul_(update_values) @ right.T
    del left, right
    p = len(base_values)
    total.diagonal()[:p] += base_values
    total /= total.abs().max().clamp_min(TINY)
    wide = rows <= columns
    short = total if wide else total.T
    near = _top_eigenvectors(lower_gram(short), k)
    far = short.T @ near
    far /= torch.linalg.vector_norm(far, dim=0).clamp_min(TINY)
    vectors = {"left": near if wide else far, "right": far if wide else near}
    return {side: vectors[side][:p].abs().amax(0) for side in sides}


def _top_eigenvectors(gram: Float[Tensor, "p p"], k: int) -> Float[Tensor, "p k"]:
    """Eigenvectors of the k largest eigenvalues, largest first."""
    if gram.device.type != "cpu":
        return torch.linalg.eigh(gram)[1].flip(1)[:, :k]
    return top_eigenpairs(gram, k)[1].flip(1)
