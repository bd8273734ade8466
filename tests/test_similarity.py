"""Similarity of representations against naive double loops; what must leave it unchanged, and what must not."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes, subspace_angles
from scipy.stats import spearmanr

from finetune_lens.linalg import similarity
from finetune_lens.linalg.similarity import Rows, cka, cka_map, compare, likeness, procrustes, rsa, shuffled

SHAPES = [(12, 5, 5), (12, 5, 7), (9, 20, 20), (9, 20, 4), (4, 3, 3)]


def data(n, d, e, seed=0, offset=3.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + offset
    return x, np.tanh(x @ rng.normal(size=(d, e))) + 0.3 * rng.normal(size=(n, e)) - offset


def naive_hsics(x, y):
    """Σ of the centred Gram matrices' products, and the unbiased estimate of HSIC, from the definitions."""
    n = len(x)
    k, m = ([[float(np.dot(a, b)) for b in z] for a in z] for z in (x, y))
    biased = 0.0
    for i, j in itertools.product(range(n), repeat=2):
        sides = [
            g[i][j] - sum(g[i]) / n - sum(row[j] for row in g) / n + sum(map(sum, g)) / n**2 for g in (k, m)
        ]  # fmt: skip
        biased += sides[0] * sides[1]
    trace = sum(k[i][j] * m[j][i] for i in range(n) for j in range(n) if i != j)
    sums = [[sum(g[i][j] for j in range(n) if j != i) for i in range(n)] for g in (k, m)]
    chain = sum(sums[0][i] * sums[1][i] for i in range(n))
    if n < 4:
        return biased, math.nan
    unbiased = trace + sum(sums[0]) * sum(sums[1]) / ((n - 1) * (n - 2)) - 2 * chain / (n - 2)
    return biased, unbiased / (n * (n - 3))


def naive_cka(x, y):
    cross, one, other = naive_hsics(x, y), naive_hsics(x, x), naive_hsics(y, y)
    return [cross[i] / math.sqrt(one[i] * other[i]) for i in range(2)]


def naive_procrustes(x, y):
    x, y = (side - side.mean(0) for side in (x, y))
    x, y = (side / np.linalg.norm(side) for side in (x, y))
    wide = max(x.shape[1], y.shape[1])
    x, y = (np.pad(side, [(0, 0), (0, wide - side.shape[1])]) for side in (x, y))
    turn, _ = orthogonal_procrustes(x, y)
    return np.linalg.norm(x @ turn - y) ** 2


def naive_rsa(x, y):
    pairs = list(itertools.combinations(range(len(x)), 2))
    return spearmanr(*([1 - np.corrcoef(side[i], side[j])[0, 1] for i, j in pairs] for side in (x, y))).statistic


@pytest.mark.parametrize("shape", SHAPES)
def test_against_double_loops(shape):
    x, y = data(*shape)
    np.testing.assert_allclose(cka(x, y), naive_cka(x, y), atol=1e-10)
    assert procrustes(x, y) == pytest.approx(naive_procrustes(x, y), abs=1e-10)
    assert rsa(x, y) == pytest.approx(naive_rsa(x, y), abs=1e-10)
    found = compare(Rows(x), Rows(y))
    np.testing.assert_allclose([found["cka"][0], found["cka_debiased"][0]], naive_cka(x, y), atol=1e-10)


@pytest.mark.parametrize("route", ["_from_grams", "_from_products"])
@pytest.mark.parametrize("bytes_held", [1, similarity.BYTES])
def test_the_map_by_either_route_in_blocks(route, bytes_held, monkeypatch):
    """Forty rows in blocks of 16: the last is shorter; base and tuned model of different depth and width."""
    monkeypatch.setattr(similarity, "BYTES", bytes_held)
    for name in ("_from_grams", "_from_products"):
        monkeypatch.setattr(similarity, name, getattr(similarity, route))
    ones = [data(40, 6, 6, seed)[0] for seed in range(3)]
    others = [data(40, 6, 5, seed)[1] for seed in range(2)]
    shares = []
    biased, debiased = cka_map([Rows(x) for x in ones], [Rows(y) for y in others], tick=shares.append)
    assert biased.shape == debiased.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        np.testing.assert_allclose([biased[i, j], debiased[i, j]], naive_cka(ones[i], others[j]), atol=1e-8)
    assert sum(shares) == pytest.approx(1)


def test_the_route_is_the_cheaper_one(monkeypatch):
    taken = []
    for name in ("_from_grams", "_from_products"):
        real = getattr(similarity, name)
        monkeypatch.setattr(similarity, name, lambda *a, real=real, name=name: taken.append(name) or real(*a))
    cka(*data(10, 30, 30))
    cka(*data(200, 3, 3))
    assert taken == ["_from_grams", "_from_products"]


@pytest.mark.parametrize("shape", [(12, 5, 7), (9, 20, 20)])
def test_left_out_rows_are_as_if_they_had_never_been(shape, monkeypatch):
    monkeypatch.setattr(similarity, "BYTES", 1)
    x, y = data(*shape)
    out = [np.array([0]), np.array([3, 4, 8]), np.array([], int)]
    found = compare(Rows(x), Rows(y), without=out)
    for at, rows in enumerate(out, 1):
        kept = [np.delete(side, rows, 0) for side in (x, y)]
        expected = [*naive_cka(*kept), naive_procrustes(*kept)]
        np.testing.assert_allclose([found[m][at] for m in similarity.MEASURES], expected, atol=1e-8)
    few = compare(Rows(x), Rows(y), without=[np.arange(len(x) - 3)])
    assert np.isnan(few["cka_debiased"][1])  # three rows are left


@pytest.mark.parametrize("shape", [(12, 5, 7), (9, 20, 20)])
def test_rows_in_another_order(shape):
    x, y = data(*shape)
    orders = [np.random.default_rng(s).permutation(len(x)) for s in range(3)]
    found = shuffled(Rows(x), Rows(y), orders)
    for at, order in enumerate(orders):
        expected = [*naive_cka(x, y[order]), naive_procrustes(x, y[order])]
        np.testing.assert_allclose([found[m][at] for m in similarity.MEASURES], expected, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(5, 30), d=st.integers(3, 12))
def test_what_changes_nothing(seed, n, d):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, d))
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    moved = -0.3 * x @ turn + rng.normal(size=d)
    np.testing.assert_allclose(cka(moved, y), cka(x, y), atol=1e-8)
    assert procrustes(moved, y) == pytest.approx(procrustes(x, y), abs=1e-8)
    assert rsa(5 * x, y) == pytest.approx(rsa(x, y), abs=1e-12)
    np.testing.assert_allclose(cka(x, moved), [1, 1], atol=1e-10)
    assert procrustes(x, moved) < 1e-10
    assert 0 <= cka(x, y)[0] <= 1 + 1e-12
    assert -1 <= cka(x, y)[1] <= 1 + 1e-12
    assert 0 <= procrustes(x, y) <= 2


def test_what_does_change_it():
    x, _ = data(30, 6, 6)
    stretch = np.diag([10.0, 1, 1, 1, 1, 1])
    assert cka(x, x @ stretch)[0] < 0.9
    assert procrustes(x, x @ stretch) > 0.05
    assert rsa(x, x @ stretch) < 0.99
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    assert rsa(x, x @ turn) < 1 - 1e-6
    assert np.allclose(subspace_angles(x, x @ stretch), 0)  # any linear map is nothing to CCA


def test_the_debiased_one_is_0_for_unrelated_data():
    """Twenty rows, 300 features: biased CKA near 1, the debiased one 0 on average."""
    found = np.array([cka(*np.random.default_rng(s).normal(size=(2, 20, 300))) for s in range(40)])
    assert found[:, 0].min() > 0.9
    assert abs(found[:, 1].mean()) < 3 * found[:, 1].std() / math.sqrt(40)


@pytest.mark.parametrize("shape", [(12, 5, 5), (9, 20, 20)])
def test_equals(shape):
    x, _ = data(*shape)
    np.testing.assert_allclose(cka(x, x.copy()), [1, 1], atol=1e-14)
    assert procrustes(x, x.copy()) < 1e-13
    assert rsa(x, x.copy()) == pytest.approx(1, abs=1e-14)
    cosine, change = likeness(x, x.copy())
    np.testing.assert_allclose(cosine, 1, atol=1e-14)
    assert (change == 0).all()


def test_large_offsets_and_dimensions_cost_no_digits():
    x, y = data(30, 6, 6, offset=0.0)
    np.testing.assert_allclose(cka(x + 1e5, y - 1e5), naive_cka(x, y), atol=1e-8)


def test_row_by_row(monkeypatch):
    monkeypatch.setattr(similarity, "BYTES", 1)
    x, y = data(40, 5, 5)
    order = np.random.default_rng(0).permutation(40)
    for other, given_order in ((y, None), (y[order], order)):
        cosine, change = likeness(x, y, given_order)
        for i in range(40):
            dot = np.dot(x[i], other[i]) / np.linalg.norm(x[i]) / np.linalg.norm(other[i])
            assert cosine[i] == pytest.approx(dot)
            assert change[i] == pytest.approx(np.linalg.norm(other[i] - x[i]) / np.linalg.norm(x[i]))
    assert np.isnan(likeness(np.zeros((1, 3)), np.ones((1, 3)))).all()


def test_degenerate_data():
    x, y = data(12, 5, 5)
    flat = np.ones_like(x)
    assert np.isnan([*cka(flat, y), procrustes(flat, y), rsa(flat, y)]).all()
    assert np.isnan(cka(x[:3], y[:3])[1])
    assert np.isfinite(cka(x[:3], y[:3])[0])
    for call in (cka, procrustes):
        with pytest.raises(ValueError, match="same rows, found 11 and 12"):
            call(x, y[:-1])


def test_files_are_read_as_memory_is(tmp_path):
    x, y = data(50, 6, 6)
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=x.shape)
    mapped[:] = x
    assert cka(mapped, y) == cka(x.astype(np.float32), y)
    assert torch.equal(Rows(mapped).norms, Rows(x.astype(np.float32)).norms)
