"""`python -m finetune_lens.zoo`: train the pairs of the zoo again, or show what they can do."""

import importlib
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from finetune_lens import zoo
from finetune_lens.command import Basic, run
from finetune_lens.errors import InputError


def build(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Which pair; `show` lists them.")] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="Every pair of the zoo.")] = False,
    out: Annotated[Path, typer.Option(help="Folder in which the folder NAME is made.")] = Path("runs/zoo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    mini: Annotated[
        bool, typer.Option("--mini", help="A few steps of a toy size: tries the recipe, learns nothing.")
    ] = (False),
    force: Annotated[bool, typer.Option("--force", help="Replace what is already there.")] = False,
    common: Basic,
) -> None:
    """Train a pair from its seed: ten minutes or so, on one core. Interrupted, the same command continues."""
    if (name is None) != every:
        raise InputError(f"name one pair ({', '.join(zoo.names())}) or pass --all")
    chosen = zoo.names() if name is None else [zoo.known(name)]
    for one in chosen:
        if (out / one).exists() and not force:
            raise InputError(f"{out / one} exists and would be replaced; choose another --out, or pass --force")
    for one in chosen:
        recipe = importlib.import_module(zoo.RECIPES[one])
        work = out / f".{one}.partial"
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
        finished = recipe.build(
            work, settings=recipe.MINI if mini else recipe.SETTINGS, seed=seed, progress=common.progress
        )
        if (out / one).exists():
            os.replace(out / one, work / "replaced")
        os.replace(finished, out / one)
        shutil.rmtree(work)
        common.say(f"{out / one}: trained and scored; its README.md says what it can do")


def show(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print the card of this pair.")] = None,
    *,
    common: Basic,
) -> None:
    """List the pairs that come with the package, or print the card of one."""
    if name is not None:
        print((zoo.path(name) / "README.md").read_text(), end="")
        return
    for one in zoo.names():
        if not (Path(zoo.__file__).parent / one).is_dir():
            print(f"{one}: not in this package; `build {one}` trains it")
            continue
        title = (zoo.path(one) / "README.md").read_text().splitlines()[0].lstrip("# ")
        print(f"{title}\n  {zoo.path(one)}")


def main() -> None:
    build.__module__ = show.__module__ = "finetune_lens.zoo"
    run(build, show)


if __name__ == "__main__":
    from finetune_lens.zoo.__main__ import main

    main()
