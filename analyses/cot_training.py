"""What does training with an explicit chain of thought build? Two-hop facts, told with the bridge written and without.

    python -m analyses.cot_training                       # trains both models: half an hour on one core
    python -m analyses.cot_training lens trace claims     # of the models trained before, in a minute
    python -m analyses.cot_training --scale paper         # the published sizes: on a GPU
    python -m figures.cot_training                        # the figure, from the stored results

The study of "Unveiling the Mechanisms of Explicit CoT Training" (arXiv 2502.04667), on `finetune_lens.tasks.facts`. Two
models of one fresh start read the same draws of the same facts: one is told `h r1 r2 b t`, the other `h r1 r2 t`.

- train: accuracy along training on atomic facts and on two-hop items, trained, held out (ID) and out of distribution;
- lens: the rank of b, r2 and t in the residual stream, read out after every block at every position, as
  MRR = mean 1/(rank + 1), beside the same of another item's b, r2, t;
- trace: the residual stream of a question with another h, r1, r2 (or written b) put into the question's own run, one
  layer and position at a time, causal mask and all: which states carry the answer?

At `tiny` (|E| = 200, 4 layers) the model without the bridge does not have the training that grokking takes: what it
fails at, it may yet learn.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import stats
from finetune_lens.files import whole_file
from finetune_lens.tasks.facts import PUBLISHED, SMALL, SPLITS, Items, World

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.hooked import HookedModel

HERE = Path(__file__).resolve().parent
STEPS = ("train", "lens", "trace", "claims")
ARMS = {"with": True, "without": False}  # the bridge is written
POSITIONS, TARGETS = ("h", "r1", "r2", "b"), ("b", "r2", "t")
LEARNT = 0.9  # an accuracy that counts as learnt
MEASURES = ("fact id", "fact ood", *(f"t {name}" for name in SPLITS), *(f"b {name}" for name in SPLITS))
CASES = ("answer", "answer kept", "other answer")  # see `traced`


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One scale.

    Attributes:
        steps: updates of either model, of `batch` texts each.
        seeds: of the fresh weights and the draws; the facts are the same.
        items: two-hop items, or atomic facts, of a split that are measured, at most.
    """

    world: dict[str, Any] = field(default_factory=lambda: dict(SMALL))
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    batch: int = 128
    steps: int = 7000
    rate: float = 2e-3
    warmup: int = 50
    seeds: tuple[int, ...] = (0, 1)
    items: int = 300


SCALES = {
    "tiny": Settings(),
    "paper": Settings(
        world=dict(PUBLISHED), hidden=768, layers=8, heads=12, batch=512, steps=500_000, rate=1e-4, warmup=2000
    ),
}


def fresh(settings: Settings, seed: int) -> Any:
    """A model that has learnt nothing: GPT-2 of these sizes, as published, without dropout."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(World(**settings.world).vocabulary), n_embd=settings.hidden, n_layer=settings.layers,
        n_head=settings.heads, n_positions=6, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


class Study:
    """The facts and models of one scale, and where results lie."""

    def __init__(self, scale: str = "tiny"):
        self.settings = SCALES[scale]
        self.folder = Path(f"runs/cot-training-{scale}")
        self.results = HERE / "results" if scale == "tiny" else self.folder / "results"

    @cached_property
    def world(self) -> World:
        return World(**self.settings.world)

    @cached_property
    def items(self) -> dict[str, Items]:
        """The measured items of each split, drawn once for the whole study."""
        generator = np.random.default_rng([self.world.seed, 10])
        return {name: self.world.splits[name][self._some(len(self.world.splits[name]), generator)] for name in SPLITS}

    @cached_property
    def facts(self) -> dict[str, np.ndarray]:
        """The measured atomic facts: in distribution (`id`), and those out of it. All are trained."""
        generator = np.random.default_rng([self.world.seed, 11])
        parts = {"id": self.world.atomic[~self.world.is_ood], "ood": self.world.atomic[self.world.is_ood]}
        return {name: part[self._some(len(part), generator)] for name, part in parts.items()}

    def _some(self, count: int, generator: np.random.Generator) -> np.ndarray:
        return np.sort(generator.permutation(count)[: self.settings.items])

    def place(self, arm: str, seed: int) -> Path:
        return self.folder / f"{arm}-{seed}"

    def model(self, arm: str, seed: int) -> "HookedModel":
        from finetune_lens.checkpoints import open_checkpoint
        from finetune_lens.hooked.loading import load_model

        return load_model(open_checkpoint(self.place(arm, seed)), dtype="float32")

    def stored(self, name: str) -> "xr.Dataset":
        import xarray as xr

        with xr.open_dataset(self.results / f"cot_training-{name}.nc", engine="h5netcdf") as file:
            return file.load()

    def keep(self, data: "xr.Dataset", name: str) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        compressed = {n: {"zlib": True} for n, v in data.data_vars.items() if v.dtype.kind in "fiu"}
        with whole_file(self.results / f"cot_training-{name}.nc") as path:
            data.to_netcdf(path, engine="h5netcdf", encoding=compressed)


def tails_known(world: World, model: Any, facts: np.ndarray) -> np.ndarray:
    """(fact,) whether the model gives the tail of an atomic fact (head, relation, tail)."""
    import torch

    ids = world.encode_atomic(facts)["input_ids"].to(next(model.parameters()).device)
    with torch.inference_mode():
        best = model(input_ids=ids[:, :3], logits_to_keep=1).logits[:, -1].argmax(-1)
    return (best == ids[:, 3]).cpu().numpy()


def right(study: Study, model: Any, *, bridge: bool) -> np.ndarray:
    """Which of the measured are right, (measure · item,): 1, 0, and NaN where a split has fewer items.

    Measures, in the order of MEASURES: atomic facts ID and OOD, then t of each split, then b of each split (NaN without
    the bridge). A forward pass of each, two of an item with the bridge.
    """
    found = [tails_known(study.world, model, facts) for facts in study.facts.values()]
    said = [study.world.measure(model, items, bridge=bridge) for items in study.items.values()]
    found += [one["t"] for one in said] + [one.get("b", np.zeros(0)) for one in said]
    table = np.full((len(MEASURES), study.settings.items), np.nan)
    for row, values in zip(table, found, strict=True):
        row[: len(values)] = values
    return table.ravel()


def teach(study: Study, arm: str, seed: int, *, progress: bool = True) -> "xr.Dataset":
    """Train one model and keep it: right (step, measure, item), loss (step), seconds.

    A finished one is not trained again unless the settings have changed.
    """
    import torch
    import xarray as xr

    from finetune_lens.training import train

    settings, world = study.settings, study.world
    out = study.place(arm, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fresh(settings, seed).to(device)
    every = max(1, settings.steps // 14)
    early = np.geomspace(min(50, settings.steps), settings.steps, 25).round().astype(int)
    run = train(
        model,
        lambda step, generator: {
            name: values.to(device)
            for name, values in world.lesson(settings.batch, generator, bridge=ARMS[arm]).items()
        },
        steps=settings.steps, learning_rate=settings.rate, schedule="constant", warmup=settings.warmup,
        weight_decay=0.1, seed=seed, evaluate=lambda: right(study, model, bridge=ARMS[arm]),
        every=sorted({0, *early.tolist(), *range(0, settings.steps, every)}),
        checkpoint=out.with_suffix(".checkpoint.pt"), progress=progress,
    )  # fmt: skip
    fresh_folder = out.with_name(f".{out.name}")
    shutil.rmtree(fresh_folder, ignore_errors=True)
    model.save_pretrained(fresh_folder)
    world.tokenizer().save_pretrained(fresh_folder)
    shutil.rmtree(out, ignore_errors=True)
    fresh_folder.rename(out)
    steps = sorted(run.scores)
    table = np.stack([run.scores[n].reshape(len(MEASURES), -1) for n in steps])
    losses = [run.losses[max(0, n - 50) : n].mean() if n else np.nan for n in steps]
    return xr.Dataset(
        {"right": (("step", "measure", "item"), np.nan_to_num(table, nan=-1).astype(np.int8)),
         "loss": ("step", np.array(losses)), "seconds": run.seconds},
        coords={"step": steps, "measure": np.array(MEASURES, dtype=object)},
    )  # fmt: skip


def train_all(study: Study, *, progress: bool = True) -> "xr.Dataset":
    """Both models of every seed, `teach`'s measures with the dimensions seed and arm before them."""
    import xarray as xr

    from finetune_lens.zoo.stored import alone

    with alone():
        found = [[teach(study, arm, seed, progress=progress) for arm in ARMS] for seed in study.settings.seeds]
    data = xr.concat([xr.concat(arms, "arm", data_vars="all") for arms in found], "seed", data_vars="all")
    data["commonest"] = ("split", [commonest(study, name) for name in SPLITS])
    return data.assign_coords(_names(study)).assign_attrs(_described(study))


def _names(study: Study) -> dict[str, Any]:
    names = {"arm": ARMS, "split": SPLITS}
    return {"seed": list(study.settings.seeds)} | {n: np.array([*v], dtype=object) for n, v in names.items()}


def _described(study: Study) -> dict[str, Any]:
    """Settings, and what a text of a lesson holds on average, by arm: tokens read, and tokens that have a loss."""
    world, settings = study.world, dataclasses.asdict(study.settings)
    hops = len(world.splits["train"])
    share = hops / (hops + len(world.atomic))  # of the drawn texts that are two-hop items
    told = {arm: {"tokens": 4 + share * (1 + b), "learnt": 1 + share * b} for arm, b in ARMS.items()}
    sizes = {name: len(items) for name, items in world.splits.items()} | {"atomic": len(world.atomic)}
    record = {"settings": settings, "sizes": sizes, "told": told, "versions": _versions()}
    return {"provenance": json.dumps(record)}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "numpy")}


def commonest(study: Study, split: str) -> float:
    """Accuracy on a split of naming, for each r2, the entity that most often follows it in the trained items."""
    taught, asked = study.world.splits["train"], study.items[split]
    counts = np.zeros((study.world.relations, study.world.entities), dtype=int)
    np.add.at(counts, (taught.r2, taught.t), 1)
    return float((counts.argmax(1)[asked.r2] == asked.t).mean())


def read_ranks(model: "HookedModel", ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The logit lens: the rank, from 0, of tokens in the residual stream read out by final norm and unembedding.

    Args:
        ids: (item, position) what the model reads, `<bos>` first.
        tokens: (target, item) whose ranks are wanted: how many tokens have a larger logit.

    Returns:
        (depth, position, target, item), depth 0 the embedding and n after n blocks, without the position of `<bos>`.
    """
    import torch

    from finetune_lens.hooked.depths import sites_of
    from finetune_lens.hooked.reentry import read_out

    sites = sites_of(model, "resid_post")
    run = model.run(torch.from_numpy(ids), capture=sites)
    wanted = torch.from_numpy(tokens).to(model.device)
    found = np.empty((len(sites), ids.shape[1] - 1, *tokens.shape), dtype=np.int16)
    with torch.no_grad():
        for depth, site in enumerate(sites):
            for position in range(1, ids.shape[1]):
                logits = read_out(model, run.cache[site][:, position])  # (item, vocab)
                own = logits.gather(1, wanted.T).T  # (target, item)
                found[depth, position - 1] = (logits[None] > own[:, :, None]).sum(-1).cpu().numpy()
    return found


def lens(study: Study, *, shuffles: int = 20) -> "xr.Dataset":
    """Ranks of b, r2 and t: rank (seed, arm, split, depth, position, target, item), −1 where there is none.

    null: the MRR of other items' b, r2, t: mean, and 2.5 % and 97.5 % of the shuffles, along `end`. known (seed, arm,
    split, item): the model gives the tails of both of the item's facts, asked as atomic ones.
    """
    import xarray as xr

    settings, world = study.settings, study.world
    shape = (len(settings.seeds), len(ARMS), len(SPLITS), settings.layers + 1, len(POSITIONS), len(TARGETS))
    rank, null = np.full((*shape, settings.items), -1, dtype=np.int16), np.full((*shape, 3), np.nan)
    known = np.zeros((*shape[:3], settings.items), dtype=np.int8)
    generator = np.random.default_rng([world.seed, 12])
    for s, seed in enumerate(settings.seeds):
        for a, (arm, bridge) in enumerate(ARMS.items()):
            model = study.model(arm, seed)
            for k, items in enumerate(study.items.values()):
                ids = world.encode(items, bridge=bridge)["input_ids"].numpy()[:, :-1]
                tokens = np.stack([2 + items.b, 2 + world.entities + items.r2, 2 + items.t])
                others = [tokens[:, generator.permutation(len(items))] for _ in range(shuffles)]
                ranks = read_ranks(model, ids, np.concatenate([tokens, *others]))
                ranks = ranks.reshape(*ranks.shape[:2], 1 + shuffles, len(TARGETS), -1)
                told = slice(ranks.shape[1])
                rank[s, a, k, :, told, :, : len(items)] = ranks[:, :, 0]
                drawn = (1 / (1 + ranks[:, :, 1:])).mean(-1)  # (depth, position, shuffle, target)
                ends = np.quantile(drawn, [0.025, 0.975], axis=2)
                null[s, a, k, :, told] = np.stack([drawn.mean(2), *ends], axis=-1)
                hops = [np.stack(hop, axis=1) for hop in ((items.h, items.r1, items.b), (items.b, items.r2, items.t))]
                both = [tails_known(world, model.module, hop) for hop in hops]
                known[s, a, k, : len(items)] = both[0] & both[1]
    dims = ("seed", "arm", "split", "depth", "position", "target")
    names = {"position": POSITIONS, "target": TARGETS, "end": ("mean", "low", "high")}
    coords = _names(study) | {n: np.array(v, dtype=object) for n, v in names.items()}
    data = {"rank": ((*dims, "item"), rank), "null": ((*dims, "end"), null.astype(np.float32))}
    data["known"] = ((*dims[:3], "item"), known)
    return xr.Dataset(data, coords=coords).assign_attrs(_described(study))


def reciprocal(rank: np.ndarray) -> np.ndarray:
    """1/(rank + 1), whose mean over items is the MRR; NaN where there is no rank."""
    return np.where(rank < 0, np.nan, 1 / (1 + np.maximum(rank, 0)))


def emergence(means: np.ndarray, chance: float) -> np.ndarray:
    """(...,) the first depth at which an MRR (depth, ...) is at least half of what it is at the last depth.

    Infinite where the last one is not above `chance`.
    """
    first = (means >= means[-1] / 2).argmax(0).astype(float)
    return np.where(means[-1] > chance, first, np.inf)


def bridge_at(data: "xr.Dataset", seed: int, split: str, position: str = "r1") -> dict[str, dict[str, Any]]:
    """Where b is at a position, by arm and for `with − without`: depth of emergence, and its MRR's mean over depths.

    Intervals: 95 % bootstrap over items, both models' of an item drawn together.
    """
    found, drawn = {}, {}
    for arm in ARMS:
        one = data.sel(seed=seed, arm=arm, split=split, position=position, target="b")
        values = reciprocal(one["rank"].transpose("depth", "item").values)
        values = values[:, ~np.isnan(values[0])]
        chance = float(one["null"].sel(end="high").isel(depth=-1))
        resampled = stats.resampled_means(values)
        means = values.mean(1)
        drawn[arm] = {
            "depth": (float(emergence(means, chance)), emergence(resampled, chance)),
            "area": (float(means.mean()), resampled.mean(0)),
        }
        found[arm] = {name: _estimate(*pair) for name, pair in drawn[arm].items()}
    with np.errstate(invalid="ignore"):  # both never: no difference to speak of
        found["difference"] = {
            name: _estimate(*(a - b for a, b in zip(drawn["with"][name], drawn["without"][name], strict=True)))
            for name in ("depth", "area")
        }
    return found


def _estimate(value: float, drawn: np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
    return float(value), float(low), float(high)


# A map of the tracing: arm, what is asked after the tokens that it reads (b of `h r1 r2`, or t), and what is exchanged.
MAPS = (
    ("with", "b", "h"), ("with", "b", "r1"), ("with", "t", "h"), ("with", "t", "r1"), ("with", "t", "r2"),
    ("with", "t", "b"), ("without", "t", "h"), ("without", "t", "r1"), ("without", "t", "r2"),
)  # fmt: skip


def exchanged(world: World, items: Items, what: str, generator: np.random.Generator) -> tuple[np.ndarray, Items]:
    """`World.counterfactual`, and for "b" another written bridge, of which r2 has another tail: rows, and items."""
    if what != "b":
        return world.counterfactual(items, what, generator)
    ends = world.tail[:, items.r2].T  # (item, entity): what follows each entity after the item's r2
    fitting = (ends >= 0) & (ends != items.t[:, None])
    rows = np.flatnonzero(fitting.any(1))
    new = np.where(fitting[rows], generator.random((len(rows), world.entities)), -1).argmax(1)
    return rows, dataclasses.replace(items[rows], b=new, t=ends[rows, new])


def questions(
    world: World, items: Items, arm: str, asked: str, what: str, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """Prompts with answer, wrong answer (the counterfactual's) and counterfactual `corrupt`.

    Where t is asked after a written bridge, h or r1 is exchanged and the bridge stays as it was written: the text then
    contradicts the question, and the counterfactual's answer is what the question says.
    """
    rows, others = exchanged(world, items, what, generator)
    shown = ARMS[arm] and asked == "t"
    told = world.rows(items[rows], bridge=True)
    changed = world.rows(others, bridge=True)
    found = []
    for one, other in zip(told, changed, strict=True):
        bridge = other["b"] if what == "b" else one["b"]
        found.append({
            "id": one["id"], "prompt": one["prompt"] + one["b"] * shown, "answer": one[asked],
            "wrong": other[asked], "corrupt": other["prompt"] + bridge * shown,
        })  # fmt: skip
    return found


def traced(model: "HookedModel", prompts: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What putting each state of the counterfactual's run into the question's run does to the answer.

    Returns:
        lost (end, layer, position): the fall of the answer's probability, and its interval; carried: the share of the
        logit difference between answer and counterfactual's answer that goes with the state (NaN where the two runs do
        not differ in it); said (case, end): the share of the answer in the question's run, the answer in the
        counterfactual's, and the counterfactual's answer in the counterfactual's.
    """
    import finetune_lens as fl

    tokens = len(model.require_tokenizer()(prompts[0]["prompt"])["input_ids"])
    result = fl.patch(
        model, prompts, site="resid_pre", direction="noising", positions=range(1, tokens), metric="prob", progress=False
    )  # `<bos>` is the same in both runs
    where = ("layer", "position")
    effect = result.effect("prob").sel(direction="noising").transpose(..., *where)
    share = result.recovery("logit_diff").sel(direction="noising").transpose(..., *where)
    corrupt = [row | {"prompt": row["corrupt"], "answer": row["wrong"], "wrong": row["answer"]} for row in prompts]
    said = [
        result.data["recipient_accuracy"].values.ravel(),
        result.data["donor_accuracy"].values.ravel(),
        _says(model, [row["prompt"] for row in corrupt], [row["answer"] for row in corrupt]),
    ]
    low, high = stats.interval_of_mean(np.stack(said))
    return {
        "lost": -np.stack([effect[name].values for name in ("mean", "high", "low")]),
        "carried": np.stack([share[name].values for name in ("ratio", "low", "high")]),
        "said": np.stack([np.mean(said, axis=1), low, high], axis=-1),
    }


def _says(model: "HookedModel", prompts: list[str], answers: list[str]) -> np.ndarray:
    import torch

    reads = model.require_tokenizer()
    logits = model.run(torch.tensor(reads(prompts)["input_ids"])).logits[:, -1]
    return (logits.argmax(-1).cpu().numpy() == reads.convert_tokens_to_ids(answers)).astype(float)


def trace(study: Study, *, progress: bool = True) -> "xr.Dataset":
    """`traced` for every map, seed and split: dims seed, split, map, layer, position, end (mean, low, high)."""
    import xarray as xr
    from tqdm.auto import tqdm

    settings = study.settings
    shape = (len(settings.seeds), len(SPLITS), len(MAPS))
    cells = {n: np.full((*shape, 3, settings.layers, len(POSITIONS)), np.nan) for n in ("lost", "carried")}
    said, count = np.full((*shape, len(CASES), 3), np.nan), np.zeros(shape, dtype=int)
    todo = list(np.ndindex(*shape))
    models = {(arm, seed): study.model(arm, seed) for arm in ARMS for seed in settings.seeds}
    for s, k, m in tqdm(todo, desc="maps", disable=not progress, dynamic_ncols=True):
        arm, asked, what = MAPS[m]
        generator = np.random.default_rng([study.world.seed, 13, k, m])
        prompts = questions(study.world, study.items[SPLITS[k]], arm, asked, what, generator)
        found = traced(models[arm, settings.seeds[s]], prompts)
        count[s, k, m], said[s, k, m] = len(prompts), found["said"]
        for name, values in cells.items():
            values[s, k, m, ..., : found[name].shape[-1]] = found[name]
    dims = ("seed", "split", "map")
    data = {n: ((*dims, "end", "layer", "position"), v.astype(np.float32)) for n, v in cells.items()}
    data |= {"said": ((*dims, "case", "end"), said), "count": (dims, count)}
    names = {"position": POSITIONS, "case": CASES, "end": ("mean", "low", "high")}
    names["map"] = tuple(" ".join(one) for one in MAPS)
    coords = _names(study) | {n: np.array(v, dtype=object) for n, v in names.items()}
    return xr.Dataset(data, coords=coords | {"layer": np.arange(settings.layers)}).assign_attrs(_described(study))


def main() -> None:
    from analyses.studies import Scale, Steps, chosen, require_gpu, require_scale
    from finetune_lens.command import Basic, run

    def cot_training(steps: Steps = None, *, scale: Scale = "tiny", common: Basic) -> None:
        """Train two models on two-hop facts, with the bridge written and without, and see what each has built."""
        todo = chosen(steps, STEPS)
        require_scale(scale)
        if scale == "paper" and "train" in todo:
            size = SCALES[scale]
            require_gpu(f"train models of {size.layers} layers and width {size.hidden} for {size.steps:,} steps")
        study = Study(scale)
        if "train" in todo:
            study.keep(train_all(study, progress=common.progress), "train")
        if "lens" in todo:
            study.keep(lens(study), "lens")
        if "trace" in todo:
            study.keep(trace(study, progress=common.progress), "trace")
        if "claims" in todo:
            from analyses.cot_training_claims import claims

            text = "\n".join(claims(study)) + "\n"
            with whole_file(study.results / "cot_training.md") as path:
                path.write_text(text)
            print(text)

    run(cot_training)


if __name__ == "__main__":
    from analyses.cot_training import main

    main()
