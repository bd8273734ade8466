"""Probes against scikit-learn on the same features and splits; what is planted is found at its depth and not before."""

import copy
import json
import warnings

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_check import command, tuned_copy
from test_patching import letters

import finetune_lens as fl
from finetune_lens.errors import GateFailed, InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked.features import columns_at
from finetune_lens.linalg.probes import fit_logistic, fit_ridge
from finetune_lens.plots import figures_of
from finetune_lens.probing import fits
from finetune_lens.probing.labels import controls, read_labels, split, types_of
from finetune_lens.prompts import encode, read_prompts
from finetune_lens.results.probing import Probing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import r2_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def words(count, length=4, seed=0):
    generator = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        found["".join(generator.choice(list(ALPHABET), length + len(found) % 3))] = None
    return list(found)


def rows(count=120, label=lambda word: word[-1] < "n", **fields):
    return [{"prompt": f"{w}=", "label": label(w)} | {k: f(w) for k, f in fields.items()} for w in words(count)]


def probe(base, tuned, items, **options):
    pair = fl.ModelPair.load(base, tuned, tokenizer=letters())
    return fl.probe(pair, items, **{"check": False, "progress": False} | options)


def features(model, items, sites, read=lambda x: x[-1]):
    """(site, example, feature) one prompt at a time."""
    hooked, found = HookedModel(model), []
    for ids in letters()([item["prompt"] for item in items])["input_ids"]:
        cache = hooked.run(torch.tensor([ids]), capture=sites).cache
        found.append([read(cache[site][0].numpy().astype(np.float64)).ravel() for site in sites])
    return np.stack(found, 1)


def sklearn_probe(classes):
    if classes == 0:
        return make_pipeline(StandardScaler(), Ridge(alpha=1.0))
    return make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000))


def correlated(n, d, seed):
    """Features of very different size and correlation, as residual streams have them."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(d, d)) * np.exp(-np.arange(d) / 5)
    return (generator.normal(size=(n, d)) @ mix.T + 5 * generator.normal(size=d)) * np.exp(2 * generator.normal(size=d))


# The fits


@pytest.mark.parametrize(("n", "d"), [(200, 12), (40, 60)])
@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_against_scikit_learn(n, d, classes):
    x, generator = correlated(n, d, seed=1), np.random.default_rng(2)
    z = StandardScaler().fit_transform(x)
    planted = (z @ generator.normal(size=(d, classes)) + generator.normal(size=(n, classes))).argmax(1)
    y = np.stack([planted, generator.integers(classes, size=n)], 1)
    there = torch.ones(1, n, dtype=torch.bool)
    found = fit_logistic(torch.tensor(x)[None], torch.tensor(y)[None], there, classes=classes, penalty=0.5)
    assert found.converged.all()
    logits, said = found(torch.tensor(x)[None])[0].numpy(), found.classify(torch.tensor(x)[None])[0].numpy()
    for target in range(2):
        oracle = LogisticRegression(C=2.0, tol=1e-9, max_iter=10_000).fit(z, y[:, target])
        expected = oracle.decision_function(z).reshape(n, -1)
        mine = logits[:, target]
        if classes > 2:  # a constant on all classes is free
            mine, expected = (v - v.mean(1, keepdims=True) for v in (mine, expected))
        np.testing.assert_allclose(mine, expected, atol=5e-3)
        assert (said[:, target] == oracle.predict(z)).mean() > 0.999
        w = expected  # the loss is no worse than the oracle's
        losses = [
            np.logaddexp(0, np.where(y[:, target] == 1, -v[:, 0], v[:, 0])).sum()
            if classes == 2
            else (np.logaddexp.reduce(v, 1) - v[np.arange(n), y[:, target]]).sum()
            for v in (mine, w)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize(("n", "d"), [(200, 12), (40, 60)])
def test_ridge_against_scikit_learn(n, d):
    x, generator = correlated(n, d, seed=1), np.random.default_rng(2)
    y = np.stack([StandardScaler().fit_transform(x)[:, 0] + generator.normal(size=n), generator.normal(size=n)], 1) + 7
    found = fit_ridge(torch.tensor(x)[None], torch.tensor(y)[None], torch.ones(1, n, dtype=torch.bool), penalty=3.0)
    for target in range(2):
        oracle = make_pipeline(StandardScaler(), Ridge(alpha=3.0)).fit(x, y[:, target])
        np.testing.assert_allclose(found(torch.tensor(x)[None])[0, :, target, 0], oracle.predict(x), atol=1e-9)


@pytest.mark.parametrize("d", [6, 90])
def test_fits_together_are_fits_alone(d):
    """Sets of different length, filled up with rows that are not there, whatever these hold."""
    generator = np.random.default_rng(0)
    lengths, most = (40, 70, 55), 70
    x = torch.full((3, most, d), 1e3, dtype=torch.float64)
    y, values = torch.ones(3, most, 2, dtype=torch.int64), torch.full((3, most, 2), 50.0, dtype=torch.float64)
    there = torch.zeros(3, most, dtype=torch.bool)
    for fit, n in enumerate(lengths):
        x[fit, :n] = torch.tensor(correlated(n, d, seed=fit))
        y[fit, :n] = torch.tensor(generator.integers(2, size=(n, 2)))
        values[fit, :n] = torch.tensor(generator.normal(size=(n, 2)))
        there[fit, :n] = True
    together = fit_logistic(x, y, there, classes=2, penalty=1.0), fit_ridge(x, values, there, penalty=1.0)
    for fit, n in enumerate(lengths):
        one = slice(fit, fit + 1), slice(n)
        alone = (
            fit_logistic(x[one], y[one], there[one], classes=2, penalty=1.0),
            fit_ridge(x[one], values[one], there[one], penalty=1.0),
        )
        for many, single, tolerance in zip(together, alone, (2e-3, 1e-9), strict=True):
            torch.testing.assert_close(many(x)[one], single(x[one]), atol=tolerance, rtol=0)


def test_features_that_do_not_vary_are_left_out():
    x = torch.tensor(correlated(50, 4, seed=0))[None]
    y = torch.tensor(np.random.default_rng(0).integers(2, size=(1, 50, 1)))
    there = torch.ones(1, 50, dtype=torch.bool)
    noise = 1e-8 * torch.randn(1, 50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([x, 5 + noise, torch.zeros(1, 50, 1, dtype=torch.float64)], 2)
    narrow, found = (fit_logistic(f, y, there, classes=2, penalty=1.0) for f in (x, wide))
    assert (found.weight[0, 4:] == 0).all()
    torch.testing.assert_close(found(wide), narrow(x), atol=1e-9, rtol=0)


def test_fits_that_are_stopped_are_said(monkeypatch):
    from finetune_lens.linalg import probes

    monkeypatch.setattr(probes, "STEPS", 2)
    x = torch.tensor(correlated(50, 4, seed=0))[None]
    y = torch.tensor(np.random.default_rng(0).integers(2, size=(1, 50, 1)))
    assert not fit_logistic(x, y, torch.ones(1, 50, dtype=torch.bool), classes=2, penalty=1.0).converged.any()


# The analysis


CASES = {
    "binary": ({"label": lambda w: w[-1] < "n"}, {}, lambda x: x[-1]),
    "classes": ({"label": lambda w: "abc"[ALPHABET.index(w[0]) % 3]}, {"position": 0}, lambda x: x[0]),
    "values": (
        {"label": lambda w: ALPHABET.index(w[-1]) + ALPHABET.index(w[0]) / 4.0, "start": lambda w: w[: 1 + (w > "i")]},
        {"position": "mean:3", "group": "start"},  # test parts of different size
        lambda x: x[-3:].mean(0),
    ),
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_scores_are_scikit_learns(library, family, case):
    """Every depth, side and split, own probes and transfer, on features taken one prompt at a time."""
    fields, options, read = CASES[case]
    items = rows(90, **fields)
    base = library.model(family)
    tuned = tuned_copy(base)
    found = probe(base, tuned, items, seeds=2, control=False, **options).data
    classes = found.attrs["classes"]
    y = np.array([item["label"] for item in items])
    assert found.sizes["depth"] == 3
    sites = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    every = {side: features(model, items, sites, read) for side, model in (("base", base), ("tuned", tuned))}
    for depth in range(3):
        x = {side: values[depth] for side, values in every.items()}
        for seed in range(2):
            held_out = found["weight"].values[seed] > 0
            for one in x:
                oracle = sklearn_probe(classes).fit(x[one][~held_out], y[~held_out])
                for other in x:
                    moved = x[other] + (x[one][~held_out].mean(0) - x[other][~held_out].mean(0))
                    for name, rows_of in (("score", x[other]), ("centred_score", moved)):
                        if name == "score":
                            values = found[name].sel(trained_on=one, tested_on=other, depth=depth, seed=seed)
                        elif one == other:
                            continue
                        else:
                            values = found[name].sel(side=other, depth=depth, seed=seed)
                        said = oracle.predict(rows_of[held_out])
                        values = values.values[held_out].astype(float)
                        if classes:
                            assert values.mean() == pytest.approx((said == y[held_out]).mean(), abs=1e-3)
                        else:
                            mine = values.sum() / found["weight"].values[seed, held_out].sum()
                            assert mine == pytest.approx(r2_score(y[held_out], said), abs=1e-3)


def plant(model, layer, direction, label):
    """A block that writes the label of the text into the residual stream, at all positions: a function of all its
    tokens that no line through their embeddings tells."""
    seen = {}
    model.get_input_embeddings().register_forward_pre_hook(lambda m, args: seen.update(ids=args[0]))
    block = (model.model.layers if hasattr(model, "model") else model.transformer.h)[layer]

    def write(module, args, output):
        wanted = torch.tensor([label(row) for row in seen["ids"].tolist()]).float()[:, None, None]
        new = (output[0] if isinstance(output, tuple) else output) + 8 * wanted * direction
        return (new, *output[1:]) if isinstance(output, tuple) else new

    block.register_forward_hook(write)
    return model


def odd(ids):
    """Whether the tokens (without padding) add up to an odd number."""
    return sum(ids) % 2


@pytest.mark.parametrize("family", ["gemma2-sliding", "qwen2-sliding"])
def test_a_planted_feature_is_found_at_its_layer_and_not_before(library, family):
    """The base writes the label in block 1, the tuned model in block 2, along one direction: there the codes agree."""
    table = letters().get_vocab()
    items = rows(160, label=lambda w: bool(odd([table[c] for c in f"{w}="])))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3)).sign()
    base = plant(library.fresh(family), 1, direction, odd)
    tuned = plant(library.fresh(family), 2, direction, odd)
    found = probe(base, tuned, items, seeds=3)
    frame = found.to_frame().set_index(["side", "depth"])
    assert (found.first_clear("base"), found.first_clear("tuned")) == ({"depth": 2}, {"depth": 3})
    for side, at in (("base", 2), ("tuned", 3)):
        assert (frame.loc[side].loc[: at - 1, "score"] < 0.65).all()
        assert (frame.loc[side].loc[: at - 1, "gain_low"] < 0.05).all()
        assert frame.loc[side].loc[at, "score"] > 0.97
        assert frame.loc[side].loc[at, "selectivity_low"] > 0.3
    assert frame.loc["base"].loc[3, "transfer"] > 0.9  # the tuned model's probe reads the base there
    difference = found.differences().set_index("depth").loc[2]
    assert difference["high"] < -0.2
    assert difference["p"] <= 0.05
    assert found.best("base")["depth"] >= 2
    assert "base   depth" in found.summary()


def test_a_control_task_scores_at_chance(library):
    """A random label for each text cannot be told of texts not seen: the majority's accuracy lies in its interval."""
    found = probe(library.model("gpt2"), tuned_copy(library.model("gpt2")), rows(240), seeds=10)
    frame = found.to_frame()
    assert found.data.attrs["control"] == "text"
    assert "a random label for each text, none of the test in training" in found.summary()
    assert (frame["control_low"] < 0.52).all()
    assert (frame["control_high"] > 0.48).all()
    assert frame["control"].mean() == pytest.approx(0.5, abs=0.05)


def test_a_control_task_of_tokens_is_learnt_by_heart(library):
    """Types that occur in training have their label there: the embedding tells the token, so selectivity is gone."""
    items = rows(240, label=lambda w: w[0] < "n")
    found = probe(library.model("gpt2"), library.model("gpt2"), items, position=0, seeds=3)
    assert found.data.attrs["control"] == "token at the position"
    row = found.to_frame().query("side == 'base' and depth == 0").iloc[0]
    assert (found.data["control_seen"] == 1).all()
    assert "none of the test in training" not in found.summary()
    assert row["control"] > 0.8
    assert row["selectivity_low"] < 0.15
    assert row["leaked_rows"] > 0.9


def test_one_model_twice(library):
    """No difference, transfer is the own score, centring moves nothing; all to the last example."""
    base = library.model("llama")
    found = probe(base, copy.deepcopy(base), rows(), seeds=2)
    assert (found.differences()[["difference", "low", "high"]] == 0).all(axis=None)
    frame = found.to_frame()
    for name in ("transfer", "centred"):
        np.testing.assert_array_equal(frame[name], frame["score"])
    assert (frame["centred_change_low"] == 0).all()


def test_heads(library):
    """The z of each head by itself; by layer all heads side by side."""
    items, base = rows(60), library.model("llama")
    apart = probe(base, tuned_copy(base), items, site="z", by="layer,head", seeds=1, control=False)
    together = probe(base, tuned_copy(base), items, site="z", seeds=1, control=False)
    assert dict(apart.data.sizes) | {"layer": 2, "head": 4, "seed": 1} == dict(apart.data.sizes)
    held_out = apart.data["weight"].values[0] > 0
    y = np.array([item["label"] for item in items])
    (z,) = features(base, items, ["blocks.1.attn.hook_z"])
    for head in range(4):
        x = z.reshape(60, 4, -1)[:, head]
        expected = sklearn_probe(2).fit(x[~held_out], y[~held_out]).score(x[held_out], y[held_out])
        mine = apart.data["score"].sel(trained_on="base", tested_on="base", layer=1, head=head, seed=0).values[held_out]
        assert mine.mean() == pytest.approx(expected, abs=1e-3)
    expected = sklearn_probe(2).fit(z[~held_out], y[~held_out]).score(z[held_out], y[held_out])
    row = together.to_frame().query("side == 'base' and layer == 1").iloc[0]
    assert row["score"] == pytest.approx(expected, abs=1e-3)
    frame = apart.to_frame()
    assert len(frame) == 2 * 2 * 4
    by_hand = apart.data["score"].sel(trained_on="tuned", tested_on="tuned", layer=0, head=3, seed=0).values[held_out]
    chosen = frame.query("side == 'tuned' and layer == 0 and head == 3").iloc[0]
    assert chosen["score"] == pytest.approx(by_hand.mean())


def test_numbers_against_loops(library):
    """Scores, gains and differences of the table from the examples one by one; groups of two texts counted together."""
    items = rows(80, pair=lambda w: ALPHABET.index(w[0]) // 2)
    found = probe(library.model("gpt2"), tuned_copy(library.model("gpt2")), items, seeds=3, group="pair")
    data, frame = found.data, found.to_frame().set_index(["side", "depth"])
    for side in ("base", "tuned"):
        for depth in range(3):
            right = control = majority = count = moved = centred = 0
            other = {"base": "tuned", "tuned": "base"}[side]
            for seed in range(3):
                train = [e for e in range(80) if data["weight"].values[seed, e] == 0]
                labels = [items[e]["label"] for e in train]
                common = max((False, True), key=labels.count)
                for e in range(80):
                    if e in train:
                        continue
                    count += 1
                    where = {"depth": depth, "seed": seed, "example": str(e + 1)}
                    right += int(data["score"].sel(trained_on=side, tested_on=side, **where))
                    moved += int(data["score"].sel(trained_on=other, tested_on=side, **where))
                    centred += int(data["centred_score"].sel(side=side, **where))
                    control += int(data["control_score"].sel(side=side, **where))
                    if labels.count(True) != labels.count(False):
                        majority += items[e]["label"] == common
                    else:
                        majority += not items[e]["label"]
            row = frame.loc[(side, depth)]
            assert row["score"] == pytest.approx(right / count)
            assert row["gain"] == pytest.approx((right - majority) / count)
            assert row["selectivity"] == pytest.approx((right - control) / count)
            assert row["transfer"] == pytest.approx(moved / count)
            assert row["centred"] == pytest.approx(centred / count)
            assert row["centred_change"] == pytest.approx((centred - right) / count)
            assert row["score_low"] <= row["score"] <= row["score_high"]
            best = found.best(side)
            if best["depth"] == depth:
                assert best["score_low"] <= row["score_low"]
                assert best["score_high"] >= row["score_high"]
    both = frame["score"].unstack("side")
    np.testing.assert_allclose(found.differences()["difference"], both["tuned"] - both["base"], atol=1e-12)


def made(right, *, majority=0.0, group=None):
    """A result of both sides alike, one split, everything tested: right (depth, example)."""
    import xarray as xr

    depths, examples = right.shape
    score = np.tile(right[:, None].astype(np.int8), (2, 2, 1, 1, 1))
    data = {
        "score": (("trained_on", "tested_on", "depth", "seed", "example"), score),
        "centred_score": (("side", "depth", "seed", "example"), score[0]),
        "weight": (("seed", "example"), np.ones((1, examples))),
        "majority_score": (("seed", "example"), np.broadcast_to(majority, (1, examples))),
        "converged": (("side", "depth", "target", "seed"), np.ones((2, depths, 1, 1), bool)),
        "leaked_rows": (("side", "depth", "seed"), np.zeros((2, depths, 1))),
        "group": ("example", np.arange(examples) if group is None else group),
    }
    sides = {name: ["base", "tuned"] for name in ("trained_on", "tested_on", "side")}
    return Probing(xr.Dataset(data, coords=sides | {"depth": np.arange(depths)}))


def test_intervals_cover_what_they_should():
    """Scores drawn with a known rate in groups of four equal ones: intervals over groups cover it, those over examples
    would not."""
    generator, covered = np.random.default_rng(0), []
    for _ in range(60):
        right = np.repeat(generator.random(40) < 0.7, 4)
        row = made(right[None], group=np.repeat(np.arange(40), 4)).to_frame().iloc[0]
        covered.append(row["score_low"] <= 0.7 <= row["score_high"])
    assert 0.85 <= np.mean(covered) <= 0.99


def test_the_first_clear_depth():
    """A little above the majority is not clear of it, and below it is not above; p-values count every depth."""
    at = np.arange(200)
    majority = (at < 100).astype(float)
    right = np.stack([at < 40, (at < 100) | (at > 197), (at < 100) | (at > 180), at >= 0])
    found = made(right, majority=majority)
    assert found.first_clear("tuned") == {"depth": 2}
    p = found.to_frame().query("side == 'base'")["p"].to_numpy()
    assert p[1] > 0.05 >= p[0]
    assert made(right[:2], majority=majority).first_clear("base") is None


def test_few_groups_are_no_evidence():
    """Six groups all above the majority: no p below an exact sign test's 2⁻⁵, however many prompts they hold."""
    found = made(np.ones((1, 120)), group=np.repeat(np.arange(6), 20))
    assert found.to_frame()["p"].tolist() == [2**-5] * 2
    assert "6 tested groups are few" in describing(found).summary()
    assert "95 % intervals over 6 groups of prompts" in found.summary()


def test_one_group_that_was_tested_has_no_interval():
    """However often groups are drawn anew, the score is the one group's: that is no certainty."""
    tested = np.repeat([1.0, 0, 0, 0], 20)
    found = made(np.arange(80)[None] % 2 == 0, group=np.repeat(np.arange(4), 20))
    found = Probing(found.data.assign(weight=(("seed", "example"), tested[None])))
    frame = found.to_frame()
    assert (frame["score"] == 0.5).all()
    assert frame[["score_low", "score_high", "gain_low", "gain_high", "p"]].isna().all(axis=None)
    assert found.first_clear("base") is None
    assert "one group was tested: there are no intervals" in describing(found).summary()


def describing(found):
    """What `probe` adds to a result that was made by hand."""
    found.data.attrs |= {"label": "y", "classes": 2, "site": "resid_post", "position": "last", "measure": "accuracy"}
    found.data["leaked_texts"] = ("seed", [0.0])
    return found


def test_the_mean_of_values(library):
    items = rows(40, label=lambda w: ALPHABET.index(w[0]) / 2)
    found = probe(library.model("gpt2"), library.model("gpt2"), items, seeds=2, control=False)
    y, left, spread = np.array([item["label"] for item in items]), 0, 0
    for weight in found.data["weight"].values:
        held_out = weight > 0
        left += ((y[held_out] - y[~held_out].mean()) ** 2).sum()
        spread += ((y[held_out] - y[held_out].mean()) ** 2).sum()
    assert found.majority()[0] == pytest.approx(1 - left / spread)
    assert "mean: R²" in found.summary()


# Labels, splits, controls


def prompts(labels, texts=None, **fields):
    texts = texts or words(len(labels))
    made = [{"prompt": t, "label": y} for t, y in zip(texts, labels, strict=True)]
    return read_prompts([row | {k: v[n] for k, v in fields.items()} for n, row in enumerate(made)])


def test_kinds_of_labels():
    assert read_labels(prompts(["x", "y"] * 5), "label").names == ("x", "y")
    assert read_labels(prompts([True, False] * 5), "label").names == ("False", "True")
    whole = read_labels(prompts([10, 9, 2] * 4), "label")
    assert whole.names == ("2", "9", "10")
    assert whole.values[:3].tolist() == [2, 1, 0]
    values = read_labels(prompts([1, 2.5] * 5), "label")
    assert (values.names, values.values[:2].tolist()) == ((), [1, 2.5])
    assert read_labels(prompts([1, 2] * 5), "label", kind="regression").names == ()
    assert read_labels(prompts([1.0, 2.5] * 5), "label", kind="classes").names == ("1.0", "2.5")
    assert read_labels(prompts(["x", "y"] * 5), "label", given=np.arange(10) % 3).names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["x"] * 12, {}, "every prompt has the label 'x'"),
        (["x", 1] * 6, {}, r"text \('x', prompt 1\) and a whole number \(1, prompt 2\)"),
        ([True, 1] * 6, {}, "true or false .* and a whole number"),
        (["x", None] * 6, {}, r"6 of 12 prompts have no `label` \(first: 2\)"),
        (["x", ["y"]] * 6, {}, r"prompt 2: the label is text.*\['y'\]"),
        ([1.0, float("nan")] * 6, {}, "prompt 2: the label is text.*nan"),
        (["x", "y"] * 4, {}, "10 prompts or more; found 8"),
        (["x", "y"] * 6, {"kind": "regression"}, "needs numbers"),
        (["x", "y"] * 6, {"kind": "ordinal"}, "kind is one of"),
    ],
)
def test_labels_that_are_refused(labels, options, message):
    with pytest.raises(InputError, match=message):
        read_labels(prompts(labels), "label", **options)


def divide(items, **options):
    return split(items, read_labels(items, "label"), **{"group": None, "test": 0.3, "seeds": 20, "seed": 0} | options)


def test_splits_divide_no_group_and_every_class():
    generator = np.random.default_rng(0)
    labels = generator.choice(["x", "y", "z"], 100, p=[0.7, 0.25, 0.05]).tolist()
    texts = [f"{w}" for w in words(50)] * 2  # each twice, often with two labels
    subject = [t[0] for t in texts]
    both = [label for label in "xy" for _ in range(10)]  # every group holds both classes
    mixed = divide(prompts(both, f=list("abcdefghij") * 2), group="f")
    assert all({both[e] for e in np.flatnonzero(~train)} == {"x", "y"} for train in mixed.train)
    assert (~mixed.train).sum(1).tolist() == [6] * 20
    # y stands beside z in one group and beside w in another, which are drawn apart from each other
    tied = divide(prompts([*"zyyzwyyw", *"x" * 10], f=[*"11132224", *"abcdefghij"]), group="f", test=0.5)
    assert all(tied.train[:, 1] != tied.train[:, 5])
    rare = [c for c in "abcdefgh" for _ in range(2)]  # each in two groups, beside a common one: one of them is tested
    crowded = divide(prompts([*rare, *"x" * 46], f=[*map(str, range(16)), *map(str, range(46))]), group="f")
    assert (crowded.train[:, 0:16:2] != crowded.train[:, 1:16:2]).all()
    for test in (0.01, 0.99):
        few = divide(prompts(["x"] * 10 + ["y"] * 2), test=test)
        assert (few.train[:, 10] != few.train[:, 11]).all()
    for options, keys in (({}, texts), ({"group": "subject"}, subject)):
        parts = divide(prompts(labels, texts, subject=subject), **options)
        assert len({tuple(row) for row in parts.train}) == 20  # every seed its own
        for train in parts.train:
            for key in set(keys):
                assert len({bool(t) for t, k in zip(train, keys, strict=True) if k == key}) == 1, key
            assert (
                {labels[e] for e in np.flatnonzero(train)} == {labels[e] for e in np.flatnonzero(~train)} == set("xyz")
            )
        assert (~parts.train).mean() == pytest.approx(0.3, abs=0.08)
        for one in range(100):
            assert ((parts.group == parts.group[one]) >= (np.array(keys) == keys[one])).all()
    again = divide(prompts(labels, texts, subject=subject))
    np.testing.assert_array_equal(again.train, divide(prompts(labels, texts, subject=subject)).train)
    assert (again.train != divide(prompts(labels, texts, subject=subject), seed=1).train).any()


def test_texts_and_fields_join_groups():
    """a–b by their text, b–c by their field: all three stay together."""
    texts = ["same", "same", "other", *words(20)]
    field = ["1", "2", "2", *(f"f{n}" for n in range(20))]
    group = divide(prompts(["x", "y"] * 11 + ["x"], texts, f=field), group="f").group
    assert group[0] == group[1] == group[2]
    assert len(set(group)) == 21


def test_a_split_of_their_own_is_respected(library):
    said = ["train", "test", "train", "train"] * 30
    items = [row | {"split": part} for row, part in zip(rows(120), said, strict=True)]
    items[1]["prompt"] = items[0]["prompt"]  # leaks
    found = probe(library.model("gpt2"), library.model("gpt2"), items, seeds=2)
    np.testing.assert_array_equal(found.data["weight"].values[1] > 0, np.array(said) == "test")
    assert found.data["leaked_texts"].values == pytest.approx([1 / 30] * 2)
    last = found.data["leaked_rows"].sel(side="base", depth=2).values
    assert last == pytest.approx([1 / 30] * 2)
    assert found.data["leaked_rows"].sel(side="base", depth=0).values == pytest.approx([1, 1])  # "=" alone
    assert "occur in training: 3% of the test texts" in found.summary()
    assert "`split` divides them" in found.summary()
    labels = read_labels(prompts(["x", "y"] * 6), "label")
    for part, message in ((["train", "dev"], "prompt 2: `split` is train or test; found 'dev'"),
                          (["train", "test"], "the training part holds no example of the class 'y'"),
                          (["train", None], "prompt 2: `split` is train or test; found None"),
                          ([["train"], "test"], r"prompt 1: `split` is train or test; found \['train'\]")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            split(prompts(["x", "y"] * 6, split=part * 6), labels, group=None, test=0.3, seeds=1, seed=0)


def test_splits_that_are_refused():
    with pytest.raises(InputError, match="2 or more different texts of the class 'y', found 1"):
        divide(prompts(["x"] * 11 + ["y"]))
    with pytest.raises(InputError, match="2 or more groups of one 'f' of the class 'x', found 1"):
        divide(prompts(["x", "y"] * 6, f=list("ab") * 6), group="f")
    with pytest.raises(InputError, match="prompt 1 has no field 'f'"):
        divide(prompts(["x", "y"] * 6), group="f")
    with pytest.raises(InputError, match="between 0 and 1; found 1"):
        divide(prompts(["x", "y"] * 6), test=1)
    with pytest.raises(InputError, match="fewer than two different labels"):
        divide(prompts([1.5] * 10 + [2.5], words(5) * 2 + ["abc"]), test=0.01)


def test_types_and_labels_of_control_tasks():
    items = prompts(["x", "y", "y", "y"] * 50, words(200), f=list("abcde") * 40)
    texts = encode(items, letters(), need_answer=False)
    labels = read_labels(items, "label")
    first, last = (columns_at(at, items, texts, letters()) for at in (0, "last"))
    types, what = types_of(items, texts, first, None)
    assert (what, len(set(types))) == ("token at the position", 26)
    assert [items[0].prompt[0] == p.prompt[0] for p in items] == (types == types[0]).tolist()
    few = prompts(["x", "y"] * 6, [w + c for w, c in zip(words(12), "ab" * 6, strict=True)])
    assert types_of(few, encode(few, letters(), need_answer=False), columns_at("last", few, encode(
        few, letters(), need_answer=False), letters()), None)[1] == "text"  # fmt: skip
    assert types_of(items, texts, columns_at("mean", items, texts, letters()), None)[1] == "text"
    by_field, what = types_of(items, texts, last, "f")
    assert (what, len(set(by_field))) == ("value of 'f'", 5)
    drawn = controls(labels, np.arange(200), seeds=30, seed=0)
    assert drawn.mean() == pytest.approx(0.75, abs=0.03)  # the frequencies of the real labels
    assert (drawn[0] != drawn[1]).any()
    drawn = controls(labels, types, seeds=3, seed=0)
    for seed in range(3):
        for kind in range(26):
            assert len(set(drawn[seed, types == kind])) == 1


def test_positions():
    items = prompts(["x"] * 3, ["abcab", "xy", "pqr"], s=["ab", "xy", "q"])
    for padding in ("left", "right"):
        texts = encode(items, letters(), need_answer=False, padding=padding)

        def read(position, texts=texts):
            columns = columns_at(position, items, texts, letters())
            return ["".join(letters().decode([i]) for i in texts.ids[r][columns[r]]) for r in range(3)]

        assert read("last") == read(-1) == read("-1") == ["b", "y", "r"]
        assert read(1) == ["b", "y", "q"]
        assert read("mean") == ["abcab", "xy", "pqr"]
        assert read("mean:2") == ["ab", "xy", "qr"]
        assert read("s:first") == ["b", "y", "q"]
        assert read("s:last-1") == ["a", "x", "p"]
        for position, message in ((2, "prompt 2: position 2 does not exist, it has 2 tokens"),
                                  ("mean:3", "prompt 2: position mean:3 does not exist"),
                                  ("s:1", "prompt 2: position 's:1' does not exist"),
                                  ("t:first", "expected a field 't'"), ("@", "is no position")):  # fmt: skip
            with pytest.raises(InputError, match=message):
                read(position)


# Bad input, interruption, files


def test_refuses(library):
    import transformers

    base, items = library.model("gpt2"), rows(12)
    for options, message in (
        ({"site": "resid"}, "unknown"), ({"site": "pattern"}, "cannot be probed"), ({"by": "head"}, "by is one of"),
        ({"by": "layer,head"}, "heads are told apart at z, q, k, v, result"), ({"seeds": 0}, "at least 1"),
        ({"penalty": 0}, "above 0"), ({"penalty": float("nan")}, "above 0"), ({"batch_size": 0}, "at least 1"),
        ({"label": "answer"}, "no `answer`"), ({"position": 6}, "position 6 does not exist"),
        ({"labels": [1, 2, 3]}, "a label for each of the 12 prompts; found 3"), ({"group": "g"}, "no field 'g'"),
        ({"control_field": "g"}, "no field 'g'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            probe(base, base, items, **options)
    config = copy.deepcopy(library.configs["gpt2"]())
    config.n_layer = 3
    with pytest.raises(InputError, match=r"2 layers and .* 3.* depth by depth"):
        probe(base, transformers.AutoModelForCausalLM.from_config(config).eval(), items)
    with pytest.raises(GateFailed):
        probe(base, base, items, check=True)
    broken = library.fresh("gpt2")
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_proj.bias[0] = torch.nan
    with pytest.raises(InputError, match=r"tuned model's activations at .* hold NaN"):
        probe(base, broken, items)
    pair = fl.ModelPair.load(base, tuned_copy(base), tokenizer=letters())
    pair.models()[1].tokenizer = letters()
    pair.models()[1].tokenizer.add_tokens([items[3]["prompt"][:2]])
    with pytest.raises(InputError, match=r"read prompt \d+ as different tokens"):
        fl.probe(pair, items, progress=False, check=False)


def test_labels_beside_the_prompts(library):
    items = rows(40)
    bare = [item["prompt"] for item in items]
    given = np.array([item["label"] for item in items])
    base, tuned = library.model("gpt2"), tuned_copy(library.model("gpt2"))
    one = probe(base, tuned, items, seeds=1, limit=30)
    other = probe(base, tuned, bare, labels=given, seeds=1, limit=30)
    np.testing.assert_array_equal(one.data["score"].values, other.data["score"].values)
    assert one.data.sizes["example"] == 30


def test_memory_runs_out(library, monkeypatch):
    base, tuned, items = library.model("gpt2"), tuned_copy(library.model("gpt2")), rows(60)
    whole, real, sizes = probe(base, tuned, items, seeds=2), fits._fit, []

    def small(sides, units, task, device, jobs, found):
        sizes.append(len(jobs))
        if len(jobs) > 2:
            raise torch.OutOfMemoryError
        return real(sides, units, task, device, jobs, found)

    monkeypatch.setattr(fits, "_fit", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = probe(base, tuned, items, seeds=2)
    assert sizes[:4] == [6, 3, 1, 1]
    np.testing.assert_array_equal(found.data["score"].values, whole.data["score"].values)


def test_saved_and_loaded(library, tmp_path):
    base, tuned = library.model("gpt2"), tuned_copy(library.model("gpt2"))
    for options in ({}, {"site": "z", "by": "layer,head", "control": False}, {"label": "n", "kind": "regression"}):
        found = probe(base, tuned, rows(40, n=len), seeds=2, **options) if "label" not in options else probe(
            base, tuned, rows(40, n=lambda w: ALPHABET.index(w[0])), seeds=2, **options
        )  # fmt: skip
        again = fl.load(found.save(tmp_path / "probing.nc"))
        assert isinstance(again, Probing)
        assert again.summary() == found.summary()
        assert again.to_frame().equals(found.to_frame())
        assert json.loads(json.dumps(found.headline(), allow_nan=False)) == json.loads(json.dumps(again.headline()))
        assert again.has_control == ("control" not in options)
        json.dumps(found.provenance)


def test_one_split_has_no_spread(library):
    found = probe(library.model("gpt2"), library.model("gpt2"), rows(40), seeds=1)
    assert np.isnan(found.to_frame()["spread"]).all()
    json.dumps(found.headline(), allow_nan=False)


def test_figures_show_what_the_result_says(library):
    base, tuned = library.model("gpt2"), tuned_copy(library.model("gpt2"))
    found = probe(base, tuned, rows(60), seeds=2)
    frame = found.to_frame()
    ax = figures_of(found)["layers"]().axes[0]
    drawn = [line.get_ydata() for line in ax.lines]
    for name in ("score", "transfer", "centred", "control"):
        for side in ("base", "tuned"):
            expected = frame.loc[frame["side"] == side, name].to_numpy()
            assert any(len(y) == 3 and np.allclose(y, expected) for y in drawn), (name, side)
    assert any(np.allclose(y, found.majority()[0]) for y in drawn)
    assert len(ax.figure.legends[0].get_texts()) == 9
    values = probe(base, tuned, rows(60, label=lambda w: ALPHABET.index(w[0]) / 2), seeds=1, control=False)
    ax = figures_of(values)["layers"]().axes[0]
    assert ax.get_ylabel().startswith("R²")
    assert ax.get_ylim()[0] >= -1.1
    heads = probe(base, tuned, rows(60), seeds=1, site="z", by="layer,head")
    axes = figures_of(heads)["heads"]().axes
    for ax, side in zip(axes, ("base", "tuned"), strict=False):
        frame = heads.to_frame()
        mine = frame[frame["side"] == side].pivot(index="layer", columns="head", values="score")
        np.testing.assert_allclose(np.asarray(ax.collections[0].get_array()).reshape(2, 4), mine)
    with pytest.raises(InputError, match="probe_heads"):
        fl.plots.probe_layers(heads)
    with pytest.raises(InputError, match="probe_layers"):
        fl.plots.probe_heads(found)
    plt.close("all")


def test_an_interrupted_probing_continues(library, tmp_path):
    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    pair = fl.ModelPair.load(library.saved("llama"), tmp_path / "tuned", tokenizer=letters())
    whole = fl.probe(pair, rows(40), seeds=1, progress=False, check=False)
    calls = []

    def before(module, args, kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == stop:
            raise KeyboardInterrupt

    for model in pair.models():
        assert model.layers == 2
        model.module.register_forward_pre_hook(before, with_kwargs=True)
    stop = 6
    options = {"seeds": 1, "progress": False, "check": False, "batch_size": 10, "partial": tmp_path / "chunks"}
    with pytest.raises(KeyboardInterrupt):
        fl.probe(pair, rows(40), **options)
    calls.clear()
    stop = -1
    found = fl.probe(pair, rows(40), **options)
    assert len(calls) == 3
    np.testing.assert_array_equal(found.data["score"].values, whole.data["score"].values)


def test_the_command(library, tmp_path):
    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    letters().save_pretrained(tmp_path / "letters")
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows(40))))
    pair = [library.saved("llama"), tmp_path / "tuned"]
    words = [*pair, "labelled.jsonl", "--tokenizer", "letters", "--unsafe", "--seeds", "1"]
    done = command("finetune_lens.probing", *words, "--json", "--quiet", "--site", "resid_post", "--position", "last",
                   cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    headline = json.loads(done.stdout)["headline"]
    assert (headline["examples"], headline["measure"]) == (40, "accuracy")
    assert sorted(p.name for p in (tmp_path / "runs/probing").iterdir()) == [
        "figures", "probing.csv", "probing.nc", "run.json",
    ]  # fmt: skip
    done = command("finetune_lens.probing", *words, "--no-plots", cwd=tmp_path)
    assert done.returncode == 2
    assert "--force" in done.stderr
    done = command("finetune_lens.probing", *words, "--label", "missing", "--out", "o", cwd=tmp_path)
    assert done.returncode == 2
    assert "40 of 40 prompts have no `missing`" in done.stderr
    assert not (tmp_path / "o").exists()
