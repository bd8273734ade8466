"""Which patches make up a sweep: a grid over layers, heads and positions, or named sets of sites."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from finetune_lens.errors import InputError
from finetune_lens.hooked.mentions import column_of, own_column
from finetune_lens.hooked.model import HookedModel
from finetune_lens.hooked.sites import HEADS, known, parse
from finetune_lens.hooked.sweep import Patch, Place, shape_of
from finetune_lens.prompts import Encoded, Prompt, encode, require_alignment

DIMS = ("layer", "head", "position")
# `blocks.3.attn.hook_z[7]@-1`: head 7 of layer 3 at the last position; `…@label:first`: at a mention of a field.
PLACE = re.compile(r"(?P<site>[\w.]+?)(?:\[(?P<head>\d+)\])?(?:@(?P<position>.+))?")
# Counted from the start or (negative) the end; or a mention, `FIELD:first` (see `mentions`). In a chat template the
# start is that of the prompt's own text, the end where the answer begins.
Position = int | str


@dataclass(frozen=True)
class Grid:
    """Patches in the order of their coordinates (the last dimension runs fastest)."""

    dims: tuple[str, ...]
    coords: dict[str, np.ndarray]
    patches: list[Patch]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.coords[dim]) for dim in self.dims)


@dataclass(frozen=True)
class Aligned:
    """Prompts (and their counterfactuals) padded so that corresponding positions share a column.

    Attributes:
        positions: the label of each column: counted from the start, or (negative) from the end, of all that is read.
        prompts, tokenizer: what was encoded, and by what.
        template: whether in a chat template.
    """

    clean: Encoded
    corrupt: Encoded | None
    positions: np.ndarray
    prompts: Sequence[Prompt]
    tokenizer: Any
    template: bool = False

    def columns(self, position: Position) -> int | tuple[int, ...]:
        """The column of a position; that of each example where they differ, as mentions in the clean prompts do.

        Raises:
            InputError: a prompt does not have it.
        """
        number = whole_number(position)
        if number is not None and not self.of_text(number):
            return self.column(number)
        found = tuple(
            column_of(prompt, self.clean, row, str(position), self.tokenizer)
            if number is None
            else own_column(prompt, self.clean, row, number)
            for row, prompt in enumerate(self.prompts)
        )
        return found[0] if len(set(found)) == 1 else found

    def of_text(self, position: Position) -> bool:
        """Whether the prompts are in a chat template and the position is one of their own text."""
        number = whole_number(position)
        return self.template and (number is None or number >= 0)

    def there(self, side: Encoded, position: Position) -> np.ndarray:
        """(example, pos): the columns that can be that position."""
        return (side.text_columns if self.of_text(position) else side.prompt_columns).numpy()

    def each(self, position: Position) -> np.ndarray:
        """(example,): the column of a position, as a token of every clean prompt and of its counterfactual.

        Raises:
            InputError: a prompt does not have it.
        """
        at = np.broadcast_to(self.columns(position), len(self.prompts))
        there = self.there(self.clean, position)
        if self.corrupt is not None:
            there = there & self.there(self.corrupt, position)
        for prompt, column, has in zip(self.prompts, at, there, strict=True):
            if not has[column]:
                raise InputError(f"prompt {prompt.id}: position {position} does not exist, it is shorter than others")
        return at

    def column(self, position: int) -> int:
        """The column of that label; negative ones count from the end of prompts of one length.

        Raises:
            InputError: no prompt has it, or it is not in one column.
        """
        found = np.flatnonzero(self.positions == position)
        if not len(found) and position < 0 <= self.positions[0]:
            if not bool(self.clean.prompt_columns[:, : len(self.positions)].all()):
                raise InputError(
                    f"position {position} counts from the end, and these prompts of different lengths are aligned at "
                    "their start; pass align='right' (--align right)"
                )
            found = np.flatnonzero(self.positions == position + len(self.positions))
        if not len(found):
            raise InputError(
                f"position {position} does not exist: the prompts have positions {self.positions[0]} to "
                f"{self.positions[-1]}"
            )
        return int(found[0])

    def tokens(self) -> np.ndarray:
        """(example, position): the clean prompts' tokens, "" elsewhere."""
        table = np.full(self.clean.ids.shape, "", dtype=object)
        for row, (mask, tokens) in enumerate(zip(self.clean.mask.numpy(), self.clean.tokens, strict=True)):
            table[row, mask] = tokens
        table[~self.clean.prompt_columns.numpy()] = ""
        return table[:, : len(self.positions)]


def aligned(
    prompts: Sequence[Prompt], tokenizer: Any, *, corrupted: bool, align: str = "error", whole: bool = False,
    template: bool = False, need_answer: bool = True,
) -> Aligned:  # fmt: skip
    """Tokenise prompts, and their counterfactuals if asked, so that corresponding positions share a column.

    Args:
        align: which positions correspond where lengths differ: "left" counts from the start, "right" from the end,
            "error" refuses.

    Raises:
        InputError: as `prompts.encode`; or prompts of different lengths and no alignment.
    """
    if align not in ("error", "left", "right"):
        raise InputError(f"align is one of error, left, right; found {align!r}")
    options: dict[str, Any] = {"template": template, "whole": whole, "need_answer": need_answer}
    options["padding"] = "right"
    clean = encode(prompts, tokenizer, **options)
    corrupt = encode(prompts, tokenizer, corrupt=True, **options) if corrupted else None
    require_alignment(prompts, clean, corrupt, align)
    sides = [side for side in (clean, corrupt) if side is not None]
    columns = max(int(side.prompt_columns.sum(1).max()) for side in sides)
    answer = max(int((side.mask & ~side.prompt_columns).sum(1).max()) for side in sides)
    width = columns + answer if align == "right" else max(side.ids.shape[1] for side in sides)
    if clean.ids.shape[1] != width:
        clean = encode(prompts, tokenizer, length=width, **options)
    if corrupt is not None and corrupt.ids.shape[1] != width:
        corrupt = encode(prompts, tokenizer, corrupt=True, length=width, **options)
    if align == "right":
        clean, corrupt = _ending_at(clean, columns), None if corrupt is None else _ending_at(corrupt, columns)
    else:
        columns = int(clean.prompt_columns.sum(1).max())
    ragged = bool((~clean.prompt_columns[:, :columns]).any())
    labels = np.arange(columns) - (columns if align == "right" and ragged else 0)
    return Aligned(clean, corrupt, labels, prompts, tokenizer, template)


def require_same_tokens(mine: Aligned, theirs: Aligned, prompts: Sequence[Prompt]) -> None:
    """Raise InputError where the two models' tokenizers do not read the prompts and answers alike."""
    one, other = mine.clean, theirs.clean
    for row, prompt in enumerate(prompts):
        pairs = ((getattr(e, name)[row] for e in (one, other)) for name in ("answers", "wrongs"))
        if one.tokens[row] != other.tokens[row] or not all(torch.equal(*pair) for pair in pairs):
            raise InputError(
                f"the tokenizers of base and tuned model read prompt {prompt.id} differently: {one.tokens[row]} and "
                f"{other.tokens[row]}; cross-model patching needs the same tokens on both sides (pass one --tokenizer)"
            )
    if not torch.equal(one.ids, other.ids):
        raise InputError("the tokenizers of base and tuned model give the same tokens different ids")


def whole_number(position: Position) -> int | None:
    """The position as a number, if it is one."""
    return int(position) if re.fullmatch(r"-?\d+", str(position)) else None


def _ending_at(encoded: Encoded, columns: int) -> Encoded:
    """The same, moved to the right so that every prompt (not its answer) ends at that column."""
    shift = columns - encoded.prompt_columns.sum(1)
    moved = {
        name: torch.stack([row.roll(by) for row, by in zip(getattr(encoded, name), shift.tolist(), strict=True)])
        for name in ("ids", "mask", "prompt_columns", "text_columns")
    }
    return replace(encoded, read_at=encoded.read_at + shift[:, None], **moved)


def make_grid(
    model: HookedModel,
    kind: str,
    where: Aligned,
    *,
    by: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    window: int = 1,
) -> Grid:
    """One patch for each combination of the dimensions in `by`; what is not in `by` is patched together.

    Args:
        by: of "layer", "head", "position"; by default layer × position, and layer × head for sites of heads.
        layers, heads, positions: which; by default all. The grid names positions by their place in all that is read:
            in a chat template those of the text by the number of the template's tokens before it and their own.
        window: layers patched together, centred on each layer.

    Raises:
        InputError: an unknown dimension, an empty list, a layer or position that does not exist.
    """
    headed = known(kind) in HEADS
    by = tuple(by) if by else ("layer", "head") if headed else ("layer", "position")
    if not set(by) <= set(DIMS) or len(set(by)) < len(by):
        raise InputError(f"by takes some of {', '.join(DIMS)}, each once; found {', '.join(by)}")
    if ("head" in by or heads is not None) and not headed:
        raise InputError(f"the site {kind!r} has no heads; expected one of {', '.join(HEADS)} for a grid over heads")
    if kind == "pattern" and ("position" in by or positions is not None):
        raise InputError("a pattern is patched as a whole: no positions for the site 'pattern'")
    if window < 1:
        raise InputError(f"a window has at least one layer; found {window}")
    for name, given in (("layers", layers), ("heads", heads), ("positions", positions)):
        if given is not None and not len(given):
            raise InputError(f"expected one or more {name}, or none given for all; found an empty list")
    layers = range(model.layers) if layers is None else list(layers)
    for layer in layers:
        model.require([kind], [layer])
    count = shape_of(model, kind, next(iter(layers)))[0] if headed else 0
    chosen: dict[str, Sequence[Any]] = {
        "layer": list(layers),
        "head": list(range(count)) if heads is None else list(heads),
        "position": where.positions.tolist() if positions is None else list(positions),
    }
    if positions is None:
        columns = {position: column for column, position in enumerate(chosen["position"])}
    else:
        columns = {}
        for position in positions:
            at = where.columns(position)
            if isinstance(at, tuple):
                raise InputError(
                    f"position {position} counts from the start of the texts, and these of different lengths are "
                    "aligned at their end; pass align='left' (--align left)"
                )
            columns[int(where.positions[at]) if where.of_text(position) else position] = at
        chosen["position"] = positions = list(columns)
    coords = {dim: np.array(chosen[dim]) for dim in by}
    patches = []
    for values in product(*(chosen[dim] for dim in by)):
        at = dict(zip(by, values, strict=True))
        first = at["layer"] - (window - 1) // 2 if "layer" in at else 0
        these = range(max(0, first), min(model.layers, first + window)) if "layer" in at else layers
        some_heads = [at["head"]] if "head" in at else [None] if heads is None else heads
        if "position" in at:
            some = [columns[at["position"]]]
        else:
            some = [None] if positions is None else [columns[p] for p in positions]
        patches.append(tuple(Place(kind, layer, head, c) for layer, head, c in product(these, some_heads, some)))
    return Grid(by, coords, patches)


def grid_of_sets(sets: Mapping[str, Sequence[str]], where: Aligned) -> Grid:
    """One patch for each named set of places, written `blocks.3.attn.hook_z[7]@-1` (head and position optional).

    A position may be a mention of a field, `@label:first`: then each example has its own.

    Raises:
        InputError: an empty set, or a place that cannot be read.
    """
    if not sets or not all(sets.values()):
        raise InputError("expected named sets of sites, each with one or more; found an empty one")
    patches = []
    for name, places in sets.items():
        read = []
        for place in places:
            found = PLACE.fullmatch(place)
            if found is None:
                raise InputError(
                    f"set {name!r}: {place!r} is no place; expected a site name with an optional [head] and @position, "
                    "such as 'blocks.3.attn.hook_z[7]@-1' or '…@label:first'"
                )
            kind, layer = parse(found["site"])
            column = None if found["position"] is None else where.columns(found["position"])
            read.append(Place(kind, layer, None if found["head"] is None else int(found["head"]), column))
        patches.append(tuple(read))
    return Grid(("set",), {"set": np.array(list(sets), dtype=object)}, patches)
