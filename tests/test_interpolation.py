"""Interpolation against plain code, planted layers, closed forms; and the command."""

import copy
import json
import sys
import warnings

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from test_check import adapter_folder, tuned_copy
from test_patching import letters

import finetune_lens as fl
from finetune_lens import plots, stats, zoo
from finetune_lens.command import Basic, span
from finetune_lens.errors import InputError
from finetune_lens.evaluation import METRICS, measure, read_examples
from finetune_lens.hooked.loading import load_model
from finetune_lens.hybrid import Hybrid
from finetune_lens.interpolation import __main__ as command_module
from finetune_lens.interpolation import points
from finetune_lens.results.interpolation import Interpolation

STRINGS = zoo.path("strings")
PROMPTS = [{"prompt": f"{word}=", "answer": word[0]} for word in ("abcde", "fghij", "klm", "nopqrs", "tu", "vwxyza")]


def strings(name="full"):
    return fl.ModelPair.load(STRINGS / "base", STRINGS / name)


def found(pair, prompts=STRINGS / "prompts.jsonl", **options):
    return fl.interpolate(pair, prompts, **{"progress": False, "device": "cpu"} | options)


def toy(base, tuned, prompts=None, **options):
    pair = fl.ModelPair.load(base, tuned, tokenizer=letters())
    return found(pair, PROMPTS if prompts is None else prompts, **options)


def logprobs(model, prompts, tokenizer):
    """Log-probability of the answer's token, text by text."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt["prompt"])["input_ids"]])
        answer = tokenizer(prompt["answer"], add_special_tokens=False)["input_ids"][0]
        with torch.no_grad():
            rows.append(model(ids).logits[0, -1].log_softmax(-1)[answer].item())
    return np.array(rows)


@pytest.fixture(scope="module")
def prompts():
    return [json.loads(line) for line in (STRINGS / "prompts.jsonl").read_text().splitlines()][:12]


@pytest.fixture(scope="module")
def everything(prompts):
    """All parts of the strings pair, on two files of different length."""
    files = {"task": prompts, "other": [{"prompt": "<copy>abcdef=", "answer": "a"}] * 5}
    parts = ("path", "groups", "splits", "reset", "sharpness")
    return found(strings(), files, by="layer", parts=parts, alphas=(-0.5, 0, 0.25, 0.5, 1, 1.5), draws=2, reset_seeds=3)


def test_the_path_is_a_naive_sum_of_state_dicts(everything, prompts):
    base, tuned = (
        transformers.AutoModelForCausalLM.from_pretrained(STRINGS / side, dtype=torch.float32)
        for side in ("base", "full")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(STRINGS / "base")
    one, other = base.state_dict(), {n: p.clone() for n, p in tuned.state_dict().items()}
    values = everything.values("path", "logprob")
    for alpha, row in zip(everything.data["alpha"].values, values, strict=True):
        tuned.load_state_dict({n: one[n] + alpha * (other[n] - one[n]) for n in one})
        np.testing.assert_allclose(row, logprobs(tuned, prompts, tokenizer), atol=2e-4, err_msg=f"α = {alpha}")
    frame = everything.path().query("file == 'task' and metric == 'logprob'")
    np.testing.assert_allclose(frame["mean"], values.mean(1))


def test_groups_splits_and_halves_are_naive_mixtures(library):
    base = library.model("llama")
    tuned = tuned_copy(base)
    parts = ("groups", "splits", "reset")
    result = toy(base, tuned, by="layer", group_alphas=(0.5,), parts=parts, reset_seeds=2)
    before, after = base.state_dict(), tuned.state_dict()
    layer = {n: int(n.split(".")[2]) if "layers" in n else {"model.embed_tokens.weight": -1}.get(n, 9) for n in before}
    names = {
        w: next(n for n in before if n in (f"model.{w}.weight", f"{w}.weight")) for w in result.data["weight"].values
    }
    was = {
        (h, names[w]): bool(v) for h in (0, 1) for w, v in zip(names, result.data["was_reset"][h].values, strict=True)
    }

    def naive(gamma):
        model = copy.deepcopy(base)
        model.load_state_dict({n: before[n] + gamma(n) * (after[n] - before[n]) for n in before})
        return logprobs(model, PROMPTS, letters())

    expected = {
        "scaling": [
            [[naive(lambda n, g=g, a=a, r=rest: a if layer[n] in g else r) for a in (0, 0.5, 1)] for rest in (0, 1)]
            for g in ((0,), (1,), (-1, 9))
        ],
        "splits": [
            [naive(lambda n, c=c: layer[n] >= c) for c in range(3)],
            [naive(lambda n, c=c: layer[n] < c) for c in range(3)],
        ],
        "halves": [naive(lambda n, h=h: not was[h, n]) for h in (0, 1)],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(result.values(name, "logprob"), values, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_ends_are_the_models_themselves(name):
    pair = strings(name)
    result = found(pair, alphas=(0, 1))
    examples = read_examples(STRINGS / "prompts.jsonl", [load_model(pair.base_checkpoint).tokenizer])
    for end, model in enumerate(pair.models(device="cpu")):
        scores = measure(model, examples)
        for metric in METRICS:
            assert np.array_equal(result.values("ends", metric)[end], scores.metric(metric))
            assert np.array_equal(result.values("path", metric)[end], scores.metric(metric))


def test_one_changed_layer_has_all_the_importance(library):
    base = library.model("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight.mul_(2)
    result = toy(base, tuned, by="layer", alphas=(0, 1))
    rows = result.importance().query("metric == 'logprob'").set_index("group")
    gain = result.gain().set_index("metric").loc["logprob", "gain"]
    assert gain != 0
    assert list(rows.index) == ["0", "1", "outside"]
    assert rows.loc["1", ["alone", "without"]].tolist() == [gain, gain]
    assert rows.loc["1", ["parameters", "update"]].tolist() == [1, 1]
    assert (
        rows.loc[["0", "outside"], ["alone", "alone_low", "alone_high", "without", "parameters", "update"]] == 0
    ).all(axis=None)
    splits = result.splits().query("metric == 'logprob'").set_index(["side", "cut"])["mean"]
    before, after = result.values("ends", "logprob").mean(1)
    assert splits["above"].tolist() == [after, after, before]
    assert splits["below"].tolist() == [before, before, after]
    by_component = toy(base, tuned, by="component", alphas=(0, 1)).importance().query("metric == 'logprob'")
    assert by_component.loc[by_component["alone"] != 0, "group"].tolist() == ["down"]


def test_recovery_is_the_share_of_the_gain(everything):
    rows = everything.importance().query("file == 'task' and metric == 'accuracy'")
    gain = everything.gain().query("file == 'task' and metric == 'accuracy'")["gain"].item()
    np.testing.assert_allclose(rows["alone_recovery"], rows["alone"] / gain)
    np.testing.assert_allclose(rows["without_recovery"], rows["without"] / gain)
    assert rows["parameters"].sum() == pytest.approx(1)
    assert rows["update"].sum() == pytest.approx(1)


def test_no_model_is_evaluated_twice(library, monkeypatch):
    """Of two changed layers: base, tuned, halfway; each alone is also a split, and a layer scaled away."""
    base = library.model("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.self_attn.q_proj.weight.mul_(2)
    calls = []
    monkeypatch.setattr(points, "measure", lambda *a, **k: calls.append(1) or measure(*a, **k))
    toy(base, tuned, by="layer", group_alphas=(0, 1), alphas=(0, 0.5, 1))
    assert len(calls) == 3 + 2


def test_equal_models_have_no_barrier_and_no_shares(library):
    base = library.model("gpt2")
    result = toy(base, copy.deepcopy(base), by="component", parts=("path", "groups", "reset"), reset_seeds=2)
    barrier = result.barrier()
    assert (barrier[["barrier", "excess", "low", "high"]].abs() < 1e-12).all(axis=None)
    assert not (barrier["verdict"] == "barrier").any()
    assert result.importance()["alone_recovery"].isna().all()
    assert (result.importance()[["alone", "without"]] == 0).all(axis=None)
    assert "not clear of 0: shares of it are undefined" in result.summary()
    assert "identical" in result.summary()
    assert "nan" not in result.summary()
    assert "best on the path at α = 0 and 20 more" in result.summary()  # all are the base
    json.dumps(result.headline(), allow_nan=False)


def test_one_example_has_no_interval(library):
    base = library.model("gpt2")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.transformer.h[0].mlp.c_fc.weight.add_(0.1)
    result = toy(base, tuned, PROMPTS[:1], by="layer", parts=("path", "groups", "reset"), reset_seeds=1)
    assert "nan" not in result.summary()


def made(loss, alphas):
    """A result with this loss (alpha, example) on the path, whose first and last α are 0 and 1."""
    scores = np.stack([np.exp(-loss), -loss])[:, :, None]
    dims = ("file", "example")
    data = {"path": (("metric", "alpha", *dims), scores), "ends": (("metric", "end", *dims), scores[:, [0, -1]])}
    data |= {"update_square": ("weight", [1.0]), "parameters": ("weight", [1])}
    coords = {"metric": list(METRICS), "file": ["task"], "alpha": alphas, "end": [0.0, 1.0]}
    coords |= {"objective": ("file", ["answer"]), "examples": ("file", [loss.shape[1]])}
    return Interpolation(xr.Dataset(data, coords, {"by": "", "rho": 0.05}))


@pytest.mark.parametrize(
    ("bend", "expected", "verdict"), [(1.0, 0.25, "barrier"), (-1.0, 0.0, "no barrier on this grid")]
)
def test_the_barrier_of_a_parabola(bend, expected, verdict):
    """L = chord + bend·α(1−α): the excess is bend/4 at ½, whatever the slope of each example."""
    alphas = np.linspace(0, 1, 11)
    slopes = np.random.default_rng(0).normal(size=20)
    loss = 2 + slopes * alphas[:, None] + bend * (alphas * (1 - alphas))[:, None] * (1 + 0.1 * slopes)
    row = made(loss, alphas).barrier().query("measure == 'loss'").iloc[0]
    factor = 1 + 0.1 * slopes.mean()
    assert row["barrier"] == pytest.approx(expected * factor)
    assert row["verdict"] == verdict
    if bend > 0:
        assert row["alpha"] == 0.5
        assert row["low"] < row["barrier"] < row["high"]
        assert [row["at_alpha_low"], row["at_alpha_high"]] == pytest.approx(
            [float(end) for end in stats.interval_of_mean(0.25 * (1 + 0.1 * slopes))], abs=1e-9
        )


def test_noise_is_rarely_called_a_barrier(monkeypatch):
    """The path of a straight line with noise, where the largest of many α is always above the chord."""
    monkeypatch.setattr(stats, "RESAMPLES", 500)
    alphas, random = np.linspace(0, 1, 11), np.random.default_rng(1)
    called = above = 0
    for _ in range(100):
        loss = 3 + random.normal(size=(11, 40)) * np.linspace(0.2, 1, 11)[:, None]
        loss[[0, -1]] = 3
        row = made(loss, alphas).barrier().query("measure == 'loss'").iloc[0]
        called, above = called + (row["verdict"] == "barrier"), above + (row["barrier"] > 0)
    assert above > 90
    assert called <= 10


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sharpness_against_a_naive_loop(library, family):
    base = library.model(family)
    tuned = tuned_copy(base)
    result = toy(base, tuned, parts=("sharpness",), sharpness_alphas=(0, 0.5), rho=0.2, draws=3, seed=4)
    hybrid = Hybrid(fl.ModelPair.load(base, tuned))
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    values = result._rise(None)
    for a, alpha in enumerate((0, 0.5)):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name] + alpha * (after[name] - before[name]))
        clean = logprobs(model, PROMPTS, letters())
        for layer in range(2):
            for draw in range(3):
                noisy = copy.deepcopy(model)
                parameters = dict(noisy.named_parameters())
                generator = points.noise_of(4, layer, draw)
                for name in sorted(hybrid.names(layers=[layer])):
                    part = hybrid.weights[name].live
                    owner = hybrid.parameter_of(hybrid.weights[name])
                    own = next(n for n, p in hybrid.model.module.named_parameters() if p is owner)
                    tensor = parameters[own].data.T if part.transpose else parameters[own].data
                    rows = slice(None) if part.rows is None else slice(*part.rows[0])
                    tensor[rows] *= 1 + 0.2 * torch.randn(tensor[rows].shape, generator=generator)
                expected = clean - logprobs(noisy, PROMPTS, letters())
                np.testing.assert_allclose(values[a, layer, draw], expected, atol=2e-5)
    frame = result.sharpness()
    np.testing.assert_allclose(frame["sharpness"], values.mean((2, 3)).ravel())
    np.testing.assert_allclose(frame["draw_error"], (values.mean(3).std(2, ddof=1) / np.sqrt(3)).ravel())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe", "opt"])
def test_a_half_is_a_half_of_every_block(library, family):
    model = library.model(family)
    hybrid = Hybrid(fl.ModelPair.load(model, copy.deepcopy(model)))
    drawn = [points.half(hybrid, np.random.default_rng([0, i])) for i in range(6)]
    assert len({frozenset(d) for d in drawn}) > 1
    assert points.half(hybrid, np.random.default_rng([0, 0])) == drawn[0]
    for chosen in drawn:
        assert all(hybrid.weights[n].layer is not None for n in chosen)
        others = 0
        for layer in range(2):
            names = [n for n, w in hybrid.weights.items() if w.layer == layer]
            attention = [n for n in names if hybrid.weights[n].component in "qkvo"]
            assert sum(n in chosen for n in attention) == 2
            vectors = [n for n in names if not hybrid.weights[n].base.is_matrix]
            assert abs(sum(n in chosen for n in vectors) - len(vectors) / 2) < 1
            kinds = {hybrid.weights[n].component for n in {*names} - {*attention, *vectors}}
            whole = [{n in chosen for n in names if hybrid.weights[n].component == kind} for kind in kinds]
            assert all(len(w) == 1 for w in whole)  # the experts of a kind go together
            others += sum(w == {True} for w in whole)
        assert others == len(kinds)  # of two blocks with as many each


def test_what_is_reset_is_the_base(library):
    """One component reset everywhere is that component scaled away in the tuned model."""
    base = library.model("llama")
    result = toy(base, tuned_copy(base), by="component", parts=("groups", "reset"), reset_seeds=2)
    resets = result.resets().query("metric == 'logprob'").set_index("what")
    scaled = result.scaling().query("metric == 'logprob' and context == 'tuned' and alpha == 0").set_index("group")
    for kind in ("q", "down", "embed"):
        assert resets.loc[kind, "mean"] == scaled.loc[kind, "mean"]
    halves = resets.loc[["half 0", "half 1"], "mean"]
    assert resets.loc["halves", "mean"] == pytest.approx(halves.mean())
    assert resets.loc["halves", "spread"] == pytest.approx(halves.std())
    assert 0.3 < resets.loc["half 0", "parameters"] < 0.7


def test_embeddings_are_below_and_the_unembedding_above(library):
    import re

    for family, lower in (
        ("llama", "embed_tokens"),
        ("gpt2", "wte|wpe"),
        ("opt", ".*embed.*"),
        ("bloom", "word_emb.*"),
    ):
        model = library.model(family)
        hybrid = Hybrid(fl.ModelPair.load(model, copy.deepcopy(model)))
        outside = [w for w in hybrid.weights.values() if w.layer is None]
        assert {points.is_lower(w) for w in outside} == {True, False}
        assert all(points.is_lower(w) == bool(re.fullmatch(lower, w.name)) for w in outside)


def test_an_adapter_is_measured_factored(library, tmp_path):
    """Halfway, split and perturbed: as the merged update."""
    from peft import PeftModel

    folder = library.saved("llama")
    adapter = adapter_folder(library.fresh("llama"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT uses of transformers is deprecated
        merged = PeftModel.from_pretrained(library.fresh("llama"), adapter).merge_and_unload()
    options = {"parts": ("path", "splits", "sharpness"), "alphas": (0.5,), "draws": 1, "rho": 0.2}
    one = found(fl.ModelPair.load(folder, adapter, tokenizer=letters()), PROMPTS, **options)
    other = toy(library.model("llama"), merged, **options)
    for name in ("path", "splits", "perturbed"):
        np.testing.assert_allclose(one.values(name, "logprob"), other.values(name, "logprob"), atol=1e-4, err_msg=name)
    assert one.share(one.data["component_of"].values == "q") == pytest.approx(2 / 3)  # of those that change: q, v


def test_curves(everything):
    curves = {c.method: c for c in everything.curves()}
    assert {c.unit for c in curves.values()} == {"parameters"}
    assert {name for name, c in curves.items() if c.alternatives} == {"one layer", "all but one layer", "half reset"}
    assert list(curves) == ["interpolation", "layers swapped from above", "layers swapped from below", "one layer",
                            "all but one layer", "half reset"]  # fmt: skip
    path = curves["interpolation"]
    assert path.shares.tolist() == [0, 0.25, 0.5, 1]
    assert np.array_equal(path.values[[0, -1]], [path.base, path.tuned])
    assert path.labels[1] == "α = 0.25"
    above = curves["layers swapped from above"]
    assert above.labels == ["from layer 3 on", "from layer 2 on", "from layer 1 on", "from layer 0 on"]
    for curve in curves.values():
        assert curve.values.shape == (len(curve.shares), 12)
        assert (np.diff(curve.shares) >= 0).all()
        assert ((curve.shares >= 0) & (curve.shares <= 1)).all()
    layers = curves["one layer"]
    assert layers.shares.sum() == pytest.approx(1)
    other = everything.curves("other", "logprob")[0]
    assert other.values.shape[1] == 5


def test_saved_and_read_again(everything, tmp_path):
    again = fl.load(everything.save(tmp_path / "x.nc"))
    assert again.summary() == everything.summary()
    assert again.to_frame().equals(everything.to_frame())
    frame = again.to_frame()
    assert set(frame["part"]) == {"ends", "path", "scaling", "splits", "halves", "kinds", "sharpness"}
    assert frame["alpha"].notna().sum() == (frame["part"].isin(["ends", "path", "scaling", "sharpness"])).sum()
    json.dumps(again.headline(), allow_nan=False)


def test_parts_that_were_not_measured(prompts):
    result = found(strings(), prompts, parts=("splits",))
    for method, part in ((result.path, "path"), (result.importance, "groups"), (result.resets, "reset")):
        with pytest.raises(InputError, match=f"the part {part} was not measured"):
            method()
    assert list(plots.figures_of(result)) == ["splits"]
    assert "splits" in set(result.to_frame()["part"])


def test_figures_show_what_was_measured(everything):
    figures = plots.figures_of(everything)
    assert list(figures) == ["path", "groups", "map", "splits", "sharpness"]
    for make in figures.values():
        make().canvas.draw()
    accuracy, loss = plots.interpolation_path(everything)
    path = everything.path().query("file == 'task' and metric == 'accuracy'")
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), path["mean"])
    np.testing.assert_allclose(loss.lines[0].get_ydata(), -everything.values("path", "logprob").mean(1))
    rows = everything.importance().query("file == 'task' and metric == 'accuracy'")
    ax = plots.interpolation_groups(everything)
    np.testing.assert_allclose(ax.lines[1].get_xdata(), rows["alone"])
    np.testing.assert_allclose(ax.lines[2].get_xdata(), rows["without"])
    maps = plots.interpolation_map(everything, file="other", metric="logprob")
    shown = maps[1].collections[0].get_array().reshape(4, 5)
    np.testing.assert_allclose(shown, everything.values("scaling", "logprob", "other")[:, 1].mean(-1))
    ax = plots.interpolation_splits(everything)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), everything.values("splits")[0].mean(1))
    ax = plots.interpolation_sharpness(everything)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), everything._rise(None)[0].mean((1, 2)))
    plt.close("all")


def test_texts_are_scored_by_their_loss(library):
    base = library.model("llama")
    result = toy(base, tuned_copy(base), [{"prompt": p["prompt"]} for p in PROMPTS], alphas=(0, 1))
    assert result.main_metric() == "logprob"
    assert "logprob base" in result.summary()


def test_options_out_of_range(library):
    base = library.model("llama")
    cases = {
        r"by is one of layer, component, matrix; found 'head'": {"by": "head"},
        r"parts are of .*; found 'all'": {"parts": ("all",)},
        r"groups and by .* go together": {"parts": ("groups",)},
        r"alphas are numbers, one at least; found \[\]": {"alphas": ()},
        r"alphas are numbers": {"alphas": (0, float("nan"))},
        r"reset_seeds and draws are at least 1": {"draws": 0},
        r"rho above 0": {"rho": 0.0},
        r"no file of prompts is given": {"prompts": {}},
    }
    for message, options in cases.items():
        with pytest.raises(InputError, match=message):
            toy(base, base, **options)
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="1 weights hold NaN or Inf, such as lm_head"):
        toy(base, broken)


def test_losses_that_are_nan_are_said(library):
    base = library.model("llama")
    tuned = tuned_copy(base)
    result = toy(base, tuned, alphas=(0, 1, 1e38))
    row = result.path().query("alpha == 1e38 and metric == 'accuracy'").iloc[0]
    assert np.isnan([row["mean"], row["low"], row["high"], row["recovery"]]).all()
    assert "losses of 1 evaluations of a file are NaN" in result.summary()


def test_ranges():
    assert span("-0.5:1.5:0.1") == [i / 10 for i in range(-5, 16)]
    assert span("0, 0.25,1") == [0, 0.25, 1]
    assert [str(x) for x in span("-0:1:0.5")] == ["0.0", "0.5", "1.0"]
    assert span("2:2:1") == [2]
    for text in ("", "a", "0:1", "0:1:0", "1:0:0.1", "0:1:0.3", "nan", "0:inf:1", "0:1:1e-9", "0:1:1:1", "1,,2"):
        with pytest.raises(InputError):
            span(text)


def command(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command_module.main()
    return stop.value.code


PAIR = (STRINGS / "base", STRINGS / "full")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "0:1"], "FIRST:LAST:STEP"),
        (["--by", "head"], "by is one of"),
        (["--parts", "path,groups"], "go together"),
        (["--eval", STRINGS / "prompts.jsonl"], "two are 'prompts'"),
        (["--eval", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--eval", STRINGS / "README.md"], "README.md"),
        (["--objective", "best"], "objective is one of"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = [*PAIR, STRINGS / "prompts.jsonl", *arguments, "--out", out, "--quiet"]
    assert command(*arguments, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not out.exists()


def test_the_command_and_an_interruption(tmp_path, monkeypatch, capsys):
    """Ctrl-C at the fifth evaluation: the same command makes the rest, and ends as if nothing had happened."""
    out = tmp_path / "i"
    arguments = [*PAIR, STRINGS / "prompts.jsonl", "--alpha", "-0.5:1.5:0.5", "--by", "layer", "--group-alpha", "0,1"]
    arguments += ["--limit", 8, "--out", out]
    calls = []

    def counted(*args, **options):
        calls.append("stopped" if len(calls) == 4 else "done")
        if calls[-1] == "stopped":
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(points, "measure", counted)
    monkeypatch.setattr(Basic, "progress", True)  # as on a terminal
    assert command(*arguments, "--no-plots", monkeypatch=monkeypatch) == 130
    assert "again to continue" in capsys.readouterr().err
    assert not (out / "interpolation.nc").exists()
    assert command(*arguments, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    total = calls.count("done")
    assert f"{total} evaluations of 8 examples, 4 of them kept from before" in printed.err
    assert "gain" in printed.out
    assert sorted(p.name for p in (out / "figures").glob("*.png")) == [
        f"interpolation-{title}.png" for title in ("groups", "map", "path", "splits")
    ]
    assert not list(out.glob(".*"))
    whole = found(strings(), alphas=span("-0.5:1.5:0.5"), by="layer", group_alphas=(0, 1), limit=8)
    assert fl.load(out / "interpolation.nc").to_frame().equals(whole.to_frame())
    assert (out / "interpolation.csv").read_text().count("\n") == 1 + len(whole.to_frame())
