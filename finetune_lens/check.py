"""Is this pair, on this machine, safe to draw conclusions from? What must hold before one compares, measured.

Each gate compares two ways to the same numbers (hooked and plain, batched and alone, padded and not, patched with
itself and not, …) or the two models' premises (tokens, shapes, dtypes, weights). A difference of logits is relative to
the largest logit. Analyses across models run the gates first, once a pair, and refuse where one fails.

Cost: about 40 forward passes of a few short texts on each side; memory: nothing beyond the models.

>>> from finetune_lens import ModelPair, zoo
>>> folder = zoo.path("strings")
>>> check_pair(ModelPair.load(folder / "base", folder / "full"), progress=False).passed
True
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from finetune_lens.errors import GateFailed, InputError
from finetune_lens.results.provenance import recorded

if TYPE_CHECKING:
    from torch import Tensor

    from finetune_lens.hooked import HookedModel
    from finetune_lens.pair import ModelPair
    from finetune_lens.results.check import Check

# Largest differences of logits, relative to the largest logit: of the same sums, and of sums in another order.
SAME = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
REORDERED = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
LENGTHS = (12, 9, 7, 12)  # of the texts that are made up
# Of two tokenizers: what changes how a conversation is framed, not how a text is read.
FRAMING = ("chat template", "eos token", "pad token")


@dataclass(frozen=True)
class Gate:
    """One line of the verdict."""

    gate: str
    side: str
    verdict: str
    message: str = ""
    measured: float = np.nan
    limit: float = np.nan


@recorded
def check_pair(
    pair: "ModelPair",
    prompts: Any = None,
    *,
    seed: int = 0,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
) -> "Check":
    """Run the gates on a pair.

    Args:
        pair: base and tuned; both have to run.
        prompts: a JSONL file, or a list of mappings, whose texts the gates use; by default random tokens.
        seed: of the random tokens.
        limit: of the prompts, use the first so many; default 4.

    Raises:
        InputError: models that do not run, or whose blocks are not known here.
    """
    import xarray as xr
    from tqdm import tqdm

    from finetune_lens.results.check import Check

    base, tuned = pair.models(device=device, dtype=dtype)
    rows = _rows(base, tuned, prompts, seed, limit)
    steps: list[Callable[[], list[Gate]]] = [lambda: _premises(pair, base, tuned)]
    plain: dict[str, list[Tensor]] = {}
    for side, model in (("base", base), ("tuned", tuned)):
        steps += _side_steps(side, model, rows, plain)
    steps.append(lambda: _between(base, tuned, rows, plain))
    found: list[Gate] = []
    for step in tqdm(steps, desc="gates", disable=not progress, leave=False):
        found += step()
    columns = {name: np.array([getattr(g, name) for g in found], dtype=object) for name in ("verdict", "message")}
    columns |= {name: np.array([getattr(g, name) for g in found], float) for name in ("measured", "limit")}
    names = {name: ("gate", np.array([getattr(g, name) for g in found], dtype=object)) for name in ("gate", "side")}
    data = xr.Dataset({name: ("gate", values) for name, values in columns.items()}, coords=names)
    return Check(data)


def require_safe(pair: "ModelPair", *, device: str = "auto", dtype: str = "auto") -> None:
    """Run the gates, once for a pair as it is loaded, and refuse it where one fails.

    Raises:
        GateFailed: which, and how to go on all the same.
    """
    key = (repr(device), dtype)
    if key not in pair.checked:
        pair.checked[key] = check_pair(pair, device=device, dtype=dtype, progress=False).failures
    failures = pair.checked[key]
    if failures:
        shown = "; ".join(" ".join(line.split()[1:]) for line in failures)
        raise GateFailed(
            f"this pair is not safe to compare: {shown}. `python -m finetune_lens.check` shows every gate; to go on "
            "all the same pass check=False (--unsafe)"
        )


def _rows(base: "HookedModel", tuned: "HookedModel", prompts: Any, seed: int, limit: int | None) -> list[list[int]]:
    from finetune_lens.hooked.gates import random_rows

    if prompts is not None:
        from finetune_lens.prompts import encode, read_prompts, without_answers

        items = read_prompts(prompts, limit=limit or len(LENGTHS))
        encoded = encode(without_answers(items), base.require_tokenizer(), need_answer=False)
        rows = [ids[mask].tolist() for ids, mask in zip(encoded.ids, encoded.mask, strict=True)]
        if len({*map(len, rows)}) == 1:  # texts of one length need no padding: cut them to several
            rows = [row[: max(2, len(row) - at)] for at, row in enumerate(rows)]
        if min(map(len, rows)) < 2:
            raise InputError("the gates need texts of two tokens or more")
        return rows
    special = {i for model in (base, tuned) if model.tokenizer for i in model.tokenizer.all_special_ids}
    reach = [getattr(m.module.config.get_text_config(), "max_position_embeddings", None) for m in (base, tuned)]
    longest = min([n for n in reach if n], default=LENGTHS[0])
    lengths = [max(2, min(n, longest - (LENGTHS[0] - n))) for n in LENGTHS]
    rows = random_rows(min(base.vocabulary, tuned.vocabulary), lengths, seed, sorted(special))
    front = _front(base)
    return [(front + row)[: len(row)] if len(front) < len(row) else row for row in rows]


def _front(model: "HookedModel") -> list[int]:
    """The special token that its tokenizer puts before every text: without it some models' numbers are far off."""
    if model.tokenizer is None:
        return []
    first = model.tokenizer("")["input_ids"][:1]
    return first if first == [model.tokenizer.bos_token_id] else []


def _premises(pair: "ModelPair", base: "HookedModel", tuned: "HookedModel") -> list[Gate]:
    """What the two must have in common before anything is run."""
    return [_shapes(base, tuned), _dtypes(pair, base, tuned), *_tokenizers(base, tuned)]


def _shapes(base: "HookedModel", tuned: "HookedModel") -> Gate:
    sizes = [
        {"layers": m.layers, "heads": m.heads, "width": m.module.get_input_embeddings().weight.shape[-1]}
        for m in (base, tuned)
    ]
    differing = [
        f"{name}: {sizes[0][name]} against {sizes[1][name]}" for name in sizes[0] if sizes[0][name] != sizes[1][name]
    ]
    if differing:
        return Gate("shapes agree", "both", "FAIL", "; ".join(differing) + "; activations cannot be exchanged")
    sizes_said = ", ".join(f"{n} {name}" if name != "width" else f"width {n}" for name, n in sizes[0].items())
    if base.vocabulary != tuned.vocabulary:
        words = f"{sizes_said}; vocabularies of {base.vocabulary} and {tuned.vocabulary}: shared tokens are compared"
        return Gate("shapes agree", "both", "note", words)
    return Gate("shapes agree", "both", "pass", sizes_said)


def _dtypes(pair: "ModelPair", base: "HookedModel", tuned: "HookedModel") -> Gate:
    running = [str(m.dtype).removeprefix("torch.") for m in (base, tuned)]
    if running[0] != running[1]:
        return Gate(
            "dtypes agree", "both", "FAIL",
            f"the base runs in {running[0]} and the tuned model in {running[1]}: rounding alone makes them differ; "
            "load both in one dtype (--dtype float32; of models in memory: module.float())",
        )  # fmt: skip
    stored = [_stored(c) for c in (pair.base_checkpoint, pair.tuned_checkpoint)]
    words = f"both run in {running[0]}"
    if all(stored) and stored[0] != stored[1]:
        words += f"; stored as {stored[0]} and {stored[1]}, so rounding is part of the difference"
        return Gate("dtypes agree", "both", "note", words)
    if running[0] in ("float16", "bfloat16"):
        return Gate("dtypes agree", "both", "note", f"{words}: small effects are lost in rounding")
    return Gate("dtypes agree", "both", "pass", words)


def _stored(checkpoint: Any) -> str:
    """The dtypes of the floating-point tensors of a file; "" for an adapter, which is not cast to the base's."""
    if "adapter" in checkpoint.origin:
        return ""
    kinds = {str(s.dtype).removeprefix("torch.") for s in checkpoint.tensors.values() if s.dtype.is_floating_point}
    return ", ".join(sorted(kinds))


def _tokenizers(base: "HookedModel", tuned: "HookedModel") -> list[Gate]:
    from finetune_lens.prompts import same_tokenizer

    if base.tokenizer is None or tuned.tokenizer is None:
        lacking = (
            "both have"
            if base.tokenizer is tuned.tokenizer
            else f"the {'base' if not base.tokenizer else 'tuned model'} has"
        )
        words = f"{lacking} no tokenizer beside the weights; token ids are taken to mean the same"
        return [Gate("tokenizers agree", "both", "skipped", words)]
    one = base.tokenizer is tuned.tokenizer
    found = [] if one else same_tokenizer(base.tokenizer, tuned.tokenizer)
    reading = [line for line in found if not line.startswith(FRAMING)]
    framing = [line for line in found if line.startswith(FRAMING)]
    if reading:
        gates = [
            Gate(
                "tokenizers agree",
                "both",
                "FAIL",
                "; ".join(reading) + "; texts are read differently, pass one --tokenizer",
            )
        ]
    elif one:
        gates = [Gate("tokenizers agree", "both", "note", "one tokenizer reads for both sides")]
    else:
        gates = [Gate("tokenizers agree", "both", "pass", "same ids, special tokens and readings of a few texts")]
    if framing:
        gates.append(Gate("conversations are framed alike", "both", "note", "; ".join(framing)))
    for side, model in (("base", base), ("tuned", tuned)):
        beyond = sum(i >= model.vocabulary for i in model.tokenizer.get_vocab().values())
        if model.tokenizer.vocab_size > model.vocabulary:
            words = f"the tokenizer has {beyond} tokens beyond the model's {model.vocabulary}; is it another's?"
            gates.append(Gate("tokens have embeddings", side, "FAIL", words))
        elif beyond:
            words = f"{beyond} added tokens have none; a text with one of them is refused"
            gates.append(Gate("tokens have embeddings", side, "note", words))
    return gates


def _side_steps(
    side: str, model: "HookedModel", rows: list[list[int]], plain: dict[str, list["Tensor"]]
) -> list[Callable[[], list[Gate]]]:
    """The gates of one model, as functions to call in this order."""
    from finetune_lens.hooked import gates

    name = str(model.dtype).removeprefix("torch.")
    same, reordered = SAME.get(name, 1e-5), REORDERED.get(name, 1e-4)

    def start() -> list[Gate]:
        plain[side] = gates.alone(model, rows)
        return [_finite_weights(side, gates.nonfinite(model)), _finite_logits(side, plain[side])]

    def measured(
        gate: str, limit: float, measure: Callable[[], float], advice: str, lacking: str = ""
    ) -> Callable[[], list[Gate]]:
        if lacking:
            return lambda: [Gate(gate, side, "skipped", lacking)]
        return lambda: [_judged(gate, side, measure(), limit, advice)]

    one = "there is one text only" if len(rows) == 1 else ""
    alike = one or ("all texts have one length" if len({*map(len, rows)}) == 1 else "")

    def reentry() -> list[Gate]:
        worst, notes = gates.reentered(model, rows)
        if notes:
            return [Gate("re-entry = whole pass", side, "note", "; ".join(notes))]
        return [_judged("re-entry = whole pass", side, worst, reordered, "patch with method='full'")]

    return [
        start,
        measured("hooked = plain", same, lambda: gates.hooked(model, rows, plain[side]),
                 "the sites of this architecture are not read without a trace: do not trust any capture"),
        measured("self-patch changes nothing", same, lambda: gates.put_back(model, rows, plain[side]),
                 "an activation put back where it was changes the run: do not trust any patch"),
        measured("batched = unbatched", reordered, lambda: gates.batched(model, rows),
                 "rows of a batch act on each other; run with batch size 1", one),
        measured("padded on the left = unpadded", reordered, lambda: gates.padding(model, rows, plain[side], "left"),
                 "the model sees its padding; use prompts of one length", alike),
        measured("padded on the right = unpadded", reordered, lambda: gates.padding(model, rows, plain[side], "right"),
                 "the model sees its padding, or tokens to come; use prompts of one length", alike),
        reentry,
    ]  # fmt: skip


def _judged(gate: str, side: str, measured: float, limit: float, advice: str) -> Gate:
    if measured <= limit:
        return Gate(gate, side, "pass", "", measured, limit)
    return Gate(gate, side, "FAIL", advice, measured, limit)


def _finite_weights(side: str, bad: dict[str, int]) -> Gate:
    if not bad:
        return Gate("weights are finite", side, "pass")
    few = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:3]) + " …" * (len(bad) > 3)
    return Gate("weights are finite", side, "FAIL", f"NaN or Inf in {len(bad)} tensors: {few}; is the file damaged?")


def _finite_logits(side: str, plain: Sequence["Tensor"]) -> Gate:
    """Logits of −inf are how some models mask tokens; NaN and +inf are not."""
    bad = sum(int((~(logits < float("inf"))).sum()) for logits in plain)
    if not bad:
        return Gate("logits are finite", side, "pass")
    return Gate(
        "logits are finite", side, "FAIL", f"{bad} logits are NaN or +Inf; in half precision try --dtype float32"
    )


def _between(
    base: "HookedModel", tuned: "HookedModel", rows: list[list[int]], plain: dict[str, list["Tensor"]]
) -> list[Gate]:
    """Gates that need both models to have run."""
    found = [_changes(base, tuned, plain), _shared(base, tuned)]
    if _shapes(base, tuned).verdict == "FAIL":
        return found
    return [*found, *_last_layer(base, tuned, rows, plain)]


def _changes(base: "HookedModel", tuned: "HookedModel", plain: dict[str, list["Tensor"]]) -> Gate:
    from finetune_lens.hooked.gates import difference

    vocabulary = min(base.vocabulary, tuned.vocabulary)
    pairs = zip(plain["base"], plain["tuned"], strict=True)
    worst = max(difference(b[:, :vocabulary], a[:, :vocabulary]) for a, b in pairs)
    name, limit = "tuning changes the outputs", SAME.get(str(base.dtype).removeprefix("torch."), 1e-5)
    if worst == 0:
        why = "the adapter is off or does nothing" if base.module is tuned.module else "the two are one model"
        return Gate(name, "both", "FAIL", f"not one logit differs: {why}", worst)
    if worst <= limit:
        return Gate(name, "both", "note", "by no more than rounding does", worst)
    return Gate(name, "both", "pass", "", worst)


def _shared(base: "HookedModel", tuned: "HookedModel") -> Gate:
    """Whether one set of weights, its adapter off, still is the base that was loaded."""
    import torch

    name = "adapter off = base"
    if base.module is not tuned.module:
        return Gate(name, "base", "skipped", "two sets of weights")
    if base.known is None:
        return Gate(name, "base", "skipped", "the base was never run by itself")
    ids, expected = base.known
    with torch.no_grad():
        found = base.run(ids).logits
    worst = float((found - expected).abs().max())
    if torch.equal(found, expected):
        return Gate(name, "base", "pass", "bit for bit", worst)
    return Gate(
        name, "base", "FAIL", "the shared weights are no longer those of the base's file: load the pair again", worst
    )


def _last_layer(
    base: "HookedModel", tuned: "HookedModel", rows: list[list[int]], plain: dict[str, list["Tensor"]]
) -> list[Gate]:
    """The donor's last residual stream gives the donor's logits, where what comes after is the same on both sides."""
    from finetune_lens.hooked import gates

    name = "last residual patched = donor"
    differing = gates.differing_after_blocks(base, tuned)
    limit = SAME.get(str(base.dtype).removeprefix("torch."), 1e-5)
    found = []
    for side, recipient, donor in (("base", base, tuned), ("tuned", tuned, base)):
        donors = plain["tuned" if side == "base" else "base"]
        if recipient.vocabulary != donor.vocabulary:
            found.append(Gate(name, side, "skipped", "the vocabularies differ"))
            continue
        worst = gates.last_layer(recipient, donor, rows, donors)
        if differing:
            words = f"need not hold: {', '.join(differing)} differ between base and tuned model"
            found.append(Gate(name, side, "note", words, worst))
        elif worst <= limit:
            found.append(Gate(name, side, "pass", "final norm and unembedding are shared", worst, limit))
        else:
            words = "final norm and unembedding are shared, yet more than the last residual stream reaches the logits"
            found.append(Gate(name, side, "FAIL", words, worst, limit))
    return found


def main() -> None:
    import typer

    from finetune_lens.command import Base, CheckFailed, OutputFolder, Running, Tuned, finish, run

    def check(
        base: Base,
        tuned: Tuned,
        prompts: Annotated[
            Path | None,
            typer.Argument(
                metavar="[PROMPTS]",
                help="JSONL whose texts the gates use.  [default: random tokens]",
                show_default=False,
            ),
        ] = None,
        *,
        common: Running,
    ) -> None:
        """Is this pair, on this machine, safe to draw conclusions from? A verdict a line; exit code 1 if one fails."""
        folder = OutputFolder(common.out, "check", force=common.force)
        pair = common.pair(base, tuned)
        folder.check()
        result = check_pair(
            pair, prompts, seed=common.seed, limit=common.limit, device=common.device, dtype=common.dtype,
            progress=common.progress,
        )  # fmt: skip
        finish(result, folder, common)
        if not result.passed:
            raise CheckFailed(f"{len(result.failures)} of {result.data.sizes['gate']} gates")

    run(check)


if __name__ == "__main__":
    from finetune_lens.check import main

    main()
