import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import Trainer
from typing_extensions import override

from callbacks.feature_store_writer import FeatureStoreWriter
from callbacks.frame_feature_writer import FrameFeatureWriter
from callbacks.writers.frame_features import read_costs
from datamodules.batches import SceneFrames
from datamodules.readers.feature_store import open_feature_store
from lightning_modules.image_tokens import ImageTokensModule
from lightning_modules.networks.bi_fusion.clip_tokens import DenseClip, RandomClipTokens
from tests.callbacks.test_frame_feature_writer import Trained
from tests.datamodules.mini_rooms import mini_scans


class RandomTokens(ImageTokensModule):
    """A small tower with random weights; counts what it is asked."""

    def __init__(self, seed: int = 0, fail_at: int = -1) -> None:
        super().__init__(model_name="random", use_amp=False)
        self.seed, self.fail_at, self.asked = seed, fail_at, []

    @override
    def make_tower(self) -> DenseClip:
        return RandomClipTokens(self.seed, embed_dim=16, image_size=64, dense_mode=self.dense_mode)

    @override
    def predict_step(self, frames: SceneFrames, batch_idx: int) -> list:
        if batch_idx == self.fail_at:
            raise KeyboardInterrupt
        self.asked += list(frames.scenes)
        return super().predict_step(frames, batch_idx)


def fill(root: Path, output: Path, module: ImageTokensModule | None = None, backend: str = "lmdb", **settings):
    module = module or RandomTokens()
    data = mini_scans(root, **{"offline_clip_feat": False, "image_size": (64, 64), "batch_size": 2, **settings})
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[FeatureStoreWriter(str(output), backend)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    try:
        trainer.predict(module, data)
    except SystemExit:  # Lightning's answer to an interrupt
        assert module.fail_at >= 0
    return module, data


@pytest.mark.parametrize("backend", ["lmdb", "safetensors"])
def test_training_from_the_store_sees_what_the_tower_says_to_half_precision(backend, mini_root, tmp_path):
    module, online = fill(mini_root, tmp_path / "store", backend=backend)
    assert len(module.asked) == 9
    tower = module.tower()
    store = open_feature_store(tmp_path / "store", weight_hash=tower.weight_hash, dense_mode="clearclip")
    torch.testing.assert_close(store.projection, tower.projection)
    offline = mini_scans(mini_root, feature_store=tmp_path / "store", image_size=(64, 64), batch_size=2)
    offline.setup()
    for images, tokens in zip(online.predict_dataloader(), offline.predict_dataloader(), strict=True):
        assert tokens.images is None
        dense = tower(images.images[:, 0])
        torch.testing.assert_close(tokens.tokens[:, 0].float(), dense.tokens, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(tokens.clip_global[:, 0].float(), dense.clip_global, atol=1e-3, rtol=1e-3)


def test_an_interrupted_run_keeps_what_was_computed_and_the_next_one_goes_on(mini_root, tmp_path):
    first, _ = fill(mini_root, tmp_path / "store", RandomTokens(fail_at=2))
    assert len(first.asked) == 4
    assert len(open_feature_store(tmp_path / "store").keys()) == 4
    second, _ = fill(mini_root, tmp_path / "store")
    assert len(second.asked) == 5
    third, _ = fill(mini_root, tmp_path / "store")
    assert third.asked == []
    assert len(open_feature_store(tmp_path / "store").keys()) == 9


def test_tokens_of_other_weights_or_sizes_are_refused(mini_root, tmp_path):
    fill(mini_root, tmp_path / "store", frames_per_scene=1)
    with pytest.raises(ValueError, match="was made otherwise: weight_hash is"):
        fill(mini_root, tmp_path / "store", RandomTokens(seed=1))
    with pytest.raises(ValueError, match=r"image_size is \(64, 64\) there, \(32, 32\) here"):
        fill(mini_root, tmp_path / "store", image_size=(32, 32))


def test_a_store_cannot_be_filled_from_a_store(mini_root, tmp_path):
    with pytest.raises(ValueError, match="tokens for a store come from photos"):
        fill(mini_root, tmp_path / "store", offline_clip_feat=True, image_size=(224, 224))


def _rank(rank: int, port: int, root: Path, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    settings = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": "ddp",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
    }
    torch.set_num_threads(1)  # the parent's threads are not in a fork

    def fill_store(**data: Any) -> int:
        module = RandomTokens()
        photos = mini_scans(root, offline_clip_feat=False, image_size=(64, 64), batch_size=1, **data)
        Trainer(**settings, callbacks=[FeatureStoreWriter(str(folder / "store"))]).predict(module, photos)
        return len(module.asked)

    def write_frames() -> int:
        encoder = Trained()
        writer = FrameFeatureWriter(str(folder / "frames"))
        Trainer(**settings, callbacks=[writer]).predict(encoder, mini_scans(root, batch_size=1))
        return len(encoder.asked)

    asked = [fill_store(scenes_file=folder / "scenes.txt", frames_per_scene=1), fill_store(), write_frames()]
    if rank == 0:
        next((folder / "frames").glob("*/frame_*.npz")).unlink()
    asked.append(write_frames())
    (folder / f"asked_{rank}").write_text(json.dumps(asked))


@pytest.mark.ddp
def test_two_processes_share_the_frames_and_one_may_have_none(mini_root, tmp_path, free_port):
    (tmp_path / "scenes.txt").write_text("scene0001_00\n")
    # Forked, since to import everything twice would take ten times as long as what is tested.
    mp.start_processes(_rank, (free_port, mini_root, tmp_path), nprocs=2, start_method="fork")
    asked = [json.loads((tmp_path / f"asked_{rank}").read_text()) for rank in range(2)]
    assert asked == [[1, 4, 5, 1], [0, 4, 4, 0]]
    assert len(list((tmp_path / "store").glob("shard_*.lmdb"))) == 2
    assert len(open_feature_store(tmp_path / "store").keys()) == 9
    assert len(list((tmp_path / "frames").glob("*/frame_*.npz"))) == 9
    assert len(read_costs(tmp_path / "frames" / "frames.csv")) == 9
