"""Mean ablation: what some heads, at some columns, do alone, and what the others do without them.

Whatever is not kept has its z replaced by the mean of that head at that column over a reference set of prompts. A
column of which no head is kept then depends on its own token alone, whatever is kept elsewhere: the keys and values of
an example with every head ablated are computed once and serve all circuits. A circuit's own columns are computed from
left to right, each like the next token of a text whose keys and values are known; rows that agree up to a column share
it.

Cost of a circuit and example: its columns once through the blocks, however long the prompt; beside two full forward
passes an example for all circuits together, with everything and with nothing kept. Each batch of examples is also run
in full with every head of those columns kept: a model on which the short way were wrong is found out and run in full
instead, one forward pass a circuit.
"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from finetune_lens.errors import InputError
from finetune_lens.hooked.model import Edit, HookedModel
from finetune_lens.hooked.reentry import Prefix
from finetune_lens.hooked.sites import site_name
from finetune_lens.hooked.sweep import (
    LOGITS,
    Astray,
    Place,
    Side,
    Swept,
    deviation_of,
    hash_of,
    reentering,
    sweep,
    tokens_at_once,
)
from finetune_lens.metrics import score
from finetune_lens.prompts import Encoded

NUMBERS = 1 << 24  # keys and values of a layer that are gathered at once
Means = list[Tensor]  # by layer, (column, head, d_head)


@dataclass
class Kept:
    """What circuits score alone.

    Attributes:
        values: (circuit, example).
        nothing: (example,), with every head ablated everywhere.
        deviation: the largest difference of a logit between the short way and a full run.
        notes: what a reader should know.
    """

    values: np.ndarray
    nothing: np.ndarray
    deviation: float = 0.0
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def mean_z(model: HookedModel, prompts: Encoded, *, batch_size: int | None = None) -> Means:
    """The mean z of every head at each column over the prompts that have a token there; 0 where none has.

    Cost: one forward pass a prompt.
    """
    layers = range(model.layers)
    model.require(["z"], layers)
    names = [site_name("z", layer) for layer in layers]
    totals: list[Any] = [0.0] * len(names)
    size = batch_size or 16
    for begin in range(0, len(prompts), size):
        part = prompts.rows(slice(begin, begin + size))
        run = model.run(part.ids, mask=part.mask, capture=names, logits_at=part.read_at)
        for layer, name in enumerate(names):
            z = run.cache[name]
            there = part.prompt_columns.to(z.device)[:, :, None, None]
            totals[layer] += torch.where(there, z, 0).to(torch.promote_types(z.dtype, torch.float32)).sum(0)
    counts = prompts.prompt_columns.sum(0).clamp_min(1)[:, None, None]
    return [total / counts.to(total) for total in totals]


def knock_out(
    model: HookedModel, prompts: Encoded, means: Means, sets: Sequence[Sequence[Place]], *,
    batch_size: int | None = None, full: bool = False, progress: bool = True, label: str = "knock-outs",
    partial: Path | None = None, arguments: dict[str, Any] | None = None,
) -> Swept:  # fmt: skip
    """The whole model with sets of heads (places at z) ablated: `sweep` with every head's means as the donor.

    Its `recipient` is the model, its `donor` the model with every head ablated everywhere.
    """

    def ablated(examples: np.ndarray) -> list[Edit]:
        return _everything(means)

    donor = Side(model, prompts, ablated)
    return sweep(
        Side(model, prompts), donor, [tuple(places) for places in sets], batch_size=batch_size, full=full,
        progress=progress, label=label, partial=partial, arguments=arguments,
    )  # fmt: skip


def keep_only(
    model: HookedModel,
    prompts: Encoded,
    means: Means,
    columns: Int[np.ndarray, "slot example"],
    kept: Bool[np.ndarray, "circuit slot layer head"],
    *,
    metric: str = "accuracy",
    batch_size: int | None = None,
    full: bool = False,
    progress: bool = True,
    label: str = "circuits",
    partial: Path | None = None,
    arguments: dict[str, Any] | None = None,
) -> Kept:
    """The metric of every circuit on each example, all other heads ablated at all columns.

    Args:
        columns: where the heads of each slot are kept; slots may share a column.
        kept: the heads of each circuit that are kept in each slot.
        batch_size: examples recorded at once (16).
        full: one forward pass a circuit (the oracle).
        partial, arguments: as for `sweep`.

    Raises:
        InputError: answers of several tokens, heads that cannot be told apart.
    """
    different, back = np.unique(kept.reshape(len(kept), -1), axis=0, return_inverse=True)
    circuits = _Circuits(
        model, prompts, means, columns, different.reshape(-1, *kept.shape[1:]), metric, batch_size, partial,
        arguments or {},
    )  # fmt: skip
    try:
        found = circuits.run(progress, label, full=full)
    except Astray as reason:
        found = circuits.run(progress, label, full=True)
        found.notes.append(f"the short way was not taken: {reason}; every circuit was one full forward pass")
    found.values = found.values[back.reshape(-1)]
    return found


class _Circuits:
    def __init__(
        self, model: HookedModel, prompts: Encoded, means: Means, columns: np.ndarray, kept: np.ndarray, metric: str,
        batch_size: int | None, partial: Path | None, arguments: dict[str, Any],
    ):  # fmt: skip
        if prompts.read_at.shape[1] > 1:
            raise InputError("circuits are scored by the first token of an answer; found answers of several tokens")
        model.require(["z"], range(model.layers))
        self.model, self.prompts, self.means, self.metric = model, prompts, means, metric
        self.columns, self.kept = columns, kept
        self.partial, self.arguments = partial, arguments
        self.size = min(batch_size or 16, len(prompts))

    def run(self, progress: bool, label: str, *, full: bool) -> Kept:
        from tqdm.auto import tqdm

        store = None
        if self.partial is not None:
            from finetune_lens.stream import Store

            digest = hashlib.sha256(repr(self.kept.shape).encode() + self.kept.tobytes() + self.columns.tobytes())
            facts = {"circuits": digest.hexdigest(), "prompts": hash_of(self.prompts), "batch": self.size}
            facts |= {"metric": self.metric, "arguments": self.arguments}
            analysis = self.arguments.get("analysis", "ablation") + ("-full" if full else "")
            store = Store(self.partial, "", {"analysis": analysis} | facts)
        parts = []
        total = len(self.kept) * len(self.prompts)
        with tqdm(total=total, desc=label, unit="run", disable=not progress, dynamic_ncols=True) as bar:
            for begin in range(0, len(self.prompts), self.size):
                done = store.get(str(begin)) if store else None
                if done is None:
                    done = _Batch(self, slice(begin, begin + self.size)).measured(full=full)
                    if store:
                        store.put(str(begin), done)
                parts.append(done)
                bar.update(done["values"].size)
        values, nothing = (np.concatenate([part[name] for part in parts], -1) for name in ("values", "nothing"))
        return Kept(values, nothing, max(float(part["deviation"]) for part in parts))


class _Batch:
    """Some examples, run with nothing kept, and the circuits on top of that."""

    def __init__(self, circuits: _Circuits, rows: slice):
        self.model, self.means, self.metric, self.kept = (
            circuits.model, circuits.means, circuits.metric, circuits.kept,
        )  # fmt: skip
        self.prompts, self.slots = circuits.prompts.rows(rows), circuits.columns[:, rows]
        # Each example's columns in their order, −1 behind the last; and the slots that are there.
        unique = [np.unique(column) for column in self.slots.T]
        self.order = np.full((len(unique), max(map(len, unique))), -1)
        for example, there in enumerate(unique):
            self.order[example, : len(there)] = there
        self.slots_at = self.order[:, :, None] == self.slots.T[:, None]  # (example, step, slot)
        self.deviation = 0.0

    def measured(self, *, full: bool) -> dict[str, np.ndarray]:
        ids, mask, read_at = self.prompts.ids, self.prompts.mask, self.prompts.read_at
        many = len(self.prompts)
        run = self.model.run(ids, mask=mask, edits=_everything(self.means), logits_at=read_at, keys_values=not full)
        every = np.tile(np.arange(many), len(self.kept)), np.repeat(np.arange(len(self.kept)), many)
        if full:
            parts = [self._in_full(*rows) for rows in _cut(*every, self._rows_at_once(ids.shape[1]))]
            values = np.concatenate(parts)
        else:
            with reentering(self.model):
                values = self._all(run.keys_values, run.logits)
        nothing = self._scored(run.logits, np.arange(many))
        values = values.reshape(len(self.kept), many)
        return {"values": values, "nothing": nothing, "deviation": np.array(self.deviation)}

    def _all(self, keys_values: list[tuple[Tensor, Tensor]], nothing: Tensor) -> np.ndarray:
        """(circuit · example): the short way, after one circuit with all heads that is held against a full run."""
        kept = self.kept
        self.kept = np.ones((1, *kept.shape[1:]), bool)
        example = np.arange(len(self.prompts))
        whole = self._logits_in_full(example, np.zeros_like(example))
        short = self._logits(example, np.zeros_like(example), keys_values, nothing)
        self.deviation = deviation_of(short, whole, self.model)
        self.kept = kept
        # Example by example, so that rows with the same beginning meet.
        pairs = np.repeat(example, len(kept)), np.tile(np.arange(len(kept)), len(example))
        parts = []
        for rows in _cut(*pairs, self._rows_at_once(1, keys_values)):
            parts.append(self._scored(self._logits(*rows, keys_values, nothing), rows[0]))
        return np.concatenate(parts).reshape(len(example), -1).T

    def _rows_at_once(self, columns: int, keys_values: Sequence[tuple[Tensor, Tensor]] = ()) -> int:
        """How many rows of so many columns to compute in one pass."""
        width = self.prompts.ids.shape[1]
        most = max(8, LOGITS // self.model.vocabulary)
        if keys_values:
            most = min(most, max(1, NUMBERS // max(2 * x[0, :, 0].numel() * width for x, _ in keys_values)))
        return max(1, min(most, tokens_at_once(self.model, width) // columns))

    def _scored(self, logits: Tensor, example: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(example)
        found = score(logits, self.prompts.answers[rows], self.prompts.wrongs[rows], only=self.metric)
        return found[self.metric].double().cpu().numpy()

    def _in_full(self, example: np.ndarray, circuit: np.ndarray) -> np.ndarray:
        return self._scored(self._logits_in_full(example, circuit), example)

    def _logits_in_full(self, example: np.ndarray, circuit: np.ndarray) -> Tensor:
        """(row, 1, vocab): one forward pass over whole prompts."""
        part = self.prompts.rows(torch.from_numpy(example))
        at = np.arange(len(example))
        stay = np.zeros((len(example), part.ids.shape[1], *self.kept.shape[2:]), bool)  # (row, column, layer, head)
        for slot, column in enumerate(self.slots[:, example]):
            stay[at, column] |= self.kept[circuit, slot]
        edits = [
            (site_name("z", layer), _ablating(torch.from_numpy(stay[:, :, layer]), mean[None]))
            for layer, mean in enumerate(self.means)
        ]
        return self.model.run(part.ids, mask=part.mask, edits=edits, logits_at=part.read_at).logits

    def _logits(
        self, example: np.ndarray, circuit: np.ndarray, keys_values: list[tuple[Tensor, Tensor]], nothing: Tensor
    ) -> Tensor:
        """(row, 1, vocab) at the column that is read: column after column of the circuits."""
        logits = nothing[torch.from_numpy(example).to(nothing.device)].clone()
        read_at = self.prompts.read_at.numpy()[:, 0]
        passes: list[_Column] = []
        same: list[np.ndarray] = []  # by column: which of its computed rows is each row's
        rows, beginning = np.arange(len(example)), example
        for step in range(self.order.shape[1]):
            there = self.order[example[rows], step] >= 0
            rows, beginning = rows[there], beginning[there]
            if not len(rows):
                break
            slots = self.slots_at[example[rows], step]  # (row, slot)
            stay = (self.kept[circuit[rows]] & slots[:, :, None, None]).any(1)  # (row, layer, head)
            bits = np.packbits(stay.reshape(len(rows), -1), axis=1)
            agreeing = np.concatenate([beginning.astype("<i4")[:, None].view(np.uint8), bits], 1)
            _, first, beginning = np.unique(agreeing, axis=0, return_index=True, return_inverse=True)
            beginning = beginning.reshape(-1)
            column = self.order[example[rows[first]], step]
            earlier = [(done, which[rows[first]]) for done, which in zip(passes, same, strict=True)]
            now = _Column(self, example[rows[first]], column, stay[first], keys_values, earlier)
            read = np.flatnonzero(column == read_at[example[rows[first]]])
            found = now.logits(torch.from_numpy(read))
            place = np.full(len(first), -1)
            place[read] = np.arange(len(read))
            reading = place[beginning] >= 0
            logits[torch.from_numpy(rows[reading])] = found[torch.from_numpy(place[beginning[reading]])].to(logits)
            which = np.full(len(example), -1)
            which[rows] = beginning
            passes.append(now)
            same.append(which)
        return logits


class _Column:
    """One column of some rows, behind their examples' keys and values with nothing kept, and their own earlier ones."""

    def __init__(
        self, batch: _Batch, example: np.ndarray, column: np.ndarray, stay: np.ndarray,
        keys_values: list[tuple[Tensor, Tensor]], earlier: list[tuple["_Column", np.ndarray]],
    ):  # fmt: skip
        self.model, self.means, self.prompts = batch.model, batch.means, batch.prompts
        self.example, self.column = torch.from_numpy(example), torch.from_numpy(column)
        self.stay, self.keys_values, self.earlier = torch.from_numpy(stay), keys_values, earlier
        self.start = int(column.max())  # rows end together: shorter ones have padding before them
        self.columns = self.column[:, None] + torch.arange(-self.start, 1)
        _, first, which = np.unique(example, return_index=True, return_inverse=True)
        self.first, self.which = torch.from_numpy(first), torch.from_numpy(which)
        self.own: list[tuple[Tensor, Tensor]] = [()] * self.model.layers  # by layer: (row, kv_head, d_head) of both

    @torch.no_grad()
    def logits(self, read: Int[Tensor, " n"]) -> Float[Tensor, "n 1 vocab"]:
        """Run the column; the logits of the rows that are read."""
        with ExitStack() as stack:
            stack.enter_context(self.model.side())
            for layer, mean in enumerate(self.means):
                touch = _ablating(self.stay[:, None, layer], mean[self.column.to(mean.device)][:, None])
                stack.enter_context(self.model.hook("z", layer, touch, changed=True))
            unembed = self.model.module.get_output_embeddings()
            hook = unembed.register_forward_pre_hook(lambda module, args: (args[0][read.to(args[0].device)],))
            stack.callback(hook.remove)
            return self.model.module(**self._inputs()).logits

    def _inputs(self) -> dict[str, Any]:
        device, example, inside = self.model.device, self.example, self.columns >= 0
        seen = inside & self.prompts.mask[example[:, None], self.columns.clamp_min(0)]
        ids = self.prompts.ids[example, self.column][:, None].to(device)
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": _Known(self), "use_cache": True}
        if not bool(seen.all()):
            inputs["attention_mask"] = seen.long().to(device)
        if self.model.takes("position_ids"):
            inputs["position_ids"] = self.prompts.position_ids[example, self.column][:, None].to(device)
        return inputs

    def behind(self, layer: int, part: int, new: Tensor) -> Tensor:
        """Keys (part 0) or values (1) of the layer, (row, kv_head, pos, d_head), the row's own at their columns."""
        known, device = self.keys_values[layer][part][self.example[self.first]], new.device
        at = self.columns[self.first].clamp_min(0).to(known.device)
        here = known.gather(2, at[:, None, :, None].expand(-1, known.shape[1], -1, known.shape[3]))
        joined = here.to(device)[self.which.to(device)]  # whole examples: much faster than column by column
        joined[:, :, -1] = new[:, :, 0]
        row = torch.arange(len(new), device=device)
        for done, which in self.earlier:
            at = torch.from_numpy(which)
            place = (done.column[at] - self.column + self.start).to(device)
            joined[row, :, place] = done.own[layer][part][at.to(device)]
        return joined


class _Known(Prefix):
    """Stands where a key/value cache is expected."""

    def __init__(self, around: _Column):
        self._pass = around

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._pass.own[layer] = (keys[:, :, 0], values[:, :, 0])
        return tuple(self._pass.behind(layer, part, new) for part, new in enumerate((keys, values)))


def _everything(means: Means) -> list[Edit]:
    """Every head ablated at every column."""
    return [(site_name("z", layer), lambda x, mean=mean: mean.to(x).expand_as(x)) for layer, mean in enumerate(means)]


def _ablating(stay: Bool[Tensor, "row pos head"], mean: Float[Tensor, "#row pos head d_head"]) -> Any:
    """z where it stays, else its mean."""

    def touch(z: Tensor) -> Tensor:
        return torch.where(stay.to(z.device)[..., None], z, mean.to(z))

    return touch


def _cut(example: np.ndarray, circuit: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(example[i : i + count], circuit[i : i + count]) for i in range(0, len(example), count)]
