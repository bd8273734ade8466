"""What did fine-tuning do to this model?

>>> import finetune_lens as fl                              # doctest: +SKIP
>>> pair = fl.ModelPair.load("base", "tuned")               # doctest: +SKIP
>>> found = fl.find_intruders(pair)                         # doctest: +SKIP
>>> found.count(epsilon=0.5, k=10)                          # doctest: +SKIP

Names are resolved on first use, so that importing the package imports neither torch nor matplotlib.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Circuit",
    "GateFailed",
    "Graft",
    "Hybrid",
    "InputError",
    "ModelPair",
    "ModelSeries",
    "attribute_edges",
    "check_pair",
    "compare_attention",
    "compare_circuits",
    "compare_outputs",
    "compare_representations",
    "compare_task_vectors",
    "compress",
    "cross_patch",
    "evaluate_circuit",
    "examine_bias",
    "examine_chains",
    "find_circuit",
    "find_directions",
    "find_intruders",
    "graft",
    "interpolate",
    "join_parts",
    "learn_masks",
    "load",
    "look_inside_chains",
    "measure_updates",
    "patch",
    "plots",
    "probe",
    "prune",
    "recovery_axis",
    "results",
    "revive",
    "scale_intruders",
    "trace",
    "trace_paths",
    "write_report",
    "zoo",
]

# Public name → the module it lives in; a module's own name stands for itself.
_WHERE = {
    "Circuit": "circuits",
    "GateFailed": "errors",
    "Graft": "masks",
    "Hybrid": "hybrid",
    "InputError": "errors",
    "ModelPair": "pair",
    "ModelSeries": "pair",
    "attribute_edges": "circuits",
    "check_pair": "check",
    "compare_attention": "attention",
    "compare_circuits": "circuits",
    "compare_outputs": "outputs",
    "compare_representations": "representations",
    "compare_task_vectors": "task_vectors",
    "compress": "compression",
    "cross_patch": "cmap",
    "evaluate_circuit": "circuits",
    "examine_bias": "cot.bias",
    "examine_chains": "cot.faithfulness",
    "find_circuit": "circuits",
    "find_directions": "directions",
    "find_intruders": "intruders",
    "graft": "grafting",
    "interpolate": "interpolation",
    "join_parts": "parts",
    "learn_masks": "circuits",
    "load": "results",
    "look_inside_chains": "cot.inside",
    "measure_updates": "updates",
    "patch": "patching",
    "plots": "plots",
    "probe": "probing",
    "prune": "pruning",
    "recovery_axis": "recovery",
    "results": "results",
    "revive": "revival",
    "scale_intruders": "intruders",
    "trace": "patching",
    "trace_paths": "circuits",
    "write_report": "report",
    "zoo": "zoo",
}

if TYPE_CHECKING:  # for editors
    from finetune_lens import plots, results, zoo
    from finetune_lens.attention import compare_attention
    from finetune_lens.check import check_pair
    from finetune_lens.circuits import (
        Circuit,
        attribute_edges,
        compare_circuits,
        evaluate_circuit,
        find_circuit,
        learn_masks,
        trace_paths,
    )
    from finetune_lens.cmap import cross_patch
    from finetune_lens.compression import compress
    from finetune_lens.cot.bias import examine_bias
    from finetune_lens.cot.faithfulness import examine_chains
    from finetune_lens.cot.inside import look_inside_chains
    from finetune_lens.directions import find_directions
    from finetune_lens.errors import GateFailed, InputError
    from finetune_lens.grafting import graft
    from finetune_lens.hybrid import Hybrid
    from finetune_lens.interpolation import interpolate
    from finetune_lens.intruders import find_intruders, scale_intruders
    from finetune_lens.masks import Graft
    from finetune_lens.outputs import compare_outputs
    from finetune_lens.pair import ModelPair, ModelSeries
    from finetune_lens.parts import join_parts
    from finetune_lens.patching import patch, trace
    from finetune_lens.probing import probe
    from finetune_lens.pruning import prune
    from finetune_lens.recovery import recovery_axis
    from finetune_lens.report import write_report
    from finetune_lens.representations import compare_representations
    from finetune_lens.results import load
    from finetune_lens.revival import revive
    from finetune_lens.task_vectors import compare_task_vectors
    from finetune_lens.updates import measure_updates


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_WHERE[name]}")
    value = module if name == _WHERE[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
