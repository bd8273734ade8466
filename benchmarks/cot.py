"""All truncations of chains in one pass, and each step cut out of attention, against a forward pass each.

Answers are asserted equal.

    python benchmarks/cot.py [--device cpu] [--questions 8] [--steps 20] [--option 1] [--rounds 3] [--no-naive]

A model of GPT-2-small's shape with random weights. A question has a prompt of 60 tokens and a chain of 20 steps of 15
tokens; after each step, and before the first, a cue of 5 tokens and 2 to 4 options. "One forward" is the plain Hugging
Face module on prompt, chain and cue, logits at the last token only; "each truncation" is such a pass for each of the
n + 1 truncations (and each option of several tokens), all questions in one batch, nothing padded: both as fast as they
can be. Seconds are processor time on a CPU. Arithmetic is counted by torch's flop counter on the same calls for one
question, without the check of the model that a call begins with (28 tokens).

"Each step cut" keeps later tokens from attending to a step's, and to as many random ones, in all layers and heads, for
each of the n steps of one chain; "each cut alone" gives the plain module a mask for each of the 2n cuts.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

PROMPT, STEP, CUE = 60, 15, 5
os.environ["TQDM_DISABLE"] = "1"


def inputs(questions: int, steps: int, option: int) -> tuple[list[list[int]], list[list[int]], list[list[list[Any]]]]:
    """Tokens of prompt and chain, cuts, and branches of options of so many tokens."""
    from finetune_lens.cot.branches import Branch

    draw = np.random.default_rng(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(3, 50257, count).tolist())

    prefixes = [list(tokens(PROMPT + steps * STEP)) for _ in range(questions)]
    cuts = [[PROMPT + k * STEP for k in range(steps + 1)] for _ in range(questions)]
    cue = tokens(CUE)
    branches = []
    for question in range(questions):
        options = [Branch((*cue, *tokens(option)), option) for _ in range(2 + question % 3)]
        branches.append([options] * (steps + 1))
    return prefixes, cuts, branches


def each_truncation(module: torch.nn.Module, given: tuple, device: str) -> np.ndarray:
    """A forward pass of its own for each cut; with options of several tokens, for each option."""
    prefixes, cuts, branches = given
    most = max(len(row[0]) for row in branches)
    scores = np.full((len(prefixes), len(cuts[0]), most), np.nan)
    for k, cut in enumerate(cuts[0]):
        single = branches[0][k][0].scored == 1
        for option in range(1 if single else most):
            rows = [row for row in range(len(prefixes)) if option < len(branches[row][k])]
            texts = [[*prefixes[row][:cut], *branches[row][k][option].tokens[:-1]] for row in rows]
            scored = branches[0][k][0].scored
            logs = module(torch.tensor(texts, device=device), logits_to_keep=scored).logits.log_softmax(-1).cpu()
            for row, log in zip(rows, logs, strict=True):
                for o, branch in enumerate(branches[row][k]):
                    if single or o == option:
                        scores[row, k, o] = log[range(scored), branch.tokens[-scored:]].sum()
    return scores


def each_cut(module: torch.nn.Module, chain: Any, device: str) -> dict[str, np.ndarray]:
    """A forward pass with a mask of its own for each step, and for as many random tokens: kl and answer_kl."""
    from finetune_lens.cot.cuts import _drawn

    ids, count, draw = chain.row(0), len(chain.ends), np.random.default_rng([0])
    random = [_drawn(chain, i, draw) for i in range(count)]

    def logs(keys: list[int], end: int) -> torch.Tensor:
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool, device=device).tril()
        mask[end:, keys] = False
        out = module(torch.tensor([ids], device=device), attention_mask=mask[None, None])
        return out.logits[0, chain.front :].log_softmax(-1)

    reference = logs([], 0)
    found = {name: np.full((count, count), np.nan) for name in ("kl", "random_kl")}
    answers = {name: np.empty(count) for name in ("answer_kl", "random_answer_kl")}
    for start, drawn in (("", [list(chain.span(i)) for i in range(count)]), ("random_", random)):
        for i, keys in enumerate(drawn):
            kl = (reference.exp() * (reference - logs(keys, chain.ends[i]))).sum(-1).cpu().numpy()
            for j in range(i + 1, count):
                found[start + "kl"][i, j] = kl[[t - chain.front for t in chain.span(j)]].mean()
            answers[start + "answer_kl"][i] = kl[[t - chain.front for t in chain.reads(0)]].mean()
    return found | answers


def seconds(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """On a CPU those of its threads, in which other processes have little part."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    result = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start, result


def flops(function: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@torch.no_grad()
def main() -> None:
    import transformers

    from finetune_lens.cot.branches import score_branches
    from finetune_lens.cot.cuts import cut_steps
    from finetune_lens.cot.spans import Spans
    from finetune_lens.hooked import HookedModel

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--option", type=int, default=1, help="tokens of an option")
    parser.add_argument("--no-naive", action="store_true", help="leave out the passes for each truncation")
    options = parser.parse_args()
    device = options.device
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=options.layers)
    module = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False).to(device)
    model = HookedModel(module)
    hardware = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    print(
        f"GPT-2-small shape ({options.layers} layers), float32, {options.questions} questions, chains of "
        f"{options.steps} × {STEP} tokens after {PROMPT}, {hardware}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; {options.rounds} round(s), medians\n"
    )

    def ways(questions: int, packed: bool | None = None) -> dict[str, Callable[[], Any]]:
        given = inputs(questions, options.steps, options.option)
        texts = [[*prefix, *row[-1][0].tokens[:CUE]] for prefix, row in zip(given[0], given[2], strict=True)]
        whole = torch.tensor(texts, device=device)
        found: dict[str, Callable[[], Any]] = {
            "one forward": lambda: module(whole, logits_to_keep=1).logits,
            "all truncations": lambda: score_branches(model, *given, batch_size=questions, packed=packed),
        }
        return found | ({} if options.no_naive else {"each truncation": lambda: each_truncation(module, given, device)})

    found = compared(
        ways(1, packed=True), ways(options.questions), options, f"options of {options.option}", "a question"
    )
    if not options.no_naive:
        np.testing.assert_allclose(found["all truncations"], found["each truncation"], atol=1e-4)

    prefix, _, branches = (part[0] for part in inputs(1, options.steps, options.option))
    ends = tuple(PROMPT + k * STEP for k in range(1, options.steps + 1))
    chain = Spans(PROMPT, ends, tuple(prefix), len(prefix), tuple(branches[-1]))
    text = torch.tensor([chain.row(0)], device=device)
    cuts: dict[str, Callable[[], Any]] = {
        "one forward": lambda: module(text).logits,
        "each step cut": lambda: cut_steps(model, chain, 0, layers=range(model.layers)),
    }
    if not options.no_naive:
        cuts["each cut alone"] = lambda: each_cut(module, chain, device)
    print()
    found = compared(cuts, cuts, options, "one chain", "a chain")
    if not options.no_naive:
        for name, values in found["each cut alone"].items():
            np.testing.assert_allclose(found["each step cut"][name], values, atol=1e-4, err_msg=name)


def compared(
    counted: dict[str, Callable[[], Any]], timed: dict[str, Callable[[], Any]], options: argparse.Namespace, head: str,
    each: str,
) -> dict[str, Any]:  # fmt: skip
    """Print arithmetic and medians of seconds beside those of "one forward"; what the ways found."""
    counts = {name: flops(way) for name, way in counted.items()}
    times: dict[str, list[float]] = {name: [] for name in counts}
    found = {}
    for _ in range(options.rounds):
        for name, way in timed.items():
            took, found[name] = seconds(way, options.device)
            times[name].append(took)
    print(f"| {head} | s | × one forward | GFLOP {each} | × one forward |\n|---|---|---|---|---|")
    one, least = statistics.median(times["one forward"]), counts["one forward"]
    for name, count in counts.items():
        took = statistics.median(times[name])
        print(f"| {name} | {took:.2f} | {took / one:.2f} | {count / 1e9:.1f} | {count / least:.2f} |", flush=True)
    return found


if __name__ == "__main__":
    main()
