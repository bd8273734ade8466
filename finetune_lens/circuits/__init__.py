"""Which heads do the task together, and does fine-tuning change them or only what they give?

A circuit is groups of heads, each at a position. `find_circuit` looks for them by path patching, group by group from
the logits back, `trace_paths` measures the paths to any receivers, in both models of a pair; `evaluate_circuit` asks
how much of each model the circuit alone does, and whether it needs all of it; `compare_circuits` how much two have in
common; `learn_masks` what its groups carry (DCM); `attribute_edges` estimates all edges at once.

>>> Circuit({"reader": Group(-1, ((2, 0), (2, 1)))}).heads
{(2, 0), (2, 1)}
"""

from finetune_lens.circuits.circuit import Circuit, Group
from finetune_lens.circuits.comparison import compare_circuits
from finetune_lens.circuits.dcm import learn_masks
from finetune_lens.circuits.edges import attribute_edges
from finetune_lens.circuits.evaluation import evaluate_circuit, minimal_circuit
from finetune_lens.circuits.paths import PRESETS, PROCEDURES, Step, circuit_of, find_circuit, trace_paths

__all__ = [
    "PRESETS",
    "PROCEDURES",
    "Circuit",
    "Group",
    "Step",
    "attribute_edges",
    "circuit_of",
    "compare_circuits",
    "evaluate_circuit",
    "find_circuit",
    "learn_masks",
    "minimal_circuit",
    "trace_paths",
]
