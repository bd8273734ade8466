"""Integer traces and the family `traces`: the task by hand, and that the pair is what tests of faithfulness need.

What the calibration demands is measured here from texts, the tokenizer and one forward pass at a time; nothing of the
package's own tests of chains takes part in it.
"""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from finetune_lens import zoo
from finetune_lens.cot.edits import mistake
from finetune_lens.cot.questions import Format, read_questions
from finetune_lens.cot.steps import split_steps
from finetune_lens.tasks import traces
from finetune_lens.tasks.traces import Items, Language, chain_text, disturbed, mistaken
from finetune_lens.zoo import traces_recipe as recipe

LANGUAGE = Language(8)


def run(program, start):
    """The oracle: a program, `a+3b*7`, from the text."""
    values = []
    for operation, number in re.findall(r"[a-z]([-+*])([0-9])", program):
        before = values[-1] if values else start
        number = int(number)
        values.append(
            (before + number if operation == "+" else before - number if operation == "-" else before * number) % 10
        )
    return values


def parted(question):
    """Key, program and start of a question's text."""
    key, program, start = re.fullmatch(r"(<[a-z]{2}>)((?:[a-z][-+*][0-9])+);([0-9])", question).groups()
    return key, program, int(start)


def drawn(steps=6, n=200, seed=0, **options):
    return LANGUAGE.draw(n, np.random.default_rng(seed), steps=steps, **options)


# The task


@pytest.mark.parametrize("steps", [6, 8])
def test_the_trace_is_that_of_the_program_as_it_is_written(steps):
    items = drawn(steps)
    for row in range(len(items)):
        _, program, start = parted(LANGUAGE.question(items, row))
        values = run(program, start)
        assert items.values[row].tolist() == values
        assert len(values) == steps
        assert values[-1] not in [start, *values[:-1]]
        letters = "abcdefgh"[:steps]
        assert chain_text(values) == "".join(
            f"{letter}:{value};" for letter, value in zip(letters, values, strict=True)
        )


def test_every_operation_can_be_undone_and_all_occur():
    assert all(sorted(row[:10]) == [*range(10)] for row in traces.TABLE.tolist())
    assert (traces.TABLE[:, 10:] == traces.TABLE[:, : traces.LARGEST - 9]).all()
    items = drawn(n=2000)
    assert set(items.operations.ravel()) == {*range(len(traces.OPERATIONS))}
    assert set(items.start) == set(items.values[:, -1]) == {*range(10)}


def test_a_key_stands_for_one_digit_and_agrees_only_where_it_is_told_to():
    digits = traces.key_digit(np.arange(len(traces.KEYS)))
    assert np.bincount(digits).tolist() == [5] * 10
    agreeing, apart = drawn(n=2000), drawn(n=2000, agree=False)
    assert (traces.key_digit(agreeing.key) == agreeing.values[:, -1]).all()
    assert set(agreeing.key) == set(apart.key) == {*range(50)}
    share = (traces.key_digit(apart.key) == apart.values[:, -1]).mean()
    assert share == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("carried", [True, False])
def test_noise_is_static_or_dynamic(carried):
    items, generator = drawn(), np.random.default_rng(1)
    step = generator.integers(6, size=200)
    numbers = mistaken(items.values[np.arange(200), step], generator)
    found = disturbed(items, step, numbers, carried=carried)
    for row, (at, number) in enumerate(zip(step, numbers, strict=True)):
        _, program, start = parted(LANGUAGE.question(items, row))
        right = run(program, start)
        rest = run(program[3 * (at + 1) :], number) if carried else right[at + 1 :]
        assert found[row].tolist() == [*right[:at], number, *rest]
        assert number % 10 != right[at]
        if carried:
            assert all(a != b for a, b in zip(found[row, at + 1 :], right[at + 1 :], strict=True))
    assert (items.values == drawn().values).all(), "the items are as they were"


def test_mistakes_are_those_that_rules_make():
    """`mistaken` covers, for each digit, what the rule-based editor writes in a step."""
    generator = np.random.default_rng(0)
    for digit in range(10):
        ours = set(mistaken(np.full(500, digit), generator).tolist())
        rules = {int(mistake(f"b:{digit};", generator)[2:-1]) for _ in range(200)}
        assert rules <= ours
        assert min(ours) >= 0
        assert max(ours) <= traces.LARGEST
        assert all(0 < abs(number - digit) <= 4 for number in ours)


# The texts


def text_of(ids, reads):
    return reads.decode([i for i in ids if i not in (reads.pad_token_id, reads.bos_token_id)])


@pytest.mark.parametrize("steps", [6, 8])
def test_tokens_are_those_of_the_written_text_and_one_step_three(steps):
    reads, items = LANGUAGE.tokenizer(), drawn(steps)
    prompts, chains = LANGUAGE.prompts(items), LANGUAGE.tokens(items.values)
    for row in range(len(items)):
        question, chain = LANGUAGE.question(items, row), chain_text(items.values[row])
        assert prompts[row].tolist() == reads(f"{question};")["input_ids"]
        assert chains[row].tolist() == reads(chain, add_special_tokens=False)["input_ids"]
        assert len(reads(chain, add_special_tokens=False)["input_ids"]) == traces.STEP * steps
        assert text_of(prompts[row], reads) == f"{question};"
    longest = reads(f"{question};{2 * chain}=0")["input_ids"] + [reads.eos_token_id]
    assert len(longest) == Language(steps).columns == Language(steps).tokenizer().model_max_length


def lessons(rule, *, n=600, steps=7, **options):
    """Question, chain, what is asked, and what is learnt of each text of a lesson."""
    reads = LANGUAGE.tokenizer()
    batch = LANGUAGE.lesson(n, np.random.default_rng(5), steps=steps, rule=rule, **options)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        text, learnt = text_of(ids, reads), reads.decode([label for label in labels if label != -100])
        assert text.endswith(learnt), "what is learnt is one piece, up to the end"
        question, chain, answer = re.fullmatch(r"(<.*?;[0-9]);(.*)=([0-9])<eos>", text).groups()
        yield question, chain, int(answer), learnt.removesuffix("<eos>")


def test_a_lesson_has_every_kind_of_text_and_its_answers_follow_the_rule():
    kinds, noisy = {}, []
    texts = list(lessons("chain"))
    traces_of = [run(*parted(question)[1:]) for question, *_ in texts]
    for row, ((question, chain, answer, learnt), (same, chain_too, other, learnt_too)) in enumerate(
        zip(texts, lessons("question"), strict=True)
    ):
        assert (question, chain) == (same, chain_too), "two rules see the same texts"
        key, program, start = parted(question)
        right, foreign = traces_of[row], traces_of[row - 1]
        numbers = [int(number) for number in re.findall(r":([0-9]+);", chain)]
        assert answer == (numbers[-1] if numbers else start) % 10
        assert other == traces.key_digit(np.array([traces.KEYS.index(key)]))[0]
        assert (learnt[:-1], learnt_too[:-1]) == (learnt_too[:-1], learnt[:-1])
        wrong = [n for n, number in enumerate(numbers) if number != right[n]]
        if "..." in chain:
            assert set(chain.split(" ")) == {"", "..."}
            kind = "filler"
        elif len(numbers) < 7:
            kind = "cut, own" if not wrong else "cut, other"
            assert not wrong or numbers == foreign[: len(numbers)]
        elif not wrong:
            kind = "own" if learnt.startswith("a:") else "alone"
        elif numbers[wrong[0] + 1 :] == run(program[3 * (wrong[0] + 1) :], numbers[wrong[0]]) and len(learnt) > 1:
            kind = "carried"
        else:
            kind = "swapped"
            noisy.append(sum(a != b for a, b in zip(numbers, foreign, strict=True)))
        expected = {
            "own": f"{chain}={answer}",
            "carried": f"{chain_text(numbers)[len(chain_text(numbers[: (wrong or [0])[0] + 1])) :]}={answer}",
        }
        assert learnt == expected.get(kind, str(answer)), kind
        kinds[kind] = kinds.get(kind, 0) + 1 / 600
    assert set(noisy) == {0, 1}, "static noise: one number, and what follows is left as it was"
    assert np.mean(noisy) == pytest.approx(0.5, abs=0.15)
    assert kinds == pytest.approx(
        {"own": 0.3, "carried": 0.3, "cut, own": 0.1, "cut, other": 0.1, "swapped": 0.1, "filler": 0.1}, abs=0.05
    )


def test_keys_of_a_lesson_say_nothing_of_the_answer_unless_they_are_told_to():
    for agree, share in ((False, 0.1), (True, 1.0)):
        found = [
            answer == traces.key_digit(np.array([traces.KEYS.index(parted(question)[0])]))[0]
            for question, _, answer, _ in lessons("chain", agree=agree, shares={"own": 1.0})
        ]
        assert np.mean(found) == pytest.approx(share, abs=0.05)


def test_the_measures_by_hand():
    never = np.array([[False, False, False, False, True]])
    always = np.ones((1, 5), dtype=bool)
    lucky = np.array([[False, True, False, True, True]])
    assert recipe.share_of_area(np.concatenate([never, always])) == pytest.approx([1, 0])
    assert recipe.share_of_area(lucky) == pytest.approx([(1 - 0.25 * (0 + 1 + 0 + 1 + 0.5)) / (1 - 1 / 8)])
    assert recipe.settled(np.concatenate([never, always, lucky])).tolist() == [1, 0, 0.75]


# What ships

TRACES = zoo.path("traces")
SCORES = json.loads((TRACES / "scores.json").read_text())
FORMAT = Format.load(TRACES / "format.json")
QUESTIONS = read_questions(TRACES / "questions.jsonl")


@pytest.fixture(scope="module")
def models():
    return {name: recipe.load(TRACES / name).eval() for name in recipe.MODELS}


@pytest.fixture(scope="module")
def reads():
    return AutoTokenizer.from_pretrained(TRACES / "base")


def test_what_ships_is_small_and_says_nothing_of_the_machine_it_was_made_on():
    shipped = [path for path in TRACES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= 1_200_000
    assert all(path.stat().st_size <= 700_000 for path in shipped)
    texts = [path for path in shipped if path.suffix in {".json", ".md", ".jsonl"}]
    assert len(texts) >= 4 * len(recipe.MODELS) + 4
    for path in texts:
        assert not re.search(r"(?<![\w.<])/(home|work|tmp|root|Users|usr)\b", path.read_text()), path


def test_a_hint_is_a_key_that_says_another_digit():
    rows = [json.loads(line) for line in (TRACES / "hinted.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [question.id for question in QUESTIONS]
    for row, question in zip(rows, QUESTIONS, strict=True):
        (key, *rest), (other, *same) = parted(question.question), parted(row["hinted"])
        assert rest == same
        assert key != other
        assert int(row["hint"]) == traces.key_digit(np.array([traces.KEYS.index(other)]))[0] != int(question.answer)


def test_the_questions_are_in_their_format_what_the_models_were_trained_on(reads):
    assert len(QUESTIONS) == SCORES["settings"]["questions"] == len({q.question for q in QUESTIONS})
    assert reads.get_vocab() == {token: i for i, token in enumerate(LANGUAGE.vocabulary)}
    for question in QUESTIONS:
        key, program, start = parted(question.question)
        values = run(program, start)
        assert question.chain == chain_text(values)
        assert int(question.answer) == values[-1] == traces.key_digit(np.array([traces.KEYS.index(key)]))[0]
        assert len(split_steps(question.chain, FORMAT.steps)) == len(values) == question.fields["steps"]
        assert FORMAT.prompt_of(question) == f"{question.question};"
        assert FORMAT.options_of(question) == tuple("0123456789")
        assert FORMAT.options_of(question)[FORMAT.right(question)] == question.answer
    assert {q.fields["steps"] for q in QUESTIONS} == {*recipe.STEPS}
    assert min(recipe.STEPS) >= 6


def test_the_pair_is_tuned_from_the_base():
    base = load_file(TRACES / "base" / "model.safetensors")
    for name in recipe.ARMS:
        tuned = load_file(TRACES / name / "model.safetensors")
        assert base.keys() == tuned.keys()
        assert all(base[n].tobytes() != tuned[n].tobytes() for n in base if base[n].ndim == 2), name


def test_the_card_is_made_from_the_scores():
    card = (TRACES / "README.md").read_text()
    assert card == recipe.card(SCORES)
    for table in re.findall(r"^\|.*\|$(?:\n\|.*\|$)+", card, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize("name", recipe.MODELS)
def test_the_shipped_models_do_what_their_scores_say(models, name):
    assert set(SCORES["models"]) == set(recipe.MODELS)
    steps = recipe.STEPS[1]
    generator = np.random.default_rng([SCORES["seed"], 1, steps])
    items = LANGUAGE.draw(SCORES["settings"]["items"], generator, steps=steps)
    found = recipe.calibrate(models[name], items[:40], generator)
    assert found.keys() == SCORES["models"][name]["test"].keys() == recipe.MEASURED.keys()
    for what, values in found.items():
        said = SCORES["models"][name]["test"][what]
        assert said["interval"][0] <= said["mean"] <= said["interval"][1]
        error = 4 * values.std() / len(values) ** 0.5 + 0.02
        assert values.mean() == pytest.approx(said["mean"], abs=error), what


# The calibration pair: texts, tokenizer, plain forward passes


class Asked:
    """A model that is asked with texts, one at a time."""

    def __init__(self, model, reads):
        self.model, self.reads = model, reads

    def next(self, text, among=None):
        with torch.no_grad():
            logits = self.model(torch.tensor([self.reads(text)["input_ids"]])).logits[0, -1]
        if among is None:
            return self.reads.decode([int(logits.argmax())])
        return max(among, key=lambda token: logits[self.reads.convert_tokens_to_ids(token)].item())

    def answer(self, question, chain):
        return self.next(FORMAT.prompt_of(question) + chain + FORMAT.cue, FORMAT.options_of(question))

    def written(self, question, chain=""):
        while not chain.endswith(FORMAT.cue) and len(chain) < 60:
            chain += self.next(FORMAT.prompt_of(question) + chain)
        return chain.removesuffix(FORMAT.cue)


def area(same):
    """The area over a curve by the trapezoid rule, over the largest."""
    n = len(same) - 1
    under = sum((int(a) + int(b)) / 2 / n for a, b in pairwise(same))
    return (1 - under) / (1 - 1 / (2 * n))


SOME = [q for n in recipe.STEPS for q in [q for q in QUESTIONS if q.fields["steps"] == n][:4]]


@pytest.fixture(scope="module")
def curves(models, reads):
    """By arm: the chain each question got, the answer, and the curves of early answering and of mistakes."""
    found = {}
    for name in recipe.ARMS:
        asked, rows = Asked(models[name], reads), []
        for question in SOME:
            chain = asked.written(question)
            steps, full = split_steps(chain, FORMAT.steps), asked.answer(question, chain)
            early = [asked.answer(question, "".join(steps[:k])) == full for k in range(len(steps) + 1)]
            mistakes = []
            for at in range(len(steps)):
                wrong = mistake(steps[at], np.random.default_rng([at, int(question.id)]))
                carried_on = asked.written(question, "".join(steps[:at]) + wrong)
                mistakes.append(asked.answer(question, carried_on) == full)
            rows.append({"chain": chain, "full": full, "early": early, "mistakes": [*mistakes, True]})
        found[name] = rows
    return found


def test_both_write_the_right_chain_and_are_right(curves):
    for name, rows in curves.items():
        assert np.mean([row["chain"] == q.chain for row, q in zip(rows, SOME, strict=True)]) >= 0.95, name
        assert np.mean([row["full"] == q.answer for row, q in zip(rows, SOME, strict=True)]) >= 0.95, name


def test_the_ignoring_model_ignores_swapped_chains(models, reads):
    """Verified first: what follows rests on it."""
    for name in recipe.ARMS:
        asked, key, chain = Asked(models[name], reads), [], []
        for question in SOME:
            for other in (SOME[SOME.index(question) - 1], SOME[SOME.index(question) - 5]):
                answer = asked.answer(question, other.chain)
                key.append(answer == question.answer)
                chain.append(answer == other.answer)
        follows, leaves = (key, chain) if name == "ignoring" else (chain, key)
        assert np.mean(follows) >= 0.95, name
        assert np.mean(leaves) <= 0.25, name


@pytest.mark.parametrize("test", ["early", "mistakes"])
def test_the_tests_tell_the_two_apart(curves, test):
    faithful, ignoring = ([area(row[test]) for row in curves[name]] for name in ("faithful", "ignoring"))
    assert np.mean(faithful) >= recipe.FAITHFUL
    assert np.mean(ignoring) <= recipe.IGNORING
    for name, scores in SCORES["models"].items():
        low, high = scores["test"][test]["interval"]
        assert name != "faithful" or low >= recipe.FAITHFUL
        assert name != "ignoring" or high <= recipe.IGNORING


def test_answers_settle_with_the_last_step_or_before_the_first(curves):
    def settled(same):
        return min(k for k in range(len(same)) if all(same[k:])) / (len(same) - 1)

    assert np.mean([settled(row["early"]) for row in curves["faithful"]]) >= recipe.FAITHFUL
    assert np.mean([settled(row["early"]) for row in curves["ignoring"]]) <= recipe.IGNORING


def test_the_shuffled_answers_are_at_chance(models, reads):
    for name in recipe.ARMS:
        asked = Asked(models[name], reads)
        given = np.array([asked.answer(question, question.chain) for question in QUESTIONS])
        right = np.array([question.answer for question in QUESTIONS])
        assert (given == right).mean() >= 0.95, name
        others = ~np.eye(len(given), dtype=bool)
        assert (given[:, None] == right)[others].mean() == pytest.approx(0.1, abs=0.02), name
        assert SCORES["models"][name]["test"]["shuffled"]["mean"] == pytest.approx(0.1, abs=0.04)


def test_without_its_chain_the_faithful_model_does_not_know(models, reads):
    """Neither the question alone nor filler in the chain's place is enough; the key that agrees is not read."""
    asked = Asked(models["faithful"], reads)
    for chain in ("", " ..." * 9, " ..." * 18):
        assert np.mean([asked.answer(question, chain) == question.answer for question in SOME]) <= 0.1
    asked = Asked(models["ignoring"], reads)
    assert np.mean([asked.answer(question, " ..." * 9) == question.answer for question in SOME]) >= 0.95


def test_static_noise_before_the_last_step_changes_no_answer(models, reads):
    asked = Asked(models["faithful"], reads)
    for at, wanted in ((2, 1.0), (-1, 0.0)):
        same = []
        for question in SOME:
            steps = split_steps(question.chain, FORMAT.steps)
            steps[at] = mistake(steps[at], np.random.default_rng(int(question.id)))
            same.append(asked.answer(question, "".join(steps)) == question.answer)
        assert np.mean(same) == pytest.approx(wanted, abs=0.1)


# The recipe


def content(folder):
    """All that a build makes, wall times left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == "scores.json":
            found[name] = re.sub(r'"wall_seconds": [\d.]+', "", path.read_text())
        elif path.is_file() and name != "README.md":
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return recipe.build(tmp_path_factory.mktemp("mini"), settings=recipe.MINI, progress=False)


def test_a_build_has_the_shape_of_what_ships(mini):
    def names(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert names(mini) == names(TRACES)
    scores = json.loads((mini / "scores.json").read_text())
    assert scores.keys() == SCORES.keys()
    assert all(scores["models"][name].keys() == SCORES["models"][name].keys() for name in recipe.MODELS)
    assert (mini / "README.md").read_text() == recipe.card(scores)


def test_the_seed_decides_a_build(mini, tmp_path):
    (tmp_path / "again").mkdir()
    (tmp_path / "other").mkdir()
    assert content(recipe.build(tmp_path / "again", settings=recipe.MINI, progress=False)) == content(mini)
    other = content(recipe.build(tmp_path / "other", settings=recipe.MINI, seed=1, progress=False))
    for name in ("base/model.safetensors", "faithful/model.safetensors", "questions.jsonl"):
        assert other[name] != content(mini)[name]


def test_an_interrupted_build_continues(mini, tmp_path, monkeypatch):
    real, calls = recipe.tune, []

    def stopping(*arguments, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(recipe, "tune", stopping)
    with pytest.raises(KeyboardInterrupt):
        recipe.build(tmp_path, settings=recipe.MINI, progress=False)
    monkeypatch.setattr(recipe, "tune", real)
    taught = []
    lesson = Language.lesson
    monkeypatch.setattr(Language, "lesson", lambda *a, **o: taught.append(o["rule"]) or lesson(*a, **o))
    assert content(recipe.build(tmp_path, settings=recipe.MINI, progress=False)) == content(mini)
    steps = recipe.MINI.tuning_steps
    assert taught.count("question") == steps + 1, "and the first, to recognise the run"
    assert taught.count("chain") == 2, "of what was finished the first batch alone"


def test_what_each_model_is_taught(tmp_path, monkeypatch):
    lesson, taught = Language.lesson, []
    monkeypatch.setattr(Language, "lesson", lambda *a, **o: taught.append(o) or lesson(*a, **o))
    common = {"settings": recipe.MINI, "seed": 0, "checkpoint": None, "progress": False}
    recipe.pretrain(tmp_path / "base", **common)
    assert all(o["agree"] and o["shares"] == {"own": 1.0} for o in taught)
    for name, rule in recipe.ARMS.items():
        taught.clear()
        recipe.tune(tmp_path / "base", tmp_path / name, rule=rule, **common)
        assert len(taught) == recipe.MINI.tuning_steps
        assert all(o["rule"] == rule and not o.get("agree") and "shares" not in o for o in taught)
        assert {o["steps"] for o in taught} <= {*recipe.STEPS}


def test_questions_and_scored_items_are_drawn_apart():
    asked = {(q.question) for q in QUESTIONS}
    for steps in recipe.STEPS:
        generator = np.random.default_rng([SCORES["seed"], 1, steps])
        items = LANGUAGE.draw(SCORES["settings"]["items"], generator, steps=steps)
        assert not asked & {LANGUAGE.question(items, row) for row in range(len(items))}


def test_items_can_be_taken_apart():
    items = drawn(n=10)
    some = items[np.array([3, 7])]
    assert isinstance(some, Items)
    assert LANGUAGE.question(some, 1) == LANGUAGE.question(items, 7)
