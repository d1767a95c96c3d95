from pathlib import Path

import pytest
import torch

from datamodules.posed_views import PosedViewsDataModule
from datamodules.readers.gaussians import read_gaussians
from tests.datamodules.tiny_scene import write_tiny_scene


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_scene(tmp_path / "scene")


def ready(root: Path, stage: str = "fit", **settings) -> PosedViewsDataModule:
    data = PosedViewsDataModule(root, **settings)
    data.setup(stage)
    return data


def test_predict_sees_all_views_in_order(root):
    views = list(ready(root, "predict").predict_dataloader())
    assert [view.name for view in views] == [f"frame_{number:05d}" for number in range(1, 6)]
    assert [view.view_id for view in views] == list(range(5))


def test_named_views_are_held_out_instead_of_every_eighth(root):
    data = ready(root, held_out=["frame_00002", "frame_00005"])
    assert [view.name for view in data.test_dataloader()] == ["frame_00002", "frame_00005"]
    assert data.train_views.names == ["frame_00001", "frame_00003", "frame_00004"]
    assert ready(root).test_views.names == ["frame_00001"]


@pytest.mark.parametrize("names", [["frame_2"], [f"frame_{number:05d}" for number in range(1, 6)]])
def test_views_that_cannot_be_held_out_are_refused(root, names):
    with pytest.raises(ValueError, match=r"held_out is frame_.*; allowed: some of the 5 views"):
        ready(root, held_out=names)


def test_gaussians_to_begin_with_are_those_of_a_file_or_a_folder(root):
    expected = read_gaussians(root / "gaussians.ply").means
    for where in ("gaussians.ply", root / "gaussians.ply", root):
        assert torch.equal(ready(root, gaussians=where).initial_gaussians.means, expected)
    assert ready(root).initial_gaussians is None
