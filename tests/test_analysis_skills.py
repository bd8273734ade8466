"""The study of skill localisation: its table is what the stored results say, and its pieces run."""

import json

import numpy as np
import pytest

from analyses import skill_localization as study

KEPT = study.RESULTS / "skill_localization.md"


@pytest.fixture(scope="module")
def stored():
    return {arm: study.stored(arm) for arm in study.ARMS}


def test_the_tables_are_those_of_the_stored_results():
    assert KEPT.read_text() == study.report()


def test_a_stored_graft_is_what_a_search_gives(stored):
    """One step of the sweep anew: the same base mask and the same scores of base and tuned model."""
    arm = "select-sgd"
    found = study.graft(arm, sparsity=1e-2, steps=0, baselines=False, progress=False)
    kept = stored[arm]
    for side in ("base", "tuned", "blocks"):
        for name in ("accuracy", "logprob"):
            one, other = (r.values(name, file="test", method=side) for r in (found, kept))
            np.testing.assert_allclose(one, other, atol=1e-3)
    first = kept.data.sel(level=1e-2).search_entries.values[0]
    assert found.data.entries.sel(mask="graft").item() == first


def test_first_letters_are_single_answers(tmp_path):
    rows = study.first_letters(study.files("select-sgd")["test"])
    assert len(rows) > 250
    assert all(len(r["answer"]) == 1 and r["answer"] != r["wrong"] for r in rows)
    kept = {r["id"]: r for r in map(json.loads, study.files("select-sgd")["test"].read_text().splitlines())}
    assert all(kept[r["id"]]["answer"].startswith(r["answer"]) for r in rows)


def test_figures(stored):
    import matplotlib

    matplotlib.use("agg")
    from figures import skill_localization as figures

    figure = figures.draw(stored)
    assert len(figure.axes) == 6
    matplotlib.pyplot.close("all")
