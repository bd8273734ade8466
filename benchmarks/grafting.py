"""A step of grafting against a plain training step of the same batch: time as a ratio in one run, and memory.

    python benchmarks/grafting.py [--device cuda] [--layers 12 --width 768 --heads 12] [--rows 8 --columns 128]

GPT-2 of random weights (124 million by default); the batch has one answer a row, at its end. A *training step* is what
one writes with transformers: the loss of `model(input_ids, labels)`, backward, AdamW on all parameters. It is also
timed with logits at the answers alone, as grafting computes them. A *step of grafting* is soft weights written,
gradient, update of the scores, rounded weights written, and the rounded mask evaluated on as many rows. Rounds take
turns; ratios are of the same round. Memory is the peak of anonymous pages over that before the model is loaded, each
in a process of its own, in copies of the parameters in float32. The threshold of the base mask is timed against a sort.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

NOTHING = -100


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """Within: the largest anonymous memory, looked at every two milliseconds."""

    def __enter__(self) -> "Peak":
        self.value, self._done = 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.value = max(self.value, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()


def make_pair(folder: Path, options: argparse.Namespace) -> None:
    """Base and tuned model as Hugging Face folders."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=options.heads)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    model.save_pretrained(folder / "tuned")


def batch(options: argparse.Namespace) -> "object":
    """The rows as grafting takes them: one answer token each."""
    from finetune_lens.evaluation import Examples
    from finetune_lens.prompts import Encoded, Prompt

    rows, columns = options.rows, options.columns
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50257, (rows, columns), generator=generator)
    answers = torch.randint(50257, (rows, 1, 1), generator=generator)
    whole = torch.ones(rows, columns, dtype=torch.bool)
    end = torch.full((rows, 1), columns - 1)
    none = torch.full((rows, 0), -1)
    encoded = Encoded(ids, whole, end, answers, none, whole, whole, [[""] * columns] * rows)
    return Examples([Prompt("x", id=str(n)) for n in range(rows)], encoded, "answer")


def training(
    folder: Path, examples: "object", options: argparse.Namespace, *, everywhere: bool, updates: bool = True
) -> "object":
    """A function that makes one plain training step; without `updates` its gradient alone."""
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "base").to(options.device).eval()
    stepper = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.cat([examples.encoded.ids, examples.encoded.answers[:, 0]], 1).to(options.device)
    labels = torch.full_like(ids, NOTHING)
    labels[:, -1] = ids[:, -1]

    def step() -> None:
        stepper.zero_grad()
        if everywhere:
            loss = model(input_ids=ids[:, :-1], labels=labels[:, 1:], num_items_in_batch=None).loss
        else:
            logits = model(input_ids=ids[:, :-1], logits_to_keep=1).logits[:, -1]
            loss = torch.nn.functional.cross_entropy(logits, ids[:, -1])
        loss.backward()
        if updates:
            stepper.step()

    return step


def grafting(folder: Path, examples: "object", options: argparse.Namespace) -> "object":
    """A function that makes one step of grafting, with its evaluation."""
    from finetune_lens import ModelPair
    from finetune_lens.evaluation import measure
    from finetune_lens.grafting.search import Search, magnitudes
    from finetune_lens.hybrid import Hybrid
    from finetune_lens.linalg.selection import largest

    hybrid = Hybrid(ModelPair.load(folder / "base", folder / "tuned"), device=options.device)
    names = hybrid.names(outside=False)
    total = sum(hybrid.weights[n].count for n in names)
    state = Search(hybrid, names, largest(magnitudes(hybrid, names), total // 10_000))
    every, kept = torch.arange(len(examples)), {}

    def step() -> None:
        state.learn(examples, every, 1e7, step=1.0, batch_size=options.rows)
        mask = state.rounded()
        measure(hybrid.hold(mask), examples, batch_size=options.rows)
        kept["best"] = mask

    return step


def seconds(step: "object", device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(case: str, folder: Path, options: argparse.Namespace) -> None:
    """Print the peak of three steps, in bytes."""
    import transformers  # noqa: F401  (what imports take is no step's)

    import finetune_lens.grafting.run  # noqa: F401

    examples = batch(options)
    before = anonymous()
    with Peak() as peak:
        step = (
            grafting(folder, examples, options)
            if case == "grafting"
            else training(folder, examples, options, everywhere=case == "training", updates="gradient" not in case)
        )
        for _ in range(3):
            step()
    print(json.dumps({"bytes": peak.value - before}))


def threshold(folder: Path) -> dict[str, float]:
    """Seconds of the k-th largest |Δ| over all entries of the blocks: one pass, and a sort of all of them."""
    from finetune_lens import ModelPair
    from finetune_lens.grafting.search import magnitudes
    from finetune_lens.hybrid import Hybrid
    from finetune_lens.linalg.selection import kth_largest

    hybrid = Hybrid(ModelPair.load(folder / "base", folder / "tuned"), device="cpu")
    names = hybrid.names(outside=False)
    stream = magnitudes(hybrid, names)
    total = sum(hybrid.weights[n].count for n in names)
    k = total // 10_000
    start = time.perf_counter()
    for _ in stream():
        pass
    reading = time.perf_counter() - start
    start = time.perf_counter()
    found = kth_largest((values for _, values in stream()), k)
    one_pass = time.perf_counter() - start
    start = time.perf_counter()
    flat = torch.cat([values.reshape(-1) for _, values in stream()]).sort(descending=True).values
    assert float(flat[k - 1]) == found
    return {"entries": total, "reading": reading, "pass": one_pass, "sort": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    for name, value in {"layers": 12, "width": 768, "heads": 12, "rows": 8, "columns": 128, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        memory(options.case, options.folder, options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pair(folder, options)
        examples = batch(options)
        steps = {
            "training step, as transformers writes it": training(folder, examples, options, everywhere=True),
            "training step, logits at the answers": training(folder, examples, options, everywhere=False),
            "step of grafting": grafting(folder, examples, options),
        }
        times: dict[str, list[float]] = {case: [] for case in steps}
        for number in range(options.rounds + 1):
            for case, step in steps.items():
                taken = seconds(step, options.device)
                if number:  # the first round warms up
                    times[case].append(taken)
        mine = times["step of grafting"]
        device = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(
            f"GPT-2 of {options.layers} layers, width {options.width}; {options.rows} × {options.columns} tokens; "
            f"{device}; {options.rounds} rounds in turns, median [least, most]\n"
        )
        print("| | seconds | grafting takes … times as long |")
        print("|---|---|---|")
        for case, taken in times.items():
            ratio = [a / b for a, b in zip(mine, taken, strict=True)]
            span = f"{statistics.median(ratio):.2f} [{min(ratio):.2f}, {max(ratio):.2f}]"
            print(f"| {case} | {statistics.median(taken):.2f} | {'' if case == 'step of grafting' else span} |")
        found = threshold(folder)
        print(
            f"\nThe base mask's threshold, k-th of {found['entries']:,} entries: {found['pass']:.2f} s in one pass "
            f"(reading and subtracting both files alone {found['reading']:.2f} s), {found['sort']:.2f} s by a sort.\n"
        )
        if options.device == "cpu":
            import transformers

            config = transformers.GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=options.heads)
            with torch.device("meta"):
                size = 4 * transformers.GPT2LMHeadModel(config).num_parameters()
            print("| | peak memory, copies of the parameters |")
            print("|---|---|")
            peaks = {}
            for case in ("training", "training at answers", "gradient at answers", "grafting"):
                words = [sys.executable, __file__, "--case", case, "--folder", str(folder)]
                for option in ("layers", "width", "heads", "rows", "columns"):
                    words += [f"--{option}", str(getattr(options, option))]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                peaks[case] = json.loads(done.stdout)["bytes"] / size
                print(f"| {case} | {peaks[case]:.2f} |")
            activations = peaks["gradient at answers"] - 2
            print(
                f"\nActivations, the peak of the gradient alone without parameters and gradient: {activations:.2f}. "
                f"Grafting without them: {peaks['grafting'] - activations:.2f}."
            )


if __name__ == "__main__":
    main()
