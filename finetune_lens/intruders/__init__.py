"""Which leading singular directions of the tuned weights did the base not have?

The j-th left singular vector u_j of W1 (out, in) is an *intruder* when max_i |⟨u_j, x_i⟩| < ε over **all** left
singular vectors x_i of W0; counted over j ≤ k in descending σ, summed over the matrices (Shuttleworth et al. 2024,
"LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228, §3; k = 10, ε = 0.5). The right side is the
same on Wᵀ. A count comes with two nulls: random updates of Δ's norm and rank with the energy spread evenly, and random
updates with Δ's own singular values; verdicts cite the second.

Three routes give the same answers (`finetune_lens.linalg.routes`). Cost a matrix, p = min(out, in), q = max(out, in):

- exact: a tridiagonalisation a side (2·p²q + (4/3)·p³ flops); two eigendecompositions (≈ 11·p³) where all vectors are
  looked at;
- cached: one eigendecomposition for a base and all that is compared with it, O(p²·r) for each LoRA update of rank r;
- certified: some hundred products with either weight, O(100·p·q), and no decomposition;

and a null draw (4/3)·p³. Memory: some float64 copies of the largest matrix, whatever the model's size
(benchmarks/memory.py counts them).

What the intruders do for the model is another question, and `finetune_lens.intruders.scale` asks it.

>>> import torch
>>> from finetune_lens import ModelPair, find_intruders
>>> base = {"layers.0.mlp.up_proj.weight": torch.diag(torch.arange(40.0, 0, -1))}
>>> u = torch.ones(40) / 40**0.5                             # at 1/√40 to every singular vector of the base
>>> tuned = {"layers.0.mlp.up_proj.weight": base["layers.0.mlp.up_proj.weight"] + 500 * torch.outer(u, u)}
>>> find_intruders(ModelPair.load(base, tuned), progress=False).count(k=1)
1
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.intruders.scale import scale_intruders
from finetune_lens.results.provenance import recorded
from finetune_lens.stream import padded

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from finetune_lens import linalg
    from finetune_lens.pair import Matrix, ModelPair, ModelSeries, Variants
    from finetune_lens.results.intruders import Intruders
    from finetune_lens.results.trajectory import Trajectory
    from finetune_lens.stream import Row, Rows

__all__ = ["find_intruders", "main", "scale_intruders"]

NULLS = ("evenly", "spectrum")
WHOLE_UP_TO = 1024  # order of the matrices of which all vectors are looked at by default
FIRST = 64  # and how many in larger ones
NO_ENERGY = 1e-4  # share of ‖Δ‖² that the null with Δ's own singular values may leave out


@recorded
def find_intruders(
    pair: "ModelPair | ModelSeries",
    *,
    epsilon: float = 0.5,
    k: int = 10,
    side: Literal["left", "right", "both"] = "left",
    ranks: int | None = None,
    method: Literal["auto", "exact", "cached", "certified"] = "auto",
    null_draws: int = 5,
    null_ranks: int = 50,
    gap: float = 0.01,
    similarity_ranks: int = 50,
    embeddings: bool = False,
    cache: Path | None = None,
    cache_gb: float = 20.0,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    partial: Path | None = None,
) -> "Intruders | Trajectory":
    """Count intruder dimensions, with nulls and error bounds, for every ε and k at once.

    Args:
        pair: base and tuned, aligned; or several checkpoints of one base. Then each intruder is followed from one to
            the next, and the result is a `Trajectory`; the base is decomposed once a matrix.
        epsilon, k: the threshold and the number of leading vectors that the summary judges by. The result answers for
            every other ε and k too.
        side: left (output space), right (input space), or both.
        ranks: leading vectors of the tuned weights that are looked at (at least k). None: all of them in matrices up to
            order 1024, the first 64 (or k) in larger ones, the first k where they are certified.
        method: "exact" decomposes both sides; "cached" decomposes the base once for all that is compared with it and
            reads a factored update (LoRA) off in its coordinates; "certified" decomposes neither and proves each
            verdict, for up to 64 vectors; "auto" takes "cached" where bases are kept, "certified" for matrices from
            order 1024 on when no null is drawn, which needs all of the base's σ. The verdicts are the same.
        null_draws: random updates per null and matrix; 0 for none.
        null_ranks: leading vectors that the nulls cover (at least k).
        gap: relative σ window within which base vectors count as near-degenerate.
        similarity_ranks: side of the block of |U0ᵀU1| that is kept for the figure.
        embeddings: include embeddings and unembedding (left out by default, as published).
        cache: folder in which the bases of large base weights are kept, by content, so that every other checkpoint of
            the same base is compared without decomposing it again.
        cache_gb: size that the folder may reach.
        limit: only the first so many matrices.
        seed: of the nulls.
        device: where the decompositions run; "auto" takes a GPU when there is one.
        partial: folder in which finished matrices wait, so that an interrupted run continues.

    Raises:
        InputError: an option out of range, or no matrix to compare.
    """
    from finetune_lens import device as devices
    from finetune_lens import linalg
    from finetune_lens.pair import ModelSeries
    from finetune_lens.stream import each_matrix

    if not 0 < epsilon <= 1:
        raise InputError(f"epsilon is a cosine in (0, 1]; found {epsilon}")
    least = {"k": (k, 1), "null_draws": (null_draws, 0), "null_ranks": (null_ranks, 1), "gap": (gap, 0),
             "similarity_ranks": (similarity_ranks, 1), "limit": (1 if limit is None else limit, 1),
             "cache_gb": (cache_gb, 0)}  # fmt: skip
    for name, (value, smallest) in least.items():
        if not value >= smallest:  # NaN included
            raise InputError(f"{name} is at least {smallest}; found {value}")
    if method not in linalg.METHODS:
        raise InputError(f"method is one of {', '.join(linalg.METHODS)}; found {method!r}")
    if ranks is not None and ranks < k:
        raise InputError(f"ranks is at least k; found {ranks} and {k}")
    if method == "certified" and max(k, ranks or k) > linalg.CERTIFIED_UP_TO:
        raise InputError(
            f"certified serves up to {linalg.CERTIFIED_UP_TO} vectors; found {max(k, ranks or k)}: choose method exact"
        )
    if side not in ("left", "right", "both"):
        raise InputError(f"side is left, right or both; found {side!r}")
    names = pair.names(embeddings=embeddings)[:limit]
    if not names:
        raise InputError("no matrix to compare: the checkpoints share vectors only, or embeddings alone")
    store = None if cache is None else linalg.BasisCache(Path(cache), int(cache_gb * 1e9))
    options = {
        "epsilon": epsilon, "k": k, "sides": ("left", "right") if side == "both" else (side,), "ranks": ranks,
        "method": method, "null_draws": null_draws, "null_ranks": max(k, null_ranks), "gap": gap,
        "similarity_ranks": similarity_ranks, "seed": seed, "device": devices.choose(device),
    }  # fmt: skip
    several = isinstance(pair, ModelSeries)
    rows = each_matrix(
        pair,
        names,
        lambda weight: (
            _trace(weight, store=store, **options) if several else _measure(weight, store=store, **options)[0]
        ),
        progress=progress,
        partial=partial,
        arguments=options | {"analysis": "trajectory" if several else "intruders"},
    )
    return _assemble_trajectory(rows, options, pair.steps) if several else _assemble(rows, options)


def _measure(
    matrix: "Matrix",
    *,
    epsilon: float,
    k: int,
    sides: tuple["linalg.Side", ...],
    ranks: int | None,
    method: "linalg.Method",
    store: "linalg.Store | None" = None,
    null_draws: int,
    null_ranks: int,
    gap: float,
    similarity_ranks: int,
    seed: int,
    device: "torch.device",
    digest: str | None = None,
    following: bool = False,
) -> "tuple[Row, dict[linalg.Side, torch.Tensor]]":
    """Everything the result keeps of one matrix, and by side the first k tuned vectors if `following`
    (none where nothing changed)."""
    import torch

    from finetune_lens import linalg

    shape, p = tuple(matrix.base.shape), min(matrix.base.shape)
    given = {"factored": matrix.update is not None, "method": method, "stored": store is not None}
    route = linalg.choose(shape, ranks=min(ranks or k, p), values=null_draws > 0, **given)
    if ranks is None:
        ranks = k if route == "certified" else p if p <= WHOLE_UP_TO else max(k, FIRST)
        if route != "certified":
            route = linalg.choose(shape, ranks=min(ranks, p), values=null_draws > 0, **given)
    ranks, judged = min(ranks, p), min(k, p)
    block = min(similarity_ranks, ranks)
    spectrum = null_draws > 0 or route != "certified"  # of Δ
    if matrix.update is None:
        update = None
        delta = matrix.delta(torch.float64, device)
        delta_norm = linalg.energy(delta)
        delta_values = linalg.singular_values(delta) if spectrum and delta_norm else delta.new_zeros(p)
        del delta
    else:
        low = matrix.update
        update = low.scale * low.left.to(device, torch.float64), low.right.to(device, torch.float64)
        delta_values, spectrum = linalg.low_rank_values(*update), True
        delta_norm = linalg.energy(delta_values)
    unchanged = delta_norm == 0
    base = matrix.base.to(device)
    null_max_cos = np.zeros((2, null_draws, len(sides), min(null_ranks, p)), np.float32)
    if unchanged:  # the same basis on both sides by definition, however degenerate it is
        values = linalg.singular_values(base)
        nobody = dict.fromkeys(sides, torch.zeros(ranks, dtype=torch.bool))
        same = {s: _unchanged(ranks, block) for s in sides}
        found = linalg.Comparison(values, values, same, "unchanged", nobody, {})
        null_max_cos += 1
    else:
        found = linalg.compare(
            base,
            None if matrix.tuned is None else matrix.tuned.to(device),
            update,
            ranks=ranks,
            sides=sides,
            gap=gap,
            block=block,
            epsilon=epsilon,
            judged=judged,
            route=route,
            leading=following,
            store=store,
            digest="" if store is None else digest or matrix.base_digest,
        )
    base_values, tuned_values = found.base_values, found.tuned_values[:ranks]
    if null_draws and len(base_values) < p:
        base_values = linalg.singular_values(base)
    delta_rank = effective_rank = np.nan
    if spectrum:
        smallest = max(2 * matrix.unit_roundoff * float(base_values[0]), p * linalg.EPS * float(delta_values[0]))
        delta_rank, effective_rank = int((delta_values > smallest).sum()), linalg.effective_rank(delta_values)
    if not unchanged and null_draws:
        for n, values in enumerate(_null_values(delta_values, delta_norm, delta_rank)):
            for draw in range(null_draws):
                cosines = linalg.null_max_cos(
                    base_values, values, shape, k=null_max_cos.shape[-1], sides=sides,
                    generator=linalg.generator(repr((seed, matrix.name, NULLS[n], draw))), device=device,
                )  # fmt: skip
                null_max_cos[n, draw] = np.stack([cosines[s].cpu().numpy() for s in sides])
    row: Row = {
        "sigma": tuned_values.cpu().numpy(),
        "sigma_base": base_values.cpu().numpy(),
        "gap_": linalg.relative_gaps(found.tuned_values)[:ranks].cpu().numpy(),
        "null_max_cos": null_max_cos,
        "delta_norm": delta_norm,
        "base_norm": linalg.energy(base_values if len(base_values) == p else base.to(torch.float64)),
        "delta_rank": delta_rank,
        "effective_rank": effective_rank,
        "unchanged": unchanged,
        "route": found.route,
        "out": shape[0],
        "in": shape[1],
    }
    for field in ("max_cos", "lower", "upper", "subspace_cos", "similarity"):
        row[field] = np.stack([getattr(found.matches[s], field).cpu().numpy() for s in sides])
    row["similarity"] = row["similarity"].astype(np.float32)
    row["best_base_rank"] = np.stack([found.matches[s].best.cpu().numpy() + 1.0 for s in sides])
    row["certified"] = np.stack([found.certified[s].cpu().numpy().astype(np.float32) for s in sides])
    return row, found.leading


def _null_values(values: "torch.Tensor", norm: float, rank: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """The singular values of the two nulls: Δ's norm spread evenly over its rank, and Δ's own.

    The `rank` values above what rounding can make stand for Δ where they hold its energy. In half precision they may
    not: the bound of rounding is relative to the base's largest σ, and a whole update may lie below it.
    """
    import torch

    energy = (values / values[0]).square()
    below = float(energy[rank:].sum() / energy.sum())
    own = values if below > NO_ENERGY else values[:rank]
    rank = rank if below < 0.5 else len(own)
    return torch.full_like(own[:rank], norm / rank**0.5), own


def _trace(variants: "Variants", *, store: "linalg.BasisCache | None", **options: Any) -> "Row":
    """The rows of all checkpoints along a first axis, and how the top k vectors of each lie among those of the next."""
    from finetune_lens import linalg

    digest = variants.each[0].base_digest
    latest = linalg.Latest(store)
    measured = [_measure(matrix, store=latest, digest=digest, following=True, **options) for matrix in variants.each]
    rows = [row for row, _ in measured]
    merged: Row = {key: rows[0][key] for key in ("out", "in")}
    for key in rows[0].keys() - merged.keys():
        merged[key] = padded([row[key] for row in rows])
    p, sides = min(variants.each[0].base.shape), options["sides"]
    k = min(options["k"], p)
    link = np.full((len(rows), len(sides), k, k), np.nan, np.float32)
    for t in range(len(rows) - 1):
        (_, here), (_, there) = measured[t : t + 2]
        for s, name in enumerate(sides):
            if name in here and name in there:
                link[t, s] = (here[name].T @ there[name]).abs().cpu().numpy()
    return merged | {"link": link}


def _unchanged(p: int, block: int) -> Any:
    """The match of a basis with itself."""
    import torch

    from finetune_lens.linalg import Match

    one = torch.ones(p, dtype=torch.float64)
    return Match(one, torch.arange(p), one, one, one, torch.eye(block, dtype=torch.float64))


def _assemble(rows: "Rows", options: dict[str, Any]) -> "Intruders":
    from finetune_lens.results.intruders import Intruders

    return Intruders(_dataset(rows, options))


def _assemble_trajectory(rows: "Rows", options: dict[str, Any], steps: list[int]) -> "Trajectory":
    from finetune_lens.results.trajectory import Trajectory

    data = _dataset(rows, options, "step").assign_coords(step=steps)
    return Trajectory(data.transpose("step", "null", "draw", "side", "matrix", ..., missing_dims="ignore"))


def _dataset(rows: "Rows", options: dict[str, Any], *before: str) -> "xr.Dataset":
    """The measured rows as a dataset; `before` names axes that precede the others of a variable."""
    import xarray as xr

    if not rows.rows:
        raise InputError(f"no matrix is finite on both sides: {rows.excluded}")
    measured = ("max_cos", "lower", "upper", "best_base_rank", "subspace_cos", "certified")
    per_vector = dict.fromkeys(measured, (*before, "side", "rank"))
    scalars = ("delta_norm", "base_norm", "delta_rank", "effective_rank", "unchanged", "route")
    variables = rows.variables(
        **per_vector,
        sigma=(*before, "rank"),
        sigma_base=(*before, "base_rank"),
        gap_=(*before, "rank"),
        similarity=(*before, "side", "similarity_rank", "similarity_base_rank"),
        **dict.fromkeys(scalars, before),
        **dict.fromkeys(("out", "in"), ()),
    )
    if options["null_draws"]:
        variables |= rows.variables(null_max_cos=(*before, "null", "draw", "side", "null_rank"))
    if before:
        variables |= rows.variables(link=(*before, "side", "link_rank", "link_next_rank"))
    data = xr.Dataset(variables).rename(gap_="gap")
    ranks = {d: np.arange(1, data.sizes[d] + 1) for d in data.dims if str(d).endswith("rank")}
    labels = {"null": list(NULLS)} if options["null_draws"] else {}
    data = data.assign_coords(rows.coordinates() | ranks | labels | {"side": list(options["sides"])})
    data["unchanged"] = data["unchanged"].astype(bool)
    data = data.transpose("null", "draw", "side", "matrix", ..., missing_dims="ignore")
    data.attrs = {
        "epsilon": options["epsilon"],
        "k": options["k"],
        "gap": options["gap"],
        "ranks": _reach(data),
        "null_ranks": options["null_ranks"],
        "provenance": rows.provenance(options["device"]),
    }
    return data


def _reach(data: Any) -> int:
    """Up to which rank every matrix was looked at, as far as it has vectors; 0 for all of them."""
    values = data.max_cos.isel(side=0).transpose(..., "matrix", "rank").values
    looked = np.isfinite(values).sum(-1)
    short = looked[looked < np.minimum(data["out"].values, data["in"].values)]
    return int(short.min()) if short.size else 0


def main() -> None:
    from finetune_lens.intruders.__main__ import main as command

    command()
