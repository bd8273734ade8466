"""`python -m finetune_lens.intruders`: find intruder dimensions; with --scale also what they do for the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_lens.command import (
    AllowNonfinite,
    Base,
    Fused,
    Orientation,
    OutputFolder,
    Running,
    Template,
    TunedOrSeveral,
    analyse_weights,
    run,
    span,
)
from finetune_lens.errors import InputError
from finetune_lens.intruders import find_intruders, scale_intruders
from finetune_lens.intruders.scale import checked
from finetune_lens.prompts import require_template

if TYPE_CHECKING:
    from finetune_lens.pair import ModelPair
    from finetune_lens.results import Result


def intruders(
    base: Base,
    tuned: TunedOrSeveral,
    *,
    epsilon: Annotated[float, typer.Option(help="Threshold on max |cos|.")] = 0.5,
    k: Annotated[int, typer.Option(help="Leading singular vectors judged in each matrix.")] = 10,
    side: Annotated[str, typer.Option(help="left, right or both.")] = "left",
    ranks: Annotated[
        int | None, typer.Option(help="Vectors looked at.  [default: all up to order 1024]", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="auto, exact, cached (base once) or certified (proofs).")] = "auto",
    null_draws: Annotated[int, typer.Option(help="Random updates per null and matrix; 0 for none.")] = 5,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for decomposed bases, to reuse on other checkpoints.")
    ] = None,
    cache_gb: Annotated[float, typer.Option(help="Size that folder may reach.")] = 20.0,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Include embeddings and unembedding.")] = False,
    fused: Fused = False,
    orientation: Orientation = "auto",
    allow_nonfinite: AllowNonfinite = False,
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST:STEP",
            help="Scale intruders by these λ, such as 0:2:0.25 or 0,0.5,1, and measure.",
            show_default=False,
        ),
    ] = None,
    evaluate: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="PROMPTS", help="With --scale: JSONL to measure on; may be given again."),
    ] = None,
    which: Annotated[
        str, typer.Option(help="With --scale: the top intruder of each matrix, or all among the top k.")
    ] = "top",
    recovery: Annotated[
        bool, typer.Option("--recovery/--no-recovery", help="With --scale: also keep and remove intruders.")
    ] = True,
    random_draws: Annotated[int, typer.Option(help="With --scale: sets of random vectors kept and removed.")] = 3,
    template: Template = "none",
    common: Running,
) -> None:
    """Intruder dimensions: leading singular vectors of the tuned weights that the base does not have.

    Several TUNED are checkpoints of one run: each intruder is followed from one to the next.

    With --scale the model runs (--dtype, --batch-size, --config, --tokenizer are about that): intruders and their
    neighbours are scaled in all matrices, and every example of --eval is measured (--template is about those).
    --limit counts matrices.
    """
    several = len(tuned) > 1
    name = "trajectory" if several else "intruders"
    options = {
        "fused": fused, "orientation": orientation, "allow_nonfinite": allow_nonfinite, "seed": common.seed,
        "epsilon": epsilon, "k": k, "side": side, "ranks": ranks, "method": method, "null_draws": null_draws,
        "embeddings": embeddings, "cache": cache, "cache_gb": cache_gb,
    }  # fmt: skip
    templated = require_template(template)
    if scale is None:
        if evaluate or templated:
            raise InputError(
                f"{'--eval' if evaluate else '--template'} is of the prompts that scaled intruders are measured on: "
                "pass --scale too, such as --scale 0:2:0.25"
            )
        analyse_weights(name, base, tuned if several else tuned[0], find_intruders, common, **options)
        return
    if several:
        raise InputError(f"--scale takes one TUNED; found {len(tuned)}")
    if not evaluate:
        raise InputError("--scale measures the model: pass --eval PROMPTS.jsonl, once or several times")
    scales = checked(span(scale), which=which, side=side, random_draws=random_draws)
    prompts = _read(evaluate)
    folder = OutputFolder(common.out or Path("runs", name), "intruder_scaling", force=common.force)
    beside: list[tuple[Result, OutputFolder]] = []

    def find_and_scale(pair: "ModelPair", **finding: Any) -> "Result":
        from finetune_lens.evaluation import read_examples
        from finetune_lens.hybrid import Hybrid

        hybrid = Hybrid(pair, device=common.device, dtype=common.dtype)
        for items in prompts.values():  # what does not run is noticed before the work
            read_examples(items, hybrid.tokenizers, template=templated)
        found = find_intruders(pair, **finding)
        execution = common.execution() | {"partial": folder.partial, "seed": common.seed}
        scaled = scale_intruders(
            pair, prompts, scales=scales, which=which, epsilon=epsilon, k=k, side=side, recovery=recovery,
            random_draws=random_draws, embeddings=embeddings, found=found, hybrid=hybrid, template=template,
            **execution,
        )  # fmt: skip
        beside.append((scaled, folder))
        return found

    analyse_weights(name, base, tuned[0], find_and_scale, common, beside=beside, **options)


def _read(files: list[Path]) -> dict[str, Any]:
    """The prompts of each file, under its name without the ending, or its path where two have one name."""
    from finetune_lens.prompts import read_prompts

    short = [file.stem for file in files]
    names = [stem if short.count(stem) == 1 else str(file) for stem, file in zip(short, files, strict=True)]
    if len(set(names)) < len(names):
        raise InputError(f"--eval names {max(names, key=names.count)} twice")
    return {name: read_prompts(file) for name, file in zip(names, files, strict=True)}


def main() -> None:
    run(intruders)


if __name__ == "__main__":
    from finetune_lens.intruders.__main__ import main

    main()
