"""How large is the update, how many directions does it use, and where in the base does it lie?

Per weight, Δ = W1 − W0: ‖Δ‖_F/‖W0‖_F, ‖Δ‖₂/‖W0‖₂, stable rank ‖Δ‖_F²/‖Δ‖₂² (Rudelson & Vershynin 2007), effective rank
exp H(σ/Σσ) (Roy & Vetterli 2007), the spectrum, and the share of its energy in the base's leading singular subspaces,
‖U_kᵀ Δ V_k‖_F²/‖Δ‖_F² (the question of PiSSA, Meng et al. 2024: principal or minor directions?). A randomly turned Δ
has the share k²/(out·in) on average; its 95 % band is sampled with Δ's own singular values.

Cost a matrix, p = min(out, in): one eigendecomposition of the base and the singular values of Δ (≈ 15·p³ flops).
Memory: some float64 copies of the largest matrix (benchmarks/memory.py counts them).

>>> import torch
>>> from finetune_lens import ModelPair, measure_updates
>>> base = {"layers.0.mlp.up_proj.weight": torch.eye(8)}
>>> tuned = {"layers.0.mlp.up_proj.weight": torch.eye(8) + 0.5 * torch.diag(torch.tensor([1.0] + [0.0] * 7))}
>>> float(measure_updates(ModelPair.load(base, tuned), progress=False).data.stable_rank[0])
1.0
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import torch

    from finetune_lens.pair import Matrix, ModelPair
    from finetune_lens.results.updates import Updates
    from finetune_lens.stream import Row


@recorded
def measure_updates(
    pair: "ModelPair",
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    null_draws: int = 200,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    partial: Path | None = None,
) -> "Updates":
    """Measure the update of every weight: norms, ranks, spectrum, and its place in the base's singular subspaces.

    Args:
        pair: base and tuned, aligned. Embeddings are included; norms and biases get norms only.
        ks: sizes of the leading subspaces.
        null_draws: randomly turned updates behind the 95 % band of the energy.
        limit: only the first so many weights.
        seed: of the null.
        device: where the decompositions run.
        partial: folder in which finished weights wait, so that an interrupted run continues.

    Raises:
        InputError: an option out of range, or nothing finite to compare.
    """
    from finetune_lens import device as devices
    from finetune_lens.stream import each_matrix

    ks = sorted(set(ks))
    if not ks or ks[0] < 1 or null_draws < 1 or (limit is not None and limit < 1):
        raise InputError(f"ks, null_draws and limit are at least 1; found {ks}, {null_draws} and {limit}")
    where = devices.choose(device)
    options = {"ks": tuple(ks), "null_draws": null_draws, "seed": seed, "device": where}
    rows = each_matrix(
        pair,
        pair.names(vectors=True)[:limit],
        lambda weight: _measure(weight, **options),
        progress=progress,
        partial=partial,
        arguments=options | {"analysis": "updates"},
    )
    if not rows.rows:
        raise InputError(f"no weight is finite on both sides: {rows.excluded}")
    return _assemble(rows, options)


def _measure(weight: "Matrix", *, ks: tuple[int, ...], null_draws: int, seed: int, device: "torch.device") -> "Row":
    """Everything the result keeps of one weight."""
    import torch

    base = weight.base.to(device, torch.float64)
    delta = weight.delta(torch.float64, device)
    base_norm, delta_norm = float(base.norm()), float(delta.norm())
    row: Row = {
        "base_norm": base_norm,
        "tuned_norm": float((base + delta).norm()),
        "delta_norm": delta_norm,
        "relative_norm": _ratio(delta_norm, base_norm),
        "rounding": _rounding(weight),
        "out": base.shape[0],
        "in": base.shape[1] if base.ndim > 1 else 1,
    }
    nothing = np.full(len(ks), np.nan)
    if base.ndim != 2 or weight.component in ("norm", "bias"):
        return row | {
            "sigma_delta": np.empty(0), "sigma_base": np.empty(0), "energy": nothing, "energy_low": nothing,
            "energy_high": nothing, "energy_null": nothing, "delta_spectral": np.nan, "relative_spectral": np.nan,
            "stable_rank": np.nan, "effective_rank": np.nan, "delta_rank": np.nan,
        }  # fmt: skip
    from finetune_lens import linalg

    wanted = min(max(ks), min(base.shape))
    both = linalg.decompose(base, sides=("left", "right"), top=wanted)
    base_values = both.values if len(both.values) == min(base.shape) else linalg.singular_values(base)
    del base
    if weight.update is None:
        values = linalg.singular_values(delta)
    else:
        least = min(weight.base.shape)
        values = abs(weight.update.scale) * linalg.low_rank_values(weight.update.left, weight.update.right).to(device)
        values = torch.nn.functional.pad(values, (0, max(0, least - len(values))))[:least]
    top = min(max(ks), len(values))
    core = (both.left.vectors[:, :top].T @ delta @ both.right.vectors[:, :top]).square().cumsum(0).cumsum(1)
    square = delta_norm**2
    energy = [float(core[k - 1, k - 1]) / square if square and k <= top else np.nan for k in ks]
    chance = (
        _chance(values, tuple(weight.base.shape), ks, null_draws, seed)
        if square
        else np.full((null_draws, len(ks)), np.nan)
    )
    low, high = np.quantile(chance, [0.025, 0.975], axis=0)
    spectral = float(values[0])
    noise = max(len(values) * linalg.EPS * spectral, 2 * weight.unit_roundoff * float(base_values[0]))
    return row | {
        "sigma_delta": values.cpu().numpy(),
        "sigma_base": base_values.cpu().numpy(),
        "energy": np.array(energy),
        "energy_null": np.array([k**2 / weight.base.numel() if square and k <= top else np.nan for k in ks]),
        "energy_low": low,
        "energy_high": high,
        "delta_spectral": spectral,
        "relative_spectral": _ratio(spectral, float(base_values[0])),
        "stable_rank": _ratio(square, spectral**2),
        "effective_rank": linalg.effective_rank(values),
        "delta_rank": float((values > noise).sum()),
    }


def _ratio(a: float, b: float) -> float:
    return a / b if b else (np.nan if a == 0 else np.inf)


def _rounding(weight: "Matrix") -> float:
    """The largest ‖Δ‖/‖W0‖ that rounding both sides to their stored types can give: u_base + u_tuned."""
    import torch

    if weight.tuned is None or not (weight.base.dtype.is_floating_point and weight.tuned.dtype.is_floating_point):
        return 0.0
    return (torch.finfo(weight.base.dtype).eps + torch.finfo(weight.tuned.dtype).eps) / 2


def _chance(values: "torch.Tensor", shape: tuple[int, int], ks: Sequence[int], draws: int, seed: int) -> np.ndarray:
    """‖U_kᵀ P diag(s) Qᵀ V_k‖²/‖s‖² for uniformly random P, Q: (draw, k).

    The first k rows of a uniform frame are the first k columns of one, turned over. Only the directions that carry
    99.9 % of the energy are drawn. Cost a draw: 2·(out + in)·k² flops.
    """
    import torch

    from finetune_lens.linalg import haar

    generator = torch.Generator().manual_seed(seed)
    share = values.square().cpu() / values.square().sum().cpu()
    keep = int((share.cumsum(0) < 0.999).sum()) + 1
    weights = (share[:keep] / share[:keep].sum()).sqrt()
    top = min(max(ks), min(shape))
    result = np.empty((draws, len(ks)))
    for draw in range(draws):
        left, right = (haar(n, top, generator=generator)[:keep].T for n in shape)
        core = ((left * weights) @ right.T).square().cumsum(0).cumsum(1)
        result[draw] = [float(core[k - 1, k - 1]) if k <= top else np.nan for k in ks]
    return result


def _assemble(rows: Any, options: dict[str, Any]) -> "Updates":
    import xarray as xr

    from finetune_lens.results.updates import Updates

    scalars = (
        "base_norm", "tuned_norm", "delta_norm", "relative_norm", "rounding", "delta_spectral", "relative_spectral",
        "stable_rank", "effective_rank", "delta_rank", "out", "in",
    )  # fmt: skip
    energies = ("energy", "energy_null", "energy_low", "energy_high")
    data = xr.Dataset(
        rows.variables(
            **dict.fromkeys(scalars, ()),
            **dict.fromkeys(("sigma_delta", "sigma_base"), ("rank",)),
            **dict.fromkeys(energies, ("k",)),
        )
    )
    data = data.assign_coords(
        rows.coordinates() | {"rank": np.arange(1, data.sizes["rank"] + 1), "k": list(options["ks"])}
    )
    data.attrs = {"provenance": rows.provenance(options["device"])}
    return Updates(data)


def main() -> None:
    import typer

    from finetune_lens.command import AllowNonfinite, Base, Common, Fused, Orientation, Tuned, analyse_weights, run

    def updates(
        base: Base,
        tuned: Tuned,
        *,
        null_draws: Annotated[int, typer.Option(help="Randomly turned updates behind the band of chance.")] = 200,
        fused: Fused = False,
        orientation: Orientation = "auto",
        allow_nonfinite: AllowNonfinite = False,
        common: Common,
    ) -> None:
        """Update anatomy: norms, ranks, spectrum, and energy in the base's leading singular subspaces."""
        analyse_weights(
            "updates", base, tuned, measure_updates, common,
            fused=fused, orientation=orientation, allow_nonfinite=allow_nonfinite, seed=common.seed,
            null_draws=null_draws,
        )  # fmt: skip

    run(updates)


if __name__ == "__main__":
    from finetune_lens.updates import main

    main()
