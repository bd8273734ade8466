"""The site is built without a warning and loads nothing from outside; what its pages show exists, parses and runs."""

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from filelock import FileLock

import finetune_lens as fl
from docs import commands, docstrings
from finetune_lens.__main__ import COMMANDS
from finetune_lens.results import KINDS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
ANALYSES = [name for name in COMMANDS if name not in ("zoo", "demo")]
SECTIONS = ["Method", "Run it", "Reading the", "Pitfalls", "Cost", "Citation", "Options"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(block, id=f"{name}-{n}")
    for name, text in PAGES.items()
    if name != "extending.md"
    for n, (language, block) in enumerate(FENCED.findall(text))
    if language == "python"
]


def lines():
    """Every complete command of the package that a page shows."""
    found = []
    for name, text in PAGES.items():
        shown = [
            line for language, block in FENCED.findall(text) if language != "python" for line in block.splitlines()
        ]
        for line in [*shown, *re.findall(r"`(python -m [^`]+)`", text)]:
            line = line.removeprefix(".venv/bin/")
            if line.startswith("python -m finetune_lens.") and not re.search("…|NAME|DIR", line):
                found.append((name, line))
    return found


class Loads(HTMLParser):
    """What a browser fetches by itself for a page."""

    def __init__(self, page):
        super().__init__()
        self.found, self.ids = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        self.found += [given[name] for name in ("src", "srcset", "poster", "data") if given.get(name)]
        if tag == "link" and given.get("href"):
            self.found.append(given["href"])


def outside(addresses):
    return [address for address in addresses if re.match(r"(https?:)?//", address.strip())]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, one for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    built = folder / ".built"
    with FileLock(f"{folder}.lock"):
        if not built.exists():
            words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
            environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "error"}
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
            assert done.returncode == 0, done.stderr
            said = (done.stdout + done.stderr).splitlines()
            assert [line for line in said if line.strip() and not line.startswith("INFO")] == []
            built.touch()
    return folder


@pytest.fixture(scope="module")
def html(site):
    return {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}


def test_every_page_is_there(html):
    assert {name.removesuffix(".md") + ".html" for name in PAGES} <= {*html}
    beside = [f"results/{file.stem}.html" for file in (ROOT / "analyses" / "results").glob("*.md")]
    assert beside
    assert {*beside, "changelog.html", "pairs/strings.html", "benchmarks/spectra.html"} <= {*html}


def test_nothing_is_loaded_from_outside(site, html):
    assert outside(Loads('<script src="https://a.b/c.js"></script><link href="//fonts.c"><img src="x.png">').found) == [
        "https://a.b/c.js",
        "//fonts.c",
    ]
    found = {name: outside(Loads(page).found) for name, page in html.items()}
    assert {name: some for name, some in found.items() if some} == {}
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert styles
    for style in styles:
        assert outside(re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", style)) == []


def test_images_and_scripts_are_there(site, html):
    for name, page in html.items():
        for address in Loads(page).found:
            if not address.startswith("data:") and name != "404.html":  # a server's page, seen from its root
                assert (site / name).parent.joinpath(address.partition("?")[0]).exists(), f"{name}: {address}"


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_has_its_page(name, html):
    page = PAGES[f"analyses/{name}.md"]
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    places = [next(i for i, heading in enumerate(headings) if heading.startswith(start)) for start in SECTIONS]
    assert places == sorted(places)
    assert re.match(r"# .*\n\n\*\*[^*]*\?\*\*\n", page)  # the question
    assert f"python -m finetune_lens.{name} " in page
    assert f"(analyses/{name}.md)" in commands.table_of_commands()
    built = html[f"analyses/{name}.html"]
    command = commands.command_of(name)
    for one in getattr(command, "commands", {"": command}).values():
        own = {option for parameter in one.params for option in parameter.opts if option.startswith("--")}
        shown = {option for option in own if f"<code>{option}</code>" in built}
        shared = {option for parameter in commands.command_of("outputs").params for option in parameter.opts}
        assert own - shown <= shared


def test_every_public_name_is_in_the_reference(html):
    where = {"plots": "finetune_lens.plots", "results": "finetune_lens.results", "zoo": "finetune_lens.zoo"}
    ids = set().union(*(Loads(page).ids for name, page in html.items() if name.startswith("api/")))
    for name in fl.__all__:
        public = getattr(fl, name)
        assert where.get(name) or f"{public.__module__}.{name}" in ids, name
    assert {*where.values()} <= ids
    assert {f"finetune_lens.results.{kind}.{name}" for kind, name in KINDS.items()} <= ids
    assert {f"finetune_lens.plots.{name}.{name}" for name in fl.plots.__all__ if name != "figures_of"} <= ids
    linked = PAGES["api/index.md"]
    assert [name for name in fl.__all__ if f"`{name}`" not in linked] == []


@pytest.mark.parametrize(("page", "line"), lines())
def test_commands_parse(page, line):
    commands.parse(line)
    for word in shlex.split(line):
        if word.startswith("finetune_lens/zoo/"):
            assert (ROOT / word).exists()


def test_a_line_with_an_option_that_is_not_there_does_not_parse():
    assert {page for page, _ in lines()} >= {"index.md", "quickstart.md", "checkpoints.md", "analyses/circuits.md"}
    for line, said in {
        "python -m finetune_lens.intruders a b --epsilom 1": "epsilom",
        "python -m finetune_lens.circuits seek a b": "seek",
        "python -m finetune_lens.intruders a b --k ten": "valid integer",
        "python -m finetune_lens.grafting a b": "train",
        "python -m finetune_lens.seek a b": "seek",
    }.items():
        with pytest.raises(Exception, match=said):
            commands.parse(line)


def test_scripts_that_are_named_are_there():
    for text in PAGES.values():
        for package, name in re.findall(r"python -m (analyses|figures|docs)\.(\w+)", text):
            assert (ROOT / package / f"{name}.py").is_file()


@pytest.mark.parametrize("block", BLOCKS)
def test_python(block, tmp_path, monkeypatch, recwarn):
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    matplotlib.pyplot.close("all")


def test_the_analysis_in_one_file(tmp_path, in_new_process, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", PAGES["extending.md"], re.DOTALL)
    script = tmp_path / "touched.py"
    script.write_text(block)
    folder = fl.zoo.path("strings")
    words = [str(script), str(folder / "base"), str(folder / "full"), "--above", "1e-3", "--json", "--quiet"]
    done = in_new_process(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "touched"
    assert {path.name for path in out.iterdir()} >= {"touched.nc", "touched.csv", "run.json"}
    share = _share_changed(folder, 1e-3)
    assert f'"share": {share:.4f}' in re.sub(r"(0\.\d{4})\d+", r"\1", done.stdout)
    again = in_new_process(*words, cwd=tmp_path)
    assert again.returncode == 2
    assert "--force" in again.stderr


def _share_changed(folder, above):
    """Over the matrices, straight from the two files."""
    from safetensors.torch import load_file

    base, full = (load_file(folder / side / "model.safetensors") for side in ("base", "full"))
    matrices = [name for name in base if base[name].ndim == 2]
    changed = sum(int(((full[n].float() - base[n].float()).abs() > above).sum()) for n in matrices)
    return int(changed / sum(base[n].numel() for n in matrices) * 10_000) / 10_000


def test_docstrings_as_the_site_shows_them():
    text = "‖Δ‖_F and `‖Δ‖_F` of a_b.\n\n    ‖Δ‖_F\n\n>>> 1 + 1\n2\n\nArgs:\n"
    text += "    a, b: the two\n        of them.\n    c: one."
    shown = docstrings.rewritten(text)
    assert shown.startswith("‖Δ‖\\_F and `‖Δ‖_F` of a_b.\n\n    ‖Δ‖_F\n\n```python\n>>> 1 + 1\n2\n```\n\nArgs:\n")
    assert shown.endswith("    a: the two\n        of them.\n    b: the two\n        of them.\n    c: one.")


def test_figures_of_pages_have_a_recipe():
    """Every image is one that `docs.figures` draws, and the other way round."""
    figures = importlib.import_module("docs.figures")
    drawn = {*figures.FROM_RESULTS, *figures.MEASURED}
    assert {path.stem for path in (DOCS / "images").glob("*.png")} == drawn
    used = {name for text in PAGES.values() for name in re.findall(r"images/(\w+)\.png", text)}
    assert used == drawn
    for file, _ in figures.FROM_RESULTS.values():
        assert (figures.SAVED / file).is_file()
    assert all(inspect.isfunction(measure) for measure, _ in figures.MEASURED.values())
