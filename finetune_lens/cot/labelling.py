"""What was measured inside chains, as a labelled dataset."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.cot.chains import count
from finetune_lens.cot.study import SIDES
from finetune_lens.stream import padded

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.cot.study import Study

DIRECTIONS = ("tuned→base", "base→tuned")
PARTS = {"cuts": "kl", "heads": "kurtosis", "states": "apart", "resampling": "right_share"}
_CUT = {
    "kl": ("source", "target"), "log_kl": ("source", "target"),
    "answer_kl": ("source",), "logprob": ("source",), "changed": ("source",),
}  # fmt: skip
# Name → its dimensions behind side and question.
DIMS: dict[str, tuple[str, ...]] = {
    **_CUT, **{f"random_{name}": dims for name, dims in _CUT.items()}, "uncut_logprob": (), "rounding": (),
    "received": ("layer", "head", "source"), "kurtosis": ("layer", "head"), "null_kurtosis": ("layer", "head"),
    "right_share": ("cut",), "same_share": ("cut",), "shift": ("source",), "shift_null": ("source",),
}  # fmt: skip


def labelled(study: "Study", found: dict[str, Any]) -> "xr.Dataset":
    """What was measured of each side and question, ragged, as a dataset padded with NaN; with counts for the record.

    Args:
        found: name → of each side and question an array; `distance`; of the states `apart`, which questions were
            patched, `state_notes`, and where there are any `state_effect` and `state_gap`.
    """
    import xarray as xr

    base = study.models[0]
    measured = [study.measured(q) for q in range(len(study.questions))]
    total = [len(row) for row in study.steps]
    sizes = {"source": max(1, *measured), "target": max(1, *measured), "cut": max(1, *measured) + 1}
    sizes |= {"layer": base.layers, "head": base.heads}
    data: dict[str, Any] = {}
    for name, of in DIMS.items():
        if name in found:
            shape = tuple(sizes[d] for d in of)
            values = np.stack([padded([*side, np.full(shape, np.nan)])[:-1] for side in found[name]])
            data[name] = (("side", "question", *of), values)
    texts = [[*row[: sizes["source"]]] + [""] * (sizes["source"] - len(row)) for row in study.steps]
    lengths = np.zeros((len(texts), sizes["source"]), int)
    for row, chain in zip(lengths, study.spans, strict=True):
        row[: len(chain.ends)] = [len(chain.span(i)) for i in range(len(chain.ends))]
    data |= {
        "chain": ("question", _texts([c.text for c in study.chains])),
        "ending": ("question", _texts([c.ending for c in study.chains])),
        "steps": ("question", np.array(total)), "measured": ("question", np.array(measured)),
        "step_text": (("question", "source"), _texts(texts)), "tokens": (("question", "source"), lengths),
        "answer": (("side", "question"), _texts([[a or "" for a in side] for side in study.answers])),
        "right": (("side", "question"), np.array([
            [float(a == study.truth(q)) for q, a in enumerate(side)] for side in study.answers
        ])),
    }  # fmt: skip
    if "state_effect" in found:
        data |= _of_states(found, len(study.questions), sizes["source"])
    coords: dict[str, Any] = {"side": _texts(SIDES), "question": _texts([q.id for q in study.questions])}
    coords |= {name: np.arange(sizes[name]) for name in ("source", "target", "cut", "layer", "head")}
    if "state_effect" in data:
        coords |= {"direction": _texts(DIRECTIONS), "depth": np.arange(base.layers + 1)}
        coords["place"] = _texts(["prompt", *map(str, range(sizes["source"])), "cue"])
    used = {dim for _, values in [*((0, d) for d in data.values())] for dim in np.atleast_1d(values[0])}
    coords = {name: values for name, values in coords.items() if name in used}
    counts = {
        "chains": count(study.chains), "capped": sum(m < t for m, t in zip(measured, total, strict=True)),
        "without_steps": measured.count(0), "single_step": measured.count(1),
        "steps_without_tokens": sum(int((row[:m] == 0).sum()) for row, m in zip(lengths, measured, strict=True)),
        "unparsable": {s: sum(a is None for a in side) for s, side in zip(SIDES, study.answers, strict=True)},
        "without_answer": {s: sum(o is None for o in side) for s, side in zip(SIDES, study.own, strict=True)},
    }  # fmt: skip
    if "apart" in found:
        counts["answer_apart"] = len(found["apart"])
    record = {
        "notes": found.get("state_notes", []), "counts": counts,
        "models": {name: model.describe() for name, model in zip(SIDES, study.models, strict=True)},
    }  # fmt: skip
    return xr.Dataset(data, coords).assign_attrs(
        parts=" ".join(part for part, name in PARTS.items() if name in found), distance=found.get("distance", 0),
        provenance=json.dumps(record),
    )  # fmt: skip


def _texts(values: Any) -> np.ndarray:
    return np.array(values, dtype=object)


def _of_states(found: dict[str, Any], questions: int, sources: int) -> dict[str, Any]:
    """Effects and gaps, NaN for the questions that were not patched."""
    effect, gap, apart = found["state_effect"], found["state_gap"], found["apart"]
    steps = effect.shape[3] - 2
    whole = np.full((2, questions, effect.shape[2], sources + 2), np.nan)
    places = [*range(steps + 1), sources + 1]
    whole[np.ix_([0, 1], apart, range(effect.shape[2]), places)] = effect
    gaps = np.full((2, questions), np.nan)
    gaps[:, apart] = gap
    return {
        "state_effect": (("direction", "question", "depth", "place"), whole),
        "state_gap": (("direction", "question"), gaps),
    }
