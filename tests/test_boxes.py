"""Boxes and indirect objects: answers as the text has them, counterfactuals that mean what they say, tokens aligned."""

import json
import re

import numpy as np
import pytest

from finetune_lens.errors import InputError
from finetune_lens.tasks import boxes, ioi

CHANGED = {"object", "label", "position", "query"}


def rows(counterfactual, n=150, seed=0, **options):
    return boxes.draw(n, np.random.default_rng(seed), counterfactual=counterfactual, **options)


def scene(prompt):
    """(object, label) of every box, and the label that is asked for, read off the text."""
    told, asked = prompt.split(". Box ")
    return re.findall(r"[Tt]he (\w+) is in Box ([A-Z])", told), asked.split()[0]


# Boxes


def test_a_scene_reads_as_the_paper_s():
    given = boxes.Scene(("magnet", "egg", "cup"), ("X", "T", "B"))
    assert given.prompt(0) + given.answer(0) + "." == (
        "The magnet is in Box X, the egg is in Box T, the cup is in Box B. Box X contains the magnet."
    )


@pytest.mark.parametrize("kind", boxes.COUNTERFACTUALS)
@pytest.mark.parametrize("count", [3, 7, 12])
def test_scenes_are_drawn_right_and_answers_are_in_the_text(kind, count):
    for row in rows(kind, 40, boxes=count, queries=2):
        told, asked = scene(row["prompt"])
        assert len({thing for thing, _ in told}) == len({label for _, label in told}) == count == row["boxes"]
        assert boxes.solve(row["prompt"]) == row["answer"] == " " + {b: a for a, b in told}[asked]
        assert told[row["query"]] == (row["answer"].strip(), row["label"])
        assert asked == row["label"]
        assert scene(row["corrupt"])[1] == row["corrupt_label"]
        assert row["labels"] == "".join(label for _, label in told)
        assert row["objects"] == " ".join(thing for thing, _ in told)
        assert row["wrong"].strip() in row["objects"].split()
        assert row["wrong"] != row["answer"]


@pytest.mark.parametrize("kind", sorted(CHANGED))
def test_a_counterfactual_never_has_the_clean_answer(kind):
    # The published data: one in seven. Over 1500 rows of 3 to 7 boxes not one.
    drawn = [row for count in (3, 5, 7) for row in rows(kind, 250, seed=count, boxes=count, queries=2)]
    assert len(drawn) == 1500
    for row in drawn:
        assert row["corrupt_answer"] != row["answer"]
        assert boxes.solve(row["corrupt"]) not in {row["answer"], None}
        assert row["corrupt_query"] != row["query"]
        assert scene(row["corrupt"])[0][row["corrupt_query"]][1] == scene(row["corrupt"])[1]


def test_every_position_is_asked_for_and_the_answer_s_position_is_not_told_by_it():
    drawn = rows("position", 1400)
    asked = np.array([[row["query"], row["corrupt_query"]] for row in drawn])
    for column in asked.T:
        assert np.bincount(column, minlength=7) == pytest.approx(200, abs=60)
    assert boxes.chance() == 1 / 7
    assert boxes.chance(4) == 0.25
    guess = np.mean([row["objects"].split()[0] == row["answer"].strip() for row in drawn])
    assert guess == pytest.approx(boxes.chance(), abs=0.04)


def test_each_counterfactual_changes_what_it_says_and_shares_nothing_else():
    for row in rows("object"):
        assert row["corrupt_answer"] == boxes.solve(row["corrupt"])
    for row in rows("position"):
        assert row["corrupt_answer"] == row["wrong"] == " " + row["objects"].split()[row["corrupt_query"]]
    for row in rows("label"):
        (told, _), (other, asked) = scene(row["prompt"]), scene(row["corrupt"])
        place = row["labels"].index(asked)
        assert row["corrupt_answer"] == row["wrong"] == " " + told[place][0]
        assert place not in {row["query"], row["corrupt_query"]}, "else the position would say the same"
        assert {label for _, label in told} & {label for _, label in other} == {asked}
    for row in rows("query"):
        assert row["corrupt_answer"] == row["wrong"] == boxes.solve(row["corrupt"])
        words, corrupt = row["prompt"].split(), row["corrupt"].split()
        assert [i for i, pair in enumerate(zip(words, corrupt, strict=True)) if len(set(pair)) == 2] == [len(words) - 3]
    for row in rows("random"):
        assert "corrupt_answer" not in row
        assert "corrupt_query" not in row
        assert boxes.solve(row["corrupt"]) is None, "the box asked for is not there"
        assert scene(row["corrupt"])[1] not in row["labels"]
    for kind in boxes.COUNTERFACTUALS:
        for row in rows(kind):
            (told, _), (other, asked) = scene(row["prompt"]), scene(row["corrupt"])
            if kind == "query":
                assert told == other
                continue
            assert not {thing for thing, _ in told} & {thing for thing, _ in other}
            if kind != "label":
                assert not {label for _, label in told} & {*(label for _, label in other), asked}


def test_prompts_are_aligned_and_answers_are_one_token():
    reads = boxes.tokenizer()
    assert reads.get_vocab() == {token: i for i, token in enumerate(boxes.vocabulary())}
    for kind in boxes.COUNTERFACTUALS:
        for row in rows(kind, 20):
            prompt, corrupt = reads(row["prompt"])["input_ids"], reads(row["corrupt"])["input_ids"]
            assert len(prompt) == len(corrupt)
            differ = {i for i, (a, b) in enumerate(zip(prompt, corrupt, strict=True)) if a != b}
            words = reads.convert_ids_to_tokens(prompt)
            assert all(words[i].strip() in {*boxes.LABELS, *boxes.OBJECTS} for i in differ)
            assert words == ["<bos>", *boxes.pieces(row["prompt"])]
            for answer in (row["answer"], row["wrong"], row.get("corrupt_answer", row["wrong"])):
                whole = reads(row["prompt"] + answer)["input_ids"]
                assert whole[:-1] == prompt
                assert reads.convert_ids_to_tokens(whole[-1]) == answer
            assert reads.decode(prompt, skip_special_tokens=True) == row["prompt"]


def test_further_words_come_after_the_scenes_own():
    reads = boxes.tokenizer(["Put", " put", " 12"])
    assert len(reads) == len(boxes.vocabulary()) + 3
    assert reads.tokenize("Put, put 12 in X.") == ["Put", ",", " put", " 12", " in", " X", "."]


def test_no_scene_is_in_two_splits():
    parts = {}
    for part in ("train", "validation", "test"):
        drawn = [boxes.draw_scene(np.random.default_rng(seed), part=part) for seed in range(60)]
        assert {boxes.split(given) for given in drawn} == {part}
        parts[part] = {given.text for given in drawn}
    assert not parts["train"] & parts["test"]
    for row in rows("object", 20, part="validation"):
        for prompt in (row["prompt"], row["corrupt"]):
            told, _ = scene(prompt)
            assert boxes.split(boxes.Scene(*zip(*told, strict=True))) == "validation"


def test_the_seed_decides_and_rows_are_json():
    one, two, other = rows("label", 20), rows("label", 20), rows("label", 20, seed=1)
    assert one == two != other
    assert json.loads(json.dumps(one)) == one
    assert len({row["id"] for row in rows("label", 5, queries=7)}) == 35
    for number in range(5):
        asked = [row["query"] for row in rows("label", 5, queries=7) if row["scene"] == number]
        assert sorted(asked) == list(range(7))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"boxes": 2}, "3 to 12"), ({"boxes": 13}, "3 to 12"), ({"queries": 8}, "1 to 7"), ({"queries": 0}, "1 to 7")],
)
def test_scenes_that_cannot_be_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        rows("label", 1, **options)
    with pytest.raises(InputError, match="position"):
        rows("nonsense", 1)
    with pytest.raises(ValueError, match="Hello"):
        boxes.solve("Hello")


# Indirect objects


@pytest.mark.parametrize("kind", ioi.COUNTERFACTUALS)
def test_indirect_objects(kind):
    drawn = ioi.draw(400, np.random.default_rng(0), counterfactual=kind)
    assert drawn == ioi.draw(400, np.random.default_rng(0), counterfactual=kind)
    assert drawn != ioi.draw(400, np.random.default_rng(1), counterfactual=kind)
    assert {(row["order"], row["template"]) for row in drawn} == {
        (order, number) for order in ioi.ORDERS for number in range(len(ioi.TEMPLATES))
    }
    for row in drawn:
        named = [word.strip(",") for word in row["prompt"].split() if word.strip(",") in ioi.NAMES]
        io, subject = row["io"], row["subject"]
        assert named == ([io, subject, subject] if row["order"] == "ABBA" else [subject, io, subject])
        assert (row["answer"], row["wrong"]) == (f" {io}", f" {subject}")
        assert row["prompt"].endswith(" to")
        assert f"the {row['place']}" in row["prompt"]
        assert f"a {row['object']} to" in row["prompt"]
        words, corrupt = row["prompt"].split(" "), row["corrupt"].split(" ")
        differ = [(a.strip(","), b.strip(",")) for a, b in zip(words, corrupt, strict=True) if a != b]
        if kind == "swap":
            assert differ == [(subject, io)]
            assert row["corrupt_answer"] == row["wrong"]
        else:
            assert [a for a, _ in differ] == named
            assert len({io, subject, *(b for _, b in differ)}) == 5
            assert "corrupt_answer" not in row


def test_one_order_can_be_asked_for():
    assert {row["order"] for row in ioi.draw(10, np.random.default_rng(0), order="BABA")} == {"BABA"}
    with pytest.raises(InputError, match="ABBA, BABA"):
        ioi.draw(1, np.random.default_rng(0), order="AABB")
    with pytest.raises(InputError, match="abc, swap"):
        ioi.draw(1, np.random.default_rng(0), counterfactual="none")
    assert len(set(ioi.NAMES)) == len(ioi.NAMES)
