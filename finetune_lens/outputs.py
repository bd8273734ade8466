"""Where do the two models' predictions differ? Everyone's first question of a base and a tuned model.

Both read the same texts. At every token, of the two next-token distributions p (base) and q (tuned), in nats:

    KL(p ‖ q), KL(q ‖ p), Jensen–Shannon divergence, entropies, whether the likeliest token flips,
    loss −log p(next token of the text), and where prompts have answers their metrics on both sides

and by depth, the logit lens (nostalgebraist 2020): the residual stream after each block read out through the model's
own final norm and unembedding. Means are over the positions of a text, then over texts; intervals resample texts, both
sides of a text together.

Cost: one forward pass a side; the lens adds an unembedding of every position at every block.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> texts = [{"prompt": f"<{task}>{word}=", "answer": word[0]} for task in ("copy", "flip") for word in ("abz", "gkz")]
>>> found = compare_outputs(ModelPair.load(folder / "base", folder / "full"), texts, progress=False)
>>> frame = found.table().set_index("measure")
>>> bool(frame.loc["KL(base ‖ tuned)", "difference"] > 0)
True
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from finetune_lens.hooked.side_by_side import Reading
    from finetune_lens.pair import ModelPair
    from finetune_lens.prompts import Encoded
    from finetune_lens.results.outputs import Outputs

TEMPLATES = {"none": (False, False), "each": (True, True), "tuned": (False, True)}  # on the base's, the tuned's texts
UNIT = 32  # texts that are computed, kept and counted as one
TOKENS = {"cpu": 2048, "cuda": 16384}  # columns in a forward pass
SHIFTED = 100  # tokens of the vocabulary that the result names


@recorded
def compare_outputs(
    pair: "ModelPair",
    prompts: Any,
    *,
    lens: bool = True,
    template: str = "none",
    whole_answer: bool = False,
    batch_size: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    check: bool = True,
    progress: bool = True,
    partial: Path | None = None,
) -> "Outputs":
    """Compare what base and tuned model predict on the same texts.

    Args:
        pair: base and tuned; both have to run.
        prompts: a JSONL file, or a list of texts or of mappings with prompt and, where there is one, answer, wrong.
        lens: the logit lens of both sides at every depth.
        template: chat template around the texts: none; each (both sides their own); tuned (the base reads the bare
            text). With a template the user's own tokens are compared, and the place where the answer begins.
        whole_answer: score all tokens of the answer (logprob), not the first alone.
        batch_size: texts at once.
        check: refuse a pair that fails the trust gate (`check_pair`).

    Raises:
        InputError: tokenizers that read a text differently, no texts, answers of several tokens.
        GateFailed: the trust gate found this pair unsafe to compare.
    """
    from finetune_lens.check import require_safe
    from finetune_lens.prompts import read_prompts
    from finetune_lens.results.outputs import Outputs

    if template not in TEMPLATES:
        raise InputError(f"template is one of {', '.join(TEMPLATES)}; found {template!r}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch size is at least 1; found {batch_size}")
    items = read_prompts(prompts, limit=limit)
    base, tuned = pair.models(device=device, dtype=dtype)
    if lens and base.layers != tuned.layers:
        raise InputError(
            f"{base.name} has {base.layers} layers and {tuned.name} {tuned.layers}: their lenses cannot be compared "
            "depth by depth; pass lens=False (--no-lens)"
        )
    one, other = _readings((base, tuned), items, template, whole_answer)
    if check:
        require_safe(pair, device=device, dtype=dtype)
    arguments = {"analysis": "outputs", "lens": lens, "template": template, "whole": whole_answer}
    found = _measured(one, other, lens, batch_size, progress, partial, arguments)
    return Outputs(_labelled(found, one, other, items, lens, template))


def _readings(models: Sequence[Any], items: Sequence[Any], template: str, whole: bool) -> tuple["Reading", "Reading"]:
    """Both sides' encodings, and which columns of them are compared.

    Raises:
        InputError: texts whose own tokens are not the same on both sides.
    """
    import torch

    from finetune_lens.hooked.side_by_side import Reading
    from finetune_lens.prompts import encode

    sides = [
        encode(items, m.require_tokenizer(), template=t, whole=whole, need_answer=False, padding="right")
        for m, t in zip(models, TEMPLATES[template], strict=True)
    ]
    columns = [_columns(side, template) for side in sides]
    for row, item in enumerate(items):
        mine, theirs = (side.ids[row, c[row]] for side, c in zip(sides, columns, strict=True))
        own = slice(None) if template == "none" else slice(0, -1)  # the last is where the answer begins
        if mine[own].tolist() != theirs[own].tolist():
            printed = [
                [side.tokens[row][int(side.mask[row, :c].sum())] for c in cs[row]]
                for side, cs in zip(sides, columns, strict=True)
            ]
            raise InputError(
                f"base and tuned model read prompt {item.id} as different tokens: {printed[0]} and {printed[1]}; "
                "give one tokenizer to both (--tokenizer)"
            )
    if not all(torch.equal(getattr(sides[0], name), getattr(sides[1], name)) for name in ("answers", "wrongs")):
        raise InputError("base and tuned model read the answers as different tokens; give one tokenizer to both")
    shared = min(m.vocabulary for m in models)
    for row, item in enumerate(items):
        if (
            max(int(part[row].max()) if part[row].numel() else -1 for part in (sides[0].answers, sides[0].wrongs))
            >= shared
        ):
            raise InputError(
                f"prompt {item.id}: an answer or a wrong answer is a token beyond the {shared} that both models have"
            )
    return tuple(Reading(m, side, c) for m, side, c in zip(models, sides, columns, strict=True))


def _columns(side: "Encoded", template: str) -> list[np.ndarray]:
    """Without a template every token of the prompt; with one the user's own but the last, and the prompt's last."""
    if template == "none":
        return [np.flatnonzero(row) for row in side.prompt_columns.numpy()]
    own = [np.flatnonzero(row)[:-1] for row in side.text_columns.numpy()]
    return [np.append(c, end) for c, end in zip(own, side.read_at[:, 0].numpy(), strict=True)]


def _measured(
    one: "Reading", other: "Reading", lens: bool, batch_size: int | None, progress: bool, partial: Path | None,
    arguments: dict[str, Any],
) -> list[dict[str, np.ndarray]]:  # fmt: skip
    """What was measured, unit by unit; finished units are kept in `partial`, and read from there."""
    from tqdm.auto import tqdm

    from finetune_lens.stream import Store

    store = None
    prints = (one.model.fingerprint, other.model.fingerprint)
    if partial is not None and all(prints):
        facts = arguments | {
            "models": [s.model.describe() | {"adapted": s.model.adapted} for s in (one, other)],
            "texts": [[s.prompts.ids.tolist(), s.prompts.read_at.tolist()] for s in (one, other)],
            "answers": [one.prompts.answers.tolist(), one.prompts.wrongs.tolist()], "unit": UNIT,
        }  # fmt: skip
        store = Store(partial, repr(prints), facts)
    texts, found = len(one.prompts), []
    with tqdm(total=texts, desc="texts", unit="", disable=not progress, dynamic_ncols=True) as bar:
        for start in range(0, texts, UNIT):
            index = np.arange(start, min(start + UNIT, texts))
            done = store.get(str(start)) if store else None
            if done is None:
                done = _unit(one.rows(index), other.rows(index), lens, batch_size)
                if store:
                    store.put(str(start), done)
            found.append(done)
            bar.update(len(index))
    return found


def _unit(one: "Reading", other: "Reading", lens: bool, batch_size: int | None) -> dict[str, np.ndarray]:
    """Some texts, a batch at a time: fewer where memory does not hold them."""
    import torch

    from finetune_lens.hooked.side_by_side import compare

    width = max(one.prompts.ids.shape[1], other.prompts.ids.shape[1])
    size = batch_size or max(1, TOKENS.get(one.model.device.type, TOKENS["cpu"]) // width)
    parts, start = [], 0
    while start < len(one.prompts):
        index = np.arange(start, min(start + size, len(one.prompts)))
        try:
            part = compare(one.rows(index), other.rows(index), lens=lens)
        except torch.OutOfMemoryError:
            if len(index) == 1:
                raise
            torch.cuda.empty_cache()
            size = len(index) // 2
            continue
        shift = part.pop("shift").astype(np.float64)
        part |= {"shift": shift.sum(0), "shift_squares": (shift**2).sum(0)}
        parts.append(part)
        start += len(index)
    return _joined(parts)


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Sums over the vocabulary added up, the rest side by side along the texts."""
    found = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("shift", "shift_squares", "base_prob"):
            found[name] = np.sum(values, 0)
        elif name in ("kl", "kl_reverse", "js", "flip", "entropy", "loss", "top", "top_prob"):
            width = max(v.shape[-1] for v in values)
            short = [
                np.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, width - v.shape[-1])], constant_values=np.nan) for v in values
            ]
            found[name] = np.concatenate(short, -2)
        else:
            found[name] = np.concatenate(values, -1)
    return found


def _labelled(
    parts: list[dict[str, np.ndarray]],
    one: "Reading",
    other: "Reading",
    items: Sequence[Any],
    lens: bool,
    template: str,
) -> Any:
    import json

    import xarray as xr

    from finetune_lens.hooked.effects import describe_prompts
    from finetune_lens.prompts import printer

    found = _joined(parts)
    dims = dict.fromkeys(("kl", "kl_reverse", "js", "flip"), ("example", "position"))
    dims |= dict.fromkeys(("entropy", "loss", "top_prob"), ("side", "example", "position"))
    dims |= dict.fromkeys(("logit_diff", "logprob", "prob", "reciprocal_rank", "accuracy"), ("side", "example"))
    if lens:
        dims |= dict.fromkeys(("lens_loss", "lens_agreement", "lens_answer"), ("side", "depth", "example"))
        dims["lens_kl"] = ("depth", "example")
    data = {name: (d, found[name]) for name, d in dims.items() if name in found}
    width = found["kl"].shape[-1]
    data["token"] = (("example", "position"), _printed(one, width))
    show = printer(one.model.require_tokenizer())
    tops = {i: show(int(i)) for i in np.unique(found["top"][~np.isnan(found["top"])])}
    data["top"] = (
        ("side", "example", "position"),
        np.vectorize(lambda i: tops.get(i, ""), otypes=[object])(found["top"]),
    )
    coords = {"side": np.array(["base", "tuned"], dtype=object), "position": np.arange(width)}
    coords["example"] = np.array([item.id for item in items], dtype=object)
    if lens:
        coords["depth"] = np.arange(one.model.layers + 1)
    shift, texts = found["shift"] / len(items), len(items)
    largest = np.argsort(-np.abs(shift), kind="stable")[:SHIFTED]
    spread = np.maximum(found["shift_squares"] / texts - shift**2, 0)
    error = np.sqrt(spread / (texts - 1)) if texts > 1 else np.full_like(shift, np.nan)
    words = [show(int(i)) for i in largest]
    coords |= {"word": np.array(words, dtype=object), "token_id": ("word", largest)}
    data |= {
        "shift": ("word", shift[largest]),
        "shift_error": ("word", error[largest]),
        "base_prob": ("word", found["base_prob"][largest] / texts),
    }
    notes = [] if one.model.vocabulary == other.model.vocabulary else ["only tokens that both models have are compared"]
    broken = int((np.isnan(found["entropy"]).any(0) & (data["token"][1] != "")).sum())
    if broken:
        notes.append(f"{broken} positions have logits that are NaN: they are left out of every mean")
    if template == "tuned":
        notes.append("the tuned model read the texts within its chat template, the base without")
    record = {
        "notes": notes, "prompts": describe_prompts(items),
        "models": {"base": one.model.describe(), "tuned": other.model.describe()},
    }  # fmt: skip
    return xr.Dataset(data, coords=coords).assign_attrs(
        template=template, vocabulary=min(one.model.vocabulary, other.model.vocabulary), provenance=json.dumps(record)
    )


def _printed(side: "Reading", width: int) -> np.ndarray:
    """(example, position): the compared tokens, "" where there are none."""
    table = np.full((len(side.columns), width), "", dtype=object)
    for row, columns in enumerate(side.columns):
        first = int(side.prompts.mask[row].numpy().argmax())
        table[row, : len(columns)] = [side.prompts.tokens[row][c - first] for c in columns]
    return table


def main() -> None:
    import typer

    from finetune_lens.command import Base, OutputFolder, Running, Tuned, Unsafe, finish, run

    def outputs(
        base: Base,
        tuned: Tuned,
        prompts: Annotated[
            Path, typer.Argument(metavar="PROMPTS", help="JSONL: prompt and, where there is one, answer.")
        ],
        *,
        lens: Annotated[bool, typer.Option("--lens/--no-lens", help="The logit lens of both sides.")] = True,
        template: Annotated[
            str, typer.Option(help="Chat template: none, each, tuned (the base reads bare text).")
        ] = "none",
        whole_answer: Annotated[
            bool, typer.Option("--whole-answer", help="Score all tokens of the answer together.")
        ] = False,
        unsafe: Unsafe = False,
        common: Running,
    ) -> None:
        """Compare what the two models predict on the same texts: divergence, flips, loss, answers, logit lens."""
        from finetune_lens.prompts import read_prompts

        folder = OutputFolder(common.out, "outputs", force=common.force)
        items = read_prompts(prompts, limit=common.limit)
        pair = common.pair(base, tuned)
        folder.check()
        result = compare_outputs(
            pair, items, lens=lens, template=template, whole_answer=whole_answer, check=not unsafe,
            partial=folder.partial, **common.execution(),
        )  # fmt: skip
        finish(result, folder, common)

    run(outputs)


if __name__ == "__main__":
    from finetune_lens.outputs import main

    main()
