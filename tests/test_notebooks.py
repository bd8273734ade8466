"""Every notebook runs from a fresh kernel, draws, and is stored as it runs; the script keeps what it cannot run."""

import os
import re

import nbformat
import pytest
import typer
from nbclient.exceptions import CellExecutionError

from notebooks import execute

NOTEBOOKS = sorted(execute.FOLDER.glob("*.ipynb"))
STORED = {path: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
NOT_TO_BE_STORED = {
    "a path of this machine": re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|var|usr|opt|mnt)/|[A-Z]:\\"),
    "an address in memory": re.compile(r"\b0x[0-9a-f]{6,}"),
    "a traceback": re.compile(r"Traceback|Error\b.*line \d"),
}
LIMIT = 400_000  # bytes

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell put out: stdout, stderr, error, or its richest kind of data."""
    rich = ("image/png", "text/markdown", "text/html", "text/plain")
    return [
        output.get("name") or next((kind for kind in rich if kind in output.get("data", {})), output.output_type)
        for output in cell.outputs
    ]


def texts(notebook):
    """All that the outputs say in words."""
    for cell in code(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            yield from (text for kind, text in output.get("data", {}).items() if kind != "image/png")


def made(folder, name, *sources):
    """A notebook with these code cells, never run."""
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{n}") for n, source in enumerate(sources)]
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=execute.METADATA), path)
    return path


def test_there_is_one_a_question():
    assert [path.stem for path in NOTEBOOKS] == [
        "00_quickstart", "01_what_changed_in_the_weights", "02_where_does_the_skill_live",
        "03_which_heads_carry_the_gain", "04_wrapper_or_loss", "05_is_the_chain_of_thought_used", "06_your_own_llama",
    ]  # fmt: skip


@each
def test_runs_and_is_stored_as_it_runs(path, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("FINETUNE_LENS_")]:
        monkeypatch.delenv(name)
    before = path.read_bytes()
    found = execute.executed(path, tmp_path)
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} <= {"runs"}
    for cell, stored in zip(code(found), code(STORED[path]), strict=True):
        assert not {"stderr", "error"} & {*kinds(cell)}, cell.outputs
        assert kinds(cell) == kinds(stored), f"stored otherwise than it runs: make notebooks\n{cell.source}"
        assert cell.source.count("fl.plots.") == 0 or "image/png" in kinds(cell), f"no figure\n{cell.source}"
    assert [output for cell in code(found) for output in kinds(cell)].count("image/png") > 0


@each
def test_stored_outputs_are_whole_and_clean(path):
    notebook = STORED[path]
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    assert notebook.metadata == execute.METADATA
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert path.stat().st_size < LIMIT
    for text in texts(notebook):
        assert {what for what, pattern in NOT_TO_BE_STORED.items() if pattern.search(text)} == set(), text
    assert "text/markdown" in kinds(code(notebook)[-1])  # what can be said, computed
    assert re.search(r"^\*\*Next:\*\* \[", notebook.cells[-1].source, re.MULTILINE)


@pytest.mark.parametrize(
    ("said", "what"),
    {
        "saved in /home/me/x.nc": "a path of this machine",
        "<Axes at 0x7f2a11b0c210>": "an address in memory",
        "Traceback (most recent call last)": "a traceback",
    }.items(),
)
def test_what_is_not_to_be_stored_is_seen(said, what):
    assert [name for name, pattern in NOT_TO_BE_STORED.items() if pattern.search(said)] == [what]


@each
def test_links_lead_somewhere(path):
    words = "\n".join(cell.source for cell in STORED[path].cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", words)
    inside = [link for link in links if not link.startswith("https://")]
    assert len(inside) >= 2
    assert [link for link in inside if not (path.parent / link).is_file()] == []


def test_names_are_chosen_by_their_beginnings():
    assert execute.named([]) == NOTEBOOKS
    assert [path.stem[:2] for path in execute.named(["03", "notebooks/00_quickstart.ipynb"])] == ["00", "03"]
    with pytest.raises(typer.BadParameter, match=r"no notebook begins with '99'; there are: 00_quickstart, 01"):
        execute.named(["99"])


def test_runs_in_place_and_again_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execute, "FOLDER", tmp_path)
    source = "import os\nopen('left.txt', 'w').close()\nprint(os.environ['OMP_NUM_THREADS'])"
    path = made(tmp_path, "00_fine", source, "print('a')\nprint('b')")
    runs = []
    for _ in range(2):
        with pytest.raises(typer.Exit) as ended:
            execute.main(["00"])
        assert ended.value.exit_code == 0
        runs.append(path.read_bytes())
    assert runs[0] == runs[1]
    assert [cell.outputs[0].text for cell in code(nbformat.read(path, as_version=4))] == ["1\n", "a\nb\n"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["00_fine.ipynb"]
    assert re.fullmatch(r"(00_fine \d+ s, 1 kB\n){2}", capsys.readouterr().err)


def test_a_notebook_that_fails_is_left_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execute, "FOLDER", tmp_path)
    paths = [made(tmp_path, "00_bad", "1 / 0"), made(tmp_path, "01_fine", "print('fine')")]
    before = paths[0].read_bytes()
    with pytest.raises(typer.Exit) as ended:
        execute.main(None)
    assert ended.value.exit_code == 1
    assert paths[0].read_bytes() == before
    assert [cell.outputs[0].text for cell in code(nbformat.read(paths[1], as_version=4))] == ["fine\n"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute.executed(paths[0], tmp_path)
