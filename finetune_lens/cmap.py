"""Where does the tuned model's gain live? Patch activations across models on the same prompt (CMAP).

Cross-model activation patching (Prakash et al. 2024, "Fine-Tuning Enhances Existing Mechanisms", arXiv 2402.14811, §5):
both models read the same prompt; the donor's activation at a place is put into the recipient's run, which goes on
with its own weights. At `z` (the input of the attention's output projection) the recipient's own W_O reads it, as
published: an edit of a head's W_V is seen there, an edit of its W_O reads exactly 0. At `result` the head's whole
output comes from the donor, its W_O included.

    effect      m(patched) − m(recipient), signed: a place can hurt
    recovery    effect / (m(donor) − m(recipient)), a ratio of means, examples resampled

Controls: a run patched with itself everywhere (must change nothing), and donors run on another prompt of the same
length, over the same grid: what an activation of that model does at all, whatever the prompt.

Cost: as patching, for each direction; the random donor as much again.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> prompts = [{"prompt": f"<flip>{text}=", "answer": "a", "wrong": "b"} for text in ("abz", "gkz", "ttz")]
>>> found = cross_patch(ModelPair.load(folder / "base", folder / "full"), prompts, progress=False)
>>> float(found.data.self_donor.max())
0.0
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import GateFailed, InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.hooked import HookedModel
    from finetune_lens.hooked.effects import Direction, Options
    from finetune_lens.hooked.grid import Aligned, Grid
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.cmap import CrossPatching

DIRECTIONS = ("tuned→base", "base→tuned")
SUMMED = ("result", "pattern")  # sites at which what is put back goes through a sum of its own
SUMMED_LIMIT = 1e-2  # of a metric in float32
ASCII = {"tuned->base": DIRECTIONS[0], "base->tuned": DIRECTIONS[1]}


@recorded
def cross_patch(
    pair: "ModelPair",
    prompts: Any,
    *,
    site: str = "z",
    direction: str = "both",
    by: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    window: int = 1,
    sets: Mapping[str, Sequence[str]] | None = None,
    metric: str = "logit_diff",
    method: str = "exact",
    steps: int = 10,
    controls: bool = True,
    align: str = "error",
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
) -> "CrossPatching":
    """Patch the tuned model's activations into the base, and the base's into the tuned model, on the same prompts.

    Args:
        pair: base and tuned; both have to run (a config beside the weights, or `ModelPair.load(..., config=…)`).
        prompts: a JSONL file, or a list of mappings with prompt, answer, wrong.
        site: z as published; result, attn_out, mlp_out for whole outputs; resid_pre …; q, k, v, pattern.
        direction: "tuned→base", "base→tuned" ("->" will do), or "both".
        controls: donors on other prompts, over the same grid.
        template: "none"; "each" puts the prompts through the chat template on both sides.
        seed: of the assignment of random donors.
        check: refuse a pair that fails the trust gate (`check_pair`).

    The other arguments are those of `patch`.

    Raises:
        InputError: tokenizers that differ on these prompts, activations of different shapes, as `patch`.
        GateFailed: the trust gate found this pair unsafe to compare, or a run patched with itself changes.
    """
    from finetune_lens.check import require_safe
    from finetune_lens.hooked.effects import Direction, Options, effects
    from finetune_lens.hooked.grid import aligned, grid_of_sets, make_grid, require_same_tokens
    from finetune_lens.hooked.sweep import Side
    from finetune_lens.prompts import read_prompts, require_template
    from finetune_lens.results.cmap import CrossPatching

    direction = ASCII.get(direction, direction)
    if direction not in (*DIRECTIONS, "both"):
        raise InputError(f"direction is one of {', '.join(DIRECTIONS)}, both; found {direction!r}")
    templated = require_template(template)
    options = Options(metric, method, steps, batch_size, progress, partial)
    items = read_prompts(prompts, limit=limit)
    base, tuned = pair.models(device=device, dtype=dtype)
    if base.layers != tuned.layers:
        raise InputError(
            f"{base.name} has {base.layers} layers and {tuned.name} {tuned.layers}; expected models of one depth"
        )
    reading = {"align": align, "whole": whole_answer, "template": templated, "need_answer": metric != "kl"}
    where = aligned(items, base.require_tokenizer(), corrupted=False, **reading)
    require_same_tokens(where, aligned(items, tuned.require_tokenizer(), corrupted=False, **reading), items)
    grid = (
        grid_of_sets(sets, where)
        if sets is not None
        else make_grid(base, site, where, by=by, layers=layers, heads=heads, positions=positions, window=window)
    )
    one, other = Side(base, where.clean), Side(tuned, where.clean)
    sides = {DIRECTIONS[0]: (one, other), DIRECTIONS[1]: (other, one)}
    wanted = [Direction(name, *sides[name]) for name in (DIRECTIONS if direction == "both" else (direction,))]
    common: dict[str, Any] = {"site": "sets" if sets else site, "options": options}
    order = others_of_the_same_length(where.clean.prompt_columns.numpy().sum(1), seed)
    if controls and (order < 0).all():
        raise InputError(
            "random donors need another prompt of the same number of tokens, and no two prompts here have one; give "
            "more prompts, or pass controls=False (--no-controls)"
        )
    if check:
        require_safe(pair, device=device, dtype=dtype)
    itself = [_self_donor(d, grid, options) for d in wanted]
    if check and not max(itself) <= _limit_of_itself(grid, base):
        raise GateFailed(
            f"a run patched with itself changes by {max(itself):.2g}, and nothing may change: effects at {site} cannot "
            "be trusted on this pair; to see them all the same pass check=False (--unsafe)"
        )
    data = effects(wanted, grid, where, items, arguments={"analysis": "cmap"}, **common)
    data["self_donor"] = ("direction", itself)
    data.attrs["window"] = window
    if controls:
        data = data.assign(_random(wanted, grid, where, items, order, seed, common))
    return CrossPatching(data)


def _limit_of_itself(grid: "Grid", model: "HookedModel") -> float:
    """How far a run patched with itself may be from itself: not at all, or where heads are summed anew, by rounding."""
    if not any(place.kind in SUMMED for patch in grid.patches for place in patch):
        return 0.0
    return SUMMED_LIMIT * (50 if model.dtype.itemsize < 4 else 1)


def _self_donor(direction: "Direction", grid: "Grid", options: "Options") -> float:
    """The largest change of a metric over prompts when the recipient is patched with all its own activations."""
    from finetune_lens.hooked.sweep import sweep

    everything = tuple(dict.fromkeys(place for patch in grid.patches for place in patch))
    side = direction.recipient
    swept = sweep(side, side, [everything], full=True, batch_size=options.batch_size, progress=False)
    summed = any(place.kind in SUMMED for place in everything)  # where rounding may turn a tie
    smooth = [v for name, v in swept.effects.items() if not (summed and name in ("reciprocal_rank", "accuracy"))]
    return float(max(np.nanmax(np.abs(v), initial=0.0) for v in smooth))


def _random(
    directions: Sequence["Direction"], grid: "Grid", where: "Aligned", prompts: Sequence[Any],
    order: np.ndarray, seed: int, common: dict[str, Any],
) -> "xr.Dataset":  # fmt: skip
    """The effects with each donor run on another prompt of the same length: random_M (direction, …, example)."""
    from dataclasses import replace

    from finetune_lens.hooked.effects import effects
    from finetune_lens.hooked.sweep import Side

    lonely = order < 0
    chosen = np.where(lonely, np.arange(len(order)), order)
    wanted = [replace(d, donor=Side(d.donor.model, d.donor.prompts.rows(chosen))) for d in directions]
    options = replace(
        common["options"], method="exact" if common["options"].method == "both" else common["options"].method
    )
    found = effects(
        wanted, grid, where, prompts, site=common["site"], options=options,
        arguments={"analysis": "cmap-random", "seed": seed},
    )  # fmt: skip
    names = [name for name, values in found.items() if set(grid.dims) <= set(values.dims) and name != "tokens"]
    masked = {f"random_{name}": found[name].where(~_along_examples(lonely, found)) for name in names}
    return found.drop_vars(list(found.data_vars)).assign(masked)


def _along_examples(mask: np.ndarray, data: "xr.Dataset") -> "xr.DataArray":
    import xarray as xr

    return xr.DataArray(mask, dims="example", coords={"example": data.example})


def others_of_the_same_length(lengths: np.ndarray, seed: int) -> np.ndarray:
    """For each example another one of its length, each used once; −1 where it is the only one of its length."""
    generator = np.random.default_rng(seed)
    chosen = np.full(len(lengths), -1)
    for length in np.unique(lengths):
        same = generator.permutation(np.flatnonzero(lengths == length))
        if len(same) > 1:
            chosen[same] = np.roll(same, 1)
    return chosen


def main() -> None:
    import typer

    from finetune_lens.command import Base, OutputFolder, Patching, Tuned, Unsafe, finish, run

    def cmap(
        base: Base,
        tuned: Tuned,
        prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="JSONL: prompt, answer, wrong.")],
        *,
        site: Annotated[
            str, typer.Option(help="z as published; result, attn_out, mlp_out: whole outputs; resid_pre, q, k, v …")
        ] = "z",
        direction: Annotated[str, typer.Option(help="tuned->base, base->tuned or both.")] = "both",
        controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Donors on other prompts.")] = True,
        unsafe: Unsafe = False,
        common: Patching,
    ) -> None:
        """Patch each model's run with the other's on the same prompts, place by place, both ways."""
        from finetune_lens.prompts import read_prompts

        folder = OutputFolder(common.out, "cmap", force=common.force)
        options = common.options()
        items = read_prompts(prompts, limit=common.limit)
        pair = common.pair(base, tuned)
        folder.check()
        result = cross_patch(
            pair, items, site=site, direction=direction, controls=controls, template=common.template, seed=common.seed,
            check=not unsafe, partial=folder.partial, **common.grid(), **options, **common.execution(),
        )  # fmt: skip
        finish(result, folder, common)

    run(cmap)


if __name__ == "__main__":
    from finetune_lens.cmap import main

    main()
