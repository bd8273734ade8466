"""The tokenizer of all synthetic tasks: a closed vocabulary, a token a piece of text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def word_level(vocabulary: Sequence[str], piece: str, *, longest: int) -> "PreTrainedTokenizerFast":
    """A tokenizer whose ids are places in `vocabulary`; `<bos>` is put in front, and decoding gives the text back.

    There is no unknown token: a text with a piece outside the vocabulary has no reading.

    Args:
        vocabulary: with `<pad>`, `<bos>` and, where texts end in one, `<eos>`.
        piece: regular expression of a token.
        longest: how many tokens a text has at most.

    >>> reads = word_level(["<pad>", "<bos>", "a", "b", "="], "<[a-z]+>|.", longest=8)
    >>> reads("ab=")["input_ids"], reads.decode([2, 3, 4])
    ([1, 2, 3, 4], 'ab=')
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(vocabulary)}
    raw = Tokenizer(models.WordLevel(ids))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(piece), behavior="isolated")
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    raw.decoder = decoders.Fuse()
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad") if f"<{name}>" in ids}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, **special, model_max_length=longest, clean_up_tokenization_spaces=False
    )
