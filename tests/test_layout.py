"""Which matrix each tensor is: the parts do what the library's own modules do with the same input."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import GROUPS, HEADS, HIDDEN, VOCABULARY

from finetune_lens.checkpoints import LowRank, Stored, lay_out, open_checkpoint
from finetune_lens.errors import InputError
from finetune_lens.pair import ModelPair

FAMILIES = (
    "gpt2", "llama", "llama-bias-tied", "qwen2", "qwen3", "gemma2", "gemma3", "neox", "phi3", "mixtral", "qwen3-moe",
    "gpt-oss", "llama4", "falcon-new", "falcon-multi-query", "falcon-rw", "bloom", "opt", "mpt", "bigcode-multi-query",
    "bigcode", "codegen",
)  # fmt: skip
TOKENS = torch.arange(16)[:, None]  # sixteen sequences of one token: at position 0 a rotation changes nothing

LLAMA = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
ATTENTION = {k: v for k, v in LLAMA.items() if k.startswith("self_attn")}
EXPERTS = {f"mlp.experts.{e}.{c}_proj": c for e in range(3) for c in ("gate", "up", "down")}
GPT2 = {
    "attn.c_attn.q": "q", "attn.c_attn.k": "k", "attn.c_attn.v": "v", "attn.c_proj": "o", "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}  # fmt: skip
NEOX = {
    "query_key_value.q": "q", "query_key_value.k": "k", "query_key_value.v": "v", "dense": "o",
    "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down",
}  # fmt: skip
FALCON = {k if k.startswith("mlp") else f"self_attention.{k}": v for k, v in NEOX.items()}
BLOCK = {
    "gpt2": ("h.", GPT2),
    "llama": ("layers.", LLAMA),
    "llama-bias-tied": ("layers.", LLAMA),
    "qwen2": ("layers.", LLAMA),
    "qwen3": ("layers.", LLAMA),
    "gemma2": ("layers.", LLAMA),
    "gemma3": ("layers.", LLAMA),
    "neox": ("layers.", {k if k.startswith("mlp") else f"attention.{k}": v for k, v in NEOX.items()}),
    "phi3": (
        "layers.",
        {f"self_attn.qkv_proj.{c}": c for c in "qkv"} | {k: v for k, v in LLAMA.items() if v not in ("q", "k", "v")},
    ),
    "mixtral": ("layers.", ATTENTION | {"mlp.gate": "mlp.gate"} | EXPERTS),
    "qwen3-moe": ("layers.", ATTENTION | {"mlp.gate": "mlp.gate"} | EXPERTS),
    "gpt-oss": ("layers.", ATTENTION | {"mlp.router": "mlp.router"} | EXPERTS),
    "llama4": (
        "layers.",
        ATTENTION
        | {k.replace("mlp", "feed_forward"): v for k, v in EXPERTS.items()}
        | {f"feed_forward.shared_expert.{c}_proj": c for c in ("gate", "up", "down")}
        | {"feed_forward.router": "feed_forward.router"},
    ),
    "falcon-new": ("h.", FALCON),
    "falcon-multi-query": ("h.", FALCON),
    "falcon-rw": ("h.", FALCON),
    "bloom": ("h.", FALCON),
    "opt": (
        "decoder.layers.",
        {f"self_attn.{c}_proj": c for c in "qkv"} | {"self_attn.out_proj": "o", "fc1": "up", "fc2": "down"},
    ),
    "mpt": (
        "blocks.",
        {f"attn.Wqkv.{c}": c for c in "qkv"} | {"attn.out_proj": "o", "ffn.up_proj": "up", "ffn.down_proj": "down"},
    ),
    "bigcode-multi-query": ("h.", GPT2),
    "bigcode": ("h.", GPT2),
    "codegen": ("h.", {"attn.qkv_proj": "qkv", "attn.out_proj": "o", "mlp.fc_in": "up", "mlp.fc_out": "down"}),
}
OUTSIDE = {
    "wte": "embed", "wpe": "pos", "embed_tokens": "embed", "decoder.embed_tokens": "embed", "embed_in": "embed",
    "word_embeddings": "embed", "decoder.embed_positions": "pos", "lm_head": "unembed",
}  # fmt: skip


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def parts_of(source: Any, **options: Any) -> dict[str, Any]:
    return lay_out(open_checkpoint(source), **options).parts


def without_prefix(module: str) -> str:
    for prefix in ("model.", "transformer.", "gpt_neox."):
        module = module.removeprefix(prefix)
    return "lm_head" if module == "embed_out" else module


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_matrix_has_its_layer_and_component(library, family):
    prefix, components = BLOCK[family]
    parts = {name: part for name, part in parts_of(library.saved(family)).items() if part.is_matrix}
    expected = {f"{prefix}{layer}.{name}": (layer, c) for layer in (0, 1) for name, c in components.items()}
    inside = {name: (part.layer, part.component) for name, part in parts.items() if part.layer is not None}
    assert inside == expected
    outside = {name: part.component for name, part in parts.items() if part.layer is None}
    assert outside == {name: OUTSIDE[name] for name in outside}
    assert {"embed"} <= set(outside.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_maps_an_input_as_its_module_does(library, family):
    """hidden @ M.T + bias is the module's output, on disk and in memory: nothing is transposed, nothing missing."""
    from transformers.pytorch_utils import Conv1D

    model = library.model(family)
    for source in (library.saved(family), model):
        parts = parts_of(source, fused=True)
        covered = set()
        for path, module in model.named_modules():
            name = without_prefix(path)
            if isinstance(module, torch.nn.Embedding):
                weight = parts[name].read()
                assert torch.equal(weight.T, module.weight)  # a token's column is its embedding
            elif isinstance(module, (torch.nn.Linear, Conv1D)) and (name in parts or name != "lm_head"):
                weight = parts[name].read()
                x = torch.randn(3, weight.shape[1])
                y = x @ weight.T
                out = module(x)
                out = out[-1] if isinstance(out, tuple) else out  # a router gives its scores, then its logits
                close(y + parts[f"{name}.bias"].read() if module.bias is not None else y, out)
            else:
                continue
            covered.add(name)
        left = {n for n, p in parts.items() if p.is_matrix} - covered
        assert all(".experts." in n or n.endswith(("mlp.gate", ".router")) for n in left), left
        if "lm_head" not in parts:
            assert model.config.tie_word_embeddings


def qkv_of(model: Any, layer: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What enters the fused projection of a block, and the q, k, v that the library makes of it, (token, out)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    block = next(m for path, m in model.named_modules() if path.endswith(f".{layer}"))
    names = ("attn", "self_attention", "attention", "self_attn")
    attention = next(m for path, m in block.named_modules() if path in names)
    fused = next(
        m for path, m in attention.named_modules() if path in ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
    )
    seen: dict[str, Any] = {}
    fused.register_forward_pre_hook(lambda _, args: seen.__setitem__("x", args[0].reshape(len(TOKENS), -1)))
    fused.register_forward_hook(lambda _, args, out: seen.__setitem__("out", out))

    def spy(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        if module is attention:
            seen["qkv"] = q, k, v
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2).contiguous(), None

    splitter = next((n for n in ("_split_heads", "_reshape") if hasattr(attention, n)), None)
    if splitter:
        split = getattr(attention, splitter)

        def told(mixed: torch.Tensor) -> Any:
            seen["qkv"] = split(mixed)
            return seen["qkv"]

        setattr(attention, splitter, told)
    elif model.config.model_type != "mpt":
        ALL_ATTENTION_FUNCTIONS["spy"] = spy
        model.config._attn_implementation = "spy"
    model(TOKENS)
    ALL_ATTENTION_FUNCTIONS.pop("spy", None)
    if model.config.model_type == "mpt":  # splits in the midst of its forward: the same call
        seen["qkv"] = seen["out"].chunk(3, dim=2)
    return seen["x"], {c: t.reshape(len(TOKENS), -1) for c, t in zip("qkv", seen["qkv"], strict=True)}


FUSED = (
    "gpt2", "neox", "phi3", "falcon-new", "falcon-multi-query", "falcon-rw", "bloom", "mpt", "bigcode-multi-query",
    "bigcode",
)  # fmt: skip


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", FUSED)
def test_q_k_v_are_those_that_the_attention_computes(library, family, layer):
    model = library.fresh(family)
    for name, parameter in model.named_parameters():
        if name.endswith(("c_attn.bias", "query_key_value.bias")):
            parameter.zero_()
    x, computed = qkv_of(model, layer)
    parts = {
        p.component: p for p in parts_of(library.saved(family)).values() if p.layer == layer and p.component in "qkv"
    }
    assert set(parts) == {"q", "k", "v"}
    if family == "falcon-new":  # the library repeats keys and values for each query of their group
        for c in "kv":
            computed[c] = computed[c].reshape(len(x), GROUPS, HEADS // GROUPS, -1)[:, :, 0].flatten(1)
    for component, expected in computed.items():
        close(x @ parts[component].read().T, expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss", "llama4"])
def test_experts_compute_what_the_library_computes(library, family):
    """Each expert's gate, up and down, from disk and from memory, rebuild its output."""
    model = library.fresh(family)
    endings = (".1.mlp.experts", ".1.feed_forward.experts")
    experts = next(m for path, m in model.named_modules() if path.endswith(endings))
    for name, parameter in experts.named_parameters():
        if name.endswith("_bias"):
            parameter.zero_()
    x = torch.randn(5, HIDDEN)
    stem = "layers.1.feed_forward.experts" if family == "llama4" else "layers.1.mlp.experts"
    for source in (library.saved(family), library.model(family)):
        parts = parts_of(source)
        for e in range(3):
            gate, up, down = (parts[f"{stem}.{e}.{c}_proj"].read() for c in ("gate", "up", "down"))
            if family == "llama4":
                expected = experts(x.repeat(3, 1)).reshape(3, 5, HIDDEN)[e]
            else:
                expected = experts(x, torch.full((5, 1), e), torch.ones(5, 1))
            if family == "gpt-oss":
                hidden = (x @ up.T + 1) * (x @ gate.T) * torch.sigmoid(experts.alpha * (x @ gate.T))
            else:
                hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            close(hidden @ down.T, expected)


def test_phi3_gate_lies_above_up(library):
    model = library.model("phi3")
    mlp = model.model.layers[1].mlp
    parts = parts_of(library.saved("phi3"))
    x = torch.randn(5, HIDDEN)
    gate, up, down = (parts[f"layers.1.mlp.{c}_proj"].read() for c in ("gate", "up", "down"))
    close((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T, mlp(x))


@pytest.mark.parametrize("family", FUSED)
def test_fused_on_request(library, family):
    whole = [p for p in parts_of(library.saved(family), fused=True).values() if p.layer == 0]
    assert [p.component for p in whole if p.component in ("q", "k", "v", "qkv")] == ["qkv"]


def test_an_unknown_fused_layout_is_kept_whole_and_said(library):
    """CodeGen orders q, v, k in four blocks: split as another family's it would be silently wrong."""
    layout = lay_out(open_checkpoint(library.saved("codegen")))
    assert "h.0.attn.qkv_proj" in layout.parts
    assert any("kept whole" in note for note in layout.notes)


def test_without_a_config_what_needs_heads_is_kept_whole(library):
    layout = lay_out(open_checkpoint(library.saved("neox") / "model.safetensors"))
    assert layout.parts["layers.0.attention.query_key_value.q"].shape == (HIDDEN, HIDDEN)  # config.json is beside it
    bare = lay_out(open_checkpoint(dict(library.model("neox").state_dict())))
    assert bare.parts["layers.0.attention.query_key_value"].shape == (3 * HIDDEN, HIDDEN)
    assert any("config.json" in note for note in bare.notes)


# ---------------------------------------------------------------------------------------------------- nanoGPT


def nanogpt(model: Any) -> dict[str, torch.Tensor]:
    """The state dict that nanoGPT's model.py would have: GPT-2's names over torch.nn.Linear, tied head included."""
    conv1d = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    state = model.state_dict()
    return {name: t.T.contiguous() if name.endswith(conv1d) else t for name, t in state.items()}


def test_nanogpt_has_the_same_matrices_as_gpt2(library, tmp_path):
    model = library.model("gpt2")
    compiled = {f"_orig_mod.{name}": t for name, t in nanogpt(model).items()}
    args = {"n_layer": 2, "n_head": HEADS, "n_embd": HIDDEN, "block_size": 24, "vocab_size": VOCABULARY}
    torch.save({"model": compiled, "model_args": args, "iter_num": 7, "best_val_loss": 1.0}, tmp_path / "ckpt.pt")
    pair = ModelPair.load(tmp_path / "ckpt.pt", library.saved("gpt2"))
    assert not pair.alignment.only_base
    assert not pair.alignment.only_tuned
    assert len([n for n in pair.names() if ".c_attn." in n]) == 6
    for matrix in pair.matrices():
        assert torch.equal(matrix.base, matrix.tuned), matrix.name
    said = "\n".join(pair.alignment.notes)
    assert "torch.nn.Linear" in said
    assert "Conv1D" in said


def test_orientation_can_be_overridden(library):
    parts = parts_of(library.saved("gpt2"), orientation="linear", fused=True)
    assert torch.equal(parts["h.0.mlp.c_fc"].read(), library.model("gpt2").transformer.h[0].mlp.c_fc.weight)
    auto = parts_of(library.saved("gpt2"), fused=True)
    assert torch.equal(auto["h.0.mlp.c_fc"].read(), library.model("gpt2").transformer.h[0].mlp.c_fc.weight.T)


def test_contradicting_orientations_are_refused():
    tensors = {"h.0.attn.c_attn.weight": torch.randn(8, 24), "h.0.mlp.c_fc.weight": torch.randn(32, 8)}
    with pytest.raises(InputError, match=r"c_attn.*\(in, out\).*c_fc.*\(out, in\).*--orientation"):
        parts_of(tensors)


# ---------------------------------------------------------------------------------------------------- names, parts


@pytest.mark.parametrize(
    ("name", "layer", "component"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", 3, "q"),
        ("bert.encoder.layer.3.attention.output.dense.weight", 3, "o"),
        ("bert.encoder.layer.3.intermediate.dense.weight", 3, "up"),
        ("bert.encoder.layer.3.output.dense.weight", 3, "down"),
        ("bert.encoder.layer.3.output.LayerNorm.weight", 3, "norm"),
        ("distilbert.transformer.layer.1.attention.q_lin.weight", 1, "q"),
        ("distilbert.transformer.layer.1.ffn.lin2.weight", 1, "down"),
        ("decoder.block.2.layer.0.SelfAttention.k.weight", 2, "k"),
        ("decoder.block.2.layer.0.SelfAttention.o.weight", 2, "o"),
        ("decoder.block.2.layer.1.DenseReluDense.wi_0.weight", 2, "gate"),
        ("decoder.block.2.layer.1.DenseReluDense.wo.weight", 2, "down"),
        ("layers.12.attention.wq.weight", 12, "q"),
        ("layers.12.attention.wo.weight", 12, "o"),
        ("layers.12.feed_forward.w1.weight", 12, "gate"),
        ("layers.12.feed_forward.w3.weight", 12, "up"),
        ("layers.12.feed_forward.w2.weight", 12, "down"),
        ("transformer.blocks.0.norm_1.weight", 0, "norm"),
        ("model.layers.0.self_attn.vln_proj.weight", 0, "self_attn.vln_proj"),
        ("tok_embeddings.weight", None, "embed"),
        ("output.weight", None, "unembed"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", 0, "self_attn.kv_a_proj_with_mqa"),
        ("transformer.h.0.mlp.fc_in.weight", 0, "up"),
        ("model.layers.4.mlp.shared_expert.up_proj.weight", 4, "up"),
        ("something.of.its.own.weight", None, "something.of.its.own"),
    ],
)
def test_names_of_other_families(name, layer, component):
    (part,) = parts_of({name: torch.randn(6, 4)}).values()
    assert (part.layer, part.component) == (layer, component)


def test_two_models_in_one_checkpoint_keep_their_names():
    tensors = {"model.layers.0.fc1.weight": torch.zeros(3, 2), "transformer.layers.0.fc1.weight": torch.ones(3, 2)}
    parts = parts_of(tensors)
    assert {n: float(p.read()[0, 0]) for n, p in parts.items()} == {
        "model.layers.0.fc1": 0.0,
        "transformer.layers.0.fc1": 1.0,
    }


def test_buffers_are_set_aside_and_named():
    layout = lay_out(
        open_checkpoint({"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.mlp.c_fc.weight": torch.ones(8, 2)})
    )
    assert layout.ignored == ["h.0.attn.bias"]
    assert list(layout.parts) == ["h.0.mlp.c_fc"]


@pytest.mark.parametrize("family", ["neox", "gpt2", "phi3"])
def test_a_factored_update_is_cut_like_its_matrix(library, family):
    torch.manual_seed(1)
    for part in parts_of(library.saved(family)).values():
        if part.is_matrix and part.rows is not None:
            update = LowRank(torch.randn(part.whole_shape[0], 2), torch.randn(2, part.whole_shape[1]), 0.5)
            whole = Stored.of(update.dense().T if part.transpose else update.dense())
            close(part.of_update(update).dense(), replace(part, stored=whole).read())


def test_config_of_a_multimodal_model_is_looked_into(library, tmp_path):
    """The language model's sizes lie under text_config."""
    source = library.saved("neox")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "both", "text_config": config}))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    assert "layers.0.attention.query_key_value.k" in parts_of(tmp_path)
