"""The string tasks: oracles with the algebra they should have, disjoint splits, one reading of text and tokens."""

import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from finetune_lens.tasks.strings import (
    BASE_TASKS,
    LENGTH,
    LETTERS,
    NEW_TASK,
    TASKS,
    VOCABULARY,
    Accuracy,
    answer,
    draw,
    encode,
    measure,
    question,
    split,
    tokenizer,
)

texts = st.text(LETTERS, min_size=LENGTH, max_size=LENGTH)


@given(texts)
def test_the_oracles_obey_their_algebra(text):
    def again(task, times):
        out = text
        for _ in range(times):
            out = answer(task, out)
        return out

    assert answer("copy", text) == text
    assert again("reverse", 2) == again("mirror", 2) == again("swap", 2) == again("rotate", LENGTH) == text
    assert again("next", len(LETTERS)) == text
    assert again("rotate", LENGTH // 2) == again("swap", 1)
    assert sorted(answer("sort", text)) == list(answer("sort", text)) == sorted(text)
    assert answer("sort", answer("reverse", text)) == answer("sort", text)
    assert (
        answer(NEW_TASK, text) == answer("mirror", answer("reverse", text)) == answer("reverse", answer("mirror", text))
    )


def test_known_answers():
    known = {"copy": "gafbdz", "reverse": "zdbfag", "rotate": "afbdzg", "swap": "bdzgaf", "next": "hbgcea"}
    known |= {"mirror": "tzuywa", "sort": "abdfgz", "flip": "awyuzt"}
    assert {task: answer(task, "gafbdz") for task in TASKS} == known


def test_no_base_task_gives_the_answer_to_the_new_one():
    items = draw([NEW_TASK], 1000, np.random.default_rng(0), part="test")
    for task in BASE_TASKS:
        assert sum(answer(task, text) == answer(NEW_TASK, text) for _, text in items) == 0, task


def test_no_test_string_is_ever_drawn_for_training():
    drawn = {}
    for part in ("train", "validation", "test"):
        items = draw(list(TASKS), 3000, np.random.default_rng(0), part=part)
        assert len(items) == 3000
        assert {task for task, _ in items} == set(TASKS)
        drawn[part] = {text for _, text in items}
        assert all(split(text) == part for text in drawn[part])
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["validation"] & drawn["test"]
    generator = np.random.default_rng(1)
    parts = [split("".join(generator.choice(list(LETTERS), LENGTH))) for _ in range(8000)]
    assert parts.count("test") / 8000 == pytest.approx(1 / 16, abs=0.01)
    assert parts.count("validation") / 8000 == pytest.approx(1 / 16, abs=0.01)


def test_the_same_seed_draws_the_same_items():
    one, two, other = (draw(list(TASKS), 50, np.random.default_rng(seed), part="train") for seed in (0, 0, 1))
    assert one == two != other


@settings(deadline=None)  # the first use imports transformers
@given(st.lists(st.tuples(st.sampled_from(sorted(TASKS)), texts), min_size=1, max_size=4))
def test_tokens_are_what_the_tokenizer_makes_of_the_text(items):
    reads = tokenizer()
    batch = encode(items)
    assert batch["input_ids"].shape == batch["labels"].shape == (len(items), 2 * LENGTH + 4)
    for (task, text), ids, labels in zip(items, batch["input_ids"], batch["labels"], strict=True):
        prompt, whole = question(task, text), question(task, text) + answer(task, text)
        assert reads(prompt)["input_ids"] == ids[: LENGTH + 3].tolist()
        assert reads(whole + "<eos>")["input_ids"] == ids.tolist()
        assert reads.decode(ids, skip_special_tokens=False) == f"<bos>{whole}<eos>"
        assert (labels[: LENGTH + 3] == -100).all(), "no loss on the prompt"
        assert torch.equal(labels[LENGTH + 3 :], ids[LENGTH + 3 :])


def test_every_token_has_one_id_and_letters_are_tokens():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert set(string.ascii_lowercase) < set(VOCABULARY)
    assert tokenizer().get_vocab() == {token: i for i, token in enumerate(VOCABULARY)}


class Oracle(torch.nn.Module):
    """A model whose greedy answers are right, but for the items whose last answer token it gets wrong."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def forward(self, input_ids):
        logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), len(VOCABULARY)).float()
        for row, ids in enumerate(input_ids):
            if tuple(ids.tolist()) in self.wrong:
                logits[row, -2] = logits[row, -2].roll(1)  # the step that writes <eos>
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_an_answer_counts_only_if_every_token_is_right(batch_size):
    items = draw(list(TASKS), 40, np.random.default_rng(0), part="test")
    wrong = {tuple(ids.tolist()) for ids in encode(items)["input_ids"][:10]}
    assert measure(Oracle(set()), items, batch_size=batch_size) == Accuracy(40, 40)
    assert measure(Oracle(wrong), items, batch_size=batch_size) == Accuracy(30, 40)


@settings(deadline=None)  # the first use imports scipy
@given(st.integers(1, 2000), st.data())
def test_the_interval_is_wilson_s(n, data):
    correct = data.draw(st.integers(0, n))
    p, z = correct / n, norm.ppf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    accuracy = Accuracy(correct, n)
    assert accuracy.value == p
    assert accuracy.interval == pytest.approx((centre - half, centre + half), abs=1e-9)
