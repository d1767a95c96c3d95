"""Posed RGB-D photographs as a scene of language-Gaussians: no reconstruction, no downloaded weights."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from typing_extensions import override

from datamodules.lerf import LerfDataModule
from datamodules.readers.colmap import write_colmap_model
from datamodules.readers.gaussians import write_gaussian_ply
from datamodules.readers.language_features import write_language_features
from datamodules.readers.photos import read_photo
from datamodules.readers.rgbd import RgbdFrame, read_depth, read_rgbd_frames
from lightning_modules.functional.camera_paths import CameraPathSettings
from lightning_modules.functional.cameras import Camera, back_project, resize_camera
from lightning_modules.functional.language_features.graph_segmentation import GraphMasks
from lightning_modules.functional.language_features.mask_sources import MaskSource
from lightning_modules.functional.language_features.mask_tiles import mask_map, mask_tiles
from lightning_modules.functional.language_features.tile_features import encode_tiles, tile_format
from lightning_modules.functional.open_clip_loading import image_tower, random_open_clip
from lightning_modules.functional.splatting.gaussian_initialisation import gaussians_of_points

SETTINGS_FILE = "rgbd_scene.json"


class RgbdDataModule(LerfDataModule):
    """A few posed RGB-D frames, made into a scene once: back-projected Gaussians, masks, features; one frame held out.

    Masks come from graph-based segmentation and features from a small random image tower of OpenCLIP's class, so there
    are no prompts: the held-out photograph, with its own masks and features, is what ``test`` compares with.

    Args:
        source: Folder with ``color``, ``depth``, ``trajectory.log`` and ``camera_primesense.json``.
        root: Folder to write the scene to, or which holds it already.
        held_out: Stem of the frame to keep out of the Gaussians and out of training; by default the last.
        image_size: Width and height of the scene's photographs, of the same aspect as the source's.
        levels: Granularities to train on, some of 1 (small), 2 (medium), 3 (large).
        num_workers: As in :class:`LerfDataModule`.
        seed: Of the image tower's weights and the order of training views.
        views: As in :class:`LerfDataModule`.
        path: As in :class:`LerfDataModule`.
    """

    def __init__(
        self,
        source: str | Path = "../shared/data/rgbd",
        root: str | Path = "data/rgbd",
        held_out: str | None = None,
        image_size: tuple[int, int] = (320, 240),
        levels: Sequence[int] = (1, 2, 3),
        num_workers: int = 0,
        seed: int = 0,
        views: list[str | int] | None = None,
        path: CameraPathSettings | None = None,
    ) -> None:
        super().__init__(root, levels=levels, num_workers=num_workers, seed=seed, views=views, path=path)
        if 0 in levels:
            raise ValueError(f"levels is {list(levels)}; allowed: some of 1 (small), 2 (medium), 3 (large).")
        self.source = Path(source)
        self.image_size = (image_size[0], image_size[1])
        self._held_out_stem = held_out

    @override
    def prepare_data(self) -> None:
        """Writes the scene unless ``root`` holds it.

        Raises:
            FileNotFoundError: If the frames are absent.
            ValueError: If they are damaged, or ``root`` holds something else.
        """
        settings: dict[str, object] = {
            "source": str(self.source.resolve()),
            "held_out": self._held_out_stem,
            "image_size": list(self.image_size),
            "seed": self.seed,
        }
        if self._is_written(settings):
            return
        frames = read_rgbd_frames(self.source)
        held_out = self._held_out_stem or frames[-1].stem
        if held_out not in [frame.stem for frame in frames] or len(frames) < 2:
            raise ValueError(
                f"held_out is {held_out!r}; allowed: one of {', '.join(frame.stem for frame in frames)} of "
                f"{self.source}, beside at least one other frame."
            )
        temporary = self.root.with_name(f".{self.root.name}.{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            tower = image_tower(random_open_clip(self.seed))
            write_rgbd_scene(temporary, frames, held_out, self.image_size, GraphMasks(), tower)
            (temporary / SETTINGS_FILE).write_text(json.dumps({"settings": settings, "held_out": held_out}))
            os.replace(temporary, self.root)  # an empty folder may stand there
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _is_written(self, settings: dict[str, object]) -> bool:
        if not self.root.exists() or (self.root.is_dir() and not any(self.root.iterdir())):
            self.root.parent.mkdir(parents=True, exist_ok=True)
            return False
        file = self.root / SETTINGS_FILE
        found = json.loads(file.read_text())["settings"] if file.is_file() else None
        if found != settings:
            raise ValueError(
                f"{self.root} holds {'something else' if found is None else f'a scene with {found}'}, but the settings "
                f"ask for {settings}. Give another root, or delete that folder to have the scene written anew."
            )
        return True

    @override
    def setup(self, stage: str | None = None) -> None:
        """Reads the written scene at the first call."""
        self.held_out = [json.loads((self.root / SETTINGS_FILE).read_text())["held_out"]]
        super().setup(stage)


def write_rgbd_scene(
    folder: Path,
    frames: Sequence[RgbdFrame],
    held_out: str,
    image_size: tuple[int, int],
    masks: MaskSource,
    tower: nn.Module,
) -> None:
    """Writes frames as a scene: photographs, COLMAP model, features of all, Gaussians of all but ``held_out``."""
    tile_size = tile_format(tower).size
    width, height = image_size
    (folder / "images").mkdir(parents=True)
    cameras: dict[str, Camera] = {}
    points, colors, spacings = [], [], []
    for frame in track(frames, "Reading RGB-D frames", transient=True):
        if frame.camera.width * height != frame.camera.height * width:
            raise ValueError(
                f"image_size is {width} x {height}, but {frame.photo} is {frame.camera.width} x {frame.camera.height}; "
                "allowed: the same aspect."
            )
        camera = resize_camera(frame.camera, width, height)
        photo = read_photo(frame.photo, width, height)
        cameras[f"{frame.stem}.png"] = camera
        Image.fromarray(photo.numpy()).save(folder / "images" / f"{frame.stem}.png")
        levels = [level.masks for level in masks(photo)[1:]]
        features = [encode_tiles(tower, mask_tiles(photo, level, tile_size)).numpy() for level in levels]
        maps = [mask_map(level).numpy() for level in levels]
        nothing = np.full_like(maps[0], -1)  # the default granularity, which is not trained on
        write_language_features(
            folder / "language_features", frame.stem, [features[0][:0], *features], np.stack([nothing, *maps])
        )
        if frame.stem == held_out:
            continue
        depth = _resized_depth(read_depth(frame.depth), frame, width, height)
        positions, valid = back_project(depth, camera)
        points.append(positions[valid])
        colors.append(photo[valid])
        spacings.append(depth[valid] / camera.intrinsics[0, 0])
    scene = gaussians_of_points(torch.cat(points), torch.cat(colors), torch.cat(spacings))
    rank_zero_info(f"{sum(map(len, points))} pixels with depth became {scene.num_gaussians} Gaussians.")
    write_gaussian_ply(folder / "gaussians.ply", scene)
    every = max(sum(map(len, points)) // 2000, 1)
    write_colmap_model(folder / "sparse" / "0", cameras, torch.cat(points)[::every], torch.cat(colors)[::every])


def _resized_depth(
    depth: Float[Tensor, "rows columns"], frame: RgbdFrame, width: int, height: int
) -> Float[Tensor, "height width"]:
    """Takes the nearest pixel's depth: means would put points between a thing and what is behind it."""
    if depth.shape != (frame.camera.height, frame.camera.width):
        raise ValueError(
            f"{frame.depth} is {depth.shape[1]} x {depth.shape[0]}, but its camera is {frame.camera.width} x "
            f"{frame.camera.height}; allowed: the same size. Register the depth to the colour image."
        )
    rows = ((torch.arange(height) + 0.5) * depth.shape[0] / height).long()
    columns = ((torch.arange(width) + 0.5) * depth.shape[1] / width).long()
    return depth[rows][:, columns]
