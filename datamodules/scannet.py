"""ScanNet's RGB-D frames with points, labels and cameras, in any layout it is used in."""

import functools
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from datamodules.readers.feature_records import FeatureStore
from datamodules.readers.feature_store import open_feature_store
from datamodules.readers.posed_images import name_list
from datamodules.readers.scannet.class_tables import CLASS_TABLES
from datamodules.readers.scannet.frame_source import FrameSource, SceneReport
from datamodules.readers.scannet.layouts import open_scannet
from datamodules.readers.scannet.raw_scans import read_scene_list
from datamodules.readers.scannet.survey import survey, survey_table
from datamodules.readers.text_embeddings import TextEmbeddingTable, TextEncoder
from datamodules.samplers import OrderedViews
from datamodules.scannet_samples import SampleSettings, ScanNetSamples, ShuffledSamples, WholeScenes, Window, collate

SPLITS = ("train", "val", "test")


class ScanNetDataModule(LightningDataModule):
    """Views of ScanNet's scenes with the points they see.

    Training takes consecutive kept frames of a scene from a random one on; validation and test take all kept frames in
    order, scene by scene, each scene in one process; ``predict`` takes single frames. All poses and points are in the
    unaligned world. Nothing is augmented here: points must be where the cameras see them.

    Before anything is read for a run, all scenes are looked through; what each lacks is told in a table, frames without
    photo, depth or pose are left out, and so are those that cannot be decoded.

    Args:
        root: The data set's folder.
        layout: What it is laid out like: ``raw`` (exported or ``.sens``), ``esam_mv``, ``esam_sv``, ``openscene``,
            ``pointcept``; ``auto`` looks.
        class_tables: Tables that labels are given in, the first to be trained and judged by.
        scenes_file: Names of scenes, one in a line; all others are left out.
        train_scenes: Names of scenes to train on; by default those of the layout or of ``scannetv2_train.txt``.
        val_scenes: Likewise for validation; where nothing states them, every tenth room.
        test_scenes: Likewise for the test; where those that are stated have no labels, or none are, ``val``'s.
        frames_per_scene: Frames of each scene in ``predict``, evenly spread; 0 = all.
        frame_stride: Frames whose number it divides are kept. ESAM keeps every 40th in ``-mv``, OpenScene every 20th.
        views_per_sample: Frames of a sample in training.
        eval_views_per_sample: Frames of a sample in validation and test; 0 = as in training.
        samples_per_scene: Samples of each scene in an epoch of training.
        points: ``depth`` lifts each frame's own depth, ``stored`` takes the points the layout keeps for it, ``mesh``
            takes the vertices its frames see; ``auto`` takes ``stored`` where there are any, else ``depth``.
        max_points: Points of a sample, drawn evenly from its frames; 0 = all.
        label_distance_m: A point takes the label of the nearest vertex up to so far away.
        image_size: Height and width that photos are squashed to.
        depth_size: Height and width of the depth maps beside them.
        intrinsics: ``per_scene``, or ``fixed`` for the one matrix most code uses.
        frames_root: Raw scans with the frames, for Pointcept's layout.
        offline_clip_feat: Take tokens from ``feature_store`` instead of photos.
        feature_store: Folder of the store.
        text: Encoder of class names. By default the table ``text_embeddings.npz`` below ``root``.
        batch_size: Samples of a batch in training and frames in ``predict``, in each process; one elsewhere.
        check_images: Decode every image and read all points when scenes are looked through, once: 25 ms of CPU a frame
            at ScanNet's sizes.
        index: Folder for what was found; by default ``scene_reports`` below ``root``.
        cache_mib: Memory for frames as they are read, in each reading process.
        num_workers: Processes that read; 0 reads in the training's own.
        seed: Of the order of samples, their frames and their points.
    """

    def __init__(
        self,
        root: str | Path = "data/scannet",
        layout: str = "auto",
        class_tables: Sequence[str] = ("scannet20", "scannet200"),
        scenes_file: str | Path | None = None,
        train_scenes: list[str] | None = None,
        val_scenes: list[str] | None = None,
        test_scenes: list[str] | None = None,
        frames_per_scene: int = 0,
        frame_stride: int = 20,
        views_per_sample: int = 4,
        eval_views_per_sample: int = 0,
        samples_per_scene: int = 1,
        points: str = "auto",
        max_points: int = 20000,
        label_distance_m: float = 0.05,
        image_size: tuple[int, int] = (224, 224),
        depth_size: tuple[int, int] = (240, 320),
        intrinsics: str = "per_scene",
        frames_root: str | Path | None = None,
        offline_clip_feat: bool = False,
        feature_store: str | Path | None = None,
        text: TextEncoder | None = None,
        batch_size: int = 2,
        check_images: bool = True,
        index: str | Path | None = None,
        cache_mib: int = 1024,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # A process may have no scene of a short evaluation; it waits for the others.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        for name, value, least in (
            ("frames_per_scene", frames_per_scene, 0),
            ("views_per_sample", views_per_sample, 1),
            ("eval_views_per_sample", eval_views_per_sample, 0),
            ("samples_per_scene", samples_per_scene, 1),
            ("max_points", max_points, 0),
            ("batch_size", batch_size, 1),
            ("image_size", min(image_size), 1),
            ("depth_size", min(depth_size), 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; allowed: {least} or more.")
        if 0 < max_points < max(views_per_sample, eval_views_per_sample):
            raise ValueError(f"max_points is {max_points}, fewer than views in a sample; allowed: 0 for all, or more.")
        if label_distance_m <= 0:
            raise ValueError(f"label_distance_m is {label_distance_m}; allowed: above 0.")
        unknown = [table for table in class_tables if table not in CLASS_TABLES]
        if unknown or not class_tables:
            raise ValueError(f"class_tables is {list(class_tables)}; allowed: some of {', '.join(CLASS_TABLES)}.")
        if points not in ("auto", "depth", "stored", "mesh"):
            raise ValueError(f"points is {points!r}; allowed: auto, depth, stored, mesh.")
        if offline_clip_feat and feature_store is None:
            raise ValueError(
                "offline_clip_feat is set, but there is no data.init_args.feature_store to take tokens from."
            )
        self.root, self.layout, self.class_tables = Path(root), layout, tuple(class_tables)
        self.scenes_file = None if scenes_file is None else Path(scenes_file)
        self._stated = {"train": train_scenes, "val": val_scenes, "test": test_scenes}
        self.frames_per_scene, self.frame_stride = frames_per_scene, frame_stride
        self.views_per_sample = views_per_sample
        self.eval_views_per_sample = eval_views_per_sample or views_per_sample
        self.samples_per_scene = samples_per_scene
        self.points, self.max_points, self.label_distance_m = points, max_points, label_distance_m
        self.image_size, self.depth_size = (image_size[0], image_size[1]), (depth_size[0], depth_size[1])
        self.intrinsics, self.frames_root = intrinsics, frames_root
        self.offline_clip_feat, self.feature_store, self.text = offline_clip_feat, feature_store, text
        self.batch_size, self.num_workers, self.seed, self.cache_mib = batch_size, num_workers, seed, cache_mib
        self.check_images = check_images
        self.index = self.root / "scene_reports" if index is None else Path(index)
        self._source: FrameSource | None = None
        self._reports: dict[str, SceneReport] = {}
        self._frames: dict[str, tuple[int, ...]] = {}
        self._done: frozenset[tuple[str, int]] = frozenset()
        self._encoder: TextEncoder | None = None
        self._embedding_of: dict[str, Tensor] = {}

    # What is there

    @property
    def source(self) -> FrameSource:
        """The scenes as they lie on disk."""
        if self._source is None:
            self._source = open_scannet(
                self.root,
                self.layout,
                intrinsics=self.intrinsics,
                frame_stride=self.frame_stride,
                frames_root=self.frames_root,
            )
        return self._source

    @functools.cached_property
    def store(self) -> FeatureStore | None:
        """Where tokens come from, or None where photos are read."""
        if not self.offline_clip_feat:
            return None
        assert self.feature_store is not None
        return open_feature_store(self.feature_store, image_size=self.image_size)

    @property
    def projection(self) -> Float[Tensor, "channels text"] | None:
        """[D, C] of the store's tokens to text space, or None where photos are read."""
        return None if self.store is None else self.store.projection

    @override
    def prepare_data(self) -> None:
        """Looks through all scenes, in one process, and says what they lack."""
        reports = self._look_through(is_first=True)
        Console(stderr=True).print(survey_table(reports))

    @override
    def setup(self, stage: str | None = None) -> None:
        """Finds the frames to use.

        Raises:
            FileNotFoundError: If there is no data.
            ValueError: If no scene can be used, or a setting does not fit the data.
        """
        if self._frames:
            return
        self._reports = self._look_through(is_first=False)
        store_keys = None if self.store is None else set(self.store.keys())
        without_tokens = 0
        for scene, report in self._reports.items():
            kept = report.kept
            if self._point_kind == "stored":
                kept = tuple(frame for frame in kept if self.source.has_stored_points(scene, frame))
            elif self._point_kind == "mesh" and not self.source.has_mesh(scene):
                kept = ()
            if store_keys is not None:
                known = tuple(frame for frame in kept if (scene, frame) in store_keys)
                without_tokens += len(kept) - len(known)
                kept = known
            if kept:
                self._frames[scene] = kept
        if not self._frames:
            raise ValueError(self._nothing_left(without_tokens))
        unusable = [scene for scene in self._reports if scene not in self._frames]
        if unusable:
            rank_zero_warn(f"{len(unusable)} scenes of {len(self._reports)} cannot be used: {name_list(unusable)}.")
        if without_tokens:
            rank_zero_warn(f"{self.feature_store} has no tokens of {without_tokens} frames; they are left out.")
        rank_zero_info(
            f"{self.root.name}: {sum(map(len, self._frames.values()))} frames of {len(self._frames)} scenes."
        )

    @property
    def reports(self) -> dict[str, SceneReport]:
        """What each scene has and lacks; after ``setup``."""
        return self._reports

    def kept_frames(self, scene: str) -> tuple[int, ...]:
        """Returns the numbers of the frames of a scene that are used; after ``setup``."""
        return self._frames[scene]

    def scenes(self, split: str) -> tuple[str, ...]:
        """Returns the scenes of ``train``, ``val`` or ``test`` that can be used; after ``setup``.

        Raises:
            ValueError: If the split has none.
        """
        found = tuple(scene for scene in self._splits[split] if scene in self._frames)
        if not found:
            raise ValueError(
                f"{self.root} has no scene to use for {split}: stated are "
                f"{name_list(list(self._splits[split])) or 'none'}, usable are {name_list(list(self._frames))}. Give "
                f"names as data.init_args.{split}_scenes."
            )
        return found

    @functools.cached_property
    def _splits(self) -> dict[str, tuple[str, ...]]:
        stated = {
            split: self.source.split(split) if names is None else tuple(names) for split, names in self._stated.items()
        }
        allowed = set(self._frames)
        rooms = sorted({_room(scene) for scene in allowed})
        held_out = {room for position, room in enumerate(rooms) if position % 10 == 9} or set(rooms[-1:])
        val = stated["val"]
        if val is None:
            taken = {*(stated["train"] or ()), *(stated["test"] or ())}
            val = tuple(s for s in sorted(allowed - taken) if _room(s) in held_out or stated["train"] is not None)
        test = stated["test"]
        if test is None or (
            self._stated["test"] is None and not any(s in allowed and self._labels_of(s) for s in test)
        ):
            test = val
        train = stated["train"]
        if train is None:
            rooms_out = {_room(scene) for scene in (*val, *test)}
            train = tuple(scene for scene in sorted(allowed) if _room(scene) not in rooms_out)
        both = sorted({*train} & {*val, *test} & allowed)
        if both:
            rank_zero_warn(f"{len(both)} scenes are trained on and judged by: {name_list(both)}.")
        return {"train": train, "val": val, "test": test}

    def _labels_of(self, scene: str) -> tuple[str, ...]:
        return self._reports[scene].labels

    def _look_through(self, *, is_first: bool) -> dict[str, SceneReport]:
        scenes = self.source.scenes()
        if self.scenes_file is not None:
            wanted = read_scene_list(self.scenes_file)
            absent = sorted(set(wanted) - set(scenes))
            if len(absent) == len(set(wanted)):
                raise ValueError(
                    f"{self.scenes_file} names {name_list(absent)}, but {self.root} has {name_list(list(scenes))}. "
                    "Write names of these, one in a line."
                )
            if absent:
                rank_zero_warn(f"{self.root} lacks {len(absent)} scenes of {self.scenes_file}: {name_list(absent)}.")
            scenes = tuple(scene for scene in dict.fromkeys(wanted) if scene in set(scenes))
        index = self.index / f"{self.source.layout}_{self.intrinsics}_every_{self.frame_stride}"
        return survey(
            self.source,
            scenes,
            index,
            check_images=self.check_images,
            recheck=is_first,
            show_progress=is_first,
        )

    def _nothing_left(self, without_tokens: int) -> str:
        first = next(iter(self._reports.values()))
        if without_tokens:
            return (
                f"{self.feature_store} has no tokens of the {without_tokens} frames of {self.root}. Fill it with "
                "`python train.py predict --config configs/bi_fusion/store.yaml` for the same scenes and frame_stride."
            )
        missing = "no points are kept for its frames"
        if self._point_kind == "mesh":
            missing = "it has no mesh, whose vertices were asked for: set data.init_args.points=depth"
        return (
            f"None of the {len(self._reports)} scenes of {self.root} can be used. {first.scene}: {first.num_frames} "
            f"frames, {len(first.without_depth)} without depth, {len(first.without_pose)} without pose, "
            f"{len(first.bad_poses)} with bad poses; {first.problem or missing}."
        )

    # Classes

    def class_names(self, table: str) -> tuple[str, ...]:
        """Returns the names of a table's classes, in the order of the indices in ``labels``."""
        return CLASS_TABLES[table].names

    def class_groups(self, table: str) -> dict[str, tuple[int, ...]]:
        """Returns the indices of the classes of each group a table is judged by, such as ``head``."""
        found = CLASS_TABLES[table]
        return {group: tuple(found.group_indices(group).tolist()) for group in found.groups}

    def foreground_ids(self, table: str) -> tuple[int, ...]:
        """Returns the indices of a table's classes without walls, floors and the like."""
        found = CLASS_TABLES[table]
        return tuple(index for index, name in enumerate(found.names) if name not in found.not_foreground)

    def encode_text(self, phrases: Sequence[str]) -> Float[Tensor, "phrases channels"]:
        """Returns [Q, C] unit embeddings; each phrase is encoded once.

        Raises:
            ValueError: If there is no text encoder, or the encoder does not know a phrase.
        """
        missing = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._embedding_of]
        if missing:
            self._embedding_of.update(zip(missing, self._text_encoder().encode(missing), strict=True))
        return torch.stack([self._embedding_of[phrase] for phrase in phrases])

    def _text_encoder(self) -> TextEncoder:
        if self._encoder is None:
            table = self.root / "text_embeddings.npz"
            if self.text is None and not table.is_file():
                raise ValueError(
                    f"There is no encoder of class names: {table} does not exist. Write that table, or set "
                    "data.init_args.text to an OpenClipTextEncoder."
                )
            self._encoder = self.text or TextEmbeddingTable(table)
        return self._encoder

    # Batches

    @override
    def train_dataloader(self) -> StatefulDataLoader:
        """Samples of the training scenes in an order that follows from (seed, epoch), as do their frames and points."""
        dataset = self.samples("train")
        sampler = ShuffledSamples(dataset, self.seed)
        return self._loader(dataset, sampler, self.batch_size, drop_last=len(sampler) >= self.batch_size)

    @override
    def val_dataloader(self) -> DataLoader:
        """All kept frames of the validation scenes, scene by scene."""
        dataset = self.samples("val")
        return self._loader(dataset, WholeScenes(dataset), 1)

    @override
    def test_dataloader(self) -> DataLoader:
        """All kept frames of the test scenes, scene by scene."""
        dataset = self.samples("test")
        return self._loader(dataset, WholeScenes(dataset), 1)

    @override
    def predict_dataloader(self) -> DataLoader:
        """Single frames of all scenes."""
        dataset = self.samples("predict")
        return self._loader(dataset, OrderedViews(dataset), self.batch_size)

    def samples(self, split: str) -> ScanNetSamples:
        """Returns the samples of ``train``, ``val``, ``test`` or ``predict``; after ``setup``."""
        if split == "train":
            windows = [Window(scene, self._frames[scene]) for scene in self.scenes(split)]
            return self._dataset(windows, self.views_per_sample, self.samples_per_scene)
        if split == "predict":
            return self._dataset([
                Window(scene, (frame,)) for scene, frame in self.frames_to_predict() if (scene, frame) not in self._done
            ])  # fmt: skip
        step = self.eval_views_per_sample
        return self._dataset([
            Window(scene, self._frames[scene][start : start + step])
            for scene in self.scenes(split)
            for start in range(0, len(self._frames[scene]), step)
        ])  # fmt: skip

    def frames_to_predict(self) -> list[tuple[str, int]]:
        """Returns scene and number of the frames of ``predict``, those that are left out included."""
        return [
            (scene, frame)
            for scene, frames in self._frames.items()
            for frame in _evenly_spread(frames, self.frames_per_scene)
        ]

    def leave_out(self, done: Collection[tuple[str, int]]) -> None:
        """Leaves frames out of ``predict``, such as those whose results are whole."""
        self._done = frozenset(done)

    @property
    def _point_kind(self) -> str:
        if self.points == "auto":
            return "stored" if self.source.keeps_points else "depth"
        return self.points

    def _dataset(
        self, windows: Sequence[Window], views_per_sample: int | None = None, samples_per_scene: int = 1
    ) -> ScanNetSamples:
        settings = SampleSettings(
            self.image_size,
            self.depth_size,
            self._point_kind,
            self.max_points,
            self.label_distance_m,
            self.class_tables,
            self.seed,
            self.cache_mib,
        )
        return ScanNetSamples(
            self.source,
            windows,
            settings,
            self.store,
            views_per_sample=views_per_sample,
            samples_per_scene=samples_per_scene,
        )

    def _loader(
        self,
        dataset: ScanNetSamples,
        sampler: OrderedViews | ShuffledSamples,
        batch_size: int,
        *,
        drop_last: bool = False,
    ) -> StatefulDataLoader:
        return StatefulDataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=functools.partial(collate, class_tables=self.class_tables),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context="spawn" if self.num_workers else None,  # a fork of threads that compute can hang
        )


def _room(scene: str) -> str:
    """Scans of one room must not be on both sides of a split: ``scene0011_01`` is of ``scene0011``."""
    return re.sub(r"_\d\d$", "", scene)


def _evenly_spread(frames: tuple[int, ...], count: int) -> tuple[int, ...]:
    if count == 0 or count >= len(frames):
        return frames
    return tuple(frames[position] for position in np.linspace(0, len(frames) - 1, count).round().astype(int))
