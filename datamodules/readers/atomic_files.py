"""Files that are complete or absent: written under a temporary name beside their place, then renamed."""

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NUMPY_HEADERS = threading.Lock()
"""Held while numpy reads arrays: it parses their headers by ``ast``, which before CPython 3.11.8 and 3.12.2 fails when
a second thread does so at that moment ("AST constructor recursion depth mismatch", gh-106905)."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; on success it takes the place of ``path``, on failure it goes.

    The folder is made where it does not exist. The temporary name keeps the suffix, for writers which dispatch by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path: str | Path, array: np.ndarray) -> None:
    """Writes a ``.npy`` file."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def whole_array(path: str | Path) -> tuple[tuple[int, ...], np.dtype] | None:
    """Returns shape and type of a ``.npy`` file whose length is what its header says; None if it is absent or damaged.

    Its numbers are not read.
    """
    try:
        with Path(path).open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            with NUMPY_HEADERS:
                shape, _, dtype = read(file)
            length = file.tell() + math.prod(shape) * dtype.itemsize
            return (shape, dtype) if file.seek(0, os.SEEK_END) == length else None
    except (ValueError, EOFError, FileNotFoundError):
        return None


def load_array(path: str | Path) -> np.ndarray:
    """Reads a ``.npy`` file without executing pickles.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, is no ``.npy`` file, or holds Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with NUMPY_HEADERS:
            return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as an .npy array ({error}). It may be truncated or not an array file; "
            "write or copy it again."
        ) from error
