"""Parts joined over analyses: rank correlations against scipy and full enumeration, sums against closed forms."""

import itertools
import json
import sys

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from test_recovery import patches

import finetune_lens as fl
from finetune_lens import parts, plots
from finetune_lens.errors import InputError
from finetune_lens.parts import rank_null
from finetune_lens.results.grafting import Grafting
from finetune_lens.results.interpolation import Interpolation
from finetune_lens.results.outputs import Outputs
from finetune_lens.results.updates import Updates

WEIGHTS = [
    ("embed_tokens", -1, "embed"),
    *((f"layers.{i}.self_attn.{c}_proj", i, c) for i in range(3) for c in "qkvo"),
    *((f"layers.{i}.mlp.{c}_proj", i, c) for i in range(3) for c in ("up", "down")),
    *((f"layers.{i}.input_layernorm", i, "norm") for i in range(3)),
]
MATRICES = [w for w in WEIGHTS if w[2] != "norm"]


def along(dim, weights):
    texts = [np.array([w[i] for w in weights], dtype=int if i == 1 else object) for i in range(3)]
    return {
        dim: texts[0],
        "layer": (dim, texts[1]),
        "component": (dim, texts[2]),
    }


def updates(delta, base=None):
    base = np.ones(len(WEIGHTS)) if base is None else base
    return Updates(
        xr.Dataset({"delta_norm": ("matrix", delta), "base_norm": ("matrix", base)}, along("matrix", WEIGHTS))
    )


def grafting(density, *, heads=None, weights=None, delta=np.nan):
    weights = [w for w in WEIGHTS if w[1] >= 0] if weights is None else weights
    count = np.arange(1, len(weights) + 1) * 100
    entries = np.stack([np.zeros(len(weights)), density * count])[None]
    data = {
        "entries_by_weight": (("mask", "level", "matrix"), entries), "count": ("matrix", count),
        "sensitivity": ("matrix", 2.0 * count), "delta_norm": ("matrix", np.full(len(weights), delta)),
    }  # fmt: skip
    if heads is not None:
        data |= heads
    return Grafting(xr.Dataset(data, along("matrix", weights) | {"mask": ["graft"], "level": [0.01, 0.1]}))


def interpolation(alone, groups, by="matrix"):
    """Importance alone of each group, in log-probability on four examples; without a group nothing is lost."""
    alphas, examples = [0.0, 1.0], 4
    scaling = np.zeros((2, len(groups), 2, 2, 1, examples))
    scaling[:, :, 0, 1] = np.asarray(alone)[None, :, None, None]
    scaling[:, :, 1] = 10.0
    ends = np.zeros((2, 2, 1, examples))
    ends[:, 1] = 10
    data = {
        "ends": (("metric", "end", "file", "example"), ends),
        "scaling": (("metric", "group", "context", "group_alpha", "file", "example"), scaling),
        "group_of": ("weight", np.array([str({"matrix": w[0], "layer": w[1]}[by]) for w in WEIGHTS], dtype=object)),
        "parameters": ("weight", np.ones(len(WEIGHTS))), "update_square": ("weight", np.ones(len(WEIGHTS))),
    }  # fmt: skip
    coords = {
        "metric": ["accuracy", "logprob"], "file": ["task"], "context": ["base", "tuned"], "group_alpha": alphas,
        "group": np.array(list(groups), dtype=object), "examples": ("file", [examples]),
        "objective": ("file", ["answer"]),
    }  # fmt: skip
    return Interpolation(xr.Dataset(data, coords, {"by": by}))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_null_is_that_of_all_permutations(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=6), np.round(rng.normal(size=6))  # with ties
    b[0] = b[1]
    found = rank_null(a, b, permutations=40_000)
    rho = scipy.stats.spearmanr(a, b).statistic
    assert found["rho"] == pytest.approx(rho)
    every = np.array([scipy.stats.spearmanr(a, b[list(p)]).statistic for p in itertools.permutations(range(6))])
    assert found["p"] == pytest.approx((np.abs(every) >= abs(rho) - 1e-9).mean(), abs=0.01)
    assert [found["null_low"], found["null_high"]] == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.07)


def test_the_null_is_scipys():
    rng = np.random.default_rng(5)
    a = rng.normal(size=30)
    b = a + rng.normal(size=30) * 2
    a[3] = np.nan
    found = rank_null(a, b, permutations=9999)
    keep = ~np.isnan(a)
    test = scipy.stats.permutation_test(
        (a[keep],), lambda x: scipy.stats.spearmanr(x, b[keep]).statistic, permutation_type="pairings",
        n_resamples=2000, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert found["rows"] == 29
    assert found["rho"] == pytest.approx(test.statistic)
    assert found["p"] == pytest.approx(test.pvalue, abs=0.015)
    assert 0.001 < test.pvalue < 0.3


def test_the_null_does_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20))
    whole = rank_null(a, b, permutations=500)
    monkeypatch.setattr(parts, "BLOCK", 60)
    assert rank_null(a, b, permutations=500) == whole


@pytest.mark.parametrize(("a", "b"), [([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([np.nan] * 5, range(5))])
def test_what_has_no_order_has_no_correlation(a, b):
    found = rank_null(np.array(a, float), np.array(b, float), permutations=99)
    assert np.isnan([found["rho"], found["p"]]).all()


def test_planted_structure_is_found_and_independent_columns_are_not():
    rng = np.random.default_rng(0)
    delta = np.concatenate([[0.0], rng.uniform(1, 2, len(WEIGHTS) - 1)])  # the embedding did not move
    density = rng.uniform(0, 1, len(WEIGHTS) - 1)
    matrices = [i for i, w in enumerate(WEIGHTS) if w in MATRICES]
    alone = delta[matrices] ** 2
    alone[0] = 99  # of what did not move
    found = fl.join_parts(
        updates=updates(delta), grafting=grafting(density), interpolation=interpolation(alone, [w[0] for w in MATRICES])
    )
    frame = found.correlations("matrix").set_index(["a", "b"])
    planted = frame.loc[("delta_norm", "alone")]
    assert (planted["rho"], planted["rows"]) == (1.0, 18)
    assert planted["p_adjusted"] < 0.01
    assert -0.6 < planted["null_low"] < -0.35 < 0.35 < planted["null_high"] < 0.6
    free = frame.loc[("delta_norm", "mask_density")]
    assert free["p_adjusted"] > 0.05
    assert np.isnan(frame.loc[("delta_norm", "without")]["rho"])  # constant
    assert "gained alone: ρ = +1.00 over 18" in found.summary()
    p = frame["p"].dropna()
    assert np.allclose(frame["p_adjusted"].dropna(), scipy.stats.false_discovery_control(p))


def test_what_was_not_measured_is_missing_and_vectors_are_no_matrices():
    found = fl.join_parts(updates=updates(np.ones(len(WEIGHTS))), grafting=grafting(np.full(len(WEIGHTS) - 1, 0.25)))
    table = found.table("matrix").set_index("matrix")
    assert list(table.index) == [w[0] for w in MATRICES]
    assert np.isnan(table.loc["embed_tokens", "mask_density"])
    assert table["mask_density"].drop("embed_tokens").tolist() == pytest.approx([0.25] * 18)
    assert table["sensitivity"].drop("embed_tokens").tolist() == pytest.approx([2.0] * 18)
    assert "intruders" not in table


def test_importance_by_layer_joins_sums_over_the_layer():
    rng = np.random.default_rng(1)
    delta, base = rng.uniform(1, 2, (2, len(WEIGHTS)))
    density = rng.uniform(0, 1, len(WEIGHTS) - 1)
    found = fl.join_parts(
        updates=updates(delta, base), grafting=grafting(density),
        interpolation=interpolation([1, 2, 3, 4], ["0", "1", "2", "outside"], by="layer"),
    )  # fmt: skip
    assert found.levels == ["matrix", "layer"]
    assert "alone" not in found.columns("matrix")  # one number is not many
    table = found.table("layer").set_index("layer")
    layer = np.array([w[1] for w in WEIGHTS])
    for at, alone in ((0, 1), (1, 2), (2, 3), (-1, 4)):
        rows = layer == at
        assert table.loc[at, "alone"] == alone
        assert table.loc[at, "delta_norm"] == pytest.approx(np.sqrt((delta[rows] ** 2).sum()))
        assert table.loc[at, "relative_norm"] == pytest.approx(
            np.sqrt((delta[rows] ** 2).sum() / (base[rows] ** 2).sum())
        )
    count, inner = np.arange(1, len(WEIGHTS)) * 100, layer[1:] == 2
    assert table.loc[2, "mask_density"] == pytest.approx((density * count)[inner].sum() / count[inner].sum())
    assert np.isnan(table.loc[-1, "mask_density"])
    assert "measured by layer" in found.summary()


def test_heads_share_grouped_keys_and_values():
    """Four heads of q and o, two of k and v: heads 0 and 1 have those of 0, heads 2 and 3 those of 1."""
    weights = [w for w in WEIGHTS if w[1] == 1 and w[2] in "qkvo"]
    rng = np.random.default_rng(0)
    norms, entries = rng.uniform(1, 2, (4, 4)), rng.integers(1, 20, (4, 4)).astype(float)
    for values in (norms, entries):
        values[1:3, 2:] = np.nan
    heads = {
        "head_delta_norm": (("matrix", "head"), norms),
        "head_entries": (("level", "matrix", "head"), np.stack([0 * entries, entries])),
    }
    graft = grafting(np.full(4, 0.1), heads=heads, weights=weights)  # counts 100, 200, 300, 400
    cmap = patches(("layer", "head"), [[[i, i + 2] for i in range(4)]], [0, 0], [9, 9], layer=[1], head=range(4))
    found = fl.join_parts(grafting=graft, cmap=cmap)
    table = found.table("head").set_index("head")
    assert list(table.index) == ["1.0", "1.1", "1.2", "1.3"]
    assert table["patch_effect"].tolist() == [1, 2, 3, 4]
    for head in range(4):
        at = [(0, head), (1, head // 2), (2, head // 2), (3, head)]
        assert table["delta_norm"].iloc[head] == pytest.approx(np.sqrt(sum(norms[i] ** 2 for i in at)))
        density = sum(entries[i] for i in at) / (100 / 4 + 200 / 2 + 300 / 2 + 400 / 4)
        assert table["mask_density"].iloc[head] == pytest.approx(density)
    first = fl.join_parts(grafting=graft, cmap=cmap, sparsity=0.01).table("head")
    assert first["mask_density"].tolist() == [0] * 4


def test_bad_input():
    mine, graft = updates(np.ones(len(WEIGHTS))), grafting(np.ones(len(WEIGHTS) - 1))
    groups = [w[0] for w in MATRICES]
    other = Grafting(graft.data.assign_coords(matrix=[f"h.{n}" for n in graft.data.matrix.values]))
    for options, words in (
        ({}, "two results at least"),
        ({"updates": mine}, "two results at least"),
        ({"updates": graft, "grafting": graft}, "expected a result of kind updates"),
        ({"updates": mine, "grafting": other}, "different models"),
        ({"updates": mine, "grafting": graft, "sparsity": 0.5}, "no graft of sparsity 0.5; there are 0.01, 0.1"),
        ({"updates": mine, "grafting": graft, "permutations": 0}, "permutations are at least 1"),
        ({"updates": mine, "grafting": graft, "seed": -1}, "seed at least 0; found 10000 and -1"),
        ({"updates": mine, "interpolation": interpolation(range(19), groups), "metric": "kl"}, "accuracy, logprob"),
        ({"updates": mine, "interpolation": interpolation(range(19), groups), "file": "no"}, "not measured on 'no'"),
        ({"updates": mine, "interpolation": interpolation(range(19), [f"h.{g}" for g in groups])}, "different models"),
        (
            {"updates": mine, "cmap": patches(("position",), np.ones((1, 4)), [0] * 4, [1] * 4, position=[0])},
            "no part of the weights",
        ),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            fl.join_parts(**options)


def test_results_of_two_models_are_not_joined():
    delta = np.arange(1.0, len(WEIGHTS) + 1)
    inner = [w for w in WEIGHTS if w[1] >= 0]
    density = np.linspace(0, 1, len(inner))
    of_it = {"updates": updates(delta), "grafting": grafting(density, delta=delta[1:] * 1.0005)}
    fl.join_parts(**of_it)  # rounding makes no other model
    other = delta[1:].copy()
    other[2] *= 1.01
    with pytest.raises(
        InputError, match=r"different models: ‖Δ‖ of layers\.0\.self_attn\.v_proj is 4 by updates and 4.04"
    ):
        fl.join_parts(**of_it | {"grafting": grafting(density, delta=other)})
    line = interpolation(range(19), [w[0] for w in MATRICES])
    names = np.array([w[0] for w in WEIGHTS], dtype=object)
    line.data = line.data.assign(update_square=("weight", delta**2)).assign_coords(weight=names)
    fl.join_parts(updates=updates(delta), interpolation=line)
    with pytest.raises(InputError, match="different models: ‖Δ‖"):
        fl.join_parts(updates=updates(delta * 2), interpolation=line)


@pytest.fixture(scope="module")
def joined():
    """Everything measured on a model of planted importance."""
    rng = np.random.default_rng(2)
    delta = rng.uniform(1, 2, len(WEIGHTS))
    alone = rng.uniform(0, 1, len(MATRICES))
    return {
        "updates": updates(delta),
        "grafting": grafting(rng.uniform(0, 1, len(WEIGHTS) - 1)),
        "interpolation": interpolation(alone, [w[0] for w in MATRICES]),
        "cmap": patches(
            ("layer", "head"), rng.normal(size=(3, 4, 5)), [0] * 5, [1] * 5, layer=[0, 1, 2], head=range(4)
        ),
    }


def test_a_saved_result_is_the_same(joined, tmp_path):
    found = fl.join_parts(**joined)
    again = fl.load(found.save(tmp_path / "p.nc"))
    assert again.summary() == found.summary()
    assert again.to_frame().equals(found.to_frame())
    assert again.headline() == found.headline()
    assert fl.join_parts(**joined).correlations().equals(found.correlations())  # seeded


def test_figures(joined):
    found = fl.join_parts(**joined)
    functions = plots.figures_of(found)
    assert set(functions) == {"matrix"}  # heads have one column
    figure = functions["matrix"]()
    figure.canvas.draw()
    assert len(figure.axes[1].collections[-1].get_offsets()) == 19
    axes = plots.parts(found, x="mask_density", y="alone")
    assert axes[1].get_xlabel() == "mask density"
    assert axes[1].get_ylabel() == "gained alone, log-probability (nats)"
    crowded = dict(
        joined, updates=updates(np.where(np.arange(len(WEIGHTS)) < 16, 1 + 1e-3 * np.arange(len(WEIGHTS)), 2))
    )
    ax = plots.parts(fl.join_parts(**crowded), x="delta_norm", y="alone")[1]
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.texts]
    assert 5 < len(boxes) < 19
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    with pytest.raises(InputError, match="there is no 'patch_effect'"):
        plots.parts(found, x="patch_effect")
    plt.close("all")


def command(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parts", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        parts.main()
    return stop.value.code


def test_the_command(joined, tmp_path, monkeypatch, capsys):
    files = [result.save(tmp_path / f"{i}.nc") for i, result in enumerate(joined.values())]
    out = ["--out", tmp_path / "o"]
    assert command([*files, *out, "--json", "--permutations", "200"], monkeypatch) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["headline"]["matrix"]["parts"] == 19
    assert fl.load(tmp_path / "o" / "parts.nc").provenance["arguments"]["permutations"] == 200
    assert command([*files, *out], monkeypatch) == 2
    strange = Outputs(xr.Dataset()).save(tmp_path / "strange.nc")
    again = joined["updates"].save(tmp_path / "again.nc")
    for arguments, words in (
        ([files[0], again], "a second result of kind updates"),
        ([files[0], strange], "is a result of kind outputs; expected updates"),
        ([files[0]], "two results at least"),
        ([files[0], tmp_path / "none.nc"], "no such result"),
    ):
        capsys.readouterr()
        assert command([*arguments, "--out", tmp_path / "new"], monkeypatch) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_measured_results_of_one_pair():
    """Real updates and intruders of a small pair: intruders by matrix are those of the result."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.{m}.weight" for i in range(3) for m in ("self_attn.q_proj", "mlp.up_proj")]
    names.append("model.embed_tokens.weight")  # which is not looked at for intruders
    base = {name: torch.randn(24, 24, generator=generator) for name in names}
    tuned = {n: w + 2 * i * torch.randn(24, 24, generator=generator) for i, (n, w) in enumerate(base.items())}
    pair = fl.ModelPair.load(base, tuned)
    moved, found = fl.measure_updates(pair, progress=False), fl.find_intruders(pair, progress=False)
    table = fl.join_parts(updates=moved, intruders=found).table("matrix").set_index("component")
    assert np.isnan(table.loc["embed", "intruders"])
    table = table.drop("embed")
    assert table["intruders"].tolist() == found.table("matrix")["intruders"].tolist()
    assert table["intruders"].sum() == found.count() > 0
    assert table["relative_norm"].tolist() == pytest.approx(moved.data.relative_norm.values[moved.data.layer >= 0])
