"""What taking a direction out of the residual stream, or adding it, does to the answers of either model."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from finetune_lens.errors import InputError
from finetune_lens.hooked.model import Edit, HookedModel
from finetune_lens.hooked.steering import SCORED, ablation, addition, scores
from finetune_lens.prompts import Encoded, Prompt
from finetune_lens.results.directions import INTERVENTIONS, SIDES, SOURCES
from finetune_lens.stream import Store

RANDOM = 5  # directions


def metric_of(metric: str | None, items: Sequence[Prompt], whole: bool) -> str:
    """The metric given, or the one that these prompts can have.

    Raises:
        InputError: unknown, or logit_diff without wrong answers.
    """
    differing = not whole and all(item.wrong for item in items if item.answer)
    if metric is None:
        return "logit_diff" if differing else "logprob"
    if metric not in SCORED:
        raise InputError(f"metric is one of {', '.join(SCORED)}; found {metric!r}")
    if metric == "logit_diff" and not differing:
        raise InputError("logit_diff needs one-token answers with a `wrong` one; take logprob (--metric)")
    return metric


def effects(
    models: Sequence[HookedModel],
    encoded: Encoded,
    vectors: np.ndarray,
    site: str,
    *,
    scale: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    partial: Path | None = None,
) -> dict[str, np.ndarray]:
    """Effects of interventions on the answers of some prompts.

    Args:
        vectors: (side, feature) r of base and tuned model.
        site: where scale × r is added.

    Returns:
        Of each metric M: M (side, intervention, source, prompt), random_M (side, intervention, source, random, prompt),
        of random directions as long as that source's, and unedited_M (side, prompt).

    Raises:
        InputError: a direction of length 0; an answer that is a token of one model only.
    """
    vocabulary = min(model.vocabulary for model in models)
    if max((int(part.max()) for part in (encoded.answers, encoded.wrongs) if part.numel()), default=-1) >= vocabulary:
        raise InputError(f"an answer or a wrong answer is a token beyond the {vocabulary} that both models have")
    lengths = np.linalg.norm(vectors, axis=1)
    if not (lengths > 0).all():
        raise InputError(
            f"the two classes have the same mean at {site} in {SIDES[int(np.argmin(lengths))]}: there is no direction "
            "to take out or add; choose another depth (--depth)"
        )
    store = None
    prints = [model.fingerprint for model in models]
    if partial is not None and all(prints):
        facts = {
            "analysis": "directions", "models": [m.describe() | {"adapted": m.adapted} for m in models], "site": site,
            "texts": [encoded.ids.tolist(), encoded.mask.tolist(), encoded.answers.tolist(), encoded.wrongs.tolist()],
            "vectors": hashlib.sha256(vectors.tobytes()).hexdigest(), "scale": scale, "seed": seed,
        }  # fmt: skip
        store = Store(partial, repr(prints), facts)
    random = np.random.default_rng([seed, 2]).normal(size=(RANDOM, vectors.shape[1]))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    total = len(models) * len(encoded) * (1 + len(INTERVENTIONS) * len(SOURCES) + (1 + len(SOURCES)) * RANDOM)
    found: dict[str, list] = {f"{part}{name}": [] for part in ("unedited_", "", "random_") for name in SCORED}
    with tqdm(total=total, desc="interventions", disable=not progress, dynamic_ncols=True) as bar:

        def scored(key: str, model: HookedModel, edits: list[Edit]) -> dict[str, np.ndarray]:
            done = store.get(key) if store else None
            if done is None:
                done = scores(model, encoded, edits, vocabulary=vocabulary, batch_size=batch_size)
                if store:
                    store.put(key, done)
            bar.update(len(encoded))
            return done

        def along(key: str, kind: str, model: HookedModel, chosen: Iterable[np.ndarray]) -> list[dict[str, np.ndarray]]:
            edits = (edits_of(kind, model, vector, site, scale) for vector in chosen)
            return [scored(f"{key} {n}", model, some) for n, some in enumerate(edits)]

        for side, model, own, other in zip(SIDES, models, vectors, vectors[::-1], strict=True):
            unedited = scored(f"{side} unedited", model, [])
            for name in SCORED:
                found[f"unedited_{name}"].append(unedited[name])
            edited: dict[str, list] = {"": [], "random_": []}
            for kind in INTERVENTIONS:
                key = f"{side} {kind}"
                edited[""].append(along(key, kind, model, (own, other)))
                alike = [along(f"{key} random own", kind, model, np.linalg.norm(own) * random)]
                if kind == "add":  # what is taken out has no length
                    alike.append(along(f"{key} random other", kind, model, np.linalg.norm(other) * random))
                edited["random_"].append([alike[0], alike[-1]])
            for name in SCORED:
                for part, values in edited.items():
                    found[f"{part}{name}"].append(_named(values, name) - unedited[name])
    return {name: np.array(values) for name, values in found.items()}


def _named(values: Any, name: str) -> np.ndarray:
    """One metric of nested lists of runs."""
    return np.array([_named(one, name) for one in values]) if isinstance(values, list) else values[name]


def edits_of(kind: str, model: HookedModel, vector: np.ndarray, site: str, scale: float) -> list[Edit]:
    """The edits of one intervention."""
    return ablation(model, vector) if kind == "ablate" else addition(site, scale * vector)
