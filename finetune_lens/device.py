"""Which device to compute on, and with how many threads."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from finetune_lens.errors import InputError

if TYPE_CHECKING:
    import torch

THREADS_FROM = 512  # order of a matrix from which decompositions gain from several threads
SIDE_BY_SIDE_BELOW = 1024  # and below which several matrices at once gain more


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
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected cpu, cuda or mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from None
    return device


@contextmanager
def threads_for(order: int) -> Iterator[None]:
    """One thread for small matrices: they gain nothing from more, and on a busy machine lose a factor of ten."""
    import torch

    if order >= THREADS_FROM:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _pools().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


def side_by_side(order: int, device: "torch.device") -> int:
    """How many matrices up to this order to work on at once: one a core while several threads would help none of them.

    A matrix of order 768 on two threads takes about as long as on one (benchmarks/spectra.py).
    """
    if order >= SIDE_BY_SIDE_BELOW or device.type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pools() -> Any:
    """The thread pools of the BLAS libraries under numpy and scipy."""
    import scipy.linalg  # noqa: F401  (loads the library that is to be found)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
