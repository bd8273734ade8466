"""Circuits alone: the planted one does it all, nothing in it is idle, and the numbers are those of plain hooks."""

import copy
import json
import re
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import DECODERS
from planted_circuit import D_HEAD, HEADS, INDUCTION, LAYERS, LETTERS, PREVIOUS, planted_model
from test_cmap import shifted
from test_patching import letters

from finetune_lens import results, stats, zoo
from finetune_lens.circuits import Circuit, Group
from finetune_lens.circuits import scores as scoring
from finetune_lens.circuits.evaluation import evaluate_circuit, minimal_circuit
from finetune_lens.errors import GateFailed, InputError
from finetune_lens.hooked import HookedModel, ablation
from finetune_lens.hooked.ablation import keep_only, mean_z
from finetune_lens.hooked.grid import aligned
from finetune_lens.pair import ModelPair
from finetune_lens.plots.circuit_faithfulness import circuit_faithfulness
from finetune_lens.prompts import read_prompts
from finetune_lens.results.circuit_evaluation import CircuitEvaluation

IDLE = {"induction": ((2, 1), (0, 1)), "previous": ((0, 0), (2, 2))}  # (0, 1) does nothing at the end


def evaluate(models: Any, circuits: Any, prompts: Any, **options: Any) -> CircuitEvaluation:
    few = {"random": 5, "subsets": 3, "minimality": False, "progress": False}
    return evaluate_circuit(models, circuits, prompts, **few | options)


@pytest.fixture(scope="module")
def planted():
    return planted_model()


@pytest.fixture(scope="module")
def circuits(planted):
    idle = {name: Group(g.position, g.heads + IDLE[name]) for name, g in planted.groups.items()}
    return {"planted": Circuit(planted.groups), "with idle heads": Circuit(idle)}


@pytest.fixture(scope="module")
def found(planted, circuits):
    model = HookedModel(planted.model, planted.tokenizer, name="planted")
    return evaluate(model, circuits, planted.prompts, random=60, subsets=20, minimality=True)


def alone(planted: Any, heads: set, *, role: str) -> np.ndarray:
    """(example,): 1 where these heads of a role are the ones that its letter needs, by the planted model's rule."""
    told = [LETTERS.index(row["answer" if role == "induction" else "prompt"][-1]) % 2 for row in planted.prompts]
    return np.array([float((INDUCTION if role == "induction" else PREVIOUS)[parity] in heads) for parity in told])


def test_planted(planted, found):
    """It does what the model does; every random circuit does less; what it lacks the model lacks."""
    table = found.table().set_index("circuit")
    for name in found.circuits:
        row = table.loc[name]
        assert row[["full", "circuit_score", "faithfulness", "faithfulness_low", "normalised"]].tolist() == [1] * 5
        assert row["percentile"] == 100
        assert row["p"] == pytest.approx(1 / 61)
        assert row["floor"] < row["random"] + 0.1 < 0.5
        means = found.data.random.sel(circuit=name).mean("example")
        assert float(means.max()) < 1
        assert row[["random_low", "random_high"]].tolist() == np.quantile(means, (0.05, 0.95)).tolist()
    assert found.data.random.sel(circuit="planted").std() > 0
    completeness = found.completeness("planted")
    assert len(completeness) == 22
    assert completeness["gap"].max() == 0
    assert completeness["circuit_score"].nunique() > 3  # subsets that differ
    assert list(completeness["removed"][:2]) == ["group induction", "group previous"]
    assert (completeness["circuit_score"][:2] < 0.2).all()


def test_each_part(planted, found):
    """Without a head, exactly the prompts whose letter it carries are lost."""
    one = found.data.sel(circuit="planted", model="model").transpose(..., "example")
    heads = found.minimality("planted")
    for row in heads.itertuples():
        rest = [at for at in ((INDUCTION, PREVIOUS)[row.group == "previous"]) if at != (row.layer, row.head)]
        assert row.partners == f"{rest[0][0]}.{rest[0][1]}"  # K is the other head, so that v is alone
        held = one.held.values[row.Index]
        expected = alone(planted, {(row.layer, row.head)}, role=row.group)
        if row.group == "previous":
            np.testing.assert_array_equal(held, expected)
        else:
            assert (held >= expected).all()  # and by chance a letter that the others' mean names
            assert held.mean() < 1
    members = [tuple(pair) for pair in zip(heads["layer"], heads["head"], strict=True)]
    checked = 0
    for number, removed in enumerate(one.removed.values[:, : len(members)] == 1):
        left = {head for head, gone in zip(members, removed, strict=True) if not gone}
        if set(INDUCTION) <= left:
            np.testing.assert_array_equal(one.without.values[number], alone(planted, left, role="previous"))
            checked += 1
    assert checked


def test_minimal(planted, found, circuits):
    """The idle heads go, the planted ones stay."""
    for name in found.circuits:
        table = found.minimality(name)
        kept = {group: tuple(zip(part["layer"], part["head"], strict=True))
                for group, part in table[table["kept"]].groupby("group")}  # fmt: skip
        assert kept == {"induction": INDUCTION, "previous": PREVIOUS}
        assert set(table["verdict"]) == {"needed"} | ({"not needed"} if len(table) > 4 else set())
        assert (table["score"][table["kept"]] > 0.5).all()
        assert (table["score"][~table["kept"]] == 0).all()
        left = minimal_circuit(found, circuit=name)
        assert left.groups == Circuit(planted.groups).groups
        assert left.task == {"minimal_in": "model", "threshold": 0.01}
    row = found.table().set_index("circuit").loc["with idle heads"]
    assert (row["heads"], row["minimal_heads"], row["minimal_score"], row["minimal_faithfulness"]) == (8, 4, 1, 1)
    finite = found.minimality("planted", "model").query("group == 'induction'")
    held = found.data.held.sel(circuit="planted", model="model").values[0]
    dropped = found.data.dropped.sel(circuit="planted", model="model").values[0]
    assert finite["score"].iloc[0] == pytest.approx(held.mean() / dropped.mean() - 1)
    assert finite["low"].iloc[0] < finite["score"].iloc[0] < finite["high"].iloc[0]


def test_partners():
    """K: those whose loss makes a head's own hurt most, none that it does not, a third of the group rounded up."""
    members = [("a", 0, 0, head) for head in range(4)] + [("b", 0, 1, 0)]
    layout = scoring.Layout(members, (1, 2, 4), [0], {}, np.zeros((0, 1, 2, 4), bool))
    score = {(v,): 0.9 for v in range(5)}
    score |= {(0, 1): 0.5, (0, 2): 0.7, (0, 3): 0.95, (1, 2): 0.9, (1, 3): 0.8, (2, 3): 0.6}
    assert scoring._pairs(layout) == [*((v,) for v in range(5)), *(pair for pair in score if len(pair) == 2)]
    assert scoring._partners(layout, score, 0.3) == [(1, 2), (0, 3), (3, 0), (2, 1), ()]
    assert scoring._partners(layout, score, 0.25) == [(1,), (0,), (3,), (2,), ()]
    assert scoring._partners(layout, score, 0) == [()] * 5


def swapped(model: Any, layer: int, one: int, other: int) -> Any:
    """The same function with two heads of a layer in each other's place."""
    model = copy.deepcopy(model)
    attention = model.transformer.h[layer].attn
    a, b = (np.arange(n * D_HEAD, (n + 1) * D_HEAD) for n in (one, other))
    width = attention.c_proj.weight.shape[0]
    columns = np.arange(3 * width)
    for part in range(3):
        columns[part * width + a], columns[part * width + b] = part * width + b, part * width + a
    rows = np.arange(width)
    rows[a], rows[b] = b, a
    attention.c_attn.weight.copy_(attention.c_attn.weight[:, columns].clone())
    attention.c_proj.weight.copy_(attention.c_proj.weight[rows].clone())
    return model


def test_across_models(planted):
    """A head that moved: each circuit is whole in its own model and lacks that head in the other."""
    tuned = swapped(planted.model, 1, 2, 0)
    pair = ModelPair.load(planted.model, tuned, tokenizer=planted.tokenizer)
    moved = planted.groups | {"previous": Group("told:first", ((0, 1), (1, 0)))}
    circuits = {"base's": Circuit(planted.groups), "tuned's": Circuit(moved)}
    found = evaluate(pair, circuits, planted.prompts, random=20, subsets=0, check=False)
    assert found.models == ["base", "tuned"]
    lost = alone(planted, {(0, 1)}, role="previous")
    for circuit, own, other in (("base's", "base", "tuned"), ("tuned's", "tuned", "base")):
        one = found.data.alone.sel(circuit=circuit)
        np.testing.assert_array_equal(one.sel(model=own), 1)
        np.testing.assert_array_equal(one.sel(model=other), lost)
    for row, sign in zip(found.difference().to_dict("records"), (-1, 1), strict=True):
        assert row["difference"] == pytest.approx(sign * (1 - lost.mean()))
        assert row["low"] < row["difference"] < row["high"]
        assert min(sign * row["low"], sign * row["high"]) > 0
    full, nothing = found.data.full, found.data.nothing
    np.testing.assert_array_equal(full.sel(model="base"), full.sel(model="tuned"))
    np.testing.assert_array_equal(nothing.sel(model="base"), nothing.sel(model="tuned"))
    random = found.data.random.sel(circuit="base's")
    assert (random.sel(model="base") != random.sel(model="tuned")).any()  # the same heads, which do other things
    itself = evaluate(ModelPair.load(planted.model, copy.deepcopy(planted.model), tokenizer=planted.tokenizer),
                      circuits, planted.prompts[:16], subsets=0, check=False)  # fmt: skip
    np.testing.assert_array_equal(itself.data.random.sel(model="base"), itself.data.random.sel(model="tuned"))
    assert itself.difference()[["difference", "low", "high"]].abs().max().max() == 0


def test_unsafe_pair(planted, circuits):
    """A pair that cannot be compared: the trust gate refuses it, and two readings of one text are never compared."""
    pair = ModelPair.load(planted.model, copy.deepcopy(planted.model), tokenizer=planted.tokenizer)
    with pytest.raises(GateFailed, match="not safe to compare"):
        evaluate(pair, circuits, planted.prompts[:4])
    pair.tuned.tokenizer = shifted(planted.tokenizer)
    with pytest.raises(InputError, match=r"read prompt|different ids"):
        evaluate(pair, circuits, planted.prompts[:4], check=False)


def drawn_prompts(words: str) -> list[dict[str, Any]]:
    """Prompts of several lengths: `mark` is a letter of each, `=` its end."""
    return [
        {"prompt": f"{w}=", "answer": w[0], "wrong": w[1], "mark": w[n % len(w)], "end": "="}
        for n, w in enumerate(words.split())
    ]


RAGGED = drawn_prompts("abcde fghijkl mno pqrstuvw xyzabc defg")
OTHERS = drawn_prompts("hijklmn opqrst uvwxyzab cdefg hijk")


class Plain:
    """The oracle: one prompt at a time without padding, plain forward pre-hooks on the output projections."""

    def __init__(self, module: Any, align: str):
        self.module, self.align = module, align
        self.projections = [m for name, m in module.named_modules() if re.search(r"(attn\.c_proj|o_proj)$", name)]
        self.heads = module.config.num_attention_heads
        self.totals: list[dict[int, Any]] = [{} for _ in self.projections]
        self.counts: dict[int, int] = {}

    def place(self, column: int, length: int) -> int:
        return column - length if self.align == "right" else column

    def average(self, prompts: list[dict[str, Any]]) -> None:
        for row in prompts:
            seen: list[Any] = []
            self.logits(row, [lambda x, seen=seen: seen.append(x) for _ in self.projections])
            length = len(row["prompt"])
            for column in range(length):
                at = self.place(column, length)
                self.counts[at] = self.counts.get(at, 0) + 1
                for layer, z in enumerate(seen):
                    self.totals[layer][at] = self.totals[layer].get(at, 0) + z[0, column]

    def logits(self, row: dict[str, Any], touch: list) -> Any:
        hooks = [p.register_forward_pre_hook(lambda m, args, f=f: (f(args[0]),) if f(args[0]) is not None else None)
                 for p, f in zip(self.projections, [_once(f) for f in touch], strict=True)]  # fmt: skip
        try:
            return self.module(torch.tensor([letters()(row["prompt"])["input_ids"]])).logits[0, -1]
        finally:
            for hook in hooks:
                hook.remove()

    def score(self, row: dict[str, Any], stays: Any) -> float:
        """logit difference, where `stays(column, layer, head)` says which heads keep their z."""
        length = len(row["prompt"])

        def touch(layer: int) -> Any:
            def change(x: Any) -> Any:
                x = x.clone().unflatten(-1, (self.heads, -1))
                for column in range(length):
                    at = self.place(column, length)
                    mean = (self.totals[layer][at] / self.counts[at]).unflatten(-1, (self.heads, -1))
                    for head in range(self.heads):
                        if not stays(column, layer, head):
                            x[0, column, head] = mean[head]
                return x.flatten(-2)

            return change

        logits = self.logits(row, [touch(layer) for layer in range(len(self.projections))])
        right, wrong = (letters()(row[side])["input_ids"][0] for side in ("answer", "wrong"))
        return float(logits[right] - logits[wrong])


def _once(change: Any) -> Any:
    """Called twice in a row with one input, compute once."""
    held: list[Any] = []

    def call(x: Any) -> Any:
        if not held or held[0] is not x:
            held[:] = [x, change(x)]
        return held[1]

    return call


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("align", ["left", "right"])
def test_plain_hooks(library, family, align):
    """Every score is that of a forward pass with plain hooks, prompts of all lengths, another set averaged."""
    module = library.model(family)
    groups = {"mark": Group("mark:first", ((0, 1), (1, 3), (1, 0))), "one": Group(1, ((0, 0), (0, 1), (1, 2))),
              "end": Group("end:last", ((0, 2), (1, 0), (1, 1)))}  # fmt: skip
    if align == "right":
        groups["one"] = Group(-4, groups["one"].heads)
    found = evaluate(HookedModel(module, letters()), Circuit(groups), RAGGED, reference=OTHERS, metric="logit_diff",
                     align=align, minimality=True, batch_size=4, partners=0.5)  # fmt: skip
    plain = Plain(module, align)
    plain.average(OTHERS)
    one = found.data.isel(circuit=0, model=0).transpose(..., "example")
    members = list(zip(one.group.values, one.layer.values, one["head"].values, strict=True))
    names = {"mark": lambda row: row["prompt"].index(row["mark"]), "end": lambda row: len(row["prompt"]) - 1,
             "one": lambda row: len(row["prompt"]) - 4 if align == "right" else 1}  # fmt: skip
    assert any(names["mark"](row) == names["one"](row) for row in RAGGED)  # two groups in one column

    def kept(row: dict[str, Any], without: Any = ()) -> set:
        # A place belongs to its group: where two share a column, a head that one of them keeps is kept.
        return {(names[group](row), layer, head) for n, (group, layer, head) in enumerate(members) if n not in without}

    def expected(without: Any = (), *, whole: bool = False) -> list[float]:
        scores = []
        for row in RAGGED:
            if whole:
                gone = {(names[g](row), la, h) for n, (g, la, h) in enumerate(members) if n in without}
                scores.append(plain.score(row, lambda *place, gone=gone: place not in gone))
            else:
                stay = kept(row, without)
                scores.append(plain.score(row, lambda *place, stay=stay: place in stay))
        return scores

    close = {"atol": 2e-5, "rtol": 0}
    np.testing.assert_allclose(one.full, [plain.score(row, lambda *_: True) for row in RAGGED], **close)
    np.testing.assert_allclose(one.nothing, [plain.score(row, lambda *_: False) for row in RAGGED], **close)
    np.testing.assert_allclose(one.alone, expected(), **close)
    for number in range(one.sizes["knockout"]):
        without = np.flatnonzero(one.removed.values[number] == 1)
        np.testing.assert_allclose(one.without[number], expected(without), **close)
        np.testing.assert_allclose(one.model_without[number], expected(without, whole=True), **close)
    for v in range(len(members)):
        partners = np.flatnonzero(one.together.values[v] == 1)
        assert {members[w][0] for w in partners} <= {members[v][0]}
        np.testing.assert_allclose(one.held[v], expected(partners), **close)
        np.testing.assert_allclose(one.dropped[v], expected({*partners, v}), **close)
    assert (one.together.values == 1).any()
    pruned = np.flatnonzero(one.needed.values == 0)
    assert len(pruned)
    np.testing.assert_allclose(one.pruned, expected(pruned), **close)
    assert np.abs(one.alone - one.full).max() > 0.02
    assert np.abs(one.alone - one.nothing).max() > 0.02
    low, high = stats.interval_of_mean(one.without - one.model_without)
    completeness = found.completeness()
    assert completeness[["low", "high"]].values.T.tolist() == [low.tolist(), high.tolist()]
    np.testing.assert_allclose(completeness["gap"], np.abs((one.without - one.model_without).mean("example")))
    assert completeness["gap"].min() > 0


@pytest.mark.parametrize("family", DECODERS)
def test_short_way(library, family):
    """Columns of circuits alone give what whole prompts give, in every architecture, padded left or right."""
    model = HookedModel(library.model(family), letters(), name=family)
    items = read_prompts(RAGGED)
    where = aligned(items, model.tokenizer, corrupted=False, align=("left", "right")[DECODERS.index(family) % 2])
    second = where.clean.prompt_columns.int().argmax(1).numpy() + 1
    named = [np.broadcast_to(where.columns(name), len(items)) for name in ("mark:first", "end:last")]
    columns = np.stack([second, *named])
    kept = np.random.default_rng(0).random((12, 3, model.layers, model.heads)) < 0.5
    kept[0], kept[1] = True, kept[2]
    given = model, where.clean, mean_z(model, where.clean), columns, kept
    short, whole = (keep_only(*given, metric="logit_diff", full=full, progress=False) for full in (False, True))
    assert not short.notes
    np.testing.assert_allclose(short.values, whole.values, atol=5e-5)
    np.testing.assert_allclose(short.nothing, whole.nothing, atol=5e-5)
    assert short.values.std(0).max() > 1e-3


def test_everything(library):
    """All heads at all positions are the model; batches of any size give the same."""
    words = drawn_prompts("abcd efgh ijkl mnop qrst")
    heads = tuple((layer, head) for layer in range(2) for head in range(4))
    whole = Circuit({str(p): Group(p, heads) for p in range(5)})
    part = Circuit({"mark": Group("mark:first", heads[:3]), "end": Group(-1, heads[2:])})
    for family in ("gpt2", "llama"):
        model = HookedModel(library.model(family), letters())
        options: dict[str, Any] = {"metric": "logit_diff", "subsets": 1, "random": 2}
        runs = [evaluate(model, {"whole": whole, "part": part}, words, batch_size=size, **options)
                for size in (None, 1, 3)]  # fmt: skip
        data = runs[0].data.isel(model=0)
        np.testing.assert_allclose(data.alone.sel(circuit="whole"), data.full, atol=1e-6)
        assert np.abs(data.alone.sel(circuit="part") - data.full).max() > 0.01
        for other in runs[1:]:
            for name, values in data.data_vars.items():
                if values.dtype.kind == "f":
                    np.testing.assert_allclose(other.data[name].isel(model=0), values, atol=2e-6)


def test_seeds(planted, circuits):
    """One seed, one result; another draws other circuits and subsets. Random circuits are as large as the circuit."""
    model = HookedModel(planted.model, planted.tokenizer)
    rows = planted.prompts[:12]
    one, same, other = (evaluate(model, circuits, rows, seed=seed, subsets=10) for seed in (0, 0, 1))
    assert one.data.equals(same.data)
    assert (one.data.removed != other.data.removed).any()
    where = aligned(read_prompts(rows), planted.tokenizer, corrupted=False)
    layouts = {seed: scoring.lay_out(circuits, where, model, 200, 0, seed) for seed in (0, 1)}
    for name, sizes in (("planted", [2, 2]), ("with idle heads", [4, 4])):
        drawn = layouts[0][name].random
        assert (drawn.sum((2, 3)) == sizes).all()  # none twice
        assert (drawn != layouts[1][name].random).any()
        share = drawn.mean(0)
        np.testing.assert_allclose(share, sizes[0] / (LAYERS * HEADS), atol=0.12)  # every head, at both positions


def test_undefined(planted, circuits):
    """Where the model cannot do the task there is no share of it, and no head can be judged."""
    model = HookedModel(planted.model, planted.tokenizer)
    rows = [row | {"answer": "<pad>"} for row in planted.prompts[:20]]
    found = evaluate(model, circuits["planted"], rows, minimality=True)
    row = found.table().iloc[0]
    assert row["full"] == row["circuit_score"] == 0
    assert row[["faithfulness", "normalised"]].isna().all()
    assert row["p"] == 1
    assert "undefined" in found.summary()
    assert set(found.minimality()["verdict"]) == {"undetermined"}
    assert row["minimal_heads"] == 4
    assert json.dumps(found.headline(), allow_nan=False)


def test_no_random_no_minimality(planted, circuits):
    model = HookedModel(planted.model, planted.tokenizer)
    found = evaluate(model, circuits["planted"], planted.prompts[:6], random=0, subsets=0)
    assert np.isnan(found.table()["p"].iloc[0])
    assert len(found.completeness()) == 2
    assert "random" not in found.summary()
    with pytest.raises(InputError, match="minimality was not measured"):
        found.minimality()
    with pytest.raises(InputError, match="one model was evaluated"):
        found.difference()


def test_result(found, tmp_path):
    again = results.load(found.save(tmp_path / "circuits.nc"))
    assert isinstance(again, CircuitEvaluation)
    assert again.summary() == found.summary()
    for table in ("table", "completeness", "minimality"):
        assert getattr(again, table)().equals(getattr(found, table)())
    assert minimal_circuit(again, circuit="planted") == minimal_circuit(found, circuit="planted")
    headline = found.headline()
    assert headline["planted"]["model"]["faithfulness"] == 1
    assert json.dumps(headline, allow_nan=False)
    assert "planted (4 heads) in model: full 1, circuit 1" in found.summary()
    with pytest.raises(InputError, match="several circuits were evaluated, say which: planted, with idle heads"):
        minimal_circuit(found)
    with pytest.raises(InputError, match="no circuit 'mine' was evaluated"):
        found.minimality("mine")


def test_adapter():
    """A pair that shares one set of weights: each side is scored with its own."""
    folder = zoo.path("boxes")
    pair = ModelPair.load(folder / "base", folder / "lora")
    circuit = Circuit({"end": Group(-1, ((0, 0), (1, 1), (2, 0))), "label": Group("label:first", ((0, 1), (1, 2)))})
    options: dict[str, Any] = {"limit": 4, "metric": "logit_diff", "subsets": 0}
    both = evaluate(pair, circuit, folder / "prompts.jsonl", **options).data
    for side, model in (("base", folder / "base"), ("tuned", pair.tuned)):
        one = evaluate(model, circuit, folder / "prompts.jsonl", **options).data
        for name in ("full", "nothing", "alone", "random", "without", "model_without"):
            np.testing.assert_allclose(both[name].sel(model=side), one[name].sel(model="model"), atol=1e-5)
    assert np.abs(both.alone.sel(model="base") - both.alone.sel(model="tuned")).max() > 0.01


def test_continues(planted, circuits, tmp_path, monkeypatch):
    """Interrupted, the same call goes on behind the last batch; another seed begins anew."""
    model = HookedModel(planted.model, planted.tokenizer, fingerprint="0" * 64)
    options: dict[str, Any] = {"batch_size": 8, "minimality": True, "subsets": 1, "partial": tmp_path}
    given = model, circuits["with idle heads"], planted.prompts[:16]
    expected = evaluate(*given, **options | {"partial": None})
    measured, done = ablation._Batch.measured, []

    def stopping(self: Any, *, full: bool) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return measured(self, full=full)

    monkeypatch.setattr(ablation._Batch, "measured", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*given, **options)

    def counting(self: Any, *, full: bool) -> Any:
        done.append(1)
        return measured(self, full=full)

    monkeypatch.setattr(ablation._Batch, "measured", counting)
    again = evaluate(*given, **options)
    assert len(done) == 3 * 2  # three rounds of two batches, none twice
    assert again.data.equals(expected.data)
    evaluate(*given, **options | {"seed": 1})
    assert len(done) >= 4 * 2


def test_found_out(library, monkeypatch):
    """Where the short way is wrong, the full one is taken, and said."""
    model = HookedModel(library.model("llama"), letters())
    circuit = Circuit({"mark": Group("mark:first", ((0, 1), (1, 3))), "end": Group("end:last", ((0, 2), (1, 0)))})
    options: dict[str, Any] = {"metric": "logit_diff", "align": "left"}
    expected = evaluate(model, circuit, RAGGED, **options)
    behind = ablation._Column.behind
    monkeypatch.setattr(ablation._Column, "behind", lambda self, *args: 1.3 * behind(self, *args))
    found = evaluate(model, circuit, RAGGED, **options)
    assert re.search("the short way was not taken: an unpatched row differs", found.summary())
    np.testing.assert_allclose(found.data.alone, expected.data.alone, atol=1e-5)
    np.testing.assert_allclose(found.data.random, expected.data.random, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"circuits": Circuit({"a": Group(-1, ((3, 0),))})}, r"head 3\.0, and m has layers 0 to 2 of heads 0 to 3"),
        ({"circuits": Circuit({"a": Group("told:2", ((0, 0),))})}, "position 'told:2' does not exist"),
        ({"circuits": Circuit({"a": Group("nowhere", ((0, 0),))})}, "expected a field 'nowhere'"),
        (
            {"circuits": Circuit({"a": Group(12, ((0, 0),))})},
            "position 12 does not exist: the prompts have positions 0",
        ),
        ({"circuits": {}}, "expected one circuit or more"),
        ({"reference": []}, "holds no prompts"),
        ({"reference": [{"prompt": "abc"}]}, "prompts differ in length|have different lengths|align"),
        ({"reference": [{"prompt": "abc"}], "align": "left"}, "no prompt of the reference has a position 3"),
        ({"metric": "kl"}, "the metric of a circuit is one of accuracy"),
        ({"random": -1}, "at least 0; found -1"),
        ({"partners": 1.5}, "share of a group, between 0 and 1; found 1.5"),
        ({"threshold": 0}, "threshold of minimality is above 0"),
        ({"batch_size": 0}, "batch size is at least 1"),
    ],
)
def test_bad_input(planted, options, words):
    model = HookedModel(planted.model, planted.tokenizer, name="m")
    given = {"circuits": Circuit(planted.groups), "prompts": planted.prompts[:4]} | options
    with pytest.raises(InputError, match=words):
        evaluate(model, **given)


def test_ragged_position(planted):
    """A number that lies behind the end of a shorter prompt."""
    rows = [{"prompt": "abcdefa", "answer": "b"}, {"prompt": "cdefc", "answer": "d"}]
    model = HookedModel(planted.model, planted.tokenizer)
    with pytest.raises(InputError, match="prompt 2: position 6 does not exist"):
        evaluate(model, Circuit({"a": Group(6, ((0, 0),))}), rows, align="left")


def test_another_models_circuit(planted):
    """Refused by name, unless forced; in a pair it may be of either side."""
    mine = HookedModel(planted.model, planted.tokenizer, name="mine", fingerprint="a" * 64)
    circuit = Circuit(planted.groups, {"model": "theirs", "files_sha256": "b" * 64})
    with pytest.raises(InputError, match=r"found in theirs \(bbbbbbbbbbbb…\), not in mine \(aaaaaaaaaaaa…\).*--force"):
        evaluate(mine, circuit, planted.prompts[:4])
    assert evaluate(mine, circuit, planted.prompts[:4], force=True).table()["circuit_score"].iloc[0] == 1


def test_nothing_left(planted):
    """A circuit of idle heads: each can go, and then nothing is left."""
    model = HookedModel(planted.model, planted.tokenizer)
    prompts = planted.prompts[:10]
    found = evaluate(model, Circuit({"idle": Group(-1, ((0, 0), (1, 1)))}), prompts, minimality=True)
    if (found.minimality()["verdict"] == "undetermined").all():
        pytest.fail("the floor is 0 here: choose prompts on which it is not")
    with pytest.raises(InputError, match="no head of 'circuit' is needed in 'model'"):
        minimal_circuit(found)


def test_figure(found, tmp_path):
    ax = circuit_faithfulness(found)
    table = found.table()
    bands = [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches]
    np.testing.assert_allclose(bands, table[["random_low", "random_high"]])
    drawn = [line.get_xdata().tolist() for line in ax.lines]
    assert drawn == [table[name].tolist() for name in ("full", "circuit_score", "minimal_score")]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["planted", "with idle heads"]
    assert [text.get_text() for text in ax.texts] == ["1.00\n[1.00, 1.00]"] * 2 + ["faithfulness"]
    ax.figure.savefig(tmp_path / "figure.png")
    plt.close(ax.figure)
