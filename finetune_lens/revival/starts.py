"""Where a training run may start: a model there is, fresh weights, or a base taught wrong answers.

Nothing here writes to a model that is given: what is trained is a copy in memory.
"""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune_lens.checkpoints.adapters import merged_copy
from finetune_lens.errors import InputError
from finetune_lens.evaluation import Examples, read_examples, read_out
from finetune_lens.hooked.model import HookedModel
from finetune_lens.training import train


@dataclass(frozen=True)
class Start:
    """One start.

    Attributes:
        role: tuned, control, scratch, random, or "" of a start that is only followed.
        make: seed, and a file for what it trains before → the model, to be trained by the caller.
        fingerprint: of the files it comes from and what is done to them; "" when there are none.
    """

    role: str
    make: Callable[[int, Path | None], HookedModel]
    fingerprint: str


@dataclass(frozen=True)
class Training:
    """How every start is trained."""

    lr: float
    steps: int
    optimizer: str
    momentum: float
    method: str
    rank: int
    batch: int

    def options(self, seed: int) -> dict[str, Any]:
        """What `train` takes of it; the rate is the same in every step."""
        return {
            "learning_rate": self.lr, "optimizer": self.optimizer, "momentum": self.momentum, "schedule": "constant",
            "seed": seed, "progress": False,
        }  # fmt: skip

    def draw(self, count: int, on_step: Callable[[int], None] = lambda step: None) -> Callable[..., dict[str, Tensor]]:
        """Which of the examples a step sees: as `train` calls it. The same for every start that has one seed."""

        def batch(step: int, generator: np.random.Generator) -> dict[str, Tensor]:
            on_step(step)
            return {"index": torch.from_numpy(generator.choice(count, min(self.batch, count), replace=False))}

        return batch


class Asked(nn.Module):
    """A model with its examples, as `train` takes one: the mean loss over some of them, nothing dropped out."""

    def __init__(self, model: HookedModel, examples: Examples):
        super().__init__()
        self.module = model._outer
        self.model, self.examples = model, examples

    def forward(self, index: Tensor) -> dict[str, Tensor]:
        return {"loss": read_out(self.model, self.examples, index)["loss"].mean()}


def owned(model: HookedModel, dtype: str) -> HookedModel:
    """What the model computes, in memory of its own and in that type; an adapter is merged, or left off."""
    outer = model._outer
    if hasattr(outer, "peft_config"):
        module = merged_copy(outer) if model.adapted else copy.deepcopy(outer).unload()
    else:
        module = copy.deepcopy(outer)
    return HookedModel(module.to(getattr(torch, dtype)).eval(), model.tokenizer, name=model.name)


def existing(load: Callable[[], HookedModel], role: str, dtype: str, fingerprint: str) -> Start:
    """A model there is."""
    return Start(role, lambda seed, file: owned(load(), dtype), fingerprint)


def fresh(like: HookedModel, dtype: str) -> Start:
    """Weights as the architecture draws them, of the same config; others for each seed."""

    def make(seed: int, _: Path | None) -> HookedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = type(like.module)(copy.deepcopy(like.module.config))
        module = module.to(like.device, getattr(torch, dtype)).eval()
        return HookedModel(module, like.tokenizer, name="fresh weights")

    return Start("scratch", make, like.fingerprint and f"fresh {like.fingerprint}")


def mistaught(base: HookedModel, task: Examples, training: Training, steps: int, dtype: str) -> Start:
    """randFT: the base, all of its weights trained at the same rate on the task with other prompts' answers.

    Raises:
        InputError: a task without answers, or of one answer only.
    """
    _refuse_one_answer(task)

    def make(seed: int, file: Path | None) -> HookedModel:
        model = owned(base, dtype)
        model.module.requires_grad_(True)
        wrong = read_examples(
            permuted(task, seed), [model.require_tokenizer()], objective=task.objective, labels=task.labels,
            template=task.template,
        )  # fmt: skip
        draw = training.draw(len(task))
        train(Asked(model, wrong), draw, steps=steps, checkpoint=file, **training.options(seed))
        return model

    return Start("random", make, base.fingerprint and f"mistaught {steps} {base.fingerprint}")


def permuted(task: Examples, seed: int) -> list[Any]:
    """The task's prompts, each with the answer of another, never its own."""
    rng = np.random.default_rng([seed, len(task)])
    answers = [p.answer for p in task.prompts]
    found = []
    for prompt, at in zip(task.prompts, rng.permutation(len(answers)).tolist(), strict=True):
        while set(answers[at]) & set(prompt.answer):
            at = int(rng.integers(len(answers)))
        found.append(replace(prompt, answer=answers[at], wrong=()))
    return found


def _refuse_one_answer(task: Examples) -> None:
    answers = [set(p.answer) for p in task.prompts]
    if task.objective == "text":
        raise InputError("random_steps permute the answers of the task, and its prompts have none")
    for prompt, own in zip(task.prompts, answers, strict=True):
        if all(own & other for other in answers):
            raise InputError(
                f"random_steps permute the answers of the task, and no prompt has another answer than {prompt.id}"
            )


def with_lora(model: HookedModel, rank: int, seed: int) -> HookedModel:
    """The model with a LoRA adapter (α = 2·rank) on every linear map of its blocks: only that is trained.

    Raises:
        InputError: no linear map lies in a block.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    inside = {id(m) for block in model.anatomy.blocks for m in block.module.modules()}
    linear = {
        name: m for name, m in model.module.named_modules() if id(m) in inside and isinstance(m, nn.Linear | Conv1D)
    }
    if not linear:
        raise InputError(f"{model.name}: no linear map lies in a block, to put LoRA on; train with method full")
    turned = any(isinstance(m, Conv1D) for m in linear.values())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(linear), fan_in_fan_out=turned)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT uses of transformers is deprecated
        torch.manual_seed(seed)
        peft = get_peft_model(model.module, config)
    return HookedModel(peft, model.tokenizer, name=model.name)


def require_alike(model: HookedModel, other: HookedModel, name: str) -> None:
    """Refuse a control that is not the tuned model with other weights.

    Raises:
        InputError: the first parameter that differs.
    """
    one, two = (_shapes(m) for m in (model, other))
    for parameter in [*one, *two]:
        if one.get(parameter) != two.get(parameter):
            here, there = (shapes.get(parameter, "absent") for shapes in (one, two))
            raise InputError(
                f"control {name!r}: {parameter} is {there} there and {here} in the tuned model; expected the same "
                "architecture and vocabulary with other weights"
            )


def _shapes(model: HookedModel) -> dict[str, tuple[int, ...]]:
    return {
        name.replace(".base_layer", ""): tuple(p.shape)
        for name, p in model.module.named_parameters()
        if ".lora_" not in name
    }


def identity(*facts: Any) -> str:
    """A hash of what decides a run."""
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]
