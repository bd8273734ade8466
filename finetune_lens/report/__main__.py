"""`python -m finetune_lens.report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from finetune_lens.report.course import Examined


def main() -> None:
    import json
    import shutil

    import typer

    from finetune_lens.command import CheckFailed, OutputFolder, Running, Template, run

    def report(
        base: Annotated[str | None, typer.Argument(metavar="BASE", help="Base model.", show_default=False)] = None,
        tuned: Annotated[str | None, typer.Argument(metavar="TUNED", help="Tuned model.", show_default=False)] = None,
        *,
        prompts: Annotated[
            Path | None, typer.Option(help="JSONL: prompt, answer, wrong, corrupt.", show_default=False)
        ] = None,
        questions: Annotated[
            Path | None, typer.Option(help="JSONL: question, answer, choices.", show_default=False)
        ] = None,
        format: Annotated[
            Path | None, typer.Option(help="JSON: how questions are put to the models.", show_default=False)
        ] = None,
        texts: Annotated[
            Path | None,
            typer.Option(help="Texts to read.  [default: the prompts, else the models' own]", show_default=False),
        ] = None,
        tests: Annotated[
            str, typer.Option(help="Of chains of thought: early, mistakes, paraphrase, filler …")
        ] = "early,mistakes,paraphrase,filler",
        samples: Annotated[int, typer.Option(min=1, help="Chains of thought a question.")] = 20,
        template: Template = "none",
        saved: Annotated[
            list[Path] | None,
            typer.Option("--from", help="Saved results, files or folders, instead of models; may be repeated."),
        ] = None,
        title: Annotated[str | None, typer.Option(help="Of the page.", show_default=False)] = None,
        common: Running,
    ) -> None:
        """One HTML page: what fine-tuning did to this model, from every analysis that the inputs allow."""
        from finetune_lens.report import verdict, write_report
        from finetune_lens.report.course import Inputs, examine
        from finetune_lens.report.page import reasons

        out = Path("runs", "report") if common.out is None else common.out
        target = out / "report.html"
        if target.exists() and not common.force:
            raise InputError(f"{target} exists and would be overwritten; choose another --out, or pass --force")
        OutputFolder(out, "report", force=True).check()
        if saved:
            if base or tuned or prompts or questions:
                raise InputError("--from takes saved results instead of models: leave BASE, TUNED and their files out")
            found = _read(saved)
            name = title or "What did fine-tuning do?"
        else:
            if not base or not tuned:
                raise InputError("expected BASE and TUNED, or saved results with --from")
            for path in (prompts, questions, format, texts):
                if path is not None and not path.is_file():
                    raise InputError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; expected a file")
            pair = common.pair(base, tuned)
            chosen = [test.strip() for test in tests.split(",")]
            inputs = Inputs(
                pair, base, tuned, prompts, questions, format, texts, chosen, samples, template, common.seed,
                common.execution(),
            )  # fmt: skip
            found = examine(inputs, partial=out / ".report.partial")
            name = title or f"What did fine-tuning do? {Path(base).name} → {Path(tuned).name}"
            for step, result in found.results.items():
                OutputFolder(out, step, force=True).write(result)
        write_report(
            found.results, target, title=name, skipped=found.skipped, commands=found.commands, figures=common.plots
        )
        shutil.rmtree(out / ".report.partial", ignore_errors=True)
        sentences = [sentence.text for sentence in verdict(found.results)]
        if common.json:
            record = {"kind": "report", "out": str(out), "page": str(target), "verdict": sentences}
            record |= {"results": {n: r.headline() for n, r in found.results.items()}, "skipped": found.skipped}
            print(json.dumps(record, ensure_ascii=False, allow_nan=False))
        else:
            absent = [f"not run, {', '.join(names)}: {why}" for why, names in reasons(found.skipped).items()]
            print("\n".join([*sentences, *absent]))
            common.say(f"the page is {target}")
        failed = [r for r in found.results.values() if r.kind == "check" and not r.passed]
        if failed:
            raise CheckFailed("the trust gate; the page says what was left out")

    run(report)


def _read(paths: list[Path]) -> "Examined":
    """Results by name, of files and of folders with everything below them, in the order of the page.

    What lies in a folder and is no result of ours is told of; a file that was named has to be one.
    """
    from finetune_lens.report.course import Examined
    from finetune_lens.report.sections import SECTIONS
    from finetune_lens.results import load
    from finetune_lens.results.sources import read

    files: list[Path] = []
    found = Examined()
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        before = len(files)
        for file in sorted(p for p in path.rglob("*.nc") if not any(part.startswith(".") for part in p.parts)):
            try:
                load(file)
                files.append(file)
            except InputError as error:
                found.skipped[str(file.relative_to(path))] = str(error)
        if len(files) == before:
            raise InputError(f"{path} holds no saved result (*.nc)")
    order = {kind: place for place, kind in enumerate(SECTIONS)}
    results = read(dict.fromkeys(files))
    found.results |= sorted(results.items(), key=lambda item: order.get(item[1].kind, len(order)))
    return found


if __name__ == "__main__":
    from finetune_lens.report.__main__ import main

    main()
