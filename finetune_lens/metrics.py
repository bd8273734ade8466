"""What a model says of an answer: logit difference, probability, rank, KL. Higher = more of the answer.

All from the logits at the columns that predict the answer. With several accepted answers their logits are joined by
logsumexp, so that probabilities add; an answer of several tokens is scored by its summed log-probability.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

METRICS = {
    "logit_diff": "logit of the answer − logit of the wrong answer",
    "logprob": "log-probability of the answer (nats)",
    "prob": "probability of the answer",
    "reciprocal_rank": "1 / (1 + number of tokens with a higher logit than the answer)",
    "accuracy": "the answer has the highest logit (1 or 0)",
    "kl": "KL(unpatched ‖ patched) of the next token (nats)",
}
DIFFERENTIABLE = ("logit_diff", "logprob", "prob", "kl")


def score(
    logits: Float[Tensor, "row step vocab"],
    answers: Int[Tensor, "row step alternative"],
    wrongs: Int[Tensor, "row wrong"],
    reference: Float[Tensor, "other step vocab"] | None = None,
    *,
    beside: Int[Tensor, " row"] | None = None,
    only: str | None = None,
) -> dict[str, Float[Tensor, " row"]]:
    """Every metric of METRICS for each row, in float32 or better; NaN where a row has no answer or no wrong answer.

    Args:
        answers: token ids of the accepted answers at each step, -1 where there are none.
        wrongs: ids of the wrong answers' first tokens, -1 where there are none.
        reference: logits that the KL divergence is taken from; without them there is no "kl".
        beside: which row of the reference each row is compared with, rows of one together; by default its own.
        only: compute just this metric.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    answers, wrongs = answers.to(logits.device), wrongs.to(logits.device)
    if not answers.shape[-1]:  # no row has one
        answers = torch.full((*answers.shape[:-1], 1), -1, device=logits.device)
    step = (answers >= 0).any(-1)
    step[:, 0] = True
    known = (answers[:, 0] >= 0).any(-1)
    nan = torch.full_like(logits[:, 0, 0], torch.nan)
    found: dict[str, Tensor] = {}

    def wanted(*names: str) -> bool:
        return only is None or only in names

    right = _joined(logits, answers)  # (row, step)
    logs = logits.log_softmax(-1) if reference is not None and wanted("kl") else None
    if wanted("logit_diff"):
        if wrongs.shape[1] and logits.shape[1] == 1:
            wrong = _joined(logits[:, :1], wrongs[:, None])[:, 0]
            both = known & (wrongs >= 0).any(-1)
            found["logit_diff"] = torch.where(both, right[:, 0] - wrong, nan)
        else:
            found["logit_diff"] = nan
    if wanted("logprob", "prob"):
        said = right - logits.logsumexp(-1) if logs is None else _joined(logs, answers)
        logprob = torch.where(step, said, torch.zeros_like(right)).sum(1)
        found["logprob"] = torch.where(known, logprob, nan)
        found["prob"] = found["logprob"].exp()
    if wanted("reciprocal_rank", "accuracy"):
        best = torch.where(answers >= 0, logits.gather(-1, answers.clamp_min(0)), -torch.inf).amax(-1, keepdim=True)
        above = torch.where(step, (logits > best).sum(-1), 0).amax(1)
        known = known & ~torch.isnan(logits.amax(-1)).any(1)  # NaN is above nothing
        found["reciprocal_rank"] = torch.where(known, 1 / (1 + above.to(logits.dtype)), nan)
        found["accuracy"] = torch.where(known, (above == 0).to(logits.dtype), nan)
    if logs is not None:
        theirs = reference.to(logs).log_softmax(-1)
        apart = _divergence(theirs, logs) if beside is None else _from_each(theirs, logs, beside)
        found["kl"] = torch.where(step, apart, torch.zeros_like(right)).sum(1)
    return {name: found[name] for name in METRICS if name in found and wanted(name)}


def kl(reference: Float[Tensor, "*row vocab"], logits: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
    """KL(reference ‖ logits) in nats, of the distributions that the logits stand for."""
    return _divergence(reference.to(logits.dtype).log_softmax(-1), logits.log_softmax(-1))


def _divergence(p: Float[Tensor, "*some vocab"], q: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
    """KL of log-probabilities; a token that p never says does not count, whatever q makes of it."""
    gap, never = p - q, p == -torch.inf
    if never.any():
        gap = torch.where(never, torch.zeros_like(gap), gap)
    return (p.exp() * gap).sum(-1)


def _from_each(
    p: Float[Tensor, "other step vocab"], q: Float[Tensor, "row step vocab"], beside: Int[Tensor, " row"]
) -> Float[Tensor, "row step"]:
    """The divergence of each row from the one beside it; those of one are taken together, without copies of it."""
    others, counts = torch.unique_consecutive(beside, return_counts=True)
    parts = zip(others.tolist(), q.split(counts.tolist()), strict=True)
    return torch.cat([_divergence(p[other], rows) for other, rows in parts])


def _joined(logits: Float[Tensor, "row step vocab"], ids: Int[Tensor, "row step alternative"]) -> Tensor:
    """logsumexp of the logits of the ids (row, step); -1 stands for none."""
    chosen = logits.gather(-1, ids.clamp_min(0))
    return torch.where(ids >= 0, chosen, -torch.inf).logsumexp(-1)
