"""Patching: what must be 1 and 0 is, grids are the sets they stand for, positions correspond, results say it."""

import string
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr

import finetune_lens as fl
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked.effects import _averaged
from finetune_lens.patching import _noised, _subjects, patch, trace
from finetune_lens.prompts import encode, read_prompts
from finetune_lens.results.patching import Patching

LETTERS = {token: i for i, token in enumerate(["<pad>", *string.ascii_lowercase, "=", " "])}


def letters() -> Any:
    """A token a letter."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(dict(LETTERS)))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), behavior="isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")


def items(texts: str = "abcde fghij klmno pqrst uvwxy zabcd") -> list[dict[str, Any]]:
    """Prompts whose third letter differs in the counterfactual."""
    words = texts.split()
    return [{"prompt": f"{w}=", "corrupt": f"{w[:2]}{w[-1]}{w[3:]}=", "answer": w[0], "wrong": w[1]} for w in words]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, library):
    return HookedModel(library.model(request.param), letters(), name=request.param)


def run(model: HookedModel, prompts: Any, **options: Any) -> Patching:
    return patch(model, prompts, progress=False, **options)


def gap(result: Patching, metric: str = "logit_diff") -> xr.DataArray:
    return result.data[f"donor_{metric}"] - result.data[f"recipient_{metric}"]


def test_all_and_nothing(model):
    """The whole first residual stream carries everything; what the prompts share, or nobody reads, carries nothing."""
    found = run(model, items(), direction="both", by=("layer", "position"))
    effect = found.data.logit_diff
    differs = effect.sel(layer=0, position=2)
    np.testing.assert_allclose(differs, gap(found).transpose(*differs.dims), atol=1e-5)
    assert np.abs(differs).max() > 0.01
    assert np.abs(effect.sel(position=[0, 1])).max() < 1e-6
    assert (
        np.abs(run(model, items(), site="resid_post", layers=[1]).data.logit_diff.sel(position=range(5))).max() < 1e-6
    )
    whole = run(model, items(), direction="both", by=("layer",), metric="kl")
    np.testing.assert_allclose(whole.recovery().ratio.sel(layer=0), 1, atol=1e-4)
    assert float(whole.recovery().ratio.min()) > 0


def test_directions(model):
    """Denoising puts clean into corrupt, noising corrupt into clean: recipient and donor change places."""
    both = run(model, items(), direction="both", by=("layer",))
    clean, corrupt = (
        model.run(e.ids, logits_at=e.read_at).logits[:, 0]
        for e in (encode(read_prompts(items()), model.tokenizer, corrupt=c) for c in (False, True))
    )
    rows = np.arange(6)
    right, wrong = ([LETTERS[p[name]] for p in items()] for name in ("answer", "wrong"))
    for direction, recipient, donor in (("denoising", corrupt, clean), ("noising", clean, corrupt)):
        one = both.data.sel(direction=direction)
        for name, logits in (("recipient", recipient), ("donor", donor)):
            np.testing.assert_allclose(
                one[f"{name}_logit_diff"], (logits[rows, right] - logits[rows, wrong]).numpy(), atol=1e-5
            )
            above = (logits > logits[rows, right][:, None]).sum(1).numpy()
            np.testing.assert_allclose(one[f"{name}_reciprocal_rank"], 1 / (1 + above), rtol=1e-6)
            assert one[f"{name}_accuracy"].values.tolist() == (above == 0).tolist()
        np.testing.assert_allclose(one.logit_diff.sel(layer=0), gap(both).sel(direction=direction), atol=1e-5)
        alone = run(model, items(), direction=direction, by=("layer",))
        assert alone.directions == [direction]
        np.testing.assert_allclose(alone.data.logit_diff.sel(direction=direction), one.logit_diff, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "cell", "places"),
    [
        ({"site": "z"}, {"layer": 1, "head": 2}, ["blocks.1.attn.hook_z[2]"]),
        ({"site": "k", "by": ["head"], "heads": [1]}, {"head": 1}, [f"blocks.{i}.attn.hook_k[1]" for i in (0, 1)]),
        (
            {"site": "v", "by": ["head", "position"], "layers": [1]},
            {"head": 1, "position": 4},
            ["blocks.1.attn.hook_v[1]@4"],
        ),
        (
            {"site": "mlp_out", "by": ["position"], "positions": [1, -1]},
            {"position": -1},
            ["blocks.0.hook_mlp_out@5", "blocks.1.hook_mlp_out@-1"],
        ),
        (
            {"site": "attn_out", "window": 3, "by": ["layer", "position"]},
            {"layer": 0, "position": 3},
            ["blocks.0.hook_attn_out@3", "blocks.1.hook_attn_out@3"],
        ),
        ({"site": "attn_out", "window": 2, "by": ["layer"]}, {"layer": 1}, ["blocks.1.hook_attn_out"]),
        (
            {"site": "z", "heads": [0, 3], "by": ["layer"], "positions": [2, 3]},
            {"layer": 0},
            [f"blocks.0.attn.hook_z[{h}]@{p}" for h in (0, 3) for p in (2, 3)],
        ),
        ({"site": "pattern"}, {"layer": 0, "head": 3}, ["blocks.0.attn.hook_pattern[3]"]),
    ],
)
def test_grids_are_the_sets_they_stand_for(model, options, cell, places):
    heads = {"heads": [1]} if options.get("by") == ["head", "position"] else {}
    grid = run(model, items(), **options, **heads)
    sets = run(model, items(), sets={"other": ["blocks.0.hook_resid_pre@2"], "mine": places})
    for metric in ("logit_diff", "prob", "kl"):
        one, other = grid.data[metric].sel(cell), sets.data[metric].sel({"set": "mine"})
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(sets.data.logit_diff).max() > 1e-3
    assert sets.dims == ("set",)
    assert set(grid.dims) == set(cell)


def test_methods_agree(model):
    exact, full, both, estimate, path = (
        run(model, items(), site="z", method=method)
        for method in ("exact", "full", "both", "attribution", "integrated")
    )
    np.testing.assert_allclose(exact.data.logit_diff, full.data.logit_diff, atol=1e-5)
    np.testing.assert_allclose(both.data.logit_diff, exact.data.logit_diff, atol=1e-6)
    np.testing.assert_array_equal(both.data.attribution_logit_diff, estimate.data.logit_diff)
    assert np.abs(path.data.logit_diff - exact.data.logit_diff).mean() < np.abs(exact.data.logit_diff).mean()
    agreement = both.agreement()
    assert agreement.rank_correlation[0] > 0.5
    off = np.abs(both.data.attribution_logit_diff.mean("example") - both.data.logit_diff.mean("example"))
    assert agreement.worst[0] == pytest.approx(float(off.max()))
    assert "rank correlation" in both.summary()
    assert "estimated" not in both.summary()
    assert "z patched (estimated by attribution), 8 layer × head cells" in estimate.summary()
    assert "estimated by integrated gradients" in path.summary()
    with pytest.raises(InputError, match="method='both'"):
        exact.agreement()


def ragged() -> list[dict[str, Any]]:
    prompts = items("abcde fghijkl mno")
    prompts[1]["corrupt"] = "fgxyjklab="  # longer than its prompt
    return prompts


def test_prompts_of_different_lengths(model):
    """Whichever side they are aligned at: each example's effects are those it has alone, at its own positions."""
    with pytest.raises(InputError, match=r"prompts have 4 to 8 tokens .*align='left' or 'right'"):
        run(model, ragged())
    same_length = [p for p in ragged() if len(p["corrupt"]) != len(p["prompt"])]
    with pytest.raises(InputError, match="prompt 1 has 8 tokens, its `corrupt` text 10"):
        run(model, same_length)
    left, right = run(model, ragged(), align="left"), run(model, ragged(), align="right")
    assert right.data.position.values.tolist() == list(range(-10, 0))
    assert left.data.position.values.tolist() == list(range(8))
    for number, item in enumerate(ragged()):
        size, other = len(item["prompt"]), len(item["corrupt"])
        alone = {side: run(model, [item], align=side).data.logit_diff.isel(example=0) for side in ("left", "right")}
        for found, side in ((left, "left"), (right, "right")):
            effect = found.data.logit_diff.isel(example=number)
            mine = alone[side]
            for position in effect.position.values:
                here = effect.sel(position=position)
                there = position < min(size, other) if side == "left" else -position <= min(size, other)
                assert bool(np.isfinite(here).all()) == there
                if there:
                    label = position if position in mine.position else position + size
                    np.testing.assert_allclose(here, mine.sel(position=label), atol=1e-5)
    assert left.data.tokens.values[2].tolist() == ["m", "n", "o", "=", "", "", "", ""]
    assert right.data.tokens.values[2].tolist() == [""] * 6 + ["m", "n", "o", "="]
    last = run(model, ragged(), align="right", positions=[-1, -3])
    np.testing.assert_allclose(last.data.logit_diff, right.data.logit_diff.sel(position=[-1, -3]), atol=1e-5)
    assert last.data.tokens.values.tolist() == [["=", "d"], ["=", "k"], ["=", "n"]]
    with pytest.raises(InputError, match=r"position -1 counts from the end.*align='right'"):
        run(model, ragged(), align="left", positions=[-1])
    for align, position in (("left", 8), ("right", 0), ("right", -11)):
        with pytest.raises(InputError, match=f"position {position} does not exist: the prompts have positions"):
            run(model, ragged(), align=align, positions=[position])


def test_whole_answers(model):
    """The summed log-probability of all tokens of the answer, patched at the prompt's own columns, one plain hook."""
    prompts = [
        {"prompt": "abcd=", "corrupt": "abxd=", "answer": "qrs", "wrong": "t"},
        {"prompt": "efgh=", "corrupt": "efxh=", "answer": "u"},
        {"prompt": "ghij=", "corrupt": "gxij=", "answer": "vw"},
    ]
    found = {a: run(model, prompts, whole_answer=True, metric="logprob", align=a) for a in ("error", "left", "right")}
    assert found["right"].data.position.values.tolist() == list(range(5))
    block = (model.module.transformer.h if model.name == "gpt2" else model.module.model.layers)[1]
    for example, item in enumerate(prompts):
        ids = {
            name: torch.tensor([[LETTERS[c] for c in item[name] + item["answer"]]]) for name in ("prompt", "corrupt")
        }

        def logprob(logits: torch.Tensor, ids: Any = ids) -> float:
            steps = logits[0, 4:-1].log_softmax(-1)
            return float(steps.gather(1, ids["prompt"][0, 5:, None]).sum())

        clean = model.run(ids["prompt"], capture=["blocks.1.hook_resid_pre"]).cache["blocks.1.hook_resid_pre"]
        unpatched = logprob(model.run(ids["corrupt"]).logits)
        for position in range(5):

            def put(module: Any, args: tuple, position: int = position, clean: Any = clean) -> tuple:
                x = args[0].clone()
                x[0, position] = clean[0, position]
                return (x, *args[1:])

            hook = block.register_forward_pre_hook(put)
            expected = logprob(model.module(ids["corrupt"]).logits) - unpatched
            hook.remove()
            for result in found.values():
                assert float(
                    result.data.logprob.isel(direction=0, example=example).sel(layer=1, position=position)
                ) == pytest.approx(expected, abs=2e-5)
    ended = run(model, [prompts[0], {**prompts[1], "prompt": "ab=", "corrupt": "xb="}], whole_answer=True,
                metric="logprob", align="right", positions=[-1])  # fmt: skip
    np.testing.assert_allclose(
        ended.data.logprob.isel(example=0), found["error"].data.logprob.isel(example=0).sel(position=[4]), atol=1e-5
    )
    assert ended.data.tokens.values.tolist() == [["="], ["="]]
    two = [prompts[0], {"prompt": "ab=", "corrupt": "xb=", "answer": "uvw"}]
    started = run(model, two, whole_answer=True, metric="logprob", align="left")
    assert started.data.tokens.values[1].tolist() == ["a", "b", "=", "", ""]  # what follows is the answer's
    for bad in (prompts, prompts[1:2], [{**prompts[1], "wrong": "t"}]):
        with pytest.raises(InputError, match=r"whole answers have no logit difference|needs a wrong answer"):
            run(model, bad, whole_answer=True)


def test_several_answers(model):
    """Accepted answers join: their probabilities add."""
    prompts = [{**p, "answer": ["q", "r"], "wrong": ["s", "t"]} for p in items()]
    found = run(model, prompts, by=("layer",))
    single = {
        letter: run(model, [{**p, "answer": letter, "wrong": "w"} for p in items()], by=("layer",)) for letter in "qrst"
    }
    for side in ("recipient", "donor"):
        probs = {letter: one.data[f"{side}_prob"] for letter, one in single.items()}
        np.testing.assert_allclose(found.data[f"{side}_prob"], probs["q"] + probs["r"], rtol=1e-5)
        odds = np.log(probs["q"] + probs["r"]) - np.log(probs["s"] + probs["t"])
        np.testing.assert_allclose(found.data[f"{side}_logit_diff"], odds, atol=1e-5)
    patched = found.data.prob + found.data.recipient_prob
    apart = [one.data.prob + one.data.recipient_prob for one in (single["q"], single["r"])]
    np.testing.assert_allclose(patched, sum(apart).transpose(*patched.dims), rtol=1e-4)


def test_prompts_without_answers(model):
    bare = [{"prompt": p["prompt"], "corrupt": p["corrupt"]} for p in items()]
    found = run(model, bare, metric="kl", by=("layer",))
    assert found.metrics == ["kl"]
    np.testing.assert_allclose(found.recovery().ratio.sel(layer=0), 1, atol=1e-4)
    assert found.to_frame().shape[0] == 2
    without = run(model, [{k: v for k, v in p.items() if k != "wrong"} for p in items()], metric="logprob")
    assert "logit_diff" not in without.metrics
    with pytest.raises(InputError, match="6 of 6 prompts have no `answer`"):
        run(model, bare, metric="logprob")


def test_fields_are_coordinates(model, tmp_path):
    prompts = [{**p, "id": f"p{i}", "topic": "ab"[i % 2], "size": i, "prob": 1, "odd/name": None, "coords": "x"}
               for i, p in enumerate(items())]  # fmt: skip
    del prompts[0]["odd/name"]
    found = run(model, prompts, positions=[2, -1])
    assert found.data.example.values.tolist() == [f"p{i}" for i in range(6)]
    assert found.data.topic.values.tolist() == list("ababab")
    assert found.data.coords["coords"].values.tolist() == ["x"] * 6
    assert found.data["size"].dtype.kind == "i"
    assert found.data.prob.dims == ("direction", "layer", "position", "example")
    assert "the field 'prob' of the prompts is left out" in found.summary()
    assert found.data.tokens.values[0].tolist() == ["c", "="]
    again = fl.load(found.save(tmp_path / "x.nc"))
    assert again.data.topic.values.tolist() == list("ababab")
    assert again.to_frame().equals(found.to_frame())


# Causal tracing


def subjects() -> list[dict[str, Any]]:
    return [{"prompt": p["prompt"], "answer": p["answer"], "wrong": p["wrong"], "subject": p["prompt"][1:3]}
            for p in items()]  # fmt: skip


def test_tracing(model):
    """Noise is on the subject alone: restoring those embeddings restores everything, restoring others nothing."""
    options = {"site": "resid_pre", "copies": 3, "progress": False, "metric": "kl"}
    found = trace(model, subjects(), by=("layer",), **options)
    np.testing.assert_allclose(found.recovery().ratio.sel(layer=0), 1, atol=1e-4)
    at = trace(model, subjects(), positions=[0, 1, 2, 3], **options).data.kl.sel(layer=0, direction="restoring")
    assert np.abs(at.sel(position=[0, 3])).max() < 1e-6
    assert (np.abs(at.sel(position=[1, 2])) > 1e-5).all()
    again = trace(model, subjects(), by=("layer",), **options)
    assert found.data.drop_attrs().equals(again.data.drop_attrs())
    other = trace(model, subjects(), by=("layer",), seed=1, **options)
    assert np.abs(other.data.donor_kl - found.data.donor_kl).min() > 0
    np.testing.assert_allclose(
        trace(model, subjects(), by=("layer",), batch_size=4, **options).data.kl, found.data.kl, atol=1e-5
    )


def test_the_noise(model):
    """Each run has its own, of the stated size; copies are averaged."""
    encoded = encode(read_prompts(subjects()[:2]), model.tokenizer).rows(np.repeat([0, 1], 500))
    where = np.zeros((1000, 6), bool)
    where[:, 1:3] = True
    [(name, edit)] = _noised(model, encoded, where, 3.0, 0)(np.arange(1000))
    assert name == "blocks.0.hook_resid_pre"
    added = edit(torch.zeros(1000, 6, 32))
    embedded = model.module.get_input_embeddings()(encoded.ids)[:, 1:3]
    assert float(added[:, 1:3].std()) == pytest.approx(3 * float(embedded.std()), rel=0.02)
    assert float(added[:, [0, 3, 4, 5]].abs().max()) == 0
    assert len({float(x) for x in added[:, 1, 0]}) == 1000
    # The copies of an example follow each other.
    assert _averaged(np.arange(8.0)[None], 2).tolist() == [[0.5, 2.5, 4.5, 6.5]]
    # Two examples with one copy each have the noise of one with two.
    pair, single = ([{**subjects()[0], "id": str(i)} for i in range(n)] for n in (2, 1))
    options = {"site": "resid_pre", "by": ("layer",), "progress": False, "metric": "prob"}
    apart, together = trace(model, pair, copies=1, **options), trace(model, single, copies=2, **options)
    np.testing.assert_allclose(apart.data.prob.mean("example"), together.data.prob.isel(example=0), atol=1e-6)


def test_the_noise_where_embeddings_are_multiplied():
    """Granite's enter the first block 12 times as large, and so does their noise."""
    import transformers

    sizes = {"vocab_size": len(LETTERS), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    module = transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, **heads, embedding_multiplier=12.0))
    model = HookedModel(module.eval(), letters())
    encoded = encode(read_prompts(subjects()[:2]), model.tokenizer).rows(np.repeat([0, 1], 500))
    where = np.zeros((1000, 6), bool)
    where[:, 1:3] = True
    [(site, edit)] = _noised(model, encoded, where, 3.0, 0)(np.arange(1000))
    read = model.run(encoded.ids, capture=[site]).cache[site][:, 1:3]
    assert float(edit(torch.zeros(1000, 6, 32))[:, 1:3].std()) == pytest.approx(3 * float(read.std()), rel=0.02)


def sentencepiece() -> Any:
    """A word a token, its space in it and lost when the token is decoded alone; bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁The", "▁E", "iff", "el", "▁Tower", "▁is", "▁in"]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "▁", *(f"<0x{b:02X}>" for b in range(256))])}
    merges = []
    for word in words:
        for end in range(1, len(word) + 1):
            vocabulary.setdefault(word[end - 1], len(vocabulary))
            if vocabulary.setdefault(word[:end], len(vocabulary)) and end > 1:
                merges.append((word[: end - 1], word[end - 1]))
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>")


def bytes_pairs() -> Any:
    """Byte-level: a space belongs to the token after it, a letter beyond ASCII is two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    merges = []
    for word in ("ĠEiffel", "ĠTower", "Ġis", "Ġin", "The"):
        for end in range(2, len(word) + 1):
            vocabulary.setdefault(word[:end], len(vocabulary))
            merges.append((word[: end - 1], word[end - 1]))
    raw = Tokenizer(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("make", [sentencepiece, bytes_pairs])
@pytest.mark.parametrize(
    ("subject", "held"),
    [("Eiffel Tower", "EiffelTower"), (" Eiffel", "Eiffel"), ("Tower isé", "Towerisé"), ("é in", "éin")],
)
def test_where_the_subject_is(make, subject, held):
    """Its tokens, whatever a token alone is decoded to."""
    tokenizer = make()
    text = "The Eiffel Tower isé in"
    prompts = read_prompts([{"prompt": "The Tower is", "subject": "The"}, {"prompt": text, "subject": subject}])
    for padding in ("left", "right"):
        encoded = encode(prompts, tokenizer, need_answer=False, padding=padding)
        found = _subjects(prompts, encoded, "subject", tokenizer)
        assert "".join(tokenizer.decode(encoded.ids[1][torch.from_numpy(found[1])]).split()) == held
        assert tokenizer.decode(encoded.ids[0][torch.from_numpy(found[0])]).strip() == "The"
        assert not found[~encoded.mask.numpy()].any()


def test_subjects_that_are_not_there(model):
    for subject in ("zz", "", None, 3):
        prompts = [{**subjects()[0], "subject": subject}]
        with pytest.raises(InputError, match=r"prompt 1: expected a field 'subject' holding a part of its text; found"):
            trace(model, prompts, progress=False)
    for options in ({"noise": 0.0}, {"copies": 0}):
        with pytest.raises(InputError, match="noise is positive and there is at least one copy"):
            trace(model, subjects(), progress=False, **options)


# Results


def made(effects: np.ndarray, recipient: np.ndarray, donor: np.ndarray, **more: np.ndarray) -> Patching:
    """A result with these numbers: effects (layer, example)."""
    dims = ("direction", "layer", "example")
    data = xr.Dataset(
        {"logit_diff": (dims, effects[None]), "recipient_logit_diff": (dims[::2], recipient[None]),
         "donor_logit_diff": (dims[::2], donor[None])} | {name: (dims, v[None]) for name, v in more.items()},
        coords={"direction": np.array(["denoising"], dtype=object), "layer": np.arange(len(effects))},
        attrs={"grid": "layer", "site": "z", "metric": "logit_diff", "method": "exact", "provenance": "{}"},
    )  # fmt: skip
    return Patching(data)


def test_numbers_of_a_result():
    """Means, their intervals and recoveries are what scipy makes of the examples."""
    order = np.random.default_rng(0)
    recipient, donor = order.normal(0, 1, 12), order.normal(4, 1, 12)
    effects = np.stack([0.5 * (donor - recipient) + order.normal(0, 0.1, 12), order.normal(0, 1, 12)])
    effects[1, :3] = np.nan
    found = made(effects, recipient, donor, attribution_logit_diff=effects * 2)
    means = np.nanmean(effects, 1)
    effect, recovery = found.effect(), found.recovery()
    np.testing.assert_allclose(effect["mean"].values[0], means)
    mean = scipy.stats.bootstrap((effects[0],), np.mean, n_resamples=9999, method="percentile", rng=1)
    low, high = mean.confidence_interval
    assert effect.low.values[0, 0] == pytest.approx(low, abs=0.03)
    assert effect.high.values[0, 0] == pytest.approx(high, abs=0.03)
    assert recovery.ratio.values[0, 0] == pytest.approx(effects[0].mean() / (donor - recipient).mean())
    there = slice(3, None)
    assert recovery.ratio.values[0, 1] == pytest.approx(means[1] / (donor - recipient)[there].mean())
    interval = scipy.stats.bootstrap(
        (effects[0], donor - recipient), lambda a, b, axis=-1: a.mean(axis) / b.mean(axis), paired=True,
        n_resamples=9999, method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose([recovery.low.values[0, 0], recovery.high.values[0, 0]], interval, atol=0.005)
    frame = found.to_frame()
    assert frame.examples.tolist() == [12, 9]
    assert frame.p_adjusted[0] < 0.001 < frame.p_adjusted[1]
    np.testing.assert_allclose(frame.effect, means)
    np.testing.assert_allclose(frame.attribution, 2 * means)
    [row] = found.gap().to_dict("records")
    assert (row["recipient"], row["donor"]) == pytest.approx((recipient.mean(), donor.mean()))
    assert row["difference"] == pytest.approx((donor - recipient).mean())
    assert row["low"] < row["difference"] < row["high"]
    assert found.agreement().worst[0] == pytest.approx(np.abs(means).max())
    assert f"layer 0: {means[0]:+.3g}" in found.summary()
    assert f"recovery {recovery.ratio.values[0, 0]:.2f}" in found.summary()
    assert found.headline()["denoising"]["top"][0]["layer"] == 0


def test_the_largest_effect_either_way():
    effects = np.repeat([[0.5], [-3.0], [np.nan], [1.0]], 4, 1)
    found = made(effects, np.zeros(4), np.ones(4))
    assert found.top(4).layer.tolist() == [1, 3, 0, 2]
    assert found.top(2, direction="denoising").layer.tolist() == [1, 3]
    assert found.top(direction="noising").empty
    assert found.recovery().ratio.values[0, 1] == -3


def test_recovery_of_no_difference():
    """Where donor and recipient do not differ clearly, a share of their difference is not a number."""
    found = made(np.ones((2, 6)), np.zeros(6), np.array([1.0, -1, 2, -2, 1, -0.5]))
    assert np.isnan(found.recovery().to_array()).all()
    assert "recovery is undefined" in found.summary()
    assert "recovery 1" not in found.summary()
    assert found.headline()["denoising"]["top"][0]["recovery"] is None
    one = made(np.ones((2, 1)), np.zeros(1), np.ones(1))
    assert one.recovery().ratio.values.tolist() == [[1, 1]]
    assert np.isnan(one.effect().low).all()


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"site": "nothing"}, "site 'nothing' is unknown; expected one of resid_pre"),
        ({"metric": "nothing"}, "metric 'nothing' is unknown; expected one of logit_diff"),
        ({"method": "nothing"}, "method 'nothing' is unknown; expected one of exact"),
        ({"direction": "nothing"}, "direction is one of denoising, noising, both; found 'nothing'"),
        ({"align": "nothing"}, "align is one of error, left, right; found 'nothing'"),
        ({"site": "z", "heads": [4]}, "heads 0 to 3; found head 4"),
        ({"site": "z", "heads": [-1]}, "heads 0 to 3; found head -1"),
        ({"layers": [2]}, "the model has layers 0 to 1"),
        ({"layers": [-1]}, "the model has layers 0 to 1"),
        ({"positions": [6]}, "position 6 does not exist: the prompts have positions 0 to 5"),
        ({"positions": [-7]}, "position -7 does not exist"),
        ({"layers": []}, "expected one or more layers.*found an empty list"),
        ({"site": "z", "heads": []}, "expected one or more heads.*found an empty list"),
        ({"positions": []}, "expected one or more positions.*found an empty list"),
        ({"heads": [0]}, "the site 'resid_pre' has no heads; expected one of z"),
        ({"by": ["head"]}, "the site 'resid_pre' has no heads"),
        ({"by": ["layer", "layer"]}, "by takes some of layer, head, position, each once"),
        ({"by": ["depth"]}, "by takes some of layer, head, position, each once; found depth"),
        ({"site": "pattern", "positions": [1]}, "a pattern is patched as a whole"),
        ({"window": 0}, "a window has at least one layer; found 0"),
        ({"batch_size": 0}, "steps and batch size are at least 1"),
        ({"sets": {}}, "found an empty one"),
        ({"sets": {"a": []}}, "found an empty one"),
        ({"sets": {"a": ["z[1]"]}}, "'z' is no site"),
        ({"sets": {"a": ["blocks.0.attn.hook_z[x]"]}}, "'blocks.0.attn.hook_z\\[x\\]' is no place; expected a site"),
        ({"sets": {"a": ["blocks.0.hook_mlp_out[1]"]}}, "has no heads; found head 1"),
        ({"sets": {"a": ["blocks.7.hook_mlp_out"]}}, "the model has layers 0 to 1"),
        ({"sets": {"a": ["blocks.0.hook_mlp_out@9"]}}, "position 9 does not exist"),
    ],
)  # fmt: skip
def test_bad_input(library, options, words):
    with pytest.raises(InputError, match=words):
        run(HookedModel(library.model("gpt2"), letters()), items(), **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corrupt": None}, "1 of 6 prompts have no `corrupt` text: prompt 6"),
        ({"answer": None}, "1 of 6 prompts have no `answer`: prompt 6"),
        ({"wrong": None}, r"needs a wrong answer, and 1 of 6 prompts have none \(first: 6\)"),
        ({"answer": "ab"}, "prompt 6: the answer 'ab' is 2 tokens.*--whole-answer"),
        ({"answer": "!"}, "prompt 6: the tokenizer has no token for '!'"),
        ({"prompt": "zabc=!"}, "prompt 6: the tokenizer has no token for '!'"),
        ({"corrupt": "zabcde="}, "prompt 6 has 6 tokens, its `corrupt` text 7"),
    ],
)
def test_bad_prompts(library, change, words):
    prompts = items()
    prompts[-1] = {k: v for k, v in (prompts[-1] | change).items() if v is not None}
    with pytest.raises(InputError, match=words):
        run(HookedModel(library.model("gpt2"), letters()), prompts)


def test_models_without(library, tmp_path):
    """A tokenizer, a site, a config."""
    with pytest.raises(InputError, match="has no tokenizer beside its weights"):
        run(HookedModel(library.model("gpt2")), items())
    with pytest.raises(InputError, match=r"no site blocks.0.hook_resid_mid: attention and MLP run side by side"):
        run(HookedModel(library.model("neox"), letters()), items(), site="resid_mid")
    with pytest.raises(InputError, match="does not hand out its attention pattern"):
        run(HookedModel(library.model("bloom"), letters()), items(), site="pattern")


def test_agreement_is_over_cells_that_change_anything(model):
    """Positions before the letter that differs cannot change: that both methods say 0 there is no agreement."""
    found = run(model, items(), method="both")
    frame = found.to_frame()
    moving = frame[frame[["effect", "attribution"]].abs().max(axis=1) > 1e-5 * frame["effect"].abs().max()]
    (row,) = found.agreement().to_dict("records")
    assert row["cells"] == len(moving) < len(frame)
    assert row["rank_correlation"] == pytest.approx(moving["effect"].corr(moving["attribution"], method="spearman"))
    slope = (moving["effect"] * moving["attribution"]).sum() / (moving["effect"] ** 2).sum()
    assert row["slope"] == pytest.approx(slope)
    assert f"{len(moving)} cells that change anything" in found.summary()


def test_cells_of_one_of_several_examples_come_last(model):
    prompts = [*items("abcde fghij"), {"prompt": "abcdefgh=", "corrupt": "xbcdefgh=", "answer": "a", "wrong": "b"}]
    found = run(model, prompts, align="left")
    frame = found.top(999)
    alone = frame["examples"].to_numpy() < 2
    assert alone.any()
    assert not alone[: int((~alone).sum())].any()
    assert frame.loc[frame["examples"] == 1, "recovery"].isna().all()


def test_windows_are_said(model):
    assert "in windows of 2 layers" in run(model, items(), window=2).summary()
    assert "windows" not in run(model, items()).summary()
