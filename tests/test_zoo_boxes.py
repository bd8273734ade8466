"""The pair `boxes`: what ships loads and does what its card says; the recipe runs, repeats and continues."""

import json
import re
from importlib.resources import files

import numpy as np
import pytest
import torch

import finetune_lens as fl
from finetune_lens import zoo
from finetune_lens.errors import InputError
from finetune_lens.prompts import encode as encode_prompts
from finetune_lens.prompts import read_prompts
from finetune_lens.tasks import registers
from finetune_lens.tasks.boxes import solve
from finetune_lens.zoo import boxes_recipe as recipe

BOXES = zoo.path("boxes")
SCORES = json.loads((BOXES / "scores.json").read_text())
ARMS = ("base", *recipe.ARMS)


@pytest.fixture(scope="module")
def models():
    adapter = {"lora"}
    base = BOXES / "base"
    return {arm: recipe.load(base, BOXES / arm) if arm in adapter else recipe.load(BOXES / arm) for arm in ARMS}


def test_what_ships_is_small_and_says_nothing_of_the_machine_it_was_made_on():
    shipped = [path for path in BOXES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= 4_000_000
    for path in shipped:
        if path.suffix in {".json", ".md", ".jsonl"}:
            assert not re.search(r"(?<![\w.<])/(home|work|tmp|root|Users|usr)\b", path.read_text()), path
    assert json.loads((BOXES / "lora/adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    assert files("finetune_lens.zoo").joinpath("boxes/scores.json").is_file()


@pytest.mark.parametrize("arm", ARMS)
def test_the_shipped_models_do_what_their_scores_say(models, arm):
    for task, found in SCORES["models"][arm]["test"].items():
        hits = recipe.right(models[arm], recipe._held(task, found["n"], SCORES["seed"], "test"))
        assert int(hits.sum()) == pytest.approx(found["correct"], abs=3), task  # other processors round otherwise


def test_the_card_is_made_from_the_scores():
    assert (BOXES / "README.md").read_text() == recipe.card(SCORES)


def test_rates_are_chosen_by_the_arms_own_task():
    for arm in recipe.ARMS:
        rows = [row for row in SCORES["sweep"] if row["arm"] == arm]
        reached = [row for row in rows if row["validation_accuracy"] >= SCORES["settings"]["target"]]
        chosen = (
            min(reached, key=lambda r: r["steps"]) if reached else max(rows, key=lambda r: r["validation_accuracy"])
        )
        assert SCORES["models"][arm]["learning_rate"] == chosen["learning_rate"]


def test_the_base_knows_lookups_and_boxes_above_chance():
    base = SCORES["models"]["base"]["test"]
    assert all(base[task]["accuracy"] > 0.9 for task in registers.LOOKUPS)
    assert base["boxes"]["interval"][0] > SCORES["chance"]
    curve = list(SCORES["models"]["base"]["boxes_while_training"].values())
    assert np.ptp(curve[-3:]) < 0.1, "the base is trained to its end, and is no early checkpoint"


def test_the_tuned_arms_saw_no_box(monkeypatch, tmp_path):
    """Their training texts hold no box; the control's are nothing else."""
    drawn = []
    real = recipe.text
    monkeypatch.setattr(recipe, "text", lambda task, g, **o: drawn.append((task, o["part"])) or real(task, g, **o))
    recipe.pretrain(tmp_path / "base", settings=recipe.MINI, seed=0, checkpoint=None, progress=False)
    for arm, (task, _) in recipe.ARMS.items():
        drawn.clear()
        recipe.tune(
            tmp_path / "base", tmp_path / arm, arm=arm, learning_rate=1e-3, settings=recipe.MINI, seed=0,
            checkpoint=None, progress=False,
        )  # fmt: skip
        assert {t for t, _ in drawn} == {task}
        assert {part for _, part in drawn} == {"train", "validation"}


def test_the_prompts_are_of_the_test_split_and_readable(models):
    items = read_prompts(BOXES / "prompts.jsonl")
    assert len(items) == recipe.PROMPTS
    for item in items:
        assert solve(item.prompt) == item.answer[0] != item.wrong[0]
    encoded = encode_prompts(items, recipe.reads())
    with torch.no_grad():
        best = models["control"](input_ids=encoded.ids).logits[:, -1].argmax(-1)
    assert (best == encoded.answers[:, 0, 0]).float().mean() > 0.9


def test_the_texts_of_the_recipe():
    generator = np.random.default_rng(0)
    for task in recipe.TASKS:
        given = recipe.encode([recipe.text(task, generator, part="train", questions=3) for _ in range(4)])
        asked = given["labels"] != -100
        assert asked.sum(1).tolist() == [3] * 4
        assert torch.equal(given["labels"][asked], given["input_ids"][asked])
        words = recipe.reads().convert_ids_to_tokens(given["labels"][asked].tolist())
        assert all(word.strip() in recipe.boxes.OBJECTS for word in words)


def test_the_trust_gate_passes():
    for arm in recipe.ARMS:
        pair = fl.ModelPair.load(BOXES / "base", BOXES / arm)
        found = fl.check_pair(pair, BOXES / "prompts.jsonl", progress=False)
        assert found.passed, found.summary()


def test_cross_patching_says_where_the_control_gained():
    """Of the positive control: patches of whole layers carry the gain into the base, and single heads part of it."""
    pair = fl.ModelPair.load(BOXES / "base", BOXES / "control")
    found = fl.cross_patch(
        pair, BOXES / "prompts.jsonl", site="resid_post", by=["layer"], direction="tuned→base", progress=False
    )
    share = found.recovery()["ratio"].sel(direction="tuned→base")
    last = int(found.data["layer"].max())
    assert float(share.sel(layer=last)) > 0.5
    heads = fl.cross_patch(pair, BOXES / "prompts.jsonl", direction="tuned→base", progress=False)
    top = heads.top(1).iloc[0]
    assert top["low"] > 0
    assert top["p_adjusted"] < 0.05


def test_pairs_that_are_not_in_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(InputError, match=r"comes with the repository.*zoo build boxes"):
        zoo.path("boxes")


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
    work = tmp_path_factory.mktemp("mini")
    return recipe.build(work, settings=recipe.MINI, progress=False)


def test_a_build_has_the_shape_of_what_ships(mini):
    def names(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert names(mini) == names(BOXES)
    scores = json.loads((mini / "scores.json").read_text())
    assert scores.keys() == SCORES.keys()
    assert (mini / "README.md").read_text() == recipe.card(scores)


def test_the_seed_decides_a_build(mini, tmp_path):
    (tmp_path / "again").mkdir()
    (tmp_path / "other").mkdir()
    again = recipe.build(tmp_path / "again", settings=recipe.MINI, progress=False)
    assert content(again) == content(mini)
    other = recipe.build(tmp_path / "other", settings=recipe.MINI, seed=1, progress=False)
    assert content(other)["base/model.safetensors"] != content(mini)["base/model.safetensors"]


def test_an_interrupted_build_continues(mini, tmp_path, monkeypatch):
    real, calls = recipe.tune, []

    def stopping(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(options["arm"])
        return real(*arguments, **options)

    monkeypatch.setattr(recipe, "tune", stopping)
    with pytest.raises(KeyboardInterrupt):
        recipe.build(tmp_path, settings=recipe.MINI, progress=False)
    monkeypatch.setattr(recipe, "tune", real)
    steps = []
    real_encode = recipe.encode
    monkeypatch.setattr(recipe, "encode", lambda texts: steps.append(len(texts)) or real_encode(texts))
    assert content(recipe.build(tmp_path, settings=recipe.MINI, progress=False)) == content(mini)
    assert steps.count(64) == 1, "of the base's batches only the first, to recognise the run"
