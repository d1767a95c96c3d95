"""Folders of shapes as sparse signed distance: meshes, converted once, or ``.npz``; batches by voxel budget."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from datamodules.batches import SparseSdf
from datamodules.readers.sparse_sdf import StoredSdf, read_sparse_sdf
from datamodules.sdf_preparation import OpenMeshes, SdfSettings, Shape, find_sources, prepare_shapes, ready_shapes
from datamodules.voxel_budget import OrderedBatches, ShapeDraw, VoxelBudgetBatches
from lightning_modules.functional.sdf_vqvae.cube_symmetries import CUBE_SYMMETRIES, turn_sparse_sdf
from lightning_modules.functional.sdf_vqvae.latent_crops import latent_crop

BYTES_PER_VOXEL = 16  # three coordinates and a distance
MOST_THREADS = 8  # unless asked for: a mesh at 512^3 takes half a gigabyte, and uses several processors itself


class SdfShapesDataModule(LightningDataModule):
    """Shapes of a folder as batches of sparse signed distance, under a number of voxels.

    Read are meshes (``.obj .ply .stl .off .glb``) and ``.npz`` (:mod:`datamodules.readers.sparse_sdf`) at any depth of
    folders. ``prepare_data`` turns meshes into distance once and keeps it; shapes that fail are listed and left out.
    Training sees crops, turned and mirrored, that follow from (seed, epoch, shape); all else sees whole shapes.

    Args:
        root: The folder.
        resolution: Grid points along each axis; that of ``.npz`` files.
        band: Of the truncation, in voxels of width ``2 / (resolution - 1)``.
        down_factor: Of the network: grid points of a latent cell along each axis.
        crop_blocks: Latent cells along each axis of the box that training sees of a shape; 0 = whole shapes.
        max_voxels_per_batch: Of a batch, in each process. A whole shape with more is a batch of its own where it is
            not trained on.
        augment: Turn and mirror training shapes by the 48 symmetries of the cube.
        open_meshes: What becomes of a mesh with holes: ``refuse`` leaves it out; ``winding`` signs it by the winding
            number, right where holes are small; ``unsigned`` has no inside.
        normalise: Move and scale meshes to fill [-0.95, 0.95]; else they must lie in [-1, 1].
        val_fraction: Share of shapes for validation, by a hash of their names; at least one.
        test_fraction: Share of shapes for the test, likewise.
        val_files: Names of the shapes for validation, or a text file with one per line, instead of a share.
        test_files: Those for the test, likewise.
        predict_split: Which shapes ``predict`` sees: ``all``, ``train``, ``val`` or ``test``.
        cache: Where converted meshes are kept; by default ``<root>/.sparse_sdf``.
        num_threads: Shapes converted at the same time; 0 = as many as there are processors, 8 at most, for each takes
            memory.
        device: Where meshes are converted: ``cpu`` or ``cuda``.
        num_workers: Processes that read batches; 0 reads in the training's own.
        cache_mib: Memory for shapes already read, in each reading process.
        seed: Of the split, the order, the crops and the turns of training.
    """

    def __init__(
        self,
        root: str | Path = "data/shapes",
        resolution: int = 64,
        band: float = 4.0,
        down_factor: int = 4,
        crop_blocks: int = 0,
        max_voxels_per_batch: int = 500_000,
        augment: bool = True,
        open_meshes: OpenMeshes = "refuse",
        normalise: bool = True,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        val_files: list[str] | str | None = None,
        test_files: list[str] | str | None = None,
        predict_split: Literal["all", "train", "val", "test"] = "all",
        cache: str | Path | None = None,
        num_threads: int = 0,
        device: str = "cpu",
        num_workers: int = 0,
        cache_mib: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_settings(resolution, band, down_factor, crop_blocks, max_voxels_per_batch)
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"val_fraction is {val_fraction} and test_fraction {test_fraction}; allowed: above 0, below 1 together."
            )
        self.root = Path(root)
        self.cache = self.root / ".sparse_sdf" if cache is None else Path(cache)
        self.settings = SdfSettings(resolution, band, open_meshes, normalise, down_factor, crop_blocks)
        self.max_voxels_per_batch, self.augment = max_voxels_per_batch, augment
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.val_files, self.test_files, self.predict_split = val_files, test_files, predict_split
        self.num_threads, self.device = num_threads or min(os.cpu_count() or 1, MOST_THREADS), device
        self.num_workers, self.cache_mib, self.seed = num_workers, cache_mib, seed
        self._splits: dict[str, SparseSdfDataset] = {}

    @override
    def prepare_data(self) -> None:
        """Converts what is not converted yet.

        Raises:
            FileNotFoundError: If there is no shape.
            ValueError: If none can be used, two have the same name, or there is no such device.
        """
        allowed = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        if self.device.split(":")[0] not in allowed:
            raise ValueError(f"device is {self.device}; allowed here: {' or '.join(allowed)}.")
        prepare_shapes(self.root, self.cache, self.settings, self.num_threads, self.device)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Finds the shapes at the first call, and splits them at the first that needs it.

        Raises:
            FileNotFoundError: If they were not prepared, or a file with names is absent.
            ValueError: If there are too few to hold out any, a name is unknown, or a training shape, or a crop of it,
                has more voxels than a batch may have.
        """
        if "all" not in self._splits:
            self._splits["all"] = self._dataset(ready_shapes(self.root, self.cache, self.settings))
        if "train" not in self._splits and not (stage == "predict" and self.predict_split == "all"):
            self._split(self._splits["all"].shapes)

    def _split(self, shapes: list[Shape]) -> None:
        held_out = self._held_out_names([shape.name for shape in shapes])
        for split, names in held_out.items():
            self._splits[split] = self._dataset([shape for shape in shapes if shape.name in names])
        taken = held_out["val"] | held_out["test"]
        train = [shape for shape in shapes if shape.name not in taken]
        largest = max(train, key=lambda shape: shape.crop_voxels)
        if largest.crop_voxels > self.max_voxels_per_batch:
            cells = self.settings.crop_blocks
            part = f"a crop of {cells} latent cells" if cells else "the whole"
            fewer = f"below {cells}" if cells else "to the latent cells of a crop"
            raise ValueError(
                f"{largest.path}: {part} has {largest.crop_voxels} voxels, but a batch may have "
                f"{self.max_voxels_per_batch}. Raise data.init_args.max_voxels_per_batch, or set "
                f"data.init_args.crop_blocks {fewer}."
            )
        self._splits["train"] = self._dataset(train)

    def _dataset(self, shapes: list[Shape]) -> "SparseSdfDataset":
        return SparseSdfDataset(shapes, self.settings, augment=self.augment, seed=self.seed, cache_mib=self.cache_mib)

    def _held_out_names(self, names: list[str]) -> dict[str, set[str]]:
        chosen = {
            split: _listed_names(files, split, names, self.root)
            for split, files in (("test", self.test_files), ("val", self.val_files))
            if files is not None
        }
        by_hash = sorted(names, key=lambda name: (zlib.crc32(f"{self.seed} {name}".encode()), name))
        for split, fraction in (("test", self.test_fraction), ("val", self.val_fraction)):
            if split not in chosen:
                free = [name for name in by_hash if not any(name in others for others in chosen.values())]
                chosen[split] = set(free[: max(round(fraction * len(names)), 1)])
        both = sorted(chosen["val"] & chosen["test"])
        if both:
            raise ValueError(f"val_files and test_files both name {', '.join(both[:8])}; allowed: one of them.")
        if not chosen["val"] or len(chosen["val"]) + len(chosen["test"]) >= len(names):
            raise ValueError(
                f"{self.root} has {len(names)} usable shapes; held out for validation and test, none is left to train "
                "on. Needed: three or more."
            )
        return chosen

    @override
    def train_dataloader(self) -> StatefulDataLoader:
        """Batches of training shapes, packed in a new order each epoch."""
        voxels = [shape.crop_voxels for shape in self._splits["train"].shapes]
        return self._loader("train", VoxelBudgetBatches(voxels, self.max_voxels_per_batch, self.seed))

    @override
    def val_dataloader(self) -> DataLoader:
        """Batches of validation shapes, whole."""
        return self._whole_loader("val")

    @override
    def test_dataloader(self) -> DataLoader:
        """Batches of test shapes, whole."""
        return self._whole_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader:
        """Batches of the shapes of ``predict_split``, whole."""
        return self._whole_loader(self.predict_split)

    def val_shapes(self, count: int) -> SparseSdf:
        """Returns some validation shapes at even steps."""
        dataset = self._splits["val"]
        count = min(count, len(dataset))
        return dataset[ShapeDraw(-1, tuple(int((i + 0.5) * len(dataset) / count) for i in range(count)))]

    def _whole_loader(self, split: str) -> DataLoader:
        voxels = [shape.voxels for shape in self._splits[split].shapes]
        return self._loader(split, OrderedBatches(voxels, self.max_voxels_per_batch))

    def _loader(self, split: str, sampler: OrderedBatches | VoxelBudgetBatches) -> StatefulDataLoader:
        return StatefulDataLoader(
            self._splits[split],
            batch_size=None,  # the sampler draws whole batches
            sampler=sampler,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context="spawn" if self.num_workers else None,  # a fork of threads that compute can hang
        )


class SparseSdfDataset(Dataset[SparseSdf]):
    """Shapes, read when asked for; an item is a batch of them.

    Args:
        shapes: What is ready.
        settings: What they were prepared with.
        augment: Whether crops are turned and mirrored.
        seed: Of crops and turns.
        cache_mib: As in :class:`SdfShapesDataModule`.
    """

    def __init__(
        self, shapes: Sequence[Shape], settings: SdfSettings, *, augment: bool, seed: int, cache_mib: int
    ) -> None:
        self.shapes, self.settings, self.augment, self.seed = list(shapes), settings, augment, seed
        self._cache: dict[int, StoredSdf] = {}
        self._room = cache_mib * 2**20

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, draw: ShapeDraw | int) -> SparseSdf:
        if isinstance(draw, int):  # Lightning's overfit_batches puts a sampler of its own in place of ours
            draw = ShapeDraw(-1, (draw,))
        return collate(
            [self.shapes[position].name for position in draw.positions],
            [self.shape(position, draw.epoch) for position in draw.positions],
            self.settings.band,
        )

    def shape(self, position: int, epoch: int = -1) -> StoredSdf:
        """Returns a shape: whole, or what training sees of it in an epoch."""
        stored = self._read(position)
        if epoch < 0:
            return stored
        key = f"{self.seed} {epoch} {self.shapes[position].name}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        coords, sdf = stored.coords, stored.sdf
        if self.settings.crop_blocks:
            kept = latent_crop(
                coords, stored.resolution, self.settings.down_factor, self.settings.crop_blocks, generator
            )
            coords, sdf = coords[kept], sdf[kept]
        if self.augment:
            number = int(torch.randint(len(CUBE_SYMMETRIES), (1,), generator=generator))
            coords, sdf = turn_sparse_sdf(coords, sdf, CUBE_SYMMETRIES[number], stored.resolution)
        return stored._replace(coords=coords, sdf=sdf)

    def _read(self, position: int) -> StoredSdf:
        if position not in self._cache:
            stored = read_sparse_sdf(self.shapes[position].path)
            needed = len(stored.coords) * BYTES_PER_VOXEL
            if needed > self._room:
                return stored
            self._room -= needed
            self._cache[position] = stored
        return self._cache[position]


def collate(names: Sequence[str], shapes: Sequence[StoredSdf], band: float) -> SparseSdf:
    """Puts shapes of one resolution into a batch.

    Raises:
        ValueError: If there is none, one has no voxel, or resolutions differ.
    """
    empty = [name for name, shape in zip(names, shapes, strict=True) if not len(shape.coords)]
    resolutions = sorted({shape.resolution for shape in shapes})
    if empty or len(resolutions) != 1:
        raise ValueError(
            f"A batch of {len(shapes)} shapes of the resolutions {resolutions}, {len(empty)} of them without voxels "
            f"({', '.join(empty[:8])}); allowed: one or more shapes of one resolution, each with a voxel."
        )
    coords = [torch.nn.functional.pad(shape.coords, (1, 0), value=number) for number, shape in enumerate(shapes)]
    sdf = torch.cat([shape.sdf for shape in shapes])[:, None]
    return SparseSdf(tuple(names), torch.cat(coords), sdf, resolutions[0], band)


def _as_it_is(batch: SparseSdf) -> SparseSdf:
    return batch


def _listed_names(files: list[str] | str, split: str, names: list[str], root: Path) -> set[str]:
    if isinstance(files, str):
        path = Path(files)
        if not path.is_file():
            raise FileNotFoundError(
                f"{split}_files is {path}, which is no file. Give names, or a file of one per line."
            )
        files = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    sources = find_sources(root)
    unknown = sorted(set(files) - set(sources))
    if unknown or not set(files) & set(names):
        raise ValueError(
            f"{split}_files names {', '.join(unknown[:8]) or 'no usable shape'}, but {root} has {', '.join(names[:8])}"
            f"{' ...' if len(names) > 8 else ''}. Give names of these (path below the folder, without suffix)."
        )
    return set(files) & set(names)


def _check_settings(
    resolution: int,
    band: float,
    down_factor: int,
    crop_blocks: int,
    max_voxels_per_batch: int,
) -> None:
    if down_factor < 1 or resolution < 2 or resolution % down_factor:
        raise ValueError(
            f"resolution is {resolution} and down_factor {down_factor}; allowed: a multiple of the down factor, such "
            f"as {max(round(resolution / max(down_factor, 1)), 1) * max(down_factor, 1)}."
        )
    if not 3**0.5 <= band <= resolution:
        raise ValueError(
            f"band is {band}; allowed: the square root of 3 (1.74, or meshes of it have holes) to {resolution} voxels."
        )
    if not 0 <= crop_blocks <= resolution // down_factor:
        raise ValueError(
            f"crop_blocks is {crop_blocks}; allowed: 1 to {resolution // down_factor} latent cells, or 0 for the whole."
        )
    if max_voxels_per_batch < 1:
        raise ValueError(f"max_voxels_per_batch is {max_voxels_per_batch}; allowed: at least 1.")
