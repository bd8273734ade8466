"""Directions against loops; planted ones are found; what interventions do is what hooks by hand do."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from test_check import command, tuned_copy
from test_patching import letters

import finetune_lens as fl
from finetune_lens import plots
from finetune_lens.directions import __main__ as module
from finetune_lens.directions import contrast, interventions
from finetune_lens.errors import GateFailed, InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked.steering import ablation, addition, scores
from finetune_lens.prompts import encode, read_prompts
from finetune_lens.results.directions import Directions, _specific, separation

WORDS = ["abz", "gkzl", "ttza", "mn", "uvwxy", "qwert", "ddop", "sfgh", "jkl", "pooi", "cvb", "zzxc"]


def prompts(words=WORDS, *, answers=True):
    """Two classes: a word after `p` or after `n`; the last token is the same."""
    rows = []
    for at, word in enumerate(w for w in words for _ in range(2)):
        row = {"prompt": f"{'np'[at % 2]}{word}=", "label": "np"[at % 2]}
        rows.append(row | ({"answer": word[0], "wrong": word[-1]} if answers and word[0] != word[-1] else {}))
    return rows


def find(base, tuned, items=None, *, tokenizer=None, **options):
    pair = fl.ModelPair.load(base, tuned, tokenizer=tokenizer or letters())
    options = {"check": False, "progress": False} | options
    return fl.find_directions(pair, prompts() if items is None else items, **options)


def last(model, items):
    """By depth but the last (example, d_model): the residual stream at the last token, float64."""
    found = []
    for item in items:
        with torch.no_grad():
            out = model(torch.tensor([letters()(item["prompt"])["input_ids"]]), output_hidden_states=True)
        found.append([h[0, -1].double().numpy() for h in out.hidden_states[:-1]])
    return [np.stack(depth) for depth in zip(*found, strict=True)]


def d_prime(x, positive):
    one, other = x[positive], x[~positive]
    return (one.mean() - other.mean()) / np.sqrt((one.var() + other.var()) / 2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_against_loops(library, family):
    base = library.model(family)
    tuned = tuned_copy(base)
    result = find(base, tuned)
    data, frame = result.data, result.to_frame().set_index("depth")
    positive, held = data["positive"].values, data["held_out"].values
    assert positive.tolist() == [item["label"] == "p" for item in prompts()]
    assert held.sum() == 12
    assert positive[held].sum() == 6
    depth = 1
    xs = [last(model, prompts())[depth] for model in (base, tuned)]
    r = [x[positive & ~held].mean(0) - x[~positive & ~held].mean(0) for x in xs]
    np.testing.assert_allclose(data["direction"].sel(depth=depth).transpose("side", "feature"), r, atol=1e-5)
    cosine = r[0] @ r[1] / np.linalg.norm(r[0]) / np.linalg.norm(r[1])
    assert float(data["cosine"].sel(depth=depth)) == pytest.approx(cosine, abs=1e-5)
    row = frame.loc[depth]
    for side, x, own, other in (("base", xs[0], *r), ("tuned", xs[1], *r[::-1])):
        for source, vector in (("own", own), ("other", other)):
            along = x[held] @ vector / np.linalg.norm(vector)
            kept = data["projection"].sel(side=side, source=source, depth=depth).values
            np.testing.assert_allclose(kept[held], along, atol=1e-4)
            assert np.isnan(kept[~held]).all()
            expected = d_prime(along, positive[held])
            assert row[f"{side}_{source}"] == pytest.approx(expected, abs=1e-3)
            assert row[f"{side}_{source}_low"] <= expected <= row[f"{side}_{source}_high"]
    assert row["difference"] == pytest.approx(row["tuned_own"] - row["base_own"])
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert row["cosine_low"] <= row["cosine_high"] <= 1


def test_the_bootstrap_of_d_prime_against_a_loop(library):
    base = library.model("llama")
    result = find(base, tuned_copy(base))
    held = result.data["held_out"].values
    x = result.data["projection"].sel(side="base", source="own", depth=2).values[held]
    positive = result.data["positive"].values[held]
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(4000):
        at = rng.integers(len(x), size=len(x))
        if 0 < positive[at].sum() < len(at):
            drawn.append(d_prime(x[at], positive[at]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    row = result.to_frame().set_index("depth").loc[2]
    assert row["base_own_low"] == pytest.approx(low, rel=0.1)
    assert row["base_own_high"] == pytest.approx(high, rel=0.1)


def test_separation():
    rng = np.random.default_rng(0)
    values, positive = rng.normal(size=(3, 20)), rng.random(20) < 0.5
    there = rng.random((3, 20)) < 0.7
    np.testing.assert_allclose(separation(values, positive), [d_prime(v, positive) for v in values])
    np.testing.assert_allclose(
        separation(values, positive, there), [d_prime(v[t], positive[t]) for v, t in zip(values, there, strict=True)]
    )
    assert np.isnan(separation(np.ones(20), positive))


def test_resamples_halves_and_contrasts():
    positive = np.array([True] * 5 + [False] * 8)
    weights = np.concatenate(list(contrast._resampled(positive, 0)))
    assert weights.shape == (10_000, 13)
    np.testing.assert_allclose(weights[:, positive].sum(1), 1)
    np.testing.assert_allclose(weights[:, ~positive].sum(1), -1)
    np.testing.assert_allclose(weights.mean(0), np.where(positive, 1 / 5, -1 / 8), atol=5e-3)
    np.testing.assert_allclose(weights[:, 0].var(), (1 / 5) * (4 / 5) / 5, rtol=0.1)  # of a share of 5 draws
    half = contrast._halves(positive, [0], 40)
    assert (half[:, positive].sum(1) == 2).all()
    assert (half[:, ~positive].sum(1) == 4).all()
    assert len(np.unique(half, axis=0)) > 20


def test_random_contrasts_do_not_see_the_classes():
    """Classes far apart in one coordinate: it cancels in every random contrast, whatever the others do."""
    rng = np.random.default_rng(0)
    positive = np.arange(31) % 2 == 0
    train = np.ones(31, bool)
    train[20:] = False
    x = rng.normal(size=(31, 6))
    x[:, 0] = np.where(positive, 1e3, -1e3)
    found = contrast.at_depth([x, x + 0.1 * rng.normal(size=x.shape)], positive, train, 0)
    assert np.abs(found["separation_null"][0]).max() < 5 < found["cross_fitted"].min()
    assert found["cosine_null"].shape == (contrast.NULL,)
    assert found["cosine_null"].min() > 0.9  # the same contrast of nearly the same texts
    other = contrast.at_depth([x, rng.normal(size=x.shape)], positive, train, 0)
    assert abs(other["cosine_null"].mean()) < 0.2


def planted(library, *, into, strength=6.0, direction=0):
    """gpt2 in which a first token `p` or `n` adds ± a multiple of a unit vector, everywhere, after a block."""
    model = library.fresh("gpt2")
    unit = torch.zeros(32)
    unit[direction] = 1.0
    sign = {letters().convert_tokens_to_ids("p"): 1.0, letters().convert_tokens_to_ids("n"): -1.0}
    seen = {}
    model.transformer.wte.register_forward_pre_hook(lambda m, args: seen.update(ids=args[0]))

    def write(module, args, out):
        first = seen["ids"][:, 0]
        signs = torch.tensor([sign.get(int(t), 0.0) for t in first])
        hidden = out[0] if isinstance(out, tuple) else out
        new = hidden + strength * signs[:, None, None] * unit
        return (new, *out[1:]) if isinstance(out, tuple) else new

    model.transformer.h[into].register_forward_hook(write)
    return model, unit.numpy()


def test_a_planted_direction_is_found(library):
    base, unit = planted(library, into=0, strength=60.0)
    tuned, other = planted(library, into=0, strength=60.0, direction=1)
    result = find(base, tuned)
    r = result.data["direction"].sel(depth=1).transpose("side", "feature").values
    for vector, truth in zip(r, (unit, other), strict=True):
        assert vector @ truth / np.linalg.norm(vector) > 0.99
    frame = result.to_frame().set_index("depth")
    assert result.depth in (1, 2)
    assert abs(frame.loc[1, "cosine"]) < 0.1
    assert frame.loc[1, "base_own"] > 20
    assert frame.loc[1, "base_own"] > 5 * abs(frame.loc[1, "base_other"])
    same = find(base, copy.deepcopy(base))
    row = same.to_frame().set_index("depth").loc[1]
    assert row["cosine"] > row["null_high"] - 1e-9
    assert row["cosine"] == pytest.approx(1)


def test_the_same_model_twice(library):
    base = library.model("llama")
    result = find(base, copy.deepcopy(base), depth=1)
    frame = result.to_frame().set_index("depth").loc[[1, 2]]
    np.testing.assert_allclose(frame[["cosine", "cosine_low", "cosine_high", "null_low", "null_high"]], 1, atol=1e-9)
    np.testing.assert_allclose(frame["base_own"], frame["tuned_other"])
    assert (frame["difference"] == 0).all()
    effects = result.effects()
    effects = effects[effects["class"] == "all"].set_index(["side", "intervention", "source"])["effect"]
    for kind in ("ablate", "add"):
        assert effects["base", kind, "own"] == effects["base", kind, "other"] == effects["tuned", kind, "own"]
        assert effects["base", kind, "own"] != 0
    np.testing.assert_allclose(result.effects()["share"].dropna(), 1)


def by_hand(model, item, change, layers):
    """The logit difference of a run in which `change` is applied to the input of each block and the last output."""
    hooks = [b.register_forward_pre_hook(lambda m, a, n=n: (change(n, a[0]), *a[1:]))
             for n, b in enumerate(model.model.layers)]  # fmt: skip
    end = model.model.layers[-1].register_forward_hook(lambda m, a, out: change(layers, out))
    with torch.no_grad():
        logits = model(torch.tensor([letters()(item["prompt"])["input_ids"]])).logits[0, -1].double()
    for hook in [*hooks, end]:
        hook.remove()
    right, wrong = (letters().convert_tokens_to_ids(item[name]) for name in ("answer", "wrong"))
    return float(logits[right] - logits[wrong])


@pytest.mark.parametrize("depth", [1, 2])
def test_addition_against_hooks_by_hand(library, depth):
    base = library.model("llama")
    tuned = tuned_copy(base)
    data = find(base, tuned, depth=depth, scale=0.7).data
    asked = np.flatnonzero(np.isfinite(data["logit_diff"].isel(side=0, intervention=0, source=0).values))
    assert len(asked) > 4
    for s, (side, model) in enumerate((("base", base), ("tuned", tuned))):
        for source, whose in (("own", s), ("other", 1 - s)):
            r = torch.from_numpy(data["direction"].sel(depth=depth).transpose("side", "feature").values[whose])

            def change(n, x, r=r):
                return x + 0.7 * r if n == depth else x

            for row in asked[:3]:
                item = prompts()[row]
                edited, plain = by_hand(model, item, change, 2), by_hand(model, item, lambda n, x: x, 2)
                cell = data.sel(side=side, intervention="add", source=source).isel(example=row)
                assert float(cell["logit_diff"]) == pytest.approx(edited - plain, abs=2e-3)
                assert float(data["unedited_logit_diff"].sel(side=side)[row]) == pytest.approx(plain, abs=1e-3)


def encoded(items):
    return encode(read_prompts(items), letters(), need_answer=False)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2-sliding", "neox"])
def test_ablation(library, family):
    model = HookedModel(library.model(family), letters())
    r = np.random.default_rng(0).normal(size=32)
    unit = torch.from_numpy(r / np.linalg.norm(r)).float()
    text = encoded(prompts()[:3])
    names = [f"blocks.{n}.hook_resid_{k}" for n in range(model.layers) for k in ("pre", "mid", "post")]
    names = [n for n in names if not (family == "neox" and "mid" in n)]
    edits = ablation(model, r)
    once = model.run(text.ids, mask=text.mask, edits=edits, capture=names)
    scale = max(float(x.abs().max()) for x in once.cache.values())
    ends = [n for n in names if "pre" in n or "mid" in n or n == names[-1]]
    for name in ends:
        assert float((once.cache[name] @ unit).abs().max()) < 1e-5 * scale, name
    twice = model.run(text.ids, mask=text.mask, edits=[*edits, *edits])
    torch.testing.assert_close(twice.logits, once.logits, atol=1e-4, rtol=1e-4)
    again = model.run(text.ids, mask=text.mask, edits=ablation(model, -3 * r))
    torch.testing.assert_close(again.logits, once.logits, atol=1e-4, rtol=1e-4)
    added = [*addition("blocks.1.hook_resid_pre", 5 * r), *edits]
    torch.testing.assert_close(
        model.run(text.ids, mask=text.mask, edits=added).logits, once.logits, atol=2e-3, rtol=1e-3
    )
    assert not torch.allclose(once.logits, model.run(text.ids, mask=text.mask).logits, atol=1e-2)
    with pytest.raises(ValueError, match="length 0"):
        ablation(model, 0 * r)


def test_ablation_is_what_weights_without_the_direction_do(library):
    """Orthogonalised weights (Arditi et al. 2024, §2.4, eq. 5) and the edits give the same logits."""
    base = library.fresh("llama")
    r = torch.from_numpy(np.random.default_rng(0).normal(size=32)).float()
    r /= r.norm()
    edited = copy.deepcopy(base)
    with torch.no_grad():
        for block in edited.model.layers:
            for matrix in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                matrix -= torch.outer(r, r @ matrix)
        table = edited.model.embed_tokens.weight
        table -= torch.outer(table @ r, r)
    text = encoded(prompts()[:3])
    model = HookedModel(base, letters())
    found = model.run(text.ids, mask=text.mask, edits=ablation(model, r.numpy().astype(float)))
    expected = HookedModel(edited, letters()).run(text.ids, mask=text.mask)
    where = text.mask[:, :, None]
    torch.testing.assert_close(found.logits * where, expected.logits * where, atol=1e-3, rtol=1e-3)


def test_effects_are_of_the_held_out_prompts(library):
    base = library.model("llama")
    tuned = tuned_copy(base)
    result = find(base, tuned, depth=1)
    data, held = result.data, result.data["held_out"].values
    answered = np.array(["answer" in row for row in prompts()])
    assert (np.isfinite(data["unedited_logprob"].sel(side="base").values) == (held & answered)).all()
    model = HookedModel(base, letters())
    vector = data["direction"].sel(depth=1, side="base").values.astype(float)
    items = [row for row, h in zip(prompts(), held & answered, strict=True) if h]
    plain, edited = scores(model, encoded(items)), scores(model, encoded(items), ablation(model, vector))
    one = data.sel(side="base", intervention="ablate", source="own")
    for metric in ("logit_diff", "logprob", "prob", "accuracy", "reciprocal_rank"):
        kept = one[metric].values
        np.testing.assert_allclose(kept[held & answered], edited[metric] - plain[metric], atol=1e-4)
    table = result.effects("logprob").set_index(["side", "intervention", "class", "source"])
    row = table.loc["base", "ablate", "all", "own"]
    assert row["effect"] == pytest.approx(np.mean(edited["logprob"] - plain["logprob"]), abs=1e-5)
    assert row["unedited"] == pytest.approx(plain["logprob"].mean(), abs=1e-5)
    random = data["random_logprob"].sel(side="base", intervention="ablate", source="own")
    random = random.transpose("random", "example").values
    assert len(random) == interventions.RANDOM
    assert len(np.unique(random[:, held & answered], axis=0)) == interventions.RANDOM
    assert row["random_low"] == pytest.approx(np.nanmean(random, 1).min())
    assert row["specific"] == pytest.approx(row["effect"] - np.nanmean(random))
    positive = data["positive"].values
    assert table.loc["base", "ablate", "p", "own"]["effect"] == pytest.approx(
        np.nanmean(one["logprob"].values[positive]), abs=1e-6
    )
    one, other = (table.loc[side, "add", "all", "other"] for side in ("base", "tuned"))
    assert other["difference"] == pytest.approx(other["effect"] - one["effect"])
    assert np.isnan(one["difference"])


@pytest.mark.parametrize(("source", "norm_of"), [("own", "base"), ("other", "tuned")])
def test_random_directions_are_as_long_as_the_one_they_are_held_against(library, source, norm_of):
    base = library.model("llama")
    result = find(base, tuned_copy(base), depth=1)
    lengths = {s: np.linalg.norm(result.data["direction"].sel(depth=1, side=s)) for s in ("base", "tuned")}
    assert abs(lengths["base"] / lengths["tuned"] - 1) > 0.01
    items = [row for row, h in zip(prompts(), result.data["held_out"].values, strict=True) if h and "answer" in row]
    model, text = HookedModel(base, letters()), encoded(items)
    drawn = np.random.default_rng([0, 2]).normal(size=(interventions.RANDOM, len(result.data.feature)))
    vectors = lengths[norm_of] * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    plain = scores(model, text)["logprob"]
    expected = [scores(model, text, interventions.edits_of("add", model, v, "blocks.0.hook_resid_post", 1.0))["logprob"]
                for v in vectors]  # fmt: skip
    found = result.data["random_logprob"].sel(side="base", intervention="add", source=source)
    found = found.transpose("random", "example").values
    np.testing.assert_allclose(found[:, ~np.isnan(found[0])], expected - plain, atol=1e-4)


def test_what_goes_beyond_random_directions():
    """A direction drawn like the others is called specific in one of twenty, though its effect differs from their mean
    in every prompt; one that does far more always is. Against scipy's t test of two samples, one of a single value."""
    from scipy.stats import ttest_ind

    generator, called = np.random.default_rng(0), []
    for _ in range(400):
        means = generator.normal(size=6)
        values = means[:, None] + 0.01 * generator.normal(size=(6, 40))
        row = _specific(values[0], values[1:])
        among = ttest_ind([values[0].mean()], values[1:].mean(1)).pvalue
        assert row["p"] == pytest.approx(max(among, 2 / 10_001))
        assert row["specific_low"] < row["specific"] < row["specific_high"]
        called.append(row["p"] < 0.05)
        assert abs(row["p"] - 0.05) < 5e-3 or called[-1] == (row["specific_low"] > 0 or row["specific_high"] < 0)
    assert 0.02 < np.mean(called) < 0.09
    assert _specific(values[0] + 100, values[1:])["p"] < 1e-3
    assert _specific(np.zeros(40), np.zeros((5, 40)))["p"] == 1


def test_the_share_of_the_own_effect(library):
    """Effects of known means: the other's direction does a quarter of what the model's own does."""
    base = library.model("llama")
    result = find(base, tuned_copy(base), depth=1)
    values = result.data["logprob"].transpose("source", ...).values
    values[:] = np.where(np.isnan(values), np.nan, 2 + 0.01 * np.random.default_rng(0).normal(size=values.shape))
    values[1] /= 4
    dims = ("source", *(d for d in result.data["logprob"].dims if d != "source"))
    found = Directions(result.data.assign(logprob=(dims, values)))
    table = found.effects("logprob").set_index("source")
    assert (table.loc["other", "share"].round(2) == 0.25).all()
    assert (table.loc["other", "share_low"] < table.loc["other", "share"]).all()
    assert table.loc["own", "share"].isna().all()
    found.data.attrs["metric"] = "logprob"
    assert "0.25 of its own" in found.summary()


def test_the_depth_is_chosen_in_the_training_half(library):
    base, _ = planted(library, into=1, strength=60.0)
    result = find(base, base)
    assert result.depth == int(result.data["cross_fitted"].mean("side").argmax("depth")) == 2
    assert "largest d′ within the training half" in result.summary()
    assert find(base, base, depth=1).depth == 1
    x = last(library.model("llama"), prompts())[1]
    positive = np.array([row["label"] == "p" for row in prompts()])
    train = ~result.data["held_out"].values
    found = contrast.at_depth([x, x], positive, train, 0)["cross_fitted"]
    values = []
    for half in contrast._halves(positive[train], [0, 2], contrast.HALVES):
        p, rows = positive[train], x[train]
        for fit in (half, ~half):
            r = rows[p & fit].mean(0) - rows[~p & fit].mean(0)
            values.append(d_prime(rows[~fit] @ r, p[~fit]))
    np.testing.assert_allclose(found, np.mean(values))


def test_the_same_tokens_everywhere_have_no_direction(library):
    """At the embedding of a last token that all prompts share there is nothing; said, not divided by 0."""
    base = library.model("llama")
    result = find(base, tuned_copy(base))
    row = result.to_frame().set_index("depth").loc[0]
    assert np.isnan(row["cosine"])
    assert np.isnan(row["base_own"])
    assert (result.data["direction"].sel(depth=0) == 0).all()
    with pytest.raises(InputError, match="no direction to take out"):
        find(base, tuned_copy(base), depth=0)


def test_batches_and_padding_change_nothing(library):
    base = library.model("gpt2")
    one, other = (find(base, tuned_copy(base), batch_size=size, depth=1).data for size in (1, None))
    for name in ("direction", "cosine", "projection", "logit_diff", "random_logprob", "cosine_null"):
        np.testing.assert_allclose(one[name], other[name], atol=1e-3, err_msg=name)


@pytest.mark.parametrize("position", [0, "mean", "mean:2", "label:first"])
def test_other_positions(library, position):
    base = library.model("llama")
    result = find(base, tuned_copy(base), position=position)
    item = prompts()[3]
    with torch.no_grad():
        hidden = base(torch.tensor([letters()(item["prompt"])["input_ids"]]), output_hidden_states=True).hidden_states
    x = hidden[1][0].double().numpy()
    at = {0: x[0], "mean": x.mean(0), "mean:2": x[-2:].mean(0), "label:first": x[0]}[position]
    if result.data["held_out"].values[3]:
        r = result.data["direction"].sel(side="base", depth=1).values.astype(float)
        kept = float(result.data["projection"].sel(side="base", source="own", depth=1).values[3])
        assert kept == pytest.approx(at @ r / np.linalg.norm(r), abs=1e-3)
    else:
        pytest.fail("choose a prompt that is held out")


def test_classes():
    def read(values):
        items = read_prompts([{"prompt": f"a{n}", "label": v} for n, v in enumerate(values)])
        return lambda positive=None: contrast.classes(items, "label", positive)

    assert read([True, False])()[1] == ("False", "True")
    assert read([0, 1])()[0].tolist() == [False, True]
    assert read(["harmful", "harmless"])("harmful")[1] == ("harmless", "harmful")
    for given in (True, "True", "true"):
        assert read([True, False, True])(given)[0].tolist() == [True, False, True]
    assert read(["a", "b", "c", "b"])("b")[1] == ("not b", "b")
    for call, message in (
        (lambda: read(["a", "b", "c"])(), "has 3 values: a, b, c; name the one"),
        (lambda: read(["a", "a"])(), "nothing to tell apart"),
        (lambda: read(["a", None])(), r"1 of 2 prompts have no `label` \(first: 2\)"),
        (lambda: read(["a", "b"])("z"), "no prompt has the label 'z'; there are a, b"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_a_text_is_in_one_half_only():
    items = read_prompts([{"prompt": f"{'ab'[n % 2]}{n // 4}", "label": n % 2} for n in range(48)])
    positive = np.array([n % 2 == 1 for n in range(48)])
    train = contrast.halved(items, positive, ("0", "1"), 0)
    texts = np.array([item.prompt for item in items])
    assert not {*texts[train]} & {*texts[~train]}
    assert train[positive].sum() == train[~positive].sum() == 12
    assert not np.array_equal(train, contrast.halved(items, positive, ("0", "1"), 1))
    with pytest.raises(InputError, match="the class '0' has 3 different texts; expected 4"):
        contrast.halved(items[:12], positive[:12], ("0", "1"), 0)


def test_refuses(library):
    base = library.model("llama")
    tuned = tuned_copy(base)
    none = prompts(answers=False)
    for options, message in (
        ({"site": "z"}, "site is one of"), ({"scale": 0}, "other than 0"), ({"depth": 3}, "depth is 0 to 2"),
        ({"metric": "kl"}, "metric is one of"), ({"label": "class"}, "no `class`"),
        ({"items": [row | {"label": "p"} for row in none]}, "nothing to tell apart"),
        ({"position": 9}, "position 9 does not exist"),
        ({"items": [row | {"wrong": None} for row in prompts()], "metric": "logit_diff"}, "needs one-token answers"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            find(base, tuned, **options)
    broken = tuned_copy(base)
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"tuned model's activations at blocks\.1\.hook_resid_post hold NaN"):
        find(base, broken)
    with pytest.raises(GateFailed):
        find(base, copy.deepcopy(base), check=True)


def test_models_of_other_depth(library):
    import transformers

    base = library.model("llama")
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = 3
    deeper = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match="cannot be compared depth by depth"):
        find(base, deeper)


def test_without_answers_and_with_whole_ones(library):
    base = library.model("llama")
    result = find(base, tuned_copy(base), prompts(answers=False))
    assert not result.has_effects
    assert "no held-out prompt has an answer" in result.summary()
    with pytest.raises(InputError, match="were not measured"):
        result.effects()
    items = [row | {"answer": "xyz"} for row in prompts(answers=False)]
    found = find(base, tuned_copy(base), items, whole_answer=True, depth=1)
    assert found.data.attrs["metric"] == "logprob"
    some = [row for row, held in zip(items, found.data["held_out"].values, strict=True) if held]
    expected = scores(HookedModel(base, letters()), encode(read_prompts(some), letters(), whole=True))["logprob"]
    kept = found.data["unedited_logprob"].sel(side="base").values
    np.testing.assert_allclose(kept[found.data["held_out"].values], expected, atol=1e-4)
    assert find(base, tuned_copy(base), [row | {"wrong": None} for row in prompts()]).data.attrs["metric"] == "logprob"


def test_memory_runs_out(library, monkeypatch):
    model, items = HookedModel(library.model("llama"), letters()), prompts()
    whole, real, sizes = scores(model, encoded(items)), HookedModel.run, []

    def small(self, ids, **options):
        sizes.append(len(ids))
        if len(ids) > 5:
            raise torch.OutOfMemoryError
        return real(self, ids, **options)

    monkeypatch.setattr(HookedModel, "run", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = scores(model, encoded(items))
    assert sizes == [24, 12, 6, 3, 3, 3, 3, 3, 3, 3, 3]
    np.testing.assert_allclose(found["logprob"], whole["logprob"], atol=1e-5)


def test_an_interrupted_run_continues(library, tmp_path, monkeypatch):
    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    sides = library.saved("llama"), tmp_path / "tuned"
    whole = find(*sides)
    real, calls = interventions.scores, []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(interventions, "scores", counted)
    with pytest.raises(KeyboardInterrupt):
        find(*sides, partial=tmp_path / "chunks")
    found = find(*sides, partial=tmp_path / "chunks")
    assert len(calls) == 10 + 40 - 9
    assert found.data.drop_attrs().identical(whole.data.drop_attrs())
    calls.clear()
    monkeypatch.setattr(interventions, "scores", real)
    other = find(*sides, partial=tmp_path / "chunks", scale=2.0)
    assert not np.allclose(*(d.data["logprob"].sel(intervention="add") for d in (other, found)), equal_nan=True)


def test_saved_and_loaded(library, tmp_path):
    base = library.model("llama")
    for items in (prompts(), prompts(answers=False)):
        found = find(base, tuned_copy(base), items)
        again = fl.load(found.save(tmp_path / "d.nc"))
        assert isinstance(again, Directions)
        assert again.summary() == found.summary()
        assert again.to_frame().equals(found.to_frame())
        json.dumps(found.headline(), allow_nan=False)
    same = find(base, tuned_copy(base), prompts(answers=False))
    assert same.data.drop_attrs().identical(found.data.drop_attrs())
    other = find(base, tuned_copy(base), prompts(answers=False), seed=1)
    assert not np.array_equal(other.data["held_out"], found.data["held_out"])


def test_the_command(library, tmp_path, monkeypatch, capsys):
    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    letters().save_pretrained(tmp_path / "letters")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts())))
    words = [library.saved("llama"), tmp_path / "tuned", "p.jsonl", "--tokenizer", "letters", "--positive", "n"]
    done = command("finetune_lens.directions", *words, "--json", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["headline"]["positive"] == "n"
    assert len(told["figures"]) == 2
    assert (tmp_path / "runs/directions/directions.nc").is_file()
    words = [library.saved("llama"), tmp_path / "tuned", tmp_path / "p.jsonl", "--tokenizer", tmp_path / "letters"]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words), "--label", "class", "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    assert "have no `class`" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_figures(library):
    import matplotlib.pyplot as plt

    base = library.model("llama")
    result = find(base, tuned_copy(base), depth=1)
    axes, frame = plots.direction_layers(result), result.to_frame()
    assert len(axes) == 3
    drawn = [line.get_ydata() for line in axes[0].lines]
    assert any(np.array_equal(y, frame["cosine"], equal_nan=True) for y in drawn)
    for name in ("base_own", "base_other", "tuned_own", "tuned_other"):
        assert any(np.array_equal(line.get_ydata(), frame[name], equal_nan=True) for line in axes[1].lines), name
    effects = result.effects()
    shown = {round(float(line.get_ydata()[0]), 9) for line in axes[2].lines}
    assert {round(v, 9) for v in effects.loc[effects["class"] == "all", "effect"]} <= shown
    assert len(plots.direction_layers(find(base, tuned_copy(base), prompts(answers=False)))) == 2
    plt.close("all")
