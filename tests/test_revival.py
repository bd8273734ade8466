"""Revival against training by hand and naive loops; what is planted returns fast; interrupted runs continue."""

import copy
import json

import numpy as np
import pytest
import torch
from test_check import adapter_folder, command
from test_patching import LETTERS, letters

import finetune_lens as fl
from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.evaluation import measure, read_examples
from finetune_lens.hooked import HookedModel
from finetune_lens.results.revival import Revival, _bounds, _resampled, steps_to
from finetune_lens.revival import follow, log_steps
from finetune_lens.revival.starts import Training, fresh, mistaught, owned, permuted, with_lora
from finetune_lens.training import train

WORDS = tuple(LETTERS)[1:27]


def after(letter):
    return WORDS[(WORDS.index(letter) + 1) % 26]


def rows(count=40, seed=0):
    """The letter after the last one."""
    drawn = np.random.default_rng(seed).choice(list(WORDS), size=(count, 3))
    return [{"prompt": "".join(word), "answer": after(word[-1])} for word in drawn]


HELD = rows(60, 9)


@pytest.fixture(scope="module")
def models(library, tmp_path_factory):
    """A base that knows the task; the same with one unembedding row that always wins; one that never knew it."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=32, initializer_range=0.2, pad_token_id=0)
    made = {}
    for name, seed in (("base", 0), ("other", 1)):
        torch.manual_seed(seed)
        made[name] = transformers.AutoModelForCausalLM.from_config(config).eval()

    def batch(step, generator):
        ids = torch.from_numpy(generator.integers(1, 27, size=(64, 3)))
        target = (ids[:, -1:] % 26) + 1
        labels = torch.cat([torch.full_like(ids, -100), target], 1)
        return {"input_ids": torch.cat([ids, target], 1), "labels": labels}

    train(made["base"], batch, steps=150, learning_rate=1e-2, progress=False)
    made["base"].requires_grad_(False)
    made["tuned"] = copy.deepcopy(made["base"])
    run = HookedModel(made["base"], letters())
    examples = read_examples(rows(100, 5), [letters()])
    with torch.no_grad():
        hidden = made["base"].model(examples.encoded.ids).last_hidden_state[:, -1]
        winning = made["base"].lm_head(hidden).max(-1).values + 8
        made["tuned"].lm_head.weight[LETTERS["q"]] = torch.linalg.lstsq(hidden, winning[:, None]).solution[:, 0]
    assert measure(run, read_examples(HELD, [letters()])).accuracy.mean() > 0.95
    return made


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("revival")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        letters().save_pretrained(folder / name)
    return {name: folder / name for name in models}


OPTIONS = {
    "lr": 3e-3,
    "steps": 12,
    "seeds": 2,
    "batch": 8,
    "scratch": False,
    "progress": False,
    "evaluate": {"held": HELD},
}


def revive(models, base="base", tuned="tuned", prompts=None, **options):
    sides = [models[side] if isinstance(side, str) else side for side in (base, tuned)]
    pair = fl.ModelPair.load(*sides, tokenizer=letters())
    return fl.revive(pair, rows() if prompts is None else prompts, **OPTIONS | options)


# -------------------------------------------------------------------------------------------------- against by hand


@pytest.mark.parametrize(("optimizer", "momentum"), [("adamw", 0.0), ("sgd", 0.9)])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_curve_against_training_by_hand(models, optimizer, momentum, seed):
    lr = 3e-3 if optimizer == "adamw" else 0.05
    found = revive(models, optimizer=optimizer, momentum=momentum, lr=lr, seed=seed, every=[2, 5])
    assert found.data.step.values.tolist() == [0, 2, 5, 12]
    tokens = {letter: i for i, letter in enumerate(LETTERS)}
    for number in range(2):
        model = copy.deepcopy(models["tuned"]).requires_grad_(True)
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        own = {"momentum": momentum} if optimizer == "sgd" else {"betas": (0.9, 0.99), "weight_decay": 0.0}
        stepper = kind(model.parameters(), lr=lr, **own)
        for step in range(13):
            if step in (0, 2, 5, 12):
                ids = torch.tensor([[tokens[c] for c in row["prompt"]] for row in HELD])
                right = torch.tensor([tokens[row["answer"]] for row in HELD])
                with torch.no_grad():
                    logs = model(ids).logits[:, -1].log_softmax(-1)
                one = found.data.isel(seed=number, start=0, file=0).sel(step=step)
                expected = logs.gather(1, right[:, None])[:, 0]
                np.testing.assert_allclose(one["logprob"].values, expected, atol=2e-3)
                np.testing.assert_array_equal(one["accuracy"].values, logs.argmax(-1) == right)
            drawn = np.random.default_rng([seed + number, step])
            drawn.integers(2**63)  # what seeds dropout
            loss = 0
            for i in drawn.choice(40, 8, replace=False):
                ids = torch.tensor([[tokens[c] for c in rows()[i]["prompt"]]])
                loss = loss - model(ids).logits[0, -1].log_softmax(-1)[tokens[rows()[i]["answer"]]] / 8
            stepper.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            stepper.step()


@pytest.mark.parametrize("options", [{}, {"method": "lora"}, {"optimizer": "sgd", "momentum": 0.9}], ids=str)
def test_a_rate_of_0_changes_nothing(models, options):
    found = revive(models, lr=0.0, controls={"other": models["other"]}, **options)
    for metric in ("accuracy", "logprob"):
        values = found.values(metric=metric)
        assert (values == values[:, :, :1]).all(), "bit for bit"
    one = read_examples(HELD, [letters()])
    expected = measure(HookedModel(models["tuned"], letters()), one)
    np.testing.assert_array_equal(values[0, 0, 0], -expected.loss.astype(np.float32))


def test_nothing_that_is_given_is_changed(models, folders):
    before = {name: {n: p.clone() for n, p in model.state_dict().items()} for name, model in models.items()}
    stored = {p: p.read_bytes() for folder in folders.values() for p in folder.iterdir()}
    revive(models, controls={"other": models["other"]}, scratch=True, random_steps=2, steps=2, seeds=1)
    revive(folders, controls={"other": folders["other"]}, steps=2, seeds=1, method="lora")
    for name, model in models.items():
        assert all(torch.equal(p, before[name][n]) for n, p in model.state_dict().items())
        assert not any(hasattr(m, "base_layer") for m in model.modules())
        assert not any(p.requires_grad for p in models["base"].parameters())
    assert stored == {p: p.read_bytes() for folder in folders.values() for p in folder.iterdir()}


def test_the_batch_of_the_measurement_does_not_matter(models):
    one, other = (revive(models, batch_size=n, steps=3).data for n in (1, 60))
    np.testing.assert_allclose(one["logprob"].values, other["logprob"].values, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- planted


def test_what_one_row_hides_returns_before_it_could_be_learnt(models):
    options = {"scratch": True, "steps": 20, "threshold": 0.7}
    found = revive(models, controls={"never taught": models["other"]}, **options)
    frame = found.crossings().set_index("start")
    assert frame.loc["tuned", "first"] < 0.3
    assert 0 < frame.loc["tuned", "steps"] < 8
    assert frame.loc["tuned", "steps"] < frame.loc["scratch", "steps"]
    assert (frame.loc[["scratch", "never taught"], "ratio_low"] > 1).all()
    word, why = found.verdict()
    assert word == "wrapped"
    assert "never taught" in why
    assert "scratch" in why
    alone = revive(models, **options)
    word, why = alone.verdict()
    assert word == "undecided"
    assert "differs from the tuned model in everything" in why


def test_a_control_that_is_the_tuned_model_gives_a_ratio_of_1(models):
    found = revive(models, controls={"itself": models["tuned"]}, threshold=0.7)
    row = found.crossings().set_index("start").loc["itself"]
    assert row[["ratio", "ratio_low", "ratio_high", "ratio_censored"]].tolist() == [1.0, 1.0, 1.0, 0.0]
    np.testing.assert_array_equal(*found.data["logprob"].values)
    word, why = found.verdict()
    assert word == "lost"
    assert "no fewer steps than itself (ratio 1 [1, 1])" in why


# ----------------------------------------------------------------------------------------------------------- starts


def test_fresh_weights(models):
    like = HookedModel(models["tuned"], letters())
    state = torch.random.get_rng_state()
    one, same, other = (fresh(like, "float32").make(seed, None).module for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    for (name, p), q, r in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if "norm" not in name:
            assert not torch.equal(p, r)
            assert not torch.equal(p, dict(models["tuned"].named_parameters())[name])
            assert float(p.detach().std()) == pytest.approx(0.2, rel=0.2), "as its config draws them"


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_lora_is_on_the_linear_maps_of_the_blocks_alone(library, family):
    from transformers.pytorch_utils import Conv1D

    model = owned(HookedModel(library.model(family), letters()), "float32")
    linear = {n for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    ids = torch.tensor([[3, 4, 5]])
    expected = model.run(ids).logits
    again, other = (with_lora(owned(model, "float32"), 4, seed) for seed in (0, 1))
    adapted = with_lora(model, 4, 0)
    torch.testing.assert_close(adapted.run(ids).logits, expected, atol=1e-6, rtol=0)
    found = {n for n, m in adapted.module.named_modules() if hasattr(m, "base_layer")}
    inside = {n for n in linear if any(part.isdigit() for part in n.split("."))}
    assert found == inside
    assert inside < linear
    trained = {n: p for n, p in adapted.module.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in trained)
    assert len(trained) == 2 * len(inside)
    assert all(min(p.shape) == 4 for p in trained.values())
    same, differ = (dict(m.module.named_parameters()) for m in (again, other))
    assert all(torch.equal(p, same[n]) for n, p in trained.items())
    assert not all(torch.equal(p, differ[n]) for n, p in trained.items())


def test_lora_revives(models):
    found = revive(models, method="lora", rank=4, lr=3e-2, steps=20)
    assert found.values()[0, :, -1].mean() > found.values()[0, :, 0].mean() + 0.3


def test_each_seed_has_its_own_lora(models):
    """Where every step sees all prompts, that is all that differs between the seeds."""
    lora, full = (revive(models, method=m, batch=40, steps=3).values(metric="logprob")[0] for m in ("lora", "full"))
    assert np.abs(full[0] - full[1]).max() < 0.02 < np.abs(lora[0] - lora[1]).max()


def test_an_adapter_is_merged_and_its_base_is_left(library, tmp_path):
    folder = adapter_folder(library.fresh("llama"), tmp_path)
    pair = fl.ModelPair.load(library.saved("llama"), folder, tokenizer=letters())
    ids = torch.tensor([[3, 9, 4]])
    for model in pair.models():
        mine = owned(model, "float32")
        torch.testing.assert_close(mine.run(ids).logits, model.run(ids).logits, atol=1e-5, rtol=0)
        assert not any(".lora_" in name for name, _ in mine.module.named_parameters())
    base, tuned = (model.run(ids).logits for model in pair.models())
    assert not torch.allclose(base, tuned, atol=1e-3)
    found = fl.revive(pair, rows(), **OPTIONS | {"steps": 2, "scratch": True, "random_steps": 1, "threshold": 0.5})
    assert found.starts == ["tuned", "scratch", "randFT"]


def test_half_precision_is_trained_in_float32(models):
    half = {name: copy.deepcopy(model).half() for name, model in models.items()}
    found = revive(half, steps=2, threshold=0.5)
    wide = revive({name: copy.deepcopy(model).float() for name, model in half.items()}, steps=2, threshold=0.5)
    np.testing.assert_array_equal(found.data["logprob"].values, wide.data["logprob"].values)
    assert half["tuned"].dtype == torch.float16


def test_permuted_answers(models):
    task = read_examples(rows(200), [letters()])
    for seed in range(5):
        wrong = permuted(task, seed)
        assert [p.prompt for p in wrong] == task.texts
        assert all(p.answer != q.answer for p, q in zip(wrong, task.prompts, strict=True))
        counts = [np.unique([p.answer[0] for p in some], return_counts=True) for some in (wrong, task.prompts)]
        assert np.abs(counts[0][1] - counts[1][1]).max() < 10
    assert [p.answer for p in permuted(task, 0)] != [p.answer for p in permuted(task, 1)]


def test_the_mistaught_base(models):
    """randFT: the base by hand on the same wrong answers."""
    task = read_examples(rows(), [letters()])
    base = HookedModel(models["base"], letters())
    training = Training(1e-2, 9, "adamw", 0.0, "full", 1, 8)
    made = mistaught(base, task, training, 6, "float32").make(4, None)
    expected = copy.deepcopy(models["base"]).requires_grad_(True)
    wrong = permuted(task, 4)

    def batch(step, generator):
        ids = torch.cat(
            [torch.tensor([[LETTERS[c] for c in wrong[i].prompt + wrong[i].answer[0]]])
             for i in generator.choice(40, 8, replace=False)]
        )  # fmt: skip
        return {"input_ids": ids, "labels": torch.cat([torch.full_like(ids[:, :-1], -100), ids[:, -1:]], 1)}

    train(expected, batch, steps=6, learning_rate=1e-2, schedule="constant", seed=4, progress=False)
    for (name, p), q in zip(made.module.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0, msg=name)
    found = revive(models, random_steps=10, lr=1e-2)
    assert found.role("randFT") == "random"
    frame = found.crossings().set_index("start")
    assert frame.loc["randFT", "first"] < found.base()


# ------------------------------------------------------------------------------------------------ stopping and going on


def interrupting(monkeypatch, stop):
    """Count evaluations, and interrupt at one of them."""
    import finetune_lens.revival.run as engine

    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(engine, "measure", counted)
    return calls


@pytest.mark.parametrize(
    "options", [{}, {"method": "lora", "optimizer": "sgd", "momentum": 0.9, "lr": 0.1}], ids=["full", "lora-sgd"]
)
def test_an_interrupted_revival_continues_bit_for_bit(folders, tmp_path, monkeypatch, options):
    options = {"controls": {"other": folders["other"]}, "random_steps": 3, "scratch": True, "seeds": 1} | options
    options |= {"steps": 7}
    calls = interrupting(monkeypatch, -1)
    whole = revive(folders, **options)
    total, each = len(calls), len(log_steps(7))
    assert total == 1 + 4 * each
    partial = tmp_path / "chunks"
    calls = interrupting(monkeypatch, 1 + 3 * each + 5)  # in the middle of randFT
    with pytest.raises(KeyboardInterrupt):
        revive(folders, partial=partial, **options)
    calls = interrupting(monkeypatch, -1)
    found = revive(folders, partial=partial, **options)
    assert len(calls) == 1 + each - 4, "the base, and what was left of the last run"
    assert found.data.drop_attrs().identical(whole.data.drop_attrs())
    assert not list(partial.rglob("*.pt"))
    calls = interrupting(monkeypatch, -1)
    revive(folders, partial=partial, **options | {"seeds": 2})
    assert len(calls) == 1 + 4 * each, "the second seed is what is new"
    calls = interrupting(monkeypatch, -1)
    revive(folders, partial=partial, **options | {"batch": 4})
    assert len(calls) == total, "another argument starts anew"


def test_models_in_memory_are_not_taken_for_others(models, tmp_path):
    """They have no file that would tell them apart: nothing of them is kept."""
    one = revive(models, steps=2, partial=tmp_path)
    other = revive(models, tuned="other", steps=2, partial=tmp_path)
    assert not np.array_equal(one.data["logprob"].values, other.data["logprob"].values)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_divergence_is_said_and_the_others_go_on(models):
    broken = copy.deepcopy(models["other"])
    with torch.no_grad():
        broken.lm_head.weight.mul_(torch.nan)
    found = revive(models, controls={"broken": broken}, steps=20)
    assert found.data["diverged"].values.tolist() == [[-1, -1], [0, 0]]
    values = found.values()
    assert np.isnan(values[1, :, 1:]).all()
    assert np.isfinite(values[0]).all()
    assert "broken diverged in 2 of 2 seeds, at step 0, 0: lower the rate" in found.summary()
    row = found.crossings().set_index("start").loc["broken"]
    assert np.isinf(row["steps"])
    assert found.verdict() == ("undecided", "broken diverged in every seed: lower the rate")
    json.dumps(found.headline(), allow_nan=False)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_rate_that_is_far_too_high(models, optimizer):
    found = revive(models, lr=1e30, steps=20, optimizer=optimizer, random_steps=5, every=1)
    at = found.data["diverged"].sel(start="tuned").values
    assert (at > 0).all()
    for number, step in enumerate(at):
        finite = np.isfinite(found.data["accuracy"].sel(start="tuned", file="held").values[number]).all(-1)
        assert finite[0]
        assert not finite[step:].any(), "NaN from where it diverged"
    assert (found.data["diverged"].sel(start="randFT") == 0).all(), "not even made"
    assert "tuned diverged in 2 of 2 seeds" in found.summary()
    fl.plots.revival_curves(found)
    import matplotlib.pyplot as plt

    plt.close("all")


# ------------------------------------------------------------------------------------------------------ the numbers


def naive_steps(steps, curve, threshold):
    for n, value in enumerate(curve):
        if value >= threshold:
            if n == 0:
                return float(steps[0])
            share = (threshold - curve[n - 1]) / (value - curve[n - 1])
            low, high = np.log(1 + steps[n - 1]), np.log(1 + steps[n])
            return np.exp(low + share * (high - low)) - 1
    return np.inf


def test_steps_to_the_threshold_against_a_loop():
    rng = np.random.default_rng(0)
    steps = np.array(log_steps(500), dtype=float)
    curves = np.clip(rng.normal(size=(300, len(steps))).cumsum(1) / 5, 0, 1)
    curves[::7, 9:] = np.nan
    expected = [naive_steps(steps, curve, 0.6) for curve in curves]
    np.testing.assert_allclose(steps_to(steps, curves, 0.6), expected, rtol=1e-9)
    assert np.isinf(expected).any()
    assert 0.0 in steps_to(steps, 1 - curves, 0.6)
    assert steps_to(np.array([0.0, 10, 20]), np.array([0, 0.6, 0.9]), 0.6) == 10, "exact at an evaluation"
    assert steps_to(np.array([0.0, 10]), np.array([0, 0.6 - 1e-12]), 0.6) == 10, "but for rounding"
    assert steps_to(np.array([0.0, 1]), np.array([0.0, 1.0]), 0.5) == pytest.approx(np.sqrt(2) - 1)


def test_seeds_and_examples_are_drawn_together():
    rng = np.random.default_rng(1)
    values = rng.integers(2, size=(3, 4, 5, 17)).astype(float)
    values[1, 2, 3:] = np.nan
    values[2] = values[0]
    drawn = _resampled(values)
    assert drawn.shape == (3, 5, stats.RESAMPLES)
    np.testing.assert_array_equal(drawn[0], drawn[2])
    again = np.random.default_rng(0)
    seeds = again.multinomial(4, [0.25] * 4, size=stats.RESAMPLES)
    examples = again.multinomial(17, [1 / 17] * 17, size=stats.RESAMPLES)
    for r in range(40):
        for start in range(3):
            for step in range(5):
                picked = [
                    values[start, s, step, e]
                    for s in range(4) for _ in range(seeds[r, s]) for e in range(17) for _ in range(examples[r, e])
                ]  # fmt: skip
                assert drawn[start, step, r] == pytest.approx(np.nanmean(picked), abs=1e-12)


def test_many_examples_are_drawn_in_pieces(monkeypatch):
    values = np.random.default_rng(2).integers(2, size=(2, 2, 3, 30)).astype(float)
    whole = _resampled(values)
    monkeypatch.setattr(stats, "BLOCK", 30_000)
    pieces = _resampled(values)
    np.testing.assert_allclose(pieces.std(-1), whole.std(-1), rtol=0.05)
    assert np.unique(pieces[0, 0]).size > 20


def test_bounds_of_ratios():
    inf = np.inf
    cases = {  # control, tuned, last: at least, at most
        (40.0, 10.0): (4.0, 4.0), (inf, 10.0): (10.0, inf), (40.0, inf): (0.0, 0.4), (inf, inf): (0.0, inf),
        (0.0, 10.0): (0.0, 0.0), (0.0, 0.0): (1.0, 1.0), (5.0, 0.0): (inf, inf), (inf, 0.0): (inf, inf),
    }  # fmt: skip
    for (control, tuned), expected in cases.items():
        assert tuple(map(float, _bounds(np.array(control), np.array(tuned), 100.0))) == expected


def result(curves, *, seeds=3, examples=40, spread=0.0, threshold=0.5, steps=(0, 1, 3, 10, 30, 100)):
    """A result whose starts (name → role, accuracies) have these curves; seeds that differ by `spread`."""
    import xarray as xr

    values = np.zeros((len(curves), seeds, len(steps), 1, examples))
    for row, (_, curve) in enumerate(curves.values()):
        for seed in range(seeds):
            for n, accuracy in enumerate(curve):
                shifted = np.clip(accuracy + spread * (seed - (seeds - 1) / 2), 0, 1)
                values[row, seed, n, 0, : round(shifted * examples)] = 1
    dims = ("start", "seed", "step", "file", "example")
    data = {
        "accuracy": (dims, values), "logprob": (dims, values - 1),
        "diverged": (("start", "seed"), np.full((len(curves), seeds), -1)),
        "id": (("file", "example"), np.array([[str(n) for n in range(examples)]], dtype=object)),
    }  # fmt: skip
    coords = {
        "start": list(curves), "role": ("start", [role for role, _ in curves.values()]), "seed": np.arange(seeds),
        "step": list(steps), "file": ["held"],
    }  # fmt: skip
    return Revival(xr.Dataset(data, coords, {"threshold": threshold}))


FAST, SLOW, NEVER = [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0] * 6
HALFWAY = [0, 0.2, 0.3, 0.45, 0.55, 0.6]


@pytest.mark.parametrize(
    ("starts", "word", "why"),
    [
        ({"t": ("tuned", FAST), "c": ("control", SLOW)}, "wrapped", r"fewer steps than c \(ratio 9"),
        ({"t": ("tuned", FAST), "c": ("control", NEVER)}, "wrapped", r"c \(ratio > 5\d"),
        ({"t": ("tuned", FAST), "s": ("scratch", SLOW)}, "undecided", "than s .*--control"),
        ({"t": ("tuned", FAST), "c": ("control", SLOW), "s": ("scratch", FAST)}, "lost", "no fewer steps than s"),
        ({"t": ("tuned", SLOW), "c": ("control", SLOW)}, "lost", r"than c \(ratio 1 \[1, 1\]\)"),
        ({"t": ("tuned", SLOW), "c": ("control", FAST)}, "lost", r"than c \(ratio 0.1"),
        ({"t": ("tuned", NEVER), "c": ("control", FAST)}, "lost", r"than c \(ratio < 0.0"),
        ({"t": ("tuned", NEVER), "c": ("control", NEVER)}, "undecided", "neither .* train longer"),
        ({"t": ("tuned", SLOW), "s": ("scratch", SLOW)}, "lost", "no fewer steps than s"),
        ({"t": ("tuned", FAST), "r": ("random", SLOW)}, "undecided", "there is no control"),
        ({"t": ("tuned", [1] * 6), "c": ("control", SLOW)}, "kept", "without training"),
        ({"t": ("tuned", FAST), "c": ("control", [1] * 6)}, "undecided", "c reaches .* no control"),
        ({"a": ("", FAST), "b": ("", SLOW)}, "", "nothing is compared"),
    ],
)  # fmt: skip
def test_verdicts(starts, word, why):
    import re

    found = result(starts)
    assert found.verdict()[0] == word
    assert re.search(why, found.verdict()[1]), found.verdict()[1]
    assert why == "nothing is compared" or found.verdict()[1] in found.summary()
    json.dumps(found.headline(), allow_nan=False)


@pytest.mark.parametrize(
    ("tuned", "control", "spread"),
    [
        (HALFWAY, [0, 0.15, 0.25, 0.4, 0.5, 0.6], 0.2),
        ([0, 0.32, 0.58, 0.78, 0.95, 0.98], [0, 0.36, 0.56, 0.6, 0.73, 0.91], 0.0),
    ],
)
def test_an_interval_that_is_too_wide_decides_nothing(tuned, control, spread):
    found = result({"t": ("tuned", tuned), "c": ("control", control)}, spread=spread)
    row = found.crossings().set_index("start").loc["c"]
    assert row["ratio_low"] < 1
    assert row["ratio_high"] > 2
    assert (0 < row["ratio_censored"] < 1) == bool(spread)
    assert found.verdict()[0] == "undecided"
    assert "is not clear" in found.verdict()[1]


def test_the_table_of_steps_against_loops():
    starts = {"t": ("tuned", HALFWAY), "c": ("control", [0, 0.1, 0.3, 0.4, 0.5, 0.7])}
    found = result(starts, spread=0.1)
    frame = found.crossings().set_index("start")
    drawn = _resampled(found.values())
    steps = found.steps
    each = [[naive_steps(steps, drawn[row, :, r], 0.5 - 1e-9) for r in range(2000)] for row in range(2)]
    for row, start in enumerate(starts):
        curve = found.values()[row].mean((0, 2))
        assert frame.loc[start, "steps"] == pytest.approx(naive_steps(steps, curve, 0.5 - 1e-9), rel=1e-6)
        assert frame.loc[start, "censored"] == pytest.approx(np.isinf(each[row]).mean(), abs=0.03)
        low, high = np.quantile(each[row], [0.025, 0.975], method="inverted_cdf")
        assert frame.loc[start, "low"] == pytest.approx(low, rel=0.15)
        assert frame.loc[start, "high"] == high or frame.loc[start, "high"] == pytest.approx(high, rel=0.15)
    assert frame.loc["c", "ratio"] == pytest.approx(frame.loc["c", "steps"] / frame.loc["t", "steps"])
    assert frame.loc["c", "ratio_low"] < frame.loc["c", "ratio"] < frame.loc["c", "ratio_high"]
    assert np.isnan(frame.loc["t", "ratio"])
    curves = found.curves().set_index(["start", "step"])
    low, high = np.quantile(drawn[1, 3], [0.025, 0.975])
    assert curves.loc[("c", 10), ["accuracy", "low", "high"]].tolist() == pytest.approx([0.4, low, high], abs=1e-9)


def test_steps_beyond_the_last_are_said_so():
    text = result({"t": ("tuned", FAST), "c": ("control", NEVER)}).summary()
    assert "> 100" in text
    assert "100%" in text


def test_log_steps():
    assert log_steps(1) == [0, 1]
    assert log_steps(1000) == [0, 1, 2, 3, 5, 7, 10, 15, 22, 32, 46, 68, 100, 147, 215, 316, 464, 681, 1000]
    assert log_steps(5) == [0, 1, 2, 3, 5]


# ------------------------------------------------------------------------------------------------------- the choices


def test_held_out_files_and_threshold(models):
    found = revive(models, evaluate=None, steps=2)
    assert found.files == ["task"]
    assert found.threshold == 0.9 * found.base() > 0.8
    assert found.data.sizes["example"] == 8
    assert "8 of the 40 prompts were held out" in found.summary()
    assert "8 held-out prompts are few" in found.summary()
    both = revive(models, evaluate={"on": HELD, "off": rows(5, 3)}, steps=2, threshold=0.3)
    assert both.files == ["on", "off"]
    assert both.threshold == 0.3
    assert both.values(file="off").shape[-1] == 5
    assert set(both.to_frame()["file"]) == {"on", "off"}
    with pytest.raises(InputError, match="nothing was measured on 'x'"):
        both.curves("x")


def test_texts_and_labels(models):
    texts = [row["prompt"] + row["answer"] for row in rows()]
    found = revive(models, prompts=texts, evaluate={"held": texts[:5]}, steps=2)
    assert 0 < found.threshold < 0.9
    few = [row for row in rows(200) if row["answer"] in "ab"]
    held = [row for row in rows(200, 1) if row["answer"] in "ab"]
    found = revive(models, prompts=few, evaluate={"held": held}, steps=2, objective="labels", random_steps=2)
    assert found.base() == 1


def test_follow_is_revive_without_roles(models):
    options = OPTIONS | {"steps": 4}
    options.pop("scratch")
    found = follow(
        {"tuned": models["tuned"], "x": models["other"]}, rows(), tokenizer=letters(), threshold=0.5,
        controls=["x"], **options,
    )  # fmt: skip
    same = revive(models, controls={"x": models["other"]}, steps=4, threshold=0.5)
    np.testing.assert_array_equal(found.data["logprob"].values, same.data["logprob"].values)
    assert found.role("x") == "control"
    assert not found.has_base
    assert list(found.provenance["inputs"]) == ["tuned", "x"]
    alone = follow({"a": HookedModel(models["tuned"], letters())}, rows(), reference=models["base"], **options)
    assert alone.role("a") == ""
    assert alone.threshold == same.base() * 0.9
    assert alone.verdict()[0] == ""
    for starts, more, words in (
        ({"a": models["tuned"]}, {"tokenizer": letters()}, "pass threshold"),
        ({}, {}, "found none"),
        ({"a": models["tuned"]}, {"threshold": 0.5}, "no start has a tokenizer"),
        ({"a": models["tuned"]}, {"controls": ["b"]}, "names of starts: 'a'; found 'b'"),
        ({"tuned": models["tuned"]}, {"controls": ["tuned"]}, "no start beside 'tuned'; found 'tuned'"),
    ):
        with pytest.raises(InputError, match=words):
            follow(starts, rows(), **options | more)


def test_a_start_that_is_followed_is_no_control_unless_it_is_named(models):
    """Beside the tuned model the base itself: it has the capability, and says nothing of whether that was lost."""
    starts = {"tuned": models["tuned"], "base": models["base"], "x": models["other"]}
    options = OPTIONS | {"steps": 2, "threshold": 0.5, "tokenizer": letters()}
    options.pop("scratch")
    found = follow(starts, rows(), **options)
    assert [found.role(name) for name in found.starts] == ["tuned", "", ""]
    frame = found.crossings().set_index("start")
    assert frame.loc["base", "steps"] == 0 < frame.loc["tuned", "steps"]
    assert found.verdict() == (
        "undecided", "there is no control: give one that was tuned first and never had the capability"
    )  # fmt: skip
    named = follow(starts, rows(), controls=["x"], **options)
    assert [named.role(name) for name in named.starts] == ["tuned", "", "control"]
    assert "base" not in named.verdict()[1]


def test_saved_and_loaded(models, tmp_path):
    found = revive(models, controls={"other": models["other"]}, evaluate={"on": HELD, "off": rows(5, 3)}, steps=3)
    again = fl.load(found.save(tmp_path / "revival.nc"))
    assert isinstance(again, Revival)
    assert again.summary() == found.summary()
    assert again.to_frame().equals(found.to_frame())
    assert again.headline() == found.headline()


def test_the_figure(models):
    import matplotlib.pyplot as plt

    found = revive(models, scratch=True, controls={"other": models["other"]}, evaluate={"on": HELD, "off": rows(5, 3)})
    (draw,) = fl.plots.figures_of(found).values()
    figure = draw()
    assert [ax.get_title() for ax in figure.axes] == ["measured on on", "measured on off"]
    frame = found.curves("off")
    for line, start in zip(figure.axes[1].lines, found.starts, strict=False):
        part = frame[frame["start"] == start]
        np.testing.assert_array_equal(line.get_xydata(), part[["step", "accuracy"]].to_numpy())
    assert figure.axes[0].lines[-1].get_ydata()[0] == found.threshold
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["tuned", "other", "scratch", "base", "threshold"]
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr is at least 0; found -1"),
        ({"lr": float("nan")}, "lr is at least 0; found nan"),
        ({"steps": 0}, "steps is at least 1"),
        ({"seeds": 0}, "seeds is at least 1"),
        ({"batch": 0}, "batch is at least 1"),
        ({"rank": 0}, "rank is at least 1"),
        ({"random_steps": -1}, "random_steps is at least 0"),
        ({"optimizer": "adam"}, "optimizer is adamw or sgd"),
        ({"method": "qlora"}, "method full or lora"),
        ({"momentum": 0.9}, "sgd's alone"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "below 1"),
        ({"every": [3, 99]}, "from 0 to 12"),
        ({"threshold": 0.0}, "threshold is an accuracy"),
        ({"threshold": 1.5}, "threshold is an accuracy"),
        ({"every": 0}, "every is at least 1"),
        ({"controls": {"tuned": "x"}}, "cannot be called 'tuned'"),
        ({"prompts": ["abc", "bcd"], "random_steps": 3, "evaluate": {"held": ["xyz"]}}, "its prompts have none"),
        ({"prompts": [{"prompt": "ab", "answer": "c"}, {"prompt": "b", "answer": "c"}], "random_steps": 3},
         "no prompt has another answer"),
        ({"prompts": ["abc", "bcd"]}, "texts alone"),
        ({"evaluate": {"held": [{"prompt": "abc", "answer": "a"}]}}, "no capability to revive"),
    ],
    ids=str,
)  # fmt: skip
def test_refuses(models, options, words):
    if "controls" in options:
        options = options | {"controls": {"tuned": models["other"]}}
    with pytest.raises(InputError, match=words):
        revive(models, **options)


def test_refuses_controls_of_another_make(models, library):
    import transformers

    wide = copy.deepcopy(models["other"].config)
    wide.vocab_size = 40
    with pytest.raises(InputError, match=r"control 'wide': .*embed_tokens.weight is \(40, 32\) there and \(32, 32\)"):
        revive(models, controls={"wide": transformers.AutoModelForCausalLM.from_config(wide)})
    with pytest.raises(InputError, match=r"control 'gpt2': .* is absent there"):
        revive(models, controls={"gpt2": library.model("gpt2")})


def test_refuses_an_adapter_as_control(models, library, tmp_path):
    with pytest.raises(InputError, match="is an adapter and does not run alone"):
        revive(models, controls={"lora": adapter_folder(library.fresh("llama"), tmp_path)})


def test_a_control_of_weights_alone_has_the_pairs_config(models, folders, tmp_path):
    torch.save(models["other"].state_dict(), tmp_path / "other.pt")
    found = revive(folders, controls={"other": tmp_path / "other.pt"}, steps=2)
    expected = revive(folders, controls={"other": folders["other"]}, steps=2)
    np.testing.assert_array_equal(found.data["logprob"].values, expected.data["logprob"].values)


def test_the_command(folders, tmp_path):
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows(60))))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, HELD)))
    words = [folders["base"], folders["tuned"], "--task", "task.jsonl", "--eval", "held.jsonl", "--lr", "3e-3"]
    words += ["--steps", "12", "--seeds", "2", "--batch", "8", "--control", f"never={folders['other']}", "--no-scratch"]
    words += ["--threshold", "0.7"]
    done = command("finetune_lens.revival", *words, "--json", "--quiet", "--no-plots", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["headline"]
    assert list(said["starts"]) == ["tuned", "never"]
    assert said["verdict"] == "wrapped"
    assert said["file"] == "held"
    assert not (tmp_path / "runs/revival/.revival.partial").exists()
    done = command(
        "finetune_lens.revival", *words, "--control", f"never={folders['other']}", "--out", "o", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "two controls are called 'never'" in done.stderr
    assert not (tmp_path / "o").exists()
