"""Scenes in the layout of LERF-OVS and LangSplat: posed photographs, a Gaussian scene, per-mask features, labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from datamodules.batches import StoredField, single_view
from datamodules.language_views import LanguageViews, StoredView, compact_ids
from datamodules.predicted_views import predicted_views
from datamodules.readers.gaussians import read_gaussians
from datamodules.readers.labels import LabelFrame, find_labels, match_labels, read_labels
from datamodules.readers.langsplat_fields import read_langsplat_field
from datamodules.readers.language_features import NUM_GRANULARITIES, read_language_features
from datamodules.readers.photos import check_resolution, same_aspect, target_size
from datamodules.readers.posed_images import PosedImage, name_list, similar_names
from datamodules.readers.scene_layout import (
    feature_stems,
    find_cameras,
    find_gaussians,
    given_path,
    match_photos,
    read_cameras,
)
from datamodules.readers.text_embeddings import TextEmbeddingTable, TextEncoder
from datamodules.samplers import OrderedViews, ShuffledViews, process_rank
from lightning_modules.functional.camera_paths import CameraPathSettings
from lightning_modules.functional.cameras import resize_camera
from lightning_modules.functional.splatting.gaussians import GaussianScene

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
        labels: Folder of labels: ``<image>.json`` of LERF-OVS and Mip-NeRF360-OVS, or ``<frame>/<class>.png`` of
            3D-OVS. By default ``label`` or ``segmentations`` below ``root``, else ``../label/<scene>``; without any,
            nothing is evaluated.
        label_views: Match labels and views by ``name``, or by ``number`` as LangSplatV2 does: the number in a label's
            name counts the views in the order of their names (from 1; 3D-OVS from 0), which goes wrong where the
            reconstruction lost a view.
        native_labels: Keep labels at the size of the image they were drawn on, and resize features to it; by default
            labels are drawn at the size of the view. Mip-NeRF360-OVS is scored so.
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
        views: Views that ``predict`` shows: stems or numbers, from 0 in the order of the names; by default all.
        path: Let ``predict`` fly through those views and show what is seen on the way instead.
        langsplat_checkpoints: LangSplatV2's ``chkpnt*.pth``, one per level, for a module with
            ``initialisation="checkpoints"``; the first is the scene too, so that ``gaussians`` need not be given.
    """

    def __init__(
        self,
        root: str | Path,
        gaussians: str | Path | None = None,
        cameras: str | Path | None = None,
        images: str = "images",
        features: str = "language_features",
        labels: str | Path | None = None,
        label_views: Literal["name", "number"] = "name",
        native_labels: bool = False,
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
        views: list[str | int] | None = None,
        path: CameraPathSettings | None = None,
        langsplat_checkpoints: list[str] | None = None,
    ) -> None:
        super().__init__()
        # A process may have no view of a short evaluation; it waits for the others.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        if not levels or len(set(levels)) != len(levels) or not set(levels) <= set(range(NUM_GRANULARITIES)):
            raise ValueError(
                f"levels is {list(levels)}; allowed: some of 0 (default), 1 (small), 2 (medium), 3 (large), none twice."
            )
        check_resolution(resolution)
        self.root = Path(root)
        self.gaussians_path = gaussians
        self.cameras_path = cameras
        self.images = images
        self.features = features
        self.labels = labels
        self.label_views = label_views
        self.native_labels = native_labels
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
        self.predicted = views
        self.path = path
        self.langsplat_checkpoints = langsplat_checkpoints
        self.stored_field: StoredField | None = None
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
        if self.langsplat_checkpoints is not None:
            if self.gaussians_path is not None:
                rank_zero_warn(
                    "data.init_args.gaussians is left alone: langsplat_checkpoints bring their own Gaussians."
                )
            self.stored_field = read_langsplat_field(self.langsplat_checkpoints, self.num_levels)
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
        predicted_views(self._stored, self.predicted, self.path)  # a wrong name is told now
        scene = read_gaussians(self._gaussians()) if self.stored_field is None else self.stored_field.scene
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
        return sorted({category for frame in frames for category in frame.categories})

    @property
    def known_phrases(self) -> list[str]:
        """Phrases to offer where none is given: the labelled categories, else those of an offline table."""
        table = self._text_encoder()
        known = table.phrases if isinstance(table, TextEmbeddingTable) else ()
        return self.prompts or [phrase for phrase in known if phrase not in self.negatives]

    @property
    def feature_dim(self) -> int:
        """Channels of the features."""
        for view in self._stored:
            if view.mask_features is not None:
                return view.mask_features.shape[1]
        if self.stored_field is not None:
            return self.stored_field.codebooks.shape[3]
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
        """The views of ``views``, or those on ``path``; without photographs, which pictures are not made of."""
        stored, view_ids = predicted_views(self._stored, self.predicted, self.path)
        return self._loader_of(LanguageViews(stored, view_ids, self._embedding_of, with_photos=False))

    def _ordered_loader(self, view_ids: Sequence[int], with_photos: bool) -> DataLoader:
        return self._loader_of(self._dataset(view_ids, with_photos))

    def _loader_of(self, dataset: LanguageViews) -> DataLoader:
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

    def _read_labels(self, posed: Mapping[str, PosedImage]) -> dict[str, LabelFrame]:
        folder = find_labels(self.root, self.labels)
        if folder is None:
            return {}
        return match_labels(folder, read_labels(folder), posed, self._cameras(), self.label_views)

    def _match_features(self, posed: Mapping[str, PosedImage], frames: Mapping[str, LabelFrame]) -> set[str]:
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
                f"{folder} lacks the features of {len(without)} of {len(posed)} images: {name_list(without)}. Run the "
                "preprocessing for them, or set data.init_args.allow_missing_features=true."
            )
        unposed = sorted(stems - set(posed))
        if unposed:
            raise ValueError(
                f"{folder} has features of {len(unposed)} images which {self._cameras()} does not have: "
                f"{name_list(unposed)}. Perhaps COLMAP could not place them. Remove them, or set "
                "data.init_args.allow_missing_features=true."
            )
        return stems

    def _match_photos(self, posed: Mapping[str, PosedImage]) -> dict[str, Path]:
        if not self.load_images:
            return {}
        otherwise = " Or set data.init_args.load_images=false."
        return match_photos(self.root / self.images, posed, self._cameras(), otherwise=otherwise)

    def _read_view(
        self, stem: str, image: PosedImage, has_features: bool, photo: Path | None, frame: LabelFrame | None
    ) -> StoredView:
        camera = image.camera
        size = target_size(camera.width, camera.height, self.resolution)
        if not has_features:
            return StoredView(stem, resize_camera(camera, *size), photo, None, None, frame, self.native_labels)
        folder = self.root / self.features
        features, mask_ids = read_language_features(folder, stem).of_levels(self.levels)
        height, width = mask_ids.shape[1:]
        fits = (width, height) == size if self.resolution != -1 else True
        if not fits or not same_aspect(camera.width, camera.height, width, height):
            raise ValueError(
                f"{folder / stem}_s.npy is {width} x {height}, but the camera of {image.name} is {camera.width} x "
                f"{camera.height} (resolution {self.resolution}: {size[0]} x {size[1]}); allowed: that size, or with "
                "resolution -1 any of the same aspect. Run the preprocessing on these photos at this resolution."
            )
        ids = compact_ids(mask_ids, len(features))
        camera = resize_camera(camera, width, height)
        return StoredView(stem, camera, photo, ids, features, frame, self.native_labels)

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
                raise ValueError(
                    f"{argument} names views which {self.root} does not have: {name_list(unknown)}; allowed: stems of "
                    f"its {len(names)} photos, such as {similar_names(unknown[0], names)}."
                )
        if isinstance(self.train_views, int) and self.train_views < 1:
            raise ValueError(f"train_views is {self.train_views}; allowed: 1 or more, names, or null for all.")

    def _encode_labels(self, frames: Mapping[str, LabelFrame]) -> None:
        """Encodes prompts and negatives now, so that a missing one is told before training."""
        categories = sorted({category for frame in frames.values() for category in frame.categories})
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
        is_about_these = self._gaussians().resolve().parent == self.root.resolve()  # not about trained ones
        if not path.is_file() or 0 in self.levels or not is_about_these:
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
