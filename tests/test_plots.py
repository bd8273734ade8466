"""Figures: what is drawn is what the result holds; nothing odd in a result stops them; settings survive."""

import subprocess
import sys

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import LogNorm, to_hex

from finetune_lens import InputError, plots
from finetune_lens.plots._style import COMPONENTS, grouped, ordered
from finetune_lens.results.intruders import Intruders
from finetune_lens.results.updates import Updates

BLOCK = ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def names(layers, components):
    return [f"layers.{a}.{b}.{i}" for i, (a, b) in enumerate(zip(layers, components, strict=True))]


def intruders(components=BLOCK * 2, layers=(0,) * 7 + (1,) * 7, p=12, null=6, sides=("left", "right"), k=5, short=()):
    """A result with random cosines; the matrices in `short` have 4 vectors only, NaN after."""
    rng = np.random.default_rng(0)
    n = len(components)
    cosine = rng.uniform(0.05, 0.99, (len(sides), n, p))
    error = np.where(rng.random(cosine.shape) < 0.2, 0.05, 1e-12)
    per_vector = {"max_cos": cosine, "lower": cosine - error, "upper": cosine + error}
    sigma, gap = np.sort(rng.lognormal(size=(n, p)), 1)[:, ::-1].copy(), rng.exponential(0.03, (n, p))
    similarity = rng.random((len(sides), n, p, p)).astype("f4")
    for m in short:
        for values in (*per_vector.values(), similarity):
            values[:, m, 4:] = np.nan
        similarity[:, m, :, 4:] = np.nan
        sigma[m, 4:] = gap[m, 4:] = np.nan
    data = {name: (("side", "matrix", "rank"), v) for name, v in per_vector.items()}
    data |= {"sigma": (("matrix", "rank"), sigma), "gap": (("matrix", "rank"), gap)}
    data["similarity"] = (("side", "matrix", "similarity_rank", "similarity_base_rank"), similarity)
    data |= {"out": ("matrix", np.full(n, 64)), "in": ("matrix", np.where(np.arange(n) % 2, 64, 256))}
    data |= {"effective_rank": ("matrix", np.full(n, 3.0)), "unchanged": ("matrix", np.zeros(n, bool))}
    coordinates = {
        "matrix": names(layers, components),
        "layer": ("matrix", np.array(layers)),
        "component": ("matrix", np.array(components, dtype=object)),
        "side": list(sides),
        "rank": np.arange(1, p + 1),
    }
    if null:
        draws = rng.uniform(0.1, 1, (2, 5, len(sides), n, null)).astype("f4")
        draws[..., list(short), 4:] = np.nan
        data["null_max_cos"] = (("null", "draw", "side", "matrix", "null_rank"), draws)
        coordinates["null"] = ["evenly", "spectrum"]
    return Intruders(xr.Dataset(data, coordinates, {"k": k, "epsilon": 0.5, "gap": 0.01}))


def same_everywhere(result):
    """The result of comparing a model with itself."""
    for name in ("max_cos", "lower", "upper", "null_max_cos"):
        result.data[name] = xr.ones_like(result.data[name])
    result.data["unchanged"][:] = True
    return result


def updates(components=("q", "v", "q", "v", "norm"), layers=(0, 0, 1, 1, -1)):
    """Matrix m has the singular values 2^-j times m + 1, rank 3 of 6; vectors (norm) have norms only."""
    n, p, ks = len(components), 6, np.array([1, 2, 4, 8])
    matrix = np.array([c != "norm" for c in components])
    sigma = np.where(matrix[:, None], 2.0 ** -np.arange(p) * (1 + np.arange(n))[:, None], np.nan)
    chance = np.where(matrix[:, None] & (ks <= p), ks**2 / 36, np.nan)
    scale = 2.0 ** np.arange(n)[:, None]
    data = {
        "base_norm": ("matrix", np.full(n, 10.0)),
        "delta_norm": ("matrix", 0.5 * (1 + np.arange(n))),
        "sigma_delta": (("matrix", "rank"), sigma),
        "sigma_base": (("matrix", "rank"), np.where(matrix[:, None], 4.0, np.nan) * np.ones(p)),
        "delta_rank": ("matrix", np.where(matrix, 3.0, np.nan)),
        "effective_rank": ("matrix", np.where(matrix, 2.5 + np.arange(n), np.nan)),
        "energy": (("matrix", "k"), chance * scale),
        "energy_null": (("matrix", "k"), chance),
        "energy_low": (("matrix", "k"), chance / 2),
        "energy_high": (("matrix", "k"), chance * 3),
    }
    coordinates = {
        "matrix": names(layers, components),
        "layer": ("matrix", np.array(layers)),
        "component": ("matrix", np.array(components, dtype=object)),
        "rank": np.arange(1, p + 1),
        "k": ks,
    }
    return Updates(xr.Dataset(data, coordinates))


def unchanged(result):
    for name in ("delta_norm", "sigma_delta", "delta_rank"):
        result.data[name] = result.data[name] * 0
    for name in ("energy", "energy_null", "energy_low", "energy_high", "effective_rank"):
        result.data[name] = result.data[name] * np.nan
    return result


def mesh(ax):
    (found,) = [c for c in ax.collections if isinstance(c, QuadMesh)]
    return found


def written(ax):
    return [t.get_text() for t in ax.texts]


def legend_of(figure):
    return [t.get_text() for t in figure.legends[0].get_texts()]


# counts


@pytest.mark.parametrize("side", ["left", "right"])
def test_counts_are_those_of_the_result(side):
    result = intruders()
    by_epsilon, by_k = plots.intruder_counts(result, side=side)
    x, y = by_epsilon.lines[0].get_data()
    np.testing.assert_array_equal(y, result.grid(x, [5], side=side).values[:, 0])
    x, y = by_k.lines[0].get_data()
    np.testing.assert_array_equal(x, np.arange(1, 13))
    np.testing.assert_array_equal(y, result.grid([0.5], x, side=side).values[0])
    assert y[-1] > y[0] > 0
    for ax, at in ((by_epsilon, 0.5), (by_k, 5)):
        (dot,) = [line for line in ax.lines if line.get_marker() == "o"]
        assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (at, result.count(side=side))
    assert side in by_epsilon.get_ylabel()
    assert "k = 5" in by_epsilon.get_xlabel()
    assert "ε = 0.5" in by_k.get_xlabel()


def shade(ax, index):
    """x → (low, high) of a filled range."""
    path = ax.collections[index].get_paths()[0].vertices
    return {x: (path[path[:, 0] == x, 1].min(), path[path[:, 0] == x, 1].max()) for x in np.unique(path[:, 0])}


def test_the_undetermined_are_shaded_above_the_count():
    result = intruders()
    _, by_k = plots.intruder_counts(result)
    drawn = shade(by_k, 0)
    assert result.undetermined(k=9) > 0
    assert drawn[9.0] == (result.count(k=9), result.count(k=9) + result.undetermined(k=9))
    assert "with the undetermined" in legend_of(by_k.figure)


@pytest.mark.parametrize("short", [(), (0, 3)])
def test_null_band_is_the_null_of_the_result_and_ends_where_it_does(short):
    result = intruders(short=short)
    by_epsilon, by_k = plots.intruder_counts(result)
    drawn = shade(by_k, 1)
    assert max(drawn) == 6
    for k in (1, 4, 6):
        null = result.null(k=k)
        assert drawn[float(k)] == pytest.approx((null.low, null.high))
    mean, evenly = by_k.lines[1].get_ydata(), by_k.lines[2].get_ydata()
    assert mean[3] == pytest.approx(result.null(k=4).mean)
    assert evenly[3] == pytest.approx(result.null(k=4, null="evenly").mean)
    x = by_epsilon.lines[1].get_xdata()
    null = result.null(epsilon=x[69])
    assert shade(by_epsilon, 1)[x[69]] == pytest.approx((null.low, null.high))


def test_no_null_no_band():
    result = intruders(null=0)
    by_epsilon, _ = plots.intruder_counts(result)
    assert legend_of(by_epsilon.figure) == ["observed", "with the undetermined"]
    assert len(by_epsilon.collections) == 1


def test_null_shorter_than_k_is_left_out_of_the_first_panel_only():
    by_epsilon, by_k = plots.intruder_counts(intruders(k=8, null=6))
    assert len(by_epsilon.collections) == 1
    assert len(by_k.collections) == 2


# maps


def test_map_holds_the_counts():
    result = intruders()
    ax = plots.intruder_map(result, side="right")
    table = result.table("matrix", side="right")["intruders"].to_numpy().reshape(2, 7).T
    np.testing.assert_array_equal(mesh(ax).get_array(), table)
    assert table.max() > 0
    assert [t.get_text() for t in ax.get_yticklabels()] == BLOCK
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1"]
    assert written(ax) == [str(c) for c in table.ravel()]
    assert mesh(ax).get_clim() == (0, table.max())
    assert ax.get_title() == "top 5 right singular vectors, ε = 0.5"


def test_experts_add_up_and_absent_cells_are_masked():
    result = intruders(["up", "up", "q", "unembed"], [0, 0, 1, -1])
    counts = result.table("matrix")["intruders"].to_numpy()
    cells = mesh(plots.intruder_map(result)).get_array()
    np.testing.assert_array_equal(  # rows q, up, unembed; columns outside, 0, 1
        cells.mask, [[True, True, False], [True, False, True], [False, True, True]]
    )
    assert cells[1, 1] == counts[0] + counts[1]
    assert cells[0, 2] == counts[2]


def test_eighty_layers_have_room_for_colours_not_for_numbers():
    layers = np.repeat(np.arange(80), 7)
    ax = plots.intruder_map(intruders(BLOCK * 80, layers, p=5))
    assert mesh(ax).get_array().shape == (7, 80)
    assert written(ax) == []
    assert ax.figure.get_figwidth() == 6.9
    ax.figure.canvas.draw()
    shown = [t.get_text() for t in ax.get_xticklabels() if t.get_text()]
    assert shown[0] == "0"
    assert 5 < len(shown) < 40


def test_zero_counts_make_a_map():
    ax = plots.intruder_map(same_everywhere(intruders()))
    assert set(written(ax)) == {"0"}
    assert mesh(ax).get_clim() == (0, 1)


def test_update_map_is_the_joint_relative_norm():
    ax = plots.update_map(updates(("q", "q", "v", "norm"), (0, 0, 1, -1)))
    cells = mesh(ax).get_array()
    assert cells[0, 1] == pytest.approx(np.hypot(0.5, 1) / np.hypot(10, 10))
    assert cells[1, 2] == pytest.approx(0.15)
    assert cells[2, 0] == pytest.approx(0.2)
    assert cells.mask.sum() == 6
    assert "outside" in ax.get_xlabel()


def test_update_map_zero_infinite_and_wide():
    result = updates()
    result.data["delta_norm"][:] = [0.01, 5, 0, 1, 1]
    result.data["base_norm"][:] = [10, 10, 10, 0, 10]
    ax = plots.update_map(result)
    assert {"0", "∞", "0.001", "0.5"} <= set(written(ax))
    assert isinstance(mesh(ax).norm, LogNorm)
    ax.figure.canvas.draw()


# similarity


def test_similarity_shows_the_matrix_with_most_intruders_and_marks_them():
    result = intruders()
    index = int(result.table("matrix")["intruders"].argmax())
    ax = plots.similarity(result)
    np.testing.assert_array_equal(mesh(ax).get_array(), result.data.similarity.values[0, index, :10, :10])
    assert ax.get_title() == str(result.data.matrix.values[index])
    rows = np.flatnonzero(result.verdict().values[0, index, :5] == 1) + 1
    assert len(rows)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), rows)
    assert ax.get_ylim() == (10.5, 0.5)


def test_similarity_of_a_named_matrix_all_ranks_other_side():
    result = intruders(short=(2,))
    name = str(result.data.matrix.values[1])
    ax = plots.similarity(result, matrix=name, side="right", ranks=None)
    np.testing.assert_array_equal(mesh(ax).get_array(), result.data.similarity.values[1, 1])
    short = plots.similarity(result, matrix=str(result.data.matrix.values[2]), ranks=None)
    assert mesh(short).get_array().shape == (4, 4)


def test_unknown_matrix_and_side_are_told():
    with pytest.raises(InputError, match=r"no matrix 'nope'.*14 in all"):
        plots.similarity(intruders(), matrix="nope")
    for draw in (plots.intruder_counts, plots.intruder_map, plots.similarity, plots.sigma_against_cosine):
        with pytest.raises(InputError, match="side 'right' was not computed"):
            draw(intruders(sides=("left",)), side="right")


# σ against cosine


def scattered(ax):
    return {c.get_label(): c for c in ax.collections if c.get_label() in COMPONENTS}


def test_scatter_holds_the_top_k_of_each_component():
    result = intruders()
    points = scattered(plots.sigma_against_cosine(result))
    assert list(points) == BLOCK
    of_q = result.data.sel(side="left").isel(rank=slice(5), matrix=[0, 7])
    expected = np.column_stack([of_q.sigma.values.ravel(), of_q.max_cos.values.ravel()])
    np.testing.assert_array_equal(points["q"].get_offsets(), expected)
    assert len(scattered(plots.sigma_against_cosine(result, k=2))["q"].get_offsets()) == 4


def test_undetermined_points_are_hollow():
    result = intruders()
    points = scattered(plots.sigma_against_cosine(result, k=12))
    hollow = sum(int((c.get_facecolor()[:, 3] == 0).sum()) for c in points.values())
    assert hollow == result.undetermined(k=12) > 0


def test_random_direction_is_a_line_for_one_size_and_a_band_for_several():
    left = plots.sigma_against_cosine(intruders())
    (line,) = [x for x in left.lines if x.get_linestyle() == ":"]
    assert line.get_ydata()[0] == pytest.approx(np.sqrt(2 * np.log(64) / 64))
    right = plots.sigma_against_cosine(intruders(), side="right")
    (box,) = right.patches
    sizes = [np.sqrt(2 * np.log(n) / n) for n in (256, 64)]
    assert (box.get_y(), box.get_y() + box.get_height()) == pytest.approx(sizes)
    (epsilon,) = [x for x in right.lines if x.get_linestyle() == "--"]
    assert epsilon.get_ydata()[0] == 0.5


def test_absent_vectors_and_zero_sigma_are_not_scattered():
    result = intruders(short=(0,))
    result.data["sigma"][7, 4] = 0
    assert len(scattered(plots.sigma_against_cosine(result))["q"].get_offsets()) == 4 + 4


# updates


def test_spectrum_is_relative_and_ends_at_the_rank():
    ax = plots.update_spectrum(updates())
    assert [x.get_label() for x in ax.lines] == ["q", "v"]
    q = ax.lines[0].get_ydata()
    np.testing.assert_allclose(q[:3], 2 * np.array([1, 0.5, 0.25]) / 4)  # median of 1 and 3, over σ1(W0) = 4
    assert np.isnan(q[3:]).all()
    thin = [c for c in ax.collections if isinstance(c, LineCollection)]
    assert [len(c.get_segments()) for c in thin] == [2, 2]
    np.testing.assert_allclose(thin[0].get_segments()[1][:, 1], 3 * np.array([1, 0.5, 0.25]) / 4)
    assert legend_of(ax.figure) == ["q  3.5", "v  4.5"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_energy_is_in_units_of_chance():
    ax = plots.update_energy(updates())
    assert [x.get_label() for x in ax.lines[:2]] == ["q", "v"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2.5, 2.5, 2.5, np.nan])  # median of 1 and 4
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [5, 5, 5, np.nan])
    assert shade(ax, -1)[2.0] == pytest.approx((0.5, 3))


def test_nothing_changed_is_said():
    result = unchanged(updates())
    assert written(plots.update_spectrum(result)) == ["no matrix changed"]
    assert written(plots.update_energy(result)) == ["no matrix changed"]
    assert set(written(plots.update_map(result))) == {"0"}


# all of them


LEFT = ("left",)
ODD = {
    "one matrix, no layer": lambda: intruders(["unembed"], [-1], sides=LEFT),
    "no null": lambda: intruders(null=0, sides=LEFT),
    "no change": lambda: same_everywhere(intruders(sides=LEFT)),
    "padded": lambda: intruders(short=(0, 5), sides=LEFT),
    "k beyond p": lambda: intruders(k=40, sides=LEFT),
    "p of 1": lambda: intruders(["q"], [0], p=1, null=1, sides=LEFT),
    "unknown": lambda: intruders([f"odd{i}" for i in range(9)], [-1] * 9, sides=LEFT),
    "few unknown": lambda: intruders(["router", "q"], [0, 0], sides=LEFT),
    "updates": updates,
    "no update": lambda: unchanged(updates()),
    "vectors only": lambda: updates(("norm", "norm"), (0, -1)),
    "unknown updates": lambda: updates(tuple(f"odd{i}" for i in range(9)), (3,) * 9),
}


@pytest.mark.parametrize("what", ODD)
def test_every_figure_of_odd_results(what):
    result = ODD[what]()
    for make in plots.figures_of(result).values():
        make().draw_without_rendering()


def test_titles_name_the_side_when_there_are_two():
    titles = {"counts", "map", "similarity", "similarity_all", "sigma_against_cosine"}
    assert set(plots.figures_of(intruders(sides=("right",)))) == titles
    both = plots.figures_of(intruders())
    assert set(both) == {f"{t}_{s}" for t in titles for s in ("left", "right")}
    assert "right" in both["map_right"]().axes[0].get_title()
    assert set(plots.figures_of(updates())) == {"spectrum", "map", "energy"}


def test_components_keep_colour_and_place():
    assert ordered(["down", "x", "q", "other", "q"]) == ["q", "down", "x", "other"]
    assert grouped(["q", "x", "y"], own_names=1) == ["q", "other", "other"]
    assert grouped(["q", "x"], own_names=1) == ["q", "x"]
    only_v = plots.update_spectrum(updates(("v",), (0,)))
    assert to_hex(only_v.lines[0].get_color()).upper() == COMPONENTS["v"]


def test_saved_at_its_size_with_fonts_as_text(tmp_path):
    figure = plots.figures_of(updates())["map"]()
    figure.savefig(tmp_path / "map.pdf")
    figure.savefig(tmp_path / "map.png")
    pdf = (tmp_path / "map.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # TrueType
    assert b"/Type3" not in pdf
    assert plt.imread(tmp_path / "map.png").shape[1] == round(3.35 * 300)


def test_drawn_into_the_axes_given_and_settings_left_alone():
    before = dict(matplotlib.rcParams)
    result, update = intruders(), updates()
    single = [
        lambda ax: plots.intruder_map(result, ax=ax),
        lambda ax: plots.similarity(result, ax=ax),
        lambda ax: plots.sigma_against_cosine(result, ax=ax),
        lambda ax: plots.update_spectrum(update, ax=ax),
        lambda ax: plots.update_map(update, ax=ax),
        lambda ax: plots.update_energy(update, ax=ax),
    ]
    for draw in single:
        figure, ax = plt.subplots()
        assert draw(ax) is ax
        assert ax.has_data()
        assert figure.legends == []
    figure, axes = plt.subplots(1, 2)
    drawn = plots.intruder_counts(result, axes=axes)
    assert [*drawn] == [*axes]
    assert len(plt.get_fignums()) == 7
    plots.intruder_counts(result)
    assert dict(matplotlib.rcParams) == before


def test_no_torch_and_no_matplotlib_before_drawing(tmp_path):
    intruders(sides=LEFT).save(tmp_path / "i.nc")
    updates().save(tmp_path / "u.nc")
    code = f"""
import sys
import finetune_lens as fl
fl.plots.intruder_counts
assert "matplotlib" not in sys.modules, "matplotlib"
import matplotlib; matplotlib.use("agg")
n = 0
for name in ("i", "u"):
    for make in fl.plots.figures_of(fl.load(rf"{tmp_path}/{{name}}.nc")).values():
        make(); n += 1
assert "torch" not in sys.modules, "torch"
print(n)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "8"), done.stderr
