"""Writes a whole synthetic ScanNet: rooms, frames, meshes, labels, texts, and the stand-in teacher's features."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track

from datamodules.readers.feature_records import RecordWriter, StoreHeader
from datamodules.readers.feature_store import write_feature_store
from datamodules.readers.text_embeddings import write_text_embeddings
from datamodules.synthetic.mini_scannet_files import (
    world_from_camera,
    write_cameras,
    write_frame,
    write_label_table,
    write_mesh,
    write_split,
)
from datamodules.synthetic.mini_scannet_photos import camera_at, scan, surface_of, take_frame
from datamodules.synthetic.mini_scannet_rooms import KINDS, camera_places, furnish
from datamodules.synthetic.mini_scannet_teacher import (
    GRID,
    NUM_CHANNELS,
    NUM_TEXT,
    Teacher,
    TextSpace,
    text_space,
)
from datamodules.synthetic.world_folder import write_folder_once

WORLD_VERSION = 1  # of the worlds that the same settings give; raise it with every change that alters a file
SETTINGS_FILE = "mini_scannet.json"
STORE_FOLDER = "stand_in_features"
TEXT_FILE = "text_embeddings.npz"
FRAME_STEP = 20  # frames are numbered as every 20th of a recording, which is what is usually exported
# A quarter of ScanNet's cameras: 1296 x 968 and 640 x 480, the centres of scene0000_00 with pixel (0, 0) at (0.5, 0.5).
COLOUR_SIZE, COLOUR_FOCAL, COLOUR_CENTRE = (324, 242), 292.547, (162.0625, 121.0625)
DEPTH_SIZE, DEPTH_FOCAL, DEPTH_CENTRE = (160, 120), 142.906, (80.0, 60.0)
SCENES_PER_LOST_POSE = 4
IMAGE_SIZE = (224, 224)  # what the stand-in claims to have seen

_TEXTS, _ROOM, _PHOTOS, _TEACHER = range(4)  # independent random streams


@dataclass(frozen=True)
class MiniScanNetSettings:
    """Everything that decides the files of a world; see :class:`datamodules.synthetic.mini_scannet`."""

    num_train: int
    num_val: int
    num_test: int
    frames_in_scene: int
    seed: int

    def __post_init__(self) -> None:
        for name, lowest in (("num_train", 1), ("num_val", 1), ("num_test", 1), ("frames_in_scene", 2), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {lowest} or more.")


def write_world_once(root: Path, settings: MiniScanNetSettings) -> None:
    """Writes a world to ``root`` unless it is there.

    Raises:
        ValueError: If ``root`` holds a world of other settings, or something else.
    """
    stated = {"version": WORLD_VERSION, **asdict(settings)}
    write_folder_once(root, SETTINGS_FILE, stated, lambda folder: write_world(folder, settings))


def write_world(folder: Path, settings: MiniScanNetSettings) -> None:
    """Writes all scenes, of which no two share a room or a piece of furniture."""
    folder.mkdir(parents=True)
    space = text_space(np.random.default_rng([settings.seed, _TEXTS]))
    texts = torch.from_numpy(np.stack(list(space.texts.values())))
    write_text_embeddings(folder / TEXT_FILE, list(space.texts), texts)
    write_label_table(folder)
    header = StoreHeader(
        model="stand-in",
        weight_hash="",
        dense_mode="stand-in",
        image_size=IMAGE_SIZE,
        token_shape=(NUM_CHANNELS, GRID, GRID),
        text_channels=NUM_TEXT,
        note="Drawn from the labels of synthetic rooms with the noise and blur of CLIP's grid. No CLIP, no weights.",
    )
    scenes: list[tuple[str, str]] = []
    for split, count, first_kind in (
        ("train", settings.num_train, 0),
        ("val", settings.num_val, 1),
        ("test", settings.num_test, 0),
    ):
        names = [f"scene{len(scenes) + i:04d}_00" for i in range(count)]
        write_split(folder, split, names)
        scenes += [(name, list(KINDS)[(i + first_kind) % len(KINDS)]) for i, name in enumerate(names)]
    with write_feature_store(folder / STORE_FOLDER, header, torch.from_numpy(space.projection)) as store:
        for index, (scene, kind) in enumerate(track(scenes, "Building rooms", transient=True)):
            _write_scene(folder / "scans" / scene, kind, index, settings, space, store)
    rank_zero_info(
        f"{len(scenes)} synthetic rooms, {settings.frames_in_scene} frames of each. Their features are stand-ins, "
        "drawn from labels with the noise and blur of CLIP's grid: no weights are needed, and no figure made with them "
        "says anything of CLIP."
    )


def _write_scene(
    scan_folder: Path, kind: str, index: int, settings: MiniScanNetSettings, space: TextSpace, store: RecordWriter
) -> None:
    """Writes one scan; in some of them one frame has lost its pose, as in ScanNet's."""
    rng = np.random.default_rng([settings.seed, _ROOM, index])
    room = furnish(kind, rng)
    surface = surface_of(room)
    has_lost = index % SCENES_PER_LOST_POSE == 0
    places = camera_places(room, settings.frames_in_scene + has_lost, rng)
    lost = int(rng.integers(len(places))) if has_lost else -1
    photos, teacher_rng = (np.random.default_rng([settings.seed, stream, index]) for stream in (_PHOTOS, _TEACHER))
    teacher = Teacher(space, [thing.category for thing in room.things], teacher_rng)
    cameras, depths = [], []
    for number, place in enumerate(places):
        colour = camera_at(place, COLOUR_SIZE, COLOUR_FOCAL, COLOUR_CENTRE)
        camera = camera_at(place, DEPTH_SIZE, DEPTH_FOCAL, DEPTH_CENTRE)
        frame = take_frame(surface, colour, camera, photos)
        pose = world_from_camera(camera) if number != lost else np.full((4, 4), -np.inf)
        write_frame(scan_folder, number * FRAME_STEP, frame, pose)
        if number != lost:
            cameras.append(camera)
            depths.append(frame.exact_depth)
            seen = teacher.look(frame.thing_ids, frame.image)
            tokens, whole = torch.from_numpy(seen.tokens), torch.from_numpy(seen.clip_global)
            store.write(scan_folder.name, number * FRAME_STEP, tokens, whole)
    write_cameras(scan_folder, colour, camera, len(places))
    write_mesh(scan_folder, scan(surface, cameras, depths, photos), room)
