import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from callbacks.writers.scene_map import (
    SightRecord,
    map_picture,
    objects_of_voxels,
    write_moving_picture,
    write_sights,
)
from lightning_modules.functional.bi_fusion.voxel_keys import voxel_keys
from lightning_modules.networks.bi_fusion.online_merge import OnlineMerge


def voxels(*cells: tuple[int, int, int], size: float = 0.1) -> torch.Tensor:
    return voxel_keys((torch.tensor(cells) + 0.5) * size, size)


def test_the_highest_voxel_is_on_top_and_y_goes_up():
    keys = voxels((0, 0, 5), (0, 0, 2), (1, 1, 0), (1, 1, 3))
    red, green, blue, grey = colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.2, 0.2]])
    picture = map_picture(keys, colours, 0.1, torch.tensor([[0.0, 0, 0], [0.3, 0.2, 1]]), height=20)
    assert picture.shape == (20, 30, 3)
    assert (picture[10:, :10] == (red * 255).numpy()).all()  # the lower left corner is that of x and y
    assert (picture[:10, 10:20] == (grey * 255).numpy()).all()
    assert (picture[:10, :10] == 255).all()
    assert (picture[:, 20:] == 255).all()
    assert not (picture == (green * 255).numpy()).all(axis=2).any()
    assert not (picture == (blue * 255).numpy()).all(axis=2).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), height=st.integers(7, 60))
def test_no_voxel_hides_a_higher_one_at_any_scale(seed, height):
    """Where a voxel is no whole number of pixels, neighbours share some: those must be the higher one's, too."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 6, (40, 3), generator=generator).unique(dim=0)
    cells = cells[torch.randperm(len(cells), generator=generator)]
    shade = (cells[:, 2:] + 1) / 10  # the higher, the lighter
    corner = torch.tensor([[0.0, 0, 0], [0.6, 0.6, 0.6]])
    picture = map_picture(voxels(*cells.tolist()), shade.expand(-1, 3), 0.1, corner, height)[..., 0]
    tops = np.full((6, 6), -1)
    for x, y, z in cells.tolist():
        tops[x, y] = max(tops[x, y], z)
    for x, y in np.argwhere(tops >= 0):
        column, row = int((x + 0.5) * height / 6), height - 1 - int((y + 0.5) * height / 6)
        assert picture[row, column] >= round(25.5 * (tops[x, y] + 1)) - 1
    if height % 6 == 0:  # whole pixels: each voxel has its own
        expected = np.where(tops < 0, 255, np.round(25.5 * (tops + 1))).repeat(height // 6, 0).repeat(height // 6, 1)
        assert np.abs(picture.astype(int) - expected.T[::-1]).max() <= 1


def test_what_lies_beside_the_picture_is_not_drawn():
    keys = voxels((-3, 0, 0), (0, 40, 0))
    picture = map_picture(keys, torch.zeros(2, 3), 0.1, torch.tensor([[0.0, 0, 0], [0.2, 0.2, 1]]), height=8)
    assert (picture == 255).all()
    assert (map_picture(keys[:0], torch.zeros(0, 3), 0.1, torch.zeros(2, 3), height=8) == 255).all()


def test_a_voxel_of_several_objects_is_that_of_most_frames():
    merge = OnlineMerge(voxel_size=0.1)
    merge.ids, merge.counts = torch.tensor([4, 7, 9]), torch.tensor([2, 5, 1])
    merge.voxels = [voxels((0, 0, 0), (1, 0, 0)), voxels((1, 0, 0), (2, 0, 0)), voxels((2, 0, 0), (3, 0, 0))]
    keys = voxels((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0))
    assert objects_of_voxels(keys, merge).tolist() == [4, 7, 7, 9, -1]


def test_a_moving_picture_has_all_frames_and_the_last_stays_longer(tmp_path):
    pictures = [np.full((4, 6, 3), shade, np.uint8) for shade in (0, 120, 250)]
    write_moving_picture(tmp_path / "a.gif", pictures)
    with Image.open(tmp_path / "a.gif") as moving:
        durations = []
        for frame, picture in enumerate(pictures):
            moving.seek(frame)
            assert np.abs(np.array(moving.convert("RGB")).astype(int) - picture).max() < 8
            durations.append(moving.info["duration"])
    assert durations == [300, 300, 1500]


@pytest.mark.filterwarnings("error")
def test_sights_of_which_nothing_is_known_are_written_without_curves(tmp_path):
    nan = float("nan")
    write_sights(tmp_path, [SightRecord(1, 5, nan, nan, nan)])
    assert (tmp_path / "agreement.csv").read_text().splitlines()[1] == "1,5,nan,nan,nan"
    with Image.open(tmp_path / "agreement.png") as picture:
        assert picture.size == (720, 480)
