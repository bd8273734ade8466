"""What is each figure of? How figures are written, and the page that shows them all.

A module of this folder draws the figures of one study. It has `STUDY`, the command that measures it; `CLAIMS`, the file
of its claims in analyses/results, or "" where there is none; `GALLERY`, by the name of each figure's file its title and
a sentence; and `figures()`, which draws them from saved results.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from finetune_lens.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
MODULES = (
    "demo", "lora_vs_full", "skill_localization", "boxes", "entity_tracking", "wrappers", "cot_training",
    "cot_faithfulness",
)  # fmt: skip
KINDS = {"png": {}, "pdf": {"CreationDate": None}}  # no date: the same figure is the same file


def module(name: str) -> ModuleType:
    return importlib.import_module(f"figures.{name}")


def write(figures: "Callable[[], dict[str, Figure]]", folder: Path = HERE) -> list[str]:
    """Draw them without a window, write each as PNG and PDF, and say which they were."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    drawn = figures()
    for name, figure in drawn.items():
        for kind, told in KINDS.items():
            figure.savefig(folder / f"{name}.{kind}", metadata=told)
        plt.close(figure)
    return [*drawn]


def page() -> str:
    """The gallery, as Markdown beside the figures."""
    lines = [
        "# Figures",
        "",
        "Written by `make figures` from saved results, without a model. Each study's script in `analyses/` measures it "
        "again; its claims stand beside its results.",
    ]
    for name in MODULES:
        of = module(name)
        claims = f" Every claim: [{of.CLAIMS}](../analyses/results/{of.CLAIMS})." if of.CLAIMS else ""
        for file, (title, sentence) in of.GALLERY.items():
            lines += [
                "", f"## {title}", "", f"![{title}]({file}.png)", "",
                f"{sentence} ([PDF]({file}.pdf)) Measured by `{of.STUDY}`, drawn by `python -m figures.{name}`."
                f"{claims}",
            ]  # fmt: skip
    return "\n".join(lines) + "\n"


def write_page(folder: Path = HERE) -> None:
    with whole_file(folder / "README.md") as path:
        path.write_text(page())
