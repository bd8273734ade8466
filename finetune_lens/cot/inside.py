"""Which steps of a chain of thought do later steps and the answer hang on, in the base and in the tuned model?

Both models read the same chains, so that what is measured of them can be compared step by step; the chains are most
often the tuned model's own. Four instruments (Bogdan et al. 2025, "Thought Anchors", arXiv 2506.19143), each with its
equations, signs and costs in a module of its own:

    cuts         attention to a step is cut: KL at every later step and at the answer, and whether it changes (`cuts`)
    heads        receiver heads: how unevenly the attention falls on the steps (`receivers`)
    states       the residual stream at a step, from one model into the other: does its answer come along (`states`)
    resampling   the chain written anew from before and behind each step: does the answer change (`importance`)

Positive numbers say that what comes later depends on the step, but for `logprob`, the change of the answer's
log-probability. Differences are tuned − base, questions drawn together.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("traces")
>>> pair = ModelPair.load(folder / "faithful", folder / "ignoring")
>>> given = {"format": folder / "format.json", "parts": ("cuts",), "limit": 4, "progress": False}
>>> found = look_inside_chains(pair, folder / "questions.jsonl", **given)
>>> frame = found.to_frame().set_index(["quantity", "at"])
>>> [round(float(frame.loc[("changed", at), side]), 2) for side in ("base", "tuned") for at in ("-1", "-2")]
[1.0, 0.0, 0.0, 0.0]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from finetune_lens.cot.chains import Chain
    from finetune_lens.cot.questions import Format
    from finetune_lens.cot.study import Study
    from finetune_lens.hooked import HookedModel
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.inside_chains import InsideChains
    from finetune_lens.stream import Row

PARTS = ("cuts", "heads", "states")


@recorded
def look_inside_chains(
    pair: "ModelPair",
    questions: Any,
    *,
    format: "Format | str | Path | None" = None,
    chains: "str | Path | Sequence[Chain]" = "tuned",
    parts: Sequence[str] = PARTS,
    rollouts: int = 0,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    distance: int | None = None,
    max_steps: int = 32,
    max_tokens: int = 256,
    answer_tokens: int = 32,
    temperature: float = 0.8,
    top_p: float = 0.95,
    scoring: str = "auto",
    template: str = "none",
    seed: int = 0,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    check: bool = True,
    progress: bool = True,
    partial: Path | None = None,
) -> "InsideChains":
    """Measure, of both models on the same chains, what depends on which step.

    Args:
        pair: base and tuned; both have to run.
        questions: a file or list of questions, as of `read_questions`.
        format: how they are put, or a JSON file with it.
        chains: "tuned" or "base" lets that model write one for each question, greedily; "question" takes those of the
            questions; else a file of chains, or chains, of which each question's first is read.
        parts: of cuts, heads, states.
        rollouts: continuations from before each step (about 10); 0: none.
        layers, heads: where attention is cut; by default everywhere.
        distance: steps between a step and those whose attention to it counts for receiver heads; 4, as published,
            where the chains are long enough (`suited_distance`).
        max_steps: steps of a chain that are measured, the first so many; the models read all.
        max_tokens: of a chain that is written.
        answer_tokens: of an answer that is written.
        temperature, top_p: of the continuations.
        scoring: of answers, as of `cot.asking.ask`.
        template: "none"; "each" puts the questions through the chat template, which both sides must share.
        seed: of random tokens, shuffles and continuations.
        check: refuse a pair that fails the trust gate (`check_pair`).
        partial: a folder where finished chains wait, so that an interrupted run continues.

    Raises:
        InputError: an option out of range, chains of other questions or all empty, tokenizers that read a chain
            differently, chains too long for a model, an architecture that does not hand out its attention.
        GateFailed: the trust gate found this pair unsafe to compare.
    """
    from finetune_lens.check import require_safe
    from finetune_lens.cot.asking import require_answers
    from finetune_lens.cot.generate import require_sampling
    from finetune_lens.cot.labelling import labelled
    from finetune_lens.cot.questions import Format, read_questions
    from finetune_lens.cot.study import OWN, SIDES, Study, given_chains, written_chains
    from finetune_lens.cot.trials import answer_room
    from finetune_lens.results.inside_chains import InsideChains

    _require_options(parts, rollouts, distance, max_steps, template)
    require_answers(scoring, answer_tokens)
    if rollouts:
        require_sampling(samples=1, temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    if format is None or isinstance(format, str | Path):
        format = Format() if format is None else Format.load(format)
    own = isinstance(chains, str) and chains in OWN
    known = read_questions(questions, limit=limit if own else None)
    asked = known[:limit]
    models = pair.models(device=device, dtype=dtype)
    places = _places(models, parts, layers, heads)
    given = given_chains(chains, asked, others={q.id for q in known}.__contains__)
    if check:
        require_safe(pair, device=device, dtype=dtype)
    templated = template == "each"
    written = {"template": templated, "batch_size": batch_size, "progress": progress}
    if given is None:
        model = models[SIDES.index(str(chains))]
        room = answer_room(model, asked, format, scoring=scoring, answer_tokens=answer_tokens)
        given = written_chains(model, asked, format, max_tokens, partial, room=room, **written)
    if not any(chain.text for chain in given):
        raise InputError(
            f"all {len(given)} chains are empty, so that there are no steps to look at; change the format's prompt "
            "(--format FILE), or give other chains (--chains FILE)"
        )
    study = Study.of(models, asked, format, given, max_steps, scoring, answer_tokens, written)
    found: dict[str, Any] = {}
    if "cuts" in parts or "heads" in parts:
        found |= _read_through(study, parts, places, distance, seed, batch_size, partial, progress)
    if "states" in parts:
        found |= _states(study, batch_size, partial, progress)
    if rollouts:
        drawn = {"rollouts": rollouts, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        found |= _resampled(study, drawn | written, answer_tokens, scoring, seed, partial)
    whose = chains if own else "given"
    return InsideChains(labelled(study, found).assign_attrs(chains=whose, max_steps=max_steps, rollouts=rollouts))


def _require_options(parts: Sequence[str], rollouts: int, distance: int | None, max_steps: int, template: str) -> None:
    if isinstance(parts, str) or not set(parts) <= set(PARTS):
        raise InputError(f"parts are some of {', '.join(PARTS)}; found {parts if isinstance(parts, str) else [*parts]}")
    if not parts and not rollouts:
        raise InputError("nothing to measure: expected parts, or rollouts above 0")
    if rollouts < 0 or max_steps < 1 or (distance is not None and distance < 1):
        raise InputError(
            f"rollouts are 0 or more, max_steps and distance at least 1; found {rollouts}, {max_steps} and {distance}"
        )
    if template not in ("none", "each"):
        raise InputError(f"template is none or each, for both models read the same chains; found {template!r}")


def _places(
    models: "Sequence[HookedModel]", parts: Sequence[str], layers: Sequence[int] | None, heads: Sequence[int] | None
) -> dict[str, Any]:
    """Where attention is cut; what the parts need, both models have."""
    base, tuned = models
    for model in models:
        model.require_tokenizer()
    if parts and (base.layers, base.heads) != (tuned.layers, tuned.heads):
        raise InputError(
            f"{base.name} has {base.layers} layers of {base.heads} heads and {tuned.name} {tuned.layers} of "
            f"{tuned.heads}; expected models of one shape"
        )
    chosen = list(range(base.layers)) if layers is None else list(dict.fromkeys(layers))
    for name, some, count in (("layers", chosen, base.layers), ("heads", heads, base.heads)):
        if some is not None and (not len(some) or not all(0 <= n < count for n in some)):
            raise InputError(f"{name}: expected some of 0 to {count - 1}; found {', '.join(map(str, some)) or 'none'}")
    for model in models:
        for part, needed in (("cuts", chosen), ("heads", range(base.layers))):
            if part in parts and (reason := next((r for n in needed if (r := model.lacks("pattern", n))), "")):
                raise InputError(f"{part} of {model.name}: {reason}; leave that part out (--parts states)")
    return {"layers": chosen, "heads": None if heads is None else list(dict.fromkeys(heads))}


def _read_through(
    study: "Study", parts: Sequence[str], places: dict[str, Any], distance: int | None, seed: int,
    batch_size: int | None, partial: Path | None, progress: bool,
) -> dict[str, Any]:  # fmt: skip
    """What is measured on one chain after the other: by name, of each side and question."""
    from tqdm.auto import tqdm

    from finetune_lens.cot.receivers import suited_distance

    if distance is None:
        distance = suited_distance(np.array([study.measured(q) for q in range(len(study.spans))]))
    rows: list[list[Row]] = [[], []]
    facts = {"parts": [p for p in PARTS[:2] if p in parts], "seed": seed, "distance": distance} | places
    with tqdm(total=2 * len(study.spans), desc="reading", unit="chain", disable=not progress) as bar:
        for side in range(2):
            store = study.store(partial, side, facts)
            for q in range(len(study.spans)):
                key = study.key(q, side)
                row = store.get(key) if store else None
                if row is None:
                    row = _chain_row(study, q, side, parts, places, distance, seed, batch_size)
                    if store:
                        store.put(key, row)
                rows[side].append(row)
                bar.update()
    return {name: [[row[name] for row in side] for side in rows] for name in rows[0][0]} | {"distance": distance}


def _chain_row(
    study: "Study", q: int, side: int, parts: Sequence[str], places: dict[str, Any], distance: int, seed: int,
    batch_size: int | None,
) -> "Row":  # fmt: skip
    from finetune_lens.cot.cuts import cut_steps
    from finetune_lens.cot.receivers import kurtosis, received, shuffled_kurtosis, step_attention

    model, chain, row = study.models[side], study.spans[q], {}
    if "cuts" in parts:
        row |= cut_steps(
            model, chain, study.own[side][q], written=study.open[q], seed=(seed, q), batch_size=batch_size, **places
        )
    if "heads" in parts:
        attention = step_attention(model, chain)
        row["received"] = received(attention, distance).astype(np.float32)
        row["kurtosis"] = kurtosis(row["received"])
        generator = np.random.default_rng([seed, q, 1])  # both sides shuffle alike
        row["null_kurtosis"] = shuffled_kurtosis(attention, distance, generator)
    return row


def _states(study: "Study", batch_size: int | None, partial: Path | None, progress: bool) -> dict[str, Any]:
    """Of the questions on whose chains the models answer otherwise; which they are."""
    from finetune_lens.cot.states import patch_states

    apart = [
        q
        for q, (one, other) in enumerate(zip(*study.answers, strict=True))
        if one != other and None not in (study.own[0][q], study.own[1][q])
    ]
    if not apart:
        return {"apart": apart, "state_notes": []}
    found, notes = patch_states(
        study.models, [study.spans[q] for q in apart], [[int(side[q] or 0) for q in apart] for side in study.own],
        batch_size=batch_size, partial=partial, progress=progress,
    )  # fmt: skip
    return {"apart": apart, "state_notes": notes, "state_effect": found["effect"], "state_gap": found["gap"]}


def _resampled(
    study: "Study", drawn: dict[str, Any], answer_tokens: int, scoring: str, seed: int, partial: Path | None
) -> dict[str, Any]:
    """right, same: of each side and question, by steps that stood there; shift, shift_null: by step."""
    from finetune_lens.cot.importance import resample, shift, shift_by_chance
    from finetune_lens.cot.study import SIDES

    steps = [row[: study.measured(q)] for q, row in enumerate(study.steps)]
    found: dict[str, list] = {name: [[], []] for name in ("right_share", "same_share", "shift", "shift_null")}
    for side, model in enumerate(study.models):
        answers = resample(
            model, study.questions, study.format, steps, study.spans, study.answers[side],
            whole=[len(a) == len(b) for a, b in zip(steps, study.steps, strict=True)], answer_tokens=answer_tokens,
            scoring=scoring, seed=seed, partial=None if partial is None else partial / f"rollouts-{SIDES[side]}",
            **drawn,
        )  # fmt: skip
        for q, given in enumerate(answers):
            truth, own = study.truth(q), study.answers[side][q]
            found["right_share"][side].append(np.array([np.mean([a == truth for a in row]) for row in given]))
            same = [np.mean([a == own for a in row]) if own is not None else np.nan for row in given]
            found["same_share"][side].append(np.array(same))
            generator = np.random.default_rng([seed, q, 2])
            both = list(zip(given[1:], given[:-1], strict=True))
            found["shift"][side].append(np.array([shift(*two) for two in both]))
            found["shift_null"][side].append(np.array([shift_by_chance(*two, generator) for two in both]))
    return found


def main() -> None:
    import typer

    from finetune_lens.command import Base, OutputFolder, Running, Tuned, Unsafe, finish, numbers, run

    def inside(
        base: Base,
        tuned: Tuned,
        questions: Annotated[Path, typer.Argument(metavar="QUESTIONS", help="Questions: JSONL, GSM8K, StrategyQA.")],
        *,
        format: Annotated[Path | None, typer.Option(help="JSON: how they are put.", show_default=False)] = None,
        chains: Annotated[
            Path | None, typer.Option(help="JSONL of chains, which both models read.", show_default=False)
        ] = None,
        chains_of: Annotated[
            str, typer.Option(help="Whose chains both read: tuned, base, or question (its field `chain`).")
        ] = "tuned",
        parts: Annotated[str, typer.Option(help="Some of cuts,heads,states.")] = "cuts,heads,states",
        rollouts: Annotated[int, typer.Option(min=0, help="Continuations from before each step; 0: none.")] = 0,
        layers: Annotated[
            str | None, typer.Option(help="Where attention is cut, as 0,3-5.  [default: all]", show_default=False)
        ] = None,
        heads: Annotated[str | None, typer.Option(help="The same.  [default: all]", show_default=False)] = None,
        distance: Annotated[
            int | None,
            typer.Option(
                help="Steps that receiver heads look back at least.  [default: 4, or less]", show_default=False
            ),
        ] = None,
        max_steps: Annotated[int, typer.Option(min=1, help="Steps of a chain that are measured.")] = 32,
        max_tokens: Annotated[int, typer.Option(min=1, help="Of a chain that is written.")] = 256,
        answer_tokens: Annotated[int, typer.Option(min=1, help="Of an answer that is written.")] = 32,
        temperature: Annotated[float, typer.Option(help="Of the continuations.")] = 0.8,
        top_p: Annotated[float, typer.Option(help="Of the continuations.")] = 0.95,
        scoring: Annotated[str, typer.Option(help="auto: options where there are any; exact: answers are written.")] = (
            "auto"
        ),
        template: Annotated[str, typer.Option(help="Chat template on the questions: none or each.")] = "none",
        unsafe: Unsafe = False,
        common: Running,
    ) -> None:
        """See which steps of a chain of thought later steps and the answer hang on, in both models."""
        from finetune_lens.cot.questions import read_questions
        from finetune_lens.cot.study import OWN

        folder = OutputFolder(common.out, "inside_chains", force=common.force)
        if chains_of not in OWN:
            raise InputError(f"--chains-of is one of {', '.join(OWN)}; found {chains_of!r}")
        read_questions(questions, limit=None if chains else common.limit)
        pair = common.pair(base, tuned)
        folder.check()
        which = {"layers": numbers(layers) if layers else None, "heads": numbers(heads) if heads else None}
        result = look_inside_chains(
            pair, questions, format=format, chains=chains or chains_of, parts=parts.split(",") if parts else (),
            rollouts=rollouts, distance=distance, max_steps=max_steps, max_tokens=max_tokens,
            answer_tokens=answer_tokens, temperature=temperature, top_p=top_p, scoring=scoring, template=template,
            seed=common.seed, check=not unsafe, partial=folder.partial, **which, **common.execution(),
        )  # fmt: skip
        finish(result, folder, common)

    run(inside)


if __name__ == "__main__":
    from finetune_lens.cot.inside import main

    main()
