"""A circuit that was planted is found, exactly; its file says all that is needed to use it again."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from planted_circuit import INDUCTION, PREVIOUS, planted_model

import finetune_lens as fl
from finetune_lens import zoo
from finetune_lens.circuits import Circuit, Group, Step, circuit_of, find_circuit, trace_paths
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.prompts import read_prompts
from finetune_lens.results.paths import Paths
from finetune_lens.tasks import boxes

STEPS = ("induction=logits", "previous=k:induction@told:first")


@pytest.fixture(scope="module")
def planted():
    return planted_model()


@pytest.fixture(scope="module")
def model(planted):
    return HookedModel(planted.model, planted.tokenizer)


def found(model, planted, **options):
    return find_circuit(model, planted.prompts, **{"procedure": STEPS, "progress": False} | options)


@pytest.mark.parametrize("preset", ["prakash2024", "wang2022", "goldowsky-dill2023"])
def test_the_planted_circuit_is_found(model, planted, preset):
    result = found(model, planted, preset=preset)
    circuit = circuit_of(result)
    assert {name: set(group.heads) for name, group in circuit.groups.items()} == {
        "induction": set(INDUCTION), "previous": set(PREVIOUS),
    }  # fmt: skip
    assert [group.position for group in circuit.groups.values()] == [-1, "told:first"]
    frame = result.to_frame()
    idle = frame[~frame["chosen"]]
    assert idle["effect"].abs().max() < 1e-4 * frame["effect"].abs().max()
    assert result.chosen() == {("induction", *h) for h in INDUCTION} | {("previous", *h) for h in PREVIOUS}
    assert "2 induction, 2 previous" in result.summary()


def test_as_many_heads_as_asked(model, planted):
    circuit = circuit_of(found(model, planted, heads={"induction": 3, "previous": 1}))
    assert [len(group.heads) for group in circuit.groups.values()] == [3, 1]
    assert set(INDUCTION) < set(circuit.groups["induction"].heads)
    assert list(circuit.groups["previous"].scores) == sorted(circuit.groups["previous"].scores)


def test_the_short_way_finds_what_the_long_way_finds(model, planted):
    short, long = found(model, planted), found(model, planted, method="full")
    np.testing.assert_allclose(short.values().values, long.values().values, atol=1e-5)
    assert circuit_of(short).groups.keys() == circuit_of(long).groups.keys()


def test_a_procedure_goes_on_without_what_is_not_there(model, planted):
    steps = [Step("induction", "logits"), Step("nobody", "v", "induction", 0), Step("before", "q", "nobody"), STEPS[1]]
    result = found(model, planted, procedure=steps)
    assert {*circuit_of(result).groups} == {"induction", "previous"}
    notes = result.provenance["notes"]
    assert notes == [
        "nobody has no heads: no path to v of induction at 0 lowers the metric",
        "before was not looked for: nobody has no heads",
    ]


def test_nothing_is_found_where_nothing_is(model, planted):
    prompts = [p | {"corrupt": p["prompt"]} for p in planted.prompts]
    result = find_circuit(model, prompts, procedure=STEPS, progress=False, attribution=False)
    assert result.circuit is None
    with pytest.raises(InputError, match="no circuit was found: induction has no heads"):
        circuit_of(result)


def test_a_head_of_two_groups_at_one_position_stays_in_the_later():
    prompts = boxes.draw(16, np.random.default_rng(0), counterfactual="random")
    steps = ["all=logits", "again=q:all", "elsewhere=k:all@label:first+2"]
    counts = {"all": 9, "again": 1, "elsewhere": 1}
    model = zoo.path("boxes") / "base"
    circuit = circuit_of(find_circuit(model, prompts, procedure=steps, heads=counts, progress=False))
    assert circuit.groups["again"].heads == ((0, 0),)
    assert circuit.groups["elsewhere"].heads == ((0, 0),)
    assert (0, 0) not in circuit.groups["all"].heads


def test_relative_probability_and_agreement(model, planted):
    result = found(model, planted)
    expected = result.data["prob"].sel(group="induction").values / result.data["recipient_prob"].values[:, None, None]
    np.testing.assert_allclose(result.values().sel(group="induction").values, expected)
    assert [*result.agreement()["group"]] == ["induction", "previous"]
    assert result.agreement().set_index("group").loc["induction", "rank_correlation"] > 0.5
    with pytest.raises(InputError, match="were not estimated"):
        found(model, planted, attribution=False).agreement()


def test_paths_of_a_pair(tmp_path):
    folder = zoo.path("boxes")
    prompts = boxes.draw(24, np.random.default_rng(0), counterfactual="random")
    pair = fl.ModelPair.load(folder / "base", folder / "lora")
    both = trace_paths(pair, prompts, progress=False)
    alone = trace_paths(folder / "base", prompts, progress=False)
    np.testing.assert_allclose(both.values().sel(model="base"), alone.values().sel(model="model"), atol=1e-6)
    changed = both.differences()
    np.testing.assert_allclose(changed["tuned"] - changed["base"], changed["difference"], atol=1e-6)
    again = fl.load(both.save(tmp_path / "paths.nc"))
    assert isinstance(again, Paths)
    assert again.summary() == both.summary()
    with pytest.raises(InputError, match="one was run"):
        alone.differences()


def test_positions_are_each_examples_own(model, planted):
    """`told:first` is where the answer stands first, the token after it is one on, and a number is for all."""
    some, options = planted.prompts[:6], {"receivers": ("k", INDUCTION), "progress": False}
    whole = trace_paths(model, some, position="told:first", **options).values("logprob").values[0, 0]
    after = trace_paths(model, some, position="told:first+1", **options).values("logprob").values[0, 0]
    for number, prompt in enumerate(some):
        column = prompt["prompt"].index(prompt["told"])
        for position, together in ((column, whole), (column + 1, after)):
            one = trace_paths(model, [prompt], position=position, **options).values("logprob").values[0, 0]
            np.testing.assert_allclose(one[..., 0], together[..., number], atol=1e-4)
    assert np.abs(whole).max() > 1
    every = trace_paths(model, some, position="told:first", sender_position="all", **options).values("logprob")
    np.testing.assert_allclose(every.values[0, 0], whole, atol=1e-4)
    assert np.abs(after).max() < 0.1


def test_circuits_round_trip(tmp_path, model, planted):
    circuit = circuit_of(found(model, planted))
    assert Circuit.load(circuit.save(tmp_path / "c.json")).groups.keys() == circuit.groups.keys()
    again = Circuit.load(tmp_path / "c.json")
    assert again.model == circuit.model
    assert again.task == circuit.task
    assert again.groups["induction"].heads == circuit.groups["induction"].heads
    np.testing.assert_allclose(again.groups["induction"].scores, circuit.groups["induction"].scores, atol=1e-6)
    assert again.sets()["previous"][0].endswith("@told:first")
    smaller = again.without([("induction", INDUCTION[0]), ("previous", PREVIOUS[0]), ("previous", PREVIOUS[1])])
    assert smaller.places == {(-1, *INDUCTION[1])}
    assert again.without([(name, head) for name, group in again.groups.items() for head in group.heads]) is None


def test_published_lists_are_read(tmp_path):
    file = tmp_path / "llama.json"
    file.write_text('{"struct_reader": [[8, 21]], "value_fetcher": [[15, 13], [21, 3]], "mine": [[0, 1]]}')
    circuit = Circuit.load(file)
    assert {name: (group.position, group.heads) for name, group in circuit.groups.items()} == {
        "structure_reader": ("label:first", ((8, 21),)), "value_fetcher": (-1, ((15, 13), (21, 3))),
        "mine": (-1, ((0, 1),)),
    }  # fmt: skip
    assert circuit.model == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not a circuit"),
        ("{}", "one group or more"),
        ("{nonsense", r"is not a circuit \(JSON\)"),
        ('{"a": []}', "group 'a': a group has one head or more"),
        ('{"a": [[1, 2], [1, 2]]}', "head 1.2 is twice"),
        ('{"a": [[1, -2]]}', "pairs of numbers from 0 on"),
        ('{"a": [[1, 2, 3]]}', "pairs of numbers from 0 on"),
        ('{"groups": {"a": {"heads": [[1, 2]]}}}', "position"),
        ('{"groups": {"a": {"position": true, "heads": [[1, 2]]}}}', "a position is a number or a mention"),
        ('{"groups": {"a": {"position": -1, "heads": [[1, 2]], "scores": [1, 2]}}}', "2 scores of 1 heads"),
        ('{"model": {"layers": 1, "heads": 4}, "groups": {"a": {"position": -1, "heads": [[1, 2]]}}}',
         "has head 1.2, and the circuit's own model has layers 0 to 0"),
    ],
)  # fmt: skip
def test_files_that_are_no_circuits(tmp_path, text, message):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        Circuit.load(file)


def test_a_circuit_is_of_its_model(library):
    one = HookedModel(library.model("gpt2"), name="one", fingerprint="a" * 64)
    circuit = Circuit({"a": Group(-1, ((1, 0),))}, {"model": "two", "files_sha256": "b" * 64})
    with pytest.raises(
        InputError, match=r"found in two \(bbbbbbbbbbbb…\), not in one \(aaaaaaaaaaaa…\); .*\(--force\)"
    ):
        circuit.require(one)
    circuit.require(one, force=True)
    circuit.require(one, HookedModel(library.model("gpt2"), name="two", fingerprint="b" * 64))
    with pytest.raises(InputError, match=r"group 'a' has head 1.9, and one has layers 0 to 1 of heads 0 to 3"):
        Circuit({"a": Group(-1, ((1, 9),))}).require(one, force=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"procedure": "no"}, "procedure 'no' is unknown"),
        ({"procedure": []}, "one step or more"),
        ({"procedure": ["a=q"]}, "'a=q' is no step"),
        ({"procedure": ["a=logits:b"]}, "is no step"),
        ({"procedure": ["a=logits", "a=q:a"]}, "two steps are called 'a'"),
        ({"procedure": ["a=logits", "b=q:c"]}, "leads to 'c', which no step before it finds"),
        ({"procedure": ["a=logits", "b=k:a@told:5"]}, r"position 'told:5' does not exist: 'told' is mentioned 1 ×"),
        ({"procedure": ["a=logits", "b=k:a@nowhere:first"]}, "expected a field 'nowhere' holding a part of its text"),
        ({"procedure": ["a=logits", "b=k:a@99"]}, "position 99 does not exist"),
        ({"procedure": ["a=logits", "b=k:a@told:first+20"]}, "lies outside the prompt, which has 10 tokens"),
        ({"procedure": ["a=logits", "b=k:a@told:"]}, "is no position; expected a number such as -1"),
        ({"heads": 99}, "has 12 heads; cannot take 99"),
        ({"heads": {"b": 1}}, "there is no step 'b'"),
        ({"preset": "mine"}, "preset 'mine' is unknown"),
        ({"freeze": ["attn"]}, "'attn' cannot be frozen"),
        ({"metric": "nice"}, "metric 'nice' is unknown"),
        ({"method": "fast"}, "method is exact or full"),
    ],
)
def test_bad_input(model, planted, options, message):
    with pytest.raises(InputError, match=message):
        found(model, planted, **options)


@pytest.mark.parametrize(
    ("receivers", "message"),
    [("q", "receivers are logits, or q, k or v"), ("q:5", "such as q:2.0"), ("q:9.0", "layers 0 to 2 of heads 0 to 3")],
)
def test_bad_receivers(model, planted, receivers, message):
    with pytest.raises(InputError, match=message):
        trace_paths(model, planted.prompts, receivers=receivers, progress=False)


def test_a_wrong_answer_is_needed_for_a_logit_difference(model, planted):
    prompts = [{k: v for k, v in p.items() if k != "wrong"} for p in planted.prompts]
    with pytest.raises(InputError, match="the logit difference needs a wrong answer"):
        find_circuit(model, prompts, procedure=STEPS, preset="wang2022", progress=False)
    assert circuit_of(find_circuit(model, prompts, procedure=STEPS, progress=False)).heads == {*INDUCTION, *PREVIOUS}


def command(*words, cwd):
    words = [sys.executable, "-m", "finetune_lens.circuits", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_the_commands(tmp_path):
    """find → evaluate → compare → dcm, each with the file of the one before."""
    folder = zoo.path("boxes")
    rows = boxes.draw(40, np.random.default_rng(0), counterfactual="random")
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = ("object", "label", "position")
    drawn = [boxes.draw(16, np.random.default_rng(n), counterfactual=kind) for n, kind in enumerate(kinds)]
    (tmp_path / "desiderata.jsonl").write_text(
        "".join(json.dumps(row | {"id": f"{row['counterfactual']}-{row['id']}"}) + "\n" for one in drawn for row in one)
    )
    for arm in ("base", "control"):
        ran = command("find", folder / arm, "boxes.jsonl", "--out", arm, "--json", "--no-attribution", cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["file"] == f"{arm}/circuit.json"
    assert (tmp_path / "base/figures/paths-heads.pdf").exists()
    again = command("find", folder / "base", "boxes.jsonl", "--out", "base", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists and would be overwritten" in again.stderr
    circuit = Circuit.load(tmp_path / "base/circuit.json")
    assert {(1, 0), (1, 1), (1, 2)} <= {*circuit.groups["value_fetcher"].heads}
    base, control = "base/circuit.json", "control/circuit.json"
    quick = ("--random", "10", "--subsets", "3", "--no-minimality", "--quiet")
    ran = command("evaluate", base, folder / "base", folder / "control", "boxes.jsonl", "--beside", control, *quick,
                  cwd=tmp_path)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "faithfulness" in ran.stdout
    ran = command("evaluate", base, folder / "lora", folder / "tuned", "boxes.jsonl", *quick, cwd=tmp_path)
    assert ran.returncode == 2
    ran = command("evaluate", base, folder / "tuned", folder / "control", "boxes.jsonl", *quick, cwd=tmp_path)
    assert ran.returncode == 2
    assert "--force" in ran.stderr
    ran = command("compare", base, control, "--json", "--quiet", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    ran = command("dcm", folder / "base", base, "desiderata.jsonl", "--batch-size", "2", "--quiet", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    ran = command("paths", folder / "base", folder / "lora", "boxes.jsonl", "--quiet", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    ran = command("edges", folder / "base", "boxes.jsonl", "--quiet", "--limit", "8", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_sets_at_each_examples_own_position(model, planted):
    """Patching a circuit's groups, each example at its own place, is patching it alone."""
    circuit = Circuit({"previous": Group("told:first", PREVIOUS)})
    together = fl.patch(model, planted.prompts[:5], sets=circuit.sets(), direction="noising", progress=False)
    for number, prompt in enumerate(planted.prompts[:5]):
        column = prompt["prompt"].index(prompt["told"])
        places = [f"blocks.{layer}.attn.hook_z[{head}]@{column}" for layer, head in PREVIOUS]
        alone = fl.patch(model, [prompt], sets={"one": places}, direction="noising", progress=False)
        np.testing.assert_allclose(alone.data.logit_diff.values.ravel(), together.data.logit_diff.values[0, 0, number],
                                   atol=1e-4)  # fmt: skip
    estimate = fl.patch(
        model, planted.prompts[:5], sets=circuit.sets(), direction="noising", method="attribution", progress=False
    )
    one = fl.patch(model, planted.prompts[:1], sets=circuit.sets(), direction="noising", method="attribution",
                   progress=False)  # fmt: skip
    np.testing.assert_allclose(
        estimate.data.logit_diff.values[0, 0, 0], one.data.logit_diff.values.ravel()[0], rtol=1e-3
    )


def test_the_planted_prompts_are_answered(model, planted):
    items = read_prompts(planted.prompts)
    assert len(items) == 60
    with torch.no_grad():
        ids = torch.tensor([planted.tokenizer(p.prompt)["input_ids"] for p in items])
        said = planted.model(input_ids=ids).logits[:, -1].argmax(-1)
    assert [planted.tokenizer.decode([i]) for i in said.tolist()] == [p.answer[0] for p in items]
