from pathlib import Path

import pytest
import torch

from datamodules.readers.langsplat_checkpoints import write_gaussian_checkpoint, write_langsplat_checkpoint
from datamodules.readers.langsplat_fields import read_langsplat_field
from lightning_modules.functional.splatting.gaussians import GaussianScene
from tests.datamodules.tiny_scene import random_scene

LAYERS, SIZE, CHANNELS = 2, 5, 8


def write(path: Path, scene: GaussianScene, seed: int, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(scene.num_gaussians, LAYERS * size, generator=generator)
    codebooks = torch.randn(LAYERS, size, CHANNELS, generator=generator)
    write_langsplat_checkpoint(path, scene, logits, codebooks, 10_000)
    return logits, codebooks


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [tmp_path / f"teatime_0_{level}" / "chkpnt10000.pth" for level in (1, 2, 3)]


def test_levels_follow_one_another_layer_by_layer(paths):
    scene = random_scene()
    written = [write(path, scene, seed) for seed, path in enumerate(paths)]
    field = read_langsplat_field(paths, 3)
    assert all(torch.equal(own, given) for own, given in zip(field.scene, scene, strict=True))
    assert field.codebooks.shape == (3, LAYERS, SIZE, CHANNELS)
    assert field.logits.shape == (scene.num_gaussians, 3 * LAYERS, SIZE)
    for level, (logits, codebooks) in enumerate(written):
        assert torch.equal(field.codebooks[level], codebooks)
        for layer in range(LAYERS):
            assert torch.equal(field.logits[:, level * LAYERS + layer], logits[:, layer * SIZE : (layer + 1) * SIZE])


def test_one_level_is_a_field(paths):
    write(paths[0], random_scene(), 0)
    assert read_langsplat_field(paths[:1], 1).logits.shape[1] == LAYERS


def test_files_and_levels_are_as_many(paths):
    with pytest.raises(ValueError, match=r"has 3 files for 1 levels.*one per level.*levels to those you have"):
        read_langsplat_field(paths, 1)


def test_a_checkpoint_of_the_scene_alone_is_refused(paths):
    scene = random_scene()
    write(paths[0], scene, 0)
    write_gaussian_checkpoint(paths[1], scene, 30_000)
    with pytest.raises(ValueError, match=r"teatime_0_2/chkpnt10000.pth has no language.*lerf.yaml"):
        read_langsplat_field(paths[:2], 2)


@pytest.mark.parametrize(
    ("scene", "size", "message"),
    [
        (random_scene(21), SIZE, "has 21 Gaussians, but .*teatime_0_1.* has 20"),
        (random_scene(), 7, r"codebooks of \[2, 7, 8\].*of \[2, 5, 8\]"),
        (random_scene(seed=4), SIZE, "differ in means, .* of their Gaussians"),
    ],
)
def test_checkpoints_of_different_trainings_are_refused(paths, scene, size, message):
    write(paths[0], random_scene(), 0)
    write(paths[1], scene, 1, size)
    with pytest.raises(ValueError, match=message):
        read_langsplat_field(paths[:2], 2)
