"""The tables and claims of the study of chains of thought, every number from its stored results.

Printed by `python -m analyses.cot_training claims`.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from analyses.cot_training import ARMS, CASES, LEARNT, POSITIONS, SPLITS, Study, bridge_at, reciprocal
from finetune_lens import stats

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

Estimate = tuple[float, float, float]  # value, low, high
HALF = 0.5
OPPOSITE = {"yes": "no", "no": "yes"}
PATH = f"by another h's state there, after the first block, the answer loses ≥ {HALF}"
WORDS = {"train": "trained items", "held": "ID items", "ood": "OOD items"}


def accuracy(data: "xr.Dataset", seed: int, arm: str, measure: str) -> "pd.DataFrame":
    """A row an evaluation: step, mean, low, high over items; an atomic fact's, or t or b of a split's items."""
    import pandas as pd

    values = data["right"].sel(seed=seed, arm=arm, measure=measure).transpose("step", "item").values.astype(float)
    values = values[:, values[-1] >= 0]
    low, high = stats.interval_of_mean(values)
    mean = values.mean(1) if values.shape[1] else np.full(len(values), np.nan)
    return pd.DataFrame({"step": data["step"].values, "mean": mean, "low": low, "high": high})


def reached(frame: "pd.DataFrame", level: float = LEARNT) -> float:
    """The first evaluation at which the accuracy is `level`; infinite when none is."""
    above = frame["mean"] >= level
    return float(frame["step"][above.idxmax()]) if above.any() else np.inf


def claims(study: Study) -> list[str]:
    """Every table, each number from the stored results."""
    told, seen, moved = (study.stored(name) for name in ("train", "lens", "trace"))
    record = json.loads(told.attrs["provenance"])
    settings, sizes = record["settings"], record["sizes"]
    texts = settings["steps"] * settings["batch"]
    words = {
        arm: f"{texts * one['tokens'] / 1e6:.1f} M tokens, {texts * one['learnt'] / 1e6:.1f} M of them learnt, in "
        f"{float(told['seconds'].sel(arm=arm).mean()) / 60:.0f} minutes"
        for arm, one in record["told"].items()
    }
    world = settings["world"]
    sizes_told = ", ".join(f"{sizes[name]} {word}" for name, word in WORDS.items())
    lines = [
        "# What does training with an explicit chain of thought build?",
        "",
        f"Printed by `python -m analyses.cot_training claims`. {world['entities']} entities, {world['relations']} "
        f"relations, {sizes['atomic']} atomic facts, {world['ood_share']:.0%} of them OOD; of two-hop items "
        f"{sizes_told}. GPT-2 of {settings['layers']} layers, d = {settings['hidden']}; {settings['steps']} steps of "
        f"{settings['batch']} texts for both models: with the bridge {words['with']}; without {words['without']}. "
        f"Seeds: {', '.join(map(str, settings['seeds']))}. Brackets: 95 % bootstrap intervals over items. "
        "Held-out items are the ID items; with the bridge, t is read after the bridge that the model itself wrote.",
        "",
        "## Accuracy along training",
        "",
        "| seed | bridge | step | facts ID | facts OOD | trained | held out (ID) | OOD |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = ("fact id", "fact ood", "t train", "t held", "t ood")
    for seed in settings["seeds"]:
        for arm in ARMS:
            frames = [accuracy(told, seed, arm, name) for name in shown]
            steps = frames[0]["step"]
            wanted = [n for n in (200, 500, 1000, 2000, 4000) if n < steps.max()] + [steps.max()]
            for row in dict.fromkeys(int((steps - n).abs().idxmin()) for n in wanted):
                cells = [f"{frame.loc[row, 'mean']:.2f}" for frame in frames]
                if row == len(steps) - 1:
                    cells = [_at_least(tuple(f.loc[row, ["mean", "low", "high"]]), LEARNT)[0] for f in frames]
                lines.append(f"| {seed} | {arm} | {steps[row]} | {' | '.join(cells)} |")
    guess = dict(zip(SPLITS, told["commonest"].values, strict=True))
    lines += ["", "Naming what most often follows r2 in the trained items: "
              + ", ".join(f"{name} {guess[name]:.3f}" for name in SPLITS) + ".", ""]  # fmt: skip
    lines += _lens_lines(seen, settings) + _trace_lines(moved, settings)
    lines += ["", "## Claims", "", "| the paper | here | holds here? |", "|---|---|---|"]
    return lines + [f"| {claim} | {text} | {word} |" for claim, text, word in verdicts(told, seen, moved)]


def _lens_lines(seen: "xr.Dataset", settings: dict[str, Any]) -> list[str]:
    depths = seen.sizes["depth"]
    lines = [
        "## Logit lens",
        "",
        "MRR by depth (blocks passed). Null: that of other items' b, r2, t; 97.5 % of the shuffles at the last depth.",
        "",
        f"| seed | items | bridge | rank of | at | {' | '.join(map(str, range(depths)))} | null |",
        f"|---|---|---|---|---|{'---|' * (depths + 1)}",
    ]
    for seed in settings["seeds"]:
        for split in ("held", "ood"):
            for arm in ARMS:
                for target, position in (("b", "r1"), ("b", "r2"), ("r2", "r2"), ("r2", "b"), ("t", "r2"), ("t", "b")):
                    if position == "b" and not ARMS[arm]:
                        continue
                    one = seen.sel(seed=seed, arm=arm, split=split, position=position, target=target)
                    means = np.nanmean(reciprocal(one["rank"].transpose("depth", "item").values), axis=1)
                    cells = " | ".join(f"{v:.2f}" for v in means)
                    null = float(one["null"].sel(end="high").isel(depth=-1))
                    lines.append(f"| {seed} | {split} | {arm} | {target} | {position} | {cells} | {null:.2f} |")
    return lines


def _trace_lines(moved: "xr.Dataset", settings: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Causal tracing",
        "",
        "States of the run with another h, r1, r2 or written b put into the question's own run, with the causal mask. "
        "By position the fall of the answer's probability, by layer from the embedding on; *in italics* the last "
        "position, where the answer is read: there it is no finding. `answers`: share of answers in the question's "
        "run; `keeps`, `other`: in the other run, the question's answer and its own.",
        "",
        f"| seed | items | bridge | asked | exchanged | n | answers | keeps | other | {' | '.join(POSITIONS)} |",
        f"|---|---|---|---|---|---|---|---|---|{'---|' * len(POSITIONS)}",
    ]
    for seed in settings["seeds"]:
        for split in SPLITS:
            for name in moved["map"].values:
                one = moved.sel(seed=seed, split=split, map=name, end="mean")
                table, last = one["lost"].transpose("position", "layer").values, last_position(name)
                cells = []
                for position, row in zip(POSITIONS, table, strict=True):
                    text = " ".join(f"{v:.2f}" for v in row.round(2) + 0.0)
                    cells.append("" if np.isnan(row).all() else f"*{text}*" if position == last else text)
                said = " | ".join(f"{v:.2f}" for v in one["said"].values)
                words = " | ".join(name.split())
                lines.append(f"| {seed} | {split} | {words} | {int(one['count'])} | {said} | {' | '.join(cells)} |")
    return lines


def last_position(name: str) -> str:
    """The last that is read in a map: the written bridge when t is asked after it, else r2."""
    arm, asked, _ = name.split()
    return "b" if ARMS[arm] and asked == "t" else "r2"


def verdicts(told: "xr.Dataset", seen: "xr.Dataset", moved: "xr.Dataset") -> list[tuple[str, str, str]]:
    """The paper's claims: what it says, what was measured here, and whether it holds (every seed has to agree)."""
    seeds, end = [int(seed) for seed in told["seed"].values], int(told["step"].values[-1])
    found: list[tuple[str, str, str]] = []

    def claim(text: str, measured: Callable[[int], tuple[str, str]]) -> None:
        """`measured(seed)`: the numbers, and yes, no or undecided."""
        texts, words = zip(*(measured(seed) for seed in seeds), strict=True)
        named = [f"seed {seed}: {one}" for seed, one in zip(seeds, texts, strict=True)] if len(seeds) > 1 else texts
        found.append((text, "; ".join(named), words[0] if len({*words}) == 1 else "undecided: seeds differ"))

    def last(seed: int, arm: str, measure: str) -> Estimate:
        return tuple(accuracy(told, seed, arm, measure).iloc[-1][["mean", "low", "high"]])

    def composed(seed: int) -> tuple[str, str]:
        one = told["right"].sel(seed=seed, arm="with", measure="t ood").isel(step=-1).values
        known = seen["known"].sel(seed=seed, arm="with", split="ood").values.astype(bool)
        mine = one[known & (one >= 0)].astype(float)
        if not len(mine):
            return "there are none", "undecided"
        text, word = _at_least((mine.mean(), *stats.interval_of_mean(mine)), LEARNT)
        return f"{text}, {len(mine)} of {int((one >= 0).sum())} items", word

    def late(seed: int) -> tuple[str, str]:
        text, word = _at_least(last(seed, "without", "t held"), LEARNT)
        text += f" after {end} steps, trained items {last(seed, 'without', 't train')[0]:.2f}"
        return text, "undecided: not trained long enough" if word == "no" else word

    def never(seed: int) -> tuple[str, str]:
        text, word = _at_least(last(seed, "without", "t ood"), HALF)
        text += f" after {end} steps, where ID items are at {last(seed, 'without', 't held')[0]:.2f}"
        known = late(seed)[1] == "yes"
        return text, OPPOSITE.get(word, word) if known else "undecided: ID items are not learnt either"

    def sooner(seed: int) -> tuple[str, str]:
        one, other = (reached(accuracy(told, seed, arm, "t held")) for arm in ARMS)
        words = [f"> {end}" if np.isinf(n) else f"{n:.0f}" for n in (one, other)]
        return f"{words[0]} steps with, {words[1]} without", _word(one < other, one > other)

    def shallower(seed: int) -> tuple[str, str]:
        at = bridge_at(seen, seed, split)
        text = ", ".join(f"depth {_depth(at[arm]['depth'])} {arm}" for arm in ARMS)
        _, low, high = at["difference"]["depth"]
        return text, _word(high < 0, low > 0)

    def larger(seed: int) -> tuple[str, str]:
        value, low, high = bridge_at(seen, seed, split)["difference"]["area"]
        return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]", _word(low > 0, high < 0)

    def said(name: str, case: str) -> Callable[[int], tuple[str, str]]:
        one = moved["said"].sel(split=split, map=name, case=case)
        return lambda seed: _at_least(tuple(one.sel(seed=seed).values), LEARNT)

    def carried(name: str) -> Callable[[int], tuple[str, str]]:
        """At r1, at the layer after the first block at which its state carries most."""
        cells = moved["lost"].sel(split=split, map=name, position="r1").transpose("seed", "layer", "end")
        return lambda seed: _at_least(tuple(max(cells.sel(seed=seed).values[1:], key=lambda cell: cell[0])), HALF)

    enough = f"accuracy ≥ {LEARNT}"
    claim(f"with the bridge, ID items are learnt ({enough})", lambda n: _at_least(last(n, "with", "t held"), LEARNT))
    claim(f"with the bridge, so are OOD items ({enough})", lambda n: _at_least(last(n, "with", "t ood"), LEARNT))
    claim(f"(ours) … where it knows both facts as atomic ones ({enough})", composed)
    claim(f"without it, ID items are learnt after much longer training ({enough})", late)
    claim(f"without it, OOD items are not learnt, however long (accuracy < {HALF})", never)
    claim(f"with the bridge, ID items are learnt in fewer steps (first evaluation with {enough})", sooner)
    for split, items in WORDS.items():
        if split != "train":
            claim(
                "with the bridge, b is resolved at a shallower layer (3 against 5 of 8): the first depth at which its "
                f"MRR at r1 is half of the last one, {items}", shallower,
            )  # fmt: skip
            claim(f"the same by the mean over depths of that MRR, with − without, {items}", larger)
    for split, items in WORDS.items():
        if split != "held":
            share = f"(share ≥ {LEARNT}, {items})"
            claim(
                f"two stages: another written bridge changes the answer to its own {share}", said("with t b", CASES[2])
            )
            claim(f"… another h with the bridge kept leaves it {share}", said("with t h", CASES[1]))
            claim(f"… another r1 with the bridge kept leaves it {share}", said("with t r1", CASES[1]))
            claim(f"(ours) the b that the lens reads at r1 is what is written: {PATH} ({items})", carried("with b h"))
    split = "train"
    claim(f"(ours) without the bridge, it is what t is made from: {PATH} ({WORDS[split]})", carried("without t h"))
    return found


def _at_least(estimate: Estimate, level: float) -> tuple[str, str]:
    """The estimate with its interval, and whether the interval is above the level, below it, or around it."""
    value, low, high = np.round(estimate, 2) + 0.0  # no −0.00
    return f"{value:.2f} [{low:.2f}, {high:.2f}]", _word(estimate[1] > level, estimate[2] < level)


def _word(holds: bool, fails: bool) -> str:
    return "yes" if holds else "no" if fails else "undecided"


def _depth(estimate: Estimate) -> str:
    value, low, high = ("never" if np.isinf(v) else f"{v:.0f}" for v in estimate)
    return f"{value} [{low}, {high}]"
