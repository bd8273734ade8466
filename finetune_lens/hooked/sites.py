"""Names of the places in a model, as TransformerLens names its hook points.

A site is a kind at a layer: `blocks.3.hook_resid_pre`, `blocks.3.attn.hook_z`.

>>> site_name("z", 3), site_name("resid_pre", 0)
('blocks.3.attn.hook_z', 'blocks.0.hook_resid_pre')
>>> parse("blocks.3.attn.hook_z")
('z', 3)
"""

import re

from finetune_lens.errors import InputError

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
OUTPUTS = ("attn_out", "mlp_out")
# (batch, pos, head, d_head); the pattern is (batch, head, query, key), a head's result (batch, pos, head, d_model).
HEADS = ("z", "q", "k", "v", "pattern", "result")
KINDS = (*RESIDUAL, *OUTPUTS, *HEADS)
NAME = re.compile(
    r"blocks\.(\d+)\.(?:attn\.hook_(z|q|k|v|pattern|result)|hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out))"
)


def site_name(kind: str, layer: int) -> str:
    """The full name of the site of that kind at that layer."""
    return f"blocks.{layer}.attn.hook_{kind}" if kind in HEADS else f"blocks.{layer}.hook_{kind}"


def parse(name: str) -> tuple[str, int]:
    """(kind, layer) of a full site name.

    Raises:
        InputError: not a site.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise InputError(
            f"{name!r} is no site; expected a name such as 'blocks.3.hook_resid_pre' or 'blocks.3.attn.hook_z', "
            f"of one of the kinds {', '.join(KINDS)}"
        )
    return found[2] or found[3], int(found[1])


def known(kind: str) -> str:
    """`kind` itself.

    Raises:
        InputError: not a kind of site.
    """
    if kind not in KINDS:
        raise InputError(f"site {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    return kind
