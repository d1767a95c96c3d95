import numpy as np
import pytest

from datamodules.synthetic.depth_scenes import (
    FARTHEST_M,
    FOCAL_PX,
    IMAGE_SIZE,
    KINDS,
    NEAREST_M,
    DepthScenesDataModule,
    Solids,
    cast,
    sensed,
    view,
)

EYE, AHEAD = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0])
CENTRE = IMAGE_SIZE[0] // 2, IMAGE_SIZE[1] // 2


def solids(**parts: list[list[float]]) -> Solids:
    columns = {"boxes": 7, "rooms": 6, "cylinders": 5, "spheres": 4}
    return Solids(**{name: np.array(parts.get(name, [])).reshape(-1, n) for name, n in columns.items()})


@pytest.mark.parametrize(
    ("part", "nearest"),
    [
        ({"boxes": [[3, 0, 1, 0.5, 1, 1, 0.0]]}, 2.5),
        ({"boxes": [[3, 0, 1, 0.5, 0.5, 1, np.pi / 4]]}, 3 - 0.5**0.5),
        ({"rooms": [[0, 0, 1, 4, 2, 1.5]]}, 4.0),
        ({"cylinders": [[3, 0, 0, 0.5, 2]]}, 2.5),
        ({"spheres": [[3, 0, 1, 0.5]]}, 2.5),
        ({"spheres": [[3, 0, 1, 0.5]], "boxes": [[2, 0, 1, 0.1, 1, 1, 0.0]]}, 1.9),
    ],
)
def test_the_ray_ahead_meets_what_is_nearest(part, nearest):
    depth = cast(solids(**part), EYE, AHEAD)
    assert abs(depth[CENTRE] - nearest) < 0.01


def test_a_wall_ahead_has_the_same_depth_in_every_pixel():
    depth = cast(solids(boxes=[[3, 0, 0, 0.5, 50, 50, 0.0]]), EYE, AHEAD)
    np.testing.assert_allclose(depth, 2.5, rtol=1e-5)


def test_a_floor_has_the_depth_of_its_row():
    depth = cast(solids(boxes=[[0, 0, -0.5, 99, 99, 0.5, 0.0]]), EYE, AHEAD)
    rows = (np.arange(IMAGE_SIZE[0]) + 0.5 - IMAGE_SIZE[0] / 2) / FOCAL_PX
    np.testing.assert_allclose(depth[70:, 80], 1 / rows[70:], rtol=1e-4)
    assert np.isinf(depth[:50]).all()


def test_the_sides_of_things_and_what_is_behind_are_not_seen():
    assert np.isinf(cast(solids(spheres=[[-3, 0, 1, 0.5]], boxes=[[-3, 0, 1, 1, 1, 1, 0.3]]), EYE, AHEAD)).all()


def test_a_cylinder_has_a_lid():
    depth = cast(solids(cylinders=[[1, 0, 0, 0.3, 0.5]]), np.array([0.99, 0, 2.0]), np.array([1, 0, 0.0]))
    assert abs(depth[CENTRE] - 1.5) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fills_most_of_a_map_within_reach(kind):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        depth = sensed(view(KINDS[kind](rng), rng), rng)
        valid = depth > 0
        assert 0.35 < valid.mean() < 1
        assert depth[valid].min() >= NEAREST_M
        assert depth.max() <= FARTHEST_M
        assert depth[valid].std() > 0.05


def test_noise_grows_with_depth_as_kinects_does():
    rng = np.random.default_rng(0)
    for metres in (1.0, 4.0):
        depth = sensed(np.full((400, 400), metres, np.float32), rng)
        assert depth[depth > 0].std() == pytest.approx(0.0012 + 0.0019 * (metres - 0.4) ** 2, rel=0.05)


def test_pixels_beside_a_jump_are_lost():
    exact = np.full(IMAGE_SIZE, 1.0, np.float32)
    exact[:, 80:] = 3.0
    lost = np.mean([sensed(exact, np.random.default_rng(seed)) == 0 for seed in range(20)], axis=0)
    assert lost[:, 79:81].mean() > 0.5
    assert lost[:, :70].mean() < 0.1


def tiny(root, **settings) -> DepthScenesDataModule:
    data = DepthScenesDataModule(root, **{"scenes_per_kind": 2, "frames_per_scene": 1, **settings})
    data.prepare_data()
    return data


def test_the_world_is_written_once_in_scannets_layout(tmp_path):
    data = tiny(tmp_path / "world")
    files = sorted((tmp_path / "world").rglob("*.png"))
    assert len(files) == 12
    assert (tmp_path / "world" / "hall" / "scene_001" / "depth" / "0.png") in files
    before = [file.stat().st_mtime_ns for file in files]
    data.prepare_data()
    assert [file.stat().st_mtime_ns for file in files] == before
    data.setup("fit")
    assert data.kinds == tuple(sorted(KINDS))


def test_a_world_follows_from_its_seed(tmp_path):
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny(tmp_path / name, world_seed=seed)
        contents.append((tmp_path / name / "room" / "scene_000" / "depth" / "0.png").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_another_world_is_not_written_over(tmp_path):
    tiny(tmp_path / "world")
    with pytest.raises(ValueError, match=r"world holds .*scenes_per_kind.*delete"):
        tiny(tmp_path / "world", scenes_per_kind=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no synthetic world"):
        tiny(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
