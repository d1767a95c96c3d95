"""Feature stores in LMDB: ``shard_<number>.lmdb`` per writer.

Keys are ``<scene>/<frame>``, values the numbers of the tokens and then of the embedding.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from datamodules.readers.feature_records import FeatureStore, FrameKey, RecordWriter, StoredFeatures, StoreHeader

LARGEST_FILE = 1 << 40  # bytes an LMDB file may grow to; address space, not disk
RECORDS_PER_COMMIT = 64


class _OpenFile(NamedTuple):
    process_id: int
    inode: int
    environment: Any


# LMDB refuses to open a file twice in a process, whichever object asks; so there is one handle per file and process.
_open_files: dict[Path, _OpenFile] = {}


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(
            "The feature store's backend is lmdb, which is not installed. pip install lmdb, or fill a store of the "
            "backend safetensors."
        ) from error
    return lmdb


def _reading(file: Path) -> Any:
    """Returns this process's handle; one inherited by a fork is closed and opened anew."""
    opened = _open_files.get(file)
    if opened is None or opened.process_id != os.getpid():
        _close(file)
        lmdb = _lmdb()
        try:
            environment = lmdb.open(
                str(file), subdir=False, readonly=True, lock=False, readahead=False, meminit=False, max_spare_txns=1
            )
        except lmdb.Error as error:
            raise ValueError(f"{file} cannot be opened ({error}). Close its writer, or fill the store anew.") from error
        opened = _open_files[file] = _OpenFile(os.getpid(), file.stat().st_ino, environment)
    return opened.environment


def _close(file: Path) -> None:
    if (opened := _open_files.pop(file, None)) is not None:
        opened.environment.close()


def shard_files(path: Path) -> list[Path]:
    """Returns the shards of a store, without one that a writer is about to make."""
    return [file for file in sorted(path.glob("*.lmdb")) if file.stat().st_size]


def check_lmdb_file(file: Path) -> None:
    """Refuses a file that is none of LMDB's or ends before its pages do: reading those would kill the process."""
    opened = _open_files.get(file.resolve())
    if opened is not None and opened.inode != file.stat().st_ino:
        _close(file.resolve())  # a file of an earlier store of this name
    environment = _reading(file.resolve())
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if (size := file.stat().st_size) < needed:
        _close(file.resolve())
        raise ValueError(
            f"{file} is truncated: it has {size} bytes of {needed}. Copy it again, or delete it and fill the store "
            "again; the other shards are kept."
        )


class LmdbFeatureStore(FeatureStore):
    """Reads LMDB files through one handle per file and process."""

    def __init__(self, path: Path, header: StoreHeader, projection: Float[Tensor, "channels text"]) -> None:
        super().__init__(path, header, projection)
        self._files = [file.resolve() for file in shard_files(path)]

    @override
    def keys(self) -> list[FrameKey]:
        return sorted({key for file in self._files for key in _lmdb_keys(_reading(file))})

    @override
    def _find(self, scene: str, frame: int) -> StoredFeatures | None:
        key = _record_key(scene, frame)
        for file in self._files:
            with _reading(file).begin(buffers=True) as transaction:
                if (value := transaction.get(key)) is None:
                    continue
                if len(value) != 2 * self.header.num_values:
                    raise ValueError(
                        f"{file}: the record of frame {frame} of {scene} has {len(value)} bytes; needed are "
                        f"{2 * self.header.num_values}. Delete the file and fill the store again."
                    )
                return self._decoded(np.frombuffer(value, np.float16).copy())  # the buffer ends with the transaction
        return None


class LmdbWriter(RecordWriter):
    """Writes ``shard_<number>.lmdb``, some records at a time."""

    def __init__(self, path: Path, header: StoreHeader, shard: int) -> None:
        super().__init__(path, header, shard)
        lmdb, own = _lmdb(), path / f"shard_{shard}.lmdb"
        for file in shard_files(path):
            check_lmdb_file(file)
            _close(file.resolve())
            if file != own:  # others may be writing theirs: with their lock
                with lmdb.open(str(file), subdir=False, readonly=True) as environment:
                    self._known.update(_lmdb_keys(environment))
        try:
            self._environment = lmdb.open(str(own), subdir=False, map_size=LARGEST_FILE)
        except lmdb.Error as error:
            raise ValueError(f"{own} cannot be written ({error}). Delete it to have its records made anew.") from error
        self._known.update(_lmdb_keys(self._environment))
        self._waiting: list[tuple[bytes, bytes]] = []

    @override
    def _add(self, scene: str, frame: int, values: np.ndarray) -> None:
        self._waiting.append((_record_key(scene, frame), values.tobytes()))
        if len(self._waiting) >= RECORDS_PER_COMMIT:
            self._commit()

    def _commit(self) -> None:
        try:
            with self._environment.begin(write=True) as transaction:
                for key, value in self._waiting:
                    transaction.put(key, value)
        except _lmdb().Error as error:
            raise ValueError(
                f"{self.path} cannot take more records ({error}). Free some space, or copy it to another disk; the "
                "same command goes on with what is there."
            ) from error
        finally:
            self._waiting = []

    @override
    def close(self) -> None:
        try:
            self._commit()
        finally:
            self._environment.close()


def _record_key(scene: str, frame: int) -> bytes:
    return f"{scene}/{frame:06d}".encode()


def _lmdb_keys(environment: Any) -> Iterator[FrameKey]:
    with environment.begin() as transaction:
        for key in transaction.cursor().iternext(keys=True, values=False):
            scene, _, frame = bytes(key).decode(errors="replace").rpartition("/")
            if not frame.isdecimal():
                raise ValueError(
                    f"{environment.path()} has the key {key!r}, which is none of a feature store's. Delete it."
                )
            yield scene, int(frame)
