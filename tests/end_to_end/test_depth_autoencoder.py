"""The depth demo's configuration on a tiny world: fit, resume, test, predict, export, two processes; real frames."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.networks.depth_autoencoder import DepthAutoencoder
from lightning_modules.networks.semantic_encoder import SemanticEncoder, create_semantic_encoder
from tests.end_to_end.watched_runs import RECORDED, LossRecorder, assert_equal_states, killed_at, saved_every
from train import CommandLine, main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "depth_autoencoder"
GOLDEN = ROOT / "tests" / "golden" / "depth_autoencoder_losses.json"
EVERY_FOUR = saved_every(4)
NO_CALLBACKS = "--trainer.callbacks=[]"


@pytest.fixture(scope="session")
def depth_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds") / "depth"


@pytest.fixture
def lexel(depth_world: Path, tmp_path: Path) -> Callable[..., CommandLine]:
    """Runs a command of the demo's configuration on the tiny world, in a folder of runs of its own."""

    def run(command: str, *flags: str, runs: Path = tmp_path) -> CommandLine:
        return main([command, "--config", str(CONFIGS / "demo.yaml"), *tiny(depth_world, runs), *flags])

    return run


def tiny(world: Path, runs: Path) -> list[str]:
    return [
        f"--data.init_args.root={world}",
        "--data.init_args.image_size=[32, 32]",
        "--data.init_args.scenes_per_kind=4",
        "--data.init_args.frames_per_scene=2",
        "--data.init_args.batch_size=4",
        "--model.init_args.widths=[4, 6, 8, 10]",
        "--model.init_args.latent_dim=16",
        *tiny_trainer(runs),
    ]


def tiny_trainer(runs: Path) -> list[str]:
    return [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        f"--trainer.logger.init_args.save_dir={runs}",
    ]


def checkpoint_of(runs: Path) -> Path:
    return runs / "depth_autoencoder_demo" / "checkpoints" / "last.ckpt"


def state_of(runs: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint_of(runs), weights_only=True)["state_dict"]


def test_a_run_leaves_what_the_house_promises(lexel, tmp_path):
    command_line = lexel("fit", "--trainer.max_steps=12", "--trainer.check_val_every_n_epoch=1")
    run = tmp_path / "depth_autoencoder_demo"
    board = EventAccumulator(str(run)).Reload()
    assert {"train/loss", "train/loss_depth", "train/loss_gradient", "val/mae_fraction", "val/delta_1_25"} <= set(
        board.Tags()["scalars"]
    )
    assert board.Tags()["images"] == ["reconstruction"]

    exported = sorted(path.name for path in (run / "exports").iterdir())
    assert exported[:2] == ["encoder_weights.pth", "semantic_encoder"]
    content = torch.load(run / "exports" / "encoder_weights.pth", weights_only=True)
    assert content["step"] == "12"
    assert content["depth_range"] == {"near_m": 0.35, "far_m": 8.0, "scale": "linear"}
    images, own = torch.rand(2, 1, 32, 32), command_line.model.autoencoder.encoder
    torch.testing.assert_close(
        create_semantic_encoder(pretrained_path=run / "exports" / "encoder_weights.pth").encode(images),
        own.encode(images),
    )
    assert SemanticEncoder.from_pretrained(run / "exports" / "semantic_encoder").depth_range == own.depth_range

    lexel("test", "--ckpt_path=last")
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert 0 < metrics["test/mae_fraction"] < 1
    assert metrics["test/mae_m"] == pytest.approx(metrics["test/mae_fraction"] * 7.65, rel=1e-3)
    assert metrics["test/rmse_m"] >= metrics["test/mae_m"]
    for name in ("neighbour_agreement", "probe_accuracy"):
        assert 0 <= metrics[f"test/{name}"] <= 1
        assert 0 <= metrics[f"test/{name}_of_pixels"] <= 1

    lexel("predict", "--ckpt_path=last")
    with np.load(run / "predictions" / "embeddings.npz") as found:
        assert found["embeddings"].shape == (48, 16)
        assert found["names"][0] == "corridor/scene_000/depth/0"
        assert found["kinds"][0] == "corridor"
    neighbours = json.loads((run / "predictions" / "neighbours.json").read_text())
    assert len(neighbours) == 48
    assert all(len(near) == 5 and near[0]["cosine"] >= near[4]["cosine"] for near in neighbours.values())
    assert np.asarray(Image.open(run / "predictions" / "neighbours.png")).shape == (12 * 54, 6 * 40, 3)


def test_a_killed_run_resumes_bit_equal_in_the_middle_of_an_epoch(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=18", EVERY_FOUR, runs=tmp_path / "whole")  # 10 steps an epoch; saved after 12
    with pytest.raises(RuntimeError, match="killed"):
        lexel(
            "fit",
            "--trainer.max_steps=18",
            EVERY_FOUR,
            *killed_at(14),
            runs=tmp_path / "parts",
        )
    assert state_of(tmp_path / "parts")["trained_steps"] == 12
    lexel("fit", "--trainer.max_steps=18", "--ckpt_path=last", EVERY_FOUR, runs=tmp_path / "parts")
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert whole["trained_steps"] == 18
    assert_equal_states(whole, parts)


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("huber_linear", []),
        ("l1_log_3_channels", [
            "--model.init_args.loss=l1",
            "--model.init_args.input_channels=3",
            "--data.init_args.depth_range.scale=log",
        ]),
    ],
)  # fmt: skip
def test_ten_steps_have_the_golden_losses(lexel, recipe, flags):
    LossRecorder.losses.clear()
    lexel("fit", "--trainer.max_steps=10", NO_CALLBACKS, RECORDED, *flags)
    expected = json.loads(GOLDEN.read_text())[recipe]
    assert LossRecorder.losses == pytest.approx(expected, rel=1e-3)  # processors round differently, not this much


def test_test_without_a_checkpoint_says_what_to_do(lexel):
    with pytest.raises(ValueError, match=r"no trained autoencoder to test.*fit --config"):
        lexel("test")
    with pytest.raises(ValueError, match="no trained autoencoder to predict"):
        lexel("export")


def test_a_checkpoint_of_another_depth_range_is_refused(lexel):
    lexel("fit", "--trainer.max_steps=1", EVERY_FOUR)
    with pytest.raises(ValueError, match=r"trained with the depth range .*'far_m': 8.0.*--data.init_args.depth_range"):
        lexel("test", "--ckpt_path=last", "--data.init_args.depth_range.far_m=4")


# Extraction


def test_own_checkpoints_are_exported_by_name_and_by_path(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=2", EVERY_FOUR)
    outputs = [tmp_path / "by_name.pth", tmp_path / "by_path.safetensors"]
    lexel("export", "--ckpt_path=last", f"--output={outputs[0]}", "--verify")
    lexel("export", f"--ckpt_path={checkpoint_of(tmp_path)}", f"--output={outputs[1]}", "--verify", "true")
    encoders = [create_semantic_encoder(pretrained_path=path) for path in outputs]
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(encoders[0].encode(images), encoders[1].encode(images))
    assert encoders[0].depth_range == encoders[1].depth_range
    assert encoders[0].depth_range.far_m == 8.0


def test_a_foreign_checkpoint_is_exported_without_data_and_whatever_its_size(tmp_path, capsys):
    network = DepthAutoencoder(3, 24, widths=(3, 4, 5, 6), blocks=(1, 2, 1, 1)).eval()
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "a.pth")
    flags = [f"--ckpt_path={tmp_path / 'a.pth'}", f"--output={tmp_path / 'encoder_weights.pth'}", "--verify"]
    flags += [*tiny(tmp_path / "no_world", tmp_path)]
    main(["export", "--config", str(CONFIGS / "demo.yaml"), *flags])
    assert not (tmp_path / "no_world").exists()
    encoder = create_semantic_encoder(pretrained_path=tmp_path / "encoder_weights.pth")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoder.encode(images), network.encoder.encode(images))


def test_an_average_over_training_is_exported_as_such(lexel, tmp_path):
    averaging = "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"
    command_line = lexel("fit", "--trainer.max_steps=3", averaging)
    assert any(isinstance(callback, EMAWeightAveraging) for callback in command_line.trainer.callbacks)
    exported = tmp_path / "depth_autoencoder_demo" / "exports" / "encoder_weights.pth"
    content = torch.load(exported, weights_only=True)
    assert content["weights"] == "EMA"
    lexel("export", f"--ckpt_path={checkpoint_of(tmp_path)}", f"--output={tmp_path / 'again.pth'}")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again["weights"] == "EMA"
    for name, tensor in content["encoder_state_dict"].items():
        assert torch.equal(tensor, again["encoder_state_dict"][name]), name


# Two processes


class RanksAgree(Callback):
    """Fails unless weights and running statistics are equal on both processes after training."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = torch.cat([t.flatten().double() for t in pl_module.autoencoder.state_dict().values()])
        shares = [torch.empty_like(state) for _ in range(2)]
        torch.distributed.all_gather(shares, state)
        assert torch.equal(*shares)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_agree_and_test_as_one(lexel, depth_world, tmp_path):
    def two(command: str, *flags: str) -> None:
        words = [sys.executable, "train.py", command, "--config", str(CONFIGS / "demo.yaml")]
        words += ["--config", "configs/trainer/ddp.yaml", *tiny(depth_world, tmp_path), "--trainer.devices=2", *flags]
        subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=500)

    def metrics() -> dict[str, float]:
        return json.loads((tmp_path / "depth_autoencoder_demo" / "test_metrics.json").read_text())

    agree = "--trainer.callbacks+=tests.end_to_end.test_depth_autoencoder.RanksAgree"
    lexel("fit", "--trainer.max_steps=1", NO_CALLBACKS)  # writes the world
    two("fit", "--trainer.max_steps=6", EVERY_FOUR, agree)
    two("test", f"--ckpt_path={checkpoint_of(tmp_path)}")
    of_two = metrics()
    lexel("test", f"--ckpt_path={checkpoint_of(tmp_path)}")
    assert of_two == pytest.approx(metrics(), rel=1e-5)


# Real frames


def test_real_frames_and_crops_of_them(shared_data, tmp_path):
    flags = [
        f"--data.init_args.root={shared_data / 'rgbd'}",
        "--data.init_args.image_size=[64, 64]",
        "--data.init_args.num_workers=0",
        "--model.init_args.widths=[8, 12, 16, 24]",
        "--model.init_args.latent_dim=32",
        "--trainer.max_epochs=30",
        "--trainer.check_val_every_n_epoch=30",
        *tiny_trainer(tmp_path),
    ]
    config = str(CONFIGS / "depth_maps.yaml")
    command_line = main(["fit", "--config", config, *flags])
    assert len(command_line.datamodule._splits["train"]) == 15  # three frames, four crops of each
    run = tmp_path / "depth_autoencoder"
    main(["test", "--config", config, *flags, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"])
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert metrics["test/mae_fraction"] < 0.2
    assert "test/neighbour_agreement" not in metrics  # the frames' kind is unknown
    main(["predict", "--config", config, *flags, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"])
    with np.load(run / "predictions" / "embeddings.npz") as found:
        assert found["embeddings"].shape == (25, 32)
