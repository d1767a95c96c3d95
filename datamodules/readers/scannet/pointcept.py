"""Pointcept's layout (Mosaic3D's and Concerto's too): arrays of each scene's mesh vertices, in the unaligned world.

``{train,val,test}/<scene>/{coord,color,segment20,segment200,instance}.npy``; classes count the benchmark's own order,
-1 or -100 = ignored. Pointcept has no frames; Concerto adds ``images/{train,val}/<scene>`` with ``color``, ``depth``,
``pose`` and ``intrinsic``, and any raw scans will do.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from typing_extensions import override

from datamodules.readers.atomic_files import load_array
from datamodules.readers.scannet.class_tables import CLASS_TABLES
from datamodules.readers.scannet.frame_folders import FrameFolder
from datamodules.readers.scannet.frame_source import AnnotatedPoints
from datamodules.readers.scannet.raw_scans import RawScans, ScanFolders
from datamodules.readers.scannet.sens import SensFrames

SPLITS = ("train", "val", "test")
CLASS_FILES = {"scannet20": "segment20.npy", "scannet200": "segment200.npy"}


class PointceptFolders(ScanFolders):
    """Pointcept's arrays with frames; see this module.

    Args:
        root: The folder with ``train`` and ``val``.
        intrinsics: As in :class:`ScanFolders`.
        frame_stride: As there.
        frames_root: Raw scans that have the frames, where they are not below ``images``.
    """

    layout: ClassVar[str] = "pointcept"

    def __init__(self, root: Path, intrinsics: str, frame_stride: int, frames_root: Path | None = None) -> None:
        super().__init__(root, intrinsics, frame_stride)
        self.raw = None if frames_root is None else RawScans(frames_root, intrinsics, frame_stride)

    @override
    def scenes(self) -> tuple[str, ...]:
        found = [folder.parent.name for split in SPLITS for folder in (self.root / split).glob("*/coord.npy")]
        return tuple(sorted(found))

    @override
    def frame_folder(self, scene: str) -> Path:
        if self.raw is not None:
            return self.raw.frame_folder(scene)
        places = [self.root / "images" / split / scene for split in SPLITS]
        return next((place for place in places if place.is_dir()), places[0])

    @override
    def _open(self, scene: str) -> FrameFolder | SensFrames:
        folder = self.frame_folder(scene)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder: Pointcept's layout has no frames. Give raw scans that have them as "
                "data.init_args.frames_root."
            )
        return super()._open(scene)

    @override
    def scan_folder(self, scene: str) -> Path:
        return self.frame_folder(scene)

    @override
    def mesh(self, scene: str) -> AnnotatedPoints | None:
        folders = (self.root / split / scene for split in SPLITS)
        found = next((folder for folder in folders if (folder / "coord.npy").is_file()), None)
        return None if found is None else _read_arrays(found)

    @override
    def has_mesh(self, scene: str) -> bool:
        return True  # scenes are known by it

    @override
    def label_tables(self, scene: str) -> tuple[str, ...]:
        folders = [self.root / split / scene for split in SPLITS]
        return tuple(
            table for table, file in CLASS_FILES.items() if any((folder / file).is_file() for folder in folders)
        )

    @override
    def split(self, name: str) -> tuple[str, ...] | None:
        listed = tuple(sorted(file.parent.name for file in (self.root / name).glob("*/coord.npy")))
        return listed or super().split(name)


def _read_arrays(folder: Path) -> AnnotatedPoints:
    coords, colours = load_array(folder / "coord.npy"), load_array(folder / "color.npy")
    if coords.ndim != 2 or coords.shape[1] != 3 or colours.shape != coords.shape or not np.isfinite(coords).all():
        raise ValueError(
            f"{folder}: coord.npy is {list(coords.shape)} and color.npy {list(colours.shape)}; allowed: finite [N, 3], "
            "alike. Write them again."
        )
    points = torch.from_numpy(np.concatenate([coords.astype(np.float32), colours.astype(np.float32) / 255], axis=1))
    labels = {}
    for table, file in CLASS_FILES.items():
        if (folder / file).is_file():
            indices = _column(folder / file, len(points))
            if int(indices.max(initial=-1)) >= len(CLASS_TABLES[table]):
                raise ValueError(
                    f"{folder / file} counts classes up to {indices.max()}; allowed: below {len(CLASS_TABLES[table])}, "
                    "and -1 for none."
                )
            labels[table] = torch.from_numpy(np.maximum(indices, -1))
    instances = None
    if (folder / "instance.npy").is_file():
        instances = torch.from_numpy(np.maximum(_column(folder / "instance.npy", len(points)), -1))
    return AnnotatedPoints(points, labels, instances, None, torch.arange(len(points)))


def _column(path: Path, num_points: int) -> np.ndarray:
    column = load_array(path)
    if column.size != num_points:
        raise ValueError(f"{path} holds {column.size} numbers for {num_points} points. Write it again.")
    return column.reshape(-1).astype(np.int64)
