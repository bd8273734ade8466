"""Outputs of two models against plain passes and numpy; no difference of equals; what is planted is found."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax
from scipy.stats import entropy
from test_check import adapter_folder, command, tuned_copy
from test_patching import letters

import finetune_lens as fl
from finetune_lens import outputs as module
from finetune_lens.errors import GateFailed, InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked.reentry import read_out
from finetune_lens.results.outputs import Outputs

TEXTS = ["abcde=", "fg=", "klmnoqw=", "pqrst=", "u="]
FAMILIES = ("gpt2", "llama", "qwen3", "gemma2-sliding", "gemma3-sliding", "neox", "mistral", "mixtral", "opt", "bloom",
            "mpt", "falcon-rw", "codegen", "bigcode", "phi3", "gpt-oss")  # fmt: skip


def prompts(texts=TEXTS):
    return [{"prompt": text, "answer": text[0], "wrong": "z"} for text in texts]


def compare(base, tuned, items=None, *, tokenizer=None, **options):
    pair = fl.ModelPair.load(base, tuned, tokenizer=tokenizer or letters())
    options = {"check": False, "progress": False} | options
    return fl.compare_outputs(pair, prompts() if items is None else items, **options)


def plain(model, text):
    """Log-probabilities (pos, vocab) in float64, and the residual streams (depth, pos, d_model) by Hugging Face."""
    ids = torch.tensor([letters()(text)["input_ids"]])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    return ids[0].numpy(), log_softmax(out.logits[0].double().numpy(), -1), out.hidden_states


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2-sliding"])
@pytest.mark.parametrize("batch_size", [1, None])
def test_against_numpy(library, family, batch_size):
    base = library.model(family)
    tuned = tuned_copy(base)
    found = compare(base, tuned, batch_size=batch_size).data
    for text, e in zip(TEXTS, found["example"].values, strict=True):
        ids, p, _ = plain(base, text)
        _, q, _ = plain(tuned, text)
        n = len(text)
        one = found.sel(example=e)
        expected = {
            "kl": [entropy(np.exp(a), np.exp(b)) for a, b in zip(p, q, strict=True)],
            "kl_reverse": [entropy(np.exp(b), np.exp(a)) for a, b in zip(p, q, strict=True)],
            "js": [jensenshannon(np.exp(a), np.exp(b)) ** 2 for a, b in zip(p, q, strict=True)],
            "flip": p.argmax(-1) != q.argmax(-1),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(one[name].values[:n], values, atol=1e-5, err_msg=name)
            assert np.isnan(one[name].values[n:]).all()
        for side, logs in (("base", p), ("tuned", q)):
            here = one.sel(side=side)
            np.testing.assert_allclose(here["entropy"].values[:n], entropy(np.exp(logs), axis=-1), atol=1e-5)
            np.testing.assert_allclose(here["loss"].values[: n - 1], -logs[np.arange(n - 1), ids[1:]], atol=1e-5)
            assert np.isnan(here["loss"].values[n - 1 :]).all()
            assert list(here["top"].values[:n]) == [letters().decode([i]) for i in logs.argmax(-1)]
            np.testing.assert_allclose(here["top_prob"].values[:n], np.exp(logs).max(-1), atol=1e-5)
            right, wrong = (letters().convert_tokens_to_ids(c) for c in (text[0], "z"))
            np.testing.assert_allclose(float(here["logprob"]), logs[-1, right], atol=1e-5)
            np.testing.assert_allclose(float(here["logit_diff"]), logs[-1, right] - logs[-1, wrong], atol=1e-5)
            assert float(here["accuracy"]) == (logs[-1].argmax() == right)
        assert "".join(one["token"].values) == text


def test_tokens_of_the_vocabulary_against_numpy(library):
    base = library.model("llama")
    tuned = tuned_copy(base)
    found = compare(base, tuned).data
    each = np.stack([(np.exp(plain(tuned, t)[1]) - np.exp(plain(base, t)[1])).mean(0) for t in TEXTS])
    order = np.argsort(-np.abs(each.mean(0)))
    chosen = found["token_id"].values
    assert sorted(chosen) == sorted(order)  # the vocabulary is smaller than what is listed
    np.testing.assert_allclose(found["shift"].values, each.mean(0)[chosen], atol=1e-6)
    np.testing.assert_allclose(
        found["shift_error"].values, (each.std(0, ddof=1) / np.sqrt(len(TEXTS)))[chosen], atol=1e-6
    )
    before = np.mean([np.exp(plain(base, t)[1]).mean(0) for t in TEXTS], 0)
    np.testing.assert_allclose(found["base_prob"].values, before[chosen], atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_the_lens_against_modules_called_by_hand(library, family):
    base = library.model(family)
    tuned = tuned_copy(base)
    found = compare(base, tuned).data
    ends = {
        "gpt2": lambda m: m.transformer.ln_f,
        "llama": lambda m: m.model.norm,
        "neox": lambda m: m.gpt_neox.final_layer_norm,
    }
    assert found.sizes["depth"] == 3
    for text, e in zip(TEXTS, found["example"].values, strict=True):
        logs = {}
        for side, model in (("base", base), ("tuned", tuned)):
            ids, final, hidden = plain(model, text)
            head = model.get_output_embeddings()
            with torch.no_grad():
                states = [head(ends[family](model)(h))[0].double().numpy() for h in hidden[:-1]]
            logs[side] = [*(log_softmax(s, -1) for s in states), final]
            for depth, logp in enumerate(logs[side]):
                here = found.sel(example=e, side=side, depth=depth)
                if len(text) > 1:
                    loss = -logp[np.arange(len(text) - 1), ids[1:]].mean()
                    np.testing.assert_allclose(float(here["lens_loss"]), loss, atol=1e-4)
                np.testing.assert_allclose(float(here["lens_agreement"]), (logp.argmax(-1) == final.argmax(-1)).mean())
                right = letters().convert_tokens_to_ids(text[0])
                np.testing.assert_allclose(float(here["lens_answer"]), logp[-1, right], atol=1e-4)
        for depth in range(3):
            kl = entropy(np.exp(logs["base"][depth]), np.exp(logs["tuned"][depth]), axis=-1).mean()
            np.testing.assert_allclose(float(found["lens_kl"].sel(example=e, depth=depth)), kl, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_out_is_what_the_model_does(library, family):
    """The last residual stream gives the logits in every architecture; the last depth of the lens is the output."""
    model = HookedModel(library.model(family))
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    run = model.run(ids, capture=["blocks.1.hook_resid_post"] if model.layers == 2 else ["blocks.3.hook_resid_post"])
    (residual,) = run.cache.values()
    again = read_out(model, residual.flatten(0, 1)).unflatten(0, ids.shape)
    torch.testing.assert_close(again, run.logits, atol=1e-5, rtol=1e-5)


def test_identical_models_do_not_differ(library):
    base = library.model("gpt2")
    found = compare(base, copy.deepcopy(base))
    table = found.table().set_index("measure")
    assert (table["difference"].abs() < 1e-12).all()
    assert np.nansum(found.data["flip"]) == 0
    assert found.tokens().empty
    assert np.nanmax(found.data["lens_kl"].values) < 1e-12


def test_a_planted_token_is_found(library):
    """One row of the unembedding raised: that token is the one that rises, and the lens shows it at every depth."""
    base = library.model("llama")
    tuned = copy.deepcopy(base)
    token = letters().convert_tokens_to_ids("q")
    with torch.no_grad():
        tuned.model.norm.weight.abs_()
    base = copy.deepcopy(tuned)
    with torch.no_grad():  # in the direction of the mean last residual stream
        mean = torch.cat(
            [base.model(torch.tensor([letters()(t)["input_ids"]])).last_hidden_state[0] for t in TEXTS]
        ).mean(0)
        tuned.lm_head.weight[token] += 4 * mean / mean.norm()
    found = compare(base, tuned)
    top = found.tokens(1).iloc[0]
    assert top["token"] == "q"
    assert top["low"] > 0
    assert top["low"] <= top["shift"] <= top["high"]
    assert (found.lens().query("side == 'base'")["kl"] > 0).all()


def test_one_changed_layer_shows_at_its_depth(library):
    base = library.model("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    kl = compare(base, tuned).lens().query("side == 'base'").set_index("depth")["kl"]
    assert kl[0] == kl[1] == 0
    assert kl[2] > 0


def test_the_batch_does_not_matter(library):
    base = library.model("gemma3-sliding")
    tuned = tuned_copy(base)
    one, other = compare(base, tuned, batch_size=1).data, compare(base, tuned, batch_size=5).data
    for name in one.data_vars:
        if one[name].dtype.kind == "f":
            np.testing.assert_allclose(one[name].values, other[name].values, atol=1e-5, err_msg=name)


def test_positions_in_small_blocks(library, monkeypatch):
    import finetune_lens.hooked.side_by_side as engine

    base = library.model("llama")
    tuned = tuned_copy(base)
    whole = compare(base, tuned).data
    monkeypatch.setattr(engine, "READ", 120)  # three positions
    for name, values in compare(base, tuned).data.data_vars.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values.values, whole[name].values, atol=1e-5, err_msg=name)


def test_an_adapter_on_shared_weights(library, tmp_path):
    folder = adapter_folder(library.fresh("llama"), tmp_path)
    found = compare(library.saved("llama"), folder, check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        merged = PeftModel.from_pretrained(library.fresh("llama"), folder).merge_and_unload()
    expected = compare(library.model("llama"), merged)
    np.testing.assert_allclose(found.data["kl"].values, expected.data["kl"].values, atol=1e-5)


def test_means_are_over_texts(library):
    found = compare(library.model("llama"), tuned_copy(library.model("llama")))
    by_text = [np.nanmean(found.data["kl"].sel(example=e).values) for e in found.data["example"].values]
    row = found.table().set_index("measure").loc["KL(base ‖ tuned)"]
    assert row["difference"] == pytest.approx(np.mean(by_text))
    assert min(by_text) <= row["low"] <= row["difference"] <= row["high"] <= max(by_text)
    loss = found.table().set_index("measure").loc["loss on the text"]
    assert loss["difference"] == pytest.approx(loss["tuned"] - loss["base"])


def test_the_place_of_the_answer(library):
    found = compare(library.model("llama"), tuned_copy(library.model("llama")))
    table = found.table().set_index("measure")
    last = [found.data["kl"].sel(example=e).values[len(t) - 1] for t, e in zip(TEXTS, "12345", strict=True)]
    assert table.loc["answer: KL(base ‖ tuned)", "difference"] == pytest.approx(np.mean(last))
    flips = [found.data["flip"].sel(example=e).values[len(t) - 1] for t, e in zip(TEXTS, "12345", strict=True)]
    assert table.loc["answer: top-1 flips", "difference"] == pytest.approx(np.mean(flips))


def test_a_loss_above_guessing_is_said(library):
    tuned = copy.deepcopy(library.model("llama"))
    with torch.no_grad():
        tuned.lm_head.weight.mul_(30)
    assert "above that of guessing" in compare(library.model("llama"), tuned).summary()
    calm = copy.deepcopy(library.model("llama"))
    with torch.no_grad():
        calm.lm_head.weight.zero_()  # every token alike: a loss of ln 40, not above it
    found = compare(calm, copy.deepcopy(calm))
    found.data.attrs["vocabulary"] = 41
    assert "above that of guessing" not in found.summary()


def test_texts_without_answers(library):
    found = compare(library.model("llama"), tuned_copy(library.model("llama")), TEXTS)
    assert found.answers == []
    assert not any("answer" in m for m in found.table()["measure"])
    mixed = compare(
        library.model("llama"), tuned_copy(library.model("llama")), ["abc=", {"prompt": "de=", "answer": "a"}]
    )
    assert np.isfinite(mixed.data["logprob"].values).sum() == 2
    assert "logit_diff" not in mixed.answers


def test_whole_answers(library):
    base = library.model("llama")
    tuned = tuned_copy(base)
    items = [{"prompt": "abc=", "answer": "de"}, {"prompt": "xy=", "answer": "uvw"}]
    with pytest.raises(InputError, match="whole"):
        compare(base, tuned, items)
    found = compare(base, tuned, items, whole_answer=True).data
    for item, e in zip(items, found["example"].values, strict=True):
        ids, logs, _ = plain(base, item["prompt"] + item["answer"])
        n = len(item["prompt"])
        expected = sum(logs[at - 1, ids[at]] for at in range(n, len(ids)))
        assert float(found["logprob"].sel(example=e, side="base")) == pytest.approx(expected, abs=1e-4)
        assert "".join(found["token"].sel(example=e).values) == item["prompt"]
        assert float(found["lens_answer"].sel(example=e, side="base", depth=2)) == pytest.approx(expected, abs=1e-4)


TEMPLATE = "{% for m in messages %}<pad>{{ m['content'] }}<pad>{% endfor %}{% if add_generation_prompt %}={% endif %}"


@pytest.mark.parametrize("template", ["each", "tuned"])
def test_chat_templates(library, template):
    base = library.model("llama")
    tuned = tuned_copy(base)
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    found = compare(base, tuned, prompts(["abcd", "xy"]), tokenizer=tokenizer, template=template).data
    framed = {"base": template == "each", "tuned": True}
    pad = letters().convert_tokens_to_ids("<pad>")
    for text, e in zip(["abcd", "xy"], found["example"].values, strict=True):
        for side, model in (("base", base), ("tuned", tuned)):
            ids = letters()(text)["input_ids"]
            if framed[side]:
                ids = [pad, *ids, pad, letters().convert_tokens_to_ids("=")]
            with torch.no_grad():
                logs = log_softmax(model(torch.tensor([ids])).logits[0].double().numpy(), -1)
            own = np.arange(len(text) - 1) + framed[side]
            at = [*own, len(ids) - 1]
            here = found.sel(example=e, side=side)
            np.testing.assert_allclose(
                here["entropy"].values[: len(text)], entropy(np.exp(logs[at]), axis=-1), atol=1e-5
            )
            following = letters()(text)["input_ids"][1:]
            np.testing.assert_allclose(here["loss"].values[: len(text) - 1], -logs[own, following], atol=1e-5)
            right = letters().convert_tokens_to_ids(text[0])
            assert float(here["logprob"]) == pytest.approx(logs[-1, right], abs=1e-5)


def test_vocabularies_that_grew(library):
    base = library.model("llama")
    tuned = tuned_copy(base)
    tuned.resize_token_embeddings(44, mean_resizing=False)
    found = compare(base, tuned)
    assert "only tokens that both models have" in found.summary()
    ids, q, _ = plain(tuned, TEXTS[0])
    q = log_softmax(q[:, :40], -1)
    p = plain(base, TEXTS[0])[1]
    np.testing.assert_allclose(
        found.data["kl"].values[0, : len(ids)], entropy(np.exp(p), np.exp(q), axis=-1), atol=1e-5
    )


def test_rows_that_only_one_side_has_do_not_count(library):
    """The same model with more rows in its vocabulary differs in nothing; answers among them are refused."""
    base = library.model("llama")
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(44, mean_resizing=False)
    table = compare(base, tuned).table()
    assert (table["difference"].abs() < 1e-9).all(), table
    tokenizer = letters()
    tokenizer.add_tokens([f"<more{i}>" for i in range(20)])
    for fields in ({"answer": "<more15>"}, {"answer": "a", "wrong": "<more15>"}):
        with pytest.raises(InputError, match="prompt 1: an answer or a wrong answer is a token beyond the 40"):
            compare(base, tuned, [{"prompt": "abc=", **fields}], tokenizer=tokenizer)


def test_logits_that_are_nan_count_nowhere(library):
    base = library.model("llama")
    tuned = tuned_copy(base)

    poison, seen = letters().convert_tokens_to_ids("o"), {}
    tuned.model.embed_tokens.register_forward_pre_hook(lambda m, args: seen.update(ids=args[0]))

    def broken(module, args, out):
        return out.masked_fill((seen["ids"] == poison).any(1)[:, None, None], torch.nan)

    tuned.model.layers[1].mlp.register_forward_hook(broken)
    found = compare(base, tuned)
    alone = compare(base, tuned, prompts([t for t in TEXTS if "o" not in t]), batch_size=1)
    columns = ["base", "tuned", "difference"]
    kl, expected = (r.table().set_index("measure").loc["KL(base ‖ tuned)", columns] for r in (found, alone))
    np.testing.assert_allclose(kl.to_numpy(float), expected.to_numpy(float), atol=1e-5)
    assert np.isnan(found.data["accuracy"].sel(side="tuned", example="3"))
    assert "8 positions have logits that are NaN" in found.summary()


def test_infinite_losses_are_shown(library):
    base = library.model("llama")
    tuned = copy.deepcopy(base)
    never = letters().convert_tokens_to_ids("c")
    tuned.lm_head.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor([never]), -torch.inf))
    row = compare(base, tuned).table().set_index("measure").loc["loss on the text"]
    assert row["tuned"] == row["difference"] == np.inf
    assert "inf" in compare(base, tuned).summary()


def test_embeddings_that_are_projected(library):
    import transformers

    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=40, word_embed_proj_dim=16,
        max_position_embeddings=24, bos_token_id=1, eos_token_id=2, do_layer_norm_before=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = compare(base, tuned_copy(base), ["abc="])
    _, p, _ = plain(base, "abc=")
    np.testing.assert_allclose(found.data["entropy"].sel(side="base").values[0], entropy(np.exp(p), axis=-1), atol=1e-4)


def test_models_of_other_depth(library):
    import transformers

    config = copy.deepcopy(library.configs["llama"]())
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    deeper = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=r"2 layers and .* 3.*--no-lens"):
        compare(library.model("llama"), deeper)
    assert not compare(library.model("llama"), deeper, lens=False).has_lens


def test_refuses(library):
    base = library.model("llama")
    with pytest.raises(GateFailed):
        compare(base, copy.deepcopy(base), check=True)
    with pytest.raises(InputError, match="template is one of"):
        compare(base, base, template="both")
    with pytest.raises(InputError, match="batch size"):
        compare(base, base, batch_size=0)
    pair = fl.ModelPair.load(base, tuned_copy(base), tokenizer=letters())
    from test_patching import LETTERS
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    swapped = dict(LETTERS) | {"a": LETTERS["b"], "b": LETTERS["a"]}
    raw = Tokenizer(models.WordLevel(swapped))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), behavior="isolated")
    pair.models()[1].tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")
    with pytest.raises(InputError, match="prompt 1 as different tokens"):
        fl.compare_outputs(pair, prompts(), progress=False, check=False)


def test_more_reaches_the_unembedding_than_the_last_residual(library):
    base = library.model("llama")
    tuned = tuned_copy(base)
    held = {}
    tuned.model.embed_tokens.register_forward_hook(lambda m, a, out: held.update(early=out))
    tuned.model.norm.register_forward_hook(
        lambda m, a, out: out + held["early"] if held["early"].shape == out.shape else out
    )
    with pytest.raises(InputError, match="more than that reaches"):
        compare(base, tuned)


def test_memory_runs_out(library, monkeypatch):
    import finetune_lens.hooked.side_by_side as engine

    base = library.model("llama")
    tuned = tuned_copy(base)
    whole = compare(base, tuned)
    real, sizes = engine.compare, []

    def small(one, other, **options):
        sizes.append(len(one.prompts))
        if len(one.prompts) > 2:
            raise torch.OutOfMemoryError
        return real(one, other, **options)

    monkeypatch.setattr(engine, "compare", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = compare(base, tuned)
    assert sizes[:2] == [5, 2]
    np.testing.assert_allclose(found.data["kl"].values, whole.data["kl"].values, atol=1e-6)


def test_an_interrupted_comparison_continues(library, tmp_path, monkeypatch):
    import finetune_lens.hooked.side_by_side as engine

    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    folders = library.saved("llama"), tmp_path / "tuned"
    monkeypatch.setattr(module, "UNIT", 2)
    real, calls = engine.compare, []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(engine, "compare", counted)
    stop = -1
    whole = compare(*folders)
    assert len(calls) == 3
    calls.clear()
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        compare(*folders, partial=tmp_path / "chunks")
    calls.clear()
    stop = -1
    found = compare(*folders, partial=tmp_path / "chunks")
    assert len(calls) == 1
    assert found.data.drop_attrs().identical(whole.data.drop_attrs())
    calls.clear()
    compare(*folders, partial=tmp_path / "chunks", lens=False)  # other arguments start anew
    assert len(calls) == 3


def test_saved_and_loaded(library, tmp_path):
    for lens in (True, False):
        found = compare(library.model("llama"), tuned_copy(library.model("llama")), lens=lens)
        again = fl.load(found.save(tmp_path / "outputs.nc"))
        assert isinstance(again, Outputs)
        assert again.summary() == found.summary()
        assert again.to_frame().equals(found.to_frame())
        json.dumps(found.headline(), allow_nan=False)
    with pytest.raises(InputError, match="lens=True"):
        found.lens()


def test_one_text(library):
    found = compare(library.model("llama"), tuned_copy(library.model("llama")), ["abc"])
    assert np.isnan(found.table()["low"]).all()
    assert "1 texts" in found.summary()


def test_the_frame(library):
    found = compare(library.model("llama"), tuned_copy(library.model("llama")))
    frame = found.to_frame()
    assert len(frame) == sum(map(len, TEXTS))
    first = frame[frame["example"] == "1"]
    assert "".join(first["token"]) == TEXTS[0]
    assert "".join(first["next"]) == TEXTS[0][1:]
    top = found.positions(3)
    assert list(top["js"]) == sorted(frame["js"], reverse=True)[:3]
    assert top.iloc[0]["context"].endswith(top.iloc[0]["token"])


def test_the_command(library, tmp_path):
    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    letters().save_pretrained(tmp_path / "letters")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts())))
    words = [library.saved("llama"), tmp_path / "tuned", "p.jsonl", "--tokenizer", "letters", "--no-plots"]
    done = command("finetune_lens.outputs", *words, "--json", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["headline"]["texts"] == len(TEXTS)
    done = command("finetune_lens.outputs", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "--force" in done.stderr
    done = command(
        "finetune_lens.outputs", library.saved("llama"), tmp_path / "tuned", "p.jsonl", "--out", "o", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "no tokenizer" in done.stderr
    assert not (tmp_path / "o").exists()
