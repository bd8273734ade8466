"""All probes of a model against the forward pass that feeds them: time as a ratio in one run.

    python benchmarks/probing.py [--device cuda] [--examples 10000 --tokens 32] [--layers 12 --width 768 --heads 12]

GPT-2 of random weights; texts of random tokens, read at their last one. *Forward pass*: activations of every depth
collected, which ends at the last block. *Fits*: logistic regression of a label and of its control task at every depth
and split, to convergence, and their scores on the held-out part, on both sides with transfer (two sides are given the
same activations: twice the fits, held against two forward passes). Rounds take turns; ratios are of the same round.

Beside it, on a tenth of the texts: the plain forward pass in batches of the same size (transformers, one column of
logits), and activations written to disk against held in memory. scikit-learn (StandardScaler, LogisticRegression with
its own tolerance) is timed on the label and control of one split at three depths and counted for all; accuracies are
compared with those that its tolerance 1e-6 gives.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def make_model(options: argparse.Namespace) -> Any:
    import transformers

    from finetune_lens.hooked import HookedModel

    config = transformers.GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=options.heads)
    torch.manual_seed(0)
    return HookedModel(transformers.GPT2LMHeadModel(config).to(options.device).eval())


def texts(count: int, tokens: int) -> Any:
    """Random tokens, all texts of one length."""
    from finetune_lens.prompts import Encoded

    ids = torch.randint(50257, (count, tokens), generator=torch.Generator().manual_seed(1))
    whole, none = torch.ones(count, tokens, dtype=torch.bool), torch.full((count, 0), -1)
    return Encoded(ids, whole, torch.full((count, 1), tokens - 1), none[:, None], none, whole, whole, [[""]] * count)


def plain(model: Any, encoded: Any) -> Callable[[], object]:
    """The forward pass as transformers writes it, in batches as large as those of the collection."""
    from finetune_lens.hooked.features import TOKENS

    size = max(1, TOKENS[model.device.type] // encoded.ids.shape[1])

    def run() -> None:
        with torch.no_grad():
            for start in range(0, len(encoded), size):
                ids = encoded.ids[start : start + size].to(model.device)
                model.module(input_ids=ids, logits_to_keep=1, use_cache=False)

    return run


def seconds(step: Callable[[], Any], device: str) -> tuple[float, Any]:
    start = time.perf_counter()
    found = step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def make_task(features: Any, sites: list[str], options: argparse.Namespace) -> Any:
    """A label that can be read at the middle depth, with a tenth turned over; random controls; random splits."""
    from finetune_lens.probing.fits import Task

    generator = np.random.default_rng(0)
    middle = features.values(sites[len(sites) // 2])
    value = middle @ generator.normal(size=middle.shape[1]).astype(np.float32)
    label = (value > np.median(value)) ^ (generator.random(len(value)) < 0.1)
    shape = options.seeds, len(label)
    control = generator.integers(2, size=shape)
    targets = np.stack([np.broadcast_to(label, shape).astype(np.int64), control], 2)
    return Task(targets, generator.random(shape) >= 0.3, 2, 1.0)


def scikit_learn(features: Any, sites: list[str], task: Any, found: dict[str, np.ndarray]) -> tuple[float, float]:
    """Seconds a fit, and the largest difference in accuracy from ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        times, off = [], 0.0
        for unit in sorted({1, len(sites) // 2, len(sites) - 1}):
            x, train = features.values(sites[unit]).astype(np.float64), task.train[0]
            for target, scores in enumerate((found["score"][0, 0, unit, 0], found["control_score"][0, unit, 0])):
                y = task.targets[0, :, target]
                start = time.perf_counter()
                scaler = StandardScaler().fit(x[train])
                LogisticRegression(max_iter=1000).fit(scaler.transform(x[train]), y[train])
                times.append(time.perf_counter() - start)
                exact = LogisticRegression(max_iter=10_000, tol=1e-6).fit(scaler.transform(x[train]), y[train])
                accuracy = exact.score(scaler.transform(x[~train]), y[~train])
                off = max(off, abs(accuracy - scores[~train].mean()))
    return statistics.mean(times), off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    sizes = {
        "examples": 10_000, "tokens": 32, "layers": 12, "width": 768, "heads": 12, "seeds": 5, "rounds": 3,
    }  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()

    from finetune_lens.hooked.features import collect
    from finetune_lens.hooked.sites import site_name
    from finetune_lens.probing.fits import fit_all

    model = make_model(options)
    sites = [site_name("resid_pre", 0), *(site_name("resid_post", n) for n in range(options.layers))]
    encoded, tenth = (texts(count, options.tokens) for count in (options.examples, max(1, options.examples // 10)))

    def collected(some: Any, folder: Path | None = None) -> Callable[[], Any]:
        columns = torch.zeros_like(some.mask)
        columns[:, -1] = True
        return lambda: collect(model, some, sites, columns=columns, folder=folder, budget=1 << 62)

    collected(texts(8, options.tokens))()  # warms up
    times: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        steps: dict[str, Callable[[], Any]] = {"forward": collected(encoded)}
        with tempfile.TemporaryDirectory() as folder:
            steps |= {"plain": plain(model, tenth), "memory": collected(tenth)}
            steps["disk"] = collected(tenth, Path(folder))
            for name, step in steps.items():
                taken, result = seconds(step, options.device)
                times.setdefault(name, []).append(taken)
                if name == "forward":
                    features = result
        task = make_task(features, sites, options)
        units = [(site, None) for site in sites]
        fit = lambda: fit_all([features] * 2, units, task, model.device, tick=lambda count: None)  # noqa: E731, B023
        taken, found = seconds(fit, options.device)
        times.setdefault("fits", []).append(taken / 2)

    def ratio(name: str, to: str) -> str:
        values = [a / b for a, b in zip(times[name], times[to], strict=True)]
        return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"

    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    middle = {name: statistics.median(values) for name, values in times.items()}
    count = len(sites) * options.seeds * 2
    converged = found["converged"].mean()
    print(
        f"GPT-2 of {options.layers} layers, width {options.width}; {options.examples} × {options.tokens} tokens; "
        f"{device}; {options.rounds} rounds in turns, median [least, most]\n"
    )
    print("| | seconds | of the forward pass |")
    print("|---|---|---|")
    print(f"| forward pass that collects the activations, a side | {middle['forward']:.2f} | |")
    print(
        f"| {count} fits, a side ({len(sites)} depths × {options.seeds} splits × label and control; {converged:.0%} "
        f"converged) | {middle['fits']:.2f} | {ratio('fits', 'forward')} |"
    )
    each, off = scikit_learn(features, sites, task, found)
    print(f"| as many by scikit-learn | {count * each:.2f} | {count * each / middle['forward']:.2f} |")
    print(
        f"\nOn a tenth of the texts, collecting in memory takes {ratio('memory', 'plain')} of the plain forward pass, "
        f"and to disk {ratio('disk', 'memory')} of in memory.\n"
        f"Largest difference in accuracy from scikit-learn (tolerance 1e-6): {off:.5f}."
    )


if __name__ == "__main__":
    main()
