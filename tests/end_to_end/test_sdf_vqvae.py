"""The VQVAE demo's configuration on a few tiny solids: fit, resume, stages, test, predict, export, two processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.writers.shapes import read_tokens
from lightning_modules.functional.sdf_vqvae.token_sequences import tokens_of_sequence
from lightning_modules.networks.sdf_vqvae.vae_weights import load_exported
from tests.end_to_end.watched_runs import RECORDED, LossRecorder, assert_equal_states, killed_at, saved_every
from train import CommandLine, main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "sdf_vqvae"
GOLDEN = ROOT / "tests" / "golden" / "sdf_vqvae_losses.json"
RUN = "sdf_vqvae_demo"
RESTING = '{"network.encoder": [[4, 7]], "network.decoder": [[4, 7]]}'
CALLBACKS = (
    '--trainer.callbacks=[{"class_path": "callbacks.resumable_checkpoint.ResumableCheckpoint", '
    '"init_args": {"every_n_train_steps": 3}}, {"class_path": "callbacks.staged_training.StagedTraining", '
    f'"init_args": {{"resting": {RESTING}}}}}]'
)
SAVED = saved_every(100)


@pytest.fixture(scope="session")
def solids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds") / "solids"


@pytest.fixture
def lexel(solids: Path, tmp_path: Path) -> Callable[..., CommandLine]:
    """Runs a command of the demo's configuration on the tiny solids, in a folder of runs of its own."""

    def run(command: str, *flags: str, runs: Path = tmp_path) -> CommandLine:
        return main([command, "--config", str(CONFIGS / "demo.yaml"), *tiny(solids, runs), *flags])

    return run


def tiny(solids: Path, runs: Path) -> list[str]:
    return [
        f"--data.init_args.root={solids}",
        "--data.init_args.num_train=6",
        "--data.init_args.num_val=2",
        "--data.init_args.num_test=3",
        "--data.init_args.resolution=16",
        "--data.init_args.band=2",
        "--data.init_args.max_voxels_per_batch=4000",
        "--model.init_args.embed_dim=8",
        "--model.init_args.model_channels=32",
        "--model.init_args.num_blocks=1",
        "--model.init_args.num_embeddings=32",
        "--model.init_args.vae_steps=2",
        "--model.init_args.lambda_kl=1e-4",
        "--model.init_args.quantizer.revive_every=2",
        "--model.init_args.quantizer.decay=0.8",
        *tiny_trainer(runs),
    ]


def tiny_trainer(runs: Path) -> list[str]:
    return [
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        f"--trainer.logger.init_args.save_dir={runs}",
    ]


def checkpoint_of(runs: Path) -> Path:
    return runs / RUN / "checkpoints" / "last.ckpt"


def state_of(runs: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint_of(runs), weights_only=True)["state_dict"]


def metrics_of(runs: Path) -> dict[str, float]:
    return json.loads((runs / RUN / "test_metrics.json").read_text())


def test_a_run_leaves_what_the_house_promises(lexel, tmp_path):
    window = "--model.init_args.usage_window=3"
    command_line = lexel("fit", "--trainer.max_steps=6", "--trainer.check_val_every_n_epoch=1", window)
    run = tmp_path / RUN
    board = EventAccumulator(str(run)).Reload()
    terms = ("sdf", "occupancy", "codebook", "commitment")
    assert {
        "train/loss",
        "val/sign_iou",
        "train/codebook_usage",
        "train/revived_codes",
        *(f"train/loss_{term}" for term in terms),
    } <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["shapes"]

    files = ["codebook.safetensors", "config.json", "encoder.safetensors", "sdf_vqvae.safetensors"]
    assert sorted(path.name for path in (run / "exports").iterdir()) == files
    own = command_line.model.network.state_dict()
    loaded = load_exported(run / "exports")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in own.items())
    with safe_open(run / "exports" / "codebook.safetensors", "pt") as codebook:
        assert codebook.get_tensor("codes").shape == (32, 8)
        assert codebook.metadata()["step"] == "6"
    with safe_open(run / "exports" / "encoder.safetensors", "pt") as encoder:
        assert {name.split(".")[0] for name in encoder.keys()} == {"encoder", "quantizer"}  # noqa: SIM118

    lexel("test", "--ckpt_path=last")
    metrics = metrics_of(tmp_path)
    for name in ("sign_iou", "f_score_64", "f_score_128", "normal_consistency", "codebook_usage", "missing_voxels"):
        assert 0 <= metrics[f"test/{name}"] <= 1, name
    assert metrics["test/perplexity"] == pytest.approx(np.exp(metrics["test/token_entropy"]), rel=1e-4)
    assert metrics["test/dead_codes"] == 32 * (1 - metrics["test/codebook_usage"])
    assert metrics["test/sdf_mae"] > 0

    writer = '{"class_path": "callbacks.shape_writer.ShapeWriter", "init_args": {"mesh_format": "glb"}}'
    lexel("predict", "--ckpt_path=last", f"--trainer.callbacks=[{writer}]")
    predictions = run / "predictions"
    tokens = read_tokens(predictions / "tokens" / "test" / "00001.npz")
    with np.load(predictions / "tokens" / "test" / "00001.npz") as stored:
        sequence = torch.from_numpy(stored["sequence"]).flatten()
        coords, ids = tokens_of_sequence(sequence, tuple(stored["grid"].tolist()), int(stored["num_codes"]))
        assert stored["sequence"].shape == (16, 4)
    assert torch.equal(coords.int(), tokens.coords[:, 1:])
    assert torch.equal(ids.long(), tokens.code_ids)
    decoded = loaded.decode(tokens).sdf
    assert decoded.resolution == 16
    assert len(decoded.feats) > 0
    assert sorted(path.name for path in (predictions / "pictures" / "test").iterdir()) == [
        f"0000{number}.png" for number in range(3)
    ]
    picture = np.asarray(Image.open(predictions / "pictures" / "test" / "00001.png"))
    assert picture.shape[1:] == (512, 3)
    assert picture[:256, :256].std() > 10  # the input is there
    for path in (predictions / "meshes" / "test").iterdir():
        trimesh.load(path)


# Resume and stages


@pytest.fixture(scope="module")
def whole_run(solids: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Ten steps in one go: two without codes, two of all, three of the codebook alone, three of all."""
    runs = tmp_path_factory.mktemp("whole")
    main(["fit", "--config", str(CONFIGS / "demo.yaml"), *tiny(solids, runs), "--trainer.max_steps=10", CALLBACKS,
          "--model.init_args.vae_steps=4"])  # fmt: skip
    return state_of(runs)


@pytest.mark.parametrize("step", [5, 8])
def test_a_killed_run_resumes_bit_equal_across_the_boundaries_of_stages(lexel, tmp_path, whole_run, step):
    flags = ["--trainer.max_steps=10", CALLBACKS, "--model.init_args.vae_steps=4"]
    with pytest.raises(RuntimeError, match="killed"):
        lexel("fit", *flags, *killed_at(step))
    assert state_of(tmp_path)["trained_steps"] == 3 * (step // 3)
    lexel("fit", *flags, "--ckpt_path=last")
    assert_equal_states(whole_run, state_of(tmp_path))


@pytest.fixture(scope="module")
def vae(solids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a VAE."""
    runs = tmp_path_factory.mktemp("vae")
    main(["fit", "--config", str(CONFIGS / "demo.yaml"), *tiny(solids, runs), "--trainer.max_steps=2", SAVED,
          "--model.init_args.training_stage=0", "--model.init_args.lambda_kl=1e-4"])  # fmt: skip
    return checkpoint_of(runs)


def test_stage_1_trains_the_codebook_alone_and_stage_2_goes_on_from_it(lexel, vae, tmp_path):
    pretrained = torch.load(vae, weights_only=True)["state_dict"]
    given = f"--model.init_args.pretrained_vae_path={vae}"  # vae_steps, which tiny() has, do not delay stage 1
    first = lexel(
        "fit", "--trainer.max_steps=4", SAVED, given, "--model.init_args.training_stage=1", runs=tmp_path / "stage1"
    )
    codebook = state_of(tmp_path / "stage1")
    of_network = [name for name in codebook if name.startswith(("network.encoder.", "network.decoder."))]
    assert all(torch.equal(codebook[name], pretrained[name]) for name in of_network)
    assert not torch.equal(codebook["network.quantizer.codes"], pretrained["network.quantizer.codes"])
    assert sum(len(group["params"]) for group in first.trainer.optimizers[0].param_groups) == 1

    given = f"--model.init_args.pretrained_vae_path={checkpoint_of(tmp_path / 'stage1')}"
    lexel("fit", "--trainer.max_steps=1", "--model.init_args.vae_steps=0", SAVED, given,
          "--model.init_args.learning_rate=1e-12", "--model.init_args.last_learning_rate=0",
          "--model.init_args.quantizer.decay=0.999999", runs=tmp_path / "stage2")  # fmt: skip
    started = state_of(tmp_path / "stage2")
    torch.testing.assert_close(started["network.quantizer.codes"], codebook["network.quantizer.codes"])


def test_a_part_that_rests_stays_as_it_is(lexel, vae, tmp_path):
    pretrained = torch.load(vae, weights_only=True)["state_dict"]
    resting = CALLBACKS.replace("[[4, 7]]", "[[0, 3]]")
    given = f"--model.init_args.pretrained_vae_path={vae}"
    lexel("fit", "--trainer.max_steps=3", "--model.init_args.vae_steps=0", resting, given)
    state = state_of(tmp_path)
    assert all(torch.equal(state[n], pretrained[n]) for n in state if n.startswith("network.encoder."))
    lexel("fit", "--trainer.max_steps=4", "--model.init_args.vae_steps=0", resting, given, "--ckpt_path=last")
    later = state_of(tmp_path)
    assert not torch.equal(later["network.encoder.out_layer.weight"], pretrained["network.encoder.out_layer.weight"])


def test_settings_that_cannot_work_are_refused_before_training(lexel):
    with pytest.raises(ValueError, match=r"lambda_kl is -1\.0; allowed: 0 or more"):
        lexel("fit", "--model.init_args.lambda_kl=-1", SAVED)
    with pytest.raises(ValueError, match=r"model.init_args.down_factor is 8, data.init_args.down_factor 4"):
        lexel("fit", "--model.init_args.down_factor=8", SAVED)
    with pytest.raises(ValueError, match=r"training_stage 1 .*pretrained_vae_path"):
        lexel("fit", "--model.init_args.training_stage=1", SAVED)
    with pytest.raises(ValueError, match=r"no submodule 'network.codec'"):
        lexel("fit", SAVED, "--trainer.callbacks+=callbacks.staged_training.StagedTraining",
              '--trainer.callbacks.resting={"network.codec": [[0, 2]]}')  # fmt: skip
    with pytest.raises(ValueError, match=r"no trained network to test.*fit --config"):
        lexel("test")
    lexel("fit", "--trainer.max_steps=1", SAVED)
    with pytest.raises(ValueError, match=r"trained with num_embeddings 32 \(here 64\)\. Set model\.init_args"):
        lexel("test", "--model.init_args.num_embeddings=64", "--ckpt_path=last")


def test_other_forms_of_the_network_train_and_test(lexel, tmp_path):
    """Every child kept, with all terms of the loss; four cells a token."""
    short = ["--trainer.max_steps=3", "--model.init_args.vae_steps=1", SAVED]
    kept = ["--model.init_args.predicts_occupancy=false", "--model.init_args.lambda_outside=0.1",
            "--model.init_args.lambda_sharp=1", "--model.init_args.loss_type=l1+mse"]  # fmt: skip
    command_line = lexel("fit", *short, *kept, runs=tmp_path / "kept")
    assert {"train/loss_outside", "train/loss_sharp"} <= command_line.trainer.callback_metrics.keys()
    packed = ["--model.init_args.cells_per_token=4", "--model.init_args.quantizer.kind=l2"]
    lexel("fit", *short, *packed, runs=tmp_path / "packed")
    lexel("test", *packed, "--ckpt_path=last", "--model.init_args.meshes=false", runs=tmp_path / "packed")
    assert 0 <= metrics_of(tmp_path / "packed")["test/sign_iou"] <= 1


def test_eight_steps_have_the_golden_losses(lexel):
    LossRecorder.losses.clear()
    lexel("fit", "--trainer.max_steps=8", "--model.init_args.vae_steps=4", "--trainer.callbacks=[]", RECORDED)
    expected = json.loads(GOLDEN.read_text())
    assert LossRecorder.losses == pytest.approx(expected, rel=1e-2)  # a latent between two codes may go to either


# Two processes


class RanksAgree(Callback):
    """Fails unless weights and buffers are equal on both processes after training."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = torch.cat([t.flatten().double() for t in pl_module.network.state_dict().values()])
        shares = [torch.empty_like(state) for _ in range(2)]
        torch.distributed.all_gather(shares, state)
        assert torch.equal(*shares)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_agree_and_test_as_one(lexel, solids, tmp_path):
    def two(command: str, *flags: str) -> None:
        words = [sys.executable, "train.py", command, "--config", str(CONFIGS / "demo.yaml")]
        words += ["--config", "configs/trainer/ddp.yaml", *tiny(solids, tmp_path), "--trainer.devices=2", *flags]
        subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=500)

    agree = "--trainer.callbacks+=tests.end_to_end.test_sdf_vqvae.RanksAgree"
    main(
        [
            "fit",
            "--config",
            str(CONFIGS / "demo.yaml"),
            *tiny(solids, tmp_path / "world"),
            "--trainer.max_steps=1",
            SAVED,
        ]
    )  # fmt: skip (writes the solids)
    two("fit", "--trainer.max_steps=8", "--model.init_args.vae_steps=4", CALLBACKS, agree)
    two("test", f"--ckpt_path={checkpoint_of(tmp_path)}")
    of_two = metrics_of(tmp_path)
    lexel("test", f"--ckpt_path={checkpoint_of(tmp_path)}")
    assert of_two == pytest.approx(metrics_of(tmp_path), rel=1e-5, nan_ok=True)


# Real meshes


def test_real_meshes_become_tokens_and_meshes_again(shared_data, tmp_path):
    flags = [
        f"--data.init_args.root={shared_data / 'meshes'}",
        f"--data.init_args.cache={tmp_path / 'cache'}",
        "--data.init_args.resolution=32",
        "--data.init_args.crop_blocks=2",
        "--model.init_args.embed_dim=8",
        "--model.init_args.model_channels=32",
        "--model.init_args.num_blocks=1",
        "--model.init_args.num_embeddings=32",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        *tiny_trainer(tmp_path),
    ]
    vae = ["--config", str(CONFIGS / "vae.yaml"), *[flag for flag in flags if "num_embeddings" not in flag]]
    main(["fit", *vae])
    weights = tmp_path / "sdf_vqvae_vae" / "checkpoints" / "last.ckpt"
    stage1 = ["--config", str(CONFIGS / "stage1.yaml"), *flags, f"--model.init_args.pretrained_vae_path={weights}"]
    main(["fit", *stage1])
    run = tmp_path / "sdf_vqvae_stage1"
    main(["predict", *stage1, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"])
    names = sorted(path.stem for path in (run / "predictions" / "tokens").rglob("*.npz"))
    assert names == sorted(path.stem for path in (run / "predictions" / "meshes").rglob("*.ply"))
    assert len(names) >= 4
