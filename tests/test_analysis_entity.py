"""The study of entity tracking: what is stored is what its code measures, and its claims are its numbers'."""

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")

from analyses import entity_tracking as study
from figures import entity_tracking as figure
from finetune_lens.circuits import circuit_of


@pytest.fixture(scope="module")
def stored():
    return study.stored()


def test_the_report_is_that_of_the_results(stored):
    assert study.report(stored) == (study.RESULTS / "entity_tracking.md").read_text()


def test_the_circuits_are_those_of_the_results(stored):
    for name, circuit in study.circuits().items():
        assert circuit.model["model"] == f"boxes/{name}"
        assert circuit.places == circuit_of(stored[f"{name}-paths"]).places


def test_the_stored_paths_are_those_of_the_pair(stored):
    """On some of the prompts, measured again."""
    rows = study.prompts(study.PATHS, "random", 1)[:12]
    import finetune_lens as fl

    again = fl.trace_paths(fl.zoo.path("boxes") / "base", rows, progress=False).values("logprob").values[0, 0]
    kept = stored["base-paths"].values("logprob").sel(group="value_fetcher").values[0, ..., :12]
    np.testing.assert_allclose(again, kept, atol=1e-3)


def test_what_the_base_does(stored):
    """The object is told at two tokens after the label, found by the label, and fetched from there at the end."""
    groups = study.circuits()["base"].groups
    assert {(1, 0), (1, 1), (1, 2)} <= {*groups["value_fetcher"].heads}
    assert (0, 0) in groups["position_transmitter"].heads
    assert (0, 0) in groups["label_teller"].heads
    assert (0, 1) in groups["object_teller"].heads


def test_desiderata_ask_for_something_else():
    rows = study.desiderata(20)
    assert len({row["id"] for row in rows}) == 60
    assert all(row["corrupt_answer"] != row["answer"] for row in rows)


def test_the_figure_draws(stored):
    drawn = figure.draw(stored, study.circuits())
    assert len(drawn.axes) >= 4
    matplotlib.pyplot.close("all")
