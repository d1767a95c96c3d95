"""Depth maps: files of a folder, their sizes, their metres.

Read are 16-bit ``.png``, ``.npy`` and ``.npz``; integers are divided by a scale (1000 for millimetres), floats are
metres; 0 = no depth. An array of three dimensions is a stack of maps. Where a folder has a subfolder ``depth``
(ScanNet's frames, Open3D's), its depth lies there and nothing else in it is read.
"""

import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

SUFFIXES = (".png", ".npy", ".npz")
DEPTH_FOLDER = "depth"


class DepthMapFile(NamedTuple):
    """Where one depth map lies.

    Attributes:
        path: The file.
        row: Which of a stack, or None for a file of one map.
        name: Path below the root without suffix, with ``:row`` for one of a stack.
        scene: What it shows with others: the folder it lies in (for ScanNet without the number of the scan, for scans
            of the same rooms must stay together), or itself where it lies in the root.
        kind: Kind of the scene: ScanNet's ``sceneType``, or the folder above the scene's; None where there is neither.
    """

    path: Path
    row: int | None
    name: str
    scene: str
    kind: str | None


def find_depth_maps(root: Path, array_key: str | None = None) -> list[DepthMapFile]:
    """Finds the depth maps below a folder, sorted by name, and checks their headers.

    Args:
        root: The folder.
        array_key: Which array of an ``.npz`` is depth; ``depth``, or the only one, unless given.

    Raises:
        FileNotFoundError: If the folder is absent or holds no depth map.
        ValueError: If a file is damaged or no depth map.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder. Give a folder with depth maps as data.init_args.root.")
    found = []
    kinds: dict[Path, str | None] = {}
    for path in _depth_files(root):
        num_maps = _maps_in(path, array_key)
        folder = path.parent.parent if path.parent.name == DEPTH_FOLDER and path.parent != root else path.parent
        name = path.relative_to(root).with_suffix("").as_posix()
        scene = re.sub(r"(scene\d{4})_\d\d$", r"\1", folder.relative_to(root).as_posix())
        if folder not in kinds:
            kinds[folder] = _kind_of(folder, root)
        for row in range(num_maps or 1):
            found.append(
                DepthMapFile(
                    path,
                    None if num_maps is None else row,
                    name if num_maps is None else f"{name}:{row}",
                    name if scene == "." else scene,
                    kinds[folder],
                )
            )
    if not found:
        raise FileNotFoundError(
            f"{root} holds no depth map; allowed: 16-bit .png, .npy, .npz, in folders at any depth. Give another "
            "folder as data.init_args.root."
        )
    return sorted(found, key=lambda file: _natural(file.name))


def read_depth_map(
    file: DepthMapFile, units_per_metre: float = 1000.0, array_key: str | None = None
) -> Float[np.ndarray, "height width"]:
    """Reads one map as metres.

    Args:
        file: Which one.
        units_per_metre: What integers are divided by.
        array_key: As in ``find_depth_maps``.

    Raises:
        ValueError: If the file is damaged, or holds NaN, infinity or depth below 0.
    """
    raw = _read_png(file.path) if file.path.suffix == ".png" else _read_array(file, array_key)
    depth = raw.astype(np.float32)
    if raw.dtype.kind in "iu":
        depth /= units_per_metre
    wrong = ~np.isfinite(depth) | (depth < 0)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{file.path}: map {file.name} holds {depth[row, column]} (row {row}, column {column}; {int(wrong.sum())} "
            "such pixels); allowed: metres from 0 on, 0 = no depth. Set those pixels to 0."
        )
    return depth


def _depth_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if DEPTH_FOLDER in subfolders:
            subfolders[:] = [DEPTH_FOLDER]
            continue
        for name in names:
            path = Path(folder, name)
            if path.suffix in SUFFIXES and not name.startswith("."):
                yield path


def _natural(name: str) -> list[str | int]:
    """Orders frame 2 before frame 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _kind_of(folder: Path, root: Path) -> str | None:
    metadata = folder / f"{folder.name}.txt"
    if metadata.is_file():
        stated = re.search(r"^sceneType\s*=\s*(.+?)\s*$", metadata.read_text(errors="replace"), re.MULTILINE)
        if stated:
            return stated[1]
    parts = folder.relative_to(root).parts
    return parts[-2] if len(parts) > 1 else None


def _maps_in(path: Path, array_key: str | None) -> int | None:
    """Returns how many maps a file stacks, or None for a single one; reads the header alone."""
    if path.suffix == ".png":
        with _opened_png(path):
            return None
    shape, dtype = _npz_header(path, array_key) if path.suffix == ".npz" else _npy_header(path)
    if dtype.kind not in "fiu" or len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(
            f"{path} holds {dtype} {list(shape)}; allowed: numbers [height, width] or [maps, height, width], none 0."
        )
    return shape[0] if len(shape) == 3 else None


def _opened_png(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a depth image ({error}). Copy it again.") from error
    if not image.mode.startswith("I"):
        raise ValueError(
            f"{path} is a picture of mode {image.mode}; allowed: one channel of 16 bits. A colour or 8-bit picture is "
            f"no depth; put depth alone into the folder, or into a subfolder named {DEPTH_FOLDER}."
        )
    return image


def _read_png(path: Path) -> np.ndarray:
    with _opened_png(path) as image:
        try:
            return np.array(image)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} cannot be read as a depth image ({error}). Copy it again.") from error


def _npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _damaged(path, error) from error
    return array.shape, array.dtype


def _npz_header(path: Path, array_key: str | None) -> tuple[tuple[int, ...], np.dtype]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{_npz_key(path, archive, array_key)}.npy") as member:
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[np.lib.format.read_magic(member)]
            shape, _, dtype = read_header(member)
    except (zipfile.BadZipFile, EOFError, OSError, KeyError) as error:
        raise _damaged(path, error) from error
    return shape, dtype


def _npz_key(path: Path, archive: zipfile.ZipFile, array_key: str | None) -> str:
    keys = [name.removesuffix(".npy") for name in archive.namelist()]
    key = array_key or (keys[0] if len(keys) == 1 else DEPTH_FOLDER)
    if key not in keys:
        raise ValueError(
            f"{path} has the arrays {', '.join(keys) or 'none'}, not {key!r}. Name one as data.init_args.array_key."
        )
    return key


def _read_array(file: DepthMapFile, array_key: str | None) -> np.ndarray:
    try:
        if file.path.suffix == ".npz":
            with zipfile.ZipFile(file.path) as archive:
                key = _npz_key(file.path, archive, array_key)
            with np.load(file.path, allow_pickle=False) as arrays:
                array = arrays[key]
        else:
            array = np.load(file.path, mmap_mode="r", allow_pickle=False)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _damaged(file.path, error) from error
    return np.array(array if file.row is None else array[file.row])


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as an array ({error}). It may be truncated; write or copy it again.")
