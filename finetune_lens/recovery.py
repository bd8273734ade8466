"""How much of the update, of its directions or of a run has to move for the behaviour to move with it?

Grafts and masks, layer swaps, interpolation, compression, intruders kept or removed, and patches move a share s of the
parameters, directions or sites from the tuned model into the base. All are read on one axis:

    recovery(s) = (metric at s − metric of the base) / (metric of the tuned model − metric of the base),

a ratio of means over examples, which are resampled with numerator and denominator together. A curve is summed up by

    area = ∫₀¹ recovery(s) ds      trapezoids from (0, 0) through the measured points to the one measured at s = 1

and by the smallest measured share whose recovery is 0.95 or more. Where nothing was measured at s = 1, nothing is put
in its place: `area` is NaN, and the integral as far as the curve reaches is `area_measured`. Points of which none
leads to the next (each layer alone, several models at one share) are alternatives, not a curve, and have no area. A
method by which a few parameters carry all has an area near 1, a response that is straight in s one of 0.5.

Works on saved results alone: no model is run. Cost: 10,000 resamples a curve, seconds in all.

>>> import numpy as np
>>> from finetune_lens.results.curves import Curve
>>> from finetune_lens.results.recovery import of_curves
>>> zero, one = np.zeros(4), np.ones(4)
>>> sharp = Curve("sharp", "parameters", np.array([0.01, 1]), np.stack([one, one]), zero, one, ["", ""])
>>> round(float(of_curves({"sharp": sharp}).table()["area"][0]), 3)
0.995
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.curves import Curve
from finetune_lens.results.provenance import recorded
from finetune_lens.results.sources import Sources

if TYPE_CHECKING:
    from finetune_lens.results import Result
    from finetune_lens.results.patching import Patching
    from finetune_lens.results.recovery import Recovery

INTO_BASE = "tuned→base"
UNLIKE = 0.05  # of the shared examples, whose base scores may differ between two results of one model (ties that turn)


def recovery_axis(
    results: "Mapping[str, Result] | Sequence[Result]",
    *,
    file: str | None = None,
    shares: Mapping[str, float] | None = None,
) -> "Recovery":
    """Gather the curves of several results on one axis.

    Args:
        results: name → result, or results alone: of `graft`, `interpolate`, `compress`, `scale_intruders`,
            `cross_patch` and `patch`. A curve is called after its method, and where results have names, after both.
        file: of results that were measured on several, which; by default each result's own first choice.
        shares: of patches in named sets of places, set → its places as a share of all. Sets that are not here are left
            out. Patches of a grid give one point, the best single site: at share 1/sites, and not cumulative.

    Raises:
        InputError: a result of another kind, no such file, curves of one name, results of different examples.
    """
    if isinstance(results, Mapping):
        return _gather(Sources(results), file=file, shares=dict(shares or {}), named=True)
    numbered = Sources({f"{i} {result.kind}": result for i, result in enumerate(results, 1)})
    return _gather(numbered, file=file, shares=dict(shares or {}), named=False)


@recorded
def _gather(results: Sources, *, file: str | None, shares: dict[str, float], named: bool) -> "Recovery":
    from finetune_lens.results.recovery import of_curves

    if not results:
        raise InputError("nothing to gather: expected one result at least")
    curves: dict[str, Curve] = {}
    facts: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for name, result in results.items():
        found, said = _curves(name, result, file, shares)
        notes += [f"{name}: {note}" for note in said]
        if not found:
            notes.append(f"{name} is left out: nothing was measured between base and tuned model")
        metric, ids = _metric(result, file), _ids(result, file)
        for curve in found:
            label = curve.method if not named else name if len(found) == 1 else f"{name}: {curve.method}"
            if label in curves:
                raise InputError(f"two curves are called {label!r}; give the results names: a mapping of name → result")
            curves[label] = curve
            facts[label] = {"source": result.kind, "metric": metric, "ids": ids}
    if not curves:
        raise InputError(f"there is no curve of recovery: {'; '.join(notes)}")
    _require_same_examples(curves, facts)
    notes += _bases(results)
    gathered = of_curves(curves, facts)
    gathered.data.attrs["provenance"] = json.dumps({"analysis": "recovery_axis", "notes": notes})
    return gathered


def _curves(name: str, result: "Result", file: str | None, shares: dict[str, float]) -> tuple[list[Curve], list[str]]:
    """Those of one result, and what is to be said of them."""
    if result.kind in ("cmap", "patching"):
        return _of_patches(name, result, shares)
    if not hasattr(result, "curves"):
        raise InputError(
            f"{name} is a result of kind {result.kind}, which has no curve of recovery; expected grafting, "
            "interpolation, compression, intruder_scaling, cmap or patching"
        )
    files = getattr(result, "files", [])
    if file is not None and files and file not in files:
        raise InputError(f"{name} was not measured on {file!r}; it has {', '.join(files)}")
    return result.curves(_file(result, file)) if files else result.curves(), []


def _bases(results: Sources) -> list[str]:
    """Said where the results are of several bases: of the same examples, but not of one update."""
    sources = [result.provenance.get("inputs", {}).get("base", {}).get("source") for result in results.values()]
    given = {str(source) for source in sources if source}
    several = sorted(one for one in given if not any(other != one and other.endswith(one) for other in given))
    if len(several) < 2:  # one path may be written in several ways
        return []
    return [f"the results are of different bases, {', '.join(several)}: their curves are not of one update"]


def _of_patches(name: str, result: "Patching", shares: dict[str, float]) -> tuple[list[Curve], list[str]]:
    """recipient = base, donor = tuned: the best single site of a grid, or the sets whose share is known."""
    if result.kind == "cmap" and INTO_BASE not in result.directions:
        raise InputError(f"{name} has patches {', '.join(result.directions)} only; expected {INTO_BASE}")
    if result.data.attrs.get("window", 1) > 1:
        raise InputError(f"{name} was patched in windows, which overlap: a window has no share of the sites")
    directions = [INTO_BASE] if result.kind == "cmap" else result.directions
    site, metric = result.data.attrs["site"], result.metric
    estimated = " (estimated)" if result.data.attrs.get("method") in ("attribution", "integrated") else ""
    found, notes = [], []
    for direction in directions:
        one = result.data.sel(direction=direction)
        effects = one[metric].transpose(*result.dims, "example").values
        recipient, donor = one[f"recipient_{metric}"].values, one[f"donor_{metric}"].values
        ending = f", {direction}" if len(directions) > 1 else ""
        if result.dims == ("set",):
            sets = [str(s) for s in result.data["set"].values]
            known = sorted((s for s in sets if s in shares), key=shares.__getitem__)
            if not known:
                raise InputError(
                    f"{name} has sets of places, whose shares are not saved; pass shares, such as "
                    f"{{{sets[0]!r}: 0.1}}, for its sets {', '.join(sets)}"
                )
            at = [shares[s] for s in known]
            if not 0 < min(at) <= max(at) <= 1:
                raise InputError(f"a share is above 0 and at most 1; found {', '.join(f'{x:g}' for x in at)}")
            values = recipient + effects[[sets.index(s) for s in known]]
            method = f"patched sets{estimated}{ending}"
            found.append(Curve(method, "sites", np.array(at), values, recipient, donor, known))
            continue
        cells = effects.reshape(-1, effects.shape[-1])
        present = ~np.isnan(cells)
        cells, present = cells[present.any(1)], present[present.any(1)]
        means = np.where(present, cells, 0).sum(1) / present.sum(1)
        gap = np.nanmean(donor - recipient)
        best = int(np.argmax(means * (-1 if gap < 0 else 1)))
        place = np.flatnonzero((~np.isnan(effects)).any(-1).ravel())[best]
        where = zip(result.dims, np.unravel_index(place, effects.shape[:-1]), strict=True)
        label = ", ".join(f"{dim} {result.data[dim].values[i]}" for dim, i in where)
        method = f"best single site of {site}{estimated}{ending}"
        found.append(
            Curve(method, "sites", np.array([1 / len(cells)]), recipient + cells[best][None], recipient, donor, [label])
        )
        notes.append(
            f"{method} is one of {len(cells)}, {label}, chosen on the examples it is measured on; single sites are not "
            "cumulative, and no curve leads from one to the next"
        )
    return found, notes


def _file(result: "Result", file: str | None) -> str:
    """The one that was asked for, or the first held out, or the first."""
    return file or getattr(result, "held_out", None) or result.files[0]


def _metric(result: "Result", file: str | None) -> str:
    if result.kind == "interpolation":
        return result.main_metric(_file(result, file))
    return getattr(result, "metric", "accuracy")  # of scaled intruders


def _ids(result: "Result", file: str | None) -> np.ndarray:
    """(example,) of the examples that the curves of a result are measured on."""
    data = result.data
    if result.kind == "grafting":
        return data["id"].sel(file=_file(result, file)).values
    if result.kind == "interpolation":
        file = _file(result, file)
        return data["prompt"].sel(file=file).values[: int(data["examples"].sel(file=file))]
    if result.kind == "intruder_scaling":
        return data["id"].values[data["file"].values == _file(result, file)]
    if result.kind == "compression":
        return data["example"].values[data["half"].values == "report"]
    return data["example"].values


def _require_same_examples(curves: dict[str, Curve], facts: dict[str, dict[str, Any]]) -> None:
    """Raise where neither of two results has the examples of the other, or scores the base differently on them."""
    one_each = {id(facts[label]["ids"]): label for label in curves}.values()
    seen: list[str] = []
    for label in one_each:
        ids = [str(i) for i in facts[label]["ids"]]
        for other in seen:
            theirs = [str(i) for i in facts[other]["ids"]]
            shared = {*ids} & {*theirs} - {""}
            few = min(len({*ids} - {""}), len({*theirs} - {""}))
            if len(shared) < few:
                raise InputError(
                    f"{label!r} and {other!r} were measured on different examples ({len(shared)} in common of {few}): "
                    "expected results on one file; choose it by file (--file), or measure on one"
                )
            if facts[label]["metric"] != facts[other]["metric"]:
                continue
            mine, base = (
                np.array([curves[at].base[names.index(i)] for i in sorted(shared)])
                for at, names in ((label, ids), (other, theirs))
            )
            unlike = int((np.abs(mine - base) > 0.01 * (1 + np.abs(mine))).sum())
            if unlike > UNLIKE * len(shared):
                raise InputError(
                    f"{label!r} and {other!r} have the same example ids, but the base scores differently on {unlike} "
                    f"of {len(shared)}: other prompts, or another base; choose the file by file (--file)"
                )
        seen.append(label)


def main() -> None:
    import typer

    from finetune_lens.command import OutputFolder, Saved, finish, run
    from finetune_lens.results.sources import read

    def recovery(
        results: Annotated[list[Path], typer.Argument(metavar="RESULT.nc...", help="Saved results.")],
        *,
        file: Annotated[
            str | None,
            typer.Option(
                help="Which of the files they were measured on.  [default: each one's first]", show_default=False
            ),
        ] = None,
        shares: Annotated[
            Path | None,
            typer.Option(
                help='JSON: the share of all places in each set that was patched, {"name": 0.1}.', show_default=False
            ),
        ] = None,
        common: Saved,
    ) -> None:
        """The recovery axis: share moved against share of the gain recovered, of every method that was measured."""
        folder = OutputFolder(common.out, "recovery", force=common.force)
        known = _read_shares(shares)
        sources = read(results)
        folder.check()
        kinds = [result.kind for result in sources.values()]
        given = sources if len(set(kinds)) < len(kinds) else list(sources.values())
        finish(recovery_axis(given, file=file, shares=known), folder, common)

    run(recovery)


def _read_shares(path: Path | None) -> dict[str, float]:
    from finetune_lens.command import read_json

    shares = {} if path is None else read_json(path)
    numbers = isinstance(shares, dict) and all(
        isinstance(s, int | float) and not isinstance(s, bool) for s in shares.values()
    )
    if not numbers:
        raise InputError(f"{path}: expected an object of names and shares")
    return shares


if __name__ == "__main__":
    from finetune_lens.recovery import main

    main()
