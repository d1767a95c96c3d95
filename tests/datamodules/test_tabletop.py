import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.readers.colmap import read_colmap_points
from datamodules.synthetic.tabletop import TabletopDataModule, WorldSettings, view_names
from datamodules.synthetic.tabletop_gaussians import FLOATER_BOUNDS
from lightning_modules.functional.cameras import project_points
from lightning_modules.functional.splatting.gaussians import quaternions_to_matrices
from lightning_modules.functional.splatting.spherical_harmonics import spherical_harmonics_basis

SMALL = {"num_train_views": 2, "image_size": (64, 48), "num_gaussians": 1500, "objects_per_group": 1}


def small_world(root: Path, seed: int = 100, **settings) -> TabletopDataModule:
    world = TabletopDataModule(root, seed=seed, **{**SMALL, **settings})
    world.prepare_data()
    return world


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TabletopDataModule:
    settings = {"num_train_views": 6, "image_size": (160, 120), "num_gaussians": 8000, "objects_per_group": 2}
    world = small_world(tmp_path_factory.mktemp("tabletop") / "world", **settings)
    world.setup()
    return world


def test_the_world_is_read_back_by_the_readers_of_real_scenes(world: TabletopDataModule) -> None:
    assert len(world.views) == 12
    training, validation, test = (
        list(loader) for loader in (world.lifting_dataloader(), world.val_dataloader(), world.test_dataloader())
    )
    assert (len(training), len(validation), len(test)) == (6, 2, 4)
    assert not {view.name for view in test} & {view.name for view in (*training, *validation)}
    for view in training:
        assert view.mask_ids.shape == (3, 120, 160)
        assert view.mask_features.shape[1] == 512
        assert view.labels is None
    for view in (*validation, *test):
        assert view.mask_ids is None
        assert len(view.labels.prompts) > 5
        assert view.image.shape == (120, 160, 3)
    points, colors = read_colmap_points(world.root / "sparse" / "0")
    assert len(points) == len(colors) == 3000


def test_evaluated_views_lie_between_training_views() -> None:
    for num_train_views in (8, 12, 24):
        names = view_names(num_train_views)
        assert list(names.values()) == sorted(names.values())
        training = np.arange(num_train_views) / num_train_views
        evaluated = sorted(set(names) - set(training))
        assert len(evaluated) == 6
        assert min(np.abs(training - position).min() for position in evaluated) > 0.4 / 24


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_world(tmp_path: Path) -> None:
    first, again, other = (
        contents(small_world(tmp_path / name, seed).root) for name, seed in (("a", 100), ("b", 100), ("c", 101))
    )
    assert first == again
    assert first.keys() == other.keys()
    same = {name for name in first if first[name] == other[name]}
    assert same == {"sparse/0/cameras.bin", "sparse/0/rigs.bin"}  # the lens is that of all worlds


def test_fewer_views_leave_the_others_as_they_were(tmp_path: Path) -> None:
    many, few = (small_world(tmp_path / str(count), num_train_views=count) for count in (4, 2))
    names = {
        position: (name, view_names(2)[position])
        for position, name in view_names(4).items()
        if position in view_names(2)
    }
    assert len(names) == 8
    for in_many, in_few in names.values():
        for file in ("images/{}.png", "language_features/{}_f.npy", "language_features/{}_s.npy"):
            one, other = many.root / file.format(in_many), few.root / file.format(in_few)
            assert one.is_file() == other.is_file()
            assert not one.is_file() or one.read_bytes() == other.read_bytes()
    assert (many.root / "gaussians.ply").read_bytes() == (few.root / "gaussians.ply").read_bytes()


@pytest.mark.parametrize(
    ("difficulty", "floaters"), product(["easy", "normal", "hard"], ["isolated", "clumped", "faint", "none"])
)
def test_every_difficulty_and_population_of_floaters_makes_a_world(
    tmp_path: Path, difficulty: str, floaters: str
) -> None:
    world = small_world(tmp_path / "world", difficulty=difficulty, floaters=floaters)
    world.setup()
    is_floater, opacities = world.ceiling.is_floater, world.gaussians.opacities
    assert world.gaussians.num_gaussians == pytest.approx(1500, rel=0.15)
    torch.testing.assert_close(is_floater, (world.ceiling.ids < 0).all(1))
    if floaters == "none":
        assert not is_floater.any()
        return
    assert is_floater.float().mean() == pytest.approx(0.04, abs=0.005)
    opaque_share = (opacities[is_floater] > 0.351).float().mean()
    assert opaque_share == 0 if floaters == "faint" else 0.15 < opaque_share < 0.45
    distances = torch.cdist(world.gaussians.means[is_floater], world.gaussians.means[is_floater])
    nearest = (distances + 9 * torch.eye(len(distances))).min(1).values.median()
    assert nearest < 0.04 if floaters == "clumped" else nearest > 0.06
    if floaters != "clumped":
        positions = world.gaussians.means[is_floater].numpy()
        assert (positions >= FLOATER_BOUNDS[0] - 1e-6).all()
        assert (positions <= FLOATER_BOUNDS[1] + 1e-6).all()


def test_gaussians_are_flat_discs_on_the_surfaces(world: TabletopDataModule) -> None:
    scene, is_floater = world.gaussians, world.ceiling.is_floater
    scales = scene.scales[~is_floater].sort(dim=1).values
    assert (scales[:, 0] / scales[:, 1]).median() == pytest.approx(0.14, abs=0.02)
    faint = (scene.opacities[~is_floater] < 0.41).float().mean()
    assert 0.12 < faint < 0.2
    # The table top is the plane z = 0, its discs lie flat in it.
    ids = world.ceiling.ids[:, 0]
    down = quaternions_to_matrices(scene.quaternions)[:, 2, 2].abs()
    on_table = (scene.means[:, 2].abs() < 0.003) & (ids == ids[scene.means[:, 2].abs() < 0.003].mode().values)
    assert on_table.sum() > 100
    assert down[on_table].median() > 0.999


def test_the_truth_of_visible_gaussians_is_what_the_labels_say(world: TabletopDataModule) -> None:
    """Projects the discs nearest to the camera and looks their own prompt's embedding up in the labels."""
    scene, ceiling = world.gaussians, world.ceiling
    right = total = 0
    for view in world.test_dataloader():
        pixels, depth = project_points(scene.means, view.camera)
        x, y = pixels.floor().long().unbind(1)
        inside = (depth > 0.2) & (x >= 0) & (x < view.camera.width) & (y >= 0) & (y < view.camera.height)
        inside &= ~ceiling.is_floater & (scene.opacities > 0.5)
        flat = (y * view.camera.width + x)[inside]
        nearest = torch.full((view.camera.num_pixels,), torch.inf).scatter_reduce(0, flat, depth[inside], "amin")
        front = depth[inside] < nearest[flat] + 1e-4
        features = ceiling.features[ceiling.ids[inside][front, 1]]
        similarity = features @ view.labels.embeddings.T
        best = similarity.argmax(1)
        own = view.labels.masks.flatten(1)[best, flat[front]]
        certain = similarity.max(1).values > 0.3
        right += int(own[certain].sum())
        total += int(certain.sum())
    assert total > 1000
    assert right / total > 0.85


def test_colours_of_the_gaussians_resemble_the_photograph(world: TabletopDataModule) -> None:
    scene = world.gaussians
    colors = (spherical_harmonics_basis(torch.tensor([0.0, 0, 1]), 1) * scene.spherical_harmonics[:, 0] + 0.5).clamp(
        0, 1
    )
    errors = []
    for view in world.test_dataloader():
        pixels, depth = project_points(scene.means, view.camera)
        x, y = pixels.floor().long().unbind(1)
        inside = (depth > 0.2) & (x >= 0) & (x < view.camera.width) & (y >= 0) & (y < view.camera.height)
        inside &= (scene.means[:, 2].abs() < 0.003) & ~world.ceiling.is_floater
        table = torch.zeros(view.camera.num_pixels, dtype=torch.bool)
        table |= view.labels.masks[view.labels.prompts.index("table top")].flatten()
        flat = (y * view.camera.width + x)[inside]
        seen = table[flat]
        photo = view.image.flatten(0, 1)[flat[seen]].float() / 255
        errors.append((photo - colors[inside][seen]).abs().mean(1))
    assert torch.cat(errors).median() < 0.05


def test_a_world_is_written_once_and_found_again(tmp_path: Path) -> None:
    world = small_world(tmp_path / "world")
    written = (world.root / "gaussians.ply").stat().st_mtime_ns
    small_world(tmp_path / "world")
    assert (world.root / "gaussians.ply").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert json.loads((world.root / "world.json").read_text())["seed"] == 100


def test_a_world_of_other_settings_is_refused(world: TabletopDataModule) -> None:
    with pytest.raises(ValueError, match=r"'seed': 100.*'seed': 101.*Give another root, or delete"):
        small_world(world.root, seed=101)
    with pytest.raises(ValueError, match=r"'difficulty': 'normal'.*'difficulty': 'hard'"):
        small_world(world.root, difficulty="hard")


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no synthetic world.*Give another root"):
        small_world(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("datamodules.synthetic.tabletop.write_gaussian_ply", fail)
    with pytest.raises(OSError, match="disk full"):
        small_world(tmp_path / "world")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seed", -1),
        ("difficulty", "brutal"),
        ("num_train_views", 1),
        ("image_size", (16, 12)),
        ("num_gaussians", 10),
        ("objects_per_group", 5),
    ],
)
def test_a_setting_out_of_range_is_named(setting: str, value: object) -> None:
    good = {"seed": 0, "difficulty": "easy", "floaters": "none", **SMALL}
    WorldSettings(**good)
    with pytest.raises(ValueError, match=rf"{setting} is .*; allowed: "):
        WorldSettings(**{**good, setting: value})
