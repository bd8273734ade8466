"""What the README says is what happens: its commands, its Python, its table."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_lens import demo

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like the clone, in which runs/ may be written."""
    (tmp_path / "finetune_lens").symlink_to(ROOT / "finetune_lens")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return demo.analyse(tmp_path_factory.mktemp("demo"), figures=False, progress=False)


def ran(line):
    words = shlex.split(line)
    assert words[:2] == ["python", "-m"]
    done = subprocess.run([sys.executable, *words[1:], "--no-plots"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return words


CIRCUITS = {
    "find": "paths",
    "evaluate": "circuit_evaluation",
    "compare": "circuit_overlap",
    "dcm": "dcm",
    "paths": "paths",
}


def test_commands_that_go_on_with_what_others_left(clone):
    (block,) = (block for block in blocks("bash") if "finetune_lens.circuits" in block)
    for line in block.splitlines():
        words = ran(line)
        out = Path(words[words.index("--out") + 1]) if "--out" in words else Path("runs", "circuits")
        out = Path("runs", "paths") if words[3] == "paths" else out
        assert (clone / out / f"{CIRCUITS[words[3]]}.nc").is_file()
    assert {line.split()[3] for line in block.splitlines()} == {*CIRCUITS}


LEFT = {"report": "report/report.html", "cot.bias": "bias/bias.nc", "cot.inside": "inside_chains/inside_chains.nc"}


@pytest.mark.parametrize(
    "line", [line for block in blocks("bash") if "finetune_lens.circuits" not in block for line in block.splitlines()]
)
def test_commands(line, clone):
    name = ran(line)[2].partition(".")[2]
    assert (clone / "runs" / LEFT.get(name, f"{name}/{name}.nc")).is_file()


def test_every_command_and_public_function_has_its_row():
    from finetune_lens import __all__
    from finetune_lens.__main__ import COMMANDS

    rows = README.partition("| question |")[2].partition("\n\n")[0]
    named = {*re.findall(r"\[`([\w.]+)`\]", rows)}
    assert named == {*COMMANDS} - {"zoo", "demo", "report"}
    assert all((ROOT / link).is_file() for link in re.findall(r"\]\((docs/[^)]+)\)", README))
    assert {*re.findall(r"`([a-z_]+)`", rows)} - named <= {*__all__}


def test_python(clone):
    import matplotlib

    matplotlib.use("agg")
    weights, models, hybrids, circuits, wrappers, chains = blocks("python")
    namespace = {}
    exec(weights, namespace)
    assert namespace["r"].count() == namespace["r"].count(epsilon=0.5, k=10)
    assert (clone / "r.nc").is_file()
    namespace = {}
    exec(models, namespace)
    assert namespace["r"].data.sizes["direction"] == 2
    assert namespace["run"].cache.keys() == {"blocks.1.attn.hook_z"}
    namespace = {}
    exec(hybrids, namespace)
    assert (clone / "runs" / "mine" / "graft.safetensors").is_file()
    assert namespace["found"].metric == "accuracy"
    namespace = {}
    exec(circuits, namespace)
    assert {(1, 0), (1, 1), (1, 2)} <= {*namespace["circuit"].groups["fetcher"].heads}
    namespace = {}
    exec(wrappers, namespace)
    assert namespace["revived"].verdict()[0] == "wrapped"
    assert namespace["probes"].best("base")["score"] > 0.99
    namespace = {}
    exec(chains, namespace)
    assert [word for word, _ in namespace["found"].verdicts().values()] == ["uses", "ignores"]
    matplotlib.pyplot.close("all")


def test_the_table_is_what_the_demo_prints(results):
    spec = importlib.util.spec_from_file_location("figures_demo", ROOT / "figures" / "demo.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.BLOCK.search(README)
    assert script.with_table(README, demo.table(results)) == README


def test_the_reading_of_the_table(results):
    """What the README says in words about the two counts."""
    full, lora = results["full"]["intruders"], results["lora"]["intruders"]
    assert lora.count(side="left") > full.count(side="left") > full.null(side="left").high
    assert lora.null(side="left").low <= lora.count(side="left") <= lora.null(side="left").high
    sigma = {
        name: frame[(frame["side"] == "left") & (frame["verdict"] == "intruder")]["sigma"].median()
        for name, frame in (("full", full.to_frame()), ("lora", lora.to_frame()))
    }
    assert sigma["lora"] > sigma["full"]


def test_the_figure_draws(results):
    import matplotlib

    matplotlib.use("agg")
    spec = importlib.util.spec_from_file_location("figures_demo", ROOT / "figures" / "demo.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    counts, scatter = script.draw(results).axes
    for line, method in zip(counts.lines, demo.METHODS, strict=False):
        found = results[method]["intruders"]
        x, y = line.get_xdata(), line.get_ydata()
        assert y[48] == found.count(epsilon=x[48], side="left")
    assert len(scatter.collections) == 2
    matplotlib.pyplot.close("all")


def test_peft_finds_the_same(results, recwarn):
    """PEFT's own intruder routine on the adapter that ships, matrix by matrix."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    from finetune_lens import zoo
    from finetune_lens.zoo import strings_recipe

    folder = zoo.path("strings")
    model = strings_recipe.load(folder / "base", folder / "lora")
    lines = []
    reduce_intruder_dimension(model, top_k=10, threshold_epsilon=0.5, logging_sink=lines.append)
    theirs = {}
    for line in lines:
        found = re.match(r"base_model\.model\.model\.(.+): (?:Intruders: (\d+)|No intruders)", line)
        if found:
            theirs[found[1]] = int(found[2] or 0)
    ours = results["lora"]["intruders"].table("matrix", side="left").set_index("matrix")["intruders"]
    assert len(theirs) == len(ours) == 21
    assert ours.to_dict() == theirs
    assert sum(theirs.values()) > 0
