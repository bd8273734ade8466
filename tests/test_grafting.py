"""Grafts: the score update against autograd, planted entries found, masks of the same size, continuation."""

import inspect
import json
import re

import numpy as np
import pytest
import torch

import finetune_lens as fl
from finetune_lens import InputError, ModelPair, masks
from finetune_lens.evaluation import add_gradient, measure, read_examples
from finetune_lens.grafting import graft, search
from finetune_lens.grafting.search import BIAS, Search, gradients, magnitudes, movements
from finetune_lens.hooked import HookedModel
from finetune_lens.hybrid import Hybrid
from finetune_lens.linalg.selection import largest
from finetune_lens.tasks import strings

TOKENIZER = strings.tokenizer()


def rows(n=24, seed=0, part="train"):
    drawn = strings.draw(["flip", "copy"], n, np.random.default_rng(seed), part=part)
    return [{"prompt": strings.question(*item), "answer": strings.answer(*item)} for item in drawn]


def two(library, family, change):
    """A pair in memory: the family's model, and one that `change` has changed."""
    base, tuned = library.fresh(family), library.fresh(family)
    with torch.no_grad():
        change(dict(tuned.named_parameters()))
    return ModelPair.load(base, tuned, tokenizer=TOKENIZER)


def noise(scale):
    def change(parameters):
        torch.manual_seed(3)
        for p in parameters.values():
            p.add_(torch.randn_like(p), alpha=scale)

    return change


# ------------------------------------------------------------------------------------------------- the score update


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_the_score_update_is_autograd_through_a_dense_gamma(library, family):
    """S ← S − η ∂L/∂S, with ∂L/∂S taken by autograd through γ(S) and θ(γ), weight by weight."""
    hybrid = Hybrid(two(library, family, noise(0.3)))
    names = hybrid.names(outside=False)
    examples = read_examples(rows(6), [TOKENIZER])
    start = largest(magnitudes(hybrid, names), 500)
    state = Search(hybrid, names, start, seed=5)
    for name in names:  # spread over the slope of σ, else all differences are 1e-9
        state.scores[name].mul_(12).add_(4)
    before = {n: s.clone() for n, s in state.scores.items()}
    hybrid.hold(state.soft())
    with gradients(hybrid, names):
        add_gradient(hybrid.model, examples, torch.arange(len(examples)))
        norm = state.update_norm()
        state.descend(7.0)
    expected, square = {}, 0.0
    for name in names:
        zero, one = hybrid.weights[name].ends(torch.float32, "cpu")
        s = before[name].clone().requires_grad_(True)
        chosen = start[name].float()
        gamma = chosen + (1 - 2 * chosen) * torch.sigmoid(s - BIAS)
        theta = zero + gamma * (one - zero)
        with hybrid.at(state_of(hybrid, names, before, start)):
            with gradients(hybrid, [name]):
                add_gradient(hybrid.model, examples, torch.arange(len(examples)))
                g = hybrid.gradient(name).clone()
            torch.testing.assert_close(hybrid.weights[name].live.read(), theta.detach(), rtol=1e-5, atol=1e-6)
        theta.backward(g)
        expected[name] = before[name] - 7.0 * s.grad
        square += float((g * (one - zero)).square().sum())
    for name in names:
        torch.testing.assert_close(state.scores[name], expected[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(state.scores[name], before[name]) or "norm" in name or "bias" in name
    assert norm == pytest.approx(square**0.5, rel=1e-4)


def state_of(hybrid, names, scores, start):
    state = Search(hybrid, names, start)
    state.scores = scores
    return state.soft()


def test_the_whole_gradient_is_that_of_a_functional_call(library):
    """The gradient that the scores see, against torch.func on the model as a function of S."""
    hybrid = Hybrid(two(library, "llama", noise(0.3)))
    names = [n for n in hybrid.names(outside=False) if "down_proj" in n]
    examples = read_examples(rows(5), [TOKENIZER])
    start = {n: torch.zeros(hybrid.weights[n].base.shape, dtype=torch.bool) for n in names}
    state = Search(hybrid, names, start)
    for name in names:
        state.scores[name].mul_(20)
    before = {n: s.clone() for n, s in state.scores.items()}
    module = hybrid.model.module

    def loss(scores):
        weights = {}
        for name in names:
            zero, one = hybrid.weights[name].ends(torch.float32, "cpu")
            weights[f"model.{name}.weight"] = zero + torch.sigmoid(scores[name] - BIAS) * (one - zero)
        total = 0.0
        for row in rows(5):
            ids = TOKENIZER(row["prompt"] + row["answer"], return_tensors="pt").input_ids
            logs = torch.func.functional_call(module, weights, kwargs={"input_ids": ids}).logits[0].log_softmax(-1)
            n = len(row["answer"])
            total = total - logs[-n - 1 : -1].gather(-1, ids[0, -n:, None]).sum()
        return total / 5

    slope = torch.func.grad(loss)(before)
    hybrid.hold(state.soft())
    with gradients(hybrid, names):
        add_gradient(hybrid.model, examples, torch.arange(5))
        state.descend(3.0)
    for name in names:
        torch.testing.assert_close(state.scores[name], before[name] - 3.0 * slope[name], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------- planted grafts


def planted(library, family="llama", count=30):
    """Two models that differ in `count` entries of the blocks, and where those are."""
    generator = torch.Generator().manual_seed(1)
    places = {}

    def change(parameters):
        chosen = [n for n in parameters if ".layers." in n or ".h." in n]
        for n in range(count):
            name = chosen[int(torch.randint(len(chosen), (1,), generator=generator))]
            flat = parameters[name].view(-1)
            at = int(torch.randint(len(flat), (1,), generator=generator))
            flat[at] += 3.0 + n % 5
            places.setdefault(name, set()).add(at)

    pair = two(library, family, change)
    return pair, sum(map(len, places.values()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_planted_graft_is_recovered_exactly(library, family):
    pair, count = planted(library, family)
    hybrid = Hybrid(pair)
    names = hybrid.names(outside=False)
    total = sum(hybrid.weights[n].count for n in names)
    changed = {n: v != 0 for n, v in magnitudes(hybrid, names)()}
    assert masks.size(changed) == count
    found = graft(pair, rows(), sparsity=count / total, steps=0, metric="logprob", progress=False)
    part = found.data.entries_by_weight.sel(mask="graft").isel(level=0).values
    assert part.tolist() == [int(changed[n].sum()) for n in names]
    assert np.array_equal(  # the tuned model, bit for bit
        found.values("logprob", file="train", method="graft"), found.values("logprob", file="train", method="tuned")
    )


def test_the_search_adds_what_helps_and_nothing_that_did_not_change(library):
    """From a base mask of one planted entry the search adds others, and never an entry that is the same in both."""
    pair, _ = planted(library)
    hybrid = Hybrid(pair)
    names = hybrid.names(outside=False)
    changed = {n: v != 0 for n, v in magnitudes(hybrid, names)()}
    tuned_says = answers_of_the_tuned(pair)
    examples = read_examples(tuned_says, [TOKENIZER])
    options = {"metric": "logprob", "step": 3e4, "steps": 15, "examples": 99, "batch_size": None, "seed": 0}
    found = search.search(hybrid, largest(magnitudes(hybrid, names), 1), examples, examples, **options)
    assert masks.size(found.mask) > 5
    assert masks.shared(found.mask, changed) == masks.size(found.mask)
    assert found.history["loss"][found.best] < found.history["loss"][0]
    assert found.history["metric"][found.best] == max(found.history["metric"])


def answers_of_the_tuned(pair):
    """Prompts whose answers are what the tuned model says."""
    model, found = pair.models()[1], []
    for row in rows():
        ids = TOKENIZER(row["prompt"], return_tensors="pt").input_ids
        found.append({"prompt": row["prompt"], "answer": TOKENIZER.decode(model.run(ids).logits[0, -1].argmax())})
    return [r for r in found if r["answer"] in strings.LETTERS and r["answer"]]


def test_masks_beside_it_are_those_of_a_sort(library):
    hybrid = Hybrid(two(library, "gpt2", noise(0.1)))
    names = hybrid.names(outside=False)
    ends = [hybrid.weights[n].ends(torch.float32, "cpu") for n in names]
    for values, of in (
        (magnitudes, lambda zero, one: (one - zero).abs()),
        (movements, lambda zero, one: (one**2 - zero**2) / 2),
    ):
        flat = torch.cat([of(*pair).reshape(-1) for pair in ends])
        mask = largest(values(hybrid, names), 777)
        mine = torch.cat([mask[n].reshape(-1) for n in names])
        assert int(mine.sum()) == 777
        assert float(flat[mine].min()) >= float(flat[~mine].max())


def test_all_masks_have_the_size_of_the_graft(library):
    pair = two(library, "llama", noise(0.2))
    found = graft(pair, rows(), sparsity=(0.01, 0.1), steps=2, metric="logprob", random_seeds=2, progress=False)
    for level in found.levels:
        table = found.table(level=level).set_index("method")
        size = table.loc["graft", "entries"]
        assert (table.drop("all of the blocks")["entries"] == size).all()
        assert found.where("matrix", level=level)["entries"].sum() == size
    heads = found.heads(level=0.1)
    q = found.where("matrix", level=0.1).set_index("matrix")["entries"]
    for name, part in heads.groupby("matrix"):
        assert part["entries"].sum() == q[name]
    assert set(heads["component"]) == {"q", "k", "v", "o"}
    norms = heads.groupby("matrix")["delta_norm"].apply(lambda v: float((v**2).sum() ** 0.5))
    whole = found.data.delta_norm.to_series()
    np.testing.assert_allclose(norms, whole[norms.index], rtol=1e-6)


def test_how_even_the_update_is(library):
    def alike(parameters):
        torch.manual_seed(0)
        for p in parameters.values():
            p.add_(torch.where(torch.rand_like(p) < 0.5, 0.25, -0.25))

    options = {"sparsity": 0.01, "steps": 0, "baselines": False, "metric": "logprob", "progress": False}
    every = graft(two(library, "llama", alike), rows(4), **options)
    assert every.concentration == pytest.approx(1, abs=1e-4)
    assert every.is_dense
    assert "warning: Δ is spread over all entries" in every.summary()
    normal = graft(two(library, "llama", noise(0.1)), rows(4), **options)
    assert normal.concentration == pytest.approx(2 / np.pi, abs=0.02)
    few = graft(planted(library)[0], rows(4), **options)
    assert few.concentration < 0.01
    assert "warning" not in few.summary()
    assert f"concentration of Δ, (Σ|Δ|)²/(N·ΣΔ²): {few.concentration:.2g}; from 0.5 on" in few.summary()


def test_of_an_adapter_it_is_said_that_all_entries_move():
    folder, words = fl.zoo.path("strings"), "is a low-rank adapter, which moves all entries"
    options = {"sparsity": 0.01, "steps": 0, "baselines": False, "metric": "logprob", "progress": False}
    adapter, whole = (
        graft(ModelPair.load(folder / "base", folder / arm), rows(4), **options) for arm in ("lora", "full")
    )
    assert not adapter.is_dense
    assert words in adapter.summary()
    assert words not in whole.summary()


# ------------------------------------------------------------------------------------------------- what is reported


@pytest.fixture(scope="module")
def folder(library, tmp_path_factory):
    """A pair on disk whose tuned model was trained a little on the training rows, with its prompt files."""
    path = tmp_path_factory.mktemp("grafting")
    base, tuned = library.fresh("llama"), library.fresh("llama")
    examples = read_examples(rows(256), [TOKENIZER])
    stepper = torch.optim.Adam(tuned.requires_grad_(True).model.layers.parameters(), lr=0.005)
    for step in range(80):
        stepper.zero_grad()
        add_gradient(HookedModel(tuned, TOKENIZER), examples, torch.arange(64) + 64 * (step % 4))
        stepper.step()
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(path / name)
        TOKENIZER.save_pretrained(path / name)
    for name, items in (
        ("fit", rows(64)),
        ("test", rows(64, 1, "test")),
        ("mixed", [*rows(64)[:4], *rows(8, 1, "test")]),
    ):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in items))
    return path


def test_recovery_agreement_and_calibration_by_hand(folder, tmp_path):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    found = graft(
        pair, folder / "fit.jsonl", evaluate={"test": folder / "test.jsonl"}, sparsity=0.05, steps=3, metric="logprob",
        files=tmp_path, progress=False,
    )  # fmt: skip
    hybrid = Hybrid(pair)
    examples = read_examples(folder / "test.jsonl", hybrid.tokenizers)
    base, tuned = (measure(hybrid.hold(g), examples) for g in (0.0, 1.0))
    mine = measure(hybrid.hold(masks.Graft.load(tmp_path / "graft.safetensors")), examples)
    row = found.table(file="test").set_index("method").loc["graft"]
    gain = (base.loss - mine.loss).mean() / (base.loss - tuned.loss).mean()
    assert row["recovery"] == pytest.approx(gain, rel=1e-6)
    assert row["recovery_low"] < gain < row["recovery_high"]
    same = (mine.prediction == tuned.prediction).all(1).mean()
    assert row["agreement"] == pytest.approx(same)
    assert row["metric"] == pytest.approx(-mine.loss.mean())
    again = fl.load(found.save(tmp_path / "g.nc"))
    assert again.table().equals(found.table())
    assert [c.method for c in again.curves("test")] == ["graft", "largest |Δ|", "largest |g⊙Δ|", "movement", "random"]


def test_overlap_and_union(folder, tmp_path):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    options = {"sparsity": 0.05, "steps": 0, "metric": "logprob", "baselines": False, "progress": False}
    for name, seed in (("one", 0), ("two", 1)):
        graft(pair, folder / "fit.jsonl", files=tmp_path / name, seed=seed, **options)
    found = graft(
        pair, folder / "fit.jsonl", beside=[tmp_path / n / "graft.safetensors" for n in ("one", "two")],
        **options | {"sparsity": 0.1},
    )  # fmt: skip
    frame = found.overlap().set_index(["graft", "other"])
    assert frame.loc[("this", "one"), "overlap"] == 1.0  # the 5 % largest are among the 10 % largest
    assert frame.loc[("one", "this"), "overlap"] == pytest.approx(0.5, abs=1e-3)
    assert frame.loc[("this", "one"), "chance"] == pytest.approx(0.1, abs=1e-3)
    assert frame.loc[("one", "this"), "p_value"] < 1e-10
    table = found.table().set_index("method")
    assert table.loc["with one", "entries"] == table.loc["graft", "entries"]
    assert table.loc["with one", "recovery"] == pytest.approx(table.loc["graft", "recovery"], rel=1e-6)


def test_grafts_beside_are_told_apart_and_checked_first(folder, tmp_path, monkeypatch):
    from finetune_lens.grafting import run

    pair = ModelPair.load(folder / "base", folder / "tuned")
    options = {"sparsity": 0.05, "steps": 0, "metric": "logprob", "baselines": False, "progress": False}
    for name in ("x/a", "y/a", "this"):
        graft(pair, folder / "fit.jsonl", files=tmp_path / name, **options)
    paths = [tmp_path / name / "graft.safetensors" for name in ("x/a", "y/a", "this")]
    found = graft(pair, folder / "fit.jsonl", beside=paths, **options)
    names = [str(n) for n in found.data.graft.values]
    assert names[0] == "this"
    assert [n.rpartition("/")[2] for n in names] == ["this", "a", "a", "this"]
    assert len(set(names)) == 4
    with pytest.raises(InputError, match="given twice"):
        graft(pair, folder / "fit.jsonl", beside=[paths[0], paths[0]], **options)
    monkeypatch.setattr(run, "search", None)  # nothing is searched before it is known that the grafts fit
    with pytest.raises(InputError, match="made for another base"):
        graft(ModelPair.load(folder / "tuned", folder / "base"), folder / "fit.jsonl", beside=paths, **options)


def test_only_grafts_of_the_last_run_are_left(folder, tmp_path):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    options = {"steps": 0, "metric": "logprob", "baselines": False, "progress": False, "files": tmp_path}
    graft(pair, folder / "fit.jsonl", sparsity=[0.05, 0.1], **options)
    (tmp_path / "graft-0.05.safetensors").rename(tmp_path / "graft-mine.safetensors")  # a name that no search leaves
    kept = tmp_path / "graft-0.1.safetensors"
    graft(pair, folder / "fit.jsonl", sparsity=[1e-3, 0.2], beside=[kept], **options)
    names = {"graft-0.001.safetensors", "graft-0.2.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == names | {"graft-mine.safetensors", kept.name}
    before = kept.read_bytes()
    with pytest.raises(InputError, match=r"graft-0\.1\.safetensors is to be compared with, and would be overwritten"):
        graft(pair, folder / "fit.jsonl", sparsity=[0.05, 0.1], beside=[kept], **options)
    assert kept.read_bytes() == before
    graft(pair, folder / "fit.jsonl", sparsity=0.05, **options)
    assert {p.name for p in tmp_path.iterdir()} == {"graft.safetensors", "graft-mine.safetensors"}


def test_better_than_the_tuned_model_and_unlike_it_is_said(folder):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    options = {"sparsity": 0.05, "steps": 1, "metric": "logprob", "baselines": False, "progress": False}
    found = graft(pair, folder / "fit.jsonl", **options)
    words, last = "more than the tuned model's own gain, and by other predictions", "the last step of the search"
    assert words not in found.summary()
    assert last in found.summary()
    tuned = found.values("logprob", file="train", method="tuned")
    for agreed, said in ((0.5, True), (0.95, False)):
        data = found.data.copy(deep=True)
        data["logprob"][:] = tuned + 1
        data["search_metric"][:] = tuned.mean() + 1  # there is nothing more to recover
        data["agreement"][:] = agreed
        assert (words in fl.results.grafting.Grafting(data).summary()) == said
        assert last not in fl.results.grafting.Grafting(data).summary()


def test_a_replaced_graft_is_measured_anew(folder, tmp_path):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    options = {"steps": 0, "metric": "logprob", "baselines": False, "progress": False}
    beside, kept = tmp_path / "one" / "graft.safetensors", tmp_path / "kept"
    values = []
    for sparsity in (0.3, 0.01):
        graft(pair, folder / "fit.jsonl", sparsity=sparsity, files=beside.parent, **options)
        found = graft(pair, folder / "fit.jsonl", sparsity=0.02, beside=[beside], partial=kept, **options)
        values.append(found.values("logprob", file="train", method="with one").mean())
    assert values[0] != values[1]


def test_what_was_not_measured_is_refused(folder):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    options = {"sparsity": [0.05, 0.01], "steps": 1, "metric": "logprob", "baselines": False, "progress": False}
    found = graft(pair, folder / "fit.jsonl", **options)
    assert found.levels == [0.01, 0.05]
    for call in (lambda: found.table(level=0.02), lambda: found.share(level=0.02)):
        with pytest.raises(InputError, match=r"no search started from 0.02; there are 0.01, 0.05"):
            call()
    for call in (lambda: found.table(file="nope"), lambda: found.gap("nope"), lambda: found.curves("nope")):
        with pytest.raises(InputError, match="nothing was measured on 'nope'; there are train"):
            call()
    assert "the last step of the search from" in found.summary()


def test_every_file_is_told(folder):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    other = [{"prompt": "<copy>abc=", "answer": "abc"}, {"prompt": "<copy>abd=", "answer": "abd"}]
    found = graft(
        pair, folder / "fit.jsonl", evaluate={"test": folder / "test.jsonl", "elsewhere": other}, sparsity=0.05,
        steps=0, metric="logprob", baselines=False, progress=False,
    )  # fmt: skip
    (line,) = (line for line in found.summary().splitlines() if line.startswith("on elsewhere"))
    base, tuned, mine = (
        np.nanmean(found.values("logprob", file="elsewhere", method=m)) for m in ("base", "tuned", "graft")
    )
    assert line.startswith(f"on elsewhere: base {base:.3g}, tuned {tuned:.3g}, graft {mine:.3g}, recovery ")
    assert "on test" in found.summary().splitlines()[0]


def test_train_and_eval_overlap_is_reported(folder):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    options = {"sparsity": 0.05, "steps": 0, "metric": "logprob", "baselines": False, "progress": False}
    found = graft(pair, folder / "fit.jsonl", evaluate={"mixed": folder / "mixed.jsonl"}, **options)
    assert "4 of the 12 prompts of mixed are among those that the mask was trained on" in found.summary()
    alone = graft(pair, folder / "fit.jsonl", **options)
    assert "no held-out prompts were given" in alone.summary()


def test_no_gain_is_said(folder):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    nonsense = [{"prompt": "<copy>abc=", "answer": "zzz"}, {"prompt": "<copy>abd=", "answer": "zzz"}]
    options = {"sparsity": 0.05, "steps": 0, "progress": False}
    found = graft(pair, folder / "fit.jsonl", evaluate={"nonsense": nonsense}, **options)
    assert np.isnan(found.recovery(file="nonsense")[0])
    assert "the interval covers 0: recovery is undefined" in found.summary()
    json.dumps(found.headline(), allow_nan=False)


def test_labels(folder):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    items = [r | {"answer": "ab"[n % 2]} for n, r in enumerate(rows(16))]
    found = graft(pair, items, objective="labels", sparsity=0.05, steps=1, metric="logprob", progress=False)
    curve, error = found.calibration(file="train", method="graft")
    assert curve["examples"].sum() == 16
    assert 0 <= error <= 1
    several = [{"prompt": "ab=", "answer": "xyz"}, {"prompt": "ac=", "answer": "b"}]
    with pytest.raises(InputError, match=r"label words are single tokens: .* is 3 tokens.*\(objective answer\)$"):
        graft(pair, several, objective="labels")


def test_published_defaults():
    """Panigrahi et al. 2023: the base mask, the examples of a step, b; and 10 to 100 steps."""
    given = {name: p.default for name, p in inspect.signature(graft).parameters.items()}
    assert (given["sparsity"], given["examples"], BIAS) == (1e-5, 1024, 10)
    assert 10 <= given["steps"] <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, "sparsity is a share of the entries, between 0 and 1; found 0"),
        ({"sparsity": 1.0}, "found 1"),
        ({"sparsity": float("nan")}, "found nan"),
        ({"sparsity": 1e-12}, r"sparsity 1e-12 is 0 of \d+ entries; the smallest is"),
        ({"sparsity": (0.1, 0.1)}, "several different ones"),
        ({"steps": -1}, "steps is at least 0; found -1"),
        ({"step": 0.0}, "step and rate are above 0"),
        ({"metric": "kl"}, "metric is accuracy or logprob; found 'kl'"),
        ({"beside": ["nowhere.safetensors"]}, "no such graft"),
        ({"evaluate": {"train": ["abc="]}}, "called 'train'; give held-out prompts another name"),
        ({"seed": -1}, "seed is at least 0"),
        ({"evaluate": {"texts": ["abc=", "abd="]}}, r"texts alone \(train answer, texts text\)"),
    ],
)
def test_bad_options(folder, options, message):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    with pytest.raises(InputError, match=message):
        graft(pair, folder / "fit.jsonl", progress=False, **options)


def test_what_cannot_be_grafted_leaves_nothing_behind(folder, tmp_path):
    options = {"sparsity": 0.05, "progress": False, "partial": tmp_path / "partial", "files": tmp_path / "files"}
    with pytest.raises(InputError, match="do not differ in any weight of a block"):
        graft(ModelPair.load(folder / "base", folder / "base"), folder / "fit.jsonl", **options)
    broken = {
        n: p.detach().clone()
        for n, p in ModelPair.load(folder / "base", folder / "tuned").tuned.module.state_dict().items()
    }
    broken["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj holds NaN or Inf"):
        graft(ModelPair.load(folder / "base", broken), folder / "fit.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_one_example_has_no_interval(folder):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    found = graft(pair, rows(1), sparsity=0.05, steps=0, metric="logprob", progress=False)
    assert re.search(r"difference [+−-][\d.]+\n", found.summary())
    assert "nan" not in found.summary()


# ------------------------------------------------------------------------------------------------- continuation


def test_an_interrupted_search_continues_from_its_last_step(folder, tmp_path, monkeypatch):
    pair = ModelPair.load(folder / "base", folder / "tuned")
    options = {"sparsity": (0.01, 0.05), "steps": 4, "examples": 16, "metric": "logprob", "progress": False}
    whole = graft(pair, folder / "fit.jsonl", files=tmp_path / "whole", **options)
    original, calls = search.add_gradient, []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:  # the third step of the second search
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(search, "add_gradient", counted)
    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        graft(pair, folder / "fit.jsonl", partial=partial, files=tmp_path / "again", **options)
    calls.clear()
    calls.extend([1] * 100)
    again = graft(pair, folder / "fit.jsonl", partial=partial, files=tmp_path / "again", **options)
    assert len(calls) == 100 + 2  # the two steps that were missing
    for name in whole.data.data_vars:
        np.testing.assert_array_equal(whole.data[name].values, again.data[name].values, err_msg=name)
    for name in ("graft-0.01.safetensors", "graft-0.05.safetensors"):
        one, other = (masks.Graft.load(tmp_path / run / name) for run in ("whole", "again"))
        assert one.positions.keys() == other.positions.keys()
        assert all(torch.equal(one.positions[n], other.positions[n]) for n in one.positions)
        assert all(torch.equal(one.values[n], other.values[n]) for n in one.values)


def test_command(folder, tmp_path, capsys, monkeypatch):
    import sys

    from finetune_lens.grafting.__main__ import main

    words = [
        "grafting", folder / "base", folder / "tuned", folder / "fit.jsonl", "--eval", folder / "test.jsonl",
        "--sparsity", "0.05", "--steps", "2", "--metric", "logprob", "--out", tmp_path / "g", "--json", "--quiet",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(w) for w in words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    record = json.loads(capsys.readouterr().out)
    assert record["headline"]["levels"]["0.05"]["graft"]["recovery"] > 0
    assert {p.name for p in (tmp_path / "g").iterdir()} >= {
        "grafting.nc",
        "grafting.csv",
        "graft.safetensors",
        "run.json",
    }
    assert not (tmp_path / "g" / ".grafting.partial").exists()
    for extra, message in (
        (["--eval", str(tmp_path / "none.jsonl")], "not there"),
        (["--sparsity", "2"], "sparsity is a share"),
        (["--objective", "guess"], "objective is one of"),
        (["--eval", str(folder / "fit.jsonl"), "--ood", str(folder / "fit.jsonl")], "both called 'fit'"),
    ):
        out = tmp_path / "bad"
        base = [str(w) for w in words[:4]] + ["--out", str(out), "--quiet", *extra]
        monkeypatch.setattr(sys, "argv", base)
        with pytest.raises(SystemExit) as stop:
            main()
        errors = capsys.readouterr().err
        assert stop.value.code == 2
        assert re.search(message, errors), errors
        assert errors.count("\n") == 1
        assert not out.exists()
