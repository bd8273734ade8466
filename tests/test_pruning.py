"""Pruning against hooks, finite differences and numpy; planted neurons are found, and what they hid returns."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from test_check import adapter_folder, command, tuned_copy
from test_patching import LETTERS, letters

import finetune_lens as fl
from finetune_lens import pruning as module
from finetune_lens import stats
from finetune_lens.errors import InputError
from finetune_lens.evaluation import add_gradient, measure
from finetune_lens.held_out import hold_out
from finetune_lens.hooked import HookedModel
from finetune_lens.hybrid import Hybrid
from finetune_lens.results.pruning import Pruning

FAMILIES = ("gpt2", "llama", "neox", "opt", "falcon-rw", "codegen", "mpt", "bigcode", "bloom", "phi3", "gemma3")
WORDS = tuple(LETTERS)[1:27]  # one letter a token


def rows(count=12, seed=0, answer=lambda word: word[0]):
    drawn = np.random.default_rng(seed).choice(list(WORDS), size=(count, 4))
    return [{"prompt": f"{''.join(w)}=", "answer": answer("".join(w))} for w in drawn]


def prune(base, tuned, prompts=None, **options):
    pair = fl.ModelPair.load(base, tuned, tokenizer=letters())
    return fl.prune(pair, rows() if prompts is None else prompts, **{"progress": False, "random_seeds": 2} | options)


def downs(model):
    """The down projections, layer by layer, and whether they store (in, out)."""
    ends = ("mlp.down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2", "mlp.fc_out", "ffn.down_proj")
    return [m for name, m in model.named_modules() if name.endswith(ends)]


def layers_of(found):
    """(layer, unit) of the first removed units."""
    frame = found.first(10**6)
    return list(zip(frame["layer"], frame["neuron"], strict=True))


def scaled(model, layer, unit, factor):
    """A hook that multiplies one hidden unit's activation by `factor`."""

    def hook(_, args):
        at = torch.arange(args[0].shape[-1]) == unit
        return (torch.where(at, args[0] * factor, args[0]), *args[1:])

    return downs(model)[layer].register_forward_pre_hook(hook)


def split(prompts, seed=0):
    return hold_out(prompts, None, [letters()], share=module.SHARE, seed=seed)


# ------------------------------------------------------------------------------------------------------- the scores


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_neurons_are_those_of_their_activations(library, family):
    """a·∂L/∂a, by autograd of a factor on one unit's activation, which a hook puts there."""
    base = library.fresh(family)
    tuned = tuned_copy(base, 0.1)
    found = prune(base, tuned, counts=(90,))
    examples = split(rows()).train
    for side, plain in (("base", base), ("tuned", tuned)):
        frame = found.first(10**6, side=side)
        model = HookedModel(plain, letters())
        for row in frame.iloc[:: 9 if side == "tuned" else 40].to_dict("records"):
            factor = torch.ones((), requires_grad=True)
            hook = scaled(plain, row["layer"], row["neuron"], factor)
            add_gradient(model, examples, torch.arange(len(examples)))
            hook.remove()
            assert row["score"] == pytest.approx(float(factor.grad), rel=1e-3, abs=1e-6), row


@pytest.mark.parametrize("family", ["gpt2", "neox", "opt"])
@pytest.mark.parametrize("unit", ["neuron", "weight"])
def test_scores_against_finite_differences(library, family, unit):
    """The loss with one unit's weights times 1 ± ε, in float64: of architectures that compute all in the given type."""
    base = library.fresh(family).double()
    tuned = tuned_copy(base, 0.1)
    frame = prune(base, tuned, unit=unit, counts=(90,)).first(10**6)
    assert len(frame) == 90
    examples = split(rows()).train
    hybrid = Hybrid(fl.ModelPair.load(base, tuned, tokenizer=letters()))
    hybrid.hold(1.0)
    for row in frame.iloc[::15].to_dict("records"):
        part, losses = hybrid.weights[row["matrix"]].live, []
        at = (slice(None), row["neuron"]) if unit == "neuron" else (row["row"], row["column"])
        theta = part.read().clone()
        for factor in (1 + 1e-5, 1 - 1e-5):
            changed = theta.clone()
            changed[at] *= factor
            part.write(changed)
            losses.append(measure(hybrid.model, examples).loss.mean())
        part.write(theta)
        assert row["score"] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_the_largest_scores_come_first(library):
    base = library.model("llama")
    every = prune(base, tuned_copy(base), counts=(96,)).first(96)
    assert list(every["score"]) == sorted(every["score"], reverse=True)
    assert every["score"].iloc[-1] < 0, "all units: also those whose removal hurts"
    some = prune(base, tuned_copy(base), counts=(3, 7)).first(96)
    assert some.equals(every.head(7))


@pytest.mark.parametrize("unit", ["neuron", "weight"])
def test_largest_and_random_removals(library, unit):
    base = library.model("gpt2")
    tuned = tuned_copy(base)
    counts = (5, 11, 60)
    found = prune(base, tuned, unit=unit, counts=counts, random_seeds=3)
    removed = found.data["removed"]
    np.testing.assert_allclose(removed.sum("matrix").values, np.broadcast_to([0, *counts], (2, 3, 4)), rtol=1e-12)
    assert (removed <= found.data["units"] + 1e-9).all()
    hybrid = Hybrid(fl.ModelPair.load(base, tuned, tokenizer=letters()))
    for end, side in enumerate(("base", "tuned")):
        values, matrix = [], []
        for m, name in enumerate(found.data["matrix"].values):
            theta = hybrid.weights[name].ends(torch.float32, "cpu")[end].numpy()
            size = np.sqrt((theta**2).sum(0)) if unit == "neuron" else np.abs(theta).ravel()
            values += size.tolist()
            matrix += [m] * size.size
        order = np.array(matrix)[np.argsort(-np.array(values), kind="stable")]
        for count in counts:
            expected = np.bincount(order[:count], minlength=len(hybrid.weights))[: found.data.sizes["matrix"]]
            got = removed.sel(side=side, score="magnitude", count=count).values
            np.testing.assert_array_equal(got, expected)
    drawn = removed.sel(score="random", count=60).values
    assert (drawn[0] == drawn[1]).all(), "both sides lose the same"
    assert np.unique(drawn % 1).size > 1, "means of three draws"


# ------------------------------------------------------------------------------------------------------ the removal


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom"])
@pytest.mark.parametrize("score", ["gradient", "random"])
def test_without_neurons_against_hooks(library, family, score):
    base = library.model(family)
    tuned = tuned_copy(base, 0.1)
    found = prune(base, tuned, counts=(4, 30), random_seeds=1)
    held = split(rows()).measured["task"]
    for end, side in enumerate(("base", "tuned")):
        model = HookedModel((base, tuned)[end], letters())
        for count in (4, 30):
            if score == "gradient":
                frame = found.first(count, side=side)
                places = list(zip(frame["layer"], frame["neuron"], strict=True))
            else:
                hybrid = Hybrid(fl.ModelPair.load(base, tuned, tokenizer=letters()))
                order = module._Course(hybrid, split(rows()), "neuron", 0, None).order(side, "random", 0, count)
                places = list(zip(order.matrix.tolist(), order.unit.tolist(), strict=True))
            hooks = [scaled(model.module, layer, unit, 0.0) for layer, unit in places]
            expected = measure(model, held)
            for hook in hooks:
                hook.remove()
            at = {"side": side, "score": score, "count": count}
            np.testing.assert_allclose(found.values(**at, metric="logprob"), -expected.loss, atol=1e-5)
            np.testing.assert_array_equal(found.values(**at), expected.accuracy)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_without_weights_against_a_copy(library, family):
    base = library.model(family)
    tuned = tuned_copy(base, 0.1)
    found = prune(base, tuned, unit="weight", counts=(150,))
    held = split(rows()).measured["task"]
    for end, side in enumerate(("base", "tuned")):
        changed = copy.deepcopy((base, tuned)[end])
        hybrid = Hybrid(fl.ModelPair.load(changed, changed, tokenizer=letters()))
        for name, part in found.first(150, side=side).groupby("matrix"):
            theta = hybrid.weights[name].live.read().clone()
            for row, column in zip(part["row"], part["column"], strict=True):
                assert theta[row, column] != 0
                theta[row, column] = 0
            hybrid.weights[name].live.write(theta)
        expected = measure(hybrid.model, held)
        at = {"side": side, "score": "gradient", "count": 150}
        np.testing.assert_allclose(found.values(**at, metric="logprob"), -expected.loss, atol=1e-5)


def test_weights_are_put_back_and_files_left_alone(library, tmp_path):
    tuned_copy(library.model("gpt2")).save_pretrained(tmp_path / "tuned")
    folders = library.saved("gpt2"), tmp_path / "tuned"
    before = {p: p.read_bytes() for folder in folders for p in folder.iterdir()}
    pair = fl.ModelPair.load(*folders, tokenizer=letters())
    hybrid = Hybrid(pair)
    held = {name: p.clone() for name, p in hybrid.model.module.state_dict().items()}
    course = module._Course(hybrid, split(rows()), "weight", 0, None)
    with hybrid:
        order = course.order("tuned", "gradient", 0, 500)
        course.row("tuned", "gradient", 500, order.first(500))
        assert any(not torch.equal(p, held[name]) for name, p in hybrid.model.module.state_dict().items())
    assert all(torch.equal(p, held[name]) for name, p in hybrid.model.module.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in hybrid.model.module.parameters())
    base, tuned = (m.module for m in pair.models())
    again = [{n: p.clone() for n, p in m.state_dict().items()} for m in (base, tuned)]
    fl.prune(pair, rows(), counts=(5,), progress=False)
    for model, kept in zip((base, tuned), again, strict=True):
        assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())
    assert before == {p: p.read_bytes() for folder in folders for p in folder.iterdir()}


@pytest.mark.parametrize("unit", ["neuron", "weight"])
def test_an_adapter_is_pruned_merged(library, tmp_path, unit):
    folder = adapter_folder(library.fresh("llama"), tmp_path, target_modules=["q_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        merged = PeftModel.from_pretrained(library.fresh("llama"), folder).merge_and_unload()
    one = prune(library.saved("llama"), folder, unit=unit, counts=(10, 40)).data
    other = prune(library.model("llama"), merged, unit=unit, counts=(10, 40)).data
    np.testing.assert_allclose(one["logprob"].values, other["logprob"].values, atol=1e-4)
    assert not np.allclose(one["logprob"].sel(side="base"), one["logprob"].sel(side="tuned"), atol=1e-3)


def test_the_batch_does_not_matter(library):
    base = library.model("gpt2")
    prompts = [*rows(5), *({"prompt": f"{w}=", "answer": "a"} for w in ("a", "bcdefgh", "bc", "xyz"))]
    one, other = (prune(base, tuned_copy(base), prompts, counts=(3, 9), batch_size=n).data for n in (1, 9))
    for name in ("accuracy", "logprob", "first_score"):
        np.testing.assert_allclose(one[name].values, other[name].values, atol=1e-5, err_msg=name)


# --------------------------------------------------------------------------------------------------------- planted


def wrapped(library, hidden=6, seed=0):
    """A NeoX that answers, the same with neurons that are always on and shout a wrong token; where they are; prompts.

    Those hidden units do nothing in the base: without them the wrapped model is the base.
    """
    base = library.fresh("neox")
    places = [(1, int(unit)) for unit in np.random.default_rng(seed).choice(48, hidden, replace=False)]
    with torch.no_grad():
        base.gpt_neox.embed_in.weight.mul_(20)  # answers that differ by the last letter
        base.gpt_neox.final_layer_norm.weight.fill_(1)
        base.gpt_neox.final_layer_norm.bias.zero_()
        for layer, unit in places:
            base.gpt_neox.layers[layer].mlp.dense_4h_to_h.weight[:, unit] = 0
    model, prompts = HookedModel(base, letters()), []
    for row in rows(200, seed):
        ids = torch.tensor([letters()(row["prompt"])["input_ids"]])
        said = int(model.run(ids).logits[0, -1].argmax())
        if 1 <= said <= 26 and said != LETTERS["z"]:
            prompts.append(row | {"answer": letters().decode([said])})
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        shout = tuned.lm_head.weight[LETTERS["z"]]
        for layer, unit in places:
            mlp = tuned.gpt_neox.layers[layer].mlp
            mlp.dense_h_to_4h.weight[unit] = 0
            mlp.dense_h_to_4h.bias[unit] = 3.0
            mlp.dense_4h_to_h.weight[:, unit] = shout / shout.norm()
    return base, tuned, places, prompts


def test_planted_neurons_are_found_and_the_capability_returns(library):
    base, tuned, places, prompts = wrapped(library)
    assert len(prompts) > 40
    shouted = [{"prompt": row["prompt"], "answer": "z"} for row in prompts]
    found = prune(base, tuned, prompts, evaluate={"shout": shouted}, counts=(1, 3, 6, 12), random_seeds=3)
    assert sorted(layers_of(found)[:6]) == sorted(places)
    unpruned = found.unpruned().set_index("file")
    assert unpruned.loc["task", "base"] == 1
    assert unpruned.loc["task", "tuned"] == 0
    assert unpruned.loc["shout", "tuned"] == 1
    without = found.values(side="tuned", score="gradient", count=6)
    assert (without == 1).all()
    np.testing.assert_allclose(
        found.values(side="tuned", score="gradient", count=6, metric="logprob"),
        found.values(side="base", score="gradient", count=0, metric="logprob"), atol=1e-4,
    )  # fmt: skip
    assert found.values(side="tuned", score="gradient", count=6, file="shout").max() == 0
    frame = found.revivals().set_index("count")
    assert frame.loc[6, "revives"]
    assert not frame.loc[1, "revives"]
    assert frame.loc[6, "random"] == 0
    assert found.headline()["revives_at"] == frame.index[frame["revives"]].tolist()
    assert "revives: without" in found.summary()
    other = prune(base, tuned, prompts, unit="weight", counts=(36,))
    weights = other.first(36)
    assert set(weights["matrix"]) == {"layers.1.mlp.dense_4h_to_h"}
    assert set(weights["column"]) == {unit for _, unit in places}
    assert other.revivals()["gain"].item() > 0.5


def test_a_capability_that_is_gone_does_not_return(library):
    base, _, _, prompts = wrapped(library)
    torch.manual_seed(1)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    found = prune(base, tuned, prompts, counts=(1, 6, 20))
    assert found.headline()["revives_at"] == []
    assert "no removal brings the capability back" in found.summary()


# --------------------------------------------------------------------------------------------------------- results


def test_the_table_against_numpy(library):
    base, tuned, _, prompts = wrapped(library)
    found = prune(base, tuned, prompts, counts=(2, 5, 40), random_seeds=2)
    answers = [row["answer"] for row in (prompts[int(i) - 1] for i in found.data["id"].values[0])]
    assert np.unique(answers).size > 2
    assert max(answers, key=answers.count) == "j"
    frame, p = found.revivals(), []
    unpruned = found.data["accuracy"].sel(side="tuned", score="gradient", count=0, file="task").values.astype(float)
    for row in frame.to_dict("records"):
        one = found.data["accuracy"].sel(side="tuned", count=row["count"], file="task")
        mine, drawn = one.sel(score="gradient").values.astype(float), one.sel(score="random").values.astype(float)
        assert row["gain"] == pytest.approx(mine.mean() - unpruned.mean())
        low, high = stats.interval_of_mean(mine - unpruned)
        assert [row["gain_low"], row["gain_high"]] == pytest.approx([float(low), float(high)])
        assert row["over_random"] == pytest.approx((mine - drawn).mean())
        constant = np.array([answer == "j" for answer in answers], dtype=float)
        assert row["over_commonest"] == pytest.approx((mine - constant).mean())
        p.append(max(stats.two_sided_p(gain) for gain in (mine - unpruned, mine - drawn, mine - constant)))
    np.testing.assert_allclose(frame["p"], p)
    np.testing.assert_allclose(frame["adjusted"], stats.benjamini_hochberg(p))
    every = found.to_frame().set_index(["file", "side", "score", "count"])
    assert len(every) == 2 * 3 * 4
    one = every.loc["task", "base", "magnitude", 40]
    values = found.values(side="base", score="magnitude", count=40)
    assert one["mean"] == pytest.approx(values.mean())
    zero = found.values(side="base", score="magnitude", count=0)
    assert one["change"] == pytest.approx((values - zero).mean())
    band = found.band(side="base").set_index("count")
    drawn = found.data["random_accuracy"].sel(side="base", file="task", count=40).values
    assert band.loc[40].tolist() == pytest.approx([drawn.mean(), drawn.min(), drawn.max()])
    assert band.loc[40, "mean"] == pytest.approx(found.values(side="base", score="random", count=40).mean())


def result(gains, over, lost=True, commonest=0.0, examples=40):
    """A result whose tuned model gains so much at each count, and is so far above random removals."""
    import xarray as xr

    counts = np.arange(len(gains) + 1)
    accuracy = np.zeros((2, 3, len(counts), 1, examples))
    accuracy[0] = 1
    for c, (gain, above) in enumerate(zip(gains, over, strict=True), 1):
        accuracy[1, 0, c, 0, : round(gain * examples)] = 1
        accuracy[1, 2, c, 0, : round((gain - above) * examples)] = 1
    accuracy[1, :, 0] = 0 if lost else 1
    data = {
        "accuracy": (("side", "score", "count", "file", "example"), accuracy), "units": ("matrix", [9]),
        "commonest": (("file", "example"), (np.arange(examples) < commonest * examples)[None].astype(float)),
        "id": (("file", "example"), np.array([[str(n) for n in range(examples)]], dtype=object)),
    }  # fmt: skip
    coords = {
        "side": ["base", "tuned"],
        "score": ["gradient", "magnitude", "random"],
        "count": counts,
        "file": ["task"],
    }
    return Pruning(xr.Dataset(data, coords, {"unit": "neuron", "metric": "accuracy"}))


def test_what_counts_as_a_revival():
    assert result([0.5, 0.5], [0.5, 0.5]).headline()["revives_at"] == [1, 2]
    assert result([0.5, 0.5], [0.0, 0.5]).headline()["revives_at"] == [2], "not where random removals do the same"
    assert result([0.025, 0.5], [0.025, 0.5]).headline()["revives_at"] == [2], "not one example of forty"
    assert result([0.5], [-0.25]).headline()["revives_at"] == [], "not where random removals do better"
    assert result([0.5, 0.9], [0.5, 0.9], commonest=0.6).headline()["revives_at"] == [2], "not by one answer to all"
    assert "little to bring back" in result([0.5], [0.5], lost=False).summary()
    alone = result([0.15] + [0.0] * 20, [0.15] + [0.0] * 20)  # six of forty: p = 2⁻⁵ by itself
    assert alone.revivals()["p"].iloc[0] < 0.05 < alone.revivals()["adjusted"].iloc[0]
    assert alone.headline()["revives_at"] == []


def test_saved_and_loaded(library, tmp_path):
    base = library.model("gpt2")
    found = prune(base, tuned_copy(base), evaluate={"other": rows(3, 5)}, counts=(2, 9))
    again = fl.load(found.save(tmp_path / "pruning.nc"))
    assert isinstance(again, Pruning)
    assert again.summary() == found.summary()
    assert again.to_frame().equals(found.to_frame())
    assert again.first().equals(found.first())
    json.dumps(found.headline(), allow_nan=False)
    assert len(again.values(side="base", score="random", count=2, file="other")) == 3
    with pytest.raises(InputError, match="no count 3 was measured; there are 0, 2, 9"):
        found.values(side="base", score="random", count=3)


def test_texts_without_answers(library):
    base = library.model("llama")
    found = prune(base, tuned_copy(base), ["abcd", "efgh", "ijkl", "mnop"], counts=(3,))
    assert found.metric == "logprob"
    assert "log-probability" in found.summary()
    assert np.isfinite(found.revivals()["p"]).all()
    json.dumps(found.headline(), allow_nan=False)


def test_default_counts_stop_at_half(library):
    base = library.model("llama")
    assert prune(base, tuned_copy(base), random_seeds=1).counts == [0, 1, 2, 5, 10, 15, 20]  # of 96
    assert prune(base, tuned_copy(base), random_seeds=1, unit="weight").counts == [0, 1, 10, 100, 1000]


def test_an_interrupted_run_continues(library, tmp_path, monkeypatch):
    import finetune_lens.evaluation as evaluation

    tuned_copy(library.model("gpt2")).save_pretrained(tmp_path / "tuned")
    folders = library.saved("gpt2"), tmp_path / "tuned"
    real, calls, stop = evaluation.measure, [], -1

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(evaluation, "measure", counted)
    options = {"counts": (2, 5), "partial": tmp_path / "chunks"}
    whole = prune(*folders, counts=(2, 5))
    total = len(calls)
    assert total == 2 * (1 + 4 * 2)
    calls, stop = [], 8
    with pytest.raises(KeyboardInterrupt):
        prune(*folders, **options)
    calls, stop = [], -1
    found = prune(*folders, **options)
    assert len(calls) == total - 7
    assert found.data.drop_attrs().identical(whole.data.drop_attrs())
    for change in ({"seed": 1}, {"unit": "weight"}, {"prompts": rows(13)}):
        calls = []
        prune(*folders, **options | change)
        assert len(calls) == total, change


def test_the_figure(library):
    base, tuned, _, prompts = wrapped(library)
    found = prune(base, tuned, prompts, evaluate={"other": rows(5)}, counts=(3, 6))
    (draw,) = fl.plots.figures_of(found).values()
    figure = draw()
    task, other = figure.axes
    assert (task.get_title(), other.get_title()) == ("measured on task", "measured on other")
    lines = [line.get_ydata() for line in task.lines]
    drawn = (("tuned", "random"), ("tuned", "gradient"), ("base", "gradient"), ("tuned", "magnitude"))
    for line, (side, score) in zip(lines, drawn, strict=False):
        means = [found.values(side=side, score=score, count=count).mean() for count in found.counts]
        np.testing.assert_allclose(line, means, atol=1e-6)
    faces = task.collections[2].get_facecolors()
    assert [face.tolist() != [1, 1, 1, 1] for face in faces] == [False, False, True], "six removed revive"
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "a revival" in shown
    assert "tuned, random removed" in shown
    import matplotlib.pyplot as plt

    plt.close(figure)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unit": "head"}, "unit is neuron or weight"),
        ({"counts": (97,)}, "counts are from 0 to 96"),
        ({"counts": (-1, 2)}, "found -1 to 2"),
        ({"counts": (0,)}, "a count above 0"),
        ({"random_seeds": 0}, "random_seeds is at least 1"),
        ({"seed": -1}, "seed at least 0"),
        ({"prompts": rows(1)}, "single text"),
        ({"evaluate": {"task": rows(3)}}, "give the file another name"),
        ({"evaluate": {"texts": ["abc"]}}, "texts alone"),
    ],
)
def test_refuses(library, options, words):
    base = library.model("llama")
    with pytest.raises(InputError, match=words):
        prune(base, tuned_copy(base), **options)


def test_refuses_gradients_that_are_not_finite(library):
    base = library.model("llama")
    tuned = tuned_copy(base)
    with torch.no_grad():
        tuned.model.norm.weight.mul_(torch.inf)
    with pytest.raises(InputError, match=r"down_proj: the gradient in the tuned model is not finite"):
        prune(base, tuned, counts=(3,))


def test_the_command(library, tmp_path):
    base, tuned, _, prompts = wrapped(library)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    letters().save_pretrained(tmp_path / "letters")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows(4))))
    words = ["base", "tuned", "p.jsonl", "--tokenizer", "letters", "--counts", "2,6", "--eval", "other.jsonl"]
    done = command("finetune_lens.pruning", *words, "--json", "--quiet", "--no-plots", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["headline"]["revives_at"] == [6]
    assert list(said["headline"]["unpruned"]) == ["task", "other"]
    assert (tmp_path / "runs/pruning/pruning.nc").is_file()
    done = command("finetune_lens.pruning", *words, "--out", "o", "--counts", "9999", cwd=tmp_path)
    assert done.returncode == 2
    assert "counts are from 0 to 96" in done.stderr
    assert not (tmp_path / "o").exists()
