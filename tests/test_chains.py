"""Two-hop facts: the splits are those of the definition, by naive joins; texts, counterfactuals and the measure."""

from collections import Counter

import numpy as np
import pytest
import torch

from finetune_lens.errors import InputError
from finetune_lens.tasks.facts import PUBLISHED, SMALL, SPLITS, World

SIZES = {"entities": 12, "relations": 6, "degree": 3, "ood_share": 0.25, "held_share": 0.1, "ratio": 1.5}


@pytest.fixture(scope="module")
def world():
    return World(**SIZES, seed=3)


def named(items):
    return list(zip(*(getattr(items, name).tolist() for name in ("h", "r1", "r2", "b", "t")), strict=True))


def joined(world):
    """Every two-hop item by what its two facts are, from two loops."""
    found = {"both": set(), "one": set(), "neither": set()}
    facts = list(zip(world.atomic.tolist(), world.is_ood.tolist(), strict=True))
    for (h, r1, b), first in facts:
        for (head, r2, t), second in facts:
            if head == b:
                found["both" if first and second else "one" if first or second else "neither"].add((h, r1, r2, b, t))
    return found


# The facts


@pytest.mark.parametrize("seed", range(3))
def test_each_entity_heads_as_many_facts_of_different_relations(seed):
    world = World(**SIZES, seed=seed)
    assert Counter(world.atomic[:, 0].tolist()) == dict.fromkeys(range(12), 3)
    assert len({(h, r) for h, r, _ in world.atomic.tolist()}) == 36
    assert world.atomic.min() >= 0
    assert (world.atomic.max(0) < [12, 6, 12]).all()
    assert world.is_ood.sum() == 9
    assert len(np.unique(world.atomic[:, 2])) > 8, "tails are any entities"


def test_seeds_decide_the_facts(world):
    again, other = World(**SIZES, seed=3), World(**SIZES, seed=4)
    assert (again.atomic == world.atomic).all()
    assert all(named(again.splits[name]) == named(world.splits[name]) for name in SPLITS)
    assert (other.atomic != world.atomic).any()
    assert (other.is_ood != world.is_ood).any()


# The splits


@pytest.mark.parametrize("seed", range(4))
def test_the_splits_are_those_of_a_naive_join(seed):
    world = World(**SIZES, seed=seed)
    pairs, splits = joined(world), {name: named(items) for name, items in world.splits.items()}
    assert all(len(set(found)) == len(found) for found in splits.values())
    assert set(splits["ood"]) == pairs["both"]
    assert set(splits["train"]) <= pairs["neither"]
    assert set(splits["held"]) <= pairs["neither"]
    assert not set(splits["train"]) & set(splits["held"])
    assert len(splits["held"]) == round(0.1 * len(pairs["neither"]))
    assert len(splits["train"]) == min(round(1.5 * 27), len(pairs["neither"]) - len(splits["held"]))


def test_a_ratio_that_cannot_be_met_trains_all_there_is(world):
    whole = World(**{**SIZES, "ratio": 100.0}, seed=3)
    assert set(named(whole.splits["train"])) | set(named(whole.splits["held"])) == joined(world)["neither"]


@pytest.mark.parametrize(
    ("sizes", "atomic", "held", "train"), [(SMALL, 2000, 72, 12240), (PUBLISHED, 40_000, 3610, 273_600)]
)
def test_the_sizes_are_the_published_ones(sizes, atomic, held, train):
    world = World(**sizes)
    splits = {name: len(items) for name, items in world.splits.items()}
    assert len(world.atomic) == atomic
    assert splits["train"] == train == round(7.2 * (1 - sizes["ood_share"]) * atomic)
    assert splits["held"] == pytest.approx(held, rel=0.05)
    assert splits["ood"] == pytest.approx(atomic * sizes["degree"] * sizes["ood_share"] ** 2, rel=0.1)


@pytest.mark.parametrize("bad", [{"degree": 7}, {"degree": 0}, {"ood_share": 1.1}, {"held_share": -0.1}])
def test_sizes_that_cannot_be(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        World(**{**SIZES, **bad})


# The texts


@pytest.mark.parametrize("bridge", [True, False])
def test_tokens_are_those_of_the_written_text(world, bridge):
    reads, items = world.tokenizer(), world.splits["train"]
    batch = world.encode(items, bridge=bridge)
    targets = 1 + bridge
    for row, ids, labels in zip(
        world.rows(items, bridge=bridge), batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
    ):
        assert ids == reads(row["prompt"] + row["answer"])["input_ids"]
        assert labels == 4 * [-100] + ids[-targets:]
        assert row["prompt"] == row["h"] + row["r1"] + row["r2"]
        assert row["answer"] == row["b"] * bridge + row["t"]
        assert reads.decode(ids[1:]) == row["prompt"] + row["answer"]
    assert world.rows(items, bridge=bridge)[0]["h"] == f"<e{items.h[0]}>"


def test_atomic_facts_are_three_tokens_of_which_the_last_is_learnt(world):
    reads, batch = world.tokenizer(), world.encode_atomic(world.atomic)
    for (h, r, t), ids, labels in zip(world.atomic, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert ids == reads(f"<e{h}><r{r}><e{t}>")["input_ids"]
        assert labels == [-100, -100, -100, ids[-1]]


@pytest.mark.parametrize("bridge", [True, False])
def test_a_lesson_has_all_atomic_facts_and_of_the_two_hop_items_those_of_train(world, bridge):
    reads = world.tokenizer()
    batch = world.lesson(6000, np.random.default_rng(0), bridge=bridge)
    texts = Counter()
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        told = [i for i in ids if i != reads.pad_token_id]
        targets = 1 if len(told) == 4 else 1 + bridge
        assert labels == [*((len(told) - targets) * [-100]), *told[-targets:], *((len(ids) - len(told)) * [-100])]
        texts[reads.decode(told[1:])] += 1
    facts = {f"<e{h}><r{r}><e{t}>" for h, r, t in world.atomic}
    items = {row["prompt"] + row["answer"] for row in world.rows(world.splits["train"], bridge=bridge)}
    assert set(texts) == facts | items
    expected = 6000 / len(texts)
    assert all(0.5 * expected < count < 1.6 * expected for count in texts.values())


# Counterfactuals


@pytest.mark.parametrize("what", ["h", "r1", "r2"])
def test_a_counterfactual_is_another_question_with_another_answer(world, what):
    items = world.splits["train"]
    facts = {(h, r): t for h, r, t in world.atomic.tolist()}
    rows, others = world.counterfactual(items, what, np.random.default_rng(1))
    candidates = {}
    for row, (h, r1, r2, b, t) in enumerate(named(items)):
        for new in range(12):
            asked = {"h": h, "r1": r1, "r2": r2} | {what: new}
            bridge = facts.get((asked["h"], asked["r1"]))
            end = facts.get((bridge, asked["r2"]))
            if end is not None and end != t and (what == "r2" or bridge != b):
                candidates.setdefault(row, set()).add((asked["h"], asked["r1"], asked["r2"], bridge, end))
    assert rows.tolist() == sorted(candidates)
    assert len(rows) > 0
    assert all(other in candidates[row] for row, other in zip(rows.tolist(), named(others), strict=True))
    drawn = [named(world.counterfactual(items[rows[:1]], what, np.random.default_rng(n))[1])[0] for n in range(60)]
    assert set(drawn) == candidates[rows[0]], "each of them may be drawn"


def test_a_counterfactual_of_something_else(world):
    with pytest.raises(InputError, match="r1, r2; found 'b'"):
        world.counterfactual(world.splits["ood"], "b", np.random.default_rng(0))


def test_where_there_is_no_counterfactual_the_row_is_left_out():
    world = World(entities=4, relations=1, degree=1, ood_share=0.0, held_share=0.0, seed=0)
    rows, others = world.counterfactual(world.splits["train"], "r1", np.random.default_rng(0))
    assert len(rows) == len(others) == 0


# The measure


class Oracle(torch.nn.Module):
    """Says a fixed token after each prefix that it is told of, the last token of the vocabulary after any other."""

    def __init__(self, after, size):
        super().__init__()
        self.after, self.size = after, size
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, logits_to_keep):
        logits = torch.zeros(len(input_ids), logits_to_keep, self.size)
        for row, ids in enumerate(input_ids.tolist()):
            logits[row, -1, self.after.get(tuple(ids), self.size - 1)] = 1
        return type("Output", (), {"logits": logits})()


def test_the_measure_reads_the_answer_after_the_bridge_that_the_model_gave(world):
    items = world.splits["train"][:6]
    texts = world.encode(items, bridge=True)["input_ids"].tolist()
    after = {tuple(ids[:4]): ids[4] for ids in texts} | {tuple(ids[:5]): ids[5] for ids in texts}
    wrong = (texts[0][4] - 1) % 12 + 2  # another bridge, after which the right answer comes all the same
    after |= {tuple(texts[0][:4]): wrong, (*texts[0][:4], wrong): texts[0][5]}
    after[tuple(texts[1][:5])] = (texts[1][5] - 1) % 12 + 2
    del after[tuple(texts[2][:4])]
    right = world.measure(Oracle(after, len(world.vocabulary)), items, bridge=True, batch_size=4)
    assert right["b"].tolist() == [False, True, False, True, True, True]
    assert right["t"].tolist() == [True, False, False, True, True, True]


def test_the_measure_without_a_bridge(world):
    items = world.splits["train"][:5]
    texts = world.encode(items, bridge=False)["input_ids"].tolist()
    after = {tuple(ids[:4]): ids[4] for ids in texts[:3]}
    right = world.measure(Oracle(after, len(world.vocabulary)), items, bridge=False)
    assert right.keys() == {"t"}
    assert right["t"].tolist() == [True, True, True, False, False]
    assert len(world.measure(Oracle({}, 20), items[:0], bridge=False)["t"]) == 0
