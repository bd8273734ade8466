"""Figures of grafts: lines, cells, words say what the result holds; sweeps, single sparsities, undefined recovery."""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import LogNorm, to_hex, to_rgb
from matplotlib.patches import Rectangle
from scipy.stats import binomtest

from finetune_lens import InputError, plots
from finetune_lens.results.grafting import Grafting

METHODS = ("graft", "largest |Δ|", "largest |g⊙Δ|", "movement", "random")
HITS = {"graft": 0.9, "largest |Δ|": 0.6, "largest |g⊙Δ|": 0.5, "movement": 0.2, "random": 0.0}
COMPONENTS = {"q": 40, "v": 40, "down": 120}  # entries of each, in every layer
N = 60


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def grafting(*, levels=(0.1, 0.01, 0.05), layers=2, texts=False, gap=True, beside=False):
    """Masks that answer the first share HITS·(1 − level) of examples; the base answers none, the tuned model all."""
    files = ("train", "test")
    each, both = ("file", "mask", "level", "example"), ("file", "example")
    shape = (2, len(METHODS), len(levels), N)
    right, metric = np.zeros(shape), "logprob" if texts else "accuracy"
    for m, method in enumerate(METHODS):
        for v, level in enumerate(levels):
            right[:, m, v, : round(N * HITS[method] * (1 - level))] = 1
    ends = {"base": np.zeros((2, N)), "tuned": np.full((2, N), float(gap)), "blocks": np.full((2, N), float(gap))}
    said = np.tile(np.linspace(0.05, 0.99, N), (2, 1))
    data = {"accuracy": (each, right), "logprob": (each, right - 1), "agreement": (each, right)}
    data["confidence"] = (each, np.full(shape, np.nan) if texts else np.broadcast_to(0.9 * said[:, None, None], shape))
    for end, values in ends.items():
        data |= {f"{end}_accuracy": (both, np.full((2, N), np.nan) if texts else values)}
        data |= {f"{end}_logprob": (both, values - 1)}
        data |= {f"{end}_confidence": (both, np.full((2, N), np.nan) if texts else said)}
    if texts:
        data["accuracy"] = (each, np.full(shape, np.nan))
    data["blocks_agreement"] = (both, np.ones((2, N)))

    names = [f"{c}{n}" for n in range(layers) for c in COMPONENTS]
    count = np.array([COMPONENTS[c] for _ in range(layers) for c in COMPONENTS])
    inside = np.stack([np.stack([np.round(count * v) for v in levels])] * len(METHODS))
    inside[:, :, 1] = 0  # v of the first layer has none
    inside[:, :, 2] *= 5
    data["entries_by_weight"] = (("mask", "level", "matrix"), inside)
    data["entries"] = (("mask", "level"), inside.sum(-1))
    data |= {name: ("matrix", np.ones(len(names))) for name in ("delta_norm", "delta_sum", "sensitivity")}
    data["count"] = ("matrix", count)
    steps = np.arange(4.0)
    climbs = np.stack([steps / 4 + level for level in levels])
    data["search_metric"] = (("level", "step"), climbs)
    data["search_entries"] = (("level", "step"), np.stack([1000 * level * (4 + steps) for level in levels]))
    data["search_best"] = ("level", np.arange(len(levels)) % 3 + 1)
    coords = {
        "file": np.array(files, dtype=object), "mask": np.array(METHODS, dtype=object), "level": np.array(levels),
        "matrix": np.array(names, dtype=object), "layer": ("matrix", np.repeat(np.arange(layers), len(COMPONENTS))),
        "component": ("matrix", np.array([*COMPONENTS] * layers, dtype=object)),
    }  # fmt: skip
    if beside:
        data["shared"] = (("graft", "other"), np.array([[40, 20, 1], [20, 30, 0], [1, 0, 10]]))
        data["size"] = ("graft", np.array([40, 30, 10]))
        coords |= {d: np.array(["this", "a", "a-rather-long-name"], dtype=object) for d in ("graft", "other")}
    attrs = {"metric": metric, "objective": "text" if texts else "answer", "entries": int(count.sum())}
    return Grafting(xr.Dataset(data, coords=coords, attrs={**attrs, "concentration": 0.2}))


def line_of(ax, label):
    """The line that the figure's legend calls so."""
    (box,) = ax.figure.legends
    handles = dict(zip([t.get_text() for t in box.get_texts()], box.legend_handles, strict=True))
    colour = to_hex(handles[label].get_color())
    (found,) = [line for line in ax.lines if to_hex(line.get_color()) == colour and line.get_marker() != "None"]
    return found


def words(ax):
    return [t.get_text() for t in ax.texts]


def whiskers(ax):
    """(x, low, high) of every interval."""
    segments = [s for c in ax.collections if isinstance(c, LineCollection) for s in c.get_segments()]
    return {(float(s[0, 0]), *np.round(sorted(s[:, 1]), 9)) for s in segments}


def legend_words(ax):
    return [t.get_text() for t in ax.figure.legends[0].get_texts()]


def test_recovery_of_a_sweep_in_the_order_of_the_shares():
    result = grafting()
    result.data["entries"][:] = result.data["entries"].values[:, ::-1]  # a small base mask may end as a large graft
    ax = plots.graft_recovery(result)
    assert ax.get_xscale() == "log"
    assert "test" in ax.get_title()
    assert legend_words(ax) == [*METHODS, "all of the blocks"]
    frame = result.to_frame().query("file == 'test'").sort_values("share")
    expected = set()
    for method in legend_words(ax):
        part = frame[frame["method"] == method]
        drawn = line_of(ax, method)
        np.testing.assert_allclose(drawn.get_xdata(), part["share"])
        np.testing.assert_allclose(drawn.get_ydata(), part["recovery"])
        ends = part[["share", "recovery_low", "recovery_high"]].to_numpy()
        expected |= {(float(x), *np.round((low, high), 9)) for x, low, high in ends}
    assert whiskers(ax) == expected
    levels = [
        line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1 and line.get_marker() == "None"
    ]
    assert {0.95, 1} <= set(levels)


def test_recovery_on_another_file():
    result = grafting()
    result.data["accuracy"][0] = 0.0  # on train nothing is answered
    assert set(line_of(plots.graft_recovery(result, file="train"), "graft").get_ydata()) == {0.0}
    assert 0.0 not in line_of(plots.graft_recovery(result), "graft").get_ydata()


def test_recovery_at_one_sparsity_is_points_beside_each_other():
    result = grafting(levels=(0.05,))
    ax = plots.graft_recovery(result)
    lines = [line_of(ax, method) for method in METHODS]
    assert {line.get_linestyle() for line in lines} == {"None"}
    at = np.array([line.get_xdata()[0] for line in lines])
    assert len(set(at)) == len(METHODS)
    np.testing.assert_allclose(at, result.share(), rtol=0.2)  # apart to be seen, not far
    np.testing.assert_allclose(np.exp(np.log(at).mean()), result.share())
    assert line_of(ax, "all of the blocks").get_xdata() == [1.0]


@pytest.mark.parametrize("texts", [False, True])
def test_where_recovery_is_undefined_the_metric_is_drawn(texts):
    result = grafting(gap=False, texts=texts)
    ax = plots.graft_recovery(result)
    assert any("undefined" in text for text in words(ax))
    assert "recovery" not in ax.get_ylabel()
    order = np.argsort(result.levels)
    values = result.data["logprob" if texts else "accuracy"].sel(file="test", mask="graft").mean("example").values
    np.testing.assert_allclose(line_of(ax, "graft").get_ydata(), values[order])
    assert {"base model", "tuned model"} <= set(legend_words(ax))


def test_recovery_without_other_masks():
    result = grafting()
    result = Grafting(result.data.sel(mask=["graft"]))
    assert legend_words(plots.graft_recovery(result)) == ["graft", "all of the blocks"]


def density(axes):
    (mesh,) = [c for c in axes[0].collections if isinstance(c, QuadMesh)]
    return mesh, np.ma.masked_array(mesh.get_array()).reshape(len(axes[0].get_yticks()), -1)


@pytest.mark.parametrize("layers", [2, 48])
def test_where_the_mask_lies(layers):
    result = grafting(layers=layers)
    axes = plots.graft_where(result, level=0.1)
    mesh, cells = density(axes)
    assert [t.get_text() for t in axes[0].get_yticklabels()] == [*COMPONENTS]
    expected = np.full((3, layers), 0.1)
    expected[2, 0] = 0.5
    expected[1, 0] = np.nan
    np.testing.assert_allclose(cells.filled(np.nan), expected)
    assert isinstance(mesh.norm, LogNorm)
    (crosses,) = [line for line in axes[0].lines if line.get_marker() == "x"]
    assert list(zip(*crosses.get_data(), strict=True)) == [(0, 1)]
    shares = result.where("component", level=0.1).set_index("component").loc[[*COMPONENTS]]
    whole, mask = ([bar.get_width() for bar in group] for group in axes[1].containers)
    np.testing.assert_allclose(whole, shares["share_of_entries"])
    np.testing.assert_allclose(mask, shares["share_of_mask"])
    assert axes[1].get_ylim() == axes[0].get_ylim()  # bars stand in the rows of the map
    assert f"{round(shares['entries'].sum()):,} entries" in axes[1].get_title()
    assert ("0.5" in words(axes[0])) == (layers == 2)  # numbers where they can be read


def test_where_of_the_last_sparsity_and_of_other_masks():
    result = grafting()
    result.data["entries_by_weight"].loc[{"mask": "random"}] = 1
    np.testing.assert_allclose(density(plots.graft_where(result))[1][0], 0.05)
    np.testing.assert_allclose(density(plots.graft_where(result, method="random"))[1][0], 1 / 40)


def test_where_an_empty_mask_lies():
    result = grafting()
    result.data["entries_by_weight"][:] = 0
    axes = plots.graft_where(result)
    (crosses,) = [line for line in axes[0].lines if line.get_marker() == "x"]
    assert len(crosses.get_xdata()) == 6
    axes[0].figure.canvas.draw()


def test_the_search():
    result = grafting()
    result.data["tuned_accuracy"].loc[{"file": "train"}] = 0.8
    axes = plots.graft_search(result)
    for ax, name in zip(axes, ("search_metric", "search_entries"), strict=True):
        lines = [line for line in ax.lines if line.get_marker() == "."]
        circles = [line for line in ax.lines if line.get_marker() == "o"]
        for line, circle, level in zip(lines, circles, sorted(result.levels), strict=True):
            one = result.data.sel(level=level)
            np.testing.assert_allclose(line.get_ydata(), one[name])
            best = int(one.search_best)
            np.testing.assert_allclose(np.ravel(circle.get_data()), [best, one[name][best]])
    assert legend_words(axes[0])[:3] == ["sparsity 0.01", "sparsity 0.05", "sparsity 0.1"]
    flat = {line.get_ydata()[0] for line in axes[0].lines if line.get_marker() == "None"}
    assert sorted(flat) == pytest.approx([0.0, 0.8])  # base and tuned model on the selection examples


def test_the_search_at_one_sparsity():
    axes = plots.graft_search(grafting(levels=(1e-5,)))
    assert legend_words(axes[0]) == ["sparsity 1e-05", "kept", "tuned", "base"]


def test_reliability():
    result = grafting()
    ax = plots.graft_reliability(result, level=0.01)
    for method in ("base", "tuned", "graft"):
        curve, error = result.calibration(file="test", method=method, level=0.01)
        examples = curve["examples"]
        curve = curve[examples > 0]
        label = f"{method}, ECE {error:.3f}"
        assert label in legend_words(ax)
        (line,) = [
            x for x in ax.lines
            if len(x.get_xdata()) == len(curve) and np.allclose(x.get_xdata(), curve["confidence"])
            and np.allclose(x.get_ydata(), curve["accuracy"])
        ]  # fmt: skip
        heights = next(
            [bar.get_height() for bar in group]
            for group in ax.containers
            if np.allclose(to_rgb(group[0].get_facecolor()), to_rgb(line.get_color()))
        )
        np.testing.assert_allclose(heights, examples / N)
        row = curve.iloc[-1]
        said = binomtest(round(row["accuracy"] * row["examples"]), round(row["examples"])).proportion_ci(
            method="wilson"
        )
        ends = np.array([w[1:] for w in whiskers(ax) if np.isclose(w[0], row["confidence"])])
        assert np.isclose(ends, [said.low, said.high], atol=1e-4).all(1).any()
    with pytest.raises(InputError, match="of texts"):
        plots.graft_reliability(grafting(texts=True))


def test_overlap():
    result = grafting(beside=True)
    ax = plots.graft_overlap(result)
    cells = ax.images[0].get_array()
    assert cells.mask.diagonal().all()
    assert cells[0, 1] == pytest.approx(20 / 30)  # of the second graft, in this one
    assert cells[1, 0] == pytest.approx(20 / 40)
    said = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in ax.texts}
    assert said[0, 1] == f"0.67\n({40 / 400:.2g})"
    assert said[1, 0] == f"0.5\n({30 / 400:.2g})"
    hatched = {tuple(np.add(p.get_xy(), 0.5)[::-1]) for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()}
    assert hatched == {(0, 2), (2, 0), (1, 2), (2, 1)}  # one and none shared of ten: chance
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels[:2] == ["this", "a"]
    assert labels[2].startswith("…")
    with pytest.raises(InputError, match="beside"):
        plots.graft_overlap(grafting())


def test_figures_that_apply():
    assert list(plots.figures_of(grafting())) == ["recovery", "where", "search", "reliability"]
    assert list(plots.figures_of(grafting(beside=True)))[-1] == "overlap"
    assert list(plots.figures_of(grafting(texts=True))) == ["recovery", "where", "search"]
    for result in (grafting(beside=True, layers=48), grafting(texts=True, levels=(0.05,), gap=False)):
        for make in plots.figures_of(result).values():
            make().canvas.draw()


def test_into_given_axes():
    result = grafting(beside=True)
    _, axes = plt.subplots(2, 4)
    for function, ax in (
        (plots.graft_recovery, axes[0, 0]),
        (plots.graft_reliability, axes[0, 1]),
        (plots.graft_overlap, axes[0, 2]),
    ):
        assert function(result, ax=ax) is ax
    assert list(plots.graft_where(result, axes=axes[1, :2])) == list(axes[1, :2])
    assert list(plots.graft_search(result, axes=axes[1, 2:])) == list(axes[1, 2:])
    assert not axes[0, 0].figure.legends  # the caller's figure keeps its own
