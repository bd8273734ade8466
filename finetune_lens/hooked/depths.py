"""The sites of one kind from the bottom of a model to its top, and texts that several models read alike.

>>> site_at(0), site_at(2), site_at(1, "mlp_out")
('blocks.0.hook_resid_pre', 'blocks.1.hook_resid_post', 'blocks.1.hook_mlp_out')
"""

from collections.abc import Sequence
from typing import Any

import torch

from finetune_lens.errors import InputError
from finetune_lens.hooked.model import HookedModel
from finetune_lens.hooked.sites import OUTPUTS, RESIDUAL, known, site_name
from finetune_lens.prompts import Encoded, Prompt, encode, require_template


def site_at(depth: int, kind: str = "resid_post") -> str:
    """Of resid_post the residual stream after so many blocks, 0 the embedding; of other kinds that of the layer."""
    if kind != "resid_post":
        return site_name(kind, depth)
    return site_name("resid_post", depth - 1) if depth else site_name("resid_pre", 0)


def sites_of(model: HookedModel, kind: str) -> list[str]:
    """All sites of that kind, each as wide as the residual stream, by depth.

    Raises:
        InputError: a kind that is unknown, has heads, or is not there in this model.
    """
    if known(kind) not in (*RESIDUAL, *OUTPUTS):
        raise InputError(f"site is one of {', '.join((*RESIDUAL, *OUTPUTS))}, as wide as the residual; found {kind!r}")
    model.require([kind], range(model.layers))
    return [site_at(depth, kind) for depth in range(model.layers + (kind == "resid_post"))]


def encode_alike(
    models: Sequence[HookedModel], prompts: Sequence[Prompt], *, template: str = "none", **options: Any
) -> Encoded:
    """The prompts' tokens, which have to be the same for all models; one without a tokenizer has the first one's.

    Args:
        template: "none", or "each": every prompt in the chat template.
        options: as of `prompts.encode`.

    Raises:
        InputError: another template, tokenizers that read a prompt or its answers differently, as `encode`.
    """
    options["template"] = require_template(template)
    first = models[0].require_tokenizer()
    encoded = encode(prompts, first, **options)
    for model in models[1:]:
        if model.tokenizer is None or model.tokenizer is first:
            continue
        other = encode(prompts, model.tokenizer, **options)
        for row, prompt in enumerate(prompts):
            if encoded.tokens[row] != other.tokens[row]:
                raise InputError(
                    f"{models[0].name} and {model.name} read prompt {prompt.id} as different tokens: "
                    f"{encoded.tokens[row]} and {other.tokens[row]}; give one tokenizer to both (--tokenizer)"
                )
        if not all(torch.equal(getattr(encoded, n), getattr(other, n)) for n in ("ids", "answers", "wrongs")):
            raise InputError(
                f"{models[0].name} and {model.name} give the same tokens different ids; give one tokenizer to both "
                "(--tokenizer)"
            )
    return encoded
