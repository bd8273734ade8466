"""Activations of many texts at many sites, a row a text (or a token): what probes and comparisons are made from.

One forward pass a text, which ends at the last site that is asked for: no unembedding, no logits. What is kept of an
activation is the columns that are read, or their mean. Rows stay in memory up to a budget of bytes; beyond it they
are written to files that are mapped, and a collection that has a folder of its own continues after an interruption.

>>> import torch, transformers
>>> from finetune_lens.hooked.model import HookedModel
>>> from finetune_lens.prompts import Encoded
>>> sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 16}
>>> config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
>>> model = HookedModel(transformers.GPT2LMHeadModel(config).eval())
>>> ids, all_of_it, none = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool), torch.full((1, 0), -1)
>>> text = Encoded(ids, all_of_it, torch.tensor([[2]]), none[..., None], none, all_of_it, all_of_it, [["a", "b", "c"]])
>>> found = collect(model, text, ["blocks.1.hook_resid_post"], columns=all_of_it, pool="each")
>>> found.values("blocks.1.hook_resid_post").shape, found.example.tolist(), found.column.tolist()
((3, 8), [0, 0, 0], [0, 1, 2])
"""

import hashlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from finetune_lens.errors import InputError
from finetune_lens.files import whole_file
from finetune_lens.hooked.mentions import column_of, own_column
from finetune_lens.hooked.model import HookedModel
from finetune_lens.hooked.sites import parse
from finetune_lens.hooked.sweep import shape_of
from finetune_lens.prompts import Encoded, Prompt
from finetune_lens.stream import Store

BUDGET = 2 << 30  # bytes of rows held in memory
TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 16384}  # columns in a forward pass

Pool = Literal["mean", "each"]


@dataclass(frozen=True, eq=False)
class Features:
    """Rows of activations, in the order of the examples.

    Attributes:
        example: (row,) which example.
        column: (row,) the column that was read; −1 where the row is the mean of several.
        arrays: site → (row, d_model), or (row, head, d_head) at sites of heads; float32, in memory or mapped.
    """

    example: np.ndarray
    column: np.ndarray
    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.example)

    def values(self, site: str) -> np.ndarray:
        """The rows of a site; KeyError where it was not collected."""
        return self.arrays[site]


def collect(
    model: HookedModel,
    encoded: Encoded,
    sites: Sequence[str],
    *,
    columns: Bool[Tensor, "example pos"],
    pool: Pool = "mean",
    folder: Path | None = None,
    budget: int = BUDGET,
    batch_size: int | None = None,
    tick: Callable[[int], object] | None = None,
) -> Features:
    """Run every text once and keep the activations at some sites.

    Args:
        encoded: the texts, padded on either side.
        sites: full names (`blocks.3.hook_resid_post`, `blocks.0.attn.hook_z` …); any but patterns.
        columns: which columns of each text are read.
        pool: "mean": a row an example, the mean over its columns. "each": a row for every column read.
        folder: where rows are written, a folder for this model and these texts alone; when the call is repeated after
            an interruption, texts that are done there are not run again (of models that came from files). What an
            earlier call with other arguments left there is removed.
        budget: bytes of rows held in memory where no folder is given; more are written to a temporary folder, which
            is removed with the result.
        batch_size: texts at once; by default as many as a forward pass gains from. Halved where memory runs out.
        tick: called with the number of texts done, after each batch.

    Raises:
        InputError: a site that is unknown or not in the model, a column that is padding, a text of which none is read.

    Cost: a forward pass up to the last site, in batches of about one length; 4 bytes × rows × width × sites.
    """
    names = list(dict.fromkeys(sites))
    shapes = {name: shape_at(model, name) for name in names}
    columns = columns.cpu()
    _require(encoded, columns, pool)
    example, column = (index.numpy() for index in columns.nonzero(as_tuple=True))
    counts = columns.sum(1).numpy()
    if pool == "mean":
        column = np.where(counts == 1, columns.int().argmax(1).numpy(), -1)
        example, counts = np.arange(len(counts)), np.ones_like(counts)
    where, done = _opened(folder, model, encoded, names, columns, pool)
    size = 4 * len(example) * sum(int(np.prod(shape)) for shape in shapes.values())
    temporary = where is None and size > budget
    if temporary:
        where = Path(tempfile.mkdtemp(prefix="finetune_lens-"))
    files = {name: None if where is None else where / f"{name}.npy" for name in names}
    if where is not None and not any(file.exists() for file in files.values()):
        _require_space(where, size)
    arrays = {name: _array(files[name], (len(example), *shape)) for name, shape in shapes.items()}
    found = Features(example, column, arrays)
    if temporary:
        weakref.finalize(found, shutil.rmtree, where, ignore_errors=True)
    starts = np.concatenate([[0], np.cumsum(counts)])
    lengths = encoded.mask.sum(1)
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[~torch.from_numpy(np.array(done))[order]]
    if tick is not None and len(order) < len(encoded):
        tick(len(encoded) - len(order))
    limit, start = batch_size or len(encoded), 0
    while start < len(order):
        longest = int(lengths[order[start]])
        count = min(limit, batch_size or max(1, TOKENS.get(model.device.type, TOKENS["cpu"]) // longest))
        index = order[start : start + count]
        try:
            rows = _batch(model, encoded, names, columns, index, pool)
        except torch.OutOfMemoryError:
            if len(index) == 1:
                raise
            torch.cuda.empty_cache()
            limit = len(index) // 2
            continue
        at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in index.numpy()])
        for name, values in rows.items():
            arrays[name][at] = values.numpy()
        done[index.numpy()] = True
        start += len(index)
        if tick is not None:
            tick(len(index))
    return found


def columns_at(
    position: int | str, prompts: Sequence[Prompt], encoded: Encoded, tokenizer: Any, *, template: bool = False
) -> Bool[Tensor, "example pos"]:
    """The columns of a position in every prompt.

    Args:
        position: "last", the prompt's last token; a number, counted from its start or (negative) its end; "mean", all
            tokens of its own text; "mean:N", its last N tokens; a mention of a field (see `mentions`),
            `label:first+2`.
        template: the prompts are in a chat template. Then numbers from 0 on, "mean:N" and mentions are of the own text
            alone; "last" and negative numbers count back from where the answer begins.

    Raises:
        InputError: a prompt does not have it.
    """
    found = torch.zeros_like(encoded.mask)
    whole = re.fullmatch(r"mean(?::([1-9]\d*))?", str(position))
    for row, prompt in enumerate(prompts):
        own = (encoded.mask[row] & encoded.prompt_columns[row]).nonzero()[:, 0]
        if whole is not None and whole[1] is None:
            found[row] = encoded.text_columns[row]
            continue
        if whole is not None:
            at: Any = range(-int(whole[1]), 0)
            own = encoded.text_columns[row].nonzero()[:, 0] if template else own
        elif position == "last" or isinstance(position, int) or re.fullmatch(r"-?\d+", position):
            at = [-1 if position == "last" else int(position)]
            if template and at[0] >= 0:
                found[row, own_column(prompt, encoded, row, at[0])] = True
                continue
        else:
            found[row, column_of(prompt, encoded, row, str(position), tokenizer)] = True
            continue
        if not -len(own) <= at[0] < len(own):
            raise InputError(f"prompt {prompt.id}: position {position} does not exist, it has {len(own)} tokens")
        found[row, own[list(at)]] = True
    return found


def shape_at(model: HookedModel, name: str) -> tuple[int, ...]:
    """(d_model,), or (head, d_head) at sites of heads.

    Raises:
        InputError: a site that is unknown, not in the model, or a pattern.
    """
    kind, layer = parse(name)
    if kind == "pattern":
        raise InputError(f"{name} is not a vector at a token; expected another site than a pattern")
    model.require([kind], [layer])
    shape = shape_of(model, kind, layer)
    if kind in ("z", "q", "k", "v"):
        return shape
    return (*shape[:-1], model.module.config.get_text_config().hidden_size)  # embeddings may be narrower


def _require(encoded: Encoded, columns: Tensor, pool: str) -> None:
    """Raise InputError unless these columns can be read."""
    if pool not in ("mean", "each"):
        raise InputError(f"pool is mean or each; found {pool!r}")
    if columns.shape != encoded.ids.shape:
        raise InputError(f"columns: expected {tuple(encoded.ids.shape)} as the ids, found {tuple(columns.shape)}")
    padding = (columns & ~encoded.mask).any(1).nonzero()[:, 0].tolist()
    if padding:
        raise InputError(f"text {padding[0] + 1}: a column to be read is padding; expected columns that hold tokens")
    empty = (~columns.any(1)).nonzero()[:, 0].tolist()
    if empty and (pool == "mean" or len(empty) == len(encoded)):
        raise InputError(f"text {empty[0] + 1}: none of its columns is read; expected one or more")


def _opened(
    folder: Path | None, model: HookedModel, encoded: Encoded, names: list[str], columns: Tensor, pool: str
) -> tuple[Path | None, np.ndarray]:
    """Where rows are written, and which examples are done there, (example,) bool, kept in a file."""
    if folder is None:
        return None, np.zeros(len(encoded), bool)
    state = hashlib.sha256()
    for part in (encoded.ids, encoded.mask, columns):
        state.update(part.contiguous().numpy().tobytes())
    facts = {
        "analysis": "features", "model": model.describe() | {"adapted": model.adapted}, "sites": names, "pool": pool,
        "texts": [list(encoded.ids.shape), state.hexdigest()],
    }  # fmt: skip
    place = Store(folder, model.fingerprint, facts).folder
    if not model.fingerprint:  # a model in memory may have changed since
        (place / "done.npy").unlink(missing_ok=True)
    return place, _array(place / "done.npy", (len(encoded),), kind=np.bool_)


def _array(path: Path | None, shape: tuple[int, ...], kind: type = np.float32) -> np.ndarray:
    """In memory, or mapped: as it is in the file, or new and 0."""
    if path is None:
        return np.empty(shape, kind)
    if path.exists():
        return np.lib.format.open_memmap(path, mode="r+")
    with whole_file(path) as new:
        return np.lib.format.open_memmap(new, mode="w+", dtype=kind, shape=shape)


def _require_space(folder: Path, size: int) -> None:
    """Raise InputError where the disk cannot hold the rows: writing into a map of a full disk ends the process."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"the activations are {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; choose another folder "
            "(--out, or TMPDIR), fewer texts or fewer sites"
        )


class _Enough(Exception):
    """Every site has been seen."""


def _batch(
    model: HookedModel, encoded: Encoded, names: list[str], columns: Tensor, index: Int[Tensor, " batch"], pool: str
) -> dict[str, Tensor]:
    """Rows of some examples by site, on the CPU."""
    ids, mask, read = encoded.ids[index], encoded.mask[index], columns[index]
    used = mask.any(0).nonzero()[:, 0]
    width = slice(int(used[0]), int(used[-1]) + 1)
    ids, mask, read = ids[:, width], mask[:, width], read[:, width]
    kept: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(model.side())
        for name in names:
            kind, layer = parse(name)
            stack.enter_context(model.hook(kind, layer, _keeper(kept, name, read, pool, len(names)), False))
        stack.enter_context(suppress(_Enough))
        model.module(**model.inputs(ids, mask))
    return {name: values.cpu() for name, values in kept.items()}


def _keeper(
    kept: dict[str, Tensor], name: str, read: Bool[Tensor, "batch pos"], pool: str, count: int
) -> Callable[[Tensor], Tensor]:
    def touch(x: Tensor) -> Tensor:
        if x.ndim == 2:  # some modules are given (batch · pos, d_model)
            x = x.unflatten(0, read.shape)
        rows, columns = (at.to(x.device) for at in read.nonzero(as_tuple=True))
        picked = x[rows, columns].float()
        if pool == "mean" and len(picked) > len(read):
            flat = torch.segment_reduce(picked.flatten(1), "mean", lengths=read.sum(1).to(x.device))
            picked = flat.view(-1, *picked.shape[1:])
        kept[name] = picked
        if len(kept) == count:
            raise _Enough
        return x

    return touch
