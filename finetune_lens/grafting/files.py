"""The files of grafts: what a run leaves, and what others have left."""

import re
from collections.abc import Sequence
from pathlib import Path

from finetune_lens.errors import InputError

LEFT = re.compile(r"graft(-[0-9.e+-]+)?\.safetensors")  # what a search leaves


def named(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Graft files by the last parts of their paths, as many as tell them apart; a file called graft by its folder.

    Raises:
        InputError: one file given twice.
    """
    given = [Path(path).resolve() for path in paths]
    bare = [path.parent if path.stem == "graft" else path.with_suffix("") for path in given]
    for parts in range(1, max((len(path.parts) for path in bare), default=1) + 1):
        names = ["/".join(path.parts[-parts:]) for path in bare]
        if len({*names, "this"}) > len(names):
            return dict(zip(names, given, strict=True))
    raise InputError(f"a graft is given twice, or two in one folder cannot be told apart: {', '.join(map(str, given))}")


def leaving(folder: Path, sparsities: Sequence[float], beside: Sequence[str | Path]) -> dict[float, Path]:
    """Which file each search leaves.

    Raises:
        InputError: it is one of the grafts that are compared with.
    """
    names = ["graft"] if len(sparsities) == 1 else [f"graft-{value:g}" for value in sparsities]
    found = {value: folder / f"{name}.safetensors" for value, name in zip(sparsities, names, strict=True)}
    for path in {p.resolve() for p in found.values()} & {Path(p).resolve() for p in beside}:
        raise InputError(f"{path} is to be compared with, and would be overwritten; leave the grafts in another folder")
    return found


def drop_earlier(folder: Path, kept: Sequence[Path]) -> None:
    """Remove the grafts that an earlier run left in the folder: its searches were others."""
    kept = {path.resolve() for path in kept}
    for path in folder.glob("graft*.safetensors"):
        if LEFT.fullmatch(path.name) and path.resolve() not in kept:
            path.unlink()
