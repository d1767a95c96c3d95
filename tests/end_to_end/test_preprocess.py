"""Photographs to language features by the command line: layout, resumes, damage, processes, what is refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import sam_model_registry

import datamodules.readers.language_features as language_features
from datamodules.lerf import LerfDataModule
from datamodules.photographs import PhotoFile
from datamodules.readers.gaussians import write_gaussian_ply
from datamodules.readers.language_features import read_language_features
from datamodules.readers.lerf_labels import rasterize_labels, read_lerf_labels
from datamodules.synthetic.tabletop import arrangement_of
from datamodules.synthetic.tabletop_images import TabletopImagesDataModule
from lightning_modules.functional.language_features.graph_segmentation import GraphMasks
from lightning_modules.functional.language_features.mask_nms import suppress_masks
from lightning_modules.functional.language_features.mask_sources import MaskSet, MaskSource
from lightning_modules.functional.language_features.mask_tiles import mask_map, mask_tiles
from lightning_modules.networks.mask_features import RandomTiles
from tests.datamodules.test_posed_images import write_scene
from tests.datamodules.tiny_scene import HEIGHT, WIDTH, random_scene
from tests.end_to_end.conftest import tiny_world
from tests.networks.tiny_segment_anything import disk_sam
from train import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "preprocess"
NAMES = ["a.b", "c", "d", "e", "f"]


class CountedTiles(RandomTiles):
    """Counts its calls."""

    calls = 0

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return super().forward(tiles)


class NoSmallMasks(MaskSource):
    """The masks of graph-based segmentation without those of the level s."""

    def __call__(self, photo: torch.Tensor) -> tuple[MaskSet, ...]:
        default, s, m, large = GraphMasks()(photo)
        return default, MaskSet(s.masks[:0], s.scores[:0]), m, large


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = write_scene(tmp_path / "kitchen", NAMES)
    blocks = np.random.default_rng(1).integers(0, 255, (len(NAMES), 3, 4, 3), dtype=np.uint8)
    for name, colors in zip(NAMES, blocks, strict=True):  # flat areas, so that there is something to segment
        Image.fromarray(colors).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST).save(root / "images" / f"{name}.png")
    return root


def arguments(root: Path, *flags: str, tower: str = "CountedTiles", config: str = "laptop.yaml") -> list[str]:
    return [
        "predict",
        f"--config={CONFIGS / config}",
        f"--data.init_args.root={root}",
        "--data.init_args.resolution=-1",
        "--data.init_args.features=language_features",
        "--data.init_args.num_workers=0",
        f"--model.init_args.describer=tests.end_to_end.test_preprocess.{tower}",
        "--model.init_args.describer.init_args.image_size=32",
        "--model.init_args.describer.init_args.embed_dim=8",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.logger.init_args.save_dir={root.parent}",
        *flags,
    ]


def extract(root: Path, *flags: str, config: str = "laptop.yaml") -> dict[str, bytes]:
    """Runs the command and returns the written files."""
    CountedTiles.calls = 0
    main(arguments(root, *flags, config=config))
    return written(root)


def written(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "language_features").glob("*.npy"))}


def files_of(*names: str) -> list[str]:
    return sorted(f"{name}_{letter}.npy" for name in names for letter in "fs")


def test_the_files_are_those_of_langsplat(root: Path) -> None:
    assert sorted(extract(root)) == files_of(*NAMES)
    encoder = RandomTiles(image_size=32, embed_dim=8)
    for name in NAMES:
        photo = torch.from_numpy(np.asarray(Image.open(root / "images" / f"{name}.png")).copy())
        features = np.load(root / "language_features" / f"{name}_f.npy")
        maps = np.load(root / "language_features" / f"{name}_s.npy")
        assert (features.dtype, maps.dtype, maps.shape) == (np.float32, np.float32, (4, HEIGHT, WIDTH))
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
        start = 0
        for level, (masks, scores) in enumerate(GraphMasks()(photo)):
            kept = masks[suppress_masks(masks, scores)]
            expected = mask_map(kept).numpy()
            np.testing.assert_array_equal(maps[level], np.where(expected < 0, -1, expected + start))
            tiles = encoder(mask_tiles(photo, kept, 32))
            np.testing.assert_allclose(features[start : start + len(kept)], tiles.numpy(), atol=1e-5)
            start += len(kept)
        assert start == len(features) > 4


def test_the_language_field_opens_them(root: Path) -> None:
    extract(root)
    write_gaussian_ply(root / "gaussians.ply", random_scene())
    data = LerfDataModule(root)
    data.setup("fit")
    assert sorted(view.name for view in data.train_dataloader()) == NAMES


def test_a_second_run_has_nothing_to_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = extract(root)
    assert CountedTiles.calls > 0
    capsys.readouterr()
    assert extract(root) == first
    assert CountedTiles.calls == 0
    assert "5 of 5 (nothing to do)" in capsys.readouterr().out


@pytest.mark.parametrize(("photos_per_batch", "killed_at"), [(1, 3), (2, 4), (2, 7)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    root: Path, monkeypatch: pytest.MonkeyPatch, photos_per_batch: int, killed_at: int
) -> None:
    flags = [f"--data.init_args.photos_per_batch={photos_per_batch}"]
    whole = extract(root, *flags)
    shutil.rmtree(root / "language_features")
    save, saved = language_features.save_array, []

    def save_until_killed(path: Path, array: np.ndarray) -> None:
        if len(saved) == killed_at:  # an odd number: between the features of a photograph and their map
            raise KeyboardInterrupt
        saved.append(path)
        save(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(language_features, "save_array", save_until_killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            extract(root, *flags)
    assert len(written(root)) == killed_at
    assert extract(root, *flags) == whole
    assert not list((root / "language_features").glob(".*"))


@pytest.mark.parametrize("letter", "fs")
def test_a_truncated_file_is_written_again(root: Path, letter: str) -> None:
    first = extract(root)
    path = root / "language_features" / f"d_{letter}.npy"
    path.write_bytes(path.read_bytes()[:-4])
    assert extract(root) == first
    assert CountedTiles.calls == 1


def test_a_photo_of_another_size_is_done_again(root: Path) -> None:
    first = extract(root)
    path = root / "images" / "d.png"
    Image.open(path).resize((WIDTH // 2, HEIGHT // 2)).save(path)
    second = extract(root)
    assert {name for name in first if second[name] != first[name]} == set(files_of("d"))


@pytest.mark.parametrize(("kept_bytes", "photos_per_batch"), [(60, 3), (0, 1)])
def test_a_corrupt_photo_is_reported_and_the_others_are_done(
    root: Path, capsys: pytest.CaptureFixture[str], kept_bytes: int, photos_per_batch: int
) -> None:
    path = root / "images" / "d.png"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    flags = [f"--data.init_args.photos_per_batch={photos_per_batch}"]
    first = extract(root, *flags)
    assert sorted(first) == files_of("a.b", "c", "e", "f")
    output = capsys.readouterr().out
    assert "failed: d" in output
    assert "cannot be read" in output
    assert extract(root, *flags) == first
    assert CountedTiles.calls == 0  # the corrupt one is tried again, its neighbours are not


def test_a_scene_of_corrupt_photos_fails(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.write_bytes(b"no photo")
    with pytest.raises(ValueError, match=r"None of the 5 photos could be read: .*cannot be read as a photo"):
        extract(root)


def test_photos_of_every_kind_give_the_features_of_their_stored_colours(root: Path) -> None:
    photos = {name: root / "images" / f"{name}.png" for name in NAMES}
    for name in ("a.b", "c"):
        Image.open(photos[name]).convert("L").convert("RGB").save(photos[name])
    plain = extract(root)
    shutil.rmtree(root / "language_features")

    grey = Image.open(photos["a.b"]).convert("L")
    grey.save(photos["a.b"])
    Image.fromarray(np.asarray(Image.open(photos["c"]).convert("L")).astype(np.uint16) * 257).save(photos["c"])
    transparent = Image.open(photos["d"]).convert("RGBA")
    transparent.putalpha(7)
    transparent.save(photos["d"])
    Image.open(photos["e"]).convert("CMYK").save(photos["e"].with_suffix(".tif"))
    photos["e"].unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to look at
    Image.open(photos["f"]).save(photos["f"], exif=exif)
    assert extract(root) == plain


def test_a_level_without_masks_is_empty(root: Path) -> None:
    extract(root, "--model.init_args.mask_source=tests.end_to_end.test_preprocess.NoSmallMasks")
    for name in NAMES:
        found = read_language_features(root / "language_features", name)
        assert (found.mask_ids[1] == -1).all()
        assert found.level_offsets[1] == found.level_offsets[2] < found.level_offsets[3]


def test_segment_anything_runs_from_the_command_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sam_model_registry, "vit_b", disk_sam)
    torch.save(disk_sam().state_dict(), root / "disks.pth")
    flags = [
        f"--model.init_args.mask_source.init_args.checkpoint={root / 'disks.pth'}",
        "--model.init_args.mask_source.init_args.model_type=vit_b",
        "--model.init_args.mask_source.init_args.points_per_side=4",
    ]
    first = extract(root, *flags, config="lerf.yaml")
    assert sorted(first) == files_of(*NAMES)
    for name in NAMES:
        offsets = read_language_features(root / "language_features", name).level_offsets
        assert offsets[1] > 0
        assert offsets[4] > offsets[1]
    assert extract(root, *flags, config="lerf.yaml") == first
    assert CountedTiles.calls == 0


def test_features_of_other_settings_are_refused_until_overwritten(root: Path) -> None:
    first = extract(root)
    with pytest.raises(ValueError, match=r"mask_source\.sigma is 0\.8 there, 0\.5 now.*overwrite=true"):
        extract(root, "--model.init_args.mask_source.init_args.sigma=0.5")
    with pytest.raises(ValueError, match=r"resolution is -1 there, 2 now"):
        extract(root, "--data.init_args.resolution=2")
    assert written(root) == first
    extract(root, "--model.init_args.describer.init_args.batch_size=3")  # for speed alone
    assert CountedTiles.calls == 0
    half = extract(root, "--data.init_args.resolution=2", "--data.init_args.overwrite=true")
    assert sorted(half) == sorted(first)
    assert json.loads((root / "language_features" / "settings.json").read_text())["resolution"] == 2
    assert extract(root, "--data.init_args.resolution=2") == half


def test_features_of_unknown_making_are_kept(root: Path) -> None:
    first = extract(root)
    (root / "language_features" / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"no settings\.json.*LangSplat's own"):
        extract(root)
    assert written(root) == first


def test_remains_of_killed_runs_are_removed(root: Path) -> None:
    folder = root / "language_features"
    folder.mkdir()
    old, fresh = folder / ".c_f.123.npy", folder / ".d_s.124.npy"
    for path in (old, fresh):
        path.write_bytes(b"half")
    an_hour_ago = time.time() - 3600
    os.utime(old, (an_hour_ago, an_hour_ago))
    extract(root)
    assert not old.exists()
    assert fresh.exists()  # another run may be writing it


def test_photos_without_a_camera_are_left_out_and_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(root / "images" / "c.png", root / "images" / "unplaced.png")
    assert sorted(extract(root)) == files_of(*NAMES)
    assert "1, left out: unplaced" in capsys.readouterr().out
    assert sorted(extract(root, "--data.init_args.only_posed=false")) == files_of(*NAMES, "unplaced")
    shutil.rmtree(root / "sparse")
    assert sorted(extract(root)) == files_of(*NAMES, "unplaced")


def full_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def no_photos(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(root / "images")


def same_stems(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images" / "c.jpg")


def other_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (root / "images").iterdir():
        path.rename(path.with_name(f"IMG_{path.name}"))


def turned(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "images" / "c.png")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (full_disk, ValueError, r"needs about 0\.01 GB for the features of 5 photos, but the disk has 0\.00 GB left"),
        (no_photos, FileNotFoundError, r"images does not exist"),
        (same_stems, ValueError, r"share the stem 'c'"),
        (other_names, ValueError, r"none of the 5 photos .*called IMG_a\.b.* its images a\.b"),
        (turned, ValueError, r"c\.png is 24 x 32, but its camera is 32 x 24"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path, pytest.MonkeyPatch], object],
    error: type[Exception],
    message: str,
) -> None:
    spoil(root, monkeypatch)
    with pytest.raises(error, match=message):
        extract(root)
    assert CountedTiles.calls == 0
    assert not (root / "language_features").exists()


def test_missing_weights_are_told_before_features_are_deleted(root: Path) -> None:
    first = extract(root)
    with pytest.raises(FileNotFoundError, match=r"sam_vit_h_4b8939\.pth"):
        main(
            [
                "predict",
                f"--config={CONFIGS / 'lerf.yaml'}",
                f"--data.init_args.root={root}",
                "--data.init_args.overwrite=true",
                "--trainer.accelerator=cpu",
                f"--trainer.logger.init_args.save_dir={root.parent}",
            ]
        )
    assert written(root) == first


def test_the_demo_describes_masks_by_what_most_of_their_pixels_show(world: Path, tmp_path: Path) -> None:
    flags = ["--data.init_args.features=from_photos", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    flags += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.init_args.seed=1"]
    data = main(["predict", f"--config={CONFIGS / 'demo.yaml'}", *tiny_world(world), *flags]).datamodule
    assert sorted(path.name for path in (world / "from_photos").glob("*.npy")) == sorted(
        path.name for path in (world / "language_features").glob("*.npy")
    )
    for file in data.photographs[::4]:
        found = read_language_features(world / "from_photos", file.name)
        truth = data.truth_of(file)
        for level, ids in ((1, 0), (2, 1), (3, 2)):  # of these no masks overlap: the map holds them whole
            for mask in found.mask_ids[level].unique().tolist():
                covered = truth.ids[ids][found.mask_ids[level] == mask]
                expected = truth.features[covered.long().mode().values]
                if mask >= 0:
                    torch.testing.assert_close(found.features[mask], expected, atol=1e-6, rtol=0)


def test_the_truth_of_pixels_is_that_of_the_labels(world: Path) -> None:
    data = TabletopImagesDataModule(
        world, seed=1, image_size=(96, 72), num_gaussians=3000, num_train_views=6, objects_per_group=1
    )
    data.prepare_data()
    prompts = np.array(arrangement_of(data.world_settings).prompts)
    frames = read_lerf_labels(world / "label")
    assert len(frames) == 6
    for name, frame in frames.items():
        file = PhotoFile(name, world / "images" / f"{name}.png", 96, 72)
        named, masks, _ = rasterize_labels(frame, file.width, file.height)
        shown = prompts[data.truth_of(file).ids.numpy()]
        for prompt, mask in zip(named, masks, strict=True):
            truth, label = (shown == prompt).any(axis=0), mask.numpy()
            assert (truth & label).sum() > 0.9 * (truth | label).sum()  # labels leave out the smallest pieces


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_share_the_photos_and_report_together(root: Path) -> None:
    one = extract(root)
    shutil.rmtree(root / "language_features")
    (root / "images" / "e.png").write_bytes(b"no photo")
    command = [sys.executable, "train.py", *arguments(root, tower="RandomTiles"), "--trainer.devices=2"]
    command += [f"--config={ROOT / 'configs' / 'trainer' / 'ddp.yaml'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    for done, before in ((4, 0), (0, 4)):
        result = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, timeout=300, capture_output=True, text=True
        )
        counts = {
            row.split("│")[1].strip(): row.split("│")[2].strip() for row in result.stdout.splitlines() if "│" in row
        }
        assert (counts["photos done"], counts["done before"], counts["failed"]) == (str(done), str(before), "1")
    two = written(root)
    assert sorted(two) == files_of("a.b", "c", "d", "f")
    for name in two:
        if name.endswith("_s.npy"):
            assert two[name] == one[name]
