"""What each tensor is: layer, component, orientation; fused tensors split, experts one by one.

A layout maps canonical names to parts. Canonical names are Hugging Face's module paths without the model's own prefix
and without `.weight`: `layers.0.self_attn.q_proj`, `h.0.attn.c_attn.q`, `layers.0.mlp.experts.3.gate_proj`. Two
checkpoints of one architecture get the same names whichever library wrote them. Matrices are (out, in).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune_lens.checkpoints.stored import Checkpoint, LowRank, Stored
from finetune_lens.errors import InputError

PREFIX = re.compile(r"^((model|transformer|gpt_neox|language_model|backbone|bert|roberta|distilbert)\.)+")
# The same module under other names, as the libraries write it → our name.
SAME = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(?<=\.experts\.)(\d+)\.w1\b"), r"\1.gate_proj"),
    (re.compile(r"(?<=\.experts\.)(\d+)\.w3\b"), r"\1.up_proj"),
    (re.compile(r"(?<=\.experts\.)(\d+)\.w2\b"), r"\1.down_proj"),
    (re.compile(r"^embed_out\b"), "lm_head"),
)
# Buffers that some checkpoints carry: causal masks, rotary frequencies. Not parameters.
BUFFERS = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias|"
                     r"rotary_emb\.inv_freq|rotary_emb\.\w+_cached|position_ids|inv_freq)$")  # fmt: skip
LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block|encoder\.layer)\.(\d+)(?:\.|$)")
# Component ← how the module's name ends, whole words between dots (the first that fits, from the layer's number on).
COMPONENTS = (
    ("q", r"q_proj|query|wq|to_q|q_lin|\w*Attention\.q"),
    ("k", r"k_proj|key|wk|to_k|k_lin|\w*Attention\.k"),
    ("v", r"v_proj|value|wv|to_v|v_lin|\w*Attention\.v"),
    ("qkv", r"c_attn|query_key_value|qkv_proj|Wqkv|attn\.qkv"),
    ("gate_up", r"gate_up_proj"),
    ("gate", r"gate_proj|wi_0|(feed_forward|mlp|ffn)\.w1"),
    ("up", r"up_proj|wi_1|wi|c_fc|fc1|fc_in|dense_h_to_4h|intermediate\.dense|lin1|(feed_forward|mlp|ffn)\.w3"),
    ("down", r"down_proj|DenseReluDense\.wo|mlp\.c_proj|fc2|fc_out|dense_4h_to_h|\d+\.output\.dense|lin2|"
             r"(feed_forward|mlp|ffn)\.w2"),
    ("o", r"o_proj|out_proj|wo|out_lin|(attn|attention|self_attention|self_attn)\.(c_proj|dense)|"
          r"attention\.output\.dense|\w*Attention\.o"),
)  # fmt: skip
COMPONENTS = tuple((name, re.compile(rf"(^|\.)({pattern})$")) for name, pattern in COMPONENTS)
OUTSIDE = (
    (
        "embed",
        re.compile(
            r"(^|\.)(wte|embed_tokens|word_embeddings|embed_in|tok_embeddings|tok_emb|token_embedding|token_type_embeddings|shared)$"
        ),
    ),
    ("pos", re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings|pos_emb)$")),
    ("unembed", re.compile(r"^(lm_head|output)$")),
)
# How q, k, v are fused, by the config's model_type: one after the other, or head by head. `c_attn` is in blocks anyway.
IN_BLOCKS = ("phi3", "phi3_v", "phi4_multimodal", "mpt", "modernbert")
BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon")
NORM = re.compile(r"(norm_?\d*|(^|\.)ln(_\w+|\d*))$", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One matrix (out, in), or one vector, of a model.

    `module` is the canonical name of the module it was cut from; `transpose`, `expert`, `rows` say how: the stored
    tensor is taken at its expert, turned into (out, in), then cut to `rows`.
    """

    name: str
    module: str
    layer: int | None
    component: str
    stored: Stored
    transpose: bool = False
    expert: int | None = None
    rows: tuple[tuple[int, int], ...] | None = None  # [start, stop) pieces, joined in this order
    columns: int | None = None  # the first so many columns

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """(out, in) of the whole module."""
        shape = (self.stored.shape[1:] if self.expert is not None else self.stored.shape) or (1,)
        return shape[::-1] if self.transpose else shape

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of this part."""
        shape = self.whole_shape
        if self.rows is not None:
            shape = (sum(stop - start for start, stop in self.rows), *shape[1:])
        return shape if self.columns is None else (shape[0], self.columns)

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2 and self.component not in ("norm", "bias")

    def read(self) -> torch.Tensor:
        """The numbers, as stored: (out, in), or a vector."""
        tensor = self.stored.read()
        if tensor.ndim == 0:
            tensor = tensor.reshape(1)
        if self.expert is not None:
            tensor = tensor[self.expert]
        return self._cut(tensor.T if self.transpose else tensor)

    def write(self, value: torch.Tensor) -> None:
        """Put `value`, in the form that `read` gives, into the tensor itself: of tensors in memory."""
        tensor = self.stored.read()
        tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
        tensor = tensor if self.expert is None else tensor[self.expert]
        tensor = tensor.T if self.transpose else tensor
        at = 0
        for start, stop in self.rows or ((0, len(tensor)),):
            piece = tensor[start:stop] if self.columns is None else tensor[start:stop, : self.columns]
            piece.copy_(value[at : at + len(piece)])
            at += len(piece)

    def of_update(self, update: LowRank) -> LowRank:
        """The part of an update of the whole module that falls on this part."""
        return replace(update, left=self._cut(update.left, columns=False), right=update.right[:, : self.columns])

    def _cut(self, tensor: torch.Tensor, columns: bool = True) -> torch.Tensor:
        if self.rows is not None:
            pieces = [tensor[start:stop] for start, stop in self.rows]
            tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return tensor[:, : self.columns] if columns and self.columns is not None else tensor

    def shrunk(self, shape: tuple[int, int]) -> "Part":
        """The leading (out, in) block of that shape: the rows two vocabularies share."""
        rows, left = [], shape[0]
        for start, stop in self.rows or ((0, self.shape[0]),):
            rows.append((start, start + min(left, stop - start)))
            left -= rows[-1][1] - start
        return replace(self, rows=tuple(r for r in rows if r[1] > r[0]), columns=shape[1])


@dataclass(frozen=True)
class Layout:
    """Parts by canonical name, and what was decided on the way."""

    parts: dict[str, Part]
    ignored: list[str]
    notes: list[str]
    orientation: str  # of GPT-2-style modules: "conv1d" or "linear"


def lay_out(
    checkpoint: Checkpoint, *, config: dict[str, Any] | None = None, fused: bool = False, orientation: str = "auto"
) -> Layout:
    """Say what each tensor of a checkpoint is.

    Args:
        checkpoint: an opened checkpoint (not an adapter).
        config: the model's config where the checkpoint has none (fused q/k/v need the number of heads).
        fused: leave fused q/k/v and gate/up in one piece, as they are stored.
        orientation: of GPT-2-style `c_attn`, `c_fc`, `c_proj`: "conv1d" stores (in, out), "linear" (out, in); "auto"
            decides from the shapes of this checkpoint.

    Raises:
        InputError: shapes that contradict each other or the config.
    """
    config = checkpoint.config or config or {}
    config = config.get("text_config") or config
    conv1d, notes = _orientation(checkpoint, orientation)
    parts: dict[str, Part] = {}
    ignored = []
    whole: set[str] = set()
    names = _canonical(checkpoint.tensors)
    shapes = {module: checkpoint.tensors[raw].shape for raw, (module, ending) in names.items() if not ending}
    for raw, (module, ending) in names.items():
        stored = checkpoint.tensors[raw]
        if BUFFERS.search(raw):
            ignored.append(raw)
            continue
        # GPT-OSS, known by the biases of its experts.
        alternating = f"{module}_bias" in shapes and config.get("model_type", "gpt_oss") == "gpt_oss"
        for part in _parts(module, ending, stored, shapes, conv1d):
            if part.component in ("qkv", "gate_up") and part.is_matrix and not fused:
                kind = part.module.rpartition(".")[2]
                rows = (
                    qkv_rows(kind, part.shape, config) if part.component == "qkv" else _gate_up_rows(part, alternating)
                )
                if rows:
                    parts |= {piece.name: piece for piece in _pieces(part, rows)}
                    continue
                whole.add(part.module)
            parts[part.name] = part
    if whole:
        notes.append(
            f"{len(whole)} fused tensors kept whole, e.g. {min(whole)}: splitting them needs a config.json beside the "
            "weights with the number of heads and a model_type whose layout is known here"
        )
    return Layout(parts, ignored, notes, "conv1d" if conv1d else "linear")


def _canonical(tensors: dict[str, Stored]) -> dict[str, tuple[str, str]]:
    """Raw name → (module, ending), the ending being "" for a weight, "bias" … otherwise."""
    short = {raw: canonical_module(raw) for raw in tensors}
    if len(set(short.values())) < len(short):  # two models in one checkpoint: keep the names apart
        short = {raw: raw for raw in tensors}
    split = {}
    for raw, name in short.items():
        module, _, ending = name.rpartition(".")
        split[raw] = (module, "") if ending == "weight" else (module, "bias") if ending == "bias" else (name, "")
    return split


def canonical_module(name: str) -> str:
    """A module's or tensor's name without the model's own prefix, in our spelling."""
    name = PREFIX.sub("", name)
    for pattern, ours in SAME:
        name = pattern.sub(ours, name)
    return name


def _describe(module: str) -> tuple[int | None, str]:
    """Layer and component of a module, as far as its name tells."""
    found = LAYER.search(module)
    if found is None:
        return None, next((c for c, p in OUTSIDE if p.search(module)), "norm" if NORM.search(module) else module)
    after = module[found.start() :]
    if NORM.search(module):
        return int(found[1]), "norm"
    fallback = module[found.end() :] or module
    return int(found[1]), next((c for c, p in COMPONENTS if p.search(after)), fallback)


def _parts(
    module: str, ending: str, stored: Stored, shapes: dict[str, tuple[int, ...]], conv1d: bool
) -> Iterator[Part]:
    """The matrices in one stored tensor: itself, or one an expert."""
    layer, component = _describe(module)
    if ending == "bias" or module.endswith("_bias"):
        yield Part(
            f"{module}.bias" if ending else module, module, layer, "norm" if component == "norm" else "bias", stored
        )
    elif len(stored.shape) == 3 and ".experts." in f"{module}.":
        stem, _, kind = module.rpartition(".")
        turned = _experts_turned(shapes.get(f"{stem}.gate_up_proj"), shapes.get(f"{stem}.down_proj"))
        for expert in range(stored.shape[0]):
            name = f"{stem}.{expert}.{kind}"
            yield Part(name, name, layer, component, stored, transpose=turned, expert=expert)
    else:
        transpose = component in ("embed", "pos") or (
            conv1d and module.rpartition(".")[2] in ("c_attn", "c_fc", "c_proj")
        )
        yield Part(module, module, layer, component, stored, transpose=transpose and len(stored.shape) == 2)


def _experts_turned(gate_up: tuple[int, ...] | None, down: tuple[int, ...] | None) -> bool:
    """Whether experts are stored (expert, in, out), as GPT-OSS and Llama 4 do, and not (expert, out, in)."""
    if gate_up is None or down is None:
        return False
    return gate_up[1] == down[2] and gate_up[2] == 2 * down[1]


def _orientation(checkpoint: Checkpoint, orientation: str) -> tuple[bool, list[str]]:
    """Whether GPT-2's c_* modules are stored (in, out), decided by those whose shape tells: c_attn, c_fc."""
    if orientation not in ("auto", "conv1d", "linear"):
        raise InputError(f"orientation is one of auto, conv1d, linear; found {orientation!r}")
    telling = {
        name: s.shape
        for name, s in checkpoint.tensors.items()
        if re.search(r"\.(c_attn|c_fc)\.weight$", name) and len(s.shape) == 2 and s.shape[0] != s.shape[1]
    }
    if orientation != "auto":
        return orientation == "conv1d", [f"c_attn, c_fc, c_proj read as {orientation}, as asked"] if telling else []
    votes = {name: shape[0] < shape[1] for name, shape in telling.items()}
    if len(set(votes.values())) > 1:
        one, other = (next(n for n, v in votes.items() if v is side) for side in (True, False))
        raise InputError(
            f"{checkpoint.source}: {one} {telling[one]} looks stored (in, out) and {other} {telling[other]} (out, in); "
            "say which with --orientation conv1d or linear"
        )
    if not votes:
        return False, []
    name, wide = next(iter(votes.items()))
    said = "(in, out), as Hugging Face's Conv1D stores it" if wide else "(out, in), as torch.nn.Linear stores it"
    return wide, [f"c_attn, c_fc, c_proj read as {said}: {name} is {telling[name]}"]


Rows = dict[str, list[tuple[int, int]]]  # component → its [start, stop) pieces of the fused rows


def _pieces(part: Part, rows: Rows) -> Iterator[Part]:
    """q, k, v or gate, up of a fused part."""
    stem = part.name.removesuffix("gate_up_proj")
    for component, pieces in rows.items():
        name = f"{stem}{component}_proj" if part.component == "gate_up" else f"{part.name}.{component}"
        yield replace(part, name=name, component=component, rows=tuple(pieces))


def _gate_up_rows(part: Part, alternating: bool) -> Rows | None:
    """Gate above up, unless the two take turns."""
    out = part.shape[0]
    if out % 2:
        return None
    if alternating:
        return {"gate": [(i, i + 1) for i in range(0, out, 2)], "up": [(i, i + 1) for i in range(1, out, 2)]}
    return {"gate": [(0, out // 2)], "up": [(out // 2, out)]}


def qkv_rows(kind: str, shape: tuple[int, ...], config: dict[str, Any]) -> Rows | None:
    """The rows of q, k and v in the fused matrix (out, in) of a module called `kind`; None where that is not known."""
    out, width = shape
    model = config.get("model_type")
    heads = config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads")
    if model in BY_HEAD or (model == "gpt_bigcode" and not config.get("multi_query")):
        return _interleaved(out, heads, config)
    if kind != "c_attn" and model not in IN_BLOCKS:
        return None
    groups = config.get("num_key_value_heads") or (1 if config.get("multi_query") else heads)
    if heads and groups:
        head = config.get("head_dim") or out // (heads + 2 * groups)
        q, kv = heads * head, groups * head
    else:
        q = kv = width
    return {"q": [(0, q)], "k": [(q, q + kv)], "v": [(q + kv, out)]} if q + 2 * kv == out else None


def _interleaved(out: int, heads: int | None, config: dict[str, Any]) -> Rows | None:
    """Per group of heads: its queries, then its key, then its value.

    GPT-NeoX, Bloom, Falcon-RW and GPT-BigCode without multi-query have a group a head; Falcon-40B has `num_kv_heads`
    groups; Falcon-7B (multi-query) has one.
    """
    if not heads:
        return None
    if config.get("new_decoder_architecture"):
        groups = config.get("num_kv_heads") or heads
    else:
        groups = 1 if config.get("multi_query") else heads
    queries = heads // groups
    head, rest = divmod(out, groups * (queries + 2))
    if rest:
        return None
    starts = range(0, out, (queries + 2) * head)
    return {
        "q": [(s, s + queries * head) for s in starts],
        "k": [(s + queries * head, s + (queries + 1) * head) for s in starts],
        "v": [(s + (queries + 1) * head, s + (queries + 2) * head) for s in starts],
    }
