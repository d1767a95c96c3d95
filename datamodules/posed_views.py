"""Posed photographs to train Gaussians on, and every view to render in the end."""

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.posed_images import PosedImagesDataModule
from datamodules.readers.gaussians import read_gaussians
from datamodules.readers.posed_images import name_list, similar_names
from datamodules.readers.scene_layout import find_gaussians, given_path
from lightning_modules.functional.splatting.gaussians import GaussianScene


class PosedViewsDataModule(PosedImagesDataModule):
    """Photographs with COLMAP's or nerfstudio's cameras and sparse points; ``predict`` sees all views, too.

    Every ``test_every``-th view, by name, is kept out of training (the split of 3DGS), or those of ``held_out`` are.

    Args:
        root: Folder of the scene.
        cameras: Folder of a COLMAP model, or a ``transforms.json``. By default ``sparse/0``, ``sparse``,
            ``colmap/sparse/0`` or ``transforms.json`` below ``root``.
        images: Folder of the photographs below ``root``.
        gaussians: Gaussians to begin with instead of the sparse points: a file or folder as in
            :class:`~datamodules.lerf.LerfDataModule`, such as the ``gaussians.ply`` that the depth of RGB-D photographs
            becomes (:class:`~datamodules.rgbd.RgbdDataModule`).
        resolution: As in :class:`~datamodules.posed_images.PosedImagesDataModule`.
        test_every: Every such view is for validation and test; 0 keeps none.
        held_out: Names of the views for validation and test, instead of every ``test_every``-th; in quotes if digits.
        image_cache_mib: As in :class:`~datamodules.posed_images.PosedImagesDataModule`.
        num_workers: As in :class:`~datamodules.posed_images.PosedImagesDataModule`.
        seed: Of the order of training views.
    """

    def __init__(
        self,
        root: str | Path,
        cameras: str | Path | None = None,
        images: str = "images",
        gaussians: str | Path | None = None,
        resolution: int = -1,
        test_every: int = 8,
        held_out: list[str] | None = None,
        image_cache_mib: int = 4096,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            cameras=cameras,
            images=images,
            resolution=resolution,
            test_every=test_every,
            image_cache_mib=image_cache_mib,
            num_workers=num_workers,
            seed=seed,
        )
        self.held_out = held_out
        self.gaussians_path = gaussians
        self.initial_gaussians: GaussianScene | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        """Reads cameras, points or Gaussians to begin with and, to fit, every photograph.

        Raises:
            FileNotFoundError: If a file or folder is absent.
            ValueError: If files are damaged or do not belong together; names them and the remedy.
        """
        super().setup("validate" if stage == "predict" else stage)
        if self.gaussians_path is not None and self.initial_gaussians is None:
            path = given_path(self.root, self.gaussians_path)
            self.initial_gaussians = read_gaussians(find_gaussians(path) if path.is_dir() else path)

    @override
    def _test_ids(self) -> Sequence[int]:
        if self.held_out is None:
            return super()._test_ids()
        names = self._dataset(range(len(self._posed))).names
        unknown = [name for name in self.held_out if name not in names]
        if unknown or len(set(self.held_out)) >= len(names):
            raise ValueError(
                f"held_out is {name_list(self.held_out)}; allowed: some of the {len(names)} views of {self.root}, not "
                f"all, such as {similar_names((unknown or names)[0], names)}."
            )
        return [view_id for view_id, name in enumerate(names) if name in self.held_out]

    @override
    def predict_dataloader(self) -> DataLoader:
        """All views, in order."""
        return self._ordered_loader(self.views)
