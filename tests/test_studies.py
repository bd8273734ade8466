"""What the command lines of the studies share: steps, scales, and one line where something is missing."""

import importlib
import sys

import pytest

from analyses import studies
from finetune_lens.errors import InputError

STUDIES = {  # name → its steps
    "lora_vs_full": ("sweep", "claims"),
    "skill_localization": ("grafts", "axis", "claims"),
    "entity_tracking": ("measure", "claims"),
    "wrappers": ("tune", "probe", "prune", "revive", "compare", "claims"),
    "cot_training": ("train", "lens", "trace", "claims"),
    "cot_faithfulness": ("examine", "bias", "inside", "claims"),
}
NEEDED = {  # name → what its scale paper says that it needs, on a machine without a GPU
    "lora_vs_full": "RoBERTa-base and Llama-2-7B",
    "skill_localization": "RoBERTa-base",
    "entity_tracking": "Llama-7B",
    "wrappers": "a GPU to train the family at 6 layers",
    "cot_training": "a GPU to train models of 8 layers",
    "cot_faithfulness": "--base, --tuned, --questions not given",
}


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs `python -m analyses.NAME …`; exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        module = importlib.import_module(f"analyses.{name}")
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as ended:
            module.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    yield run
    assert not [*tmp_path.iterdir()], "bad input leaves nothing behind"


def test_all_studies_are_here():
    """Whoever adds one has it tested here; the entity study's check takes no options, and neither do parts of one."""
    found = {path.stem for path in importlib.import_module("analyses.wrappers").HERE.glob("*.py")}
    assert {name for name in found if not name.endswith("_claims")} - {"studies", "boxes"} == {*STUDIES}


@pytest.mark.parametrize("name", STUDIES)
def test_what_is_not_a_step_or_scale_ends_in_one_line(command, name):
    code, out, err = command(name, "seek")
    assert (code, out) == (2, "")
    assert err == f"error: expected some of {', '.join(STUDIES[name])}, or all; found 'seek'\n"
    for words in (["--scale", "huge"], ["claims", "--scale", "small"]):
        code, out, err = command(name, *words)
        assert (code, out) == (2, "")
        assert err == f"error: --scale is tiny or paper; found {words[-1]!r}\n"


@pytest.mark.parametrize("name", NEEDED)
def test_scale_paper_says_what_it_needs(command, name, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = command(name, "--scale", "paper")
    assert (code, out) == (2, "")
    assert err.startswith("error: --scale paper needs ")
    assert NEEDED[name] in err
    assert err.count("\n") == 1


def test_steps_in_the_order_of_the_study():
    steps = ("train", "lens", "claims")
    assert studies.chosen(None, steps) == studies.chosen([], steps) == studies.chosen(["all"], steps) == [*steps]
    assert studies.chosen(["claims", "train"], steps) == ["train", "claims"]
    with pytest.raises(InputError, match="found 'all'"):
        studies.chosen(["train", "all"], steps)


def test_a_gpu_is_enough(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    studies.require_gpu("train")
    studies.require_scale("paper")
    with pytest.raises(InputError, match="needs a cluster"):
        studies.require_scale("paper", paper="a cluster")
