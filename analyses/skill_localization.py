"""Where does a skill live? Grafts of a newly learnt and of a selected skill, by how they were tuned.

    python -m analyses.skill_localization grafts    # a sweep of searches for each pair: ten minutes on one core
    python -m analyses.skill_localization axis      # every other way of moving part of the update, on two of the pairs
    python -m analyses.skill_localization claims    # the tables, from the stored results, in seconds
    python -m figures.skill_localization            # the figures, likewise

The zoo's family `skills`: one base, tuned to a new skill or to another choice among the skills that it has, by AdamW,
by SGD, and by AdamW with an ℓ1 penalty on the update. The claims are those of Panigrahi et al. 2023, "Task-Specific
Skill Localization in Fine-tuned Language Models" (arXiv 2302.06600). Masks are trained and chosen on training prompts;
what is reported is of test prompts. For two of the pairs all that moves part of an update stands on one axis: grafts,
masks of their size, layer swaps, interpolation, compression, intruder dimensions, and activations patched across the
models.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import finetune_lens as fl
from finetune_lens import zoo
from finetune_lens.files import whole_file

if TYPE_CHECKING:
    from finetune_lens.results.grafting import Grafting
    from finetune_lens.results.parts import Parts
    from finetune_lens.results.recovery import Recovery

RESULTS = Path(__file__).resolve().parent / "results"
ARMS = {
    f"{kind}-{how}": f"{words}, {name}"
    for kind, words in (("new", "new skill"), ("select", "selected skill"))
    for how, name in (("adamw", "AdamW"), ("sgd", "SGD"), ("adamw-l1", "AdamW + ℓ1"))
}
SPARSITIES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
EXAMPLES = 512
TARGET = 0.95
STEPS = ("grafts", "axis", "claims")
PAPER = 1e-4  # share of the parameters at which the paper recovers that much (masked language models, 4096 shots)
JOINED = ("select-sgd", "new-adamw")
NEEDS = (  # what scale paper does
    "RoBERTa-base, its fine-tuned versions of the paper's 13 tasks and their data, and a GPU; of pairs that you have, "
    "`python -m finetune_lens.grafting BASE TUNED PROMPTS` searches the grafts"
)
SITES = (1, 2, 3, 4, 6, 8)  # heads patched together, the largest effects first


def pair(arm: str) -> fl.ModelPair:
    """Base and arm."""
    folder = zoo.path("skills")
    return fl.ModelPair.load(folder / "base", folder / arm)


def files(arm: str) -> dict[str, Path]:
    """The arm's prompts to train a mask on, to test it on, and those of the base's other tasks."""
    folder, kind = zoo.path("skills"), arm.partition("-")[0]
    return {
        "train": folder / f"train-{kind}.jsonl",
        "test": folder / f"test-{kind}.jsonl",
        "base": folder / "base.jsonl",
    }


def graft(arm: str, *, progress: bool = True, **options: Any) -> "Grafting":
    """The sweep of one arm."""
    given = files(arm)
    settings = {"sparsity": SPARSITIES, "examples": EXAMPLES, "limit": EXAMPLES} | options
    held = {"test": given["test"], "base": given["base"]}
    return fl.graft(pair(arm), given["train"], evaluate=held, progress=progress, **settings)


def across(folder: Path, *, progress: bool = True) -> "Grafting":
    """The graft of the new skill beside that of the selected one, and both together, measured on either task."""
    settings = {"sparsity": 1e-2, "examples": EXAMPLES, "limit": EXAMPLES, "baselines": False, "progress": progress}
    other = files("select-sgd")
    fl.graft(pair("select-sgd"), other["train"], evaluate={"test": other["test"]}, files=folder / "select", **settings)
    mine = files("new-sgd")
    held = {"new": mine["test"], "select": other["test"]}
    return fl.graft(
        pair("new-sgd"), mine["train"], evaluate=held, beside=[folder / "select" / "graft.safetensors"], **settings
    )


def first_letters(path: Path) -> list[dict[str, str]]:
    """Prompts whose answer is the first letter alone, as patching reads it; wrong is another letter of the text."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = []
    for row in rows:
        letter, text = row["answer"][0], row["prompt"].rpartition(">")[2].rstrip("=")
        wrong = next((c for c in (text[-1], text[0]) if c != letter), None)
        if wrong:
            found.append({"id": row["id"], "prompt": row["prompt"], "answer": letter, "wrong": wrong})
    return found


def axis(arm: str, *, progress: bool = True) -> tuple["Recovery", "Recovery", "Parts"]:
    """All that moves part of the arm's update, on one axis; patched heads likewise; and its parts, side by side."""
    models, given = pair(arm), files(arm)
    quiet = {"progress": progress}
    updates, intruders = fl.measure_updates(models, **quiet), fl.find_intruders(models, **quiet)
    grafts = fl.load(RESULTS / f"skills-{arm}-graft.nc")
    path = fl.interpolate(models, {"test": given["test"]}, by="matrix", **quiet)
    scaling = fl.scale_intruders(models, {"test": given["test"]}, **quiet)
    compressed = fl.compress(models, given["test"], **quiet)
    letters = first_letters(given["test"])
    half = len(letters) // 2
    heads = fl.cross_patch(models, letters[:half], site="z", direction="tuned->base", metric="logprob", **quiet)
    frame = heads.to_frame().sort_values("effect", ascending=False, kind="stable")
    order = [f"blocks.{r['layer']}.attn.hook_z[{r['head']}]" for r in frame.to_dict("records")]
    sets = {f"{n} heads": order[:n] for n in SITES if n <= len(order)}
    patched = fl.cross_patch(models, letters[half:], sets=sets, direction="tuned->base", metric="logprob", **quiet)
    shares = {name: len(places) / len(order) for name, places in sets.items()}
    found = fl.recovery_axis([grafts, path, scaling, compressed], file="test")
    sites = fl.recovery_axis([patched], shares=shares)
    parts = fl.join_parts(updates=updates, intruders=intruders, grafting=grafts, interpolation=path, cmap=heads)
    return found, sites, parts


def claims(found: dict[str, "Grafting"]) -> list[str]:
    """The table of arms, every number from the results."""
    lines = [
        "# Where a skill lives",
        "",
        "Printed by `python -m analyses.skill_localization`. Shares are of the entries of the blocks. A share at which",
        f"{TARGET:.0%} of the gain is recovered is the smallest of those tried; on test prompts, except in the column",
        "that says otherwise. Concentration is (Σ|Δ|)²/(N·ΣΔ²): 1 where all entries moved alike, 0.64 for normal",
        "numbers, near 0 where few did.",
        "",
        "| pair | accuracy, base → tuned | concentration of Δ | graft | … along the search, on its own examples | "
        "largest \\|Δ\\| | largest \\|g⊙Δ\\| | movement | random |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, result in found.items():
        gap = result.gap("test")
        search = result.along_search()
        reached = search[search["recovery"] >= TARGET]["share"]
        cells = [_share(result.smallest(TARGET, file="test"))]
        cells.append(_share(reached.min() if len(reached) else np.nan))
        cells += [_share(result.smallest(TARGET, file="test", method=m)) for m in result.methods if m != "graft"]
        lines.append(
            f"| {ARMS[arm]} | {gap['base']:.2f} → {gap['tuned']:.2f} | {result.concentration:.2f} | "
            f"{' | '.join(cells)} |"
        )
    lines += ["", "## The same number of entries, chosen otherwise", ""]
    lines += ["At the smallest graft that recovers that much, masks of its size recover:", ""]
    lines += [
        "| pair | entries | share | graft | largest \\|Δ\\| | largest \\|g⊙Δ\\| | movement | random |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, result in found.items():
        level = best_level(result)
        if level is None:
            lines.append(f"| {ARMS[arm]} | not reached | | | | | | |")
            continue
        table = result.table(file="test", level=level).set_index("method")
        cells = [_interval(table.loc[m]) for m in result.methods]
        row = table.loc["graft"]
        lines.append(f"| {ARMS[arm]} | {row['entries']:,.0f} | {row['share']:.4f} | {' | '.join(cells)} |")
    lines += ["", "## What a graft keeps of the base, and how sure it is", ""]
    lines += [
        "| pair | base tasks: base | tuned | graft | calibration error: base | tuned | graft |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, result in found.items():
        level = best_level(result)
        kept = [float(np.nanmean(result.values("accuracy", file="base", method=m, level=level))) for m in SIDES]
        sure = [result.calibration(file="test", method=m, level=level)[1] for m in SIDES]
        lines.append(f"| {ARMS[arm]} | {' | '.join(f'{v:.3f}' for v in (*kept, *sure))} |")
    return lines + verdicts(found)


SIDES = ("base", "tuned", "graft")


def best_level(result: "Grafting") -> float | None:
    """The sparsity whose graft is the smallest that recovers the target on test prompts."""
    frame = result.to_frame()
    rows = frame[(frame["file"] == "test") & (frame["method"] == "graft") & (frame["recovery"] >= TARGET)]
    return float(rows.loc[rows["share"].idxmin(), "level"]) if len(rows) else None


def verdicts(found: dict[str, "Grafting"]) -> list[str]:
    """The paper's claims, and whether they hold here."""
    shares = {arm: result.smallest(TARGET, file="test") for arm, result in found.items()}
    known = {arm: s for arm, s in shares.items() if not np.isnan(s)}
    lines = ["", "## Claims", "", "| claim | here |", "|---|---|"]
    holds = sum(s <= PAPER for s in known.values())
    lines.append(
        f"| {PAPER:.2%} of the parameters recover {TARGET:.0%} | {_verdict(holds, len(shares))}: "
        f"{min(known.values()):.2%} to {max(known.values()):.2%} of the blocks, in models of "
        f"{int(next(iter(found.values())).data.attrs['entries']):,} entries |"
    )
    for kind in ("new", "select"):
        plain, penalised = shares[f"{kind}-adamw"], shares[f"{kind}-adamw-l1"]
        lines.append(
            f"| with an ℓ1 penalty AdamW's update localises in fewer entries ({kind}) | {_less(penalised, plain)}: "
            f"{_share(plain)} without, {_share(penalised)} with |"
        )
    for how in ("adamw", "sgd", "adamw-l1"):
        one, other = shares[f"select-{how}"], shares[f"new-{how}"]
        lines.append(
            f"| a selected skill needs fewer entries than a new one ({how}) | {_less(one, other)}: {_share(one)} "
            f"selected, {_share(other)} new |"
        )
    better = sum(_calibrates(r, level) for r in found.values() if (level := best_level(r)) is not None)
    lines.append(
        f"| a graft is better calibrated than the tuned model | in {better} of {len(found)} pairs the paired interval "
        "of the difference of errors is below 0 |"
    )
    kept = sum(_keeps_more(r, level) for r in found.values() if (level := best_level(r)) is not None)
    lines.append(
        f"| a graft keeps more of the base's other tasks than the tuned model | in {kept} of {len(found)} pairs the "
        "paired interval of the difference is above 0 |"
    )
    return lines


def _keeps_more(result: "Grafting", level: float) -> bool:
    from finetune_lens.stats import interval_of_mean

    mine, tuned = (result.values("accuracy", file="base", method=m, level=level) for m in ("graft", "tuned"))
    return float(interval_of_mean(mine - tuned)[0]) > 0


def _calibrates(result: "Grafting", level: float) -> bool:
    """Whether the calibration error of the graft is below the tuned model's, examples resampled together."""
    from finetune_lens.stats import calibration

    sides = [
        [result.values(name, file="test", method=m, level=level) for name in ("confidence", "accuracy")]
        for m in ("graft", "tuned")
    ]
    there = np.flatnonzero(~np.isnan(sides[0][0]))
    generator = np.random.default_rng(0)
    differences = []
    for _ in range(2000):
        at = generator.choice(there, len(there))
        one, other = (calibration(said[at], right[at])[1] for said, right in sides)
        differences.append(one - other)
    return float(np.quantile(differences, 0.975)) < 0


def together(result: "Grafting") -> list[str]:
    """Two skills in one model, as lines."""
    frame = result.overlap().set_index(["graft", "other"])
    other = next(n for n in frame.index.get_level_values("other") if n != "this")
    row = frame.loc[("this", other)]
    lines = [
        "", "## Two skills in one model", "",
        f"Grafts of the new and of the selected skill (SGD) share {int(row['shared']):,} entries: {row['overlap']:.3f} "
        f"of the latter, where chance gives {row['chance']:.3f} ({_p(row['p_value'])}). Put into the base together, "
        "the selected skill's values where both have one:", "",
        "| accuracy on | base | new skill's graft | both grafts |", "|---|---|---|---|",
    ]  # fmt: skip
    for file in ("new", "select"):
        values = [
            float(np.nanmean(result.values("accuracy", file=file, method=m)))
            for m in ("base", "graft", f"with {other}")
        ]
        lines.append(f"| {file} | {' | '.join(f'{v:.3f}' for v in values)} |")
    return lines


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value > 1e-300 else "p < 1e-300"


def _share(value: float) -> str:
    return "not reached" if np.isnan(value) else f"{value:.4f}"


def _interval(row: Any) -> str:
    return f"{row['recovery']:.2f} [{row['recovery_low']:.2f}, {row['recovery_high']:.2f}]"


def _verdict(holds: int, of: int) -> str:
    return "holds" if holds == of else "does not hold" if not holds else f"holds in {holds} of {of}"


def _less(one: float, other: float) -> str:
    """One share against another, both on a grid of sparsities: closer than a factor 1.25 is no difference."""
    if np.isnan(one) and np.isnan(other):
        return "undecided"
    if np.isnan(other) or one < other / 1.25:
        return "yes"
    return "no difference" if one < other * 1.25 else "no"


def stored(arm: str) -> "Grafting":
    """What `grafts` left of an arm."""
    return fl.load(RESULTS / f"skills-{arm}-graft.nc")


def report() -> str:
    """All tables, from the stored results."""
    lines = claims({arm: stored(arm) for arm in ARMS}) + together(fl.load(RESULTS / "skills-together.nc"))
    for arm in JOINED:
        lines += ["", f"## On one axis: {ARMS[arm]}", "", "```"]
        for name in ("recovery", "sites", "parts"):
            lines += [fl.load(RESULTS / f"skills-{arm}-{name}.nc").summary(), ""]
        lines[-1] = "```"
    return "\n".join(lines) + "\n"


def main() -> None:
    import tempfile

    from analyses.studies import Scale, Steps, chosen, require_scale
    from finetune_lens.command import Basic, run

    def skill_localization(steps: Steps = None, *, scale: Scale = "tiny", common: Basic) -> None:
        """Find the few entries of an update that carry a skill, beside all else that moves part of it."""
        todo = chosen(steps, STEPS)
        require_scale(scale, paper=NEEDS)
        if "grafts" in todo:
            for arm in ARMS:
                _keep(graft(arm, progress=common.progress), f"skills-{arm}-graft")
            with tempfile.TemporaryDirectory() as folder:
                _keep(across(Path(folder), progress=common.progress), "skills-together")
        if "axis" in todo:
            for arm in JOINED:
                found = axis(arm, progress=common.progress)
                for name, result in zip(("recovery", "sites", "parts"), found, strict=True):
                    _keep(result, f"skills-{arm}-{name}")
        if "claims" in todo:
            text = report()
            with whole_file(RESULTS / "skill_localization.md") as path:
                path.write_text(text)
            print(text)

    run(skill_localization)


def _keep(result: Any, name: str) -> None:
    with whole_file(RESULTS / f"{name}.nc") as path:
        result.save(path)


if __name__ == "__main__":
    from analyses.skill_localization import main

    main()
