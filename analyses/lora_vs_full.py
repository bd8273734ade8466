"""LoRA against full fine-tuning on the zoo's base: a sweep of ranks and rates, matched on accuracy.

    python -m analyses.lora_vs_full sweep     # about an hour on one core; interrupted, the same command continues
    python -m analyses.lora_vs_full claims    # the table of claims, from the stored results, in seconds

The base of the pair `strings` learns the new task by full fine-tuning and by LoRA of ranks 1 to 64 (α = 2·rank), each
at several learning rates and seeds, and stops at the first validation accuracy that reaches a common target. Every
model is then scored on the test strings of all tasks, paired with the base, and its weights are measured: intruder
dimensions with their nulls, ‖Δ‖/‖W0‖ and effective rank over the same matrices. The claims are those of Shuttleworth
et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228).

What is compared was not chosen by what is compared. A method stands for one rate: the one that reached the target in
fewest steps, and, since that is the roughest that works, also the lowest that reached it. Runs that did not reach it
are kept, marked, and left out of comparisons. All runs share one base: intervals are over seeds of tuning, and say
nothing of other bases.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens import zoo
from finetune_lens.errors import InputError
from finetune_lens.files import whole_file
from finetune_lens.tasks.strings import BASE_TASKS, LENGTH, NEW_TASK, TASKS, draw, encode
from finetune_lens.zoo import strings_recipe as recipe

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from transformers import PreTrainedModel

NAME = "lora_vs_full"
RESULTS = Path(__file__).resolve().parent / "results"
EPSILONS = tuple(round(0.05 * i, 2) for i in range(1, 20))
KS = (1, 2, 5, 10, 20, 50)
EPSILON, K = 0.5, 10
SIDES = ("left", "right")
RESAMPLES = 10_000
FEW = 0.05  # share of the judged vectors up to which a count is "few"
NEGLIGIBLE = 0.3  # |Spearman's ρ| up to which a correlation is called none
# Of the runs of one rank and seed that reached the target, the one that is compared.
CHOICES = {"fastest": "rate with fewest steps", "lowest": "lowest rate"}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is trained: every rank at every rate with every seed; rank 0 is full fine-tuning."""

    full_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    lora_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    target: float = 0.95
    steps: int = 400
    items: int = 1000
    null_draws: int = 5

    def runs(self) -> Iterator["Tuning"]:
        """Seeds outermost: a sweep that is cut off is balanced up to its last seed."""
        for seed in self.seeds:
            for rank in (0, *self.ranks):
                for rate in self.lora_rates if rank else self.full_rates:
                    yield Tuning(rank, rate, seed)


@dataclass(frozen=True)
class Tuning:
    """One run of the sweep."""

    rank: int
    rate: float
    seed: int

    @property
    def method(self) -> recipe.Method:
        return "lora" if self.rank else "full"

    @property
    def name(self) -> str:
        return f"{self.method}{self.rank or ''}-{self.rate:g}-seed{self.seed}"


STEPS = ("sweep", "claims")
NEEDS = (  # what scale paper does
    "RoBERTa-base and Llama-2-7B, tuned by LoRA and fully on the paper's tasks, their data, and a GPU; of checkpoints "
    "that you have, `python -m finetune_lens.intruders BASE TUNED` counts intruders, and with --eval scales them"
)
# Mini trains a toy for a few steps and calls any accuracy reached: it tries the course of a sweep and finds nothing.
MINI = Sweep(
    full_rates=(1e-3,), lora_rates=(1e-2,), ranks=(1, 2), seeds=(0, 1), target=0.0, steps=2, items=10, null_draws=2,
)  # fmt: skip
SCALES = {"tiny": Sweep(), "mini": MINI}


# Training and measuring


def run_sweep(work: Path, scale: str, *, progress: bool = True) -> "xr.Dataset":
    """Train, score and measure every run of the sweep in the folder `work`, on one thread; what is there is kept.

    A run leaves `models/NAME`, and `runs/NAME.json` with all that was measured. Without the latter it is measured
    again, not trained again.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers.utils import logging

    settings = SCALES[scale]
    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1)  # so that the outcome does not depend on how many cores there are
    logging.disable_progress_bar()  # reading and writing a megabyte needs none
    try:
        (work / "runs").mkdir(parents=True, exist_ok=True)
        base = zoo.path("strings") / "base"
        if scale == "mini":
            base = work / "base"
            recipe.pretrain(base, settings=recipe.MINI, checkpoint=work / "base.pt", progress=False)
        digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
        scored = Scored(base, settings.items)
        records = []
        with tqdm(list(settings.runs()), disable=not progress, unit="run", smoothing=0.1) as runs:
            for tuning in runs:
                runs.set_postfix_str(tuning.name)
                trained = _trained(work, base, digest, tuning, settings)
                records.append(_measured(work, base, digest, tuning, settings, trained, scored))
        return assemble(records, scored.accuracy(), scale, digest)
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()


def _trained(work: Path, base: Path, digest: str, tuning: Tuning, settings: Sweep) -> dict[str, Any]:
    """The tuned model in `models/NAME`, and how training went."""
    out = work / "models" / tuning.name
    asked = {"base": digest, "target": settings.target, "steps": settings.steps} | dataclasses.asdict(tuning)
    found = _read(out / "training.json", asked)
    if found is not None:
        return found
    checkpoint = work / "models" / f"{tuning.name}.pt"
    checkpoint.parent.mkdir(exist_ok=True)
    record: dict[str, Any] = {"asked": asked}
    try:
        run = recipe.tune(
            base, out, method=tuning.method, rank=max(tuning.rank, 1), learning_rate=tuning.rate, seed=tuning.seed,
            target=settings.target, steps=settings.steps, checkpoint=checkpoint, progress=False,
        )  # fmt: skip
    except FloatingPointError as error:  # a finding about the rate, not a failure of the sweep
        out.mkdir(exist_ok=True)
        record |= {"steps": None, "validation_accuracy": 0.0, "seconds": 0.0, "diverged": str(error)}
    else:
        steps, accuracy = list(run.scores.items())[-1]
        record |= {"steps": steps, "validation_accuracy": accuracy, "seconds": round(run.seconds, 1)}
    _write(out / "training.json", record)
    checkpoint.unlink(missing_ok=True)
    return record


def _measured(
    work: Path, base: Path, digest: str, tuning: Tuning, settings: Sweep, trained: dict[str, Any], scored: "Scored"
) -> dict[str, Any]:
    """All that the results keep of one run."""
    import finetune_lens as fl
    from finetune_lens.results import provenance

    file = work / "runs" / f"{tuning.name}.json"
    asked = {"trained": trained, "items": settings.items, "null_draws": settings.null_draws}
    asked |= {"epsilons": EPSILONS, "ks": KS, "epsilon": EPSILON, "k": K}
    found = _read(file, asked)
    if found is not None:
        return found
    start = time.perf_counter()
    record = trained | {"asked": asked, "tuning": dataclasses.asdict(tuning), "method": tuning.method}
    if "diverged" not in trained:
        out = work / "models" / tuning.name
        result = fl.find_intruders(
            fl.ModelPair.load(base, out), epsilon=EPSILON, k=K, side="both", null_draws=settings.null_draws,
            device="cpu", progress=False,
        )  # fmt: skip
        record |= weights_of(result) | scored.against(out)
    record["versions"], record["commit"] = provenance._versions(), provenance._commit()
    record["measuring_seconds"] = round(time.perf_counter() - start, 1)
    _write(file, record)
    return json.loads(file.read_text())


def weights_of(result: Any) -> dict[str, Any]:
    """What is kept of an `Intruders` result; norms and ranks are over the matrices that were counted."""
    data = result.data
    drawn = {side: data.null_max_cos.sel(null="spectrum", side=side).values for side in SIDES}  # (draw, matrix, rank)
    nulls = {null: [result.null(side=side, null=null) for side in SIDES] for null in ("spectrum", "evenly")}
    return {
        "count": [result.count(side=side) for side in SIDES],
        "undetermined": [result.undetermined(side=side) for side in SIDES],
        "counts": [result.grid(EPSILONS, KS, side=side).values.tolist() for side in SIDES],
        "null_counts": [
            [[float((drawn[side][..., :k] < epsilon).sum((1, 2)).mean()) for k in KS] for epsilon in EPSILONS]
            for side in SIDES
        ],
        **{
            f"null_{part}": [[getattr(null, part) for null in each] for each in nulls.values()]
            for part in ("mean", "low", "high")
        },
        "vectors": int(result.table("all", side="left")["vectors"].item()),
        "relative_norm": float(np.sqrt((data.delta_norm**2).sum() / (data.base_norm**2).sum())),
        "effective_rank": float(data.effective_rank.median()),
        "weights_sha256": result.provenance["weights_sha256"]["tuned"],
    }


class Scored:
    """The base's answers to the test strings, item by item, computed once and when first needed."""

    def __init__(self, base: Path, items: int):
        self.base, self.items = base, items
        self._answers: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def answers(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        if not self._answers:
            self._answers = self._of(recipe.load(self.base))
        return self._answers

    def accuracy(self) -> dict[str, list[float]]:
        """The base's own accuracy and loss, a value a task."""
        means = np.array([[each.mean() for each in self.answers()[task]] for task in TASKS])
        return {"base_accuracy": means[:, 0].tolist(), "base_loss": means[:, 1].tolist()}

    def against(self, tuned: Path) -> dict[str, Any]:
        """Accuracy and loss of a tuned model by task, and what it forgot of the base tasks: mean and 95 % interval.

        Forgetting is the mean drop of accuracy over the base tasks, and the mean rise of their loss (nats a token, the
        paper's kind of measure, which does not saturate); intervals are a paired bootstrap over strings in each task.
        """
        adapter = (tuned / "adapter_config.json").exists()
        after, before = self._of(recipe.load(self.base, tuned) if adapter else recipe.load(tuned)), self.answers()
        drops = np.array([before[task][0] - after[task][0] for task in BASE_TASKS])
        rises = np.array([after[task][1] - before[task][1] for task in BASE_TASKS])
        return {
            "accuracy": [float(after[task][0].mean()) for task in TASKS],
            "loss": [float(after[task][1].mean()) for task in TASKS],
            "forgetting": [float(drops.mean()), *_items_interval(drops)],
            "loss_rise": [float(rises.mean()), *_items_interval(rises)],
        }

    def _of(self, model: "PreTrainedModel") -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Task → (1 where the answer is exact, loss in nats a token of the answer), of the strings `score` uses."""
        drawn = {task: draw([task], self.items, recipe.stream(0, task), part="test") for task in TASKS}
        return {task: answers(model, items) for task, items in drawn.items()}


def answers(model: "PreTrainedModel", items: list, *, batch_size: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Whether each item is answered exactly, and its mean loss over the letters and `<eos>` of the answer."""
    import torch

    exact, losses = [], []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            batch = encode(items[start : start + batch_size])
            logits = model(input_ids=batch["input_ids"]).logits[:, LENGTH + 2 : -1]
            right = batch["labels"][:, LENGTH + 3 :]
            exact.append((logits.argmax(-1) == right).all(1).double().numpy())
            losses.append(torch.nn.functional.cross_entropy(logits.mT, right, reduction="none").mean(1).numpy())
    return np.concatenate(exact), np.concatenate(losses).astype(float)


def _items_interval(differences: np.ndarray) -> list[float]:
    """95 % of the mean over tasks, strings resampled within each task: (task, string) → [low, high]."""
    generator = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for row in differences:
        for piece in np.array_split(np.arange(RESAMPLES), 10):
            total[piece] += row[generator.integers(len(row), size=(len(piece), len(row)))].mean(1)
    return [float(end) for end in np.quantile(total / len(differences), [0.025, 0.975])]


def _read(file: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What `file` holds, if it was made for the same question."""
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return found if found["asked"] == json.loads(json.dumps(asked)) else None


def _write(file: Path, record: dict[str, Any]) -> None:
    with whole_file(file) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


# The results file


def assemble(records: list[dict[str, Any]], base: dict[str, list[float]], scale: str, digest: str) -> "xr.Dataset":
    """All runs in one dataset; a run that diverged has NaN for what could not be measured.

    Dimensions run (coordinates method, rank, learning_rate, seed), task, side, null, epsilon, k.
    """
    import xarray as xr

    settings = SCALES[scale]
    sizes = {"task": len(TASKS), "side": 2, "null": 2, "epsilon": len(EPSILONS), "k": len(KS), "end": 3}
    dims: dict[str, tuple[str, ...]] = {
        "steps": (), "validation_accuracy": (), "seconds": (), "relative_norm": (), "effective_rank": (), "vectors": (),
        "accuracy": ("task",), "loss": ("task",), "forgetting": ("end",), "loss_rise": ("end",),
        "count": ("side",), "undetermined": ("side",), "counts": ("side", "epsilon", "k"),
        "null_counts": ("side", "epsilon", "k"), "null_mean": ("null", "side"), "null_low": ("null", "side"),
        "null_high": ("null", "side"),
    }  # fmt: skip

    def stacked(name: str) -> np.ndarray:
        missing = np.full([sizes[dim] for dim in dims[name]], np.nan)
        values = [record.get(name) for record in records]
        return np.array([missing if value is None else np.asarray(value, float) for value in values])

    data = xr.Dataset(
        {name: (("run", *d), stacked(name)) for name, d in dims.items()},
        coords={
            "method": ("run", np.array([record["method"] for record in records], dtype=object)),
            "rank": ("run", [record["tuning"]["rank"] for record in records]),
            "learning_rate": ("run", [record["tuning"]["rate"] for record in records]),
            "seed": ("run", [record["tuning"]["seed"] for record in records]),
            "task": np.array(list(TASKS), dtype=object),
            "side": np.array(SIDES, dtype=object),
            "null": np.array(["spectrum", "evenly"], dtype=object),
            "epsilon": list(EPSILONS),
            "k": list(KS),
            "end": np.array(["mean", "low", "high"], dtype=object),
        },
    )
    for name, values in base.items():
        data[name] = ("task", values)
    data["reached"] = data.validation_accuracy >= settings.target

    def distinct(name: str) -> list[Any]:
        return [json.loads(each) for each in sorted({json.dumps(record[name], sort_keys=True) for record in records})]

    record = {
        "command": "python -m analyses.lora_vs_full sweep",
        "scale": scale,
        "settings": dataclasses.asdict(settings),
        "epsilon": EPSILON,
        "k": K,
        "base_sha256": digest,
        "tuned_sha256": [each.get("weights_sha256", "") for each in records],
        "versions": distinct("versions"),
        "commits": distinct("commit"),
        "seconds": {
            "training": round(sum(each["seconds"] for each in records)),
            "measuring": round(sum(each["measuring_seconds"] for each in records)),
        },
    }
    data.attrs["provenance"] = json.dumps(record)
    return data


def save(data: "xr.Dataset", folder: Path) -> None:
    """The dataset, its table (a row a run), its provenance and the claims, each file whole or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / f"{NAME}.nc") as path:
        compressed = {name: {"zlib": True} for name in data.data_vars}
        data.to_netcdf(path, engine="h5netcdf", encoding=compressed)
    with whole_file(folder / f"{NAME}.csv") as path:
        runs_of(data).to_csv(path, index=False, float_format="%.6g")
    with whole_file(folder / f"{NAME}.json") as path:
        path.write_text(json.dumps(json.loads(data.attrs["provenance"]), indent=1) + "\n")
    with whole_file(folder / f"{NAME}.md") as path:
        path.write_text(report(data))


def load(folder: Path = RESULTS) -> "xr.Dataset":
    """What `save` wrote.

    Raises:
        InputError: no such results.
    """
    import xarray as xr

    file = folder / f"{NAME}.nc"
    if not file.is_file():
        raise InputError(f"no results in {folder}; make them with: python -m analyses.lora_vs_full sweep")
    with xr.open_dataset(file, engine="h5netcdf") as stored:
        return stored.load()


def runs_of(data: "xr.Dataset", *, side: str = "left") -> "pd.DataFrame":
    """One row a run: what was asked, what was reached, forgotten and found on one side at ε = 0.5, k = 10.

    `fastest` and `lowest` mark the run that stands for its rank and seed (see `CHOICES`).
    """
    import pandas as pd

    scalars = ("steps", "validation_accuracy", "reached", "relative_norm", "effective_rank", "vectors")
    frame = pd.DataFrame(
        {name: data[name].values for name in ("method", "rank", "learning_rate", "seed", *scalars, "seconds")}
    )
    frame["reached"] = frame["reached"].astype(bool)
    frame["new_task_accuracy"] = data.accuracy.sel(task=NEW_TASK).values
    for name in ("forgetting", "loss_rise"):
        for end in ("mean", "low", "high"):
            frame[name if end == "mean" else f"{name}_{end}"] = data[name].sel(end=end).values
    here = data.sel(side=side)
    frame["count"], frame["undetermined"] = here["count"].values, here["undetermined"].values
    for part in ("mean", "low", "high"):
        frame[f"null_{part}"] = here[f"null_{part}"].sel(null="spectrum").values
    frame["excess"] = frame["count"] - frame["null_mean"]
    frame["fastest"] = frame["lowest"] = False
    for _, group in frame[frame["reached"]].groupby(["rank", "seed"]):
        rows = group.sort_values("learning_rate").reset_index().to_dict("records")
        frame.loc[recipe.choose(rows, target=-np.inf)["index"], "fastest"] = True  # all of them reached it
        frame.loc[rows[0]["index"], "lowest"] = True
    return frame


# Estimates


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from `n` independent things; the interval is NaN where there are too few."""

    value: float
    low: float
    high: float
    n: int

    def words(self, spec: str, unit: str = "") -> str:
        """`value [low, high] unit`."""
        if not np.isfinite(self.value):
            return "nothing to compare"
        ends = f"[{self.low:{spec}}, {self.high:{spec}}]" if np.isfinite(self.low) else "[no interval]"
        return f"{self.value:{spec}} {ends}{unit}"


def over_seeds(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean over seeds with Student's 95 % interval; NaN (a seed without a matched run) is left out."""
    from scipy.stats import t

    kept = np.asarray(values, float)
    kept = kept[np.isfinite(kept)]
    n = len(kept)
    mean = float(kept.mean()) if n else np.nan
    half = float(t.ppf(0.975, n - 1) * kept.std(ddof=1) / n**0.5) if n > 1 else np.nan
    return Estimate(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Correlation(Estimate):
    """Spearman's ρ over `n` runs; `p_value` is of the means of groups of runs, permuted (NaN for a partial ρ)."""

    p_value: float

    def words(self, spec: str = ".2f", unit: str = "") -> str:
        if not np.isfinite(self.value):
            return f"undefined ({self.n} runs: too few, or all equal)"
        p_value = f", p = {self.p_value:.2g}" if np.isfinite(self.p_value) else ""
        return f"ρ = {super().words(spec, unit)}{p_value} ({self.n} runs)"


def spearman(frame: "pd.DataFrame", x: str, y: str, *, given: str | None = None) -> Correlation:
    """Spearman's ρ of two columns, a row a run, or the partial one with a third column held fixed.

    The runs of one rank and rate are one group. Interval: 95 % percentile bootstrap that resamples whole groups, since
    the seeds of one group are near copies of each other. p-value: two-sided permutation test of ρ between group means.
    """
    from scipy.stats import permutation_test, rankdata

    groups = frame.groupby(["rank", "learning_rate"])
    n, cells = len(frame), groups.ngroups
    nothing = Correlation(np.nan, np.nan, np.nan, n, np.nan)
    if cells < 4:
        return nothing
    columns = frame[[x, y] if given is None else [x, y, given]].to_numpy(float).T
    value = float(_weighted_rho(columns, np.ones((1, n)))[0])
    if not np.isfinite(value):
        return nothing
    times = np.random.default_rng(0).multinomial(cells, np.full(cells, 1 / cells), size=RESAMPLES)
    low, high = np.nanquantile(_weighted_rho(columns, times[:, groups.ngroup()].astype(float)), [0.025, 0.975])
    p_value = np.nan
    if given is None:
        a, b = rankdata(groups[[x, y]].mean().to_numpy(), axis=0).T
        found = permutation_test(
            (a,), lambda permuted, axis: np.tensordot(permuted - a.mean(), b - b.mean(), (axis, 0)), vectorized=True,
            permutation_type="pairings", n_resamples=RESAMPLES - 1, rng=np.random.default_rng(0),
        )  # fmt: skip
        p_value = float(found.pvalue)
    return Correlation(value, float(low), float(high), n, p_value)


def _weighted_rho(columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman's ρ of two columns, partial if there is a third, with every item taken as often as its weight says.

    (column, item), (resample, item) → (resample,); NaN where a column is constant.
    """
    centred = []
    for values in columns:
        below = (values[:, None] < values) + 0.5 * (values[:, None] == values)
        ranks = weights @ below  # of an item among the repeated ones, ties averaged
        centred.append(ranks - (weights * ranks).sum(1, keepdims=True) / weights.sum(1, keepdims=True))

    def rho(a: int, b: int) -> np.ndarray:
        products = ((weights * centred[i] * centred[j]).sum(1) for i, j in ((a, b), (a, a), (b, b)))
        both, first, second = products
        return both / np.sqrt(first * second)

    with np.errstate(invalid="ignore", divide="ignore"):
        if len(columns) == 2:
            return rho(0, 1)
        xz, yz = rho(0, 2), rho(1, 2)
        return (rho(0, 1) - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))


def by_seed(frame: "pd.DataFrame", column: str, choice: str = "fastest") -> "pd.DataFrame":
    """The chosen run of each rank (columns; 0 is full fine-tuning) and seed (rows); NaN where none was matched."""
    chosen = frame[frame[choice]].pivot(index="seed", columns="rank", values=column)
    return chosen.reindex(index=sorted(frame["seed"].unique()), columns=sorted(frame["rank"].unique()))


def slope_against_rank(frame: "pd.DataFrame", column: str, choice: str = "fastest") -> Estimate:
    """How much a column changes when the rank of LoRA doubles, chosen runs, a line a seed."""
    table = by_seed(frame, column, choice).drop(columns=0).dropna()
    return over_seeds([np.polyfit(np.log2(table.columns), row, 1)[0] for row in table.to_numpy()])


def slope_within(frame: "pd.DataFrame", column: str, against: str, within: str) -> Estimate:
    """How much a column changes a unit of `against` in matched runs of equal `within`: lines averaged, then seeds."""
    slopes: dict[int, list[float]] = {}
    for (seed, _), group in frame[frame["reached"]].groupby(["seed", within]):
        if len(group) > 1:
            slopes.setdefault(seed, []).append(np.polyfit(group[against], group[column], 1)[0])
    return over_seeds([np.mean(each) for each in slopes.values()])


# Verdicts


def positive(found: Estimate) -> str:
    """yes: the interval lies above 0; no: below."""
    return "yes" if found.low > 0 else "no" if found.high < 0 else "open"


def negative(found: Estimate) -> str:
    """yes: the interval lies below 0; no: above."""
    return "yes" if found.high < 0 else "no" if found.low > 0 else "open"


def few(found: Estimate) -> str:
    """yes: the interval ends at 5 % or less; no: it begins above."""
    return "yes" if found.high <= FEW else "no" if found.low > FEW else "open"


def negligible(found: Estimate) -> str:
    """yes: the interval lies inside ±0.3; no: it excludes 0 and reaches further; open otherwise."""
    if found.low > -NEGLIGIBLE and found.high < NEGLIGIBLE:
        return "yes"
    return "no" if found.low > 0 or found.high < 0 else "open"


def different(found: Estimate) -> str:
    """yes: the interval excludes 0; open otherwise (equality would need a margin that the paper does not give)."""
    return "yes" if found.low > 0 or found.high < 0 else "open"


@dataclass(frozen=True)
class Claim:
    """A claim, the runs it is judged on, what was measured, and the verdict that follows from its interval."""

    claim: str
    runs: str
    measured: str
    verdict: str


def claims(data: "xr.Dataset") -> list[Claim]:
    """Each claim of the paper against the results; verdicts follow from intervals by the rules above."""
    frame = runs_of(data)
    matched = frame[frame["reached"]]
    ranks = [rank for rank in sorted(frame["rank"].unique()) if rank]
    low = [rank for rank in ranks if rank <= 16]
    vectors = float(frame["vectors"].max())
    rows: list[Claim] = []

    def each(claim: str, judge: Callable[[str], tuple[str, str]]) -> None:
        """One row for each way of choosing the rate."""
        rows.extend(Claim(claim, words, *judge(choice)) for choice, words in CHOICES.items())

    def lora(column: str, of: list[int], choice: str) -> "pd.Series":
        return by_seed(frame, column, choice)[of].mean(axis=1, skipna=False)

    def full(column: str, choice: str) -> "pd.Series":
        return by_seed(frame, column, choice)[0]

    def more(choice: str) -> tuple[str, str]:
        found = over_seeds(lora("count", low, choice) - full("count", choice))
        return f"LoRA − full {found.words('+.1f', ' vectors')}", positive(found)

    def none(choice: str) -> tuple[str, str]:
        found = over_seeds(full("count", choice) / vectors)
        return found.words(".1%", " of the vectors"), few(found)

    def chance_lora(choice: str) -> tuple[str, str]:
        found = over_seeds(lora("excess", low, choice))
        return f"count − null {found.words('+.1f', ' vectors')}", positive(found)

    def chance_full(choice: str) -> tuple[str, str]:
        found = over_seeds(full("excess", choice))
        return f"count − null {found.words('+.1f', ' vectors')}", positive(found)

    def falls(choice: str) -> tuple[str, str]:
        found, null = (slope_against_rank(frame, column, choice) for column in ("count", "null_mean"))
        return f"{found.words('+.1f')} vectors a doubling (null alone: {null.words('+.1f')})", negative(found)

    def spread(choice: str) -> tuple[str, str]:
        table = by_seed(frame, "effective_rank", choice)
        found = over_seeds(table[0] - table[ranks].max(axis=1, skipna=False))
        return f"full − largest of LoRA {found.words('+.1f')}", positive(found)

    each("LoRA of rank ≤ 16 has more intruders than full fine-tuning", more)
    each(f"full fine-tuning has few or none (≤ {FEW:.0%})", none)
    each("(ours) LoRA of rank ≤ 16 has more than its null", chance_lora)
    each("(ours) full fine-tuning has more than its null", chance_full)
    each(f"the count falls as the rank rises to {ranks[-1]}", falls)

    lora_runs = matched[matched["rank"] > 0].assign(doublings=lambda runs: np.log2(runs["rank"]))
    found, null = (slope_within(lora_runs, column, "doublings", "learning_rate") for column in ("count", "null_mean"))
    measured = f"{found.words('+.1f')} vectors a doubling (null alone: {null.words('+.1f')})"
    rows.append(
        Claim(
            f"(ours) the count falls as the rank rises to {ranks[-1]} at equal rate",
            "matched, LoRA",
            measured,
            negative(found),
        )
    )

    sets = {"all matched": matched, "matched, LoRA": lora_runs}
    measures = {"forgetting": "drop of accuracy", "loss_rise": "rise of loss"}
    for column, words in measures.items():
        for label, runs in sets.items():
            found, size = spearman(runs, "count", column), spearman(runs, "relative_norm", column)
            claim = f"the count correlates with forgetting ({words}; paper .97, .59)"
            measured = f"{found.words()}; of ‖Δ‖/‖W0‖ in its place ρ = {size.value:.2f}"
            rows.append(Claim(claim, label, measured, positive(found)))
    for column, words in measures.items():
        for label, runs in sets.items():
            found = spearman(runs, "count", column, given="relative_norm")
            claim = f"(ours) the count correlates with forgetting ({words}) at given ‖Δ‖/‖W0‖"
            rows.append(Claim(claim, label, f"partial {found.words()}", positive(found)))
    for label, runs in sets.items():
        found = spearman(runs, "count", "new_task_accuracy")
        rows.append(Claim("the count does not correlate with test accuracy", label, found.words(), negligible(found)))

    for label, runs in (("matched, full", matched[matched["rank"] == 0]), ("matched, LoRA", lora_runs)):
        tenfold = runs.assign(decades=np.log10(runs["learning_rate"]))
        found = slope_within(tenfold, "count", "decades", "rank")
        measured = found.words("+.1f", " vectors a tenfold rate")
        rows.append(Claim("the count rises with the learning rate", label, measured, positive(found)))

    each("updates of full fine-tuning have a larger effective rank than LoRA's", spread)

    for column, words in measures.items():

        def differ(choice: str, column: str = column) -> tuple[str, str]:
            found = over_seeds(lora(column, ranks, choice) - full(column, choice))
            table = by_seed(frame, column, choice)
            single = ", ".join(f"r = {rank} {over_seeds(table[rank] - table[0]).value:+.2f}" for rank in ranks)
            return f"LoRA − full {found.words('+.3f')} ({single})", different(found)

        each(f"at equal accuracy LoRA and full fine-tuning forget differently ({words})", differ)
    return rows


def report(data: "xr.Dataset") -> str:
    """How the runs were matched, the chosen runs, and the table of claims, as Markdown."""
    frame, record = runs_of(data), json.loads(data.attrs["provenance"])
    settings, accuracy = record["settings"], frame[frame["reached"]]["new_task_accuracy"]
    columns = {
        "learning_rate": ("rate", "g"), "steps": ("steps", ".0f"), "new_task_accuracy": ("new task", ".3f"),
        "relative_norm": ("‖Δ‖/‖W0‖", ".3f"), "effective_rank": ("effective rank", ".1f"),
        "count": ("intruders", ".1f"), "null_mean": ("null", ".1f"), "forgetting": ("drop of accuracy", ".3f"),
        "loss_rise": ("rise of loss", ".2f"),
    }  # fmt: skip
    lines = [
        "# LoRA against full fine-tuning: the claims at this scale",
        "",
        f"{len(frame)} runs from one base; {int(frame['reached'].sum())} reached a validation accuracy of "
        f"{settings['target']:g} on the new task within {settings['steps']} steps, and only those are compared. "
        f"Intruders: left singular vectors, ε = {record['epsilon']:g}, k = {record['k']}, {frame['vectors'].max():.0f} "
        "judged; null: random updates with Δ's own singular values. Drop of accuracy and rise of loss (nats a token): "
        f"means over the base tasks. Test accuracy of the compared runs: {accuracy.min():.3f} to {accuracy.max():.3f}, "
        "since all stopped at the target. Rates tried: "
        f"{', '.join(f'{rate:g}' for rate in settings['full_rates'])} (full), "
        f"{', '.join(f'{rate:g}' for rate in settings['lora_rates'])} (LoRA).",
    ]
    for choice, words in CHOICES.items():
        lines += [
            "",
            f"Of the matched runs of each method and seed the one at the {words}, means over seeds:",
            "",
            "| method | matched runs | " + " | ".join(name for name, _ in columns.values()) + " |",
            "|---|" + "---|" * (len(columns) + 1),
        ]
        for rank, group in frame.groupby("rank"):
            chosen, cells = group[group[choice]], []
            for column, (_, spec) in columns.items():
                values = chosen[column]
                if column == "learning_rate":
                    cells.append(", ".join(f"{value:{spec}}" for value in sorted(values.unique())) or "–")
                else:
                    cells.append(f"{values.mean():{spec}}" if len(values) else "–")
            label = f"LoRA, r = {rank}" if rank else "full fine-tuning"
            lines.append(f"| {label} | {int(group['reached'].sum())} of {len(group)} | " + " | ".join(cells) + " |")
    lines += ["", "| claim | runs | measured here, 95 % interval | holds here? |", "|---|---|---|---|"]
    lines += [f"| {row.claim} | {row.runs} | {row.measured} | **{row.verdict}** |" for row in claims(data)]
    lines += [
        "",
        "Differences, shares and slopes: mean over seeds (paired by seed), Student's interval. Correlations: Spearman "
        "over runs; the interval resamples the groups of equal rank and rate, the p-value permutes the means of these "
        "groups. Rules: a direction holds where its interval lies on the claimed side of 0 (no: on the other "
        f"side); *few* where the interval ends at {FEW:.0%} or less (no: begins above); *does not correlate* where it "
        f"lies inside ±{NEGLIGIBLE:g} (no: excludes 0); *differently* where it excludes 0; else open. Intervals are "
        "not adjusted for the number of claims, and hold for this base alone.",
        "",
        "Not planned before runs were seen: the comparisons at the lowest rate and the fourth seed (added during "
        "the first seeds), the correlations at given ‖Δ‖/‖W0‖ (after the first seed) and the row at equal "
        "rate (after all).",
        "",
        f"Written by `{record['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    import typer

    from analyses.studies import Scale, Steps, chosen, require_scale
    from finetune_lens.command import Basic, run

    def lora_vs_full(
        steps: Steps = None,
        *,
        scale: Scale = "tiny",
        mini: Annotated[bool, typer.Option("--mini", help="A toy in seconds, to try the course alone.")] = False,
        work: Annotated[Path, typer.Option(help="Folder of the runs; an interrupted sweep continues from it.")] = Path(
            "runs", NAME
        ),
        results: Annotated[
            Path, typer.Option(help="Folder of the results.", show_default="analyses/results")
        ] = RESULTS,
        common: Basic,
    ) -> None:
        """Train, score and measure LoRA and full fine-tuning over ranks and rates; print the claims.

        The results of a sweep replace those in the folder of results.
        """
        todo = chosen(steps, STEPS)
        require_scale(scale, paper=NEEDS)
        if "sweep" in todo:
            size = "mini" if mini else scale
            results = work / size / "results" if mini else results
            save(run_sweep(work / size, size, progress=not common.quiet), results)
            common.say(f"saved in {results}/")
        print(report(load(results)))

    run(lora_vs_full)


if __name__ == "__main__":
    from analyses.lora_vs_full import main

    main()
