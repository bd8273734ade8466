"""What a user gets wrong ends in one clear line, exit code 2, and nothing written."""

import json
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_lens.errors import InputError
from finetune_lens.pair import ModelPair

Make = Callable[[Any, Path], tuple[Path, Path]]


class Payload:
    """A pickle of it creates the file when it is loaded by anything that executes pickles."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def good(library: Any) -> Path:
    return library.saved("llama")


def text_file(library: Any, folder: Path) -> tuple[Path, Path]:
    (folder / "notes.txt").write_text("no weights here")
    return good(library), folder / "notes.txt"


def renamed_text(library: Any, folder: Path) -> tuple[Path, Path]:
    (folder / "model.safetensors").write_text("no weights here, whatever the name says")
    return good(library), folder / "model.safetensors"


def text_as_pickle(library: Any, folder: Path) -> tuple[Path, Path]:
    (folder / "model.pt").write_text("no weights here, whatever the name says")
    return good(library), folder / "model.pt"


def empty_folder(library: Any, folder: Path) -> tuple[Path, Path]:
    (folder / "empty").mkdir()
    (folder / "empty" / "README.md").write_text("nothing")
    return good(library), folder / "empty"


def empty_safetensors(library: Any, folder: Path) -> tuple[Path, Path]:
    (folder / "model.safetensors").touch()
    return good(library), folder / "model.safetensors"


def empty_pickle(library: Any, folder: Path) -> tuple[Path, Path]:
    (folder / "model.bin").touch()
    return good(library), folder / "model.bin"


def no_tensors(library: Any, folder: Path) -> tuple[Path, Path]:
    save_file({}, folder / "model.safetensors")
    return good(library), folder / "model.safetensors"


def config_alone(library: Any, folder: Path) -> tuple[Path, Path]:
    return good(library), good(library) / "config.json"


def missing_file(library: Any, folder: Path) -> tuple[Path, Path]:
    return good(library), folder / "nowhere.safetensors"


def missing_base(library: Any, folder: Path) -> tuple[Path, Path]:
    return folder / "nowhere" / "at" / "all", good(library)


def truncated_safetensors(library: Any, folder: Path) -> tuple[Path, Path]:
    content = (good(library) / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    return good(library), folder / "model.safetensors"


def corrupt_header(library: Any, folder: Path) -> tuple[Path, Path]:
    content = bytearray((good(library) / "model.safetensors").read_bytes())
    content[8:40] = b"\xff" * 32
    (folder / "model.safetensors").write_bytes(content)
    return good(library), folder


def truncated_pickle(library: Any, folder: Path) -> tuple[Path, Path]:
    torch.save(dict(library.model("llama").state_dict()), folder / "whole.pt")
    content = (folder / "whole.pt").read_bytes()
    (folder / "model.pt").write_bytes(content[: len(content) // 2])
    return good(library), folder / "model.pt"


def number_in_pickle(library: Any, folder: Path) -> tuple[Path, Path]:
    torch.save({"loss": 3.0, "model": {"sizes": [1, 2]}}, folder / "model.pt")
    return good(library), folder / "model.pt"


def hostile_zip(library: Any, folder: Path) -> tuple[Path, Path]:
    torch.save({"a.weight": torch.ones(2, 2), "x": Payload(folder / "executed")}, folder / "model.pt")
    return good(library), folder / "model.pt"


def hostile_old(library: Any, folder: Path) -> tuple[Path, Path]:
    content = {"a.weight": torch.ones(2, 2), "x": Payload(folder / "executed")}
    torch.save(content, folder / "model.pt", _use_new_zipfile_serialization=False)
    return good(library), folder / "model.pt"


def hostile_bare(library: Any, folder: Path) -> tuple[Path, Path]:
    (folder / "model.bin").write_bytes(pickle.dumps(Payload(folder / "executed"), protocol=2))
    return good(library), folder / "model.bin"


def hostile_new(library: Any, folder: Path) -> tuple[Path, Path]:
    """A protocol that torch.save does not use."""
    (folder / "model.pt").write_bytes(pickle.dumps(Payload(folder / "executed"), protocol=5))
    return good(library), folder / "model.pt"


def whole_module(library: Any, folder: Path) -> tuple[Path, Path]:
    torch.save(torch.nn.Linear(2, 2), folder / "model.pt")
    return good(library), folder / "model.pt"


def sharded(library: Any, folder: Path) -> Path:
    library.model("llama").save_pretrained(folder, max_shard_size="12KB")
    return folder


def missing_shard(library: Any, folder: Path) -> tuple[Path, Path]:
    shard = sorted(sharded(library, folder).glob("model-*.safetensors"))[1]
    shard.unlink()
    return good(library), folder


def shards_without_index(library: Any, folder: Path) -> tuple[Path, Path]:
    (sharded(library, folder) / "model.safetensors.index.json").unlink()
    return good(library), folder


def edited_index(library: Any, folder: Path, edit: Callable[[dict], Any]) -> tuple[Path, Path]:
    file = sharded(library, folder) / "model.safetensors.index.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    return good(library), folder


def index_of_absent_tensors(library: Any, folder: Path) -> tuple[Path, Path]:
    def edit(index: dict) -> dict:
        index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
        return index

    return edited_index(library, folder, edit)


def index_without_map(library: Any, folder: Path) -> tuple[Path, Path]:
    return edited_index(library, folder, lambda index: {"metadata": {}})


def index_that_is_a_list(library: Any, folder: Path) -> tuple[Path, Path]:
    return edited_index(library, folder, lambda index: [1, 2])


def index_of_numbers(library: Any, folder: Path) -> tuple[Path, Path]:
    return edited_index(library, folder, lambda index: {"weight_map": {"lm_head.weight": 3}})


def nothing_in_common(library: Any, folder: Path) -> tuple[Path, Path]:
    return good(library), library.saved("gpt2")


def other_block_shapes(library: Any, folder: Path) -> tuple[Path, Path]:
    state = load_file(good(library) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: state[name][:16].clone()}, folder / "model.safetensors")
    return good(library), folder / "model.safetensors"


def other_rank(library: Any, folder: Path) -> tuple[Path, Path]:
    state = load_file(good(library) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: state[name].flatten()}, folder / "model.safetensors")
    return good(library), folder / "model.safetensors"


def adapter(library: Any, folder: Path, family: str = "llama") -> Path:
    import warnings

    import peft

    modules = {"llama": ["q_proj"], "gpt2": ["c_attn"]}[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(library.fresh(family), peft.LoraConfig(target_modules=modules))
        model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def adapter_as_base(library: Any, folder: Path) -> tuple[Path, Path]:
    return adapter(library, folder), good(library)


def adapter_of_another_base(library: Any, folder: Path) -> tuple[Path, Path]:
    return good(library), adapter(library, folder, "gpt2")


def adapter_file_alone(library: Any, folder: Path) -> tuple[Path, Path]:
    path = adapter(library, folder)
    (path / "adapter_config.json").unlink()
    return good(library), path / "adapter_model.safetensors"


def truncated_adapter(library: Any, folder: Path) -> tuple[Path, Path]:
    file = adapter(library, folder) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    return good(library), file.parent


def adapter_with_half_a_pair(library: Any, folder: Path) -> tuple[Path, Path]:
    file = adapter(library, folder) / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "layers.0.self_attn.q_proj.lora_B" not in n}, file)
    return good(library), file.parent


def adapter_of_no_json(library: Any, folder: Path) -> tuple[Path, Path]:
    path = adapter(library, folder)
    (path / "adapter_config.json").write_text("{")
    return good(library), path


def adapter_and_weights(library: Any, folder: Path) -> tuple[Path, Path]:
    path = adapter(library, folder)
    shutil.copy(good(library) / "model.safetensors", path)
    return good(library), path


def broken_config(library: Any, folder: Path) -> tuple[Path, Path]:
    shutil.copy(good(library) / "model.safetensors", folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{")
    return good(library), folder


def packed(library: Any, folder: Path) -> tuple[Path, Path]:
    save_file({"model.layers.0.self_attn.q_proj.qweight": torch.ones(2, 2).int()}, folder / "model.safetensors")
    return good(library), folder / "model.safetensors"


def not_cached(library: Any, folder: Path) -> tuple[str, str]:
    return "somebody/never-downloaded", "somebody/never-downloaded@main"


# What is wrong → what the message has to say: what was found, where, what to do.
CASES: dict[Make, str] = {
    text_file: r"notes\.txt is not a checkpoint: expected \.safetensors",
    renamed_text: r"model\.safetensors is truncated or not a safetensors file",
    text_as_pickle: r"model\.pt is damaged or not a PyTorch checkpoint",
    empty_folder: r"empty is not a checkpoint: expected one of model\.safetensors\.index\.json.*found no weight file",
    empty_safetensors: r"model\.safetensors is empty",
    empty_pickle: r"model\.bin is empty",
    no_tensors: r"model\.safetensors holds no tensors",
    config_alone: r"config\.json is not a checkpoint: expected .*or a folder",
    missing_file: r"no such file or folder: .*nowhere\.safetensors",
    missing_base: r"no such file or folder: .*nowhere/at/all",
    truncated_safetensors: r"model\.safetensors is truncated",
    corrupt_header: r"model\.safetensors is truncated or not a safetensors file",
    truncated_pickle: r"model\.pt is damaged",
    number_in_pickle: r"model\.pt holds no tensors: expected a state dict",
    hostile_zip: r"model\.pt refused: it holds Python objects \(posix\.mkdir\).*save the state dict alone",
    hostile_old: r"model\.pt refused: it holds Python objects \(posix\.mkdir\).*save the state dict alone",
    hostile_bare: r"model\.bin refused: it holds Python objects \(posix\.mkdir\)",
    hostile_new: r"model\.pt is damaged or not a PyTorch checkpoint: its content is not that of torch\.save",
    whole_module: r"model\.pt refused: it holds Python objects \(torch\.nn.*save the state dict alone",
    missing_shard: r"index\.json names shards that are not there: model-00002-of-",
    shards_without_index: r"is not a checkpoint: expected one of .*found model-00001-of",
    index_of_absent_tensors: r"names tensors that its shards do not hold: model\.layers\.9\.mlp\.up_proj\.weight",
    index_without_map: r"has no weight_map",
    index_that_is_a_list: r"expected a JSON object, found list",
    index_of_numbers: r"index\.json.*weight_map",
    nothing_in_common: r"no tensor in common: \S+ is nearest to \S+",
    other_block_shapes: r"layers\.0\.self_attn\.q_proj is \(32, 32\) in the base and \(16, 32\)",
    other_rank: r"layers\.0\.self_attn\.q_proj is \(32, 32\) in the base and \(1024,\)",
    adapter_as_base: r"is an adapter; give the model it was trained on as BASE",
    adapter_of_another_base: r"adapter of another base: it changes \S*c_attn.*nearest there: \S+",
    adapter_file_alone: r"adapter without its adapter_config\.json",
    truncated_adapter: r"adapter_model\.safetensors is truncated",
    adapter_with_half_a_pair: r"lora_A without lora_B|cannot put this LORA adapter",
    adapter_of_no_json: r"adapter_config\.json is not valid JSON",
    adapter_and_weights: r"holds both an adapter and full weights; name the file",
    broken_config: r"config\.json is not valid JSON",
    packed: r"quantised \(GPTQ or AWQ\)",
    not_cached: r"neither a file or folder here nor in the local hub cache; pass --online",
}


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run `python -m finetune_lens.intruders ARGUMENTS` in this process: exit code, standard output and error."""
    from finetune_lens import intruders

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["intruders", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            intruders.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture
def offline(monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_error_and_nothing_written(library, tmp_path, monkeypatch, command, offline, case):
    (tmp_path / "input").mkdir()
    monkeypatch.chdir(tmp_path)
    base, tuned = case(library, tmp_path / "input")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=CASES[case]):
        ModelPair.load(base, tuned)
    for out in (["--out", tmp_path / "result"], []):
        code, output, errors = command(base, tuned, *out)
        assert code == 2
        assert output == ""
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1, errors
        assert len(errors) < 700
    assert tree(tmp_path) == before  # no output folder, no runs/, and no payload has run
    assert not (tmp_path / "input" / "executed").exists()


def test_the_payload_would_run_if_it_were_executed(tmp_path):
    """The hostile files are hostile."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").is_dir()


def test_debug_shows_the_traceback(tmp_path, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["intruders", str(tmp_path), str(tmp_path), "--debug"])
    from finetune_lens import intruders

    with pytest.raises(InputError):
        intruders.main()


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epsilon", "0"], r"epsilon is a cosine in \(0, 1\]; found 0"),
        (["--epsilon", "1.5"], r"epsilon .* found 1\.5"),
        (["--epsilon", "nan"], r"epsilon .* found nan"),
        (["--k", "0"], r"k is at least 1.*found 0"),
        (["--null-draws", "-1"], r"null_draws is at least 0"),
        (["--side", "up"], r"side is left, right or both; found 'up'"),
        (["--orientation", "sideways"], r"orientation is one of auto, conv1d, linear; found 'sideways'"),
        (["--device", "cuda"], r"device 'cuda' is not to be had here"),
        (["--device", "abacus"], r"device 'abacus' is not to be had here"),
        (["--limit", "0"], r"limit"),
        (["--ranks", "3"], r"ranks is at least k"),
        (["--epsilon", "half"], r"epsilon"),
        (["--no-such-option"], r"no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_out_of_range(library, tmp_path, command, options, message):
    import re

    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, output, errors = command(good(library), good(library), "--out", tmp_path / "result", "--quiet", *options)
    assert code == 2
    assert output == ""
    assert re.search(message, errors), errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(library, tmp_path, command):
    (tmp_path / "file").write_text("a regular file")
    before = tree(tmp_path)
    code, output, errors = command(good(library), good(library), "--out", tmp_path / "file" / "below", "--quiet")
    assert (code, output) == (2, "")
    assert errors.startswith("error: cannot write to the output folder")
    assert "choose another --out" in errors
    assert errors.count("\n") == 1
    assert tree(tmp_path) == before


FAST = ("--limit", "2", "--null-draws", "0", "--no-plots", "--quiet")


def test_an_existing_result_is_kept(library, tmp_path, command):
    arguments = (good(library), library.saved("llama"), "--out", tmp_path / "result", *FAST)
    assert command(*arguments)[0] == 0
    before = tree(tmp_path)
    assert any(name.endswith("intruders.nc") for name in before)
    code, output, errors = command(*arguments)
    assert (code, output) == (2, "")
    assert "exists and would be overwritten" in errors
    assert "--force" in errors
    assert tree(tmp_path) == before
    assert command(*arguments, "--force")[0] == 0


# ---------------------------------------------------------------------------------------------------- NaN and Inf


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_nonfinite_weights_are_named_left_out_and_fail(library, tmp_path, command, side, value):
    name = ModelPair.load(good(library), good(library)).names(embeddings=False)[1]
    state = load_file(good(library) / "model.safetensors")
    state[f"model.{name}.weight"][3, 4] = value
    save_file(state, tmp_path / "broken.safetensors")
    pair = (tmp_path / "broken.safetensors", good(library))
    fast = ("--limit", "3", "--null-draws", "0", "--no-plots", "--json", "--out", tmp_path / "result")
    arguments = (*(pair if side == "base" else pair[::-1]), *fast)
    code, output, errors = command(*arguments)
    assert code == 1
    assert "NaN or Inf" in errors
    assert "--allow-nonfinite" in errors
    assert json.loads(output)["excluded"] == {name: f"{side}: 1 NaN or Inf entries"}
    table = (tmp_path / "result" / "intruders.csv").read_text()
    assert name not in table
    assert table.count("\n") > 1
    assert command(*arguments, "--force", "--allow-nonfinite")[0] == 0


def test_nonfinite_factors_are_found(library, tmp_path):
    file = adapter(library, tmp_path) / "adapter_model.safetensors"
    state = load_file(file)
    state[next(name for name in state if "layers.1" in name and "lora_A" in name)][0, 0] = float("inf")
    save_file(state, file)
    pair = ModelPair.load(good(library), file.parent)
    problems = {m.name: m.problem() for m in pair.matrices() if m.problem()}
    assert problems == {"layers.1.self_attn.q_proj": "tuned: 1 NaN or Inf entries"}


# ---------------------------------------------------------------------------------------------------- the process


def test_importing_the_package_is_light(in_new_process):
    heavy = "import sys, finetune_lens; print(sorted({'torch','matplotlib','xarray','transformers','peft'} & set(sys.modules)))"  # fmt: skip # noqa: E501
    done = in_new_process("-c", heavy)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_help_is_light_and_errors_are_one_line(in_new_process, tmp_path):
    code = (
        "import sys, runpy; sys.argv = ['intruders', '--help']\n"
        "try: runpy.run_module('finetune_lens.intruders', run_name='__main__')\n"
        "except SystemExit as stop: code = stop.code\n"
        "print(code or 0, sorted({'torch','matplotlib','xarray','transformers','peft'} & set(sys.modules)))"
    )
    done = in_new_process("-c", code)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert "--epsilon" in done.stdout
    failed = in_new_process("-m", "finetune_lens.intruders", "nowhere.pt", "nowhere.pt", cwd=tmp_path)
    assert failed.returncode == 2
    assert (failed.stdout, failed.stderr) == ("", "error: no such file or folder: nowhere.pt\n")
    assert not list(tmp_path.iterdir())
