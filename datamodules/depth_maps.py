"""Folders of depth maps, split by scene."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from datamodules.batches import DepthMaps
from datamodules.readers.depth_maps import DepthMapFile, find_depth_maps, read_depth_map
from datamodules.samplers import OrderedViews, ShuffledViews
from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange, scale_depth

DEFAULT_RANGE = DepthRange()


class _Item(NamedTuple):
    name: str
    image: Tensor  # [H, W], scaled
    kind_id: int


class DepthMapsDataModule(LightningDataModule):
    """Depth maps of a folder as batches of one size, scaled for the network; whole scenes are held out.

    Read are 16-bit PNG, ``.npy`` and ``.npz`` at any depth of folders, and the frames of ScanNet's layouts. A scene is
    the folder a map lies in, its kind the folder above (or ScanNet's ``sceneType``); maps in the root are scenes of
    their own. Kinds are not trained on: ``test`` asks whether neighbours share them.

    Args:
        root: The folder.
        image_size: Rows and columns of a batch's maps; each pixel takes the nearest one's depth, for means would put
            depth where nothing is.
        units_per_metre: What integers in files are divided by: 1000 for millimetres, 5000 for TUM's frames.
        depth_range: What depth is clamped to, and whether the network sees it, its logarithm or its inverse.
        array_key: Which array of an ``.npz`` is depth; ``depth``, or the only one, unless given.
        crops: Random crops of every map, of half its height and width or more, beside the whole.
        split_by: Hold out whole scenes, or single files where all maps are of one scene.
        val_fraction: Share of scenes for validation, spread over kinds; at least one.
        test_fraction: Share of scenes for the test, likewise.
        val_scenes: Names of the scenes for validation, instead of a share.
        test_scenes: Names of the scenes for the test, instead of a share.
        batch_size: Maps of a batch, in each process.
        num_workers: Processes that read; 0 reads in the training's own.
        cache_mib: Memory for maps already read and resized, in each reading process.
        seed: Of the split, the crops and the order of training.
    """

    def __init__(
        self,
        root: str | Path = "data/depth",
        image_size: tuple[int, int] = (128, 128),
        units_per_metre: float = 1000.0,
        depth_range: DepthRange = DEFAULT_RANGE,
        array_key: str | None = None,
        crops: int = 0,
        split_by: str = "scene",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        val_scenes: list[str] | None = None,
        test_scenes: list[str] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        cache_mib: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("image_size", min(image_size), "at least 1"),
            ("batch_size", batch_size, "at least 1"),
            ("crops", crops + 1, "at least 0"),
        ):
            if value < 1:
                raise ValueError(f"{name} is {image_size if name == 'image_size' else value}; allowed: {allowed}.")
        if units_per_metre <= 0:
            raise ValueError(f"units_per_metre is {units_per_metre}; allowed: above 0.")
        if split_by not in ("scene", "file"):
            raise ValueError(f"split_by is {split_by!r}; allowed: scene, file.")
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"val_fraction is {val_fraction} and test_fraction {test_fraction}; allowed: above 0, below 1 together."
            )
        self.root, self.image_size, self.units_per_metre = Path(root), (image_size[0], image_size[1]), units_per_metre
        self.depth_range, self.array_key, self.crops, self.split_by = depth_range, array_key, crops, split_by
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.val_scenes, self.test_scenes = val_scenes, test_scenes
        self.batch_size, self.num_workers, self.cache_mib, self.seed = batch_size, num_workers, cache_mib, seed
        self.kinds: tuple[str, ...] = ()
        self._files: list[DepthMapFile] = []
        self._splits: dict[str, DepthMapDataset] = {}

    @override
    def setup(self, stage: str | None = None) -> None:
        """Finds and splits the maps at the first call.

        Raises:
            FileNotFoundError: If there is no map.
            ValueError: If a file is damaged, or there are too few scenes to hold out any.
        """
        if not self._files:
            self._files = find_depth_maps(self.root, self.array_key)
            self.kinds = tuple(sorted({file.kind for file in self._files if file.kind is not None}))
        if stage == "predict":
            self._splits["predict"] = self._dataset(self._files)
        elif "train" not in self._splits:
            val, test = self._held_out_scenes()
            for name, wanted in (("val", val), ("test", test)):
                self._splits[name] = self._dataset([f for f in self._files if self._unit(f) in wanted])
            self._splits["train"] = self._dataset([f for f in self._files if self._unit(f) not in val | test])

    def _dataset(self, files: list[DepthMapFile]) -> "DepthMapDataset":
        return DepthMapDataset(
            files,
            self.kinds,
            image_size=self.image_size,
            units_per_metre=self.units_per_metre,
            depth_range=self.depth_range,
            array_key=self.array_key,
            crops=self.crops,
            seed=self.seed,
            cache_mib=self.cache_mib,
        )

    def _unit(self, file: DepthMapFile) -> str:
        return file.scene if self.split_by == "scene" else file.name

    def _held_out_scenes(self) -> tuple[set[str], set[str]]:
        by_kind: dict[str, set[str]] = {}
        for file in self._files:
            by_kind.setdefault(file.kind or "", set()).add(self._unit(file))
        generator = torch.Generator().manual_seed(self.seed)
        order = []
        for kind in sorted(by_kind):
            units = sorted(by_kind[kind])
            order += [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]
        named = {"val": self.val_scenes, "test": self.test_scenes}
        chosen: dict[str, set[str]] = {}
        for split, fraction in (("test", self.test_fraction), ("val", self.val_fraction)):
            names = named[split]
            if names is None:
                taken = set().union(*chosen.values(), *(scenes for scenes in named.values() if scenes))
                chosen[split] = _spread([unit for unit in order if unit not in taken], round(fraction * len(order)))
                continue
            unknown = sorted(set(names) - set(order))
            if unknown or not names:
                raise ValueError(
                    f"{split}_scenes names {', '.join(unknown) or 'none'}, but {self.root} has {', '.join(order[:8])}"
                    f"{' ...' if len(order) > 8 else ''}. Give names of these, or null for a share."
                )
            chosen[split] = set(names)
        if not set(order) - chosen["val"] - chosen["test"]:
            raise ValueError(
                f"{self.root} has {len(order)} {self.split_by}s; held out for validation and test, none is left to "
                "train on. Needed: three or more"
                + (", or data.init_args.split_by=file." if self.split_by == "scene" else ".")
            )
        return chosen["val"], chosen["test"]

    @override
    def train_dataloader(self) -> StatefulDataLoader:
        """Batches of training maps, in a new order each epoch; maps that fill no batch wait for another epoch."""
        sampler = ShuffledViews(self._splits["train"], self.seed)
        return self._loader("train", sampler, drop_last=len(sampler) >= self.batch_size)

    @override
    def val_dataloader(self) -> DataLoader:
        """Batches of validation maps."""
        return self._loader("val", OrderedViews(self._splits["val"]))

    @override
    def test_dataloader(self) -> DataLoader:
        """Batches of test maps."""
        return self._loader("test", OrderedViews(self._splits["test"]))

    @override
    def predict_dataloader(self) -> DataLoader:
        """Batches of all maps of the folder."""
        return self._loader("predict", OrderedViews(self._splits["predict"]))

    def gallery_dataloader(self) -> DataLoader:
        """Batches of training maps in order: what neighbours of test maps are looked for in."""
        return self._loader("train", OrderedViews(self._splits["train"]))

    def val_maps(self, count: int) -> DepthMaps:
        """Returns some validation maps at even steps, so that every kind of scene is among them."""
        dataset = self._splits["val"]
        count = min(count, len(dataset))
        return collate([dataset[int((i + 0.5) * len(dataset) / count)] for i in range(count)])

    def images(self, names: Sequence[str]) -> Float[Tensor, "maps height width"]:
        """Returns maps of the folder by name, scaled; after ``setup("predict")``."""
        dataset = self._splits["predict"]
        return torch.stack([dataset[dataset.position(name)].image for name in names])

    def _loader(self, split: str, sampler: OrderedViews | ShuffledViews, *, drop_last: bool = False) -> DataLoader:
        return StatefulDataLoader(
            self._splits[split],
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context="spawn" if self.num_workers else None,  # a fork of threads that compute can hang
        )


class DepthMapDataset(Dataset):
    """Maps and their crops, read when asked for, resized and scaled.

    Args:
        files: Where they are.
        kinds: All kinds, sorted.
        image_size: Rows and columns.
        units_per_metre: As in :class:`DepthMapsDataModule`.
        depth_range: As there.
        array_key: As there.
        crops: As there.
        seed: Of the crops.
        cache_mib: As there.
    """

    def __init__(
        self,
        files: Sequence[DepthMapFile],
        kinds: Sequence[str],
        *,
        image_size: tuple[int, int],
        units_per_metre: float,
        depth_range: DepthRange,
        array_key: str | None,
        crops: int,
        seed: int,
        cache_mib: int,
    ) -> None:
        self.files, self.kinds, self.crops, self.seed = list(files), list(kinds), crops, seed
        self.image_size, self.units_per_metre = image_size, units_per_metre
        self.depth_range, self.array_key = depth_range, array_key
        self._cache: dict[int, _Item] = {}
        self._most_cached = cache_mib * 2**20 // (4 * image_size[0] * image_size[1])

    def __len__(self) -> int:
        return len(self.files) * (1 + self.crops)

    def __getitem__(self, position: int) -> _Item:
        if position in self._cache:
            return self._cache[position]
        file, crop = self.files[position // (1 + self.crops)], position % (1 + self.crops)
        depth = torch.from_numpy(read_depth_map(file, self.units_per_metre, self.array_key))
        if crop:
            depth = random_crop(depth, zlib.crc32(f"{self.seed} {file.name} {crop}".encode()))
        image = scale_depth(resize_nearest(depth, *self.image_size), self.depth_range)
        kind_id = self.kinds.index(file.kind) if file.kind is not None else -1
        item = _Item(self.name(position), image, kind_id)
        if len(self._cache) < self._most_cached:
            self._cache[position] = item
        return item

    def name(self, position: int) -> str:
        """Returns a map's name; crops are numbered from 1 on."""
        crop = position % (1 + self.crops)
        return self.files[position // (1 + self.crops)].name + (f"#{crop}" if crop else "")

    def position(self, name: str) -> int:
        """Returns where the map of a name is."""
        return [self.name(position) for position in range(len(self))].index(name)


def resize_nearest(depth: Float[Tensor, "rows columns"], height: int, width: int) -> Float[Tensor, "height width"]:
    """Takes, for each pixel, the depth of the one whose area its centre lies in."""
    rows = ((torch.arange(height) + 0.5) * depth.shape[0] / height).long()
    columns = ((torch.arange(width) + 0.5) * depth.shape[1] / width).long()
    return depth[rows][:, columns]


def random_crop(depth: Float[Tensor, "rows columns"], seed: int) -> Float[Tensor, "new_rows new_columns"]:
    """Cuts out a part of the same aspect, of half to all of the height and width; the seed decides which."""
    share, top, left = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
    rows, columns = (max(round(size * (0.5 + share / 2)), 1) for size in depth.shape)
    top, left = round(top * (depth.shape[0] - rows)), round(left * (depth.shape[1] - columns))
    return depth[top : top + rows, left : left + columns]


def collate(items: Sequence[_Item]) -> DepthMaps:
    """Stacks maps to a batch."""
    return DepthMaps(
        tuple(item.name for item in items),
        torch.stack([item.image for item in items])[:, None],
        torch.tensor([item.kind_id for item in items]),
    )


def _spread(units: Sequence[str], count: int) -> set[str]:
    """Picks so many, at least one, at even steps: units are sorted by kind, so kinds get their shares."""
    count = min(max(count, 1), len(units))
    return {units[int((i + 0.5) * len(units) / count)] for i in range(count)}
