"""Figures of patches and outputs: what is drawn is what the result holds; titles, tokens and odd results."""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import LineCollection, PathCollection, QuadMesh

from finetune_lens import InputError, plots
from finetune_lens.plots._cells import cell_name, shown
from finetune_lens.results.check import Check
from finetune_lens.results.cmap import CrossPatching
from finetune_lens.results.outputs import Outputs
from finetune_lens.results.patching import Patching

SIZES = {"layer": 3, "position": 5, "head": 4, "set": 2}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def patching(dims=("layer", "position"), directions=("denoising",), *, gap=2.0, attribution=False, kind=Patching, n=12):
    """Effects of known means: cell i has the mean i·gap/cells, but for a little noise."""
    rng = np.random.default_rng(0)
    shape = (len(directions), *(SIZES[d] for d in dims), n)
    cells = int(np.prod(shape[1:-1]))
    means = (np.arange(cells) * gap / cells).reshape(1, *shape[1:-1], 1)
    effect = means + 0.01 * rng.normal(size=shape)
    all_dims = ("direction", *dims, "example")
    data = {"logit_diff": (all_dims, effect), "prob": (all_dims, effect / 10)}
    for name in ("logit_diff", "prob"):
        data[f"recipient_{name}"] = (("direction", "example"), rng.normal(size=(len(directions), n)))
        data[f"donor_{name}"] = (("direction", "example"), data[f"recipient_{name}"][1] + gap)
    if attribution:
        data["attribution_logit_diff"] = (all_dims, effect * 0.5)
    if kind is CrossPatching:
        data["random_logit_diff"] = (all_dims, 0.1 * rng.normal(size=shape))
        data["self_donor"] = ("direction", np.zeros(len(directions)))
    tokens = np.array([["<bos>", " the", f" w{i}", "$x$", "\n"] for i in range(n)], dtype=object)
    data["tokens"] = (("example", "position"), tokens)
    coords = {d: np.arange(SIZES[d]) for d in {*dims, "position"} - {"set"}}
    coords |= {"set": np.array(["first", "second"], dtype=object)} if "set" in dims else {}
    coords |= {
        "direction": np.array(directions, dtype=object),
        "example": np.array([str(i) for i in range(n)], dtype=object),
    }
    attrs = {"grid": " ".join(dims), "metric": "logit_diff", "site": "z", "method": "exact"}
    return kind(xr.Dataset(data, coords=coords, attrs=attrs))


def mesh(ax):
    (found,) = [c for c in ax.collections if isinstance(c, QuadMesh)]
    return found


def test_the_map_shows_recovery():
    result = patching()
    ax = plots.patching_heatmap(result)
    expected = result.recovery()["ratio"].sel(direction="denoising").transpose("layer", "position").values
    np.testing.assert_allclose(mesh(ax).get_array().reshape(expected.shape), expected)
    assert mesh(ax).norm.vmin == -mesh(ax).norm.vmax  # white is 0
    assert [t.get_text() for t in ax.get_xticklabels()] == ["<bos>", "the", "(2)", r"\$x\$", "↵"]
    assert ax.get_ylabel() == "layer"
    assert ax.yaxis.get_inverted()  # layer 0 on top
    assert ax.get_title().startswith("denoising")


def test_the_map_shows_effects_where_recovery_is_undefined():
    result = patching(gap=0.0)
    result.data["donor_logit_diff"] = result.data["recipient_logit_diff"] + result.data["prob"].isel(
        layer=0, position=0
    )
    expected = result.effect()["mean"].sel(direction="denoising").values
    ax = plots.patching_heatmap(result)
    np.testing.assert_allclose(mesh(ax).get_array().reshape(expected.shape), expected)
    assert "effect on" in ax.figure.axes[-1].get_ylabel()


def test_one_example():
    result = patching()
    ax = plots.patching_heatmap(result, example="3")
    one = result.data.sel(direction="denoising", example="3")
    expected = (one["logit_diff"] / (one["donor_logit_diff"] - one["recipient_logit_diff"])).values
    np.testing.assert_allclose(mesh(ax).get_array().reshape(expected.shape), expected)
    assert [t.get_text() for t in ax.get_xticklabels()][2] == "w3"
    with pytest.raises(InputError, match="no example '99'"):
        plots.patching_heatmap(result, example="99")


def test_dots_are_the_cells_clear_of_zero():
    result = patching()
    ax = plots.patching_heatmap(result)
    drawn = {(int(y), int(x)) for line in ax.lines for x, y in zip(*line.get_data(), strict=True)}
    frame = result.to_frame()
    expected = set(frame.loc[frame["p_adjusted"] < 0.05, ["layer", "position"]].itertuples(index=False, name=None))
    assert drawn == expected
    assert 0 < len(drawn) < len(frame)  # the first cell has no effect


def test_dots_across_models_are_clear_of_the_other_prompt_too():
    result = patching(("layer", "head"), ("tuned→base",), kind=CrossPatching)
    result.data["random_logit_diff"] = result.data["logit_diff"].copy()
    assert not any(len(line.get_xdata()) for line in plots.patching_heatmap(result).lines)


def test_missing_cells_stay_empty():
    result = patching()
    result.data["logit_diff"][0, 1, 2] = np.nan
    ax = plots.patching_heatmap(result)
    assert np.ma.getmaskarray(mesh(ax).get_array()).reshape(3, 5)[1, 2]


def test_an_infinite_cell_does_not_set_the_colours():
    result = patching()
    result.data["logit_diff"][0, 1, 2] = np.inf
    assert np.isfinite(mesh(plots.patching_heatmap(result, quantity="effect")).norm.vmax)


@pytest.mark.parametrize("dims", [("layer", "head"), ("head", "position")])
def test_other_grids(dims):
    ax = plots.patching_heatmap(patching(dims))
    assert ax.get_ylabel() == dims[0]


def test_directions_are_named():
    result = patching(directions=("denoising", "noising"))
    with pytest.raises(InputError, match="pass direction, one of denoising, noising"):
        plots.patching_heatmap(result)
    assert plots.patching_heatmap(result, direction="noising").get_title().startswith("noising")
    with pytest.raises(InputError, match="two dimensions"):
        plots.patching_heatmap(patching(("layer",)))
    with pytest.raises(InputError, match="quantity is"):
        plots.patching_heatmap(patching(), quantity="share")


def test_bars():
    result = patching(("set",))
    ax = plots.patching_bars(result)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["first", "second"]
    (points,) = [line for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points.get_xdata(), result.effect()["mean"].values.ravel())
    (whiskers,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    ends = np.array([s[:, 0] for s in whiskers.get_segments()])
    np.testing.assert_allclose(ends[:, 0], result.effect()["low"].values.ravel())
    np.testing.assert_allclose(ends[:, 1], result.effect()["high"].values.ravel())


def test_bars_are_the_largest():
    result = patching(("layer", "head"))
    ax = plots.patching_bars(result, n=3)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["2.3", "2.2", "2.1"]


def test_cross_patches():
    result = patching(("layer", "head"), ("tuned→base", "base→tuned"), kind=CrossPatching)
    axes = plots.cmap_bars(result, n=4)
    assert [ax.get_title() for ax in axes] == ["tuned→base", "base→tuned"]
    assert [[t.get_text() for t in ax.get_yticklabels()] for ax in axes] == [["2.3", "2.2", "2.1", "2.0"]] * 2
    for ax, name in zip(axes, result.directions, strict=True):
        frame = result.to_frame().loc[lambda f, name=name: f["direction"] == name].set_index(["layer", "head"])
        widths = [bar.get_width() for bar in ax.patches if bar.get_height() == 0.55]
        np.testing.assert_allclose(widths, [frame.loc[(2, h), "effect"] for h in (3, 2, 1, 0)])
        (circles,) = [line for line in ax.lines if line.get_marker() == "o"]
        np.testing.assert_allclose(circles.get_xdata(), [frame.loc[(2, h), "random_effect"] for h in (3, 2, 1, 0)])


def test_effects_that_hurt_count_as_much():
    result = patching(("layer", "head"), ("tuned→base",), kind=CrossPatching)
    result.data["logit_diff"] = -result.data["logit_diff"]
    (ax,) = plots.cmap_bars(result, n=2)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["2.3", "2.2"]


def test_cross_patches_without_control():
    result = patching(("layer",), ("tuned→base",), kind=CrossPatching)
    result.data = result.data.drop_vars("random_logit_diff")
    (ax,) = plots.cmap_bars(result)
    assert not [line for line in ax.lines if line.get_marker() == "o"]


def test_attribution():
    result = patching(("layer", "head"), attribution=True)
    ax = plots.attribution_against_exact(result)
    (points,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    frame = result.to_frame()
    np.testing.assert_allclose(points.get_offsets(), frame[["effect", "attribution"]].to_numpy())
    words = [t.get_text() for t in ax.texts]
    assert "2.3" in words  # half of the largest effect is the worst disagreement
    assert "rank correlation 1.00" in words
    with pytest.raises(InputError, match="not both there"):
        plots.attribution_against_exact(patching())


def outputs(*, texts=3, length=6, lens=True, answers=True):
    rng = np.random.default_rng(0)
    at, side = (texts, length), (2, texts, length)
    each, both = ("example", "position"), ("side", "example", "position")
    data = {n: (each, rng.random(at)) for n in ("kl", "kl_reverse", "js")}
    data["js"][1][1] += 1.0  # the second text changed most
    data["js"] = (each, data["js"][1] / 3)
    data["flip"] = (each, (rng.random(at) < 0.5).astype(float))
    data |= {n: (both, rng.random(side)) for n in ("entropy", "loss", "top_prob")}
    data["top"] = (both, np.array([[[f" {s}{p}" for p in range(length)]] * texts for s in "bt"], dtype=object))
    data["token"] = (each, np.array([[f" x{p}" for p in range(length)]] * texts, dtype=object))
    data["accuracy"] = (("side", "example"), rng.random((2, texts)))
    data |= {n: ("word", np.array([0.2, -0.1])) for n in ("shift", "shift_error", "base_prob")}
    coords = {"side": np.array(["base", "tuned"], dtype=object), "position": np.arange(length)}
    coords |= {"example": np.array([f"e{i}" for i in range(texts)], dtype=object)}
    coords |= {"word": np.array([" a", " b"], dtype=object)}
    if lens:
        data |= {n: (("side", "depth", "example"), rng.random((2, 4, texts))) for n in ("lens_loss", "lens_agreement")}
        values = rng.random((2, 4, texts)) if answers else np.full((2, 4, texts), np.nan)
        data["lens_answer"] = (("side", "depth", "example"), values)
        data["lens_kl"] = (("depth", "example"), rng.random((4, texts)))
        coords["depth"] = np.arange(4)
    return Outputs(xr.Dataset(data, coords=coords))


def test_tokens_of_the_text_that_changed_most():
    result = outputs()
    ax = plots.outputs_tokens(result)
    assert "text e1" in ax.get_title()
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(heights, result.data["js"].sel(example="e1").values / np.log(2))
    assert [t.get_text() for t in ax.get_xticklabels()] == [f"x{p}" for p in range(6)]
    flips = np.flatnonzero(result.data["flip"].sel(example="e1").values)
    assert [t.get_text() for t in ax.texts] == [f"b{p} → t{p}" for p in flips]
    assert "text e2" in plots.outputs_tokens(result, example="e2").get_title()
    with pytest.raises(InputError, match="no text 'e9'"):
        plots.outputs_tokens(result, example="e9")


def test_long_texts_are_cut_around_the_largest_change():
    result = outputs(length=200)
    result.data["js"][1, 150] = 0.69
    ax = plots.outputs_tokens(result)
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert len(labels) == 60
    assert "x150" in labels


@pytest.mark.parametrize("answers", [True, False])
def test_the_lens(answers):
    result = outputs(answers=answers)
    axes = plots.outputs_lens(result)
    frame = result.lens().query("side == 'tuned'")
    line = axes[0].lines[1]
    np.testing.assert_allclose(line.get_ydata(), frame["answer" if answers else "loss"])
    np.testing.assert_allclose(axes[2].lines[0].get_ydata(), frame["kl"])
    assert ("answer" in axes[0].get_ylabel()) == answers


def test_figures_of_each_kind():
    assert list(plots.figures_of(patching())) == ["map"]
    both = patching(directions=("denoising", "noising"), attribution=True)
    assert list(plots.figures_of(both)) == [
        "map_denoising",
        "attribution_denoising",
        "map_noising",
        "attribution_noising",
    ]
    assert list(plots.figures_of(patching(("set",)))) == ["bars"]
    crossed = patching(("layer", "head"), ("tuned→base", "base→tuned"), kind=CrossPatching)
    assert list(plots.figures_of(crossed)) == ["map_tuned_to_base", "map_base_to_tuned", "bars"]
    assert list(plots.figures_of(outputs())) == ["tokens", "lens"]
    assert list(plots.figures_of(outputs(lens=False))) == ["tokens"]
    gates = {n: ("gate", np.array(["pass"], dtype=object)) for n in ("verdict", "message")}
    assert plots.figures_of(Check(xr.Dataset(gates))) == {}
    for result in (both, crossed, outputs()):
        for make in plots.figures_of(result).values():
            make().canvas.draw()


def test_names():
    assert shown("  ") == "␣␣"
    assert shown("") == "∅"
    row = {"layer": 3, "head": 5, "position": 7, "set": "mine"}
    assert cell_name(row, ("layer",)) == "L3"
    assert cell_name(row, ("layer", "head")) == "3.5"
    assert cell_name(row, ("layer", "head", "position")) == "3.5 @ 7"
    assert cell_name(row, ("head", "position")) == "head 5 @ 7"
    assert cell_name(row, ("position",)) == "@ 7"
    assert cell_name(row, ("set",)) == "mine"
