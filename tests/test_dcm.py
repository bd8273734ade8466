"""DCM: the mask that mixes is the one the equation says, learning is as published, and planted heads are found."""

import json
import math
import string
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.collections import LineCollection
from test_patching import LETTERS, letters

import finetune_lens as fl
from finetune_lens import results
from finetune_lens.circuits import Circuit, Group
from finetune_lens.circuits import dcm as module_under_test
from finetune_lens.circuits.dcm import DRAWS, _columns, _encoded, _others, learn_masks
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel, masking
from finetune_lens.hooked.masking import MixedRuns, learn
from finetune_lens.patching import patch
from finetune_lens.plots.dcm_accuracy import dcm_accuracy
from finetune_lens.prompts import read_prompts
from finetune_lens.results.dcm import CONTROLS, PATCHED, Masks
from finetune_lens.tasks import boxes

EVERY = tuple((layer, head) for layer in (0, 1) for head in range(4))
SOME = ((0, 1), (0, 3), (1, 0), (1, 2))


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def rows(n: int, kinds: str = "first other", seed: int = 0, length: int = 3) -> list[dict[str, Any]]:
    """Two texts without a letter in common; the target is the first or the third letter of the second."""
    generator, found = np.random.default_rng(seed), []
    for kind in kinds.split():
        for number in range(n):
            drawn = "".join(generator.permutation(list(string.ascii_lowercase))[: 2 * length])
            one, other = drawn[:length], drawn[length:]
            found.append(
                {
                    "id": f"{kind}{number}", "prompt": f"{one}=", "corrupt": f"{other}=", "answer": one[0],
                    "corrupt_answer": other[0 if kind == "first" else 2], "counterfactual": kind, "second": one[1],
                    "corrupt_second": other[1],
                }
            )  # fmt: skip
    return found


def ragged(n: int = 6) -> list[dict[str, Any]]:
    """As `rows`, of 4 to 9 tokens, with the mention of `second` in another column in the counterfactual."""
    found = []
    for number, row in enumerate(rows(n, "first")):
        before, after = "zz"[: number % 3], "yyyy"[: (2 * number) % 5]
        found.append(row | {"prompt": before + row["prompt"], "corrupt": after + row["corrupt"], "answer": "x"})
    return found


def mixed(model: HookedModel, given: list, position: Any, *, align: str = "error", batch_size: int = 4) -> MixedRuns:
    items = module_under_test._aimed(read_prompts(given), "corrupt_answer")
    where = _encoded(items, model.tokenizer, "corrupt_answer", align)
    return MixedRuns(model, where.clean, where.corrupt, *_columns(where, position), batch_size=batch_size)


def naive(module: Any, text: str, at: int, other: str, other_at: int, heads: Any, mask: torch.Tensor) -> torch.Tensor:
    """Logits after one text, by plain hooks on the output projections: (vocab,)."""
    llama = hasattr(module, "model")
    blocks = module.model.layers if llama else module.transformer.h
    projections = [block.self_attn.o_proj if llama else block.attn.c_proj for block in blocks]
    ids = [torch.tensor([[LETTERS[c] for c in some]]) for some in (text, other)]
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda m, args: kept.update({layer: args[0].detach().clone()})

    def mix(layer: int) -> Any:
        def hook(m: Any, args: tuple) -> tuple:
            x, width = args[0].clone(), args[0].shape[-1] // 4
            for (where, head), share in zip(heads, mask, strict=True):
                if where == layer:
                    own = slice(head * width, (head + 1) * width)
                    x[0, at, own] = share * args[0][0, at, own] + (1 - share) * kept[layer][0, other_at, own]
            return (x,)

        return hook

    for make, tokens in ((keep, ids[1]), (mix, ids[0])):
        hooks = [p.register_forward_pre_hook(make(layer)) for layer, p in enumerate(projections)]
        logits = module(tokens).logits[0, -1]
        for hook in hooks:
            hook.remove()
    return logits


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, library):
    return HookedModel(library.model(request.param), letters(), name=request.param)


# The masked forward pass


@pytest.mark.parametrize(
    ("field", "align"), [("second", "left"), ("end", "left"), ("second", "right"), ("end", "right")]
)
def test_mixing_is_what_plain_hooks_do(model, field, align):
    """Of padded batches, heads of both layers, grouped-query attention, each example at its own columns."""
    given = [row | {"end": "=", "corrupt_end": "="} for row in ragged()]
    runs = mixed(model, given, f"{field}:last", align=align)
    mask = torch.rand(4, generator=torch.Generator().manual_seed(0))
    found = runs.logits(np.arange(len(given)), SOME, mask)
    for row, logits in zip(given, found, strict=True):
        at, other_at = row["prompt"].rindex(row[field]), row["corrupt"].rindex(row[f"corrupt_{field}"])
        expected = naive(model.module, row["prompt"], at, row["corrupt"], other_at, SOME, mask)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    picked = runs.logits(np.array([4, 1]), SOME, mask)
    torch.testing.assert_close(picked, found[[4, 1]], atol=2e-5, rtol=1e-5)
    assert not torch.allclose(found, runs.logits(np.arange(len(given)), SOME, torch.ones(4)), atol=1e-3)


def test_all_of_it_and_none_of_it(model):
    """Masks of 1 leave every bit as it is; masks of 0 are `patch`."""
    given = rows(6, "first")
    runs, every = mixed(model, given, -2), np.arange(6)
    prompts = runs.prompts
    plain = model.run(prompts.ids, logits_at=prompts.read_at).logits[:, 0]
    assert torch.equal(runs.logits(every, SOME, torch.ones(4)), plain)
    assert torch.equal(runs.logits(every, [], torch.ones(0)), plain)
    patched = runs.logits(every, SOME, torch.zeros(4))
    sets = Circuit({"some": Group(-2, SOME)}).sets()
    aims = [row | {"answer": row["corrupt_answer"], "wrong": row["answer"]} for row in given]
    effect = patch(model, aims, sets=sets, direction="noising", progress=False).data.logit_diff.values.ravel()
    ids = np.array([[LETTERS[row["corrupt_answer"]], LETTERS[row["answer"]]] for row in given])
    difference = (patched - plain)[np.arange(6)[:, None], ids].numpy()
    np.testing.assert_allclose(difference[:, 0] - difference[:, 1], effect, atol=1e-5)
    assert np.abs(effect).max() > 1e-3
    right = runs.accuracy(every, SOME)
    assert right.tolist() == (patched.argmax(-1).numpy() == ids[:, 0]).tolist()


def test_batches_do_not_matter(model):
    given = ragged()
    one, many = (mixed(model, given, -1, align="right", batch_size=size) for size in (1, 6))
    assert many.prompts.mask.sum() < many.prompts.mask.numel()
    for layer in range(2):
        torch.testing.assert_close(one.source[layer], many.source[layer], atol=1e-5, rtol=1e-5)
    mask = torch.full((4,), 0.3)
    alone = torch.cat([one.logits(np.array([n]), SOME, mask) for n in range(6)])
    torch.testing.assert_close(many.logits(np.arange(6), SOME, mask), alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "step", "near"), [("gpt2", 1e-5, 1e-6), ("llama", 1e-2, 2e-3)])
def test_the_gradient_is_that_of_finite_differences(library, family, step, near):
    """In float64 (but for Llama's norms, which are float32 always), and of the masks alone."""
    module = library.fresh(family).double().requires_grad_(True)
    runs, every = mixed(HookedModel(module, letters()), ragged(), -1, align="right"), np.arange(6)
    mask = torch.tensor([0.2, 1.0, 0.0, 0.7], dtype=torch.float64, requires_grad=True)
    with masking._frozen(module):
        assert not any(p.requires_grad for p in module.parameters())
        (gradient,) = torch.autograd.grad(runs.targets(every, SOME, mask).mean(), mask)
    for n in range(4):
        aside = torch.zeros(4, dtype=torch.float64)
        aside[n] = step
        up, down = (float(runs.targets(every, SOME, (mask + s).detach()).mean()) for s in (aside, -aside))
        assert float(gradient[n]) == pytest.approx((up - down) / (2 * step), rel=near)
    assert float(gradient.abs().min()) > 1e-4


def test_the_model_stays_as_it_is(library):
    """Parameters that train still do, none has moved, and none has a gradient."""
    module = library.fresh("llama")
    for n, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(n % 2 == 0)
    before = [(p.detach().clone(), p.requires_grad) for p in module.parameters()]
    runs, every = mixed(HookedModel(module, letters()), rows(6, "first"), -1), np.arange(6)
    learn(runs, SOME, every, every, rate=0.1, epochs=2, penalty=0.01)
    for parameter, (value, trains) in zip(module.parameters(), before, strict=True):
        assert parameter.requires_grad == trains
        assert parameter.grad is None
        assert torch.equal(parameter, value)


# Learning


def published(module: Any, texts: list, heads: Any, train: list, validation: list, rate: float, penalty: float) -> Any:
    """The procedure written out, an example at a time, with an Adam of its own: masks by step, judgements, the best."""

    def logits(n: int, mask: torch.Tensor) -> torch.Tensor:
        row = texts[n]
        return naive(module, row["prompt"], 3, row["corrupt"], 3, heads, mask)

    def target(n: int) -> int:
        return LETTERS[texts[n]["corrupt_answer"]]

    mask, first, second, step = np.ones(len(heads)), 0.0, 0.0, 0
    losses, judged, best = [], {}, (-1.0, -1, None)
    for _ in range(2):
        for number, start in enumerate(range(0, len(train), 2)):
            mask = np.clip(mask, 0, 1)
            m = torch.tensor(mask, requires_grad=True)
            batch = train[start : start + 2]
            loss = -sum(logits(n, m)[target(n)] for n in batch) / len(batch) + penalty * (1 - m).sum()
            losses.append(float(loss.detach()))
            gradient = torch.autograd.grad(loss, m)[0].numpy()
            step += 1
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            mask = mask - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            if number % 4 == 0 or step == 2 * math.ceil(len(train) / 2):
                clamped = np.clip(mask, 0, 1)
                rounded = torch.tensor(np.round(clamped))
                with torch.no_grad():
                    right = np.mean([int(logits(n, rounded).argmax()) == target(n) for n in validation])
                judged[step - 1] = right
                if (right, int((rounded == 0).sum())) > best[:2]:
                    best = right, int((rounded == 0).sum()), (step - 1, clamped)
    return losses, judged, best[2]


@pytest.mark.parametrize(("family", "penalty"), [("gpt2", 0.001), ("llama", 0.05)])
def test_learning_is_as_published(library, family, penalty):
    """Clamped before each step, rounded to be judged, judged every 4 batches, ties to more heads: step by step.

    The targets are what these models say when some of the heads are patched.
    """
    module = library.fresh(family).double()
    given, names = rows(18, "first"), {token: letter for letter, token in LETTERS.items()}
    for row in given:
        said = naive(module, row["prompt"], 3, row["corrupt"], 3, SOME, torch.zeros(4, dtype=torch.float64))
        row |= {"answer": " ", "corrupt_answer": names[1 + int(said[1:27].argmax())]}
    train, validation = list(range(11)), list(range(11, 18))
    runs = mixed(HookedModel(module, letters()), given, -1, batch_size=2)
    found = learn(runs, EVERY, np.array(train), np.array(validation), rate=0.3, epochs=2, penalty=penalty)
    losses, judged, (best, mask) = published(module, given, EVERY, train, validation, 0.3, penalty)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-6)
    assert {int(n): found.validation[n] for n in np.flatnonzero(~np.isnan(found.validation))} == judged
    assert list(judged) == [0, 4, 6, 10, 11]
    assert found.best == best
    np.testing.assert_allclose(found.mask, mask, atol=1e-6)
    assert 0 < found.patched.sum() < len(EVERY)
    assert found.patched.tolist() == (np.round(mask) == 0).tolist()


def test_ties_go_to_more_heads_and_then_to_the_earlier(library, monkeypatch):
    runs = mixed(HookedModel(library.fresh("gpt2").double(), letters()), rows(24, "first"), -1, batch_size=2)
    counts = []

    def accuracy(self: MixedRuns, examples: np.ndarray, patched: Any) -> np.ndarray:
        counts.append(len(patched))
        return np.array([0.5])

    monkeypatch.setattr(MixedRuns, "accuracy", accuracy)
    found = learn(runs, EVERY, np.arange(24), np.arange(2), rate=0.3, epochs=2, penalty=0.0)
    steps = np.flatnonzero(~np.isnan(found.validation))
    assert found.best == steps[int(np.argmax(counts))]
    assert found.patched.sum() == max(counts) > 0


def test_logits_that_are_not_finite_are_refused(library):
    module = library.fresh("gpt2")
    module.lm_head.weight.data[:] = torch.nan
    runs = mixed(HookedModel(module, letters()), rows(6, "first"), -1)
    with pytest.raises(InputError, match="not finite"):
        learn(runs, SOME, np.arange(6), np.arange(6), rate=0.1, epochs=1, penalty=0.0)


# Planted truth

MOVER, READER = (0, 1), (1, 2)


@pytest.fixture(scope="module")
def planted():
    """The answer is the first letter: MOVER brings it to the second position, READER from there to the end.

    Residual stream: letter, what was moved, what is said (29 each), position. The other heads do a little at random.
    """
    import transformers

    letter, moved, said, place = 0, 29, 58, 87
    config = transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=116, vocab_size=29, n_positions=8, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    module = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
    for layer, head, looks_at, source, to in ((*MOVER, 0, letter, moved), (*READER, 1, moved, said)):
        attention = module.transformer.h[layer].attn
        attention.c_attn.weight[:, 232:].normal_(0, 3e-4, generator=generator)
        attention.c_proj.weight.normal_(0, 3e-4, generator=generator)
        own = slice(29 * head, 29 * (head + 1))
        attention.c_attn.bias[29 * head] = 10.0
        attention.c_attn.weight[place + looks_at, 116 + 29 * head] = 5.0
        attention.c_attn.weight[source : source + 29, 232:][:, own] = torch.eye(29)
        attention.c_proj.weight[own, to : to + 29] = torch.eye(29)
    module.transformer.wte.weight[:, letter : letter + 29] = torch.eye(29)
    module.transformer.wpe.weight[:, place : place + 8] = torch.eye(8) * 30  # the norms hardly depend on the letters
    module.lm_head.weight[:, said : said + 29] = torch.eye(29) * 30
    return HookedModel(module, letters(), name="planted", fingerprint="f" * 64)


CIRCUIT = Circuit(
    {"end": Group(-1, EVERY), "second": Group("second:first", EVERY), "rest": Group(-1, ((0, 0), (1, 1)))}
)


def masks(model: Any, given: Any = None, circuit: Circuit = CIRCUIT, **options: Any) -> Masks:
    given = rows(40) if given is None else given
    return learn_masks(model, circuit, given, progress=False, **({"batch_size": 10, "epochs": 4} | options))


@pytest.fixture(scope="module")
def found(planted):
    return masks(planted)


def test_the_planted_heads_are_found_and_no_other(found):
    assert found.desiderata == ["first", "other"]
    assert found.heads("first", "end") == [READER]
    assert found.heads("first", "second") == [MOVER]
    for desideratum, group in (("other", "end"), ("other", "second"), ("first", "rest"), ("other", "rest")):
        assert found.heads(desideratum, group) == []
        assert found.values(desideratum, group).max() == 0
    for group in ("end", "second"):
        assert found.values("first", group).tolist() == [1.0] * 10
        assert found.values("first", group, "none").max() == 0
        assert found.values("first", group, "all").min() == 1
        assert found.values("first", group, "random in group").max() == 0
        assert found.carried(group) == "first"
        assert found.clear(group) == ["first"]
    assert found.carried("rest") is None
    draws = found.data["draws"].sel(desideratum="first")
    assert draws.sel(patched="random in group").values.tolist() == [7, 7, 0]
    assert draws.sel(patched="random outside").values.tolist() == [0, 0, 0]
    assert np.isnan(found.values("first", "end", "random outside")).all()


def test_heads_outside_the_group_stand_beside_it(planted):
    """A group with nothing to find patches nothing; one with the reader does more than any as large outside it."""
    circuit = Circuit({"reader": Group(-1, (READER, (0, 0))), "others": Group(-1, ((0, 0), MOVER))})
    result = masks(planted, circuit=circuit)
    assert result.data["draws"].sel(group="reader", desideratum="first", patched="random outside") == 6
    assert result.values("first", "reader", "random outside").max() == 0
    assert result.carried("reader") == "first"
    assert result.carried("others") is None


def test_a_penalty_that_nothing_is_worth(planted):
    """No head is learnt, which is what no head patched gives; all of the group still would."""
    result = masks(planted, rows(40, "first"), groups=["second"], penalty=100.0)
    assert result.heads("first", "second") == []
    assert result.values("first", "second").max() == 0
    assert result.values("first", "second", "all").min() == 1
    assert np.isnan(result.values("first", "second", "random in group")).all()
    assert result.carried("second") is None


def test_random_heads_are_different_sets_without_replacement():
    generator = np.random.default_rng(0)
    for count, size, without, expected in (
        (8, 3, EVERY[:3], DRAWS),
        (5, 1, EVERY[:1], 4),
        (8, 8, EVERY, 0),
        (4, 5, (), 0),
    ):
        drawn = _others(EVERY[:count], size, generator, without=without)
        assert len(drawn) == len({tuple(some) for some in drawn}) == expected
        assert all(len(set(some)) == size and set(some) <= set(EVERY[:count]) for some in drawn)
        assert list(without) not in drawn
    seen = {head for _ in range(20) for some in _others(EVERY, 2, generator) for head in some}
    assert seen == set(EVERY)


# What is measured, and on what


def test_seeds_splits_and_groups(planted, found):
    """One seed, one result, whichever groups are asked for; another seed, other splits."""
    again, other = masks(planted, groups=["second"]), masks(planted, groups=["rest"], seed=1)
    assert again.groups == ["second"]
    for name in ("accuracy", "mask", "loss", "validation"):
        np.testing.assert_array_equal(again.data[name].sel(group="second"), found.data[name].sel(group="second"))
    np.testing.assert_array_equal(again.data["id"].values, found.data["id"].values)
    assert set(other.data["id"].values.ravel()) != set(found.data["id"].values.ravel())
    assert found.provenance["rows"] == {"first": [20, 10, 10], "other": [20, 10, 10]}
    limited = masks(planted, groups=["rest"], limit=24, split=(0.5, 0.1, 0.4), batch_size=6)
    assert limited.provenance["rows"] == {"first": [12, 2, 10], "other": [12, 2, 10]}
    assert limited.provenance["prompts"]["count"] == 48
    assert {int(name[5:]) for name in limited.data["id"].values.ravel()} <= set(range(24))


def test_splits_are_disjoint(planted, monkeypatch):
    seen = []
    real = masking.learn
    monkeypatch.setattr(masking, "learn", lambda r, h, t, v, **o: seen.append((t, v)) or real(r, h, t, v, **o))
    result = masks(planted, rows(21), groups=["rest"], split=(0.6, 0.2, 0.2), batch_size=6)
    for desideratum, (train, validation) in zip(result.desiderata, seen, strict=True):
        test = [f"{desideratum}{n}" for n in range(21)]
        ids = [row["id"] for row in rows(21)]
        parts = [
            {ids[n] for n in train},
            {ids[n] for n in validation},
            set(result.data["id"].sel(desideratum=desideratum).values),
        ]
        assert set.union(*parts) == set(test)
        assert [len(part) for part in parts] == [12, 4, 5]


def test_desiderata_of_different_size(planted):
    """The shorter is not padded with what it does not have."""
    result = masks(planted, rows(40, "first") + rows(24, "other"), groups=["rest"], batch_size=6)
    assert len(result.values("first", "rest")) == 10
    assert len(result.values("other", "rest")) == 6
    assert result.to_frame().groupby("desideratum")["examples"].unique().map(list).to_dict() == {
        "first": [10],
        "other": [6],
    }
    assert np.isfinite(result.data["loss"]).sum("step").values.tolist() == [[16], [8]]


def test_an_interrupted_run_continues(planted, tmp_path, monkeypatch):
    """What was finished is not learnt again, and the whole is that of a run without interruption."""
    calls = []

    def learn_two(runs: MixedRuns, heads: Any, *_: Any, **options: Any) -> masking.Learnt:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return masking.Learnt(np.arange(len(heads)) * options["penalty"], np.ones(8), np.ones(8), 3)

    monkeypatch.setattr(masking, "learn", learn_two)
    monkeypatch.setattr(module_under_test, "DRAWS", 2)
    circuit = Circuit({"one": Group(-1, (READER, (0, 0))), "two": Group("second", (MOVER, (1, 0)))})
    whole = masks(planted, circuit=circuit)
    assert len(calls) == 4
    with pytest.raises(KeyboardInterrupt):
        masks(planted, circuit=circuit, partial=tmp_path)
    result = masks(planted, circuit=circuit, partial=tmp_path)
    assert len(calls) == 7 + 2, "two were finished"
    for name in ("accuracy", "mask", "loss", "validation", "best", "draws", "id"):
        np.testing.assert_array_equal(result.data[name].values, whole.data[name].values)
    masks(planted, circuit=circuit, partial=tmp_path)
    assert len(calls) == 9
    masks(planted, circuit=circuit, partial=tmp_path, penalty=0.02)
    assert len(calls) == 9 + 4


def test_positions_in_the_counterfactual_are_its_own():
    """The label is looked up by `corrupt_label`; a number is the same number."""
    for kind in ("object", "label", "position"):
        given = boxes.draw(12, np.random.default_rng(0), counterfactual=kind)
        reads = boxes.tokenizer()
        where = _encoded(
            module_under_test._aimed(read_prompts(given), "corrupt_answer"), reads, "corrupt_answer", "error"
        )
        tokens = [
            reads.convert_ids_to_tokens(side.ids[n].tolist())
            for side in (where.clean, where.corrupt)
            for n in range(12)
        ]
        for position, offset in (("label:first", None), ("label:last", -3), (-1, -1), (4, None)):
            mine, theirs = _columns(where, position)
            for n, row in enumerate(given):
                label, other = tokens[n][mine[n]], tokens[12 + n][theirs[n]]
                if isinstance(position, str):
                    assert (label, other) == (f" {row['label']}", f" {row['corrupt_label']}")
                else:
                    assert mine[n] == theirs[n] == position % len(tokens[n])
                if position == "label:first":
                    assert mine[n] == 6 + 7 * row["query"]
                    assert theirs[n] == 6 + 7 * row["corrupt_query"]
                if offset is not None:
                    assert mine[n] == theirs[n] == len(tokens[n]) + offset


def test_a_field_without_its_own_in_the_counterfactual(model):
    given = [
        {**row, "prompt": f"{row['prompt']}y", "corrupt": f"y{row['corrupt']}", "shared": "y"}
        for row in rows(3, "first")
    ]
    where = _encoded(
        module_under_test._aimed(read_prompts(given), "corrupt_answer"), letters(), "corrupt_answer", "error"
    )
    mine, theirs = _columns(where, "shared")
    assert (mine.tolist(), theirs.tolist()) == ([4] * 3, [0] * 3)


BAD = [
    ({"drop": "corrupt_answer"}, {}, "1 of 80 prompts have no `corrupt_answer`.*first0"),
    ({"drop": "corrupt"}, {}, "no `corrupt` text"),
    ({"drop": "counterfactual"}, {}, "no `counterfactual`.*first0"),
    ({"corrupt_answer": "ab"}, {}, "prompt first0: `corrupt_answer`, 'ab', is several tokens"),
    ({"corrupt_answer": ["a"]}, {}, "1 of 80 prompts have no `corrupt_answer`"),
    ({"same": True}, {}, "1 of 80 prompts have their own answer for `corrupt_answer` .first: first0"),
    ({}, {"target": "nothing"}, "80 of 80 prompts have no `nothing`"),
    ({}, {"by": "corrupt_answer"}, "expected 2 or more in each"),
    ({}, {"split": (0.98, 0.01, 0.01)}, "40 rows, which makes 39, 0, 1"),
    ({}, {"split": (0.5, 0.5, 0.5)}, "add to 1"),
    ({}, {"batch_size": 32}, "4 steps at rate 0.1 do not take a mask"),
    ({}, {"rate": 0.0}, "rate is above 0"),
    ({}, {"limit": 0}, "limit"),
    ({}, {"groups": []}, "one or more groups"),
    ({}, {"groups": ["nobody"]}, "no group 'nobody'; there are end, second, rest"),
    ({}, {"circuit": Circuit({"g": Group(-1, ((2, 0),))})}, "head 2.0"),
    ({}, {"circuit": Circuit({"g": Group(9, EVERY)})}, "position 9 does not exist"),
    ({}, {"circuit": Circuit({"g": Group("third:first", EVERY)})}, "field 'third'"),
    ({"corrupt_second": "="}, {"circuit": Circuit({"g": Group("second:1", EVERY)})}, "'second:1' does not exist"),
    ({"corrupt_second": "#"}, {}, "field 'corrupt_second'.*its `corrupt` text"),
    ({}, {"circuit": Circuit({"g": Group(-1, EVERY)}, {"model": "base", "files_sha256": "0" * 64})}, "pass force=True"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "options", "words"), BAD, ids=[words[:24] for _, _, words in BAD])
def test_bad_input(planted, change, options, words):
    given = rows(40)
    if "drop" in change:
        given[0].pop(change["drop"])
    elif "same" in change:
        given[0]["corrupt_answer"] = given[0]["answer"]
    else:
        given[0] |= change
    with pytest.raises(InputError, match=words):
        masks(planted, given, **options)


def test_a_position_beyond_a_shorter_prompt(planted):
    given = rows(40)
    given[7]["corrupt"] = given[7]["corrupt"][1:]
    with pytest.raises(InputError, match="prompt first7: position 3 does not exist in its `corrupt` text"):
        masks(planted, given, Circuit({"g": Group(3, EVERY)}), align="left")
    with pytest.raises(InputError, match="align"):
        masks(planted, given, Circuit({"g": Group(3, EVERY)}))


def test_force_uses_a_circuit_of_another_model(planted):
    other = Circuit({"g": Group(-1, EVERY)}, {"model": "base", "files_sha256": "0" * 64})
    assert masks(planted, circuit=other, force=True).heads("first", "g") == [READER]


def test_from_files(planted, found, tmp_path):
    """A circuit's file and a prompts' file give what the objects do."""
    text = "".join(json.dumps(row) + "\n" for row in rows(40))
    (tmp_path / "prompts.jsonl").write_text(text)
    circuit = CIRCUIT.save(tmp_path / "circuit.json")
    result = masks(planted, tmp_path / "prompts.jsonl", circuit, groups=["second"])
    np.testing.assert_array_equal(result.data["accuracy"], found.data["accuracy"].sel(group=["second"]))
    assert result.provenance["models"]["model"] == "planted"


# The result


def made(means: dict[str, float], *, chance: float = math.nan, n: int = 60, controls: Any = None) -> Masks:
    """A result of one group of three heads with these accuracies, each with one head learnt."""
    values = np.zeros((len(means), 1, len(PATCHED), n), np.float32)
    for i, mean in enumerate(means.values()):
        values[i, 0, 0, : round(mean * n)] = 1
        for name, share in (controls or {}).items():
            values[i, 0, PATCHED.index(name), : round(share * n)] = 1
    lead = (len(means), 1)
    data = {
        "accuracy": (("desideratum", "group", "patched", "example"), values),
        "draws": (("desideratum", "group", "patched"), np.ones((*lead, len(PATCHED)))),
        "mask": (("desideratum", "group", "member"), np.tile([1.0, 0.0, 0.7], (*lead, 1))),
        "loss": (("desideratum", "group", "step"), np.zeros((*lead, 2))),
        "layer": (("group", "member"), [[0, 1, 1]]), "head": (("group", "member"), [[3, 0, 2]]),
        "id": (("desideratum", "example"), np.array([[f"e{i}" for i in range(n)]] * len(means), dtype=object)),
    }  # fmt: skip
    coords = {"desideratum": np.array(list(means), dtype=object), "group": np.array(["g"], dtype=object)}
    coords |= {"position": ("group", np.array(["-1"], dtype=object)), "patched": np.array(PATCHED, dtype=object)}
    return Masks(xr.Dataset(data, coords=coords, attrs={"by": "counterfactual", "chance": chance}))


def test_what_a_group_carries():
    assert made({"object": 0.9, "label": 0.1}).carried("g") == "object"
    assert made({"object": 0.1, "label": 0.9}).carried("g") == "label"
    both = made({"object": 0.9, "label": 0.85})
    assert both.carried("g") is None
    assert both.clear("g") == ["object", "label"]
    assert "can be made to answer object and label, none clear of the others" in both.summary()
    assert made({"object": 0.9}).carried("g") == "object"
    assert made({"object": 0.2, "label": 0.0}).carried("g") == "object"
    assert made({"object": 0.2, "label": 0.0}, chance=1 / 7).carried("g") is None, "not clear of chance"
    for control in ("none", "random outside"):
        assert made({"object": 0.9, "label": 0.0}, controls={control: 0.9}).carried("g") is None
    assert made({"object": 0.9, "label": 0.0}, controls={"all": 0.9, "random in group": 0.9}).carried("g") == "object"
    without = made({"object": 0.9, "label": 0.0})
    without.data["accuracy"].loc[{"patched": "random outside"}] = np.nan
    assert without.carried("g") == "object"
    assert made({"object": 0.0, "label": 0.0}).carried("g") is None


def test_tables(found):
    frame, table = found.to_frame(), found.table()
    assert len(frame) == 3 * 2 * len(PATCHED)
    assert len(table) == 6
    row = table.set_index(["group", "desideratum"]).loc[("end", "first")]
    assert (row["heads"], row["of"], row["accuracy"], row["none"], row["all"]) == (1, 8, 1.0, 0.0, 1.0)
    assert row["patched"] == "1.2"
    assert bool(row["carried"])
    learnt = frame.set_index(["group", "desideratum", "patched"]).loc[("end", "first", "none")]
    assert (learnt["learnt_more"], learnt["more_low"], learnt["more_high"]) == (1.0, 1.0, 1.0)
    one = made({"object": 0.5}, controls={"none": 0.25}).to_frame().set_index("patched")
    assert one.loc["learnt", "low"] == pytest.approx(0.367, abs=0.03)
    assert one.loc["none", ["accuracy", "learnt_more"]].tolist() == [0.25, 0.25]
    assert 0.1 < one.loc["none", "more_low"] < 0.25 < one.loc["none", "more_high"] < 0.4
    assert one["heads"].to_dict() == dict(zip(PATCHED, (1, 0, 3, 1, 1), strict=True))
    for call in (found.values, found.heads):
        with pytest.raises(InputError, match="no desideratum 'x'; there are first, other"):
            call("x", "end")
        with pytest.raises(InputError, match="no group 'x'; there are end, second, rest"):
            call("first", "x")
    with pytest.raises(InputError, match="no group 'x'"):
        found.carried("x")
    with pytest.raises(InputError, match="patched is one of"):
        found.values("first", "end", "x")


def test_a_saved_result(found, tmp_path):
    loaded = results.load(found.save(tmp_path / "masks.nc"))
    assert type(loaded) is Masks
    assert loaded.summary() == found.summary()
    assert loaded.table().equals(found.table())
    assert json.loads(json.dumps(loaded.headline()))["end"]["carries"] == "first"
    assert loaded.headline()["rest"]["desiderata"]["first"]["random in group"] is None
    assert "end (8 heads at -1): carries first" in found.summary()
    assert "first: 1.00 [1.00, 1.00] with 1 (1.2); none 0.00; all 1.00; random in group 0.00" in found.summary()
    assert "chance floor not known" in found.summary()
    assert "rest (2 heads at -1): carries none" in found.summary()


def test_boxes_say_the_chance_floor(monkeypatch):
    """On the shipped base: the head that moves the queried label to the end is found; chance is one in seven."""
    monkeypatch.setattr(module_under_test, "DRAWS", 2)
    given = [
        row | {"id": f"{kind}-{row['id']}"}
        for kind in ("label", "position")
        for row in boxes.draw(60, np.random.default_rng(5), counterfactual=kind)
    ]
    circuit = Circuit({"first": Group(-1, ((0, 0), (0, 1), (0, 2))), "told": Group("label:first", ((0, 0), (1, 1)))})
    result = learn_masks(fl.zoo.path("boxes") / "base", circuit, given, batch_size=15, epochs=4, progress=False)
    assert result.chance == pytest.approx(1 / 7)
    assert "chance floor 0.143" in result.summary()
    assert result.heads("label", "first") == [(0, 0)]
    assert result.carried("first") == "label"
    assert result.carried("told") is None
    assert result.data["position"].values.tolist() == ["-1", "label:first"]


# The figure


def test_the_figure_draws_what_the_result_holds(found):
    ax = dcm_accuracy(found)
    table = found.table().set_index(["group", "desideratum"])
    order = [(group, d) for d in found.desiderata for group in found.groups]
    assert [bar.get_height() for bar in ax.patches] == [table.loc[key, "accuracy"] for key in order]
    assert [t.get_text().split("\n")[0] for t in ax.get_xticklabels()] == found.groups
    counts = [t.get_text() for t in ax.texts]
    assert counts == [f"{table.loc[key, 'heads']}/{table.loc[key, 'of']}" for key in order]
    drawn = [line.get_ydata() for line in ax.lines]
    frame = found.to_frame().set_index(["desideratum", "patched", "group"])["accuracy"]
    expected = [[frame[d, c, g] for g in found.groups] for d in found.desiderata for c in CONTROLS]
    np.testing.assert_array_equal(np.array(drawn), expected)


def test_the_figure_shows_intervals_and_chance():
    result = made({"object": 0.5, "label": 0.25}, chance=0.2)
    result.data["accuracy"].loc[{"patched": "random outside"}] = np.nan
    ax = dcm_accuracy(result)
    lines = [segment for c in ax.collections if isinstance(c, LineCollection) for segment in c.get_segments()]
    whiskers = [line[:, 1] for line in lines if len(line)]
    frame = result.to_frame().set_index(["patched", "desideratum"])
    for desideratum in ("object", "label"):
        ends = frame.loc[("learnt", desideratum), ["low", "high"]].astype(float).tolist()
        assert any(np.allclose(drawn, ends) for drawn in whiskers)
    assert any(np.allclose(line.get_ydata(), 0.2) for line in ax.lines)
    words = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert words == ["object", "label", "no head", "whole group", "as many others of the group", "chance"]
    _, mine = plt.subplots()
    assert dcm_accuracy(result, ax=mine) is mine
