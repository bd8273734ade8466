"""Does the same circuit serve base and tuned model, and where is the gain? The study of arXiv 2402.14811 on `boxes`.

    python -m analyses.entity_tracking          # some minutes; analyses/results/entity-*, entity_tracking.md
    python -m analyses.entity_tracking claims   # the tables, from the stored results, in seconds
    python -m figures.entity_tracking           # the figures, from the stored results

Prakash et al. 2024, "Fine-Tuning Enhances Existing Mechanisms": a circuit of four groups of heads tracks entities in
Llama-7B; the same circuit serves models tuned on it, and most of their gain is in the heads that carry the position.
Here the base of the zoo's pair `boxes` and its three arms: `tuned` and `lora` were trained on another task and lose at
boxes, `control` was trained on boxes and gains.

The published procedure runs first. It looks where the label was told (`label:first`); in these models the end reads the
boxes two tokens further on, where the label and the object before it have been gathered, and their two layers of
attention leave no room for a fourth group. So two steps are added at `label:first+2`: the paths to what the value
fetchers read there (v) and to what they find it by (k). The place was found by their attention.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import finetune_lens as fl
from finetune_lens import zoo
from finetune_lens.circuits import PROCEDURES, Circuit, Step, circuit_of, evaluate_circuit, find_circuit
from finetune_lens.files import whole_file
from finetune_lens.tasks import boxes

if TYPE_CHECKING:
    from finetune_lens.results import Result

RESULTS = Path(__file__).resolve().parent / "results"
ARMS = {"tuned": "registers, all parameters", "lora": "registers, LoRA", "control": "boxes (positive control)"}
STEPS = (
    *PROCEDURES["entity-tracking"],
    Step("object_teller", "v", "value_fetcher", "label:first+2"),
    Step("label_teller", "k", "value_fetcher", "label:first+2"),
)
POSITIONAL = ("position_transmitter", "label_teller")  # groups that say which box; the others carry its object
PARTS = ("measure", "claims")  # of the study, as its command takes them
NEEDS = (  # what scale paper does
    "Llama-7B with Goat-7B, FLoat-7B and Vicuna-7B tuned from it, and a GPU that holds two of them; of a pair that "
    "you have, `python -m finetune_lens.circuits` (find, evaluate, compare, dcm, paths) and "
    "`python -m finetune_lens.cmap` measure the same"
)
PATHS, SCENES, REFERENCE, DESIDERATA = 300, 300, 500, 300  # prompts of each kind


def prompts(count: int, counterfactual: str, seed: int) -> list[dict[str, Any]]:
    """Prompts of test scenes, drawn anew for each use."""
    rows = boxes.draw(count, np.random.default_rng([seed, count]), counterfactual=counterfactual)
    return [row | {"id": f"{counterfactual}-{row['id']}"} for row in rows]


def desiderata(count: int = DESIDERATA) -> list[dict[str, Any]]:
    """The three counterfactuals with which the paper asks what a head carries."""
    return [row for kind in ("object", "label", "position") for row in prompts(count, kind, 3)]


def measure(*, progress: bool = True, scale: float = 1.0) -> dict[str, "Result"]:
    """Every result by name. `scale` takes a share of the prompts, for tests."""
    folder = zoo.path("boxes")
    rows = prompts(round(PATHS * scale), "random", 1)
    scenes, reference = prompts(round(SCENES * scale), "random", 2), prompts(round(REFERENCE * scale), "random", 4)
    pairs = {arm: fl.ModelPair.load(folder / "base", folder / arm) for arm in ARMS}
    found: dict[str, Result] = {}
    circuits: dict[str, Circuit] = {}
    models = {"base": pairs["control"].models()[0]} | {arm: pair.models()[1] for arm, pair in pairs.items()}
    for name, model in models.items():
        found[f"{name}-paths"] = find_circuit(model, rows, procedure=STEPS, progress=progress)
        circuits[name] = _called(circuit_of(found[f"{name}-paths"]), f"boxes/{name}")
    for arm, pair in pairs.items():
        both = {"base": circuits["base"], arm: circuits[arm]}
        found[f"{arm}-overlap"] = fl.compare_circuits(circuits["base"], circuits[arm])
        found[f"{arm}-evaluation"] = evaluate_circuit(pair, both, scenes, reference=reference, progress=progress)
        found[f"{arm}-heads"] = fl.trace_paths(pair, rows, progress=progress)
        found[f"{arm}-cmap"] = fl.cross_patch(pair, scenes, sets=circuits["base"].sets(), progress=progress)
    for name in ("base", "control"):
        found[f"{name}-dcm"] = fl.learn_masks(
            models[name], circuits[name], desiderata(round(DESIDERATA * scale)), progress=progress
        )
    return found


def _called(circuit: Circuit, name: str) -> Circuit:
    """Under its name in the zoo, not that of a folder on this machine."""
    return replace(circuit, model=dict(circuit.model) | {"model": name})


def stored() -> dict[str, "Result"]:
    """The results that `main` left, by name."""
    return {path.stem.removeprefix("entity-"): fl.load(path) for path in sorted(RESULTS.glob("entity-*.nc"))}


def circuits() -> dict[str, Circuit]:
    """The circuits that `main` left: of the base and of every arm."""
    return {name: Circuit.load(RESULTS / f"entity-{name}.json") for name in ("base", *ARMS)}


def report(found: Mapping[str, Any]) -> str:
    """The tables and the claims, every number from the results."""
    lines = [
        "# Entity tracking: does the same circuit serve both models, and where is the gain?",
        "",
        "Printed by `python -m analyses.entity_tracking`. 95 % intervals over prompts; adjusted p-values are those of",
        f"Benjamini–Hochberg. Naming any object of a scene would be right in {boxes.chance():.3f}.",
        "",
        "## The circuits",
        "",
        "Heads whose path lowers the probability of the answer clear of 0 (relative change, arXiv 2402.14811).",
        "",
        "| group | leads to | at | base | " + " | ".join(ARMS) + " |",
        "|---|---|---|---|" + "---|" * len(ARMS),
    ]
    for step in STEPS:
        to = "the logits" if step.receivers == "logits" else f"{step.receivers} of {_words(step.of)}"
        cells = [_heads(found[f"{name}-paths"], step.name) for name in ("base", *ARMS)]
        lines.append(f"| {_words(step.name)} | {to} | {step.position} | {' | '.join(cells)} |")
    agreement = found["base-paths"].agreement()
    lines += [
        "",
        "Edge attribution finds the same heads first (base, rank correlation with the paths): "
        + ", ".join(f"{_words(row['group'])} {row['rank_correlation']:.2f}" for row in agreement.to_dict("records"))
        + ".",
    ]
    for arm in ARMS:
        lines += _arm(arm, found)
    lines += _dcm(found) + _claims(found)
    return "\n".join(lines) + "\n"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _heads(result: Any, group: str) -> str:
    if group not in result.groups:
        return "not looked for"
    part = result.to_frame()
    part = part[(part["group"] == group) & part["chosen"]].sort_values("effect")
    return ", ".join(f"{r['layer']}.{r['head']} ({r['effect']:+.2f})" for r in part.to_dict("records")) or "none"


def _span(row: Any, name: str, low: str, high: str) -> str:
    return f"{row[name]:.2f} [{row[low]:.2f}, {row[high]:.2f}]"


def _arm(arm: str, found: Mapping[str, Any]) -> list[str]:
    overlap = found[f"{arm}-overlap"].table()
    places, heads = (row for row in overlap[overlap["kind"] == "circuit"].to_dict("records"))
    lines = [
        "", f"## {arm}: {ARMS[arm]}", "",
        f"Of the base's circuit {places['shared']:.0f} of {places['one']:.0f} places are in this model's, which has "
        f"{places['other']:.0f} (p = {places['p']:.2g}); of its heads, wherever they act, {heads['shared']:.0f} of "
        f"{heads['one']:.0f}.", "",
        "| circuit of | in | accuracy, all heads | circuit alone | no heads | faithfulness | random circuits, 5–95 % |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found[f"{arm}-evaluation"].table().to_dict("records"):
        side = arm if row["model"] == "tuned" else "base"
        lines.append(
            f"| {row['circuit']} | {side} | {_span(row, 'full', 'full_low', 'full_high')} | "
            f"{_span(row, 'circuit_score', 'circuit_score_low', 'circuit_score_high')} | {row['floor']:.2f} | "
            f"{_span(row, 'faithfulness', 'faithfulness_low', 'faithfulness_high')} | "
            f"{row['random']:.2f} [{row['random_low']:.2f}, {row['random_high']:.2f}] |"
        )
    changed = found[f"{arm}-heads"].differences()
    some = changed[changed["p_adjusted"] < 0.05]
    some = some.reindex(some["difference"].abs().sort_values(ascending=False, kind="stable").index).head(4)
    said = ", ".join(f"{r['layer']}.{r['head']} {r['base']:+.2f} → {r['tuned']:+.2f}" for r in some.to_dict("records"))
    lines += ["", f"Direct effects on the logits that differ between the two: {said or 'none'}.", ""]
    lines += ["| the tuned model's heads in the base | effect on the logit difference | of the gain |", "|---|---|---|"]
    frame = found[f"{arm}-cmap"].to_frame()
    for row in frame[frame["direction"] == "tuned→base"].to_dict("records"):
        share = "undefined" if np.isnan(row["recovery"]) else f"{row['recovery']:.2f}"
        lines.append(f"| {_words(row['set'])} | {_span(row, 'effect', 'low', 'high')} | {share} |")
    return lines


def _dcm(found: Mapping[str, Any]) -> list[str]:
    lines = ["", "## What the groups carry (DCM)", ""]
    for name in ("base", "control"):
        table = found[f"{name}-dcm"].table()
        lines += [f"{name}:", "", "| group | object | label | position | carries |", "|---|---|---|---|---|"]
        for group, part in table.groupby("group", sort=False):
            part = part.set_index("desideratum")
            cells = [
                f"{_span(part.loc[kind], 'accuracy', 'low', 'high')} ({part.loc[kind, 'heads']:.0f} of "
                f"{part.loc[kind, 'of']:.0f}; none: {part.loc[kind, 'none']:.2f})"
                for kind in ("object", "label", "position")
            ]
            carries = found[f"{name}-dcm"].carried(str(group)) or "nothing clear of the rest"
            lines.append(f"| {_words(str(group))} | {' | '.join(cells)} | {carries} |")
        lines.append("")
    return lines[:-1]


def _claims(found: Mapping[str, Any]) -> list[str]:
    """The paper's claims, and whether they hold here."""
    lines = ["", "## Claims", "", "| the paper | here | holds |", "|---|---|---|"]
    base = found["base-paths"].chosen()
    groups = {group for group, _, _ in base}
    missing = [step.name for step in PROCEDURES["entity-tracking"] if step.name not in groups]
    told = "four" if not missing else f"no {' or '.join(map(_words, missing))}: the models are two layers deep"
    lines.append(f"| four groups of heads, from the label told to the answer | {told} | {_yes(not missing)} |")
    table = found["control-evaluation"].table().set_index(["circuit", "model"])
    own, other = (table.loc[("base", side)] for side in ("base", "tuned"))
    alike = own["faithfulness_low"] <= other["faithfulness"] <= own["faithfulness_high"]
    served = bool(other["faithfulness_low"] > 0.5 and other["p"] < 0.05)
    lines.append(
        "| the base's circuit serves the model tuned on the task (faithfulness 1.00 in Llama, .88–.97 tuned) | "
        f"{own['faithfulness']:.2f} in the base, {other['faithfulness']:.2f} in `control`"
        f"{'' if alike else ', another value'}; better than every random circuit: {_yes(other['p'] < 0.01)} | "
        f"{_yes(served)} |"
    )
    frame = found["control-cmap"].to_frame()
    frame = frame[frame["direction"] == "tuned→base"].set_index("set")
    gained = {name: float(frame.loc[name, "recovery"]) for name in frame.index}
    positional = [gained[name] for name in POSITIONAL if name in gained]
    others = [share for name, share in gained.items() if name not in POSITIONAL]
    said = ", ".join(f"{_words(name)} {share:.2f}" for name, share in gained.items())
    most = bool(positional and max(positional, default=0) > max(others, default=0))
    lines.append(
        f"| most of the gain is in the heads that carry the position | of `control`'s gain: {said} | {_yes(most)} |"
    )
    table = found["base-dcm"].table()
    carried = {str(g): found["base-dcm"].carried(str(g)) for g in dict.fromkeys(table["group"])}
    said = ", ".join(f"{_words(g)}: {what or 'nothing clear'}" for g, what in carried.items())
    holds = carried.get("value_fetcher") == "object" and carried.get("position_transmitter") == "position"
    lines.append(f"| value fetchers carry the object, position transmitters the position | {said} | {_yes(holds)} |")
    return lines


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def main() -> None:
    from analyses.studies import Scale, Steps, chosen, require_scale
    from finetune_lens.command import Basic, run

    def entity_tracking(steps: Steps = None, *, scale: Scale = "tiny", common: Basic) -> None:
        """Find the circuit that tracks entities, and ask whether it serves the tuned models and where their gain is."""
        todo = chosen(steps, PARTS)
        require_scale(scale, paper=NEEDS)
        if "measure" in todo:
            found = measure(progress=common.progress)
            for name, result in found.items():
                with whole_file(RESULTS / f"entity-{name}.nc") as path:
                    result.save(path)
            for name in ("base", *ARMS):
                _called(circuit_of(found[f"{name}-paths"]), f"boxes/{name}").save(RESULTS / f"entity-{name}.json")
        if "claims" in todo:
            text = report(stored())
            with whole_file(RESULTS / "entity_tracking.md") as path:
                path.write_text(text)
            print(text)

    run(entity_tracking)


if __name__ == "__main__":
    from analyses.entity_tracking import main

    main()
