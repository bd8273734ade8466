"""How alike are two representations of the same items? CKA, Procrustes distance, RSA, row by row likeness.

X (row, d) and Y (row, e) hold a row an item. With both centred, K = XXᵀ and L = YYᵀ,

    CKA        ‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F), linear (Kornblith et al. 2019, arXiv 1905.00414, §3 and 4). With fewer
               rows than features it is near 1 whatever the data;
    debiased   HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with the unbiased estimate of HSIC (Song et al. 2012, "Feature
               Selection via Dependence Maximization", eq. 5; Nguyen et al. 2021, arXiv 2010.15327, eq. 3): 0 on average
               for unrelated data. Of centred rows it needs nothing but ‖YᵀX‖_F² and the rows' squared norms d, e:
               n(n−3)·HSIC = ‖YᵀX‖_F² − n/(n−2)·Σᵢdᵢeᵢ + Σd·Σe/((n−1)(n−2));
    Procrustes 2 − 2‖YᵀX‖_* / (‖X‖_F ‖Y‖_F): the squared distance that is left after the best rotation of two
               representations of size 1, 0 to 2 (Ding et al. 2021, arXiv 2108.01661, §3);
    RSA        Spearman's ρ of the dissimilarities 1 − Pearson's r of every two rows, in X and in Y (Kriegeskorte et al.
               2008, "Representational similarity analysis").

A rotation or a scaling of all features changes none of the first three; RSA keeps the latter only. Everything is
float64, some rows at a time.

>>> rng = np.random.default_rng(0)
>>> x, turn = rng.normal(size=(50, 4)), np.linalg.qr(rng.normal(size=(4, 4)))[0]
>>> [round(value, 6) for value in cka(x, 3 * x @ turn)]
[1.0, 1.0]
>>> biased, debiased = cka(rng.normal(size=(20, 200)), rng.normal(size=(20, 200)))
>>> biased > 0.8, abs(debiased) < 0.2
(True, True)
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from finetune_lens import stats

BYTES = 1 << 27  # of the rows held at once
LEAST = 4  # rows from which the debiased CKA is defined
MEASURES = ("cka", "cka_debiased", "procrustes")  # of `compare`

Table = Float[np.ndarray, "_row _features"]
Order = Int[np.ndarray, " _row"]


class Rows:
    """A representation, centred as it is read: in memory or mapped, it is never copied whole.

    Attributes:
        norms: (row,) squared length of each centred row.
    """

    def __init__(self, values: Table, device: "torch.device | str" = "cpu"):
        self.values, self.device = values, torch.device(device)
        self.mean: Tensor | float = 0.0
        count, features = values.shape
        self.step = max(16, BYTES // (8 * max(1, features)))
        self.mean = sum(self.take(index).sum(0) for index in self.blocks()) / count
        self.norms = torch.cat([self.take(index).square().sum(1) for index in self.blocks()])

    def __len__(self) -> int:
        return len(self.values)

    def blocks(self, rows: Order | None = None) -> Iterator[np.ndarray]:
        """Numbers of all rows, or of these, some at a time."""
        rows = np.arange(len(self)) if rows is None else rows
        return (rows[start : start + self.step] for start in range(0, len(rows), self.step))

    def take(self, rows: np.ndarray) -> Float[Tensor, "some features"]:
        """Some rows, centred."""
        return torch.from_numpy(self.values[rows]).to(self.device, torch.float64) - self.mean

    def reduced(self) -> "Rows":
        """The same in an orthonormal basis of the space its rows span, where that has fewer dimensions."""
        count, features = self.values.shape
        if count >= features:
            return self
        triangle = torch.linalg.qr(self.take(np.arange(count)).T, mode="r").R
        return Rows(triangle.T.cpu().numpy(), self.device)


def cka(x: Table, y: Table) -> tuple[float, float]:
    """CKA of two representations, biased and debiased; the latter NaN for fewer than four rows.

    Raises:
        ValueError: they do not have the same rows.
    """
    biased, debiased = cka_map([Rows(x)], [Rows(y)])
    return float(biased[0, 0]), float(debiased[0, 0])


def cka_map(
    ones: Sequence[Rows], others: Sequence[Rows], *, tick: Callable[[float], object] | None = None
) -> tuple[Float[np.ndarray, "one other"], Float[np.ndarray, "one other"]]:
    """CKA of each of `ones` with each of `others`, biased and debiased.

    Args:
        tick: called with shares of the work as they are done; they sum to 1.

    Raises:
        ValueError: they do not have the same rows.

    Cost, n rows, A and B representations of d features: the cheaper of n²·((A + B)·d + AB) flops, from Gram matrices
    some rows at a time, and 2n·(AB + A + B)·d², from one cross-product after another. Memory: a block of rows of all
    representations; or of two, and d² numbers. Neither grows with the rows.
    """
    every = [*ones, *others]
    _require_same_rows(*every)
    count, a = len(every[0]), len(ones)
    widths = [rows.values.shape[1] for rows in every]
    by_rows = count**2 * (sum(widths) + a * len(others))
    by_features = 2 * count * (sum(widths[:a]) * sum(widths[a:]) + sum(width**2 for width in widths))
    squares = _from_grams if by_rows < by_features else _from_products
    between, own = squares(ones, others, tick or (lambda share: None))
    norms = torch.stack([rows.norms.cpu() for rows in every])
    biased = _ratio(between, own[:a, None] * own[None, a:])
    sums = norms.sum(1)
    hsic = _hsic(count, between, norms[:a] @ norms[a:].T, torch.outer(sums[:a], sums[a:]))
    alone = _hsic(count, own, norms.square().sum(1), sums.square())
    return biased.numpy(), _ratio(hsic, alone[:a, None] * alone[None, a:]).numpy()


def compare(x: Rows, y: Rows, *, without: Sequence[Order] = ()) -> dict[str, Float[np.ndarray, " subset"]]:
    """The MEASURES of two representations, of all rows and then of all but some.

    Args:
        without: rows that are left out, for each subset.

    Raises:
        ValueError: they do not have the same rows.

    Cost, n rows, m the smaller of n and d: 12·n·m² flops and, for each subset, the singular values of order m.
    Memory: some m² numbers.
    """
    _require_same_rows(x, y)
    x, y = x.reduced(), y.reduced()
    sides = ((x, y), (x, x), (y, y))
    whole = [_product(*pair) for pair in sides]
    found = [_measures(len(x), *whole, x.norms, y.norms)]
    for rows in without:
        kept = np.setdiff1d(np.arange(len(x)), rows)
        shift = {side: -_sum(side, rows) / max(1, len(kept)) for side in (x, y)}  # the mean of what is kept
        parts = [
            total - _product(one, other, rows) - len(kept) * torch.outer(shift[one], shift[other])
            for total, (one, other) in zip(whole, sides, strict=True)
        ]
        norms = [torch.cat([(s.take(i) - shift[s]).square().sum(1) for i in s.blocks(kept)]) for s in (x, y)]
        found.append(_measures(len(kept), *parts, *norms))
    return dict(zip(MEASURES, np.array(found).T, strict=True))


def shuffled(x: Rows, y: Rows, orders: Sequence[Order]) -> dict[str, Float[np.ndarray, " order"]]:
    """The MEASURES of `x` and of `y` with its rows in another order, for each order.

    Cost, n rows, m the smaller of n and d: 2·n·m² flops and the singular values of order m, for each order.
    """
    x, y = x.reduced(), y.reduced()
    own = _product(x, x), _product(y, y)
    found = [
        _measures(len(x), _product(x, y, order=order), *own, x.norms, y.norms[torch.from_numpy(order)])
        for order in orders
    ]
    return dict(zip(MEASURES, np.array(found).reshape(-1, len(MEASURES)).T, strict=True))


def procrustes(x: Table, y: Table) -> float:
    """Squared Procrustes distance of two representations of size 1, 0 to 2."""
    return float(compare(Rows(x), Rows(y))["procrustes"][0])


def rsa(x: Table, y: Table) -> float:
    """Spearman's ρ of the dissimilarities of every two rows; NaN where one side's are all alike.

    Cost, n rows: 2n²·(d + e) flops, and n² numbers are ranked.
    """
    return stats.rank_correlation(*(upper(dissimilarities(side)) for side in (x, y)))


def dissimilarities(x: Table) -> Float[np.ndarray, "row row"]:
    """1 − Pearson's r of every two rows; NaN beside a row whose features are all the same."""
    rows = x.astype(np.float64)
    rows -= rows.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return 1 - rows @ rows.T


def upper(square: Float[np.ndarray, "row row"]) -> Float[np.ndarray, " pair"]:
    """Above the diagonal."""
    return square[np.triu_indices(len(square), 1)]


def likeness(x: Table, y: Table, order: Order | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of each row x and its y: the cosine, and the change ‖y − x‖ / ‖x‖, (row,) each; NaN where a row is 0.

    Args:
        order: of the rows of `y`, another than they have.
    """
    cosine, change = np.empty(len(x)), np.empty(len(x))
    order = np.arange(len(x)) if order is None else order
    step = max(16, BYTES // (8 * x.shape[1]))
    for start in range(0, len(x), step):
        at = slice(start, start + step)
        a, b = x[at].astype(np.float64), y[order[at]].astype(np.float64)
        norm, other = (np.linalg.norm(side, axis=1) for side in (a, b))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine[at] = (a * b).sum(1) / (norm * other)
            change[at] = np.where(norm > 0, np.linalg.norm(b - a, axis=1) / norm, np.nan)
    return cosine, change


def _require_same_rows(*every: Rows) -> None:
    counts = {len(rows) for rows in every}
    if len(counts) > 1:
        raise ValueError(f"expected representations of the same rows, found {' and '.join(map(str, sorted(counts)))}")


def _sum(side: Rows, rows: Order) -> Tensor:
    zero = torch.zeros(side.values.shape[1], dtype=torch.float64, device=side.device)
    return sum((side.take(index).sum(0) for index in side.blocks(rows)), start=zero)


def _product(x: Rows, y: Rows, rows: Order | None = None, *, order: Order | None = None) -> Tensor:
    """XᵀY over all rows, or over these; with Y's rows in another order."""
    total = torch.zeros(x.values.shape[1], y.values.shape[1], dtype=torch.float64, device=x.device)
    for index in x.blocks(rows):
        total.addmm_(x.take(index).T, y.take(index if order is None else order[index]))
    return total


def _from_products(ones: Sequence[Rows], others: Sequence[Rows], tick: Callable) -> tuple[Tensor, Tensor]:
    """‖XᵀY‖_F² of every two, (one, other), and of each with itself, from one product after another."""
    count = len(ones) * len(others) + len(ones) + len(others)

    def square(x: Rows, y: Rows) -> float:
        found = float(_product(x, y).square().sum())
        tick(1 / count)
        return found

    between = [[square(x, y) for y in others] for x in ones]
    own = [square(x, x) for x in (*ones, *others)]
    return torch.tensor(between, dtype=torch.float64), torch.tensor(own, dtype=torch.float64)


def _from_grams(ones: Sequence[Rows], others: Sequence[Rows], tick: Callable) -> tuple[Tensor, Tensor]:
    """The same, ΣᵢⱼKᵢⱼLᵢⱼ, from a block of all Gram matrices after another."""
    every, a = [*ones, *others], len(ones)
    count, device = len(every[0]), every[0].device
    step = int(np.clip(BYTES // (8 * sum(rows.values.shape[1] for rows in every)), 16, 512))
    starts = range(0, count, step)
    between = torch.zeros(a, len(others), dtype=torch.float64, device=device)
    own = torch.zeros(len(every), dtype=torch.float64, device=device)
    pairs = len(starts) * (len(starts) + 1) / 2
    for number, i in enumerate(starts):
        left = [rows.take(np.arange(i, min(i + step, count))) for rows in every]
        for j in starts[number:]:
            right = left if i == j else [rows.take(np.arange(j, min(j + step, count))) for rows in every]
            grams = torch.stack([(x @ y.T).flatten() for x, y in zip(left, right, strict=True)])
            weight = 1 if i == j else 2  # the block above the diagonal and that below
            between += weight * (grams[:a] @ grams[a:].T)
            own += weight * grams.square().sum(1)
            tick(1 / pairs)
    return between.cpu(), own.cpu()


def _hsic(n: int, square: Tensor, inner: Tensor, sums: Tensor) -> Tensor:
    """n(n−3) times the unbiased estimate of HSIC from ‖XᵀY‖_F², Σᵢdᵢeᵢ and Σd·Σe."""
    if n < LEAST:
        return torch.full_like(square, torch.nan)
    return square - n / (n - 2) * inner + sums / ((n - 1) * (n - 2))


def _ratio(over: Tensor, square: Tensor) -> Tensor:
    """over / √square; NaN where that is not above 0."""
    return torch.where(square > 0, over / square.clamp_min(0).sqrt(), torch.nan)


def _measures(n: int, xy: Tensor, xx: Tensor, yy: Tensor, d: Tensor, e: Tensor) -> list[float]:
    """Of centred products and the squared norms of the rows."""
    cross, one, other = (product.square().sum() for product in (xy, xx, yy))
    hsic, first, second = (
        _hsic(n, square, a @ b, a.sum() * b.sum()) for square, a, b in ((cross, d, e), (one, d, d), (other, e, e))
    )
    nuclear = torch.linalg.svdvals(xy).sum()
    left = 2 - 2 * _ratio(nuclear, xx.trace() * yy.trace())
    return [float(_ratio(cross, one * other)), float(_ratio(hsic, first * second)), float(left.clamp_min(0))]
