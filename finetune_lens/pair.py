"""A base model and its tuned version, aligned tensor by tensor, streamed one matrix at a time."""

import difflib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from finetune_lens.errors import InputError

if TYPE_CHECKING:
    import torch

    from finetune_lens.checkpoints import Checkpoint, Layout, LowRank, Part
    from finetune_lens.hooked import HookedModel

VOCABULARY_AXIS = {"embed": 1, "unembed": 0, "pos": 1}  # of the (out, in) matrix


@dataclass(frozen=True)
class Matrix:
    """One aligned weight, (out, in), both sides: `tuned` is dense, or None where the tuned side is base + `update`."""

    name: str
    layer: int | None
    component: str
    base: "torch.Tensor"
    tuned: "torch.Tensor | None"
    update: "LowRank | None" = None

    def problem(self) -> str:
        """What keeps this weight from being analysed: NaN or Inf on a side; "" when nothing does."""

        sides = {
            "base": [self.base],
            "tuned": [self.tuned] if self.update is None else [self.update.left, self.update.right],
        }
        bad = {side: sum(_nonfinite(t) for t in tensors) for side, tensors in sides.items()}
        return "; ".join(f"{side}: {count} NaN or Inf entries" for side, count in bad.items() if count)

    @functools.cached_property
    def base_digest(self) -> str:
        """SHA-256 of the base's bytes, as stored, in the (out, in) order."""
        return _digest(self.base)

    @functools.cached_property
    def tuned_digest(self) -> str:
        """The same of the tuned side, or of its factors."""
        if self.update is None:
            return _digest(self.tuned)
        return _digest(self.update.left, self.update.right, extra=repr(self.update.scale))

    @property
    def digests(self) -> tuple[str, str]:
        """Both."""
        return self.base_digest, self.tuned_digest

    @property
    def order(self) -> int:
        """The shorter dimension."""
        return min(self.base.shape, default=0)

    @property
    def unit_roundoff(self) -> float:
        """The largest relative error that rounding to the stored type made in an entry of Δ's two sides.

        A factored update is exact beside its base: it adds none.
        """
        import torch

        if self.tuned is None:
            return 0.0
        kinds = (self.base.dtype, self.tuned.dtype)
        return max(torch.finfo(t).eps / 2 if t.is_floating_point else 0.0 for t in kinds)

    def tuned_dense(self, dtype: "torch.dtype", device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """The tuned weight (out, in) in `dtype`; a factored update is multiplied out and added in that type."""
        if self.update is None:
            return self.tuned.to(device, dtype)
        return self.base.to(device, dtype) + self.update.dense(dtype, device)

    def delta(self, dtype: "torch.dtype", device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """Δ = tuned − base (out, in), subtracted in `dtype`, never in the stored type."""
        if self.update is not None:
            return self.update.dense(dtype, device)
        return self.tuned.to(device, dtype, copy=True).sub_(self.base.to(device))  # the base is cast as it is read


def _nonfinite(tensor: "torch.Tensor") -> int:
    """How many entries are NaN or Inf. A finite sum, which is quick to take, shows that there are none."""
    import torch

    if not tensor.is_floating_point():
        return 0
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if torch.isfinite(tensor.sum(dtype=wide)):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def _digest(*tensors: "torch.Tensor", extra: str = "") -> str:
    import torch

    state = hashlib.sha256(extra.encode())
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()


@dataclass(frozen=True)
class Variants:
    """One weight of a base and what it became in each of several checkpoints."""

    each: tuple[Matrix, ...]

    @property
    def name(self) -> str:
        return self.each[0].name

    @property
    def layer(self) -> int | None:
        return self.each[0].layer

    @property
    def component(self) -> str:
        return self.each[0].component

    @property
    def order(self) -> int:
        """The shorter dimension."""
        return self.each[0].order

    def problem(self) -> str:
        """What keeps this weight from being analysed: NaN or Inf in the base or in a checkpoint."""
        found = [matrix.problem() for matrix in self.each]
        return next((f"checkpoint {n}: {problem}" for n, problem in enumerate(found, 1) if problem), "")

    @property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of the base's bytes, then of each checkpoint's."""
        return self.each[0].base_digest, *(matrix.tuned_digest for matrix in self.each)


@dataclass
class Alignment:
    """Which tensors have a counterpart, and what became of those that have none. Nothing is dropped in silence."""

    matched: list[str] = field(default_factory=list)
    only_base: list[str] = field(default_factory=list)
    only_tuned: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # shared rows compared
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # not compared
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def differences(self) -> list[str]:
        """Tensors that one side lacks, or has in another shape."""
        return [*self.only_base, *self.only_tuned, *self.resized, *self.mismatched]

    def summary(self) -> str:
        """One line a finding."""
        lines = [f"{len(self.matched)} tensors compared"]
        for names, what in (
            (self.only_base, "only in the base"),
            (self.only_tuned, "only in the tuned model"),
            (self.ignored, "ignored: buffers, not parameters"),
        ):
            if names:
                lines.append(f"{len(names)} {what}: {_few(names)}")
        lines += [f"{n}: {a} against {b}, shared part compared" for n, (a, b) in self.resized.items()]
        lines += [f"{n}: {a} against {b}, not compared" for n, (a, b) in self.mismatched.items()]
        return "\n".join([*lines, *self.notes])


def _few(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (" …" if len(names) > n else "")


class ModelPair:
    """Base and tuned, aligned. `matrices()` streams the weights; no weight of a model is read before that.

    >>> pair = ModelPair.load("base-dir", "lora-adapter")      # doctest: +SKIP
    >>> print(pair.alignment.summary())                        # doctest: +SKIP
    """

    def __init__(
        self,
        base: "Checkpoint",
        tuned: "Checkpoint",
        parts: dict[str, tuple],
        alignment: Alignment,
        options: dict[str, Any],
        *,
        config: Any = None,
        tokenizer: Any = None,
    ):
        self.base_checkpoint = base
        self.tuned_checkpoint = tuned
        self.alignment = alignment
        self.options = options  # what `load` was given
        self.config, self.tokenizer = config, tokenizer
        self._parts: dict[str, tuple[Part, Part | Callable[[], LowRank]]] = parts
        self._models: dict[tuple, tuple[HookedModel, HookedModel]] = {}
        self.checked: dict[tuple, list[str]] = {}  # failures of the trust gate, by device and dtype

    @classmethod
    def load(
        cls,
        base: Any,
        tuned: Any,
        *,
        online: bool = False,
        fused: bool = False,
        orientation: str = "auto",
        config: Any = None,
        tokenizer: Any = None,
    ) -> "ModelPair":
        """Open two models and align them.

        Args:
            base, tuned: file, folder, cached hub id (`name` or `name@revision`), `torch.nn.Module` or state dict;
                `tuned` may be a PEFT adapter folder.
            online: ask the hub for what is not cached.
            fused: compare fused q/k/v and gate/up tensors in one piece instead of split.
            orientation: of GPT-2-style modules: "auto" (from the shapes), "conv1d" (in, out) or "linear" (out, in).
            config: to run weights that have no config.json beside them: that file, its folder, or a mapping.
            tokenizer: where none lies beside the weights: its folder, or the tokenizer.

        Raises:
            InputError: not a checkpoint, damaged, quantised in an unknown way, or not two versions of one model.

        Cost: the headers of the files, and the factors of an adapter.
        """
        from finetune_lens.checkpoints import lay_out, open_checkpoint
        from finetune_lens.checkpoints.adapters import merge_adapter

        one, other = open_checkpoint(base, online=online), open_checkpoint(tuned, online=online)
        if one.is_adapter or "merge" in one.origin:
            raise InputError(f"the base, {one.source}, is an adapter; give the model it was trained on as BASE")
        if "merge" in other.origin:
            other = merge_adapter(one, other)
        known = one.config or other.config
        layout = lay_out(one, config=known, fused=fused, orientation=orientation)
        if other.is_adapter:  # it may hold only tensors whose shape does not tell
            orientation = layout.orientation
        replaced = lay_out(other, config=known, fused=fused, orientation=orientation)
        alignment = Alignment(
            ignored=layout.ignored,
            notes=list(
                dict.fromkeys([*one.notes, *other.notes, *layout.notes, *([] if other.is_adapter else replaced.notes)])
            ),
        )
        if other.is_adapter:
            parts = _adapted(layout, replaced, other, alignment)
        else:
            parts = _matched(layout, replaced, one, other, alignment)
        alignment.matched = list(parts)
        empty = [name for name, (part, _) in parts.items() if 0 in part.shape]
        if empty:
            alignment.notes.append(f"{len(empty)} tensors hold no numbers and are left out: {_few(empty)}")
            parts = {name: sides for name, sides in parts.items() if name not in empty}
            alignment.matched = list(parts)
        deep = [name for name, (part, _) in parts.items() if len(part.shape) > 2]
        if deep:
            alignment.notes.append(f"{len(deep)} tensors of more than two dimensions are no matrices: {_few(deep)}")
        options = {"fused": fused, "orientation": orientation, "online": online}
        return cls(one, other, parts, alignment, options, config=config, tokenizer=tokenizer)

    def models(self, *, device: Any = "auto", dtype: str = "auto") -> "tuple[HookedModel, HookedModel]":
        """Base and tuned as models that run; built once for each device and dtype.

        An adapter shares the base's weights where switching it off gives the base exactly.

        Raises:
            InputError: weights without a config, or that do not fit it.

        Cost: both models in memory (of an adapter on a shared base: one).
        """
        from finetune_lens.hooked.loading import load_pair

        key = (repr(device), dtype)
        if key not in self._models:
            self._models[key] = load_pair(
                self.base_checkpoint, self.tuned_checkpoint, config=self.config, tokenizer=self.tokenizer,
                device=device, dtype=dtype,
            )  # fmt: skip
        return self._models[key]

    @property
    def base(self) -> "HookedModel":
        """The base as a model that runs."""
        return self.models()[0]

    @property
    def tuned(self) -> "HookedModel":
        """The tuned model, likewise."""
        return self.models()[1]

    def names(self, *, matrices: bool = True, embeddings: bool = True, vectors: bool = False) -> list[str]:
        """Names of the aligned weights, in the order of the base's file."""
        return [
            name
            for name, (part, _) in self._parts.items()
            if (part.is_matrix and matrices and (embeddings or part.component not in ("embed", "unembed", "pos")))
            or (not part.is_matrix and vectors)
        ]

    def matrices(self, names: list[str] | None = None) -> Iterator[Matrix]:
        """Stream aligned weights, one in memory at a time: by default every matrix (out, in).

        Memory: mapped pages of one tensor a side (a float8 or expert tensor is copied).
        """
        for name in self.names() if names is None else names:
            base, tuned = self._parts[name]
            if callable(tuned):
                yield Matrix(name, base.layer, base.component, base.read(), None, base.of_update(tuned()))
            else:
                yield Matrix(name, base.layer, base.component, base.read(), tuned.read())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parts[name][0].shape

    def describe(self) -> dict[str, Any]:
        """Where the two came from and how they were aligned, for the record."""
        sides = {"base": self.base_checkpoint, "tuned": self.tuned_checkpoint}
        return {side: {"source": c.source, **c.origin} for side, c in sides.items()} | {
            "options": self.options,
            "alignment": self.alignment.summary().splitlines(),
        }

    @property
    def fingerprint(self) -> str:
        """Changes when a file of either side changes, or how it is read; "" when a side has no file."""
        sides = self.base_checkpoint.fingerprint, self.tuned_checkpoint.fingerprint
        if not all(sides):
            return ""
        cuts = [
            (name, [None if callable(p) else (p.shape, p.transpose, p.expert, p.rows, p.columns) for p in parts])
            for name, parts in self._parts.items()
        ]
        return hashlib.sha256(repr((sides, cuts)).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"ModelPair({self.base_checkpoint.source} → {self.tuned_checkpoint.source})\n{self.alignment.summary()}"


class ModelSeries:
    """Several checkpoints of one base, in the order of training. `matrices()` streams the weights of all of them.

    >>> series = ModelSeries.load("base.pt", ["ft_step100.pt", "ft_step200.pt"])   # doctest: +SKIP
    >>> series.steps                                                               # doctest: +SKIP
    [100, 200]
    """

    def __init__(self, pairs: list[ModelPair], steps: list[int]):
        order = sorted(range(len(steps)), key=steps.__getitem__)
        self.pairs, self.steps = [pairs[i] for i in order], [steps[i] for i in order]
        first, *others = self.pairs
        self.alignment = replace(first.alignment, notes=list(first.alignment.notes))
        self._names = first.names(vectors=True)
        for step, pair in zip(self.steps[1:], others, strict=True):
            there = set(pair.names(vectors=True))
            missing = [name for name in self._names if name not in there]
            missing += sorted(there - set(self._names))
            reshaped = [n for n in self._names if n in there and pair.shape(n) != first.shape(n)]
            if missing or reshaped:
                raise InputError(
                    f"{pair.tuned_checkpoint.source} (step {step}) does not hold the same weights as "
                    f"{first.tuned_checkpoint.source}: {_few(missing or reshaped)}; expected checkpoints of one run"
                )

    @classmethod
    def load(
        cls,
        base: Any,
        tuned: Sequence[Any],
        *,
        steps: Sequence[int] | None = None,
        online: bool = False,
        fused: bool = False,
        orientation: str = "auto",
    ) -> "ModelSeries":
        """Open a base and several checkpoints tuned from it; arguments as for `ModelPair.load`.

        Args:
            steps: of the checkpoints; by default the last number in each name (`ft_step100.pt`, `checkpoint-200`), or
                1, 2, 3, … in the order given where the names do not hold different ones.

        Raises:
            InputError: as `ModelPair.load`; or checkpoints that do not hold the same weights.
        """
        if len(tuned) < 2 or (steps is not None and (len(steps) != len(tuned) or len(set(steps)) != len(steps))):
            raise InputError(f"expected two checkpoints or more, and a step of its own for each; found {len(tuned)}")
        options = {"online": online, "fused": fused, "orientation": orientation}
        pairs = [ModelPair.load(base, one, **options) for one in tuned]
        return cls(pairs, list(steps) if steps is not None else _steps(tuned))

    def names(self, *, matrices: bool = True, embeddings: bool = True, vectors: bool = False) -> list[str]:
        """As `ModelPair.names`."""
        return self.pairs[0].names(matrices=matrices, embeddings=embeddings, vectors=vectors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.pairs[0].shape(name)

    def matrices(self, names: list[str] | None = None) -> Iterator[Variants]:
        """Stream the weights, one in memory at a time, with all its variants (mapped, not read, where files allow)."""
        streams = [pair.matrices(self.names() if names is None else names) for pair in self.pairs]
        for each in zip(*streams, strict=True):
            yield Variants(tuple(replace(matrix, base=each[0].base) for matrix in each))

    def describe(self) -> dict[str, Any]:
        """Where they came from and how they were aligned, for the record."""
        described = [pair.describe() for pair in self.pairs]
        tuned = [d["tuned"] | {"step": step} for d, step in zip(described, self.steps, strict=True)]
        return described[0] | {"tuned": tuned}

    @property
    def fingerprint(self) -> str:
        """Changes when a file changes, or how it is read; "" when one of them has no file."""
        prints = [pair.fingerprint for pair in self.pairs]
        return hashlib.sha256(repr((prints, self.steps)).encode()).hexdigest() if all(prints) else ""

    def __repr__(self) -> str:
        sources = ", ".join(pair.tuned_checkpoint.source for pair in self.pairs)
        return f"ModelSeries({self.pairs[0].base_checkpoint.source} → {sources})"


def _steps(sources: Sequence[Any]) -> list[int]:
    """The last number in each source's name, or 1, 2, 3, …"""
    numbers = [re.findall(r"\d+", PurePath(s).name) if isinstance(s, str | PurePath) else [] for s in sources]
    found = [int(n[-1]) for n in numbers if n]
    return found if len(set(found)) == len(sources) else list(range(1, len(sources) + 1))


def _adapted(base: "Layout", replaced: "Layout", adapter: "Checkpoint", alignment: Alignment) -> dict[str, tuple]:
    """Every part of the base, with its update, its replacement, or (untouched) itself."""
    from finetune_lens.checkpoints.layout import canonical_module

    factors = {canonical_module(module): read for module, read in adapter.factors.items()}
    if len(factors) < len(adapter.factors):
        raise InputError(
            f"{adapter.source} has two updates of one module under names that differ in their prefix only: "
            f"{_few(sorted(adapter.factors))}; expected one a module"
        )
    parts = dict(base.parts)
    modules = {part.module for part in parts.values() if not part.name.endswith(".bias")}
    wanted = {*factors, *(p.module for p in replaced.parts.values())}
    if "lm_head" in wanted and "lm_head" not in modules:
        embedding = next((p for p in parts.values() if p.component == "embed"), None)
        if embedding is not None:  # tied: the file holds the matrix once, the adapter has unembedding's update
            parts["lm_head"] = replace(
                embedding, name="lm_head", module="lm_head", component="unembed", transpose=False
            )
            modules.add("lm_head")
            alignment.notes.append("lm_head is tied to the embedding in the base and has an update of its own")
    new = set(replaced.parts) - set(parts)
    alignment.only_tuned = sorted(n for n in new if replaced.parts[n].layer is None)  # a classification head, say
    strangers = sorted(set(factors) - modules) + sorted(new - set(alignment.only_tuned))
    if strangers:
        near = difflib.get_close_matches(strangers[0], modules, n=1, cutoff=0)
        raise InputError(
            f"{adapter.source} is an adapter of another base: it changes {strangers[0]} ({len(strangers)} such), "
            f"which the base does not have; nearest there: {near[0] if near else 'nothing'}"
        )
    result: dict[str, tuple] = {}
    for name, part in parts.items():
        other: Any = part
        if name in replaced.parts:
            other = replaced.parts[name]
            part, other = _fitted(part, other, alignment, adapter.source)
        elif part.module in factors and not name.endswith(".bias"):
            other = factors[part.module]
            _check_factor(part, other(), adapter.source)
        if other is not None:
            result[name] = (part, other)
    return result


def _check_factor(part: "Part", update: "LowRank", source: str) -> None:
    if update.shape != part.whole_shape:
        raise InputError(
            f"{source} is an adapter of another base: its update of {part.module} is {update.shape}, "
            f"the base's weight {part.whole_shape}"
        )


def _matched(
    base: "Layout", tuned: "Layout", one: "Checkpoint", other: "Checkpoint", alignment: Alignment
) -> dict[str, tuple]:
    """Parts under a common name whose shapes agree, or agree on the shared part of the vocabulary."""
    left, right = dict(base.parts), dict(tuned.parts)
    if not left.keys() & right.keys():
        pairs = [(n, difflib.get_close_matches(n, right, n=1, cutoff=0)) for n in list(left)[:2]]
        near = "; ".join(f"{n} is nearest to {found[0] if found else 'nothing'}" for n, found in pairs)
        raise InputError(
            f"{one.source} and {other.source} have no tensor in common: {near}; "
            "expected two versions of one architecture"
        )
    for mine, theirs, side in ((left, right, "base"), (right, left, "tuned model")):
        _untie(mine, theirs, side, (one if mine is left else other).config, alignment)
    common = [name for name in left if name in right]
    alignment.only_base = [n for n in left if n not in right]
    alignment.only_tuned = [n for n in right if n not in left]
    parts = {}
    for name in common:
        part, counterpart = _fitted(left[name], right[name], alignment, f"{one.source} and {other.source}")
        if counterpart is not None:
            parts[name] = (part, counterpart)
    if not parts:
        raise InputError(f"{one.source} and {other.source} share names but not one shape: {_few(common)}")
    return parts


def _untie(mine: dict, theirs: dict, side: str, config: dict | None, alignment: Alignment) -> None:
    """Give a model with tied embeddings its unembedding, where the other side has one of its own."""
    untied = next((p for p in theirs.values() if p.component == "unembed" and p.is_matrix), None)
    embedding = next((p for p in mine.values() if p.component == "embed"), None)
    has_one = any(p.component == "unembed" and p.is_matrix for p in mine.values())
    if untied is None or embedding is None or has_one or (config or {}).get("tie_word_embeddings") is False:
        return
    mine[untied.name] = replace(embedding, name=untied.name, module=untied.module, component="unembed", transpose=False)
    alignment.notes.append(f"{untied.name} is tied to the embedding in the {side} and stands alone in the other")


def _fitted(part: "Part", other: "Part", alignment: Alignment, where: str) -> "tuple[Part, Part | None]":
    """The two parts cut to what they share, or (part, None) for shapes outside the blocks that do not fit."""
    if part.shape == other.shape:
        return part, other
    axis = VOCABULARY_AXIS.get(part.component) if part.is_matrix and other.is_matrix else None
    if axis is not None and part.shape[1 - axis] == other.shape[1 - axis]:
        shared = tuple(min(a, b) for a, b in zip(part.shape, other.shape, strict=True))
        alignment.resized[part.name] = (part.shape, other.shape)
        return part.shrunk(shared), other.shrunk(shared)
    if part.layer is not None:
        raise InputError(
            f"{where} cannot be aligned: {part.name} is {part.shape} in the base and {other.shape} in the tuned model; "
            "expected two versions of one architecture"
        )
    alignment.mismatched[part.name] = (part.shape, other.shape)
    return part, None
