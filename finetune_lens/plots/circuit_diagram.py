"""A circuit: which heads, in which layers, at which positions, and what feeds what."""

import re
from collections import Counter
from collections.abc import Mapping
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.plots._style import COLUMN, PAGE, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

Box = tuple[float, float, float, float]  # left, right, lowest layer, highest layer

NAME, GAP = 0.64, 0.3  # inches: a group's name, between groups
MARKED, LETTER = 0.14, 0.045  # inches: a mark, and a letter of its label on its right
ASIDE = 0.3  # of a mark and its label, how far the mark is left of the middle
LINE = 12  # letters of a name in a line
LABEL_TYPE = 5.5  # pt
SMALLEST, LARGEST, PLAIN = 4, 60, 14  # pt²: a mark of score 0, of the largest |score|, where there are no scores
ROOM = 26  # pt below the lowest group for its name, and above the last layer for the logits
MENTIONS = {"first": 0, "last": -1, "": -1}


def circuit_diagram(circuit: Any, *, ax: "Axes | None" = None) -> "Axes":
    """Heads by position (columns, in the order of the prompt) and layer, a colour a group, larger marks for larger
    |score| where there are scores. Arrows lead from each group to the receivers that it was found by, as the circuit's
    steps say (else to the group before it, and from the first to the logits), with what is read there (q, k, v). Heads
    are named (`layer.head`) where all names have room.

    Columns of several fields, and groups of one position, stand in the reverse order of discovery, earlier text first.

    Args:
        circuit: a circuit, or the mapping that its file holds: {"groups": {NAME: {"position": -1, "heads": [[2, 0], …],
            "scores": […]}}, "model": {"layers": 3}}, groups in the order of discovery, from the output back.

    Raises:
        InputError: no groups of heads.
    """
    import matplotlib as mpl

    groups, layers = _parts(circuit)
    slot = MARKED + LETTER * max(len(f"{layer}.{head}") for _, heads, _ in groups.values() for layer, head in heads)
    boxes = _boxes(groups, slot)
    width = max(box[1] for box in boxes.values()) + GAP / 2
    with styled():
        if ax is None:
            height = 0.8 + min(7.3, 0.9 + 0.11 * layers)
            (ax,) = new_axes(width=COLUMN if width < COLUMN - 0.4 else PAGE, height=height)
        cycle = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
        colours = {name: cycle[i % len(cycle)] for i, name in enumerate(groups)}
        most = max((abs(s) for _, _, scores in groups.values() for s in scores), default=0)
        _draw_axes(ax, groups, boxes, layers, width)
        if most:
            ax.set_title(f"larger mark: larger |score|, up to {most:.2g}")
        ax.figure.draw_without_rendering()  # the room for words is measured
        height = 72 * ax.bbox.height / ax.figure.dpi
        room = ROOM * layers / max(height - 2 * ROOM, height / 3)
        ax.set_ylim(min(-0.5, min(box[2] for box in boxes.values()) - 0.5 - room), layers - 0.5 + room)
        _draw_arrows(ax, boxes, _receivers(circuit, list(groups)))
        texts, marks, drawn = [], [], []
        for name, (_, heads, scores) in groups.items():
            _draw_box(ax, boxes[name], name, colours[name])
            places = _places(heads, boxes[name], slot)
            areas = np.full(len(heads), float(PLAIN))
            if scores and most:
                areas = SMALLEST + (LARGEST - SMALLEST) * np.abs(scores) / most
            drawn.append(ax.scatter(*places.T, s=areas, color=colours[name], lw=0, zorder=3))
            for (layer, head), place, radius in zip(heads, places, np.sqrt(areas / np.pi), strict=True):
                marks.append((*place, radius))
                texts.append(
                    ax.annotate(
                        f"{layer}.{head}", place, xytext=(radius + 1, -0.3), textcoords="offset points", va="center",
                        fontsize=LABEL_TYPE, color="0.2", zorder=4,
                    )
                )  # fmt: skip
        if _crowded(ax, texts, np.array(marks)):
            for text in texts:
                text.remove()
            for points in drawn:
                points.set_offsets(np.add(points.get_offsets(), (ASIDE * slot, 0)))
    return ax


def _parts(circuit: Any) -> tuple[dict[str, tuple[Any, list[tuple[int, int]], list[float]]], int]:
    """Group → position, heads, scores; and the number of layers, up to the last with a head where it is not said."""

    def part(whole: Any, name: str) -> Any:
        return whole.get(name) if isinstance(whole, Mapping) else getattr(whole, name, None)

    given = part(circuit, "groups")
    if not isinstance(given, Mapping) or not given or not all(part(group, "heads") for group in given.values()):
        raise InputError(
            'expected a circuit, {"groups": {NAME: {"position": -1, "heads": [[LAYER, HEAD], …]}}}, each group with a '
            f"head; found {type(circuit).__name__} with groups {str(given)[:60]}"
        )
    groups = {
        name: (part(group, "position"), [tuple(h) for h in part(group, "heads")], [*(part(group, "scores") or ())])
        for name, group in given.items()
    }
    last = max(layer for _, heads, _ in groups.values() for layer, _ in heads)
    return groups, max(part(part(circuit, "model") or {}, "layers") or 0, last + 1)


def _receivers(circuit: Any, names: list[str]) -> dict[str, tuple[str, str]]:
    """Group → what of which group it leads to; "" is the logits."""
    task = circuit.get("task") if isinstance(circuit, Mapping) else getattr(circuit, "task", None)
    steps = (task or {}).get("steps", {})
    found = {}
    for before, name in zip(["", *names], names, strict=False):
        read, _, of = steps.get(name, {}).get("to", "").partition(" of ")
        found[name] = (read, of) if of in names else ("", "" if read == "the logits" else before)
    return found


def _boxes(groups: Mapping[str, Any], slot: float) -> dict[str, Box]:
    """What each group takes up, in the order of discovery: side by side, in inches and layers. A head has a `slot`."""
    backwards = list(reversed(groups))
    fields = list(dict.fromkeys(re.split("[:+-]", str(groups[name][0]))[0] for name in backwards))

    def place(name: str) -> tuple[int, int, int]:
        position = groups[name][0]
        if isinstance(position, int):
            return (0 if position >= 0 else 2, 0, position)
        field, _, which = re.sub(r"[+-]\d+$", "", position).partition(":")
        number = MENTIONS.get(which, int(which) if which.lstrip("-").isdigit() else 0)
        return 1, fields.index(field), number if number >= 0 else number + 10**6  # mentions from the end come after

    boxes, left = {}, GAP / 2
    for name in sorted(backwards, key=place):
        layers = [layer for layer, _ in groups[name][1]]
        width = max(NAME, slot * max(Counter(layers).values()))
        boxes[name] = (left, left + width, min(layers), max(layers))
        left += width + GAP
    return {name: boxes[name] for name in groups}


def _places(heads: list[tuple[int, int]], box: Box, slot: float) -> np.ndarray:
    """(head, 2): x and y of each; those of one layer side by side in the order of their numbers, in the middle."""
    number, done = Counter(layer for layer, _ in heads), Counter()
    places = {}
    for layer, head in sorted(heads):
        x = (box[0] + box[1]) / 2 + slot * (done[layer] - (number[layer] - 1) / 2 - ASIDE)
        places[layer, head] = (x, layer)
        done[layer] += 1
    return np.array([places[head] for head in heads])


def _draw_box(ax: "Axes", box: Box, name: str, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, right, low, high = box
    ax.add_patch(
        FancyBboxPatch(
            (left, low - 0.45), right - left, high - low + 0.9, boxstyle="round,pad=0,rounding_size=0.06",
            mutation_aspect=4, fc=(colour, 0.09), ec=(colour, 0.5), lw=0.6, zorder=1,
        )
    )  # fmt: skip
    ax.annotate(
        fill(name.replace("_", " "), LINE), ((left + right) / 2, low - 0.45), xytext=(0, -2), fontsize=7, color=colour,
        textcoords="offset points", ha="center", va="top", linespacing=1.05, zorder=5,
    )  # fmt: skip


def _draw_arrows(ax: "Axes", boxes: Mapping[str, Box], receivers: Mapping[str, tuple[str, str]]) -> None:
    """From each group to its receivers, with what they read, or to the word "logits"."""
    style = {"arrowstyle": "-|>", "color": "0.4", "lw": 0.8, "mutation_scale": 7, "shrinkA": 1, "shrinkB": 1}
    for name, (read, to) in sorted(receivers.items(), key=lambda item: not item[1][1]):
        source = boxes[name]
        if not to:
            left, right, _, high = source
            middle = (left + right) / 2
            ax.annotate(
                "logits", (middle, high + 0.45), (middle, ax.get_ylim()[1]), ha="center", va="top", fontsize=7,
                color="0.25", arrowprops=style | {"arrowstyle": "<|-"},
            )  # fmt: skip
            continue
        target = boxes[to]
        ahead = source[0] < target[0]
        beside = abs(source[int(ahead)] - target[int(not ahead)]) < 1.5 * GAP
        if beside:  # nearest edges face each other
            ends = [(box[side], (box[2] + box[3]) / 2) for box, side in ((source, ahead), (target, not ahead))]
            bend = 0.0
        else:  # over what stands between, from above to the nearer upper corner
            ends = [((source[0] + source[1]) / 2, source[3] + 0.45), (target[int(not ahead)], target[3] + 0.2)]
            bend = -0.25 if ahead else 0.25
        ax.annotate("", ends[1], ends[0], arrowprops=style | {"connectionstyle": f"arc3,rad={bend}"}, zorder=2)
        if read:
            middle = [sum(end[i] for end in ends) / 2 for i in (0, 1)]
            ax.annotate(
                read, middle if beside else ends[0], xytext=(0, 0 if beside else 6), textcoords="offset points",
                ha="center", va="center", fontsize=7, color="0.25", zorder=3,
                bbox={"fc": "white", "ec": "none", "boxstyle": "round,pad=0.1"},
            )  # fmt: skip


def _draw_axes(ax: "Axes", groups: Mapping[str, Any], boxes: Mapping[str, Box], layers: int, width: float) -> None:
    from matplotlib.ticker import MaxNLocator

    spans: dict[Any, list[float]] = {}
    for name, (left, right, _, _) in boxes.items():
        span = spans.setdefault(groups[name][0], [left, right])
        span[:] = min(span[0], left), max(span[1], right)
    names = ["last token" if p == -1 else f"token {p}".replace("-", "−") if isinstance(p, int) else p for p in spans]
    ax.set_xticks([sum(span) / 2 for span in spans.values()], names)
    for left, _ in spans.values():
        if left > GAP:
            ax.axvline(left - GAP / 2, color="0.85", lw=0.6, zorder=0)
    ax.set(xlim=(0, width), xlabel="position", ylabel="layer")
    ax.tick_params(axis="x", length=0)
    ticks = np.arange(layers) if layers <= 12 else MaxNLocator(10, integer=True).tick_values(0, layers - 1)
    ax.set_yticks([tick for tick in ticks if 0 <= tick < layers])
    ax.spines["left"].set_bounds(0, layers - 1)


def _crowded(ax: "Axes", texts: "list[Text]", marks: np.ndarray) -> bool:
    """Whether a label touches another, or a mark that is not its own (marks: x, y, radius in pt)."""
    ax.figure.draw_without_rendering()
    labels = np.array([text.get_window_extent().extents for text in texts])
    centres, radii = ax.transData.transform(marks[:, :2]), marks[:, 2:] * ax.figure.dpi / 72
    discs = np.hstack([centres - radii, centres + radii])

    def touch(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        meet = (one[:, None, :2] < other[None, :, 2:]) & (other[None, :, :2] < one[:, None, 2:])
        return meet.all(-1) & ~np.eye(len(one), dtype=bool)

    return bool(touch(labels, labels).any() or touch(labels, discs).any())
