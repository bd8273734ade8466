"""`patching` and `cmap` as commands, on the pair that ships: what they write, print, refuse, and how they go on."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import finetune_lens as fl
from finetune_lens import cmap, patching, zoo
from finetune_lens.hooked import sweep as engine
from finetune_lens.hooked.reentry import resume

STRINGS = zoo.path("strings")
BASE, TUNED = str(STRINGS / "base"), str(STRINGS / "full")
PROMPTS = [
    {"prompt": "<copy>abcdef=", "answer": "a", "wrong": "b", "corrupt": "<copy>bacdef=", "subject": "ab"},
    {"prompt": "<copy>ghijkl=", "answer": "g", "wrong": "h", "corrupt": "<copy>hgijkl=", "subject": "gh"},
    {"prompt": "<copy>mnopqr=", "answer": "m", "wrong": "n", "corrupt": "<copy>nmopqr=", "subject": "mn"},
]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return path


@pytest.fixture
def call(monkeypatch):
    """Run a command in this process; its exit code."""

    def run(module: Any, *arguments: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments), "--no-plots", "--device", "cpu"])
        with pytest.raises(SystemExit) as stop:
            module.main()
        return stop.value.code

    return run


def arguments_of(name: str, prompts: Path) -> tuple[Any, list[Any]]:
    return {
        "patching": (patching, [BASE, prompts, "--layers", "0-1"]),
        "cmap": (cmap, [BASE, TUNED, prompts, "--layers", "0,1"]),
    }[name]


@pytest.mark.parametrize("name", ["patching", "cmap"])
def test_what_a_command_leaves_behind(name, prompts, call, tmp_path, capsys):
    module, arguments = arguments_of(name, prompts)
    out = tmp_path / "deep" / "out"
    assert call(module, *arguments, "--out", out) == 0
    printed = capsys.readouterr()
    result = fl.load(out / f"{name}.nc")
    assert result.summary() in printed.out
    assert f"saved in {out}" in printed.err
    assert sorted(p.name for p in out.rglob("*")) == sorted([f"{name}.nc", f"{name}.csv", "run.json"])
    table = pd.read_csv(out / f"{name}.csv")
    pd.testing.assert_frame_equal(table, result.to_frame(), check_dtype=False)
    record = json.loads((out / "run.json").read_text())[name]
    assert record == result.provenance
    assert record["prompts"]["count"] == 3
    assert len(record["models"]) == len(result.directions)
    assert result.data.layer.values.tolist() == [0, 1]
    # What is there is not overwritten.
    before = (out / f"{name}.nc").read_bytes()
    assert call(module, *arguments, "--out", out) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / f"{name}.nc").read_bytes() == before
    assert call(module, *arguments, "--out", out, "--force", "--metric", "prob", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert fl.load(out / f"{name}.nc").metric == "prob"


@pytest.mark.parametrize("name", ["patching", "cmap"])
def test_json_is_one_object_and_nothing_else(name, prompts, call, tmp_path, capsys):
    module, arguments = arguments_of(name, prompts)
    assert call(module, *arguments, "--out", tmp_path / "o", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    result = fl.load(tmp_path / "o" / f"{name}.nc")
    assert record["headline"] == json.loads(json.dumps(result.headline()))
    assert set(result.directions) < set(record["headline"])
    assert record["figures"] == []


def test_options_arrive(prompts, call, tmp_path):
    """The command's options are the function's arguments."""
    out = tmp_path / "o"
    (tmp_path / "sets.json").write_text(json.dumps({"early": ["blocks.0.attn.hook_z[1]@-1", "blocks.0.hook_mlp_out"]}))
    common = {"progress": False, "device": "cpu"}
    for options, arguments in (
        (
            ["--site", "z", "--by", "head,position", "--heads", "0-2", "--positions", "3,-1", "--direction", "both"],
            {"site": "z", "by": ["head", "position"], "heads": [0, 1, 2], "positions": [3, -1], "direction": "both"},
        ),
        (
            ["--sets", tmp_path / "sets.json", "--metric", "logprob", "--whole-answer", "--limit", "2"],
            {"sets": json.loads((tmp_path / "sets.json").read_text()), "metric": "logprob", "whole_answer": True,
             "limit": 2},
        ),
        (["--method", "both", "--window", "3", "--batch-size", "1"], {"method": "both", "window": 3, "batch_size": 1}),
    ):  # fmt: skip
        assert call(patching, BASE, prompts, "--out", out, "--force", "--quiet", *options) == 0
        expected = fl.patch(BASE, str(prompts), **arguments, **common)
        assert fl.load(out / "patching.nc").to_frame().equals(expected.to_frame())
    options = ["--noise", "2", "--copies", "2", "--seed", "5", "--site", "mlp_out", "--by", "layer", "--metric", "prob"]
    assert call(patching, BASE, prompts, "--out", out, "--force", "--quiet", *options) == 0
    expected = fl.trace(BASE, str(prompts), noise=2, copies=2, seed=5, site="mlp_out", by=["layer"], **common)
    assert fl.load(out / "patching.nc").to_frame().equals(expected.to_frame())
    assert call(cmap, BASE, STRINGS / "lora", prompts, "--direction", "tuned->base", "--no-controls", "--out", out) == 0
    assert fl.load(out / "cmap.nc").directions == ["tuned→base"]
    assert not fl.load(out / "cmap.nc").has_null
    assert set(json.loads((out / "run.json").read_text())) == {"patching", "cmap"}


class Interrupted:
    """`resume`, during whose n-th call Ctrl-C is pressed."""

    def __init__(self, at: int = -1):
        self.calls, self.at = 0, at

    def __call__(self, *arguments: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return resume(*arguments)


@pytest.mark.parametrize("name", ["patching", "cmap"])
def test_an_interrupted_command_continues(name, prompts, call, tmp_path, monkeypatch, capsys):
    """Ctrl-C, late in the second direction: exit code 130, and the same command computes only the rest."""
    module, arguments = arguments_of(name, prompts)
    arguments = [*arguments, "--direction", "both", "--quiet", *(["--unsafe"] if name == "cmap" else [])]  # gates sweep
    monkeypatch.setattr(engine, "UNIT", 6)
    monkeypatch.setattr(engine, "resume", count := Interrupted())
    assert call(module, *arguments, "--out", tmp_path / "whole") == 0
    total = count.calls
    out = tmp_path / "o"
    monkeypatch.setattr(engine, "resume", Interrupted(total - 1))
    assert call(module, *arguments, "--out", out) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert not (out / f"{name}.nc").exists()
    monkeypatch.setattr(engine, "resume", count := Interrupted())
    assert call(module, *arguments, "--out", out) == 0
    assert count.calls == 2
    assert not list(out.glob(".*"))
    whole, continued = (fl.load(folder / f"{name}.nc") for folder in (tmp_path / "whole", out))
    assert continued.to_frame().equals(whole.to_frame())
    assert (
        continued.provenance["largest_deviation_of_an_unpatched_row"]
        == (whole.provenance["largest_deviation_of_an_unpatched_row"])
    )


def test_changed_arguments_start_anew(prompts, call, tmp_path, monkeypatch):
    """What finished for one way of reading the prompts does not stand in for another."""
    monkeypatch.setattr(engine, "UNIT", 3)
    reads = [["--metric", "logprob"], ["--metric", "logprob", "--whole-answer"], ["--metric", "logprob", "--limit", 2]]
    for options in reads:
        monkeypatch.setattr(engine, "resume", count := Interrupted())
        assert call(patching, BASE, prompts, *options, "--quiet", "--out", tmp_path / "whole", "--force") == 0
        total = count.calls
        monkeypatch.setattr(engine, "resume", Interrupted(total - 1))
        assert call(patching, BASE, prompts, *options, "--quiet", "--out", tmp_path / "o") == 130
        monkeypatch.setattr(engine, "resume", count := Interrupted(total - 1))
        other = next(r for r in reads if r != options)
        assert call(patching, BASE, prompts, *other, "--quiet", "--out", tmp_path / "o") in (0, 130)
        assert count.calls >= total - 1
        shutil.rmtree(tmp_path / "o")


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (patching, [BASE, "none.jsonl"], "none.jsonl is not there"),
        (patching, ["nowhere", None], "nowhere"),
        (patching, [STRINGS / "lora", None], "is an adapter and does not run alone"),
        (patching, [BASE, None, "--site", "nothing"], "site 'nothing' is unknown"),
        (patching, [BASE, None, "--heads", "x"], "expected numbers such as 0,3-5,-1; found 'x'"),
        (patching, [BASE, None, "--layers", "7"], "the model has layers 0 to 2"),
        (patching, [BASE, None, "--by", "depth"], "by takes some of layer, head, position"),
        (patching, [BASE, None, "--sets", "none.json"], "no such file: none.json"),
        (patching, [BASE, None, "--metric", "nothing"], "metric 'nothing' is unknown"),
        (patching, [BASE, None, "--template", "tuned"], "template is none or each"),
        (patching, [BASE, None, "--noise", "3", "--method", "full"], "--noise goes with neither"),
        (patching, [BASE, None, "--noise", "-3"], "noise is positive"),
        (cmap, [BASE, TUNED, None, "--direction", "up"], "direction is one of tuned→base"),
        (cmap, [BASE, TUNED, None, "--limit", "1"], "random donors need another prompt"),
        (cmap, [BASE, "nowhere", None], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(module, arguments, words, prompts, call, tmp_path, capsys):
    """Exit code 2, no traceback, nothing written."""
    given = [prompts if argument is None else argument for argument in arguments]
    assert call(module, *given, "--out", tmp_path / "o", "--quiet") == 2
    printed = capsys.readouterr()
    [line] = printed.err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert printed.out == ""
    assert not (tmp_path / "o").exists()


def test_as_a_user_calls_it(prompts, tmp_path, in_new_process):
    arguments = [BASE, TUNED, str(prompts), "--no-plots", "--json", "--device", "cpu"]
    done = in_new_process("-m", "finetune_lens.cmap", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "cmap"
    assert (tmp_path / "runs" / "cmap" / "cmap.nc").is_file()


def test_an_adapter_with_its_base(prompts, call, tmp_path, capsys):
    lora = Path(BASE).parent / "lora"
    assert call(patching, lora, prompts, "--quiet", "--out", tmp_path / "o") == 2
    assert "--base" in capsys.readouterr().err
    assert call(patching, lora, prompts, "--base", BASE, "--quiet", "--out", tmp_path / "o") == 0
    found = fl.load(tmp_path / "o" / "patching.nc")
    pair = fl.ModelPair.load(BASE, lora)
    expected = fl.patch(pair.tuned, prompts, progress=False)
    assert found.to_frame().equals(expected.to_frame())
