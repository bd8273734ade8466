"""What fine-tuning did, in plain sentences: each is built from one result's numbers beside their null or interval.

A sentence says that something is there only where its interval or null allows it, and says that it is not shown
where they do not. The first ones lead: what was learnt, by which method, where.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune_lens.results.few import caution

if TYPE_CHECKING:
    import pandas as pd

    from finetune_lens.results import Result

NO_CHANGE = "Nothing changed"
ALIKE = 0.99  # CKA
OWN_TEXTS = "own texts"  # what the tuned model wrote itself
LEADING = ("outputs", "updates", "interpolation", "cot")


class Sentence(NamedTuple):
    """One sentence, the name of the result that it is drawn from, and whether it belongs to those that lead."""

    text: str
    source: str
    leads: bool = False


def verdict(results: "Mapping[str, Result]") -> list[Sentence]:
    """The verdict on what these results say together, those that lead first."""
    found = []
    for name, result in results.items():
        if say := _SAID.get(result.kind):
            found += [Sentence(text, name, not i and _leads(result)) for i, text in enumerate(say(result))]
        if result.kind == "updates" and found and found[-1].text.startswith(NO_CHANGE):
            return [found[-1]]
    order = {kind: place for place, kind in enumerate(_SAID)}
    return sorted(found, key=lambda sentence: (not sentence.leads, order[results[sentence.source].kind]))


def _leads(result: "Result") -> bool:
    return result.kind in LEADING or (result.kind == "check" and not result.passed)


def _updates(result: "Result") -> list[str]:
    head, frame = result.headline(), result.to_frame()
    if head["changed"] == 0:
        others = (result.provenance.get("inputs") or {}).get("alignment", [])[1:]
        what = f"all {head['weights']} weights of the two models are the same, number for number"
        if not others:
            return [f"{NO_CHANGE}: {what}."]
        return [f"No weight that both models have changed ({what}), but the models differ: {'; '.join(others)}."]
    changed = frame[frame["delta_norm"] > 0]
    size = head["relative_norm"]
    return [
        f"How: tuning changed {head['changed']} of {head['weights']} weight tensors by {size:.1%} of their size "
        f"(‖Δ‖/‖W0‖); {_method(changed)}.",
        f"{_where(changed)}.",
    ]


def _method(changed: "pd.DataFrame") -> str:
    """What the ranks of the updates say of the way of tuning."""
    matrices = changed.dropna(subset=["delta_rank"])
    matrices = matrices[matrices["delta_rank"] > 0]
    if not len(matrices):
        return "no matrix among them"
    most, sides = matrices["delta_rank"].max(), matrices[["out", "in"]].min(axis=1)
    if (matrices["delta_rank"] <= sides / 2).all():
        return (
            f"the update of every matrix is of low rank (at most {most:.0f}, where {sides.max():.0f} is possible): the "
            "mark of LoRA or another low-rank method"
        )
    share = float((matrices["delta_rank"] >= 0.9 * sides).mean())
    if share > 0.5:
        return f"{share:.0%} of the matrices' updates have full rank: the mark of full fine-tuning"
    return "the updates' ranks are neither low throughout nor full"


def _where(changed: "pd.DataFrame") -> str:
    """In which layer and component most of ‖Δ‖² lies, beside its share of the changed weights' ‖W0‖²."""
    squares = changed.assign(delta=changed["delta_norm"] ** 2, base=changed["base_norm"] ** 2)
    parts = []
    for column, named in (
        ("layer", lambda v: f"in layer {v}" if v >= 0 else "outside the layers"),
        ("component", "in {}".format),
    ):
        shares = squares.groupby(column)[["delta", "base"]].sum()
        shares /= shares.sum()
        first = shares["delta"].idxmax()
        parts.append(f"{named(first)} ({shares.delta[first]:.0%} of it, {shares.base[first]:.0%} of ‖W0‖²)")
    return f"By size, most of the change (‖Δ‖²) lies {parts[0]}, and by kind of weight {parts[1]}"


def _intruders(result: "Result") -> list[str]:
    head = result.headline()
    said = []
    for side in result.sides:
        own, total = head[side], int(result.table("all", side=side)["vectors"].item())
        null = (own.get("null") or {}).get("spectrum")
        if null is None:
            beside = "without a null, so that chance may give as many"
        else:
            more = "more than" if own["intruders"] > null["high"] else "no more than"
            beside = f"{more} chance gives ({null['mean']:.1f} [{null['low']:.0f}, {null['high']:.0f}])"
        said.append(f"{own['intruders']} of the {total} leading {side} singular vectors, {beside}")
    return [f"Intruder dimensions (ε = {head['epsilon']:g}) of the tuned weights: {'; '.join(said)}."]


def _check(result: "Result") -> list[str]:
    if result.passed:
        return ["The trust gate finds the pair safe to compare on this machine."]
    return [
        f"The trust gate FAILED: {'; '.join(result.failures)}. What rests on running both models is not to be trusted."
    ]


def _outputs(result: "Result") -> list[str]:
    measures = result.headline()["measures"]
    accuracy = measures.get("answer: accuracy")
    about = _about(result)
    if accuracy and accuracy["base"] is not None:
        word = _direction(accuracy, "rises", "falls", "does not clearly change")
        learnt = {"rises": "Learnt", "falls": "Lost"}.get(word)
        logprob = measures.get("answer: logprob")
        moved = _direction(logprob, "rises", "falls", "") if logprob and not learnt else ""
        learnt = learnt or ("No clear change of accuracy" if moved else "No clear change")
        said = (
            f"{learnt}: on {about} accuracy {word} from {accuracy['base']:.2f} to {accuracy['tuned']:.2f} "
            f"({accuracy['difference']:+.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}])"
        )
        if moved:
            said += f"; the log-probability of the answers {moved} ({_signed(logprob)} nats)"
        return [f"{said}.", *(f"{few}." for few in caution(result.data.sizes["example"], "prompts"))]
    loss, kl = measures["loss on the text"], measures["KL(base ‖ tuned)"]
    word = _direction(loss, "rises", "falls", "does not clearly change")
    return [
        f"On {about} the loss {word} ({_signed(loss)} nats), and predictions move by KL = {kl['difference']:.3g} nats "
        "a token."
    ]


def _about(result: "Result") -> str:
    """The prompts: how many, what they begin with if all do, and one whose answer came to be right."""
    data = result.data
    texts = ["".join(t for t in row if t and not _special(t)) for row in data["token"].values.astype(str)]
    common = _common(texts)
    shown = f" that begin with “{common.strip()}”" if len(common.strip()) > 1 else ""
    return f"the {len(texts)} prompts{shown}"


def _special(token: str) -> bool:
    return token in ("<bos>", "<s>", "<|endoftext|>", "<|begin_of_text|>", "<pad>")


def _common(texts: list[str]) -> str:
    """What all texts begin with."""
    low, high = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:length] if len(texts) > 1 else ""


def _interpolation(result: "Result") -> list[str]:
    sentences = []
    table = result.importance() if result.has("scaling") else None
    file = result.files[0]
    metric = result.main_metric(file)
    gain = next(r for r in result.headline()["gain"] if r["file"] == file and r["metric"] == metric)
    if gain["gain_low"] <= 0 <= gain["gain_high"]:
        return [
            "Interpolation: the two ends do not clearly differ here, so no part of the update can be said to carry it."
        ]
    if table is not None:
        rows = table[(table["file"] == file) & (table["metric"] == metric)]
        up = gain["gain"] > 0
        alone, without = (rows.loc[(rows[name] * (1 if up else -1)).idxmax()] for name in ("alone", "without"))
        sentences.append(
            f"Where: of the {'gain' if up else 'drop'} of {gain['gain']:+.2f} in {_measured(result, file, metric)}, "
            f"the update of {_group(result, alone['group'])} alone brings {_ends(alone, 'alone')}, and without that of "
            f"{_group(result, without['group'])} {_ends(without, 'without')} of it {'is lost' if up else 'goes'}."
        )
    barrier = next((r for r in result.headline()["barrier"] if r["file"] == file and r["measure"] == "loss"), None)
    if barrier:
        sentences.append(f"On the straight path from base to tuned the loss shows {_article(barrier['verdict'])}.")
    return sentences


def _measured(result: "Result", file: str, metric: str) -> str:
    """The metric with its unit, and what it was measured on where that has a name."""
    per = " a token" if str(result.data["objective"].sel(file=file).item()) == "text" else ""
    unit = f" (nats{per})" if metric == "logprob" else ""
    return f"{_metric(metric)}{unit}" + (" on the tuned model's own texts" if file == OWN_TEXTS else "")


def _article(verdict: str) -> str:
    return "a barrier" if verdict == "barrier" else "no barrier" if verdict == "no barrier shown" else verdict


def _group(result: "Result", group: str) -> str:
    return f"layer {group}" if result.by == "layer" and group.isdigit() else f"“{group}”"


def _representations(result: "Result") -> list[str]:
    if not result.matched:
        return []
    head = result.headline()
    row = head["least_alike"]["cka_debiased"]
    least = f"CKA {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    if "null_low" not in row:
        beside = "whether another seed differs as much was not measured"
    else:
        n, low, high = head["null_models"], row["null_low"], row["null_high"]
        word = "closer" if row["closer_than_null"] else "no closer"
        others = (
            f"the other model given, {low:.2f}" if n == 1 else f"the nearest of {n} others, {low:.2f} to {high:.2f}"
        )
        beside = f"{word} than {others}"
    if row["value"] > ALIKE:
        return [f"Representations stay alike at every depth (least: {least} at depth {row['depth']}; {beside})."]
    last = int(result.data["depth"].max())
    return [f"Representations differ most at depth {row['depth']} of {last} ({least}); {beside}."]


def _cmap(result: "Result") -> list[str]:
    sentences = []
    head = result.headline()
    for direction in result.directions:
        found = head.get(direction)
        if not found or not found["top"]:
            continue
        top = found["top"][0]
        if found["low"] <= 0 <= found["high"]:
            sentences.append(f"Patching {direction}: the models do not clearly differ in {_metric(head['metric'])}.")
            continue
        place = ", ".join(f"{dim} {top[dim]}" for dim in result.dims if dim in top)
        ends = top.get("specific_low"), top.get("specific_high")
        specific = None not in ends and (ends[0] > 0 or ends[1] < 0)
        beside = (
            "" if None in ends else ", beyond what the same head gives on another prompt" if specific
            else ", but no more than the same head gives on another prompt"
        )  # fmt: skip
        recovery = "" if top.get("recovery") is None else f" ({top['recovery']:.0%} of the difference)"
        sentences.append(
            f"Place by place, {direction}: {place} moves {_metric(head['metric'])} most, by {top['effect']:+.3g} "
            f"[{top['low']:.3g}, {top['high']:.3g}]{recovery}{beside}."
        )
    return sentences


def _revival(result: "Result") -> list[str]:
    word, why = result.verdict()
    return [f"Trained back on the old task: {word} ({why})."] if word else []


def _cot(result: "Result") -> list[str]:
    words = {
        "uses": "uses its chain of thought", "ignores": "ignores its chain of thought",
        "mixed": "uses its chain of thought in part", "undecided": "cannot be said to use its chain of thought or not",
    }  # fmt: skip
    said = [f"the {side} {words[word]} ({why})" for side, (word, why) in _sides(result.verdicts())]
    return [f"Reasoning: {'; '.join(said)}."]


def _bias(result: "Result") -> list[str]:
    return [f"Hint “{hint}”, {_named(side)}: {says}." for (hint, side), says in result.verdicts().items()]


def _sides(verdicts: Mapping[str, tuple[str, str]]) -> list[tuple[str, tuple[str, str]]]:
    return [(_named(side), verdict) for side, verdict in verdicts.items()]


def _named(side: str) -> str:
    return "base" if side == "base" else "tuned model"


def _metric(name: str) -> str:
    return {"logprob": "log-probability", "logit_diff": "the logit difference"}.get(name, name)


def _direction(row: Mapping[str, Any], up: str, down: str, neither: str) -> str:
    return up if row["low"] > 0 else down if row["high"] < 0 else neither


def _signed(row: Mapping[str, Any]) -> str:
    return f"{row['difference']:+.3g} [{row['low']:.3g}, {row['high']:.3g}]"


def _ends(row: Any, name: str) -> str:
    return f"{row[name]:+.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


# In the order of the paragraph.
_SAID: "dict[str, Callable[[Any], list[str]]]" = {
    "outputs": _outputs,
    "updates": _updates,
    "intruders": _intruders,
    "interpolation": _interpolation,
    "cmap": _cmap,
    "representations": _representations,
    "revival": _revival,
    "cot": _cot,
    "bias": _bias,
    "check": _check,
}
