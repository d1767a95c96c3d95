"""Automatic masks by Segment Anything (arXiv 2304.02643), its three output slots kept apart as LangSplat needs them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from safetensors.torch import load_file
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    MaskData,
    batch_iterator,
    batched_mask_to_box,
    calculate_stability_score,
    generate_crop_boxes,
    is_box_near_crop_edge,
    uncrop_boxes_xyxy,
    uncrop_masks,
)
from torch import Tensor, nn
from torchvision.ops import box_area, nms
from typing_extensions import override

from lightning_modules.functional.language_features.mask_regions import remove_small_regions
from lightning_modules.functional.language_features.mask_sources import MaskSet, MaskSource
from lightning_modules.functional.open_clip_loading import UNREADABLE_WEIGHTS

CHECKPOINTS = {
    "vit_h": "sam_vit_h_4b8939.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_b": "sam_vit_b_01ec64.pth",
}
_PIXEL_MEAN = (123.675, 116.28, 103.53)
_PIXEL_STD = (58.395, 57.12, 57.375)
_BITS = torch.arange(8, dtype=torch.uint8)


class SegmentAnythingMasks(nn.Module, MaskSource):
    """Segment Anything with a grid of points on the photograph and its crops. The defaults are LangSplat's.

    The granularities s, m and l are the three masks that the network gives for a point, not ordered by area;
    ``default`` is all of them. Each goes by itself through LangSplat's chain: predicted IoU, stability, crop edges, box
    suppression within a crop and between crops, removal of small regions and box suppression once more. The network
    runs once for all four. On CUDA the image encoder runs under bfloat16 autocast; masks are decoded in float32.

    Args:
        checkpoint: ``.pth`` or ``.safetensors`` file of the weights.
        model_type: vit_h, vit_l or vit_b.
        points_per_side: Points along each side of the photograph.
        points_per_batch: Points decoded at a time; each takes up to 21 MB at 988 x 730.
        pred_iou_thresh: Predicted IoU to exceed.
        stability_score_thresh: Least IoU between the masks cut off ``stability_score_offset`` above and below zero.
        stability_score_offset: In logits.
        box_nms_thresh: Box IoU above which the mask of lower predicted IoU goes, within a crop.
        crop_n_layers: Layers of crops; layer i has 4^i of them.
        crop_nms_thresh: Box IoU above which the mask of the larger crop goes.
        crop_overlap_ratio: Overlap of crops as a fraction of the photograph's shorter side.
        crop_n_points_downscale_factor: By which ``points_per_side`` shrinks from layer to layer.
        min_mask_region_area: Holes and islands of fewer pixels are removed; 0 keeps them.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is damaged, holds more than tensors, or is of another model; or a setting is out of its range.
    """

    def __init__(
        self,
        checkpoint: str | Path = "ckpts/sam_vit_h_4b8939.pth",
        model_type: str = "vit_h",
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.7,
        stability_score_thresh: float = 0.85,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 1,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        min_mask_region_area: int = 100,
    ) -> None:
        super().__init__()
        if min(points_per_side, points_per_batch, crop_n_points_downscale_factor) < 1 or crop_n_layers < 0:
            raise ValueError(
                f"points_per_side {points_per_side}, points_per_batch {points_per_batch} and "
                f"crop_n_points_downscale_factor {crop_n_points_downscale_factor} must be 1 or more, and crop_n_layers "
                f"{crop_n_layers} 0 or more."
            )
        self.sam = load_segment_anything(checkpoint, model_type).eval().requires_grad_(False)
        self._generator = SlotMaskGenerator(
            self.sam,
            points_per_side=points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset,
            box_nms_thresh=box_nms_thresh,
            crop_n_layers=crop_n_layers,
            crop_nms_thresh=crop_nms_thresh,
            crop_overlap_ratio=crop_overlap_ratio,
            crop_n_points_downscale_factor=crop_n_points_downscale_factor,
            min_mask_region_area=min_mask_region_area,
        )

    @override
    def train(self, mode: bool = True) -> nn.Module:
        """Stays in evaluation mode."""
        return super().train(False)

    @override
    def forward(self, photo: UInt8[Tensor, "height width 3"]) -> tuple[MaskSet, MaskSet, MaskSet, MaskSet]:
        """Returns the masks of default, s, m and l on the photo's device."""
        with torch.autocast(self.sam.device.type, enabled=False):  # whatever the trainer's precision is
            sets = self._generator.generate(photo.cpu().numpy())
        default, s, m, l = (MaskSet(*(field.to(photo.device) for field in level)) for level in sets)  # noqa: E741
        return default, s, m, l


class SlotMaskGenerator(SamAutomaticMaskGenerator):
    """The stock generator with the network's output slots kept apart.

    A candidate belongs to ``default`` and to the granularity of its slot until it is suppressed there: the field
    ``levels`` of the data, [n, 4]. Each list has the masks and the order that the stock generator gives for those slots
    alone. Between network and suppression a mask is kept as packed bits on the network's device.

    Args:
        model: The network.
        min_mask_region_area: As in the stock generator, but without OpenCV.
        settings: The other settings of the stock generator.
    """

    def __init__(self, model: Sam, *, min_mask_region_area: int = 0, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.min_mask_region_area = min_mask_region_area

    @torch.no_grad()
    @override
    def generate(self, image: UInt8[np.ndarray, "height width 3"]) -> tuple[MaskSet, ...]:
        """Returns the masks of default, s, m and l on the network's device."""
        size = (image.shape[0], image.shape[1])
        crops, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        data = MaskData()
        for crop, layer in zip(crops, layers, strict=True):
            data.cat(self._process_crop(image, crop, layer, size))
        if len(crops) > 1:
            _suppress_boxes(data, 1 / box_area(data["crop_boxes"]), self.crop_nms_thresh)
        data["masks"] = _unpack(data["bits"], size[1])
        if self.min_mask_region_area > 0 and len(data["masks"]):
            self._remove_small_regions(data)
        scores = data["stability_score"] * data["iou_preds"]
        return tuple(MaskSet(data["masks"][level], scores[level]) for level in data["levels"].unbind(dim=1))

    @override
    def _process_crop(
        self, image: np.ndarray, crop_box: list[int], crop_layer_idx: int, orig_size: tuple[int, ...]
    ) -> MaskData:
        x1, y1, x2, y2 = crop_box
        device = self.predictor.device
        half = torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16
        with torch.autocast(device.type, dtype=half, enabled=device.type == "cuda"):
            self.predictor.set_image(image[y1:y2, x1:x2])
        self.predictor.features = self.predictor.features.float()
        points = self.point_grids[crop_layer_idx] * np.array([[x2 - x1, y2 - y1]])
        data = MaskData()
        for (batch,) in batch_iterator(self.points_per_batch, points):
            data.cat(self._process_batch(batch, (y2 - y1, x2 - x1), crop_box, orig_size))
        self.predictor.reset_image()
        _suppress_boxes(data, data["iou_preds"], self.box_nms_thresh)
        data["boxes"] = uncrop_boxes_xyxy(data["boxes"], crop_box)
        data["crop_boxes"] = torch.tensor([crop_box], device=device).expand(len(data["boxes"]), 4)
        return data

    @override
    def _process_batch(
        self, points: np.ndarray, im_size: tuple[int, ...], crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        sam, device = self.predictor.model, self.predictor.device
        prompts = torch.as_tensor(self.predictor.transform.apply_coords(points, im_size), device=device)[:, None]
        sparse, dense = sam.prompt_encoder(
            points=(prompts, torch.ones(prompts.shape[:2], dtype=torch.int, device=device)), boxes=None, masks=None
        )
        logits, iou_preds = sam.mask_decoder(
            image_embeddings=self.predictor.features,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        slots = torch.arange(iou_preds.shape[1], device=device).repeat(len(points))
        data = MaskData(
            masks=logits.flatten(0, 1),
            iou_preds=iou_preds.flatten(),
            levels=torch.stack([torch.ones_like(slots), *(slots == slot for slot in range(3))], dim=1).bool(),
        )
        if self.pred_iou_thresh > 0:  # before the masks are brought to the size of the photograph
            data.filter(data["iou_preds"] > self.pred_iou_thresh)
        sizes = self.predictor.input_size, self.predictor.original_size
        data["masks"] = sam.postprocess_masks(data["masks"][:, None], *sizes)[:, 0]
        data["stability_score"] = calculate_stability_score(
            data["masks"], sam.mask_threshold, self.stability_score_offset
        )
        if self.stability_score_thresh > 0:
            data.filter(data["stability_score"] >= self.stability_score_thresh)
        data["masks"] = data["masks"] > sam.mask_threshold
        data["boxes"] = batched_mask_to_box(data["masks"])
        data.filter(~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, orig_size[1], orig_size[0]]))
        data["bits"] = _pack(uncrop_masks(data["masks"], crop_box, *orig_size))
        del data["masks"]
        return data

    def _remove_small_regions(self, data: MaskData) -> None:
        """Cleans the masks and suppresses what now repeats another; masks that were clean go first."""
        cleaned, changed = zip(
            *(remove_small_regions(mask, self.min_mask_region_area) for mask in data["masks"].cpu().numpy()),
            strict=True,
        )
        device = data["boxes"].device
        data["masks"] = torch.from_numpy(np.stack(cleaned)).to(device)
        data["boxes"] = batched_mask_to_box(data["masks"])
        was_clean = 1 - torch.tensor(changed, dtype=torch.float32, device=device)
        _suppress_boxes(data, was_clean, max(self.box_nms_thresh, self.crop_nms_thresh))


def _suppress_boxes(data: MaskData, scores: Float[Tensor, " masks"], threshold: float) -> None:
    """Suppresses boxes within each level by itself and orders the data by falling score."""
    order = scores.argsort(descending=True, stable=True)
    data.filter(order)
    for level in data["levels"].unbind(dim=1):
        rows = level.nonzero()[:, 0]
        kept = rows[nms(data["boxes"][rows].float(), scores[order][rows], threshold)]
        level.zero_()
        level[kept] = True
    data.filter(data["levels"].any(dim=1))


def _pack(masks: Bool[Tensor, "masks height width"]) -> UInt8[Tensor, "masks height bytes"]:
    padded = F.pad(masks, (0, -masks.shape[2] % 8)).unflatten(2, (-1, 8))
    return (padded << _BITS.to(masks.device)).sum(dim=3, dtype=torch.uint8)


def _unpack(bits: UInt8[Tensor, "masks height bytes"], width: int) -> Bool[Tensor, "masks height width"]:
    return (bits[..., None] >> _BITS.to(bits.device)).bitwise_and_(1).bool().flatten(2)[:, :, :width]


def load_segment_anything(checkpoint: str | Path, model_type: str) -> Sam:
    """Builds a network of Segment Anything from a file of weights; never runs code that the file may hold.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the model type is unknown, or the file is damaged, holds more than tensors, or of another type.
    """
    allowed = [name for name in sam_model_registry if name != "default"]
    if model_type not in allowed:
        raise ValueError(f"model_type is {model_type!r}; allowed: {', '.join(allowed)}.")
    path = Path(checkpoint)
    remedy = f"Download {CHECKPOINTS.get(model_type, 'the weights')} (linked from the README of segment-anything)"
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist. {remedy}, and give its path.")
    state = _read_tensors(path, remedy)
    sam = _empty_network(model_type)
    mismatch = _mismatch(sam, state)
    if mismatch is not None:
        fitting = [name for name in allowed if _mismatch(_empty_network(name), state) is None]
        advice = f"It is of {fitting[0]}: set model_type to that, or d" if fitting else "D"
        raise ValueError(f"{path} does not fit model_type {model_type} ({mismatch}). {advice}{remedy[1:]}.")
    sam.load_state_dict(state, assign=True)
    # The normalisation is not in the checkpoints.
    sam.pixel_mean, sam.pixel_std = (torch.tensor(values).view(3, 1, 1) for values in (_PIXEL_MEAN, _PIXEL_STD))
    return sam.float()


def _empty_network(model_type: str) -> Sam:
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        return sam_model_registry[model_type]()


def _mismatch(sam: Sam, state: Mapping[str, Tensor]) -> str | None:
    """Says what differs first between the names and shapes of a network and of a file."""
    expected = sam.state_dict()
    for name in [*expected, *state]:
        if name not in state:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is unknown"
        if expected[name].shape != state[name].shape:
            return f"{name} is {list(state[name].shape)}, needed {list(expected[name].shape)}"
    return None


def _read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE_WEIGHTS as error:
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it asks for {asked_for[1]}; nothing was executed" if asked_for else "it is truncated, damaged or none"
        )
        raise ValueError(f"{path} cannot be read as weights ({reason}). {remedy} again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no weights; needed: tensors by name. {remedy}.")
    return state
