"""Intruder dimensions at speed: our routes, the published procedure, PEFT's routine and the arithmetic's floor.

    python benchmarks/spectra.py [--sizes 2048 4096] [--rounds 3] [--layers 12]

One float32 weight of each size under a LoRA update of rank 16 (a bulk, eight strong directions, an update that
outgrows some of them), judged at k = 10 and ε = 0.5, left side, from files to verdicts. The competitors take turns
within each round, and the table has the median. All must find the same intruders.

- reference: the published procedure, two float32 SVDs and the whole product |U0ᵀU1|;
- PEFT: its `reduce_intruder_dimension` on the same adapter, which goes on to mitigate what it finds;
- exact, certified: on the merged weight, nothing known of the base; cached: on the adapter, the base's basis on disk;
- floor: the multiplications and additions that the route cannot do without, at the rate of a square float64 product of
  this machine (float32 for the reference).

Then the trajectory: five checkpoints of a LoRA on every matrix of a GPT-2-small-shaped model, in one call, against the
published procedure on each. Exit code 1 when two disagree.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "model.layers.0.mlp.up_proj.weight"
RANK, K, EPSILON = 16, 10, 0.5
STEPS = (1, 2, 3, 4, 5)
GPT2 = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}


def make_weight(out: int, wide: int, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, wide, generator=generator) / max(out, wide) ** 0.5
    strong = torch.randn(out, 8, generator=generator) * torch.linspace(6, 2.5, 8) / out**0.5
    return weight + strong @ torch.randn(8, wide, generator=generator) / wide**0.5


def make_update(out: int, wide: int, seed: int) -> tuple[Any, Any]:
    """B (out, r), A (r, in)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(out, RANK, generator=generator) * torch.linspace(3, 0.3, RANK) / out**0.5
    return left, torch.randn(RANK, wide, generator=generator) / wide**0.5


def reference(base: Any, tuned: Any) -> list[bool]:
    """Which of the top K vectors are intruders, by two SVDs in float32 and the whole product."""
    import torch

    u0, u1 = (torch.linalg.svd(w, full_matrices=False)[0] for w in (base, tuned))
    return ((u0.T @ u1).abs().amax(0)[:K] < EPSILON).tolist()


def adapted_model(base: Any, left: Any, right: Any) -> Any:
    """A model of one linear map with the adapter on it, made by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    linear = torch.nn.Linear(base.shape[1], base.shape[0], bias=False)
    block = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"up_proj": linear})})
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([block])
    with torch.no_grad():
        linear.weight.copy_(base)
        adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["up_proj"]))
        layer = adapted.base_model.model.model.layers[0]["mlp"]["up_proj"]
        layer.lora_A["default"].weight.copy_(right)
        layer.lora_B["default"].weight.copy_(left)
    return adapted


def by_peft(model: Any) -> int:
    """How many intruders PEFT's routine reports; it adds an adapter, which is taken off again."""
    import re

    from peft.tuners.lora.intruders import reduce_intruder_dimension

    lines: list[str] = []
    reduce_intruder_dimension(model, top_k=K, threshold_epsilon=EPSILON, logging_sink=lines.append)
    model.delete_adapter("intruder_reduced")
    return sum(int(n) for line in lines for n in re.findall(r"Intruders: (\d+)", line))


def rate(dtype: Any) -> float:
    """Multiplications and additions a second in a square product."""
    import torch

    w = torch.randn(2048, 2048, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        w @ w
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def single(n: int, rounds: int) -> bool:
    """The table for one weight of order n; whether all agree."""
    import torch
    from safetensors.torch import load_file, save_file

    from finetune_lens import ModelPair, find_intruders

    base, (left, right) = make_weight(n, n, 0), make_update(n, n, 1)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        save_file({NAME: base}, files / "base.safetensors")
        save_file({NAME: base + left @ right}, files / "tuned.safetensors")
        model = adapted_model(base, left, right)
        model.save_pretrained(files / "adapter")
        options = {"null_draws": 0, "progress": False, "k": K, "epsilon": EPSILON, "ranks": K}

        def ours(tuned: str, **more: Any) -> list[bool]:
            pair = ModelPair.load(files / "base.safetensors", files / tuned)
            result = find_intruders(pair, **options, **more)
            assert result.undetermined() == 0
            return (result.verdict().values[0, 0] == 1).tolist()

        def published() -> list[bool]:
            return reference(*(load_file(files / f"{side}.safetensors")[NAME] for side in ("base", "tuned")))

        cached = {"method": "cached", "cache": files / "bases", "cache_gb": 10.0}
        tridiagonal, top = 4 / 3 * n**3, 40 * 4 * n**2 * (K + 6)
        runs: dict[str, tuple[Callable[[], Any], float, Any]] = {
            # Golub & Van Loan, Matrix Computations, §8.6: U, S, V by bidiagonalisation
            "reference": (published, 2 * 20 * n**3 + 2 * n**3, torch.float32),
            "PEFT": (lambda: by_peft(model), 2 * 20 * n**3 + 2 * n**3, torch.float32),
            "exact": (lambda: ours("tuned.safetensors", method="exact"), 2 * (2 * n**3 + tridiagonal), torch.float64),
            "certified": (lambda: ours("tuned.safetensors", method="certified"), top, torch.float64),
            "certified, adapter": (lambda: ours("adapter", method="certified"), top, torch.float64),
            "cached, adapter": (lambda: ours("adapter", **cached), 2 * n**2 * 3 * RANK, torch.float64),
        }
        rates = {dtype: rate(dtype) for dtype in (torch.float32, torch.float64)}
        ours("adapter", **cached)  # fills the cache; libraries loaded
        found, times = {}, {name: [] for name in runs}
        for _ in range(rounds):
            for name, (call, _, _) in runs.items():
                start = time.perf_counter()
                found[name] = call()
                times[name].append(time.perf_counter() - start)
    once = statistics.median(times["reference"])
    peft = statistics.median(times["PEFT"])
    print(f"\nn = {n}, {sum(found['reference'])} intruders of {K}\n")
    print("| route | seconds | spread | times the reference's speed | times PEFT's | floor, seconds |")
    print("|---|---|---|---|---|---|")
    for name, (_, flops, dtype) in runs.items():
        middle = statistics.median(times[name])
        spread = f"{min(times[name]):.3g}–{max(times[name]):.3g}"
        print(
            f"| {name} | {middle:.3g} | {spread} | {once / middle:.1f} | {peft / middle:.1f} "
            f"| {flops / rates[dtype]:.2g} |"
        )
    agree = all(f == found["reference"] for name, f in found.items() if name != "PEFT")
    return agree and found["PEFT"] == sum(found["reference"])


def trajectory(layers: int) -> bool:
    """Five checkpoints of a GPT-2-small-shaped LoRA; whether the counts agree."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    from finetune_lens import ModelSeries, find_intruders

    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        base = {}
        factors = {}
        for layer in range(layers):
            for i, (module, (inner, outer)) in enumerate(GPT2.items()):
                name = f"h.{layer}.{module}"
                base[f"transformer.{name}.weight"] = make_weight(outer, inner, 100 * layer + i).T.contiguous()
                factors[name] = make_update(outer, inner, 100 * layer + 10 + i)
        (files / "base").mkdir()
        save_file(base, files / "base" / "model.safetensors")
        (files / "base" / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 768, "n_head": 12}))
        config = {
            "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "fan_in_fan_out": True, "bias": "none",
            "target_modules": ["c_attn", "c_proj", "c_fc"], "base_model_name_or_path": None,
        }  # fmt: skip
        for step in STEPS:
            place = files / f"checkpoint-{step}"
            place.mkdir()
            tensors = {}
            for name, (left, right) in factors.items():
                key = f"base_model.model.transformer.{name}"
                tensors[f"{key}.lora_A.weight"] = right
                tensors[f"{key}.lora_B.weight"] = left * (step / len(STEPS))
            save_file(tensors, place / "adapter_model.safetensors")
            (place / "adapter_config.json").write_text(json.dumps(config))

        start = time.perf_counter()
        series = ModelSeries.load(files / "base", [files / f"checkpoint-{s}" for s in STEPS], fused=True)
        result = find_intruders(series, ranks=K, k=K, epsilon=EPSILON, null_draws=0, progress=False)
        ours = time.perf_counter() - start
        counts = result.counts().intruders.tolist()

        start = time.perf_counter()
        theirs = []
        for step in STEPS:
            weights = load_file(files / "base" / "model.safetensors")
            adapter = load_file(files / f"checkpoint-{step}" / "adapter_model.safetensors")
            total = 0
            for name in factors:
                key = f"base_model.model.transformer.{name}"
                one = weights[f"transformer.{name}.weight"].T
                other = one + adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
                total += sum(reference(one, other))
            theirs.append(total)
        published = time.perf_counter() - start
    print(f"\nfive checkpoints of a LoRA on {layers} GPT-2-small layers, {4 * layers} matrices: counts {counts}\n")
    print("| | seconds | times the reference's speed |\n|---|---|---|")
    print(f"| reference, each checkpoint | {published:.1f} | 1.0 |")
    print(f"| ours, one call | {ours:.1f} | {published / ours:.1f} |")
    return counts == theirs and torch.is_tensor(base[next(iter(base))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12, help="of the trajectory; 0 leaves it out")
    options = parser.parse_args()
    import torch

    warnings.filterwarnings("ignore", module="peft")
    print(f"{torch.get_num_threads()} threads, {os.uname().machine}, torch {torch.__version__}")
    agree = [single(n, options.rounds) for n in options.sizes]
    if options.layers:
        agree.append(trajectory(options.layers))
    print("\nall agree" if all(agree) else "\nDISAGREEMENT")
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
