"""ScanNet as it is downloaded and exported: a folder for each scan with its frames, its mesh and its annotations.

``<root>/<scene>`` or ``<root>/scans/<scene>`` (and ``scans_test``). Frames are folders of files, or the ``.sens`` file
itself where nothing was exported.
"""

import abc
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from datamodules.readers.scannet.annotations import annotated_tables, has_annotated_mesh, read_annotated_mesh
from datamodules.readers.scannet.class_tables import LabelTable, find_label_table, read_label_table
from datamodules.readers.scannet.frame_folders import Calibration, FrameFolder, read_calibration
from datamodules.readers.scannet.frame_source import AnnotatedPoints, Frame, FrameSource, SceneReport
from datamodules.readers.scannet.sens import SensFrames

MOST_OPENED = 64  # scenes whose lists of frames are kept: of all of ScanNet they would fill hundreds of MB


class ScanFolders(FrameSource):
    """What layouts with a folder of frames and a folder of annotations for each scene share.

    Args:
        root: The data set's folder.
        intrinsics: ``per_scene`` for each scene's own, or ``fixed`` for the one matrix most code uses.
        frame_stride: Frames whose number it divides are kept.
    """

    def __init__(self, root: Path, intrinsics: str, frame_stride: int) -> None:
        self.root, self.intrinsics, self.frame_stride = root, intrinsics, frame_stride
        self._opened: dict[str, FrameFolder | SensFrames] = {}
        table = find_label_table(root, root.parent)
        self.label_table: LabelTable | None = None if table is None else read_label_table(table)

    @abc.abstractmethod
    def frame_folder(self, scene: str) -> Path:
        """Returns the folder with the frames of a scene."""

    @abc.abstractmethod
    def scan_folder(self, scene: str) -> Path:
        """Returns the folder with the mesh, the annotations and ``<scene>.txt``."""

    @override
    def frames(self, scene: str) -> tuple[int, ...]:
        return self.opened(scene).frames

    @override
    def load(self, scene: str, frame_id: int, *, with_image: bool = True, with_depth: bool = True) -> Frame:
        return self.opened(scene).load(frame_id, with_image=with_image, with_depth=with_depth)

    @override
    def mesh(self, scene: str) -> AnnotatedPoints | None:
        return read_annotated_mesh(self.scan_folder(scene), self.label_table)

    @override
    def has_mesh(self, scene: str) -> bool:
        return has_annotated_mesh(self.scan_folder(scene))

    @override
    def split(self, name: str) -> tuple[str, ...] | None:
        return read_split(name, self.root, self.root.parent)

    @override
    def label_tables(self, scene: str) -> tuple[str, ...]:
        return annotated_tables(self.scan_folder(scene), self.label_table)

    @override
    def fingerprint(self, scene: str) -> str:
        frames, scan = self.frame_folder(scene), self.scan_folder(scene)
        parts = ("", "color", "depth", "pose", "intrinsic", f"{scene}.sens")
        places = [*(frames / part for part in parts), scan]
        places += [] if self.label_table is None else [self.label_table.path]
        times = (str(place.stat().st_mtime_ns) if place.exists() else "-" for place in places)
        return " ".join([*times, *self.label_tables(scene)])  # labels may lie in folders that all scenes share

    @override
    def report(self, scene: str) -> SceneReport:
        try:
            frames = self.opened(scene)
            for frame_id in frames.frames[:1]:
                frames.load(frame_id, with_image=False, with_depth=False)  # checks the intrinsics against the sizes
        except (ValueError, FileNotFoundError) as error:
            return SceneReport(scene, 0, (), (), (), (), (), "", (), str(error))
        return SceneReport(
            scene,
            frames.num_photos,
            frames.frames,
            frames.without_depth,
            frames.without_pose,
            frames.bad_poses,
            (),
            "fixed" if frames.calibration is None else frames.calibration.source,
            self.label_tables(scene),
            None if frames.frames else "no frame has photo, depth and a usable pose",
        )

    def opened(self, scene: str) -> "FrameFolder | SensFrames":
        """Returns the frames of a scene; its list of frames and poses is read once."""
        if scene not in self._opened:
            while len(self._opened) >= MOST_OPENED:
                self._opened.pop(next(iter(self._opened)), None)
            self._opened[scene] = self._open(scene)
        return self._opened[scene]

    def calibration(self, scene: str) -> Calibration | None:
        """Returns a scene's own intrinsics, or None for the fixed ones.

        Raises:
            ValueError: If it has none but they are asked for.
        """
        if self.intrinsics == "fixed":
            return None
        folder, metadata = self.frame_folder(scene), self.scan_folder(scene) / f"{scene}.txt"
        found = read_calibration(folder, metadata)
        if found is None:
            raise ValueError(
                f"{folder} has no intrinsics: neither intrinsic/intrinsic_color.txt and intrinsic_depth.txt, nor "
                f"intrinsic.txt, nor fx_color and fx_depth in {metadata}. Copy one there, or set "
                "data.init_args.intrinsics=fixed (577.87 at 640 x 480, what most code uses)."
            )
        return found

    def _open(self, scene: str) -> "FrameFolder | SensFrames":
        folder = self.frame_folder(scene)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; {self.root} has no frames of {scene}.")
        sens = folder / f"{scene}.sens"
        if not (folder / "color").is_dir() and sens.is_file():
            return SensFrames(scene, sens, self.frame_stride, use_fixed_intrinsics=self.intrinsics == "fixed")
        if not (folder / "color").is_dir():
            raise FileNotFoundError(
                f"{folder} has no frames: neither {sens.name} nor color, depth and pose. Download the first, or export "
                "it there."
            )
        return FrameFolder(scene, folder, self.frame_stride, self.calibration(scene))


class RawScans(ScanFolders):
    """Downloaded scans, exported or not; see this module."""

    layout: ClassVar[str] = "raw"

    @override
    def scenes(self) -> tuple[str, ...]:
        return tuple(sorted(self._folders()))

    @override
    def frame_folder(self, scene: str) -> Path:
        return self._folders().get(scene, self.root / scene)

    @override
    def scan_folder(self, scene: str) -> Path:
        return self.frame_folder(scene)

    def _folders(self) -> dict[str, Path]:
        if not hasattr(self, "_found"):
            places = [place for place in (self.root, self.root / "scans", self.root / "scans_test") if place.is_dir()]
            self._found = {folder.name: folder for place in places for folder in scan_folders(place)}
        return self._found


def scan_folders(place: Path) -> list[Path]:
    """Returns the folders with frames, or a ``.sens`` file, or a mesh, in a folder."""
    return [
        folder
        for folder in sorted(place.iterdir())
        if folder.is_dir()
        and (
            (folder / "color").is_dir()
            or (folder / f"{folder.name}.sens").is_file()
            or (folder / f"{folder.name}_vh_clean_2.ply").is_file()
        )
    ]


def read_split(name: str, *folders: Path) -> tuple[str, ...] | None:
    """Returns the scenes of ``scannetv2_<name>.txt`` in one of some folders or their ``meta_data``, or None."""
    for folder in folders:
        for place in (folder, folder / "meta_data"):
            file = place / f"scannetv2_{name}.txt"
            if file.is_file():
                return read_scene_list(file)
    return None


def read_scene_list(path: Path) -> tuple[str, ...]:
    """Reads names of scenes, one in a line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it names none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it names scenes, one in a line.")
    scenes = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not scenes:
        raise ValueError(f"{path} names no scene; allowed: names such as scene0000_00, one in a line.")
    return scenes
