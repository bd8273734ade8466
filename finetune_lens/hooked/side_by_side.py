"""Two models on the same texts: what each predicts at every token, and what it would predict after every block.

The residual stream is kept at every block and read out some positions at a time, so that the logits of all positions
are never in memory together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from finetune_lens.errors import InputError
from finetune_lens.hooked.model import HookedModel, Run
from finetune_lens.hooked.reentry import read_out
from finetune_lens.hooked.sites import site_name
from finetune_lens.hooked.sweep import TOLERANCE
from finetune_lens.metrics import METRICS, kl, score
from finetune_lens.prompts import Encoded

READ = 1 << 24  # logits held at once
MEASURES = ("kl", "kl_reverse", "js", "flip")  # of the two distributions at a position
EACH = ("entropy", "loss", "top", "top_prob")  # of each side's


@dataclass(frozen=True)
class Reading:
    """One side: a model, its encoding of the texts, and which of its columns are compared, in order, a list a text."""

    model: HookedModel
    prompts: Encoded
    columns: list[np.ndarray]

    def rows(self, index: np.ndarray) -> "Reading":
        return Reading(self.model, self.prompts.rows(index), [self.columns[i] for i in index])


def compare(base: Reading, tuned: Reading, *, lens: bool) -> dict[str, np.ndarray]:
    """Measure both sides on some texts.

    Returns:
        kl, kl_reverse, js, flip (example, position); entropy, loss, top (token id), top_prob (side, example, position);
        M of METRICS (side, example); shift (example, vocab): mean over the positions of p_tuned − p_base, and base_prob
        (vocab): the sum over texts of the base's mean; of the lens: lens_loss, lens_agreement, lens_answer
        (side, depth, example) and lens_kl (depth, example). NaN where a text has no such position or answer.

    Raises:
        InputError: a model whose final norm and unembedding cannot be run by themselves.

    Cost: a forward pass a side, and for the lens an unembedding of every position at every block.
    """
    sides = (base, tuned)
    names = [[site_name("resid_pre", n) for n in range(s.model.layers)] for s in sides]
    last = [site_name("resid_post", s.model.layers - 1) for s in sides]
    runs = [
        s.model.run(
            s.prompts.ids, mask=s.prompts.mask, capture=[*(n if lens else []), end], logits_at=s.prompts.read_at
        )
        for s, n, end in zip(sides, names, last, strict=True)
    ]
    for side, run, end in zip(sides, runs, last, strict=True):
        _require_read_out(side, run, end)
    vocabulary = min(s.model.vocabulary for s in sides)
    depths = [
        [run.cache[n] for n in ([*stack, end] if lens else [end])]
        for run, stack, end in zip(runs, names, last, strict=True)
    ]
    targets = _next_tokens(base)
    found = _positions(sides, [d[-1] for d in depths], targets, vocabulary)
    found |= _answers(sides, runs, vocabulary)
    if lens:
        found |= _lens(sides, depths, targets, found["top"], vocabulary)
    return found


def _require_read_out(side: Reading, run: Run, end: str) -> None:
    """Raise unless the last residual stream, read out by itself, gives the run's own logits."""
    residual = run.cache[end]
    at = side.prompts.read_at[:, 0]
    rows = torch.arange(len(residual), device=residual.device)
    again = read_out(side.model, residual[rows, at.to(residual.device)])
    expected = run.logits[:, 0]
    finite = torch.isfinite(expected)
    if not finite.any():
        return
    off = float((again - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1))
    if not off <= TOLERANCE[expected.dtype]:
        raise InputError(
            f"{side.model.name}: its last residual stream does not give its logits by itself (off by {off:.2g} of the "
            "largest); more than that reaches the unembedding in this architecture, which is not supported here"
        )


def _next_tokens(side: Reading) -> list[np.ndarray]:
    """The token after each compared column, where it is compared too or is the text's own; −1 at a text's end."""
    found = []
    for row, columns in enumerate(side.columns):
        ids, text = side.prompts.ids[row].numpy(), side.prompts.prompt_columns[row].numpy()
        following = np.full(len(columns), -1)
        for at, column in enumerate(columns):
            if column + 1 < len(ids) and text[column + 1] and (at + 1 < len(columns)):
                following[at] = ids[column + 1]
        found.append(following)
    return found


def _flat(columns: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Row and column of every compared position, text by text."""
    rows = np.repeat(np.arange(len(columns)), [len(c) for c in columns])
    return torch.from_numpy(rows), torch.from_numpy(np.concatenate(columns).astype(np.int64))


def _blocks(count: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, READ // vocabulary)
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def _picked(residual: Tensor, at: tuple[Tensor, Tensor], block: slice) -> Tensor:
    return residual[at[0][block].to(residual.device), at[1][block].to(residual.device)]


def _logprobs(model: HookedModel, residual: Tensor, vocabulary: int, device: torch.device) -> Float[Tensor, "n vocab"]:
    """Over the tokens that both models have, in float32 or better."""
    logits = read_out(model, residual)[:, :vocabulary].to(device)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _positions(
    sides: tuple[Reading, Reading], residuals: list[Tensor], targets: list[np.ndarray], vocabulary: int
) -> dict[str, np.ndarray]:
    at = [_flat(side.columns) for side in sides]
    target, device = torch.from_numpy(np.concatenate(targets)), sides[0].model.device
    count, texts = len(target), len(targets)
    lengths = torch.tensor([len(t) for t in targets])
    values = {name: torch.empty(count, dtype=torch.float64) for name in MEASURES}
    values |= {name: torch.empty(2, count, dtype=torch.float64) for name in EACH}
    shift = torch.zeros(texts, vocabulary, device=device)
    base_prob = torch.zeros(vocabulary, device=device)
    for block in _blocks(count, vocabulary):
        one, other = (
            _logprobs(side.model, _picked(residual, where, block), vocabulary, device)
            for side, residual, where in zip(sides, residuals, at, strict=True)
        )
        p, q = one.exp(), other.exp()
        middle = torch.logaddexp(one, other) - np.log(2)
        values["kl"][block], values["kl_reverse"][block] = kl(one, other).cpu(), kl(other, one).cpu()
        values["js"][block] = ((kl(one, middle) + kl(other, middle)) / 2).cpu()
        wanted = target[block].to(device)
        for s, logs in enumerate((one, other)):
            probabilities = p if s == 0 else q
            top = logs.max(-1)
            values["entropy"][s, block] = (
                -torch.where(logs == -torch.inf, 0, probabilities * logs).sum(-1).double().cpu()
            )
            picked = -logs.gather(-1, wanted.clamp(0, vocabulary - 1)[:, None])[:, 0]
            values["loss"][s, block] = (
                torch.where((wanted >= 0) & (wanted < vocabulary), picked, torch.nan).double().cpu()
            )
            values["top"][s, block] = torch.where(top.values.isnan(), torch.nan, top.indices.double()).cpu()
            values["top_prob"][s, block] = top.values.exp().double().cpu()
        rows = at[0][0][block]
        weight = (1 / lengths[rows]).to(device, p.dtype)[:, None]
        shift.index_add_(0, rows.to(device), ((q - p) * weight).to(shift.dtype))
        base_prob += (p * weight).sum(0).to(base_prob.dtype)
    base_top, tuned_top = values["top"]
    values["flip"] = torch.where((base_top + tuned_top).isnan(), torch.nan, (base_top != tuned_top).double())
    ends = np.cumsum(lengths.numpy())[:-1]

    def by_text(flat: Tensor) -> np.ndarray:
        """Padded with NaN (…, example, position)."""
        parts = np.split(flat.numpy(), ends, axis=-1)
        stacked = np.full((*flat.shape[:-1], texts, int(lengths.max())), np.nan)
        for i, part in enumerate(parts):
            stacked[..., i, : part.shape[-1]] = part
        return stacked

    return {name: by_text(flat) for name, flat in values.items()} | {
        "shift": shift.cpu().numpy(),
        "base_prob": base_prob.cpu().numpy(),
    }


def _answers(sides: tuple[Reading, Reading], runs: list[Run], vocabulary: int) -> dict[str, np.ndarray]:
    """METRICS but KL, (side, example), over the tokens that both models have."""
    found = [
        score(run.logits[..., :vocabulary], side.prompts.answers, side.prompts.wrongs)
        for side, run in zip(sides, runs, strict=True)
    ]
    return {m: np.stack([f[m].double().cpu().numpy() for f in found]) for m in METRICS if m != "kl" and m in found[0]}


def _lens(
    sides: tuple[Reading, Reading], depths: list[list[Tensor]], targets: list[np.ndarray], top: np.ndarray,
    vocabulary: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Of every depth: means over the positions of each text, and the answer at its place."""
    at = [_flat(side.columns) for side in sides]
    texts, device = len(targets), sides[0].model.device
    target = torch.from_numpy(np.concatenate(targets))
    rows = at[0][0]
    final = [torch.from_numpy(np.concatenate([row[: len(t)] for row, t in zip(s, targets, strict=True)])) for s in top]
    has_next = (target >= 0) & (target < vocabulary)
    positions, with_next = (torch.bincount(r, minlength=texts).double() for r in (rows, rows[has_next]))
    found = {n: np.full((2, len(depths[0]), texts), np.nan) for n in ("lens_loss", "lens_agreement", "lens_answer")}
    found["lens_kl"] = np.full((len(depths[0]), texts), np.nan)
    for depth in range(len(depths[0])):
        totals = torch.zeros(5, texts, dtype=torch.float64)  # loss and agreement of each side, KL
        for block in _blocks(len(rows), vocabulary):
            both = [
                _logprobs(side.model, _picked(d[depth], where, block), vocabulary, device)
                for side, d, where in zip(sides, depths, at, strict=True)
            ]
            wanted = target[block].clamp(0, vocabulary - 1).to(device)
            for s, logs in enumerate(both):
                loss = -logs.gather(-1, wanted[:, None])[:, 0].double().cpu()
                totals[s].index_add_(0, rows[block], torch.where(has_next[block], loss, 0.0))
                agreed = (logs.argmax(-1).cpu() == final[s][block]).double()
                totals[2 + s].index_add_(0, rows[block], agreed.where(~final[s][block].isnan(), torch.nan))
            totals[4].index_add_(0, rows[block], kl(*both).double().cpu())
        found["lens_loss"][:, depth] = (totals[:2] / with_next).numpy()  # 0 / 0: a text of one token
        found["lens_agreement"][:, depth] = (totals[2:4] / positions).numpy()
        found["lens_kl"][depth] = (totals[4] / positions).numpy()
        for s, side in enumerate(sides):
            found["lens_answer"][s, depth] = _answer_at(side, depths[s][depth], vocabulary)
    return found


def _answer_at(side: Reading, residual: Tensor, vocabulary: int) -> np.ndarray:
    """The log-probability of the answer, read out from the residual stream at the columns where it is predicted."""
    read_at = side.prompts.read_at
    rows = torch.arange(len(residual))[:, None].expand_as(read_at)
    picked = residual[rows.to(residual.device), read_at.to(residual.device)]
    logits = read_out(side.model, picked.flatten(0, 1)).unflatten(0, read_at.shape)[..., :vocabulary]
    return score(logits, side.prompts.answers, side.prompts.wrongs, only="logprob")["logprob"].double().cpu().numpy()
