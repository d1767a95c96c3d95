import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batches import LanguageView
from datamodules.lerf import LerfDataModule
from datamodules.samplers import OrderedViews, ShuffledViews
from tests.datamodules.tiny_scene import write_tiny_scene


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


class NameRecorder(pl.LightningModule):
    """Writes down which views it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def training_step(self, batch: LanguageView) -> Tensor:
        self.seen.append(batch.name)
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, max_steps: int) -> pl.Trainer:
    checkpoint = pl.callbacks.ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)
    return pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def test_shuffle_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ShuffledViews(Numbers(50), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = order(3, 7)
    torch.manual_seed(2)
    assert order(3, 7) == first
    assert sorted(first) == list(range(50))
    assert order(3, 8) != first
    assert order(4, 7) != first


@pytest.mark.parametrize("num_processes", [2, 3])
def test_training_shares_are_equally_long_and_cover_all_views(num_processes: int) -> None:
    shares = [list(ShuffledViews(Numbers(10), 0, num_processes, rank)) for rank in range(num_processes)]
    assert len({len(share) for share in shares}) == 1
    assert set().union(*shares) == set(range(10))


@pytest.mark.parametrize(("num_views", "num_processes"), [(10, 3), (2, 3), (0, 2), (5, 1)])
def test_evaluation_shares_hold_every_view_once(num_views: int, num_processes: int) -> None:
    samplers = [OrderedViews(Numbers(num_views), num_processes, rank) for rank in range(num_processes)]
    shares = [list(sampler) for sampler in samplers]
    assert sorted(view for share in shares for view in share) == list(range(num_views))
    assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]
    assert all(share == sorted(share) for share in shares)


@pytest.mark.parametrize(("num_workers", "stop"), [(0, 7), (0, 10), (2, 7), (2, 10)])
def test_resume_in_mid_epoch_sees_the_same_views_into_the_next_epochs(
    tmp_path: Path, num_workers: int, stop: int
) -> None:
    root = write_tiny_scene(tmp_path / "scene")

    def data() -> LerfDataModule:
        return LerfDataModule(root, num_workers=num_workers, seed=5)

    whole = NameRecorder()
    trainer(tmp_path / "whole", 17).fit(whole, data())
    assert len(set(whole.seen[:5])) == 5
    assert whole.seen[:5] != whole.seen[5:10]

    begun = NameRecorder()
    trainer(tmp_path / "run", stop).fit(begun, data())
    torch.manual_seed(123)  # the order must not come from the global generator
    resumed = NameRecorder()
    trainer(tmp_path / "run", 17).fit(resumed, data(), ckpt_path=tmp_path / "run" / "last.ckpt", weights_only=True)
    assert begun.seen + resumed.seen == whole.seen


TWO_PROCESSES = """
import sys
import lightning.pytorch as pl
import torch
from datamodules.lerf import LerfDataModule

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
    def record(self, kind, batch):
        with open(f"{sys.argv[2]}/{kind}_{self.global_rank}", "a") as file:
            file.write(batch.name + "\\n")
    def on_fit_start(self):
        for batch in self.trainer.datamodule.lifting_dataloader():
            self.record("lifting", batch)
    def training_step(self, batch):
        self.record("train", batch)
        return self.weight * 1
    def test_step(self, batch):
        self.record("test", batch)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, limit_val_batches=0, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    data, module = LerfDataModule(sys.argv[1]), Module()
    trainer.fit(module, data)
    trainer.test(module, data)
"""


@pytest.mark.ddp
def test_two_processes_share_views_even_if_one_has_none_to_test(tmp_path: Path) -> None:
    root = write_tiny_scene(tmp_path / "scene", num_views=5, num_labelled=1)
    script, seen = tmp_path / "two.py", tmp_path / "seen"
    script.write_text(TWO_PROCESSES)
    seen.mkdir()
    project = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, root, seen], env=environment, cwd=project, timeout=120, check=True)

    def names(kind: str) -> list[list[str]]:
        files = [seen / f"{kind}_{rank}" for rank in range(2)]
        return [file.read_text().split() if file.exists() else [] for file in files]

    every = {f"frame_{index:05d}" for index in range(1, 6)}
    train, lifting, test = names("train"), names("lifting"), names("test")
    assert [len(share) for share in train] == [3, 3]  # five views, one of them twice
    assert set(train[0]) | set(train[1]) == every
    assert sorted(lifting[0] + lifting[1]) == sorted(every)
    assert test == [["frame_00001"], []]
