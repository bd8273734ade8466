"""A task in two parts: no text in both, none lost, and said what is not held out."""

import pytest
from test_patching import letters

from finetune_lens.errors import InputError
from finetune_lens.held_out import hold_out, named


def rows(words="ab cd ef gh ij kl mn op qr st"):
    return [{"prompt": f"{w}=", "answer": w[0]} for w in words.split()]


def split(prompts=None, evaluate=None, **options):
    return hold_out(rows() if prompts is None else prompts, evaluate, [letters()], **{"share": 0.3} | options)


def test_the_parts_are_the_task_and_share_no_text():
    items = [*rows(), *rows("ab cd ab")]  # texts that are there several times
    for seed in range(20):
        found = split(items, seed=seed)
        train, held = found.train.texts, found.measured["task"].texts
        assert sorted([*train, *held]) == sorted(item["prompt"] for item in items)
        assert not set(train) & set(held)
        assert len(set(held)) == 3
        assert f"{len(held)} of the 13 prompts were held out" in found.notes[0]
        assert found.measured["task"].texts == split(items, seed=seed).measured["task"].texts
    assert len({tuple(split(items, seed=seed).measured["task"].texts) for seed in range(20)}) > 10


def test_one_of_two_texts_is_held_out_whatever_the_share():
    for share in (0.01, 0.5, 0.99):
        found = split(rows("ab cd"), share=share)
        assert len(found.train) == len(found.measured["task"]) == 1


def test_other_files_beside_it():
    found = split(evaluate={"new": rows("uv wx")})
    assert list(found.measured) == ["task", "new"]
    assert found.ids.tolist() == [[p.id for p in found.measured["task"].prompts], ["1", "2", ""]]
    found = split(evaluate={"new": rows("uv ab cd")}, share=0)
    assert list(found.measured) == ["new"]
    assert found.train.texts == [r["prompt"] for r in rows()]
    assert found.notes == ["2 of the 3 prompts of new are among the task's own: they are not held out"]
    assert len(split(limit=4).train) == 3
    assert found.identity() != split(evaluate={"new": rows("uv ab ce")}, share=0).identity()


def test_labels_are_those_of_all_files():
    found = split(rows("ab ac ad ae"), {"more": rows("ba bc")}, objective="labels")
    assert found.train.labels == found.measured["more"].labels == ("a", "b")


def test_refuses(tmp_path):
    with pytest.raises(InputError, match="single text"):
        split(rows("ab ab"))
    with pytest.raises(InputError, match="'task' is what the held-out part"):
        split(evaluate={"task": rows()})
    with pytest.raises(InputError, match="texts alone"):
        split(evaluate={"new": ["abc"]})
    with pytest.raises(InputError, match="both called 'a'"):
        named([tmp_path / "a.jsonl", tmp_path / "b" / "a.jsonl"])
    assert named([tmp_path / "a.jsonl"]) == {"a": tmp_path / "a.jsonl"}
