"""How many steps of training bring back what the base could do, against models that never could?

A capability that tuning wrapped returns within few steps of training on its task; one that it deleted has to be learnt
again, as by a model that never had it (Jain et al. 2023, "Mechanistically analyzing the effects of fine-tuning on
procedurally defined tasks", arXiv 2311.12786, "Reverse fine-tuning"). From every start θ_0 the same training

    θ_{t+1} = θ_t − η·step(∇L_task(θ_t)),    the same batches in the same order,

is followed by the accuracy on held-out prompts after steps spaced by the logarithm. Starts: the tuned model (reFT);
controls, such as a model that was tuned first and never knew the task; fresh weights; and the base after it was trained
on wrong answers (randFT). What is reported is the number of steps to a threshold, and the ratio control / tuned.

Cost: starts · seeds · (steps forward and backward passes of a batch, and an evaluation at each of the evaluated steps).
Memory: base and tuned model, and the model in training with gradient, optimizer state and a copy, in float32.

>>> import numpy as np
>>> from finetune_lens import ModelPair, revive, zoo
>>> from finetune_lens.tasks import strings
>>> folder, drawn = zoo.path("strings"), strings.draw(["copy"], 40, np.random.default_rng(0), part="train")
>>> rows = [{"prompt": strings.question(*item), "answer": strings.answer(*item)} for item in drawn]
>>> pair = ModelPair.load(folder / "base", folder / "full")
>>> found = revive(pair, rows, lr=3e-4, steps=10, seeds=1, batch=8, threshold=0.1, progress=False)
>>> steps = found.crossings().set_index("start")["steps"]
>>> bool(steps["tuned"] < steps["scratch"])
True
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.revival import Revival
    from finetune_lens.revival.starts import Training

SHARE = 0.2  # of the task's texts that are held out where no file is
PER_DECADE = 6  # evaluations
OPTIMIZERS = ("adamw", "sgd")
METHODS = ("full", "lora")


@recorded
def revive(
    pair: "ModelPair",
    prompts: Any,
    *,
    lr: float = 1e-5,
    steps: int = 1000,
    evaluate: Mapping[str, Any] | None = None,
    controls: Mapping[str, Any] | None = None,
    scratch: bool = True,
    random_steps: int = 0,
    seeds: int = 3,
    method: str = "full",
    rank: int = 8,
    optimizer: str = "adamw",
    momentum: float = 0.0,
    batch: int = 32,
    threshold: float | None = None,
    every: int | Sequence[int] | None = None,
    objective: str = "auto",
    template: str = "none",
    seed: int = 0,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
    partial: Path | None = None,
) -> "Revival":
    """Train the tuned model back, beside its controls.

    Every start is a copy in memory; no model that is given and no file is changed. A run whose loss is no longer finite
    ends there, is said to have diverged, and the others go on.

    Args:
        pair: base and tuned; both have to run.
        prompts: the task that the base can do, to be trained on: JSONL file or list of prompts.
        lr: learning rate, the same in every step; at 0 nothing changes.
        steps: of training.
        evaluate: name → held-out prompts to measure, the first of them for the threshold. By default a fifth of the
            task is held out, as the file "task".
        controls: name → model (a source as for `ModelPair.load`, or one that is loaded) of the tuned model's
            architecture that never had the capability: tuned first, and not taught the task.
        scratch: start from fresh weights too.
        random_steps: start from the base too, trained so many steps on the task with the answers permuted.
        seeds: of the batches, fresh weights, permutations and LoRA.
        method: "full" (all weights) or "lora" (PEFT adapters of this `rank` on the linear maps of the blocks).
        optimizer: "adamw", or "sgd" with `momentum`.
        batch: prompts a step.
        threshold: accuracy to be reached; by default .9 of the base's on the first file.
        every: evaluate every so many steps, or after these; by default about six times a decade. 0 and the last anyway.
        objective: of training and measuring: answer (its tokens alone), labels, text, auto.
        template: "none"; "each" puts the prompts through the chat template, the same tokens for all models.
        seed: the first.
        batch_size: prompts at once where accuracy is measured.
        dtype: auto is float32, in which a small step is not rounded away.
        partial: folder in which finished runs, and the last checkpoint of one that was interrupted, wait.

    Raises:
        InputError: an option out of range, prompts that cannot be scored or permuted, a control of another
            architecture, a base that cannot do the task.
    """
    from finetune_lens.held_out import hold_out
    from finetune_lens.prompts import require_template
    from finetune_lens.revival import starts as kinds
    from finetune_lens.revival.run import followed

    templated = require_template(template)
    training = _training(lr, steps, optimizer, momentum, method, rank, batch)
    levels = _levels(every, steps)
    _require(seeds=(seeds, 1), random_steps=(random_steps, 0), seed=(seed, 0))
    kind = "float32" if dtype == "auto" else dtype
    base, tuned = pair.models(device=device, dtype=kind)
    config = pair.config if pair.config is not None else pair.base_checkpoint.config
    loads = {
        name: _loader(source, device, kind, config, pair.tokenizer, pair.options["online"])
        for name, source in (controls or {}).items()
    }
    reserved = {"base", "tuned", "scratch", "randFT"} & set(loads)
    if reserved:
        raise InputError(f"a control cannot be called {min(reserved)!r}; give it another name")
    models = {"base": base.describe(), "tuned": tuned.describe()}
    found = {"tuned": kinds.existing(lambda: tuned, "tuned", kind, _joined(base, tuned))}
    tokenizers = [base.require_tokenizer(), tuned.tokenizer]
    for name, load in loads.items():
        control = load()
        kinds.require_alike(tuned, control, name)
        tokenizers.append(control.tokenizer)
        models[name] = control.describe()
        found[name] = kinds.existing(load, "control", kind, control.fingerprint)
    files = hold_out(
        prompts, evaluate, tokenizers, share=0 if evaluate else SHARE, objective=objective, template=templated,
        limit=limit, seed=seed,
    )  # fmt: skip
    if scratch:
        found["scratch"] = kinds.fresh(tuned, kind)
    if random_steps:
        found["randFT"] = kinds.mistaught(base, files.train, training, random_steps, kind)
    return followed(
        found, files, training, reference=base, seeds=seeds, seed=seed, levels=levels, threshold=threshold, dtype=kind,
        batch_size=batch_size, progress=progress, partial=partial, facts={"models": models},
    )  # fmt: skip


@recorded
def follow(
    starts: Mapping[str, Any],
    prompts: Any,
    *,
    lr: float = 1e-5,
    steps: int = 1000,
    evaluate: Mapping[str, Any] | None = None,
    reference: Any = None,
    controls: Sequence[str] = (),
    seeds: int = 3,
    method: str = "full",
    rank: int = 8,
    optimizer: str = "adamw",
    momentum: float = 0.0,
    batch: int = 32,
    threshold: float | None = None,
    every: int | Sequence[int] | None = None,
    objective: str = "auto",
    template: str = "none",
    seed: int = 0,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    config: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
    partial: Path | None = None,
) -> "Revival":
    """Train any models on one task and follow their accuracy: what `revive` does with its starts.

    Args:
        starts: name → model: a source as for `ModelPair.load`, a module, or a `HookedModel`.
        reference: a model that is measured and not trained, for the threshold.
        controls: names of the starts that never had the capability. A start called "tuned" is compared with every
            other; the verdict is by these alone.
        config, tokenizer: of starts that have none beside them.

    The other arguments, and what is raised, are those of `revive`.
    """
    from finetune_lens.held_out import hold_out
    from finetune_lens.prompts import require_template
    from finetune_lens.revival import starts as kinds
    from finetune_lens.revival.run import followed

    templated = require_template(template)
    training = _training(lr, steps, optimizer, momentum, method, rank, batch)
    levels = _levels(every, steps)
    _require(seeds=(seeds, 1), seed=(seed, 0))
    if not starts:
        raise InputError("expected one start or more, a model by name; found none")
    unknown = [name for name in controls if name not in starts or name == "tuned"]
    if unknown:
        known = ", ".join(repr(name) for name in starts if name != "tuned") or "no start beside 'tuned'"
        raise InputError(f"controls are names of starts: {known}; found {unknown[0]!r}")
    kind = "float32" if dtype == "auto" else dtype
    found, tokenizers, models = {}, [], {}
    for name, source in starts.items():
        load = _loader(source, device, kind, config, tokenizer, False)
        model = load()
        role = "tuned" if name == "tuned" else "control" if name in controls else ""
        found[name] = kinds.existing(load, role, kind, model.fingerprint)
        tokenizers.append(model.tokenizer)
        models[name] = model.describe()
    if not any(tokenizers):
        raise InputError("no start has a tokenizer beside its weights; pass tokenizer")
    known = None if reference is None else _loader(reference, device, kind, config, tokenizer, False)()
    files = hold_out(
        prompts, evaluate, tokenizers, share=0 if evaluate else SHARE, objective=objective, template=templated,
        limit=limit, seed=seed,
    )  # fmt: skip
    return followed(
        found, files, training, reference=known, seeds=seeds, seed=seed, levels=levels, threshold=threshold, dtype=kind,
        batch_size=batch_size, progress=progress, partial=partial, facts={"inputs": models},
    )  # fmt: skip


def log_steps(steps: int, per_decade: int = PER_DECADE) -> list[int]:
    """0, the last, and between them about so many a decade, evenly by the logarithm.

    >>> log_steps(30)
    [0, 1, 2, 3, 5, 7, 10, 15, 22, 30]
    """
    most = math.ceil(per_decade * math.log10(max(steps, 1))) + 1
    between = {round(10 ** (k / per_decade)) for k in range(most)}
    return sorted({0, steps, *(step for step in between if step < steps)})


def _levels(every: int | Sequence[int] | None, steps: int) -> list[int]:
    if every is None:
        return log_steps(steps)
    if isinstance(every, int):
        _require(every=(every, 1))
        return sorted({*range(0, steps, every), steps})
    levels = sorted({0, steps, *map(int, every)})
    if levels[0] < 0 or levels[-1] > steps:
        raise InputError(f"every: expected numbers of steps from 0 to {steps}; found {list(every)}")
    return levels


def _training(lr: float, steps: int, optimizer: str, momentum: float, method: str, rank: int, batch: int) -> "Training":
    from finetune_lens.revival.starts import Training

    if not (0 <= lr < math.inf):
        raise InputError(f"lr is at least 0; found {lr}")
    if optimizer not in OPTIMIZERS or method not in METHODS:
        raise InputError(
            f"optimizer is {' or '.join(OPTIMIZERS)} and method {' or '.join(METHODS)}; found {optimizer!r}, {method!r}"
        )
    if not (0 <= momentum < 1) or (momentum and optimizer != "sgd"):
        raise InputError(f"momentum is from 0 to below 1, and sgd's alone; found {momentum} with {optimizer}")
    _require(steps=(steps, 1), rank=(rank, 1), batch=(batch, 1))
    return Training(lr, steps, optimizer, momentum, method, rank, batch)


def _require(**least: tuple[int, int]) -> None:
    for name, (value, bound) in least.items():
        if value < bound:
            raise InputError(f"{name} is at least {bound}; found {value}")


def _loader(
    source: Any, device: str, dtype: str, config: Any, tokenizer: Any, online: bool
) -> "Callable[[], HookedModel]":
    """What loads a model: one that is in memory is itself."""
    from finetune_lens.checkpoints import open_checkpoint
    from finetune_lens.hooked import HookedModel
    from finetune_lens.hooked.loading import as_model

    if isinstance(source, HookedModel):
        return lambda: source
    known = open_checkpoint(source, online=online).config
    options = {"device": device, "dtype": dtype, "tokenizer": tokenizer, "online": online}
    return lambda: as_model(source, config=None if known else config, **options)


def _joined(*models: "HookedModel") -> str:
    prints = [model.fingerprint for model in models]
    return " ".join(prints) if all(prints) else ""


def main() -> None:
    import typer

    from finetune_lens.command import Base, OutputFolder, Running, Template, Tuned, finish, numbers, run

    def revival(
        base: Base,
        tuned: Tuned,
        *,
        task: Annotated[Path, typer.Option(help="JSONL: prompt, answer, of what the base can do; trained on.")],
        lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-5,
        steps: Annotated[int, typer.Option(help="Of training.")] = 1000,
        evaluate: Annotated[
            list[Path],
            typer.Option("--eval", help="JSONL, held out; may be repeated.  [default: a fifth of the task]"),
        ] = [],  # noqa: B006 (typer reads it)
        control: Annotated[
            list[str], typer.Option(help="Model that never had it, as PATH or NAME=PATH; may be repeated.")
        ] = [],  # noqa: B006
        scratch: Annotated[bool, typer.Option("--scratch/--no-scratch", help="Fresh weights too.")] = True,
        random_steps: Annotated[int, typer.Option(help="The base too, after so many steps on permuted answers.")] = 0,
        seeds: Annotated[int, typer.Option(help="How many, from --seed on.")] = 3,
        method: Annotated[str, typer.Option(help="full or lora.")] = "full",
        rank: Annotated[int, typer.Option(help="Of LoRA.")] = 8,
        optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
        momentum: Annotated[float, typer.Option(help="Of sgd.")] = 0.0,
        batch: Annotated[int, typer.Option(help="Prompts a step.")] = 32,
        threshold: Annotated[
            float | None,
            typer.Option(help="Accuracy to reach.  [default: .9 of the base's]", show_default=False),
        ] = None,
        every: Annotated[
            str | None,
            typer.Option(help="Evaluate after these steps, as 1,10,100.  [default: 6 a decade]", show_default=False),
        ] = None,
        objective: Annotated[str, typer.Option(help="auto, answer, labels (label words), text.")] = "auto",
        template: Template = "none",
        common: Running,
    ) -> None:
        """Train the tuned model back, and count the steps against models that never had the capability."""
        from finetune_lens.held_out import named

        folder = OutputFolder(common.out, "revival", force=common.force)
        held, controls = named(evaluate), _named(control)
        pair = common.pair(base, tuned)
        folder.check()
        result = revive(
            pair, task, lr=lr, steps=steps, evaluate=held, controls=controls, scratch=scratch,
            random_steps=random_steps, seeds=seeds, method=method, rank=rank, optimizer=optimizer, momentum=momentum,
            batch=batch, threshold=threshold, every=numbers(every) if every else None, objective=objective,
            template=template, seed=common.seed, partial=folder.partial, **common.execution(),
        )  # fmt: skip
        finish(result, folder, common)

    run(revival)


def _named(controls: Sequence[str]) -> dict[str, str]:
    """Controls by the name before =, or by the path's own.

    Raises:
        InputError: two of one name.
    """
    found: dict[str, str] = {}
    for control in controls:
        name, given, path = control.partition("=")
        name, path = (name, path) if given else (Path(control).stem, control)
        if name in found:
            raise InputError(f"two controls are called {name!r}; name them as NAME=PATH")
        found[name] = path
    return found
