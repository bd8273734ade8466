"""The README's figure and table: intruder dimensions of one task learnt by full fine-tuning and by LoRA.

    make demo && .venv/bin/python figures/demo.py

Reads what the demo saved in runs/demo; writes figures/demo.png and .pdf and the table in README.md.
"""

import argparse
import re
from pathlib import Path

import numpy as np

import finetune_lens as fl
from finetune_lens import demo
from finetune_lens.plots import _style

ROOT = Path(__file__).resolve().parents[1]
STUDY, CLAIMS = "make demo", ""
GALLERY = {
    "demo": (
        "One task, learnt twice",
        "Intruder dimensions of one task learnt by full fine-tuning and by LoRA, and what chance gives.",
    ),
}
RUNS = ROOT / "runs" / "demo"
BLOCK = re.compile(r"(<!-- demo: .*? -->\n).*?(<!-- /demo -->)", re.DOTALL)
COLOURS = {"full": "#0072B2", "lora": "#D55E00"}


def with_table(readme: str, table: str) -> str:
    """The README's text with the table between its markers replaced."""
    return BLOCK.sub(lambda found: f"{found[1]}{table}\n{found[2]}", readme)


def draw(results: dict) -> "object":
    """Count against ε with the band of chance (left); size and novelty of every leading vector (right)."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    epsilons = np.linspace(0.02, 0.98, 97)
    with _style.styled():
        axes = _style.new_axes(width=_style.PAGE, height=2.4, columns=2)
        for method, colour in COLOURS.items():
            found = results[method]["intruders"]
            counts = found.grid(epsilons, [found.k], side="left").values[:, 0]
            nulls = [found.null(epsilon=e, side="left") for e in epsilons]
            axes[0].fill_between(
                epsilons, [n.low for n in nulls], [n.high for n in nulls], color=colour, alpha=0.2, lw=0
            )
            axes[0].plot(epsilons, counts, color=colour, zorder=3)
            top = found.to_frame()
            top = top[top["side"] == "left"]
            axes[1].scatter(top["sigma"], top["max_cos"], s=5, lw=0, color=colour, alpha=0.7)
        epsilon, k = found.epsilon, found.k
        axes[0].axvline(epsilon, color="0.3", lw=0.5, ls=":")
        axes[1].axhline(epsilon, color="0.3", lw=0.5, ls=":")
        axes[0].set(xlabel=f"threshold ε  (top {k} left singular vectors)", ylabel="intruder dimensions", xlim=(0, 1))
        axes[0].set_ylim(bottom=0)
        axes[1].set(
            xlabel="$σ_j$ of the tuned weights", ylabel="max$_i$ |cos| with the base", ylim=(0, 1.02), xscale="log"
        )
        _style.plain_logarithmic(axes[1].xaxis)
        handles = [Line2D([], [], color=c, label=demo.METHODS[m]) for m, c in COLOURS.items()]
        handles.append(Patch(color="0.8", label="chance, the update's own spectrum (95 %)"))
        axes[0].figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return axes[0].figure


def figures(runs: Path = RUNS) -> dict:
    """From what the demo saved, by the names of their files; none where it has not run."""
    return {"demo": draw(saved(runs))} if runs.is_dir() else {}


def saved(runs: Path) -> dict:
    return {m: {n: fl.load(runs / m / f"{n}.nc") for n in ("intruders", "updates")} for m in demo.METHODS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS)
    runs = parser.parse_args().runs
    results = saved(runs)
    figure = draw(results)
    for kind, told in (("png", {}), ("pdf", {"CreationDate": None})):
        figure.savefig(ROOT / "figures" / f"demo.{kind}", metadata=told)
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), demo.table(results)))


if __name__ == "__main__":
    main()
