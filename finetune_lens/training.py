"""One training loop: seeded, and interrupted runs end bit for bit where uninterrupted ones do.

Whatever is random in a step (the batch, dropout) comes from a generator seeded by (seed, step), and the learning rate
is a function of the step alone, so a run is decided by its arguments and nothing has to be replayed to continue it. Bit
for bit holds on one machine with one number of threads.

A loss or a gradient that is not finite ends the run before it is applied, and the model goes back to where it last was
good (`Diverged`). After the last step the loss on its batch is looked at once more.

Cost: that of the forward and backward passes; a checkpoint holds the trainable parameters, as they are and as they last
were good, and the optimizer's state.
Memory: model, gradient and optimizer's state, and a copy of the trainable parameters.

>>> import torch
>>> class Line(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.slope = torch.nn.Parameter(torch.zeros(()))
...     def forward(self, x):
...         return {"loss": ((self.slope - 3) * x).square().mean()}
>>> model = Line()
>>> run = train(model, lambda step, generator: {"x": torch.from_numpy(generator.normal(size=8))},
...             steps=100, learning_rate=0.1, schedule="linear", seed=0, progress=False)
>>> round(model.slope.item(), 1)
3.0
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from finetune_lens.files import whole_file

Batch = Mapping[str, torch.Tensor]
FORMAT = 2  # of checkpoints


@dataclass(frozen=True)
class Run:
    """What a training run left behind, beside the trained model.

    Attributes:
        losses: (steps taken,) float64, the loss of each step before its update, penalty included.
        scores: what `evaluate` returned, by the number of steps taken by then.
        seconds: wall time of the steps and evaluations, interruptions left out.
    """

    losses: np.ndarray
    scores: dict[int, Any]
    seconds: float


class Diverged(FloatingPointError):
    """The loss or the gradient of a step was not finite.

    Attributes:
        step: that step; it was not taken. The number of steps, where the last one led there.
        kept: how many steps the model has had now: those until the last evaluation that a finite step followed.
        run: up to `step`.
    """

    def __init__(self, what: str, step: int, kept: int, run: Run):
        super().__init__(
            f"{what} at step {step}: the learning rate is too high, or the data hold what is not a number; the model "
            f"is put back to where it was after {kept} steps"
        )
        self.step, self.kept, self.run = step, kept, run


def train(
    model: torch.nn.Module,
    batch: Callable[[int, np.random.Generator], Batch],
    *,
    steps: int,
    learning_rate: float,
    schedule: Literal["constant", "linear", "cosine"] = "cosine",
    warmup: int = 0,
    weight_decay: float = 0.0,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    momentum: float = 0.0,
    l1: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    evaluate: Callable[[], float | np.ndarray] | None = None,
    target: float = math.inf,
    every: int | Iterable[int] = 100,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Run:
    """Train `model` in place; only parameters with `requires_grad` move.

    Args:
        model: a Hugging Face model, or any module whose call on a batch returns something with a scalar "loss".
        batch: `batch(step, generator)`, the keyword arguments of the model's call, on the model's device.
        steps: updates to make, unless `target` is reached before.
        learning_rate: the highest one, reached after `warmup` steps and held ("constant") or brought down towards 0.
        weight_decay: decoupled for "adamw"; on matrices only, not on norms and biases.
        optimizer: "adamw" has β = (.9, .99), suited to short runs.
        momentum: of "sgd".
        l1: weight of the term ‖θ − θ0‖₁ added to the loss, over the trainable parameters θ, which start at θ0.
        clip: the largest norm of the gradient.
        evaluate: called after the steps that `every` says; its number, or array of numbers, is kept in `Run.scores`.
        target: the run ends at the first evaluation that is at least this; of an array its mean.
        every: evaluations are every so many steps, or after these numbers of steps (0: before the first); and after the
            last.
        checkpoint: file that is written whenever there is an evaluation, or would be. A run with the same arguments,
            starting weights and first batch continues from it; any other run starts anew and overwrites it.

    Raises:
        Diverged: the loss or the gradient is not finite. The optimizer has not seen it, and the model is back at its
            last evaluation, or at the start where none came before.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trainable.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    stepper = (
        torch.optim.SGD(groups, momentum=momentum)
        if optimizer == "sgd"
        else torch.optim.AdamW(groups, betas=(0.9, 0.99))
    )
    due = {*(range(every, steps, every) if isinstance(every, int) else map(int, every)), steps}
    # Before a checkpoint is read: a run that continues is held to where it started, not to where it stopped.
    started = {name: p.detach().clone() for name, p in trainable.items()} if l1 else {}
    losses: list[float] = []
    scores: dict[int, Any] = {}
    seconds = 0.0
    kept, good = 0, _copied(model)

    identity = ""
    if checkpoint is not None:
        settings = (steps, learning_rate, schedule, warmup, weight_decay, optimizer, momentum, l1, clip)
        settings += (seed, target, sorted(due), FORMAT)
        identity = _identity(settings, list(trainable), model, batch(0, np.random.default_rng([seed, 0])))
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
            if saved["identity"] == identity:
                model.load_state_dict(saved["model"], strict=False)
                stepper.load_state_dict(saved["optimizer"])
                losses, seconds = saved["losses"], saved["seconds"]
                kept, good = saved["kept"], saved["good"]
                scores = {n: s.numpy() if isinstance(s, torch.Tensor) else s for n, s in saved["scores"].items()}

    start = time.perf_counter() - seconds

    def look() -> None:
        nonlocal seconds
        if evaluate is not None:
            model.eval()
            score = evaluate()
            scores[len(losses)] = score if isinstance(score, np.ndarray) else float(score)
        seconds = time.perf_counter() - start
        if checkpoint is not None:
            told = {n: torch.from_numpy(s) if isinstance(s, np.ndarray) else s for n, s in scores.items()}
            state = {"identity": identity, "losses": losses, "scores": told, "seconds": seconds}
            state |= {"model": _moving(model), "optimizer": stepper.state_dict(), "kept": kept, "good": good}
            with whole_file(checkpoint) as path:
                torch.save(state, path)

    def require_finite(value: float, norm: float = 0.0) -> None:
        if not (math.isfinite(value) and math.isfinite(norm)):
            model.load_state_dict(good, strict=False)
            what = f"the gradient's norm is {norm}" if math.isfinite(value) else f"the loss is {value}"
            run = Run(np.array(losses), scores, time.perf_counter() - start)
            raise Diverged(what, len(losses), kept, run)

    was_training = model.training
    devices = sorted({p.device for p in trainable.values() if p.device.type == "cuda"}, key=str)
    with (
        torch.random.fork_rng(devices=devices),
        tqdm(total=steps, initial=len(losses), disable=not progress, unit="step") as bar,
    ):
        try:
            if 0 in due and not losses and 0 not in scores:
                look()
            while len(losses) < steps and not any(np.mean(score) >= target for score in scores.values()):
                step = len(losses)
                generator = np.random.default_rng([seed, step])
                torch.manual_seed(int(generator.integers(2**63)))
                for group in stepper.param_groups:
                    group["lr"] = learning_rate * _scale(step, steps, schedule, warmup)
                model.train()
                drawn = batch(step, generator)
                loss = model(**drawn)["loss"]
                if l1:
                    loss = loss + l1 * sum((p - started[name]).abs().sum() for name, p in trainable.items())
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(trainable.values(), clip).item()
                value = loss.item()
                require_finite(value, norm)
                if step in due:  # from here a finite step leads on: only now is what was evaluated known to be good
                    kept, good = step, _copied(model)
                stepper.step()
                stepper.zero_grad()
                losses.append(value)
                bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
                bar.update()
                if len(losses) == steps:  # no step follows that would show it
                    model.eval()
                    with torch.no_grad():
                        require_finite(model(**drawn)["loss"].item())
                if len(losses) in due:
                    look()
        finally:
            stepper.zero_grad()
            model.train(was_training)
    return Run(np.array(losses), scores, seconds)


def _scale(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The learning rate of `step` as a share of the highest."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


def _moving(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All state but the frozen parameters."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in _moving(model).items()}


def _identity(settings: tuple, trainable: list[str], model: torch.nn.Module, first: Batch) -> str:
    """A hash of all that decides a run: the settings, the starting weights, and the data (by its first batch)."""
    digest = hashlib.sha256(json.dumps([settings, trainable]).encode())
    for tensors in (model.state_dict(), first):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
