"""The k largest of a stream against a sort of everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lens.linalg import selection
from finetune_lens.linalg.selection import Cut, bin_of, kth_largest, largest, leading_counts, number_of, trailing_counts


def random(n, *, seed=0, values=None):
    """`n` numbers; with `values`, only so many different ones, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    if values:
        return torch.randint(values, (n,), generator=generator).float()
    return torch.randn(n, generator=generator).abs() * 10.0 ** -torch.randint(9, (n,), generator=generator)


def in_two_passes(chunks, k):
    """The k-th largest by its bits, and how many numbers of its size are among the k."""
    leading, rest = bin_of(sum(leading_counts(chunk) for chunk in chunks), k)
    trailing, ties = bin_of(sum(trailing_counts(chunk, leading) for chunk in chunks), rest)
    return number_of(leading, trailing), ties


@pytest.mark.parametrize("room", [0, 7, 1000, 1 << 22])
@pytest.mark.parametrize("values", [None, 5, 1])
@pytest.mark.parametrize("k", [1, 2, 99, 500, 501, 999, 1000])
def test_kth_largest_is_that_of_a_sort(k, values, room, monkeypatch):
    monkeypatch.setattr(selection, "ROOM", room)
    numbers = random(1000, values=values)
    ordered = numbers.sort(descending=True).values
    ties = int((ordered[:k] == ordered[k - 1]).sum())
    for pieces in (1, 3, 100, 1000):
        chunks = numbers.chunk(pieces)
        assert kth_largest(iter(chunks), k) == ordered[k - 1].item()
        assert selection._cut(iter(chunks), k) == Cut(ordered[k - 1].item(), ties)
    assert in_two_passes(numbers.chunk(3), k) == (ordered[k - 1].item(), ties)


@given(
    st.lists(st.lists(st.floats(0, width=32, allow_nan=False), max_size=9), min_size=1, max_size=5),
    st.integers(0, 50),
    st.integers(0, 10),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_numbers(lists, k, room):
    """Zeros, subnormals, infinities, empty chunks, k up to all of them; ties go to who comes first."""
    chunks = {str(i): torch.tensor(numbers, dtype=torch.float32) for i, numbers in enumerate(lists)}
    flat = torch.cat(list(chunks.values()))
    k = min(k, len(flat))
    before, selection.ROOM = selection.ROOM, room
    try:
        masks = largest(lambda: chunks.items(), k)
    finally:
        selection.ROOM = before
    first = sorted(range(len(flat)), key=lambda i: -flat[i].item())[:k]  # a stable sort
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[first] = True
    assert torch.equal(torch.cat(list(masks.values())), expected)
    if k:
        value, ties = in_two_passes(list(chunks.values()), k)
        assert value == flat.sort(descending=True).values[k - 1].item()
        assert ties == int((flat[first] == value).sum())


def test_masks_have_the_shapes_of_the_stream_and_exactly_k_entries():
    tensors = {"a": random(60, values=3).reshape(6, 10), "b": random(7, values=3, seed=1)}
    for k in (0, 1, 20, 40, 67):
        masks = largest(lambda: tensors.items(), k)
        assert {name: mask.shape for name, mask in masks.items()} == {n: t.shape for n, t in tensors.items()}
        assert sum(int(mask.sum()) for mask in masks.values()) == k


def test_little_is_held(monkeypatch):
    """Of a long stream no more than k and some room, whatever its length."""
    held = []
    monkeypatch.setattr(selection, "ROOM", 100)
    cat = torch.cat

    def watched(tensors, *rest):
        held.append(sum(map(len, tensors)))
        return cat(tensors, *rest)

    monkeypatch.setattr(torch, "cat", watched)
    kth_largest((random(50, seed=i) for i in range(400)), 10)
    assert len(held) > 1
    assert max(held) <= 10 + 100 + 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    numbers = random(300).to(dtype)
    ordered = numbers.sort(descending=True).values
    assert kth_largest(numbers.chunk(4), 17) == ordered[16].item()
    assert int(largest(lambda: [("x", numbers)], 17)["x"].sum()) == 17


@pytest.mark.parametrize(("k", "message"), [(0, "k is at least 1; found 0"), (4, "3 numbers, fewer than k = 4")])
def test_k_out_of_range(k, message):
    with pytest.raises(ValueError, match=message):
        kth_largest([torch.ones(2), torch.ones(1)], k)
