"""Figures: a result in, matplotlib axes out. No model, no torch; matplotlib is imported when something is drawn.

Every function draws into `ax` when it is given one, and makes a figure of the width of a column or page otherwise.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from finetune_lens.plots.attention_heads import attention_heads
from finetune_lens.plots.attention_maps import attention_maps
from finetune_lens.plots.attribution_against_exact import attribution_against_exact
from finetune_lens.plots.bias_effects import bias_effects
from finetune_lens.plots.circuit_diagram import circuit_diagram
from finetune_lens.plots.circuit_faithfulness import circuit_faithfulness
from finetune_lens.plots.circuit_overlap import circuit_overlap
from finetune_lens.plots.cka_matrix import cka_matrix
from finetune_lens.plots.cmap_bars import cmap_bars
from finetune_lens.plots.compression import compression
from finetune_lens.plots.cot_aoc import cot_aoc
from finetune_lens.plots.cot_curves import cot_curves
from finetune_lens.plots.cot_scatter import cot_scatter
from finetune_lens.plots.dcm_accuracy import dcm_accuracy
from finetune_lens.plots.direction_layers import direction_layers
from finetune_lens.plots.graft_overlap import graft_overlap
from finetune_lens.plots.graft_recovery import graft_recovery
from finetune_lens.plots.graft_reliability import graft_reliability
from finetune_lens.plots.graft_search import graft_search
from finetune_lens.plots.graft_where import graft_where
from finetune_lens.plots.head_effects import head_effects
from finetune_lens.plots.interpolation_groups import interpolation_groups
from finetune_lens.plots.interpolation_map import interpolation_map
from finetune_lens.plots.interpolation_path import interpolation_path
from finetune_lens.plots.interpolation_sharpness import interpolation_sharpness
from finetune_lens.plots.interpolation_splits import interpolation_splits
from finetune_lens.plots.intruder_counts import intruder_counts
from finetune_lens.plots.intruder_map import intruder_map
from finetune_lens.plots.intruder_scaling import intruder_scaling
from finetune_lens.plots.outputs_lens import outputs_lens
from finetune_lens.plots.outputs_tokens import outputs_tokens
from finetune_lens.plots.parts import parts
from finetune_lens.plots.patching_bars import patching_bars
from finetune_lens.plots.patching_heatmap import patching_heatmap
from finetune_lens.plots.paths import paths
from finetune_lens.plots.probe_heads import probe_heads
from finetune_lens.plots.probe_layers import probe_layers
from finetune_lens.plots.pruning_curves import pruning_curves
from finetune_lens.plots.receiver_heads import receiver_heads
from finetune_lens.plots.recovery_axis import recovery_axis
from finetune_lens.plots.representation_layers import representation_layers
from finetune_lens.plots.revival_curves import revival_curves
from finetune_lens.plots.sigma_against_cosine import sigma_against_cosine
from finetune_lens.plots.similarity import similarity
from finetune_lens.plots.step_importance import step_importance
from finetune_lens.plots.step_matrix import step_matrix
from finetune_lens.plots.step_states import step_states
from finetune_lens.plots.task_vectors import task_vectors
from finetune_lens.plots.trajectory import trajectory
from finetune_lens.plots.update_energy import update_energy
from finetune_lens.plots.update_map import update_map
from finetune_lens.plots.update_spectrum import update_spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from finetune_lens.results import Result
    from finetune_lens.results.inside_chains import InsideChains
    from finetune_lens.results.patching import Patching

__all__ = [
    "attention_heads",
    "attention_maps",
    "attribution_against_exact",
    "bias_effects",
    "circuit_diagram",
    "circuit_faithfulness",
    "circuit_overlap",
    "cka_matrix",
    "cmap_bars",
    "compression",
    "cot_aoc",
    "cot_curves",
    "cot_scatter",
    "dcm_accuracy",
    "direction_layers",
    "figures_of",
    "graft_overlap",
    "graft_recovery",
    "graft_reliability",
    "graft_search",
    "graft_where",
    "head_effects",
    "interpolation_groups",
    "interpolation_map",
    "interpolation_path",
    "interpolation_sharpness",
    "interpolation_splits",
    "intruder_counts",
    "intruder_map",
    "intruder_scaling",
    "outputs_lens",
    "outputs_tokens",
    "parts",
    "patching_bars",
    "patching_heatmap",
    "paths",
    "probe_heads",
    "probe_layers",
    "pruning_curves",
    "receiver_heads",
    "recovery_axis",
    "representation_layers",
    "revival_curves",
    "sigma_against_cosine",
    "similarity",
    "step_importance",
    "step_matrix",
    "step_states",
    "task_vectors",
    "trajectory",
    "update_energy",
    "update_map",
    "update_spectrum",
]

# Result kind → title → function. Those of intruders and trajectories are drawn for each side.
_FIGURES: dict[str, dict[str, Callable[..., "Axes"]]] = {
    "attention": {"heads": attention_heads, "maps": attention_maps},
    "bias": {"effects": bias_effects},
    "circuit_evaluation": {"faithfulness": circuit_faithfulness},
    "circuit_overlap": {"overlap": circuit_overlap},
    "compression": {"recovery": compression},
    "cot": {"curves": cot_curves, "aoc": cot_aoc, "scatter": cot_scatter},
    "dcm": {"accuracy": dcm_accuracy},
    "directions": {"layers": direction_layers},
    "grafting": {
        "recovery": graft_recovery,
        "where": graft_where,
        "search": graft_search,
        "reliability": graft_reliability,
        "overlap": graft_overlap,
    },
    "intruders": {
        "counts": intruder_counts,
        "map": intruder_map,
        "similarity": similarity,
        "similarity_all": partial(similarity, ranks=None),
        "sigma_against_cosine": sigma_against_cosine,
    },
    "intruder_scaling": {m: partial(intruder_scaling, metric=m) for m in ("accuracy", "logprob")},
    "pruning": {"curves": pruning_curves},
    "revival": {"curves": revival_curves},
    "task_vectors": {"maps": task_vectors},
    "trajectory": {"steps": trajectory},
    "updates": {"spectrum": update_spectrum, "map": update_map, "energy": update_energy},
}

# Of an interpolation: title → the part that it shows, and its function.
_INTERPOLATION = {
    "path": ("path", interpolation_path),
    "groups": ("scaling", interpolation_groups),
    "map": ("scaling", interpolation_map),
    "splits": ("splits", interpolation_splits),
    "sharpness": ("perturbed", interpolation_sharpness),
}


def figures_of(result: "Result") -> dict[str, Callable[[], "Figure"]]:
    """Title → function that draws that figure of the result; titles end in the side when there are two."""
    functions = _FIGURES.get(result.kind, {})
    if result.kind == "updates" and not result.data.sizes["rank"]:  # vectors only
        functions = {"map": update_map}
    if result.kind in ("intruders", "trajectory"):
        several = len(result.sides) > 1
        functions = {
            f"{title}_{side}" if several else title: partial(function, side=side)
            for side in result.sides
            for title, function in functions.items()
        }
    if result.kind == "cot" and not result.tests:  # chains were corrupted only
        functions = {}
    if result.kind == "grafting":
        absent = {"reliability"} if result.data.attrs["objective"] == "text" else set()
        absent |= set() if "shared" in result.data else {"overlap"}
        functions = {title: function for title, function in functions.items() if title not in absent}
    if result.kind in ("patching", "cmap"):
        functions = _of_patches(result)
    if result.kind == "interpolation":
        functions = {title: function for title, (part, function) in _INTERPOLATION.items() if result.has(part)}
    if result.kind == "recovery":
        functions = {"axis": recovery_axis}
        if len(result.units) > 1:
            functions["units"] = partial(recovery_axis, by_unit=True)
    if result.kind == "parts":
        functions = {level: partial(parts, level=level) for level in result.levels if len(result.columns(level)) > 1}
    if result.kind == "paths":
        functions = {"heads": paths}
        functions |= {"effects": head_effects} if len(result.models) > 1 else {}
        functions |= {"circuit": lambda found: circuit_diagram(found.circuit)} if result.circuit else {}
    if result.kind == "inside_chains":
        functions = _of_chains(result)
    if result.kind == "representations":
        functions = {"cka": cka_matrix} | ({"layers": representation_layers} if result.matched else {})
    if result.kind == "probing":
        functions = {"heads": probe_heads} if "head" in result.places else {"layers": probe_layers}
    if result.kind == "outputs":
        functions = {"tokens": outputs_tokens} | ({"lens": outputs_lens} if result.has_lens else {})
    return {title: partial(_drawn, function, result) for title, function in functions.items()}


def _of_patches(result: "Patching") -> dict[str, Callable[..., "Axes"]]:
    """A map (of a grid of two dimensions) or bars for each direction; both directions side by side across models."""
    functions: dict[str, Callable[..., Axes]] = {}
    flat = len(result.dims) == 2
    for direction in result.directions:
        ending = f"_{direction.replace('→', '_to_')}" if len(result.directions) > 1 else ""
        if flat:
            functions[f"map{ending}"] = partial(patching_heatmap, direction=direction)
        elif result.kind != "cmap":
            functions[f"bars{ending}"] = partial(patching_bars, direction=direction)
        if f"attribution_{result.metric}" in result.data:
            functions[f"attribution{ending}"] = partial(attribution_against_exact, direction=direction)
    if result.kind == "cmap":
        functions["bars"] = cmap_bars
    return functions


def _of_chains(result: "InsideChains") -> dict[str, Callable[..., "Axes"]]:
    """What its parts have."""
    parts, functions = result.parts, {}
    if "cuts" in parts:
        functions["matrix"] = step_matrix
    if {"cuts", "resampling"} & {*parts}:
        functions["importance"] = step_importance
    if "heads" in parts:
        functions["heads"] = receiver_heads
    if "state_effect" in result.data:
        functions["states"] = step_states
    return functions


def _drawn(function: Callable[..., "Axes"], result: "Result") -> "Figure":
    import numpy as np

    return np.ravel(function(result))[0].figure
