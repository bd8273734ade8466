"""Which heads give the answer, and which heads give to those? Path patching, and circuits found by it, group by group.

The effect of the path from a head to some receivers (the logits; q, k or v of other heads, at one position) is

    m(clean run, the receivers reading what they read when the sender's z comes from the corrupt run) − m(clean run)

with everything in the freeze set held at its clean value meanwhile (`finetune_lens.hooked.paths`). Published variants
differ in what is frozen and in the score; they are presets, named after their source. `find_circuit` repeats this from
the logits back, each group's receivers being the heads found before (Prakash et al. 2024, arXiv 2402.14811, §3.2).

Cost: every head of a model to one group at the last position, about 1/100 of two forward passes a head
(benchmarks/circuits.py). `method="full"` is those two passes, and the oracle.

>>> from finetune_lens import zoo
>>> prompts = zoo.path("boxes") / "prompts.jsonl"
>>> found = trace_paths(zoo.path("boxes") / "base", prompts, limit=16, progress=False)
>>> found.data.sizes["layer"], found.data.sizes["head"]
(3, 3)
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.circuits.circuit import Circuit, Group, Head, head_name
from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from finetune_lens.hooked import HookedModel
    from finetune_lens.hooked.grid import Aligned
    from finetune_lens.hooked.sweep import Swept
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.paths import Paths

CLEAR = 0.05  # false discovery rate at which a head's effect is clear of 0


@dataclass(frozen=True)
class Preset:
    """A published variant: what is frozen, the score, and where it is from."""

    freeze: tuple[str, ...]
    metric: str
    source: str


PRESETS = {
    "prakash2024": Preset(("z",), "relative_prob", "Prakash et al. 2024, arXiv 2402.14811, §3.2"),
    "wang2022": Preset(("q", "k", "v"), "logit_diff", "Wang et al. 2022, arXiv 2211.00593, §3.1"),
    "goldowsky-dill2023": Preset(("z", "mlp_out"), "logit_diff", "Goldowsky-Dill et al. 2023, arXiv 2304.05969, §3"),
}
STEP = re.compile(r"(?P<name>[\w-]+)=(?P<kind>\w+)(?::(?P<of>[\w-]+))?(?:@(?P<position>.+))?")
RECEIVERS = re.compile(r"(?P<kind>[qkv]):(?P<heads>\d+\.\d+(?:,\d+\.\d+)*)")


@dataclass(frozen=True)
class Step:
    """One group of a procedure: the heads with a path to `receivers` ("logits", or q, k, v of the group `of`)."""

    name: str
    receivers: str
    of: str = ""
    position: int | str = -1

    @classmethod
    def read(cls, text: str) -> "Step":
        """`NAME=logits`, `NAME=v:GROUP@label:last`.

        Raises:
            InputError: not such a step.
        """
        found = STEP.fullmatch(text.strip())
        if found is None or (found["kind"] == "logits") == bool(found["of"]) or found["kind"] not in "logits q k v":
            raise InputError(
                f"{text!r} is no step; expected NAME=logits, or NAME=q:GROUP@POSITION (or k:, v:) with a group found "
                "before and a position such as -1 or label:first"
            )
        position = found["position"] or "-1"
        return cls(found["name"], found["kind"], found["of"] or "", _position(position))


PROCEDURES = {
    "entity-tracking": (  # arXiv 2402.14811, §3.2: at the end, at the label that is asked for, and where it was told
        Step("value_fetcher", "logits"),
        Step("position_transmitter", "q", "value_fetcher"),
        Step("position_detector", "v", "position_transmitter", "label:last"),
        Step("structure_reader", "v", "position_detector", "label:first"),
    ),
    "ioi": (  # arXiv 2211.00593, §3: at the end, at the second mention of the subject
        Step("name_mover", "logits"),
        Step("s_inhibition", "q", "name_mover"),
        Step("induction", "v", "s_inhibition", "subject:last"),
    ),
}


@recorded
def trace_paths(
    models: "ModelPair | HookedModel | Any",
    prompts: Any,
    *,
    receivers: "str | tuple[str, Sequence[Head]]" = "logits",
    position: int | str = -1,
    sender_position: int | str | None = None,
    preset: str = "prakash2024",
    freeze: Sequence[str] | None = None,
    metric: str | None = None,
    method: str = "exact",
    align: str = "error",
    template: str = "none",
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    config: Any = None,
    tokenizer: Any = None,
    check: bool = True,
    progress: bool = True,
    partial: Path | None = None,
) -> "Paths":
    """The effect of the path from every head to some receivers; in both models of a pair, on the same prompts.

    Args:
        models: a pair, or one model (hooked, Hugging Face's, or where one lies).
        prompts: a JSONL file, or a list of mappings with prompt, answer, corrupt (of the same length).
        receivers: "logits", or q, k or v of heads: "q:2.0,2.1" or ("q", [(2, 0), (2, 1)]). Of grouped-query models
            k and v are shared, and a head stands for its group.
        position: where the receivers read, and senders are patched: counted from the start or (negative) the end, a
            mention of a field of the prompts (`label:first`), or "all". The logits are read at the end.
        sender_position: where senders are patched instead. Of frozen heads a change elsewhere reaches nothing.
        preset: prakash2024, wang2022 or goldowsky-dill2023; `freeze` and `metric` take its place where given.
        freeze: sites held at their clean values: z, q, k, v, pattern, mlp_out.
        metric: what tables and figures show: relative_prob, or one of the metrics of `patch`.
        method: "exact", or "full" (two forward passes a head; the oracle).
        align: "left" or "right": which positions correspond where prompts differ in length.
        template: "none"; "each" puts the prompts through the chat template (of either side). Then numbers from 0 on and
            mentions are positions of the prompt's own text, and negative ones count from where the answer begins.
        check: refuse a pair that fails the trust gate.

    Raises:
        InputError: receivers that the model lacks, a position that a prompt lacks, prompts without counterfactual.
        GateFailed: the trust gate found the pair unsafe to compare.
    """
    kind, heads = _receivers(receivers)
    running = _Running(
        models, prompts, preset, freeze, metric, method, align, template, batch_size, limit, device, dtype, config,
        tokenizer, check, progress, partial,
    )  # fmt: skip
    name = kind if kind == "logits" else f"{kind} of {', '.join(map(head_name, heads))}"
    swept = {model.name: running.sweep(model, kind, heads, position, name, sender_position) for model in running.models}
    group = {"to": "the logits" if kind == "logits" else name, "position": str(position)}
    group |= {} if sender_position is None else {"sender_position": str(sender_position)}
    return running.result({name: [*swept.values()]}, {name: group})


@recorded
def find_circuit(
    model: "HookedModel | Any",
    prompts: Any,
    *,
    procedure: "str | Sequence[Step | str]" = "entity-tracking",
    heads: int | Mapping[str, int] | None = None,
    preset: str = "prakash2024",
    freeze: Sequence[str] | None = None,
    metric: str | None = None,
    method: str = "exact",
    attribution: bool = True,
    align: str = "error",
    template: str = "none",
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    config: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
    partial: Path | None = None,
) -> "Paths":
    """Find a circuit group by group, from the logits back; `circuit_of(result)` is what was found.

    Args:
        procedure: "entity-tracking", "ioi", or steps: `Step`, or text such as "reader=v:mover@label:last".
        heads: how many heads a group has: those whose path lowers the metric most, as published; a number, or one for
            each group. By default all whose path lowers it clear of 0 (Benjamini–Hochberg, 5 % over the heads).
        attribution: also estimate the paths by edge attribution (`attribute_edges`), and say how well that agrees.

    The other arguments are those of `trace_paths`. A head that two groups at one position would have stays in the
    later one, as published. A group that nothing leads to has no heads, what leads to it is not looked for, and the
    result says so.

    Raises:
        InputError: as `trace_paths`; a step whose receivers are not found before it.
    """
    steps = _steps(procedure)
    running = _Running(
        model, prompts, preset, freeze, metric, method, align, template, batch_size, limit, device, dtype, config,
        tokenizer, False, progress, partial,
    )  # fmt: skip
    (model,) = running.models
    _require_heads(heads, steps, model)
    for step in steps:
        running.columns(step.position)  # all of them exist, before anything is run
    found: dict[str, Group] = {}
    measured: dict[str, list[Swept]] = {}
    told: dict[str, dict[str, Any]] = {}
    for step in steps:
        if step.of and step.of not in found:
            running.notes.append(f"{step.name} was not looked for: {step.of} has no heads")
            continue
        of = found[step.of].heads if step.of else ()
        swept = running.sweep(model, step.receivers, of, step.position, step.name)
        measured[step.name] = [swept]
        to = "the logits" if step.receivers == "logits" else f"{step.receivers} of {step.of}"
        told[step.name] = {"to": to, "position": str(step.position)}
        wanted = heads.get(step.name) if isinstance(heads, Mapping) else heads
        chosen = _lowering(running.result({step.name: [swept]}, {step.name: told[step.name]}), wanted)
        if chosen is None:
            running.notes.append(f"{step.name} has no heads: no path to {to} at {step.position} lowers the metric")
            continue
        found[step.name] = Group(step.position, *chosen)
    circuit = _apart(found)
    result = running.result(measured, told)
    if attribution:
        heads_of = {step.name: found[step.of].heads if step.of else () for step in steps if step.name in measured}
        _estimated(result, model, running, [step for step in steps if step.name in measured], heads_of)
    facts = model.describe() | {"layers": model.layers, "heads": model.heads}
    task = {"prompts": running.described(), "metric": running.metric, "preset": preset, "freeze": [*running.freeze]}
    task["template"] = template
    task["steps"] = {step.name: told[step.name] for step in steps if step.name in told}
    if circuit:
        result.data.attrs["circuit"] = json.dumps({"groups": circuit, "model": facts, "task": task})
    return result


def circuit_of(result: "Paths") -> Circuit:
    """The circuit that `find_circuit` found.

    Raises:
        InputError: none was.
    """
    record = result.circuit
    if record is None:
        raise InputError("no circuit was found: " + "; ".join(result.provenance.get("notes", ["none was looked for"])))
    groups = {
        name: Group(group["position"], tuple(map(tuple, group["heads"])), tuple(group["scores"]))
        for name, group in record["groups"].items()
    }
    return Circuit(groups, record["model"], record["task"])


class _Running:
    """Models on prompts and their counterfactuals, and how paths are measured on them."""

    def __init__(
        self, models: Any, prompts: Any, preset: str, freeze: Sequence[str] | None, metric: str | None, method: str,
        align: str, template: str, batch_size: int | None, limit: int | None, device: str, dtype: str, config: Any,
        tokenizer: Any, check: bool, progress: bool, partial: Path | None,
    ):  # fmt: skip
        from finetune_lens.hooked.grid import aligned
        from finetune_lens.hooked.loading import as_model
        from finetune_lens.hooked.paths import FREEZABLE
        from finetune_lens.metrics import METRICS
        from finetune_lens.pair import ModelPair
        from finetune_lens.prompts import read_prompts, require_template

        if preset not in PRESETS:
            raise InputError(f"preset {preset!r} is unknown; expected one of {', '.join(PRESETS)}")
        if method not in ("exact", "full"):
            raise InputError(f"method is exact or full; found {method!r}")
        self.preset, self.method, self.notes = preset, method, []
        self.freeze = PRESETS[preset].freeze if freeze is None else tuple(freeze)
        self.metric = metric or PRESETS[preset].metric
        if unknown := [site for site in self.freeze if site not in FREEZABLE]:
            raise InputError(f"{unknown[0]!r} cannot be frozen; expected some of {', '.join(FREEZABLE)}")
        if self.metric not in ("relative_prob", *METRICS):
            raise InputError(
                f"metric {self.metric!r} is unknown; expected relative_prob or one of {', '.join(METRICS)}"
            )
        self.template, self.batch_size, self.progress, self.partial = template, batch_size, progress, partial
        self.align = align
        framed = require_template(template)
        self.items = read_prompts(prompts, limit=limit)
        self.pair = isinstance(models, ModelPair)
        if self.pair:
            self.models = models.models(device=device, dtype=dtype)
        else:
            self.models = (as_model(models, device=device, dtype=dtype, config=config, tokenizer=tokenizer),)
        reading = {"corrupted": True, "align": align, "template": framed, "need_answer": self.metric != "kl"}
        self.where: Aligned = aligned(self.items, self.models[0].require_tokenizer(), **reading)
        if self.metric == "logit_diff" and not all(p.wrong for p in self.items):
            raise InputError(
                'the logit difference needs a wrong answer, and some prompts have none; add "wrong" to them, or pass '
                "metric='relative_prob' (--metric relative_prob)"
            )
        if self.pair:
            self._require_alike(models, reading, check, device, dtype)

    def _require_alike(
        self, pair: "ModelPair", reading: Mapping[str, Any], check: bool, device: str, dtype: str
    ) -> None:
        """Raise where base and tuned model cannot be compared head by head."""
        from finetune_lens.check import require_safe
        from finetune_lens.hooked.grid import aligned, require_same_tokens

        base, tuned = self.models
        if (base.layers, base.heads) != (tuned.layers, tuned.heads):
            raise InputError(
                f"{base.name} has {base.layers} layers of {base.heads} heads, {tuned.name} {tuned.layers} of "
                f"{tuned.heads}; expected models of one shape"
            )
        theirs = aligned(self.items, tuned.require_tokenizer(), **reading)
        require_same_tokens(self.where, theirs, self.items)
        if check:
            require_safe(pair, device=device, dtype=dtype)

    def columns(self, position: int | str) -> list[np.ndarray]:
        """The column of the position in each example.

        Raises:
            InputError: a prompt does not have it.
        """
        if position == "all":
            both = self.where.clean.prompt_columns & self.where.corrupt.prompt_columns
            return [np.flatnonzero(row) for row in both.numpy()]
        return [np.array([column]) for column in self.where.each(position)]

    def sweep(
        self, model: "HookedModel", kind: str, heads: Sequence[Head], position: int | str, name: str,
        sender_position: int | str | None = None,
    ) -> "Swept":  # fmt: skip
        from finetune_lens.hooked.paths import Receivers, sweep_paths
        from finetune_lens.hooked.sweep import Side

        senders = [(layer, head) for layer in range(model.layers) for head in range(model.heads)]
        clean, corrupt = Side(model, self.where.clean), Side(model, self.where.corrupt)
        sent = None if sender_position is None else self.columns(sender_position)
        receivers = Receivers(kind, tuple(heads), self.columns(position), sent)
        arguments = {"analysis": f"paths-{model.name.replace('/', '-')}-{name}", "side": model.describe()}
        return sweep_paths(
            clean, corrupt, senders, receivers, freeze=self.freeze,
            batch_size=self.batch_size, full=self.method == "full", progress=self.progress, label=name,
            partial=self.partial if model.fingerprint else None,
            arguments=arguments | {"adapted": model.adapted},
        )  # fmt: skip

    def described(self) -> dict[str, Any]:
        from finetune_lens.hooked.effects import describe_prompts

        return describe_prompts(self.items)

    def result(self, swept: Mapping[str, Sequence["Swept"]], groups: Mapping[str, Mapping[str, Any]]) -> "Paths":
        """What was swept, by group a model each, labelled."""
        import xarray as xr

        from finetune_lens.results.paths import Paths

        layers, heads, first = self.models[0].layers, self.models[0].heads, next(iter(swept.values()))
        names = ["base", "tuned"] if self.pair else ["model"]
        data: dict[str, Any] = {}
        for metric in first[0].effects:
            values = np.array([[one.effects[metric] for one in each] for each in swept.values()])
            shaped = values.reshape(len(swept), len(names), layers, heads, -1).swapaxes(0, 1)
            data[metric] = (("model", "group", "layer", "head", "example"), shaped)
            for side in ("recipient", "donor"):
                ends = np.array([getattr(one, side)[metric] for one in first])
                data[f"{side}_{metric}"] = (("model", "example"), ends)
        coords = {
            "model": np.array(names, dtype=object), "group": np.array([*swept], dtype=object),
            "layer": np.arange(layers), "head": np.arange(heads),
            "example": np.array([p.id for p in self.items], dtype=object),
        }  # fmt: skip
        notes = [f"{name}: {note}" for name, each in swept.items() for one in each for note in one.notes] + self.notes
        record = {
            "models": [model.describe() for model in self.models], "prompts": self.described(), "notes": notes,
            "source": PRESETS[self.preset].source,
            "largest_deviation_of_an_unpatched_row": max(one.deviation for each in swept.values() for one in each),
        }  # fmt: skip
        attributes = {
            "metric": self.metric, "freeze": ", ".join(self.freeze), "groups": json.dumps(groups), "circuit": "",
            "provenance": json.dumps(record),
        }  # fmt: skip
        return Paths(xr.Dataset(data, coords=coords, attrs=attributes))


def _estimated(
    result: "Paths",
    model: "HookedModel",
    running: _Running,
    steps: Sequence[Step],
    heads: Mapping[str, tuple[Head, ...]],
) -> None:
    """Put the estimate of every path by edge attribution beside its effect, and how well the two agree."""
    from finetune_lens.circuits.edges import attribute_edges

    metric = "logit_diff" if all(p.wrong for p in running.items) else "logprob"
    shape = tuple(result.data.sizes[dim] for dim in ("model", "group", "layer", "head"))
    estimates, rows, edges = np.full(shape, np.nan), [], {}
    for number, step in enumerate(steps):
        at = -1 if step.receivers == "logits" else step.position
        if at not in edges:
            edges[at] = attribute_edges(
                model, running.items, metric=metric, position=at, align=running.align, template=running.template,
                batch_size=running.batch_size, progress=running.progress,
            )  # fmt: skip
        readers = ["logits"] if step.receivers == "logits" else _readers(model, step.receivers, heads[step.name])
        exact = result.to_frame(metric)
        exact = exact[exact["group"] == step.name]
        scores = edges[at].heads(readers)
        if not len(scores):  # no head comes before the receivers
            continue
        for row in scores.to_dict("records"):
            estimates[0, number, row["layer"], row["head"]] = row["score"]
        rows.append({"group": step.name} | edges[at].agreement(exact, readers).to_dict("records")[0])
    result.data[f"attribution_{metric}"] = (("model", "group", "layer", "head"), estimates)
    result.data.attrs["agreement"] = json.dumps(rows)


def _readers(model: "HookedModel", kind: str, heads: Sequence[Head]) -> list[str]:
    """What edge attribution calls q, k or v of these heads."""
    names = []
    for layer, head in heads:
        block = model.anatomy.blocks[layer]
        shared = block.heads // block.features[kind].heads
        names.append(f"a{layer}.{'h' if shared == 1 else 'kv'}{head // shared}<{kind}>")
    return [*dict.fromkeys(names)]


def _receivers(given: "str | tuple[str, Sequence[Head]]") -> tuple[str, tuple[Head, ...]]:
    if given == "logits":
        return "logits", ()
    if isinstance(given, str):
        found = RECEIVERS.fullmatch(given)
        if found is None:
            raise InputError(f"receivers are logits, or q, k or v of heads such as q:2.0,2.1; found {given!r}")
        return found["kind"], tuple(tuple(map(int, head.split("."))) for head in found["heads"].split(","))
    kind, heads = given
    return kind, tuple((int(layer), int(head)) for layer, head in heads)


def _position(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _steps(procedure: "str | Sequence[Step | str]") -> tuple[Step, ...]:
    if isinstance(procedure, str):
        if procedure not in PROCEDURES:
            raise InputError(f"procedure {procedure!r} is unknown; expected {', '.join(PROCEDURES)}, or steps")
        return PROCEDURES[procedure]
    steps = tuple(step if isinstance(step, Step) else Step.read(step) for step in procedure)
    if not steps:
        raise InputError("a procedure has one step or more; found none")
    for n, step in enumerate(steps):
        before = [earlier.name for earlier in steps[:n]]
        if step.name in before:
            raise InputError(f"two steps are called {step.name!r}")
        if step.of and step.of not in before:
            raise InputError(f"step {step.name!r} leads to {step.of!r}, which no step before it finds")
    return steps


def _require_heads(heads: int | Mapping[str, int] | None, steps: Sequence[Step], model: "HookedModel") -> None:
    given = dict(heads) if isinstance(heads, Mapping) else {} if heads is None else {steps[0].name: heads}
    if unknown := [name for name in given if name not in {step.name for step in steps}]:
        raise InputError(f"there is no step {unknown[0]!r}; there are {', '.join(step.name for step in steps)}")
    for name, count in given.items():
        if not 1 <= count <= model.layers * model.heads:
            raise InputError(f"{name}: {model.name} has {model.layers * model.heads} heads; cannot take {count}")


def _lowering(result: "Paths", wanted: int | None) -> tuple[tuple[Head, ...], tuple[float, ...]] | None:
    """The heads whose path lowers the metric (raises a divergence): the first `wanted`, or all that are clear of 0."""
    frame = result.to_frame()
    frame["harm"] = frame["effect"] if result.metric == "kl" else -frame["effect"]
    frame = frame[frame["harm"] > 0].sort_values("harm", ascending=False, kind="stable")
    frame = frame[frame["p_adjusted"] < CLEAR] if wanted is None else frame.head(wanted)
    if not len(frame):
        return None
    heads = tuple((int(layer), int(head)) for layer, head in frame[["layer", "head"]].values)
    return heads, tuple(float(effect) for effect in frame["effect"])


def _apart(found: Mapping[str, Group]) -> dict[str, dict[str, Any]]:
    """The groups for the file, a head that two at one position have in the later one alone; none without heads."""
    kept: dict[str, dict[str, Any]] = {}
    names = [*found]
    for n, name in enumerate(names):
        alike = [found[other] for other in names[n + 1 :] if found[other].position == found[name].position]
        later = [head for other in alike for head in other.heads]
        group = found[name].without(later)
        if group is not None:
            kept[name] = {"position": group.position, "heads": [*map(list, group.heads)], "scores": [*group.scores]}
    return kept
