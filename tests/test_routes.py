"""The routes of the comparison against each other and against naive decompositions, at sizes where they differ."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_lens import ModelPair, find_intruders, linalg
from finetune_lens.errors import InputError
from finetune_lens.linalg import certified, krylov, routes

OPTIONS = {"gap": 0.01, "block": 5, "epsilon": 0.5}
ROUTES = ("exact", "cached", "certified")


def weights(rng, shape, *, outliers=6, rank=6, strength=2.0):
    """A base with a bulk and a few strong directions, and an update of low rank that outgrows some of them."""
    out, wide = shape
    base = rng.standard_normal(shape) / max(shape) ** 0.5
    strong = rng.standard_normal((out, outliers)) * np.linspace(5, 2.2, outliers) / out**0.5
    base += strong @ rng.standard_normal((outliers, wide)) / wide**0.5
    left = rng.standard_normal((out, rank)) * np.linspace(strength, 0.3, rank) / out**0.5
    right = rng.standard_normal((rank, wide)) / wide**0.5
    return torch.tensor(base), torch.tensor(left), torch.tensor(right)


def truth(base, tuned, side, k):
    """max_i |⟨u_j, x_i⟩| from two SVDs by numpy."""
    (u0, _, v0), (u1, _, v1) = (np.linalg.svd(w.numpy(), full_matrices=False) for w in (base, tuned))
    return np.abs(u0.T @ u1 if side == "left" else v0 @ v1.T).max(0)[:k]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([(270, 270), (300, 260), (260, 300), (420, 261)]),
    st.sampled_from(["left", "right"]),
    st.sampled_from(ROUTES),
    st.booleans(),
    st.floats(0, 8),
    st.integers(0, 12),
    st.integers(0, 2**32 - 1),
)
def test_every_route_holds_the_truth_and_settles_every_vector(shape, side, route, factored, strength, outliers, seed):
    base, left, right = weights(np.random.default_rng(seed), shape, outliers=outliers, strength=strength)
    tuned = base + left @ right
    given_ = (None, (left, right)) if factored else (tuned, None)
    found = linalg.compare(base, *given_, ranks=8, sides=(side,), judged=8, route=route, **OPTIONS)
    match, actual = found.matches[side], truth(base, tuned, side, 8)
    lower, upper = match.lower.numpy(), match.upper.numpy()
    assert np.all(lower <= actual + 1e-9)
    assert np.all(actual <= upper + 1e-9)
    clear = np.abs(actual - 0.5) > 1e-4
    assert np.array_equal((upper < 0.5)[clear], (actual < 0.5)[clear])
    assert np.array_equal((lower >= 0.5)[clear], (actual >= 0.5)[clear])
    if route != "certified" or not found.certified[side].all():
        settled = ~found.certified[side].numpy()
        assert np.allclose(match.max_cos.numpy()[settled], actual[settled], atol=1e-5)


@pytest.mark.parametrize("shape", [(600, 600), (900, 500), (500, 900)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("planted", [0, 3])
def test_proofs_need_no_decomposition_of_the_base(shape, side, planted, monkeypatch):
    rng = np.random.default_rng(1)
    base, left, right = weights(rng, shape, outliers=12, rank=max(planted, 1), strength=0.01)
    if planted:
        left *= 20 / torch.linalg.vector_norm(left, dim=0)
    monkeypatch.setattr(routes, "place", None)
    monkeypatch.setattr(routes, "decompose", None)
    found = linalg.compare(base, None, (left, right), ranks=10, sides=(side,), judged=10, route="certified", **OPTIONS)
    assert found.route == "certified"
    assert found.certified[side].all()
    assert int((found.matches[side].upper < 0.5).sum()) == planted
    assert len(found.base_values) < 100


def test_what_no_proof_settles_goes_the_exact_way():
    """A tuned vector deep in the base's bulk: no leading base vector is near it, and its mass is in one point."""
    rng = np.random.default_rng(2)
    n = 700
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in "uv")
    s = np.linspace(2, 1, n)
    risen = s.copy()
    risen[350] = 5.0
    base, tuned = torch.tensor((u * s) @ v.T), torch.tensor((u * risen) @ v.T)
    found = linalg.compare(base, tuned, None, ranks=1, sides=("left",), judged=1, route="certified", **OPTIONS)
    assert found.route == "gram"
    assert not found.certified["left"].any()
    assert float(found.matches["left"].lower[0]) == pytest.approx(1)
    assert int(found.matches["left"].best[0]) == 350


def test_no_certificate_is_wrong_in_ten_thousand():
    """Random directions of every concentration against a base with outliers, a bulk and repeated values."""
    rng = np.random.default_rng(3)
    n, batch = 220, 50
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    issued = wrong = near = 0
    for round_ in range(200):
        values = np.sort(np.concatenate([rng.uniform(0, 1, n - 12), rng.uniform(1, 4, 12)]))[::-1]
        if round_ % 4 == 0:
            values[5:8] = values[5]
        operator = torch.tensor((basis * values) @ basis.T)
        spread = rng.integers(1, n, batch)  # how many base vectors hold most of the direction
        shares = np.abs(rng.standard_normal((n, batch))) * np.where(np.arange(n)[:, None] < spread, 1.0, 0.02)
        for column in range(batch):
            shares[:, column] = rng.permutation(shares[:, column]) if column % 2 else shares[:, column]
        shares *= rng.choice([-1, 1], shares.shape) / np.linalg.norm(shares, axis=0)
        exact = np.sqrt(_largest_by_eigenspace(shares, values))
        for start in range(0, batch, 10):
            u = torch.tensor(basis @ shares[:, start : start + 10]).T.contiguous()
            tuned = linalg.Basis(
                torch.empty(0, 10, dtype=torch.float64),
                torch.arange(10, 0, -1, dtype=torch.float64),
                torch.zeros(10, dtype=torch.float64),
                torch.arange(10),
                10,
            )
            found = certified.certify(
                lambda x, a=operator: x @ a, u, tuned, k=10, epsilon=0.5, gap=0.01, block=3, noise_per_scale=1e-13
            ).match
            actual = exact[start : start + 10]
            issued += int((found.upper < 0.5).sum())
            near += int((found.lower >= 0.5).sum())
            wrong += int((found.upper.numpy() < actual - 1e-9).sum())
            alone = np.sqrt((shares[:, start : start + 10] ** 2).max(0))
            wrong += int((found.lower.numpy() > np.maximum(alone, actual) + 1e-9).sum())
    assert wrong == 0
    assert issued > 3000
    assert near > 300


def _largest_by_eigenspace(shares, values):
    """max over eigenspaces of the squared share in it."""
    groups = np.unique(values, return_inverse=True)[1]
    mass = np.zeros((groups.max() + 1, shares.shape[1]))
    np.add.at(mass, groups, shares**2)
    return mass.max(0)


def test_the_share_is_bounded_whatever_the_eigenvalue():
    """One step from where the bound could fail: two atoms and little else, at every distance from each other."""
    for apart in (1e-6, 1e-3, 0.1, 1.0):
        values = torch.cat([torch.tensor([2.0, 2.0 + apart]), torch.linspace(0.1, 1, 98)]).to(torch.float64)
        z = torch.full((1, 100), 0.01, dtype=torch.float64)
        z[0, 0], z[0, 1] = 0.6, 0.7
        space = krylov.Krylov(lambda x, d=values: x * d, z, limit=60)
        for _ in range(12):
            space.step()
        start = torch.zeros(space.dim, 1, dtype=torch.float64)
        start[:1] = space.start_in_basis
        share = float(certified.largest_share(space, start, 1e-14)[0])
        assert share >= 0.7
        assert apart < 0.1 or share < 0.95


@pytest.mark.parametrize("p", [200, 450])
def test_leading_pairs_have_true_bounds(p):
    rng = np.random.default_rng(4)
    q = np.linalg.qr(rng.standard_normal((p, p)))[0]
    values = np.sort(rng.uniform(0, 1, p))[::-1] ** 2 * 9
    operator = torch.tensor((q * values) @ q.T)
    start = torch.randn(14, p, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = krylov.leading(lambda x: x @ operator, start, 8, 1e-14)
    t = len(found.values)
    assert t >= 8
    assert np.allclose(found.values.numpy() ** 2, values[:t], atol=1e-9)
    sine = np.sqrt(np.clip(1 - np.einsum("ij,ij->j", q[:, :t], found.vectors.numpy()) ** 2, 0, 1))
    assert np.all(sine <= found.error.numpy() + 1e-7)
    assert np.all(found.error.numpy() < 1e-3)


@pytest.mark.parametrize("route", ["cached", "certified"])
def test_the_last_vector_has_known_neighbours(route):
    """Iterated to the 10th, that one's gap is still to both sides: here the 11th σ is nearer than the 9th."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(420, 420, generator=generator, dtype=torch.float64) / 420**0.5
    update = tuple(
        0.1 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((420, 4), (4, 420))
    )
    found = linalg.compare(base, None, update, ranks=10, sides=("left",), judged=10, route=route, **OPTIONS)
    exact = linalg.relative_gaps(torch.linalg.svdvals(base + update[0] @ update[1]))[:10]
    assert found.route == route
    assert torch.allclose(linalg.relative_gaps(found.tuned_values)[:10], exact, rtol=1e-6)


def test_repeated_values_are_not_counted_by_iteration():
    """Twenty equal values at the top: a block of 14 finds 14 of them and must not take these for all."""
    values = torch.cat([torch.full((20,), 4.0), torch.linspace(1, 0, 180)]).to(torch.float64)
    start = torch.randn(14, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert krylov.leading(lambda x: x * values, start, 8, 1e-14) is None


def test_an_invariant_space_ends_the_iteration():
    values = torch.tensor([3.0, 2.0, 1.0] * 10, dtype=torch.float64)
    space = krylov.Krylov(lambda x: x * values, torch.ones(1, 30, dtype=torch.float64))
    while not space.full:
        space.step()
    assert space.exhausted
    assert space.dim == 3
    assert np.allclose(space.ritz()[0].numpy(), [3, 2, 1])


@pytest.mark.parametrize("shape", [(300, 300), (280, 400), (400, 280)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cosines_without_forming_the_base_vectors(shape, side):
    rng = np.random.default_rng(5)
    matrix = torch.tensor(rng.standard_normal(shape))
    u = torch.tensor(np.linalg.qr(rng.standard_normal((shape[side == "right"], 7)))[0])
    values, placed = linalg.place(matrix, {side: u})
    basis, cosines = placed[side]
    whole = linalg.decompose(matrix, sides=(side,), route="svd")
    assert np.allclose(values, whole.values, atol=1e-10)
    assert np.allclose(cosines.abs(), (whole.side(side).vectors.T @ u).abs(), atol=1e-8)
    assert basis.complete == (shape[side == "right"] == min(shape))


def test_both_sides_of_a_square_matrix_are_the_near_side():
    """A base with very small σ: dividing by it would leave the right side open."""
    rng = np.random.default_rng(6)
    q, r = (np.linalg.qr(rng.standard_normal((300, 300)))[0] for _ in "qr")
    base = torch.tensor((q * np.logspace(0, -5, 300)) @ r.T)
    left, right = torch.tensor(rng.standard_normal((300, 2))) / 30, torch.tensor(rng.standard_normal((2, 300))) / 10
    for route in ROUTES:
        found = linalg.compare(
            base, None, (left, right), ranks=6, sides=("left", "right"), judged=6, route=route, leading=True, **OPTIONS
        )
        assert found.route != "svd"
        for side in ("left", "right"):
            actual = truth(base, base + left @ right, side, 6)
            match = found.matches[side]
            assert np.all(match.lower.numpy() <= actual + 1e-9)
            assert np.all(actual <= match.upper.numpy() + 1e-9)
            assert found.leading[side].shape == (300, 6)


@pytest.mark.parametrize("shape", [(300, 300), (280, 400), (400, 280)])
@pytest.mark.parametrize("route", ROUTES)
def test_the_leading_vectors_come_along(shape, route):
    rng = np.random.default_rng(7)
    base, left, right = weights(rng, shape, strength=6.0)
    found = linalg.compare(
        base, None, (left, right), ranks=6, sides=("left", "right"), judged=4, route=route, leading=True, **OPTIONS
    )
    u, _, vh = np.linalg.svd((base + left @ right).numpy(), full_matrices=False)
    for side, vectors in (("left", u), ("right", vh.T)):
        cosines = np.abs(np.einsum("ij,ij->j", found.leading[side].numpy(), vectors[:, :4]))
        assert np.allclose(cosines, 1, atol=1e-6)


def test_one_weight_is_kept_in_memory(tmp_path):
    basis = linalg.decompose(torch.eye(30), sides=("left",)).left
    one, other = "a" * 64, "b" * 64
    store = linalg.Latest(linalg.BasisCache(tmp_path / "bases", 10**9))
    store.put(one, basis)
    store.put(f"{one}ᵀ", basis)
    assert store.get(one) is basis
    assert store.get(other) is None
    store.put(other, basis)
    assert set(store._held) == {other}
    assert torch.equal(store.get(one).vectors, basis.vectors)  # from the folder


@pytest.mark.parametrize(
    ("shape", "given_", "route"),
    [
        ((2048, 2048), {"factored": True}, "certified"),
        ((2048, 2048), {"factored": True, "values": True}, "exact"),
        ((2048, 2048), {"factored": True, "stored": True}, "cached"),
        ((2048, 2048), {"factored": False, "ranks": 100}, "exact"),
        ((200, 300), {"factored": True, "ranks": 200}, "cached"),
        ((200, 300), {"factored": True}, "exact"),
        ((200, 300), {"factored": False, "method": "cached"}, "exact"),
        ((200, 300), {"factored": True, "method": "cached"}, "cached"),
        ((200, 300), {"factored": False, "method": "certified"}, "certified"),
    ],
)
def test_the_route_follows_size_and_structure(shape, given_, route):
    defaults = {"ranks": 10, "method": "auto", "stored": False, "values": False}
    assert linalg.choose(shape, **(defaults | given_)) == route


def test_a_certified_result_says_so():
    rng = np.random.default_rng(8)
    base, left, right = weights(rng, (300, 280), strength=7.0)
    name = "layers.0.mlp.up_proj.weight"
    pair = ModelPair.load({name: base.float()}, {name: (base + left @ right).float()})
    options = {"progress": False, "null_draws": 0, "side": "both"}
    proved, exact = (find_intruders(pair, method=method, **options) for method in ("certified", "exact"))
    for side in ("left", "right"):
        assert proved.count(side=side) == exact.count(side=side) > 0
        assert proved.undetermined(side=side) == 0
    frame = proved.to_frame()
    assert set(frame.route) == {"certified"}
    assert set(exact.to_frame().route) == {"gram"}
    assert (frame.margin > 0).all()
    assert np.allclose(frame.margin, np.where(frame.verdict == "intruder", 0.5 - frame.upper, frame.lower - 0.5))
    assert proved.data.sizes["rank"] == 10
    assert np.isnan(proved.data.effective_rank).all()
    assert "not computed" in proved.summary()
    with pytest.raises(InputError, match="at most 10"):
        proved.count(k=11)
    drawn = find_intruders(pair, method="certified", null_draws=2, progress=False)
    assert drawn.data.sizes["base_rank"] == 280
    assert drawn.null() is not None


def test_certified_serves_few_vectors():
    w = {"layers.0.mlp.up_proj.weight": torch.eye(4)}
    with pytest.raises(InputError, match="up to 64"):
        find_intruders(ModelPair.load(w, w), method="certified", ranks=65)


@pytest.mark.parametrize(("shape", "side"), [((300, 200), "left"), ((200, 300), "right")])
def test_the_longer_side_in_coordinates_of_its_own(shape, side):
    """⟨h, w_i⟩ with the eigenvectors of the operator are the cosines with the singular vectors."""
    rng = np.random.default_rng(10)
    w = torch.tensor(rng.standard_normal(shape))
    u = torch.tensor(np.linalg.qr(rng.standard_normal((300, 5)))[0])
    apply, start, slack = routes._Weight(w, None).coordinates(u, near=False)
    operator = apply(torch.eye(200, dtype=torch.float64))
    values, vectors = np.linalg.eigh(operator.numpy())
    left, s, right = np.linalg.svd(w.numpy(), full_matrices=False)
    basis = left if side == "left" else right.T
    assert np.allclose(values[::-1] ** 0.5, s)
    assert np.allclose(np.abs(start.numpy() @ vectors)[:, ::-1], np.abs(u.numpy().T @ basis), atol=slack)
    assert 1e-13 < slack < 1e-6
    flat = w.clone()
    flat[: 1 if side == "right" else 300, : 1 if side == "left" else 300] = 0  # a vanishing singular value
    assert routes._Weight(flat, None).coordinates(u, near=False) is None


def test_a_matrix_proved_on_one_side_names_the_route_of_the_other():
    """A direction new on the left, deep in the base's bulk on the right."""
    rng = np.random.default_rng(11)
    n = 700
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in "uv")
    base = (u * np.linspace(2, 1, n)) @ v.T
    tuned = base + 30 * np.outer(u @ np.full(n, n**-0.5), v[:, 350])
    found = linalg.compare(
        torch.tensor(base), torch.tensor(tuned), None, ranks=1, sides=("left", "right"), judged=1, route="certified",
        **OPTIONS,
    )  # fmt: skip
    assert found.route == "gram"
    assert len(found.base_values) == n
    assert [bool(found.certified[side].all()) for side in ("left", "right")] == [True, False]
    assert float(found.matches["left"].upper[0]) < 0.5 <= float(found.matches["right"].lower[0])
