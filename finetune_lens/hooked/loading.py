"""A checkpoint as a model that runs: Hugging Face folders, raw weights with a config, adapters on shared weights."""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_lens.checkpoints import Checkpoint, lay_out, open_checkpoint
from finetune_lens.checkpoints.adapters import other_vocabulary, resize
from finetune_lens.checkpoints.files import no_bars
from finetune_lens.errors import InputError
from finetune_lens.hooked.model import HookedModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")
# nanoGPT's `model_args` and the field of GPT2Config each stands for.
NANOGPT = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "vocab_size": "vocab_size",
           "block_size": "n_positions"}  # fmt: skip
PROBE = 8  # tokens on which two ways to the same logits are compared


def load_model(
    checkpoint: Checkpoint,
    *,
    config: Any = None,
    tokenizer: Any = None,
    device: "str | Mapping[str, Any]" = "auto",
    dtype: str = "auto",
    name: str = "",
) -> HookedModel:
    """Build the model that a checkpoint's weights belong to, and load them.

    Args:
        checkpoint: an opened checkpoint (no adapter: see `load_pair`).
        config: of the architecture, where none lies beside the weights: a config.json, a folder with one, a mapping, or
            a transformers config.
        tokenizer: a folder, or a tokenizer; by default the one beside the weights, if there is one.
        device: cpu, cuda …; "auto" takes a GPU when there is one; "balanced" or a mapping of modules to devices is a
            device map, dispatched by accelerate.
        dtype: float32, bfloat16, float16, float64; "auto": as stored, but float32 on a CPU, where half precision is
            slow and rounds what is to be measured.

    Raises:
        InputError: no config, weights that do not fit it, or an architecture that transformers does not know.
    """
    module = checkpoint.module
    if module is None:
        module = _build(checkpoint, config, device, dtype)
    return HookedModel(
        module, _tokenizer(tokenizer, checkpoint), name=name or checkpoint.source, fingerprint=checkpoint.fingerprint
    )


def as_model(
    model: Any, *, device: Any = "auto", dtype: str = "auto", config: Any = None, tokenizer: Any = None,
    online: bool = False,
) -> HookedModel:  # fmt: skip
    """`model` if it is one already; else what lies there, loaded.

    Raises:
        InputError: an adapter, which needs the base it was trained on; else as `load_model`.
    """
    if isinstance(model, HookedModel):
        return model
    checkpoint = open_checkpoint(model, online=online)
    if "adapter" in checkpoint.origin:
        base = checkpoint.origin.get("base_model_name_or_path")
        raise InputError(
            f"{checkpoint.source} is an adapter and does not run alone: load it with its base ({base}) as "
            "fl.ModelPair.load(base, adapter).tuned (--base), or give the merged model"
        )
    return load_model(checkpoint, config=config, tokenizer=tokenizer, device=device, dtype=dtype)


def load_pair(
    base: Checkpoint, tuned: Checkpoint, *, config: Any = None, tokenizer: Any = None, device: Any = "auto",
    dtype: str = "auto",
) -> tuple[HookedModel, HookedModel]:  # fmt: skip
    """Base and tuned as models that run.

    An adapter is put onto the base's own weights and switched off for the base's runs, where that gives the base's
    logits bit for bit; where it does not (PiSSA, OLoRA, trained biases, added tokens), there are two copies.
    """
    one = load_model(base, config=config, tokenizer=tokenizer, device=device, dtype=dtype)
    folder = tuned.origin.get("adapter")
    if folder is None:
        known = config if config is not None else (base.config if tuned.config is None else None)
        other = load_model(
            tuned, config=known, tokenizer=tokenizer or (None if _folder(tuned) else one.tokenizer), device=device,
            dtype=dtype,
        )  # fmt: skip
        other.tokenizer = other.tokenizer or one.tokenizer
        return one, other
    alone = _probed(one)
    rows = other_vocabulary(one.module, folder)
    module = one.module if base.module is None and not rows else copy.deepcopy(one.module)
    if rows:
        resize(module, rows)
    peft = _with_adapter(module, folder)
    mine = _tokenizer(tokenizer, tuned) or one.tokenizer
    other = HookedModel(peft, mine, name=tuned.source, fingerprint=tuned.fingerprint)
    shared = HookedModel(peft, one.tokenizer, name=base.source, adapted=False, fingerprint=base.fingerprint)
    if torch.equal(alone, _probed(shared)):
        shared.known = (_probe_ids(shared), alone)
        return shared, other
    return load_model(base, config=config, tokenizer=tokenizer, device=device, dtype=dtype), other


def load_writable(
    base: Checkpoint, tuned: Checkpoint, *, config: Any = None, tokenizer: Any = None, device: Any = "auto",
    dtype: str = "auto",
) -> HookedModel:  # fmt: skip
    """The base in memory of its own, with the tuned side's adapter on it where that is factored: to be written into.

    A model or tensors that came in memory are copied: they stay what they are.
    """
    one = load_model(base, config=config, tokenizer=tokenizer, device=device, dtype=dtype)
    module = one.module if base.origin.get("files") else copy.deepcopy(one.module)
    known = one.tokenizer or _tokenizer(tokenizer, tuned)
    if tuned.is_adapter:
        if rows := other_vocabulary(module, tuned.origin["adapter"]):
            raise InputError(
                f"{tuned.source} is an adapter for a vocabulary of {rows} tokens, and {base.source} has "
                f"{module.get_input_embeddings().weight.shape[0]}; give a base whose embedding was resized to that "
                "(resize_token_embeddings), or the merged model as the tuned side"
            )
        module = _with_adapter(module, tuned.origin["adapter"])
    return HookedModel(module.requires_grad_(False).eval(), known, name=f"{base.source} → {tuned.source}")


def tokenizer_of(checkpoint: Checkpoint, given: Any = None) -> Any:
    """The tokenizer that is given, or lies beside the weights; None where there is none."""
    return _tokenizer(given, checkpoint)


def shares_weights(base: HookedModel, tuned: HookedModel) -> bool:
    """Whether the two are one module, with and without its adapter."""
    return base.module is tuned.module


def _probed(model: HookedModel) -> torch.Tensor:
    return model.run(_probe_ids(model)).logits


def _probe_ids(model: HookedModel) -> torch.Tensor:
    return torch.arange(PROBE)[None] % model.vocabulary


def _with_adapter(module: nn.Module, folder: str) -> nn.Module:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to whoever trains
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(module, folder, local_files_only=True).eval()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, UserWarning) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: PEFT cannot put this adapter onto the base; PEFT says: {reason}") from None


def _folder(checkpoint: Checkpoint) -> Path | None:
    files = checkpoint.origin.get("files")
    return Path(files[0]).parent if files else None


def _tokenizer(given: Any, checkpoint: Checkpoint) -> Any:
    if given is not None and not isinstance(given, str | Path):
        return given
    folder = Path(given) if given is not None else _folder(checkpoint)
    if folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if given is not None:
            raise InputError(f"{given} holds no tokenizer; expected a folder with {TOKENIZER_FILES[0]}")
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: the tokenizer there cannot be loaded: {str(error).splitlines()[0]}") from None


def _config(checkpoint: Checkpoint, given: Any) -> Any:
    """The transformers config of the model."""
    from transformers import CONFIG_MAPPING, AutoConfig, GPT2Config, PreTrainedConfig

    if isinstance(given, PreTrainedConfig):
        return given
    if isinstance(given, str | Path):
        path = Path(given) / "config.json" if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise InputError(f"no such config: {path}; expected a config.json or a folder with one")
        from finetune_lens.checkpoints.files import read_json

        given = read_json(path)
    facts = dict(given or checkpoint.config or {})
    if "model_type" not in facts and set(NANOGPT) <= set(facts):
        sizes = {ours: facts[theirs] for theirs, ours in NANOGPT.items()}
        return GPT2Config(**sizes, activation_function="gelu", bos_token_id=None, eos_token_id=None)
    if "model_type" not in facts:
        raise InputError(
            f"{checkpoint.source} are weights alone: to run them, the architecture has to be known; pass --config with "
            "the model's config.json (its model_type is needed), or put that file beside the weights"
        )
    if facts["model_type"] not in CONFIG_MAPPING:
        raise InputError(
            f"{checkpoint.source}: transformers knows no architecture {facts['model_type']!r}, the model_type in its "
            "config; its weights can be compared, but it cannot be run"
        )
    try:
        return AutoConfig.for_model(**facts)
    except (ValueError, TypeError) as error:
        raise InputError(f"{checkpoint.source}: its config cannot be used: {str(error).splitlines()[0]}") from None


def _build(checkpoint: Checkpoint, config: Any, device: Any, dtype: str) -> nn.Module:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from finetune_lens import device as devices

    config = _config(checkpoint, config)
    mapped = isinstance(device, Mapping) or device in ("balanced", "sequential")
    where = None if mapped else devices.choose(device)
    number = _dtype(checkpoint, dtype, where)
    state = _state(checkpoint, config)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise InputError(f"{checkpoint.source} is no causal language model: its config says {config.model_type}")
    with torch.device("meta"), _quiet():
        expected = {name: tuple(t.shape) for name, t in kind(config).state_dict().items()}
    for name in sorted(set(state) & set(expected)):
        if tuple(state[name].shape) != expected[name]:
            raise InputError(
                f"{checkpoint.source}: {name} is {tuple(state[name].shape)}, and its config makes it {expected[name]}; "
                "is the config that of another model?"
            )
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            model, report = kind.from_pretrained(
                None, config=config, state_dict=state, dtype=number, device_map=device if mapped else None,
                output_loading_info=True,
            )  # fmt: skip
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{checkpoint.source} does not fit its config ({config.model_type}): {reason}") from None
    for what, names in (("lacks", report["missing_keys"]), ("has, beyond the model,", report["unexpected_keys"])):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise InputError(
                f"{checkpoint.source} {what} {len(names)} tensors of {type(model).__name__}: {some}; is it another "
                "architecture than its config says?"
            )
    model = model.eval().requires_grad_(False)
    return model if mapped else model.to(where)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: transformers says nothing; what it would say of keys is checked after."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with no_bars():
            yield
    finally:
        logging.set_verbosity(level)


def _dtype(checkpoint: Checkpoint, dtype: str, where: "torch.device | None") -> torch.dtype:
    known = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
    if dtype in known:
        return known[dtype]
    if dtype != "auto":
        raise InputError(f"dtype is one of auto, {', '.join(known)}; found {dtype!r}")
    if where is not None and where.type == "cpu":
        return torch.float32
    counts: dict[torch.dtype, int] = {}
    for stored in checkpoint.tensors.values():
        if stored.dtype.is_floating_point:
            counts[stored.dtype] = counts.get(stored.dtype, 0) + 1
    most = max(counts, key=counts.__getitem__, default=torch.float32)
    return most if most in known.values() else torch.bfloat16


def _state(checkpoint: Checkpoint, config: Any) -> dict[str, torch.Tensor]:
    """The tensors by name; (out, in) weights of a GPT-2 trained elsewhere (nanoGPT) turned into Conv1D's (in, out)."""
    state = {name: stored.read() for name, stored in checkpoint.tensors.items()}
    if config.model_type != "gpt2":
        return state
    layout = lay_out(checkpoint, config=json.loads(config.to_json_string()), fused=True)
    if layout.orientation == "linear":
        turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        state = {name: t.T.contiguous() if name.endswith(turned) else t for name, t in state.items()}
    biases = ("attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias", "ln_1.bias", "ln_2.bias")
    stem = "transformer." if any(name.startswith("transformer.") for name in state) else ""
    for layer in range(config.n_layer):  # nanoGPT can do without biases, which is a bias of zero
        for end in biases:
            weight = state.get(f"{stem}h.{layer}.{end.removesuffix('bias')}weight")
            if weight is not None:
                state.setdefault(f"{stem}h.{layer}.{end}", weight.new_zeros(weight.shape[-1]))
    final = state.get(f"{stem}ln_f.weight")
    if final is not None:
        state.setdefault(f"{stem}ln_f.bias", torch.zeros_like(final))
    return {name: t for name, t in state.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
