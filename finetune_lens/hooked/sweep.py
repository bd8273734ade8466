"""The sweep engine: many patches of a recipient run with activations of a donor run, each example kept.

A patch is a set of places set together. Recipient and donor are (model, prompts): the same model and other prompts is
activation patching, another model and the same prompts CMAP. Every batch carries unpatched rows, and effects are taken
against them, for sums in batches differ in their last bits; those rows are also compared with the recorded full run,
so that a model on which re-entry were wrong is found out and run in full instead, one forward pass a patch.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune_lens.errors import InputError
from finetune_lens.hooked.model import Edit, HookedModel, patterns_visible, result_of
from finetune_lens.hooked.reentry import BEHIND_ATTENTION, Change, Recording, Rows, record, resume
from finetune_lens.hooked.sites import HEADS, known, site_name
from finetune_lens.metrics import score
from finetune_lens.prompts import Encoded

UNIT = 2048  # rows that are computed, kept and counted as one
LOGITS = 1 << 25  # numbers of a batch's logits beyond which nothing is gained either
TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 16384}  # columns a batch beyond which nothing is gained
# How far an unpatched row may be from the full run, relative to the largest logit, before re-entry is given up.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Place:
    """Where to patch: a kind of site at a layer, one head or all, one column (or each example's own) or the prompt."""

    kind: str
    layer: int
    head: int | None = None
    column: int | tuple[int, ...] | None = None

    def columns(self, examples: np.ndarray) -> np.ndarray:
        """(example,): its column in each of these examples."""
        return np.broadcast_to(self.column, len(examples)) if self.shared else np.array(self.column)[examples]

    @property
    def shared(self) -> bool:
        """Whether its column, or all of them, is the same in every example."""
        return not isinstance(self.column, tuple)

    @property
    def first(self) -> int:
        """The first column that it sets in any example."""
        return 0 if self.column is None else int(np.min(self.column))


Patch = tuple[Place, ...]


@dataclass(frozen=True)
class Side:
    """A run: a model on prompts, with edits (of some examples) that belong to it."""

    model: HookedModel
    prompts: Encoded
    edits: Callable[[np.ndarray], list[Edit]] | None = None

    def edits_of(self, examples: np.ndarray) -> list[Edit]:
        return self.edits(examples) if self.edits else []


@dataclass
class Swept:
    """What a sweep measured.

    Attributes:
        effects: metric → (patch, example): metric(patched) − metric(unpatched row of the same batch); NaN where a
            patch does not exist for an example (padding).
        recipient, donor: metric → (example,), of the full runs.
        deviation: the largest difference of a logit between an unpatched row and the full run.
        notes: what a reader should know.
    """

    effects: dict[str, np.ndarray]
    recipient: dict[str, np.ndarray]
    donor: dict[str, np.ndarray]
    deviation: float = 0.0
    notes: list[str] = field(default_factory=list)


class Astray(Exception):
    """Re-entry does not reproduce the full run of this model."""


def sweep(
    recipient: Side,
    donor: Side,
    patches: Sequence[Patch],
    *,
    batch_size: int | None = None,
    full: bool = False,
    progress: bool = True,
    label: str = "patches",
    partial: Path | None = None,
    arguments: dict[str, Any] | None = None,
) -> Swept:
    """Patch the recipient's run with the donor's activations, one patch at a time, every example.

    Args:
        recipient, donor: their prompts have the same number of examples and columns.
        patches: what to set together; columns are those of the padded prompts.
        batch_size: examples recorded at once; by default as many as keep a batch useful (16).
        full: one forward pass a patch instead of re-entry (the oracle).
        partial: folder in which finished units wait, so that an interrupted sweep continues; `arguments` (and the
            models' fingerprints within) name what they belong to.

    Raises:
        InputError: a site that one of the models lacks, or activations of different shapes.

    Cost: a patch at layer ℓ and column p: the blocks ≥ ℓ on the columns ≥ p of each example.
    """
    require_places(recipient.model, donor.model, patches)
    try:
        return _Sweep(recipient, donor, patches, batch_size, full, partial, arguments or {}).run(progress, label)
    except Astray as reason:
        swept = _Sweep(recipient, donor, patches, batch_size, True, partial, arguments or {}).run(progress, label)
        swept.notes.append(f"re-entry was not used: {reason}; every patch was one full forward pass")
        return swept


def require_places(recipient: HookedModel, donor: HookedModel, patches: Sequence[Patch]) -> None:
    """Raise InputError where a place does not exist on both sides, or is not of one shape."""
    if not all(patches):
        raise InputError("a patch sets one place or more; found one that sets none")
    places = {place for patch in patches for place in patch}
    for kind, layer in sorted({(known(p.kind), p.layer) for p in places}):
        recipient.require([kind], [layer])
        donor.require([kind], [layer])
        mine, theirs = shape_of(recipient, kind, layer), shape_of(donor, kind, layer)
        if mine != theirs:
            raise InputError(
                f"{site_name(kind, layer)} is {theirs} in {donor.name} and {mine} in {recipient.name}: the activations "
                "of one cannot stand in the other; expected two versions of one architecture"
            )
        for head in {p.head for p in places if (p.kind, p.layer) == (kind, layer) and p.head is not None}:
            if kind not in HEADS or not 0 <= head < mine[0]:
                having = f"heads 0 to {mine[0] - 1}" if kind in HEADS else "no heads"
                raise InputError(f"{site_name(kind, layer)} of {recipient.name} has {having}; found head {head}")
    if any(p.kind == "pattern" and p.column is not None for p in places):
        raise InputError("a pattern is patched as a whole: pass no positions for the site 'pattern'")


def shape_of(model: HookedModel, kind: str, layer: int) -> tuple[int, ...]:
    """(head, d_head), (head,) of a pattern, (head, d_model) of results, or (d_model,)."""
    block = model.anatomy.blocks[layer]
    width = model.module.get_input_embeddings().weight.shape[1]
    if kind in ("q", "k", "v"):
        return block.features[kind].heads, block.d_head
    return {"z": (block.heads, block.d_head), "pattern": (block.heads,), "result": (block.heads, width)}.get(
        kind, (width,)
    )


@contextmanager
def reentering(model: HookedModel) -> Iterator[None]:
    """Within: whatever an architecture raises when it is recorded or re-entered says that it cannot be."""
    try:
        yield
    except (torch.OutOfMemoryError, InputError):
        raise
    except (TypeError, ValueError, NotImplementedError, AttributeError, RuntimeError, IndexError) as error:
        raise Astray(f"{type(model.module).__name__} cannot be re-entered ({error})") from error


class _Sweep:
    def __init__(
        self, recipient: Side, donor: Side, patches: Sequence[Patch], batch_size: int | None, full: bool,
        partial: Path | None, arguments: dict[str, Any],
    ):  # fmt: skip
        self.recipient, self.donor, self.full = recipient, donor, full
        self.layers = recipient.model.layers
        self.patches = [tuple(self._moved(place) for place in patch) for patch in patches]
        examples, columns = recipient.prompts.ids.shape
        if donor.prompts.ids.shape != recipient.prompts.ids.shape:
            raise InputError(
                f"recipient and donor prompts are {tuple(recipient.prompts.ids.shape)} and "
                f"{tuple(donor.prompts.ids.shape)} (example, token); expected the same of both"
            )
        self.valid = (recipient.prompts.prompt_columns & donor.prompts.prompt_columns).numpy()
        size = min(batch_size or 16, examples)
        self.batches = [np.arange(i, min(i + size, examples)) for i in range(0, examples, size)]
        starts = [min(place.first for place in patch) for patch in self.patches]
        entries = [min(map(self._joins, patch)) for patch in self.patches]
        self.units: list[np.ndarray] = []
        for start in sorted(set(starts)):
            group = sorted((i for i, s in enumerate(starts) if s == start), key=lambda i: (entries[i], i))
            each = max(1, UNIT // size)
            self.units += [np.array(group[i : i + each]) for i in range(0, len(group), each)]
        self.starts, self.entries = starts, entries
        self.budget = tokens_at_once(recipient.model, columns)
        self.deviation = 0.0
        self.store = None
        if partial is not None:
            from finetune_lens.stream import Store

            facts = {"batch": size, "patches": repr(self.patches), "unit": UNIT}
            facts |= {"recipient": hash_of(recipient.prompts), "donor": hash_of(donor.prompts)}
            analysis = arguments.get("analysis", "sweep") + ("-full" if full else "")  # each has its own folder
            self.store = Store(partial, "", {"arguments": arguments, "analysis": analysis} | facts)

    def _moved(self, place: Place) -> Place:
        """The residual after a block is the one before the next."""
        if place.kind == "resid_post" and place.layer < self.layers - 1:
            return Place("resid_pre", place.layer + 1, None, place.column)
        return place

    def _joins(self, place: Place) -> tuple[int, bool]:
        """(layer, behind attention) at which a row with this place joins."""
        if place.kind == "resid_post":
            return self.layers, False
        return place.layer, place.kind in BEHIND_ATTENTION

    def run(self, progress: bool, label: str) -> Swept:
        from tqdm.auto import tqdm

        total = sum(len(self.patches) * len(batch) for batch in self.batches)
        recipients, donors, effects, worst = [], [], [], 0.0
        written_out = any(place.kind == "pattern" for patch in self.patches for place in patch)
        with (
            patterns_visible(self.recipient.model.module) if written_out else nullcontext(),  # in unpatched runs too
            tqdm(total=total, desc=label, unit="run", disable=not progress, dynamic_ncols=True) as bar,
        ):
            for number, batch in enumerate(self.batches):
                prepared = _Batch(self, batch)
                recipients.append(prepared.recipient_metrics)
                donors.append(prepared.donor_metrics)
                blank = {name: np.full((len(self.patches), len(batch)), np.nan) for name in prepared.names}
                for at, unit in enumerate(self.units):
                    name = f"{number}-{at}"
                    done = self.store.get(name) if self.store else None
                    if done is None:
                        self.deviation = 0.0
                        done = prepared.unit_in_full(unit) if self.full else prepared.unit(unit)
                        done["deviation"] = self.deviation
                        if self.store:
                            self.store.put(name, done)
                    worst = max(worst, done["deviation"])
                    for metric, values in blank.items():
                        values[unit] = done[metric]
                    bar.update(len(unit) * len(batch))
                effects.append(blank)
        return Swept(
            {name: np.concatenate([e[name] for e in effects], 1) for name in effects[0]},
            {name: np.concatenate([r[name] for r in recipients]) for name in recipients[0]},
            {name: np.concatenate([d[name] for d in donors]) for name in donors[0]},
            worst,
        )


class _Batch:
    """Some examples, recorded and ready to be patched."""

    def __init__(self, sweep: _Sweep, examples: np.ndarray):
        self.sweep, self.examples = sweep, examples
        self.model = sweep.recipient.model
        self.prompts = sweep.recipient.prompts.rows(examples)
        self.valid = sweep.valid[examples]
        self.own_edits = sweep.recipient.edits_of(examples)
        theirs = sweep.donor.prompts.rows(examples)
        wanted = {(p.kind if p.kind != "result" else "z", p.layer) for patch in sweep.patches for p in patch}
        run = sweep.donor.model.run(
            theirs.ids, mask=theirs.mask, capture=[site_name(*site) for site in sorted(wanted)],
            edits=sweep.donor.edits_of(examples), logits_at=theirs.read_at,
        )  # fmt: skip
        self.given = {site: run.cache[site_name(*site)] for site in wanted}
        self.unpatched = self._unpatched()
        self.recipient_metrics = self._numbers(self._scored(self.unpatched, slice(None), self.unpatched))
        self.donor_metrics = self._numbers(
            self._scored(run.logits.to(self.unpatched.device), slice(None), self.unpatched)
        )
        self.names = list(self.recipient_metrics)

    def _unpatched(self) -> Tensor:
        """The recipient's logits: of its recording, or of a run like the patched ones where all runs are full."""
        ids, mask, read_at = self.prompts.ids, self.prompts.mask, self.prompts.read_at
        if self.sweep.full:
            return self.model.run(ids, mask=mask, edits=self.own_edits, logits_at=read_at).logits
        with reentering(self.model):
            self.recording: Recording = record(self.model, ids, mask, read_at, edits=self.own_edits)
        return self.recording.logits

    def _scored(self, logits: Tensor, rows: Any, reference: Tensor, beside: Tensor | None = None) -> dict[str, Tensor]:
        return score(logits, self.prompts.answers[rows], self.prompts.wrongs[rows], reference, beside=beside)

    @staticmethod
    def _numbers(found: dict[str, Tensor]) -> dict[str, np.ndarray]:
        return {name: values.double().cpu().numpy() for name, values in found.items()}

    def exists(self, patch: int) -> np.ndarray:
        """The examples of the batch in which every place of the patch is a token of the prompt."""
        there = np.ones(len(self.examples), bool)
        for place in self.sweep.patches[patch]:
            if place.column is not None:
                there &= self.valid[np.arange(len(there)), place.columns(self.examples)]
        return np.flatnonzero(there)

    def unit(self, unit: np.ndarray) -> dict[str, np.ndarray]:
        """The effects of some patches that begin at one column: metric → (patch, example)."""
        start = self.sweep.starts[unit[0]]
        effects = {name: np.full((len(unit), len(self.examples)), np.nan) for name in self.names}
        # Example by example: one unpatched row then serves many patches. (The unit is sorted by where patches join.)
        pairs = [(at, e) for at, patch in enumerate(unit.tolist()) for e in self.exists(patch).tolist()]
        pairs.sort(key=lambda pair: (pair[1], pair[0]))
        begin = 0
        while begin < len(pairs):
            count = max(1, self.sweep.budget // (self.prompts.ids.shape[1] - start))
            count = min(count, max(8, LOGITS // (self.model.vocabulary * self.prompts.read_at.shape[1])))
            chunk = pairs[begin : begin + count]
            try:
                found = self._rows(unit, chunk, start)
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                torch.cuda.empty_cache()
                self.sweep.budget = count * (self.prompts.ids.shape[1] - start) // 2
                continue
            at, example = np.array(chunk).T
            for name, values in found.items():
                effects[name][at, example] = values
            begin += len(chunk)
        return effects

    def _rows(self, unit: np.ndarray, chunk: list[tuple[int, int]], start: int) -> dict[str, np.ndarray]:
        """The effects of (patch of the unit, example) pairs, computed in one pass."""
        here = sorted({example for _, example in chunk})
        joins = [self.sweep.entries[unit[at]] for at, _ in chunk]
        entry, behind = zip(*joins, *[min(joins)] * len(here), strict=True)
        example = [e for _, e in chunk] + here
        rows = Rows(
            start, torch.tensor(example), torch.tensor(entry), torch.tensor(behind),
            self._changes([(self.sweep.patches[unit[at]], row, e) for row, (at, e) in enumerate(chunk)]),
        )  # fmt: skip
        with reentering(self.model):
            logits = resume(self.model, self.recording, rows)
        patched, unpatched = logits[: len(chunk)], logits[len(chunk) :]
        found = deviation_of(unpatched, self.recording.logits[here], self.model)
        self.sweep.deviation = max(self.sweep.deviation, found)
        beside = torch.tensor([here.index(e) for _, e in chunk])
        scored = self._scored(patched, example[: len(chunk)], unpatched, beside)
        plain = self._scored(unpatched, here, unpatched)
        return {
            name: (values - plain[name][beside.to(values.device)]).double().cpu().numpy()
            for name, values in scored.items()
        }

    def unit_in_full(self, unit: np.ndarray) -> dict[str, np.ndarray]:
        """The same effects, by one forward pass a patch over the whole batch."""
        effects = {name: np.full((len(unit), len(self.examples)), np.nan) for name in self.names}
        for at, patch in enumerate(unit.tolist()):
            examples = self.exists(patch)
            if not len(examples):
                continue
            changes = self._changes([(self.sweep.patches[patch], e, e) for e in examples.tolist()])
            edits = [(site_name(kind, layer), _setting(kind, change)) for (kind, layer), change in changes.items()]
            logits = self.model.run(
                self.prompts.ids, mask=self.prompts.mask, edits=[*self.own_edits, *edits],
                logits_at=self.prompts.read_at,
            ).logits  # fmt: skip
            found = self._numbers(self._scored(logits, slice(None), self.unpatched))
            for name, values in found.items():
                effects[name][at, examples] = (values - self.recipient_metrics[name])[examples]
        return effects

    def _changes(self, wanted: list[tuple[Patch, int, int]]) -> dict[tuple[str, int], Change]:
        """What (patch, row, example) triples set, joined by site."""
        sites: dict[tuple[str, int], list[np.ndarray]] = {}
        for patch, row, example in wanted:
            for place in patch:
                sites.setdefault((place.kind, place.layer), []).append(self._targets(place, row, example))
        return {site: self._change(*site, self._joined(*site, targets)) for site, targets in sites.items()}

    def _joined(self, kind: str, layer: int, targets: list[np.ndarray]) -> np.ndarray:
        """All targets at a site; where some name a head, "all heads" is written out. Results add up: each once."""
        found = np.concatenate(targets, 1)
        every = found[2] < 0
        if kind in HEADS and every.any() and not every.all():
            heads = shape_of(self.model, kind, layer)[0]
            written = np.repeat(found[:, every], heads, 1)
            written[2] = np.tile(np.arange(heads), int(every.sum()))
            found = np.concatenate([found[:, ~every], written], 1)
        return np.unique(found, axis=1) if kind == "result" else found

    def _targets(self, place: Place, row: int, example: int) -> np.ndarray:
        """(row, column, head, example) of all that one place sets; head −1: all at once."""
        if place.column is None:
            columns = np.flatnonzero(self.valid[example])
        else:
            columns = place.columns(self.examples[[example]])
        heads = np.array([-1 if place.head is None else place.head])
        if place.kind == "pattern":
            columns = columns[:1]
        if place.kind in ("pattern", "result") and place.head is None:
            heads = np.arange(self.model.anatomy.blocks[place.layer].heads)
        column, head = (x.ravel() for x in np.meshgrid(columns, heads, indexing="ij"))
        return np.stack([np.full_like(column, row), column, head, np.full_like(column, example)])

    def _change(self, kind: str, layer: int, targets: np.ndarray) -> Change:
        row, column, head, example = torch.from_numpy(targets)
        given = self.given["z" if kind == "result" else kind, layer]
        at, one = [x.to(given.device) for x in (example, column)], head.to(given.device)
        if kind == "pattern":
            return Change(row, column, head, given[at[0], one])
        if bool((head < 0).all()):
            return Change(row, column, None, given[at[0], at[1]])
        values = given[at[0], at[1], one]
        if kind == "result":
            donor = self.sweep.donor.model
            with donor.side(), torch.no_grad():  # on shared weights its own output projection has its adapter or not
                values = result_of(donor.anatomy.blocks[layer], values, one)
        return Change(row, column, head, values)


def deviation_of(unpatched: Tensor, recorded: Tensor, model: HookedModel) -> float:
    """The largest difference of a logit between unpatched rows and the full run.

    Raises:
        Astray: it is more than rounding.
    """
    finite = torch.isfinite(recorded)
    if not finite.any():
        return 0.0
    difference = float((unpatched - recorded)[finite].abs().max())
    limit = TOLERANCE[recorded.dtype] * max(1.0, float(recorded[finite].abs().max()))
    if not difference <= limit:
        raise Astray(
            f"an unpatched row differs from the full run of {model.name} by {difference:.2g}, more than {limit:.2g}"
        )
    return difference


def hash_of(prompts: Encoded) -> str:
    """Of the tokens, where they are and what is read: prompts padded or answered otherwise are others."""
    held = (prompts.ids, prompts.mask, prompts.prompt_columns, prompts.read_at, prompts.answers, prompts.wrongs)
    digest = hashlib.sha256()
    for tensor in held:
        digest.update(repr(tuple(tensor.shape)).encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _setting(kind: str, change: Change) -> Callable[[Tensor], Tensor]:
    """The change as an edit of a full run, in which rows are examples."""

    def edit(x: Tensor) -> Tensor:
        row, column, values = change.row.to(x.device), change.column.to(x.device), change.values.to(x)
        if kind == "pattern":
            return x.index_put((row, change.head.to(x.device)), values)
        at = (row, column) if change.head is None else (row, column, change.head.to(x.device))
        return x.index_put(at, values)

    return edit


def tokens_at_once(model: HookedModel, columns: int) -> int:
    """How many columns (rows × their length) to compute at once: what fits into free memory, and no more than helps."""
    config = model.module.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # by layer
    number = torch.finfo(model.dtype).bits // 8
    bytes_a_column = number * (12 * width + 4 * inner + 2 * columns * model.heads) + 12 * model.vocabulary / columns
    free = _free_memory(model.device)
    most = TOKENS.get(model.device.type, TOKENS["cpu"])
    return int(min(most, max(columns, free / 2 / bytes_a_column)))


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import os

    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 4e9
