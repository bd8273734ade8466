"""A low-rank update in the singular coordinates of its base: the coordinates *are* the cosines.

With W0 = U D Vᵀ, W1 = W0 + B A and out ≤ in (else everything is transposed), the Gram matrix of W1 in the basis U is

    H = Uᵀ W1 W1ᵀ U = D² + Z Xᵀ + X Zᵀ + X G Xᵀ,     X = Uᵀ B,  Z = Uᵀ W0 Aᵀ,  G = A Aᵀ,

a diagonal and a matrix of rank 2r. Its eigenvectors hold ⟨x_i, u_j⟩ for all i; neither V nor a division by small σ is
needed. Once U is known, any number of updates of the same base costs O(p²·r) each.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from finetune_lens.linalg.exact import EPS, EXTRA, TINY, Basis, Side, clusters_and_gaps, far_basis, near_side
from finetune_lens.linalg.krylov import OVERSAMPLED, Apply, leading

DENSE_BELOW = 400  # orders up to which forming H and decomposing it is faster than iterating


def update_in_base(
    near: Basis,
    base: Float[Tensor, "out in"],
    left: Float[Tensor, "out r"],
    right: Float[Tensor, "r in"],
    *,
    k: int,
    sides: tuple[Side, ...],
) -> tuple[Float[Tensor, " t"], dict[Side, tuple[Basis, Float[Tensor, "p t"]]]]:
    """The leading singular vectors of base + left @ right, as cosines with the base's.

    Args:
        near: the base's singular vectors on its shorter side, all of them (`decompose`).
        base: the base's weight; only its product with `right` is taken.
        k: how many leading vectors.

    Returns:
        The leading singular values of the sum, and by side its basis (without vectors) with ⟨x_i, u_j⟩.

    Cost: 2·p·q·r + 4·p²·r flops, then O(p·r) an iteration.
    """
    side = near_side(base.shape)
    if side == "right":
        base, left, right = base.T, right.T, left.T
    p = near.vectors.shape[1]
    d = near.values
    across = torch.cat([right @ rows.to(torch.float64).T for rows in base.split(256)], 1)  # no float64 copy of the base
    both = torch.cat([left.T, across]) @ near.vectors
    x, z = both[: left.shape[1]].T, both[left.shape[1] :].T
    gram = right @ right.T
    size = float(d[0]) + float(torch.linalg.matrix_norm(left, 2) * torch.linalg.matrix_norm(right, 2))
    noise = torch.tensor(4 * max(base.shape) * EPS * size**2, dtype=torch.float64, device=d.device)

    def apply(q: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
        qx = q @ x
        return q * d.square() + qx @ z.T + (q @ z + qx @ gram) @ x.T

    basis = None
    if p > DENSE_BELOW and 4 * k < p:
        # a narrow block: products with H are cheap, and what a start could miss is counted below
        start = torch.randn(OVERSAMPLED, p, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        basis = leading(apply, start.to(d.device), k, 0.0, noise_at_least=float(noise))
        if basis is not None and not _complete(d.square(), x, z, gram, basis.values.square(), noise):
            basis = None
    if basis is None:
        basis = _dense(apply, p, min(p, k + EXTRA), noise, d.device)
    vectors = basis.vectors
    basis = replace(basis, vectors=vectors[:0])
    placed: dict[Side, tuple[Basis, Tensor]] = {}
    if side in sides:
        placed[side] = basis, vectors
    if set(sides) - {side}:
        far = d[:, None] * vectors + (z @ (x.T @ vectors)) / d.clamp_min(TINY)[:, None]
        far[near.rank :] = 0
        far /= basis.values.clamp_min(TINY)
        square = base.shape[0] == base.shape[1]
        placed["right" if side == "left" else "left"] = far_basis(basis, noise, basis.vectors, square=square), far
    return basis.values, placed


def _dense(apply: Apply, p: int, wanted: int, noise: Tensor, device: torch.device) -> Basis:
    """The `wanted` leading eigenpairs from all of them."""
    squares, vectors = torch.linalg.eigh(apply(torch.eye(p, dtype=torch.float64, device=device)))
    squares, vectors = squares.flip(0)[:wanted], vectors.flip(1)[:, :wanted]
    residual = torch.linalg.vector_norm(apply(vectors.T) - (vectors * squares).T, dim=1)
    squares = squares.clamp_min(0)
    rank = int((squares > noise).sum())
    clusters, gaps = clusters_and_gaps(squares, residual.max() + noise, rank, whole=wanted == p)
    error = (2 * (residual + noise) / gaps.clamp_min(TINY)).clamp_max(1)
    return Basis(vectors, squares.sqrt(), error, clusters, rank)


def _complete(
    diagonal: Float[Tensor, " p"],
    x: Float[Tensor, "p r"],
    z: Float[Tensor, "p r"],
    gram: Float[Tensor, "r r"],
    found: Float[Tensor, " t"],
    noise: Tensor,
) -> bool:
    """Whether `found` holds every eigenvalue of H above the smallest of it: none was missed.

    By Sylvester's law, with P = [X Z] and C = [[G, 1], [1, 0]] (H = D² + P C Pᵀ), the number of eigenvalues above μ is
    that of D² − μ plus the change of the signs of −C⁻¹ − Pᵀ (D² − μ)⁻¹ P against those of −C⁻¹, which has r positive.
    """
    r = x.shape[1]
    mu = found[-1] - 10 * noise
    shifted = diagonal - mu
    if shifted.abs().min() < noise:
        return False
    p = torch.cat([x, z], 1)
    eye, zero = torch.eye(r, dtype=p.dtype, device=p.device), p.new_zeros(r, r)
    inverse = torch.cat([torch.cat([zero, eye], 1), torch.cat([eye, -gram], 1)])
    signs = torch.linalg.eigvalsh(-inverse - p.T @ (p / shifted[:, None]))
    above = int((shifted > 0).sum()) + int((signs > 0).sum()) - r
    return above == len(found)
