"""Where the Gram route overtakes the SVD, and how far the two agree: what `linalg.GRAM_FROM` rests on.

    python benchmarks/decompositions.py [--sizes 64 128 256 512 1024] [--runs 5]

One table: seconds for the left singular vectors with error bounds by either route on the same Gaussian matrices, taken
in turn; their ratio; the largest difference of a cosine between the two bases and the bound that both claim for it.
"""

import argparse
import statistics
import time

import torch

from finetune_lens import linalg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 192, 256, 384, 512, 768, 1024])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    print(f"float64, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {options.runs} runs")
    print(f"{'shape':>14}{'svd':>10}{'gram':>10}{'svd/gram':>10}{'difference':>13}{'bound':>12}")
    for n in options.sizes:
        for shape in ((n, n), (n, 4 * n)):
            matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
            times: dict[str, list[float]] = {"svd": [], "gram": []}
            bases = {}
            for _ in range(options.runs):
                for route in times:
                    start = time.perf_counter()
                    bases[route] = linalg.decompose(matrix, sides=("left",), route=route).left
                    times[route].append(time.perf_counter() - start)
            svd, gram = (statistics.median(times[route]) for route in ("svd", "gram"))
            cosines = (bases["svd"].vectors * bases["gram"].vectors).sum(0).abs()
            difference = float((1 - cosines.square()).clamp_min(0).sqrt().max())
            bound = float((bases["svd"].error + bases["gram"].error).max())
            print(f"{n:>6} × {shape[1]:<5}{svd:10.4f}{gram:10.4f}{svd / gram:10.2f}{difference:13.1e}{bound:12.1e}")


if __name__ == "__main__":
    main()
