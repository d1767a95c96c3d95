import pytest
import torch

from datamodules.language_views import StoredView
from datamodules.lerf import LerfDataModule
from datamodules.predicted_views import predicted_views
from lightning_modules.functional.camera_paths import CameraPathSettings
from tests.datamodules.tiny_scene import random_camera, write_tiny_scene

STORED = [StoredView(f"frame_{number:05d}", random_camera(number), None, None, None, None) for number in range(1, 6)]


def test_views_are_named_or_numbered_and_come_in_the_order_asked():
    assert list(predicted_views(STORED, None, None)[1]) == [0, 1, 2, 3, 4]
    assert list(predicted_views(STORED, ["frame_00004", 0], None)[1]) == [3, 0]


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ("frame_0004", r"has 'frame_0004'.*such as frame_00004.*0 to 4"),
        (5, r"has 5, which.*frame_00001 to frame_00005.*0 to 4"),
        (-1, "has -1"),
    ],
)
def test_an_unknown_view_is_refused_with_what_is_like_it(view, message):
    with pytest.raises(ValueError, match=message):
        predicted_views(STORED, [view], None)


def test_a_path_leads_through_the_views_under_names_and_numbers_of_its_own():
    stored, ids = predicted_views(STORED, [4, 1, 2], CameraPathSettings(frames=7))
    flown = [stored[view_id] for view_id in ids]
    assert [view.name for view in flown] == [f"path_{number:04d}" for number in range(7)]
    assert list(ids) == [5, 6, 7, 8, 9, 10, 11]
    torch.testing.assert_close(flown[0].camera.position, STORED[4].camera.position, atol=1e-5, rtol=0)
    torch.testing.assert_close(flown[-1].camera.position, STORED[2].camera.position, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("views", "frames", "message"), [([1], 5, "2 views or more"), (None, 1, "frames .* is 1")])
def test_a_path_of_too_little_is_refused(views, frames, message):
    with pytest.raises(ValueError, match=message):
        predicted_views(STORED, views, CameraPathSettings(frames=frames))


def test_an_unknown_view_is_told_when_the_scene_is_read(tmp_path):
    data = LerfDataModule(write_tiny_scene(tmp_path / "tiny"), views=["frame_0002"])
    with pytest.raises(ValueError, match="such as frame_00002"):
        data.setup()


def test_prediction_flies_through_a_scene(tmp_path):
    root = write_tiny_scene(tmp_path / "tiny")
    data = LerfDataModule(root, views=[0, 1, 2], path=CameraPathSettings(frames=4))
    data.setup()
    views = list(data.predict_dataloader())
    assert [view.name for view in views] == ["path_0000", "path_0001", "path_0002", "path_0003"]
    assert all(view.image is None and view.labels is None for view in views)
    assert len(data.views) == 5
