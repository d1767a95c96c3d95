"""Gaussians from photographs on a tiny world: fit, resume, validate, test, predict, export, and what cannot work."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.lerf import LerfDataModule
from datamodules.readers.gaussians import read_gaussians
from datamodules.readers.langsplat_checkpoints import read_langsplat_checkpoint
from datamodules.readers.safe_pickles import load_pickled_tensors
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.gaussian_rgb import GaussianRgbModule
from tests.end_to_end.conftest import tiny_world
from tests.end_to_end.watched_runs import RECORDED, LossRecorder, killed_at, saved_every
from train import CommandLine, main

CONFIG = str(Path(__file__).parents[2] / "configs" / "gaussian_rgb" / "demo.yaml")
GOLDEN = Path(__file__).parents[1] / "golden" / "gaussian_rgb_losses.json"
RUN = "gaussian_rgb_demo"

# Gaussians change after steps 4, 8 and 12, opacities after step 10, the size of photos after step 5. Ten views: epochs
# end at steps 10 and 20.
EARLY_CHANGES = [
    "--model.init_args.densification.first_step=3",
    "--model.init_args.densification.every=4",
    "--model.init_args.densification.reset_opacity_every=10",
    "--model.init_args.densification.gradient_threshold=1.5e-3",
    "--model.init_args.full_size_steps=[5]",
]


def run_demo(world: Path, runs: Path, command: str, *flags: str) -> CommandLine:
    settings = [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        f"--trainer.logger.init_args.save_dir={runs}",
    ]
    return main([command, "--config", CONFIG, *tiny_world(world), *settings, *EARLY_CHANGES, *flags])


@pytest.fixture
def gaussian_rgb(world: Path, tmp_path: Path) -> Callable[..., CommandLine]:
    """Runs a command of the demo's configuration on the tiny world, in a folder of runs of its own."""

    def run(command: str, *flags: str, runs: Path = tmp_path) -> CommandLine:
        return run_demo(world, runs, command, *flags)

    return run


def checkpoint_of(runs: Path) -> dict:
    return torch.load(runs / RUN / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal_scenes(first: GaussianScene, second: GaussianScene) -> None:
    for name, part, other in zip(GaussianScene._fields, first, second, strict=True):
        assert torch.equal(part, other), name


def test_a_run_leaves_what_the_house_promises(gaussian_rgb, world, tmp_path):
    command_line = gaussian_rgb("fit", "--trainer.max_steps=14", "--trainer.check_val_every_n_epoch=1")
    run, scene = tmp_path / RUN, command_line.model.scene
    assert (run / "config.yaml").is_file()
    board = EventAccumulator(str(run)).Reload()
    assert {"train/loss", "train/psnr", "train/num_gaussians", "val/psnr", "val/ssim"} <= set(board.Tags()["scalars"])
    assert {"views/frame_00001", "views/frame_00009"} == set(board.Tags()["images"])
    counts = [event.value for event in board.Scalars("train/num_gaussians")]
    assert len(set(counts)) > 2

    assert_equal_scenes(scene, read_gaussians(run / "exports" / "gaussians.ply"))
    checkpoint = read_langsplat_checkpoint(run / "exports" / "chkpnt14.pth")
    assert_equal_scenes(scene, checkpoint.scene)
    assert checkpoint.iteration == 14
    assert checkpoint.spatial_lr_scale == pytest.approx(float(command_line.model.cameras_extent))
    field_data = LerfDataModule(world, gaussians=run)
    field_data.setup()
    assert_equal_scenes(scene, field_data.gaussians)
    assert field_data.ceiling is None  # it is about the world's own Gaussians

    gaussian_rgb("test", "--ckpt_path=last")
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert set(metrics) == {"test/psnr", "test/ssim", "test/num_gaussians"}
    assert metrics["test/num_gaussians"] == scene.num_gaussians
    gaussian_rgb("predict", "--ckpt_path=last")
    pictures = sorted((run / "predictions" / "renders").iterdir())
    assert [path.stem for path in pictures] == [f"frame_{number:05d}" for number in range(1, 13)]
    assert np.asarray(Image.open(pictures[0])).shape == (72, 96, 3)
    gaussian_rgb("validate", "--ckpt_path=last")
    gaussian_rgb("export", "--ckpt_path=last", f"--output={tmp_path / 'again'}")
    assert_equal_scenes(scene, read_gaussians(tmp_path / "again" / "chkpnt14.pth"))


def test_a_3dgs_checkpoint_opens_with_3dgs_optimizer_groups(gaussian_rgb, tmp_path):
    gaussian_rgb("fit", "--trainer.max_steps=2")
    capture, iteration = load_pickled_tensors(tmp_path / RUN / "exports" / "chkpnt2.pth")
    assert len(capture) == 12
    assert iteration == 2
    degree, means, constant, rest, log_scales, quaternions, opacity_logits, radii, sums, counts, state, _ = capture
    assert degree == 0
    # What 3DGS does in training_setup and restore:
    parameters = {
        "xyz": means,
        "f_dc": constant,
        "f_rest": rest,
        "opacity": opacity_logits,
        "scaling": log_scales,
        "rotation": quaternions,
    }
    groups = [{"params": [part], "lr": 1.0, "name": name} for name, part in parameters.items()]
    optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-15)
    optimizer.load_state_dict(state)
    assert [group["name"] for group in optimizer.param_groups] == list(parameters)
    assert all(0 < group["lr"] < 0.1 for group in optimizer.param_groups)
    num = len(means)
    assert (radii.shape, sums.shape, counts.shape) == ((num,), (num, 1), (num, 1))


EVERYTHING = ["--model.init_args.background=random", "--model.init_args.exposure=true"]
EVERYTHING += ["--model.init_args.sh_degree_every=6"]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The last checkpoint of an uninterrupted run of 14 steps."""
    runs = tmp_path_factory.mktemp("whole")
    run_demo(world, runs, "fit", "--trainer.max_steps=14", saved_every(7), *EVERYTHING)
    return checkpoint_of(runs)


def assert_equal_runs(whole: dict, parts: dict) -> None:
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][name]), name
    (state,), (other) = whole["optimizer_states"], parts["optimizer_states"][0]
    for index, moments in state["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, other["state"][index][name]), (index, name)


@pytest.mark.parametrize("stop", [7, 8, 10])
def test_a_resume_is_bit_equal_although_the_gaussians_change(gaussian_rgb, whole, tmp_path, stop):
    """From the middle of an epoch, from the step before a densification, and before a reset of opacities."""
    first = gaussian_rgb("fit", f"--trainer.max_steps={stop}", saved_every(stop), *EVERYTHING)
    assert first.model.gaussians.num_gaussians != first.model.data.points.shape[0]
    gaussian_rgb("fit", "--trainer.max_steps=14", "--ckpt_path=last", saved_every(7), *EVERYTHING)
    parts = checkpoint_of(tmp_path)
    assert parts["state_dict"]["gaussians.means"].shape != first.model.gaussians.means.shape
    assert_equal_runs(whole, parts)


def test_a_killed_run_resumes_bit_equal_from_its_last_save(gaussian_rgb, whole, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        gaussian_rgb("fit", "--trainer.max_steps=14", saved_every(7), *killed_at(12), *EVERYTHING)
    gaussian_rgb("fit", "--trainer.max_steps=14", "--ckpt_path=last", saved_every(7), *EVERYTHING)
    assert_equal_runs(whole, checkpoint_of(tmp_path))


# A Gaussian near a threshold would turn the last digit of a gradient into another scene.
SPLIT_ALL = ["--model.init_args.densification.gradient_threshold=0", "--model.init_args.densification.percent_dense=0"]


def test_ten_steps_have_the_golden_losses(gaussian_rgb):
    LossRecorder.losses.clear()
    gaussian_rgb("fit", "--trainer.max_steps=10", RECORDED, *SPLIT_ALL)
    expected = json.loads(GOLDEN.read_text())
    assert LossRecorder.losses == pytest.approx(expected, rel=1e-3)  # processors round differently, not this much


def test_training_gains_decibels(gaussian_rgb, tmp_path):
    flags = ["--trainer.max_steps=60", "--trainer.check_val_every_n_epoch=1"]
    gaussian_rgb("fit", *flags, "--model.init_args.densification.reset_opacity_every=0")
    psnr = [event.value for event in EventAccumulator(str(tmp_path / RUN)).Reload().Scalars("val/psnr")]
    assert len(psnr) == 6
    assert psnr[-1] > psnr[0] + 2


def test_an_exposure_is_learned_for_photographs_seen_alone(gaussian_rgb):
    model = gaussian_rgb("fit", "--trainer.max_steps=3", "--model.init_args.exposure=true").model
    changed = (model.exposures != torch.eye(3, 4)).flatten(1).any(1)
    assert int(changed.sum()) == 3


def test_training_may_begin_at_given_gaussians(world, tmp_path):
    config = str(Path(CONFIG).with_name("colmap.yaml"))
    flags = [f"--data.init_args.root={world}", "--data.init_args.gaussians=gaussians.ply", "--trainer.max_steps=1"]
    flags += [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.accelerator=cpu"]
    model = main(["fit", "--config", config, *flags]).model
    scene = read_gaussians(world / "gaussians.ply")
    torch.testing.assert_close(model.scene.means, scene.means, atol=0.01, rtol=0)
    assert model.scene.spherical_harmonics.shape[1] == 16


def test_several_devices_are_refused_before_training(monkeypatch):
    module = GaussianRgbModule()
    module._trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="cannot be trained on 2 devices"):
        module.setup("fit")
    module.setup("test")


def test_another_precision_is_refused(gaussian_rgb):
    with pytest.raises(ValueError, match="precision is bf16-mixed; allowed: 32-true"):
        gaussian_rgb("fit", "--trainer.max_steps=1", "--trainer.precision=bf16-mixed")


def test_several_views_in_a_step_are_refused(gaussian_rgb):
    with pytest.raises(ValueError, match="accumulate_grad_batches is 4; allowed: 1"):
        gaussian_rgb("fit", "--trainer.max_steps=1", "--trainer.accumulate_grad_batches=4")


@pytest.mark.skipif(torch.cuda.is_available() and importlib.util.find_spec("gsplat") is not None, reason="it could run")
def test_a_backend_that_cannot_run_is_refused_before_training(gaussian_rgb):
    with pytest.raises(ValueError, match="backend 'gsplat' needs"):
        gaussian_rgb("fit", "--model.init_args.backend=gsplat")


def test_losing_all_gaussians_is_told(gaussian_rgb):
    flags = ["--model.init_args.densification.min_opacity=0.98"]
    flags += ["--model.init_args.densification.reset_opacity_to=0.99"]
    with pytest.raises(ValueError, match=r"After step 4 all .* Gaussians were removed"):
        gaussian_rgb("fit", "--trainer.max_steps=6", *flags)


def test_a_loss_that_is_no_number_is_told_with_its_step(gaussian_rgb):
    with pytest.raises(ValueError, match=r"The loss of step 1 is (nan|inf)"):
        gaussian_rgb("fit", "--trainer.max_steps=6", "--model.init_args.learning_rates.harmonics=1e38")


def test_test_without_a_checkpoint_says_what_to_do(gaussian_rgb):
    with pytest.raises(ValueError, match="no trained Gaussians to test"):
        gaussian_rgb("test")


def test_a_checkpoint_of_another_scene_or_degree_is_refused(gaussian_rgb, tmp_path):
    gaussian_rgb("fit", "--trainer.max_steps=2")
    with pytest.raises(ValueError, match="another scene"):
        gaussian_rgb("test", "--ckpt_path=last", "--data.init_args.test_every=3")
    with pytest.raises(ValueError, match="The checkpoint has 4 spherical harmonics, but sh_degree 2 makes 9"):
        gaussian_rgb("test", "--ckpt_path=last", "--model.init_args.sh_degree=2")
    with pytest.raises(ValueError, match="exposure"):
        gaussian_rgb("test", "--ckpt_path=last", "--model.init_args.exposure=true")
