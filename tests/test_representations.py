"""Representations against plain Hugging Face passes and naive loops; equals are equal; what is planted is read."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from test_check import command, tuned_copy
from test_patching import letters
from test_similarity import naive_cka, naive_procrustes, naive_rsa

import finetune_lens as fl
from finetune_lens import plots, representations
from finetune_lens.errors import GateFailed, InputError
from finetune_lens.hooked import HookedModel, features
from finetune_lens.hooked.difference import read_difference
from finetune_lens.results.representations import Representations

TEXTS = ["abcde=", "fg=", "klmnoqw=", "pqrst=", "u", "zyx=", "aabb", "kgqe=", "hjm=", "wwv=", "oprt=", "lkjhg="]
EQUAL = {"cka": 1, "cka_debiased": 1, "rsa": 1, "procrustes": 0, "cosine": 1, "change": 0}


def compare(base, tuned, texts=TEXTS, *, tokenizer=None, **options):
    pair = fl.ModelPair.load(base, tuned, tokenizer=tokenizer or letters())
    return fl.compare_representations(pair, texts, **{"check": False, "progress": False} | options)


def rows(model, pool, texts=TEXTS):
    """By depth (row, d): all tokens of a text but its first, where there are others; float64."""
    found = []
    for text in texts:
        with torch.no_grad():
            hidden = model(torch.tensor([letters()(text)["input_ids"]]), output_hidden_states=True).hidden_states
        own = [h[0, min(1, len(text) - 1) :].double().numpy() for h in hidden[:-1]]
        found.append([h if pool == "each" else h.mean(0, keepdims=True) for h in own])
    return [np.concatenate(depth) for depth in zip(*found, strict=True)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pool", ["mean", "each"])
def test_against_naive_loops(library, family, pool):
    base = library.model(family)
    tuned = tuned_copy(base)
    result = compare(base, tuned, pool=pool)
    found = result.data
    xs, ys, means, others = (rows(m, p) for p in (pool, "mean") for m in (base, tuned))
    assert found.sizes["depth"] == 3
    assert found.attrs["rows"] == len(xs[0])
    for depth, (x, y) in enumerate(zip(xs, ys, strict=True)):  # all but the last, which Hugging Face norms
        norms = [np.linalg.norm(side, axis=1) for side in (x, y)]
        expected = dict(zip(("cka", "cka_debiased"), naive_cka(x, y), strict=True)) | {
            "procrustes": naive_procrustes(x, y), "rsa": naive_rsa(means[depth], others[depth]),
            "cosine": np.mean((x * y).sum(1) / norms[0] / norms[1]),
            "change": np.mean(np.linalg.norm(y - x, axis=1) / norms[0]),
        }  # fmt: skip
        for name, value in expected.items():
            assert float(found["value"].sel(measure=name, depth=depth)) == pytest.approx(value, abs=1e-4), name
        for other, z in enumerate(ys):
            pair = found.sel(base_depth=depth, tuned_depth=other)
            np.testing.assert_allclose([pair["cka"], pair["cka_debiased"]], naive_cka(x, z), atol=1e-4)
    diagonal = [found["cka"].values[i, i] for i in range(3)]
    np.testing.assert_allclose(diagonal, found["value"].sel(measure="cka"), atol=1e-8)


@pytest.mark.parametrize("pool", ["mean", "each"])
def test_left_out_folds_and_the_interval(library, pool):
    base = library.model("llama")
    tuned = tuned_copy(base)
    result = compare(base, tuned, pool=pool, seed=3)
    example = np.repeat(np.arange(len(TEXTS)), [1 if pool == "mean" else max(1, len(t) - 1) for t in TEXTS])
    plan = representations._Plan.of(example, 3)
    assert np.bincount(plan.fold).tolist() == [2, 2, *[1] * 8]
    x, y = (rows(m, pool)[1] for m in (base, tuned))
    for fold in (0, 5):
        kept = [t for t, f in zip(TEXTS, plan.fold, strict=True) if f != fold]
        one = result.data["left_out"].sel(depth=1, fold=fold)
        assert float(one.sel(measure="rsa")) == pytest.approx(
            naive_rsa(*(rows(m, "mean", kept)[1] for m in (base, tuned))), abs=1e-4
        )
        there = plan.fold[example] != fold
        assert float(one.sel(measure="cka_debiased")) == pytest.approx(naive_cka(x[there], y[there])[1], abs=1e-4)
        assert float(one.sel(measure="procrustes")) == pytest.approx(naive_procrustes(x[there], y[there]), abs=1e-4)
        change = np.linalg.norm(y - x, axis=1) / np.linalg.norm(x, axis=1)
        assert float(one.sel(measure="change")) == pytest.approx(change[there].mean(), abs=1e-4)
    row = result.layers().query("measure == 'change' and depth == 1").iloc[0]
    left = result.data["left_out"].sel(measure="change", depth=1).values
    reach = 2.262157 * np.sqrt(0.9 * ((left - left.mean()) ** 2).sum())  # t of 9 degrees of freedom
    assert (row["low"], row["high"]) == pytest.approx((row["value"] - reach, row["value"] + reach), rel=1e-5)


def test_the_interval_covers_the_truth():
    """Means of 30 draws, of which the true mean is 0: about 95 % of the intervals hold it."""
    from finetune_lens.results.representations import _jackknife

    draws = np.random.default_rng(0).normal(size=(400, 30))
    left = np.stack([np.delete(draws, np.arange(f, 30, 10), 1).mean(1) for f in range(10)], 1)
    low, high = _jackknife(draws.mean(1), left)
    assert 0.92 < np.mean((low < 0) & (high > 0)) < 0.98


@pytest.mark.parametrize("pool", ["mean", "each"])
def test_identical_models(library, pool):
    base = library.model("gpt2")
    result = compare(base, copy.deepcopy(base), pool=pool, null=[HookedModel(copy.deepcopy(base), letters())])
    for name, value in EQUAL.items():
        np.testing.assert_allclose(result.data["value"].sel(measure=name), value, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(result.data["null"].sel(measure=name), value, atol=1e-12, err_msg=name)
    assert (result.data["size"] == 0).all()
    assert (result.tokens()["token"] == "").all()
    assert "nothing clear" in result.summary()


@pytest.mark.parametrize("family", ["gpt2", "gemma2-sliding"])
@pytest.mark.parametrize("pool", ["mean", "each"])
def test_batches_and_padding_change_nothing(library, family, pool):
    base = library.model(family)
    tuned = tuned_copy(base)
    one, other = (compare(base, tuned, pool=pool, batch_size=size).data for size in (1, None))
    for name in ("value", "shuffled", "left_out", "cka", "cka_debiased", "size", "logit"):
        np.testing.assert_allclose(one[name].values, other[name].values, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_other_sites(library, site):
    model = library.model("llama")
    found = compare(model, tuned_copy(model), site=site)
    assert found.data.sizes["depth"] == 2
    if site == "resid_pre":
        expected = compare(model, tuned_copy(model)).data["value"].isel(depth=slice(0, 2))
        np.testing.assert_allclose(found.data["value"], expected)


def test_shuffled_rows_share_nothing(library):
    base = library.model("llama")
    found = compare(base, tuned_copy(base), [f"{a}{b}{a}=" for a in "abcdefg" for b in "hijkl"])
    chance = found.data["shuffled"]
    for name in ("cka_debiased", "rsa"):
        assert abs(float(chance.sel(measure=name).mean())) < 0.05
        assert float(chance.sel(measure=name).max()) < 0.5 < float(found.data["value"].sel(measure=name).min())
    other = compare(base, tuned_copy(base), [f"{a}{b}{a}=" for a in "abcdefg" for b in "hijkl"], seed=1)
    assert not np.array_equal(other.data["shuffled"], chance)
    assert np.array_equal(other.data["value"], found.data["value"])


def test_null_models(library, tmp_path):
    base, strangers = library.model("llama"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = copy.deepcopy(base)
        for parameter in other.parameters():
            parameter.normal_(0, 0.2)
        strangers.append(HookedModel(other, letters(), name=f"seed {seed}"))
    near, far = (
        compare(base, tuned_copy(base, 1e-3), null=strangers),
        compare(base, strangers[0].module, null=strangers),
    )
    assert near.models == ["1: seed 1", "2: seed 2"]
    layers = near.layers()
    assert layers[layers["measure"] != "cka"]["closer_than_null"].all()
    assert not far.layers()["closer_than_null"].any()  # it is one of them
    np.testing.assert_allclose(
        far.data["null"].sel(model="1: seed 1").transpose("measure", "depth"), far.data["value"], atol=1e-9
    )
    assert "3 of 3 depths" in near.summary()
    assert "not known (--null)" in compare(base, tuned_copy(base)).summary()
    assert near.headline()["null_models"] == 2
    with pytest.raises(InputError, match=r"null model .* has 4 layers, the base 2"):
        compare(base, tuned_copy(base), null=[library.saved("gemma3-sliding")])
    with pytest.raises(InputError, match="no such"):
        compare(base, tuned_copy(base), null=[tmp_path / "nowhere"])


def test_models_of_other_depth(library):
    import transformers

    base = library.model("llama")
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    deeper = transformers.AutoModelForCausalLM.from_config(config).eval()
    result = compare(base, deeper)
    assert result.data["cka"].shape == (3, 4)
    xs, ys = rows(base, "mean"), rows(deeper, "mean")
    np.testing.assert_allclose(result.data["cka_debiased"][1, 2], naive_cka(xs[1], ys[2])[1], atol=1e-4)
    assert not result.matched
    assert not result.has_lens
    assert len(result.to_frame()) == 12
    assert "3 depths" in result.summary()
    json.dumps(result.headline(), allow_nan=False)
    assert list(plots.figures_of(result)) == ["cka"]
    for call in (result.layers, result.tokens):
        with pytest.raises(InputError):
            call()
    with pytest.raises(InputError, match="different numbers of layers"):
        compare(base, deeper, null=[HookedModel(base, letters())])


def lens_of(model, difference):
    """By hand: what the final norm and the unembedding make of a direction, without biases."""
    if hasattr(model, "transformer"):
        centred = difference - difference.mean()
        normed = centred / centred.std() * model.transformer.ln_f.weight.double().numpy()
    else:
        normed = difference / np.sqrt((difference**2).mean()) * model.model.norm.weight.double().numpy()
    return model.get_output_embeddings().weight.double().numpy() @ normed


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_difference_is_read_as_by_hand(library, family):
    base = library.model(family)
    tuned = tuned_copy(base)
    result = compare(base, tuned)
    xs, ys = rows(base, "mean"), rows(tuned, "mean")
    show = letters().decode
    for depth, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if depth == 0:
            continue
        mean = (y - x).mean(0)
        logits = lens_of(tuned, mean)[: len(letters())]
        one = result.data.sel(depth=depth)
        order = np.argsort(-logits)
        assert list(one["token"].sel(direction="promoted").values) == [show([i]) for i in order[:10]]
        assert list(one["token"].sel(direction="suppressed").values) == [show([i]) for i in order[::-1][:10]]
        np.testing.assert_allclose(one["logit"].sel(direction="promoted"), logits[order[:10]], atol=1e-3)
        size = np.linalg.norm(mean) / np.linalg.norm(x, axis=1).mean()
        assert float(one["size"]) == pytest.approx(size, rel=1e-4)


def test_the_p_values_against_a_loop(library):
    model = HookedModel(library.model("llama"), letters())
    differences = np.random.default_rng(0).normal(size=(9, 32)) + 0.3
    found = read_difference(model, differences, length=5.0, count=4, draws=30, seed=2)
    signs = np.random.default_rng(2).choice([-1.0, 1.0], size=(30, 9))
    size = np.linalg.norm(differences.mean(0))
    reached = []
    for draw in signs:
        mean = (differences * draw[:, None]).mean(0)
        logits = lens_of(model.module, mean)[: len(letters())]
        reached.append(np.abs(logits).max() * np.linalg.norm(mean) / size)
    for logit, p in zip(found.logit.ravel(), found.p.ravel(), strict=True):
        assert p == pytest.approx((1 + sum(r >= abs(logit) for r in reached)) / 31)
    assert found.size == pytest.approx(size)


def test_the_lens_finds_nothing_where_nothing_is(library):
    """Differences that are as often one way as the other: at most about one in twenty reads as something."""
    model = HookedModel(library.model("llama"), letters())
    rng = np.random.default_rng(0)
    found = [
        read_difference(model, rng.normal(size=(20, 32)), length=1.0, count=1, draws=99, seed=s).p.min()
        for s in range(60)
    ]
    assert np.mean(np.array(found) < 0.05) <= 0.15
    assert np.mean(np.array(found) < 0.5) >= 0.3


def test_a_planted_token_is_read_where_it_was_written(library):
    """A bias in the last block's MLP along one token's unembedding: promoted at the last depth, nowhere before."""
    base = library.fresh("gpt2")
    token = letters().convert_tokens_to_ids("q")
    with torch.no_grad():
        base.transformer.ln_f.weight.fill_(1)
        tuned = copy.deepcopy(base)
        row = base.get_output_embeddings().weight[token]
        tuned.transformer.h[1].mlp.c_proj.bias += 3 * (row - row.mean()) / row.norm()
    result = compare(base, tuned)
    frame = result.tokens()
    top = frame[(frame["direction"] == "promoted") & (frame["rank"] == 0)].set_index("depth")
    assert top.loc[2, "token"] == "q"
    assert top.loc[2, "p_adjusted"] < 0.02
    assert (top.loc[[0, 1], "token"] == "").all()
    assert "2: " in result.summary().splitlines()[-1]
    assert "up 'q'" in result.summary().splitlines()[-1]
    sizes = result.sizes()
    assert (sizes["size"] > sizes["chance"]).tolist() == [False, False, True]


def test_files_of_texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one\n\n two \nthree\n")
    assert [(t.id, t.prompt) for t in representations.read_texts(file)] == [
        ("1", "one"),
        ("3", " two "),
        ("4", "three"),
    ]
    assert len(representations.read_texts(file, limit=2)) == 2
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n')
    assert representations.read_texts(tmp_path / "p.jsonl")[0].prompt == "abc"
    file.write_text(" \n\n")
    with pytest.raises(InputError, match="holds no texts"):
        representations.read_texts(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        representations.read_texts(str(file))
    with pytest.raises(InputError, match="is not there"):
        representations.read_texts(tmp_path / "none.txt")


def test_refuses(library):
    base = library.model("llama")
    for options, message in (
        ({"pool": "max"}, "pool is mean or each"), ({"site": "z"}, "as wide as the residual"),
        ({"site": "nowhere"}, "unknown"), ({"texts": TEXTS[:4]}, "five|5 texts or more; found 4"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            compare(base, tuned_copy(base), **options)
    broken = tuned_copy(base)
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"tuned model's activations at blocks\.1\.hook_resid_post hold NaN"):
        compare(base, broken)
    with pytest.raises(GateFailed):
        compare(base, copy.deepcopy(base), check=True)
    with pytest.raises(InputError, match="resid_mid"):
        compare(library.model("neox"), tuned_copy(library.model("neox")), site="resid_mid")


def test_tokenizers_that_differ(library):
    from test_patching import LETTERS
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base = library.model("llama")
    pair = fl.ModelPair.load(base, tuned_copy(base), tokenizer=letters())
    for vocabulary, pattern, message in (
        (dict(LETTERS) | {"a": LETTERS["b"], "b": LETTERS["a"]}, ".", "different ids"),
        (dict(LETTERS) | {"ab": 35}, "ab|.", "prompt 1 as different tokens"),
    ):
        raw = Tokenizer(models.WordLevel(vocabulary))
        raw.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        pair.models()[1].tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")
        with pytest.raises(InputError, match=message):
            fl.compare_representations(pair, TEXTS, progress=False, check=False)


def test_many_texts_share_the_dissimilarities(library, monkeypatch):
    monkeypatch.setattr(representations, "MOST_DISSIMILARITIES", 6)
    base = library.model("llama")
    tuned = tuned_copy(base)
    result = compare(base, tuned)
    some = [TEXTS[i] for i in (0, 2, 4, 7, 9, 11)]
    expected = naive_rsa(*(rows(m, "mean", some)[1] for m in (base, tuned)))
    assert float(result.data["value"].sel(measure="rsa", depth=1)) == pytest.approx(expected, abs=1e-4)
    assert "RSA compares 6 of the texts" in result.summary()


def test_an_interrupted_comparison_continues(library, tmp_path, monkeypatch):
    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    sides = library.saved("llama"), tmp_path / "tuned"
    whole = compare(*sides, null=[sides[1]])
    batches, real = [], features._batch
    monkeypatch.setattr(features, "_batch", lambda *a: batches.append(1) or real(*a))
    with monkeypatch.context() as patch:
        patch.setattr(representations, "_every_two", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare(*sides, null=[sides[1]], partial=tmp_path / "chunks")
    assert len(batches) == 3
    found = compare(*sides, null=[sides[1]], partial=tmp_path / "chunks")
    assert len(batches) == 3
    assert found.data.drop_attrs().identical(whole.data.drop_attrs())


def test_saved_and_loaded(library, tmp_path):
    base = library.model("llama")
    for options in ({}, {"lens": False, "null": [HookedModel(tuned_copy(base, 0.5), letters(), name="other")]}):
        found = compare(base, tuned_copy(base), **options)
        again = fl.load(found.save(tmp_path / "r.nc"))
        assert isinstance(again, Representations)
        assert again.summary() == found.summary()
        assert again.to_frame().equals(found.to_frame())
        assert again.has_lens == ("lens" not in options)
        json.dumps(found.headline(), allow_nan=False)
    with pytest.raises(InputError, match="lens=True"):
        found.tokens()


def test_the_command(library, tmp_path):
    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    letters().save_pretrained(tmp_path / "letters")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    words = [library.saved("llama"), tmp_path / "tuned", "texts.txt", "--tokenizer", "letters"]
    words += ["--null", library.saved("llama")]
    done = command("finetune_lens.representations", *words, "--json", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["headline"]["texts"] == len(TEXTS)
    assert told["headline"]["null_models"] == 1
    assert len(told["figures"]) == 4
    assert sorted(p.name for p in (tmp_path / "runs/representations").iterdir()) == [
        "figures", "representations.csv", "representations.nc", "run.json",
    ]  # fmt: skip


def test_the_command_refuses(library, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("")
    words = ["x", library.saved("llama"), library.saved("llama"), tmp_path / "texts.txt", "--out", tmp_path / "o"]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with pytest.raises(SystemExit) as stop:
        representations.main()
    assert stop.value.code == 2
    assert "holds no texts" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_figures(library):
    import matplotlib.pyplot as plt

    base = library.model("llama")
    null = [HookedModel(tuned_copy(base, s), letters(), name=str(s)) for s in (0.1, 0.2)]
    result = compare(base, tuned_copy(base), null=null)
    axes = np.ravel(plots.representation_layers(result))
    assert [ax.get_ylabel() for ax in axes] == list(plots.representation_layers.__globals__["LABELS"].values())
    for ax, measure in zip(axes, ("cka_debiased", "rsa"), strict=False):
        drawn = [line.get_ydata() for line in ax.lines]
        assert any(np.array_equal(y, result.data["value"].sel(measure=measure).values) for y in drawn)
        assert len(ax.collections) == 3  # rows shuffled, null models, interval
    assert np.array_equal(axes[-1].lines[0].get_ydata(), result.data["size"].values)
    ax = plots.cka_matrix(result, measure="cka")
    assert np.array_equal(ax.images[0].get_array(), result.data["cka"].values)
    best = {(int(x), int(y)) for line in ax.lines for x, y in zip(*line.get_data(), strict=True)}
    assert best == {(j, int(i)) for j, i in enumerate(result.data["cka"].values.argmax(0))}
    with pytest.raises(InputError, match="measure is one of"):
        plots.cka_matrix(result, measure="rsa")
    plt.close("all")
