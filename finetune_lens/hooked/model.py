"""A Hugging Face causal language model whose activations can be read and replaced.

>>> import torch, transformers
>>> sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 16}
>>> config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
>>> model = HookedModel(transformers.GPT2LMHeadModel(config).eval())
>>> run = model.run(torch.tensor([[1, 2, 3]]), capture=["blocks.1.attn.hook_z"])
>>> run.cache["blocks.1.attn.hook_z"].shape                             # (batch, pos, head, d_head)
torch.Size([1, 3, 2, 4])
>>> halved = model.run(torch.tensor([[1, 2, 3]]), edits=[("blocks.0.hook_mlp_out", lambda x: x / 2)])
>>> bool((halved.logits == run.logits).all())
False
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finetune_lens.errors import InputError
from finetune_lens.hooked.anatomy import Anatomy, Block, device_of, dissect, first
from finetune_lens.hooked.sites import parse, site_name

Edit = tuple[str, Tensor | Callable[[Tensor], Tensor]]  # site name, and the new value or a function of the old one


@dataclass
class Run:
    """What a forward pass left: logits, the captured activations by site name, keys and values if asked for."""

    logits: Tensor  # (batch, pos or answer, vocab)
    cache: dict[str, Tensor] = field(default_factory=dict)
    keys_values: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # by layer: (batch, kv_head, pos, d_head)

    def gradients(self, of: Float[Tensor, ""]) -> dict[str, Tensor]:
        """∂of/∂activation at every captured site; of a run with `gradients=True`."""
        found = torch.autograd.grad(of, list(self.cache.values()), allow_unused=True)
        pairs = zip(self.cache.items(), found, strict=True)
        return {name: torch.zeros_like(x) if g is None else g for (name, x), g in pairs}


class HookedModel:
    """A causal language model with named sites. The module itself is left as it is: hooks live for one `run`.

    Args:
        module: a Hugging Face causal language model in memory, or a PEFT model around one.
        tokenizer: its tokenizer, where prompts are text.
        name: what to call it in messages.
        adapted: of a PEFT model: whether its adapter is on in this model's runs. Two hooked models may share one
            module, one with and one without its adapter.
        fingerprint: of the files it came from; "" when there are none.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        *,
        name: str = "",
        adapted: bool = True,
        fingerprint: str = "",
    ):
        self._outer = module
        self.module = module.get_base_model() if hasattr(module, "get_base_model") else module
        self.tokenizer = tokenizer
        self.name = name or type(self.module).__name__
        self.adapted = adapted
        self.fingerprint = fingerprint
        self.known: tuple[Tensor, Tensor] | None = None  # ids and logits of the weights alone, before an adapter came
        unembedding = getattr(self.module, "get_output_embeddings", None)
        if not callable(unembedding) or unembedding() is None or not hasattr(self.module, "config"):
            raise InputError(
                f"{self.name}: expected a Hugging Face causal language model, found {type(self.module).__name__}"
            )

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """Where the sites are."""
        with self.side():
            return dissect(self.module)

    @property
    def layers(self) -> int:
        return self.anatomy.layers

    @property
    def heads(self) -> int:
        """Query heads a layer."""
        return self.anatomy.blocks[0].heads

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.get_input_embeddings().weight.dtype

    @property
    def vocabulary(self) -> int:
        return self.module.config.get_text_config().vocab_size

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        kind, dtype = type(self.module).__name__, str(self.dtype).removeprefix("torch.")
        facts = {"model": self.name, "class": kind, "dtype": dtype, "device": str(self.device)}
        return facts | ({"files_sha256": self.fingerprint} if self.fingerprint else {})

    def require_tokenizer(self) -> Any:
        """The tokenizer; InputError where there is none."""
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer beside its weights; name a folder with one (--tokenizer)")
        return self.tokenizer

    def require(self, kinds: Sequence[str], layers: Sequence[int]) -> None:
        """Raise InputError where one of these sites does not exist."""
        for kind in kinds:
            for layer in layers:
                if self.lacks(kind, layer):
                    raise InputError(f"{self.name} has no site {site_name(kind, layer)}: {self.lacks(kind, layer)}")

    def lacks(self, kind: str, layer: int) -> str:
        """Why there is no such site; "" when there is."""
        if kind == "pattern" and _eager(self.module) is None:
            return "this architecture does not hand out its attention pattern"
        return self.anatomy.lacks(kind, layer)

    def run(
        self,
        ids: Int[Tensor, "batch pos"],
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        capture: Sequence[str] = (),
        edits: Sequence[Edit] = (),
        logits_at: Int[Tensor, "batch answer"] | None = None,
        gradients: bool = False,
        keys_values: bool = False,
    ) -> Run:
        """One forward pass.

        Args:
            ids: token ids.
            mask: True on tokens, False on padding (left or right). Positions count tokens, not columns.
            capture: site names (`blocks.3.attn.hook_z`) whose activations to keep, after any edit there.
            edits: (site name, new value) or (site name, function of the old value), applied in this order.
            logits_at: columns whose logits are wanted; the unembedding is computed there only. Default: all.
            gradients: keep the graph, for `Run.gradients`.
            keys_values: keep the attention's keys and values.

        Raises:
            InputError: a site that the model does not have; texts that it cannot read.

        Cost: one forward pass; memory: the captured activations.
        """
        wanted: dict[str, list] = {name: [] for name in capture}
        for name, change in edits:
            wanted.setdefault(name, []).append(change)
        captured: dict[str, Tensor] = {}
        inputs = self.inputs(ids, mask)
        if keys_values:
            from transformers import DynamicCache

            inputs |= {"past_key_values": DynamicCache(), "use_cache": True}
        with ExitStack() as stack:
            stack.enter_context(self.side())
            stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
            for name, changes in wanted.items():
                kind, layer = parse(name)
                self.require([kind], [layer])
                touch = _touch(name, changes, captured if name in capture else None, ids.shape, clone=not gradients)
                stack.enter_context(self.hook(kind, layer, touch, bool(changes) or gradients))
            if any(parse(name)[0] == "pattern" for name in wanted):
                stack.enter_context(patterns_visible(self.module))
            if gradients:
                stack.enter_context(_embeddings_in_graph(self.module))
            if logits_at is not None:
                stack.enter_context(self.logits_at(logits_at))
            out = self.module(**inputs)
        layers = inputs["past_key_values"].layers if keys_values else []
        return Run(out.logits, captured, [(layer.keys, layer.values) for layer in layers])

    def inputs(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What the module's forward is called with. Without padding no mask is given: the fast paths stay open.

        Raises:
            InputError: more tokens than the model reads, or a token that it has no embedding for.
        """
        length = ids.shape[1] if mask is None else int(mask.sum(1).max())
        most = getattr(self.module.config.get_text_config(), "max_position_embeddings", None)
        if most and length > most:
            raise InputError(f"{self.name} reads at most {most} tokens, and a text here has {length}; shorten it")
        rows = self.module.get_input_embeddings().weight.shape[0]
        if ids.numel() and int(ids.max()) >= rows:
            raise InputError(
                f"{self.name} has embeddings for {rows} tokens, and a text here has the token {int(ids.max())}; is "
                "the tokenizer that of another model?"
            )
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device), "use_cache": False}
        if mask is not None and not bool(mask.all()):
            mask = mask.to(self.device)
            inputs["attention_mask"] = mask.long()
            if self.takes("position_ids"):
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return inputs

    def takes(self, argument: str) -> bool:
        """Whether the module's forward has this argument."""
        return argument in inspect.signature(self.module.forward).parameters

    @contextmanager
    def side(self) -> Iterator[None]:
        """The adapter off, where this model is the side without it; evaluation mode, so that nothing is dropped."""
        off = hasattr(self._outer, "disable_adapter") and not self.adapted
        training = [part for part in self.module.modules() if part.training]  # an adapter's dropout may be, alone
        with self._outer.disable_adapter() if off else nullcontext():
            for part in training:
                part.training = False
            try:
                yield
            finally:
                for part in training:
                    part.training = True

    @contextmanager
    def logits_at(
        self, columns: Int[Tensor, "batch answer"], order: Int[Tensor, " batch"] | None = None
    ) -> Iterator[None]:
        """Within: the unembedding sees these columns only, of the rows in this order."""
        unembed = self.module.get_output_embeddings()

        def gather(module: nn.Module, args: tuple) -> tuple:
            (hidden,) = args
            at = columns.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(1, at)
            return (hidden if order is None else hidden[order.to(hidden.device)],)

        hook = unembed.register_forward_pre_hook(gather)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def hook(self, kind: str, layer: int, touch: Callable[[Tensor], Tensor], changed: bool) -> Iterator[None]:
        """Within: `touch` sees the activation of a site in its own shape, and what it returns stands in its place."""
        block = self.anatomy.blocks[layer]
        if kind in ("resid_pre", "resid_mid", "z"):
            module = {"resid_pre": block.module, "resid_mid": block.before_mlp, "z": block.projection}[kind]
            hook = module.register_forward_pre_hook(_at_input(kind, block.d_head, touch, changed), with_kwargs=True)
        elif kind == "result":
            hook = block.projection.register_forward_hook(_at_results(block, touch, changed))
        elif kind == "pattern":
            hook = _PatternHook(block.attention, touch, changed)
        elif kind in ("q", "k", "v"):
            hook = block.features[kind].module.register_forward_hook(
                _at_features(block.features[kind].rows, block.d_head, touch, changed)
            )
        else:
            module = {"resid_post": block.module, "attn_out": block.attn_out, "mlp_out": block.mlp_out}[kind]
            hook = module.register_forward_hook(_at_output(touch, changed))
        try:
            yield
        finally:
            hook.remove()

    def __repr__(self) -> str:
        return f"HookedModel({self.name}: {type(self.module).__name__}, {self.layers} layers, {self.heads} heads)"


def _touch(
    name: str, changes: list, keep: dict[str, Tensor] | None, shape: tuple[int, ...], *, clone: bool
) -> Callable[[Tensor], Tensor]:
    """What happens to the activation at a site: the changes in their order, then it is kept."""

    def touch(x: Tensor) -> Tensor:
        if x.ndim == 2:  # some modules are given (batch · pos, d_model)
            again = _touch(name, changes, keep, shape, clone=clone)  # not itself: a cycle would hold what is captured
            shaped = x.unflatten(0, shape)  # a view, which would follow what is written into x: its gradient was lost
            return again(shaped if clone else shaped.clone()).flatten(0, 1)
        for change in changes:
            new = change(x) if callable(change) else change.to(x.device, x.dtype)
            if new.shape != x.shape:
                if callable(change):
                    raise InputError(f"the edit of {name} returned {tuple(new.shape)}; expected {tuple(x.shape)}")
                new = _broadcast(new, x, name)
            x = new
        if keep is not None:
            keep[name] = x.clone() if clone else x
        return x if clone and not changes else x.clone()  # some blocks go on to add to it in place

    return touch


def _broadcast(value: Tensor, x: Tensor, name: str) -> Tensor:
    try:
        return value.expand_as(x)
    except RuntimeError:
        raise InputError(
            f"the new value of {name} has shape {tuple(value.shape)}; expected {tuple(x.shape)}, or what expands to it"
        ) from None


def _at_input(kind: str, d_head: int, touch: Callable[[Tensor], Tensor], changed: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        x = args[0] if args else kwargs["hidden_states"]
        shaped = x.unflatten(-1, (-1, d_head)) if kind == "z" else x
        new = touch(shaped)
        if not changed:
            return None
        if kind == "resid_mid":  # the block has its own reference to this tensor, which it will add to: same memory
            if new is not shaped:
                x.copy_(new)
            return None
        new = new.flatten(-2) if kind == "z" else new
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return hook


def results(block: Block, z: Float[Tensor, "*n head d_head"]) -> Float[Tensor, "*n head d_model"]:
    """What each head alone adds to the attention's output: the output projection of its z, without the bias."""
    alone = torch.diag_embed(z.movedim(-2, -1)).movedim(-3, -1)  # (*n, head, head, d_head): row h has only head h
    project = block.projection.forward  # without the hooks on it
    return project(alone.flatten(-2)) - project(torch.zeros_like(alone[..., :1, :, :].flatten(-2)))


def result_of(block: Block, z: Float[Tensor, "n d_head"], head: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
    """What one head alone adds to the attention's output; `head` says which."""
    alone = z.new_zeros(len(z), block.heads, block.d_head)
    alone[torch.arange(len(z), device=z.device), head.to(z.device)] = z
    project = block.projection.forward
    return project(alone.flatten(-2)) - project(torch.zeros_like(alone[:1]).flatten(-2))


def _at_results(block: Block, touch: Callable[[Tensor], Tensor], changed: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        old = results(block, args[0].unflatten(-1, (-1, block.d_head)))
        if not changed:
            touch(old)
            return None
        old = old.detach()  # upstream of here the output itself carries the graph
        new = touch(old.clone().requires_grad_(torch.is_grad_enabled()))
        return output + (new - old).sum(-2)

    return hook


def _at_output(touch: Callable[[Tensor], Tensor], changed: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        new = touch(first(output))
        if not changed:
            return None
        return type(output)([new, *output[1:]]) if isinstance(output, tuple | list) else new

    return hook


def _at_features(rows: Tensor | None, d_head: int, touch: Callable[[Tensor], Tensor], changed: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        at = None if rows is None else rows.to(output.device)
        x = output if at is None else output[..., at]
        new = touch(x.unflatten(-1, (-1, d_head)))
        if not changed:
            return None
        new = new.flatten(-2)
        if at is None:
            return new
        return output.index_copy(-1, at, new)

    return hook


_PATTERNS: dict[nn.Module, list[tuple[Callable[[Tensor], Tensor], bool]]] = {}
PATTERN = "finetune_lens_pattern"  # our name among transformers' attention implementations


class _PatternHook:
    """What is to happen to the attention pattern of a module, until removed."""

    def __init__(self, attention: nn.Module, touch: Callable[[Tensor], Tensor], changed: bool):
        self.owners = [m for m in attention.modules() if hasattr(m, "is_causal") or m is attention]
        for owner in self.owners:
            _PATTERNS.setdefault(owner, []).append((touch, changed))

    def remove(self) -> None:
        for owner in self.owners:
            _PATTERNS.pop(owner, None)


def _eager(module: nn.Module) -> Callable | None:
    """The architecture's own attention written out, which returns its pattern."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple:
    """The architecture's own attention, with the pattern (batch, head, query, key) shown to whoever asked."""
    out, pattern = _eager(module)(module, query, key, value, mask, **options)
    for touch, changed in _PATTERNS.get(module, ()):
        new = touch(pattern)
        if changed:
            pattern = new
            groups = pattern.shape[1] // value.shape[1]
            out = (pattern @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous()
    return out, pattern


@contextmanager
def patterns_visible(model: nn.Module) -> Iterator[None]:
    """Within: attention is computed by `_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(PATTERN, _attention)
    AttentionMaskInterface.register(PATTERN, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(PATTERN)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _embeddings_in_graph(model: nn.Module) -> Iterator[None]:
    """Within: token embeddings require a gradient, so that every activation after them is in the graph."""

    def require(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    hook = model.get_input_embeddings().register_forward_hook(require)
    try:
        yield
    finally:
        hook.remove()
