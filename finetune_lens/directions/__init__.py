"""Is a feature written along the same direction in both models, and does the direction do the same in either?

Two classes of prompts (harmful and harmless requests, say). At a position and depth, in base and in tuned model,

    r = mean of x over one class − mean over the other,      r̂ = r/‖r‖

(difference in means: Arditi et al. 2024, arXiv 2406.11717, §2.3; Rimsky et al. 2024, arXiv 2312.06681), from one half
of the prompts. On the other half, held out: how far the classes lie apart along r̂, in either model along its own
direction and along the other's,

    d′ = (μ₊ − μ₋) / √((σ₊² + σ₋²)/2),

cos(r_base, r_tuned) with its bootstrap interval, and, where prompts have answers, the effect of taking r̂ out of the
residual stream everywhere and of adding c·r at one depth (`hooked.steering`):

    effect = metric(edited) − metric(unedited), own direction, the other model's, and random ones as long as either.

Nulls: random contrasts, of one half of either class with its other half, the same in both models (any contrast of the
same texts is to some degree alike in a model and its tuned version); for effects, random directions. Ceiling: cosines
of r from two halves of one model's training prompts.

Cost: a forward pass a prompt and side; 20 a held-out prompt with an answer and side for the effects. Resampling:
2·10⁴·n·d flops a side and depth of n prompts and d features.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> words = ("abzkfe", "gkzlqm", "ttzabc", "mnopqr", "uvwxyz", "qwerty")
>>> prompts = [{"prompt": f"<{task}>{word}=", "label": task} for task in ("copy", "flip") for word in words]
>>> found = find_directions(ModelPair.load(folder / "base", folder / "full"), prompts, progress=False)
>>> found.data.direction.dims, found.data.attrs["positive"]
(('depth', 'side', 'feature'), 'flip')
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.directions import INTERVENTIONS, SIDES, SOURCES
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.pair import ModelPair
    from finetune_lens.results.directions import Directions


@recorded
def find_directions(
    pair: "ModelPair",
    prompts: Any,
    *,
    label: str = "label",
    positive: Any = None,
    site: str = "resid_post",
    position: int | str = "last",
    depth: int | None = None,
    scale: float = 1.0,
    metric: str | None = None,
    whole_answer: bool = False,
    template: str = "none",
    seed: int = 0,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    check: bool = True,
    progress: bool = True,
    partial: Path | None = None,
) -> "Directions":
    """Find the direction between two classes of prompts in both models, and compare what it is and does.

    Args:
        pair: base and tuned, of the same depth and width; both have to run.
        prompts: JSONL file or list of prompts with their class in the field `label`; with answers the effects of
            interventions are measured.
        label: the field.
        positive: the class that r points to; by default the last of two in their order (true, 1, the later word). With
            more than two classes, it against all others.
        site: resid_post (with the embedding as depth 0), resid_pre, resid_mid.
        position: where it is read: "last", a number, "mean" over the text, "mean:N", or a mention of a field.
        depth: whose direction is used in interventions; by default the one of the largest d′ in the training half
            (directions of one part of it, d′ in the other), mean of both models.
        scale: c.
        metric: logit_diff, logprob, prob, reciprocal_rank or accuracy: the one that tables and figures show; by default
            logit_diff where all prompts with an answer have a wrong one, else logprob.
        whole_answer: score all tokens of the answer (logprob).
        template: "none"; "each" puts the prompts through the chat template on both sides. Then mentions, means and
            numbers from 0 on are of the prompt's own text; "last" and negative ones count from where the answer begins.
        seed: of the halves, resamples and random directions.
        batch_size: prompts at once.
        check: refuse a pair that fails the trust gate (`check_pair`).
        partial: folder for what is finished, from which an interrupted call continues.

    Raises:
        InputError: prompts without a label, one class only, a class of fewer than four, a position or depth that does
            not exist, models of different shape, tokenizers that read a prompt differently, NaN or Inf
            in activations.
        GateFailed: the trust gate found this pair unsafe to compare.
    """
    from tqdm.auto import tqdm

    from finetune_lens.check import require_safe
    from finetune_lens.directions.contrast import at_depth, classes, halved
    from finetune_lens.directions.interventions import effects, metric_of
    from finetune_lens.hooked.depths import encode_alike, sites_of
    from finetune_lens.hooked.effects import describe_prompts
    from finetune_lens.hooked.features import collect, columns_at
    from finetune_lens.hooked.sites import RESIDUAL
    from finetune_lens.prompts import read_prompts, require_template
    from finetune_lens.representations import require_finite
    from finetune_lens.results.directions import Directions

    if site not in RESIDUAL:
        raise InputError(f"site is one of {', '.join(RESIDUAL)}; found {site!r}")
    if scale == 0 or not np.isfinite(scale):
        raise InputError(f"scale is a number other than 0; found {scale}")
    framed = require_template(template)
    items = read_prompts(prompts, limit=limit)
    is_positive, names = classes(items, label, positive)
    train = halved(items, is_positive, names, seed)
    metric = metric_of(metric, items, whole_answer)
    models = pair.models(device=device, dtype=dtype)
    if models[0].layers != models[1].layers:
        raise InputError(
            f"{models[0].name} has {models[0].layers} layers and {models[1].name} {models[1].layers}: their directions "
            "cannot be compared depth by depth"
        )
    sites = sites_of(models[0], site)
    if depth is not None and not 0 <= depth < len(sites):
        raise InputError(f"depth is 0 to {len(sites) - 1} at {site}; found {depth}")
    encoded = encode_alike(
        models, items, whole=whole_answer, template=template, need_answer=False, padding="right"
    )  # fmt: skip
    columns = columns_at(position, items, encoded, models[0].require_tokenizer(), template=framed)
    if check:
        require_safe(pair, device=device, dtype=dtype)
    sides = []
    for side, model in zip(SIDES, models, strict=True):
        with tqdm(total=len(items), desc=f"prompts, {side}", disable=not progress, dynamic_ncols=True) as bar:
            where = partial / side if partial else None
            sides.append(
                collect(model, encoded, sites, columns=columns, folder=where, batch_size=batch_size, tick=bar.update)
            )
        require_finite(sides[-1], side)
    bar = tqdm(sites, desc="depths", disable=not progress, dynamic_ncols=True)
    data = _labelled([at_depth([s.values(name) for s in sides], is_positive, train, seed) for name in bar])
    if depth is None:
        apart = data["cross_fitted"].transpose("side", "depth").values.mean(0)
        chosen = int(np.argmax(np.nan_to_num(apart, nan=-np.inf)))
    else:
        chosen = depth
    asked = np.flatnonzero(~train & np.array([bool(item.answer) for item in items]))
    if len(asked):
        vectors = data["direction"].isel(depth=chosen).transpose("side", "feature").values.astype(np.float64)
        found = effects(
            models, encoded.rows(asked), vectors, sites[chosen], scale=scale, seed=seed, batch_size=batch_size,
            progress=progress, partial=partial,
        )  # fmt: skip
        data = data.assign(_of_answers(found, asked, len(items)))
    data = data.assign(positive=("example", is_positive), held_out=("example", ~train))
    record = {
        "notes": [], "prompts": describe_prompts(items),
        "models": {side: model.describe() for side, model in zip(SIDES, models, strict=True)},
    }  # fmt: skip
    coords = {"side": SIDES, "source": SOURCES, "intervention": INTERVENTIONS, "example": [item.id for item in items]}
    data = data.assign_coords(
        {n: np.array(v, dtype=object) for n, v in coords.items()} | {"depth": np.arange(len(sites))}
    )
    return Directions(
        data.assign_attrs(
            site=site, position=str(position), label=label, positive=names[1], negative=names[0], depth=chosen,
            depth_given=int(depth is not None), scale=float(scale), metric=metric if len(asked) else "",
            provenance=json.dumps(record),
        )
    )  # fmt: skip


def _labelled(depths: list[dict[str, np.ndarray]]) -> "xr.Dataset":
    """What was found at each depth, under the names of dimensions."""
    import xarray as xr

    dims = {
        "direction": ("side", "feature"), "cosine": (), "cosine_low": (), "cosine_high": (),
        "cosine_null": ("draw",), "cosine_halves": ("side", "half"), "cross_fitted": ("side",),
        "projection": ("side", "source", "example"), "separation_null": ("side", "draw"),
    }  # fmt: skip
    return xr.Dataset({n: (("depth", *rest), np.stack([one[n] for one in depths])) for n, rest in dims.items()})


def _of_answers(found: dict[str, np.ndarray], asked: np.ndarray, examples: int) -> dict[str, Any]:
    """The effects along all examples, NaN of those that were not asked."""
    named = {}
    for name, values in found.items():
        whole = np.full((*values.shape[:-1], examples), np.nan)
        whole[..., asked] = values
        middle = ("intervention", "source", "random")[: whole.ndim - 2]
        named[name] = (("side", *middle, "example"), whole)
    return named
