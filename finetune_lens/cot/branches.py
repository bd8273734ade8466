"""What would a model answer if its chain stopped here? Every truncation of a chain, scored from one pass.

A chain c cut at positions t_1 < … < t_m and continued by a cue and an option, o = (o_1 … o_n), gives

    log p(o | c_{<t_k}, cue) = Σ_j log p(o_j | c_{<t_k}, cue, o_{<j})

for all k from one pass over the whole chain, whose keys and values are kept, and one over all cues and options as
branches of it (`tree`). What continuations of a truncation share is computed once, the last token of an option not at
all. Where a model's branches would not give what texts of their own give (`tree.unpackable`), each truncation gets a
forward pass of its own: the same numbers, slower.

Cost: chain and branch tokens once each, unembedded where they are read: about 1.3 forward passes over a chain of 20
steps of 15 tokens, with a cue of 5 and options of 1, against 12 for 21 passes (benchmarks/cot.py). Memory: keys and
values of chain and branches.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> model = ModelPair.load(folder / "base", folder / "full").base
>>> laid = lay_out(model.tokenizer, ["<copy>gafbdz=gaf"], [["<copy>gafbdz=", "<copy>gafbdz=ga"]], "", [("g", "f")])
>>> score_branches(model, laid.prefixes, laid.cuts, laid.branches).argmax(-1)
array([[0, 1]])
>>> [[answer.text for answer in row] for row in greedy(model, laid.prefixes, laid.cuts, laid.cues, max_tokens=9)]
[['gafbdz', 'fbdz']]
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune_lens.cot.generate import Ends, Written, greedy_choice, trained_length, write
from finetune_lens.cot.layout import Branch, Layout, lay_out
from finetune_lens.cot.tree import Tree, unpackable
from finetune_lens.errors import InputError
from finetune_lens.hooked import HookedModel

__all__ = ["Branch", "Layout", "greedy", "lay_out", "score_branches", "unpackable"]
COLUMNS = {"cpu": 4096, "cuda": 32768}  # tokens in a forward pass


def score_branches(
    model: HookedModel,
    prefixes: Sequence[Sequence[int]],
    cuts: Sequence[Sequence[int]],
    branches: Sequence[Sequence[Sequence[Branch]]],
    *,
    packed: bool | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Summed log-probability (nats) of the scored tokens of each branch: (row, cut, option), NaN where there is none.

    Args:
        prefixes: token ids of prompt and whole chain.
        cuts: of each row: how many of its tokens come before each branching.
        branches: of each row and cut: the continuations, of whose tokens the last `scored` count.
        packed: all branches of a row in one pass; False gives each (row, cut) a forward pass of its own, None whatever
            `unpackable` allows.
        batch_size: rows at once; by default as many as `COLUMNS` tokens hold, fewer where memory does not.

    Raises:
        InputError: a cut outside its row, a branch without scored tokens or before the first token, more tokens than
            the model reads.
    """
    longest = _require_branches(model, prefixes, cuts, branches)
    if packed is None:
        packed = not unpackable(model, longest)
    plan = _packed if packed else _apart
    plans = [p for row, given in enumerate(zip(prefixes, cuts, branches, strict=True)) for p in plan(row, *given)]
    options = max((len(found) for row in branches for found in row), default=0)
    scores = np.full((len(prefixes), max(map(len, cuts), default=0), options), np.nan)
    for row, cut, option in ((p.row, read.cut, read.option) for p in plans for read in p.reads):
        scores[row, cut, option] = 0.0

    def work(batch: list[_Plan]) -> None:
        for p, values in zip(batch, _scored(model, batch), strict=True):
            for read, value in zip(p.reads, values, strict=True):
                scores[p.row, read.cut, read.option] += value

    _in_batches(plans, work, model, batch_size, progress)
    return scores


def greedy(
    model: HookedModel,
    prefixes: Sequence[Sequence[int]],
    cuts: Sequence[Sequence[int]],
    cues: Sequence[Sequence[Sequence[int]]],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    packed: bool | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> list[list[Written]]:
    """What the model writes after each truncation and its cue, by likeliest tokens: of each row, by cut.

    Args:
        cues: of each row and cut: the tokens between the truncation and the answer.
        max_tokens, stop: of an answer, as in `generate.sample`; the others as in `score_branches`.

    Raises:
        InputError: as `score_branches`; a truncation that leaves no room for an answer.

    Cost: that of `score_branches`, then one token a pass and unfinished answer.
    """
    ends = Ends(model, stop, max_tokens)
    asked = [[[Branch((*cue, 0), 1)] for cue in row] for row in cues]  # whatever comes next is read behind the cue
    longest = _require_branches(model, prefixes, cuts, asked)
    if packed is None:
        packed = not unpackable(model, longest + max_tokens * max(map(len, cuts), default=0))
    plan = _packed if packed else _apart
    plans = [p for row, given in enumerate(zip(prefixes, cuts, asked, strict=True)) for p in plan(row, *given)]
    found: dict[tuple[int, int], Written] = {}
    for p in plans:
        for read in p.reads:
            ends.require_room(p.text(read.node), f"row {p.row}, truncation {read.cut} with its cue,")

    def work(batch: list[_Plan]) -> None:
        if packed:
            found.update(_answers(model, batch, ends))
            return
        keys = [(p.row, p.reads[0].cut) for p in batch]
        write(
            model, [p.trunk for p in batch], range(len(batch)), greedy_choice, ends,
            lambda i, written: found.update({keys[i]: written}),
        )  # fmt: skip

    _in_batches(plans, work, model, batch_size, progress)
    return [[found[row, k] for k in range(len(at))] for row, at in enumerate(cuts)]


def _require_branches(model: HookedModel, prefixes: Sequence, cuts: Sequence, branches: Sequence) -> int:
    """Refuse what cannot be computed. The most tokens that a row and its branches have together."""
    if not len(prefixes) == len(cuts) == len(branches):
        raise InputError(
            f"expected cuts and branches for each row; found {len(prefixes)} rows, cuts of {len(cuts)} and branches of "
            f"{len(branches)}"
        )
    most = getattr(model.module.config.get_text_config(), "max_position_embeddings", None)
    known = model.module.get_input_embeddings().weight.shape[0]
    longest = 0
    for row, (prefix, at, found) in enumerate(zip(prefixes, cuts, branches, strict=True)):
        if len(at) != len(found):
            raise InputError(f"row {row} has {len(at)} cuts and branches at {len(found)}; expected as many")
        for cut, options in zip(at, found, strict=True):
            if not 0 <= cut <= len(prefix):
                raise InputError(f"row {row} has {len(prefix)} tokens and a cut at {cut}")
            for tokens, scored in options:
                if not 1 <= scored <= len(tokens) or cut + len(tokens) == scored:
                    raise InputError(
                        f"row {row}, cut at {cut}: a branch of {len(tokens)} tokens of which {scored} are scored; "
                        "expected at least one of them, and a token before it"
                    )
                if most and cut + len(tokens) - 1 > most:
                    raise InputError(
                        f"{model.name} reads at most {most} tokens, and row {row} cut at {cut} has {len(tokens)} more; "
                        "take shorter chains (max_tokens)"
                    )
                if max(tokens) >= known:
                    raise InputError(
                        f"{model.name} has embeddings for {known} tokens, and a branch has the token {max(tokens)}; is "
                        "the tokenizer that of another model?"
                    )
        longest = max(longest, len(prefix) + sum(len(tokens) for options in found for tokens, _ in options))
    return longest


def _in_batches(
    plans: list["_Plan"], work: Callable[[list["_Plan"]], None], model: HookedModel, batch_size: int | None,
    progress: bool,
) -> None:  # fmt: skip
    """`work` on plans of about one size, the longest first; fewer at once where memory does not hold them."""
    from tqdm.auto import tqdm

    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch size is at least 1; found {batch_size}")
    todo = sorted(plans, key=lambda plan: -plan.size)
    columns, trained = COLUMNS.get(model.device.type, COLUMNS["cpu"]), trained_length(model)
    with tqdm(total=len(todo), desc="branches", unit="", disable=not progress) as bar:
        while todo:
            batch = todo[: batch_size or max(1, columns // todo[0].size)]
            batch = [
                plan for plan in batch if (plan.size > trained) == (batch[0].size > trained)
            ]  # one embedding for all
            try:
                work(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                torch.cuda.empty_cache()
                batch_size = len(batch) // 2
                continue
            todo = todo[len(batch) :]
            bar.update(len(batch))


class _Read(NamedTuple):
    """A token whose log-probability is read behind a node, and what it counts towards."""

    node: int
    token: int
    cut: int
    option: int


@dataclass
class _Plan:
    """What is computed of one row: a trunk, and nodes that grow behind it, numbered as in a `Tree`."""

    row: int
    trunk: list[int]
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reads: list[_Read] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.trunk) + len(self.tokens)

    def text(self, node: int) -> list[int]:
        """The tokens from the first to this one."""
        grown = node - len(self.trunk)
        return self.trunk[: node + 1] if grown < 0 else [*self.text(self.parents[grown]), self.tokens[grown]]

    def add(self, parent: int, token: int) -> int:
        """A node behind `parent`; its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        return self.size - 1


def _packed(row: int, prefix: Sequence[int], cuts: Sequence[int], branches: Sequence) -> list[_Plan]:
    """One plan: the branches of all cuts behind one trunk; what those of a cut have in common is there once."""
    plan = _Plan(row, list(prefix[: max([1, *cuts])]))
    for k, (cut, options) in enumerate(zip(cuts, branches, strict=True)):
        nodes = {(): cut - 1}
        for option, (tokens, scored) in enumerate(options):
            for i, token in enumerate(tokens):
                node = nodes[tokens[:i]]
                if i >= len(tokens) - scored:
                    plan.reads.append(_Read(node, token, k, option))
                if i < len(tokens) - 1 and tokens[: i + 1] not in nodes:
                    nodes[tokens[: i + 1]] = plan.add(node, token)
    return [plan] if plan.reads else []


def _apart(row: int, prefix: Sequence[int], cuts: Sequence[int], branches: Sequence) -> list[_Plan]:
    """A plan without branches for each cut, and for each option of it whose tokens but the last are others."""
    plans = []
    for k, (cut, options) in enumerate(zip(cuts, branches, strict=True)):
        bodies: dict[tuple[int, ...], _Plan] = {}
        for option, (tokens, scored) in enumerate(options):
            plan = bodies.setdefault(tokens[:-1], _Plan(row, [*prefix[:cut], *tokens[:-1]]))
            first = len(tokens) - scored
            plan.reads += [_Read(cut + i - 1, tokens[i], k, option) for i in range(first, len(tokens))]
        plans += bodies.values()
    return plans


def _passes(tree: Tree, plans: list[_Plan]) -> Iterator[tuple[list[tuple[int, int, int]], Tensor]]:
    """Run the trunks, then what grows behind them. For each: (row, place, which read) of what is read, and the logits.

    The logits are (row, place, vocab).
    """
    for grown in (False, True)[: 1 + any(plan.tokens for plan in plans)]:
        nodes = [sorted({r.node for r in plan.reads if (r.node >= len(plan.trunk)) == grown}) for plan in plans]
        if grown:
            logits = tree.grow([plan.tokens for plan in plans], [plan.parents for plan in plans], nodes)
        else:
            logits = tree.start(nodes)
        places = [{node: place for place, node in enumerate(found)} for found in nodes]
        yield (
            [
                (row, places[row][read.node], i)
                for row, plan in enumerate(plans)
                for i, read in enumerate(plan.reads)
                if read.node in places[row]
            ],
            logits,
        )


def _scored(model: HookedModel, plans: list[_Plan]) -> list[np.ndarray]:
    """The log-probabilities that each plan reads, in their order."""
    values = [np.empty(len(plan.reads)) for plan in plans]
    for at, logits in _passes(Tree(model, [p.trunk for p in plans], grows=any(p.tokens for p in plans)), plans):
        index = [(row, place, plans[row].reads[i].token) for row, place, i in at]
        rows, places, tokens = torch.tensor(index, dtype=torch.int64, device=logits.device).reshape(-1, 3).T
        found = logits[rows, places, tokens] - logits.logsumexp(-1)[rows, places]
        for (row, _, i), value in zip(at, found.tolist(), strict=True):
            values[row][i] = value
    return values


def _answers(model: HookedModel, plans: list[_Plan], ends: Ends) -> dict[tuple[int, int], Written]:
    """By (row, cut): what is written behind each node that is read, all in one tree."""
    tree = Tree(model, [plan.trunk for plan in plans])
    chosen: list[dict[int, int]] = [{} for _ in plans]  # by read: the next token
    for at, logits in _passes(tree, plans):
        best = logits.argmax(-1).tolist()
        for row, place, i in at:
            chosen[row][i] = best[row][place]
    texts = [[plan.text(read.node) for read in plan.reads] for plan in plans]
    tokens: list[list[list[int]]] = [[[] for _ in plan.reads] for plan in plans]
    at = [[read.node for read in plan.reads] for plan in plans]
    found = {}
    while True:
        going: list[list[int]] = [[] for _ in plans]
        for row, plan in enumerate(plans):
            for i, token in chosen[row].items():
                tokens[row][i].append(token)
                written = ends.of(texts[row][i], tokens[row][i])
                if written is None:
                    going[row].append(i)
                else:
                    found[plan.row, plan.reads[i].cut] = written
        if not any(going):
            return found
        new = [list(range(tree.nodes(row), tree.nodes(row) + len(live))) for row, live in enumerate(going)]
        parents = [[at[row][i] for i in live] for row, live in enumerate(going)]
        logits = tree.grow([[chosen[row][i] for i in live] for row, live in enumerate(going)], parents, new)
        best = logits.argmax(-1).tolist()
        for row, live in enumerate(going):
            chosen[row] = dict(zip(live, best[row], strict=False))
            for i, node in zip(live, new[row], strict=True):
                at[row][i] = node
