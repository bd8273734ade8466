"""Patching sweeps against TransformerLens and against one plain forward pass a site, answers asserted equal.

    python benchmarks/patching.py [--device cpu] [--rounds 1] [--prompts 8] [--tokens 32] [--no-memory]

A model of GPT-2-small's shape with random weights. Each sweep is run by TransformerLens (`transformer_lens.patching`,
its cache of the clean run included) and by us (both recorded runs included), in turn; the floor is what one unhooked
forward pass of the Hugging Face module costs, times the number of sites. Arithmetic is counted by torch's flop counter
on the same calls, so that "achieved" can be told from "saved". Peak memory: each in a process of its own.
"""

import argparse
import copy
import functools
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

LAYERS, HEADS = 12, 12
os.environ["TQDM_DISABLE"] = "1"


def inputs(prompts: int, tokens: int) -> dict[str, torch.Tensor]:
    """Clean and corrupt ids (prompt, token), and an answer and a wrong answer for each."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(3, 50257, shape, generator=generator)

    return {"clean": draw(prompts, tokens), "corrupt": draw(prompts, tokens), "answer": draw(prompts),
            "wrong": draw(prompts)}  # fmt: skip


def model(device: str) -> torch.nn.Module:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().requires_grad_(False).to(device)


def sweeps(tokens: int) -> dict[str, list[tuple[str, int, int | None, int | None]]]:
    """Name → (kind, layer, head, position) of each site; None: all."""
    last = tokens - 1
    return {
        "resid_pre, layer × position": [("resid_pre", i, None, p) for i in range(LAYERS) for p in range(tokens)],
        "z, all heads": [("z", i, h, None) for i in range(LAYERS) for h in range(HEADS)],
        "last position: resid_pre, attn_out, mlp_out": [
            (kind, i, None, last) for kind in ("resid_pre", "attn_out", "mlp_out") for i in range(LAYERS)
        ],
        "last position: z, all heads": [("z", i, h, last) for i in range(LAYERS) for h in range(HEADS)],
    }


def ours(module: torch.nn.Module, given: dict[str, torch.Tensor]) -> Callable[[list], np.ndarray]:
    from finetune_lens.hooked import HookedModel
    from finetune_lens.hooked.sweep import Place, Side, sweep
    from finetune_lens.prompts import Encoded

    hooked = HookedModel(module)
    clean, corrupt = (Side(hooked, encoded(given, side, Encoded)) for side in ("clean", "corrupt"))

    def run(sites: list) -> np.ndarray:
        swept = sweep(
            corrupt, clean, [(Place(*site),) for site in sites], batch_size=len(given["clean"]), progress=False
        )
        assert not swept.notes, swept.notes
        return (swept.effects["logit_diff"] + swept.recipient["logit_diff"]).mean(1)

    return run


def encoded(given: dict[str, torch.Tensor], side: str, kind: type) -> Any:
    ids = given[side]
    real = torch.ones_like(ids, dtype=torch.bool)
    last = torch.full((len(ids), 1), ids.shape[1] - 1)
    return kind(
        ids, real, last, given["answer"][:, None, None], given["wrong"][:, None], real, real,
        [[str(i) for i in row] for row in ids.tolist()],
    )  # fmt: skip


def theirs(module: torch.nn.Module, given: dict[str, torch.Tensor]) -> Callable[[list], np.ndarray]:
    from transformer_lens import patching
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(
        copy.deepcopy(module), type(module).__name__, hf_config=module.config, tokenizer=None
    )
    device = next(module.parameters()).device
    on = {name: ids.to(device) for name, ids in given.items()}
    at = torch.arange(len(on["answer"]), device=device)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[at, -1, on["answer"]] - logits[at, -1, on["wrong"]]).mean()

    def run(sites: list) -> np.ndarray:
        values = []
        with torch.no_grad():
            _, cache = bridge.run_with_cache(on["clean"])
            for kind in dict.fromkeys(site[0] for site in sites):
                table = pd.DataFrame([site[1:] for site in sites if site[0] == kind], columns=["layer", "head", "pos"])
                table = table.dropna(axis=1).astype(int)
                setter = {
                    ("layer", "pos"): patching.layer_pos_patch_setter,
                    ("layer", "head"): patching.layer_head_vector_patch_setter,
                    ("layer", "head", "pos"): patching.layer_pos_head_vector_patch_setter,
                }[tuple(table.columns)]
                order = [name for name in ("layer", "pos", "head") if name in table]
                found = patching.generic_activation_patch(
                    bridge, on["corrupt"], cache, metric, setter, kind, index_df=table[order]
                )
                values.append(found.detach().float().cpu().numpy())
        return np.concatenate(values)

    return run


def seconds(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def flops(function: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak(options: argparse.Namespace, who: str, name: str) -> float:
    """MiB of peak memory over the loaded model, in a process of its own."""
    words = [sys.executable, __file__, "--peak", who, "--sweep", name, "--device", options.device]
    words += ["--prompts", str(options.prompts), "--tokens", str(options.tokens)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(options: argparse.Namespace) -> None:
    module, given = model(options.device), inputs(options.prompts, options.tokens)
    sites = sweeps(options.tokens)[options.sweep]
    some = sites if options.peak == "ours" else sites[:: max(1, len(sites) // 8)]  # a forward a site: all need the same
    make = {"ours": ours, "theirs": theirs}[options.peak]
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        make(module, given)(some)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    with torch.no_grad():
        module(given["clean"][:1, :2])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    make(module, given)(some)
    print((resident("VmHWM") - before) / 2**10)


def resident(which: str) -> int:
    """KiB, now (VmRSS) or at most (VmHWM)."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{which}:")]
    return int(line.split()[1])


def attribution(module: torch.nn.Module, given: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Every head and every MLP."""
    from finetune_lens.hooked import HookedModel
    from finetune_lens.hooked.attribution import attribute
    from finetune_lens.hooked.sweep import Place, Side
    from finetune_lens.prompts import Encoded

    hooked = HookedModel(module)
    clean, corrupt = (Side(hooked, encoded(given, side, Encoded)) for side in ("clean", "corrupt"))
    places = [(Place("z", i, h),) for i in range(LAYERS) for h in range(HEADS)]
    places += [(Place("mlp_out", i),) for i in range(LAYERS)]
    return functools.partial(
        attribute, corrupt, clean, places, "logit_diff", batch_size=len(given["clean"]), progress=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--sweep", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peak:
        measure_peak(options)
        return
    module, given = model(options.device), inputs(options.prompts, options.tokens)
    hardware = platform.machine() if options.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"GPT-2-small shape, float32, {options.prompts} prompts × {options.tokens} tokens, {hardware}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; {options.rounds} round(s), medians\n"
    )
    ids = given["corrupt"].to(options.device)

    @torch.no_grad()
    def plain() -> torch.Tensor:
        return module(ids).logits

    we, they = ours(module, given), theirs(module, given)
    plain(), they(sweeps(options.tokens)["z, all heads"][:2]), we(sweeps(options.tokens)["z, all heads"][:2])
    forward = statistics.median(seconds(plain, options.device)[0] for _ in range(5))
    arithmetic = flops(plain)
    print(
        f"one plain forward: {forward:.3f} s, {arithmetic / 1e9:.1f} GFLOP, {arithmetic / forward / 1e9:.0f} GFLOP/s\n"
    )
    head = ("sweep", "sites", "TransformerLens s", "plain × sites s", "ours s", "× TL", "× plain")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    rest = []
    for name, sites in sweeps(options.tokens).items():
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(options.rounds):
            for who, function in (("theirs", they), ("ours", we)):
                took, answer = seconds(functools.partial(function, sites), options.device)
                times[who].append(took)
                if who == "theirs":
                    reference = answer
            np.testing.assert_allclose(answer, reference, atol=1e-4)
        mine, yours = statistics.median(times["ours"]), statistics.median(times["theirs"])
        floor = forward * len(sites)
        cells = [f"{yours:.1f}", f"{floor:.1f}", f"{mine:.2f}", f"{yours / mine:.1f}", f"{floor / mine:.1f}"]
        print(f"| {name} | {len(sites)} | {' | '.join(cells)} |", flush=True)
        done = flops(functools.partial(we, sites))
        rest.append(
            (name, arithmetic * len(sites) / 1e9, done / 1e9, arithmetic * len(sites) / done, done / mine / 1e9)
        )
    estimate = attribution(module, given)
    estimate()
    took = statistics.median(seconds(estimate, options.device)[0] for _ in range(3))
    print(f"\nattribution of every head and MLP: {took:.3f} s = {took / forward:.2f} plain forward passes")
    print("\n| sweep | one forward a site, GFLOP | ours, GFLOP | saved × | ours, GFLOP/s |\n|---|---|---|---|---|")
    for name, naive, done, saved, speed in rest:
        print(f"| {name} | {naive:.0f} | {done:.0f} | {saved:.1f} | {speed:.0f} |")
    if not options.no_memory:
        peer = "TransformerLens (its second copy of the model included)"
        print(f"\n| peak memory over the loaded model, MiB | {peer} | ours |\n|---|---|---|")
        for name in sweeps(options.tokens):
            print(f"| {name} | {peak(options, 'theirs', name):.0f} | {peak(options, 'ours', name):.0f} |", flush=True)


if __name__ == "__main__":
    main()
