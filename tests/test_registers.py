"""Registers and lookups against an interpreter of their text."""

import re

import numpy as np
import pytest

from finetune_lens.tasks import boxes, registers
from finetune_lens.tasks.boxes import draw_scene, pieces, solve, split


def said(text):
    return "".join(piece for piece, _ in text)


def answers(text):
    return [piece.strip() for piece, asked in text if asked]


def run(text):
    """What the registers hold, by reading the text word for word; the answers to its questions."""
    holds, found = {}, []
    for sentence in text.rstrip(".").split(". "):
        if sentence.startswith("Store"):
            for part in sentence.split(", "):
                word, label = re.fullmatch(r"[Ss]tore (\w+) in ([A-Z])", part).groups()
                holds[label] = word
        elif sentence.startswith("Copy"):
            one, other = re.fullmatch(r"Copy ([A-Z]) to ([A-Z])", sentence).groups()
            holds[other] = holds[one]
        else:
            label, word = re.fullmatch(r"([A-Z]) holds (\w+)", sentence).groups()
            assert holds[label] == word
            found.append(word)
    return found


@pytest.mark.parametrize("copies", [0, 1, 4])
def test_registers(copies):
    generator = np.random.default_rng(copies)
    for _ in range(50):
        text = registers.registers(generator, size=4, copies=copies, questions=6)
        assert run(said(text)) == answers(text)
        assert len(answers(text)) == 6
        assert said(text).count("Copy") == copies


@pytest.mark.parametrize("kind", registers.LOOKUPS)
def test_lookups(kind):
    generator = np.random.default_rng(0)
    for _ in range(50):
        text = registers.lookup(kind, generator, size=5, questions=4)
        told, asked = said(text).split(".", 1) if kind != "follows" else (said(text), said(text))
        pattern = {"follows": r" ([A-Z]) (\w+)", "precedes": r" (\w+) ([A-Z])\b", "tagged": r" (\w+) in ([A-Z])"}[kind]
        pairs = re.findall(pattern, told)[:5]
        holds = dict(pairs) if kind == "follows" else {label: word for word, label in pairs}
        questions = re.findall(r" ([A-Z]) = (\w+)\." if kind == "tagged" else r" ([A-Z]) (\w+)", asked)
        questions = questions[5:] if kind == "follows" else questions
        assert [holds[label] for label, _ in questions] == [word for _, word in questions] == answers(text)


def test_boxes():
    generator = np.random.default_rng(0)
    right = []
    for _ in range(200):
        scene = draw_scene(generator, part="train")
        text = registers.boxes(generator, scene, questions=2, wrong=0.3)
        assert split(scene) == "train"
        first = said(text)[len(scene.text) :].split(". ")[0]
        assert set(answers(text)) <= set(scene.objects)
        prompt = scene.text + first.rsplit(" ", 1)[0]
        right.append(solve(prompt).strip() == answers(text)[0])
    assert 0.6 < np.mean(right) < 0.8


def test_every_piece_is_in_the_vocabulary():
    known = set(boxes.vocabulary(registers.WORDS))
    generator = np.random.default_rng(0)
    texts = [registers.registers(generator, size=7, copies=3, questions=3)]
    texts += [registers.lookup(kind, generator, size=7, questions=3) for kind in registers.LOOKUPS]
    texts += [registers.boxes(generator, draw_scene(generator), questions=3)]
    for text in texts:
        assert {piece for piece, _ in text} <= known
        assert pieces(said(text)) == [piece for piece, _ in text]
    reads = boxes.tokenizer(registers.WORDS)
    assert reads.decode(reads(said(texts[0]), add_special_tokens=False)["input_ids"]) == said(texts[0])
