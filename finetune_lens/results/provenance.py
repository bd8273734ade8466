"""The record of a run: what went in, with which versions, how long it took."""

import functools
import inspect
import json
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune_lens.results import Result

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
PACKAGES = ("finetune_lens", "torch", "numpy", "scipy", "xarray", "transformers", "peft", "safetensors")


def recorded(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give the result of an analysis its provenance: inputs, arguments given and defaulted, versions, wall time.

    The first argument describes itself with `describe()`; what the analysis itself learnt (weight hashes, device) it
    has put in `data.attrs["provenance"]`, and that is kept.
    """

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Result:
        bound = inspect.signature(function).bind(*args, **options)
        subject = next(iter(bound.arguments.values()))
        start = time.perf_counter()
        result = function(*args, **options)
        given = {k: v for k, v in list(bound.arguments.items())[1:] if k not in NOT_ARGUMENTS}
        bound.apply_defaults()
        defaulted = {k: v for k, v in list(bound.arguments.items())[1:] if k not in given and k not in NOT_ARGUMENTS}
        record = {
            "analysis": function.__name__,
            "inputs": subject.describe() if hasattr(subject, "describe") else str(subject),
            "arguments": given,
            "defaults": defaulted,
            "versions": _versions(),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "commit": _commit(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_seconds": round(time.perf_counter() - start, 3),
        }
        result.data.attrs["provenance"] = json.dumps(record | result.provenance, default=str)
        for name, value in result.data.attrs.items():  # what lies in the checkout is told from there
            if isinstance(value, str):
                result.data.attrs[name] = value.replace(f"{ROOT}/", "")
        return result

    return run


NOT_ARGUMENTS = ("progress", "partial", "prompts", "questions", "tokenizer")


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def _commit() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this package was loaded from; None for an installed package."""
    if not (ROOT / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"id": commit.strip(), "dirty": bool(status.strip())}
