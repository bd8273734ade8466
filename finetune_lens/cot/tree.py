"""One pass over texts that share their beginnings: a trunk, and branches behind it that do not see each other.

Keys and values of the trunk are kept. A branch sees the trunk up to where it leaves it, and its own tokens, at the
positions that it would have as a text of its own. The masks are the architecture's own, with sliding windows and chunks
and whatever its layers alternate between: they are asked for the columns in which those tokens would stand. Where that
does not reach the attention, `unpackable` says why.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finetune_lens.cot.generate import left_padded, trained_length
from finetune_lens.hooked import HookedModel


class Tree:
    """Tokens that branch off trunks, a row each, with their keys and values. Each sees its own way back to the root.

    Node i of a row is its i-th token, those of the trunk first, then others as they grew; −1 is before the first.
    """

    def __init__(self, model: HookedModel, trunks: Sequence[Sequence[int]], *, grows: bool = True):
        from transformers import DynamicCache

        self.model, self.trunks = model, trunks
        self.cache = DynamicCache() if grows else None
        self.ids, self.there = left_padded(trunks)
        width = self.ids.shape[1]
        self.padding = [width - len(trunk) for trunk in trunks]
        self.columns = torch.arange(width).repeat(len(trunks), 1)  # where each token would stand in a text of its own
        # Of each row, by node behind the trunk: how much of the trunk it sees, and the columns of its own branch.
        self.ways: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in trunks]

    def nodes(self, row: int) -> int:
        """How many the row has."""
        return len(self.trunks[row]) + len(self.ways[row])

    def start(self, reads: Sequence[Sequence[int]]) -> Tensor:
        """Run the trunks. Logits behind these nodes of each row: (row, read, vocab), in float32 or better."""
        inputs = self.model.inputs(self.ids, self.there)
        if self.cache is not None:
            inputs |= {"past_key_values": self.cache, "use_cache": True}
        return self._forward(inputs, [[p + n for n in nodes] for p, nodes in zip(self.padding, reads, strict=True)])

    def grow(
        self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]], reads: Sequence[Sequence[int]]
    ) -> Tensor:
        """Add nodes behind others, of which some may be among them. Logits behind these new nodes, as `start`."""
        begin, width, rows = self.columns.shape[1], max(map(len, tokens)), len(tokens)
        ids, columns = torch.zeros(2, rows, width, dtype=torch.int64)
        sees = torch.zeros(rows, width, begin + width, dtype=torch.bool)
        sees[:, range(width), range(begin, begin + width)] = True  # padding too: what sees nothing is NaN in some
        first = [self.nodes(row) for row in range(rows)]
        for row, (found, above) in enumerate(zip(tokens, parents, strict=True)):
            ways, trunk, padding = self.ways[row], len(self.trunks[row]), self.padding[row]
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
            for i, parent in enumerate(above):
                cut, way = ways[parent - trunk] if parent >= trunk else (parent + 1, ())
                way = (*way, begin + i)
                ways.append((cut, way))
                columns[row, i] = padding + cut + len(way) - 1
                sees[row, i, padding : padding + cut] = True
                sees[row, i, list(way)] = True
        self.columns = torch.cat([self.columns, columns], 1)
        self.there = torch.cat([self.there, torch.ones(rows, width, dtype=torch.bool)], 1)
        device = self.model.device
        inputs = {
            "input_ids": ids.to(device), "attention_mask": self.there.to(device).long(),
            "position_ids": (columns - torch.tensor(self.padding)[:, None]).clamp_min(0).to(device),
            "past_key_values": self.cache, "use_cache": True,
        }  # fmt: skip
        at = [[n - f for n in nodes] for f, nodes in zip(first, reads, strict=True)]
        with _seen(self.columns.to(device), sees.to(device)):
            return self._forward(inputs, at)

    def _forward(self, inputs: Mapping[str, Any], reads: Sequence[Sequence[int]]) -> Tensor:
        at = torch.zeros(len(reads), max(map(len, reads)), dtype=torch.int64)
        for row, columns in enumerate(reads):
            at[row, : len(columns)] = torch.tensor(columns, dtype=torch.int64)
        with self.model.side(), torch.no_grad(), self.model.logits_at(at):
            logits = self.model.module(**inputs).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _seen(columns: Tensor, sees: Tensor) -> Iterator[None]:
    """Within: attention masks are made for the columns in which tokens would stand, of what each is to see.

    Args:
        columns: (row, key) of all tokens.
        sees: (row, query, key) of the last ones.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    first = columns.shape[1] - sees.shape[1]

    def making(original: Callable) -> Callable:
        def make(*args: Any, mask_function: Callable, allow_is_causal_skip: bool = False, **kwargs: Any) -> Any:
            def function(row: Any, head: Any, query: Any, key: Any) -> Any:
                own = mask_function(row, head, columns[row, query], columns[row, key])
                return own & sees[row, query - first, key]

            return original(*args, mask_function=function, allow_is_causal_skip=False, **kwargs)

        return make

    before = dict(MASKS._local_mapping)
    for name in [*MASKS]:
        MASKS[name] = making(MASKS[name])
    try:
        yield
    finally:
        MASKS._local_mapping.clear()
        MASKS._local_mapping.update(before)


def unpackable(model: HookedModel, columns: int) -> str:
    """Why branches of rows of so many tokens do not give what texts of their own give in this model; "" if they do.

    Cost: 28 tokens in three forward passes, which show whether its attention goes by mask and positions.
    """
    if not model.takes("position_ids"):
        return f"{model.name} is not told positions"
    config = model.module.config.get_text_config()
    takes = inspect.signature(model.anatomy.blocks[0].module.forward).parameters
    if {"alibi", "position_bias"} & takes.keys() and getattr(config, "alibi", True):
        return f"{model.name} adds biases to its attention by column (ALiBi)"
    if columns > (trained := trained_length(model)):
        return f"the rotary embedding of {model.name} changes in texts of more than {trained:.0f} tokens"
    tempered = any(getattr(part, "attn_temperature_tuning", False) for part in model.module.modules())
    if tempered and columns >= config.floor_scale:
        return f"{model.name} scales its attention by column in texts of {config.floor_scale:.0f} tokens and more"
    text = [(3 + 7 * i) % model.vocabulary for i in range(8)]
    tail, cuts = [token % model.vocabulary for token in (5, 8)], (2, 6)
    tree = Tree(model, [text])
    tree.start([[]])
    found = tree.grow([tail * 2], [[cuts[0] - 1, 8, cuts[1] - 1, 10]], [[9, 11]])[0]
    apart = Tree(model, [text[:cut] + tail for cut in cuts], grows=False).start([[cut + 1] for cut in cuts])[:, 0]
    error = (found - apart).abs().amax(-1).min()  # in one of them a router may tip over
    if error > torch.finfo(model.dtype).eps ** 0.5 * apart.std():
        return f"the attention of {model.name} does not go by mask and positions alone"
    return ""
