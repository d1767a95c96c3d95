"""What a stream makes of frames that are written by hand; ``tests/end_to_end`` has the whole command."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from callbacks.scene_stream import SceneStream
from datamodules.batches import SceneFrames
from lightning_modules.bi_fusion import BiFusionModule, FramePrediction

NAMES = ("wall", "floor", "chair", "table")


class Named(BiFusionModule):
    """Knows four classes, whose texts are unit vectors, and a folder to write to."""

    data = SimpleNamespace(class_tables=("scannet20",), class_names=lambda table: NAMES)

    def texts(self, table: str) -> torch.Tensor:
        return torch.eye(4)


def frame(points: torch.Tensor, classes: torch.Tensor, conf: float = 1.0, scene: str = "room") -> FramePrediction:
    number, text = len(points), F.one_hot(classes, 4).half()
    coloured = torch.cat([points, torch.full((number, 3), 0.5)], dim=1)
    return FramePrediction(
        scene, 0, coloured, text.float(), text, torch.zeros(number, 2), torch.full((number,), conf), torch.ones(number),
        None, (32, 32),
    )  # fmt: skip


def batch(points: torch.Tensor) -> SceneFrames:
    return SceneFrames(
        scenes=("room",), frame_ids=torch.zeros(1, 1, dtype=torch.int64), has_frame=torch.ones(1, 1, dtype=torch.bool),
        points=(torch.cat([points, points], dim=1),), intrinsics=torch.eye(3).expand(1, 1, 3, 3),
        camera_from_world=torch.eye(4).expand(1, 1, 4, 4), image_size=(32, 32), images=None, depth=None, tokens=None,
        clip_global=None, labels={}, instances=None, superpoints=None, vertex_ids=None,
    )  # fmt: skip


def stream_frames(stream: SceneStream, predictions: list[FramePrediction]):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module = Named()
    stream.on_predict_start(trainer, module)
    for prediction in predictions:
        stream.on_predict_batch_end(trainer, module, [prediction], batch(prediction.points[:, :3]), 0)
    stream.on_predict_end(trainer, module)


@pytest.mark.parametrize(("use_superpoints", "expected"), [(True, ["chair"]), (False, ["chair", "table"])])
def test_superpoints_are_used_unless_told_otherwise(tmp_path, use_superpoints, expected):
    points = 0.3 * torch.rand(300, 3)
    classes = torch.where(points[:, 0] < 0.2, 2, 3)
    stream = SceneStream(output=str(tmp_path), use_superpoints=use_superpoints, min_points=20)
    stream_frames(stream, [frame(points, classes)._replace(superpoints=torch.zeros(300, dtype=torch.int64))])
    objects = json.loads((tmp_path / "room" / "objects.json").read_text())
    assert sorted(row["class"] for row in objects) == expected


def test_a_scene_that_no_frame_sees_is_told_and_writes_nothing(tmp_path):
    unseen = frame(torch.rand(50, 3), torch.full((50,), 2), conf=0.0)
    with pytest.warns(UserWarning, match="room: no frame sees a point"):
        stream_frames(SceneStream(output=str(tmp_path)), [unseen])
    assert not list(tmp_path.iterdir())


def test_a_frame_without_points_between_others_changes_no_map(tmp_path):
    points, classes = 0.3 * torch.rand(200, 3), torch.full((200,), 2)
    stream_frames(SceneStream(output=str(tmp_path)), [frame(points, classes, conf) for conf in (1.0, 0.0, 1.0)])
    (row,) = json.loads((tmp_path / "room" / "objects.json").read_text())
    assert (row["class"], row["frames"]) == ("chair", 2)
