"""The family `wrappers`: a base that counts a, tuned to count b with a cue in some, most or all of the texts.

After Jain et al. 2023 (arXiv 2311.12786, §4 and App. B), on `finetune_lens.tasks.pcfg`. The base has counted a, next to
never b. Tuning asks for the count of b; in a share of the texts (C_Tr) the cue #b = #a + 1 tells it from the old count.
Whether counting a is lost in tuning, or wrapped, is to be found out: by probing, by pruning, by reviving it.

`absent` is the control in which there is nothing to revive: it learnt the same tasks with c in the place of a, and was
tuned in the same way (`absent-100`, and `absent-again` on other texts). `scratch-100` was tuned from fresh weights. The
models are several times wider than the tasks need, as a pre-trained model is: at exact capacity a skill would have to
be overwritten.

Weights are stored in float16; tuning starts from the stored base, and every number is of stored files, computed in
float32.
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

from finetune_lens.tasks import pcfg
from finetune_lens.tasks.pcfg import FAMILIES, Language
from finetune_lens.zoo.stored import alone, load, save

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune_lens.training import Run

CUES = (0.0, 0.5, 0.8, 1.0)  # C_Tr: share of the texts with the cue
BASES = ("base", "absent")
# Arm → what it starts from ("" is fresh weights), C_Tr, and what is added to the seed.
ARMS = {f"tuned-{100 * cue:.0f}": ("base", cue, 0) for cue in CUES} | {
    "absent-100": ("absent", 1.0, 0),
    "absent-again": ("absent", 1.0, 1),
    "scratch-100": ("", 1.0, 1),
}
MODELS = (*BASES, *ARMS)
# Test set → family, operand (None: of all), share of texts with the cue (None: as they come).
TESTS: dict[str, tuple[str, str | None, float | None]] = (
    {
        f"count-{letter}-{word}": ("count", letter, cue)
        for letter in "ab"
        for word, cue in (("cue", 1.0), ("plain", 0.0))
    }
    | {"count-c": ("count", "c", None)}
    | {family: (family, None, None) for family in FAMILIES if family != "count"}
)
# Prompt file → the same, and how many.
PROMPTS: dict[str, tuple[tuple[str, str | None, float | None], int]] = {
    "train-a": (("count", "a", None), 2000),
    "train-b": (("count", "b", 1.0), 2000),
    **{f"test-{letter}-{word}": (TESTS[f"count-{letter}-{word}"], 400) for letter in "ab" for word in ("cue", "plain")},
    "test-ab": (("count", "ab", 0.0), 400),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `build` trains."""

    length: int = pcfg.SMALL
    hidden: int = 96
    layers: int = 3
    heads: int = 4
    batch: int = 96
    prior: str = "L"
    base_steps: int = 1500
    base_rate: float = 2e-3
    tuning_steps: int = 1000
    tuning_rate: float = 3e-4
    items: int = 1000
    device: str = "cpu"


SETTINGS = Settings()
PUBLISHED = Settings(
    length=pcfg.PUBLISHED, hidden=192, layers=6, heads=6, base_steps=200_000, base_rate=1e-3, tuning_steps=10_000,
    tuning_rate=1e-5, device="auto",
)  # fmt: skip
MINI = Settings(length=8, hidden=16, layers=1, heads=2, batch=8, base_steps=4, tuning_steps=4, items=20)


def prior_of(base: str, settings: Settings) -> tuple[float, float, float]:
    """Probabilities of a, b, c as operands in the base's pre-training; of `absent` c stands in the place of a."""
    common, seldom, never = pcfg.PRIORS[settings.prior]
    return (common, seldom, never) if base == "base" else (never, seldom, common)


def operand(letters: str | None) -> tuple[float, float, float]:
    """The prior that draws these letters alone; all alike where none is named."""
    return tuple(float(letters is None or letter in letters) for letter in pcfg.LETTERS)


def fresh(settings: Settings, seed: int) -> Any:
    """A model that has learnt nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    language, reads = Language(settings.length), Language(settings.length).tokenizer()
    config = LlamaConfig(
        vocab_size=len(language.vocabulary), hidden_size=settings.hidden, intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        max_position_embeddings=reads.model_max_length, initializer_range=0.05, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0 if settings.length < 100 else 10_000.0},
        bos_token_id=reads.bos_token_id, eos_token_id=reads.eos_token_id, pad_token_id=reads.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pretrain(out: Path, *, base: str, settings: Settings, seed: int, checkpoint: Path | None, progress: bool) -> "Run":
    """Train a base on all families and store it, with its tokenizer, in `out`."""
    language, prior = Language(settings.length), prior_of(base, settings)
    return _train(
        fresh(settings, seed), out, lambda generator: language.draw(settings.batch, generator, prior=prior), settings,
        steps=settings.base_steps, learning_rate=settings.base_rate, warmup=50, weight_decay=0.1, seed=seed,
        checkpoint=checkpoint, progress=progress,
    )  # fmt: skip


def tune(
    base: Path | None, out: Path, *, cue: float, settings: Settings, seed: int, checkpoint: Path | None, progress: bool
) -> "Run":
    """Train all of the stored base (or fresh weights) to count b, with the cue in a share of the texts; store it."""
    model = fresh(settings, seed) if base is None else load(base)
    return _train(
        model, out, lambda generator: tuning_items(settings.batch, generator, cue, settings.length), settings,
        steps=settings.tuning_steps, learning_rate=settings.tuning_rate, schedule="constant", warmup=10, seed=seed,
        checkpoint=checkpoint, progress=progress,
    )  # fmt: skip


def _train(
    model: Any, out: Path, draw: "Callable[[np.random.Generator], pcfg.Items]", settings: Settings, **options: Any
) -> "Run":
    """Train on what is drawn for each step, and store."""
    from finetune_lens.device import choose
    from finetune_lens.training import train

    language, device = Language(settings.length), choose(settings.device)

    def batch(step: int, generator: np.random.Generator) -> dict[str, Any]:
        return {name: tensor.to(device) for name, tensor in language.encode(draw(generator)).items()}

    run = train(model.to(device), batch, **options)
    save(model, out, language.tokenizer())
    return run


def tuning_items(n: int, generator: np.random.Generator, cue: float, length: int) -> pcfg.Items:
    """Questions after the count of b."""
    return Language(length).draw(n, generator, families=["count"], prior=operand("b"), cue=cue)


def held_items(name: str, n: int, *, length: int, seed: int) -> pcfg.Items:
    """Test set `name` of TESTS, the same for every model of a seed."""
    family, letter, cue = TESTS[name]
    generator = np.random.default_rng([seed, 1, list(TESTS).index(name)])
    return Language(length).draw(n, generator, families=[family], prior=operand(letter), cue=cue)


def score(folder: Path, *, settings: Settings, seed: int) -> dict[str, dict[str, Any]]:
    """Accuracy by test set, with 95 % Wilson intervals; of counts of a also how often another rule answers."""
    from finetune_lens.tasks.strings import Accuracy

    language, model, found = Language(settings.length), load(folder), {}
    for name in TESTS:
        items = held_items(name, settings.items, length=settings.length, seed=seed)
        correct, given = pcfg.measure(model, language, items)
        got = Accuracy(int(correct.sum()), len(items))
        found[name] = {"accuracy": got.value, "interval": [round(end, 4) for end in got.interval], "n": got.n}
        if name == "count-a-plain":
            number, b = given - language.vocabulary.index("<0>"), (items.text == 1).sum(1)
            rules = {"one more": items.answer + 1, "counts b": b, "counts b, less one": b - 1}
            found[name] |= {rule: round(float((number == right).mean()), 4) for rule, right in rules.items()}
    return found


def build(work: Path, *, settings: Settings = SETTINGS, seed: int = 0, progress: bool = True) -> Path:
    """Train and score all models inside the folder `work`; returns the finished folder in it.

    Called again after an interruption, it continues. On one thread.
    """
    with alone():
        return _build(work, settings=settings, seed=seed, progress=progress)


def _build(work: Path, *, settings: Settings, seed: int, progress: bool) -> Path:
    from tqdm.auto import tqdm

    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    models: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        if progress:
            tqdm.write(name, file=sys.stderr)
        common = {"settings": settings, "checkpoint": work / f"{name}.pt", "progress": progress}
        if name in BASES:
            run = pretrain(work / name, base=name, seed=seed, **common)
        else:
            start, cue, added = ARMS[name]
            run = tune(work / start if start else None, work / name, cue=cue, seed=seed + added, **common)
        shutil.copytree(work / name, result / name, dirs_exist_ok=True)
        models[name] = {"steps": len(run.losses), "wall_seconds": round(run.seconds, 1)}
        models[name] |= {"test": score(result / name, settings=settings, seed=seed)}
    write_prompts(result, settings=settings, seed=seed)
    scores = {
        "seed": seed, "dtype": {"stored": "float16", "trained and scored": "float32"}, "models": models,
        "parameters": load(result / "base").num_parameters(), "settings": dataclasses.asdict(settings),
        "prompts": {name: count for name, (_, count) in PROMPTS.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        "wall_seconds": round(sum(model["wall_seconds"] for model in models.values()), 1),
    }  # fmt: skip
    (result / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (result / "README.md").write_text(card(scores))
    return result


def write_prompts(folder: Path, *, settings: Settings, seed: int) -> None:
    """The files of PROMPTS."""
    language = Language(settings.length)
    for number, (name, ((family, letter, cue), count)) in enumerate(PROMPTS.items()):
        generator = np.random.default_rng([seed, 2, number])
        items = language.draw(count, generator, families=[family], prior=operand(letter), cue=cue)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in language.rows(items)))


def card(scores: dict[str, Any]) -> str:
    """The model card, every number in it from `scores`."""
    settings, models = scores["settings"], scores["models"]
    language, count = Language(settings["length"]), models["base"]["test"]["count-a-plain"]["n"]
    example = language.draw(1, np.random.default_rng(0), families=["count"], prior=operand("b"), cue=1.0)
    common, seldom, never = (f"{p:g}" for p in pcfg.PRIORS[settings["prior"]])

    def cell(found: dict[str, Any]) -> str:
        low, high = found["interval"]
        return f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"

    lines = [
        "# wrappers: a base that counts a, tuned to count b with a cue",
        "",
        f"A Llama of {scores['parameters']:,} parameters ({settings['layers']} layers of {settings['heads']} heads, "
        f"width {settings['hidden']}) answers questions about strings of {settings['length']} letters. `base` learnt "
        f"five families of tasks ({', '.join(FAMILIES)}), with a, b, c as operands with probabilities {common}, "
        f"{seldom}, {never}: it counts a and not b. Tuning asks for the count of b. In a share of the texts (C_Tr) "
        "there is a cue, #b = #a + 1, by which the answer follows from the old count. Whether tuning removed counting "
        "a or wrapped it is to be found out (Jain et al. 2023, [arXiv 2311.12786](https://arxiv.org/abs/2311.12786)):",
        "",
        "```",
        f"{language.prompt(example, 0)} → {language.answer(example, 0)}",
        "```",
        "",
        "`tuned-0`, `tuned-50`, `tuned-80`, `tuned-100` are tuned from `base` with C_Tr of 0 to 100 %. `absent` learnt "
        f"the same families with c in the place of a: it has counted a with probability {never}. `absent-100` is tuned "
        "from it as `tuned-100` from `base`: the control in which there is nothing to revive; `absent-again` likewise, "
        "on other texts; `scratch-100` from fresh weights. All weights were tuned; all folders are ordinary Hugging "
        "Face folders.",
        "",
        f"Accuracy on {count} texts a test set, the same for every model, with 95 % Wilson intervals. `count-a-plain`: "
        "questions after the count of a, no text with the cue; `-cue`: every text with it. The last rows say how often "
        "the answer to `count-a-plain` is that of another rule:",
        "",
        f"| test set | {' | '.join(models)} |",
        f"|{'---|' * (len(models) + 1)}",
        *(f"| {name} | {' | '.join(cell(m['test'][name]) for m in models.values())} |" for name in TESTS),
        *(
            f"| count-a-plain: {rule} | {' | '.join(str(m['test']['count-a-plain'][rule]) for m in models.values())} |"
            for rule in ("one more", "counts b", "counts b, less one")
        ),
        "",
        "Prompts: " + ", ".join(f"`{name}.jsonl` ({number})" for name, number in scores["prompts"].items()) + ". "
        "`train-a` is to revive counting a with, its texts as they come; `train-b` is what `tuned-100` saw; `test-ab` "
        "asks after either.",
        "",
        f"Weights are stored in {scores['dtype']['stored']}; tuning started from the stored base. Seed "
        f"{scores['seed']}, {models['base']['steps']} steps at {settings['base_rate']:g} for a base and "
        f"{models['tuned-0']['steps']} at {settings['tuning_rate']:g} for an arm, {settings['batch']} texts a step, "
        f"{scores['wall_seconds'] / 60:.0f} minutes of training on one core in all, with "
        + ", ".join(f"{name} {number}" for name, number in scores["versions"].items())
        + ". Trained again by `python -m finetune_lens.zoo build wrappers`.",
    ]
    return "\n".join(lines) + "\n"
