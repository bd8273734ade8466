"""Re-entering a forward pass: what a patch cannot reach is not computed again.

A patch at layer ℓ and column p changes layers ≥ ℓ and columns ≥ p only. The unpatched run is recorded once: residual
stream at every block, z, keys and values. A patched row then joins at its first layer with the recorded residual
from its first column on; earlier columns are there as recorded keys and values. Rows of all layers share one pass up
the blocks, each joining where its patch begins; a row whose first patch lies behind attention takes z from the record
and skips the attention there; in the last block the MLP is computed only where logits are read.

The block list keeps its indices (attention types hang on them) and the keys of sliding layers keep their full length.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finetune_lens.hooked.anatomy import first
from finetune_lens.hooked.model import Edit, HookedModel, patterns_visible, result_of
from finetune_lens.hooked.sites import site_name

# Kinds of sites that lie behind attention within their block: a row patched there needs no attention at that layer.
BEHIND_ATTENTION = ("z", "result", "attn_out", "resid_mid", "mlp_out")


@dataclass(frozen=True)
class Recording:
    """An unpatched run of a batch of examples, kept to be re-entered.

    Attributes:
        residual: by layer, (example, pos, d_model): the input of each block, then the output of the last.
        z: by layer, (example, pos, head, d_head).
        keys_values: by layer, (example, kv_head, pos, d_head).
        logits: at `read_at`, (example, answer, vocab).
    """

    ids: Int[Tensor, "example pos"]
    mask: Bool[Tensor, "example pos"]
    read_at: Int[Tensor, "example answer"]
    residual: list[Tensor]
    z: dict[int, Tensor]
    keys_values: list[tuple[Tensor, Tensor]]
    logits: Float[Tensor, "example answer vocab"]


def record(
    model: HookedModel,
    ids: Int[Tensor, "example pos"],
    mask: Bool[Tensor, "example pos"],
    read_at: Int[Tensor, "example answer"],
    *,
    edits: list[Edit] | None = None,
) -> Recording:
    """Run the examples once and keep what re-entry needs. Cost: one forward pass.

    Memory: (2 + kv_heads/heads·2) · layers · examples · positions · d_model numbers.
    """
    layers = model.layers
    names = [site_name("resid_pre", layer) for layer in range(layers)] + [site_name("resid_post", layers - 1)]
    heads = [layer for layer in range(layers) if model.anatomy.bypass and not model.lacks("z", layer)]
    zs = {layer: site_name("z", layer) for layer in heads}
    run = model.run(
        ids, mask=mask, capture=[*names, *zs.values()], edits=edits or [], logits_at=read_at, keys_values=True
    )
    return Recording(
        ids, mask, read_at, [run.cache[n] for n in names], {layer: run.cache[n] for layer, n in zs.items()},
        run.keys_values, run.logits,
    )  # fmt: skip


@dataclass(frozen=True)
class Change:
    """New values at one site for some rows: `values[i]` at (row[i], column[i]) and, where given, head[i].

    Of a pattern, `values[i]` (query, key) replaces the whole map of head[i] in row[i]; of a head's result, `values[i]`
    (d_model) replaces what that head adds to the attention's output.
    """

    row: Int[Tensor, " n"]
    column: Int[Tensor, " n"]  # of the whole sequence
    head: Int[Tensor, " n"] | None
    values: Tensor  # (n, d_model) or (n, d_head), or (n, query, key)


@dataclass(frozen=True)
class Rows:
    """What to compute in one pass: row r is example `example[r]`, joining at layer `entry[r]`.

    Attributes:
        start: the first column of all rows; nothing before it is changed.
        behind: whether the row's first change lies behind attention.
        changes: by (kind, layer).
    """

    start: int
    example: Int[Tensor, " row"]
    entry: Int[Tensor, " row"]
    behind: Bool[Tensor, " row"]
    changes: Mapping[tuple[str, int], Change] = field(default_factory=dict)


def resume(model: HookedModel, recording: Recording, rows: Rows) -> Float[Tensor, "row answer vocab"]:
    """Logits of the rows at their examples' `read_at`. No graph is kept.

    Cost: each row, its columns from `start` on through the blocks from its entry on.
    """
    return Pass(model, recording, rows).logits()


@torch.no_grad()
def read_out(model: HookedModel, residual: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    """What the model makes of residual streams behind its last block: final norm, unembedding, scales and caps."""
    width = model.module.get_input_embeddings().weight.shape[1]  # not the residual's where embeddings are projected
    inputs = torch.zeros((), device=model.device, dtype=model.dtype).expand(len(residual), 1, width)
    last = model.layers - 1

    def passing(layer: int) -> Callable:
        def forward(original: Callable, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = residual[:, None].to(hidden.device, hidden.dtype) if layer == last else hidden
            return (out,) if model.anatomy.tuple_output else out

        return forward

    with ExitStack() as stack:
        stack.enter_context(model.side())
        for layer, block in enumerate(model.anatomy.blocks):
            stack.enter_context(_forward(block.module, passing(layer)))
        return model.module(inputs_embeds=inputs, use_cache=False).logits[:, 0]


class Pass:
    """One pass up the blocks with rows joining on the way. Inside, rows are sorted by where they join."""

    def __init__(self, model: HookedModel, recording: Recording, rows: Rows):
        self.model, self.recording, self.start = model, recording, rows.start
        self.blocks = model.anatomy.blocks
        self.length = recording.ids.shape[1] - rows.start
        behind = rows.behind & torch.tensor([layer in recording.z for layer in rows.entry.tolist()], dtype=torch.bool)
        order = torch.argsort(2 * rows.entry + behind.long(), stable=True)
        self.back = torch.argsort(order)  # where each of the caller's rows is
        self.example = rows.example[order]
        entry, behind = rows.entry[order], behind[order]
        layers = torch.arange(len(self.blocks) + 1)
        self.live = torch.searchsorted(entry, layers, right=True).tolist()  # rows there from each layer on
        self.attending = torch.searchsorted(2 * entry + behind.long(), 2 * layers, right=True).tolist()
        self.changes = {
            site: Change(self.back[c.row], c.column - rows.start, c.head, c.values) for site, c in rows.changes.items()
        }
        self.read_at = recording.read_at[self.example.to(recording.read_at.device)] - rows.start

    def logits(self) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(self.model.side())
            stack.enter_context(torch.no_grad())
            for layer, block in enumerate(self.blocks):
                stack.enter_context(_forward(block.module, self._block(layer)))
                if self.attending[layer] < self.live[layer]:
                    stack.enter_context(_forward(block.attention, self._attention(layer)))
            if self.blocks[-1].mlp is not None:
                stack.enter_context(_forward(self.blocks[-1].mlp, self._last_mlp))
            for kind, layer in self.changes:
                if kind not in ("resid_pre", "z", "result") and (kind, layer) != ("resid_post", len(self.blocks) - 1):
                    touch = self._touch(kind, layer)
                    stack.enter_context(self.model.hook(kind, layer, touch, changed=True))
                elif kind == "result":
                    stack.enter_context(self._results(layer))
                elif kind == "z":
                    stack.enter_context(self.model.hook(kind, layer, self._touch_z(layer), changed=True))
            if any(kind == "pattern" for kind, _ in self.changes):
                stack.enter_context(patterns_visible(self.model.module))
            stack.enter_context(self.model.logits_at(self.read_at, self.back))
            return self.model.module(**self._inputs()).logits

    def _inputs(self) -> dict[str, Any]:
        """Arguments of the module's forward, for all rows at once: masks and positions are made from them."""
        model, device = self.model, self.model.device
        n, mask = len(self.example), self.recording.mask
        width = model.module.get_input_embeddings().weight.shape[1]
        inputs: dict[str, Any] = {
            "inputs_embeds": torch.zeros((), device=device, dtype=model.dtype).expand(n, self.length, width),
            "past_key_values": Prefix(self),
            "use_cache": True,
        }
        if not bool(mask.all()):
            inputs["attention_mask"] = mask.to(device)[self.example].long()
        if model.takes("position_ids"):
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)[self.example, self.start :]
            inputs["position_ids"] = positions.to(device)
        return inputs

    def recorded(self, store: Tensor, begin: int, end: int) -> Tensor:
        """The recorded activation of rows `begin` to `end`, from `start` on."""
        return store[self.example[begin:end].to(store.device), self.start :]

    def _block(self, layer: int) -> Callable:
        before = self.live[layer - 1] if layer else 0
        live, total, last = self.live[layer], len(self.example), layer == len(self.blocks) - 1

        def forward(original: Callable, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            out: Any = hidden
            if live:
                old = hidden[:before]
                joining = self.recorded(self.recording.residual[layer], before, live).to(hidden.device)
                hidden = torch.cat([old, joining]) if before else joining
                hidden = self._changed("resid_pre", layer, hidden)
                out = original(hidden, *_cut(args, total, live), **_cut(kwargs, total, live))
            elif self.model.anatomy.tuple_output:
                out = (hidden,)
            if last:
                new = first(out)[:live]
                joining = self.recorded(self.recording.residual[-1], live, total).to(new.device)
                new = self._changed("resid_post", layer, torch.cat([new, joining]))
                out = (new, *out[1:]) if isinstance(out, tuple) else new
            return out

        return forward

    def _attention(self, layer: int) -> Callable:
        attending, live = self.attending[layer], self.live[layer]

        def forward(original: Callable, *args: Any, **kwargs: Any) -> Any:
            z = self.recorded(self.recording.z[layer], attending, live)
            self._offset = attending
            projected = self.blocks[layer].projection(z.flatten(-2))
            self._offset = 0
            if not attending:
                return (projected, *[None] * (self.model.anatomy.attention_outputs - 1))
            out = original(*_cut(args, live, attending), **_cut(kwargs, live, attending))
            return (torch.cat([out[0], projected]), *out[1:])

        return forward

    _offset = 0  # the row at which what is being projected begins

    def _touch_z(self, layer: int) -> Callable[[Tensor], Tensor]:
        return lambda x: self._changed("z", layer, x, self._offset)

    def _touch(self, kind: str, layer: int) -> Callable[[Tensor], Tensor]:
        def touch(x: Tensor) -> Tensor:
            if x.ndim == 2:  # some modules are given (row · pos, d_model)
                return touch(x.unflatten(0, (-1, self.length))).flatten(0, 1)
            return self._changed(kind, layer, x)

        return touch

    def _changed(self, kind: str, layer: int, x: Tensor, offset: int = 0) -> Tensor:
        """`x`, which begins at row `offset`, with the changes that fall on it."""
        change = self.changes.get((kind, layer))
        if change is None:
            return x
        row, values = change.row - offset, change.values.to(x.device, x.dtype)
        column, head = change.column, change.head
        inside = (row >= 0) & (row < len(x))
        if not bool(inside.all()):
            row, column, values = row[inside], column[inside], values[inside.to(values.device)]
            head = None if head is None else head[inside]
        if kind == "pattern":
            return x.index_put((row, head), values[:, self.start :])
        at = (row, column) if head is None else (row, column, head)
        return x.index_put(tuple(i.to(x.device) for i in at), values)

    @contextmanager
    def _results(self, layer: int) -> Iterator[None]:
        block, change = self.blocks[layer], self.changes["result", layer]

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            inside = (change.row >= self._offset) & (change.row < self._offset + len(output))
            at = (change.row[inside] - self._offset, change.column[inside])
            head, values = change.head[inside], change.values[inside.to(change.values.device)].to(output)
            now = result_of(block, args[0].unflatten(-1, (-1, block.d_head))[at][torch.arange(len(head)), head], head)
            return output.index_put(at, values - now, accumulate=True)

        handle = block.projection.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _last_mlp(self, original: Callable, hidden: Tensor, *rest: Any, **kwargs: Any) -> Any:
        """Of the last MLP, only what the read columns get; zero elsewhere, where nothing looks."""
        columns = self.read_at[: len(hidden)].to(hidden.device)
        if rest or kwargs or hidden.ndim != 3 or columns.shape[1] >= hidden.shape[1]:
            return original(hidden, *rest, **kwargs)
        at = columns[:, :, None].expand(-1, -1, hidden.shape[-1])
        some = original(hidden.gather(1, at))
        if not isinstance(some, Tensor) or some.shape != at.shape:
            return original(hidden)
        return torch.zeros_like(hidden).scatter(1, at, some)


class Prefix:
    """Stands where a key/value cache is expected: the recorded keys and values of the columns before the rows' own."""

    is_compileable = False
    is_sliding = ()
    layers = ()

    def __init__(self, around: Pass):
        self._pass = around

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self._pass.start
        if not start:
            return keys, values
        recorded = self._pass.recording.keys_values[layer]
        example = self._pass.example[: len(keys)].to(keys.device)
        return tuple(_behind(old, example, start, new) for old, new in zip(recorded, (keys, values), strict=True))

    def get_seq_length(self, layer: int = 0) -> int:
        return self._pass.start

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer: int = 0) -> tuple[int, int]:
        return self._pass.start + query_length, 0


def _behind(recorded: Tensor, example: Tensor, start: int, new: Tensor) -> Tensor:
    """The recorded keys (or values) of each row's example up to `start`, then the row's own."""
    if 2 * start < recorded.shape[2]:
        return torch.cat([recorded[example, :, :start], new], 2)
    whole = recorded.index_select(0, example)  # one copy instead of two
    whole[:, :, start:] = new
    return whole


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Within: the module computes `forward(original, …)`."""
    own, original = module.__dict__.get("forward"), module.forward
    module.forward = lambda *args, **kwargs: forward(original, *args, **kwargs)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _cut(value: Any, rows: int, kept: int) -> Any:
    """Whatever has one entry a row, or a few a row, at the first `kept` rows."""
    if kept == rows:
        return value
    if isinstance(value, Tensor):
        if value.ndim > 1 and value.shape[0] == rows:
            return value[:kept]
        if value.ndim == 3 and value.shape[0] and value.shape[0] % rows == 0:  # alibi: (row · head, 1, key)
            return value[: value.shape[0] // rows * kept]
        return value
    if isinstance(value, tuple | list):
        return type(value)(_cut(v, rows, kept) for v in value)
    if isinstance(value, dict):
        return {k: _cut(v, rows, kept) for k, v in value.items()}
    return value
