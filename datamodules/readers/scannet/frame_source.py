"""What every layout of ScanNet is read as: scenes of RGB-D frames with cameras, and annotated points."""

import abc
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lightning_modules.functional.cameras import Camera

# Of ScanNet's depth camera, as ESAM, OpenScene, BPNet and 3DMV use for all scenes: 640 x 480, pixel centres at whole
# numbers there (319.5, 239.5), at halves here.
FIXED_FOCAL_LENGTH, FIXED_CENTRE, FIXED_SIZE = 577.870605, (320.0, 240.0), (640, 480)


class Frame(NamedTuple):
    """One RGB-D frame.

    The depth camera differs from the colour camera in its intrinsics alone: ScanNet's authors say that its depth is
    aligned with colour, so the extrinsics that some files state are not applied (by nobody else either).

    Attributes:
        scene: Name of its scene.
        frame_id: Its number in the recording.
        image: [H, W, 3] uint8 RGB as stored, or None where it was not asked for.
        depth: [h, w] float32 metres of camera-space z, 0 = none, or None where it was not asked for.
        camera: The colour camera; ``camera_from_world`` is of the unaligned world, in which the mesh is stored.
        depth_camera: The depth camera, of the same pose.
    """

    scene: str
    frame_id: int
    image: UInt8[Tensor, "height width 3"] | None
    depth: Float[Tensor, "depth_height depth_width"] | None
    camera: Camera
    depth_camera: Camera


class AnnotatedPoints(NamedTuple):
    """Points of a scene or of a frame with what is known of each.

    Attributes:
        points: [N, 6] float32 x y z in metres in the unaligned world, r g b in 0 to 1.
        labels: Name of a class table to [N] int64 class index in it, -1 = none. Empty where nothing is labelled.
        instances: [N] int64 object, -1 = none; None where unknown.
        superpoints: [N] int64 group, any numbers; None where unknown.
        vertex_ids: [N] int64 vertex of the scene's mesh; None where unknown.
    """

    points: Float[Tensor, "points 6"]
    labels: dict[str, Int[Tensor, " points"]]
    instances: Int[Tensor, " points"] | None
    superpoints: Int[Tensor, " points"] | None
    vertex_ids: Int[Tensor, " points"] | None

    def rows(self, kept: Int[Tensor, " kept"]) -> "AnnotatedPoints":
        """Returns some of the points."""
        return AnnotatedPoints(
            self.points[kept],
            {table: indices[kept] for table, indices in self.labels.items()},
            *(None if column is None else column[kept] for column in self[2:]),
        )


class SceneReport(NamedTuple):
    """What a scene has and lacks.

    Attributes:
        scene: Its name.
        num_frames: Frames with a photo.
        kept: Numbers of the frames with photo, depth and a usable pose, without those found damaged.
        without_depth: Numbers of those that lack depth.
        without_pose: Numbers of those that lack a pose.
        bad_poses: Numbers of those whose pose is not finite (ScanNet writes ``-inf`` where tracking was lost) or not
            rigid.
        damaged: Numbers of those that cannot be decoded; known after :func:`survey` alone.
        intrinsics: Where the intrinsics come from.
        labels: The class tables its points are labelled in.
        problem: Why it cannot be used at all, or the first damage of a frame; None where all is well.
    """

    scene: str
    num_frames: int
    kept: tuple[int, ...]
    without_depth: tuple[int, ...]
    without_pose: tuple[int, ...]
    bad_poses: tuple[int, ...]
    damaged: tuple[int, ...]
    intrinsics: str
    labels: tuple[str, ...]
    problem: str | None

    @property
    def num_skipped(self) -> int:
        """Frames with a photo that are not used."""
        return self.num_frames - len(self.kept)


class FrameSource(abc.ABC):
    """Scenes in one layout on disk. Nothing is read before it is asked for; it can be sent to other processes."""

    layout: ClassVar[str]
    keeps_points: ClassVar[bool] = False  # for some frames, see ``has_stored_points``

    @abc.abstractmethod
    def scenes(self) -> tuple[str, ...]:
        """Returns the names of all scenes, sorted."""

    @abc.abstractmethod
    def frames(self, scene: str) -> tuple[int, ...]:
        """Returns the numbers of the frames with photo, depth and usable pose, sorted.

        Raises:
            FileNotFoundError: If there is no such scene.
            ValueError: If the scene as a whole is damaged, such as by unreadable intrinsics.
        """

    @abc.abstractmethod
    def load(self, scene: str, frame_id: int, *, with_image: bool = True, with_depth: bool = True) -> Frame:
        """Reads one frame.

        Raises:
            ValueError: If a file of it is damaged or of the wrong size; names it.
        """

    def mesh(self, scene: str) -> AnnotatedPoints | None:
        """Returns the scene's own points (mesh vertices), ``vertex_ids`` 0 to N - 1, or None where there are none."""
        return None

    def has_mesh(self, scene: str) -> bool:
        """Whether ``mesh`` returns points, by the files that are there."""
        return False

    def label_tables(self, scene: str) -> tuple[str, ...]:
        """Returns the class tables the points of a scene are labelled in, by the files that are there."""
        return ()

    def has_stored_points(self, scene: str, frame_id: int) -> bool:
        """Whether a layout keeps points for a frame."""
        return False

    def stored_points(self, scene: str, frame_id: int) -> AnnotatedPoints | None:
        """Returns the points a layout keeps for a frame, or None where it keeps none."""
        return None

    def split(self, name: str) -> tuple[str, ...] | None:
        """Returns the scenes of ``train``, ``val`` or ``test`` as the layout states them, or None where it does not."""
        return None

    @abc.abstractmethod
    def fingerprint(self, scene: str) -> str:
        """Returns what changes when files of a scene come or go; costs a few looks at folders."""

    @abc.abstractmethod
    def report(self, scene: str) -> SceneReport:
        """Returns what a scene has and lacks; a damaged scene raises nothing, it is said to be so."""


def scaled_intrinsics(
    intrinsics: Float[Tensor, "3 3"], size: tuple[int, int], new_size: tuple[int, int]
) -> Float[Tensor, "3 3"]:
    """Returns intrinsics of width x height ``size`` for an image squashed to ``new_size``."""
    scale = intrinsics.new_tensor([new_size[0] / size[0], new_size[1] / size[1], 1.0])
    return intrinsics * scale[:, None]


def fixed_intrinsics(width: int, height: int) -> Float[Tensor, "3 3"]:
    """Returns the one matrix most code uses for all of ScanNet, at a size."""
    matrix = torch.tensor(
        [[FIXED_FOCAL_LENGTH, 0, FIXED_CENTRE[0]], [0, FIXED_FOCAL_LENGTH, FIXED_CENTRE[1]], [0, 0, 1]]
    )
    return scaled_intrinsics(matrix, FIXED_SIZE, (width, height))


def registered_depth(frame: Frame, height: int, width: int) -> Float[Tensor, "height width"]:
    """Returns the depth as the colour camera sees it, at any size of its image.

    Both cameras share one centre and one direction, so each pixel of the result takes the depth of the depth pixel its
    ray passes; 0 where the depth image does not reach. Depth is never interpolated.
    """
    assert frame.depth is not None
    colour = scaled_intrinsics(frame.camera.intrinsics, (frame.camera.width, frame.camera.height), (width, height))
    own = frame.depth_camera.intrinsics
    x = (torch.arange(width) + 0.5 - colour[0, 2]) / colour[0, 0] * own[0, 0] + own[0, 2]
    y = (torch.arange(height) + 0.5 - colour[1, 2]) / colour[1, 1] * own[1, 1] + own[1, 2]
    rows, columns = y.floor().long(), x.floor().long()
    seen_rows, seen_columns = (
        (rows >= 0) & (rows < frame.depth.shape[0]),
        (columns >= 0) & (columns < frame.depth.shape[1]),
    )
    registered = frame.depth[rows.clamp(0, frame.depth.shape[0] - 1)][:, columns.clamp(0, frame.depth.shape[1] - 1)]
    return registered * (seen_rows[:, None] & seen_columns[None, :])


def concatenated(parts: Sequence[AnnotatedPoints]) -> AnnotatedPoints:
    """Joins points; what one part does not know, the whole does not. Superpoints of different parts stay apart."""
    assert parts
    tables = [table for table in parts[0].labels if all(table in part.labels for part in parts)]
    return AnnotatedPoints(
        torch.cat([part.points for part in parts]),
        {table: torch.cat([part.labels[table] for part in parts]) for table in tables},
        _joined([part.instances for part in parts]),
        _joined(_kept_apart([part.superpoints for part in parts])),
        _joined([part.vertex_ids for part in parts]),
    )


def _joined(columns: Sequence[Int[Tensor, " _"] | None]) -> Int[Tensor, " points"] | None:
    known = [column for column in columns if column is not None]
    return torch.cat(known) if len(known) == len(columns) else None


def _kept_apart(columns: Sequence[Int[Tensor, " _"] | None]) -> list[Int[Tensor, " _"] | None]:
    """Renumbers groups from 0 on, each part's after those of the parts before."""
    renumbered: list[Tensor | None] = []
    offset = 0
    for column in columns:
        if column is None:
            renumbered.append(None)
            continue
        groups, contiguous = column.unique(return_inverse=True)
        renumbered.append(contiguous + offset)
        offset += len(groups)
    return renumbered
