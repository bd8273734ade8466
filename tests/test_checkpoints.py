"""Tensors out of every kind of file are the tensors that were put in; quantised ones are their numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetune_lens.checkpoints import Checkpoint, lay_out, open_checkpoint
from finetune_lens.errors import InputError

FAMILIES = ("gpt2", "llama", "llama-bias-tied", "mixtral", "neox", "gpt-oss", "phi3")


def same_parts(found: Checkpoint, expected: Checkpoint) -> None:
    """Both hold the same parts, bit for bit and in the same type."""
    ours, theirs = lay_out(found, config=expected.config).parts, lay_out(expected).parts
    assert set(ours) == set(theirs)
    for name, part in ours.items():
        other = theirs[name]
        assert (part.shape, part.component, part.layer) == (other.shape, other.component, other.layer), name
        assert part.stored.dtype == part.read().dtype == other.read().dtype, name
        assert tuple(part.read().shape) == part.shape, name
        assert torch.equal(part.read(), other.read()), name


def state_of(library: Any, family: str) -> dict[str, torch.Tensor]:
    return dict(library.model(family).state_dict())


def as_safetensors(library: Any, family: str, folder: Path) -> Path:
    return library.saved(family)


def as_shards(library: Any, family: str, folder: Path) -> Path:
    library.model(family).save_pretrained(folder, max_shard_size="12KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def as_index_file(library: Any, family: str, folder: Path) -> Path:
    return as_shards(library, family, folder) / "model.safetensors.index.json"


def as_pickle(library: Any, family: str, folder: Path) -> Path:
    torch.save(state_of(library, family), folder / "weights.pt")
    return folder / "weights.pt"


def as_old_pickle(library: Any, family: str, folder: Path) -> Path:
    torch.save(state_of(library, family), folder / "weights.pth", _use_new_zipfile_serialization=False)
    return folder / "weights.pth"


def as_pickle_folder(library: Any, family: str, folder: Path) -> Path:
    torch.save(state_of(library, family), folder / "pytorch_model.bin")
    shutil.copy(library.saved(family) / "config.json", folder)
    return folder


def as_pickle_shards(library: Any, family: str, folder: Path) -> Path:
    """As transformers wrote them before safetensors."""
    state = state_of(library, family)
    where = {name: f"pytorch_model-{1 + i % 3:05d}-of-00003.bin" for i, name in enumerate(state)}
    for file in set(where.values()):
        torch.save({n: t for n, t in state.items() if where[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def as_state_dict(library: Any, family: str, folder: Path) -> dict[str, torch.Tensor]:
    return state_of(library, family)


WAYS = (
    as_safetensors, as_shards, as_index_file, as_pickle, as_old_pickle, as_pickle_folder, as_pickle_shards,
    as_state_dict,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_gives_the_module_in_memory(library, tmp_path, family, way):
    if way is as_pickle_shards and family in ("gpt2", "llama-bias-tied"):
        pytest.skip("tied names in different files are two tensors")
    same_parts(open_checkpoint(way(library, family, tmp_path)), open_checkpoint(library.model(family)))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "base_model.model.", "_fsdp_wrapped_module."]
)
def test_wrapper_prefixes(library, prefix):
    state = {prefix + name: t for name, t in state_of(library, "llama").items()}
    same_parts(open_checkpoint(state), open_checkpoint(library.model("llama")))


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."])
def test_wrappers_inside_a_name(library, wrapper):
    state = {n.replace(".self_attn.", f".{wrapper}self_attn."): t for n, t in state_of(library, "llama").items()}
    assert any(wrapper in name for name in state)
    same_parts(open_checkpoint(state), open_checkpoint(library.model("llama")))


def test_a_compiled_and_a_wrapped_module(library):
    model = library.fresh("gpt2")
    same_parts(open_checkpoint(torch.nn.DataParallel(model)), open_checkpoint(library.model("gpt2")))
    same_parts(open_checkpoint(torch.compile(model, backend="eager")), open_checkpoint(library.model("gpt2")))


@pytest.mark.parametrize(
    "keys", [("model",), ("state_dict",), ("module",), ("model_state_dict",), ("state_dict", "model"), ("params",)]
)
def test_nested_state_dicts(library, tmp_path, keys):
    content: Any = state_of(library, "llama")
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "step": torch.tensor(5), "optimizer": {"state": {0: torch.ones(2)}}}
    torch.save(content, tmp_path / "training.ckpt")
    same_parts(open_checkpoint(tmp_path / "training.ckpt"), open_checkpoint(library.model("llama")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", [as_safetensors, as_pickle], ids=lambda way: way.__name__)
def test_types_are_kept(library, tmp_path, dtype, way):
    state = {name: t.to(dtype) for name, t in state_of(library, "llama").items()}
    if way is as_pickle:
        torch.save(state, tmp_path / "w.pt")
    else:
        save_file(state, tmp_path / "w.safetensors")
    found = open_checkpoint(next(tmp_path.iterdir()))
    assert {s.dtype for s in found.tensors.values()} == {dtype}
    same_parts(found, open_checkpoint(state))


def test_tied_tensors_are_visited_once(library, tmp_path):
    """A pickle and a module hold the tied tensor under two names; it is one, and it is the embedding."""
    for source in (as_pickle(library, "gpt2", tmp_path), library.model("gpt2"), state_of(library, "gpt2")):
        names = list(open_checkpoint(source).tensors)
        assert "transformer.wte.weight" in names
        assert "lm_head.weight" not in names
    backwards = dict(reversed(state_of(library, "gpt2").items()))
    assert next(iter(backwards)) == "lm_head.weight"
    assert "transformer.wte.weight" in open_checkpoint(backwards).tensors


def test_equal_numbers_in_different_memory_are_two_tensors():
    twice = {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(3, 2)}
    assert set(open_checkpoint(twice).tensors) == {"a.weight", "b.weight"}


def test_views_of_one_storage_are_told_apart(tmp_path):
    whole = torch.arange(12.0).reshape(4, 3)
    torch.save({"a.weight": whole[:2], "b.weight": whole[2:], "c.weight": whole[:2].T}, tmp_path / "views.pt")
    found = {name: stored.read() for name, stored in open_checkpoint(tmp_path / "views.pt").tensors.items()}
    assert torch.equal(found["a.weight"], whole[:2])
    assert torch.equal(found["b.weight"], whole[2:])
    assert torch.equal(found["c.weight"], whole[:2].T)


def test_a_folder_with_one_weight_file_of_any_name(library, tmp_path):
    shutil.copy(library.saved("llama") / "model.safetensors", tmp_path / "consolidated.safetensors")
    same_parts(open_checkpoint(tmp_path), open_checkpoint(library.model("llama")))


def test_the_index_says_which_shard_holds_a_tensor(tmp_path):
    """Stale copies in other shards are not taken for it."""
    for shard, value in (("one", 1.0), ("two", 2.0), ("three", 3.0)):
        save_file({"a.weight": torch.full((2, 2), value), f"{shard}.weight": torch.ones(2)}, tmp_path / shard)
        (tmp_path / shard).rename(tmp_path / f"{shard}.safetensors")
    where = {"a.weight": "one.safetensors", "three.weight": "three.safetensors", "two.weight": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    found = open_checkpoint(tmp_path).tensors
    assert set(found) == set(where)
    assert torch.equal(found["a.weight"].read(), torch.ones(2, 2))


def test_safetensors_are_preferred_to_pickles(library, tmp_path):
    folder = as_pickle_folder(library, "llama", tmp_path)
    save_file({"lm_head.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    assert list(open_checkpoint(folder).tensors) == ["lm_head.weight"]


def test_a_cached_hub_snapshot(library, tmp_path, monkeypatch):
    """A snapshot in the local cache is found by its id, and by id@revision, without asking anybody."""
    from huggingface_hub import constants

    cache = tmp_path / "models--somebody--tiny"
    shutil.copytree(library.saved("llama"), cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("somebody/tiny", "somebody/tiny@main", f"somebody/tiny@{'a' * 40}"):
        found = open_checkpoint(name)
        same_parts(found, open_checkpoint(library.model("llama")))
        assert found.origin["revision"] == "a" * 40
        assert found.origin["hub"] == "somebody/tiny"


def test_the_fingerprint_follows_the_file(library, tmp_path):
    shutil.copy(library.saved("llama") / "model.safetensors", tmp_path / "model.safetensors")
    before = open_checkpoint(tmp_path).fingerprint
    assert before == open_checkpoint(tmp_path).fingerprint
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).fingerprint != before


def test_a_released_model(library):
    """A Llama with grouped queries and tied embeddings that somebody else trained."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "stories260k"
    if not folder.is_dir():
        pytest.skip("no such data here")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    same_parts(open_checkpoint(folder), open_checkpoint(model))


# ---------------------------------------------------------------------------------------------------- quantised

FP8 = torch.float8_e4m3fn


def quantised(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def only(folder: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.tensors) == ["layers.0.fc1.weight"]
    assert any("turned back" in note for note in checkpoint.notes)
    stored = checkpoint.tensors["layers.0.fc1.weight"]
    assert (stored.shape, stored.dtype) == (tuple(stored.read().shape), torch.float32)
    return stored.read()


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6,)], ids=str)
def test_float8_with_a_scale_per_tensor_or_row(tmp_path, shape, dtype):
    """W = q · s, as compressed-tensors and fbgemm store it."""
    q, scale = torch.randn(6, 4).to(dtype), torch.rand(shape) + 0.5
    folder = quantised(
        tmp_path,
        {"layers.0.fc1.weight": q, "layers.0.fc1.weight_scale": scale, "layers.0.fc1.input_scale": torch.ones(1)},
    )
    expected = q.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
    assert torch.equal(only(folder), expected)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (16, 16)])
def test_float8_with_a_scale_per_block(tmp_path, size):
    """As DeepSeek stores it: one number a tile, the last tile of a row or column may be cut."""
    rows, columns = size
    q = torch.randn(rows, columns).to(FP8)
    scale = torch.rand(-(-rows // 4), -(-columns // 8)) + 0.5
    folder = quantised(
        tmp_path,
        {"layers.0.fc1.weight": q, "layers.0.fc1.weight_scale_inv": scale},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}},
    )
    expected = torch.tensor([[float(q[i, j]) * float(scale[i // 4, j // 8]) for j in range(columns)] for i in range(rows)])  # fmt: skip # noqa: E501
    torch.testing.assert_close(only(folder), expected, rtol=1e-7, atol=0)


def test_float8_blocks_as_transformers_dequantises_them(tmp_path):
    """The library's own dequantisation of the same tensors."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    q, scale = torch.randn(256, 128).to(FP8), torch.rand(2, 1) + 0.5
    folder = quantised(
        tmp_path,
        {"layers.0.fc1.weight": q, "layers.0.fc1.weight_scale_inv": scale},
        {"quantization_config": {"weight_block_size": [128, 128]}},
    )

    expected = Fp8Dequantize(None)._dequantize_one(q, scale, torch.float32)
    torch.testing.assert_close(only(folder), expected, rtol=1e-7, atol=0)


def test_a_grid_of_scales_needs_its_block_size(tmp_path):
    tensors = {
        "layers.0.fc1.weight": torch.randn(8, 8).to(FP8),
        "layers.0.fc1.weight_scale_inv": torch.ones(2, 2),
    }
    with pytest.raises(InputError, match="weight_block_size"):
        open_checkpoint(quantised(tmp_path, tensors))
    config = {"quantization_config": {"weight_block_size": [2, 2]}}
    with pytest.raises(InputError, match=r"does not tile \(8, 8\)"):
        open_checkpoint(quantised(tmp_path, tensors, config))


def test_bitsandbytes_int8(tmp_path):
    """W = q · SCB / 127 by row, as bitsandbytes' int8_vectorwise_dequant has it."""
    weight = torch.randn(6, 4)
    scb = weight.abs().amax(1)
    q = (weight / scb[:, None] * 127).round().to(torch.int8)
    layer = {"weight": q, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    folder = quantised(tmp_path, {f"layers.0.fc1.{name}": t for name, t in layer.items()})
    found = only(folder)
    torch.testing.assert_close(found, q.float() * scb[:, None] / 127)
    assert float((found - weight).abs().max()) <= float(scb.max()) / 127 / 2 + 1e-6


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"layers.0.fc1.qweight": torch.int32, "layers.0.fc1.scales": torch.float16}, "GPTQ or AWQ"),
        ({"layers.0.fc1.weight": torch.uint8, "layers.0.fc1.weight.quant_map": torch.float32}, "bitsandbytes 4-bit"),
        ({"layers.0.fc1.weight": torch.uint8, "layers.0.fc1.weight.absmax": torch.uint8}, "bitsandbytes 4-bit"),
        ({"layers.0.fc1.weight_packed": torch.int32}, "compressed-tensors"),
        ({"layers.0.mlp.experts.gate_up_proj_blocks": torch.uint8}, "MXFP4"),
    ],
)
def test_packed_formats_are_refused_by_name(tmp_path, tensors, kind):
    folder = quantised(tmp_path, {name: torch.ones(4, 4).to(dtype) for name, dtype in tensors.items()})
    with pytest.raises(InputError, match=rf"quantised \({kind}.*dequantise the model"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8, torch.uint8])
def test_quantised_numbers_without_a_scale_are_refused(tmp_path, dtype):
    folder = quantised(tmp_path, {"layers.0.fc1.weight": torch.ones(4, 4).to(dtype)})
    with pytest.raises(InputError, match=r"fc1\.weight is stored as \w+ without a scale"):
        open_checkpoint(folder)


def test_a_quantised_side_is_compared_by_its_numbers(tmp_path):
    from finetune_lens.pair import ModelPair

    weight = torch.randn(16, 8)
    save_file({"layers.0.fc1.weight": weight}, tmp_path / "base.safetensors")
    scaled = {"layers.0.fc1.weight": (weight / 2).to(FP8), "layers.0.fc1.weight_scale": torch.tensor(2.0)}
    save_file(scaled, tmp_path / "tuned.safetensors")
    (matrix,) = ModelPair.load(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors").matrices()
    expected = 2 * scaled["layers.0.fc1.weight"].double() - weight.double()
    assert torch.equal(matrix.delta(torch.float64), expected)
