"""What a checkpoint is made of: tensors that are still in their file, and low-rank updates."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Stored:
    """A tensor not yet read: its shape and type are known, `read()` gives the numbers as they are stored.

    Each `read` opens the file anew and returns a view of mapped pages where the format allows it: an open handle keeps
    every page it has read resident, so one handle a tensor is what bounds the memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Stored":
        """A tensor that is already in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True)
class LowRank:
    """A factored update, `scale · left @ right`, of a matrix (out, in): left (out, r), right (r, in)."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def dense(self, dtype: torch.dtype = torch.float64, device: "torch.device | str" = "cpu") -> torch.Tensor:
        """The update as a matrix (out, in), multiplied out in `dtype`. Cost: 2·out·in·r flops."""
        return self.scale * (self.left.to(device, dtype) @ self.right.to(device, dtype))


@dataclass
class Checkpoint:
    """Tensors by the names the file gives them, wrapper prefixes stripped.

    A PEFT adapter has `factors` (module name → its update) and, where modules were trained whole, `tensors` that
    replace the base's; an ordinary checkpoint has `tensors` alone.
    """

    source: str
    tensors: dict[str, Stored]
    config: dict[str, Any] | None = None
    factors: Mapping[str, Callable[[], LowRank]] | None = None
    notes: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)  # for the record: files, revision
    fingerprint: str = ""  # changes when the files change
    module: Any = None  # the model itself, where it came as one

    @property
    def is_adapter(self) -> bool:
        return self.factors is not None


WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.)+")
INFIXES = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")


def unwrapped(name: str) -> str:
    """`name` without what DataParallel, torch.compile, FSDP and PEFT put in front of and inside it."""
    return INFIXES.sub("", WRAPPERS.sub("", name))
