"""Foreign torch.save files and pickles, read without running their code."""

import codecs
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

_rebuild_number = np.float64(0).__reduce__()[0]
_rebuild_array = np.zeros(1).__reduce__()[0]
# 3DGS keeps ``spatial_lr_scale`` as a numpy number, OpenScene points as numpy arrays. These names rebuild such and can
# do nothing else; numpy 1 wrote ``numpy.core``, numpy 2 writes ``numpy._core``.
_NUMBERS = (np.float16, np.float32, np.float64, np.uint8, np.int16, np.int32, np.int64, np.bool_)
_ALLOWED: list[Any] = [
    (_rebuild_number, "numpy.core.multiarray.scalar"),
    (_rebuild_number, "numpy._core.multiarray.scalar"),
    (_rebuild_array, "numpy.core.multiarray._reconstruct"),
    (_rebuild_array, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(number)) for number in _NUMBERS),
]


def load_pickled_tensors(path: str | Path) -> Any:
    """Reads a ``torch.save`` file that holds tensors, builtins, numpy numbers and arrays, onto the CPU.

    Nothing else is built, so a pickle that would run code is refused, not executed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it asks for any other object, or is truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked_for[1]}" if asked_for else "it is damaged or no torch.save file"
        raise ValueError(
            f"{path} was refused: {reason}; allowed are tensors, Python builtins, numpy numbers and arrays. Nothing in "
            "it was executed. If you trust where it comes from, load it there and save plain tensors, or export a .ply."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).split(". ")[0] or "it is empty"
        raise ValueError(
            f"{path} cannot be read as a torch.save file ({reason}). It may be truncated; copy or save it again."
        ) from error


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings, numbers and numpy arrays of numbers; anything else is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): codecs.encode,  # bytes of a pickle that Python 2 can read
        }
        for package in ("numpy.core", "numpy._core"):
            allowed[f"{package}.multiarray", "_reconstruct"] = _rebuild_array
            allowed[f"{package}.multiarray", "scalar"] = _rebuild_number
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[module, name]


def load_plain_pickle(path: str | Path) -> Any:
    """Reads a pickle that holds containers, strings, numbers and numpy arrays.

    Nothing else is built, so a pickle that would run code is refused, not executed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it asks for any other object, or is truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} was refused: {error or 'it is truncated'}; allowed are containers, strings, numbers and numpy "
            "arrays. Nothing in it was executed."
        ) from error
