"""OpenScene's layout: ``scannet_3d/{train,val}/<scene>_vh_clean_2.pth`` and ``scannet_2d/<scene>``.

The ``.pth`` holds coordinates (unaligned), colours in -1 to 1 and ScanNet20 classes, 255 = ignored. The frames are
320 x 240, every 20th, with one ``scannet_2d/intrinsics.txt`` for all scenes.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from typing_extensions import override

from datamodules.readers.safe_pickles import load_pickled_tensors
from datamodules.readers.scannet.class_tables import SCANNET20
from datamodules.readers.scannet.frame_folders import Calibration, read_matrix
from datamodules.readers.scannet.frame_source import AnnotatedPoints
from datamodules.readers.scannet.raw_scans import ScanFolders

POINT_FOLDERS = ("train", "val", "test")
SUFFIX = "_vh_clean_2.pth"


class OpenSceneFolders(ScanFolders):
    """OpenScene's 2D and 3D folders; see this module."""

    layout: ClassVar[str] = "openscene"

    @override
    def scenes(self) -> tuple[str, ...]:
        return tuple(sorted(folder.name for folder in (self.root / "scannet_2d").iterdir() if folder.is_dir()))

    @override
    def frame_folder(self, scene: str) -> Path:
        return self.root / "scannet_2d" / scene

    @override
    def scan_folder(self, scene: str) -> Path:
        return self.frame_folder(scene)

    @override
    def calibration(self, scene: str) -> Calibration | None:
        single = self.root / "scannet_2d" / "intrinsics.txt"
        if (
            self.intrinsics == "per_scene"
            and not (self.frame_folder(scene) / "intrinsic").is_dir()
            and single.is_file()
        ):
            return Calibration(str(single), read_matrix(single), None, None, None)
        return super().calibration(scene)

    @override
    def mesh(self, scene: str) -> AnnotatedPoints | None:
        file = self._point_file(scene)
        return None if file is None else _read_points(file)

    @override
    def has_mesh(self, scene: str) -> bool:
        return self._point_file(scene) is not None

    @override
    def label_tables(self, scene: str) -> tuple[str, ...]:
        return (SCANNET20.name,) if self.has_mesh(scene) else ()

    def _point_file(self, scene: str) -> Path | None:
        files = (self.root / "scannet_3d" / split / f"{scene}{SUFFIX}" for split in POINT_FOLDERS)
        return next((file for file in files if file.is_file()), None)

    @override
    def split(self, name: str) -> tuple[str, ...] | None:
        folder = self.root / "scannet_3d" / name
        listed = tuple(sorted(file.name.removesuffix(SUFFIX) for file in folder.glob(f"*{SUFFIX}")))
        return listed or super().split(name)


def _read_points(path: Path) -> AnnotatedPoints:
    content = load_pickled_tensors(path)
    try:
        coords, colours, classes = (torch.as_tensor(np.asarray(part)) for part in content)
        points = torch.cat([coords.float(), (colours.float() + 1) / 2], dim=1)
        indices = classes.long().reshape(len(points))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); needed: coordinates [N, 3], colours [N, 3] and classes [N]."
        ) from error
    if points.shape[1] != 6 or not torch.isfinite(points).all():
        raise ValueError(f"{path} holds points {list(points.shape)}; allowed: finite, of 3 coordinates and 3 colours.")
    indices = torch.where((indices >= 0) & (indices < len(SCANNET20)), indices, -1)
    return AnnotatedPoints(points, {SCANNET20.name: indices}, None, None, torch.arange(len(points)))
