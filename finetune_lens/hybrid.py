"""A base model that carries part of the update: θ(γ) = θ0 + γ⊙Δ, held in place, undone bit for bit.

γ is a number (interpolation), a number a weight (layer and component swaps), a mask over entries (grafts), or any rule
that makes a weight from its two ends. γ = 0 is the base and γ = 1 the tuned model, bit for bit: ends are read, not
computed, and between them `torch.lerp` is exact at both. θ0 and θ1 stay in their files; one model is in memory.

A factored adapter (LoRA) stays factored as long as γ is a number: its scaling is turned, so that γ = 1 is the unmerged
adapter. Masks of its entries are put into the base's weights, as θ0 + BA.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> hybrid = Hybrid(ModelPair.load(folder / "base", folder / "full"))
>>> with hybrid.at(0.5) as model:                              # a HookedModel, halfway
...     halfway = model.module.lm_head.weight.clone()
>>> with hybrid.at(hybrid.gamma(layers=[2])) as model:         # the tuned model's last layer on the base's others
...     swapped = model.module.lm_head.weight.clone()
>>> bool((halfway == swapped).all())
False
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune_lens.checkpoints import Checkpoint, LowRank, Part, Stored, lay_out
from finetune_lens.checkpoints.layout import canonical_module
from finetune_lens.checkpoints.stored import unwrapped
from finetune_lens.errors import InputError
from finetune_lens.hooked.loading import load_writable, tokenizer_of
from finetune_lens.hooked.model import HookedModel
from finetune_lens.masks import Graft, Mask

if TYPE_CHECKING:
    from finetune_lens.pair import ModelPair

Rule = Callable[[Tensor, Tensor], Tensor]  # θ0, θ1 (out, in), in float32 or better → θ
Gamma = float | Mapping[str, "float | Tensor | Rule"] | Graft
_MODULES_TO_SAVE = re.compile(r"\.modules_to_save\.[^.]+\.")
# Of a config: what may differ between base and tuned model without changing what the blocks compute.
HARMLESS = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "finetuning_task",
    "id2label", "label2id", "model_max_length", "pad_token_id", "problem_type", "tie_word_embeddings", "torch_dtype",
    "torchscript", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache", "vocab_size",
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """One aligned weight: where its two ends are read, and where it lies in the live model."""

    name: str
    base: Part
    tuned: "Part | Callable[[], LowRank]"
    live: Part

    @property
    def layer(self) -> int | None:
        return self.base.layer

    @property
    def component(self) -> str:
        return self.base.component

    @property
    def factored(self) -> bool:
        return callable(self.tuned)

    @property
    def count(self) -> int:
        """Number of entries."""
        return torch.Size(self.base.shape).numel()

    def ends(self, dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
        """θ0 and θ1 (out, in)."""
        zero = self.base.read().to(device, dtype)
        if self.factored:
            return zero, zero + self.base.of_update(self.tuned()).dense(dtype, device)
        return zero, self.tuned.read().to(device, dtype)


class Hybrid:
    """One model in memory whose weights are θ(γ). It starts as the base, and is the base again after every `with`.

    Args:
        pair: base and tuned, aligned; the base has to run (a config beside its weights).
        device, dtype: as of `ModelPair.models`.

    Raises:
        InputError: weights that do not run, or none that base, tuned and running model have in common.

    Memory: one model. Time of a change of γ: that of reading both files' weights where γ changes, and writing them.

    Attributes:
        model: the live model, at the γ that is held.
        notes: what keeps γ = 1 from being all of the tuned model.
    """

    def __init__(self, pair: "ModelPair", *, device: Any = "auto", dtype: str = "auto"):
        self.pair = pair
        options = {"config": pair.config, "tokenizer": pair.tokenizer, "device": device, "dtype": dtype}
        self.model: HookedModel = load_writable(pair.base_checkpoint, pair.tuned_checkpoint, **options)
        self.notes: list[str] = []
        _untie(self.model.module, pair.names())
        self.parameters: dict[str, nn.Parameter] = _parameters(self.model.module)
        self._adapters = _adapters(self.model._outer) if pair.tuned_checkpoint.is_adapter else {}
        self.weights: dict[str, Weight] = self._align()
        self._modules: dict[str, list[Weight]] = {}  # adapted modules: their weights (several where q, k, v are fused)
        for weight in self.weights.values():
            if weight.factored and weight.base.module in self._adapters:
                self._modules.setdefault(weight.base.module, []).append(weight)
        for module in set(self._adapters) - set(
            self._modules
        ):  # an embedding that was saved as a whole beside its factors
            layer, adapter, _ = self._adapters[module]
            layer.scaling[adapter] = 0.0
        self._held: dict[str, Any] = {}  # dense γ of the weights that are not the base's
        self._scale: dict[str, float] = dict.fromkeys(self._modules, 1.0)
        if self._adapters:  # what the adapter brought along is there already: biases, whole modules
            self._held = {n: _UNKNOWN for n, w in self.weights.items() if not w.factored}
        self.hold(0.0)

    def _align(self) -> dict[str, Weight]:
        pair, module = self.pair, self.model.module
        tensors = {name: Stored.of(p.detach()) for name, p in self.parameters.items()}
        config = module.config.to_dict()
        live = lay_out(Checkpoint("the running model", tensors, config), fused=pair.options["fused"]).parts
        weights, lost = {}, []
        for name, (base, tuned) in pair._parts.items():
            part = live.get(name)
            if part is not None and part.shape != base.shape and name in pair.alignment.resized:
                part = part.shrunk(base.shape)
            if part is None or part.shape != base.shape:
                lost.append(name)
                continue
            weights[name] = Weight(name, base, tuned, part)
        if not weights:
            raise InputError(
                f"{self.model.name}: the running model has none of the weights that are compared, such as "
                f"{next(iter(pair._parts), 'none')}"
            )
        found = pair.alignment
        for names, what in (
            (lost, "weights have no place of their own in the running model"),
            (found.only_tuned, "tensors are the tuned model's alone"),
            (list(found.resized), "weights are carried over on the rows that both models have"),
            (list(found.mismatched), "tensors differ in shape"),
        ):
            if names:
                few = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
                self.notes.append(f"γ = 1 is not all of the tuned model: {len(names)} {what}: {few}")
        one, other = (c.config or {} for c in (pair.base_checkpoint, pair.tuned_checkpoint))
        if one and other:
            differ = sorted(
                k for k in {*one, *other} - HARMLESS if one.get(k) != other.get(k) and k in one and k in other
            )
            if differ:
                shown = ", ".join(f"{k}: {one[k]!r} against {other[k]!r}" for k in differ[:3])
                self.notes.append(f"the configs differ, and hybrids run with the base's: {shown}")
        return weights

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """The base's, and the tuned model's where it has another."""
        own = tokenizer_of(self.pair.tuned_checkpoint, self.pair.tokenizer)
        return self.model.require_tokenizer(), own

    def names(
        self,
        *,
        layers: Sequence[int | None] | None = None,
        components: Sequence[str] | None = None,
        outside: bool = True,
    ) -> list[str]:
        """Names of the weights, in the base's order: of some layers, of some components, `outside` the blocks or not.

        Raises:
            InputError: a layer or component that no weight has.
        """
        for given, known, what in (
            (layers, {w.layer for w in self.weights.values()}, "layer"),
            (components, {w.component for w in self.weights.values()}, "component"),
        ):
            strange = [x for x in given or () if x not in known]
            if strange:
                there = ", ".join(sorted(map(str, known)))
                raise InputError(f"no weight is of {what} {strange[0]!r}; there are {there}")
        return [
            name
            for name, w in self.weights.items()
            if (layers is None or w.layer in layers)
            and (components is None or w.component in components)
            and (outside or w.layer is not None)
        ]

    def gamma(self, value: float = 1.0, *, rest: float = 0.0, **which: Any) -> dict[str, float]:
        """γ = `value` on the weights that `names(**which)` gives, `rest` on the others."""
        return dict.fromkeys(self.weights, rest) | dict.fromkeys(self.names(**which), value)

    def hold(self, gamma: Gamma) -> HookedModel:
        """Make the weights θ(γ), and leave them so.

        Args:
            gamma: a number; or by weight (0 where a weight is not named) a number, a tensor (out, in) of Booleans (θ1
                where it is true) or of numbers, or a rule of θ0 and θ1; or a `Graft`.

        Raises:
            InputError: a weight that is not there, a mask of another shape, a graft of another base.
        """
        wanted = self._wanted(gamma)
        for module, weights in self._modules.items():
            values = {wanted.get(w.name, 0.0) if _is_number(wanted.get(w.name, 0.0)) else None for w in weights}
            scale = values.pop() if len(values) == 1 and None not in values else 0.0
            if scale:  # the adapter carries it, and the weights beneath are the base's
                wanted = wanted | {w.name: 0.0 for w in weights}
            if scale != self._scale[module]:
                layer, adapter, full = self._adapters[module]
                layer.scaling[adapter] = full * scale
                self._scale[module] = scale
        with torch.no_grad():
            for name in list(self.weights):
                new, old = wanted.get(name, 0.0), self._held.get(name, 0.0)
                if _is_number(new) and _is_number(old) and new == old:
                    continue
                self._held[name] = _UNKNOWN  # until it is written: an interruption leaves it to the next `hold`
                self._write(self.weights[name], new)
                self._held[name] = new if _is_number(new) else _UNKNOWN
                if _is_number(new) and new == 0:
                    del self._held[name]
        return self.model

    def _wanted(self, gamma: Gamma) -> dict[str, Any]:
        if _is_number(gamma):
            return dict.fromkeys(self.weights, float(gamma))
        if isinstance(gamma, Graft):
            return self._of_graft(gamma)
        strange = [name for name in gamma if name not in self.weights]
        if strange:
            raise InputError(f"γ names {strange[0]} ({len(strange)} such), and the pair has no such weight")
        for name, value in gamma.items():
            if isinstance(value, Tensor) and value.shape != self.weights[name].base.shape:
                raise InputError(
                    f"γ of {name} has shape {tuple(value.shape)}; expected {self.weights[name].base.shape}, (out, in)"
                )
        return dict(gamma)

    def _of_graft(self, graft: Graft) -> dict[str, Any]:
        """Rules that put the graft's values into the base."""
        rules: dict[str, Any] = {}
        for name, at in graft.positions.items():
            weight = self.weights.get(name)
            if weight is None or weight.base.shape != graft.shapes[name]:
                found = "it has no such weight" if weight is None else f"there it is {weight.base.shape}"
                raise InputError(f"the graft is of another model: {name} is {graft.shapes[name]}, and here {found}")
            known = graft.digests.get(name)
            if known and known != self.base_digest(name):
                raise InputError(
                    f"the graft was made for another base: {name} has other values there than in "
                    f"{self.pair.base_checkpoint.source}"
                )
            rules[name] = _placing(at, graft.values[name])
        return rules

    def base_digest(self, name: str) -> str:
        """SHA-256 of a weight of the base."""
        return next(self.pair.matrices([name])).base_digest

    def _write(self, weight: Weight, gamma: Any) -> None:
        live = weight.live
        kind, device = live.stored.dtype, self.device_of(weight)
        if _is_number(gamma) and gamma == 0:
            live.write(weight.base.read())
        elif _is_number(gamma) and gamma == 1 and not weight.factored:
            live.write(weight.tuned.read())
        else:
            zero, one = weight.ends(torch.promote_types(kind, torch.float32), device)
            live.write(_between(zero, one, gamma))

    def parameter_of(self, weight: Weight) -> nn.Parameter:
        """The parameter of the running model that the weight is, or is a part of."""
        place = weight.live.stored.read().data_ptr()
        return next(p for p in self.parameters.values() if p.data_ptr() == place)

    def device_of(self, weight: Weight) -> torch.device:
        return weight.live.stored.read().device

    @contextmanager
    def at(self, gamma: Gamma) -> Iterator[HookedModel]:
        """Within: the model at θ(γ). After, whatever happened, the base."""
        with self:
            yield self.hold(gamma)

    def __enter__(self) -> "Hybrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.hold(0.0)

    @contextmanager
    def perturbed(self, names: Sequence[str], rho: float, generator: torch.Generator) -> Iterator[HookedModel]:
        """Within: the weights that are held, of these names θ·(1 + ρε) with ε ~ N(0, 1), a draw an entry, in the order
        of `names`. After, whatever happened, what was held, bit for bit.

        Of a factored adapter θ is the sum, and its noise lies on the weight beneath.

        Memory: a copy of the named weights.

        Raises:
            InputError: a weight that is not there.
        """
        self._wanted(dict.fromkeys(names, 1.0))
        held = {name: self._held.get(name, 0.0) for name in names}
        kept = {name: self.weights[name].live.read().clone() for name in names}
        try:
            with torch.no_grad():
                for name in names:
                    self._held[name] = _UNKNOWN  # an interruption leaves it to the next `hold`
                    live = self.weights[name].live
                    value = kept[name].to(torch.promote_types(kept[name].dtype, torch.float32))
                    noise = torch.randn(value.shape, generator=generator).to(value)
                    live.write(value + rho * noise * (value + self._carried(self.weights[name], value)))
            yield self.model
        finally:
            with torch.no_grad():
                for name in names:
                    self.weights[name].live.write(kept[name])
                    self._held[name] = held[name]

    def _carried(self, weight: Weight, like: Tensor) -> "Tensor | float":
        """What the running adapter adds to a weight."""
        scale = self._scale.get(weight.base.module, 0.0) if weight.factored else 0.0
        return scale * weight.base.of_update(weight.tuned()).dense(like.dtype, like.device) if scale else 0.0

    def graft(self, mask: Mask, **facts: Any) -> Graft:
        """The tuned values at the entries of a mask, to be kept or put into the base without the tuned model.

        Raises:
            InputError: a weight that is not there.
        """
        positions, values, shapes, digests = {}, {}, {}, {}
        for name in self._wanted(dict(mask)):
            at = mask[name].reshape(-1).nonzero().squeeze(1).cpu()
            if not len(at):
                continue
            weight = self.weights[name]
            one = weight.ends(torch.float32, "cpu")[1] if weight.factored else weight.tuned.read()
            positions[name], values[name] = at, one.reshape(-1)[at]
            shapes[name], digests[name] = weight.base.shape, self.base_digest(name)
        return Graft(positions, values, shapes, digests, facts)

    def gradient(self, name: str) -> Tensor | None:
        """The gradient of a weight (out, in), after a backward pass; None where nothing reached it."""
        weight = self.weights[name]
        gradient = self.parameter_of(weight).grad
        return None if gradient is None else replace(weight.live, stored=Stored.of(gradient)).read()

    def save(self, folder: str | Path) -> Path:
        """Write the model at the γ that is held as an ordinary Hugging Face folder (an adapter is merged), with its
        tokenizer."""
        from finetune_lens.checkpoints.adapters import merged_copy

        folder = Path(folder)
        outer = self.model._outer
        module = merged_copy(outer) if hasattr(outer, "peft_config") else self.model.module
        module.save_pretrained(folder)
        if self.model.tokenizer is not None:
            self.model.tokenizer.save_pretrained(folder)
        return folder

    def __repr__(self) -> str:
        return f"Hybrid({self.model.name}, {len(self.weights)} weights)"


class _Unknown:
    """γ of a weight that has to be written anew whatever comes next."""


_UNKNOWN = _Unknown()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _between(zero: Tensor, one: Tensor, gamma: Any) -> Tensor:
    """θ(γ) of one weight."""
    if isinstance(gamma, Tensor):
        gamma = gamma.to(zero.device)
        return torch.where(gamma, one, zero) if gamma.dtype == torch.bool else torch.lerp(zero, one, gamma.to(zero))
    return torch.lerp(zero, one, float(gamma)) if _is_number(gamma) else gamma(zero, one)


def _placing(at: Tensor, values: Tensor) -> Rule:
    def rule(zero: Tensor, _: Tensor) -> Tensor:
        placed = zero.clone(memory_format=torch.contiguous_format)
        placed.view(-1)[at.to(zero.device)] = values.to(zero)
        return placed

    return rule


def _untie(module: nn.Module, names: list[str]) -> None:
    """Give the unembedding a tensor of its own where base or tuned model has one of its own."""
    embedding, unembedding = module.get_input_embeddings(), module.get_output_embeddings()
    inner = [getattr(m, "base_layer", m) for m in (embedding, unembedding)]
    tied = getattr(inner[0], "weight", None) is getattr(inner[1], "weight", ())
    if tied and "lm_head" in names:
        inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
        module.config.tie_word_embeddings = False


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters and buffers that are weights, by the names a checkpoint would give them; each once."""
    found: dict[str, Any] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if ".lora_" in name or ".original_module." in name:
            continue
        name = unwrapped(_MODULES_TO_SAVE.sub(".", name))
        if not any(tensor is other for other in found.values()):
            found[name] = tensor
    return found


def _adapters(peft: nn.Module) -> dict[str, tuple[nn.Module, str, float]]:
    """Canonical module name → PEFT's layer, the adapter's name, its scaling."""
    found = {}
    for path, module in peft.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and len(scaling) == 1:
            ((adapter, full),) = scaling.items()
            found[canonical_module(unwrapped(path))] = (module, adapter, full)
    return found
