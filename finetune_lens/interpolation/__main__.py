"""`python -m finetune_lens.interpolation`: the models between and beyond base and tuned model."""

from pathlib import Path
from typing import Annotated

import typer

from finetune_lens.command import Base, OutputFolder, Running, Template, Tuned, finish, run, span
from finetune_lens.errors import InputError
from finetune_lens.interpolation import interpolate
from finetune_lens.prompts import read_prompts


def interpolation(
    base: Base,
    tuned: Tuned,
    prompts: Annotated[
        Path, typer.Argument(metavar="EVAL", help="JSONL: prompt and, where there is one, answer. The task.")
    ],
    *,
    more: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="Another such file, what the base could do, say; several times."),
    ] = None,
    alpha: Annotated[str, typer.Option(help="Points of the path: FIRST:LAST:STEP, or numbers.")] = "-0.5:1.5:0.1",
    by: Annotated[
        str | None,
        typer.Option(help="Scale the update of each layer, component or matrix.", show_default=False),
    ] = None,
    group_alpha: Annotated[str, typer.Option(help="By so much; 0 and 1 are added.")] = "0,0.25,0.5,0.75,1",
    parts: Annotated[
        str | None,
        typer.Option(
            help="Of path,groups,splits,reset,sharpness.  [default: path,splits; with --by also groups]",
            show_default=False,
        ),
    ] = None,
    reset_seeds: Annotated[int, typer.Option(min=1, help="Halves drawn.")] = 5,
    sharpness_alpha: Annotated[str, typer.Option(help="Points whose sharpness is measured.")] = "0,0.5,1",
    rho: Annotated[float, typer.Option(help="Size of the perturbation, relative to each weight.")] = 0.05,
    draws: Annotated[int, typer.Option(min=1, help="Perturbations a layer.")] = 5,
    objective: Annotated[str, typer.Option(help="How answers are scored: auto, answer, labels, text.")] = "auto",
    template: Template = "none",
    common: Running,
) -> None:
    """Metrics along the path from base to tuned model, and what each layer or component of the update carries."""
    folder = OutputFolder(common.out, "interpolation", force=common.force)
    grids = {"alphas": span(alpha), "group_alphas": span(group_alpha), "sharpness_alphas": span(sharpness_alpha)}
    files = [prompts, *(more or [])]
    names = [path.stem for path in files]
    if len(set(names)) < len(names):
        raise InputError(
            f"results go by the files' names without ending, and two are {max(names, key=names.count)!r}; rename one"
        )
    read = {name: read_prompts(path, limit=common.limit) for name, path in zip(names, files, strict=True)}
    pair = common.pair(base, tuned)
    folder.check()
    result = interpolate(
        pair, read, by=by, parts=parts.split(",") if parts else None, reset_seeds=reset_seeds, rho=rho, draws=draws,
        objective=objective, template=template, seed=common.seed, partial=folder.partial, **grids,
        **common.execution(),
    )  # fmt: skip
    finish(result, folder, common)


def main() -> None:
    interpolation.__module__ = "finetune_lens.interpolation"  # its name in the help
    run(interpolation)


if __name__ == "__main__":
    from finetune_lens.interpolation.__main__ import main

    main()
