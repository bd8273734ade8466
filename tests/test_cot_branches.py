"""Every truncation scored in one pass is scored as a text of its own would be."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DECODERS, VOCABULARY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cot_generate import forty, greedy_oracle
from test_prompts import bpe, letters

from finetune_lens import zoo
from finetune_lens.cot.branches import Branch, greedy, lay_out, score_branches, unpackable
from finetune_lens.cot.generate import sample
from finetune_lens.cot.tree import Tree
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel

ALIBI = {"falcon-rw", "bloom", "mpt"}
CUTS = [[3, 5, 5, 13], [4], [1, 2, 7, 8, 9]]  # of prefixes of 13, 4 and 9 tokens


def case(seed: int = 3) -> tuple[list[list[int]], list[list[int]], list[list[tuple[Branch, ...]]]]:
    """Three rows of unlike lengths and numbers of cuts: cues of 0 to 3 tokens, options of 1 to 4, some in others."""
    draw = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(3, VOCABULARY, count).tolist())

    def options(number: int) -> tuple[Branch, ...]:
        cue, first, common = tokens(number % 4), tokens(1), tokens(2)
        endings = [first, (*first, *tokens(1)), (*common, *tokens(1)), (*common, *tokens(2))][: 1 + number % 4]
        return tuple(Branch((*cue, *ending), len(ending)) for ending in endings)

    prefixes = [list(tokens(count)) for count in (13, 4, 9)]
    return prefixes, CUTS, [[options(k + row) for k in range(len(cuts))] for row, cuts in enumerate(CUTS)]


def oracle(module: Any, prefixes: Any, cuts: Any, branches: Any) -> np.ndarray:
    """A plain forward pass of its own for each continuation, nothing padded, nothing kept."""
    found = np.full((len(cuts), max(map(len, cuts)), max(len(b) for row in branches for b in row)), np.nan)
    for row, prefix in enumerate(prefixes):
        for k, cut in enumerate(cuts[row]):
            for option, (tokens, scored) in enumerate(branches[row][k]):
                ids = torch.tensor([[*prefix[:cut], *tokens]])
                logs = module(ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
                at = torch.arange(ids.shape[1] - scored, ids.shape[1])
                found[row, k, option] = logs[at - 1, ids[0, at]].sum()
    return found


@contextmanager
def passes(model: HookedModel) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the ids that the module is given."""
    seen: list[tuple[int, ...]] = []
    hook = model.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("family", DECODERS)
def test_all_truncations_are_forward_passes_of_their_own(library, family):
    model = HookedModel(library.model(family))
    expected, _ = oracle(model.module, *case()), model.anatomy
    with passes(model) as seen:
        found = score_branches(model, *case())
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert bool(unpackable(model, 40)) == (family in ALIBI)
    if family not in ALIBI:
        assert len(seen) == 5  # three that show that it can, the chains, and their branches
        assert seen[-2] == (3, 13)
    np.testing.assert_allclose(score_branches(model, *case(), packed=False), expected, atol=1e-4, rtol=0)


FLOAT64 = ("gpt2", "llama", "mistral", "qwen2-sliding", "gemma3-sliding", "llama4", "neox", "opt", "falcon-new")


@pytest.mark.parametrize("family", FLOAT64)  # the others compute part of their attention or MLP in float32
def test_to_the_last_digits_in_float64(library, family):
    model = HookedModel(library.fresh(family).double())
    np.testing.assert_allclose(score_branches(model, *case()), oracle(model.module, *case()), atol=1e-8, rtol=0)


def llama4_in_chunks(library: Any) -> Any:
    """Attention within chunks of four tokens, counted from a text's first."""
    config = type(library.configs["llama4"]())(
        **library.configs["llama4"]().to_diff_dict() | {"attention_chunk_size": 4}
    )
    assert "chunked_attention" in config.layer_types
    return config


def phi3_of_two_lengths(library: Any, trained: int) -> Any:
    """Rotary embedding with other frequencies in texts longer than those that it was trained on."""
    config = library.configs["phi3"]()
    half = config.hidden_size // config.num_attention_heads // 2
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * half, "long_factor": [3.0] * half,
        "original_max_position_embeddings": trained,
    }  # fmt: skip
    config.original_max_position_embeddings = trained
    return config


def drawn(config: Any) -> HookedModel:
    """With every parameter drawn at random."""
    import transformers

    torch.manual_seed(1)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.2)
    return HookedModel(module.requires_grad_(False), forty())


def test_attention_in_chunks(library):
    model = drawn(llama4_in_chunks(library))
    assert not unpackable(model, 40)
    np.testing.assert_allclose(score_branches(model, *case()), oracle(model.module, *case()), atol=1e-4, rtol=0)


def test_positions_that_change_with_the_length(library):
    """A truncation shorter than what the model was trained on is not what the longer chain's first part is."""
    model = drawn(phi3_of_two_lengths(library, 8))
    assert "changes in texts of more than 8 tokens" in unpackable(model, 40)
    assert not unpackable(model, 8)
    expected = oracle(model.module, *case())
    np.testing.assert_allclose(score_branches(model, *case()), expected, atol=1e-4, rtol=0)
    packed = score_branches(model, *case(), packed=True)
    assert np.nanmax(np.abs(packed - expected)) > 1e-2  # what is refused would have been wrong
    short, long = sample(model, [[3], [3, 4, 5]], names=["s", "l"], max_tokens=20, temperature=0.1, progress=False)
    assert max(len(short.tokens) + 1, len(long.tokens) + 3) <= 8


def test_batches_and_paddings_change_nothing(library):
    for family in ("gemma3-sliding", "bloom"):
        model = HookedModel(library.model(family))
        prefixes, cuts, branches = case()
        together = score_branches(model, prefixes, cuts, branches)
        for size in (1, 2):
            np.testing.assert_allclose(
                score_branches(model, prefixes, cuts, branches, batch_size=size), together, atol=1e-5
            )
        turned = score_branches(model, prefixes[::-1], cuts[::-1], branches[::-1])
        np.testing.assert_allclose(turned[::-1], together, atol=1e-5)
        assert np.isnan(together).sum() == 3 * 5 * 4 - sum(len(b) for row in branches for b in row)


def test_what_is_shared_is_computed_once(library):
    model = HookedModel(library.model("gpt2"))
    prefix, cue = list(range(3, 15)), (20, 21, 22)
    single = [Branch((*cue, token), 1) for token in (5, 6, 7)]
    double = [Branch((*cue, 8, token), 2) for token in (5, 6)]
    with passes(model) as seen:
        score_branches(model, [prefix], [[4, 12]], [[single, double]], packed=True)
    assert seen == [(1, 12), (1, 3 + 4)]  # twice the cue, and the one token that both long options begin with
    seen.clear()
    with passes(model) as seen:
        found = score_branches(model, [prefix], [[4, 8]], [[[Branch((t,), 1) for t in (5, 6)]] * 2], packed=True)
    assert seen == [(1, 8)]  # nothing behind the last cut, and no branches where the next token is all
    logs = model.module(torch.tensor([prefix])).logits[0].log_softmax(-1)
    np.testing.assert_allclose(found[0], logs[[3, 7]][:, [5, 6]], atol=1e-5)


def test_a_branch_before_the_first_token(library):
    """Where the tokens of a truncation are none of the chain's: all of it is a branch."""
    model = HookedModel(library.model("llama"))
    given = [[4, 5, 6]], [[0, 2]], [[[Branch((9, 8, 7), 2)], [Branch((3,), 1)]]]
    np.testing.assert_allclose(score_branches(model, *given), oracle(model.module, *given), atol=1e-5)
    given = [[4, 5, 6]], [[0]], [[[Branch((9, 8, 7), 2)]]]
    np.testing.assert_allclose(score_branches(model, *given), oracle(model.module, *given), atol=1e-5)
    assert score_branches(model, [[4], [4]], [[], [1]], [[], [[]]]).shape == (2, 1, 0)


def test_half_precision(library):
    """Rounding is no reason to take the slow way, and what positions do not reach is found out all the same."""
    for family in ("gpt2", "llama", "gemma2-sliding", "mixtral", "falcon-rw", "bloom", "mpt"):
        model = HookedModel(library.fresh(family).bfloat16())
        assert bool(unpackable(model, 40)) == (family in ALIBI), family


def test_attention_that_takes_no_masks(library, monkeypatch):
    """As flash attention does; what is refused would have been wrong."""
    from contextlib import nullcontext

    model, given = HookedModel(library.model("llama")), case()
    expected = oracle(model.module, *given)
    monkeypatch.setattr("finetune_lens.cot.tree._seen", lambda *masks: nullcontext())
    assert "does not go by mask and positions" in unpackable(model, 40)
    np.testing.assert_allclose(score_branches(model, *given), expected, atol=1e-4)
    assert np.nanmax(np.abs(score_branches(model, *given, packed=True) - expected)) > 1e-2


def test_masks_are_as_they_were(library):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    module = library.model("gemma2-sliding")
    before, ids = dict(MASKS), torch.tensor([[3, 4, 5, 6, 7]])
    logits = module(ids).logits
    tree = Tree(HookedModel(module), [[3, 4, 5]])
    tree.start([[]])
    with pytest.raises(IndexError):
        tree.grow([[400]], [[1]], [[3]])
    score_branches(HookedModel(module), *case())
    assert dict(MASKS) == before
    assert torch.equal(module(ids).logits, logits)


def test_an_adapter_that_is_off(library):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.5)
        outer = peft.get_peft_model(library.fresh("llama"), config)
    outer.train()
    on, off = (HookedModel(outer, forty(), adapted=adapted) for adapted in (True, False))
    expected = oracle(library.model("llama"), *case())
    np.testing.assert_allclose(score_branches(off, *case()), expected, atol=1e-4)
    adapted = score_branches(on, *case())
    assert np.nanmax(np.abs(adapted - expected)) > 1e-2
    np.testing.assert_allclose(score_branches(on, *case(), packed=False), adapted, atol=1e-4)


def test_memory_that_does_not_hold_the_batch(library, monkeypatch):
    from finetune_lens.cot import branches

    model, scored, sizes = HookedModel(library.model("llama")), branches._scored, []

    def narrow(model: HookedModel, plans: list) -> list:
        sizes.append(len(plans))
        if len(plans) > 1:
            raise torch.OutOfMemoryError
        return scored(model, plans)

    expected = score_branches(model, *case())
    monkeypatch.setattr(branches, "_scored", narrow)
    np.testing.assert_allclose(score_branches(model, *case()), expected, atol=1e-5)
    assert sizes == [3, 1, 1, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cuts": [[4]]}, "2 rows, cuts of 1 and branches of 2"),
        ({"cuts": [[4], []]}, "row 1 has 0 cuts and branches at 1"),
        ({"cuts": [[4], [5]]}, "row 1 has 4 tokens and a cut at 5"),
        ({"cuts": [[-1], [2]]}, "a cut at -1"),
        ({"branches": [[[Branch((3,), 1)]], [[Branch((3, 4), 0)]]]}, "2 tokens of which 0 are scored"),
        ({"branches": [[[Branch((3,), 2)]], [[Branch((3, 4), 1)]]]}, "1 tokens of which 2 are scored"),
        ({"cuts": [[0], [2]]}, "row 0, cut at 0: a branch of 1 tokens .* a token before it"),
        ({"branches": [[[Branch((3,) * 25, 1)]], [[Branch((3,), 1)]]]}, "reads at most 24 tokens, and row 0"),
        ({"branches": [[[Branch((40,), 1)]], [[Branch((3,), 1)]]]}, "a branch has the token 40"),
        ({"batch_size": 0}, "batch size is at least 1"),
    ],
)
def test_bad_input(library, changed, message):
    given: dict[str, Any] = {"prefixes": [[3, 4, 5, 6, 7], [8, 9, 10, 11]], "cuts": [[4], [2]]}
    given["branches"] = [[[Branch((3,), 1)]], [[Branch((3, 4), 1)]]]
    with pytest.raises(InputError, match=message):
        score_branches(HookedModel(library.model("gpt2")), **given | changed)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2-sliding", "mistral", "gpt-oss-sliding", "bloom", "mpt"])
def test_answers_after_each_truncation_are_those_that_transformers_generates(library, family):
    model = HookedModel(library.model(family), forty())
    prefixes, cuts, branches = case()
    cues = [[row[0].tokens[: len(row[0].tokens) - row[0].scored] for row in found] for found in branches]
    found = greedy(model, prefixes, cuts, cues, max_tokens=6)
    apart = greedy(model, prefixes, cuts, cues, max_tokens=6, packed=False, batch_size=3)
    for row, prefix in enumerate(prefixes):
        for k, (cut, cue) in enumerate(zip(cuts[row], cues[row], strict=True)):
            expected = greedy_oracle(model.module, [*prefix[:cut], *cue], 6)
            assert found[row][k].tokens == expected, (row, k)
            assert found[row][k].ending == ("length" if len(expected) == 6 else "eos")
    assert found == apart
    assert len({written.tokens for row in found for written in row}) > 2


def test_answers_end_one_by_one(library):
    """At a stop text, an end-of-sequence token, or a length, whichever their text comes to first."""
    model = HookedModel(library.model("qwen2"), forty())
    prefixes, cuts, _ = case()
    cues: Any = [[()] * len(row) for row in cuts]
    whole = greedy(model, prefixes, cuts, cues, max_tokens=10)
    letters_used = sorted({letter for row in whole for written in row for letter in written.text})
    for stop in letters_used[:6]:
        for packed in (True, False):
            found = greedy(model, prefixes, cuts, cues, max_tokens=10, stop=[stop], packed=packed)
            for row, expected in zip(found, whole, strict=True):
                for one, full in zip(row, expected, strict=True):
                    assert one.text == full.text.split(stop)[0]
                    assert one.ending == ("stop" if stop in full.text else full.ending)


def test_answers_that_cannot_be_asked_for(library):
    model = HookedModel(library.model("gpt2"), forty())
    with pytest.raises(InputError, match="row 0 has 3 tokens and a cut at 4"):
        greedy(model, [[3, 4, 5]], [[4]], [[()]], max_tokens=2)
    with pytest.raises(InputError, match=r"row 0, truncation 1 with its cue, has 24 tokens"):
        greedy(model, [[3] * 22], [[1, 22]], [[(4,), (4, 5)]], max_tokens=2)


TEXT = "The capital of France is Paris. The river is big, and the city"


def joined(laid: Any, row: int, k: int, branch: tuple[int, ...]) -> list[int]:
    return [*laid.prefixes[row][: laid.cuts[row][k]], *branch]


def test_truncations_of_texts():
    tokenizer = bpe(front=["<bos>"])
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    ends = ["The capital of", "The capital of France", "The capital of Fr", "The capital of France ", TEXT]
    laid = lay_out(tokenizer, [TEXT], [ends], " and", [(" Rome", " a big", "land")])
    assert laid.prefixes == [ids(TEXT)]
    for k, end in enumerate(ends):
        assert joined(laid, 0, k, laid.cues[0][k]) == ids(f"{end} and")
        for option, branch in zip((" Rome", " a big", "land"), laid.branches[0][k], strict=True):
            assert joined(laid, 0, k, branch.tokens) == ids(f"{end} and{option}")
            assert tokenizer.decode(branch.tokens[-branch.scored :]) == option
    assert laid.cuts[0][:2] == [len(ids(end)) for end in ends[:2]]
    assert laid.moved == 2  # half a word, and a space that belongs to the next one
    assert laid.merged == 0
    # a cue that ends in a space: the option's first token takes it in, all options are compared from there
    laid = lay_out(tokenizer, [TEXT], [ends[:2]], " is ", [(" Rome", "Rome", "a")])
    assert laid.merged == 2
    for k, end in enumerate(ends[:2]):
        scored = [tokenizer.decode(b.tokens[-b.scored :]) for b in laid.branches[0][k]]
        assert scored == ["  Rome", " Rome", " a"]
        assert [joined(laid, 0, k, b.tokens) for b in laid.branches[0][k]] == [
            ids(f"{end} is {option}") for option in (" Rome", "Rome", "a")
        ]
    # no options: where the answer begins; no cue: it begins at the truncation
    laid = lay_out(tokenizer, [TEXT, "The"], [ends[:1], ["The"]], "", [(), (" river",)])
    assert laid.branches[0] == [()]
    assert laid.cues == [[()], [()]]
    assert laid.branches[1] == [(Branch(tuple(ids(" river")[1:]), 1),)]
    laid = lay_out(tokenizer, ["<bos>The"], [["<bos>The"]], "", [(" river",)], template=True)
    assert laid.prefixes == [ids("The")]
    slow = letters()
    assert lay_out(slow, ["abc"], [["ab", "abc"]], "d", [("x", "yz")]).cuts == [[2, 3]]
    with pytest.raises(InputError, match="no token for 'Z'"):
        lay_out(words_of_nothing(), ["ab"], [["ab"]], "", [("Z",)])


def words_of_nothing() -> Any:
    from finetune_lens.pair import ModelPair

    folder = zoo.path("strings")
    return ModelPair.load(folder / "base", folder / "full").base.tokenizer


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    whole=st.text("The riverParis, .é☃\n", min_size=1, max_size=30), at=st.lists(st.integers(1, 30), max_size=4),
    cue=st.text("is \n.:", max_size=4), options=st.lists(st.text("Paris é", min_size=1, max_size=5), max_size=3),
)  # fmt: skip
def test_every_text_is_tokenised_as_one(whole, at, cue, options):
    tokenizer = bpe(front=["<bos>"])
    ends = [whole[:i] for i in at]
    laid = lay_out(tokenizer, [whole], [ends], cue, [options])
    for k, end in enumerate(ends):
        assert joined(laid, 0, k, laid.cues[0][k])[: laid.cuts[0][k]] == laid.prefixes[0][: laid.cuts[0][k]]
        common = None
        for option, branch in zip(options, laid.branches[0][k], strict=True):
            text = tokenizer(end + cue + option)["input_ids"]
            assert joined(laid, 0, k, branch.tokens) == text
            before = text[: len(text) - branch.scored]
            assert before == (common := before if common is None else common)  # compared behind the same tokens
            assert tokenizer(end + cue)["input_ids"][: len(before)] == before
            assert branch.scored >= 1
        if not options:
            assert joined(laid, 0, k, laid.cues[0][k]) == tokenizer(end + cue)["input_ids"]
