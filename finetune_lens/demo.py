"""The pair that ships, analysed: one new task learnt by full fine-tuning and by LoRA, and what each did to the weights.

`make demo` runs this. Everything is saved under runs/demo, a folder a method, as the commands would save it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from finetune_lens.results import Result

METHODS = {"full": "full fine-tuning", "lora": "LoRA"}


def analyse(out: Path, *, figures: bool = True, progress: bool = True) -> dict[str, dict[str, "Result"]]:
    """Both analyses of both tuned models of the zoo's `strings`; by method, then by analysis."""
    import finetune_lens as fl
    from finetune_lens.command import OutputFolder

    folder = fl.zoo.path("strings")
    results: dict[str, dict[str, Result]] = {}
    for method in METHODS:
        pair = fl.ModelPair.load(folder / "base", folder / method)
        results[method] = {
            "updates": fl.measure_updates(pair, progress=progress),
            "intruders": fl.find_intruders(pair, side="both", progress=progress),
        }
        for name, result in results[method].items():
            target = OutputFolder(out / method, name, force=True)
            target.write(result)
            if figures:
                target.draw(fl.plots.figures_of(result))
    return results


def table(results: dict[str, dict[str, "Result"]]) -> str:
    """What each method learnt, forgot and did to the weights, as a Markdown table."""
    from finetune_lens import zoo
    from finetune_lens.tasks.strings import NEW_TASK

    scores = json.loads((zoo.path("strings") / "scores.json").read_text())["models"]
    rows: dict[str, list[str]] = {}
    for method in METHODS:
        updates, intruders = results[method]["updates"], results[method]["intruders"]
        size = updates.headline()
        test = scores[method]["test"][NEW_TASK]
        cells = {
            f"new task, accuracy (base {scores['base']['test'][NEW_TASK]['accuracy']:.3f})": _interval(test),
            "base tasks, mean drop of accuracy": f"{scores[method]['forgetting']:.3f}",
            "size of the update, ‖Δ‖/‖W0‖": f"{size['relative_norm']:.3f}",
            "effective rank of Δ, median": f"{float(intruders.data.effective_rank.median()):.1f}",
        }
        for side in intruders.sides:
            vectors = intruders.table("all", side=side)["vectors"].item()
            cells[f"intruder dimensions, {side} (of {vectors})"] = f"**{intruders.count(side=side)}**"
            cells[f"… by chance, Δ's own spectrum, {side}"] = str(intruders.null(side=side))
        for label, cell in cells.items():
            rows.setdefault(label, []).append(cell)
    lines = ["| | " + " | ".join(METHODS.values()) + " |", "|---|" + "---|" * len(METHODS)]
    return "\n".join(lines + [f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items()])


def _interval(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    import typer

    from finetune_lens.command import Basic, run

    def demo(
        *,
        out: Annotated[Path, typer.Option(help="Output folder; what is there is replaced.")] = Path("runs/demo"),
        common: Basic,
    ) -> None:
        """Analyse the pair that ships: one new task learnt by full fine-tuning and by LoRA."""
        common.say("One base model, one new task, learnt twice: by full fine-tuning and by LoRA.")
        results = analyse(out, progress=common.progress)
        print(table(results))
        for method, title in METHODS.items():
            print(f"\n{title}\n{results[method]['intruders'].summary()}")
        print("\nfigures:")
        for figure in sorted(out.glob("*/figures/*.png")):
            print(f"  {figure}")

    run(demo)


if __name__ == "__main__":
    from finetune_lens.demo import main

    main()
