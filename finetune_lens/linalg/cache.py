"""Bases of base weights on disk, so that a base is decomposed once for every checkpoint that is compared with it."""

import contextlib
import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from finetune_lens.files import whole_file
from finetune_lens.linalg.exact import Basis

DIGEST = 64  # characters of a SHA-256; what follows them names a side
FORMAT = "2"  # changes when what is stored, or how it is computed, changes

_ONE_AT_A_TIME = threading.Lock()  # so that two threads together do not pass the limit


@dataclass(frozen=True)
class BasisCache:
    """A folder of singular bases, named by the content of the weight; at most `limit` bytes.

    What a weight needs is the basis of its shorter side: p·(p + 3) float64 numbers. Each file is whole or absent, so an
    interruption loses at most one; when the folder is full, what is there stays and the rest is computed as needed.
    """

    folder: Path
    limit: int

    def _file(self, digest: str) -> Path:
        return self.folder / f"{hashlib.sha256(f'{FORMAT}:{digest}'.encode()).hexdigest()}.safetensors"

    def get(self, digest: str) -> Basis | None:
        """The basis of the weight with this content, if it is there."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            held = load_file(self._file(digest))
            tensors = (held[name] for name in ("vectors", "values", "error", "clusters"))
            return Basis(*tensors, int(held["rank"]), complete=True)
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, digest: str, basis: Basis) -> None:
        """Keep a basis, if there is room."""
        from safetensors.torch import save_file

        size = basis.vectors.numel() * 8
        tensors = {
            "vectors": basis.vectors,
            "values": basis.values,
            "error": basis.error,
            "clusters": basis.clusters,
            "rank": torch.tensor(basis.rank),
        }
        with (
            _ONE_AT_A_TIME,
            contextlib.suppress(OSError),
        ):  # a full disk must not end a run that does not need the cache
            held = sum(file.stat().st_size for file in self.folder.glob("*.safetensors")) if self.folder.is_dir() else 0
            if held + size > self.limit:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self._file(digest)) as path:
                save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path)


@dataclass
class Latest:
    """The bases of the weight that was last asked for, in memory; of others from `behind`, if there is such a store."""

    behind: BasisCache | None = None
    _held: dict[str, Basis] = field(default_factory=dict)

    def get(self, digest: str) -> Basis | None:
        """The basis of the weight with this content, if it is there."""
        if digest not in self._held:
            self._held = {other: b for other, b in self._held.items() if other[:DIGEST] == digest[:DIGEST]}
            found = None if self.behind is None else self.behind.get(digest)
            if found is None:
                return None
            self._held[digest] = found
        return self._held[digest]

    def put(self, digest: str, basis: Basis) -> None:
        """Keep a basis."""
        self._held[digest] = basis
        if self.behind is not None:
            self.behind.put(digest, basis)


Store = BasisCache | Latest  # where bases of base weights are kept, by the digest of the weight
