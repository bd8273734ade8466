"""nnsight reads and writes the same activations as our hooks do."""

import pytest
import torch
from conftest import VOCABULARY

from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel
from finetune_lens.hooked.nnsight_backend import ORDER, run_with_nnsight
from finetune_lens.hooked.sites import site_name

FAMILIES = ("gpt2", "llama", "gemma2", "neox", "qwen3", "mistral", "mixtral", "gemma3-sliding", "phi3")


@pytest.fixture(params=FAMILIES)
def model(request, library):
    return HookedModel(library.model(request.param), name=request.param)


def tokens(rows=2, columns=6, seed=0):
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def sites(model):
    return [site_name(k, layer) for layer in range(model.layers) for k in ORDER if not model.lacks(k, layer)]


def near(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_captures(model, padded):
    ids, mask = tokens(), torch.ones(2, 6, dtype=torch.bool)
    if padded:
        mask[0, :2] = False
    ours = model.run(ids, mask=mask, capture=sites(model))
    theirs = run_with_nnsight(model, ids, mask=mask, capture=sites(model))
    near(theirs.logits[mask], ours.logits[mask])
    assert theirs.cache.keys() == ours.cache.keys()
    for name, x in ours.cache.items():
        near(theirs.cache[name][mask], x[mask])


def test_edits_by_value(model):
    """Each site alone set to what another text has there."""
    ids = tokens()
    other = model.run(tokens(seed=1), capture=sites(model)).cache
    plain = model.run(ids).logits
    for name in sites(model):
        ours = model.run(ids, edits=[(name, other[name])], capture=[name])
        theirs = run_with_nnsight(model, ids, edits=[(name, other[name])], capture=[name])
        near(theirs.logits, ours.logits)
        near(theirs.cache[name], other[name])
        assert not torch.equal(ours.logits, plain)


def test_edits_by_function_and_together(model):
    ids = tokens()
    names = sites(model)
    edits = [(names[0], lambda x: x * 1.1), (names[-2], lambda x: x - 0.1), (names[-2], lambda x: 2 * x)]
    ours = model.run(ids, edits=edits, capture=names)
    theirs = run_with_nnsight(model, ids, edits=edits, capture=names)
    near(theirs.logits, ours.logits)
    for name in names:
        near(theirs.cache[name], ours.cache[name])


def test_modules_that_are_given_no_batch(library):
    """OPT's MLP works on (batch · pos, width)."""
    model = HookedModel(library.model("opt"))
    for rows in (1, 2):
        ours, theirs = (
            run(model, tokens(rows), capture=sites(model)).cache for run in (HookedModel.run, run_with_nnsight)
        )
        for name, x in ours.items():
            assert theirs[name].shape == x.shape
            near(theirs[name], x)


def test_one_head(library):
    model = HookedModel(library.model("llama"))
    name = site_name("z", 1)

    def silence(x):
        x = x.clone()
        x[:, :, 2] = 0
        return x

    near(
        run_with_nnsight(model, tokens(), edits=[(name, silence)]).logits,
        model.run(tokens(), edits=[(name, silence)]).logits,
    )


def test_logits_where_they_are_wanted(library):
    model = HookedModel(library.model("gpt2"))
    at = torch.tensor([[5, 2], [3, 4]])
    near(run_with_nnsight(model, tokens(), logits_at=at).logits, model.run(tokens(), logits_at=at).logits)


def test_the_model_is_as_it_was(library):
    model = HookedModel(library.model("llama"))
    before = model.run(tokens()).logits
    run_with_nnsight(model, tokens(), edits=[(site_name("mlp_out", 0), lambda x: 0 * x)])
    assert torch.equal(model.run(tokens()).logits, before)


def test_what_it_has_no_access_to(library):
    model = HookedModel(library.model("neox"))
    for kind in ("pattern", "result"):
        with pytest.raises(InputError, match="no access"):
            run_with_nnsight(model, tokens(), capture=[site_name(kind, 0)])
    with pytest.raises(InputError, match="no site"):
        run_with_nnsight(model, tokens(), capture=[site_name("resid_mid", 0)])
    with pytest.raises(InputError, match="layers 0 to 1"):
        run_with_nnsight(model, tokens(), capture=[site_name("z", 7)])
