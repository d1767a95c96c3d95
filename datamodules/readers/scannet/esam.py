"""ESAM's ``scannet200-mv`` and ``scannet200-sv``: frames with points, superpoints and labels already made.

``2D/<scene>/{color,depth,pose}`` (colour as large as depth, every 20th frame), ``3D/<scene>`` (the scans), and for the
kept frames ``points`` (float32 [N, 6], r g b in 0 to 255), ``super_points``, ``semantic_mask`` (column ``id`` of the
label table, 0 = none) and ``instance_mask`` (from 1 on, 0 = none), int64 [N]: ``<folder>/<scene>/<frame>.bin`` in
``-mv``, ``<folder>/<scene>_<frame>.bin`` in ``-sv``. ``-mv`` is in the unaligned world; in ``-sv`` each frame's points
are centred, with ``pose_centered/<scene>/<frame>.npy``, and are moved back here.

Classes are stored by id, so ESAM's own order of class names (floor before chair) does not matter. Points are lifted
with the fixed intrinsics: with a scene's own ones, they project beside their pixels (by 1 % of the way to the centre).
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from datamodules.readers.safe_pickles import load_plain_pickle
from datamodules.readers.scannet.class_tables import SCANNET20, SCANNET200
from datamodules.readers.scannet.frame_folders import FrameFolder, read_pose
from datamodules.readers.scannet.frame_source import AnnotatedPoints
from datamodules.readers.scannet.raw_scans import ScanFolders


class EsamMultiView(ScanFolders):
    """``scannet200-mv``; see this module."""

    layout: ClassVar[str] = "esam_mv"
    keeps_points: ClassVar[bool] = True
    infos: ClassVar[str] = "*_mv*infos*.pkl"

    def __init__(self, root: Path, intrinsics: str, frame_stride: int) -> None:
        super().__init__(root, intrinsics, frame_stride)
        self._poses: dict[str, dict[int, np.ndarray]] | None = None

    @override
    def scenes(self) -> tuple[str, ...]:
        return tuple(sorted(folder.name for folder in (self.root / "2D").iterdir() if folder.is_dir()))

    @override
    def frame_folder(self, scene: str) -> Path:
        return self.root / "2D" / scene

    @override
    def scan_folder(self, scene: str) -> Path:
        return self.root / "3D" / scene

    def stored_file(self, folder: str, scene: str, frame_id: int) -> Path:
        """Returns the file of one kind that belongs to a frame."""
        return self.root / folder / scene / f"{frame_id}.bin"

    @override
    def has_stored_points(self, scene: str, frame_id: int) -> bool:
        return self.stored_file("points", scene, frame_id).is_file()

    @override
    def stored_points(self, scene: str, frame_id: int) -> AnnotatedPoints | None:
        file = self.stored_file("points", scene, frame_id)
        if not file.is_file():
            return None
        flat = _read_numbers(file, "<f4")
        if len(flat) % 6 or not len(flat) or not np.isfinite(flat).all():
            raise ValueError(f"{file} holds {len(flat)} numbers; allowed: six finite ones for each point.")
        points = torch.from_numpy(flat.reshape(-1, 6).copy())
        points[:, 3:] /= 255
        labels = {}
        ids = self._column("semantic_mask", scene, frame_id, len(points))
        if ids is not None:
            labels[SCANNET200.name] = SCANNET200.indices_of_ids(ids)
            if self.label_table is not None:
                labels[SCANNET20.name] = SCANNET20.indices_of_ids(self.label_table.nyu40_of_ids(ids))
        instances = self._column("instance_mask", scene, frame_id, len(points))
        return AnnotatedPoints(
            points,
            labels,
            None if instances is None else instances - 1,
            self._column("super_points", scene, frame_id, len(points)),
            None,
        )

    @override
    def label_tables(self, scene: str) -> tuple[str, ...]:
        if not self._has_labels(scene):
            return super().label_tables(scene)
        return (SCANNET20.name, SCANNET200.name) if self.label_table is not None else (SCANNET200.name,)

    def _has_labels(self, scene: str) -> bool:
        return (self.root / "semantic_mask" / scene).is_dir()

    def _column(self, folder: str, scene: str, frame_id: int, num_points: int) -> Int[Tensor, " points"] | None:
        file = self.stored_file(folder, scene, frame_id)
        if not file.is_file():
            return None
        column = _read_numbers(file, "<i8")
        if len(column) != num_points:
            raise ValueError(f"{file} holds {len(column)} numbers for {num_points} points. Write it again.")
        return torch.from_numpy(column.copy())

    @override
    def _open(self, scene: str) -> FrameFolder:
        folder = self.frame_folder(scene)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; {self.root} has no frames of {scene}.")
        poses = None if (folder / "pose").is_dir() else self._listed_poses(scene)
        return FrameFolder(scene, folder, self.frame_stride, self.calibration(scene), poses=poses)

    def _listed_poses(self, scene: str) -> dict[int, np.ndarray]:
        """Returns a scene's poses from ``*_infos_*.pkl``, which has them where the folder ``pose`` was not copied."""
        if self._poses is None:
            self._poses = {}
            for file in sorted(self.root.glob(self.infos)):
                for entry in _entries(file):
                    listed = self._poses.setdefault(Path(entry["img_paths"][0]).parts[-3], {})
                    for path, pose in zip(entry["img_paths"], entry["poses"], strict=True):
                        listed[int(Path(path).stem)] = np.asarray(pose, np.float64)
        return self._poses.get(scene, {})


class EsamSingleView(EsamMultiView):
    """``scannet200-sv``; see this module."""

    layout: ClassVar[str] = "esam_sv"

    def __init__(self, root: Path, intrinsics: str, frame_stride: int) -> None:
        super().__init__(root, intrinsics, frame_stride)
        self._labelled: frozenset[str] | None = None

    @override
    def stored_file(self, folder: str, scene: str, frame_id: int) -> Path:
        return self.root / folder / f"{scene}_{frame_id}.bin"

    @override
    def stored_points(self, scene: str, frame_id: int) -> AnnotatedPoints | None:
        stored = super().stored_points(scene, frame_id)
        if stored is None:
            return None
        file = self.root / "pose_centered" / scene / f"{frame_id}.npy"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; without it, the centred points of {scene} have no place.")
        folder = self.opened(scene)
        centred, camera_from_world = read_pose(file), folder.poses[frame_id].double()
        if not np.isfinite(centred).all():
            raise ValueError(f"{file} cannot be read as a pose. Write it again.")
        position = -camera_from_world[:3, :3].T @ camera_from_world[:3, 3]
        moved = stored.points.clone()
        moved[:, :3] += (position - torch.from_numpy(centred[:3, 3])).float()
        return stored._replace(points=moved)

    @override
    def split(self, name: str) -> tuple[str, ...] | None:
        stated = super().split(name)
        file = self.root / "meta_data" / f"scannetv2_sv_{name}.txt"  # lists frames
        if stated is not None or not file.is_file():
            return stated
        return tuple(sorted({line.strip().rsplit("_", 1)[0] for line in file.read_text().splitlines() if line.strip()}))

    @override
    def _has_labels(self, scene: str) -> bool:
        if self._labelled is None:  # one look at the folder: it holds the frames of all scenes
            files = (self.root / "semantic_mask").glob("*_*.bin")
            self._labelled = frozenset(file.stem.rsplit("_", 1)[0] for file in files)
        return scene in self._labelled


def _read_numbers(path: Path, dtype: str) -> np.ndarray:
    size = path.stat().st_size
    if size % np.dtype(dtype).itemsize:
        raise ValueError(
            f"{path} has {size} bytes; allowed: a multiple of {np.dtype(dtype).itemsize}. It is truncated."
        )
    return np.fromfile(path, dtype)


def _entries(path: Path) -> list[dict]:
    content = load_plain_pickle(path)
    try:
        entries = content["data_list"]
        return [entry for entry in entries if len(entry["img_paths"]) == len(entry["poses"]) > 0]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no list of ESAM ({error!r}); needed: data_list with img_paths and poses."
        ) from error
