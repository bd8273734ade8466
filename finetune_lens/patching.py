"""Which activations carry the answer? Patch the run on one prompt with the run on another, place by place.

Activation patching (Vig et al. 2020; Meng et al. 2022; practice: Heimersheim & Nanda 2024, arXiv 2404.15255). With a
clean prompt, its corrupt counterfactual and a metric m:

    denoising   recipient = corrupt run, donor = clean run: does this activation suffice to restore the answer?
    noising     recipient = clean run, donor = corrupt run: is it necessary?
    effect      m(patched) − m(recipient)
    recovery    effect / (m(donor) − m(recipient)), a ratio of means, examples resampled

The two directions are not mirror images. Causal tracing (Meng et al. 2022, §2) is denoising with a recipient whose
subject embeddings have Gaussian noise added, here `trace`; symmetric counterfactuals are to be preferred to noise.

Cost: a patch at layer ℓ and position p costs the blocks ≥ ℓ on the positions ≥ p; a whole layer × position grid about a
quarter of one forward pass a patch. Attribution costs about three forward passes for any number of patches.

>>> from finetune_lens.zoo import path
>>> prompts = [{"prompt": "<copy>gafbdk=", "answer": "g", "wrong": "x", "corrupt": "<copy>xafbdk="}]
>>> found = patch(path("strings") / "base", prompts, site="resid_pre", progress=False)
>>> shares = found.recovery().ratio.sel(direction="denoising", layer=0)
>>> [round(float(shares.sel(position=p)), 2) for p in (2, 3)]        # the letter that differs, and the next
[1.0, 0.0]
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel
    from finetune_lens.results.patching import Patching

DIRECTIONS = ("denoising", "noising")
FEW = 8  # prompts of which it is seen how embeddings enter the first block


@recorded
def patch(
    model: "HookedModel | Any",
    prompts: Any,
    *,
    site: str = "resid_pre",
    direction: str = "denoising",
    by: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    window: int = 1,
    sets: Mapping[str, Sequence[str]] | None = None,
    metric: str = "logit_diff",
    method: str = "exact",
    steps: int = 10,
    align: str = "error",
    whole_answer: bool = False,
    template: str = "none",
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    config: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
    partial: Path | None = None,
) -> "Patching":
    """Patch between the runs on each prompt and on its counterfactual (`corrupt`).

    Args:
        model: a hooked model, a Hugging Face model, or where one lies (folder, file, cached hub id).
        prompts: a JSONL file, or a list of mappings with prompt, answer, wrong, corrupt.
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, pattern or result.
        direction: "denoising" (clean into corrupt), "noising" (corrupt into clean), or "both".
        by: the grid, of "layer", "head", "position"; what is not in it is patched together. Default: layer × position,
            for sites of heads layer × head.
        layers, heads, positions: which; default all. Negative positions count from the end.
        window: so many layers patched together, centred on each.
        sets: named sets of places patched together (`blocks.3.attn.hook_z[7]@-1`), instead of a grid.
        metric: what tables and figures show; all metrics are kept.
        method: exact, full (one forward pass a patch), attribution, integrated, or both (exact and attribution).
        steps: of integrated gradients.
        align: "left" or "right": which positions correspond where prompts differ in length.
        whole_answer: score all tokens of the answer (logprob), not the first alone.
        template: "none"; "each" puts the prompts through the tokenizer's chat template. Then positions from 0 on and
            mentions are of the prompt's own text, and negative ones count from where the answer begins; the result
            names every position by its place in all that is read.
        config, tokenizer: where they do not lie beside the weights.

    Raises:
        InputError: prompts without counterfactual, of different lengths, with answers of several tokens; a site that
            the architecture lacks.
    """
    from finetune_lens.hooked.effects import Direction, Options, effects
    from finetune_lens.hooked.grid import aligned, grid_of_sets, make_grid
    from finetune_lens.hooked.loading import as_model
    from finetune_lens.hooked.sweep import Side
    from finetune_lens.prompts import read_prompts, require_template
    from finetune_lens.results.patching import Patching

    if direction not in (*DIRECTIONS, "both"):
        raise InputError(f"direction is one of {', '.join(DIRECTIONS)}, both; found {direction!r}")
    options = Options(metric, method, steps, batch_size, progress, partial)
    framed = require_template(template)
    items = read_prompts(prompts, limit=limit)
    model = as_model(model, device=device, dtype=dtype, config=config, tokenizer=tokenizer)
    where = aligned(
        items, model.require_tokenizer(), corrupted=True, align=align, whole=whole_answer, template=framed,
        need_answer=metric != "kl",
    )  # fmt: skip
    grid = (
        grid_of_sets(sets, where)
        if sets is not None
        else make_grid(
            model, site, where, by=by, layers=layers, heads=heads, positions=positions, window=window,
        )
    )  # fmt: skip
    clean, corrupt = Side(model, where.clean), Side(model, where.corrupt)
    sides = {"denoising": (corrupt, clean), "noising": (clean, corrupt)}
    wanted = DIRECTIONS if direction == "both" else (direction,)
    data = effects(
        [Direction(name, *sides[name]) for name in wanted], grid, where, items, site="sets" if sets else site,
        options=options, arguments={"analysis": "patching"},
    )  # fmt: skip
    return Patching(data.assign_attrs(window=window))


@recorded
def trace(
    model: "HookedModel | Any",
    prompts: Any,
    *,
    site: str = "resid_post",
    subject: str = "subject",
    noise: float = 3.0,
    copies: int = 10,
    by: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    window: int = 1,
    metric: str = "prob",
    align: str = "error",
    template: str = "none",
    seed: int = 0,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    config: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
    partial: Path | None = None,
) -> "Patching":
    """Causal tracing (ROME, Meng et al. 2022): noise on the subject's embeddings, then clean activations restored.

    Args:
        subject: the field of each prompt that holds its subject, a part of the prompt's text.
        noise: standard deviation of the noise, in standard deviations of the subjects' embeddings as the first block
            reads them.
        copies: noised runs for each prompt, averaged.
        template: as of `patch`; the noise is on the subject where the prompt's own text mentions it.
        seed: of the noise.

    The other arguments are those of `patch`. The recipient is the noised run, the donor the clean one.

    Raises:
        InputError: as `patch`; or a prompt without its subject.
    """
    from finetune_lens.hooked.effects import Direction, Options, effects
    from finetune_lens.hooked.grid import aligned, make_grid
    from finetune_lens.hooked.loading import as_model
    from finetune_lens.hooked.sweep import Side
    from finetune_lens.prompts import read_prompts, require_template
    from finetune_lens.results.patching import Patching

    if noise <= 0 or copies < 1:
        raise InputError(f"noise is positive and there is at least one copy; found {noise} and {copies}")
    options = Options(metric, "exact", 1, batch_size, progress, partial)
    framed = require_template(template)
    items = read_prompts(prompts, limit=limit)
    model = as_model(model, device=device, dtype=dtype, config=config, tokenizer=tokenizer)
    where = aligned(
        items, model.require_tokenizer(), corrupted=False, align=align, template=framed, need_answer=metric != "kl"
    )
    subjects = _subjects(items, where.clean, subject, model.require_tokenizer())
    grid = make_grid(model, site, where, by=by, layers=layers, heads=heads, positions=positions, window=window)
    repeated = where.clean.rows(np.repeat(np.arange(len(items)), copies))
    edits = _noised(model, repeated, np.repeat(subjects, copies, 0), noise, seed)
    data = effects(
        [Direction("restoring", Side(model, repeated, edits), Side(model, repeated), copies)], grid, where, items,
        site=site, options=options,
        arguments={"analysis": "patching", "noise": noise, "copies": copies, "seed": seed, "subject": subject},
    )  # fmt: skip
    return Patching(data.assign_attrs(window=window))


def _subjects(prompts: Sequence[Any], encoded: Any, field: str, tokenizer: Any) -> np.ndarray:
    """(example, pos): True on the tokens that hold the prompt's subject (its first mention)."""
    from finetune_lens.hooked.mentions import tokens_of

    return np.stack([tokens_of(prompt, encoded, row, field, tokenizer) for row, prompt in enumerate(prompts)])


def _noised(model: "HookedModel", encoded: Any, subjects: np.ndarray, noise: float, seed: int) -> Any:
    """Edits of the first residual stream: Gaussian noise on the subjects' tokens, another for each row."""
    import torch

    with torch.no_grad():
        embedded = model.module.get_input_embeddings()(encoded.ids.to(model.device)).float().cpu()
    deviation = float(embedded[torch.from_numpy(subjects)].std()) * _multiplier(model, encoded.rows(slice(FEW)))
    generator = torch.Generator().manual_seed(seed)
    added = torch.randn(embedded.shape, generator=generator) * noise * deviation
    added *= torch.from_numpy(subjects)[:, :, None]

    def edits(examples: np.ndarray) -> list:
        here = added[torch.from_numpy(examples)]
        return [("blocks.0.hook_resid_pre", lambda x: x + here.to(x))]

    return edits


def _multiplier(model: "HookedModel", encoded: Any) -> float:
    """By how much embeddings are multiplied on their way into the first block, where the noise is added: 1 for most.

    Of the same prompts with each token one place further, ⟨x − x′, e − e′⟩ / ‖e − e′‖²: positions cancel.
    """
    import torch

    site, e, x = "blocks.0.hook_resid_pre", [], []
    for ids in (encoded.ids, encoded.ids.roll(1, 1)):
        run = model.run(ids, mask=encoded.mask, capture=[site], logits_at=encoded.read_at[:, :1])
        x.append(run.cache[site].double())
        with torch.no_grad():
            e.append(model.module.get_input_embeddings()(ids.to(model.device)).to(x[-1]))
    apart, moved = ((one - other)[encoded.mask] for one, other in (e, x))
    square = float(apart.square().sum())
    return float((moved * apart).sum()) / square if square else 1.0


def main() -> None:
    import typer

    from finetune_lens.command import Model, OfAdapter, OutputFolder, Patching, finish, run

    def patching(
        model: Model,
        prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="JSONL: prompt, corrupt, answer, wrong.")],
        *,
        base: OfAdapter = None,
        site: Annotated[
            str, typer.Option(help="resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, pattern, result.")
        ] = "resid_pre",
        direction: Annotated[str, typer.Option(help="denoising, noising or both.")] = "denoising",
        noise: Annotated[
            float | None,
            typer.Option(help="Causal tracing: noise on the field `subject`, in σ of embeddings.", show_default=False),
        ] = None,
        copies: Annotated[int, typer.Option(min=1, help="Noised runs a prompt.")] = 10,
        common: Patching,
    ) -> None:
        """Patch the run on each prompt with the run on its counterfactual, place by place."""
        from finetune_lens.prompts import read_prompts

        folder = OutputFolder(common.out, "patching", force=common.force)
        options = common.options()
        if noise is not None and (common.sets or common.whole_answer or common.method != "exact"):
            raise InputError("--noise goes with neither --sets, --whole-answer nor --method")
        items = read_prompts(prompts, limit=common.limit)
        loaded = common.model(model, base)
        folder.check()
        arguments = {"site": site, "template": common.template} | common.grid() | common.execution()
        arguments |= {"partial": folder.partial}
        if noise is not None:
            result = trace(loaded, items, noise=noise, copies=copies, seed=common.seed, **arguments)
        else:
            result = patch(loaded, items, direction=direction, **arguments, **options)
        finish(result, folder, common)

    run(patching)


if __name__ == "__main__":
    from finetune_lens.patching import main

    main()
