"""The command lines of the package, as typer builds them: for the tables of options, and to check what pages show."""

import dataclasses
import importlib
import importlib.util
import re
import shlex
from contextlib import suppress
from functools import cache
from typing import Any
from unittest import mock

import typer

from finetune_lens import command
from finetune_lens.__main__ import COMMANDS

# Classes of options that commands share, and whom they serve; each has those of the one before.
SHARED = {
    command.Basic: "Of every command",
    command.Saved: "Of every command that leaves a result",
    command.Common: "Of every analysis of models",
    command.Running: "Of every analysis that runs models",
}
DEFAULT = re.compile(r"\s*\[default: ([^\]]*)\]")
ESCAPED = str.maketrans({"|": r"\|", "<": "&lt;", "*": r"\*"})


@cache
def command_of(name: str) -> Any:
    """What `python -m finetune_lens.NAME` runs: a command, or a group of subcommands."""
    module = f"finetune_lens.{name}"
    found = importlib.util.find_spec(module)
    home = f"{module}.__main__" if found and found.submodule_search_locations else module
    caught: list[typer.Typer] = []
    with mock.patch.object(typer.Typer, "__call__", lambda app, **_: caught.append(app)), suppress(SystemExit):
        importlib.import_module(home).main()
    return typer.main.get_command(caught[0])


def parse(line: str) -> dict[str, Any]:
    """The arguments of a line `python -m finetune_lens.NAME …`, as its command reads them.

    Raises:
        ValueError: no such command or subcommand.
        Exception: click's own, of an option that the command does not have, or a value that it does not take.
    """
    words = shlex.split(line, comments=True)
    if words[:2] != ["python", "-m"] or not words[2].startswith("finetune_lens."):
        raise ValueError(f"expected python -m finetune_lens.NAME …; found {line!r}")
    found, rest = command_of(words[2].removeprefix("finetune_lens.")), words[3:]
    if hasattr(found, "commands"):
        if not rest or rest[0] not in found.commands:
            raise ValueError(f"{words[2]} has the subcommands {', '.join(found.commands)}; found {rest[:1]}")
        found, rest = found.commands[rest[0]], rest[1:]
    return found.make_context(found.name, list(rest)).params


def table_of(name: str) -> str:
    """The arguments and options of a command that are its own, as Markdown; of each subcommand."""
    found = command_of(name)
    if hasattr(found, "commands"):
        return "\n\n".join(f"### `{one}`\n\n{one_.help}\n\n{_own(one_)}" for one, one_ in found.commands.items())
    return _own(found)


def table_of_shared() -> str:
    """The options that commands share, as Markdown."""
    anywhere = {p.name: p for name in ("outputs", "recovery") for p in command_of(name).params}
    before: set[str] = set()
    parts = []
    for kind, title in SHARED.items():
        names = [name for name in _names(kind) if name not in before]
        before |= set(names)
        parts.append(f"### {title}\n\n{_rows([anywhere[name] for name in names])}")
    return "\n\n".join(parts)


def table_of_commands() -> str:
    """Every command that has a page, with its question."""
    rows = []
    for name in COMMANDS:
        if name not in ("zoo", "demo"):
            question = importlib.import_module(f"finetune_lens.{name}").__doc__.partition("\n")[0]
            rows.append(f"| [`{name}`](analyses/{name}.md) | {question.translate(ESCAPED)} |")
    return "\n".join(["| command | question |", "|---|---|", *rows])


def _own(found: Any) -> str:
    shared = {p.name: p.help for p in command_of("outputs").params if p.name in _names(command.Running)}
    return _rows([p for p in found.params if p.name != "help" and shared.get(p.name) != (p.help or "")])


def _names(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _rows(params: list[Any]) -> str:
    rows = []
    for p in params:
        argument, text = p.param_type_name == "argument", p.help or ""
        shown = p.metavar or p.name.upper() if argument else " ".join((*p.opts, *p.secondary_opts))
        shown = " ".join(f"`{word}`" for word in shown.split())
        default = ("required" if p.required else "") if argument else _default(p)
        said = DEFAULT.search(text)
        default = said[1] if said else default
        rows.append(f"| {shown} | {DEFAULT.sub('', text).translate(ESCAPED)} | {default.translate(ESCAPED)} |")
    return "\n".join(["| | | default |", "|---|---|---|", *rows])


def _default(option: Any) -> str:
    if option.required:
        return "required"
    value = option.default
    if option.is_flag:
        off = [o for o in option.secondary_opts if o.startswith("--no-")]
        return (f"`{option.opts[0]}`" if value else f"`{off[0]}`") if off else ""
    if isinstance(getattr(option, "show_default", None), str):
        return str(option.show_default).strip("()")
    return "" if value is None or value == [] or callable(value) else f"`{value}`"
