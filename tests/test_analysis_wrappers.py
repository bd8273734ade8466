"""The study of wrappers: its tables are what its results say, its pieces run, its verdicts tell the arms apart."""

import json

import numpy as np
import pytest

from analyses import wrappers as study
from finetune_lens.zoo import wrappers_recipe as recipe

KEPT = study.HERE / "results" / "wrappers.md"


@pytest.fixture(scope="module")
def small():
    return study.Study()


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """The study of a toy family, its results in a folder of its own."""
    work = tmp_path_factory.mktemp("mini")
    made = object.__new__(study.Study)
    made.settings, made.device = recipe.MINI, "cpu"
    made.folder, made.results = recipe.build(work, settings=recipe.MINI, progress=False), work / "results"
    made.language = study.Language(recipe.MINI.length)
    return made


def test_the_tables_are_those_of_the_stored_results(small):
    assert KEPT.read_text() == "\n".join(study.claims(small)) + "\n"


def test_the_revival_tells_wrapper_from_loss(small):
    found = small.stored("revive-full")
    assert {arm: study.seen_from(found, arm).verdict()[0] for arm in (*study.TUNED, "absent-100")} == {
        "tuned-0": "lost", "tuned-50": "lost", "tuned-80": "lost", "tuned-100": "wrapped", "absent-100": "lost",
    }  # fmt: skip


def test_an_arm_is_seen_beside_its_own_controls(small):
    found = small.stored("revive-full")
    seen = study.seen_from(found, "tuned-50")
    assert seen.starts == ["tuned-50", "absent-100", "scratch-100", "scratch"]
    assert [seen.role(start) for start in seen.starts] == ["tuned", "control", "control", "scratch"]
    one, other = (r.crossings().set_index("start")["steps"] for r in (found, seen))
    assert other.to_dict() == {start: one[start] for start in seen.starts}
    assert seen.crossings().set_index("start")["ratio"]["absent-100"] == one["absent-100"] / one["tuned-50"]
    assert found.role("tuned-50") == "control", "the stored result is left as it was"


def test_stored_results_are_those_of_the_shipped_models(small):
    """The accuracies before the first step, and a probe of a part of the prompts, measured anew."""
    shipped = json.loads((small.folder / "scores.json").read_text())["models"]
    found = small.stored("revive-full")
    at = found.curves("b, cue").query("step == 0").set_index("start")["accuracy"]
    for start, arm in {"tuned": "tuned-100", "tuned-0": "tuned-0", "absent-100": "absent-100"}.items():
        assert at[start] == pytest.approx(shipped[arm]["test"]["count-b-cue"]["accuracy"], abs=0.02)
    again = study.probe(small, "tuned-100", seeds=1, limit=500, check=False, progress=False)
    kept = small.stored("probe-tuned-100").to_frame().set_index(["side", "depth"])
    for row in again.to_frame().to_dict("records"):
        if row["depth"]:
            assert row["score"] == pytest.approx(kept.loc[(row["side"], row["depth"]), "score"], abs=0.03)


def test_every_step_runs_and_is_read_back(mini):
    few = {"progress": False}
    mini.keep(study.tune(mini, "tuned-50", steps=3, **few), "tune")
    assert mini.stored("tune").files == list(study.FILES)
    mini.keep(study.revive(mini, "sgd", steps=2, seeds=1, limit=30, threshold=0.5, **few), "revive")
    assert mini.stored("revive").starts == ["tuned", "absent-100"]
    mini.keep(study.prune(mini, "tuned-100", random_seeds=1, limit=40, counts=(1, 2), **few), "prune")
    assert mini.stored("prune").counts == [0, 1, 2]
    mini.keep(study.compare(mini, "tuned-100", limit=20, check=False, **few), "compare")
    assert np.isfinite(mini.stored("compare").data["cka"].values).all()


def test_rows_ask_what_they_should(mini):
    rows = mini.rows(40, "b", 1.0, seed=1)
    for row in rows:
        text = row["prompt"].partition(":")[2]
        assert row["prompt"].startswith("<count>b_:")
        assert text.count("b") == text.count("a") + 1
    assert rows != mini.rows(40, "b", 1.0, seed=2)


def test_scale_paper_is_the_published_size(monkeypatch, tmp_path):
    """Built where it is not there, in a folder of its own; the zoo's results are not touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("analyses.studies.require_gpu", lambda what: None)
    asked = {}

    def build(work, **options):
        asked.update(options)
        (work / "scores.json").write_text("{}")
        return work

    monkeypatch.setattr(recipe, "build", build)
    found = study.Study("paper", progress=False)
    assert asked == {"settings": recipe.PUBLISHED, "progress": False}
    assert str(found.results) == "runs/wrappers-paper/results"
    asked.clear()
    study.Study("paper")
    assert asked == {}, "what is there is not trained again"


def test_figures(small):
    import matplotlib

    matplotlib.use("agg")
    from figures import wrappers as figures

    assert len(figures.draw(small).axes) == 6
    assert len(figures.draw_cka(small).axes) == 4  # two maps, two bars
    matplotlib.pyplot.close("all")
