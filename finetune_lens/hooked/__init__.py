"""Hooked forward passes: sites, capture, edit, re-entry, the sweep engine, backends."""

from finetune_lens.hooked.model import HookedModel, Run
from finetune_lens.hooked.sites import KINDS, parse, site_name

__all__ = ["KINDS", "HookedModel", "Run", "parse", "site_name"]
