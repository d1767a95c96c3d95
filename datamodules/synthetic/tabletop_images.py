"""The photographs of the tabletop world, with its cameras and sparse points but without its masks."""

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from typing_extensions import override

from datamodules.batches import PixelTruth
from datamodules.photographs import PhotoFile
from datamodules.posed_images import PosedImagesDataModule
from datamodules.synthetic.tabletop import WorldSettings, arrangement_of, train_view_names, write_world_once
from datamodules.synthetic.tabletop_gaussians import Floaters
from datamodules.synthetic.tabletop_photos import RayCaster
from lightning_modules.functional.cameras import Camera, pixel_rays, resize_camera


class TabletopImagesDataModule(PosedImagesDataModule):
    """The photographs of a tabletop world, written once; ``predict``'s come with the truth of what their pixels show.

    ``predict`` sees the views that a language field trains on; the others stay for its validation and test. The same
    settings give the same world as :class:`datamodules.synthetic.tabletop.TabletopDataModule` does.

    Args:
        root: Folder to write the world to, or which holds it already.
        seed: Of the world, and of the order of training views.
        difficulty: As in ``TabletopDataModule``, and so are the next four.
        floaters: Of the world's own Gaussians.
        num_train_views: Views around the table; six more lie between them.
        image_size: Width and height, pixels.
        num_gaussians: Of the world's own Gaussians.
        objects_per_group: Objects on the table of each group.
        resolution: As in :class:`PosedImagesDataModule`, and so are the rest.
        test_every: See there.
        features: See there; ``language_features`` holds the world's own masks.
        overwrite: See there.
        photos_per_batch: See there.
        image_cache_mib: See there.
        num_workers: See there.
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
        resolution: int = -1,
        test_every: int = 8,
        features: str = "language_features_from_photos",
        overwrite: bool = False,
        photos_per_batch: int = 1,
        image_cache_mib: int = 4096,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(
            root,
            resolution=resolution,
            test_every=test_every,
            features=features,
            overwrite=overwrite,
            photos_per_batch=photos_per_batch,
            image_cache_mib=image_cache_mib,
            num_workers=num_workers,
            seed=seed,
        )
        self.world_settings = WorldSettings(
            seed,
            difficulty,
            floaters,
            num_train_views,
            (image_size[0], image_size[1]),
            num_gaussians,
            objects_per_group,
        )

    @override
    def prepare_data(self) -> None:
        """Writes the world unless ``root`` holds it; on one process only, as Lightning arranges.

        Raises:
            ValueError: If ``root`` holds a world of other settings, or something else.
        """
        write_world_once(self.root, self.world_settings)

    @property
    @override
    def photographs(self) -> list[PhotoFile]:
        """The photographs of the language field's training views, sorted by name."""
        names = train_view_names(self.world_settings.num_train_views)
        return [file for file in self._files if file.name in names]

    @override
    def truth_of(self, file: PhotoFile) -> PixelTruth | None:
        """Returns which part, object and group each pixel's centre shows, and their features free of noise."""
        camera = self.views.cameras[self.views.names.index(file.name)]
        ids = self._caster_and_concepts[1][self._part_ids(resize_camera(camera, file.width, file.height))]
        return PixelTruth(torch.from_numpy(ids).permute(2, 0, 1).int().contiguous(), self._concept_features)

    def _part_ids(self, camera: Camera) -> Int[np.ndarray, "height width"]:
        caster, _ = self._caster_and_concepts
        origin, rays = (tensor.double().numpy() for tensor in pixel_rays(camera))
        directions = (rays / np.linalg.norm(rays, axis=2, keepdims=True)).reshape(-1, 3)
        casts = caster.cast(np.broadcast_to(origin, directions.shape), directions)
        return caster.part_of_solid[casts.solid_ids].reshape(rays.shape[:2])

    @cached_property
    def _caster_and_concepts(self) -> tuple[RayCaster, Int[np.ndarray, "parts 3"]]:
        world = arrangement_of(self.world_settings)
        return RayCaster(world), world.concept_ids

    @cached_property
    def _concept_features(self) -> torch.Tensor:
        with np.load(self.root / "ceiling.npz", allow_pickle=False) as content:
            return torch.from_numpy(content["features"].astype(np.float32))
