"""Prompts: their file, their tokens, and the positions at which the answer is read.

>>> [item] = read_prompts([{"prompt": "The capital of France is", "answer": " Paris", "topic": "geography"}])
>>> item.answer, item.fields
((' Paris',), {'topic': 'geography'})
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune_lens.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

EXPECTED = '{"prompt": "The capital of France is", "answer": " Paris"}'
PROBES = (
    "Hello world",
    " a leading space",
    "two  spaces,\ttab\nand\n\nnew lines ",
    "3.14159 + 2024 = 2027.14159",
    "naïve Ångström ☃ 你好 🙂",
    "def f(x):\n    return x != None",
    "don't WON'T I'll",
)


@dataclass(frozen=True)
class Prompt:
    """One prompt, and what may come after it. A text is tokenised as it stands: a space before the answer is its own.

    Attributes:
        prompt: the text.
        answer: accepted answers; most often one. A string is taken for one answer.
        wrong: answers to compare them with.
        corrupt: the counterfactual prompt.
        id: the file's, else the number of its line.
        fields: everything else that the file says of it; becomes coordinates.

    Raises:
        InputError: an empty text, something other than text, or an answer among the wrong ones.
    """

    prompt: str
    answer: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    corrupt: str | None = None
    id: str = ""
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_text("prompt", self.prompt)
        for name in ("answer", "wrong"):
            given = getattr(self, name)
            texts = (given,) if isinstance(given, str) else given
            if not isinstance(texts, list | tuple):
                raise InputError(f"`{name}`: expected a string or a list of strings, found {_shown(given)}")
            for text in texts:
                _require_text(name, text)
            object.__setattr__(self, name, tuple(texts))
        if self.corrupt is not None:
            _require_text("corrupt", self.corrupt)
        if both := sorted({*self.answer} & {*self.wrong}):
            raise InputError(f"{both[0]!r} is both an `answer` and `wrong`")


def _require_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise InputError(f"`{name}`: expected text that is not empty, found {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"`{name}`: {_shown(value)} is not valid Unicode (half a character, {error.reason})") from None


def _shown(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"


def read_prompts(source: "str | Path | Iterable[Prompt | Mapping | str]", *, limit: int | None = None) -> list[Prompt]:
    """Prompts of a JSONL file, or made from what is given.

    Args:
        source: path of a .jsonl file, one object a line: `prompt`, and optionally `answer` and `wrong` (a string or a
            list), `corrupt`, `id`, and free fields; or an iterable of `Prompt`, such objects, or texts without answers.
        limit: how many to read.

    Raises:
        InputError: which line (prompt) is wrong and why; no prompts; two of one id.
    """
    if isinstance(source, str | Path):
        items, place = _lines(Path(source)), f"{source}, line"
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        items, place = enumerate(source, 1), "prompt"
    else:
        raise InputError(f"expected the path of a .jsonl file or several prompts, found {_shown(source)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected how many prompts to read, 1 or more; found {limit}")
    prompts: dict[str, Prompt] = {}
    places: dict[str, int] = {}
    for number, item in items:
        try:
            prompt = _prompt(item, number)
        except InputError as error:
            raise InputError(f"{place} {number}: {error}") from None
        if prompt.id in prompts:
            raise InputError(
                f"{place} {number}: the id {prompt.id!r} is that of {place.split()[-1]} {places[prompt.id]}; give each "
                "prompt an id of its own, or none (its number is its id then)"
            )
        prompts[prompt.id], places[prompt.id] = prompt, number
        if len(prompts) == limit:
            break
    if not prompts:
        raise InputError(f"{source if isinstance(source, str | Path) else 'the list'} holds no prompts")
    return list(prompts.values())


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the JSON value of each line that is not blank."""
    if path.suffix.lower() != ".jsonl":
        raise InputError(
            f"{path}: prompts are read from JSON lines, a file named *.jsonl with one object a line such as {EXPECTED}"
        )
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; expected a .jsonl file of prompts")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                line = "\0"
            if "\0" in line:
                raise InputError(f"{path}, line {number} is not UTF-8 text; is this the file of the prompts?")
            if line:
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(
                        f"{path}, line {number} is not JSON ({error}): {_shown(line)}; expected one object a line "
                        f"such as {EXPECTED}"
                    ) from None
                if isinstance(value, str):  # a text alone is a prompt in Python, but a slip in a file
                    raise InputError(f"{path}, line {number}: expected an object such as {EXPECTED}, found a string")
                yield number, value


def _prompt(item: Any, number: int) -> Prompt:
    if isinstance(item, Prompt):
        return item if item.id else replace(item, id=str(number))
    if isinstance(item, str):
        return Prompt(item, id=str(number))
    if not isinstance(item, Mapping):
        raise InputError(f"expected an object such as {EXPECTED}, found {_shown(item)}")
    if "prompt" not in item:
        raise InputError(f"no `prompt` among {', '.join(map(str, item)) or 'its fields: it has none'}")
    name = item.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise InputError(f"`id`: expected text or a whole number, found {_shown(name)}")
    known = {key: item[key] for key in ("prompt", "answer", "wrong", "corrupt") if item.get(key) is not None}
    free = {key: value for key, value in item.items() if key not in ("prompt", "answer", "wrong", "corrupt", "id")}
    return Prompt(**{"prompt": None, **known}, id=str(name), fields=free)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of a batch of prompts (example pos), padded to one length; made by `encode`.

    Attributes:
        ids: the prompt's tokens; for whole answers followed by all tokens of the answer but the last.
        mask: True on tokens, False on padding.
        read_at: columns whose logits predict the answer's tokens: the last of the prompt, and for whole answers those
            after it; a shorter answer repeats its last column.
        answers: ids of the answer's tokens, -1 where there are none.
        wrongs: ids of the first token of each wrong answer, -1 where there are none; (example, 0) for whole answers.
        prompt_columns: True on the tokens before the answer, those of the chat template and special ones too.
        text_columns: True on the tokens of the user's own text.
        tokens: each example's, as the tokenizer prints them, without padding.
    """

    ids: "Int[Tensor, 'example pos']"
    mask: "Bool[Tensor, 'example pos']"
    read_at: "Int[Tensor, 'example answer']"
    answers: "Int[Tensor, 'example answer alternative']"
    wrongs: "Int[Tensor, 'example alternative']"
    prompt_columns: "Bool[Tensor, 'example pos']"
    text_columns: "Bool[Tensor, 'example pos']"
    tokens: list[list[str]]

    @property
    def position_ids(self) -> "Int[Tensor, 'example pos']":
        """Positions counted from the first token: padding on the left does not shift them."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Any) -> "Encoded":
        """Some of the examples, at the same length: a slice, numbers, or a mask."""
        import torch

        chosen = torch.arange(len(self))[index].reshape(-1)
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokens"}
        return Encoded(**{n: t[chosen] for n, t in held.items()}, tokens=[self.tokens[i] for i in chosen.tolist()])


def encode(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    corrupt: bool = False,
    template: bool = False,
    whole: bool = False,
    padding: Literal["left", "right"] = "left",
    need_answer: bool = True,
    length: int | None = None,
) -> Encoded:
    """Tokenise prompts and find where their answers are read.

    Prompt and answer are tokenised as one text, and the prompt's own tokens must be the first of it. Special tokens go
    in front as the tokenizer puts them there; one that it would put at the end is left out.

    Args:
        corrupt: encode the counterfactual prompts; the answers are the same.
        template: put each text as a user's message through the tokenizer's chat template.
        whole: score answers of several tokens, one answer a prompt; otherwise an answer is one token.
        padding: the side on which shorter examples are padded.
        need_answer: refuse prompts without an answer. Otherwise those that are there are encoded.
        length: pad to this many columns; by default those of the longest example.

    Raises:
        InputError: which prompt, and what keeps it from being read: a token that spans the end of the prompt, an
            unknown character, an answer of several tokens …
    """
    import torch

    if not prompts:
        raise InputError("there are no prompts to encode")
    if padding not in ("left", "right"):
        raise InputError(f"padding: expected 'left' or 'right', found {padding!r}")
    names = [f"prompt {prompt.id or number}" for number, prompt in enumerate(prompts, 1)]
    if corrupt:
        _refuse("no `corrupt` text", [p.corrupt is None for p in prompts], names)
    if need_answer:
        _refuse("no `answer`", [not p.answer for p in prompts], names)
    if whole:
        _refuse("more than one `answer`; as a whole, one is scored", [len(p.answer) > 1 for p in prompts], names)
    show = printer(tokenizer)
    readings = _read(prompts, [p.prompt for p in prompts], names, tokenizer, template, whole, show)
    if corrupt:
        clean = readings
        readings = _read(prompts, [p.corrupt or "" for p in prompts], names, tokenizer, template, whole, show)
        for name, prompt, one, other in zip(names, prompts, clean, readings, strict=True):
            if (one.answers, one.wrongs) != (other.answers, other.wrongs):
                raise InputError(
                    f"{name}: its answers are other tokens after the prompt, {_shown(prompt.prompt)}, than after "
                    f"`corrupt`, {_shown(prompt.corrupt)}; let both texts end alike"
                )
    rows = [r.prompt + [step[0] for step in r.answers[:-1]] for r in readings]
    width = max(map(len, rows))
    if length is not None and length < width:
        longest = names[[len(row) for row in rows].index(width)]
        raise InputError(f"length: {length} columns do not hold the {width} tokens of {longest}")
    width = length or width
    steps = max(1, *(len(r.answers) for r in readings))
    alternatives = max((len(step) for r in readings for step in r.answers), default=0)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    count = len(prompts)
    ids = torch.full((count, width), pad)
    mask, is_prompt, is_text = (torch.zeros(count, width, dtype=torch.bool) for _ in range(3))
    read_at = torch.zeros(count, steps, dtype=torch.int64)
    answers = torch.full((count, steps, alternatives), -1)
    wrongs = torch.full((count, max(len(r.wrongs) for r in readings)), -1)
    for i, (row, reading) in enumerate(zip(rows, readings, strict=True)):
        start = width - len(row) if padding == "left" else 0
        end = start + len(reading.prompt)
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = True
        is_prompt[i, start:end] = True
        is_text[i, start:end] = torch.tensor(reading.own)
        read_at[i] = torch.arange(end - 1, end - 1 + steps).clamp(max=start + len(row) - 1)
        for step, accepted in enumerate(reading.answers):
            answers[i, step, : len(accepted)] = torch.tensor(accepted)
        wrongs[i, : len(reading.wrongs)] = torch.tensor(reading.wrongs, dtype=torch.int64)
    printed = [[show(token) for token in row] for row in rows]
    return Encoded(ids, mask, read_at, answers, wrongs, is_prompt, is_text, printed)


def require_template(template: str) -> bool:
    """Whether prompts go through the chat template: "each", or "none". For what has all sides read the same tokens.

    Raises:
        InputError: something else; "tuned" too, by which the sides would read different tokens.
    """
    if template not in ("none", "each"):
        raise InputError(f"template is none or each, for all sides read the same tokens; found {template!r}")
    return template == "each"


def without_answers(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The texts alone, for what scores no answers: those of several tokens are no matter."""
    return [replace(prompt, answer=(), wrong=()) for prompt in prompts]


def _refuse(what: str, bad: list[bool], names: list[str]) -> None:
    found = [name for name, is_bad in zip(names, bad, strict=True) if is_bad]
    if found:
        few = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
        raise InputError(f"{len(found)} of {len(names)} prompts have {what}: {few}")


def printer(tokenizer: "PreTrainedTokenizerBase") -> Callable[[int], str]:
    """A token as the tokenizer prints it, with the space before a word that SentencePiece drops when it decodes."""

    @functools.cache
    def show(token: int) -> str:
        text, piece = (
            tokenizer.decode([token], clean_up_tokenization_spaces=False),
            tokenizer.convert_ids_to_tokens(token),
        )
        spaced = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
        return f" {text}" if spaced else text

    return show


@dataclass(frozen=True)
class _Reading:
    """The tokens of one example."""

    prompt: list[int]  # those before the answer
    own: list[bool]  # which of them are the user's text
    answers: list[list[int]]  # by step of the answer: the accepted tokens
    wrongs: list[int]


def _read(
    prompts: Sequence[Prompt],
    texts: list[str],
    names: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    template: bool,
    whole: bool,
    show: Callable[[int], str],
) -> list[_Reading]:
    """Tokens of `texts`, which stand for the prompts', and of the answers after them."""
    if template:
        texts, spans = _templated(texts, names, tokenizer)
    plain = _tokenised(texts, names, tokenizer)
    empty = [not tokens for tokens in plain]
    _refuse("a text of which the tokenizer leaves nothing", empty, names)
    if template:
        front, own = [], _inside(texts, spans, plain, tokenizer)
    else:
        front = _special_front(texts, plain, tokenizer)
        own = [[False] * len(front) + [True] * len(tokens) for tokens in plain]
    endings = [(i, end) for i, p in enumerate(prompts) for end in (*p.answer, *(() if whole else p.wrong))]
    joined = _tokenised([texts[i] + end for i, end in endings], [names[i] for i, _ in endings], tokenizer)
    tails: list[list[list[int]]] = [[] for _ in prompts]
    for (i, end), tokens in zip(endings, joined, strict=True):
        before = plain[i]
        if tokens[: len(before)] != before or len(tokens) == len(before):
            at = max(0, len(before) - 3)
            raise InputError(
                f"{names[i]}: no token begins where {end!r} does: the prompt ends in {_listed(before[at:], show)}, "
                f"prompt and answer in {_listed(tokens[at:], show)}; a space between the two most often belongs to the "
                "answer, not to the end of the prompt"
            )
        tails[i].append(tokens[len(before) :])
    readings = []
    for i, prompt in enumerate(prompts):
        right, wrong = tails[i][: len(prompt.answer)], tails[i][len(prompt.answer) :]
        if whole:
            steps = [[token] for answer in right for token in answer]
        else:
            _require_one_token(names[i], prompt, right, wrong, show)
            steps = [_distinct(right)] if right else []
        readings.append(_Reading(front + plain[i], own[i], steps, _distinct(wrong)))
    return readings


def _distinct(answers: list[list[int]]) -> list[int]:
    """Their first tokens, each once."""
    return list(dict.fromkeys(tokens[0] for tokens in answers))


def _require_one_token(
    name: str, prompt: Prompt, right: list[list[int]], wrong: list[list[int]], show: Callable[[int], str]
) -> None:
    for text, tokens in zip(prompt.answer, right, strict=True):
        if len(tokens) > 1:
            raise InputError(
                f"{name}: the answer {text!r} is {len(tokens)} tokens, {_listed(tokens, show)}; take answers of one "
                "token, or score whole answers by their summed log-probability (whole_answer=True, --whole-answer)"
            )
        for other, first in zip(prompt.wrong, wrong, strict=True):
            if first[0] == tokens[0]:
                raise InputError(
                    f"{name}: the answer {text!r} and the wrong one {other!r} begin with the same token, "
                    f"{show(tokens[0])!r}; take others that the first token tells apart"
                )


def _listed(tokens: list[int], show: Callable[[int], str]) -> str:
    return " + ".join(repr(show(token)) for token in tokens)


def _tokenised(texts: list[str], names: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Ids without special tokens; refuses what the vocabulary does not hold."""
    if not texts:
        return []
    try:
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers have no class of their own for it
        for name, text in zip(names, texts, strict=True):
            if not _readable(text, tokenizer):
                piece = next((p for p in _pieces(text, tokenizer) if not _readable(p, tokenizer)), text)
                raise InputError(f"{name}: the tokenizer has no token for {piece!r} in {_shown(text)}") from None
        raise InputError(f"the tokenizer does not read these prompts: {error}") from None
    unknown = tokenizer.unk_token_id
    for name, text, ids in zip(names, texts, tokens, strict=True):
        if unknown is not None and unknown in ids:
            piece = _unknown_piece(text, tokenizer)
            if piece is not None:
                raise InputError(f"{name}: the tokenizer has no token for {piece!r} in {_shown(text)}")
    return tokens


def _readable(text: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    try:
        tokenizer(text, add_special_tokens=False)
    except Exception:  # as above
        return False
    return True


def _pieces(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The words that the tokenizer looks up one by one."""
    before = tokenizer.backend_tokenizer.pre_tokenizer if tokenizer.is_fast else None
    return [piece for piece, _ in before.pre_tokenize_str(text)] if before else []


def _unknown_piece(text: str, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The first piece of the text that is read as the unknown token and is not its name."""
    if tokenizer.is_fast:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pieces = [
            text[start:end]
            for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)
            if token == tokenizer.unk_token_id
        ]
    else:
        pieces = [p for p in tokenizer.tokenize(text) if tokenizer.convert_tokens_to_ids(p) == tokenizer.unk_token_id]
    return next((piece for piece in pieces if piece.strip() != tokenizer.unk_token), None)


def _special_front(texts: list[str], plain: list[list[int]], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    special = {*tokenizer.all_special_ids}
    telling = next((i for i, tokens in enumerate(plain) if not special.issuperset(tokens)), 0)
    text, tokens = texts[telling], plain[telling]
    full = tokenizer(text)["input_ids"]
    for at in range(len(full) - len(tokens), -1, -1):
        if full[at : at + len(tokens)] == tokens:
            return full[:at]
    raise InputError(f"the tokenizer gives {_shown(text)} other tokens with special tokens around it than without")


MARK = "\ue000text\ue000"  # of the private-use area: in no template


def _templated(
    texts: list[str], names: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[str], list[tuple[int, int]]]:
    """Each text as a user's message in the chat template, and where in it the text lies (characters)."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tokenizer has no chat template; leave the template out, or give the tuned model's tokenizer"
        )

    def put(text: str) -> str:
        message = [{"role": "user", "content": text}]
        try:
            return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever the program in the template raises
            raise InputError(f"the tokenizer's chat template fails on a user's message: {error}") from None

    front, *rest = put(MARK).split(MARK)
    results, spans = [put(text) for text in texts], []
    for name, text, result in zip(names, texts, results, strict=True):
        end = len(result) - len("".join(rest))
        inside = result[len(front) : end]
        if len(rest) != 1 or inside.strip() != text.strip() or front + inside + rest[0] != result:
            raise InputError(f"{name}: the chat template does not hold {_shown(text)} in one piece: {_shown(result)}")
        spans.append((len(front), end))
    return results, spans


def _inside(
    texts: list[str], spans: list[tuple[int, int]], tokens: list[list[int]], tokenizer: "PreTrainedTokenizerBase"
) -> list[list[bool]]:
    """Which tokens lie in the span of their text; for tokenizers that do not tell, those that are not special."""
    if not tokenizer.is_fast:
        special = {*tokenizer.all_special_ids}
        return [[token not in special for token in row] for row in tokens]
    offsets = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        # the span of white space may be trimmed to its end
        [end > first and (start < last or start == end == last) for start, end in row]
        for (first, last), row in zip(spans, offsets, strict=True)
    ]


def require_alignment(
    prompts: Sequence[Prompt],
    encoded: Encoded,
    corrupted: Encoded | None = None,
    how: Literal["error", "left", "right"] = "error",
) -> None:
    """Refuse prompts of different token counts where positions are compared and nothing says which correspond.

    With "left" positions are counted from the first token, with "right" from the prompt's last; both pass.

    Raises:
        InputError: the first prompts that differ, from each other or from their `corrupt`, and their counts.
    """
    if how not in ("error", "left", "right"):
        raise InputError(f"align: expected 'error', 'left' or 'right', found {how!r}")
    if how != "error":
        return
    names = [prompt.id or str(number) for number, prompt in enumerate(prompts, 1)]
    advice = "pass align='left' or 'right' (--align) to say which positions correspond"
    counts = encoded.prompt_columns.sum(1).tolist()
    others = [n for n, count in enumerate(counts) if count != counts[0]]
    if others:
        few = ", ".join(f"{names[n]}: {counts[n]}" for n in [0, *others[:3]])
        raise InputError(
            f"prompts have {min(counts)} to {max(counts)} tokens ({few}{' …' * (len(others) > 3)}); {advice}"
        )
    if corrupted is not None:
        changed = corrupted.prompt_columns.sum(1).tolist()
        for name, count, other in zip(names, counts, changed, strict=True):
            if count != other:
                raise InputError(f"prompt {name} has {count} tokens, its `corrupt` text {other}; {advice}")


def same_tokenizer(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase") -> list[str]:
    """What of two tokenizers differs that matters where their models are compared; empty when they agree.

    Looked at: the vocabulary where both have ids, special tokens and whether they are added, the chat template, and the
    ids of a few texts. Tokens appended by one of them are no difference.
    """
    found = _vocabulary_differences(a.get_vocab(), b.get_vocab())
    for name in ("bos", "eos", "pad", "unk"):
        one, other = (getattr(t, f"{name}_token_id") for t in (a, b))
        if one != other:
            found.append(f"{name} token: id {one} against {other}")
    one, other = ([*t("")["input_ids"]] for t in (a, b))
    if one != other:
        found.append(f"special tokens added to a text: {one} against {other}")
    one, other = (getattr(t, "chat_template", None) for t in (a, b))
    if one != other:
        found.append(f"chat template: {'none' if not one else 'one'} against {'none' if not other else 'another'}")
    for text in PROBES:
        one, other = (
            list(t(text, add_special_tokens=False)["input_ids"]) if _readable(text, t) else "unreadable" for t in (a, b)
        )
        if one != other:
            found.append(f"{text!r}: tokens {_shown(one)} against {_shown(other)}")
    return found


def _vocabulary_differences(a: Mapping[str, int], b: Mapping[str, int]) -> list[str]:
    """One line on the ids, of those both know, that stand for different tokens, and on the tokens that moved."""
    names, others = ({i: token for token, i in vocabulary.items()} for vocabulary in (a, b))
    differ = {i for i in names.keys() & others.keys() if names[i] != others[i]}
    differ |= {i for token, i in a.items() if b.get(token, i) != i}
    if not differ:
        return []
    few = ", ".join(f"{i}: {names[i]!r} against {others.get(i)!r}" for i in sorted(differ)[:3])
    return [f"vocabulary: {len(differ)} ids stand for different tokens: {few}{' …' * (len(differ) > 3)}"]
