"""Which device to compute on."""

from typing import TYPE_CHECKING

from finetune_lens.errors import InputError

if TYPE_CHECKING:
    import torch


def choose(name: str) -> "torch.device":
    """`name` as a device; "auto" is the GPU when there is one.

    Raises:
        InputError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from None
    return device
