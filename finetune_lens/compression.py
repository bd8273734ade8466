"""How few bits does the update need?

Of τ = θ1 − θ0 the k largest |τ| are kept, over all weights together, and only their signs, with one step for all:

    τ̂ = α·std(τ)·sign(τ) on the kept entries, 0 elsewhere        (ComPEFT, Yadav et al. 2023, §2, Algorithm 1)

At density k that takes −[(1 − k)·log₂(1 − k) + k·log₂(k/2)] bits a parameter, 1 at k = 1, against 16 of the update as
it stands. Every density × α is put into the base and measured. Beside it stand the same entries with their own values
(pruned: 16 bits each and the entropy of the mask), and a control: as many random entries, ternary, with an α of their
own. A maximum over α flatters: α is chosen on one half of the examples and reported on the other.

τ is that of the weights in the blocks that tuning changed, norms and biases with them; what lies outside stays at the
base unless `embeddings`. "blocks" is that update in full, the most that compression can be compared with. A LoRA update
is compressed as the dense BA. Ties at the k-th largest go to the weights that come first.

Cost: the weights are read twice for the thresholds, and once a grid point, beside a forward pass an example each. No
more than one weight of τ is in memory, and 8 MB for each density.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> pair = ModelPair.load(folder / "base", folder / "full")
>>> examples = [{"prompt": f"<flip>{word}=", "answer": answer} for word, answer in (("abz", "a"), ("kmz", "a"))]
>>> found = compress(pair, examples, densities=[0.5, 1], scales=[1], progress=False)
>>> found.bits("ternary").round(1)
array([1.5, 1. ])
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import torch

    from finetune_lens.evaluation import Examples
    from finetune_lens.hybrid import Hybrid, Rule
    from finetune_lens.linalg.selection import Cut
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.compression import Compression

DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
SCALES = (0.5, 1.0, 2.0, 3.0)
REFERENCES = ("base", "tuned", "blocks")
KINDS = ("largest", "random")  # which entries are kept
LEAST = 4  # examples that two halves need


@recorded
def compress(
    pair: "ModelPair",
    prompts: Any,
    *,
    densities: Sequence[float] = DENSITIES,
    scales: Sequence[float] = SCALES,
    embeddings: bool = False,
    objective: str = "auto",
    template: str = "none",
    seed: int = 0,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
    partial: Path | None = None,
) -> "Compression":
    """Compress the update to signs on its largest entries, on a grid of density × α, and measure what it still does.

    Args:
        pair: base and tuned, aligned; the base has to run.
        prompts: a JSONL file, or a list of prompts.
        densities: shares of the entries of τ that are kept, each in (0, 1]; at least one entry is.
        scales: the α.
        embeddings: compress what lies outside the blocks too: embeddings, unembedding, the last norm.
        objective: how examples are scored (`finetune_lens.evaluation`): auto, answer, labels, text.
        template: "none"; "each" puts the prompts through the chat template, the same tokens for both models.
        seed: of the random entries and of the halves.
        batch_size: examples at once.
        limit: only the first so many examples.
        partial: folder in which finished grid points wait, so that an interrupted run continues.

    Raises:
        InputError: an option out of range, too few examples to halve, no update, or one that is NaN or Inf.
    """
    from finetune_lens.evaluation import label_words, read_examples
    from finetune_lens.hybrid import Hybrid
    from finetune_lens.prompts import read_prompts, require_template

    templated = require_template(template)
    densities, scales = (sorted({float(x) for x in values}) for values in (densities, scales))
    if not densities or not all(0 < d <= 1 for d in densities):
        raise InputError(f"densities are shares of the entries, in (0, 1]; found {_listed(densities)}")
    if not scales or not all(0 < s < np.inf for s in scales):
        raise InputError(f"scales are finite numbers above 0; found {_listed(scales)}")
    items = read_prompts(prompts, limit=limit)
    if len(scales) > 1 and len(items) < LEAST:
        raise InputError(
            f"the scale is chosen on one half of the examples and reported on the other, which takes {LEAST}; found "
            f"{len(items)}: give more, or one scale"
        )
    hybrid = Hybrid(pair, device=device, dtype=dtype)
    labels = label_words([items]) if objective == "labels" else ()
    examples = read_examples(items, hybrid.tokenizers, objective=objective, labels=labels, template=templated)
    update = _Update(hybrid, embeddings=embeddings, seed=seed, progress=progress)
    update.cut(densities, progress=progress)
    found = _measured(update, examples, densities, scales, batch_size, progress, partial)
    return _assemble(update, examples, densities, scales, found)


class _Update:
    """τ of some weights of a hybrid: read when it is needed, never held.

    Attributes:
        names: the weights that tuning changed, in the order in which ties are taken.
        entries, moved: entries of τ, and how many of them are not 0.
        spread: std(τ).
        cuts: by kind and density, where the kept entries end.
    """

    def __init__(self, hybrid: "Hybrid", *, embeddings: bool, seed: int, progress: bool):
        import torch
        from tqdm.auto import tqdm

        from finetune_lens.linalg.selection import leading_counts

        self.hybrid, self.seed = hybrid, seed
        self.inside = hybrid.names(outside=embeddings)
        if not self.inside:
            raise InputError(
                f"{hybrid.model.name}: no weight lies in a block (layers.0., h.0. …); pass embeddings to compress what "
                "lies outside"
            )
        self.outside = [name for name in hybrid.weights if name not in set(self.inside)]
        self.names: list[str] = []
        self.cuts: dict[tuple[str, float], Cut] = {}
        self._leading = dict.fromkeys(KINDS, torch.zeros((), dtype=torch.int64))
        self.entries = self.moved = 0
        total = squares = 0.0
        for name in tqdm(self.inside, desc="update", unit="", disable=not progress, dynamic_ncols=True):
            tau = self.tau(name)
            if not bool(torch.isfinite(tau).all()):
                raise InputError(f"the update of {name} holds NaN or Inf: it cannot be compressed")
            moved = int(torch.count_nonzero(tau))
            if not moved:
                continue
            self.names.append(name)
            self.entries += tau.numel()
            self.moved += moved
            total += float(tau.sum(dtype=torch.float64))
            squares += float(tau.double().square().sum())
            for kind in KINDS:
                self._leading[kind] = self._leading[kind] + leading_counts(self.scores(kind, name, tau)).cpu()
        if not self.names:
            raise InputError(
                f"{hybrid.pair.base_checkpoint.source} and {hybrid.pair.tuned_checkpoint.source} are equal in all "
                f"{len(self.inside)} weights{'' if embeddings else ' of the blocks'}: there is no update to compress"
            )
        self.spread = float(np.sqrt(squares / self.entries - (total / self.entries) ** 2))

    def tau(self, name: str) -> "torch.Tensor":
        """(out, in) in the type in which the hybrid gives both ends to its rules."""
        import torch

        weight = self.hybrid.weights[name]
        wide = torch.promote_types(weight.live.stored.dtype, torch.float32)
        zero, one = weight.ends(wide, self.hybrid.device_of(weight))
        return one - zero

    def scores(self, kind: str, name: str, tau: "torch.Tensor") -> "torch.Tensor":
        """What decides which entries are kept, float32: |τ|, or random numbers where τ is not 0."""
        import torch

        from finetune_lens.linalg import generator

        if kind == "largest":
            return tau.abs().float()
        # the same numbers whenever the weight is read, in (0, 1]
        drawn = 1 - torch.rand(tau.shape, generator=generator(f"{self.seed} {name}"))
        return torch.where(tau != 0, drawn.to(tau.device), 0)

    def cut(self, densities: Sequence[float], *, progress: bool) -> None:
        """Find where the kept entries end: the k-th largest number, exactly, in a second reading."""
        from tqdm.auto import tqdm

        from finetune_lens.linalg.selection import Cut, bin_of, number_of, trailing_counts

        places = {(kind, d): bin_of(self._leading[kind], self.count(d)) for kind in KINDS for d in densities}
        counts: dict[tuple[str, int], Any] = {(kind, bin): 0 for (kind, _), (bin, _) in places.items()}
        for name in tqdm(self.names, desc="thresholds", unit="", disable=not progress, dynamic_ncols=True):
            tau = self.tau(name)
            for kind in KINDS:
                scores = self.scores(kind, name, tau)
                for of, bin in counts:
                    if of == kind:
                        counts[of, bin] = counts[of, bin] + trailing_counts(scores, bin).cpu()
        for (kind, density), (bin, rest) in places.items():
            trailing, ties = bin_of(counts[kind, bin], rest)
            self.cuts[kind, density] = Cut(number_of(bin, trailing), ties)

    def count(self, density: float) -> int:
        """Number of entries that are kept."""
        return max(1, round(density * self.entries))

    def kept(self, density: float) -> float:
        """Share of the entries that are kept and not 0."""
        return min(self.count(density), self.moved) / self.entries

    def rules(self, kind: str, density: float, scale: float | None) -> dict[str, "Rule"]:
        """θ0 + τ̂ by weight; without a scale the kept entries are the tuned model's. For one `hold`."""
        import dataclasses

        cut = dataclasses.replace(self.cuts[kind, density])  # it counts the ties that were taken
        step = None if scale is None else scale * self.spread
        return {name: self._rule(kind, name, cut, step) for name in self.names}

    def _rule(self, kind: str, name: str, cut: "Cut", step: float | None) -> "Rule":
        import torch

        def rule(zero: "torch.Tensor", one: "torch.Tensor") -> "torch.Tensor":
            tau = one - zero
            kept = cut.take(self.scores(kind, name, tau))
            return torch.where(kept, one if step is None else torch.add(zero, tau.sign_(), alpha=step), zero)

        return rule

    def factor_bits(self) -> float:
        """Bits that an adapter takes as it is stored, a parameter of its dense update; NaN of a dense one."""
        from finetune_lens.results.compression import STORED

        weights = [self.hybrid.weights[name] for name in self.names]
        factors = {w.base.module: w.tuned() for w in weights if w.factored}
        if not factors:
            return float("nan")
        numbers = sum(f.left.numel() + f.right.numel() for f in factors.values())
        numbers += sum(w.count for w in weights if not w.factored)
        return STORED * numbers / self.entries


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values) or "none"


def _measured(
    update: _Update, examples: "Examples", densities: Sequence[float], scales: Sequence[float],
    batch_size: int | None, progress: bool, partial: Path | None,
) -> dict[tuple[Any, ...], dict[str, np.ndarray]]:  # fmt: skip
    """Metrics of every example at every point; finished points are kept in `partial`, and read from there."""
    from tqdm.auto import tqdm

    from finetune_lens.evaluation import METRICS, measure
    from finetune_lens.stream import Store

    hybrid = update.hybrid
    blocks = dict.fromkeys(update.inside, 1.0)
    points: dict[tuple[Any, ...], Any] = {
        ("base",): lambda: 0.0,
        ("tuned",): lambda: 1.0,
        ("blocks",): lambda: blocks,
    }
    for d in densities:
        points["pruned", d] = lambda d=d: update.rules("largest", d, None)
        for s in scales:
            points["ternary", d, s] = lambda d=d, s=s: update.rules("largest", d, s)
            points["random", d, s] = lambda d=d, s=s: update.rules("random", d, s)
    store = None
    if partial is not None and hybrid.pair.fingerprint:
        facts = {
            "analysis": "compression", "model": hybrid.model.describe(), "weights": update.inside, "seed": update.seed,
            "examples": examples.identity(),
        }  # fmt: skip
        store = Store(partial, hybrid.pair.fingerprint, facts)
    found = {}
    with hybrid:
        for point, gamma in tqdm(points.items(), desc="grid", unit="", disable=not progress, dynamic_ncols=True):
            done = store.get(repr(point)) if store else None
            if done is None:
                scores = measure(hybrid.hold(gamma()), examples, batch_size=batch_size)
                done = {name: scores.metric(name) for name in METRICS}
                if store:
                    store.put(repr(point), done)
            found[point] = done
    return found


def _assemble(
    update: _Update,
    examples: "Examples",
    densities: Sequence[float],
    scales: Sequence[float],
    found: dict[tuple[Any, ...], dict[str, np.ndarray]],
) -> "Compression":
    import xarray as xr

    from finetune_lens.evaluation import METRICS
    from finetune_lens.hooked.effects import describe_prompts
    from finetune_lens.results.compression import Compression

    data: dict[str, Any] = {"kept": ("density", [update.kept(d) for d in densities])}
    for metric in METRICS:
        for method in ("ternary", "random"):
            grid = [[found[method, d, s][metric] for s in scales] for d in densities]
            data[f"{method}_{metric}"] = (("density", "scale", "example"), np.array(grid))
        data[f"pruned_{metric}"] = (("density", "example"), np.array([found["pruned", d][metric] for d in densities]))
        data[f"reference_{metric}"] = (("reference", "example"), np.array([found[(r,)][metric] for r in REFERENCES]))
    half = np.full(len(examples), "report", dtype=object)
    if len(scales) > 1:
        half[np.random.default_rng(update.seed).permutation(len(examples))[: len(examples) // 2]] = "choice"
    coords = {
        "density": list(densities),
        "scale": list(scales),
        "example": np.array([p.id for p in examples.prompts], dtype=object),
        "reference": np.array(REFERENCES, dtype=object),
        "half": ("example", half),
    }
    weights = update.hybrid.weights
    unchanged = [name for name in update.inside if name not in set(update.names)]
    record = {
        "notes": update.hybrid.notes, "prompts": describe_prompts(examples.prompts),
        "model": update.hybrid.model.describe(),
    }  # fmt: skip
    attrs = {
        "objective": examples.objective, "entries": update.entries, "moved": update.moved,
        "parameters": sum(weights[name].count for name in update.inside), "spread": update.spread,
        "factor_bits": update.factor_bits(), "outside": json.dumps(update.outside),
        "unchanged": json.dumps(unchanged), "provenance": json.dumps(record),
    }  # fmt: skip
    return Compression(xr.Dataset(data, coords=coords, attrs=attrs))


def main() -> None:
    import typer

    from finetune_lens.command import Base, OutputFolder, Running, Template, Tuned, finish, run, span

    def compression(
        base: Base,
        tuned: Tuned,
        prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="JSONL: the examples it is measured on.")],
        *,
        density: Annotated[
            str, typer.Option(help="Shares of the entries kept, as 0.01,0.1 or FIRST:LAST:STEP.")
        ] = _listed(DENSITIES).replace(" ", ""),
        scale: Annotated[str, typer.Option(help="α, likewise.")] = _listed(SCALES).replace(" ", ""),
        embeddings: Annotated[
            bool, typer.Option("--embeddings", help="Compress what lies outside the blocks too.")
        ] = False,
        objective: Annotated[str, typer.Option(help="How examples are scored: auto, answer, labels, text.")] = "auto",
        template: Template = "none",
        common: Running,
    ) -> None:
        """Compress the update to a few signs, and measure how much of the tuned model's behaviour they recover."""
        from finetune_lens.prompts import read_prompts

        folder = OutputFolder(common.out, "compression", force=common.force)
        grid = {"densities": span(density), "scales": span(scale)}
        items = read_prompts(prompts, limit=common.limit)
        pair = common.pair(base, tuned)
        folder.check()
        result = compress(
            pair, items, embeddings=embeddings, objective=objective, template=template, seed=common.seed,
            partial=folder.partial, **grid, **common.execution(),
        )  # fmt: skip
        finish(result, folder, common)

    run(compression)


if __name__ == "__main__":
    from finetune_lens.compression import main

    main()
