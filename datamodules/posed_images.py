"""Posed photographs: to train the colours of Gaussians on, or to compute language features of."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float, UInt8
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from datamodules.batches import PixelTruth, PosedView, single_view
from datamodules.photographs import PhotoFile, PhotographGroups
from datamodules.readers.photos import (
    check_photo_sizes,
    check_resolution,
    photo_size,
    photos_by_stem,
    read_photo,
    target_size,
)
from datamodules.readers.posed_images import PosedImage, name_list, similar_names
from datamodules.readers.scene_layout import find_cameras, given_path, match_photos, read_cameras, read_points
from datamodules.samplers import OrderedViews, ShuffledViews, process_rank
from lightning_modules.functional.cameras import Camera, resize_camera


class PosedPhoto(NamedTuple):
    """A photograph on disk and its camera, at the size to decode it at."""

    name: str
    camera: Camera
    path: Path


class PosedViews(Dataset[PosedView]):
    """Some views of a scene as batches of one.

    Args:
        photos: All photographs of the scene, sorted by name.
        view_ids: Which of them, in which order.
        kept: Images in memory by ``view_id``; others are decoded when asked for.
    """

    def __init__(
        self,
        photos: Sequence[PosedPhoto],
        view_ids: Sequence[int],
        kept: Mapping[int, UInt8[Tensor, "height width 3"]],
    ) -> None:
        self._photos = photos
        self.view_ids = list(view_ids)
        self._kept = kept

    @property
    def names(self) -> list[str]:
        """The stems of the views."""
        return [self._photos[view_id].name for view_id in self.view_ids]

    @property
    def cameras(self) -> list[Camera]:
        """The cameras of the views; no photograph is decoded for them."""
        return [self._photos[view_id].camera for view_id in self.view_ids]

    def __iter__(self) -> Iterator[PosedView]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self.view_ids)

    def __getitem__(self, index: int) -> PosedView:
        view_id = self.view_ids[index]
        name, camera, path = self._photos[view_id]
        image = self._kept.get(view_id)
        return PosedView(
            name, view_id, camera, read_photo(path, camera.width, camera.height) if image is None else image
        )


class PosedImagesDataModule(LightningDataModule):
    """Photographs with COLMAP's or nerfstudio's cameras and sparse points.

    ``fit``, ``validate`` and ``test`` see posed views: every ``test_every``-th, in the order of names, is kept out of
    training (3DGS's split). ``predict`` sees the photographs themselves, to compute language features of; for that,
    cameras need not exist. A rotation noted in EXIF is not applied, see :mod:`datamodules.readers.photos`.

    Args:
        root: Folder of the scene.
        cameras: Folder of a COLMAP model, or a ``transforms.json``. By default ``sparse/0``, ``sparse``,
            ``colmap/sparse/0`` or ``transforms.json`` below ``root``.
        images: Folder of the photographs below ``root``.
        resolution: LangSplat's ``-r``: -1 reduces photos above 1080 pixels of height to 1080; 1, 2, 4, 8 divide the
            cameras' size; more is a width. Language features and views of the same number have the same size.
        test_every: Every such view is for validation and test; 0 keeps none.
        features: ``predict``'s folder below ``root``, for ``<stem>_f.npy`` and ``<stem>_s.npy``.
        overwrite: Delete the features of these photographs in that folder and compute them again.
        only_posed: Where there are cameras, ``predict`` leaves out the photographs that have none.
        photos_per_batch: Photographs whose masks are encoded together in ``predict``. More fill an encoder's batches
            where photos have few masks; a run that is killed loses the batch it was at.
        image_cache_mib: Memory for decoded photographs in training; what does not fit is decoded again each time.
        num_workers: Processes that decode. By default none where all photographs are in memory, else up to four.
        seed: Of the order of training views.
    """

    def __init__(
        self,
        root: str | Path,
        cameras: str | Path | None = None,
        images: str = "images",
        resolution: int = -1,
        test_every: int = 8,
        features: str = "language_features",
        overwrite: bool = False,
        only_posed: bool = True,
        photos_per_batch: int = 1,
        image_cache_mib: int = 4096,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # A process may have no view of a short evaluation; it waits for the others.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        check_resolution(resolution)
        if test_every < 0 or test_every == 1:
            raise ValueError(f"test_every is {test_every}; allowed: 0 (no view is held out), or 2 and more.")
        if photos_per_batch < 1:
            raise ValueError(f"photos_per_batch is {photos_per_batch}; allowed: 1 or more.")
        self.root = Path(root)
        self.cameras_path = cameras
        self.images = images
        self.resolution = resolution
        self.test_every = test_every
        self.features = features
        self.overwrite = overwrite
        self.only_posed = only_posed
        self.photos_per_batch = photos_per_batch
        self.image_cache_mib = image_cache_mib
        self.num_workers = num_workers
        self.seed = seed
        self._posed: list[PosedPhoto] = []
        self._points: tuple[Tensor, Tensor] | None = None
        self._kept: dict[int, Tensor] = {}
        self._files: list[PhotoFile] = []
        self._finished: frozenset[str] = frozenset()
        self.cameras_found: Path | None = None
        self.unmatched: tuple[list[str], list[str]] = ([], [])  # photographs without a camera, images without a photo

    @override
    def setup(self, stage: str | None = None) -> None:
        """Checks the scene; for training and evaluation also reads cameras, points and, once, every photograph.

        Raises:
            FileNotFoundError: If a file or folder is absent.
            ValueError: If files are damaged or do not belong together; names them and the remedy.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is no folder. Give a scene's folder as data.init_args.root.")
        if stage == "predict":
            self._files = self._find_photographs()
            return
        is_new = not self._posed
        self._read_scene()
        if stage == "fit" and not self._kept:
            self._decode_all()
        if is_new:
            rank_zero_info(
                f"{self.root.name}: {len(self.points)} points, {len(self.train_views)} views to train on, "
                f"{len(self.test_views)} to test on."
            )

    # Posed views

    @property
    def views(self) -> PosedViews:
        """All views, sorted by name; ``view_id`` counts them."""
        self._read_scene()
        return self._dataset(range(len(self._posed)))

    @property
    def train_views(self) -> PosedViews:
        """The views to train on."""
        self._read_scene()
        held_out = set(self._test_ids())
        return self._dataset([view_id for view_id in range(len(self._posed)) if view_id not in held_out])

    @property
    def test_views(self) -> PosedViews:
        """The views kept out of training."""
        self._read_scene()
        return self._dataset(self._test_ids())

    @property
    def points(self) -> Float[Tensor, "points 3"]:
        """Sparse points in world coordinates, on the CPU."""
        return self._sparse()[0]

    @property
    def point_colors(self) -> UInt8[Tensor, "points 3"]:
        """Their RGB colours."""
        return self._sparse()[1]

    @override
    def train_dataloader(self) -> StatefulDataLoader:
        """Training views in an order that follows from (seed, epoch); stateful, so a resume continues in mid-epoch."""
        dataset = self.train_views
        num_workers = self._workers()
        return StatefulDataLoader(
            dataset,
            batch_size=1,
            sampler=ShuffledViews(dataset, self.seed),
            num_workers=num_workers,
            collate_fn=single_view,
            persistent_workers=num_workers > 0,
        )

    @override
    def val_dataloader(self) -> DataLoader:
        """The views kept out of training."""
        return self._ordered_loader(self.test_views)

    @override
    def test_dataloader(self) -> DataLoader:
        """The views kept out of training."""
        return self._ordered_loader(self.test_views)

    def _read_scene(self) -> None:
        if self._posed:
            return
        path = self._cameras()
        posed = read_cameras(path)
        if len(posed) < 2:
            raise ValueError(f"{path} has one photo; allowed: two or more. Run COLMAP on photos from several sides.")
        self._points = read_points(path)
        photos = match_photos(self.root / self.images, posed, path)
        self._posed = [
            PosedPhoto(stem, resize_camera(image.camera, *self._size(photos[stem], image)), photos[stem])
            for stem, image in posed.items()
        ]

    def _sparse(self) -> tuple[Tensor, Tensor]:
        self._read_scene()
        assert self._points is not None
        return self._points

    def _decode_all(self) -> None:
        """Decodes each photograph, so that a damaged one is told before training, and keeps as many as fit."""
        views, free = self.views, self.image_cache_mib * 2**20
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            images = pool.map(lambda index: views[index].image, range(len(views)))
            description, hidden = f"Reading photos of {self.root.name}", process_rank()[1] != 0
            for view_id, image in enumerate(track(images, description, len(views), transient=True, disable=hidden)):
                free -= image.numel()
                if free >= 0:
                    self._kept[view_id] = image

    def _size(self, photo: Path, image: PosedImage | None) -> tuple[int, int]:
        """Returns the size to work at; -1 goes by the photograph, which may be reduced already."""
        if image is None or self.resolution == -1:
            return target_size(*photo_size(photo), self.resolution)
        return target_size(image.camera.width, image.camera.height, self.resolution)

    def _test_ids(self) -> Sequence[int]:
        return range(0, len(self._posed), self.test_every) if self.test_every else range(0)

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return 0 if len(self._kept) == len(self._posed) else min(4, os.cpu_count() or 1)

    def _cameras(self) -> Path:
        return find_cameras(self.root) if self.cameras_path is None else given_path(self.root, self.cameras_path)

    def _dataset(self, view_ids: Sequence[int]) -> PosedViews:
        return PosedViews(self._posed, view_ids, self._kept)

    def _ordered_loader(self, dataset: Dataset) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=1,
            sampler=OrderedViews(dataset),
            num_workers=self.num_workers or 0,
            collate_fn=single_view,
        )

    # Photographs

    @property
    def features_folder(self) -> Path:
        """Where the features of the photographs go."""
        return self.root / self.features

    @property
    def photographs(self) -> list[PhotoFile]:
        """The photographs to compute features of, sorted by name."""
        return self._files

    def leave_out(self, finished: Collection[str]) -> None:
        """Takes photographs, by name, out of ``predict``: their features are written."""
        self._finished = frozenset(finished)

    def truth_of(self, file: PhotoFile) -> PixelTruth | None:
        """Returns what the pixels of a photograph show; nobody knows that of a real one."""
        return None

    @override
    def predict_dataloader(self) -> DataLoader:
        """The photographs that are not done, in batches; each process gets its share."""
        num_processes, _ = process_rank()
        groups = PhotographGroups(
            self.photographs, self.photos_per_batch, self._finished, min_groups=num_processes, truth_of=self.truth_of
        )
        return self._ordered_loader(groups)

    def _find_photographs(self) -> list[PhotoFile]:
        photos = photos_by_stem(self.root / self.images)
        posed = self._cameras_if_any()
        unposed = sorted(set(photos) - set(posed)) if posed else []
        if len(unposed) == len(photos):
            raise ValueError(
                f"{self._cameras()} has none of the {len(photos)} photos of {self.root / self.images}: they are called "
                f"{name_list(unposed)}, its images {similar_names(unposed[0], list(posed))}. Give the model of these "
                "photos as data.init_args.cameras."
            )
        self.unmatched = (unposed, sorted(set(posed) - set(photos)))
        if self.only_posed:
            photos = {stem: path for stem, path in photos.items() if stem not in unposed}
        files = [self._photo_file(stem, path, posed.get(stem)) for stem, path in photos.items()]
        readable = {file.name: file.path for file in files if file.problem is None and file.name in posed}
        check_photo_sizes(readable, {stem: (posed[stem].camera.width, posed[stem].camera.height) for stem in readable})
        return files

    def _cameras_if_any(self) -> dict[str, PosedImage]:
        try:
            self.cameras_found = self._cameras()
        except FileNotFoundError:
            return {}
        return read_cameras(self.cameras_found)

    def _photo_file(self, stem: str, path: Path, image: PosedImage | None) -> PhotoFile:
        try:
            photo_size(path)
            return PhotoFile(stem, path, *self._size(path, image))
        except ValueError as error:  # told at the end; one damaged photograph must not keep the others from being done
            return PhotoFile(stem, path, 0, 0, str(error))
