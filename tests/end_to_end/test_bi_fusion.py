"""The Bi-Fusion demo's configuration on a tiny world: fit, resume, test, predict, export, two processes, photos."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.bi_fusion import BiFusionModule
from lightning_modules.networks.bi_fusion.exported_encoder import load_bi_fusion_encoder
from tests.end_to_end.watched_runs import RECORDED, LossRecorder, assert_equal_states, killed_at, saved_every
from train import CommandLine, main

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "bi_fusion" / "demo.yaml")
GOLDEN = ROOT / "tests" / "golden" / "bi_fusion_losses.json"
EVERY_THREE = saved_every(3)
NO_CALLBACKS = "--trainer.callbacks=[]"


@pytest.fixture(scope="session")
def mini_scannet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds") / "mini_scannet"


@pytest.fixture
def lexel(mini_scannet: Path, tmp_path: Path) -> Callable[..., CommandLine]:
    """Runs a command of the demo's configuration on the tiny world, in a folder of runs of its own."""

    def run(command: str, *flags: str, runs: Path = tmp_path) -> CommandLine:
        return main([command, "--config", CONFIG, *tiny(mini_scannet, runs), *flags])

    return run


def tiny(world: Path, runs: Path) -> list[str]:
    return [
        f"--data.init_args.root={world}",
        "--data.init_args.num_train_scenes=2",
        "--data.init_args.num_val_scenes=1",
        "--data.init_args.num_test_scenes=2",
        "--data.init_args.frames_in_scene=4",
        "--data.init_args.samples_per_scene=4",
        "--data.init_args.views_per_sample=2",
        "--data.init_args.max_points=200",
        "--data.init_args.batch_size=2",
        "--model.init_args.encoder.channels=16",
        "--model.init_args.encoder.fused_channels=12",
        "--model.init_args.encoder.point_channels=8",
        "--model.init_args.encoder.num_neighbours=4",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=5",
        f"--trainer.logger.init_args.save_dir={runs}",
    ]


def run_folder(runs: Path) -> Path:
    return runs / "bi_fusion_demo"


def checkpoint_of(runs: Path) -> Path:
    return run_folder(runs) / "checkpoints" / "last.ckpt"


def state_of(runs: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint_of(runs), weights_only=True)["state_dict"]


def test_a_run_leaves_what_the_house_promises(lexel, tmp_path):
    command_line = lexel("fit", "--trainer.max_steps=5")
    run = run_folder(tmp_path)
    board = EventAccumulator(str(run)).Reload()
    losses = {f"train/loss_{name}" for name in ("distillation", "text", "distillation_3d", "text_3d", "consistency")}
    assert {"train/loss", *losses, "train/gate", "val/miou_fused", "val/miou_teacher_2d"} <= set(
        board.Tags()["scalars"]
    )
    assert board.Tags()["images"] == ["points"]

    exports = run / "exports"
    assert {path.name for path in exports.iterdir()} == {
        "bi_fusion_encoder.safetensors",
        "config.json",
        "grid_branch.onnx",
        "text_head.onnx",
    }
    config = json.loads((exports / "config.json").read_text())
    assert (config["step"], config["weights"], config["encoder"]["channels"]) == (5, "raw", 16)
    assert config["image_tower"]["model"]
    own, module = load_bi_fusion_encoder(exports), command_line.model.eval()
    frames = next(iter(command_line.datamodule.val_dataloader()))
    with torch.no_grad():
        expected = module(frames)
        found = own(
            frames.points,
            frames.tokens,
            frames.intrinsics,
            frames.camera_from_world,
            frames.image_size,
            frames.depth,
            frames.has_frame,
        )
    assert torch.equal(found.text, expected.text)
    head = onnxruntime.InferenceSession(str(exports / "text_head.onnx"))
    assert {part.name for part in head.get_inputs()} == {"fused", "teacher", "gate"}
    assert head.get_modelmeta().custom_metadata_map["step"] == "5"

    lexel("test", "--ckpt_path=last")
    by_scene = (run / "test_by_scene.csv").read_text().splitlines()
    assert by_scene[0].startswith("scene,points,miou_fused,macc_fused,miou_teacher_2d")
    assert len(by_scene) == 1 + len({row.split(",")[0] for row in by_scene[1:]}) > 1
    assert (run / "test_by_class.csv").read_text().startswith("class,points,iou_fused")
    metrics = json.loads((run / "test_metrics.json").read_text())
    for kind in ("fused", "teacher_2d", "ensemble"):
        assert 0 <= metrics[f"test/miou_{kind}"] <= 1
        assert 0 <= metrics[f"test/macc_{kind}"] <= 1
        assert 0 <= metrics[f"test/miou_{kind}_scannet200"] <= 1
        assert 0 <= metrics[f"test/miou_{kind}_head_scannet200"] <= 1
    assert 0 < metrics["test/view_cosine_teacher_2d"] < 1
    assert 0 <= metrics["test/view_label_agreement_fused"] <= 1

    command_line = lexel("predict", "--ckpt_path=last", NO_CALLBACKS)
    loader = command_line.datamodule.predict_dataloader()
    frames = next(iter(loader))
    with torch.no_grad():
        predictions = command_line.model.eval().predict_step(frames, 0)
    assert [(p.scene, p.frame_id) for p in predictions] == list(
        zip(frames.scenes, frames.frame_ids[:, 0].tolist(), strict=True)
    )
    first = predictions[0]
    assert torch.equal(first.points, frames.points[0])
    assert first.fused.shape == (len(first.points), 12)
    assert first.text.dtype == torch.float16
    inside = ((first.uv > 0) & (first.uv < 224)).all(dim=1)
    assert inside.float().mean() > 0.9  # the frame's own points; its depth camera sees a little more than its photo
    assert torch.equal(first.conf_2d > 0, inside)


def test_a_killed_run_resumes_bit_equal_in_the_middle_of_an_epoch(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=7", EVERY_THREE, runs=tmp_path / "whole")  # 4 steps an epoch; saved after 3
    with pytest.raises(RuntimeError, match="killed"):
        lexel(
            "fit",
            "--trainer.max_steps=7",
            EVERY_THREE,
            *killed_at(5),
            runs=tmp_path / "parts",
        )
    assert state_of(tmp_path / "parts")["trained_steps"] == 3
    lexel("fit", "--trainer.max_steps=7", "--ckpt_path=last", EVERY_THREE, runs=tmp_path / "parts")
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert whole["trained_steps"] == 7
    assert_equal_states(whole, parts)


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("labels", []),
        ("label_free_contrast", [
            "--model.init_args.losses.text=0",
            "--model.init_args.losses.consistency_kind=info_nce",
            "--model.init_args.losses.consistency_from=0",
            "--model.init_args.encoder.use_tiny_sa_2d=true",
        ]),
    ],
)  # fmt: skip
def test_six_steps_have_the_golden_losses(lexel, recipe, flags):
    LossRecorder.losses.clear()
    lexel("fit", "--trainer.max_steps=6", "--trainer.limit_val_batches=0", NO_CALLBACKS, RECORDED, *flags)
    expected = json.loads(GOLDEN.read_text())[recipe]
    assert LossRecorder.losses == pytest.approx(expected, rel=1e-3)  # processors round differently, not this much


def test_test_without_a_checkpoint_says_what_to_do(lexel):
    with pytest.raises(ValueError, match=r"no trained encoder to test.*fit --config"):
        lexel("test")


def test_tokens_of_another_tower_are_refused(lexel):
    lexel("fit", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", EVERY_THREE)
    with pytest.raises(ValueError, match="trained with the tokens of another image tower"):
        lexel("test", "--ckpt_path=last", *online())


def online() -> list[str]:
    return [
        "--data.init_args.offline_clip_feat=false",
        "--model.init_args.clip=lightning_modules.networks.bi_fusion.clip_tokens.RandomClipTokens",
    ]


def test_photos_and_a_tower_train_as_cached_tokens_do(lexel, tmp_path):
    """The tower stays out of the checkpoint, as it was."""
    command_line = lexel("fit", "--trainer.max_steps=2", "--trainer.limit_val_batches=1", *online(), NO_CALLBACKS)
    module = command_line.model
    assert isinstance(module, BiFusionModule)
    assert module.clip is not None
    assert not [name for name in module.state_dict() if name.startswith("clip.")]
    assert module.image_tower["dense_mode"] == "clearclip"
    photos = next(iter(command_line.datamodule.val_dataloader()))
    with torch.no_grad():
        tokens, clip_global, _ = module.eval()._tokens(photos)
        from_photos = module(photos)
        from_store = module(photos._replace(images=None, tokens=tokens.half(), clip_global=clip_global))
    torch.testing.assert_close(from_store.text, from_photos.text, rtol=0, atol=2e-3)  # of float16
    torch.testing.assert_close(from_store.teacher, from_photos.teacher, rtol=0, atol=2e-3)
    again = lexel("fit", "--trainer.max_steps=2", *online(), "--model.init_args.clip.init_args.freeze_blocks=1")
    trained = {name for name in again.model.state_dict() if name.startswith("clip.")}
    assert any("trained_blocks" in name for name in trained)
    assert not any("visual" in name for name in trained)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.init_args.templates=[photo]", "needs one {}"),
        ("--model.init_args.learning_rate=0", "learning_rate is 0"),
    ],
)
def test_settings_out_of_range_are_refused_before_any_work(lexel, flag, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        lexel("fit", flag)
    assert message in str(error.value) + capsys.readouterr().err


# Two processes


class RanksAgree(Callback):
    """Fails unless weights, and what points have in common, are equal on both processes after training."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = torch.cat([t.flatten().double() for t in pl_module.encoder.state_dict().values()])
        shares = [torch.empty_like(state) for _ in range(2)]
        torch.distributed.all_gather(shares, state)
        assert torch.equal(*shares)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_agree_and_test_as_one(lexel, mini_scannet, tmp_path):
    def two(command: str, *flags: str) -> None:
        words = [sys.executable, "train.py", command, "--config", CONFIG]
        words += ["--config", "configs/trainer/ddp.yaml", *tiny(mini_scannet, tmp_path), "--trainer.devices=2", *flags]
        subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=500)

    def metrics() -> dict[str, float]:
        return json.loads((run_folder(tmp_path) / "test_metrics.json").read_text())

    agree = "--trainer.callbacks+=tests.end_to_end.test_bi_fusion.RanksAgree"
    lexel("fit", "--trainer.max_steps=1", NO_CALLBACKS)  # writes the world
    two("fit", "--trainer.max_steps=3", EVERY_THREE, agree)
    two("test", f"--ckpt_path={checkpoint_of(tmp_path)}")
    of_two = metrics()
    lexel("test", f"--ckpt_path={checkpoint_of(tmp_path)}")
    assert of_two == pytest.approx(metrics(), rel=1e-4)
