"""Run the notebooks from a fresh kernel and keep what they print and draw.

    python notebooks/execute.py                  # all of them, in place
    python notebooks/execute.py 00 03            # those whose names begin so

A notebook in which a cell fails is left as it was, and the exit code is 1. Outputs are those of one CPU thread, and
nothing of the run is kept but them (no times, no versions), so that running again changes little. What a notebook
writes lands in a temporary folder. Cost: about half a minute a notebook.
"""

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import nbformat
import typer
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 600  # seconds a cell
DPI = 110
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SETTINGS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # unless the environment says otherwise


def named(starts: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of these, in order; all of them for none.

    Raises:
        typer.BadParameter: no name begins so.
    """
    paths = sorted(FOLDER.glob("*.ipynb"))
    for start in starts:
        if not any(path.name.startswith(Path(start).name) for path in paths):
            there = ", ".join(path.stem for path in paths)
            raise typer.BadParameter(f"no notebook begins with {start!r}; there are: {there}")
    return [path for path in paths if not starts or any(path.name.startswith(Path(s).name) for s in starts)]


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in `folder`; the file is not touched.

    Raises:
        CellExecutionError: a cell failed; it says which, and how.
    """
    notebook = nbformat.read(path, as_version=4)
    figures = f"--InlineBackend.print_figure_kwargs={{'dpi': {DPI}, 'bbox_inches': 'tight'}}"
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR", figures],
    )  # fmt: skip
    client.execute(env=SETTINGS | os.environ)
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main(
    notebooks: Annotated[list[str] | None, typer.Argument(help="How their names begin; by default all.")] = None,
) -> None:
    """Run notebooks end to end and store their outputs in them."""
    failed = 0
    for path in named(notebooks or []):
        start = time.monotonic()
        print(path.stem, end=" ", file=sys.stderr, flush=True)
        try:
            with TemporaryDirectory() as folder:
                notebook = executed(path, Path(folder))
        except CellExecutionError as error:
            failed += 1
            print(f"FAILED\n{error}", file=sys.stderr)
            continue
        whole = path.with_suffix(".partial")
        nbformat.write(notebook, whole)
        whole.replace(path)
        seconds, size = time.monotonic() - start, path.stat().st_size
        print(f"{seconds:.0f} s, {size / 1000:.0f} kB", file=sys.stderr)
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
