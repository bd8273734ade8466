"""What figures of patches share: which number of a cell is shown, and how cells and tokens are called."""

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from finetune_lens.results.patching import Patching

LABELS = {
    "logit_diff": "logit difference", "logprob": "log-probability (nats)", "prob": "probability",
    "reciprocal_rank": "reciprocal rank", "accuracy": "accuracy", "kl": "KL (nats)",
}  # fmt: skip
FDR = 0.05  # a cell is clear of 0 where its p-value, adjusted over all cells of the result, is below


def chosen_direction(result: "Patching", direction: str | None) -> str:
    """The direction given, or the only one.

    Raises:
        InputError: one that was not measured, or none given where there are several.
    """
    known = result.directions
    if direction is None and len(known) == 1:
        return known[0]
    if direction not in known:
        raise InputError(f"pass direction, one of {', '.join(known)}; found {direction!r}")
    return direction


def cell_name(row: Any, dims: tuple[str, ...]) -> str:
    """`3.5` for head 5 of layer 3; with a position `3.5 @ 7`; a layer `L3`; a set's own name."""
    if dims == ("set",):
        return str(row["set"])
    name = ".".join(str(row[d]) for d in ("layer", "head") if d in dims)
    if "head" not in dims:
        name = f"L{name}" if name else ""
    elif "layer" not in dims:
        name = f"head {name}"
    return f"{name} @ {row['position']}".strip() if "position" in dims else name


def shown(token: str) -> str:
    """A token as an axis can show it."""
    return token.strip().replace("$", r"\$") or token.replace("\n", "↵").replace(" ", "␣") or "∅"


def token_labels(result: "Patching", example: str | None) -> list[str]:
    """A label each position: the token, where all examples (or the one) have it; else its number in brackets."""
    tokens = result.data["tokens"].transpose("example", "position")
    if example is not None:
        tokens = tokens.sel(example=[example])
    labels = []
    for position, column in zip(result.data["position"].values, tokens.values.T, strict=True):
        present = {str(t) for t in column if t != ""}
        labels.append(shown(present.pop()) if len(present) == 1 else f"({position})")
    return labels


def numbers(result: "Patching", direction: str, quantity: str | None, example: str | None) -> tuple[np.ndarray, str]:
    """The number of every cell (in the shape of the grid), and what it is.

    `quantity` is "recovery" or "effect"; by default recovery where donor and recipient differ clearly.

    Raises:
        InputError: another quantity, or an example that is not there.
    """
    if quantity not in (None, "recovery", "effect"):
        raise InputError(f"quantity is recovery or effect; found {quantity!r}")
    metric = LABELS[result.metric]
    if example is not None:
        if example not in result.data["example"].values:
            raise InputError(f"there is no example {example!r}; the first is {str(result.data['example'].values[0])!r}")
        one = result.data.sel(direction=direction, example=example)
        values = one[result.metric].transpose(*result.dims).values
        gap = float(one[f"donor_{result.metric}"] - one[f"recipient_{result.metric}"])
        if quantity == "recovery" or (quantity is None and gap != 0):
            return values / gap, f"recovered share of\n{metric}"
        return values, f"effect on\n{metric}"
    if quantity != "effect":
        share = result.recovery()["ratio"].sel(direction=direction).transpose(*result.dims).values
        if quantity == "recovery" or np.isfinite(share).any():
            return share, f"recovered share of\n{metric}"
    values = result.effect()["mean"].sel(direction=direction).transpose(*result.dims).values
    return values, f"effect on\n{metric}"
