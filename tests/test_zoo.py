"""The zoo: what ships loads, is small, and does what its card says; the recipe runs, repeats and continues."""

import json
import re
import subprocess
import sys
from importlib.resources import files

import pytest

from finetune_lens import zoo
from finetune_lens.errors import InputError
from finetune_lens.tasks.strings import BASE_TASKS, LENGTH, NEW_TASK, TASKS, VOCABULARY, draw, encode, measure, question
from finetune_lens.zoo import strings_recipe as recipe
from finetune_lens.zoo.__main__ import build, show

STRINGS = zoo.path("strings")
SCORES = json.loads((STRINGS / "scores.json").read_text())


def command(*words, code=0):
    """`python -m finetune_lens.zoo` in a process of its own, where a warning is an error as it is here."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "finetune_lens.zoo", *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def models():
    base = recipe.load(STRINGS / "base")
    return {
        "base": base,
        "full": recipe.load(STRINGS / "full"),
        "lora": recipe.load(STRINGS / "base", STRINGS / "lora"),
    }


# What ships


def test_what_ships_is_small_and_says_nothing_of_the_machine_it_was_made_on():
    shipped = [path for path in STRINGS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= 6_000_000
    texts = [path for path in shipped if path.suffix in {".json", ".md"}]
    assert len(texts) >= 8
    for path in texts:
        assert not re.search(r"(?<![\w.<])/(home|work|tmp|root|Users|usr)\b", path.read_text()), path
    assert json.loads((STRINGS / "lora/adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    assert files("finetune_lens.zoo").joinpath("strings/scores.json").is_file()


@pytest.mark.parametrize("name", ["base", "full", "lora"])
def test_the_shipped_models_do_what_their_scores_say(models, name):
    for task, found in SCORES["models"][name]["test"].items():
        items = draw([task], found["n"], recipe.stream(0, task), part="test")[:200]
        got = measure(models[name], items)
        low, high = got.interval
        assert low <= found["accuracy"] <= high, (task, got)


def test_the_whole_new_task_score_is_reproduced(models):
    for name in ("base", "full", "lora"):
        found = SCORES["models"][name]["test"][NEW_TASK]
        got = measure(models[name], draw([NEW_TASK], found["n"], recipe.stream(0, NEW_TASK), part="test"))
        assert got.correct == pytest.approx(found["correct"], abs=2)  # other processors round otherwise


def test_tuning_taught_the_new_task_to_a_competent_base():
    assert set(SCORES["models"]) == {"base", "full", "lora"}
    base, full, lora = (SCORES["models"][name] for name in ("base", "full", "lora"))
    assert set(base["test"]) == set(TASKS)
    assert all(base["test"][task]["accuracy"] >= 0.95 for task in BASE_TASKS)
    assert base["test"][NEW_TASK]["correct"] == 0
    target = SCORES["settings"]["target"]
    for tuned in (full, lora):
        assert tuned["validation_accuracy"] >= target
        assert tuned["test"][NEW_TASK]["interval"][1] >= target
    for name, tuned in (("full", full), ("lora", lora)):
        drops = [base["test"][task]["accuracy"] - tuned["test"][task]["accuracy"] for task in BASE_TASKS]
        assert tuned["forgetting"] == pytest.approx(sum(drops) / len(drops), abs=1e-4), name


def test_the_card_is_made_from_the_scores():
    assert (STRINGS / "README.md").read_text() == recipe.card(SCORES)


def test_the_shipped_learning_rates_are_the_ones_the_sweep_chooses():
    for method in recipe.METHODS:
        rows = [row for row in SCORES["sweep"] if row["method"] == method]
        assert len(rows) >= 3
        chosen = recipe.choose(rows, target=SCORES["settings"]["target"])
        assert SCORES["models"][method]["learning_rate"] == chosen["learning_rate"]
        assert SCORES["models"][method]["steps"] == chosen["steps"]


def test_generation_writes_what_the_teacher_forced_measure_counts(models):
    from transformers import AutoTokenizer

    reads = AutoTokenizer.from_pretrained(STRINGS / "base")
    assert reads.get_vocab() == {token: i for i, token in enumerate(VOCABULARY)}
    items = [
        (task, text)
        for task in ("reverse", NEW_TASK)
        for _, text in draw([task], 10, recipe.stream(1, task), part="test")
    ]
    prompts = reads([question(*item) for item in items], return_tensors="pt")
    for name in ("base", "full"):
        written = models[name].generate(**prompts, max_new_tokens=LENGTH + 1, do_sample=False)
        right = [bool((a == b).all()) for a, b in zip(written, encode(items)["input_ids"], strict=True)]
        assert right == [measure(models[name], [item]).correct == 1 for item in items]
        assert True in right[:10] if name == "base" else True in right[10:]


def test_the_new_tasks_token_was_never_trained_before_tuning(models, tmp_path, monkeypatch):
    seen = set()
    monkeypatch.setattr(recipe, "encode", lambda items: seen.update(task for task, _ in items) or encode(items))
    recipe.pretrain(tmp_path / "base", settings=recipe.MINI, progress=False)
    assert seen == set(BASE_TASKS)
    assert not models["base"].config.tie_word_embeddings, "else the unembedding would train every token's embedding"


# The commands


def test_unknown_names_are_told_the_known_ones(tmp_path):
    for words in (("build", "nonsense", "--out", tmp_path), ("show", "nonsense")):
        error = command(*words, code=2).stderr
        assert error == "error: the zoo has no 'nonsense'; it has: boxes, skills, strings, traces, wrappers\n"
    for unclear in ([], ["strings", "--all"]):
        assert "name one pair (boxes, skills, strings, traces, wrappers)" in command("build", *unclear, code=2).stderr
    with pytest.raises(InputError, match="strings"):
        zoo.path("../strings")
    assert list(tmp_path.iterdir()) == []


def test_show_lists_the_zoo_and_prints_cards(capsys):
    from finetune_lens.command import Basic

    show(common=Basic())
    assert str(STRINGS) in capsys.readouterr().out
    show("strings", common=Basic())
    assert capsys.readouterr().out == (STRINGS / "README.md").read_text()


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A miniature built by the command."""
    out = tmp_path_factory.mktemp("zoo")
    done = command("build", "strings", "--mini", "--out", out)
    assert done.stdout == ""
    assert "\r" not in done.stderr, "no bar without a terminal"
    assert [path.name for path in out.iterdir()] == ["strings"], "nothing but the result is left"
    return out / "strings"


def content(folder):
    """All that a build makes, wall times left out."""

    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(part) for key, part in value.items() if key != "wall_seconds"}
        return [timeless(part) for part in value] if isinstance(value, list) else value

    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == "scores.json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.is_file() and name != "README.md":
            found[name] = path.read_bytes()
    return found


def rebuilt(folder, seed=0, *, force=False):
    from finetune_lens.command import Basic

    build("strings", out=folder, seed=seed, mini=True, force=force, common=Basic(quiet=True))
    return content(folder / "strings")


def test_a_build_has_the_shape_of_what_ships(mini):
    def names(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert names(mini) == names(STRINGS)
    scores = json.loads((mini / "scores.json").read_text())
    assert scores.keys() == SCORES.keys()
    assert scores["models"]["lora"].keys() == SCORES["models"]["lora"].keys()
    assert (mini / "README.md").read_text() == recipe.card(scores)
    weights = recipe.load(mini / "base", mini / "lora")
    assert any("lora_B" in name and bool(tensor.any()) for name, tensor in weights.state_dict().items())


def test_the_seed_decides_a_build(mini, tmp_path):
    assert rebuilt(tmp_path) == content(mini)
    other = rebuilt(tmp_path, seed=1, force=True)
    assert other["base/model.safetensors"] != content(mini)["base/model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["strings"]


def test_what_is_there_is_replaced_only_by_force(mini, tmp_path):
    (tmp_path / "strings").mkdir()
    (tmp_path / "strings" / "mine").touch()
    error = command("build", "strings", "--mini", "--out", tmp_path, code=2).stderr
    assert str(tmp_path / "strings") in error
    assert "--force" in error
    assert [path.name for path in tmp_path.rglob("*")] == ["strings", "mine"]
    (tmp_path / "file").touch()
    assert "cannot write" in command("build", "strings", "--mini", "--out", tmp_path / "file", code=2).stderr


def test_an_interrupted_build_continues(mini, tmp_path, monkeypatch):
    trained = []
    real = recipe.tune

    def stopping(base, out, **options):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(out)
        return real(base, out, **options)

    monkeypatch.setattr(recipe, "tune", stopping)
    with pytest.raises(KeyboardInterrupt):
        rebuilt(tmp_path)
    assert not (tmp_path / "strings").exists(), "a folder that exists is whole"
    monkeypatch.setattr(recipe, "tune", real)
    drawn = []
    monkeypatch.setattr(
        recipe, "draw", lambda tasks, n, *a, **k: drawn.append((tuple(tasks), n)) or draw(tasks, n, *a, **k)
    )
    assert rebuilt(tmp_path) == content(mini)
    batches = [tasks for tasks, n in drawn if n == 48]
    assert len(batches) == 1, "of the base's batches only the first, to recognise the run"
    assert set(batches[0]) == set(BASE_TASKS)
