import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from typing_extensions import override

from callbacks.frame_feature_writer import FrameFeatureWriter
from callbacks.writers.frame_features import (
    FrameCost,
    append_costs,
    feature_colours,
    is_whole,
    join_costs,
    read_costs,
    write_features,
    write_picture,
)
from datamodules.batches import SceneFrames
from lightning_modules.bi_fusion import BiFusionModule, FramePrediction
from lightning_modules.networks.bi_fusion.clip_tokens import RandomClipTokens
from lightning_modules.networks.bi_fusion.settings import EncoderSettings
from tests.datamodules.mini_rooms import mini_scans

SMALL = EncoderSettings(channels=16, point_channels=16, num_neighbours=4, heads=2)


class Trained(BiFusionModule):
    """A small encoder with weights of a seed, as if they had been trained; counts what it is asked."""

    def __init__(self, weights_seed: int = 0, clip: RandomClipTokens | None = None, fail_at: int = -1) -> None:
        super().__init__(encoder=SMALL, clip=clip)
        self.weights_seed, self.fail_at, self.asked = weights_seed, fail_at, []

    @override
    def configure_model(self) -> None:
        torch.manual_seed(self.weights_seed)
        super().configure_model()
        self.trained_steps.fill_(1)

    @override
    def predict_step(self, frames: SceneFrames, batch_idx: int) -> list:
        if batch_idx == self.fail_at:
            raise KeyboardInterrupt
        self.asked += [(scene, int(ids[0])) for scene, ids in zip(frames.scenes, frames.frame_ids, strict=True)]
        return super().predict_step(frames, batch_idx)


def extract(root: Path, output: Path, module: BiFusionModule | None = None, **settings) -> BiFusionModule:
    module = module or Trained()
    writer = FrameFeatureWriter(str(output), **{k: v for k, v in settings.items() if k in ("dtype", "pictures")})
    data = mini_scans(root, **{k: v for k, v in settings.items() if k not in ("dtype", "pictures")})
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[writer], enable_progress_bar=False,
                      enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    trainer.predict(module, data)
    return module


def test_each_frame_gets_its_numbers_its_picture_and_a_row(mini_root, tmp_path):
    module = extract(mini_root, tmp_path, frames_per_scene=2, batch_size=2)
    assert len(module.asked) == 6
    for scene, frame in module.asked:
        with np.load(tmp_path / scene / f"frame_{frame}.npz") as content:
            count = len(content["pts_feat"])
            assert content["pts_feat"].shape == (count, 128)
            assert content["pts_feat"].dtype == np.float16
            assert content["uv_idx"].shape == (count, 2)
            assert content["conf_2d"].shape == content["gate"].shape == (count,)
            assert content["points"].shape == (count, 6)
            assert content["clip_global"].shape == (512,)
            assert content["conf_2d"].max() <= 1
            assert (content["conf_2d"] > 0).mean() > 0.8  # a frame sees what was lifted from its own depth
            seen = content["uv_idx"][content["conf_2d"] > 0]
            assert seen.min() >= 0
            assert seen.max() <= 224
        with Image.open(tmp_path / scene / f"vis_{frame}.png") as picture:
            assert picture.size == (448, 224)
    rows = read_costs(tmp_path / "frames.csv")
    assert sorted((row.scene, row.frame) for row in rows) == sorted(module.asked)
    files = [*tmp_path.glob("*/*.npz"), *tmp_path.glob("*/*.png")]
    assert sum(row.bytes for row in rows) == sum(file.stat().st_size for file in files)
    assert all(row.network_ms > 0 and row.peak_mib > 1 for row in rows)
    assert not list(tmp_path.glob(".frames*"))


def test_the_features_are_those_of_the_module(mini_root, tmp_path):
    extract(mini_root, tmp_path, dtype="float32", pictures=False)
    data = mini_scans(mini_root)
    data.setup()
    module = Trained()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    expected = trainer.predict(module, data)[0][0]
    with np.load(tmp_path / expected.scene / f"frame_{expected.frame_id}.npz") as content:
        np.testing.assert_allclose(content["pts_feat"], expected.fused.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(content["uv_idx"], expected.uv.numpy())
    assert not list(tmp_path.glob("*/*.png"))


def test_pictures_show_the_photo_as_the_image_tower_saw_it(mini_root, tmp_path):
    module = Trained(clip=RandomClipTokens(image_size=64))
    extract(mini_root, tmp_path, module, offline_clip_feat=False, image_size=(64, 64), frames_per_scene=1)
    data = mini_scans(mini_root, offline_clip_feat=False, image_size=(64, 64), frames_per_scene=1)
    data.setup()
    frames = next(iter(data.predict_dataloader()))
    with Image.open(tmp_path / frames.scenes[0] / f"vis_{int(frames.frame_ids[0, 0])}.png") as picture:
        pixels = np.asarray(picture)
    np.testing.assert_array_equal(pixels[:, :64], frames.images[0, 0].numpy())
    assert (pixels[:, 64:].max(2) > 0).mean() > 0.3  # the rest is painted


def test_whole_frames_are_not_computed_again_and_damaged_ones_are(mini_root, tmp_path):
    first = extract(mini_root, tmp_path, frames_per_scene=1).asked
    assert len(first) == 3
    damaged = tmp_path / first[0][0] / f"frame_{first[0][1]}.npz"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert not is_whole(damaged)
    (tmp_path / first[1][0] / f"vis_{first[1][1]}.png").unlink()
    assert sorted(extract(mini_root, tmp_path, frames_per_scene=1).asked) == sorted(first[:2])
    assert extract(mini_root, tmp_path, frames_per_scene=1).asked == []
    assert len(read_costs(tmp_path / "frames.csv")) == 3


def test_an_interrupted_run_keeps_the_rows_of_its_frames(mini_root, tmp_path):
    with pytest.raises(SystemExit):  # Lightning's answer to an interrupt
        extract(mini_root, tmp_path, Trained(fail_at=2))
    assert len(list(tmp_path.glob("*/frame_*.npz"))) == 4
    assert len(extract(mini_root, tmp_path).asked) == 5
    assert len(read_costs(tmp_path / "frames.csv")) == 9


def test_features_of_other_weights_or_settings_are_refused(mini_root, tmp_path):
    extract(mini_root, tmp_path, frames_per_scene=1)
    with pytest.raises(ValueError, match=r"holds features made otherwise: weights is"):
        extract(mini_root, tmp_path, Trained(weights_seed=1))
    with pytest.raises(ValueError, match="max_points is 512 there, 64 now"):
        extract(mini_root, tmp_path, max_points=64)
    with pytest.raises(ValueError, match="intrinsics is 'per_scene' there, 'fixed' now"):
        extract(mini_root, tmp_path, intrinsics="fixed")
    with pytest.raises(ValueError, match="holds features made otherwise: weights is"):  # though no frame is left to do
        extract(mini_root, tmp_path, Trained(weights_seed=1), frames_per_scene=1)
    assert json.loads((tmp_path / "settings.json").read_text())["dtype"] == "float16"
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json cannot be read"):
        extract(mini_root, tmp_path)


def prediction(num_points: int) -> FramePrediction:
    draw = torch.Generator().manual_seed(0)
    points, fused, uv = (torch.rand(num_points, size, generator=draw) for size in (6, 128, 2))
    ones = torch.ones(num_points)
    return FramePrediction("a", 3, points, fused, fused.half(), 32 * uv, ones, ones, None, (32, 48))


@pytest.mark.parametrize("num_points", [0, 1])
def test_a_frame_with_hardly_any_points_has_its_files(num_points, tmp_path):
    frame = prediction(num_points)
    write_features(tmp_path / "frame.npz", frame, "float16")
    assert is_whole(tmp_path / "frame.npz")
    colours = feature_colours(frame.fused)
    write_picture(tmp_path / "vis.png", frame, torch.zeros(32, 48, 3, dtype=torch.uint8), colours)
    with Image.open(tmp_path / "vis.png") as picture:
        assert picture.size == (96, 32)


def test_features_that_are_not_finite_are_refused(tmp_path):
    frame = prediction(5)
    frame.fused[2, 7] = 1e5
    write_features(tmp_path / "frame.npz", frame, "float32")
    with pytest.raises(ValueError, match=r"frame 3 of a are not finite in float16.*dtype to float32"):
        write_features(tmp_path / "other.npz", frame, "float16")
    assert not (tmp_path / "other.npz").exists()


def test_another_module_is_refused(mini_root, tmp_path):
    with pytest.raises(ValueError, match="cannot write what a BoringModel makes"):
        extract(mini_root, tmp_path, BoringModel())


def test_rows_of_several_processes_and_of_killed_runs_become_one_table(tmp_path):
    costs = [FrameCost("scene0000_00", frame, 9, 1.0, 2.0, 3.0, 4.0, 50 + frame) for frame in range(4)]
    append_costs(tmp_path / ".frames.csv.0", costs[:2])
    append_costs(tmp_path / ".frames.csv.1", costs[2:])
    with (tmp_path / ".frames.csv.1").open("a") as file:
        file.write("scene0000_00,7,9,1.0")  # cut short
    assert join_costs(tmp_path, "frames.csv") == costs
    append_costs(tmp_path / ".frames.csv.0", [costs[0]._replace(bytes=7)])
    assert [cost.bytes for cost in join_costs(tmp_path, "frames.csv")] == [7, 51, 52, 53]
    assert [path.name for path in tmp_path.iterdir()] == ["frames.csv"]


def test_colours_follow_the_main_directions_and_do_not_depend_on_their_sign():
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=draw)).Q
    coordinates = torch.randn(500, 3, generator=draw) * torch.tensor([9.0, 3, 1])
    features = coordinates @ basis[:3] + 5
    colours = feature_colours(features)(features)
    assert colours.shape == (500, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    for channel in range(3):  # the first channel is the longest direction, and so on
        correlation = torch.corrcoef(torch.stack([colours[:, channel], coordinates[:, channel]]))[0, 1]
        assert abs(correlation) > 0.95
    again = feature_colours(features.flip(0))(features)
    torch.testing.assert_close(again, colours, atol=1e-3, rtol=0)
