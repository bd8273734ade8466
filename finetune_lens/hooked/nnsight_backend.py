"""The same capture and edits through nnsight: a second, independent way to the sites, as oracle.

Where a site lies is known from the model's anatomy; reading and writing there is nnsight's own (envoys and its
interleaved forward pass), and shares no code with our hooks.

>>> import torch, transformers
>>> from finetune_lens.hooked import HookedModel
>>> sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 16}
>>> config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
>>> model = HookedModel(transformers.GPT2LMHeadModel(config).eval())
>>> ids, site = torch.tensor([[1, 2, 3]]), "blocks.1.attn.hook_z"
>>> ours, theirs = model.run(ids, capture=[site]), run_with_nnsight(model, ids, capture=[site])
>>> bool(torch.allclose(ours.cache[site], theirs.cache[site]))
True
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from finetune_lens.errors import InputError
from finetune_lens.hooked.model import Edit, HookedModel, Run
from finetune_lens.hooked.sites import parse

# In the order in which a block computes them: nnsight wants to be asked in the order of the forward pass.
ORDER = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


def run_with_nnsight(
    model: HookedModel,
    ids: Int[Tensor, "batch pos"],
    *,
    mask: Bool[Tensor, "batch pos"] | None = None,
    capture: Sequence[str] = (),
    edits: Sequence[Edit] = (),
    logits_at: Int[Tensor, "batch answer"] | None = None,
) -> Run:
    """As `HookedModel.run`: one forward pass with activations kept and replaced, by nnsight.

    Raises:
        InputError: nnsight is not installed; a site that the model does not have, or that is no module's activation
            (pattern, result).

    Cost: as `HookedModel.run`, and all logits are computed.
    """
    try:
        import nnsight
    except ImportError:
        raise InputError("nnsight is not installed; it comes with finetune_lens[remote]") from None

    changes: dict[str, list[Any]] = {}
    for name, change in edits:
        changes.setdefault(name, []).append(change)
    names = list(dict.fromkeys([*capture, *changes]))
    for name in names:
        kind, layer = parse(name)
        if kind not in ORDER:
            raise InputError(f"{name} is computed and not what a module takes or gives: nnsight has no access to it")
        model.require([kind], [layer])
    names.sort(key=lambda name: (parse(name)[1], ORDER.index(parse(name)[0])))
    paths = {module: path for path, module in model.module.named_modules()}
    wrapped = nnsight.NNsight(model.module)
    inputs, kept = model.inputs(ids, mask), {}
    with model.side(), torch.no_grad(), wrapped.trace(**inputs):
        kept = nnsight.save({})
        for name in names:
            kind, layer = parse(name)
            module, end, rows = _where(model, kind, layer)
            envoy = wrapped.get(paths[module])
            whole = envoy.input if end == "input" else envoy.output
            tensor = whole[0] if isinstance(whole, tuple | list) else whole
            flat = tensor if rows is None else tensor[..., rows]
            x = flat.unflatten(0, tuple(ids.shape)) if flat.ndim == 2 else flat  # some are given (batch · pos, d_model)
            if kind in ("q", "k", "v", "z"):
                x = x.unflatten(-1, (-1, model.anatomy.blocks[layer].d_head))
            for change in changes.get(name, ()):
                x = change(x) if callable(change) else change.to(x.device, x.dtype).expand_as(x)
            if name in capture:
                kept[name] = x.clone()
            if name in changes:
                new = x.flatten(-2) if kind in ("q", "k", "v", "z") else x
                new = new.reshape(flat.shape)
                if rows is not None:
                    tensor[..., rows] = new
                else:
                    tensor[:] = new  # in place: the residual stream is added to by whoever holds it
        logits = nnsight.save(wrapped.output.logits)
    if logits_at is not None:
        at = logits_at.to(logits.device)[:, :, None].expand(-1, -1, logits.shape[-1])
        logits = logits.gather(1, at)
    return Run(logits, dict(kept))


def _where(model: HookedModel, kind: str, layer: int) -> tuple[nn.Module, str, Tensor | None]:
    """The module, whether it is what it takes or what it gives, and which features of it."""
    block = model.anatomy.blocks[layer]
    if kind in ("q", "k", "v"):
        features = block.features[kind]
        return features.module, "output", features.rows
    taken = {"resid_pre": block.module, "z": block.projection, "resid_mid": block.before_mlp}
    given = {"attn_out": block.attn_out, "mlp_out": block.mlp_out, "resid_post": block.module}
    return (taken[kind], "input", None) if kind in taken else (given[kind], "output", None)
