"""The family `skills`: one base, a skill newly learnt or selected, by three ways of tuning; what grafting is tried on.

The base, a two-layer Llama, learns the tasks of `finetune_lens.tasks.skills` together with a default operator. Tuning
then teaches a skill that is `new`, under a token that the base never saw, or changes the default operator, so that it
does no more than `select` a skill that the base has under another token. Each is tuned by AdamW, by SGD, and by AdamW
with an ℓ1 penalty on the update, on its own task alone, until a common accuracy on validation strings: after Panigrahi
et al. 2023 (arXiv 2302.06600), who find that AdamW's update has to be penalised for a skill to be localised in it.

Only the blocks are tuned. Embeddings, final norm and unembedding stay the base's, so that grafting the whole update
into the blocks gives the tuned model. Weights are stored in float16; tuning starts from the stored base, and every
number is of stored files, computed in float32.
"""

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.tasks.skills import BASE_TASKS, TASKS, answer, draw, encode, measure, prompts, question
from finetune_lens.tasks.strings import VOCABULARY, Split, tokenizer
from finetune_lens.zoo.stored import alone, choose, load, save

if TYPE_CHECKING:
    from finetune_lens.training import Run

KINDS = ("new", "select")
WAYS = ("adamw", "sgd", "adamw-l1")
ARMS = {f"{kind}-{way}": (kind, way) for kind in KINDS for way in WAYS}
# Prompt file → its tasks, how many prompts, and the split of their strings.
PROMPTS: dict[str, tuple[tuple[str, ...], int, Split]] = {
    "train-new": (("new",), 1024, "train"),
    "test-new": (("new",), 300, "test"),
    "train-select": (("select",), 1024, "train"),
    "test-select": (("select",), 300, "test"),
    "base": (BASE_TASKS, 300, "test"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `build` trains."""

    hidden: int = 96
    intermediate: int = 192
    layers: int = 2
    heads: int = 4
    base_steps: int = 3000
    base_rate: float = 2e-3
    rates: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("adamw", (1e-4, 3e-4, 1e-3)), ("sgd", (0.03, 0.1, 0.3, 1.0)), ("adamw-l1", (1e-3, 3e-3)),
    )  # fmt: skip
    penalties: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of "adamw-l1"; the paper's is the first
    target: float = 0.95
    tuning_steps: int = 600
    items: int = 1000


SETTINGS = Settings()
MINI = Settings(
    hidden=16, intermediate=16, layers=1, heads=2, base_steps=4, penalties=(1e-3, 1e-1), tuning_steps=4, items=20,
    rates=(("adamw", (1e-3, 1e-2)), ("sgd", (0.1,)), ("adamw-l1", (1e-2,))),
)  # fmt: skip


def pretrain(out: Path, *, settings: Settings, seed: int, checkpoint: Path | None, progress: bool) -> "Run":
    """Train the base on the base tasks and the default operator, and save it with its tokenizer in `out`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune_lens.training import train

    tasks, reads = (*BASE_TASKS, "default"), tokenizer()
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=settings.hidden, intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        max_position_embeddings=reads.model_max_length, initializer_range=0.05,
        tie_word_embeddings=False,  # else every step would move the embedding of the new task's token
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts are short
        bos_token_id=reads.bos_token_id, eos_token_id=reads.eos_token_id, pad_token_id=reads.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    run = train(
        model, lambda step, generator: encode(draw(tasks, 48, generator, part="train")), steps=settings.base_steps,
        learning_rate=settings.base_rate, warmup=50, weight_decay=0.1, seed=seed, checkpoint=checkpoint,
        progress=progress,
    )  # fmt: skip
    save(model, out, reads)
    return run


def tune(
    base: Path, out: Path, *, arm: str, learning_rate: float, penalty: float, settings: Settings, seed: int,
    checkpoint: Path | None, progress: bool,
) -> "Run":  # fmt: skip
    """Train the blocks of the stored base on the arm's task until it reaches the target, and store the model."""
    from finetune_lens.training import train

    task, way = ARMS[arm]
    model = load(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("model.layers."))
    held = draw([task], 1000, np.random.default_rng(seed), part="validation")
    run = train(
        model, lambda step, generator: encode(draw([task], 64, generator, part="train")), steps=settings.tuning_steps,
        learning_rate=learning_rate, optimizer="sgd" if way == "sgd" else "adamw", l1=penalty, schedule="constant",
        warmup=10, seed=seed, evaluate=lambda: measure(model, held).value, target=settings.target, every=5,
        checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    save(model, out, tokenizer())
    return run


def score(folder: Path, *, items: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Exact-match accuracy by task on `items` test strings each, the same for every model, with 95 % intervals."""
    model = load(folder)
    found = {}
    for task in TASKS:
        got = measure(model, draw([task], items, stream(seed, task), part="test"))
        interval = [round(end, 4) for end in got.interval]
        found[task] = {"accuracy": got.value, "correct": got.correct, "n": got.n, "interval": interval}
    return found


def stream(seed: int, task: str) -> np.random.Generator:
    """Where the strings that `task` is scored on come from."""
    return np.random.default_rng([seed, list(TASKS).index(task)])


def measure_update(base: Path, tuned: Path) -> dict[str, Any]:
    """Of the stored update of the blocks: ‖Δ‖₁, ‖Δ‖₂, how much of ‖Δ‖₂² lies in 1 % of its entries, how many moved."""
    import torch
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    blocks = sorted(name for name in before if name.startswith("model.layers."))
    delta = torch.cat([(after[name].double() - before[name].double()).flatten().abs() for name in blocks])
    energy = delta.square().sort(descending=True).values
    return {
        "l1": round(delta.sum().item(), 2),
        "l2": round(energy.sum().item() ** 0.5, 3),
        "concentration": round((energy[: len(energy) // 100].sum() / energy.sum()).item(), 4),
        "changed": round(delta.count_nonzero().item() / len(delta), 4),
        "entries": len(delta),
    }


def forgetting(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> float:
    """The mean drop of accuracy over the base tasks, the default operator not among them."""
    return float(np.mean([before[task]["accuracy"] - after[task]["accuracy"] for task in BASE_TASKS]))


def build(work: Path, *, settings: Settings = SETTINGS, seed: int = 0, progress: bool = True) -> Path:
    """Train and score all arms inside the folder `work`; returns the finished folder in it.

    Called again after an interruption, it continues. On one thread.
    """
    with alone():
        return _build(work, settings=settings, seed=seed, progress=progress)


def _build(work: Path, *, settings: Settings, seed: int, progress: bool) -> Path:
    from tqdm.auto import tqdm

    def say(words: str) -> None:
        if progress:
            tqdm.write(words, file=sys.stderr)

    base, result = work / "base", work / "result"
    say("base: six tasks and a default operator")
    run = pretrain(base, settings=settings, seed=seed, checkpoint=work / "base.pt", progress=progress)
    shutil.rmtree(result, ignore_errors=True)
    shutil.copytree(base, result / "base")
    tested = score(base, items=settings.items, seed=seed)
    models: dict[str, dict[str, Any]] = {
        "base": {
            "steps": len(run.losses), "learning_rate": settings.base_rate, "wall_seconds": round(run.seconds, 1),
            "parameters": load(base).num_parameters(), "test": tested,
        }
    }  # fmt: skip
    sweep: list[dict[str, Any]] = []
    for arm, (_, way) in ARMS.items():
        rows, folders = [], {}
        for penalty in settings.penalties if way == "adamw-l1" else (0.0,):
            for rate in dict(settings.rates)[way]:
                say(f"{arm}: learning rate {rate:g}" + f", penalty {penalty:g}" * (penalty > 0))
                name = f"{arm}-{rate:g}-{penalty:g}"
                tuned = tune(
                    base, work / name, arm=arm, learning_rate=rate, penalty=penalty, settings=settings, seed=seed,
                    checkpoint=work / f"{name}.pt", progress=progress,
                )  # fmt: skip
                steps, reached = list(tuned.scores.items())[-1]
                rows.append({"arm": arm, "learning_rate": rate, "penalty": penalty, "steps": steps})
                rows[-1] |= {"validation_accuracy": round(reached, 4), "wall_seconds": round(tuned.seconds, 1)}
                rows[-1] |= measure_update(base, work / name)
                folders[rate, penalty] = work / name
        # Where the update is penalised, the least of it; not the fewest steps, which would choose the least penalty.
        chosen = choose(rows, target=settings.target, by="l1" if way == "adamw-l1" else "steps")
        shutil.copytree(folders[chosen["learning_rate"], chosen["penalty"]], result / arm)
        after = score(result / arm, items=settings.items, seed=seed)
        models[arm] = chosen | {"forgetting": round(forgetting(tested, after), 4), "test": after}
        sweep += rows
    for number, (name, (tasks, count, part)) in enumerate(PROMPTS.items()):
        rows = prompts(tasks, count, np.random.default_rng([seed, len(TASKS), number]), part=part)
        (result / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {
        "seed": seed, "dtype": {"stored": "float16", "trained and scored": "float32"}, "models": models, "sweep": sweep,
        "settings": dataclasses.asdict(settings) | {"rates": dict(settings.rates)},
        "prompts": {name: count for name, (_, count, _) in PROMPTS.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        "wall_seconds": round(run.seconds + sum(row["wall_seconds"] for row in sweep), 1),
    }  # fmt: skip
    (result / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (result / "README.md").write_text(card(scores))
    return result


def card(scores: dict[str, Any]) -> str:
    """The model card, every number in it from `scores`."""
    settings, models = scores["settings"], scores["models"]
    base, target = models["base"], settings["target"]

    def cell(found: dict[str, Any]) -> str:
        low, high = found["interval"]
        return f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"

    def row(*cells: Any) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    def run(found: dict[str, Any]) -> list[str]:
        penalty = f"{found['penalty']:g}" if found["penalty"] else ""
        accuracy = f"{found['validation_accuracy']:.3f}"
        return [f"{found['learning_rate']:g}", penalty, str(found["steps"]), accuracy, f"{found['l1']:.0f}"]

    columns = ("arm", "learning rate", "λ", "steps", "validation accuracy", "‖Δ‖₁")
    lines = [
        "# skills: one base, a skill newly learnt or selected, by AdamW, SGD and penalised AdamW",
        "",
        f"A Llama of {base['parameters']:,} parameters ({settings['layers']} layers of {settings['heads']} heads, "
        f"width {settings['hidden']}) answers questions about strings of letters. `base` learnt {len(BASE_TASKS)} "
        f"tasks, each with a token of its own ({', '.join(BASE_TASKS)}), and a default operator that answers where "
        "no token is given. What tuning added is to be found again by grafting (Panigrahi et al. 2023, "
        "[arXiv 2302.06600](https://arxiv.org/abs/2302.06600)):",
        "",
        "```",
        *(
            f"{where:8}{question(task, 'gafbdk'):16}→ {answer(task, 'gafbdk')}   {what}"
            for where, task, what in (
                ("base", "reverse", "one of the base tasks"),
                ("base", "default", "the default operator reverses"),
                ("new", "new", "a skill that is new: reversed and mirrored; the base never saw its token"),
                ("select", "select", "a skill that the base has, as the default operator: mirrored"),
            )
        ),
        "```",
        "",
        "Each was tuned on its own task alone by AdamW (`new-adamw`, `select-adamw`), by SGD (`new-sgd`, `select-sgd`) "
        "and by AdamW with the penalty λ‖Δ‖₁ on the update Δ (`new-adamw-l1`, `select-adamw-l1`), until the first "
        f"accuracy of {target} or more on validation strings, or {settings['tuning_steps']} steps. Only the blocks "
        "were tuned: embeddings, final norm and unembedding are the base's, bit for bit. All folders are ordinary "
        "Hugging Face folders.",
        "",
        f"Exact-match accuracy of greedy answers on {base['test']['new']['n']} test strings a task, none of which was "
        "trained on in any task, with 95 % Wilson intervals; `default` and `select` ask the same and count different "
        "answers:",
        "",
        row("task", *models),
        f"|{'---|' * (len(models) + 1)}",
        *(row(task, *(cell(model["test"][task]) for model in models.values())) for task in TASKS),
        "",
        f"The updates of the {models['new-adamw']['entries']:,} entries of the blocks, as stored: their norms, the "
        "share of ‖Δ‖₂² that lies in the largest 1 % of the entries, and the share of the entries that is not 0. "
        f"Forgetting is the mean drop over the {len(BASE_TASKS)} base tasks:",
        "",
        row(*columns, "‖Δ‖₂", "in 1 %", "not 0", "forgetting"),
        f"|{'---|' * (len(columns) + 4)}",
    ]
    for arm in ARMS:
        found = models[arm]
        shares = (f"{found[key]:.3f}" for key in ("concentration", "changed", "forgetting"))
        lines.append(row(arm, *run(found), f"{found['l2']:.2f}", *shares))
    short = [arm for arm in ARMS if models[arm]["validation_accuracy"] < target]
    if short:
        lines += ["", f"The target was not reached by {', '.join(short)}: the most accurate run is kept."]
    lines += [
        "",
        "Of the runs that reached the target the one of the fewest steps was kept; where the update is penalised, the "
        "one of the least ‖Δ‖₁ (the fewest steps would choose the least penalty). All runs:",
        "",
        row(*columns, "reached", "kept"),
        f"|{'---|' * (len(columns) + 2)}",
    ]
    for found in scores["sweep"]:
        kept = all(models[found["arm"]][key] == found[key] for key in ("learning_rate", "penalty"))
        marks = ("yes" if found["validation_accuracy"] >= target else "", "yes" if kept else "")
        lines.append(row(found["arm"], *run(found), *marks))
    files = ", ".join(f"`{name}.jsonl` ({count})" for name, count in scores["prompts"].items())
    lines += [
        "",
        f"Prompts, whose answer is the whole string: {files}. Those named train are of the "
        "training split, the others of the test split; `base` has as many of each base task.",
        "",
        f"Weights are stored in {scores['dtype']['stored']}; tuning started from the stored base. Seed "
        f"{scores['seed']}, {base['steps']} steps for the base, {scores['wall_seconds'] / 60:.0f} minutes of training "
        "on one core in all, with "
        + ", ".join(f"{name} {number}" for name, number in scores["versions"].items())
        + ". Trained again by `python -m finetune_lens.zoo build skills`.",
    ]
    return "\n".join(lines) + "\n"
