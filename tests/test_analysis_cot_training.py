"""The study of training with a written bridge: lens and tracing against naive ones, its tables, its verdicts."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import xarray as xr

from analyses import cot_training as study
from analyses import cot_training_claims as tables
from finetune_lens import stats

KEPT = study.HERE / "results" / "cot_training.md"
MINI = study.Settings(
    world={"entities": 30, "relations": 8, "degree": 4, "ood_share": 0.2, "held_share": 0.05},
    hidden=16, layers=2, heads=2, batch=16, steps=6, warmup=1, items=12, seeds=(0,),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return study.Study()


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A study of seconds, its three steps done."""
    made = study.Study()
    made.settings, made.folder = MINI, tmp_path_factory.mktemp("mini")
    made.results = made.folder / "results"
    for step, work in (("train", study.train_all), ("trace", study.trace)):
        made.keep(work(made, progress=False), step)
    made.keep(study.lens(made), "lens")
    return made


@pytest.fixture(scope="module")
def model(mini):
    """The mini model with weights large enough for its states to differ."""
    found = mini.model("with", 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in found.module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return found


# What is stored


def test_the_tables_are_those_of_the_stored_results(tiny):
    assert KEPT.read_text() == "\n".join(tables.claims(tiny)) + "\n"


def test_stored_results_are_small_and_agree_with_each_other(tiny):
    assert sum(path.stat().st_size for path in (study.HERE / "results").glob("cot_training*")) < 500_000
    told, seen, moved = (tiny.stored(name) for name in ("train", "lens", "trace"))
    settings = json.loads(told.attrs["provenance"])["settings"]
    assert settings == json.loads(json.dumps(dataclasses.asdict(tiny.settings)))
    for arm, asked in (("with", "t"), ("without", "t"), ("with", "b")):
        for split in study.SPLITS:  # of training's last evaluation and of the tracing: other code, and other texts
            right = tables.accuracy(told, 0, arm, f"{asked} {split}")["mean"].iloc[-1]
            said = moved["said"].sel(seed=0, split=split, map=f"{arm} {asked} h", case="answer", end="mean")
            assert float(said) == pytest.approx(right, abs=0.12 if (asked, arm) == ("t", "with") else 0.03)
    ranks = seen["rank"].sel(seed=0, arm="without", split="train", target="t", position="r2").isel(depth=-1).values
    right = told["right"].sel(seed=0, arm="without", measure="t train").isel(step=-1).values
    np.testing.assert_array_equal(ranks == 0, right == 1)


def test_figure_from_the_stored_results(tiny):
    import matplotlib

    matplotlib.use("agg")
    from figures import cot_training as figures

    figure = figures.draw(tiny)
    assert [ax.get_title(loc="left")[:3] for ax in figure.axes if ax.get_title(loc="left")] == [
        f"({letter})" for letter in "abcdeh"
    ]
    figure.draw_without_rendering()
    matplotlib.pyplot.close("all")


# The steps, at a miniature size


def test_every_step_runs_and_the_tables_are_written(mini):
    text = "\n".join(tables.claims(mini))
    assert "undecided: not trained long enough" in text
    assert "nan" not in text
    moved, seen = mini.stored("trace"), mini.stored("lens")
    assert (moved["count"] > 0).all()
    for name in moved["map"].values:
        shown = moved["lost"].sel(map=name, end="mean").notnull().all(["seed", "split", "layer"])
        last = study.POSITIONS.index(tables.last_position(name))
        assert shown.values.tolist() == [place <= last for place in range(len(study.POSITIONS))]
    assert (seen["rank"].sel(arm="without", position="b") == -1).all()
    assert (seen["rank"].sel(arm="with", split="train") >= 0).all()


def test_a_finished_model_is_not_trained_again(mini, monkeypatch):
    before = mini.stored("train").sel(seed=0, arm="without")
    monkeypatch.setattr(type(mini.world), "lesson", _only_the_first(type(mini.world).lesson))
    again = study.teach(mini, "without", 0, progress=False)
    np.testing.assert_array_equal(again["right"], before["right"])
    assert float(again["seconds"]) == float(before["seconds"])


def _only_the_first(lesson):
    """What names a run by its first batch may be drawn; no other batch."""
    drawn = []

    def once(*args, **options):
        assert not drawn, "a step was taken"
        drawn.append(True)
        return lesson(*args, **options)

    return once


def test_both_models_start_alike_and_read_the_same_items(mini):
    one, other = (study.fresh(MINI, 3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], study.fresh(MINI, 4).state_dict()["lm_head.weight"])
    texts = [mini.world.lesson(50, np.random.default_rng(1), bridge=b)["input_ids"].numpy() for b in (True, False)]
    hops = texts[0][:, 5] != 0
    np.testing.assert_array_equal(np.delete(texts[0][hops], 4, axis=1), texts[1][hops])
    np.testing.assert_array_equal(texts[0][~hops, :4], texts[1][~hops, :4])


def test_tokens_of_a_lesson_are_as_told(mini):
    told = json.loads(mini.stored("train").attrs["provenance"])["told"]
    for arm, bridge in study.ARMS.items():
        batch = mini.world.lesson(4000, np.random.default_rng(0), bridge=bridge)
        assert (batch["input_ids"] != 0).sum() / 4000 == pytest.approx(told[arm]["tokens"], abs=0.05)
        assert (batch["labels"] != -100).sum() / 4000 == pytest.approx(told[arm]["learnt"], abs=0.05)


def test_the_model_of_the_paper_has_its_size():
    settings = study.SCALES["paper"]
    with torch.device("meta"):
        built = study.fresh(settings, 0)
    config = built.config
    assert (config.n_layer, config.n_embd, config.n_head, config.vocab_size) == (8, 768, 12, 2202)
    assert settings.world == {"entities": 2000, "relations": 200, "degree": 20, "ood_share": 0.05}
    block = 12 * 768**2 + 13 * 768  # attention 4 d² + 4 d, MLP 8 d² + 5 d, two norms 4 d
    assert sum(p.numel() for p in built.parameters()) == 8 * block + (2202 + 6 + 2) * 768


# The logit lens


def naive_rank(logits, token):
    """By sorting and looking the token up."""
    return sorted(range(len(logits)), key=lambda n: (-logits[n], n)).index(token)


def test_ranks_are_those_of_the_unembedded_normed_residual(mini, model):
    items = mini.items["train"][:5]
    ids = mini.world.encode(items, bridge=True)["input_ids"][:, :-1]
    tokens = np.stack([2 + items.b, 2 + items.t])
    states, module = [], model.module
    hooks = [module.transformer.h[0].register_forward_pre_hook(lambda m, args: states.append(args[0]))]
    hooks += [
        block.register_forward_hook(lambda m, args, out: states.append(_first(out))) for block in module.transformer.h
    ]
    with torch.no_grad():
        logits = module(input_ids=ids).logits
        for hook in hooks:
            hook.remove()
        read = [module.lm_head(module.transformer.ln_f(state)) for state in states]
    found = study.read_ranks(model, ids.numpy(), tokens)
    assert found.shape == (MINI.layers + 1, 4, 2, 5)
    for depth, position, target, item in np.ndindex(*found.shape):
        row = read[depth][item, position + 1].tolist()
        assert found[depth, position, target, item] == naive_rank(row, tokens[target, item])
    np.testing.assert_allclose(read[-1], logits, atol=1e-5)


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def test_mrr_is_the_mean_of_a_loop():
    ranks = np.array([0, 3, -1, 1, -1, 9])
    total = [1 / (rank + 1) for rank in ranks.tolist() if rank >= 0]
    assert np.nanmean(study.reciprocal(ranks)) == pytest.approx(sum(total) / len(total))


def test_the_null_is_of_other_items(mini):
    """Over a vocabulary in random order the MRR of any token is about that of a uniform rank."""
    seen = mini.stored("lens")
    words = len(mini.world.vocabulary)
    uniform = np.mean(1 / np.arange(1, words + 1))
    null = float(seen["null"].sel(seed=0, arm="with", split="train", position="h", target="t", end="mean")[0])
    assert null == pytest.approx(uniform, rel=0.7)
    assert (
        (seen["null"].sel(end="low") <= seen["null"].sel(end="high"))
        .where(seen["null"].notnull().all("end"), True)
        .all()
    )


def planted(depths, *, items=40, blocks=4):
    """Ranks of b at r1 that are 0 from a depth on and 50 before it, by arm."""
    shape = (1, 2, len(study.SPLITS), blocks + 1, len(study.POSITIONS), len(study.TARGETS), items)
    rank = np.full(shape, 50, dtype=np.int16)
    for arm, depth in enumerate(depths):
        rank[0, arm, :, depth:, 1, 0] = 0
    dims = ("seed", "arm", "split", "depth", "position", "target")
    coords = {"seed": [0], "arm": ["with", "without"], "split": [*study.SPLITS], "position": [*study.POSITIONS]}
    coords |= {"target": [*study.TARGETS], "end": ["mean", "low", "high"]}
    null = (((*dims, "end")), np.full((*shape[:-1], 3), 0.05))
    return xr.Dataset({"rank": ((*dims, "item"), rank), "null": null}, coords=coords)


def test_a_planted_depth_of_emergence_is_found():
    found = study.bridge_at(planted((1, 3)), 0, "held")
    assert (found["with"]["depth"], found["without"]["depth"]) == ((1.0, 1.0, 1.0), (3.0, 3.0, 3.0))
    assert found["difference"]["depth"] == (-2.0, -2.0, -2.0)
    assert found["difference"]["area"][0] == pytest.approx(2 / 5 * (1 - 1 / 51))


def test_a_bridge_that_is_never_resolved_has_no_depth():
    found = study.bridge_at(planted((2, 5)), 0, "ood")
    assert found["without"]["depth"] == (np.inf, np.inf, np.inf)
    assert found["difference"]["depth"][2] < 0
    both = study.bridge_at(planted((5, 5)), 0, "ood")
    assert np.isnan(both["difference"]["depth"]).all()


def test_the_interval_of_the_depth_is_a_bootstrap_over_items():
    data = planted((1, 3))
    data["rank"][0, 0, 1, 1:4, 1, 0, :20] = 50  # half of the items are resolved only at the last depth
    values = study.reciprocal(data["rank"][0, 0, 1, :, 1, 0].values)
    drawn = stats.resampled_means(values)
    first = [next(d for d, v in enumerate(curve) if v >= curve[-1] / 2) for curve in drawn.T[:200]]
    assert {*first} == {1, 4}
    assert study.bridge_at(data, 0, "held")["with"]["depth"][1:] == (1.0, 4.0)


# The tracing


def test_another_written_bridge_is_one_whose_answer_is_another(mini):
    world, items = mini.world, mini.items["train"]
    rows, others = study.exchanged(world, items, "b", np.random.default_rng(0))
    there = {(h, r): t for h, r, t in world.atomic.tolist()}
    expected = [
        n for n in range(len(items))
        if any(there.get((e, items.r2[n]), items.t[n]) != items.t[n] for e in range(world.entities))
    ]  # fmt: skip
    assert rows.tolist() == expected
    for row, h, r1, r2, b, t in zip(rows, others.h, others.r1, others.r2, others.b, others.t, strict=True):
        assert (h, r1, r2) == (items.h[row], items.r1[row], items.r2[row])
        assert t == there[b, r2] != items.t[row]
    drawn = {study.exchanged(world, items, "b", np.random.default_rng(n))[1].b[0] for n in range(60)}
    assert len(drawn) > 1


@pytest.mark.parametrize("name", [" ".join(one) for one in study.MAPS])
def test_questions_differ_in_what_is_exchanged(mini, name):
    arm, asked, what = name.split()
    world, items = mini.world, mini.items["train"]
    rows = study.questions(world, items, arm, asked, what, np.random.default_rng(0))
    reads = world.tokenizer()
    told = {row["id"]: row for row in world.rows(items, bridge=True)}
    names = ("h", "r1", "r2", "b") if (arm, asked) == ("with", "t") else ("h", "r1", "r2")
    assert rows
    for row in rows:
        one, other = (reads.convert_ids_to_tokens(reads(row[key])["input_ids"])[1:] for key in ("prompt", "corrupt"))
        assert [n for n, x, y in zip(names, one, other, strict=True) if x != y] == [what]
        assert row["answer"] != row["wrong"]
    texts = {row["prompt"]: row["answer"] for row in rows}
    right = {row["prompt"] + row["b"] * (len(names) == 4): row[asked] for row in told.values()}
    assert texts.items() <= right.items()


def test_patching_a_run_into_itself_changes_nothing(mini, model):
    rows = study.questions(mini.world, mini.items["train"], "with", "t", "r2", np.random.default_rng(0))
    found = study.traced(model, [row | {"corrupt": row["prompt"]} for row in rows])
    np.testing.assert_allclose(found["lost"], 0, atol=1e-6)
    assert np.isnan(found["carried"]).all()


def test_a_patch_is_a_forward_pass_with_the_state_replaced(mini, model):
    """By plain hooks; before the exchanged token nothing can change, and its embedding is the whole other run."""
    rows = study.questions(mini.world, mini.items["train"], "with", "t", "r1", np.random.default_rng(0))[:4]
    found = study.traced(model, rows)["lost"][0]
    reads, module = model.require_tokenizer(), model.module
    clean, other = (torch.tensor(reads([row[key] for row in rows])["input_ids"]) for key in ("prompt", "corrupt"))
    answers = torch.tensor(reads.convert_tokens_to_ids([row["answer"] for row in rows]))

    def of_answer(logits):
        return logits[:, -1].softmax(-1).gather(1, answers[:, None])[:, 0]

    with torch.no_grad():
        plain, whole = of_answer(module(clean).logits), of_answer(module(other).logits)
        for layer, position in np.ndindex(MINI.layers, 4):
            kept = []
            block = module.transformer.h[layer]
            hook = block.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0]))
            module(other)
            hook.remove()

            def put(m, args, at=position + 1, state=kept[0]):
                new = args[0].clone()
                new[:, at] = state[:, at]
                return (new, *args[1:])

            hook = block.register_forward_pre_hook(put)
            patched = of_answer(module(clean).logits)
            hook.remove()
            assert found[layer, position] == pytest.approx(float((plain - patched).mean()), abs=1e-5)
    assert found[:, 0] == pytest.approx(0, abs=1e-6)
    assert found[0, 1] == pytest.approx(float((plain - whole).mean()), abs=1e-5)
    assert np.abs(found).max() > 1e-3, "the weights are too small for a patch to matter"


# The verdicts


def words(told, seen, moved):
    return {claim: word for claim, _, word in tables.verdicts(told, seen, moved)}


def test_verdicts_follow_what_was_measured(mini):
    told, seen, moved = (mini.stored(name) for name in ("train", "lens", "trace"))
    seen = seen.assign(planted((1, 2), items=MINI.items, blocks=MINI.layers)[["rank", "null"]])
    told["right"] = told["right"].where(told["right"] < 0, 0)
    before = words(told, seen, moved)
    assert before["without it, ID items are learnt after much longer training (accuracy ≥ 0.9)"] == (
        "undecided: not trained long enough"
    )
    assert before["without it, OOD items are not learnt, however long (accuracy < 0.5)"].startswith("undecided: ID")
    assert {before[c] for c in before if "shallower" in c or "the same by" in c} == {"yes"}
    told["right"] = told["right"].where(told["measure"] != "t held", np.where(told["right"] < 0, -1, 1))
    after = words(told, seen, moved)
    assert after["without it, ID items are learnt after much longer training (accuracy ≥ 0.9)"] == "yes"
    assert after["without it, OOD items are not learnt, however long (accuracy < 0.5)"] == "yes"
    assert after["with the bridge, ID items are learnt (accuracy ≥ 0.9)"] == "yes"
    assert after["with the bridge, so are OOD items (accuracy ≥ 0.9)"] == "no"
    later = seen.assign(planted((2, 1), items=MINI.items, blocks=MINI.layers)[["rank", "null"]])
    assert {w for c, w in words(told, later, moved).items() if "shallower" in c or "the same by" in c} == {"no"}


def test_seeds_that_differ_decide_nothing(mini):
    told, seen, moved = (mini.stored(name) for name in ("train", "lens", "trace"))
    two = [xr.concat([one, one.assign_coords(seed=[1])], "seed", data_vars="minimal") for one in (told, seen, moved)]
    right = two[0]["right"].copy()
    right[{"seed": 1, "arm": 0}] = np.where(right[{"seed": 1, "arm": 0}] < 0, -1, 1)
    right[{"seed": 0}] = np.where(right[{"seed": 0}] < 0, -1, 0)
    two[0]["right"] = right
    claim = "with the bridge, ID items are learnt (accuracy ≥ 0.9)"
    assert words(*two)[claim] == "undecided: seeds differ"
