"""How do the updates of several tuned models of one base relate?

With Δ_i = θ_i − θ0 over the weights of the blocks (Ilharco et al. 2023, "Editing Models with Task Arithmetic", §5):

    cosine         Σ Δ_i·Δ_j / (‖Δ_i‖·‖Δ_j‖)
    sign conflict  #{Δ_i·Δ_j < 0} / #{Δ_i·Δ_j ≠ 0}, over single entries (TIES, Yadav et al. 2023, §3)
    overlap        of A_i, the K = τ·N entries of largest |Δ_i| in the whole model: Jaccard |A∩B|/|A∪B|, and |A∩B|/|B|
                   (LT-SFT, Ansell et al. 2022; Panigrahi et al. 2023, §5)

in total and by layer and component, each beside what it is when the entries of one side are permuted within each
weight; τ/(2 − τ) is the Jaccard index if the K entries lay anywhere in the model. That chance knows nothing of rows and
columns: two models that change the same neurons agree by more than it without sharing anything else. An entry that does
not change is in no A_i, so a sparse or factored update may have fewer than K. Ties go to the entry that comes first.

Cost: the weights are read three times; 2·m² flops an entry for m models, three times over. Memory: some float32 copies
of the largest weight for each model, and 8 MB for each model and τ. An interrupted run keeps the first reading.

>>> import torch
>>> from finetune_lens import ModelPair
>>> name = "layers.0.mlp.up_proj.weight"
>>> base = {name: torch.zeros(4, 4)}
>>> one, other = {name: torch.eye(4)}, {name: torch.ones(4, 4)}
>>> pairs = [ModelPair.load(base, one), ModelPair.load(base, other)]
>>> found = compare_task_vectors(pairs, taus=[0.25], progress=False)
>>> float(found.total.cosine.sel(model="model 1", other="model 2"))
0.5
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    import torch

    from finetune_lens.linalg.selection import Cut
    from finetune_lens.pair import ModelPair, Variants
    from finetune_lens.results.task_vectors import TaskVectors
    from finetune_lens.stream import Row, Rows

TAUS = (0.001, 0.01, 0.1)
PIECE = 1 << 20  # entries counted at once: sums of as many ±1 are exact in float32
ANY_MODEL = {"model", "pytorch_model", "adapter_model", "consolidated"}  # file names that say nothing of the model


@recorded
def compare_task_vectors(
    pairs: "Sequence[ModelPair]",
    *,
    names: Sequence[str] | None = None,
    taus: Sequence[float] = TAUS,
    embeddings: bool = False,
    null_draws: int = 1000,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    partial: Path | None = None,
) -> "TaskVectors":
    """Compare the updates of two or more models tuned from one base: cosine, sign conflict, overlap of the largest.

    Args:
        pairs: `[ModelPair.load(base, tuned) for tuned in …]`; the order is kept.
        names: of the models; by default those of their folders or files, with as many parents as tell them apart.
        taus: shares of all entries, each in (0, 1]; at least one entry is taken.
        embeddings: include all that lies outside the blocks too: embeddings, unembedding, the last norm.
        null_draws: permutations behind the chance of the overlap.
        limit: only the first so many weights.
        seed: of these draws.
        device: where the sums are taken.
        partial: folder in which finished weights wait, so that an interrupted run continues.

    Raises:
        InputError: fewer than two models, another base, an option out of range, or nothing finite to compare.
    """
    from finetune_lens import device as devices
    from finetune_lens.stream import each_matrix

    taus = sorted({float(tau) for tau in taus})
    if not taus or not all(0 < tau <= 1 for tau in taus):
        raise InputError(f"taus are shares of all entries, in (0, 1]; found {', '.join(map(str, taus)) or 'none'}")
    if null_draws < 1 or (limit is not None and limit < 1):
        raise InputError(f"null_draws and limit are at least 1; found {null_draws} and {limit}")
    models = _Models.of(pairs)
    names = _names(pairs) if names is None else list(names)
    if len(names) != len(pairs) or len(set(names)) < len(names):
        raise InputError(f"expected a name of its own for each of {len(pairs)} models; found {', '.join(names)}")
    where = devices.choose(device)
    weights = models.names(embeddings=embeddings)
    if not weights:
        raise InputError(
            f"{pairs[0].base_checkpoint.source}: no weight lies in a block (layers.0., h.0. …) of every model; "
            "pass embeddings to compare what lies outside too"
        )
    rows = each_matrix(
        models, weights[:limit], lambda weight: _measure(weight, where),
        progress=progress, partial=partial, arguments={"analysis": "task_vectors", "device": where},
    )  # fmt: skip
    if not rows.rows:
        raise InputError(f"no weight is finite in the base and in every model: {rows.excluded}")
    cuts = _cuts(models, rows, taus, where, progress)
    taken, common = _overlaps(models, rows, cuts, where, progress)
    record = json.loads(rows.provenance(where)) | {"inputs": models.describe(names), "left_out": models.left_out}
    return _assemble(rows, names, taus, cuts, taken, common, record, {"null_draws": null_draws, "seed": seed})


@dataclass(frozen=True)
class _Models:
    """Pairs of one base, in the order given, as one stream of weights."""

    pairs: "Sequence[ModelPair]"
    shared: list[str]  # weights that every pair has, in one shape
    left_out: list[str]

    @classmethod
    def of(cls, pairs: "Sequence[ModelPair]") -> "_Models":
        if len(pairs) < 2:
            raise InputError(f"expected two tuned models or more of one base; found {len(pairs)}")
        shapes = [{name: pair.shape(name) for name in pair.names(vectors=True)} for pair in pairs]
        shared = [name for name in shapes[0] if all(s.get(name) == shapes[0][name] for s in shapes)]
        every = dict.fromkeys(name for s in shapes for name in s)
        return cls(pairs, shared, [name for name in every if name not in set(shared)])

    def names(self, *, embeddings: bool) -> list[str]:
        from finetune_lens.checkpoints.layout import LAYER

        return [name for name in self.shared if embeddings or LAYER.search(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.pairs[0].shape(name)

    def matrices(self, names: list[str]) -> "Iterator[Variants]":
        """The weights, one in memory at a time, each with what it is in every model (mapped where files allow)."""
        from finetune_lens.pair import Variants

        same = {pair.base_checkpoint.fingerprint for pair in self.pairs}
        known = len(same) == 1 and "" not in same
        for each in zip(*(pair.matrices(names) for pair in self.pairs), strict=True):
            for pair, matrix in zip(self.pairs, each, strict=True):
                if not known and not _same(each[0].base, matrix.base):
                    raise InputError(
                        f"{pair.tuned_checkpoint.source} is paired with another base than "
                        f"{self.pairs[0].tuned_checkpoint.source}: {matrix.name} differs; give one base for all models"
                    )
            yield Variants(tuple(replace(matrix, base=each[0].base) for matrix in each))

    def describe(self, names: list[str]) -> dict[str, Any]:
        """Where they came from and how they were aligned, for the record."""
        described = [pair.describe() for pair in self.pairs]
        tuned = [
            {"name": name, **d["tuned"], "alignment": d["alignment"]} for name, d in zip(names, described, strict=True)
        ]
        return {"base": described[0]["base"], "tuned": tuned, "options": described[0]["options"]}

    @property
    def fingerprint(self) -> str:
        """Changes when a file changes, or how it is read; "" when one of them has no file."""
        prints = [pair.fingerprint for pair in self.pairs]
        return hashlib.sha256(repr(prints).encode()).hexdigest() if all(prints) else ""


def _same(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    import torch

    return one is other or (one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num()))


def _names(pairs: "Sequence[ModelPair]") -> list[str]:
    """The last parts of each path, as many as tell the models apart; by number for models in memory.

    Raises:
        InputError: one model given twice.
    """
    paths = []
    for number, pair in enumerate(pairs, 1):
        checkpoint = pair.tuned_checkpoint
        path = PurePath(checkpoint.source if checkpoint.fingerprint else f"model {number}")
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
            stem = path.name.split(".")[0]
            path = path.parent if stem in ANY_MODEL and path.parent.name else path.with_suffix("")
        paths.append(path)
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    twice = next(name for name in names if names.count(name) > 1)
    raise InputError(f"{twice} is given twice; leave one out, or give each model a name of its own (--names)")


def _updates(weight: "Variants", device: "torch.device") -> "torch.Tensor":
    """Δ of every model, (model, entry) in float32; subtracted in float64 where a side is stored so."""
    import torch

    found = []
    for matrix in weight.each:
        sides = [matrix.base, *([matrix.tuned] if matrix.update is None else [matrix.update.left, matrix.update.right])]
        wide = torch.float64 if any(side.dtype == torch.float64 for side in sides) else torch.float32
        found.append(matrix.delta(wide, device).flatten().float())
    return torch.stack(found)


def _measure(weight: "Variants", device: "torch.device") -> "Row":
    """Sums over the entries of one weight, and how many |Δ| there are of each size, coarsely."""
    import torch

    from finetune_lens.linalg.selection import leading_counts

    deltas = _updates(weight, device)
    models, entries = deltas.shape
    dot, signed, both = torch.zeros(3, models, models, dtype=torch.float64, device=device)
    total, positive, negative = torch.zeros(3, models, dtype=torch.float64, device=device)
    for piece in deltas.split(PIECE, 1):
        wide, sign = piece.double(), piece.sign()
        dot += wide @ wide.T
        total += wide.sum(1)
        signed += sign @ sign.T
        both += sign.abs() @ sign.abs().T
        positive += (sign > 0).sum(1)
        negative += (sign < 0).sum(1)
    counts = torch.stack([leading_counts(delta.abs_()) for delta in deltas])
    sums = {"dot": dot, "signed": signed, "both": both, "total": total, "positive": positive, "negative": negative}
    return {name: value.cpu().numpy() for name, value in sums.items()} | {
        "entries": entries,
        "leading": counts.cpu().numpy().astype(np.uint32),
    }


def _magnitudes(
    models: _Models, rows: "Rows", device: "torch.device", progress: bool, what: str
) -> "Iterator[torch.Tensor]":
    """|Δ| (model, entry) of each weight that was measured, in their order."""
    from tqdm import tqdm

    from finetune_lens import device as devices

    names = [str(row["name"]) for row in rows.rows]
    stream = models.matrices(names)
    for weight in tqdm(stream, desc=what, total=len(names), unit="", disable=not progress, dynamic_ncols=True):
        with devices.threads_for(weight.order):
            yield _updates(weight, device).abs_()


def _cuts(
    models: _Models, rows: "Rows", taus: list[float], device: "torch.device", progress: bool
) -> "list[list[Cut]]":
    """Where the K = τ·N largest |Δ| of each model end, by model and τ: exactly, and 0 is not among them."""
    import torch

    from finetune_lens.linalg.selection import Cut, bin_of, number_of, trailing_counts

    counts = torch.from_numpy(sum(row["leading"].astype(np.int64) for row in rows.rows))
    entries = sum(int(row["entries"]) for row in rows.rows)
    changed = sum(row["positive"] + row["negative"] for row in rows.rows)
    wanted = [[min(max(1, round(tau * entries)), int(n)) for tau in taus] for n in changed]
    bins = [[bin_of(counts[m], k) if k else None for k in ks] for m, ks in enumerate(wanted)]
    fine = {(m, found[0]): 0 for m, per_tau in enumerate(bins) for found in per_tau if found}
    for magnitudes in _magnitudes(models, rows, device, progress, "thresholds"):
        for m, leading in fine:
            fine[m, leading] += trailing_counts(magnitudes[m], leading)
    cuts = [[Cut(float("inf"), 0) for _ in taus] for _ in wanted]
    for m, per_tau in enumerate(bins):
        for t, found in enumerate(per_tau):
            if found:
                leading, rest = found
                trailing, ties = bin_of(fine[m, leading], rest)
                cuts[m][t] = Cut(number_of(leading, trailing), ties)
    return cuts


def _overlaps(
    models: _Models, rows: "Rows", cuts: "list[list[Cut]]", device: "torch.device", progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """How many entries of each weight are among the largest of a model, and of two: taken, common (…, tau, matrix)."""
    import torch

    cuts = [[replace(cut) for cut in per_tau] for per_tau in cuts]  # they count the ties that they take
    size, taus = len(cuts), len(cuts[0])
    common = np.zeros((size, size, taus, len(rows.rows)), dtype=np.int64)
    for at, magnitudes in enumerate(_magnitudes(models, rows, device, progress, "overlap")):
        for t in range(taus):
            masks = torch.stack([cuts[m][t].take(magnitudes[m]) for m in range(size)])
            for piece in masks.split(PIECE, 1):
                piece = piece.float()
                common[:, :, t, at] += (piece @ piece.T).long().cpu().numpy()
    return np.einsum("iitm->itm", common), common


def _assemble(
    rows: "Rows",
    names: list[str],
    taus: list[float],
    cuts: "list[list[Cut]]",
    taken: np.ndarray,
    common: np.ndarray,
    record: dict[str, Any],
    attributes: dict[str, int],
) -> "TaskVectors":
    import xarray as xr

    from finetune_lens.results.task_vectors import TaskVectors

    pairwise, single = ("model", "other"), ("model",)
    variables: dict[str, Any] = rows.variables(
        entries=(), dot=pairwise, signed=pairwise, both=pairwise, total=single, positive=single, negative=single
    )
    variables |= {
        "taken": (("model", "tau", "matrix"), taken),
        "common": (("model", "other", "tau", "matrix"), common),
        "k": (("model", "tau"), taken.sum(-1)),
        "threshold": (("model", "tau"), np.array([[cut.value for cut in per_tau] for per_tau in cuts])),
    }
    labels = np.array(names, dtype=object)
    data = xr.Dataset(variables, rows.coordinates() | {"model": labels, "other": labels, "tau": taus})
    data.attrs = attributes | {"provenance": json.dumps(record)}
    return TaskVectors(data)


def main() -> None:
    import typer

    from finetune_lens.command import (
        AllowNonfinite,
        Base,
        CheckFailed,
        Common,
        Fused,
        Orientation,
        OutputFolder,
        finish,
        run,
    )

    def task_vectors(
        base: Base,
        tuned: Annotated[
            list[str], typer.Argument(metavar="TUNED...", help="Two or more tuned models, adapters included.")
        ],
        *,
        names: Annotated[
            str | None,
            typer.Option(help="Of the models, as a,b,c.  [default: of their folders or files]", show_default=False),
        ] = None,
        taus: Annotated[str, typer.Option(help="Shares of the entries that count as the largest.")] = "0.001,0.01,0.1",
        embeddings: Annotated[bool, typer.Option("--embeddings", help="Include all outside the blocks too.")] = False,
        null_draws: Annotated[int, typer.Option(help="Permutations behind the chance of the overlap.")] = 1000,
        fused: Fused = False,
        orientation: Orientation = "auto",
        allow_nonfinite: AllowNonfinite = False,
        common: Common,
    ) -> None:
        """Task vectors: cosine, sign conflict and overlap of the updates of several tuned models of one base."""
        folder = OutputFolder(common.out, "task_vectors", force=common.force)

        from finetune_lens.pair import ModelPair

        try:
            shares = [float(tau) for tau in taus.split(",")]
        except ValueError:
            raise InputError(f"expected shares such as 0.001,0.01,0.1; found {taus!r}") from None
        options = {"online": common.online, "fused": fused, "orientation": orientation}
        pairs = [ModelPair.load(base, one, **options) for one in tuned]
        for one, pair in zip(tuned, pairs, strict=True):
            common.say(f"{one}: {pair.alignment.summary()}")
        folder.check()
        result = compare_task_vectors(
            pairs, names=None if names is None else names.split(","), taus=shares, embeddings=embeddings,
            null_draws=null_draws, limit=common.limit, seed=common.seed, device=common.device,
            progress=common.progress, partial=folder.partial,
        )  # fmt: skip
        excluded = result.provenance["excluded"]
        finish(result, folder, common, excluded=excluded, left_out=result.provenance["left_out"])
        if excluded and not allow_nonfinite:
            raise CheckFailed(
                f"{len(excluded)} weights hold NaN or Inf and were left out (listed above); "
                "pass --allow-nonfinite to accept that"
            )

    run(task_vectors)


if __name__ == "__main__":
    from finetune_lens.task_vectors import main

    main()
