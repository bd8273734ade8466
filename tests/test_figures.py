"""Every figure is drawn from the results that are kept, without a model, to the same bytes; the gallery has them."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from figures import gallery

matplotlib.use("agg")
ROOT = Path(__file__).resolve().parents[1]
DRAWN = [name for name in gallery.MODULES if name != "demo"]  # the demo's results are made by `make demo`
CHEAP = ("boxes", "cot_faithfulness")
LOUD = 48  # of 255: by less a pixel may differ where fonts are rendered by another version
PROGRAM = """
import runpy, sys
sys.argv = ["figures", "--out", {out!r}, *{names!r}]
runpy.run_module("figures", run_name="__main__")
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """All of them, as `python -m figures` draws them in a new process; its folder, and what it printed."""
    out = tmp_path_factory.mktemp("figures")
    words = [sys.executable, "-c", PROGRAM.format(out=str(out), names=DRAWN)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_that_of_the_stored_results(drawn, name):
    out = drawn[0]
    for file in gallery.module(name).GALLERY:
        found, kept = (
            np.asarray(Image.open(folder / f"{file}.png").convert("L"), float) for folder in (out, gallery.HERE)
        )
        assert found.shape == kept.shape
        assert (np.abs(found - kept) > LOUD).mean() < 0.005, f"{file}.png is not what is drawn now: make figures"
        assert found.std() > 10, "it shows something"
        assert (out / f"{file}.pdf").read_bytes().startswith(b"%PDF")


def test_no_model_is_needed(drawn):
    out, printed, said = drawn
    assert printed == "[]\n", "neither torch nor transformers was imported"
    files = {path.name for path in out.iterdir()}
    names = [file for name in DRAWN for file in gallery.module(name).GALLERY]
    assert files == {"README.md", *(f"{file}.{kind}" for file in names for kind in ("png", "pdf"))}
    lines = said.splitlines()
    assert [line.split()[0] for line in lines] == [f"[{n}/{len(DRAWN)}]" for n in range(1, len(DRAWN) + 1)]
    assert all(name in line for name, line in zip(DRAWN, lines, strict=True))


@pytest.mark.parametrize("name", CHEAP)
def test_the_same_figure_is_the_same_file(drawn, name, tmp_path):
    """In another process, after other figures and an hour later: git stays clean."""
    for file in gallery.write(gallery.module(name).figures, tmp_path):
        for kind in gallery.KINDS:
            assert (tmp_path / f"{file}.{kind}").read_bytes() == (drawn[0] / f"{file}.{kind}").read_bytes()
        assert b"CreationDate" not in (tmp_path / f"{file}.pdf").read_bytes()


def test_the_gallery_shows_every_figure():
    page = (gallery.HERE / "README.md").read_text()
    assert page == gallery.page(), "make figures writes it"
    shown = re.findall(r"!\[[^\]]+\]\((\w+)\.png\)", page)
    assert sorted(shown) == sorted(path.stem for path in gallery.HERE.glob("*.png"))
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (gallery.HERE / link).is_file(), link
    for package, name in re.findall(r"python -m (analyses|figures)\.(\w+)", page):
        assert (ROOT / package / f"{name}.py").is_file()


def test_every_module_is_drawn():
    files = {path.stem for path in gallery.HERE.glob("*.py")} - {"__main__", "gallery"}
    assert files == {*gallery.MODULES}
    assert len(gallery.MODULES) == len(files)


def test_the_demo_waits_for_its_results(tmp_path, monkeypatch, capsys):
    from figures import __main__ as command

    demo = gallery.module("demo")
    draw = demo.figures
    monkeypatch.setattr(demo, "figures", lambda: draw(tmp_path / "runs"))
    monkeypatch.setattr(sys, "argv", ["figures", "demo", "--out", str(tmp_path)])
    command.main()
    assert capsys.readouterr().err == "[1/1] demo: no results: make demo\n"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_an_unknown_figure_ends_in_one_line(monkeypatch, capsys, tmp_path):
    from figures import __main__ as command

    monkeypatch.setattr(sys, "argv", ["figures", "nothing", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "found 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
