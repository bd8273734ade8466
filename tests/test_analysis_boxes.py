"""The study of the boxes pair: its report and stored results are those of the pair that ships."""

import re

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")

from analyses import boxes as study
from figures import boxes as figure

NUMBER = r"[+-]?\d+\.\d+"


@pytest.fixture(scope="module")
def control():
    return study.measure("control", progress=False)


def test_the_report_is_that_of_the_pair(control):
    """Word for word; numbers may differ by what other processors round."""
    text = study.report({"control": control})
    section = text[text.index("## control") :]
    kept = (study.RESULTS / "boxes.md").read_text()
    kept = kept[kept.index("## control") :]
    assert re.sub(NUMBER, "#", section) == re.sub(NUMBER, "#", kept)
    values = [[float(n) for n in re.findall(NUMBER, part)] for part in (section, kept)]
    np.testing.assert_allclose(*values, atol=0.021)


def test_the_stored_results_are_those_of_the_pair(control):
    found, old = control[1]["z"], study.stored("control")
    np.testing.assert_allclose(found.effect()["mean"].values, old.effect()["mean"].values, atol=1e-3)


def test_patching_a_run_with_itself_changed_nothing():
    for arm in study.ARMS:
        assert (study.stored(arm).data["self_donor"] == 0).all()


def test_the_figure_draws():
    drawn = figure.draw({arm: study.stored(arm) for arm in study.ARMS})
    assert len([ax for ax in drawn.axes if ax.get_title()]) == 2 * len(study.ARMS)
    matplotlib.pyplot.close("all")
