"""Adapters saved by PEFT give the weights that PEFT's own merge gives."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_lens.checkpoints import LowRank, open_checkpoint
from finetune_lens.errors import InputError
from finetune_lens.hybrid import Hybrid
from finetune_lens.pair import ModelPair

LINEAR = ["q_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        from peft import LoraConfig

        return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | options)

    return make


def other(kind: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import peft

        return getattr(peft, f"{kind}Config")(**{"target_modules": LINEAR} | options)

    return make


# kind → (family of the base, config). These are B @ A times a number: they stay factored.
FACTORED = {
    "plain": ("llama", lora()),
    "rank-stabilised": ("llama", lora(use_rslora=True)),
    "patterns": ("llama", lora(rank_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 3}, alpha_pattern={"q_proj": 20})),
    "patterns and rank-stabilised": (
        "llama",
        lora(use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 20}),
    ),
    "pattern is a regular expression": ("llama", lora(alpha_pattern={r"layers\.1\..*proj": 1})),
    "conv1d": ("gpt2", lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "fused heads": ("neox", lora(target_modules=["query_key_value", "dense"])),
    "fused blocks": ("phi3", lora(target_modules=["qkv_proj", "gate_up_proj"])),
    "experts' attention": ("mixtral", lora(target_modules=["q_proj", "k_proj"])),
    "modules to save": ("llama", lora(modules_to_save=["lm_head", "k_proj"])),
    "conv1d to save": ("gpt2", lora(target_modules=["c_fc"], fan_in_fan_out=True, modules_to_save=["c_proj"])),
    "saved embedding": ("llama", lora(modules_to_save=["embed_tokens"])),
    "saved head of a tied model": ("llama-bias-tied", lora(modules_to_save=["lm_head"])),
    "bias of adapted": ("llama-bias-tied", lora(bias="lora_only")),
    "bias of all": ("llama-bias-tied", lora(bias="all")),
    "biases of gpt2": ("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all")),
    "gaussian start": ("llama", lora(init_lora_weights="gaussian")),
    "orthogonal start": ("llama", lora(init_lora_weights="orthogonal")),
}
# These change weights in another way: PEFT merges them, in float32.
DENSE = {
    "dora": ("llama", lora(use_dora=True)),
    "lora bias": ("llama-bias-tied", lora(lora_bias=True)),
    "token indices": ("llama", lora(trainable_token_indices={"embed_tokens": [1, 5]})),
    "tokens alone": ("llama", other("TrainableTokens", target_modules=["embed_tokens"], token_indices=[0, 7])),
    "pissa": ("llama", lora(init_lora_weights="pissa")),
    "olora": ("llama", lora(init_lora_weights="olora")),
    "expert parameters": ("mixtral", lora(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])),
    "adalora": ("llama", other("AdaLora", init_r=4, target_r=2, total_step=10)),
    "loha": ("llama", other("LoHa", r=4)),
    "lokr": ("llama", other("LoKr", r=4)),
    "ia3": ("llama", other("IA3", feedforward_modules=["down_proj"])),
    "oft": ("llama", other("OFT", oft_block_size=4)),
    "boft": ("llama", other("BOFT", boft_block_size=4)),
    "vera": ("llama", other("Vera", r=4, target_modules=["q_proj", "o_proj"])),
    "fourier": ("llama", other("FourierFT", n_frequency=20)),
    "hra": ("llama", other("HRA", r=4)),
    "randlora": ("llama", other("RandLora", r=4)),
    "shira": ("llama", other("Shira", r=2)),
    "vblora": ("llama", other("VBLoRA", r=2, num_vectors=8, vector_length=4)),
    "miss": ("llama", other("Miss", r=4)),
    "road": ("llama", other("Road", group_size=8)),
    "c3a": ("llama", other("C3A", block_size=8, target_modules=["q_proj", "o_proj"])),
    "dora of conv1d": ("gpt2", lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)),
    "loha of fused heads": ("neox", other("LoHa", r=4, target_modules=["query_key_value"])),
    "dora and biases": ("llama-bias-tied", lora(use_dora=True, bias="all")),
    "norms": ("llama", other("LNTuning", target_modules=["input_layernorm"])),
}


def trained(library: Any, family: str, config: Any, folder: Path) -> Any:
    """An adapter whose every trained number is random, saved by PEFT; returns the PEFT model."""
    import peft

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about tied and saved embeddings
        model = peft.get_peft_model(library.fresh(family), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return model


def merged(model: Any) -> Any:
    """What PEFT's merge gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells that it separates tied embeddings
        return model.merge_and_unload()


def compare(pair: ModelPair, reference: ModelPair, tolerance: float) -> float:
    """Largest |Δ|; every weight of `pair` is that of `reference` within the tolerance."""
    names = pair.names(vectors=True)
    assert set(names) == set(reference.names(vectors=True))
    largest = 0.0
    for ours, theirs in zip(pair.matrices(names), reference.matrices(names), strict=True):
        assert torch.equal(ours.base, theirs.base), ours.name
        found, expected = (m.tuned_dense(torch.float64) for m in (ours, theirs))
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=ours.name: f"{n}: {m}"
        )
        largest = max(largest, float(theirs.delta(torch.float64).abs().max()))
    return largest


@pytest.mark.parametrize("kind", FACTORED)
def test_factored_adapters_equal_the_merge(library, tmp_path, kind):
    family, config = FACTORED[kind]
    model = trained(library, family, config(), tmp_path)
    pair = ModelPair.load(library.saved(family), tmp_path)
    reference = ModelPair.load(library.saved(family), merged(model.double()))
    assert compare(pair, reference, 1e-12) > 0.05
    saved = config().modules_to_save or []
    adapted = {n for n in pair.names() if pair._parts[n][1] is not pair._parts[n][0]}
    for matrix in pair.matrices(sorted(adapted)):
        if not any(m in matrix.name for m in saved):
            assert isinstance(matrix.update, LowRank), matrix.name
            assert matrix.update.rank <= 4
    assert adapted
    assert pair.describe()["tuned"]["peft_type"] == "LORA"


@pytest.mark.parametrize("kind", DENSE)
def test_other_adapters_equal_the_merge(library, tmp_path, kind):
    """PiSSA and OLoRA replace the base by a remainder: Δ is against the base as it was before."""
    family, config = DENSE[kind]
    model = trained(library, family, config(), tmp_path)
    pair = ModelPair.load(library.saved(family), tmp_path)
    reference = ModelPair.load(library.saved(family), merged(model))
    assert compare(pair, reference, 2e-5) > 0.01
    assert all(m.update is None for m in pair.matrices())
    assert any("merged by PEFT" in note for note in pair.alignment.notes)


@pytest.mark.parametrize("kind", ["plain", "conv1d", "dora", "bias of all"])
def test_a_peft_model_in_memory_is_what_it_computes(library, tmp_path, kind):
    family, config = (FACTORED | DENSE)[kind]
    model = trained(library, family, config(), tmp_path)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    compare(ModelPair.load(library.model(family), model), ModelPair.load(library.saved(family), tmp_path), 2e-5)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())  # merged in a copy


def test_an_embedding_adapter_whose_embedding_is_saved_too(library, tmp_path):
    """PEFT writes the embedding beside its factors: the tuned weight is the sum of the two."""
    config = lora(target_modules=["embed_tokens", "q_proj"])()
    model = trained(library, "llama", config, tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in adapter_names(tmp_path)
    pair = ModelPair.load(library.saved("llama"), tmp_path)
    assert compare(pair, ModelPair.load(library.saved("llama"), merged(model.double())), 1e-12) > 0.01
    (embedding,) = pair.matrices(["embed_tokens"])
    assert int(torch.linalg.matrix_rank(embedding.delta(torch.float64))) == 4


def test_an_embedding_adapter_alone_stays_factored(library, tmp_path):
    model = trained(library, "gpt2", lora(target_modules=["wte"])(), tmp_path / "a")
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    (embedding,) = ModelPair.load(library.saved("gpt2"), tmp_path).matrices(["wte"])
    expected = model.base_model.model.transformer.wte.get_delta_weight("default").T
    torch.testing.assert_close(embedding.update.dense(torch.float32), expected)


def adapter_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_a_saved_embedding_of_a_tied_model_leaves_the_head(library, tmp_path):
    model = trained(library, "llama-bias-tied", lora(modules_to_save=["embed_tokens"])(), tmp_path)
    pair = ModelPair.load(library.saved("llama-bias-tied"), tmp_path)
    (embedding,) = pair.matrices(["embed_tokens"])
    assert torch.equal(embedding.tuned.T, model.base_model.model.model.embed_tokens.modules_to_save["default"].weight)
    assert float(embedding.delta(torch.float64).abs().max()) > 0.01
    assert "lm_head" not in pair.names()


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_adapter_on_a_tied_head_leaves_the_embedding(library, tmp_path, in_memory):
    """PEFT's forward adds the update to the logits alone; its merge would write it into the embedding as well."""
    model = trained(library, "llama-bias-tied", lora(target_modules=["lm_head"])(), tmp_path)
    pair = ModelPair.load(library.saved("llama-bias-tied"), model if in_memory else tmp_path)
    head, embedding = pair.matrices(["lm_head", "embed_tokens"])
    x = torch.randn(3, 32)
    computed = model.base_model.model.lm_head(x)
    torch.testing.assert_close(x @ head.tuned_dense(torch.float32).T, computed, rtol=1e-4, atol=1e-4)
    assert float(head.delta(torch.float64).abs().max()) > 0.01
    assert not embedding.delta(torch.float64).any()


@pytest.mark.parametrize("dora", [False, True])
def test_a_resized_vocabulary_with_an_adapter(library, tmp_path, dora):
    """Tokens were added, and the embeddings trained: PEFT saves them whole, and beside them as `modules_to_save`."""
    import peft

    torch.manual_seed(0)
    model = library.fresh("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(43)
        saved = {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": dora}
        model = peft.get_peft_model(model, lora(**saved)())
        model.save_pretrained(tmp_path)
    pair = ModelPair.load(library.saved("llama"), tmp_path)
    assert set(pair.alignment.resized) == {"embed_tokens", "lm_head"}
    assert pair.alignment.only_tuned == []
    assert pair.shape("embed_tokens") == (32, 40)
    for matrix in pair.matrices(["embed_tokens", "lm_head"]):
        assert torch.equal(matrix.base, matrix.tuned)
    ids = torch.tensor([[5, 7, 39, 2]])
    with torch.no_grad():
        expected = model.eval()(torch.tensor([[5, 42, 39, 2]])).logits
    torch.testing.assert_close(pair.tuned.run(torch.tensor([[5, 42, 39, 2]])).logits, expected, rtol=1e-5, atol=1e-5)
    assert pair.base.run(ids).logits.shape[-1] == 40
    assert torch.equal(pair.base.run(ids).logits, library.model("llama")(ids).logits)
    if not dora:
        with pytest.raises(InputError, match=r"an adapter for a vocabulary of 43 tokens, and .* has 40"):
            Hybrid(pair)


def test_merging_by_peft_shows_no_bars(library, tmp_path, capfd):
    trained(library, "llama", lora(use_dora=True)(), tmp_path)
    ModelPair.load(library.saved("llama"), tmp_path)
    assert "Loading weights" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["conv1d", "dora of conv1d"])
def test_a_base_saved_without_its_prefix(library, tmp_path, kind):
    """GPT-2 as published: h.0…, while the adapter says transformer.h.0…"""
    from safetensors.torch import load_file, save_file

    family, config = (FACTORED | DENSE)[kind]
    model = trained(library, family, config(), tmp_path / "adapter")
    shutil.copytree(library.saved(family), tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    pair = ModelPair.load(tmp_path / "base", tmp_path / "adapter")
    assert compare(pair, ModelPair.load(library.saved(family), merged(model)), 2e-5) > 0.01


def test_an_untrained_adapter_changes_nothing(library, tmp_path):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(library.fresh("llama"), lora()()).save_pretrained(tmp_path)  # B starts at zero
    pair = ModelPair.load(library.saved("llama"), tmp_path)
    updates = [m for m in pair.matrices() if m.update is not None]
    assert updates
    assert all(not m.delta(torch.float64).any() for m in pair.matrices())
    assert all(torch.equal(m.tuned_dense(torch.float64), m.base.double()) for m in updates)


def test_half_precision_adapters_and_bases(library, tmp_path):
    model = trained(library, "llama", lora()(), tmp_path / "f32")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    library.fresh("llama").to(torch.float16).save_pretrained(tmp_path / "base")
    pair = ModelPair.load(tmp_path / "base", tmp_path / "adapter")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    (matrix,) = pair.matrices(["layers.0.self_attn.q_proj"])
    assert matrix.base.dtype == torch.float16
    assert torch.equal(matrix.delta(torch.float64), 6 / 4 * (b.double() @ a.double()))


def test_a_pickled_adapter(library, tmp_path):
    model = trained(library, "llama", lora()(), tmp_path / "safe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / "adapter_model.bin").is_file()
    base = library.saved("llama")
    compare(ModelPair.load(base, tmp_path / "bin"), ModelPair.load(base, tmp_path / "safe"), 0)


# ---------------------------------------------------------------------------------------------------- refused


def edited(library: Any, folder: Path, **changes: Any) -> Path:
    trained(library, "llama", lora()(), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_starts_that_the_adapter_does_not_tell_are_refused(library, tmp_path, init):
    with pytest.raises(InputError, match=rf"init_lora_weights='{init}'.*merged model"):
        ModelPair.load(library.saved("llama"), edited(library, tmp_path, init_lora_weights=init))


def test_repeated_layers_are_refused(library, tmp_path):
    with pytest.raises(InputError, match="layer_replication"):
        ModelPair.load(library.saved("llama"), edited(library, tmp_path, layer_replication=[[0, 2], [1, 2]]))


@pytest.mark.parametrize(("wrong", "message"), [("q_proj.x", "adapter of another base"), ("layers.7", "no such layer")])
def test_an_adapter_that_peft_would_pass_over_is_refused(library, tmp_path, wrong, message):
    """PEFT warns of tensors that it misses and is silent about those it cannot place: either changes nothing."""
    from safetensors.torch import load_file, save_file

    trained(library, "llama", lora(use_dora=True)(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    right = "q_proj" if wrong.startswith("q_proj") else "layers.1"
    save_file({name.replace(right, wrong): t for name, t in load_file(file).items()}, file)
    with pytest.raises(InputError, match=message):
        ModelPair.load(library.saved("llama"), tmp_path)


def test_an_unmerged_adapter_in_a_state_dict_is_refused(library, tmp_path):
    """The base's weights lie in it unchanged: read as a model it would show no update."""
    model = trained(library, "llama", lora()(), tmp_path)
    with pytest.raises(InputError, match="not merged"):
        ModelPair.load(library.saved("llama"), dict(model.state_dict()))
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    with pytest.raises(InputError, match="not merged"):
        ModelPair.load(library.saved("llama"), tmp_path / "whole.pt")


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "XLORA"])
def test_adapters_that_change_no_weight_are_refused(library, tmp_path, kind):
    with pytest.raises(InputError, match=f"{kind} adapter.*changes no weight"):
        ModelPair.load(library.saved("llama"), edited(library, tmp_path, peft_type=kind))


def test_a_prompt_tuned_model_in_memory_is_refused(library):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(library.fresh("llama"), config)
    with pytest.raises(InputError, match=r"PROMPT_TUNING adapter.*changes no weight"):
        ModelPair.load(library.model("llama"), model)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_an_adapter_of_another_architecture(library, tmp_path, kind):
    family, config = (FACTORED | DENSE)[kind]
    trained(library, family, config(), tmp_path)
    with pytest.raises(InputError, match=r"adapter of another base(:.*nearest there: layers\.|.*Target modules)"):
        ModelPair.load(library.saved("neox"), tmp_path)


@pytest.mark.parametrize("kind", ["plain", "dora", "loha"])
def test_an_adapter_of_another_size(library, tmp_path, kind):
    import transformers

    family, config = (FACTORED | DENSE)[kind]
    trained(library, family, config(), tmp_path / "adapter")
    sizes = library.configs["llama"]().to_dict() | {"intermediate_size": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match=r"adapter of another base"):
        ModelPair.load(tmp_path / "wide", tmp_path / "adapter")


def test_an_adapter_without_weights_or_kind(library, tmp_path):
    folder = edited(library, tmp_path, peft_type=None)
    with pytest.raises(InputError, match="no peft_type"):
        open_checkpoint(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        open_checkpoint(edited_config(folder))


def edited_config(folder: Path) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "LORA"}))
    return folder


def test_a_merging_adapter_needs_a_folder_for_its_base(library, tmp_path):
    trained(library, "llama", lora(use_dora=True)(), tmp_path)
    with pytest.raises(InputError, match=r"Hugging Face folder with its config\.json"):
        ModelPair.load(dict(library.model("llama").state_dict()), tmp_path)


def test_an_adapter_is_no_base(library, tmp_path):
    trained(library, "llama", lora()(), tmp_path)
    with pytest.raises(InputError, match="is an adapter; give the model it was trained on"):
        ModelPair.load(tmp_path, library.saved("llama"))


def test_a_classifier_trained_on_a_language_model(library, tmp_path):
    """LoRA for sequence classification brings a head that the base does not have: listed, and the rest compared."""
    import peft
    import transformers

    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForSequenceClassification(library.configs["llama"]())
        model.model.load_state_dict(library.model("llama").model.state_dict())
        model = peft.get_peft_model(model, lora(task_type="SEQ_CLS")())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
    pair = ModelPair.load(library.saved("llama"), tmp_path)
    assert pair.alignment.only_tuned == ["score"]
    expected = merged(model).model.state_dict()
    changed = 0
    for matrix in pair.matrices([name for name in pair.names() if name.startswith("layers.")]):
        torch.testing.assert_close(matrix.tuned_dense(torch.float32), expected[f"{matrix.name}.weight"])
        changed += matrix.update is not None
    assert changed == 2 * len(LINEAR)


def test_two_updates_of_one_module_are_refused(library, tmp_path):
    from safetensors.torch import load_file, save_file

    trained(library, "llama", lora()(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors |= {name.replace("base_model.model.model.", "base_model.model."): t + 1 for name, t in tensors.items()}
    save_file(tensors, file)
    with pytest.raises(InputError, match="two updates of one module"):
        ModelPair.load(library.saved("llama"), tmp_path)
