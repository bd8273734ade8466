"""The report: its verdict against the planted truth of the pair that ships, and the page in a browser."""

import functools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import finetune_lens as fl
from finetune_lens.errors import InputError
from finetune_lens.report import course, verdict, write_report
from finetune_lens.report.__main__ import main
from finetune_lens.report.page import ROWS, page, table
from finetune_lens.results.check import Check

FOLDER = fl.zoo.path("strings")
PROMPTS = FOLDER / "prompts.jsonl"
NAMES = [
    "updates", "intruders", "check", "outputs", "interpolation", "representations", "patching-base", "patching-tuned",
    "cmap",
]  # fmt: skip


def command(*words, code=0):
    """Run the command; the exit code has to be that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", *map(str, words), "--quiet"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a report of the LoRA pair, in which everything but the chains of thought is run."""
    out = tmp_path_factory.mktemp("report")
    command(FOLDER / "base", FOLDER / "lora", "--prompts", PROMPTS, "--out", out, "--limit", 32)
    return out


@pytest.fixture
def quick(monkeypatch):
    """Few draws behind the nulls, for tests that do not look at them."""
    for name, options in {"measure_updates": {"null_draws": 2}, "find_intruders": {"null_draws": 0}}.items():
        monkeypatch.setattr(fl, name, functools.partial(getattr(fl, name), **options))


@pytest.fixture(scope="module")
def found(made):
    return {name: fl.load(made / f"{name}.nc") for name in NAMES}


def text(results):
    return " ".join(sentence.text for sentence in verdict(results))


# The verdict


def test_the_planted_truth_of_the_pair_that_ships_is_named(found):
    said = verdict(found)
    lead = " ".join(sentence.text for sentence in said if sentence.leads)
    assert "Learnt: on the 32 prompts that begin with “<flip>” accuracy rises from " in lead  # which task
    assert "of low rank (at most 16, where 192 is possible): the mark of LoRA" in lead  # by which method
    assert "changed 21 of 30 weight tensors" in lead  # every linear map of three blocks
    # where: only below layer 1 does the old answer become the new one, which the interpolation knows
    gains = found["interpolation"].importance().query("metric == 'accuracy'").set_index("group")
    assert f"the update of layer {gains['alone'].idxmax()} alone brings" in lead
    assert [sentence.leads for sentence in said] == sorted((s.leads for s in said), reverse=True)
    assert {sentence.source for sentence in said} <= set(found)


def test_full_fine_tuning_has_another_mark():
    updates = fl.measure_updates(fl.ModelPair.load(FOLDER / "base", FOLDER / "full"), null_draws=10, progress=False)
    assert "the mark of full fine-tuning" in text({"updates": updates})
    assert "30 of 30" in text({"updates": updates})
    frame = updates.to_frame()
    largest = (frame.delta_norm**2).groupby(frame.layer).sum().idxmax()
    assert f"(‖Δ‖²) lies in layer {largest} (" in text({"updates": updates})


def test_a_model_against_itself_says_that_nothing_changed(tmp_path, capsys, quick):
    out = tmp_path / "same"
    command(FOLDER / "base", FOLDER / "base", "--out", out, "--prompts", PROMPTS, "--json")
    record = json.loads(capsys.readouterr().out)
    assert record["verdict"] == ["Nothing changed: all 30 weights of the two models are the same, number for number."]
    assert record["skipped"]["outputs"] == "the two models have the same weights"
    assert set(record["results"]) == {"updates", "intruders"}
    assert "Nothing changed" in (out / "report.html").read_text()


def test_lost_learnt_and_neither():
    def outputs(base, tuned):
        pair = fl.ModelPair.load(FOLDER / base, FOLDER / tuned)
        return {"outputs": fl.compare_outputs(pair, PROMPTS, check=False, limit=32, progress=False)}

    assert text(outputs("full", "base")).startswith("Lost: on the 32 prompts that begin with “<flip>” accuracy falls")
    assert text(outputs("base", "full")).startswith("Learnt:")
    assert text(outputs("full", "full")).startswith("No clear change:")
    assert "are few" not in text(outputs("full", "full"))
    some = outputs("base", "full")["outputs"]
    same = some.data.isel(example=slice(4)).copy(deep=True)
    same["accuracy"].loc[{"side": "tuned"}] = same["accuracy"].sel(side="base")
    row = type(some)(same).table().set_index("measure").loc["answer: logprob"]
    said = text({"outputs": type(some)(same)})
    assert said.startswith("No clear change of accuracy: on the 4 prompts")
    assert f"; the log-probability of the answers rises ({row['difference']:+.3g} [" in said
    assert "4 prompts are few: a 95 % interval over so many holds about 81%" in said


def test_more_than_chance_is_said_only_beyond_the_null(found):
    result = found["intruders"]
    own = result.headline()["left"]
    assert own["intruders"] <= own["null"]["spectrum"]["high"]
    assert text({"intruders": result}).startswith(
        f"Intruder dimensions (ε = 0.5) of the tuned weights: {own['intruders']} "
    )
    assert "left singular vectors, no more than chance" in text({"intruders": result})
    loud = type(result)(result.data.copy())
    for name in ("headline",):
        head = getattr(result, name)()
        head["left"]["intruders"] = int(head["left"]["null"]["spectrum"]["high"]) + 1
        loud.headline = lambda head=head: head
    assert "left singular vectors, more than chance" in text({"intruders": loud})


def test_an_effect_of_the_head_on_any_prompt_is_not_taken_for_the_task(found):
    head = found["cmap"].headline()
    said = text({"cmap": found["cmap"]})
    for direction in ("tuned→base", "base→tuned"):
        top = head[direction]["top"][0]
        specific = top["specific_low"] > 0 or top["specific_high"] < 0
        sentence = next(s.text for s in verdict({"cmap": found["cmap"]}) if direction in s.text)
        assert ("no more than the same head gives" in sentence) == (not specific)
    assert "moves the logit difference most" in said


def test_questions_bring_the_chains_of_thought(tmp_path, capsys, quick):
    folder, out = fl.zoo.path("traces"), tmp_path / "r"
    command(
        folder / "faithful", folder / "ignoring", "--questions", folder / "questions.jsonl", "--format",
        folder / "format.json", "--limit", 8, "--samples", 1, "--tests", "early,mistakes", "--out", out, "--json",
        "--no-plots",
    )  # fmt: skip
    record = json.loads(capsys.readouterr().out)
    lead = next(sentence for sentence in record["verdict"] if sentence.startswith("Reasoning: "))
    assert "the base uses its chain of thought" in lead
    assert "the tuned model ignores its chain of thought" in lead
    assert {"cot", "inside_chains"} <= set(record["results"])
    assert "the tokenizer has no token" in record["skipped"]["bias"], "its vocabulary has no words for hints"
    assert "python -m finetune_lens.cot.inside" in (out / "report.html").read_text()


def failed_gate():
    data = xr.Dataset(
        {
            "verdict": ("gate", ["pass", "FAIL"]),
            "measured": ("gate", [0.0, 0.8]),
            "limit": ("gate", [1e-4, 1e-4]),
            "message": ("gate", ["", "<b>pad</b> with another token"]),
        },
        {"gate": ["hooked = plain", "padding"], "side": ("gate", ["base", "tuned"])},
    )
    return Check(data)


def test_a_failed_gate_leads_the_verdict_and_ends_the_run(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.setattr(fl, "check_pair", lambda *_, **__: failed_gate())
    out = tmp_path / "gate"
    command(FOLDER / "base", FOLDER / "lora", "--prompts", PROMPTS, "--out", out, "--no-plots", code=1)
    said = capsys.readouterr()
    assert said.out.splitlines()[1].startswith("The trust gate FAILED: FAIL     padding (tuned): 0.8")
    absent = next(line for line in said.out.splitlines() if ": the trust gate failed: FAIL     padding" in line)
    assert absent.startswith("not run, outputs, interpolation, ")
    assert "check failed: the trust gate" in said.err
    assert "<b>pad</b>" not in (out / "report.html").read_text()


# The course


def test_what_each_input_allows(tmp_path, capsys, quick):
    weights = tmp_path / "weights"
    for side in ("base", "full"):  # weights without a config beside them
        (weights / side).mkdir(parents=True)
        shutil.copy(FOLDER / side / "model.safetensors", weights / side)
    command(
        *(weights / side / "model.safetensors" for side in ("base", "full")),
        "--out",
        tmp_path / "r",
        "--json",
        "--no-plots",
    )
    record = json.loads(capsys.readouterr().out)
    assert set(record["results"]) == {"updates", "intruders"}
    assert "the models do not run: " in record["skipped"]["check"]
    assert "config" in record["skipped"]["check"]


def test_without_prompts_the_models_write_texts_themselves():
    pair = fl.ModelPair.load(FOLDER / "base", FOLDER / "lora")
    texts = course.own_texts(pair.models(), seed=0)
    assert texts == course.own_texts(pair.models(), seed=0)
    assert {t["id"].partition("-")[0] for t in texts} == {"base", "tuned"}
    execution = {"device": "auto", "dtype": "auto", "limit": None, "batch_size": None, "progress": False}
    both = course.Texts(course.Inputs(pair, "b", "t", execution=execution), None)
    assert both.objective == "text"
    ((name, measured),) = both.measured.items()
    assert [t["id"] for t in measured] == [t["id"] for t in texts if t["id"].startswith("tuned")]
    assert both.read == texts
    path = fl.interpolate(pair, both.measured, alphas=(0, 1), by="layer", objective="text", progress=False)
    said = text({"interpolation": path})
    assert f"in log-probability (nats a token) on the tuned model's {name}, the update of layer" in said, (
        "whose texts, and of what unit"
    )


def test_answers_of_several_tokens_are_scored_whole(tmp_path, capsys, quick):
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()[:6]]
    for row in rows:  # two letters, of which the tokenizer makes two tokens
        row |= {"answer": row["answer"] + "b", "wrong": row["wrong"] + "b"}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(FOLDER / "base", FOLDER / "lora", "--prompts", prompts, "--out", tmp_path / "r", "--json", "--no-plots")
    record = json.loads(capsys.readouterr().out)
    assert {"check", "outputs", "patching-base", "cmap"} <= set(record["results"])
    assert set(record["skipped"]) == {"cot", "bias", "inside_chains"}
    assert record["results"]["cmap"]["metric"] == "logprob"
    markup = (tmp_path / "r" / "report.html").read_text()
    assert f"finetune_lens.outputs {FOLDER / 'base'} {FOLDER / 'lora'} {prompts} --whole-answer<" in markup
    pair, items = fl.ModelPair.load(FOLDER / "base", FOLDER / "lora"), {"whole_answer": True, "check": False}
    alone = fl.compare_outputs(pair, prompts, progress=False, **items)
    assert record["results"]["outputs"]["measures"] == alone.headline()["measures"]


def test_without_a_gate_nothing_is_run_on_trust(tmp_path, monkeypatch, capsys, quick):
    def broken(*_, **__):
        raise InputError("no reading")

    monkeypatch.setattr(fl, "check_pair", broken)
    command(FOLDER / "base", FOLDER / "lora", "--prompts", PROMPTS, "--out", tmp_path / "r", "--json", "--no-plots")
    record = json.loads(capsys.readouterr().out)
    assert set(record["results"]) == {"updates", "intruders"}
    assert record["skipped"]["check"] == "no reading"
    assert record["skipped"]["cmap"] == "the trust gate could not be run"


def test_an_interrupted_report_continues(tmp_path, monkeypatch, quick):
    execution = {"device": "cpu", "dtype": "auto", "limit": 8, "batch_size": None, "progress": False}
    pair = fl.ModelPair.load(FOLDER / "base", FOLDER / "lora")
    inputs = course.Inputs(pair, "b", "t", prompts=PROMPTS, execution=execution)
    calls = []

    def stepped(broken):
        def only(inputs, real=course.steps):
            for step in real(inputs):
                if step.name in ("updates", "check", "outputs"):

                    def run(partial, step=step):
                        calls.append(step.name)
                        if step.name == broken:
                            raise KeyboardInterrupt
                        return step.run(partial=partial)

                    yield course.Step(step.name, run, step.lacks, step.needs_model, step.command)

        return only

    real = course.steps
    monkeypatch.setattr(course, "steps", lambda i: stepped("outputs")(i, real))
    with pytest.raises(KeyboardInterrupt):
        course.examine(inputs, partial=tmp_path)
    monkeypatch.setattr(course, "steps", lambda i: stepped(None)(i, real))
    again = course.examine(inputs, partial=tmp_path)
    assert calls == ["updates", "check", "outputs", "outputs"]
    assert set(again.results) == {"updates", "check", "outputs"}
    other = course.Inputs(pair, "b", "t", prompts=PROMPTS, seed=1, execution=execution)
    course.examine(other, partial=tmp_path)
    assert calls[4:] == ["updates", "check", "outputs"], "another seed is another run"


def test_saved_results_need_no_model(made, tmp_path):
    program = (
        "import atexit, sys; sys.argv = ['report', '--from', sys.argv[1], '--out', sys.argv[2]]\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from finetune_lens.report.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, made, tmp_path / "saved"], capture_output=True, text=True, check=True
    )
    assert "Learnt: on the 32 prompts that begin with “<flip>”" in done.stdout
    assert done.stdout.endswith("False\n"), "torch was not even imported"
    assert (tmp_path / "saved" / "report.html").is_file()


def test_bad_input_is_one_line(tmp_path, capsys):
    out = tmp_path / "bad"

    def error(*words):
        command(*words, "--out", out, code=2)
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert not out.exists()
        return said

    assert "expected BASE and TUNED, or saved results with --from" in error()
    assert "expected BASE and TUNED" in error(FOLDER / "base")
    assert "leave BASE, TUNED" in error(FOLDER / "base", FOLDER / "lora", "--from", tmp_path)
    assert "nowhere.jsonl is not there" in error(FOLDER / "base", FOLDER / "lora", "--prompts", "nowhere.jsonl")
    assert "holds no saved result" in error("--from", tmp_path)
    assert "no such result" in error("--from", tmp_path / "x.nc")
    assert "tests are of early, mistakes" in error(FOLDER / "base", FOLDER / "lora", "--tests", "early,late")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": 1}\n')
    assert "line 1" in error(FOLDER / "base", FOLDER / "lora", "--prompts", broken)


def test_a_page_is_not_overwritten(made, capsys):
    before = (made / "report.html").read_bytes()
    command(FOLDER / "base", FOLDER / "lora", "--out", made, code=2)
    assert "report.html exists and would be overwritten" in capsys.readouterr().err
    assert (made / "report.html").read_bytes() == before


# The page


class Reader(HTMLParser):
    """Ids, links, what would be loaded, and whether elements are closed in order."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, markup):
        super().__init__()
        self.ids, self.links, self.loaded, self.open, self.tags = [], [], [], [], []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            if name in attributes:
                (self.links if attributes[name].startswith("#") else self.loaded).append(attributes[name])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()


def test_the_page_is_whole_and_loads_nothing(made):
    markup = (made / "report.html").read_text()
    read = Reader(markup)
    assert read.open == []
    assert len(set(read.ids)) == len(read.ids), "an id stands for one element"
    assert {link[1:] for link in read.links} <= set(read.ids)
    assert all(address.startswith("data:") for address in read.loaded), "images of heat maps lie in the page"
    assert "default-src 'none'" in markup
    assert not re.search(r"@import|url\((?!#|\"#|'#|data:)", markup)
    for name in [*NAMES, "cot"]:
        assert f'id="{name}"' in markup
    for name in [*NAMES, "not-run"]:
        assert f'<section id="{name}"' in markup
        assert f'href="#{name}"' in markup
    assert markup.count("no questions were given (--questions)") == 1, "a reason is told once for all it concerns"
    absent = re.sub("<[^>]+>", "", markup.partition('id="not-run-title"')[2])
    assert "Chain of thought, Bias and hints, Inside the chain: no questions were given (--questions)" in absent
    assert "python -m finetune_lens.intruders" in markup
    assert fl.load(made / "updates.nc").provenance["finished"] in markup


def test_a_caption_is_the_whole_paragraph(made):
    captions = re.findall("<figcaption>(.*?)</figcaption>", (made / "report.html").read_text(), re.DOTALL)
    assert all(caption.endswith(".") and "`" not in caption and "the axes" not in caption for caption in captions)
    assert any("the colours end at 1 and at 0" in caption for caption in captions)


def test_texts_of_the_results_cannot_become_markup(found, tmp_path):
    hostile = pd.DataFrame({"<i>name</i>": ["<script>alert(1)</script>", "b"], "value": [np.nan, 2.5]})
    made = table(hostile, caption="<b>")
    assert "<script>" not in made
    assert "<i>" not in made
    assert "<b>" not in made
    assert "data-value=''>–" in made
    written = write_report({"outputs": found["outputs"]}, tmp_path / "deep" / "x.html", title="<script>", figures=False)
    assert "<title>&lt;script&gt;</title>" in written.read_text()


def test_long_tables_say_so():
    made = table(pd.DataFrame({"a": range(ROWS + 5)}), caption="numbers")
    assert made.count("<tr>") == ROWS + 1
    assert f"The first {ROWS} of {ROWS + 5:,} rows" in made


def test_results_of_several_pairs_are_not_passed_off_as_one(found):
    other = type(found["updates"])(found["updates"].data.copy())
    record = other.provenance
    record["inputs"]["tuned"]["source"] = "elsewhere"
    other.data.attrs["provenance"] = json.dumps(record)
    markup = page({"updates": found["updates"], "a/b c": other}, title="two", figures=False)
    assert "of more than one pair" in markup
    assert '<section id="a-b-c"' in markup
    assert "of more than one pair" not in page({"updates": found["updates"]}, title="one", figures=False)


def test_a_saved_page_reads_the_same_through_python(found, tmp_path):
    with pytest.raises(InputError, match="no such result"):
        fl.load(tmp_path / "none.nc")
    path = fl.write_report({"updates": found["updates"]}, tmp_path / "one.html", figures=False)
    assert path.read_text().count("<section") == 2


# In a browser

BROWSER = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield opened
        opened.close()


def opened(browser, file: Path, **options):
    """The page, what its console says, and what it asks for beside itself."""
    tab = browser.new_page(**options)
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    return tab, said, [url for url in asked if not url.startswith("data:") and url != file.as_uri()]


@in_browser
def test_in_a_browser(browser, made, found):
    tab, said, asked = opened(browser, made / "report.html")
    assert said == []
    assert asked == []
    for name in NAMES:
        drawn = tab.locator(f"#{name} > figure svg")
        assert drawn.count() == min(2, len(fl.plots.figures_of(found[name])))
        for i in range(drawn.count()):
            box = drawn.nth(i).bounding_box()
            assert box["width"] > 200
            assert box["height"] > 80
    assert "rank j" in tab.locator("#updates svg text").all_text_contents(), "text stays text"
    tab.close()


@in_browser
def test_tables_sort_by_mouse_and_keyboard(browser, made):
    tab, said, _ = opened(browser, made / "report.html")
    tab.locator("#updates details summary", has_text="Table").click()
    head = tab.locator("#updates th", has_text="relative_norm")
    at = head.evaluate("e => [...e.parentNode.children].indexOf(e)")

    def column():
        cells = tab.locator(f"#updates tbody tr td:nth-child({at + 1})").evaluate_all(
            "cells => cells.map(cell => cell.dataset.value)"
        )
        return [float(cell) for cell in cells if cell]

    values = column()
    head.locator("button").click()
    assert column() == sorted(values)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")
    assert column() == sorted(values, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    assert said == []
    tab.close()


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser, made, scheme):
    tab, said, _ = opened(browser, made / "report.html", viewport={"width": 375, "height": 740}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375, (
        "nothing but figures and tables scrolls sideways"
    )
    assert tab.locator("#theme").inner_text() == ("Light" if scheme == "dark" else "Dark")
    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.locator("#theme").click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
    tab.keyboard.press("Tab")
    assert said == []
    tab.close()


@in_browser
def test_a_screen_reader_finds_its_way(browser, made):
    tab, _, _ = opened(browser, made / "report.html")
    levels = tab.locator("h1, h2, h3").evaluate_all("found => found.map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert tab.locator("[role=img]:not([aria-label])").count() == 0
    assert tab.locator("table:not(:has(caption))").count() == 0
    assert tab.locator("html").get_attribute("lang") == "en"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.close()


@pytest.mark.parametrize(
    ("study", "says"),
    [
        ("wrappers-compare-tuned-100", "closer than the other model given"),
        ("wrappers-revive-full", "Trained back on the old task: wrapped ("),
        ("boxes-control-z", "Place by place, tuned→base:"),
    ],
)
def test_the_studies_results_have_sentences(study, says):
    result = fl.load(Path(__file__).parents[1] / "analyses" / "results" / f"{study}.nc")
    said = text({study: result})
    assert says in said
    if result.kind == "representations":
        row = result.headline()["least_alike"]["cka_debiased"]
        assert row["closer_than_null"]
        data = result.data.copy(deep=True)
        data["null"][...] = 1.0  # another model that is just like the base
        assert "); no closer than the other model given, 1.00" in text({study: type(result)(data)})
    if result.kind == "revival":
        assert result.verdict()[1] in said


def test_a_folder_may_hold_other_files(found, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    found["updates"].save(tmp_path / "runs" / "updates.nc")
    (tmp_path / "runs" / "other.nc").write_bytes(b"no result")
    command("--from", tmp_path / "runs", "--out", tmp_path / "o", "--no-plots")
    assert "not run, other.nc: " in capsys.readouterr().out
    command("--from", tmp_path / "runs" / "other.nc", "--out", tmp_path / "p", code=2)
    (tmp_path / "empty").mkdir()
    command("--from", tmp_path / "runs", "--from", tmp_path / "empty", "--out", tmp_path / "p", code=2)
