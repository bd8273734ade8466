"""Start-up: importing the package, and --help of every command, as whole processes beside a bare interpreter.

python benchmarks/startup.py [--runs 7]
"""

import argparse
import statistics
import subprocess
import sys
import time

from finetune_lens.__main__ import COMMANDS

CASES = {
    "python -c pass": ["-c", "pass"],
    "import finetune_lens": ["-c", "import finetune_lens"],
    **{f"python -m finetune_lens.{name} --help": ["-m", f"finetune_lens.{name}", "--help"] for name in COMMANDS},
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    for arguments in CASES.values():  # once uncounted: byte-compiles, fills the page cache
        seconds(arguments)
    print(f"{'':44}{'min':>8}{'median':>8}{'max':>8}   seconds, {runs} runs")
    for name, arguments in CASES.items():
        times = [seconds(arguments) for _ in range(runs)]
        print(f"{name:44}{min(times):8.3f}{statistics.median(times):8.3f}{max(times):8.3f}")


if __name__ == "__main__":
    main()
