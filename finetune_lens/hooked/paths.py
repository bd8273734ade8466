"""Path patching: what one head gives to the receivers directly, when nothing else may pass it on.

    1  run clean and corrupt
    2  run clean with the sender's z from corrupt and all that is frozen held at its clean value; keep what the
       receivers read: their q, k or v, or the logits
    3  run clean with only those replaced

(Goldowsky-Dill et al. 2023, arXiv 2304.05969; Wang et al. 2022, arXiv 2211.00593, §3.1; Prakash et al. 2024, arXiv
2402.14811, §3.) Frozen z of every head, or q, k and v of every head, are the same thing: no head passes anything on.
Then a change stays in its column, and step 2 is a chain of MLPs on the receivers' columns alone, from the sender's
layer to the receivers', without attention; all senders are rows of one batch. Step 3 re-enters at the lowest receiver.

Cost of a sender and example: MLPs and output projections of the layers between on one column; then the blocks from the
lowest receiver up on the columns from the receivers' on. A sender above all receivers costs nothing: its effect is 0.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune_lens.errors import InputError
from finetune_lens.hooked.model import Edit
from finetune_lens.hooked.reentry import Change, Pass, Recording, Rows, record, resume
from finetune_lens.hooked.sites import site_name
from finetune_lens.hooked.sweep import LOGITS, Astray, Side, Swept, deviation_of, hash_of, reentering, tokens_at_once
from finetune_lens.metrics import score

FREEZABLE = ("z", "q", "k", "v", "pattern", "mlp_out")
RECEIVERS = ("logits", "q", "k", "v")
Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class Receivers:
    """Who reads: the logits, or q, k or v of some heads at some columns.

    Attributes:
        columns: of each example: where the receivers read. (The logits are read at the answer.)
        sent: of each example: where the senders' z is changed; by default where the receivers read.
    """

    kind: str
    heads: tuple[Head, ...]
    columns: Sequence[np.ndarray]
    sent: Sequence[np.ndarray] | None = None


def frozen_heads(freeze: Sequence[str]) -> bool:
    """Whether no head passes anything on."""
    return "z" in freeze or {"q", "k", "v"} <= {*freeze}


def sweep_paths(
    clean: Side,
    corrupt: Side,
    senders: Sequence[Head],
    receivers: Receivers,
    *,
    freeze: Sequence[str] = ("z",),
    batch_size: int | None = None,
    full: bool = False,
    progress: bool = True,
    label: str = "paths",
    partial: Path | None = None,
    arguments: dict[str, Any] | None = None,
) -> Swept:
    """The effect on every metric of every path sender → receivers, on each example (sender, example).

    Args:
        clean, corrupt: the same model on prompts of the same shape.
        freeze: sites held at their clean values in step 2, of every layer and head.
        full: two whole forward passes a sender (the oracle). Where heads are not frozen it is always so.
        partial, arguments: as for `sweep`.

    Raises:
        InputError: a site that the model lacks, heads that it does not have, examples without column.
    """
    paths = _Paths(clean, corrupt, senders, receivers, tuple(freeze), batch_size, partial, arguments or {})
    if full or not frozen_heads(freeze):
        return paths.run(progress, label, full=True)
    try:
        return paths.run(progress, label, full=False)
    except Astray as reason:
        swept = paths.run(progress, label, full=True)
        swept.notes.append(f"the short way was not taken: {reason}; every sender was two full forward passes")
        return swept


class _Paths:
    def __init__(
        self, clean: Side, corrupt: Side, senders: Sequence[Head], receivers: Receivers, freeze: tuple[str, ...],
        batch_size: int | None, partial: Path | None, arguments: dict[str, Any],
    ):  # fmt: skip
        self.clean, self.corrupt, self.model = clean, corrupt, clean.model
        self.senders, self.receivers, self.freeze = list(senders), receivers, freeze
        self._require()
        examples = len(clean.prompts)
        size = min(batch_size or 16, examples)
        self.batches = [np.arange(i, min(i + size, examples)) for i in range(0, examples, size)]
        self.budget = tokens_at_once(self.model, clean.prompts.ids.shape[1])
        self.partial, self.arguments = partial, arguments
        # Where each receiver's feature lies: (kind, layer) → heads of that site (those of k and v may be shared).
        self.sites: dict[tuple[str, int], list[int]] = {}
        for layer, head in receivers.heads:
            blocks = self.model.anatomy.blocks
            shared = blocks[layer].heads // blocks[layer].features[receivers.kind].heads
            heads = self.sites.setdefault((receivers.kind, layer), [])
            if head // shared not in heads:
                heads.append(head // shared)
        self.top = max((layer for _, layer in self.sites), default=self.model.layers)  # senders from here on change 0

    def _require(self) -> None:
        model, kind = self.model, self.receivers.kind
        if unknown := [name for name in self.freeze if name not in FREEZABLE]:
            raise InputError(f"{unknown[0]!r} cannot be frozen; expected some of {', '.join(FREEZABLE)}")
        if kind not in RECEIVERS:
            raise InputError(f"receivers are one of {', '.join(RECEIVERS)}; found {kind!r}")
        if (kind == "logits") == bool(self.receivers.heads):
            raise InputError("receivers are the logits, or q, k or v of one head or more")
        if not self.senders:
            raise InputError("expected one sender or more; found none")
        if self.clean.prompts.ids.shape != self.corrupt.prompts.ids.shape:
            raise InputError("clean and corrupt prompts differ in number or columns; expected the same of both")
        if self.clean.prompts.read_at.shape[1] > 1:
            raise InputError("paths to the logits lead to one token: answers of several tokens are not read here")
        for layer, head in (*self.senders, *self.receivers.heads):
            if not (0 <= layer < model.layers and 0 <= head < model.heads):
                raise InputError(
                    f"{model.name} has layers 0 to {model.layers - 1} of heads 0 to {model.heads - 1}; found "
                    f"{layer}.{head}"
                )
        model.require(["z"], sorted({layer for layer, _ in self.senders}))
        model.require([name for name in self.freeze if name != "z"], range(model.layers))
        if kind != "logits":
            model.require([kind], sorted({layer for layer, _ in self.receivers.heads}))

    def run(self, progress: bool, label: str, *, full: bool) -> Swept:
        from tqdm.auto import tqdm

        store = None
        if self.partial is not None:
            from finetune_lens.stream import Store

            facts = {"senders": self.senders, "receivers": repr((self.receivers.kind, self.receivers.heads))}
            facts |= {"columns": [c.tolist() for c in self.receivers.columns], "freeze": self.freeze}
            facts |= {"sent": self.receivers.sent and [c.tolist() for c in self.receivers.sent]}
            facts |= {"clean": hash_of(self.clean.prompts), "corrupt": hash_of(self.corrupt.prompts)}
            analysis = self.arguments.get("analysis", "paths") + ("-full" if full else "")
            store = Store(self.partial, "", {"arguments": self.arguments, "analysis": analysis} | facts)
        parts = []
        total = len(self.senders) * len(self.clean.prompts)
        with tqdm(total=total, desc=label, unit="run", disable=not progress, dynamic_ncols=True) as bar:
            for number, batch in enumerate(self.batches):
                done = store.get(str(number)) if store else None
                if done is None:
                    done = (_Full if full else _Short)(self, batch).measured()
                    if store:
                        store.put(str(number), done)
                parts.append(done)
                bar.update(len(self.senders) * len(batch))
        names = [key.removeprefix("effect_") for key in parts[0] if key.startswith("effect_")]

        def joined(prefix: str) -> dict[str, np.ndarray]:
            return {name: np.concatenate([part[f"{prefix}_{name}"] for part in parts], -1) for name in names}

        worst = max(float(part["deviation"]) for part in parts)
        return Swept(joined("effect"), joined("recipient"), joined("donor"), worst)


class _Batch:
    """Some examples, run clean and corrupt."""

    def __init__(self, paths: _Paths, examples: np.ndarray):
        self.paths, self.model = paths, paths.model
        self.prompts = paths.clean.prompts.rows(examples)
        theirs = paths.corrupt.prompts.rows(examples)
        sent = paths.receivers.columns if paths.receivers.sent is None else paths.receivers.sent
        self.columns, self.sent = ([each[e] for e in examples] for each in (paths.receivers.columns, sent))
        layers = sorted({layer for layer, _ in paths.senders})
        run = self.model.run(
            theirs.ids, mask=theirs.mask, capture=[site_name("z", layer) for layer in layers],
            edits=paths.corrupt.edits_of(examples), logits_at=theirs.read_at,
        )  # fmt: skip
        self.given = {layer: run.cache[site_name("z", layer)] for layer in layers}
        self.donor_logits, self.own_edits = run.logits, paths.clean.edits_of(examples)

    def scored(self, logits: Tensor, rows: Any, reference: Tensor, beside: Tensor | None = None) -> dict[str, Tensor]:
        return score(logits, self.prompts.answers[rows], self.prompts.wrongs[rows], reference, beside=beside)

    def ends(self, logits: Tensor) -> dict[str, np.ndarray]:
        """The metrics of the clean and the corrupt run."""
        sides = {"recipient": logits, "donor": self.donor_logits.to(logits)}
        return {
            f"{side}_{name}": values.double().cpu().numpy()
            for side, x in sides.items()
            for name, values in self.scored(x, slice(None), logits).items()
        }

    def blank(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        return {f"effect_{name}": np.zeros((len(self.paths.senders), len(self.prompts))) for name in names}


class _Short(_Batch):
    """All senders at once, no head passing anything on."""

    def __init__(self, paths: _Paths, examples: np.ndarray):
        super().__init__(paths, examples)
        with reentering(self.model):
            ids, mask, read_at = self.prompts.ids, self.prompts.mask, self.prompts.read_at
            self.recording = record(self.model, ids, mask, read_at, edits=self.own_edits)
        lacking = [layer for layer in range(self.model.layers) if layer not in self.recording.z]
        if lacking:
            raise Astray(f"attention of layer {lacking[0]} of {self.model.name} gives more than its projected heads")
        self.mlps: dict[int, Tensor] = {}
        if "mlp_out" in paths.freeze:
            names = {layer: site_name("mlp_out", layer) for layer in range(self.model.layers)}
            run = self.model.run(ids, mask=mask, capture=[*names.values()], edits=self.own_edits, logits_at=read_at)
            self.mlps = {layer: run.cache[name] for layer, name in names.items()}
        if paths.receivers.kind == "logits":
            ends = self.prompts.read_at[:, 0].numpy()
            self.columns = [np.array([end]) for end in ends]
        # A change in another column does not reach the receivers.
        self.columns = [np.intersect1d(*pair) for pair in zip(self.columns, self.sent, strict=True)]
        self.deviation = 0.0

    def measured(self) -> dict[str, np.ndarray]:
        """Effects (sender, example) and both ends (example) of every metric, and the largest deviation."""
        found = self.ends(self.recording.logits)
        names = [key.removeprefix("recipient_") for key in found if key.startswith("recipient_")]
        effects = self.blank(names)
        low = [s for s, (layer, _) in enumerate(self.paths.senders) if layer < self.paths.top]
        starts = {e: int(columns.min()) for e, columns in enumerate(self.columns) if len(columns)}
        # Example by example, those that begin alike together: one unpatched row then serves many senders.
        pairs = [(s, e) for e in sorted(starts, key=lambda e: starts[e]) for s in low]
        begin = 0
        while begin < len(pairs):
            chunk = self._chunk(pairs[begin:], starts)
            values = self._rows(chunk)
            s, e = np.array(chunk).T
            for name, numbers in values.items():
                effects[f"effect_{name}"][s, e] = numbers
            begin += len(chunk)
        return found | effects | {"deviation": np.array(self.deviation)}

    def _chunk(self, pairs: list[tuple[int, int]], starts: dict[int, int]) -> list[tuple[int, int]]:
        """The first pairs, as many as one pass holds; a quarter of their columns at most is wasted."""
        first = starts[pairs[0][1]]
        ahead = self.prompts.ids.shape[1] - first
        columns = 1 if self.paths.receivers.kind == "logits" else ahead
        columns = max(columns, len(self.columns[pairs[0][1]]))
        count = max(1, min(self.paths.budget // columns, max(8, LOGITS // self.model.vocabulary)))
        apart = (n for n, (_, e) in enumerate(pairs[:count]) if starts[e] > first + ahead // 4)
        return pairs[: count if columns == 1 else next(apart, count)]

    def _rows(self, chunk: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        """Effects of (sender, example) pairs, beside a row of each example in which nothing was sent."""
        here = list(dict.fromkeys(e for _, e in chunk))
        rows = [*chunk, *((None, e) for e in here)]
        with reentering(self.model):
            chain = _Chain(self.model, self.recording, rows, self.paths, self.columns, self.given, self.mlps)
            logits = chain.logits() if self.paths.receivers.kind == "logits" else self._received(rows, chain.caught())
        patched, plain = logits[: len(chunk)], logits[len(chunk) :]
        self.deviation = max(self.deviation, deviation_of(plain, self.recording.logits[here], self.model))
        beside = torch.tensor([here.index(e) for _, e in chunk])
        scored = self.scored(patched, [e for _, e in chunk], plain, beside)
        unpatched = self.scored(plain, here, plain)
        return {
            name: (values - unpatched[name][beside.to(values.device)]).double().cpu().numpy()
            for name, values in scored.items()
        }

    def _received(self, rows: list[tuple[int | None, int]], caught: dict[tuple[str, int], "_Caught"]) -> Tensor:
        """Step 3: the clean run with what the receivers read in each row."""
        changes = {}
        for site, heads in self.paths.sites.items():
            found = caught.get(site)
            if found is None:
                continue
            many = len(found.row)
            changes[site] = Change(
                found.row.repeat(len(heads)), found.column.repeat(len(heads)),
                torch.tensor(heads).repeat_interleave(many), found.values[:, heads].transpose(0, 1).flatten(0, 1),
            )  # fmt: skip
        example = torch.tensor([e for _, e in rows])
        start = min(int(self.columns[e].min()) for _, e in rows)
        entry = torch.full((len(rows),), min(layer for _, layer in self.paths.sites))
        return resume(
            self.model, self.recording, Rows(start, example, entry, torch.zeros(len(rows), dtype=torch.bool), changes)
        )


@dataclass(frozen=True)
class _Caught:
    """What was read at a site: `values[i]` (head, d_head) in row[i] at column[i]."""

    row: Tensor
    column: Tensor
    values: Tensor


class _Enough(Exception):
    """All receivers have read."""


class _Chain(Pass):
    """Step 2 on single columns: residual streams of one token each, no attention. Inside, rows are (row, column)."""

    def __init__(
        self, model: Any, recording: Recording, rows: list[tuple[int | None, int]], paths: _Paths,
        columns: Sequence[np.ndarray], given: dict[int, Tensor], mlps: dict[int, Tensor],
    ):  # fmt: skip
        self.sites, self.top, self.mlps = paths.sites, paths.top, mlps
        flat = [(row, s, e, c) for row, (s, e) in enumerate(rows) for c in columns[e].tolist()]
        layers = [0 if s is None else paths.senders[s][0] for _, s, _, _ in flat]
        lowest = min((layer for layer, (_, s, _, _) in zip(layers, flat, strict=True) if s is not None), default=0)
        entry = [lowest if s is None else layer for layer, (_, s, _, _) in zip(layers, flat, strict=True)]
        changes: dict[tuple[str, int], Change] = {}
        for layer in sorted({layer for layer, (_, s, _, _) in zip(layers, flat, strict=True) if s is not None}):
            at = [n for n, (_, s, _, _) in enumerate(flat) if s is not None and paths.senders[s][0] == layer]
            head = torch.tensor([paths.senders[flat[n][1]][1] for n in at])
            example, column = (torch.tensor([flat[n][i] for n in at]) for i in (2, 3))
            place = [x.to(given[layer].device) for x in (example, column, head)]
            changes["z", layer] = Change(torch.tensor(at), torch.zeros_like(head), head, given[layer][tuple(place)])
        example = torch.tensor([e for _, _, e, _ in flat])
        behind = torch.ones(len(flat), dtype=torch.bool)
        super().__init__(model, recording, Rows(0, example, torch.tensor(entry), behind, changes))
        self.row, self.column = (torch.tensor([item[i] for item in flat]) for i in (0, 3))
        self.inside = torch.argsort(self.back)  # where each of the rows inside came from
        self.attending = [0] * (model.layers + 1)
        self.length, self.read_at = 1, torch.zeros(len(flat), 1, dtype=torch.long)
        self.found: dict[tuple[str, int], _Caught] = {}

    def recorded(self, store: Tensor, begin: int, end: int) -> Tensor:
        """The recorded activation of the rows `begin` to `end`, at their own columns."""
        at = (self.example[begin:end], self.column[self.inside[begin:end]])
        return store[tuple(i.to(store.device) for i in at)][:, None]

    def caught(self) -> dict[tuple[str, int], _Caught]:
        """What the receivers read; rows that had not begun there are not in it."""
        with suppress(_Enough):
            self.logits()
        return self.found

    def logits(self) -> Tensor:
        with ExitStack() as stack:
            for layer, out in self.mlps.items():
                if self.live[layer]:
                    stack.enter_context(self.model.hook("mlp_out", layer, self._held(layer, out), changed=True))
            return super().logits()

    def _held(self, layer: int, out: Tensor) -> Any:
        def touch(x: Tensor) -> Tensor:
            held = self.recorded(out, 0, self.live[layer]).to(x)
            return held.reshape(x.shape)

        return touch

    def _inputs(self) -> dict[str, Any]:
        model, width = self.model, self.model.module.get_input_embeddings().weight.shape[1]
        embeds = torch.zeros((), device=model.device, dtype=model.dtype).expand(len(self.example), 1, width)
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": False}
        if model.takes("position_ids"):
            inputs["position_ids"] = torch.zeros(len(self.example), 1, dtype=torch.long, device=model.device)
        return inputs

    def _attention(self, layer: int) -> Any:
        project = super()._attention(layer)
        block = self.blocks[layer]

        def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            for kind, where in self.sites:
                if where == layer:
                    feature = block.features[kind]
                    rows = slice(None) if feature.rows is None else feature.rows.to(hidden.device)
                    values = feature.module(hidden)[..., rows].unflatten(-1, (-1, block.d_head))[:, 0]
                    came = self.inside[: len(values)]
                    self.found[kind, layer] = _Caught(self.row[came], self.column[came], values)
            if layer == self.top:
                raise _Enough
            return project(original, *args, **kwargs)

        return forward


class _Full(_Batch):
    """Two whole forward passes a sender, whatever is frozen."""

    def measured(self) -> dict[str, np.ndarray]:
        """As `_Short.measured`."""
        kinds = [kind for kind in FREEZABLE if kind in self.paths.freeze]
        sites = [(kind, layer) for kind in kinds for layer in range(self.model.layers)]
        run = self.model.run(
            self.prompts.ids, mask=self.prompts.mask, capture=[site_name(*site) for site in sites],
            edits=self.own_edits, logits_at=self.prompts.read_at,
        )  # fmt: skip
        self.held = {site: run.cache[site_name(*site)] for site in sites}
        reference = self._run(None)
        found = self.ends(reference)
        unpatched = {key.removeprefix("recipient_"): v for key, v in found.items() if key.startswith("recipient_")}
        effects = self.blank([*unpatched])
        for s, sender in enumerate(self.paths.senders):
            scored = self.scored(self._run(sender), slice(None), reference)
            for name, values in scored.items():
                effects[f"effect_{name}"][s] = values.double().cpu().numpy() - unpatched[name]
        return found | effects | {"deviation": np.array(deviation_of(reference, run.logits, self.model))}

    def _run(self, sender: Head | None) -> Tensor:
        """Logits at the answer with the sender's change, or with none."""
        seen: dict[tuple[str, int], Tensor] = {}
        edits: list[Edit] = [*self.own_edits]
        kind = self.paths.receivers.kind
        for site in dict.fromkeys([*self.held, *self.paths.sites, *([("z", sender[0])] if sender else [])]):
            if site in self.paths.sites:
                edits.append((site_name(*site), self._seeing(site, seen)))
            if site in self.held:
                edits.append((site_name(*site), self.held[site]))
            if sender and site == ("z", sender[0]):
                edits.append((site_name(*site), self._sending(sender)))
        ids, mask, read_at = self.prompts.ids, self.prompts.mask, self.prompts.read_at
        logits = self.model.run(ids, mask=mask, edits=edits, logits_at=read_at).logits
        if kind == "logits":
            return logits
        received = [(site_name(*site), self._receiving(site, values)) for site, values in seen.items()]
        return self.model.run(ids, mask=mask, edits=[*self.own_edits, *received], logits_at=read_at).logits

    @staticmethod
    def _at(columns: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """(example, column) of all of them."""
        rows = np.repeat(np.arange(len(columns)), [len(c) for c in columns])
        return torch.from_numpy(rows), torch.from_numpy(np.concatenate(columns))

    def _sending(self, sender: Head) -> Any:
        layer, head = sender
        row, column = self._at(self.sent)

        def edit(x: Tensor) -> Tensor:
            at = (row.to(x.device), column.to(x.device), torch.full_like(row, head).to(x.device))
            return x.index_put(at, self.given[layer].to(x)[at])

        return edit

    @staticmethod
    def _seeing(site: tuple[str, int], seen: dict[tuple[str, int], Tensor]) -> Any:
        def edit(x: Tensor) -> Tensor:
            seen[site] = x.clone()
            return x

        return edit

    def _receiving(self, site: tuple[str, int], values: Tensor) -> Any:
        heads = torch.tensor(self.paths.sites[site])
        row, column = self._at(self.columns)

        def edit(x: Tensor) -> Tensor:
            at = [row[:, None].to(x.device), column[:, None].to(x.device), heads[None].to(x.device)]
            return x.index_put(tuple(at), values[tuple(at)])

        return edit
