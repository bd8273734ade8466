"""Does a model's answer follow from the chain of thought before it, and does fine-tuning change that?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from finetune_lens.errors import InputError


def main() -> None:
    import typer

    from finetune_lens.command import Base, OutputFolder, Running, Tuned, finish, run

    def cot(
        base: Base,
        tuned: Tuned,
        questions: Annotated[
            Path, typer.Argument(metavar="QUESTIONS", help="JSONL: question, answer; choices, chain, id optional.")
        ],
        *,
        tests: Annotated[
            str, typer.Option(help="Of early, mistakes, paraphrase, filler, resample, structure, content.")
        ] = "early,mistakes,paraphrase,filler",
        samples: Annotated[int, typer.Option(help="Chains a question.")] = 20,
        temperature: Annotated[float, typer.Option(help="Of sampling; 0 with --samples 1 takes the likeliest.")] = 0.8,
        top_p: Annotated[float, typer.Option(help="Of the probability that is sampled from.")] = 0.95,
        max_tokens: Annotated[int, typer.Option(help="Of a chain, and of what is written after an edit.")] = 256,
        answer_tokens: Annotated[int, typer.Option(help="Of an answer that is written.")] = 32,
        format: Annotated[
            Path | None, typer.Option(help="JSON: how questions are put, and steps told.", show_default=False)
        ] = None,
        chains: Annotated[
            list[str],
            typer.Option(
                help="JSONL of chains (id, text) instead of sampled ones, or `questions` for those in QUESTIONS; "
                "base=FILE and tuned=FILE give each side its own."
            ),
        ] = [],  # noqa: B006 (typer reads it)
        mistakes: Annotated[
            list[str], typer.Option(help="Edits from rules, a JSONL file or a model; base=, tuned= as of chains.")
        ] = ["rules"],  # noqa: B006
        paraphrases: Annotated[list[str], typer.Option(help="The same of paraphrases.")] = ["rules"],  # noqa: B006
        scoring: Annotated[str, typer.Option(help="auto (options where there are any), exact (written answers).")] = (
            "auto"
        ),
        template: Annotated[str, typer.Option(help="Chat template: none, each, tuned (the base reads bare text).")] = (
            "none"
        ),
        common: Running,
    ) -> None:
        """Test whether the answers of both models follow from their chains of thought."""
        from finetune_lens.cot.faithfulness import examine_chains, require_options
        from finetune_lens.files import whole_file

        folder = OutputFolder(common.out, "cot", force=common.force)
        chosen = [test.strip() for test in tests.split(",")]
        require_options(chosen, scoring, template, answer_tokens, common.seed)
        given = {
            name: _by_side(name, values)
            for name, values in (("chains", chains), ("mistakes", mistakes), ("paraphrases", paraphrases))
        }
        pair = common.pair(base, tuned)
        folder.check()
        result = examine_chains(
            pair, questions, tests=chosen, samples=samples, temperature=temperature, top_p=top_p, max_tokens=max_tokens,
            answer_tokens=answer_tokens, format=format, scoring=scoring, template=template, seed=common.seed,
            partial=folder.partial, texts=folder.path, **given, **common.execution(),
        )  # fmt: skip
        with whole_file(folder.path / "questions.csv") as path:
            result.per_question().to_csv(path, index=False)
        finish(result, folder, common)

    run(cot)


def _by_side(name: str, given: Sequence[str]) -> Any:
    """`FILE` for both sides, or `base=FILE` and `tuned=FILE` by side; None of nothing.

    Raises:
        InputError: several for one side.
    """
    found: dict[str, str] = {}
    for text in given:
        side, sign, value = text.partition("=")
        sides, value = ((side,), value) if sign and side in ("base", "tuned") else (("base", "tuned"), text)
        for one in sides:
            if one in found:
                raise InputError(f"--{name}: {found[one]} and {value} are both for the {one}; give each side one")
            found[one] = value
    return found or None
