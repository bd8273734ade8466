"""Docstrings as the site shows them: examples in code blocks, subscripts as they stand, an entry an argument.

In the source, an example begins with `>>>`, which Markdown takes for a quotation, and arguments that share their words
share a line (`epsilon, k: …`), which the reader of docstrings takes for one name.
"""

import re
from typing import Any

import griffe

SHARED = re.compile(r"^(    )(\w+(?:, \w+)+): (.*)$")
SUBSCRIPT = re.compile(r"(?<=[^\w\s`\\])_(?=[^\W_])")
FENCE, PROMPT = "```", ">>>"


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        waiting: list[Any] = [pkg]
        while waiting:
            item = waiting.pop()
            if item.is_alias:
                continue
            waiting += item.members.values()
            if item.docstring:
                item.docstring.value = rewritten(item.docstring.value)


def rewritten(text: str) -> str:
    """The docstring in the Markdown of the site."""
    return _apart(_plain(_fenced(text)))


def _fenced(text: str) -> str:
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if not inside and line.startswith(PROMPT):
            lines.append(f"{FENCE}python")
            inside = True
        elif inside and not line.strip():
            lines.append(FENCE)
            inside = False
        lines.append(line)
    return "\n".join([*lines, FENCE] if inside else lines)


def _plain(text: str) -> str:
    """Subscripts of signs (‖Δ‖_F) escaped, outside code."""
    lines, inside = [], False
    for line in text.splitlines():
        inside ^= line.startswith(FENCE)
        if not inside and not line.startswith("    "):
            pieces = line.split("`")
            pieces[::2] = [SUBSCRIPT.sub(r"\\_", piece) for piece in pieces[::2]]
            line = "`".join(pieces)
        lines.append(line)
    return "\n".join(lines)


def _apart(text: str) -> str:
    """Of arguments that share an entry, each with its own."""
    lines = text.splitlines()
    result: list[str] = []
    at = 0
    while at < len(lines):
        found = SHARED.match(lines[at])
        stop = at + 1
        while found and stop < len(lines) and lines[stop].startswith("        "):
            stop += 1
        names = found[2].split(", ") if found else []
        for name in names:
            result += [f"{found[1]}{name}: {found[3]}", *lines[at + 1 : stop]]
        result += [] if names else [lines[at]]
        at = stop
    return "\n".join(result)
