"""Proofs that a direction is, or is not, near a singular vector of a matrix, without decomposing the matrix.

From the directions u_j a block Krylov space of A = W0 W0ᵀ is grown. Two proofs come out of it:

- *near*: the leading base vectors that have converged give their cosines, within their error bounds.
- *far from all of them*: the Gauss quadrature of u_j's spectral measure. For nodes θ_1 < θ_2 < … with weights w, the
  Chebyshev–Markov–Stieltjes inequalities (Szegő, Orthogonal Polynomials, §3.41) bound the mass in any interval between
  θ_{k−1} and θ_{k+1} by w_{k−1} + w_k + w_{k+1}; the mass at an eigenvalue is what u_j has in its eigenspace, and so
  bounds cos² with every base vector there. Converged base vectors are taken out of u_j first, since an eigenvalue that
  stands alone keeps its weight however many steps are made.

Rounding and truncation are a perturbation E of A whose norm is computed: a base vector has all but ‖E‖/δ of itself in
the eigenspaces of A + E within δ of its eigenvalue, and δ is chosen so that this window holds one node at most.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from finetune_lens.linalg.exact import TINY, Basis
from finetune_lens.linalg.krylov import Apply, Krylov, certain
from finetune_lens.linalg.matching import Match, match

STEPS = 60  # blocks after which what is undecided is left to another route
RANDOM = 4  # vectors beside the u_j, so that no leading base vector stays hidden


@dataclass(frozen=True)
class Certificate:
    """What is proved: intervals for max_i |⟨u_j, x_i⟩|, the base's leading values, the number of steps."""

    match: Match
    values: Float[Tensor, " m"]
    steps: int


def certify(
    apply: Apply,
    start: Float[Tensor, "t p"],
    tuned: Basis,
    *,
    k: int,
    epsilon: float,
    gap: float,
    block: int,
    noise_per_scale: float,
    slack: float = 0.0,
) -> Certificate:
    """Bound max_i |⟨u_j, x_i⟩| for the first k directions until each bound is on one side of ε, or `STEPS` are made.

    Args:
        apply: W0 W0ᵀ in coordinates in which every eigenvector stands for a singular vector x_i of W0.
        start: the u_j in these coordinates.
        tuned: their errors and clusters.
        gap, block: as in `match`.
        noise_per_scale: the rounding error of `apply` as a share of its norm.
        slack: what the change of coordinates adds to the error of a cosine.

    `max_cos` of the match is the largest cosine with a converged base vector; the truth lies in [lower, upper].

    Cost: 4·out·in flops a step and vector, and O(p·(k·steps)²).
    """
    t = int((tuned.clusters <= tuned.clusters[k - 1]).sum())  # a vector is known only together with its cluster
    tuned = Basis(tuned.vectors[:0, :t], tuned.values[:t], tuned.error[:t], tuned.clusters[:t], min(tuned.rank, t))
    settleable = ((tuned.sizes == 1) & (torch.arange(t, device=start.device) < tuned.rank))[:k]
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(RANDOM, start.shape[1], dtype=start.dtype, generator=generator).to(start.device)
    space = Krylov(apply, torch.cat([start[:t], random]), limit=STEPS * (t + RANDOM))
    while True:
        space.step()
        last = space.full or space.blocks >= STEPS
        if not last and (space.blocks < 4 or space.blocks % 3):
            continue
        values, near = _bounds(space, tuned, gap=gap, block=block, noise_per_scale=noise_per_scale, slack=slack)
        near = Match(*(getattr(near, f.name)[:k] for f in fields(Match)))
        undecided = (near.lower < epsilon) & (near.upper >= epsilon) & settleable
        if last or not bool(undecided.any()):
            return Certificate(near, values, space.blocks)


def _bounds(
    space: Krylov, tuned: Basis, *, gap: float, block: int, noise_per_scale: float, slack: float
) -> tuple[Float[Tensor, " m"], Match]:
    """What the space proves as it stands, and the base values that it has found."""
    k = len(tuned.values)
    values, vectors, residuals = space.ritz()
    noise = noise_per_scale * space.scale
    inside = values.new_zeros(space.dim, k)
    inside[: len(space.start_in_basis)] = space.start_in_basis[:, :k]
    m, error, clusters = _trusted(values, residuals, noise, widest=k + RANDOM - 1)
    nothing = values.new_zeros(k)
    if m:
        known = Basis(values.new_empty(0, m), values[:m].clamp_min(TINY).sqrt(), error, clusters, m)
        cosines = vectors[:, :m].T @ inside
        near = match(known, tuned, k=k, gap=gap, block=block, cosines=cosines)
        rest = inside - vectors[:, :m] @ cosines
        edge = values[m - 1] - values[m] - residuals[m]
        turned = 2 * (torch.linalg.vector_norm(residuals[:m]) + noise) / edge
    else:
        near = Match(nothing, nothing.long(), nothing, nothing, nothing, values.new_empty(min(block, k), 0))
        rest, turned = inside, nothing[:1]
    share = torch.linalg.vector_norm(rest, dim=0)
    if space.blocks > 2:
        share = torch.minimum(share, largest_share(space, rest, noise))
    beyond = share + turned + tuned.error
    beyond = torch.where((tuned.sizes == 1) & (torch.arange(k, device=values.device) < tuned.rank), beyond, 1)
    similarity = values.new_full((len(near.similarity), block), torch.nan)
    similarity[:, : near.similarity.shape[1]] = near.similarity
    found = Match(
        near.max_cos,
        near.best,
        (near.lower - slack).clamp_min(0),
        (torch.maximum(near.upper, beyond) + slack).clamp_max(1),
        near.subspace_cos,
        similarity,
    )
    return values[:m].clamp_min(0).sqrt(), found


def _trusted(
    values: Float[Tensor, " d"], residuals: Float[Tensor, " d"], noise: float, *, widest: int
) -> tuple[int, Tensor, Tensor]:
    """How many leading Ritz pairs are accurate, their errors and clusters; none of a cluster that may be larger."""
    near = (residuals > 1e-5 * values[0]).nonzero()
    m = min(int(near[0]) if len(near) else len(values), len(values) - 1)
    while m > 0:
        found = certain(values, residuals, m, noise)
        if found is not None and int(torch.bincount(found[1]).max()) <= widest:
            return m, *found
        m -= 1
    return 0, values[:0], values[:0].long()


def largest_share(space: Krylov, starts: Float[Tensor, "dim k"], noise: float) -> Float[Tensor, " k"]:
    """A bound on |⟨z, x⟩| over all unit eigenvectors x of the operator, for each z in the space (coordinates given).

    Lanczos on T from z is Lanczos on the operator from z as long as its vectors do not leak out of the space.
    """
    operator = space.projected
    d, k = starts.shape
    steps = space.blocks - 1
    norms = torch.linalg.vector_norm(starts, dim=0)
    basis = starts.new_zeros(k, steps, d)
    diagonal, beside = starts.new_full((k, steps), -1.0) * space.scale, starts.new_zeros(k, steps)
    live = norms > 1e-12
    v = (starts / norms.clamp_min(TINY)).T.contiguous()
    leak = starts.new_zeros(k)
    for i in range(steps):
        basis[:, i] = v
        leak += torch.where(live, space.leaking(v.T).square(), 0)
        grown = v @ operator
        diagonal[:, i] = torch.where(live, (grown * v).sum(1), diagonal[:, i])
        for _ in range(2):
            inner = torch.bmm(basis[:, : i + 1], grown[:, :, None])
            grown -= torch.bmm(basis[:, : i + 1].transpose(1, 2), inner)[:, :, 0]
        size = torch.linalg.vector_norm(grown, dim=1)
        ended = size <= 1e-10 * space.scale  # an invariant subspace: the measure has no more points
        leak += torch.where(live & ended, size.square(), 0)
        live = live & ~ended
        beside[:, i] = torch.where(live, size, 0)
        v = torch.where(live[:, None], grown / size.clamp_min(TINY)[:, None], 0)
    tridiagonal = torch.diag_embed(diagonal)
    if steps > 1:
        tridiagonal += torch.diag_embed(beside[:, :-1], 1) + torch.diag_embed(beside[:, :-1], -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    weights = vectors[:, 0].square()
    padded = torch.nn.functional.pad(weights, (1, 1))
    most = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]).amax(1).clamp_max(1)
    spacing = torch.where(nodes[:, 1:] > -0.5 * space.scale, nodes.diff(dim=1), torch.inf)
    real = nodes[:, :-1] > -0.5 * space.scale
    window = torch.where(real, spacing, torch.inf).amin(1).clamp_max(space.scale) / 3
    perturbed = 2 * leak.sqrt() + noise + 1e-14 * space.scale * steps
    return norms * (most.sqrt() + perturbed / window.clamp_min(TINY))
