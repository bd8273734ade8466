"""Prompts in a chat template: the oracle is the same text rendered by hand, and the prompt's own tokens in it."""

import functools
import json
import sys

import numpy as np
import pytest
import torch
from test_check import tuned_copy
from test_patching import letters
from test_similarity import naive_cka

import finetune_lens as fl
from finetune_lens.circuits import Circuit, Group, attribute_edges, evaluate_circuit, learn_masks, trace_paths
from finetune_lens.circuits.paths import find_circuit
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.patching import patch, trace
from finetune_lens.probing import fits
from finetune_lens.report import course

# Around the text stand letters that texts have too; the first token is what the tokenizer puts before a bare text.
TEMPLATE = (
    "{% for m in messages %}<pad>user{{ m['content'] }}<pad>{% endfor %}{% if add_generation_prompt %}use={% endif %}"
)
FRONT, BACK = 5, 5  # tokens before and after the text
WORDS = ["gusto", "musky", "upset", "house", "burst", "quest", "rouse", "douse", "mouse", "purse", "nurse", "abuse"]
QUIET = {"progress": False}


def framed():
    """A letter a token, `<pad>` before a bare text; with a chat template."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", tokenizer.pad_token_id)]
    )
    return tokenizer


def rendered(text):
    message = [{"role": "user", "content": text}]
    return framed().apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def rows(words=WORDS):
    """`mark` is a letter of the word that stands in the template too; the counterfactual has another third letter."""
    return [
        {"prompt": w, "corrupt": f"{w[:2]}{'abcd'[n % 4]}{w[3:]}", "answer": w[0], "wrong": "z", "mark": "u",
         "label": n % 2, "corrupt_answer": "y", "counterfactual": "third", "corrupt_mark": "u"}
        for n, w in enumerate(words)
    ]  # fmt: skip


def by_hand(given=None):
    return [r | {"prompt": rendered(r["prompt"]), "corrupt": rendered(r["corrupt"])} for r in given or rows()]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(library, family):
    return HookedModel(library.model(family), framed(), name=family, fingerprint="f" * 64)


@pytest.fixture(scope="module")
def plain(library, family):
    """The same model with a tokenizer that adds nothing to the rendered texts."""
    return HookedModel(library.model(family), letters(), name=family)


@pytest.fixture(scope="module")
def folders(library, family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"tuned-{family}")
    tuned_copy(library.model(family)).save_pretrained(folder)
    return library.saved(family), folder


def pair_of(folders, tokenizer=None):
    return fl.ModelPair.load(*folders, tokenizer=tokenizer or framed())


def hidden(module, text):
    """(depth, pos, d) of the rendered text, the last norm's output left out."""
    with torch.no_grad():
        ids = torch.tensor([letters()(rendered(text))["input_ids"]])
        return torch.stack(module(ids, output_hidden_states=True).hidden_states[:-1])[:, 0].double().numpy()


# Activations against plain forward passes


READ = {
    "last": lambda w: [FRONT + len(w) + BACK - 1],
    "-6": lambda w: [FRONT + len(w) - 1],
    1: lambda w: [FRONT + 1],
    "mean": lambda w: range(FRONT, FRONT + len(w)),
    "mean:2": lambda w: range(FRONT + len(w) - 2, FRONT + len(w)),
    "mark:first": lambda w: [FRONT + w.index("u")],
    "mark:last": lambda w: [FRONT + w.rindex("u")],
}


@pytest.mark.parametrize("position", READ)
def test_probes_read_the_texts_own_tokens(library, family, folders, position, monkeypatch):
    seen, real = [], fits.fit_all
    monkeypatch.setattr(fits, "fit_all", lambda sides, *rest, **more: seen.append(sides) or real(sides, *rest, **more))
    options = {"position": position, "seeds": 1, "template": "each", "check": False}
    found = fl.probe(pair_of(folders), rows(), **options, **QUIET)
    for side, module in zip(seen[0], (library.model(family), tuned_copy(library.model(family))), strict=True):
        for depth, site in enumerate(("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post")):
            expected = [hidden(module, w)[depth][list(READ[position](w))].mean(0) for w in WORDS]
            np.testing.assert_allclose(side.values(site), expected, atol=2e-4)
    assert found.provenance["arguments"]["template"] == "each"


def test_a_control_task_is_never_of_the_templates_tokens(folders):
    """At the end stands one token in every prompt: types are texts there, and tokens where the text's vary."""
    words = [a + b for a in "abcdefghijkl" for b in "xy"]
    given = [{"prompt": w, "label": n % 2} for n, w in enumerate(words)]
    for position, what in (("last", "text"), (0, "token at the position")):
        found = fl.probe(pair_of(folders), given, position=position, template="each", seeds=1, check=False, **QUIET)
        assert found.data.attrs["control"] == what


@pytest.mark.parametrize("pool", ["mean", "each"])
def test_representations_are_of_the_texts_own_tokens(library, family, folders, pool):
    found = fl.compare_representations(
        pair_of(folders), rows(), pool=pool, template="each", lens=False, check=False, **QUIET
    )
    sides = []
    for module in (library.model(family), tuned_copy(library.model(family))):
        own = [hidden(module, w)[:, FRONT : FRONT + len(w)] for w in WORDS]
        sides.append(np.concatenate([x.mean(1, keepdims=True) if pool == "mean" else x for x in own], 1))
    assert found.data.attrs["rows"] == sides[0].shape[1]
    for depth in range(2):
        x, y = (side[depth] for side in sides)
        values = found.data.value.sel(depth=depth)
        assert float(values.sel(measure="cka")) == pytest.approx(naive_cka(x, y)[0], abs=1e-5)
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert float(values.sel(measure="cosine")) == pytest.approx(cosine.mean(), abs=1e-5)
    assert found.provenance["arguments"]["template"] == "each"


def test_directions_are_at_the_texts_own_tokens(folders):
    options = {"check": False, "metric": "logprob", "depth": 1} | QUIET
    for position, there in ((1, FRONT + 1), ("last", "last"), ("mean:1", FRONT + 4)):
        found = fl.find_directions(pair_of(folders), rows(), position=position, template="each", **options).data
        whole = fl.find_directions(pair_of(folders, letters()), by_hand(), position=there, **options).data
        np.testing.assert_allclose(found.direction, whole.direction, atol=2e-4)
        np.testing.assert_allclose(found.projection, whole.projection, atol=2e-4)


# What is patched, against the rendered prompts


def same(one, other, tolerance=1e-4):
    """Every number of two results."""
    assert {*one.data.data_vars} == {*other.data.data_vars}
    for name, values in one.data.items():
        if values.dtype.kind in "fi" and name != "position":
            np.testing.assert_allclose(values, other.data[name], atol=tolerance, err_msg=name)


def test_paths(model, plain):
    options = {"receivers": "v:1.0,1.2"} | QUIET
    for position, there in ((2, FRONT + 2), (-1, -1), ("all", "all")):
        found = trace_paths(model, rows(), position=position, template="each", **options)
        same(found, trace_paths(plain, by_hand(), position=there, **options))
    assert np.abs(trace_paths(model, rows(), position=2, template="each", **options).data.logprob).max() > 1e-4
    each = trace_paths(model, rows(), position="mark:first+1", template="each", receivers="v:1.0", **QUIET)
    for n, word in enumerate(WORDS[:4]):
        at = FRONT + word.index("u") + 1
        one = trace_paths(plain, by_hand()[n : n + 1], position=at, receivers="v:1.0", **QUIET)
        np.testing.assert_allclose(one.data.logprob[..., 0], each.data.logprob[..., n], atol=1e-4)
    assert each.provenance["arguments"]["template"] == "each"


def test_paths_of_a_pair(folders):
    found = trace_paths(pair_of(folders), rows(), template="each", check=False, **QUIET)
    same(found, trace_paths(pair_of(folders, letters()), by_hand(), check=False, **QUIET))


def test_finding_a_circuit(model, plain):
    options = {"heads": 2} | QUIET
    found = find_circuit(model, rows(), procedure=["end=logits", "third=v:end@2"], template="each", **options)
    whole = find_circuit(plain, by_hand(), procedure=["end=logits", f"third=v:end@{FRONT + 2}"], **options)
    same(found, whole)
    one, other = (json.loads(r.data.attrs["circuit"]) for r in (found, whole))
    assert one["groups"]["third"]["heads"] == other["groups"]["third"]["heads"]
    assert (one["task"]["template"], other["task"]["template"]) == ("each", "none")


def test_edges(model, plain):
    found = attribute_edges(model, rows(), template="each", position=2, **QUIET)
    same(found, attribute_edges(plain, by_hand(), position=FRONT + 2, **QUIET))
    assert float(np.nanmax(np.abs(found.data.score))) > 1e-3
    same(attribute_edges(model, rows(), template="each", **QUIET), attribute_edges(plain, by_hand(), **QUIET))


def circuit(position):
    return Circuit({"own": Group(position, ((0, 1), (1, 2))), "end": Group(-1, ((1, 0), (1, 3)))})


def test_evaluating_a_circuit(model, plain):
    options = {"random": 2, "subsets": 2, "metric": "logit_diff"} | QUIET
    found = evaluate_circuit(model, circuit(2), rows(), reference=rows()[:5], template="each", **options)
    whole = evaluate_circuit(plain, circuit(FRONT + 2), by_hand(), reference=by_hand()[:5], **options)
    same(found, whole)
    assert np.abs(found.data.full - found.data.alone).max() > 1e-3


def test_masks(model, plain):
    options = {"batch_size": 2, "epochs": 2} | QUIET
    found = learn_masks(model, circuit(2), rows(), template="each", **options)
    same(found, learn_masks(plain, circuit(FRONT + 2), by_hand(), **options))
    mark = learn_masks(model, circuit("mark:first"), rows(["gusto", "musky"] * 6), template="each", **options)
    same(mark, learn_masks(plain, circuit(FRONT + 1), by_hand(rows(["gusto", "musky"] * 6)), **options))


def test_patching(model, plain):
    options = {"by": ("layer", "position")} | QUIET
    found = patch(model, rows(), positions=[0, 2, -1], template="each", **options)
    same(found, patch(plain, by_hand(), positions=[FRONT, FRONT + 2, -1], **options))
    assert found.data.position.values.tolist() == [FRONT, FRONT + 2, -1]  # as in the grid of all positions
    same(patch(model, rows(), template="each", **options), patch(plain, by_hand(), **options))
    places = {"third": ["blocks.1.hook_resid_pre@{}"]}
    sets = [{name: [p.format(at) for p in some] for name, some in places.items()} for at in (2, FRONT + 2)]
    found = patch(model, rows(), sets=sets[0], template="each", **QUIET)
    same(found, patch(plain, by_hand(), sets=sets[1], **QUIET))


def test_tracing(model, plain):
    """Noise is on the text's own subject, not on the same letters of the template."""
    options = {"copies": 2, "metric": "kl", "site": "resid_pre", "layers": [0]} | QUIET
    given = [r | {"subject": r["prompt"][:2]} for r in rows()]
    same(trace(model, given, template="each", **options), trace(plain, by_hand(given), **options))
    given = [r | {"subject": "us"} for r in rows(["gusto", "musky", "abust", "rouse"])]
    effects = np.abs(trace(model, given, template="each", **options).data.kl.isel(direction=0, layer=0))
    for n, row in enumerate(given):
        own = FRONT + row["prompt"].index("us") + np.arange(2)
        assert (effects.isel(example=n, position=own) > 1e-6).all()
        assert np.delete(effects.isel(example=n).values, own).max() < 1e-6


# Positions that are not there


def test_a_mention_in_the_template_alone_is_none(model):
    given = [r | {"mark": "ser"} for r in rows(["gabto", "mabky"])]
    with pytest.raises(InputError, match="prompt 1: expected a field 'mark' holding a part of its text; found 'ser'"):
        trace_paths(model, given, position="mark:first", template="each", **QUIET)
    with pytest.raises(InputError, match="expected a field 'mark'"):
        trace(model, given, subject="mark", template="each", **QUIET)


@pytest.mark.parametrize("position", ["mark:first+4", "mark:first-2", 5])
def test_no_position_leads_into_the_template(model, folders, position):
    given = rows(["gusto", "musky"])
    says = r"prompt 1: position .* (lies outside|does not exist).* 5 tokens"
    with pytest.raises(InputError, match=says):
        trace_paths(model, given, position=position, template="each", **QUIET)
    with pytest.raises(InputError, match=says):
        fl.probe(pair_of(folders), rows(), position=position, template="each", check=False, **QUIET)


def test_a_counterfactual_with_a_shorter_text(model):
    """A column of the text's own in one and of the template in the other is no position of both."""
    given = [{"prompt": "gusto", "corrupt": "ab", "answer": "g"}, {"prompt": "ab", "corrupt": "de", "answer": "a"}]
    with pytest.raises(InputError, match="prompt 1: position 3 does not exist, it is shorter"):
        trace_paths(model, given[:1], position=3, align="left", template="each", **QUIET)
    with pytest.raises(InputError, match="position 1 counts from the start of the texts"):
        patch(model, given, positions=[1], align="right", template="each", metric="logprob", **QUIET)
    masked = [r | {"corrupt": r["corrupt"][:2]} for r in rows()]
    with pytest.raises(InputError, match="prompt 1: position 2 does not exist in its `corrupt` text"):
        learn_masks(model, circuit(2), masked, align="left", template="each", batch_size=2, **QUIET)


# What is kept, what is refused


def analyses():
    """Name → (a call that takes the subject and options, whether of a pair)."""
    end, few = Circuit({"end": Group(-1, ((0, 1), (1, 2)))}), rows()
    masks = {"batch_size": 2, "epochs": 1, "rate": 0.3}
    return {
        "trace_paths": (lambda m, **o: trace_paths(m, few, **o), False),
        "find_circuit": (lambda m, **o: find_circuit(m, few, procedure=["end=logits"], **o), False),
        "evaluate_circuit": (
            lambda m, **o: evaluate_circuit(m, end, few, random=1, subsets=1, metric="logprob", **o), False,
        ),
        "learn_masks": (lambda m, **o: learn_masks(m, end, few, **masks, **o), False),
        "attribute_edges": (
            lambda m, partial=None, **o: attribute_edges(m, few, **o), False,
        ),
        "patch": (lambda m, **o: patch(m, few, **o), False),
        "trace": (lambda m, **o: trace(m, few, subject="mark", copies=2, metric="kl", **o), False),
        "probe": (lambda p, **o: fl.probe(p, few, seeds=1, check=False, **o), True),
        "compare_representations": (lambda p, **o: fl.compare_representations(p, few, check=False, **o), True),
        "compare_attention": (lambda p, **o: fl.compare_attention(p, few, check=False, **o), True),
        "find_directions": (lambda p, **o: fl.find_directions(p, few, depth=1, check=False, **o), True),
    }  # fmt: skip


@pytest.mark.parametrize("name", analyses())
def test_another_template_starts_anew(library, family, folders, name, tmp_path):
    """Nothing that was kept of prompts in a template is taken for prompts without, where all columns are the same."""
    call, of_pair = analyses()[name]
    tokenizer = framed()
    tokenizer.chat_template = "={{ messages[0]['content'] }}"  # one token in front, as without
    hooked = HookedModel(library.model(family), tokenizer, name=family, fingerprint="f" * 64)
    subject = pair_of(folders, tokenizer) if of_pair else hooked
    fresh = {template: call(subject, template=template, **QUIET) for template in ("none", "each")}
    for template in ("none", "each", "none"):
        found = call(subject, template=template, partial=tmp_path, **QUIET)
        same(found, fresh[template], 1e-5)
        assert found.provenance["arguments"]["template"] == template
    one, other = (fresh[template].data for template in ("none", "each"))
    numbers = [n for n, v in one.items() if v.dtype.kind in "fi" and v.size]
    assert any(one[n].shape != other[n].shape or not np.allclose(one[n], other[n], equal_nan=True) for n in numbers)


@pytest.mark.parametrize("name", analyses())
def test_templates_that_are_refused(library, folders, name):
    call, of_pair = analyses()[name]
    bare = letters()
    subject = pair_of(folders, bare) if of_pair else HookedModel(library.model("llama"), bare)
    with pytest.raises(InputError, match="template is none or each, for all sides read the same tokens; found 'tuned'"):
        call(subject, template="tuned", **QUIET)
    with pytest.raises(InputError, match=r"^the tokenizer has no chat template; leave the template out"):
        call(subject, template="each", **QUIET)


# Commands and the report


def command(main, *words, code=0):
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", ["command", *map(str, words), "--quiet", "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == code


def test_the_commands(library, tmp_path, capsys):
    from finetune_lens.circuits.__main__ import main as circuits
    from finetune_lens.patching import main as patching
    from finetune_lens.probing.__main__ import main as probing
    from finetune_lens.representations import main as representations

    tuned_copy(library.model("llama")).save_pretrained(tmp_path / "tuned")
    framed().save_pretrained(tmp_path / "tokenizer")
    letters().save_pretrained(tmp_path / "bare")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(r | {"subject": r["mark"]}) for r in rows()))
    base, tuned = library.saved("llama"), tmp_path / "tuned"
    tokens, both = ("--tokenizer", tmp_path / "tokenizer", "--no-plots"), (base, tuned, prompts)
    calls = {
        "find": (circuits, "find", base, prompts, "--step", "end=logits", "--heads", "2"),
        "paths": (circuits, "paths", *both, "--unsafe"),
        "edges": (circuits, "edges", base, prompts),
        "evaluate": (circuits, "evaluate", tmp_path / "find/circuit.json", *both, "--unsafe", "--no-minimality",
                     "--random", "1", "--subsets", "1", "--force"),
        "dcm": (circuits, "dcm", base, tmp_path / "find/circuit.json", prompts, "--batch-size", "2", "--force"),
        "patching": (patching, base, prompts, "--noise", "3", "--copies", "2"),
        "probing": (probing, *both, "--unsafe", "--seeds", "1"),
        "representations": (representations, *both, "--unsafe"),
    }  # fmt: skip
    for name, (main, *words) in calls.items():
        command(main, *words, *tokens, "--template", "each", "--out", tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert '"template": "each"' in json.dumps(record), name
        capsys.readouterr()
        command(main, *words, *tokens, "--template", "tuned", "--out", tmp_path / "no", code=2)
        assert capsys.readouterr().err.startswith("error: template is none or each"), name
    assert not (tmp_path / "no").exists()


def report_steps(template, **given):
    folder = fl.zoo.path("strings")
    pair = fl.ModelPair.load(folder / "base", folder / "lora", tokenizer=strings_with_template())
    execution = {"device": "cpu", "dtype": "auto", "batch_size": None, "limit": 8, "progress": False}
    return course.Inputs(pair, "b", "t", template=template, execution=execution, **given)


def strings_with_template():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fl.zoo.path("strings") / "base")
    tokenizer.chat_template = "{{ messages[0]['content'] }}="
    return tokenizer


@pytest.mark.parametrize("template", ["none", "each"])
def test_the_report_hands_it_to_every_analysis(monkeypatch, template, tmp_path):
    handed = {}

    def noted(name):
        return lambda *args, **options: handed.setdefault(name, options.get("template"))

    names = {
        "compare_outputs": "outputs", "interpolate": "interpolation", "compare_representations": "representations",
        "patch": "patching-base", "cross_patch": "cmap", "examine_chains": "cot", "examine_bias": "bias",
        "look_inside_chains": "inside_chains",
    }  # fmt: skip
    for function, name in names.items():
        monkeypatch.setattr(fl, function, noted(name))
    folder = fl.zoo.path("strings")
    inputs = report_steps(template, prompts=folder / "prompts.jsonl", questions=tmp_path / "questions.jsonl")
    steps = {step.name: step for step in course.steps(inputs)}
    for name in names.values():
        steps[name].run(partial=None)
        assert ("--template each" in steps[name].command) == (template == "each"), name
    assert handed == dict.fromkeys(names.values(), template)
    handed.clear()
    monkeypatch.setattr(course, "own_texts", lambda *_, **__: [{"id": "tuned-1", "prompt": "x"}])
    steps = {step.name: step for step in course.steps(report_steps(template))}
    for name in ("interpolation", "representations"):
        steps[name].run(partial=None)
    assert {*handed.values()} == {"none"}  # what the models write themselves is no message


def test_the_report_keeps_each_template_apart_and_refuses(tmp_path, capsys):
    one, other = (course._kept(report_steps(template), tmp_path) for template in ("none", "each"))
    assert one != other
    from finetune_lens.report.__main__ import main

    folder = fl.zoo.path("strings")
    run = functools.partial(command, main, folder / "base", folder / "lora", "--prompts", folder / "prompts.jsonl",
                            "--out", tmp_path / "o", code=2)  # fmt: skip
    for template, words in (("tuned", "template is none or each"), ("each", "the tokenizer has no chat template")):
        run("--template", template)
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: {words}")
    assert not (tmp_path / "o" / "report.html").exists()
