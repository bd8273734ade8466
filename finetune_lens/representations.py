"""How alike do the two models represent the same texts, depth by depth, and what does the difference say?

Base and tuned model read the same texts; an activation is a row, the mean over a text's tokens or each token by itself.
Depth by depth: linear CKA (Kornblith et al. 2019) with its bias removed, RSA, the orthogonal Procrustes distance (Ding
et al. 2021) (`linalg.similarity` has their equations), and in the coordinates that a tuned model shares with its base
the cosine of rows and the change ‖h₁ − h₀‖/‖h₀‖; CKA also of every depth with every other. Beside each: rows
shuffled (what is alike whatever the text), other models where given (`null`: seeds of the base, say), and a jackknife
interval over texts, for a bootstrap draws rows twice, which to CKA and RSA look like perfect agreement.

The mean difference tuned − base of activations is read through the tuned model's final norm and unembedding (the
activation-difference lens, `hooked.difference`): which tokens does tuning promote on these texts, whatever they say?
The logit lens of both models themselves is in `outputs`.

Of a text its own tokens are read, not special ones, nor the first that the model sees: there most models keep
activations of another size that say little of the text (Sun et al. 2024, arXiv 2402.17762); a text of that one token
keeps it. With fewer rows than features biased CKA is near 1 whatever the data: read the debiased one.

Cost: a forward pass a text and model. n rows, d features, L depths, m = min(n, d): CKA of every two depths
min(2n²·(2L·d + L²), 2n·L²·d²) flops; at matching depths 36·n·m² and 21 times the singular values of order m. The lens:
202 unembeddings a depth. Rows on disk or in memory: 8·L·n·d bytes; beside them memory does not grow with the rows.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> texts = [f"<{task}>{word}=" for task in ("copy", "flip") for word in ("abzkfe", "gkzlqm", "ttzabc", "mnopqr")]
>>> found = compare_representations(ModelPair.load(folder / "base", folder / "full"), texts, progress=False)
>>> first, last = found.data["value"].sel(measure="cka_debiased").values[[0, -1]]
>>> bool(last < first)
True
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded
from finetune_lens.results.representations import MEASURES

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from finetune_lens.hooked import HookedModel
    from finetune_lens.hooked.features import Features
    from finetune_lens.pair import ModelPair
    from finetune_lens.prompts import Encoded, Prompt
    from finetune_lens.results.representations import Representations

LEAST = 5  # texts: without one the debiased CKA has four
FOLDS = 10  # of texts, for the jackknife
SHUFFLES = 10
MOST_DISSIMILARITIES = 500  # texts whose every pair RSA compares
TOKENS = 10  # promoted, and suppressed
SHARE = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


@recorded
def compare_representations(
    pair: "ModelPair",
    texts: Any,
    *,
    site: str = "resid_post",
    pool: str = "mean",
    null: Sequence[Any] = (),
    lens: bool = True,
    template: str = "none",
    seed: int = 0,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    check: bool = True,
    progress: bool = True,
    partial: Path | None = None,
) -> "Representations":
    """Compare how base and tuned model represent the same texts.

    Args:
        pair: base and tuned; both have to run. With another number of layers only CKA of every two depths is measured.
        texts: a .txt file (a text a line), a .jsonl file of prompts, or a list of either.
        site: resid_post (with the embedding as depth 0), resid_pre, resid_mid, attn_out, mlp_out.
        pool: "mean": a row is the mean over a text's tokens; "each": every token is a row.
        null: models of as many layers that read the same tokens; each is compared with the base as the tuned one is.
            One after the other is in memory.
        lens: read the mean difference through the tuned model's unembedding.
        template: "none"; "each" has all models read each text as a user's message in the chat template. Rows are of the
            text's own tokens alone.
        seed: of the folds, the shuffled rows and the flipped signs.
        batch_size: texts at once.
        check: refuse a pair that fails the trust gate (`check_pair`).
        partial: folder in which activations wait, so that an interrupted run continues.

    Raises:
        InputError: no texts or fewer than five, tokenizers that read them differently, an unknown site or pool, a null
            model of another depth, activations that hold NaN or Inf.
        GateFailed: the trust gate found this pair unsafe to compare.
    """
    import torch
    from tqdm.auto import tqdm

    from finetune_lens.check import require_safe
    from finetune_lens.hooked.depths import encode_alike, sites_of
    from finetune_lens.hooked.effects import describe_prompts
    from finetune_lens.hooked.features import collect
    from finetune_lens.hooked.loading import as_model
    from finetune_lens.prompts import require_template, without_answers
    from finetune_lens.results.representations import Representations

    if pool not in ("mean", "each"):
        raise InputError(f"pool is mean or each; found {pool!r}")
    require_template(template)
    items = read_texts(texts, limit=limit)
    if len(items) < LEAST:
        raise InputError(f"similarity needs {LEAST} texts or more; found {len(items)}")
    base, tuned = pair.models(device=device, dtype=dtype)
    same_depth = base.layers == tuned.layers
    if null and not same_depth:
        raise InputError("null models are compared depth by depth, and base and tuned have different numbers of layers")
    sites = [sites_of(model, site) for model in (base, tuned)]
    bare = without_answers(items)
    encoded = encode_alike((base, tuned), bare, template=template, need_answer=False, padding="right")
    if check:
        require_safe(pair, device=device, dtype=dtype)
    columns = own_columns(encoded)

    def read(model: "HookedModel", names: list[str], name: str) -> "Features":
        folder = partial / name.replace(" ", "-") if partial else None
        with tqdm(total=len(items), desc=f"texts, {name}", disable=not progress, dynamic_ncols=True) as bar:
            found = collect(
                model, encoded, names, columns=columns, pool=pool, folder=folder, batch_size=batch_size, tick=bar.update
            )
        require_finite(found, name)
        return found

    others = {}
    for number, source in enumerate(null, 1):
        model = as_model(
            source, device=device, dtype=dtype, config=pair.config, tokenizer=pair.tokenizer,
            online=pair.options["online"],
        )  # fmt: skip
        if model.layers != base.layers:
            raise InputError(f"the null model {model.name} has {model.layers} layers, the base {base.layers}")
        encode_alike((base, model), bare, template=template, need_answer=False)
        others[f"{number}: {Path(model.name).name}"] = read(model, sites_of(model, site), f"null {number}")
    where = base.device if base.device.type != "mps" else torch.device("cpu")  # which has no float64
    sides = [read(m, names, side) for m, names, side in zip((base, tuned), sites, ("base", "tuned"), strict=True)]
    data = _every_two(sides, sites, where, progress)
    plan = _Plan.of(sides[0].example, seed)
    if same_depth:
        data = data.merge(_matching(sides, sites[0], plan, where, progress))
    if others:
        found = [
            [_measured(sides[0].values(n), other.values(n), plan, where, folds=False) for n in sites[0]]
            for other in others.values()
        ]
        data["null"] = (("model", "depth", "measure"), np.array(found)[..., 0])
        data = data.assign_coords(model=np.array(list(others), dtype=object))
    if lens and same_depth:
        data = data.merge(_read_differences(tuned, sides, sites[0], plan, seed, progress))
    notes = []
    if len(items) > MOST_DISSIMILARITIES:
        notes.append(f"RSA compares {MOST_DISSIMILARITIES} of the texts, evenly spaced")
    record = {
        "notes": notes, "prompts": describe_prompts(items),
        "models": {"base": base.describe(), "tuned": tuned.describe()},
    }  # fmt: skip
    attrs = {
        "site": site,
        "pool": pool,
        "texts": len(items),
        "rows": len(sides[0]),
        "features": sides[0].values(sites[0][0]).shape[1],
    }
    return Representations(data.assign_attrs(**attrs, provenance=json.dumps(record)))


def read_texts(source: Any, *, limit: int | None = None) -> "list[Prompt]":
    """Texts of a .txt file, a line each, blank ones left out; else as `prompts.read_prompts`.

    Raises:
        InputError: no such file, not UTF-8 text, no texts.
    """
    from finetune_lens.prompts import Prompt, read_prompts

    if not isinstance(source, str | Path) or Path(source).suffix.lower() != ".txt":
        return read_prompts(source, limit=limit)
    try:
        lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"{source} is not there; expected a file with a text a line") from None
    except UnicodeDecodeError:
        raise InputError(f"{source} is not UTF-8 text; expected a file with a text a line") from None
    items = [Prompt(line, id=str(number)) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise InputError(f"{source} holds no texts; expected one a line")
    return read_prompts(items, limit=limit)


def own_columns(encoded: "Encoded") -> "torch.Tensor":
    """(example, pos): each text's own tokens but the first that the model reads, where there are others."""
    own = encoded.text_columns
    later = own & (encoded.mask.cumsum(1) > 1)
    return later | (own & ~later.any(1, keepdim=True))


def require_finite(features: "Features", model: str) -> None:
    """Raise InputError where activations hold NaN or Inf."""
    for site, values in features.arrays.items():
        broken = ~np.isfinite(values.reshape(len(values), -1)).all(1)
        if broken.any():
            first = int(features.example[broken.argmax()]) + 1
            raise InputError(
                f"the {model} model's activations at {site} hold NaN or Inf in {broken.sum()} of {len(values)} rows "
                f"(first: text {first}); a wider dtype (--dtype float32) may help"
            )


@dataclass(frozen=True)
class _Plan:
    """Which rows are left out, and in which orders rows are shuffled.

    Attributes:
        example: (row,) which text.
        fold: (text,) in which fold it is.
        orders: of rows.
        some: texts that RSA compares; some_orders: of those.
    """

    example: np.ndarray
    fold: np.ndarray
    orders: list[np.ndarray]
    some: np.ndarray
    some_orders: list[np.ndarray]

    @classmethod
    def of(cls, example: np.ndarray, seed: int) -> "_Plan":
        rng = np.random.default_rng(seed)
        texts = int(example[-1]) + 1
        fold = rng.permutation(np.arange(texts) % min(FOLDS, texts))
        some = np.unique(np.linspace(0, texts - 1, min(texts, MOST_DISSIMILARITIES)).round().astype(int))
        orders = [[rng.permutation(n) for _ in range(SHUFFLES)] for n in (len(example), len(some))]
        return cls(example, fold, orders[0], some, orders[1])

    @property
    def folds(self) -> range:
        return range(int(self.fold.max()) + 1)

    def rows_of(self, fold: int) -> np.ndarray:
        return np.flatnonzero(self.fold[self.example] == fold)

    def by_text(self, values: np.ndarray) -> np.ndarray:
        """(text, d) means over a text's rows, float64."""
        starts = np.searchsorted(self.example, np.arange(self.example[-1] + 1))
        sums = np.add.reduceat(values, starts, axis=0, dtype=np.float64)
        return sums / np.bincount(self.example)[:, None]


def _every_two(sides: "Sequence[Features]", sites: list[list[str]], device: "torch.device", progress: bool) -> Any:
    """CKA of every depth of one with every depth of the other."""
    import xarray as xr
    from tqdm.auto import tqdm

    from finetune_lens.linalg.similarity import Rows, cka_map

    held = [[Rows(side.values(n), device) for n in names] for side, names in zip(sides, sites, strict=True)]
    with tqdm(total=1.0, desc="CKA of every two depths", disable=not progress, bar_format=SHARE) as bar:
        biased, debiased = cka_map(*held, tick=bar.update)
    dims = ("base_depth", "tuned_depth")
    coords = {dim: np.arange(len(names)) for dim, names in zip(dims, sites, strict=True)}
    return xr.Dataset({"cka": (dims, biased), "cka_debiased": (dims, debiased)}, coords=coords)


def _matching(
    sides: "Sequence[Features]", sites: list[str], plan: _Plan, device: "torch.device", progress: bool
) -> "xr.Dataset":
    """Every measure at matching depths: of all texts, without each fold, and with rows shuffled."""
    import xarray as xr
    from tqdm.auto import tqdm

    kept, shuffles = [], []
    for name in tqdm(sites, desc="depths", disable=not progress, dynamic_ncols=True):
        x, y = (side.values(name) for side in sides)
        kept.append(_measured(x, y, plan, device))
        shuffles.append(_shuffled(x, y, plan, device))
    values, chance = np.moveaxis(kept, 0, 1), np.moveaxis(shuffles, 0, 1)  # (measure, depth, …)
    dims = ("measure", "depth")
    data = {"value": (dims, values[..., 0]), "left_out": ((*dims, "fold"), values[..., 1:])}
    data["shuffled"] = ((*dims, "draw"), chance)
    coords = {"measure": np.array(list(MEASURES), dtype=object), "depth": np.arange(len(sites))}
    return xr.Dataset(data, coords=coords)


def _measured(
    x: np.ndarray, y: np.ndarray, plan: _Plan, device: "torch.device", *, folds: bool = True
) -> list[np.ndarray]:
    """The MEASURES of all rows, and then without each fold."""
    from finetune_lens.linalg.similarity import Rows, compare, dissimilarities, likeness, upper
    from finetune_lens.stats import rank_correlation

    out = [plan.rows_of(fold) for fold in plan.folds] if folds else []
    found = compare(Rows(x, device), Rows(y, device), without=out)
    apart = [dissimilarities(plan.by_text(side)[plan.some]) for side in (x, y)]
    within = [np.arange(len(plan.some))]
    within += [np.flatnonzero(plan.fold[plan.some] != fold) for fold in plan.folds] if folds else []
    found["rsa"] = np.array([rank_correlation(*(upper(a[np.ix_(some, some)]) for a in apart)) for some in within])
    alike = likeness(x, y) if x.shape == y.shape else np.full((2, len(x)), np.nan)
    for measure, rows in zip(("cosine", "change"), alike, strict=True):
        found[measure] = np.array([_mean(rows), *(_mean(np.delete(rows, some)) for some in out)])
    return [found[measure] for measure in MEASURES]


def _shuffled(x: np.ndarray, y: np.ndarray, plan: _Plan, device: "torch.device") -> list[np.ndarray]:
    """The MEASURES with the rows of y in other orders."""
    from finetune_lens.linalg.similarity import Rows, dissimilarities, likeness, shuffled, upper
    from finetune_lens.stats import rank_correlation

    found = shuffled(Rows(x, device), Rows(y, device), plan.orders)
    one, other = (dissimilarities(plan.by_text(side)[plan.some]) for side in (x, y))
    found["rsa"] = np.array([rank_correlation(upper(one), upper(other[np.ix_(o, o)])) for o in plan.some_orders])
    nothing = np.full((2, len(x)), np.nan)
    alike = [likeness(x, y, order) if x.shape == y.shape else nothing for order in plan.orders]
    found["cosine"], found["change"] = np.array([[_mean(rows) for rows in pair] for pair in alike]).T
    return [found[measure] for measure in MEASURES]


def _read_differences(
    tuned: "HookedModel", sides: "Sequence[Features]", sites: list[str], plan: _Plan, seed: int, progress: bool
) -> "xr.Dataset":
    """What the mean difference says at each depth, and how long it is."""
    import xarray as xr
    from tqdm.auto import tqdm

    from finetune_lens.hooked.difference import read_difference
    from finetune_lens.prompts import printer

    found, lengths = [], []
    for name in tqdm(sites, desc="differences", disable=not progress, dynamic_ncols=True):
        one, other = (plan.by_text(side.values(name)) for side in sides)
        lengths.append(float(np.linalg.norm(one, axis=1).mean()))
        found.append(read_difference(tuned, other - one, length=lengths[-1] or 1.0, count=TOKENS, seed=seed))
    show = printer(tuned.require_tokenizer())
    ids = np.stack([lens.token for lens in found])
    dims = ("depth", "direction", "rank")
    data = {
        "token": (dims, np.vectorize(lambda i: show(int(i)) if i >= 0 else "", otypes=[object])(ids)),
        "logit": (dims, np.stack([lens.logit for lens in found])),
        "p_adjusted": (dims, np.stack([lens.p for lens in found])),
        "size": ("depth", np.array([lens.size for lens in found]) / lengths),
        "size_flipped": (("depth", "flip"), np.stack([lens.sizes for lens in found]) / np.array(lengths)[:, None]),
    }
    coords = {"depth": np.arange(len(sites)), "direction": np.array(["promoted", "suppressed"], dtype=object)}
    return xr.Dataset(data, coords=coords | {"rank": np.arange(ids.shape[-1])})


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; NaN where none is."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else np.nan


def main() -> None:
    import typer

    from finetune_lens.command import Base, OutputFolder, Running, Template, Tuned, Unsafe, finish, run

    def representations(
        base: Base,
        tuned: Tuned,
        texts: Annotated[Path, typer.Argument(metavar="TEXTS", help="A text a line (.txt), or JSONL of prompts.")],
        *,
        site: Annotated[str, typer.Option(help="resid_post, resid_pre, resid_mid, attn_out, mlp_out.")] = "resid_post",
        pool: Annotated[str, typer.Option(help="A row is a text's mean (mean) or a token (each).")] = "mean",
        null: Annotated[
            list[str] | None,
            typer.Option(
                help="Another seed of the base, or any model of its depth; may be repeated.", show_default=False
            ),
        ] = None,
        lens: Annotated[bool, typer.Option("--lens/--no-lens", help="Read the mean difference as tokens.")] = True,
        template: Template = "none",
        unsafe: Unsafe = False,
        common: Running,
    ) -> None:
        """Compare how the two models represent the same texts: CKA, RSA, Procrustes, what the difference says."""
        folder = OutputFolder(common.out, "representations", force=common.force)
        items = read_texts(texts, limit=common.limit)
        pair = common.pair(base, tuned)
        folder.check()
        result = compare_representations(
            pair, items, site=site, pool=pool, null=null or (), lens=lens, template=template, seed=common.seed,
            check=not unsafe, partial=folder.partial, **common.execution(),
        )  # fmt: skip
        finish(result, folder, common)

    run(representations)


if __name__ == "__main__":
    from finetune_lens.representations import main

    main()
