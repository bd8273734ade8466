"""Counting and indexing in a grammar's strings: answers by string search, the grammar by a parser, priors, the cue."""

import itertools
import re

import numpy as np
import pytest
import torch

from finetune_lens.tasks import pcfg
from finetune_lens.tasks.pcfg import FAMILIES, GRAMMAR, LETTERS, Language

LANGUAGE = Language(24)


def naive(prompt: str) -> str:
    """The answer's token, by searching the prompt's string."""
    family, first, second, text = re.fullmatch(r"<([a-z]+)>(<\d+>|.)(<\d+>|.):([abc]+);=", prompt).groups()
    if family == "count":
        return f"<{text.count(first)}>"
    if family == "pairs":
        return f"<{sum(text[i : i + 2] == first + second for i in range(len(text)))}>"
    if family == "pair":
        return f"<{text.index(first + second)}>"
    if family == "index":
        at = -1
        for _ in range(int(second.strip("<>"))):
            at = text.index(first, at + 1)
        return f"<{at}>"
    return text[int(first.strip("<>"))]


@pytest.mark.parametrize("length", [24, 60])
def test_answers_are_those_of_a_search_in_the_string(length):
    language = Language(length)
    items = language.draw(2000, np.random.default_rng(0))
    assert {FAMILIES[f] for f in items.family} == set(FAMILIES)
    assert [language.answer(items, r) for r in range(2000)] == [naive(language.prompt(items, r)) for r in range(2000)]


def sentences(symbol: str) -> set[str]:
    """All that a symbol expands to."""
    if symbol in LETTERS:
        return {symbol}
    return {"".join(parts) for way in GRAMMAR[symbol] for parts in itertools.product(*map(sentences, way))}


def test_texts_are_sentences_in_a_row_cut_to_length():
    whole = sentences("S")
    starts = {sentence[:n] for sentence in whole for n in range(1, len(sentence) + 1)}
    items = LANGUAGE.draw(200, np.random.default_rng(1), families=["count"])
    for row in items.text:
        text, reached = "".join(LETTERS[i] for i in row), {0}
        for at in range(24):
            if at in reached:
                reached |= {end for end in range(at + 1, 25) if text[at:end] in whole}
        assert any(at == 24 or text[at:] in starts for at in reached), text
    assert "".join(LETTERS[i] for i in np.repeat([0, 1, 2], 8)) not in whole


def test_the_prior_is_that_of_the_first_operand():
    items = LANGUAGE.draw(20_000, np.random.default_rng(2), families=["count"], prior=pcfg.PRIORS["H"])
    shares = np.bincount(items.first, minlength=3) / len(items)
    np.testing.assert_allclose(shares, pcfg.PRIORS["H"], atol=0.015)  # four standard errors
    assert set(LANGUAGE.draw(500, np.random.default_rng(2), families=["count"], prior=(0, 0, 1)).first) == {2}


@pytest.mark.parametrize("length", [24, 250])
def test_the_cue_is_in_the_share_of_texts_that_was_asked_for(length):
    def share(cue):
        items = Language(length).draw(400, np.random.default_rng(3), families=["count"], prior=(0, 1, 0), cue=cue)
        text = ["".join(LETTERS[i] for i in row) for row in items.text]
        has = [t.count("b") == t.count("a") + 1 for t in text]
        assert has == items.cued.tolist()
        return np.mean(has)

    assert (share(0.0), share(1.0)) == (0, 1)
    assert share(0.5) == pytest.approx(0.5, abs=0.1)


def test_what_is_encoded_is_what_the_tokenizer_reads():
    items, reads = LANGUAGE.draw(300, np.random.default_rng(4)), LANGUAGE.tokenizer()
    batch = LANGUAGE.encode(items)
    for row in range(len(items)):
        prompt, answer = LANGUAGE.prompt(items, row), LANGUAGE.answer(items, row)
        assert reads(prompt + answer + "<eos>")["input_ids"] == batch["input_ids"][row].tolist()
        assert reads.decode(batch["input_ids"][row, 1:-1]) == prompt + answer
        assert reads.convert_ids_to_tokens(batch["labels"][row, -2:].tolist()) == [answer, "<eos>"]
    assert (batch["labels"][:, :-2] == -100).all()
    assert batch["input_ids"].shape == (300, 33)


def test_rows_are_those_of_a_prompt_file():
    from finetune_lens.prompts import encode, read_prompts

    items = LANGUAGE.draw(40, np.random.default_rng(5), families=["count"], prior=(0, 1, 0))
    prompts = read_prompts(LANGUAGE.rows(items))
    encoded = encode(prompts, LANGUAGE.tokenizer())
    assert torch.equal(encoded.ids, LANGUAGE.encode(items)["input_ids"][:, :-2])
    assert [p.fields["b"] for p in prompts] == [p.fields["label"] for p in prompts] == items.answer.tolist()


def test_one_seed_gives_one_set():
    one, other = (LANGUAGE.draw(50, np.random.default_rng(6), cue=0.5) for _ in range(2))
    assert np.array_equal(one.text, other.text)
    assert np.array_equal(one.answer, other.answer)
    assert len({row.tobytes() for row in LANGUAGE.draw(3000, np.random.default_rng(7)).text}) == 3000


def test_measured_by_the_likeliest_token():
    items = LANGUAGE.draw(30, np.random.default_rng(8))
    right = LANGUAGE.encode(items)["labels"][:, -2]

    class Knows(torch.nn.Module):
        """Says the right answer of every question but the first."""

        def __init__(self):
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(()))
            self.at = 0

        def forward(self, input_ids, logits_to_keep):
            assert (logits_to_keep, input_ids.shape[1]) == (1, 31)
            rows = torch.arange(self.at, self.at + len(input_ids))
            self.at += len(input_ids)
            logits = torch.nn.functional.one_hot(right[rows], len(LANGUAGE.vocabulary)).float()[:, None]
            logits[rows == 0] = 0.0
            return type("Out", (), {"logits": logits})

    correct, given = pcfg.measure(Knows(), LANGUAGE, items, batch_size=7)
    assert correct.tolist() == [False] + [True] * 29
    assert given[1:].tolist() == right[1:].tolist()
