"""The experiments of 3D-OVS and Mip-NeRF360-OVS on tiny scenes in their layouts, against their scripts as loops."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datamodules.readers.gaussians import write_gaussian_ply
from datamodules.readers.labels import read_labels
from datamodules.readers.lerf_labels import LabelledFrame, LabelledObject, polygon_mask, write_lerf_label
from datamodules.readers.text_embeddings import TextEmbeddingTable, write_text_embeddings
from lightning_modules.functional.answers.relevancy import contrast
from lightning_modules.functional.language_field.sparse_codes import densify_codes
from lightning_modules.functional.splatting.rasterization import render_codes
from tests.datamodules.tiny_scene import CHANNELS, HEIGHT, WIDTH, random_scene, unit, write_tiny_scene
from tests.functional.answers.test_lerf_protocol import literal_mean_rule
from tests.functional.answers.test_resized_language_map import bilinear
from train import main

CONFIGS = Path(__file__).parents[2] / "configs" / "language_field"
PHRASES = ("object", "things", "stuff", "texture", "banana", "wood wall", "wood table")
POOLS = (29, 7)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = write_tiny_scene(tmp_path / "room")
    shutil.rmtree(folder / "label")
    scene = random_scene(400, num_bases=1)
    write_gaussian_ply(folder / "gaussians.ply", scene._replace(means=2 * scene.means, log_scales=scene.log_scales - 1))
    write_text_embeddings(folder / "text_embeddings.npz", PHRASES, unit(len(PHRASES), CHANNELS, seed=99))
    return folder


def figures_of(config: str, root: Path, runs: Path, *flags: str):
    """Lifts a field, tests it, and returns the module and the figures."""
    common = [
        "--config", str(CONFIGS / config), f"--data.init_args.root={root}", "--data.init_args.text=null",
        f"--trainer.logger.init_args.save_dir={runs}", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", *flags,
    ]  # fmt: skip
    main(["fit", *common, "--trainer.max_steps=0", "--trainer.limit_val_batches=0"])
    module = main(["test", *common, "--ckpt_path=last"]).model
    (metrics,) = runs.glob("*/test_metrics.json")
    return module, json.loads(metrics.read_text())


def unit_features(module, view) -> np.ndarray:
    """[L, H, W, C] decoded features of a view, each of length one or zero."""
    language = module.language_scene()
    weights, _ = render_codes(module.prepared(view), language.codes)
    levels = weights.double().unflatten(1, (3, -1)).unbind(1)
    features = [F.normalize(w @ book.double(), dim=1) for w, book in zip(levels, language.codebooks, strict=True)]
    assert densify_codes(language.codes).sum() > 0
    return torch.stack(features).unflatten(1, (HEIGHT, WIDTH)).detach().numpy()


def literal_relevancy(features: np.ndarray, text: torch.Tensor, negatives: torch.Tensor) -> np.ndarray:
    pixels = torch.from_numpy(features).flatten(0, 2)
    scores = contrast(pixels @ text[:, None].double(), pixels @ negatives.T.double(), 10.0)
    return scores.reshape(features.shape[:3]).numpy()


def overlap(mask: np.ndarray, target: np.ndarray) -> float:
    return (mask & target).sum() / max((mask | target).sum(), 1)


def masks_of(seed: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=np.uint8)
    top, left = height // 5 + seed, width // 6 + 2 * seed
    mask[top : top + height // 2, left : left + width // 2] = 255
    return mask


@pytest.mark.slow
def test_3d_ovs_gives_the_figure_of_its_script(root, tmp_path):
    frames = ("frame_00001", "frame_00004")
    for number, frame in enumerate(frames):
        (root / "segmentations" / frame).mkdir(parents=True)
        for offset, name in enumerate(("banana", "wood wall")):
            mask = masks_of(2 * number + offset, 2 * WIDTH, 2 * HEIGHT)  # labelled at twice the size
            Image.fromarray(mask).save(root / "segmentations" / frame / f"{name}.png")
    (root / "segmentations" / "classes.txt").write_text("banana\nwood wall\n")
    module, figures = figures_of("3d_ovs.yaml", root, tmp_path / "runs")

    table = TextEmbeddingTable(root / "text_embeddings.npz")
    negatives = module.negative_embeddings
    overlaps = []
    for view in module.data.views:
        if view.name not in frames:
            continue
        features = unit_features(module, view)
        for name in ("banana", "wood wall"):
            maps = literal_relevancy(features, table.encode([name])[0], negatives)
            wall = name == "wood wall"
            second = literal_relevancy(features, table.encode(["wood table"])[0], negatives) if wall else None
            masks, level, _ = literal_mean_rule(maps, second, 0.25, (1, 2), POOLS, 3)
            label = np.array(Image.open(root / "segmentations" / view.name / f"{name}.png"))
            overlaps.append(overlap(masks[level], label[::2, ::2] == 255))  # nearest neighbour
    assert len(overlaps) == 4
    assert figures["test/miou"] == pytest.approx(np.mean(overlaps), abs=0.005)
    assert 0 < figures["test/miou"] < 1
    assert not any("localization" in name for name in figures)


@pytest.mark.slow
def test_mip_nerf360_gives_the_figure_of_its_script(root, tmp_path):
    size, folder = (40, 30), tmp_path / "Mip-NeRF360-OVS" / "room"
    folder.mkdir(parents=True)
    for number in (1, 3):
        corners = np.array([[5.0, 4], [25, 4], [25, 20], [5, 20]]) + 2 * number
        box = np.array([5.0, 4, 25, 20]) + 2 * number
        things = [LabelledObject("banana", corners, box), LabelledObject("wood wall", corners - 4, box - 4)]
        frame = LabelledFrame(f"frame_{number:05d}", *size, things)
        write_lerf_label(folder / f"{frame.stem}.json", frame)
    module, figures = figures_of("mip_nerf360.yaml", root, tmp_path / "runs", f"--data.init_args.labels={folder}")

    table = TextEmbeddingTable(root / "text_embeddings.npz")
    labels, overlaps = read_labels(folder), []
    for number in (1, 3):  # counted from 1 in the order of the names
        view = module.data.views[number - 1]
        features = unit_features(module, view)
        resized = np.stack([bilinear(level, *size) for level in features])
        for thing in labels[f"frame_{number:05d}"].objects:
            maps = literal_relevancy(resized, table.encode([thing.category])[0], module.negative_embeddings)
            masks, level, _ = literal_mean_rule(maps, None, 0.4, (0, 1, 2), POOLS, 3)
            overlaps.append(overlap(masks[level], polygon_mask(thing.polygon, *size)))
    assert figures["test/miou"] == pytest.approx(np.mean(overlaps), abs=0.005)
    assert 0 < figures["test/miou"] < 1
    assert "test/localization_accuracy" in figures


def write_masks(root: Path, *classes: str) -> None:
    (root / "segmentations" / "frame_00001").mkdir(parents=True)
    for name in classes:
        Image.fromarray(masks_of(0, WIDTH, HEIGHT)).save(root / "segmentations" / "frame_00001" / f"{name}.png")


def test_a_prompt_missing_from_the_offline_table_is_told_before_training(root, tmp_path):
    write_masks(root, "banana", "red bag")
    with pytest.raises(ValueError, match="no embedding of 'red bag'"):
        figures_of("3d_ovs.yaml", root, tmp_path / "runs")


def test_a_companion_missing_from_the_offline_table_is_told_before_training(root, tmp_path):
    write_masks(root, "banana", "wood wall")
    write_text_embeddings(root / "text_embeddings.npz", PHRASES[:-1], unit(len(PHRASES) - 1, CHANNELS, seed=99))
    with pytest.raises(ValueError, match="no embedding of 'wood table'"):
        figures_of("3d_ovs.yaml", root, tmp_path / "runs")


def test_levels_that_the_field_does_not_have_are_told_before_training(root, tmp_path):
    write_masks(root, "banana")
    with pytest.raises(ValueError, match=r"competing_levels is \[1, 2\], but there are 2 levels"):
        figures_of("3d_ovs.yaml", root, tmp_path / "runs", "--data.init_args.levels=[2, 3]")
