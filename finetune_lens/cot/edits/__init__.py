"""Chains edited: mistakes, paraphrases, filler, and structure or content destroyed. Everything follows from a seed.

`mistake` and `paraphrase` change one step by rules; an `Editor` says where such steps come from: `RuleEditor`,
`FileEditor`, or a model, `LocalEditor`. `corrupt` destroys a fraction of a chain.
"""

from finetune_lens.cot.edits.corruptions import (
    CONTENT,
    STRUCTURE,
    corrupt,
    corrupt_digits,
    delete,
    drop_keywords,
    insert,
    shuffle,
    wrong_answer,
)
from finetune_lens.cot.edits.editors import (
    INSTRUCTIONS,
    Editor,
    FileEditor,
    LocalEditor,
    Place,
    RuleEditor,
    generator_of,
)
from finetune_lens.cot.edits.fillers import filler
from finetune_lens.cot.edits.mistakes import entities, mistake
from finetune_lens.cot.edits.paraphrases import paraphrase

__all__ = [
    "CONTENT",
    "INSTRUCTIONS",
    "STRUCTURE",
    "Editor",
    "FileEditor",
    "LocalEditor",
    "Place",
    "RuleEditor",
    "corrupt",
    "corrupt_digits",
    "delete",
    "drop_keywords",
    "entities",
    "filler",
    "generator_of",
    "insert",
    "mistake",
    "paraphrase",
    "shuffle",
    "wrong_answer",
]
