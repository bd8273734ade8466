"""Which heads do the task together, and does fine-tuning change them or only what they give?"""

from finetune_lens.circuits.circuit import Circuit, Group

__all__ = ["Circuit", "Group"]
