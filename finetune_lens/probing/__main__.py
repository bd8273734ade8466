"""`python -m finetune_lens.probing`."""

from pathlib import Path
from typing import Annotated

import typer

from finetune_lens.command import Base, OutputFolder, Running, Template, Tuned, Unsafe, finish, run
from finetune_lens.probing import probe


def probing(
    base: Base,
    tuned: Tuned,
    prompts: Annotated[Path, typer.Argument(metavar="LABELLED", help="JSONL: prompt and label.")],
    *,
    label: Annotated[str, typer.Option(help="The field with what is to be read out.")] = "label",
    site: Annotated[str, typer.Option(help="resid_post, resid_mid, attn_out, mlp_out, z …")] = "resid_post",
    position: Annotated[
        str, typer.Option(help="last, a number, mean, mean:N (the last N tokens), or a field's mention (name:first+1).")
    ] = "last",
    by: Annotated[str, typer.Option(help="layer, or layer,head at sites of heads such as z.")] = "layer",
    kind: Annotated[str, typer.Option(help="classes, regression; auto: text and whole numbers are classes.")] = "auto",
    penalty: Annotated[float, typer.Option(help="L2 penalty on standardised features.")] = 1.0,
    test: Annotated[float, typer.Option(help="Share of the texts held out.")] = 0.3,
    seeds: Annotated[int, typer.Option(help="Splits, each with a control task of its own.")] = 5,
    group: Annotated[
        str | None, typer.Option(help="Field whose values stay together in training or test.", show_default=False)
    ] = None,
    control: Annotated[bool, typer.Option("--control-task/--no-control-task", help="The control task.")] = True,
    control_field: Annotated[
        str | None, typer.Option(help="Field that the control task labels at random.", show_default=False)
    ] = None,
    template: Template = "none",
    unsafe: Unsafe = False,
    common: Running,
) -> None:
    """Probe both models for a label at every depth: accuracy beside majority and control task, and transfer."""
    from finetune_lens.probing.labels import read_labels
    from finetune_lens.prompts import read_prompts

    folder = OutputFolder(common.out, "probing", force=common.force)
    items = read_prompts(prompts, limit=common.limit)
    read_labels(items, label, kind=kind)
    pair = common.pair(base, tuned)
    folder.check()
    result = probe(
        pair, items, label=label, site=site, position=position, by=by, kind=kind, penalty=penalty, test=test,
        seeds=seeds, group=group, control=control, control_field=control_field, template=template, seed=common.seed,
        check=not unsafe, partial=folder.partial, **common.execution(),
    )  # fmt: skip
    finish(result, folder, common)


def main() -> None:
    run(probing)


if __name__ == "__main__":
    from finetune_lens.probing.__main__ import main

    main()
