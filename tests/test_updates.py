"""Update anatomy against closed forms and numpy."""

import numpy as np
import pytest
import torch

import finetune_lens as fl
from finetune_lens.errors import InputError


def measure(base, tuned, name="layers.0.mlp.up_proj.weight", **options):
    pair = fl.ModelPair.load({name: torch.as_tensor(base)}, {name: torch.as_tensor(tuned)})
    return fl.measure_updates(pair, progress=False, device="cpu", **options)


def orthonormal(rng, n, k):
    return np.linalg.qr(rng.standard_normal((n, k)))[0]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (300, 280)])
def test_norms_and_ranks_are_numpys(shape):
    rng = np.random.default_rng(0)
    base, delta = rng.standard_normal(shape), rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))
    data = measure(base, base + delta).data.isel(matrix=0)
    s = np.linalg.svd(delta, compute_uv=False)
    share = s[:3] / s[:3].sum()
    assert float(data.relative_norm) == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base))
    assert float(data.relative_spectral) == pytest.approx(s[0] / np.linalg.norm(base, 2))
    assert float(data.stable_rank) == pytest.approx((s**2).sum() / s[0] ** 2)
    assert float(data.effective_rank) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert float(data.delta_rank) == 3
    assert np.allclose(data.sigma_delta.values[:3], s[:3])
    assert float(data.tuned_norm) == pytest.approx(np.linalg.norm(base + delta))
    assert (float(data.out), float(data["in"])) == shape


@pytest.mark.parametrize(("start", "expected"), [(0, [0.5, 1.0, 1.0]), (8, [0.0, 0.0, 0.0]), (1, [0.0, 0.5, 1.0])])
def test_energy_in_the_bases_leading_subspaces(start, expected):
    """Δ on the base's singular vectors start, start+1 with equal weight."""
    rng = np.random.default_rng(1)
    u, v = orthonormal(rng, 40, 30), orthonormal(rng, 30, 30)
    base = (u * np.linspace(9, 1, 30)) @ v.T
    delta = u[:, start : start + 2] @ v[:, start : start + 2].T
    data = measure(base, base + 0.1 * delta, ks=(1, 2, 4)).data.isel(matrix=0)
    assert np.allclose(data.energy.values, expected, atol=1e-9)
    assert np.allclose(data.energy_null.values, [1 / 1200, 4 / 1200, 16 / 1200])


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_band_of_chance_is_that_of_random_updates(rank):
    """Mean and quantiles against updates turned at random the long way."""
    rng = np.random.default_rng(2)
    m, n, k = 60, 40, 8
    u, v = orthonormal(rng, m, n), orthonormal(rng, n, n)
    base = (u * np.linspace(9, 1, n)) @ v.T
    s = np.linspace(2, 1, rank)
    delta = (orthonormal(rng, m, rank) * s) @ orthonormal(rng, n, rank).T
    data = measure(base, base + delta, ks=(k,), null_draws=2000).data.isel(matrix=0, k=0)
    long = []
    for _ in range(600):
        random = (orthonormal(rng, m, rank) * s) @ orthonormal(rng, n, rank).T
        long.append(np.linalg.norm(u[:, :k].T @ random @ v[:, :k]) ** 2 / (s**2).sum())
    low, high = np.quantile(long, [0.025, 0.975])
    assert float(data.energy_null) == pytest.approx(np.mean(long), rel=0.1)
    assert float(data.energy_low) == pytest.approx(low, rel=0.1, abs=0.001)
    assert float(data.energy_high) == pytest.approx(high, rel=0.1)


def test_the_band_of_chance_never_leaves_what_is_possible():
    """In the whole space the share is 1, whatever the update."""
    rng = np.random.default_rng(4)
    base = rng.standard_normal((16, 16))
    data = measure(base, base + rng.standard_normal((16, 16)), ks=(16,)).data.isel(matrix=0, k=0)
    assert float(data.energy) == pytest.approx(1)
    assert (float(data.energy_low), float(data.energy_high)) == pytest.approx((1, 1), abs=0.01)


def test_a_model_against_itself():
    base = np.random.default_rng(3).standard_normal((9, 9))
    result = measure(base, base.copy())
    assert "identical" in result.summary()
    assert float(result.data.delta_norm[0]) == 0
    assert float(result.data.effective_rank[0]) == 0


def test_vectors_have_norms_only_and_count_in_the_shares():
    base = {"layers.0.input_layernorm.weight": torch.ones(4), "layers.0.self_attn.q_proj.weight": torch.eye(4),
            "layers.0.self_attn.q_proj.bias": torch.zeros(4)}  # fmt: skip
    tuned = {k: v + 0.5 for k, v in base.items()}
    result = fl.measure_updates(fl.ModelPair.load(base, tuned), progress=False)
    frame = result.to_frame().set_index("component")
    assert frame.loc["norm", "relative_norm"] == pytest.approx(0.5)
    assert frame.loc["bias", "relative_norm"] == np.inf
    assert np.isnan(frame.loc["bias", "effective_rank"])
    assert frame.loc["q", "stable_rank"] == pytest.approx(1)
    shares = result.by_component().set_index("component")["share_of_update"]
    assert shares["q"] == pytest.approx(16 / 24)
    assert shares.sum() == pytest.approx(1)


def test_subtraction_is_not_done_in_the_stored_type():
    """In bfloat16 1 + 2⁻⁸ rounds to 1; the float32 tuned value must be compared with the base unrounded."""
    base = torch.eye(6, dtype=torch.bfloat16)
    tuned = torch.eye(6) * (1 + 2**-10)
    data = measure(base, tuned).data.isel(matrix=0)
    assert float(data.relative_norm) == pytest.approx(2**-10)
    assert float(data.relative_norm) < float(data.rounding)  # no more than rounding could have made


def test_rounding_alone_is_said_to_be_rounding():
    base = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    result = measure(base, base.to(torch.bfloat16))
    assert "no larger than rounding" in result.summary()
    assert "no larger than rounding" not in measure(base, base + 0.1).summary()


def test_options_out_of_range():
    with pytest.raises(InputError, match="ks, null_draws and limit are at least 1"):
        measure(np.eye(3), 2 * np.eye(3), ks=(0, 2))
