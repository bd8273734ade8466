"""What does a model write after a prompt? Chains of thought, sampled in batches, kept, and read back.

Token t of a chain is drawn from the next-token distribution at temperature T, cut to its nucleus: the fewest likeliest
tokens that hold top_p of it (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", §3.1),

    p ∝ softmax(logits / T) on the nucleus,        token = min {v : Σ_{w ≤ v} p_w > u_t},        u_t ~ U[0, 1)

with the u_t of a generator of the chain's own, seeded from (seed, question, sample): what else is in the batch has no
part in it. A batch changes the last bits of the logits, though. The sum runs over token ids in float64, not over ranks,
so that a token hangs on them with a probability of the size of their rounding error: next to never in float32, but in
bfloat16 long chains do differ from batch to batch. The nucleus takes in all tokens as likely as its last.

Cost: a question's prompt once for all of its samples, then one token a pass and row; keys and values are kept.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> model = ModelPair.load(folder / "base", folder / "full").base
>>> [chain] = sample(model, ["<copy>gafbdz="], names=["q"], temperature=0, max_tokens=8, progress=False)
>>> chain.text, chain.ending
('gafbdz', 'eos')
"""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from finetune_lens.cot.chains import Chain
from finetune_lens.errors import InputError
from finetune_lens.stream import Row, Store

if TYPE_CHECKING:
    from torch import Tensor

    from finetune_lens.hooked import HookedModel

COLUMNS = {"cpu": 8192, "cuda": 65536}  # tokens whose keys and values are held at once
CONTEXT = 8  # tokens before a chain that it is decoded with


class Written(NamedTuple):
    """A text that a model wrote, its tokens, and what ended it."""

    text: str
    tokens: tuple[int, ...]
    ending: str


def sample(
    model: "HookedModel",
    prompts: "Sequence[str | Sequence[int]]",
    *,
    names: Sequence[str],
    samples: int = 1,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_tokens: int = 512,
    stop: Sequence[str] = (),
    seed: int = 0,
    template: bool = False,
    batch_size: int | None = None,
    partial: Path | None = None,
    progress: bool = True,
) -> list[Chain]:
    """Chains that the model writes after each prompt, question by question.

    Args:
        prompts: texts, or token ids.
        names: the id of each question, all different.
        samples: chains a question.
        temperature: 0 takes the likeliest token; there is one such chain a question.
        max_tokens: of a chain; the longest text that the model reads ends it too (`trained_length` where it has one).
        stop: texts that end a chain. It is cut off before the first of them, wherever its tokens begin.
        template: put each text as a user's message through the tokenizer's chat template.
        batch_size: chains at once; by default as many as `COLUMNS` holds, fewer where memory does not.
        partial: a folder of this model's own where finished chains are kept. The same call, or one with more
            questions or samples, generates only what is not there.

    Raises:
        InputError: an option out of range, a prompt that leaves no room, two of one name, logits that are NaN.
    """
    import torch
    from tqdm.auto import tqdm

    _require_settings(names, prompts, samples, temperature, top_p, max_tokens, batch_size)
    ends = Ends(model, stop, max_tokens)
    tokens = token_ids(model.require_tokenizer(), prompts, names, template)
    for name, prompt in zip(names, tokens, strict=True):
        ends.require_room(prompt, f"prompt {name}")
    rows = [(question, number) for question in range(len(tokens)) for number in range(samples)]
    keys = {row: json.dumps([names[row[0]], row[1], tokens[row[0]]]) for row in rows}
    store = None
    if partial is not None and model.fingerprint:
        settings = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "stop": [*stop], "seed": seed}
        facts = {"analysis": "chains", "model": model.describe() | {"adapted": model.adapted}, "eos": sorted(ends.eos)}
        store = Store(partial, model.fingerprint, facts | settings)
    kept = {} if store is None else {row: written for row in rows if (written := store.get(keys[row])) is not None}
    found = {row: _unpacked(written) for row, written in kept.items()}
    size = batch_size or max(1, COLUMNS.get(model.device.type, COLUMNS["cpu"]) // (max(map(len, tokens)) + max_tokens))
    todo = sorted((row for row in rows if row not in found), key=lambda row: (len(tokens[row[0]]), row))
    with tqdm(total=len(rows), initial=len(found), desc="chains", unit="", disable=not progress) as bar:
        while todo:
            batch = todo[:size]
            questions = list(dict.fromkeys(question for question, _ in batch))
            choose = _chooser(
                [(names[q], s) for q, s in batch],
                temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens,
            )  # fmt: skip

            def finish(row: int, written: Written, batch: list[tuple[int, int]] = batch) -> None:
                found[batch[row]] = written
                if store is not None:
                    store.put(keys[batch[row]], _packed(written))
                bar.update()

            try:
                write(
                    model, [tokens[q] for q in questions], [questions.index(q) for q, _ in batch], choose, ends, finish
                )
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                torch.cuda.empty_cache()
                size = len(batch) // 2
            todo = [row for row in todo if row not in found]
    return [Chain(names[row[0]], row[1], *found[row]) for row in rows]


def _require_settings(
    names: Sequence[str], prompts: Sequence, samples: int, temperature: float, top_p: float, max_tokens: int,
    batch_size: int | None,
) -> None:  # fmt: skip
    if not prompts or len(names) != len(prompts):
        raise InputError(f"expected prompts and a name for each; found {len(prompts)} prompts and {len(names)} names")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise InputError(f"{len(twice)} names stand for several prompts: {', '.join(twice[:3])}; give each its own")
    require_sampling(
        samples=samples, temperature=temperature, top_p=top_p, max_tokens=max_tokens, batch_size=batch_size
    )


def require_sampling(
    *, samples: int, temperature: float, top_p: float, max_tokens: int, batch_size: int | None = None
) -> None:
    """Raise InputError where `sample` would, before anything else is computed."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature is 0 (the likeliest token) or more; found {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is a share of the probability, above 0 and at most 1; found {top_p}")
    for name, value in (("samples", samples), ("max_tokens", max_tokens), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is at least 1; found {value}")
    if temperature == 0 and samples > 1:
        raise InputError(f"at temperature 0 every chain of a question is the same: one sample, not {samples}")


def token_ids(tokenizer: Any, prompts: Sequence, names: Sequence[str], template: bool) -> list[list[int]]:
    """Of each prompt, as `sample` takes them; texts with the special tokens or the chat template around them.

    Raises:
        InputError: a character that the tokenizer does not know, texts beside token ids, no chat template.
    """
    from finetune_lens.prompts import Prompt, encode

    texts = [isinstance(prompt, str) for prompt in prompts]
    if not any(texts):
        return [[int(token) for token in prompt] for prompt in prompts]
    if not all(texts):
        raise InputError("expected prompts that are all texts or all token ids; found both")
    items = [Prompt(prompt, id=name) for prompt, name in zip(prompts, names, strict=True)]
    encoded = encode(items, tokenizer, template=template, need_answer=False)
    return [ids[mask].tolist() for ids, mask in zip(encoded.ids, encoded.mask, strict=True)]


def templated(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Each text as a user's message in the chat template, up to where the model's own words begin.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template; leave the template out, or give another tokenizer")
    messages = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]


class Ends:
    """What ends a text that a model writes: an end-of-sequence token, a stop text, a number of tokens."""

    def __init__(self, model: "HookedModel", stop: Sequence[str], max_tokens: int):
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop: expected several texts, none of them empty; found {stop!r}")
        tokenizer = model.require_tokenizer()
        configs = getattr(model.module, "generation_config", None), model.module.config.get_text_config(), tokenizer
        named = [getattr(config, "eos_token_id", None) for config in configs]
        self.eos = {token for ids in named if ids is not None for token in ([ids] if isinstance(ids, int) else ids)}
        self.stop, self.max_tokens, self.model = tuple(stop), max_tokens, model
        self._window = max((len(text.encode()) for text in stop), default=0) + CONTEXT
        self._tokenizer = tokenizer

    def limit(self, prompt: Sequence[int]) -> int:
        """How many tokens may follow the prompt."""
        config = self.model.module.config.get_text_config()
        most = min(trained_length(self.model), getattr(config, "max_position_embeddings", None) or math.inf)
        return int(min(self.max_tokens, most - len(prompt)))

    def require_room(self, prompt: Sequence[int], name: str) -> None:
        """Raise InputError where nothing can follow the prompt, or there is none."""
        if not prompt or self.limit(prompt) < 1:
            raise InputError(
                f"{name} has {len(prompt)} tokens; expected one or more, and fewer than the "
                f"{len(prompt) + self.limit(prompt)} that {self.model.name} reads"
            )

    def of(self, prompt: list[int], tokens: list[int]) -> Written | None:
        """What stands written once the last of these tokens has been added; None while it goes on."""
        if tokens[-1] in self.eos:
            return Written(self.text(prompt, tokens[:-1]), tuple(tokens[:-1]), "eos")
        recent = self._decoded([*prompt[-CONTEXT:], *tokens][-self._window :]) if self.stop else ""
        if any(stop in recent for stop in self.stop):
            text = self.text(prompt, tokens)
            at = min((text.index(stop) for stop in self.stop if stop in text), default=None)
            if at is not None:
                kept = len(tokens)
                while len(self.text(prompt, tokens[:kept])) > at:
                    kept -= 1
                return Written(text[:at], tuple(tokens[:kept]), "stop")
        if len(tokens) >= self.limit(prompt):
            return Written(self.text(prompt, tokens), tuple(tokens), "length")
        return None

    def text(self, prompt: list[int], tokens: list[int]) -> str:
        """The tokens' text behind the prompt: some tokenizers drop the space at the beginning of what they decode."""
        front = self._decoded(prompt[-CONTEXT:])
        whole = self._decoded([*prompt[-CONTEXT:], *tokens])
        return whole[len(front) :] if whole.startswith(front) else self._decoded(tokens)

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


Choose = Callable[["Tensor", list[int], int], list[int]]  # logits (row, vocab), the rows, the step → their tokens


def greedy_choice(logits: "Tensor", rows: list[int], step: int) -> list[int]:
    """The likeliest token of each row."""
    return logits.argmax(-1).tolist()


def write(
    model: "HookedModel",
    prompts: Sequence[list[int]],
    of: Sequence[int],
    choose: Choose,
    ends: Ends,
    finish: Callable[[int, Written], None],
) -> None:
    """Let row r write on after prompt `of[r]`, all rows in one batch; `finish(r, written)` when it is done.

    Cost: each prompt once, then one token a pass and unfinished row. Keys and values of layers with a sliding window
    keep their full length.
    """
    import torch
    from transformers import DynamicCache

    with model.side(), torch.no_grad():
        ids, mask = left_padded(prompts)
        cache = DynamicCache()
        inputs = model.inputs(ids, mask) | {"past_key_values": cache, "use_cache": True}
        with model.logits_at(torch.full((len(prompts), 1), ids.shape[1] - 1)):
            logits = model.module(**inputs).logits[:, 0]
        index = torch.tensor(of)
        cache.batch_select_indices(index)
        logits, mask = logits[index], mask[index]
        live: list[int] = list(range(len(of)))
        tokens: list[list[int]] = [[] for _ in of]
        for step in itertools.count():
            if not bool(logits.amax(-1).isfinite().all()):
                raise InputError(f"{model.name} gives logits that are NaN or infinite: nothing can follow from them")
            for row, token in zip(live, choose(logits, live, step), strict=True):
                tokens[row].append(token)
            going = []
            for i, row in enumerate(live):
                written = ends.of(prompts[of[row]], tokens[row])
                if written is None:
                    going.append(i)
                else:
                    finish(row, written)
            if not going:
                return
            if len(going) < len(live):
                cache.batch_select_indices(torch.tensor(going))
                live, mask = [live[i] for i in going], mask[going]
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.bool)], 1)
            logits = _next(model, [tokens[row][-1] for row in live], mask, cache)


def _next(model: "HookedModel", last: list[int], mask: "Tensor", cache: Any) -> "Tensor":
    """Logits (row, vocab) after one more token a row; `mask` has its column."""
    import torch

    inputs: dict[str, Any] = {"input_ids": torch.tensor(last, device=model.device)[:, None], "use_cache": True}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask.to(model.device).long()
    if model.takes("position_ids"):
        inputs["position_ids"] = (mask.sum(1, keepdim=True) - 1).to(model.device)
    return model.module(**inputs, past_key_values=cache).logits[:, -1]


def trained_length(model: "HookedModel") -> float:
    """How many tokens a text may have before a rotary embedding of the kind that follows the length changes; else ∞.

    Keys that were kept from before are not those of the longer text then.
    """
    config = model.module.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if not {"dynamic", "longrope"} & {
        str(value) for part in (rope, *rope.values()) if isinstance(part, dict) for value in part.values()
    }:
        return math.inf
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


def left_padded(rows: Sequence[Sequence[int]]) -> "tuple[Tensor, Tensor]":
    """ids and mask (row, pos) of rows that end in the same column."""
    import torch

    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[i, width - len(row) :] = True
    return ids, mask


def _chooser(chains: list[tuple[str, int]], *, temperature: float, top_p: float, seed: int, max_tokens: int) -> Choose:
    import torch

    if temperature == 0:
        return greedy_choice
    draws = torch.from_numpy(np.stack([_generator(seed, *chain).random(max_tokens) for chain in chains]))

    def choose(logits: "Tensor", rows: list[int], step: int) -> list[int]:
        sums = probabilities(logits, temperature=temperature, top_p=top_p).cumsum(-1)
        at = draws[rows, step, None].to(sums.device)
        return torch.searchsorted(sums / sums[:, -1:], at, right=True)[:, 0].tolist()

    return choose


def _generator(seed: int, question: str, number: int) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps([seed, question, number]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def probabilities(logits: "Tensor", *, temperature: float, top_p: float) -> "Tensor":
    """softmax(logits / temperature) in float64, 0 outside the nucleus and not scaled up inside it; (row, vocab).

    Cost: the 1024 likeliest tokens are put in order; all of them where those do not hold `top_p`.
    """
    import torch

    wide = logits.cpu().double() if logits.device.type == "mps" else logits.double()
    found = (wide / temperature).softmax(-1)
    if top_p >= 1:
        return found
    size = found.shape[-1]
    for most in (min(1024, size), size):
        likeliest = found.topk(most).values
        held = likeliest.cumsum(-1)
        if bool((held[:, -1] >= top_p).all()):
            break
    edge = likeliest.gather(-1, (held < top_p).sum(-1, keepdim=True).clamp_max(likeliest.shape[-1] - 1))
    return torch.where(found >= edge, found, 0.0)


def _packed(written: Written) -> Row:
    text = np.frombuffer(written.text.encode(), np.uint8)  # numpy's texts lose a null character at their end
    return {"text": text, "tokens": np.array(written.tokens, np.int64), "ending": written.ending}


def _unpacked(row: Row) -> Written:
    return Written(row["text"].tobytes().decode(), tuple(row["tokens"].tolist()), row["ending"])
