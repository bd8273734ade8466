"""What the trust gate measures: differences of logits that ought to be none, each relative to the largest logit."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finetune_lens.hooked.model import HookedModel
from finetune_lens.hooked.reentry import Change, record, resume
from finetune_lens.hooked.reentry import Rows as ReentryRows
from finetune_lens.hooked.sites import KINDS, site_name
from finetune_lens.hooked.sweep import Place, Side, sweep
from finetune_lens.prompts import Encoded

Rows = Sequence[Sequence[int]]  # token ids of texts, of any lengths


def random_rows(vocabulary: int, lengths: Sequence[int], seed: int, avoid: Sequence[int] = ()) -> list[list[int]]:
    """Texts of random tokens, for models whose tokenizer is not at hand; none of the tokens to avoid."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(vocabulary)
    allowed[[token for token in avoid if token < vocabulary]] = 0
    if not allowed.any():
        allowed[:] = 1
    return [torch.multinomial(allowed, n, replacement=True, generator=generator).tolist() for n in lengths]


def padded(rows: Rows, side: str) -> tuple[Tensor, Tensor]:
    """ids and mask (row, pos), shorter rows filled up on one side."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = True
    return ids, mask


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest |difference|, relative to the largest |value| or 1; inf where their NaN and infinities differ."""
    kind = torch.promote_types(torch.promote_types(found.dtype, expected.dtype), torch.float32)
    found, expected = found.to(expected.device, kind), expected.to(kind)
    finite = torch.isfinite(expected) & torch.isfinite(found)
    if not torch.allclose(found[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    return float((found - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1.0))


def alone(model: HookedModel, rows: Rows) -> list[Float[Tensor, "pos vocab"]]:
    """The logits of each text by itself, of the plain module: no hook, no padding, no batch."""
    found = []
    with torch.no_grad(), model.side():
        for row in rows:
            found.append(model.module(**model.inputs(torch.tensor([row]), None)).logits[0])
    return found


def hooked(model: HookedModel, rows: Rows, plain: Sequence[Tensor]) -> float:
    """Of runs that keep every activation from runs of the plain module."""
    sites = _sites(model)
    return max(
        difference(model.run(torch.tensor([row]), capture=sites).logits[0], expected)
        for row, expected in zip(rows, plain, strict=True)
    )


def put_back(model: HookedModel, rows: Rows, plain: Sequence[Tensor]) -> float:
    """Of runs in which each activation is replaced by itself: the logits, and what arrives at every site on the way.

    At the logits alone one would see the last site only, for a residual stream replaces all that led to it.
    """
    worst = 0.0

    def back(own: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            nonlocal worst
            worst = max(worst, difference(x, own))
            return own

        return edit

    for row, expected in zip(rows, plain, strict=True):
        ids = torch.tensor([row])
        own = model.run(ids, capture=_sites(model)).cache
        edits = [(name, back(x)) for name, x in own.items()]
        logits = model.run(ids, edits=edits).logits[0]
        worst = max(worst, difference(logits, expected))
    return worst


def batched(model: HookedModel, rows: Rows) -> float:
    """Of a batch of texts of one length from each alone."""
    shortest = min(map(len, rows))
    cut = [row[:shortest] for row in rows]
    together = model.run(torch.tensor(cut)).logits
    return max(difference(one, other) for one, other in zip(together, alone(model, cut), strict=True))


def padding(model: HookedModel, rows: Rows, plain: Sequence[Tensor], side: str) -> float:
    """Of texts padded to the longest from each alone."""
    ids, mask = padded(rows, side)
    logits = model.run(ids, mask=mask).logits
    return max(difference(one[kept], other) for one, kept, other in zip(logits, mask, plain, strict=True))


def reentered(model: HookedModel, rows: Rows) -> tuple[float, list[str]]:
    """Of passes that begin at each layer, from whole ones; and why the architecture is not re-entered, if it is not.

    At each layer: with what was there, and with the residual stream of the next text in its place.
    """
    ids, mask = padded(rows, "left")
    count, width = ids.shape
    read_at, at = torch.full((count, 1), width - 1), torch.full((count,), width - 2)
    none = torch.full((count, 1, 1), -1)
    prompts = Encoded(ids, mask, read_at, none, none[:, 0], mask, mask, [[str(i) for i in r] for r in rows])
    side = Side(model, prompts)
    notes = sweep(side, side, [(Place("resid_pre", 0, column=width - 2),)], progress=False).notes
    if notes:
        return 0.0, notes
    recording, every, worst = record(model, ids, mask, read_at), torch.arange(count), 0.0
    for layer in range(model.layers):
        entry = torch.full((count,), layer)
        same = resume(model, recording, ReentryRows(width - 2, every, entry, torch.zeros(count, dtype=torch.bool)))
        worst = max(worst, difference(same, recording.logits))
        others = recording.residual[layer].roll(1, 0)[:, width - 2]
        change = {("resid_pre", layer): Change(every, at, None, others)}
        patched = ReentryRows(width - 2, every, entry, torch.zeros(count, dtype=torch.bool), change)

        def replaced(x: Tensor, others: Tensor = others) -> Tensor:
            x = x.clone()
            x[:, width - 2] = others.to(x)
            return x

        whole = model.run(ids, mask=mask, edits=[(site_name("resid_pre", layer), replaced)], logits_at=read_at).logits
        worst = max(worst, difference(resume(model, recording, patched), whole))
    return worst, []


def last_layer(recipient: HookedModel, donor: HookedModel, rows: Rows, donors: Sequence[Tensor]) -> float:
    """Of the recipient with the donor's last residual stream, from the donor."""
    site = site_name("resid_post", recipient.layers - 1)
    worst = 0.0
    for row, expected in zip(rows, donors, strict=True):
        ids = torch.tensor([row])
        run = donor.run(ids, capture=[site])
        patched = recipient.run(ids, edits=[(site, run.cache[site])]).logits[0]
        worst = max(worst, difference(patched, expected))
    return worst


def differing_after_blocks(one: HookedModel, other: HookedModel) -> list[str]:
    """The modules behind the last block (final norm, unembedding) whose parameters are not the same on both sides."""
    sides = [_after_blocks(model) for model in (one, other)]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    return [name for name in names if not _equal(sides[0].get(name), sides[1].get(name))]


def _after_blocks(model: HookedModel) -> dict[str, list[Tensor] | None]:
    """Name → parameters of the modules that run after the last block; None: an adapter works there."""
    last, running = model.anatomy.blocks[-1].module, []
    found: dict[str, list[Tensor] | None] = {}

    def finished(module: nn.Module, args: tuple, output: object) -> None:
        running.append(True)

    def seen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            if not running:
                return
            if not hasattr(module, "base_layer"):
                found[name] = [_value(module, n, p) for n, p in module.named_parameters(recurse=False)]
            elif module.disable_adapters:
                found[name] = [_value(module.base_layer, n, p) for n, p in module.base_layer.named_parameters()]
            else:
                found[name] = None

        return hook

    parts = _parts(model.module)
    hooks = [last.register_forward_hook(finished)]
    hooks += [module.register_forward_pre_hook(seen(name)) for name, module in parts.items()]
    try:
        model.run(torch.zeros(1, 1, dtype=torch.int64))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _parts(root: nn.Module) -> dict[str, nn.Module]:
    """Name → module with parameters of its own; a layer with an adapter is one, and what is in it is not."""
    found: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        adapted = hasattr(module, "base_layer")
        inside = any(hasattr(found.get(name[:at]), "base_layer") for at, c in enumerate(name) if c == ".")
        if not inside and (adapted or next(module.parameters(recurse=False), None) is not None):
            found[name] = module
    return found


def _value(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter's numbers, from where accelerate keeps them if the module does not hold them itself."""
    if not parameter.is_meta:
        return parameter
    hook = getattr(module, "_hf_hook", None)
    kept = next((h.weights_map for h in [hook, *getattr(hook, "hooks", ())] if getattr(h, "weights_map", None)), {})
    return kept[name]


def _equal(one: list[Tensor] | None, other: list[Tensor] | None) -> bool:
    if one is None or other is None or len(one) != len(other):
        return False
    return all(a.shape == b.shape and bool((a == b.to(a.device)).all()) for a, b in zip(one, other, strict=True))


def nonfinite(model: HookedModel) -> dict[str, int]:
    """Parameters with NaN or Inf entries, and how many; those of an adapter only where it is on."""
    found = {}
    for path, module in model.module.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}"
            if not model.adapted and ".lora_" in whole:
                continue
            if count := int((~torch.isfinite(_value(module, name, parameter))).sum()):
                found[whole] = count
    return found


def _sites(model: HookedModel) -> list[str]:
    """Every site but the pattern, which is computed by other code, and each head's result, which is what z gives."""
    kinds = [kind for kind in KINDS if kind not in ("pattern", "result")]
    return [site_name(k, layer) for layer in range(model.layers) for k in kinds if not model.lacks(k, layer)]
