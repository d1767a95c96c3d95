"""The stream's configuration on a tiny world: two rooms, frame by frame, by an encoder that is hardly trained."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from plyfile import PlyData

from callbacks.scene_stream import SceneStream
from lightning_modules.bi_fusion import BiFusionModule
from lightning_modules.functional.bi_fusion.voxel_keys import voxel_keys
from lightning_modules.networks.bi_fusion.memory_bank import MemoryBank
from lightning_modules.networks.bi_fusion.online_merge import OnlineMerge
from tests.end_to_end.test_bi_fusion import tiny
from train import CommandLine, main

CONFIGS = Path(__file__).parents[2] / "configs" / "bi_fusion"
FRAMES = 4  # of each room, by the tiny flags
STREAM = (
    '--trainer.callbacks=[{"class_path": "callbacks.scene_stream.SceneStream", '
    '"init_args": {"save_memory": true, "min_points": 10}}]'
)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> tuple[CommandLine, Path]:
    """Trains for a step, so that texts are still the teacher's, and streams the rooms of the test.

    Returns:
        The command, and the folder of what it wrote.
    """
    folder = tmp_path_factory.mktemp("stream")
    world, runs = folder / "mini_scannet", folder / "runs"
    flags = tiny(world, runs)
    main(["fit", "--config", str(CONFIGS / "demo.yaml"), *flags, "--trainer.max_steps=1",
          "--trainer.limit_val_batches=0", "--model.init_args.learning_rate=1e-6",
          '--trainer.callbacks=[{"class_path": "callbacks.resumable_checkpoint.ResumableCheckpoint"}]'])  # fmt: skip
    command_line = main(["predict", "--config", str(CONFIGS / "stream.yaml"), *flags, STREAM,
                         "--data.init_args.max_points=3000", "--data.init_args.batch_size=3",
                         f"--data.init_args.scenes_file={world / 'scannetv2_test.txt'}",
                         f"--ckpt_path={runs / 'bi_fusion_demo' / 'checkpoints' / 'last.ckpt'}"])  # fmt: skip
    return command_line, runs / "bi_fusion_stream" / "scene_stream"


@pytest.fixture(scope="module")
def frames_of(streamed) -> dict[str, list[torch.Tensor]]:
    """The points of every frame that was streamed, by room."""
    rooms: dict[str, list[torch.Tensor]] = {}
    for batch in streamed[0].datamodule.predict_dataloader():
        for scene, points in zip(batch.scenes, batch.points, strict=True):
            rooms.setdefault(scene, []).append(points[:, :3])
    return rooms


def memories(folder: Path) -> tuple[MemoryBank, OnlineMerge]:
    stored = torch.load(folder / "memory.pt", weights_only=True)
    bank, merge = MemoryBank(512), OnlineMerge(overlap="voxels")
    bank.load_state_dict(stored["memory_bank"])
    merge.load_state_dict(stored["online_merge"])
    return bank, merge


def test_each_room_has_its_files(streamed, frames_of):
    folder = streamed[1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(frames_of)
    assert len(frames_of) == 2
    for scene in frames_of:
        assert {path.name for path in (folder / scene).iterdir()} == {
            "map.ply",
            "objects.json",
            "growth.gif",
            "agreement.csv",
            "agreement.png",
            "memory.pt",
        }


def test_the_map_has_a_vertex_for_each_voxel_that_a_frame_saw(streamed, frames_of):
    names = streamed[0].datamodule.class_names("scannet20")
    for scene, frames in frames_of.items():
        bank, merge = memories(streamed[1] / scene)
        vertices = PlyData.read(streamed[1] / scene / "map.ply")["vertex"].data
        assert len(vertices) == len(bank) > 500
        places = torch.from_numpy(np.stack([vertices[axis] for axis in "xyz"], axis=1))
        assert torch.equal(voxel_keys(places, 0.05), bank.keys)
        assert torch.equal(torch.from_numpy(vertices["frames"].copy()), bank.counts)
        assert vertices["class"].min() >= 0
        assert vertices["class"].max() < len(names)
        assert set(vertices["object"].tolist()) - {-1} <= set(merge.ids.tolist())
        seen = torch.cat([voxel_keys(points, 0.05) for points in frames]).unique()
        assert torch.isin(bank.keys, seen).all()
        assert len(bank) > 0.8 * len(seen)  # what the depth camera alone shows, beside the photo, is left out


def test_memories_go_on_from_where_they_were_saved_and_know_their_room_alone(streamed, frames_of):
    for scene, frames in frames_of.items():
        bank, merge = memories(streamed[1] / scene)
        assert bank.scene == merge.scene == scene
        assert bank.num_frames == merge.num_frames == len(frames) == FRAMES
        assert 1 <= int(bank.counts.min()) <= int(bank.counts.max()) <= FRAMES
        assert merge.ids[0] == 0  # ids begin anew in each room
        before = len(bank)
        bank.update(torch.full((1, 3), 99.0), torch.ones(1, 512))
        assert (len(bank), bank.num_frames) == (before + 1, FRAMES + 1)


def test_objects_are_those_of_the_merge_with_the_names_of_their_classes(streamed, frames_of):
    names = streamed[0].datamodule.class_names("scannet20")
    for scene in frames_of:
        _, merge = memories(streamed[1] / scene)
        objects = json.loads((streamed[1] / scene / "objects.json").read_text())
        assert [row["id"] for row in objects] == merge.ids.tolist()
        assert len(objects) > 0
        for row, voxels in zip(objects, merge.voxels, strict=True):
            assert row["class"] in set(names) - {"wall", "floor"}
            assert 1 <= row["frames"] <= FRAMES
            assert row["voxels"] == len(voxels)
            assert (np.array(row["box_m"][3:]) >= row["box_m"][:3]).all()


def test_the_moving_picture_shows_every_frame_and_the_map_grows(streamed, frames_of):
    for scene in frames_of:
        with Image.open(streamed[1] / scene / "growth.gif") as picture:
            assert picture.n_frames == FRAMES
            painted = []
            for frame in range(FRAMES):
                picture.seek(frame)
                painted.append(int((np.array(picture.convert("RGB")) < 250).any(axis=2).sum()))
        assert painted[0] > 0
        assert painted == sorted(painted)
        assert painted[-1] > painted[0]


def test_agreement_is_told_for_every_number_of_sights(streamed, frames_of):
    for scene in frames_of:
        with (streamed[1] / scene / "agreement.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["sights"]) for row in rows] == list(range(1, len(rows) + 1))
        assert len({row["voxels"] for row in rows}) == 1  # the same voxels after each frame
        assert len(rows) > 1
        assert rows[0]["kept"] == "nan"  # there is no class to keep yet
        assert 0 < float(rows[1]["kept"]) <= 1
        assert rows[0]["right_frame"] == rows[0]["right_map"]  # one frame is the map
        for row in rows:
            for field in ("right_frame", "right_map"):
                assert 0.3 < float(row[field]) <= 1  # the teacher is right more often than not
        assert (streamed[1] / scene / "agreement.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_table": "scannet40"}, "class_table is 'scannet40'; allowed: scannet20, scannet200"),
        ({"leave_out": ("walls",)}, "leave_out has 'walls', no class of scannet20; close: wall"),
    ],
)
def test_classes_that_are_not_there_are_refused_before_the_first_frame(streamed, settings, message):
    command_line = streamed[0]
    with pytest.raises(ValueError, match=message):
        SceneStream(**settings).on_predict_start(command_line.trainer, command_line.model)


def test_several_processes_and_other_modules_are_refused():
    two = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"there are 2 processes: set trainer\.devices=1"):
        SceneStream().setup(two, BiFusionModule(), "predict")
    one = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="allowed: a BiFusionModule"):
        SceneStream().setup(one, LightningModule(), "predict")
