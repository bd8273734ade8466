"""Decoders beyond those that every test sees: gates hold, re-entry is exact or said not to be used."""

from typing import Any

import pytest
import torch

from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel, gates

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40,
    "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "apertus": {}, "arcee": {}, "cohere": {}, "cohere2": {"sliding_window": 8}, "deepseek_v3": EXPERTS | LATENT,
    "ernie4_5": {}, "exaone4": {"sliding_window": 4, "sliding_window_pattern": 2}, "gemma": HEAD, "glm": HEAD,
    "glm4": HEAD, "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "granite": {}, "granitemoe": EXPERTS,
    "helium": HEAD, "hunyuan_v1_dense": HEAD, "nanochat": {}, "nemotron": {}, "olmo": {}, "olmo2": {}, "olmo3": {},
    "olmoe": EXPERTS, "persimmon": {}, "phi": {"num_key_value_heads": 4}, "qwen2_moe": EXPERTS, "seed_oss": HEAD,
    "smollm3": {}, "stablelm": {}, "starcoder2": {}, "vaultgemma": HEAD, "biogpt": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16,
}  # fmt: skip
# With states beside keys and values: every patch is a whole forward pass there.
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": EXPERTS | LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # has no keys and values to keep
}


def build(name: str, options: dict[str, Any]) -> HookedModel:
    import transformers

    config = transformers.AutoConfig.for_model(name, **(SMALL | options))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return HookedModel(model, name=name)


def worst(model: HookedModel) -> tuple[dict[str, float], list[str]]:
    rows = gates.random_rows(40, (9, 7, 9), 0, (0, 1, 2))
    plain = gates.alone(model, rows)
    off, notes = gates.reentered(model, rows)
    return {
        "hooked": gates.hooked(model, rows, plain), "put back": gates.put_back(model, rows, plain),
        "batched": gates.batched(model, rows), "left": gates.padding(model, rows, plain, "left"),
        "right": gates.padding(model, rows, plain, "right"), "re-entered": off,
    }, notes  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name):
    differences, notes = worst(build(name, DECODERS[name]))
    assert not notes
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_cannot_be_re_entered_runs_in_full_and_says_so(name):
    differences, (note,) = worst(build(name, HYBRIDS[name]))
    assert "re-entry was not used" in note
    assert max(differences.values()) < 1e-5, differences


def test_several_residual_streams_are_refused():
    streams = {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    model = build("gemma3n_text", HEAD | streams | {"laurel_rank": 4})
    with pytest.raises(InputError, match="residual stream of shape"):
        model.run(torch.zeros(1, 3, dtype=torch.int64), capture=["blocks.0.hook_resid_pre"])
