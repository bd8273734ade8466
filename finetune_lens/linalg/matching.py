"""Where the leading singular vectors of one matrix lie among those of another."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finetune_lens.linalg.exact import Basis


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

    Cost: 2·dim·p·k flops.
    """
    p = base.vectors.shape[1]
    # u_j is known only together with its cluster, which may reach beyond k.
    reach = int((tuned.clusters <= tuned.clusters[k - 1]).sum())
    cos = base.vectors.T @ tuned.vectors[:, :reach] if cosines is None else cosines[:, :reach]
    cos = cos.abs().clamp_max(1)  # p × reach
    max_cos, best = cos[:, :k].max(0)
    square = cos.square()
    alone = (tuned.sizes == 1)[:reach]
    # Largest and mean cos² over the unit vectors of u_j's span; for an ordinary u_j both are cos².
    total = square.new_zeros(p, int(tuned.clusters[reach - 1]) + 1)
    total = total.index_add_(1, tuned.clusters[:reach], square)[:, tuned.clusters[:k]]
    mean = total / tuned.sizes[:k]
    most = torch.where(alone[:k], square[:, :k], total)

    # Mass on each base cluster; what lies below the base's rank tolerance is whatever the others leave over.
    mass = most.new_zeros(int(base.clusters[-1]) + 1, k).index_add_(0, base.clusters, most)
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


def _windows(base: Basis, gap: float) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """[start, stop) of the vectors whose σ lies within gap·σ_i of σ_i; σ descends."""
    rising = base.values.flip(0).contiguous()
    p = len(rising)
    width = gap * base.values + 1e-12 * base.values[:1]
    stop = p - torch.searchsorted(rising, base.values - width)
    start = p - torch.searchsorted(rising, base.values + width, right=True)
    return start, stop
