"""Cross-model patching finds the head or MLP whose weights were changed, and only where the method can see it."""

import copy
import json
import string
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from test_patching import letters

import finetune_lens as fl
from finetune_lens.cmap import DIRECTIONS, cross_patch, others_of_the_same_length
from finetune_lens.errors import GateFailed, InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.pair import ModelPair
from finetune_lens.results.cmap import CrossPatching

TEXTS = ["abcde", "fghij", "klmno", "pqrst", "uvwxy", "zabcd", "defgh", "hijkl"]
D_HEAD = 8


def cross(base: Any, tuned: Any, prompts: Any, *, tokenizer: Any = None, **options: Any) -> CrossPatching:
    pair = ModelPair.load(base, tuned, tokenizer=tokenizer or letters())
    return cross_patch(pair, prompts, progress=False, **options)


def told_apart(base: Any, tuned: Any) -> list[dict[str, str]]:
    """Prompts whose answer is what the tuned model raises most, and whose wrong answer what it lowers most."""
    found = []
    for text in TEXTS:
        ids = torch.tensor([letters()(f"{text}=")["input_ids"]])
        difference = (tuned(ids).logits - base(ids).logits)[0, -1, 1:27]  # the letters
        best, worst = (string.ascii_lowercase[int(at)] for at in (difference.argmax(), difference.argmin()))
        found.append({"prompt": f"{text}=", "answer": best, "wrong": worst})
    return found


def edited(model: Any, family: str, what: str, layer: int, head: int) -> Any:
    """A copy in which one head's W_V (of its group of query heads) or W_O, or one MLP, has other weights."""
    tuned = copy.deepcopy(model)
    mine = slice(head * D_HEAD, (head + 1) * D_HEAD)
    if family == "gpt2":
        block = tuned.transformer.h[layer]
        weight = {"v": block.attn.c_attn, "o": block.attn.c_proj, "mlp": block.mlp.c_proj}[what].weight
        part = {"v": weight[:, 64 + mine.start : 64 + mine.stop], "o": weight[mine], "mlp": weight}[what]
    else:
        block = tuned.model.layers[layer]
        weight = {"v": block.self_attn.v_proj, "o": block.self_attn.o_proj, "mlp": block.mlp.down_proj}[what].weight
        part = {"v": weight[mine], "o": weight[:, mine], "mlp": weight}[what]
    with torch.no_grad():
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    return tuned


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def family(request):
    return request.param


@pytest.mark.parametrize("layer", [0, 1])
def test_a_changed_value_head(library, family, layer):
    """z-CMAP ranks it first, both ways, with all of the difference; heads beside it and below it read exactly 0."""
    base = library.model(family)
    tuned = edited(base, family, "v", layer, 1)
    found = cross(base, tuned, told_apart(base, tuned))
    heads = [1] if family == "gpt2" else [2, 3]  # the query heads that read key/value head 1
    assert found.data.self_donor.values.tolist() == [0, 0]
    for direction in DIRECTIONS:
        sign = 1 if direction == "tuned→base" else -1
        frame = found.top(direction=direction)
        first = frame.iloc[: len(heads)]
        assert {(r.layer, r.head) for r in first.itertuples()} == {(layer, h) for h in heads}
        assert (sign * first.effect > 0).any()
        full = cross(base, tuned, told_apart(base, tuned), method="full", direction=direction, controls=False)
        effect = full.data.logit_diff.sel(direction=direction)
        others = [h for h in range(4) if h not in heads]
        assert np.abs(effect.sel(layer=layer, head=others)).max() == 0
        assert np.abs(effect.sel(layer=range(layer))).max() == 0 if layer else True
        assert np.abs(effect.sel(layer=layer, head=heads)).max() > 0.01
    together = cross(
        base, tuned, told_apart(base, tuned), sets={"both": [f"blocks.{layer}.attn.hook_z[{h}]" for h in heads]}
    )
    np.testing.assert_allclose(together.recovery().ratio, 1, atol=1e-3)
    values = cross(base, tuned, told_apart(base, tuned), site="v", controls=False)
    np.testing.assert_allclose(values.recovery().ratio.sel(layer=layer, head=1), 1, atol=1e-3)


@pytest.mark.parametrize("what", ["o", "mlp"])
def test_a_changed_output(library, family, what):
    """A head's W_O is invisible in z and is all of the difference in its result and its layer's output; so an MLP."""
    base = library.model(family)
    tuned = edited(base, family, what, 0, 2)
    prompts = told_apart(base, tuned)
    for direction in DIRECTIONS:
        z = cross(base, tuned, prompts, direction=direction, controls=False, method="full").data.logit_diff
        assert np.abs(z.sel(layer=0)).max() == 0
        assert np.abs(z.sel(layer=1)).max() > 0  # later heads read what was written
        if what == "o":
            result = cross(base, tuned, prompts, site="result", direction=direction, controls=False)
            top = result.top(1).iloc[0]
            assert (top["layer"], top["head"]) == (0, 2)
            assert top["recovery"] == pytest.approx(1, abs=1e-3)
            assert np.abs(result.data.logit_diff.sel(layer=0, head=[0, 1, 3])).max() < 1e-5
        sites = {s: cross(base, tuned, prompts, site=s, by=["layer"], direction=direction, controls=False)
                 for s in ("attn_out", "mlp_out")}  # fmt: skip
        right, other = ("attn_out", "mlp_out") if what == "o" else ("mlp_out", "attn_out")
        top = sites[right].top(1).iloc[0]
        assert top["layer"] == 0
        assert top["recovery"] == pytest.approx(1, abs=1e-3)
        assert (sites[other].recovery().ratio.sel(layer=0) < 0.9).all()
        if what == "mlp":
            assert np.abs(sites[other].data.logit_diff.sel(layer=0)).max() < 1e-5


def test_signs(library, family):
    """Recipient and donor are the two models' own runs; an effect adds to the recipient's."""
    base = library.model(family)
    tuned = edited(base, family, "mlp", 0, 0)
    prompts = told_apart(base, tuned)
    found = cross(base, tuned, prompts, site="resid_post", by=["layer"]).data
    own = {}
    for name, module in (("base", base), ("tuned", tuned)):
        logits = torch.stack(
            [module(torch.tensor([letters()(p["prompt"])["input_ids"]])).logits[0, -1] for p in prompts]
        )
        at = np.arange(len(prompts))
        right, wrong = ([letters()(p[side])["input_ids"][0] for p in prompts] for side in ("answer", "wrong"))
        own[name] = (logits[at, right] - logits[at, wrong]).numpy()
    for direction, (donor, recipient) in zip(DIRECTIONS, (("tuned", "base"), ("base", "tuned")), strict=True):
        one = found.sel(direction=direction)
        np.testing.assert_allclose(one.recipient_logit_diff, own[recipient], atol=1e-5)
        np.testing.assert_allclose(one.donor_logit_diff, own[donor], atol=1e-5)
        np.testing.assert_allclose(one.logit_diff.sel(layer=1), own[donor] - own[recipient], atol=1e-5)
    assert (own["tuned"] > own["base"]).all()
    ascii_name = cross(base, tuned, prompts, site="resid_post", by=["layer"], direction="base->tuned", controls=False)
    assert ascii_name.directions == ["base→tuned"]
    np.testing.assert_allclose(ascii_name.data.logit_diff[0], found.logit_diff[1], atol=1e-6)
    gap = cross(base, tuned, prompts, controls=False).gap().set_index("direction")
    assert gap.loc["tuned→base", "difference"] == pytest.approx((own["tuned"] - own["base"]).mean(), abs=1e-5)


def test_random_donors(library, family):
    """The control's donor is the donor's model on another prompt of the same length; the null says what cells do."""
    base = library.model(family)
    tuned = edited(base, family, "v", 0, 1)
    prompts = told_apart(base, tuned)
    found = cross(base, tuned, prompts, seed=3, direction="tuned→base")
    order = others_of_the_same_length(np.full(len(prompts), 6), 3)
    tuned_model, base_model = (HookedModel(m) for m in (tuned, base))
    ids = torch.tensor([letters()(p["prompt"])["input_ids"] for p in prompts])
    z = tuned_model.run(ids, capture=["blocks.1.attn.hook_z"]).cache["blocks.1.attn.hook_z"][order]

    def put(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, :, 2] = z[:, :, 2]
        return x

    logits = base_model.run(ids, edits=[("blocks.1.attn.hook_z", put)]).logits[:, -1] - base(ids).logits[:, -1]
    at = np.arange(len(prompts))
    right, wrong = ([letters()(p[side])["input_ids"][0] for p in prompts] for side in ("answer", "wrong"))
    random = found.data.random_logit_diff
    expected = (logits[at, right] - logits[at, wrong]).numpy()
    np.testing.assert_allclose(random.isel(direction=0).sel(layer=1, head=2), expected, atol=1e-5)
    again = cross(base, tuned, prompts, seed=3, direction="tuned→base")
    assert again.data.drop_attrs().equals(found.data.drop_attrs())
    other = cross(base, tuned, prompts, seed=4, direction="tuned→base")
    assert not np.allclose(other.data.random_logit_diff, random)
    median, low, high = found.null(direction="tuned→base")
    cells = random.mean("example").values.ravel()
    assert (median, low, high) == pytest.approx((np.median(cells), *np.quantile(cells, (0.025, 0.975))))
    frame = found.to_frame()
    np.testing.assert_allclose(frame.random_effect, cells, atol=1e-9)
    np.testing.assert_allclose(frame.specific, frame.effect - frame.random_effect, atol=1e-9)
    assert ((frame.specific_low <= frame.specific) & (frame.specific <= frame.specific_high)).all()
    assert f"random donors, all cells: median effect {median:+.3g}" in found.summary()
    assert found.headline()["tuned→base"]["random_donor"] == pytest.approx([low, high])


def test_others_of_the_same_length():
    """Each prompt's random donor is another one of its length, each used once; −1 where there is no other."""
    order = np.random.default_rng(0)
    for seed in range(50):
        lengths = order.integers(3, 7, order.integers(1, 20))
        chosen = others_of_the_same_length(lengths, seed)
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length)
            if len(same) == 1:
                assert chosen[same].tolist() == [-1]
            else:
                assert sorted(chosen[same]) == sorted(same)
                assert (chosen[same] != same).all()
        assert np.array_equal(chosen, others_of_the_same_length(lengths, seed))


def test_prompts_of_different_lengths(library):
    """A prompt alone of its length has no random donor; the lengths that count are the prompts', not the answers'."""
    base = library.model("llama")
    tuned = edited(base, "llama", "v", 0, 1)
    prompts = told_apart(base, tuned)[:4]
    prompts[2]["prompt"] = "abcdefgh="
    found = cross(base, tuned, prompts, align="right")
    missing = np.isnan(found.data.random_logit_diff)
    assert missing.all(["direction", "layer", "head"]).values.tolist() == [False, False, True, False]
    assert not missing.isel(example=[0, 1, 3]).any()
    assert not np.isnan(found.data.logit_diff).any()
    whole = [{"prompt": f"{t}=", "answer": a} for t, a in (("abcde", "f"), ("fghij", "kl"), ("mno", "pqrs"))]
    found = cross(base, tuned, whole, align="left", whole_answer=True, metric="logprob", by=["position"])
    there = np.isfinite(found.data.random_logprob.isel(direction=0))
    assert there.sel(position=0).values.tolist() == [True, True, False]
    assert there.isel(example=[0, 1]).all()
    with pytest.raises(InputError, match=r"random donors need another prompt .*controls=False"):
        cross(base, tuned, [whole[0], {**whole[2], "answer": "p"}], align="left", metric="logprob")


def test_what_has_no_file_is_not_kept(library, tmp_path):
    """Numbers of a model in memory, which may change under the same name, do not wait for another call."""
    base = library.model("gpt2")
    tuned = edited(base, "gpt2", "v", 0, 1)
    prompts = told_apart(base, tuned)
    cross(library.saved("gpt2"), tuned, prompts, partial=tmp_path / "chunks", controls=False)
    assert not (tmp_path / "chunks").exists()
    tuned.save_pretrained(tmp_path / "tuned")
    cross(library.saved("gpt2"), tmp_path / "tuned", prompts, partial=tmp_path / "chunks", controls=False)
    assert len(list((tmp_path / "chunks").iterdir())) == 2  # a folder each direction


def test_a_saved_result(library, tmp_path):
    base = library.model("gpt2")
    tuned = edited(base, "gpt2", "v", 0, 1)
    prompts = [{**p, "kind": "ab"[i % 2]} for i, p in enumerate(told_apart(base, tuned))]
    found = cross(base, tuned, prompts, by=["head", "position"], positions=[0, -1], method="both")
    again = fl.load(found.save(tmp_path / "cmap.nc"))
    assert type(again) is CrossPatching
    assert again.to_frame().equals(found.to_frame())
    assert again.summary() == found.summary()
    assert json.loads(json.dumps(again.headline(), allow_nan=False)) == json.loads(json.dumps(found.headline()))
    assert found.dims == ("head", "position")
    assert set(found.data.logit_diff.dims) == {"direction", "head", "position", "example"}
    assert "self-donor, every place at once: no change" in found.summary()
    assert found.provenance["analysis"] == "cross_patch"
    assert len(found.agreement()) == 2
    bare = cross(base, tuned, prompts, controls=False)
    assert not bare.has_null
    assert "random" not in bare.summary()
    assert "specific" not in bare.to_frame()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"direction": "nothing"}, "direction is one of tuned→base, base→tuned, both; found 'nothing'"),
        ({"template": "tuned"}, "template is none or each, for all sides read the same tokens"),
        ({"template": "each"}, "no chat template"),
        ({"site": "nothing"}, "site 'nothing' is unknown"),
        ({"heads": [4]}, "heads 0 to 3; found head 4"),
        ({"sets": {}}, "found an empty one"),
    ],
)
def test_bad_input(library, options, words):
    base = library.model("gpt2")
    prompts = [{"prompt": text, "answer": "a", "wrong": "b"} for text in ("ab=", "cd=")]
    with pytest.raises(InputError, match=words):
        cross(base, edited(base, "gpt2", "v", 0, 1), prompts, **options)


def test_pairs_that_do_not_fit(library, tmp_path):
    """Another depth, another width, other tokens: each is said."""
    import transformers

    prompts = [{"prompt": "ab=", "answer": "a", "wrong": "b"}, {"prompt": "cd=", "answer": "a", "wrong": "b"}]
    config = library.configs["llama"]()
    config.num_hidden_layers = 3
    deeper = transformers.LlamaForCausalLM(config).eval()
    with pytest.raises(InputError, match=r"2 layers and .* 3; expected models of one depth|cannot be aligned"):
        cross(library.model("llama"), deeper, prompts)
    with pytest.raises(InputError, match=r"cannot be aligned|two versions of one architecture"):
        cross(library.model("llama"), library.model("qwen3"), prompts)
    base = library.model("llama")
    tuned = edited(base, "llama", "v", 0, 1)
    for name, module, tokenizer in (("base", base, letters()), ("tuned", tuned, shifted(letters()))):
        module.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pair = ModelPair.load(str(tmp_path / "base"), str(tmp_path / "tuned"))
    with pytest.raises(InputError, match=r"same tokens different ids|read prompt 1 differently"):
        cross_patch(pair, prompts, progress=False)
    assert cross(str(tmp_path / "base"), str(tmp_path / "tuned"), prompts).data.sizes["example"] == 2
    with pytest.raises(InputError, match="has no tokenizer beside its weights"):
        cross_patch(ModelPair.load(base, tuned), prompts, progress=False)


def shifted(tokenizer: Any) -> Any:
    """The same tokens under other ids."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = facts["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(facts)), pad_token="<pad>")


@pytest.mark.parametrize("site", ["z", "result", "attn_out"])
def test_an_adapter_on_shared_weights_is_the_merged_model(library, tmp_path, site):
    """Whole outputs of heads pass through the donor's own output projection, its adapter on or off."""
    from peft import PeftModel
    from test_check import adapter_folder

    folder = adapter_folder(library.fresh("llama"), tmp_path, target_modules=["q_proj", "v_proj", "o_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT uses of transformers is deprecated
        merged = PeftModel.from_pretrained(library.fresh("llama"), folder).merge_and_unload()
    prompts = told_apart(library.model("llama"), merged)
    for method in ("exact", "full", "attribution"):
        found = cross(library.saved("llama"), folder, prompts, site=site, method=method)
        expected = cross(library.model("llama"), merged, prompts, site=site, method=method)
        for name in ("logit_diff", "random_logit_diff"):
            np.testing.assert_allclose(found.data[name].values, expected.data[name].values, atol=1e-4)
        assert float(found.data["self_donor"].max()) < 1e-5


def test_a_run_that_changes_when_patched_with_itself_is_refused(library, monkeypatch):
    base = library.model("llama")
    tuned = edited(base, "llama", "v", 0, 1)
    prompts = told_apart(base, tuned)
    for site, off in (
        ("z", 1e-7),
        ("result", 0.5),
    ):  # nothing at all; rounding alone
        monkeypatch.setattr("finetune_lens.cmap._self_donor", lambda *arguments, off=off: off)
        with pytest.raises(GateFailed, match=r"patched with itself changes by .*check=False"):
            cross(base, tuned, prompts, site=site)
        assert float(cross(base, tuned, prompts, site=site, check=False).data["self_donor"].max()) == off
    monkeypatch.setattr("finetune_lens.cmap._self_donor", lambda *arguments: 1e-7)
    cross(base, tuned, prompts, site="result")


def test_what_is_specific_to_the_prompt_stands_beside_the_effect(library):
    base = library.model("llama")
    tuned = edited(base, "llama", "v", 0, 1)
    found = cross(base, tuned, told_apart(base, tuned))
    frame = found.to_frame()
    for direction in DIRECTIONS:
        (first, *_) = found.headline()[direction]["top"]
        row = frame[(frame["direction"] == direction) & (frame["effect"] == first["effect"])].iloc[0]
        assert first["specific"] == row["specific"]
        assert f"beyond another prompt's donor ({row['random_effect']:+.3g}): {row['specific']:+.3g}" in found.summary()
