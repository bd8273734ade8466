"""`python -m finetune_lens.circuits`: find, paths, edges, evaluate, compare, dcm."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_lens.circuits.circuit import Circuit
from finetune_lens.circuits.comparison import compare_circuits
from finetune_lens.circuits.dcm import learn_masks
from finetune_lens.circuits.edges import attribute_edges
from finetune_lens.circuits.evaluation import evaluate_circuit
from finetune_lens.circuits.paths import circuit_of, find_circuit, trace_paths
from finetune_lens.command import (
    Base,
    Common,
    Model,
    OfAdapter,
    OutputFolder,
    Running,
    Saved,
    Template,
    Tuned,
    Unsafe,
    finish,
    run,
)
from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from finetune_lens.prompts import Prompt

OUT = Path("runs", "circuits")
File = Annotated[Path, typer.Argument(metavar="CIRCUIT", help="circuit.json that `find` wrote, or a published list.")]
Prompts = Annotated[Path, typer.Argument(metavar="PROMPTS", help="JSONL: prompt, corrupt, answer, wrong.")]
Preset = Annotated[str, typer.Option(help="What is frozen, and the score: prakash2024, wang2022, goldowsky-dill2023.")]
Freeze = Annotated[
    str | None,
    typer.Option(help="Instead: sites held at clean values, of z,q,k,v,pattern,mlp_out.", show_default=False),
]
Metric = Annotated[
    str | None,
    typer.Option(help="relative_prob, logit_diff, logprob, prob …  [default: the preset's]", show_default=False),
]
Method = Annotated[str, typer.Option(help="exact, or full: two forward passes a head.")]
Align = Annotated[str, typer.Option(help="Which positions correspond where prompts differ in length: left, right.")]


def find(
    model: Model,
    prompts: Prompts,
    *,
    base: OfAdapter = None,
    procedure: Annotated[str, typer.Option(help="entity-tracking or ioi.")] = "entity-tracking",
    step: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=RECEIVERS@POSITION",
            help="Instead, in this order: reader=logits, mover=q:reader@-1, teller=v:reader@label:first …",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="N or NAME=N,…",
            help="Heads a group.  [default: all whose path lowers the metric clear of 0]",
            show_default=False,
        ),
    ] = None,
    attribution: Annotated[
        bool, typer.Option("--attribution/--no-attribution", help="Edge attribution beside the paths.")
    ] = True,
    preset: Preset = "prakash2024",
    freeze: Freeze = None,
    metric: Metric = None,
    method: Method = "exact",
    align: Align = "error",
    template: Template = "none",
    common: Running,
) -> None:
    """Find a circuit by path patching, group by group from the logits back; writes circuit.json."""
    folder = OutputFolder(common.out or OUT, "paths", force=common.force)
    file = folder.path / "circuit.json"
    if file.exists() and not common.force:
        raise InputError(f"{file} exists and would be overwritten; choose another --out, or pass --force")
    items = _items(prompts, common)
    loaded = common.model(model, base)
    folder.check()
    result = find_circuit(
        loaded, items, procedure=step or procedure, heads=_counts(heads), attribution=attribution, preset=preset,
        freeze=_listed(freeze), metric=metric, method=method, align=align, template=template,
        partial=folder.partial,
        **common.execution(),
    )  # fmt: skip
    found: dict[str, Any] = {}
    if result.circuit:
        folder.path.mkdir(parents=True, exist_ok=True)
        found["file"] = str(circuit_of(result).save(file))
    finish(result, folder, common, **found)
    common.say(f"circuit in {file}" if found else "no circuit was found, and none was written")


def paths(
    base: Base,
    tuned: Tuned,
    prompts: Prompts,
    *,
    receivers: Annotated[str, typer.Option(help="logits, or q, k or v of heads: q:2.0,2.1.")] = "logits",
    position: Annotated[str, typer.Option(help="Where: -1, a mention of a field such as label:first, or all.")] = "-1",
    sender_position: Annotated[
        str | None, typer.Option(help="Where senders are patched instead.", show_default=False)
    ] = None,
    preset: Preset = "prakash2024",
    freeze: Freeze = None,
    metric: Metric = None,
    method: Method = "exact",
    align: Align = "error",
    template: Template = "none",
    unsafe: Unsafe = False,
    common: Running,
) -> None:
    """Paths from every head to some receivers, in base and tuned model: which heads change what they give?"""
    folder = OutputFolder(common.out, "paths", force=common.force)
    items = _items(prompts, common)
    pair = common.pair(base, tuned)
    folder.check()
    result = trace_paths(
        pair, items, receivers=receivers, position=position, sender_position=sender_position, preset=preset,
        freeze=_listed(freeze), metric=metric, method=method, align=align, template=template, check=not unsafe,
        partial=folder.partial, **common.execution(),
    )  # fmt: skip
    finish(result, folder, common)


def edges(
    model: Model,
    prompts: Prompts,
    *,
    base: OfAdapter = None,
    metric: Annotated[str, typer.Option(help="logit_diff, logprob or prob.")] = "logit_diff",
    steps: Annotated[int, typer.Option(min=0, help="Of integrated gradients; 0: the gradient at the clean run.")] = 0,
    position: Annotated[
        str | None, typer.Option(help="What is written there alone.  [default: everywhere]", show_default=False)
    ] = None,
    align: Align = "error",
    template: Template = "none",
    common: Running,
) -> None:
    """Estimate the effect of every edge of the residual stream at once (EAP, EAP-IG)."""
    folder = OutputFolder(common.out, "edges", force=common.force)
    items = _items(prompts, common)
    loaded = common.model(model, base)
    folder.check()
    result = attribute_edges(
        loaded, items, metric=metric, steps=steps, position=position, align=align, template=template,
        **common.execution(),
    )  # fmt: skip
    finish(result, folder, common)


def evaluate(
    circuit: File,
    base: Base,
    tuned: Tuned,
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="JSONL: prompt, answer.")],
    *,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="CIRCUIT", help="Another circuit, such as the tuned model's; may be given again."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="JSONL over which z is averaged.  [default: PROMPTS]", show_default=False)
    ] = None,
    metric: Annotated[str, typer.Option(help="accuracy, prob, logit_diff, logprob, reciprocal_rank.")] = "accuracy",
    random: Annotated[int, typer.Option(min=0, help="Random circuits of the same size.")] = 100,
    subsets: Annotated[int, typer.Option(min=0, help="Random subsets, for completeness.")] = 20,
    minimality: Annotated[bool, typer.Option("--minimality/--no-minimality", help="Judge every head.")] = True,
    align: Align = "error",
    template: Template = "none",
    unsafe: Unsafe = False,
    common: Running,
) -> None:
    """How much of either model does a circuit do alone? Faithfulness, completeness, minimality, random circuits."""
    folder = OutputFolder(common.out or OUT, "circuit_evaluation", force=common.force)
    circuits = {_name(path): Circuit.load(path) for path in (circuit, *(beside or []))}
    if len(circuits) < 1 + len(beside or []):
        raise InputError("two circuits have one name; let their files, or the folders of circuit.json, differ")
    items = _items(prompts, common)
    pair = common.pair(base, tuned)
    folder.check()
    result = evaluate_circuit(
        pair, circuits, items, reference=reference, metric=metric, random=random, subsets=subsets,
        minimality=minimality, align=align, template=template, seed=common.seed, force=common.force,
        check=not unsafe, partial=folder.partial, **common.execution(),
    )  # fmt: skip
    finish(result, folder, common)


@dataclass(kw_only=True)
class Compared(Saved):
    """The options of `compare`."""

    layers: Annotated[
        int | None,
        typer.Option("--layer-count", min=1, help="Of the model, where the files do not say.", show_default=False),
    ] = None
    heads: Annotated[int | None, typer.Option("--head-count", min=1, help="Of one layer.", show_default=False)] = None


def compare(one: File, other: File, *, common: Compared) -> None:
    """Which heads do two circuits share, group by group, beside chance?"""
    folder = OutputFolder(common.out or OUT, "circuit_overlap", force=common.force)
    result = compare_circuits(one, other, layers=common.layers, heads=common.heads)
    folder.check()
    finish(result, folder, common)


def dcm(
    model: Model,
    circuit: File,
    prompts: Annotated[
        list[Path],
        typer.Argument(metavar="PROMPTS...", help="JSONL: prompt, corrupt, corrupt_answer, and the field of --by."),
    ],
    *,
    base: OfAdapter = None,
    by: Annotated[str, typer.Option(help="The field whose values are the desiderata.")] = "counterfactual",
    target: Annotated[str, typer.Option(help="The field with the answer that a desideratum asks for.")] = (
        "corrupt_answer"
    ),
    rate: Annotated[float, typer.Option(help="Learning rate (Adam).")] = 0.1,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 2,
    penalty: Annotated[float, typer.Option(help="λ: what a patched head costs, in logits.")] = 0.01,
    align: Align = "error",
    template: Template = "none",
    common: Running,
) -> None:
    """What do the groups of a circuit carry? Masks over their heads, learnt for each desideratum (DCM)."""
    folder = OutputFolder(common.out or OUT, "dcm", force=common.force)
    chosen = Circuit.load(circuit)
    items = [item for path in prompts for item in _items(path, None)]
    loaded = common.model(model, base)
    folder.check()
    execution = {name: value for name, value in common.execution().items() if name != "batch_size"}
    if common.batch_size:
        execution["batch_size"] = common.batch_size
    result = learn_masks(
        loaded, chosen, items, by=by, target=target, rate=rate, epochs=epochs, penalty=penalty, align=align,
        template=template, seed=common.seed, force=common.force, partial=folder.partial, **execution,
    )  # fmt: skip
    finish(result, folder, common)


def _items(path: Path, common: Common | None) -> "list[Prompt]":
    from finetune_lens.prompts import read_prompts

    return read_prompts(path, limit=common.limit if common else None)


def _name(path: Path) -> str:
    """Of a circuit's file; of one called circuit.json, its folder's."""
    return path.resolve().parent.name if path.stem == "circuit" else path.stem


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _counts(text: str | None) -> int | dict[str, int] | None:
    """`5` or `reader=5,mover=2`.

    Raises:
        InputError: neither.
    """
    if text is None:
        return None
    try:
        if "=" not in text:
            return int(text)
        return {name.strip(): int(count) for name, count in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise InputError(f"--heads: expected a number, or NAME=NUMBER for each group; found {text!r}") from None


def main() -> None:
    run(find, paths, edges, evaluate, compare, dcm)


if __name__ == "__main__":
    from finetune_lens.circuits.__main__ import main

    main()
