"""Attribution: exact where the model is linear, explicit gradients elsewhere, complete along the path, first order."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import VOCABULARY

from finetune_lens.errors import InputError
from finetune_lens.hooked import KINDS, HookedModel
from finetune_lens.hooked.attribution import attribute
from finetune_lens.hooked.sites import HEADS, site_name
from finetune_lens.hooked.sweep import Place, Side, shape_of, sweep
from finetune_lens.metrics import DIFFERENTIABLE
from finetune_lens.prompts import Encoded

FAMILIES = ("gpt2", "llama", "qwen3", "gemma2", "phi3", "mixtral", "bloom")  # the last two not in float64
LENGTHS = (6, 4, 5)
WIDTH = 6


def encoded(seed: int, left: bool = False) -> Encoded:
    """Three examples of 6, 4 and 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (3, WIDTH), generator=generator)
    length, column = torch.tensor(LENGTHS)[:, None], torch.arange(WIDTH)[None]
    mask = column >= WIDTH - length if left else column < length
    read_at = torch.full((3, 1), WIDTH - 1) if left else length - 1
    answers = torch.tensor([[[5]], [[6]], [[7]]])
    return Encoded(ids, mask, read_at, answers, answers[:, 0] + 10, mask, mask, [["t"] * n for n in LENGTHS])


def near_copy(model: HookedModel, scale: float) -> HookedModel:
    """The same model, every weight moved by a little."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return HookedModel(module)


def places(model: HookedModel, layer: int, column: int) -> list[Place]:
    """Of every kind: all, one head, one column, one head at one column."""
    found = []
    for kind in KINDS:
        if model.lacks(kind, layer):
            continue
        heads = [None, shape_of(model, kind, layer)[0] - 1] if kind in HEADS else [None]
        found += [Place(kind, layer, h, c) for h in heads for c in ([None] if kind == "pattern" else [None, column])]
    return found


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES[:-2])
def test_first_order(library, family, left):
    """As the donor comes near the recipient, estimate and effect become one: their difference falls with its square."""
    model = HookedModel(library.fresh(family).double())
    patches = [(place,) for place in places(model, 0, 1 if left else 4)]
    prompts = encoded(0, left)
    errors = []
    for scale in (1e-3, 1e-4):
        recipient, donor = Side(model, prompts), Side(near_copy(model, scale), prompts)
        effect = sweep(recipient, donor, patches, full=True, progress=False).effects["logit_diff"]
        estimate = attribute(recipient, donor, patches, "logit_diff", progress=False)
        assert np.array_equal(np.isnan(effect), np.isnan(estimate))
        assert np.isnan(effect).any()
        errors.append(np.nanmax(np.abs(estimate - effect)) / np.nanmax(np.abs(effect)))
        per_patch = np.nanmax(np.abs(effect), 1)
        assert (per_patch > 0).all()
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 3 or errors[1] < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_exact_where_the_model_is_linear(library, family):
    """After the last block, with the final norm taken out, the logit difference is linear in the residual stream."""
    module = library.fresh(family)
    (module.transformer if family == "gpt2" else module.model).__setattr__(
        "ln_f" if family == "gpt2" else "norm", torch.nn.Identity()
    )
    model = HookedModel(module)
    recipient, donor = Side(model, encoded(0)), Side(near_copy(model, 0.1), encoded(1))
    kinds = ("resid_post", "mlp_out")
    patches = [(Place(kind, 1, None, c),) for kind in kinds for c in (None, 3, 5)]
    patches.append((Place("resid_post", 1, None, 3), Place("resid_post", 1), Place("resid_post", 1, None, 5)))
    effect = sweep(recipient, donor, patches, progress=False).effects["logit_diff"]
    for steps in (0, 1, 3):
        estimate = attribute(recipient, donor, patches, "logit_diff", steps=steps, progress=False)
        np.testing.assert_allclose(estimate, effect, atol=2e-5)
    assert np.nanmax(np.abs(effect)) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("metric", ["logit_diff", "logprob", "prob"])
def test_explicit_products(library, family, metric):
    """(donor − recipient) · gradient, summed by hand over what each place covers."""
    model, prompts = HookedModel(library.model(family)), encoded(0)
    recipient, donor = Side(model, prompts), Side(near_copy(model, 0.1), encoded(1))
    wanted = places(model, 1, 4)
    found = attribute(recipient, donor, [(place,) for place in wanted], metric, batch_size=2, progress=False)
    names = sorted({site_name(p.kind, p.layer) for p in wanted})
    other = donor.prompts
    given = donor.model.run(other.ids, mask=other.mask, capture=names).cache
    run = model.run(prompts.ids, mask=prompts.mask, capture=names, gradients=True)
    rows = torch.arange(3)
    logits = run.logits[rows, prompts.read_at[:, 0]]
    answer, wrong = logits[rows, [5, 6, 7]], logits[rows, [15, 16, 17]]
    value = {"logit_diff": answer - wrong, "logprob": answer - logits.logsumexp(-1)}
    value["prob"] = value["logprob"].exp()
    gradients = run.gradients(value[metric].sum())
    for number, place in enumerate(wanted):
        name = site_name(place.kind, place.layer)
        product = ((given[name] - run.cache[name]) * gradients[name]).detach().numpy()
        for example, length in enumerate(LENGTHS):
            if place.column is not None and place.column >= length:
                assert np.isnan(found[number, example])
                continue
            if place.kind == "pattern":
                part = product[example] if place.head is None else product[example, place.head]
            else:
                part = product[example, :length] if place.column is None else product[example, place.column]
                if place.head is not None:
                    part = part[..., place.head, :]
            assert found[number, example] == pytest.approx(part.sum(), abs=2e-5), place


@pytest.mark.parametrize(
    ("family", "kinds"), [("gpt2", ("resid_pre", "q", "pattern")), ("llama", ("k", "z", "result")), ("gemma2", ("v",))]
)
def test_integrated_gradients_are_complete(library, family, kinds):
    """Over a layer they sum to the effect of patching it whole, the better the more steps; parts sum to the whole."""
    model = HookedModel(library.model(family))
    recipient, donor = Side(model, encoded(0)), Side(near_copy(model, 0.1), encoded(1))
    whole = [(Place(kind, 1),) for kind in kinds]
    effect = sweep(recipient, donor, whole, progress=False).effects["logit_diff"]
    error = {}
    for steps in (1, 12):
        estimate = attribute(recipient, donor, whole, "logit_diff", steps=steps, progress=False)
        error[steps] = np.abs(estimate - effect).max(1) / np.abs(effect).max(1)
    assert (error[12] < 0.03).all(), dict(zip(kinds, error[12], strict=True))
    assert error[12].max() < error[1].max()
    for kind in {"resid_pre", "z"} & {*kinds}:
        heads = range(shape_of(model, kind, 1)[0]) if kind in HEADS else [None]
        parts = [(Place(kind, 1, h, c),) for h, c in itertools.product(heads, range(WIDTH))]
        split = attribute(recipient, donor, parts, "logit_diff", steps=4, progress=False)
        together = attribute(recipient, donor, [(Place(kind, 1),)], "logit_diff", steps=4, progress=False)
        np.testing.assert_allclose(np.nansum(split, 0), together[0], atol=1e-4)


def test_direction(library):
    """The estimate is of the donor's activation in the recipient's run: the other way round it has the other sign."""
    model = HookedModel(library.model("gpt2"))
    one, other = Side(model, encoded(0)), Side(near_copy(model, 0.02), encoded(0))
    patches = [(Place("resid_post", 1),)]
    forth = attribute(one, other, patches, "logit_diff", progress=False)
    back = attribute(other, one, patches, "logit_diff", progress=False)
    effect = sweep(one, other, patches, progress=False).effects["logit_diff"]
    assert (np.sign(forth) == np.sign(effect)).all()
    assert (np.sign(back) == -np.sign(forth)).all()
    assert np.abs(attribute(one, one, patches, "logit_diff", progress=False)).max() == 0


def test_edits_of_a_side_are_in_its_gradient(library):
    """A noised recipient: its own run, noise and all, is where the gradient is taken."""
    model = HookedModel(library.model("gpt2"))
    noise = torch.randn(3, WIDTH, 32, generator=torch.Generator().manual_seed(3)) * 0.01
    clean = Side(model, encoded(0))
    noised = Side(model, encoded(0), lambda rows: [("blocks.0.hook_resid_pre", lambda x: x + noise[rows])])
    patches = [(Place("resid_pre", 0),), (Place("resid_post", 0),)]
    for batch_size in (1, 3):
        estimate = attribute(noised, clean, patches, "logit_diff", batch_size=batch_size, progress=False)
        effect = sweep(noised, clean, patches, progress=False).effects["logit_diff"]
        assert np.abs(effect).max() > 1e-3
        np.testing.assert_allclose(estimate, effect, atol=0.1 * np.abs(effect).max())


def test_all_columns_are_those_that_both_sides_have(library):
    """What only one side has is no token of the other, and counts for nothing."""
    model = HookedModel(library.model("gpt2"))
    recipient, donor = Side(model, encoded(0)), encoded(1)
    shorter = donor.prompt_columns.clone()
    shorter[0, 3:] = False
    donor = Side(near_copy(model, 0.1), dataclasses.replace(donor, prompt_columns=shorter))
    for steps in (0, 2):
        whole = attribute(recipient, donor, [(Place("z", 0),)], "logit_diff", steps=steps, progress=False)
        split = [(Place("z", 0, None, c),) for c in range(WIDTH)]
        parts = attribute(recipient, donor, split, "logit_diff", steps=steps, progress=False)
        assert np.isnan(parts[:, 0]).tolist() == [False] * 3 + [True] * 3
        np.testing.assert_allclose(np.nansum(parts, 0), whole[0], atol=1e-6)


def test_bad_input(library):
    side = Side(HookedModel(library.model("gpt2")), encoded(0))
    for metric in ("kl", "accuracy", "reciprocal_rank", "nothing"):
        with pytest.raises(InputError, match=f"gradient at the recipient; found '{metric}'; expected one of"):
            attribute(side, side, [(Place("z", 0),)], metric, progress=False)
    assert {"logit_diff", "logprob", "prob", "kl"} == set(DIFFERENTIABLE)
    with pytest.raises(InputError, match="found head 4"):
        attribute(side, side, [(Place("z", 0, 4),)], "logprob", progress=False)
