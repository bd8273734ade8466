"""Whatever a checkpoint looks like, the model built from it gives the logits of the model that was saved."""

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import lora, merged, trained

from finetune_lens.checkpoints import open_checkpoint
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked.loading import as_model, load_model, shares_weights
from finetune_lens.pair import ModelPair

IDS = torch.tensor([[3, 4, 5, 6, 7], [9, 3, 7, 5, 11]])


def logits(model: HookedModel) -> torch.Tensor:
    return model.run(IDS).logits


def loaded(path: Any, **options: Any) -> HookedModel:
    return load_model(open_checkpoint(path), device="cpu", **options)


def near(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one.float(), other.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-bias-tied", "gemma2", "mixtral", "bloom", "phi3"])
def test_folders(library, tmp_path, family):
    """As saved in one piece and in shards."""
    expected = library.model(family)(IDS).logits
    one = loaded(library.saved(family))
    assert torch.equal(logits(one), expected)
    assert one.fingerprint
    assert not one.module.training
    library.model(family).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(loaded(tmp_path)), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama-bias-tied", "neox"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_weights_alone(library, tmp_path, family, prefix):
    """A .pt or .safetensors file without a config: it is beside the weights, or given as path, folder or mapping."""
    module = library.model(family)
    expected = module(IDS).logits
    torch.save({"state_dict": {prefix + n: t for n, t in module.state_dict().items()}}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights alone.*pass --config"):
        loaded(tmp_path / "weights.pt")
    config = library.saved(family) / "config.json"
    for given in (config, library.saved(family), str(config), json.loads(config.read_text()), module.config):
        assert torch.equal(logits(loaded(tmp_path / "weights.pt", config=given)), expected)
    (tmp_path / "config.json").write_text(config.read_text())
    assert torch.equal(logits(loaded(tmp_path / "weights.pt")), expected)
    single = load_file(library.saved(family) / "model.safetensors")
    save_file({prefix + n: t for n, t in single.items()}, tmp_path / "single.safetensors")
    assert torch.equal(logits(loaded(tmp_path / "single.safetensors")), expected)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_nanogpt(tmp_path, biases, compiled):
    """(out, in) weights under GPT-2's names, its sizes as model_args, with or without biases: the same model in HF."""
    import transformers

    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 40, "n_positions": 24}
    config = transformers.GPT2Config(**sizes, activation_function="gelu", bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.2)
        if name.endswith("bias") and not biases:
            parameter.zero_()
    turned = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    state = {
        ("_orig_mod." if compiled else "") + name: t.T.contiguous() if name.endswith(turned) else t
        for name, t in model.state_dict().items()
        if biases or not name.endswith("bias")
    }
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 40, "block_size": 24, "bias": biases, "dropout": 0.0}
    torch.save({"model": state, "model_args": args, "iter_num": 7}, tmp_path / "ckpt.pt")
    near(logits(loaded(tmp_path / "ckpt.pt")), model(IDS).logits, 1e-6)
    assert model(IDS).logits.std() > 0.05


def test_number_types(library, tmp_path):
    """Float32 on a CPU whatever is stored; another type where it is asked for; nothing else."""
    model = library.fresh("llama").bfloat16()
    model.save_pretrained(tmp_path)
    found = loaded(tmp_path)
    assert found.dtype == torch.float32
    near(logits(found), model.float()(IDS).logits)
    for name in ("bfloat16", "float16", "float64"):
        found = loaded(tmp_path, dtype=name)
        assert {p.dtype for p in found.module.parameters()} == {getattr(torch, name)}
        assert found.describe()["dtype"] == name
        near(logits(found), model(IDS).logits, 0.1)
    with pytest.raises(InputError, match=r"dtype is one of auto, float32, .*; found 'int8'"):
        loaded(tmp_path, dtype="int8")


SHARED = {"plain": ("llama", lora()), "conv1d": ("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True)),
          "dora": ("llama", lora(use_dora=True))}  # fmt: skip
APART = {"biases": ("llama-bias-tied", lora(bias="lora_only")), "pissa": ("llama", lora(init_lora_weights="pissa")),
         "olora": ("llama", lora(init_lora_weights="olora"))}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "in_memory"), [*((kind, False) for kind in [*SHARED, *APART]), *((k, True) for k in ("plain", "biases"))]
)
def test_an_adapter_and_its_base(library, tmp_path, kind, in_memory):
    """One set of weights serves both sides where switching the adapter off gives the base's bits; both are right."""
    family, config = (SHARED | APART)[kind]
    wrapped = trained(library, family, config(), tmp_path)
    expected, plain = wrapped.eval()(IDS).logits, library.model(family)
    before = {name: t.clone() for name, t in plain.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        base, tuned = ModelPair.load(plain if in_memory else library.saved(family), tmp_path).models(device="cpu")
    assert shares_weights(base, tuned) == (kind in SHARED)
    for _ in range(2):  # in turns
        near(logits(tuned), expected)
        assert torch.equal(logits(base), plain(IDS).logits)
    assert (expected - plain(IDS).logits).abs().max() > 1e-2
    places = [m.module.get_input_embeddings().weight.data_ptr() for m in (base, tuned)]
    assert (places[0] == places[1]) == (kind in SHARED)
    after = plain.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_models_in_memory(library, tmp_path):
    """Run as they are: the same object, nothing changed, training mode and adapter as they were."""
    plain = library.fresh("llama").train()
    model = as_model(plain)
    assert model.module is plain
    assert torch.equal(logits(model), library.model("llama")(IDS).logits)
    assert plain.training
    wrapped = trained(library, "llama", lora()(), tmp_path).train()
    keys, state = list(dict(wrapped.named_modules())), {n: t.clone() for n, t in wrapped.state_dict().items()}
    base, tuned = ModelPair.load(plain, wrapped).models()
    near(logits(tuned), merged(copy.deepcopy(wrapped))(IDS).logits)
    assert torch.equal(logits(base), library.model("llama")(IDS).logits)
    assert wrapped.training
    assert list(dict(wrapped.named_modules())) == keys
    assert all(torch.equal(t, state[n]) for n, t in wrapped.state_dict().items())
    assert as_model(model) is model


def test_device_map(library):
    """A mapping of modules to devices, dispatched by accelerate."""
    for plan in ({"model": "cpu", "lm_head": "cpu"}, {"": "cpu"}, "balanced"):
        found = load_model(open_checkpoint(library.saved("llama")), device=plan, dtype="float32")
        assert torch.equal(logits(found).cpu(), library.model("llama")(IDS).logits)


def test_tokenizers(library, tmp_path):
    """The one beside the weights, or the one given; a tuned model without one takes the base's."""
    from test_patching import letters

    for name in ("base", "tuned"):
        library.model("llama").save_pretrained(tmp_path / name)
    letters().save_pretrained(tmp_path / "base")
    assert loaded(tmp_path / "base").tokenizer("abc")["input_ids"] == letters()("abc")["input_ids"]
    assert loaded(tmp_path / "tuned").tokenizer is None
    assert loaded(tmp_path / "tuned", tokenizer=tmp_path / "base").tokenizer is not None
    own = letters()
    assert loaded(tmp_path / "tuned", tokenizer=own).tokenizer is own
    base, tuned = ModelPair.load(tmp_path / "base", tmp_path / "tuned").models()
    assert tuned.tokenizer is base.tokenizer is not None
    with pytest.raises(InputError, match="holds no tokenizer; expected a folder with"):
        loaded(tmp_path / "base", tokenizer=tmp_path / "tuned")
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="the tokenizer there cannot be loaded"):
        loaded(tmp_path / "tuned")


def test_an_adapter_alone(library, tmp_path):
    trained(library, "llama", lora()(), tmp_path)
    with pytest.raises(
        InputError, match=r"is an adapter and does not run alone: load it with its base .*ModelPair.load"
    ):
        as_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"hidden_size": 48},
            r"is \(40, 32\), and its config makes it \(40, 48\); is the config that of another model",
        ),
        ({"num_hidden_layers": 3}, "lacks 9 tensors of LlamaForCausalLM: model.layers.2"),
        ({"num_hidden_layers": 1}, "has, beyond the model, 9 tensors of LlamaForCausalLM: model.layers.1"),
        ({"model_type": "gpt2"}, "GPT2LMHeadModel|its config makes it"),
        ({"model_type": "nothing"}, "knows no architecture 'nothing'"),
        ({"model_type": None}, "weights alone"),
        ({"model_type": "vit"}, "no causal language model: its config says vit"),
    ],
)
def test_configs_of_other_models(library, change, words):
    facts = json.loads((library.saved("llama") / "config.json").read_text()) | change
    config = {name: value for name, value in facts.items() if value is not None}
    with pytest.raises(InputError, match=words):
        loaded(library.saved("llama"), config=config)


def test_configs_that_are_not_there(library, tmp_path):
    for given in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(InputError, match=r"no such config: .*; expected a config.json or a folder with one"):
            loaded(library.saved("llama"), config=given)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(InputError, match=r"config\.json"):
        loaded(library.saved("llama"), config=tmp_path)


def test_nothing_is_executed(library, tmp_path):
    """Neither code that a config names, nor a pickle's."""
    marker = tmp_path / "executed"
    folder = tmp_path / "model"
    library.model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    (folder / "evil.py").write_text(code)
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "tokenizer_class": "EvilTokenizer"}))
    try:
        near(logits(loaded(folder)), library.model("llama")(IDS).logits)
    except InputError as error:
        assert "tokenizer" in str(error)  # noqa: PT017
    assert not marker.exists()
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "evil"}))
    with pytest.raises(InputError, match="knows no architecture 'evil'"):
        loaded(folder)
    torch.save({"w": torch.ones(2), "x": Payload(marker)}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="refused"):
        loaded(tmp_path / "evil.pt", config=library.saved("llama"))
    assert not marker.exists()


class Payload:
    """A pickle of it makes a folder when it is loaded by anything that executes pickles."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)
