"""Decompositions that state their error, and comparison of two singular bases. Everything is float64."""

from finetune_lens.linalg.cache import BasisCache
from finetune_lens.linalg.exact import EPS, Basis, Decomposition, Side, decompose
from finetune_lens.linalg.matching import Match, match
from finetune_lens.linalg.routes import METHODS, Comparison, compare
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
    "EPS",
    "METHODS",
    "Basis",
    "BasisCache",
    "Comparison",
    "Decomposition",
    "Match",
    "Side",
    "compare",
    "decompose",
    "effective_rank",
    "energy",
    "haar",
    "low_rank_values",
    "match",
    "null_max_cos",
    "relative_gaps",
    "singular_values",
]
