import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from torch import Tensor

from lightning_modules.functional.language_features.mask_regions import remove_small_regions
from lightning_modules.functional.language_features.mask_sources import MaskSource
from lightning_modules.networks import segment_anything_masks
from lightning_modules.networks.segment_anything_masks import SegmentAnythingMasks, SlotMaskGenerator
from tests.networks.tiny_segment_anything import build_tiny_sam, disk_sam

SETTINGS = {"points_per_side": 8, "pred_iou_thresh": 0.7, "stability_score_thresh": 0.5, "points_per_batch": 24}


def photo_of_cells(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(20, 0).repeat(20, 1)


def assert_equals_stock(ours: tuple, settings: dict, slot: int | None, photo: np.ndarray) -> int:
    records = SamAutomaticMaskGenerator(disk_sam(slot), **settings).generate(photo)
    masks, scores = ours[0 if slot is None else slot + 1]
    np.testing.assert_array_equal(masks.numpy(), np.stack([record["segmentation"] for record in records]))
    stock = [record["predicted_iou"] * record["stability_score"] for record in records]
    np.testing.assert_allclose(scores.numpy(), stock, rtol=1e-6)
    return len(records)


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_each_granularity_is_what_the_stock_generator_makes_of_its_slot(crop_n_layers: int) -> None:
    photo, settings = photo_of_cells(), SETTINGS | {"crop_n_layers": crop_n_layers}
    ours = SlotMaskGenerator(disk_sam(), **settings).generate(photo)
    counts = [assert_equals_stock(ours, settings, slot, photo) for slot in (None, 0, 1, 2)]
    assert min(counts) > 10
    assert counts[0] < sum(counts[1:])  # suppressed across slots in default alone


def test_each_granularity_is_stock_after_small_regions_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cv2")
    photo = photo_of_cells()
    settings = SETTINGS | {
        "crop_n_layers": 1,
        "min_mask_region_area": 60,
        "box_nms_thresh": 0.5,
        "crop_nms_thresh": 0.5,
    }
    ours = SlotMaskGenerator(disk_sam(), **settings).generate(photo)
    for slot in (None, 0, 1, 2):
        assert_equals_stock(ours, settings, slot, photo)
    monkeypatch.setattr(segment_anything_masks, "remove_small_regions", lambda mask, _: (mask, False))
    untouched = SlotMaskGenerator(disk_sam(), **settings).generate(photo)
    assert any(
        a.masks.shape != b.masks.shape or (a.masks != b.masks).any() for a, b in zip(ours, untouched, strict=True)
    )


def test_a_point_and_a_slot_predict_the_mask_of_that_granularity_again() -> None:
    photo = photo_of_cells()
    ours = SlotMaskGenerator(disk_sam(), **SETTINGS).generate(photo)
    predictor = SamPredictor(disk_sam())
    predictor.set_image(photo)
    for slot, (masks, _) in enumerate(ours[1:]):
        records = SamAutomaticMaskGenerator(disk_sam(slot), **SETTINGS).generate(photo)
        for mask, record in zip(masks.numpy(), records, strict=True):
            predicted, _, _ = predictor.predict(np.array(record["point_coords"]), np.array([1]))
            np.testing.assert_array_equal(mask, predicted[slot])
            assert not (predicted[(slot + 1) % 3] == mask).all()


def test_the_network_sees_each_crop_once_for_all_four_granularities() -> None:
    sam, seen = disk_sam(), []
    sam.image_encoder.register_forward_hook(lambda *_: seen.append(1))
    SlotMaskGenerator(sam, **SETTINGS, crop_n_layers=1).generate(photo_of_cells())
    assert len(seen) == 5


def test_a_photo_without_masks_has_four_empty_sets() -> None:
    settings = SETTINGS | {"pred_iou_thresh": 2.0, "crop_n_layers": 1, "min_mask_region_area": 10}
    for masks, scores in SlotMaskGenerator(disk_sam(), **settings).generate(photo_of_cells()):
        assert masks.shape == (0, 120, 160)
        assert scores.shape == (0,)
    some = SETTINGS | {"stability_score_thresh": 2.0}
    assert [len(level.masks) for level in SlotMaskGenerator(disk_sam(), **some).generate(photo_of_cells())] == [0] * 4


def test_a_level_may_be_empty_beside_others_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sam = disk_sam()
    decode = sam.mask_decoder.forward

    def without_middle(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        masks, ious = decode(**inputs)
        return masks, ious * torch.tensor([1.0, 0.0, 1.0])

    monkeypatch.setattr(sam.mask_decoder, "forward", without_middle)
    default, s, m, l = SlotMaskGenerator(sam, **SETTINGS, min_mask_region_area=30).generate(photo_of_cells())  # noqa: E741
    assert len(m.masks) == 0
    assert min(len(default.masks), len(s.masks), len(l.masks)) > 0


def test_region_removal_needs_no_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # importing it fails
    photo, settings = photo_of_cells(), SETTINGS | {"min_mask_region_area": 60}
    for masks, _ in SlotMaskGenerator(disk_sam(), **settings).generate(photo):
        for mask in masks.numpy():
            np.testing.assert_array_equal(remove_small_regions(mask, 60)[0], mask)


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of a small network of Segment Anything's classes, registered as tiny; one of another width as wide."""
    monkeypatch.setitem(sam_model_registry, "tiny", build_tiny_sam)
    monkeypatch.setitem(sam_model_registry, "wide", lambda checkpoint=None: build_tiny_sam(width=48))
    torch.save(build_tiny_sam().state_dict(), tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def test_weights_of_pth_and_safetensors_give_the_networks_own_masks(tiny_checkpoint: Path) -> None:
    settings = {"points_per_side": 4, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "crop_n_layers": 0}
    photo = torch.from_numpy(photo_of_cells())
    sam = build_tiny_sam().eval()
    sam.load_state_dict(torch.load(tiny_checkpoint))
    expected = SlotMaskGenerator(sam, **settings, min_mask_region_area=100).generate(photo.numpy())
    save_file(sam.state_dict(), tiny_checkpoint.with_suffix(".safetensors"))
    for path in (tiny_checkpoint, tiny_checkpoint.with_suffix(".safetensors")):
        source = SegmentAnythingMasks(path, "tiny", **settings)
        assert isinstance(source, MaskSource)
        assert not any(module.training for module in source.train().modules())
        assert not any(parameter.requires_grad for parameter in source.parameters())
        for ours, theirs in zip(source(photo), expected, strict=True):
            assert torch.equal(ours.masks, theirs.masks)
            assert torch.equal(ours.scores, theirs.scores)
    assert len(expected[0].masks) > 0


class _RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        save({"image_encoder.pos_embed": _RunsCode(tmp_path / "was_run")}, tiny_checkpoint)
        with pytest.raises(ValueError, match=r"tiny\.pth cannot be read as weights \(.*nothing was executed\)"):
            SegmentAnythingMasks(tiny_checkpoint, "tiny")
    assert not (tmp_path / "was_run").exists()


def test_damaged_files_are_refused_wherever_they_end(tiny_checkpoint: Path) -> None:
    save_file(build_tiny_sam().state_dict(), tiny_checkpoint.with_suffix(".safetensors"))
    torch.save(
        build_tiny_sam().state_dict(),
        legacy := tiny_checkpoint.with_name("old.pth"),
        _use_new_zipfile_serialization=False,
    )
    for path in (tiny_checkpoint, legacy, tiny_checkpoint.with_suffix(".safetensors")):
        content = path.read_bytes()
        for kept in (0, 1, 5, 100, 3000, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:kept])
            with pytest.raises(
                ValueError, match=r"cannot be read as weights \(it is truncated, damaged or none\)\. Download"
            ):
                SegmentAnythingMasks(path, "tiny")


def test_files_of_other_models_are_named_with_the_one_that_fits(tiny_checkpoint: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"tiny\.pth does not fit model_type wide \(.*pos_embed is \[1, 8, 8, 32\], needed"
        r" \[1, 8, 8, 48\]\)\. It is of tiny: set model_type",
    ):
        SegmentAnythingMasks(tiny_checkpoint, "wide")
    with pytest.raises(ValueError, match=r"does not fit model_type vit_b .* or download sam_vit_b_01ec64\.pth"):
        SegmentAnythingMasks(tiny_checkpoint, "vit_b")
    state = build_tiny_sam().state_dict()
    torch.save({name: state[name] for name in list(state)[:-1]}, tiny_checkpoint)
    with pytest.raises(ValueError, match=rf"does not fit model_type tiny \({list(state)[-1]} is missing\)\. Download"):
        SegmentAnythingMasks(tiny_checkpoint, "tiny")
    torch.save(state | {"more": torch.zeros(1)}, tiny_checkpoint)
    with pytest.raises(ValueError, match=r"\(more is unknown\)"):
        SegmentAnythingMasks(tiny_checkpoint, "tiny")
    torch.save([1, 2], tiny_checkpoint)
    with pytest.raises(ValueError, match="holds no weights; needed: tensors by name"):
        SegmentAnythingMasks(tiny_checkpoint, "tiny")


def test_absent_files_and_unknown_types_fail_at_once_with_the_remedy(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist\. Download sam_vit_h_4b8939\.pth"):
        SegmentAnythingMasks(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r"model_type is 'vit_g'; allowed: vit_h, vit_l, vit_b\."):
        SegmentAnythingMasks(tmp_path / "nowhere.pth", "vit_g")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("setting", ["points_per_side", "points_per_batch", "crop_n_points_downscale_factor"])
def test_settings_below_one_are_refused(tiny_checkpoint: Path, setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} 0"):
        SegmentAnythingMasks(tiny_checkpoint, "tiny", **{setting: 0})
