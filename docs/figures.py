"""The figures of the documentation's pages: drawn from saved results, or from analyses of the pairs that ship.

    python -m docs.figures [NAME …]

writes docs/images/NAME.png. The measured ones take about a minute in all, on one core.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import finetune_lens as fl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from finetune_lens.results import Result

ROOT = Path(__file__).resolve().parents[1]
SAVED = ROOT / "analyses" / "results"
IMAGES = ROOT / "docs" / "images"
DOTS = 200  # an inch

# Page → (saved result, title of its figure).
FROM_RESULTS = {
    "probing": ("wrappers-probe-tuned-100.nc", "layers"),
    "pruning": ("wrappers-prune-tuned-100.nc", "curves"),
    "grafting": ("skills-new-sgd-graft.nc", "recovery"),
    "cmap": ("boxes-lora-z.nc", "bars"),
    "circuits": ("entity-base-paths.nc", "circuit"),
    "circuits_evaluate": ("entity-control-evaluation.nc", "faithfulness"),
}


def _strings(tuned: str) -> "fl.ModelPair":
    folder = fl.zoo.path("strings")
    return fl.ModelPair.load(folder / "base", folder / tuned)


def _prompts() -> Path:
    return fl.zoo.path("strings") / "prompts.jsonl"


def outputs() -> "Result":
    return fl.compare_outputs(_strings("full"), _prompts())


def updates() -> "Result":
    return fl.measure_updates(_strings("lora"))


def task_vectors() -> "Result":
    folder = fl.zoo.path("skills")
    tuned = ("new-adamw", "new-sgd", "select-adamw", "select-sgd")
    return fl.compare_task_vectors([fl.ModelPair.load(folder / "base", folder / one) for one in tuned])


def interpolation() -> "Result":
    return fl.interpolate(_strings("full"), _prompts(), by="layer")


def compression() -> "Result":
    return fl.compress(_strings("lora"), _prompts())


def patching() -> "Result":
    return fl.patch(fl.zoo.path("strings") / "full", _prompts(), site="resid_pre")


def attention() -> "Result":
    folder = fl.zoo.path("wrappers")
    pair = fl.ModelPair.load(folder / "base", folder / "tuned-100")
    return fl.compare_attention(pair, folder / "test-a-plain.jsonl", limit=100)


def directions() -> "Result":
    folder = fl.zoo.path("wrappers")
    pair = fl.ModelPair.load(folder / "base", folder / "tuned-100")
    return fl.find_directions(pair, folder / "test-ab.jsonl", label="operand", limit=200)


def revival() -> "Result":
    folder = fl.zoo.path("wrappers")
    return fl.revive(
        fl.ModelPair.load(folder / "base", folder / "tuned-100"), folder / "train-a.jsonl",
        evaluate={"test-a-plain": folder / "test-a-plain.jsonl"}, controls={"absent-100": folder / "absent-100"},
        lr=3e-4, steps=60, seeds=1,
    )  # fmt: skip


def chains() -> "Result":
    folder = fl.zoo.path("traces")
    pair = fl.ModelPair.load(folder / "ignoring", folder / "faithful")
    return fl.examine_chains(
        pair, folder / "questions.jsonl", format=folder / "format.json", tests=["early", "mistakes", "filler"],
        samples=3, limit=20,
    )  # fmt: skip


def inside() -> "Result":
    folder = fl.zoo.path("traces")
    pair = fl.ModelPair.load(folder / "ignoring", folder / "faithful")
    return fl.look_inside_chains(pair, folder / "questions.jsonl", format=folder / "format.json", limit=10)


def scaling() -> "Result":
    return fl.scale_intruders(_strings("lora"), {"task": _prompts()}, scales=(0, 0.5, 1, 1.5, 2))


# Page → (function that measures, title of the figure of its result).
MEASURED: dict[str, tuple[Callable[[], "Result"], str]] = {
    "outputs": (outputs, "lens"),
    "updates": (updates, "energy"),
    "task_vectors": (task_vectors, "maps"),
    "interpolation": (interpolation, "path"),
    "interpolation_groups": (interpolation, "groups"),
    "compression": (compression, "recovery"),
    "patching": (patching, "map"),
    "attention": (attention, "heads"),
    "directions": (directions, "layers"),
    "revival": (revival, "curves"),
    "cot": (chains, "curves"),
    "cot_inside": (inside, "importance"),
    "intruder_scaling": (scaling, "logprob"),
}


def draw(name: str) -> "Figure":
    """The figure of that name."""
    if name in FROM_RESULTS:
        file, title = FROM_RESULTS[name]
        return fl.plots.figures_of(fl.load(SAVED / file))[title]()
    measure, title = MEASURED[name]
    return fl.plots.figures_of(measure())[title]()


def main() -> None:
    import matplotlib

    matplotlib.use("agg")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; default all")
    IMAGES.mkdir(exist_ok=True)
    for name in parser.parse_args().names or [*FROM_RESULTS, *MEASURED]:
        draw(name).savefig(IMAGES / f"{name}.png", dpi=DOTS)
        print(f"docs/images/{name}.png")


if __name__ == "__main__":
    main()
