"""Question files, prompts, steps, and what counts as an answer."""

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lens.cot.answers import extract_answer, number_of, number_text, plain
from finetune_lens.cot.questions import Format, Question, read_questions
from finetune_lens.cot.steps import split_steps
from finetune_lens.errors import InputError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")

FORMAT = Format()
TEXTS = replace(FORMAT, choice="\n- {text}")
NUMERIC = Question("n", "How much?", "18")
BOOLEAN = Question("b", "Is it?", "yes")
CITIES = Question("c", "Which?", "Rome", ("Paris", "Rome", "New Rome", "A dog"))
OPEN = Question("t", "Who?", "The Nile")


# Files


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


ROWS = (
    {"question": "How many?", "answer": 18, "chain": "9 + 9 = 18.", "topic": "sums"},
    {"question": "Which?", "answer": "b", "choices": ["3", "4"], "id": "own"},
    {"question": "Is it?", "answer": False, "id": 7},
    {"question": "Who?", "answer": "Ann", "chain": ""},
)
READ = [
    Question("1", "How many?", "18", chain="9 + 9 = 18.", fields={"topic": "sums"}),
    Question("own", "Which?", "4", ("3", "4")),
    Question("7", "Is it?", "no"),
    Question("4", "Who?", "Ann", chain=""),
]


def test_lines_and_a_list_are_read_alike(tmp_path):
    lines = write(tmp_path / "q.jsonl", "\ufeff", ROWS[0], ROWS[1], ROWS[2], ROWS[3])
    whole = tmp_path / "q.json"
    whole.write_text(json.dumps(ROWS))
    assert read_questions(lines) == read_questions(str(whole)) == read_questions(iter(ROWS)) == READ
    assert [question.kind for question in READ] == ["numeric", "choices", "boolean", "text"]
    assert read_questions(lines, limit=2) == READ[:2]
    assert read_questions(READ) == READ


def test_blank_lines_keep_their_numbers(tmp_path):
    path = write(tmp_path / "q.jsonl", "\n", ROWS[0], "  \n", ROWS[3])
    assert [question.id for question in read_questions(path)] == ["2", "4"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{question: 1}\n", "line 2 is not JSON"),
        ("[" * 100_000 + "\n", "line 2 is not JSON"),
        ("\x00\n", "line 2 is not UTF-8 text"),
        ("[1]\n", r"line 2: expected an object .*found \[1\]"),
        ({"prompt": "x", "answer": "y"}, "line 2: no `question` among prompt, answer"),
        ({"question": "x", "answer": None}, "line 2: no `answer` among question, answer"),
        ({}, "line 2: no `question` among its fields"),
        ({"question": "", "answer": "y"}, "line 2: `question`: expected text that is not empty"),
        ({"question": "x", "answer": ["y"]}, r"line 2: `answer`: expected text .*\['y'\]"),
        ({"question": "x", "answer": "\ud800"}, "line 2: `answer`: .*not valid Unicode"),
        ('{"question": "x", "answer": NaN}\n', "line 2: `answer`: expected text"),
        ({"question": "x", "answer": "y", "chain": 3}, "line 2: `chain`: expected text, found 3"),
        ({"question": "x", "answer": "y", "choices": "yz"}, "line 2: `choices`: expected a list"),
        ({"question": "x", "answer": "y", "choices": ["y"]}, "line 2: `choices`: expected two or more different"),
        (
            {"question": "x", "answer": "y", "choices": ["y", "The Y."]},
            "line 2: `choices`: expected two or more different",
        ),
        ({"question": "x", "answer": "C", "choices": ["y", "z"]}, "line 2: `answer`: expected one of the choices"),
        ({"question": "x", "answer": "y", "id": True}, "line 2: `id`: expected text or a whole number"),
        ({"question": "x", "answer": "y", "id": "1"}, "line 2: the id '1' is that of line 1"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, line, says):
    path = write(tmp_path / "q.jsonl", {"question": "a", "answer": "b"}, line)
    with pytest.raises(InputError, match=rf"q\.jsonl, {says}"):
        read_questions(path)


def test_other_bad_sources(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "one.json").write_text('{"question": "x", "answer": "y"}')
    (tmp_path / "list.json").write_text('[{"question": "x", "answer": "y"}, 3]')
    for source, says in (
        (tmp_path / "empty.jsonl", "holds no questions"),
        (tmp_path / "one.json", "expected a list of objects"),
        (tmp_path / "list.json", "item 2: expected an object"),
        (tmp_path / "none.jsonl", "is not there"),
        (tmp_path, "questions are read from JSON lines"),
        ([], "the list holds no questions"),
        ({"question": "x"}, "several questions"),
        (3, "several questions"),
        ([{"question": "x"}], "question 1: no `answer`"),
    ):
        with pytest.raises(InputError, match=says):
            read_questions(source)
    with pytest.raises(InputError, match=r"layout: expected auto, .*; found 'mmlu'"):
        read_questions(ROWS, layout="mmlu")
    with pytest.raises(InputError, match=r"limit: .*found 0"):
        read_questions(ROWS, limit=0)


def test_published_layouts_by_their_fields():
    solved = {"question": "How much?", "answer": "It is $<<1+1=2>>2.\n#### 1,002"}
    assert read_questions([solved]) == [Question("1", "How much?", "1,002", chain="It is $2.")]
    assert read_questions([solved], annotations=True)[0].chain == "It is $<<1+1=2>>2."
    facts = {"qid": "a", "question": "Is it?", "answer": True, "term": "t", "evidence": [[[]]]}
    both = facts | {"facts": ["One ", "Two!", ""], "decomposition": ["Is #1 two?"]}
    [asked] = read_questions([both])
    assert (asked.id, asked.answer, asked.chain) == ("a", "yes", "One. Two!")
    assert asked.fields == {"term": "t", "facts": ["One ", "Two!", ""], "decomposition": ["Is #1 two?"]}
    assert read_questions([facts | {"decomposition": ["Who?", "Is #1 two?"]}])[0].chain == "Who? Is #1 two?"
    assert read_questions([facts], layout="strategyqa")[0].chain is None
    for layout, says in (
        ("gsm8k", "`answer`: expected a solution"),
        ("strategyqa", "`answer`: expected true or false"),
    ):
        with pytest.raises(InputError, match=f"question 1: {says}"):
            read_questions([{"question": "x", "answer": "y"}], layout=layout)
    # a chain of our own keeps its answer whatever is in it
    assert read_questions([{"question": "x", "answer": "#### 5", "chain": "c"}])[0].answer == "#### 5"


@needs_data
def test_every_golden_answer_of_gsm8k_is_read():
    path = DATA / "gsm8k_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    questions = read_questions(path)
    assert len(questions) == 1319
    for row, question in zip(rows, questions, strict=True):
        golden = str(int(row["answer"].split("####")[1].replace(",", "")))
        assert question.kind == "numeric"
        assert FORMAT.right(question) == golden
        for text in (
            row["answer"],
            question.chain + FORMAT.cue + FORMAT.answer_of(question) + ".\nQuestion: How many are 5?",
            f" ${question.answer}, not 5",
            f"\\boxed{{{question.answer}}}",
        ):
            assert extract_answer(text, question, FORMAT) == golden, text
        assert "<<" not in question.chain
        assert split_steps(question.chain, "line") == re.split(r"(?<!\n)(?=\n)", question.chain)
    annotated = read_questions(path, annotations=True)
    assert [re.sub("<<.*?>>", "", q.chain) for q in annotated] == [q.chain for q in questions]


@needs_data
def test_the_last_step_of_a_golden_solution_says_its_answer_or_nothing():
    """Sentences nobody wrote to be parsed: what is read from them is right, or is not claimed."""
    questions = read_questions(DATA / "gsm8k_test.jsonl")
    found = [extract_answer(split_steps(q.chain)[-1], q, FORMAT) for q in questions]
    right = sum(answer == FORMAT.right(q) for answer, q in zip(found, questions, strict=True))
    wrong = len(found) - right - found.count(None)
    assert right > 0.97 * len(found)
    assert wrong < 0.006 * len(found)  # units of money, and solutions whose last step is another quantity


@needs_data
def test_strategyqa_as_published():
    questions = read_questions(DATA / "strategyqa_dev.json")
    rows = json.loads((DATA / "strategyqa_dev.json").read_text())
    assert [q.answer for q in questions] == ["yes" if row["answer"] else "no" for row in rows]
    for question, row in zip(questions, rows, strict=True):
        assert question.kind == "boolean"
        assert all(fact.strip() in question.chain for fact in row["facts"])
        text = question.chain + FORMAT.cue + FORMAT.answer_of(question) + ", because"
        assert extract_answer(text, question, FORMAT) == question.answer


# The format


def test_prompts_are_filled_once():
    asked = Question("q", "What is {choices} of {answer}?", "{text}", ("{text}", "{label}"))
    assert FORMAT.prompt_of(asked) == (
        "Question: What is {choices} of {answer}?\n(A) {text}\n(B) {label}\nLet's think step by step.\n"
    )
    boxed = Format(answer=" \\boxed{{answer}}", prompt="{question} {x}")
    assert boxed.answer_of(NUMERIC) == " \\boxed{18}"
    assert boxed.prompt_of(NUMERIC) == "How much? {x}"


def test_options_and_the_right_one():
    assert FORMAT.options_of(CITIES) == (" A", " B", " C", " D")
    assert TEXTS.options_of(CITIES) == (" Paris", " Rome", " New Rome", " A dog")
    assert FORMAT.options_of(BOOLEAN) == (" yes", " no")
    assert FORMAT.options_of(NUMERIC) == FORMAT.options_of(OPEN) == ()
    assert [FORMAT.right(q) for q in (CITIES, BOOLEAN, replace(BOOLEAN, answer="False"))] == [1, 0, 1]
    assert [FORMAT.right(q) for q in (NUMERIC, replace(NUMERIC, answer="$1,800.50"), OPEN)] == ["18", "1800.5", "nile"]
    assert [TEXTS.answer_of(q) for q in (CITIES, BOOLEAN, NUMERIC, OPEN)] == [" Rome", " yes", " 18", " The Nile"]
    many = Question("m", "?", "27", tuple(map(str, range(30))))
    assert TEXTS.right(many) == 27
    for use in (FORMAT.options_of, FORMAT.prompt_of):
        with pytest.raises(InputError, match=r"question m has 30 choices, and labels are 26; leave \{label\} out"):
            use(many)
    bare = Format(prompt="{question}")
    assert bare.prompt_of(NUMERIC) == "How much?"
    with pytest.raises(InputError, match=r"no place \{choices\}"):
        bare.prompt_of(CITIES)
    assert replace(bare, choice="").options_of(CITIES)[1] == " Rome"


def test_a_format_round_trips_and_its_faults_are_named(tmp_path):
    path = tmp_path / "format.json"
    made = Format("{question} :", "", " =", " {answer}", ";", ("end",))
    path.write_text(made.to_json())
    assert Format.load(path) == made
    assert made.stop == ("=", "end")
    path.write_text('{"cue": " So"}')
    assert Format.load(path) == Format(cue=" So")
    assert Format().stop[0] == "So the answer is"
    for text, says in (
        ('{"prompt": "x"}', r"`prompt` of the format: expected a place \{question\}"),
        ('{"answer": "x"}', r"`answer` of the format: expected a place \{answer\}"),
        ('{"choice": "x"}', r"`choice` of the format: expected a place \{text\}"),
        ('{"cue": 3}', "`cue`: expected text, found 3"),
        ('{"steps": "sentences"}', "steps: expected 'sentence', 'line' or a regular expression"),
        ('{"steps": "("}', "steps: .* is not a regular expression"),
        ('{"stop": "x"}', "`stop` of the format: expected a list"),
        ('{"stop": [""]}', "`stop`: expected text"),
        ('{"ask": "x"}', "expected an object of prompt, .*; found ask"),
        ("[]", r"expected an object of prompt, .*; found \[\]"),
        ("{", "is not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"format\.json.*{says}"):
            Format.load(path)
    with pytest.raises(InputError, match="is not there"):
        Format.load(tmp_path / "none.json")


# Steps

PIECES = st.sampled_from(
    ["Mr.", "Dr.", "e.g.", "U.S.", "3.5", "1.", "2)", ".", "...", "!", "?", '"', "'", ")", "(", "He", "he", "It", "x",
     "=", "7", "p.m.", "No.", "Step", "。", "J.", "\n", "\n\n", "\t", "\u2028", "\r", "\x85", ";", "-", "**", " ", "  "]
)  # fmt: skip
CHAINS = st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join), st.lists(PIECES, max_size=30).map(" ".join))


@settings(max_examples=400, deadline=None)
@given(CHAINS, st.sampled_from(["sentence", "line", ";", r"\n+", "(?=[A-Z])", "x*", r"$"]))
def test_splitting_loses_nothing(chain, how):
    steps = split_steps(chain, how)
    assert "".join(steps) == chain
    assert len(steps) <= 1 or not any(step.isspace() or not step for step in steps)
    assert bool(steps) == bool(chain)
    if how == "line":
        assert len(steps) == max(sum(bool(line.strip()) for line in chain.splitlines()), bool(chain))
    if how in ("sentence", "line"):
        assert all(step[:1].isspace() for step in steps[1:]) or "。" in chain


@pytest.mark.parametrize(
    ("chain", "steps"),
    [
        ("One. Two! Three? Four", ["One.", " Two!", " Three?", " Four"]),
        (
            "Mr. and Mrs. Ito pay Dr. Who $3.50. He has 1.5 left.",
            ["Mr. and Mrs. Ito pay Dr. Who $3.50.", " He has 1.5 left."],
        ),
        ("At 5 p.m. he left. At 6 p.m. She came.", ["At 5 p.m. he left.", " At 6 p.m.", " She came."]),
        ("At 5 p.m. 3 men and Bob Jr. left. They sang.", ["At 5 p.m. 3 men and Bob Jr. left.", " They sang."]),
        ("The U.S. Navy won. It is in the U.S. The end.", ["The U.S. Navy won.", " It is in the U.S.", " The end."]),
        ("J. K. Rowling and George W. Bush met.", ["J. K. Rowling and George W. Bush met."]),
        ("So X = B. Then we stop.", ["So X = B.", " Then we stop."]),
        ("1. Add them. 2. Stop.", ["1. Add them.", " 2. Stop."]),
        ("Do this: 1. Add. 2. Stop.", ["Do this: 1. Add.", " 2. Stop."]),
        ("Step 1. Add. Step 2. Stop.", ["Step 1. Add.", " Step 2. Stop."]),
        ("**Step 1.** Add them.\n\n**Step 2.** Stop.", ["**Step 1.** Add them.", "\n\n**Step 2.** Stop."]),
        ("It costs 5. 3 of them cost 15.", ["It costs 5.", " 3 of them cost 15."]),
        (
            "That is 10 lbs. of rice. 2 lbs. So it is heavy.",
            ["That is 10 lbs. of rice.", " 2 lbs.", " So it is heavy."],
        ),
        ('"Stop!" he said. "Why?" She left.', ['"Stop!" he said.', ' "Why?"', " She left."]),
        ("See Fig. 3 and No. 5, e.g. this one.", ["See Fig. 3 and No. 5, e.g. this one."]),
        ("Is it? No. It is not.", ["Is it?", " No.", " It is not."]),
        ("Wait... then 5! = 120. Yes.", ["Wait... then 5! = 120.", " Yes."]),
        ("x = 3\n\n  y = 4\n", ["x = 3", "\n\n  y = 4\n"]),
        ("他有三个。她有四个。", ["他有三个。", "她有四个。"]),
        ("ends. in lower case", ["ends.", " in lower case"]),
        ("", []),
        (" \n ", [" \n "]),
    ],
)
def test_sentences(chain, steps):
    assert split_steps(chain) == steps


def test_other_ways_to_split():
    assert split_steps("a. b\nc\n\n\nd\n", "line") == ["a. b", "\nc", "\n\n\nd\n"]
    assert split_steps("a=3 ; b=4 ; c", " ;") == ["a=3 ;", " b=4 ;", " c"]
    assert split_steps("Step 1 x Step 2 y", r"(?=Step \d)") == ["Step 1 x ", "Step 2 y"]
    assert split_steps("no match", ";") == ["no match"]
    for how, says in (("sentences", "found 'sentences'"), ("", "found ''"), ("[", "is not a regular expression")):
        with pytest.raises(InputError, match=says):
            split_steps("a", how)


# Answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 18", "18"),
        (" $1,234.50 a day.", "1234.5"),
        ("-5", "-5"),
        (" -$5.00", "-5"),
        ("$-5", "-5"),
        (" 1/2", "0.5"),
        (" 1/3 of it", "1/3"),
        (" 2 1/2 hours", "2.5"),
        ("2½", "2.5"),
        ("\\frac{3}{4}", "0.75"),
        (" .75", "0.75"),
        (" 25%", "25"),
        (" 1.5 million", "1500000"),
        (" $80k", "80000"),
        (" 3 x 10^4", "30000"),
        (" 1e3", "1000"),
        (" 400\u00a0000", "400000"),
        (" **18**", "18"),
        (" (18)", "18"),
        (":\n\n18", "18"),
        ("\\boxed{18} apples or 3", "18"),
        (" $18$", "18"),
        (" twenty-five of them", "25"),
        (" one hundred and five", "105"),
        (" two thousand", "2000"),
        (" about 18 dollars.", "18"),
        (" that in total, she makes $18 a day.", "18"),
        (" 18 dollars, not 20.", "18"),
        (" 4 x 5 = 20, not 30", "20"),
        ("x = 3", "3"),
        (" 15 boxes x $6 = $90.", "90"),
        (" 18, since 9 * 2 = 18", "18"),
        ("She has 3.\n#### 18", "18"),
        ("#### 5\n#### 18", "18"),
        ("The answer is 5. No: the answer is 18.", "18"),
        ("Answer: 18\n\nQuestion: 5?\nSo the answer is 6", "18"),
        ("So the answer is 18. So the answer is", "18"),
        ("So the answer is: **18**", "18"),
        ("The final answer:\n18", "18"),
        (" <<9*2=18>>18", "18"),
        (" 18-20", None),
        (" 5 + 3", None),
        (" 5 of 10 or 6", "5"),
        (" between 5 and 6", None),
        (" 12:30", None),
        (" 5, 6", None),
        (" 5/12/2020", None),
        (" 400 000", None),
        (" 1/0", None),
        (" 18, since x = 3", None),
        (" 16 bars for 8 children, so each gets 16/8 = 2", None),
        (" v18", None),
        (" ٣", None),
        (" " + "9" * 5000, None),
        (" unclear", None),
        ("", None),
        ("####", None),
    ],
)
def test_numbers_in_text(text, answer):
    assert extract_answer(text, NUMERIC, FORMAT) == answer


@pytest.mark.parametrize(
    ("text", "labelled", "listed"),
    [
        (" B", "Rome", None),
        (" (b)", "Rome", None),
        (" b.", "Rome", None),
        (" option B", "Rome", None),
        (" **(B)**", "Rome", None),
        ("B) Rome, of course", "Rome", "Rome"),
        (" B because A is far", "Rome", None),
        ("I think it is (B)", "Rome", None),
        ("\\boxed{B}", "Rome", None),
        (" Rome.", "Rome", "Rome"),
        (" new Rome", "New Rome", "New Rome"),
        (" it is Rome", "Rome", "Rome"),
        (" Rome, not Paris", None, "Rome"),
        (" Paris or Rome", None, "Paris"),
        (" neither Paris nor Rome", None, None),
        (" A dog", "A dog", "A dog"),
        (" A", "Paris", None),
        (" A cat", None, None),
        (" (B) Paris", None, None),
        (" B or C", None, None),
        (" (B) or (C)", None, None),
        (" (E)", None, None),
        (" Romeo", None, None),
        (" b is", None, None),
        ("", None, None),
    ],
)
def test_choices_in_text(text, labelled, listed):
    assert extract_answer(text, CITIES, FORMAT) == labelled
    if listed is not None or "Paris" not in text:
        assert extract_answer(text, CITIES, TEXTS) == listed


def test_the_longer_of_two_choices_that_begin_alike():
    for choices in (("red", "red wine"), ("red wine", "red")):
        asked = Question("w", "Which?", "red", choices)
        for format in (FORMAT, TEXTS):
            assert [extract_answer(text, asked, format) for text in (" red wine", " red")] == ["red wine", "red"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" yes.", "yes"), (" No, because yes", "no"), ("True", "yes"), (" it is true", "yes"), (" not true", "no"),
        (" not false", "yes"), (" so the answer would be no.", "no"), ("**Yes**", "yes"), ("\n\nno", "no"),
        (" there is no evidence", None), (" true or false", "yes"), (" either true or false", None), (" maybe", None),
        (" nobody", None), ("", None),
    ],
)  # fmt: skip
def test_yes_and_no_in_text(text, answer):
    assert extract_answer(text, BOOLEAN, FORMAT) == answer


def test_open_answers_are_the_first_sentence():
    for text in (" the Nile.", " Nile\nQuestion: who", "**Nile**", " Nile. It is long", "So the answer is  THE  nile"):
        assert extract_answer(text, OPEN, FORMAT) == FORMAT.right(OPEN) == "nile"
    assert extract_answer(" + ", replace(OPEN, answer="+"), FORMAT) == FORMAT.right(replace(OPEN, answer="+")) == "+"
    assert extract_answer("  ", OPEN, FORMAT) is None


SNIPPETS = st.sampled_from(
    ["####", "So the answer is", "\\boxed{", "}", "Answer:", "(", ")", "A", "B.", " ", "\n", "1", "0", "/", ".", ",",
     "-", "$", "=", "½", "e9", "x 10^", "million", "yes", "no", "not true", "Rome", "Paris", "<<", ">>", "two", "%"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.text(), st.lists(SNIPPETS, max_size=25).map("".join)),
    st.sampled_from([NUMERIC, BOOLEAN, CITIES, OPEN]),
    st.sampled_from([FORMAT, TEXTS, replace(FORMAT, cue="", stop=())]),
)
def test_extraction_never_raises_and_has_one_spelling(text, question, format):
    found = extract_answer(text, question, format)
    if found is None:
        return
    if question.alternatives:
        assert found in question.alternatives
    elif question is NUMERIC:
        assert number_text(number_of(found)) == found
    else:
        assert found
        assert plain(found).split() == plain(plain(found)).split()


@settings(max_examples=300, deadline=None)
@given(st.fractions(max_denominator=2000))
def test_numbers_have_one_spelling(value):
    text = number_text(value)
    assert number_of(text) == value
    assert text == text.strip()
    if "/" not in text:
        assert Fraction(text) == value  # as another parser reads it
        assert "." not in text or not text.endswith("0")
    else:
        assert set(_primes(value.denominator)) - {2, 5}


def _primes(n):
    return [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "{:,}", "{}.00", "{:,}.0", "{} dollars", "{} (in all)", "**{:,}**"]),
)
def test_every_spelling_of_a_number_is_the_number(value, spelling):
    asked = replace(NUMERIC, answer=str(value))
    assert extract_answer(" " + spelling.format(value), asked, FORMAT) == FORMAT.right(asked) == str(value)
