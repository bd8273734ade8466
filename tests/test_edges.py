"""Edges: derivatives of what one reader reads, their sums over readers and steps, and the circuits they make up."""

import copy
import dataclasses
import functools
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import DECODERS
from test_attribution import LENGTHS, WIDTH, encoded
from test_patching import items, letters

from finetune_lens import stats
from finetune_lens.circuits.edges import attribute_edges
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked import edges as engine
from finetune_lens.hooked.attribution import attribute
from finetune_lens.hooked.edges import Node, edge_scores, graph_of
from finetune_lens.hooked.sweep import Place, Side
from finetune_lens.prompts import Encoded
from finetune_lens.results import edges as results
from finetune_lens.results import load
from finetune_lens.results.edges import Edges

HEADED = ("gpt2", "llama", "neox")
D_HEAD, HEADS = 8, 4


def scores(model: HookedModel, clean: Encoded, corrupt: Encoded, metric: str = "logit_diff", **options: Any) -> Any:
    return edge_scores(model, clean, corrupt, metric, progress=False, **options)


def unpadded(prompts: Encoded, row: int) -> Encoded:
    """One example without its padding."""
    one = prompts.rows([row])
    at = one.mask[0]
    read_at = one.read_at - int(at.int().argmax())
    return Encoded(one.ids[:, at], one.mask[:, at], read_at, one.answers, one.wrongs, one.mask[:, at], one.mask[:, at],
                   one.tokens)  # fmt: skip


NORMS = ("input_layernorm", "post_attention_layernorm")
NAMES = {
    "gpt2": ("transformer.h", "ln_1", "ln_2", "attn.c_proj", "transformer.ln_f"),
    "llama": ("model.layers", *NORMS, "self_attn.o_proj", "model.norm"),
    "neox": ("gpt_neox.layers", *NORMS, "attention.dense", "gpt_neox.final_layer_norm"),
}
ANSWERS = torch.tensor([5, 6, 7])


class Naive:
    """A plain module, with what one reader reads shifted: by torch hooks, and the parts of each block by hand."""

    def __init__(self, module: Any, family: str):
        self.module, self.family = module, family
        blocks, self.first, self.second, self.output, last = NAMES[family]
        self.blocks, self.last = module.get_submodule(blocks), module.get_submodule(last)

    def weight(self, layer: int) -> torch.Tensor:
        """(in, out) of attention's output."""
        weight = self.blocks[layer].get_submodule(self.output).weight
        return weight if self.family == "gpt2" else weight.T

    def messages(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each writer writes, (batch, pos, d_model)."""
        found: dict[str, torch.Tensor] = {}
        hooks = []
        for layer, block in enumerate(self.blocks):

            def before(m: Any, args: tuple, kwargs: dict, layer: int = layer) -> None:
                if layer == 0:
                    found["embed"] = args[0] if args else kwargs["hidden_states"]

            def heads(m: Any, args: tuple, layer: int = layer) -> None:
                for h in range(HEADS):
                    rows = slice(h * D_HEAD, (h + 1) * D_HEAD)
                    found[f"a{layer}.h{h}"] = args[0][..., rows] @ self.weight(layer)[rows]

            def after(m: Any, args: tuple, out: torch.Tensor, layer: int = layer) -> None:
                found[f"m{layer}"] = out

            hooks += [
                block.register_forward_pre_hook(before, with_kwargs=True),
                block.get_submodule(self.output).register_forward_pre_hook(heads),
                block.get_submodule("mlp").register_forward_hook(after),
            ]
        try:
            with torch.no_grad():
                self.module(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def read(self, node: Node) -> tuple[Any, slice]:
        """Of q, k or v of a head: the module and the rows that it comes out of."""
        block = self.blocks[node.layer]
        if self.family == "llama":
            return block.get_submodule(f"self_attn.{node.kind}_proj"), slice(
                node.head * D_HEAD, (node.head + 1) * D_HEAD
            )
        if self.family == "gpt2":
            begin = "qkv".index(node.kind) * HEADS * D_HEAD + node.head * D_HEAD
            return block.attn.c_attn, slice(begin, begin + D_HEAD)
        begin = node.head * 3 * D_HEAD + "qkv".index(node.kind) * D_HEAD
        return block.attention.query_key_value, slice(begin, begin + D_HEAD)

    def difference(self, node: Node, shift: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The logit difference at the end, (batch,), when this reader reads the residual stream + shift."""
        hooks, seen = [], {}
        if node.kind == "logits":
            hooks.append(self.last.register_forward_pre_hook(lambda m, args: (args[0] + shift,)))
        else:
            block = self.blocks[node.layer]
            mlp = node.kind == "mlp"
            norm = block.get_submodule(self.second if mlp else self.first)
            module, rows = (block.get_submodule("mlp"), slice(None)) if mlp else self.read(node)
            hooks.append(norm.register_forward_pre_hook(lambda m, args: seen.update(residual=args[0])))

            def recompute(m: Any, args: tuple, out: torch.Tensor) -> torch.Tensor:
                moved = module.forward(norm.forward(seen["residual"] + shift))
                new = out.clone()
                new[..., rows] = moved[..., rows]
                return new

            hooks.append(module.register_forward_hook(recompute))
        try:
            logits = self.module(**inputs).logits[:, -1]
        finally:
            for hook in hooks:
                hook.remove()
        rows = torch.arange(len(logits))
        return logits[rows, ANSWERS] - logits[rows, ANSWERS + 10]


def whole(seed: int, width: int = WIDTH) -> Encoded:
    """Three examples of one length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (3, width), generator=generator)
    mask, answers = torch.ones_like(ids, dtype=torch.bool), ANSWERS[:, None, None]
    read_at = torch.full((3, 1), width - 1)
    return Encoded(ids, mask, read_at, answers, answers[:, 0] + 10, mask, mask, [["t"] * width] * 3)


@pytest.fixture(scope="module", params=HEADED)
def double(request, library):
    """A model in float64 and the naive one beside it."""
    module = library.fresh(request.param).double()
    if request.param == "llama":  # its own norms compute in float32
        for name, norm in [*module.named_modules()]:
            if type(norm).__name__ == "LlamaRMSNorm":
                exact = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                module.set_submodule(name, exact)
    return HookedModel(module), Naive(module, request.param)


def test_finite_differences(double):
    """Each score is the derivative of the metric when the reader alone is given more of the writer's difference."""
    model, naive = double
    clean, corrupt = whole(0), whole(1)
    found, start, end = scores(model, clean, corrupt)
    graph = graph_of(model)
    one, other = naive.messages(clean.ids), naive.messages(corrupt.ids)
    assert [*one] == [node.name for node in graph.writers]
    tiny = 1e-4
    with torch.no_grad():
        nothing = torch.zeros_like(one["embed"])
        for ids, value in ((clean.ids, start), (corrupt.ids, end)):
            plain = naive.difference(graph.readers[-1], nothing, input_ids=ids)
            np.testing.assert_allclose(value, plain, rtol=1e-10)
        for v, reader in enumerate(graph.readers):
            for u, writer in enumerate(graph.writers):
                later = naive.family != "neox" and (writer.kind, reader.kind) == ("head", "mlp")
                if writer.layer > reader.layer or (writer.layer == reader.layer and not later):
                    assert np.isnan(found[u, v]).all(), (writer, reader)
                    continue
                message = other[writer.name] - one[writer.name]
                ends = [naive.difference(reader, by * message, input_ids=clean.ids) for by in (tiny, -tiny)]
                slope = ((ends[0] - ends[1]) / (2 * tiny)).numpy()
                np.testing.assert_allclose(found[u, v], slope, rtol=1e-4, atol=1e-7, err_msg=f"{writer} {reader}")
    assert np.nanmax(np.abs(found)) > 0.05


def test_integrated_gradients(double):
    """The naive loop: plain autograd at points between the embeddings, each reader with an input of its own."""
    model, naive = double
    clean, corrupt = whole(0), whole(1)
    steps = 3
    found, _, _ = scores(model, clean, corrupt, steps=steps)
    graph = graph_of(model)
    one, other = naive.messages(clean.ids), naive.messages(corrupt.ids)
    table = naive.module.get_input_embeddings().weight
    ends = [table[side.ids].detach() for side in (clean, corrupt)]
    for v, reader in enumerate(graph.readers):
        mean = torch.zeros_like(ends[0])
        for step in range(steps):
            mixed = ends[0] + (step + 0.5) / steps * (ends[1] - ends[0])
            shift = torch.zeros_like(mixed, requires_grad=True)
            value = naive.difference(reader, shift, inputs_embeds=mixed).sum()
            mean += torch.autograd.grad(value, shift)[0] / steps
        for u, writer in enumerate(graph.writers[: graph.before[v]]):
            expected = ((other[writer.name] - one[writer.name]) * mean).sum((1, 2))
            np.testing.assert_allclose(found[u, v], expected, rtol=1e-5, atol=1e-6)
    plain, _, _ = scores(model, clean, corrupt)
    assert np.nanmax(np.abs(found - plain)) > 0.02


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformer_lens(library, family):
    """The same by TransformerLens's hooks: results of heads, and inputs of q, k, v and the MLP split by head."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    clean, corrupt = whole(0), whole(1)
    found, _, _ = scores(HookedModel(library.model(family)), clean, corrupt)
    copied = library.fresh(family)
    bridge = build_bridge_from_module(copied, type(copied).__name__, hf_config=copied.config, tokenizer=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge.set_use_attn_result(True)
        bridge.set_use_split_qkv_input(True)
        bridge.set_use_hook_mlp_in(True)
    copied.requires_grad_(True)

    def keep(cache: dict[str, torch.Tensor], name: str, x: torch.Tensor, hook: Any) -> torch.Tensor:
        cache[name] = x.clone()
        return cache[name]  # what the hook's own reader reads, apart from the stream that goes on

    writers, readers = ["blocks.0.hook_resid_pre"], []
    for layer in (0, 1):
        writers += [f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.hook_mlp_out"]
        readers += [f"blocks.{layer}.hook_{part}_input" for part in "qkv"] + [f"blocks.{layer}.hook_mlp_in"]
    readers.append("blocks.1.hook_resid_post")
    seen: list[dict[str, torch.Tensor]] = []
    for side in (clean, corrupt):
        cache: dict[str, torch.Tensor] = {}
        hooks = [(name, functools.partial(keep, cache, name)) for name in (*writers, *readers)]
        logits = bridge.run_with_hooks(side.ids, fwd_hooks=hooks)
        seen.append(cache | {"logits": logits[:, -1]})
    rows = torch.arange(3)
    value = (seen[0]["logits"][rows, ANSWERS] - seen[0]["logits"][rows, ANSWERS + 10]).sum()
    gradients = torch.autograd.grad(value, [seen[0][name] for name in readers])

    def parts(tensors: list[torch.Tensor]) -> torch.Tensor:
        split = [t if t.ndim == 4 else t[:, :, None] for t in tensors]
        return torch.cat(split, 2).detach()

    apart = parts([seen[1][name] for name in writers]) - parts([seen[0][name] for name in writers])
    expected = torch.einsum("bpud,bprd->urb", apart, parts(list(gradients))).numpy()
    exists = ~np.isnan(found)
    np.testing.assert_allclose(found[exists], expected[exists], rtol=1e-4, atol=2e-5)
    assert np.abs(expected[exists]).max() > 0.1


@pytest.mark.parametrize("family", [f for f in DECODERS if f != "codegen" and "sliding" not in f])
def test_sum_over_readers(library, family):
    """All that a writer gives is its attribution: Σ_v S[u, v] = (corrupt − clean) · ∂m/∂(what it writes)."""
    model = HookedModel(library.model(family))
    clean, corrupt = encoded(0), encoded(1)
    found, _, _ = scores(model, clean, corrupt)
    places = {"embed": "resid_pre", "head": "result", "mlp": "mlp_out"}
    patches = [
        (Place(places[node.kind], max(node.layer, 0), node.head if node.kind == "head" else None),)
        for node in graph_of(model).writers
    ]
    expected = attribute(Side(model, clean), Side(model, corrupt), patches, "logit_diff", progress=False)
    np.testing.assert_allclose(np.nansum(found, 1), expected, atol=1e-5 * np.abs(expected).max())
    assert (np.abs(expected).max(1) > 0).all()


@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_differs(library, steps):
    for family in HEADED:
        assert (
            np.nanmax(np.abs(scores(HookedModel(library.model(family)), encoded(0), encoded(0), steps=steps)[0])) == 0
        )


@pytest.mark.parametrize(
    ("family", "metric"), [("gpt2", "logit_diff"), ("llama", "prob"), ("neox", "logprob"), ("gemma2", "logit_diff")]
)
def test_what_comes_in_is_the_whole_effect(library, family, metric):
    """With steps the embedding's edges sum to m(corrupt) − m(clean), the better the more steps."""
    model = HookedModel(library.model(family))
    error = []
    for steps in (1, 8):
        found, start, end = scores(model, encoded(0), encoded(1), metric, steps=steps)
        total, gap = np.nansum(found[0], 0), end - start
        error.append(np.abs(total - gap).max() / np.abs(gap).max())
    assert error[1] < min(0.05, error[0] / 5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_direct_path(library, family):
    """Without the last norm the logits read a sum: each edge to them is the writer's part of the effect, exactly."""
    module = library.fresh(family)
    naive = Naive(module, family)
    module.set_submodule(NAMES[family][-1], torch.nn.Identity())
    model = HookedModel(module)
    one, other = naive.messages(whole(0).ids), naive.messages(whole(1).ids)
    direction = module.get_output_embeddings().weight
    direction = direction[ANSWERS] - direction[ANSWERS + 10]
    for steps in (0, 2):
        found, start, end = scores(model, whole(0), whole(1), steps=steps)
        for u, name in enumerate(one):
            expected = ((other[name] - one[name])[:, -1] * direction).sum(-1).detach()
            np.testing.assert_allclose(found[u, -1], expected, atol=2e-5)
        np.testing.assert_allclose(found[:, -1].sum(0), end - start, atol=5e-5)  # all that is written
    with torch.no_grad():
        for block in naive.blocks:
            block.get_submodule(naive.output).weight.zero_()
            block.get_submodule(f"mlp.{'c_proj' if family == 'gpt2' else 'down_proj'}").weight.zero_()
    found, start, end = scores(model, whole(0), whole(1))
    np.testing.assert_allclose(found[0, -1], end - start, atol=1e-5)
    others = found.copy()
    others[0, -1] = 0
    assert np.nanmax(np.abs(others)) < 1e-5
    assert np.abs(end - start).max() > 0.1


@pytest.mark.parametrize(("family", "steps"), [("gpt2", 0), ("llama", 2), ("neox", 0)])
def test_padding_and_batches(library, family, steps):
    """An example's scores do not depend on those beside it, on padding or its side."""
    model = HookedModel(library.model(family))
    for left in (False, True):
        sides = encoded(0, left), encoded(1, left)
        bare = [scores(model, *(unpadded(side, row) for side in sides), steps=steps) for row in range(len(LENGTHS))]
        expected = [np.concatenate(parts, -1) for parts in zip(*bare, strict=True)]
        for size in (None, 2):
            found = scores(model, *sides, steps=steps, batch_size=size)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.nanmax(np.abs(expected[0])) > 0.05


@pytest.mark.parametrize("steps", [0, 2])
def test_columns(library, steps):
    """Of one column each, they sum to those of all; what only one side has counts for nothing."""
    model = HookedModel(library.model("llama"))
    clean, corrupt = whole(0, 3), whole(1, 3)
    everywhere, *_ = scores(model, clean, corrupt, steps=steps)
    each = [scores(model, clean, corrupt, steps=steps, at=np.full(3, c))[0] for c in range(3)]
    np.testing.assert_allclose(np.sum(each, 0), everywhere, atol=2e-5)
    mixed, *_ = scores(model, clean, corrupt, steps=steps, at=np.array([0, 2, 1]), batch_size=2)
    for row, column in enumerate((0, 2, 1)):
        np.testing.assert_allclose(mixed[..., row], each[column][..., row], atol=1e-5)
        assert np.nanmax(np.abs(mixed[..., row])) > 0.01
    short = corrupt.prompt_columns.clone()
    short[:, 2] = False  # then there is no way either
    shorter, *_ = scores(model, clean, dataclasses.replace(corrupt, prompt_columns=short), steps=steps)
    ids = torch.cat([corrupt.ids[:, :2], clean.ids[:, 2:]], 1)
    expected, *_ = scores(model, clean, dataclasses.replace(corrupt, ids=ids), steps=steps, at=np.full(3, 0))
    expected += scores(model, clean, dataclasses.replace(corrupt, ids=ids), steps=steps, at=np.full(3, 1))[0]
    np.testing.assert_allclose(shorter, expected, atol=2e-5)


def test_adapters(library):
    """An adapter beside its base is the merged model, on its own side; the base is the base."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(library.fresh("llama"), config)
    tuned, base = HookedModel(wrapped), HookedModel(wrapped, adapted=False)
    prompts = encoded(0), encoded(1)
    on, off = scores(tuned, *prompts)[0], scores(base, *prompts)[0]
    np.testing.assert_allclose(off, scores(HookedModel(library.model("llama")), *prompts)[0], atol=1e-5)
    merged = wrapped.merge_and_unload()
    np.testing.assert_allclose(on, scores(HookedModel(merged), *prompts)[0], atol=1e-4)
    assert np.nanmax(np.abs(on - off)) > 0.1


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_half_precision(library, family):
    """In bfloat16 the scores are those of float32 up to rounding."""
    found = scores(HookedModel(library.fresh(family).bfloat16()), encoded(0), encoded(1))[0]
    expected = scores(HookedModel(library.fresh(family).bfloat16().float()), encoded(0), encoded(1))[0]
    assert np.nanmax(np.abs(found - expected)) < 0.1 * np.nanmax(np.abs(expected))
    assert stats.rank_correlation(found, expected) > 0.98


def test_nothing_is_left_behind(library):
    model = HookedModel(library.model("gpt2"))

    def hooks():
        return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.module.modules()]

    before = model.run(encoded(0).ids).logits
    there = hooks()  # transformers leaves hooks of its own behind once attentions were asked for
    with pytest.raises(InputError):
        scores(model, encoded(0), encoded(1), batch_size=0)
    scores(model, encoded(0), encoded(1), steps=1)
    assert hooks() == there
    assert torch.equal(model.run(encoded(0).ids).logits, before)


class Louder(torch.nn.Module):
    """A module whose first output is changed."""

    def __init__(self, inner: Any, change: Any):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(hidden_states, *args, **kwargs)
        if isinstance(out, tuple):
            return (self.change(out[0], hidden_states), *out[1:])
        return self.change(out, hidden_states)


@pytest.mark.parametrize(
    "change", [lambda out, read: out * 2, lambda out, read: out + read * 0.3], ids=["scaled", "read beside"]
)
def test_other_architectures_are_refused(library, change):
    """What scales attention's output after its projection, or reads the residual beside q, k and v, is noticed."""
    module = library.fresh("gpt2")
    block = module.transformer.h[1]
    block.attn = Louder(block.attn, change)
    with pytest.raises(InputError, match="edges cannot be told apart"):
        scores(HookedModel(module), encoded(0), encoded(1))


def test_scaled_branches_are_refused():
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    config = transformers.GraniteConfig(**small, intermediate_size=48, bos_token_id=1, eos_token_id=2)
    for multiplier in (1.0, 0.5):
        config.residual_multiplier = multiplier
        model = HookedModel(transformers.GraniteForCausalLM(config).eval())
        if multiplier == 1.0:
            assert np.nanmax(np.abs(scores(model, encoded(0), encoded(1))[0])) > 0
        else:
            with pytest.raises(InputError, match="edges cannot be told apart"):
                scores(model, encoded(0), encoded(1))


def test_bad_input_of_the_engine(library):
    model = HookedModel(library.model("gpt2"))
    for metric in ("kl", "accuracy", "nothing"):
        with pytest.raises(InputError, match=f"gradient at the clean run; found '{metric}'; expected one of"):
            scores(model, encoded(0), encoded(1), metric)
    for wrong in ({"steps": -1}, {"batch_size": 0}):
        with pytest.raises(InputError, match="steps are at least 0"):
            scores(model, encoded(0), encoded(1), **wrong)
    with pytest.raises(InputError, match=r"no site blocks\.0\.attn\.hook_q"):
        scores(HookedModel(library.model("codegen")), encoded(0), encoded(1))


# The analysis and its result.


@pytest.fixture(scope="module")
def model(library):
    return HookedModel(library.model("llama"), letters(), name="llama")


@pytest.fixture(scope="module")
def measured(model):
    return attribute_edges(model, items(), progress=False)


def test_the_analysis(model, measured, tmp_path):
    """It labels what the engine gives, says what it did, and is saved whole."""
    graph = graph_of(model)
    assert measured.data["writer"].values.tolist() == [node.name for node in graph.writers]
    assert measured.data["reader"].values.tolist()[:9] == [
        *(f"a0.h{i}<q>" for i in range(4)), "a0.kv0<k>", "a0.kv1<k>", "a0.kv0<v>", "a0.kv1<v>", "m0"
    ]  # fmt: skip
    one = measured.data.sel(reader="a1.kv1<v>")
    assert (str(one.reader_kind.item()), int(one.reader_layer), int(one.reader_head)) == ("v", 1, 1)
    assert measured.provenance["arguments"] == {}
    assert measured.provenance["defaults"]["steps"] == 0
    assert measured.provenance["model"]["model"] == "llama"
    assert measured.gap()["difference"] == pytest.approx(float((measured.data.corrupt - measured.data.clean).mean()))
    for text in ("edges (11 writers, 19 readers) by EAP, 6 examples; metric logit_diff", "are clear of 0", " → "):
        assert text in measured.summary()
    back = load(measured.save(tmp_path / "edges.nc"))
    assert isinstance(back, Edges)
    xr.testing.assert_identical(back.data.drop_attrs(), measured.data.drop_attrs())
    pd.testing.assert_frame_equal(back.to_frame(), measured.to_frame())
    assert back.headline() == measured.headline()
    assert "EAP-IG, 2 steps" in attribute_edges(model, items(), steps=2, progress=False).summary()


def test_positions(model, measured):
    """The letters that differ are the only ones whose embeddings do; positions are those of the prompts."""
    third = attribute_edges(model, items(), position=2, progress=False)
    embedded = measured.data.score.sel(writer="embed")
    np.testing.assert_allclose(third.data.score.sel(writer="embed"), embedded, atol=1e-6)
    assert np.nanmax(np.abs(attribute_edges(model, items(), position=1, progress=False).data.score)) < 1e-6
    last = attribute_edges(model, items(), position=-1, progress=False).data.score
    np.testing.assert_allclose(last.sel(reader="logits"), measured.data.score.sel(reader="logits"), atol=1e-6)
    assert float(np.abs(last.sel(writer="embed")).max()) == 0
    longer = [*items(), {"prompt": "abcdefg=", "corrupt": "abxdefg=", "answer": "a", "wrong": "b"}]
    assert attribute_edges(model, longer, align="left", progress=False).data.sizes["example"] == 7
    with pytest.raises(InputError, match="prompt 1: position 7 does not exist"):
        attribute_edges(model, longer, align="left", position=7, progress=False)


def test_bad_input(model):
    texts = items()
    with pytest.raises(InputError, match="the logit difference needs a wrong answer, and 1 of 6 prompts have none"):
        attribute_edges(model, [*texts[:5], texts[5] | {"wrong": []}], progress=False)
    with pytest.raises(InputError, match="`corrupt`"):
        attribute_edges(model, [{"prompt": "ab=", "answer": "a", "wrong": "b"}], progress=False)
    with pytest.raises(InputError, match="align"):
        attribute_edges(model, [*texts, texts[0] | {"prompt": "abcdefg=", "corrupt": "abxdefg="}], progress=False)
    found = attribute_edges(model, [texts[0] | {"wrong": []}], metric="logprob", progress=False)
    assert found.metric == "logprob"
    assert found.to_frame()["low"].isna().all()
    assert "[nan" not in found.summary()


def test_table(measured, monkeypatch):
    """A row an edge, the largest first, with intervals and tests of each; beyond the largest, without."""
    frame = measured.to_frame()
    flat = measured.data.score.values
    assert len(frame) == np.isfinite(flat[..., 0]).sum()
    row = frame.iloc[3]
    values = measured.data.score.sel(writer=row["writer"], reader=row["reader"]).values
    low, high = stats.interval_of_mean(values)
    assert (row["score"], row["low"], row["high"]) == pytest.approx((values.mean(), float(low), float(high)))
    assert row["p"] == pytest.approx(float(stats.two_sided_p(values)))
    assert (np.diff(frame["score"].abs()) <= 0).all()
    still = frame["score"].abs() == 0
    assert still.any()
    assert frame["p"].isna().equals(still)  # nothing can change there
    np.testing.assert_allclose(frame["p_adjusted"], stats.benjamini_hochberg(frame["p"]))
    pd.testing.assert_frame_equal(measured.top(4), frame.head(4))
    monkeypatch.setattr(results, "INTERVALS", 20)
    few = Edges(measured.data).to_frame()
    pd.testing.assert_frame_equal(few[["writer", "reader", "score"]], frame[["writer", "reader", "score"]])
    assert few["p_adjusted"].isna().to_numpy().nonzero()[0].min() == 20
    p = np.where(np.arange(len(frame)) < 20, frame["p"], 1.0)
    np.testing.assert_allclose(few["p_adjusted"][:20], stats.benjamini_hochberg(p)[:20])
    assert (few["p_adjusted"][:20] >= frame["p_adjusted"][:20] - 1e-12).all()


def test_heads(measured):
    """A head's edges to some readers, summed example by example."""
    data = measured.data.score
    heads = measured.heads(["a1.h2<q>", "logits", "a1.h2<q>"])
    assert heads[["layer", "head"]].values.tolist() == [[layer, h] for layer in (0, 1) for h in range(4)]
    both = data.sel(reader=["a1.h2<q>", "logits"]).sel(writer="a0.h3").sum("reader").values
    row = heads[(heads["layer"] == 0) & (heads["head"] == 3)].iloc[0]
    low, high = stats.interval_of_mean(both)
    assert (row["score"], row["low"], row["high"]) == pytest.approx((both.mean(), float(low), float(high)))
    later = heads[heads["layer"] == 1]["score"].values
    np.testing.assert_allclose(later, data.sel(reader="logits").values[6:10].mean(-1), rtol=1e-5)
    assert measured.heads("a1.h2<q>")["layer"].tolist() == [0] * 4
    for wrong, found in (("a9.h0<q>", "'a9.h0<q>'"), ([], "none")):
        with pytest.raises(InputError, match=f"receivers are readers such as .*; found {found}"):
            measured.heads(wrong)


def test_agreement(measured):
    heads = measured.heads("logits")
    same = heads.rename(columns={"score": "effect"})
    row = measured.agreement(same).iloc[0]
    assert (row["cells"], row["slope"], row["rank_correlation"], row["worst"]) == (8, pytest.approx(1), 1, 0)
    other = same.assign(effect=-2 * same["effect"])
    other.loc[5, "effect"] += 10
    row = measured.agreement(other).iloc[0]
    expected = stats.rank_correlation(heads["score"], other["effect"])
    assert row["rank_correlation"] == pytest.approx(expected)
    assert expected < 0
    assert row["worst_at"] == "layer 1, head 1"
    assert row["worst"] == pytest.approx(abs(other["effect"][5] - heads["score"][5]))
    assert row["slope"] == pytest.approx((other["effect"] * heads["score"]).sum() / (other["effect"] ** 2).sum())
    assert row["largest_effect"] == other["effect"].abs().max()
    renamed = measured.agreement(same.rename(columns={"effect": "path"}), column="path")
    assert renamed["slope"].item() == pytest.approx(1)
    quiet = Edges(measured.data.copy(deep=True))
    quiet.data.score.loc[{"writer": "a0.h1"}] = 0
    assert quiet.agreement(same.assign(effect=same["effect"].where(same.index != 1, 0)))["cells"].item() == 7
    for frame, message in (
        (same.drop(columns="effect"), "there is no effect"),
        (pd.concat([same, same]), "a head has several rows"),
        (same[:4].assign(layer=7), "no head of the frame"),
    ):
        with pytest.raises(InputError, match=message):
            measured.agreement(frame)


def planted(model: HookedModel, edges: dict[tuple[str, str], float]) -> Edges:
    """A result in which these edges have these scores and all others 0."""
    graph = graph_of(model)
    kinds = {"writer": graph.writers, "reader": graph.readers}
    coords: dict[str, Any] = {"example": ["1", "2"]}
    for dim, nodes in kinds.items():
        coords[dim] = np.array([node.name for node in nodes], dtype=object)
        for name in ("kind", "layer", "head"):
            coords[f"{dim}_{name}"] = (dim, np.array([getattr(node, name) for node in nodes]))
    exists = np.arange(len(graph.writers))[:, None, None] < np.array(graph.before)[:, None]
    values = np.where(np.broadcast_to(exists, (*exists.shape[:2], 2)), 0.0, np.nan).astype(np.float32)
    ends = {"clean": ("example", [1.0, 1.0]), "corrupt": ("example", [0.0, 0.0])}
    data = xr.Dataset({"score": (("writer", "reader", "example"), values)} | ends, coords)
    for (writer, reader), score in edges.items():
        assert not np.isnan(data.score.loc[writer, reader]).any()
        data.score.loc[writer, reader] = score
    return Edges(data.assign_attrs(metric="logit_diff", steps=0))


def test_circuit(model):
    """Of the largest edges those remain that lie on a way from the embedding to the logits."""
    through = {
        ("embed", "a0.h1<q>"): 9.0, ("embed", "a0.kv1<v>"): -8.0, ("a0.h1", "m0"): 7.0, ("m0", "logits"): -6.0,
        ("a0.h3", "a1.kv0<k>"): 5.0, ("a1.h1", "logits"): 4.0,
    }  # fmt: skip
    dangling = {
        ("a0.h0", "a1.h3<q>"): 8.5,  # nothing comes in
        ("embed", "m1"): -7.5,  # nothing goes out
        ("m0", "a1.h2<q>"): 6.5,  # nor here
        ("a1.h3", "logits"): 5.5,  # its way in begins at a head that nothing reaches
    }
    found = planted(model, through | dangling | {("embed", "logits"): 0.1})
    n = len(through) + len(dangling)
    assert {tuple(e) for e in found.circuit(n)[["writer", "reader"]].values} == {*through}
    assert found.circuit(n)["score"].tolist() == sorted(through.values(), key=abs, reverse=True)
    assert {*map(tuple, found.circuit(500)[["writer", "reader"]].values)} == {*through, ("embed", "logits")}
    nodes = found.nodes(n).set_index("node")
    # The value of group 1 is read by heads 2 and 3, of which 3 goes on; the key of group 0 by heads 0 and 1.
    assert nodes.index.tolist() == ["embed", "a0.h1", "a0.h3", "m0", "a1.h1", "logits"]
    assert nodes["edges_in"].tolist() == [0, 1, 1, 1, 1, 2]
    assert nodes["edges_out"].tolist() == [2, 1, 1, 1, 1, 0]
    assert nodes.loc["a1.h1", ["kind", "layer", "head"]].tolist() == ["head", 1, 1]
    assert not len(found.circuit(3))
    assert not len(found.nodes(3))


def test_planted_heads_are_found(model):
    """Only what differs between the prompts can carry: a model whose layer 1 is cut off has no edge through it."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        module.model.layers[1].self_attn.o_proj.weight.zero_()
        module.model.layers[1].mlp.down_proj.weight.zero_()
    found = attribute_edges(HookedModel(module, letters()), items(), progress=False)
    nodes = found.nodes(len(found.to_frame()))
    assert set(nodes["layer"]) == {-1, 0, 2}
    assert {"a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"} <= {*nodes["node"]}


def test_batches_fit_memory(library, monkeypatch):
    """So many examples at once that the writers' differences stay within the bound; the scores are the same."""
    model = HookedModel(library.model("gpt2"))
    expected, *_ = scores(model, encoded(0), encoded(1))
    sizes = []
    plain = engine._differences
    monkeypatch.setattr(engine, "_differences", lambda *args: sizes.append(len(args[3])) or plain(*args))
    monkeypatch.setattr(engine, "NUMBERS", 2 * 11 * WIDTH * 32)
    found, *_ = scores(model, encoded(0), encoded(1))
    assert sizes == [2, 1]
    np.testing.assert_allclose(found, expected, atol=1e-5)
