"""A synthetic scene in the layout of a real one: a table with everyday objects in a room, photographed from around."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from typing_extensions import override

from datamodules.lerf import LerfDataModule
from datamodules.readers.colmap import write_colmap_model
from datamodules.readers.gaussians import write_gaussian_ply
from datamodules.readers.language_features import write_language_features
from datamodules.readers.lerf_labels import write_lerf_label
from datamodules.readers.text_embeddings import write_text_embeddings
from datamodules.synthetic.tabletop_difficulty import DIFFICULTIES
from datamodules.synthetic.tabletop_features import embed, segment_photo
from datamodules.synthetic.tabletop_gaussians import Floaters, make_gaussians, sample_surfaces
from datamodules.synthetic.tabletop_labels import label_photo
from datamodules.synthetic.tabletop_photos import (
    RayCaster,
    bake_light,
    camera_on_path,
    surface_colors,
    take_photo,
    to_srgb,
)
from datamodules.synthetic.tabletop_rooms import World, furnish
from datamodules.synthetic.world_folder import write_folder_once
from lightning_modules.functional.camera_paths import CameraPathSettings
from lightning_modules.functional.cameras import Camera

WORLD_VERSION = 1  # of the worlds that the same settings give; raise it with every change that alters a file
SETTINGS_FILE = "world.json"

# Positions on the camera path in 24ths of the circle: between the training views whether there are 24, 12 or 8.
VALIDATION_SLOTS = (4.45, 16.45)
TEST_SLOTS = (1.45, 7.45, 13.45, 19.45)

# Independent random streams, so that one setting does not change what another one decides.
_ARRANGEMENT, _EMBEDDINGS, _SURFACES, _LIGHT, _GAUSSIANS, _PATH, _MASKS = range(7)


@dataclass(frozen=True)
class WorldSettings:
    """Everything that decides the files of a world; see :class:`TabletopDataModule`."""

    seed: int
    difficulty: str
    floaters: Floaters
    num_train_views: int
    image_size: tuple[int, int]
    num_gaussians: int
    objects_per_group: int

    def __post_init__(self) -> None:
        allowed = {
            "seed": (self.seed >= 0, "0 or more"),
            "difficulty": (self.difficulty in DIFFICULTIES, ", ".join(DIFFICULTIES)),
            "floaters": (self.floaters in get_args(Floaters), ", ".join(get_args(Floaters))),
            "num_train_views": (self.num_train_views >= 2, "2 or more"),
            "image_size": (min(self.image_size) >= 32, "a width and a height of 32 pixels or more"),
            "num_gaussians": (self.num_gaussians >= 500, "500 or more"),
            "objects_per_group": (1 <= self.objects_per_group <= 4, "1 to 4"),
        }
        for name, (is_allowed, values) in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {values}.")

    def as_json(self) -> dict[str, Any]:
        """Returns the content of the settings file."""
        return {"version": WORLD_VERSION, **asdict(self), "image_size": list(self.image_size)}


class TabletopDataModule(LerfDataModule):
    """A room with a table full of objects, written once in the layout of a real scene and read back as one.

    The photographs are ray-cast exactly. The Gaussians, masks and features have the faults of real ones, by
    ``difficulty``; what is true is known, so the geometry's own ceiling can be reported. Worlds of the same seed differ
    only in what their settings say: the same table with fewer views, other floaters, or more noise.

    Args:
        root: Folder to write the world to, or which holds it already.
        seed: Which objects stand where, the embeddings, the camera path, all noise, and the order of training views.
        difficulty: ``easy``, ``normal`` or ``hard``: noise of masks and features, and how low the cameras are.
        floaters: Population of the 4 % of Gaussians that belong to no surface: ``isolated`` (30 % of them opaque),
            ``clumped`` in twelves, ``faint`` (none above an opacity of 0.35) or ``none``.
        num_train_views: Views with features, evenly spaced around the table; 2 more are for validation and 4 for test.
        image_size: Width and height, pixels.
        num_gaussians: About how many Gaussians; surfaces are covered finer or coarser accordingly.
        objects_per_group: Objects on the table of each of the four groups tableware, fruit, toys and home decor.
        levels: As in :class:`LerfDataModule`.
        train_views: As in :class:`LerfDataModule`.
        num_workers: As in :class:`LerfDataModule`.
        views: As in :class:`LerfDataModule`.
        path: As in :class:`LerfDataModule`.
        langsplat_checkpoints: As in :class:`LerfDataModule`.
        features: As in :class:`LerfDataModule`; ``language_features`` holds the world's own masks.
        gaussians: As in :class:`LerfDataModule`; by default the world's own.
    """

    def __init__(
        self,
        root: str | Path,
        seed: int = 0,
        difficulty: Literal["easy", "normal", "hard"] = "normal",
        floaters: Floaters = "isolated",
        num_train_views: int = 24,
        image_size: tuple[int, int] = (320, 240),
        num_gaussians: int = 48_000,
        objects_per_group: int = 3,
        levels: Sequence[int] = (1, 2, 3),
        train_views: int | list[str] | None = None,
        num_workers: int = 0,
        views: list[str | int] | None = None,
        path: CameraPathSettings | None = None,
        langsplat_checkpoints: list[str] | None = None,
        features: str = "language_features",
        gaussians: str | Path | None = None,
    ) -> None:
        self.world_settings = WorldSettings(
            seed,
            difficulty,
            floaters,
            num_train_views,
            (image_size[0], image_size[1]),
            num_gaussians,
            objects_per_group,
        )
        names = view_names(num_train_views)
        super().__init__(
            root,
            levels=levels,
            train_views=train_views,
            val_names=[names[slot / 24] for slot in VALIDATION_SLOTS],
            num_workers=num_workers,
            seed=seed,
            views=views,
            path=path,
            langsplat_checkpoints=langsplat_checkpoints,
            features=features,
            gaussians=gaussians,
        )

    @override
    def prepare_data(self) -> None:
        """Writes the world unless ``root`` holds it; on one process only, as Lightning arranges.

        Raises:
            ValueError: If ``root`` holds a world of other settings, or something else.
        """
        write_world_once(self.root, self.world_settings)


def write_world_once(root: Path, settings: WorldSettings) -> None:
    """Writes a world to ``root`` unless it is there.

    Raises:
        ValueError: If ``root`` holds a world of other settings, or something else.
    """
    write_folder_once(root, SETTINGS_FILE, settings.as_json(), lambda folder: write_world(folder, settings))


def view_names(num_train_views: int) -> dict[float, str]:
    """Returns the stem of each view by its position on the camera path, 0 to 1: frame_00001, ... in that order."""
    positions = [view / num_train_views for view in range(num_train_views)]
    positions += [slot / 24 for slot in (*VALIDATION_SLOTS, *TEST_SLOTS)]
    return {position: f"frame_{number:05d}" for number, position in enumerate(sorted(positions), start=1)}


def train_view_names(num_train_views: int) -> list[str]:
    """Returns the stems of the views to train on."""
    names = view_names(num_train_views)
    return [names[view / num_train_views] for view in range(num_train_views)]


def arrangement_of(settings: WorldSettings) -> World:
    """Returns the furnished room of a world."""
    return furnish(np.random.default_rng([settings.seed, _ARRANGEMENT]), settings.objects_per_group)


def write_world(folder: Path, settings: WorldSettings) -> None:
    """Makes a world and writes it as a scene: photos, cameras, Gaussians, features, labels, texts and the truth."""

    def stream(*key: int) -> np.random.Generator:
        return np.random.default_rng([settings.seed, *key])

    difficulty = DIFFICULTIES[settings.difficulty]
    width, height = settings.image_size
    world = arrangement_of(settings)
    embeddings = embed(world, stream(_EMBEDDINGS))
    caster = RayCaster(world)
    samples = sample_surfaces(world, caster, settings.num_gaussians, settings.floaters, stream(_SURFACES))
    light = bake_light(caster, samples.points, samples.normals, stream(_LIGHT))
    colors = to_srgb(surface_colors(world, caster, samples.points, samples.solid_ids, light.irradiances))
    gaussians = make_gaussians(world, caster, samples, colors, settings.floaters, stream(_GAUSSIANS))

    phases = stream(_PATH).uniform(0, 2 * np.pi, 4)
    cameras: dict[str, Camera] = {}
    names = view_names(settings.num_train_views)
    train_positions = {view / settings.num_train_views for view in range(settings.num_train_views)}
    (folder / "images").mkdir(parents=True)
    for position, stem in track(names.items(), "Photographing the tabletop", transient=True):
        camera = camera_on_path(
            position, elevations_deg=difficulty.elevations_deg, width=width, height=height, phases=phases
        )
        photo = take_photo(world, caster, light, camera)
        cameras[f"{stem}.png"] = camera
        Image.fromarray(photo.image).save(folder / "images" / f"{stem}.png")
        if position in train_positions:
            rng = stream(_MASKS, round(1e6 * position))  # by place, so that fewer views change nothing in the others
            masks = segment_photo(photo.part_ids, world, embeddings.concepts, difficulty, rng)
            write_language_features(folder / "language_features", stem, masks.features, masks.maps)
        else:
            label = label_photo(photo.part_ids, world, stem)
            write_lerf_label(folder / "label" / f"{stem}.json", label, image_name=f"{stem}.png")

    sparse = stream(_SURFACES).permutation(len(samples.points))[:3000]
    rgb = np.round(255 * colors[sparse]).astype(np.uint8)
    write_colmap_model(folder / "sparse" / "0", cameras, samples.points[sparse], rgb)
    write_gaussian_ply(folder / "gaussians.ply", gaussians.scene)
    write_text_embeddings(folder / "text_embeddings.npz", embeddings.phrases, torch.from_numpy(embeddings.texts))
    np.savez(
        folder / "ceiling.npz",
        gaussian_part_ids=gaussians.concept_ids.astype(np.int32),
        features=embeddings.concepts,
        is_floater=gaussians.is_floater,
    )
