from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datamodules.readers.scannet.class_tables import SCANNET20, SCANNET200
from datamodules.synthetic.mini_scannet import MiniScanNetDataModule
from datamodules.synthetic.mini_scannet_files import CATEGORIES
from datamodules.synthetic.mini_scannet_furniture import FURNITURE
from datamodules.synthetic.mini_scannet_photos import camera_at, scan, surface_of, take_frame
from datamodules.synthetic.mini_scannet_rooms import KINDS, Place, camera_places, furnish
from datamodules.synthetic.mini_scannet_teacher import (
    NUM_TEXT,
    TEXT_SIMILARITY,
    Teacher,
    cell_shares,
    text_space,
)
from lightning_modules.functional.projection import build_uv_index
from tests.datamodules.mini_rooms import mini_scans


@pytest.fixture
def scans(mini_root) -> MiniScanNetDataModule:
    data = mini_scans(mini_root)
    data.setup()
    return data


# Rooms


@pytest.mark.parametrize("name", FURNITURE)
def test_furniture_stands_on_its_ground_and_no_two_pieces_are_alike(name):
    one, other = (FURNITURE[name](np.random.default_rng(seed)) for seed in (0, 1))
    low, high = one.bounds()
    assert -0.1 <= low[2] < 0.11
    assert (high > low).all()
    assert (high - low).max() < 3
    assert not np.allclose(high - low, np.ptp(other.bounds(), axis=0))
    assert one.category in CATEGORIES


@pytest.mark.parametrize("kind", KINDS)
def test_rooms_hold_their_things_and_cameras_do_not_stand_in_them(kind):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        room = furnish(kind, rng)
        for thing in room.things:
            low, high = thing.bounds()
            assert (low > -0.02).all()
            assert (high < room.size + 0.02).all()
        for place in camera_places(room, 9, rng):
            assert (place.eye > 0).all()
            assert (place.eye < room.size).all()
            for low, high in (thing.bounds() for thing in room.things[6:]):
                assert not ((place.eye > low) & (place.eye < high)).all()


def test_things_that_stand_by_themselves_do_not_run_into_each_other():
    standing = {"bed", "cabinet", "bookshelf", "refrigerator", "couch", "table", "toilet", "bathtub", "counter"}
    for number, kind in enumerate(KINDS):
        things = [t for t in furnish(kind, np.random.default_rng(number)).things if t.category in standing]
        for position, thing in enumerate(things):
            for other in things[:position]:
                (low, high), (other_low, other_high) = thing.bounds(), other.bounds()
                assert (np.minimum(high, other_high) - np.maximum(low, other_low)).min() <= 0


def test_four_rooms_show_most_of_scannets_classes_and_no_two_are_alike():
    rooms = [furnish(kind, np.random.default_rng(7)) for kind in list(KINDS)[:4]]
    shown = {CATEGORIES[thing.category][1] for room in rooms for thing in room.things}
    assert len(shown & set(SCANNET20.ids)) >= 17
    assert len({tuple(room.size) for room in rooms}) == 4


def test_categories_have_the_ids_of_the_benchmarks():
    for name, (class_id, nyu40) in CATEGORIES.items():
        assert SCANNET200.names[SCANNET200.indices_of_ids(torch.tensor([class_id]))] == name
        index = int(SCANNET20.indices_of_ids(torch.tensor([nyu40])))
        if name in SCANNET20.names:
            assert SCANNET20.names[index] == name
    assert CATEGORIES["couch"][1] == 6
    assert CATEGORIES["pillow"][1] not in SCANNET20.ids


# Photos


def test_a_camera_before_a_wall_measures_its_distance():
    room = furnish("office", np.random.default_rng(0))
    room = room._replace(things=room.things[:6])  # unfurnished
    middle = room.size / 2
    place = Place(middle, middle + np.array([1.0, 0, 0]))
    camera = camera_at(place, (160, 120), 60.0, (80.0, 60.0))
    frame = take_frame(surface_of(room), camera, camera, np.random.default_rng(0))
    np.testing.assert_allclose(frame.exact_depth[60, 80], room.size[0] / 2, rtol=1e-5)
    assert room.things[frame.thing_ids[60, 80]].category == "wall"
    assert room.things[frame.thing_ids[-1, 80]].category == "floor"
    assert room.things[frame.thing_ids[0, 80]].category == "ceiling"


def test_a_scan_holds_what_frames_saw_and_nothing_else():
    rng = np.random.default_rng(3)
    room = furnish("bathroom", rng)
    surface = surface_of(room)
    places = camera_places(room, 2, rng)
    cameras = [camera_at(place, (160, 120), 142.9, (80.0, 60.0)) for place in places]
    frames = [take_frame(surface, camera, camera, rng) for camera in cameras]
    one, both = (scan(surface, cameras[:n], [f.exact_depth for f in frames[:n]], rng) for n in (1, 2))
    assert 100 < len(one.vertices) < len(both.vertices)
    assert one.faces.max() == len(one.vertices) - 1
    points = torch.from_numpy(one.vertices)
    depth = torch.from_numpy(frames[0].exact_depth).float()
    index = build_uv_index(points, cameras[0].intrinsics, cameras[0].camera_from_world, (120, 160), depth)
    assert index.valid.float().mean() > 0.9


# The files, as the readers of real ones see them


def test_the_world_is_read_as_exported_scans(scans):
    assert scans.source.layout == "raw"
    splits = [scans.scenes(split) for split in ("train", "val", "test")]
    assert splits == [("scene0000_00",), ("scene0001_00",), ("scene0002_00",)]
    (frames,) = scans.val_dataloader()
    assert frames.tokens.shape == (1, 3, 768, 14, 14)
    assert frames.images is None
    assert set(frames.labels) == {"scannet20", "scannet200"}
    assert (frames.labels["scannet200"][0] >= 0).float().mean() > 0.9
    assert len(frames.instances[0].unique()) > 4
    assert scans.encode_text(["chair", "a chair in a scene"]).shape == (2, NUM_TEXT)


def test_a_frame_that_lost_its_pose_is_left_out(scans):
    assert len(scans.reports["scene0000_00"].bad_poses) == 1
    assert scans.reports["scene0001_00"].bad_poses == ()
    assert [len(scans.kept_frames(f"scene000{i}_00")) for i in range(3)] == [3, 3, 3]


def test_photos_show_the_meshs_colours_where_its_vertices_project(scans):
    mesh = scans.source.mesh("scene0001_00")
    frame = scans.source.load("scene0001_00", scans.kept_frames("scene0001_00")[0])
    assert frame.image.shape == (242, 324, 3)
    assert frame.depth.shape == (120, 160)
    depth_index = build_uv_index(
        mesh.points[:, :3], frame.depth_camera.intrinsics, frame.camera.camera_from_world, (120, 160), frame.depth
    )
    index = build_uv_index(mesh.points[:, :3], frame.camera.intrinsics, frame.camera.camera_from_world, (242, 324))
    seen = depth_index.valid & index.valid
    assert seen.sum() > 500
    column, row = index.uv[seen].long().T
    difference = frame.image[row, column].float() / 255 - mesh.points[seen, 3:]
    difference = difference - difference.median(dim=0).values  # exposure
    assert difference.abs().median() < 0.03


def test_another_world_in_the_same_place_is_refused_and_the_same_is_kept(mini_root):
    file = mini_root / "mini_scannet" / "scans" / "scene0000_00" / "color" / "0.jpg"
    written = file.stat().st_mtime_ns
    mini_scans(mini_root).prepare_data()
    assert file.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"holds a world with {'seed': 0}, but the settings ask for {'seed': 1}"):
        mini_scans(mini_root, world_seed=1).prepare_data()
    with pytest.raises(ValueError, match="is no synthetic world"):
        MiniScanNetDataModule(mini_root).prepare_data()
    with pytest.raises(ValueError, match="frames_in_scene is 1; allowed: 2 or more"):
        mini_scans(mini_root, frames_in_scene=1)


# The stand-in teacher

SPACE = text_space(np.random.default_rng(0))


def test_texts_are_unit_and_relatives_are_close():
    texts = np.stack(list(SPACE.texts.values()))
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-6)
    cosine = {name: float(SPACE.texts["chair"] @ SPACE.texts[name]) for name in ("armchair", "sofa", "toilet")}
    assert cosine["armchair"] > cosine["sofa"] > cosine["toilet"] + 0.05
    assert cosine["toilet"] == pytest.approx(TEXT_SIMILARITY)
    assert float(SPACE.texts["chair"] @ SPACE.texts["a chair in a scene"]) > 0.97


def test_the_projection_has_orthonormal_columns():
    np.testing.assert_allclose(SPACE.projection.T @ SPACE.projection, np.eye(NUM_TEXT), atol=1e-12)
    np.testing.assert_allclose(SPACE.null_space.T @ SPACE.projection, 0, atol=1e-12)


def test_shares_of_cells_are_those_of_their_pixels():
    thing_ids = np.zeros((28, 56), int)
    thing_ids[:, 28:] = 1
    thing_ids[:2, :2] = 2
    shares = cell_shares(thing_ids, 3)
    np.testing.assert_allclose(shares.sum(2), 1)
    np.testing.assert_allclose(shares[0, 0], [0.5, 0, 0.5])
    np.testing.assert_allclose(shares[5, 6:8], [[1, 0, 0], [0, 1, 0]])


def seen_features(teacher: Teacher, thing_ids: np.ndarray, colour: int = 128) -> torch.Tensor:
    tokens = teacher.look(thing_ids, np.full((*thing_ids.shape, 3), colour, np.uint8)).tokens
    return torch.einsum("dhw,dc->hwc", torch.from_numpy(tokens), torch.from_numpy(SPACE.projection).float())


def test_the_teacher_is_right_more_often_than_not_and_far_from_always():
    names = [SCANNET20.names[i] for i in range(19)]
    texts = torch.from_numpy(np.stack([SPACE.texts[name] for name in names])).float()
    right = Counter()
    thing_ids = np.add.outer(np.arange(56) // 14, np.arange(56) // 14 * 4)  # 16 squares
    for seed in range(12):
        rng = np.random.default_rng(seed)
        shown = rng.permutation(19)[:16]
        features = seen_features(Teacher(SPACE, [names[i] for i in shown], rng), thing_ids)
        expected = torch.from_numpy(shown)[torch.from_numpy(cell_shares(thing_ids, 16).argmax(2))]
        right += Counter((((features @ texts.T).argmax(2)) == expected).flatten().tolist())
    assert 0.35 < right[True] / right.total() < 0.7


def test_the_same_photo_looks_different_to_the_teacher_each_time_but_its_opinions_last():
    thing_ids = np.repeat(np.arange(7), 8)[:, None].repeat(56, 1)
    names = ["chair", "table", "cabinet", "door", "curtain", "toilet", "bed"]

    def mean_meanings(seed: int) -> list[torch.Tensor]:
        teacher = Teacher(SPACE, names, np.random.default_rng(seed))
        looks = [seen_features(teacher, thing_ids).unflatten(0, (7, 2)).mean((1, 2)) for _ in range(2)]
        return [F.normalize(look - torch.from_numpy(10 * SPACE.image_direction).float(), dim=1) for look in looks]

    first, second = mean_meanings(0)
    others, _ = mean_meanings(1)
    assert not torch.allclose(first, second, atol=0.05)
    assert (first * second).sum(1).mean() > (first * others).sum(1).mean()


def test_a_photos_colours_are_in_the_channels_that_the_projection_drops():
    thing_ids = np.zeros((28, 28), int)
    teachers = [Teacher(SPACE, ["bed"], np.random.default_rng(0)) for _ in range(2)]
    dark, bright = (
        seen_features(teacher, thing_ids, colour) for teacher, colour in zip(teachers, (30, 220), strict=True)
    )
    torch.testing.assert_close(dark, bright, atol=1e-4, rtol=0)
