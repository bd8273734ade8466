"""Where the leading singular vectors of one matrix lie among those of another."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finetune_lens.linalg.exact import Basis

COLUMNS = 128  # vectors placed at a time, so that memory does not grow with k


@dataclass(frozen=True)
class Match:
    """How the leading vectors of one basis lie in another: for each, max_i |⟨u_j, x_i⟩| and what is known of it."""

    max_cos: Float[Tensor, " k"]
    best: Int[Tensor, " k"]  # the i of the maximum
    lower: Float[Tensor, " k"]  # the true maximum lies in [lower, upper] …
    upper: Float[Tensor, " k"]  # … whatever basis of an undetermined span is taken
    subspace_cos: Float[Tensor, " k"]  # max_i ‖P_i u_j‖, P_i the span of the x with about the same σ as x_i
    similarity: Float[Tensor, "s t"]  # |⟨u_j, x_i⟩| of the leading vectors


def match(
    base: Basis,
    tuned: Basis,
    *,
    k: int,
    gap: float,
    block: int,
    cosines: Float[Tensor, "p t"] | None = None,
) -> Match:
    """Compare the top-k vectors u_j of `tuned` with *all* vectors x_i of `base`.

    Args:
        base, tuned: bases of the same side of two matrices.
        k: how many leading vectors of `tuned`.
        gap: relative width of the window |σ_i − σ_l| ≤ gap·σ_i that makes the subspace of x_i.
        block: side of the leading block of |⟨u_j, x_i⟩| to return.
        cosines: ⟨x_i, u_j⟩ where they are known already; then the vectors themselves are not looked at.

    The interval: an ordinary pair contributes |⟨u_j, x_i⟩| ± (error of u_j + error of x_i). Of vectors that are
    determined only together, ‖P u_j‖ bounds each from above and ‖P u_j‖/√size the largest from below; where u_j itself
    is undetermined, the bound holds for every unit vector of its span. Below the rank tolerance of `tuned` nothing is
    known.

    Cost: 2·dim·p·k flops. Memory: some p × 128 numbers.
    """
    pieces, start = [], 0
    while start < k:
        last = tuned.clusters[min(start + COLUMNS, k) - 1]
        stop = int((tuned.clusters <= last).sum())  # u_j is known only together with its cluster
        cos = base.vectors.T @ tuned.vectors[:, start:stop] if cosines is None else cosines[:, start:stop]
        pieces.append(_piece(base, tuned, cos.abs().clamp_max(1), start=start, gap=gap))
        start = stop
    if cosines is None:
        similarity = base.vectors[:, :block].T @ tuned.vectors[:, : min(block, k)]
    else:
        similarity = cosines[:block, : min(block, k)]
    joined = (torch.cat(parts)[:k] for parts in zip(*pieces, strict=True))
    return Match(*joined, similarity=similarity.abs().clamp_max(1).T)


def _piece(
    base: Basis, tuned: Basis, cos: Float[Tensor, "p n"], *, start: int, gap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """max_cos, best, lower, upper, subspace_cos of the n vectors of `tuned` from `start` on, whole clusters of them."""
    p, n = cos.shape
    clusters = tuned.clusters[start : start + n] - tuned.clusters[start]
    sizes, error = tuned.sizes[start : start + n], tuned.error[start : start + n]
    max_cos, best = cos.max(0)
    square = cos.square()
    alone = sizes == 1
    # Largest and mean cos² over the unit vectors of u_j's span; for an ordinary u_j both are cos².
    total = square.new_zeros(p, int(clusters[-1]) + 1).index_add_(1, clusters, square)[:, clusters]
    mean = total / sizes
    most = torch.where(alone, square, total)

    # Mass on each base cluster; what lies below the base's rank tolerance is whatever the others leave over.
    mass = most.new_zeros(int(base.clusters[-1]) + 1, n).index_add_(0, base.clusters, most)
    known = torch.ones(len(mass), 1, dtype=torch.bool, device=mass.device)
    rest = (1 - mean[: base.rank].sum(0)).clamp(0, 1)
    if base.rank < p:
        mass[-1] = torch.where(alone, rest, 1.0)
        known[-1] = base.complete  # else the basis holds arbitrary vectors of a larger null space
    first = torch.searchsorted(base.clusters.contiguous(), torch.arange(len(mass), device=mass.device))
    size = base.sizes[first][:, None]
    slack = base.error[first][:, None] + error
    norm = mass.sqrt().clamp_max(1)
    upper = (norm + slack).amax(0).clamp_max(1)
    floor = (norm - slack).clamp_min(0) / size.to(norm.dtype).sqrt()
    lower = torch.where(alone, torch.where(known, floor, 0).amax(0), 0)
    beyond = torch.arange(start, start + n, device=cos.device) >= tuned.rank
    lower, upper = torch.where(beyond, 0, lower), torch.where(beyond, 1, upper)

    window = _windows(base, gap)
    sums = torch.cat([mean.new_zeros(1, n), mean.cumsum(0)])
    inside = sums[window[1]] - sums[window[0]]
    inside[base.rank :] = rest
    subspace_cos = inside.amax(0).clamp(0, 1).sqrt()
    return max_cos, best, torch.minimum(lower, max_cos), torch.maximum(upper, max_cos), subspace_cos


def _windows(base: Basis, gap: float) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """[start, stop) of the vectors whose σ lies within gap·σ_i of σ_i; σ descends."""
    rising = base.values.flip(0).contiguous()
    p = len(rising)
    width = gap * base.values + 1e-12 * base.values[:1]
    stop = p - torch.searchsorted(rising, base.values - width)
    start = p - torch.searchsorted(rising, base.values + width, right=True)
    return start, stop
