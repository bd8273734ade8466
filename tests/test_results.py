"""Results: saved and read back as they were, labelled, with their provenance; never torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray as xr

import finetune_lens as fl
from finetune_lens.errors import InputError


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    names = {
        "model.embed_tokens.weight": (30, 12),
        "model.layers.0.self_attn.q_proj.weight": (12, 12),
        "model.layers.1.mlp.down_proj.weight": (12, 20),
        "model.layers.1.input_layernorm.weight": (12,),
    }
    base = {n: torch.tensor(rng.standard_normal(s)) for n, s in names.items()}
    tuned = {n: w + 3 * torch.tensor(rng.standard_normal(w.shape)) for n, w in base.items()}
    return fl.ModelPair.load(base, tuned)


@pytest.fixture(scope="module", params=["intruders", "updates"])
def result(request, pair):
    if request.param == "intruders":
        return fl.find_intruders(pair, side="both", progress=False, null_draws=2, epsilon=0.6, k=4)
    return fl.measure_updates(pair, progress=False, null_draws=20)


def test_round_trip(result, tmp_path):
    result.save(tmp_path / "x.nc")
    again = fl.load(tmp_path / "x.nc")
    assert type(again) is type(result)
    xr.testing.assert_identical(again.data, result.data)
    assert again.provenance == result.provenance
    assert again.summary() == result.summary()
    assert again.headline() == result.headline()
    assert again.to_frame().equals(result.to_frame())


def test_the_file_is_plain_netcdf(result, tmp_path):
    result.save(tmp_path / "x.nc")
    with xr.open_dataset(tmp_path / "x.nc") as data:
        assert set(data.data_vars) == set(result.data.data_vars)
        assert json.loads(data.attrs["provenance"])["analysis"] in ("find_intruders", "measure_updates")


def test_provenance_says_what_went_in(result):
    record = result.provenance
    assert set(record["weights_sha256"]) == {"base", "tuned"}
    assert record["weights_sha256"]["base"] != record["weights_sha256"]["tuned"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["wall_seconds"] > 0
    assert record["inputs"]["base"]["source"] == "a state dict in memory"
    given, defaulted = set(record["arguments"]), set(record["defaults"])
    assert "null_draws" in given
    assert "device" in defaulted
    assert not given & defaulted


def test_hashes_follow_the_numbers(pair):
    one, other = (fl.measure_updates(pair, progress=False, null_draws=5).provenance["weights_sha256"] for _ in range(2))
    assert one == other
    sides = []
    for place in (0, -1):
        tensors = {"layers.0.mlp.up_proj.weight": torch.ones(3, 4)}
        other = {"layers.0.mlp.up_proj.weight": torch.ones(3, 4)}
        other["layers.0.mlp.up_proj.weight"].view(-1)[place] = 2
        result = fl.measure_updates(fl.ModelPair.load(tensors, other), progress=False, null_draws=5)
        sides.append(result.provenance["weights_sha256"])
    assert len({sides[0]["base"], sides[0]["tuned"], sides[1]["tuned"]}) == 3
    assert sides[0]["base"] == sides[1]["base"]
    limited = fl.measure_updates(pair, progress=False, null_draws=5, limit=2).provenance["weights_sha256"]
    assert limited["base"] != one["base"]


def test_tables_are_labelled(result):
    frame = result.to_frame()
    assert {"matrix", "layer", "component"} <= set(frame.columns)
    assert frame[["matrix", "component"]].notna().all(axis=None)
    html = result._repr_html_()
    assert "<table" in html
    assert type(result).__name__ in html


def test_counts_in_the_table_are_the_counts(pair):
    found = fl.find_intruders(pair, progress=False, null_draws=2)
    frame = found.to_frame()
    assert (frame["verdict"] == "intruder").sum() == found.count()
    assert found.table("matrix")["intruders"].sum() == found.count()
    assert found.table("layer")["vectors"].sum() == len(frame)
    assert found.headline()["left"]["intruders"] == found.count()
    with pytest.raises(InputError, match="right"):
        found.count(side="right")
    for what in ("colour", "side", "rank"):
        with pytest.raises(InputError, match="component, layer"):
            found.table(what)


def test_a_result_answers_only_for_what_was_looked_at(pair):
    found = fl.find_intruders(pair, progress=False, null_draws=2, ranks=5, k=5)
    for ask in (found.count, found.undetermined, found.to_frame, found.table):
        with pytest.raises(InputError, match="at most 5"):
            ask(k=6)
        with pytest.raises(InputError, match="at least 1"):
            ask(k=0)
    with pytest.raises(InputError, match="at most 5"):
        found.grid([0.5], [5, 6])
    whole = fl.find_intruders(pair, progress=False, null_draws=2)
    assert whole.count(k=1000) == whole.count(k=12)  # there are no more


def test_a_null_for_matrices_smaller_than_k():
    base = {"layers.0.mlp.up_proj.weight": torch.eye(8) * torch.arange(8.0, 0, -1)}
    tuned = {n: w + 3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) for n, w in base.items()}
    found = fl.find_intruders(fl.ModelPair.load(base, tuned), progress=False, k=10)
    assert found.null() is not None
    assert "no null" not in found.summary()
    assert found.table("all")["null_mean"].notna().all()


def test_the_summary_does_not_read_what_is_open():
    base = {"layers.0.mlp.up_proj.weight": torch.eye(50)}
    tuned = {n: w + torch.randn(50, 50, generator=torch.Generator().manual_seed(0)) for n, w in base.items()}
    found = fl.find_intruders(fl.ModelPair.load(base, tuned), progress=False)
    assert found.undetermined() == 10
    assert "open" in found.summary()
    assert "fewer" not in found.summary()


def test_the_record_says_how_the_pair_was_read():
    base = {"embed_tokens.weight": torch.ones(8, 20), "layers.0.mlp.up_proj.weight": torch.eye(4)}
    tuned = {"embed_tokens.weight": torch.ones(9, 20), "layers.0.mlp.up_proj.weight": 2 * torch.eye(4)}
    pair = fl.ModelPair.load(base, tuned, fused=True)
    inputs = fl.find_intruders(pair=pair, progress=False, null_draws=0).provenance["inputs"]
    assert inputs["options"]["fused"] is True
    assert any("embed_tokens" in line for line in inputs["alignment"])


def test_a_zero_base_is_not_infinite():
    base, tuned = ({"layers.0.mlp.up_proj.weight": w} for w in (torch.zeros(4, 4), torch.eye(4)))
    found = fl.measure_updates(fl.ModelPair.load(base, tuned), progress=False)
    assert found.headline()["relative_norm"] is None
    assert "undefined" in found.summary()
    json.dumps(found.headline(), allow_nan=False)


def test_null_resampling_is_that_of_the_sum():
    """Two matrices, each 0 or 10 by draw: 0, 10 or 20 with 1/4, 1/2, 1/4, about 10, widened by √3 for two draws."""
    from finetune_lens.results.intruders import Intruders

    cosines = np.ones((1, 2, 1, 2, 10))
    cosines[:, 1] = 0.1
    ones = np.ones((1, 2, 10))
    data = xr.Dataset(
        {
            "null_max_cos": (("null", "draw", "side", "matrix", "null_rank"), cosines),
            **dict.fromkeys(("max_cos", "lower", "upper"), (("side", "matrix", "rank"), ones)),
        },
        coords={"null": ["spectrum"], "side": ["left"]},
        attrs={"k": 10, "epsilon": 0.5},
    )
    null = Intruders(data).null()
    assert (null.mean, null.low) == (10, 0)
    assert null.high == pytest.approx(10 + 10 * 3**0.5)
    assert null.p_value == 1
    assert Intruders(data).null(k=11) is None


@pytest.mark.parametrize("matrices", [1, 4, 28])
def test_the_null_keeps_its_promise(matrices):
    """An observation from the very null: outside the 95 % interval, and p ≤ .01, about as often as they say."""
    from finetune_lens.results.intruders import Intruders

    rng = np.random.default_rng(0)
    rate = rng.uniform(0.05, 0.5, matrices)[:, None]
    outside, small, times = 0, 0, 150
    for _ in range(times):
        draws = np.where(rng.random((1, 5, 1, matrices, 10)) < rate, 0.0, 1.0)
        seen = np.where(rng.random((1, matrices, 10)) < rate, 0.0, 1.0)
        data = xr.Dataset(
            {
                "null_max_cos": (("null", "draw", "side", "matrix", "null_rank"), draws),
                **dict.fromkeys(("max_cos", "lower", "upper"), (("side", "matrix", "rank"), seen)),
            },
            coords={"null": ["spectrum"], "side": ["left"]},
            attrs={"k": 10, "epsilon": 0.5},
        )
        found = Intruders(data)
        null = found.null()
        outside += not null.low <= found.count() <= null.high
        small += null.p_value <= 0.01
    assert outside / times < (0.3 if matrices == 1 else 0.12)  # five draws of one matrix do not bound its tail
    assert small / times < (0.001 if matrices < 8 else 0.04)


def test_null_resampling_in_pieces_is_the_same(monkeypatch):
    from finetune_lens.results import intruders

    counts = np.random.default_rng(1).integers(0, 4, (5, 7, 3))
    whole = intruders.resampled_totals(counts)
    assert abs(whole.mean(0) - counts.mean(0).sum(0)).max() < 0.1
    monkeypatch.setattr(intruders, "CHUNK", 7 * 33)
    np.testing.assert_array_equal(intruders.resampled_totals(counts), whole)


@pytest.mark.parametrize("content", [None, b"not netcdf", "other"])
def test_load_refuses_what_is_not_ours(content, tmp_path):
    path = tmp_path / "x.nc"
    if content == "other":
        xr.Dataset({"a": ("x", [1.0])}, attrs={"kind": "os.system"}).to_netcdf(path, engine="h5netcdf")
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.nc"):
        fl.load(path)


def test_reading_a_result_needs_no_torch(result, tmp_path):
    result.save(tmp_path / "x.nc")
    code = (
        f"import sys, finetune_lens as fl; r = fl.load({str(tmp_path / 'x.nc')!r}); r.summary(); r.to_frame(); "
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
