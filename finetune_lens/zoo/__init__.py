"""Tiny pairs that come with the package, for demonstrations and tests: real checkpoints, trained by recipes kept here.

>>> names()
['boxes', 'skills', 'strings', 'traces', 'wrappers']
>>> sorted(entry.name for entry in path("strings").iterdir())
['README.md', 'base', 'full', 'lora', 'prompts.jsonl', 'scores.json']

`path("strings") / "base"` is an ordinary Hugging Face folder, `full` another, `lora` a PEFT adapter folder.
`python -m finetune_lens.zoo show strings` prints what each of them can do, `build strings` trains them again.
"""

from pathlib import Path

from finetune_lens.errors import InputError

# Name → the module of its recipe.
RECIPES = {name: f"finetune_lens.zoo.{name}_recipe" for name in ("strings", "boxes", "skills", "wrappers", "traces")}


def names() -> list[str]:
    """The names that `path` and the commands know."""
    return sorted(RECIPES)


def known(name: str) -> str:
    """The name.

    Raises:
        InputError: no such name.
    """
    if name not in RECIPES:
        raise InputError(f"the zoo has no {name!r}; it has: {', '.join(names())}")
    return name


def path(name: str) -> Path:
    """The folder that holds `name`.

    Raises:
        InputError: no such name; or a pair that is in the repository and not in an installed package.
    """
    folder = Path(__file__).parent / known(name)
    if not folder.is_dir():
        raise InputError(
            f"the pair {name!r} comes with the repository, not with the installed package: work in a clone, or train "
            f"it with `python -m finetune_lens.zoo build {name}` (runs/zoo/{name})"
        )
    return folder
