"""Several checkpoints of one base: each as if alone, and the directions followed from one to the next."""

import numpy as np
import pytest
import torch

from finetune_lens import ModelPair, ModelSeries, find_intruders, linalg, plots, results
from finetune_lens.errors import InputError

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
OPTIONS = {"progress": False, "null_draws": 2, "k": 6}


def planted(steps=(0.0, 0.5, 1.0, 2.0), n=60, seed=0):
    """A direction spread over the whole base that grows with the step, in UP; DOWN moves within the base's own."""
    rng = np.random.default_rng(seed)
    q = [np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(4)]
    s = np.linspace(10, 1, n)
    base = {UP: (q[0] * s) @ q[1].T, DOWN: (q[2] * s) @ q[3].T}
    new = q[0] @ np.full(n, n**-0.5), q[1] @ np.full(n, n**-0.5)
    tuned = [
        {UP: base[UP] + 12 * step * np.outer(*new), DOWN: base[DOWN] + 0.1 * step * np.outer(q[2][:, 0], q[3][:, 0])}
        for step in steps
    ]
    as_tensors = [{k: torch.tensor(v, dtype=torch.float64) for k, v in m.items()} for m in (base, *tuned)]
    return as_tensors[0], as_tensors[1:], new[0]


@pytest.mark.parametrize("side", ["left", "both"])
def test_each_checkpoint_is_as_if_alone(side):
    base, tuned, _ = planted()
    found = find_intruders(ModelSeries.load(base, tuned), side=side, **OPTIONS)
    for step, one in zip(found.steps, tuned, strict=True):
        alone = find_intruders(ModelPair.load(base, one), side=side, **OPTIONS)
        together = found.at(step)
        for name in ("max_cos", "lower", "upper", "sigma", "null_max_cos", "delta_norm", "effective_rank"):
            assert np.allclose(together.data[name], alone.data[name], atol=1e-7, equal_nan=True), name
        assert together.headline() == alone.headline()
        assert together.summary() == alone.summary()


def test_a_planted_direction_is_followed_while_it_climbs():
    base, tuned, _ = planted()
    found = find_intruders(ModelSeries.load(base, tuned, steps=[0, 10, 20, 40]), **OPTIONS)
    tracks = found.tracks()
    climbing = tracks[tracks.step == 40].sort_values("rank").iloc[0]
    path = tracks[tracks.track == climbing.track]
    assert set(tracks.matrix) == {"layers.0.mlp.up_proj"}
    assert climbing["rank"] == 1
    assert climbing.verdict == "intruder"
    assert path.step.tolist()[-2:] == [20, 40]
    assert path.link.iloc[-1] > 0.9
    assert path.sigma.is_monotonic_increasing
    assert path.max_cos.iloc[-1] < 0.5
    assert (path.link.dropna() >= 0.5).all()
    assert found.counts().intruders.tolist()[0] == 0
    assert found.counts().intruders.tolist()[-1] >= 1


def test_no_link_where_the_directions_differ():
    """Two checkpoints with different planted directions: two tracks, not one."""
    base, (*_, one), _ = planted(seed=1)
    _, (*_, other), _ = planted(seed=1)
    rng = np.random.default_rng(9)
    u, v = (np.linalg.qr(rng.standard_normal((60, 1)))[0][:, 0] for _ in "uv")
    other = dict(other)
    other[UP] = base[UP] + 30 * torch.tensor(np.outer(u, v))
    found = find_intruders(ModelSeries.load(base, [one, other]), **OPTIONS)
    tracks = found.tracks()
    strongest = tracks[tracks["rank"] == 1]
    assert strongest.track.nunique() == len(strongest) == 2


def test_the_base_is_decomposed_once(monkeypatch):
    rng = np.random.default_rng(2)
    base = torch.tensor(rng.standard_normal((300, 280)))
    tuned = [{UP: base + step * torch.tensor(rng.standard_normal((300, 280))) / 10} for step in (1, 2, 3)]
    calls = []
    decompose = linalg.routes.decompose

    def counted(matrix, **options):
        calls.append("top" in options)
        return decompose(matrix, **options)

    monkeypatch.setattr(linalg.routes, "decompose", counted)
    found = find_intruders(ModelSeries.load({UP: base}, tuned), ranks=10, null_draws=0, progress=False)
    assert calls.count(True) == 3  # the tuned sides
    assert calls.count(False) == 1 + 3  # the base, and three times what follows from its basis
    assert set(found.data.route.values.ravel()) == {"cached"}


def test_steps_come_from_the_names_and_set_the_order(tmp_path):
    base, tuned, _ = planted()
    torch.save(base, tmp_path / "base.pt")
    names = ["ft_step200.pt", "ft_step1000.pt", "ft_step50.pt", "ft_step0.pt"]
    for name, one in zip(names, tuned, strict=True):
        torch.save(one, tmp_path / name)
    series = ModelSeries.load(tmp_path / "base.pt", [tmp_path / n for n in names])
    assert series.steps == [0, 50, 200, 1000]
    assert [p.tuned_checkpoint.source.split("step")[-1] for p in series.pairs] == ["0.pt", "50.pt", "200.pt", "1000.pt"]
    assert ModelSeries.load(base, tuned).steps == [1, 2, 3, 4]
    assert ModelSeries.load(base, tuned, steps=[4, 3, 2, 1]).pairs[0].tuned_checkpoint is not None


def test_what_cannot_be_a_series():
    base, tuned, _ = planted()
    with pytest.raises(InputError, match="two checkpoints or more"):
        ModelSeries.load(base, tuned[:1])
    with pytest.raises(InputError, match="a step of its own"):
        ModelSeries.load(base, tuned[:2], steps=[3, 3])
    with pytest.raises(InputError, match="does not hold the same weights"):
        ModelSeries.load(base, [tuned[0], {UP: tuned[1][UP]}])
    found = find_intruders(ModelSeries.load(base, tuned[:2]), **OPTIONS)
    with pytest.raises(InputError, match="no checkpoint at step 7"):
        found.at(7)
    with pytest.raises(InputError, match="was not computed"):
        found.tracks("right")


def test_a_checkpoint_with_nan_is_named():
    base, tuned, _ = planted()
    tuned[2][UP][3, 4] = torch.nan
    found = find_intruders(ModelSeries.load(base, tuned), **OPTIONS)
    assert list(found.data.matrix.values) == ["layers.0.mlp.down_proj"]
    assert "checkpoint 3" in found.provenance["excluded"]["layers.0.mlp.up_proj"]


def test_saved_read_again_and_drawn(tmp_path):
    base, tuned, _ = planted()
    found = find_intruders(ModelSeries.load(base, tuned), side="both", **OPTIONS)
    again = results.load(found.save(tmp_path / "t.nc"))
    assert again.summary() == found.summary()
    assert again.to_frame().equals(found.to_frame())
    assert len(found.provenance["weights_sha256"]["tuned"]) == len(found.provenance["inputs"]["tuned"]) == 4
    figures = plots.figures_of(again)
    assert set(figures) == {"steps_left", "steps_right"}
    figure = figures["steps_left"]()
    count, rank, sigma, cosine = figure.axes
    tracks = again.tracks("left")
    assert len(rank.lines) == len(sigma.lines) == tracks.track.nunique()
    assert list(count.lines[-1].get_ydata()) == again.counts().query("side == 'left'").intruders.tolist()
    assert len(cosine.lines) == tracks.track.nunique() + 1


def test_nothing_to_follow_is_drawn_too():
    base, tuned, _ = planted()
    found = find_intruders(ModelSeries.load({DOWN: base[DOWN]}, [{DOWN: t[DOWN]} for t in tuned]), **OPTIONS)
    assert found.tracks().empty
    figure = plots.figures_of(found)["steps"]()
    assert any("no intruder" in text.get_text() for text in figure.axes[1].texts)


def test_the_command_takes_several_checkpoints(tmp_path, in_new_process):
    base, tuned, _ = planted()
    torch.save(base, tmp_path / "base.pt")
    for step, one in zip((0, 5, 10, 20), tuned, strict=True):
        torch.save(one, tmp_path / f"ft_step{step}.pt")
    files = [f"ft_step{step}.pt" for step in (20, 0, 5, 10)]
    done = in_new_process(
        "-m", "finetune_lens.intruders", "base.pt", *files, "--out", "out", "--null-draws", "2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "step 0: 0" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"trajectory.nc", "trajectory.csv", "run.json", "figures"}
    assert (tmp_path / "out" / "figures" / "trajectory-steps.pdf").exists()
    again = in_new_process("-m", "finetune_lens.intruders", "base.pt", *files, "--out", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "would be overwritten" in again.stderr
