"""The recovery axis against closed forms, a bootstrap in a loop, and planted curves."""

import copy
import json
import math
import sys
from dataclasses import replace

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

import finetune_lens as fl
from finetune_lens import plots, recovery
from finetune_lens.errors import InputError
from finetune_lens.results.cmap import CrossPatching
from finetune_lens.results.curves import Curve
from finetune_lens.results.recovery import of_curves
from finetune_lens.results.updates import Updates


def curve(shares, values, base=None, tuned=None, *, method="method", unit="parameters"):
    values = np.asarray(values, float)
    n = values.shape[1]
    base, tuned = (np.full(n, d) if v is None else np.asarray(v, float) for v, d in ((base, 0.0), (tuned, 1.0)))
    return Curve(method, unit, np.asarray(shares, float), values, base, tuned, [f"{s:g}" for s in shares])


def constant(shares, recoveries, n=6):
    return curve(shares, np.repeat(np.asarray(recoveries, float)[:, None], n, 1))


def row(found, name, **options):
    return found.table(**options).set_index("curve").loc[name]


@pytest.mark.parametrize(
    ("shares", "recoveries", "area"),
    [
        ([0.01, 1], [1, 1], 0.995),
        ([1], [1], 0.5),
        ([0.25, 0.5, 1], [0.5, 0.2, 1], 0.25 * 0.25 + 0.25 * 0.35 + 0.5 * 0.6),
        ([1, 0.5, 0], [1, -0.4, 0], 0.5 * -0.2 + 0.5 * 0.3),  # in any order; what moves nothing adds nothing
        ([0.5, 0.5, 1], [0.6, 0.6, 1], 0.5 * 0.3 + 0.5 * 0.8),  # one model twice
    ],
)
def test_area_of_a_piecewise_linear_curve(shares, recoveries, area):
    found = of_curves({"c": constant(shares, recoveries)})
    assert row(found, "c")[["area", "area_low", "area_high", "area_measured"]].tolist() == pytest.approx([area] * 4)
    assert row(found, "c").why == ""


@pytest.mark.parametrize(
    ("recoveries", "target", "share"),
    [
        ([0.5, 0.95, 1], 0.95, 0.1),
        ([0.96, 0.2, 1], 0.95, 0.01),
        ([0.5, 0.6, 0.9], 0.95, math.inf),
        ([0.5, 0.6, 1], 0.55, 0.1),
    ],
)
def test_the_smallest_measured_share_that_is_enough(recoveries, target, share):
    found = of_curves({"c": constant([0.01, 0.1, 1], recoveries)})
    assert found.share_at("c", target) == (share, share, share, float(math.isinf(share)))
    assert row(found, "c", target=target).share == share


def naive(one, resamples=10_000):
    """Recovery, area and share of each resample in a loop; an example that is NaN anywhere counts nowhere."""
    drawn = np.random.default_rng(0).integers(len(one.base), size=(resamples, len(one.base)))
    areas, shares = [], []
    for rows in [np.arange(len(one.base)), *drawn]:
        recovered = []
        for values in one.values:
            gain = [(v - b, t - b) for v, b, t in zip(values[rows], one.base[rows], one.tuned[rows], strict=True)]
            gain = [pair for pair in gain if not np.isnan(pair[0])]
            recovered.append(sum(a for a, _ in gain) / sum(b for _, b in gain))
        areas.append(np.trapezoid([0, *recovered], [0, *one.shares]))
        shares.append(min((s for s, r in zip(one.shares, recovered, strict=True) if r >= 0.95), default=math.inf))
    return np.array(areas), np.array(shares)


@pytest.fixture(scope="module")
def two():
    rng = np.random.default_rng(3)
    base, tuned = rng.normal(0, 1, 15), rng.normal(2.5, 1, 15)
    shares = [0.1, 0.4, 1]
    a, b = (
        curve(shares, base + np.outer(levels, np.ones(15)) * (tuned - base) + rng.normal(0, 0.5, (3, 15)), base, tuned)
        for levels in ([0.8, 0.97, 1], [0.2, 0.5, 1])
    )
    a.values[0, 2] = np.nan
    return a, b


def test_intervals_are_those_of_a_loop_over_resamples(two):
    found = of_curves({"a": two[0], "b": two[1]})
    drawn = {}
    for name, one in zip("ab", two, strict=True):
        areas, shares = naive(one)
        drawn[name] = areas
        at = row(found, name)
        assert at.area == pytest.approx(areas[0])
        assert [at.area_low, at.area_high] == pytest.approx(np.quantile(areas[1:], [0.025, 0.975]))
        ranked = np.sort(shares[1:])
        assert (at.share, at.share_low, at.share_high) == (shares[0], ranked[249], ranked[9749])
        assert at.never == np.isinf(shares[1:]).mean()
        assert 0 < at.never < 1
    compared = found.compare("a", "b")
    difference = drawn["a"] - drawn["b"]
    assert compared["difference"] == pytest.approx(difference[0])
    assert [compared["low"], compared["high"]] == pytest.approx(np.quantile(difference[1:], [0.025, 0.975]))


def test_points_have_the_ratio_and_interval_of_stats(two):
    from finetune_lens import stats

    frame = of_curves({"a": two[0]}).to_frame()
    expected = stats.interval_of_ratio(two[0].values - two[0].base, two[0].tuned - two[0].base)
    assert np.allclose(frame[["recovery", "low", "high"]].T, expected)
    assert frame["mean"].tolist() == pytest.approx(np.nanmean(two[0].values, axis=1))


def test_a_gain_that_is_not_clear_of_zero_has_no_recovery():
    rng = np.random.default_rng(0)
    found = of_curves({"c": curve([0.5, 1], rng.normal(size=(2, 20)), rng.normal(size=20), rng.normal(size=20))})
    assert row(found, "c")[["area", "area_low", "share", "share_high", "never"]].isna().all()
    assert found.to_frame()["recovery"].isna().all()
    assert "not clear of 0" in found.summary()
    json.dumps(found.headline(), allow_nan=False)


def test_nothing_is_put_in_place_of_a_share_that_was_not_measured():
    found = of_curves({"short": constant([0.1, 0.5], [1, 1]), "whole": constant([1], [1])})
    at = row(found, "short")
    assert np.isnan(at.area)
    assert (at.reach, at.area_measured) == (0.5, pytest.approx(0.45))
    assert at.why == "measured up to share 0.5"
    with pytest.raises(InputError, match="'short' has no area to compare: measured up to"):
        found.compare("whole", "short")


def test_alternatives_are_no_curve():
    found = of_curves({"tied": constant([0.5, 0.5, 1], [0, 1, 1])})
    assert np.isnan(row(found, "tied").area_measured)
    assert row(found, "tied").share == 0.5
    assert "alternatives" in found.summary()
    alone = replace(constant([0.2, 0.3, 1], [0, 1, 1]), alternatives=True)
    found = of_curves({"each alone": alone, "a curve": constant([0.2, 0.3, 1], [0, 1, 1])})
    assert row(found, "each alone").why == "alternatives, not a curve"
    assert row(found, "a curve").why == ""
    assert found.curve("each alone").alternatives
    assert not found.curve("a curve").alternatives


def test_methods_are_compared_on_the_examples_that_both_have():
    rng = np.random.default_rng(1)
    values = rng.uniform(0.2, 0.8, (2, 8))
    values[1] = 1
    mine = curve([0.5, 1], values)
    order = rng.permutation(8)[:5]
    theirs = curve([0.5, 1], values[:, order])
    ids = np.array([f"e{i}" for i in range(8)], dtype=object)
    found = of_curves({"mine": mine, "theirs": theirs, "other": theirs}, {
        "mine": {"ids": ids}, "theirs": {"ids": ids[order]}, "other": {"ids": [f"x{i}" for i in range(5)]},
    })  # fmt: skip
    compared = found.compare("mine", "theirs")
    assert compared["examples"] == 5
    assert [compared[k] for k in ("difference", "low", "high")] == pytest.approx([0, 0, 0])
    with pytest.raises(InputError, match="0 examples in common"):
        found.compare("mine", "other")
    with pytest.raises(InputError, match="there is no curve 'none'"):
        found.compare("mine", "none")


def patches(dims, effects, recipient, donor, *, ids=None, metric="logprob", **coords):
    """A result of cross-model patches, effects (…, example)."""
    effects, n = np.asarray(effects, float)[None], len(recipient)
    data = {metric: (("direction", *dims, "example"), effects)}
    for side, values in (("recipient", recipient), ("donor", donor)):
        data[f"{side}_{metric}"] = (("direction", "example"), np.asarray(values, float)[None])
    ids = [str(i) for i in range(n)] if ids is None else ids
    coords |= {"direction": ["tuned→base"], "example": np.array(ids, dtype=object)}
    attrs = {"grid": " ".join(dims), "site": "z", "metric": metric, "method": "exact", "window": 1}
    return CrossPatching(xr.Dataset(data, coords, attrs))


def test_the_best_single_site_is_one_point():
    effects = np.zeros((2, 3, 4))
    effects[1, 2], effects[0, 0] = 1.5, -9
    result = patches(("layer", "head"), effects, [-3] * 4, [-1] * 4, layer=[0, 1], head=[0, 1, 2])
    found = fl.recovery_axis([result])
    at = found.curve(found.names[0])
    assert (at.unit, at.shares.tolist(), at.labels) == ("sites", [1 / 6], ["layer 1, head 2"])
    assert found.to_frame()["recovery"].tolist() == [0.75]
    assert np.isnan(row(found, found.names[0]).area)
    assert "not cumulative" in found.summary()


def test_nested_sets_are_a_curve_where_their_shares_are_known():
    effects = np.repeat(np.array([[2.0], [1.0], [7.0]]), 5, 1)
    names = np.array(["all", "few", "random"], dtype=object)
    result = patches(("set",), effects, [0] * 5, [2] * 5, set=names)
    with pytest.raises(InputError, match="shares are not saved; pass shares"):
        fl.recovery_axis({"sets": result})
    with pytest.raises(InputError, match="above 0 and at most 1"):
        fl.recovery_axis({"sets": result}, shares={"few": 0})
    found = fl.recovery_axis({"sets": result}, shares={"all": 1, "few": 0.25})
    assert found.names == ["sets"]
    assert found.curve("sets").labels == ["few", "all"]
    assert row(found, "sets").area == pytest.approx(0.25 * 0.25 + 0.75 * 0.75)


def test_results_of_different_examples_are_refused():
    layers = {"layer": [0]}
    one = patches(("layer",), np.ones((1, 4)), [0] * 4, [2] * 4, **layers)
    others = patches(("layer",), np.ones((1, 4)), [0] * 4, [2] * 4, ids=list("abcd"), **layers)
    elsewhere = patches(("layer",), np.ones((1, 4)), [1] * 4, [2] * 4, **layers)
    half = patches(("layer",), np.ones((1, 2)), [0] * 2, [2] * 2, **layers)
    with pytest.raises(InputError, match="different examples"):
        fl.recovery_axis({"one": one, "other": others})
    with pytest.raises(InputError, match="the base scores differently on 4 of 4"):
        fl.recovery_axis({"one": one, "other": elsewhere})
    assert fl.recovery_axis({"one": one, "half": half}).names == ["one", "half"]
    with pytest.raises(InputError, match="two curves are called"):
        fl.recovery_axis([one, one])
    with pytest.raises(InputError, match="expected one result at least"):
        fl.recovery_axis([])


def test_a_saved_result_is_the_same(tmp_path, two):
    found = of_curves({"a": two[0], "b": constant([0.5, 1], [0.2, 1], n=9)}, {"a": {"metric": "logprob"}})
    again = fl.load(found.save(tmp_path / "r.nc"))
    assert again.summary() == found.summary()
    assert again.names == ["a", "b"]
    assert np.array_equal(again.curve("a").values, two[0].values, equal_nan=True)
    assert len(again.examples("b")) == 9


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Interpolation and patches of the pair that ships, saved."""
    out, folder = tmp_path_factory.mktemp("measured"), fl.zoo.path("strings")
    pair = fl.ModelPair.load(folder / "base", folder / "full")
    prompts = folder / "prompts.jsonl"
    line = fl.interpolate(pair, prompts, alphas=(0, 0.5, 0.8, 1), by="layer", limit=14, progress=False)
    line.save(out / "interpolation.nc")
    sites = fl.cross_patch(pair, prompts, limit=14, controls=False, metric="logprob", check=False, progress=False)
    sites.save(out / "cmap.nc")
    Updates(xr.Dataset({"delta_norm": ("matrix", [1.0])})).save(out / "updates.nc")
    return out


def test_measured_results_meet_on_one_axis(measured):
    line, sites = (fl.load(measured / f"{n}.nc") for n in ("interpolation", "cmap"))
    found = fl.recovery_axis([line, sites])
    assert set(found.units) == {"parameters", "sites"}
    at = row(found, "interpolation")
    path = line.path().query("metric == 'accuracy'").set_index("alpha")["recovery"]
    assert at.area == pytest.approx(np.trapezoid(path, path.index))
    assert row(found, "one layer").why.startswith("alternatives")
    best = sites.recovery()["ratio"].sel(direction="tuned→base").max()
    assert found.to_frame().query("unit == 'sites'")["recovery"].item() == pytest.approx(float(best))
    assert found.provenance["inputs"]["1 interpolation"]["kind"] == "interpolation"


def test_only_groups_and_halves_are_alternatives(measured):
    found = fl.recovery_axis([fl.load(measured / "interpolation.nc")])
    listed = {name for name in found.names if found.curve(name).alternatives}
    assert listed == {"one layer", "all but one layer"}


def test_a_result_without_curves_is_left_out(measured):
    line, nothing = fl.load(measured / "interpolation.nc"), fl.load(measured / "interpolation.nc")
    nothing.curves = lambda file: []
    found = fl.recovery_axis({"line": line, "nothing": nothing})
    assert found.names == [f"line: {c.method}" for c in line.curves()]
    assert "nothing is left out: nothing was measured between base and tuned model" in found.summary()
    with pytest.raises(InputError, match="there is no curve of recovery: nothing is left out"):
        fl.recovery_axis({"nothing": nothing})


def test_results_of_several_bases_are_said(measured):
    line = fl.load(measured / "interpolation.nc")
    for source, said in (("another/base", True), ("base/model.safetensors", False)):  # the same, from another folder
        other = fl.load(measured / "interpolation.nc")
        record = copy.deepcopy(other.provenance)
        record["inputs"]["base"]["source"] = source
        other.data.attrs["provenance"] = json.dumps(record)
        found = fl.recovery_axis({"one": line, "other": other})
        assert ("the results are of different bases, " in found.summary()) == said
        assert said == ("another/base" in found.summary())


def test_figures(measured, two):
    found = fl.recovery_axis([fl.load(measured / f"{n}.nc") for n in ("interpolation", "cmap")])
    functions = plots.figures_of(found)
    assert set(functions) == {"axis", "units"}
    for make in functions.values():
        figure = make()
        figure.canvas.draw()
        plt.close(figure)
    many = of_curves({f"curve {i}": two[i % 2] for i in range(9)} | {"wild": constant([0.1, 1], [-5, 4])})
    ax = plots.recovery_axis(many, curves=["curve 3", "wild"])[0]
    assert ax.get_xscale() == "log"
    low, high = ax.get_ylim()
    assert low > -1
    assert high < 2  # arrows at the edge
    ax.figure.canvas.draw()
    drawn = plots.recovery_axis(many)[0]
    looks = {
        (line.get_color(), line.get_marker(), line.get_mfc()) for line in drawn.lines if line.get_marker() != "None"
    }
    assert len(looks) >= 10
    _, mine = plt.subplots()
    assert plots.recovery_axis(many, axes=[mine])[0] is mine
    plt.close("all")


def command(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recovery", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        recovery.main()
    return stop.value.code


def test_the_command(measured, tmp_path, monkeypatch, capsys):
    files = [measured / "interpolation.nc", measured / "cmap.nc"]
    assert command([*files, "--out", tmp_path / "o", "--json"], monkeypatch) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["headline"]["curves"]["interpolation"]["unit"] == "parameters"
    assert (tmp_path / "o" / "figures" / "recovery-axis.pdf").exists()
    assert fl.load(tmp_path / "o" / "recovery.nc").names
    assert command([*files, "--out", tmp_path / "o"], monkeypatch) == 2
    assert "--force" in capsys.readouterr().err


def test_bad_input_of_the_command(measured, tmp_path, monkeypatch, capsys):
    (tmp_path / "not.nc").write_text("no result")
    (tmp_path / "shares.json").write_text('{"a": "b"}')
    line = measured / "interpolation.nc"
    for arguments, words in (
        ([tmp_path / "none.nc"], "no such result"),
        ([tmp_path / "not.nc"], "not a saved result"),
        ([measured / "updates.nc"], "no curve of recovery"),
        ([line, line], "given twice"),
        ([line, "--file", "elsewhere"], "was not measured on 'elsewhere'"),
        ([line, "--shares", tmp_path / "shares.json"], "expected an object of names and shares"),
    ):
        assert command([*arguments, "--out", tmp_path / "o"], monkeypatch) == 2, arguments
        assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
