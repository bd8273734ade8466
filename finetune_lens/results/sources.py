"""Saved results as the input of what joins them: named, read from files, and described for the record."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune_lens.errors import InputError
from finetune_lens.results import Result, load


class Sources(dict[str, Result]):
    """Name → result."""

    def describe(self) -> dict[str, Any]:
        """Of each its kind, what it was made of, and when."""
        return {
            name: {"kind": result.kind} | {k: result.provenance.get(k) for k in ("inputs", "finished")}
            for name, result in self.items()
        }


def read(paths: Iterable[Path]) -> Sources:
    """Results by the shortest names that tell their files apart: of the file, of its folder, or the whole path.

    Raises:
        InputError: a file twice, no such file, not a result.
    """
    paths = list(paths)
    twice = {str(path) for path in paths if paths.count(path) > 1}
    if twice:
        raise InputError(f"given twice: {', '.join(sorted(twice))}")
    for names in ([p.stem for p in paths], [p.resolve().parent.name for p in paths]):
        if len(set(names)) == len(names):
            break
    else:
        names = [str(p) for p in paths]
    return Sources({name: load(path) for name, path in zip(names, paths, strict=True)})
