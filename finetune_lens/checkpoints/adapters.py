"""PEFT adapters: LoRA as a factored update, everything else through PEFT itself as a dense one."""

import copy
import difflib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune_lens.checkpoints.files import (
    fingerprint,
    from_module,
    no_bars,
    open_pickle,
    open_safetensors,
    read_json,
)
from finetune_lens.checkpoints.layout import LAYER, canonical_module
from finetune_lens.checkpoints.stored import Checkpoint, LowRank, Stored, unwrapped
from finetune_lens.errors import InputError

# Adapters that feed the model extra tokens or activations and change no weight.
NO_WEIGHTS = {
    "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "XLORA",
}  # fmt: skip
# LoRA options that make the update something else than scale · B @ A. PEFT computes those.
NOT_FACTORED = (
    "use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "velora_config", "use_bdlora", "kasa_config", "monteclora_config",
)  # fmt: skip
# Initialisations that change the base weights in a way that cannot be repeated from the adapter alone.
NOT_REPEATABLE = ("pissa_niter", "corda", "loftq", "lora_ga")
# Initialisations that leave the base alone. PEFT repeats the others (PiSSA, OLoRA) when it loads the adapter.
UNCHANGED_BASE = (True, False, None, "gaussian", "eva", "orthogonal")

COPIES = re.compile(r"\.(modules_to_save|original_module)\.")  # what PEFT may save of a module beside the module
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(\.weight)?$")


def open_adapter(folder: Path) -> Checkpoint:
    """Open a PEFT adapter folder.

    Plain LoRA (rank-stabilised or not, per-module ranks and alphas, Conv1D, embeddings, `modules_to_save`, trained
    biases) stays factored. Whatever changes weights in another way is marked to be merged by PEFT onto the base
    (`merge_adapter`).

    Raises:
        InputError: no weights, an adapter that changes no weight, or one whose base cannot be rebuilt.
    """
    config = read_json(folder / "adapter_config.json")
    kind = str(config.get("peft_type") or "").upper()
    if not kind:
        raise InputError(f"{folder / 'adapter_config.json'} has no peft_type; expected the config that PEFT writes")
    _refuse_weightless(kind, str(folder))
    file = next(
        (folder / n for n in ("adapter_model.safetensors", "adapter_model.bin") if (folder / n).is_file()), None
    )
    if file is None:
        raise InputError(f"{folder} has an adapter_config.json but no adapter_model.safetensors (or .bin)")
    raw = open_safetensors(file) if file.suffix == ".safetensors" else open_pickle(file)[0]
    raw = {unwrapped(name): stored for name, stored in raw.items()}
    for name in [name for name in raw if (whole := COPIES.sub(".", name)) != name and whole in raw]:
        del raw[name]
    checkpoint = Checkpoint(
        source=str(folder),
        tensors={},
        factors={},
        origin={
            "files": [str(file)],
            "peft_type": kind,
            "rank": config.get("r"),
            "base_model_name_or_path": config.get("base_model_name_or_path"),
            "adapter": str(folder),
        },
        fingerprint=fingerprint([file, folder / "adapter_config.json"]),
    )
    init = config.get("init_lora_weights", True)
    if kind == "LORA" and isinstance(init, str) and init.startswith(NOT_REPEATABLE):
        raise InputError(
            f"{folder}: init_lora_weights={init!r} changed the base in a way that the adapter alone does not tell; "
            "save it with PEFT's path_initial_model_for_weight_conversion, or give the merged model"
        )
    if config.get("layer_replication"):
        raise InputError(f"{folder} repeats layers of its base (layer_replication): they have no counterpart there")
    pairs = _pairs(raw)
    if kind != "LORA" or init not in UNCHANGED_BASE or any(config.get(o) for o in NOT_FACTORED) or pairs is None:
        checkpoint.factors = None
        checkpoint.origin["merge"] = str(folder)
        checkpoint.tensors = raw
        return checkpoint
    checkpoint.tensors = {name: stored for name, stored in raw.items() if ".lora_" not in name}
    checkpoint.factors = {
        module: _factor(a, b, _scale(config, module, a.shape[0]), module, folder) for module, (a, b) in pairs.items()
    }
    for module in [m for m in pairs if f"{m}.weight" in checkpoint.tensors]:  # an embedding saved beside its factors
        turned = any(name.startswith(f"{module}.lora_embedding_") for name in raw)
        weight, update = checkpoint.tensors[f"{module}.weight"], checkpoint.factors.pop(module)
        checkpoint.tensors[f"{module}.weight"] = _sum(weight, update, turned)
    return checkpoint


def _refuse_weightless(kind: str, source: str) -> None:
    if kind in NO_WEIGHTS:
        raise InputError(f"{source} is a {kind} adapter: it changes no weight of the model, so there is no update")


def _pairs(raw: dict[str, Stored]) -> dict[str, tuple[Stored, Stored]] | None:
    """Module → (A, B); None when the file holds LoRA tensors of another kind."""
    halves: dict[str, dict[str, Stored]] = {}
    for name, stored in raw.items():
        if ".lora_" not in name:
            continue
        match = FACTOR.match(name)
        if match is None or len(stored.shape) != 2:
            return None
        halves.setdefault(match["module"], {})[match["side"]] = stored
    if not halves or any(set(h) != {"A", "B"} for h in halves.values()):
        return None
    return {module: (h["A"], h["B"]) for module, h in halves.items()}


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / √r when rank-stabilised; r as the file has it, alpha by PEFT's own pattern rule."""
    patterns = config.get("alpha_pattern") or {}
    key = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", module)), None)
    alpha = patterns[key] if key is not None else config.get("lora_alpha", 8)
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _factor(a: Stored, b: Stored, scale: float, module: str, folder: Path) -> Any:
    if a.shape[0] != b.shape[1]:
        raise InputError(f"{folder}: {module}: lora_A {a.shape} and lora_B {b.shape} do not share a rank")
    return lambda: LowRank(b.read(), a.read(), scale)


def _sum(weight: Stored, update: Callable[[], LowRank], turned: bool) -> Stored:
    """weight + update in float64, so that their difference to the base keeps the update's rank."""

    def read() -> torch.Tensor:
        dense = update().dense()
        return weight.read().double() + (dense.T if turned else dense)

    return Stored(weight.shape, torch.float64, read)


def merge_adapter(base: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """The base with the adapter merged by PEFT, as float32 weights in memory. Costs the whole model in memory.

    The base is built anew from its folder, so that initialisations that replace it (PiSSA, OLoRA) are repeated by PEFT;
    what they are compared with is the original base.
    """
    import transformers
    from peft import PeftModel

    folder, kind = adapter.origin["merge"], adapter.origin["peft_type"]
    name = ((base.config or {}).get("architectures") or [None])[0]
    location = base.origin.get("files", [None])[0]
    if name is None or location is None or not hasattr(transformers, name):
        raise InputError(
            f"{folder}: a {kind} adapter of this kind is merged by PEFT, which needs the base as a Hugging Face folder "
            f"with its config.json; {base.source} is not one"
        )
    _refuse_other_layers(base, adapter)
    with no_bars():
        model = getattr(transformers, name).from_pretrained(
            Path(location).parent, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    if rows := other_vocabulary(model, folder):
        resize(model, rows)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to whoever trains
            warnings.filterwarnings("error", message="Found missing adapter keys")
            merged = merged_copy(PeftModel.from_pretrained(model, folder, local_files_only=True))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, UserWarning) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder}: PEFT cannot put this {kind} adapter onto {base.source}; is it an adapter of another base? "
            f"PEFT says: {reason}"
        ) from None
    checkpoint = from_module(merged)
    checkpoint.module = None  # it runs as an adapter on its base
    checkpoint.source, checkpoint.config, checkpoint.fingerprint = adapter.source, base.config, adapter.fingerprint
    checkpoint.notes = [f"{kind} adapter merged by PEFT in float32"]
    checkpoint.origin = {k: v for k, v in adapter.origin.items() if k != "merge"}
    return checkpoint


def other_vocabulary(model: Any, folder: str | Path) -> int:
    """How many tokens the embedding has that the adapter was saved with; 0 where as many as the model's, or none."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    stored = open_adapter(Path(folder)).tensors.get(f"{name}.weight")
    return stored.shape[0] if stored and stored.shape[0] != embedding.weight.shape[0] else 0


def resize(model: Any, rows: int) -> None:
    """Give the embeddings so many rows; what is in new ones is the adapter's to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(rows, mean_resizing=False)


def _refuse_other_layers(base: Checkpoint, adapter: Checkpoint) -> None:
    """PEFT passes over tensors of layers that the base does not have."""
    there = {canonical_module(name) for name in base.tensors}
    layers = {name[: found.end()] for name in there if (found := LAYER.search(name))}
    changed = (canonical_module(name) for name in adapter.tensors)
    stranger = next((n for n in changed if (found := LAYER.search(n)) and n[: found.end()] not in layers), None)
    if stranger:
        raise InputError(
            f"{adapter.source} is an adapter of another base: it changes {stranger}, and {base.source} has no such "
            f"layer; nearest there: {difflib.get_close_matches(stranger, there, n=1, cutoff=0)[0]}"
        )


def merged_copy(model: Any) -> Any:
    """A PEFT model's weights as its forward pass uses them, merged in a copy.

    Where input and output embedding share one tensor and only one of them is adapted, PEFT's forward pass changes that
    one and its merge both: they are separated first.
    """
    for config in model.peft_config.values():
        _refuse_weightless(str(config.peft_type.value), f"{type(model).__name__} in memory")
    model = copy.deepcopy(model)
    ends = [model.get_base_model().get_input_embeddings(), model.get_base_model().get_output_embeddings()]
    inner = [getattr(end, "base_layer", end) for end in ends]
    if inner != ends and getattr(inner[0], "weight", None) is getattr(inner[1], "weight", ()):
        inner[1].weight = torch.nn.Parameter(inner[1].weight.detach().clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about tied embeddings, which are apart now
        return model.merge_and_unload()
