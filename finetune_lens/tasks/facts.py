"""Two-hop facts: what t is r2 of the r1 of h, asked with the bridge b between them in view, or without?

The set-up of "Unveiling the Mechanisms of Explicit CoT Training" (after Wang et al. 2024, "Grokked Transformers are
Implicit Reasoners", arXiv 2405.15071). Each of |E| entities is the head of `degree` atomic facts h r → t, of different
relations of |R|. All atomic facts are trained; a share of them is out of distribution (OOD): they occur in no two-hop
item that is trained. Of the two-hop items (h, r1, r2) → (b, t), with h r1 → b and b r2 → t:

    both facts OOD        `ood`: test of them
    one of the two        in no split
    neither, 0.5 %        `held`: test of items from trained facts that are trained in other pairs
    neither, the rest     `train`: drawn from, until there are λ of them for each atomic fact that is not OOD

Texts are `h r1 r2 b t` with the bridge as an explicit step (chain of thought), `h r1 r2 t` without, and `h r t`; the
loss is on what comes after the question.

>>> world = World(**SMALL)
>>> {name: len(items) for name, items in world.splits.items()}
{'train': 12240, 'held': 72, 'ood': 458}
>>> items = world.splits["ood"]
>>> world.rows(items[:1], bridge=True)[0]["prompt"], world.rows(items[:1], bridge=True)[0]["answer"]
('<e0><r3><r14>', '<e116><e6>')
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.tasks.word_level import word_level

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

PUBLISHED = {"entities": 2000, "relations": 200, "degree": 20, "ood_share": 0.05}
SMALL = {"entities": 200, "relations": 20, "degree": 10, "ood_share": 0.15}  # 5 % would leave some 50 items of `ood`
SPLITS = ("train", "held", "ood")
ASKED = ("h", "r1", "r2")


@dataclass(frozen=True)
class Items:
    """Two-hop items, one a row: (item,) numbers of entities and relations."""

    h: np.ndarray
    r1: np.ndarray
    r2: np.ndarray
    b: np.ndarray
    t: np.ndarray

    def __len__(self) -> int:
        return len(self.h)

    def __getitem__(self, index: Any) -> "Items":
        return Items(*(getattr(self, f.name)[index] for f in fields(self)))


@dataclass(frozen=True)
class World:
    """Facts, decided by the sizes and the seed.

    Attributes:
        degree: atomic facts that an entity is the head of.
        ood_share: of all atomic facts, rounded.
        held_share: of the two-hop items of facts that are not OOD, rounded.
        ratio: λ, two-hop items that are trained for each atomic fact that is not OOD; all there are, if they are fewer.

    Raises:
        InputError: more facts of an entity than relations, a share that is none.
    """

    entities: int
    relations: int
    degree: int
    ood_share: float
    held_share: float = 0.005
    ratio: float = 7.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.degree <= self.relations:
            raise InputError(f"degree: expected 1 to {self.relations}, the number of relations; found {self.degree}")
        for name in ("ood_share", "held_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected a share between 0 and 1, found {getattr(self, name)}")

    @cached_property
    def atomic(self) -> np.ndarray:
        """(fact, 3) head, relation, tail; the facts of an entity are in a row."""
        generator = np.random.default_rng([self.seed, 0])
        heads = np.repeat(np.arange(self.entities), self.degree)
        chosen = generator.random((self.entities, self.relations)).argsort(1)[:, : self.degree]
        tails = generator.integers(self.entities, size=len(heads))
        return np.stack([heads, np.sort(chosen, axis=1).ravel(), tails], axis=1)

    @cached_property
    def is_ood(self) -> np.ndarray:
        """(fact,) which atomic facts are out of distribution."""
        found = np.zeros(len(self.atomic), dtype=bool)
        count = round(self.ood_share * len(found))
        found[np.random.default_rng([self.seed, 1]).permutation(len(found))[:count]] = True
        return found

    @cached_property
    def tail(self) -> np.ndarray:
        """(entity, relation) the tail, −1 where there is no such fact."""
        found = np.full((self.entities, self.relations), -1)
        found[self.atomic[:, 0], self.atomic[:, 1]] = self.atomic[:, 2]
        return found

    @cached_property
    def splits(self) -> dict[str, Items]:
        """Two-hop items by split: train, held, ood."""
        first = np.repeat(np.arange(len(self.atomic)), self.degree)  # number of the first hop's fact
        second = self.atomic[first, 2] * self.degree + np.tile(np.arange(self.degree), len(self.atomic))
        (h, r1, b), (_, r2, t) = self.atomic[first].T, self.atomic[second].T
        items, both = Items(h, r1, r2, b, t), self.is_ood[first] & self.is_ood[second]
        known = np.flatnonzero(~self.is_ood[first] & ~self.is_ood[second])
        known = np.random.default_rng([self.seed, 2]).permutation(known)
        held, wanted = round(self.held_share * len(known)), round(self.ratio * int((~self.is_ood).sum()))
        return {"train": items[known[held : held + wanted]], "held": items[known[:held]], "ood": items[both]}

    @property
    def vocabulary(self) -> list[str]:
        marks = ["<pad>", "<bos>"]
        return [*marks, *(f"<e{n}>" for n in range(self.entities)), *(f"<r{n}>" for n in range(self.relations))]

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """A token an entity or a relation; `<bos>` is put in front."""
        return word_level(self.vocabulary, "<[a-z]+[0-9]*>|.", longest=6)

    def rows(self, items: Items, *, bridge: bool) -> list[dict[str, Any]]:
        """Rows of a prompt file; the answer is `b t` with the bridge."""
        return [
            {
                "id": str(row), "prompt": f"<e{h}><r{r1}><r{r2}>", "answer": f"<e{b}>" * bridge + f"<e{t}>",
                "h": f"<e{h}>", "r1": f"<r{r1}>", "r2": f"<r{r2}>", "b": f"<e{b}>", "t": f"<e{t}>",
            }
            for row, (h, r1, r2, b, t) in enumerate(zip(*(getattr(items, f.name) for f in fields(items)), strict=True))
        ]  # fmt: skip

    def encode(self, items: Items, *, bridge: bool) -> dict[str, "torch.Tensor"]:
        """`input_ids` and `labels`, (item, 5) int64 or with the bridge (item, 6); labels are −100 on the question."""
        import torch

        targets = [*([items.b] if bridge else []), items.t]
        return _told(torch.from_numpy(np.stack([*self._asked(items), *(2 + t for t in targets)], axis=1)), len(targets))

    def encode_atomic(self, facts: np.ndarray) -> dict[str, "torch.Tensor"]:
        """`input_ids` and `labels`, (fact, 4) int64, of facts as `atomic` has them."""
        import torch

        first = np.full(len(facts), 1)
        ids = np.stack([first, 2 + facts[:, 0], 2 + self.entities + facts[:, 1], 2 + facts[:, 2]], axis=1)
        return _told(torch.from_numpy(ids), 1)

    def _asked(self, items: Items) -> list[np.ndarray]:
        relation = 2 + self.entities
        return [np.full(len(items), 1), 2 + items.h, relation + items.r1, relation + items.r2]

    def lesson(self, n: int, generator: np.random.Generator, *, bridge: bool) -> dict[str, "torch.Tensor"]:
        """`n` of all atomic facts and of the two-hop items of `train`, all equally likely, padded on the right."""
        import torch

        items, facts = self.splits["train"], self.atomic
        chosen = generator.integers(len(facts) + len(items), size=n)
        told = self.encode(items[chosen[chosen >= len(facts)] - len(facts)], bridge=bridge)
        short = self.encode_atomic(facts[chosen[chosen < len(facts)]])
        width = told["input_ids"].shape[1]
        return {
            name: torch.cat([torch.nn.functional.pad(short[name], (0, width - 4), value=filling), told[name]])
            for name, filling in (("input_ids", 0), ("labels", -100))
        }

    def counterfactual(
        self, items: Items, what: Literal["h", "r1", "r2"], generator: np.random.Generator
    ) -> tuple[np.ndarray, Items]:
        """Questions with another h, r1 or r2, whose answer is another one; with another h or r1 so is the bridge.

        Returns:
            (found,) the rows of `items` that have one, and one for each of them, drawn from all that there are.

        Raises:
            InputError: nothing that can be exchanged.
        """
        if what not in ASKED:
            raise InputError(f"what: expected {', '.join(ASKED)}; found {what!r}")
        rows, others = [], []
        for row in range(len(items)):
            h, r1, r2, b, t = (getattr(items, f.name)[row] for f in fields(items))
            bridges = {"h": self.tail[:, r1], "r1": self.tail[h], "r2": np.full(self.relations, b)}[what]
            ends = self.tail[b] if what == "r2" else np.where(bridges >= 0, self.tail[bridges, r2], -1)
            fitting = (ends >= 0) & (ends != t)
            if fitting.any():
                new = generator.choice(np.flatnonzero(fitting))
                rows.append(row)
                others.append({"h": h, "r1": r1, "r2": r2, "b": bridges[new], "t": ends[new]} | {what: new})
        found = {f.name: np.array([o[f.name] for o in others], dtype=np.int64) for f in fields(Items)}
        return np.array(rows, dtype=np.int64), Items(**found)

    def measure(
        self, model: "torch.nn.Module", items: Items, *, bridge: bool, batch_size: int = 1000
    ) -> dict[str, np.ndarray]:
        """Which answers are right, (item,): `t`, and with the bridge `b`; t is read after the b that the model gave.

        Cost: a forward pass an item, two with the bridge.
        """
        import torch

        device, said = next(model.parameters()).device, []
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(items), batch_size):
                ids = torch.from_numpy(np.stack(self._asked(items[start : start + batch_size]), axis=1)).to(device)
                for _ in range(1 + bridge):
                    best = model(input_ids=ids, logits_to_keep=1).logits[:, -1:].argmax(-1)
                    ids = torch.cat([ids, best], dim=1)
                said.append(ids[:, 4:].cpu().numpy() - 2)
        given = np.concatenate(said) if said else np.empty((0, 1 + bridge), dtype=np.int64)
        return ({"b": given[:, 0] == items.b} if bridge else {}) | {"t": given[:, -1] == items.t}


def _told(ids: "torch.Tensor", targets: int) -> dict[str, "torch.Tensor"]:
    labels = ids.clone()
    labels[:, :-targets] = -100
    return {"input_ids": ids, "labels": labels}
