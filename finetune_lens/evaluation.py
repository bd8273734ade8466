"""How well does a model do on examples? Loss, prediction and confidence, a row an example; and the loss's gradient.

Three objectives, all in nats:

- answer: −Σ log p(token) over the tokens of the answer; right when each of them is the likeliest. Where prompts accept
  several answers, of one token each, their probabilities add.
- labels: −log p(label) among the label words, the distinct answers and wrong answers of the files (Gao et al. 2021,
  "Making Pre-trained Language Models Better Few-shot Learners", §4); right when the likeliest one is the answer.
- text: the mean of −log p(next token) over the text; its accuracy is the share of tokens that are the likeliest.

With a chat template each prompt is a user's message, and an answer is what the model says to it. A text is read within
the template too, and its own tokens alone are scored, those of the template are not.

Cost: one forward pass an example; the unembedding is computed where an answer is read only.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from finetune_lens.errors import InputError
from finetune_lens.hooked.model import HookedModel
from finetune_lens.prompts import Encoded, Prompt, encode, read_prompts, without_answers

Objective = Literal["auto", "answer", "labels", "text"]
OBJECTIVES = ("auto", "answer", "labels", "text")
METRICS = ("accuracy", "logprob")  # higher = better; logprob = −loss
TOKENS = {"cpu": 2048, "cuda": 16384}  # columns in a forward pass
LOGITS = 1 << 25  # logits held at once
MOST_LABELS = 64


@dataclass(frozen=True, eq=False)
class Examples:
    """Prompts of one file, tokenised, and how they are scored.

    Attributes:
        targets: of "labels" the position of the right one among them.
        template: whether the prompts are within the chat template.
    """

    prompts: list[Prompt]
    encoded: Encoded
    objective: str
    labels: tuple[str, ...] = ()
    targets: "Int[Tensor, ' example'] | None" = None
    template: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> list[str]:
        return [p.prompt for p in self.prompts]

    def identity(self) -> str:
        """A hash of all that decides the scores."""
        found = hashlib.sha256(repr((self.objective, self.labels, self.template)).encode())
        tensors = [getattr(self.encoded, f.name) for f in fields(Encoded) if f.name != "tokens"]
        for tensor in [*tensors, *([] if self.targets is None else [self.targets])]:
            found.update(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Scores:
    """What a model said of each example.

    Attributes:
        loss: (example,) nats.
        accuracy: (example,) 1 right, 0 wrong; of texts the share of tokens that are right.
        confidence: (example,) probability of what was predicted; of texts NaN.
        prediction: (example, step) label positions or token ids, −1 where there is none.
    """

    loss: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    prediction: np.ndarray

    def metric(self, name: str) -> np.ndarray:
        """(example,) of METRICS."""
        return self.accuracy if name == "accuracy" else -self.loss

    def agreement(self, other: "Scores") -> np.ndarray:
        """(example,) 1 where both predict the same; of texts the share of tokens."""
        there = self.prediction >= 0
        same = ((self.prediction == other.prediction) & there).sum(1) / np.maximum(there.sum(1), 1)
        return same if np.isnan(self.confidence).all() else (same == 1).astype(float)


def label_words(files: Sequence[Sequence[Prompt]]) -> tuple[str, ...]:
    """The distinct answers and wrong answers of all files, sorted.

    Raises:
        InputError: fewer than two, or so many that they are no labels.
    """
    found = sorted({word for prompts in files for p in prompts for word in (*p.answer, *p.wrong)})
    if not 2 <= len(found) <= MOST_LABELS:
        shown = f"{len(found)}: {', '.join(map(repr, found[:5]))}{' …' * (len(found) > 5)}; score whole answers instead"
        raise InputError(
            f"label words are the distinct answers and wrong answers, 2 to {MOST_LABELS} of them; found "
            + (f"{shown} (objective answer)" if found else "none; texts without answers have the objective text")
        )
    return tuple(found)


def read_examples(
    source: Any,
    tokenizers: Sequence[Any],
    *,
    objective: Objective = "auto",
    labels: Sequence[str] = (),
    template: bool = False,
    limit: int | None = None,
) -> Examples:
    """Read a prompt file and tokenise it.

    Args:
        source: JSONL file, or a list of prompts.
        tokenizers: the base's, and the tuned model's where it has one: both have to read the texts alike.
        objective: "auto" is "answer" where prompts have answers and "text" where none has.
        labels: of "labels", the words.
        template: put each prompt as a user's message through the tokenizer's chat template.

    Raises:
        InputError: labels of more than one token, or of the same token; a label that is not among them; what
            `finetune_lens.prompts.encode` refuses; tokenizers that read a text differently.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"objective is one of {', '.join(OBJECTIVES)}; found {objective!r}")
    prompts = read_prompts(source, limit=limit)
    if objective == "auto":
        objective = "answer" if any(p.answer for p in prompts) else "text"
    encoded, *others = [_encoded(prompts, t, objective, tuple(labels), template) for t in tokenizers if t is not None]
    for other in others:
        differ = [row for row in range(len(encoded)) if encoded.tokens[row] != other.tokens[row]]
        if differ or not torch.equal(encoded.ids, other.ids) or not torch.equal(encoded.answers, other.answers):
            which = f"prompt {prompts[differ[0]].id}" if differ else "the prompts"
            raise InputError(
                f"the tokenizers of base and tuned model read {which} differently; what one of them learnt cannot be "
                "put to the other (pass one --tokenizer)"
            )
    targets = None
    if objective == "labels":
        targets = torch.tensor([labels.index(p.answer[0]) for p in prompts])
    return Examples(prompts, encoded, objective, tuple(labels), targets, template)


def _encoded(prompts: list[Prompt], tokenizer: Any, objective: str, labels: tuple[str, ...], template: bool) -> Encoded:
    options: dict[str, Any] = {"template": template, "padding": "right"}
    if objective == "labels":
        for prompt in prompts:
            if len(prompt.answer) != 1:
                raise InputError(f"prompt {prompt.id}: expected one `answer`, a label word; found {len(prompt.answer)}")
            if prompt.answer[0] not in labels:
                raise InputError(f"prompt {prompt.id}: {prompt.answer[0]!r} is no label; they are {', '.join(labels)}")
        asked = [replace(p, answer=labels, wrong=()) for p in prompts]
        try:
            encoded = encode(asked, tokenizer, **options)
        except InputError as error:
            which, several, _ = str(error).partition("; take answers of one token")
            if not several:
                raise
            raise InputError(
                f"label words are single tokens: {which}; score whole answers (objective answer)"
            ) from None
        if encoded.answers.shape[-1] < len(labels) or bool((encoded.answers < 0).any()):
            raise InputError(f"two of the label words begin with the same token: {', '.join(map(repr, labels))}")
        return encoded
    if objective == "text":
        encoded = encode(without_answers(prompts), tokenizer, need_answer=False, **options)
        some = _predicted(encoded, template).any(1).tolist()
        short = [p.id for p, there in zip(prompts, some, strict=True) if not there]
        if short:
            raise InputError(f"prompt {short[0]} has no token that comes after another: nothing of it can be predicted")
        return encoded
    whole = all(len(p.answer) <= 1 for p in prompts)
    return encode(prompts, tokenizer, whole=whole, **options)


def _predicted(encoded: Encoded, template: bool) -> Bool[Tensor, "example next"]:
    """Which tokens of a text are scored, from the second on: all, and within a template the user's own."""
    return (encoded.text_columns if template else encoded.mask)[:, 1:]


def measure(model: HookedModel, examples: Examples, *, batch_size: int | None = None) -> Scores:
    """Score every example. One forward pass each, in batches of about one length."""
    count, steps = len(examples), _steps(examples)
    loss, accuracy, confidence = (np.full(count, np.nan) for _ in range(3))
    prediction = np.full((count, steps), -1)
    with torch.no_grad():
        for index in batches(model, examples, batch_size=batch_size):
            found = read_out(model, examples, index)
            rows = index.numpy()
            loss[rows], accuracy[rows] = found["loss"].double().cpu().numpy(), found["accuracy"].double().cpu().numpy()
            confidence[rows] = found["confidence"].double().cpu().numpy()
            said = found["prediction"].cpu().numpy()
            prediction[rows, : said.shape[1]] = said
    return Scores(loss, accuracy, confidence, prediction)


def add_gradient(
    model: HookedModel, examples: Examples, index: Int[Tensor, " row"], *, batch_size: int | None = None
) -> tuple[float, float]:
    """Add the gradient of the mean loss over `index` to the parameters that require one.

    Returns:
        Mean loss and accuracy over these examples.
    """
    loss = accuracy = 0.0
    for rows in batches(model, examples, index, batch_size=batch_size):
        with torch.enable_grad():
            found = read_out(model, examples, rows)
            part = found["loss"].sum() / len(index)
            part.backward()
        loss += float(part.detach())
        accuracy += float(found["accuracy"].sum()) / len(index)
    return loss, accuracy


def batches(
    model: HookedModel, examples: Examples, index: "Int[Tensor, ' row'] | None" = None, *, batch_size: int | None = None
) -> Iterator[Int[Tensor, " row"]]:
    """Rows that are computed together: of about one length, as many as memory should hold, the longest first."""
    index = torch.arange(len(examples)) if index is None else index
    lengths = examples.encoded.mask.sum(1)[index]
    order = index[torch.argsort(lengths, descending=True, stable=True)]
    columns = TOKENS.get(model.device.type, TOKENS["cpu"])
    if examples.objective == "text":
        columns = min(columns, max(1, LOGITS // model.vocabulary))
    start = 0
    while start < len(order):
        longest = int(examples.encoded.mask[order[start]].sum())
        size = batch_size or max(1, columns // longest)
        yield order[start : start + size]
        start += size


def _steps(examples: Examples) -> int:
    if examples.objective == "labels":
        return 1
    return examples.encoded.read_at.shape[1] if examples.objective == "answer" else examples.encoded.ids.shape[1] - 1


def read_out(model: HookedModel, examples: Examples, index: Tensor) -> dict[str, Tensor]:
    """loss, accuracy, confidence (row) and prediction (row, step) of some examples; the loss is differentiable."""
    batch = examples.encoded.rows(index)
    width = int(batch.mask.sum(1).max())
    ids, mask = batch.ids[:, :width], batch.mask[:, :width]
    if examples.objective == "text":
        predicted = _predicted(batch, examples.template)[:, : width - 1]
        return _of_texts(_logits(model, ids, mask, None)[:, :-1], ids[:, 1:], predicted)
    logits = _logits(model, ids, mask, batch.read_at)
    answers = batch.answers.to(logits.device)
    if examples.objective == "labels":
        logs = logits[:, 0].gather(-1, answers[:, 0]).log_softmax(-1)
        target = examples.targets[index].to(logits.device)
        best, said = logs.detach().max(-1)
        loss = -logs.gather(-1, target[:, None])[:, 0]
        return {
            "loss": loss, "accuracy": (said == target).float(), "confidence": best.exp(), "prediction": said[:, None],
        }  # fmt: skip
    logs = logits.log_softmax(-1)
    there = answers >= 0
    chosen = torch.where(there, logs.gather(-1, answers.clamp_min(0)), -torch.inf).logsumexp(-1)  # (row, step)
    asked = there.any(-1)
    best, said = logs.detach().max(-1)
    right = ((said[..., None] == answers) & there).any(-1)
    return {
        "loss": -torch.where(asked, chosen, 0.0).sum(1),
        "accuracy": (right | ~asked).all(1).float(),
        "confidence": torch.where(asked, best, 0.0).sum(1).exp(),
        "prediction": torch.where(asked, said, -1),
    }


def _of_texts(
    logits: Float[Tensor, "row pos vocab"], targets: Int[Tensor, "row pos"], mask: Tensor
) -> dict[str, Tensor]:
    targets, mask = targets.to(logits.device), mask.to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    count = mask.sum(1)
    said = logits.detach().argmax(-1)
    return {
        "loss": torch.where(mask, losses, 0.0).sum(1) / count,
        "accuracy": ((said == targets) & mask).sum(1) / count,
        "confidence": torch.full_like(losses[:, 0].detach(), math.nan),
        "prediction": torch.where(mask, said, -1),
    }


def _logits(model: HookedModel, ids: Tensor, mask: Tensor, columns: Tensor | None) -> Tensor:
    """Logits in float32 or better, at the columns that are read. Gradients flow where they are enabled."""
    from contextlib import nullcontext

    with model.side(), model.logits_at(columns) if columns is not None else nullcontext():
        logits = model.module(**model.inputs(ids, mask)).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
