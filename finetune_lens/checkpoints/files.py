"""Where the tensors are: safetensors (single, sharded), PyTorch pickles, folders, cached hub ids, memory."""

import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from finetune_lens.checkpoints.quantised import dequantised
from finetune_lens.checkpoints.stored import Checkpoint, Stored, unwrapped
from finetune_lens.errors import InputError

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# Where training scripts put the weights inside a pickle, in the order in which they are looked for.
NESTS = ("model", "state_dict", "model_state_dict", "module", "params", "weights", "model_state")
# What a folder may hold, in order of preference. The index files name their shards.
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def open_checkpoint(source: Any, *, online: bool = False) -> Checkpoint:
    """Open a model's weights; nothing but names, shapes and types is read.

    Args:
        source: a file (.safetensors, .safetensors.index.json, .pt, .pth, .bin), a Hugging Face or PEFT folder, a
            cached hub id (`org/name` or `org/name@revision`), a `torch.nn.Module`, or a mapping of names to tensors.
        online: ask the hub for what is not cached. Without it the network is never touched.

    Raises:
        InputError: there is no checkpoint there, it is damaged or incomplete, or it would have to execute code.
    """
    if isinstance(source, torch.nn.Module):
        return from_module(source)
    if isinstance(source, Mapping):
        return _from_tensors(dict(source), "a state dict in memory")
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    if str(source).endswith((*PICKLES, ".safetensors", ".json")) or not HUB_ID.fullmatch(str(source)):
        raise InputError(f"no such file or folder: {source}")
    return _from_hub(str(source), online=online)


def _from_hub(source: str, *, online: bool) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json"]
    try:
        folder = snapshot_download(
            name, revision=revision or None, local_files_only=not online, allow_patterns=wanted if online else None
        )
        if online and not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, revision=revision or None, allow_patterns=["*.bin", "*.json"])
    except LocalEntryNotFoundError:
        hint = "the hub could not be reached" if online else "pass --online (online=True) to ask the hub"
        raise InputError(f"{source} is neither a file or folder here nor in the local hub cache; {hint}") from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{source}: the hub answered: {str(error).splitlines()[0]}") from None
    checkpoint = _from_folder(Path(folder))
    checkpoint.source = source
    checkpoint.origin |= {"hub": name, "revision": Path(folder).name}
    return checkpoint


def _from_folder(folder: Path) -> Checkpoint:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if (folder / "adapter_config.json").is_file():
        if found:
            raise InputError(f"{folder} holds both an adapter and full weights; name the file: {found} for the weights")
        from finetune_lens.checkpoints.adapters import open_adapter

        return open_adapter(folder)
    if found is None:
        files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", *PICKLES))
        numbered = [p for p in files if re.search(r"-of-\d+", p.stem)]
        if len(files) != 1 or numbered:
            listing = ", ".join(p.name for p in files) or "no weight file"
            raise InputError(
                f"{folder} is not a checkpoint: expected one of {', '.join(WEIGHTS)} or adapter_config.json, "
                f"or a single weight file; found {listing}"
            )
        found = files[0]
    return _from_file(found)


def _from_file(path: Path) -> Checkpoint:
    if path.name in ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"):
        if not (path.parent / "adapter_config.json").is_file():
            raise InputError(f"{path} is a PEFT adapter without its adapter_config.json; put the two in one folder")
        return _from_folder(path.parent)
    config = _config_beside(path)
    if path.name.endswith(".index.json"):
        raw, files = _open_shards(path)
    elif path.suffix == ".safetensors":
        raw, files = open_safetensors(path), [path]
    elif path.suffix in PICKLES:
        raw, inner = open_pickle(path)
        config, files = config or inner, [path]
    else:
        raise InputError(
            f"{path} is not a checkpoint: expected .safetensors, .safetensors.index.json, {', '.join(PICKLES)}, "
            "or a folder"
        )
    checkpoint = _checkpoint(str(path), raw, config)
    checkpoint.origin["files"] = [str(p) for p in files]
    beside = path.parent / "config.json"  # it says how fused tensors are split
    checkpoint.fingerprint = fingerprint([*files, beside] if beside.is_file() else files)
    return checkpoint


def fingerprint(files: list[Path]) -> str:
    """Names, sizes and times of the files: changes when one of them is replaced."""
    facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _config_beside(path: Path) -> dict[str, Any] | None:
    file = path.parent / "config.json"
    return read_json(file) if file.is_file() else None


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _open_shards(index: Path) -> tuple[dict[str, Stored], list[Path]]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise InputError(f"{index} has no weight_map of tensors to files; expected the index of a sharded checkpoint")
    shards = [index.parent / name for name in sorted(set(where.values()))]
    missing = [p.name for p in shards if not p.is_file()]
    if missing:
        raise InputError(f"{index} names shards that are not there: {', '.join(missing)}; {len(shards)} are needed")
    raw: dict[str, Stored] = {}
    for shard in shards:
        inside = open_safetensors(shard) if shard.suffix == ".safetensors" else open_pickle(shard)[0]
        raw |= {name: stored for name, stored in inside.items() if where.get(name) == shard.name}
    absent = sorted(set(where) - set(raw))
    if absent:
        raise InputError(f"{index} names tensors that its shards do not hold: {', '.join(absent[:3])} ({len(absent)})")
    return raw, shards


def _refuse_empty(path: Path) -> None:
    if not path.stat().st_size:
        raise InputError(f"{path} is empty: a download or a save was cut off; fetch or save it again")


def open_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    def reader(name: str) -> Any:
        def read() -> torch.Tensor:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)

        return read

    _refuse_empty(path)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            return {
                name: Stored(tuple(s.get_shape()), _SAFETENSORS_TYPES[s.get_dtype()], reader(name))
                for name, s in slices.items()
            }
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or not a safetensors file: {error}; fetch or save it again") from None
    except KeyError as error:
        raise InputError(f"{path} holds tensors of type {error}, which this version does not read") from None


_SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_pickle(path: Path) -> tuple[dict[str, Stored], dict[str, Any] | None]:
    """Tensors of a `torch.save` file, and the model's sizes where the script stored them (nanoGPT's `model_args`).

    Loaded with `weights_only`, so that nothing in the file is ever executed; mapped, except for the format of PyTorch
    before 1.6, which has to be read whole and stays in memory.
    """

    def load() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what matters ends in an error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    _refuse_empty(path)
    mapped = zipfile.is_zipfile(path)
    try:
        content = load()
    except Exception as error:  # whatever a damaged or hostile file provokes in the unpickler
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise InputError(
                f"{path} refused: it holds Python objects ({found[1]}) that loading would execute; "
                "save the state dict alone (torch.save(model.state_dict(), …)) or convert it to safetensors"
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if reason.startswith("Weights only load failed"):  # and advises to load it without that protection
            reason = "its content is not that of torch.save"
        raise InputError(f"{path} is damaged or not a PyTorch checkpoint: {reason}; fetch or save it again") from None
    keys, tensors = _state_dict_in(content)
    if not tensors:
        raise InputError(f"{path} holds no tensors: expected a state dict, plain or under one of {', '.join(NESTS)}")

    def reader(name: str) -> Any:
        def read() -> torch.Tensor:
            inside = load()
            for key in keys:
                inside = inside[key]
            return inside[name].detach()

        return read

    stored = {
        name: Stored(tuple(t.shape), t.dtype, reader(name)) if mapped else Stored.of(t.detach())
        for name, t in _untied(tensors).items()
    }
    config = content.get("model_args") if isinstance(content, dict) else None
    return stored, config if isinstance(config, dict) else None


def _state_dict_in(content: Any) -> tuple[tuple[str, ...], dict[str, torch.Tensor]]:
    """The keys that lead to the weights, and the weights. (NESTS says where they may lie.)"""
    keys: tuple[str, ...] = ()
    while isinstance(content, Mapping):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
        nest = next((k for k in NESTS if isinstance(content.get(k), Mapping)), None)
        if nest is None or len(tensors) > 8:  # a nest beside a few tensors (step counters …) still is the model
            return keys, tensors
        keys, content = (*keys, nest), content[nest]
    return keys, {}


def _untied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the later of two names for one and the same memory (tied embeddings)."""
    seen: set[tuple] = set()
    kept = {}
    for name in sorted(tensors, key=lambda n: "lm_head" in n or "embed_out" in n):  # the embedding keeps its name
        t = tensors[name]
        place = (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), t.stride(), str(t.device))
        if t.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = t
    return {name: kept[name] for name in tensors if name in kept}


def from_module(module: torch.nn.Module) -> Checkpoint:
    """A model in memory. A PEFT model is merged in a copy: what it computes is what is compared."""
    whole = module
    if hasattr(module, "get_base_model"):
        from finetune_lens.checkpoints.adapters import merged_copy

        module = merged_copy(module)
    state = {name: t.detach() for name, t in module.state_dict(keep_vars=True).items()}
    checkpoint = _from_tensors(state, f"{type(module).__name__} in memory")
    config = getattr(module, "config", None)
    checkpoint.config = config.to_dict() if hasattr(config, "to_dict") else None
    checkpoint.module = whole
    return checkpoint


def _from_tensors(tensors: dict[str, Any], source: str) -> Checkpoint:
    wrong = next((f"{k}: {type(v).__name__}" for k, v in tensors.items() if not isinstance(v, torch.Tensor)), None)
    if wrong or not tensors:
        raise InputError(f"expected a state dict of names to tensors, found {wrong or 'an empty mapping'}")
    return _checkpoint(source, {k: Stored.of(t.detach()) for k, t in _untied(tensors).items()}, None)


def _checkpoint(source: str, raw: dict[str, Stored], config: dict[str, Any] | None) -> Checkpoint:
    """Wrapper prefixes stripped, quantised tensors turned back into numbers."""
    if not raw:
        raise InputError(f"{source} holds no tensors; expected the weights of a model")
    unmerged = next((name for name in raw if ".base_layer." in name or ".lora_" in name), None)
    if unmerged:
        raise InputError(
            f"{source} holds an adapter that is not merged ({unmerged}); merge it (merge_and_unload) and save the "
            "model, or give the folder with its adapter_config.json"
        )
    renamed = {unwrapped(name): stored for name, stored in raw.items()}
    if len(renamed) != len(raw):
        renamed = dict(raw)
    tensors, notes = dequantised(renamed, config, source)
    return Checkpoint(source=source, tensors=tensors, config=config, notes=notes)


@contextmanager
def no_bars() -> Iterator[None]:
    """Within: transformers shows no progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
