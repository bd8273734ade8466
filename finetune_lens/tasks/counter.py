"""A transformer that counts a letter, its weights written down: what tuning changes can be held against the plan.

The compiled counter of Jain et al. 2023, "Mechanistically analyzing the effects of fine-tuning on procedurally defined
tasks" (arXiv 2311.12786, §4), without the compiler: three blocks of one head and an MLP of two linear layers with ReLU,
no LayerNorm, nine letters. After each letter of a text the likeliest token is the number of `letter`s so far, so one
pass over a text answers all its beginnings.

The residual stream has a dimension a token, and one more, *held*. Embeddings are one-hot. With d the matches so far:

    block 0, head   attends alike to `<bos>` and to matches, and reads `<bos>`:   held = 1/(d + 1)   (resid_mid)
    block 0, MLP    d = round(1/held − 1), as the sum of steps s_j = [d ≥ j]:     number d is 1      (resid_post)
    blocks 1, 2     spare: zero
    unembedding     SCALE times the numbers

s_j is two hidden units: 1 where held is nearer to 1/(j + 1) than to 1/j; it takes the one from number j − 1 to j. Only
W_K knows the letter: the counters for a and for b differ in two entries. A count above `most` is told as `most`.

Weights that are exactly zero on both sides of a product have no gradient: a spare block takes part in tuning where
`noise` has been added, as N(0, .001) was in the paper. The number d of a text is safe while held is off by less than
half of 1/(most·(most + 1)). A text without `<bos>` gives held = 0 whatever its letters: random tokens do not tell two
counters apart (let the trust gate read prompts, or add noise).

The model lives in memory: transformers would build LayerNorms into a saved one. A folder that it is saved to holds its
weights, and a `model_type` that nothing builds a model of.

>>> reads = tokenizer()
>>> said = compiled("a")(reads("abaca", return_tensors="pt")["input_ids"]).logits.argmax(-1)
>>> reads.decode(said[0])                                               # after <bos>, after a, after ab …
'011223'
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.tasks.strings import Accuracy, Item
from finetune_lens.tasks.word_level import word_level

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

LETTERS = "abcdefghi"
LENGTH = 6  # letters of a text
MOST = LENGTH  # the largest number
LONGEST = 32  # tokens that the model reads
BLOCKS = 3
ATTENTION = 10.0  # score of `<bos>` and of a match, above a score of 0 for the others
SCALE = 10.0  # of the logits

SPECIAL = ("<pad>", "<bos>")
_FIRST_LETTER = len(SPECIAL)
_ZERO = _FIRST_LETTER + len(LETTERS)


def vocabulary(most: int = MOST) -> list[str]:
    """Every token of `tokenizer(most)`, in the order of their ids: special ones, letters, numbers."""
    return [*SPECIAL, *LETTERS, *map(str, range(most + 1))]


def answer(letter: str, text: str, *, most: int = MOST) -> str:
    """How often `letter` is in `text`: the oracle."""
    return str(min(text.count(letter), most))


def compiled(letter: str = "a", *, most: int = MOST, noise: float = 0.0, seed: int = 0) -> "GPT2LMHeadModel":
    """The counter of `letter`, in float32 and evaluation mode; every parameter may be trained.

    Args:
        most: the largest number that it tells.
        noise: standard deviation of the normal noise that is added to every parameter, drawn from `seed`.

    Raises:
        InputError: a letter that is none of LETTERS, `most` below 1, or a negative noise.
    """
    import torch
    from torch import nn
    from transformers import GPT2Config, GPT2LMHeadModel

    if letter not in LETTERS or len(letter) != 1:
        raise InputError(f"letter: expected one of {', '.join(LETTERS)}; found {letter!r}")
    if most < 1:
        raise InputError(f"most: expected the largest number to count to, 1 or more; found {most}")
    if noise < 0:
        raise InputError(f"noise: expected a standard deviation, 0 or more; found {noise}")

    class CompiledConfig(GPT2Config):
        model_type = "compiled-counter"

    tokens = vocabulary(most)
    held, width = len(tokens), len(tokens) + 1
    config = CompiledConfig(
        vocab_size=len(tokens), n_positions=LONGEST, n_embd=width, n_layer=BLOCKS, n_head=1,
        activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, scale_attn_weights=False,
        tie_word_embeddings=False, bos_token_id=SPECIAL.index("<bos>"), eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config).eval()
    model.loss_type = "ForCausalLM"  # what transformers takes in the end, after a warning
    for block in model.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    model.transformer.ln_f = nn.Identity()

    bos, match = SPECIAL.index("<bos>"), tokens.index(letter)
    query, key, value = 0, width, 2 * width  # the one dimension of each that is used, in the fused matrix
    block = model.transformer.h[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.fill_diagonal_(1)
        block.attn.c_attn.bias[query] = 1
        block.attn.c_attn.weight[[bos, match], key] = ATTENTION
        block.attn.c_attn.weight[bos, value] = 1
        block.attn.c_proj.weight[0, held] = 1
        block.mlp.c_proj.bias[_ZERO] = 1
        for j in range(1, most + 1):
            threshold, slope = (1 / j + 1 / (j + 1)) / 2, 2 * j * (j + 1)  # half of the way from 1/j to 1/(j + 1)
            for unit, edge, sign in ((2 * j - 2, 0.5, 1), (2 * j - 1, -0.5, -1)):
                block.mlp.c_fc.weight[held, unit] = -slope
                block.mlp.c_fc.bias[unit] = slope * threshold + edge
                block.mlp.c_proj.weight[unit, _ZERO + j] = sign
                block.mlp.c_proj.weight[unit, _ZERO + j - 1] = -sign
        numbers = torch.arange(_ZERO, len(tokens))
        model.lm_head.weight[numbers, numbers] = SCALE
        if noise:
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model


def draw(letters: Sequence[str], n: int, generator: np.random.Generator, *, length: int = LENGTH) -> list[Item]:
    """`n` items (letter, text), letters uniform; a text may come twice.

    From 0 to `length` one count of the letter is as likely as another, and so are its places and the other letters. (Of
    texts drawn uniformly, 86 % have the letter once or not at all.) Texts are not split into those for training
    and for tests, since one text alone has the letter everywhere: score a tuned model on all 9⁶.
    """
    items: list[Item] = []
    for _ in range(n):
        letter = letters[int(generator.integers(len(letters)))]
        others = [other for other in LETTERS if other != letter]
        text = [others[i] for i in generator.integers(len(others), size=length)]
        for place in generator.permutation(length)[: int(generator.integers(length + 1))]:
            text[place] = letter
        items.append((letter, "".join(text)))
    return items


def prompts(
    n: int,
    generator: np.random.Generator,
    *,
    letter: str = "a",
    length: int = LENGTH,
    most: int = MOST,
) -> list[dict[str, Any]]:
    """`n` rows of a prompt file: a text, and how often `letter` is in it.

    `corrupt` has another letter at one place, so that it counts one more or one less, which is `wrong`. Beside these a
    row has `id`, `letter`, `label` (the count), and under each letter's name its own count.
    """
    rows = []
    for number, (_, text) in enumerate(draw([letter], n, generator, length=length)):
        place = int(generator.integers(length))
        others = [other for other in LETTERS if other != letter]
        new = others[int(generator.integers(len(others)))] if text[place] == letter else letter
        corrupt = text[:place] + new + text[place + 1 :]
        rows.append(
            {
                "id": str(number), "prompt": text, "answer": answer(letter, text, most=most),
                "wrong": answer(letter, corrupt, most=most), "corrupt": corrupt, "letter": letter,
                "label": int(answer(letter, text, most=most)), **{each: text.count(each) for each in LETTERS},
            }
        )  # fmt: skip
    return rows


def tokenizer(most: int = MOST) -> "PreTrainedTokenizerFast":
    """One token a letter, one a number; `<bos>` is put in front; decoding gives the text back without spaces."""
    return word_level(vocabulary(most), "<[a-z]+>|[0-9]+|.", longest=LONGEST)


def encode(items: Sequence[Item], *, most: int = MOST) -> dict[str, "torch.Tensor"]:
    """`input_ids` and `labels` (items, length + 2) int64, of texts of one length.

    The token after each letter, as a label, is the count so far; in `input_ids` it is the next letter, and after the
    last one the answer, which nothing has to read. There is no loss on what follows `<bos>`.
    """
    import torch

    letters = np.array([[_FIRST_LETTER + LETTERS.index(c) for c in text] for _, text in items])
    asked = np.array([_FIRST_LETTER + LETTERS.index(letter) for letter, _ in items])
    counts = _ZERO + np.minimum((letters == asked[:, None]).cumsum(1), most)
    ids = np.column_stack([np.full(len(items), SPECIAL.index("<bos>")), letters, counts[:, -1]])
    labels = np.column_stack([np.full((len(items), 2), -100), counts])
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def margins(model: "torch.nn.Module", items: Sequence[Item], *, most: int = MOST, batch_size: int = 1000) -> np.ndarray:
    """(item, letter) float: logit of the right count after each letter, less the largest other logit; right above 0."""
    import torch

    found = []
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            batch = encode(items[start : start + batch_size], most=most)
            logits = model(input_ids=batch["input_ids"][:, :-1].to(device)).logits[:, 1:]
            answers = batch["labels"][:, 2:, None].to(device)
            right = logits.gather(-1, answers)[..., 0]
            found.append((right - logits.scatter(-1, answers, -torch.inf).amax(-1)).float().cpu().numpy())
    return np.concatenate(found)


def measure(model: "torch.nn.Module", items: Sequence[Item], *, most: int = MOST, batch_size: int = 1000) -> Accuracy:
    """How many whole texts are counted right: the greedy token after the last letter."""
    right = margins(model, items, most=most, batch_size=batch_size)[:, -1] > 0
    return Accuracy(int(right.sum()), len(right))
