"""The k largest of very many numbers, exactly: no sort, and no list of them all.

`kth_largest` reads its chunks once and holds O(k) numbers; `largest` reads them a second time and says which ones they
are. Where k is a share of a whole model, O(k) is too much: `leading_counts` and `trailing_counts` find the same number
in two passes and constant memory, by the bits of float32, which are ordered as the numbers are.

>>> import torch
>>> kth_largest([torch.tensor([3.0, 1.0]), torch.tensor([4.0, 1.0, 5.0])], 2)
4.0
>>> largest(lambda: [("a", torch.tensor([2.0, 1.0])), ("b", torch.tensor([3.0, 2.0]))], 2)
{'a': tensor([ True, False]), 'b': tensor([ True, False])}
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ROOM = 1 << 22  # numbers held beside the k, before the smallest are thrown out
TRAILING = 20  # bits of a float32 ≥ 0 that the second pass counts; the first counts the 11 before them


@dataclass
class Cut:
    """The k largest of a stream: all that is above `value`, and the first `ties` of what equals it."""

    value: float
    ties: int

    def take(self, values: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Which of `values` are among the k. For the pieces of the stream in their order: ties taken are counted."""
        taken = values > self.value
        equal = values == self.value
        there = int(equal.sum())
        if there > self.ties:
            equal &= (equal.flatten().cumsum(0) <= self.ties).view_as(equal)
        self.ties -= min(self.ties, there)
        return taken | equal


def kth_largest(chunks: Iterable[Tensor], k: int) -> float:
    """The k-th largest of all numbers in `chunks`, counted with repetition.

    Args:
        chunks: tensors of any shape, numbers ≥ 0, no NaN; read once.
        k: from 1 to how many there are.

    Raises:
        ValueError: k is less than 1, or more than there are numbers.

    Memory: the numbers still possible, at most 2·k or k + 4 million. Cost: a comparison a number; the rare `topk`
    beside it is linear in what is held.
    """
    return _cut(chunks, k).value


def largest(stream: Callable[[], Iterable[tuple[str, Tensor]]], k: int) -> dict[str, Tensor]:
    """Where the k largest numbers are: by name, True at exactly k entries in all.

    Of numbers equal to the k-th largest, those that come first in the stream are taken.

    Args:
        stream: called twice; each time gives the same (name, tensor of numbers ≥ 0).
        k: as for `kth_largest`, or 0.
    """
    cut = _cut((values for _, values in stream()), k) if k else Cut(float("inf"), 0)
    return {name: cut.take(values) for name, values in stream()}


def _cut(chunks: Iterable[Tensor], k: int) -> Cut:
    if k < 1:
        raise ValueError(f"k is at least 1; found {k}")
    held: list[Tensor] = []
    count, floor = 0, None
    for chunk in chunks:
        values = chunk.flatten()
        if floor is not None:  # k numbers ≥ floor are held: another of its size changes nothing
            values = values[values > floor]
        held.append(values)
        count += len(values)
        if count > k + max(k, ROOM):
            held = [torch.cat(held).topk(k, sorted=False).values]
            count, floor = k, held[0].min()
    if count < k:
        raise ValueError(f"there are {count} numbers, fewer than k = {k}")
    values = torch.cat(held)
    value = values.topk(k, sorted=False).values.min()
    return Cut(value.item(), k - int((values > value).sum()))


def leading_counts(values: Float[Tensor, "*shape"]) -> Int[Tensor, " 2048"]:
    """How many of `values`, float32 and ≥ 0, have each pattern of leading bits. Counts of several tensors add up."""
    return torch.bincount(_bits(values) >> TRAILING, minlength=1 << (31 - TRAILING))


def trailing_counts(values: Float[Tensor, "*shape"], leading: int) -> Int[Tensor, " 1048576"]:
    """The same of the remaining bits, among those of `values` whose leading bits are `leading`."""
    bits = _bits(values)
    return torch.bincount(bits[bits >> TRAILING == leading] & ((1 << TRAILING) - 1), minlength=1 << TRAILING)


def bin_of(counts: Int[Tensor, " bins"], k: int) -> tuple[int, int]:
    """In which bin the k-th largest number is, and the how-manieth largest of that bin it is."""
    below = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(below, k))
    return len(counts) - 1 - at, k - int(below[at] - counts.flip(0)[at])


def number_of(leading: int, trailing: int) -> float:
    """The float32 with these bits."""
    return torch.tensor((leading << TRAILING) | trailing, dtype=torch.int32).view(torch.float32).item()


def _bits(values: Tensor) -> Tensor:
    return values.flatten().contiguous().view(torch.int32)
