"""Decompositions that state their error, and comparison of two singular bases. Everything is float64."""

from finetune_lens.linalg.cache import BasisCache, Latest, Store
from finetune_lens.linalg.draws import generator
from finetune_lens.linalg.exact import EPS, Basis, Decomposition, Side, decompose, place
from finetune_lens.linalg.matching import Match, match
from finetune_lens.linalg.routes import CERTIFIED_FROM, CERTIFIED_UP_TO, METHODS, Comparison, Method, choose, compare
from finetune_lens.linalg.spectra import (
    effective_rank,
    energy,
    haar,
    low_rank_values,
    null_max_cos,
    relative_gaps,
    singular_values,
)

__all__ = [
    "CERTIFIED_FROM",
    "CERTIFIED_UP_TO",
    "EPS",
    "METHODS",
    "Basis",
    "BasisCache",
    "Comparison",
    "Decomposition",
    "Latest",
    "Match",
    "Method",
    "Side",
    "Store",
    "choose",
    "compare",
    "decompose",
    "effective_rank",
    "energy",
    "generator",
    "haar",
    "low_rank_values",
    "match",
    "null_max_cos",
    "place",
    "relative_gaps",
    "singular_values",
]
