"""What did fine-tuning do to this model? One page that answers: every analysis the inputs allow, with a verdict.

    page = verdict + for each result: question, figures, table, caveats, and what made it

The verdict's sentences are built from the results' numbers beside their nulls and intervals. The page is one HTML file
without a request to anything outside it; figures are vector graphics whose text can be searched. Saved results become
the same page without a model.

Cost: that of the analyses (`report.course`), each once; saved results cost their figures.

>>> from finetune_lens import ModelPair, measure_updates, zoo
>>> folder = zoo.path("strings")
>>> found = measure_updates(ModelPair.load(folder / "base", folder / "base"), progress=False)
>>> [sentence.text for sentence in verdict({"updates": found})]
['Nothing changed: all 30 weights of the two models are the same, number for number.']
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_lens.report.verdict import verdict

if TYPE_CHECKING:
    from finetune_lens.results import Result

__all__ = ["verdict", "write_report"]


def write_report(
    results: "Mapping[str, Result]",
    path: "str | Path",
    *,
    title: str = "What did fine-tuning do?",
    skipped: Mapping[str, str] | None = None,
    commands: Mapping[str, str] | None = None,
    figures: bool = True,
) -> Path:
    """Write results by name as one HTML page.

    Args:
        path: of the page; overwritten.
        skipped: name of an analysis → why it is not there.
        commands: name → the command that gives the same result alone.

    Returns:
        The path.
    """
    import matplotlib

    from finetune_lens.files import whole_file
    from finetune_lens.report.page import page

    matplotlib.use("agg")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = page(results, title=title, skipped=skipped, commands=commands, figures=figures)
    with whole_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def main() -> None:
    from finetune_lens.report.__main__ import main as command

    command()
