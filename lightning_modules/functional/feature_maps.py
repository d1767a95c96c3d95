"""Dense feature maps from weight maps, in the signatures of LangSplatV2's renderer.

Training and queries never need them (see ``coefficient_space``); they are the reference, and for whoever wants them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# A map is decoded in bands of rows of this many bytes, so that what is needed besides the result stays small.
BAND_BYTES = 2**26


def compute_final_feature_map(
    weight_map: Float[Tensor, "entries height width"],
    codebook: Float[Tensor, "layers size channels"],
    normalize: bool = False,
) -> Float[Tensor, "channels height width"]:
    """Decodes a weight map: the sum over all layers of coefficient times entry.

    Args:
        weight_map: [layers * size, H, W] coefficients.
        codebook: Entries; same dtype (float32 or float16) and device.
        normalize: Scale each pixel's feature to unit length; a feature of zero stays zero.

    Raises:
        ValueError: If shapes or dtypes do not belong together; says which are allowed.
    """
    _check(weight_map, codebook, codebook.shape[0] * codebook.shape[1] if codebook.ndim == 3 else 0)
    features = _decode(weight_map, codebook.flatten(0, 1))
    return F.normalize(features, dim=0) if normalize else features


def compute_layer_feature_map(
    weight_map: Float[Tensor, "entries height width"], codebook: Float[Tensor, "layers size channels"], layer_idx: int
) -> Float[Tensor, "channels height width"]:
    """Decodes the layers up to one, for training layer after layer: the lower layers are detached.

    Args:
        weight_map: [layers * size, H, W] coefficients.
        codebook: Entries; same dtype and device.
        layer_idx: The layer in training, 0 to layers - 1.

    Raises:
        ValueError: If shapes or dtypes do not belong together, or there is no such layer; says which are allowed.
    """
    _check(weight_map, codebook, codebook.shape[0] * codebook.shape[1] if codebook.ndim == 3 else 0)
    num_layers, size, _ = codebook.shape
    if not 0 <= layer_idx < num_layers:
        raise ValueError(f"layer_idx must be between 0 and {num_layers - 1} (the codebook's layers), got {layer_idx}.")
    start = layer_idx * size
    features = _decode(weight_map[start : start + size], codebook[layer_idx])
    if layer_idx == 0:
        return features
    return features + _decode(weight_map[:start].detach(), codebook[:layer_idx].detach().flatten(0, 1))


def compute_feature_map_quick(
    weight_map: Float[Tensor, "layers size height width"], codebook: Float[Tensor, "layers size channels"]
) -> Tensor:
    """Decodes each slice of a weight map with its own entries; nothing is summed.

    LangSplatV2's quick path stacks its three levels like this. It normalises each level afterwards; here that is left
    to the caller.

    Args:
        weight_map: [layers, size, H, W] coefficients.
        codebook: Entries; same dtype and device.

    Returns:
        [C, H, W] for one slice, [layers, C, H, W] for more.

    Raises:
        ValueError: If shapes or dtypes do not belong together; says which are allowed.
    """
    if weight_map.ndim != 4 or codebook.ndim != 3 or weight_map.shape[:2] != codebook.shape[:2]:
        raise ValueError(
            "weight_map must be [layers, size, H, W] for a codebook [layers, size, C]; got "
            f"{list(weight_map.shape)} and {list(codebook.shape)}."
        )
    _check_dtypes(weight_map, codebook)
    maps = [_decode(weights, entries) for weights, entries in zip(weight_map, codebook, strict=True)]
    return maps[0] if len(maps) == 1 else torch.stack(maps)


def _check(weight_map: Tensor, codebook: Tensor, num_entries: int) -> None:
    if weight_map.ndim != 3 or codebook.ndim != 3 or weight_map.shape[0] != num_entries:
        raise ValueError(
            "weight_map must be [layers * size, H, W] for a codebook [layers, size, C]; got "
            f"{list(weight_map.shape)} and {list(codebook.shape)}."
        )
    _check_dtypes(weight_map, codebook)


def _check_dtypes(weight_map: Tensor, codebook: Tensor) -> None:
    if weight_map.dtype != codebook.dtype or weight_map.device != codebook.device:
        raise ValueError(
            f"weight_map and codebook must have one dtype and device; got {weight_map.dtype} on {weight_map.device} "
            f"and {codebook.dtype} on {codebook.device}."
        )


def _decode(
    weight_map: Float[Tensor, "entries height width"], entries: Float[Tensor, "entries channels"]
) -> Float[Tensor, "channels height width"]:
    """One matrix product; without gradients, and if the map is large, band by band straight into the result."""
    _, height, width = weight_map.shape
    row_bytes = weight_map.shape[0] * width * weight_map.element_size()
    band = max(1, BAND_BYTES // max(1, row_bytes))
    tracked = torch.is_grad_enabled() and (weight_map.requires_grad or entries.requires_grad)
    if tracked or band >= height:
        return (entries.T @ weight_map.flatten(1)).unflatten(1, (height, width))
    features = weight_map.new_empty(entries.shape[1], height, width)
    for top in range(0, height, band):
        rows = weight_map[:, top : top + band]
        features[:, top : top + band] = (entries.T @ rows.flatten(1)).unflatten(1, rows.shape[1:])
    return features
