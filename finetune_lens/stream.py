"""One pass over the weights of a pair: progress, hashes, exclusions, and chunks that survive an interruption."""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_lens import device as devices
from finetune_lens.files import whole_file

if TYPE_CHECKING:
    import xarray as xr

    from finetune_lens.pair import ModelPair, ModelSeries

Row = dict[str, Any]  # what was measured on one matrix: numpy arrays and scalars


@dataclass
class Rows:
    """What a pass measured, in the order of the names."""

    rows: list[Row] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    digests: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of the base, then of each tuned side

    def provenance(self, device: Any) -> str:
        """What only the pass itself knows, as JSON for the result's attribute."""
        hashes = [
            hashlib.sha256(json.dumps(dict(zip(sorted(self.digests), column, strict=True))).encode()).hexdigest()
            for column in zip(*(self.digests[name] for name in sorted(self.digests)), strict=True)
        ]
        weights = {"base": hashes[0], "tuned": hashes[1] if len(hashes) == 2 else hashes[1:]}
        record = {"weights_sha256": weights, "excluded": self.excluded, "device": str(device), "dtype": "float64"}
        return json.dumps(record)

    def coordinates(self) -> dict[str, Any]:
        """name, layer (−1 outside the blocks) and component along `matrix`."""
        return {
            "matrix": np.array([r["name"] for r in self.rows], dtype=object),
            "layer": ("matrix", np.array([r["layer"] for r in self.rows], dtype=int)),
            "component": ("matrix", np.array([r["component"] for r in self.rows], dtype=object)),
        }

    def stacked(self, key: str) -> np.ndarray:
        """The arrays under `key`, padded with NaN to a common shape and stacked along a new first axis."""
        return padded([r[key] for r in self.rows])

    def variables(self, **dims: tuple[str, ...]) -> dict[str, "xr.Variable"]:
        """Variables by name, each with the given dimensions after `matrix`."""
        return {name: (("matrix", *rest), self.stacked(name)) for name, rest in dims.items()}


def padded(values: list[Any]) -> np.ndarray:
    """Arrays or scalars stacked along a new first axis; numbers padded with NaN to a common shape."""
    arrays = [np.asarray(value) for value in values]
    if not arrays or arrays[0].ndim == 0:
        return np.array([a.item() for a in arrays])
    if arrays[0].dtype.kind in "bUO":
        return np.stack(arrays)
    shape = tuple(np.max([a.shape for a in arrays], axis=0))
    kind = np.result_type(*arrays, np.float32) if arrays[0].dtype.kind == "f" else float
    stack = np.full((len(arrays), *shape), np.nan, dtype=kind)
    for i, a in enumerate(arrays):
        stack[(i, *(slice(n) for n in a.shape))] = a
    return stack


def each_matrix(
    pair: "ModelPair | ModelSeries",
    names: list[str],
    measure: Callable[[Any], Row],
    *,
    progress: bool,
    partial: Path | None = None,
    arguments: dict[str, Any],
) -> Rows:
    """Call `measure` on every named weight (`Matrix`, or `Variants` of a series), one in memory at a time.

    Where all are small, as many are worked on as there are cores, each on one thread: `measure` keeps nothing between
    calls.

    A weight with NaN or Inf is left out and named in `excluded`. With `partial`, each finished row is kept there under
    a key made of the arguments (`analysis` names the analysis), the files and how they were read; the same call
    continues behind the last finished row, a changed one starts anew and drops the old rows.
    """
    from tqdm import tqdm

    store = Store(partial, pair.fingerprint, arguments) if partial is not None and pair.fingerprint else None
    result = Rows()
    done = {} if store is None else {name: row for name in names if (row := store.get(name)) is not None}
    todo = [name for name in names if name not in done]
    largest = max((min(pair.shape(name), default=0) for name in todo), default=0)

    def work(matrix: Any) -> Row:
        row = {"name": matrix.name, "problem": matrix.problem(), "digests": np.array(matrix.digests)}
        if not row["problem"]:
            layer = -1 if matrix.layer is None else matrix.layer
            row |= {"layer": layer, "component": matrix.component} | measure(matrix)
        if store is not None:
            store.put(matrix.name, row)
        return row

    computed = _in_order(pair.matrices(todo), work, at_once=devices.side_by_side(largest, arguments["device"]))
    for name in tqdm(names, desc="weights", unit="", disable=not progress, initial=0, dynamic_ncols=True):
        row = done[name] if name in done else next(computed)
        result.digests[name] = tuple(str(d) for d in row["digests"])
        if row["problem"]:
            result.excluded[name] = str(row["problem"])
        else:
            result.rows.append(row)
    return result


def _in_order(matrices: Iterator[Any], work: Callable[[Any], Row], *, at_once: int) -> Iterator[Row]:
    """`work` of each matrix, in their order."""
    if at_once == 1:
        for matrix in matrices:
            with devices.threads_for(matrix.order):
                row = work(matrix)
            del matrix
            yield row
        return
    with devices.threads_for(0), ThreadPoolExecutor(at_once) as pool:
        waiting: deque[Future[Row]] = deque()
        try:
            for matrix in matrices:
                waiting.append(pool.submit(work, matrix))
                if len(waiting) > at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Store:
    """Finished rows as .npz files, one a weight."""

    def __init__(self, folder: Path, fingerprint: str, arguments: dict[str, Any]):
        from finetune_lens import __version__

        facts = json.dumps([__version__, fingerprint, arguments], sort_keys=True, default=str)
        prefix = f"{arguments['analysis']}-rows-"  # the folder may be the user's own: only what is so named is ours
        self.folder = folder / f"{prefix}{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        for other in folder.glob(f"{prefix}{'[0-9a-f]' * 16}"):
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"

    def get(self, name: str) -> Row | None:
        if not self._file(name).is_file():
            return None
        with np.load(self._file(name), allow_pickle=False) as file:
            return {key: file[key] if file[key].ndim else file[key].item() for key in file.files}

    def put(self, name: str, row: Row) -> None:
        with whole_file(self._file(name)) as path, path.open("wb") as file:
            np.savez(file, **row)
