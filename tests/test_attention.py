"""Attention of two models against plain eager passes and loops; equals do not differ; an edited head is found."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from test_check import command, tuned_copy
from test_patching import letters

import finetune_lens as fl
from finetune_lens import attention as module
from finetune_lens import plots
from finetune_lens.errors import GateFailed, InputError
from finetune_lens.results.attention import Attention

TEXTS = ["abcde=", "fg=", "klmnoqw=", "pqrst=", "u="]


def compare(base, tuned, texts=TEXTS, *, tokenizer=None, **options):
    pair = fl.ModelPair.load(base, tuned, tokenizer=tokenizer or letters())
    return fl.compare_attention(pair, texts, **{"check": False, "progress": False} | options)


def plain(model, text):
    """(layer, head, query, key) of one text by Hugging Face's own eager attention."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(torch.tensor([letters()(text)["input_ids"]]), output_attentions=True)
    return np.stack([a[0].double().numpy() for a in out.attentions])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2-sliding", "neox"])
@pytest.mark.parametrize("batch_size", [1, None])
def test_against_a_loop(library, family, batch_size):
    base = library.model(family)
    tuned = tuned_copy(base)
    found = compare(base, tuned, batch_size=batch_size).data
    assert found.sizes["kept"] == 4
    for row, text in enumerate(TEXTS):
        p, q = plain(base, text), plain(tuned, text)
        one = found.isel(example=row)
        for layer in range(p.shape[0]):
            for head in range(p.shape[1]):
                cell = one.sel(layer=layer, head=head)
                pairs = list(zip(p[layer, head], q[layer, head], strict=True))
                js = np.mean([jensenshannon(a, b) ** 2 for a, b in pairs])
                assert float(cell["divergence"]) == pytest.approx(js, abs=1e-6)
                for side, maps in (("base", p), ("tuned", q)):
                    spread = np.mean([entropy(a) for a in maps[layer, head]])
                    assert float(cell["entropy"].sel(side=side)) == pytest.approx(spread, abs=1e-5)
                    first = maps[layer, head, :, 0].mean()
                    assert float(cell["first"].sel(side=side)) == pytest.approx(first, abs=1e-5)
        if row < 4:
            n = len(text)
            kept = found.isel(kept=row)
            for side, maps in (("base", p), ("tuned", q)):
                np.testing.assert_allclose(kept["pattern"].sel(side=side)[..., :n, :n], maps, atol=1e-5)
            assert np.isnan(kept["pattern"].values[..., n:, :]).all()
            assert np.isnan(kept["pattern"].values[..., n:]).all()
            assert "".join(kept["token"].values) == text


def test_a_sink_is_one_more_place(library):
    """gpt-oss learns a logit for attending to nothing: rows do not sum to 1."""
    base = library.model("gpt-oss")
    tuned = tuned_copy(base)
    found = compare(base, tuned).data
    p, q = (plain(model, TEXTS[0]) for model in (base, tuned))
    assert p.sum(-1).min() < 0.9
    p, q = (np.concatenate([a, 1 - a.sum(-1, keepdims=True)], -1) for a in (p, q))
    js = [[np.mean([jensenshannon(a, b) ** 2 for a, b in zip(*h, strict=True)]) for h in zip(*m, strict=True)]
          for m in zip(p, q, strict=True)]  # fmt: skip
    np.testing.assert_allclose(found["divergence"].isel(example=0), js, atol=1e-6)
    np.testing.assert_allclose(
        found["entropy"].sel(side="base").isel(example=0), entropy(p, axis=-1).mean(-1), atol=1e-5
    )


@pytest.mark.parametrize("family", ["gpt2", "gpt-oss"])
def test_identical_models(library, family):
    base = library.model(family)
    result = compare(base, copy.deepcopy(base))
    assert (result.data["divergence"] == 0).all()
    assert (result.to_frame()["entropy_difference"] == 0).all()
    assert result.headline()["beyond_rounding"] == 0


def test_rounding_is_measured(library, monkeypatch):
    """What the base differs from itself by, prompts one by one: here by an error that hangs on the batch."""
    base = library.model("llama")
    real = module._patterns

    def off(model, encoded, chosen):
        found = real(model, encoded, chosen)
        return [(a + 1e-3 * (len(encoded) > 1)) / (a + 1e-3 * (len(encoded) > 1)).sum(-1, keepdim=True) for a in found]

    assert compare(base, tuned_copy(base)).data["floor"].max() < 1e-9
    monkeypatch.setattr(module, "_patterns", off)
    result = compare(base, tuned_copy(base, 1e-4))
    assert result.data["floor"].sizes == {"kept": 4, "layer": 2, "head": 4}
    p = plain(base, TEXTS[0])
    q = p + 1e-3  # in a batch, and on the two columns of padding as well
    js = np.mean([jensenshannon(a, b / b.sum()) ** 2 for a, b in zip(p[1, 2], q[1, 2], strict=True)])
    assert float(result.data["floor"].isel(kept=0).sel(layer=1, head=2)) == pytest.approx(js, rel=1e-2)
    assert result.headline()["beyond_rounding"] == 0
    assert compare(base, tuned_copy(base, 0.3)).headline()["beyond_rounding"] > 0


def test_batches_and_padding_change_nothing(library):
    for family in ("llama", "gemma3-sliding", "opt"):
        base = library.model(family)
        tuned = tuned_copy(base)
        one, other = (compare(base, tuned, batch_size=size).data for size in (1, None))
        for name in ("divergence", "entropy", "first", "pattern"):
            np.testing.assert_allclose(one[name], other[name], atol=1e-5, err_msg=f"{family} {name}")


def test_one_edited_head_is_found(library):
    base = library.fresh("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():  # queries of head 2 in the last layer
        tuned.model.layers[1].self_attn.q_proj.weight[16:24] += 0.3
    result = compare(base, tuned)
    frame = result.to_frame().set_index(["layer", "head"])
    assert frame["divergence"].idxmax() == (1, 2)
    assert (frame.drop((1, 2))["divergence"] == 0).all()
    assert result.headline()["beyond_rounding"] == 1
    assert "  1.2: " in result.summary()
    axes = plots.attention_maps(result)
    assert "head 1.2" in axes[0].get_title()


def test_some_layers_and_heads(library):
    base = library.model("llama")
    whole, some = compare(base, tuned_copy(base)).data, compare(base, tuned_copy(base), layers=[1], heads=[3, 0]).data
    assert (some["layer"].values.tolist(), some["head"].values.tolist()) == ([1], [3, 0])
    for name in ("divergence", "floor", "pattern", "entropy"):
        np.testing.assert_allclose(some[name], whole[name].sel(layer=[1], head=[3, 0]), atol=1e-7)


def test_intervals_and_differences(library):
    base = library.model("llama")
    result = compare(base, tuned_copy(base))
    row = result.to_frame().iloc[5]
    values = result.data.sel(layer=row["layer"], head=row["head"])
    assert row["divergence"] == pytest.approx(float(values["divergence"].mean()))
    assert values["divergence"].min() <= row["low"] <= row["divergence"] <= row["high"] <= values["divergence"].max()
    shift = values["entropy"].sel(side="tuned") - values["entropy"].sel(side="base")
    assert row["entropy_difference"] == pytest.approx(float(shift.mean()))
    assert row["entropy_low"] <= row["entropy_difference"] <= row["entropy_high"]


def test_the_chat_template(library):
    from test_outputs import TEMPLATE

    base, tokenizer = library.model("llama"), letters()
    tokenizer.chat_template = TEMPLATE
    found = compare(base, tuned_copy(base), tokenizer=tokenizer, template="each").data
    assert "".join(found["token"].sel(kept="2").values) == "<pad>fg=<pad>="
    bare = compare(base, tuned_copy(base), ["fg="], tokenizer=tokenizer).data
    assert not np.allclose(bare["entropy"].sel(example="1"), found["entropy"].sel(example="2"))
    with pytest.raises(InputError, match="template is none or each"):
        compare(base, tuned_copy(base), template="tuned")


def test_few_maps_where_they_are_large(library, monkeypatch):
    monkeypatch.setattr(module, "MAPS", 2 * 2 * 4 * 8**2 * 2)
    base = library.model("llama")
    result = compare(base, tuned_copy(base))
    assert result.data.sizes["kept"] == 2
    assert "maps of 2 prompts only" in result.summary()
    assert compare(base, tuned_copy(base), keep=1).data.sizes["kept"] == 1


def test_memory_runs_out(library, monkeypatch):
    base = library.model("llama")
    whole = compare(base, tuned_copy(base))
    real, sizes = module._batch, []

    def small(sides, encoded, *rest):
        sizes.append(len(encoded))
        if len(encoded) > 2:
            raise torch.OutOfMemoryError
        return real(sides, encoded, *rest)

    monkeypatch.setattr(module, "_batch", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = compare(base, tuned_copy(base))
    assert sizes == [5, 2, 2, 1]
    np.testing.assert_allclose(found.data["divergence"], whole.data["divergence"], atol=1e-6)


def test_an_interrupted_comparison_continues(library, tmp_path, monkeypatch):
    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    sides = library.saved("llama"), tmp_path / "tuned"
    monkeypatch.setattr(module, "UNIT", 2)
    whole = compare(*sides, keep=3)
    assert whole.data.sizes["kept"] == 3
    real, calls = module._unit, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_unit", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(*sides, keep=3, partial=tmp_path / "chunks")
    found = compare(*sides, keep=3, partial=tmp_path / "chunks")
    assert len(calls) == 4
    assert found.data.drop_attrs().identical(whole.data.drop_attrs())


def test_refuses(library):
    base = library.model("llama")
    tuned = tuned_copy(base)
    for options, message in (
        ({"layers": [2]}, "layers: expected some of 0 to 1; found 2"), ({"heads": []}, "found none"),
        ({"heads": [-1]}, "0 to 3"), ({"keep": 0}, "at least 1"), ({"batch_size": 0}, "at least 1"),
        ({"texts": []}, "no prompts"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            compare(base, tuned, **options)
    with pytest.raises(GateFailed):
        compare(base, copy.deepcopy(base), check=True)
    with pytest.raises(InputError, match="pattern"):
        compare(library.model("mpt"), tuned_copy(library.model("mpt")))


def test_models_of_other_depth(library):
    import transformers

    base = library.model("llama")
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = 3
    deeper = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=r"2 layers of 4 heads and .* 3 of 4"):
        compare(base, deeper)


def test_saved_and_loaded(library, tmp_path):
    base = library.model("gpt2")
    for texts in (TEXTS, TEXTS[:1], ["a"]):
        found = compare(base, tuned_copy(base), texts)
        again = fl.load(found.save(tmp_path / "a.nc"))
        assert isinstance(again, Attention)
        assert again.summary() == found.summary()
        assert again.to_frame().equals(found.to_frame())
        json.dumps(found.headline(), allow_nan=False)


def test_the_command(library, tmp_path, monkeypatch, capsys):
    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    letters().save_pretrained(tmp_path / "letters")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS))
    words = [library.saved("llama"), tmp_path / "tuned", "p.jsonl", "--tokenizer", "letters", "--layers", "0-1"]
    done = command("finetune_lens.attention", *words, "--json", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["headline"]["heads"] == 8
    assert len(told["figures"]) == 4
    words = [library.saved("llama"), tmp_path / "tuned", tmp_path / "p.jsonl", "--tokenizer", tmp_path / "letters"]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words), "--heads", "9", "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    assert "heads: expected some of 0 to 3; found 9" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_figures(library):
    import matplotlib.pyplot as plt

    base = library.model("llama")
    result = compare(base, tuned_copy(base))
    axes = plots.attention_maps(result, head=(0, 1), example="3")
    kept = result.data["pattern"].sel(layer=0, head=1, kept="3").transpose("side", "query", "key").values[:, :8, :8]
    for ax, values in zip(axes, (*kept, kept[1] - kept[0]), strict=True):
        drawn = ax.images[0].get_array()
        np.testing.assert_array_equal(drawn[~drawn.mask], values[~drawn.mask])
        assert drawn.mask.sum() == 28  # what no query sees
        assert [t.get_text() for t in ax.get_xticklabels()] == list("klmnoqw=")
    assert axes[2].images[0].norm.vmin == -axes[2].images[0].norm.vmax
    ax = plots.attention_heads(result)
    frame = result.to_frame()
    np.testing.assert_allclose(ax.collections[0].get_array().ravel(), frame["divergence"])
    ax = plots.attention_heads(result, quantity="entropy")
    np.testing.assert_allclose(ax.collections[0].get_array().ravel(), frame["entropy_difference"])
    assert len(ax.collections[1].get_offsets()) == (frame["entropy_p_adjusted"] < 0.05).sum()
    for call, message in (
        (lambda: plots.attention_maps(result, head=(0, 9)), "heads 0, 1, 2, 3 were"),
        (lambda: plots.attention_maps(result, example="5"), "were not kept"),
        (lambda: plots.attention_heads(result, quantity="kl"), "quantity is one of"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    plt.close("all")


def test_a_long_prompt_is_cut(library):
    import matplotlib.pyplot as plt

    base = library.model("llama")
    text = "a" + "bcdefghijk" * 5
    result = compare(base, tuned_copy(base), [text])
    (ax, *_) = plots.attention_maps(result)
    assert "".join(t.get_text() for t in ax.get_yticklabels()) == "a" + text[-39:]
    plt.close("all")


def test_answers_are_no_matter_to_what_reads_texts_alone(library):
    base = library.model("llama")
    pair = fl.ModelPair.load(base, tuned_copy(base), tokenizer=letters())
    prompts = [{"prompt": text, "answer": "abc", "wrong": ["abd"]} for text in TEXTS]
    options = {"check": False, "progress": False}
    for function in (fl.compare_attention, fl.compare_representations):
        one, other = (function(pair, given, **options).to_frame() for given in (prompts, TEXTS))
        assert one.equals(other), function
    assert fl.check_pair(pair, prompts, progress=False).passed
