"""Edits of chains: what they change, what they leave, and that they follow from a seed alone."""

import json
import re
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lens.cot.answers import ONES
from finetune_lens.cot.edits import (
    CONTENT,
    INSTRUCTIONS,
    STRUCTURE,
    FileEditor,
    LocalEditor,
    Place,
    RuleEditor,
    corrupt,
    corrupt_digits,
    delete,
    drop_keywords,
    entities,
    filler,
    generator_of,
    insert,
    mistake,
    paraphrase,
    shuffle,
    wrong_answer,
)
from finetune_lens.cot.edits.corruptions import KEYWORDS
from finetune_lens.cot.edits.mistakes import changed_digits
from finetune_lens.cot.edits.paraphrases import OPENERS
from finetune_lens.cot.questions import Question, read_questions
from finetune_lens.cot.steps import split_steps
from finetune_lens.errors import InputError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")

ASKED = Question("q1", "How many eggs does Ann have?", "18")
SEEDS = st.integers(0, 2**32)
TEXTS = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            ["So", "he", "buys", "two", "pens", "isn't", "1,200", ".75", "#1", "<<2*3=6>>6", "=", "+", "$", "In May,",
             "Ann", "and Bob", "the dog and the cat", "not", "cannot", "1.", "Step 2:", "If", "0", "2nd", "\n", "."]
        ),
        max_size=20,
    ).map(" ".join),
)  # fmt: skip


def rng(seed=0):
    return np.random.default_rng(seed)


def steps_of(name):
    return [(q, i, s) for q in read_questions(DATA / name) for i, s in enumerate(split_steps(q.chain))]


# Mistakes


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, SEEDS)
def test_a_mistake_changes_the_step_or_is_none(step, context, seed):
    found = mistake(step, rng(seed), context=context)
    assert found != step
    assert found == mistake(step, rng(seed), context=context)


@settings(max_examples=300, deadline=None)
@given(
    st.from_regex(r"[0-9]{1,3}(,[0-9]{3}){1,2}(\.[0-9]{1,2})?|[0-9]{1,9}(\.[0-9]{1,3})?|\.[0-9]{1,3}", fullmatch=True),
    SEEDS,
)
def test_a_changed_number_is_another_written_alike(digits, seed):
    found = changed_digits(digits, rng(seed))
    old, new = (Decimal(text.replace(",", "")) for text in (digits, found))
    assert new != old
    assert new >= 0
    assert new.as_tuple().exponent == old.as_tuple().exponent  # as many decimals
    assert digits.startswith(".") == found.startswith(".") or new >= 1
    if "," in digits:
        assert found == f"{new:,}"
    if digits.isdigit() and 1000 <= old < 2100:
        assert abs(new - old) <= 60
    elif old:
        _, leading, exponent = old.normalize().as_tuple()
        leading = int("".join(map(str, leading)))
        assert abs(new - old) <= max(3, leading // 2) * Decimal(10) ** exponent
        assert (new / Decimal(10) ** exponent) % 1 == 0  # round numbers stay as round


@pytest.mark.parametrize(
    ("step", "pattern"),
    [
        ("He has 2 + 3 = 5 eggs.", r"He has 2 \+ 3 = (?!5 )\d+ eggs\."),  # the result
        ("So 9*2 = $<<9*2=18>>18.", r"So 9\*2 = \$<<9\*2=(?!18>)(\d+)>>\1\."),  # and its annotation
        ("1. He has 7.", r"1\. He has (?!7)\d+\."),  # not the number of the list
        ("Step 3: it was 1912.", r"Step 3: it was (?!1912)1(8|9)\d\d\."),
        ("See #1 and the 2nd of 40.", r"See #1 and the 2nd of (?!40)\d+\."),
        ("He has four eggs.", r"He has (?!four)[a-z]+ eggs\."),
        ("It is sixty eight.", "It is not sixty eight."),  # no part of a number
        ("She came in June.", r"She came in (?!June)[A-Z][a-z]+\."),
        ("He came before her.", r"He came after her\."),
        ("We have x * y.", r"We have x / y\."),
        ("A ten-acre farm is his.", r"A ten-acre farm is not his\."),
        ("Eggs are not cheap.", r"Eggs are not expensive\."),
        ("Eggs aren't red.", r"Eggs are red\."),
        ("It won't rain.", r"It will rain\."),
        ("He can't swim.", r"He can swim\."),
        ("A can of beans can last.", r"A can of beans cannot last\."),
        ("There is no rain.", r"There is some rain\."),
        ("Penguins live here.", r"Penguins do not live here\."),
        ("It contains iron.", r"It does not contain iron\."),
        ("He died young.", r"He did not die young\."),
    ],
)
def test_what_a_mistake_is(step, pattern):
    for seed in range(20):
        assert re.fullmatch(pattern, mistake(step, rng(seed)) or ""), mistake(step, rng(seed))


def test_entities_take_each_others_places():
    context = "Did Ann meet Bob in New York? She met Bob."
    assert entities(context) == ["Ann", "Bob", "New York"]
    assert entities("Bob saw the Bay of Biscay. Would Cy's dog?") == ["Bay of Biscay", "Cy"]
    found = {mistake("She met Bob there.", rng(seed), context=context) for seed in range(30)}
    assert found == {"She met Ann there.", "She met New York there."}
    assert mistake("Then Ann met Bob there", rng(), context="So Ann met Bob") == "Then Bob met Ann there"
    assert mistake("Then Ann slept", rng(), context="So Ann slept") is None


@pytest.mark.parametrize("step", ["", "  ", "Let us think", "Why?", "Is it in here?", "…", "1. Look"])
def test_where_nothing_can_be_changed(step):
    assert mistake(step, rng()) is None


@needs_data
@pytest.mark.parametrize(("name", "least"), [("gsm8k_test.jsonl", 0.99), ("strategyqa_dev.json", 0.97)])
def test_mistakes_are_found_in_real_steps(name, least):
    places = steps_of(name)
    found = [mistake(s, generator_of(0, q.id, i), context=q.question + "\n" + q.chain) for q, i, s in places]
    assert sum(text is not None for text in found) >= least * len(places)
    for (_, _, step), text in zip(places, found, strict=True):
        _, equal, result = step.rpartition("=")
        if text is not None and equal and (old := re.match(r"\s*\$?(\d+)(?![\d.,/a-z])", result)):
            new = re.match(r"\s*\$?(\d+)", text.rpartition("=")[2])
            assert int(new[1]) != int(old[1]), (step, text)  # it is the result that is wrong
            assert text.rpartition("=")[0] == step.rpartition("=")[0]


# Paraphrases


def digits_in(text):
    """Every number of a text, number words from two to twelve and "twice" among them."""
    words = {word: n for n, word in enumerate(ONES) if 2 <= n <= 12}
    counted = [
        w if w.isdigit() else str((words | {"twice": 2}).get(w, "")) for w in re.findall(r"\d+|[a-z]+", text.lower())
    ]
    return Counter(filter(None, counted))


@settings(max_examples=300, deadline=None)
@given(TEXTS, SEEDS)
def test_a_paraphrase_is_another_text_with_the_same_numbers(text, seed):
    found = paraphrase(text, rng(seed))
    assert found == paraphrase(text, rng(seed))
    assert (found != text) == any(map(str.isalnum, text))
    assert Counter(re.findall(r"[0-9]", found)) >= Counter(re.findall(r"[0-9]", text))
    assert re.findall(r"<<.*?>>", found) == re.findall(r"<<.*?>>", text)
    assert found[: len(found) - len(found.lstrip())] == text[: len(text) - len(text.lstrip())]


@needs_data
@pytest.mark.parametrize(("name", "reworded"), [("gsm8k_test.jsonl", 0.6), ("strategyqa_dev.json", 0.3)])
def test_paraphrases_of_real_steps_keep_numbers_and_names(name, reworded):
    places = steps_of(name)[:: 3 if "gsm8k" in name else 1]
    by_rules = 0
    for question, index, step in places:
        found = paraphrase(step, generator_of(0, question.id, index))
        assert found != step
        assert digits_in(found) == digits_in(step), (step, found)
        for entity in entities(f"{question.question}\n{question.chain}"):
            assert len(re.findall(rf"\b{re.escape(entity)}\b", found)) == len(
                re.findall(rf"\b{re.escape(entity)}\b", step)
            )
        assert len(re.findall("[=+*/]", found)) == len(re.findall("[=+*/]", step))
        by_rules += not any(opener in found for opener in OPENERS)
    assert by_rules >= reworded * len(places)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is big because he can't see.", {"It is large since he cannot see."}),
        ("In 3 days, they sell 150 apples.", {"They sell 150 apples in 3 days."}),
        ("He likes the dog and the cat.", {"He likes the cat and the dog."}),
        ("Twelve men ate two or three.", {"Twelve men consumed 2 or 3."}),
        (
            "So an additional egg costs $5.",
            {f"{w} an extra egg is priced at $5." for w in ("Thus", "Hence", "Therefore")},
        ),
        ("1. Then add them.", {"1. Next, add them.", "1. After that, add them."}),
        ("  He isn’t here", {"  He is not here"}),
        ("He runs twice a day.", {"He runs twice per day.", "He runs twice each day."}),
    ],
)
def test_what_a_paraphrase_is(text, found):
    assert {paraphrase(text, rng(seed)) for seed in range(30)} == found


@pytest.mark.parametrize(
    "text",
    [
        "Since 1990 it rained.", "So far it rained.", "He stays at most parks.", "It allows for rain.",
        "A two-legged one.", "It is sixty eight.", "That is two thirds.", "That is two hundred.", "Big Ben rang.",
        "He starts off.", "In fact, it rained.", "On day 1, x is 5.", "In May, iPhone sales rose.", "They turned left.",
        "Walls of the dog and the cat fell.", "The so-called so.", "The one and the other.", "How many eggs?",
        "On Monday, Ann sang and Bob slept.", "It was an enormous inn.",
    ],
)  # fmt: skip
def test_what_would_change_the_meaning_is_left(text):
    for seed in range(10):
        found = paraphrase(text, rng(seed))
        assert any(found == f"{opener} {text}" for opener in OPENERS), found


# Structure and content

WORDS = st.sampled_from(["so", "Then", "5", "12 eggs", "because", "First,", "x", "18", "1,018", "18.0", "yes"])
BODIES = st.lists(WORDS, min_size=1, max_size=5).map(" ".join)
CHAINS = st.builds(
    lambda bodies, gaps, tail: split_steps("".join(b + g for b, g in zip(bodies, gaps, strict=False)) + tail, "line"),
    st.lists(BODIES, min_size=1, max_size=7),
    st.lists(st.sampled_from(["\n", "\n\n", "\n  "]), min_size=7, max_size=7),
    st.sampled_from(["", "\n", " "]),
)
FRACTIONS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 1.0]))
FOREIGN = ["Foreign one.", "\nForeign two. "]


def count(fraction, n):
    """The documented number of units, by decimal rounding."""
    return 0 if fraction == 0 else max(1, int(np.floor(np.float64(fraction) * n + 0.5)))


@settings(max_examples=300, deadline=None)
@given(CHAINS, FRACTIONS, SEEDS, st.sampled_from(STRUCTURE + CONTENT))
def test_corruptions_are_seeded_and_change_something(steps, fraction, seed, kind):
    given_steps = list(steps)
    found = corrupt(kind, steps, fraction, rng(seed), question=ASKED, foreign=FOREIGN)
    assert steps == given_steps
    assert found == corrupt(kind, steps, fraction, rng(seed), question=ASKED, foreign=FOREIGN)
    if found is not None:
        assert (found == steps) == (fraction == 0)
        assert found == [] or kind in CONTENT or "".join(found)[0] == found[0][0] != " "


@settings(max_examples=300, deadline=None)
@given(CHAINS, FRACTIONS, SEEDS)
def test_fractions_of_steps(steps, fraction, seed):
    steps = [f"{step.rstrip()} n{n}" for n, step in enumerate(steps)]  # all different
    bodies, n = [step.strip() for step in steps], count(fraction, len(steps))
    kept = [step.strip() for step in delete(steps, fraction, rng(seed))]
    assert kept == [body for body in bodies if body in kept]
    assert len(kept) == len(bodies) - n
    found = insert(steps, fraction, rng(seed), FOREIGN)
    foreign = [step.strip() for step in found if step.strip() not in bodies]
    assert [step.strip() for step in found if step.strip() in bodies] == bodies
    assert len(foreign) == n
    assert {body.strip() for body in FOREIGN}.issuperset(foreign)
    assert max(Counter(foreign).values(), default=0) <= -(-n // 2)
    mixed = shuffle(steps, fraction, rng(seed))
    if len(steps) < 2:
        assert mixed is None
        return
    assert [len(s) - len(s.lstrip()) for s in mixed] == [len(s) - len(s.lstrip()) for s in steps]
    moved = [step.strip() for step in mixed]
    assert Counter(moved) == Counter(bodies)
    assert sum(a != b for a, b in zip(moved, bodies, strict=True)) == (max(2, n) if n else 0)


@settings(max_examples=300, deadline=None)
@given(CHAINS, FRACTIONS, SEEDS)
def test_fractions_of_content(steps, fraction, seed):
    text = "|".join(steps)
    digits = sum(map(str.isdigit, text))
    found = corrupt_digits(steps, fraction, rng(seed))
    if not digits:
        assert found is None
    else:
        changed = [(a, b) for a, b in zip(text, "|".join(found), strict=True) if a != b]
        assert len(changed) == count(fraction, digits)
        assert all(a.isdigit() and b.isdigit() for a, b in changed)
    words = len(KEYWORDS.findall(text))
    found = drop_keywords(steps, fraction, rng(seed))
    if not words:
        assert found is None
    else:
        assert len(found) == len(steps)
        assert len(KEYWORDS.findall("|".join(found).replace("Because", "because"))) == words - count(fraction, words)
    mentions = re.findall(r"(?<![\d,.])18(?:\.0)?(?![\d,])", text)
    found = wrong_answer(steps, fraction, rng(seed), ASKED)
    if not mentions:
        assert found is None
    else:
        left = Counter(re.findall(r"\d[\d,.]*", "|".join(found))) - Counter(re.findall(r"\d[\d,.]*", text))
        assert sum(left.values()) == count(fraction, len(mentions))
        assert len(left) <= 1  # one wrong answer


def test_wrong_answers_of_every_kind():
    city = Question("c", "Which?", "Rome", ("Paris", "Rome", "Bonn"))
    steps = ["It is rome.", " Rome is not Romeo."]
    found = {tuple(wrong_answer(steps, 1, rng(seed), city)) for seed in range(20)}
    assert found == {(f"It is {w}.", f" {w} is not Romeo.") for w in ("Paris", "Bonn")}
    assert wrong_answer(["So yes."], 1, rng(), Question("b", "?", "true")) == ["So no."]
    assert wrong_answer(["So Ann."], 1, rng(), Question("t", "?", "Ann")) is None
    [found] = wrong_answer(["14,000 and 14000.00 or -14000, not 140,001"], 1, rng(1), replace(ASKED, answer="14,000"))
    numbers = re.findall(r"\d[\d,.]*\d", found)
    assert numbers[3] == "140,001"
    assert len({float(n.replace(",", "")) for n in numbers[:3]} | {14000.0}) == 2
    assert ["," in n for n in numbers] == [True, False, False, True]


def test_corruptions_without_anything_to_corrupt():
    for kind in STRUCTURE + CONTENT:
        assert corrupt(kind, [], 0.5, rng(), question=ASKED, foreign=FOREIGN) is None
    assert shuffle(["a", " a"], 1, rng()) is None
    assert insert(["a"], 1, rng(), [" "]) is None
    assert delete(["a", "\nb\n"], 1, rng()) == []
    for seed in range(10):  # two of one text and one of another: never the identity
        assert shuffle(["a", " a", " b"], 0.1, rng(seed)) != ["a", " a", " b"]
    with pytest.raises(InputError, match=r"corruption: expected one of delete, .*; found 'swap'"):
        corrupt("swap", ["a"], 0.5, rng(), question=ASKED)
    for fraction in (-0.1, 1.1, float("nan")):
        for kind in STRUCTURE + CONTENT:
            with pytest.raises(InputError, match="fraction: expected a share"):
                corrupt(kind, ["so 18", " b"], fraction, rng(), question=ASKED, foreign=FOREIGN)


# Filler


class Merging:
    """A tokenizer that joins two units of filler into one token."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": re.findall(r"(?: \.\.\.){1,2}|.", text)}


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_filler_has_the_length_asked_for(n):
    assert filler(n) == " ..." * n
    assert filler(n, unit="_") == "_" * n
    assert filler(n, Merging()) == " ..." * n  # at least n units fit, and no more are given than tokens
    assert filler(n, Merging(), unit="ab") == "ab" * (n // 2)


def test_bad_filler():
    for n, unit in ((-1, "."), (1, "")):
        with pytest.raises(InputError, match="filler: expected a unit and 0 tokens or more"):
            filler(n, unit=unit)


# Editors

CHAIN = ("Ann has 9 eggs.", " So 9 * 2 = 18.", "\n\nIt is 18.\n")
PLACES = [Place(ASKED, sample, CHAIN, step) for sample in (0, 1) for step in range(3)]


@pytest.mark.parametrize("kind", ["mistake", "paraphrase"])
def test_rules_depend_on_seed_question_and_step_alone(kind, in_new_process):
    editor = RuleEditor(kind, seed=3)
    found = editor(PLACES)
    assert found[:3] == found[3:]  # the same text in another sample
    assert [editor([place])[0] for place in PLACES] == found
    assert all(text and text != place.steps[place.step] for text, place in zip(found, PLACES, strict=True))
    assert found[2].startswith("\n\n")
    assert found[2].endswith("\n")
    other = [RuleEditor(kind, seed)([PLACES[1]])[0] for seed in range(20)]
    assert len(set(other)) > 2
    named = [editor([Place(replace(ASKED, id=str(n)), 0, CHAIN, 1)])[0] for n in range(20)]
    assert len(set(named)) > 2
    script = (
        "import sys, tests.test_cot_edits as t\n"
        f"print(t.json.dumps(t.RuleEditor({kind!r}, seed=3)(t.PLACES)))\n"
        "assert 'torch' not in sys.modules"
    )
    other = in_new_process("-c", script, cwd=Path(__file__).parents[1])
    assert json.loads(other.stdout) == found, other.stderr


def test_rules_know_the_names_in_question_and_chain():
    question = Question("q", "Does Ann know Bob?", "yes")
    place = Place(question, 0, ("Here Cy saw Ann.",), 0)
    assert {RuleEditor("mistake", seed)([place])[0] for seed in range(30)} >= {"Here Bob saw Ann.", "Here Cy saw Bob."}
    assert RuleEditor("paraphrase")([Place(question, 0, ("…",), 0)]) == [None]
    with pytest.raises(InputError, match="kind of edit: expected mistake or paraphrase, found 'error'"):
        RuleEditor("error")


def test_edits_from_a_file(tmp_path):
    path = tmp_path / "edits.jsonl"
    rows = [
        {"id": "q1", "step": 1, "text": "So 9 * 2 = 20."},
        {"id": "q1", "sample": 1, "step": 2, "text": " It is 17. "},
        {"id": "q1", "sample": 1, "step": 0, "text": "Ann has 9 eggs."},
        {"id": 5, "step": 0, "text": "x"},
    ]
    path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n")
    editor = FileEditor(path)
    assert editor(PLACES) == [None, " So 9 * 2 = 20.", None, None, None, "\n\nIt is 17.\n"]
    assert editor([Place(replace(ASKED, id="5"), 0, ("y",), 0)]) == ["x"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: expected an object"),
        ('{"id": "a", "step": 0}', "line 2: `text` is None"),
        ('{"id": "a", "step": "0", "text": "x"}', "line 2: `step` is '0'"),
        ('{"id": "a", "step": 0, "sample": true, "text": "x"}', "line 2: `sample` is True"),
        ('{"id": "q1", "step": 0, "text": "y"}', "line 2: a second text for step 0 of sample 0 of question q1"),
    ],
)
def test_bad_files_of_edits(tmp_path, line, says):
    path = tmp_path / "edits.jsonl"
    path.write_text('{"id": "q1", "step": 0, "text": "x"}\n' + line)
    with pytest.raises(InputError, match=rf"edits\.jsonl, {says}"):
        FileEditor(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no edits"):
        FileEditor(path)
    with pytest.raises(InputError, match="is not there"):
        FileEditor(tmp_path / "none.jsonl")


@pytest.fixture(scope="module")
def writer():
    """A random model over bytes that often writes a line's end."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from finetune_lens.hooked import HookedModel

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<eos>"])}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "n_positions": 64}
    torch.manual_seed(1)
    module = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
        newline = tokenizer("\n")["input_ids"][0]
        keep = [newline, *(tokenizer(letter)["input_ids"][0] for letter in "abc ")]
        bias = torch.full((257,), -1e4)
        bias[keep] = 0
        head = torch.nn.Linear(16, 257)
        head.weight.copy_(module.lm_head.weight)
        head.bias.copy_(bias)
        module.lm_head = head
    return HookedModel(module, tokenizer)


def test_edits_by_a_local_model(writer):
    import torch

    instruction, most = "Say: {step}\nNow:", 12
    steps = ("ab", " cd", " ef", "\ngh", " ij", " kl", " mn", " op", " qr", " st", " 12", " 3", " ")
    places = [Place(ASKED, 0, steps, n) for n in range(len(steps))]
    found = LocalEditor(writer, instruction, max_tokens=most)(places)
    for place, text in zip(places, found, strict=True):
        step = place.steps[place.step]
        ids = writer.tokenizer(instruction.replace("{step}", step.strip()))["input_ids"]
        said = ""
        while not said.endswith("\n") and len(said) < most:  # a letter a token
            said += writer.tokenizer.decode([int(writer.run(torch.tensor([ids])).logits[0, -1].argmax())])
            ids = [*ids, writer.tokenizer(said[-1])["input_ids"][0]]
        whole = said.endswith("\n") and said.strip() and step.strip()
        assert text == (step.replace(step.strip(), said.strip()) if whole else None), step
    assert None in found
    assert any(found)
    assert [LocalEditor(writer, instruction, max_tokens=most, batch_size=1)([p])[0] for p in places] == found
    assert LocalEditor(writer, instruction)([]) == []
    with pytest.raises(InputError, match=r"instruction: expected a place \{step\}"):
        LocalEditor(writer, "Say it")
    assert all("{step}" in text for text in INSTRUCTIONS.values())
