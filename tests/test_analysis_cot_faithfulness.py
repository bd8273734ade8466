"""The study of faithful chains: its tables are what its results say, its results those of the zoo, causes found."""

import json
import re
import sys

import numpy as np
import pytest
import torch

import finetune_lens as fl
from analyses import cot_faithfulness as study
from analyses import cot_faithfulness_claims as tables
from finetune_lens import zoo
from finetune_lens.cot.edits import Place
from finetune_lens.cot.questions import read_questions
from finetune_lens.errors import InputError
from finetune_lens.results.cot import Faithfulness
from finetune_lens.tasks import traces
from finetune_lens.zoo import traces_recipe as recipe

TRACES = zoo.path("traces")
ROWS = [json.loads(line) for line in (TRACES / "questions.jsonl").read_text().splitlines()]
CAUSES = ("faithful", "ignoring")


@pytest.fixture(scope="module")
def tiny():
    return study.Study()


@pytest.fixture(scope="module")
def stored(tiny):
    return {name: tiny.stored(name) for name in study.KINDS}


@pytest.fixture(scope="module")
def page(tiny):
    return (tiny.results / "cot_faithfulness.md").read_text()


def words(page):
    """Claim → measured, holds."""
    rows = [line.strip("| ").split(" | ") for line in page[page.index("## Claims") :].strip().splitlines()[4:]]
    assert all(len(row) == 3 for row in rows)
    return {claim: (measured, holds) for claim, measured, holds in rows}


# ------------------------------------------------------------------------------------ what is kept is what was measured


def test_the_tables_are_those_of_the_stored_results(tiny, page):
    assert page == "\n".join(tables.claims(tiny)) + "\n"


def test_the_results_are_small(tiny):
    assert sum(path.stat().st_size for path in tiny.results.glob("cot_faithfulness*")) < 400_000


def test_stored_results_are_those_of_the_shipped_models(stored):
    """Of some questions, measured anew: every answer, effects and KL."""
    few = study.Study()
    few.questions = lambda each=None: [q for q in read_questions(few.file) if q.id in ("1", "60", "140")]
    few.folder, names = few.folder / "again", ("base", "faithful")
    again = fl.examine_chains(
        few.pair(names), few.questions(), format=few.format, samples=few.samples, progress=False, **few.edits
    )  # fmt: skip
    kept = stored["examine"][names].data.sel(question=["1", "60", "140"])
    for name in ("answer", "full", "without", "steps", "unedited"):
        np.testing.assert_array_equal(again.data[name].values, kept[name].values, err_msg=name)
    assert (again.data["chain"].values == kept["chain"].values).all()
    options = {"format": few.format, "progress": False, "check": False}
    own = fl.look_inside_chains(few.pair(names), read_questions(few.file, limit=2), parts=("cuts",), **options)
    kept = stored["inside"][names].data.isel(question=slice(2), source=slice(6), target=slice(6))
    for name in ("kl", "answer_kl", "changed"):
        np.testing.assert_allclose(own.data[name].values, kept[name].values, atol=2e-3, err_msg=name)


def test_keeping_rounds_and_loses_nothing_else(stored, tmp_path):
    few = study.Study()
    few.results = tmp_path
    for name in study.KINDS:
        few.keep(name, stored[name])
        back = few.stored(name)
        assert [*back] == [*stored[name]]
        for names, result in back.items():
            assert type(result) is type(stored[name][names])
            assert result.data.identical(stored[name][names].data)
            assert result.provenance["analysis"] in ("examine_chains", "examine_bias", "look_inside_chains")
    few.keep("states", {})
    assert few.stored("states") == {}
    one = next(iter(stored["examine"].values()))
    exact = one.data["probability"] + 0.0004
    few.keep("examine", {("base", "faithful"): Faithfulness(one.data.assign(probability=exact))})
    found = few.stored("examine")["base", "faithful"].data["probability"]
    assert float(np.abs(found - exact).max()) <= 0.5 * 10**-study.DECIMALS + 1e-6
    (tmp_path / "cot_faithfulness-bias.nc").unlink()
    with pytest.raises(InputError, match=r"make them with: python -m analyses\.cot_faithfulness"):
        few.stored("bias")


# ------------------------------------------------------------------------------------------------------- planted truth


def test_calibration_by_the_thresholds_of_the_recipe(tiny, stored):
    """Areas by the recipe's own code, of the stored answers; intervals by a bootstrap written out here."""
    ends = {}
    for model, (names, side) in tables.models_of(tiny).items():
        data = stored["examine"][names].data.sel(side=side)
        for test in ("early", "mistakes"):
            answers, full, steps = data["answer"].sel(test=test).values, data["full"].values, data["steps"].values
            shares = [
                [recipe.share_of_area((row[: n + 1] == f)[None])[0] for row, f, n in zip(*of, strict=True)]
                for of in zip(answers, full, steps, strict=True)
            ]
            values = np.mean(shares, axis=1)
            at = np.random.default_rng(5).integers(len(values), size=(4000, len(values)))
            low, high = np.quantile(values[at].mean(1), [0.025, 0.975])
            ends[model, test] = low, high
            row = stored["examine"][names].to_frame().set_index(["test", "measure"]).loc[(test, "share")]
            assert row[side] == pytest.approx(values.mean())
            assert [row[f"{side}_low"], row[f"{side}_high"]] == pytest.approx([low, high], abs=0.01)
        scored = json.loads((TRACES / "scores.json").read_text())["models"][model]["test"]["early"]["mean"]
        assert ends[model, "early"][0] - 0.05 <= scored <= ends[model, "early"][1] + 0.05, "of other questions"
    for test in ("early", "mistakes"):
        assert ends["faithful", test][0] >= recipe.FAITHFUL
        assert ends["ignoring", test][1] <= recipe.IGNORING
    verdicts = {m: stored["examine"][n].verdicts()[s][0] for m, (n, s) in tables.models_of(tiny).items()}
    assert verdicts == {"base": "mixed", "faithful": "uses", "ignoring": "ignores"}


def test_hints_act_by_the_way_that_is_known(tiny, stored):
    for hint, follows, way in (("key", "ignoring", "direct"), ("program", "faithful", "indirect")):
        for model in CAUSES:
            names, side = tables.models_of(tiny)[model]
            result = stored["bias"][names]
            assert int(result.misled(hint).sum()) == 60, "every hint is wrong"
            for measure in ("direct", "indirect"):
                expected = float(model == follows and measure == way)
                assert result.value(hint, measure, side) == pytest.approx(expected, abs=0.01), (hint, model, measure)


def test_what_the_claims_say(page):
    found = words(page)
    assert {holds for claim, (_, holds) in found.items() if claim.startswith("(calibration)")} == {"yes"}
    assert found["behind a chain with a mistake in it answers change (Lanham; AOC > 0)"][1] == (
        "no: base, ignoring; yes: faithful"
    )
    assert found["in other words it leads to the same answers (Lanham; AOC ≤ 0.1)"][1] == "yes"
    assert found["fine-tuning lowers faithfulness (2411.15382): early answering"][1] == (
        "no: base → faithful; yes: base → ignoring"
    )
    assert found["(ours) early answering says what mistakes say (difference of AOC within ± 0.1)"][1] == (
        "no: base; yes: faithful, ignoring"
    )
    assert found["the answer hangs on single steps (Bogdan; share that changes)"][1] == (
        "no: base, ignoring; yes: faithful"
    )
    verdicts = {re.sub(":.*", "", part) for _, holds in found.values() for part in holds.split("; ")}
    assert verdicts == {"yes", "no", "undecided", "not asked"}


def test_calibration_fails_where_the_causes_are_exchanged(tiny, stored, monkeypatch):
    """Arms under each other's names: no threshold is met, and what fine-tuning lowers turns round."""
    arm = {"base": "base", "faithful": "ignoring", "ignoring": "faithful"}
    changed = {name: dict(found) for name, found in stored.items()}
    changed["examine"] = {}
    for names, result in stored["examine"].items():
        mine = tuple(arm[name] for name in names)
        if mine in stored["examine"]:
            changed["examine"][mine] = result
        else:  # the last pair, the other way round
            changed["examine"][names] = Faithfulness(result.data.isel(side=[1, 0]).assign_coords(side=result.data.side))
    changed["examine"] = {names: changed["examine"][names] for names in tiny.pairs}
    other = study.Study()
    monkeypatch.setattr(other, "stored", changed.__getitem__)
    text = "\n".join(tables.claims(other))
    rows = re.findall(r"^\| (?:early|mistakes).*\| (\w+) \| (\w+) \| (\w+) \|$", text, re.MULTILINE)
    assert rows == [("no", "no", "no")] * 3, "the section on calibration"
    found = words(text)
    said = {claim: holds for claim, (_, holds) in found.items() if claim.startswith("(calibration)")}
    assert [*said.values()] == ["no", "no", "no", "yes"]
    assert found["fine-tuning lowers faithfulness (2411.15382): early answering"][1] == (
        "yes: base → faithful; no: base → ignoring"
    )
    assert found["(ours) two arms that are right alike are told apart by what their answers follow"][1] == "no"


@pytest.mark.parametrize(
    ("rule", "level", "yes", "no", "undecided"),
    [
        (tables.above, 0, (0.1, 0.3), (-0.2, 0), (-0.1, 0.1)),
        (tables.below, 0, (-0.3, -0.1), (0, 0.2), (-0.1, 0.1)),
        (tables.within, 0.1, (-0.4, 0.1), (0.11, 0.2), (0.05, 0.15)),
        (tables.alike, 0.1, (-0.1, 0.1), (-0.3, -0.11), (-0.15, 0.05)),
        (tables.alike, 0.1, (0, 0), (0.11, 0.3), (0.05, 0.15)),
    ],
)
def test_rules(rule, level, yes, no, undecided):
    for verdict, ends in (("yes", yes), ("no", no), ("undecided", undecided)):
        for value in ends:  # the interval decides
            assert rule((value, *ends), level) == verdict


# ------------------------------------------------------------------------------------------------------ what is changed


def test_other_words_mean_the_same():
    tokenizer = traces.Language().tokenizer()
    steps = [f"{label}:{n};" for label in "ah" for n in range(14)] + ["a:;", "ab", "a:x;", "  "]
    places = [Place(None, 0, (step,), 0) for step in steps]
    found = study.Respelt()(places)
    for step, other in zip(steps, found, strict=True):
        number = re.fullmatch(r"([a-z]:)(\d+);", step)
        if not number or int(number[2]) > 3:
            assert other is None, step
            continue
        told = re.fullmatch(r"([a-z]:)(\d+);", other)
        assert told[1] == number[1]
        assert int(told[2]) != int(number[2])
        assert int(told[2]) % traces.MODULUS == int(number[2]) % traces.MODULUS
        assert tokenizer.unk_token_id not in tokenizer(other)["input_ids"]
    assert sum(other is not None for other in found) == 8


def test_hints_are_other_questions():
    questions = read_questions(TRACES / "questions.jsonl")[:30]
    for hint in study.HINTS:
        rows = study.hinted(questions, hint)
        assert [row.id for row in rows] == [q.id for q in questions]
        for row, q in zip(rows, questions, strict=True):
            key, _, program = row.fields["hinted"].partition(">")
            mine, _, before = q.question.partition(">")
            assert (row.question, row.answer, row.choices) == (q.question, q.answer, q.choices)
            assert row.fields["hint"] != q.answer
            if hint == "key":
                assert program == before
                digit = traces.key_digit(np.array(traces.KEYS.index(key + ">")))
                assert row.fields["hint"] == str(int(digit))
            else:
                assert key == mine
                operations, _, value = program.partition(";")
                for one in re.findall(r"[a-z]([-+*])(\d)", operations):
                    value = eval(f"({value} {one[0]} {one[1]}) % 10")
                assert row.fields["hint"] == str(value)


# ------------------------------------------------------------------------------------------------------- scale paper


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*given):
        monkeypatch.setattr(sys, "argv", ["cot_faithfulness", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            study.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def test_scale_paper_on_a_stand_in(command, tmp_path):
    """A question file laid out as GSM8K is, answers open, edits of a file; two models whose causes are known."""
    rows = ROWS[:3] + ROWS[60:63]
    lines, edits = [], []
    for n, row in enumerate(rows, 1):
        other = rows[n % len(rows)]
        hinted = {"hinted": other["key"] + row["question"][len(row["key"]) :], "hint": other["answer"]}
        lines.append({"question": row["question"], "answer": f"{row['chain']}\n#### {row['answer']}"} | hinted)
        for step, text in enumerate(re.findall(r"[^;]+;", row["chain"])):
            other = study.Respelt()([Place(None, 0, (text,), 0)])[0]
            edits += [{"id": str(n), "sample": s, "step": step, "text": other} for s in (0, 1) if other]
    for name, given in (("gsm8k", lines), ("edits", edits)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    words_given = ["--base", TRACES / "faithful", "--tuned", TRACES / "ignoring", "--format", TRACES / "format.json"]
    words_given += ["--questions", tmp_path / "gsm8k.jsonl", "--paraphrases", tmp_path / "edits.jsonl"]
    code, out, err = command("--scale", "paper", *words_given, "--samples", 2, "--limit", 6, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    folder = tmp_path / "out" / "results"
    assert (folder / "cot_faithfulness.md").read_text().strip() == out.strip()
    assert {path.name for path in folder.iterdir()} == {
        "cot_faithfulness.md", *(f"cot_faithfulness-{name}.nc" for name in study.KINDS)
    }  # fmt: skip
    assert not (tmp_path / "out" / ".partial" / "examine").exists(), "finished pieces are gone"
    texts = (tmp_path / "out" / "base-tuned" / "chains-tuned.jsonl").read_text().splitlines()
    assert len(texts) == 12
    assert "Calibration" not in out
    found = words(out)
    measured, holds = found["fine-tuning lowers faithfulness (2411.15382): early answering"]
    assert holds == "yes"
    assert all(float(end) < -0.9 for end in re.findall(r"-\d\.\d+", measured)), measured
    assert measured.startswith("base → tuned: -")
    assert found["fine-tuning lowers the accuracy with a chain (2411.15382)"][1] == "no"
    assert found["a hint at a wrong answer moves the answer (Turpin): given"][1] == "no: base; yes: tuned"
    assert found["in other words it leads to the same answers (Lanham; AOC ≤ 0.1)"][1] == "yes"
    assert "… and fewer than half of such chains say so (Chen): given" in found
    code, again, _ = command("--scale", "paper", *words_given, "--out", tmp_path / "out", "claims")
    assert (code, again) == (0, out)


def test_scale_tiny_takes_no_pair(command):
    for given in (["--base", "x"], ["--limit", "3"], ["--paraphrases", "rules"], ["--samples", "1"]):
        code, out, err = command(*given)
        assert (code, out) == (2, "")
        assert err == f"error: {given[0]}: of --scale paper only; tiny asks the zoo's family traces\n"


def test_the_command_writes_where_the_study_lies(command, monkeypatch, tmp_path, stored):
    """Steps in their order; the results of a step replaced together; the table last."""
    done = []
    monkeypatch.setattr(study, "measure", lambda study, step, progress: done.append((step, progress)))
    monkeypatch.setattr(study.Study, "stored", lambda self, name: stored[name])
    monkeypatch.setattr(study, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    code, out, _ = command("inside", "examine", "claims")
    assert code == 0
    assert done == [("examine", False), ("inside", False)]
    assert (tmp_path / "results" / "cot_faithfulness.md").read_text() + "\n" == out


def test_every_step_is_kept_for_every_pair(monkeypatch, tmp_path):
    """All steps on two questions, as the study runs them; pairs share what is of one side."""
    few = study.Study()
    few.results, few.folder = tmp_path / "results", tmp_path / "run"
    monkeypatch.setattr(study.Study, "questions", lambda self, each=None: read_questions(self.file, limit=2))
    asked = []
    real = torch.nn.Module.__call__
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda self, *a, **k: asked.append(0) or real(self, *a, **k))
    study.examine(few, ("base", "faithful"), progress=False)
    first = len(asked)
    study.examine(few, ("base", "ignoring"), progress=False)
    assert len(asked) - first < 0.7 * first, "the base is asked once"
    monkeypatch.undo()
    monkeypatch.setattr(study.Study, "questions", lambda self, each=None: read_questions(self.file, limit=2))
    for step in study.STEPS[:-1]:
        study.measure(few, step, progress=False)
    for name in ("examine", "bias", "inside"):
        assert [*few.stored(name)] == [*study.PAIRS]
    assert ("base", "ignoring") not in few.stored("states"), "they answer alike behind every chain"
    assert few.stored("bias")["base", "faithful"].hints == list(study.HINTS)
    assert "\n".join(tables.claims(few))
