"""Do the heads of the two models look at the same places?

Base and tuned model read the same prompts. Of every head and query the attention is a distribution a over the keys; of
a row that does not sum to 1 (a learned sink takes the rest) what is missing counts as one more place. In nats:

    divergence     Jensen–Shannon divergence of a_base and a_tuned, 0 to ln 2 (Lin 1991, eq. 3.4)
    entropy        −Σ a ln a, either side
    first          attention on the first token, either side

means over the queries of a prompt, then over prompts, with paired intervals; the maps themselves of the first prompts.
The floor is what the base differs from itself when the same prompts are computed one by one instead of in batches: a
divergence near it is rounding.

Cost: a forward pass a prompt and side with attention written out, and of the floor one more for `keep` prompts. Memory:
the patterns of a batch, layers·heads·queries·keys numbers a prompt and side.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> prompts = [f"<{task}>{word}=" for task in ("copy", "flip") for word in ("abzkfe", "gkzlqm")]
>>> found = compare_attention(ModelPair.load(folder / "base", folder / "full"), prompts, progress=False)
>>> found.data.pattern.dims, found.data.pattern.shape
(('side', 'kept', 'layer', 'head', 'query', 'key'), (2, 4, 3, 6, 9, 9))
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from torch import Tensor

    from finetune_lens.hooked import HookedModel
    from finetune_lens.pair import ModelPair
    from finetune_lens.prompts import Encoded
    from finetune_lens.results.attention import Attention

UNIT = 32  # prompts that are computed, kept and counted as one
NUMBERS = 1 << 24  # of patterns held at once
MAPS = 1 << 25  # numbers in the maps that are kept
ROUNDING = 0.02  # of a row's sum; in bfloat16 it may be off by so much


@recorded
def compare_attention(
    pair: "ModelPair",
    prompts: Any,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    keep: int = 4,
    template: str = "none",
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    check: bool = True,
    progress: bool = True,
    partial: Path | None = None,
) -> "Attention":
    """Compare the attention patterns of base and tuned model on the same prompts, head by head.

    Args:
        pair: base and tuned, of as many layers and heads; both have to run.
        prompts: a JSONL file, or a list of texts or mappings with prompt.
        layers, heads: which; by default all.
        keep: how many prompts' maps the result holds, the first so many (fewer where they are too large).
        template: "none"; "each" puts the prompts through the chat template on both sides.
        batch_size: prompts at once; by default as many as memory should hold.
        check: refuse a pair that fails the trust gate (`check_pair`).

    Raises:
        InputError: no prompts, tokenizers that read them differently, an architecture that does not hand out its
            attention pattern, a layer or head that does not exist, models of different shape.
        GateFailed: the trust gate found this pair unsafe to compare.
    """
    from finetune_lens.check import require_safe
    from finetune_lens.hooked.depths import encode_alike
    from finetune_lens.prompts import read_prompts, require_template, without_answers
    from finetune_lens.results.attention import Attention

    if keep < 1 or (batch_size is not None and batch_size < 1):
        raise InputError(f"keep and batch size are at least 1; found {keep} and {batch_size}")
    require_template(template)
    items = read_prompts(prompts, limit=limit)
    base, tuned = pair.models(device=device, dtype=dtype)
    if (base.layers, base.heads) != (tuned.layers, tuned.heads):
        raise InputError(
            f"{base.name} has {base.layers} layers of {base.heads} heads and {tuned.name} {tuned.layers} of "
            f"{tuned.heads}; expected models of one shape"
        )
    chosen = {"layer": _chosen("layers", layers, base.layers), "head": _chosen("heads", heads, base.heads)}
    for model in (base, tuned):
        model.require(["pattern"], chosen["layer"])
    encoded = encode_alike((base, tuned), without_answers(items), template=template, need_answer=False, padding="right")
    if check:
        require_safe(pair, device=device, dtype=dtype)
    width, cells = encoded.ids.shape[1], len(chosen["layer"]) * len(chosen["head"])
    kept = int(np.clip(MAPS // (2 * cells * width**2), 1, min(keep, len(items))))
    found = _measured((base, tuned), encoded, chosen, kept, batch_size, progress, partial)
    notes = [] if kept == min(keep, len(items)) else [f"maps of {kept} prompts only: those of more are too large"]
    return Attention(_labelled(found, (base, tuned), items, encoded, chosen, notes))


def _chosen(name: str, given: Sequence[int] | None, count: int) -> list[int]:
    """Numbers of layers or heads, each once.

    Raises:
        InputError: one that does not exist, or none.
    """
    numbers = list(range(count)) if given is None else list(dict.fromkeys(given))
    if not numbers or not all(0 <= n < count for n in numbers):
        raise InputError(f"{name}: expected some of 0 to {count - 1}; found {', '.join(map(str, numbers)) or 'none'}")
    return numbers


def _measured(
    sides: "tuple[HookedModel, HookedModel]", encoded: "Encoded", chosen: dict[str, list[int]], kept: int,
    batch_size: int | None, progress: bool, partial: Path | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Every number, the examples last; finished units are kept in `partial`, and read from there."""
    from tqdm.auto import tqdm

    from finetune_lens.stream import Store

    store = None
    prints = [side.fingerprint for side in sides]
    if partial is not None and all(prints):
        facts = chosen | {
            "analysis": "attention", "models": [s.describe() | {"adapted": s.adapted} for s in sides], "unit": UNIT,
            "texts": [encoded.ids.tolist(), encoded.mask.tolist()], "kept": kept,
        }  # fmt: skip
        store = Store(partial, repr(prints), facts)
    parts = []
    with tqdm(total=len(encoded), desc="prompts", disable=not progress, dynamic_ncols=True) as bar:
        for start in range(0, len(encoded), UNIT):
            index = np.arange(start, min(start + UNIT, len(encoded)))
            done = store.get(str(start)) if store else None
            if done is None:
                done = _unit(sides, encoded.rows(index), chosen, max(0, kept - start), batch_size)
                if store:
                    store.put(str(start), done)
            parts.append(done)
            bar.update(len(index))
    return _joined(parts)


def _unit(
    sides: "tuple[HookedModel, HookedModel]", encoded: "Encoded", chosen: dict[str, list[int]], kept: int,
    batch_size: int | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Some prompts, a batch at a time: fewer where memory does not hold them."""
    import torch

    cells = len(chosen["layer"]) * sides[0].heads
    size = batch_size or max(1, NUMBERS // (2 * cells * encoded.ids.shape[1] ** 2))
    parts, start = [], 0
    while start < len(encoded):
        index = np.arange(start, min(start + size, len(encoded)))
        try:
            parts.append(_batch(sides, encoded.rows(index), chosen, max(0, kept - start)))
        except torch.OutOfMemoryError:
            if len(index) == 1:
                raise
            torch.cuda.empty_cache()
            size = len(index) // 2
            continue
        start += len(index)
    return _joined(parts)


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Side by side along the prompts, which come last."""
    return {name: np.concatenate([part[name] for part in parts], -1) for name in parts[0]}


def _batch(
    sides: "tuple[HookedModel, HookedModel]", encoded: "Encoded", chosen: dict[str, list[int]], kept: int
) -> dict[str, np.ndarray]:
    """divergence (layer, head, prompt), entropy and first (side, layer, head, prompt); of the first `kept` prompts
    pattern (side, layer, head, query, key, prompt) and floor (layer, head, prompt)."""
    import torch

    both = [_patterns(side, encoded, chosen) for side in sides]
    device = sides[0].device if sides[0].device.type != "mps" else "cpu"  # which has no float64
    there = encoded.mask[:, : both[0][0].shape[-1]].to(device)
    divergence, entropy, first, maps, floor = [], [], [], [], []
    for layer in range(len(chosen["layer"])):
        p, q = (side[layer].to(there.device) for side in both)
        maps.append(torch.stack([p, q])[:, :kept])
        first.append(torch.stack([_mean(a[..., 0].double(), there) for a in (p, q)]))
        p, q = _distributions(p, q, there)
        divergence.append(_mean(_divergence(p, q), there))
        entropy.append(torch.stack([_mean(torch.special.entr(a).sum(-1), there) for a in (p, q)]))
    for row in range(min(kept, len(encoded))):
        alone = _patterns(sides[0], encoded.rows([row]), chosen)
        queries = there[[row], : alone[0].shape[-1]]
        pairs = [(b[[row], :, : a.shape[-1], : a.shape[-1]], a) for b, a in zip(both[0], alone, strict=True)]
        pairs = [_distributions(*(a.to(there.device) for a in pair), queries) for pair in pairs]
        floor.append(torch.stack([_mean(_divergence(*pair), queries)[0] for pair in pairs]))
    pad = encoded.ids.shape[1] - there.shape[1]
    found = {
        "divergence": torch.stack(divergence).movedim(1, -1),
        "entropy": torch.stack(entropy, 1).movedim(2, -1),
        "first": torch.stack(first, 1).movedim(2, -1),
        "floor": torch.stack(floor, -1) if floor else torch.empty(len(divergence), len(chosen["head"]), 0),
        "pattern": torch.nn.functional.pad(torch.stack(maps, 1).float(), (0, pad, 0, pad)).movedim(2, -1),
    }
    return {name: values.cpu().numpy() for name, values in found.items()}


def _patterns(model: "HookedModel", encoded: "Encoded", chosen: dict[str, list[int]]) -> "list[Tensor]":
    """By layer (prompt, head, query, key), cut to the longest prompt."""
    from finetune_lens.hooked.sites import site_name

    width = int(encoded.mask.sum(1).max())
    names = [site_name("pattern", layer) for layer in chosen["layer"]]
    ids, mask = encoded.ids[:, :width], encoded.mask[:, :width]
    run = model.run(ids, mask=mask, capture=names, logits_at=encoded.read_at[:, :1])
    return [run.cache[name][:, chosen["head"]] for name in names]


def _distributions(p: "Tensor", q: "Tensor", queries: "Tensor") -> "tuple[Tensor, Tensor]":
    """Both as distributions in float64: what is missing to 1 as one more place where it is more than rounding."""
    import torch

    p, q = p.double(), q.double()
    rests = [1 - a.sum(-1, keepdim=True) for a in (p, q)]
    if max(float(rest.movedim(1, 2)[queries].max()) for rest in rests) > ROUNDING:
        p, q = (torch.cat([a, rest.clamp_min(0)], -1) for a, rest in zip((p, q), rests, strict=True))
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def _divergence(p: "Tensor", q: "Tensor") -> "Tensor":
    """Jensen–Shannon over the last axis."""
    from torch.special import entr

    return (entr((p + q) / 2) - (entr(p) + entr(q)) / 2).sum(-1).clamp_min(0)


def _mean(values: "Tensor", queries: "Tensor") -> "Tensor":
    """(prompt, head) over the queries that are tokens, of (prompt, head, query)."""
    there = queries[:, None]
    return values.where(there, 0).sum(-1) / there.sum(-1)


def _labelled(
    found: dict[str, np.ndarray], sides: "tuple[HookedModel, HookedModel]", items: Sequence[Any],
    encoded: "Encoded", chosen: dict[str, list[int]], notes: list[str],
) -> Any:  # fmt: skip
    import xarray as xr

    from finetune_lens.hooked.effects import describe_prompts

    ids = np.array([item.id for item in items], dtype=object)
    kept, width = found["pattern"].shape[-1], encoded.ids.shape[1]
    tokens = np.full((kept, width), "", dtype=object)
    for row in range(kept):
        tokens[row, : len(encoded.tokens[row])] = encoded.tokens[row]
    there = (tokens != "") & encoded.mask[:kept].numpy()
    maps = np.moveaxis(found["pattern"], -1, 1)
    maps = np.where((there[:, :, None] & there[:, None, :])[None, :, None, None], maps, np.float32(np.nan))
    cells = ("layer", "head")
    data = {
        "divergence": (("example", *cells), np.moveaxis(found["divergence"], -1, 0)),
        "entropy": (("side", "example", *cells), np.moveaxis(found["entropy"], -1, 1)),
        "first": (("side", "example", *cells), np.moveaxis(found["first"], -1, 1)),
        "floor": (("kept", *cells), np.moveaxis(found["floor"], -1, 0)),
        "pattern": (("side", "kept", *cells, "query", "key"), maps),
        "token": (("kept", "query"), tokens),
    }
    coords = {name: np.array(numbers) for name, numbers in chosen.items()}
    coords |= {"side": np.array(["base", "tuned"], dtype=object), "example": ids, "kept": ids[:kept]}
    record = {
        "notes": notes, "prompts": describe_prompts(items),
        "models": {name: side.describe() for name, side in zip(("base", "tuned"), sides, strict=True)},
    }  # fmt: skip
    return xr.Dataset(data, coords=coords).assign_attrs(provenance=json.dumps(record))


def main() -> None:
    import typer

    from finetune_lens.command import Base, OutputFolder, Running, Template, Tuned, Unsafe, finish, numbers, run

    def attention(
        base: Base,
        tuned: Tuned,
        prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="JSONL: prompt.")],
        *,
        layers: Annotated[str | None, typer.Option(help="Which, as 0,3-5.  [default: all]", show_default=False)] = None,
        heads: Annotated[str | None, typer.Option(help="Which.  [default: all]", show_default=False)] = None,
        keep: Annotated[int, typer.Option(min=1, help="Prompts whose maps are kept, the first so many.")] = 4,
        template: Template = "none",
        unsafe: Unsafe = False,
        common: Running,
    ) -> None:
        """Compare where the heads of the two models look, on the same prompts."""
        from finetune_lens.prompts import read_prompts

        folder = OutputFolder(common.out, "attention", force=common.force)
        which = {"layers": numbers(layers) if layers else None, "heads": numbers(heads) if heads else None}
        items = read_prompts(prompts, limit=common.limit)
        pair = common.pair(base, tuned)
        folder.check()
        result = compare_attention(
            pair, items, keep=keep, template=template, check=not unsafe, partial=folder.partial, **which,
            **common.execution(),
        )  # fmt: skip
        finish(result, folder, common)

    run(attention)


if __name__ == "__main__":
    from finetune_lens.attention import main

    main()
