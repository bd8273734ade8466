"""Scaled intruders: the planted one and no other, as numpy would do it; the tuned model where nothing is to change."""

import json
import sys
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from conftest import VOCABULARY

import finetune_lens as fl
from finetune_lens import InputError, intruders
from finetune_lens.evaluation import measure, read_examples
from finetune_lens.hooked.loading import load_model
from finetune_lens.hybrid import Hybrid
from finetune_lens.intruders import scale

matplotlib.use("agg")
PLANTED = "layers.1.mlp.up_proj"
OPTIONS = {"progress": False, "random_draws": 2}
SCALES = (-0.5, 0.0, 0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a word: w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    return folder


def some_prompts(seed, n=6):
    rng = np.random.default_rng(seed)
    rows = rng.integers(3, VOCABULARY, (n, 5))
    return [{"prompt": " ".join(f"w{i}" for i in row[:4]), "answer": f" w{row[4]}"} for row in rows]


PROMPTS = {"task": some_prompts(0), "before": some_prompts(1, 9)}


def planted(library, tmp_path, *, size=6.0, name=PLANTED, noise=0.002):
    """A tuned model with size·u vᵀ, u and v random, in one matrix, and a little noise in all of them."""
    model = library.fresh("llama")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
        weight = model.get_submodule(f"model.{name}").weight
        u, v = (torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in weight.shape)
        weight.add_(size * torch.outer(u, v))
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", u


@pytest.fixture
def pair(library, tmp_path, tokenizer):
    return fl.ModelPair.load(library.saved("llama"), planted(library, tmp_path)[0], tokenizer=tokenizer)


@pytest.fixture
def adapted(library, tmp_path, tokenizer):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, "target_modules": ["q_proj", "up_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(library.fresh("llama"), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.4)
    model.save_pretrained(tmp_path / "adapter")
    return fl.ModelPair.load(library.saved("llama"), tmp_path / "adapter", tokenizer=tokenizer)


def weights_at(pair, monkeypatch, **options):
    """Every model that is measured: key → the weights in float64; and the result."""
    seen = {}
    original = scale._points

    def points(*args):
        found = original(*args)
        hybrid = Hybrid(pair)
        for key, gamma in found.items():
            hybrid.hold(gamma)
            seen[key] = {n: hybrid.weights[n].live.read().double().numpy().copy() for n in hybrid.weights}
        return found

    with monkeypatch.context() as patch:
        patch.setattr(scale, "_points", points)
        return fl.scale_intruders(pair, PROMPTS, **OPTIONS | options), seen


def naive_svd(pair, name):
    matrix = next(pair.matrices([name]))
    return np.linalg.svd(matrix.tuned_dense(torch.float64).numpy(), full_matrices=False)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_planted_direction_is_scaled_and_nothing_else(pair, monkeypatch, side):
    found, seen = weights_at(pair, monkeypatch, scales=SCALES, side=side, k=5)
    assert found.scaled()[["matrix", "rank"]].values.tolist() == [[PLANTED, 1]]
    assert found.scaled("neighbour")[["matrix", "rank"]].values.tolist() == [[PLANTED, 2]]
    u, s, vh = naive_svd(pair, PLANTED)
    np.testing.assert_allclose(found.scaled().sigma, s[:1])
    tuned = seen[("tuned",)]
    w1 = tuned[PLANTED]
    for rank, arm in enumerate(("intruder", "neighbour")):
        for value in (-0.5, 0.0, 0.5, 2.0):
            held = seen["scale", arm, value]
            close(held[PLANTED], w1 + (value - 1) * s[rank] * np.outer(u[:, rank], vh[rank]))
            assert np.abs(held[PLANTED] - w1).max() > 1e-3
            assert all(np.array_equal(held[n], tuned[n]) for n in held if n != PLANTED)
    assert not [key for key in seen if key[0] == "scale" and key[2] == 1]


def test_the_planted_direction_is_the_planted_one(library, tmp_path, tokenizer):
    folder, u = planted(library, tmp_path)
    pair = fl.ModelPair.load(library.saved("llama"), folder, tokenizer=tokenizer)
    found = fl.find_intruders(pair, null_draws=0, progress=False, k=5)
    vectors = scale._vectors(pair, {PLANTED: [0]}, found, "left", torch.device("cpu"))
    assert abs(float(vectors[PLANTED].unit[:, 0] @ u.double())) > 0.8


@pytest.mark.parametrize("kind", ["pair", "adapted"])
def test_at_one_it_is_the_tuned_model_and_the_base_after(kind, request, library):
    pair = request.getfixturevalue(kind)
    tuned = pair.models()[1]
    hybrid = Hybrid(pair)
    before = {name: p.clone() for name, p in hybrid.parameters.items()}
    found = fl.scale_intruders(pair, PROMPTS, scales=SCALES, hybrid=hybrid, **OPTIONS)
    assert all(torch.equal(p, before[name]) for name, p in hybrid.parameters.items())
    base = load_model(pair.base_checkpoint, tokenizer=pair.tokenizer)
    assert len(found.scaled())
    for file, rows in PROMPTS.items():
        examples = read_examples(rows, [tuned.require_tokenizer()])
        for metric in ("accuracy", "logprob"):
            own = measure(tuned, examples).metric(metric)
            for arm in ("intruder", "neighbour"):
                assert np.array_equal(found.examples("score", file, metric=metric, arm=arm, scale=1.0), own)
            assert np.array_equal(found.examples("tuned_score", file, metric=metric), own)
            assert np.array_equal(
                found.examples("base_score", file, metric=metric), measure(base, examples).metric(metric)
            )
        assert not np.array_equal(found.examples("score", file, metric="logprob", arm="intruder", scale=2.0), own)
    row = found.to_frame().set_index(["file", "metric", "scale"]).loc[("task", "logprob", 1.0)]
    assert (row["intruder_change"], row["intruder_low"], row["difference_high"]) == (0, 0, 0)


def test_an_adapter_is_scaled_as_its_sum(adapted, monkeypatch):
    """Also what is measured: the same as a dense tuned model gives."""
    found, seen = weights_at(adapted, monkeypatch, scales=[0.5], recovery=False)
    assert len(found.scaled()) > 2
    for row in found.scaled().to_dict("records"):
        u, s, vh = naive_svd(adapted, row["matrix"])
        r = row["rank"] - 1
        expected = (u * s) @ vh - 0.5 * s[r] * np.outer(u[:, r], vh[r])
        close(seen["scale", "intruder", 0.5][row["matrix"]], expected)
    merged = {name: s.read().clone() for name, s in adapted.base_checkpoint.tensors.items()}
    for matrix in adapted.matrices():
        merged[
            f"model.{matrix.name}.weight" if f"model.{matrix.name}.weight" in merged else f"{matrix.name}.weight"
        ] = matrix.tuned_dense(torch.float64).float()
    options = {"config": adapted.base_checkpoint.config, "tokenizer": adapted.tokenizer}
    dense = fl.ModelPair.load(adapted.base_checkpoint.origin["files"][0], merged, **options)
    again = fl.scale_intruders(dense, PROMPTS, scales=[0.5], recovery=False, **OPTIONS)
    assert again.scaled()[["matrix", "rank"]].equals(found.scaled()[["matrix", "rank"]])
    np.testing.assert_allclose(again.data.score, found.data.score, atol=1e-4)


def test_kept_and_removed_add_up_to_the_update(adapted, monkeypatch):
    found, seen = weights_at(adapted, monkeypatch, scales=[1.0], k=6)
    base, tuned = seen[("base",)], seen[("tuned",)]
    pairs = [key[1:] for key in seen if key[0] == "keep"]
    counts = found.data["count"].values.tolist()
    assert len(pairs) == 4 * len(counts)  # intruders, leading, two random sets
    assert counts == sorted({*(2**i for i in range(6) if 2**i < counts[-1]), counts[-1]})
    full = {n: m.tuned_dense(torch.float64).numpy() for m in adapted.matrices() for n in [m.name]}
    for pair in pairs:
        keep, remove = seen["keep", *pair], seen["remove", *pair]
        moved = 0
        for name, w0 in base.items():
            if name in full and np.abs(keep[name] - w0).max() > 1e-5:
                close((keep[name] - w0) + (remove[name] - w0), full[name] - w0)
                moved += np.linalg.matrix_rank(keep[name] - w0, tol=1e-4)
            else:
                assert np.array_equal(keep[name], w0)
                assert np.array_equal(remove[name], tuned[name])
        assert moved == int(found.data["moved"].sel(kind=pair[0], count=pair[1]))


def test_all_intruders_kept_are_projected(adapted, monkeypatch):
    """Against the definition, with every intruder of the top k, whatever is scaled."""
    found, seen = weights_at(adapted, monkeypatch, scales=[0.0], k=6, which="all")
    whole = fl.find_intruders(adapted, k=6, null_draws=0, progress=False)
    verdict = whole.verdict().sel(side="left").isel(rank=slice(6))
    assert len(found.scaled()) == whole.count() == found.data["count"].values[-1]
    for name in found.scaled()["matrix"].unique():
        u, s, vh = naive_svd(adapted, name)
        ranks = np.flatnonzero(verdict.sel(matrix=name) == 1)
        p = u[:, ranks] @ u[:, ranks].T
        w0 = seen[("base",)][name]
        close(seen["keep", "intruder", whole.count()][name], w0 + p @ ((u * s) @ vh - w0))
        close(seen["scale", "intruder", 0.0][name], (np.eye(len(p)) - p) @ ((u * s) @ vh))
    curves = {c.method: c for c in found.curves("task", metric="logprob")}
    assert len(curves) == 6
    for curve in curves.values():
        assert (np.diff(curve.shares) >= 0).all()
        assert curve.values.shape == (len(curve.labels), 6)
    alone, without = curves["intruders alone"], curves["all but intruders"]
    assert alone.shares[-1] == whole.count() / found.directions == pytest.approx(1 - without.shares[0])
    assert found.directions == sum(min(m.base.shape) for m in adapted.matrices(adapted.names(embeddings=False)))
    np.testing.assert_array_equal(
        without.values[0],
        found.examples("recovered", "task", metric="logprob", part="remove", kind="intruder", count=whole.count()),
    )


@pytest.mark.parametrize("which", ["top", "all"])
def test_the_control_is_never_an_intruder(adapted, which):
    whole = fl.find_intruders(adapted, k=8, null_draws=0, progress=False)
    options = {"k": 8, "which": which, "scales": [1], "found": whole, "recovery": False}
    found = fl.scale_intruders(adapted, PROMPTS, **OPTIONS | options)
    verdict = whole.verdict().sel(side="left")
    for arm, expected in (("intruder", 1), ("neighbour", 0)):
        chosen = found.scaled(arm)
        assert len(chosen)
        assert not chosen.duplicated(["matrix", "rank"]).any()
        assert all(int(verdict.sel(matrix=m, rank=r)) == expected for m, r in chosen[["matrix", "rank"]].values)


def test_what_is_kept_beside_intruders_is_none(adapted):
    """As many in each matrix, of the top k, drawn anew each time; the leading ones are the first that are left."""
    whole = fl.find_intruders(adapted, k=12, null_draws=0, progress=False)
    verdict = whole.verdict().sel(side="left").to_series().to_dict()
    options = {"epsilon": 0.5, "k": 12, "side": "left", "which": "top", "live": set(adapted.names()), "seed": 0}
    ordered = scale._planned(whole, random_draws=2, **options).ordered
    intruders = ordered.pop("intruder")
    sigma = whole.data.sigma.to_series()
    assert [sigma[name, rank + 1] for name, rank in intruders] == sorted(
        (sigma[key] for key, v in verdict.items() if v == 1 and key[1] <= 12), reverse=True
    )
    assert list(ordered) == ["leading", "random 1", "random 2"]
    for directions in ordered.values():
        there = [d for d in directions if d is not None]
        assert len(set(there)) == len(there) > 0
        assert all(verdict[name, rank + 1] == 0 and rank < 12 for name, rank in there)
        assert all(d is None or d[0] == beside[0] for d, beside in zip(directions, intruders, strict=True))
    assert ordered["random 1"] != ordered["random 2"]
    for name in {name for name, _ in intruders}:
        taken = [d[1] for d in ordered["leading"] if d is not None and d[0] == name]
        assert taken == [r for r in range(12) if verdict[name, r + 1] == 0][: len(taken)]


def test_the_nearest_neighbour():
    """1 intruder, 0 none, −1 undetermined: the nearest, the lower σ where two are as near, none twice."""
    verdict = np.array([0, 1, -1, 0, 1, 0, -2, -2])
    assert scale._neighbours(verdict, [1]) == [0]
    assert scale._neighbours(verdict, [4]) == [5]
    assert scale._neighbours(verdict, [1, 4]) == [0, 5]
    assert scale._neighbours(np.array([0, 1, 0]), [1]) == [2]
    assert scale._neighbours(np.array([1, 1, 0]), [0, 1]) == [2]
    assert scale._neighbours(np.array([1, -1]), [0]) == []
    assert scale._beside([("a", 0), ("b", 3), ("a", 2)], {"a": [1], "b": [0, 1]}) == [("a", 1), ("b", 0), None]
    assert [scale._doubling(n) for n in (0, 1, 2, 3, 4, 5)] == [[], [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 5]]


def test_a_matrix_without_a_neighbour_is_named(adapted):
    whole = fl.find_intruders(adapted, k=1, null_draws=0, progress=False, ranks=1)  # no other vector was looked at
    found = fl.scale_intruders(adapted, PROMPTS, k=1, scales=[0, 1], found=whole, **OPTIONS)
    assert len(found.scaled())
    assert found.scaled("neighbour").empty
    assert "left out of the control" in found.summary()
    assert "nothing to compare with" in found.summary()
    assert found.to_frame()["difference"].isna().all()
    assert found.to_frame()["intruder_change"].notna().all()
    assert fl.plots.figures_of(found)["accuracy"]()


def test_no_intruder_is_said(library, tmp_path, tokenizer):
    tuned, _ = planted(library, tmp_path, size=0.0)
    found = fl.scale_intruders(
        fl.ModelPair.load(library.saved("llama"), tuned, tokenizer=tokenizer), PROMPTS, **OPTIONS
    )
    assert found.summary().startswith("Nothing to scale: no vector among the top 10 left singular vectors")
    assert found.scaled().empty
    assert found.curves("task") == []
    assert found.data.score.isnull().all()
    assert json.dumps(found.headline(), allow_nan=False)
    axes = fl.plots.intruder_scaling(found)
    assert [t.get_text() for t in axes[0].texts] == ["no intruder to scale"]
    found.save(tmp_path / "x.nc")
    assert fl.load(tmp_path / "x.nc").summary() == found.summary()
    matplotlib.pyplot.close("all")


def test_one_example_tells_no_difference(adapted):
    one = {"task": PROMPTS["task"][:1]}
    text = fl.scale_intruders(adapted, one, scales=[0, 1], **OPTIONS).summary()
    assert "one example tells no difference" in text
    assert "nan" not in text


def test_differences_are_paired(adapted):
    """The table against numpy, with the bootstrap of the same draws."""
    from finetune_lens import stats

    found = fl.scale_intruders(adapted, PROMPTS, scales=[0, 1, 2], recovery=False, **OPTIONS)
    frame = found.to_frame()
    assert len(frame) == 2 * 2 * 3
    row = frame.set_index(["file", "metric", "scale"]).loc[("before", "logprob", 2.0)]
    keep = found.data["file"].values == "before"
    scores = {a: found.data.score.sel(arm=a, scale=2.0, metric="logprob").values[keep] for a in scale.ARMS}
    tuned = found.data.tuned_score.sel(metric="logprob").values[keep]
    assert row["examples"] == len(tuned) == 9
    assert row["intruder_change"] == pytest.approx((scores["intruder"] - tuned).mean())
    difference = scores["intruder"] - scores["neighbour"]
    assert row["difference"] == pytest.approx(difference.mean())
    low, high = map(float, stats.interval_of_mean(difference))
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((low, high))


def test_readings():
    import pandas as pd

    from finetune_lens.results.intruder_scaling import _reading

    def read(intruder, neighbour, difference, base=0.0):
        row = {"base": base, "tuned": 0.5, "difference": difference}
        for name, value in (("intruder", intruder), ("neighbour", neighbour), ("difference", difference)):
            row |= {f"{name}_change": value, f"{name}_low": value - 0.05, f"{name}_high": value + 0.05}
        return _reading(pd.Series(row))

    assert read(-0.4, -0.1, -0.3) == "scaling intruders hurts more than scaling neighbours"
    assert read(-0.1, -0.4, 0.3) == "scaling neighbours hurts more than scaling intruders"
    assert read(0.4, 0.1, 0.3, base=1) == "scaling intruders restores more than scaling neighbours"
    assert read(0.4, 0.1, 0.3) == "scaling intruders helps more than scaling neighbours"
    assert read(0.0, 0.3, -0.3, base=1) == "scaling neighbours restores more than scaling intruders"
    assert read(0.04, -0.04, 0.08) == "scaling intruders leaves it higher than scaling neighbours"
    assert "covers 0" in read(-0.4, -0.4, 0.0)


def test_round_trip_and_figures(adapted, tmp_path):
    found = fl.scale_intruders(adapted, PROMPTS, scales=[0, 0.5, 1], **OPTIONS)
    found.save(tmp_path / "x.nc")
    again = fl.load(tmp_path / "x.nc")
    assert again.summary() == found.summary()
    assert again.to_frame().equals(found.to_frame())
    assert json.dumps(again.headline(), allow_nan=False) == json.dumps(found.headline(), allow_nan=False)
    assert again.provenance["prompts"]["task"]["count"] == 6
    axes = fl.plots.intruder_scaling(again, metric="logprob")
    for ax, file in zip(axes, ("task", "before"), strict=True):
        frame = found.to_frame()
        part = frame[(frame.file == file) & (frame.metric == "logprob")]
        drawn = {line.get_color(): line for line in ax.lines if len(line.get_xdata()) == 3}
        assert [list(line.get_ydata()) for line in drawn.values()] == [list(part.intruder), list(part.neighbour)]
    assert set(fl.plots.figures_of(again)) == {"accuracy", "logprob"}
    matplotlib.pyplot.close("all")


def test_an_interrupted_run_continues(adapted, tmp_path, monkeypatch):
    options = {"scales": [0, 0.5], "recovery": False, "partial": tmp_path / "kept"} | OPTIONS
    original, calls = measure, []

    def counted(*args, **more):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*args, **more)

    monkeypatch.setattr("finetune_lens.evaluation.measure", counted)
    with pytest.raises(KeyboardInterrupt):
        fl.scale_intruders(adapted, PROMPTS, **options)
    found = fl.scale_intruders(adapted, PROMPTS, **options)
    assert len(calls) == 6 + 2 * (2 + 4) - 4  # two files; two models whole before
    whole = fl.scale_intruders(adapted, PROMPTS, **options | {"partial": None})
    assert found.to_frame().equals(whole.to_frame())


def test_bad_input(pair, adapted, library, tmp_path):
    for options, message in (
        ({"scales": []}, "scales are one or more"),
        ({"scales": [0, float("nan")]}, "scales are one or more"),
        ({"which": "some"}, "which is one of top, all"),
        ({"side": "both"}, "one side is scaled"),
        ({"random_draws": -1}, "random_draws is at least 0"),
    ):
        with pytest.raises(InputError, match=message):
            fl.scale_intruders(pair, PROMPTS, **OPTIONS | options)
    with pytest.raises(InputError, match="nothing to measure on"):
        fl.scale_intruders(pair, {}, **OPTIONS)
    found = fl.find_intruders(adapted, null_draws=0, progress=False)
    with pytest.raises(InputError, match="those of another pair"):
        fl.scale_intruders(pair, PROMPTS, found=found, **OPTIONS)
    with pytest.raises(InputError, match="no file 'other'"):
        fl.scale_intruders(pair, PROMPTS, scales=[1], recovery=False, **OPTIONS).curves("other")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["intruders", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        intruders.main()
    return stop.value.code


@pytest.fixture
def files(library, tmp_path, tokenizer):
    """BASE, TUNED and the options that every command here has; two prompt files."""
    for name, rows in PROMPTS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = [library.saved("llama"), planted(library, tmp_path)[0], "--tokenizer", tokenizer, "--quiet"]
    return models, [tmp_path / "task.jsonl", tmp_path / "before.jsonl"]


def test_command(files, tmp_path, monkeypatch, capsys):
    models, (task, before) = files
    arguments = [*models, "--out", tmp_path / "o", "--scale", "0:2:0.5", "--eval", task, "--eval", before]
    arguments += ["--null-draws", 0, "--no-recovery", "--no-plots"]
    assert run(monkeypatch, *arguments, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "intruders"
    assert record["intruder_scaling"]["headline"]["scaled"] == 1
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "intruder_scaling.csv", "intruder_scaling.nc", "intruders.csv", "intruders.nc", "run.json",
    ]  # fmt: skip
    assert set(json.loads((tmp_path / "o" / "run.json").read_text())) == {"intruders", "intruder_scaling"}
    found = fl.load(tmp_path / "o" / "intruder_scaling.nc")
    assert found.scales == [0, 0.5, 1, 1.5, 2]
    assert found.files == ["task", "before"]
    again = fl.scale_intruders(
        fl.ModelPair.load(*models[:2], tokenizer=models[3]), PROMPTS, scales=found.scales, recovery=False, **OPTIONS
    )
    assert again.to_frame().equals(found.to_frame())
    (tmp_path / "o" / "intruders.nc").unlink()
    assert run(monkeypatch, *arguments) == 2
    assert "intruder_scaling.nc exists" in capsys.readouterr().err


def test_command_without_an_intruder(library, tmp_path, tokenizer, files, monkeypatch, capsys):
    _, (task, _) = files
    base = library.saved("llama")
    out = ["--out", tmp_path / "same", "--tokenizer", tokenizer, "--quiet", "--no-plots"]
    assert run(monkeypatch, base, base, *out, "--scale", "0,1", "--eval", task) == 0
    assert "Nothing to scale" in capsys.readouterr().out
    assert (tmp_path / "same" / "intruder_scaling.nc").is_file()


def test_bad_commands(files, tmp_path, monkeypatch, capsys):
    models, (task, _) = files
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((models[1] / "model.safetensors").read_bytes())
    scaled = ["--scale", "0:1:0.5", "--eval", task]
    for arguments, message in (
        ([*models, "--scale", "0:1:0.5"], "pass --eval"),
        ([*models, "--eval", task], "pass --scale too"),
        ([*models, models[1], *scaled], "--scale takes one TUNED; found 2"),
        ([*models, *scaled, "--side", "both"], "one side is scaled"),
        ([*models, *scaled, "--which", "none"], "which is one of"),
        ([*models, "--scale", "0:1", "--eval", task], "FIRST:LAST:STEP"),
        ([*models, *scaled, "--eval", task], "twice"),
        ([*models, *scaled, "--eval", tmp_path / "nowhere.jsonl"], "nowhere.jsonl is not there"),
        ([weights, weights, *models[2:], *scaled], "pass --config"),
        ([*models[:2], "--quiet", *scaled], "tokenizer"),
    ):
        assert run(monkeypatch, *arguments, "--out", tmp_path / "out") == 2, arguments
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1
        assert not (tmp_path / "out").exists()
