from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from datamodules.batches import SparseSdf
from datamodules.readers.sparse_sdf import StoredSdf, read_sparse_sdf, write_sparse_sdf
from datamodules.sdf_shapes import SdfShapesDataModule, collate
from lightning_modules.functional.sdf_vqvae.cube_symmetries import CUBE_SYMMETRIES, turn_sparse_sdf

RESOLUTION = 16


def ball(radius: float, resolution: int = RESOLUTION, band: float = 4.0) -> StoredSdf:
    axis = torch.arange(resolution)
    coords = torch.cartesian_prod(axis, axis, axis).int()
    distance = (coords * (2 / (resolution - 1)) - 1).norm(dim=1) - radius
    sdf = distance * (resolution - 1) / 2 / band
    near = sdf.abs() <= 1
    return StoredSdf(coords[near], sdf[near].float(), resolution, band)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twenty balls of different sizes as .npz, in two folders."""
    root = tmp_path / "shapes"
    for number in range(20):
        write_sparse_sdf(root / f"{'ab'[number % 2]}" / f"{number:02}.npz", ball(0.3 + 0.03 * number))
    return root


def ready(root: Path, **settings) -> SdfShapesDataModule:
    data = SdfShapesDataModule(root, **{"resolution": RESOLUTION, "max_voxels_per_batch": 9000, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


def names(loader) -> list[str]:
    return [name for batch in loader for name in batch.names]


def keys(coords: Tensor) -> Tensor:
    shape, x, y, z = coords.long().unbind(1)
    return ((shape * RESOLUTION + x) * RESOLUTION + y) * RESOLUTION + z


def test_a_batch_holds_whole_shapes_row_by_row(folder):
    data = ready(folder)
    batch = next(iter(data.val_dataloader()))
    assert batch.coords.dtype == torch.int32
    assert batch.sdf.dtype == torch.float32
    assert (batch.resolution, batch.band) == (RESOLUTION, 4.0)
    assert keys(batch.coords).diff().min() > 0
    for number, name in enumerate(batch.names):
        stored = read_sparse_sdf(folder / f"{name}.npz")
        own = batch.coords[:, 0] == number
        assert torch.equal(batch.coords[own, 1:], stored.coords)
        assert torch.equal(batch.sdf[own, 0], stored.sdf)


def test_splits_are_disjoint_whole_and_follow_from_the_seed(folder):
    def splits(seed: int) -> list[list[str]]:
        data = ready(folder, val_fraction=0.2, test_fraction=0.1, seed=seed)
        return [sorted(names(f())) for f in (data.train_dataloader, data.val_dataloader, data.test_dataloader)]

    first = splits(0)
    assert [len(split) for split in first] == [14, 4, 2]
    assert len({name for split in first for name in split}) == 20
    assert splits(0) == first
    assert splits(1) != first


def test_named_shapes_are_held_out(folder, tmp_path):
    (tmp_path / "test.txt").write_text("a/00\n\nb/03\n")
    data = ready(folder, val_files=["a/02"], test_files=str(tmp_path / "test.txt"))
    assert names(data.val_dataloader()) == ["a/02"]
    assert names(data.test_dataloader()) == ["a/00", "b/03"]
    assert len(names(data.train_dataloader())) == 17


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_files": ["c/00"]}, r"val_files names c/00, but .* has a/00"),
        ({"test_files": []}, "test_files names no usable shape"),
        ({"val_files": ["a/00"], "test_files": ["a/00"]}, "both name a/00"),
        ({"val_files": [f"{'ab'[n % 2]}/{n:02}" for n in range(19)]}, "none is left to train on"),
        ({"max_voxels_per_batch": 100}, r"the whole has \d+ voxels, but a batch may have 100"),
        ({"max_voxels_per_batch": 100, "crop_blocks": 2}, "a crop of 2 latent cells has"),
    ],
)
def test_an_impossible_split_or_budget_is_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        ready(folder, **settings)
    with pytest.raises(FileNotFoundError, match=r"val_files is none\.txt"):
        ready(folder, val_files="none.txt")


def test_predict_sees_all_shapes_or_a_split(folder):
    data = SdfShapesDataModule(folder, RESOLUTION, max_voxels_per_batch=100)
    data.prepare_data()
    data.setup("predict")  # neither a split nor the budget of training is needed
    assert len(names(data.predict_dataloader())) == 20
    data.max_voxels_per_batch = 9000
    data.setup("fit")  # one data module may go on to train
    assert len(names(data.val_dataloader())) == 2
    assert sorted(names(ready(folder, predict_split="test").predict_dataloader())) == names(
        ready(folder).test_dataloader()
    )


def test_validation_pictures_are_spread_over_the_split(folder):
    data = ready(folder, val_fraction=0.5)
    assert len(set(data.val_shapes(3).names)) == 3
    assert len(data.val_shapes(99).names) == 10


@pytest.mark.parametrize("crop_blocks", [0, 1, 2])
def test_training_batches_stay_under_the_budget_and_never_empty(folder, crop_blocks):
    data = ready(folder, crop_blocks=crop_blocks, max_voxels_per_batch=4000)
    loader = data.train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        sizes = []
        for batch in loader:
            assert len(batch.coords) <= 4000
            assert keys(batch.coords).diff().min() > 0
            assert set(batch.coords[:, 0].tolist()) == set(range(len(batch.names)))
            sizes.append(len(batch.coords))
        assert len(sizes) == len(loader)


def test_a_crop_is_a_box_of_latent_cells_of_the_shape(folder):
    data = ready(folder, crop_blocks=2, augment=False)
    dataset = data._splits["train"]
    for position in range(len(dataset)):
        whole, crop = dataset.shape(position), dataset.shape(position, epoch=3)
        assert 0 < len(crop.coords) < len(whole.coords)
        cells = crop.coords // 4
        low, high = cells.amin(0), cells.amax(0)
        assert (high - low < 2).all()
        inside = ((whole.coords // 4 >= low) & (whole.coords // 4 <= high)).all(1)
        assert torch.equal(whole.coords[inside], crop.coords)
        assert torch.equal(whole.sdf[inside], crop.sdf)


def test_augmentation_is_a_symmetry_that_follows_from_seed_epoch_and_name(folder):
    root = folder.parent / "lopsided"
    stored = ball(0.9)
    kept = stored.coords[:, 0] * 3 + stored.coords[:, 1] * 2 + stored.coords[:, 2] < 40
    for number in range(6):
        write_sparse_sdf(root / f"{number}.npz", stored._replace(coords=stored.coords[kept], sdf=stored.sdf[kept]))
    data, again, other = ready(root), ready(root), ready(root, seed=1)
    train, val = data._splits["train"], data._splits["val"]
    turned = [turn_sparse_sdf(*train.shape(0)[:2], symmetry, RESOLUTION) for symmetry in CUBE_SYMMETRIES]
    found = set()
    for epoch in range(40):
        seen = train.shape(0, epoch)
        (number,) = [i for i, t in enumerate(turned) if torch.equal(t[0], seen.coords) and torch.equal(t[1], seen.sdf)]
        found.add(number)
        assert torch.equal(again._splits["train"].shape(0, epoch).coords, seen.coords)
    assert len(found) > 15
    different = [
        not torch.equal(other._splits["all"].shape(0, epoch).coords, data._splits["all"].shape(0, epoch).coords)
        for epoch in range(10)
    ]
    assert any(different)
    assert torch.equal(val[next(iter(data.val_dataloader().sampler))].coords[:, 1:], stored.coords[kept])


def test_batches_without_voxels_or_of_two_resolutions_are_refused():
    empty = StoredSdf(torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0), RESOLUTION, 4.0)
    with pytest.raises(ValueError, match=r"1 of them without voxels \(b\)"):
        collate(["a", "b"], [ball(0.5), empty], 4.0)
    with pytest.raises(ValueError, match=r"resolutions \[8, 16\]"):
        collate(["a", "b"], [ball(0.5), ball(0.5, 8)], 4.0)
    with pytest.raises(ValueError, match="0 shapes"):
        collate([], [], 4.0)


class BatchRecorder(pl.LightningModule):
    """Writes down what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple] = []

    def training_step(self, batch: SparseSdf) -> Tensor:
        self.seen.append((batch.names, int(keys(batch.coords).sum()), float(batch.sdf.sum())))
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


@pytest.mark.parametrize("at_end_of_epoch", [False, True])
def test_a_resumed_run_sees_the_batches_that_the_first_would_have(folder, tmp_path, at_end_of_epoch):
    def data() -> SdfShapesDataModule:
        return SdfShapesDataModule(folder, RESOLUTION, crop_blocks=3, max_voxels_per_batch=4000, seed=4)

    ready(folder, crop_blocks=3, max_voxels_per_batch=4000, seed=4)
    straight = BatchRecorder()
    whole = trainer(tmp_path / "whole", 15)
    whole.fit(straight, datamodule=data())
    per_epoch = whole.num_training_batches
    assert 2 <= per_epoch <= 6
    stop = 2 * per_epoch if at_end_of_epoch else 2 * per_epoch - 1
    trainer(tmp_path / "part", stop).fit(BatchRecorder(), datamodule=data())
    resumed = BatchRecorder()
    trainer(tmp_path / "part", 15).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "part" / "last.ckpt")
    assert resumed.seen == straight.seen[stop:]
    assert len(set(straight.seen)) == 15


# Meshes


@pytest.fixture
def meshes(tmp_path) -> Path:
    """Three closed meshes in three formats, one of them in a folder."""
    root = tmp_path / "meshes"
    (root / "deep").mkdir(parents=True)
    trimesh.creation.icosphere(4, 3.0).export(root / "ball.stl")
    trimesh.creation.box((1, 2, 3)).export(root / "box.glb")
    trimesh.creation.torus(2, 0.7).export(root / "deep" / "ring.obj")
    (root / "notes.txt").write_text("not a shape")
    return root


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}


def test_meshes_become_signed_distance(meshes):
    data = ready(meshes)
    shapes = {shape.name: read_sparse_sdf(shape.path) for shape in data._splits["all"].shapes}
    assert sorted(shapes) == ["ball", "box", "deep/ring"]
    found, exact = shapes["ball"], ball(0.95)
    assert len(found.coords) == pytest.approx(len(exact.coords), rel=0.01)
    distance = (found.coords * (2 / (RESOLUTION - 1)) - 1).norm(dim=1) - 0.95
    torch.testing.assert_close(found.sdf, distance * (RESOLUTION - 1) / 2 / 4, atol=0.005, rtol=0)


def test_meshes_are_converted_once_and_anew_where_they_changed(meshes):
    ready(meshes)
    cache = meshes / ".sparse_sdf"
    before = times(cache)
    assert len(before) == 3
    ready(meshes)
    assert times(cache) == before
    trimesh.creation.box((1, 1, 1)).export(meshes / "box.glb")
    (cache / "16_4_refuse" / "ball.npz").unlink()  # a run that was stopped
    ready(meshes)
    after = times(cache)
    assert {name for name in before if after[name] != before[name]} == {"ball.npz", "box.npz"}
    cube = read_sparse_sdf(cache / "16_4_refuse" / "box.npz")
    assert (cube.coords[cube.sdf < 0].amax(0) == 14).all()


def test_other_settings_are_kept_apart(meshes):
    ready(meshes)
    before = times(meshes / ".sparse_sdf" / "16_4_refuse")
    ready(meshes, band=3.0)
    assert times(meshes / ".sparse_sdf" / "16_4_refuse") == before
    assert len(list((meshes / ".sparse_sdf").rglob("*.npz"))) == 6


def test_shapes_that_fail_are_listed_and_the_rest_goes_on(meshes, capsys):
    whole = (meshes / "ball.stl").read_bytes()
    (meshes / "cut_short.stl").write_bytes(whole[: len(whole) // 2])
    (meshes / "nothing.obj").write_text("")
    (meshes / "nan.obj").write_text("v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n")
    sheet = trimesh.creation.box()
    trimesh.Trimesh(sheet.vertices, sheet.faces[:-1]).export(meshes / "open.ply")
    write_sparse_sdf(meshes / "coarse.npz", ball(0.5, 8))
    write_sparse_sdf(meshes / "narrow.npz", ball(0.5, RESOLUTION, 3.0))
    np.savez(meshes / "empty.npz", sparse_sdf=np.zeros((0, 1)), sparse_index=np.zeros((0, 3), int), resolution=16)
    np.savez(meshes / "far.npz", sparse_sdf=np.zeros((1, 1)), sparse_index=np.array([[0, 0, 99]]), resolution=16)
    data = ready(meshes)
    assert [shape.name for shape in data._splits["all"].shapes] == ["ball", "box", "deep/ring"]
    printed = " ".join(capsys.readouterr().err.split())
    assert "8 of 11 shapes are left out" in printed
    assert "99]" in printed  # brackets are no markup
    for name in ("cut_short", "nothing", "nan", "open", "coarse", "narrow", "empty"):
        assert name in printed


def test_npz_files_are_read_in_capitals_too(folder):
    (folder / "a" / "00.npz").rename(folder / "a" / "00.NPZ")
    assert "a/00" in names(ready(folder, predict_split="all").predict_dataloader())


def test_an_open_mesh_is_refused_with_its_open_edges(meshes, capsys):
    sheet = trimesh.creation.box()
    trimesh.Trimesh(sheet.vertices, sheet.faces[:-1]).export(meshes / "open.ply")
    ready(meshes)
    assert "open surface (3 edges of one face, 0 of more than two)" in " ".join(
        capsys.readouterr().err.replace("│", "").split()
    )


def test_a_cache_that_cannot_be_written_to_is_refused_before_the_work(meshes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file.*cannot be written to .*data\.init_args\.cache"):
        ready(meshes, cache=tmp_path / "file" / "cache")


def test_a_cache_among_the_shapes_is_refused_unless_it_is_hidden(meshes):
    for cache in (meshes, meshes / "cache"):
        with pytest.raises(ValueError, match=r"cache is .*inside of .*taken for shapes.*\.sparse_sdf"):
            ready(meshes, cache=cache)
    assert len(ready(meshes, cache=meshes / ".mine" / "cache")._splits["all"]) == 3


def test_what_is_prepared_is_not_written_again(meshes):
    ready(meshes)
    (list_file,) = (meshes / ".sparse_sdf").rglob("shapes_*.json")
    before = list_file.stat().st_mtime_ns
    ready(meshes)  # the cache may have become read-only
    assert list_file.stat().st_mtime_ns == before


def test_another_device_is_refused(meshes):
    with pytest.raises(ValueError, match=r"device is gpu; allowed here: cpu"):
        ready(meshes, device="gpu")


def test_a_folder_without_a_usable_shape_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        ready(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no shape; allowed: \.obj"):
        ready(tmp_path)
    (tmp_path / "bad.obj").write_text("")
    with pytest.raises(ValueError, match=r"none of 1 shapes can be used\. The first, bad: .*no triangles"):
        ready(tmp_path)
    (tmp_path / "bad.stl").write_text("")
    with pytest.raises(ValueError, match="two files of the name bad"):
        ready(tmp_path)


def test_setup_before_preparation_is_refused(meshes):
    data = SdfShapesDataModule(meshes, RESOLUTION)
    with pytest.raises(FileNotFoundError, match="not prepared with these settings"):
        data.setup("fit")


@pytest.mark.parametrize(("open_meshes", "inside"), [("winding", True), ("unsigned", False)])
def test_an_open_mesh_is_signed_by_winding_or_has_no_inside(meshes, open_meshes, inside):
    whole = trimesh.creation.icosphere(3)
    trimesh.Trimesh(whole.vertices, whole.faces[:-4]).export(meshes / "open.ply")
    with pytest.warns(UserWarning, match=f"1 meshes are open and .*{'winding' if inside else 'no inside'}.*: open"):
        data = ready(meshes, open_meshes=open_meshes)
    signs = {s.name: bool((read_sparse_sdf(s.path).sdf < 0).any()) for s in data._splits["all"].shapes}
    assert signs == {"ball": True, "box": True, "deep/ring": True, "open": inside}


def test_a_mesh_outside_the_cube_is_refused_where_it_is_not_moved(meshes, capsys):
    with pytest.raises(ValueError, match=r"none of 3 shapes can be used.*reaches 3, out of the cube"):
        ready(meshes, normalise=False)
    assert "3 of 3 shapes are left out" in capsys.readouterr().err
    trimesh.creation.icosphere(4, 0.5).export(meshes / "ball.stl")
    data = SdfShapesDataModule(meshes, RESOLUTION, normalise=False)
    data.prepare_data()
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert len(batch.coords) == pytest.approx(len(ball(0.5).coords), rel=0.02)


def test_real_meshes_of_a_read_only_folder_are_kept_elsewhere(shared_data, tmp_path):
    data = ready(shared_data / "meshes", resolution=32, cache=tmp_path / "cache", max_voxels_per_batch=50_000)
    shapes = {shape.name: read_sparse_sdf(shape.path) for shape in data._splits["all"].shapes}
    assert sorted(shapes) == ["featuretype", "spot", "torus", "wingnut"]
    for shape in shapes.values():
        inside = shape.coords[shape.sdf < 0]
        assert int((inside.amax(0) - inside.amin(0)).max()) in (28, 29)


@pytest.mark.parametrize(
    "setting",
    [
        {"resolution": 18},
        {"resolution": 0},
        {"down_factor": 0},
        {"band": 1.0},
        {"crop_blocks": 5},
        {"crop_blocks": -1},
        {"max_voxels_per_batch": 0},
        {"val_fraction": 0.6, "test_fraction": 0.5},
    ],
)
def test_an_impossible_setting_is_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SdfShapesDataModule(tmp_path, **{"resolution": RESOLUTION, **setting})
