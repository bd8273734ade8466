"""What the site shows and another file holds: figures, printed results, cards of the pairs, tables of options.

A hook of mkdocs. Files of the repository become pages and images of the site, and marks in pages are replaced:
`<!-- options: NAME -->`, `<!-- options: shared -->`, `<!-- commands -->`, `<!-- demo -->`, `<!-- claims: STUDY -->` and
`<!-- other studies -->` (those that the page does not link to), `<!-- results -->` and `<!-- plots -->` (every one's
reference).
"""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # mkdocs is run from anywhere

from docs import commands  # noqa: E402

MARK = re.compile(r"<!-- (?P<what>options|commands|demo|claims|other studies|results|plots)(: (?P<name>[\w.]+))? -->")
CLAIMS = re.compile(r"^## Claims\n+(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
DEMO = re.compile(r"<!-- demo: .*? -->\n(.*?)<!-- /demo -->", re.DOTALL)
# Heading of the navigation → folder of the site, pattern in the repository.
BESIDE = {
    "Every number": ("results", "analyses/results/*.md"),
    "Measured speed": ("benchmarks", "benchmarks/results/*.md"),
    "The pairs": ("pairs", "finetune_lens/zoo/*/README.md"),
}


def on_config(config: Any) -> Any:
    """The navigation, with the pages that lie elsewhere."""
    for heading, (_, pattern) in BESIDE.items():
        pages = [place for place, file in _elsewhere() if file.match(pattern)]
        for section in config.nav:
            for title, entries in section.items():
                if title == "Studies":
                    entries.append({heading: pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """The site's files, and those of the repository that it shows."""
    for place, file in _elsewhere():
        files.append(File.generated(config, place, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page, with its marks replaced."""
    return MARK.sub(lambda mark: _replaced(mark["what"], mark["name"], markdown), markdown)


def _elsewhere() -> Iterator[tuple[str, Path]]:
    """Place in the site, and the file."""
    yield "changelog.md", ROOT / "CHANGELOG.md"
    for file in sorted((ROOT / "figures").glob("*.png")):
        yield f"figures/{file.name}", file
    for folder, pattern in BESIDE.values():
        for file in sorted(ROOT.glob(pattern)):
            name = file.parent.name if file.stem == "README" else file.stem
            yield f"{folder}/{name}.md", file


def _replaced(what: str, name: str | None, page: str) -> str:
    if what == "options":
        return commands.table_of_shared() if name == "shared" else commands.table_of(name)
    if what == "commands":
        return commands.table_of_commands()
    if what == "claims":
        return _claims(ROOT / "analyses" / "results" / f"{name}.md")
    if what == "demo":
        found = DEMO.search((ROOT / "README.md").read_text())
        assert found, "README.md has no table of the demo"
        return found[1]
    if what in ("results", "plots"):
        package = importlib.import_module(f"finetune_lens.{what}")
        names = package.KINDS if what == "results" else [name for name in package.__all__ if name != "figures_of"]
        return "\n\n".join(f"::: finetune_lens.{what}.{name}" for name in names)
    files = sorted((ROOT / "analyses" / "results").glob("*.md"))
    return "\n\n".join(_study(file) for file in files if f"(results/{file.name})" not in page)


def _claims(file: Path) -> str:
    """The table of claims that a study printed; "" where it has none."""
    found = CLAIMS.search(file.read_text())
    return found[1].strip() if found else ""


def _study(file: Path) -> str:
    title = file.read_text().partition("\n")[0].lstrip("# ")
    figure = ROOT / "figures" / f"{file.stem}.png"
    shown = [f"![{title}](figures/{figure.name})"] if figure.is_file() else []
    numbers = f"[Every number](results/{file.name}); `python -m analyses.{file.stem}` measures it again."
    return "\n\n".join([f"## {title}", *shown, _claims(file), numbers])
