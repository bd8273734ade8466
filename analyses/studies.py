"""Which steps of a study, and at which scale? What the command lines of all studies share.

    python -m analyses.NAME [STEP …] [--scale tiny|paper]

`tiny` is the study that analyses/results holds: pairs that ship, or that one core trains. `paper` is the size of the
published experiment; what it needs beyond this repository is said in one line where it is not there.
"""

from collections.abc import Sequence
from typing import Annotated

import typer

from finetune_lens.errors import InputError

SCALES = ("tiny", "paper")
Steps = Annotated[
    list[str] | None,
    typer.Argument(metavar="STEP", help="Which steps; all by default.", show_default=False),
]
Scale = Annotated[str, typer.Option(help="tiny (the study whose results are kept), or paper (the published size).")]


def chosen(given: Sequence[str] | None, steps: Sequence[str]) -> list[str]:
    """The steps that are asked for, in the study's order; all of them where none is named, or `all`.

    Raises:
        InputError: a step that there is not.
    """
    if not given or [*given] == ["all"]:
        return [*steps]
    if unknown := [step for step in given if step not in steps]:
        raise InputError(f"expected some of {', '.join(steps)}, or all; found {unknown[0]!r}")
    return [step for step in steps if step in given]


def require_scale(scale: str, *, paper: str = "") -> None:
    """Refuse what is no scale; and `paper`, where it cannot be run from here, with what it needs.

    Raises:
        InputError: either.
    """
    if scale not in SCALES:
        raise InputError(f"--scale is {' or '.join(SCALES)}; found {scale!r}")
    if scale == "paper" and paper:
        raise InputError(f"--scale paper needs {paper}")


def require_gpu(what: str) -> None:
    """Refuse to begin what would take weeks on processors.

    Args:
        what: is to be computed, as it follows "to".

    Raises:
        InputError: no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"--scale paper needs a GPU to {what}; torch {torch.__version__} finds none on this machine")
