"""Tensors out of files, one at a time, and what each of them is.

`open_checkpoint` reads names, shapes and types; the numbers stay in the file until a tensor's `read()`. `lay_out` says
which matrix of which layer each tensor is, in the orientation (out, in).
"""

from finetune_lens.checkpoints.files import open_checkpoint
from finetune_lens.checkpoints.layout import Layout, Part, lay_out
from finetune_lens.checkpoints.stored import Checkpoint, LowRank, Stored

__all__ = ["Checkpoint", "Layout", "LowRank", "Part", "Stored", "lay_out", "open_checkpoint"]
