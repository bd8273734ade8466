"""Does the answer follow from the chain of thought, in the base and in the tuned model?

Of a chain of n steps, s_k says whether the answer is that behind the whole chain when something else stands in its
place (`trials`): its first k steps, a mistake in step k + 1 and what follows from it, other words, filler. The area
over the curve (Lanham et al. 2023, arXiv 2307.13702, §2.2; they give no quadrature) is by the trapezoid rule over the
places k/n, 0 … 1,

    AOC_n = 1 − Σ_{k=1..n} (s_{k−1} + s_k)/2n,        AOC = Σ_n w_n·AOC_n,

w_n the share of chains with n steps: the mean over chains. One end of a curve is the chain itself (the last of early
and mistakes, the first of paraphrase), where s = 1 by definition, so that AOC_n ≤ 1 − 1/2n: each chain's is reported as
a share of that. Between places without an edit s is interpolated, at the ends continued. k*/n is the least k from which
on s stays 1, over n.

A question's value is the mean over its chains, a model's that over questions. An answer that cannot be parsed is wrong
and never the same as another; where it is that behind the whole chain, or the chain is empty, there is nothing to
compare with: such chains have no curve. All are counted; a side without any has no curves, the other's stand.

Cost: chains once; early answering and filler: one pass over each and its branches (`branches`); mistakes and
paraphrase: n texts to write on a chain. Equal texts are asked once. Memory: both models.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("traces")
>>> pair = ModelPair.load(folder / "faithful", folder / "ignoring")
>>> found = examine_chains(
...     pair, folder / "questions.jsonl", format=folder / "format.json", tests=["early"], temperature=0, samples=1,
...     limit=8, progress=False,
... )
>>> frame = found.to_frame().set_index(["test", "measure"])
>>> frame.loc[("early", "share"), ["base", "tuned"]].tolist()
[1.0, 0.0]
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_lens.cot.asking import require_answers
from finetune_lens.cot.chains import Chain, read_chains, write_chains
from finetune_lens.cot.course import SIDES, TEMPLATES, UNLIKE, Course, Settings
from finetune_lens.cot.edits import INSTRUCTIONS, Editor, FileEditor, LocalEditor, RuleEditor
from finetune_lens.cot.questions import Format, Question, read_questions
from finetune_lens.cot.table import dataset, write_answers
from finetune_lens.cot.trials import CORRUPTED, EDITED
from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.cot import Faithfulness

DEFAULT = ("early", "mistakes", "paraphrase", "filler")
TESTS = (*DEFAULT, "resample", *CORRUPTED)
SUPPLIED = "questions"  # chains are those of the question file


@recorded
def examine_chains(
    pair: "ModelPair",
    questions: Any,
    *,
    tests: Sequence[str] = DEFAULT,
    samples: int = 20,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_tokens: int = 256,
    answer_tokens: int = 32,
    format: "Format | str | Path | None" = None,
    chains: Any = None,
    mistakes: Any = "rules",
    paraphrases: Any = "rules",
    scoring: str = "auto",
    template: str = "none",
    seed: int = 0,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
    partial: Path | None = None,
    texts: Path | None = None,
) -> "Faithfulness":
    """Let both models reason over the same questions, and test whether their answers follow from what they write.

    Args:
        pair: base and tuned; both have to run, and to have a tokenizer.
        questions: a file, or a list (`read_questions`).
        tests: of early, mistakes, paraphrase, filler, resample, structure, content.
        samples: chains a question and side, drawn at this `temperature` and `top_p`; what is written after an edit is
            drawn likewise.
        max_tokens: of a chain, and of what is written after an edit; fewer where the model reads no more.
        answer_tokens: of an answer that is written.
        format: how questions are put; a `Format` or its file.
        chains: instead of sampled ones: a file (`read_chains`), several `Chain`s, or "questions" for those that the
            questions have; for both sides, or of each by name, {"base": …, "tuned": …}.
        mistakes, paraphrases: where edits come from: "rules", a JSONL file of edits, a model (its folder, or one that
            is loaded), or an `Editor`; for both sides, or of each by name.
        scoring: auto (the options' log-probabilities where a question has any), or exact (answers are written).
        template: none, each (both sides their own chat template), or tuned (the tuned side alone).
        partial: folder in which finished chains, edits and answers wait, so that an interrupted run continues.
        texts: folder into which chains-base.jsonl, chains-tuned.jsonl and answers.jsonl are written, to read.

    Raises:
        InputError: an option out of range, questions or chains that are not, no tokenizer or chat template, edits that
            a tokenizer cannot read, no answer of either side that can be parsed.
    """
    from finetune_lens.results.cot import Faithfulness

    require_options(tests, scoring, template, answer_tokens, seed)
    put = Format.load(format) if isinstance(format, str | Path) else format or Format()
    by_side = _by_side("chains", chains)
    asked = read_questions(questions, limit=limit if chains is None else None)
    supplied = {side: _supplied(one, asked, limit) for side, one in by_side.items()}
    asked = asked[:limit]
    load = _loader(device, dtype)
    editors = {
        test: {side: _editor(one, EDITED[test], seed, load) for side, one in _by_side(test, given).items()}
        for test, given in (("mistakes", mistakes), ("paraphrase", paraphrases))
        if test in tests
    }
    settings = Settings(
        put, tuple(tests), scoring, answer_tokens, max_tokens, seed, batch_size, progress,
        {"temperature": temperature, "top_p": top_p},
    )  # fmt: skip
    models = pair.models(device=device, dtype=dtype)
    courses = {
        side: Course(side, model, asked, settings, templated, None if partial is None else Path(partial) / side)
        for side, model, templated in zip(SIDES, models, TEMPLATES[template], strict=True)
    }
    for side, course in courses.items():
        course.reason(supplied[side], samples)
    unparsed = [said for course in courses.values() if (said := course.unparsed())]
    if len(unparsed) == len(courses) and not set(CORRUPTED) & set(tests):  # these need the right answer alone
        raise InputError(unparsed[0])
    for test, of in editors.items():
        for side, course in courses.items():
            course.edit(test, of[side]())
    for course in courses.values():
        course.answer()
    if texts is not None:
        folder = Path(texts)
        folder.mkdir(parents=True, exist_ok=True)
        for side, course in courses.items():
            write_chains(folder / f"chains-{side}.jsonl", [item.chain for item in course.items])
        write_answers(folder / "answers.jsonl", courses)
    record = {
        "models": {side: course.model.describe() for side, course in courses.items()}, "format": asdict(put),
        "notes": unparsed + [UNLIKE] * (template == "tuned"),
    }  # fmt: skip
    return Faithfulness(dataset(asked, put, tests, courses).assign_attrs(provenance=json.dumps(record)))


def require_options(tests: Sequence[str], scoring: str, template: str, answer_tokens: int, seed: int) -> None:
    """Raise InputError where one of these is not what `examine_chains` takes."""
    unknown = [test for test in tests if test not in TESTS]
    if unknown or not tests or len({*tests}) < len(tests) or isinstance(tests, str):
        found = f"{unknown[0]!r}" if unknown and not isinstance(tests, str) else f"{tests!r}"
        raise InputError(f"tests: expected some of {', '.join(TESTS)}, each once; found {found}")
    if template not in TEMPLATES:
        raise InputError(f"template is one of {', '.join(TEMPLATES)}; found {template!r}")
    require_answers(scoring, answer_tokens)
    if seed < 0:
        raise InputError(f"seed is at least 0; found {seed}")


def _by_side(name: str, given: Any) -> dict[str, Any]:
    """What each side is given: the same, unless it is by side."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(SIDES, given)
    if unknown := [side for side in given if side not in SIDES]:
        raise InputError(f"{name}: expected what base and tuned are given, found {unknown[0]!r}")
    return {side: given.get(side, None if name == "chains" else "rules") for side in SIDES}


def _supplied(given: Any, questions: Sequence[Question], limit: int | None) -> list[Chain] | None:
    """The chains of the first questions; None where they are to be sampled."""
    if given is None:
        return None
    kept = questions[:limit]
    if given == SUPPLIED:
        without = [q.id for q in kept if q.chain is None]
        if without:
            raise InputError(f"{len(without)} of {len(kept)} questions have no `chain`: {', '.join(without[:3])}")
        return [Chain(q.id, 0, q.chain or "") for q in kept]
    if isinstance(given, str | Path):
        chains = read_chains(Path(given), kept, others={q.id for q in questions}.__contains__)
    else:
        chains = [*given]
        if not all(isinstance(chain, Chain) for chain in chains):
            raise InputError(f"chains: expected a file, several Chains or {SUPPLIED!r}; found {given!r:.60}")
        missing = {q.id for q in kept} - {chain.question for chain in chains}
        if missing:
            raise InputError(f"chains: there is none for {len(missing)} of {len(kept)} questions: {min(missing)}")
    known = {q.id for q in kept}
    return [chain for chain in chains if chain.question in known]


def _loader(device: str, dtype: str) -> "Callable[[str], HookedModel]":
    @functools.cache
    def load(source: str) -> "HookedModel":
        from finetune_lens.hooked.loading import as_model

        return as_model(source, device=device, dtype=dtype)

    return load


def _editor(given: Any, kind: str, seed: int, load: "Callable[[str], HookedModel]") -> Callable[[], Editor]:
    """What makes the editor: a file is read at once, a model when it is needed."""
    from finetune_lens.checkpoints import open_checkpoint
    from finetune_lens.hooked import HookedModel

    if given == "rules":
        return lambda: RuleEditor(kind, seed)
    if isinstance(given, HookedModel):
        return lambda: LocalEditor(given, INSTRUCTIONS[kind])
    if isinstance(given, str | Path) and Path(given).suffix == ".jsonl":
        editor = FileEditor(given)
        return lambda: editor
    if isinstance(given, str | Path):
        open_checkpoint(str(given))  # what is not there is said before anything is written
        return lambda: LocalEditor(load(str(given)), INSTRUCTIONS[kind])
    if callable(given):
        return lambda: given
    raise InputError(f"edits: expected 'rules', a JSONL file, a model or an editor; found {given!r:.60}")
