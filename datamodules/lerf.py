"""Scenes in the layout of LERF-OVS and LangSplat: posed photographs, a Gaussian scene, per-mask features, labels."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from datamodules.batches import single_view
from datamodules.language_views import LanguageViews, StoredView, compact_ids, photo_size
from datamodules.readers.gaussians import read_gaussians
from datamodules.readers.language_features import NUM_GRANULARITIES, read_language_features
from datamodules.readers.lerf_labels import LabelledFrame, read_lerf_labels
from datamodules.readers.posed_images import PosedImage
from datamodules.readers.scene_layout import (
    feature_stems,
    find_cameras,
    find_gaussians,
    find_photos,
    given_path,
    read_cameras,
)
from datamodules.readers.text_embeddings import TextEmbeddingTable, TextEncoder
from datamodules.samplers import OrderedViews, ShuffledViews, process_rank
from lightning_modules.functional.cameras import resize_camera
from lightning_modules.functional.gaussians import GaussianScene

CANONICAL_NEGATIVES = ("object", "things", "stuff", "texture")
GRANULARITIES = ("default", "small", "medium", "large")  # SAM's union of outputs, and its three outputs


class CeilingField(NamedTuple):
    """The true feature of every Gaussian of a synthetic world: the best that any field on this geometry could hold.

    Attributes:
        ids: [N, L] rows of ``features`` for each level, -1 where a Gaussian belongs to nothing.
        features: [T, C] unit features.
        is_floater: [N] True for Gaussians that belong to no surface.
    """

    ids: Int[Tensor, "gaussians levels"]
    features: Float[Tensor, "truths channels"]
    is_floater: Bool[Tensor, " gaussians"]


class LerfDataModule(LightningDataModule):
    """Posed views of one scene with the language features of their masks, read once and matched by file name.

    Training sees the views with features; evaluation the labelled and the held-out ones. LERF-OVS labels views that are
    also trained on, and so does this module unless they are in ``held_out``.

    Args:
        root: Folder of the scene.
        gaussians: The Gaussian scene: 3DGS ``.ply`` or ``chkpnt*.pth``, LangSplatV2 ``chkpnt*.pth``, gsplat
            ``ckpt_*.pt``, or a training's folder. By default the usual places below ``root`` are searched.
        cameras: Folder of a COLMAP model, or a ``transforms.json``. By default ``sparse/0``, ``sparse``,
            ``colmap/sparse/0`` or ``transforms.json`` below ``root``.
        images: Folder of the photographs below ``root``.
        features: Folder of ``<stem>_f.npy`` and ``<stem>_s.npy`` below ``root``.
        labels: Folder of LERF-OVS ``.json`` labels. By default ``label`` below ``root``, else ``../label/<scene>``;
            without either, nothing is evaluated.
        text: Encoder of prompts. By default the table ``text_embeddings.npz`` below ``root``.
        levels: Granularities to train on: 0 default, 1 small parts, 2 medium, 3 large (LangSplat trains on 1, 2, 3).
        negatives: Phrases against which relevancy is measured; LERF's four.
        resolution: LangSplat's ``-r``: -1 reduces photos above 1080 pixels of height to 1080; 1, 2, 4, 8 divide; more
            is a width. Where a view has features, their maps must have that size (-1: the maps' size is taken).
        train_views: Views to train on: a number (evenly spaced) or names; by default all with features.
        val_names: Views for validation; by default those of the test.
        held_out: Views kept out of training and evaluated even without labels.
        load_images: Whether photographs come along in evaluation; training needs none.
        allow_missing_features: Accept images without features (not trained on) and features without images (ignored).
        num_workers: Processes that prepare views; everything but the photographs is in memory, so 0 is good.
        seed: Of the order of training views.
    """

    def __init__(
        self,
        root: str | Path,
        gaussians: str | Path | None = None,
        cameras: str | Path | None = None,
        images: str = "images",
        features: str = "language_features",
        labels: str | Path | None = None,
        text: TextEncoder | None = None,
        levels: Sequence[int] = (1, 2, 3),
        negatives: Sequence[str] = CANONICAL_NEGATIVES,
        resolution: int = -1,
        train_views: int | list[str] | None = None,
        val_names: list[str] | None = None,
        held_out: list[str] | None = None,
        load_images: bool = True,
        allow_missing_features: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # A process may have no view of a short evaluation; it waits for the others.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        if not levels or len(set(levels)) != len(levels) or not set(levels) <= set(range(NUM_GRANULARITIES)):
            raise ValueError(
                f"levels is {list(levels)}; allowed: some of 0 (default), 1 (small), 2 (medium), 3 (large), none twice."
            )
        if resolution != -1 and resolution < 1:
            raise ValueError(f"resolution is {resolution}; allowed: -1, a divisor 1, 2, 4, 8, or a width in pixels.")
        self.root = Path(root)
        self.gaussians_path = gaussians
        self.cameras_path = cameras
        self.images = images
        self.features = features
        self.labels = labels
        self.text = text
        self.levels = tuple(levels)
        self.negatives = tuple(negatives)
        self.resolution = resolution
        self.train_views = train_views
        self.val_names = val_names
        self.held_out = held_out
        self.load_images = load_images
        self.allow_missing_features = allow_missing_features
        self.num_workers = num_workers
        self.seed = seed
        self._scene: GaussianScene | None = None
        self._stored: list[StoredView] = []
        self._embedding_of: dict[str, Tensor] = {}
        self._encoder: TextEncoder | None = None
        self.ceiling: CeilingField | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        """Reads and checks the whole scene at the first call.

        Raises:
            FileNotFoundError: If a file or folder is absent.
            ValueError: If files are damaged or do not belong together; names them and the remedy.
        """
        if self._scene is not None:
            return
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is no folder. Give a scene's folder as data.init_args.root.")
        posed = read_cameras(self._cameras())
        frames = self._read_labels(posed)
        with_features = self._match_features(posed, frames)
        photos = self._match_photos(posed)
        description = f"Reading {self.root.name}"
        self._stored = [
            self._read_view(stem, posed[stem], stem in with_features, photos.get(stem), frames.get(stem))
            for stem in track(sorted(posed), description, transient=True, disable=process_rank()[1] != 0)
        ]
        self._check_channels()
        self._check_names()
        self._encode_labels(frames)
        scene = read_gaussians(self._gaussians())
        self.ceiling = self._read_ceiling(scene.num_gaussians)
        self._scene = scene
        rank_zero_info(
            f"{self.root.name}: {scene.num_gaussians} Gaussians, {len(self._stored)} views, {len(self._train_ids())} "
            f"to train on, {len(self._test_ids())} to test on."
        )

    @property
    def gaussians(self) -> GaussianScene:
        """The scene, on the CPU."""
        if self._scene is None:
            raise RuntimeError("The scene is read by setup(); call it first.")
        return self._scene

    @property
    def views(self) -> LanguageViews:
        """All views of the scene, sorted by name; ``view_id`` counts them."""
        return self._dataset(range(len(self._stored)), self.load_images)

    @property
    def num_levels(self) -> int:
        """Number of granularities."""
        return len(self.levels)

    @property
    def level_names(self) -> list[str]:
        """Names of the granularities."""
        return [GRANULARITIES[level] for level in self.levels]

    @property
    def prompts(self) -> list[str]:
        """All labelled categories, sorted."""
        frames = [view.frame for view in self._stored if view.frame is not None]
        return sorted({thing.category for frame in frames for thing in frame.objects})

    @property
    def feature_dim(self) -> int:
        """Channels of the features."""
        for view in self._stored:
            if view.mask_features is not None:
                return view.mask_features.shape[1]
        return self.encode_text(self.negatives).shape[1]

    @property
    def negative_embeddings(self) -> Float[Tensor, "negatives channels"]:
        """[J, C] unit embeddings of the negative phrases; none, [0, C], in a scene without a text encoder."""
        if self._text_encoder() is None:
            return torch.zeros(0, self.feature_dim)
        return self.encode_text(self.negatives)

    def encode_text(self, phrases: Sequence[str]) -> Float[Tensor, "phrases channels"]:
        """Returns [Q, C] unit embeddings; each phrase is encoded once.

        Raises:
            ValueError: If the scene has no text encoder, or the encoder does not know a phrase.
        """
        missing = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._embedding_of]
        if missing:
            encoder = self._text_encoder()
            if encoder is None:
                raise ValueError(
                    f"There is no encoder for {', '.join(map(repr, missing[:5]))}: {self.root / 'text_embeddings.npz'} "
                    "does not exist. Write that table, or set data.init_args.text to an OpenClipTextEncoder."
                )
            self._embedding_of.update(zip(missing, encoder.encode(missing), strict=True))
        return torch.stack([self._embedding_of[phrase] for phrase in phrases])

    @override
    def train_dataloader(self) -> StatefulDataLoader:
        """Training views in an order that follows from (seed, epoch); stateful, so a resume continues in mid-epoch."""
        dataset = self._dataset(self._train_ids(), with_photos=False)
        if not len(dataset):
            raise ValueError(
                f"{self.root} has no view to train on: none has language features. Run the preprocessing, or check "
                "train_views and held_out."
            )
        return StatefulDataLoader(
            dataset,
            batch_size=1,
            sampler=ShuffledViews(dataset, self.seed),
            num_workers=self.num_workers,
            collate_fn=single_view,
            persistent_workers=self.num_workers > 0,
        )

    def lifting_dataloader(self) -> DataLoader:
        """All training views once, in order; each process gets its share."""
        return self._ordered_loader(self._train_ids(), with_photos=False)

    @override
    def val_dataloader(self) -> DataLoader:
        """Views to choose settings on."""
        ids = self._test_ids() if self.val_names is None else self._ids_of(self.val_names)
        return self._ordered_loader(ids, self.load_images)

    @override
    def test_dataloader(self) -> DataLoader:
        """Labelled and held-out views, without those of ``val_names``."""
        return self._ordered_loader(self._test_ids(), self.load_images)

    @override
    def predict_dataloader(self) -> DataLoader:
        """All views."""
        return self._ordered_loader(range(len(self._stored)), self.load_images)

    def _ordered_loader(self, view_ids: Sequence[int], with_photos: bool) -> DataLoader:
        dataset = self._dataset(view_ids, with_photos)
        return DataLoader(
            dataset,
            batch_size=1,
            sampler=OrderedViews(dataset),
            num_workers=self.num_workers,
            collate_fn=single_view,
        )

    def _dataset(self, view_ids: Sequence[int], with_photos: bool) -> LanguageViews:
        return LanguageViews(self._stored, view_ids, self._embedding_of, with_photos)

    def _ids_of(self, names: Sequence[str]) -> list[int]:
        return [view_id for view_id, view in enumerate(self._stored) if view.name in set(names)]

    def _train_ids(self) -> list[int]:
        held_out = set(self.held_out or ())
        ids = [
            view_id
            for view_id, view in enumerate(self._stored)
            if view.mask_ids is not None and view.name not in held_out
        ]
        if isinstance(self.train_views, int):
            return [ids[round(at)] for at in np.linspace(0, len(ids) - 1, min(self.train_views, len(ids)))]
        if self.train_views is not None:
            return [view_id for view_id in ids if self._stored[view_id].name in set(self.train_views)]
        return ids

    def _test_ids(self) -> list[int]:
        held_out, validation = set(self.held_out or ()), set(self.val_names or ())
        return [
            view_id
            for view_id, view in enumerate(self._stored)
            if (view.frame is not None or view.name in held_out) and view.name not in validation
        ]

    def _cameras(self) -> Path:
        return find_cameras(self.root) if self.cameras_path is None else given_path(self.root, self.cameras_path)

    def _gaussians(self) -> Path:
        if self.gaussians_path is None:
            return find_gaussians(self.root)
        path = given_path(self.root, self.gaussians_path)
        return find_gaussians(path) if path.is_dir() else path

    def _text_encoder(self) -> TextEncoder | None:
        if self._encoder is None:
            table = self.root / "text_embeddings.npz"
            self._encoder = self.text or (TextEmbeddingTable(table) if table.is_file() else None)
        return self._encoder

    def _read_labels(self, posed: Mapping[str, PosedImage]) -> dict[str, LabelledFrame]:
        if self.labels is not None:
            folder = given_path(self.root, self.labels)
        else:
            usual = (self.root / "label", self.root.parent / "label" / self.root.name)
            present = [path for path in usual if path.is_dir()]
            if not present:
                return {}
            folder = present[0]
        frames = read_lerf_labels(folder)
        unknown = sorted(set(frames) - set(posed))
        if unknown:
            raise ValueError(
                f"{folder} labels images which {self._cameras()} does not have: {_listing(unknown)}. Give the labels "
                "of this scene, or move these files away."
            )
        for stem, frame in frames.items():
            camera = posed[stem].camera
            if not _same_aspect(camera.width, camera.height, frame.width, frame.height):
                raise ValueError(
                    f"{folder / stem}.json was labelled on an image of {frame.width} x {frame.height}, but the camera "
                    f"of {posed[stem].name} is {camera.width} x {camera.height}; allowed: the same aspect. Give the "
                    "labels of these photos."
                )
        return frames

    def _match_features(self, posed: Mapping[str, PosedImage], frames: Mapping[str, LabelledFrame]) -> set[str]:
        """Returns the stems of the views with features, after complaining of those that have no partner."""
        folder = self.root / self.features
        stems = feature_stems(folder)
        if self.allow_missing_features:
            return stems & set(posed)
        if not stems:
            raise FileNotFoundError(
                f"{folder} {'holds no <stem>_f.npy' if folder.is_dir() else 'does not exist'}. Run the preprocessing "
                "(SAM and CLIP) on the photos, give the folder as data.init_args.features, or set "
                "data.init_args.allow_missing_features=true to look at the scene without training."
            )
        without = sorted(set(posed) - stems - set(frames) - set(self.held_out or ()))
        if without:
            raise ValueError(
                f"{folder} lacks the features of {len(without)} of {len(posed)} images: {_listing(without)}. Run the "
                "preprocessing for them, or set data.init_args.allow_missing_features=true."
            )
        unposed = sorted(stems - set(posed))
        if unposed:
            raise ValueError(
                f"{folder} has features of {len(unposed)} images which {self._cameras()} does not have: "
                f"{_listing(unposed)}. Perhaps COLMAP could not place them. Remove them, or set "
                "data.init_args.allow_missing_features=true."
            )
        return stems

    def _match_photos(self, posed: Mapping[str, PosedImage]) -> dict[str, Path]:
        if not self.load_images:
            return {}
        folder = self.root / self.images
        photos, missing = find_photos(folder, posed.values())
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(posed)} photos of {self._cameras()}: {_listing(missing)}. "
                "Copy them there, or set data.init_args.load_images=false."
            )
        for stem, path in photos.items():
            camera, (width, height) = posed[stem].camera, photo_size(path)
            if not _same_aspect(camera.width, camera.height, width, height):
                raise ValueError(
                    f"{path} is {width} x {height}, but its camera is {camera.width} x {camera.height}; allowed: the "
                    "same aspect. Give the photos the cameras were computed from."
                )
        return photos

    def _read_view(
        self, stem: str, image: PosedImage, has_features: bool, photo: Path | None, frame: LabelledFrame | None
    ) -> StoredView:
        camera = image.camera
        size = _target_size(camera.width, camera.height, self.resolution)
        if not has_features:
            return StoredView(stem, resize_camera(camera, *size), photo, None, None, frame)
        folder = self.root / self.features
        features, mask_ids = read_language_features(folder, stem).of_levels(self.levels)
        height, width = mask_ids.shape[1:]
        fits = (width, height) == size if self.resolution != -1 else True
        if not fits or not _same_aspect(camera.width, camera.height, width, height):
            raise ValueError(
                f"{folder / stem}_s.npy is {width} x {height}, but the camera of {image.name} is {camera.width} x "
                f"{camera.height} (resolution {self.resolution}: {size[0]} x {size[1]}); allowed: that size, or with "
                "resolution -1 any of the same aspect. Run the preprocessing on these photos at this resolution."
            )
        ids = compact_ids(mask_ids, len(features))
        return StoredView(stem, resize_camera(camera, width, height), photo, ids, features, frame)

    def _check_channels(self) -> None:
        dims = {view.name: view.mask_features.shape[1] for view in self._stored if view.mask_features is not None}
        first = next(iter(dims), None)
        for name, dim in dims.items():
            if first is not None and dim != dims[first]:
                raise ValueError(
                    f"{self.root / self.features / name}_f.npy has {dim} channels but {first}_f.npy has {dims[first]}; "
                    "allowed: one CLIP model for all photos. Run the preprocessing again."
                )

    def _check_names(self) -> None:
        names = [view.name for view in self._stored]
        train_views = self.train_views if isinstance(self.train_views, list) else []
        for argument, given in (
            ("train_views", train_views),
            ("val_names", self.val_names),
            ("held_out", self.held_out),
        ):
            unknown = [name for name in given or () if name not in names]
            if unknown:
                close = difflib.get_close_matches(unknown[0], names, n=3) or names[:3]
                raise ValueError(
                    f"{argument} names views which {self.root} does not have: {_listing(unknown)}; allowed: stems of "
                    f"its {len(names)} photos, such as {', '.join(close)}."
                )
        if isinstance(self.train_views, int) and self.train_views < 1:
            raise ValueError(f"train_views is {self.train_views}; allowed: 1 or more, names, or null for all.")

    def _encode_labels(self, frames: Mapping[str, LabelledFrame]) -> None:
        """Encodes prompts and negatives now, so that a missing one is told before training."""
        categories = sorted({thing.category for frame in frames.values() for thing in frame.objects})
        if self._text_encoder() is None and not categories:
            return
        embeddings = self.encode_text([*self.negatives, *categories])
        if embeddings.shape[1] != self.feature_dim:
            raise ValueError(
                f"The text encoder gives {embeddings.shape[1]} channels, but {self.root / self.features} has "
                f"{self.feature_dim}; allowed: the CLIP model of the features. Set data.init_args.text to it."
            )

    def _read_ceiling(self, num_gaussians: int) -> CeilingField | None:
        path = self.root / "ceiling.npz"
        if not path.is_file() or 0 in self.levels:
            return None
        with np.load(path, allow_pickle=False) as content:
            ids = torch.from_numpy(content["gaussian_part_ids"].astype(np.int64))
            field = CeilingField(
                ids[:, [level - 1 for level in self.levels]],
                torch.from_numpy(content["features"].astype(np.float32)),
                torch.from_numpy(content["is_floater"].astype(bool)),
            )
        if len(field.ids) != num_gaussians:
            raise ValueError(
                f"{path} is about {len(field.ids)} Gaussians but the scene has {num_gaussians}. Remove it, or write "
                "the world again."
            )
        return field


def _target_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """LangSplat's rule: -1 limits the height to 1080; 1, 2, 4, 8 divide; anything else is the width."""
    if resolution == -1:
        scale = max(height / 1080, 1.0)
    elif resolution in (1, 2, 4, 8):
        return round(width / resolution), round(height / resolution)
    else:
        scale = width / resolution
    return int(width / scale), int(height / scale)


def _same_aspect(width: int, height: int, other_width: int, other_height: int) -> bool:
    """Whether two sizes are of the same picture, up to the rounding of the smaller one to whole pixels."""
    if other_width > width:
        width, height, other_width, other_height = other_width, other_height, width, height
    return abs(height * other_width - other_height * width) <= max(width, height)


def _listing(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
