"""Which few of the entries that tuning changed carry what it taught?

θ(γ) = θ0 + γ⊙Δ with a mask γ over the entries of the blocks. Skill localisation (Panigrahi et al. 2023, "Task-Specific
Skill Localization in Fine-tuned Language Models", arXiv 2302.06600, §2) starts from the mask γ_b of the largest |Δ| and
searches γ = γ_b + (1 − 2γ_b)·σ(S − b) with

    S ← S − η·(1 − 2γ_b)⊙(∇L(θ(γ))⊙Δ)⊙σ(1 − σ),    b = 10, S ~ U[0, 1] at the start,

and keeps the best of the rounded masks. No term asks for sparsity: how many entries remain is an outcome. Beside the
graft stand masks of exactly its size: the largest |Δ|, the largest |g⊙Δ| with the base's gradient, the largest movement
away from 0, and random ones. Rel = (P_γ − P_0)/(P_1 − P_0).

Cost: a step is a forward and backward pass over its examples, and a forward pass over the selection. Memory: the model,
a gradient and S of the blocks' size, and two Boolean masks.

>>> import numpy as np
>>> from finetune_lens import ModelPair, graft, zoo
>>> from finetune_lens.tasks import strings
>>> folder, drawn = zoo.path("strings"), strings.draw(["flip"], 32, np.random.default_rng(0), part="train")
>>> rows = [{"prompt": strings.question(*item), "answer": strings.answer(*item)} for item in drawn]
>>> pair = ModelPair.load(folder / "base", folder / "full")
>>> found = graft(pair, rows, sparsity=0.05, steps=2, metric="logprob", progress=False)
>>> table = found.table().set_index("method")["metric"]
>>> bool(table["graft"] > table["largest |Δ|"] > table["random"])
True
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.grafting import Grafting

BASELINES = ("largest |Δ|", "largest |g⊙Δ|", "movement", "random")
SELECTION = 1024  # examples that choose among the steps' masks
SENSITIVITY = 8  # batches whose squared gradients are summed
SAMPLE = 1_000_000  # entries of which ranks are compared


@recorded
def graft(
    pair: "ModelPair",
    prompts: Any,
    *,
    evaluate: Mapping[str, Any] | None = None,
    sparsity: float | Sequence[float] = 1e-5,
    step: float = 100.0,
    rate: float | None = None,
    steps: int = 30,
    examples: int = 1024,
    objective: str = "auto",
    template: str = "none",
    metric: str | None = None,
    baselines: bool = True,
    random_seeds: int = 3,
    beside: Sequence[str | Path] = (),
    files: str | Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
    partial: Path | None = None,
) -> "Grafting":
    """Search a graft, and measure it beside masks of its size.

    Args:
        pair: base and tuned; the base has to run.
        prompts: the examples that the mask is trained and chosen on: JSONL file, or a list of prompts.
        evaluate: name → prompts on which it is measured: held out from the task, or of another distribution.
        sparsity: share of the blocks' entries in the base mask, by default the published one; several are a sweep, a
            search each. How many entries the graft itself has is an outcome.
        step: of the scores, in the norm ‖S‖ at the start; the learning rate is step / (1e-4·‖g⊙Δ‖), see `search`.
        rate: the learning rate itself (the paper's script has 1e7).
        steps: updates of the scores; the base mask is looked at before the first.
        examples: whose gradient is averaged in a step.
        objective: answer (all tokens of the answer), labels (classification by label words: the distinct answers), text
            (next tokens), auto (answer where there are answers).
        template: "none"; "each" puts the prompts through the chat template, the same tokens for both models.
        metric: accuracy or logprob, by which masks are chosen and Rel is taken; by default accuracy, of texts logprob.
        random_seeds: random masks whose scores are averaged.
        beside: graft files of other tasks on the same base: overlap, union.
        files: folder in which the grafts are left: graft.safetensors, of a sweep graft-SPARSITY.safetensors; files so
            named that an earlier run left there are removed.
        seed: of the scores, the examples of a step, and random masks.
        partial: folder in which a search keeps its last step, and finished measurements, so that it continues.

    Raises:
        InputError: an option out of range, labels that are not single tokens, no block that differs.
    """
    from finetune_lens.grafting.run import measured
    from finetune_lens.prompts import require_template

    sparsities = tuple(sorted(float(s) for s in ((sparsity,) if isinstance(sparsity, float | int) else sparsity)))
    for value in sparsities:
        if not 0 < value < 1:
            raise InputError(f"sparsity is a share of the entries, between 0 and 1; found {value:g}")
    if not sparsities or len(set(sparsities)) < len(sparsities):
        raise InputError(f"expected one sparsity or several different ones; found {sparsities}")
    for name, (value, least) in {
        "steps": (steps, 0),
        "examples": (examples, 1),
        "random_seeds": (random_seeds, 1),
    }.items():
        if value < least:
            raise InputError(f"{name} is at least {least}; found {value}")
    if seed < 0:
        raise InputError(f"seed is at least 0; found {seed}")
    if "train" in (evaluate or {}):
        raise InputError("the examples that choose the mask are called 'train'; give held-out prompts another name")
    if not step > 0 or (rate is not None and not rate > 0):
        raise InputError(f"step and rate are above 0; found {step} and {rate}")
    if metric not in (None, "accuracy", "logprob"):
        raise InputError(f"metric is accuracy or logprob; found {metric!r}")
    return measured(
        pair, prompts, evaluate=dict(evaluate or {}), sparsities=sparsities, step=step, rate=rate, steps=steps,
        count=examples, objective=objective, template=require_template(template), metric=metric, baselines=baselines,
        random_seeds=random_seeds, beside=tuple(beside), folder=None if files is None else Path(files), seed=seed,
        batch_size=batch_size, limit=limit, device=device, dtype=dtype, progress=progress, partial=partial,
    )  # fmt: skip


def main() -> None:
    import typer

    from finetune_lens.command import Base, OutputFolder, Running, Template, Tuned, finish, run, span

    def grafting(
        base: Base,
        tuned: Tuned,
        train: Annotated[
            Path, typer.Argument(metavar="TRAIN", help="JSONL: prompt, answer; the mask is fitted to it.")
        ],
        *,
        evaluate: Annotated[
            list[Path], typer.Option("--eval", help="JSONL to measure the graft on, held out; may be repeated.")
        ] = [],  # noqa: B006 (typer reads it)
        ood: Annotated[list[Path], typer.Option("--ood", help="JSONL of another distribution; may be repeated.")] = [],  # noqa: B006
        sparsity: Annotated[
            str, typer.Option(help="Share of the entries in the base mask; 1e-5,1e-4 is a sweep.")
        ] = "1e-5",
        step: Annotated[float, typer.Option("--step-size", help="Of the scores, relative to ‖g⊙Δ‖.")] = 100.0,
        rate: Annotated[
            float | None,
            typer.Option(help="The learning rate itself.  [default: from --step-size]", show_default=False),
        ] = None,
        steps: Annotated[int, typer.Option(help="Updates of the scores.")] = 30,
        examples: Annotated[int, typer.Option(help="Examples whose gradient is averaged in a step.")] = 1024,
        objective: Annotated[str, typer.Option(help="auto, answer, labels (label words), text.")] = "auto",
        template: Template = "none",
        metric: Annotated[
            str | None,
            typer.Option(help="accuracy or logprob.  [default: accuracy; of texts logprob]", show_default=False),
        ] = None,
        baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Other masks of its size.")] = True,
        beside: Annotated[
            list[Path], typer.Option("--beside", help="graft.safetensors of another task: overlap, union.")
        ] = [],  # noqa: B006
        common: Running,
    ) -> None:
        """Search the few entries of the update that carry the skill; leaves graft.safetensors."""
        folder = OutputFolder(common.out, "grafting", force=common.force)
        held = named([*evaluate, *ood])
        pair = common.pair(base, tuned)
        folder.check()
        result = graft(
            pair, train, evaluate=held, sparsity=span(sparsity), step=step, rate=rate, steps=steps, examples=examples,
            objective=objective, template=template, metric=metric, baselines=baselines, beside=beside,
            files=folder.path, seed=common.seed, partial=folder.partial, **common.execution(),
        )  # fmt: skip
        finish(result, folder, common)

    run(grafting)


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Files under the names they have without folder and ending.

    Raises:
        InputError: two of one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found or path.stem == "train":
            raise InputError(f"{path} and another file are both called {path.stem!r}; give them different names")
        found[path.stem] = path
    return found
