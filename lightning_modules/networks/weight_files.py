"""Checkpoints of any origin, read without executing anything in them.

``.safetensors`` holds no code, and all else is read with ``weights_only=True``.
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_WRAPPERS = ("module", "_orig_mod")  # DataParallel's and torch.compile's
_rebuild_number = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [  # metrics that training loops store; rebuilding a number can do nothing else
    (_rebuild_number, "numpy.core.multiarray.scalar"),
    (_rebuild_number, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)),
]


def read_checkpoint(path: Path, of_folders: str = "") -> Mapping[str, Any]:
    """Reads a file, on the CPU; the tensors of a ``.safetensors`` are under ``state_dict``, beside its metadata.

    Args:
        path: Of the file.
        of_folders: A sentence on what reads folders, for those who give one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or asks for more than tensors, builtins and numpy's numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; allowed: a checkpoint file (.pth, .pt, "
            f".ckpt, .bin, .safetensors). {of_folders}".rstrip()
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; allowed: a dict of weights, or a checkpoint with one. Save "
            "model.state_dict()."
        )
    return content


def weights_in(content: Mapping[str, Any], containers: Sequence[str], path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by name, without the prefixes of DataParallel and torch.compile.

    Args:
        content: Of the file.
        containers: Where weights may be, the likeliest first; else they are the content itself.
        path: Of the file.

    Raises:
        ValueError: If there are none.
    """
    place = next((content[name] for name in containers if isinstance(content.get(name), Mapping)), content)
    tensors = {
        ".".join(part for part in str(name).split(".") if part not in _WRAPPERS): value
        for name, value in place.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise ValueError(
            f"{path} holds no weights; it has {shortened([str(name) for name in content])}. Allowed: a state dict, or "
            f"a checkpoint with one under {', '.join(containers)}."
        )
    return tensors


def shortened(names: Sequence[str], most: int = 12) -> str:
    """Lists names in a message; of many, the first ones and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = dict(file.metadata() or {})
            return {**facts, "state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as .safetensors ({error}). Copy or save it again.") from error


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked_for[1]}" if asked_for else "it is damaged, or no torch.save file"
        raise ValueError(
            f"{path} was refused: {reason}; allowed are tensors, Python builtins and numpy numbers. Nothing in it was "
            "executed. If you trust where it comes from, load it there and save its state_dict alone."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:160] or "it is empty"
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}). It may be truncated or no checkpoint; copy it again."
        ) from error
