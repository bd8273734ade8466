"""Where each site lives in a plain Hugging Face decoder: which module, its input or its output, which features.

Found by the names that the libraries use and then checked by arithmetic: one pass through the first block shows
whether the two halves of a block follow each other or run side by side, and what adds to the residual stream.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from finetune_lens.checkpoints.layout import qkv_rows
from finetune_lens.errors import InputError

BLOCKS = ("layers", "h", "blocks", "block")
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "norm_attn_norm")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe", "fc2")
PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo")
FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
# The norm between the two halves of a block, whose input is the residual stream.
BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "norm_2", "ffn_norm", "final_layer_norm")
# Norms on what a half adds to the residual stream.
AFTER_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
DOWN = ("down_proj", "dense_4h_to_h")
AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True)
class Features:
    """Some of the features that a module puts out, head by head: `rows` of them, or all."""

    module: nn.Module
    heads: int
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Block:
    """One block and its modules.

    Attributes:
        attention, mlp: the two halves.
        projection: attention's output projection, whose input is z.
        before_mlp: what reads the residual stream between the halves.
        attn_out, mlp_out: whose output is added to the residual stream (the half, or a norm after it).
        features: of q, k and v.
    """

    module: nn.Module
    attention: nn.Module | None
    projection: nn.Module | None
    mlp: nn.Module | None
    before_mlp: nn.Module | None
    attn_out: nn.Module | None
    mlp_out: nn.Module | None
    heads: int
    d_head: int
    features: dict[str, Features]


@dataclass(frozen=True)
class Anatomy:
    """A decoder's blocks, and what holds in all of them.

    Attributes:
        sequential: the MLP reads what attention has written (resid_mid exists); else both read the same residual.
        bypass: what the attention module returns is its output projection of z, nothing more.
        tuple_output: blocks return a tuple.
        attention_outputs: how many things the attention module returns.
    """

    decoder: nn.Module
    blocks: tuple[Block, ...]
    sequential: bool
    bypass: bool
    tuple_output: bool
    attention_outputs: int

    @property
    def layers(self) -> int:
        return len(self.blocks)

    def lacks(self, kind: str, layer: int) -> str:
        """Why there is no such site; "" when there is."""
        if not 0 <= layer < self.layers:
            return f"the model has layers 0 to {self.layers - 1}"
        block = self.blocks[layer]
        if kind in ("attn_out", "pattern") and block.attention is None:
            return "this block has no attention"
        if kind in ("z", "result") and (block.projection is None or not block.heads):
            return "the heads cannot be told apart at the attention's output projection"
        if kind in ("q", "k", "v") and kind not in block.features:
            return "its projections are fused in a way that is not known here"
        if kind == "mlp_out" and block.mlp is None:
            return "this block has no MLP"
        if kind == "resid_mid" and (not self.sequential or block.before_mlp is None):
            return "attention and MLP run side by side: there is no residual between them"
        return ""


def dissect(model: nn.Module) -> Anatomy:
    """Find the blocks and their parts.

    Raises:
        InputError: not a decoder of blocks that is known here.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    decoder, blocks = _block_list(model, config)
    found = [_block(block, config) for block in blocks]
    seen, shapes = _probe(model, found[0])
    if seen["pre"].ndim != 3:
        raise InputError(
            f"{type(model).__name__} has a residual stream of shape {tuple(seen['pre'].shape)} (several at once, it "
            "seems); expected one, (batch, position, width)"
        )
    bypass = _same(seen.get("attention"), seen.get("projected"))
    if not bypass and _same(seen.get("attention"), seen.get("projected"), beside=seen["pre"]):
        found = [replace(b, attn_out=b.projection) for b in found]  # Bloom's attention adds the residual itself
        seen["attn_out"] = seen["projected"]
    if _same(seen.get("mlp_out"), seen["post"]):  # and so do Bloom's and MPT's MLP
        found = [replace(b, mlp_out=_first(b.mlp, DOWN)) for b in found]
    sequential = _same(seen.get("mid"), seen.get("attn_out"), beside=seen["pre"])
    counts = shapes.get("attention", 0)
    return Anatomy(decoder, tuple(found), sequential, bypass and counts > 0, shapes["post"] > 0, counts)


def _block_list(model: nn.Module, config: Any) -> tuple[nn.Module, nn.ModuleList]:
    depth = config.num_hidden_layers
    inner = model.base_model if hasattr(model, "base_model") else model
    for owner in inner.modules():
        for name in BLOCKS:
            blocks = getattr(owner, name, None)
            if isinstance(blocks, nn.ModuleList) and len(blocks) == depth:
                return owner, blocks
    raise InputError(
        f"{type(model).__name__} is not a decoder that can be hooked here: no list of {depth} blocks under one of the "
        f"names {', '.join(BLOCKS)}"
    )


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name in names if isinstance(child := getattr(module, name, None), nn.Module)), None)


def _block(block: nn.Module, config: Any) -> Block:
    attention, mlp = _first(block, ATTENTION), _first(block, MLP)
    projection, features, heads, d_head = None, {}, 0, 0
    if attention is not None:
        projection = next((m for path, m in attention.named_modules() if path.rpartition(".")[2] in PROJECTION), None)
        heads = getattr(config, "num_attention_heads", 0)
        width = _sizes(projection)[1] if projection is not None else 0
        d_head = width // heads if heads and width % heads == 0 else 0
        if d_head:
            features = _features(attention, config, heads, d_head)
    after_mlp = _first(block, AFTER_MLP)
    normed_after = after_mlp is not None and hasattr(block, "post_attention_layernorm")
    separate = hasattr(block, "post_self_attn_layernorm")
    before = _first(block, BEFORE_MLP[:1] + BEFORE_MLP[2:] if normed_after and not separate else BEFORE_MLP)
    after_attention = _first(block, AFTER_ATTENTION) if normed_after or separate else None
    return Block(
        block, attention, projection, mlp, before or mlp, after_attention or attention, after_mlp or mlp,
        heads=heads if d_head else 0, d_head=d_head, features=features,
    )  # fmt: skip


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map, whichever class it is."""
    inner = getattr(linear, "base_layer", linear)
    if hasattr(inner, "in_features"):
        return inner.out_features, inner.in_features
    return tuple(inner.weight.shape[::-1])  # GPT-2's Conv1D stores (in, out)


def _features(attention: nn.Module, config: Any, heads: int, d_head: int) -> dict[str, Features]:
    """Where q, k and v (before rotary embedding) come out."""
    modules = {path.rpartition(".")[2]: m for path, m in attention.named_modules()}
    if "q_proj" in modules and "k_proj" in modules and "v_proj" in modules:
        separate = {part: modules[f"{part}_proj"] for part in "qkv"}
        sizes = {part: _sizes(module)[0] for part, module in separate.items()}
        if sizes["q"] != heads * d_head or sizes["k"] % d_head or sizes["v"] % d_head:
            return {}
        return {part: Features(module, sizes[part] // d_head) for part, module in separate.items()}
    name = next((name for name in FUSED if name in modules), None)
    if name is None:
        return {}
    rows = qkv_rows(name, _sizes(modules[name]), config.to_dict())
    if rows is None:
        return {}
    index = {part: torch.cat([torch.arange(*piece) for piece in pieces]) for part, pieces in rows.items()}
    return {part: Features(modules[name], len(at) // d_head, at) for part, at in index.items()}


class _Enough(Exception):
    """The first block is done."""


def _probe(model: nn.Module, block: Block) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """What three tokens leave at the joints of the first block, and the lengths of the tuples that come out there."""
    seen: dict[str, torch.Tensor] = {}
    lengths: dict[str, int] = {}

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = first(output).detach().float()
            lengths[name] = len(output) if isinstance(output, tuple) else 0
            if name == "post":
                raise _Enough

        return hook

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"]).detach().float()

        return hook

    hooks = [block.module.register_forward_pre_hook(before("pre"), with_kwargs=True)]
    if block.before_mlp is not None:
        hooks.append(block.before_mlp.register_forward_pre_hook(before("mid"), with_kwargs=True))
    places = {
        "attention": block.attention,
        "projected": block.projection,
        "attn_out": block.attn_out,
        "mlp_out": block.mlp_out,
    }
    hooks += [m.register_forward_hook(after(name)) for name, m in places.items() if m is not None]
    hooks.append(block.module.register_forward_hook(after("post")))
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(3, device=device_of(model))[None], use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen, lengths


def _same(one: torch.Tensor | None, other: torch.Tensor | None, beside: torch.Tensor | float = 0.0) -> bool:
    """Whether one = other + beside, up to the rounding of the type that the model computes in."""
    if one is None or other is None or one.numel() != other.numel():
        return False
    one, other = one.reshape(1, *one.shape[-2:]), other.reshape(1, *other.shape[-2:])
    return bool((one - other - beside).abs().max() < 0.1 * (one - beside).abs().max())


def first(output: Any) -> torch.Tensor:
    """A module's output, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def device_of(model: nn.Module) -> torch.device:
    """Where token ids go; for embeddings that accelerate brings in when they are used, where it brings them."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    return torch.device(embeddings._hf_hook.execution_device) if device.type == "meta" else device
