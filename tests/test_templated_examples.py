"""Examples within a chat template: as plain forward passes on texts that are rendered by hand, in every analysis."""

import json
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from test_check import tuned_copy
from test_patching import letters

import finetune_lens as fl
from finetune_lens import compression, evaluation, grafting, interpolation, intruders, pruning, revival
from finetune_lens.errors import InputError
from finetune_lens.evaluation import measure, read_examples
from finetune_lens.hooked import HookedModel

CHAT = "<pad>u={{ messages[0]['content'] }}<pad>{% if add_generation_prompt %}m={% endif %}"
WORDS = ("abc", "defgh", "ij", "klmn", "opqrst", "uv", "wxy", "zab")
ROWS = [{"id": w, "prompt": f"{w}=", "answer": w[0], "wrong": w[1]} for w in WORDS]
SHORT = {"progress": False, "device": "cpu"}


def chatting(template=CHAT):
    tokenizer = letters()
    tokenizer.chat_template = template
    return tokenizer


def rendered(text):
    return chatting().apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )  # fmt: skip


BY_HAND = [row | {"prompt": rendered(row["prompt"])} for row in ROWS]


def logs(model, text):
    """Log-probabilities (pos, vocab) of the plain model on one text, and its ids."""
    ids = letters()(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0].log_softmax(-1), ids[0]


@pytest.fixture(scope="module")
def folders(library, tmp_path_factory):
    """Base and tuned model, which has an intruder, with a tokenizer that has a chat template; and the prompts."""
    folder, base = tmp_path_factory.mktemp("templated"), library.fresh("llama")
    tuned = tuned_copy(base, 0.02)
    weight = tuned.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        u, v = (torch.nn.functional.normalize(torch.randn(n), dim=0) for n in weight.shape)
        weight.add_(6 * torch.outer(u, v))
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(folder / name)
        chatting().save_pretrained(folder / name)
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


@pytest.fixture(scope="module")
def pair(folders):
    return fl.ModelPair.load(folders / "base", folders / "tuned")


@pytest.fixture(scope="module")
def models(pair):
    return {side: getattr(pair, side).module for side in ("base", "tuned")}


def followed(pair, prompts, **options):
    sides = {"tuned": pair.tuned_checkpoint.source, "other": pair.base_checkpoint.source}
    return revival.follow(sides, prompts, tokenizer=pair.tokenizer, **options)


TRAINED = {"lr": 1e-3, "steps": 2, "seeds": 1, "batch": 2, "threshold": 0.5}
ANALYSES = {
    "graft": (fl.graft, {"sparsity": 0.01, "steps": 1, "examples": 4, "random_seeds": 1}),
    "interpolate": (fl.interpolate, {"alphas": (0, 0.5, 1), "parts": ["path"]}),
    "compress": (fl.compress, {"densities": [0.5], "scales": [1, 2]}),
    "scale_intruders": (
        lambda pair, prompts, **options: fl.scale_intruders(pair, {"task": prompts}, **options),
        {"scales": [0, 1], "recovery": False},
    ),
    "prune": (fl.prune, {"counts": (2,), "random_seeds": 1}),
    "revive": (fl.revive, TRAINED | {"random_steps": 1}),
    "follow": (followed, TRAINED),
}  # fmt: skip


def found(name, pair, prompts=ROWS, **options):
    function, small = ANALYSES[name]
    return function(pair, prompts, **SHORT | small | options)


def same(one, other):
    """The numbers of two results, bit for bit."""
    xr.testing.assert_equal(one.data, other.data)


# ------------------------------------------------------------------------------------------------------ the scores


@pytest.mark.parametrize("batch_size", [1, 8])
def test_answers_are_what_comes_after_the_template(models, batch_size):
    items = [{"prompt": f"{w}=", "answer": w[::-1]} for w in WORDS]  # of several letters
    several = [{"prompt": f"{w}=", "answer": [w[0], w[1]]} for w in WORDS]
    model, plain = HookedModel(models["tuned"], chatting()), models["tuned"]
    scores = measure(model, read_examples(items, [chatting()], template=True), batch_size=batch_size)
    either = measure(model, read_examples(several, [chatting()], template=True), batch_size=batch_size)
    for n, word in enumerate(WORDS):
        start = len(letters()(rendered(f"{word}="))["input_ids"])
        said, ids = logs(plain, rendered(f"{word}=") + word[::-1])
        said, answer = said[start - 1 : -1], ids[start:]
        assert scores.loss[n] == pytest.approx(-float(said.gather(-1, answer[:, None]).sum()), abs=1e-5)
        assert scores.prediction[n, : len(word)].tolist() == said.argmax(-1).tolist()
        assert scores.accuracy[n] == float((said.argmax(-1) == answer).all())
        assert scores.confidence[n] == pytest.approx(float(said.max(-1).values.sum().exp()), abs=1e-6)
        ids = letters().convert_tokens_to_ids([word[0], word[1]])
        assert either.loss[n] == pytest.approx(-float(said[0, ids].logsumexp(0)), abs=1e-5)


def test_label_words_come_after_the_template(models):
    items = [row | {"answer": "yn"[n % 2], "wrong": []} for n, row in enumerate(ROWS)]
    examples = read_examples(items, [chatting()], objective="labels", labels=("n", "y"), template=True)
    scores, ids = (
        measure(HookedModel(models["base"], chatting()), examples),
        letters().convert_tokens_to_ids(["n", "y"]),
    )
    for n, item in enumerate(items):
        said = logs(models["base"], rendered(item["prompt"]))[0][-1, ids].log_softmax(-1)
        assert scores.loss[n] == pytest.approx(-float(said[("n", "y").index(item["answer"])]), abs=1e-5)
        assert scores.prediction[n, 0] == int(said.argmax())


@pytest.mark.parametrize("batch_size", [1, 8])
def test_of_a_text_its_own_tokens_are_scored_within_the_template(models, batch_size):
    examples = read_examples([f"{w}=" for w in WORDS], [chatting()], template=True)
    assert examples.objective == "text"
    scores = measure(HookedModel(models["tuned"], chatting()), examples, batch_size=batch_size)
    for n, word in enumerate(WORDS):
        whole, text = rendered(f"{word}="), f"{word}="
        first = len(letters()(whole[: whole.index(text)])["input_ids"])
        own = slice(first, first + len(text))  # a token a letter
        said, ids = logs(models["tuned"], whole)
        before = said[own.start - 1 : own.stop - 1]
        assert scores.loss[n] == pytest.approx(-float(before.gather(-1, ids[own, None]).mean()), abs=1e-5)
        assert scores.accuracy[n] == pytest.approx(float((before.argmax(-1) == ids[own]).float().mean()))
        kept = scores.prediction[n][scores.prediction[n] >= 0]
        assert kept.tolist() == before.argmax(-1).tolist()
    nothing_before = "{{ messages[0]['content'] }}<pad>"
    with pytest.raises(InputError, match="prompt 2 has no token that comes after another"):
        read_examples(["ab", "c"], [chatting(nothing_before)], template=True)
    assert len(read_examples(["c"], [chatting()], template=True)) == 1  # the template comes before it


def test_the_same_tokens_of_which_others_are_scored_are_other_examples():
    """Finished work is kept under this identity."""
    texts = [f"{w}=" for w in WORDS]
    within = read_examples(texts, [chatting()], template=True)
    bare = read_examples([rendered(t) for t in texts], [chatting()])
    assert torch.equal(within.encoded.ids, bare.encoded.ids)
    assert within.identity() != bare.identity()
    assert within.identity() == read_examples(texts, [chatting()], template=True).identity()
    assert bare.identity() != read_examples(ROWS, [chatting()]).identity()
    padded, padding = (read_examples(["abcd", text], [letters()]) for text in ("ab", "ab<pad>"))
    assert torch.equal(padded.encoded.ids, padding.encoded.ids)
    assert padded.identity() != padding.identity()
    right = [row | {"answer": "yn"[n % 2], "wrong": []} for n, row in enumerate(ROWS)]
    wrong = [row | {"answer": "ny"[n % 2], "wrong": []} for n, row in enumerate(ROWS)]
    one, other = (read_examples(r, [letters()], objective="labels", labels=("n", "y")) for r in (right, wrong))
    assert torch.equal(one.encoded.answers, other.encoded.answers)
    assert one.identity() != other.identity()


# ---------------------------------------------------------------------------------------------------- the analyses


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_is_that_of_the_prompts_rendered_by_hand(pair, name):
    """The same tokens, so the same numbers bit for bit: the random parts, the held-out texts and training with them."""
    within = found(name, pair, template="each")
    same(within, found(name, pair, BY_HAND))
    bare = found(name, pair)
    assert not within.data.equals(bare.data)
    assert within.provenance["arguments"]["template"] == "each"
    assert bare.provenance["defaults"]["template"] == "none"


@pytest.mark.parametrize("name", ANALYSES)
def test_none_is_what_it_was_without_a_template(folders, pair, name):
    without = fl.ModelPair.load(folders / "base", folders / "tuned", tokenizer=letters())
    same(found(name, pair, template="none"), found(name, without))


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("graft", lambda d: (d["id"][0], d["base_logprob"][0], d["tuned_logprob"][0])),
        ("interpolate", lambda d: (d["prompt"][0], *d["path"].sel(alpha=[0, 1], metric="logprob", file="task"))),
        ("compress", lambda d: (d["example"], *d["reference_logprob"].sel(reference=["base", "tuned"]))),
        ("scale_intruders", lambda d: (d["id"], *(d[f"{s}_score"].sel(metric="logprob") for s in ("base", "tuned")))),
        (
            "prune",
            lambda d: (d["id"][0], *d["logprob"].sel(side=["base", "tuned"], score="random", count=0, file="task")),
        ),
        ("revive", lambda d: (d["id"][0], d["base_logprob"][0], d["logprob"].sel(start="tuned", step=0, seed=0)[0])),
    ],
)
def test_both_ends_are_the_plain_models_on_the_rendered_texts(pair, models, name, places):
    words, *ends = (values.values for values in places(found(name, pair, template="each").data))
    for model, values in zip(models.values(), ends, strict=True):
        expected = [logs(model, rendered(f"{w}="))[0][-1, letters().convert_tokens_to_ids(w[0])] for w in words]
        np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("name", ANALYSES)
def test_another_template_starts_anew(pair, tmp_path, name):
    """What an interrupted run without a template has kept is not taken for that of one with it, and the reverse."""
    kept = {"partial": tmp_path / "kept"}
    bare = found(name, pair, **kept)
    [first] = kept["partial"].glob("*-rows-*")
    same(found(name, pair, template="each", **kept), found(name, pair, template="each"))
    [second] = kept["partial"].glob("*-rows-*")
    assert second != first
    same(found(name, pair, **kept), bare)


@pytest.mark.parametrize("name", ["interpolate", "graft", "prune", "follow"])
def test_texts_rendered_by_hand_start_anew_too(pair, tmp_path, name):
    """Their tokens are those of the bare texts within the template, and other tokens are scored."""
    texts, kept = [row["prompt"] for row in ROWS], {"partial": tmp_path / "kept"}
    found(name, pair, [rendered(t) for t in texts], **kept)
    same(found(name, pair, texts, template="each", **kept), found(name, pair, texts, template="each"))


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ANALYSES)
@pytest.mark.parametrize("template", ["tuned", "both"])
def test_both_models_read_the_same_tokens(pair, name, template, monkeypatch):
    def never(*_, **__):
        raise AssertionError("nothing is read before")

    monkeypatch.setattr(evaluation, "encode", never)
    with pytest.raises(InputError, match=f"^template is none or each, .*; found '{template}'$"):
        found(name, pair, template=template)


@pytest.mark.parametrize("name", ANALYSES)
def test_a_tokenizer_without_a_chat_template(folders, name):
    bare = fl.ModelPair.load(folders / "base", folders / "tuned", tokenizer=letters())
    with pytest.raises(InputError, match=r"^the tokenizer has no chat template; leave the template out"):
        found(name, bare, template="each")


def test_a_base_without_a_chat_template_takes_the_tuned_models_tokenizer(folders, pair, models, tmp_path):
    models["base"].save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="leave the template out, or give the tuned model's tokenizer"):
        found("interpolate", fl.ModelPair.load(tmp_path, folders / "tuned"), template="each")
    given = fl.ModelPair.load(tmp_path, folders / "tuned", tokenizer=folders / "tuned")
    same(found("interpolate", given, template="each"), found("interpolate", pair, template="each"))


def test_models_of_different_templates_read_differently():
    with pytest.raises(InputError, match="read prompt abc differently"):
        read_examples(ROWS, [chatting(), chatting(CHAT.replace("u=", "w="))], template=True)


# --------------------------------------------------------------------------------------------------------- commands

TASK = "task.jsonl"
COMMANDS = {
    "grafting": (grafting, [TASK, "--sparsity", 0.01, "--steps", 0, "--no-baselines"]),
    "interpolation": (interpolation, [TASK, "--alpha", "0,1", "--parts", "path"]),
    "compression": (compression, [TASK, "--density", 1, "--scale", 1]),
    "intruder_scaling": (intruders, ["--scale", "0,1", "--no-recovery", "--null-draws", 0, "--eval", TASK]),
    "pruning": (pruning, [TASK, "--counts", 2, "--random-seeds", 1]),
    "revival": (revival, ["--task", TASK, "--steps", 1, "--seeds", 1, "--threshold", 0.5, "--no-scratch"]),
}


def command(module, folders, words, out, monkeypatch):
    where = [folders / w if w == TASK else w for w in words]
    words = [folders / "base", folders / "tuned", *where, "--out", out, "--no-plots", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        module.main()
    return stop.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(folders, tmp_path, monkeypatch, capsys, name):
    module, words = COMMANDS[name]
    assert command(module, folders, [*words, "--template", "tuned"], tmp_path / "out", monkeypatch) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.startswith("error: template is none or each")
    assert not list((tmp_path / "out").glob("*.nc"))
    assert command(module, folders, [*words, "--template", "each"], tmp_path / "out", monkeypatch) == 0
    assert fl.load(tmp_path / "out" / f"{name}.nc").provenance["arguments"]["template"] == "each"


def test_intruders_without_scale_read_no_prompts(folders, tmp_path, monkeypatch, capsys):
    assert command(intruders, folders, ["--template", "each"], tmp_path / "out", monkeypatch) == 2
    assert (
        "--template is of the prompts that scaled intruders are measured on: pass --scale too"
        in capsys.readouterr().err
    )
