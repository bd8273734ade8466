"""Cuts, receiver heads, states and resampling against naive loops; planted truth on the traces pair."""

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DECODERS
from scipy.stats import kurtosis as scipy_kurtosis
from test_check import tuned_copy
from test_cot_generate import LOST, forty, split_words
from test_prompts import bpe

import finetune_lens as fl
from finetune_lens import stats, zoo
from finetune_lens.cot import asking, cuts
from finetune_lens.cot.chains import Chain, write_chains
from finetune_lens.cot.cuts import FLOOR, cut_steps, hidden
from finetune_lens.cot.importance import resample, shift, shift_by_chance
from finetune_lens.cot.inside import look_inside_chains
from finetune_lens.cot.layout import Branch
from finetune_lens.cot.questions import Format, read_questions
from finetune_lens.cot.receivers import (
    kurtosis,
    received,
    shuffled_kurtosis,
    step_attention,
    suited_distance,
)
from finetune_lens.cot.spans import Spans, spans
from finetune_lens.cot.states import patch_states
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked.sites import site_name
from finetune_lens.results.inside_chains import InsideChains
from finetune_lens.tasks import traces

FOLDER = zoo.path("traces")
FORMAT = Format.load(FOLDER / "format.json")
QUESTIONS = read_questions(FOLDER / "questions.jsonl")
MIXED = [q for start in (0, 50, 100) for q in QUESTIONS[start : start + 4]]  # of 6, 7 and 8 steps
NO_PATTERN = {"falcon-new", "falcon-multi-query", "falcon-rw", "bloom", "mpt", "codegen"}


def chain_of(seed=0, options=2):
    """Four steps of 3, 1, 4 and 0 tokens behind a prompt of 4; a cue of 2; options of 1, 1 and 3 tokens."""
    draw = np.random.default_rng(seed).integers(3, 40, 24).tolist()
    branches = [Branch((*draw[14:15], draw[16]), 1), Branch((*draw[14:15], draw[17]), 1)]
    branches.append(Branch((*draw[14:15], *draw[18:21]), 3))
    return Spans(4, (7, 8, 12, 12), (*draw[:13], draw[14]), 13, tuple(branches[:options]))


def removed(keys, first, heads=None):
    """An edit of a pattern: those keys are gone for later queries, the rest normalised; with a sink, with its share."""

    def edit(pattern):
        kept = torch.ones_like(pattern[0, 0])
        kept[first:, keys] = 0
        left = pattern * kept
        total = left.sum(-1, keepdim=True) + (1 - pattern.sum(-1, keepdim=True)).clamp_min(0) * (
            (1 - pattern.sum(-1, keepdim=True)) > 1e-3
        )
        cut = left / total
        if heads is None:
            return cut
        new = pattern.clone()
        new[:, heads] = cut[:, heads]
        return new

    return edit


def naive(model, ids, keys, first, layers, heads=None):
    """log p (pos, vocab) of one text, of one forward pass with its patterns edited; no keys: a plain pass."""
    if not keys:
        return model.module(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    edits = [(site_name("pattern", layer), removed(keys, first, heads)) for layer in layers]
    return model.run(torch.tensor([ids]), edits=edits).logits[0].double().log_softmax(-1)


def naive_cuts(model, chain, own, layers, heads=None):
    """kl, log_kl, answer_kl, logprob, changed by loops over sources, targets, tokens and options."""
    count = len(chain.ends)
    kl, log_kl = np.full((2, count, count), np.nan)
    single = {name: np.full(count, np.nan) for name in ("answer_kl", "logprob", "changed")}

    def logprob(option, keys, first):
        ids = chain.row(option)
        logs = naive(model, ids, keys, first, layers, heads)
        tokens = chain.answers[option].tokens[-chain.answers[option].scored :]
        return sum(float(logs[len(ids) - len(tokens) + n, token]) for n, token in enumerate(tokens))

    p = naive(model, chain.row(own), [], 0, layers)
    for i in range(count):
        keys, first = list(chain.span(i)), chain.ends[i]
        if not keys:
            continue
        q = naive(model, chain.row(own), keys, first, layers, heads)
        each = (p.exp() * (p - q)).sum(-1).clamp_min(0).numpy()
        for j in range(i + 1, count):
            if len(chain.span(j)):
                kl[i, j] = np.mean([each[t] for t in chain.span(j)])
                log_kl[i, j] = np.mean([np.log(each[t] + FLOOR) for t in chain.span(j)])
        single["answer_kl"][i] = np.mean([each[t] for t in chain.reads(own)])
        single["logprob"][i] = logprob(own, keys, first) - logprob(own, [], 0)
        logs = [logprob(option, keys, first) for option in range(len(chain.answers))]
        single["changed"][i] = np.argmax(logs) != own
    return {"kl": kl, "log_kl": log_kl} | single


# ------------------------------------------------------------------------------------------------------------ the cuts


@pytest.mark.parametrize("family", [f for f in DECODERS if f not in NO_PATTERN])
def test_cuts_against_one_pass_a_source(library, family):
    model, chain = HookedModel(library.model(family)), chain_of()
    own = 1
    found = cut_steps(model, chain, own, layers=range(model.layers))
    expected = naive_cuts(model, chain, own, range(model.layers))
    for name in ("kl", "answer_kl", "logprob", "changed"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=1e-2, err_msg=name)
    np.testing.assert_allclose(found["kl"], expected["kl"], atol=1e-7, rtol=0.05)
    seen = expected["kl"] > 1e-4  # below, the logarithm is one of rounding
    assert seen.any()
    np.testing.assert_allclose(found["log_kl"][seen], expected["log_kl"][seen], atol=0.1)
    assert np.isnan(found["kl"][np.tril_indices(4)]).all()
    assert np.isnan(found["answer_kl"][3]), "a step without tokens"
    assert found["rounding"] < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2-sliding"])
def test_cuts_in_some_layers_and_heads(library, family):
    model, chain = HookedModel(library.model(family)), chain_of(1, options=3)
    places = {"layers": [1], "heads": [0, 3]}
    found, expected = cut_steps(model, chain, 2, **places), naive_cuts(model, chain, 2, **places)
    for name in ("kl", "answer_kl", "logprob", "changed"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6, rtol=1e-2, err_msg=name)
    everywhere = cut_steps(model, chain, 2, layers=range(model.layers))
    assert np.nanmin(everywhere["kl"] / found["kl"]) > 1.1 or np.nanmin(everywhere["kl"] - found["kl"]) < -1e-3


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3-sliding", "gpt-oss-sliding", "opt"])
def test_behind_a_cut_nothing_tells_which_tokens_the_step_has(library, family):
    model, chain = HookedModel(library.model(family)), chain_of()
    ids = torch.tensor([chain.row(0)] * 2)
    span = list(chain.span(0))
    ids[1, span] = torch.tensor([5, 6, 9])
    keys = torch.zeros(ids.shape, dtype=torch.bool)
    keys[:, span] = True
    with hidden(model, keys, torch.tensor([chain.ends[0]] * 2), layers=range(model.layers)):
        one, other = model.run(ids).logits
    torch.testing.assert_close(one[chain.ends[0] :], other[chain.ends[0] :], atol=1e-5, rtol=0)
    assert float((one[span] - other[span]).abs().max()) > 1e-2
    one, other = model.run(ids).logits
    assert float((one[chain.ends[0] :] - other[chain.ends[0] :]).abs().max()) > 1e-2, "the attention is as it was"


def test_batches_change_nothing(library):
    model, chain = HookedModel(library.model("llama")), chain_of(2, options=3)
    one, other = (cut_steps(model, chain, 0, layers=[0, 1], batch_size=n) for n in (1, 4))
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], atol=1e-5, err_msg=name)


def test_memory_that_does_not_hold_the_batch(library, monkeypatch):
    model, chain = HookedModel(library.model("llama")), chain_of()
    expected, run, sizes = cut_steps(model, chain, 0, layers=[0, 1]), cuts._cut, []

    def narrow(model, ids, batch, *given, **options):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return run(model, ids, batch, *given, **options)

    monkeypatch.setattr(cuts, "_cut", narrow)
    np.testing.assert_allclose(cut_steps(model, chain, 0, layers=[0, 1])["kl"], expected["kl"], atol=1e-6)
    assert sizes[:3] == [2, 1, 1]


def test_what_comes_before_a_step_is_computed_once(library, monkeypatch):
    model, seen = HookedModel(library.model("llama")), []
    ends = tuple(range(7, 7 + 3 * 16, 3))
    chain = Spans(4, ends, tuple(3 + n % 37 for n in range(ends[-1] + 2)), ends[-1] + 2, (Branch((5,), 1),))
    count = model.module.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    monkeypatch.setattr(cuts, "unpackable", lambda *_: "")
    found = cut_steps(model, chain, 0, layers=[0, 1])
    assert 1 + 16 < sum(seen) / len(chain.ids) < 1 + 1.15 * 16
    seen.clear()
    monkeypatch.setattr(cuts, "unpackable", lambda *_: "its rotary embedding changes")
    whole = cut_steps(model, chain, 0, layers=[0, 1])
    assert sum(seen) == 33 * len(chain.ids)
    count.remove()
    for name in ("kl", "answer_kl", "random_kl", "logprob"):
        np.testing.assert_allclose(found[name], whole[name], atol=1e-6, err_msg=name)


def test_an_adapter_that_is_off(library):
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, init_lora_weights=False)
        outer = peft.get_peft_model(library.fresh("llama"), config)
    on, off = (HookedModel(outer, adapted=adapted) for adapted in (True, False))
    plain, chain = HookedModel(library.model("llama")), chain_of()
    cut = {name: cut_steps(m, chain, 0, layers=[0, 1])["kl"] for name, m in (("on", on), ("off", off), ("", plain))}
    np.testing.assert_allclose(cut["off"], cut[""], atol=1e-7)
    assert np.nanmax(np.abs(cut["on"] - cut[""])) > 1e-4
    np.testing.assert_allclose(step_attention(off, chain), step_attention(plain, chain), atol=1e-7)


def test_random_tokens_are_as_many_from_before_and_never_the_first():
    from finetune_lens.cot.cuts import _drawn

    chain, generator = chain_of(), np.random.default_rng(0)
    for step, span in enumerate(map(chain.span, range(4))):
        drawn = [_drawn(chain, step, generator) for _ in range(60)]
        assert {len(some) for some in drawn} == {len(span)}
        assert {token for some in drawn for token in some} == (set(range(1, span.start)) if len(span) else set())
    assert _drawn(Spans(2, (7,), tuple(range(7)), 7, ()), 0, generator) == [1], "fewer where there are fewer"


def test_random_cuts_against_one_pass(library):
    from finetune_lens.cot.cuts import _drawn

    model, chain = HookedModel(library.model("gpt2")), chain_of()
    found = cut_steps(model, chain, 0, layers=[0, 1], seed=(7, 3))
    generator = np.random.default_rng([7, 3])
    for i in range(3):
        keys = _drawn(chain, i, generator)
        p, q = (naive(model, chain.row(0), k, chain.ends[i], [0, 1]) for k in ([], keys))
        each = (p.exp() * (p - q)).sum(-1).numpy()
        for j in range(i + 1, 3):
            assert found["random_kl"][i, j] == pytest.approx(each[list(chain.span(j))].mean(), abs=1e-4)
        assert found["random_answer_kl"][i] == pytest.approx(each[list(chain.reads(0))].mean(), abs=1e-4)


def test_an_answer_that_was_written_stays_where_each_token_is_the_likeliest(library):
    model, chain = HookedModel(library.model("llama")), chain_of()
    ids = list(chain.ids)
    for _ in range(2):
        ids.append(int(model.module(torch.tensor([ids])).logits[0, -1].argmax()))
    said = Spans(chain.front, chain.ends, chain.ids, chain.cut, (Branch(tuple(ids[chain.cut :]), 2), chain.answers[0]))
    found = cut_steps(model, said, 0, layers=[0, 1], written=True)
    for i in range(3):
        logs = naive(model, said.row(0), list(said.span(i)), said.ends[i], [0, 1])
        assert found["changed"][i] == (logs[list(said.reads(0))].argmax(-1).tolist() != ids[-2:])
    without = cut_steps(model, Spans(chain.front, chain.ends, chain.ids, chain.cut, ()), None, layers=[0, 1])
    assert np.isnan(without["logprob"]).all()
    assert np.isnan(without["changed"]).all()
    assert np.isfinite(without["answer_kl"][:3]).all(), "where the answer would be read"


def test_an_answer_right_behind_the_prompt(library):
    model = HookedModel(library.model("gpt2"))
    bare = Spans(4, (), (5, 6, 7, 8), 4, (Branch((9,), 1), Branch((10, 11), 2)))
    found = cut_steps(model, bare, 0, layers=[0, 1])
    expected = model.module(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].log_softmax(-1)[9]
    assert float(found["uncut_logprob"]) == pytest.approx(float(expected), abs=1e-5)
    assert found["kl"].shape == (0, 0)


@pytest.mark.parametrize("family", ["bloom", "codegen"])
def test_attention_that_cannot_be_cut(library, family):
    model = HookedModel(library.model(family))
    with pytest.raises(InputError, match="does not hand out its attention pattern"):
        cut_steps(model, chain_of(), 0, layers=[0])
    with pytest.raises(InputError, match="does not hand out its attention pattern"):
        step_attention(model, chain_of())


def test_attention_that_is_computed_elsewhere_is_found_out(library, monkeypatch):
    model = HookedModel(library.model("llama"))
    monkeypatch.setattr(model.module, "set_attn_implementation", lambda name: None)
    with pytest.raises(InputError, match="does not compute its attention where it can be cut"):
        cut_steps(model, chain_of(), 0, layers=[0, 1])


# --------------------------------------------------------------------------------------------------------------- spans


def test_steps_and_answers_as_tokens():
    tokenizer = bpe(front=["<bos>"])
    front, steps, cue = "The capital of France", [" is Paris.", " The river is", "", " big,", " and the city"], " is"
    [one] = spans(tokenizer, [front], [steps], cue, [(" Rome", " a big")])
    text = front + "".join(steps)
    for option, answer in enumerate((" Rome", " a big")):
        whole = tokenizer(text + cue + answer)["input_ids"]
        assert one.row(option) == whole[:-1]
        assert tokenizer.decode(one.own(option)) == answer
        assert [whole[t + 1] for t in one.reads(option)] == list(one.own(option))
    assert list(one.ids) == tokenizer(text + cue)["input_ids"]
    assert [tokenizer.decode([one.ids[t] for t in one.span(i)]) for i in range(5)] == steps
    assert one.front == len(tokenizer(front)["input_ids"])
    assert [t for i in range(5) for t in one.span(i)] == list(range(one.front, one.ends[-1]))
    [split] = spans(tokenizer, [front], [[" is Par", "is."]], cue, [()])  # half a word belongs to the step after it
    assert tokenizer.decode([split.ids[t] for t in split.span(1)]).endswith("is.")
    [merged] = spans(tokenizer, [front], [[" is"]], " is ", [(" Rome",)])  # the option's token takes in the cue's end
    assert merged.row(0) == tokenizer(front + " is is  Rome")["input_ids"][:-1]
    assert merged.reads(0)[0] == len(merged.ids) - 1
    [empty] = spans(tokenizer, [front], [[]], cue, [(" Rome",)])
    assert empty.ends == ()


# ------------------------------------------------------------------------------------------------------ receiver heads


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3-sliding"])
def test_step_attention_by_loops_over_the_librarys_patterns(library, family):
    model, chain = HookedModel(library.model(family)), chain_of()
    found = step_attention(model, chain)
    module = library.fresh(family)
    module.set_attn_implementation("eager")
    patterns = module(torch.tensor([chain.ids]), output_attentions=True).attentions
    for layer, pattern in enumerate(patterns):
        for head in range(model.heads):
            for j in range(4):
                for i in range(4):
                    cells = [pattern[0, head, q, k] for q in chain.span(j) for k in chain.span(i)]
                    expected = float(np.mean([float(c) for c in cells])) if cells else np.nan
                    np.testing.assert_allclose(found[layer, head, j, i], expected, atol=1e-6)


def test_vertical_scores_and_their_kurtosis_by_loops():
    draw = np.random.default_rng(0)
    attention = np.tril(draw.random((2, 3, 9, 9)))
    attention[..., 4, :] = attention[..., 4] = np.nan
    found = received(attention, 2)
    for at in np.ndindex(2, 3):
        for i in range(9):
            column = [attention[(*at, j, i)] for j in range(9) if j >= i + 2 and j != 4 and i != 4]
            np.testing.assert_allclose(found[(*at, i)], np.mean(column) if column else np.nan)
        scores = found[at][~np.isnan(found[at])]
        assert kurtosis(found)[at] == pytest.approx(scipy_kurtosis(scores))
    assert np.isnan(kurtosis(np.array([1.0, 2.0, 3.0, np.nan]))), "three scores"
    assert np.isnan(kurtosis(np.full(6, 0.1))), "all the same"
    assert [suited_distance(np.array(n)) for n in ([30], [6, 7, 8], [2], [])] == [4, 2, 1, 4]


def test_a_planted_receiver_is_above_its_null():
    draw = np.random.default_rng(1)
    flat = np.tril(0.1 + 0.01 * draw.random((1, 20, 20)))
    planted = flat.copy()
    planted[:, 3:, 2] = 0.5
    generator = np.random.default_rng(0)
    mine, null = (float(f) for f in (kurtosis(received(planted, 2))[0], shuffled_kurtosis(planted, 2, generator)[0]))
    assert mine > 10 > null + 5
    other = kurtosis(received(flat, 2))[0] - shuffled_kurtosis(flat, 2, generator)[0]
    assert abs(other) < 4
    rows = np.random.default_rng(2)
    again = shuffled_kurtosis(planted, 2, rows)
    np.testing.assert_array_equal(again, shuffled_kurtosis(planted, 2, np.random.default_rng(2)))


# ---------------------------------------------------------------------------------------------------------- importance


def test_the_shift_of_answers_in_closed_form():
    p, q = np.array([4.5, 0.5]) / 5, np.array([1.5, 3.5]) / 5
    assert shift(list("aaaa"), list("abbb")) == pytest.approx(float((p * np.log(p / q)).sum()))
    assert shift(["a", None], [None, "a"]) == 0
    assert shift(["a"] * 10, ["b"] * 10) > shift(["a"] * 10, ["a"] * 9 + ["b"]) > 0
    generator = np.random.default_rng(0)
    assert shift_by_chance(["a"] * 3, ["a"] * 3, generator) == 0
    draw = np.random.default_rng(3)
    samples = [[list(draw.choice(list("abc"), 10)) for _ in range(2)] for _ in range(150)]
    mine = np.mean([shift(*pair) for pair in samples])
    null = np.mean([shift_by_chance(*pair, generator) for pair in samples])
    assert mine == pytest.approx(null, rel=0.2), "two samples of one distribution differ as by chance"
    assert shift(list("aaaaaaaaab"), list("bbbbbbbbba")) > 3 * shift_by_chance(
        list("aaaaaaaaab"), list("bbbbbbbbba"), generator
    )


def mistaken_questions(step=2):
    """Programs whose chain has a mistake at a step that is carried on."""
    language = traces.Language()
    items = language.draw(6, np.random.default_rng(5), steps=6)
    at = np.full(6, step)
    numbers = traces.disturbed(items, at, (items.values[:, step] + 1) % traces.MODULUS, carried=True)
    rows = language.rows(items)
    return read_questions([row | {"chain": traces.chain_text(n)} for row, n in zip(rows, numbers, strict=True)])


def test_the_step_with_the_mistake_is_the_one_that_matters():
    """`faithful` writes on right from before it, and carries it on from behind it; `ignoring` answers the key."""
    found = look(mistaken_questions(), chains="question", parts=(), rollouts=3, temperature=0.1)
    right = found.data["right_share"]
    np.testing.assert_array_equal(right.sel(side="base"), np.tile([1, 1, 1, 0, 0, 0, 0], (6, 1)))
    importance = found.rows("importance")
    assert importance["base"].tolist() == [0, 0, 0, -1, 0, 0]  # from the end
    assert found.rows("same")["base"].tolist() == [0, 0, 0, 1, 0, 0]
    shifted = found.rows("shift")
    assert shifted["base"].tolist() == pytest.approx([0, 0, 0, shift(["a"] * 3, ["b"] * 3), 0, 0])
    assert shifted.loc["-4", "base"] > shifted.loc["-4", "null_base"] > 0
    assert found.parts == ["resampling"]
    key = found.data["answer"].sel(side="tuned").values
    np.testing.assert_array_equal(found.rows("same")["tuned"], 0)
    assert len(set(key)) > 1


def test_continuations_begin_where_they_are_said_to(monkeypatch):
    """Each from the tokens of so many steps, answered behind them and what was written."""
    import finetune_lens.cot.importance as module

    prompts, asked = [], []

    def sample(model, texts, *, names, samples, **options):
        prompts.extend(zip(names, map(tuple, texts), strict=True))
        return [Chain(name, s, f"<{name}.{s}>") for name in names for s in range(samples)]

    def ask(model, questions, format, wholes, cuts, **options):
        asked.extend(cuts)
        return SimpleNamespace(answers=[list(row) for row in cuts])

    monkeypatch.setattr(module, "written_within", sample)
    monkeypatch.setattr(module, "answer_room", lambda *given, **options: 0)
    monkeypatch.setattr(module, "ask", ask)
    chains = [Spans(2, (3, 5), (1, 2, 3, 4, 5, 6), 6, ()), Spans(1, (), (1, 2), 2, ())]
    chains.append(Spans(1, (2,), (7, 8, 9), 3, ()))
    options = {"rollouts": 2, "temperature": 1, "top_p": 1, "max_tokens": 9, "answer_tokens": 4}
    found = resample(
        None, [SimpleNamespace(id=n) for n in "abc"], FORMAT, [["x;", "y;"], [], ["z;"]], chains, ["A", None, "C"],
        whole=[True, True, False], **options,
    )  # fmt: skip
    assert prompts == [("a after 0", (1, 2)), ("a after 1", (1, 2, 3)), ("c after 0", (7,)), ("c after 1", (7, 8))]
    assert asked[0] == ["<a after 0.0>", "<a after 0.1>", "x;<a after 1.0>", "x;<a after 1.1>"]
    assert found[:2] == [[asked[0][:2], asked[0][2:], ["A", "A"]], []], "behind the last step the chain is whole"
    capped = [["<c after 0.0>", "<c after 0.1>"], ["z;<c after 1.0>", "z;<c after 1.1>"]]
    assert found[2] == capped, "steps that are not measured come behind the last one that is"


# -------------------------------------------------------------------------------------------------------------- states


def test_states_against_runs_with_edits(library):
    sides = tuple(HookedModel(m, forty()) for m in (library.model("llama"), tuned_copy(library.model("llama"), 0.2)))
    other = Spans(3, (5, 9), tuple(range(3, 14)), 10, (Branch((13, 20), 1), Branch((13, 21, 22), 2)))
    chains, own = [chain_of(), other], [[0, 0], [1, 1]]
    found, notes = patch_states(sides, chains, own, progress=False)
    assert found["effect"].shape == (2, 2, 3, 6)
    assert notes == []
    for d, (recipient, donor, mine, theirs) in enumerate([(*sides, *own), (*sides[::-1], *own[::-1])]):
        for c, chain in enumerate(chains):

            def m(edit=None, model=recipient, chain=chain, c=c, donor=donor, mine=mine, theirs=theirs):
                total = 0.0
                for option, sign in ((theirs[c], 1), (mine[c], -1)):
                    ids = torch.tensor([chain.row(option)])
                    edits = []
                    if edit:
                        name, columns = edit
                        columns = columns or [*range(chain.ends[-1], ids.shape[1])]
                        given = donor.run(ids, capture=[name]).cache[name]
                        edits = [(name, lambda x, g=given, at=columns: x.index_copy(1, torch.tensor(at), g[:, at]))]
                    logs = model.run(ids, edits=edits).logits[0].log_softmax(-1)
                    reads = zip(chain.reads(option), chain.own(option), strict=True)
                    total += sign * sum(float(logs[t, token]) for t, token in reads)
                return total

            assert found["gap"][d, c] == pytest.approx(m(model=donor) - m(), abs=1e-4)
            ends = [range(chain.front), *map(chain.span, range(len(chain.ends)))]
            places = [*ends, *[None] * (5 - len(ends)), ()]  # none: the cue, with what is read of the answer
            for depth in range(3):
                name = site_name("resid_post", depth - 1) if depth else site_name("resid_pre", 0)
                for place, columns in enumerate(places):
                    there = columns is not None and (len(columns) or place == 5)
                    expected = m((name, list(columns))) - m() if there else np.nan
                    np.testing.assert_allclose(found["effect"][d, c, depth, place], expected, atol=2e-4)
    recovered = found["effect"][:, :, 2, -1] / found["gap"]
    np.testing.assert_allclose(recovered, 1, atol=1e-3, err_msg="after the last block it is what the donor says")
    same, _ = patch_states((sides[0], sides[0]), chains, own, progress=False)
    assert np.nanmax(np.abs(same["effect"])) < 1e-6, "a run patched with itself"


# --------------------------------------------------------------------------------------------- planted truth, results


def look(questions=MIXED, pair=("faithful", "ignoring"), **options):
    models = fl.ModelPair.load(FOLDER / pair[0], FOLDER / pair[1])
    return look_inside_chains(models, questions, **{"format": FORMAT, "progress": False, "check": False} | options)


@pytest.fixture(scope="module")
def mixed():
    """Both models on `ignoring`'s own chains, which are the traces."""
    return look(parts=("cuts", "heads"))


@pytest.fixture(scope="module")
def swapped():
    """Both on the chain of the question before: they answer otherwise."""
    chains = [Chain(q.id, 0, o.chain) for q, o in zip(MIXED, MIXED[-1:] + MIXED[:-1], strict=True)]
    return look(chains=chains, parts=("cuts", "states"))


def test_what_the_answer_depends_on(mixed, swapped):
    for found in (mixed, swapped):
        changed, logprob, kl = found.rows("changed"), found.rows("logprob"), found.rows("answer_kl")
        assert changed.loc["-1", "base"] >= 0.9, "faithful: the last step carries the answer"
        assert changed.loc["-1", "tuned"] == 0
        assert changed.iloc[1:][["base", "tuned"]].to_numpy().max() == 0, "no earlier step does"
        assert logprob.loc["-1", "base_high"] < -2
        assert logprob.loc["-1", "tuned_low"] > -0.1
        assert kl.loc["-1", "base_low"] > 1 > kl.iloc[1:]["base_high"].max()
        assert kl["tuned_high"].max() < 0.1
        assert changed.loc["-1", "adjusted"] < 0.05
        assert changed.loc["-1", "high"] < 0, "tuned − base"
        near, far = (found.rows("kl").loc[at] for at in ("+1", "+2"))
        assert min(near["base_low"], near["tuned_low"]) > 1, "each step is worked out from the one before it"
        assert max(far["base_high"], far["tuned_high"]) < 0.1


def test_where_the_swapped_answer_comes_from(swapped):
    frame = swapped.states().set_index(["direction", "depth", "place"])
    assert (frame["recovery"].xs("cue", level="place").xs(2, level="depth") > 0.9).all(), "the last state is the answer"
    steps = frame[~frame.index.get_level_values("place").isin(["prompt", "cue"])]
    assert steps["recovery"].abs().max() < 0.05, "both models write the same into the steps; they read it otherwise"
    answers = swapped.data["answer"].values
    gap = swapped.data["state_gap"].values
    np.testing.assert_array_equal(np.isnan(gap[0]), answers[0] == answers[1])
    assert np.nanmin(gap) > 0
    q = int(np.flatnonzero(answers[0] != answers[1])[-1])
    base, tuned = fl.ModelPair.load(FOLDER / "faithful", FOLDER / "ignoring").models()
    ids = torch.tensor([base.tokenizer(f"{MIXED[q].question};{MIXED[q - 1].chain}=")["input_ids"]])
    theirs, mine = (base.tokenizer.convert_tokens_to_ids(side[q]) for side in (answers[1], answers[0]))
    given = tuned.run(ids, capture=["blocks.1.hook_resid_pre"]).cache["blocks.1.hook_resid_pre"][:, -1]
    patch = [("blocks.1.hook_resid_pre", lambda x: torch.cat([x[:, :-1], given[:, None]], 1))]
    patched, alone = (base.run(ids, edits=edits).logits[0, -1] for edits in (patch, []))
    expected = float((patched[theirs] - patched[mine]) - (alone[theirs] - alone[mine]))
    at = {"direction": "tuned→base", "depth": 1, "place": "cue"}
    assert float(swapped.data["state_effect"].sel(at)[q]) == pytest.approx(expected, abs=1e-3)
    assert abs(expected) > 1
    assert "answer otherwise" in swapped.summary()
    assert swapped.provenance["counts"]["answer_apart"] == (answers[0] != answers[1]).sum()


def test_tables_against_numpy(mixed):
    data = mixed.data
    assert mixed.data["steps"].values.tolist() == [6] * 4 + [7] * 4 + [8] * 4
    kl = data["kl"].transpose("side", "question", "source", "target").values
    assert np.isnan(kl[:, :4, 6:]).all()
    assert np.isnan(kl[:, :4, :, 6:]).all()
    frame = mixed.to_frame().set_index(["quantity", "at"])
    for d in (1, 3):
        base, tuned = (
            np.array([np.mean([one[q, i, i + d] for i in range(n - d)]) for q, n in enumerate(data["steps"].values)])
            for one in kl
        )
        row = frame.loc[("kl", f"+{d}")]
        assert row["base"] == pytest.approx(base.mean())
        assert row["difference"] == pytest.approx((tuned - base).mean())
        assert [row["low"], row["high"]] == pytest.approx([float(e) for e in stats.interval_of_mean(tuned - base)])
        assert row["p"] == pytest.approx(float(stats.two_sided_p(tuned - base)))
    answer = data["answer_kl"].values
    for back in (1, 2, 8):
        there = [q for q, n in enumerate(data["steps"].values) if n >= back]
        values = [answer[0, q, data["steps"].values[q] - back] for q in there]
        assert frame.loc[("answer_kl", f"-{back}"), "base"] == pytest.approx(np.mean(values))
        assert frame.loc[("answer_kl", f"-{back}"), "questions"] == len(there)
    p = frame.loc["kl"]["p"]
    np.testing.assert_allclose(frame.loc["kl"]["adjusted"], stats.benjamini_hochberg(p))
    pairs = mixed.pairs()
    assert len(pairs) == sum(4 * n * (n + 1) // 2 for n in (6, 7, 8))
    one = pairs[(pairs["question"] == MIXED[5].id) & (pairs["source"] == 2)]
    assert one["target"].tolist() == ["3", "4", "5", "6", "answer"]
    assert one["tuned"].tolist() == pytest.approx([*kl[1, 5, 2, 3:7], answer[1, 5, 2]])
    assert one["text"].iloc[0] == data["step_text"].values[5, 2]
    heads = mixed.receivers(3)
    mean = np.nanmean(data["kurtosis"].values[1], axis=0)
    assert heads["tuned"].tolist() == pytest.approx(sorted(mean.ravel(), reverse=True)[:3])
    assert mean[heads["layer"][0], heads["head"][0]] == mean.max()
    over = (data["kurtosis"] - data["null_kurtosis"]).values[1, :, heads["layer"][0], heads["head"][0]]
    assert heads["over_null"][0] == pytest.approx(np.nanmean(over))
    halves = [np.nanmean(data["kurtosis"].values[0, start::2], axis=0).ravel() for start in (0, 1)]
    assert mixed.reliability()["base"] == pytest.approx(stats.rank_correlation(*halves))


def test_saved_and_loaded(mixed, swapped, tmp_path):
    for found in (mixed, swapped):
        again = fl.load(found.save(tmp_path / "inside.nc"))
        assert isinstance(again, InsideChains)
        assert again.summary() == found.summary()
        assert again.to_frame().equals(found.to_frame())
        json.dumps(again.headline(), allow_nan=False)
    with pytest.raises(InputError, match="states were not measured; found cuts, heads"):
        mixed.states()
    with pytest.raises(InputError, match="heads were not measured"):
        swapped.receivers()
    with pytest.raises(InputError, match="there is no question 'x'"):
        mixed.matrix("x")
    with pytest.raises(InputError, match="side is base or tuned"):
        mixed.receivers(side="both")


def test_chains_that_are_not_as_they_should_be():
    """Empty, of one step, longer than is measured: all are counted, and none is dropped."""
    questions = QUESTIONS[:4]
    chains = [Chain(q.id, 0, text) for q, text in zip(questions, ["", "a:0;", questions[2].chain], strict=False)]
    chains.append(Chain(questions[3].id, 0, questions[3].chain, ending="length"))
    chains += [Chain(questions[3].id, 1, "a:1;")]  # a second sample is not read
    found = look(questions, chains=chains, max_steps=4, rollouts=1, temperature=0)
    counts = found.provenance["counts"]
    assert counts["chains"] == {"given": 3, "length": 1, "empty": 1}
    assert [counts[n] for n in ("without_steps", "single_step", "capped")] == [1, 1, 2]
    assert found.data["steps"].values.tolist() == [0, 1, 6, 6]
    assert found.data["measured"].values.tolist() == [0, 1, 4, 4]
    assert np.isfinite(found.data["uncut_logprob"].values).all()
    assert np.isfinite(found.data["answer_kl"].values).sum(-1).tolist() == [[0, 1, 4, 4]] * 2
    assert np.isfinite(found.data["right_share"].values).sum(-1).tolist() == [[0, 2, 5, 5]] * 2
    assert found.rows("answer_kl").index.tolist() == ["-1", "-3", "-4", "-5", "-6"]
    for told in ("1 chains hit the length limit", "1 chains are empty", "2 chains have more steps", "a single step"):
        assert told in found.summary()
    json.dumps(found.headline(), allow_nan=False)
    whole = look(questions, chains=chains)
    kept = whole.data["kl"].values[:, :, :4, :4]
    np.testing.assert_allclose(found.data["kl"].values[:, 2:], kept[:, 2:], atol=1e-6), "the rest is read all the same"


def test_chains_that_are_all_empty_have_no_steps():
    with pytest.raises(InputError, match="all 2 chains are empty, so that there are no steps"):
        look(QUESTIONS[:2], chains=[Chain(q.id, 0, "") for q in QUESTIONS[:2]])


def test_chains_and_continuations_leave_room_for_an_answer(monkeypatch):
    """What does not end, in models that read no more than 64 tokens, is cut off where cue and answer still fit."""
    endless = Format(prompt="{question};", choice="", cue="=", answer="{answer}", steps=";", stop=("=",))
    monkeypatch.setattr("finetune_lens.cot.generate.greedy_choice", lambda logits, rows, step: [9] * len(logits))
    found = look(QUESTIONS[:2], format=endless, parts=("cuts",), rollouts=1, temperature=0, max_tokens=500)
    assert found.data["ending"].values.tolist() == ["length", "length"]
    base = fl.ModelPair.load(FOLDER / "faithful", FOLDER / "ignoring").base
    for question, chain in zip(QUESTIONS, found.data["chain"].values, strict=False):
        assert 62 <= len(base.tokenizer(f"{question.question};{chain}=")["input_ids"]) <= 64
    long = read_questions([{"question": f"<da>{'a-3' * 58};3", "answer": "1", "choices": list("123")}])
    with pytest.raises(InputError, match=r"question 1 has .* no room for a chain and an answer"):
        look(long)


def test_few_chains_and_short_ones_are_told_as_such(mixed):
    assert "nan" not in mixed.summary()
    assert f"{len(MIXED)} questions are few" in mixed.summary()
    found = look(QUESTIONS[:2], chains=[Chain(q.id, 0, "a:1;b:2;") for q in QUESTIONS[:2]], parts=("cuts", "heads"))
    said = found.summary()
    assert "given chains of 2 steps" in said
    assert "nan" not in said
    assert "heads: 0 chains are long enough for a kurtosis" in said
    assert "kurtosis 0.0" not in said
    row = next(line for line in said.splitlines() if line.startswith("answer_kl -1"))
    assert row.split()[2] == "2", "how many questions a row rests on"
    assert found.rows("answer_kl")["p"].min() >= 0.5, "two questions"


def test_chains_behind_the_limit_are_passed_over(tmp_path):
    write_chains(tmp_path / "all.jsonl", [Chain(q.id, 0, q.chain) for q in QUESTIONS[:5]])
    found = look(QUESTIONS[:5], chains=tmp_path / "all.jsonl", limit=2, parts=("cuts",))
    assert found.questions == [q.id for q in QUESTIONS[:2]]
    with pytest.raises(InputError, match="no question has the id '2'"):
        look(QUESTIONS[:2], chains=tmp_path / "all.jsonl", parts=("cuts",))


def test_answers_that_are_written(tmp_path):
    rows = [{"question": q.question, "answer": q.answer, "id": q.id} for q in QUESTIONS[:3]]
    found = look(rows, parts=("cuts",), answer_tokens=3)
    assert found.data["answer"].values.tolist() == [[row["answer"] for row in rows]] * 2
    options = look(QUESTIONS[:3], parts=("cuts",))
    np.testing.assert_allclose(found.data["answer_kl"], options.data["answer_kl"], atol=1e-5)
    np.testing.assert_allclose(found.data["changed"], options.data["changed"])


def test_chains_and_answers_that_cannot_be_read_again(library):
    """Of a vocabulary whose own tokenizer cuts some words in two: counted, the other chains and answers measured."""
    module = library.model("llama")
    pair = fl.ModelPair.load(module, tuned_copy(module, 0.3), tokenizer=split_words())
    spelt = Format("{question} ; ", choice="", cue=" = ", answer="{answer}", steps=";")
    rows = read_questions([{"question": f"{a} {b}", "answer": "a"} for a in "abcd" for b in "efg"])
    given = {"max_tokens": 6, "answer_tokens": 8, "rollouts": 2, "temperature": 2.0, "check": False, "progress": False}
    found = look_inside_chains(pair, rows, format=spelt, **given)
    counts = found.provenance["counts"]
    assert (found.data["ending"].values == "unreadable").sum() == counts["chains"]["unreadable"] > 0
    said = found.summary()
    assert f"{counts['chains']['unreadable']} chains are cut off before a text that the tokenizer cannot read" in said
    chains = found.data["chain"].values.tolist()
    asked = asking.ask(pair.base, rows, spelt, chains, [[text] for text in chains], max_tokens=8)
    unread = [bool(set(row[0].split()) & set(LOST)) for row in asked.texts]
    assert (~np.isfinite(found.data["uncut_logprob"].sel(side="base").values)).tolist() == unread
    assert counts["without_answer"]["base"] == sum(unread) > 0


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    import finetune_lens.cot.cuts as cuts

    real, calls, stop = cuts.cut_steps, [], 5

    def counted(*given, **options):
        calls.append(given)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(cuts, "cut_steps", counted)
    options = {"questions": QUESTIONS[:4], "parts": ("cuts",), "partial": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        look(**options)
    stop = -1
    found = look(**options)
    assert len(calls) == 5 + 4, "eight chains and sides, of which four were done"
    assert found.data.drop_attrs().equals(look(QUESTIONS[:4], parts=("cuts",)).data.drop_attrs())
    look(**options | {"layers": [1]})
    assert len(calls) == 9 + 8 + 8, "cut elsewhere, it is another measurement"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("cut",)}, "parts are some of cuts, heads, states; found \\['cut'\\]"),
        ({"parts": ()}, "nothing to measure"),
        ({"rollouts": -1}, "rollouts are 0 or more"),
        ({"max_steps": 0}, "max_steps and distance at least 1"),
        ({"scoring": "best"}, "scoring is one of auto, exact; found 'best'"),
        ({"answer_tokens": 0}, "an answer has at least 1 token"),
        ({"rollouts": 2, "temperature": -1}, "temperature is 0"),
        ({"rollouts": 2, "top_p": 0}, "top_p is a share"),
        ({"max_tokens": 0}, "max_tokens is at least 1"),
        ({"template": "tuned"}, "template is none or each"),
        ({"template": "each"}, "no chat template"),
        ({"layers": [2]}, "layers: expected some of 0 to 1; found 2"),
        ({"heads": []}, "heads: expected some of 0 to 3; found none"),
        ({"chains": "both"}, "expected base, tuned, question or a .jsonl file of chains; found 'both'"),
        ({"chains": [Chain("9", 0, "a:1;")]}, "no chain for 2 of 2 questions: 0, 1"),
        ({"questions": [{"question": "<da>a+1;1", "answer": "2"}], "chains": "question"}, "1 of 1 questions have no"),
        ({"chains": [Chain(q.id, 0, "a:1;" * 20) for q in QUESTIONS[:2]]}, "cue and answer are 73 tokens"),
    ],
)  # fmt: skip
def test_bad_input(options, message, monkeypatch):
    monkeypatch.setattr("finetune_lens.cot.generate.write", lambda *given: pytest.fail("chains were written before"))
    with pytest.raises(InputError, match=message):
        look(**{"questions": QUESTIONS[:2]} | options)


def test_models_that_read_a_chain_otherwise():
    from finetune_lens.cot.study import Study

    models = fl.ModelPair.load(FOLDER / "faithful", FOLDER / "ignoring").models()
    other = HookedModel(models[1].module, forty(), name="other")
    written = {"template": False, "batch_size": None, "progress": False}
    chains = [Chain(QUESTIONS[0].id, 0, "a;")]
    plain = read_questions([{"question": "abc", "answer": "1", "id": QUESTIONS[0].id}])
    format = Format(prompt="{question}", cue="b", answer="{answer}", steps=";", stop=())
    first = HookedModel(models[0].module, bpe(), name="first")
    with pytest.raises(InputError, match="first and other read question 0 with its chain as different tokens"):
        Study.of((first, other), plain, format, chains, 9, "auto", 2, written)


def test_the_command(tmp_path, in_new_process):
    chains = tmp_path / "chains.jsonl"
    write_chains(chains, [Chain(q.id, 0, o.chain) for q, o in pairwise(QUESTIONS[:5])])
    words = ["-m", "finetune_lens.cot.inside", str(FOLDER / "faithful"), str(FOLDER / "ignoring")]
    words += [str(FOLDER / "questions.jsonl"), "--format", str(FOLDER / "format.json"), "--out", "found", "--quiet"]
    done = in_new_process(*words, "--limit", "4", "--chains", str(chains), "--rollouts", "2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["kind"] == "inside_chains"
    assert record["headline"]["quantities"]["changed"][0]["base"] == 1
    assert len(record["figures"]) == 8
    found = fl.load(tmp_path / "found/inside_chains.nc")
    assert found.parts == ["cuts", "heads", "states", "resampling"]
    assert (tmp_path / "found/inside_chains.csv").read_text().startswith("quantity,at,questions,base")
    before = (tmp_path / "found/inside_chains.nc").read_bytes()
    wrong = (([], "exists and would be overwritten"), (["--force", "--chains-of", "me"], "--chains-of is one of"))
    for more, says in wrong:
        bad = in_new_process(*words, *more, cwd=tmp_path)
        assert bad.returncode == 2
        assert bad.stderr.startswith("error: ")
        assert says in bad.stderr
        assert bad.stderr.count("\n") == 1
    assert (tmp_path / "found/inside_chains.nc").read_bytes() == before


def test_what_importing_it_imports(in_new_process):
    code = "import sys, finetune_lens.cot.inside; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert in_new_process("-c", code).stdout.strip() == "[]"
    code = "import sys, finetune_lens.results.inside_chains, finetune_lens.plots; print('torch' in sys.modules)"
    assert in_new_process("-c", code).stdout.strip() == "False"


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_of_chains_of_one_step(tmp_path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    chains = [Chain(q.id, 0, "a:1;") for q in QUESTIONS[:3]]
    found = look(QUESTIONS[:3], chains=chains, parts=("cuts", "heads"))
    for name, draw in fl.plots.figures_of(found).items():
        figure = draw()
        for kind in ("pdf", "png"):  # a warning is an error: no axes collapse
            figure.savefig(tmp_path / f"{name}.{kind}")
    axes = fl.plots.step_importance(found)
    axes[0].figure.canvas.draw()
    assert [t.get_text() for t in axes[0].get_xticklabels() if -1.5 < t.get_position()[0] < -0.5] == ["−1"]
    left, right = axes[1].collections[-1].get_paths()[0].get_extents().intervalx
    assert right > left, "an interval of one step can be seen"
    assert [t.get_text() for t in fl.plots.receiver_heads(found)[1].texts] == ["its steps are too close"]
    plt.close("all")


def test_figures_show_the_numbers(mixed, swapped):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    assert set(fl.plots.figures_of(mixed)) == {"matrix", "importance", "heads"}
    assert set(fl.plots.figures_of(swapped)) == {"matrix", "importance", "states"}
    axes = fl.plots.step_matrix(mixed, question=MIXED[0].id)
    expected = mixed.matrix(MIXED[0].id)
    shown = [ax.collections[0].get_array() for ax in axes]
    np.testing.assert_allclose(shown[0][:, -1], expected[0][:, -1])
    np.testing.assert_allclose(shown[2].filled(np.nan)[:, :5], (expected[1] - expected[0])[:, 1:6])
    assert np.ma.getmaskarray(shown[0])[:, -2].all(), "a gap before the answer"
    assert axes[0].get_xticklabels()[-1].get_text() == "answer"
    axes = fl.plots.step_matrix(mixed)
    assert "mean of 4 chains" in axes[0].get_title()
    mean = np.mean([mixed.matrix(q.id)[0] for q in MIXED[8:]], axis=0)
    np.testing.assert_allclose(axes[0].collections[0].get_array()[:, -1], mean[:, -1])
    axes = fl.plots.step_importance(mixed)
    lines = {line.get_color(): line.get_ydata() for line in axes[0].lines if len(line.get_xdata()) > 2}
    np.testing.assert_allclose(sorted(lines.values(), key=max)[-1], mixed.rows("changed")["base"])
    axes = fl.plots.receiver_heads(mixed)
    assert axes[0].get_xticklabels()[0].get_text() == mixed.receivers(1)["at"][0]
    long = InsideChains(mixed.data.assign_coords(question=[f"what_$5_and_${q}_come_to" for q in mixed.questions]))
    for axes, title in (
        (fl.plots.step_matrix(long, question=long.questions[0]), r"base   (question what_\$5_and_\$0_…)"),
        (fl.plots.receiver_heads(long)[::-1], r"question what_\$5_and_\$100_come_to"),
    ):
        assert title in axes[0].get_title()
        axes[0].figure.canvas.draw()
    axes = fl.plots.step_states(swapped)
    assert [ax.get_title() for ax in axes] == ["tuned→base", "base→tuned"]
    plt.close("all")
    with pytest.raises(InputError, match="there is no question 'x'"):
        fl.plots.receiver_heads(mixed, question="x")
