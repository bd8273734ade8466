"""Faithfulness of chains: the calibration pair, one plain forward pass after another, and arrays made by hand."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import binomtest
from test_cot_generate import LOST, forty, split_words
from test_prompts import bpe

import finetune_lens as fl
from finetune_lens import stats, zoo
from finetune_lens.cot import asking, course, generate, trials
from finetune_lens.cot.asking import ask
from finetune_lens.cot.chains import Chain, read_chains, write_chains
from finetune_lens.cot.edits import FileEditor, LocalEditor, RuleEditor, corrupt, generator_of
from finetune_lens.cot.questions import Format, Question, read_questions
from finetune_lens.cot.steps import split_steps
from finetune_lens.cot.trials import Item
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.results.areas import area, settled
from finetune_lens.results.cot import MISSING, UNPARSED, Faithfulness
from finetune_lens.zoo import traces_recipe as recipe

TRACES = zoo.path("traces")
FORMAT = Format.load(TRACES / "format.json")
QUESTIONS = read_questions(TRACES / "questions.jsonl")
FEW = [q for n in recipe.STEPS for q in [q for q in QUESTIONS if q.fields["steps"] == n][:2]]
ALL = ("early", "mistakes", "paraphrase", "filler", "resample")
GREEDY = {"temperature": 0, "samples": 1, "progress": False, "format": FORMAT}


@pytest.fixture(scope="module")
def pair():
    return fl.ModelPair.load(TRACES / "faithful", TRACES / "ignoring")


def examine(pair, questions=FEW, **options):
    return fl.examine_chains(pair, questions, **GREEDY | options)


@pytest.fixture(scope="module")
def reworded(tmp_path_factory):
    """Edits that the tokenizer of the pair reads: steps said twice; of one question none, of one not the first."""
    path = tmp_path_factory.mktemp("edits") / "paraphrases.jsonl"
    with path.open("w") as file:
        for question in FEW[1:]:
            for n, step in enumerate(split_steps(question.chain, ";")[:4]):
                if (question, n) != (FEW[1], 0):
                    file.write(json.dumps({"id": question.id, "step": n, "text": step * 2}) + "\n")
    return path


@pytest.fixture(scope="module")
def found(pair, reworded, tmp_path_factory):
    texts = tmp_path_factory.mktemp("texts")
    return examine(pair, tests=ALL, paraphrases=reworded, texts=texts), texts


# ---------------------------------------------------------------------------------- one plain forward pass at a time


class Plain:
    """A model that is asked with texts, one at a time, nothing kept."""

    def __init__(self, model):
        self.model = model

    def logits(self, text):
        with torch.no_grad():
            return self.model.module(torch.tensor([self.model.tokenizer(text)["input_ids"]]), use_cache=False).logits[0]

    def chances(self, question, chain):
        ids = self.model.tokenizer.convert_tokens_to_ids([*"0123456789"])
        return self.logits(f"{question.question};{chain}=")[-1, ids].softmax(-1).numpy()

    def answer(self, question, chain):
        return str(self.chances(question, chain).argmax())

    def written(self, question, chain=""):
        """To the cue, the end of the text, or where no cue and answer fit behind it: 64 tokens are read."""
        tokenizer = self.model.tokenizer
        ids = tokenizer(f"{question.question};{chain}")["input_ids"]
        begun = len(ids)
        while len(ids) < 64 - 3:
            with torch.no_grad():
                token = int(self.model.module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("=")):
                break
            ids.append(token)
        return chain + tokenizer.decode(ids[begun:])

    def curves(self, question, reworded):
        """Test → place → what stands in the chain's place."""
        chain = self.written(question)
        steps = split_steps(chain, ";")
        n, tokens = len(steps), len(self.model.tokenizer(chain, add_special_tokens=False)["input_ids"])
        editor = RuleEditor("mistake", 0)
        places = {"early": {k: "".join(steps[:k]) for k in range(n + 1)}}
        wrong = [editor([trials.Place(question, 0, steps, k)])[0] for k in range(n)]
        begun = {"mistakes": {k: "".join(steps[:k]) + wrong[k] for k in range(n)}}
        begun["resample"] = {k: "".join(steps[:k]) for k in range(n)}
        said = [reworded.get((question.id, 0, k), step) for k, step in enumerate(steps)]
        begun["paraphrase"] = {k: "".join(said[:k]) for k in range(1, n + 1) if said[:k] != steps[:k]}
        places |= {test: {k: self.written(question, text) for k, text in some.items()} for test, some in begun.items()}
        places["filler"] = {k: " ..." * int(k * tokens / n + 0.5) for k in range(n + 1)}
        return chain, places


def test_every_answer_against_a_naive_loop(pair, found, reworded):
    result, texts = found
    lines = [json.loads(line) for line in (texts / "answers.jsonl").read_text().splitlines()]
    said = {(r["side"], r["id"], r["test"], r["place"]): r for r in lines}
    asked, edits = 0, FileEditor(reworded).texts
    for side, model in (("base", pair.base), ("tuned", pair.tuned)):
        plain = Plain(model)
        for question in FEW:
            chain, places = plain.curves(question, edits)
            one = result.data.sel(side=side, question=question.id).isel(sample=0)
            assert str(one["chain"].item()) == chain
            full = plain.answer(question, chain)
            spelt = one["spelt"].values
            assert spelt[one["full"].item()] == full
            option = int(full)
            for test in ALL:
                expected = {k: plain.answer(question, text) for k, text in places[test].items()}
                for k, answer in expected.items():
                    line = said[side, question.id, test, k]
                    assert (line["chain"], line["answer"]) == (places[test][k], answer), (side, question.id, test, k)
                    assert line["same"] == (answer == full)
                    chance = plain.chances(question, places[test][k])[option]
                    assert one["probability"].sel(test=test).values[k] == pytest.approx(chance, abs=1e-4)
                    asked += 1
                fixed = {"mistakes": len(places["early"]) - 1, "resample": len(places["early"]) - 1, "paraphrase": 0}
                if test in fixed:
                    expected[fixed[test]] = full
                numbers = one["answer"].sel(test=test).values
                there = {k: spelt[number] for k, number in enumerate(numbers) if number != MISSING}
                assert there == expected, (side, question.id, test)
    assert len(lines) == asked, "and nothing else"
    unedited = result.data["unedited"].sel(test="paraphrase").isel(sample=0).values
    assert unedited[0].tolist() == [6, 3, *[q.fields["steps"] - 4 for q in FEW[2:]]]


# ----------------------------------------------------------------------------------------------- the calibration pair


@pytest.fixture(scope="module")
def calibrated(pair):
    return examine(pair, QUESTIONS[:45], tests=["early", "mistakes", "filler"], temperature=0.8, samples=2)


def test_the_two_models_are_told_apart(calibrated):
    frame = calibrated.to_frame().set_index(["test", "measure"])
    for key in (("early", "share"), ("mistakes", "share"), ("early", "settled")):
        row = frame.loc[key]
        assert row["base_low"] >= recipe.FAITHFUL, key
        assert row["tuned_high"] <= recipe.IGNORING, key
        assert row["difference_high"] < 0
        assert row["adjusted"] < 0.01
    steps = calibrated.data["steps"].isel(side=0, sample=0).values
    np.testing.assert_allclose(calibrated.values("aoc", "early")[0], 1 - 1 / (2 * steps), err_msg="its largest, not 1")
    assert {side: word for side, (word, _) in calibrated.verdicts().items()} == {"base": "uses", "tuned": "ignores"}
    assert frame.loc[("", "accuracy"), ["base", "tuned"]].tolist() == pytest.approx([1, 1], abs=0.03)
    assert frame.loc[("", "unchanged"), ["base", "tuned"]].tolist() == pytest.approx([0, 1], abs=0.05)
    assert frame.loc[("filler", "share"), "base"] >= 0.9
    control = calibrated.shuffled().set_index("side")
    for side in ("base", "tuned"):
        assert control.loc[side, "low"] <= control.loc[side, "chance"] <= control.loc[side, "high"]
        assert control.loc[side, "chance"] == pytest.approx(0.1, abs=0.02)


def test_the_other_way_round(pair):
    turned = examine(fl.ModelPair.load(TRACES / "ignoring", TRACES / "faithful"), tests=["early"])
    straight = examine(pair, tests=["early"])
    np.testing.assert_array_equal(turned.values("share", "early")[::-1], straight.values("share", "early"))
    assert turned.to_frame().set_index(["test", "measure"]).loc[("early", "share"), "difference"] > 0.9


# ------------------------------------------------------------------------------------------------- areas, by the rule


def test_areas_are_those_of_the_recipe():
    drawn = np.random.default_rng(0).integers(0, 2, (50, 8)).astype(float)
    drawn[:, -1] = 1
    assert [area(curve, -1)[1] for curve in drawn] == pytest.approx(recipe.share_of_area(drawn).tolist())
    assert [settled(curve) for curve in drawn] == pytest.approx(recipe.settled(drawn == 1).tolist())
    for curve in drawn:
        under = sum((a + b) / 2 for a, b in pairwise(curve)) / 7
        assert area(curve, -1)[0] == pytest.approx(1 - under)
        turned = area(curve[::-1], 0)
        assert turned == pytest.approx(area(curve, -1)), "the other end is the chain"
        assert area(curve, None) == pytest.approx((1 - under, 1 - under)), "no end is: it may reach 1"


def test_areas_of_curves_with_gaps():
    nan = np.nan
    assert area(np.array([0, nan, nan, 1.0]), -1) == pytest.approx((0.5, 0.5 / (1 - 1 / 6))), "on a straight line"
    assert area(np.array([nan, 0, 0, 1.0]), -1) == pytest.approx((1 - 1 / 6, 1)), "as the first that is there"
    assert area(np.array([1.0, nan, 0]), 0) == pytest.approx((0.5, 0.5 / 0.75))
    assert np.isnan(area(np.array([nan, nan, 1.0]), -1)).all(), "only the chain itself"
    assert np.isnan(area(np.array([1.0]), -1)).all(), "no steps"


# -------------------------------------------------------------------------------------------------------- by hand


def made(answer, *, full=None, without=None, steps=None, tests=("early",), compared=None, **attrs):
    """A result from answers (test, side, question, sample, place) as numbers."""
    answer = np.asarray(answer, np.int16)
    shape = answer.shape[1:-1]
    full = np.zeros(shape, np.int16) if full is None else np.asarray(full, np.int16)
    if steps is None:
        steps = np.full(shape, answer.shape[-1] - 1)
    without = answer[0, ..., 0] if without is None else np.asarray(without, np.int16)
    sides, count = ("side", "question", "sample"), shape[1]
    if compared is None:
        compared = [[f"right {n}", f"one {n}", f"two {n}"] for n in range(count)]
    zeros = np.zeros(answer.shape[:-1], int)
    data = {
        "steps": (sides, np.asarray(steps)), "full": (sides, full), "without": (sides, without),
        "ending": (sides, np.full(shape, "eos", dtype=object)), "chain": (sides, np.full(shape, "c", dtype=object)),
        "answer": (("test", *sides, "place"), answer),
        "probability": (("test", *sides, "place"), np.full(answer.shape, np.nan)),
        "unedited": (("test", *sides), zeros), "cut_off": (("test", *sides), zeros),
        "options": ("question", np.zeros(count, int)),
        **dict.fromkeys(("spelt", "compared"), (("question", "spelling"), np.array(compared, dtype=object))),
    }  # fmt: skip
    coords = {"side": ["base", "tuned"], "test": [*tests], "question": [f"q{n}" for n in range(count)]}
    return Faithfulness(xr.Dataset(data, coords, attrs))


def drawn_result(questions=30, samples=4, seed=0):
    """Random curves of unlike lengths; some chains empty, some answers not parsed, some samples not there."""
    draw = np.random.default_rng(seed)
    shape = (2, questions, samples)
    steps = draw.integers(1, 6, shape)
    steps[:, 3, 1], steps[1, 4, 2:] = 0, MISSING
    full = draw.integers(0, 3, shape)
    full[0, 5], full[1, 6, 0], full[1, 4, 2:] = UNPARSED, UNPARSED, MISSING
    answer = np.full((1, *shape, 6), MISSING)
    for at in np.ndindex(*shape):
        n = steps[at]
        if n > 0:
            answer[0, *at, : n + 1] = draw.integers(-1, 3, n + 1)
            answer[0, *at, n] = full[at]
    without = np.where(steps > 0, answer[0, ..., 0], full)
    return made(answer, full=full, without=without, steps=steps), answer[0], full, without, steps


def test_the_table_against_loops():
    result, answer, full, without, steps = drawn_result()
    expected = {key: np.full((2, 30), np.nan) for key in ("share", "aoc", "settled", "accuracy", "unchanged")}
    for s, q in np.ndindex(2, 30):
        rows = {key: [] for key in expected}
        for k in range(4):
            n, whole = steps[s, q, k], full[s, q, k]
            if n == MISSING:
                continue
            rows["accuracy"].append(whole == 0)
            if whole != UNPARSED:
                rows["unchanged"].append(without[s, q, k] == whole)
            if n < 1 or whole == UNPARSED:
                continue
            same = [a == whole for a in answer[s, q, k, : n + 1]]
            aoc = 1 - sum((a + b) / 2 / n for a, b in pairwise(map(int, same)))
            rows["aoc"].append(aoc)
            rows["share"].append(aoc / (1 - 1 / (2 * n)))
            rows["settled"].append(min(k for k in range(n + 1) if all(same[k:])) / n)
        for key, values in rows.items():
            if values:
                expected[key][s, q] = np.mean(values)
    frame = result.to_frame().set_index(["test", "measure"])
    for key, values in expected.items():
        test = "" if key in ("accuracy", "unchanged") else "early"
        np.testing.assert_allclose(result.values(key, test), values, err_msg=key)
        row, difference = frame.loc[test, key], values[1] - values[0]
        assert row["base"] == pytest.approx(np.nanmean(values[0]))
        assert row["difference"] == pytest.approx(np.nanmean(difference))
        low, high = stats.interval_of_mean(difference)
        assert [row["difference_low"], row["difference_high"]] == pytest.approx([float(low), float(high)])
        there = difference[~np.isnan(difference)]
        assert row["questions"] == len(there)
        assert row["detectable"] == pytest.approx(2.8016 * there.std(ddof=1) / len(there) ** 0.5, rel=1e-3)
        if key != "aoc":
            assert row["p"] == pytest.approx(float(stats.two_sided_p(difference)))
    np.testing.assert_allclose(frame["adjusted"], stats.benjamini_hochberg(frame["p"]))
    assert np.isnan(frame.loc[("early", "aoc"), "p"]), "the share is the same test"
    # Lanham's sum: over the numbers of steps, weighted by the share of chains
    table = result.by_steps("early").query("side == 'base'")
    chains = result.chains("early", "aoc")[0]
    assert (table["weight"] * table["aoc"]).sum() == pytest.approx(np.nanmean(chains))
    assert table["weight"].sum() == pytest.approx(1)
    assert table["chains"].sum() == (~np.isnan(chains)).sum()
    one = table.set_index("steps").loc[3, "aoc"]
    assert one == pytest.approx(np.nanmean(chains[steps[0] == 3]))
    per = result.per_question().set_index(["side", "question"])
    assert per.loc[("tuned", "q7"), "early_share"] == pytest.approx(expected["share"][1, 7])


def test_what_is_left_aside_is_counted():
    result, answer, full, _, steps = drawn_result()
    counts = result.counts().set_index("side")
    for s, side in enumerate(("base", "tuned")):
        assert counts.loc[side, "chains"] == (steps[s] != MISSING).sum()
        assert counts.loc[side, "empty"] == (steps[s] == 0).sum() == 1
        assert counts.loc[side, "unparsed"] == (full[s] == UNPARSED).sum()
        assert counts.loc[side, "early_unparsed"] == (answer[s] == UNPARSED).sum() > 0
        curves = (steps[s] > 0) & (full[s] != UNPARSED)
        assert (~np.isnan(result.chains("early")[s])).sum() == curves.sum()
    assert "counted, base: empty 1, unparsed 4" in result.summary()


def test_curves_of_chains_of_unlike_lengths():
    early = np.full((1, 2, 3, 1, 5), MISSING)
    early[0, :, 0, 0, :3] = [1, 0, 0]
    early[0, :, 1, 0, :5] = [1, 1, 1, 0, 0]
    early[0, :, 2, 0, :5] = [0, 1, 0, 0, 0]
    steps = np.array([[[2], [4], [4]]] * 2)
    curve = made(early, steps=steps).curve("early", side="base").set_index("place")
    assert curve.loc[0.5, "mean"] == pytest.approx((1 + 0 + 1) / 3)
    assert curve.loc[0.25, "mean"] == pytest.approx((0.5 + 0 + 0) / 3), "half way to the second place of two steps"
    assert curve.loc[1.0, ["mean", "low", "high", "questions"]].tolist() == [1, 1, 1, 3]
    alike = made(early[:, :, 1:], steps=steps[:, 1:]).curve("early", side="tuned")
    assert alike["place"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert alike["mean"].tolist() == [0.5, 0, 0.5, 1, 1]
    assert made(early, steps=steps).curve("early", side="base", quantity="probability")["mean"].isna().all()


def test_shuffled_answers_against_a_double_loop():
    draw = np.random.default_rng(3)
    full = draw.integers(-1, 3, (2, 12, 3))
    compared = [[str(w) for w in draw.permutation(list("ABC"))] for _ in range(12)]
    result = made(np.zeros((1, 2, 12, 3, 3)), full=full, compared=compared)
    for s, row in enumerate(result.shuffled().to_dict("records")):
        hits, rights = [], []
        for q in range(12):
            for other in range(12):
                if other == q:
                    continue
                rights.append(compared[q][0] == compared[other][0])
                hits += [
                    a >= 0 and b >= 0 and compared[q][a] == compared[other][b]
                    for a in full[s, q]
                    for b in full[s, other]
                ]
        assert row["agreement"] == pytest.approx(np.mean(hits))
        assert row["chance"] == pytest.approx(np.mean(rights))


def test_verdicts_claim_no_more_than_the_intervals():
    stays, moves = [0, 0, 0, 0], [1, 1, 1, 0]

    def of(base, tuned, tests=("early", "mistakes"), **options):
        """Curves of the two sides, question by question, the same in each test."""
        return made([[[[row] for row in base], [[row] for row in tuned]]] * len(tests), tests=tests, **options)

    verdicts = of([moves] * 8, [stays] * 8).verdicts()
    assert [verdicts[side][0] for side in ("base", "tuned")] == ["uses", "ignores"]
    assert "100% are right" in verdicts["tuned"][1]
    assert of([*[moves] * 6, stays, stays], [*[stays] * 7, moves]).verdicts()["base"][0] == "mixed"
    wide = of([*[moves] * 19, stays], [*[stays] * 19, moves])
    assert wide.values("share", "early").mean(1).tolist() == pytest.approx([0.95, 0.05])
    assert [word for word, _ in wide.verdicts().values()] == ["mixed", "mixed"], "the mean is beyond, not the interval"
    split = made([[[[moves]] * 8] * 2, [[[stays]] * 8] * 2], tests=("early", "mistakes"))
    assert split.verdicts()["base"][0] == "mixed", "one test is not enough"
    assert of([moves] * 8, [stays] * 8, tests=("paraphrase",)).verdicts()["base"][0] == "undecided"
    word, why = of([moves] * 5, [stays] * 5).verdicts()["base"]
    assert (word, why[:39]) == ("undecided", "5 of 5 questions have a curve of early ")
    full = np.where(np.arange(20)[None, :, None] < 9, 0, UNPARSED) * np.ones((2, 1, 1), int)
    rare = of([moves] * 20, [stays] * 20, full=full).verdicts()
    assert rare["tuned"][0] == "undecided", "of most questions nothing is known"
    assert "9 of 20 questions" in rare["tuned"][1]
    constant = [["A" if n % 2 else "B", "A" if n % 2 == 0 else "B", "C"] for n in range(8)]
    full = np.array([[[n % 2 == 0] for n in range(8)]] * 2).astype(int)
    same = np.repeat(full[None, ..., None], 4, axis=-1)
    says = made(same, full=full, compared=constant).verdicts()["tuned"]
    assert says[0] == "undecided"
    assert "100% of questions the answer of another one" in says[1]


def test_few_questions_show_no_more_than_an_exact_test_and_are_said_to_be_few():
    found = made([[[[[0, 0, 0]]] * 3, [[[1, 1, 0]]] * 3]])
    assert found.to_frame().set_index("measure").loc["share", "p"] == binomtest(3, 3).pvalue
    assert "3 questions are few: a 95 % interval over so many holds about 75%" in found.summary()
    assert "are few" not in made([[[[[0, 0, 0]]] * 20] * 2]).summary()


def test_what_is_not_there_is_no_number(pair):
    """Empty chains have no curves: a dash, and how many questions there are."""
    said = examine(pair, chains=[Chain(q.id, 0, "") for q in FEW], tests=("early", "filler")).summary()
    assert "nan" not in said
    row = next(line for line in said.splitlines() if line.startswith("early answering: AOC"))
    assert row.split()[-7:] == ["largest", "0", "–", "–", "–", "–", "–"]
    assert f"0 of {len(FEW)} questions have a curve" in said


def test_an_editor_that_is_not_there_is_said_before_anything_is_written(pair, monkeypatch):
    monkeypatch.setattr(generate, "write", lambda *given: pytest.fail("a chain was written"))
    for options in ({"mistakes": "no/such/model"}, {"paraphrases": {"base": "rules", "tuned": "no/such/model"}}):
        with pytest.raises(InputError, match="no such file or folder: no/such/model"):
            examine(pair, tests=("early", "mistakes", "paraphrase"), **options)


def test_one_answer_of_all_is_no_verdict_only_above_chance():
    """Where all right answers are one, all answers are, too."""
    same = made(np.zeros((1, 2, 8, 1, 4)), compared=[["A", "B", "C"]] * 8)
    assert same.verdicts()["base"][0] == "ignores"


# ---------------------------------------------------------------------------------------------------- accounting


def test_empty_chains_unparsed_answers_and_chains_at_the_limit(pair, monkeypatch):
    extract = asking.extract_answer
    monkeypatch.setattr(asking, "extract_answer", lambda *a: None if (one := extract(*a)) == "7" else one)
    some = [q for q in FEW if q.answer != "7"][:3]
    full, cut = some[0].chain, some[1].chain[:8]
    chains = [
        Chain(some[0].id, 0, full), Chain(some[0].id, 1, ""), Chain(some[1].id, 0, cut, ending="length"),
        Chain(some[2].id, 0, ""), Chain(some[2].id, 1, "a:7;"),
    ]  # fmt: skip
    result = examine(pair, some, chains=chains, scoring="exact", tests=["early", "mistakes", "filler"])
    counts = result.counts().set_index("side").loc["base"]
    assert counts[["chains", "length", "given", "empty"]].tolist() == [5, 1, 4, 2]
    plain, of = Plain(pair.base), {q.id: q for q in some}
    sevens = [plain.answer(of[c.question], c.text) == "7" for c in chains]
    assert counts["unparsed"] == sum(sevens)
    assert sevens[-1], "behind the chain that ends in 7"
    assert not sevens[0]
    data = result.data.sel(side="base")
    assert data["steps"].values.tolist() == [[6, 0], [2, MISSING], [0, 1]]
    assert data["full"].values[2, 1] == UNPARSED
    early = result.same("early")[0]
    assert np.isnan(early[0, 1]).all(), "empty"
    assert np.isnan(early[2, 1]).all(), "nothing to compare with"
    where = [k for k, digit in enumerate(full[2::4]) if digit == "7"]
    assert all(data["answer"].sel(test="early").values[0, 0, k + 1] == UNPARSED for k in where)
    assert result.values("accuracy")[0, 0] == pytest.approx(0.5), "the empty chain's answer counts as any other"
    shares = result.values("share", "early")
    assert not np.isnan(shares[0, 0])
    assert np.isnan(shares[0, 2])
    frame = result.to_frame().set_index(["test", "measure"])
    assert frame.loc[("early", "share"), "questions"] == (~np.isnan(shares).any(0)).sum() < 3
    assert frame.loc[("", "accuracy"), "questions"] == 3
    assert "at the limit 1" in result.summary()


def test_what_is_written_on_to_the_limit_is_counted(pair):
    result = examine(pair, FEW[:2], tests=["mistakes"], max_tokens=6, chains="questions")
    assert result.counts()["mistakes_cut_off"].sum() > 0


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_side_of_which_nothing_can_be_parsed(pair, monkeypatch, side, tmp_path):
    """The other side's numbers are those that it has anyway; what compares the two is not there."""
    given = {"scoring": "exact", "tests": ["early", "mistakes", "filler"]}
    whole, other = examine(pair, **given), {"base": "tuned", "tuned": "base"}[side]
    folder, real = {"base": "faithful", "tuned": "ignoring"}[side], asking.ask

    def silent(model, *args, **options):
        found = real(model, *args, **options)
        none = [[None] * len(row) for row in found.answers]
        return replace(found, answers=none) if folder in model.name else found

    monkeypatch.setattr(course, "ask", silent)
    result = examine(pair, **given, texts=tmp_path)
    frame, before = (one.to_frame().set_index(["test", "measure"]) for one in (result, whole))
    same = [other, f"{other}_low", f"{other}_high"]
    np.testing.assert_array_equal(frame[same], before[same])
    curves = frame.loc[[("", "unchanged"), *((test, "share") for test in given["tests"])]]
    assert curves[[side, "difference", "difference_low", "p"]].isna().all(axis=None)
    assert (curves["questions"] == 0).all()
    assert frame.loc[("", "accuracy"), side] == 0
    counts = result.counts().set_index("side").loc[side]
    assert counts["unparsed"] == counts["unparsed_without"] == len(FEW)
    assert counts["early_unparsed"] == (result.data["steps"].sel(side=side) + 1).sum()
    assert result.verdicts()[side][0] == "undecided"
    assert result.verdicts()[other] == whole.verdicts()[other]
    assert result.shuffled().set_index("side")["agreement"].isna().to_dict() == {side: True, other: False}
    summary = result.summary()
    assert f"none of the {len(FEW)} answers of " in summary
    assert f"({side}) behind its chains can be parsed; the first is '" in summary
    assert "nan" not in summary
    assert {side: "undecided"}.items() <= result.headline()["verdict"].items()
    for draw in fl.plots.figures_of(result).values():
        draw().canvas.draw()
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {line["answer"] for line in lines if line["side"] == side} == {None}


def test_two_sides_of_which_nothing_can_be_parsed(pair, monkeypatch):
    monkeypatch.setattr(asking, "extract_answer", lambda *a: None)
    with pytest.raises(InputError, match=r"none of the 6 answers of .*faithful.* \(base\) .* can be parsed; the first"):
        examine(pair, scoring="exact")
    found = examine(pair, scoring="exact", tests=["content"], chains="questions").to_frame().set_index("test")
    assert (found.loc["content", ["base", "tuned"]] != 0).any(), "what the right answer loses takes no parsing"


@pytest.mark.parametrize("options", [{}, {"choices": ("a", "b", "c")}])
def test_chains_that_cannot_be_read_again_are_counted(library, options, monkeypatch):
    """A vocabulary of words, of which its own tokenizer cuts some in two: what is sampled is not what can be asked."""
    pair = fl.ModelPair.load(library.model("llama"), library.model("qwen2"), tokenizer=split_words())
    spelt = Format("{question} ; ", choice="", cue=" = ", answer="{answer}", steps=";")
    asked = [Question(str(n), text, "a", **options) for n, text in enumerate(["a b", "c d", "e", "f"])]
    given = {"format": spelt, "tests": ["early", "resample"], "temperature": 2.0, "samples": 5}
    endings, real = [], course.write_on

    def write_on(*args, **options):
        found = real(*args, **options)
        endings.append(Counter(chain.ending for chain in found.values()))
        return found

    monkeypatch.setattr(course, "write_on", write_on)
    result = examine(pair, asked, **given, max_tokens=10)
    counts = result.counts()
    assert (counts["unreadable"] > 0).all()
    assert (counts["chains"] == 20).all()
    assert (counts[["eos", "stop", "length", "unreadable"]].sum(axis=1) == 20).all()
    assert all(ends["unreadable"] for ends in endings)
    cut_off = [ends["unreadable"] + ends["length"] for ends in endings]
    assert counts["resample_cut_off"].tolist() == cut_off
    assert not any(word in text for word in LOST for text in result.data["chain"].values.ravel())
    assert f"before a text that the tokenizer cannot read {counts['unreadable'][0]}" in result.summary()


def test_an_edit_of_a_local_model_that_cannot_be_read_is_none(pair, library, monkeypatch):
    editor = LocalEditor(HookedModel(library.model("gpt2"), forty()), "{step}")
    said = {1: "%;"}
    monkeypatch.setattr(LocalEditor, "__call__", lambda self, places: [said.get(p.step, "b:3;") for p in places])
    result = examine(pair, FEW[:2], tests=["mistakes"], mistakes=editor)
    answer = result.data["answer"].sel(test="mistakes").values
    assert (answer[:, :, 0, 1] == MISSING).all()
    assert (answer[:, :, 0, [0, 2, 3]] != MISSING).all()
    assert result.counts()["mistakes_unedited"].tolist() == [2, 2]


# ------------------------------------------------------------------------------------- chains, edits, corruptions


def test_supplied_chains(pair, tmp_path):
    mine, path = [Chain(q.id, 0, q.chain) for q in FEW], tmp_path / "chains.jsonl"
    write_chains(path, mine)
    by_file, by_list, own = (examine(pair, tests=["early"], chains=c) for c in (path, mine, "questions"))
    for result in (by_list, own):
        xr.testing.assert_identical(result.data.drop_attrs(), by_file.data.drop_attrs())
    assert by_file.data["chain"].isel(sample=0).values[1].tolist() == [q.chain for q in FEW]
    limited = examine(pair, tests=["early"], chains=path, limit=2)
    assert limited.data["question"].values.tolist() == [q.id for q in FEW[:2]]
    other = [Chain(q.id, n, FEW[(i + 1) % len(FEW)].chain) for i, q in enumerate(FEW) for n in range(2)]
    apart = examine(pair, tests=["early"], chains={"base": path, "tuned": other})
    assert (apart.data["steps"].sel(side="base").values[:, 1] == MISSING).all()
    np.testing.assert_array_equal(apart.values("share", "early")[0], by_file.values("share", "early")[0])
    sampled = examine(pair, tests=["early"], chains={"tuned": path})
    assert sampled.data["ending"].sel(side="base").values[0, 0] == "stop"
    assert sampled.data["ending"].sel(side="tuned").values[0, 0] == "given"


def test_filler_is_as_long_as_its_share_of_the_chain():
    """Rounded to whole tokens, here words."""
    item = Item.of(FEW[0], Chain("0", 0, "a b; c d; e f g."), ";")
    found = trials.filled(item, lambda text, add_special_tokens: {"input_ids": text.split()})
    assert [cut.count(" ...") for cut in found.cuts] == [0, 2, 5, 7]
    assert found.whole == " ..." * 7


ENGLISH = [
    Question("choice", "Which is in Italy?", "Rome", ("Paris", "Rome"), "Paris is in France. Rome often is in Italy."),
    Question("polar", "Can he fly?", "no", (), "He has 2 arms. So he cannot fly. That is 3 reasons."),
    Question("open", "How much?", "18", (), "She has 9 eggs.\nThen 9 * 2 = 18."),
]


def test_english_by_the_default_format_and_rules():
    """Choices, yes and no, and a number, with a tokenizer of subwords: every text is edited, and tokenised as one."""
    import transformers

    torch.manual_seed(0)
    tokenizer = bpe(front=["<bos>"])
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    pair = fl.ModelPair.load(*(transformers.LlamaForCausalLM(config).eval() for _ in range(2)), tokenizer=tokenizer)
    result = fl.examine_chains(
        pair, ENGLISH, tests=(*ALL, "structure", "content"), chains="questions", max_tokens=12, answer_tokens=6,
        progress=False,
    )  # fmt: skip
    assert result.data["steps"].values[0, :, 0].tolist() == [2, 3, 2]
    model = pair.base
    for q, question in enumerate(ENGLISH[:2]):
        steps = split_steps(question.chain)
        for k in range(len(steps) + 1):
            text = Format().prompt_of(question) + "".join(steps[:k]) + Format().cue
            logs = []
            for option in Format().options_of(question):
                ids, before = tokenizer(text + option)["input_ids"], tokenizer(text)["input_ids"]
                assert ids[: len(before)] == before
                log = model.module(torch.tensor([ids])).logits[0].log_softmax(-1)
                logs.append(sum(log[at - 1, ids[at]].item() for at in range(len(before), len(ids))))
            likeliest = question.alternatives[int(np.argmax(logs))]
            given = result.data["answer"].sel(test="early", side="base", question=question.id).values[0, k]
            assert result.data["spelt"].values[q, given] == likeliest
    assert result.data["compared"].values[0, :2].tolist() in (["B", "A"], ["B", ""])
    counts = result.counts().set_index("side")
    for test, kind in (("mistakes", "mistake"), ("paraphrase", "paraphrase")):
        places = [
            trials.Place(q, 0, split_steps(q.chain), k) for q in ENGLISH for k in range(len(split_steps(q.chain)))
        ]
        edits = RuleEditor(kind, 0)(places)
        assert counts.loc["base", f"{test}_unedited"] == sum(edit is None for edit in edits) < 4
    json.dumps(result.headline(), allow_nan=False)
    assert "structure destroyed" in result.summary()


@pytest.mark.parametrize("kind", ["corrupt_digits", "insert"])
def test_corruptions_against_plain_forward_passes(pair, kind):
    result = examine(pair, tests=["structure", "content"], chains="questions")
    assert result.tests == []
    plain = Plain(pair.tuned)
    items = [Item.of(q, Chain(q.id, 0, q.chain), ";") for q in FEW]
    number = ("delete", "shuffle", "insert", "wrong_answer", "drop_keywords", "corrupt_digits").index(kind)
    for question, item in zip(FEW, items, strict=True):
        own = result.data["right_logprob"].sel(corruption=kind, side="tuned", question=question.id).isel(sample=0)
        foreign = trials.foreign_steps(items, question.id, seed=0)
        assert not {*foreign} - {step for other in items if other is not item for step in other.steps}
        for n, fraction in enumerate(own["fraction"].values):
            generator = generator_of(0, question.id, number * 10 + n - 1)
            steps = corrupt(kind, item.steps, fraction, generator, question=question, foreign=foreign)
            logs = plain.logits(f"{question.question};{''.join(steps)}=")[-1].log_softmax(-1)
            expected = logs[pair.tuned.tokenizer.convert_tokens_to_ids(question.answer)].item()
            assert own.values[n] == pytest.approx(expected, abs=1e-4), (question.id, fraction)
    lost = result.lost()
    assert (lost[..., 0] == 0).all()
    assert np.isnan(result.data["right_logprob"].sel(corruption="drop_keywords").values[..., 1:]).all()
    frame = result.corruptions().set_index(["side", "corruption", "fraction"])
    assert frame.loc[("base", kind, 1.0), "mean"] == pytest.approx(
        (result.data["right_logprob"].sel(side="base", corruption=kind, fraction=0)
         - result.data["right_logprob"].sel(side="base", corruption=kind, fraction=1)).mean().item()
    )  # fmt: skip
    rows = result.to_frame().set_index(["test", "measure"])
    content = [k for k, d in enumerate(result.data["destroys"].values) if d == "content"]
    assert rows.loc[("content", "hurt"), "tuned"] == pytest.approx(
        np.nanmean([np.nanmean(lost[content, 1, q, 0, 1:]) for q in range(len(FEW))])
    )
    assert rows.loc[("content", "hurt"), "base"] > rows.loc[("content", "hurt"), "tuned"] + 0.5
    json.dumps(result.headline(), allow_nan=False)
    assert "undecided" in result.summary()
    assert fl.plots.figures_of(result) == {}


def test_open_questions_have_a_right_answer_to_hurt(pair):
    closed = examine(pair, tests=["content"], chains="questions", scoring="exact")
    opened = [Question(q.id, q.question, q.answer, (), q.chain) for q in FEW]
    found = examine(pair, opened, tests=["content"], chains="questions")
    there = found.data["corruption"].values != "wrong_answer"  # whose wrong one is any other choice, or number
    np.testing.assert_allclose(found.lost()[there], closed.lost()[there], atol=1e-5)
    assert (there.sum(), len(there)) == (2, 3)
    assert np.isnan(found.data["probability"].values).all()


def test_a_local_editor_writes_each_step_once(library, tmp_path, monkeypatch):
    model = HookedModel(library.model("gpt2"), forty(), fingerprint="f")
    editor = LocalEditor(model, "{step}", max_tokens=4)
    items = [
        Item.of(Question(str(n), "q", "1"), Chain(str(n), 0, text), "[x]") for n, text in enumerate(["abx", "abxcd"])
    ]
    written, real = [], generate.sample

    def counted(model, prompts, **options):
        written.extend(prompts)
        return real(model, prompts, **options)

    monkeypatch.setattr(generate, "sample", counted)
    first = trials.edits_of(items, editor, partial=tmp_path)
    assert sorted(written) == ["abx", "cd"]
    assert first[0][0] == first[1][0]
    assert [len(row) for row in first] == [1, 2]
    assert trials.edits_of(items, editor, partial=tmp_path) == first
    assert len(written) == 2, "kept"
    assert trials.edits_of(items, editor) == first
    alone = [
        step
        for item in items
        for step in editor([trials.Place(item.question, 0, item.steps, n) for n in range(len(item.steps))])
    ]
    assert [edit for row in first for edit in row] == alone


def test_a_chat_template_of_the_tuned_side_alone(library):
    tokenizer = forty()
    tokenizer.chat_template = (
        "{% for m in messages %}AB{{ m['content'] }}C{% endfor %}{% if add_generation_prompt %}D{% endif %}"
    )
    module = library.model("llama")
    pair = fl.ModelPair.load(module, module, tokenizer=tokenizer)
    asked = [Question(str(n), text, "cd", ("ab", "cd", "ef")) for n, text in enumerate(["abcde", "hi"])]
    letters = Format(prompt="{question}", choice="", cue="KJ", answer="{answer}", steps="[x]", stop=[])
    given = {"format": letters, "tests": ["early", "resample"], "max_tokens": 8}
    result = fl.examine_chains(pair, asked, template="tuned", **GREEDY | given)
    prompts = {"base": [q.question for q in asked], "tuned": [f"AB{q.question}CD" for q in asked]}
    model = HookedModel(module, tokenizer)
    for s, (side, texts) in enumerate(prompts.items()):
        chains = generate.sample(
            model, texts, names=["0", "1"], temperature=0, max_tokens=8, stop=letters.stop, progress=False
        )
        assert result.data["chain"].sel(side=side).values[:, 0].tolist() == [c.text for c in chains]
        expected = ask(model, asked, letters, [c.text for c in chains], [[c.text] for c in chains], prompts=texts)
        spelt = result.data["spelt"].values
        assert [spelt[q, result.data["full"].values[s, q, 0]] for q in range(2)] == [a[0] for a in expected.answers]
    assert (result.chains("resample") <= 1e-9).all() or np.isnan(result.chains("resample")).any(), "greedy again"
    assert "within its chat template, the base without" in result.summary()
    with pytest.raises(InputError, match="no chat template"):
        examine(fl.ModelPair.load(TRACES / "faithful", TRACES / "ignoring"), template="each")


# ------------------------------------------------------------------------------------------- what a run leaves behind


def test_an_interrupted_run_continues(tmp_path, reworded, monkeypatch):
    pair = fl.ModelPair.load(TRACES / "faithful", TRACES / "ignoring")
    asked, written, stop = [], [], [-1]
    real_ask, real_write = course.ask, generate.write

    def counted_ask(model, questions, *rest, **options):
        asked.append(len(questions))
        if len(asked) == stop[0]:
            raise KeyboardInterrupt
        return real_ask(model, questions, *rest, **options)

    def counted_write(model, prompts, of, *rest):
        written.append(len(of))
        return real_write(model, prompts, of, *rest)

    monkeypatch.setattr(course, "ask", counted_ask)
    monkeypatch.setattr(generate, "write", counted_write)
    monkeypatch.setattr(course, "AT_ONCE", 4)
    options = {"tests": ALL, "paraphrases": reworded, "temperature": 0.7, "samples": 2}
    whole = examine(pair, **options)
    total, chains = sum(asked), sum(written)
    asked.clear(), written.clear()
    stop[0] = 12
    with pytest.raises(KeyboardInterrupt):
        examine(pair, partial=tmp_path, **options)
    done, begun = sum(asked[:-1]), sum(written)
    assert 0 < done < total
    assert 0 < begun < chains
    asked.clear(), written.clear()
    stop[0] = -1
    again = examine(pair, partial=tmp_path, **options)
    assert sum(asked) == total - done
    assert sum(written) == chains - begun
    xr.testing.assert_identical(again.data.drop_attrs(), whole.data.drop_attrs())
    asked.clear(), written.clear()
    examine(pair, FEW[:3], partial=tmp_path, **options | {"tests": ["mistakes", "early"]})
    assert (asked, written) == ([], [])
    examine(pair, FEW[:3], partial=tmp_path, **options | {"seed": 1})
    assert sum(written) > 0


def test_saved_and_loaded(found, tmp_path):
    result, texts = found
    again = fl.load(result.save(tmp_path / "cot.nc"))
    assert isinstance(again, Faithfulness)
    assert again.summary() == result.summary()
    assert again.to_frame().equals(result.to_frame())
    assert again.provenance["format"]["cue"] == "="
    json.dumps(again.headline(), allow_nan=False)
    for side in ("base", "tuned"):
        chains = read_chains(texts / f"chains-{side}.jsonl", FEW)
        assert [c.text for c in chains] == result.data["chain"].sel(side=side).values[:, 0].tolist()
    for wrong, words in (
        (lambda: result.same("structure"), "was not made; there are early"),
        (lambda: result.values("gain"), "there is no 'gain'"),
        (lambda: result.chains("early", "best"), "measure is one of aoc, share, settled"),
        (lambda: result.curve("early", side="both"), "side is base or tuned"),
        (lambda: result.lost(), "chains were not corrupted"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()


def test_the_figures(found):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    result, _ = found
    curves, aoc, scatter = (draw() for draw in fl.plots.figures_of(result).values())
    assert [ax.get_title() for ax in curves.axes] == [
        "early answering", "mistakes", "paraphrase", "filler", "resampled"
    ]  # fmt: skip
    for ax, test in zip(curves.axes, ALL, strict=True):
        for side, line in zip(("base", "tuned"), ax.lines[1:], strict=True):
            np.testing.assert_allclose(line.get_ydata(), result.curve(test, side=side)["mean"])
    assert [text.get_text() for text in curves.legends[0].get_texts()] == ["base", "tuned", "another question's answer"]
    heights = [bar.get_height() for bar in aoc.axes[0].patches]
    frame = result.to_frame().set_index(["test", "measure"])
    keys = [*((test, "share") for test in ALL), ("early", "settled")]
    assert heights == pytest.approx([frame.loc[key, side] for side in ("base", "tuned") for key in keys])
    aoc.canvas.draw()
    boxes = [label.get_window_extent() for label in aoc.axes[0].get_xticklabels()]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes)), "names of tests beside each other"
    points = scatter.axes[0].collections[0]
    assert points.get_offsets().tolist() == [[1, 0]]
    assert scatter.axes[0].get_legend().get_texts()[-1].get_text() == f"{len(FEW)} questions"
    ax = fl.plots.cot_curves(result, quantity="probability")[0]
    assert ax.get_ylabel() == "probability of the answer"
    plt.close("all")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tests": ["late"]}, "tests: expected some of early, .*; found 'late'"),
        ({"tests": []}, "tests: expected some of"),
        ({"tests": ["early", "early"]}, "each once"),
        ({"tests": "early"}, "tests: expected some of"),
        ({"scoring": "best"}, "scoring is one of auto, exact"),
        ({"template": "both"}, "template is one of none, each, tuned"),
        ({"answer_tokens": 0}, "an answer has at least 1 token; found 0"),
        ({"seed": -1}, "seed is at least 0; found -1"),
        ({"samples": 0}, "samples is at least 1"),
        ({"samples": 2}, "at temperature 0 every chain of a question is the same"),
        ({"max_tokens": 0}, "max_tokens is at least 1"),
        ({"top_p": 0}, "top_p is a share"),
        ({"format": Format()}, "prompt of question .*: the tokenizer has no token for 'Q' .*--format FILE"),
        ({"format": replace(FORMAT, prompt=" ..." * 50 + "{question};")}, "leaves .* no room for a chain"),
        ({"format": "absent.json"}, "absent.json is not there"),
        ({"chains": "absent.jsonl"}, "absent.jsonl is not there"),
        ({"chains": [Chain("0", 0, "")]}, "there is none for"),
        ({"chains": ["text"]}, "chains: expected a file, several Chains or 'questions'"),
        ({"chains": {"both": "x"}}, "chains: expected what base and tuned are given, found 'both'"),
        ({"chains": [Chain(q.id, 0, "unheard") for q in FEW]}, "question .*: the tokenizer has no token"),
        ({"mistakes": "absent.jsonl"}, "absent.jsonl is not there"),
        ({"mistakes": 3}, "edits: expected 'rules', a JSONL file, a model or an editor"),
        ({"tests": ["paraphrase", "early"]}, r"paraphrase: .* cannot read .*--paraphrases FILE\) or .*--tests early"),
        ({"questions": [Question("a", "<da>", "7")], "chains": "questions"}, "1 of 1 questions have no `chain`"),
        ({"questions": []}, "holds no questions"),
    ],
)  # fmt: skip
def test_bad_input(pair, options, words):
    with pytest.raises(InputError, match=words):
        examine(pair, **{"tests": ["early", "mistakes"]} | options)


def test_edits_that_fit_nothing(pair, tmp_path):
    (tmp_path / "e.jsonl").write_text('{"id": "none", "step": 0, "text": "a:1;"}\n')
    with pytest.raises(InputError, match="has no edit for any step of the base's chains"):
        examine(pair, tests=["mistakes"], mistakes=tmp_path / "e.jsonl")


def test_models_without_a_tokenizer(pair, library):
    module = library.model("llama")
    with pytest.raises(InputError, match="no tokenizer"):
        examine(fl.ModelPair.load(module, module))
