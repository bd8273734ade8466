"""The sender sweep of path patching against the published procedure, answers asserted equal.

    python benchmarks/circuits.py [--device cpu] [--rounds 3] [--prompts 100] [--tokens 56] [--senders 3]

A model of GPT-2-small's shape with random weights. The receivers are the queries of four heads at the last position
(and, in a second line, the logits). The published procedure (Prakash et al. 2024, arXiv 2402.14811) runs two full
forward passes a sending head over all prompts, here by plain torch hooks on the Hugging Face module; it is timed on
some heads, one a round for each of the layers 0, 3 and 6, and counted for all 144. Ours sweeps all 144 heads, both
recorded runs included. Floor: the arithmetic that the sweep cannot do without (MLPs and output projections on one
column, the blocks above the receivers on one column, one unembedding a row) at the rate of the plain forward pass.
"""

import argparse
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from patching import HEADS, LAYERS, encoded, inputs, model

os.environ["TQDM_DISABLE"] = "1"
RECEIVERS = ((8, 1), (9, 4), (9, 7), (10, 2))
WIDTH, D_HEAD, VOCABULARY = 768, 64, 50257


class Published:
    """Two forward passes a sender, by hooks: z held in all layers, then q of the receivers put back."""

    def __init__(self, module: torch.nn.Module, given: dict[str, torch.Tensor], receivers: tuple):
        self.module, self.given, self.receivers = module, given, receivers
        self.blocks = module.transformer.h
        self.clean, self.logits = self._keeping(given["clean"])
        self.corrupt, _ = self._keeping(given["corrupt"])

    def _keeping(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        kept: list[torch.Tensor] = []
        logits = self._run(ids, [(b.attn.c_proj, lambda _, a: kept.append(a[0].clone()), True) for b in self.blocks])
        return kept, logits

    def _run(self, ids: torch.Tensor, hooks: list) -> torch.Tensor:
        handles = [m.register_forward_pre_hook(f) if pre else m.register_forward_hook(f) for m, f, pre in hooks]
        try:
            with torch.no_grad():
                return self.module(input_ids=ids).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()

    def effect(self, layer: int, head: int) -> np.ndarray:
        """Change of the logit difference on each prompt."""
        part = slice(head * D_HEAD, (head + 1) * D_HEAD)

        def held(i: int) -> Any:
            value = self.clean[i]
            if i == layer:
                value = value.clone()
                value[:, -1, part] = self.corrupt[i][:, -1, part]
            return lambda _, a: (value, *a[1:])

        kept: dict[int, torch.Tensor] = {}
        hooks = [(b.attn.c_proj, held(i), True) for i, b in enumerate(self.blocks)]
        places = sorted({i for i, _ in self.receivers})
        hooks += [
            (self.blocks[i].attn.c_attn, lambda _, a, o, i=i: kept.__setitem__(i, o.clone()), False) for i in places
        ]
        logits = self._run(self.given["clean"], hooks)
        if self.receivers:
            logits = self._run(self.given["clean"], [(self.blocks[i].attn.c_attn, self._put(kept[i], i), False)
                                                     for i in places])  # fmt: skip
        return (self._metric(logits) - self._metric(self.logits)).cpu().numpy()

    def _put(self, values: torch.Tensor, layer: int) -> Any:
        def hook(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            for i, head in self.receivers:
                if i == layer:
                    part = slice(head * D_HEAD, (head + 1) * D_HEAD)
                    out[:, -1, part] = values[:, -1, part]
            return out

        return hook

    def _metric(self, logits: torch.Tensor) -> torch.Tensor:
        at = torch.arange(len(logits), device=logits.device)
        return logits[at, self.given["answer"]] - logits[at, self.given["wrong"]]


def ours(hooked: Any, given: dict[str, torch.Tensor], receivers: tuple) -> np.ndarray:
    """(sender, prompt): the same change, of all heads."""
    from finetune_lens.hooked.paths import Receivers, sweep_paths
    from finetune_lens.hooked.sweep import Side
    from finetune_lens.prompts import Encoded

    clean, corrupt = (Side(hooked, encoded(given, side, Encoded)) for side in ("clean", "corrupt"))
    prompts, tokens = given["clean"].shape
    columns = [np.array([tokens - 1])] * prompts
    reads = Receivers("q" if receivers else "logits", receivers, columns)
    senders = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    swept = sweep_paths(clean, corrupt, senders, reads, progress=False)
    assert not swept.notes, swept.notes
    return swept.effects["logit_diff"]


def arithmetic(prompts: int, tokens: int, receivers: tuple) -> tuple[float, float]:
    """Flops of a plain forward pass over all prompts (logits at every position, as there), and of the floor."""
    block, chain, unembed = 24 * WIDTH**2, 18 * WIDTH**2, 2 * WIDTH * VOCABULARY
    plain = prompts * tokens * (LAYERS * block + unembed + LAYERS * 4 * tokens * WIDTH)
    top = max((layer for layer, _ in receivers), default=LAYERS)
    low = min((layer for layer, _ in receivers), default=LAYERS)
    senders = sum(HEADS * ((top - layer) * chain + (LAYERS - low) * block + unembed) for layer in range(top))
    return plain, prompts * senders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=56)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")

    from finetune_lens.hooked import HookedModel

    module = model(given.device)
    ids = {name: x.to(given.device) for name, x in inputs(given.prompts, given.tokens).items()}
    hooked = HookedModel(module)
    device = torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.machine()}, CPU"
    size = f"{given.prompts} prompts of {given.tokens} tokens, {LAYERS * HEADS} senders, {given.rounds} rounds"
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{device}, {threads}; GPT-2-small's shape, {size}\n")
    print("| receivers | published, s a sender | all senders, s | ours, s | ratio | largest difference | floor, s |")
    print("|---|---|---|---|---|---|---|")
    for name, receivers in (("q of four heads, last position", RECEIVERS), ("logits", ())):
        published = Published(module, ids, receivers)
        each, whole, off, plain = [], [], 0.0, []
        for number in range(given.rounds):
            start = time.perf_counter()
            found = ours(hooked, ids, receivers)
            whole.append(time.perf_counter() - start)
            for layer in (0, 3, 6):
                start = time.perf_counter()
                expected = published.effect(layer, number % HEADS)
                each.append(time.perf_counter() - start)
                off = max(off, float(np.abs(found[layer * HEADS + number % HEADS] - expected).max()))
            start = time.perf_counter()
            with torch.no_grad():
                module(input_ids=ids["clean"])
            plain.append(time.perf_counter() - start)
        assert off < 1e-4, off
        count = LAYERS * HEADS
        pass_flops, floor_flops = arithmetic(given.prompts, given.tokens, receivers)
        floor = statistics.median(plain) * floor_flops / pass_flops
        one, mine = statistics.median(each), statistics.median(whole)
        ratios = [count * min(each) / max(whole), count * max(each) / min(whole)]
        print(f"| {name} | {one:.2f} | {count * one:.0f} | {mine:.1f} | {count * one / mine:.0f}× "
              f"[{ratios[0]:.0f}, {ratios[1]:.0f}] | {off:.1e} | {floor:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
