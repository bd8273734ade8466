"""Intruder dimensions against two naive SVDs, planted truth, PEFT's routine, and the nulls against simulation."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

import finetune_lens as fl
from finetune_lens import linalg
from finetune_lens.errors import InputError

NAME = "layers.0.mlp.up_proj.weight"
EPSILONS = np.linspace(0.02, 1.0, 25)


def pair_of(base, tuned, name=NAME):
    return fl.ModelPair.load({name: torch.as_tensor(base)}, {name: torch.as_tensor(tuned)})


def find(base, tuned, **options):
    options = {"null_draws": 0, "progress": False, "device": "cpu"} | options
    return fl.find_intruders(pair_of(base, tuned), **options)


def orthonormal(rng, n, k):
    return np.linalg.qr(rng.standard_normal((n, k)))[0]


class Naive:
    """Two full float64 SVDs and nothing else."""

    def __init__(self, base, tuned, side):
        if side == "right":
            base, tuned = base.T, tuned.T
        self.u0, self.s0, _ = np.linalg.svd(base, full_matrices=False)
        self.u1, self.s1, _ = np.linalg.svd(tuned, full_matrices=False)
        self.cos = np.abs(self.u0.T @ self.u1)
        self.max_cos = self.cos.max(0)
        self.zero = max(base.shape) * np.finfo(float).eps * self.s0[0]

    def count(self, epsilon, k):
        return int((self.max_cos[:k] < epsilon).sum())

    def gaps(self, s):
        return np.minimum(np.diff(s, prepend=np.inf) * -1, -np.diff(s, append=-np.inf)) / max(s[0], 1e-300)

    def subspace_cos(self, gap):
        """max_i of the cosine with the span of all x_l with |σ_i − σ_l| ≤ gap·σ_i; the null space as what is left."""
        known = self.s0 > self.zero
        best = np.zeros(self.u1.shape[1])
        for s in self.s0[known]:
            span = self.u0[:, known & (np.abs(self.s0 - s) <= gap * s + 1e-12 * self.s0[0])]
            best = np.maximum(best, np.linalg.norm(span.T @ self.u1, axis=0))
        if not known.all():
            rest = self.u1 - self.u0[:, known] @ (self.u0[:, known].T @ self.u1)
            best = np.maximum(best, np.linalg.norm(rest, axis=0))
        return best


@st.composite
def weights(draw):
    """(base, tuned): rectangular both ways, with the degeneracies that break careless code."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    p = min(rows, columns)
    spectrum = draw(st.sampled_from(["plain", "deficient", "repeated", "decaying", "near"]))
    s = np.sort(rng.uniform(0.5, 3, p))[::-1]
    if spectrum == "deficient":
        s[p // 2 :] = 0
    elif spectrum == "repeated":
        s = np.repeat(s[::2], 2)[:p]
    elif spectrum == "decaying":
        s = 10.0 ** -np.arange(p)
    elif spectrum == "near":
        s = 1 + 1e-9 * np.arange(p)[::-1]
    base = (orthonormal(rng, rows, p) * s) @ orthonormal(rng, columns, p).T
    kind = draw(st.sampled_from(["none", "small", "large", "rank one", "negated", "unrelated"]))
    noise = rng.standard_normal((rows, columns))
    delta = {
        "none": np.zeros_like(base),
        "small": 1e-3 * noise,
        "large": noise,
        "rank one": 5 * np.outer(noise[:, 0], noise[0]),
        "negated": -2 * base,
        "unrelated": noise - base,
    }[kind]
    scale = draw(st.sampled_from([1.0, 1e-30, 1e30]))
    return base * scale, (base + delta) * scale


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(weights(), st.sampled_from(["left", "right"]), st.sampled_from(["svd", "gram"]))
def test_every_verdict_agrees_with_two_naive_svds(case, side, route):
    base, tuned = case
    naive = Naive(base, tuned, side)
    p = min(base.shape)
    one, other = (
        linalg.decompose(torch.as_tensor(w), sides=("left", "right"), route=route).side(side) for w in (base, tuned)
    )
    found = linalg.match(one, other, k=p, gap=0.01, block=5)
    lower, upper = found.lower.numpy(), found.upper.numpy()

    # Certain verdicts are the naive ones, on every ε (and therefore on every k).
    assert np.all(lower <= naive.max_cos + 1e-9)
    assert np.all(naive.max_cos <= upper + 1e-9)
    # Where every gap is wide, everything is certain: the interval is narrow, and the counts are equal on ε × k.
    # (The Gram route resolves gaps of the squares, and the far side is magnified by σ_1/σ.)
    reach = 1e-7 if route == "svd" else 1e-3
    s0, s1 = naive.s0 / max(naive.s0[0], 1e-300), naive.s1 / max(naive.s1[0], 1e-300)
    if min(s0) > reach and min(s1) > reach and min(naive.gaps(naive.s0)) > reach and min(naive.gaps(naive.s1)) > reach:
        width = 1e-6 if route == "svd" else 1e-3
        assert np.all(upper - lower <= width)
        assert np.allclose(found.max_cos.numpy(), naive.max_cos, atol=width)
        for epsilon in EPSILONS:
            if np.abs(naive.max_cos - epsilon).min() > width:
                for k in range(1, p + 1):
                    assert int((upper[:k] < epsilon).sum()) == naive.count(epsilon, k)
    # The subspace cosine does not depend on the basis that a solver picks inside a degenerate span.
    if route == "svd" and s1[-1] > 1e-7 and min(naive.gaps(naive.s1)) > 1e-7:
        near_window = np.abs(np.abs(naive.s0[:, None] - naive.s0) - 0.01 * naive.s0[:, None]) < 1e-6 * naive.s0[0]
        if not near_window.any():
            assert np.allclose(found.subspace_cos.numpy(), naive.subspace_cos(0.01), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_undetermined_rather_than_wrong(side):
    """Equal σ in the base: single cosines are the solver's whim, the subspace cosine is not."""
    rng = np.random.default_rng(0)
    n = 12
    u, v = orthonormal(rng, n, n), orthonormal(rng, n, n)
    base = (u * ([5.0] * 4 + list(np.linspace(2, 1, n - 4)))) @ v.T
    turned = u.copy()
    turned[:, :4] = u[:, :4] @ orthonormal(rng, 4, 4)
    other = v.copy()
    other[:, :4] = v[:, :4] @ orthonormal(rng, 4, 4)
    tuned = (turned * np.linspace(6, 1, n)) @ other.T  # the first four lie somewhere in the base's degenerate span
    result = find(base, tuned, side=side, k=4)
    assert (result.verdict(epsilon=0.6).values[0, 0, :4] == -1).all()
    assert np.allclose(result.data.subspace_cos.values[0, 0, :4], 1)
    assert (result.verdict(epsilon=0.49).values[0, 0, :4] == 0).all()  # one of four base vectors is within 1/√4


def test_below_the_rank_tolerance_nothing_is_claimed():
    rng = np.random.default_rng(1)
    base = rng.standard_normal((10, 8))
    tuned = np.outer(rng.standard_normal(10), rng.standard_normal(8))  # rank one: seven vectors are arbitrary
    verdict = find(base, tuned).verdict().values[0, 0]
    assert verdict[0] in (0, 1)
    assert (verdict[1:] == -1).all()


def test_one_arbitrary_vector_is_undetermined_on_the_longer_side():
    """More rows than columns, one σ of zero: its left vector is any of a larger null space, in base or in tuned."""
    rng = np.random.default_rng(14)
    u, v = orthonormal(rng, 12, 12), orthonormal(rng, 6, 6)
    s = np.array([6.0, 5, 4, 3, 2, 0])
    full = np.array([6.0, 5, 4, 3, 2, 1])
    verdict = find((u[:, :6] * full) @ v.T, (u[:, 1:7] * s) @ v.T).verdict().values[0, 0]
    assert list(verdict[:5]) == [0] * 5
    assert verdict[5] == -1
    verdict = find((u[:, :6] * s) @ v.T, (u[:, [0, 1, 2, 3, 4, 9]] * full) @ v.T).verdict().values[0, 0]
    assert list(verdict[:5]) == [0] * 5
    assert verdict[5] == -1  # outside what the base spans, and one of the base's vectors is whatever the solver says


@pytest.mark.parametrize("shape", [(40, 40), (60, 40), (40, 60)])
@pytest.mark.parametrize("route", ["svd", "gram"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_error_bounds_contain_the_error(shape, route, side):
    """Vectors known by construction: σ over five decades, and one far below the rest."""
    rng = np.random.default_rng(15)
    for spectrum in [np.geomspace(1, 1e-5, 40)] * 10 + [np.append(np.linspace(2, 1, 39), 3e-6)] * 10:
        u, v = orthonormal(rng, shape[0], 40), orthonormal(rng, shape[1], 40)
        matrix = torch.tensor((u * spectrum) @ v.T)
        basis = linalg.decompose(matrix, sides=("left", "right"), route=route).side(side)
        true = torch.tensor(u if side == "left" else v)
        computed = basis.vectors * torch.sign((true * basis.vectors).sum(0))
        error = torch.linalg.vector_norm(computed - true, dim=0)
        assert (error <= 2 * basis.error + 1e-12).all()
        assert basis.error[0] < 1e-11  # and they are not idle


@pytest.mark.parametrize("shape", [(60, 60), (90, 60), (60, 90)])
@pytest.mark.parametrize("planted", [0, 1, 3, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_planted_intruders_are_found_exactly(shape, planted, side):
    """The base's singular vectors stay, `planted` new directions rise to the top on either side."""
    rng = np.random.default_rng(planted)
    p = min(shape)
    u, v = orthonormal(rng, shape[0], p), orthonormal(rng, shape[1], p)
    s = np.geomspace(4, 1, p)
    tuned = u @ np.diag(s) @ v.T
    mix = hadamard(32)[:, :planted] / 32**0.5  # each new direction has the cosine 1/√32 to 32 base vectors
    tuned += (u[:, 20:52] @ mix * 40) @ (v[:, 20:52] @ mix).T
    result = find(u @ np.diag(s) @ v.T, tuned, side=side)
    assert result.count(k=10) == planted
    assert result.undetermined(k=10) == 0
    found = result.to_frame()
    assert set(found[found["verdict"] == "intruder"]["rank"]) == set(range(1, planted + 1))


def test_a_model_against_itself_counts_nothing_and_says_so():
    base = np.eye(20)  # as degenerate as can be
    result = find(base, base.copy(), null_draws=2)
    assert result.count(epsilon=1.0, k=20) == 0
    assert result.undetermined(k=20) == 0
    assert "identical" in result.summary()
    assert result.null().mean == 0


def test_comparison_is_with_all_base_vectors_not_the_top():
    """A base direction of rank 30 that rises to the top is no intruder."""
    rng = np.random.default_rng(2)
    u, v = orthonormal(rng, 40, 40), orthonormal(rng, 40, 40)
    s = np.geomspace(4, 1, 40)
    boosted = s.copy()
    boosted[29] = 20
    result = find((u * s) @ v.T, (u * boosted) @ v.T, k=1)
    assert result.count() == 0
    assert int(result.data.best_base_rank[0, 0, 0]) == 30


def test_signs_rotations_and_transposition():
    rng = np.random.default_rng(3)
    base, delta = rng.standard_normal((30, 20)), 3 * rng.standard_normal((30, 2)) @ rng.standard_normal((2, 20))
    left, right = orthonormal(rng, 30, 30), orthonormal(rng, 20, 20)
    plain = find(base, base + delta, side="both").data.max_cos.values
    turned = find(left @ base @ right, left @ (base + delta) @ right, side="both").data.max_cos.values
    negated = find(-base, -(base + delta), side="both").data.max_cos.values
    transposed = find(base.T, (base + delta).T, side="both").data.max_cos.values
    assert np.allclose(plain, turned, atol=1e-9)
    assert np.allclose(plain, negated, atol=1e-12)
    assert np.allclose(plain, transposed[::-1], atol=1e-9)


def test_grid_is_the_count_everywhere():
    rng = np.random.default_rng(4)
    base = rng.standard_normal((30, 30))
    tuned = base + 2 * np.outer(rng.standard_normal(30), rng.standard_normal(30))
    result = find(base, tuned)
    grid = result.grid(EPSILONS, [1, 5, 30])
    naive = Naive(base, tuned, "left")
    assert grid.shape == (25, 3)
    for epsilon in EPSILONS:
        for k in (1, 5, 30):
            assert int(grid.sel(epsilon=epsilon, k=k)) == naive.count(epsilon, k)
            assert result.count(epsilon=epsilon, k=k) == naive.count(epsilon, k)


@pytest.mark.parametrize("shape", [(300, 300), (300, 420), (420, 300)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_gram_route_agrees_with_the_svd_at_size(shape, side):
    """Large enough that `auto` takes the Gram route, both ways round."""
    rng = np.random.default_rng(5)
    base = rng.standard_normal(shape)
    tuned = base + 3 * rng.standard_normal((shape[0], 4)) @ rng.standard_normal((4, shape[1]))
    result = find(base, tuned, side=side)
    naive = Naive(base, tuned, side)
    assert str(result.data.route.values[0]) == "gram"
    assert np.allclose(result.data.max_cos.values[0, 0], naive.max_cos, atol=1e-8)
    assert result.count() == naive.count(0.5, 10) > 0


def test_an_open_verdict_falls_back_to_the_svd():
    """σ at 1e-6 of the largest, close together, is beyond the squares but not beyond the values."""
    rng = np.random.default_rng(6)
    n = 260
    u, v = orthonormal(rng, n, n), orthonormal(rng, n, n)
    s = np.concatenate([[1e6], np.linspace(2, 1, n - 1)])
    turn = u.copy()
    turn[:, 1:] = u[:, 1:] @ orthonormal(rng, n - 1, n - 1)
    result = find((u * s) @ v.T, (turn * s) @ v.T, k=5)
    assert str(result.data.route.values[0]) == "svd"
    assert result.undetermined() == 0
    assert result.count() == 4


def test_factored_and_merged_update_agree():
    rng = np.random.default_rng(7)
    base = torch.tensor(rng.standard_normal((40, 30)))
    a, b = torch.tensor(rng.standard_normal((4, 30))), torch.tensor(rng.standard_normal((40, 4)))
    from finetune_lens.checkpoints.stored import LowRank
    from finetune_lens.intruders import _measure
    from finetune_lens.pair import Matrix

    options = {
        "epsilon": 0.5, "k": 10, "sides": ("left", "right"), "ranks": None, "null_draws": 2, "null_ranks": 10,
        "gap": 0.01, "similarity_ranks": 5, "seed": 0, "device": torch.device("cpu"),
    }  # fmt: skip
    weight = Matrix("m", 0, "up", base, None, LowRank(b, a, 0.5))
    whole = Matrix("m", 0, "up", base, base + 0.5 * b @ a)
    merged, _ = _measure(whole, method="exact", **options)
    for factored, _ in (_measure(weight, method=method, **options) for method in ("auto", "exact", "cached")):
        assert factored["delta_rank"] == merged["delta_rank"] == 4
        for key in ("max_cos", "sigma", "subspace_cos", "delta_norm", "effective_rank", "null_max_cos", "similarity"):
            assert np.allclose(factored[key], merged[key], atol=1e-6), key


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(weights(), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from(["left", "right"]), st.booleans())
def test_the_update_route_agrees_with_two_naive_svds(case, rank, seed, side, top_only):
    base, scale = case[0], np.abs(case[0]).max()
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((base.shape[0], rank)), scale * rng.standard_normal((rank, base.shape[1]))
    naive = Naive(base, base + left @ right, side)
    ranks = min(3, min(base.shape)) if top_only else min(base.shape)
    found = linalg.compare(
        torch.tensor(base), None, (torch.tensor(left), torch.tensor(right)), ranks=ranks, sides=(side,), gap=0.01,
        block=3, epsilon=0.5, judged=ranks, route="cached",
    )  # fmt: skip
    lower, upper = (getattr(found.matches[side], bound).numpy() for bound in ("lower", "upper"))
    assert np.all(lower <= naive.max_cos[:ranks] + 1e-9)
    assert np.all(naive.max_cos[:ranks] <= upper + 1e-9)
    s0, s1 = naive.s0 / max(naive.s0[0], 1e-300), naive.s1 / max(naive.s1[0], 1e-300)
    if min(s0) > 1e-3 and min(s1) > 1e-3 and min(naive.gaps(naive.s0)) > 1e-3 and min(naive.gaps(naive.s1)) > 1e-3:
        assert np.all(upper - lower <= 1e-3)
        assert np.allclose(found.tuned_values[:ranks].numpy(), naive.s1[:ranks])


@pytest.mark.parametrize("shape", [(500, 500), (450, 600), (600, 450)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_update_route_iterates_at_size(shape, side):
    """Large enough that the leading vectors are found by Lanczos iteration, both ways round."""
    rng = np.random.default_rng(16)
    base = torch.tensor(rng.standard_normal(shape))
    update = torch.tensor(3 * rng.standard_normal((shape[0], 4))), torch.tensor(rng.standard_normal((4, shape[1])))
    options = {"ranks": 10, "sides": (side,), "gap": 0.01, "block": 5, "epsilon": 0.5, "judged": 10}
    found = linalg.compare(base, None, update, route="cached", **options)
    naive = Naive(base.numpy(), (base + update[0] @ update[1]).numpy(), side)
    assert found.route == "cached"
    assert np.allclose(found.matches[side].max_cos.numpy(), naive.max_cos[:10], atol=1e-8)
    assert (found.matches[side].upper - found.matches[side].lower).max() < 1e-4


@pytest.mark.parametrize("factored", [True, False])
def test_a_cached_base_gives_the_same_and_is_decomposed_once(factored, tmp_path, monkeypatch):
    rng = np.random.default_rng(18)
    base, left = torch.tensor(rng.standard_normal((300, 260))), torch.tensor(3 * rng.standard_normal((300, 4)))
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda w: calls.append(len(w)) or eigh(w))
    for seed in range(3):
        right = torch.tensor(np.random.default_rng(seed).standard_normal((4, 260)))
        tuned, update = (None, (left, right)) if factored else (base + left @ right, None)
        options = {"ranks": 10, "sides": ("left", "right"), "gap": 0.01, "block": 5, "epsilon": 0.5, "judged": 10}
        calls.clear()
        fresh = linalg.compare(base, tuned, update, route="cached", **options)
        alone = len(calls)
        cache = linalg.BasisCache(tmp_path / "bases", 10**9)
        calls.clear()
        cached = linalg.compare(base, tuned, update, route="cached", store=cache, digest="w", **options)
        assert len(calls) == alone + (not factored and seed == 0) - (factored and seed > 0)
        assert np.allclose(fresh.base_values, cached.base_values)
        for side in ("left", "right"):
            for bound in ("max_cos", "lower", "upper", "subspace_cos"):
                one, other = (getattr(c.matches[side], bound).numpy() for c in (fresh, cached))
                assert np.allclose(one, other, atol=1e-9), bound
    (file,) = (tmp_path / "bases").iterdir()
    file.write_bytes(file.read_bytes()[:1000])  # cut off: computed anew, not trusted
    assert cache.get("w") is None
    assert cache.get("other") is None


def test_the_cache_stays_below_its_limit(tmp_path):
    basis = linalg.decompose(torch.eye(30), sides=("left",)).left
    cache = linalg.BasisCache(tmp_path / "bases", 2 * 30 * 30 * 8 + 5000)
    for name in "abc":
        cache.put(name, basis)
    assert [cache.get(name) is not None for name in "abc"] == [True, True, False]
    assert torch.equal(cache.get("a").vectors, basis.vectors)


def test_only_the_top_is_looked_at_when_asked():
    rng = np.random.default_rng(19)
    base, tuned = rng.standard_normal((300, 300)), rng.standard_normal((300, 300))
    whole, top = find(base, tuned), find(base, tuned, ranks=12)
    assert top.data.sizes["rank"] == 12
    assert np.allclose(top.data.max_cos, whole.data.max_cos[..., :12], atol=1e-9)
    assert np.allclose(top.data.gap, whole.data.gap[..., :12], atol=1e-9)
    assert top.undetermined() == 0
    with pytest.raises(InputError, match="ranks is at least k"):
        find(base, tuned, ranks=5)


def test_a_missed_eigenvalue_is_noticed():
    """Sylvester's count against a list of eigenvalues from which one was dropped."""
    from finetune_lens.linalg.lowrank import _complete

    rng = np.random.default_rng(17)
    d = torch.tensor(np.linspace(3, 1, 60))
    base = torch.diag(d)
    left, right = torch.tensor(rng.standard_normal((60, 3))), torch.tensor(rng.standard_normal((3, 60)))
    z, gram = base @ right.T, right @ right.T
    squares = torch.linalg.eigvalsh((base + left @ right) @ (base + left @ right).T).flip(0)
    noise = torch.tensor(1e-12, dtype=torch.float64)
    assert _complete(d.square(), left, z, gram, squares[:12], noise)
    for missing in range(11):
        kept = torch.cat([squares[:missing], squares[missing + 1 : 12]])
        assert not _complete(d.square(), left, z, gram, kept, noise)


def test_nulls_are_the_counts_of_random_updates():
    """The null in the base's singular basis against the long way: random Δ added to W0, two SVDs."""
    rng = np.random.default_rng(8)
    base = rng.standard_normal((24, 36))
    values = np.array([9.0, 6.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    short = np.array(
        [
            linalg.null_max_cos(
                torch.linalg.svdvals(torch.tensor(base)), torch.tensor(values), (24, 36), k=6, sides=("left", "right"),
                generator=generator,
            )[side].numpy()
            for _ in range(300)
            for side in ("left", "right")
        ]
    ).reshape(300, 2, 6)  # fmt: skip
    long = np.empty_like(short)
    for draw in range(300):
        delta = (orthonormal(rng, 24, 3) * values) @ orthonormal(rng, 36, 3).T
        long[draw] = [Naive(base, base + delta, side).max_cos[:6] for side in ("left", "right")]
    error = np.sqrt((short.var(0) + long.var(0)) / 300)
    assert (np.abs(short.mean(0) - long.mean(0)) < 4.5 * error).all()
    assert np.ptp(short.mean(0)) > 0.2  # there is something to agree about


def test_null_interval_covers_a_random_update():
    """An update that *is* random lies inside its own null; an aligned one lies below it."""
    rng = np.random.default_rng(9)
    base = {f"layers.{i}.mlp.up_proj.weight": torch.tensor(rng.standard_normal((50, 50))) for i in range(6)}
    s = np.array([30.0, 28, 26, 24])
    tuned = {n: w + torch.tensor((orthonormal(rng, 50, 4) * s) @ orthonormal(rng, 50, 4).T) for n, w in base.items()}
    result = fl.find_intruders(fl.ModelPair.load(base, tuned), progress=False, null_draws=10)
    null = result.null()
    assert null.low <= result.count() <= null.high
    assert null.low < null.high
    assert result.count() > 10
    assert null.p_value > 0.02

    aligned = {}
    for name, w in base.items():
        u, _, vh = torch.linalg.svd(w)
        aligned[name] = w + (u[:, :4] * torch.tensor(s)) @ vh[:4]
    result = fl.find_intruders(fl.ModelPair.load(base, aligned), progress=False, null_draws=10)
    assert result.count() == 0 < result.null().low
    assert "fewer than random" in result.summary()


def test_null_draws_do_not_depend_on_the_other_matrices():
    rng = np.random.default_rng(10)
    base = {f"layers.{i}.mlp.up_proj.weight": torch.tensor(rng.standard_normal((20, 20))) for i in range(3)}
    tuned = {n: w + torch.tensor(rng.standard_normal((20, 20))) for n, w in base.items()}
    pair = fl.ModelPair.load(base, tuned)
    both = [fl.find_intruders(pair, progress=False, limit=n, null_draws=2).data.null_max_cos for n in (1, 3)]
    assert np.array_equal(both[0].values[:, :, :, 0], both[1].values[:, :, :, 0])
    other = fl.find_intruders(pair, progress=False, null_draws=2, seed=1).data.null_max_cos
    assert not np.array_equal(both[1].values, other.values)


def test_matrices_of_different_size_are_padded_not_counted():
    rng = np.random.default_rng(11)
    base = {"layers.0.mlp.up_proj.weight": torch.tensor(rng.standard_normal((6, 30))),
            "layers.0.mlp.down_proj.weight": torch.tensor(rng.standard_normal((30, 30)))}  # fmt: skip
    tuned = {n: torch.tensor(rng.standard_normal(tuple(w.shape))) for n, w in base.items()}
    result = fl.find_intruders(fl.ModelPair.load(base, tuned), progress=False, null_draws=3)
    assert result.table("all")["vectors"].item() == 16
    assert len(result.to_frame()) == 16
    expected = sum(Naive(base[n].numpy(), tuned[n].numpy(), "left").count(0.5, 10) for n in base)
    assert result.count() == expected
    assert result.table("component")["intruders"].sum() == expected
    assert result.null(k=10).high <= 16


def test_embeddings_are_left_out_unless_asked_for():
    rng = np.random.default_rng(12)
    names = {
        "model.embed_tokens.weight": (40, 16),
        "model.layers.0.mlp.up_proj.weight": (16, 16),
        "lm_head.weight": (40, 16),
    }
    base = {n: torch.tensor(rng.standard_normal(s)) for n, s in names.items()}
    tuned = {n: torch.tensor(rng.standard_normal(s)) for n, s in names.items()}
    pair = fl.ModelPair.load(base, tuned)
    plain = fl.find_intruders(pair, progress=False, null_draws=0)
    full = fl.find_intruders(pair, progress=False, null_draws=0, embeddings=True)
    assert list(plain.data.matrix.values) == ["layers.0.mlp.up_proj"]
    assert set(full.data.component.values) == {"embed", "up", "unembed"}


def test_half_precision_is_upcast_before_anything_is_computed():
    rng = np.random.default_rng(13)
    base = torch.tensor(rng.standard_normal((40, 40)), dtype=torch.bfloat16)
    tuned = torch.tensor(rng.standard_normal((40, 40)), dtype=torch.float16)
    result = find(base, tuned)
    naive = Naive(base.double().numpy(), tuned.double().numpy(), "left")
    assert np.allclose(result.data.max_cos.values[0, 0], naive.max_cos, atol=1e-9)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", 1.5),
        ("epsilon", np.nan),
        ("k", 0),
        ("null_draws", -1),
        ("side", "up"),
        ("gap", -1),
        ("gap", np.nan),
        ("similarity_ranks", -1),
        ("limit", 0),
        ("limit", -1),
        ("method", "guess"),
        ("device", "cuda:7"),
        ("device", "meta"),
    ],
)
def test_options_out_of_range(option, value):
    with pytest.raises(InputError, match=option):
        find(np.eye(4), 2 * np.eye(4), **{option: value})


def test_effective_rank_is_the_entropy():
    assert linalg.effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=torch.float64)) == pytest.approx(3)
    assert linalg.effective_rank(torch.zeros(3, dtype=torch.float64)) == 0
    assert linalg.effective_rank(torch.tensor([1.0], dtype=torch.float64)) == pytest.approx(1)


def test_haar_frames_are_orthonormal_and_uniform():
    generator = torch.Generator().manual_seed(0)
    frames = torch.stack([linalg.haar(6, 2, generator=generator) for _ in range(4000)])
    assert torch.allclose(frames.mT @ frames, torch.eye(2, dtype=torch.float64), atol=1e-12)
    assert (frames.mean(0).abs() < 5 / (6 * 4000) ** 0.5).all()  # without Mezzadri's signs the first row is one-sided
    assert torch.allclose(frames.square().mean(0), torch.full((6, 2), 1 / 6, dtype=torch.float64), atol=0.01)


def test_the_even_null_spreads_the_same_energy():
    """Against random updates of Δ's norm and rank with equal singular values, added the long way."""
    rng = np.random.default_rng(20)
    base = rng.standard_normal((30, 30))
    delta = (orthonormal(rng, 30, 3) * [20.0, 2, 1]) @ orthonormal(rng, 30, 3).T
    found = find(base, base + delta, null_draws=300, k=5).data.null_max_cos.sel(side="left").isel(matrix=0)
    equal = np.full(3, np.linalg.norm(delta) / 3**0.5)
    for name, values in (("evenly", equal), ("spectrum", np.array([20.0, 2, 1]))):
        long = np.array(
            [
                Naive(base, base + (orthonormal(rng, 30, 3) * values) @ orthonormal(rng, 30, 3).T, "left").max_cos[:5]
                for _ in range(300)
            ]
        )
        short = found.sel(null=name).values[:, :5]
        assert (np.abs(short.mean(0) - long.mean(0)) < 4.5 * np.sqrt((short.var(0) + long.var(0)) / 300)).all(), name
    assert (found.sel(null="evenly")[:, 2].mean() - found.sel(null="spectrum")[:, 2].mean()) < -0.1


def test_the_rank_of_the_update_is_not_that_of_its_rounding():
    """A rank-one update stored in bfloat16: the rest of its spectrum is what rounding left."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(60, 60, generator=generator)
    tuned = base.bfloat16().float() + torch.outer(
        torch.randn(60, generator=generator), torch.randn(60, generator=generator)
    )
    for one, other in ((base, tuned.bfloat16()), (base.bfloat16(), tuned)):
        assert int(find(one, other).data.delta_rank[0]) == 1
        measured = fl.measure_updates(pair_of(one, other), progress=False, null_draws=5)
        assert int(measured.data.delta_rank[0]) == 1


def test_the_nulls_of_an_update_below_the_bound_of_rounding_keep_its_energy():
    """A full update in bfloat16 beside a base of one large σ: the nulls are those of the same numbers in float32."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.nn.functional.normalize(torch.randn(96, generator=generator), dim=0) for _ in range(2))
    base = (torch.randn(96, 96, generator=generator) / 96**0.5 + 120 * torch.outer(u, v)).bfloat16()
    tuned = (base.float() + 0.4 * torch.randn(96, 96, generator=generator) / 96**0.5).bfloat16()
    half, single = find(base, tuned, null_draws=3), find(base.float(), tuned.float(), null_draws=3)
    assert int(half.data.delta_rank[0]) < 10
    assert int(single.data.delta_rank[0]) == 96
    assert np.array_equal(half.data.null_max_cos, single.data.null_max_cos)


def test_relative_gaps_and_their_flag():
    gaps = linalg.relative_gaps(torch.tensor([4.0, 2.0, 1.98, 0.5], dtype=torch.float64))
    assert gaps.tolist() == pytest.approx([0.5, 0.01, 0.02 / 1.98, 1.48 / 0.5])
    tuned = np.diag([4.0, 2.0, 1.99, 0.5])
    frame = find(np.diag([4.0, 3.0, 2.0, 1.0]), tuned, gap=0.02).to_frame()
    assert frame["near_degenerate"].tolist() == [False, True, True, False]


@pytest.mark.parametrize("scale", [1e-170, 1e160])
@pytest.mark.parametrize("n", [40, 300])
@pytest.mark.parametrize("method", ["exact", "certified"])
def test_extreme_scales(scale, n, method):
    rng = np.random.default_rng(21)
    base, tuned = rng.standard_normal((n, n)), rng.standard_normal((n, n))
    plain = find(base, tuned, ranks=12, null_draws=1)
    scaled = find(base * scale, tuned * scale, ranks=12, null_draws=1, method=method)
    assert np.allclose(plain.data.max_cos, scaled.data.max_cos, atol=1e-9)
    assert not bool(scaled.data.unchanged[0])
    assert float(scaled.data.effective_rank[0]) == pytest.approx(float(plain.data.effective_rank[0]))
    assert np.allclose(plain.data.null_max_cos, scaled.data.null_max_cos, atol=1e-5)


def test_placing_in_pieces_is_the_same(monkeypatch):
    """Whole clusters stay together, wherever the pieces would end."""
    from finetune_lens.linalg import matching

    rng = np.random.default_rng(22)
    s = np.repeat(np.linspace(3, 1, 10), 3)
    base, tuned = (
        linalg.decompose(torch.tensor((orthonormal(rng, 30, 30) * s) @ orthonormal(rng, 30, 30).T)).left for _ in "ab"
    )
    whole = linalg.match(base, tuned, k=20, gap=0.01, block=6)
    monkeypatch.setattr(matching, "COLUMNS", 4)
    pieces = linalg.match(base, tuned, k=20, gap=0.01, block=6)
    for field in ("max_cos", "best", "lower", "upper", "subspace_cos", "similarity"):
        assert torch.allclose(getattr(whole, field).double(), getattr(pieces, field).double(), atol=1e-12), field
    assert whole.max_cos.shape == (20,)
