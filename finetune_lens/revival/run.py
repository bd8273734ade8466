"""The course of a revival: every start and seed is trained on the same batches and measured after the same steps."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from finetune_lens.errors import InputError
from finetune_lens.evaluation import Scores, measure
from finetune_lens.held_out import Files
from finetune_lens.hooked.model import HookedModel
from finetune_lens.results.revival import Revival
from finetune_lens.revival.starts import Asked, Start, Training, identity, with_lora
from finetune_lens.stream import Store, padded
from finetune_lens.training import Diverged, train

if TYPE_CHECKING:
    import xarray as xr

MEASURES = ("accuracy", "logprob")


def followed(
    starts: Mapping[str, Start], files: Files, training: Training, *, reference: HookedModel | None, seeds: int,
    seed: int, levels: list[int], threshold: float | None, dtype: str, batch_size: int | None, progress: bool,
    partial: Path | None, facts: dict[str, Any],
) -> Revival:  # fmt: skip
    """See `follow`."""
    known = None
    if reference is not None:
        known = _measured(reference, files, batch_size)
    threshold = _threshold(threshold, known, next(iter(files.measured)))
    store = None
    if partial is not None:
        decisive = asdict(training) | {"levels": levels, "dtype": dtype, "texts": files.identity()}
        store = Store(partial, "", {"analysis": "revival", **decisive})
    runs: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    with tqdm(total=len(starts) * seeds * training.steps, unit="step", disable=not progress, dynamic_ncols=True) as bar:
        for name, start in starts.items():
            for number in range(seeds):
                done = len(runs) * training.steps
                bar.set_description(f"{name}, seed {seed + number}")

                def tick(step: int, done: int = done) -> None:
                    bar.update(done + step - bar.n)

                kept = store if start.fingerprint else None
                runs[name, number] = _run(start, files, training, seed + number, levels, batch_size, kept, tick)
                tick(training.steps)
    data = _dataset(starts, files, levels, seeds, seed, runs, known)
    notes = list(files.notes)
    if seeds == 1:
        notes.append("one seed: the intervals are over prompts, and hold for that order of training")
    examples = {"trained on": len(files.train)} | {name: len(e) for name, e in files.measured.items()}
    record = {"notes": notes, "examples": examples, **facts}
    return Revival(data.assign_attrs(threshold=threshold, provenance=json.dumps(record)))


def _threshold(given: float | None, known: np.ndarray | None, file: str) -> float:
    """The one given, or .9 of the base's accuracy on the first file."""
    if given is not None:
        if not 0 < given <= 1:
            raise InputError(f"threshold is an accuracy, above 0 and at most 1; found {given}")
        return float(given)
    if known is None:
        raise InputError("without a reference model there is nothing to take the threshold from; pass threshold")
    accuracy = float(np.nanmean(known[0, 0]))
    if not accuracy > 0:
        raise InputError(
            f"the base is right on none of the prompts of {file!r}: there is no capability to revive; give the task "
            "that it was trained on, or pass a threshold (--threshold)"
        )
    return 0.9 * accuracy


def _measured(model: HookedModel, files: Files, batch_size: int | None) -> np.ndarray:
    """(measure, file, example)."""
    scores: list[Scores] = [measure(model, examples, batch_size=batch_size) for examples in files.measured.values()]
    found = padded([s.accuracy for s in scores]), padded([-s.loss for s in scores])
    return np.stack(found).astype(np.float32)


def _run(
    start: Start, files: Files, training: Training, seed: int, levels: list[int], batch_size: int | None,
    store: Store | None, tick: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """values (measure, step, file, example), NaN from where it diverged; diverged: that step, −1 where it did not."""
    key = identity(start.role, start.fingerprint, seed)
    row = store.get(key) if store else None
    if row is not None:
        return row
    before, after = (store.folder / f"{key}-{what}.pt" if store else None for what in ("before", "run"))
    model, diverged = None, -1
    try:
        model = start.make(seed, before)
        model.module.requires_grad_(True)
        if training.method == "lora":
            model = with_lora(model, training.rank, seed)
        scores = train(
            Asked(model, files.train), training.draw(len(files.train), tick), steps=training.steps, every=levels,
            evaluate=lambda: _measured(model, files, batch_size), checkpoint=after, **training.options(seed),
        ).scores  # fmt: skip
    except Diverged as error:
        diverged = 0 if model is None else error.step  # None: it could not even be made
        scores = {step: score for step, score in error.run.scores.items() if step <= error.kept}
    blank = np.full((len(MEASURES), *files.ids.shape), np.nan, np.float32)
    row = {"values": np.stack([scores.get(step, blank) for step in levels], 1), "diverged": np.array(diverged)}
    if store:
        store.put(key, row)
        for file in (before, after):
            file.unlink(missing_ok=True)
    return row


def _dataset(
    starts: Mapping[str, Start], files: Files, levels: list[int], seeds: int, seed: int,
    runs: Mapping[tuple[str, int], dict[str, np.ndarray]], known: np.ndarray | None,
) -> "xr.Dataset":  # fmt: skip
    import xarray as xr

    values = np.stack([[runs[name, n]["values"] for n in range(seeds)] for name in starts])
    data: dict[str, Any] = {}
    for number, measure_name in enumerate(MEASURES):
        data[measure_name] = (("start", "seed", "step", "file", "example"), values[:, :, number])
        if known is not None:
            data[f"base_{measure_name}"] = (("file", "example"), known[number])
    diverged = [[int(runs[name, n]["diverged"]) for n in range(seeds)] for name in starts]
    data["diverged"] = (("start", "seed"), np.array(diverged))
    data["id"] = (("file", "example"), files.ids)
    coords = {
        "start": np.array(list(starts), dtype=object),
        "role": ("start", np.array([start.role for start in starts.values()], dtype=object)),
        "seed": np.arange(seed, seed + seeds), "step": np.array(levels),
        "file": np.array(list(files.measured), dtype=object),
    }  # fmt: skip
    return xr.Dataset(data, coords)
