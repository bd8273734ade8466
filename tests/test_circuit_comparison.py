"""Overlap of two circuits: counts made by hand, chance against counting and drawing, what cannot be compared."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from finetune_lens import InputError
from finetune_lens.circuits import Circuit, Group
from finetune_lens.circuits.comparison import compare_circuits
from finetune_lens.results import load

# In the published format. Of 4 × 4 heads.
ONE = {
    "value_fetcher": [[2, 0], [2, 1], [3, 2], [3, 3]], "pos_transmitter": [[1, 0], [2, 0]],
    "pos_detector": [[1, 1], [1, 2]], "struct_reader": [[0, 0]],
}  # fmt: skip
OTHER = {
    "value_fetcher": [[2, 1], [3, 2], [3, 0]], "pos_transmitter": [[1, 0], [2, 0], [3, 3]],
    "pos_detector": [[1, 1], [0, 3], [0, 0], [1, 3]], "struct_reader": [[0, 0], [0, 1]],
}  # fmt: skip
BIG = {"model": "big", "layers": 32, "heads": 32}


@pytest.fixture
def lists(tmp_path):
    paths = tmp_path / "one.json", tmp_path / "other.json"
    for path, record in zip(paths, (ONE, OTHER), strict=True):
        path.write_text(json.dumps(record))
    return paths


def circuit(layers=8, heads=8, name="model", **groups):
    """Groups of heads, all of the last token."""
    model = {"model": name, "layers": layers, "heads": heads}
    return Circuit({group: Group(-1, tuple(members)) for group, members in groups.items()}, model)


def random_circuit(rng, sizes, positions, layers=8, heads=8, name="model"):
    groups = {}
    for i, (size, position) in enumerate(zip(sizes, positions, strict=True)):
        drawn = rng.choice(layers * heads, size, replace=False)
        groups[f"group_{i}"] = Group(position, tuple((int(n) // heads, int(n) % heads) for n in drawn))
    return Circuit(groups, {"model": name, "layers": layers, "heads": heads})


def exact(size, a, b):
    """P(k shared), k = 0, 1, …, of a of `size` heads and b drawn from them, by counting."""
    total = math.comb(size, b)
    return [Fraction(math.comb(a, k) * math.comb(size - a, b - k), total) for k in range(min(a, b) + 1)]


def tail(laws, shared):
    """P(the numbers sum to `shared` or more), by going through every combination."""
    combinations = itertools.product(*(enumerate(law) for law in laws))
    return float(sum(math.prod(p for _, p in cells) for cells in combinations if sum(k for k, _ in cells) >= shared))


def test_numbers_made_by_hand(lists):
    result = compare_circuits(*lists, layers=4, heads=4)
    table = result.table().set_index("part")
    assert table.index.tolist() == [
        "value_fetcher", "position_transmitter", "position_detector", "structure_reader", "all places", "all heads",
    ]  # fmt: skip
    assert table[["one", "other", "shared"]].values.tolist() == [
        [4, 3, 2], [2, 3, 2], [2, 4, 1], [1, 2, 1], [8, 12, 7], [8, 11, 7],
    ]  # fmt: skip
    np.testing.assert_allclose(table["precision"], [2 / 3, 2 / 3, 1 / 4, 1 / 2, 7 / 12, 7 / 11])
    np.testing.assert_allclose(table["recall"], [1 / 2, 1, 1 / 2, 1, 7 / 8, 7 / 8])
    np.testing.assert_allclose(table["jaccard"], [2 / 5, 2 / 3, 1 / 5, 1 / 2, 7 / 13, 7 / 12])
    np.testing.assert_allclose(table["chance"], [12 / 16, 6 / 16, 8 / 16, 2 / 16, (30 + 8 + 2) / 16, 88 / 16])
    places = tail([exact(16, 5, 6), exact(16, 2, 4), exact(16, 1, 2)], 7)  # last token, last and first mention
    p = [76 / 560, 14 / 560, 819 / 1820, 2 / 16, places, 616 / 4368]
    np.testing.assert_allclose(table["p"], p)
    # sorted: 0.025·4/1, then 0.125·4/2 above 0.1357·4/3, which it may not exceed; 0.45·4/4
    np.testing.assert_allclose(table["p_adjusted"], [p[0] * 4 / 3, p[1] * 4, p[2], p[0] * 4 / 3, *p[4:]])
    fetcher = table.loc["value_fetcher"]  # layer 2: 2 and 1 of 4 heads, layer 3: 2 and 2
    assert fetcher["chance_in_layers"] == pytest.approx((2 * 1 + 2 * 2) / 4)
    assert fetcher["p_in_layers"] == pytest.approx(1 / 2 * 1 / 6 + 1 / 2 * 5 / 6)


def test_where_heads_went(lists):
    result = compare_circuits(*lists, layers=4, heads=4)
    matrix = result.matrix().set_index(["group", "other_group"])
    assert len(matrix) == 16
    cell = matrix.loc[("value_fetcher", "position_transmitter")]
    assert cell[["one", "other", "shared", "share"]].tolist() == [4, 3, 2, 0.5]
    assert cell["p"] == pytest.approx(76 / 560)
    p = np.sort(matrix["p"])
    adjusted = [min(p[i:] * 16 / np.arange(i + 1, 17)) for i in range(16)]
    np.testing.assert_allclose(np.sort(matrix["p_adjusted"]), adjusted)
    assert result.only("one") == {"value_fetcher": ["2.0", "3.3"], "position_detector": ["1.2"]}
    assert result.only("other") == {
        "value_fetcher": ["3.0"], "position_transmitter": ["3.3"], "position_detector": ["0.0", "0.3", "1.3"],
        "structure_reader": ["0.1"],
    }  # fmt: skip
    assert result.moved() == {("value_fetcher", "position_transmitter"): ["3.3"]}  # 2.0 was a transmitter already
    assert "from value_fetcher in one to position_transmitter in other: 3.3" in result.summary()
    heads = result.to_frame()
    assert len(heads) == 5 + 3 + 5 + 2
    assert heads["found_in"].value_counts().to_dict() == {"both": 6, "one": 3, "other": 6}
    assert heads.query("layer == 0 and group == 'structure_reader'")["position_one"].tolist() == ["label:first"] * 2
    with pytest.raises(InputError, match=r"no circuit 'third'.*'one' and 'other'"):
        result.only("third")


def test_small_p_are_exact():
    """27 shared of 40 and 68 among 1024: the sum of a tail of 1e-24, by counting in whole numbers."""
    heads = [(n // 32, n % 32) for n in range(100)]
    one = Circuit({"fetcher": Group(-1, tuple(heads[:40]))}, BIG)
    other = Circuit({"fetcher": Group(-1, tuple(heads[13:81]))}, BIG)
    row = compare_circuits(one, other).table().iloc[0]
    assert (row["one"], row["other"], row["shared"]) == (40, 68, 27)
    assert row["p"] == pytest.approx(float(sum(exact(1024, 40, 68)[27:])), rel=1e-9)
    assert row["p"] < 1e-20


def test_the_middle_of_chance_is_exact():
    heads = [(n // 8, n % 8) for n in range(64)]
    row = compare_circuits(circuit(reader=heads[:30]), circuit(reader=heads[20:45])).table().iloc[0]
    below = np.cumsum([float(p) for p in exact(64, 30, 25)])
    assert (row["chance_low"], row["chance_high"]) == (np.argmax(below >= 0.025), np.argmax(below >= 0.975))


def test_sides_exchanged():
    rng = np.random.default_rng(0)
    sizes, positions = (6, 9, 4), (-1, "label:last", "label:first")
    one, other = (random_circuit(rng, sizes, positions, name=name) for name in ("a", "b"))
    there, back = compare_circuits(one, other), compare_circuits(other, one)
    assert (there.one, there.other, back.one) == ("a", "b", "b")
    a, b = there.table(), back.table()
    assert a["shared"].sum() > 0
    np.testing.assert_allclose(a["precision"], b["recall"])
    np.testing.assert_allclose(a[["jaccard", "chance", "chance_high", "p", "p_in_layers", "p_adjusted"]],
                               b[["jaccard", "chance", "chance_high", "p", "p_in_layers", "p_adjusted"]])  # fmt: skip
    crossed = back.matrix().rename(columns={"group": "other_group", "other_group": "group"})
    both = there.matrix().merge(crossed, on=["group", "other_group"])
    assert (both["shared_x"] == both["shared_y"]).all()
    assert there.only("a") == back.only("a")


def test_a_circuit_with_itself():
    one = random_circuit(np.random.default_rng(1), (6, 9), (-1, "label:last"))
    result = compare_circuits(one, one)
    table = result.table()
    assert (table[["precision", "recall", "jaccard"]] == 1).to_numpy().all()
    assert (table["shared"] == table["one"]).all()
    np.testing.assert_allclose(table["p"][:2], [1 / math.comb(64, 6), 1 / math.comb(64, 9)])
    assert table["p"][2] == pytest.approx(1 / math.comb(64, 6) / math.comb(64, 9))  # places: both at once
    assert result.moved() == result.only("one") == {}


def test_circuits_that_share_nothing():
    one, other = circuit(reader=[(0, 0), (1, 0)]), circuit(reader=[(0, 1), (1, 1)])
    table = compare_circuits(one, other).table()
    assert (table[["shared", "precision", "recall", "jaccard"]] == 0).to_numpy().all()
    assert (table[["p", "p_in_layers"]] == 1).to_numpy().all()


@pytest.mark.parametrize("in_layers", [False, True])
def test_chance_is_what_drawing_gives(in_layers):
    """Groups at three positions are drawn again, from all heads or within their layers; one exceeds chance."""
    rng = np.random.default_rng(2)
    layers, heads, draws = 4, 8, 20_000
    sizes, positions = (7, 5, 6), (-1, "label:last", "label:last")
    one, other = (random_circuit(rng, sizes, positions, layers, heads) for _ in range(2))
    shared = one.groups["group_0"].heads[:5] + other.groups["group_0"].heads[:2]
    other = Circuit(dict(other.groups) | {"group_0": Group(-1, tuple(dict.fromkeys(shared)))}, other.model)
    table = compare_circuits(one, other).table()

    def drawn(members):
        held = np.zeros((layers, heads), bool)
        held[tuple(np.transpose(members))] = True
        order = rng.random((draws, layers, heads) if in_layers else (draws, layers * heads)).argsort(-1)
        again = np.take_along_axis(np.broadcast_to(held if in_layers else held.ravel(), order.shape), order, -1)
        return again.reshape(draws, layers, heads), held

    def members(circuit, position):
        return [h for group in circuit.groups.values() if group.position == position for h in group.heads]

    counts = {}
    for name, group in other.groups.items():
        again, _ = drawn(group.heads)
        _, held = drawn(one.groups[name].heads)
        counts[name] = (again & held).sum((1, 2))
    counts["all places"] = sum(
        (drawn(members(other, at))[0] & drawn(members(one, at))[1]).sum((1, 2)) for at in ("label:last", -1)
    )
    counts["all heads"] = (drawn([*other.heads])[0] & drawn([*one.heads])[1]).sum((1, 2))
    ending = "_in_layers" if in_layers else ""
    assert table["p"].min() < 0.02
    for row in table.to_dict("records"):
        found = counts[row["part"]]
        assert row["chance" + ending] == pytest.approx(found.mean(), abs=5 * found.std() / draws**0.5)
        p = (found >= row["shared"]).mean()
        assert row["p" + ending] == pytest.approx(p, abs=5 * (p * (1 - p) / draws) ** 0.5 + 1e-9)
        for end, q in (("low", 0.025), ("high", 0.975)):
            ends = row[f"chance_{end}{ending}"]
            assert (found < ends).mean() - 0.005 <= q <= (found <= ends).mean() + 0.005


def test_groups_of_one_circuit_alone_stay_in_the_table():
    one = circuit(name="base", reader=[(2, 0), (2, 1), (2, 2)], mover=[(1, 0)])
    other = circuit(name="tuned", reader=[(2, 0), (2, 1)], detector=[(0, 1), (1, 0)])
    result = compare_circuits(one, other)
    table = result.table().set_index("part")
    assert table.index[:3].tolist() == ["reader", "mover", "detector"]
    assert table.loc[["mover", "detector"], ["one", "other"]].values.tolist() == [[1, 0], [0, 2]]
    assert (
        table.loc[["mover", "detector"], ["precision", "recall", "jaccard", "chance", "p", "p_adjusted"]]
        .isna()
        .to_numpy()
        .all()
    )
    assert table.loc["reader", "p_adjusted"] == table.loc["reader", "p"]  # the only test of its family
    assert len(result.matrix()) == 4  # of two groups each
    assert result.moved() == {("mover", "detector"): ["1.0"]}
    assert "mover: a group of base alone, of size 1" in result.summary()
    assert "detector: a group of tuned alone, of size 2" in result.summary()


def test_other_positions_share_no_place():
    one = Circuit({"reader": Group(-1, ((0, 1), (1, 1)))}, {"layers": 4, "heads": 4})
    other = Circuit({"reader": Group("label:last", ((0, 1), (1, 1)))}, {"layers": 4, "heads": 4})
    result = compare_circuits(one, other)
    table = result.table().set_index("part")
    assert table["shared"].tolist() == [2, 0, 2]
    assert table.loc["all places", ["chance", "p"]].tolist() == [0, 1]
    assert "reader acts at -1 in one and at label:last in other" in result.summary()


def test_without_layers_and_heads_there_is_no_chance(lists):
    result = compare_circuits(*lists)
    known = compare_circuits(*lists, layers=4, heads=4)
    columns = ["one", "other", "shared", "precision", "recall", "jaccard"]
    assert result.table()[columns].equals(known.table()[columns])
    assert result.table().filter(regex="chance|^p$|p_").isna().to_numpy().all()
    assert result.matrix().filter(regex="chance|^p$|p_").isna().to_numpy().all()
    assert "no chance to compare with" in result.summary()
    assert "--layer-count" in result.summary()
    assert "no chance" not in known.summary()
    assert "nan" not in result.summary()


def test_the_model_of_one_file_is_enough():
    named, silent = circuit(reader=[(0, 0)]), Circuit({"reader": Group(-1, ((0, 0),))})
    assert compare_circuits(silent, named).table()["p"][0] == pytest.approx(1 / 64)
    with pytest.raises(InputError, match=r"head 8\.0, and the model has layers 0 to 7"):
        compare_circuits(named, Circuit({"reader": Group(-1, ((8, 0),))}))


def test_bad_input(lists, tmp_path):
    one, other = lists
    with pytest.raises(InputError, match=r"'value_fetcher of one' has head 3\.3, and the model has .* heads 0 to 2"):
        compare_circuits(one, other, layers=4, heads=3)
    with pytest.raises(InputError, match="no such circuit"):
        compare_circuits(one, tmp_path / "absent.json")
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(ONE | {"pos_detector": []}))
    with pytest.raises(InputError, match=r"empty\.json: group 'pos_detector': .* found none"):
        compare_circuits(one, empty)
    with pytest.raises(InputError, match="layers 4, heads None"):
        compare_circuits(one, other, layers=4)
    with pytest.raises(InputError, match="layers 0, heads 4"):
        compare_circuits(one, other, layers=0, heads=4)
    with pytest.raises(InputError, match="a: 8 × 8, b: 8 × 4"):
        compare_circuits(circuit(name="a", reader=[(0, 0)]), circuit(name="b", heads=4, reader=[(0, 0)]))
    with pytest.raises(InputError, match="as given: 9 × 8"):
        compare_circuits(circuit(reader=[(0, 0)]), circuit(reader=[(0, 0)]), layers=9, heads=8)


def test_names_tell_the_circuits_apart(lists, tmp_path, monkeypatch):
    assert [compare_circuits(*lists).one, compare_circuits(*lists).other] == ["one", "other"]
    paths = [tmp_path / folder / "circuit.json" for folder in ("before", "after")]
    for path, name in zip(paths, ("base", "tuned"), strict=True):
        path.parent.mkdir()
        circuit(reader=[(0, 0)], name=name).save(path)
    result = compare_circuits(*paths)
    assert (result.one, result.other) == ("base", "tuned")  # the models'
    paths[0].with_stem("first").write_text(paths[0].read_text())
    assert compare_circuits(paths[0].with_stem("first"), paths[1]).one == "base"
    for path in paths:
        circuit(reader=[(0, 0)], name="base").save(path)
    result = compare_circuits(*map(str, paths))
    assert (result.one, result.other) == ("before", "after")  # the folders'
    monkeypatch.chdir(paths[0].parent)
    assert compare_circuits("circuit.json", "../after/circuit.json").one == "before"
    loaded = (circuit(reader=[(0, 0)], name=f"zoo/boxes/{name}/model.safetensors") for name in ("base", "lora/r8"))
    result = compare_circuits(*loaded)
    assert (result.one, result.other) == ("base", "lora/r8")
    result = compare_circuits(circuit(reader=[(0, 0)]), circuit(reader=[(0, 0)]))
    assert (result.one, result.other) == ("one", "other")


def test_saved_and_loaded(lists, tmp_path):
    result = compare_circuits(*lists, layers=4, heads=4)
    again = load(result.save(tmp_path / "overlap.nc"))
    assert type(again) is type(result)
    assert again.summary() == result.summary()
    assert again.table().equals(result.table())
    assert again.matrix().equals(result.matrix())
    headline = json.loads(json.dumps(result.headline(), allow_nan=False))
    assert headline["parts"][0]["shared"] == 2
    assert headline["moved"] == [{"from": "value_fetcher", "to": "position_transmitter", "heads": ["3.3"]}]
    record = again.provenance
    assert record["arguments"] == {"layers": 4, "heads": 4}
    assert record["analysis"] == "compare_circuits"
    assert record["inputs"]["other"]["groups"]["structure_reader"] == [[0, 0], [0, 1]]
