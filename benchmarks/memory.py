"""Peak memory of one matrix, in float64 copies of it: what "some copies of the largest matrix" is in numbers.

    python benchmarks/memory.py [--shapes 1024x1024 1024x4096]

Each case in a process of its own: a bfloat16 pair is made, the analysis run once on a small pair (libraries loaded),
then on the large one; anonymous memory is sampled every millisecond. Linux only.
"""

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

CASES = {
    "updates": "fl.measure_updates(pair, progress=False)",
    "intruders": "fl.find_intruders(pair, progress=False, null_draws=1)",
    "intruders, no null": "fl.find_intruders(pair, progress=False, null_draws=0)",
    "intruders, both sides": "fl.find_intruders(pair, progress=False, null_draws=1, side='both')",
    "intruders, top 64": "fl.find_intruders(pair, progress=False, null_draws=1, ranks=64)",
}


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(case: str, rows: int, columns: int) -> float:
    """Peak over the start, in float64 copies of the matrix."""
    import torch

    import finetune_lens as fl

    name = "layers.0.mlp.up_proj.weight"
    for shape in ((64, 64), (rows, columns)):
        torch.manual_seed(0)
        sides = [{name: torch.randn(shape, dtype=torch.bfloat16)} for _ in range(2)]
        pair = fl.ModelPair.load(*sides)
        start, peak, done = anonymous(), [0], threading.Event()

        def watch(peak: list[int] = peak, done: threading.Event = done) -> None:
            while not done.is_set():
                peak[0] = max(peak[0], anonymous())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        eval(CASES[case], {"fl": fl, "pair": pair})
        done.set()
        watcher.join()
    return (peak[0] - start) / (8 * rows * columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "1024x4096"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(measure(options.case, *map(int, options.shapes[0].split("x"))))
        return
    print(f"{'peak, float64 copies':24}" + "".join(f"{shape:>12}" for shape in options.shapes))
    for case in CASES:
        cells = []
        for shape in options.shapes:
            words = [sys.executable, __file__, "--case", case, "--shapes", shape]
            cells.append(float(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        print(f"{case:24}" + "".join(f"{cell:12.1f}" for cell in cells))


if __name__ == "__main__":
    main()
