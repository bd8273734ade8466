"""A hand-written GPT-2 whose circuit is known: previous-token heads feed induction heads, and the rest is idle.

    prompt  b h e k a d g c f h      the last letter stands twice; the answer is the letter after the first (e)

Three layers of four heads, no MLPs. Heads 0.1 and 1.2 write the letter before into each position (0.1 every second
letter of the alphabet, 1.2 the others); heads 2.0 and 2.3 look for the position before which the last letter stood, and
write the letter there to the output (again every second letter each). So every head of the circuit is needed for about
half of the prompts. Where nothing matches they write the first letter, which is never the answer. The other eight heads
attend to what chance gave them and write to a part of the residual stream that nothing reads.

LayerNorm is the identity up to 1e-5: two coordinates of ±1000 dominate the variance, and all that is written sums to 0.
"""

import string
from typing import Any, NamedTuple

import numpy as np
import torch

from finetune_lens.circuits import Group

LETTERS = string.ascii_lowercase[:19]
LAYERS, HEADS, WIDTH, D_HEAD = 3, 4, 96, 24
LENGTH, PLACES = 10, 20  # letters of a prompt; positions that the model has
TOKEN, POSITION, BEFORE, OUT, IDLE = 0, 20, 40, 60, 83  # where in the residual stream each begins
CONSTANT, BALANCE = 80, 82
SPARE = 20  # an entry of a head that stands for no letter
LARGE, SHARP, LOUD = 1000.0, 30.0, 10.0
PREVIOUS = ((0, 1), (1, 2))
INDUCTION = ((2, 0), (2, 3))


class Planted(NamedTuple):
    """The model, what it reads, and its circuit in the order of discovery."""

    model: Any
    tokenizer: Any
    prompts: list[dict[str, Any]]
    groups: dict[str, Group]


def planted_model(*, prompts: int = 60, seed: int = 0) -> Planted:
    """The model and prompts that it answers without a mistake; `told` is where the answer stands in a prompt.

    A `corrupt` prompt has another letter in every column, nowhere the one that is asked for, and another answer, which
    is the `wrong` one.
    """
    groups = {"induction": Group(-1, INDUCTION), "previous": Group("told:first", PREVIOUS)}
    return Planted(_model(), _tokenizer(), _prompts(prompts, seed), groups)


def _prompts(count: int, seed: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    rows = []
    while len(rows) < count:
        clean, answer = _draw(generator)
        corrupt, other = _draw(generator)
        if answer == other or clean[-1] in corrupt or any(a == b for a, b in zip(clean, corrupt, strict=True)):
            continue
        rows.append({"prompt": clean, "answer": answer, "wrong": other, "corrupt": corrupt, "corrupt_answer": other,
                     "told": answer})  # fmt: skip
    return rows


def _draw(generator: np.random.Generator) -> tuple[str, str]:
    letters = "".join(generator.permutation(list(LETTERS))[: LENGTH - 1])
    at = int(generator.integers(1, LENGTH - 2))  # at position 0 a letter would be before itself
    return letters + letters[at], letters[at + 1]


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<pad>": 0} | {letter: n for n, letter in enumerate(LETTERS, 1)}))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), behavior="isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")


def _model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary = len(LETTERS) + 1
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, vocab_size=vocabulary, n_positions=PLACES,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )).eval().requires_grad_(False)  # fmt: skip
    for parameter in model.parameters():
        parameter.zero_()
    for name, parameter in model.named_parameters():
        if ".ln_" in name and name.endswith("weight"):
            parameter.fill_(LARGE * (2 / WIDTH) ** 0.5)
    token, place = torch.arange(vocabulary), torch.arange(PLACES)
    embed, where = model.transformer.wte.weight, model.transformer.wpe.weight
    embed[token, TOKEN + token] = 1
    embed[:, CONSTANT], embed[:, CONSTANT + 1] = LARGE, -LARGE
    where[place, POSITION + place] = 1
    embed[:, BALANCE], where[:, BALANCE] = -1, -1
    model.lm_head.weight[token, OUT + token] = LOUD

    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        for head in range(HEADS):
            q, k, v, o = _idle(generator)
            if (layer, head) in PREVIOUS:
                letters = token[1 + PREVIOUS.index((layer, head)) :: 2]
                q, k = _reading(POSITION + 1, place[:-1]), _reading(POSITION, place[:-1])
                v, o = _reading(TOKEN, letters), _writing(BEFORE, letters)
            elif (layer, head) in INDUCTION:
                letters = token[1 + INDUCTION.index((layer, head)) :: 2]
                q, k = _reading(TOKEN, token), _reading(BEFORE, token)
                q[CONSTANT, SPARE], k[POSITION, SPARE] = 0.5 / LARGE, 1  # half a match with the first position, always
                v, o = _reading(TOKEN, letters), _writing(OUT, letters)
            if (layer, head) in PREVIOUS + INDUCTION:
                q *= SHARP * D_HEAD**0.5
            attention, mine = model.transformer.h[layer].attn, slice(head * D_HEAD, (head + 1) * D_HEAD)
            for part, weight in enumerate((q, k, v)):
                attention.c_attn.weight[:, part * WIDTH :][:, mine] = weight
            attention.c_proj.weight[mine] = o
    return model


def _reading(begin: int, features: torch.Tensor) -> torch.Tensor:
    """(d_model, d_head): feature n of a part of the residual stream to entry n of the head."""
    weight = torch.zeros(WIDTH, D_HEAD)
    weight[begin + features, features] = 1
    return weight


def _writing(begin: int, features: torch.Tensor) -> torch.Tensor:
    """(d_head, d_model): entry n of the head to feature n, and as much taken off where nothing reads."""
    weight = torch.zeros(D_HEAD, WIDTH)
    weight[features, begin + features] = 1
    weight[features, BALANCE] = -1
    return weight


def _idle(generator: torch.Generator) -> list[torch.Tensor]:
    """q, k, v of letters and positions, at random; o into what nothing reads."""
    reading = [torch.zeros(WIDTH, D_HEAD) for _ in range(3)]
    for weight in reading:
        weight[TOKEN:BEFORE] = torch.randn(BEFORE - TOKEN, D_HEAD, generator=generator)
    writing = torch.zeros(D_HEAD, WIDTH)
    writing[:, IDLE:] = 0.2 * torch.randn(D_HEAD, WIDTH - IDLE, generator=generator)
    writing[:, BALANCE] = -writing.sum(1)
    return [*reading, writing]
