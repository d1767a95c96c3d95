"""Frames of ScanNet scenes as samples: views of one scene with the points they see."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy.spatial import cKDTree
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batches import SceneFrames
from datamodules.readers.feature_records import FeatureStore
from datamodules.readers.scannet.frame_source import (
    AnnotatedPoints,
    Frame,
    FrameSource,
    concatenated,
    registered_depth,
    scaled_intrinsics,
)
from datamodules.samplers import OrderedViews, ShuffledViews
from lightning_modules.functional.bi_fusion.voxel_keys import voxel_keys
from lightning_modules.functional.cameras import Camera, project_points
from lightning_modules.functional.projection import build_uv_index

MOST_VERTICES = 2_000_000  # of annotated meshes in memory, about 300 MB in each process
VOXEL_M = 0.05  # of the ids of surface points where there is no mesh


class SampleSettings(NamedTuple):
    """What is made of frames; see :class:`datamodules.scannet.ScanNetDataModule`.

    Attributes:
        image_size: Height and width of images.
        depth_size: Height and width of depth maps.
        points: Where points come from: ``depth``, ``stored`` or ``mesh``.
        max_points: Most points of a sample; 0 = all.
        label_distance_m: How far a point may lie from the vertex whose label it takes.
        class_tables: Tables that labels are given in.
        seed: Of the draws.
        cache_mib: Memory for frames as they are read.
    """

    image_size: tuple[int, int]
    depth_size: tuple[int, int]
    points: str
    max_points: int
    label_distance_m: float
    class_tables: tuple[str, ...]
    seed: int
    cache_mib: int


class Window(NamedTuple):
    """Frames of one scene that make a sample.

    Attributes:
        scene: Its name.
        frame_ids: Their numbers.
    """

    scene: str
    frame_ids: tuple[int, ...]


class SceneSample(NamedTuple):
    """One scene of a batch; see :class:`datamodules.batches.SceneFrames`."""

    scene: str
    frame_ids: tuple[int, ...]
    points: AnnotatedPoints
    intrinsics: Float[Tensor, "views 3 3"]
    camera_from_world: Float[Tensor, "views 4 4"]
    image_size: tuple[int, int]
    images: UInt8[Tensor, "views height width 3"] | None
    depth: Float[Tensor, "views depth_height depth_width"]
    tokens: Float[Tensor, "views channels grid_height grid_width"] | None
    clip_global: Float[Tensor, "views text"] | None


class _View(NamedTuple):
    """A frame and what of it does not change from sample to sample."""

    frame: Frame  # with the photo and the depth that points are made of
    image: Tensor | None  # squashed
    depth: Tensor  # as the colour camera sees it
    intrinsics: Tensor  # at the size of the squashed image


class ScanNetSamples(Dataset[SceneSample]):
    """Samples of some windows, or of windows drawn anew each epoch.

    Args:
        source: Where the frames are.
        windows: Frames of each sample; for drawn windows, all frames of each scene.
        settings: What is made of them.
        store: Where tokens come from instead of images, or None.
        views_per_sample: Draw so many consecutive frames of a window; None takes the window.
        samples_per_scene: Times each window is drawn from in an epoch.
    """

    def __init__(
        self,
        source: FrameSource,
        windows: Sequence[Window],
        settings: SampleSettings,
        store: FeatureStore | None,
        *,
        views_per_sample: int | None = None,
        samples_per_scene: int = 1,
    ) -> None:
        self.source, self.windows, self.settings, self.store = source, list(windows), settings, store
        self.views_per_sample, self.samples_per_scene = views_per_sample, samples_per_scene
        self._views: dict[tuple[str, int], _View] = {}
        self._free_bytes = settings.cache_mib * 2**20
        self._meshes: OrderedDict[str, tuple[AnnotatedPoints, cKDTree] | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.windows) * self.samples_per_scene

    def __iter__(self) -> Iterator[SceneSample]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> SceneSample:
        """Makes a sample; positions of later epochs go on from those of the first, see :class:`ShuffledSamples`."""
        epoch, index = divmod(position, len(self))
        draw = np.random.default_rng((self.settings.seed, epoch, index))
        window = self.windows[index // self.samples_per_scene]
        if self.views_per_sample is not None:
            start = int(draw.integers(max(len(window.frame_ids) - self.views_per_sample, 0) + 1))
            window = window._replace(frame_ids=window.frame_ids[start : start + self.views_per_sample])
        return self._sample(window, draw)

    def __getstate__(self) -> dict[str, object]:
        # Other processes read for themselves.
        return {**self.__dict__, "_views": {}, "_free_bytes": self.settings.cache_mib * 2**20, "_meshes": OrderedDict()}

    def _sample(self, window: Window, draw: np.random.Generator) -> SceneSample:
        views = [self._view(window.scene, frame_id) for frame_id in window.frame_ids]
        records = [] if self.store is None else [self.store.read(window.scene, f) for f in window.frame_ids]
        return SceneSample(
            window.scene,
            window.frame_ids,
            self._points(window.scene, [view.frame for view in views], draw),
            torch.stack([view.intrinsics for view in views]),
            torch.stack([view.frame.camera.camera_from_world for view in views]),
            self.settings.image_size,
            None if records else torch.stack([_known(view.image) for view in views]),
            torch.stack([view.depth for view in views]),
            torch.stack([record.tokens for record in records]) if records else None,
            torch.stack([record.clip_global for record in records]) if records else None,
        )

    def _view(self, scene: str, frame_id: int) -> _View:
        key = (scene, frame_id)
        if key in self._views:
            return self._views[key]
        kind, (height, width) = self.settings.points, self.settings.image_size
        frame = self.source.load(scene, frame_id, with_image=self.store is None or kind == "depth")
        view = _View(
            frame._replace(
                image=frame.image if kind == "depth" else None, depth=None if kind == "stored" else frame.depth
            ),
            None if self.store is not None else squashed(_known(frame.image), height, width),
            registered_depth(frame, *self.settings.depth_size),
            scaled_intrinsics(frame.camera.intrinsics, (frame.camera.width, frame.camera.height), (width, height)),
        )
        parts = (view.frame.image, view.frame.depth, view.image, view.depth)
        num_bytes = sum(part.nbytes for part in parts if part is not None)
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._views[key] = view
        return view

    def _points(self, scene: str, frames: Sequence[Frame], draw: np.random.Generator) -> AnnotatedPoints:
        if self.settings.points == "mesh":
            return drawn_points(self._seen_vertices(scene, frames), self.settings.max_points or None, draw)
        per_frame = self.settings.max_points // len(frames) if self.settings.max_points else None
        if self.settings.points == "depth":
            return self._annotated(scene, concatenated([lifted_points(frame, per_frame, draw) for frame in frames]))
        stored = [_known(self.source.stored_points(scene, frame.frame_id)) for frame in frames]
        return self._annotated(scene, concatenated([drawn_points(points, per_frame, draw) for points in stored]))

    def _mesh(self, scene: str) -> tuple[AnnotatedPoints, cKDTree] | None:
        if scene not in self._meshes:
            mesh = self.source.mesh(scene)
            self._meshes[scene] = None if mesh is None else (mesh, cKDTree(mesh.points[:, :3].numpy()))
            sizes = [0 if found is None else len(found[0].points) for found in self._meshes.values()]
            while len(sizes) > 1 and sum(sizes) > MOST_VERTICES:
                self._meshes.popitem(last=False)
                sizes.pop(0)
        self._meshes.move_to_end(scene)
        return self._meshes[scene]

    def _annotated(self, scene: str, points: AnnotatedPoints) -> AnnotatedPoints:
        """Gives points what the nearest vertex of the mesh knows and they do not."""
        found = self._mesh(scene)
        if found is None:
            return points._replace(vertex_ids=voxel_keys(points.points[:, :3], VOXEL_M))
        mesh, tree = found
        distances, nearest = (torch.from_numpy(part) for part in tree.query(points.points[:, :3].numpy()))
        is_near = distances <= self.settings.label_distance_m

        def of_nearest(column: Int[Tensor, " vertices"]) -> Int[Tensor, " points"]:
            return torch.where(is_near, column[nearest], -1)

        instances, superpoints = points.instances, points.superpoints
        if instances is None and mesh.instances is not None:
            instances = of_nearest(mesh.instances)
        if superpoints is None and mesh.superpoints is not None:
            superpoints = mesh.superpoints[nearest]  # however far: each point is in some group
        labels = {table: of_nearest(indices) for table, indices in mesh.labels.items() if table not in points.labels}
        return AnnotatedPoints(
            points.points, points.labels | labels, instances, superpoints, torch.where(is_near, nearest, -1)
        )

    def _seen_vertices(self, scene: str, frames: Sequence[Frame]) -> AnnotatedPoints:
        mesh = _known(self._mesh(scene))[0]
        seen = torch.zeros(len(mesh.points), dtype=torch.bool)
        for frame in frames:
            camera = frame.depth_camera
            size = (camera.height, camera.width)
            index = build_uv_index(
                mesh.points[:, :3], camera.intrinsics, camera.camera_from_world, size, _known(frame.depth)
            )
            seen |= index.valid
        return mesh.rows(seen.nonzero()[:, 0])


class ShuffledSamples(ShuffledViews):
    """A new order each epoch; positions carry the epoch, from which a sample's draws follow."""

    def order_of_epoch(self, epoch: int) -> list[int]:
        """Returns this process's samples in the order of an epoch."""
        count = len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset does not declare its length
        return [epoch * count + index for index in super().order_of_epoch(epoch)]


class WholeScenes(OrderedViews):
    """The windows in order, with all windows of a scene in one process: metrics are streamed scene by scene.

    Args:
        dataset: The samples.
        num_replicas: Number of processes; by default that of the process group.
        rank: Rank of this one.
    """

    def __init__(self, dataset: ScanNetSamples, num_replicas: int | None = None, rank: int | None = None) -> None:
        super().__init__(dataset, num_replicas, rank)
        scenes = dict.fromkeys(window.scene for window in dataset.windows)
        own = set(list(scenes)[self.rank :: self.num_replicas])
        self._positions = [position for position, window in enumerate(dataset.windows) if window.scene in own]

    def __iter__(self) -> Iterator[int]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


def lifted_points(frame: Frame, count: int | None, draw: np.random.Generator) -> AnnotatedPoints:
    """Lifts some pixels with depth to points, with the photo's colours.

    Args:
        frame: With photo and depth.
        count: How many; None = all. Of fewer, each once.
        draw: Where the choice comes from.
    """
    depth, photo = _known(frame.depth), _known(frame.image)
    pixels = (torch.isfinite(depth) & (depth > 0)).flatten().nonzero()[:, 0]
    if count is not None and count < len(pixels):
        pixels = pixels[torch.from_numpy(np.sort(draw.choice(len(pixels), count, replace=False, shuffle=False)))]
    xyz = lifted_pixels(depth.flatten()[pixels], pixels % depth.shape[1], pixels // depth.shape[1], frame.depth_camera)
    uv, _ = project_points(xyz, frame.camera)
    columns, rows = uv.floor().long().unbind(1)
    rgb = photo[rows.clamp(0, photo.shape[0] - 1), columns.clamp(0, photo.shape[1] - 1)].float() / 255
    return AnnotatedPoints(torch.cat([xyz, rgb], dim=1), {}, None, None, None)


def lifted_pixels(
    depth: Float[Tensor, " pixels"], columns: Int[Tensor, " pixels"], rows: Int[Tensor, " pixels"], camera: Camera
) -> Float[Tensor, "pixels 3"]:
    """Lifts some pixels to world points: ``back_project`` at a fraction of the cost where few are wanted."""
    x = (columns + 0.5 - camera.intrinsics[0, 2]) / camera.intrinsics[0, 0]
    y = (rows + 0.5 - camera.intrinsics[1, 2]) / camera.intrinsics[1, 1]
    in_camera = torch.stack([x * depth, y * depth, depth], dim=1)
    return in_camera @ camera.camera_from_world[:3, :3] + camera.position


def squashed(image: UInt8[Tensor, "rows columns 3"], height: int, width: int) -> UInt8[Tensor, "height width 3"]:
    """Resizes a photo without regard to its aspect, by CLIP's bicubic filter, as wide as the reduction asks for."""
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))


def collate(samples: Sequence[SceneSample], class_tables: Sequence[str]) -> SceneFrames:
    """Puts scenes into one batch; those with fewer views are padded with empty ones."""
    most = max(len(sample.frame_ids) for sample in samples)
    tables = [table for table in class_tables if any(table in sample.points.labels for sample in samples)]

    def padded(parts: Sequence[Tensor]) -> Tensor:
        rows = [torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])]) for part in parts]
        return torch.stack(rows)

    def all_or_none(parts: Sequence[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        return padded(known) if known else None

    def column(parts: Sequence[Int[Tensor, " _"] | None]) -> tuple[Int[Tensor, " _"], ...] | None:
        known = [part for part in parts if part is not None]
        return tuple(known) if len(known) == len(parts) else None

    has_frame = padded([torch.ones(len(sample.frame_ids), dtype=torch.bool) for sample in samples])
    camera_from_world = padded([sample.camera_from_world for sample in samples])
    intrinsics = padded([sample.intrinsics for sample in samples])
    camera_from_world[~has_frame] = torch.eye(4)
    intrinsics[~has_frame] = torch.eye(3)
    frame_ids = padded([torch.tensor(sample.frame_ids) for sample in samples])
    groups = column([sample.points.superpoints for sample in samples])
    return SceneFrames(
        scenes=tuple(sample.scene for sample in samples),
        frame_ids=torch.where(has_frame, frame_ids, -1),
        has_frame=has_frame,
        points=tuple(sample.points.points for sample in samples),
        intrinsics=intrinsics,
        camera_from_world=camera_from_world,
        image_size=samples[0].image_size,
        images=all_or_none([sample.images for sample in samples]),
        depth=padded([sample.depth for sample in samples]),
        tokens=all_or_none([sample.tokens for sample in samples]),
        clip_global=all_or_none([sample.clip_global for sample in samples]),
        labels={table: tuple(_labels(sample.points, table) for sample in samples) for table in tables},
        instances=column([sample.points.instances for sample in samples]),
        superpoints=None if groups is None else tuple(part.unique(return_inverse=True)[1] for part in groups),
        vertex_ids=column([sample.points.vertex_ids for sample in samples]),
    )


def _labels(points: AnnotatedPoints, table: str) -> Int[Tensor, " points"]:
    labels = points.labels.get(table)
    return torch.full((len(points.points),), -1) if labels is None else labels


def drawn_points(points: AnnotatedPoints, count: int | None, draw: np.random.Generator) -> AnnotatedPoints:
    """Takes some points without repeating any; all, where there are no more or none are to be left out."""
    if count is None or count >= len(points.points):
        return points
    kept = np.sort(draw.choice(len(points.points), count, replace=False, shuffle=False))
    return points.rows(torch.from_numpy(kept))


Part = TypeVar("Part")


def _known(part: Part | None) -> Part:
    assert part is not None
    return part
