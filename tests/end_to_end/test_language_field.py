"""The demo's configuration on a tiny world: fit, resume, validate, test, predict, export, two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.readers.gaussians import read_gaussians
from datamodules.readers.langsplat_checkpoints import read_langsplat_checkpoint
from lightning_modules.functional.answers.language_scene import render_language
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.splatting.rasterization import blending_weights, prepare_view, splat_codes
from tests.end_to_end.conftest import CONFIG, tiny_trainer, tiny_world
from tests.end_to_end.watched_runs import assert_equal_states, killed_at, saved_every

ROOT = Path(__file__).parents[2]


def state_of(runs: Path) -> dict[str, torch.Tensor]:
    return torch.load(runs / "language_field_demo" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_run_leaves_what_the_house_promises(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=6", "--trainer.check_val_every_n_epoch=1")
    run = tmp_path / "language_field_demo"
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    board = EventAccumulator(str(run)).Reload()
    assert {"train/loss", "train/loss_level_2", "codebook/perplexity_level_0", "val/miou"} <= set(
        board.Tags()["scalars"]
    )
    assert {"view/rgb", "view/features_level_0"} <= set(board.Tags()["images"])
    lexel("test", "--ckpt_path=last")
    metrics = json.loads((run / "test_metrics.json").read_text())
    assert 0 < metrics["test/miou"] <= 1
    assert 0 <= metrics["test/localization_accuracy"] <= 1
    for name in ("miou_ceiling", "localization_ceiling", "miou_best_level", "miou_ungated", "miou_alpha_gated", "psnr"):
        assert f"test/{name}" in metrics
    assert metrics["test/miou_best_level"] >= metrics["test/miou"]
    lexel("validate", "--ckpt_path=last")


EVERY_FOUR = saved_every(4)


def test_a_resume_in_the_middle_of_an_epoch_is_bit_equal(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=16", EVERY_FOUR, runs=tmp_path / "whole")  # 6 views: epochs end at steps 6 and 12
    lexel("fit", "--trainer.max_steps=8", EVERY_FOUR, runs=tmp_path / "parts")
    lexel("fit", "--trainer.max_steps=16", "--ckpt_path=last", EVERY_FOUR, runs=tmp_path / "parts")
    whole = state_of(tmp_path / "whole")
    assert whole["field_step"] == 16
    assert_equal_states(whole, state_of(tmp_path / "parts"))


def test_a_killed_run_resumes_bit_equal_from_its_last_save(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=16", EVERY_FOUR, runs=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        lexel("fit", "--trainer.max_steps=16", EVERY_FOUR, *killed_at(7), runs=tmp_path / "parts")
    lexel("fit", "--trainer.max_steps=16", "--ckpt_path=last", EVERY_FOUR, runs=tmp_path / "parts")
    whole = state_of(tmp_path / "whole")
    assert whole["field_step"] == 16
    assert_equal_states(whole, state_of(tmp_path / "parts"))


def test_the_polish_changes_the_codebook_and_nothing_else(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=1", runs=tmp_path / "a")
    lexel("fit", "--trainer.max_steps=5", runs=tmp_path / "b")
    first, second = state_of(tmp_path / "a"), state_of(tmp_path / "b")
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"field.codebook_layers.0", "field_step"}


def test_a_run_of_no_steps_keeps_the_lifted_field(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=0")
    assert state_of(tmp_path)["field.initialised"]
    assert (tmp_path / "language_field_demo" / "exports" / "language_field.safetensors").is_file()
    lexel("test", "--ckpt_path=last")


def test_a_flag_beats_the_checkpoint(lexel):
    lexel("fit", "--trainer.max_steps=2")
    command_line = lexel("test", "--ckpt_path=last", "--model.init_args.view_cache_mib=7")
    assert command_line.config.test.model.init_args.view_cache_mib == 7
    assert command_line.model._view_cache_bytes == 7 * 2**20


def test_test_without_a_checkpoint_says_what_to_do(lexel):
    with pytest.raises(ValueError, match="fit --config"):
        lexel("test")


def test_a_checkpoint_of_another_scene_is_refused(lexel, world, tmp_path):
    lexel("fit", "--trainer.max_steps=2")
    with pytest.raises(ValueError, match="other Gaussians"):
        lexel("test", "--ckpt_path=last", "--data.init_args.seed=7", f"--data.init_args.root={tmp_path / 'other'}")


def test_an_export_gives_back_the_field(lexel, tmp_path):
    command_line = lexel("fit", "--trainer.max_steps=3")
    exports = tmp_path / "language_field_demo" / "exports"
    written = load_file(exports / "language_field.safetensors")
    module = command_line.model
    codes = module.field.codes()
    assert torch.equal(written["channel_ids"], codes.channel_ids)
    torch.testing.assert_close(written["coefficients"], codes.values.detach())
    scene = read_gaussians(exports / "gaussians.ply")
    torch.testing.assert_close(scene.means, module.scene.means)

    # What LangSplatV2 renders from the checkpoint of a level is what Lexel renders.
    view = next(iter(module.data.test_dataloader()))
    weight_map = render_language(module.language_scene(), module.prepared(view)).weights
    for level, name in enumerate(module.data.level_names):
        checkpoint = read_langsplat_checkpoint(exports / "langsplatv2" / f"chkpnt3_{name}.pth")
        kept, ids = checkpoint.logits.softmax(1).topk(4, dim=1)
        kept = kept / kept.sum(1, keepdim=True)
        blending = blending_weights(prepare_view(checkpoint.scene, view.camera))
        theirs = splat_codes(blending, SparseCodes(ids.to(torch.int16), kept, 128)) @ checkpoint.codebooks[0]
        ours = module.field.level_weights(weight_map, level) @ module.field.level_codebook(level)
        torch.testing.assert_close(theirs, ours, atol=2e-3, rtol=0)


def test_export_of_a_checkpoint_equals_the_export_after_training(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=3")
    lexel("export", "--ckpt_path=last", f"--output={tmp_path / 'again'}")
    first = load_file(tmp_path / "language_field_demo" / "exports" / "language_field.safetensors")
    second = load_file(tmp_path / "again" / "language_field.safetensors")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_langsplats_recipe_trains_from_zeros(lexel, tmp_path):
    recipe = [
        "--model.init_args.initialisation=zeros",
        "--model.init_args.share_codebook=false",
        "--model.init_args.codebook_lr=2.5e-3",
        "--model.init_args.logits_lr=2.5e-3",
        "--model.init_args.straight_through=true",
    ]
    lexel("fit", "--trainer.max_steps=24", *recipe)
    state = state_of(tmp_path)
    assert state["field.logit_layers.0"].shape[2] == 128
    assert state["field.logit_layers.0"].abs().max() > 1e-3
    assert not torch.equal(state["field.codebook_layers.0"][0], state["field.codebook_layers.0"][1])


def test_layers_are_learned_one_after_the_other(lexel, tmp_path):
    layers = ["--model.init_args.vq_layer_num=2", "--model.init_args.codebook_size=16"]
    schedule = ["--trainer.callbacks+=callbacks.progressive_layers.ProgressiveLayers"]
    schedule += ["--trainer.callbacks.schedule_steps=8"]
    lexel("fit", "--trainer.max_steps=4", *layers, *schedule, runs=tmp_path / "a")
    lexel("fit", "--trainer.max_steps=8", *layers, *schedule, runs=tmp_path / "b")
    first, second = state_of(tmp_path / "a"), state_of(tmp_path / "b")
    assert first["field.active_layers"] == 1
    assert second["field.active_layers"] == 2
    assert torch.equal(first["field.codebook_layers.0"], second["field.codebook_layers.0"])
    assert not torch.equal(first["field.codebook_layers.1"], second["field.codebook_layers.1"])


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_start_from_the_same_field_as_one(lexel, world, tmp_path):
    lexel("fit", "--trainer.max_steps=1", "--model.init_args.codebook_lr=1e-12", runs=tmp_path / "one")
    command = [sys.executable, "train.py", "fit", "--config", CONFIG, "--config", "configs/trainer/ddp.yaml"]
    command += [*tiny_world(world), *tiny_trainer(tmp_path / "two"), "--trainer.devices=2"]
    command += ["--trainer.max_steps=1", "--model.init_args.codebook_lr=1e-12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    for name in ("field.entries", "field.covered", "field.reliable"):
        assert torch.equal(one[name], two[name]), name
    torch.testing.assert_close(one["field.logit_layers.0"], two["field.logit_layers.0"])
    torch.testing.assert_close(one["field.codebook_layers.0"], two["field.codebook_layers.0"])
    assert list((tmp_path / "two" / "language_field_demo").glob("events.out.tfevents.*"))
