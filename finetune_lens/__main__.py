"""`python -m finetune_lens` lists the commands; `python -m finetune_lens NAME …` runs one."""

import importlib
import importlib.util
import sys

COMMANDS = (
    "check", "outputs", "updates", "intruders", "task_vectors", "grafting", "interpolation", "compression", "patching",
    "cmap", "circuits", "probing", "representations", "attention", "directions", "pruning",
    "revival", "recovery", "parts", "zoo", "demo",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        sys.argv = [name, *arguments[1:]]
        importlib.import_module(_home(name)).main()
        return
    listing = "\n".join(f"  {c:<17}{_first_line(c)}" for c in COMMANDS)
    text = f"What did fine-tuning do to this model?\n\nUsage: python -m finetune_lens NAME …\n\n{listing}\n"
    if name in ("--help", "-h", "help"):
        print(text)
        return
    print(f"error: there is no command {name!r}\n\n{text}", file=sys.stderr)
    raise SystemExit(2)


def _home(name: str) -> str:
    """The module with the command: of a package its `__main__`."""
    module = f"finetune_lens.{name}"
    found = importlib.util.find_spec(module)
    return f"{module}.__main__" if found and found.submodule_search_locations else module


def _first_line(name: str) -> str:
    return (importlib.import_module(f"finetune_lens.{name}").__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    main()
