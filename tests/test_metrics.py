"""Metrics against scipy, at the edges too: tokens that are never said, NaN, rows compared with one of few."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from scipy.stats import entropy

from finetune_lens.metrics import METRICS, kl, score

NEVER = -float("inf")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_divergence():
    p, q = drawn(4, 9), drawn(4, 9, seed=1)
    expected = entropy(np.exp(log_softmax(p.double(), -1)), np.exp(log_softmax(q.double(), -1)), axis=-1)
    np.testing.assert_allclose(kl(p, q), expected, rtol=1e-5)
    assert torch.equal(kl(p, p), torch.zeros(4))


def test_divergence_of_tokens_that_are_never_said():
    p, q = drawn(3, 9), drawn(3, 9, seed=1)
    p[0, 2] = NEVER  # neither says it
    q[0, 2] = NEVER
    p[1, 2] = NEVER  # the first does not
    q[2, 2] = NEVER  # the second does not
    found = kl(p, q)
    kept = [0, 1, 3, 4, 5, 6, 7, 8]
    assert found[0] == pytest.approx(float(kl(p[0, kept], q[0, kept])), rel=1e-5)
    assert torch.isfinite(found[1])
    assert found[2] == float("inf")
    assert kl(drawn(9), torch.full((9,), torch.nan)).isnan()


def test_rows_beside_one_of_few():
    logits, reference = drawn(6, 2, 9), drawn(3, 2, 9, seed=1)
    beside = torch.tensor([2, 2, 0, 0, 0, 1])
    answers, wrongs = torch.full((6, 2, 1), 4), torch.full((6, 1), 3)
    one = score(logits, answers, wrongs, reference, beside=beside)
    other = score(logits, answers, wrongs, reference[beside])
    for name in METRICS:
        torch.testing.assert_close(one[name], other[name], equal_nan=True)


def test_scores():
    logits = drawn(5, 1, 9).double()
    answers = torch.tensor([[[1, 2]], [[3, -1]], [[-1, -1]], [[0, 4]], [[8, -1]]])
    wrongs = torch.tensor([[5, 6], [7, -1], [1, -1], [-1, -1], [0, 1]])
    found = score(logits, answers, wrongs)
    for row in range(5):
        values = logits[row, 0].numpy()
        right = [a for a in answers[row, 0].tolist() if a >= 0]
        wrong = [w for w in wrongs[row].tolist() if w >= 0]
        if not right:
            assert all(found[name][row].isnan() for name in found)
            continue
        said = logsumexp(values[right])
        assert found["logprob"][row] == pytest.approx(said - logsumexp(values))
        above = (values > values[right].max()).sum()
        assert found["reciprocal_rank"][row] == pytest.approx(1 / (1 + above))
        assert found["accuracy"][row] == (above == 0)
        if wrong:
            assert found["logit_diff"][row] == pytest.approx(said - logsumexp(values[wrong]))
        else:
            assert found["logit_diff"][row].isnan()


def test_nan_is_no_success():
    logits = drawn(2, 1, 9)
    logits[0, 0, 3] = torch.nan
    found = score(logits, torch.full((2, 1, 1), 4), torch.full((2, 1), 5), logits)
    for name in ("accuracy", "reciprocal_rank", "logprob", "prob", "kl"):
        assert found[name][0].isnan()
        assert not found[name][1].isnan()
