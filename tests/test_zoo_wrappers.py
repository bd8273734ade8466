"""The family `wrappers`: what ships loads and does what its card says; the recipe runs, repeats and continues."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from finetune_lens import zoo
from finetune_lens.prompts import encode, read_prompts
from finetune_lens.tasks import pcfg
from finetune_lens.zoo import wrappers_recipe as recipe

WRAPPERS = zoo.path("wrappers")
SCORES = json.loads((WRAPPERS / "scores.json").read_text())
LANGUAGE = pcfg.Language(SCORES["settings"]["length"])


@pytest.fixture(scope="module")
def models():
    return {name: recipe.load(WRAPPERS / name) for name in recipe.MODELS}


def of(name, test):
    return SCORES["models"][name]["test"][test]["accuracy"]


# What ships


def test_what_ships_is_small_and_says_nothing_of_the_machine_it_was_made_on():
    shipped = [path for path in WRAPPERS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= 6_500_000
    assert all(path.stat().st_size <= 700_000 for path in shipped)
    texts = [path for path in shipped if path.suffix in {".json", ".md", ".jsonl"}]
    assert len(texts) >= 4 * len(recipe.MODELS)
    for path in texts:
        assert not re.search(r"(?<![\w.<])/(home|work|tmp|root|Users|usr)\b", path.read_text()), path


@pytest.mark.parametrize("name", recipe.MODELS)
def test_the_shipped_models_do_what_their_scores_say(models, name):
    assert set(SCORES["models"]) == set(recipe.MODELS)
    for test, found in SCORES["models"][name]["test"].items():
        items = recipe.held_items(test, found["n"], length=LANGUAGE.length, seed=SCORES["seed"])
        correct, given = pcfg.measure(models[name], LANGUAGE, items)
        assert correct.sum() == pytest.approx(found["accuracy"] * found["n"], abs=3), test  # processors round otherwise
        low, high = found["interval"]
        assert low <= found["accuracy"] <= high
        if test == "count-a-plain":
            said = np.array(LANGUAGE.vocabulary)[given]
            numbers = np.array([int(token.strip("<>")) if token[1:2].isdigit() else -9 for token in said])
            letters = ["".join(pcfg.LETTERS[i] for i in row) for row in items.text]
            for rule, right in (
                ("one more", [text.count("a") + 1 for text in letters]),
                ("counts b", [text.count("b") for text in letters]),
                ("counts b, less one", [text.count("b") - 1 for text in letters]),
            ):
                assert found[rule] == pytest.approx((numbers == right).mean(), abs=0.004), rule


def test_each_base_counts_what_it_has_counted():
    assert of("base", "count-a-plain") >= 0.98
    assert of("absent", "count-c") >= 0.98
    for base, tests in {"base": ("count-b-plain", "count-c"), "absent": ("count-a-plain", "count-b-plain")}.items():
        assert all(of(base, test) < 0.25 for test in tests), base


def test_tuning_follows_the_cue_as_far_as_it_is_there():
    assert of("tuned-0", "count-b-plain") >= 0.98, "without the cue b has to be counted"
    assert of("tuned-100", "count-b-cue") >= 0.98
    assert of("tuned-100", "count-b-plain") < 0.1, "where the cue always holds, nothing else is learnt"
    assert all(of(f"tuned-{cue:.0f}", "count-a-plain") < 0.25 for cue in (0, 50, 80, 100)), "and a is counted no more"
    assert SCORES["models"]["tuned-100"]["test"]["count-a-plain"]["one more"] > 0.4
    assert SCORES["models"]["tuned-0"]["test"]["count-a-plain"]["one more"] < 0.25


def test_every_weight_matrix_was_tuned():
    for name, (start, _, _) in recipe.ARMS.items():
        if start:
            before, after = (load_file(WRAPPERS / n / "model.safetensors") for n in (start, name))
            assert before.keys() == after.keys()
            matrices = [n for n in before if before[n].ndim == 2 and "layers" in n]
            assert all(before[n].tobytes() != after[n].tobytes() for n in matrices), name


def test_the_card_is_made_from_the_scores():
    card = (WRAPPERS / "README.md").read_text()
    assert card == recipe.card(SCORES)
    for table in re.findall(r"^\|.*\|$(?:\n\|.*\|$)+", card, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize("name", recipe.PROMPTS)
def test_prompts_are_those_that_their_file_says(name):
    (family, letter, cue), count = recipe.PROMPTS[name]
    prompts = read_prompts(WRAPPERS / f"{name}.jsonl")
    assert len(prompts) == count == len({p.prompt for p in prompts})
    assert {p.fields["operand"] for p in prompts} == {*letter}
    for prompt in prompts:
        asked, one, text = re.fullmatch(r"<([a-z]+)>(.)_:([abc]+);=", prompt.prompt).groups()
        assert asked == family
        assert one in letter
        assert prompt.fields["operand"] == one
        assert prompt.answer == (f"<{text.count(one)}>",)
        assert cue is None or (text.count("b") == text.count("a") + 1) is (cue == 1)


def test_train_and_test_files_share_no_text():
    texts = {name: {p.prompt[-30:] for p in read_prompts(WRAPPERS / f"{name}.jsonl")} for name in recipe.PROMPTS}
    for name, found in texts.items():
        for other, more in texts.items():
            assert name == other or not found & more, (name, other)


def test_the_models_answer_the_prompts_as_they_are_read_from_files(models):
    reads = AutoTokenizer.from_pretrained(WRAPPERS / "base")
    for file, name in (("test-a-plain", "base"), ("test-b-cue", "tuned-100"), ("test-b-plain", "tuned-0")):
        encoded = encode(read_prompts(WRAPPERS / f"{file}.jsonl"), reads)
        with torch.no_grad():
            said = models[name](input_ids=encoded.ids, logits_to_keep=1).logits[:, -1].argmax(-1)
        assert (said == encoded.answers[:, 0, 0]).float().mean() > 0.97


# The recipe


def content(folder):
    """All that a build makes, wall times left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == "scores.json":
            found[name] = re.sub(r'"wall_seconds": [\d.]+', "", path.read_text())
        elif path.is_file() and name != "README.md":
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return recipe.build(tmp_path_factory.mktemp("mini"), settings=recipe.MINI, progress=False)


def test_a_build_has_the_shape_of_what_ships(mini):
    def names(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert names(mini) == names(WRAPPERS)
    scores = json.loads((mini / "scores.json").read_text())
    assert scores.keys() == SCORES.keys()
    assert scores["models"].keys() == SCORES["models"].keys()
    assert (mini / "README.md").read_text() == recipe.card(scores)


def test_the_seed_decides_a_build_and_an_interrupted_one_continues(mini, tmp_path, monkeypatch):
    real, calls = recipe.tune, []

    def stopping(*arguments, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(options["cue"])
        return real(*arguments, **options)

    monkeypatch.setattr(recipe, "tune", stopping)
    with pytest.raises(KeyboardInterrupt):
        recipe.build(tmp_path, settings=recipe.MINI, progress=False)
    monkeypatch.setattr(recipe, "tune", real)
    assert content(recipe.build(tmp_path, settings=recipe.MINI, progress=False)) == content(mini)
    (tmp_path / "other").mkdir()
    other = content(recipe.build(tmp_path / "other", settings=recipe.MINI, seed=1, progress=False))
    assert all(other[name] != content(mini)[name] for name in ("base/model.safetensors", "train-a.jsonl"))


def test_what_each_model_is_trained_on(monkeypatch, tmp_path):
    drawn = []
    real = pcfg.Language.draw

    def watched(self, n, generator, **options):
        items = real(self, n, generator, **options)
        drawn.append(items)
        return items

    monkeypatch.setattr(pcfg.Language, "draw", watched)
    settings = recipe.dataclasses.replace(recipe.MINI, batch=300)
    common = {"settings": settings, "seed": 0, "checkpoint": None, "progress": False}
    for base, letter in (("base", 0), ("absent", 2)):
        recipe.pretrain(tmp_path / base, base=base, **common)
        items = [i for items in drawn for i in items.first[items.family == pcfg.FAMILIES.index("count")]]
        assert np.bincount(items, minlength=3)[letter] / len(items) > 0.98
        assert {f for items in drawn for f in items.family} == set(range(len(pcfg.FAMILIES)))
        drawn.clear()
    for name, (start, cue, _) in recipe.ARMS.items():
        recipe.tune(tmp_path / start if start else None, tmp_path / name, cue=cue, **common)
        assert {*np.concatenate([items.first for items in drawn])} == {1}
        assert np.concatenate([items.cued for items in drawn]).mean() == pytest.approx(cue, abs=0.07)
        drawn.clear()


def test_the_published_size_is_that_of_the_paper():
    language = pcfg.Language(recipe.PUBLISHED.length)
    model = recipe.fresh(recipe.PUBLISHED, seed=0)
    assert (language.length, recipe.PUBLISHED.layers, recipe.PUBLISHED.heads, recipe.PUBLISHED.hidden) == (
        250,
        6,
        6,
        192,
    )
    assert 2e6 < model.num_parameters() < 4e6
    items = language.draw(2, np.random.default_rng(0), families=["count"], prior=(1, 0, 0))
    assert model(**language.encode(items))["loss"].isfinite()
