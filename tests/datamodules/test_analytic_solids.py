import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from datamodules.readers.sparse_sdf import read_sparse_sdf
from datamodules.synthetic import solid_distance
from datamodules.synthetic.analytic_solids import KINDS, AnalyticSolidsDataModule, random_solid
from datamodules.synthetic.solid_distance import (
    Part,
    Solid,
    part_field,
    points_on_surface,
    signed_distance,
    signed_distance_near_surface,
    solid_field,
)

TURN = Rotation.random(random_state=3).as_matrix()


def part(kind: str, size=(0.0, 0.0, 0.0), radius=0.0, centre=(0.0, 0.0, 0.0), axes=None) -> Part:
    return Part(kind, np.array(centre, float), np.eye(3) if axes is None else axes, np.array(size, float), radius)


def grid(resolution: int) -> np.ndarray:
    axis = np.arange(resolution)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)


PARTS = [
    part("ball", radius=0.5, centre=(0.1, 0, 0)),
    part("capsule", (0.4, 0, 0), 0.2, axes=TURN),
    part("box", (0.5, 0.3, 0.2), 0.0, axes=TURN),
    part("box", (0.5, 0.3, 0.2), 0.1, axes=TURN),
    part("ring", (0.6, 0, 0), 0.2, axes=TURN),
    part("cylinder", (0.5, 0.3, 0), 0.0, axes=TURN),
    part("cylinder", (0.5, 0.3, 0), 0.1, axes=TURN),
    part("half_space", axes=TURN),
]


@pytest.mark.parametrize(
    ("solid", "point", "distance"),
    [
        (part("ball", radius=0.5), (0.3, 0, 0.4), 0.0),
        (part("ball", radius=0.5, centre=(1, 0, 0)), (1, 0, 0), -0.5),
        (part("capsule", (0.4, 0, 0), 0.2), (0.3, 0, 0.8), 0.3),
        (part("capsule", (0.4, 0, 0), 0.2), (0.3, 0, 0.1), 0.1),
        (part("box", (0.5, 0.3, 0.2)), (0.8, 0.7, 0.2), 0.5),
        (part("box", (0.5, 0.3, 0.2)), (0.1, 0, 0.05), -0.15),
        (part("box", (0.5, 0.3, 0.2), 0.1), (0.8, 0.7, 0.2), 0.4),
        (part("ring", (0.6, 0, 0), 0.2), (0.6, 0.8, 0), 0.2),
        (part("ring", (0.6, 0, 0), 0.2), (0, 0.6, 0.5), 0.3),
        (part("cylinder", (0.5, 0.3, 0)), (0.8, 0, 0.7), 0.5),
        (part("cylinder", (0.5, 0.3, 0)), (0.4, 0, 0.1), -0.1),
        (part("half_space", centre=(0, 0, 0.2)), (5, 1, 0.5), 0.3),
        (part("ball", radius=0.5, centre=(1, 0, 0), axes=TURN), (1, 0, 0.7), 0.2),
    ],
)
def test_parts_have_the_distances_of_geometry(solid, point, distance):
    assert part_field(solid, np.array([point], float)).value[0] == pytest.approx(distance)


@pytest.mark.parametrize("solid", PARTS, ids=lambda p: p.kind)
def test_gradients_are_unit_and_those_of_the_field(solid):
    points = np.random.default_rng(0).uniform(-1, 1, (300, 3))
    value, gradient = part_field(solid, points)
    np.testing.assert_allclose(np.linalg.norm(gradient, axis=1), 1, atol=1e-9)
    step = 1e-6
    for axis in range(3):
        moved = part_field(solid, points + step * np.eye(3)[axis]).value
        np.testing.assert_allclose((moved - value) / step, gradient[:, axis], atol=1e-4)


@pytest.mark.parametrize("solid", PARTS, ids=lambda p: p.kind)
@pytest.mark.parametrize("resolution", [16, 21])
def test_the_points_near_a_part_are_all_those_of_the_grid_in_the_band(solid, resolution):
    coords, sdf = signed_distance_near_surface(Solid((solid,)), resolution, 3.0)
    exact = part_field(solid, grid(resolution) * (2 / (resolution - 1)) - 1).value * (resolution - 1) / 2 / 3.0
    keys = coords @ [resolution**2, resolution, 1]
    assert coords.dtype == np.int32
    assert (np.diff(keys) > 0).all()
    assert (np.abs(exact[keys]) <= 1 + 1e-9).all()
    assert np.isin(np.flatnonzero(np.abs(exact) <= 1 - 1e-9), keys).all()
    np.testing.assert_allclose(sdf, exact[keys], atol=1e-6)


def half_ball(points: np.ndarray, radius: float) -> np.ndarray:
    around, z, length = np.hypot(points[:, 0], points[:, 1]), points[:, 2], np.linalg.norm(points, axis=1)
    rim = np.hypot(around - radius, z)
    outside = np.where(z <= 0, length - radius, np.where(around <= radius, z, rim))
    return np.where((z <= 0) & (length <= radius), -np.minimum(radius - length, -z), outside)


def ball_less_ball(points: np.ndarray, radius: float, other: float, height: float) -> np.ndarray:
    """Distance to a ball around zero less one around (0, 0, height): two caps that meet in a circle."""
    around, z = np.hypot(points[:, 0], points[:, 1]), points[:, 2]
    rim_z = (radius**2 - other**2 + height**2) / (2 * height)
    distance = np.hypot(around - np.sqrt(radius**2 - rim_z**2), z - rim_z)
    length, other_length = np.hypot(around, z), np.hypot(around, z - height)
    kept = radius * z / length <= rim_z  # of the large ball, what is below the rim
    distance = np.where(kept, np.minimum(distance, np.abs(length - radius)), distance)
    kept = height + other * (z - height) / other_length <= rim_z  # of the other, too
    distance = np.where(kept, np.minimum(distance, np.abs(other_length - other)), distance)
    return np.where((length <= radius) & (other_length >= other), -distance, distance)


@pytest.mark.parametrize("resolution", [24, 48])
def test_a_cut_has_the_closed_form_distance_up_to_its_edge(resolution):
    voxel = 2 / (resolution - 1)
    upper = part("half_space", axes=np.diag([1.0, -1, -1]))
    bite = part("ball", radius=0.5, centre=(0, 0, 0.6))
    for cut, exact_distance in (
        (upper, lambda points: half_ball(points, 0.7)),
        (bite, lambda points: ball_less_ball(points, 0.7, 0.5, 0.6)),
    ):
        coords, sdf = signed_distance_near_surface(Solid((part("ball", radius=0.7),), cut=cut), resolution)
        points = grid(resolution) * voxel - 1
        exact = exact_distance(points) / (4 * voxel)
        # at the rim of the band a distance that is found may fall on the other side
        row = {tuple(point): value for point, value in zip(coords.tolist(), sdf, strict=True)}
        found = np.array([row.get(tuple(point), np.nan) for point in grid(resolution).tolist()])
        assert not np.isnan(found[np.abs(exact) < 0.995]).any()
        assert np.isnan(found[np.abs(exact) > 1.001]).all()
        error = 4 * np.abs(found - exact)[~np.isnan(found)]  # voxels
        assert error.max() < 0.02
        assert error.mean() < 2e-4


def test_a_part_blended_with_itself_grows_by_a_quarter_of_the_width():
    ball = part("ball", radius=0.5)
    coords, sdf = signed_distance_near_surface(Solid((ball, ball), blend=0.2), 32)
    exact = np.linalg.norm(coords * (2 / 31) - 1, axis=1) - 0.55
    np.testing.assert_allclose(sdf, exact * 31 / 2 / 4, atol=1e-6)


def test_random_solids_have_the_distance_of_the_nearest_of_many_surface_points():
    errors = []
    for seed in range(8):
        solid = random_solid(np.random.default_rng(seed))
        coords, sdf = signed_distance_near_surface(solid, 24)
        voxel = 2 / 23
        surface = points_on_surface(solid, 96)
        assert np.abs(solid_field(solid, surface).value).max() < 1e-4 * voxel
        nearest = cKDTree(surface).query(coords * voxel - 1)[0]  # never below the distance, above by little
        errors.append((np.abs(sdf) * 4 - nearest / voxel)[np.abs(sdf) > 0.1])
    error = np.concatenate(errors)
    assert np.mean(error > 0.02) < 5e-4
    assert error.max() < 0.1
    assert error.min() > -0.1


def test_a_bound_alone_would_be_wrong_where_solids_are_blended_or_cut():
    ring = part("ring", (0.6, 0, 0), 0.25)
    solid = Solid((ring,), cut=part("half_space", axes=TURN, centre=(0.1, 0, 0)))
    points = grid(24) * (2 / 23) - 1
    near = points[np.abs(solid_field(solid, points).value) < 4 * 2 / 23]
    exact, bound = signed_distance(solid, near, 2 / 23), solid_field(solid, near).value
    assert (np.abs(exact) >= np.abs(bound) - 1e-9).all()
    assert (np.abs(exact) - np.abs(bound)).max() > 0.5 * 2 / 23


def test_no_more_points_are_looked_at_than_a_few_times_those_near_the_surface(monkeypatch):
    looked_at = []

    def counted(solid: Solid, points: np.ndarray):
        looked_at.append(len(points))
        return solid_field(solid, points)

    monkeypatch.setattr(solid_distance, "solid_field", counted)
    coords, _ = signed_distance_near_surface(Solid((part("ring", (0.5, 0, 0), 0.1),)), 256)
    assert sum(looked_at) < 3 * len(coords) < 256**3 / 4
    assert max(looked_at) < 2 * len(coords)


def test_solids_without_surface_and_unblended_parts_are_refused():
    ball = part("ball", radius=0.5)
    with pytest.raises(ValueError, match="No point of a grid of 16"):
        signed_distance_near_surface(Solid((part("ball", radius=0.5, centre=(9, 0, 0)),)), 16)
    with pytest.raises(ValueError, match="has no surface"):
        signed_distance_near_surface(Solid((ball,), cut=part("ball", radius=0.55)), 16)
    with pytest.raises(ValueError, match="blend is 0"):
        signed_distance_near_surface(Solid((ball, ball)), 16)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32))
def test_a_solid_of_the_family_fills_the_cube(seed):
    surface = points_on_surface(random_solid(np.random.default_rng(seed)), 48)
    low, high = surface.min(0), surface.max(0)
    assert (high - low).max() == pytest.approx(1.9, abs=0.01)
    np.testing.assert_allclose(low + high, 0, atol=0.01)


def test_the_family_has_all_kinds_and_follows_from_its_seed():
    solids = [random_solid(np.random.default_rng(seed)) for seed in range(40)]
    kinds = {(len(solid.parts) > 1, solid.cut is not None) for solid in solids}
    assert len(kinds) == len(KINDS) == 4
    assert {p.kind for solid in solids for p in solid.parts} == {"ball", "capsule", "box", "ring", "cylinder"}
    again = random_solid(np.random.default_rng(5))
    assert str(again) == str(solids[5])
    assert len({str(solid) for solid in solids}) == 40


def tiny(root, **changes) -> AnalyticSolidsDataModule:
    data = AnalyticSolidsDataModule(
        root,
        **{"num_train": 4, "num_val": 2, "num_test": 3, "resolution": 16, "max_voxels_per_batch": 10_000, **changes},
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_the_world_is_written_once_and_split_by_folder(tmp_path):
    data = tiny(tmp_path / "world")
    files = sorted((tmp_path / "world").rglob("*/*.npz"))
    assert len(files) == 9
    before = [file.stat().st_mtime_ns for file in files]
    tiny(tmp_path / "world")
    assert [file.stat().st_mtime_ns for file in files] == before
    for loader, split, count in (
        (data.train_dataloader(), "train", 4),
        (data.val_dataloader(), "val", 2),
        (data.test_dataloader(), "test", 3),
        (data.predict_dataloader(), "test", 3),
    ):
        names = [name for batch in loader for name in batch.names]
        assert sorted(names) == [f"{split}/{number:05}" for number in range(count)]
    shapes = [read_sparse_sdf(file) for file in files]
    assert len({tuple(shape.sdf[:50].tolist()) for shape in shapes}) == 9
    assert all((shape.sdf < 0).any() for shape in shapes)


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    tiny(tmp_path / "world")
    file = tmp_path / "world" / "train" / "00002.npz"
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "world").rglob("*/*.npz") if path != file}
    before = read_sparse_sdf(file)
    file.unlink()
    tiny(tmp_path / "world")
    after = read_sparse_sdf(file)
    assert after.coords.equal(before.coords)
    assert after.sdf.equal(before.sdf)
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_a_world_follows_from_its_seed(tmp_path):
    first, again, other = (
        read_sparse_sdf(tiny(tmp_path / name, world_seed=seed).root / "test" / "00000.npz")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.sdf.equal(again.sdf)
    assert not first.sdf.equal(other.sdf)


def test_another_world_is_not_written_over(tmp_path):
    tiny(tmp_path / "world")
    for changes in ({"num_train": 5}, {"world_seed": 1}, {"resolution": 20}, {"band": 3.0}):
        with pytest.raises(ValueError, match=r"world holds .*counts.*delete"):
            tiny(tmp_path / "world", **changes)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        tiny(tmp_path / "mine")
    with pytest.raises(ValueError, match="num_val is 0"):
        tiny(tmp_path / "none", num_val=0)
