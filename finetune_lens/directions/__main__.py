"""The command of `find_directions`."""

from pathlib import Path
from typing import Annotated

import typer

from finetune_lens.command import Base, OutputFolder, Running, Template, Tuned, Unsafe, finish, run


def directions(
    base: Base,
    tuned: Tuned,
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="JSONL: prompt, label, and answers if any.")],
    *,
    label: Annotated[str, typer.Option(help="The field that holds the class.")] = "label",
    positive: Annotated[
        str | None, typer.Option(help="The class that the direction points to.  [default: the last of two]")
    ] = None,
    site: Annotated[str, typer.Option(help="resid_post, resid_pre, resid_mid.")] = "resid_post",
    position: Annotated[
        str, typer.Option(help="last, a number, mean, mean:N, or a mention of a field such as subject:first+1.")
    ] = "last",
    depth: Annotated[
        int | None, typer.Option(min=0, help="Whose direction is taken out and added.  [default: the largest d′]")
    ] = None,
    scale: Annotated[
        float, typer.Option("--strength", help="What the direction is multiplied by where it is added.")
    ] = 1.0,
    metric: Annotated[
        str | None, typer.Option(help="logit_diff, logprob, prob, reciprocal_rank, accuracy.", show_default=False)
    ] = None,
    whole_answer: Annotated[bool, typer.Option("--whole-answer", help="Score all tokens of the answer.")] = False,
    template: Template = "none",
    unsafe: Unsafe = False,
    common: Running,
) -> None:
    """Find the direction between two classes of prompts in both models, and what it does in either."""
    from finetune_lens.directions import find_directions
    from finetune_lens.prompts import read_prompts

    folder = OutputFolder(common.out, "directions", force=common.force)
    items = read_prompts(prompts, limit=common.limit)
    pair = common.pair(base, tuned)
    folder.check()
    result = find_directions(
        pair, items, label=label, positive=positive, site=site, position=position, depth=depth, scale=scale,
        metric=metric, whole_answer=whole_answer, template=template, seed=common.seed, check=not unsafe,
        partial=folder.partial, **common.execution(),
    )  # fmt: skip
    finish(result, folder, common)


def main() -> None:
    run(directions)


if __name__ == "__main__":
    from finetune_lens.directions.__main__ import main

    main()
