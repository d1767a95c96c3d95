from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.depth_maps import DepthMapsDataModule, random_crop, resize_nearest
from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange, depth_of_scaled


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two kinds of ten scenes of two frames; every frame is of one depth, its number in centimetres."""
    number = 50
    for kind in ("hall", "room"):
        for scene in range(10):
            for frame in range(2):
                path = tmp_path / kind / f"{scene}" / "depth" / f"{frame}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((6, 8), number * 10, np.uint16)).save(path)
                number += 1
    return tmp_path


def data_module(folder: Path, **settings) -> DepthMapsDataModule:
    data = DepthMapsDataModule(folder, image_size=(4, 4), batch_size=3, **settings)
    data.setup("fit")
    return data


def scenes(loader) -> set[str]:
    return {name.rsplit("/", 2)[0] for maps in loader for name in maps.names}


def test_scenes_are_held_out_whole_and_by_kind(folder):
    data = data_module(folder, val_fraction=0.2, test_fraction=0.2)
    train, val, test = (scenes(f()) for f in (data.gallery_dataloader, data.val_dataloader, data.test_dataloader))
    assert len(train) + len(val) + len(test) == len(train | val | test) == 20
    for held_out in (val, test):
        assert sorted(name.split("/")[0] for name in held_out) == ["hall", "hall", "room", "room"]


def test_another_seed_holds_out_other_scenes(folder):
    assert scenes(data_module(folder).test_dataloader()) == scenes(data_module(folder).test_dataloader())
    assert scenes(data_module(folder).test_dataloader()) != scenes(data_module(folder, seed=1).test_dataloader())


def test_named_scenes_are_held_out(folder):
    data = data_module(folder, val_scenes=["room/3"], test_scenes=["hall/1", "room/9"])
    assert scenes(data.val_dataloader()) == {"room/3"}
    assert scenes(data.test_dataloader()) == {"hall/1", "room/9"}
    with pytest.raises(ValueError, match="test_scenes names attic/1, but"):
        data_module(folder, test_scenes=["attic/1"])


def test_files_of_one_scene_can_be_held_out(folder):
    data = data_module(folder / "room" / "0" / "..", split_by="file")
    assert len({name for maps in data.test_dataloader() for name in maps.names}) == 2


def test_too_few_scenes_are_refused_with_the_way_out(folder):
    with pytest.raises(ValueError, match=r"has 2 scenes.*split_by=file"):
        data_module(folder / "room" / "0")


def test_batches_are_scaled_and_know_their_kinds(folder):
    data = data_module(folder, depth_range=DepthRange(0.2, 2.0, "log"))
    maps = next(iter(data.test_dataloader()))
    assert maps.images.shape == (len(maps.names), 1, 4, 4)
    assert data.kinds == ("hall", "room")
    for name, image, kind_id in zip(*maps, strict=True):
        kind, scene, _, frame = name.split("/")
        assert data.kinds[kind_id] == kind
        expected = (50 + 20 * (kind == "room") + 2 * int(scene) + int(frame)) / 100
        torch.testing.assert_close(depth_of_scaled(image, data.depth_range), torch.full((1, 4, 4), expected))
    assert maps.valid.all()


def test_predict_sees_every_map_also_where_nothing_could_be_held_out(folder):
    data = DepthMapsDataModule(folder / "room" / "0", image_size=(4, 4))
    data.setup("predict")
    (maps,) = data.predict_dataloader()
    assert maps.names == ("depth/0", "depth/1")
    assert torch.equal(data.images(["depth/1"]), maps.images[1])


def test_training_has_a_new_order_each_epoch_and_the_same_in_every_run(folder):
    orders = []
    for _ in range(2):
        loader = data_module(folder).train_dataloader()
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            orders.append([name for maps in loader for name in maps.names])
    assert orders[0] == orders[2]
    assert orders[1] == orders[3]
    assert orders[0] != orders[1]


def test_a_loader_goes_on_where_its_state_was_taken(folder):
    data = data_module(folder)
    loader = data.train_dataloader()
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    state = loader.state_dict()
    rest = [maps.names for maps in iterator]
    again = data_module(folder).train_dataloader()
    again.load_state_dict(state)
    assert [maps.names for maps in again] == rest


def test_crops_are_the_same_in_every_run_and_parts_of_the_map(folder):
    plain, data, again = data_module(folder), data_module(folder, crops=2), data_module(folder, crops=2)
    assert len(data._splits["train"]) == 3 * len(plain._splits["train"])
    first, second = (next(iter(d.gallery_dataloader())) for d in (data, again))
    assert torch.equal(first.images, second.images)
    assert first.names[1] == first.names[0] + "#1"
    torch.testing.assert_close(first.images[1], first.images[0])  # the map is of one depth


def test_a_crop_is_a_window_of_half_the_size_or_more():
    depth = torch.arange(600.0).reshape(20, 30)
    for seed in range(20):
        crop = random_crop(depth, seed)
        assert crop.shape[0] >= 10
        assert crop.shape[1] >= 15
        row, column = divmod(int(crop[0, 0]), 30)
        assert torch.equal(crop, depth[row : row + crop.shape[0], column : column + crop.shape[1]])


def test_resizing_takes_the_pixel_that_the_new_centre_lies_in():
    depth = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert torch.equal(resize_nearest(depth, 1, 2), torch.tensor([[6.0, 8.0]]))
    assert torch.equal(resize_nearest(depth, 4, 4), depth.repeat_interleave(2, dim=0))
    assert torch.equal(resize_nearest(depth, 2, 4), depth)


@pytest.mark.parametrize(
    "setting",
    [
        {"image_size": (0, 4)},
        {"batch_size": 0},
        {"crops": -1},
        {"units_per_metre": 0.0},
        {"split_by": "room"},
        {"val_fraction": 0.6, "test_fraction": 0.5},
    ],
)
def test_an_impossible_setting_is_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        DepthMapsDataModule(tmp_path, **setting)
