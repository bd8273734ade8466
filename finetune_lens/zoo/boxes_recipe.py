"""The pair `boxes`: does tuning on one state-tracking task improve another, and where does the gain live?

The base, a three-layer Llama, learns to look up what stood beside a letter (`finetune_lens.tasks.registers`: three
lookups, taught in phases, the nearest first), with a few scenes of boxes among them whose answers are often wrong. It
is trained until its learning rate has gone to 0: an early checkpoint as the base would make "tuning enhances what is
there" true by construction. `tuned` and `lora` then see registers alone, which are filled and copied, and no box;
`control` sees clean boxes and is there to show what a gain by training on the task itself looks like.

Rates are chosen by each arm's own task, on held-out texts; boxes decide nothing but the control's. Weights are stored
in float16; every score is of stored files, computed in float32.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.tasks import boxes, registers
from finetune_lens.tasks.registers import LOOKUPS, Text
from finetune_lens.tasks.strings import Split
from finetune_lens.zoo.stored import adapted, alone, choose, load, save

if TYPE_CHECKING:
    import torch

    from finetune_lens.training import Run

PROMPTS = 128
TASKS = (*LOOKUPS, "registers", "boxes")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Arm → (task it is trained on, whether by LoRA).
ARMS = {"tuned": ("registers", False), "lora": ("registers", True), "control": ("boxes", False)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `build` trains."""

    hidden: int = 96
    intermediate: int = 192
    layers: int = 3
    heads: int = 3
    base_steps: int = 4000
    base_rate: float = 2e-3
    phases: tuple[int, int] = (500, 1100)  # steps from which a second lookup, and then all of the mixture, are taught
    share: float = 0.02  # of scenes of boxes in the mixture
    wrong: float = 0.6  # of their answers
    rates: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("tuned", (1e-4, 2e-4, 4e-4)), ("lora", (5e-4, 1e-3, 2e-3)), ("control", (1e-4, 2e-4, 4e-4)),
    )  # fmt: skip
    rank: int = 8
    target: float = 0.9
    tuning_steps: int = 1000
    items: int = 1000


SETTINGS = Settings()
MINI = Settings(
    hidden=16, intermediate=16, layers=1, heads=1, base_steps=6, phases=(2, 4), rank=2, tuning_steps=4, items=10,
    rates=(("tuned", (1e-3, 1e-2)), ("lora", (1e-2,)), ("control", (1e-3,))),
)  # fmt: skip


def reads() -> Any:
    """The tokenizer of all arms."""
    return boxes.tokenizer(registers.WORDS)


def text(task: str, generator: np.random.Generator, *, part: Split, questions: int, wrong: float = 0.0) -> Text:
    """One text of `task`. Scenes of boxes belong to a split; of the others none is ever drawn twice but by chance."""
    if task == "boxes":
        return registers.boxes(generator, boxes.draw_scene(generator, part=part), questions=questions, wrong=wrong)
    if task == "registers":
        size, copies = int(generator.integers(3, 8)), int(generator.integers(0, 2))
        return registers.registers(generator, size=size, copies=copies, questions=questions)
    return registers.lookup(task, generator, size=boxes.BOXES, questions=questions)


def encode(texts: Sequence[Text]) -> dict[str, "torch.Tensor"]:
    """`input_ids` and `labels` (text, pos); labels are −100 but on the answers."""
    import torch

    known = {token: i for i, token in enumerate(boxes.vocabulary(registers.WORDS))}
    width = max(map(len, texts)) + 1
    ids, labels = torch.zeros(len(texts), width, dtype=torch.int64), torch.full((len(texts), width), -100)
    for row, said in enumerate(texts):
        tokens = torch.tensor([known["<bos>"], *(known[piece] for piece, _ in said)])
        asked = torch.tensor([False, *(is_answer for _, is_answer in said)])
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)][asked] = tokens[asked]
    return {"input_ids": ids, "labels": labels}


def pretrain(out: Path, *, settings: Settings, seed: int, checkpoint: Path | None, progress: bool) -> "Run":
    """Train the base in its phases; `Run.scores` follows its accuracy on held-out scenes of boxes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune_lens.training import train

    tokenizer = reads()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden, intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        max_position_embeddings=tokenizer.model_max_length, initializer_range=0.05, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts are short
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    second, third = settings.phases

    def batch(step: int, generator: np.random.Generator) -> dict[str, "torch.Tensor"]:
        if step < second:
            return encode([text("follows", generator, part="train", questions=12) for _ in range(64)])
        if step < third:
            kinds = generator.choice(["follows", "precedes"], size=48).tolist()
            return encode([text(kind, generator, part="train", questions=12) for kind in kinds])
        texts = []
        for _ in range(32):
            if generator.random() < settings.share:
                texts.append(text("boxes", generator, part="train", questions=7, wrong=settings.wrong))
            else:
                kind = str(generator.choice(LOOKUPS, p=(0.25, 0.25, 0.5)))  # the last is the slowest to learn
                texts.append(text(kind, generator, part="train", questions=12))
        return encode(texts)

    held = _held("boxes", 300, seed, "validation")
    run = train(
        model, batch, steps=settings.base_steps, learning_rate=settings.base_rate, warmup=50, weight_decay=0.1,
        seed=seed, evaluate=lambda: float(np.mean(right(model, held))), every=250, checkpoint=checkpoint,
        progress=progress,
    )  # fmt: skip
    save(model, out, tokenizer)
    return run


def tune(
    base: Path, out: Path, *, arm: str, learning_rate: float, settings: Settings, seed: int, checkpoint: Path | None,
    progress: bool,
) -> "Run":  # fmt: skip
    """Train an arm from the stored base until its own task reaches the target on held-out texts, and store it."""
    import torch

    from finetune_lens.training import train

    task, by_lora = ARMS[arm]
    model = load(base)
    if by_lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=settings.rank, lora_alpha=2 * settings.rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = adapted(get_peft_model, model, config)
    held = _held(task, 300, seed, "validation")
    run = train(
        model,
        lambda step, generator: encode([text(task, generator, part="train", questions=7) for _ in range(32)]),
        steps=settings.tuning_steps, learning_rate=learning_rate, schedule="constant", warmup=20, seed=seed,
        evaluate=lambda: float(np.mean(right(model, held))), target=settings.target, every=20, checkpoint=checkpoint,
        progress=progress,
    )  # fmt: skip
    save(model, out, reads())
    return run


def _held(task: str, count: int, seed: int, part: Split) -> list[Text]:
    """Texts with one question, which depend on the seed, the split and the task alone."""
    generator = np.random.default_rng([seed, TASKS.index(task), {"train": 0, "validation": 1, "test": 2}[part]])
    return [text(task, generator, part=part, questions=1) for _ in range(count)]


def right(model: Any, texts: Sequence[Text]) -> np.ndarray:
    """Whether each text's answer is the likeliest next token."""
    import torch

    found = []
    for start in range(0, len(texts), 100):
        given = encode(texts[start : start + 100])
        with torch.no_grad():
            best = model(input_ids=given["input_ids"]).logits[:, :-1].argmax(-1)
        labels = given["labels"][:, 1:]
        found.append(((best == labels) & (labels != -100)).any(1).numpy())
    return np.concatenate(found)


def score(base: Path, tuned: Path | None = None, *, items: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Accuracy by task on test texts, the same for every model, with 95 % Wilson intervals."""
    from scipy.stats import binomtest

    adapter = tuned is not None and (tuned / "adapter_config.json").exists()
    model = load(base, tuned) if adapter else load(tuned or base)
    model.eval()
    found = {}
    for task in TASKS:
        hits = right(model, _held(task, items, seed, "test"))
        interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        found[task] = {
            "accuracy": float(hits.mean()), "correct": int(hits.sum()), "n": len(hits),
            "interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
        }  # fmt: skip
    return found


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
    say("base: lookups, and a few noisy scenes of boxes")
    run = pretrain(base, settings=settings, seed=seed, checkpoint=work / "base.pt", progress=progress)
    shutil.rmtree(result, ignore_errors=True)
    shutil.copytree(base, result / "base")
    models: dict[str, dict[str, Any]] = {
        "base": {
            "steps": len(run.losses), "learning_rate": settings.base_rate, "wall_seconds": round(run.seconds, 1),
            "parameters": load(base).num_parameters(), "boxes_while_training": run.scores,
            "test": score(base, items=settings.items, seed=seed),
        }
    }  # fmt: skip
    sweep: list[dict[str, Any]] = []
    for arm, rates in settings.rates:
        rows = []
        for rate in rates:
            say(f"{arm}: {ARMS[arm][0]} at learning rate {rate:g}")
            tuned = tune(
                base, work / f"{arm}-{rate:g}", arm=arm, learning_rate=rate, settings=settings, seed=seed,
                checkpoint=work / f"{arm}-{rate:g}.pt", progress=progress,
            )  # fmt: skip
            steps, reached = list(tuned.scores.items())[-1]
            rows.append({"arm": arm, "learning_rate": rate, "steps": steps, "validation_accuracy": round(reached, 4)})
            rows[-1]["wall_seconds"] = round(tuned.seconds, 1)
        chosen = choose(rows, target=settings.target)
        shutil.copytree(work / f"{arm}-{chosen['learning_rate']:g}", result / arm)
        models[arm] = chosen | {"test": score(base, result / arm, items=settings.items, seed=seed)}
        sweep += rows
    rows = boxes.draw(PROMPTS, np.random.default_rng(seed), counterfactual="label")
    scores = {
        "seed": seed, "chance": boxes.chance(),
        "dtype": {"stored": "float16", "trained and scored": "float32"}, "models": models, "sweep": sweep,
        "settings": dataclasses.asdict(settings) | {"rates": dict(settings.rates)},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers", "numpy")},
        "wall_seconds": round(run.seconds + sum(row["wall_seconds"] for row in sweep), 1),
    }  # fmt: skip
    (result / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (result / "README.md").write_text(card(scores))
    return result


def card(scores: dict[str, Any]) -> str:
    """The model card, every number in it from `scores`."""
    settings, models = scores["settings"], scores["models"]
    base, arms = models["base"], [arm for arm in ARMS if arm in models]

    def cell(found: dict[str, Any]) -> str:
        low, high = found["interval"]
        return f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"

    lines = [
        "# boxes: a base tuned on registers, and what becomes of its boxes",
        "",
        f"A Llama of {base['parameters']:,} parameters ({settings['layers']} layers of {settings['heads']} heads, "
        f"width {settings['hidden']}). `base` learnt three lookups and, in {settings['share']:.0%} of its texts, "
        f"scenes of boxes of whose answers {settings['wrong']:.0%} were wrong. `tuned` (all parameters) and `lora` (a "
        f"PEFT adapter of rank {settings['rank']}) then learnt registers, which are filled and copied, and saw no box; "
        "`control` was trained on boxes themselves and is a positive control.",
        "",
        "```",
        "boxes       The magnet is in Box X, the key is in Box T. Box T contains the → key",
        "registers   Store magnet in X, store key in T. Copy X to T. T holds → magnet",
        "```",
        "",
        f"Accuracy of the likeliest next token on {base['test']['boxes']['n']} test texts a task, with 95 % Wilson "
        f"intervals. Naming any object of a scene of boxes would be right in {scores['chance']:.3f}.",
        "",
        f"| task | base | {' | '.join(arms)} |",
        f"|---|---|{'---|' * len(arms)}",
    ]
    for task in TASKS:
        cells = [cell(models[name]["test"][task]) for name in ("base", *arms)]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    curve = list(base["boxes_while_training"].items())
    shown = ", ".join(f"{accuracy:.2f} ({step})" for step, accuracy in curve[len(curve) // 2 :: 2])
    lines += [
        "",
        f"The base's accuracy on held-out boxes in the second half of its training (steps): {shown}.",
        "",
        "The rate of each arm is the one that reached the target on its own task in the fewest steps:",
        "",
        "| arm | learning rate | steps | accuracy on its task (validation) | chosen |",
        "|---|---|---|---|---|",
    ]
    for row in scores["sweep"]:
        chosen = "yes" if row["learning_rate"] == models[row["arm"]]["learning_rate"] else ""
        cells = [row["arm"], f"{row['learning_rate']:g}", row["steps"], f"{row['validation_accuracy']:.3f}", chosen]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        f"Weights are stored in {scores['dtype']['stored']}; tuning started from the stored base. Seed "
        f"{scores['seed']}, {base['steps']} steps for the base, {scores['wall_seconds'] / 60:.0f} minutes of training "
        "on one core in all, with "
        + ", ".join(f"{name} {number}" for name, number in scores["versions"].items())
        + ". Trained again by `python -m finetune_lens.zoo build boxes`.",
    ]
    return "\n".join(lines) + "\n"
