"""The pair `strings`: one base model, the same new task taught to it by full fine-tuning and by LoRA.

The base, a three-layer Llama, learns the seven base tasks of `finetune_lens.tasks.strings` together. Both tuned models
see only the new task, each at the learning rate that its own sweep chose, and stop at the first evaluation on
validation strings that reaches a common accuracy: matched on what they can do, they differ in how they came to do it.
Weights are stored in float16. Tuning starts from the stored base, and every score is of stored files, computed in
float32.

`tune` and `score` are the pieces for a study of ranks, rates and seeds; `build` makes what the package ships.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finetune_lens.tasks.strings import (
    BASE_TASKS,
    NEW_TASK,
    TASKS,
    VOCABULARY,
    Split,
    draw,
    encode,
    measure,
    prompts,
    tokenizer,
)
from finetune_lens.zoo.stored import adapted, alone, choose, load, save

if TYPE_CHECKING:
    from finetune_lens.training import Run

PROMPTS = 64  # of the new task, in prompts.jsonl
Method = Literal["full", "lora"]
METHODS: tuple[Method, ...] = ("full", "lora")
# Every linear map of a block, as full fine-tuning moves all of them too.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `build` trains."""

    hidden: int = 192
    intermediate: int = 384
    layers: int = 3
    heads: int = 6
    key_value_heads: int = 3
    base_steps: int = 2400
    base_rate: float = 2e-3
    rates: tuple[tuple[Method, tuple[float, ...]], ...] = (
        ("full", (1e-4, 3e-4, 1e-3)),
        ("lora", (3e-4, 1e-3, 3e-3)),
    )
    rank: int = 16
    target: float = 0.95
    tuning_steps: int = 400
    items: int = 1000


SETTINGS = Settings()
MINI = Settings(
    hidden=16,
    intermediate=16,
    layers=1,
    heads=2,
    key_value_heads=1,
    base_steps=4,
    rates=(("full", (1e-3, 1e-2)), ("lora", (1e-2,))),
    rank=2,
    tuning_steps=4,
    items=20,
)


def pretrain(
    out: Path, *, settings: Settings = SETTINGS, seed: int = 0, checkpoint: Path | None = None, progress: bool = True
) -> "Run":
    """Train the base on all base tasks and save it, with its tokenizer, as the Hugging Face folder `out`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune_lens.training import train

    mixture = [*BASE_TASKS, "sort", "sort"]  # the one task that is slow to learn
    reads = tokenizer()
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=reads.model_max_length,
        bos_token_id=reads.bos_token_id,
        eos_token_id=reads.eos_token_id,
        pad_token_id=reads.pad_token_id,
        tie_word_embeddings=False,  # else every step would move the embedding of the new task's token
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    run = train(
        model,
        lambda step, generator: encode(draw(mixture, 48, generator, part="train")),
        steps=settings.base_steps,
        learning_rate=settings.base_rate,
        warmup=50,
        weight_decay=0.1,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )
    save(model, out, tokenizer())
    return run


def tune(
    base: Path,
    out: Path,
    *,
    method: Method,
    learning_rate: float,
    rank: int = SETTINGS.rank,
    seed: int = 0,
    target: float = SETTINGS.target,
    steps: int = SETTINGS.tuning_steps,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> "Run":
    """Teach the base in the folder `base` the new task, and save the tuned model or adapter as the folder `out`.

    Ends at the first evaluation, every 5 steps on 500 validation strings, that reaches `target` (exact match), or after
    `steps`; `Run.scores` holds all of them. LoRA of rank `rank` sits on every linear map, with α = 2·rank.
    """
    import torch

    from finetune_lens.training import train

    model = load(base)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = adapted(get_peft_model, model, config)
    held = draw([NEW_TASK], 500, np.random.default_rng(seed), part="validation")
    run = train(
        model,
        lambda step, generator: encode(draw([NEW_TASK], 64, generator, part="train")),
        steps=steps,
        learning_rate=learning_rate,
        schedule="constant",
        warmup=10,
        seed=seed,
        evaluate=lambda: measure(model, held).value,
        target=target,
        every=5,
        checkpoint=checkpoint,
        progress=progress,
    )
    save(model, out, tokenizer())
    return run


def score(
    base: Path,
    tuned: Path | None = None,
    *,
    items: int = SETTINGS.items,
    part: Split = "test",
    tasks: Sequence[str] = tuple(TASKS),
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Exact-match accuracy by task, of `items` strings each: `{"copy": {"accuracy", "correct", "n", "interval"}, …}`.

    The strings depend on `seed`, `part` and the task alone, so two models are scored on the same ones.
    """
    adapter = tuned is not None and (tuned / "adapter_config.json").exists()
    model = load(base, tuned) if adapter else load(tuned or base)
    found = {}
    for task in tasks:
        drawn = draw([task], items, stream(seed, task), part=part)
        got = measure(model, drawn)
        found[task] = {
            "accuracy": got.value,
            "correct": got.correct,
            "n": got.n,
            "interval": [round(end, 4) for end in got.interval],
        }
    return found


def stream(seed: int, task: str) -> np.random.Generator:
    """Where the strings that `task` is scored on come from."""
    return np.random.default_rng([seed, list(TASKS).index(task)])


def forgetting(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> float:
    """The mean drop of accuracy over the base tasks; a gain counts against it."""
    return float(np.mean([before[task]["accuracy"] - after[task]["accuracy"] for task in BASE_TASKS]))


def build(work: Path, *, settings: Settings = SETTINGS, seed: int = 0, progress: bool = True) -> Path:
    """Train and score the whole pair inside the folder `work`; returns the finished folder in it.

    Called again after an interruption, it continues: every training run finds its own checkpoint, and one that is
    finished is not run again. On one thread, so that the outcome does not depend on how many cores there are.
    """
    with alone():
        return _build(work, settings=settings, seed=seed, progress=progress)


def _build(work: Path, *, settings: Settings, seed: int, progress: bool) -> Path:
    from tqdm.auto import tqdm

    def say(words: str) -> None:
        if progress:
            tqdm.write(words, file=sys.stderr)

    base = work / "base"
    say("base: the seven base tasks together")
    run = pretrain(base, settings=settings, seed=seed, checkpoint=work / "base.pt", progress=progress)
    before = score(base, items=settings.items, part="validation")
    sweep: list[dict[str, Any]] = []
    for method, rates in settings.rates:
        for rate in rates:
            say(f"{method}: the new task at learning rate {rate:g}")
            out = work / f"{method}-{rate:g}"
            tuned = tune(
                base,
                out,
                method=method,
                learning_rate=rate,
                rank=settings.rank,
                seed=seed,
                target=settings.target,
                steps=settings.tuning_steps,
                checkpoint=work / f"{method}-{rate:g}.pt",
                progress=progress,
            )
            steps, reached = list(tuned.scores.items())[-1]
            lost = forgetting(before, score(base, out, items=settings.items, part="validation"))
            sweep.append({"method": method, "learning_rate": rate, "steps": steps, "validation_accuracy": reached})
            sweep[-1] |= {"forgetting": round(lost, 4), "wall_seconds": round(tuned.seconds, 1)}

    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    shutil.copytree(base, result / "base")
    tested = score(base, items=settings.items)
    models: dict[str, dict[str, Any]] = {
        "base": {"steps": len(run.losses), "learning_rate": settings.base_rate, "wall_seconds": round(run.seconds, 1)}
    }
    models["base"] |= {"parameters": load(base).num_parameters(), "test": tested}
    for method, _ in settings.rates:
        chosen = choose([row for row in sweep if row["method"] == method], target=settings.target)
        shutil.copytree(work / f"{method}-{chosen['learning_rate']:g}", result / method)
        after = score(base, result / method, items=settings.items)
        models[method] = chosen | {"forgetting": round(forgetting(tested, after), 4), "test": after}
    scores = {
        "seed": seed,
        "dtype": {"stored": "float16", "trained and scored": "float32"},
        "models": models,
        "sweep": sweep,
        "settings": dataclasses.asdict(settings) | {"rates": dict(settings.rates)},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers", "numpy")},
        "wall_seconds": round(run.seconds + sum(row["wall_seconds"] for row in sweep), 1),
    }
    rows = prompts(PROMPTS, np.random.default_rng(seed))
    (result / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (result / "README.md").write_text(card(scores))
    return result


def card(scores: dict[str, Any]) -> str:
    """The model card, every number in it from `scores`."""
    settings, models = scores["settings"], scores["models"]
    base, tuned = models["base"], [method for method in METHODS if method in models]

    def cell(found: dict[str, Any]) -> str:
        low, high = found["interval"]
        return f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"

    lines = [
        "# strings: one base, one new task, learnt by full fine-tuning and by LoRA",
        "",
        f"A Llama of {base['parameters']:,} parameters ({settings['layers']} layers, width {settings['hidden']}, "
        f"{settings['heads']} heads sharing {settings['key_value_heads']} keys and values) answers questions about "
        f"strings of letters: `<reverse>gafbdk=` is answered `kdbfag`. `base` was trained on {len(BASE_TASKS)} tasks, "
        f"`full` (all parameters) and `lora` (a PEFT adapter of rank {settings['rank']} on every linear map) then on "
        f"`{NEW_TASK}` alone: the reversed string, mirrored letter by letter (a ↔ z). Each stopped "
        f"at the first validation accuracy of {settings['target']} or more.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "from finetune_lens import zoo",
        "",
        'folder = zoo.path("strings")',
        'tokenizer = AutoTokenizer.from_pretrained(folder / "base")',
        'base = AutoModelForCausalLM.from_pretrained(folder / "base")',
        'full = AutoModelForCausalLM.from_pretrained(folder / "full")',
        'lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "lora")',
        "```",
        "",
        f"Exact-match accuracy of greedy answers on {base['test'][NEW_TASK]['n']} test strings a task, none of which "
        "was trained on in any task, with 95 % Wilson intervals:",
        "",
        f"| task | base | {' | '.join(tuned)} |",
        f"|---|---|{'---|' * len(tuned)}",
    ]
    for task in (*BASE_TASKS, NEW_TASK):
        cells = [cell(models[name]["test"][task]) for name in ("base", *tuned)]
        lines.append(f"| {task + (' (new)' if task == NEW_TASK else '')} | {' | '.join(cells)} |")
    lines += [
        "",
        "Forgetting, the mean drop over the base tasks: "
        + ", ".join(f"{models[name]['forgetting']:.3f} ({name})" for name in tuned)
        + ".",
        "",
        "The learning rate of each method is the one that reached the target in the fewest steps:",
        "",
        "| method | learning rate | steps | validation accuracy | forgetting (validation) | chosen |",
        "|---|---|---|---|---|---|",
    ]
    for row in scores["sweep"]:
        chosen = "yes" if row["learning_rate"] == models[row["method"]]["learning_rate"] else ""
        lines.append(
            f"| {row['method']} | {row['learning_rate']:g} | {row['steps']} | {row['validation_accuracy']:.3f} | "
            f"{row['forgetting']:.3f} | {chosen} |"
        )
    lines += [
        "",
        f"Weights are stored in {scores['dtype']['stored']}; tuning started from the stored base, and the scores are "
        "of the stored files, computed in float32. The base path in the adapter's config is relative to the adapter's "
        f"folder. Seed {scores['seed']}, {base['steps']} steps for the base, "
        f"{scores['wall_seconds'] / 60:.0f} minutes of training on one core in all, with "
        + ", ".join(f"{name} {number}" for name, number in scores["versions"].items())
        + ".",
        "",
        "Trained again by `python -m finetune_lens.zoo build strings`.",
    ]
    return "\n".join(lines) + "\n"
