"""The course of a grafting run: search, masks beside it, measurements, and where the masks lie."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from finetune_lens import masks
from finetune_lens.errors import InputError
from finetune_lens.evaluation import Examples, Scores, add_gradient, label_words, measure, read_examples
from finetune_lens.grafting import BASELINES, SAMPLE, SELECTION, SENSITIVITY
from finetune_lens.grafting.files import drop_earlier, leaving, named
from finetune_lens.grafting.search import (
    at_random,
    draw,
    first_order,
    gradients,
    magnitudes,
    movements,
    search,
)
from finetune_lens.hybrid import Hybrid
from finetune_lens.linalg import generator
from finetune_lens.linalg.selection import largest
from finetune_lens.prompts import read_prompts
from finetune_lens.results.grafting import Grafting
from finetune_lens.stream import Store, padded

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.pair import ModelPair

MEASURED = ("accuracy", "logprob", "confidence", "agreement")
Row = dict[str, Any]


def measured(
    pair: "ModelPair", prompts: Any, *, evaluate: Mapping[str, Any], sparsities: tuple[float, ...], step: float,
    rate: float | None, steps: int, count: int, objective: str, template: bool, metric: str | None, baselines: bool,
    random_seeds: int, beside: tuple[str | Path, ...], folder: Path | None, seed: int, batch_size: int | None,
    limit: int | None, device: str, dtype: str, progress: bool, partial: Path | None,
) -> Grafting:  # fmt: skip
    """See `graft`."""
    others = {name: masks.Graft.load(path) for name, path in named(beside).items()}
    left = {} if folder is None else leaving(folder, sparsities, beside)
    hybrid = Hybrid(pair, device=device, dtype=dtype)
    for other in others.values():  # of this base, or it is said before anything is searched
        with hybrid.at(other):
            pass
    files, notes = _read(hybrid, prompts, evaluate, objective, template, limit)
    if any(weight.factored for weight in hybrid.weights.values()):
        notes.append(
            "the tuned model is a low-rank adapter, which moves all entries of the weights it adapts: localisation in "
            "few of them is not to be expected, however even the update is"
        )
    train = files["train"]
    metric = metric or ("logprob" if train.objective == "text" else "accuracy")
    selection = train if len(train) <= SELECTION else _first(train, draw(len(train), SELECTION, seed, 0))
    files = files | {"train": selection}
    names = hybrid.names(outside=False)
    if not names:
        raise InputError("no weight lies in a block: expected a model of layers; embeddings are not grafted")
    total = sum(hybrid.weights[name].count for name in names)
    counts = {s: round(s * total) for s in sparsities}
    for value, entries in counts.items():
        if not 0 < entries < total:
            raise InputError(f"sparsity {value:g} is {entries} of {total} entries; the smallest is {1 / total:.2g}")
    update = _update(hybrid, names)
    if not update["total"]:
        raise InputError("base and tuned model do not differ in any weight of a block: there is nothing to graft")
    facts = {
        "analysis": "grafting", "sparsities": sparsities, "step": step, "rate": rate, "steps": steps, "count": count,
        "metric": metric, "objective": train.objective, "baselines": baselines, "random_seeds": random_seeds,
        "seed": seed, "dtype": str(hybrid.model.dtype),
        "others": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in beside],
        "texts": {name: examples.identity() for name, examples in (files | {"all": train}).items()},
    }  # fmt: skip
    store = Store(partial, pair.fingerprint, facts) if partial is not None and pair.fingerprint else None
    course = _Course(hybrid, files, store, batch_size)
    work = len(sparsities) * (steps + 1 + (len(BASELINES) - 1 + random_seeds) * baselines) + 3 + len(others)
    with hybrid, tqdm(total=work, desc="grafting", unit="", disable=not progress, dynamic_ncols=True) as bar:

        def tick(words: str) -> None:
            bar.set_postfix_str(words, refresh=False)
            bar.update()

        course.tick = tick
        ends = {"base": course.row("base", lambda: 0.0), "tuned": course.row("tuned", lambda: 1.0)}
        ends["blocks"] = course.row("blocks", lambda: dict.fromkeys(names, 1.0))
        rows: dict[tuple[str, float], Row] = {}
        found: dict[float, dict[str, torch.Tensor]] = {}
        histories: dict[float, Any] = {}
        for number, (value, entries) in enumerate(counts.items()):
            begun = store and store.folder / f"search-{number}.pt"
            result = search(
                hybrid, largest(magnitudes(hybrid, names), entries), train, selection, metric=metric, step=step,
                rate=rate, steps=steps, examples=count, batch_size=batch_size, seed=seed, checkpoint=begun, tick=tick,
            )  # fmt: skip
            found[value], histories[value] = result.mask, result
            if left:
                left[value].parent.mkdir(parents=True, exist_ok=True)
                about = {"base": pair.base_checkpoint.source, "tuned": pair.tuned_checkpoint.source, "sparsity": value}
                hybrid.graft(result.mask, **about).save(left[value])
            rows["graft", value] = course.row(f"graft {value}", lambda mask=result.mask: mask, quiet=True)
        sensitivity = _sensitivity(hybrid, names, train, count, seed, batch_size)
        if baselines:
            rows |= _beside(course, names, train, found, count, random_seeds, seed)
        where = {value: _where(hybrid, mask) for value, mask in found.items()}
        last = list(found)[-1]
        overlap = _overlap(found[last], others, total) if others else {}
        if others:
            rows |= _joined(course, found[last], others, last)
    if left:
        drop_earlier(folder, [*left.values(), *map(Path, beside)])
    data = _dataset(
        hybrid, names, files, ends, rows, histories, update, sensitivity, where, overlap, tuple(found), random_seeds
    )
    data.attrs |= {
        "metric": metric, "objective": train.objective, "entries": total, "update_entries": update["changed"],
        "parameters": sum(p.numel() for p in hybrid.parameters.values()), "concentration": update["concentration"],
        "sensitivity_rank_correlation": sensitivity["rank_correlation"],
        "sensitivity_overlap": sensitivity["overlap"], "sensitivity_top": sensitivity["top"],
        "provenance": json.dumps(
            {"notes": [*hybrid.notes, *notes], "models": hybrid.model.describe(), "labels": train.labels,
             "examples": {name: len(examples) for name, examples in files.items()},
             "files_sha256": pair.fingerprint}
        ),
    }  # fmt: skip
    return Grafting(data)


def _read(
    hybrid: Hybrid, prompts: Any, evaluate: Mapping[str, Any], objective: str, template: bool, limit: int | None
) -> tuple[dict[str, Examples], list[str]]:
    """Every file's examples; and what is to be said of them."""
    given = {"train": read_prompts(prompts, limit=limit)}
    given |= {name: read_prompts(source, limit=limit) for name, source in evaluate.items()}
    labels = label_words(list(given.values())) if objective == "labels" else ()
    how = {"objective": objective, "labels": labels, "template": template}
    files = {name: read_examples(part, hybrid.tokenizers, **how) for name, part in given.items()}
    kinds = {examples.objective for examples in files.values()}
    if len(kinds) > 1:
        said = ", ".join(f"{name} {examples.objective}" for name, examples in files.items())
        raise InputError(f"some files have answers and some are texts alone ({said}); name one objective for all")
    notes = []
    seen = set(files["train"].texts)
    for name, examples in list(files.items())[1:]:
        both = sum(text in seen for text in examples.texts)
        if both:
            notes.append(
                f"{both} of the {len(examples)} prompts of {name} are among those that the mask was trained on: what "
                "is measured there is not held out"
            )
    if len(files) == 1:
        notes.append("no held-out prompts were given: all is measured on those that chose the mask")
    return files, notes


def _first(examples: Examples, index: torch.Tensor) -> Examples:
    prompts = [examples.prompts[i] for i in index.tolist()]
    targets = None if examples.targets is None else examples.targets[index]
    return replace(examples, prompts=prompts, encoded=examples.encoded.rows(index), targets=targets)


class _Course:
    """Measurements on every file, kept in the store where there is one."""

    def __init__(self, hybrid: Hybrid, files: dict[str, Examples], store: Store | None, batch_size: int | None):
        self.hybrid, self.files, self.store, self.batch_size = hybrid, files, store, batch_size
        self.tuned: dict[str, Scores] = {}
        self.tick: Callable[[str], None] = lambda words: None

    def row(self, name: str, gamma: Callable[[], Any], *, quiet: bool = False) -> Row:
        """Of a γ: MEASURED of every file, (file, example); entries by weight where γ is a mask."""
        row = self.store.get(name) if self.store else None
        if row is None:
            held = gamma()
            model = self.hybrid.hold(held)
            row = {}
            if isinstance(held, dict):
                row["entries"] = np.array([int(g.sum()) if isinstance(g, torch.Tensor) else -1 for g in held.values()])
            parts: dict[str, list[np.ndarray]] = {key: [] for key in (*MEASURED, "prediction")}
            for examples in self.files.values():
                scores = measure(model, examples, batch_size=self.batch_size)
                for key in ("accuracy", "confidence", "prediction"):
                    parts[key].append(getattr(scores, key).astype(float))
                parts["logprob"].append(-scores.loss)
            row |= {key: padded(values) for key, values in parts.items() if values}
            if self.store:
                self.store.put(name, row)
        if not quiet:
            self.tick(name)
        return row


def agreement(row: Row, tuned: Row) -> np.ndarray:
    """(file, example) 1 where the prediction is the tuned model's; of texts the share of tokens."""
    mine, theirs = row["prediction"], tuned["prediction"]
    there = theirs >= 0
    with np.errstate(invalid="ignore", divide="ignore"):
        share = ((mine == theirs) & there).sum(-1) / there.sum(-1)
    share[np.isnan(tuned["accuracy"])] = np.nan
    texts = np.isnan(tuned["confidence"]).all()
    return share if texts else np.where(np.isnan(share), np.nan, share == 1)


def _beside(
    course: _Course, names: list[str], train: Examples, found: Mapping[float, masks.Mask], count: int,
    random_seeds: int, seed: int,
) -> dict[tuple[str, float], Row]:  # fmt: skip
    """The baselines' masks, of the size of each graft."""
    hybrid = course.hybrid
    sizes = {value: masks.size(mask) for value, mask in found.items()}
    hybrid.hold(0.0)
    with gradients(hybrid, names):
        add_gradient(hybrid.model, train, draw(len(train), count, seed, 0), batch_size=course.batch_size)
        first = {value: largest(first_order(hybrid, names), entries) for value, entries in sizes.items()}
    rows = {}
    for value, entries in sizes.items():
        makers: dict[str, Callable[[], Any]] = {
            "largest |Δ|": lambda n=entries: largest(magnitudes(hybrid, names), n),
            "largest |g⊙Δ|": lambda v=value: first[v],
            "movement": lambda n=entries: largest(movements(hybrid, names), n),
        }
        for method, make in makers.items():
            rows[method, value] = course.row(f"{method} {value}", make)
        drawn = [
            course.row(f"random {value} {n}", lambda k=entries, s=n: largest(at_random(hybrid, names, seed, s), k))
            for n in range(random_seeds)
        ]
        rows["random", value] = {key: np.stack([row[key] for row in drawn]) for key in drawn[0]}
    return rows


def _update(hybrid: Hybrid, names: list[str]) -> dict[str, Any]:
    """Of Δ by weight: ‖Δ‖, Σ|Δ|, entries that differ; by head of q, k, v, o: ‖Δ‖ and entries; and how even |Δ| is."""
    norms, sums, changed, heads = [], [], 0, []
    for name, values in magnitudes(hybrid, names)():
        if not bool(torch.isfinite(values.sum())):
            raise InputError(f"{name} holds NaN or Inf in base or tuned model; a graft of it means nothing")
        norms.append(float(values.square().sum(dtype=torch.float64)) ** 0.5)
        sums.append(float(values.sum(dtype=torch.float64)))
        changed += int(values.count_nonzero())
        heads.append(_by_head(hybrid, name, values.square()))
    count = sum(hybrid.weights[name].count for name in names)
    energy = sum(n**2 for n in norms)
    return {
        "norm": np.array(norms), "sum": np.array(sums), "changed": changed, "total": energy,
        "concentration": sum(sums) ** 2 / (count * energy) if energy else np.nan,
        "heads": [np.sqrt(h) for h in heads],
    }  # fmt: skip


def _by_head(hybrid: Hybrid, name: str, values: torch.Tensor) -> np.ndarray:
    """Sums over what belongs to each head: rows of q, k, v; columns of o. Empty for other weights."""
    weight = hybrid.weights[name]
    if weight.component not in ("q", "k", "v", "o") or values.ndim != 2:
        return np.zeros(0)
    width = hybrid.model.anatomy.blocks[weight.layer].d_head
    side = values if weight.component != "o" else values.T
    if not width or len(side) % width:
        return np.zeros(0)
    return side.sum(1).double().reshape(-1, width).sum(1).cpu().numpy()


def _where(hybrid: Hybrid, mask: masks.Mask) -> list[np.ndarray]:
    return [_by_head(hybrid, name, part.float()) for name, part in mask.items()]


def _sensitivity(
    hybrid: Hybrid, names: list[str], train: Examples, count: int, seed: int, batch_size: int | None
) -> dict[str, Any]:
    """Σ_batches (batch gradient)² at the base, by weight; and of a sample of entries how it goes with |Δ|.

    SPT (He et al. 2023, arXiv 2303.08566, §3.1): are the entries that the task is sensitive to those that moved?
    """
    from finetune_lens.stats import rank_correlation

    total = sum(hybrid.weights[name].count for name in names)
    places = {}
    for name in names:
        n = hybrid.weights[name].count
        k = n if total <= SAMPLE else max(1, round(SAMPLE * n / total))
        drawn = generator(repr((seed, "sample", name)))
        places[name] = torch.arange(n) if k == n else torch.randint(n, (k,), generator=drawn)
    squares = {name: torch.zeros(len(at)) for name, at in places.items()}
    sums = dict.fromkeys(names, 0.0)
    hybrid.hold(0.0)
    for index in draw(len(train), count, seed, 0).chunk(SENSITIVITY):
        with gradients(hybrid, names):
            add_gradient(hybrid.model, train, index, batch_size=batch_size)
            for name in names:
                gradient = hybrid.gradient(name)
                if gradient is not None:
                    sums[name] += float(gradient.square().sum(dtype=torch.float64))
                    squares[name] += gradient.reshape(-1)[places[name].to(gradient.device)].float().square().cpu()
    moved = torch.cat([v.reshape(-1)[places[name].to(v.device)].cpu() for name, v in magnitudes(hybrid, names)()])
    sensitive = torch.cat([squares[name] for name in names])
    k = max(1, len(moved) // 100)
    one, other = (set(x.topk(k).indices.tolist()) for x in (moved, sensitive))
    return {
        "sum": np.array([sums[name] for name in names]), "top": k / len(moved),
        "rank_correlation": rank_correlation(moved.numpy(), sensitive.numpy()),
        "overlap": len(one & other) / len(one | other),
    }  # fmt: skip


def _overlap(mask: masks.Mask, others: Mapping[str, masks.Graft], total: int) -> dict[str, Any]:
    """Shared entries of this graft and the others, and what chance gives for masks of these sizes."""
    every = {"this": mask, **{name: graft.mask() for name, graft in others.items()}}
    shared = np.array([[masks.shared(a, b) for b in every.values()] for a in every.values()])
    return {"names": list(every), "shared": shared, "size": np.array([masks.size(m) for m in every.values()])}


def _joined(
    course: _Course, mask: masks.Mask, others: Mapping[str, masks.Graft], value: float
) -> dict[tuple[str, float], Row]:
    """This graft together with the others: where entries are shared, the others' values stay (continual grafting)."""
    hybrid = course.hybrid
    mine = hybrid.graft(mask)
    rows = {}
    for name, graft in others.items():
        both = masks.merged([graft, mine])
        rows[f"with {name}", value] = course.row(f"with {name}", lambda g=both: g) | {"entries": np.array([both.size])}
    return rows


def _dataset(
    hybrid: Hybrid, names: list[str], files: Mapping[str, Examples], ends: Mapping[str, Row],
    rows: Mapping[tuple[str, float], Row], histories: Mapping[float, Any], update: dict[str, Any],
    sensitivity: dict[str, Any], where: Mapping[float, list[np.ndarray]], overlap: dict[str, Any],
    levels: tuple[float, ...], random_seeds: int,
) -> "xr.Dataset":  # fmt: skip
    import xarray as xr

    methods = list(dict.fromkeys(method for method, _ in rows))
    example = max(map(len, files.values()))
    shape = (len(files), len(methods), len(levels), example)
    values = {key: np.full(shape, np.nan, np.float32) for key in MEASURED}  # what a forward pass gives
    entries = np.full((len(methods), len(levels)), np.nan)
    by_weight = np.full((len(methods), len(levels), len(names)), np.nan)
    for (method, level), row in rows.items():
        at = methods.index(method), levels.index(level)
        for key in MEASURED:
            found = row[key] if key != "agreement" else None
            if key == "agreement":
                found = (
                    np.mean([agreement({**row, "prediction": p}, ends["tuned"]) for p in row["prediction"]], 0)
                    if method == "random"
                    else agreement(row, ends["tuned"])
                )
            elif method == "random":  # the confidence of several models is that of none
                found = found.mean(0) if key != "confidence" else np.full_like(found[0], np.nan)
            values[key][:, at[0], at[1], : found.shape[1]] = found
        counted = row["entries"] if method != "random" else row["entries"].mean(0)
        entries[at] = counted.sum()
        if len(counted) == len(names):
            by_weight[at] = counted
    variables: dict[str, Any] = {key: (("file", "mask", "level", "example"), v) for key, v in values.items()}
    for end, row in ends.items():
        for key in ("accuracy", "logprob", "confidence"):
            variables[f"{end}_{key}"] = (("file", "example"), row[key].astype(np.float32))
    variables["blocks_agreement"] = (("file", "example"), agreement(ends["blocks"], ends["tuned"]).astype(np.float32))
    variables["entries"] = (("mask", "level"), entries)
    variables["entries_by_weight"] = (("mask", "level", "matrix"), by_weight)
    variables["delta_norm"] = ("matrix", update["norm"])
    variables["delta_sum"] = ("matrix", update["sum"])
    variables["sensitivity"] = ("matrix", sensitivity["sum"])
    variables["count"] = ("matrix", np.array([hybrid.weights[n].count for n in names]))
    heads = max((len(h) for h in update["heads"]), default=0)
    if heads:
        variables["head_delta_norm"] = (("matrix", "head"), padded([_wide(h, heads) for h in update["heads"]]))
        stacked = np.stack([padded([_wide(h, heads) for h in where[level]]) for level in levels])
        variables["head_entries"] = (("level", "matrix", "head"), stacked)
    for key in ("train_loss", "metric", "loss", "entries"):
        variables[f"search_{key}"] = (("level", "step"), padded([histories[level].history[key] for level in levels]))
    variables["search_best"] = ("level", np.array([histories[level].best for level in levels]))
    variables["search_rate"] = ("level", np.array([histories[level].rate for level in levels]))
    coords = {
        "file": np.array(list(files), dtype=object), "mask": np.array(methods, dtype=object),
        "level": np.array(levels), "matrix": np.array(names, dtype=object),
        "layer": ("matrix", np.array([hybrid.weights[n].layer for n in names])),
        "component": ("matrix", np.array([hybrid.weights[n].component for n in names], dtype=object)),
    }  # fmt: skip
    if overlap:
        variables["shared"] = (("graft", "other"), overlap["shared"])
        variables["size"] = ("graft", overlap["size"])
        coords |= {d: np.array(overlap["names"], dtype=object) for d in ("graft", "other")}
    ids = np.full((len(files), example), "", dtype=object)
    for n, examples in enumerate(files.values()):
        ids[n, : len(examples)] = [p.id for p in examples.prompts]
    variables["id"] = (("file", "example"), ids)
    return xr.Dataset(variables, coords=coords, attrs={"random_seeds": random_seeds})


def _wide(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values.astype(float), (0, width - len(values)), constant_values=np.nan)
