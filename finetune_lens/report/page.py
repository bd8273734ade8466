"""One HTML page of results that needs nothing but itself: figures as vector graphics with text, tables that sort.

The page forbids itself every request (Content-Security-Policy). Figures keep a white ground in the dark, as on paper.
"""

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from io import StringIO
from typing import TYPE_CHECKING, Any

from finetune_lens.report.sections import SECTIONS, About
from finetune_lens.report.verdict import Sentence, verdict

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from finetune_lens.results import Result

ROWS = 200  # of a table on the page
SHOWN = 2  # figures of a section that are open


@dataclass(frozen=True)
class Drawn:
    """A figure: its vector graphic, its width in inches, and what it shows."""

    svg: str
    width: float
    caption: str


@dataclass(frozen=True)
class Section:
    """One analysis on the page."""

    name: str
    about: About
    summary: str = ""
    figures: list[Drawn] = field(default_factory=list)
    table: str = ""
    notes: list[str] = field(default_factory=list)
    command: str = ""
    call: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    record: str = ""


def page(
    results: "Mapping[str, Result]",
    *,
    title: str,
    skipped: Mapping[str, str] | None = None,
    commands: Mapping[str, str] | None = None,
    figures: bool = True,
) -> str:
    """The HTML of results by name.

    Args:
        skipped: name → why an analysis is not there.
        commands: name → the command that gives the same result alone.
    """
    import jinja2

    sections = [section(name, result, (commands or {}).get(name, ""), figures) for name, result in results.items()]
    absent = {why: [(name, _about(name).title) for name in names] for why, names in reasons(skipped or {}).items()}
    here = files("finetune_lens.report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["anchor"] = anchor
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title, sections=sections, absent=absent, verdict=_paragraph(verdict(results)), sources=_sources(results),
        style=here.joinpath("page.css").read_text(encoding="utf-8"),
        script=here.joinpath("page.js").read_text(encoding="utf-8"), shown=SHOWN,
    )  # fmt: skip


def reasons(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by the reason why they are not there."""
    found: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        found.setdefault(reason, []).append(name)
    return found


def _paragraph(sentences: list[Sentence]) -> list[Sentence]:
    return sentences or [Sentence("None of these results has a verdict; each is told in its section.", "", True)]


def _sources(results: "Mapping[str, Result]") -> dict[str, list[str]]:
    """What was compared, by side; several where the results are not of one pair."""
    found: dict[str, list[str]] = {}
    for result in results.values():
        inputs = result.provenance.get("inputs")
        for side in ("base", "tuned"):
            source = inputs.get(side) if isinstance(inputs, dict) else None
            name = source.get("source") if isinstance(source, dict) else source
            if isinstance(name, str) and name not in found.setdefault(side, []):
                found[side].append(name)
    return found


def _about(name: str) -> About:
    kind, _, ending = name.partition("-")
    about = SECTIONS.get(kind) or About(kind.replace("_", " ").capitalize(), "")
    return about.of(ending) if ending else about


def section(name: str, result: "Result", command: str = "", figures: bool = True) -> Section:
    """What the page says of one result."""
    record = result.provenance
    known = SECTIONS.get(result.kind)
    about = _about(name) if name.partition("-")[0] in SECTIONS else (known or _about(result.kind)).of(name)
    return Section(
        name=name,
        about=about,
        summary=result.summary(),
        figures=drawn(name, result) if figures else [],
        table=table(result.to_frame(), caption=f"{about.title}: {name}.csv"),
        notes=[str(note) for note in record.get("notes") or []],
        command=command,
        call=call(record),
        facts=facts(record),
        record=json.dumps(record, indent=1, ensure_ascii=False),
    )


def drawn(name: str, result: "Result") -> list[Drawn]:
    """Every figure of a result."""
    from finetune_lens import plots

    found = []
    for title, make in plots.figures_of(result).items():
        figure = make()
        found.append(Drawn(svg(figure, f"{name}-{title}"), figure.get_figwidth(), _caption(make, title)))
        _close(figure)
    return found


def _close(figure: "Figure") -> None:
    import matplotlib.pyplot as plt

    plt.close(figure)


def _caption(make: Any, title: str) -> str:
    """The first paragraph of the drawing function's docstring, without what is for who calls it."""
    function = make.args[0] if isinstance(make, partial) and make.args else make
    while isinstance(function, partial):
        function = function.func
    words = " ".join((function.__doc__ or "").partition("\n\n")[0].split())
    words = words.removesuffix(" Returns the axes.").replace("`", "")
    return words or title.replace("_", " ").capitalize() + "."


def anchor(name: str) -> str:
    """A name as an address within the page."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def svg(figure: "Figure", name: str) -> str:
    """A figure as a graphic that can stand in a page: text stays text, names in it are its own."""
    import matplotlib

    prefix = f"figure-{anchor(name)}"
    buffer = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = text.replace("*{", f"#{prefix} *{{")
    width, height = (float(part) for part in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())
    opening = (
        f'<svg id="{prefix}" aria-hidden="true" focusable="false" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {height:g}">'
    )
    return opening + text[text.index(">") + 1 :]


def table(frame: "pd.DataFrame", *, caption: str) -> str:
    """The first rows as an HTML table whose columns can be sorted by."""
    shown = frame.head(ROWS)
    more = f" The first {ROWS} of {len(frame):,} rows; the file has all." if len(frame) > ROWS else ""
    numeric = [str(dtype)[:3] in ("int", "flo", "uin") for dtype in shown.dtypes]
    head = "".join(
        f'<th scope="col" aria-sort="none"{" class=n" if number else ""}>'
        f'<button type="button">{html.escape(str(column))}</button></th>'
        for column, number in zip(shown.columns, numeric, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(value, number) for value, number in zip(row, numeric, strict=True)) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    title = f"<caption>{html.escape(caption)}.{more}</caption>"
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(value: Any, number: bool) -> str:
    if number:
        if value != value:
            return "<td class=n data-value=''>–</td>"
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        return f"<td class=n data-value='{value!r}'>{shown}</td>"
    return f"<td>{html.escape(str(value))}</td>"


def call(record: Mapping[str, Any]) -> str:
    """The call in Python that made the result."""
    name = record.get("analysis")
    if not name:
        return ""
    given = ", ".join(f"{key}={value!r}" for key, value in (record.get("arguments") or {}).items())
    return f"fl.{name}(…{', ' if given else ''}{given})"


def facts(record: Mapping[str, Any]) -> dict[str, str]:
    """Of a record what a reader looks for first."""
    found: dict[str, str] = {}
    commit = record.get("commit") or {}
    versions = record.get("versions") or {}
    seconds = record.get("wall_seconds")
    if record.get("finished"):
        found["Finished"] = str(record["finished"])
    if seconds is not None:
        found["Time taken"] = f"{seconds:,.1f} s"
    if versions:
        found["Versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    if commit.get("id"):
        found["Commit"] = commit["id"][:12] + (" with changes" if commit.get("dirty") else "")
    if record.get("files_sha256"):
        found["Weights (SHA-256)"] = str(record["files_sha256"])
    return found
