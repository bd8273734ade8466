"""Task vectors against numpy on whole models, real permutations, and planted updates."""

import json
import sys

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import finetune_lens as fl
from finetune_lens import device, plots, stats, task_vectors
from finetune_lens.errors import InputError

SHAPES = {
    "embed_tokens.weight": (20, 8),
    "layers.0.self_attn.q_proj.weight": (8, 8),
    "layers.0.mlp.up_proj.weight": (24, 8),
    "layers.0.input_layernorm.weight": (8,),
    "layers.1.self_attn.q_proj.weight": (8, 8),
    "layers.1.self_attn.q_proj.bias": (8,),
    "norm.weight": (8,),
}
BLOCKS = [name for name in SHAPES if name.startswith("layers.")]
WIDE = {f"layers.{i}.mlp.up_proj.weight": (40, 60) for i in range(2)}


def random(seed, *, shapes=SHAPES, scale=1.0, density=1.0):
    rng = np.random.default_rng(seed)
    drawn = {name: scale * rng.standard_normal(shape) * (rng.random(shape) < density) for name, shape in shapes.items()}
    return {name: torch.from_numpy(values) for name, values in drawn.items()}


def plus(base, *updates):
    return {name: sum((u[name] for u in updates), weight) for name, weight in base.items()}


def compare(base, *tuned, **options):
    pairs = [fl.ModelPair.load(base, one) for one in tuned]
    return fl.compare_task_vectors(pairs, **{"progress": False, "device": "cpu"} | options)


def flat(state, names):
    return np.concatenate([state[name].double().numpy().ravel() for name in names])


def deltas(base, tuned, names):
    """Δ of all models as they are ranked, (model, entry)."""
    return np.stack([(flat(one, names) - flat(base, names)).astype(np.float32) for one in tuned]).astype(float)


def top(delta, k):
    """The first k of a stable sort; 0 is not among them."""
    order = np.argsort(-np.abs(delta), kind="stable")[: min(k, np.count_nonzero(delta))]
    mask = np.zeros(len(delta), bool)
    mask[order] = True
    return mask


@pytest.fixture(scope="module")
def three():
    """A base and three models: related, sparse, and on a grid with many ties."""
    base = random(0)
    common = random(1, scale=0.1)
    grid = {n: torch.round(4 * u) / 16 for n, u in random(4).items()}
    return base, [
        plus(base, common, random(2, scale=0.1)),
        plus(base, common, random(3, scale=0.2, density=0.4)),
        plus(base, grid),
    ]


@pytest.mark.parametrize("embeddings", [False, True])
def test_every_quantity_is_numpys(three, embeddings):
    base, tuned = three
    taus = (0.05, 0.2, 0.5, 1.0)
    result = compare(base, *tuned, taus=taus, embeddings=embeddings)
    names = list(SHAPES) if embeddings else BLOCKS
    d = deltas(base, tuned, names)
    assert int(result.data.entries.sum()) == d.shape[1]
    found = result.total
    for i, a in enumerate(d):
        for j, b in enumerate(d):
            at = found.isel(model=i, other=j)
            both = (a != 0) & (b != 0)
            assert float(at.cosine) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
            assert float(at.sign_conflict) == pytest.approx((np.sign(a) != np.sign(b))[both].mean())
            assert float(at.both_changed) == pytest.approx(both.mean())
            for t, tau in enumerate(taus):
                one, other = (top(x, round(tau * len(x))) for x in (a, b))
                assert float(at.jaccard[t]) == pytest.approx((one & other).sum() / (one | other).sum())
                assert float(at.share[t]) == pytest.approx((one & other).sum() / other.sum())
    for i, a in enumerate(d):
        for t, tau in enumerate(taus):
            taken = np.abs(a[top(a, round(tau * len(a)))])
            assert float(result.data.threshold[i, t]) == taken.min()
            assert int(result.data.k[i, t]) == len(taken)


def test_by_layer_and_component(three):
    """A group has the entries of its weights; what is largest is decided over the whole model."""
    base, tuned = three
    result = compare(base, *tuned, taus=[0.2])
    d = deltas(base, tuned, BLOCKS)
    masks = [top(a, round(0.2 * len(a))) for a in d]
    of = {"layers.0.self_attn.q_proj.weight": (0, "q"), "layers.0.mlp.up_proj.weight": (0, "up"),
          "layers.0.input_layernorm.weight": (0, "norm"), "layers.1.self_attn.q_proj.weight": (1, "q"),
          "layers.1.self_attn.q_proj.bias": (1, "bias")}  # fmt: skip
    layer, component = (np.concatenate([np.full(base[n].numel(), of[n][x]) for n in BLOCKS]) for x in (0, 1))
    for by, labels in (
        (("layer",), [layer]),
        (("component",), [component]),
        (("layer", "component"), [layer, component]),
    ):
        table = result.table(*by)
        assert len(table) == 3 * len({tuple(key) for key in zip(*labels, strict=True)})
        for row in table.to_dict("records"):
            at = np.logical_and.reduce([values == row[name] for name, values in zip(by, labels, strict=True)])
            i, j = (result.models.index(row[side]) for side in ("model", "other"))
            a, b = d[i][at], d[j][at]
            both = (a != 0) & (b != 0)
            assert row["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
            assert row["sign_conflict"] == pytest.approx((np.sign(a) != np.sign(b))[both].mean())
            one, other = masks[i][at], masks[j][at]
            either = (one | other).sum()
            assert row["jaccard_0.2"] == pytest.approx((one & other).sum() / either if either else np.nan, nan_ok=True)
            assert row["of_model_0.2"] == pytest.approx(
                (one & other).sum() / one.sum() if one.any() else np.nan, nan_ok=True
            )
    with pytest.raises(InputError, match="by layer, component or both; found head"):
        result.table("head")


def test_chance_is_that_of_real_permutations():
    """Mean and interval against entries permuted within each weight, thousands of times."""
    base = random(0, shapes=WIDE)
    updates = [random(7, shapes=WIDE, density=0.5), random(8, shapes=WIDE, density=0.7)]
    for n, name in enumerate(WIDE):  # far from centred, and one weight changes more than the other
        for update in updates:
            update[name] = (1 + 0.4 * n) * (update[name] + (update[name] != 0))
    tuned = [plus(base, update) for update in updates]
    result = compare(base, *tuned, taus=[0.02], null_draws=4000)
    found = result.total.isel(model=0, other=1)
    a, b = deltas(base, tuned, WIDE)
    size = len(a) // 2
    rng, drawn = np.random.default_rng(9), []
    mask_a, mask_b = top(a, round(0.02 * len(a))), top(b, round(0.02 * len(b)))
    for _ in range(4000):
        order = np.concatenate([rng.permutation(size), size + rng.permutation(size)])
        c, mask_c = b[order], mask_b[order]
        both = (a != 0) & (c != 0)
        jaccard = (mask_a & mask_c).sum() / (mask_a | mask_c).sum()
        drawn.append((a @ c / np.linalg.norm(a) / np.linalg.norm(c), (a * c < 0)[both].mean(), jaccard))
    drawn = np.array(drawn)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    for n, name in enumerate(("cosine", "sign_conflict", "jaccard")):
        spread = drawn[:, n].std()
        near = 1.05 / mask_a.sum() if name == "jaccard" else 0.15 * spread  # quantiles of counts: by one at most
        assert float(found[f"{name}_null"].squeeze()) == pytest.approx(drawn[:, n].mean(), abs=0.1 * spread)
        assert float(found[f"{name}_null_low"].squeeze()) == pytest.approx(low[n], abs=near)
        assert float(found[f"{name}_null_high"].squeeze()) == pytest.approx(high[n], abs=near)
    assert float(found.cosine_null) > 5 * 0.1 * drawn[:, 0].std()  # the updates are not centred: chance is not 0
    assert result.to_frame()["jaccard_uniform_0.02"][0] == pytest.approx(0.02 / 1.98)
    assert float(found.jaccard_null.squeeze()) > 1.2 * 0.02 / 1.98  # and lie unevenly: chance is more than that


def test_p_values_of_unrelated_updates_are_uniform():
    base = random(0, shapes=WIDE)
    result = compare(base, *(plus(base, random(s, shapes=WIDE)) for s in range(201, 217)), taus=[0.1])
    upper = np.triu_indices(16, 1)
    for name in ("cosine", "sign_conflict", "jaccard"):
        p = result.total[f"{name}_p"].squeeze().values
        assert 0.4 < p[upper].mean() < 0.65  # those of counts are a little large
        assert (p[upper] < 0.05).mean() < 0.12
        assert np.isnan(np.diag(p)).all()
        adjusted = result.total[f"{name}_p_adjusted"].squeeze().values
        assert np.allclose(adjusted[upper], stats.benjamini_hochberg(p[upper]))
        assert np.allclose(adjusted, adjusted.T, equal_nan=True)
        assert (adjusted[upper] > 0.05).all()


def test_identical_negated_unrelated_and_disjoint():
    base, update = random(0, shapes=WIDE), random(1, shapes=WIDE)
    half = {name: torch.arange(u.numel()).reshape(u.shape) % 2 == 0 for name, u in update.items()}
    tuned = {
        "itself": plus(base, update),
        "again": plus(base, update),
        "negated": plus(base, {n: -u for n, u in update.items()}),
        "unrelated": plus(base, random(2, shapes=WIDE)),
        "even": plus(base, {n: u * half[n] for n, u in update.items()}),
        "odd": plus(base, {n: u * ~half[n] for n, u in update.items()}),
    }
    result = compare(base, *tuned.values(), names=list(tuned), taus=[0.01, 0.1, 0.9])
    found = result.total
    assert result.models == list(tuned)

    def of(name, a, b):
        return found[name].sel(model=a, other=b).values

    assert of("cosine", "itself", "again") == pytest.approx(1)
    assert of("sign_conflict", "itself", "again") == 0
    assert (of("jaccard", "itself", "again") == 1).all()
    assert of("cosine", "itself", "negated") == pytest.approx(-1)
    assert of("sign_conflict", "itself", "negated") == 1
    assert (of("jaccard", "itself", "negated") == 1).all()
    for name in ("cosine", "sign_conflict", "jaccard"):
        value, low, high = (of(f"{name}{part}", "itself", "unrelated") for part in ("", "_null_low", "_null_high"))
        assert (low <= value).all()
        assert (value <= high).all()
    assert of("cosine", "even", "odd") == 0
    assert np.isnan(of("sign_conflict", "even", "odd"))
    assert (of("jaccard", "even", "odd") == 0).all()  # at τ = 0.9 too: what does not change is not among the largest
    assert float(result.data.k.sel(model="even", tau=0.9)) == sum(int(h.sum()) for h in half.values())
    assert of("share", "even", "itself")[-1] == pytest.approx(0.5, abs=0.05)
    assert of("share", "itself", "even")[-1] == pytest.approx(0.9, abs=0.05)
    text = result.summary()
    assert "itself · again: cosine 1.000" in text
    assert "even · odd" not in text  # of 15 pairs those of least cosine are not shown
    assert "5 more in the table" in text


def test_a_lora_pair_is_its_merged_model(recwarn):
    """The adapter that ships, factored, against PEFT's merge of it, beside full fine-tuning."""
    from finetune_lens.zoo import strings_recipe

    folder = fl.zoo.path("strings")
    merged = strings_recipe.load(folder / "base", folder / "lora").merge_and_unload()
    base = folder / "base"
    result = compare(base, folder / "full", folder / "lora", merged, names=["full", "factored", "merged"])
    found = result.total
    same = found.sel(model="factored", other="merged")
    assert float(same.cosine) == pytest.approx(1, abs=1e-6)
    assert float(same.sign_conflict) < 1e-3  # entries no larger than the rounding of the sum
    assert (same.jaccard > 0.999).all()
    full = found.sel(model="full")
    for name, least in (("cosine", 1e-6), ("sign_conflict", 1e-4), ("jaccard", 1e-4)):
        assert np.allclose(full[name].sel(other="factored"), full[name].sel(other="merged"), atol=least)
    assert float(full.cosine.sel(other="factored")) > 10 * float(full.cosine_null_high.sel(other="factored"))


def test_a_model_that_does_not_differ(three):
    base, tuned = three
    result = compare(base, dict(base), tuned[0])
    assert np.isnan(result.total.cosine.values).sum() == 3
    assert int(result.data.k[0].sum()) == 0
    assert "model 1 does not differ from the base" in result.summary()
    assert result.headline()["pairs"][0]["cosine"] is None
    json.dumps(result.headline(), allow_nan=False)


def test_weights_with_nan_are_left_out_of_every_sum(three):
    base, (one, other, _) = three
    broken = {name: weight.clone() for name, weight in other.items()}
    broken[BLOCKS[1]][0, 0] = float("nan")
    result = compare(base, one, broken, taus=[0.1])
    assert list(result.provenance["excluded"]) == ["layers.0.mlp.up_proj"]
    assert "excluded: layers.0.mlp.up_proj (checkpoint 2: tuned: 1 NaN" in result.summary()
    kept = [name for name in BLOCKS if name != BLOCKS[1]]
    less = [{name: state[name] for name in kept} for state in (base, one, broken)]
    assert result.to_frame().equals(compare(*less, taus=[0.1]).to_frame())


def test_weights_that_are_not_in_every_model_are_named(three):
    base, (one, other, _) = three
    short = {name: weight for name, weight in other.items() if name != BLOCKS[0]}
    result = compare(base, one, short)
    assert result.provenance["left_out"] == ["layers.0.self_attn.q_proj"]
    assert "left out, not in every model: layers.0.self_attn.q_proj" in result.summary()
    assert "layers.0.self_attn.q_proj" not in result.data.matrix.values


def test_how_it_is_worked_on_changes_nothing(three, monkeypatch):
    """One weight at a time or several, in small pieces, half precision's grid: the sums are the same."""
    base, tuned = three
    whole = compare(base, *tuned)
    monkeypatch.setattr(task_vectors, "PIECE", 7)
    monkeypatch.setattr(device, "side_by_side", lambda order, where: 3)
    assert np.allclose(
        whole.to_frame().select_dtypes("number"), compare(base, *tuned).to_frame().select_dtypes("number")
    )


def test_bfloat16_is_subtracted_in_float32():
    base = {"layers.0.mlp.up_proj.weight": torch.eye(6, dtype=torch.bfloat16)}
    tuned = [{name: weight.float() * (1 + sign * 2**-10) for name, weight in base.items()} for sign in (1, -1)]
    found = compare(base, *tuned).total
    assert float(found.cosine[0, 1]) == pytest.approx(-1)
    assert float(found.norm[0]) == pytest.approx(2**-10 * 6**0.5)


def test_a_result_survives_the_disk_and_draws(three, tmp_path):
    base, tuned = three
    result = compare(base, *tuned, names=["math", "code", "a name that is longer than others"])
    again = fl.load(result.save(tmp_path / "r.nc"))
    assert again.to_frame().equals(result.to_frame())
    assert again.summary() == result.summary()
    assert again.provenance["inputs"]["tuned"][1]["name"] == "code"
    cosine, conflict, overlap = plots.task_vectors(again)
    off = ~np.eye(3, dtype=bool)
    assert np.allclose(cosine.images[0].get_array()[off], result.total.cosine.values[off])
    surplus = (result.total.sign_conflict - result.total.sign_conflict_null).values
    assert np.allclose(conflict.images[0].get_array()[off], surplus[off])
    assert np.allclose(overlap.images[0].get_array()[off], result.total.jaccard.sel(tau=0.01).values[off])
    assert np.ma.getmaskarray(cosine.images[0].get_array()).sum() == 3
    assert "largest 1 %" in overlap.get_title()
    assert f"{float(result.total.jaccard_null.sel(tau=0.01)[0, 1]):.2g}" in overlap.get_title()
    assert len(cosine.patches) == int((result.total.cosine_p_adjusted.values >= 0.05).sum())
    assert ("hatched" in cosine.get_title()) == any(len(ax.patches) for ax in (cosine, conflict, overlap))
    assert not any(t.get_text() == "−.00" for ax in (cosine, conflict, overlap) for t in ax.texts)
    plots.task_vectors(compare(base, dict(base), dict(base)))  # nothing to show
    plt.close("all")


@pytest.fixture
def files(tmp_path, three):
    base, tuned = three
    save_file(base, tmp_path / "base.safetensors")
    found = []
    for folder, state in zip(("math", "code", "chat"), tuned, strict=True):
        (tmp_path / folder).mkdir()
        save_file(state, tmp_path / folder / "model.safetensors")
        found.append(str(tmp_path / folder / "model.safetensors"))
    return str(tmp_path / "base.safetensors"), *found


def command(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        task_vectors.main()
    return stop.value.code


def test_the_command(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert command(*files, "--out", out, "--taus", "0.1,0.5", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    result = fl.load(out / "task_vectors.nc")
    assert result.summary() in printed.out
    assert result.models == ["math", "code", "chat"]  # in the order given
    assert result.taus == [0.1, 0.5]
    assert len((out / "task_vectors.csv").read_text().splitlines()) == 1 + 3
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    drawn = [f"figures/task_vectors-maps.{kind}" for kind in ("pdf", "png")]
    assert left == [*drawn, "run.json", "task_vectors.csv", "task_vectors.nc"]
    assert not list(out.rglob(".*"))
    arguments = [*files, "--out", tmp_path / "j", "--json", "--quiet", "--no-plots", "--names", "a,b,c"]
    assert command(*arguments, monkeypatch=monkeypatch) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["headline"]["models"] == ["a", "b", "c"]
    assert len(record["headline"]["pairs"]) == 3


def test_an_interrupted_run_continues(files, tmp_path, monkeypatch, capsys):
    out, measured, measure = tmp_path / "i", [], task_vectors._measure
    arguments = [*files, "--out", out, "--no-plots", "--quiet"]

    def counted(weight, where):
        if len(measured) == 2:
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append(weight.name)
        return measure(weight, where)

    monkeypatch.setattr(task_vectors, "_measure", counted)
    monkeypatch.setattr(device, "side_by_side", lambda order, where: 1)
    assert command(*arguments, monkeypatch=monkeypatch) == 130
    assert not (out / "task_vectors.nc").exists()
    assert command(*arguments, monkeypatch=monkeypatch) == 0
    assert len(measured) == len(set(measured)) == len(BLOCKS) + 1
    assert not list(out.glob(".*"))
    pairs = [fl.ModelPair.load(files[0], one) for one in files[1:]]
    assert fl.load(out / "task_vectors.nc").to_frame().equals(fl.compare_task_vectors(pairs, progress=False).to_frame())


def test_left_out_weights_fail_the_command(files, tmp_path, three, monkeypatch, capsys):
    state = {name: weight.clone() for name, weight in three[1][0].items()}
    state[BLOCKS[1]][0, 0] = float("inf")
    save_file(state, files[1])
    arguments = [*files, "--no-plots", "--quiet", "--out"]
    assert command(*arguments, tmp_path / "a", monkeypatch=monkeypatch) == 1
    assert "1 weights hold NaN or Inf" in capsys.readouterr().err
    assert command(*arguments, tmp_path / "b", "--allow-nonfinite", monkeypatch=monkeypatch) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f[:2], "expected two tuned models or more of one base; found 1"),
        (lambda f: [f[0], f[1], f[1]], "is given twice"),
        (lambda f: [*f, "--taus", "0.1,0"], "taus are shares of all entries, in (0, 1]; found 0.0, 0.1"),
        (lambda f: [*f, "--taus", "1.5"], "in (0, 1]; found 1.5"),
        (lambda f: [*f, "--taus", "nan"], "in (0, 1]; found nan"),
        (lambda f: [*f, "--taus", "few"], "expected shares such as 0.001,0.01,0.1; found 'few'"),
        (lambda f: [*f, "--names", "a,b"], "expected a name of its own for each of 3 models; found a, b"),
        (lambda f: [*f, "--names", "a,b,a"], "expected a name of its own"),
        (lambda f: [*f, "--null-draws", "0"], "null_draws and limit are at least 1"),
        (lambda f: [*f, f[0].replace("base", "other")], "expected two versions of one architecture"),
        (lambda f: [*f, f[0].replace("base", "nowhere")], "no such file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(change, message, files, tmp_path, monkeypatch, capsys):
    save_file({"layers.0.mlp.up_proj.weight": torch.ones(5, 5)}, tmp_path / "other.safetensors")
    before = sorted(tmp_path.rglob("*"))
    arguments = [*change(list(files)), "--out", tmp_path / "deep" / "out", "--quiet"]
    assert command(*arguments, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_models_of_another_base_are_refused(three):
    base, (one, other, _) = three
    pairs = [fl.ModelPair.load(base, one), fl.ModelPair.load(random(77), other)]
    with pytest.raises(InputError, match=r"paired with another base .*: layers\.0\.self_attn\.q_proj differs"):
        fl.compare_task_vectors(pairs, progress=False)
    with pytest.raises(InputError, match="no weight lies in a block"):
        compare({"w": torch.ones(3, 3)}, {"w": torch.zeros(3, 3)}, {"w": torch.eye(3)})


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["/r/math/model.safetensors", "/r/code"], ["math", "code"]),
        (["/a/lora", "/b/lora"], ["a/lora", "b/lora"]),
        (["/r/math.v2.pt", "/r/math.pt"], ["math.v2", "math"]),
        (["org/one@main", "org/two"], ["one@main", "two"]),
        (["", "/r/x.bin"], ["model 1", "x"]),
    ],
)
def test_names_of_models(sources, names):
    from types import SimpleNamespace as Of

    pairs = [Of(tuned_checkpoint=Of(source=source, fingerprint=source)) for source in sources]
    assert task_vectors._names(pairs) == names
