"""What is asked behind every cut of every chain at once is what one plain forward pass after another says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cot_branches import passes
from test_cot_generate import forty, greedy_oracle

from finetune_lens import ModelPair, zoo
from finetune_lens.cot import asking
from finetune_lens.cot.answers import extract_answer
from finetune_lens.cot.asking import ask, score_right
from finetune_lens.cot.generate import templated
from finetune_lens.cot.questions import Format, Question, read_questions
from finetune_lens.cot.steps import split_steps
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel

TRACES = zoo.path("traces")
FORMAT = Format.load(TRACES / "format.json")
LETTERS = Format(prompt="{question}", choice="", cue="KJ", answer="{answer}", steps="[x]", stop=[])
FAMILIES = ("gpt2", "llama", "neox", "gemma3-sliding", "bloom")
ASKED = [
    Question("long", "abcdefg", "cd", ("ab", "cd", "efg")),
    Question("short", "h", "e", ("e", "fgh")),
    Question("ends", "ijk", "no", ("mk", "no", "mp", "lmn")),
]
WHOLES = ["stxuvxw", "sxt", "ab<eos>cx<eos>d"]
CUTS = [["", "stx", "stxuvx", "stxuvxw"], ["", "sx", "sxtt", "ghi"], ["ab", "ab<eos>c", "ab<eos>cx<eos>d"]]


def naive(model, text, option):
    """One plain forward pass; the option's tokens are its letters here."""
    ids = model.tokenizer(text + option)["input_ids"]
    n = len(model.tokenizer(option, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logs = model.module(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logs[at - 1, ids[at]].item() for at in range(len(ids) - n, len(ids)))


def model_of(library, family):
    return HookedModel(library.model(family), forty())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grown", [asking.GROWN, 8])
def test_options_against_one_forward_pass_each(library, family, grown, monkeypatch):
    """Prompts and chains of unlike lengths, edited cuts, options of one to three tokens, ends of text in a chain."""
    monkeypatch.setattr(asking, "GROWN", grown)
    model = model_of(library, family)
    assert model.tokenizer("b<eos>c")["input_ids"][1] == 2
    found = ask(model, ASKED, LETTERS, WHOLES, CUTS)
    assert found.logprob.shape == (3, 4, 4)
    chances = found.probability()
    for row, question in enumerate(ASKED):
        for k, cut in enumerate(CUTS[row]):
            options = LETTERS.options_of(question)
            expected = [naive(model, question.question + cut + "KJ", option) for option in options]
            np.testing.assert_allclose(found.logprob[row, k, : len(options)], expected, atol=1e-4, rtol=0)
            assert found.answers[row][k] == question.choices[int(np.argmax(expected))]
            assert found.texts[row][k] == options[int(np.argmax(expected))]
            np.testing.assert_allclose(
                chances[row, k, : len(options)], np.exp(expected) / np.exp(expected).sum(), atol=1e-4
            )
        assert np.isnan(found.logprob[row, :, len(options) :]).all()
        assert np.isnan(found.logprob[row, len(CUTS[row]) :]).all()
    assert len({answer for row in found.answers for answer in row}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_written_answers_are_those_that_transformers_generates(library, family):
    model = model_of(library, family)
    questions = [replace(q, choices=(), answer="some text") for q in ASKED]
    found = ask(model, questions, LETTERS, WHOLES, CUTS, max_tokens=5)
    assert found.logprob.shape == (3, 4, 0)
    assert found.probability().shape == (3, 4, 0)
    for row, question in enumerate(questions):
        for k, cut in enumerate(CUTS[row]):
            ids = model.tokenizer(question.question + cut + "KJ")["input_ids"]
            text = model.tokenizer.decode(list(greedy_oracle(model.module, ids, 5)))
            assert found.texts[row][k] == text
            assert found.answers[row][k] == extract_answer(text, question, LETTERS)


def test_the_right_answer_of_open_questions_too(library):
    model = model_of(library, "llama")
    mixed = [ASKED[0], replace(ASKED[1], choices=(), answer="fgh"), ASKED[2]]
    found = score_right(model, mixed, LETTERS, WHOLES, CUTS, prompts=["jjj", "k", "lm"])
    for row, (prompt, right) in enumerate([("jjj", "cd"), ("k", "fgh"), ("lm", "no")]):
        expected = [naive(model, prompt + cut + "KJ", right) for cut in CUTS[row]]
        np.testing.assert_allclose(found[row, : len(expected)], expected, atol=1e-4, rtol=0)
        assert np.isnan(found[row, len(expected) :]).all()


def test_rows_of_both_kinds_and_own_prompts(library):
    model = model_of(library, "llama")
    mixed = [ASKED[0], replace(ASKED[1], choices=(), answer="some text"), ASKED[2]]
    prompts = ["jjj", "k", "lm"]
    found = ask(model, mixed, LETTERS, WHOLES, CUTS, prompts=prompts, max_tokens=4)
    for row, question in enumerate(mixed):
        given = [question], LETTERS, [WHOLES[row]], [CUTS[row]]
        alone = ask(model, *given, prompts=[prompts[row]], max_tokens=4)
        assert (found.answers[row], found.texts[row]) == (alone.answers[0], alone.texts[0])
        kept = alone.logprob.shape[1:]
        np.testing.assert_allclose(found.logprob[row, : kept[0], : kept[1]], alone.logprob[0], atol=1e-5)
    default = ask(model, mixed, LETTERS, WHOLES, CUTS, max_tokens=4)
    assert np.nanmax(np.abs(default.logprob - found.logprob)) > 1e-2
    exact = ask(model, mixed, LETTERS, WHOLES, CUTS, scoring="exact", max_tokens=4)
    assert exact.logprob.shape[-1] == 0
    assert exact.answers[0][0] == extract_answer(exact.texts[0][0], mixed[0], LETTERS)


def test_equal_rows_are_asked_once_and_come_back_in_their_order(library):
    model = model_of(library, "gpt2")
    order = [2, 0, 2, 1, 0]
    given = [[held[row] for row in order] for held in (ASKED, WHOLES, CUTS)]
    with passes(model) as seen:
        found = ask(model, given[0], LETTERS, *given[1:])
    assert [shape[0] for shape in seen[-2:]] == [3, 3], "the chains, and what is behind them"
    apart = ask(model, ASKED, LETTERS, WHOLES, CUTS)
    for row, source in enumerate(order):
        assert found.answers[row] == apart.answers[source]
        np.testing.assert_array_equal(found.logprob[row], apart.logprob[source])


def test_chat_template(library):
    tokenizer = forty()
    tokenizer.chat_template = (
        "{% for m in messages %}AB{{ m['content'] }}C{% endfor %}{% if add_generation_prompt %}D{% endif %}"
    )
    model = HookedModel(library.model("llama"), tokenizer)
    found = ask(model, ASKED, LETTERS, WHOLES, CUTS, template=True)
    prompts = [f"AB{q.question}CD" for q in ASKED]
    assert templated([q.question for q in ASKED], tokenizer) == prompts
    np.testing.assert_array_equal(found.logprob, ask(model, ASKED, LETTERS, WHOLES, CUTS, prompts=prompts).logprob)
    with pytest.raises(InputError, match="no chat template"):
        ask(model_of(library, "llama"), ASKED, LETTERS, WHOLES, CUTS, template=True)


def test_the_calibration_pair_by_plain_forward_passes():
    pair = ModelPair.load(TRACES / "faithful", TRACES / "ignoring")
    questions = read_questions(TRACES / "questions.jsonl", limit=5)
    wholes = [q.chain for q in questions]
    cuts = [["".join(split_steps(c, ";")[:k]) for k in range(c.count(";") + 1)] for c in wholes]
    for model in (pair.base, pair.tuned):
        found = ask(model, questions, FORMAT, wholes, cuts)
        for row, question in enumerate(questions):
            for k, cut in enumerate(cuts[row]):
                expected = [naive(model, f"{question.question};{cut}=", digit) for digit in "0123456789"]
                np.testing.assert_allclose(found.logprob[row, k], expected, atol=1e-4, rtol=0)
                assert found.answers[row][k] == str(np.argmax(expected))


def test_an_answer_that_begins_with_its_announcement_is_read():
    """The stop texts of a chain do not cut off the answer behind them."""

    class Writes:
        name = "writer"

    seen = {}

    def greedy(model, prefixes, cuts, cues, *, stop, **options):
        seen["stop"] = stop
        return [[type("W", (), {"text": " #### 18"})() for _ in row] for row in cuts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_lens.cot.branches.greedy", greedy)
        pair = ModelPair.load(TRACES / "faithful", TRACES / "ignoring")
        question = Question("q", "<da>a-3;3", "18")
        found = ask(pair.base, [question], replace(FORMAT, stop=("####", ";")), ["a:0;"], [["", "a:0;"]])
    assert found.answers == [["18", "18"]]
    assert seen["stop"] == [";"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "best"}, "scoring is one of auto, exact; found 'best'"),
        ({"max_tokens": 0}, "at least 1 token"),
        ({"prompts": ["a:0;"] * 2}, "expected a question, chain, cuts and prompt a row"),
        ({"cuts": [["a:0;", "unknown;"]]}, r"of question q: the tokenizer has no token for .* in 'unknown;'"),
        ({"cuts": [["a:0;" * 40]]}, r"question q: prompt, chain, cue and answer are \d+ tokens, and .* reads"),
    ],
)  # fmt: skip
def test_bad_input(options, message):
    pair = ModelPair.load(TRACES / "faithful", TRACES / "ignoring")
    question = Question("q", "<da>a-3b+2c+6d-2e-1f-8;3", "7", tuple("0123456789"))
    given = {"wholes": ["a:0;"], "cuts": [["", "a:0;"]]} | options
    with pytest.raises(InputError, match=message):
        ask(pair.base, [question], FORMAT, **given)


def test_models_that_cannot_be_asked(library):
    with pytest.raises(InputError, match="no tokenizer"):
        ask(HookedModel(library.model("gpt2")), ASKED, LETTERS, WHOLES, CUTS)
    broken = library.fresh("llama")
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    model = HookedModel(broken, forty())
    with pytest.raises(InputError, match="NaN"):
        ask(model, ASKED, LETTERS, WHOLES, CUTS)
