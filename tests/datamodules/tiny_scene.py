"""A scene of a few Gaussians and views in the real layout, written by the project's own writers."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datamodules.readers.colmap import write_colmap_model
from datamodules.readers.gaussians import write_gaussian_ply
from datamodules.readers.language_features import write_language_features
from datamodules.readers.lerf_labels import LabelledFrame, LabelledObject, write_lerf_label
from datamodules.readers.text_embeddings import write_text_embeddings
from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting.gaussians import GaussianScene, quaternions_to_matrices

WIDTH, HEIGHT, CHANNELS = 32, 24, 8
PHRASES = ("object", "things", "stuff", "texture", "mug", "old camera")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def random_scene(num_gaussians: int = 20, num_bases: int = 16, seed: int = 0) -> GaussianScene:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3,), (3,), (4,), (), (num_bases, 3))
    return GaussianScene(*(torch.randn(num_gaussians, *shape, generator=generator) for shape in shapes))


def random_camera(seed: int = 0) -> Camera:
    pose = torch.eye(4)
    pose[:3, :3] = quaternions_to_matrices(unit(4, seed=seed))
    pose[:3, 3] = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    intrinsics = torch.tensor([[30.0, 0.0, 15.5], [0.0, 31.0, 12.25], [0.0, 0.0, 1.0]])
    return Camera(pose, intrinsics, WIDTH, HEIGHT)


def write_tiny_scene(root: Path, num_views: int = 5, num_labelled: int = 2) -> Path:
    """Writes ``frame_00001.png`` and so on; each level of view i has two masks (left and right) of its own features."""
    rng = np.random.default_rng(0)
    names = [f"frame_{index:05d}" for index in range(1, num_views + 1)]
    (root / "images").mkdir(parents=True)
    for index, name in enumerate(names):
        Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(root / "images" / f"{name}.png")
        maps = np.full((4, HEIGHT, WIDTH), -1)
        maps[:, :, : WIDTH // 2] = 0
        maps[:, : HEIGHT // 2, WIDTH // 2 :] = 1
        per_level = [unit(2, CHANNELS, seed=10 * index + level).numpy() for level in range(4)]
        write_language_features(root / "language_features", name, per_level, maps)
        if index < num_labelled:
            corners = np.array([[2.0, 3.0], [12.0, 3.0], [12.0, 20.0], [2.0, 20.0]])
            box = np.array([2.0, 3.0, 12.0, 20.0])
            things = [LabelledObject("mug", corners, box), LabelledObject("old camera", corners + 10, box + 10)]
            write_lerf_label(root / "label" / f"{name}.json", LabelledFrame(name, WIDTH, HEIGHT, things))
    cameras = {f"{name}.png": random_camera(index) for index, name in enumerate(names)}
    write_colmap_model(root / "sparse" / "0", cameras, np.zeros((1, 3)), np.zeros((1, 3), np.uint8))
    write_gaussian_ply(root / "gaussians.ply", random_scene())
    write_text_embeddings(root / "text_embeddings.npz", PHRASES, unit(len(PHRASES), CHANNELS, seed=99))
    return root
