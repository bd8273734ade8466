"""Every fault that the trust gate names, planted once; and pairs of every kind that pass."""

import copy
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from test_patching import letters

import finetune_lens as fl
from finetune_lens import check, zoo
from finetune_lens.check import check_pair, require_safe
from finetune_lens.errors import GateFailed, InputError
from finetune_lens.hooked import HookedModel, gates
from finetune_lens.results.check import Check


def tuned_copy(model, scale=0.05):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "layers" in name or ".h." in name:
                p.add_(torch.randn(p.shape, generator=generator) * scale)
    return other


@pytest.fixture
def base(library):
    return library.fresh("llama")


@pytest.fixture
def tuned(base):
    return tuned_copy(base)


def adapter_folder(model, path, *, init_lora_weights=False, **options):
    """A LoRA adapter with factors drawn at random, or with one that is 0."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, init_lora_weights=init_lora_weights, **{"target_modules": ["q_proj", "v_proj"]} | options)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT uses of transformers is deprecated
        get_peft_model(model, config).save_pretrained(path / "adapter")
    return path / "adapter"


def checked(base, tuned, **options):
    return check_pair(fl.ModelPair.load(base, tuned, **options), progress=False)


def verdicts(found, side=None):
    frame = found.to_frame()
    frame = frame if side is None else frame[frame["side"] == side]
    return dict(zip(frame["gate"], frame["verdict"], strict=True))


def failed(found):
    frame = found.to_frame()
    return set(frame.loc[frame["verdict"] == "FAIL", ["gate", "side"]].itertuples(index=False, name=None))


@pytest.mark.parametrize(
    "family",
    ["gpt2", "llama", "qwen3", "gemma2-sliding", "gemma3-sliding", "neox", "mistral", "mixtral", "opt", "bloom"],
)
def test_sound_pairs_pass(library, family):
    found = checked(library.model(family), tuned_copy(library.model(family)))
    assert found.passed, found.summary()
    frame = found.to_frame()
    measured = frame[frame["limit"].notna()]
    assert len(measured) >= 14
    assert (measured["measured"] <= measured["limit"]).all()
    assert "Safe to compare" in found.summary()


def test_the_pairs_that_ship_pass():
    folder = zoo.path("strings")
    prompts = folder / "prompts.jsonl"
    for name in ("full", "lora"):
        found = check_pair(fl.ModelPair.load(folder / "base", folder / name), prompts, progress=False)
        assert found.passed, found.summary()
    assert verdicts(found)["adapter off = base"] == "pass"  # of the adapter: it shares the base's weights
    assert verdicts(found)["last residual patched = donor"] == "pass"


def with_hook(model, path, hook, kind="register_forward_hook"):
    getattr(model.get_submodule(path), kind)(hook)
    return model


def test_random_texts_begin_as_the_tokenizer_begins_texts():
    folder = fl.zoo.path("strings")
    base, tuned = fl.ModelPair.load(folder / "base", folder / "full").models()
    rows = check._rows(base, tuned, None, 0, None)
    special = {*base.tokenizer.all_special_ids}
    assert {row[0] for row in rows} == {base.tokenizer.bos_token_id}
    assert not special & {token for row in rows for token in row[1:]}
    assert len({*map(len, rows)}) > 1


def test_rows_that_act_on_each_other(base, tuned):
    with_hook(tuned, "model.layers.1.mlp", lambda m, args, out: out + 0.5 * out.mean(0, keepdim=True))
    assert ("batched = unbatched", "tuned") in failed(checked(base, tuned))
    assert verdicts(checked(base, tuned), "base")["batched = unbatched"] == "pass"


def test_a_model_that_sees_its_padding(base, tuned):
    forward = tuned.forward

    def blind(input_ids, attention_mask=None, position_ids=None, **options):
        return forward(input_ids, **options)

    tuned.forward = blind
    found = failed(checked(base, tuned))
    assert ("padded on the left = unpadded", "tuned") in found
    assert ("padded on the right = unpadded", "tuned") not in found  # it is causal


def test_a_model_that_sees_what_comes(base, tuned):
    with_hook(tuned, "model.layers.0.mlp", lambda m, args, out: out + 0.5 * out.mean(1, keepdim=True))
    found = failed(checked(base, tuned))
    assert {("padded on the right = unpadded", "tuned"), ("padded on the left = unpadded", "tuned")} <= found


def test_hooks_that_leave_a_trace(base, tuned, monkeypatch):
    run = HookedModel.run

    def wrong(self, ids, **options):
        found = run(self, ids, **options)
        if options.get("capture") and not self.name.endswith("base"):
            found.logits = found.logits + 0.01 * found.logits.abs().max()
        return found

    monkeypatch.setattr(HookedModel, "run", wrong)
    assert ("hooked = plain", "tuned") in failed(checked(base, tuned))


def test_a_patch_that_is_not_what_was_there(base, tuned, monkeypatch):
    run = HookedModel.run

    def wrong(self, ids, *, edits=(), **options):
        return run(
            self, ids, edits=[(n, lambda x, v=v: (v(x) if callable(v) else v) * 1.01) for n, v in edits], **options
        )

    monkeypatch.setattr(HookedModel, "run", wrong)
    found = failed(checked(base, tuned))
    assert {("self-patch changes nothing", "base"), ("self-patch changes nothing", "tuned")} <= found
    assert ("hooked = plain", "base") not in found


def test_re_entry_that_is_wrong_is_not_used_and_said(base, tuned):
    """A block that looks at the first token, which the rows that re-enter behind it do not hold."""
    with_hook(tuned, "model.layers.1.mlp", lambda m, args, out: out + args[0][:, :1])
    found = checked(base, tuned)
    assert verdicts(found, "tuned")["re-entry = whole pass"] == "note"
    (line,) = [line for line in found.summary().splitlines() if line.startswith("note     re-entry")]
    assert "re-entry was not used" in line


@pytest.mark.parametrize("masked", [False, True])
def test_patches_by_re_entry_that_are_not_those_of_a_whole_pass(base, tuned, monkeypatch, masked):
    """Rows that are not patched are right, and those that are get other values."""
    from finetune_lens.hooked.reentry import Pass

    if masked:  # a token that is never said
        for model in (base, tuned):
            with_hook(model, "lm_head", lambda m, args, out: out.index_fill(-1, torch.tensor([5]), -torch.inf))
        assert checked(base, tuned).passed
    changed = Pass._changed

    def wrong(self, kind, layer, x, offset=0):
        after = changed(self, kind, layer, x, offset)
        return after if after is x else x + 1.1 * (after - x)

    monkeypatch.setattr(Pass, "_changed", wrong)
    found = failed(checked(base, tuned))
    assert {("re-entry = whole pass", "base"), ("re-entry = whole pass", "tuned")} <= found


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_weights(base, tuned, bad):
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    found = checked(base, tuned)
    assert ("weights are finite", "tuned") in failed(found)
    assert "model.layers.1.mlp.up_proj.weight (1)" in found.summary()
    assert verdicts(found, "base")["weights are finite"] == "pass"


def test_logits_that_overflow(base, tuned):
    with torch.no_grad():
        tuned.model.norm.weight.mul_(1e20)
        tuned.lm_head.weight.mul_(1e20)
    found = failed(checked(base, tuned))
    assert ("logits are finite", "tuned") in found
    assert ("weights are finite", "tuned") not in found


def test_one_model_twice(base):
    found = checked(base, copy.deepcopy(base))
    assert failed(found) == {("tuning changes the outputs", "both")}
    assert "the two are one model" in found.summary()


def test_a_change_no_larger_than_rounding(base):
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.lm_head.weight[5, 0] += 1e-6
    assert verdicts(checked(base, tuned))["tuning changes the outputs"] == "note"


def test_an_adapter_that_does_nothing(library, tmp_path):
    folder = adapter_folder(library.fresh("llama"), tmp_path, init_lora_weights=True)  # B is 0
    found = check_pair(fl.ModelPair.load(library.saved("llama"), folder), progress=False)
    assert failed(found) == {("tuning changes the outputs", "both")}
    assert "the adapter is off or does nothing" in found.summary()


def test_an_adapter_that_is_off(library, tmp_path):
    folder = adapter_folder(library.fresh("llama"), tmp_path)
    pair = fl.ModelPair.load(library.saved("llama"), folder)
    assert check_pair(pair, progress=False).passed
    pair.tuned.adapted = False
    assert ("tuning changes the outputs", "both") in failed(check_pair(pair, progress=False))


def test_shared_weights_that_are_no_longer_the_base(library, tmp_path):
    folder = adapter_folder(library.fresh("llama"), tmp_path)
    pair = fl.ModelPair.load(library.saved("llama"), folder)
    assert verdicts(check_pair(pair, progress=False))["adapter off = base"] == "pass"
    with torch.no_grad():
        pair.base.module.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    assert ("adapter off = base", "base") in failed(check_pair(pair, progress=False))


def test_the_last_layer_says_what_is_shared(base, tuned):
    assert verdicts(checked(base, tuned))["last residual patched = donor"] == "pass"
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.5)
    found = checked(base, tuned)
    assert found.passed
    assert "lm_head differ between" in found.summary()
    assert "model.norm" not in found.summary()
    with torch.no_grad():
        tuned.model.norm.weight.mul_(1.5)
    assert "model.norm, lm_head differ between" in checked(base, tuned).summary()


def test_logits_that_more_reaches_than_the_last_residual(base, tuned):
    held = {}
    with_hook(tuned, "model.embed_tokens", lambda m, args, out: held.update(early=out))
    with_hook(tuned, "model.norm", lambda m, args, out: out + held["early"])
    found = failed(checked(base, tuned))
    assert {("last residual patched = donor", "base"), ("last residual patched = donor", "tuned")} <= found


def test_an_adapter_on_the_unembedding_is_said(library, tmp_path):
    folder = adapter_folder(library.fresh("llama"), tmp_path, target_modules=["q_proj", "lm_head"])
    found = check_pair(fl.ModelPair.load(library.saved("llama"), folder), progress=False)
    assert found.passed, found.summary()
    assert "need not hold: lm_head differ" in found.summary()


def test_tokenizers_that_read_differently(base, tuned):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def with_vocabulary(order):
        tokens = Tokenizer(models.WordLevel({c: i for i, c in enumerate(order)}, unk_token="?"))
        tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="?")

    pair = fl.ModelPair.load(base, tuned)
    one, other = pair.models()
    one.tokenizer, other.tokenizer = with_vocabulary("?abcd"), with_vocabulary("?abdc")
    found = check_pair(pair, progress=False)
    assert failed(found) == {("tokenizers agree", "both")}
    other.tokenizer = with_vocabulary("?abcd")
    other.tokenizer.chat_template = "{{ messages }}"
    found = check_pair(pair, progress=False)
    assert found.passed
    assert verdicts(found)["conversations are framed alike"] == "note"
    other.tokenizer = with_vocabulary("?abcd" + "".join(map(chr, range(200, 260))))
    assert ("tokens have embeddings", "tuned") in failed(check_pair(pair, progress=False))


def test_added_tokens_without_embeddings_are_a_note(base, tuned):
    tokenizer = letters()
    tokenizer.add_tokens([f"<more{i}>" for i in range(20)])
    found = checked(base, tuned, tokenizer=tokenizer)
    assert found.passed, found.summary()
    assert verdicts(found)["tokens have embeddings"] == "note"


def test_one_tokenizer_for_both_is_said(base, tuned):
    assert verdicts(checked(base, tuned, tokenizer=letters()))["tokenizers agree"] == "note"


def test_special_tokens_that_one_side_adds(base, tuned):
    pair = fl.ModelPair.load(base, tuned, tokenizer=letters())
    other = pair.models()[1]
    other.tokenizer = copy.deepcopy(letters())
    from tokenizers import processors

    token = other.tokenizer.convert_ids_to_tokens(1)
    other.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, 1)]
    )
    assert ("tokenizers agree", "both") in failed(check_pair(pair, progress=False))


def test_without_tokenizers_it_is_said(base, tuned):
    assert verdicts(checked(base, tuned))["tokenizers agree"] == "skipped"


def test_dtypes(base, tuned):
    pair = fl.ModelPair.load(base, tuned)
    pair.models()[1].module.to(torch.bfloat16)
    assert ("dtypes agree", "both") in failed(check_pair(pair, progress=False))


def test_half_precision_passes_with_a_note(base):
    base, tuned = base.to(torch.bfloat16), tuned_copy(base.to(torch.bfloat16))
    found = checked(base, tuned)
    assert found.passed, found.summary()
    assert verdicts(found)["dtypes agree"] == "note"


def test_a_patch_two_per_cent_off_in_half_precision(base, monkeypatch):
    base, tuned = base.to(torch.bfloat16), tuned_copy(base.to(torch.bfloat16))
    run = HookedModel.run

    def wrong(self, ids, *, edits=(), **options):
        return run(
            self, ids, edits=[(n, lambda x, v=v: (v(x) if callable(v) else v) * 1.02) for n, v in edits], **options
        )

    monkeypatch.setattr(HookedModel, "run", wrong)
    assert ("self-patch changes nothing", "base") in failed(checked(base, tuned))


def test_differences():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert 0 < gates.difference(x * (1 + 1e-9), x) < 1e-8
    inf, nan = float("inf"), float("nan")
    for one, other, expected in (
        ([1, nan], [1, -inf], inf), ([1, nan], [1, nan], 0), ([1, -inf], [1, -inf], 0), ([1, 2], [1, inf], inf),
        ([nan], [nan], 0), ([1, -inf], [3, -inf], 2 / 3),
    ):  # fmt: skip
        assert gates.difference(torch.tensor(one), torch.tensor(other)) == pytest.approx(expected)


def test_offloaded_weights(library):
    import accelerate

    sides = [library.fresh("llama"), tuned_copy(library.model("llama"))]
    for model in sides:
        accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(p.is_meta for p in sides[1].parameters())
    found = checked(*sides)
    assert found.passed, found.summary()
    assert verdicts(found)["last residual patched = donor"] == "pass"
    with torch.no_grad():
        sides[1].model.layers[1].mlp.up_proj._hf_hook.weights_map["weight"][0, 0] = float("nan")
    assert ("weights are finite", "tuned") in failed(checked(*sides))


def test_stored_dtypes_are_compared(library, base, tmp_path):
    tuned_copy(base).to(torch.bfloat16).save_pretrained(tmp_path)
    found = check_pair(fl.ModelPair.load(library.saved("llama"), tmp_path), progress=False)
    assert verdicts(found)["dtypes agree"] == "note"
    assert "stored as float32 and bfloat16" in found.summary()


def test_models_of_other_depth(library, base):
    import transformers

    config = copy.deepcopy(library.configs["llama"]())
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    deeper = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = checked(base, deeper)
    assert ("shapes agree", "both") in failed(found)
    assert "layers: 2 against 3" in found.summary()


def test_analyses_refuse(base, monkeypatch):
    prompts = [{"prompt": f"{text}=", "answer": "a", "wrong": "b"} for text in ("abc", "bcd", "xyz")]
    pair = fl.ModelPair.load(base, copy.deepcopy(base), tokenizer=letters())
    with pytest.raises(GateFailed, match=r"tuning changes the outputs.*check=False"):
        fl.cross_patch(pair, prompts, progress=False)
    found = fl.cross_patch(pair, prompts, progress=False, check=False)
    assert np.abs(found.data["logit_diff"].values).max() < 1e-4
    calls = []
    monkeypatch.setattr("finetune_lens.check.check_pair", lambda *a, **o: calls.append(1))
    with pytest.raises(GateFailed):  # once a pair
        require_safe(pair)
    assert not calls


def test_saved_and_loaded(base, tuned, tmp_path):
    found = checked(base, tuned)
    again = fl.load(found.save(tmp_path / "check.nc"))
    assert isinstance(again, Check)
    assert again.summary() == found.summary()
    assert again.headline() == found.headline()
    assert found.headline()["verdicts"]["FAIL"] == 0


def test_bad_input(base, tuned):
    with pytest.raises(InputError, match="no tokenizer"):
        check_pair(fl.ModelPair.load(base, tuned), [{"prompt": "abc"}], progress=False)
    pair = fl.ModelPair.load(base, tuned, tokenizer=letters())
    found = verdicts(check_pair(pair, [{"prompt": "abc"}], progress=False))
    assert found["batched = unbatched"] == found["padded on the left = unpadded"] == "skipped"
    found = verdicts(check_pair(pair, [{"prompt": "ab"}, {"prompt": "bc"}], progress=False))
    assert found["batched = unbatched"] == "pass"
    assert found["padded on the right = unpadded"] == "skipped"
    base.config.max_position_embeddings = 8
    with pytest.raises(InputError, match="reads at most 8 tokens"):
        check_pair(pair, [{"prompt": "abcdefghijk"}], progress=False)
    with pytest.raises(InputError, match="two tokens or more"):
        check_pair(fl.ModelPair.load(base, tuned, tokenizer=letters()), [{"prompt": "a"}], progress=False)


def command(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=120, cwd=cwd
    )


def test_commands(library, base, tmp_path):
    library.saved("llama")
    tuned_copy(base).save_pretrained(tmp_path / "tuned")
    done = command("finetune_lens.check", library.saved("llama"), tmp_path / "tuned", "--json", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["headline"]["passed"] is True
    assert (tmp_path / "runs/check/check.nc").is_file()
    twice = [library.saved("llama"), library.saved("llama")]
    done = command("finetune_lens.check", *twice, "--out", "same", cwd=tmp_path)
    assert done.returncode == 1
    assert "FAIL     tuning changes the outputs" in done.stdout
    assert "NOT safe to compare" in done.stdout
    assert "check failed: 1 of" in done.stderr
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        '{"prompt": "abc=", "answer": "a", "wrong": "b"}\n{"prompt": "abd=", "answer": "a", "wrong": "b"}\n'
    )
    letters().save_pretrained(tmp_path / "letters")
    more = ["--tokenizer", tmp_path / "letters", "--no-plots", "--out", "c"]
    done = command("finetune_lens.cmap", *twice, prompts, *more, cwd=tmp_path)
    assert done.returncode == 1
    assert "tuning changes the outputs" in done.stderr
    assert not (tmp_path / "c").exists()
    done = command("finetune_lens.cmap", *twice, prompts, *more, "--unsafe", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
