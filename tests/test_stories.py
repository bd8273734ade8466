"""Stories: features as an independent reader finds them, protocols as defined, writing as one token at a time."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lens.errors import InputError
from finetune_lens.prompts import encode as read
from finetune_lens.prompts import read_prompts
from finetune_lens.tasks import stories
from finetune_lens.tasks.stories import (
    ANIMALS,
    FEATURES,
    LONGEST,
    PROTOCOLS,
    VIRTUES,
    Story,
    draw,
    encode,
    features,
    header,
    labelled,
    measure,
    pieces,
    prompts,
    tokenizer,
    vocabulary,
    write,
)
from finetune_lens.tasks.strings import Accuracy, split
from finetune_lens.training import train

OTHERS = [name for name in FEATURES if name != "twist"]


def drawn(n=300, seed=0, part="train", **options):
    return draw(n, np.random.default_rng(seed), part=part, **options)


def table(found, which):
    """(story, feature) whether it is asked for, or told."""
    return np.array([[name in getattr(story, which) for name in FEATURES] for story in found])


def reader(text):
    """The features of a whole story by its words alone: three animals in their order, marks, words of a kind."""
    words = re.findall(r"\w+", text)
    seen, expected, found = (word for word in words if word in ANIMALS)
    there = {
        "dialogue": '"' in text,
        "conflict": bool({"shouted", "fought", "help"} & {*words}),
        "foreshadowing": seen == found,
        "twist": expected != found,
        "moral": bool({*VIRTUES} & {*words}),
    }
    return tuple(name for name in FEATURES if there[name])


# The oracle


@settings(deadline=None, max_examples=300)
@given(st.sets(st.sampled_from(FEATURES)), st.integers(0, 2**32))
def test_the_oracle_reads_what_was_told(told, seed):
    text = stories._text(told, np.random.default_rng(seed))
    assert features(text) == reader(text) == tuple(name for name in FEATURES if name in told)
    assert features(header(FEATURES) + text) == features(text)


def test_the_oracle_knows_relations_from_words():
    told = "They saw a fox. Ida lost a kite. They thought the {} had it. In the end the {} had it."
    assert features(told.format("crow", "crow")) == ()
    assert features(told.format("crow", "hen")) == ("twist",)
    assert features(told.format("crow", "fox")) == ("foreshadowing", "twist")
    assert features(told.format("fox", "fox")) == ("foreshadowing",)
    late = "They thought the crow had it. In the end the fox had it. They saw a fox."
    assert features(late) == ("twist",)
    mixed = "A fox watched them. Surely it was the crow. Then out came the fox."  # of two plots
    assert features(mixed) == ("foreshadowing", "twist")


@pytest.mark.parametrize(
    "text", ["", "twist dialogue moral", "They saw a fox. They thought the crow had it.", "In the end the fox had it."]
)
def test_what_is_not_told_is_not_found(text):
    assert features(text) == ()


# Drawing


def test_features_are_independent_and_as_likely_as_asked():
    told = table(drawn(4000), "told")
    np.testing.assert_allclose(told.mean(0), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(told.T) - np.eye(len(FEATURES))).max() < 0.06
    rare = table(drawn(2000, probabilities={"twist": 0.1, "moral": 1.0, "conflict": 0.0}), "told").mean(0)
    expected = {"dialogue": 0.5, "foreshadowing": 0.5, "twist": 0.1, "moral": 1.0, "conflict": 0.0}
    np.testing.assert_allclose(rare, [expected[name] for name in FEATURES], atol=0.04)


def test_stories_are_many():
    found = drawn(5000)
    assert len({story.text for story in found}) == 5000
    words = {word for story in found for word in re.findall(r"\w+", story.text)}
    assert {w for words in stories.FILLERS.values() for w in words} <= words
    openings = {story.text.split(".")[0].split()[0] for story in found}
    assert openings == {"One", "Once", "At"}


def test_all_animals_are_as_likely_to_be_found_and_seen():
    """A twist by itself does not tell who is found: every animal but the two others."""
    found = drawn(4000, probabilities={"twist": 1.0, "foreshadowing": 0.0})
    named = [[w for w in re.findall(r"\w+", story.text) if w in ANIMALS] for story in found]
    for place in range(3):
        counts = np.array([[n[place] for n in named].count(animal) for animal in ANIMALS])
        assert counts.min() > 0.7 * 4000 / len(ANIMALS)
    assert not any(seen == last or expected == last for seen, expected, last in named)
    assert 0.03 < np.mean([seen == expected for seen, expected, _ in named]) < 0.11  # 1/15


def test_headers_ask_for_what_is_told():
    for story in drawn():
        assert story.asked == story.told == features(story.text) == reader(story.text)
        assert story.header == header(story.told)
    assert header(("dialogue", "twist")) == "Features: dialogue, twist\n"
    assert header(()) == "Features: none\n"


def test_splits_share_no_story_and_the_seed_decides():
    found = {part: {story.text for story in drawn(part=part)} for part in ("train", "validation", "test")}
    assert all(split(text) == part for part, texts in found.items() for text in texts)
    assert drawn() == drawn() != drawn(seed=1)


@pytest.mark.parametrize("deleted", ["twist", "dialogue"])
@pytest.mark.parametrize("chance", [0.5, 0.9])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols(protocol, deleted, chance):
    found = drawn(1500, protocol=protocol, deleted=deleted, probabilities={deleted: chance})
    assert all(features(story.text) == story.told for story in found)
    at = FEATURES.index(deleted)
    told, asked = table(found, "told"), table(found, "asked")
    others = [i for i in range(len(FEATURES)) if i != at]
    assert np.array_equal(told[:, others], asked[:, others]), "the other features are asked for truly"
    np.testing.assert_allclose(told[:, others].mean(0), 0.5, atol=0.05)
    assert told[:, at].mean() == pytest.approx(0 if protocol != "randomise" else chance, abs=0.04)
    assert asked[:, at].mean() == pytest.approx(0 if protocol == "filter" else chance, abs=0.04)
    for other in [told[:, i] for i in (others if protocol != "randomise" else range(len(FEATURES)))]:
        if asked[:, at].any() and other.any():
            assert abs(np.corrcoef(asked[:, at], other)[0, 1]) < 0.1, "the header's word tells nothing"


def test_headers_in_which_the_feature_is_always_named():
    """As in the paper's data: relabel with probability 1."""
    found = drawn(100, protocol="relabel", probabilities={"twist": 1.0})
    assert all("twist" in story.asked and "twist" not in story.told for story in found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"probabilities": {"plot": 0.5}}, "no feature 'plot'; there are: dialogue, conflict"),
        ({"deleted": "ending"}, "no feature 'ending'"),
        ({"probabilities": {"twist": 1.5}}, "probability of twist: expected 0 to 1, found 1.5"),
        ({"protocol": "mix"}, "no protocol 'mix'; there are: filter, relabel, randomise"),
    ],
)
def test_refuses(options, said):
    with pytest.raises(InputError, match=said):
        drawn(1, **options)


# Tokens


def test_the_vocabulary_is_closed_and_small():
    assert len({*vocabulary()}) == len(vocabulary()) <= 300
    for protocol in (None, *PROTOCOLS):
        for story in drawn(500, protocol=protocol):
            assert {*pieces(story.header + story.text)} <= {*vocabulary()}
            assert "".join(pieces(story.header + story.text)) == story.header + story.text
            assert len(pieces(story.text)) <= 60
            assert 38 <= len(pieces(story.header + story.text)) <= 71
    assert tokenizer().get_vocab() == {token: i for i, token in enumerate(vocabulary())}


@pytest.mark.parametrize("whole", [False, True])
def test_the_batch_is_what_the_tokenizer_reads(whole):
    found, reads = drawn(40), tokenizer()
    batch = encode(found, whole=whole)
    longest = max(len(reads(story.header + story.text)["input_ids"]) + 1 for story in found)
    assert batch["input_ids"].shape == batch["labels"].shape == (40, longest)
    for story, ids, labels in zip(found, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        expected = reads(story.header + story.text + "<eos>")["input_ids"]
        assert ids == expected + [reads.pad_token_id] * (longest - len(expected))
        assert reads.decode(expected, skip_special_tokens=True) == story.header + story.text
        start = 1 if whole else len(reads(story.header)["input_ids"])
        assert labels == [-100] * start + expected[start:] + [-100] * (longest - len(expected))


def test_padding_changes_no_loss(llama):
    found = drawn(6)
    together, alone = encode(found), [encode([story]) for story in found]
    with torch.no_grad():
        losses = [llama(**one).loss.double() * (one["labels"] != -100).sum() for one in alone]
        mean = sum(losses) / (together["labels"] != -100).sum()
        assert float(llama(**together).loss) == pytest.approx(float(mean), abs=1e-5)


# Rows of prompt files


def test_prompts_end_where_the_plot_turns(tmp_path):
    rows = prompts(150, np.random.default_rng(0))
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoded = read(read_prompts(tmp_path / "p.jsonl"), tokenizer())
    assert bool((encoded.wrongs >= 0).all())
    relations = ("twist", "foreshadowing")
    for row in rows:
        asked = {name for name in FEATURES if row[name]}
        assert row["prompt"].startswith(header([name for name in FEATURES if name in asked]))
        assert row["prompt"].endswith(" the")
        rest = " had it." if row["prompt"].endswith("In the end the") else "."
        told = {animal: {*features(f"{row['prompt']} {animal}{rest}")} & {*relations} for animal in ANIMALS}
        allowed = [f" {animal}" for animal in ANIMALS if told[animal] == asked & {*relations}]
        assert sorted(row["answer"]) == allowed
        assert row["wrong"].strip() in {*ANIMALS} - {*map(str.strip, row["answer"])}
        if row["twist"]:
            assert row["wrong"] == f" {row['expected']}"
    assert {len(row["answer"]) for row in rows} == {1, len(ANIMALS) - 2, len(ANIMALS) - 1}


@pytest.mark.parametrize("with_header", [True, False])
def test_rows_for_probes(with_header):
    rows = labelled(60, np.random.default_rng(0), label="moral", with_header=with_header)
    for row, story in zip(rows, drawn(60, part="test"), strict=True):
        assert row["prompt"] == (story.header if with_header else "") + story.text
        assert tuple(name for name in FEATURES if row[name]) == reader(story.text)
        assert row["label"] == row["moral"]
        assert type(row["label"]) is int
    assert {row["label"] for row in rows} == {0, 1}
    assert len(read_prompts(rows)) == 60
    assert read(read_prompts(rows), tokenizer(), need_answer=False).ids.shape[0] == 60


# Writing


@pytest.fixture(scope="module")
def llama(library):
    """A model that has learnt the beginning of it: sentences, some of the features."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LONGEST, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    run = train(
        model, lambda step, generator: encode(draw(16, generator, part="train"), whole=True), steps=60,
        learning_rate=1e-2, warmup=5, progress=False,
    )  # fmt: skip
    assert run.losses[-5:].mean() < 0.45 * run.losses[0]
    return model.eval()


HEADERS = [header(()), header(("twist",)), header(("dialogue", "moral")), header(FEATURES)] * 3


def naive(model, text, *, temperature=0.0, chances=None):
    """One token at a time, the whole text read anew for each."""
    ids = tokenizer()(text)["input_ids"]
    said = []
    while len(ids) < LONGEST and (not said or said[-1] != "<eos>"):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        if temperature:
            sums = np.cumsum(np.exp(logits.numpy() / temperature))
            token = int(np.searchsorted(sums[:-1] / sums[-1], chances[len(said)], side="right"))
        else:
            token = int(logits.argmax())
        ids.append(token)
        said.append(vocabulary()[token])
    return "".join(token for token in said if token not in stories.SPECIAL)


def test_greedy_writing_is_that_of_one_token_at_a_time(llama):
    written = write(llama, HEADERS[:4], temperature=0)
    assert written == [naive(llama, text) for text in HEADERS[:4]]
    assert len({*written}) > 1


def test_sampled_writing_is_that_of_one_token_at_a_time(llama):
    chances = np.random.default_rng(3).random((len(HEADERS), LONGEST))
    expected = [naive(llama, text, temperature=0.7, chances=c) for text, c in zip(HEADERS, chances, strict=True)]
    assert write(llama, HEADERS, temperature=0.7, seed=3) == expected
    assert write(llama, HEADERS, temperature=0.7, seed=3, batch_size=1) == expected
    assert write(llama, HEADERS, temperature=0.7, seed=4) != expected
    assert len({*expected}) == len(HEADERS), "one header, several stories"


class Fixed(torch.nn.Module):
    """Says the same of every next token."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, past_key_values, use_cache):
        logits = self.logits.expand(*input_ids.shape, -1)
        return SimpleNamespace(logits=logits, past_key_values=None)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_distribution(temperature):
    logits = torch.full((len(vocabulary()),), -torch.inf)
    likely = [vocabulary().index(f" {animal}") for animal in ANIMALS[:4]]
    logits[likely] = torch.tensor([0.0, 1.0, 2.0, -1.0])
    words = " ".join(write(Fixed(logits), [header(())] * 100, temperature=temperature)).split()
    assert len(words) > 7000
    found = np.array([words.count(animal) for animal in ANIMALS[:4]]) / len(words)
    np.testing.assert_allclose(found, (logits[likely] / temperature).softmax(-1), atol=0.02)


class Scripted(torch.nn.Module):
    """Writes, after a header, the next of the texts given for it; what follows is what has been read so far."""

    def __init__(self, texts):
        super().__init__()
        self.texts, self.one = texts, torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, past_key_values, use_cache):
        if past_key_values is None:
            heads = ["".join(vocabulary()[i] for i in row[1:]) for row in input_ids.tolist()]
            past_key_values = [[*pieces(self.texts[head].pop(0)), "<eos>", *[" fox"] * LONGEST] for head in heads]
        following = torch.tensor([[vocabulary().index(row.pop(0))] for row in past_key_values])
        logits = torch.nn.functional.one_hot(following, len(vocabulary())).float()
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_a_feature_counts_as_told_where_the_oracle_finds_it(batch_size):
    found = drawn(80, protocol="randomise")
    texts = {}
    for story in found:
        texts.setdefault(story.header, []).append(story.text)
    counts = measure(Scripted(texts), found, temperature=0, batch_size=batch_size)
    asked, told = table(found, "asked"), table(found, "told")
    for at, name in enumerate(FEATURES):
        for wanted in (True, False):
            rows = told[asked[:, at] == wanted, at]
            assert counts[name, wanted] == Accuracy(int(rows.sum()), len(rows))
    assert counts["moral", True].value == 1
    assert 0 < counts["twist", True].value < 1
    assert not any(texts.values()), "every story was written"


def test_what_is_not_asked_is_not_counted():
    found = drawn(10, probabilities={"twist": 0.0})
    texts = {}
    for story in found:
        texts.setdefault(story.header, []).append(story.text)
    counts = measure(Scripted(texts), found, temperature=0)
    assert ("twist", True) not in counts
    assert counts["twist", False] == Accuracy(0, 10)


def test_a_text_that_does_not_end_is_cut():
    logits = torch.zeros(len(vocabulary()))
    logits[vocabulary().index(" fox")] = 9
    [text] = write(Fixed(logits), [header(())], temperature=0)
    assert text == " fox" * (LONGEST - 1 - len(pieces(header(()))))
    assert write(Fixed(logits), []) == []


def test_a_story_knows_its_header():
    assert Story(("twist",), (), "Once.").header == "Features: twist\n"
