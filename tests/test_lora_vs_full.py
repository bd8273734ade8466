"""The study of LoRA against full fine-tuning: its course, its statistics, its verdicts, and what was committed."""

import hashlib
import itertools
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from finetune_lens import zoo
from finetune_lens.tasks.strings import NEW_TASK, TASKS, draw, encode
from finetune_lens.zoo import strings_recipe as recipe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from analyses import lora_vs_full as study  # noqa: E402
from figures import lora_vs_full as figure  # noqa: E402

STRINGS = zoo.path("strings")


@pytest.fixture(autouse=True)
def no_windows():
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def sweep(work, monkeypatch, *words):
    """The command itself, on a toy; its exit code."""
    monkeypatch.setattr(sys, "argv", ["lora_vs_full", "sweep", "--mini", "--work", str(work), *words])
    with pytest.raises(SystemExit) as ended:
        study.main()
    return ended.value.code


def timeless(data):
    """The dataset without wall times."""
    data = data.drop_vars("seconds")
    record = json.loads(data.attrs["provenance"])
    return data.assign_attrs(provenance={key: value for key, value in record.items() if key != "seconds"})


# The course of a sweep


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    work = tmp_path_factory.mktemp("mini") / "mini"
    return work, study.run_sweep(work, "mini", progress=False)


def test_a_sweep_keeps_every_run(mini):
    work, data = mini
    names = [tuning.name for tuning in study.MINI.runs()]
    assert sorted(path.stem for path in (work / "runs").iterdir()) == sorted(names)
    assert not list((work / "models").glob("*.pt")), "checkpoints of finished runs are dropped"
    assert data.seed.values.tolist() == [0] * 3 + [1] * 3, "seeds outermost: a sweep cut off is balanced"
    assert data.method.values.tolist() == ["full", "lora", "lora"] * 2
    assert float(data.relative_norm.min()) > 0
    assert (data.effective_rank <= np.where(data["rank"] == 0, 16, data["rank"]) + 1e-6).all()


def test_the_grid_holds_the_default_count_and_null(mini):
    _, data = mini
    at = data.sel(epsilon=study.EPSILON, k=study.K)
    assert (at.counts == data["count"]).all()
    assert np.allclose(at.null_counts, data.null_mean.sel(null="spectrum"))
    assert data.counts.max() > 0, "or nothing was compared"
    assert data.null_counts.max() > 0


def test_what_is_kept_of_the_weights_is_what_the_analysis_says():
    import finetune_lens as fl

    pair = fl.ModelPair.load(STRINGS / "base", STRINGS / "lora")
    result = fl.find_intruders(pair, side="both", null_draws=2, limit=4, progress=False)
    kept = study.weights_of(result)
    for s, side in enumerate(study.SIDES):
        for e, k in itertools.product((2, 9, 13), range(len(study.KS))):
            at = {"epsilon": study.EPSILONS[e], "k": study.KS[k], "side": side}
            assert kept["counts"][s][e][k] == result.count(**at)
            assert kept["null_counts"][s][e][k] == pytest.approx(result.null(**at).mean)
        assert kept["null_high"][0][s] == result.null(side=side).high
    sizes = fl.measure_updates(pair, null_draws=1, progress=False).to_frame()
    sizes = sizes[sizes["matrix"].isin(result.data.matrix.values)]
    squares = (sizes[["delta_norm", "base_norm"]] ** 2).sum()
    assert kept["relative_norm"] == pytest.approx((squares["delta_norm"] / squares["base_norm"]) ** 0.5)
    assert kept["effective_rank"] == pytest.approx(sizes["effective_rank"].median())


def test_an_interrupted_sweep_continues_and_gives_the_same(mini, tmp_path, monkeypatch, capsys):
    real, trained = recipe.tune, []

    def stopping(base, out, **options):
        trained.append(out.name)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return real(base, out, **options)

    monkeypatch.setattr(study, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(recipe, "tune", stopping)
    assert sweep(tmp_path, monkeypatch) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "mini/results").exists()
    assert sweep(tmp_path, monkeypatch) == 0
    names = [tuning.name for tuning in study.MINI.runs()]
    assert trained == [*names[:4], *names[3:]], "no finished run is trained again"
    captured = capsys.readouterr()
    assert "run" in captured.err, "progress is shown"
    assert not (tmp_path / "committed").exists(), "only the study replaces the committed results"

    found = study.load(tmp_path / "mini/results")
    assert captured.out.strip() == study.report(found).strip()
    assert timeless(found).identical(timeless(mini[1]))
    names = {path.name for path in (tmp_path / "mini/results").iterdir()}
    assert names == {f"{study.NAME}.{kind}" for kind in ("nc", "csv", "json", "md")}


def test_what_is_measured_again_is_not_trained_again(mini, monkeypatch):
    work, data = mini

    def never(*args, **options):
        raise AssertionError("done again")

    monkeypatch.setattr(recipe, "tune", never)
    lost = work / "runs" / "lora2-0.01-seed1.json"
    lost.unlink()
    assert timeless(study.run_sweep(work, "mini", progress=False)).identical(timeless(data))
    assert lost.exists()
    monkeypatch.setattr(study, "weights_of", never)
    study.run_sweep(work, "mini", progress=False)
    monkeypatch.setitem(study.SCALES, "mini", replace(study.MINI, steps=3))
    with pytest.raises(AssertionError, match="done again"):
        study.run_sweep(work, "mini", progress=False)


def test_a_run_that_diverges_is_kept_and_marked(tmp_path, monkeypatch):
    real = recipe.tune

    def diverging(base, out, **options):
        if options["learning_rate"] == 3e-2:
            raise FloatingPointError("the loss is nan at step 1")
        return real(base, out, **options)

    monkeypatch.setattr(recipe, "tune", diverging)
    settings = replace(study.MINI, lora_rates=(1e-2, 3e-2), ranks=(1,), seeds=(0,), target=0.01, items=2)
    monkeypatch.setitem(study.SCALES, "mini", settings)
    data = study.run_sweep(tmp_path, "mini", progress=False)
    frame = study.runs_of(data)
    lost = frame[frame["learning_rate"] == 3e-2]
    assert len(lost) == 1
    assert lost[["count", "forgetting", "steps"]].isna().all(axis=None)
    assert not lost["reached"].any()
    study.report(data)
    figure.draw(data).canvas.draw()


def test_an_unknown_scale_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lora_vs_full", "sweep", "--scale", "mini"])
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 2
    assert "tiny or paper" in capsys.readouterr().err


def test_scores_are_those_of_the_recipe_and_losses_those_of_the_model():
    base, full = STRINGS / "base", STRINGS / "full"
    scored = study.Scored(base, 40)
    before, after = (recipe.score(base, tuned, items=40) for tuned in (None, full))
    found = scored.against(full)
    assert found["accuracy"] == [after[task]["accuracy"] for task in TASKS]
    assert scored.accuracy()["base_accuracy"] == [before[task]["accuracy"] for task in TASKS]
    mean, low, high = found["forgetting"]
    assert mean == pytest.approx(recipe.forgetting(before, after))
    assert low < mean < high < low + 0.1
    items = draw([NEW_TASK], 30, recipe.stream(0, NEW_TASK), part="test")
    model = recipe.load(full)
    assert study.answers(model, items)[1].mean() == pytest.approx(model(**encode(items))["loss"].item(), rel=1e-5)


# Statistics


def test_spearman_is_scipys_and_resamples_whole_groups():
    generator = np.random.default_rng(0)
    x, y = generator.integers(6, size=(2, 40)).astype(float)
    y += x
    times = generator.integers(3, size=40)
    weighted = study._weighted_rho(np.stack([x, y]), times[None].astype(float))
    assert weighted[0] == pytest.approx(spearmanr(np.repeat(x, times), np.repeat(y, times)).statistic)

    frame = pd.DataFrame({"rank": np.repeat(np.arange(8), 5), "learning_rate": 0.1, "x": x, "y": y})
    found = study.spearman(frame, "x", "y")
    assert found.value == pytest.approx(spearmanr(x, y).statistic)
    assert found.n == 40
    assert found.low < found.value < found.high
    copies = frame.groupby("rank").mean().reset_index()
    many = pd.concat([copies] * 50)  # copies of a run are no further evidence
    few, more = study.spearman(copies, "x", "y"), study.spearman(many, "x", "y")
    assert (few.low, few.high, few.p_value) == pytest.approx((more.low, more.high, more.p_value))


def test_a_partial_correlation_is_that_of_what_a_third_variable_leaves():
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"rank": np.arange(60), "learning_rate": 0.1, "z": generator.normal(size=60)})
    frame["x"], frame["y"] = (frame["z"] + generator.normal(size=60) for _ in range(2))
    ranks = frame[["x", "y", "z"]].rank().to_numpy()
    rest = [column - np.polyval(np.polyfit(ranks[:, 2], column, 1), ranks[:, 2]) for column in ranks[:, :2].T]
    found = study.spearman(frame, "x", "y", given="z")
    assert found.value == pytest.approx(np.corrcoef(*rest)[0, 1])
    assert found.low < 0 < found.high, "x and y have nothing but z in common"
    assert study.spearman(frame, "x", "y").low > 0


def test_the_permutation_p_value_is_exact_for_few_groups():
    frame = pd.DataFrame({"rank": range(5), "learning_rate": 0.1, "x": range(5), "y": range(5)})
    assert study.spearman(frame, "x", "y").p_value == pytest.approx(2 / 120)  # of 5! orders, this one and its reverse


def test_intervals_over_seeds_are_students():
    from scipy.stats import ttest_1samp

    values = [1.0, 4.0, 2.0]
    expected = ttest_1samp(values, 0).confidence_interval()
    found = study.over_seeds([*values, np.nan])
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 3
    assert np.isnan(study.over_seeds([1.0]).low)
    assert study.over_seeds([]).n == 0


@pytest.mark.parametrize(
    ("rule", "yes", "no", "open_"),
    [
        (study.positive, (0.1, 2), (-2, -0.1), (-1, 1)),
        (study.negative, (-2, -0.1), (0.1, 2), (-1, 1)),
        (study.few, (-0.01, 0.05), (0.051, 0.2), (0.01, 0.2)),
        (study.negligible, (-0.2, 0.2), (0.1, 0.6), (-0.1, 0.6)),
        (study.different, (0.1, 2), None, (-1, 1)),
        (study.different, (-2, -0.1), None, (np.nan, np.nan)),
    ],
)
def test_rules(rule, yes, no, open_):
    for verdict, ends in (("yes", yes), ("no", no), ("open", open_), ("open", (np.nan, np.nan))):
        if ends is not None:
            assert rule(study.Estimate(0.0, *ends, 3)) == verdict


# Verdicts on planted results


def planted(world, *, reached=lambda tuning: True):
    """A results file in which `world(rank, i, seed)` gives what a run at the i-th rate of its method would have."""
    records = []
    settings = study.SCALES["tiny"]
    for tuning in settings.runs():
        rates = settings.lora_rates if tuning.rank else settings.full_rates
        i = rates.index(tuning.rate)
        made = {"count": 0, "null": 0.0, "forgetting": 0.0, "accuracy": 0.96, "effective_rank": 1.0}
        made |= world(tuning.rank, i, tuning.seed)
        grid = np.zeros((2, len(study.EPSILONS), len(study.KS))).tolist()
        null = [[made["null"]] * 2] * 2
        records.append(
            {
                "method": tuning.method,
                "tuning": {"rank": tuning.rank, "rate": tuning.rate, "seed": tuning.seed},
                "steps": 100 - 10 * i,
                "validation_accuracy": 0.96 if reached(tuning) else 0.5,
                "seconds": 1.0,
                "measuring_seconds": 1.0,
                "relative_norm": 0.1 * (i + 1) + 0.001 * tuning.seed,
                "effective_rank": made["effective_rank"],
                "vectors": 210,
                "accuracy": [made["accuracy"]] * len(TASKS),
                "loss": [1.0] * len(TASKS),
                "forgetting": [made["forgetting"]] * 3,
                "loss_rise": [5 * made["forgetting"]] * 3,
                "count": [made["count"]] * 2,
                "undetermined": [0, 0],
                "counts": grid,
                "null_counts": grid,
                "null_mean": null,
                "null_low": null,
                "null_high": null,
                "versions": {},
                "commit": None,
            }
        )
    return study.assemble(records, {"base_accuracy": [1.0] * len(TASKS)}, "tiny", "")


def as_published(rank, i, seed):
    """Counts fall with the rank and rise with the rate, forgetting follows them, accuracy is the seed's alone."""
    count = {0: 1, 1: 50, 4: 40, 16: 30, 64: 20}[rank] + 2 * i + (seed == 1)
    accuracy = 0.95 + 0.01 * seed if rank else 0.96
    effective_rank = rank or 66 + seed
    return {
        "count": count,
        "null": -2.0,
        "forgetting": count / 100,
        "accuracy": accuracy,
        "effective_rank": effective_rank,
    }


def reversed_(rank, i, seed):
    """Full fine-tuning has most, counts rise with the rank, fall with the rate and with what was forgotten."""
    count = {0: 90, 1: 20, 4: 30, 16: 40, 64: 50}[rank] - 2 * i + (seed == 1)
    return {
        "count": count,
        "null": 120.0,
        "forgetting": 1 - count / 100,
        "accuracy": 0.95 + count / 1e4,
        "effective_rank": rank or 10 + seed,
    }


def test_verdicts_where_all_is_as_published():
    rows = study.claims(planted(as_published))
    assert {(row.claim, row.runs): row.verdict for row in rows if row.verdict != "yes"} == {}
    assert len(rows) == 29


def test_verdicts_where_all_is_the_reverse():
    rows = study.claims(planted(reversed_))
    assert {row.claim for row in rows if row.verdict != "no"} == {
        row.claim for row in rows if "differently" in row.claim
    }, "a difference of the other sign is a difference"


def test_verdicts_are_open_where_little_was_matched():
    one_seed = planted(as_published, reached=lambda tuning: tuning.seed == 0 and tuning.rank in (0, 64))
    by_runs = {(row.claim, row.runs): row for row in study.claims(one_seed)}
    verdicts = {key: row.verdict for key, row in by_runs.items()}
    assert {key for key, verdict in verdicts.items() if verdict != "open"} <= {
        key for key in verdicts if "correlate" in key[0]
    }
    none = study.claims(planted(as_published, reached=lambda tuning: False))
    assert {row.verdict for row in none} == {"open"}
    assert all("nothing to compare" in row.measured or "undefined" in row.measured for row in none)


def test_runs_that_did_not_reach_the_target_decide_nothing():
    def misleading(rank, i, seed):
        return {"count": 200, "forgetting": 0.0} if i == 3 else as_published(rank, i, seed)

    highest = {True: 1e-2, False: 3e-3}
    kept = study.claims(planted(misleading, reached=lambda tuning: tuning.rate != highest[tuning.rank > 0]))
    assert {row.verdict for row in kept} == {"yes"}


def test_the_rate_is_chosen_by_steps_not_by_what_is_compared():
    data = planted(as_published)
    frame = study.runs_of(data)
    assert set(frame[frame["fastest"] & (frame["rank"] > 0)]["learning_rate"]) == {1e-2}  # planted with fewest steps
    assert set(frame[frame["lowest"] & (frame["rank"] == 0)]["learning_rate"]) == {1e-4}
    swapped = data.assign(count=-data["count"], forgetting=-data["forgetting"])
    assert study.runs_of(swapped)[["fastest", "lowest"]].equals(frame[["fastest", "lowest"]])


# The figure


def test_the_figure_shows_every_run_hollow_where_not_matched():
    data = planted(as_published, reached=lambda tuning: tuning.rate > 3e-4)
    frame = study.runs_of(data)
    drawn = figure.draw(data)
    for ax in drawn.axes[1:]:
        markers = [line for line in ax.lines if line.get_linestyle() == "None"]
        hollow = sum(len(line.get_xdata()) for line in markers if line.get_markerfacecolor() == "white")
        assert sum(len(line.get_xdata()) for line in markers) == len(frame)
        assert hollow == (~frame["reached"]).sum() > 0
    drawn.canvas.draw()


# What was committed


@pytest.fixture(scope="module")
def committed():
    return study.load()


def test_the_committed_results_are_the_study(committed):
    record = json.loads(committed.attrs["provenance"])
    assert record["scale"] == "tiny"
    assert record["settings"] == json.loads(json.dumps(asdict(study.SCALES["tiny"])))
    assert committed.sizes["run"] == len(list(study.SCALES["tiny"].runs()))
    assert record["base_sha256"] == hashlib.sha256((STRINGS / "base/model.safetensors").read_bytes()).hexdigest()
    assert (committed.undetermined == 0).sum() > 0


def test_the_committed_table_and_claims_follow_from_the_results(committed):
    folder = study.RESULTS
    assert (folder / f"{study.NAME}.md").read_text() == study.report(committed)
    table = pd.read_csv(folder / f"{study.NAME}.csv")
    pd.testing.assert_frame_equal(table, study.runs_of(committed), rtol=1e-4, check_dtype=False)
    assert json.loads((folder / f"{study.NAME}.json").read_text()) == json.loads(committed.attrs["provenance"])


def test_what_is_committed_is_small_and_says_nothing_of_a_machine():
    files = list(study.RESULTS.glob(f"{study.NAME}.*"))
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) < 1_000_000
    for path in files:
        assert not re.search(rb"(?<![\w.<])/(home|work|tmp|root|Users|usr)\b", path.read_bytes()), path


def test_the_committed_results_draw(committed):
    drawn = figure.draw(committed)
    drawn.canvas.draw()
    for kind in ("png", "pdf"):
        assert (ROOT / f"figures/lora_vs_full.{kind}").stat().st_size > 10_000
    text = " ".join(text.get_text() for text in drawn.axes[3].texts)
    frame = study.runs_of(committed)
    found = study.spearman(frame[frame["reached"]], "count", "loss_rise")
    assert f"{found.value:.2f}" in text
