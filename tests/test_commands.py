"""The commands: output folder, JSON, interruption and continuation, exit codes. (Bad checkpoints: test_bad_input.)"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import typing
from contextlib import suppress

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file

import finetune_lens as fl
from finetune_lens import __main__ as listing
from finetune_lens import device, intruders, stream, updates


@pytest.fixture
def pair_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(16, 12, generator=generator) for i in range(3)}
    save_file(base, tmp_path / "base.safetensors")
    torch.save({n: w + torch.randn(16, 12, generator=generator) for n, w in base.items()}, tmp_path / "tuned.pt")
    return str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.pt")


def command(module, *arguments, monkeypatch):
    """Run a command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        module.main()
    return stop.value.code


@pytest.mark.parametrize(("name", "module"), [("intruders", intruders), ("updates", updates)])
def test_what_a_command_leaves_behind(name, module, pair_files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "mine"
    assert command(module, *pair_files, "--out", out, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    result = fl.load(out / f"{name}.nc")
    assert result.summary() in printed.out
    assert str(out) in printed.err
    table = (out / f"{name}.csv").read_text().splitlines()
    assert len(table) == 1 + len(result.to_frame())
    assert json.loads((out / "run.json").read_text()) == {name: result.provenance}
    figures = sorted(p.name for p in (out / "figures").iterdir())
    assert figures
    assert all(p.startswith(f"{name}-") and p.endswith((".pdf", ".png")) for p in figures)
    assert not list(out.rglob(".*"))  # no temporary file, no chunk


def test_json_is_one_object_and_nothing_else(pair_files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "j"
    arguments = [*pair_files, "--out", out, "--json", "--no-plots", "--side", "both"]
    assert command(intruders, *arguments, monkeypatch=monkeypatch) == 0
    record = json.loads(capsys.readouterr().out)
    result = fl.load(out / "intruders.nc")
    assert record["headline"]["right"]["intruders"] == result.count(side="right")
    assert record["figures"] == []
    assert not (out / "figures").exists()


def test_quiet_is_quiet(pair_files, tmp_path, monkeypatch, capsys):
    arguments = [*pair_files, "--out", tmp_path / "q", "--quiet", "--no-plots"]
    assert command(updates, *arguments, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().err == ""


def test_a_result_is_not_overwritten_without_force(pair_files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o"
    arguments = [*pair_files, "--out", out, "--no-plots", "--quiet"]
    assert command(updates, *arguments, monkeypatch=monkeypatch) == 0
    before = (out / "updates.nc").read_bytes()
    assert command(updates, *arguments, "--null-draws", 7, monkeypatch=monkeypatch) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "updates.nc").read_bytes() == before
    assert command(updates, *arguments, "--null-draws", 7, "--force", monkeypatch=monkeypatch) == 0
    assert fl.load(out / "updates.nc").provenance["arguments"]["null_draws"] == 7


def test_an_interrupted_run_continues(pair_files, tmp_path, monkeypatch, capsys):
    """Two matrices done, then Ctrl-C: the same command computes only the third, and ends as if nothing had happened."""
    out, measured = tmp_path / "i", []
    arguments = [*pair_files, "--out", out, "--no-plots", "--quiet"]
    measure = intruders._measure

    def counted(matrix, **options):
        if len(measured) == 2:
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append(matrix.name)
        return measure(matrix, **options)

    monkeypatch.setattr(intruders, "_measure", counted)
    monkeypatch.setattr(device, "side_by_side", lambda order, where: 1)
    assert command(intruders, *arguments, monkeypatch=monkeypatch) == 130
    assert "again to continue" in capsys.readouterr().err
    assert not (out / "intruders.nc").exists()
    assert command(intruders, *arguments, monkeypatch=monkeypatch) == 0
    assert measured == ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "stopped", "layers.2.mlp.up_proj"]
    assert not list(out.glob(".*"))
    monkeypatch.setattr(intruders, "_measure", measure)
    whole = fl.find_intruders(fl.ModelPair.load(*pair_files), progress=False)
    continued = fl.load(out / "intruders.nc")
    assert continued.to_frame().equals(whole.to_frame())
    assert np.array_equal(continued.data.null_max_cos, whole.data.null_max_cos)
    assert continued.provenance["weights_sha256"] == whole.provenance["weights_sha256"]


def test_an_interrupt_that_compiled_code_swallows(pair_files, tmp_path, monkeypatch, capsys):
    """Ctrl-C inside a library that turns it into an error of its own is an interrupt all the same."""
    import os
    import signal

    def swallowed(matrix, **options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(intruders, "_measure", swallowed)
    monkeypatch.setattr(device, "side_by_side", lambda order, where: 1)
    assert command(intruders, *pair_files, "--out", tmp_path / "i", "--quiet", monkeypatch=monkeypatch) == 130
    assert "again to continue" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(intruders, "_measure", lambda matrix, **options: int("not a number"))
    with pytest.raises(ValueError, match="not a number"):  # a fault of ours is not an interrupt
        command(intruders, *pair_files, "--out", tmp_path / "i", "--quiet", monkeypatch=monkeypatch)


def test_small_matrices_are_worked_on_side_by_side(pair_files, monkeypatch):
    """Whatever the number at once: the same result in the same order, and nothing done after a failure."""
    pair = fl.ModelPair.load(*pair_files)
    found = []
    for at_once in (1, 3):
        with monkeypatch.context() as patch:
            patch.setattr(device, "side_by_side", lambda order, where, n=at_once: n)
            found.append(fl.find_intruders(pair, progress=False, null_draws=2))
    assert found[0].data.drop_attrs().equals(found[1].data.drop_attrs())
    started = []

    def failing(item):
        started.append(item)
        if item == 2:
            raise ZeroDivisionError
        return item

    rows = stream._in_order(iter(range(100)), failing, at_once=3)
    assert [next(rows), next(rows)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(rows)
    assert len(started) < 10
    assert device.side_by_side(700, torch.device("cpu")) >= 1
    assert device.side_by_side(1024, torch.device("cpu")) == 1
    assert device.side_by_side(700, torch.device("cuda")) == 1


def test_a_changed_argument_or_file_starts_anew(pair_files, tmp_path):
    """Chunks are kept under what they were computed from."""
    seen = []

    def run(k, stop=None):
        def measure(matrix):
            if matrix.name == stop:
                raise KeyboardInterrupt
            seen.append(matrix.name)
            return {"value": 1.0}

        pair = fl.ModelPair.load(*pair_files)
        return stream.each_matrix(
            pair,
            pair.names(),
            measure,
            progress=False,
            partial=tmp_path / "chunks",
            arguments={"analysis": "test", "k": k, "device": torch.device("cpu")},
        )

    with pytest.raises(KeyboardInterrupt):
        run(1, stop="layers.1.mlp.up_proj")
    assert len(run(1).rows) == 3
    assert len(seen) == 3
    run(2)
    assert len(seen) == 6
    run(2)
    assert len(seen) == 6
    tensors = torch.load(pair_files[1], weights_only=True)
    torch.save({n: w + 1 for n, w in tensors.items()}, pair_files[1])
    run(2)
    assert len(seen) == 9


def test_chunks_leave_what_is_not_theirs_alone(pair_files, tmp_path):
    """The folder may be the user's own, and hold the chunks of another analysis."""
    own = tmp_path / "mine" / "thesis"
    own.mkdir(parents=True)
    (own / "chapter.txt").write_text("years of work")
    pair = fl.ModelPair.load(*pair_files)
    fl.measure_updates(pair, progress=False, null_draws=5, partial=tmp_path / "mine")
    rows = set((tmp_path / "mine").rglob("*.npz"))
    fl.find_intruders(pair, progress=False, null_draws=0, partial=tmp_path / "mine")
    assert (own / "chapter.txt").read_text() == "years of work"
    assert rows < set((tmp_path / "mine").rglob("*.npz"))


def test_rows_read_another_way_are_not_reused(tmp_path):
    """A square c_proj looks the same either way; what was computed for one orientation is not the other's."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"c_attn": (8, 24), "c_proj": (8, 8)}
    for name in ("base", "tuned"):
        weights = {f"h.0.attn.{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
        save_file(weights, tmp_path / f"{name}.safetensors")
    found = {}
    for orientation in ("conv1d", "linear"):
        pair = fl.ModelPair.load(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", orientation=orientation)
        options = {"progress": False, "null_draws": 0}
        kept = fl.find_intruders(pair, partial=tmp_path / "rows", **options)
        assert kept.to_frame().equals(fl.find_intruders(pair, **options).to_frame())
        found[orientation] = kept.data.max_cos.sel(matrix="h.0.attn.c_proj").values
    assert not np.allclose(found["conv1d"], found["linear"])


def test_two_analyses_share_a_folder(pair_files, tmp_path, monkeypatch):
    arguments = [*pair_files, "--out", tmp_path / "o", "--no-plots", "--quiet"]
    for module in (updates, intruders):
        assert command(module, *arguments, monkeypatch=monkeypatch) == 0
    records = json.loads((tmp_path / "o" / "run.json").read_text())
    assert {name: r["analysis"] for name, r in records.items()} == {
        "updates": "measure_updates", "intruders": "find_intruders",
    }  # fmt: skip


def test_a_file_in_the_way_is_one_error(pair_files, tmp_path, monkeypatch, capsys):
    (tmp_path / "o" / "updates.csv").mkdir(parents=True)
    assert command(updates, *pair_files, "--out", tmp_path / "o", "--quiet", monkeypatch=monkeypatch) == 2
    errors = capsys.readouterr().err
    assert "updates.csv" in errors
    assert "Traceback" not in errors


def test_a_seed_below_zero_is_one_error(pair_files, tmp_path, monkeypatch, capsys):
    assert command(intruders, *pair_files, "--seed", "-1", "--out", tmp_path / "o", monkeypatch=monkeypatch) == 2
    assert "'--seed'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument 'BASE'"),
        (["base", "tuned", "--limit", "0"], "'--limit': Input should be greater than or equal to 1"),
        (["base", "tuned", "--sed", "3"], "No such option: --sed"),
        (["base", "tuned", "third"], "unexpected extra argument(s) (third)"),
    ],
)
def test_a_slip_in_the_command_line_is_one_line(arguments, says, monkeypatch, capsys):
    assert command(updates, *arguments, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert says in line
    assert line.startswith("error: ")
    assert line.endswith("`python -m finetune_lens.updates --help` lists what there is")
    assert not printed.out


def test_an_error_without_a_file_has_no_place(pair_files, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(updates, "measure_updates", full)
    assert command(updates, *pair_files, "--out", tmp_path / "o", "--quiet", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_odd_tensors(tmp_path, monkeypatch, capsys):
    """A number (CLIP's logit_scale), vectors alone, a matrix without rows."""
    pair = tmp_path / "a.pt", tmp_path / "b.pt"
    for number, file in enumerate(pair, 1):
        odd = {"logit_scale": torch.tensor(float(number)), "norm.weight": torch.ones(3), "x.weight": torch.ones(0, 3)}
        torch.save(odd, file)
    assert command(updates, *pair, "--out", tmp_path / "o", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    assert "hold no numbers" in printed.err
    frame = fl.load(tmp_path / "o" / "updates.nc").to_frame().set_index("matrix")
    assert frame.loc["logit_scale", "relative_norm"] == 1
    assert command(intruders, *pair, "--out", tmp_path / "i", monkeypatch=monkeypatch) == 2
    assert "no matrix to compare" in capsys.readouterr().err


def test_the_list_of_commands(capsys):
    listing.main(["--help"])
    printed = capsys.readouterr().out
    for name in listing.COMMANDS:
        assert f"\n  {name} " in printed
    listing.main(["--json"])
    record = json.loads(capsys.readouterr().out)
    assert tuple(record) == listing.COMMANDS
    assert all(line.strip() and len(line) <= 120 for line in record.values())
    listing.main(["--version"])
    assert capsys.readouterr().out == f"{fl.__version__}\n"
    with pytest.raises(SystemExit) as stop:
        listing.main(["intruder"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        listing.main(["task-vectors"])  # as one types it
    assert stop.value.code == 2
    assert "BASE" in capsys.readouterr().err


def app_of(name):
    """What a command would run."""
    apps = []
    with pytest.MonkeyPatch.context() as patch, suppress(SystemExit):
        patch.setattr(typer.Typer, "__call__", lambda app, **_: apps.append(app))
        importlib.import_module(listing._home(name)).main()
    return apps[0]


def options_of(name):
    """Option → its type, of every subcommand."""
    found = {}
    for registered in app_of(name).registered_commands:
        for parameter in inspect.signature(registered.callback).parameters.values():
            kind, info = typing.get_args(parameter.annotation)[:2]
            if isinstance(info, typer.models.OptionInfo):
                first = [info.default] if isinstance(info.default, str) else []  # typer moves it among the names
                kind = re.sub(r"<class '(\w+)'>", r"\1", str(kind)).removesuffix(" | None")
                for option in [*first, *info.param_decls] or [f"--{parameter.name.replace('_', '-')}"]:
                    found[option.partition("/")[0]] = kind
    return found


def helps_of(name):
    """The help of every argument and option, and what the command says of itself, of every subcommand."""
    found = typer.main.get_command(app_of(name))
    for each in getattr(found, "commands", {"": found}).values():
        yield each, [each.help or "", *(p.help or "" for p in each.params)]


def test_a_help_names_options_that_there_are():
    for name in listing.COMMANDS:
        for each, helps in helps_of(name):
            known = {option for p in each.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
            named = set(re.findall(r"--[a-z][a-z-]*", " ".join(helps)))
            assert named <= known, name


def test_an_option_is_of_one_type_everywhere_and_every_analysis_has_the_common_ones():
    found = {name: options_of(name) for name in listing.COMMANDS if name not in ("zoo", "demo")}
    kinds = {}
    for name, options in found.items():
        for option, kind in options.items():
            kinds.setdefault(option, {}).setdefault(kind, []).append(name)
    several = {option: kinds[option] for option in kinds if len(kinds[option]) > 1}
    assert set(several) <= {"--sparsity", "--chains"}, "one command takes one, another several"
    for name, options in found.items():
        assert {"--out", "--force", "--json", "--plots", "--quiet", "--debug"} <= set(options), name


def test_without_a_terminal_there_is_no_bar_and_no_colour(pair_files, tmp_path):
    arguments = [sys.executable, "-m", "finetune_lens", "updates", *pair_files, "--out", tmp_path / "o"]
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=True)
    assert done.stdout
    for said in (done.stdout, done.stderr):
        assert "\r" not in said
        assert "\x1b" not in said
    for words in (["--help"], ["updates", "--help"], ["updates", "x"]):
        done = subprocess.run(
            [sys.executable, "-m", "finetune_lens", *words], capture_output=True, text=True,
            env=os.environ | {"NO_COLOR": "1", "FORCE_COLOR": "1"},
        )  # fmt: skip
        assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["intruders", "updates"])
def test_as_a_user_calls_it(name, pair_files, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"finetune_lens.{name}", *pair_files, "--no-plots"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert (tmp_path / "runs" / name / f"{name}.nc").is_file()
    assert "matrices" in done.stdout
