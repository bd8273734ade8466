"""Tiny pairs that come with the package, for demonstrations and tests: real checkpoints, trained by recipes kept here.

>>> names()
['strings']
>>> sorted(entry.name for entry in path("strings").iterdir())
['README.md', 'base', 'full', 'lora', 'prompts.jsonl', 'scores.json']

`path("strings") / "base"` is an ordinary Hugging Face folder, `full` another, `lora` a PEFT adapter folder.
`python -m finetune_lens.zoo show strings` prints what each of them can do, `build strings` trains them again.
"""

from pathlib import Path

from finetune_lens.errors import InputError

# Name → the module of its recipe.
RECIPES = {"strings": "finetune_lens.zoo.strings_recipe"}


def names() -> list[str]:
    """The names that `path` and the commands know."""
    return sorted(RECIPES)


def path(name: str) -> Path:
    """The folder that holds `name`.

    Raises:
        InputError: no such name.
    """
    if name not in RECIPES:
        raise InputError(f"the zoo has no {name!r}; it has: {', '.join(names())}")
    return Path(__file__).parent / name
