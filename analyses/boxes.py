"""Where does the gain live? Cross-model patching on the zoo's pair `boxes`.

    python -m analyses.boxes                 # a minute; analyses/results/boxes.md, and the heads' results
    python -m figures.boxes                  # the figure, from the stored results

Three arms were tuned from one base: `tuned` and `lora` on registers, with no box among them, `control` on boxes. On the
same prompts about boxes each arm's activations are put into the base, and the base's into the arm (CMAP, Prakash et al.
2024, arXiv 2402.14811, §5): of single heads (z, through the recipient's own W_O), and of whole layers' attention and
MLP. Beside every effect stands that of a donor which read another prompt.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import finetune_lens as fl
from finetune_lens import zoo
from finetune_lens.files import whole_file

if TYPE_CHECKING:
    from finetune_lens.results.cmap import CrossPatching
    from finetune_lens.results.outputs import Outputs

RESULTS = Path(__file__).resolve().parent / "results"
ARMS = {"tuned": "registers, all parameters", "lora": "registers, LoRA", "control": "boxes (positive control)"}
SITES = {"z": "one head (z)", "attn_out": "attention of a layer", "mlp_out": "MLP of a layer"}
GRIDS = {"z": ["layer", "head"], "attn_out": ["layer"], "mlp_out": ["layer"]}


def measure(arm: str, *, progress: bool = True) -> tuple["Outputs", dict[str, "CrossPatching"]]:
    """Outputs of base and arm on the prompts, and the effects of patches by site; the trust gate comes first."""
    folder = zoo.path("boxes")
    pair = fl.ModelPair.load(folder / "base", folder / arm)
    prompts = folder / "prompts.jsonl"
    outputs = fl.compare_outputs(pair, prompts, lens=False, progress=progress)
    return outputs, {
        site: fl.cross_patch(pair, prompts, site=site, by=GRIDS[site], progress=progress) for site in SITES
    }


def stored(arm: str) -> "CrossPatching":
    """The patches of single heads that `main` left."""
    return fl.load(RESULTS / f"boxes-{arm}-z.nc")


def report(found: dict[str, tuple["Outputs", dict[str, "CrossPatching"]]]) -> str:
    """The table of claims, every number from the results."""
    lines = [
        "# Where the gain on boxes lives",
        "",
        "Printed by `python -m analyses.boxes`. Effects on the logit difference of the right object and a wrong one of",
        "the same scene; 95 % intervals over prompts; a cell is named where its effect is clear of 0 at a false",
        "discovery rate of 5 % over the cells of its table, and of the effect of a donor on another prompt.",
    ]
    for arm in found:
        words, (outputs, patches) = ARMS[arm], found[arm]
        table = outputs.table().set_index("measure")
        accuracy = table.loc["answer: accuracy"]
        verdict = "rises" if accuracy["low"] > 0 else "falls" if accuracy["high"] < 0 else "does not change clearly"
        lines += ["", f"## {arm}: {words}", "", f"Accuracy on boxes {verdict}.", ""]
        lines += ["| | base | tuned | difference |", "|---|---|---|---|"]
        for name in ("accuracy", "logit_diff"):
            row = table.loc[f"answer: {name}"]
            span = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
            lines.append(f"| {name.replace('_', ' ')} | {row['base']:.2f} | {row['tuned']:.2f} | {span} |")
        for site, result in patches.items():
            lines += _cells(site, result)
    return "\n".join(lines) + "\n"


def _cells(site: str, result: "CrossPatching") -> list[str]:
    frame = result.to_frame()
    clear = frame[(frame["p_adjusted"] < 0.05) & ((frame["specific_low"] > 0) | (frame["specific_high"] < 0))]
    lines = ["", f"{SITES[site]}, {len(clear)} of {len(frame)} effects clear of 0 and of the other prompt:", ""]
    lines += ["| direction | where | effect | recovery | donor on another prompt |", "|---|---|---|---|---|"]
    for direction in result.directions:
        part = clear[clear["direction"] == direction]
        part = part.reindex(part["effect"].abs().sort_values(ascending=False, kind="stable").index).head(4)
        for row in part.to_dict("records"):
            lines.append(
                f"| {direction} | {_where(row)} | {_span(row)} | {_share(row)} | {row['random_effect']:+.2f} |"
            )
    return lines


def _where(row: dict[str, Any]) -> str:
    return f"layer {row['layer']}" + (f", head {row['head']}" if "head" in row else "")


def _span(row: dict[str, Any]) -> str:
    return f"{row['effect']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


def _share(row: dict[str, Any]) -> str:
    return "undefined" if row["recovery"] != row["recovery"] else f"{row['recovery']:.2f}"


def main() -> None:
    found = {}
    for arm in ARMS:
        found[arm] = measure(arm)
        with whole_file(RESULTS / f"boxes-{arm}-z.nc") as path:
            found[arm][1]["z"].save(path)
    text = report(found)
    with whole_file(RESULTS / "boxes.md") as path:
        path.write_text(text)
    print(text)


if __name__ == "__main__":
    from analyses.boxes import main

    main()
