"""Two checkpoints, aligned: what is compared, what is listed, what is streamed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, VOCABULARY
from safetensors.torch import load_file, save_file

from finetune_lens.errors import InputError
from finetune_lens.pair import ModelPair


def identical(pair: ModelPair) -> None:
    names = pair.names(vectors=True)
    assert names
    for matrix in pair.matrices(names):
        assert torch.equal(matrix.base, matrix.tuned), matrix.name


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3-moe", "gpt-oss", "llama4", "gpt2", "neox", "bloom", "opt", "phi3"]
)
def test_a_module_in_memory_is_its_saved_file(library, family):
    """Experts included: one 3-D tensor in memory, one matrix an expert on disk (Mixtral, Qwen3-MoE)."""
    pair = ModelPair.load(library.model(family), library.saved(family))
    assert pair.alignment.only_base == pair.alignment.only_tuned == []
    assert not pair.alignment.mismatched
    identical(pair)


def test_experts_have_one_name_in_memory_and_on_disk(library):
    raw = load_file(library.saved("mixtral") / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in raw
    assert library.model("mixtral").model.layers[0].mlp.experts.gate_up_proj.ndim == 3
    pair = ModelPair.load(library.model("mixtral"), library.saved("mixtral"))
    (matrix,) = pair.matrices(["layers.0.mlp.experts.2.gate_proj"])
    assert (matrix.layer, matrix.component) == (0, "gate")
    assert torch.equal(matrix.base, raw["model.layers.0.block_sparse_moe.experts.2.w1.weight"])


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "opt", "bloom"])
def test_with_and_without_the_models_prefix(library, tmp_path, family):
    """The bare model is saved as h.0…, the one with a head as transformer.h.0…"""
    library.model(family).base_model.save_pretrained(tmp_path)
    short, long = (load_file(folder / "model.safetensors") for folder in (tmp_path, library.saved(family)))
    assert not set(short) & set(long)
    pair = ModelPair.load(tmp_path, library.saved(family))
    assert pair.alignment.only_base == []
    assert pair.alignment.only_tuned == (["lm_head"] if family in ("llama", "neox") else [])
    identical(pair)


def test_tied_against_tied(library, tmp_path):
    pair = ModelPair.load(library.saved("gpt2"), library.model("gpt2"))
    assert "lm_head" not in pair.names()
    assert pair.names().count("wte") == 1


@pytest.mark.parametrize("turned", [False, True])
def test_tied_against_untied(library, tmp_path, turned):
    """The tied side's unembedding is its embedding, in the orientation of an unembedding."""
    tied = library.saved("gpt2")
    state = load_file(tied / "model.safetensors")
    head = state["transformer.wte.weight"] + torch.randn(VOCABULARY, HIDDEN)
    untied = tmp_path / "untied.safetensors"
    save_file(state | {"lm_head.weight": head}, untied)
    pair = ModelPair.load(*((untied, tied) if turned else (tied, untied)))
    (matrix,) = pair.matrices(["lm_head"])
    delta = head.double() - state["transformer.wte.weight"].double()
    assert matrix.component == "unembed"
    assert torch.equal(matrix.delta(torch.float64), -delta if turned else delta)
    assert any("tied to the embedding" in note for note in pair.alignment.notes)


def test_a_model_without_a_head_is_not_given_one(library, tmp_path):
    """Llama's config says that its head is its own: a file without one has none."""
    library.model("llama").model.save_pretrained(tmp_path)
    pair = ModelPair.load(tmp_path, library.saved("llama"))
    assert pair.alignment.only_tuned == ["lm_head"]
    assert "lm_head" in pair.alignment.summary()


@pytest.mark.parametrize("size", [VOCABULARY + 5, VOCABULARY - 7])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_resized_vocabulary_is_compared_on_the_shared_tokens(library, tmp_path, family, size):
    model = library.fresh(family)
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(tmp_path)
    pair = ModelPair.load(library.saved(family), tmp_path)
    shared = min(size, VOCABULARY)
    embedding = {"llama": "embed_tokens", "gpt2": "wte"}[family]
    assert pair.alignment.resized[embedding] == ((HIDDEN, VOCABULARY), (HIDDEN, size))
    assert pair.shape(embedding) == (HIDDEN, shared)
    before = library.model(family).get_input_embeddings().weight
    (matrix,) = pair.matrices([embedding])
    assert torch.equal(matrix.base, before[:shared].T)
    assert torch.equal(matrix.tuned, before[:shared].T)
    if family == "llama":
        (head,) = pair.matrices(["lm_head"])
        assert torch.equal(head.base, library.model(family).lm_head.weight[:shared])
        assert torch.equal(head.tuned, head.base)
    assert "shared part compared" in pair.alignment.summary()


def test_what_has_no_counterpart_is_listed(library, tmp_path):
    state = load_file(library.saved("llama") / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state | {"score.weight": torch.ones(2, HIDDEN)}, tmp_path / "tuned.safetensors")
    pair = ModelPair.load(library.saved("llama"), tmp_path / "tuned.safetensors")
    assert pair.alignment.only_base == ["layers.1.mlp.up_proj"]
    assert pair.alignment.only_tuned == ["score"]
    for name in ("layers.1.mlp.up_proj", "score"):
        assert name in pair.alignment.summary()
        assert name not in pair.names()


def test_other_shapes_outside_the_blocks_are_listed(library, tmp_path):
    state = load_file(library.saved("llama") / "model.safetensors")
    for side, classes in (("base", 2), ("tuned", 3)):
        save_file(state | {"score.weight": torch.ones(classes, HIDDEN)}, tmp_path / f"{side}.safetensors")
    pair = ModelPair.load(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert pair.alignment.mismatched == {"score": ((2, HIDDEN), (3, HIDDEN))}
    assert "score: (2, 32) against (3, 32), not compared" in pair.alignment.summary()
    assert "score" not in pair.names()


def test_tensors_of_three_dimensions_are_listed(tmp_path):
    """Convolutions, say: no matrix, but not dropped in silence."""
    tensors = {"layers.0.conv.weight": torch.ones(4, 2, 3), "layers.0.fc1.weight": torch.ones(4, 2)}
    pair = ModelPair.load(tensors, tensors)
    assert pair.names() == ["layers.0.fc1"]
    assert pair.names(matrices=False, vectors=True) == ["layers.0.conv"]
    assert "layers.0.conv" in pair.alignment.summary()


def test_names_select_by_kind(library):
    pair = ModelPair.load(library.saved("gpt2"), library.model("gpt2"))
    assert {"wte", "wpe"} <= set(pair.names())
    assert not {"wte", "wpe"} & set(pair.names(embeddings=False))
    vectors = pair.names(matrices=False, vectors=True)
    assert {"h.0.ln_1", "h.0.attn.c_attn.bias"} <= set(vectors)
    assert not set(vectors) & set(pair.names())
    assert set(pair.names(vectors=True)) == set(vectors) | set(pair.names())


def test_differences_are_taken_after_the_cast():
    """bfloat16 holds 256 and 257 as one number; their float32 originals differ."""
    base = {"layers.0.fc1.weight": torch.full((2, 2), 256.0, dtype=torch.bfloat16)}
    tuned = {"layers.0.fc1.weight": torch.full((2, 2), 257.0)}
    (matrix,) = ModelPair.load(base, tuned).matrices()
    assert matrix.delta(torch.float64).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert matrix.base.dtype == torch.bfloat16


def test_digests_are_of_the_numbers(library):
    same = ModelPair.load(library.saved("gpt2"), library.model("gpt2"))
    for matrix in same.matrices():
        base, tuned = matrix.digests
        assert base == tuned
    changed = library.fresh("gpt2")
    changed.transformer.wte.weight[0, 0] += 1e-3
    (matrix,) = ModelPair.load(library.saved("gpt2"), changed).matrices(["wte"])
    assert len(set(matrix.digests)) == 2


def test_the_pair_says_where_it_came_from(library):
    pair = ModelPair.load(library.saved("gpt2"), library.saved("gpt2"))
    assert str(library.saved("gpt2")) in pair.describe()["base"]["files"][0]
    assert pair.fingerprint
    assert ModelPair.load(library.saved("gpt2"), library.model("gpt2")).fingerprint == ""
    assert "tensors compared" in repr(pair)


def test_a_block_of_another_shape_is_refused(library, tmp_path):
    state = load_file(library.saved("llama") / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(state | {name: state[name][:40]}, tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj is \(48, 32\) in the base and \(40, 32\)"):
        ModelPair.load(library.saved("llama"), tmp_path / "cut.safetensors")


# ---------------------------------------------------------------------------------------------------- memory

STREAM = """
import sys, threading, time
import torch
from finetune_lens.pair import ModelPair

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.zeros(64, 64).double() @ torch.zeros(64, 64).double()
pair = ModelPair.load(sys.argv[1], sys.argv[2])
before, peak, count, going = anonymous(), 0, 0, True

def watch():
    global peak
    while going:
        peak = max(peak, anonymous())
        time.sleep(0.003)

watcher = threading.Thread(target=watch)
watcher.start()
for matrix in pair.matrices():
    assert not matrix.problem()
    matrix.digests
    delta = matrix.delta(torch.float64)
    count += delta.numel()
    del matrix, delta
going = False
watcher.join()
print(peak - before, count)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("kind", "count"), [("safetensors", 12), ("pickle", 4)])
def test_a_pass_holds_a_few_matrices(tmp_path, kind, count):
    """Two sharded models of 64 and 200 MB a side in a few copies of one float64 matrix (32 MB)."""
    rows, columns = 2048, 2048
    for side in ("base", "tuned"):
        (tmp_path / side).mkdir()
        where = {}
        for shard in range(3):
            ending = "safetensors" if kind == "safetensors" else "bin"
            file = f"model-{shard}.{ending}"
            names = [f"layers.{i}.fc1.weight" for i in range(shard, count, 3)]
            tensors = {name: torch.full((rows, columns), float(len(side))) for name in names}
            where |= dict.fromkeys(names, file)
            (save_file if kind == "safetensors" else torch.save)(tensors, tmp_path / side / file)
            del tensors
        name = {"safetensors": "model.safetensors.index.json", "pickle": "pytorch_model.bin.index.json"}[kind]
        (tmp_path / side / name).write_text(json.dumps({"weight_map": where}))
    done = subprocess.run(
        [sys.executable, "-c", STREAM, tmp_path / "base", tmp_path / "tuned"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, seen = map(int, done.stdout.split())
    assert seen == rows * columns * count
    largest = rows * columns * 8
    assert largest / 2 < peak < 5 * largest, f"{peak / largest:.1f} float64 matrices"
