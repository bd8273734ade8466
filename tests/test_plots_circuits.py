"""Figures of circuits: marks, labels, arrows and cells say what the circuit or result holds; crowds; odd input."""

import itertools
import json

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from finetune_lens import InputError
from finetune_lens.circuits import Circuit, Group
from finetune_lens.circuits.comparison import compare_circuits
from finetune_lens.plots.circuit_diagram import circuit_diagram
from finetune_lens.plots.circuit_overlap import circuit_overlap
from finetune_lens.plots.head_effects import head_effects
from finetune_lens.results.paths import Paths

SMALL = {
    "groups": {
        "value_fetcher": {"position": -1, "heads": [[2, 1], [2, 0], [1, 2]], "scores": [-0.4, 0.1, -0.025]},
        "position_transmitter": {"position": -1, "heads": [[1, 0], [1, 1]], "scores": [-0.2, -0.05]},
        "position_detector": {"position": "label:last", "heads": [[0, 2], [1, 0]], "scores": [-0.3, -0.1]},
        "structure_reader": {"position": "label:first", "heads": [[0, 0], [0, 1]], "scores": [-0.1, -0.06]},
    },
    "model": {"model": "tiny", "layers": 3, "heads": 3},
}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def large(seed=0, sizes=(40, 7, 20, 5)):
    """A circuit of the size of the published ones, of 32 × 32 heads."""
    rng = np.random.default_rng(seed)
    groups = {}
    for (name, group), size, middle in zip(SMALL["groups"].items(), sizes, (20, 14, 9, 10), strict=True):
        heads = {(int(np.clip(rng.normal(middle, 4), 0, 31)), int(rng.integers(32))) for _ in range(3 * size)}
        groups[name] = Group(group["position"], tuple(sorted(heads)[:: max(1, len(heads) // size)][:size]))
    return Circuit(groups, {"layers": 32, "heads": 32})


def marks(ax):
    """Colour → (head, 2) of every group."""
    return {to_hex(c.get_facecolor()[0]): np.asarray(c.get_offsets()) for c in scatters(ax)}


def scatters(ax):
    return [c for c in ax.collections if isinstance(c, PathCollection)]


def named(ax):
    """Group (as the figure spells it) → colour."""
    texts = [t for t in ax.texts if t.get_text() not in ("", "logits") and t not in labels(ax)]
    return {t.get_text().replace("\n", " "): to_hex(t.get_color()) for t in texts}


def labels(ax):
    return [t for t in ax.texts if t.get_text().count(".") == 1]


def columns(ax):
    return [t.get_text() for t in sorted(ax.get_xticklabels(), key=lambda t: t.get_position()[0])]


def boxes(ax):
    return {to_hex(p.get_edgecolor()): p for p in ax.patches if isinstance(p, FancyBboxPatch)}


def arrows(ax):
    """(from, to) in data coordinates, of the annotations that are arrows."""
    return [(t.get_position(), t.xy) for t in ax.texts if isinstance(getattr(t, "arrow_patch", None), FancyArrowPatch)]


def overlapping(texts):
    extents = [t.get_window_extent() for t in texts]
    return [(a, b) for a, b in itertools.combinations(extents, 2) if a.overlaps(b)]


def test_every_head_has_its_place_in_the_diagram():
    ax = circuit_diagram(SMALL)
    groups = named(ax)
    assert list(groups) == ["value fetcher", "position transmitter", "position detector", "structure reader"]
    for name, group in SMALL["groups"].items():
        places = marks(ax)[groups[name.replace("_", " ")]]
        assert places[:, 1].tolist() == [layer for layer, _ in group["heads"]]
        box = boxes(ax)[groups[name.replace("_", " ")]].get_bbox()
        assert ((places > box.min) & (places < box.max)).all()
        for one, other in itertools.combinations(range(len(places)), 2):
            if group["heads"][one][0] == group["heads"][other][0]:  # of one layer: by number
                assert (places[one, 0] < places[other, 0]) == (group["heads"][one] < group["heads"][other])
    at = {t.get_text(): tuple(t.xy) for t in labels(ax)}
    assert len(labels(ax)) == 9
    assert at["2.1"] == tuple(marks(ax)[groups["value fetcher"]][0])
    assert not overlapping(labels(ax))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2"]


def test_larger_scores_have_larger_marks():
    ax = circuit_diagram(SMALL)
    groups = named(ax)
    sizes = {to_hex(c.get_facecolor()[0]): c.get_sizes() for c in scatters(ax)}
    drawn = np.concatenate([sizes[groups[name.replace("_", " ")]] for name in SMALL["groups"]])
    scores = np.abs(np.concatenate([group["scores"] for group in SMALL["groups"].values()]))
    np.testing.assert_allclose((drawn - drawn.min()) / np.ptp(drawn), (scores - scores.min()) / np.ptp(scores))
    assert "up to 0.4" in ax.get_title()
    tenfold = {n: g | {"scores": [10 * s for s in g["scores"]]} for n, g in SMALL["groups"].items()}
    again = np.concatenate([c.get_sizes() for c in scatters(circuit_diagram({"groups": tenfold}))])
    np.testing.assert_allclose(again, np.concatenate([c.get_sizes() for c in scatters(ax)]))
    silent = {"groups": {n: g | {"scores": []} for n, g in SMALL["groups"].items()}}
    ax = circuit_diagram(silent)
    assert len({size for c in scatters(ax) for size in c.get_sizes()}) == 1
    assert not ax.get_title()


def test_columns_follow_the_prompt():
    ax = circuit_diagram(SMALL)
    assert columns(ax) == ["label:first", "label:last", "last token"]
    middles = {name: box.get_bbox().x0 for name, box in ((n, boxes(ax)[c]) for n, c in named(ax).items())}
    assert sorted(middles, key=middles.get) == [
        "structure reader", "position detector", "position transmitter", "value fetcher",
    ]  # fmt: skip
    positions = [-1, "label:last", 5, "label:2", 0, "label:first", -2, "label:-2"]
    groups = {f"g{i}": {"position": p, "heads": [[i, 0]]} for i, p in enumerate(positions)}
    ax = circuit_diagram({"groups": groups})
    assert columns(ax) == [
        "token 0", "token 5", "label:first", "label:2", "label:-2", "label:last", "token −2", "last token",
    ]  # fmt: skip


def test_arrows_lead_to_what_was_found_before():
    ax = circuit_diagram(SMALL)
    order = [boxes(ax)[colour].get_bbox() for colour in named(ax).values()]
    *between, last = arrows(ax)
    assert len(between) == 3
    for (begin, end), target, source in zip(between, order, order[1:], strict=False):
        assert begin[0] == pytest.approx(source.x1)
        assert source.y0 < begin[1] < source.y1
        assert end[0] == pytest.approx(target.x0)
        assert target.y0 < end[1] < target.y1
    logits, top = last
    assert logits[0] == pytest.approx((order[0].x0 + order[0].x1) / 2)
    assert top[1] == pytest.approx(order[0].y1)
    assert logits[1] > top[1]
    turned = {"groups": dict(reversed(SMALL["groups"].items()))}  # found in the order of the prompt: arrows lead back
    ax = circuit_diagram(turned)
    target, source, *_ = (boxes(ax)[colour].get_bbox() for colour in named(ax).values())
    begin, end = arrows(ax)[0]
    assert begin[0] == pytest.approx(source.x0)
    assert end[0] == pytest.approx(target.x1)


def test_names_of_heads_only_where_all_have_room():
    ax = circuit_diagram(large())
    assert len(labels(ax)) == 72
    assert not overlapping(labels(ax))
    names = [t for t in ax.texts if t.get_text().replace("\n", " ") in named(ax)]
    assert not overlapping(names + labels(ax))
    crowd = large(sizes=(90, 30, 60, 40))
    ax = circuit_diagram(crowd)
    assert not labels(ax)
    assert sum(map(len, marks(ax).values())) == sum(len(g.heads) for g in crowd.groups.values())
    for colour, places in marks(ax).items():  # in the middle, where there is no label beside them
        box = boxes(ax)[colour].get_bbox()
        assert places[:, 0].min() - box.x0 == pytest.approx(box.x1 - places[:, 0].max(), abs=0.02)


def test_names_stay_within_the_axes():
    for circuit in (SMALL, large()):
        ax = circuit_diagram(circuit)
        frame = ax.get_window_extent()
        for text in ax.texts:
            if text.get_text():
                box = text.get_window_extent()
                assert box.y0 >= frame.y0 - 0.5
                assert box.y1 <= frame.y1 + 0.5


def test_a_circuit_and_its_file_are_drawn_alike(tmp_path):
    path = Circuit({n: Group(g["position"], tuple(map(tuple, g["heads"])), tuple(g["scores"]))
                    for n, g in SMALL["groups"].items()}, SMALL["model"]).save(tmp_path / "c.json")  # fmt: skip
    one, other = circuit_diagram(Circuit.load(path)), circuit_diagram(json.loads(path.read_text()))
    assert marks(one).keys() == marks(other).keys()
    for colour, places in marks(one).items():
        np.testing.assert_array_equal(places, marks(other)[colour])


def test_the_model_has_more_layers_than_the_circuit():
    heads = {"groups": {"a": {"position": -1, "heads": [[1, 0]]}}}
    assert len(circuit_diagram(heads).get_yticks()) == 2
    assert len(circuit_diagram(heads | {"model": {"layers": 5}}).get_yticks()) == 5


@pytest.mark.parametrize("bad", [{}, {"groups": {}}, {"groups": {"a": {"position": 1, "heads": []}}}, 3])
def test_what_is_no_circuit(bad):
    with pytest.raises(InputError, match="expected a circuit"):
        circuit_diagram(bad)


def overlap(**options):
    heads = [(n // 32, n % 32) for n in range(40)]
    one = Circuit({"value_fetcher": Group(-1, tuple(heads[:20])), "reader": Group(0, tuple(heads[20:24]))})
    other = Circuit({
        "reader": Group(0, tuple(heads[22:26])), "value_fetcher": Group(-1, tuple(heads[5:30])),
        "mover": Group(-1, tuple(heads[30:31])),
    })  # fmt: skip
    return compare_circuits(one, other, **options)


def test_the_overlap_matrix():
    result = overlap(layers=32, heads=32)
    ax = circuit_overlap(result)
    cells = ax.images[0].get_array()
    np.testing.assert_allclose(cells, [[15 / 20, 0, 0], [1, 2 / 4, 0]])
    said = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in ax.texts}
    assert said[0, 0] == f"15\n({20 * 25 / 1024:.2g})"
    assert said[1, 1] == f"2\n({4 * 4 / 1024:.2g})"
    assert said[0, 2] == f"0\n({20 / 1024:.2g})"
    hatched = {tuple(np.add(p.get_xy(), 0.5)[::-1]) for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()}
    assert hatched == {(0, 1), (0, 2), (1, 2)}  # nothing is shared there
    assert [t.get_text() for t in ax.get_yticklabels()] == ["value\nfetcher\n(20)", "reader\n(4)"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["value\nfetcher\n(25)", "reader\n(4)", "mover\n(1)"]
    assert ax.get_xlabel() == "group in other"
    assert ax.get_ylabel() == "group in one"


def test_the_overlap_matrix_without_chance():
    ax = circuit_overlap(overlap())
    assert [t.get_text() for t in ax.texts] == ["15", "0", "0", "4", "2", "0"]
    assert not [p for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()]
    assert "chance" not in ax.get_title()


def test_the_overlap_matrix_of_many_groups():
    crowd = {"layers": 16, "heads": 16}
    groups = {f"group_{i}": Group(-1, tuple((n // 16, n % 16) for n in range(i, i + 200))) for i in range(8)}
    result = compare_circuits(Circuit(groups, crowd), Circuit(groups, crowd))
    ax = circuit_overlap(result)
    ax.figure.canvas.draw()
    assert not overlapping(ax.get_xticklabels())
    assert not overlapping(ax.texts)
    assert ax.texts[0].get_text() == "200\n(156)"


def paths(effects, metric="logit_diff"):
    """Of effects (model, group, layer, head, example)."""
    groups = [f"group_{i}" for i in range(effects.shape[1])]
    coords = {
        "model": ["base", "tuned"][: len(effects)], "group": groups, "layer": np.arange(effects.shape[2]),
        "head": np.arange(effects.shape[3]), "example": [str(i) for i in range(effects.shape[4])],
    }  # fmt: skip
    dims = tuple(coords)
    data = {"logit_diff": (dims, effects), "prob": (dims, effects / 2)}
    data["recipient_prob"] = (("model", "example"), np.full((len(effects), effects.shape[4]), 0.5))
    return Paths(xr.Dataset(data, coords, {"metric": metric, "groups": "{}", "freeze": "z"}))


@pytest.fixture(scope="module")
def measured():
    """Two groups of 3 × 4 heads, 30 examples; of the first, 0.1 and 2.3 differ; 1.2 is the same, and all of the second,
    of which layer 2 reaches nothing."""
    noise = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 30))
    effects = 0.01 * noise
    effects[:, 0, 1, 2] -= 0.8
    effects[0, 0, 0, 1] -= 0.2
    effects[1, 0, 0, 1] -= 0.6
    effects[1, 0, 2, 3] += 0.5
    effects[1, 1] = effects[0, 1, ..., ::-1]
    effects[:, 1, 2] = 0
    return paths(effects)


def test_heads_in_one_model_against_the_other(measured):
    axes = head_effects(measured)
    assert [ax.get_title() for ax in axes] == ["group 0", "group 1"]
    effects = measured.data["logit_diff"].values
    for ax, group, kept in zip(axes, (0, 1), (12, 8), strict=True):
        grey, blue = scatters(ax)
        drawn = np.concatenate([np.asarray(c.get_offsets()) for c in (grey, blue)])
        means = effects[:, group, : kept // 4].mean(-1).reshape(2, -1).T
        np.testing.assert_allclose(sorted(drawn.tolist()), sorted(means.tolist()))
    grey, blue = scatters(axes[0])
    assert sorted(t.get_text() for t in axes[0].texts) == ["0.1", "2.3"]
    np.testing.assert_allclose(
        sorted(np.asarray(blue.get_offsets()).tolist()),
        sorted(effects[:, 0, [0, 2], [1, 3]].mean(-1).T.tolist()),
    )
    assert not axes[1].texts
    (line,) = [line for line in axes[0].lines if len(set(line.get_xdata())) == 2 and len(set(line.get_ydata())) == 2]
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert axes[0].get_xlim() == axes[0].get_ylim()
    assert axes[0].get_xlabel() == "effect in base"
    assert axes[0].get_ylabel() == "effect in tuned"


def test_intervals_are_those_of_the_result(measured):
    axes = head_effects(measured)
    frame = measured.to_frame().query("group == 'group_0'")
    segments = [s for c in axes[0].collections if isinstance(c, LineCollection) for s in c.get_segments()]
    across = {tuple(np.round(s[:, 0], 9)) for s in segments if s[0, 1] == s[1, 1]}
    upright = {tuple(np.round(s[:, 1], 9)) for s in segments if s[0, 0] == s[1, 0]}
    for drawn, model in ((across, "base"), (upright, "tuned")):
        expected = frame[frame["model"] == model][["low", "high"]].to_numpy()
        assert drawn == {tuple(np.round(ends, 9)) for ends in expected}


def test_names_of_heads_do_not_cover_each_other():
    rng = np.random.default_rng(1)
    effects = 0.001 * rng.normal(size=(2, 1, 10, 10, 20))
    effects[0] -= rng.exponential(0.1, size=(1, 10, 10, 1))
    effects[1] -= rng.exponential(0.1, size=(1, 10, 10, 1))
    result = paths(effects, "relative_prob")
    (ax,) = head_effects(result)
    assert 10 < len(ax.texts) < 100  # as many as have room
    assert not overlapping(ax.texts)
    points = ax.transData.transform(np.concatenate([np.asarray(c.get_offsets()) for c in scatters(ax)]))
    assert not any(t.get_window_extent().contains(*p) for t in ax.texts for p in points)
    (box,) = ax.figure.legends
    assert box.get_title().get_text() == "effect: relative change of the answer's probability"


def test_the_largest_differences_are_named_first():
    """Fifty heads almost at one place, and one far off."""
    effects = 1e-6 * np.random.default_rng(0).normal(size=(2, 1, 5, 10, 20))
    effects[1] += np.arange(50).reshape(5, 10, 1) * 1e-4
    effects[:, 0, 0, 0] += 10
    effects[1, 0, 0, 0] += 1
    (ax,) = head_effects(paths(effects))
    names = [t.get_text() for t in ax.texts]
    assert names[:3] == ["0.0", "4.9", "4.8"]
    assert len(names) < 20


def test_heads_of_one_model(measured):
    with pytest.raises(InputError, match="one was run"):
        head_effects(Paths(measured.data.isel(model=[0])))


def test_a_group_that_nothing_reaches(measured):
    result = Paths(measured.data.isel(group=[1], layer=[2]))
    (ax,) = head_effects(result)
    assert [t.get_text() for t in ax.texts] == ["no head has an effect"]


def test_into_given_axes(measured):
    figure, axes = plt.subplots(1, 4, figsize=(12, 3))
    assert circuit_diagram(SMALL, ax=axes[0]) is axes[0]
    assert circuit_overlap(overlap(), ax=axes[1]) is axes[1]
    assert list(head_effects(measured, axes=axes[2:])) == list(axes[2:])
    assert [ax.get_ylabel() for ax in axes[2:]] == ["effect in tuned"] * 2
    assert not figure.legends


def test_many_panels(measured):
    many = Paths(measured.data.isel(group=[0, 1, 0, 1, 0, 1]).assign_coords(group=[f"g{i}" for i in range(6)]))
    axes = head_effects(many)
    assert len(axes) == 6
    axes[0].figure.canvas.draw()
    assert sum(bool(ax.get_ylabel()) for ax in axes) == 2  # the first of every row
