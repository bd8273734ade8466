"""Which analyses do the inputs allow? They are run in order, each on what the ones before it have shown to be sound.

    weights alone              updates, intruders
    a model that runs          check, interpolation, representations; on texts, by default the models' own
    prompts                    outputs, patching (where they have `corrupt`), cmap with attribution
    questions                  cot, bias, inside_chains

Nothing is left out in silence: what does not run has its reason beside it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_lens.errors import GateFailed, InputError
from finetune_lens.report.verdict import OWN_TEXTS

if TYPE_CHECKING:
    from finetune_lens.pair import ModelPair
    from finetune_lens.prompts import Prompt
    from finetune_lens.results import Result

TEXTS, TEXT_TOKENS = 64, 48  # what the models write themselves where no texts are given, half of them each
MOST_CELLS = 1024  # heads that are patched one by one; beyond that their effects are estimated by attribution


@dataclass
class Examined:
    """Results of a pair by name, and the reasons of what is not there.

    Attributes:
        commands: name → the command that gives the same result alone.
    """

    results: "dict[str, Result]" = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """What there is to work with; files as they were given, for the commands that are shown.

    Attributes:
        template: "none"; "each" puts prompts, questions and texts that were given through the chat template.
    """

    pair: "ModelPair"
    base: str
    tuned: str
    prompts: Path | None = None
    questions: Path | None = None
    format: Path | None = None
    texts: Path | None = None
    tests: Sequence[str] = ("early", "mistakes", "paraphrase", "filler")
    samples: int = 20
    template: str = "none"
    seed: int = 0
    execution: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One analysis: its name, what it needs, how it is run and what the command line of it ends in."""

    name: str
    run: "Callable[..., Result]"
    lacks: str | None = None
    needs_model: bool = True
    command: str = ""  # empty where no command line gives the same
    module: str = ""


def examine(inputs: Inputs, *, partial: Path | None = None) -> Examined:
    """Run what the inputs allow.

    Args:
        partial: a folder where finished analyses wait, so that an interrupted run of the same inputs continues.

    Raises:
        InputError: prompts, questions or texts that cannot be read; a chat template that a tokenizer lacks.
    """
    from finetune_lens import results

    _require_files(inputs)
    _require_template(inputs)
    found = Examined()
    kept = _kept(inputs, partial)
    stop = ""
    for step in steps(inputs):
        reason = step.lacks or (stop if step.needs_model else "")
        if reason:
            found.skipped[step.name] = reason
            continue
        file = kept / f"{step.name}.nc" if kept else None
        try:
            if file is not None and file.exists():
                result = results.load(file)
            else:
                result = step.run(partial=kept / f".{step.name}" if kept else None)
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    _save(result, file)
        except (InputError, GateFailed) as error:
            found.skipped[step.name] = str(error)
            if step.name == "check":
                stop = "the trust gate could not be run"
            continue
        found.results[step.name] = result
        name = step.module or step.name.partition("-")[0]
        if step.command:
            found.commands[step.name] = f"python -m finetune_lens.{name} {step.command}"
        stop = stop or _reason_to_stop(result, inputs.pair)
    return found


def _require_files(inputs: Inputs) -> None:
    """Read every file, and the tests that are asked for, once before anything is computed."""
    from finetune_lens.cot.faithfulness import TESTS
    from finetune_lens.cot.questions import Format, read_questions
    from finetune_lens.prompts import read_prompts
    from finetune_lens.representations import read_texts

    readers = {"prompts": read_prompts, "questions": read_questions, "format": Format.load, "texts": read_texts}
    for name, read in readers.items():
        if (path := getattr(inputs, name)) is not None:
            read(path)
    unknown = [test for test in inputs.tests if test not in TESTS]
    if unknown:
        raise InputError(f"tests are of {', '.join(TESTS)}; found {unknown[0]!r}")


def _require_template(inputs: Inputs) -> None:
    """Raise InputError where a tokenizer of models that run lacks the chat template that is asked for."""
    from finetune_lens.cot.generate import templated
    from finetune_lens.prompts import require_template

    if require_template(inputs.template) and not _cannot_run(inputs):
        for side in ("base", "tuned"):
            templated([""], _model(inputs, side).require_tokenizer())


def _save(result: "Result", file: Path) -> None:
    from finetune_lens.files import whole_file

    with whole_file(file) as path:
        result.save(path)


def _reason_to_stop(result: "Result", pair: "ModelPair") -> str:
    """Why nothing that runs the models would say anything after this result; empty where it would."""
    if result.kind == "updates" and result.headline()["changed"] == 0 and not pair.alignment.differences:
        return "the two models have the same weights"
    if result.kind == "check" and not result.passed:
        return f"the trust gate failed: {'; '.join(result.failures)}"
    return ""


def _kept(inputs: Inputs, partial: Path | None) -> Path | None:
    """The folder of this run's finished analyses: another where any input or option is another."""
    if partial is None or not inputs.pair.fingerprint:
        return None
    files = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("prompts", "questions", "format", "texts")
        if (path := getattr(inputs, name)) is not None and path.is_file()
    }
    options = {k: v for k, v in inputs.execution.items() if k not in ("progress", "batch_size")}
    facts = [inputs.pair.fingerprint, files, [*inputs.tests], inputs.samples, inputs.template, inputs.seed, options]
    return partial / hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def steps(inputs: Inputs) -> Iterator[Step]:
    """Every analysis, in order, with what it lacks."""
    import finetune_lens as fl
    from finetune_lens.prompts import read_prompts

    pair, run = inputs.pair, inputs.execution
    seeded = run | {"seed": inputs.seed}
    weights = {name: seeded[name] for name in ("device", "progress", "seed")}
    sides = f"{inputs.base} {inputs.tuned}"
    yield Step(
        "updates", lambda partial: fl.measure_updates(pair, partial=partial, **weights), None, False, sides
    )  # fmt: skip
    yield Step(
        "intruders", lambda partial: fl.find_intruders(pair, side="both", partial=partial, **weights), None, False,
        f"{sides} --side both",
    )  # fmt: skip

    asked = read_prompts(inputs.prompts) if inputs.prompts else None
    asked = asked[: run["limit"]] if asked else None
    no_model = _cannot_run(inputs)
    no_prompts = no_model or ("" if asked else "no prompts were given (--prompts)")
    with_check = {name: value for name, value in seeded.items() if name not in ("batch_size", "limit")}
    yield Step(
        "check", lambda partial: fl.check_pair(pair, asked, **with_check), no_model, True,
        f"{sides}{_given(inputs.prompts)}",
    )  # fmt: skip
    trusted = {"check": False}
    framed = {"template": inputs.template}
    template_flag = "" if inputs.template == "none" else f" --template {inputs.template}"
    scored = {"metric": "logprob", "whole_answer": False} if no_prompts else _scored(inputs, asked)
    whole = {"whole_answer": scored["whole_answer"]}
    whole_flag = f"{' --whole-answer' if scored['whole_answer'] else ''}{template_flag}"
    flags = f"{' --metric logprob' if scored['metric'] == 'logprob' else ''}{whole_flag}"
    yield Step(
        "outputs",
        lambda partial: fl.compare_outputs(
            pair, asked, partial=partial, **whole, **framed, **run, **trusted
        ),
        no_prompts, True,
        f"{sides}{_given(inputs.prompts)}{whole_flag}",
    )  # fmt: skip

    texts = Texts(inputs, asked)
    yield Step(
        "interpolation",
        lambda partial: fl.interpolate(
            pair, texts.measured, by="layer", objective=texts.objective, template=texts.template, partial=partial,
            **seeded,
        ),
        no_model, True, f"{sides} {texts.named} --by layer{template_flag}" if texts.named else "",
    )  # fmt: skip
    yield Step(
        "representations",
        lambda partial: fl.compare_representations(
            pair, texts.read, template=texts.template, partial=partial, **seeded, **trusted
        ),
        no_model, True, f"{sides} {texts.named}{template_flag}" if texts.named else "",
    )  # fmt: skip

    lacks_corrupt = no_prompts or (
        "" if all(p.corrupt for p in asked or ()) else "not every prompt has a `corrupt` one beside it"
    )
    for side, name in (("base", inputs.base), ("tuned", inputs.tuned)):
        yield Step(
            f"patching-{side}",
            lambda partial, side=side: fl.patch(
                _model(inputs, side), asked, **scored, **framed, align="right", partial=partial, **run
            ),
            lacks_corrupt, True,
            f"{name}{_given(inputs.prompts)} --align right{flags}",
        )  # fmt: skip
    yield Step(
        "cmap",
        lambda partial: fl.cross_patch(
            pair, asked, **scored, **framed, method=_method(inputs), align="right", partial=partial, **seeded,
            **trusted,
        ),
        no_prompts or ("" if all(p.answer for p in asked or ()) else "not every prompt has an answer"), True,
        f"{sides}{_given(inputs.prompts)} --align right{flags}",
    )  # fmt: skip
    formatted = f" --format {inputs.format}" if inputs.format else ""
    no_questions = no_model or ("" if inputs.questions else "no questions were given (--questions)")
    for name, run_chains in (("cot", _chains), ("bias", _hints), ("inside_chains", _inside)):
        module = {"bias": "cot.bias", "inside_chains": "cot.inside"}.get(name, name)
        sampled = "" if name == "inside_chains" else f" --samples {inputs.samples}"
        yield Step(
            name, lambda partial, run_chains=run_chains: run_chains(inputs, partial), no_questions, True,
            f"{sides}{_given(inputs.questions)}{formatted}{sampled}{template_flag}", module,
        )  # fmt: skip


def _given(path: Path | None) -> str:
    return f" {path}" if path else ""


def _scored(inputs: Inputs, prompts: "Sequence[Prompt]") -> dict[str, Any]:
    """How answers are scored: whole where a token does not do; else by logit difference where all have a wrong one."""
    from finetune_lens.prompts import encode

    tokenizer = _model(inputs, "base").require_tokenizer()
    try:
        encode(prompts, tokenizer, template=inputs.template == "each", need_answer=False)
    except InputError:
        return {"metric": "logprob", "whole_answer": True}
    return {"metric": "logit_diff" if all(p.wrong for p in prompts) else "logprob", "whole_answer": False}


def _cannot_run(inputs: Inputs) -> str:
    """Why the models do not run; empty where they do."""
    options = inputs.execution
    try:
        for model in inputs.pair.models(device=options["device"], dtype=options["dtype"]):
            model.require_tokenizer()
    except InputError as error:
        return f"the models do not run: {error}"
    return ""


def _model(inputs: Inputs, side: str) -> Any:
    options = inputs.execution
    return inputs.pair.models(device=options["device"], dtype=options["dtype"])[("base", "tuned").index(side)]


def _method(inputs: Inputs) -> str:
    config = _model(inputs, "base").module.config.get_text_config()
    return "both" if config.num_hidden_layers * config.num_attention_heads <= MOST_CELLS else "attribution"


def _asked(inputs: Inputs) -> dict[str, Any]:
    return {"format": inputs.format, "template": inputs.template, "seed": inputs.seed, **inputs.execution}


def _chains(inputs: Inputs, partial: Path | None) -> "Result":
    import finetune_lens as fl

    return fl.examine_chains(
        inputs.pair, inputs.questions, tests=inputs.tests, samples=inputs.samples, partial=partial, **_asked(inputs)
    )


def _hints(inputs: Inputs, partial: Path | None) -> "Result":
    import finetune_lens as fl

    return fl.examine_bias(inputs.pair, inputs.questions, samples=inputs.samples, partial=partial, **_asked(inputs))


def _inside(inputs: Inputs, partial: Path | None) -> "Result":
    import finetune_lens as fl

    return fl.look_inside_chains(inputs.pair, inputs.questions, partial=partial, **_asked(inputs))


class Texts:
    """What interpolation measures and representations are read on: prompts, given texts, or the models' own.

    Attributes:
        measured: prompts where there are any with answers, else the texts.
        objective: of the interpolation.
        read: texts.
        named: as a command line names them; empty where no file has them.
        template: around them; none around what the models write themselves, which is no message of a user's.
    """

    def __init__(self, inputs: Inputs, prompts: Sequence[Any] | None):
        self._inputs, self._prompts = inputs, prompts
        self._own: list[dict[str, str]] | None = None
        answered = bool(prompts) and all(p.answer for p in prompts or ())
        self.objective = "auto" if answered else "text"
        self._answered = answered
        given = inputs.prompts if prompts and not inputs.texts else inputs.texts
        self.named = str(given) if given else ""
        self.template = inputs.template if self.named else "none"

    @property
    def measured(self) -> Any:
        """Of the models' own texts those of the tuned model: how it writes is what has been learnt."""
        if self._answered:
            return self._prompts
        if self._prompts is None and self._inputs.texts is None:
            return {OWN_TEXTS: [text for text in self.read if text["id"].startswith("tuned")]}
        return self.read

    @property
    def read(self) -> Any:
        if self._inputs.texts is not None:
            from finetune_lens.representations import read_texts

            return read_texts(self._inputs.texts, limit=self._inputs.execution["limit"])
        return self._prompts or self._written()

    def _written(self) -> list[dict[str, str]]:
        if self._own is None:
            self._own = own_texts(
                [_model(self._inputs, side) for side in ("base", "tuned")], seed=self._inputs.seed,
                progress=self._inputs.execution["progress"],
            )  # fmt: skip
        return self._own


def _reads(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer can read a text: some have no token for a run of digits."""
    from finetune_lens.prompts import Prompt, encode

    try:
        encode([Prompt(text)], tokenizer, need_answer=False)
    except InputError:
        return False
    return True


def own_texts(models: Sequence[Any], *, seed: int, progress: bool = False) -> list[dict[str, str]]:
    """Texts that the models write themselves from an empty page, each as many; what they are asked to read later.

    Raises:
        InputError: a tokenizer without a token to begin with; a model that writes nothing.

    Cost: TEXTS texts of TEXT_TOKENS tokens.
    """
    from finetune_lens.cot.generate import sample

    texts = []
    for side, model in zip(("base", "tuned"), models, strict=True):
        tokenizer = model.require_tokenizer()
        first = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        if first is None:
            raise InputError(
                "the tokenizer has no token that begins a text; give texts (--texts) or prompts (--prompts)"
            )
        chains = sample(
            model, [[first]], names=[side], samples=TEXTS // 2, temperature=1.0, top_p=1.0, max_tokens=TEXT_TOKENS,
            seed=seed, progress=progress,
        )  # fmt: skip
        texts += [{"id": f"{side}-{c.sample}", "prompt": c.text} for c in chains if _reads(tokenizer, c.text)]
    if len({text["id"].partition("-")[0] for text in texts}) < 2:
        raise InputError(
            "one of the models writes nothing on an empty page that its tokenizer can read again; give texts (--texts) "
            "or prompts (--prompts)"
        )
    return texts
