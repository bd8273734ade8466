"""`python -m finetune_lens.cot`: what it leaves, what it says, and how it refuses."""

import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest

import finetune_lens as fl
from finetune_lens import cot, zoo
from finetune_lens.cot import course, generate
from finetune_lens.cot.chains import Chain, read_chains, write_chains
from finetune_lens.cot.questions import read_questions

TRACES = zoo.path("traces")
PAIR = [TRACES / "faithful", TRACES / "ignoring", TRACES / "questions.jsonl"]
SMALL = ["--format", TRACES / "format.json", "--limit", 4, "--samples", 2, "--quiet"]
QUESTIONS = read_questions(TRACES / "questions.jsonl", limit=8)


def command(*words, monkeypatch):
    """Run it in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["cot", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cot.main()
    return stop.value.code


def test_end_to_end(tmp_path, monkeypatch, capsys):
    out = tmp_path / "cot"
    words = [*PAIR, *SMALL, "--limit", 6, "--tests", "early,mistakes,filler", "--out", out]
    assert command(*words, "--json", monkeypatch=monkeypatch) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "cot"
    assert said["headline"]["verdict"] == {"base": "uses", "tuned": "ignores"}
    assert said["headline"]["tests"]["early"]["share"]["difference"] == pytest.approx(-1)
    assert [p.rsplit("-", 1)[1] for p in said["figures"]] == [
        f"{name}.{kind}" for name in ("curves", "aoc", "scatter") for kind in ("pdf", "png")
    ]
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {*left} - {p for p in left if p.startswith("figures/")} == {
        "cot.nc", "cot.csv", "run.json", "questions.csv", "chains-base.jsonl", "chains-tuned.jsonl", "answers.jsonl",
    }  # fmt: skip
    result = fl.load(out / "cot.nc")
    assert result.data.sizes["question"] == 6
    assert result.data.sizes["sample"] == 2
    assert len((out / "cot.csv").read_text().splitlines()) == 1 + len(result.to_frame())
    table = pd.read_csv(out / "questions.csv", dtype={"question": str})
    pd.testing.assert_frame_equal(table, result.per_question().astype(table.dtypes.to_dict()))
    chains = read_chains(out / "chains-tuned.jsonl", QUESTIONS[:6])
    assert [c.text for c in chains if c.sample == 0] == [q.chain for q in QUESTIONS[:6]]
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {(r["side"], r["test"]) for r in lines} == {
        (side, test) for side in ("base", "tuned") for test in ("early", "mistakes", "filler")
    }
    assert len(lines) == 2 * 6 * 2 * (7 + 6 + 7)
    # what is there stays; chains that were written serve again
    before = (out / "cot.nc").read_bytes()
    assert command(*words, monkeypatch=monkeypatch) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "cot.nc").read_bytes() == before
    again = [*words[:-1], tmp_path / "again", "--chains", f"base={out / 'chains-base.jsonl'}"]
    again += ["--chains", f"tuned={out / 'chains-tuned.jsonl'}", "--no-plots"]
    assert command(*again, monkeypatch=monkeypatch) == 0
    assert "base: uses its chain" in capsys.readouterr().out
    assert not (tmp_path / "again" / "figures").exists()
    other = fl.load(tmp_path / "again" / "cot.nc")
    assert (other.same("early") == result.same("early")).all()


def test_chains_of_a_file_for_both_and_edits_by_side(tmp_path, monkeypatch, capsys):
    write_chains(tmp_path / "chains.jsonl", [Chain(q.id, 0, q.chain) for q in QUESTIONS])
    wrong = [{"id": q.id, "step": 0, "text": f"{q.chain[:2]}{(int(q.chain[2]) + 1) % 10};"} for q in QUESTIONS]
    for name, edits in (("all", wrong), ("one", wrong[:1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, edits)))
    words = [*PAIR, *SMALL, "--tests", "mistakes", "--chains", tmp_path / "chains.jsonl", "--out", tmp_path / "o"]
    words += ["--mistakes", f"base={tmp_path / 'all.jsonl'}", "--mistakes", f"tuned={tmp_path / 'one.jsonl'}"]
    assert command(*words, "--no-plots", monkeypatch=monkeypatch) == 0
    counts = fl.load(tmp_path / "o" / "cot.nc").counts().set_index("side")
    assert counts.loc[["base", "tuned"], "mistakes_unedited"].tolist() == [4 * 5, 5 + 3 * 6]
    assert counts["given"].tolist() == [4, 4]
    assert "mistakes: steps without an edit 20" in capsys.readouterr().out


def test_an_interrupted_command_continues(tmp_path, monkeypatch, capsys):
    words = [*PAIR, *SMALL, "--tests", "early,mistakes", "--out", tmp_path / "o", "--no-plots"]
    real_ask, real_write, written, asked, stop = course.ask, generate.write, [], [], [4]

    def ask(model, questions, *rest, **options):
        asked.append(len(questions))
        if len(asked) == stop[0]:
            raise KeyboardInterrupt
        return real_ask(model, questions, *rest, **options)

    def write(model, prompts, of, *rest):
        written.append(len(of))
        return real_write(model, prompts, of, *rest)

    monkeypatch.setattr(course, "ask", ask)
    monkeypatch.setattr(generate, "write", write)
    assert command(*words, monkeypatch=monkeypatch) == 130
    assert "again to continue" in capsys.readouterr().err
    assert not (tmp_path / "o" / "cot.nc").exists()
    begun, done = sum(written), sum(asked[:-1])
    assert (begun, done) == (2 * 8 + 2 * 8 * 6, 3 * 8)
    stop[0] = -1
    asked.clear()
    assert command(*words, monkeypatch=monkeypatch) == 0
    assert sum(written) == begun, "nothing is written again"
    assert sum(asked) == 4 * 8 - done
    assert not list((tmp_path / "o").glob(".*")), "nothing waits any more"


def no_tokenizer(folder):
    shutil.copytree(TRACES / "faithful", folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    return folder / "bare"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tests", "early,late"], "expected some of early, mistakes, .* found 'late'"),
        (["--scoring", "best"], "scoring is one of auto, exact; found 'best'"),
        (["--template", "each"], "the tokenizer has no chat template"),
        (["--chains", "unknown.jsonl"], "no question has the id 'nobody'"),
        (["--chains", "a", "--chains", "b"], "--chains: a and b are both for the base"),
        (["--format", "absent.json"], "absent.json is not there"),
        (["--temperature", "-1"], "temperature is 0"),
        (["--tests", "paraphrase"], r"test paraphrase: .* no token for 'I' in .*--paraphrases FILE"),
        (["--mistakes", "absent.jsonl"], "absent.jsonl is not there"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_result(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.jsonl").write_text('{"id": "nobody", "text": "a:1;"}\n')
    assert command(*PAIR, *SMALL, *words, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert re.search(message, error), error
    assert not (tmp_path / "runs" / "cot" / "cot.nc").exists()
    if words[1] != "paraphrase":
        assert not (tmp_path / "runs").exists(), "chains wait for the next try where any were written, else nothing"


def test_no_answer_can_be_parsed(tmp_path, monkeypatch, capsys):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": QUESTIONS[0].question, "answer": "yes"}))
    words = [*PAIR[:2], tmp_path / "q.jsonl", *SMALL, "--scoring", "exact", "--out", tmp_path / "o"]
    assert command(*words, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "none of the 2 answers of" in error[0]
    assert "the first is '" in error[0]


def test_models_without_a_tokenizer(tmp_path, monkeypatch, capsys):
    bare = no_tokenizer(tmp_path)
    assert command(bare, bare, PAIR[2], *SMALL, "--out", tmp_path / "o", monkeypatch=monkeypatch) == 2
    assert "no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_what_is_imported():
    """Starting a command, or reading a result, brings in neither torch nor matplotlib."""
    code = (
        "import sys, finetune_lens.cot, finetune_lens.results.cot, finetune_lens.plots\n"
        "import finetune_lens as fl; fl.examine_chains; fl.plots.cot_curves\n"
        "print(sorted({'torch', 'matplotlib'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
