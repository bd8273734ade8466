"""A large pair: is memory that of one matrix, what does it cost beside reading, and what does an interruption lose?

    python benchmarks/large.py [--layers 8] [--hidden 4096] [--intermediate 11008] [--work runs/large] [--keep]

Writes a base and a tuned side in Hugging Face layout (8 layers of LLaMA-7B's shape: 3.2 GB of bfloat16 a side, in
shards), or takes those in the folder; without --keep, what it wrote is removed at the end. Then, each in a process of
its own: reads both sides; counts intruder dimensions by the certified route; interrupts that after a few matrices and
continues. Memory is polled 20 times a second: anonymous (what is allocated), file-mapped (libraries, and weights while
they are read), and the kernel's own peak of their sum. Exits 1 when a claim fails. Linux only.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import finetune_lens
from finetune_lens.files import whole_file

SHIPPED = Path(finetune_lens.__file__).parent / "zoo" / "strings"
INDEX = "model.safetensors.index.json"
PARTIAL = ".intruders.partial"
SHARD = 900_000_000  # bytes a shard at most; one is in memory while it is written
OUTLIERS = 32  # directions of the base above the bulk
RANK = 16  # of the update
K = 10  # vectors judged in each matrix
ANONYMOUS_GB = 2.5  # claimed for matrices up to LLaMA-7B's largest
LARGEST = 4096 * 11008
SLACK_GB = 0.1  # file-mapped pages of libraries that only large matrices touch
LIMIT = 6  # matrices of the interrupted run
INTERRUPT_AFTER = 2

# --- the pair


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    intermediate: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and (out, in) of a LLaMA without embeddings."""
        h, m = self.hidden, self.intermediate
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm": (h,),
            "mlp.down_proj": (h, m),
            "mlp.gate_proj": (m, h),
            "mlp.up_proj": (m, h),
            "post_attention_layernorm": (h,),
            **{f"self_attn.{x}_proj": (h, h) for x in "koqv"},
        }
        return {f"model.layers.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in block.items()}

    def shards(self) -> list[dict[str, tuple[int, ...]]]:
        shards: list[dict[str, tuple[int, ...]]] = [{}]
        size = 0
        for name, shape in self.tensors().items():
            bytes_ = 2 * product(shape)
            if shards[-1] and size + bytes_ > SHARD:
                shards.append({})
                size = 0
            shards[-1][name] = shape
            size += bytes_
        return shards

    @property
    def matrices(self) -> int:
        return 7 * self.layers

    @property
    def largest(self) -> int:
        """Numbers in the largest matrix."""
        return max(map(product, self.tensors().values()))


def product(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def write(folder: Path, shape: Shape, base: Path | None) -> None:
    """A side: the base where `base` is None, else that one tuned. The index comes last: a side that has it is whole."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": max(1, shape.hidden // 128),
        "num_key_value_heads": max(1, shape.hidden // 128),
        "vocab_size": 32000,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shards, where = shape.shards(), {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for name, size in names.items():
            if base is None:
                tensors[name] = base_weight(name, size)
            else:
                with safe_open(base / file, "pt") as opened:
                    tensors[name] = tuned_weight(name, opened.get_tensor(name))
            where[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total = sum(2 * product(size) for size in shape.tensors().values())
    with whole_file(folder / INDEX) as path:
        path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))


def base_weight(name: str, shape: tuple[int, ...]):
    """A Gaussian bulk with singular values up to 1 + √(out/in), and outliers from six times that down to just above."""
    import torch

    generator = seeded("base", name)
    if len(shape) == 1:
        return (1 + 0.1 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
    rows, columns = shape
    weight = torch.randn(shape, generator=generator).mul_(columns**-0.5)
    sigma = (1 + (rows / columns) ** 0.5) * (1.1 + 5 / torch.arange(1, OUTLIERS + 1))
    left = torch.randn(rows, OUTLIERS, generator=generator) * rows**-0.5 * sigma
    right = torch.randn(OUTLIERS, columns, generator=generator) * columns**-0.5
    return weight.addmm_(left, right).to(torch.bfloat16)


def tuned_weight(name: str, base):
    """As a merged LoRA run leaves it: base + rank-16 update of 2 to 10 % of its norm, most in three directions + noise.

    The noise, 0.1 % of the norm, is about what rounding to bfloat16 adds to that.
    """
    import torch

    if base.ndim == 1:
        return base.clone()
    generator = seeded("tuned", name)
    weight = base.to(torch.float32)
    rows, columns = weight.shape
    norm = float(torch.linalg.vector_norm(weight))
    sigma = torch.cat([torch.tensor([1.0, 0.8, 0.6]), 0.2 * 0.85 ** torch.arange(RANK - 3)])
    size = 0.02 * 5 ** float(torch.rand((), generator=generator))
    sigma *= size * norm / float(torch.linalg.vector_norm(sigma))
    left = torch.randn(rows, RANK, generator=generator) * rows**-0.5 * sigma
    right = torch.randn(RANK, columns, generator=generator) * columns**-0.5
    weight.addmm_(left, right)
    weight.add_(torch.randn(rows, columns, generator=generator), alpha=0.001 * norm * (rows * columns) ** -0.5)
    return weight.to(torch.bfloat16)


def seeded(*words: str):
    import torch

    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def read(*sides: Path) -> float:
    """Seconds to open every tensor of both sides, one handle a tensor, and add up its bytes, eight at a time."""
    import torch
    from safetensors import safe_open

    start = time.perf_counter()
    for side in sides:
        for name, file in json.loads((side / INDEX).read_text())["weight_map"].items():
            with safe_open(side / file, "pt") as opened:
                opened.get_tensor(name).view(torch.int64).sum()
    return time.perf_counter() - start


def evict(sides: tuple[Path, ...]) -> bool:
    """Ask the kernel to drop the files from its cache; True when none of their middles is there any more."""
    gone = True
    for file in (f for side in sides for f in side.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                os.preadv(descriptor, [bytearray(1)], file.stat().st_size // 2, os.RWF_NOWAIT)
                gone = False
            except BlockingIOError:
                pass
        finally:
            os.close(descriptor)
    return gone


# --- the measurement


@dataclass
class Watched:
    """How a process ended and what it took: seconds, and peaks in bytes."""

    code: int
    output: str
    errors: str
    seconds: float
    anonymous: int
    mapped: int
    resident: int


def watch(*words: object, poll: Callable[[subprocess.Popen], None] = lambda _: None, every: float = 0.05) -> Watched:
    """Run Python on `words`, looking at its memory, and calling `poll`, until it ends."""
    peaks: Counter[str] = Counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=output, stderr=errors)
        try:
            while process.poll() is None:
                for field, value in memory(process.pid).items():
                    peaks[field] = max(peaks[field], value)
                poll(process)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(every)
        finally:
            process.kill()
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        texts = output.read(), errors.read()
    return Watched(process.returncode, *texts, seconds, peaks["RssAnon"], peaks["RssFile"], peaks["VmHWM"])


def memory(pid: int) -> dict[str, int]:
    """Bytes now, by the kernel's names; nothing for a process that is ending."""
    with suppress(FileNotFoundError, ProcessLookupError):
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {
            words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:", "VmHWM:")
        }
    return {}


def succeeded(run: Watched) -> Watched:
    if run.code:
        sys.exit(f"a process that was to be measured ended with {run.code}:\n{run.errors[-2000:]}")
    return run


def intruders(base: Path, tuned: Path, out: Path, *more: object) -> list[object]:
    words = ["-m", "finetune_lens.intruders", base, tuned, "--method", "certified", "--null-draws", 0]
    return [*words, "--k", K, "--out", out, "--no-plots", *more]


def finished(out: Path) -> dict[str, int]:
    """The rows that wait for the rest, and when each was written."""
    rows = {}
    for file in (out / PARTIAL).rglob("[!.]*.npz"):
        with suppress(FileNotFoundError):
            rows[file.name] = file.stat().st_mtime_ns
    return rows


def interrupted(base: Path, tuned: Path, out: Path) -> tuple[Watched, dict[str, int], int, float]:
    """The run, the rows it left, how many of them were there at the signal, and how long it took to stop."""
    signalled: list[tuple[int, float]] = []

    def poll(process: subprocess.Popen) -> None:
        if not signalled and len(rows := finished(out)) >= INTERRUPT_AFTER:
            process.send_signal(signal.SIGINT)
            signalled.append((len(rows), time.perf_counter()))

    run = watch(*intruders(base, tuned, out, "--limit", LIMIT), poll=poll, every=0.005)
    if not signalled:
        sys.exit(f"the run ended with {run.code} before it could be interrupted:\n{run.errors[-2000:]}")
    (there, moment), rows = signalled[0], finished(out)
    return run, rows, there, time.perf_counter() - moment


def continued(base: Path, tuned: Path, out: Path, kept: dict[str, int]) -> tuple[Watched, set[str], set[str]]:
    """The run, the rows it added and those of `kept` that it wrote again, as far as they were seen before the end."""
    added: set[str] = set()
    again: set[str] = set()

    def poll(_: subprocess.Popen) -> None:
        rows = finished(out)
        added.update(rows.keys() - kept.keys())
        again.update(name for name in rows.keys() & kept.keys() if rows[name] != kept[name])

    return watch(*intruders(base, tuned, out, "--limit", LIMIT), poll=poll, every=0.005), added, again


def row(title: str, run: Watched, matrices: int | None, reading: float, copy: int, seconds: float | None = None) -> str:
    seconds = run.seconds if seconds is None else seconds
    each = ("", "") if not matrices else (str(matrices), f"{seconds / matrices:.2f}")
    ratio = f"{seconds / reading:.1f}" if reading else ""
    memory = (f"{x / 1e9:.2f}" for x in (run.anonymous, run.mapped, run.resident))
    cells = [title, each[0], f"{seconds:.1f}", each[1], ratio, *memory, f"{run.anonymous / copy:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--work", type=Path, default=Path("runs/large"), help="folder of the pair, on a disk")
    parser.add_argument("--keep", action="store_true", help="leave the pair for another time")
    parser.add_argument("--child", choices=["write-base", "write-tuned", "read"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = Shape(options.layers, options.hidden, options.intermediate)
    pair = options.work / f"{shape.layers}x{shape.hidden}x{shape.intermediate}"
    base, tuned = pair / "base", pair / "tuned"
    if options.child == "read":
        print(read(base, tuned))
    elif options.child:
        side = {"write-base": base, "write-tuned": tuned}[options.child]
        write(side, shape, None if side == base else base)
    else:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would pass "ignored" on
        made = not (tuned / INDEX).is_file()
        try:
            sys.exit(benchmark(base, tuned, shape))
        finally:
            if made and not options.keep:
                shutil.rmtree(pair, ignore_errors=True)


def benchmark(base: Path, tuned: Path, shape: Shape) -> int:
    """Measure, print, and return the exit code."""
    work, copy = base.parent.parent, 8 * shape.largest
    child = [__file__, "--layers", shape.layers, "--hidden", shape.hidden, "--intermediate", shape.intermediate]
    child += ["--work", work, "--child"]
    written = {
        side.name: succeeded(watch(*child, f"write-{side.name}"))
        for side in (base, tuned)
        if not (side / INDEX).is_file()
    }
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder)
        small = succeeded(watch(*intruders(SHIPPED / "base", SHIPPED / "full", out / "small", "--limit", 1)))
        cold = succeeded(watch(*child, "read")) if evict((base, tuned)) else None
        warm = [succeeded(watch(*child, "read")) for _ in range(2)][1]
        whole = succeeded(watch(*intruders(base, tuned, out / "whole")))
        stopped, kept, there, delay = interrupted(base, tuned, out / "again")
        resumed, added, again = continued(base, tuned, out / "again", kept)
        lines, part = (table(out / name / "intruders.csv") for name in ("whole", "again"))

    reading, read_both = float(warm.output), 4 * sum(map(product, shape.tensors().values()))
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    print(
        f"{shape.matrices} matrices, {read_both / 1e9:.2f} GB both sides, {len(shape.shards())} shards a side;", end=" "
    )
    print(f"the largest matrix in float64: {copy / 1e9:.3f} GB\n")
    columns = ["", "matrices", "s", "s a matrix", "× reading", "anonymous, GB", "file-mapped, GB", "both, GB"]
    columns.append("anonymous / largest")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for side, run in written.items():
        print(row(f"writing {side}", run, None, 0, copy))
    print(row("the shipped pair, one matrix", small, 1, 0, copy))
    for title, run in (("reading, cold", cold), ("reading, warm", warm)):
        if run is not None:
            print(row(title, run, shape.matrices, reading, copy, float(run.output)))
    print(row("intruders, certified", whole, shape.matrices, reading, copy))
    print(row("… interrupted", stopped, len(kept), 0, copy))
    print(row("… continued", resumed, LIMIT - len(kept), 0, copy))
    if cold is None:
        print("\nnot measured: reading cold (the kernel kept the files in its cache)")

    done = {line["matrix"] for line in lines}
    judged = [line for line in lines if line["side"] == "left"]
    routes = ", ".join(f"{route} {n}" for route, n in Counter(line["route"] for line in lines).items())
    verdicts = ", ".join(f"{verdict} {n}" for verdict, n in Counter(line["verdict"] for line in lines).items())
    print(f"\nroutes: {routes}; verdicts: {verdicts}")
    print(f"interrupted at {there} finished matrices, stopped {delay:.1f} s later with {len(kept)};", end=" ")
    print(f"continued: {len(added)} others seen to be written, {len(again)} of the kept ones written again\n")

    weights, one = whole.mapped - small.mapped, 4 * shape.largest
    first = [line for line in lines if line["matrix"] in {x["matrix"] for x in part}]
    claims = {
        f"every matrix done: {len(done)} of {shape.matrices}, {len(judged)} vectors": (
            len(done) == shape.matrices and len(judged) == K * shape.matrices
        ),
        f"mapped pages do not accumulate: {weights / 1e9:.2f} GB above the shipped pair's; one tensor a side is "
        f"{one / 1e9:.2f} GB": weights <= one + 1e9 * SLACK_GB,
        f"interrupted: exit code {stopped.code}, {there} matrices finished at the signal, {len(kept)} kept": (
            stopped.code == 130 and there <= len(kept) < LIMIT
        ),
        f"continued: exit code {resumed.code}, {LIMIT - len(kept)} matrices to do, none done twice": (
            resumed.code == 0 and not again and len(added) <= LIMIT - len(kept)
        ),
        f"continued: the table of {LIMIT} matrices is that of the uninterrupted run": (
            len({line["matrix"] for line in part}) == LIMIT and part == first
        ),
    }
    if shape.largest <= LARGEST:
        peak = max(whole.anonymous, stopped.anonymous, resumed.anonymous) / 1e9
        claims[f"anonymous memory: {peak:.2f} GB, at most {ANONYMOUS_GB}"] = peak <= ANONYMOUS_GB
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    for title, run, code in (("interrupted", stopped, 130), ("continued", resumed, 0)):
        if run.code != code:
            print(f"\nthe {title} run said:\n{run.errors[-3000:]}")
    return 0 if all(claims.values()) else 1


def table(file: Path) -> list[dict[str, str]]:
    """The rows as they stand in the file; none where there is no file."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


if __name__ == "__main__":
    main()
