"""Do the parts of a model that moved carry the behaviour? What several analyses say of each matrix and head, joined.

One row a matrix, and where they are known a head, a layer or a component; a column an analysis: size of the update,
intruders, density of a graft, sensitivity, what the part's update brings alone and what is lost without it, the effect
of patching it. Of every two columns Spearman's ρ over the rows, against the ρ of 10,000 permutations of the rows:

    p = (1 + #{|ρ*| ≥ |ρ|}) / (1 + permutations),

adjusted for all pairs of a level (Benjamini and Hochberg 1995). Parts that did not move at all are left out of ρ: that
they bring nothing is no finding. What an analysis did not measure is NaN, never 0.

A level is joined where an analysis measured it: importance by layer gives rows by layer, to which the others are summed
up (norms as roots of summed squares, densities as entries over entries), and never the same number for many matrices.

Works on saved results alone: no model is run. Cost: permutations·rows·pairs, seconds.

>>> import numpy as np
>>> from finetune_lens.parts import rank_null
>>> a = np.arange(8.0)
>>> found = rank_null(a, a**3, permutations=999)
>>> found["rho"], found["p"] < 0.01
(1.0, True)
"""

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded
from finetune_lens.results.sources import Sources

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from finetune_lens.results.cmap import CrossPatching
    from finetune_lens.results.grafting import Grafting
    from finetune_lens.results.interpolation import Interpolation
    from finetune_lens.results.intruders import Intruders
    from finetune_lens.results.parts import Parts
    from finetune_lens.results.updates import Updates

INTO_BASE = "tuned→base"
VECTORS = ("norm", "bias")
FEWEST = 4  # rows of which ranks are compared: of three no order is rare
SAME_NORM = 1e-3  # relative, up to which two results may differ in ‖Δ‖ of one weight
BLOCK = 1 << 22  # numbers held at once while permuting


def join_parts(
    *,
    updates: "Updates | None" = None,
    intruders: "Intruders | None" = None,
    grafting: "Grafting | None" = None,
    interpolation: "Interpolation | None" = None,
    cmap: "CrossPatching | None" = None,
    file: str | None = None,
    metric: str = "logprob",
    sparsity: float | None = None,
    permutations: int = 10_000,
    seed: int = 0,
) -> "Parts":
    """Join what results of one pair say of each part of the model; two of them at least.

    Args:
        updates: ‖Δ‖ and ‖Δ‖/‖W0‖ of each weight.
        intruders: how many of the top k vectors of each matrix certainly are, of the first side that was computed.
        grafting: density of the graft and mean sensitivity of each weight; of each head density and ‖Δ‖.
        interpolation: importance alone and without, at the level that it was measured (`by`).
        cmap: effect of patching tuned→base, by layer and head or by layer.
        file: on which importance was measured; by default the first.
        metric: of importance; log-probability has an order where accuracies are equal.
        sparsity: of which graft; by default the last.
        permutations: behind the null of each correlation.
        seed: of the permutations.

    Raises:
        InputError: fewer than two results, one of another kind, a grid or metric that cannot be joined, results of
            models that have no weight in common.
    """
    given = {
        "updates": updates, "intruders": intruders, "grafting": grafting, "interpolation": interpolation, "cmap": cmap,
    }  # fmt: skip
    results = Sources({name: result for name, result in given.items() if result is not None})
    for name, result in results.items():
        if result.kind != name:
            raise InputError(f"expected a result of kind {name}; found one of kind {result.kind}")
    if len(results) < 2:
        raise InputError(
            f"expected two results at least, of {', '.join(given)}; found {', '.join(results) or 'none'}: there is "
            "nothing to join"
        )
    if permutations < 1 or seed < 0:
        raise InputError(f"permutations are at least 1 and seed at least 0; found {permutations} and {seed}")
    options = {"file": file, "metric": metric, "sparsity": sparsity, "permutations": permutations, "seed": seed}
    return _join(results, **options)


@recorded
def _join(
    results: Sources, *, file: str | None, metric: str, sparsity: float | None, permutations: int, seed: int
) -> "Parts":
    import xarray as xr

    from finetune_lens.results.parts import COLUMNS, LEVELS, Parts

    _require_one_update(results)
    weights = _weights(results, sparsity)
    notes: list[str] = []
    frames: dict[str, pd.DataFrame] = {}
    if len(weights):
        frames["matrix"] = _summed(weights[~weights["component"].isin(VECTORS)], ["matrix", "layer", "component"])
    if "interpolation" in results:
        by, importance = _importance(results["interpolation"], file, metric)
        _add(frames, by, importance, weights)
        notes.append(f"importance ({metric}) was measured by {by}")
    heads = _heads(results.get("grafting"), sparsity)
    if heads is not None:
        frames["head"] = heads
    if "cmap" in results:
        by, effects = _patched(results["cmap"])
        _add(frames, by, effects, weights)
    data: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for level in (name for name in LEVELS if name in frames):
        frame = frames[level]
        coords[level] = frame[level].to_numpy(dtype=object if level != "layer" else int)
        for name in ("layer", "component"):
            if name in frame and name != level:
                coords[f"{level}_{name}"] = (level, frame[name].to_numpy(dtype=int if name == "layer" else object))
        for name in frame.columns.difference(["matrix", "layer", "component", "head"], sort=False):
            data[f"{level}_{name}"] = (level, frame[name].to_numpy(float))
    levels = [level for level in LEVELS if level in frames]
    shape = (len(levels), len(COLUMNS), len(COLUMNS))
    found = {name: np.full(shape, np.nan) for name in ("rho", "p", "p_adjusted", "null_low", "null_high", "rows")}
    for i, level in enumerate(levels):
        for name, values in _correlations(frames[level], list(COLUMNS), permutations, seed).items():
            found[name][i] = values
    data |= {name: (("level", "column", "other"), values) for name, values in found.items()}
    names = np.array(list(COLUMNS), dtype=object)
    coords |= {"level": np.array(levels, dtype=object), "column": names, "other": names}
    metrics = {"importance_metric": metric if "interpolation" in results else ""}
    metrics["patch_metric"] = results["cmap"].metric if "cmap" in results else ""
    attrs = metrics | {
        "permutations": permutations,
        "provenance": json.dumps({"analysis": "join_parts", "notes": notes}),
    }
    return Parts(xr.Dataset(data, coords, attrs))


def _require_one_update(results: Sources) -> None:
    """Raise where two results know a weight by different ‖Δ‖: they are of different tuned models."""
    norms: dict[str, dict[str, float]] = {}
    for name, data in ((name, result.data) for name, result in results.items()):
        if "update_square" in data:
            norms[name] = dict(zip(data["weight"].values, np.sqrt(data["update_square"].values), strict=True))
        elif "delta_norm" in data:
            norms[name] = dict(zip(data["matrix"].values, data["delta_norm"].values, strict=True))
    for one, other in itertools.combinations(norms, 2):
        for weight in (name for name in norms[one] if name in norms[other]):
            a, b = norms[one][weight], norms[other][weight]
            if abs(a - b) > SAME_NORM * max(a, b):
                raise InputError(
                    f"the results are of different models: ‖Δ‖ of {weight} is {a:.4g} by {one} and {b:.4g} by {other}"
                )


def _weights(results: Sources, sparsity: float | None) -> "pd.DataFrame":
    """A row a weight, with what can be summed over weights; NaN where it was not measured.

    Raises:
        InputError: no weight in common.
    """
    import pandas as pd

    tables = []
    if "updates" in results:
        data = results["updates"].data
        tables.append(_of_weights(data, delta_square=data.delta_norm**2, base_square=data.base_norm**2))
    if "intruders" in results:
        found = results["intruders"]
        tables.append(_of_weights(found.data, intruders=(found._top(None, None, None) == 1).sum("rank")))
    if "grafting" in results:
        data = results["grafting"].data
        entries = data.entries_by_weight.sel(mask="graft", level=_level(results["grafting"], sparsity))
        values = {"entries": entries, "count": data["count"], "sensitivity_sum": data.sensitivity}
        if "updates" not in results:
            values["delta_square"] = data.delta_norm**2
        tables.append(_of_weights(data, **values))
    if not tables:
        return pd.DataFrame(columns=["matrix", "layer", "component"])
    joined = tables[0]
    for table in tables[1:]:
        if not {*joined["matrix"]} & {*table["matrix"]}:
            raise InputError(
                f"the results are of different models: one has {joined['matrix'].iloc[0]} …, another "
                f"{table['matrix'].iloc[0]} …, and no weight is in both"
            )
        joined = _both(joined, table, ["matrix", "layer", "component"])
    return joined


def _both(one: "pd.DataFrame", other: "pd.DataFrame", keys: list[str]) -> "pd.DataFrame":
    """The rows of either, in the order of the first, then of the other (pandas would sort layer 10 before 2)."""
    import pandas as pd

    order = pd.concat([one[keys], other[keys]]).drop_duplicates()
    return order.merge(one, on=keys, how="left").merge(other, on=keys, how="left")


def _of_weights(data: "xr.Dataset", **values: "xr.DataArray") -> "pd.DataFrame":
    import pandas as pd

    names = {"matrix": data["matrix"].values, "layer": data.layer.values, "component": data.component.values}
    return pd.DataFrame(names | {name: np.asarray(v.values, float) for name, v in values.items()})


def _level(grafting: "Grafting", sparsity: float | None) -> float:
    if sparsity is not None and sparsity not in grafting.levels:
        raise InputError(f"no graft of sparsity {sparsity:g}; there are {', '.join(f'{v:g}' for v in grafting.levels)}")
    return grafting.levels[-1] if sparsity is None else sparsity


def _summed(weights: "pd.DataFrame", keys: list[str]) -> "pd.DataFrame":
    """The columns by `keys`, over the weights of each."""
    sums = weights.groupby(keys, sort=False).sum(min_count=1, numeric_only=True).reset_index()
    found = sums[keys].copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        if "delta_square" in sums:
            found["delta_norm"] = np.sqrt(sums["delta_square"])
        if "base_square" in sums:
            found["relative_norm"] = np.sqrt(sums["delta_square"].to_numpy() / sums["base_square"].to_numpy())
        if "intruders" in sums:
            found["intruders"] = sums["intruders"]
        if "count" in sums:
            found["mask_density"] = sums["entries"] / sums["count"]
            found["sensitivity"] = sums["sensitivity_sum"] / sums["count"]
    return found


def _importance(result: "Interpolation", file: str | None, metric: str) -> tuple[str, "pd.DataFrame"]:
    """The level, and by part what it brings alone and what is lost without it."""
    if not result.by:
        raise InputError("the interpolation has no groups: measure them with by='matrix' (--by matrix)")
    file = result.files[0] if file is None else file
    frame = result.importance()
    chosen = frame[(frame["file"] == file) & (frame["metric"] == metric)]
    if chosen.empty:
        raise InputError(
            f"importance was not measured on {file!r} by {metric!r}; there are the files {', '.join(result.files)} and "
            f"the metrics {', '.join(frame['metric'].unique())}"
        )
    groups = chosen["group"].astype(object)
    if result.by == "layer":
        groups = [-1 if g == "outside" else int(g) for g in groups]
    values = [f"{name}{end}" for name in ("alone", "without") for end in ("", "_low", "_high")]
    return result.by, chosen[values].assign(**{result.by: groups}).reset_index(drop=True)


def _heads(result: "Grafting | None", sparsity: float | None) -> "pd.DataFrame | None":
    """By layer and head: density of the graft and ‖Δ‖ over its q, k, v and o; grouped k and v count for each head."""
    import pandas as pd

    if result is None or "head_entries" not in result.data:
        return None
    frame = result.heads(level=_level(result, sparsity))
    number = frame.groupby("matrix")["head"].transform("nunique")
    counts = dict(zip(result.data["matrix"].values, result.data["count"].values, strict=True))
    frame["count"] = frame["matrix"].map(counts) / number
    frame["square"] = frame["delta_norm"] ** 2
    heads = int(number.max())
    repeated = frame.loc[frame.index.repeat(heads // number)]  # k and v of several heads
    repeated = repeated.assign(head=repeated["head"] * (heads // number) + repeated.groupby(level=0).cumcount())
    sums = repeated.groupby(["layer", "head"])[["entries", "count", "square"]].sum().reset_index()
    return pd.DataFrame(
        {
            "head": _head_names(sums["layer"], sums["head"]), "layer": sums["layer"],
            "delta_norm": np.sqrt(sums["square"]), "mask_density": sums["entries"] / sums["count"],
        }
    )  # fmt: skip


def _head_names(layers: Any, heads: Any) -> list[str]:
    return [f"{int(layer)}.{int(head)}" for layer, head in zip(layers, heads, strict=True)]


def _patched(result: "CrossPatching") -> tuple[str, "pd.DataFrame"]:
    if INTO_BASE not in result.directions:
        raise InputError(f"cmap has patches {', '.join(result.directions)} only; expected {INTO_BASE}")
    if {*result.dims} not in ({"layer", "head"}, {"layer"}):
        raise InputError(
            f"cmap was patched by {', '.join(result.dims)}, which is no part of the weights; expected layer,head or "
            "layer (--by)"
        )
    if result.data.attrs.get("window", 1) > 1:
        raise InputError("cmap was patched in windows, which overlap: a window is no part")
    frame = result.to_frame()
    frame = frame[frame["direction"] == INTO_BASE]
    names = {"effect": "patch_effect", "low": "patch_effect_low", "high": "patch_effect_high"}
    found = frame[["layer", *names]].rename(columns=names).reset_index(drop=True)
    if "head" not in result.dims:
        return "layer", found
    found.insert(0, "head", _head_names(frame["layer"], frame["head"]))
    return "head", found


def _add(frames: "dict[str, pd.DataFrame]", level: str, more: "pd.DataFrame", weights: "pd.DataFrame") -> None:
    """Columns beside those of a level; a level that is new has the weights summed up to it."""
    if level not in frames and level in ("layer", "component") and len(weights):
        frames[level] = _summed(weights, [level])
    if level not in frames:
        frames[level] = more
        return
    mine = frames[level]
    if not {*mine[level]} & {*more[level]}:
        raise InputError(
            f"the results are of different models: by {level} one has {mine[level].iloc[0]} …, another "
            f"{more[level].iloc[0]} …, and none is in both"
        )
    same = [name for name in ("layer", "component") if name in mine and name in more and name != level]
    kept = more if level != "matrix" else more[more[level].isin(mine[level])]  # vectors are not among the matrices
    frames[level] = _both(mine, kept, [level, *same])


def _correlations(frame: "pd.DataFrame", columns: list[str], permutations: int, seed: int) -> dict[str, np.ndarray]:
    """(column, other) of every quantity, NaN on the diagonal and where a column is not there."""
    from finetune_lens import stats

    size = len(columns)
    found = {
        name: np.full((size, size), np.nan) for name in ("rho", "p", "null_low", "null_high", "rows", "p_adjusted")
    }
    moved = frame["delta_norm"].to_numpy() != 0 if "delta_norm" in frame else np.ones(len(frame), bool)
    pairs = [(i, j) for i in range(size) for j in range(i) if columns[i] in frame and columns[j] in frame]
    for i, j in pairs:
        a, b = (frame[columns[at]].to_numpy(float)[moved] for at in (i, j))
        one = rank_null(a, b, permutations=permutations, seed=[seed, i, j])
        for name, value in one.items():
            found[name][i, j] = found[name][j, i] = value
    below = np.tril_indices(size, -1)
    adjusted = stats.benjamini_hochberg(found["p"][below])
    found["p_adjusted"][below] = found["p_adjusted"].T[below] = adjusted
    return found


def rank_null(a: np.ndarray, b: np.ndarray, *, permutations: int, seed: Any = 0) -> dict[str, float]:
    """Spearman's ρ of two columns over the rows that both have, and what permuting the rows of one gives.

    Returns:
        rho, p (two-sided), null_low and null_high (central 95 % of ρ*), rows; NaN where fewer than four rows are there
        or a column is constant.
    """
    from scipy.stats import rankdata

    both = ~np.isnan(a) & ~np.isnan(b)
    rows = int(both.sum())
    nothing = dict.fromkeys(("rho", "p", "null_low", "null_high"), np.nan) | {"rows": rows}
    if rows < FEWEST:
        return nothing
    one, other = (rankdata(side[both]) - (rows + 1) / 2 for side in (a, b))
    scale = np.sqrt((one @ one) * (other @ other))
    if scale == 0:
        return nothing
    rho = float(one @ other / scale)
    random = np.random.default_rng(seed)
    null = np.empty(permutations)
    step = max(1, BLOCK // rows)
    for start in range(0, permutations, step):
        shuffled = random.permuted(np.tile(other, (min(step, permutations - start), 1)), axis=1)
        null[start : start + step] = shuffled @ one / scale
    extreme = int((np.abs(null) >= abs(rho) - 1e-9).sum())  # sums of the same ranks in another order
    low, high = np.quantile(null, [0.025, 0.975])
    return {
        "rho": round(rho, 12), "p": (1 + extreme) / (1 + permutations), "null_low": float(low),
        "null_high": float(high), "rows": rows,
    }  # fmt: skip


def main() -> None:
    import typer

    from finetune_lens.command import OutputFolder, Saved, finish, run
    from finetune_lens.results.sources import read

    def parts(
        results: Annotated[
            list[Path],
            typer.Argument(
                metavar="RESULT.nc...",
                help="Saved results of one pair: updates, intruders, grafting, interpolation, cmap.",
            ),
        ],
        *,
        file: Annotated[
            str | None,
            typer.Option(help="On which importance was measured.  [default: the first]", show_default=False),
        ] = None,
        metric: Annotated[str, typer.Option(help="Of importance: logprob or accuracy.")] = "logprob",
        sparsity: Annotated[
            float | None, typer.Option(help="Of which graft.  [default: the last]", show_default=False)
        ] = None,
        permutations: Annotated[int, typer.Option(help="Behind the null of each correlation.")] = 10_000,
        seed: Annotated[int, typer.Option(help="Of the permutations.")] = 0,
        common: Saved,
    ) -> None:
        """Do the parts that moved carry the behaviour? Update, intruders, graft, importance and patches by part."""
        folder = OutputFolder(common.out, "parts", force=common.force)
        given: dict[str, Any] = {}
        for path, result in zip(results, read(results).values(), strict=True):
            if result.kind not in ("updates", "intruders", "grafting", "interpolation", "cmap"):
                raise InputError(
                    f"{path} is a result of kind {result.kind}; expected updates, intruders, grafting, interpolation "
                    "or cmap"
                )
            if result.kind in given:
                raise InputError(f"{path} is a second result of kind {result.kind}; expected one of a kind")
            given[result.kind] = result
        folder.check()
        options = {"file": file, "metric": metric, "sparsity": sparsity, "permutations": permutations, "seed": seed}
        finish(join_parts(**given, **options), folder, common)

    run(parts)


if __name__ == "__main__":
    from finetune_lens.parts import main

    main()
