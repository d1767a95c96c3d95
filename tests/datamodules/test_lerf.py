import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from datamodules.lerf import LerfDataModule
from datamodules.readers.colmap import read_colmap_cameras, write_colmap_model
from datamodules.readers.gaussians import write_gaussian_ply
from datamodules.readers.language_features import read_language_features, write_language_features
from datamodules.readers.text_embeddings import TextEmbeddingTable, write_text_embeddings
from lightning_modules.functional.cameras import resize_camera
from tests.datamodules.tiny_scene import CHANNELS, HEIGHT, PHRASES, WIDTH, random_scene, unit, write_tiny_scene

NAMES = [f"frame_{index:05d}" for index in range(1, 6)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_scene(tmp_path / "kitchen")


def ready(root: Path, **settings) -> LerfDataModule:
    data = LerfDataModule(root, **settings)
    data.setup("fit")
    return data


def names(loader: DataLoader) -> list[str]:
    return [view.name for view in loader]


def test_a_scene_comes_through_with_its_shapes(root: Path) -> None:
    data = ready(root)
    assert (data.num_levels, data.feature_dim, data.gaussians.num_gaussians) == (3, CHANNELS, 20)
    assert data.views.names == NAMES
    assert data.negative_embeddings.shape == (4, CHANNELS)
    view = next(iter(data.test_dataloader()))
    assert view.image.shape == (HEIGHT, WIDTH, 3)
    assert view.mask_ids.shape == (3, HEIGHT, WIDTH)
    assert view.mask_ids.dtype == torch.int32
    assert view.mask_features.shape == (6, CHANNELS)
    assert view.labels.prompts == ("mug", "old camera")
    assert view.labels.masks.shape == (2, HEIGHT, WIDTH)
    torch.testing.assert_close(view.labels.embeddings, unit(len(PHRASES), CHANNELS, seed=99)[4:])


def test_every_view_has_the_features_photo_and_camera_of_its_own_name(root: Path) -> None:
    data = ready(root)
    cameras = read_colmap_cameras(root / "sparse" / "0")
    for view_id, view in enumerate(data.views):
        assert (view.view_id, view.name) == (view_id, NAMES[view_id])
        stored = read_language_features(root / "language_features", view.name)
        for channel, level in enumerate((1, 2, 3)):
            inside = stored.mask_ids[level] >= 0
            torch.testing.assert_close(
                view.mask_features[view.mask_ids[channel][inside].long()],
                stored.features[stored.mask_ids[level][inside].long()],
            )
        photo = np.array(Image.open(root / "images" / f"{view.name}.png"))
        np.testing.assert_array_equal(view.image, photo)
        assert torch.equal(view.camera.camera_from_world, cameras[view.name].camera.camera_from_world)


def test_matching_is_by_name_and_not_by_position(root: Path) -> None:
    before = {view.name: view for view in ready(root).views}
    # A photo that comes first in name order shifts all positions.
    cameras = {image.name: image.camera for image in read_colmap_cameras(root / "sparse" / "0").values()}
    cameras["aaa.png"] = cameras["frame_00003.png"]
    write_colmap_model(root / "sparse" / "0", cameras, np.zeros((1, 3)), np.zeros((1, 3), np.uint8))
    shutil.copy(root / "images" / "frame_00003.png", root / "images" / "aaa.png")
    data = ready(root, allow_missing_features=True)
    assert data.views.names == ["aaa", *NAMES]
    for view in list(data.views)[1:]:
        assert torch.equal(view.mask_features, before[view.name].mask_features)
        assert torch.equal(view.image, before[view.name].image)
    assert sorted(names(data.train_dataloader())) == NAMES  # the new view has no features


def test_loaders_divide_the_views(root: Path) -> None:
    data = ready(root)
    assert isinstance(data.train_dataloader(), StatefulDataLoader)
    assert sorted(names(data.train_dataloader())) == NAMES
    assert names(data.lifting_dataloader()) == NAMES
    assert names(data.val_dataloader()) == names(data.test_dataloader()) == NAMES[:2]
    assert names(data.predict_dataloader()) == NAMES
    chosen = ready(root, val_names=[NAMES[0], NAMES[4]], held_out=[NAMES[3]])
    assert names(chosen.val_dataloader()) == [NAMES[0], NAMES[4]]
    assert names(chosen.test_dataloader()) == [NAMES[1], NAMES[3]]
    assert names(chosen.lifting_dataloader()) == [NAMES[0], NAMES[1], NAMES[2], NAMES[4]]
    assert next(iter(chosen.train_dataloader())).image is None


@pytest.mark.parametrize(
    ("train_views", "expected"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (9, [0, 1, 2, 3, 4]), ([NAMES[3]], [3])]
)
def test_training_on_some_views(root: Path, train_views, expected: list[int]) -> None:
    assert names(ready(root, train_views=train_views).lifting_dataloader()) == [NAMES[index] for index in expected]


@pytest.mark.parametrize("levels", [(0, 1, 2, 3), (2,), (3, 1)])
def test_levels_are_chosen_in_the_order_given(root: Path, levels: tuple[int, ...]) -> None:
    data = ready(root, levels=levels)
    view = data.views[1]
    stored = read_language_features(root / "language_features", view.name)
    assert data.num_levels == len(view.mask_ids) == len(levels)
    assert len(view.mask_features) == 2 * len(levels)
    for channel, level in enumerate(levels):
        first_pixel = stored.features[stored.mask_ids[level, 0, 0]]
        assert torch.equal(view.mask_features[view.mask_ids[channel, 0, 0]], first_pixel)


def test_labelled_views_need_no_features_and_are_not_trained_on(root: Path) -> None:
    for letter in "fs":
        (root / "language_features" / f"{NAMES[0]}_{letter}.npy").unlink()
    data = ready(root)
    assert names(data.lifting_dataloader()) == NAMES[1:]
    view = next(iter(data.test_dataloader()))
    assert view.name == NAMES[0]
    assert view.mask_ids is None
    assert view.labels is not None


def test_cameras_and_photos_take_the_size_of_the_maps(root: Path) -> None:
    folder = root / "language_features"
    for name in NAMES:
        write_language_features(
            folder, name, [unit(1, CHANNELS).numpy()] * 4, np.zeros((4, HEIGHT // 2, WIDTH // 2), int)
        )
    view = next(iter(ready(root).test_dataloader()))
    expected = resize_camera(read_colmap_cameras(root / "sparse" / "0")[view.name].camera, WIDTH // 2, HEIGHT // 2)
    torch.testing.assert_close(view.camera.intrinsics, expected.intrinsics)
    assert (view.camera.width, view.camera.height) == (WIDTH // 2, HEIGHT // 2)
    assert view.image.shape == (HEIGHT // 2, WIDTH // 2, 3)
    assert view.labels.masks.shape == (2, HEIGHT // 2, WIDTH // 2)
    assert view.labels.boxes[0].tolist() == [[1.0, 1.5, 6.0, 10.0]]
    assert ready(root, resolution=2).views[0].camera.width == WIDTH // 2
    with pytest.raises(
        ValueError, match=r"_s\.npy is 16 x 12, but .* \(resolution 1: 32 x 24\).*Run the preprocessing"
    ):
        ready(root, resolution=1)


def test_setup_reads_once(root: Path) -> None:
    data = ready(root)
    shutil.rmtree(root / "language_features")
    data.setup("test")
    assert names(data.lifting_dataloader()) == NAMES


def test_text_is_encoded_once(root: Path) -> None:
    class CountingTable(TextEmbeddingTable):
        asked: list[str] = []  # noqa: RUF012

        def encode(self, phrases):
            self.asked += phrases
            return super().encode(phrases)

    data = ready(root, text=CountingTable(root / "text_embeddings.npz"))
    for _ in data.test_dataloader():
        assert data.encode_text(["mug", "old camera"]).shape == (2, CHANNELS)
    assert sorted(CountingTable.asked) == sorted(PHRASES)


def test_gaussians_are_searched_in_the_documented_order(root: Path) -> None:
    (root / "gaussians.ply").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"kitchen holds no Gaussians; looked for gaussians\.ply, point_cloud\.ply"
    ):
        ready(root)
    for iteration, num in ((7000, 30), (30_000, 40)):
        write_gaussian_ply(
            root / "output" / "point_cloud" / f"iteration_{iteration}" / "point_cloud.ply", random_scene(num)
        )
    assert ready(root).gaussians.num_gaussians == 40
    write_gaussian_ply(root / "point_cloud.ply", random_scene(50))
    assert ready(root).gaussians.num_gaussians == 50
    assert ready(root, gaussians=root / "output").gaussians.num_gaussians == 40
    assert ready(root, gaussians="output").gaussians.num_gaussians == 40
    with pytest.raises(FileNotFoundError, match=r"other\.ply is not a file"):
        ready(root, gaussians="other.ply")


def test_nerfstudio_cameras_and_labels_beside_the_scene(root: Path) -> None:
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    cameras = read_colmap_cameras(root / "sparse" / "0")
    frames = [
        {"file_path": f"images/{image.name}", "transform_matrix": (image.camera.world_from_camera @ flip).tolist()}
        for image in cameras.values()
    ]
    content = {"w": WIDTH, "h": HEIGHT, "fl_x": 30.0, "fl_y": 31.0, "cx": 15.5, "cy": 12.25, "frames": frames}
    (root / "transforms.json").write_text(json.dumps(content))
    shutil.rmtree(root / "sparse")
    (root.parent / "label").mkdir()
    shutil.move(root / "label", root.parent / "label" / "kitchen")
    data = ready(root)
    assert names(data.test_dataloader()) == NAMES[:2]
    for view in data.views:
        torch.testing.assert_close(
            view.camera.camera_from_world, cameras[view.name].camera.camera_from_world, rtol=0, atol=1e-5
        )


def test_the_ceiling_of_a_synthetic_world_follows_the_levels(root: Path) -> None:
    assert ready(root).ceiling is None
    ids = np.arange(60).reshape(20, 3) % 5 - 1
    floater = np.arange(20) % 2 == 0
    np.savez(root / "ceiling.npz", gaussian_part_ids=ids, features=unit(4, CHANNELS).numpy(), is_floater=floater)
    field = ready(root, levels=(3, 1)).ceiling
    np.testing.assert_array_equal(field.ids, ids[:, [2, 0]])
    np.testing.assert_array_equal(field.is_floater, floater)
    write_gaussian_ply(root / "gaussians.ply", random_scene(21))
    with pytest.raises(ValueError, match=r"ceiling\.npz is about 20 Gaussians but the scene has 21"):
        ready(root)


def remove(*paths: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in paths:
            shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()

    return change


def rename_label(root: Path) -> None:
    (root / "label" / f"{NAMES[0]}.json").rename(root / "label" / "frame_00077.json")


def other_label_size(root: Path) -> None:
    path = root / "label" / f"{NAMES[0]}.json"
    content = json.loads(path.read_text())
    content["info"]["height"] *= 2
    path.write_text(json.dumps(content))


def square_photo(root: Path) -> None:
    Image.new("RGB", (24, 24)).save(root / "images" / f"{NAMES[2]}.png")


def truncated_photo(root: Path) -> None:
    (root / "images" / f"{NAMES[2]}.png").write_bytes(b"")


def write_features(root: Path, name: str, channels: int = CHANNELS, width: int = WIDTH) -> None:
    maps = np.zeros((4, HEIGHT, width), int)
    write_language_features(root / "language_features", name, [unit(1, channels).numpy()] * 4, maps)


def square_maps(root: Path) -> None:
    write_features(root, NAMES[2], width=HEIGHT)


def other_channels(root: Path) -> None:
    write_features(root, NAMES[2], channels=9)


def extra_features(root: Path) -> None:
    write_features(root, "zzz")


def unknown_prompt(root: Path) -> None:
    write_text_embeddings(root / "text_embeddings.npz", PHRASES[:5], unit(5, CHANNELS))


def other_text_model(root: Path) -> None:
    write_text_embeddings(root / "text_embeddings.npz", PHRASES, unit(6, 12))


def empty_folder(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        shutil.rmtree(root / name)
        (root / name).mkdir()

    return change


F3 = "frame_00003"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda root: shutil.rmtree(root), FileNotFoundError, r"kitchen is no folder.*data\.init_args\.root"),
        (remove("sparse"), FileNotFoundError, r"kitchen holds no cameras; looked for sparse/0.*init_args\.cameras"),
        (remove("images"), FileNotFoundError, r"images does not exist.*init_args\.images"),
        (empty_folder("images"), FileNotFoundError, r"images holds no photos.*load_images=false"),
        (remove(f"images/{F3}.png"), FileNotFoundError, rf"lacks 1 of the 5 photos .*{F3}\.png.*load_images=false"),
        (square_photo, ValueError, rf"{F3}\.png is 24 x 24, but its camera is 32 x 24"),
        (truncated_photo, ValueError, rf"{F3}\.png cannot be read as a photo.*Copy it again"),
        (remove("language_features"), FileNotFoundError, r"language_features does not exist\. Run the preprocessing"),
        (empty_folder("language_features"), FileNotFoundError, r"features holds no <stem>_f\.npy\. Run the preproc"),
        (
            remove(f"language_features/{F3}_f.npy", f"language_features/{F3}_s.npy"),
            ValueError,
            rf"language_features lacks the features of 1 of 5 images: {F3}\..*allow_missing_features=true",
        ),
        (remove(f"language_features/{F3}_s.npy"), FileNotFoundError, rf"{F3}_s\.npy does not exist"),
        (extra_features, ValueError, r"features of 1 images which .*sparse/0 does not have: zzz.*allow_missing"),
        (square_maps, ValueError, rf"{F3}_s\.npy is 24 x 24, but the camera of {F3}\.png is 32 x 24"),
        (other_channels, ValueError, rf"{F3}_f\.npy has 9 channels but frame_00001_f\.npy has 8.*Run the"),
        (rename_label, ValueError, r"label labels images which .*sparse/0 does not have: frame_00077"),
        (other_label_size, ValueError, r"frame_00001\.json was labelled on an image of 32 x 48, but the camera"),
        (empty_folder("label"), FileNotFoundError, r"label holds no labels"),
        (unknown_prompt, ValueError, r"text_embeddings\.npz has no embedding of 'old camera'.*add the phrase"),
        (other_text_model, ValueError, r"encoder gives 12 channels, but .*language_features has 8.*init_args\.text"),
        (remove("text_embeddings.npz"), ValueError, r"no encoder for 'object'.*_embeddings\.npz does not exist"),
        (
            lambda root: (root / "gaussians.ply").write_bytes(b"ply\n"),
            ValueError,
            r"gaussians\.ply cannot be read as \.ply",
        ),
    ],
)
def test_bad_scenes_are_refused_in_setup_with_name_and_remedy(root: Path, change, error, message: str) -> None:
    change(root)
    with pytest.raises(error, match=message):
        ready(root)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": (1, 4)}, r"levels is \[1, 4\]; allowed: some of 0"),
        ({"levels": (1, 1)}, "none twice"),
        ({"levels": ()}, r"levels is \[\]"),
        ({"resolution": 0}, "resolution is 0; allowed: -1"),
        ({"train_views": 0}, "train_views is 0; allowed: 1 or more"),
        ({"train_views": ["frame_0003"]}, "train_views names views .*frame_0003; allowed: .*frame_00003"),
        ({"val_names": ["x"]}, "val_names names views .*: x; allowed"),
        ({"held_out": NAMES}, "no view to train on"),
    ],
)
def test_bad_settings_are_refused_by_name(root: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(root, **settings).train_dataloader()


def test_at_most_five_names_are_listed(tmp_path: Path) -> None:
    root = write_tiny_scene(tmp_path / "many", num_views=9, num_labelled=0)
    for index in range(2, 10):
        for letter in "fs":
            (root / "language_features" / f"frame_{index:05d}_{letter}.npy").unlink()
    with pytest.raises(ValueError, match=r"8 of 9 images: frame_00002, .*, frame_00006 and 3 more\. Run"):
        ready(root)


def test_a_scene_without_labels_can_be_trained_on(tmp_path: Path) -> None:
    root = write_tiny_scene(tmp_path / "plain", num_labelled=0)
    (root / "text_embeddings.npz").unlink()
    data = ready(root)
    assert names(data.test_dataloader()) == []
    assert len(names(data.train_dataloader())) == 5
    assert data.negative_embeddings.shape == (0, CHANNELS)
    with pytest.raises(ValueError, match=r"no encoder for 'mug'.*OpenClipTextEncoder"):
        data.encode_text(["mug"])


def test_the_command_line_can_choose_the_text_encoder(root: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LerfDataModule, "data")
    encoder = "datamodules.readers.text_embeddings.TextEmbeddingTable"
    table = f"--data.text.init_args.path={root / 'text_embeddings.npz'}"
    arguments = ["--data=datamodules.lerf.LerfDataModule", f"--data.root={root}", f"--data.text={encoder}", table]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert data.text.phrases == PHRASES
