"""One way in to ScanNet, whatever the layout."""

from pathlib import Path

from datamodules.readers.scannet.esam import EsamMultiView, EsamSingleView
from datamodules.readers.scannet.frame_source import FrameSource
from datamodules.readers.scannet.openscene import OpenSceneFolders
from datamodules.readers.scannet.pointcept import PointceptFolders
from datamodules.readers.scannet.raw_scans import RawScans


def open_scannet(
    root: str | Path,
    layout: str = "auto",
    *,
    intrinsics: str = "per_scene",
    frame_stride: int = 20,
    frames_root: str | Path | None = None,
) -> FrameSource:
    """Opens a folder of ScanNet scenes.

    Args:
        root: The data set's folder.
        layout: What it is laid out like: ``raw``, ``esam_mv``, ``esam_sv``, ``openscene`` or ``pointcept``; ``auto``
            looks.
        intrinsics: ``per_scene`` for each scene's own, or ``fixed`` for the one matrix most code uses.
        frame_stride: Frames whose number it divides are kept.
        frames_root: Raw scans that have the frames, for Pointcept's layout.

    Raises:
        FileNotFoundError: If there is no such folder, or no scene in ``root``.
        ValueError: If a setting is not allowed, or the layout cannot be told.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder. Give ScanNet's folder as data.init_args.root.")
    if intrinsics not in ("per_scene", "fixed"):
        raise ValueError(f"intrinsics is {intrinsics!r}; allowed: per_scene, fixed.")
    if frame_stride < 1:
        raise ValueError(f"frame_stride is {frame_stride}; allowed: 1 or more.")
    if layout == "auto":
        layout = told_layout(root)
    if frames_root is not None and layout != "pointcept":
        raise ValueError(f"frames_root is {frames_root}, but the layout {layout} has its own frames. Leave it out.")
    if frames_root is not None and not Path(frames_root).is_dir():
        raise FileNotFoundError(f"{frames_root} is no folder. Give raw scans as data.init_args.frames_root.")
    source: FrameSource
    if layout == "pointcept":
        source = PointceptFolders(root, intrinsics, frame_stride, None if frames_root is None else Path(frames_root))
    elif layout in OPENERS:
        source = OPENERS[layout](root, intrinsics, frame_stride)
    else:
        raise ValueError(f"layout is {layout!r}; allowed: auto, pointcept, {', '.join(OPENERS)}.")
    for part in NEEDED_FOLDERS.get(layout, ()):
        if not (root / part).is_dir():
            raise FileNotFoundError(f"{root / part} is no folder; the layout {layout} needs it.")
    if not source.scenes():
        raise FileNotFoundError(f"{root} holds no scene in the layout {layout}. {KNOWN_LAYOUTS}")
    return source


def told_layout(root: Path) -> str:
    """Tells the layout of a folder by what lies in it.

    Raises:
        ValueError: If it is none of those known.
    """
    if (root / "2D").is_dir():
        is_single_view = (root / "pose_centered").is_dir() or next((root / "points").glob("*.bin"), None) is not None
        return "esam_sv" if is_single_view else "esam_mv"
    if (root / "scannet_2d").is_dir():
        return "openscene"
    if any(next((root / split).glob("*/coord.npy"), None) is not None for split in ("train", "val", "test")):
        return "pointcept"
    if RawScans(root, "fixed", 1).scenes():
        return "raw"
    raise ValueError(f"{root} is in no known layout. {KNOWN_LAYOUTS}")


OPENERS = {source.layout: source for source in (RawScans, EsamMultiView, EsamSingleView, OpenSceneFolders)}
NEEDED_FOLDERS = {"esam_mv": ("2D",), "esam_sv": ("2D",), "openscene": ("scannet_2d",)}
KNOWN_LAYOUTS = (
    "Known are raw scans (<scene>/color or <scene>/<scene>.sens, also below scans), ESAM's scannet200-mv and -sv (2D, "
    "3D, points), OpenScene's (scannet_2d, scannet_3d) and Pointcept's (train/<scene>/coord.npy). Give such a folder "
    "as data.init_args.root, or say which with data.init_args.layout."
)
