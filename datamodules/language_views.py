"""The views of a scene in memory: integer maps as small as they go, photographs and label masks made when asked for."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batches import LanguageView, PromptLabels
from datamodules.readers.lerf_labels import LabelledFrame, rasterize_labels
from lightning_modules.functional.cameras import Camera


class StoredView(NamedTuple):
    """What is kept of one view; see :class:`datamodules.batches.LanguageView`.

    Attributes:
        name: Image stem.
        camera: The camera at the size of the maps.
        photo: Its photograph's file, or None.
        mask_ids: [L, H, W] int16 where 32767 masks suffice, else int32; -1 = no mask. None without features.
        mask_features: [M, C] unit features, or None.
        frame: Its labels, or None.
    """

    name: str
    camera: Camera
    photo: Path | None
    mask_ids: Int[Tensor, "levels height width"] | None
    mask_features: Float[Tensor, "masks channels"] | None
    frame: LabelledFrame | None


class LanguageViews(Dataset[LanguageView]):
    """Some views of a scene as batches of one.

    Args:
        stored: All views of the scene, sorted by name.
        view_ids: Which of them, in which order.
        text_embeddings: Unit embedding of every labelled category.
        with_photos: Whether the photographs are decoded.
    """

    def __init__(
        self,
        stored: Sequence[StoredView],
        view_ids: Sequence[int],
        text_embeddings: Mapping[str, Float[Tensor, " channels"]],
        with_photos: bool,
    ) -> None:
        self._stored = stored
        self.view_ids = list(view_ids)
        self._text_embeddings = text_embeddings
        self._with_photos = with_photos

    @property
    def names(self) -> list[str]:
        """The stems of the views."""
        return [self._stored[view_id].name for view_id in self.view_ids]

    def __iter__(self) -> Iterator[LanguageView]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self.view_ids)

    def __getitem__(self, index: int) -> LanguageView:
        view_id = self.view_ids[index]
        view = self._stored[view_id]
        width, height = view.camera.width, view.camera.height
        labels = None
        if view.frame is not None:
            prompts, masks, boxes = rasterize_labels(view.frame, width, height)
            embeddings = torch.stack([self._text_embeddings[prompt] for prompt in prompts])
            labels = PromptLabels(prompts, embeddings, masks, boxes)
        return LanguageView(
            name=view.name,
            view_id=view_id,
            camera=view.camera,
            image=read_photo(view.photo, width, height) if self._with_photos and view.photo else None,
            mask_ids=None if view.mask_ids is None else view.mask_ids.int(),
            mask_features=view.mask_features,
            labels=labels,
        )


def compact_ids(mask_ids: Int[Tensor, "levels height width"], num_masks: int) -> Int[Tensor, "levels height width"]:
    """Returns the map as int16 where the ids fit."""
    return mask_ids.to(torch.int16 if num_masks <= torch.iinfo(torch.int16).max else torch.int32)


def read_photo(path: Path, width: int, height: int) -> UInt8[Tensor, "height width 3"]:
    """Decodes a photograph as RGB at a size; reduced by averaging over areas where it is larger.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with Image.open(path) as image:
            photo = image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow reports broken PNG chunks as SyntaxError
        raise ValueError(f"{path} cannot be read as a photo ({error}). Copy it again.") from error
    if photo.size != (width, height):
        photo = photo.resize(
            (width, height), Image.Resampling.BOX if photo.width > width else Image.Resampling.BILINEAR
        )
    return torch.from_numpy(np.array(photo))


def photo_size(path: Path) -> tuple[int, int]:
    """Returns width and height from a photograph's header.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a photo ({error}). Copy it again.") from error
