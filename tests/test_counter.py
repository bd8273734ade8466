"""The compiled counter: right on every input, the plan of its weights what the docstring says, a model as any other."""

import itertools
import json

import numpy as np
import pytest
import torch

import finetune_lens as fl
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.prompts import encode as read
from finetune_lens.prompts import read_prompts
from finetune_lens.tasks import counter
from finetune_lens.tasks.counter import LETTERS, SCALE, compiled, draw, encode, margins, measure, prompts, tokenizer
from finetune_lens.training import train

HELD = -1  # the last dimension of the residual stream


@pytest.fixture(scope="module", autouse=True)
def quiet(library):
    """Messages of transformers are off."""


def drawn(letter="a", n=200, seed=0, **options):
    return draw([letter], n, np.random.default_rng(seed), **options)


def of_strings(texts, letter, most=counter.MOST):
    """(text, beginning) the counts, letter by letter."""
    return np.array([[min(text[: end + 1].count(letter), most) for end in range(len(text))] for text in texts])


def test_right_on_every_text_of_six_letters_and_all_its_beginnings():
    """9⁶ texts; right means that the digit is the likeliest of all tokens, and by the whole margin."""
    model, tokens = compiled("a"), counter.vocabulary()
    texts = np.array([*itertools.product(range(9), repeat=6)])
    assert len({*map(bytes, texts.astype(np.uint8))}) == 9**6
    expected = tokens.index("0") + (texts == 0).cumsum(1)
    ids = torch.from_numpy(np.column_stack([np.full(len(texts), tokens.index("<bos>")), tokens.index("a") + texts]))
    smallest = np.inf
    with torch.inference_mode():
        for some, right in zip(ids.split(1000), torch.from_numpy(expected).split(1000), strict=True):
            logits = model(input_ids=some).logits
            assert bool((logits[:, 0].argmax(-1) == tokens.index("0")).all())
            best = logits[:, 1:].topk(2, -1)
            assert torch.equal(best.indices[..., 0], right)
            smallest = min(smallest, float((best.values[..., 0] - best.values[..., 1]).min()))
    assert smallest == pytest.approx(SCALE, abs=1e-5)


@pytest.mark.parametrize("letter", ["b", "i"])
@pytest.mark.parametrize("length", [1, 6, 9])
def test_other_letters_and_lengths(letter, length):
    items = drawn(letter, length=length)
    assert (margins(compiled(letter), items) > SCALE / 2).all()
    wrong = drawn("a" if letter != "a" else "b", length=length)
    assert not (margins(compiled(letter), wrong) > 0).all()


@pytest.mark.parametrize("most", [1, 3, 12])
def test_counts_beyond_the_largest_number_are_told_as_it(most):
    items = drawn(length=12)
    found = margins(compiled("a", most=most), items, most=most)
    assert (found > SCALE / 2).all()
    assert {counter.answer("a", text, most=most) for _, text in items} == {str(n) for n in range(most + 1)}


def test_the_longest_text():
    texts = ["a" * 6 + "b" * 25, "b" * 25 + "a" * 6, "b" * 31]
    assert (margins(compiled("a"), [("a", text) for text in texts]) > SCALE / 2).all()


def test_noise_has_room():
    """N(0, .001), as in the paper: ten models, every answer right by more than half of the margin."""
    items = drawn(n=500)
    found = [margins(compiled("a", noise=0.001, seed=seed), items).min() for seed in range(10)]
    assert min(found) > SCALE / 2
    assert min(found) < 0.999 * SCALE
    assert margins(compiled("a", noise=0.1), items).min() < 0


def test_the_noise_is_in_every_parameter_and_its_seed_decides():
    plain, one, same, other = (
        dict(compiled("a", **options).named_parameters())
        for options in ({}, {"noise": 0.001}, {"noise": 0.001}, {"noise": 0.001, "seed": 1})
    )
    drawn_noise = torch.cat([(one[name] - plain[name]).flatten() for name in plain]).detach()
    assert all(bool((one[name] != plain[name]).float().mean() > 0.9) for name in plain)
    assert float(drawn_noise.std()) == pytest.approx(0.001, rel=0.02)
    assert abs(float(drawn_noise.mean())) < 5e-5
    assert all(torch.equal(one[name], same[name]) for name in plain)
    assert not any(torch.equal(one[name], other[name]) for name in plain)
    state = torch.get_rng_state()
    compiled("a", noise=0.001)
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_built_as_published():
    model = compiled("a")
    assert (model.config.n_layer, model.config.n_head) == (3, 1)
    assert not any("LayerNorm" in type(module).__name__ for module in model.modules())
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not any(bool(p.any()) for block in model.transformer.h[1:] for p in block.parameters()), "spare blocks"
    assert all(p.requires_grad for p in model.parameters())


# The plan


def run(text, letter="a", edits=(), model=None):
    names = [f"blocks.{b}.hook_{site}" for b in range(3) for site in ("resid_pre", "resid_mid", "resid_post")]
    names += [f"blocks.{b}.attn.hook_{site}" for b in range(3) for site in ("pattern", "z", "q", "k", "v", "result")]
    hooked = HookedModel(model or compiled(letter), tokenizer())
    ids = torch.tensor([tokenizer()(text)["input_ids"]])
    return hooked.run(ids, capture=names, edits=edits)


def test_attention_is_alike_on_bos_and_matches():
    text = "caabac"
    pattern = run(text).cache["blocks.0.attn.hook_pattern"][0, 0]
    for query in range(len(text) + 1):
        seen = [1.0, *(float(c == "a") for c in text[:query])]
        expected = np.array(seen + [0.0] * (len(text) - query)) / sum(seen)
        np.testing.assert_allclose(pattern[query], expected, atol=3e-4)


def test_held_is_one_over_the_count_and_one():
    text = "caabac"
    cache = run(text).cache
    counts = np.array([text[:end].count("a") for end in range(len(text) + 1)])
    assert not cache["blocks.0.hook_resid_pre"][0, :, HELD].any()
    for site in ("blocks.0.hook_resid_mid", "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"):
        np.testing.assert_allclose(cache[site][0, :, HELD], 1 / (counts + 1), atol=3e-4)
    np.testing.assert_allclose(cache["blocks.0.attn.hook_result"][0, :, 0, HELD], 1 / (counts + 1), atol=3e-4)


def decoded(site, letter="a"):
    """Share of held-out texts whose count a least-squares readout of the last position gets right."""
    items = drawn(letter, 700)
    ids = encode(items)["input_ids"][:, :-1]
    x = HookedModel(compiled(letter)).run(ids, capture=[site]).cache[site][:, -1].double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    counts = torch.from_numpy(of_strings([text for _, text in items], letter)[:, -1])
    weights = torch.linalg.lstsq(x[:500], torch.eye(7)[counts[:500]].double(), driver="gelsd").solution
    return float(((x[500:] @ weights).argmax(-1) == counts[500:]).double().mean())


def test_a_linear_readout_sees_the_count_where_it_is_written_and_not_before():
    found = {site: decoded(f"blocks.{site}") for site in ("0.hook_resid_pre", "0.hook_resid_post", "2.hook_resid_post")}
    assert found["0.hook_resid_post"] == found["2.hook_resid_post"] == 1
    assert found["0.hook_resid_pre"] < 0.45  # the last letter alone tells little


def test_without_its_head_it_counts_nothing():
    text = "caabac"
    whole = run(text).logits.argmax(-1)[0]
    for edit in (("blocks.0.attn.hook_z", lambda z: z * 0), ("blocks.0.hook_attn_out", lambda x: x * 0)):
        broken = run(text, edits=[edit]).logits.argmax(-1)[0]
        assert len({*broken.tolist()}) == 1, "the same number everywhere"
        assert len({*whole.tolist()}) == 4
    spare = run(text, edits=[("blocks.1.attn.hook_z", lambda z: z * 0), ("blocks.2.hook_mlp_out", lambda x: x * 0)])
    assert torch.equal(spare.logits, run(text).logits)


def test_two_counters_differ_in_two_entries_of_the_key_matrix():
    pair = fl.ModelPair.load(compiled("a", noise=0.001), compiled("b", noise=0.001), tokenizer=tokenizer())
    moved = {m.name: m.delta(torch.float32) for m in pair.matrices() if m.delta(torch.float32).any()}
    [(name, delta)] = moved.items()
    assert name == "h.0.attn.c_attn.k"
    [[zero, first], [other, second]] = delta.nonzero().tolist()
    assert (zero, other) == (0, 0), "of one key dimension"
    assert [counter.vocabulary()[i] for i in (first, second)] == ["a", "b"]
    assert (pair.base.layers, pair.base.heads) == (3, 1)
    ids = encode(drawn("b", 50))["input_ids"][:, :-1]
    assert not torch.equal(pair.base.run(ids).logits, pair.tuned.run(ids).logits)


def test_analyses_take_it_as_any_model():
    rows = prompts(12, np.random.default_rng(0))
    pair = fl.ModelPair.load(compiled("a"), compiled("b"), tokenizer=tokenizer())
    table = fl.compare_outputs(pair, rows, progress=False, check=False).table().set_index("measure")
    same = np.mean([row["a"] == row["b"] for row in rows])
    assert table.loc["answer: accuracy", "base"] == 1
    assert table.loc["answer: accuracy", "tuned"] == same
    effect = fl.patch(pair.base, rows, site="resid_pre", progress=False).data["logit_diff"].squeeze("direction")
    np.testing.assert_allclose(effect.sel(layer=1, position=counter.LENGTH), 2 * SCALE, atol=1e-3)
    assert not effect.sel(layer=[1, 2], position=range(counter.LENGTH)).any(), "all of it at the last position"
    checked = fl.compare_outputs(pair, rows, progress=False)  # of random tokens behind <bos>
    assert checked.table().set_index("measure").equals(table)
    with pytest.raises(fl.GateFailed, match="not one logit differs"):
        fl.compare_outputs(fl.ModelPair.load(compiled("a"), compiled("a"), tokenizer=tokenizer()), rows, progress=False)


def test_a_saved_one_is_weights_alone(tmp_path):
    """Nothing builds LayerNorms into it without being asked to."""
    import transformers

    for letter in "ab":
        compiled(letter).save_pretrained(tmp_path / letter)
    with pytest.raises(ValueError, match="compiled-counter"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    pair = fl.ModelPair.load(tmp_path / "a", tmp_path / "b")
    moved = fl.measure_updates(pair, progress=False).to_frame().query("delta_norm > 0")
    assert moved["matrix"].tolist() == ["h.0.attn.c_attn.k"]
    with pytest.raises(InputError, match="compiled-counter"):
        pair.models()


# Tuning


def test_it_is_tuned_to_count_another_letter():
    model = compiled("a", noise=0.001)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = drawn("b", 200, seed=1)
    found = train(
        model, lambda step, generator: encode(draw(["b"], 64, generator)), steps=120, learning_rate=0.1,
        schedule="constant", optimizer="sgd", momentum=0.9, evaluate=lambda: measure(model, held).value, every=120,
        progress=False,
    )  # fmt: skip
    assert found.losses[:3].mean() > 5
    assert found.losses[-3:].mean() < 1.5
    assert found.scores[120] > measure(compiled("a"), held).value + 0.1
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still, "the spare blocks take part"


def test_a_spare_block_without_noise_has_no_gradient():
    model = compiled("a")
    model(**encode(drawn("b"))).loss.backward()
    assert not any(bool(p.grad.any()) for p in model.transformer.h[1].mlp.c_fc.parameters())
    assert model.transformer.h[0].attn.c_attn.weight.grad.any()


# Items and prompts


def test_items_are_balanced():
    items = drawn("c", 700)
    assert np.bincount([text.count("c") for _, text in items], minlength=7).min() > 70
    assert all(set(text) <= set(LETTERS) and len(text) == 6 for _, text in items)
    np.testing.assert_allclose(np.mean([[c == "c" for c in text] for _, text in items], 0), 0.5, atol=0.07)
    others = [c for _, text in items for c in text if c != "c"]
    assert min(map(others.count, {*LETTERS} - {"c"})) > 0.8 * len(others) / 8
    assert drawn("c") == drawn("c") != drawn("c", seed=1)
    both = draw("ab", 200, np.random.default_rng(0))
    assert 60 < sum(letter == "a" for letter, _ in both) < 140


def test_the_batch_is_what_the_tokenizer_reads():
    items = draw("abc", 40, np.random.default_rng(0))
    batch, reads = encode(items, most=4), tokenizer(most=4)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    for (letter, text), ids, labels in zip(items, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert ids == reads(text + counter.answer(letter, text, most=4))["input_ids"]
        assert labels[:2] == [-100, -100]
        assert reads.decode(labels[2:]) == "".join(map(str, of_strings([text], letter, 4)[0]))
    assert reads.decode(reads("abchi")["input_ids"]) == "<bos>abchi"
    assert tokenizer(most=12).tokenize("ab12") == ["a", "b", "12"]


def test_margins_are_those_of_single_passes():
    items, model = draw("ab", 30, np.random.default_rng(0)), compiled("a", noise=0.01)
    together = margins(model, items)
    assert together.shape == (30, 6)
    np.testing.assert_allclose(margins(model, items, batch_size=7), together, atol=2e-3)  # slopes of 840
    for (letter, text), row in zip(items, together, strict=True):
        logits = model(torch.tensor([tokenizer()(text)["input_ids"]])).logits[0, 1:].detach().numpy()
        for place, count in enumerate(of_strings([text], letter)[0]):
            right = tokenizer().convert_tokens_to_ids(str(count))
            others = np.delete(logits[place], right)
            assert row[place] == pytest.approx(logits[place, right] - others.max(), abs=2e-3)
    right = sum(row[-1] > 0 for row in together)
    assert measure(model, items) == counter.Accuracy(right, 30)
    assert 0 < right < 30


def test_rows_of_a_prompt_file(tmp_path):
    rows = prompts(60, np.random.default_rng(0), letter="b")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = read_prompts(tmp_path / "p.jsonl")
    encoded = read(items, tokenizer())
    assert encoded.ids.shape == (60, 7)
    assert bool((encoded.wrongs >= 0).all())
    for row in rows:
        text, changed = row["prompt"], row["corrupt"]
        assert row["label"] == row["b"] == text.count("b")
        assert row["answer"] == str(text.count("b"))
        assert row["wrong"] == str(changed.count("b"))
        assert abs(text.count("b") - changed.count("b")) == 1
        assert sum(one != other for one, other in zip(text, changed, strict=True)) == 1
        assert [row[letter] for letter in LETTERS] == [text.count(letter) for letter in LETTERS]
    assert len({*(row["label"] for row in rows)}) == 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"letter": "z"}, "one of a, b, c.*'z'"),
        ({"letter": "ab"}, "one of a"),
        ({"letter": ""}, "one of a"),
        ({"most": 0}, "1 or more; found 0"),
        ({"noise": -1.0}, "0 or more; found -1"),
    ],
)
def test_refuses(options, said):
    with pytest.raises(InputError, match=said):
        compiled(**options)
