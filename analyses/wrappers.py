"""Wrapper or loss? A base that counts a is tuned to count b by a cue: is counting a gone, or hidden?

    python -m analyses.wrappers tune probe prune revive compare   # from the shipped models, half an hour on one core
    python -m analyses.wrappers claims                            # the tables, from the stored results, in seconds
    python -m analyses.wrappers --scale paper                     # trains all models at the paper's size: on a GPU
    python -m figures.wrappers                                    # the figures, from the stored results

The zoo's family `wrappers`, after Jain et al. 2023 (arXiv 2311.12786): one base, tuned with the cue #b = #a + 1 in none
to all of the texts; and models that never counted a, tuned likewise, by which the protocol can also answer "loss". The
five steps:

- tune: accuracy on and off the cue along the tuning itself;
- probe: is the count of a linearly readable at the answer's position, and by the same code?
- prune: does removing neurons of the largest θ·∂L/∂θ on the old task bring it back?
- revive: how many steps of training on the old task bring it back, against the models that never had it?
- compare: CKA of base and tuned model at every two depths.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import finetune_lens as fl
from finetune_lens import zoo
from finetune_lens.files import whole_file
from finetune_lens.revival import follow
from finetune_lens.tasks.pcfg import Language
from finetune_lens.zoo import wrappers_recipe as recipe

if TYPE_CHECKING:
    from finetune_lens.results.probing import Probing
    from finetune_lens.results.pruning import Pruning
    from finetune_lens.results.representations import Representations
    from finetune_lens.results.revival import Revival

HERE = Path(__file__).resolve().parent
STEPS = ("tune", "probe", "prune", "revive", "compare", "claims")
TUNED = tuple(f"tuned-{100 * cue:.0f}" for cue in recipe.CUES)
PAIRS = {name: recipe.ARMS[name][0] for name in (*TUNED, "absent-100")}  # arm → its base
FILES = {"a": "test-a-plain", "a, cue": "test-a-cue", "b": "test-b-plain", "b, cue": "test-b-cue"}
WORDS = {f"tuned-{100 * cue:.0f}": f"cue in {cue:.0%}" for cue in recipe.CUES} | {
    "absent-100": "never counted a", "absent-again": "never counted a, again", "scratch-100": "never pre-trained",
    "scratch": "fresh weights", "randFT": "wrong answers",
}  # fmt: skip
# How a model is revived: name → options beside those in `revive`.
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method": "lora", "rank": 8, "lr": 1e-3},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "lr": 1e-2},
}
RATE, MOST = 1e-4, 300
SHOWN, CONTROLS = "tuned-100", ("absent-100", "scratch-100")
PROBED = 1500
PROBED_ARMS = PRUNED = ("tuned-0", "tuned-100", "absent-100")
COMPARED = ("tuned-0", "tuned-100")


class Study:
    """The models of one scale, and where results lie; those of scale paper are trained where they are not there yet.

    Raises:
        InputError: they have to be trained, and there is no GPU.
    """

    def __init__(self, scale: str = "tiny", *, progress: bool = True):
        from analyses.studies import require_gpu

        self.settings = {"tiny": recipe.SETTINGS, "paper": recipe.PUBLISHED}[scale]
        self.folder = zoo.path("wrappers") if scale == "tiny" else Path("runs/wrappers-paper")
        self.results = HERE / "results" if scale == "tiny" else self.folder / "results"
        self.device = "auto" if scale == "paper" else "cpu"
        self.language = Language(self.settings.length)
        if scale == "paper" and not (self.folder / "scores.json").exists():
            require_gpu(f"train the family at {self.settings.layers} layers and width {self.settings.hidden}")
            work = Path("runs/.wrappers-paper.partial")
            work.mkdir(parents=True, exist_ok=True)
            recipe.build(work, settings=self.settings, progress=progress).rename(self.folder)

    def pair(self, arm: str) -> fl.ModelPair:
        return fl.ModelPair.load(self.folder / PAIRS[arm], self.folder / arm)

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    @property
    def held(self) -> dict[str, Path]:
        """The four test files: after a and after b, with the cue and without."""
        return {name: self.file(file) for name, file in FILES.items()}

    def rows(self, n: int, letter: str, cue: float | None, seed: int) -> list[dict[str, Any]]:
        """Questions after the count of a letter, drawn for this study."""
        generator = np.random.default_rng([seed, 3])
        items = self.language.draw(n, generator, families=["count"], prior=recipe.operand(letter), cue=cue)
        return self.language.rows(items)

    def stored(self, name: str) -> Any:
        return fl.load(self.results / f"wrappers-{name}.nc")

    def keep(self, result: Any, name: str) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        for name_of, values in result.data.data_vars.items():
            if "logprob" in str(name_of):  # nobody reads more of them, and rounded ones take half the space
                result.data[name_of] = values.round(2)
        with whole_file(self.results / f"wrappers-{name}.nc") as path:
            result.save(path)


def tune(study: Study, arm: str, *, progress: bool = True, **options: Any) -> "Revival":
    """The tuning of an arm once more, with the four test files measured along it."""
    cue = recipe.ARMS[arm][1]
    settings = {
        "steps": min(300, study.settings.tuning_steps),
        "lr": study.settings.tuning_rate,
        "seeds": 1,
        "threshold": 0.9,
    } | options
    rows = study.rows(20_000, "b", cue, seed=1)
    return follow(
        {"base": study.folder / PAIRS[arm]}, rows, evaluate=study.held, batch=study.settings.batch,
        device=study.device, progress=progress, **settings,
    )  # fmt: skip


def probe(study: Study, arm: str, *, progress: bool = True, **options: Any) -> "Probing":
    """The count of a, read off the answer's position of questions after it."""
    rows = [row | {"count": float(row["label"])} for row in study.rows(PROBED, "a", None, seed=2)]
    return fl.probe(study.pair(arm), rows, label="count", device=study.device, progress=progress, **options)


def prune(study: Study, arm: str, *, progress: bool = True, **options: Any) -> "Pruning":
    """Neurons removed by their score on questions after a."""
    held = {name: path for name, path in study.held.items() if name != "a"}
    return fl.prune(
        study.pair(arm),
        study.rows(1000, "a", None, seed=5),
        evaluate=held,
        device=study.device,
        progress=progress,
        **options,
    )


def revive(study: Study, way: str, *, progress: bool = True, **options: Any) -> "Revival":
    """Every arm trained to count a again, beside the models that never did; of other ways than "full" one arm alone."""
    settings = {"lr": RATE, "steps": MOST, "device": study.device, "progress": progress} | WAYS[way] | options
    others = [name for name in recipe.ARMS if name != SHOWN] if way == "full" else ["absent-100"]
    return fl.revive(
        study.pair(SHOWN), study.file("train-a"), evaluate=study.held, scratch=way == "full",
        controls={name: study.folder / name for name in others}, random_steps=MOST if way == "full" else 0, **settings,
    )  # fmt: skip


def seen_from(result: "Revival", arm: str) -> "Revival":
    """The same runs with `arm` as the tuned model, beside its controls and fresh weights alone.

    The control of `absent-100`, which never counted a, is `absent-again`: by it the protocol can answer "loss".
    """
    controls = ("absent-again",) if arm == "absent-100" else CONTROLS
    mine = "tuned" if arm == SHOWN else arm
    data = result.data.sel(start=[name for name in result.starts if name in (mine, *controls, "scratch")]).copy()
    roles = ["tuned" if n == mine else "scratch" if n == "scratch" else "control" for n in data.start.values]
    data["role"] = ("start", np.array(roles, dtype=object))
    return type(result)(data)


def compare(study: Study, arm: str, *, progress: bool = True, **options: Any) -> "Representations":
    """Base and arm on texts after a and b, every token a row; beside them the base that never counted a."""
    texts = [row["prompt"] for letter in "ab" for row in study.rows(200, letter, None, seed=4)]
    null = [study.folder / "absent"] if PAIRS[arm] == "base" else [study.folder / "base"]
    return fl.compare_representations(
        study.pair(arm), texts, pool="each", null=null, device=study.device, progress=progress, **options
    )


def claims(study: Study) -> list[str]:
    """Every table, each number from the stored results."""
    tuning = {arm: study.stored(f"tune-{arm}") for arm in TUNED}
    probing = {arm: study.stored(f"probe-{arm}") for arm in PROBED_ARMS}
    pruning = {arm: study.stored(f"prune-{arm}") for arm in PRUNED}
    revived = {way: study.stored(f"revive-{way}") for way in WAYS}
    lines = [
        "# Wrapper or loss?",
        "",
        "Printed by `python -m analyses.wrappers claims`. A base counts a and not b; it is tuned to count b, with the "
        "cue #b = #a + 1 in a share of the texts (C_Tr). Accuracies are of held-out texts, brackets 95 % intervals.",
        "",
        "## Along the tuning",
        "",
        "Accuracy on questions after a and after b, on texts without and with the cue, by steps of tuning.",
        "",
        f"| C_Tr | steps | {' | '.join(FILES)} |",
        f"|---|---|{'---|' * len(FILES)}",
    ]
    for arm, result in tuning.items():
        frames = {file: result.curves(file).set_index("step")["accuracy"] for file in FILES}
        steps = [step for step in (0, 10, 30, 100, 1000) if step in frames["a"].index]
        for step in dict.fromkeys([*steps, int(result.steps[-1])]):
            cells = " | ".join(f"{frames[file][step]:.2f}" for file in FILES)
            lines.append(f"| {recipe.ARMS[arm][1]:.0%} | {step} | {cells} |")
    lines += ["", "## Probes: the count of a, at the answer's position", ""]
    lines += ["R² of ridge regression at the depth that is best for each model, on questions after a.", ""]
    lines += [
        "| pair | base | tuned | tuned − base | base's probe on the tuned model, means equal |",
        "|---|---|---|---|---|",
    ]
    for arm, result in probing.items():
        best = {side: result.best(side) for side in ("base", "tuned")}
        at = result.differences().set_index("depth").loc[best["tuned"]["depth"]]
        cells = [_number(best[side], "score") + f" at depth {best[side]['depth']}" for side in best]
        cells += [f"{at['difference']:+.2f} [{at['low']:+.2f}, {at['high']:+.2f}]", _number(best["tuned"], "centred")]
        lines.append(f"| {PAIRS[arm]} → {arm} | {' | '.join(cells)} |")
    lines += ["", "## Pruning: neurons of the largest θ·∂L/∂θ on questions after a", ""]
    lines += ["| pair | unpruned | best of the curve | commonest answer | revives |", "|---|---|---|---|---|"]
    for arm, result in pruning.items():
        frame, row = result.revivals(), result.unpruned().set_index("file").loc["task"]
        best = frame.loc[frame["mean"].idxmax()]
        at = [str(int(c)) for c in frame.loc[frame["revives"], "count"]]
        lines.append(
            f"| {PAIRS[arm]} → {arm} | {row['tuned']:.2f} | {best['mean']:.2f} without {int(best['count'])} | "
            f"{row['commonest']:.2f} | {'without ' + ', '.join(at) if at else 'no'} |"
        )
    lines += ["", "## Revival: steps of training to count a again", ""]
    one = revived["full"]
    lines += [
        f"Threshold {one.threshold:.2f} on texts without the cue; {one.data.sizes['seed']} seeds of "
        f"{int(one.steps[-1])} steps; rate {one.provenance['arguments']['lr']:g}, AdamW, all weights. Ratio: steps of "
        "the control over the arm's.",
        "",
        "| arm | steps | control | its steps | ratio | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for arm in (*TUNED, "absent-100"):
        lines += _revival_rows(seen_from(one, arm), arm)
    frame = one.crossings().set_index("start")
    lines += ["", f"After training on wrong answers (randFT): {_steps(frame.loc['randFT'])} steps.", ""]
    for way in WAYS:
        if way != "full":
            result = revived[way]
            frame = result.crossings().set_index("start")
            lines.append(
                f"{SHOWN} by {way}: {_steps(frame.loc['tuned'])} steps, absent-100 {_steps(frame.loc['absent-100'])}; "
                f"ratio {_ratio(frame.loc['absent-100'])}."
            )
    return lines + verdicts(study, tuning, probing, pruning, one)


def _revival_rows(result: "Revival", arm: str) -> list[str]:
    frame = result.crossings().set_index("role", drop=False)
    mine, (word, _) = frame.loc["tuned"], result.verdict()
    rows = []
    for _, control in frame[frame["role"] != "tuned"].iterrows():
        cells = [arm, _steps(mine), control["start"], _steps(control), _ratio(control), word]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def verdicts(
    study: Study, tuning: dict[str, "Revival"], probing: dict[str, "Probing"], pruning: dict[str, "Pruning"],
    revived: "Revival",
) -> list[str]:  # fmt: skip
    """The paper's claims, and whether they hold here."""
    last = {file: tuning["tuned-100"].curves(file)["accuracy"].iloc[-1] for file in FILES}
    found = [
        (
            "with the cue in every text the tuned model follows the cue: right with it, wrong without",
            last["b, cue"] > 0.9 and last["b"] < 0.1,
            f"{last['b, cue']:.2f} and {last['b']:.2f}",
        )
    ]
    plain = tuning["tuned-0"].curves("b")["accuracy"].iloc[-1]
    found.append(
        ("without the cue the new task is learnt itself", plain > 0.9, f"{plain:.2f} on texts without the cue")
    )
    reads = {arm: result.best("tuned") for arm, result in probing.items()}
    never = reads["absent-100"]["score"]
    for arm in ("tuned-100", "tuned-0"):
        value, kept = reads[arm]["score"], reads[arm]["centred"]
        found.append((
            f"that the old count is linearly readable shows that it was kept ({WORDS[arm]})", value > 0.9 > never,
            f"R² {value:.2f}, but {never:.2f} in a model that never counted a",
        ))  # fmt: skip
        found.append((
            f"the old count is in the base's code: its probe reads the tuned model ({WORDS[arm]})", kept > 0.9,
            f"R² {kept:.2f}, the means made equal",
        ))  # fmt: skip
    for arm, result in pruning.items():
        frame = result.revivals()
        there = bool(frame["revives"].any())
        text = f"best {frame['mean'].max():.2f} from {result.unpruned().set_index('file').loc['task', 'tuned']:.2f}"
        if arm == "absent-100":
            found.append(("pruning brings nothing back where the skill was never there", not there, text))
        else:
            found.append((f"pruning some neurons brings the old count back ({WORDS[arm]})", there, text))
    for arm in TUNED:
        word, why = seen_from(revived, arm).verdict()
        found.append((f"revival is faster than in models that never had it ({WORDS[arm]})", word == "wrapped", why))
    word, why = seen_from(revived, "absent-100").verdict()
    found.append(("the protocol answers loss where the skill was never there", word == "lost", why))
    lines = ["", "## Claims", "", "| claim | here | measured |", "|---|---|---|"]
    return lines + [f"| {claim} | {'holds' if holds else 'does not hold'} | {text} |" for claim, holds, text in found]


def _number(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


def _steps(row: Any) -> str:
    shown = [f"> {MOST}" if np.isinf(row[name]) else f"{row[name]:.0f}" for name in ("steps", "low", "high")]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _ratio(row: Any) -> str:
    low, high = (f"{row[f'ratio_{end}']:.2f}" if np.isfinite(row[f"ratio_{end}"]) else "∞" for end in ("low", "high"))
    return f"> {low}" if np.isnan(row["ratio"]) else f"{row['ratio']:.2f} [{low}, {high}]"


def main() -> None:
    from analyses.studies import Scale, Steps, chosen, require_scale
    from finetune_lens.command import Basic, run

    def wrappers(steps: Steps = None, *, scale: Scale = "tiny", common: Basic) -> None:
        """Ask whether a skill was lost in tuning or hidden: by its course, by probes, by pruning, by training back."""
        todo = chosen(steps, STEPS)
        require_scale(scale)
        study = Study(scale, progress=common.progress)
        for step, names, work in (
            ("tune", TUNED, tune), ("probe", PROBED_ARMS, probe), ("prune", PRUNED, prune), ("revive", WAYS, revive),
            ("compare", COMPARED, compare),
        ):  # fmt: skip
            for name in names if step in todo else ():
                study.keep(work(study, name, progress=common.progress), f"{step}-{name}")
        if "claims" in todo:
            text = "\n".join(claims(study)) + "\n"
            with whole_file(study.results / "wrappers.md") as path:
                path.write_text(text)
            print(text)

    run(wrappers)


if __name__ == "__main__":
    from analyses.wrappers import main

    main()
