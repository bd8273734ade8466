"""`finetune-lens`, or `python -m finetune_lens`, lists the commands; with a NAME it runs one."""

import importlib
import importlib.util
import json
import sys

COMMANDS = (
    "check", "outputs", "updates", "intruders", "task_vectors", "grafting", "interpolation", "compression", "patching",
    "cmap", "circuits", "probing", "representations", "attention", "directions", "pruning",
    "revival", "cot", "cot.bias", "cot.inside", "recovery", "parts", "report", "zoo", "demo",
)  # fmt: skip
USAGE = """What did fine-tuning do to this model?

Usage: finetune-lens NAME …        (or python -m finetune_lens.NAME …)
       finetune-lens NAME --help   the options of one command
       finetune-lens --json        this list for machines
       finetune-lens --version
"""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    given = arguments[0] if arguments else "--help"
    name = given.replace("-", "_")
    if name in COMMANDS:
        sys.argv = [name, *arguments[1:]]
        importlib.import_module(_home(name)).main()
    elif given in ("--help", "-h", "help"):
        print(_listing())
    elif given == "--json":
        print(json.dumps({command: _first_line(command) for command in COMMANDS}, ensure_ascii=False))
    elif given == "--version":
        from finetune_lens import __version__

        print(__version__)
    else:
        print(f"error: there is no command {given!r}\n\n{_listing()}", file=sys.stderr)
        raise SystemExit(2)


def _listing() -> str:
    return USAGE + "".join(f"\n  {command:<17}{_first_line(command)}" for command in COMMANDS)


def _home(name: str) -> str:
    """The module with the command: of a package its `__main__`."""
    module = f"finetune_lens.{name}"
    found = importlib.util.find_spec(module)
    return f"{module}.__main__" if found and found.submodule_search_locations else module


def _first_line(name: str) -> str:
    return (importlib.import_module(f"finetune_lens.{name}").__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    main()
