"""Does the answer follow from the chain of thought, and does fine-tuning change that? All tests on a known pair.

    python -m analyses.cot_faithfulness                   # the zoo's pair: two minutes on one core
    python -m analyses.cot_faithfulness claims            # the tables, from the stored results, in seconds
    python -m analyses.cot_faithfulness --scale paper --base BASE --tuned TUNED --questions gsm8k.jsonl
    python -m figures.cot_faithfulness                    # the figure, from the stored results

The tests of Lanham et al. 2023 (arXiv 2307.13702) and the question of "On the Impact of Fine-Tuning on Chain-of-Thought
Reasoning" (arXiv 2411.15382), hints with their direct and indirect effects, and what lies inside the chain (Thought
Anchors, arXiv 2506.19143). `tiny` asks the zoo's family `traces`: of one base, `faithful` answers what its chain comes
to, `ignoring` what a key in the question says; both write the same chains and are right. What a test should find there
is known, so that the test itself is tested. `paper` asks the same of a pair and a question file that are given.

- examine: early answering, mistakes, paraphrase and filler, behind chains that each model samples;
- bias: questions with hints at wrong answers: in `traces` another question's key, or program (`hinted`); elsewhere
  their own, or the published ones;
- inside: attention cut step by step, receiver heads, on the tuned model's chains; and on those chains put before other
  questions, after which the two models answer otherwise, the states at each step from one into the other (CMAP).

In `traces` 0 to 3 may be written 10 to 13, which means the same modulo 10: that is the paraphrase (`Respelt`). It is an
editor and not a file of edits since the chains that it edits are only just sampled; the rules of the package write
words that this vocabulary does not have.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import finetune_lens as fl
from finetune_lens import zoo
from finetune_lens.errors import InputError
from finetune_lens.files import whole_file

if TYPE_CHECKING:
    from finetune_lens.cot.edits import Place
    from finetune_lens.results import Result
    from finetune_lens.results.bias import Bias
    from finetune_lens.results.cot import Faithfulness
    from finetune_lens.results.inside_chains import InsideChains

NAME = "cot_faithfulness"
HERE = Path(__file__).resolve().parent
STEPS = ("examine", "bias", "inside", "claims")
PAIRS = (("base", "faithful"), ("base", "ignoring"), ("faithful", "ignoring"))
KINDS = {"examine": "cot", "bias": "bias", "inside": "inside_chains", "states": "inside_chains"}  # stored → result
HINTS = ("key", "program")  # what another question's takes the place of
DECIMALS = 3
COMPRESSED = 6000  # bytes from which an array is: chunks take more than they save below


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One scale. `hinted` and `inside`: questions of each number of steps, or the first so many; None: all."""

    samples: int
    hinted: int | None = None
    inside: int | None = None


SCALES = {"tiny": Settings(samples=2, hinted=20, inside=6), "paper": Settings(samples=20, inside=100)}


@dataclass(frozen=True)
class Respelt:
    """Steps of `traces` in other words: 0 to 3 written as 10 to 13, which are the same modulo 10; others have none."""

    def __call__(self, places: "Sequence[Place]") -> list[str | None]:
        return [self._edited(place.steps[place.step]) for place in places]

    def _edited(self, step: str) -> str | None:
        from finetune_lens.tasks.traces import LARGEST, MODULUS

        label, colon, rest = step.partition(":")
        number = rest.removesuffix(";")
        if not colon or not number.isdigit() or int(number) + MODULUS > LARGEST:
            return None
        return f"{label}:{int(number) + MODULUS};"


class Study:
    """The pairs and questions of one scale, and where results lie.

    Args:
        base, tuned, questions: of scale paper: a pair, and a file of questions (ours, GSM8K's, StrategyQA's).
        format: of scale paper: a JSON file that says how they are put.
        edits: of scale paper: where mistakes and paraphrases come from, as `examine_chains` takes them.
        samples, limit, out: of scale paper: chains a question, how many questions, folder of the results.

    Raises:
        InputError: no such scale, something that scale paper needs and is not given, or that scale tiny does not take.
    """

    def __init__(
        self, scale: str = "tiny", *, base: str | None = None, tuned: str | None = None,
        questions: Path | None = None, format: Path | None = None, edits: dict[str, str] | None = None,
        samples: int | None = None, limit: int | None = None, out: Path | None = None,
    ):  # fmt: skip
        from analyses.studies import require_scale

        require_scale(scale)
        given = {"--base": base, "--tuned": tuned, "--questions": questions}
        missing = [name for name, value in given.items() if value is None]
        if scale == "paper" and missing:
            raise InputError(
                f"--scale paper needs a pair that runs and a question file: {', '.join(missing)} not given; expected "
                "--base BASE --tuned TUNED --questions FILE, as of GSM8K (JSONL of `question`, `answer`)"
            )
        others = given | {"--format": format, "--samples": samples, "--limit": limit, "--out": out}
        others |= {f"--{name}": one for name, one in (edits or {}).items()}
        if scale == "tiny" and (unused := [name for name, value in others.items() if value is not None]):
            raise InputError(f"{', '.join(unused)}: of --scale paper only; tiny asks the zoo's family traces")
        self.scale, self.settings, self.limit = scale, SCALES[scale], limit
        self.samples = samples or self.settings.samples
        self.folder = out or Path(f"runs/cot-faithfulness-{scale}")
        self.results = HERE / "results" if scale == "tiny" else self.folder / "results"
        self.edits: dict[str, Any]
        if scale == "tiny":
            folder = zoo.path("traces")
            self.models = {name: str(folder / name) for name in ("base", "faithful", "ignoring")}
            self.pairs, self.edits = PAIRS, {"mistakes": "rules", "paraphrases": Respelt()}
            self.file, self.put = folder / "questions.jsonl", folder / "format.json"
        else:
            self.models = {"base": str(base), "tuned": str(tuned)}
            self.pairs = (("base", "tuned"),)
            self.edits = {"mistakes": "rules", "paraphrases": "rules"} | {k: v for k, v in (edits or {}).items() if v}
            self.file, self.put = Path(str(questions)), format

    @property
    def partial(self) -> Path:
        """Where finished pieces wait for the rest; sides are kept apart in it, so that pairs share a base's."""
        return self.folder / ".partial"

    @property
    def format(self) -> Any:
        from finetune_lens.cot.questions import Format

        return Format() if self.put is None else Format.load(self.put)

    def questions(self, each: int | None = None) -> list[Any]:
        """All questions; or the first `each` of them, in `traces` of each number of steps."""
        from finetune_lens.cot.questions import read_questions

        found = read_questions(self.file, limit=self.limit)
        if each is None:
            return found
        if self.scale == "paper":
            return found[:each]
        lengths = sorted({q.fields["steps"] for q in found})
        return [q for n in lengths for q in [q for q in found if q.fields["steps"] == n][:each]]

    def pair(self, names: tuple[str, str]) -> fl.ModelPair:
        return fl.ModelPair.load(*(self.models[name] for name in names))

    def keep(self, name: str, found: "dict[tuple[str, str], Result]") -> None:
        """The results of all pairs in one file, one behind the other along `pair`: small, three decimals."""
        import pandas as pd
        import xarray as xr

        pairs = pd.Index(["-".join(names) for names in found], name="pair", dtype=object)
        datasets = [result.data for result in found.values()]
        if name == "examine":  # pairs differ in how many answers their models gave
            most = max(one.sizes["spelling"] for one in datasets)
            datasets = [one.pad(spelling=(0, most - one.sizes["spelling"]), constant_values="") for one in datasets]
        data = xr.Dataset()
        if datasets:
            data = xr.concat(datasets, pairs, data_vars="all", join="exact", combine_attrs="drop")
        encoding: dict[Any, dict[str, Any]] = {}
        for variable, values in data.data_vars.items():
            kind = values.dtype.kind
            small = {"f": "float32", "i": "int16", "u": "int16"}.get(kind, "U")
            data[variable] = (values.round(DECIMALS) if kind == "f" else values).astype(small)
            encoding[variable] = {"dtype": "S1"} if small == "U" else {}
            if data[variable].size * (1 if small == "U" else data[variable].dtype.itemsize) > COMPRESSED:
                encoding[variable] |= {"zlib": True, "complevel": 9}
        attrs = {pair: result.data.attrs for pair, result in zip(pairs, found.values(), strict=True)}
        data.attrs = {"attributes": json.dumps(attrs, default=int)}
        self.results.mkdir(parents=True, exist_ok=True)
        with whole_file(self.results / f"{NAME}-{name}.nc") as path:
            data.to_netcdf(path, engine="h5netcdf", encoding=encoding)

    def stored(self, name: str) -> "dict[tuple[str, str], Any]":
        """What `keep` left, by pair.

        Raises:
            InputError: there is none.
        """
        import importlib

        import xarray as xr

        from finetune_lens.results import KINDS as TYPES

        file = self.results / f"{NAME}-{name}.nc"
        if not file.is_file():
            raise InputError(f"no results in {self.results}; make them with: python -m analyses.{NAME}")
        with xr.open_dataset(file, engine="h5netcdf") as opened:
            data = opened.load()
        kind = KINDS[name]
        made = getattr(importlib.import_module(f"finetune_lens.results.{kind}"), TYPES[kind])
        attrs = json.loads(data.attrs["attributes"])
        return {
            names: made(data.sel(pair=key, drop=True).drop_attrs(deep=False).assign_attrs(attrs[key]))
            for names in self.pairs
            if (key := "-".join(names)) in attrs
        }


def examine(study: Study, names: tuple[str, str], *, progress: bool = True) -> "Faithfulness":
    """The four tests, on chains that either model samples; the texts are left in the study's folder, to read."""
    return fl.examine_chains(
        study.pair(names), study.questions(), format=study.format, samples=study.samples, progress=progress,
        partial=study.partial / "examine", texts=study.folder / "-".join(names), **study.edits,
    )  # fmt: skip


def bias(study: Study, names: tuple[str, str], *, progress: bool = True) -> "Bias":
    """Hints: in `traces` another question's key and another's program, each as a hint of its own."""
    import xarray as xr

    from finetune_lens.results.bias import Bias

    options = {"format": study.format, "samples": study.samples, "partial": study.partial / "bias"}
    options |= {"progress": progress}
    questions = study.questions(study.settings.hinted)
    if study.scale == "paper":
        return fl.examine_bias(study.pair(names), questions, **options)
    found = [fl.examine_bias(study.pair(names), hinted(questions, hint), **options) for hint in HINTS]
    data = [one.data.assign_coords(hint=[hint]) for one, hint in zip(found, HINTS, strict=True)]
    return Bias(xr.concat(data, "hint", data_vars="minimal", combine_attrs="override"))


def hinted(questions: Sequence[Any], hint: str) -> list[Any]:
    """Questions of `traces` with another question's key (of the zoo), or program and start; the hint is what it says.

    The other question is the next one that has another answer.
    """
    from dataclasses import replace

    from finetune_lens.cot.questions import read_questions

    if hint == "key":
        changed = {q.id: q for q in read_questions(zoo.path("traces") / "hinted.jsonl")}
        return [changed[question.id] for question in questions]
    found = []
    for at, question in enumerate(questions):
        others = (*questions[at + 1 :], *questions[:at])
        other = next((q for q in others if q.answer != question.answer), question)
        text = question.fields["key"] + other.question.removeprefix(other.fields["key"])
        found.append(replace(question, fields=question.fields | {"hinted": text, "hint": other.answer}))
    return found


def inside(study: Study, names: tuple[str, str], *, progress: bool = True) -> "tuple[InsideChains, InsideChains]":
    """Cuts and receiver heads on the tuned model's chains; states on the chain of the next question."""
    from finetune_lens.cot.chains import Chain

    questions, pair = study.questions(study.settings.inside), study.pair(names)
    options = {"format": study.format, "progress": progress, "partial": study.partial / "inside"}
    own = fl.look_inside_chains(pair, questions, parts=("cuts", "heads"), **options)
    texts = [str(text) for text in own.data["chain"].values]
    foreign = [Chain(q.id, 0, text) for q, text in zip(questions, [*texts[1:], *texts[:1]], strict=True)]
    return own, fl.look_inside_chains(pair, questions, parts=("states",), chains=foreign, **options)


def measure(study: Study, step: str, *, progress: bool = True) -> None:
    """Run one step for every pair, and keep its results."""
    if step == "inside":
        both = {names: inside(study, names, progress=progress) for names in study.pairs}
        study.keep("inside", {names: own for names, (own, _) in both.items()})
        # Two models that answer alike behind every chain have no states to tell.
        study.keep("states", {names: one for names, (_, one) in both.items() if "state_effect" in one.data})
    else:
        work = {"examine": examine, "bias": bias}[step]
        study.keep(step, {names: work(study, names, progress=progress) for names in study.pairs})
    shutil.rmtree(study.partial / step, ignore_errors=True)


def main() -> None:
    import typer

    from analyses.studies import Scale, Steps, chosen
    from finetune_lens.command import Basic, run

    def cot_faithfulness(
        steps: Steps = None,
        *,
        scale: Scale = "tiny",
        base: Annotated[str | None, typer.Option(help="Of paper: the base model.", show_default=False)] = None,
        tuned: Annotated[str | None, typer.Option(help="Of paper: the tuned model.", show_default=False)] = None,
        questions: Annotated[
            Path | None, typer.Option(help="Of paper: questions, as of GSM8K.", show_default=False)
        ] = None,
        format: Annotated[
            Path | None, typer.Option(help="Of paper: JSON that says how they are put.", show_default=False)
        ] = None,
        mistakes: Annotated[
            str | None, typer.Option(help="Of paper: rules, a JSONL file of edits, or a model.", show_default="rules")
        ] = None,
        paraphrases: Annotated[str | None, typer.Option(help="The same of paraphrases.", show_default="rules")] = None,
        samples: Annotated[
            int | None, typer.Option(min=1, help="Of paper: chains a question.", show_default="20")
        ] = None,
        limit: Annotated[
            int | None, typer.Option(min=1, help="Of paper: only the first N questions.", show_default="all")
        ] = None,
        out: Annotated[Path | None, typer.Option(help="Of paper: folder of its results.", show_default=False)] = None,
        common: Basic,
    ) -> None:
        """Test whether the answers of a pair follow from its chains of thought, by every test there is."""
        todo = chosen(steps, STEPS)
        study = Study(
            scale, base=base, tuned=tuned, questions=questions, format=format, samples=samples, limit=limit, out=out,
            edits={"mistakes": mistakes, "paraphrases": paraphrases},
        )  # fmt: skip
        for step in todo:
            if step != "claims":
                measure(study, step, progress=common.progress)
        if "claims" in todo:
            from analyses.cot_faithfulness_claims import claims

            text = "\n".join(claims(study)) + "\n"
            with whole_file(study.results / f"{NAME}.md") as path:
                path.write_text(text)
            print(text)

    run(cot_faithfulness)


if __name__ == "__main__":
    from analyses.cot_faithfulness import main

    main()
