"""Compressed updates against numpy on one long vector, planted ternary updates, closed forms; and the command."""

import copy
import json
import sys

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from test_check import adapter_folder, tuned_copy
from test_patching import letters

import finetune_lens as fl
from finetune_lens import compression as module
from finetune_lens import plots, stats, zoo
from finetune_lens.compression import _Update
from finetune_lens.errors import InputError
from finetune_lens.hybrid import Hybrid
from finetune_lens.results.compression import Compression, masked_bits, ternary_bits

STRINGS = zoo.path("strings")
WORDS = ("abcde", "fghij", "klm", "nopqrs", "tu", "vwxyza")
PROMPTS = [{"id": w, "prompt": f"{w}=", "answer": w[0]} for w in WORDS]


def two(base, tuned):
    return fl.ModelPair.load(base, tuned, tokenizer=letters())


def found(pair, prompts=PROMPTS, **options):
    return fl.compress(pair, prompts, **{"progress": False, "device": "cpu"} | options)


def long_vector(pair, names):
    """τ of some weights as one vector in float32, and the base."""
    matrices = list(pair.matrices(names))
    ends = [(m.base.float().flatten().numpy(), m.tuned_dense(torch.float32).flatten().numpy()) for m in matrices]
    zero, one = (np.concatenate(side) for side in zip(*ends, strict=True))
    return zero, one


def held(hybrid, names):
    return np.concatenate([hybrid.weights[n].live.read().flatten().numpy() for n in names])


def update_of(pair, densities, *, embeddings=False, seed=0):
    update = _Update(Hybrid(pair, device="cpu"), embeddings=embeddings, seed=seed, progress=False)
    update.cut(densities, progress=False)
    return update


def rounded(model):
    """A copy whose update has few different sizes, and zeros: ties everywhere."""
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randint(-3, 4, p.shape) * 0.125)
    return other


@pytest.fixture(scope="module")
def pairs(library, tmp_path_factory):
    base = library.fresh("llama")
    adapter = adapter_folder(library.fresh("llama"), tmp_path_factory.mktemp("lora"), lora_alpha=7)
    gpt = library.fresh("gpt2")
    return {
        "dense": two(base, tuned_copy(base)),
        "ties": two(base, rounded(base)),
        "fused": two(gpt, rounded(gpt)),
        "lora": two(library.saved("llama"), adapter),
    }


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("kind", ["dense", "ties", "fused", "lora"])
def test_weights_are_those_of_numpy_on_one_long_vector(pairs, kind, embeddings):
    densities = (1e-9, 0.03, 0.4, 0.9, 1.0)
    update = update_of(pairs[kind], densities, embeddings=embeddings)
    zero, one = long_vector(pairs[kind], update.names)
    tau = one - zero
    assert update.entries == len(tau)
    assert update.moved == np.count_nonzero(tau)
    assert update.spread == pytest.approx(tau.std(dtype=np.float64), rel=1e-9)
    order = np.argsort(-np.abs(tau), kind="stable")  # ties go to what comes first
    hybrid = update.hybrid
    for density in densities:
        k = max(1, round(density * len(tau)))
        assert update.kept(density) == np.count_nonzero(tau[order[:k]]) / len(tau)
        for scale in (None, 0.7, 2):
            expected = zero.copy()
            at = order[:k]
            if scale is None:
                expected[at] = one[at]
            else:
                expected[at] += np.float32(scale * tau.std(dtype=np.float64)) * np.sign(tau[at])
            with hybrid:
                hybrid.hold(update.rules("largest", density, scale))
                np.testing.assert_allclose(held(hybrid, update.names), expected, rtol=0, atol=1e-7)
                if scale is None:
                    np.testing.assert_array_equal(held(hybrid, update.names), expected)
                for name in set(hybrid.weights) - set(update.names):
                    assert torch.equal(hybrid.weights[name].live.read(), hybrid.weights[name].base.read())


def test_what_lies_outside_the_blocks_stays_at_the_base(pairs):
    inside, everything = (update_of(pairs["dense"], [1], embeddings=e) for e in (False, True))
    assert set(inside.outside) == {"lm_head", "embed_tokens", "norm"}
    assert {n.split(".")[0] for n in inside.names} == {"layers"}
    assert any("layernorm" in n for n in inside.names)
    assert everything.outside == []


def test_weights_without_an_update_are_no_part_of_it(pairs):
    update = update_of(pairs["lora"], [1])
    assert {n.split(".")[-1] for n in update.names} == {"q_proj", "v_proj"}
    result = found(pairs["lora"], densities=[0.5], scales=[1])
    assert "weights are equal in both models, and are not part of τ" in result.summary()
    rank, shapes = 2, [pairs["lora"].shape(n) for n in update.names]
    factors, dense = rank * sum(m + n for m, n in shapes), sum(m * n for m, n in shapes)
    assert result.data.attrs["factor_bits"] == pytest.approx(16 * factors / dense)
    curve = result.curves()[0]
    inside = sum(int(np.prod(pairs["lora"].shape(n))) for n in update.inside)
    assert curve.shares == pytest.approx([round(0.5 * dense) / inside])
    curve = found(pairs["lora"], densities=[0.5, 0.999999, 1], scales=[1]).curves()[0]
    assert curve.shares == pytest.approx([round(0.5 * dense) / inside, dense / inside, 1])
    np.testing.assert_array_equal(curve.values[1], curve.values[2])


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_everything_kept_in_full_is_the_tuned_models_blocks(pairs, kind):
    result = found(pairs[kind], densities=[1], scales=[1])
    whole = result.reference("blocks", metric="logprob")
    np.testing.assert_allclose(
        result.values("pruned", metric="logprob")[0, 0], whole, rtol=0, atol=1e-5 if kind == "lora" else 0
    )
    update = update_of(pairs[kind], [1.0])
    with update.hybrid as hybrid:
        hybrid.hold(update.rules("largest", 1.0, None))
        pruned = held(hybrid, update.inside)
    expected = long_vector(pairs[kind], update.inside)[1]
    np.testing.assert_array_equal(pruned, expected)
    plain = found(pairs[kind], densities=[1], scales=[1], embeddings=True)
    np.testing.assert_allclose(
        plain.values("pruned", metric="logprob")[0, 0], plain.reference("tuned", metric="logprob"), rtol=0, atol=1e-5
    )


def test_random_entries_are_as_many_and_differ_by_seed(pairs):
    for kind in ("dense", "ties"):
        one, again, other = (update_of(pairs[kind], [0.1, 0.3], seed=s) for s in (0, 0, 1))
        zero, tuned = long_vector(pairs[kind], one.names)
        moved = []
        for update in (one, again, other):
            with update.hybrid as hybrid:
                hybrid.hold(update.rules("random", 0.3, 1.0))
                moved.append(held(hybrid, update.names) != zero)
        assert np.array_equal(moved[0], moved[1])
        assert not np.array_equal(moved[0], moved[2])
        assert moved[0].sum() == round(0.3 * len(zero))
        assert not moved[0][tuned == zero].any()  # an entry that did not change has no sign
        share = (moved[0] & moved[2]).sum() / moved[0].sum()  # of two independent draws from the entries that changed
        assert share == pytest.approx(0.3 / (tuned != zero).mean(), abs=0.03)
        sizes = np.abs(tuned - zero)
        assert sizes[moved[0]].mean() == pytest.approx(sizes[sizes > 0].mean(), rel=0.05)


def test_bits_at_known_points():
    assert ternary_bits(np.array([0, 0.5, 1])) == pytest.approx([0, 1.5, 1])
    assert ternary_bits(2 / 3) == pytest.approx(np.log2(3))  # all three values alike
    assert ternary_bits(0.05) == pytest.approx(0.3364, abs=1e-4)
    assert masked_bits(np.array([0, 0.5, 1])) == pytest.approx([0, 9, 16])
    assert masked_bits(0.25) == pytest.approx(4 + 2 - 0.75 * np.log2(3))


@pytest.fixture(scope="module")
def planted(library):
    """±1/4 on 1 % of the blocks' entries, over a base of multiples of 1/64: sums are exact."""
    base, generator = library.fresh("llama"), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in base.parameters():
            p.copy_((p * 64).round() / 64)
    tuned = copy.deepcopy(base)
    inside = [p for n, p in tuned.named_parameters() if ".layers." in n]
    count = sum(p.numel() for p in inside)
    flat = torch.zeros(count)
    at = torch.randperm(count, generator=generator)[: count // 100]
    flat[at] = torch.where(torch.rand(len(at), generator=generator) < 0.5, 0.25, -0.25)
    with torch.no_grad():
        for p, change in zip(inside, flat.split([p.numel() for p in inside]), strict=True):
            p.add_(change.view_as(p))
    return base, tuned


def test_a_ternary_update_is_reconstructed_exactly(planted):
    pair = two(*planted)
    update = update_of(pair, [0.01])
    density = update.moved / update.entries
    update = update_of(pair, [density])
    scale = 0.25 / update.spread
    with update.hybrid as hybrid:
        hybrid.hold(update.rules("largest", density, scale))
        np.testing.assert_array_equal(held(hybrid, update.inside), long_vector(pair, update.inside)[1])
    result = found(pair, densities=[density], scales=[scale / 2, scale, 2 * scale])
    tuned = result.reference("tuned", metric="logprob")
    np.testing.assert_array_equal(result.values("ternary", metric="logprob")[0, 1], tuned)
    assert not np.array_equal(result.values("ternary", metric="logprob")[0, 0], tuned)
    recovery, _, _ = result.recovery(result.values("ternary", metric="logprob"), metric="logprob")
    assert np.isnan(recovery).all() or recovery[0, 1] == 1


def made_up(*, half=("choice", "report") * 4, gap=1.0):
    """A result whose log-probabilities tell which scale is best on which half."""
    count = len(half)
    rng = np.random.default_rng(0)
    base = rng.normal(size=count)
    tuned = base + gap * (1 + 0.1 * rng.normal(size=count))
    here = np.array(half) == "choice"
    share = np.zeros((2, 2, count))
    share[0, 0], share[0, 1] = np.where(here, 0.9, 0.1), np.where(here, 0.2, 0.99)
    share[1, 0], share[1, 1] = np.where(here, 0.5, 0.6), np.where(here, 0.96, 0.97)
    values = base + share * (tuned - base)
    data = {"kept": ("density", [0.1, 0.5])}
    for metric in ("accuracy", "logprob"):
        data[f"ternary_{metric}"] = data[f"random_{metric}"] = (("density", "scale", "example"), values)
        data[f"pruned_{metric}"] = (("density", "example"), values[:, 1])
        data[f"reference_{metric}"] = (("reference", "example"), np.stack([base, tuned, tuned]))
    coords = {
        "density": [0.1, 0.5], "scale": [1.0, 2.0], "example": [str(i) for i in range(count)],
        "reference": ["base", "tuned", "blocks"], "half": ("example", list(half)),
    }  # fmt: skip
    attrs = {"objective": "text", "entries": 50, "moved": 50, "parameters": 100, "spread": 1.0, "factor_bits": np.nan,
             "outside": "[]", "unchanged": "[]"}  # fmt: skip
    return Compression(xr.Dataset(data, coords, attrs))


@pytest.mark.parametrize("gap", [1.0, -1.0])
def test_the_scale_is_chosen_on_one_half_and_reported_on_the_other(gap):
    """At the lower density the better half of the grid is another one where it is reported: no maximum is taken there.
    With a negative gap, what tuning lost, more recovery is a lower metric."""
    result = made_up(gap=gap)
    assert list(result.chosen("ternary")) == [0, 1]
    table = result.table()
    rows = table[table["method"] == "ternary"].set_index("density")
    assert rows.loc[0.1, "recovery"] == pytest.approx(0.1)
    assert rows.loc[0.5, "recovery"] == pytest.approx(0.97)
    assert list(rows["scale"]) == [1, 2]
    best = result.smallest()
    assert (best["density"], best["bits"]) == (0.5, pytest.approx(1.5))
    assert "1.5 bits a parameter are enough" in result.summary()
    curve = result.curves()[0]
    assert list(curve.shares) == [0.05, 0.25]  # half of the parameters are in weights that did not change
    assert curve.values.shape == (2, 4)
    np.testing.assert_allclose((curve.values - curve.base) / (curve.tuned - curve.base), [[0.1] * 4, [0.97] * 4])
    report = np.array(result.data.half.values) == "report"
    ends = stats.interval_of_ratio(
        (result.values("ternary")[1, 1] - result.reference("base"))[report],
        (result.reference("tuned") - result.reference("base"))[report],
    )
    assert rows.loc[0.5, ["recovery", "low", "high"]].tolist() == pytest.approx([float(x) for x in ends])


def test_no_gain_is_said(tmp_path):
    result = made_up()
    result.data["reference_logprob"][1] = result.data["reference_logprob"][0]
    assert result.table()["recovery"].isna().all()
    assert "recovery is undefined" in result.summary()
    assert result.headline()["smallest"] == {"ternary": None, "pruned": None, "random": None}
    json.dumps(result.headline(), allow_nan=False)
    axes = plots.compression(result)
    assert all("undefined" in "".join(t.get_text() for t in ax.texts) for ax in axes)
    plt.close("all")


def test_one_example_has_no_interval():
    result = made_up(half=("report",) * 8)
    one = Compression(result.data.isel(scale=[1], example=[0]))
    assert "0.569 bits a parameter are enough: density 0.1, α = 2 recover 0.99\n" in one.summary() + "\n"


def test_the_pair_that_ships():
    """Ternary updates recover the task at a sixteenth of the bits; the same entries with their values do not."""
    pair = fl.ModelPair.load(STRINGS / "base", STRINGS / "full")
    result = found(pair, STRINGS / "prompts.jsonl", densities=[0.2, 1], scales=[3])
    rows = result.table().set_index(["method", "density"])
    assert rows.loc[("ternary", 0.2), "recovery"] > 0.95
    assert rows.loc[("pruned", 0.2), "recovery"] < 0.3
    assert rows.loc[("random", 0.2), "recovery"] < 0.2
    assert rows.loc[("pruned", 1), "recovery"] == result.headline()["blocks_recovery"]["recovery"] > 0.95
    assert set(result.data.half.values) == {"report"}  # nothing is chosen
    assert result.smallest()["bits"] == pytest.approx(0.922, abs=0.001)
    assert len(result.to_frame()) == 6


def test_figure_and_file(pairs, tmp_path):
    result = found(pairs["dense"], densities=[0.1, 0.6, 1], scales=[1, 2])
    again = fl.load(result.save(tmp_path / "c.nc"))
    assert isinstance(again, Compression)
    assert again.summary() == result.summary()
    assert again.table().equals(result.table())
    made = made_up()
    heat, lines = plots.compression(made)
    cells = [t.get_text() for t in heat.texts]
    expected, _, _ = made.recovery(made.values("ternary"))
    assert cells == [f"{v:.2f}" for v in expected.ravel()]
    drawn = {
        line.get_color(): line for line in lines.get_lines() if len(line.get_xdata()) > 2 or line.get_marker() != "None"
    }
    ternary = drawn[plots.compression.__globals__["OBSERVED"]]
    table = made.table()
    np.testing.assert_allclose(ternary.get_xdata(), table[table["method"] == "ternary"]["bits"])
    np.testing.assert_allclose(ternary.get_ydata(), table[table["method"] == "ternary"]["recovery"])
    assert list(plots.figures_of(again)) == ["recovery"]
    plt.close("all")


def test_interrupted_runs_continue(library, tmp_path, monkeypatch):
    tuned_copy(library.fresh("llama")).save_pretrained(tmp_path / "tuned")
    pair = two(library.saved("llama"), tmp_path / "tuned")
    options = {"densities": [0.1, 1], "scales": [1, 2], "partial": tmp_path / "partial"}
    from finetune_lens import evaluation

    measure, calls = evaluation.measure, []

    def counted(*given, **named):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(*given, **named)

    monkeypatch.setattr(evaluation, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        found(pair, **options)
    result = found(pair, **options)
    assert len(calls) == 1 + 3 + 2 + 8  # the interrupted one twice
    monkeypatch.undo()
    xr.testing.assert_equal(found(pair, **options | {"partial": None}).data, result.data)
    assert found(pair, **options | {"seed": 1}).provenance["arguments"]["seed"] == 1


@pytest.mark.parametrize("objective", ["labels", "text"])
def test_other_objectives(pairs, objective):
    result = found(pairs["dense"], densities=[1], scales=[1], objective=objective)
    assert result.data.attrs["objective"] == objective
    assert result.metric == ("logprob" if objective == "text" else "accuracy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"densities": [0, 0.5]}, r"shares of the entries, in \(0, 1\]; found 0, 0.5"),
        ({"densities": [1.5]}, "found 1.5"),
        ({"densities": []}, "found none"),
        ({"scales": []}, "finite numbers above 0; found none"),
        ({"scales": [-1]}, "found -1"),
        ({"limit": 3}, "which takes 4; found 3"),
        ({"objective": "taste"}, "objective is one of"),
    ],
)
def test_options_out_of_range(pairs, options, message):
    with pytest.raises(InputError, match=message):
        found(pairs["dense"], **options)


def test_an_update_that_is_none_or_is_not_finite(library):
    base = library.fresh("llama")
    with pytest.raises(InputError, match="are equal in all 18 weights of the blocks: there is no update to compress"):
        found(two(base, copy.deepcopy(base)))
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"the update of layers.1.mlp.up_proj holds NaN or Inf"):
        found(two(base, other))


def run(*words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compression", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        module.main()
    return stop.value.code


def test_command(tmp_path, monkeypatch, capsys):
    words = [STRINGS / "base", STRINGS / "lora", STRINGS / "prompts.jsonl", "--limit", 8, "--out", tmp_path / "out"]
    grid = ["--density", "0.1,1", "--scale", "1:2:1"]
    assert run(*words, *grid, "--json", monkeypatch=monkeypatch) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "compression"
    assert record["headline"]["examples"] == {"choice": 4, "report": 4}
    assert record["headline"]["factor_bits"] == pytest.approx(2.37, abs=0.01)
    result = fl.load(tmp_path / "out" / "compression.nc")
    assert result.scales == [1, 2]
    assert {p.name for p in (tmp_path / "out/figures").iterdir()} == {
        "compression-recovery.png",
        "compression-recovery.pdf",
    }


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["--density", "0,0.5"], "densities are shares of the entries, in (0, 1]; found 0, 0.5"),
        (["--density", ""], "expected a range"),
        (["--scale", "one"], "expected a range"),
        (["--objective", "labels", "--limit", "1"], "which takes 4; found 1"),
    ],
)
def test_bad_input_is_one_line(grid, message, tmp_path, monkeypatch, capsys):
    words = [STRINGS / "base", STRINGS / "full", STRINGS / "prompts.jsonl", "--quiet", "--out", tmp_path / "out"]
    assert run(*words, *grid, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_equal_models_are_bad_input(tmp_path, monkeypatch, capsys):
    words = [STRINGS / "base", STRINGS / "base", STRINGS / "prompts.jsonl", "--quiet", "--out", tmp_path / "out"]
    assert run(*words, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr().err
    assert "there is no update to compress" in printed
    assert printed.count("\n") == 1
