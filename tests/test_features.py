"""Collected activations against runs of one prompt at a time; padding, disk, interruption and order change nothing."""

import copy
import gc

import numpy as np
import pytest
import torch
from test_check import adapter_folder
from test_patching import letters

import finetune_lens as fl
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel, features
from finetune_lens.hooked.features import collect
from finetune_lens.hooked.loading import as_model
from finetune_lens.prompts import encode, read_prompts

TEXTS = ["abcde=", "fg=", "klmnoqw=", "pqrst=", "u="]
FAMILIES = ("gpt2", "llama", "qwen3", "gemma2-sliding", "neox", "mixtral", "opt", "bloom", "mpt", "falcon-rw", "phi3")
SITES = ["blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]


def encoded(texts=TEXTS, padding="left", **options):
    return encode(read_prompts(texts), letters(), need_answer=False, padding=padding, **options)


def last(texts):
    columns = torch.zeros_like(texts.mask)
    columns[torch.arange(len(texts)), texts.read_at[:, 0]] = True
    return columns


def alone(model, texts, row, site):
    """(pos, …) of one text by itself, without padding."""
    (found,) = model.run(texts.ids[row, texts.mask[row]][None], capture=[site]).cache.values()
    return found[0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_against_one_run_a_text(library, family, padding):
    model, texts = HookedModel(library.model(family)), encoded(padding=padding)
    sites = [s for s in SITES if not model.lacks(*features.parse(s))]
    one, mean = collect(model, texts, sites, columns=last(texts)), collect(model, texts, sites, columns=texts.mask)
    each = collect(model, texts, sites, columns=texts.mask, pool="each")
    assert one.column.tolist() == texts.read_at[:, 0].tolist()
    assert mean.column.tolist() == [-1] * 5
    assert (each.example.tolist(), each.column.tolist()) == tuple(x.tolist() for x in texts.mask.nonzero(as_tuple=True))
    for site in sites:
        assert one.values(site).dtype == np.float32
        for row in range(5):
            expected = alone(model, texts, row, site)
            tolerance = {"atol": 2e-5 * max(1, np.abs(expected).max()), "err_msg": f"{site}, text {row}"}
            np.testing.assert_allclose(one.values(site)[row], expected[-1], **tolerance)
            np.testing.assert_allclose(mean.values(site)[row], expected.mean(0), **tolerance)
            np.testing.assert_allclose(each.values(site)[each.example == row], expected, **tolerance)


def test_some_columns_of_each_text(library):
    """Two columns here, one there: the mean of these alone, whatever the order in which texts are run."""
    model, texts = HookedModel(library.model("llama")), encoded(padding="right")
    columns = torch.zeros_like(texts.mask)
    wanted = [[1, 3], [0], [2, 3, 7], [4], [1]]
    for row, some in enumerate(wanted):
        columns[row, some] = True
    (site,) = sites = SITES[-1:]
    for batch_size in (1, 2, None):
        mean = collect(model, texts, sites, columns=columns, batch_size=batch_size)
        each = collect(model, texts, sites, columns=columns, pool="each", batch_size=batch_size)
        assert mean.column.tolist() == [-1, 0, -1, 4, 1]
        for row, some in enumerate(wanted):
            expected = alone(model, texts, row, site)[some]
            np.testing.assert_allclose(mean.values(site)[row], expected.mean(0), atol=2e-5)
            np.testing.assert_allclose(each.values(site)[each.example == row], expected, atol=2e-5)
    columns[1] = False
    each = collect(model, texts, sites, columns=columns, pool="each")
    assert 1 not in each.example
    np.testing.assert_allclose(each.values(site)[2:5], alone(model, texts, 2, site)[[2, 3, 7]], atol=2e-5)


def test_the_pass_ends_at_the_last_site(library):
    """Nothing behind the last site is run: neither later blocks nor the unembedding. Hooks are gone afterwards."""
    module = library.fresh("llama")
    model, texts, ran = HookedModel(module), encoded(), []
    assert model.layers == 2
    module.lm_head.register_forward_hook(lambda *a: ran.append("unembedding"))
    module.model.layers[1].register_forward_hook(lambda *a: ran.append("block 1"))
    ran.clear()
    before = collect(model, texts, ["blocks.0.hook_resid_post"], columns=texts.mask)
    assert ran == []
    collect(model, texts, ["blocks.1.hook_resid_post"], columns=texts.mask)
    assert ran == ["block 1"]
    ran.clear()
    model.run(texts.ids, mask=texts.mask)
    assert ran == ["block 1", "unembedding"]
    assert not any(m._forward_pre_hooks for m in module.modules())
    again = collect(model, texts, ["blocks.0.hook_resid_post"] * 2, columns=texts.mask)
    ((name, values),) = again.arrays.items()
    np.testing.assert_array_equal(before.values(name), values)


def test_disk_is_memory(library, tmp_path, monkeypatch):
    model, texts = HookedModel(library.model("gpt2")), encoded()
    monkeypatch.setattr(features.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    (tmp_path / "finetune_lens-").mkdir()
    in_memory = collect(model, texts, SITES, columns=texts.mask, pool="each")
    size = sum(a.nbytes for a in in_memory.arrays.values())
    assert not any(isinstance(a, np.memmap) for a in in_memory.arrays.values())
    assert not isinstance(collect(model, texts, SITES, columns=texts.mask, pool="each", budget=size).values(SITES[0]),
                          np.memmap)  # fmt: skip
    on_disk = collect(model, texts, SITES, columns=texts.mask, pool="each", budget=size - 1)
    in_folder = collect(model, texts, SITES, columns=texts.mask, pool="each", folder=tmp_path / "mine")
    for found in (on_disk, in_folder):
        for site in SITES:
            assert isinstance(found.values(site), np.memmap)
            np.testing.assert_array_equal(found.values(site), in_memory.values(site))
    assert len(list((tmp_path / "finetune_lens-").iterdir())) == len(SITES)
    del on_disk, found
    gc.collect()
    assert not (tmp_path / "finetune_lens-").exists()
    assert (tmp_path / "mine").exists()


def test_a_full_disk_is_said(library, tmp_path, monkeypatch):
    model, texts = HookedModel(library.model("gpt2")), encoded()
    usage = features.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda where: usage._replace(free=100))
    with pytest.raises(InputError, match=r"0\.0 GB free; choose another folder"):
        collect(model, texts, SITES, columns=texts.mask, folder=tmp_path)


def counting(model, stop=-1):
    """How many texts each forward pass reads; the one of that number is interrupted."""
    sizes = []

    def before(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if len(sizes) == stop:
            raise KeyboardInterrupt

    return sizes, model.module.register_forward_pre_hook(before, with_kwargs=True)


def test_an_interrupted_collection_continues(library, tmp_path):
    model, texts = as_model(library.saved("llama")), encoded()
    options = {"columns": texts.mask, "pool": "each", "batch_size": 2, "folder": tmp_path / "rows"}
    whole = collect(model, texts, SITES, columns=texts.mask, pool="each", batch_size=2)
    sizes, hook = counting(model, stop=3)
    with pytest.raises(KeyboardInterrupt):
        collect(model, texts, SITES, **options)
    hook.remove()
    sizes, hook = counting(model)
    ticks = []
    found = collect(model, texts, SITES, tick=ticks.append, **options)
    assert (sizes, ticks) == ([1], [4, 1])
    for site in SITES:
        np.testing.assert_array_equal(found.values(site), whole.values(site))
    again = collect(model, texts, SITES, **options)
    assert sizes == [1]
    np.testing.assert_array_equal(again.values(SITES[2]), whole.values(SITES[2]))
    changed = [
        {"pool": "mean"}, {"columns": last(texts)}, {"sites": SITES[:2]}, {"encoded": encoded(TEXTS[::-1])},
        {"model": HookedModel(model.module, fingerprint="another")},
    ]  # fmt: skip
    assert changed[-1]["model"].layers == 2  # found by a short run of its own
    for change in changed:
        sizes.clear()
        arguments = {"model": model, "encoded": texts, "sites": SITES} | options | change
        if "encoded" in change:
            arguments["columns"] = change["encoded"].mask
        collect(arguments.pop("model"), arguments.pop("encoded"), arguments.pop("sites"), **arguments)
        assert sizes == [2, 2, 1], change
    assert len(list((tmp_path / "rows").iterdir())) == 1  # what other arguments left is gone
    hook.remove()


def test_a_model_in_memory_starts_anew(library, tmp_path):
    """Its weights may have changed: nothing that lies there is taken for its rows."""
    module = library.fresh("llama")
    model, texts = HookedModel(module), encoded()
    before = collect(model, texts, SITES[-1:], columns=texts.mask, folder=tmp_path).values(SITES[-1]).copy()
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight.mul_(2)
    after = collect(model, texts, SITES[-1:], columns=texts.mask, folder=tmp_path)
    np.testing.assert_array_equal(
        after.values(SITES[-1]), collect(model, texts, SITES[-1:], columns=texts.mask).values(SITES[-1])
    )
    assert np.abs(after.values(SITES[-1]) - before).max() > 0.01


def test_memory_runs_out(library, monkeypatch):
    model, texts = HookedModel(library.model("llama")), encoded()
    whole, real, sizes = collect(model, texts, SITES, columns=texts.mask), features._batch, []

    def small(model, encoded, names, columns, index, pool):
        sizes.append(len(index))
        if len(index) > 2:
            raise torch.OutOfMemoryError
        return real(model, encoded, names, columns, index, pool)

    monkeypatch.setattr(features, "_batch", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = collect(model, texts, SITES, columns=texts.mask)
    assert sizes == [5, 2, 2, 1]
    np.testing.assert_allclose(found.values(SITES[-1]), whole.values(SITES[-1]), atol=1e-5)
    monkeypatch.setattr(features, "_batch", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        collect(model, texts, SITES, columns=texts.mask)


def test_batches_are_of_about_one_length(library, monkeypatch):
    model, texts = HookedModel(library.model("llama")), encoded()
    widths, real = [], features._batch
    monkeypatch.setitem(features.TOKENS, "cpu", 8)
    monkeypatch.setattr(
        features, "_batch", lambda m, e, n, c, i, p: widths.append(i.tolist()) or real(m, e, n, c, i, p)
    )
    found = collect(model, texts, SITES[-1:], columns=last(texts))
    assert widths == [[2], [0], [3], [1, 4]]
    np.testing.assert_allclose(found.values(SITES[-1])[4], alone(model, texts, 4, SITES[-1])[-1], atol=2e-5)


def test_both_sides_of_an_adapter(library, tmp_path):
    folder = adapter_folder(library.fresh("llama"), tmp_path)
    base, tuned = fl.ModelPair.load(library.saved("llama"), folder, tokenizer=letters()).models()
    texts = encoded()
    one, other = (collect(m, texts, SITES[-1:], columns=texts.mask).values(SITES[-1]) for m in (base, tuned))
    plain = collect(HookedModel(library.model("llama")), texts, SITES[-1:], columns=texts.mask).values(SITES[-1])
    np.testing.assert_allclose(one, plain, atol=1e-5)
    assert np.abs(other - plain).max() > 0.01


def test_embeddings_narrower_than_the_residual_stream(library):
    import transformers

    config = copy.deepcopy(library.configs["opt"]())
    config.word_embed_proj_dim, config.do_layer_norm_before = 16, False
    model = HookedModel(transformers.AutoModelForCausalLM.from_config(config).eval())
    texts = encoded()
    found = collect(model, texts, SITES[-1:], columns=texts.mask)
    assert found.values(SITES[-1]).shape == (5, config.hidden_size)


def test_refuses(library):
    model, texts = HookedModel(library.model("neox")), encoded()
    for site, message in (
        ("blocks.0.hook_nothing", "is no site"), ("blocks.2.hook_resid_post", "layers 0 to 1"),
        ("blocks.0.attn.hook_pattern", "pattern"), ("blocks.0.hook_resid_mid", "side by side"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            collect(model, texts, [site], columns=texts.mask)
    with pytest.raises(InputError, match="text 1: a column to be read is padding"):
        collect(model, texts, SITES[:1], columns=torch.ones_like(texts.mask))
    none = texts.mask.clone()
    none[3] = False
    with pytest.raises(InputError, match="text 4: none of its columns"):
        collect(model, texts, SITES[:1], columns=none)
    with pytest.raises(InputError, match="text 1: none of its columns"):
        collect(model, texts, SITES[:1], columns=none & False, pool="each")
    with pytest.raises(InputError, match="columns: expected"):
        collect(model, texts, SITES[:1], columns=texts.mask[:, 1:])
