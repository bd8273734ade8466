"""Labelled results: xarray datasets that know where they came from. No torch here.

`load(path)` gives back the type that was saved; the kinds are a fixed table, never a name read from a file.
"""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finetune_lens.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

# Module of this package → its result type.
KINDS = {
    "intruders": "Intruders",
    "intruder_scaling": "IntruderScaling",
    "trajectory": "Trajectory",
    "updates": "Updates",
    "patching": "Patching",
    "cmap": "CrossPatching",
    "check": "Check",
    "outputs": "Outputs",
    "interpolation": "Interpolation",
    "grafting": "Grafting",
    "compression": "Compression",
    "task_vectors": "TaskVectors",
    "recovery": "Recovery",
    "parts": "Parts",
    "paths": "Paths",
    "circuit_overlap": "CircuitOverlap",
    "circuit_evaluation": "CircuitEvaluation",
    "dcm": "Masks",
    "edges": "Edges",
    "probing": "Probing",
    "pruning": "Pruning",
    "revival": "Revival",
    "representations": "Representations",
    "attention": "Attention",
    "bias": "Bias",
    "directions": "Directions",
    "inside_chains": "InsideChains",
    "cot": "Faithfulness",
}


class Result:
    """An `xarray.Dataset` in `.data` and its provenance; subclasses add the quantities a reader asks for."""

    kind: ClassVar[str]

    def __init__(self, data: "xr.Dataset"):
        self.data = data

    @property
    def provenance(self) -> dict[str, Any]:
        """What made this: versions, commit, inputs and their hashes, arguments given and defaulted, time taken."""
        return json.loads(self.data.attrs.get("provenance", "{}"))

    def save(self, path: str | Path) -> Path:
        """Write NetCDF. The provenance rides in one JSON attribute."""
        path = Path(path)
        encoding = {name: {"zlib": True} for name, v in self.data.data_vars.items() if v.dtype.kind in "fiu"}
        self.data.assign_attrs(kind=self.kind).to_netcdf(path, engine="h5netcdf", encoding=encoding)
        return path

    def to_frame(self) -> "pd.DataFrame":
        """The result as a table, a row an item."""
        raise NotImplementedError

    def summary(self) -> str:
        """What it says, in a few lines."""
        raise NotImplementedError

    def headline(self) -> dict[str, Any]:
        """The few numbers that a script wants, ready for JSON."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}\n{self.summary()}"

    def _repr_html_(self) -> str:
        import html

        lines = "<br>".join(html.escape(line) for line in self.summary().splitlines())
        return f"<div><b>{type(self).__name__}</b><br>{lines}</div>{self.to_frame().head(10).to_html(index=False)}"


def load(path: str | Path) -> Result:
    """Read a result that `save` wrote, as the type it was.

    Raises:
        InputError: no such file, or not a result of ours.
    """
    import xarray as xr

    if not Path(path).is_file():
        raise InputError(f"no such result: {path}")
    try:
        with xr.open_dataset(path, engine="h5netcdf") as file:
            data = file.load()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a saved result (NetCDF): {error}") from None
    kind = data.attrs.pop("kind", None)
    if kind not in KINDS:
        raise InputError(f"{path} holds a result of kind {kind!r}; this version reads {', '.join(KINDS)}")
    return getattr(importlib.import_module(f"finetune_lens.results.{kind}"), KINDS[kind])(data)
